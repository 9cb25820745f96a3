"""Storage commitment: what is decided of an instance, as a table; and parts of requests, in any order and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.index import Version
from storage.ledger import Ledger
from storescp.vault.commitmentrecords import COLLECTING, DECIDED, WAITING, Requested, keep, records_of
from storescp.vault.commitments import CLASS_CONFLICT, NO_SUCH_OBJECT, PROCESSING_FAILURE, decide

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
HELD = Version("held", CT, "A", True, "p")
AGAIN, ENCODING = HELD._replace(state="again"), HELD._replace(state="encoding")
WAITS = Version("held", CT, "A", False, "p")


@pytest.mark.parametrize(
    ("standing", "reason"),
    [
        ([], NO_SUCH_OBJECT),
        ([Version("held", CT, "B", True, "p")], NO_SUCH_OBJECT),
        ([Version("quarantined", CT, "B", True, "p")], NO_SUCH_OBJECT),
        ([HELD], 0),
        ([AGAIN], 0),
        ([ENCODING], 0),
        ([Version("held", CT, "B", True, "p"), AGAIN], 0),
        ([Version("held", CT, "B", True, "p"), ENCODING], 0),
        ([HELD, Version("quarantined", CT, "B", True, "p")], 0),
        ([WAITS], None),
        ([Version("pending", CT, "A", False, "p")], None),
        ([HELD, Version("again", CT, "A", False, "p")], None),
        ([HELD, Version("held", CT, "B", False, "p")], 0),
        ([Version("quarantined", CT, "A", True, "p")], PROCESSING_FAILURE),
        ([HELD, Version("quarantined", CT, "A", True, "p")], PROCESSING_FAILURE),
        ([Version("quarantined", CT, "A", True, "p"), WAITS], PROCESSING_FAILURE),
        ([Version("dropped", CT, "A", True, "p")], PROCESSING_FAILURE),
        ([Version("held", MR, "A", True, "p")], CLASS_CONFLICT),
        ([Version("held", MR, "B", True, "p"), AGAIN], 0),
        ([Version("held", MR, "A", True, "p"), Version("quarantined", MR, "A", True, "p")], PROCESSING_FAILURE),
    ],
)
def test_an_instance_is_committed_to_who_sent_it_as_what_is_held(standing: list[Version], reason: int | None) -> None:
    assert decide(standing, CT, "A") == reason
    assert decide(standing[::-1], CT, "A") == reason


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db", (bytes(32), bytes(16)), migrate=True)


def part(number: int, parts: int, *sops: str, calling: str = "A", transaction: str = "1.2.3") -> Requested:
    return Requested(calling, transaction, number, parts, [f"{CT} {sop}" for sop in sops])


def states(ledger: Ledger) -> dict[str, list[str]]:
    known = records_of(ledger)
    return {state: [one.id for one in known.all(state)] for state in (COLLECTING, WAITING, DECIDED)}


def test_parts_in_any_order_and_again_are_one_request(ledger: Ledger) -> None:
    parts = [part(0, 3, "1.1"), part(1, 3, "1.2"), part(2, 3, "1.3")]
    keep(ledger, parts[2:], 1.0)
    assert states(ledger) == {COLLECTING: ["A/1.2.3"], WAITING: [], DECIDED: []}
    keep(ledger, parts[:1], 2.0)
    keep(ledger, parts[:1], 2.0)
    keep(ledger, parts[1:2], 3.0)
    for again in ([], parts[1:2], parts[2:], parts):
        # A vault that died before it said that it has them takes them again: all, or the last of them.
        keep(ledger, again, 4.0)
        assert states(ledger) == {COLLECTING: [], WAITING: ["A/1.2.3"], DECIDED: []}
    [kept] = records_of(ledger).all()
    assert kept.pairs() == [(CT, "1.1"), (CT, "1.2"), (CT, "1.3")]


def test_what_is_decided_stays_so_when_its_parts_come_again(ledger: Ledger) -> None:
    parts = [part(0, 2, "1.1"), part(1, 2, "1.2")]
    keep(ledger, parts, 1.0)
    known = records_of(ledger)
    [kept] = known.all()
    kept.attempts = 3
    known.put(kept.id, kept, DECIDED)
    keep(ledger, parts[1:], 2.0)
    assert [one.attempts for one in known.all(DECIDED)] == [3]


def test_the_same_transaction_with_other_instances_is_decided_anew(ledger: Ledger) -> None:
    keep(ledger, [part(0, 2, "1.1"), part(1, 2, "1.2")], 1.0)
    known = records_of(ledger)
    [kept] = known.all()
    kept.attempts = 3
    known.put(kept.id, kept, DECIDED)
    keep(ledger, [part(0, 2, "1.1"), part(1, 2, "1.9")], 2.0)
    [kept] = known.all(WAITING)
    assert (kept.attempts, kept.asked, [sop for _, sop in kept.pairs()]) == (0, 2.0, ["1.1", "1.9"])
    keep(ledger, [part(0, 1, "1.5")], 3.0)
    [kept] = known.all(WAITING)
    assert kept.pairs() == [(CT, "1.5")]


def test_transactions_and_peers_are_kept_apart(ledger: Ledger) -> None:
    keep(ledger, [part(0, 1, "1.1"), part(0, 1, "1.1", calling="B"), part(0, 1, "1.1", transaction="1.2.4")], 1.0)
    assert states(ledger)[WAITING] == ["A/1.2.3", "B/1.2.3", "A/1.2.4"]


@pytest.mark.parametrize("text", ["", "1.2", "1.2 ", " 1.2", f"{CT} x", f"{CT} 1.2 3", f"{CT}  1.2", "é 1.2"])
def test_what_no_gate_writes_is_left_out(ledger: Ledger, text: str) -> None:
    keep(ledger, [Requested("A", "1.2.3", 0, 1, [f"{CT} 1.2", text])], 1.0)
    assert states(ledger) == {COLLECTING: [], WAITING: [], DECIDED: []}


def test_there_is_room_for_so_many_requests_and_one_peer_takes_a_fifth_of_it(ledger: Ledger) -> None:
    many = [part(0, 1, "1.1", transaction=f"1.2.{number}") for number in range(5)]
    assert keep(ledger, many, 1.0, most=15) == many[3:]
    assert states(ledger)[WAITING] == ["A/1.2.0", "A/1.2.1", "A/1.2.2"]
    # What is there already is no more.
    assert keep(ledger, [part(0, 1, "1.9", transaction="1.2.0")], 2.0, most=15) == []
    # A name that another begins with is another peer.
    others = [part(0, 1, "1.1", calling=title) for title in ("A1", "AB", "B", "C")]
    assert keep(ledger, others, 3.0, most=15) == []
    assert keep(ledger, [part(0, 1, "1.1", calling="D")], 4.0, most=7) == [part(0, 1, "1.1", calling="D")]
