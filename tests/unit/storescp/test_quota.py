"""What a peer may take: tables of what it used, when, and until when it then waits."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from storescp import peers
from storescp.gate import channel
from storescp.gate.channel import Message
from storescp.gate.quota import Allowances, Claim, Hold, Quotas, Use
from storescp.peers import Peer, PeerFile

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
NEXT = datetime(2026, 3, 2, tzinfo=UTC).timestamp()
NOON = MIDNIGHT + 12 * 3600


def peer(title: str = "CT1", **limits: int) -> Peer:
    return peers.parse(peers.render(PeerFile(ae_title=title, plaintext=True, **limits)), Path("CT1.toml"))  # type: ignore[arg-type]


# --- associations at a time


def test_a_peer_has_as_many_associations_as_it_may_and_no_more_until_one_ends() -> None:
    quotas = Quotas()
    assert [quotas.claim(n, Claim("CT1", 2)) for n in (1, 2, 3, 4)] == [True, True, False, False]
    assert quotas.claim(5, Claim("CT2", 1))
    quotas.ended(3)
    quotas.ended(99)
    assert not quotas.claim(6, Claim("CT1", 2))
    quotas.ended(1)
    assert quotas.claim(6, Claim("CT1", 2))
    assert not quotas.claim(7, Claim("CT1", 2))


def test_a_limit_that_changes_counts_from_the_next_association_on() -> None:
    quotas = Quotas()
    assert quotas.claim(1, Claim("CT1", 1))
    assert quotas.claim(2, Claim("CT1", 2))
    assert not quotas.claim(3, Claim("CT1", 1))


# --- objects a minute


@pytest.mark.parametrize(
    ("per_minute", "uses", "waits"),
    [
        # When, how many, and how many seconds the peer then waits.
        (0, [(0, 1000)], [0]),
        (60, [(0, 60)], [0]),
        (60, [(0, 61)], [1]),
        (60, [(0, 60), (0, 1), (0, 1)], [0, 1, 2]),
        (60, [(0, 60), (1, 1), (1, 1)], [0, 0, 1]),
        (60, [(0, 60), (30, 30), (30, 1)], [0, 0, 1]),
        # What is not used in one minute is not saved for the next.
        (60, [(0, 1), (3600, 61)], [0, 1]),
        # A clock that is set back gives nothing, and takes nothing.
        (60, [(100, 60), (0, 1), (1, 1)], [0, 1, 1]),
        # A debt is a minute's at most.
        (60, [(0, 5000)], [60]),
        (60, [(0, 5000), (60, 1)], [60, 1]),
        (1, [(0, 1), (0, 1)], [0, 60]),
        (1, [(0, 1), (60, 1)], [0, 0]),
        (600, [(0, 660)], [6]),
    ],
)
def test_a_peer_that_is_too_fast_waits_until_its_rate_is_kept(
    per_minute: int, uses: list[tuple[int, int]], waits: list[int]
) -> None:
    quotas = Quotas()
    found = []
    for at, objects in uses:
        hold = quotas.add(Use("CT1", objects, 1, per_minute, 0), NOON + at)
        assert hold is None or hold.refuse == 0.0
        found.append(0.0 if hold is None else hold.pause - NOON - at)
    assert found == pytest.approx(waits)


def test_a_new_rate_counts_from_new_on() -> None:
    quotas = Quotas()
    assert quotas.add(Use("CT1", 90, 1, 60, 0), NOON) is not None
    assert quotas.add(Use("CT1", 100, 1, 120, 0), NOON) is None
    assert quotas.add(Use("CT1", 21, 1, 120, 0), NOON) is not None


def test_peers_wait_each_for_their_own() -> None:
    quotas = Quotas()
    assert quotas.add(Use("CT1", 61, 1, 60, 0), NOON) is not None
    assert quotas.add(Use("CT2", 60, 1, 60, 0), NOON) is None


# --- bytes a day


@pytest.mark.parametrize(
    ("per_day", "uses", "until"),
    [
        # When and how many bytes; until when nothing more may be stored.
        (0, [(NOON, 1 << 50)], [0]),
        (1000, [(NOON, 999), (NOON, 1), (NOON, 1)], [0, NEXT, NEXT]),
        (1000, [(NOON, 1001)], [NEXT]),
        (1000, [(MIDNIGHT, 1000)], [NEXT]),
        (1000, [(MIDNIGHT - 1, 999), (MIDNIGHT, 999), (NEXT - 1, 1)], [0, 0, NEXT]),
        (1000, [(MIDNIGHT - 1, 5000), (MIDNIGHT, 1)], [MIDNIGHT, 0]),
    ],
)
def test_a_day_is_used_up_at_its_limit_and_begins_anew_at_midnight_utc(
    per_day: int, uses: list[tuple[float, int]], until: list[float]
) -> None:
    quotas = Quotas()
    found = []
    for at, size in uses:
        hold = quotas.add(Use("CT1", 1, size, 0, per_day), at)
        assert hold is None or hold.pause == 0.0
        found.append(0 if hold is None else hold.refuse)
    assert found == until


def test_both_limits_count_at_once() -> None:
    hold = Quotas().add(Use("CT1", 61, 1000, 60, 1000), NOON)
    assert hold == Hold("CT1", NOON + 1, NEXT, 1000)


# --- the worker's end


class Told(list[Message]):
    """What was told to the first process, and that something was."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def __call__(self, message: Message) -> None:
        self.append(message)
        self.came.set()


