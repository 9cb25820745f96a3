"""A practice: what it is called, why it matters, who asks for it, and how facts are judged by it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

from storescp import clock
from storescp.doctor.facts import Facts, Unseen, UnseenError
from storescp.doctor.findings import ADVICE, CRITICAL, OK, UNKNOWN, WARNING, Finding
from storescp.errors import plural

_NAMED = 5


class Verdict(NamedTuple):
    """How facts are judged: a grade, what was found, and the command that mends it."""

    grade: str
    found: str
    mend: str = ""


class Practice(NamedTuple):
    """One practice. ``judge`` is pure; it may raise UnseenError where it needs what was not seen.

    ``of_content`` protects what the store holds: it is advice as long as that is nothing, so that a machine on which
    everything is installed as it should be is told so.
    """

    name: str
    judge: Callable[[Facts], Verdict]
    why: str
    source: str = ""
    of_content: bool = False

    def finding(self, facts: Facts) -> Finding:
        """Return what is found of this practice; what could not be seen is unknown."""
        try:
            verdict = self.judge(facts)
        except UnseenError as error:
            verdict = Verdict(UNKNOWN, str(error))
        if self.of_content and verdict.grade in {CRITICAL, WARNING} and _is_empty(facts):
            verdict = verdict._replace(grade=ADVICE, found=f"before the first study comes: {verdict.found}")
        return Finding(
            practice=self.name,
            grade=verdict.grade,
            found=verdict.found,
            why=self.why,
            mend="" if verdict.grade == OK else verdict.mend,
            source=self.source,
        )


def _is_empty(facts: Facts) -> bool:
    """Tell whether nothing was ever admitted; where nobody knows, something was."""
    return not isinstance(facts.answers.scrub, Unseen) and not facts.answers.scrub.packs


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
