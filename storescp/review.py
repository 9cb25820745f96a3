"""The review of a week of the audit chain, as it is told and kept: no patient, no study, no reason that was typed."""

from __future__ import annotations

from datetime import date, timedelta

import msgspec

from storescp.reviewweeks import NOW


class Flag(msgspec.Struct):
    """Something to look at. ``record`` is the first record that it is about, 0 for none."""

    kind: str
    text: str
    record: int = 0


class Peer(msgspec.Struct):
    """A peer's nine weeks, the oldest first; ``said`` is new, more, less, silent or nothing."""

    title: str
    instances: list[int]
    bytes: list[int]
    associations: int
    refused: int
    median: float
    low: int
    high: int
    said: str = ""


class Refusal(msgspec.Struct):
    """Refused connections of the week that are alike."""

    calling: str
    address: str
    reason: str
    count: int
    record: int


class First(msgspec.Struct):
    """A title, address or certificate that was never seen before; ``planned``: an admin's act was about its peer."""

    what: str
    name: str
    peer: str
    record: int
    planned: bool


class User(msgspec.Struct):
    """What a user did in the week; -1 stands for all that were too many. Records are the first of their kind."""

    uid: int
    acts: dict[str, int]
    outside: dict[str, int]
    exports: int
    exported: int
    export_record: int
    erasures: int
    erased: int
    erasure_record: int


class Told(msgspec.Struct):
    """How often something was recorded, by whom, and the first record of it."""

    kind: str
    count: int
    uids: list[int]
    record: int


class Review(msgspec.Struct):
    """A week, from its first day to its last, and what is unusual in it: ``flags``, the worst first.

    ``since`` is when the chain begins; ``whole`` tells whether the week was over when this was made.
    """

    begins: str
    ends: str
    made: str
    timezone: str
    hours: str
    since: str
    whole: bool
    records: int
    flags: list[Flag]
    peers: list[Peer]
    refusals: list[Refusal]
    refused: list[int]
    refused_days: list[int]
    firsts: list[First]
    users: list[User]
    erased_by_schedule: list[int]
    told: list[Told]
    jobs: list[Told]
    ending: list[str]
    format: int = 1

    @property
    def weeks(self) -> list[date]:
        """The first days of the nine weeks."""
        last = date.fromisoformat(self.begins)
        return [last - timedelta(weeks=NOW - number) for number in range(NOW + 1)]
