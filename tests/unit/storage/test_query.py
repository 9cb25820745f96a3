"""Queries of the index by DICOM's rules: what is found, in which order, and what is counted, beside a naive answer."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import attributes, indexschema
from storage.attributes import Attributes, Element, Received
from storage.index import Index, Row
from storage.matching import TEXT_LIMIT, VALUES_LIMIT
from storage.pack import PAGE, Frame
from storage.packfile import Record
from storage.query import COMBINED_DATETIME, FUZZY, LEVELS, SUPPORTED, Query, QueryError, Scope, statement
from storage.search import Filters
from storage.sqlite import Database, connect

KEY = (bytes(range(32)), bytes(range(16)))
CT, MR, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.88.11"
SYNTAX = "1.2.840.10008.1.2.1"
ALL = Scope()

NAME, PATIENT, ISSUER, BORN, SEX = "00100010", "00100020", "00100021", "00100030", "00100040"
STUDY, DATE, TIME, ACCESSION, MODALITIES = "0020000D", "00080020", "00080030", "00080050", "00080061"
CLASSES, DESCRIPTION, STUDY_ID = "00080062", "00081030", "00200010"
REFERRER, TIMEZONE, STEP_DATE, STEP_TIME, BITS = "00080090", "00080201", "00400244", "00400245", "00280100"
SERIES, MODALITY, SERIES_NUMBER, BODY_PART = "0020000E", "00080060", "00200011", "00180015"
INSTANCE, CLASS, NUMBER, ROWS = "00080018", "00080016", "00200013", "00280010"
SERIES_DATE, SERIES_TIME, STATION, SERIES_DESCRIPTION = "00080021", "00080031", "00081010", "0008103E"
STUDIES_OF_PATIENT, SERIES_OF_PATIENT, INSTANCES_OF_PATIENT = "00201200", "00201202", "00201204"
SERIES_OF_STUDY, INSTANCES_OF_STUDY, INSTANCES_OF_SERIES = "00201206", "00201208", "00201209"
COUNTS = {
    STUDIES_OF_PATIENT, SERIES_OF_PATIENT, INSTANCES_OF_PATIENT,
    SERIES_OF_STUDY, INSTANCES_OF_STUDY, INSTANCES_OF_SERIES,
}  # fmt: skip
UID = {"PATIENT": PATIENT, "STUDY": STUDY, "SERIES": SERIES, "IMAGE": INSTANCE}


class Instance(NamedTuple):
    """An instance as it is put into the index: ``said`` by tag, a name with '=' between its groups."""

    said: dict[str, str]
    state: str = "held"
    calling: str = "CT1"


class Store:
    """An index, filled with instances."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index(path, KEY, migrate=True)
        self._numbers = itertools.count(1)

    def fill(self, instances: Iterable[Instance]) -> None:
        """Let these be all that is in the index."""
        self.index.begin_anew()
        with self.index.filling():
            for instance in instances:
                self.put(instance)

    def put(self, instance: Instance) -> None:
        number = next(self._numbers)
        said = {CLASS: CT, **instance.said}
        dataset = {tag: Element("LO", [text]) for tag, text in said.items() if text}
        for tag in (NAME, REFERRER):
            if name := dataset.pop(tag, None):
                groups = zip(("Alphabetic", "Ideographic", "Phonetic"), str(name.Value[0]).split("="), strict=False)
                dataset[tag] = Element("PN", [{group: text for group, text in groups if text}])
        received = Received("2026-01-31T10:00:00Z", "ab12", instance.calling, "STRONGROOM", "192.0.2.1", "")
        frame = Frame(number * PAGE, number.to_bytes(16, "big"), 72, 72)
        record = Record(frame, Attributes(1, SYNTAX, dataset, {}, received))
        self.index.add(f"pack-{said[STUDY]}", said[STUDY], [Row(record, instance.state)], 0)

    def ask(self, level: str, scope: Scope = ALL, *, wants: Iterable[str] = (), limit: int = 0, offset: int = 0,
            **match: Any) -> list[dict[str, list[str]]]:  # fmt: skip
        """Return what a query finds; keys are ``T`` and the tag, with one value or a list of them."""
        keys = {tag[1:]: [text] if isinstance(text, str) else text for tag, text in match.items()}
        return list(self.index.query(Query(level, keys, list(wants), limit=limit, offset=offset), scope))

    def find(self, level: str, tag: str, *values: str, scope: Scope = ALL) -> list[str]:
        """Return the unique keys of what one key finds."""
        rows = self.index.query(Query(level, {tag: list(values)}, [UID[level]]), scope)
        return ["".join(row[UID[level]]) for row in rows]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store(tmp_path_factory.mktemp("query") / "index.db")
    yield made
    made.index.close()


@pytest.fixture
def store(kept: Store) -> Store:
    kept.index.begin_anew()
    return kept


def study(uid: str, **said: str) -> Instance:
    """Return an instance that is all of its study; ``said``: ``T`` and the tag."""
    own = {STUDY: uid, SERIES: f"{uid}.1", INSTANCE: f"{uid}.9"}
    return Instance(own | {tag[1:]: text for tag, text in said.items()})


# --- the same, naively: in Python, over the instances