def far(**changes: float) -> Hold:
    """Return a hold as of now; ``pause`` and ``refuse`` count from now."""
    hold = {"pause": 0.0, "refuse": 0.0} | changes
    return Hold("CT1", time.time() + hold["pause"], time.time() + hold["refuse"], int(changes.get("used", 0)))


def test_a_peer_without_limits_asks_and_tells_nothing() -> None:
    told = Told()
    allowances = Allowances(told)
    assert allowances.granted(1, peer(), 0)
    allowances.took(peer(), 1000)
    allowances.hold(far(pause=3600, refuse=3600, used=1 << 40))
    allowances.pause(peer())
    assert not allowances.is_used_up(peer())
    assert told == []


@pytest.mark.parametrize("answer", [True, False])
def test_an_association_is_granted_by_the_answer_to_its_own_claim(answer: bool) -> None:
    told = Told()
    allowances = Allowances(told)
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(allowances.granted(7, peer(maximum_associations=3), 60)))
    asking.start()
    assert told.came.wait(60)
    allowances.answer(8, not answer)
    allowances.answer(7, answer)
    asking.join(60)
    assert found == [answer]
    [message] = told
    assert (message.kind, message.number, channel.content(message, Claim)) == ("claim", 7, Claim("CT1", 3))


def test_no_answer_in_time_is_none_and_one_that_comes_late_does_no_harm() -> None:
    allowances = Allowances(Told())
    assert not allowances.granted(7, peer(maximum_associations=1), 0.01)
    allowances.answer(7, True)
    assert not allowances.granted(7, peer(maximum_associations=1), 0.01)


def test_what_a_peer_with_a_limit_stored_is_told() -> None:
    told = Told()
    limited = peer(objects_per_minute=60, bytes_per_day=1 << 40)
    Allowances(told).took(limited, 1 << 33)
    assert [channel.content(message, Use) for message in told] == [Use("CT1", 1, 1 << 33, 60, 1 << 40)]
    assert told[0].kind == "used"


@pytest.mark.parametrize(
    ("limit", "changes", "used_up"),
    [
        (1000, {"refuse": 3600, "used": 1000}, True),
        (1000, {"refuse": 3600, "used": 5000}, True),
        (1000, {"refuse": -1, "used": 5000}, False),
        # Raised since: what was used is below it now. And lowered.
        (6000, {"refuse": 3600, "used": 5000}, False),
        (500, {"refuse": 3600, "used": 1000}, True),
        (0, {"refuse": 3600, "used": 5000}, False),
    ],
)
def test_a_day_is_used_up_by_the_limit_of_now(limit: int, changes: dict[str, float], used_up: bool) -> None:
    allowances = Allowances(Told())
    assert not allowances.is_used_up(peer(bytes_per_day=limit))
    allowances.hold(far(**changes))
    assert allowances.is_used_up(peer(bytes_per_day=limit)) == used_up
    assert not allowances.is_used_up(peer("CT2", bytes_per_day=limit))


def test_a_peer_that_waits_goes_on_when_the_server_stops() -> None:
    allowances = Allowances(Told())
    allowances.hold(far(pause=3600))
    waiting = threading.Thread(target=allowances.pause, args=(peer(objects_per_minute=1),))
    waiting.start()
    assert waiting.is_alive()
    allowances.stop()
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_travels_between_the_processes_fits_a_message() -> None:
    for value in (Claim('"' * 16, 10_000), Use('"' * 16, 1, 1 << 50, 1_000_000, 1 << 50), Hold('"' * 16, 2e9, 2e9, 1)):
        message = channel.with_content("used", 1 << 60, value)
        assert len(msgspec.json.encode(message)) < 512
        assert channel.content(message, type(value)) == value
