"""The desk's listener for DIMSE: which associations a peer may have, and what for.

A peer's operations say what is accepted at all; which instances it sees is the vault's to know.
"""

from __future__ import annotations

import logging
import threading

from storescp.desk.models import MODELS
from storescp.desk.session import Session, Tools
from storescp.gate import negotiate, wire
from storescp.gate.negotiate import Agreement, Offer
from storescp.gate.origin import Origin
from storescp.gate.stream import Stream
from storescp.gate.transfer import STORAGE_CLASSES, VERIFICATION
from storescp.peers import Peer

_MAXIMUM_PDU = 131_072
_REQUEST_SECONDS = 15.0

log = logging.getLogger(__name__)


class Serving:
    """The service of the desk's connections."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self.ae_title = tools.config.settings.gate.ae_title
        self.request_seconds = _REQUEST_SECONDS
        self.maximum_pdu = _MAXIMUM_PDU
        self._lock = threading.Lock()
        # Whose association each connection is.
        self._associations: dict[int, str] = {}

    def agree(self, request: negotiate.Request, peer: Peer) -> Agreement:
        """Return what a peer may use: verification, the models of its operations, and storage that it is SCP of."""

        def uses(abstract: str) -> bool:
            if abstract == VERIFICATION:
                return "echo" in peer.operations
            model = MODELS.get(abstract)
            if model is not None:
                return model.operation in peer.operations
            return receives(abstract)

        def receives(abstract: str) -> bool:
            return "get" in peer.operations and (abstract in STORAGE_CLASSES or abstract in private)

        # Whatever somebody may store, somebody may fetch.
        private = {uid for other in self._tools.peers().by_title.values() for uid in other.private_sop_classes}
        return negotiate.agree(request, Offer(uses, receives, MODELS), maximum_pdu=self.maximum_pdu)

    def may_associate(self, number: int, peer: Peer) -> bool:
        """Count a peer's associations here, which are others than those with the gate."""
        with self._lock:
            under_way = sum(title == peer.ae_title for title in self._associations.values())
            if 0 < peer.maximum_associations <= under_way:
                return False
            self._associations[number] = peer.ae_title
            return True

    def ended(self, number: int) -> None:
        """Hear that a connection is over, whatever it was."""
        with self._lock:
            self._associations.pop(number, None)

    def turned_away(self, where: str, address: str, reason: str, calling: str = "") -> None:
        """The log has it."""

    def step(self, number: int, step: str, **fields: object) -> None:
        """Nobody follows the desk's connections step by step."""

    def begin(self, stream: Stream, reader: wire.Reader, agreement: Agreement, origin: Origin, peer: Peer) -> Session:
        """Serve an association that was just accepted."""
        return Session(stream, reader, agreement, origin, peer, self._tools)

    def end(self, conversation: Session, origin: Origin, ending: str) -> dict[str, object]:
        """Tell the log what an association did."""
        counts = conversation.tally
        log.info(
            "association %s %s: %d queries, %d retrievals, %d instances sent",
            origin.association,
            ending,
            counts.queries,
            counts.retrievals,
            counts.instances,
        )
        return {"queries": counts.queries, "retrievals": counts.retrievals, "instances": counts.instances}
