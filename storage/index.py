"""The index: what packs say, in SQLCipher, so that studies can be found. Every row can be rebuilt from packs.

States of an instance: ``held``, the one that counts; ``again``, a second copy of identical content; ``encoding``, the
same instance in another transfer syntax; ``pending``, in an open pack and perhaps to be quarantined; ``quarantined``,
to be decided about; ``replaced``, by decision; ``damaged``, it opens no more and a good copy came. Nothing replaces
anything by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from storage import attributes, selection
from storage.attributes import Attributes
from storage.indexschema import INSTANCE_COLUMNS, MIGRATIONS, REFERRER, SERIES_COLUMNS, STUDY_COLUMNS, empty
from storage.pack import Frame
from storage.packfile import Record
from storage.query import Query, Scope, answers
from storage.query import statement as query_statement
from storage.search import NAMES, Filters, fold, statement
from storage.selection import Part, Selected, Selection
from storage.sqlite import checkpoint, connect, copy, transaction
from storage.studyfacts import ALL, ONE, StudyFacts, gather

_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


class Place(msgspec.Struct, frozen=True):
    """Where an instance lies."""

    pack_id: str
    frame: Frame
    transfer_syntax: str


class Row(msgspec.Struct, frozen=True):
    """A record on its way into the index: the state it gets, and why if that is not ``held``."""

    record: Record
    state: str
    reason: str = ""


class Version(NamedTuple):
    """One of the instances that came under a UID: its state, whether it is admitted, and in which pack it is."""

    state: str
    sop_class: str
    calling: str
    admitted: bool
    pack: str


class Patient(msgspec.Struct, frozen=True):
    """Whom a study is about, as far as instances can contradict it."""

    patient_id: str
    name: str


class Index:
    """The index of one key version. Each thread has a connection of its own."""

    def __init__(self, path: Path, key: tuple[bytes, bytes], *, migrate: bool = False) -> None:
        self._db = connect(path, key)
        if migrate:
            MIGRATIONS.apply(self._db)

    def copy(self, path: Path, key: tuple[bytes, bytes]) -> None:
        """Copy the index to another file under another key."""
        copy(self._db, path, key)

    def close(self) -> None:
        """Close the database."""
        self._db.conn.close()

    # --- rebuilding

    def begin_anew(self) -> None:
        """Empty the index and note that it is being filled."""
        with transaction(self._db):
            empty(self._db)

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Write much at once: all that is written meanwhile is one transaction."""
        with transaction(self._db):
            yield

    def filled_up_to(self, admission: int) -> None:
        """Note up to which admission all packs are in the index, so that filling it goes on there."""
        with transaction(self._db):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('filling', ?)", [str(admission)])

    def filled(self) -> None:
        """Note that the index has all rows again."""
        with transaction(self._db):
            self._db.execute("DELETE FROM meta WHERE name = 'filling'")

    def filled_to(self) -> int | None:
        """Return up to which admission an index that is being filled has all packs; None for a whole one."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'filling'").fetchone()
        return int(row[0]) if row else None

    def has_archived(self) -> bool:
        """Tell whether any pack is known to lie in the archive."""
        return self._db.execute("SELECT 1 FROM pack WHERE place <> 'incoming' LIMIT 1").fetchone() is not None

    # --- what admission writes

    def scanned(self, pack_id: str) -> int:
        """Return the offset that a waiting pack was read up to, 0 for one not seen yet."""
        row = self._db.execute("SELECT scanned FROM pack WHERE id = ?", [pack_id]).fetchone()
        return int(row[0]) if row else 0

    def study_of(self, pack_id: str) -> str:
        """Return the study of a pack, empty for one not seen yet."""
        row = self._db.execute("SELECT study FROM pack WHERE id = ?", [pack_id]).fetchone()
        return str(row[0]) if row else ""

    def place_of(self, pack_id: str) -> str:
        """Return in which folder a pack is known to lie, empty for one not seen yet."""
        row = self._db.execute("SELECT place FROM pack WHERE id = ?", [pack_id]).fetchone()
        return str(row[0]) if row else ""

    def held(self, sop_uid: str, *, besides: str = "") -> Place | None:
        """Return where the held instance of a UID lies, if that is another pack than ``besides``."""
        row = self._db.execute(
            f"SELECT {_PLACE} FROM instance WHERE uid = ? AND state = 'held' AND pack <> ?",  # noqa: S608
            [sop_uid, besides],
        ).fetchone()
        return _place(row) if row else None

    def standing(self, sop_uid: str) -> list[Version]:
        """Return each version of an instance."""
        rows = self._db.execute(
            "SELECT i.state, i.sop_class, i.calling, p.place <> 'incoming', i.pack FROM instance i"
            " JOIN pack p ON p.id = i.pack WHERE i.uid = ?",
            [sop_uid],
        )
        return [
            Version(state, sop_class, calling, bool(admitted), pack)
            for state, sop_class, calling, admitted, pack in rows
        ]

    def of_object(self, object_id: bytes) -> list[Place]:
        """Return where records with an object id lie, whatever their state."""
        rows = self._db.execute(f"SELECT {_PLACE} FROM instance WHERE object_id = ?", [object_id.hex()])  # noqa: S608
        return [_place(row) for row in rows.fetchall()]

    def patient(self, study: str) -> Patient | None:
        """Return whom a study is about, None for a study that is not held."""
        row = self._db.execute(
            "SELECT patient_id, name_alphabetic FROM study s WHERE uid = ? AND EXISTS"
            " (SELECT 1 FROM instance i WHERE i.study = s.uid AND i.state = 'held')",
            [study],
        ).fetchone()
        return Patient(row[0], row[1]) if row else None

    def patient_of(self, study: str) -> tuple[str, str]:
        """Return the Patient ID of a study and its issuer; empty where the study is not described."""
        row = self._db.execute("SELECT patient_id, patient_id_issuer FROM study WHERE uid = ?", [study]).fetchone()
        return (str(row[0]), str(row[1])) if row else ("", "")

    def stored_by(self, association: str, study: str) -> dict[str, int]:
        """Return how many instances of a study came by an association, by their state; ``waiting`` for admission."""
        rows = self._db.execute(
            "SELECT CASE p.place WHEN 'incoming' THEN 'waiting' ELSE i.state END, count(*)"
            " FROM instance i JOIN pack p ON p.id = i.pack WHERE i.study = ? AND i.association = ? GROUP BY 1",
            [study, association],
        )
        return {str(state): int(count) for state, count in rows}

    def facts(self, study: str = "") -> Iterator[StudyFacts]:
        """Yield what retention knows of each study, or of one."""
        return gather(self._db.execute(ONE if study else ALL, [study] if study else []))

    def add(self, pack_id: str, study: str, rows: list[Row], scanned: int) -> None:
        """Add records of a pack that is still open, and how far the pack was read."""
        with transaction(self._db):
            self._db.execute(
                "INSERT INTO pack VALUES (?, 'incoming', ?, 0, ?, 0)"
                " ON CONFLICT (id) DO UPDATE SET scanned = excluded.scanned",
                [pack_id, study, scanned],
            )
            self._add_rows(pack_id, rows)

    def replace(self, pack_id: str, place: str, admission: int, length: int, rows: Iterable[Row]) -> None:
        """Make these records the only ones of a pack, which lies where it stays; readers see old rows or new."""
        with transaction(self._db):
            self._db.execute("DELETE FROM instance WHERE pack = ?", [pack_id])
            self._db.execute(
                "INSERT OR REPLACE INTO pack VALUES (?, ?, '', ?, ?, ?)", [pack_id, place, admission, length, length]
            )
            rows = list(rows)
            self._add_rows(pack_id, rows)
            study = rows[0].record.attributes.text(attributes.STUDY) if rows else ""
            self._db.execute("UPDATE pack SET study = ? WHERE id = ?", [study, pack_id])

    def set_state(self, pack_id: str, offset: int, state: str, reason: str = "") -> None:
        """Change the state of an instance."""
        with transaction(self._db):
            self._db.execute(
                "UPDATE instance SET state = ?, reason = ? WHERE pack = ? AND offset = ?",
                [state, reason, pack_id, offset],
            )

    def swap(self, held: Place, state: str, reason: str, other: Place) -> None:
        """Take an instance out of ``held`` and put another of its UID there, at once."""
        with transaction(self._db):
            for place, now, why in ((held, state, reason), (other, "held", "")):
                self._db.execute(
                    "UPDATE instance SET state = ?, reason = ? WHERE pack = ? AND offset = ?",
                    [now, why, place.pack_id, place.frame.offset],
                )

    def state(self, place: Place) -> str:
        """Return the state of an instance."""
        row = self._db.execute(
            "SELECT state FROM instance WHERE pack = ? AND offset = ?", [place.pack_id, place.frame.offset]
        ).fetchone()
        return str(row[0]) if row else ""

    def at(self, pack_id: str, object_id: bytes) -> Place | None:
        """Return where an object of a pack lies, whatever the pack is called by now."""
        places = {place.pack_id: place for place in reversed(self.of_object(object_id))}
        name: str | None = pack_id
        while name is not None and name not in places:
            row = self._db.execute("SELECT new FROM moved WHERE old = ?", [name]).fetchone()
            name = str(row[0]) if row else None
        return None if name is None else places[name]

    def move(self, old: str, new: str, length: int) -> None:
        """Let a pack's rows be another pack's, which has the same records at the same places.

        Nothing happens to a pack that has no rows: it was moved before, or the index is being filled.
        """
        with transaction(self._db):
            if self._db.execute("SELECT 1 FROM pack WHERE id = ?", [old]).fetchone() is None:
                return
            # What somebody judged it to be in between counts less than what was known of it.
            self._db.execute("DELETE FROM instance WHERE pack = ?", [new])
            self._db.execute("DELETE FROM unreadable WHERE pack = ?", [new])
            self._db.execute(
                "INSERT OR REPLACE INTO pack SELECT ?, place, study, admission, ?, ? FROM pack WHERE id = ?",
                [new, length, length, old],
            )
            self._db.execute("UPDATE instance SET pack = ? WHERE pack = ?", [new, old])
            self._db.execute("UPDATE unreadable SET pack = ? WHERE pack = ?", [new, old])
            self._db.execute("DELETE FROM pack WHERE id = ?", [old])
            self._db.execute("INSERT OR REPLACE INTO moved VALUES (?, ?)", [old, new])

    def quarantined(self) -> list[dict[str, Any]]:
        """Return the instances that an admin must decide about, with the one that is held under the same UID."""
        cursor = self._db.conn.execute(_QUARANTINED)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def drop(self, pack_id: str) -> None:
        """Remove a pack's rows, and the series and studies that nothing stands for any more."""
        with transaction(self._db):
            study = self._db.execute("SELECT study FROM pack WHERE id = ?", [pack_id]).fetchone()
            held = self._db.execute("SELECT uid FROM instance WHERE pack = ? AND state = 'held'", [pack_id]).fetchall()
            self._db.execute("DELETE FROM instance WHERE pack = ?", [pack_id])
            self._db.execute("DELETE FROM pack WHERE id = ?", [pack_id])
            for uid in held:
                # A second copy that was kept because this one was not yet admitted is the one that counts now.
                self._db.execute(
                    "UPDATE instance SET state = 'held', reason = '' WHERE id ="
                    " (SELECT min(id) FROM instance WHERE uid = ? AND state = 'again')",
                    uid,
                )
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

    def packs_of(self, study: str) -> list[str]:
        """Return the packs of a study, those that wait included."""
        rows = self._db.execute("SELECT id FROM pack WHERE study = ? ORDER BY id", [study])
        return [str(row[0]) for row in rows]

    def forget(self) -> None:
        """Write what was changed into the file, so that the log in front of it holds nothing old."""
        checkpoint(self._db)

    def archived_packs(self) -> set[str]:
        """Return the packs that are known to lie in the archive."""
        return {row[0] for row in self._db.execute("SELECT id FROM pack WHERE place <> 'incoming'")}

    def archived_count(self) -> int:
        """Return how many packs are known to lie in the archive."""
        return int(self._db.execute("SELECT count(*) FROM pack WHERE place <> 'incoming'").fetchone()[0])

    def waiting_packs(self) -> list[str]:
        """Return the packs with rows that are not admitted yet."""
        return [row[0] for row in self._db.execute("SELECT id FROM pack WHERE place = 'incoming'")]

    def _add_rows(self, pack_id: str, rows: list[Row]) -> None:
        described = set()
        patients = set()
        for row in rows:
            found = row.record.attributes
            series = (found.text(attributes.STUDY), found.text(attributes.SERIES))
            # What nobody has decided about describes nothing.
            if row.state != "quarantined" and series not in described:
                described.add(series)
                self.describe(found)
            patient = (found.text("00100020"), found.text("00100021"), series[0])
            if row.state != "quarantined" and patient[0] and patient not in patients:
                patients.add(patient)
                self._db.execute(_NAME_PATIENT, patient)
        self._db.conn.executemany(_INSERT_INSTANCE, [_instance(pack_id, row) for row in rows])

    def describe(self, found: Attributes) -> None:
        """Let an instance describe its study and series, unless another one did before."""
        study = found.text(attributes.STUDY)
        names = (*_name(found, "00100010"), *_name(found, "00080090"))
        self._db.execute(_INSERT_STUDY, [study, *names, *_columns(found, STUDY_COLUMNS)])
        self._db.execute(_INSERT_SERIES, [study, found.text(attributes.SERIES), *_columns(found, SERIES_COLUMNS)])
        if found.text("00100020"):
            self._db.execute(_NAME_PATIENT, [found.text("00100020"), found.text("00100021"), study])

    # --- what readers ask

    def search(self, level: str, filters: Filters) -> Iterator[dict[str, Any]]:
        """Yield rows of a level in a stable order, each with its counts.

        Raises:
            FilterError: A filter is not understood.
        """
        cursor = self._db.conn.execute(*statement(level, filters))
        names = [column[0] for column in cursor.description]
        for row in cursor:
            yield dict(zip(names, row, strict=True))

    def query(self, query: Query, scope: Scope) -> Iterator[dict[str, list[str]]]:
        """Return what a DICOM query finds: each row has the tags that were asked for, with their values.

        Values are text; component groups of a name are joined with ``=``. Rows come as they are found, in the order of
        patients, or of study dates and then of numbers; nothing is looked up before the first is asked for.

        Raises:
            QueryError: The query is not understood.
        """
        return self._answers(query, *query_statement(query, scope))

    def _answers(self, query: Query, sql: str, values: list[str | int]) -> Iterator[dict[str, list[str]]]:
        cursor = self._db.conn.execute(sql, values)
        try:
            yield from answers(query, [column[0] for column in cursor.description], cursor)
        finally:
            # Somebody who stopped asking does not keep the log from being cut.
            cursor.close()

    def parts(self, chosen: Selection, scope: Scope) -> list[Part]:
        """Return what a selection comes to."""
        return selection.parts(self._db, chosen, scope)

    def selected(self, chosen: Selection, scope: Scope) -> Iterator[Selected]:
        """Yield the instances of a selection, in the order in which they lie in their packs."""
        return selection.selected(self._db, chosen, scope)

    def counts(self) -> dict[str, int]:
        """Return how much is held, and how much waits for a decision."""
        counts = {
            "studies": "SELECT count(DISTINCT study) FROM instance WHERE state = 'held'",
            "series": "SELECT count(*) FROM (SELECT DISTINCT study, series FROM instance WHERE state = 'held')",
            "instances": "SELECT count(*) FROM instance WHERE state = 'held'",
            "packs": "SELECT count(*) FROM pack WHERE place = 'objects'",
            "encodings": "SELECT count(*) FROM instance WHERE state = 'encoding' AND state <> 'held'",
            "quarantined": "SELECT count(*) FROM instance WHERE state = 'quarantined' AND state <> 'held'",
            "unreadable": "SELECT count(*) FROM unreadable",
            "undecoded": "SELECT count(*) FROM instance WHERE undecoded > 0",
        }
        return {name: int(self._db.execute(sql).fetchone()[0]) for name, sql in counts.items()}

    def unreadable(self) -> int:
        """Return how many places in deposits did not open, without counting everything else."""
        return int(self._db.execute("SELECT count(*) FROM unreadable").fetchone()[0])

    def rows_of(self, pack_id: str) -> list[dict[str, Any]]:
        """Return what a pack's instances are called, for somebody who must have them sent again."""
        cursor = self._db.conn.execute(
            "SELECT offset, study, series, uid AS sop, calling, received_at, state FROM instance WHERE pack = ?",
            [pack_id],
        )
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def packs_in(self, place: str) -> list[str]:
        """Return the packs that lie in a folder."""
        return [row[0] for row in self._db.execute("SELECT id FROM pack WHERE place = ?", [place])]

    def last_stores(self) -> dict[str, str]:
        """Return when each calling AE title last stored something."""
        rows = self._db.execute("SELECT calling, max(received_at) FROM instance GROUP BY calling ORDER BY calling")
        return dict(rows.fetchall())


