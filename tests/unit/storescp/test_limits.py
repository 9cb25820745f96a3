"""A peer's bucket: what fits it is given, it fills up evenly, and no peer takes of another's."""

from __future__ import annotations

import random
import threading

import pytest

from storage.query import Scope
from storescp.vault import limits
from storescp.vault.grants import both
from storescp.vault.limits import Limit, Seldom


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_full_bucket_gives_all_and_fills_up_evenly() -> None:
    clock = Clock()
    limit = Limit(60, 60.0, clock)
    assert all(limit.take("A") for _ in range(60))
    assert not limit.take("A")
    clock.now = 0.5
    assert not limit.take("A")
    clock.now = 1.0
    assert limit.take("A")
    assert not limit.take("A")
    clock.now = 1000.0
    assert limit.take("A", 60)
    assert not limit.take("A")


def test_all_or_none_is_taken_and_a_refusal_costs_nothing() -> None:
    limit = Limit(10, 3600.0, Clock())
    assert not limit.take("A", 11)
    assert limit.take("A", 10)
    assert not limit.take("A", 1)
    assert limit.take("A", 0)


def test_peers_have_buckets_of_their_own() -> None:
    limit = Limit(1, 60.0, Clock())
    assert limit.take("A")
    assert limit.take("B")
    assert not limit.take("A")


def test_zero_is_no_limit() -> None:
    limit = Limit(0, 60.0, Clock())
    assert all(limit.take("A", 1 << 40) for _ in range(100))


def test_whatever_is_asked_when_no_more_is_given_than_the_rate_allows() -> None:
    chance = random.Random(9)
    for _ in range(20):
        clock, most, seconds = Clock(), chance.randrange(1, 50), chance.choice([1.0, 60.0, 3600.0])
        limit = Limit(most, seconds, clock)
        given: list[tuple[float, int]] = []
        for _ in range(300):
            clock.now += chance.random() * seconds / most
            count = chance.randrange(1, most + 3)
            if limit.take("A", count):
                given.append((clock.now, count))
        for first, (since, _) in enumerate(given):
            total = 0
            for when, count in given[first:]:
                total += count
                assert total <= most + (when - since) * most / seconds + 1e-6


def test_many_names_are_forgotten_but_not_who_has_used_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_PEERS_LIMIT", 10)
    clock = Clock()
    limit = Limit(2, 60.0, clock)
    assert limit.take("USED", 2)
    clock.now = 1.0
    for number in range(100):
        assert limit.take(f"P{number}", 0)
    assert not limit.take("USED")
    assert len(limit._left) < 20


def test_threads_get_no_more_than_one_would() -> None:
    limit = Limit(1000, 3600.0, Clock())
    given = [0] * 8

    def ask(place: int) -> None:
        given[place] = sum(limit.take("A") for _ in range(500))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(given) == 1000


def test_what_comes_again_and_again_is_told_once_in_a_time_and_counted() -> None:
    clock = Clock()
    seldom = Seldom(60.0, clock)
    assert [seldom.came(("A",)) for _ in range(5)] == [1, 0, 0, 0, 0]
    assert seldom.came(("B",)) == 1
    clock.now = 59.0
    assert seldom.overdue() == []
    clock.now = 60.0
    assert seldom.overdue() == [(("A",), 4)]
    assert seldom.overdue() == []
    assert [seldom.came(("A",)) for _ in range(2)] == [0, 0]
    clock.now = 120.0
    assert seldom.came(("A",)) == 3
    clock.now = 1000.0
    assert seldom.overdue() == []
    assert seldom._told == {}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Scope(), Scope(), Scope()),
        (Scope(["A"], ["CT"]), Scope(), Scope(["A"], ["CT"])),
        (Scope(["A", "B"]), Scope(["B", "C"], ["MR"]), Scope(["B"], ["MR"])),
        # Nothing in common is nothing, and not everything.
        (Scope(["A"]), Scope(["B"]), Scope(["\0"])),
    ],
)
def test_within_two_scopes_is_what_both_have(one: Scope, other: Scope, expected: Scope) -> None:
    assert both(one, other) == both(other, one) == expected
