"""Who sent, saw, exported or erased a patient's studies: by the audit chain, and the index for whose they are.

The chain names studies. Which are the patient's is what the index says now: of a study that was erased nobody knows any
more whose it was, so that those are counted apart, and can be asked for by their UID.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from storage.index import Index
from storage.matching import QueryError
from storage.query import Query, Scope
from storage.search import FilterError, Filters
from storescp.auditevents import counted, named_studies

_STUDY_UID = "0020000D"


class Who:
    """One look through the chain."""

    def __init__(self, index: Index, patient: str, studies: Iterable[str]) -> None:
        """Prepare.

        Args:
            index: A reader's.
            patient: Patient ID, empty where only studies are asked for.
            studies: UIDs that are asked for besides.
        """
        self._index = index
        self._patient = patient
        self.studies = set(studies)
        if patient:
            # What is asked for is one patient: wildcards in an ID are part of it.
            rows = index.search("study", Filters(patient_id=patient))
            self.studies |= {row["study"] for row in rows if row["patient_id"] == patient}
        self._seen: dict[bytes, bool] = {}
        self._exports: dict[tuple[Any, str], dict[str, Any]] = {}
        self._erasures: dict[str, tuple[str, Any]] = {}
        self._gone: set[int] = set()
        self.others_erased = 0

    def rows(self, records: Iterable[dict[str, Any]], since: str) -> Iterator[dict[str, Any]]:
        """Yield what the records say of the patient, in no certain order: ``kind``, ``who``, ``study``, ``instances``.

        Args:
            records: All of the chain, each with its number.
            since: Leave out what is older; RFC 3339, or the beginning of it.
        """
        for record in records:
            for row in self._of(self._told(record)):
                if row["time"] >= since:
                    yield {"number": record["number"], **row}
        for begun in self._exports.values():
            if begun["time"] >= since:
                yield begun

    def _told(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what a record says, each once: a transcript only where its record can be read no more."""
        match record["type"]:
            case "gone-with-its-version":
                self._gone.add(int(record["number"]))
            case "transcript" if int(record["of"]) in self._gone:
                return {**record["record"], "number": record["number"]}
        return record

    def _of(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind, study = record["type"], str(record.get("study", ""))
        match kind:
            case "gate-events":
                for event in record["events"]:
                    if event["type"] == "association-ended":
                        yield from self._sent(event)
            case "query" if self._saw(record):
                yield self._row("saw", record, "", what=f"list {record.get('level', '')}")
            case "export-begun" if study in self.studies:
                row = self._row("exported", record, study, what="begun, and not ended yet")
                self._exports[_whose(record), study] = {"number": record["number"], **row}
            case "exported" if study in self.studies:
                self._exports.pop((_whose(record), study), None)
                for_whom = ""
                if "to" in record:
                    for_whom = (
                        f"to {record['to']}" if "peer" in record else " ".join(["for certificate", *record["to"]])
                    )
                yield self._row("exported", record, study, what=for_whom, instances=int(record.get("instances", 0)))
            case "erase-begun":
                self._erasures[str(record.get("erasure"))] = study, record.get("uid")
                if study in self.studies:
                    yield self._row("erased", record, study, what=f"begun: {record.get('reason', '')}")
            case "erased":
                study, uid = self._erasures.get(str(record.get("erasure")), ("", None))
                if study in self.studies:
                    yield self._row("erased", {**record, "uid": uid}, study, what="done")
                else:
                    self.others_erased += 1

    def _sent(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        who = f"{event.get('calling', '')} at {event.get('address', '')}"
        for study, count in named_studies(event).items():
            if study in self.studies:
                yield {
                    "kind": "sent",
                    "time": str(event["time"]),
                    "who": who,
                    "study": study,
                    "instances": counted(count),
                    "what": "",
                }

    def _row(
        self, kind: str, record: dict[str, Any], study: str, *, what: str = "", instances: int = 0
    ) -> dict[str, Any]:
        uid = record.get("uid")
        who = "the vault itself" if uid is None else f"uid {uid}"
        # The desk asked for a peer, which is known here by its own word alone.
        if "peer" in record:
            who = f"{record['peer']} by the desk"
        return {
            "kind": kind,
            "time": str(record["time"]),
            "who": who,
            "study": study,
            "instances": instances,
            "what": what,
        }

    def _saw(self, record: dict[str, Any]) -> bool:
        """Tell whether a query's answer named the patient, as far as the index can tell now."""
        if "peer" in record:
            return self._saw_by_desk(record)
        try:
            filters = msgspec.convert(record.get("filters", {}), Filters)
        except msgspec.ValidationError:
            return False
        if record.get("level") not in {"study", "series", "instance"}:
            return False
        if (self._patient and filters.patient_id == self._patient) or filters.study in self.studies:
            # Whoever asked for just this, whatever came.
            return True
        asked = msgspec.json.encode([record["level"], filters])
        if asked not in self._seen:
            self._seen[asked] = filters.study is None and any(
                self._finds(str(record["level"]), msgspec.structs.replace(filters, study=study))
                for study in self.studies
            )
        return self._seen[asked]

    def _saw_by_desk(self, record: dict[str, Any]) -> bool:
        """The same for a query of the desk, whose keys are DICOM's; what that peer saw then is not known any more."""
        try:
            query = msgspec.convert({"level": str(record["level"]).upper(), "match": record.get("filters", {})}, Query)
            asked = msgspec.json.encode(query)
            if asked not in self._seen:
                self._seen[asked] = any(self._asked_for(query, study) for study in self.studies)
        except (msgspec.ValidationError, QueryError):
            return False
        return self._seen[asked]

    def _asked_for(self, query: Query, study: str) -> bool:
        named = query.match.get(_STUDY_UID, [])
        if named and study not in named:
            return False
        match = {**query.match, _STUDY_UID: [study]}
        level = "STUDY" if query.level == "PATIENT" else query.level
        asked = msgspec.structs.replace(query, match=match, level=level)
        return next(self._index.query(asked, Scope()), None) is not None

    def _finds(self, level: str, filters: Filters) -> bool:
        try:
            return next(self._index.search(level, filters), None) is not None
        except FilterError:
            return False


def _whose(record: dict[str, Any]) -> object:
    """Return whose export a record is of: a peer's through the desk, else a user's."""
    return record["peer"] if "peer" in record else record.get("uid")
