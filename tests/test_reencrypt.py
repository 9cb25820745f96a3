"""Re-encryption: everything opens as before, nothing under an old study key, beside everything else that happens."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scu
from conftest import Server, refill, send
from pydicom.data import get_testdata_file
from scu import raw_data_set
from test_erase import OTHER, STUDY, House
from test_full import Disk
from test_rotate import Sender, instance

from keys import keyring, slots
from keys.anchors import FileAnchors
from keys.seal import SealError
from storage import direct
from storage.archive import Archive
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.ledger import Decision, Ledger
from storage.pack import PAGE
from storage.packfile import OpenedPack, PackFile
from storage.sqlite import DatabaseError
from storescp import clock, space
from storescp.cli.export import write
from storescp.cli.session import vault
from storescp.config import load
from storescp.errors import FINDINGS, LOCKED, NOTHING, PARTLY, StrongroomError
from storescp.vault import erase, repack
from storescp.vault.erase import Erase
from storescp.vault.reencrypt import Reencrypt, Scope
from storescp.vault.rotate import Rotate
from storescp.vault.verify import verify

SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))
ALL = Scope(everything=True)
CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))


@pytest.fixture
def house(make_server: Callable[[], Server]) -> Iterator[House]:
    made = make_server()
    made.init()
    made.set("keys", destroy_after_days=0)
    house = House(made)
    yield house
    house.close()


def reencrypt(house: House, scope: Scope = ALL, reason: str = "a key leaked") -> list[dict[str, Any]]:
    return list(Reencrypt(house.vault).run(1000, scope, reason))


def summary(events: list[dict[str, Any]]) -> tuple[int, int]:
    return events[-1]["packs"], events[-1]["left"]


def furnished(house: House) -> dict[str, str]:
    """Fill a store with every kind of pack; return their names."""
    first = house.put(1)
    house.put(2)
    house.admit()
    other = house.put(1, OTHER)
    # In one deposit: an instance to hold, other content under a UID that is held, another study.
    second = house.put(3)
    house.put(1, content=b"a contradiction")
    house.put(7, OTHER, into=STUDY)
    house.admit()
    open_ = house.vault.unlocked()
    quarantined = [row["id"] for row in open_.index.quarantined()]
    assert len(quarantined) == 2
    return {"first": first, "second": second, "other": other}


def contents(house: House) -> dict[tuple[str, str, str, str], bytes]:
    """Return every instance that the index knows, with state and reason: what is in it, read from its pack."""
    open_ = house.vault.unlocked()
    found = {}
    rows = open_.index._db.execute("SELECT pack, object_id, uid, state, reason FROM instance").fetchall()
    for pack_id, object_id, uid, state, reason in rows:
        place = open_.index.at(pack_id, bytes.fromhex(object_id))
        path = open_.archive.find(pack_id)
        assert place is not None
        assert path is not None
        record = open_.keys_db.find(pack_id)
        assert record is not None
        assert (path.parent.name == "quarantine") == (record.place.pack_id != record.place.key_id)
        with PackFile(path) as file:
            key = open_.ring.version(record.version).unwrap_study(record.sealed, record.place)
            opened = OpenedPack(file, key)
            assert opened.attributes(place.frame).text("00080018") == uid
            found[object_id, uid, state, reason] = b"".join(opened.dataset(place.frame))
    assert len(found) == len(rows)
    return found


def keys_of(house: House) -> dict[str, bytes]:
    open_ = house.vault.unlocked()
    records = open_.keys_db.records()
    return {r.pack_id: bytes(open_.ring.version(r.version).unwrap_study(r.sealed, r.place)) for r in records}


def findings(house: House) -> list[dict[str, Any]]:
    return [e for e in verify(house.vault.unlocked(), rate=0) if e["kind"] == "finding"]


def wait_archived(server: Server, packs: int) -> None:
    """Wait until so many packs are archived, whatever else arrives."""
    deadline = time.monotonic() + 60
    while server.status()["counts"]["packs"] < packs:
        assert time.monotonic() < deadline
        # Packs close when nothing came for a second; there is no event to wait for outside the gate.
        time.sleep(0.1)


def instances(server: Server) -> list[dict[str, Any]]:
    """Return what an export is told of instances: their packs, too."""
    with vault(load(server.config)) as client:
        return list(client.lines("POST", "/v1/search", {"level": "instance", "filters": {}}))


def set_reserve(house: House, count: int) -> None:
    house.server.set("store", reserve_bytes=count)
    house.vault.lock()
    house.vault.auditor.close()
    house.config = load(house.server.config)
    house.vault = house._vault()


def clean(house: House) -> None:
    """Assert that nothing lies about, and that everything verifies."""
    open_ = house.vault.unlocked()
    store = house.config.store_path
    assert findings(house) == []
    assert not [p for p in store.rglob("*.new") if "spool" not in str(p)]
    assert open_.ledger.unsettled() == []
    assert open_.archive.building == set()
    assert house.files() == house.records()
    log = house.config.keys_db.with_name("keys.db-wal")
    assert not log.exists() or log.stat().st_size == 0


# --- what it does


def test_everything_has_new_keys_names_and_bytes_and_is_otherwise_as_it_was(house: House) -> None:
    furnished(house)
    before, keys, records = contents(house), keys_of(house), house.vault.unlocked().keys_db.records()
    old_bytes = {p.name: p.read_bytes() for p in (house.config.store_path / "objects").rglob("*") if p.is_file()}
    assert sorted({state for _, _, state, _ in before}) == ["held", "quarantined"]
    events = reencrypt(house)
    assert summary(events) == (5, 0)
    assert events[0]["text"].endswith(": 5 packs")
    assert contents(house) == before
    clean(house)
    after, new = keys_of(house), house.vault.unlocked().keys_db.records()
    assert not keys.keys() & after.keys()
    assert not set(keys.values()) & set(after.values())
    # Three of these had one study key together.
    assert (len(set(keys.values())), len(set(after.values()))) == (3, 5)
    assert not {r.place.key_id for r in records} & {r.place.key_id for r in new}
    assert sorted(r.place.admission for r in new) == sorted(r.place.admission for r in records)
    by_number = {r.place.admission: r.place for r in records}
    for record in new:
        old = by_number[record.place.admission]
        assert (record.place.study_tag, record.place.length) == (old.study_tag, old.length)
        assert record.place.frames_digest == old.frames_digest
    # No page of the old packs is in a new one; frames and lengths are the same.
    made = [p.read_bytes() for p in (house.config.store_path / "objects").rglob("*") if p.is_file()]
    assert sorted(map(len, made)) == sorted(map(len, old_bytes.values()))
    chunks = {content[PAGE + 40 : PAGE + 100] for content in old_bytes.values()}
    assert not [content for content in made if content[PAGE + 40 : PAGE + 100] in chunks]
    # The old study keys open nothing of it.
    for path in (house.config.store_path / "objects").rglob("*"):
        if path.is_file():
            for key in keys.values():
                with PackFile(path) as file, pytest.raises(SealError):
                    frame = house.vault.unlocked().index.of_object(file.read(PAGE + 16, 16))[0].frame
                    list(OpenedPack(file, bytearray(key)).dataset(frame))
    # An index that is built anew says the same; why something was quarantined it cannot know in each case.
    refill(house.vault.unlocked().admission)
    assert {key[:3] for key in contents(house)} == {key[:3] for key in before}
    kinds = [r["type"] for r in house.vault.auditor.read(0) if r["type"].startswith("reencrypt")]
    assert kinds == ["reencrypt-begun", "reencrypted"]


def test_of_a_study_everything_under_its_keys_goes_along_and_nothing_else(house: House) -> None:
    names = furnished(house)
    before, keys = contents(house), keys_of(house)
    events = reencrypt(house, Scope(study=STUDY))
    # Two packs of the study, its contradiction, and the other study's instance that lay under its key.
    assert summary(events) == (4, 0)
    assert contents(house) == before
    assert keys.keys() & keys_of(house).keys() == {names["other"]}
    assert not {keys[names["first"]], keys[names["second"]]} & set(keys_of(house).values())
    clean(house)
    told = next(r for r in house.vault.auditor.read(0) if r["type"] == "reencrypt-begun")
    assert (told["study"], told["reason"], told["uid"]) == (STUDY, "a key leaked", 1000)
    # What stays in the ledger when the study is erased does not name it.
    assert STUDY not in str(house.vault.unlocked().ledger._db.execute("SELECT * FROM reencryption").fetchall())


def test_of_a_version_those_that_it_wraps_are_re_encrypted(house: House) -> None:
    furnished(house)
    list(Rotate(house.vault).run(1000, "quarterly", {"export": "a test", "backup": "a test"}))
    with pytest.raises(StrongroomError, match="no study key is wrapped under version 1") as caught:
        reencrypt(house, Scope(version=1))
    assert caught.value.status == NOTHING
    before = contents(house)
    assert summary(reencrypt(house, Scope(version=2))) == (5, 0)
    assert contents(house) == before
    clean(house)


def test_states_that_somebody_decided_stay_also_in_an_index_that_is_built_anew(house: House) -> None:
    furnished(house)
    open_ = house.vault.unlocked()
    for row in open_.index.quarantined():
        decision = Decision(
            clock.now(),
            0,
            "accept",
            row["id"],
            row["object_id"],
            row["held_pack"] or "",
            row["held_object_id"] or "",
            "x",
        )
        with house.vault.admitting():
            open_.admission.decide(decision)
    before = contents(house)
    assert sorted({state for _, _, state, _ in before}) == ["held", "replaced"]
    for _ in range(2):
        reencrypt(house)
        assert contents(house) == before
        refill(open_.admission)
        assert contents(house) == before
        open_.admission.resume()
        assert contents(house) == before
    # A rebuilt index forgot what packs were called; the ledger did not.
    named = {d.pack_id for d in open_.ledger.decisions()}
    assert named <= house.records()
    house.died()
    assert contents(house) == before
    clean(house)


def test_a_decision_and_an_erasure_after_it_reach_the_new_packs(house: House) -> None:
    furnished(house)
    reencrypt(house)
    open_ = house.vault.unlocked()
    row = next(r for r in open_.index.quarantined() if r["study"] == OTHER)
    with house.vault.admitting():
        open_.admission.decide(Decision(clock.now(), 0, "discard", row["id"], row["object_id"], "", "", "x"))
    assert row["id"] not in house.records()
    house.erase()
    house.is_gone()
    assert len(house.records()) == 1
    # The key that another study shared was left behind: this certificate waits for versions alone.
    [erasure] = house.erasures()
    assert erasure.versions == [1]
    clean(house)


def test_a_reader_that_was_told_the_old_name_gets_the_instance(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    [row] = instances(server)
    done = server.ok("keys", "reencrypt", "--all", "--reason", "a test")
    assert "1 pack is under a new study key" in done.out
    assert "old backups" in done.out
    [new] = instances(server)
    assert new["pack"] != row["pack"]
    with vault(load(server.config)) as client:
        write(client, row, server.home / "x.dcm")
    assert raw_data_set(server.home / "x.dcm") == raw_data_set(CT)
    # A copy that is sent again is held already, another one is not.
    assert send(server, [CT, MR]) == [0, 0]
    server.wait_admitted()
    assert [r["pack"] for r in instances(server) if r["sop"] == row["sop"]] == [new["pack"]]
    assert server.run("verify").status == 0
    status = server.ok("keys", "status", "--json").json()
    assert [r["done"] for r in status["reencryptions"]] == [1]
    assert "under a new study key" in server.ok("keys", "status").out


# --- what stands in the way


def test_a_damaged_pack_stays_as_it_is_with_all_under_its_key_and_the_others_go_on(house: House) -> None:
    names = furnished(house)
    open_ = house.vault.unlocked()
    path = open_.archive.path(names["second"])
    whole = path.read_bytes()
    path.chmod(0o600)
    at = PAGE + 60
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    damaged = path.read_bytes()
    before = house.records()
    events = reencrypt(house)
    assert summary(events) == (2, 3)
    left = [e for e in events if e["kind"] == "left"]
    assert {e["pack"] for e in left} == house.records() & before
    assert {e["study"] for e in left} == {STUDY, OTHER}
    assert all("does not open" in e["reason"] for e in left)
    assert [e["reason"].startswith(f"pack {names['second']} is under the same") for e in left].count(False) == 1
    assert path.read_bytes() == damaged
    [job] = open_.ledger.reencryptions()
    assert job.ended
    assert job.left.keys() == {e["pack"] for e in left}
    with pytest.raises(StrongroomError, match="no re-encryption is under way"):
        reencrypt(house, Scope(), "")
    # Mended from a backup, it is re-encrypted like any other.
    path.write_bytes(whole)
    assert summary(reencrypt(house, Scope(study=STUDY), "again")) == (4, 0)
    clean(house)
    assert not house.records() & before


def test_a_pack_that_is_missing_cut_or_another_one_stays_and_nothing_is_removed(house: House) -> None:
    names = furnished(house)
    archive = house.vault.unlocked().archive
    first, second = archive.path(names["first"]), archive.path(names["second"])
    kept = first.read_bytes(), second.read_bytes()
    for broken in (b"", kept[0][:-1], kept[0] + b"\0", kept[1], bytes(len(kept[0]))):
        first.chmod(0o600)
        first.write_bytes(broken)
        before = house.records()
        events = reencrypt(house, Scope(study=STUDY))
        assert [e["pack"] for e in events if e["kind"] == "left"] == [names["first"]]
        assert first.read_bytes() == broken
        assert names["first"] in house.records() & before
    first.unlink()
    assert [e["reason"] for e in reencrypt(house) if e["kind"] == "left"] == ["it is not there"]
    first.write_bytes(kept[0])
    assert summary(reencrypt(house))[1] == 0
    clean(house)


def test_what_is_written_wrongly_is_found_before_the_old_pack_goes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnished(house)
    before, records = contents(house), house.vault.unlocked().keys_db.records()
    whole = direct.write_all

    def lying(descriptor: int, data: memoryview, offset: int) -> None:
        # A disk that says it wrote, and kept something else of each record.
        changed_ = bytearray(data)
        changed_[-PAGE + 60] ^= 1
        copy = memoryview(mmap.mmap(-1, len(data)))
        copy[:] = changed_
        whole(descriptor, copy, offset)

    with monkeypatch.context() as patched:
        patched.setattr(direct, "write_all", lying)
        assert summary(reencrypt(house))[0] == 0
    assert house.vault.unlocked().keys_db.records() == records
    assert contents(house) == before
    clean(house)


def test_a_full_disk_ends_it_with_everything_as_it_was_and_it_goes_on_when_there_is_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnished(house)
    before, records = contents(house), len(house.records())
    whole, writes, refused = direct.write_all, 0, 0

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        nonlocal writes
        writes += 1
        if writes == refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor, data, offset)

    for at in (1, 2, 5):
        writes, refused = 0, at
        with monkeypatch.context() as patched:
            patched.setattr(direct, "write_all", full)
            with pytest.raises(StrongroomError, match="No space left") as caught:
                reencrypt(house)
        assert "goes on where it stopped" in caught.value.hint
        assert contents(house) == before
        clean(house)
    set_reserve(house, 1 << 50)
    with pytest.raises(StrongroomError, match="no room"):
        reencrypt(house)
    set_reserve(house, 4 << 20)
    # Without a scope and a reason: it goes on.
    assert summary(reencrypt(house, Scope(), "")) == (records, 0)
    assert contents(house) == before
    clean(house)


@pytest.mark.needs_root
def test_a_disk_that_is_really_full_loses_nothing_wherever_it_says_so(
    make_server: Callable[[], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server()
    server.init()
    server.set("store", reserve_bytes=1 << 20)
    kept = server.home / "kept"
    server.store.rename(kept)
    disk = Disk(server.store, 24)
    subprocess.run(["cp", "-a", f"{kept}/.", str(server.store)], check=True)
    house = House(server)
    try:
        furnished(house)
        house.put(21, content=os.urandom(2 << 20))
        house.put(22, content=os.urandom(2 << 20))
        house.admit()
        before = contents(house)
        # As if it had been enough when it was looked.
        monkeypatch.setattr(space, "archive_has_room", lambda *_: True)
        stopped = 0
        for room in (0, 16 << 10, 96 << 10, 200 << 10, 1 << 20, 4_210_000, 4_240_000, 4_300_000):
            filler = server.store / "filler"
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(4096, space.free(server.store) - room))
            try:
                # A second run finds the same disk.
                for scope, reason in ((ALL, "a key leaked"), (Scope(), "")):
                    with contextlib.suppress(StrongroomError):
                        stopped -= bool(reencrypt(house, scope, reason))
                    stopped += 1
                if not house.vault.unlocked().ledger.unsettled():
                    assert contents(house) == before, room
            finally:
                filler.unlink()
            house.died()
            assert contents(house) == before, room
            clean(house)
        assert stopped > 8
        with contextlib.suppress(StrongroomError):
            reencrypt(house, Scope(), "")
        assert summary(reencrypt(house)) == (6, 0)
        assert contents(house) == before
        clean(house)
    finally:
        house.close()
        disk.unmount()


def test_memory_does_not_grow_with_an_instance(house: House) -> None:
    content = os.urandom(1 << 20) * 24
    house.put(1, content=content)
    house.admit()
    tracemalloc.start()
    try:
        reencrypt(house)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    house.holds(STUDY, 1, content)
    clean(house)


@pytest.mark.parametrize("step", ["exchange", "move", "settle"])
def test_a_database_that_takes_nothing_leaves_what_is_finished_before_anything_is_admitted(
    house: House, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    furnished(house)
    before = contents(house)
    owner: Any = {"exchange": KeysDatabase, "move": Index, "settle": Ledger}[step]

    def refuses(*_: Any, **__: Any) -> Any:
        raise DatabaseError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, refuses)
        with pytest.raises(StrongroomError, match="disk is full"):
            reencrypt(house)
        # The disk is still full: nothing is judged beside a pack that stands between two names.
        copy = house.put(1)
        house.close_packs()
        if step != "exchange":
            with pytest.raises(DatabaseError):
                house.vault.admit()
            assert (house.config.incoming / copy).exists()
    house.vault.admit()
    assert not (house.config.incoming / copy).exists()
    assert contents(house) == before
    clean(house)
    assert summary(reencrypt(house, Scope(), ""))[1] == 0
    assert contents(house) == before
    clean(house)


def test_keys_that_are_zeroed_in_the_middle_wrap_nothing_and_it_goes_on_when_unlocked(house: House) -> None:
    furnished(house)
    before = contents(house)
    for steps in range(1, 4):
        under_way = Reencrypt(house.vault).run(1000, ALL, "a key leaked")
        for _ in range(steps):
            next(under_way)
        house.vault.lock()
        with pytest.raises(StrongroomError) as caught:
            list(under_way)
        assert caught.value.status == LOCKED
        house.vault.auditor.close()
        house.vault = house._vault()
        assert contents(house) == before
        clean(house)
    assert summary(reencrypt(house, Scope(), "")) == (5, 0)
    assert contents(house) == before
    clean(house)


def test_a_lock_while_a_pack_is_built_leaves_nothing_that_an_unlock_does_not_clear(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnished(house)
    before = contents(house)
    whole = Archive.making

    @contextlib.contextmanager
    def locking(archive: Archive, target: Path) -> Iterator[int]:
        with whole(archive, target) as descriptor:
            yield descriptor
        house.vault.lock()

    with monkeypatch.context() as patched:
        patched.setattr(Archive, "making", locking)
        with pytest.raises(StrongroomError, match="locked during"):
            reencrypt(house)
    house.vault.auditor.close()
    house.vault = house._vault()
    assert contents(house) == before
    clean(house)
    assert summary(reencrypt(house, Scope(), ""))[1] == 0
    clean(house)


def test_both_keys_of_a_pack_are_zeroed_when_it_is_done(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    furnished(house)
    made: list[bytearray] = []
    opened: list[OpenedPack] = []

    def remembered() -> bytearray:
        made.append(bytearray(os.urandom(32)))
        return made[-1]

    class Remembered(OpenedPack):
        def __init__(self, file: PackFile, key: bytearray) -> None:
            super().__init__(file, key)
            opened.append(self)

    with monkeypatch.context() as patched:
        patched.setattr(repack, "new_key", remembered)
        patched.setattr(repack, "OpenedPack", Remembered)
        reencrypt(house)
    assert len(made) == 5
    assert set(map(bytes, made)) == {bytes(32)}
    assert {bytes(one.key) for one in opened} == {bytes(32)}


# --- beside others


def test_what_is_erased_discarded_or_arrives_while_a_pack_is_built_is_not_lost_or_brought_back(
    house: House,
) -> None:
    furnished(house)
    before = contents(house)
    under_way = Reencrypt(house.vault).run(1000, ALL, "x")
    assert next(under_way)["kind"] == "step"
    # Between two packs of others: a discard, a study that goes, one that comes.
    open_ = house.vault.unlocked()
    row = next(r for r in open_.index.quarantined() if r["study"] == OTHER)
    with house.vault.admitting():
        open_.admission.decide(Decision(clock.now(), 0, "discard", row["id"], row["object_id"], "", "", "x"))
    new = house.put(9)
    house.admit()
    events = list(under_way)
    assert summary(events) == (4, 0)
    assert new in house.records()
    kept = {k: v for k, v in before.items() if k[0] != row["object_id"]}
    found = contents(house)
    assert kept.items() <= found.items()
    assert len(found) == len(kept) + 1
    clean(house)


@pytest.mark.parametrize("act", ["erase", "discard"])
def test_a_pack_that_goes_between_its_building_and_its_exchange_stays_gone(
    house: House, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    furnished(house)
    house.put(5, "1.2.3")
    house.admit()
    open_ = house.vault.unlocked()
    whole, done = Archive.making, []

    @contextlib.contextmanager
    def acting(archive: Archive, target: Path) -> Iterator[int]:
        with whole(archive, target) as descriptor:
            yield descriptor
        if not done:
            done.append(act)
            if act == "erase":
                list(Erase(house.vault).run(0, STUDY, "x"))
                return
            row = next(r for r in open_.index.quarantined() if r["study"] == OTHER)
            with house.vault.admitting():
                open_.admission.decide(Decision(clock.now(), 0, "discard", row["id"], row["object_id"], "", "", "x"))

    with monkeypatch.context() as patched:
        patched.setattr(Archive, "making", acting)
        reencrypt(house)
    if act == "erase":
        house.is_gone()
    clean(house)
    assert [row["study"] for row in open_.index.quarantined()] == [OTHER if act == "erase" else STUDY]


def test_an_erasure_that_waits_for_a_gate_keeps_its_packs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    furnished(house)
    house.put(10)
    record = house.gate.begin(STUDY, "CT1")
    record.write(memoryview(b"pixels"))
    with monkeypatch.context() as patched:
        patched.setattr(erase, "_FENCE_SECONDS", -1.0)
        with pytest.raises(StrongroomError, match="not done yet"):
            house.erase()
    reencrypt(house)
    house.finish(record, 11)
    house.close_packs()
    Erase(house.vault).resume()
    house.is_gone()
    clean(house)


def test_while_a_backup_is_made_no_old_pack_goes(house: House) -> None:
    furnished(house)
    before, files = contents(house), house.files()
    open_ = house.vault.unlocked()
    under_way = Reencrypt(house.vault).run(1000, ALL, "x")
    with open_.packs_lock:
        for event in under_way:
            if event["kind"] == "waiting":
                break
        assert files <= house.files()
        # Whoever makes it gets the vault's state: nobody waits for the lock within that.
        took = threading.Thread(target=house.vault.admit)
        took.start()
        took.join(30)
        assert not took.is_alive()
    assert summary(list(under_way)) == (5, 0)
    assert contents(house) == before
    clean(house)


def test_a_pack_between_two_names_is_no_finding_and_one_without_a_key_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = furnished(house)
    open_, whole = house.vault.unlocked(), Index.move
    seen: list[list[dict[str, Any]]] = []

    def looking(index: Index, old: str, new: str, length: int) -> None:
        # Its key record is the new one, its file and its rows are still the old ones.
        seen.append(findings(house))
        whole(index, old, new, length)

    with monkeypatch.context() as patched:
        patched.setattr(Index, "move", looking)
        reencrypt(house)
    assert seen == [[]] * 5
    open_.keys_db.remove(open_.ledger.name_of(names["other"]))
    assert [finding["what"] for finding in findings(house)] == ["orphaned"]


def test_one_at_a_time_and_none_beside_a_rotation(house: House) -> None:
    furnished(house)
    first = Reencrypt(house.vault).run(1000, ALL, "x")
    next(first)
    with pytest.raises(StrongroomError, match="at work on this store"):
        reencrypt(house)
    with pytest.raises(StrongroomError, match="at work on this store"):
        list(Rotate(house.vault).run(0, "x", {}))
    first.close()
    assert summary(reencrypt(house, Scope(), "")) == (5, 0)


def test_another_scope_is_refused_while_one_is_under_way(house: House) -> None:
    furnished(house)
    first = Reencrypt(house.vault).run(1000, Scope(study=STUDY), "x")
    next(first)
    first.close()
    for other in (ALL, Scope(study=OTHER), Scope(version=1)):
        with pytest.raises(StrongroomError, match="is under way, of other packs"):
            reencrypt(house, other)
    assert summary(reencrypt(house, Scope(study=STUDY), "another reason"))[0] == 4
    [job] = house.vault.unlocked().ledger.reencryptions()
    assert job.reason == "x"


def test_nothing_is_begun_without_a_reason_a_scope_or_anything_to_do(house: House) -> None:
    for scope, reason, match in (
        (ALL, "x", "nothing is archived"),
        (Scope(study="1.2.3"), "x", "study 1.2.3 has nothing"),
        (Scope(version=7), "x", "version 7"),
    ):
        with pytest.raises(StrongroomError, match=match) as caught:
            reencrypt(house, scope, reason)
        assert caught.value.status == NOTHING
    furnished(house)
    with pytest.raises(StrongroomError, match="needs a reason"):
        reencrypt(house, ALL, " ")
    with pytest.raises(StrongroomError, match="no re-encryption is under way"):
        reencrypt(house, Scope(), "x")
    assert house.vault.unlocked().ledger.reencryptions() == []
    assert not [r for r in house.vault.auditor.read(0) if r["type"].startswith("reencrypt")]


def test_a_rotation_between_two_runs_changes_nothing_of_what_is_planned(house: House) -> None:
    furnished(house)
    before = contents(house)
    first = Reencrypt(house.vault).run(1000, Scope(version=1), "x")
    while next(first)["kind"] != "progress":
        pass
    first.close()
    list(Rotate(house.vault).run(1000, "quarterly", {"export": "a test", "backup": "a test"}))
    assert summary(reencrypt(house, Scope(), "")) == (5, 0)
    assert contents(house) == before
    assert house.vault.unlocked().keys_db.versions() == {2: 5}
    clean(house)


# --- on a server, from the command line


def test_while_objects_arrive_and_are_exported_nothing_is_refused_or_missing(server: Server, tmp_path: Path) -> None:
    context = scu.tls(server.home / "issued" / "CT1")

    def send_study(study: int) -> dict[str, Any]:
        items = [instance(study, number) for number in range(3)]
        assert scu.send(server.port, context, items) == [0, 0, 0]
        return {item.sop_instance: item.data for item in items}

    exported: list[tuple[int, str]] = []
    over = threading.Event()

    def export() -> None:
        while not over.is_set():
            done = server.run("export", "--all", "--to", tmp_path / f"out-{len(exported)}")
            exported.append((done.status, done.err))

    sender, reader = Sender(send_study, 0), threading.Thread(target=export)
    try:
        sender.wait(4)
        wait_archived(server, 4)
        reader.start()
        for number in range(3):
            done = server.run("keys", "reencrypt", "--all", "--reason", f"a test {number}")
            assert done.status == 0, (done.out, done.err)
        verified = server.run("verify")
        assert verified.status == 0, verified.out
        sender.wait(2)
    finally:
        sender.finish()
        over.set()
        reader.join(60)
    assert sender.failed == []
    assert exported
    assert {status for status, _ in exported} == {0}, exported
    server.wait_admitted()
    server.ok("export", "--all", "--to", tmp_path / "all")
    found = {path.stem: raw_data_set(path) for path in (tmp_path / "all").rglob("*.dcm")}
    assert found == sender.acknowledged


def test_the_command_line_says_what_was_done_what_was_left_and_with_which_status(server: Server) -> None:
    assert server.run("keys", "reencrypt", "--all", "--reason", "x").status == NOTHING
    assert server.run("keys", "reencrypt", "--all", "--version", "1", "--reason", "x").status == 2
    assert send(server, [CT, MR]) == [0, 0]
    server.wait_admitted()
    rows = {row["study"]: row for row in instances(server)}
    study = rows[min(rows)]["study"]
    done = server.ok("keys", "reencrypt", "--study", study, "--reason", "x")
    assert "1 pack is under a new study key" in done.out
    damaged = server.store / "objects" / rows[max(rows)]["pack"][:2] / rows[max(rows)]["pack"]
    damaged.chmod(0o600)
    with damaged.open("r+b") as file:
        file.seek(PAGE + 200)
        file.write(b"\xff" * 16)
    partly = server.run("keys", "reencrypt", "--version", "1", "--reason", "x", "--json")
    assert partly.status == PARTLY, partly.err
    found = partly.json()
    assert (found["packs"], [one["pack"] for one in found["left"]]) == (1, [damaged.name])
    assert found["left"][0]["study"] == max(rows)
    assert f"pack {damaged.name} stays as it is" in partly.err
    assert "1 left as they were" in server.ok("keys", "status").out
    # Locked, it says so.
    server.ok("lock")
    assert server.run("keys", "reencrypt", "--all", "--reason", "x").status == LOCKED
    server.ok("unlock", "--key-file", server.home / "store.key")
    # Nobody can be asked without a terminal, and nothing is read in clear on the way.
    for verb in ("add", "test"):
        asked = server.run("keys", "slot", verb, stdin="a long passphrase\n")
        assert asked.status == 1
        assert "there is no terminal" in asked.err
        assert "--passphrase-file" in asked.err
        assert "Warning" not in asked.err
    # The report, with a proof that holds and then one that does not.
    rotated = server.run("keys", "rotate", "--reason", "q", "--without-export", "x", "--without-backup", "x")
    assert rotated.status == 0, rotated.err
    report = server.ok("keys", "report")
    assert "verifies, 20" in report.out
    assert "2 study keys, index and ledger" in report.out
    found = server.ok("keys", "report", "--json").json()
    assert [one["fault"] for one in found["rotations"]] == [""]
    assert found["signing_key"] in server.config.read_text()
    said = server.ok("keys", "compromise", "--leaked", "key-file").out
    [slot] = server.ok("keys", "slot", "list", "--json").json()["items"]
    assert f"--remove {slot['id']}" in said
    assert server.ok("keys", "compromise", "--leaked", "version", "--json").json()["steps"][0]["commands"]
    server.stop()
    other = server.config.read_text()
    key = found["signing_key"].removeprefix("ed25519:")
    assert other.count(key) == 1
    with ledger_of(server) as ledger:
        [rotation] = ledger.rotations()
        rotation.proof = rotation.proof.replace('"records":2', '"records":1')
        ledger.set_rotation(rotation)
    broken = server.run("keys", "report")
    assert broken.status == FINDINGS
    assert "DOES NOT VERIFY" in broken.out


@contextlib.contextmanager
def ledger_of(server: Server) -> Iterator[Ledger]:
    """Give the ledger of a store that no vault runs on."""
    config = load(server.config)
    ring = keyring.unlock(config.keyring, slots.read_key_file(server.home / "store.key"), FileAnchors(config.anchors))
    version = ring.current()
    ledger = Ledger(config.ledger(version.version), version.ledger_key())
    try:
        yield ledger
    finally:
        ledger.close()
        ring.forget()
