"""What the ledger keeps of re-encryptions: what is planned, on its way and done, and what packs are called since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.ledger import Decision, Ledger, Moved, Reencryption

A, B, C, D = (letter * 32 for letter in "abcd")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.db", (bytes(32), bytes(16)), migrate=True)
    yield made
    made.close()


def begun(ledger: Ledger, name: str, *packs: str) -> Reencryption:
    made = Reencryption(name, 1000, "a test", "2026-01-31T12:00:00Z", "all", packs=len(packs))
    ledger.begin_reencryption(made, list(packs))
    return made


def decision(pack_id: str, other: str = "") -> Decision:
    return Decision("2026-01-31T12:00:00Z", 0, "accept", pack_id, "01" * 16, other, "02" * 16 if other else "", "x")


def test_what_is_planned_is_done_in_its_order_and_counted(ledger: Ledger) -> None:
    begun(ledger, "one", C, A, B)
    assert ledger.planned("one") == [C, A, B]
    ledger.move("one", [Moved(A, D)])
    assert ledger.unsettled() == [Moved(A, D)]
    assert ledger.planned("one") == [C, A, B]
    ledger.settle([Moved(A, D)], "2026-01-31T12:00:01Z")
    assert (ledger.unsettled(), ledger.planned("one"), ledger.reencrypted("one")) == ([], [C, B], 1)


def test_what_is_undone_is_planned_as_before_and_has_its_old_name(ledger: Ledger) -> None:
    begun(ledger, "one", A)
    ledger.move("one", [Moved(A, B)])
    ledger.settle([Moved(A, B)], "")
    assert (ledger.unsettled(), ledger.planned("one"), ledger.reencrypted("one")) == ([], [A], 0)
    assert ledger.name_of(A) == A
    # It gets another name the next time.
    ledger.move("one", [Moved(A, C)])
    ledger.settle([Moved(A, C)], "2026-01-31T12:00:01Z")
    assert ledger.name_of(A) == C


def test_a_pack_that_goes_along_is_kept_though_it_was_not_planned(ledger: Ledger) -> None:
    begun(ledger, "one", A)
    ledger.move("one", [Moved(A, B), Moved(C, D)])
    ledger.settle([Moved(A, B), Moved(C, D)], "2026-01-31T12:00:01Z")
    assert (ledger.planned("one"), ledger.reencrypted("one"), ledger.name_of(C)) == ([], 2, D)


def test_the_end_keeps_what_was_done_and_forgets_what_was_left(ledger: Ledger) -> None:
    made = begun(ledger, "one", A, B, C)
    ledger.move("one", [Moved(A, D)])
    ledger.settle([Moved(A, D)], "2026-01-31T12:00:01Z")
    ledger.drop_planned("one", B)
    assert ledger.planned("one") == [C]
    made.ended, made.left = "2026-01-31T12:00:02Z", {C: "damaged"}
    ledger.end_reencryption(made)
    assert ledger.reencryptions() == [made]
    assert (ledger.planned("one"), ledger.reencrypted("one")) == ([], 1)
    # The next one may plan the same pack.
    begun(ledger, "two", C, D)
    assert ledger.planned("two") == [C, D]


def test_decisions_name_packs_as_they_are_called_now_however_often_they_moved(ledger: Ledger) -> None:
    for one in (decision(A, B), decision(B), decision(D)):
        ledger.record(one)
    begun(ledger, "one", A)
    ledger.move("one", [Moved(A, C)])
    # On its way it is still the old one.
    assert ledger.decisions() == [decision(A, B), decision(B), decision(D)]
    ledger.settle([Moved(A, C)], "2026-01-31T12:00:01Z")
    begun(ledger, "two", B, C)
    ledger.move("two", [Moved(C, "e" * 32), Moved(B, "f" * 32)])
    ledger.settle([Moved(C, "e" * 32), Moved(B, "f" * 32)], "2026-01-31T12:00:02Z")
    assert ledger.decisions() == [decision("e" * 32, "f" * 32), decision("f" * 32), decision(D)]


def test_a_ledger_of_before_gets_the_tables_and_keeps_what_it_has(tmp_path: Path) -> None:
    path, key = tmp_path / "ledger.db", (bytes(32), bytes(16))
    old = Ledger(path, key, migrate=True)
    old.record(decision(A))
    for table in ("reencryption", "reencrypted"):
        old._db.execute(f"DROP TABLE {table}")
    old._db.execute("DELETE FROM _sqlite_migrations WHERE name = '6-reencryption'")
    old.close()
    ledger = Ledger(path, key, migrate=True)
    assert (ledger.decisions(), ledger.reencryptions()) == ([decision(A)], [])
    ledger.close()
