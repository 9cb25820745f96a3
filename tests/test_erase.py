"""Erasure: a study gone whole, whatever happens meanwhile, nothing else touched, and a certificate that holds."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
from conftest import Finished, Server, changed, send
from pydicom.data import get_testdata_file
from scu import raw_data_set

from keys import keyring, signed, slots
from keys.anchors import AnchorError, FileAnchors
from keys.keyring import Keyring
from keys.seal import SealError
from storage import attributes
from storage.archive import Archive
from storage.deposit import FENCE, Deposits, Fence, PublishedKeys
from storage.index import Index
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.ledger import Erasure, Ledger
from storage.openpack import Record
from storage.packfile import OpenedPack, PackFile
from storage.packfile import Record as Opened
from storescp.config import load
from storescp.errors import StrongroomError
from storescp.vault import erase
from storescp.vault.erase import Erase
from storescp.vault.examine import open_pack
from storescp.vault.state import Vault

ROUNDS = int(os.environ.get("STRONGROOM_CRASH_ROUNDS", "4"))
SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))
CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
STUDY = str(pydicom.dcmread(CT).StudyInstanceUID)
OTHER = str(pydicom.dcmread(MR).StudyInstanceUID)
PATIENT = ("CompressedSamples^CT1", "1CT1", STUDY)


# --- a server, and what is on its disk


def packs(server: Server) -> set[Path]:
    return {p for p in (server.store / "objects").rglob("*") if p.is_file()}


def erased(server: Server, study: str = STUDY, *arguments: str) -> Finished:
    return server.run("erase", "--study", study, "--reason", "request 4711", "--yes", *arguments)


def exported(server: Server) -> list[bytes]:
    out = server.home / f"out-{random.random()}"
    assert server.run("export", "--all", "--to", out).status in {0, 5}
    return sorted(raw_data_set(path) for path in out.rglob("*.dcm"))


def studies(server: Server) -> set[str]:
    return {row["study"] for row in server.list("study")}


def records_in(keys_db: Path) -> list[StudyKeyRecord]:
    database = KeysDatabase(keys_db)
    try:
        return database.records()
    finally:
        database.close()


def verified(server: Server) -> tuple[int, int]:
    """Return how many records and packs ``verify`` opened; it must have no findings."""
    found = server.ok("verify", "--json").json()
    assert found["findings"] == []
    return found["records"], found["packs"]


def certificate(server: Server) -> Path:
    [path] = (server.store / "certificates").iterdir()
    return path


def content_of(server: Server) -> dict[str, Any]:
    key = load(server.config).signing_key
    found: dict[str, Any] = signed.read("certificate", certificate(server).read_bytes(), key)
    return found


def number(item: scu.Object, n: int) -> scu.Object:
    """Return a new instance of an object: only its UID is another one, of the same length."""
    old = item.sop_instance
    new = f"{old[:-5]}{10_000 + n}"
    assert item.data.count(old.encode()) == 1
    return item._replace(sop_instance=new, data=item.data.replace(old.encode(), new.encode()))


def ring_of(server: Server) -> Keyring:
    secret = slots.read_key_file(server.home / "store.key")
    return keyring.unlock(server.store / "keyring", secret, FileAnchors(server.home / "anchors"))


def dumped(server: Server) -> str:
    """Return every row of index and ledger, opened with their keys."""
    config, ring = load(server.config), ring_of(server)
    version = ring.current()
    found = []
    for database in (
        Index(config.index(version.version), version.index_key()),
        Ledger(config.ledger(version.version), version.ledger_key()),
    ):
        connection = database._db.conn
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        assert {"pack", "instance"} < set(tables) or {"decision", "erasure"} < set(tables)
        found += [str(row) for table in tables for row in connection.execute(f"SELECT * FROM {table}")]
        database.close()
    return "\n".join(found)


# --- a gate and a vault within this process, step by step


class House:
    """A store with a gate and a vault that do what they are told, one after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.config = load(server.config)
        self.now = 1000.0
        self.vault = self._vault()
        self.gate = self._gate()

    def _vault(self) -> Vault:
        vault = Vault(self.config)
        vault.unlock(slots.read_key_file(self.server.home / "store.key"))
        return vault

    def _gate(self) -> Deposits:
        signing_key = self.config.signing_key
        return Deposits(
            self.config.incoming,
            keyring.read_header(self.config.keyring).store_id and bytes.fromhex(self.store_id),
            PublishedKeys(self.config.public, signing_key),
            size_limit=1 << 30,
            idle_seconds=5,
            open_per_peer=1000,
            fence=Fence(self.config.public, signing_key),
            clock=lambda: self.now,
        )

    @property
    def store_id(self) -> str:
        return keyring.read_header(self.config.keyring).store_id

    def put(self, n: int, study: str = STUDY, *, into: str = "", content: bytes = b"pixels", patient: str = "P") -> str:
        """Deposit an instance, into a pack of its study or, as no honest gate would, of another one."""
        record = self.gate.begin(into or study, "CT1")
        record.write(memoryview(content))
        return self.finish(record, n, study, patient=patient)

    def finish(self, record: Record, n: int, study: str = STUDY, *, patient: str = "P") -> str:
        name: str = record._pack.name
        uids = {attributes.SOP_CLASS: scu.CT_IMAGE, attributes.SOP_INSTANCE: f"{study}.{n}", attributes.STUDY: study}
        elements = {tag: attributes.Element("UI", [uid]) for tag, uid in (uids | {attributes.SERIES: "1.2.4"}).items()}
        elements["00100020"] = attributes.Element("LO", [patient])
        received = attributes.Received("2026-01-31T12:00:00Z", "", "CT1", "STRONGROOM", "", "")
        record.finish(attributes.encode(attributes.Attributes(1, "1.2.840.10008.1.2", elements, {}, received)))
        return name

    def close_packs(self) -> None:
        """Let time pass, so that the gate closes what is idle."""
        self.now += 60
        self.gate.close_idle()

    def admit(self) -> None:
        self.close_packs()
        self.vault.admit()

    def erase(self, study: str = STUDY) -> list[dict[str, Any]]:
        return list(Erase(self.vault).run(1000, study, "request 4711"))

    def erasures(self) -> list[Erasure]:
        return self.vault.unlocked().ledger.erasures()

    def certificate(self, erasure: Erasure) -> dict[str, Any]:
        path = self.config.store_path / "certificates" / f"{erasure.id}.json"
        found: dict[str, Any] = signed.read("certificate", path.read_bytes(), self.config.signing_key)
        return found

    def states(self, study: str = STUDY) -> list[tuple[str, str]]:
        """Return the instances of a study that the index knows, with their states."""
        rows = self.vault.unlocked().index._db.execute(
            "SELECT uid, state FROM instance WHERE study = ? ORDER BY uid", [study]
        )
        return [tuple(row) for row in rows.fetchall()]

    def records(self) -> set[str]:
        return set(self.vault.unlocked().keys_db.packs())

    def files(self) -> set[str]:
        """Return the names of all files that hold or held instances; what the gate prepared aside."""
        store = self.config.store_path
        folders = (store / "objects", store / "quarantine", store / "admitting", self.config.incoming)
        return {p.name for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix != ".new"}

    def holds(self, study: str, n: int, content: bytes = b"pixels") -> None:
        """Assert that an instance is admitted and whole."""
        open_ = self.vault.unlocked()
        place = open_.index.held(f"{study}.{n}")
        assert place is not None
        path = open_.archive.path(place.pack_id)
        if not path.exists():
            path = open_.archive.quarantine_path(place.pack_id)
        with PackFile(path) as file:
            opened = open_pack(file, open_.ring, open_.keys_db.find(place.pack_id))
            assert b"".join(opened.dataset(place.frame)) == content

    def is_gone(self, study: str = STUDY, *packs: str) -> None:
        """Assert that nothing is left of a study."""
        open_ = self.vault.unlocked()
        assert self.states(study) == []
        assert open_.index.packs_of(study) == []
        assert open_.index.patient(study) is None
        assert not self.files() & {name for pack in packs for name in (pack, f"{pack}.erasing")}
        assert not self.records() & set(packs)
        assert study not in "\n".join(
            str(row)
            for table in ("study", "series", "instance", "pack")
            for row in open_.index._db.execute(f"SELECT * FROM {table}").fetchall()
        )

    def died(self) -> None:
        """Be killed, as far as a process can be that goes on, and begin anew."""
        assert self.vault.opened is not None
        self.vault.opened.close()
        assert self.vault.auditor._chain is not None
        self.vault.auditor._chain.close()
        self.vault = self._vault()

    def close(self) -> None:
        self.gate.close_all()
        self.gate._writers.shutdown()
        self.vault.lock()
        self.vault.auditor.close()


