"""The index: studies are found by what is in them, counted once, and stand in no file in clear."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storage import attributes
from storage.attributes import Attributes, Element, Received, Undecoded
from storage.index import Index, Place, Row
from storage.pack import PAGE, Frame
from storage.packfile import Record
from storage.search import FilterError, Filters, date_range, fold
from storage.sqlite import DatabaseError, connect

KEY = (bytes(range(32)), bytes(range(16)))
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
SYNTAX = "1.2.840.10008.1.2.1"
NAMES = ("Alphabetic", "Ideographic", "Phonetic")
TEXTS = {
    "patient_id": "00100020", "study_date": "00080020", "study_time": "00080030", "accession": "00080050",
    "modality": "00080060", "series_number": "00200011", "number": "00200013", "description": "00081030",
}  # fmt: skip


class Filled:
    """An index and how it was filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index(path, KEY, migrate=True)
        self._numbers = itertools.count(1)
        self._rows: dict[str, list[Row]] = {}

    def add(self, uid: str, *, study: str, series: str = "", pack: str = "", state: str = "held", **given: Any) -> None:
        """Add an instance; ``name`` is a person name with '=' between its groups."""
        row = Row(self.record(uid, study, series, **given), state)
        self._rows.setdefault(pack or f"pack-{study}", []).append(row)
        self.index.add(pack or f"pack-{study}", study, [row], 2 * PAGE)

    def admit(self, pack: str, admission: int) -> None:
        """Let a pack be admitted with the records that were added to it."""
        self.index.replace(pack, "objects", admission, 3 * PAGE, self._rows[pack])

    def record(self, uid: str, study: str, series: str = "", *, name: str = "", **given: Any) -> Record:
        undecoded = {"00081030": Undecoded([], b"\xff")} if given.pop("undecoded", False) else {}
        received = Received(
            given.pop("at", "2026-01-31T10:00:00Z"), "ab12", given.pop("calling", "CT1"), "STRONGROOM", "127.0.0.1", ""
        )
        uids = {attributes.SOP_CLASS: CT, attributes.SOP_INSTANCE: uid, attributes.STUDY: study,
                attributes.SERIES: series or f"{study}.1"}  # fmt: skip
        dataset = {tag: Element("UI", [value]) for tag, value in uids.items()}
        dataset |= {TEXTS[key]: Element("LO", [value]) for key, value in given.items()}
        if name:
            groups = dict(zip(NAMES, name.split("="), strict=False))
            dataset["00100010"] = Element("PN", [{g: part for g, part in groups.items() if part}])
        number = next(self._numbers)
        return Record(
            Frame(number * PAGE, number.to_bytes(16, "big"), 72, 72),
            Attributes(1, SYNTAX, dataset, undecoded, received),
        )

    def find(self, level: str = "study", **filters: str) -> list[str]:
        """Return the UIDs found at a level."""
        key = {"study": "study", "series": "series", "instance": "sop"}[level]
        return [row[key] for row in self.index.search(level, Filters(**filters))]


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path / "index.db")
    yield made
    made.index.close()


PEOPLE = {
    "1.1": "Müller^Jürgen",
    "1.2": "MÜLLER-LÜDENSCHEIDT^HERMANN",
    "1.3": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "1.4": "ﾔﾏﾀﾞ^ﾀﾛｳ",
    "1.5": "Straße^Anna",
    "1.6": "[Test]^A*B?",
    "1.7": "Διονύσιος",
    "1.8": "",
    "1.9": "Doe^Jane^Ann",
}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("Müller", "1.1"),
        ("müller", "1.1"),
        ("MÜLLER", "1.1"),
        ("Mu\u0308ller", "1.1"),
        ("Müller^Jürgen", "1.1"),
        ("Müller^Jürgen^^^", "1.1"),
        ("Müller^J", ""),
        ("Müll", ""),
        ("Jürgen", ""),
        ("*ller", ""),
        ("Doe", "1.9"),
        ("Doe^Jane", ""),
        ("Doe^Jane^A?n", "1.9"),
        ("müller*", "1.1 1.2"),
        ("*jürgen", "1.1"),
        ("M?ller", "1.1"),
        ("M??ller", ""),
        ("m?ller^j?rgen", "1.1"),
        ("müller-lüdenscheidt", "1.2"),
        ("Yamada", "1.3"),
        ("山田", "1.3"),
        ("山田^太郎", "1.3"),
        ("*太郎", "1.3"),
        ("やまだ^たろう", "1.3"),
        ("やまだ^?ろう", "1.3"),
        ("ヤマダ", "1.4"),
        ("ﾔﾏﾀﾞ", "1.4"),
        ("STRASSE", "1.5"),
        ("straße^anna", "1.5"),
        ("[test]", "1.6"),
        ("[Test]^a*b?", "1.6"),
        ("[TEST*", "1.6"),
        ("[a-z]*", ""),
        ("[m]üller", ""),
        ("]*", ""),
        ("ΔΙΟΝΎΣΙΟΣ", "1.7"),
        ("διονύσιος", "1.7"),
        ("nobody", ""),
        ("*", "1.1 1.2 1.3 1.4 1.5 1.6 1.7 1.8 1.9"),
        ("' OR 1=1 --", ""),
    ],
)
def test_a_name_is_found_in_any_script_without_case_and_with_wildcards(
    filled: Filled, pattern: str, found: str
) -> None:
    for study, name in PEOPLE.items():
        filled.add(f"{study}.9", study=study, name=name)
    assert filled.find(patient_name=pattern) == found.split()


