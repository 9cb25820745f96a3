"""What a review found, each step by step: certificates, deposits that cannot be looked at, holds, links, readers."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aged import copy_archive, make_empty, on
from conftest import Server
from test_erase import OTHER, STUDY, House, rotate

from keys import shares
from storage.index import Index
from storage.keysdb import KeysDatabase
from storage.packfile import PackFile
from storage.sqlite import Database, checkpoint, connect
from storescp import clock, space
from storescp.errors import StrongroomError
from storescp.vault import admit, erase
from storescp.vault.backup import Backups
from storescp.vault.erase import Erase
from storescp.vault.holding import Holding
from storescp.vault.rebuild import rebuild
from storescp.vault.recovery import Recovery
from storescp.vault.rotate import Rotate


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_empty(tmp_path_factory.mktemp("empty") / "store")


@pytest.fixture
def house(empty: Path, make_server: Callable[[], Server]) -> Iterator[House]:
    house = House(copy_archive(empty, make_server))
    house.config.settings.keys.destroy_after_days = 0
    yield house
    house.close()


def exported(house: House) -> tuple[str, list[str], bytes]:
    """Make a recovery key and an export for it; return the key's id, its shares and the export."""
    key, words = shares.new_recovery(house.vault.unlocked().ring.store_id, 2, 2, created=clock.now())
    Recovery(house.vault).add(0, key)
    [(_, content)] = Recovery(house.vault).export(0)
    return key.id, words, content


# --- certificates


def test_an_export_of_a_version_destroyed_before_the_erasure_keeps_its_certificate_pending_until_it_is_retired(
    house: House,
) -> None:
    house.put(1)
    house.admit()
    recovery, _, _ = exported(house)
    rotate(house)
    house.erase()
    [erasure] = house.erasures()
    assert erasure.versions == [2]
    rotate(house)
    assert [r.destroyed > "" for r in house.vault.unlocked().ledger.rotations()] == [True, True]
    assert [made.versions for made in Recovery(house.vault).exports()] == [[1]]
    [erasure] = house.erasures()
    assert (house.certificate(erasure)["state"], erasure.final) == ("pending", "")
    Recovery(house.vault).retire(0, recovery)
    Erase(house.vault).resume()
    [erasure] = house.erasures()
    assert (house.certificate(erasure)["state"], erasure.final > "") == ("final", True)


# --- deposits of which nobody knows what they are