@pytest.fixture
def house(make_server: Callable[[], Server]) -> Iterator[House]:
    made = make_server()
    made.init()
    made.set("keys", destroy_after_days=0)
    house = House(made)
    yield house
    house.close()


# --- what is gone, and what is not


def test_an_erased_study_is_gone_and_nothing_else_is_touched_and_what_comes_again_is_new(server: Server) -> None:
    assert send(server, [MR]) == [0]
    server.wait_admitted()
    others = {path: path.read_bytes() for path in packs(server)}
    kept = records_in(server.store / "keys.db")
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    [pack] = packs(server) - others.keys()
    assert studies(server) == {STUDY, OTHER}
    assert "1 instance in 1 pack" in server.ok("erase", "--study", STUDY, "--reason", "4711", "--yes").out
    assert studies(server) == {OTHER}
    assert {row["study"] for row in server.list("instance")} == {OTHER}
    assert server.run("export", "--study", STUDY, "--to", server.home / "none").status == 5
    assert exported(server) == [raw_data_set(MR)]
    assert {path: path.read_bytes() for path in packs(server)} == others
    assert records_in(server.store / "keys.db") == kept
    assert server.deposits() == []
    assert verified(server) == (1, 1)
    assert erased(server).status == 5
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert exported(server) == sorted([raw_data_set(CT), raw_data_set(MR)])
    assert pack not in packs(server)
    assert verified(server) == (2, 2)
    # An index that is built anew brings nothing back.
    server.ok("reindex")
    assert len(server.list()) == 2


