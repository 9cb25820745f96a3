"""Requests of storage commitment as the ledger keeps them."""

from __future__ import annotations

import msgspec

from storage.attributes import is_uid
from storage.ledger import Ledger
from storage.records import Records

# A broken gate does not fill the ledger; a device that asks and never listens leaves room for the others.
_MOST = 10_000
_SHARE = 5
COLLECTING, WAITING, DECIDED = "collecting", "waiting", "decided"


class Requested(msgspec.Struct):
    """A part of a request, as the gate tells it; ``instances`` are SOP class and instance with a space between."""

    calling: str
    transaction: str
    part: int
    parts: int
    instances: list[str]


class Failure(msgspec.Struct):
    """An instance that is not committed, and the reason."""

    sop_class: str
    sop: str
    reason: int


class Commitment(msgspec.Struct):
    """A request and what is known of it. Times are seconds since 1970."""

    calling: str
    transaction: str
    asked: float
    parts: int
    got: dict[int, list[str]] = msgspec.field(default_factory=dict)
    failed: list[Failure] = msgspec.field(default_factory=list)
    attempts: int = 0
    due: float = 0.0
    decided: float = 0.0

    @property
    def id(self) -> str:
        """How the ledger knows it."""
        return f"{self.calling}/{self.transaction}"

    def pairs(self) -> list[tuple[str, str]]:
        """Return what it refers to, SOP class and instance each."""
        found = (text.partition(" ") for number in sorted(self.got) for text in self.got[number])
        return [(sop_class, sop) for sop_class, _, sop in found]


def keep(ledger: Ledger, requested: list[Requested], now: float, most: int | None = None) -> list[Requested]:
    """Keep parts of requests; return those for which there is no room.

    The same part again changes nothing, and one that no gate would write is left out.

    Args:
        ledger: Where they are kept.
        requested: What a gate took.
        now: Seconds since 1970.
        most: How many requests wait at most, of all peers, 10,000 if not given; of one, a fifth of it.
    """
    known, most = records_of(ledger), _MOST if most is None else most
    left_out = []
    for part in requested:
        if not all(map(_is_pair, part.instances)):
            continue
        fresh = Commitment(part.calling, part.transaction, now, part.parts)
        kept = known.get(fresh.id)
        if kept is not None and kept.parts == part.parts and kept.got.get(part.part) == part.instances:
            # Taken twice, because something failed in between, or asked twice: one answer is enough.
            continue
        if kept is None and (known.count() >= most or known.count_of(f"{part.calling}/") >= most // _SHARE):
            left_out.append(part)
            continue
        # Asked anew by the same transaction, it is decided anew.
        got = kept.got if kept is not None and kept.parts == part.parts else {}
        kept = fresh
        kept.got = got | {part.part: part.instances}
        known.put(kept.id, kept, WAITING if len(kept.got) == kept.parts else COLLECTING)
    return left_out


def _is_pair(text: str) -> bool:
    sop_class, _, sop = text.partition(" ")
    return is_uid(sop_class) and is_uid(sop)


def records_of(ledger: Ledger) -> Records[Commitment]:
    """Return the requests."""
    return ledger.records("commitment", Commitment)