def test_an_erasure_refuses_while_a_closed_deposit_cannot_be_looked_at(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = house.put(1)
    house.admit()
    second = house.put(2)
    house.close_packs()

    def opened(path: Path, **options: Any) -> PackFile:
        if path.name == second:
            raise OSError(errno.EIO, "the disk does not read it")
        return PackFile(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(admit, "PackFile", opened)
        for study in (STUDY, OTHER):
            with pytest.raises(StrongroomError, match="1 deposit cannot be looked at, perhaps of this study"):
                house.erase(study)
    assert house.erasures() == []
    house.holds(STUDY, 1)
    house.erase()
    house.is_gone(STUDY, first, second)
    house.admit()
    house.is_gone(STUDY, first, second)


def test_a_deposit_that_waits_for_room_is_found_and_goes_with_its_study(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(space, "archive_has_room", lambda *_: False)
        waits, other = house.put(1), house.put(1, OTHER)
        house.admit()
        assert (house.states(STUDY), house.states(OTHER)) == ([(f"{STUDY}.1", "held")], [(f"{OTHER}.1", "held")])
        assert (house.records(), house.files()) == (set(), {waits, other})
        assert house.erase()[-1]["kind"] == "certificate"
        house.is_gone(STUDY, waits)
    house.admit()
    house.is_gone(STUDY, waits)
    house.holds(OTHER, 1)
    assert house.records() == {other}


# --- holds on patients


def test_an_erasure_is_refused_under_holds_on_patients_while_a_pack_of_the_study_is_not_in_the_index(
    house: House,
) -> None:
    unread, known = house.put(1, patient="Q"), house.put(1, OTHER)
    house.admit()
    house.vault.unlocked().index.drop(unread)
    holding = Holding(house.vault)
    held = holding.place(1000, on(patient_id="Q"))
    with pytest.raises(StrongroomError, match="a hold on its patient cannot be ruled out"):
        house.erase()
    assert house.erasures() == []
    assert house.records() == {unread, known}
    # One whose packs are all there is known not to be of that patient.
    house.erase(OTHER)
    assert house.records() == {unread}
    holding.release(1000, held.id, "case closed")
    holding.place(1000, on(study=OTHER))
    house.erase()
    house.is_gone(STUDY, unread)


def test_a_hold_on_a_patient_is_refused_while_an_erasure_is_under_way_and_one_on_another_study_is_not(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erase, "_FENCE_SECONDS", 0.0)
    house.put(1)
    with pytest.raises(StrongroomError, match="not done yet"):
        house.erase()
    holding = Holding(house.vault)
    with pytest.raises(StrongroomError, match="an erasure is under way, perhaps of this patient") as refused:
        holding.place(1000, on(patient_id="P"))
    assert "--study" in refused.value.hint
    assert holding.listed() == []
    by_study = holding.place(1000, on(study=OTHER))
    house.close_packs()
    Erase(house.vault).resume()
    by_patient = holding.place(1000, on(patient_id="P"))
    assert {hold.id for hold in holding.listed()} == {by_study.id, by_patient.id}


# --- folders and links


def test_a_backup_goes_into_no_folder_of_the_stores_own_and_into_none_that_contains_one(
    house: House, tmp_path: Path
) -> None:
    house.put(1)
    house.admit()
    home, link = house.server.home, tmp_path / "link"
    link.symlink_to(house.config.store_path)
    own = (house.config.store_path, house.config.incoming.parent, house.config.anchors)
    before = sorted(home.rglob("*"))
    for folder in (*own, *(one / "backups" for one in own), house.config.incoming, home, link, link / "backups"):
        with pytest.raises(StrongroomError, match="are one in the other"):
            list(Backups(house.vault).run(1000, folder, without_export="a test"))
    assert sorted(home.rglob("*")) == before
    assert Backups(house.vault).known() == []
    # One beside them is, also where its name begins like theirs.
    events = Backups(house.vault).run(1000, home / "store-backups", without_export="a test")
    assert [event["manifest"].packs for event in events if event["kind"] == "made"] == [1]


def test_a_folder_among_copies_under_way_is_left_alone_at_a_start(house: House) -> None:
    folder = house.config.store_path / "admitting"
    (folder / "lost+found").mkdir()
    (folder / "lost+found" / "#1").write_bytes(b"of the file system")
    (folder / ("ab" * 16)).write_bytes(b"a copy that a crash left")
    house.died()
    assert sorted(path.name for path in folder.rglob("*")) == ["#1", "lost+found"]


@pytest.mark.needs_root
def test_a_rebuild_by_root_follows_no_link_of_the_stores_owner(house: House, tmp_path: Path) -> None:
    _, words, export = exported(house)
    config, owner = house.config, pwd.getpwnam("daemon").pw_uid
    house.vault.lock()
    shutil.rmtree(config.anchors)
    os.chown(config.store_path, owner, -1)
    target, key_file = tmp_path / "target", tmp_path / "new.key"
    target.write_bytes(b"root's")
    config.lock.unlink(missing_ok=True)
    config.lock.symlink_to(target)
    with pytest.raises(StrongroomError, match="lock cannot be opened"):
        rebuild(config, export, words, key_file)
    assert (config.anchors.exists(), key_file.exists()) == (False, False)
    config.lock.unlink()
    link = config.public / "deposit-9.key"
    link.symlink_to(target)
    assert rebuild(config, export, words, key_file) == [1]
    assert (target.stat().st_uid, target.read_bytes()) == (0, b"root's")
    made = (config.keyring, config.lock, config.anchors, *config.anchors.iterdir(), config.public / "deposit-1.key")
    assert {path.lstat().st_uid for path in (*made, link)} == {owner}


# --- readers that take their time


class Told(Database):
    """A database that notes how long it would wait for others, in milliseconds, at each checkpoint."""

    waits: list[int]

    def execute(self, sql: str, parameters: Any = None) -> Any:
        if "wal_checkpoint" in sql:
            self.waits.append(waits(self))
        return super().execute(sql, parameters)


def waits(database: Database) -> int:
    [[milliseconds]] = database.conn.execute("PRAGMA busy_timeout").fetchall()
    return int(milliseconds)


def told(database: Database) -> Told:
    """Return the same connection as one that notes."""
    noted = Told(database.conn)
    noted.waits = []
    return noted


def test_a_checkpoint_waits_for_no_reader_and_what_comes_after_it_waits_as_before(house: House, tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    writer, reader = told(connect(path)), connect(path)
    before = waits(writer)
    assert before > 0
    writer.execute("CREATE TABLE t (n INTEGER)")
    writer.conn.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(1000)])
    cursor = reader.execute("SELECT n FROM t")
    assert cursor.fetchone() == (0,)
    writer.execute("INSERT INTO t VALUES (1000)")
    checkpoint(writer)
    assert (writer.waits, waits(writer)) == ([0], before)
    log = path.with_name("some.db-wal")
    assert log.stat().st_size
    assert len(cursor.fetchall()) == 999
    checkpoint(writer)
    assert log.stat().st_size == 0
    writer.close()
    reader.close()
    # Whatever erases goes that way.
    pack = house.put(1)
    house.admit()
    open_ = house.vault.unlocked()
    keys_db: KeysDatabase = open_.keys_db
    index: Index = open_.index
    keys_db._db, index._db = told(keys_db._db), told(index._db)
    keys_db.forget()
    keys_db.remove(pack)
    index.forget()
    assert (keys_db._db.waits, index._db.waits) == ([0, 0], [0])
    assert waits(keys_db._db) == waits(index._db) == before


# --- a copy against one that does not open


def test_a_copy_waits_while_the_anchor_of_the_one_that_is_held_is_away(house: House) -> None:
    first = house.put(1)
    house.admit()
    steps = Rotate(house.vault).run(1000, "quarterly", {"export": "a test", "backup": "a test"})
    assert "version 2 is current" in next(steps)["text"]
    second = house.put(1)
    anchor = house.config.anchors / "anchor-1"
    anchor.rename(anchor.with_name("away"))
    # As in a vault that was unlocked without it.
    house.vault.unlocked().ring._versions.pop(1)
    house.admit()
    with PackFile(house.config.incoming / second) as file:
        assert file.header.version == 2
    assert house.vault.unlocked().admission.stuck.keys() == {second}
    assert (house.records(), house.states()) == ({first}, [(f"{STUDY}.1", "held")])
    anchor.with_name("away").rename(anchor)
    house.admit()
    assert (house.records(), house.files(), house.vault.unlocked().admission.stuck) == ({first}, {first}, {})
    house.holds(STUDY, 1)


def test_a_copy_of_one_whose_pack_is_damaged_heals_it(house: House) -> None:
    first = house.put(1)
    house.admit()
    path = house.vault.unlocked().archive.path(first)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    second = house.put(1)
    house.admit()
    assert second in house.records()
    house.holds(STUDY, 1)
    place = house.vault.unlocked().index.held(f"{STUDY}.1")
    assert place is not None
    assert place.pack_id == second
