"""Brakes: what stops an erasure that takes too much, or on a day that may be wrong. Pure: clocks are passed in."""

from __future__ import annotations

from datetime import datetime, timedelta

from storage.retentionrules import Retention

_JUMP = timedelta(days=1)


def brake(due: int, total: int, settings: Retention) -> str:
    """Return why a run that erases ``due`` of ``total`` studies needs a confirmation; empty if it does not."""
    if due > settings.most_studies:
        return f"{due} of {total} studies would go, more than retention.most_studies = {settings.most_studies}"
    if due * 100 > settings.most_percent * total:
        return f"{due} of {total} studies would go, more than retention.most_percent = {settings.most_percent}"
    return ""


def clock_brake(
    now: datetime, last_seen: datetime | None, synchronised: bool | None, elapsed: timedelta | None = None
) -> str:
    """Return why the clock cannot be trusted with an erasure, in words; empty if it can.

    Args:
        now: What the clock says.
        last_seen: What it said when it was last looked at; None if it never was.
        synchronised: Whether the system says that it is; None where it cannot tell, which is not trusted either.
        elapsed: How long ago that was by a clock that nobody sets; None where that is not known, after a restart. A
            clock that went forward meanwhile is then believed: the machine may have been off.
    """
    if synchronised is None:
        return "whether the clock is synchronised cannot be told"
    if not synchronised:
        return "the clock is not synchronised"
    if last_seen is None:
        return ""
    ahead = now - last_seen - (elapsed or timedelta())
    if ahead < -_JUMP:
        return f"the clock went back by more than a day: it was {last_seen:%Y-%m-%dT%H:%M:%SZ}"
    if ahead > _JUMP and elapsed is not None:
        return f"the clock went ahead by more than a day: it was {last_seen:%Y-%m-%dT%H:%M:%SZ}"
    return ""
