"""Reports of storage commitment: what the vault decided, told to each peer on an association of our own.

Source: PS3.4 J.3.3; PS3.7 D.3.3.4 (role selection: we are the SCP of the class on an association that we ask for).
"""

from __future__ import annotations

import logging
from typing import Any

from pydicom.dataset import Dataset

from storescp.desk.asking import Asking, AskingError
from storescp.desk.identifiers import encode
from storescp.desk.messages import EndedError
from storescp.desk.outgoing import Outgoing, OutgoingError
from storescp.gate import dimse, wire
from storescp.gate.transfer import COMMITMENT
from storescp.peers import Peer, Peers

INSTANCE = "1.2.840.10008.1.20.1.1"
_COMMITTED, _FAILURES = 1, 2
_SYNTAXES = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"]

log = logging.getLogger(__name__)


class Reports:
    """Tells peers what was committed. One thread."""

    def __init__(self, asking: Asking, outgoing: Outgoing, title: str, seconds: float) -> None:
        self._asking = asking
        self._outgoing = outgoing
        self._title = title
        self._seconds = seconds

    def turn(self, peers: Peers) -> None:
        """Tell what is due; what cannot be told is due again later."""
        try:
            silent: dict[str, str] = {}
            for report in self._asking.commitments():
                title = str(report["peer"])
                # Who just was not there keeps nobody else waiting.
                why = silent.get(title) or self._tell(report, peers.by_title.get(title))
                if why:
                    silent[title] = why
                self._told(report, why)
        except AskingError as error:
            if not error.locked:
                log.error("reports of storage commitment wait: %s", error)

    def _told(self, report: dict[str, Any], why: str) -> None:
        try:
            self._asking.told(report, why)
        except AskingError as error:
            # Asked anew meanwhile: that is another report.
            if not error.nothing:
                raise

    def _tell(self, report: dict[str, Any], peer: Peer | None) -> str:
        """Tell a peer; return why that failed, empty where it did not."""
        if peer is None or peer.listens is None or "commit" not in peer.operations:
            return "no peer of that name may commit and listens anywhere"
        content = {1: (COMMITMENT, _SYNTAXES)}
        try:
            with self._outgoing.proposed(peer, content, roles=(COMMITMENT,)) as (messages, contexts):
                if 1 not in contexts:
                    return "the peer does not accept storage commitment"
                event = _FAILURES if report["failed"] else _COMMITTED
                command = dimse.event_report(1, COMMITMENT, INSTANCE, event)
                messages.send(1, command, encode(_report(report, self._title), contexts[1].transfer_syntax))
                answer = dimse.decode_answer(messages.next(self._seconds).command)
                if (answer.field, answer.message_id) != (dimse.N_EVENT_REPORT_RQ, 1):
                    raise wire.WireError("a response to something else")
                if answer.status != 0:
                    return f"the peer answered with {answer.status:04X}"
        except (OutgoingError, EndedError, wire.WireError, dimse.CommandError, OSError) as error:
            return str(error) or type(error).__name__
        log.info("storage commitment reported to %s: %d failed", peer.ae_title, len(report["failed"]))
        return ""


def _report(report: dict[str, Any], title: str) -> Dataset:
    found = Dataset()
    found.RetrieveAETitle = title
    found.TransactionUID = report["transaction"]
    if report["failed"]:
        found.FailedSOPSequence = [_item(sop_class, sop, reason) for sop_class, sop, reason in report["failed"]]
    if report["committed"]:
        found.ReferencedSOPSequence = [_item(sop_class, sop) for sop_class, sop in report["committed"]]
    return found


def _item(sop_class: str, sop: str, reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop
    if reason is not None:
        item.FailureReason = reason
    return item
