"""All practices in one table, and the judgement: facts in, findings out. Pure."""

from __future__ import annotations

from storescp.doctor import of_care, of_machine, of_store
from storescp.doctor.facts import Facts
from storescp.doctor.findings import Finding, ordered

PRACTICES = (*of_machine.PRACTICES, *of_store.PRACTICES, *of_care.PRACTICES)


def judge(facts: Facts) -> list[Finding]:
    """Return one finding for each practice, the worst first."""
    return ordered([practice.finding(facts) for practice in PRACTICES])
