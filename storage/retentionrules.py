"""``[retention]`` of ``strongroom.toml``: its schema, its defaults, their explanation, and what is wrong with one.

Source: docs/retention.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from storage.attributes import is_uid
from storage.period import Period, PeriodError, parse

# VR CS and VR AE (PS3.5), without the spaces around them.
_MODALITY = re.compile(r"[A-Z0-9_](?:[A-Z0-9_ ]{0,14}[A-Z0-9_])?", re.ASCII)
_AE_TITLE = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?", re.ASCII)

ANY, MINOR, ADULT = "any", "minor", "adult"
STUDY, RECEPTION = "study", "reception"
ADMIT, QUARANTINE = "admit", "quarantine"


class Rule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One ``[[retention.rules]]``: which series it is for, and how long their study is kept at least.

    An empty list is no condition. ``until_age`` counts from the birth date, and only in rules for minors.
    """

    name: str
    keep: str
    counted_from: str = STUDY
    modalities: list[str] = msgspec.field(default_factory=list)
    ae_titles: list[str] = msgspec.field(default_factory=list)
    sop_classes: list[str] = msgspec.field(default_factory=list)
    patients: str = ANY
    until_age: str = ""


class Retention(msgspec.Struct, kw_only=True):
    """How long studies are kept, and what stops an erasure that takes too much."""

    minor_age: str = "P18Y"
    grace: str = "P30D"
    most_studies: int = 500
    most_percent: int = 2
    resent: str = ADMIT
    second_approver: bool = False
    rules: list[Rule] = msgspec.field(default_factory=list)


EXPLAINED = {
    "retention": "How long studies are kept (docs/retention.md). Without rules nothing is ever erased by itself.",
    "retention.minor_age": "Under this age at the study a patient is a minor; so is one whose age is not known.",
    "retention.grace": "A study that is due is pending erasure for this long: listed, and can be taken back.",
    "retention.most_studies": "A run that would erase more studies than this needs --confirm; 0: every run does.",
    "retention.most_percent": "A run that would erase more than this percentage of all studies needs --confirm.",
    "retention.resent": 'What becomes of an erased study that is sent again: "admit" or "quarantine".',
    "retention.second_approver": "Whether another user (of control.group) must approve when somebody erases a\n"
    "study by hand or releases a hold.",
    "retention.rules": "The rules. Of all that match a series the longest counts, and of all series of a study; a\n"
    "study with a series that none matches is kept for ever. Each is a table of its own, after this section:\n"
    "    [[retention.rules]]\n"
    '    name = "minors"            # any text; reasons name it\n'
    '    patients = "minor"         # "any", "minor" or "adult"\n'
    '    keep = "P10Y"              # ISO 8601: at least so long\n'
    '    until_age = "P28Y"         # minors only: and at least until this birthday\n'
    '    counted_from = "study"     # or "reception"; a study date before reception shortens nothing\n'
    '    modalities = ["CT", "MR"]  # conditions; all that are given must match\n'
    '    ae_titles = ["CT1"]        # calling AE titles\n'
    '    sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]',
}


def errors(settings: Retention, key: str = "retention") -> list[str]:
    """Return all that is wrong with settings, each with its key, as in ``retention.rules[0].keep: ...``."""
    found = [
        *_period(f"{key}.minor_age", settings.minor_age),
        *_period(f"{key}.grace", settings.grace),
        *_bounds(f"{key}.most_studies", settings.most_studies, 10_000_000),
        *_bounds(f"{key}.most_percent", settings.most_percent, 100),
        *_one_of(f"{key}.resent", settings.resent, ADMIT, QUARANTINE),
    ]
    names: set[str] = set()
    for number, rule in enumerate(settings.rules):
        here = f"{key}.rules[{number}]"
        if rule.name in names:
            found.append(f"{here}.name: another rule is called '{rule.name}'")
        names.add(rule.name)
        found += _rule(here, rule)
    return found


def _rule(key: str, rule: Rule) -> Iterator[str]:
    if not rule.name.strip() or not rule.name.isprintable() or len(rule.name) > 64:
        yield f"{key}.name: must be 1 to 64 printable characters"
    yield from _period(f"{key}.keep", rule.keep)
    yield from _one_of(f"{key}.counted_from", rule.counted_from, STUDY, RECEPTION)
    yield from _one_of(f"{key}.patients", rule.patients, ANY, MINOR, ADULT)
    if rule.until_age:
        yield from _period(f"{key}.until_age", rule.until_age)
        if rule.patients != MINOR:
            yield f'{key}.until_age: only in a rule with patients = "minor"'
    for modality in rule.modalities:
        if _MODALITY.fullmatch(modality.strip(" ")) is None:
            yield f"{key}.modalities: '{modality}' is no modality, as in CT: capitals, digits, spaces, underscores"
    for title in rule.ae_titles:
        if _AE_TITLE.fullmatch(title.strip(" ")) is None:
            yield f"{key}.ae_titles: '{title}' is no AE title"
    for uid in rule.sop_classes:
        if not is_uid(uid):
            yield f"{key}.sop_classes: '{uid}' is no UID"


def _period(key: str, text: str) -> list[str]:
    try:
        period: Period = parse(text)
    except PeriodError as error:
        return [f"{key}: {error}"]
    return [] if period else [f"{key}: must be at least a day"]


def _bounds(key: str, value: int, high: int) -> list[str]:
    return [] if 0 <= value <= high else [f"{key}: must be from 0 to {high}"]


def _one_of(key: str, value: str, *allowed: str) -> list[str]:
    return [] if value in allowed else [f"{key}: must be {', '.join(allowed[:-1])} or {allowed[-1]}"]
