"""Retention: what is due, why, and what can never make a study go earlier; checked against a second implementation."""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import retention_check
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import studyfacts
from storage.brakes import brake, clock_brake
from storage.holds import Holds
from storage.index import Index
from storage.period import Period, PeriodError, add, following, parse, parse_da, parse_reception
from storage.retention import Kind, Rules, Totals, assess, decide, plan
from storage.retentionrules import EXPLAINED, Retention, Rule, errors
from storage.sqlite import connect
from storage.studyfacts import SeriesFacts, StudyFacts, gather
from storescp.config import convert

QUICK = settings(deadline=None, derandomize=True, max_examples=60)
DOCS = Path(__file__).parents[2] / "docs" / "retention.md"
CT, MR, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.88.11"
ON = date(2026, 11, 22)


def series(received: str = "2016-06-15", *, first: str = "", modality: str = "CT", uid: str = "1.2.1",
           kinds: tuple[tuple[str, str], ...] = ((CT, "CT1"),), undated: int = 0) -> SeriesFacts:  # fmt: skip
    last = f"{received}T23:59:59.5Z"
    return SeriesFacts(uid, modality, kinds, f"{first}T00:00:00Z" if first else last, last, undated)


def study(*parts: SeriesFacts, studied: str = "20160614", born: str = "19600101", **given: Any) -> StudyFacts:
    return StudyFacts("1.2", parts or (series(),), (studied,), (born,), **given)


def rule(**given: Any) -> Rule:
    return Rule(**{"name": "all", "keep": "P10Y"} | given)


def rules(*given: Rule, **others: Any) -> Rules:
    return Rules(Retention(rules=list(given), **others))


# --- days and periods


@pytest.mark.parametrize(
    ("text", "period"),
    [
        ("P10Y", Period(years=10)),
        ("P18M", Period(months=18)),
        ("P2W", Period(weeks=2)),
        ("P90D", Period(days=90)),
        ("P1Y2M3W4D", Period(1, 2, 3, 4)),
        ("P0D", Period()),
    ],
)
def test_a_period_is_read_and_written(text: str, period: Period) -> None:
    assert parse(text) == period
    assert str(period) == text
    assert bool(period) is (text != "P0D")


@pytest.mark.parametrize(
    "text",
    ["", "P", "10Y", "p10y", "P10", "P1.5Y", "P1,5Y", "-P1Y", "P-1Y", "PT24H", "P1DT1H", "P1D1Y", "P1Y1Y", "P10000Y",
     "P1Y ", " P1Y", "P1Y\n", "P١Y", "P1000000D", "forever"],
)  # fmt: skip
def test_what_is_no_period_is_refused(text: str) -> None:
    with pytest.raises(PeriodError):
        parse(text)


@given(st.text(alphabet="P0123456789YMWDT.-", max_size=12))
@QUICK
def test_any_text_is_a_period_or_refused(text: str) -> None:
    try:
        period = parse(text)
    except PeriodError:
        return
    assert parse(str(period)) == period


@pytest.mark.parametrize(
    ("day", "period", "end"),
    [
        ("2016-06-15", "P10Y", "2026-06-15"),
        ("2025-01-31", "P1M", "2025-02-28"),
        ("2024-01-31", "P1M", "2024-02-29"),
        ("2025-10-31", "P1M", "2025-11-30"),
        ("2025-12-31", "P2M", "2026-02-28"),
        # Of 28 February and 1 March the later.
        ("2024-02-29", "P1Y", "2025-03-01"),
        ("2024-02-29", "P12M", "2025-03-01"),
        ("2024-02-29", "P4Y", "2028-02-29"),
        ("2000-02-29", "P100Y", "2100-03-01"),
        ("2024-02-29", "P1M", "2024-03-29"),
        ("2024-02-29", "P1Y1D", "2025-03-02"),
        ("2024-02-28", "P1Y", "2025-02-28"),
        # Years and months first, then days.
        ("2025-01-31", "P1M1D", "2025-03-01"),
        ("2025-12-31", "P1D", "2026-01-01"),
        ("2025-12-18", "P2W", "2026-01-01"),
        ("2025-06-15", "P18M", "2026-12-15"),
        ("2025-06-15", "P0D", "2025-06-15"),
        ("0001-01-01", "P9998Y", "9999-01-01"),
        ("9998-12-31", "P1Y", "9999-12-31"),
        ("9999-12-30", "P1D", "9999-12-31"),
        ("9999-12-31", "P1D", None),
        ("9999-12-01", "P1M", None),
        ("2026-01-01", "P9999Y", None),
        ("2026-01-01", "P9999M", "2859-04-01"),
        ("9000-01-01", "P999999D", None),
    ],
)
def test_a_period_is_counted_in_the_calendar(day: str, period: str, end: str | None) -> None:
    assert add(date.fromisoformat(day), parse(period)) == (end and date.fromisoformat(end))


periods = st.builds(
    Period, st.integers(0, 40), st.integers(0, 30), st.integers(0, 60), st.integers(0, 400)
).filter(bool)  # fmt: skip
some_days = st.dates(date(1900, 1, 1), date(2100, 12, 31)) | st.sampled_from(
    [date(2024, 2, 29), date(2000, 2, 29), date(2025, 2, 28), date(2025, 3, 1), date(2025, 1, 31), date(2024, 12, 31)]
)