STUDIES: dict[str, dict[str, str]] = {
    "1.1": {"patient_id": "A[1]", "study_date": "20260101", "accession": "ACC1", "modality": "CT", "calling": "CT1"},
    "1.2": {"patient_id": "A1", "study_date": "20260115", "accession": "acc1", "modality": "MR", "calling": "MR1"},
    "1.3": {"patient_id": "B1", "study_date": "20260131", "accession": "ACC2", "modality": "CT", "calling": "ct1"},
    "1.4": {"patient_id": "B2", "accession": "", "modality": "SR", "calling": "CT1"},
}


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, "1.4 1.1 1.2 1.3"),
        ({"patient_id": "A1"}, "1.2"),
        ({"patient_id": "a1"}, ""),
        ({"patient_id": "A*"}, "1.1 1.2"),
        ({"patient_id": "A[1]"}, "1.1"),
        ({"patient_id": "?1"}, "1.2 1.3"),
        ({"patient_id": "[AB]1"}, ""),
        ({"study_date": "20260115"}, "1.2"),
        ({"study_date": "20260102-20260130"}, "1.2"),
        ({"study_date": "20260101-20260131"}, "1.1 1.2 1.3"),
        ({"study_date": "20260115-"}, "1.2 1.3"),
        ({"study_date": "-20260115"}, "1.1 1.2"),
        ({"study_date": "20260131-20260101"}, ""),
        ({"accession": "ACC?"}, "1.1 1.3"),
        ({"modality": "CT"}, "1.1 1.3"),
        ({"modality": "?R"}, "1.4 1.2"),
        ({"study": "1.[2]"}, ""),
        ({"study": "1.2"}, "1.2"),
        ({"study": "1.*"}, "1.4 1.1 1.2 1.3"),
        ({"series": "1.3.1"}, "1.3"),
        ({"sop": "1.4.9"}, "1.4"),
        ({"aet": "CT1"}, "1.4 1.1"),
        ({"patient_id": "A*", "modality": "CT"}, "1.1"),
        ({"patient_id": "A*", "study_date": "20260102-", "modality": "MR", "aet": "MR1", "sop": "1.2.*"}, "1.2"),
        ({"modality": "CT", "aet": "MR1"}, ""),
        ({"patient_name": "*", "modality": "CT", "study_date": "-20260101"}, "1.1"),
    ],
)
def test_filters_are_combined_at_every_level(filled: Filled, filters: dict[str, str], found: str) -> None:
    for study, given in STUDIES.items():
        filled.add(f"{study}.9", study=study, **given)
    wanted = found.split()
    assert filled.find("study", **filters) == wanted
    assert filled.find("series", **filters) == [f"{study}.1" for study in wanted]
    assert filled.find("instance", **filters) == [f"{study}.9" for study in wanted]


def test_filters_of_lower_levels_must_match_the_same_series_and_instance(filled: Filled) -> None:
    filled.add("1.1.1.9", study="1.1", series="1.1.1", modality="CT", calling="A")
    filled.add("1.1.2.9", study="1.1", series="1.1.2", modality="MR", calling="B")
    assert filled.find(modality="CT", aet="A") == ["1.1"]
    assert filled.find(modality="CT", aet="B") == []
    assert filled.find(modality="CT", series="1.1.2") == []
    assert filled.find("series", modality="MR") == ["1.1.2"]
    assert filled.find("series", aet="A") == ["1.1.1"]
    assert filled.find("instance", study="1.1", modality="MR") == ["1.1.2.9"]


