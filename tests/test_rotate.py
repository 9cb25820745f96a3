"""Key rotation: while objects arrive, killed anywhere, with forged deposits, full disks and changed records."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
from conftest import Server, changed, dcmtk, find_command, send, tls_arguments
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from scu import raw_data_set

from keys import keyring, slots
from keys.anchors import FileAnchors
from keys.versions import StudyKeyPlace, new_key
from storage import attributes
from storage.deposit import Deposits, PublishedKeys
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Decision, Rotation
from storage.pack import PAGE, parse_header
from storage.search import Filters
from storage.sqlite import connect
from storescp.config import load
from storescp.errors import LOCKED, StrongroomError
from storescp.vault.opened import Open
from storescp.vault.rotate import Rotate
from storescp.vault.state import Vault

CT = Path(str(get_testdata_file("CT_small.dcm")))
OBJECT = scu.read(CT)
WAIVED = {"export": "a test", "backup": "a test"}
WAIVERS = ("--without-export", "a test", "--without-backup", "a test")
PROVED = "the proof is in the audit chain"
ALL = os.environ.get("STRONGROOM_CRASH") == "all"
ROUNDS = int(os.environ.get("STRONGROOM_CRASH_ROUNDS", "4"))
SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))

pytestmark = [
    # pynetdicom leaves sockets to the garbage collector when the other end was faster.
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def instance(study: int, number: int = 0) -> scu.Object:
    """Return the CT as another instance, of one of many studies; UIDs keep their length."""
    data, uids = OBJECT.data, []
    for old, end in ((OBJECT.sop_instance, f"9{study:05d}{number:03d}"), (OBJECT.study, f"8{study:05d}")):
        new = old[: -len(end)] + end
        assert data.count(old.encode()) == 1
        data = data.replace(old.encode(), new.encode())
        uids.append(new)
    return OBJECT._replace(sop_instance=uids[0], study=uids[1], data=data)


# --- stores, and vaults in this process


def filled(server: Server, studies: int = 4, **settings: Any) -> dict[str, bytes]:
    """Make a store into which a gate received an instance of each study; return them by UID."""
    server.init()
    folder = server.add_peer("CT1")
    server.set("gate", workers=1, spare_bytes=0)
    server.set("keys", destroy_after_days=settings.get("days", 0))
    server.start("gate")
    items = [instance(study) for study in range(studies)]
    assert scu.send(server.port, scu.tls(folder), items) == [0] * studies
    assert server.stop() == 0
    return {item.sop_instance: item.data for item in items}


@contextlib.contextmanager
def unlocked(server: Server) -> Iterator[Vault]:
    """Give the vault of a store, in this process, with everything admitted."""
    vault = Vault(load(server.config))
    vault.unlock(slots.read_key_file(server.home / "store.key"))
    try:
        vault.admit()
        yield vault
    finally:
        vault.lock()
        vault.auditor.close()


def rotate(vault: Vault, reason: str = "a test", waived: dict[str, str] | None = None, **options: float) -> list[str]:
    """Run a rotation to where it stops; return what it said."""
    told = Rotate(vault, **options).run(0, reason, dict(WAIVED if waived is None else waived))
    return [event["text"] for event in told if "text" in event]


def decide(vault: Vault) -> Decision:
    """Record a decision in the ledger that concerns nothing."""
    decision = Decision("2026-01-31T12:00:00Z", 0, "discard", "ab" * 16, "cd" * 16, "", "", "a test")
    with vault.admitting():
        vault.unlocked().admission.decide(decision)
    return decision


def ledger_of(server: Server) -> tuple[list[Decision], list[Rotation]]:
    """Return the decisions and rotations of a store on which no vault runs."""
    config = load(server.config)
    secret = slots.read_key_file(server.home / "store.key")
    open_ = Open(config, keyring.unlock(config.keyring, secret, FileAnchors(config.anchors)))
    try:
        return open_.ledger.decisions(), open_.ledger.rotations()
    finally:
        open_.close()


def held(server: Server) -> dict[str, bytes]:
    """Return what is held, by UID; everything must verify."""
    out = server.home / f"out-{secrets.token_hex(4)}"
    done = server.run("export", "--all", "--to", out)
    assert done.status in {0, 5}, done.err
    verified = server.run("verify")
    assert verified.status == 0, (verified.out, verified.err)
    found = {path.stem: raw_data_set(path) for path in out.rglob("*.dcm")}
    shutil.rmtree(out, ignore_errors=True)
    return found


@contextlib.contextmanager
def keys_db(server: Server) -> Iterator[Any]:
    """Give keys.db to somebody who goes behind the vault's back."""
    # The vault's own SQLite: two libraries in one process take each other's locks away.
    with contextlib.closing(connect(server.store / "keys.db").conn) as db:
        yield db


def rows(server: Server) -> dict[str, tuple[Any, ...]]:
    """Return the rows of keys.db."""
    with keys_db(server) as db:
        return {row[0]: row for row in db.execute("SELECT * FROM study_key ORDER BY pack_id")}


