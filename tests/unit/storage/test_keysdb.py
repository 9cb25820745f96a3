"""Study key records: added once, changed by comparison alone, and forgotten in the file and its log."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from keys.versions import StudyKeyPlace
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.sqlite import DatabaseError

CHANCE = random.Random(11)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def db(path: Path) -> Iterator[KeysDatabase]:
    made = KeysDatabase(path, migrate=True)
    yield made
    made.close()


def record(number: int, version: int = 1, *, admission: int = 0) -> StudyKeyRecord:
    pack_id = number.to_bytes(16, "big")
    place = StudyKeyPlace(pack_id, pack_id, CHANCE.randbytes(32), 8192, CHANCE.randbytes(32), admission or number)
    return StudyKeyRecord(place, version, CHANCE.randbytes(104))


def fill(db: KeysDatabase, count: int) -> list[StudyKeyRecord]:
    made = [record(number) for number in range(1, count + 1)]
    for one in reversed(made):
        db.add(one)
    return made


def test_records_come_back_whole_and_in_the_order_of_their_names(db: KeysDatabase) -> None:
    made = fill(db, 5)
    assert db.records() == made
    assert [db.find(one.pack_id) for one in made] == made
    assert db.find("ff" * 16) is None


def test_a_pack_or_an_admission_number_is_not_taken_twice(db: KeysDatabase) -> None:
    fill(db, 2)
    for one in (record(1, admission=9), record(9, admission=1)):
        with pytest.raises(DatabaseError):
            db.add(one)
    assert db.count() == 2


def test_an_admission_number_does_not_come_again_when_its_record_is_removed(db: KeysDatabase) -> None:
    db.add(record(1))
    db.remove(record(1).pack_id)
    assert db.count() == 0
    assert db.next_admission() == 2


def test_batches_meet_every_record_once_while_their_versions_change(db: KeysDatabase) -> None:
    made = fill(db, 10)
    seen, after = [], ""
    while batch := db.records(after=after, not_version=2, limit=3):
        after = batch[-1].pack_id
        seen += batch
        assert db.rewrap([(one, 2, b"new" + one.sealed) for one in batch]) == len(batch)
    assert seen == made
    assert db.records(not_version=2) == []
    assert db.versions() == {2: 10}
    assert [one.sealed for one in db.records()] == [b"new" + one.sealed for one in made]
    assert [one.place for one in db.records()] == [one.place for one in made]


def test_a_rewrap_changes_nothing_that_somebody_changed_meanwhile(path: Path, db: KeysDatabase) -> None:
    one, two, three = fill(db, 3)
    other = KeysDatabase(path)
    assert other.rewrap([(one, 2, b"theirs")]) == 1
    other.remove(two.pack_id)
    other.close()
    assert db.rewrap([(r, 3, b"ours") for r in (one, two, three)]) == 1
    assert [(r.version, r.sealed) for r in db.records()] == [(2, b"theirs"), (3, b"ours")]


def test_a_rewrap_that_fails_in_the_middle_changes_nothing(db: KeysDatabase) -> None:
    one, two = fill(db, 2)
    with pytest.raises(DatabaseError):
        # A column that takes blobs alone: the second statement fails.
        db.rewrap([(one, 2, b"new"), (two, 2, "no blob")])  # type: ignore[list-item]
    assert db.records() == [one, two]
    assert db.rewrap([(one, 2, b"new")]) == 1


def test_what_was_rewrapped_is_neither_in_the_file_nor_in_its_log(path: Path, db: KeysDatabase) -> None:
    made = fill(db, 50)
    db.forget()
    assert all(one.sealed in path.read_bytes() for one in made)
    db.rewrap([(one, 2, CHANCE.randbytes(104)) for one in made])
    db.forget()
    left = path.read_bytes() + path.with_name("keys.db-wal").read_bytes()
    assert not any(one.sealed in left for one in made)
    assert all(one.sealed in left for one in db.records())


def test_a_removed_record_is_neither_in_the_file_nor_in_its_log(path: Path, db: KeysDatabase) -> None:
    made = fill(db, 50)
    for one in made:
        db.remove(one.pack_id)
    left = path.read_bytes() + path.with_name("keys.db-wal").read_bytes()
    assert not any(one.sealed in left for one in made)


def test_a_snapshot_is_of_one_state_and_hinders_no_writer(path: Path, db: KeysDatabase) -> None:
    made = fill(db, 3)
    other = KeysDatabase(path)
    with db.snapshot():
        assert db.records() == made
        other.add(record(4))
        other.rewrap([(made[0], 2, b"new")])
        assert db.records() == made
        assert db.versions() == {1: 3}
    assert db.versions() == {1: 3, 2: 1}
    assert db.rewrap([(made[1], 2, b"new")]) == 1
    other.close()


# --- records of other packs in the place of some


def other(old: StudyKeyRecord, number: int) -> StudyKeyRecord:
    """Return the record of a pack that stands in another one's place."""
    place = old.place
    pack_id = number.to_bytes(16, "big")
    moved = StudyKeyPlace(pack_id, pack_id, place.study_tag, place.length, place.frames_digest, place.admission)
    return StudyKeyRecord(moved, old.version, CHANCE.randbytes(104))


def test_records_are_exchanged_all_at_once_and_keep_their_numbers(db: KeysDatabase) -> None:
    made = fill(db, 4)
    new = [other(made[1], 0xA1), other(made[2], 0x01A2)]
    number = db.next_admission()
    assert db.exchange([(made[1], new[0]), (made[2], new[1])])
    assert db.packs() == [made[0].pack_id, new[0].pack_id, new[1].pack_id, made[3].pack_id]
    assert [db.find(one.pack_id) for one in (*new, made[1], made[2])] == [*new, None, None]
    # A number does not come again because of it, nor is one given away.
    assert db.next_admission() == number


def test_nothing_is_exchanged_where_one_record_is_not_as_it_was(db: KeysDatabase) -> None:
    made = fill(db, 3)
    changed = StudyKeyRecord(record(2).place, 1, made[1].sealed)
    for wrong in (changed, record(9)):
        assert not db.exchange([(made[0], other(made[0], 0xA1)), (wrong, other(made[1], 0xA2))])
        assert db.records() == made
    # Nor where a new one cannot be added.
    with pytest.raises(DatabaseError):
        db.exchange([(made[0], other(made[0], 2))])
    assert db.records() == made


def test_a_record_that_was_rewrapped_meanwhile_is_still_the_one(db: KeysDatabase) -> None:
    [made] = fill(db, 1)
    assert db.rewrap([(made, 2, bytes(104))]) == 1
    assert db.exchange([(made, other(made, 0xA1))])
    assert db.count() == 1


def test_records_are_chosen_by_study_version_or_all_in_the_order_of_their_admission(db: KeysDatabase) -> None:
    made = fill(db, 4)
    db.rewrap([(made[2], 2, bytes(104))])
    assert db.chosen() == [one.pack_id for one in made]
    assert db.chosen(version=2) == [made[2].pack_id]
    assert db.chosen(version=3) == []
    assert db.chosen(tag=made[1].place.study_tag) == [made[1].pack_id]
    assert db.of_key(made[3].place.key_id) == [made[3]]