def test_what_is_asked_wrongly_or_not_confirmed_changes_nothing(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    before = packs(server), records_in(server.store / "keys.db")
    assert server.run("erase", "--study", STUDY, "--yes").status == 2
    assert server.run("erase", "--study", STUDY, "--reason", " ", "--yes").status == 2
    assert server.run("erase", "--reason", "x", "--yes").status == 2
    assert erased(server, "1.2.3").status == 5
    assert erased(server, "a/b").status == 1
    for answer in ("n\n", "\n", ""):
        asked = server.run("erase", "--study", STUDY, "--reason", "x", stdin=answer)
        assert asked.status not in {0, 5}
        assert f"erase study {STUDY} (1 instances) for ever?" in asked.err
    server.ok("lock")
    assert erased(server).status == 4
    assert server.run("erase", "--study", STUDY, "--reason", "x", stdin="y\n").status == 4
    server.ok("unlock", "--key-file", server.home / "store.key")
    assert (packs(server), records_in(server.store / "keys.db")) == before
    assert server.run("certificate", "list").status == 5
    assert not (server.store / "certificates").exists()
    assert server.run("certificate", "show", "0" * 16).status == 5
    assert server.run("erase", "--study", STUDY, "--reason", "x", stdin="y\n").status == 0
    assert packs(server) == set()


def test_what_cannot_be_recorded_is_not_erased(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    before = packs(server), records_in(server.store / "keys.db")
    [chain] = (server.store / "audit").glob("*.log")
    with chain.open("ab") as file:
        file.write(b"R 99 audit AAAA " + b"0" * 64 + b"\n")
    done = erased(server)
    assert done.status == 1
    assert "recorded" in done.err
    assert (packs(server), records_in(server.store / "keys.db")) == before
    # Whoever begins a new chain can erase.
    server.ok("audit", "restart", "--reason", "a test")
    assert erased(server).status == 0
    assert packs(server) == set()


def test_an_error_in_the_chain_at_the_first_record_leaves_no_intent(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.put(1)
    house.admit()

    def full(*_: Any, **__: Any) -> None:
        raise StrongroomError("this cannot be recorded")

    with monkeypatch.context() as patched:
        patched.setattr(house.vault.auditor, "record", full)
        with pytest.raises(StrongroomError, match="recorded"):
            house.erase()
    assert house.erasures() == []
    Erase(house.vault).resume()
    house.holds(STUDY, 1)


def test_quarantined_instances_go_too_and_those_of_other_studies_stay(server: Server, tmp_path: Path) -> None:
    def held_back(study: str) -> int:
        items = server.run("quarantine", "list", "--json").json()["items"]
        return sum(item["study"] == study for item in items)

    conflict, stranger = changed(CT, tmp_path, SliceLocation="77.5"), changed(MR, tmp_path, SliceLocation="8")
    for files in ([CT, MR], [conflict, stranger]):
        assert send(server, files) == [0] * len(files)
        server.wait_admitted()
    accepted = changed(CT, tmp_path, SliceLocation="78.5")
    assert send(server, [accepted]) == [0]
    server.wait_admitted()
    item = next(i for i in server.run("quarantine", "list", "--json").json()["items"] if i["study"] == STUDY)
    server.ok("quarantine", "resolve", item["id"], "--accept", "--reason", "a test")
    assert (held_back(STUDY), held_back(OTHER)) == (1, 1)
    done = erased(server)
    assert (done.status, ": 3 instances in 3 packs" in done.out) == (0, True), done.out + done.err
    assert (held_back(STUDY), held_back(OTHER)) == (0, 1)
    assert studies(server) == {OTHER}
    assert len(list((server.store / "quarantine").iterdir())) == 1
    assert len(packs(server)) == 1
    assert len(records_in(server.store / "keys.db")) == 2
    verified(server)
    # The decision about what is gone is replayed without harm.
    server.ok("reindex")
    assert exported(server) == [raw_data_set(MR)]


def test_an_instance_of_another_study_in_a_pack_of_this_one_stays_and_the_certificate_never_lies_about_its_key(
    house: House,
) -> None:
    pack = house.put(1)
    assert house.put(2, OTHER, into=STUDY) == pack
    house.admit()
    assert house.states(OTHER) == [(f"{OTHER}.2", "quarantined")]
    house.erase()
    house.is_gone(STUDY, pack)
    assert house.states(OTHER) == [(f"{OTHER}.2", "quarantined")]
    [left] = house.records()
    assert (house.config.store_path / "quarantine" / left).exists()
    [erasure] = house.erasures()
    assert any("another study" in text for text in house.certificate(erasure)["not_covered"])
    house.server.stop()
    rotate(house)
    [erasure] = house.erasures()
    assert (erasure.final, house.certificate(erasure)["state"]) == ("", "pending")


def test_a_study_that_only_waits_is_erased_and_its_patient_is_forgotten(house: House) -> None:
    pack = house.put(1)
    house.close_packs()
    waiting = house.put(2, OTHER)
    events = house.erase()
    assert [event["kind"] for event in events] == ["step", "step", "certificate"]
    house.is_gone(STUDY, pack)
    # Another patient's, which a study that is still known would have put into quarantine.
    house.put(1, patient="Q", content=b"other")
    house.admit()
    house.holds(STUDY, 1, b"other")
    house.holds(OTHER, 2)
    assert waiting in house.records()


def test_a_study_of_many_packs_is_erased_with_all_of_them_and_one_beside_it_stays(house: House) -> None:
    names = []
    for n in range(60):
        names.append(house.put(n))
        if n < 50:
            house.close_packs()
        if n == 30:
            house.vault.admit()
    other = house.put(1, OTHER)
    house.admit()
    assert len(set(names)) > 50
    house.put(60)
    house.close_packs()
    house.erase()
    house.is_gone(STUDY, *names)
    assert house.records() == {other}
    assert house.files() == {other}
    [erasure] = house.erasures()
    assert (erasure.instances, len(erasure.packs)) == (61, len(set(names)) + 1)


def test_a_deposit_that_a_crash_left_behind_its_admission_does_not_bring_the_study_back(house: House) -> None:
    pack = house.put(1)
    house.put(2)
    house.put(1, content=b"a contradiction")
    house.close_packs()
    deposit = house.config.incoming / pack
    copy = deposit.read_bytes()
    house.vault.admit()
    assert sorted(state for _, state in house.states()) == ["held", "held", "quarantined"]
    deposit.write_bytes(copy)
    house.erase()
    house.is_gone(STUDY, pack)
    assert house.records() == set()
    assert house.files() == set()
    house.died()
    house.vault.admit()
    house.is_gone(STUDY, pack)
    assert house.files() == set()


# --- while the study arrives


@pytest.mark.timeout(180)
def test_what_was_acknowledged_before_is_gone_what_comes_after_is_held_and_nobody_is_refused(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    server.init()
    context = scu.tls(server.add_peer("CT1"))
    server.set("gate", pack_idle_seconds=1, workers=2)
    server.start()
    assert send(server, [MR]) == [0]
    item = scu.read(CT)
    sent: dict[str, bytes] = {}
    begun: dict[str, float] = {}
    acknowledged: dict[str, float] = {}
    statuses: list[int] = []
    broken: list[BaseException] = []
    stop = threading.Event()
    some = threading.Semaphore(0)

    def store(first: int) -> None:
        try:
            with scu.associated(server.port, context, [item.context]) as association:
                for n in range(first, first + 20_000):
                    one = number(item, n)
                    sent[one.sop_instance] = one.data
                    begun[one.sop_instance] = time.monotonic()
                    statuses.append(scu.store(association, one).Status)
                    acknowledged[one.sop_instance] = time.monotonic()
                    some.release()
                    if stop.is_set():
                        return
                    # A modality makes slices; the vault must get to look at what came.
                    stop.wait(0.005)
        except BaseException as error:
            broken.append(error)

    senders = [threading.Thread(target=store, args=(20_000 * part,)) for part in range(3)]
    for sender in senders:
        sender.start()
    for _ in range(60):
        assert some.acquire(timeout=30)
    before = time.monotonic()
    done = erased(server)
    after = time.monotonic()
    for _ in range(60):
        assert some.acquire(timeout=30)
    # Each sender once more, from its beginning.
    late = len(sent)
    while len(sent) < late + 30:
        assert some.acquire(timeout=30)
    stop.set()
    for sender in senders:
        sender.join()
    assert broken == []
    assert (done.status, set(statuses)) == (0, {0}), done.err
    server.wait_admitted()
    server.ok("export", "--all", "--to", server.home / "out")
    held = {path.stem: raw_data_set(path) for path in (server.home / "out").rglob("*.dcm")}
    assert held.pop(scu.read(MR).sop_instance) == raw_data_set(MR)
    assert held.keys() == {row["sop"] for row in server.list()} - {scu.read(MR).sop_instance}
    assert held.items() <= sent.items()
    gone = {uid for uid, when in acknowledged.items() if when <= before}
    kept = {uid for uid, when in begun.items() if when >= after}
    assert len(gone) >= 60
    assert len(kept) >= 30
    assert not gone & held.keys()
    assert kept <= held.keys()
    assert server.run("quarantine", "list").status == 5
    verified(server)


def test_a_large_object_in_the_middle_makes_the_erasure_wait_and_go_on_by_itself(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = make_server()
    server.init()
    context = scu.tls(server.add_peer("CT1"))
    server.set("gate", workers=1)
    server.start()
    item, large = scu.read(CT), scu.large_file(tmp_path / "large.dcm", 400)
    command = [sys.executable, "-m", "storescp", "--config", str(server.config), "erase", "--study", STUDY, "--yes"]
    erasing: list[subprocess.Popen[str]] = []

    def begin() -> str:
        process = subprocess.Popen([*command, "--reason", "x"], stdout=-1, stderr=-1, text=True)
        erasing.append(process)
        assert process.stderr is not None
        # The erasure waits now; only then the transfer goes on.
        return process.stderr.readline()

    result, handlers = scu.midway(begin, 20)
    assert scu.send(server.port, context, [item]) == [0]
    with scu.associated(server.port, context, [large.context], handlers=handlers) as association:
        assert scu.store(association, large).Status == 0
    assert "still open in the gate" in result.result()
    out, err = erasing[0].communicate(timeout=60)
    assert (erasing[0].returncode, "erased; certificate" in out) == (0, True), err
    assert server.list() == []
    assert server.deposits() == []
    assert packs(server) == set()


@pytest.mark.needs_root
def test_as_two_users_a_pack_that_the_gate_has_open_is_erased_and_what_comes_next_is_held() -> None:
    # pytest's own folders are closed to other users.
    home = Path(tempfile.mkdtemp(prefix="strongroom-erase-"))
    home.chmod(0o755)
    server = Server(home / "s")
    try:
        server.init("--vault-user", "daemon", "--gate-user", "nobody")
        server.add_peer("CT1")
        server.set("gate", pack_idle_seconds=60, workers=1)
        server.start()
        assert send(server, [CT]) == [0]
        [pack] = server.deposits()
        assert "erased; certificate" in server.ok("erase", "--study", STUDY, "--reason", "x", "--yes").out
        assert server.list() == []
        assert server.deposits() == []
        assert send(server, [CT]) == [0]
        assert [path.name for path in server.deposits()] != [pack.name]
        assert exported(server) == [raw_data_set(CT)]
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()
        shutil.rmtree(home)


def test_an_erasure_that_waited_too_long_is_finished_by_the_vaults_loop(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erase, "_FENCE_SECONDS", 0.0)
    done = house.put(1)
    house.close_packs()
    pack = house.put(2)
    record = house.gate.begin(STUDY, "CT1")
    with pytest.raises(StrongroomError, match="1 pack still open in the gate") as waits:
        house.erase()
    assert "by itself" in waits.value.hint
    # Nothing of it is listed while it waits, whoever asks, and what can go is gone.
    house.vault.admit()
    house.is_gone(STUDY, done)
    Erase(house.vault).resume()
    assert [e.erased for e in house.erasures()] == [""]
    house.gate.close_idle()
    record.write(memoryview(bytes(3 << 20)))
    house.finish(record, 3)
    house.vault.advance(10)
    Erase(house.vault).resume()
    assert all(e.erased for e in house.erasures())
    house.is_gone(STUDY, done, pack)
    assert house.files() == set()


def test_a_copy_and_a_contradiction_that_come_while_an_erasure_waits_are_a_new_study(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erase, "_FENCE_SECONDS", 0.0)
    house.put(1)
    house.put(2)
    house.admit()
    house.put(3)
    record = house.gate.begin(STUDY, "CT1")
    with pytest.raises(StrongroomError, match="1 pack still open in the gate"):
        house.erase()
    house.gate.close_idle()
    # What is held, sent again; other content; another patient: of a study that is not held any more.
    house.put(1, patient="Q")
    house.put(2, content=b"other", patient="Q")
    house.vault.admit()
    assert house.states() == [(f"{STUDY}.{n}", "held") for n in (1, 2)]
    # The pack that is waited for is let go and would be the next that is admitted, before its copy.
    house.finish(record, 4)
    house.put(3, patient="Q")
    house.close_packs()
    house.vault.advance(10)
    Erase(house.vault).resume()
    assert [e.erased > "" for e in house.erasures()] == [True]
    assert house.states() == [(f"{STUDY}.{n}", "held") for n in (1, 2, 3)]
    for n, content in ((1, b"pixels"), (2, b"other"), (3, b"pixels")):
        house.holds(STUDY, n, content)


def test_an_instance_that_is_quarantined_out_of_a_pack_while_it_is_erased_goes_with_it(house: House) -> None:
    house.put(1)
    house.admit()
    pack = house.put(1, content=b"a contradiction")
    house.close_packs()
    # As a crash between the intent and what follows it leaves things: the deposit is admitted first.
    open_ = house.vault.unlocked()
    tag = erase.study_tag(open_.ring, STUDY)
    open_.ledger.set_erasure(Erasure("1" * 16, tag, 0, "x", "2026-01-31T12:00:00Z", [*house.records(), pack], [pack]))
    house.died()
    house.vault.admit()
    assert "quarantined" in dict(house.states()).values()
    Erase(house.vault).resume()
    house.is_gone(STUDY, pack)
    assert house.records() == set()
    assert house.files() == set()


def test_gates_are_told_again_after_a_crash_that_came_before_they_were(house: House) -> None:
    pack = house.put(1)
    house.vault.admit()
    open_ = house.vault.unlocked()
    tag = erase.study_tag(open_.ring, STUDY)
    open_.ledger.set_erasure(Erasure("1" * 16, tag, 0, "x", "2026-01-31T12:00:00Z", [pack], [pack]))
    house.died()
    Erase(house.vault).resume()
    house.gate.close_idle()
    assert house.put(2) != pack
    Erase(house.vault).resume()
    assert all(e.erased for e in house.erasures())
    house.admit()
    assert house.states() == [(f"{STUDY}.2", "held")]


def test_two_who_erase_at_once_make_one_erasure(house: House) -> None:
    house.put(1)
    house.vault.admit()
    first = Erase(house.vault).run(1000, STUDY, "one")
    assert next(first)["kind"] == "step"
    second = Erase(house.vault).run(1001, STUDY, "two")
    assert next(second)["kind"] == "step"
    Erase(house.vault).resume()
    house.gate.close_idle()
    for events in (first, second):
        assert list(events)[-1]["kind"] == "certificate"
    [erasure] = house.erasures()
    assert erasure.reason == "one"
    told = [record["type"] for record in house.vault.auditor.read(0)]
    assert (told.count("erase-begun"), told.count("erased")) == (1, 1)


# --- killed at any step


class Died(BaseException):
    """The process ends here."""


STEPS = (
    (Ledger, "set_erasure"),
    (KeysDatabase, "remove"),
    (KeysDatabase, "forget"),
    (Archive, "remove"),
    (Index, "drop"),
    (Index, "forget"),
    (os, "rename"),
)


@pytest.mark.parametrize("way", ["by itself", "by the same command"])
def test_an_erasure_that_ends_before_any_of_its_steps_is_finished(
    house: House, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    left = 0

    def patch(owner: Any, name: str, *, after: bool) -> None:
        whole = getattr(owner, name)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise Died
            result = whole(*arguments, **options)
            if left == 0 and after:
                raise Died
            return result

        patched.setattr(owner, name, step)

    other = house.put(1, OTHER)
    house.admit()
    died = 0
    for at in range(1, 100):
        # Two packs that are admitted, one of them with a contradiction, a copy left behind, one that waits.
        house.put(1)
        house.admit()
        pack = house.put(2)
        house.put(1, content=b"a contradiction")
        house.close_packs()
        copy = (house.config.incoming / pack).read_bytes()
        house.vault.admit()
        house.put(3)
        house.close_packs()
        (house.config.incoming / pack).write_bytes(copy)
        left = at
        with monkeypatch.context() as patched:
            for owner, name in STEPS:
                patch(owner, name, after=at % 2 == 0 and way == "by itself")
            try:
                house.erase()
            except Died:
                died += 1
            finished = left > 0
        house.died()
        house.vault.admit()
        if way == "by itself":
            Erase(house.vault).resume()
        elif not finished:
            with contextlib.suppress(StrongroomError):
                house.erase()
        if any(not e.erased for e in house.erasures()):
            raise AssertionError((at, house.erasures()))
        if house.states():
            # It ended before it was recorded that anything was to be erased.
            assert at == 1, (at, house.states())
            house.erase()
        house.is_gone()
        assert house.records() == {other}, at
        assert house.files() == {other}, at
        house.holds(OTHER, 1)
        if finished:
            break
    assert died == at - 1 > 10


@pytest.mark.timeout(90 + 30 * ROUNDS)
def test_a_vault_killed_at_random_while_it_erases_finishes_and_leaves_the_others_whole(
    house: House,
) -> None:
    chance = random.Random(SEED)
    server = house.server
    house.put(1, OTHER)
    house.admit()
    house.vault.lock()
    house.vault.auditor.close()
    killed = 0
    for round_number in range(ROUNDS):
        count = 60
        for n in range(count):
            house.put(n)
            if n % 2:
                house.close_packs()
        server.start("vault")
        # So many packs left, or so much time.
        when = chance.choice(["packs", "packs", "time"])
        server.wait_admitted(by_asking=True) if when == "packs" else house.close_packs()
        least, delay = chance.randrange(1, 32), chance.uniform(0.3, 1.5)
        command = [sys.executable, "-m", "storescp", "--config", str(server.config)]
        process = subprocess.Popen(
            [*command, "erase", "--study", STUDY, "--yes", "--reason", "x"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + (30 if when == "packs" else delay)
        while time.monotonic() < until and process.poll() is None:
            if when == "packs" and len(packs(server)) <= least:
                break
        running = process.poll() is None
        server.kill("vault")
        process.wait(60)
        killed += running and process.returncode != 0
        server.stop(signal.SIGKILL)
        server.start("vault")
        done = erased(server)
        assert done.status in {0, 5}, (SEED, round_number, done.err)
        assert studies(server) == {OTHER}, (SEED, round_number)
        assert len(packs(server)) == 1
        assert server.deposits() == []
        assert verified(server) == (1, 1)
        assert server.run("certificate", "list").status == 0
        assert len(list((server.store / "certificates").iterdir())) == round_number + 1
        server.stop()
    assert killed
    house.vault = house._vault()
    house.holds(OTHER, 1)


# --- certificates


def rotate(house: House) -> None:
    from storescp.vault.rotate import Rotate

    house.close_packs()
    list(Rotate(house.vault).run(1000, "quarterly", {"export": "a test", "backup": "a test"}))
    Rotate(house.vault).destroy_due()
    Erase(house.vault).resume()


def test_a_certificate_is_pending_until_a_rotation_begun_later_and_final_after_it(server: Server) -> None:
    server.set("keys", destroy_after_days=0)
    server.stop()
    server.start()
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert erased(server).status == 0
    pending = content_of(server)
    assert (pending["state"], pending["instances"], len(pending["packs"])) == ("pending", 1, 1)
    [one] = pending["versions"]
    assert one == {"version": 1, "anchor": "file", "grade": "clear", "destroyed": ""}
    assert "pending" in server.ok("certificate", "list").out
    waived = ("--without-export", "a test", "--without-backup", "a test")
    server.ok("keys", "rotate", "--reason", "quarterly", *waived)
    final = content_of(server)
    assert final["state"] == "final"
    assert [(v["version"], v["destroyed"] > "") for v in final["versions"]] == [(1, True)]
    assert not (server.home / "anchors" / "anchor-1").exists()
    unchanged = ("id", "store_id", "study_tag", "erasure_begun", "erased", "packs", "instances", "not_covered")
    assert {key: final[key] for key in unchanged} == {key: pending[key] for key in unchanged}
    assert server.ok("certificate", "list", "--json").json()["items"][0]["final"]


def test_a_rotation_that_was_begun_before_the_erasure_does_not_make_it_final(house: House) -> None:
    from storescp.vault.rotate import Rotate

    pack = house.put(1)
    house.admit()
    waived = {"export": "a test", "backup": "a test"}
    steps = Rotate(house.vault).run(1000, "quarterly", waived)
    assert "version 2 is current" in next(steps)["text"]
    house.erase()
    house.is_gone(STUDY, pack)
    assert [e.versions for e in house.erasures()] == [[1, 2]]
    list(steps)
    Rotate(house.vault).destroy_due()
    Erase(house.vault).resume()
    assert [r.destroyed > "" for r in house.vault.unlocked().ledger.rotations()] == [True]
    [erasure] = house.erasures()
    certified = house.certificate(erasure)
    assert (certified["state"], erasure.final) == ("pending", "")
    rotate(house)
    [erasure] = house.erasures()
    certified = house.certificate(erasure)
    assert (certified["state"], erasure.final > "") == ("final", True)
    assert [(v["version"], v["destroyed"] > "") for v in certified["versions"]] == [(1, True), (2, True)]


def test_a_version_that_came_while_an_erasure_was_interrupted_is_one_that_it_waits_for(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.put(1)
    house.admit()

    def stopped(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(KeysDatabase, "remove", stopped)
        with pytest.raises(Died):
            house.erase()
    assert [e.versions for e in house.erasures()] == [[1]]
    house.died()
    from storescp.vault.rotate import Rotate

    # Its key is rewrapped, and so in every backup of keys.db from here on.
    list(Rotate(house.vault).run(1000, "quarterly", {"export": "a test", "backup": "a test"}))
    Erase(house.vault).resume()
    [erasure] = house.erasures()
    assert (erasure.versions, erasure.erased > "", erasure.final) == ([1, 2], True, "")


def test_a_certificate_holds_anywhere_with_the_stores_key_alone_and_nothing_else_passes_for_one(
    server: Server, make_server: Callable[[], Server], tmp_path: Path
) -> None:
    assert send(server, [CT]) == [0]
    assert erased(server).status == 0
    file = tmp_path / "elsewhere" / "certificate.json"
    file.parent.mkdir()
    shown = server.ok("certificate", "show", content_of(server)["id"]).out
    file.write_text(shown)
    assert file.read_bytes() == certificate(server).read_bytes()
    key = "ed25519:" + base64.b64encode(load(server.config).signing_key).decode()

    def checked(path: Path, *, with_key: str = key) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "storescp", "certificate", "verify", str(path), "--key", with_key]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(erase.__file__).parents[2])}
        return subprocess.run(
            command, cwd=file.parent, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    done = checked(file)
    assert done.returncode == 0, done.stderr
    assert "PENDING" in done.stdout
    assert "key version 1: not destroyed yet; file anchor, NIST SP 800-88: clear" in done.stdout
    assert "not covered: records of the audit chain" in done.stdout
    assert json.loads(file.read_bytes().split(b"\n")[0]) == content_of(server)
    # Nothing about whom it was.
    for text in (*PATIENT, "CompressedSamples", "4711", "CT1", scu.read(CT).sop_instance):
        assert text not in shown + done.stdout
    # Bytes at random and both ends; every bit is flipped where it costs less, in test_signed.py.
    good = file.read_bytes()
    places = {0, len(good) - 1, len(good) - 2, len(good) - 4, *random.Random(SEED).sample(range(len(good)), 4)}
    for place in sorted(places):
        content = bytearray(good)
        content[place] ^= 1
        file.write_bytes(content)
        assert checked(file).returncode == 6, place
    file.write_bytes(good)
    other = make_server()
    other.init()
    theirs = "ed25519:" + base64.b64encode(load(other.config).signing_key).decode()
    assert checked(file, with_key=theirs).returncode == 6
    assert checked(file, with_key="ed25519:AAAA").returncode == 2
    assert checked(file.with_name("none.json")).returncode == 1
    fence = server.home / "spool" / "public" / FENCE
    assert signed.read(FENCE, fence.read_bytes(), load(server.config).signing_key)["packs"] == []
    assert checked(fence).returncode == 6
    # With the configuration's key, too.
    assert server.ok("certificate", "verify", file, "--json").json()["state"] == "pending"
    assert server.run("certificate", "verify", fence).status == 6


# --- what an old backup still opens


def test_keys_db_holds_no_byte_of_a_deleted_key(house: House) -> None:
    packs_ = []
    for n in range(20):
        packs_.append(house.put(n))
        house.close_packs()
    house.put(1, OTHER)
    house.admit()
    keys_db = house.config.keys_db
    files = [keys_db.with_name(keys_db.name + end) for end in ("", "-wal")]

    def on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in files if path.exists())

    database = house.vault.unlocked().keys_db
    sealed = {record.pack_id: record.sealed for record in database.records()}
    assert all(key in on_disk() for key in sealed.values())
    house.erase()
    for pack, key in sealed.items():
        found = [part for part in (key, key[:24], key[-24:], pack.encode()) if part in on_disk()]
        assert bool(found) == (pack not in packs_)


def test_a_reader_of_keys_db_that_keeps_its_log_makes_the_erasure_wait(house: House) -> None:
    pack = house.put(1)
    house.admit()
    # Thirty seconds are what it waits for a reader.
    house.vault.unlocked().keys_db._db.execute("PRAGMA busy_timeout = 50").fetchall()
    house.put(2)
    house.close_packs()
    reader = KeysDatabase(house.config.keys_db)
    with reader.snapshot():
        assert reader.count() == 1
        with pytest.raises(StrongroomError, match="being read"):
            house.erase()
        assert [e.erased for e in house.erasures()] == [""]
    house.erase()
    reader.close()
    house.is_gone(STUDY, pack)
    assert house.config.keys_db.with_name("keys.db-wal").stat().st_size == 0


@pytest.mark.timeout(180)
def test_without_the_destroyed_anchor_no_backup_opens_an_erased_study_and_with_it_every_one_does(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.set("keys", destroy_after_days=0)
    server.set("gate", pack_idle_seconds=1)
    backups: dict[str, Path] = {}

    def back_up(name: str) -> None:
        target = backups[name] = server.home / "backups" / name
        for folder in ("store", "spool", "anchors"):
            shutil.copytree(server.home / folder, target / folder, ignore=shutil.ignore_patterns("lock"))
        shutil.copy(server.home / "store.key", target)

    # Waiting, with no vault; admitted; after the erasure; in the middle of the next rotation; at the end.
    server.start("gate")
    assert send(server, [CT, MR]) == [0, 0]
    server.stop()
    back_up("waiting")
    server.start()
    server.wait_admitted()
    assert studies(server) == {STUDY, OTHER}
    server.stop()
    back_up("admitted")
    server.start()
    assert erased(server).status == 0
    server.stop()
    back_up("erased")
    server.ok("keys", "rotate", "--reason", "quarterly")
    assert content_of(server)["state"] == "pending"
    back_up("rotated")
    server.ok("keys", "rotate", "--without-export", "a test", "--without-backup", "a test")
    assert content_of(server)["state"] == "final"
    assert not (server.home / "anchors" / "anchor-1").exists()
    back_up("destroyed")

    # Nothing of the patient where the store lives now.
    text = dumped(server)
    assert OTHER in text
    assert [word for word in PATIENT if word in text] == []
    for folder in (server.store, server.home / "spool", server.home / "anchors"):
        for path in folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            assert [w for w in PATIENT if w.encode() in content or w in str(path)] == [], path
    live = {path.name for path in packs(server)} | {record.pack_id for record in records_in(server.store / "keys.db")}
    gone = set(content_of(server)["packs"])
    assert not gone & live

    def rings(anchors: Path | None) -> Iterator[Keyring]:
        """Yield every keyring of every backup, with all anchors that are left, and one more."""
        secret = slots.read_key_file(server.home / "store.key")
        for name, backup in backups.items():
            folder = server.home / "tried" / f"{name}-{bool(anchors)}"
            shutil.copytree(backup / "anchors", folder)
            (folder / "anchor-1").unlink(missing_ok=True)
            for path in (server.home / "anchors").glob("anchor-*"):
                shutil.copy(path, folder)
            if anchors is not None:
                shutil.copy(anchors, folder)
            yield keyring.unlock(backup / "store" / "keyring", secret, FileAnchors(folder))

    def opened(ring: Keyring) -> set[str]:
        """Try all that a keyring could open, on all that any backup has; return what opened the erased study."""
        found = set()
        files = [p for b in backups.values() for p in b.rglob("*") if p.is_file() and p.name in gone]
        assert {p.parent.name for p in files} >= {"incoming"}
        sealed = [r for b in backups.values() for r in records_in(b / "store" / "keys.db") if r.pack_id in gone]
        assert sealed
        for path in files:
            with PackFile(path) as file:
                for v in range(1, 4):
                    for record in (None, *sealed):
                        with contextlib.suppress(SealError, keyring.KeyringError, AnchorError):
                            version = ring.version(v)
                            if record is None:
                                key = version.unwrap_deposit(file.header.wrapped, file.header.key_id)
                            else:
                                key = version.unwrap_study(record.sealed, record.place)
                            contents = [
                                b"".join(OpenedPack(file, key).dataset(one.frame))
                                for one in OpenedPack(file, key).records()
                                if isinstance(one, Opened)
                            ]
                            assert contents == [raw_data_set(CT)]
                            found.add("deposit" if record is None else "key record")
        return found

    for ring in rings(None):
        with pytest.raises((AnchorError, keyring.KeyringError)):
            ring.version(1)
        assert opened(ring) == set()
    # The control: that anchor is what was missing, and nothing else.
    results = [opened(ring) for ring in rings(backups["admitted"] / "anchors" / "anchor-1")]
    assert results[:4] == [{"deposit", "key record"}] * 4
    # What the keyring itself had of the version is gone from the newest one.
    assert results[4] == set()
