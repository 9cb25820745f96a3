"""What this server may store: the standard's storage SOP classes, and how each transfer syntax is encoded.

The lists are those of pynetdicom and pydicom; this is one of the two places of the gate that import them.
"""

from __future__ import annotations

import msgspec
from pydicom._uid_dict import UID_dictionary
from pynetdicom import AllStoragePresentationContexts

VERIFICATION = "1.2.840.10008.1.1"
# Storage Commitment Push Model.
COMMITMENT = "1.2.840.10008.1.20.1"


class Encoding(msgspec.Struct, frozen=True):
    """How a transfer syntax encodes a data set."""

    implicit: bool
    little_endian: bool
    deflated: bool


_EXPLICIT = Encoding(implicit=False, little_endian=True, deflated=False)
_DEFLATED = Encoding(implicit=False, little_endian=True, deflated=True)
_IMPLICIT = Encoding(implicit=True, little_endian=True, deflated=False)
_UNLIKE = {
    "1.2.840.10008.1.2": _IMPLICIT,
    "1.2.840.10008.1.20": _IMPLICIT,
    "1.2.840.10008.1.2.2": Encoding(implicit=False, little_endian=False, deflated=False),
    "1.2.840.10008.1.2.1.99": _DEFLATED,
    "1.2.840.10008.1.2.4.95": _DEFLATED,
    "1.2.840.10008.1.2.4.205": _DEFLATED,
}
# Not encodings of a data set in an association: MIME, XML, and the real-time video of SMPTE ST 2110.
_NO_DATA_SET = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.")
# Classes without a patient and study (protocols, inventories): nothing to file them under.
_NO_STUDY = ("1.2.840.10008.5.1.4.1.1.200.", "1.2.840.10008.5.1.4.1.1.201.")

ENCODINGS = {
    uid: _UNLIKE.get(uid, _EXPLICIT)
    for uid, entry in UID_dictionary.items()
    if entry[1] == "Transfer Syntax" and not uid.startswith(_NO_DATA_SET)
}

STORAGE_CLASSES = frozenset(str(cx.abstract_syntax) for cx in AllStoragePresentationContexts) | frozenset(
    uid
    for uid, entry in UID_dictionary.items()
    if entry[1] == "SOP Class"
    and "Storage" in entry[0]
    and uid.startswith("1.2.840.10008.5.1.4.1.1.")
    and not uid.startswith(_NO_STUDY)
)