def test_rows_come_in_the_order_of_dates_and_numbers(filled: Filled) -> None:
    for number, date, time in (("10", "20260102", "0900"), ("9", "20260102", "0800"), ("1", "20260101", "2300")):
        for image in ("10", "2"):
            filled.add(f"1.{number}.{image}", study=f"1.{number}", study_date=date, study_time=time, number=image)
    assert filled.find() == ["1.1", "1.9", "1.10"]
    assert filled.find("instance") == [f"1.{n}.{i}" for n in (1, 9, 10) for i in (2, 10)]
    for number in ("10", "9"):
        filled.add(f"1.1.{number}.9", study="1.1", series=f"1.1.{number}", series_number=number)
    assert filled.find("series", study="1.1") == ["1.1.1", "1.1.9", "1.1.10"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("20260131", ("20260131", "20260131")),
        ("20260101-20260131", ("20260101", "20260131")),
        ("20260101-", ("20260101", "99999999")),
        ("-20260131", ("00000000", "20260131")),
        *((t, None) for t in (
            "", "-", "2026", "2026-01-31", "202601310", "2026013x", "20260131--", "20260101-20260131-", "*", "²0260131",
            "20260101 - 20260131", "٢٠٢٦٠١٣١",
        )),
    ],
)  # fmt: skip
def test_a_range_of_dates_is_understood_or_an_error(filled: Filled, text: str, wanted: tuple[str, str] | None) -> None:
    if wanted:
        assert date_range(text) == wanted
        return
    with pytest.raises(FilterError):
        date_range(text)
    with pytest.raises(FilterError):
        filled.find(study_date=text)


def test_a_study_row_tells_and_counts_what_it_holds(filled: Filled) -> None:
    given = {"name": "Doe^Jane==じぇいん", "patient_id": "P1", "study_date": "20260131", "accession": "A"}
    filled.add("1.1.1.1", study="1.1", series="1.1.1", modality="CT", description="Chest", **given)
    filled.add("1.1.1.2", study="1.1", series="1.1.1", modality="CT", name="Another^Name")
    filled.add("1.1.2.1", study="1.1", series="1.1.2", modality="SR", pack="other")
    filled.add("1.1.1.1", study="1.1", series="1.1.1", pack="other", state="again")
    filled.admit("pack-1.1", 1)
    (row,) = filled.index.search("study", Filters())
    assert row == {
        "study": "1.1", "patient_name": "Doe^Jane==じぇいん", "patient_id": "P1", "patient_birth_date": "",
        "patient_sex": "", "study_date": "20260131", "study_time": "", "accession": "A", "study_id": "",
        "study_description": "Chest", "modalities": row["modalities"], "series_count": 2, "instance_count": 3,
        "waiting_count": 1,
    }  # fmt: skip
    assert sorted(row["modalities"].split(",")) == ["CT", "SR"]
    assert [(r["series"], r["instance_count"]) for r in filled.index.search("series", Filters())] == [
        ("1.1.1", 2),
        ("1.1.2", 1),
    ]
    assert {r["sop"]: r["admitted"] for r in filled.index.search("instance", Filters())} == {
        "1.1.1.1": 1,
        "1.1.1.2": 1,
        "1.1.2.1": 0,
    }


def test_everything_is_counted_by_what_became_of_it(filled: Filled) -> None:
    assert set(filled.index.counts().values()) == {0}
    filled.add("1.1.9", study="1.1", undecoded=True)
    filled.add("1.1.8", study="1.1", series="1.1.2")
    filled.add("1.2.9", study="1.2", at="2026-01-31T12:00:00Z")
    filled.add("1.1.9", study="1.1", pack="other", state="again", calling="MR1")
    filled.add("1.1.9", study="1.1", pack="other", state="encoding")
    filled.add("1.1.9", study="1.1", pack="other", state="quarantined")
    filled.admit("pack-1.1", 7)
    assert filled.index.note_unreadable("other", PAGE, "why", "2026-01-31")
    assert filled.index.counts() == {
        "studies": 2, "series": 3, "instances": 3, "packs": 1, "encodings": 1, "quarantined": 1, "unreadable": 1,
        "undecoded": 1,
    }  # fmt: skip
    assert filled.index.last_stores() == {"CT1": "2026-01-31T12:00:00Z", "MR1": "2026-01-31T10:00:00Z"}
    assert filled.index.archived_packs() == {"pack-1.1"}
    assert set(filled.index.waiting_packs()) == {"pack-1.2", "other"}