class Naive:
    """Answers queries by looking at every instance, with other means than the index has."""

    def __init__(self, instances: list[Instance], scope: Scope) -> None:
        self.seen = [
            instance.said
            for instance in instances
            if instance.state == "held"
            and (not scope.ae_titles or instance.calling in scope.ae_titles)
            and (not scope.modalities or instance.said.get(MODALITY, "") in scope.modalities)
        ]

    def ask(self, query: Query) -> list[dict[str, list[str]]]:
        found: dict[Any, dict[str, str]] = {}
        # The study with the first UID is the one that describes a patient.
        for one in sorted(self.seen, key=lambda said: said[STUDY]):
            if query.level == "PATIENT" and not one[PATIENT]:
                continue
            if all(self._matches(query.level, one, tag, values) for tag, values in query.match.items()):
                found.setdefault(self._entity(query.level, one), one)
        rows = sorted(found.values(), key=ORDER[query.level])
        rows = rows[query.offset :][: query.limit or None]
        return [{tag: self._values(query.level, row, tag) for tag in [*query.match, *query.wants]} for row in rows]

    def _entity(self, level: str, one: dict[str, str]) -> tuple[str, ...]:
        if level == "PATIENT":
            return one[PATIENT], one[ISSUER]
        tags = {"STUDY": (STUDY,), "SERIES": (STUDY, SERIES), "IMAGE": (INSTANCE,)}[level]
        return tuple(one[tag] for tag in tags)

    def _among(self, level: str, one: dict[str, str]) -> list[dict[str, str]]:
        return [other for other in self.seen if self._entity(level, other) == self._entity(level, one)]

    def _values(self, level: str, one: dict[str, str], tag: str) -> list[str]:
        if tag not in SUPPORTED[level]:
            return []
        if tag in {MODALITIES, CLASSES}:
            of = MODALITY if tag == MODALITIES else CLASS
            return sorted({other[of] for other in self._among("STUDY", one) if other[of]})
        if tag in COUNTS:
            what = {"0": STUDY, "2": SERIES, "4": INSTANCE, "6": SERIES, "8": INSTANCE, "9": INSTANCE}[tag[-1]]
            within = "PATIENT" if int(tag[-1]) < 5 else "SERIES" if tag[-1] == "9" else "STUDY"
            if within == "PATIENT" and not one[PATIENT]:
                return []
            # A series' UID counts within its study.
            return [str(len({(other[STUDY], other[what]) for other in self._among(within, one)}))]
        text = SYNTAX if tag == "00083002" else one.get(tag, "")
        return [text] if text else []

    def _matches(self, level: str, one: dict[str, str], tag: str, values: list[str]) -> bool:
        values = [value.strip(" ") for value in values if value.strip(" ")]
        if not values or tag not in SUPPORTED[level] or tag in COUNTS:
            return True
        held = self._values(level, one, tag) or [""]
        return any(MATCHERS[SUPPORTED[level][tag].vr](value, text) for value in values for text in held)


def cast(text: str) -> int:
    found = re.match(r"[+-]?[0-9]+", text)
    return int(found[0]) if found else 0


def dated(one: dict[str, str]) -> tuple[str, ...]:
    return one[DATE], one[TIME], one[STUDY]


ORDER: dict[str, Callable[[dict[str, str]], Any]] = {
    "PATIENT": lambda one: (one[PATIENT], one[ISSUER]),
    "STUDY": dated,
    "SERIES": lambda one: (dated(one), cast(one[SERIES_NUMBER]), one[SERIES]),
    "IMAGE": lambda one: (dated(one), cast(one[SERIES_NUMBER]), one[SERIES], cast(one[NUMBER]), one[INSTANCE]),
}


def pattern(key: str) -> re.Pattern[str]:
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(char, re.escape(char)) for char in key), re.DOTALL)


def plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().rstrip("^ ")


def name_matches(key: str, text: str) -> bool:
    groups = [plain(group) for group in (text + "==").split("=")[:3]]
    if "=" in key:
        asked = [group for group in enumerate(key.split("=")) if plain(group[1])]
        return all(group_matches(wanted, groups[place]) for place, wanted in asked)
    return not plain(key) or any(group_matches(key, group) for group in groups)


def group_matches(key: str, group: str) -> bool:
    forms = [plain(key)] + ([plain(key) + "^*"] if not set("^*") & set(key) else [])
    return any(pattern(form).fullmatch(group) for form in forms)


def ends(key: str) -> tuple[str, str]:
    first, dash, last = key.partition("-")
    return first, last if dash else first


def day_matches(key: str, text: str) -> bool:
    first, last = ends(key)
    return bool(re.fullmatch("[0-9]{8}", text)) and int(first or "0") <= int(text) <= int(last or "99999999")


def time_matches(key: str, text: str) -> bool:
    def moment(text: str, missing: int) -> list[int]:
        digits = text.replace(".", "")
        parts = [int(digits[place : place + 2]) if digits[place:] else missing for place in (0, 2, 4)]
        return [*parts, int(digits[6:].ljust(6, str(missing)[:1]))]

    if not re.fullmatch(r"[0-9]{2}([0-9]{2}([0-9]{2}(\.[0-9]+)?)?)?", text):
        return False
    first, last = ends(key)
    return moment(first, 0) <= moment(text, 0) <= moment(last, 99)


