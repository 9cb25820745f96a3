"""Records of the ledger: kept by kind and id, found by state, in the order in which they came, some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from storage.ledger import Ledger
from storage.records import Records

KEY = bytes(range(32)), bytes(range(16))


class Note(msgspec.Struct):
    text: str
    added: str = ""


class Other(msgspec.Struct):
    count: int


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.db", KEY, migrate=True)
    yield made
    made.close()


@pytest.fixture
def notes(ledger: Ledger) -> Records[Note]:
    return ledger.records("note", Note)


def texts(notes: Records[Note], state: str | None = None) -> list[str]:
    return [note.text for note in notes.all(state)]


def test_what_is_put_is_found_by_its_id_and_nothing_else_is(notes: Records[Note]) -> None:
    notes.put("1", Note("one"))
    assert notes.get("1") == Note("one")
    for other in ("", "2", "1 ", "%"):
        assert notes.get(other) is None


def test_a_record_takes_the_place_of_an_earlier_one_and_keeps_its_place_in_the_order(notes: Records[Note]) -> None:
    for number in range(3):
        notes.put(str(number), Note(f"first {number}"), "open")
    notes.put("1", Note("second"), "done")
    assert texts(notes) == ["first 0", "second", "first 2"]
    assert (texts(notes, "open"), texts(notes, "done"), texts(notes, "")) == (["first 0", "first 2"], ["second"], [])
    assert (notes.count(), notes.count("open"), notes.count("done"), notes.count("none")) == (3, 2, 1, 0)


def test_kinds_know_nothing_of_each_other(ledger: Ledger, notes: Records[Note]) -> None:
    others = ledger.records("other", Other)
    notes.put("1", Note("one"), "open")
    others.put("1", Other(1), "open")
    assert (notes.get("1"), others.get("1")) == (Note("one"), Other(1))
    others.remove("1")
    assert (texts(notes), others.count()) == (["one"], 0)


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1203])
def test_all_yields_each_once_however_many_there_are(notes: Records[Note], count: int) -> None:
    notes.put_all((str(n), Note(str(n)), "even" if n % 2 == 0 else "odd") for n in range(count))
    assert texts(notes) == [str(n) for n in range(count)]
    assert texts(notes, "odd") == [str(n) for n in range(1, count, 2)]
    assert notes.count() == count


def test_pages_add_up_also_while_records_are_changed_and_removed_on_the_way(notes: Records[Note]) -> None:
    notes.put_all((str(n), Note(str(n)), "open") for n in range(10))
    found = []
    after = 0
    while page := notes.page("open", after=after, limit=3):
        assert len(page) <= 3
        after = page[-1][0]
        for _, note in page:
            found.append(note.text)
            if int(note.text) % 2:
                notes.remove(note.text)
            else:
                notes.put(note.text, note, "done")
    assert found == [str(n) for n in range(10)]
    assert (notes.count("open"), notes.count("done")) == (0, 5)


def test_a_record_that_comes_while_all_are_read_is_the_last(notes: Records[Note]) -> None:
    notes.put("1", Note("1"))
    going = notes.all()
    assert next(going).text == "1"
    notes.put("2", Note("2"))
    assert [note.text for note in going] == ["2"]


def test_of_several_all_are_kept_or_none(notes: Records[Note]) -> None:
    def broken() -> Iterator[tuple[str, Note, str]]:
        yield "1", Note("new"), ""
        yield "2", Note("two"), ""
        raise OSError("broken")

    notes.put("1", Note("one"))
    with pytest.raises(OSError, match="broken"):
        notes.put_all(broken())
    assert texts(notes) == ["one"]


def test_what_is_not_there_is_removed_without_an_error(notes: Records[Note]) -> None:
    notes.put("1", Note("one"))
    notes.remove("2", "1", "3")
    notes.remove()
    assert notes.count() == 0


def test_a_record_of_an_older_release_gets_defaults_and_one_of_another_shape_is_refused(
    ledger: Ledger, notes: Records[Note]
) -> None:
    class Old(msgspec.Struct):
        text: str

    ledger.records("note", Old).put("1", Old("one"))
    assert notes.get("1") == Note("one", "")
    with pytest.raises(msgspec.ValidationError):
        ledger.records("note", Other).get("1")


def test_text_is_kept_as_it_is_and_no_value_is_read_as_sql(notes: Records[Note]) -> None:
    text = "Müller'); DROP TABLE record; --\n山田\0"
    notes.put(text, Note(text), text)
    assert notes.get(text) == Note(text)
    assert texts(notes, text) == [text]


def test_records_are_there_when_the_ledger_is_opened_again_or_copied(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db", KEY, migrate=True)
    ledger.records("note", Note).put("1", Note("one"), "open")
    other = bytes(32), bytes(16)
    ledger.copy(tmp_path / "copy.db", other)
    ledger.close()
    for path, key in ((tmp_path / "ledger.db", KEY), (tmp_path / "copy.db", other)):
        again = Ledger(path, key)
        assert texts(again.records("note", Note), "open") == ["one"]
        again.close()
