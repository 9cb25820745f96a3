"""The tables of the index, as each migration left them, and which attributes they hold."""

from __future__ import annotations

from collections.abc import Iterable

from storage.search import NAMES
from storage.sqlite import Database, Migrations

# Column of the index, tag of the data set.
STUDY_COLUMNS = {
    "patient_id": "00100020",
    "patient_id_issuer": "00100021",
    "patient_birth_date": "00100030",
    "patient_sex": "00100040",
    "study_date": "00080020",
    "study_time": "00080030",
    "accession": "00080050",
    "study_id": "00200010",
    "study_description": "00081030",
    "timezone": "00080201",
}
SERIES_COLUMNS = {
    "modality": "00080060",
    "series_number": "00200011",
    "series_date": "00080021",
    "series_time": "00080031",
    "series_description": "0008103E",
    "body_part": "00180015",
    "station_name": "00081010",
    "step_date": "00400244",
    "step_time": "00400245",
}
INSTANCE_COLUMNS = {
    "instance_number": "00200013",
    "frames": "00280008",
    "rows": "00280010",
    "columns": "00280011",
    "bits_allocated": "00280100",
}
# What the first tables did not have.
_LATER = {"timezone", "step_date", "step_time", "bits_allocated"}
# A name as it is returned, and its component groups as searches compare them.
REFERRER = ("referrer", "referrer_alphabetic", "referrer_ideographic", "referrer_phonetic")
MIGRATIONS = Migrations("index")


@MIGRATIONS(name="1-tables")
def _tables(db: Database) -> None:
    def text(columns: Iterable[str]) -> dict[str, type[str]]:
        return {column: str for column in columns if column not in _LATER}

    db.table("pack").create(
        {"id": str, "place": str, "study": str, "admission": int, "scanned": int, "length": int},
        pk="id",
        strict=True,
    )
    db.table("pack").create_index(["admission"])
    db.table("study").create(
        {"uid": str, "patient_name": str, **text(NAMES), **text(STUDY_COLUMNS)}, pk="uid", strict=True
    )
    for column in ("patient_id", "name_alphabetic", "study_date", "accession"):
        db.table("study").create_index([column])
    db.table("series").create({"study": str, "uid": str, **text(SERIES_COLUMNS)}, pk=("study", "uid"), strict=True)
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
            "reason": str,
            "study": str,
            "series": str,
            "uid": str,
            "sop_class": str,
            "transfer_syntax": str,
            **text(INSTANCE_COLUMNS),
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
    db.table("instance").create_index(["object_id"])
    # One held instance a UID, whatever races: the database is the arbiter.
    db.execute("CREATE UNIQUE INDEX one_held ON instance (uid) WHERE state = 'held'")
    db.table("meta").create({"name": str, "value": str}, pk="name", strict=True)
    db.table("unreadable").create(
        {"pack": str, "offset": int, "reason": str, "found_at": str}, pk=("pack", "offset"), strict=True
    )


@MIGRATIONS(name="2-moved")
def _moved(db: Database) -> None:
    # For readers that were told a pack's old name. It is no row of a pack's: filling anew leaves it.
    db.table("moved").create({"old": str, "new": str}, pk="old", strict=True)


@MIGRATIONS(name="3-pack-study")
def _pack_study(db: Database) -> None:
    db.table("pack").create_index(["study"])


@MIGRATIONS(name="4-counting")
def _counting(db: Database) -> None:
    # The status counts, and must not read every row for it.
    db.execute("CREATE INDEX held_series ON instance (study, series) WHERE state = 'held'")
    db.execute("CREATE INDEX not_held ON instance (state) WHERE state <> 'held'")
    db.execute("CREATE INDEX not_decoded ON instance (id) WHERE undecoded > 0")
    # What it means changed: up to which admission.
    db.execute("UPDATE meta SET value = '0' WHERE name = 'filling'")


@MIGRATIONS(name="5-waiting")
def _waiting(db: Database) -> None:
    # Asked at each look at what waits, and of each study that is to be erased: few packs of very many.
    db.execute("CREATE INDEX waiting_pack ON pack (id) WHERE place = 'incoming'")


@MIGRATIONS(name="6-query")
def _query(db: Database) -> None:
    # Each takes the place of one that it begins with. Studies come out in their order without being sorted, patients
    # are together, and what somebody sees of a study is counted without a look at the rows of instances.
    db.execute("CREATE INDEX study_dated ON study (study_date, study_time, uid)")
    db.execute("DROP INDEX idx_study_study_date")
    db.execute("CREATE INDEX study_patient ON study (patient_id, patient_id_issuer)")
    db.execute("DROP INDEX idx_study_patient_id")
    db.execute("CREATE INDEX held_seen ON instance (study, series, calling, sop_class) WHERE state = 'held'")
    db.execute("DROP INDEX held_series")


@MIGRATIONS(name="7-what-qido-returns")
def _what_qido_returns(db: Database) -> None:
    more = {"study": [*REFERRER, "timezone"], "series": ["step_date", "step_time"], "instance": ["bits_allocated"]}
    for table, columns in more.items():
        for column in columns:
            db.execute(f"ALTER TABLE {table} ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")
    if db.execute("SELECT 1 FROM pack LIMIT 1").fetchone() is not None:
        # What they are of the rows that there are, the packs say: they are read anew.
        empty(db)


def empty(db: Database) -> None:
    """Remove every row, and note that the index is to be filled anew."""
    for table in ("instance", "series", "study", "pack", "unreadable"):
        db.execute(f"DELETE FROM {table}")  # noqa: S608
    db.execute("INSERT OR REPLACE INTO meta VALUES ('filling', '0')")
