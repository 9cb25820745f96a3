"""Storage commitment as the gate takes it: the request is durable before it is answered; the desk reports later.

The references go to the vault as sealed events, some at a time; the gate knows nothing of what is archived.
Source: PS3.4 J.3.2.
"""

from __future__ import annotations

import io

from pydicom.filereader import read_dataset

from storage.attributes import is_uid
from storage.deposit import DepositError
from storescp.gate.journal import Journal
from storescp.gate.origin import Origin
from storescp.gate.transfer import ENCODINGS

# The well-known instance of the Storage Commitment Push Model.
INSTANCE = "1.2.840.10008.1.20.1.1"
_SUCCESS, _PROCESSING_FAILURE, _INVALID_ARGUMENT, _NO_SUCH_INSTANCE = 0x0000, 0x0110, 0x0115, 0x0112
_NO_SUCH_ACTION, _RESOURCE_LIMITATION = 0x0123, 0x0213
# About 7,000 instances; more are several requests.
_LIMIT = 1 << 20
# References in an event: what the vault records of the gate's events at a time is bounded.
_PER_EVENT = 500


class CommitRequest:
    """One N-ACTION's data set, collected up to a bound."""

    def __init__(self, transfer_syntax: str, origin: Origin, journal: Journal) -> None:
        self._transfer_syntax = transfer_syntax
        self._origin = origin
        self._journal = journal
        self._content = bytearray()
        self._is_too_long = False

    def take(self, data: memoryview) -> None:
        """Take bytes of the data set."""
        if len(self._content) + len(data) > _LIMIT:
            self._is_too_long = True
            self._content.clear()
        if not self._is_too_long:
            self._content += data

    def end(self, instance: str, action: int) -> tuple[int, str]:
        """Keep the request durably; return status and comment of the response.

        Args:
            instance: The SOP Instance UID of the command.
            action: Its action type.
        """
        if instance != INSTANCE:
            return _NO_SUCH_INSTANCE, "no such SOP instance of storage commitment"
        if action != 1:
            return _NO_SUCH_ACTION, "no such action"
        if self._is_too_long:
            return _RESOURCE_LIMITATION, "too many references in one request"
        found = _references(bytes(self._content), self._transfer_syntax)
        if found is None:
            return _INVALID_ARGUMENT, "the request cannot be understood, or names no instance"
        transaction, references = found
        parts = [references[i : i + _PER_EVENT] for i in range(0, len(references), _PER_EVENT)]
        try:
            for number, part in enumerate(parts):
                self._journal.event_now(
                    "commitment-requested",
                    association=self._origin.association,
                    calling=self._origin.calling,
                    address=self._origin.address,
                    transaction=transaction,
                    part=number,
                    parts=len(parts),
                    instances=[f"{sop_class} {sop}" for sop_class, sop in part],
                )
        except (DepositError, OSError):
            return _PROCESSING_FAILURE, "the request cannot be kept"
        return _SUCCESS, ""


def _references(content: bytes, transfer_syntax: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the transaction and what it refers to, SOP class and instance each; None where that is not there."""
    encoding = ENCODINGS[transfer_syntax]
    try:
        found = read_dataset(io.BytesIO(content), encoding.implicit, encoding.little_endian)
        transaction = str(found.TransactionUID)
        pairs = [
            (str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
            for item in found.ReferencedSOPSequence
        ]
    except Exception:
        # The library raises whatever it stumbles over; for us each of them is a malformed request.
        return None
    if not pairs or not is_uid(transaction) or not all(is_uid(uid) for pair in pairs for uid in pair):
        return None
    return transaction, list(dict.fromkeys(pairs))