def number_matches(key: str, text: str) -> bool:
    return bool(re.fullmatch("[+-]?[0-9]+", text)) and int(key) == int(text)


def text_matches(key: str, text: str) -> bool:
    return bool(pattern(key).fullmatch(text))


MATCHERS: dict[str, Callable[[str, str], bool]] = {
    "PN": name_matches, "DA": day_matches, "TM": time_matches, "IS": number_matches, "US": number_matches,
    "UI": lambda key, text: key == text, "LO": text_matches, "SH": text_matches, "CS": text_matches,
}  # fmt: skip

# Few values of each kind, so that keys hit; what is held is not always well formed.
HELD = {
    "PN": [
        "",
        "Doe^Jane",
        "DOE^JOHN",
        "Doe",
        "Do[e]^A*",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "=山田^花子",
        "Straße^B",
    ],
    "LO": ["", "A1", "a1", "A[1]", "A 1", "B22"],
    "CS": ["", "CT", "MR", "SR"],
    "DA": ["", "20260101", "20260131", "20251231", "2026.01.31", "2026"],
    "TM": ["", "10", "1030", "103000", "103000.5", "103059.999999", "1031", "093060", "10:30", "noon"],
    "IS": ["", "1", "01", "+2", "-2", "10", "x", "x1", "1-2"],
}
ASKED = {
    "PN": ["*", "doe*", "DOE", "doe^j*", "D?e", "*[E]*", "山田*", "=山田", "Yamada==やまだ*", "strasse", "*^J???", "^"],
    "LO": ["A1", "A*", "?1", " A1 ", "A[1]", "[AB]1", "*", "*2*"],
    "CS": ["CT", "MR", "?R", "*", "XX"],
    "DA": ["20260101", "20260101-20260131", "20260115-", "-20260101", "20260131-20260101", " 20260101 - 20260102 "],
    "TM": ["10", "1030", "103000", "103000.50", "1030-1031", "1030-", "-103000", "103059.9", "0930-0931", "11-10"],
    "IS": ["1", "001", "+2", "-2", "10", "0"],
}
HELD["SH"], ASKED["SH"], HELD["US"], ASKED["US"] = HELD["LO"], ASKED["LO"], ["", "8", "512"], ["8", "0512", "9"]
UIDS = {STUDY: ["1.1", "1.2", "1.3", "1.4", "1.5"], SERIES: ["2.1", "2.2", "2.3"], CLASS: [CT, MR, SR]}
OF_LEVEL = {
    level: {tag: a for tag, a in SUPPORTED[level].items() if a.tested and tag not in SUPPORTED.get(above, {})}
    for above, level in itertools.pairwise(["", *LEVELS])
}
OPTIONAL = ["00081060", "00081050"]


@st.composite
def stores(draw: st.DrawFn) -> list[Instance]:
    """Instances of a few studies, series and patients: what belongs to a study is the same in all of its instances."""

    def said(level: str) -> dict[str, str]:
        own = {tag: a.vr for tag, a in OF_LEVEL[level].items() if a.vr in HELD and tag != MODALITIES}
        return {tag: draw(st.sampled_from(HELD[vr])) for tag, vr in own.items()}

    made = []
    numbers = itertools.count(1)
    for study_uid in draw(st.lists(st.sampled_from(UIDS[STUDY]), min_size=1, max_size=5, unique=True)):
        of_study = {STUDY: study_uid, **said("PATIENT"), **said("STUDY")}
        for series_uid in draw(st.lists(st.sampled_from(UIDS[SERIES]), min_size=1, max_size=3, unique=True)):
            of_series = {SERIES: series_uid, **said("SERIES")}
            for _ in range(draw(st.integers(1, 3))):
                own = {INSTANCE: f"3.{next(numbers)}", CLASS: draw(st.sampled_from(UIDS[CLASS])), **said("IMAGE")}
                state = draw(st.sampled_from(["held", "held", "held", "again", "quarantined"]))
                made.append(Instance(of_study | of_series | own, state, draw(st.sampled_from(["CT1", "MR1"]))))
    return made


def values_of(tag: str, vr: str) -> st.SearchStrategy[list[str]]:
    if vr == "UI":
        known = {**UIDS, CLASSES: UIDS[CLASS], INSTANCE: ["3.1", "3.2", "3.3"], "00083002": [SYNTAX, CT]}[tag]
        return st.lists(st.sampled_from([*known, ""]), max_size=3)
    one = st.sampled_from(ASKED[vr])
    return st.one_of(one.map(lambda text: [text]), st.just([]), st.just([""]), st.lists(one, max_size=3))


@st.composite
def queries(draw: st.DrawFn) -> Query:
    level = draw(st.sampled_from(LEVELS))
    known = {tag: a.vr for tag, a in SUPPORTED["IMAGE"].items() if a.tested}
    tags = draw(st.lists(st.sampled_from([*known, *COUNTS, *OPTIONAL]), max_size=3, unique=True))
    match = {tag: draw(values_of(tag, known[tag])) if tag in known else ["x"] for tag in tags}
    wants = draw(st.lists(st.sampled_from([*SUPPORTED["IMAGE"], *OPTIONAL]), max_size=6))
    limit, offset = draw(st.sampled_from([(0, 0), (0, 0), (2, 0), (1, 1), (0, 2)]))
    return Query(level, match, [*wants, UID[level]], limit=limit, offset=offset)


