"""What becomes of a record that arrived: pure decisions, no I/O."""

from __future__ import annotations

import enum

from storage.attributes import Attributes
from storage.index import Patient
from storage.search import fold


class Verdict(enum.Enum):
    """The five ways of a record; the value is the state that it gets in the index."""

    HOLD = "held"
    AGAIN = "again"
    ENCODING = "encoding"
    QUARANTINE = "quarantined"
    HEAL = "heal"


OTHER_CONTENT = "other content under the UID of an instance that is held"
OTHER_PATIENT = "another patient than the study's"
OTHER_STUDY = "another study than the pack's first record"
ERASED = "its study was erased before, and retention.resent wants a decision"
OTHER_KEY = "a pack under a key id that is known, with other records"


def patient_of(found: Attributes) -> Patient:
    """Return whom an instance is about."""
    return Patient(found.text("00100020"), fold(found.name("00100010").get("Alphabetic", "")))


def contradicts(study: Patient, instance: Patient) -> bool:
    """Tell whether an instance is about another patient than its study.

    Ids decide where both have one, else names where both have one; what is missing contradicts nothing.
    """
    if study.patient_id and instance.patient_id:
        return study.patient_id != instance.patient_id
    return bool(study.name and instance.name) and study.name != instance.name


def judge(
    *,
    first_study: str,
    study: str,
    patient: Patient | None,
    instance: Patient,
    held_syntax: str | None,
    syntax: str,
    erased: bool = False,
) -> tuple[Verdict, str] | None:
    """Decide about a record as far as attributes can.

    Args:
        first_study: Study of the pack's first record.
        study: Study of this record.
        patient: Whom the study is about, if it is held.
        instance: Whom this record is about.
        held_syntax: Transfer syntax of the instance held under this UID, if one is.
        syntax: Transfer syntax of this record.
        erased: The study was erased before, nothing of it is held again, and somebody is to decide about it.

    Returns:
        A verdict with its reason, or None where the contents of both must be compared.
    """
    if study != first_study:
        return Verdict.QUARANTINE, OTHER_STUDY
    if erased:
        return Verdict.QUARANTINE, ERASED
    if held_syntax is None:
        if patient is not None and contradicts(patient, instance):
            return Verdict.QUARANTINE, OTHER_PATIENT
        return Verdict.HOLD, ""
    if held_syntax != syntax:
        return Verdict.ENCODING, "the same instance in another transfer syntax"
    return None
