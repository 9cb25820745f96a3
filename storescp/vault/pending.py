"""Studies that are pending erasure or were taken back: the list in the ledger, and what a run does with each."""

from __future__ import annotations

from datetime import date
from typing import Any

import msgspec

from storage.records import Records
from storescp.vault.opened import Open

PENDING, KEPT = "pending", "kept"
# What a run does with a study that is due.
MARKED, WAITS, ERASED, TAKEN_BACK = "marked", "waits", "erased", "taken back"


class Pending(msgspec.Struct):
    """A study that is to be erased: since when it is listed, from which day on it may go; times are RFC 3339.

    ``kept_until``: somebody took it back, and it is not marked again before that day. Once a study is erased, nothing
    here names it.
    """

    study: str
    rule: str
    due: str
    since: str
    from_day: str
    instances: int
    space: int
    kept_until: str = ""
    kept_by: int = -1
    kept_reason: str = ""


class Steps(msgspec.Struct):
    """What a run does with the studies that are due: how many it marks, lets wait, erases, or leaves to who took them.

    ``marks`` become pending erasure, ``waits`` are and have time left, ``erases`` have none left.
    """

    marks: int = 0
    waits: int = 0
    erases: int = 0
    taken_back: int = 0

    def count(self, step: str) -> None:
        """Add a study."""
        name = {MARKED: "marks", WAITS: "waits", ERASED: "erases", TAKEN_BACK: "taken_back"}[step]
        setattr(self, name, getattr(self, name) + 1)


def step_of(before: Pending | None, due: str, on: date) -> str:
    """Return what a run on a day does with a study that is due since a day.

    Args:
        before: What is known of it, if it is pending or was taken back.
        due: The first day on which it may go; where that is later than it was, something came since.
        on: The day.
    """
    if before is not None and before.kept_until > str(on):
        return TAKEN_BACK
    if before is None or before.kept_until or before.due < due:
        return MARKED
    return ERASED if before.from_day <= str(on) else WAITS


def listed(step: str, before: Pending | None) -> dict[str, Any]:
    """Return until when a study that is due waits, or is left to who took it back."""
    return {
        "erased_from": before.from_day if before and step in {WAITS, ERASED} else None,
        "kept_until": before.kept_until if before and step == TAKEN_BACK else None,
    }


def records_of(open_: Open) -> Records[Pending]:
    """Return the list."""
    return open_.ledger.records("pending", Pending)
