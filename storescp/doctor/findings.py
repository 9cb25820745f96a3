"""A finding: what was found, how bad it is, why it matters, and the command that mends it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from storescp.errors import FINDINGS

CRITICAL, WARNING, UNKNOWN, ADVICE, OK = "critical", "warning", "unknown", "advice", "ok"
# The worst first. What is unknown may be as bad as anything, but it is no fault that was seen.
GRADES = (CRITICAL, WARNING, UNKNOWN, ADVICE, OK)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found about one practice.

    ``source`` names guidance that asks for it, in general words; empty where the reason is our own. ``mend`` is empty
    where there is nothing to do.
    """

    practice: str
    grade: str
    found: str
    why: str
    mend: str = ""
    source: str = ""


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings with the worst first, else in the order of the practices."""
    return sorted(findings, key=lambda finding: GRADES.index(finding.grade))


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings there are of each grade."""
    return {grade: sum(finding.grade == grade for finding in findings) for grade in GRADES}


def status(findings: Sequence[Finding]) -> int:
    """Return the exit status: 6 with anything critical or a warning, else 0, also with what is unknown."""
    return FINDINGS if any(finding.grade in {CRITICAL, WARNING} for finding in findings) else 0
