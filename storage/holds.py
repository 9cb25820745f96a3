"""Holds: what nobody may erase, by study and by patient. Pure: who placed which and why is the ledger's."""

from __future__ import annotations

from collections.abc import Iterable


class Holds:
    """What must not be erased, by study and by patient.

    Args:
        studies: Study Instance UIDs.
        patients: Patient IDs, each with its issuer, empty for any.

    Raises:
        ValueError: A hold names nothing, so that it would hold nothing.
    """

    def __init__(self, studies: Iterable[str] = (), patients: Iterable[tuple[str, str]] = ()) -> None:
        self._studies = frozenset(studies)
        self._patients: dict[str, set[str]] = {}
        for patient_id, issuer in patients:
            self._patients.setdefault(patient_id.strip(" "), set()).add(issuer.strip(" "))
        if "" in self._studies or "" in self._patients:
            raise ValueError("a hold names no study or patient")

    @property
    def on_patients(self) -> bool:
        """Tell whether any patient is held."""
        return bool(self._patients)

    def on(self, study: str, patient_id: str, issuer: str) -> str:
        """Return which hold a study is under, in words; empty for none.

        An issuer that is missing, in the hold or in the study, may be the other's.
        """
        if study in self._studies:
            return "a hold on the study"
        issuers = self._patients.get(patient_id.strip(" "))
        if issuers and ("" in issuers or not issuer.strip(" ") or issuer.strip(" ") in issuers):
            return "a hold on the patient"
        return ""
