"""Queries of the index as DICOM's query services ask them: which attributes there are, and the SQL of a query.

A row stands for what is held and somebody may see; so do its counts. No database here, and no DICOM: keys come as
text. A key that the index has no attribute for, one of a lower level among them, is ignored in matching and returned
without values, as optional keys are. What the values of a key mean: ``storage.matching``.

A patient is a Patient ID and its issuer; name, birth date and sex are those of the matching study with the first UID.
A study without Patient ID is nobody's: it is found from its own level on, and counts of its patient have no values.

Source: PS3.4 C.2.2.2, C.3, C.6.1 and C.6.2; PS3.18 10.6.
"""

# ruff: noqa: S608  (statements are made of the constants here; what somebody asks with is a parameter)
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from storage.matching import Parameters, QueryError, condition, is_one_of

LEVELS = ("PATIENT", "STUDY", "SERIES", "IMAGE")
# Not done, so nobody may negotiate it: 'fuzzy' changes nothing, and dates and times are matched each by itself.
FUZZY = False
COMBINED_DATETIME = False

_TAG = re.compile(r"[0-9A-F]{8}", re.ASCII)
_MOST = 2**31
_texts = msgspec.json.Decoder(list[str])


class Scope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which instances somebody may see at all: empty lists mean no limit; both given: both must hold.

    ``ae_titles`` are calling AE titles that the instances came from, ``modalities`` those of their series.
    """

    ae_titles: list[str] = []
    modalities: list[str] = []


class Query(msgspec.Struct, forbid_unknown_fields=True):
    """What is asked for.

    ``level``: one of LEVELS. ``match``: tag (8 hex digits, upper case) to the key's values, Unicode text; none, or
    empty ones, match everything. ``wants``: tags to return besides. ``limit``: 0 for none.
    """

    level: str
    match: dict[str, list[str]]
    wants: list[str] = []
    fuzzy: bool = False
    limit: int = 0
    offset: int = 0


class Attribute(NamedTuple):
    """An attribute that the index has, under its keyword of PS3.6.

    ``column`` is the SQL that returns it; ``tested`` what keys are compared with (of names, what the columns of their
    component groups begin with; empty: keys are ignored), ``among`` where that is looked for if it is not the row
    itself; ``several``: it has many values.
    """

    keyword: str
    vr: str
    column: str
    tested: str = ""
    among: str = "{test}"
    several: bool = False

    @property
    def matching(self) -> str:
        """How keys are matched, in words; empty for one that is only returned."""
        return _MATCHING.get(self.vr, "single value, wildcards") if self.tested else ""


_MATCHING = {
    "UI": "UID, list of UIDs",
    "PN": "single value, wildcards; without case, in every component group",
    "DA": "single value, range",
    "TM": "single value, range",
    "IS": "single value, as a number",
    "US": "single value, as a number",
}

# Where a study's series are, or a patient's. {modality} and {calling} are the tests of who may see what.
_STUDYS = ("FROM series m", "WHERE m.study = s.uid{modality}")
_PATIENTS = (
    "FROM study q CROSS JOIN series m ON m.study = q.uid",
    "WHERE q.patient_id = s.patient_id AND q.patient_id_issuer = s.patient_id_issuer{modality}",
)


# What an index finds, and few rows have in common.
_INDEXED = {"s.uid", "s.patient_id", "s.study_date", "s.accession", "e.uid", "i.uid"}


def _held(series: str) -> str:
    return f"n.study = {series}.study AND n.series = {series}.uid AND n.state = 'held'{{calling}}"


def _series(tables: str, where: str) -> str:
    return f"{tables} {where} AND EXISTS (SELECT 1 FROM instance n WHERE {_held('m')})"


def _instances(tables: str, where: str) -> str:
    return f"{tables} CROSS JOIN instance n ON {_held('m')} {where}"


def _own(keyword: str, vr: str, column: str) -> Attribute:
    # '+': no index is made for a statement, and none is used of a column in which many rows are alike.
    return Attribute(keyword, vr, column, column if column in _INDEXED else f"+{column}")


def _count(keyword: str, column: str) -> Attribute:
    return Attribute(keyword, "IS", column)


def _of_patient(what: str, where: str) -> str:
    return f"CASE WHEN s.patient_id <> '' THEN (SELECT count({what}) {where}) END"


_PATIENT = {
    "00100010": Attribute("PatientName", "PN", "s.patient_name", "s.name"),
    "00100020": _own("PatientID", "LO", "s.patient_id"),
    "00100021": _own("IssuerOfPatientID", "LO", "s.patient_id_issuer"),
    "00100030": _own("PatientBirthDate", "DA", "s.patient_birth_date"),
    "00100040": _own("PatientSex", "CS", "s.patient_sex"),
    "00201200": _count("NumberOfPatientRelatedStudies", _of_patient("DISTINCT q.uid", _series(*_PATIENTS))),
    "00201202": _count("NumberOfPatientRelatedSeries", _of_patient("*", _series(*_PATIENTS))),
    "00201204": _count("NumberOfPatientRelatedInstances", _of_patient("*", _instances(*_PATIENTS))),
}
_STUDY = {
    "0020000D": _own("StudyInstanceUID", "UI", "s.uid"),
    "00080020": _own("StudyDate", "DA", "s.study_date"),
    "00080030": _own("StudyTime", "TM", "s.study_time"),
    "00080050": _own("AccessionNumber", "SH", "s.accession"),
    "00080061": Attribute(
        "ModalitiesInStudy",
        "CS",
        f"(SELECT json_group_array(DISTINCT m.modality) {_series(*_STUDYS)} AND m.modality <> '')",
        "+m.modality",
        f"EXISTS (SELECT 1 {_series(*_STUDYS)} AND {{test}})",
        several=True,
    ),
    "00080062": Attribute(
        "SOPClassesInStudy",
        "UI",
        f"(SELECT json_group_array(DISTINCT n.sop_class) {_instances(*_STUDYS)})",
        "+n.sop_class",
        f"EXISTS (SELECT 1 {_instances(*_STUDYS)} AND {{test}})",
        several=True,
    ),
    "00080090": Attribute("ReferringPhysicianName", "PN", "s.referrer", "s.referrer"),
    "00080201": Attribute("TimezoneOffsetFromUTC", "SH", "s.timezone"),
    "00081030": _own("StudyDescription", "LO", "s.study_description"),
    "00200010": _own("StudyID", "SH", "s.study_id"),
    "00201206": _count("NumberOfStudyRelatedSeries", f"(SELECT count(*) {_series(*_STUDYS)})"),
    "00201208": _count("NumberOfStudyRelatedInstances", f"(SELECT count(*) {_instances(*_STUDYS)})"),
}
_SERIES = {
    "0020000E": _own("SeriesInstanceUID", "UI", "e.uid"),
    "00080021": _own("SeriesDate", "DA", "e.series_date"),
    "00080031": _own("SeriesTime", "TM", "e.series_time"),
    "00080060": _own("Modality", "CS", "e.modality"),
    "00081010": _own("StationName", "SH", "e.station_name"),
    "0008103E": _own("SeriesDescription", "LO", "e.series_description"),
    "00180015": _own("BodyPartExamined", "CS", "e.body_part"),
    "00200011": _own("SeriesNumber", "IS", "e.series_number"),
    "00400244": _own("PerformedProcedureStepStartDate", "DA", "e.step_date"),
    "00400245": _own("PerformedProcedureStepStartTime", "TM", "e.step_time"),
    "00201209": _count("NumberOfSeriesRelatedInstances", f"(SELECT count(*) FROM instance n WHERE {_held('e')})"),
}
_IMAGE = {
    "00080016": _own("SOPClassUID", "UI", "i.sop_class"),
    "00080018": _own("SOPInstanceUID", "UI", "i.uid"),
    "00083002": _own("AvailableTransferSyntaxUID", "UI", "i.transfer_syntax"),
    "00200013": _own("InstanceNumber", "IS", "i.instance_number"),
    "00280008": _own("NumberOfFrames", "IS", "i.frames"),
    "00280010": _own("Rows", "US", "i.rows"),
    "00280011": _own("Columns", "US", 'i."columns"'),
    "00280100": _own("BitsAllocated", "US", "i.bits_allocated"),
}
# What can be asked for at each level: attributes of its own and of the levels above.
SUPPORTED: dict[str, dict[str, Attribute]] = {
    "PATIENT": _PATIENT,
    "STUDY": _PATIENT | _STUDY,
    "SERIES": _PATIENT | _STUDY | _SERIES,
    "IMAGE": _PATIENT | _STUDY | _SERIES | _IMAGE,
}

# Which rows, in their order. Only they are sorted where an index does not have the order, of series and instances one
# study at a time; what they return is looked up when they are asked for, one by one.
_DATED = "s.study_date, s.study_time, s.uid, s.rowid"
_NUMBERED = "CAST(e.series_number AS INTEGER), e.uid"
_ROWS = {
    "PATIENT": "SELECT s.rowid AS study, min(s.uid) FROM study s WHERE s.patient_id <> '' AND {tests}"
    " GROUP BY s.patient_id, s.patient_id_issuer ORDER BY s.patient_id, s.patient_id_issuer",
    "STUDY": f"SELECT s.rowid AS study FROM study s WHERE {{tests}} ORDER BY {_DATED}",
    "SERIES": "SELECT s.rowid AS study, e.rowid AS series FROM study s {join} series e ON e.study = s.uid"
    f" WHERE {{tests}} ORDER BY {_DATED}, {_NUMBERED}",
    "IMAGE": "SELECT s.rowid AS study, e.rowid AS series, i.id AS instance FROM study s {join} series e"
    " ON e.study = s.uid {join} instance i{by} ON i.study = e.study AND i.series = e.uid"
    f" WHERE {{tests}} ORDER BY {_DATED}, {_NUMBERED}, CAST(i.instance_number AS INTEGER), i.uid",
}
# Keys that few rows have: where one is given, studies need not be gone through in their order.
_FEW = frozenset({"0020000E", "00080018"})
_FOUND = {
    "PATIENT": "CROSS JOIN study s ON s.rowid = f.study",
    "STUDY": "CROSS JOIN study s ON s.rowid = f.study",
    "SERIES": "CROSS JOIN study s ON s.rowid = f.study CROSS JOIN series e ON e.rowid = f.series",
    "IMAGE": "CROSS JOIN study s ON s.rowid = f.study CROSS JOIN series e ON e.rowid = f.series"
    " CROSS JOIN instance i ON i.id = f.instance",
}
_SEEN = {
    "PATIENT": f"EXISTS (SELECT 1 {_series(*_STUDYS)})",
    "STUDY": f"EXISTS (SELECT 1 {_series(*_STUDYS)})",
    "SERIES": f"EXISTS (SELECT 1 FROM instance n WHERE {_held('e')}){{of_series}}",
    "IMAGE": "i.state = 'held'{of_instance}{of_series}",
}


def statement(query: Query, scope: Scope) -> tuple[str, list[str | int]]:
    """Return the SQL of a query and its values; its columns are called by their tags.

    Raises:
        QueryError: The query is not understood.
    """
    supported = SUPPORTED.get(query.level)
    if supported is None:
        raise QueryError(f"the level is none of {', '.join(LEVELS)}")
    if not all(_TAG.fullmatch(tag) for tag in _tags(query)):
        raise QueryError("a tag is eight hexadecimal digits, upper case")
    if not (0 <= query.limit < _MOST and 0 <= query.offset < _MOST):
        raise QueryError("limit or offset is out of range")
    take = Parameters()
    seen = _limits(scope, take)
    tests = [_SEEN[query.level].format_map(seen)]
    join = "CROSS JOIN"
    for tag, values in query.match.items():
        attribute = supported.get(tag)
        if attribute is None or not attribute.tested:
            continue
        if test := condition(tag, attribute.vr, attribute.tested, values, take):
            tests.append(attribute.among.format(test=test, **seen))
            join = "JOIN" if tag in _FEW else join
    # Without statistics SQLite would rather make an index of all instances first.
    by = " INDEXED BY held_seen" if join == "CROSS JOIN" else ""
    rows = _ROWS[query.level].format(tests=" AND ".join(tests), join=join, by=by)
    page = f"LIMIT {take(query.limit or -1)} OFFSET {take(query.offset)}"
    columns = [f'{supported[tag].column.format_map(seen)} AS "{tag}"' for tag in _tags(query) if tag in supported]
    return f"SELECT {', '.join(columns) or '1'} FROM ({rows} {page}) f {_FOUND[query.level]}", take


def answers(query: Query, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[dict[str, list[str]]]:
    """Yield what a statement's rows say: each tag that was asked for, with its values."""
    supported = SUPPORTED[query.level]
    several = [name in supported and supported[name].several for name in names]
    tags = _tags(query)
    for row in rows:
        answer: dict[str, list[str]] = {tag: [] for tag in tags}
        for name, many, value in zip(names, several, row, strict=True):
            if name in answer and value is not None and value != "":
                answer[name] = sorted(_texts.decode(value)) if many else [str(value)]
        yield answer


def _tags(query: Query) -> list[str]:
    return list(dict.fromkeys([*query.match, *query.wants]))


def _limits(scope: Scope, take: Parameters) -> dict[str, str]:
    """Return the tests of what somebody may see, as statements have them."""

    def limit(column: str, values: list[str]) -> str:
        return f" AND {is_one_of(f'+{column}', values, take)}" if values else ""

    return {
        "calling": limit("n.calling", scope.ae_titles),
        "modality": limit("m.modality", scope.modalities),
        "of_instance": limit("i.calling", scope.ae_titles),
        "of_series": limit("e.modality", scope.modalities),
    }
