"""kill -9 at every step of a re-encryption: each write, sync, rename and transaction, and the real process besides.

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
from typing import Any

import pytest
from conftest import Server
from test_erase import Died, House
from test_reencrypt import ALL, clean, contents, furnished, keys_of, reencrypt, summary
from test_rotate import Attached, filled, held, rows

from storage import direct
from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.ledger import Ledger
from storescp.vault.reencrypt import Reencrypt

EVERY = os.environ.get("STRONGROOM_CRASH") == "all"
SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))

STEPS = (
    (Ledger, "begin_reencryption"),
    (Ledger, "move"),
    (Ledger, "settle"),
    (Ledger, "end_reencryption"),
    (KeysDatabase, "exchange"),
    (KeysDatabase, "forget"),
    (Archive, "finish"),
    (Archive, "remove"),
    (Index, "move"),
    (Index, "forget"),
    (direct, "write_all"),
    (os, "rename"),
    (os, "ftruncate"),
    (os, "fsync"),
)


@pytest.mark.timeout(3600 if EVERY else 120)
def test_a_re_encryption_that_ends_at_any_of_its_steps_goes_on(
    make_server: Callable[[], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    server.init()
    house = House(server)
    furnished(house)
    before, keys = contents(house), set(keys_of(house).values())
    house.gate.close_all()
    locked(house)
    prepared = server.home / "prepared"
    shutil.copytree(house.config.store_path, prepared)
    taken = 0

    def run(at: int, *, after: bool) -> list[str]:
        """Begin anew and end at a step, before or after it; return the steps up to there."""
        shutil.rmtree(house.config.store_path)
        shutil.copytree(prepared, house.config.store_path)
        house.vault = house._vault()
        steps: list[str] = []
        with monkeypatch.context() as patched:
            # Nothing is tidied up on the way out, as nobody does for a process that is killed.
            patched.setattr(Reencrypt, "_close", lambda *_: None)
            for owner, name in STEPS:
                patched.setattr(owner, name, counted(getattr(owner, name), name, steps, at, after=after))
            with contextlib.suppress(Died):
                reencrypt(house)
        house.died()
        return steps

    steps = run(0, after=False)
    assert {name for _, name in STEPS} == set(steps)
    points = [(at, after) for at in range(1, len(steps) + 1) for after in (False, True)]
    print(f"{len(points)} points: {dict(Counter(steps))}")
    locked(house)
    for at, after in points if EVERY else random.Random(SEED).sample(points, 10):
        # The folder of a pack that is made may be there already, by its random name, which saves a sync.
        while len(done := run(at, after=after)) < at:
            assert at - len(done) <= steps.count("finish")
        said = (at, after, done[-1])
        assert contents(house) == before, said
        clean(house)
        # What had not begun is begun; what had ended has ended.
        known = house.vault.unlocked().ledger.reencryptions()
        if not (known and known[0].ended):
            assert summary(reencrypt(house, ALL)) == (5, 0), said
        assert contents(house) == before, said
        clean(house)
        assert not keys & set(keys_of(house).values()), said
        locked(house)
        taken += 1
    assert taken


def counted(whole: Callable[..., Any], name: str, steps: list[str], at: int, *, after: bool) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        # Who is dead does nothing more.
        if at and len(steps) >= at:
            raise Died
        steps.append(name)
        if len(steps) == at and not after:
            raise Died
        result = whole(*arguments, **options)
        if len(steps) == at:
            raise Died
        return result

    return step


def locked(house: House) -> None:
    house.vault.lock()
    house.vault.auditor.close()


CALLS = "pwrite64,write,fsync,fdatasync,rename,unlink,ftruncate"


@pytest.mark.needs("strace")
@pytest.mark.needs_root
@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(7200 if EVERY else 300)
def test_a_vault_killed_before_any_system_call_of_a_re_encryption_goes_on_with_it(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    expected = filled(server, 2)
    assert held(server) == expected
    old = set(rows(server))
    prepared = server.home / "prepared"
    for name in ("store", "spool"):
        shutil.copytree(server.home / name, prepared / name)

    def run(calls: str, when: int) -> str:
        for name in ("store", "spool"):
            shutil.rmtree(server.home / name)
            shutil.copytree(prepared / name, server.home / name)
        server.start("vault")
        traced = Attached(server, calls, when)
        done = server.run("keys", "reencrypt", "--all", "--reason", "a test")
        assert when or done.status == 0, (done.out, done.err)
        alive = traced.vault in server.pids("vault")
        traced.end()
        server.stop(signal.SIGKILL)
        server.kill_all()
        assert alive != bool(when), (calls, when, done.out, done.err)
        return traced.output.read_text()

    told = run(CALLS, 0)
    # The thread that gives packs their names; others of the vault have work of their own.
    named = re.search(r'^(\d+) +rename\(".*/objects/', told, re.MULTILINE)
    assert named is not None
    counts = Counter(re.findall(rf"^{named[1]} +(\w+)\(", told, re.MULTILINE))
    assert {"rename", "fsync", "pwrite64", "unlink"} <= counts.keys(), counts
    # The rarest first: renames and unlinks are the steps.
    calls = sorted(counts, key=lambda call: counts[call])
    points = [(call, when) for call in calls for when in range(1, counts[call] + 1)]
    print(f"{len(points)} points: {dict(counts)}")
    if not EVERY:
        # Renames and unlinks are the steps; of the rest there is much more.
        chance = random.Random(SEED)
        steps = [point for point in points if point[0] in {"rename", "unlink"}]
        points = [*chance.sample(steps, 1), *chance.sample([p for p in points if p not in steps], 1)]
    for call, when in points:
        run(call, when)
        assert held(server) == expected, (call, when)
        again = server.run("keys", "reencrypt")
        if again.status:
            # It had not begun, or had come to its end.
            assert "no re-encryption is under way" in again.err
            if old & set(rows(server)):
                server.ok("keys", "reencrypt", "--all", "--reason", "a test")
        assert held(server) == expected, (call, when)
        assert not old & set(rows(server)), (call, when)
        assert len(rows(server)) == 2
        files = {path.name for path in (server.store / "objects").rglob("*") if path.is_file()}
        assert files == set(rows(server)), (call, when)
        assert not list(server.store.rglob("*.new")), (call, when)