def _instance(pack_id: str, row: Row) -> list[str | int]:
    """Return the values of _INSERT_INSTANCE."""
    record, found = row.record, row.record.attributes
    received = found.received
    return [
        pack_id,
        record.frame.offset,
        record.frame.object_id.hex(),
        record.frame.dataset_length,
        record.frame.attributes_length,
        row.state,
        row.reason,
        found.text(attributes.STUDY),
        found.text(attributes.SERIES),
        found.text(attributes.SOP_INSTANCE),
        found.text(attributes.SOP_CLASS),
        found.transfer_syntax,
        *_columns(found, INSTANCE_COLUMNS),
        len(found.undecoded),
        received.at,
        received.association,
        received.calling,
        received.called,
        received.address,
        received.certificate,
    ]


def _columns(found: Attributes, columns: dict[str, str]) -> list[str]:
    return [found.text(tag) for tag in columns.values()]


def _name(found: Attributes, tag: str) -> list[str]:
    """Return a name as it is returned, and its component groups as searches compare them."""
    name = found.name(tag)
    return ["=".join(name.get(g, "") for g in _GROUPS).rstrip("="), *(fold(name.get(g, "")) for g in _GROUPS)]


def _insert(table: str, *columns: str) -> str:
    # The first instance of a study or series describes it; a repeated record changes nothing.
    marks = ", ".join("?" * len(columns))
    return f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608


