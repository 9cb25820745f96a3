"""Which instances are given for unique keys: beside a naive second answer, and while packs are moved."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from storage.attributes import Attributes, Element, Received
from storage.index import Index, Row
from storage.pack import PAGE, Frame
from storage.packfile import Record
from storage.query import Scope
from storage.selection import Selection

KEY = (bytes(range(32)), bytes(range(16)))
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
SYNTAXES = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90")


class Kept(NamedTuple):
    """An instance, and where it lies."""

    pack: str
    offset: int
    patient: str
    study: str
    series: str
    sop: str
    sop_class: str
    syntax: str
    modality: str
    calling: str
    state: str


def filled(path: Path) -> tuple[Index, list[Kept]]:
    """Return an index and what it holds: patients of several studies, studies of several packs and senders."""
    chance = random.Random(11)
    index, made = Index(path, KEY, migrate=True), []
    for number in range(1, 241):
        place = number % 12
        sop_class, modality = chance.choice([(CT, "CT"), (MR, "MR")])
        made.append(
            Kept(
                f"pack-{place}-{number % 3}",
                number * PAGE,
                f"P{place % 5}" if place else "",
                f"1.2.{place}",
                f"1.2.{place}.{modality == 'CT':d}",
                f"1.2.{place}.9.{number}",
                sop_class,
                chance.choice(SYNTAXES),
                modality,
                chance.choice(["CT1", "MR1", "A B"]),
                chance.choice(["held", "held", "held", "quarantined", "again", "pending"]),
            )
        )
    with index.filling():
        for one in made:
            values = {
                "00080016": one.sop_class, "00080018": one.sop, "0020000D": one.study, "0020000E": one.series,
                "00080060": one.modality, "00100020": one.patient,
            }  # fmt: skip
            dataset = {tag: Element("LO", [text]) for tag, text in values.items() if text}
            received = Received("2026-01-31T10:00:00Z", "ab12", one.calling, "STRONGROOM", "192.0.2.1", "")
            frame = Frame(one.offset, one.offset.to_bytes(16, "big"), 72, 100 + one.offset // PAGE)
            record = Record(frame, Attributes(1, one.syntax, dataset, {}, received))
            index.add(one.pack, one.study, [Row(record, one.state)], 0)
    return index, made


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Index, list[Kept]]]:
    index, made = filled(tmp_path_factory.mktemp("selection") / "index.db")
    yield index, made
    index.close()


def naive(made: list[Kept], chosen: Selection, scope: Scope) -> set[str]:
    if not any([chosen.patients, chosen.studies, chosen.series, chosen.instances]):
        return set()
    tests = (
        (chosen.patients, "patient"), (chosen.studies, "study"), (chosen.series, "series"), (chosen.instances, "sop"),
        (scope.ae_titles, "calling"), (scope.modalities, "modality"),
    )  # fmt: skip
    return {
        one.sop
        for one in made
        if one.state == "held" and all(getattr(one, name) in wanted for wanted, name in tests if wanted)
    }


def test_what_is_selected_is_what_a_naive_look_finds(kept: tuple[Index, list[Kept]]) -> None:
    index, made = kept
    chance = random.Random(12)

    def some(name: str, most: int) -> list[str]:
        values = [*sorted({str(getattr(one, name)) for one in made}), "1.9.9"]
        return chance.sample(values, chance.randrange(most + 1)) if chance.random() < 0.5 else []

    by_sop = {one.sop: one for one in made}
    found_something = 0
    for _ in range(300):
        chosen = Selection(some("patient", 3), some("study", 4), some("series", 6), some("sop", 40))
        scope = Scope(some("calling", 2), some("modality", 2))
        expected = naive(made, chosen, scope)
        found = list(index.selected(chosen, scope))
        assert {one.sop for one in found} == expected
        assert len(found) == len(expected)
        for one in found:
            known = by_sop[one.sop]
            told = one.pack, one.study, one.series, one.sop_class, one.transfer_syntax, one.calling
            assert told == (known.pack, known.study, known.series, known.sop_class, known.syntax, known.calling)
        places = [(one.study, one.pack) for one in found]
        assert places == sorted(places)
        parts = index.parts(chosen, scope)
        counts = Counter((one.study, one.sop_class, one.transfer_syntax) for one in found)
        assert {(p.study, p.sop_class, p.transfer_syntax): p.instances for p in parts} == counts
        assert sum(part.bytes for part in parts) == sum(one.dataset_length for one in found)
        found_something += bool(found)
    assert found_something > 100


def test_no_key_selects_nothing(kept: tuple[Index, list[Kept]]) -> None:
    index, _ = kept
    assert Selection().is_empty
    assert list(index.selected(Selection(), Scope())) == []
    assert index.parts(Selection(), Scope()) == []


def test_ten_thousand_keys_are_one_question(kept: tuple[Index, list[Kept]]) -> None:
    index, made = kept
    uids = [f"1.3.{number}" for number in range(10_000)]
    chosen = Selection(instances=[*uids, made[0].sop, made[1].sop, made[2].sop])
    assert {one.sop for one in index.selected(chosen, Scope())} == naive(made, chosen, Scope())


@pytest.mark.parametrize("after", [1, 25, 60])
def test_packs_that_are_moved_meanwhile_are_still_given_whole_and_once(tmp_path: Path, after: int) -> None:
    index, made = filled(tmp_path / "index.db")
    chosen = Selection(studies=sorted({one.study for one in made}))
    found = []
    for number, one in enumerate(index.selected(chosen, Scope()), 1):
        found.append(one)
        if number == after:
            for pack in sorted({one.pack for one in made}):
                # Twice: under a new study key, and again.
                index.move(pack, f"new-{pack}", 1 << 20)
                index.move(f"new-{pack}", f"newer-{pack}", 1 << 20)
    assert {one.sop for one in found} == naive(made, chosen, Scope())
    assert len(found) == len({one.sop for one in found})
    for one in found:
        place = index.at(one.pack, bytes.fromhex(one.object_id))
        assert place is not None
        assert place.pack_id.startswith("newer-")
    index.close()
