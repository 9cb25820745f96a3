"""The index: what packs say, in SQLCipher, so that studies can be found. Every row can be rebuilt from packs.

States of an instance: ``held``, the one that counts; ``same``, a second copy of identical content; ``encoding``, the
same instance in another transfer syntax; ``conflict``, other content under the same UID. Nothing replaces anything.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from storage import attributes
from storage.attributes import Attributes
from storage.objects import Record
from storage.pack import Frame
from storage.sqlite import Database, Migrations, connect, transaction

LEVELS = ("study", "series", "instance")

# Column of the index, tag of the data set.
_STUDY = {
    "patient_id": "00100020",
    "patient_id_issuer": "00100021",
    "patient_birth_date": "00100030",
    "patient_sex": "00100040",
    "study_date": "00080020",
    "study_time": "00080030",
    "accession": "00080050",
    "study_id": "00200010",
    "study_description": "00081030",
}
_SERIES = {
    "modality": "00080060",
    "series_number": "00200011",
    "series_date": "00080021",
    "series_time": "00080031",
    "series_description": "0008103E",
    "body_part": "00180015",
    "station_name": "00081010",
}
_INSTANCE = {
    "instance_number": "00200013",
    "frames": "00280008",
    "rows": "00280010",
    "columns": "00280011",
}
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_NAMES = ("name_alphabetic", "name_ideographic", "name_phonetic")

_MIGRATIONS = Migrations("index")


@_MIGRATIONS(name="1-tables")
def _tables(db: Database) -> None:
    text = dict.fromkeys
    db.table("pack").create(
        {"id": str, "study": str, "admission": int, "scanned": int, "length": int}, pk="id", strict=True
    )
    db.table("pack").create_index(["admission"])
    db.table("study").create(
        {"uid": str, "patient_name": str, **text(_NAMES, str), **text(_STUDY, str)}, pk="uid", strict=True
    )
    for column in ("patient_id", "name_alphabetic", "study_date", "accession"):
        db.table("study").create_index([column])
    db.table("series").create({"study": str, "uid": str, **text(_SERIES, str)}, pk=("study", "uid"), strict=True)
    db.table("series").create_index(["uid"])
    db.table("series").create_index(["modality"])
    db.table("instance").create(
        {
            "id": int,
            "pack": str,
            "offset": int,
            "object_id": str,
            "dataset_length": int,
            "attributes_length": int,
            "state": str,
            "study": str,
            "series": str,
            "uid": str,
            "sop_class": str,
            "transfer_syntax": str,
            **text(_INSTANCE, str),
            "undecoded": int,
            "received_at": str,
            "association": str,
            "calling": str,
            "called": str,
            "address": str,
            "certificate": str,
        },
        pk="id",
        foreign_keys=[("pack", "pack", "id")],
        strict=True,
    )
    db.table("instance").create_index(["pack", "offset"], unique=True)
    db.table("instance").create_index(["study", "series"])
    db.table("instance").create_index(["calling", "received_at"])
    db.table("instance").create_index(["uid"])
    # One held instance a UID, whatever races: the database is the arbiter.
    db.execute("CREATE UNIQUE INDEX one_held ON instance (uid) WHERE state = 'held'")
    db.table("unreadable").create(
        {"pack": str, "offset": int, "reason": str, "found_at": str}, pk=("pack", "offset"), strict=True
    )


class Place(msgspec.Struct, frozen=True):
    """Where an instance lies."""

    pack_id: str
    frame: Frame
    transfer_syntax: str


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


class Index:
    """The index of one key version. Each thread has a connection of its own."""

    def __init__(self, path: Path, key: tuple[bytes, bytes], *, migrate: bool = False) -> None:
        self._db = connect(path, key)
        if migrate:
            _MIGRATIONS.apply(self._db)

    def close(self) -> None:
        """Close the database."""
        self._db.conn.close()

    # --- what admission writes

    def scanned(self, pack_id: str) -> int:
        """Return the offset that a waiting pack was read up to, 0 for one not seen yet."""
        row = self._db.execute("SELECT scanned FROM pack WHERE id = ?", [pack_id]).fetchone()
        return int(row[0]) if row else 0

    def held(self, sop_uid: str) -> Place | None:
        """Return where the held instance of a UID lies."""
        row = self._db.execute(
            "SELECT pack, offset, object_id, dataset_length, attributes_length, transfer_syntax"
            " FROM instance WHERE uid = ? AND state = 'held'",
            [sop_uid],
        ).fetchone()
        return _place(row) if row else None

    def add(self, pack_id: str, study: str, found: list[tuple[Record, str]], scanned: int) -> None:
        """Add the records found in a pack, each with its state, and how far the pack was read."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO pack VALUES (?, ?, 0, ?, 0) ON CONFLICT (id) DO UPDATE SET scanned = excluded.scanned",
                [pack_id, study, scanned],
            )
            for record, state in found:
                self._add_record(pack_id, record, state)

    def mark_admitted(self, pack_id: str, admission: int, length: int) -> None:
        """Note that a pack lies in the archive now."""
        with transaction(self._db):
            self._db.execute("UPDATE pack SET admission = ?, length = ? WHERE id = ?", [admission, length, pack_id])

    def drop(self, pack_id: str) -> None:
        """Remove a pack's rows, and the series and studies that nothing stands for any more."""
        with transaction(self._db):
            study = self._db.execute("SELECT study FROM pack WHERE id = ?", [pack_id]).fetchone()
            self._db.execute("DELETE FROM instance WHERE pack = ?", [pack_id])
            self._db.execute("DELETE FROM pack WHERE id = ?", [pack_id])
            if study:
                self._db.execute(
                    "DELETE FROM series WHERE study = ? AND NOT EXISTS (SELECT 1 FROM instance i"
                    " WHERE i.study = series.study AND i.series = series.uid)",
                    study,
                )
                self._db.execute(
                    "DELETE FROM study WHERE uid = ? AND NOT EXISTS"
                    " (SELECT 1 FROM instance i WHERE i.study = study.uid)",
                    study,
                )

    def note_unreadable(self, pack_id: str, offset: int, reason: str, found_at: str) -> bool:
        """Remember a place that does not open; tell whether it is news."""
        with transaction(self._db):
            cursor = self._db.execute(
                "INSERT OR IGNORE INTO unreadable VALUES (?, ?, ?, ?)", [pack_id, offset, reason, found_at]
            )
            self._db.execute("DELETE FROM instance WHERE pack = ? AND offset = ?", [pack_id, offset])
            return bool(cursor.rowcount)

    def last_admission(self) -> int:
        """Return the highest admission number that the index knows."""
        return int(self._db.execute("SELECT coalesce(max(admission), 0) FROM pack").fetchone()[0])

    def waiting_packs(self) -> list[str]:
        """Return the packs with rows that are not admitted yet."""
        return [row[0] for row in self._db.execute("SELECT id FROM pack WHERE admission = 0")]

    def _add_record(self, pack_id: str, record: Record, state: str) -> None:
        found = record.attributes
        study = found.text(attributes.STUDY)
        series = found.text(attributes.SERIES)
        name = found.name("00100010")
        self._insert(
            "study",
            {
                "uid": study,
                "patient_name": "=".join(name.get(g, "") for g in _GROUPS).rstrip("="),
                **{column: fold(name.get(g, "")) for column, g in zip(_NAMES, _GROUPS, strict=True)},
                **_columns(found, _STUDY),
            },
        )
        self._insert("series", {"study": study, "uid": series, **_columns(found, _SERIES)})
        received = found.received
        self._insert(
            "instance",
            {
                "pack": pack_id,
                "offset": record.frame.offset,
                "object_id": record.frame.object_id.hex(),
                "dataset_length": record.frame.dataset_length,
                "attributes_length": record.frame.attributes_length,
                "state": state,
                "study": study,
                "series": series,
                "uid": found.text(attributes.SOP_INSTANCE),
                "sop_class": found.text(attributes.SOP_CLASS),
                "transfer_syntax": found.transfer_syntax,
                **_columns(found, _INSTANCE),
                "undecoded": len(found.undecoded),
                "received_at": received.at,
                "association": received.association,
                "calling": received.calling,
                "called": received.called,
                "address": received.address,
                "certificate": received.certificate,
            },
        )

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        # The first instance of a study or series describes it; a repeated record changes nothing.
        marks = ", ".join("?" * len(row))
        names = ", ".join(f'"{name}"' for name in row)
        self._db.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})", list(row.values()))  # noqa: S608

    # --- what readers ask

    def search(self, level: str, filters: Filters) -> Iterator[dict[str, Any]]:
        """Yield rows of a level in a stable order, each with its counts.

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
        cursor = self._db.conn.execute(query.format(" AND ".join(here) or "1"), ordered)
        names = [column[0] for column in cursor.description]
        for row in cursor:
            yield dict(zip(names, row, strict=True))

    def place(self, row_id: int) -> Place | None:
        """Return where the instance of a search row lies."""
        row = self._db.execute(
            "SELECT pack, offset, object_id, dataset_length, attributes_length, transfer_syntax"
            " FROM instance WHERE id = ?",
            [row_id],
        ).fetchone()
        return _place(row) if row else None

    def counts(self) -> dict[str, int]:
        """Return how much is held, and how much waits for a decision."""
        counts = {
            "studies": "SELECT count(DISTINCT study) FROM instance WHERE state = 'held'",
            "series": "SELECT count(*) FROM (SELECT DISTINCT study, series FROM instance WHERE state = 'held')",
            "instances": "SELECT count(*) FROM instance WHERE state = 'held'",
            "packs": "SELECT count(*) FROM pack WHERE admission > 0",
            "duplicates": "SELECT count(*) FROM instance WHERE state IN ('same', 'encoding')",
            "conflicts": "SELECT count(*) FROM instance WHERE state = 'conflict'",
            "unreadable": "SELECT count(*) FROM unreadable",
            "undecoded": "SELECT count(*) FROM instance WHERE undecoded > 0",
        }
        return {name: int(self._db.execute(sql).fetchone()[0]) for name, sql in counts.items()}

    def last_stores(self) -> dict[str, str]:
        """Return when each calling AE title last stored something."""
        rows = self._db.execute("SELECT calling, max(received_at) FROM instance GROUP BY calling ORDER BY calling")
        return dict(rows.fetchall())


def fold(text: str) -> str:
    """Return text as searches compare it: without case, compatibility forms and trailing delimiters."""
    return unicodedata.normalize("NFKC", text).casefold().rstrip("^ ")


def _columns(found: Attributes, columns: dict[str, str]) -> dict[str, str]:
    return {column: found.text(tag) for column, tag in columns.items()}


def _place(row: Any) -> Place:
    return Place(row[0], Frame(row[1], bytes.fromhex(row[2]), row[3], row[4]), row[5])


_SEARCH_STUDY = """
SELECT s.uid AS study, s.patient_name, s.patient_id, s.patient_birth_date, s.patient_sex, s.study_date, s.study_time,
  s.accession, s.study_id, s.study_description,
  (SELECT group_concat(DISTINCT modality) FROM series r WHERE r.study = s.uid) AS modalities,
  (SELECT count(*) FROM series r WHERE r.study = s.uid) AS series_count,
  (SELECT count(*) FROM instance n WHERE n.study = s.uid AND n.state = 'held') AS instance_count,
  (SELECT count(*) FROM instance n JOIN pack p ON p.id = n.pack WHERE n.study = s.uid AND n.state = 'held'
     AND p.admission = 0) AS waiting_count
FROM study s WHERE {} ORDER BY s.study_date, s.study_time, s.uid"""

_SEARCH_SERIES = """
SELECT e.study, e.uid AS series, s.patient_name, s.patient_id, s.study_date, e.modality, e.series_number,
  e.series_description, e.body_part,
  (SELECT count(*) FROM instance n WHERE n.study = e.study AND n.series = e.uid AND n.state = 'held') AS instance_count
FROM series e JOIN study s ON s.uid = e.study WHERE {}
ORDER BY s.study_date, s.study_time, e.study, CAST(e.series_number AS INTEGER), e.uid"""

_SEARCH_INSTANCE = """
SELECT i.id, i.study, i.series, i.uid AS sop, s.patient_name, s.patient_id, s.study_date, e.modality, i.instance_number,
  i.sop_class, i.transfer_syntax, i.state, i.received_at, i.calling, i.dataset_length, i.undecoded,
  p.admission > 0 AS admitted
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
        columns = " OR ".join(f"s.{name} GLOB ? OR s.{name} GLOB ?" for name in _NAMES)
        add("study", f"({columns})", *[p for _ in _NAMES for p in pattern])
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
