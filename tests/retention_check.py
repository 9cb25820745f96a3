"""A second opinion on retention, written from docs/retention.md and sharing no code with the product.

It looks at one instance after the other where the product looks at series, walks the calendar month by month and day
by day, knows days as (year, month, day) alone, and asks of a day only whether a study may go on it. It is simple, not
fast.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

Day = tuple[int, int, int]
NEVER = (10_000, 1, 1)
LONG = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


class Instance(NamedTuple):
    series: str
    modality: str
    sop_class: str
    calling: str
    received_at: str
    state: str
    incoming: bool
    unreadable: bool


class Study(NamedTuple):
    uid: str
    study_date: str
    birth_date: str
    patient_id: str
    issuer: str
    instances: list[Instance]


def month_length(year: int, month: int) -> int:
    leap = year % 400 == 0 or (year % 4 == 0 and year % 100 != 0)
    return LONG[month - 1] - (month == 2 and not leap)


def real(day: Day) -> bool:
    year, month, number = day
    return 1 <= year <= 9999 and 1 <= month <= 12 and 1 <= number <= month_length(year, month)


def date_of(text: str) -> Day | None:
    """Read a DICOM date."""
    if len(text) == 10 and text[4] == text[7] == ".":
        text = text.replace(".", "")
    if len(text) != 8 or any(c not in "0123456789" for c in text):
        return None
    day = (int(text[:4]), int(text[4:6]), int(text[6:]))
    return day if real(day) else None


def received_on(text: str) -> Day | None:
    if len(text) < 20 or text[10] != "T" or text[-1] != "Z" or text[4] + text[7] != "--":
        return None
    digits = text[:4] + text[5:7] + text[8:10]
    return date_of(digits)


@cache
def last_day(start: Day, period: str) -> Day:
    """Return the last day of a period, by walking it."""
    numbers = {}
    digits = ""
    for c in period[1:]:
        if c in "YMWD":
            numbers[c] = int(digits)
            digits = ""
        else:
            digits += c
    year, month, number = start
    for _ in range(12 * numbers.get("Y", 0) + numbers.get("M", 0)):
        month += 1
        if month == 13:
            year, month = year + 1, 1
        if year > 9999:
            return NEVER
    if start[1:] == (2, 29) and month == 2 and month_length(year, 2) == 28:
        month, number = 3, 1
    while number > month_length(year, month):
        number -= 1
    for _ in range(7 * numbers.get("W", 0) + numbers.get("D", 0)):
        number += 1
        if number > month_length(year, month):
            month, number = month + 1, 1
        if month == 13:
            year, month = year + 1, 1
        if year > 9999:
            return NEVER
    return year, month, number


def verdict(study: Study, settings: dict[str, Any], holds: tuple[set[str], set[tuple[str, str]]], on: Day) -> str:
    """Return what becomes of a study on a day: kept, due, held, blocked or no rule."""
    rules = settings["rules"]
    if not rules:
        return "no rule"
    receptions = [received_on(i.received_at) for i in study.instances]
    held = study.uid in holds[0] or any(
        patient == study.patient_id and (not issuer or not study.issuer or issuer == study.issuer)
        for patient, issuer in holds[1]
    )
    if None in receptions:
        return "held" if held else "blocked"
    days = [day for day in receptions if day is not None]
    studied = date_of(study.study_date)
    born = date_of(study.birth_date)
    examined = min(days if studied is None else [*days, studied])
    if born is None or born > examined or last_day(born, "P120Y") < examined:
        minor = True
        born = max(days if born is None else [*days, born])
    else:
        minor = examined < last_day(born, settings["minor_age"])
    for instance in study.instances:
        if not any(
            matches(rule, instance) and rule.get("patients", "any") in ("any", "minor" if minor else "adult")
            for rule in rules
        ):
            return "no rule"
    for instance in study.instances:
        for rule in rules:
            if not matches(rule, instance) or (rule.get("patients") == "minor" and not minor):
                continue
            # What is kept with one instance of a series is kept with its last.
            for day in (d for d, i in zip(days, study.instances, strict=True) if i.series == instance.series):
                ends = [last_day(day, rule["keep"])]
                if studied is not None and rule.get("counted_from", "study") == "study":
                    ends.append(last_day(studied, rule["keep"]))
                if rule.get("until_age"):
                    ends.append(last_day(born, rule["until_age"]))
                if on <= max(ends):
                    return "kept"
    if held:
        return "held"
    hindered = any(
        i.state in ("quarantined", "conflict", "pending") or i.incoming or i.unreadable for i in study.instances
    )
    return "blocked" if hindered else "due"


def matches(rule: dict[str, Any], instance: Instance) -> bool:
    for key, value in (
        ("modalities", instance.modality),
        ("ae_titles", instance.calling.strip()),
        ("sop_classes", instance.sop_class),
    ):
        wanted = [text.strip() for text in rule.get(key, [])]
        if wanted and value not in wanted:
            return False
    return True