@given(some_days, some_days, periods)
@QUICK
def test_a_later_day_never_leads_to_an_earlier_one(one: date, other: date, period: Period) -> None:
    first, second = add(min(one, other), period), add(max(one, other), period)
    assert first is not None
    assert second is not None
    assert min(one, other) < first <= second


@given(some_days, periods)
@QUICK
def test_periods_end_where_the_second_implementation_walks_to(day: date, period: Period) -> None:
    found = add(day, period)
    assert found is not None
    assert found.timetuple()[:3] == retention_check.last_day((day.year, day.month, day.day), str(period))


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20160615", date(2016, 6, 15)),
        ("20160615 ", date(2016, 6, 15)),
        ("2016.06.15", date(2016, 6, 15)),
        ("00010101", date(1, 1, 1)),
        *[(text, None) for text in ("", " ", "00000000", "20160231", "20161301", "2016", "201606", "2016-06-15",
                                    "2016.0615", "20160615-20160616", "20160615-", "x0160615", "２０１６０６１５")],
    ],
)  # fmt: skip
def test_a_dicom_date_is_a_day_or_missing(text: str, day: date | None) -> None:
    assert parse_da(text) == day


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-11-22T17:03:58.587324Z", date(2026, 11, 22)),
        ("2026-11-22T23:59:59Z", date(2026, 11, 22)),
        *[(text, None) for text in ("", "2026-11-22", "2026-02-30T00:00:00Z", "2026-11-22T17:03:58+01:00", "20261122T",
                                    "2026-W01-1T00:00:00Z", "2026-11-22T17:03:58", "2026-11-22T17:03:58Z\n")],
    ],
)  # fmt: skip
def test_a_reception_is_a_day_in_utc_or_not_understood(text: str, day: date | None) -> None:
    assert parse_reception(text) == day


@given(st.text(max_size=12))
@QUICK
def test_any_text_is_a_day_or_none(text: str) -> None:
    assert parse_da(text) is None or len(text) >= 8
    assert parse_reception(text) is None


# --- the configuration

GOOD = """
[retention]
grace = "P14D"
most_studies = 0
resent = "quarantine"
[[retention.rules]]
name = "minors"
patients = "minor"
keep = "P10Y"
until_age = "P28Y"
modalities = ["CT", "XC_2"]
ae_titles = ["CT1 ", "A,B"]
sop_classes = ["1.2.840.10008.5.1.4.1.1.2"]
counted_from = "reception"
"""


def test_a_table_of_rules_is_read() -> None:
    found, wrong = convert(tomllib.loads(GOOD)["retention"], Retention, "retention.")
    assert wrong == []
    assert errors(found) == []
    assert found.rules[0].until_age == "P28Y"
    assert Rules(found).rules[0].matches(series(), CT, "CT1")


def test_an_unknown_key_of_a_rule_is_an_error() -> None:
    _, wrong = convert({"rules": [{"name": "a", "keep": "P1Y", "modality": "CT"}]}, Retention, "retention.")
    assert wrong == ["retention.rules: object contains unknown field `modality` - at `$[0]`"]


def test_defaults_are_without_error_and_erase_nothing() -> None:
    assert errors(Retention()) == []
    assert decide(study(), Rules(Retention()), date.max).kind is Kind.NO_RULE


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"keep": "10 years"}, "keep: '10 years' is no period of days, as in P10Y, P18M, P2W or P90D"),
        ({"keep": "P0Y"}, "keep: must be at least a day"),
        ({"name": " "}, "name: must be 1 to 64 printable characters"),
        ({"name": "a\nb"}, "name: must be 1 to 64 printable characters"),
        ({"counted_from": "birth"}, "counted_from: must be study or reception"),
        ({"patients": "child"}, "patients: must be any, minor or adult"),
        ({"until_age": "P28Y"}, 'until_age: only in a rule with patients = "minor"'),
        ({"until_age": "28", "patients": "minor"},
         "until_age: '28' is no period of days, as in P10Y, P18M, P2W or P90D"),
        ({"modalities": ["ct"]}, "modalities: 'ct' is no modality, as in CT: capitals, digits, spaces, underscores"),
        ({"modalities": [""]}, "modalities: '' is no modality, as in CT: capitals, digits, spaces, underscores"),
        ({"ae_titles": ["A\\B"]}, "ae_titles: 'A\\B' is no AE title"),
        ({"ae_titles": ["A" * 17]}, f"ae_titles: '{'A' * 17}' is no AE title"),
        ({"ae_titles": ["  "]}, "ae_titles: '  ' is no AE title"),
        ({"sop_classes": ["CT Image Storage"]}, "sop_classes: 'CT Image Storage' is no UID"),
    ],
)  # fmt: skip
def test_an_error_in_a_rule_names_its_key(given: dict[str, Any], error: str) -> None:
    wrong = Retention(rules=[rule(name="first"), rule(**given)])
    assert errors(wrong) == [f"retention.rules[1].{error}"]
    with pytest.raises(ValueError, match=re.escape(error)):
        Rules(wrong)


