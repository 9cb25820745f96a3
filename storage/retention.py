"""Retention: which studies are due on a day, and why; pure functions of rules, rows and a date.

Three things hold whatever the rules say:

- **Only reception lets a study go.** A period counts from the last reception of a series. ``counted_from = "study"``
  adds the study date where that is later; an earlier one, as of a study that was migrated, shortens nothing, because
  whoever sends an instance also writes its study date. A study date far ahead keeps a study for ever, and says so.
- **What is not known counts as what keeps longest.** A patient without a birth date, with one after the study, or with
  one more than 120 years before it (1900-01-01 stands for "unknown" in many hospitals) is a minor, and was born as late
  as can be: on the day of the last reception. Of several birth dates the youngest counts. The age is taken on the
  earlier of study date and first reception, so that a study date ahead of its time makes nobody older.
- **A study goes as a whole**, when the last day of each period of each series is over. A series of which something is
  matched by no rule keeps its study for ever.

A rule for adults keeps a minor's study too, but never lets it go: a birth date that makes an adult a minor shortens
nothing. The other way round is not to be had: where rules speak of age, an instance that is the first of its study and
makes a child an adult is believed.

Times of reception are the gate's. A gate that lies about them shortens only what it might as well have thrown away:
the latest one of a series counts, so that no instance added to a study makes it go earlier.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from datetime import date

import msgspec

from storage import retentionrules
from storage.holds import Holds
from storage.period import Period, add, following, parse, parse_da, parse_reception
from storage.retentionrules import ANY, MINOR, STUDY, Retention
from storage.studyfacts import SeriesFacts, StudyFacts

_OLDEST = Period(years=120)


class Kind(enum.StrEnum):
    """What becomes of a study."""

    KEPT = "kept"
    DUE = "due"
    # Both would be due otherwise.
    HELD = "held"
    BLOCKED = "blocked"
    NO_RULE = "no rule"


class Reason(msgspec.Struct, frozen=True, gc=False):
    """Which rule keeps a series longest: counted from what and which day, and to which last day (None: for ever)."""

    series: str
    rule: str
    keep: str
    counted: str
    since: date
    until: date | None

    def __str__(self) -> str:
        """Return it in words."""
        until = f"until {self.until}" if self.until else "for ever"
        return f"rule '{self.rule}' keeps it {until}: {self.keep} from {self.counted}, {self.since}"


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What becomes of a study and why.

    ``due`` is the first day on which it may go, None where there is none: no rule, for ever, or not to be told.
    ``reasons`` has one a series that a rule matches, the one that decides first. ``obstacles`` are what hinders it now,
    in words, due or not.
    """

    kind: Kind
    due: date | None = None
    reasons: tuple[Reason, ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The rule that decides, empty where none does."""
        return self.reasons[0].rule if self.reasons else ""


class _Patient(msgspec.Struct, frozen=True):
    minor: bool
    # On which day the patient was born at the latest, and what says so.
    born: date
    source: str


class _Rule:
    """A rule, ready to be matched."""

    def __init__(self, rule: retentionrules.Rule) -> None:
        self.name = rule.name
        self.keep = parse(rule.keep)
        self.until_age = parse(rule.until_age) if rule.until_age else None
        self._from_study = rule.counted_from == STUDY
        self._patients = rule.patients
        self._modalities = frozenset(text.strip(" ") for text in rule.modalities)
        self._ae_titles = frozenset(text.strip(" ") for text in rule.ae_titles)
        self._sop_classes = frozenset(rule.sop_classes)

    def keeps(self, series: SeriesFacts, patient: _Patient) -> bool:
        """Tell whether a series has anything that the rule keeps."""
        if self._patients == MINOR and not patient.minor:
            return False
        return any(self.matches(series, *kind) for kind in series.kinds)

    def lets_go(self, patient: _Patient) -> bool:
        """Tell whether something may go because the rule matches it."""
        return self._patients == ANY or (self._patients == MINOR) == patient.minor

    def matches(self, series: SeriesFacts, sop_class: str, title: str) -> bool:
        """Tell whether instances of a kind are what the rule is about, whoever the patient is."""
        return (
            (not self._modalities or series.modality.strip(" ") in self._modalities)
            and (not self._ae_titles or title.strip(" ") in self._ae_titles)
            and (not self._sop_classes or sop_class in self._sop_classes)
        )

    def reason(self, series: SeriesFacts, received: date, studied: date | None, patient: _Patient) -> Reason:
        """Return how long the rule keeps a series that was last received on a day."""
        since, counted = received, "its last reception"
        if self._from_study and studied is not None and studied > received:
            since, counted = studied, "the study date, which is later than reception"
        reason = Reason(series.uid, self.name, str(self.keep), counted, since, add(since, self.keep))
        if self.until_age is not None:
            until = add(patient.born, self.until_age)
            if _order(until) > _order(reason.until):
                return Reason(series.uid, self.name, str(self.until_age), patient.source, patient.born, until)
        return reason


class Rules:
    """The rules of a configuration, ready to be asked; ``settings`` is what they were made from.

    Args:
        settings: ``[retention]`` without errors.
        made: The day on which the store was made. What says that it was received earlier has its time from a clock
            that was wrong, and is not erased by itself. None: that is not checked.

    Raises:
        ValueError: The settings have errors (``retentionrules.errors``).
    """

    def __init__(self, settings: Retention, made: date | None = None) -> None:
        if wrong := retentionrules.errors(settings):
            raise ValueError("; ".join(wrong))
        self.settings = settings
        self.made = made
        self.minor_age = parse(settings.minor_age)
        self.rules = [_Rule(rule) for rule in settings.rules]

    def grace_ends(self, pending: date) -> date | None:
        """Return the first day on which a study may be erased that is pending since a day."""
        return following(add(pending, parse(self.settings.grace)))


def decide(study: StudyFacts, rules: Rules, on: date) -> Verdict:
    """Return what becomes of a study on a day (in UTC), as far as rules and rows say; holds are not looked at.

    ``Kind.BLOCKED`` where it would be due but something about it is undecided, or a reception is not understood.
    """
    if not rules.rules or not study.series:
        return Verdict(Kind.NO_RULE)
    days = [(parse_reception(series.first), parse_reception(series.last)) for series in study.series]
    firsts = [first for first, _ in days if first is not None]
    lasts = [last for _, last in days if last is not None]
    obstacles = tuple(_obstacles(study, rules, firsts))
    if len(firsts) + len(lasts) < 2 * len(days) or any(series.undated for series in study.series):
        return Verdict(Kind.BLOCKED, obstacles=(*obstacles, "a time of reception is not understood"))
    studied = [day for day in map(parse_da, study.study_dates) if day is not None]
    patient = _patient(study, rules, min([*firsts, *studied]), max(lasts))
    reasons = []
    covered = True
    for series, last in zip(study.series, lasts, strict=True):
        keeping = [rule for rule in rules.rules if rule.keeps(series, patient)]
        covered = covered and _may_go(series, keeping, patient)
        found = [rule.reason(series, last, max(studied, default=None), patient) for rule in keeping]
        if found:
            reasons.append(max(found, key=lambda reason: _order(reason.until)))
    reasons.sort(key=lambda reason: _order(reason.until), reverse=True)
    if not covered:
        return Verdict(Kind.NO_RULE, None, tuple(reasons), obstacles)
    due = following(reasons[0].until)
    kind = Kind.KEPT if due is None or on < due else Kind.BLOCKED if obstacles else Kind.DUE
    return Verdict(kind, due, tuple(reasons), obstacles)


def _may_go(series: SeriesFacts, keeping: list[_Rule], patient: _Patient) -> bool:
    rules = [rule for rule in keeping if rule.lets_go(patient)]
    return bool(series.kinds) and all(any(rule.matches(series, *kind) for rule in rules) for kind in series.kinds)


def _order(until: date | None) -> tuple[bool, date]:
    """Return what last days are compared by: none is the latest of all."""
    return until is None, until or date.max


def _patient(study: StudyFacts, rules: Rules, seen: date, last: date) -> _Patient:
    """Return the patient as young as all that is known allows.

    Args:
        study: The study.
        rules: The rules, for the age of a minor.
        seen: The earliest day that says when the patient was examined.
        last: The day of the last reception.
    """
    dates = [parse_da(text) for text in study.birth_dates]
    births = [day for day in dates if day is not None]
    known = bool(births) and len(births) == len(dates)
    if not known or max(births) > seen or _order(add(min(births), _OLDEST)) < _order(seen):
        return _Patient(True, max([*births, last]), "the latest day of birth that can be, as the age is not known")
    minor = _order(add(max(births), rules.minor_age)) > _order(seen)
    return _Patient(minor, max(births), "the birth date")


def _obstacles(study: StudyFacts, rules: Rules, firsts: list[date]) -> Iterator[str]:
    for number, what in (
        (study.quarantined, "in quarantine"),
        (study.conflicting, "in conflict with another under the same UID"),
        (study.waiting, "in deposits that are not admitted yet"),
        (study.damaged, "in packs with records that do not open, which may be anything"),
        (study.unknown, "in a state that this release does not know"),
    ):
        if number:
            yield f"{number} {'instance is' if number == 1 else 'instances are'} {what}"
    if rules.made is not None and firsts and min(firsts) < rules.made:
        yield f"received on {min(firsts)}, before the store was made: a clock was wrong"


# --- the plan


class Totals(msgspec.Struct):
    """How many studies are what, and what erasing those that are due frees, in bytes."""

    studies: int = 0
    kept: int = 0
    due: int = 0
    held: int = 0
    blocked: int = 0
    no_rule: int = 0
    due_instances: int = 0
    due_packs: int = 0
    due_space: int = 0
    held_space: int = 0
    blocked_space: int = 0

    def count(self, study: StudyFacts, verdict: Verdict) -> None:
        """Add a study."""
        self.studies += 1
        name = verdict.kind.name.lower()
        setattr(self, name, getattr(self, name) + 1)
        if verdict.kind in {Kind.DUE, Kind.HELD, Kind.BLOCKED}:
            setattr(self, f"{name}_space", getattr(self, f"{name}_space") + study.space)
        if verdict.kind is Kind.DUE:
            self.due_instances += study.instances
            self.due_packs += study.packs


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """A study of a plan and what becomes of it."""

    study: StudyFacts
    verdict: Verdict


def assess(study: StudyFacts, rules: Rules, holds: Holds, on: date) -> Verdict:
    """Return what becomes of a study on a day. A hold wins: ``Kind.HELD`` is what would go or be blocked without it."""
    verdict = decide(study, rules, on)
    if hold := holds.on(study.uid, study.patient_id, study.issuer):
        kind = Kind.HELD if verdict.kind in {Kind.DUE, Kind.BLOCKED} else verdict.kind
        return msgspec.structs.replace(verdict, kind=kind, obstacles=(hold, *verdict.obstacles))
    return verdict


def plan(studies: Iterable[StudyFacts], rules: Rules, holds: Holds, on: date, totals: Totals) -> Iterator[Outcome]:
    """Yield what becomes of each study on a day, in their order, and count it; nothing is kept in memory.

    ``totals`` are complete when all were taken.
    """
    for study in studies:
        verdict = assess(study, rules, holds, on)
        totals.count(study, verdict)
        yield Outcome(study, verdict)
