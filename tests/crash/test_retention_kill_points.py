"""kill -9 at every step of a retention run: each study is whole or gone with its certificate; the next run ends it.

The steps are enumerated, not random. A seeded sample of them runs here, all in 'make crash' (STRONGROOM_CRASH=all).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from aged import Aged, Day, copy_archive, make_archive, make_empty, on
from conftest import Server
from test_erase import Died, ring_of
from test_reencrypt import clean
from test_reencrypt_kill_points import counted, locked
from test_rotate import Attached, held

from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.ledger import Ledger
from storage.records import Records
from storescp.config import load
from storescp.vault.auditor import Auditor
from storescp.vault.erase import Erase
from storescp.vault.holding import Holding
from storescp.vault.pending import Pending

EVERY = os.environ.get("STRONGROOM_CRASH") == "all"
SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))
A, B, HELD, KEPT = "1.2.3.1", "1.2.3.2", "1.2.3.3", "1.2.3.4"

STEPS = (
    (Ledger, "set_erasure"),
    (Records, "put_all"),
    (Records, "remove"),
    (KeysDatabase, "remove"),
    (Archive, "remove"),
    (Index, "drop"),
    (Index, "forget"),
    (Auditor, "record"),
    (os, "rename"),
    (os, "fsync"),
)


@pytest.mark.timeout(3600 if EVERY else 120)
def test_a_retention_run_that_ends_at_any_of_its_steps_leaves_each_study_whole_or_gone_with_its_certificate(
    make_server: Callable[[], Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    day = Day(monkeypatch, "2026-03-01")
    aged = Aged(copy_archive(make_empty(tmp_path / "empty"), make_server))
    for n in (1, 2):
        for study in (A, B, HELD, KEPT):
            aged.receive(study, n, received="2015-06-15" if study != KEPT else "2020-06-15", content=study.encode())
        aged.admit()
    Holding(aged.vault).place(1000, on(HELD))
    aged.gate.close_all()
    locked(aged)
    prepared = tmp_path / "prepared"
    shutil.copytree(aged.config.store_path, prepared)

    def run(at: int, *, after: bool) -> list[str]:
        """Begin anew and end at a step, before or after it; return the steps up to there."""
        shutil.rmtree(aged.config.store_path)
        shutil.copytree(prepared, aged.config.store_path)
        aged.vault = aged._vault()
        steps: list[str] = []
        with monkeypatch.context() as patched:
            for owner, name in STEPS:
                patched.setattr(owner, name, counted(getattr(owner, name), name, steps, at, after=after))
            with contextlib.suppress(Died):
                for text in ("2026-03-01", "2026-04-01"):
                    day.set(text)
                    aged.run()
        aged.died()
        return steps

    steps = run(0, after=False)
    assert {name for _, name in STEPS} == set(steps)
    assert (aged.held_studies(), aged.certificates()) == ({HELD, KEPT}, 2)
    points = [(at, after) for at in range(1, len(steps) + 1) for after in (False, True)]
    print(f"{len(points)} points: {dict(Counter(steps))}")
    locked(aged)
    for at, after in points if EVERY else random.Random(SEED).sample(points, 12):
        done = run(at, after=after)
        assert len(done) == at
        said = (at, after, done[-1])
        # As the vault does when it is unlocked.
        Erase(aged.vault).resume()
        whole = set()
        for study in (A, B, HELD, KEPT):
            if aged.states(study):
                whole.add(study)
                for n in (1, 2):
                    aged.holds(study, n, study.encode())
        assert {HELD, KEPT} <= whole, said
        assert aged.certificates() == 4 - len(whole), said
        assert all(aged.certificate(erasure)["state"] == "pending" for erasure in aged.erasures()), said
        clean(aged)
        # One that was marked again gets its whole time of grace.
        for text in ("2026-04-01", "2026-05-01"):
            day.set(text)
            aged.run()
        assert (aged.held_studies(), aged.certificates(), aged.retain.pending()) == ({HELD, KEPT}, 2, []), said
        clean(aged)
        locked(aged)


CALLS = "pwrite64,write,fsync,fdatasync,rename,unlink"


@pytest.mark.needs("strace")
@pytest.mark.needs_root
@pytest.mark.usefixtures("collected")
@pytest.mark.timeout(7200 if EVERY else 300)
def test_a_vault_killed_before_any_system_call_of_a_retention_run_finishes_it(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    make_archive(tmp_path / "store", 6)
    server = copy_archive(tmp_path / "store", make_server)
    with server.config.open("a") as file:
        file.write('\n[[retention.rules]]\nname = "all"\nkeep = "P7Y"\n')
    expected = held(server)
    of_study = {row["sop"]: row["study"] for row in server.list()}
    assert set(of_study) == set(expected)
    server.ok("retention", "run", "--confirm")
    due = grown_old(server)
    assert 0 < len(due) < 6
    left = {uid: data for uid, data in expected.items() if of_study[uid] not in due}
    prepared = server.home / "prepared"
    for name in ("store", "spool"):
        shutil.copytree(server.home / name, prepared / name)

    def certificates() -> int:
        return len(list((server.store / "certificates").glob("*.json")))

    def run(calls: str, when: int) -> str:
        for name in ("store", "spool"):
            shutil.rmtree(server.home / name)
            shutil.copytree(prepared / name, server.home / name)
        server.start("vault")
        traced = Attached(server, calls, when)
        done = server.run("retention", "run", "--confirm")
        assert when or done.status == 0, (done.out, done.err)
        alive = traced.vault in server.pids("vault")
        traced.end()
        server.stop(signal.SIGKILL)
        server.kill_all()
        assert alive != bool(when), (calls, when)
        return traced.output.read_text()

    calls = re.findall(r"^(\d+) +(\w+)\(", run(CALLS, 0), re.MULTILINE)
    (thread, _), *_ = Counter(pid for pid, _ in calls).most_common(1)
    counts = Counter(call for pid, call in calls if pid == thread)
    assert {"rename", "fsync", "pwrite64", "unlink"} <= counts.keys(), counts
    assert (held(server), certificates()) == (left, len(due))
    points = [(call, when) for call, count in sorted(counts.items()) for when in range(1, count + 1)]
    print(f"{len(points)} points: {dict(counts)}")
    if not EVERY:
        # Renames and unlinks are the steps; of the rest there is much more.
        chance = random.Random(SEED)
        steps = [point for point in points if point[0] in {"rename", "unlink"}]
        points = [*chance.sample(steps, 1), *chance.sample([p for p in points if p not in steps], 1)]
    for call, when in points:
        run(call, when)
        # It goes on by itself when it is unlocked again.
        now = held(server)
        gone = due - {of_study[uid] for uid in now}
        assert now == {uid: data for uid, data in expected.items() if of_study[uid] not in gone}, (call, when)
        assert certificates() == len(gone), (call, when)
        assert server.ok("verify", "--json").json()["findings"] == [], (call, when)
        server.ok("retention", "run", "--confirm")
        assert (held(server), certificates()) == (left, len(due)), (call, when)
        assert server.ok("verify", "--json").json()["findings"] == [], (call, when)


def grown_old(server: Server) -> set[str]:
    """Let the time of grace of all that is pending be over; return which studies these are."""
    config = load(server.config)
    ring = ring_of(server)
    ledger = Ledger(config.ledger(1), ring.version(1).ledger_key())
    records = ledger.records("pending", Pending)
    pending = list(records.all())
    for one in pending:
        one.from_day = "2020-01-01"
        records.put(one.study, one, "pending")
    ledger.close()
    ring.forget()
    return {one.study for one in pending}