def test_all_errors_are_told_at_once() -> None:
    wrong = Retention(
        minor_age="", grace="P0D", most_studies=-1, most_percent=101, resent="drop", rules=[rule(), rule()]
    )
    assert [error.partition(":")[0] for error in errors(wrong)] == [
        f"retention.{key}"
        for key in ("minor_age", "grace", "most_studies", "most_percent", "resent", "rules[1].name")
    ]  # fmt: skip


# --- verdicts

ALL = rule()
MINORS = rule(name="minors", patients="minor", until_age="P28Y")
ADULTS = rule(name="adults", patients="adult")
UNKNOWN = "the latest day of birth that can be, as the age is not known"
# Name: study, rules, the first day on which it may go, or why there is none.
CASES: dict[str, tuple[StudyFacts, list[Rule], str]] = {
    "ten years and a day after reception": (study(), [ALL], "2026-06-16"),
    "the last reception of a series counts": (study(series(first="2010-01-01")), [ALL], "2026-06-16"),
    "an old study date shortens nothing": (study(studied="19990101"), [ALL], "2026-06-16"),
    "a later study date lengthens": (study(studied="20180101"), [ALL], "2028-01-02"),
    "unless the rule counts from reception": (
        study(studied="20180101"), [rule(counted_from="reception")], "2026-06-16"),
    "a study date far ahead keeps for ever": (study(studied="99991231"), [ALL], "kept"),
    "a missing study date is reception's": (study(studied=""), [ALL], "2026-06-16"),
    "a malformed study date is reception's": (study(studied="20180231"), [ALL], "2026-06-16"),
    "a range is no study date": (study(studied="20180101-20190101"), [ALL], "2026-06-16"),
    "of several study dates the latest": (
        StudyFacts("1.2", (series(),), ("20180101", "", "20170101"), ("19600101",)), [ALL], "2028-01-02"),
    "the longest rule of a series": (
        study(), [ALL, rule(name="b", keep="P12Y"), rule(name="c", keep="P1Y")], "2028-06-16"),
    "the longest series of a study": (
        study(series("2020-01-01"), series(modality="MG", uid="1.2.2")),
        [rule(keep="P1Y", modalities=["CT"]), rule(name="b", keep="P15Y", modalities=["MG"])], "2031-06-16"),
    "a period beyond the calendar is for ever": (study(), [rule(keep="P9999Y")], "kept"),
    "a day of grace for a day": (study(), [rule(keep="P1D")], "2016-06-17"),
    "no rule": (study(), [], "no rule"),
    "no rule for the modality": (study(), [rule(modalities=["MR", "MG"])], "no rule"),
    "no rule for one series of two": (
        study(series(), series(modality="SR", uid="1.2.2")), [rule(modalities=["CT"])], "no rule"),
    "no rule for one sender of a series": (
        study(series(kinds=((CT, "CT1"), (CT, "CT2")))), [rule(ae_titles=["CT1"])], "no rule"),
    "no rule for one SOP class of a series": (
        study(series(kinds=((CT, "CT1"), (SR, "CT1")))), [rule(sop_classes=[CT])], "no rule"),
    "two rules for the senders of a series": (
        study(series(kinds=((CT, "CT1"), (CT, "CT2")))),
        [rule(ae_titles=["CT1"]), rule(name="b", ae_titles=["CT2"], keep="P11Y")], "2027-06-16"),
    "conditions must all match, in one instance": (
        study(series(kinds=((CT, "CT2"), (SR, "CT1")))),
        [ALL, rule(name="b", keep="P30Y", sop_classes=[CT], ae_titles=["CT1"])], "2026-06-16"),
    "a series without modality": (study(series(modality="")), [rule(modalities=["CT"])], "no rule"),
    "spaces around an AE title are padding": (
        study(series(kinds=((CT, "CT1 "),))), [rule(ae_titles=[" CT1"])], "2026-06-16"),
    "an AE title has its case": (study(), [rule(ae_titles=["ct1"])], "no rule"),
    "an AE title with a comma": (study(series(kinds=((CT, "A,B"),))), [rule(ae_titles=["A,B"])], "2026-06-16"),
    "a study without series": (StudyFacts("1.2", ()), [ALL], "no rule"),
    "a series without instances": (study(series(kinds=())), [ALL], "no rule"),
    # Age.
    "an adult": (study(), [MINORS, ADULTS], "2026-06-16"),
    "a minor until the birthday": (study(born="20100615"), [MINORS, ADULTS], "2038-06-16"),
    "a minor near the birthday, by the period": (study(born="19980616"), [MINORS, ADULTS], "2026-06-17"),
    "of age on the birthday": (study(studied="20160614", born="19980614"), [ADULTS], "2026-06-16"),
    "a minor on the day before": (study(studied="20160613", born="19980614"), [ADULTS], "no rule"),
    "of age on 1 March, born on a 29 February": (
        study(series("2018-06-15"), studied="20180228", born="20000229"), [MINORS], "2028-06-16"),
    "a minor's study needs a rule for minors": (study(born="20100615"), [ADULTS], "no rule"),
    "an adult's study needs a rule for adults": (study(), [MINORS], "no rule"),
    "a rule for adults keeps a minor's, too": (
        study(born="20100615"), [rule(patients="minor", keep="P1Y"), rule(name="b", patients="adult")], "2026-06-16"),
    "the age is taken at the study": (
        study(series("2024-01-01"), studied="20100101", born="19950101"), [MINORS], "2034-01-02"),
    "a study date ahead makes nobody older": (study(studied="20300101", born="20000101"), [MINORS], "2040-01-02"),
    "age at reception without a study date": (study(studied="", born="19980614"), [ADULTS], "2026-06-16"),
    "an unknown age is a minor's": (study(born=""), [ADULTS], "no rule"),
    "born at the latest on the day of the last reception": (study(born=""), [MINORS], "2044-06-16"),
    "a malformed birth date is unknown": (study(born="1960"), [MINORS], "2044-06-16"),
    "born after the study is unknown": (study(studied="19590101"), [MINORS], "2044-06-16"),
    "born after reception counts from then": (study(born="20200101"), [MINORS], "2048-01-02"),
    "1900-01-01 is unknown, once it is": (
        study(series("2020-06-15"), studied="20200615", born="19000101"), [MINORS], "2048-06-16"),
    "120 years can be": (study(series("2020-01-01"), studied="20200101", born="19000101"), [ADULTS], "2030-01-02"),
    "of several birth dates the youngest": (
        StudyFacts("1.2", (series(),), ("20160614",), ("19600101", "20100615")), [MINORS, ADULTS], "2038-06-16"),
    "one impossible birth date of several is unknown": (
        StudyFacts("1.2", (series(),), ("20160614",), ("18900101", "19600101")), [MINORS, ADULTS], "2044-06-16"),
    "one missing birth date of several is unknown": (
        StudyFacts("1.2", (series(),), ("20160614",), ("19600101", "")), [MINORS, ADULTS], "2044-06-16"),
    # What blocks.
    "quarantined": (study(quarantined=1), [ALL], "blocked: 1 instance is in quarantine"),
    "conflicting": (
        study(conflicting=2), [ALL], "blocked: 2 instances are in conflict with another under the same UID"),
    "waiting": (study(waiting=1), [ALL], "blocked: 1 instance is in deposits that are not admitted yet"),
    "damaged": (
        study(damaged=2), [ALL],
        "blocked: 2 instances are in packs with records that do not open, which may be anything"),
    "a state from the future": (
        study(unknown=1), [ALL], "blocked: 1 instance is in a state that this release does not know"),
    "a reception that is none": (study(series("yesterday")), [ALL], "blocked: a time of reception is not understood"),
    "one reception of many": (study(series(undated=1)), [ALL], "blocked: a time of reception is not understood"),
    "a first reception that is none": (
        study(SeriesFacts("1", "CT", ((CT, "A"),), "", "2016-06-15T00:00:00Z")), [ALL],
        "blocked: a time of reception is not understood"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    facts, given, expected = CASES[name]
    last = decide(facts, rules(*given), date.max)
    if not expected[0].isdigit():
        assert str(last.kind) == expected.partition(":")[0]
        assert last.due is None or last.kind is Kind.BLOCKED
        assert ", ".join(last.obstacles) == expected.partition(": ")[2]
        return
    due = date.fromisoformat(expected)
    assert (last.kind, last.due) == (Kind.DUE, due)
    assert decide(facts, rules(*given), due).kind is Kind.DUE
    assert decide(facts, rules(*given), due - timedelta(days=1)).kind is Kind.KEPT


def test_reasons_name_the_rule_the_day_and_what_it_counts_from() -> None:
    facts = study(series(), series("2020-01-01", uid="1.2.2"), born="20100101", studied="20180101")
    found = decide(facts, rules(MINORS, rule(counted_from="reception")), ON)
    assert found.rule == "minors"
    assert [reason.series for reason in found.reasons] == ["1.2.1", "1.2.2"]
    assert str(found.reasons[0]) == "rule 'minors' keeps it until 2038-01-01: P28Y from the birth date, 2010-01-01"
    found = decide(msgspec.structs.replace(facts, birth_dates=("",)), rules(MINORS), ON)
    assert str(found.reasons[0]) == f"rule 'minors' keeps it until 2048-01-01: P28Y from {UNKNOWN}, 2020-01-01"
    found = decide(facts, rules(ALL), ON)
    assert [str(reason) for reason in found.reasons] == [
        "rule 'all' keeps it until 2030-01-01: P10Y from its last reception, 2020-01-01",
        "rule 'all' keeps it until 2028-01-01: P10Y from the study date, which is later than reception, 2018-01-01",
    ]
    found = decide(study(studied="99991231"), rules(ALL), ON)
    assert "keeps it for ever: P10Y from the study date, which is later than reception, 9999-12-31" in str(
        found.reasons[0]
    )


def test_what_hinders_a_study_is_told_before_it_is_due() -> None:
    found = decide(study(quarantined=1), rules(ALL), date(2020, 1, 1))
    assert (found.kind, found.obstacles) == (Kind.KEPT, ("1 instance is in quarantine",))


def test_what_was_received_before_the_store_was_made_does_not_go_by_itself() -> None:
    made = Rules(Retention(rules=[ALL]), date(2016, 6, 16))
    found = decide(study(), made, ON)
    assert found.kind is Kind.BLOCKED
    assert found.obstacles == ("received on 2016-06-15, before the store was made: a clock was wrong",)
    assert decide(study(), Rules(Retention(rules=[ALL]), date(2016, 6, 15)), ON).kind is Kind.DUE


def test_grace_is_kept_to_its_last_day() -> None:
    assert rules(ALL, grace="P30D").grace_ends(date(2026, 11, 1)) == date(2026, 12, 2)
    assert rules(ALL, grace="P9999Y").grace_ends(ON) is None
    assert following(date.max) is None


# --- holds, the plan, brakes


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        (Holds(), ""),
        (Holds(["1.2"]), "a hold on the study"),
        (Holds(["1.2.1", "1"]), ""),
        (Holds([], [("P1", "H")]), "a hold on the patient"),
        (Holds([], [("P1", "OTHER")]), ""),
        (Holds([], [("P1", "")]), "a hold on the patient"),
        (Holds([], [("P1", "OTHER"), ("P1", "H")]), "a hold on the patient"),
        (Holds([], [(" P1 ", " H")]), "a hold on the patient"),
        (Holds([], [("p1", "H")]), ""),
    ],
)
def test_a_hold_on(holds: Holds, expected: str) -> None:
    assert holds.on("1.2", "P1", "H") == expected
    held = assess(study(patient_id="P1", issuer="H"), rules(ALL), holds, ON)
    assert held.kind is (Kind.HELD if expected else Kind.DUE)
    assert held.obstacles == ((expected,) if expected else ())


