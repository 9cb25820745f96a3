"""A practice: what it is called, why it matters, who asks for it, and how facts are judged by it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

from storescp import clock
from storescp.doctor.facts import Facts, UnseenError
from storescp.doctor.findings import OK, UNKNOWN, Finding
from storescp.errors import plural

_NAMED = 5


class Verdict(NamedTuple):
    """How facts are judged: a grade, what was found, and the command that mends it."""

    grade: str
    found: str
    mend: str = ""


class Practice(NamedTuple):
    """One practice. ``judge`` is pure; it may raise UnseenError where it needs what was not seen."""

    name: str
    judge: Callable[[Facts], Verdict]
    why: str
    source: str = ""

    def finding(self, facts: Facts) -> Finding:
        """Return what is found of this practice; what could not be seen is unknown."""
        try:
            verdict = self.judge(facts)
        except UnseenError as error:
            verdict = Verdict(UNKNOWN, str(error))
        return Finding(
            practice=self.name,
            grade=verdict.grade,
            found=verdict.found,
            why=self.why,
            mend="" if verdict.grade == OK else verdict.mend,
            source=self.source,
        )


def some(names: list[str]) -> str:
    """Return the first of many names, and how many there are more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def age(written: str, now: datetime) -> timedelta:
    """Return how long ago a written time was; nothing for one that lies ahead.

    Raises:
        UnseenError: It says no time.
    """
    try:
        return max(timedelta(0), now - clock.parse(written))
    except ValueError as error:
        raise UnseenError(f"'{written}' is no time") from error


def days(span: timedelta) -> str:
    """Return a span in whole days."""
    return plural(span.days, "day")