SCOPES = [ALL, Scope(["CT1"]), Scope([], ["CT"]), Scope(["MR1", "CT1"], ["MR", ""]), Scope(["nobody"])]


@settings(deadline=None, derandomize=True, max_examples=120)
@given(stores(), st.lists(queries(), min_size=15, max_size=15), st.sampled_from(SCOPES))
def test_any_query_of_any_store_finds_what_a_look_at_every_instance_finds(
    kept: Store, instances: list[Instance], asked: list[Query], scope: Scope
) -> None:
    kept.fill(instances)
    naive = Naive(instances, scope)
    for query in asked:
        assert list(kept.index.query(query, scope)) == naive.ask(query), query


# --- each rule by itself


def test_names_are_matched_without_case_in_every_component_group(store: Store) -> None:
    names = {
        "1.1": "Müller^Jürgen", "1.2": "Doe^Jane^Ann", "1.3": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "1.4": "[Test]^A*", "1.5": "=山田^花子", "1.6": "",
    }  # fmt: skip
    store.fill(study(uid, T00100010=name) for uid, name in names.items())
    for key, found in {
        "MÜLLER": "1.1", "mu\u0308ller^jürgen": "1.1", "müller^jürgen^^^": "1.1", "Müll": "", "Doe^Jane": "",
        "doe": "1.2", "DOE^*": "1.2", "*jane*": "1.2", "D?E": "1.2", "山田": "1.3 1.5", "*太郎": "1.3", "やまだ": "1.3",
        "=山田": "1.3 1.5", "yamada=山田*": "1.3", "=yamada": "", "yamada==やまだ": "1.3", "=山田=": "1.3 1.5",
        "[test]": "1.4", "[T]est": "", "*": "1.1 1.2 1.3 1.4 1.5 1.6", "*=*": "1.1 1.2 1.3 1.4 1.5 1.6",
        " doe ": "1.2", "＊jane＊": "1.2", "^": "1.1 1.2 1.3 1.4 1.5 1.6",
    }.items():  # fmt: skip
        assert store.find("STUDY", NAME, key) == found.split(), key
    (row,) = store.ask("STUDY", T00100010="yamada")
    assert row == {NAME: ["Yamada^Tarou=山田^太郎=やまだ^たろう"]}


def test_text_is_matched_with_case_and_wildcards_and_spaces_around_it_mean_nothing(store: Store) -> None:
    ids = {"1.1": "A1", "1.2": "a1", "1.3": "A[1]", "1.4": "A 1", "1.5": ""}
    store.fill(study(uid, T00100020=text) for uid, text in ids.items())
    for key, found in {
        "A1": "1.1", " A1": "1.1", "A1  ": "1.1", "A1\0": "1.1", "a1": "1.2", "A*": "1.1 1.3 1.4", "?1": "1.1 1.2",
        "A[1]": "1.3", "A[*": "1.3", "[A]1": "", "A?1": "1.4", "*": "1.1 1.2 1.3 1.4 1.5", "?*": "1.1 1.2 1.3 1.4",
        "": "1.1 1.2 1.3 1.4 1.5", "' OR 1 --": "",
    }.items():  # fmt: skip
        assert store.find("STUDY", PATIENT, key) == found.split(), key
    # One of several, where any of them matches everything if it does; empty ones are no values.
    assert store.find("STUDY", PATIENT, "A1", "a*") == ["1.1", "1.2"]
    assert store.find("STUDY", PATIENT, "", "a1") == ["1.2"]
    assert len(store.find("STUDY", PATIENT, "a1", "*")) == 5


def test_dates_are_matched_one_by_one_and_in_ranges(store: Store) -> None:
    dates = {"1.1": "20260101", "1.2": "20260115", "1.3": "20260131", "1.4": "", "1.5": "2026.01.15", "1.6": "20260"}
    store.fill(study(uid, T00080020=text) for uid, text in dates.items())
    for key, found in {
        "20260115": "1.2", "20260101-20260115": "1.1 1.2", "20260115-": "1.2 1.3", "-20260115": "1.1 1.2",
        "20260131-20260101": "", "20260101 - 20260114": "1.1", "00000000-99999999": "1.1 1.2 1.3",
    }.items():  # fmt: skip
        assert store.find("STUDY", DATE, key) == found.split(), key
    assert store.find("STUDY", DATE, "20260101", "20260131-") == ["1.1", "1.3"]


def test_a_time_stands_for_every_moment_that_its_digits_begin(store: Store) -> None:
    times = ["10", "1030", "103000", "103000.25", "103059.999999", "1031", "235960", "", "10:30:00", "noon"]
    store.fill(study(f"1.{number}", T00080030=text) for number, text in enumerate(times))
    for key, found in {
        "1030": "1030 103000 103000.25 103059.999999", "103000": "1030 103000 103000.25", "103000.00": "1030 103000",
        "103000.2": "103000.25", "10": "10 1030 103000 103000.25 103059.999999 1031", "1031": "1031",
        "1030-1031": "1030 103000 103000.25 103059.999999 1031", "103001-": "103059.999999 1031 235960",
        "-1030": "10 1030 103000 103000.25 103059.999999", "-103000": "10 1030 103000 103000.25", "1031-1030": "",
        "235960": "235960",
    }.items():  # fmt: skip
        assert {times[int(uid[2:])] for uid in store.find("STUDY", TIME, key)} == set(found.split()), key