def test_a_study_without_issuer_is_under_the_hold_on_any_of_that_id() -> None:
    assert Holds([], [("P1", "H")]).on("1.2", "P1 ", "") == "a hold on the patient"
    assert Holds([], [("P1", "H")]).on("1.2", "", "") == ""


@pytest.mark.parametrize("named", [([""], []), ([], [(" ", "H")])])
def test_a_hold_on_nothing_is_refused(named: Any) -> None:
    with pytest.raises(ValueError, match="names no study or patient"):
        Holds(*named)


def test_a_plan_counts_what_goes_what_is_held_and_what_it_frees() -> None:
    studies = [
        study(space=10, instances=3, packs=2),
        study(space=10, instances=1, packs=1),
        msgspec.structs.replace(study(space=200, quarantined=1), uid="1.3"),
        msgspec.structs.replace(study(space=1000), uid="1.4"),
        study(series("2026-01-01"), patient_id="P9", space=5),
        msgspec.structs.replace(study(series(modality="MR"), space=7), uid="1.5"),
        study(quarantined=1, patient_id="P9", space=4),
    ]
    totals = Totals()
    only = rules(rule(modalities=["CT"]))
    found = list(plan(iter(studies), only, Holds(["1.4"], [("P9", "")]), ON, totals))
    kinds = [Kind.DUE, Kind.DUE, Kind.BLOCKED, Kind.HELD, Kind.KEPT, Kind.NO_RULE, Kind.HELD]
    assert [outcome.verdict.kind for outcome in found] == kinds
    assert [outcome.study for outcome in found] == studies
    assert found[-1].verdict.obstacles == ("a hold on the patient", "1 instance is in quarantine")
    assert totals == Totals(
        studies=7, kept=1, due=2, held=2, blocked=1, no_rule=1, due_instances=4, due_packs=3, due_space=20,
        held_space=1004, blocked_space=200,
    )  # fmt: skip


