"""Which instances somebody is to be given: by unique keys, within what they may see. What is held, and nothing else."""

# ruff: noqa: S608  (statements are made of the constants here; what somebody asks with is a parameter)
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from storage.query import Scope
from storage.sqlite import Database


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unique keys; all that are given must match, and one at least is. Empty lists mean no limit."""

    patients: list[str] = []
    studies: list[str] = []
    series: list[str] = []
    instances: list[str] = []

    @property
    def is_empty(self) -> bool:
        """Whether no key is given, which selects nothing."""
        return not (self.patients or self.studies or self.series or self.instances)


class Part(msgspec.Struct, frozen=True):
    """How many instances of a study are selected, by SOP class and transfer syntax, and their sealed bytes."""

    study: str
    sop_class: str
    transfer_syntax: str
    instances: int
    bytes: int


class Selected(msgspec.Struct, frozen=True):
    """An instance that is selected: the pack and object it is, and what it is called."""

    pack: str
    object_id: str
    study: str
    series: str
    sop: str
    sop_class: str
    transfer_syntax: str
    calling: str
    dataset_length: int


def parts(db: Database, selection: Selection, scope: Scope) -> list[Part]:
    """Return what a selection comes to, in the order of studies."""
    where, values = _where(selection, scope)
    rows = db.execute(
        "SELECT i.study, i.sop_class, i.transfer_syntax, count(*), sum(i.dataset_length) FROM instance i"
        f" WHERE {where} GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
        values,
    )
    return [Part(*row) for row in rows]


def selected(db: Database, selection: Selection, scope: Scope) -> Iterator[Selected]:
    """Yield the instances of a selection in the order in which they lie in their packs, a pack's at a time."""
    where, values = _where(selection, scope)
    packs = db.execute(
        f"SELECT DISTINCT i.study, i.pack FROM instance i WHERE {where} ORDER BY 1, 2",
        values,
    ).fetchall()
    for _, pack in packs:
        # Not one long read. A pack that is moved meanwhile is followed; from here on its objects find it.
        name: str | None = pack
        while name is not None:
            rows = db.execute(
                "SELECT i.pack, i.object_id, i.study, i.series, i.uid, i.sop_class, i.transfer_syntax, i.calling,"
                f" i.dataset_length FROM instance i WHERE i.pack = ? AND {where} ORDER BY i.offset",
                [name, *values],
            ).fetchall()
            if rows:
                yield from (Selected(*row) for row in rows)
                break
            moved = db.execute("SELECT new FROM moved WHERE old = ?", [name]).fetchone()
            name = str(moved[0]) if moved else None


def _where(selection: Selection, scope: Scope) -> tuple[str, list[Any]]:
    tests, values = ["i.state = 'held'"], list[Any]()
    listed = (
        ("i.study", selection.studies),
        ("i.series", selection.series),
        ("i.uid", selection.instances),
        ("+i.calling", scope.ae_titles),
    )
    for column, wanted in listed:
        if wanted:
            tests.append(f"{column} IN (SELECT value FROM json_each(?))")
            values.append(msgspec.json.encode(wanted).decode())
    if selection.patients:
        tests.append("i.study IN (SELECT s.uid FROM study s WHERE s.patient_id IN (SELECT value FROM json_each(?)))")
        values.append(msgspec.json.encode(selection.patients).decode())
    if scope.modalities:
        tests.append(
            "EXISTS (SELECT 1 FROM series e WHERE e.study = i.study AND e.uid = i.series"
            " AND e.modality IN (SELECT value FROM json_each(?)))"
        )
        values.append(msgspec.json.encode(scope.modalities).decode())
    if selection.series and not selection.studies:
        # By what has an index: instances are found by study, then series.
        tests.append("i.study IN (SELECT e.study FROM series e WHERE e.uid IN (SELECT value FROM json_each(?)))")
        values.append(msgspec.json.encode(selection.series).decode())
    if selection.is_empty:
        tests.append("0")
    return " AND ".join(tests), values