def test_dates_and_times_are_matched_each_by_itself(store: Store) -> None:
    assert not COMBINED_DATETIME
    store.fill([study("1.1", T00080020="20260102", T00080030="0900"), study("1.2", T00080020="20260102")])
    keys = {"T00080020": "20260101-20260103", "T00080030": "1000-1200"}
    assert store.ask("STUDY", **keys) == []


def test_numbers_are_compared_as_numbers(store: Store) -> None:
    numbers = ["1", "01", "+1", "-1", "10", "", "x", "1x", "x1", "--1", "99999999999999999999"]
    store.fill(study(f"1.{place}", T00200011=text) for place, text in enumerate(numbers))
    for key, found in {"1": "1 01 +1", "001": "1 01 +1", " +1 ": "1 01 +1", "-01": "-1", "0": "", "10": "10"}.items():
        rows = store.ask("SERIES", T00200011=key)
        assert [text for row in rows for text in row[SERIES_NUMBER]] == found.split(), key


def test_thousands_of_uids_are_a_list_of_which_one_matches(store: Store) -> None:
    store.fill(study(f"1.{number}") for number in range(9))
    assert store.find("STUDY", STUDY, "1.2", "1.4", "9.9", "") == ["1.2", "1.4"]
    assert store.find("STUDY", STUDY, *(f"1.{number}" for number in range(3, 20_000))) == [
        f"1.{n}" for n in range(3, 9)
    ]
    assert store.find("IMAGE", SERIES, "1.3.1 ") == ["1.3.9"]
    assert store.find("IMAGE", INSTANCE, "1.3.9\0", "1.4.9") == ["1.3.9", "1.4.9"]
    assert store.find("STUDY", STUDY, "1") == []


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        *((STUDY, value) for value in ("1.2.*", "1.2?", "*", "abc", "1..2", "1.2\\1.3", "1" * 65)),
        *((DATE, value) for value in ("*", "2025*", "2025", "2025-01-01", "-", "20250101-2", "20250101--")),
        *((TIME, value) for value in ("*", "10*", "1", "103", "24", "1060", "103061", "10:30", "1030.5", "-", "10.")),
        *((SERIES_NUMBER, value) for value in ("*", "1-2", "x", "1.0", "1?", "999999999999", "٣")),
        *((NAME, value) for value in ("a=b=c=d", "a\nb", "a\0b", "\ud800", "a" * (TEXT_LIMIT + 1))),
        *((PATIENT, value) for value in ("a\x7f", "\udfff", "a" * (TEXT_LIMIT + 1))),
    ],
)  # fmt: skip
def test_a_value_that_breaks_a_rule_is_an_error_that_names_the_tag_and_never_the_value(tag: str, value: str) -> None:
    with pytest.raises(QueryError) as caught:
        statement(Query("IMAGE", {tag: [value]}), ALL)
    assert str(caught.value).startswith(f"key {tag}: ")
    assert len(value) < 2 or value not in str(caught.value)
    assert caught.value.__suppress_context__


def test_what_is_no_query_is_an_error(store: Store) -> None:
    for broken, why in [
        (Query("IMAGES", {}), "level"),
        (Query("STUDY", {"0008002": ["1"]}), "tag"),
        (Query("STUDY", {}, ["0008103e"]), "tag"),
        (Query("STUDY", {}, ['00080020" --']), "tag"),
        (Query("STUDY", {}, limit=-1), "limit"),
        (Query("STUDY", {}, offset=2**63), "limit"),
        (Query("STUDY", {PATIENT: ["a"] * (VALUES_LIMIT + 1)}), "at most"),
    ]:
        # Before the first row is asked for.
        with pytest.raises(QueryError, match=why):
            store.index.query(broken, ALL)


def test_as_many_names_as_a_key_may_have_are_a_statement(store: Store) -> None:
    store.fill([study("1.1", T00100010="Doe^Jane")])
    names = [f"nobody{number}=*{number}=x*" for number in range(VALUES_LIMIT - 1)]
    assert store.find("STUDY", NAME, *names, "doe") == ["1.1"]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.sampled_from(sorted(SUPPORTED["IMAGE"])), st.lists(st.text(max_size=30), max_size=3))
def test_any_text_is_a_key_or_the_one_error(kept: Store, tag: str, values: list[str]) -> None:
    try:
        found = kept.index.query(Query("IMAGE", {tag: values}), ALL)
    except QueryError:
        return
    assert all(set(row) == {tag} for row in found)


def test_a_key_that_the_index_has_not_is_ignored_and_returned_without_values(store: Store) -> None:
    store.fill([study("1.1", T00080060="CT", T00200011="1")])
    (row,) = store.ask(
        "STUDY", T00081050="x*", T00080060="MR", T00200013="9", T00201208="77", wants=["7FE00010", STUDY]
    )
    assert row == {
        "00081050": [], MODALITY: [], NUMBER: [], INSTANCES_OF_STUDY: ["1"], "7FE00010": [], STUDY: ["1.1"],
    }  # fmt: skip
    many = [f"0011{number:04X}" for number in range(5000)]
    assert store.ask("IMAGE", wants=many) == [{tag: [] for tag in many}]