def test_a_plan_takes_one_study_at_a_time() -> None:
    rows = ((f"1.{n // 2}", f"1.{n}", None, "CT", "[]", "", "", 0, 1, 1, 1, 0, 0, 0, 0, 0) for n in itertools.count())
    found = next(plan(gather(rows), rules(ALL), Holds(), ON, Totals()))
    assert [part.uid for part in found.study.series] == ["1.0", "1.1"]
    assert next(rows)[1] == "1.3"


@pytest.mark.parametrize(
    ("due", "total", "text"),
    [
        (0, 0, ""),
        (0, 100, ""),
        (2, 100, ""),
        (3, 100, "3 of 100 studies would go, more than retention.most_percent = 2"),
        (500, 1_000_000, ""),
        (501, 1_000_000, "501 of 1000000 studies would go, more than retention.most_studies = 500"),
        (1, 0, "1 of 0 studies would go, more than retention.most_percent = 2"),
    ],
)
def test_brake(due: int, total: int, text: str) -> None:
    assert brake(due, total, Retention()) == text


def test_brakes_can_ask_always_or_never() -> None:
    assert (
        brake(1, 1_000_000, Retention(most_studies=0))
        == "1 of 1000000 studies would go, more than retention.most_studies = 0"
    )
    assert brake(1, 1_000_000, Retention(most_percent=0))
    assert brake(9, 9, Retention(most_percent=100)) == ""


NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.mark.parametrize(
    ("last_seen", "synchronised", "elapsed", "text"),
    [
        (NOW - HOUR, True, HOUR, ""),
        (NOW - HOUR, False, HOUR, "the clock is not synchronised"),
        (NOW - HOUR, None, HOUR, "whether the clock is synchronised cannot be told"),
        (None, True, None, ""),
        (None, False, None, "the clock is not synchronised"),
        (NOW - 30 * DAY, True, None, ""),
        (NOW - 30 * DAY, True, 30 * DAY, ""),
        (NOW - DAY - HOUR, True, HOUR, ""),
        (NOW - 2 * DAY, True, HOUR, "the clock went ahead by more than a day: it was 2026-11-20T12:00:00Z"),
        (NOW + DAY, True, None, ""),
        (NOW + DAY + HOUR, True, None, "the clock went back by more than a day: it was 2026-11-23T13:00:00Z"),
        (NOW, True, DAY + HOUR, "the clock went back by more than a day: it was 2026-11-22T12:00:00Z"),
    ],
)
def test_clock_brake(
    last_seen: datetime | None, synchronised: bool | None, elapsed: timedelta | None, text: str
) -> None:
    assert clock_brake(NOW, last_seen, synchronised, elapsed) == text


# --- what holds for any study and any rules

MODALITIES, SENDERS, CLASSES = ("CT", "MR", "SR", ""), ("CT1", "MR1", "A,B"), (CT, MR, SR)
days_of_reception = st.dates(date(2005, 1, 1), date(2026, 1, 1))
dates_da = st.one_of(
    st.just(""), st.just("unknown"), some_days.map("{:%Y%m%d}".format), st.sampled_from(["99991231", "00010101"])
)
any_series = st.builds(
    lambda days, modality, kinds: SeriesFacts(
        "1.2.1", modality, tuple(kinds), f"{min(days)}T00:00:00Z", f"{max(days)}T00:00:00Z"
    ),
    st.tuples(days_of_reception, days_of_reception),
    st.sampled_from(MODALITIES),
    st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(SENDERS)), min_size=1, max_size=3, unique=True),
)
any_study = st.builds(
    lambda parts, studied, born: StudyFacts("1.2", tuple(parts), (studied,), (born,)),
    st.lists(any_series, min_size=1, max_size=4), dates_da, dates_da,
)  # fmt: skip


def some(*values: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), max_size=2, unique=True)


any_rule = st.builds(
    lambda patients, until, **given: rule(patients=patients, until_age=until if patients == "minor" else "", **given),
    st.sampled_from(["any", "minor", "adult"]),
    st.sampled_from(["", "P25Y", "P28Y"]),
    keep=periods.map(str),
    counted_from=st.sampled_from(["study", "reception"]),
    modalities=some("CT", "MR", "SR"),
    ae_titles=some(*SENDERS),
    sop_classes=some(*CLASSES),
)
# One that matches whatever it is, so that most studies are due one day.
any_rules = st.lists(any_rule, max_size=4).map(
    lambda found: [rule(name=str(n), **without_name(r)) for n, r in enumerate([rule(keep="P1Y"), *found])]
)


def without_name(given: Rule) -> dict[str, Any]:
    return {key: value for key, value in msgspec.structs.asdict(given).items() if key != "name"}


def due(facts: StudyFacts, given: list[Rule]) -> date:
    """Return the first day on which a study may go, the last of all for never."""
    return decide(facts, rules(*given), ON).due or date.max


@given(any_study, any_rules)
@QUICK
def test_no_study_goes_before_reception_and_its_longest_rule(facts: StudyFacts, given: list[Rule]) -> None:
    for part in facts.series:
        received = parse_reception(part.last)
        assert received is not None
        for one in (r for r in given if r.patients != "minor"):
            compiled = rules(one).rules[0]
            if any(compiled.matches(part, *kind) for kind in part.kinds):
                until = add(received, parse(one.keep))
                assert until is not None
                assert due(facts, given) > until


@given(any_study, any_rules, any_rule)
@QUICK
def test_another_rule_never_makes_a_study_go_earlier(facts: StudyFacts, given: list[Rule], more: Rule) -> None:
    assert due(facts, [*given, rule(name="more", **without_name(more))]) >= due(facts, given)


@given(any_study, any_rules, any_series)
@QUICK
def test_another_series_never_makes_a_study_go_earlier(facts: StudyFacts, given: list[Rule], more: SeriesFacts) -> None:
    longer = msgspec.structs.replace(facts, series=(*facts.series, more))
    assert due(longer, given) >= due(facts, given)


@given(any_study, any_rules)
@QUICK
def test_a_study_date_never_makes_a_study_go_earlier_than_none(facts: StudyFacts, given: list[Rule]) -> None:
    assert due(facts, given) >= due(msgspec.structs.replace(facts, study_dates=("",)), given)


