"""The query/retrieve information models that the desk serves, and which key identifies what at each level.

Source: PS3.4 C.6.1 (Patient Root), C.6.2 (Study Root).
"""

from __future__ import annotations

from typing import NamedTuple

PATIENT_ID, STUDY_UID, SERIES_UID, SOP_UID = "00100020", "0020000D", "0020000E", "00080018"
LEVEL = "00080052"
UNIQUE = {"PATIENT": PATIENT_ID, "STUDY": STUDY_UID, "SERIES": SERIES_UID, "IMAGE": SOP_UID}


class Model(NamedTuple):
    """An information model in one of its services; ``levels`` from the root on."""

    operation: str
    levels: tuple[str, ...]


_PATIENT, _STUDY = ("PATIENT", "STUDY", "SERIES", "IMAGE"), ("STUDY", "SERIES", "IMAGE")
MODELS = {
    "1.2.840.10008.5.1.4.1.2.1.1": Model("find", _PATIENT),
    "1.2.840.10008.5.1.4.1.2.1.2": Model("move", _PATIENT),
    "1.2.840.10008.5.1.4.1.2.1.3": Model("get", _PATIENT),
    "1.2.840.10008.5.1.4.1.2.2.1": Model("find", _STUDY),
    "1.2.840.10008.5.1.4.1.2.2.2": Model("move", _STUDY),
    "1.2.840.10008.5.1.4.1.2.2.3": Model("get", _STUDY),
}