_INSERT_STUDY = _insert("study", "uid", "patient_name", *NAMES, *REFERRER, *STUDY_COLUMNS)
# Where the first instance named no patient, another one does: a hold on a patient must find the study.
_NAME_PATIENT = "UPDATE study SET patient_id = ?, patient_id_issuer = ? WHERE uid = ? AND patient_id = ''"
_INSERT_SERIES = _insert("series", "study", "uid", *SERIES_COLUMNS)
_INSERT_INSTANCE = _insert(
    "instance",
    *("pack", '"offset"', "object_id", "dataset_length", "attributes_length", "state", "reason"),
    *("study", "series", "uid", "sop_class", "transfer_syntax"),
    *(*(f'"{column}"' for column in INSTANCE_COLUMNS), "undecoded"),
    *("received_at", "association", "calling", "called", "address", "certificate"),
)


def _place(row: Any) -> Place:
    return Place(row[0], Frame(row[1], bytes.fromhex(row[2]), row[3], row[4]), row[5])


_QUARANTINED = """
SELECT i.pack AS id, i.offset, i.reason, i.study, i.series, i.uid AS sop, i.sop_class,
i.transfer_syntax, i.received_at, i.calling,
  i.address, i.association, i.object_id, h.calling AS held_calling, h.received_at AS held_received_at, h.pack AS
  held_pack, h.object_id AS held_object_id
FROM instance i LEFT JOIN instance h ON h.uid = i.uid AND h.state = 'held'
WHERE i.state = 'quarantined' ORDER BY i.received_at, i.pack"""

_PLACE = "pack, offset, object_id, dataset_length, attributes_length, transfer_syntax"