@given(any_study, any_rules, dates_da)
@QUICK
def test_another_study_or_birth_date_beside_never_makes_a_study_go_earlier(
    facts: StudyFacts, given: list[Rule], more: str
) -> None:
    assert due(msgspec.structs.replace(facts, study_dates=(*facts.study_dates, more)), given) >= due(facts, given)
    assert due(msgspec.structs.replace(facts, birth_dates=(*facts.birth_dates, more)), given) >= due(facts, given)


@given(any_study, any_rules, st.randoms(use_true_random=False))
@QUICK
def test_order_means_nothing(facts: StudyFacts, given: list[Rule], shuffle: random.Random) -> None:
    parts, others = list(facts.series), list(given)
    shuffle.shuffle(parts)
    shuffle.shuffle(others)
    assert due(msgspec.structs.replace(facts, series=tuple(parts)), others) == due(facts, given)


@given(any_study, st.lists(any_rule, max_size=1), st.dates())
@QUICK
def test_what_is_due_stays_due(facts: StudyFacts, given: list[Rule], on: date) -> None:
    found = decide(facts, rules(*given), on)
    assert (found.kind is Kind.DUE) is (found.due is not None and on >= found.due)


# --- a second opinion on every study of a store

RULES = """
minor_age = "P18Y"
[[rules]]
name = "ct and mr"
modalities = ["CT", "MR"]
keep = "P10Y"
[[rules]]
name = "mammography"
modalities = ["MG"]
keep = "P15Y"
counted_from = "reception"
[[rules]]
name = "minors"
patients = "minor"
keep = "P1M"
until_age = "P28Y"
[[rules]]
name = "adults' reports"
patients = "adult"
sop_classes = ["1.2.840.10008.5.1.4.1.1.88.11"]
keep = "P1Y6M1D"
[[rules]]
name = "a trial"
ae_titles = ["TRIAL, 2", "MR1"]
keep = "P2W"
[[rules]]
name = "for ever"
modalities = ["XA"]
keep = "P9999Y"
"""
RECEPTIONS = (
    "2012-02-29",
    "2016-02-29",
    "2015-12-31",
    "2016-11-22",
    "2025-01-31",
    "2026-10-31",
    "2026-11-08",
    "2024-05-22",
)
DATES = ("", "bad", "20120229", "19600229", "19980622", "2008.06.15", "19000101", "20080229", "20301231", "20100101")


def generated(count: int) -> list[retention_check.Study]:
    """Return studies as different as can be, the same ones each time; most of their instances are plain."""
    chance = random.Random(7)
    found = []
    for number in range(count):
        instances = []
        for part in range(chance.choice([1, 1, 2, 3])):
            modality = chance.choice(["CT", "CT", "MR", "MG", "SR", "XA", "US"])
            at = chance.choice(RECEPTIONS)
            for _ in range(chance.choice([1, 1, 2])):
                day = chance.choice([at, at, chance.choice(RECEPTIONS)])
                odd = chance.random()
                instances.append(
                    retention_check.Instance(
                        f"1.2.{number}.{part}",
                        modality,
                        chance.choice(CLASSES),
                        chance.choice(["CT1", "MR1", "TRIAL, 2"]),
                        f"{day}T0{chance.randrange(10)}:00:00Z"
                        if odd < 0.99
                        else chance.choice(["", "2016-06-15", "9"]),
                        chance.choice(["quarantined", "conflict", "pending"]) if odd < 0.03 else "held",
                        odd > 0.97,
                        0.95 < odd < 0.96,
                    )
                )
        found.append(
            retention_check.Study(
                f"1.2.{number}", chance.choice(DATES), chance.choice(DATES), f"P{chance.randrange(40)}",
                chance.choice(["", "H1", "H2"]), instances,
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[retention_check.Study]]]:
    """Return a connection to an index that holds generated studies, in the tables of the product."""
    path, key = tmp_path_factory.mktemp("index") / "index.db", (bytes(32), bytes(16))
    Index(path, key, migrate=True).close()
    studies = generated(2000)
    database = connect(path, key)
    tables: dict[str, list[dict[str, Any]]] = {"pack": [], "study": [], "series": [], "instance": [], "unreadable": []}
    for one in studies:
        tables["study"].append(
            {"uid": one.uid, "study_date": one.study_date, "patient_birth_date": one.birth_date,
             "patient_id": one.patient_id, "patient_id_issuer": one.issuer}
        )  # fmt: skip
        for part, modality in dict.fromkeys((i.series, i.modality) for i in one.instances):
            tables["series"].append({"study": one.uid, "uid": part, "modality": modality})
        for number, instance in enumerate(one.instances):
            pack = f"{one.uid}/{number}" if instance.incoming or instance.unreadable else one.uid
            rows = sum(row["id"] == pack for row in tables["pack"][-len(one.instances) :])
            if not rows:
                place = "incoming" if instance.incoming else "objects"
                tables["pack"].append({"id": pack, "place": place, "study": one.uid, "length": 5000 + number})
            offset = 4096 * (1 + sum(row["pack"] == pack for row in tables["instance"][-len(one.instances) :]))
            tables["instance"].append(
                {"pack": pack, "offset": offset, "study": one.uid, "series": instance.series, "state": instance.state,
                 "uid": f"{one.uid}.{number}", "sop_class": instance.sop_class, "calling": instance.calling,
                 "received_at": instance.received_at}
            )  # fmt: skip
            if instance.unreadable:
                tables["unreadable"].append({"pack": pack, "offset": 8192})
    database.execute("BEGIN")
    for table, rows_of in tables.items():
        names = [f'"{name}"' for name in rows_of[0]]
        database.conn.executemany(
            f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            [list(row.values()) for row in rows_of],
        )
    database.execute("COMMIT")
    yield database.conn, studies
    database.conn.close()