def test_a_uid_has_one_held_instance_whatever_is_added(filled: Filled) -> None:
    filled.add("1.1.9", study="1.1")
    filled.add("1.1.9", study="1.2")
    filled.add("1.1.9", study="1.1", pack="other", state="quarantined")
    assert filled.find("instance") == ["1.1.9"]
    place = filled.index.held("1.1.9")
    assert place == Place("pack-1.1", Frame(PAGE, (1).to_bytes(16, "big"), 72, 72), SYNTAX)
    assert filled.index.held("1.1.8") is None
    assert filled.index.counts()["instances"] == 1


def test_what_is_not_held_is_not_listed(filled: Filled) -> None:
    filled.add("1.1.9", study="1.1", state="quarantined")
    assert filled.find() == filled.find("series") == filled.find("instance") == []
    assert filled.index.counts()["studies"] == 0


def test_a_record_read_again_changes_nothing(filled: Filled) -> None:
    record = filled.record("1.1.9", "1.1", name="Doe^Jane")
    for scanned in (2 * PAGE, 3 * PAGE):
        filled.index.add("pack", "1.1", [Row(record, "held")], scanned)
        assert filled.index.scanned("pack") == scanned
    assert filled.index.scanned("another") == 0
    assert filled.index.counts()["instances"] == 1


def test_an_instance_is_found_again_by_its_pack_and_object_id(filled: Filled) -> None:
    filled.add("1.1.9", study="1.1", calling="MR1")
    (row,) = filled.index.search("instance", Filters())
    place = filled.index.at(row["pack"], bytes.fromhex(row["object_id"]))
    assert place is not None
    assert place == filled.index.held("1.1.9")
    assert filled.index.at(row["pack"], bytes(16)) is None


def test_a_dropped_pack_takes_empty_series_and_studies_with_it(filled: Filled) -> None:
    filled.add("1.1.1.9", study="1.1", series="1.1.1", pack="first")
    filled.add("1.1.2.9", study="1.1", series="1.1.2", pack="second")
    filled.add("1.2.1.9", study="1.2", pack="third")
    filled.index.drop("first")
    assert (filled.find("series"), filled.find("instance")) == (["1.1.2", "1.2.1"], ["1.1.2.9", "1.2.1.9"])
    filled.index.drop("second")
    assert filled.find() == ["1.2"]
    filled.index.drop("unknown")
    assert filled.find() == ["1.2"]
    assert filled.index.waiting_packs() == ["third"]
    # Nothing of the study is left behind that would describe it when it comes again.
    filled.add("1.1.1.9", study="1.1", name="New^Name")
    assert [row["patient_name"] for row in filled.index.search("study", Filters(study="1.1"))] == ["New^Name"]


def test_an_unreadable_place_is_news_once_and_holds_no_instance(filled: Filled) -> None:
    filled.add("1.1.9", study="1.1", pack="pack")
    assert filled.index.note_unreadable("pack", PAGE, "why", "now")
    assert not filled.index.note_unreadable("pack", PAGE, "again", "later")
    assert filled.find("instance") == []
    assert filled.index.counts()["unreadable"] == 1


def test_records_are_added_all_or_none(filled: Filled) -> None:
    good, bad = filled.record("1.1.8", "1.1"), filled.record("1.1.9", "1.1")
    broken = msgspec.structs.replace(bad, frame=Frame(2**70, bytes(16), 72, 72))
    with pytest.raises(OverflowError):
        filled.index.add("pack", "1.1", [Row(good, "held"), Row(broken, "held")], 9 * PAGE)
    assert filled.index.scanned("pack") == 0
    assert filled.index.counts()["instances"] == 0
    filled.index.add("pack", "1.1", [Row(good, "held"), Row(bad, "held")], 9 * PAGE)
    assert filled.index.counts()["instances"] == 2


def test_an_index_opens_with_its_own_key_alone(filled: Filled) -> None:
    filled.add("1.1.9", study="1.1")
    for key in ((bytes(32), KEY[1]), (KEY[0], bytes(16))):
        with pytest.raises(DatabaseError):
            Index(filled.path, key)
    with pytest.raises(DatabaseError):
        connect(filled.path)
    again = Index(filled.path, KEY, migrate=True)
    assert [row["study"] for row in again.search("study", Filters())] == ["1.1"]
    again.close()