def put(server: Server, row: tuple[Any, ...]) -> None:
    """Put a row into keys.db behind the vault's back."""
    with keys_db(server) as db:
        db.execute("DELETE FROM study_key WHERE pack_id = ?", row[:1])
        db.execute("INSERT INTO study_key VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def versions(server: Server) -> Counter[int]:
    return Counter(row[2] for row in rows(server).values())


def states(server: Server) -> dict[int, str]:
    return {v["version"]: v["state"] for v in server.ok("keys", "status", "--json").json()["versions"]}


# --- while objects arrive


class Sender(threading.Thread):
    """Sends study after study until told to stop; keeps what was acknowledged and what went wrong."""

    def __init__(self, send_study: Callable[[int], dict[str, Any]], first: int) -> None:
        super().__init__(daemon=True)
        self.acknowledged: dict[str, Any] = {}
        self.failed: list[BaseException] = []
        self.studies = threading.Semaphore(0)
        self._send, self._next = send_study, first
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                self.acknowledged |= self._send(self._next)
            except BaseException as error:
                self.failed.append(error)
            self._next += 1
            self.studies.release()

    def wait(self, studies: int) -> None:
        for _ in range(studies):
            assert self.studies.acquire(timeout=60)

    def finish(self) -> None:
        self._ended.set()
        self.join(60)
        assert not self.is_alive()


@pytest.mark.needs("storescu")
def test_a_rotation_refuses_nothing_loses_nothing_and_breaks_no_association(server: Server, tmp_path: Path) -> None:
    folder = server.home / "issued" / "CT1"
    context = scu.tls(folder)

    def by_pynetdicom(study: int) -> dict[str, Any]:
        items = [instance(study, number) for number in range(3)]
        with scu.associated(server.port, context, [items[0].context]) as association:
            assert [scu.store(association, item).Status for item in items] == [0, 0, 0]
        return {item.sop_instance: item.data for item in items}

    def by_storescu(study: int) -> dict[str, Any]:
        uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
        (made := tmp_path / f"study-{study}").mkdir()
        files = [changed(CT, made, SOPInstanceUID=generate_uid(), **uids) for _ in range(2)]
        done = dcmtk("storescu", "-v", *tls_arguments(folder), "127.0.0.1", str(server.port), *files)
        assert done.status == 0, done.err
        assert (done.out + done.err).count("Received Store Response (Success)") == 2
        return {str(pydicom.dcmread(file).SOPInstanceUID): file for file in files}

    def by_one_association(study: int) -> dict[str, Any]:
        # One study all the time, on one association: its pack is never idle.
        item = instance(99_000, study)
        if not association or not association[0].is_established:
            association[:] = [scu.request(server.port, context, [item.context])]
            opened.append(association[0])
        assert scu.store(association[0], item).Status == 0
        return {item.sop_instance: item.data}

    association: list[Any] = []
    opened: list[Any] = []
    before = set(server.pids("gate-worker"))
    senders = [Sender(by_pynetdicom, 0), Sender(by_pynetdicom, 10_000), Sender(by_storescu, 0)]
    senders.append(Sender(by_one_association, 0))
    readers: list[int] = []
    reading = threading.Event()

    def read() -> None:
        while not reading.is_set():
            readers.append(server.run("list", "study").status)
            readers.append(server.run("export", "--all", "--to", tmp_path / f"out-{len(readers)}").status)

    reader = threading.Thread(target=read)
    try:
        for sender in senders:
            sender.wait(2)
        reader.start()
        done = server.run("keys", "rotate", "--reason", "a test", timeout=110)
        assert done.status == 0, (done.out, done.err)
        assert PROVED in done.out
        for sender in senders:
            sender.wait(3)
        # The drain ended, so every pack that is open now was made under the new key.
        deadline = time.monotonic() + 30
        named: set[int] = set()
        while not named:
            assert time.monotonic() < deadline
            for path in server.deposits():
                with contextlib.suppress(FileNotFoundError):
                    if path.suffix != ".events":
                        named.add(parse_header(path.read_bytes()[:PAGE]).version)
            # One that is being admitted in this moment names none any more.
            named.discard(0)
        assert named == {2}
    finally:
        for sender in senders:
            sender.finish()
        reading.set()
        reader.join(60)
        for one in association:
            one.release()
    assert [sender.failed for sender in senders] == [[], [], [], []]
    assert len(opened) == 1
    assert set(readers) == {0}
    assert set(server.pids("gate-worker")) == before
    server.wait_admitted()
    assert set(versions(server)) == {2}
    out = server.home / "all"
    server.ok("export", "--all", "--to", out)
    files = {path.stem: path for path in out.rglob("*.dcm")}
    sent = {uid: content for sender in senders for uid, content in sender.acknowledged.items()}
    assert files.keys() == sent.keys()
    for uid, content in sent.items():
        if isinstance(content, bytes):
            assert raw_data_set(files[uid]) == content
        else:
            assert scu.same(files[uid], content)
    assert server.run("verify").status == 0


# --- killed


def quarantined_and_decided(server: Server, tmp_path: Path) -> None:
    """Have an admin decide about a contradiction, so that the ledger holds what nothing else does."""
    other = changed(CT, tmp_path, SliceLocation="77.5")
    assert send(server, [CT, other]) == [0, 0]
    server.wait_admitted()
    [item] = server.ok("quarantine", "list", "--json").json()["items"]
    server.ok("quarantine", "resolve", item["id"], "--discard", "--reason", "a test")


@pytest.mark.timeout(60 + 30 * ROUNDS)
def test_a_vault_killed_at_any_time_of_a_rotation_goes_on_with_it(server: Server, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    server.set("keys", destroy_after_days=0)
    context = scu.tls(server.home / "issued" / "CT1")
    expected = {OBJECT.sop_instance: OBJECT.data}
    quarantined_and_decided(server, tmp_path)
    server.stop()
    decisions = ledger_of(server)[0]
    assert len(decisions) == 1
    killed = 0
    for number in range(ROUNDS):
        server.start()
        item = instance(number)
        assert scu.send(server.port, context, [item]) == [0]
        expected[item.sop_instance] = item.data
        command = [sys.executable, "-m", "storescp", "--config", str(server.config), "keys", "rotate"]
        command += ["--reason", "a test", *WAIVERS]
        with contextlib.ExitStack() as holding:
            if number == 0:
                # One that is killed for certain: it cannot get further than this lock.
                newest = max((server.home / "spool" / "public").glob("deposit-*.key"))
                fcntl.flock(holding.enter_context(newest.open("rb")), fcntl.LOCK_SH)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert process.stdout is not None
            process.stdout.readline()
            timer = threading.Timer(chance.uniform(0.0, 1.5), server.kill, ("vault",))
            timer.start()
            process.communicate(timeout=100)
            timer.join()
        killed += process.returncode != 0
        server.stop(signal.SIGKILL)
        server.kill_all()
        assert held(server) == expected, (SEED, number)
        assert ledger_of(server)[0] == decisions, (SEED, number)
        again = server.ok("keys", "rotate", "--reason", "a test", *WAIVERS)
        assert PROVED in again.out, (SEED, number)
        assert held(server) == expected, (SEED, number)
        decided, rotations = ledger_of(server)
        assert decided == decisions
        assert all(r.proof for r in rotations)
        assert len(versions(server)) == 1
    assert killed


class Attached:
    """strace on a vault that runs: it writes calls down, and kills before the ``when``-th of one; never for 0."""

    def __init__(self, server: Server, calls: str, when: int) -> None:
        self.output = server.home / "trace"
        self.output.unlink(missing_ok=True)
        [self.vault] = server.pids("vault")
        command = [str(find_command("strace")), "-f", "-o", str(self.output), "-e", f"trace={calls}"]
        if when:
            command += ["-e", f"inject={calls}:signal=SIGKILL:when={when}"]
        self._process = subprocess.Popen([*command, "-p", str(self.vault)], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        assert "attached" in self._process.stderr.readline()

    def end(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=30)


CALLS = "pwrite64,write,fsync,fdatasync,rename,unlink,ftruncate"


@pytest.mark.needs("strace")
@pytest.mark.needs_root
@pytest.mark.timeout(3600 if ALL else 300)
def test_a_vault_killed_before_any_step_of_a_rotation_goes_on_with_it(make_server: Callable[[], Server]) -> None:
    server = make_server()
    expected = filled(server, 2)
    with unlocked(server) as vault:
        decision = decide(vault)
    prepared = server.home / "prepared"
    for name in ("store", "spool", "anchors"):
        shutil.copytree(server.home / name, prepared / name)

    def run(calls: str, when: int) -> str:
        for name in ("store", "spool", "anchors"):
            shutil.rmtree(server.home / name)
            shutil.copytree(prepared / name, server.home / name)
        server.start("vault")
        traced = Attached(server, calls, when)
        server.run("keys", "rotate", "--reason", "a test", *WAIVERS)
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
    points = [(call, when) for call, count in sorted(counts.items()) for when in range(1, count + 1)]
    print(f"{len(points)} points: {dict(counts)}")
    if not ALL:
        # Renames and unlinks are the steps; of the rest there is much more.
        chance = random.Random(SEED)
        steps = [point for point in points if point[0] in {"rename", "unlink"}]
        points = [*chance.sample(steps, 4), *chance.sample([p for p in points if p not in steps], 2)]
    for call, when in points:
        run(call, when)
        assert held(server) == expected, (call, when)
        decided, rotations = ledger_of(server)
        assert decided == [decision], (call, when)
        again = server.run("keys", "rotate", "--reason", "a test", *WAIVERS)
        assert again.status == 0, (call, when, again.err)
        # A kill behind the destruction leaves nothing to go on with: then this was another rotation.
        newest = 3 if rotations and rotations[0].proof else 2
        assert PROVED in again.out, (call, when)
        assert versions(server) == {newest: 2}, (call, when)
        assert held(server) == expected, (call, when)
        assert ledger_of(server)[0] == [decision], (call, when)
        found = {path.name for path in server.store.glob("*.db*")}
        assert found == {"keys.db", f"index-{newest}.db", f"ledger-{newest}.db"}, (call, when)
        assert not list(server.store.rglob("*.new")), (call, when)
        assert states(server) == {v: "current" if v == newest else "destroyed" for v in range(1, newest + 1)}


def test_a_command_that_went_away_leaves_a_rotation_that_the_next_one_finishes(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    expected = filled(server)
    with unlocked(server) as vault:
        for steps in range(1, 4):
            under_way = Rotate(vault).run(0, "a test", WAIVED)
            for _ in range(steps):
                next(under_way)
            under_way.close()
        assert PROVED in rotate(vault, reason="")[-2]
        assert [r.version for r in vault.unlocked().ledger.rotations()] == [2]
    assert held(server) == expected


# --- what holds a rotation up


def test_a_process_that_holds_the_old_deposit_key_is_named_and_waited_for(make_server: Callable[[], Server]) -> None:
    server = make_server()
    expected = filled(server)
    path = server.home / "spool" / "public" / "deposit-1.key"
    code = f"import fcntl, sys; f = open({str(path)!r}); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with unlocked(server) as vault:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline()
            with pytest.raises(StrongroomError, match=f"process {holder.pid} still makes a pack under version 1"):
                rotate(vault, lock_seconds=0.3)
            [rotation] = vault.unlocked().ledger.rotations()
            assert (rotation.sealed_off, rotation.proof) == (None, "")
            assert Rotate(vault).destroy_due() == []
            assert vault.unlocked().keys_db.versions() == {1: 4}
        finally:
            holder.communicate(b"\n")
        assert PROVED in rotate(vault, reason="", lock_seconds=0.3)[-2]
        assert vault.unlocked().keys_db.versions() == {2: 4}
    assert held(server) == expected


def test_a_deposit_that_is_still_open_holds_the_rotation_and_the_next_run_admits_it(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    filled(server)
    with unlocked(server) as vault:
        keys = PublishedKeys(vault.config.public, vault.config.signing_key)
        forger = deposits_of(vault, keys)
        record = begun(forger)
        with pytest.raises(StrongroomError, match="1 deposit under version 1 not admitted yet"):
            rotate(vault, drain_seconds=0.3)
        assert vault.unlocked().keys_db.versions() == {2: 4}
        record.finish(about(1))
        forger.close_all()
        assert PROVED in rotate(vault, reason="")[-2]
        assert vault.unlocked().keys_db.versions() == {2: 5}
        assert vault.unlocked().index.counts()["instances"] == 5


def deposits_of(vault: Vault, keys: PublishedKeys) -> Deposits:
    store_id = bytes.fromhex(vault.unlocked().ring.header.store_id)
    return Deposits(
        vault.config.incoming, store_id, keys, size_limit=1 << 30, idle_seconds=60, open_per_peer=4, spare_bytes=0
    )


def begun(deposits: Deposits) -> Any:
    record = deposits.begin("1.2.3", "CT1")
    record.write(memoryview(b"a data set"))
    return record


def about(number: int) -> bytes:
    """Return the attributes of an instance."""
    uids = {attributes.SOP_CLASS: "1.2", attributes.SOP_INSTANCE: f"1.2.3.{number}"}
    uids |= {attributes.STUDY: "1.2.3", attributes.SERIES: "1.2.4"}
    elements = {tag: attributes.Element("UI", [uid]) for tag, uid in uids.items()}
    received = attributes.Received("", "", "CT1", "STRONGROOM", "", "")
    return attributes.encode(attributes.Attributes(1, "1.2.840.10008.1.2", elements, {}, received))


def forge(vault: Vault, folder: Path, number: int) -> None:
    """Deposit an instance under the key that a folder still has."""
    deposits = deposits_of(vault, PublishedKeys(folder, vault.config.signing_key))
    begun_ = begun(deposits)
    begun_.finish(about(number))
    deposits.close_all()


def test_a_deposit_under_the_old_key_after_the_proof_goes_to_quarantine_and_holds_nothing_up(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = make_server()
    filled(server, days=7)
    shutil.copy(server.home / "spool" / "public" / "deposit-1.key", tmp_path)
    with unlocked(server) as vault:
        assert "stays until 20" in rotate(vault)[-1]
        open_ = vault.unlocked()
        forge(vault, tmp_path, 1)
        long_ago(vault)
        # It is not admitted yet: what it is nobody knows.
        assert Rotate(vault).destroy_due() == []
        vault.admit()
        assert list(vault.config.incoming.iterdir()) == []
        assert [row["sop"] for row in open_.index.quarantined()] == ["1.2.3.1"]
        assert open_.index.counts()["instances"] == 4
        assert open_.keys_db.versions() == {2: 5}
        assert Rotate(vault).destroy_due() == [1]
        forge(vault, tmp_path, 2)
        vault.admit()
        # Now its key opens no more: the file is kept, without a record.
        assert list(vault.config.incoming.iterdir()) == []
        assert len(open_.archive.quarantine_files()) == 2
        assert open_.keys_db.versions() == {2: 5}
        assert open_.index.counts()["instances"] == 4
        assert PROVED in rotate(vault)[-2]


def test_a_deposit_under_the_old_key_that_was_there_before_is_admitted(make_server: Callable[[], Server]) -> None:
    server = make_server()
    expected = filled(server)
    # Nothing was admitted yet: no vault ran.
    assert len([path for path in server.deposits() if path.suffix != ".events"]) == 4
    assert PROVED in server.ok("keys", "rotate", "--reason", "a test", *WAIVERS).out
    assert held(server) == expected
    assert server.status()["quarantine"] == 0


# --- the end of a version


def long_ago(vault: Vault) -> None:
    """Let the proofs be of a time long ago."""
    with vault.admitting():
        ledger = vault.unlocked().ledger
        for rotation in ledger.rotations():
            rotation.proved = "2026-01-31T12:00:00Z" if rotation.proved else ""
            ledger.set_rotation(rotation)


def test_after_the_destruction_a_stolen_copy_opens_nothing(make_server: Callable[[], Server]) -> None:
    server = make_server()
    expected = filled(server)
    assert held(server) == expected
    thief = make_server()
    for name in ("store", "spool", "anchors", "peers.d", "tls"):
        shutil.copytree(server.home / name, thief.home / name, ignore=shutil.ignore_patterns("*.sock"))
    for name in ("strongroom.toml", "store.key"):
        shutil.copy(server.home / name, thief.home / name)
    before = {path.name: path.read_bytes() for path in (thief.home / "anchors").iterdir()}
    said = server.ok("keys", "rotate", "--reason", "a test", *WAIVERS).out
    assert "the anchor of version 1 is destroyed" in said
    assert states(server) == {1: "destroyed", 2: "current"}
    assert "version 1 was destroyed at 20" in server.ok("keys", "status").out
    assert not (server.home / "spool" / "public" / "deposit-1.key").exists()
    assert not (server.home / "anchors" / "anchor-1").exists()
    # Everything from before, and of the anchors what is left; the record of generations as the thief likes it.
    shutil.rmtree(thief.home / "anchors")
    shutil.copytree(server.home / "anchors", thief.home / "anchors")
    (thief.home / "anchors" / "generation").write_bytes(before["generation"])
    done = thief.run("export", "--all", "--to", thief.home / "out")
    assert done.status not in {0, 5}
    assert "the anchor of version 1 cannot be read" in done.err
    assert not list((thief.home).rglob("*.dcm"))
    # The control: the old anchor is all that was missing.
    (thief.home / "anchors" / "anchor-1").write_bytes(before["anchor-1"])
    assert held(thief) == expected
    assert held(server) == expected


def test_the_anchor_stays_until_export_and_backup_are_waived_and_the_days_are_over(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    expected = filled(server, days=7)
    anchor = server.home / "anchors" / "anchor-1"
    with unlocked(server) as vault:
        said = rotate(vault, waived={})
        assert re.search(r"until a recovery export .* and a backup .* --without-export .* --without-backup", said[-1])
        long_ago(vault)
        assert Rotate(vault).destroy_due() == []
        said = rotate(vault, reason="", waived={"export": "a test"})
        assert "a backup made since is confirmed ('strongroom backup confirm'), or " in said[-1]
        assert "recovery export" not in said[-1]
        assert Rotate(vault).destroy_due() == []
        [rotation] = vault.unlocked().ledger.rotations()
        rotation.proved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 6 * 86_400))
        vault.unlocked().ledger.set_rotation(rotation)
        said = rotate(vault, reason="", waived={"backup": "a test"})
        due = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 86_400))
        assert f"the anchor of version 1 stays until {due[:8]}" in said[-1]
        assert Rotate(vault).destroy_due() == []
        assert anchor.exists()
        long_ago(vault)
        assert Rotate(vault).destroy_due() == [1]
        assert not anchor.exists()
        assert Rotate(vault).destroy_due() == []
        told = [r["type"] for r in vault.auditor.read(0) if r["type"].startswith(("rotation", "version"))]
        assert told == ["rotation-begun", "rotation-proved", "version-destroyed"]
    assert held(server) == expected


def test_the_anchor_stays_while_a_study_key_names_its_version(make_server: Callable[[], Server]) -> None:
    server = make_server()
    filled(server, days=7)
    with unlocked(server) as vault:
        old = next(iter(rows(server).values()))
        rotate(vault)
        new = rows(server)[old[0]]
        put(server, old)
        long_ago(vault)
        assert Rotate(vault).destroy_due() == []
        # Nothing to waive, but it says what it waits for.
        assert "until nothing names it; now 1 study key does" in rotate(vault, reason="")[-1]
        assert (server.home / "anchors" / "anchor-1").exists()
        put(server, new)
        assert Rotate(vault).destroy_due() == [1]


def test_waivers_for_two_rotations_that_wait_change_no_study_key_and_end_both(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    expected = filled(server)
    with unlocked(server) as vault:
        rotate(vault, waived={})
        rotate(vault, waived={})
        before = rows(server)
        said = rotate(vault, reason="")
        assert said == [f"the anchor of version {v} is destroyed (NIST SP 800-88: clear)" for v in (1, 2)]
        assert rows(server) == before
        assert versions(server) == {3: 4}
        assert vault.unlocked().database_version == 3
    assert held(server) == expected
    assert states(server) == {1: "destroyed", 2: "destroyed", 3: "current"}


# --- records that were changed


def edited(row: tuple[Any, ...], **columns: Any) -> tuple[Any, ...]:
    names = ["pack_id", "key_id", "version", "sealed", "study_tag", "length", "frames_digest", "admission"]
    return tuple(columns.get(name, value) for name, value in zip(names, row, strict=True))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


CHANGES: dict[str, Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]]] = {
    "another byte": lambda row, other: edited(row, sealed=flipped(row[3])),
    "cut short": lambda row, other: edited(row, sealed=row[3][:40]),
    "another pack's": lambda row, other: edited(row, sealed=other[3]),
    "another study": lambda row, other: edited(row, study_tag=other[4]),
    "another length": lambda row, other: edited(row, length=row[5] + 4096),
    "no length": lambda row, other: edited(row, length=-1),
    "another digest": lambda row, other: edited(row, frames_digest=other[6]),
    "another number": lambda row, other: edited(row, admission=1000),
    "no such version": lambda row, other: edited(row, version=77),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_study_key_record_stops_the_rewrap_and_no_other(
    make_server: Callable[[], Server], change: str
) -> None:
    server = make_server()
    expected = filled(server, 3)
    with unlocked(server) as vault:
        good, other, _ = rows(server).values()
        bad = CHANGES[change](good, other)
        put(server, bad)
        for _ in range(2):
            with pytest.raises(StrongroomError, match="still under their version: 1 study key"):
                rotate(vault)
            assert rows(server)[good[0]] == bad
            assert versions(server) == {2: 2, bad[2]: 1}
            assert Rotate(vault).destroy_due() == []
        assert [(r.version, r.proof) for r in vault.unlocked().ledger.rotations()] == [(2, "")]
        put(server, good)
        assert PROVED in rotate(vault)[-2]
    assert held(server) == expected


def test_two_records_that_were_swapped_stop_the_rewrap(make_server: Callable[[], Server]) -> None:
    server = make_server()
    filled(server, 3)
    with unlocked(server) as vault:
        one, other, _ = rows(server).values()
        put(server, edited(one, sealed=other[3]))
        put(server, edited(other, sealed=one[3]))
        with pytest.raises(StrongroomError, match="still under their version: 2 study keys"):
            rotate(vault)
        assert versions(server) == {1: 2, 2: 1}


@pytest.mark.parametrize("relabelled", [False, True])
def test_a_record_rolled_back_to_a_destroyed_version_stops_the_next_rotation(
    make_server: Callable[[], Server], relabelled: bool
) -> None:
    server = make_server()
    expected = filled(server, 3)
    with unlocked(server) as vault:
        old = next(iter(rows(server).values()))
        assert rotate(vault)[-1] == "the anchor of version 1 is destroyed (NIST SP 800-88: clear)"
        new = rows(server)[old[0]]
        bad = edited(old, version=2) if relabelled else old
        put(server, bad)
        with pytest.raises(StrongroomError, match="still under their version: 1 study key"):
            rotate(vault)
        assert rows(server)[old[0]] == bad
        assert versions(server)[3] == 2
        assert (server.home / "anchors" / "anchor-2").exists()
        put(server, new)
        assert PROVED in rotate(vault)[-2]
    assert held(server) == expected


@pytest.mark.parametrize("change", ["another byte", "another pack's", "another length"])
def test_a_record_changed_between_rewrap_and_proof_is_not_proved(
    make_server: Callable[[], Server], change: str
) -> None:
    server = make_server()
    filled(server, 3)
    with unlocked(server) as vault:
        under_way = Rotate(vault).run(0, "a test", WAIVED)
        with pytest.raises(StrongroomError, match="does not open under version 2"):
            for event in under_way:
                if "index and ledger" in event.get("text", ""):
                    good, other, _ = rows(server).values()
                    put(server, CHANGES[change](good, other))
        assert vault.unlocked().ledger.rotations()[0].proof == ""
        assert Rotate(vault).destroy_due() == []
        put(server, good)
        assert PROVED in rotate(vault)[-2]


# --- at once, without a reason, locked, on a full disk


def test_a_second_rotation_is_refused_while_one_is_at_work(make_server: Callable[[], Server]) -> None:
    server = make_server()
    filled(server)
    with unlocked(server) as vault:
        first = Rotate(vault).run(0, "a test", WAIVED)
        next(first)
        with pytest.raises(StrongroomError, match="another 'keys rotate' or 'keys reencrypt' is at work"):
            rotate(vault)
        assert PROVED in "\n".join(event.get("text", "") for event in first)
        assert [r.version for r in vault.unlocked().ledger.rotations()] == [2]
        assert versions(server) == {2: 4}


def test_of_rotations_that_begin_at_once_one_is_done_and_the_others_corrupt_nothing(server: Server) -> None:
    context = scu.tls(server.home / "issued" / "CT1")
    items = [instance(study) for study in range(3)]
    assert scu.send(server.port, context, items) == [0, 0, 0]
    command = [sys.executable, "-m", "storescp", "--config", str(server.config), "keys", "rotate", "--reason", "a test"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [(*process.communicate(timeout=100), process.returncode) for process in started]
    done = [out for out, _, status in ended if status == 0]
    refused = [error for _, error, status in ended if status]
    assert done
    assert all(PROVED in out for out in done)
    assert all("another 'keys rotate' or 'keys reencrypt' is at work on this store" in error for error in refused)
    assert versions(server) == {1 + len(done): 3}
    assert held(server) == {item.sop_instance: item.data for item in items}


def test_a_rotation_without_a_reason_is_refused(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    for arguments in ((), ("--reason", " "), WAIVERS):
        done = server.run("keys", "rotate", *arguments)
        assert done.status == 1
        assert "a rotation needs a reason" in done.err
    assert states(server) == {1: "current"}


def test_keys_of_a_locked_vault_answer_4_and_begin_nothing(make_server: Callable[[], Server]) -> None:
    server = make_server()
    (server.home / "passphrase").write_text("copper lantern fjord mistake\n")
    server.ok("init", "--with-pki", "--passphrase-file", server.home / "passphrase", "--listen", "127.0.0.1:0")
    server.start()
    assert server.run("keys", "rotate", "--reason", "a test").status == 4
    assert server.run("keys", "status").status == 4
    server.ok("unlock", "--passphrase-file", server.home / "passphrase")
    assert states(server) == {1: "current"}


def test_a_vault_that_is_locked_in_the_middle_wraps_nothing_more_and_goes_on_when_unlocked(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    expected = filled(server)
    with unlocked(server) as vault:
        under_way = Rotate(vault).run(0, "a test", WAIVED)
        next(under_way)
        vault.lock()
        with pytest.raises(StrongroomError, match="locked") as caught:
            list(under_way)
        assert caught.value.status == LOCKED
        assert versions(server) == {1: 4}
        under_way = Rotate(vault).run(0, "", WAIVED)
        with pytest.raises(StrongroomError, match="locked"):
            next(under_way)
        vault.unlock(slots.read_key_file(server.home / "store.key"))
        # Locked and unlocked again: the one that was under way has the keys of before in hand.
        under_way = Rotate(vault).run(0, "", WAIVED)
        next(under_way)
        vault.lock()
        vault.unlock(slots.read_key_file(server.home / "store.key"))
        with pytest.raises(StrongroomError, match="was locked during the rotation"):
            list(under_way)
        assert PROVED in rotate(vault, reason="")[-2]
    assert held(server) == expected


def test_a_keyring_that_cannot_be_written_adds_no_version_under_which_anything_is_wrapped(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    expected = filled(server)
    config = load(server.config)
    in_the_way = config.keyring.with_name(config.keyring.name + ".new")
    vault = Vault(config)
    vault.unlock(slots.read_key_file(server.home / "store.key"))
    in_the_way.mkdir()
    with pytest.raises(StrongroomError, match="the rotation stopped"):
        rotate(vault)
    # What comes in now must be under a version that the keyring on the disk has.
    vault.admit()
    assert versions(server) == {1: 4}
    assert not (server.home / "spool" / "public" / "deposit-2.key").exists()
    vault.lock()
    vault.auditor.close()
    assert held(server) == expected
    with unlocked(server) as vault:
        with pytest.raises(StrongroomError, match="the rotation stopped"):
            rotate(vault)
        in_the_way.rmdir()
        assert PROVED in rotate(vault, reason="")[-2]
        assert versions(server) == {2: 4}
    assert held(server) == expected


@pytest.mark.needs_root
def test_a_full_disk_while_the_databases_are_copied_changes_nothing(make_server: Callable[[], Server]) -> None:
    server = make_server()
    expected = filled(server)
    with unlocked(server) as vault:
        decision = decide(vault)
    kept = server.home / "kept"
    server.store.rename(kept)
    server.store.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(server.store)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", str(server.store)], check=True)
        ballast = server.store / "ballast"
        # Not even the index; the index but not the ledger.
        for copied in (16, (server.store / "index-1.db").stat().st_size // 1024 + 40):
            with unlocked(server) as vault:
                under_way = Rotate(vault).run(0, "a test", WAIVED)
                with pytest.raises(StrongroomError, match="the rotation stopped"):
                    for event in under_way:
                        if "rewrapped" in event.get("text", "") and not ballast.exists():
                            free = shutil.disk_usage(server.store).free
                            ballast.write_bytes(bytes(free - copied * 1024))
                open_ = vault.unlocked()
                assert open_.database_version == 1
                names = {path.name for path in server.store.iterdir()}
                assert not {name for name in names if re.match(r"(index|ledger)-2", name)}, copied
                with open_.reader() as reader:
                    assert reader.index.counts()["instances"] == 4
                assert open_.ledger.decisions() == [decision]
                assert Rotate(vault).destroy_due() == []
                ballast.unlink()
            assert ledger_of(server)[0] == [decision]
            assert held(server) == expected
        with unlocked(server) as vault:
            assert PROVED in rotate(vault, reason="")[-2]
            assert vault.unlocked().database_version == 2
        assert ledger_of(server)[0] == [decision]
        assert held(server) == expected
    finally:
        subprocess.run(["umount", "-l", str(server.store)], check=True)


# --- readers


def test_readers_work_through_the_switch_of_the_databases(make_server: Callable[[], Server]) -> None:
    server = make_server()
    filled(server)
    with unlocked(server) as vault:
        open_ = vault.unlocked()
        stop = threading.Event()
        wrong: list[BaseException | int] = []
        counts = [0] * 4

        def read(number: int) -> None:
            while not stop.is_set():
                try:
                    with open_.reader() as reader:
                        found = len(list(reader.index.search("instance", Filters())))
                    if found != 4:
                        wrong.append(found)
                    counts[number] += 1
                except BaseException as error:
                    wrong.append(error)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            with open_.reader() as from_before:
                for version in (2, 3, 4, 5):
                    assert PROVED in rotate(vault)[-2]
                    assert open_.database_version == version
                # Its file has no name any more, but it is whole.
                assert len(list(from_before.index.search("instance", Filters()))) == 4
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        assert min(counts) > 4
        # Nobody goes on with a connection of before.
        for _ in range(6):
            with open_.reader() as reader:
                assert reader.version == 5
        assert {path.name for path in server.store.glob("*-*.db")} == {"index-5.db", "ledger-5.db"}


def test_a_connection_that_waited_for_a_reader_during_the_switch_is_not_lent_again(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    filled(server)
    with unlocked(server) as vault:
        with vault.unlocked().reader() as before:
            assert before.version == 1
        rotate(vault)
        with vault.unlocked().reader() as after:
            assert after.version == 2


# --- the proof


def test_the_proof_is_signed_by_the_store_and_its_digest_is_that_of_keys_db(make_server: Callable[[], Server]) -> None:
    server = make_server()
    filled(server)
    with unlocked(server) as vault:
        rotate(vault)
        [rotation] = vault.unlocked().ledger.rotations()
        [recorded] = [record for record in vault.auditor.read(0) if record["type"] == "rotation-proved"]
    found = json.loads(rotation.proof)
    proof = found["proof"]
    assert recorded["proof"] == proof
    assert recorded["signature"] == found["signature"]
    pinned = re.search(r'signing_key = "ed25519:([^"]+)"', server.config.read_text())
    assert pinned is not None
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(pinned[1]))
    content = json.dumps(proof, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    key.verify(base64.b64decode(found["signature"]), b"strongroom/1/rotation-proof\0" + content)
    digest = hashlib.sha256()
    for pack_id, row in sorted(rows(server).items()):
        digest.update(bytes.fromhex(pack_id) + row[2].to_bytes(4, "big") + row[3])
    assert proof["digest"] == digest.hexdigest()
    assert (proof["version"], proof["old"], proof["records"]) == (2, 1, 4)
    assert proof["store_id"] == hashlib.sha256(base64.b64decode(pinned[1])).hexdigest()[:32]


def test_twenty_thousand_study_keys_are_rewrapped(
    make_server: Callable[[], Server], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server()
    server.init()
    # No packs belong to these records, and admission says so for each.
    caplog.set_level(logging.CRITICAL)
    chance = random.Random(SEED)
    with unlocked(server) as vault:
        for count in (5_000, 15_000):
            before = sum(versions(server).values())
            made = [_record(vault, chance, before + number + 1) for number in range(count)]
            with keys_db(server) as db:
                db.execute("BEGIN")
                db.executemany("INSERT INTO study_key VALUES (?, ?, ?, ?, ?, ?, ?, ?)", made)
                db.execute("COMMIT")
            times = {}
            began = time.monotonic()
            for event in Rotate(vault).run(0, "a test", WAIVED):
                times[event.get("text", event["kind"])[:9]] = time.monotonic() - began
            total = before + count
            assert set(versions(server)) == {vault.unlocked().ring.current().version}
            assert sum(versions(server).values()) == total
            seconds = times["progress"]
            with capsys.disabled():
                print(
                    f"\n{total} study keys: rewrapped in {seconds:.2f} s, {seconds / total * 1e6:.0f} us each, {times}"
                )


def _record(vault: Vault, chance: random.Random, admission: int) -> tuple[Any, ...]:
    pack_id = chance.randbytes(16)
    place = StudyKeyPlace(pack_id, pack_id, chance.randbytes(32), 8192, chance.randbytes(32), admission)
    version = vault.unlocked().ring.current()
    record = StudyKeyRecord(place, version.version, version.wrap_study(new_key(), place))
    return (
        record.pack_id,
        place.key_id.hex(),
        record.version,
        record.sealed,
        place.study_tag,
        place.length,
        place.frames_digest,
        place.admission,
    )


def test_a_keys_db_of_another_rotation_at_work_is_compared_before_it_is_changed(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    filled(server, 3)
    with unlocked(server) as vault:
        other = KeysDatabase(vault.config.keys_db)
        stale = other.records()
        rotate(vault)
        assert other.rewrap([(record, 9, b"stale") for record in stale]) == 0
        other.close()
        assert versions(server) == {2: 3}