def test_a_second_implementation_agrees_on_every_study_and_its_first_day(store: Any) -> None:
    connection, studies = store
    configuration = tomllib.loads(RULES)
    wanted = Rules(msgspec.convert(configuration, Retention))
    named = ({"1.2.11", "1.2.12"}, {("P3", ""), ("P7", "H1")})
    holds = Holds(*named)
    totals = Totals()
    seen = {}
    by_uid = {one.uid: one for one in studies}
    for outcome in plan(gather(connection.execute(studyfacts.ALL)), wanted, holds, ON, totals):
        one, first = by_uid.pop(outcome.study.uid), outcome.verdict.due
        around = [first - timedelta(days=1), first] if first else [date.max]
        for on in (ON, *around):
            kind = assess(outcome.study, wanted, holds, on).kind
            expected = retention_check.verdict(one, configuration, named, (on.year, on.month, on.day))
            assert kind == expected, (one, on, outcome.verdict)
            seen[on == ON, expected] = True
    assert not by_uid
    # Each kind of answer was given, today and at the edges.
    assert {expected for _, expected in seen} == {str(kind) for kind in Kind}
    assert totals.studies == len(studies)


def test_the_space_of_a_study_is_that_of_its_packs(store: Any) -> None:
    connection, _ = store
    rows = connection.execute("SELECT study, count(*), sum(length) FROM pack GROUP BY study").fetchall()
    found = {one.uid: (one.packs, one.space) for one in gather(connection.execute(studyfacts.ALL))}
    assert found == {uid: (packs, space) for uid, packs, space in rows}


def test_one_study_is_gathered_as_among_all(store: Any) -> None:
    connection, _ = store
    among = {one.uid: one for one in gather(connection.execute(studyfacts.ALL))}
    for uid in list(among)[:5]:
        assert list(gather(connection.execute(studyfacts.ONE, [uid]))) == [among[uid]]


def test_the_statement_reads_in_the_order_of_an_index_and_sorts_nothing(store: Any) -> None:
    connection, _ = store
    steps = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {studyfacts.ALL}")]
    assert any("SCAN i USING INDEX" in step for step in steps)
    assert not [step for step in steps if "TEMP B-TREE FOR" in step and "DISTINCT" not in step]


def test_what_nobody_knows_described_or_dated_is_counted(tmp_path: Path) -> None:
    key = (bytes(32), bytes(16))
    Index(tmp_path / "index.db", key, migrate=True).close()
    connection = connect(tmp_path / "index.db", key).conn
    connection.execute("INSERT INTO pack (id, place, study, length) VALUES ('p', 'quarantine', '1', 9000)")
    first, between, last = "2016-06-15T10:00:00Z", "2016-06-15T10:00:01+00:00", "2016-06-16T10:00:00.5Z"
    for number, (state, at) in enumerate([("new", last), ("quarantined", between), ("quarantined", first)], 1):
        connection.execute(
            'INSERT INTO instance (pack, "offset", study, series, uid, sop_class, calling, received_at, state)'
            " VALUES ('p', ?, '1', '1.1', '1', '1.2', 'A  B', ?, ?)",
            [4096 * number, at, state],
        )
    (found,) = gather(connection.execute(studyfacts.ALL))
    connection.close()
    part = SeriesFacts("1.1", "", (("1.2", "A  B"),), first, last, undated=1)
    assert found == StudyFacts("1", (part,), ("",), ("",), instances=3, packs=1, space=9000, quarantined=2, unknown=1)
    assert decide(found, rules(ALL), date.max).kind is Kind.BLOCKED


# --- the page


def examples() -> list[dict[str, Any]]:
    blocks = re.findall(r"```toml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    return [tomllib.loads(block)["retention"] for block in blocks]


def test_the_examples_of_the_page_are_read_without_error() -> None:
    assert len(examples()) >= 2
    for example in examples():
        found, wrong = convert(example, Retention, "retention.")
        assert wrong == []
        assert errors(found) == []


def test_every_key_is_on_the_page_and_explained() -> None:
    text = DOCS.read_text("utf-8")
    for kind in (Retention, Rule):
        for field in msgspec.structs.fields(kind):
            assert f"`{field.name}`" in text, field.name
            assert kind is Rule or f"retention.{field.name}" in EXPLAINED
    # What a new configuration file shows of a rule is one that can be used.
    shown = "\n".join(line for line in EXPLAINED["retention.rules"].split("\n") if line.startswith("    "))
    found = msgspec.convert(tomllib.loads(shown)["retention"], Retention)
    assert errors(found) == []
    assert {name for name in Rule.__struct_fields__ if name not in shown} == set()