def test_an_index_is_made_only_where_that_is_asked_for(tmp_path: Path) -> None:
    opened = Index(tmp_path / "new.db", KEY)
    with pytest.raises(DatabaseError, match="no such table"):
        opened.counts()
    opened.close()


def test_no_file_of_an_index_holds_a_name_or_uid_in_clear(filled: Filled) -> None:
    words = ["Müllerin^Ännchen", "1.2.840.99999.77777", "PATIENT-4711", "müllerin"]
    for number in range(50):
        study = f"{words[1]}.{number}"
        filled.add(f"{study}.9", study=study, name=words[0], patient_id=words[2])
    assert len(filled.find(patient_name=words[3])) == 50
    files = {path.name: path.read_bytes() for path in filled.path.parent.iterdir()}
    assert {"index.db", "index.db-wal"} <= set(files)
    assert len(files["index.db-wal"]) > 20_000
    filled.index.close()
    files |= {"closed": filled.path.read_bytes()}
    assert len(files["closed"]) > 20_000
    for name, content in files.items():
        for word in (*words, "patient_name", "CREATE TABLE", "SQLite format 3"):
            assert word.encode() not in content, name


@pytest.mark.parametrize(
    ("text", "folded"),
    [("Doe^Jane^^", "doe^jane"), ("DOE ", "doe"), ("ＤＯＥ", "doe"), ("ẞ", "ss"), ("İ", "i̇"), ("", ""), ("^ ^", "")],
)
def test_text_is_folded_for_comparison(text: str, folded: str) -> None:
    assert fold(text) == folded


# --- packs that get another name


def described(index: Index, table: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in index._db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()]


def test_a_pack_that_moves_takes_states_reasons_and_unreadable_places_along(filled: Filled) -> None:
    filled.add("1.1.1", study="1.1", pack="old")
    filled.add("1.1.2", study="1.1", pack="old", state="replaced")
    filled.add("1.1.3", study="1.1", pack="other")
    filled.admit("old", 7)
    filled.index.set_state("old", 2 * PAGE, "quarantined", "a reason")
    filled.index.note_unreadable("old", 9 * PAGE, "it does not open", "2026-01-31T10:00:00Z")
    before = [row[2:] for row in described(filled.index, "instance")]
    studies = described(filled.index, "study"), described(filled.index, "series")
    filled.index.move("old", "new", 5 * PAGE)
    assert [row[2:] for row in described(filled.index, "instance")] == before
    assert sorted(row[1] for row in described(filled.index, "instance")) == ["new", "new", "other"]
    assert [row[:2] for row in described(filled.index, "unreadable")] == [("new", 9 * PAGE)]
    assert ("new", "objects", "1.1", 7, 5 * PAGE, 5 * PAGE) in described(filled.index, "pack")
    assert filled.index.archived_packs() == {"new"}
    assert (described(filled.index, "study"), described(filled.index, "series")) == studies
    # Once more, and for a pack that nobody knows: nothing happens.
    for name in ("old", "unknown"):
        filled.index.move(name, "another", PAGE)
    assert sorted(row[1] for row in described(filled.index, "instance")) == ["new", "new", "other"]


def test_an_object_is_found_under_every_name_that_its_pack_had(filled: Filled) -> None:
    filled.add("1.1.1", study="1.1", pack="one")
    filled.admit("one", 1)
    object_id = (1).to_bytes(16, "big")
    for old, new in (("one", "two"), ("two", "three")):
        filled.index.move(old, new, PAGE)
    found = [filled.index.at(name, object_id) for name in ("one", "two", "three")]
    assert {place.pack_id for place in found if place is not None} == {"three"}
    assert None not in found
    assert filled.index.at("one", bytes(16)) is None
    assert filled.index.at("another", object_id) is None
    # Filling anew leaves the names; what is gone is not found by an old one.
    filled.index.begin_anew()
    assert filled.index.at("one", object_id) is None


def test_what_somebody_filed_under_the_new_name_in_between_counts_less(filled: Filled) -> None:
    filled.add("1.1.1", study="1.1", pack="old", state="replaced")
    filled.admit("old", 1)
    filled.add("1.1.1", study="1.1", pack="new", state="held")
    filled.admit("new", 1)
    filled.index.move("old", "new", PAGE)
    assert [(row[1], row[6]) for row in described(filled.index, "instance")] == [("new", "replaced")]