def test_every_attribute_can_be_matched_and_returned_from_its_level_on(store: Store) -> None:
    said = {
        NAME: "Doe^Jane", PATIENT: "P1", ISSUER: "HOSPITAL", BORN: "19700101", SEX: "F", DATE: "20260131",
        TIME: "103000", ACCESSION: "A1", DESCRIPTION: "Chest", STUDY_ID: "S1", STUDY: "1.1", SERIES: "1.1.1",
        SERIES_DATE: "20260130", SERIES_TIME: "11", MODALITY: "CT", STATION: "ST", SERIES_DESCRIPTION: "Axial",
        BODY_PART: "CHEST", SERIES_NUMBER: "3", CLASS: CT, INSTANCE: "1.1.1.9", NUMBER: "4", "00280008": "5",
        ROWS: "512", "00280011": "256", REFERRER: "Roe^Ann", TIMEZONE: "+0100", STEP_DATE: "20260129", STEP_TIME: "09",
        BITS: "16",
    }  # fmt: skip
    store.fill([Instance(said)])
    computed = {MODALITIES: "CT", CLASSES: CT, "00083002": SYNTAX, **dict.fromkeys(COUNTS, "1")}
    assert set(SUPPORTED["IMAGE"]) == {*said, *computed}
    for level in LEVELS:
        expected = {tag: [(said | computed)[tag]] for tag in SUPPORTED[level]}
        assert store.ask(level, wants=SUPPORTED[level]) == [expected]
        keys = {f"T{tag}": values for tag, values in expected.items()}
        assert store.ask(level, **keys) == [expected]
        for tag, attribute in SUPPORTED[level].items():
            assert bool(attribute.matching) == (tag not in {*COUNTS, TIMEZONE})
            if attribute.matching:
                other = {"DA": "20000101", "TM": "01", "IS": "7", "US": "7", "UI": "9.9"}.get(attribute.vr, "nobody")
                assert store.ask(level, **keys | {f"T{tag}": other}) == [], tag


# --- who sees what


def several() -> list[Instance]:
    """Return two studies of one patient: CT of two devices and SR, and MR."""
    made = []
    for uid, series, modality, kind, calling, count in [
        ("1.1", "1.1.1", "CT", CT, "CT1", 3),
        ("1.1", "1.1.1", "CT", CT, "CT2", 1),
        ("1.1", "1.1.2", "SR", SR, "CT1", 1),
        ("1.2", "1.2.1", "MR", MR, "MR1", 2),
    ]:
        for _ in range(count):
            said = {
                STUDY: uid,
                SERIES: series,
                MODALITY: modality,
                CLASS: kind,
                PATIENT: "P1",
                INSTANCE: f"9.{len(made)}",
            }
            made.append(Instance(said, "held", calling))
    return made


EVERYTHING = [
    STUDIES_OF_PATIENT, SERIES_OF_PATIENT, INSTANCES_OF_PATIENT, SERIES_OF_STUDY, INSTANCES_OF_STUDY, MODALITIES,
    CLASSES, STUDY,
]  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "seen"),
    [
        (ALL, [("2 3 7", "2 5", "CT SR", f"{CT} {SR}", "1.1"), ("2 3 7", "1 2", "MR", MR, "1.2")]),
        (Scope(["CT1"]), [("1 2 4", "2 4", "CT SR", f"{CT} {SR}", "1.1")]),
        (Scope(["CT2"]), [("1 1 1", "1 1", "CT", CT, "1.1")]),
        (Scope([], ["SR"]), [("1 1 1", "1 1", "SR", SR, "1.1")]),
        (Scope(["CT2"], ["SR"]), []),
        (Scope(["CT1", "MR1"], ["SR", "MR"]), [("2 2 3", "1 1", "SR", SR, "1.1"), ("2 2 3", "1 2", "MR", MR, "1.2")]),
        (Scope(["ct1"]), []),
        (Scope(["CT1' OR 1 --"]), []),
        (Scope([f"AE{number}" for number in range(5000)] + ["MR1"]), [("1 1 2", "1 2", "MR", MR, "1.2")]),
    ],
)
def test_rows_and_counts_stand_for_what_somebody_may_see(store: Store, scope: Scope, seen: list[Any]) -> None:
    store.fill(several())
    rows = store.ask("STUDY", scope, wants=EVERYTHING)
    groups = (EVERYTHING[:3], EVERYTHING[3:5], [MODALITIES], [CLASSES], [STUDY])
    assert [tuple(" ".join(value for tag in group for value in row[tag]) for group in groups) for row in rows] == seen
    assert len(store.ask("PATIENT", scope)) == (1 if seen else 0)
    assert len(store.ask("SERIES", scope)) == sum(int(row[1].split()[0]) for row in seen)
    assert len(store.ask("IMAGE", scope)) == sum(int(row[1].split()[1]) for row in seen)


