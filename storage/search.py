"""What can be searched for in the index: filters, and the SQL that they become. No database here.

Wildcards are DICOM's, ``*`` and ``?``; names are compared without case in all three component groups.
"""

from __future__ import annotations

import unicodedata

import msgspec

LEVELS = ("study", "series", "instance")
# Columns of the study table, as searches compare a name's component groups.
NAMES = ("name_alphabetic", "name_ideographic", "name_phonetic")


class Filters(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a search asks for; all given ones must match. Wildcards ``*`` and ``?`` in names, ids and descriptions."""

    patient_id: str | None = None
    patient_name: str | None = None
    study_date: str | None = None
    modality: str | None = None
    accession: str | None = None
    study: str | None = None
    series: str | None = None
    sop: str | None = None
    aet: str | None = None


class FilterError(ValueError):
    """A filter's value is not understood."""


def statement(level: str, filters: Filters) -> tuple[str, list[str]]:
    """Return the SQL of a search, in a stable order with counts, and its values.

    Raises:
        FilterError: A filter is not understood.
    """
    tests, values = _tests(filters)
    below = LEVELS[LEVELS.index(level) + 1 :]
    here = [tests[t] for t in LEVELS if t not in below and tests[t]]
    if below:
        # A study or series is listed for what it holds, so that one of which nothing is held is not.
        inner = " AND ".join(tests[t] for t in below if tests[t]) or "1"
        here.append(_EXISTS[level].format(inner))
    query = {"study": _SEARCH_STUDY, "series": _SEARCH_SERIES, "instance": _SEARCH_INSTANCE}[level]
    ordered = [v for t in LEVELS for v in values[t]]
    return query.format(" AND ".join(here) or "1"), ordered


def fold(text: str) -> str:
    """Return text as searches compare it: without case, compatibility forms and trailing delimiters."""
    return unicodedata.normalize("NFKC", text).casefold().rstrip("^ ")


_SEARCH_STUDY = """
SELECT s.uid AS study, s.patient_name, s.patient_id, s.patient_birth_date, s.patient_sex, s.study_date, s.study_time,
  s.accession, s.study_id, s.study_description,
  (SELECT group_concat(DISTINCT modality) FROM series r WHERE r.study = s.uid) AS modalities,
  (SELECT count(*) FROM series r WHERE r.study = s.uid) AS series_count,
  (SELECT count(*) FROM instance n WHERE n.study = s.uid AND n.state = 'held') AS instance_count,
  (SELECT count(*) FROM instance n JOIN pack p ON p.id = n.pack WHERE n.study = s.uid AND n.state = 'held'
     AND p.place = 'incoming') AS waiting_count
FROM study s WHERE {} ORDER BY s.study_date, s.study_time, s.uid"""

_SEARCH_SERIES = """
SELECT e.study, e.uid AS series, s.patient_name, s.patient_id, s.study_date, e.modality, e.series_number,
  e.series_description, e.body_part,
  (SELECT count(*) FROM instance n WHERE n.study = e.study AND n.series = e.uid AND n.state = 'held') AS instance_count
FROM series e JOIN study s ON s.uid = e.study WHERE {}
ORDER BY s.study_date, s.study_time, e.study, CAST(e.series_number AS INTEGER), e.uid"""

_SEARCH_INSTANCE = """
SELECT i.pack, i.object_id, i.study, i.series, i.uid AS sop, s.patient_name, s.patient_id, s.study_date, e.modality,
  i.instance_number, i.sop_class, i.transfer_syntax, i.state, i.received_at, i.calling, i.dataset_length, i.undecoded,
  p.place <> 'incoming' AS admitted
FROM instance i JOIN series e ON e.study = i.study AND e.uid = i.series JOIN study s ON s.uid = i.study
  JOIN pack p ON p.id = i.pack
WHERE i.state = 'held' AND {}
ORDER BY s.study_date, s.study_time, i.study, CAST(e.series_number AS INTEGER), i.series,
  CAST(i.instance_number AS INTEGER), i.uid"""

_EXISTS = {
    "study": "EXISTS (SELECT 1 FROM series e JOIN instance i ON i.study = e.study AND i.series = e.uid"
    " AND i.state = 'held' WHERE e.study = s.uid AND {})",
    "series": "EXISTS (SELECT 1 FROM instance i WHERE i.study = e.study AND i.series = e.uid"
    " AND i.state = 'held' AND {})",
}


def _tests(filters: Filters) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the SQL tests of each level, joined, and their values."""
    tests: dict[str, list[str]] = {level: [] for level in LEVELS}
    values: dict[str, list[str]] = {level: [] for level in LEVELS}

    def add(level: str, test: str, *given: str) -> None:
        tests[level].append(test)
        values[level].extend(given)

    if filters.patient_name is not None:
        pattern = _name_pattern(filters.patient_name)
        columns = " OR ".join(f"s.{name} GLOB ? OR s.{name} GLOB ?" for name in NAMES)
        add("study", f"({columns})", *[p for _ in NAMES for p in pattern])
    for level, column, text in (
        ("study", "s.patient_id", filters.patient_id),
        ("study", "s.accession", filters.accession),
        ("study", "s.uid", filters.study),
        ("series", "e.modality", filters.modality),
        ("series", "e.uid", filters.series),
        ("instance", "i.uid", filters.sop),
        ("instance", "i.calling", filters.aet),
    ):
        if text is not None:
            add(level, f"{column} GLOB ?", glob(text))
    if filters.study_date is not None:
        first, last = date_range(filters.study_date)
        add("study", "s.study_date BETWEEN ? AND ?", first, last)
    return {level: " AND ".join(t) for level, t in tests.items()}, values


def glob(pattern: str) -> str:
    """Return a pattern with DICOM's wildcards as one of SQLite's GLOB, where ``[`` is special too."""
    return pattern.replace("[", "[[]")


def _name_pattern(text: str) -> tuple[str, str]:
    """Return the two patterns that a name is matched with: as given, and as the family name before others."""
    pattern = glob(fold(text))
    return pattern, pattern if "^" in text or "*" in text else pattern + "^*"


def date_range(text: str) -> tuple[str, str]:
    """Return first and last day of ``20260101``, ``20260101-20260131``, ``20260101-`` or ``-20260131``.

    Raises:
        FilterError: It is none of these.
    """
    first, dash, last = text.partition("-")
    if not dash:
        last = first
    for day in (first, last):
        if day and not (len(day) == 8 and day.isascii() and day.isdigit()):
            raise FilterError(f"'{text}' is no date or range of dates; write 20260131 or 20260101-20260131")
    if not first and not last:
        raise FilterError("an empty range of dates")
    return first or "00000000", last or "99999999"