def test_modalities_and_classes_in_a_study_are_keys_among_what_somebody_sees(store: Store) -> None:
    store.fill(several())
    assert store.find("STUDY", MODALITIES, "SR") == ["1.1"]
    assert store.find("STUDY", MODALITIES, "?R") == ["1.1", "1.2"]
    assert store.find("STUDY", MODALITIES, "US", "MR") == ["1.2"]
    assert store.find("STUDY", CLASSES, SR, MR) == ["1.1", "1.2"]
    assert store.find("STUDY", MODALITIES, "SR", scope=Scope(["CT2"])) == []
    assert store.find("STUDY", CLASSES, SR, scope=Scope([], ["CT"])) == []
    # A study is found by one of its modalities, and all that are seen are returned.
    (row,) = store.ask("STUDY", T00080061="CT")
    assert row == {MODALITIES: ["CT", "SR"]}
    assert len(store.ask("SERIES", T00080061="CT")) == 2
    assert len(store.ask("SERIES", T00080060="CT")) == 1


@pytest.mark.parametrize("state", ["again", "encoding", "pending", "quarantined", "replaced", "damaged", "conflict"])
def test_what_is_not_held_is_neither_found_nor_counted(store: Store, state: str) -> None:
    store.fill([study("1.1", T00100020="P1"), study("1.2", T00100020="P2")._replace(state=state)])
    more = study("1.1", T00100020="P1")._replace(state=state)
    store.put(more._replace(said=more.said | {INSTANCE: "1.1.8", SERIES: "1.1.2", MODALITY: "US"}))
    assert store.ask("STUDY", wants=[*EVERYTHING, PATIENT]) == [
        {
            **{tag: ["1"] for tag in EVERYTHING[:5]},
            MODALITIES: [], CLASSES: [CT], STUDY: ["1.1"], PATIENT: ["P1"],
        }
    ]  # fmt: skip
    for level in LEVELS:
        assert len(store.ask(level)) == 1
    assert store.find("STUDY", MODALITIES, "US") == []


def test_a_patient_is_an_id_and_its_issuer_and_a_study_without_one_is_nobodys(store: Store) -> None:
    store.fill(
        [
            study("1.3", T00100020="P1", T00100010="Doe^Janet"),
            study("1.2", T00100020="P1", T00100010="Doe^Jane", T00100040="F"),
            study("1.4", T00100020="P1", T00100021="ELSEWHERE", T00100010="Roe^Richard"),
            study("1.5", T00100010="Nobody^Knows"),
        ]
    )
    wants = [PATIENT, ISSUER, NAME, SEX, STUDIES_OF_PATIENT]
    assert [["".join(row[tag]) for tag in wants] for row in store.ask("PATIENT", wants=wants)] == [
        ["P1", "", "Doe^Jane", "F", "2"],
        ["P1", "ELSEWHERE", "Roe^Richard", "", "1"],
    ]
    # Found by what any of the studies says, and then described by that one.
    (row,) = store.ask("PATIENT", T00100010="doe^janet", wants=wants)
    assert (row[NAME], row[STUDIES_OF_PATIENT]) == (["Doe^Janet"], ["2"])
    (row,) = store.ask("STUDY", T0020000D="1.5", wants=wants)
    assert (row[NAME], row[STUDIES_OF_PATIENT]) == (["Nobody^Knows"], [])


# --- how rows come


def test_rows_come_in_the_order_of_dates_and_numbers_a_page_at_a_time(store: Store) -> None:
    made = []
    for number, date, time in (("10", "20260102", "0900"), ("9", "20260102", "0800"), ("1", "20260101", "2300")):
        for series in ("10", "9"):
            for image in ("10", "2"):
                uid = f"1.{number}"
                said = {
                    STUDY: uid,
                    SERIES: f"{uid}.{series}",
                    INSTANCE: f"{uid}.{series}.{image}",
                    DATE: date,
                    TIME: time,
                }
                made.append(Instance(said | {SERIES_NUMBER: series, NUMBER: image}))
    store.fill(made)
    series = [f"1.{number}.{s}" for number in (1, 9, 10) for s in (9, 10)]
    wanted = {
        "STUDY": ["1.1", "1.9", "1.10"],
        "SERIES": series,
        "IMAGE": [f"{uid}.{image}" for uid in series for image in (2, 10)],
    }
    for level, uids in wanted.items():
        tag = UID[level]
        assert [row[tag][0] for row in store.ask(level, wants=[tag])] == uids
        assert [
            row[tag][0] for n in range(0, 12, 2) for row in store.ask(level, wants=[tag], limit=2, offset=n)
        ] == uids
        assert [row[tag][0] for row in store.ask(level, wants=[tag], offset=2)] == uids[2:]


def steps(store: Store, query: Query, rows: int) -> int:
    """Return how many hundreds of steps SQLite takes for so many rows."""
    taken = itertools.count()
    store.index._db.conn.set_progress_handler(lambda: next(taken) < 0, 100)
    try:
        found = store.index.query(query, ALL)
        assert len(list(itertools.islice(found, rows))) == rows
        found.close()  # type: ignore[attr-defined]
    finally:
        store.index._db.conn.set_progress_handler(None, 0)
    return next(taken)


@pytest.mark.parametrize(
    ("level", "match"),
    [
        ("PATIENT", {NAME: ["*oe^*"]}),
        ("STUDY", {NAME: ["*oe^*"]}),
        ("STUDY", {DATE: ["20260101-"], MODALITIES: ["CT"]}),
        ("SERIES", {}),
        ("SERIES", {BODY_PART: ["CHEST"], SEX: ["F"], PATIENT: ["P*"]}),
        ("IMAGE", {}),
        ("IMAGE", {CLASS: [CT], MODALITY: ["CT"], "00083002": [SYNTAX]}),
    ],
)
def test_the_first_row_does_not_wait_for_later_ones(store: Store, level: str, match: dict[str, list[str]]) -> None:
    same = {"T00080020": "20260101", "T00100010": "Doe^Jane", "T00080060": "CT", "T00180015": "CHEST", "T00100040": "F"}
    store.fill(study(f"1.{n}", T00100020=f"P{n}", T00080030=f"{n % 24:02}", **same) for n in range(300))
    query = Query(level, match, [STUDIES_OF_PATIENT, INSTANCES_OF_STUDY, MODALITIES])
    assert steps(store, query, 1) * 20 < steps(store, query, 300)


def test_who_asks_by_a_key_that_few_have_does_not_wait_for_a_look_at_all(store: Store) -> None:
    store.fill(
        study(f"1.{n}", T00100020=f"P{n}", T00080050=f"A{n}", T00080020=f"2026{n:04}", T00080060="CT")
        for n in range(300)
    )
    whole = steps(store, Query("STUDY", {}), 300)
    for level, match in [
        ("PATIENT", {PATIENT: ["P7"]}),
        ("STUDY", {PATIENT: ["P7"], DATE: ["20260001-"]}),
        ("STUDY", {DATE: ["20260007"]}),
        ("STUDY", {ACCESSION: ["A7"]}),
        ("SERIES", {STUDY: ["1.7"]}),
        ("SERIES", {SERIES: ["1.7.1"], MODALITY: ["CT"]}),
        ("SERIES", {DATE: ["20260007"], MODALITY: ["CT"]}),
        ("IMAGE", {INSTANCE: ["1.7.9"]}),
        ("IMAGE", {STUDY: ["1.7"], SERIES: ["1.7.1"]}),
    ]:
        assert steps(store, Query(level, match), 1) * 10 < whole, (level, match)


def test_who_stops_asking_keeps_the_log_from_nobody(store: Store) -> None:
    store.fill(study(f"1.{number}") for number in range(50))
    found = store.index.query(Query("IMAGE", {}, [STUDY]), ALL)
    next(found)
    writer = connect(store.path, KEY)
    log = store.path.with_name(f"{store.path.name}-wal")
    try:
        writer.execute("INSERT INTO meta VALUES ('a', 'b')")
        found.close()  # type: ignore[attr-defined]
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        writer.execute("DELETE FROM meta")
        writer.conn.close()
    assert log.stat().st_size < 20_000


def test_fuzzy_matching_changes_nothing(store: Store) -> None:
    assert not FUZZY
    store.fill([study("1.1", T00100010="Doe^Jane")])
    for key, found in (("doe", 1), ("jane", 0)):
        assert len(list(store.index.query(Query("STUDY", {NAME: [key]}, fuzzy=True), ALL))) == found


def test_an_index_of_an_earlier_release_is_queried_after_its_migration(tmp_path: Path) -> None:
    old = connect(tmp_path / "index.db", KEY)
    indexschema.MIGRATIONS.apply(old, stop_before="6-query")
    names = set(_indexes(old))
    assert "held_series" in names
    old.conn.close()
    store = Store(tmp_path / "index.db")
    store.put(study("1.1", T00100010="Doe^Jane"))
    assert store.find("STUDY", NAME, "doe") == ["1.1"]
    assert len(set(_indexes(store.index._db))) == len(names)
    assert [row["study"] for row in store.index.search("study", Filters(patient_name="doe"))] == ["1.1"]
    store.index.close()


@pytest.mark.parametrize("packs", [0, 1])
def test_an_index_without_columns_that_came_later_is_filled_anew(tmp_path: Path, packs: int) -> None:
    old = connect(tmp_path / "index.db", KEY)
    indexschema.MIGRATIONS.apply(old, stop_before="7-what-qido-returns")
    for number in range(packs):
        old.execute("INSERT INTO pack VALUES (?, 'objects', '1.1', 1, 4096, 4096)", [f"{number}"])
    old.conn.close()
    index = Index(tmp_path / "index.db", KEY, migrate=True)
    assert index.filled_to() == (0 if packs else None)
    assert index.archived_count() == 0
    index.close()


def _indexes(db: Database) -> Iterator[str]:
    yield from (row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'index'"))


def test_a_statement_holds_no_value_that_somebody_asked_with() -> None:
    secret = {NAME: ["*Secret^N*"], PATIENT: ["SECRET-1"], STUDY: ["1.2.77777"], DATE: ["19770707-19770708"]}
    for level in LEVELS:
        sql, values = statement(Query(level, secret, list(SUPPORTED[level])), Scope(["SECRETAE"], ["SE"]))
        assert not re.search("secret|77777|19770707", sql, re.IGNORECASE)
        assert "SECRET-1" in values
        assert json.dumps(values)


def test_tags_are_of_the_index(store: Store) -> None:
    assert attributes.STUDY == STUDY
    assert {level: len(tags) for level, tags in SUPPORTED.items()} == {
        "PATIENT": 8,
        "STUDY": 20,
        "SERIES": 31,
        "IMAGE": 39,
    }
