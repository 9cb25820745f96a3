"""What the gate's associations are for, receiving; and who is told: log, audit chain, metrics, a test of a peer."""

from __future__ import annotations

import logging

from storescp.gate import negotiate, wire
from storescp.gate.journal import studies
from storescp.gate.negotiate import Agreement
from storescp.gate.origin import Origin
from storescp.gate.receive import Association, Resources
from storescp.gate.stream import Stream
from storescp.peers import Peer

log = logging.getLogger(__name__)


class Reception:
    """The service of a worker's connections."""

    def __init__(self, resources: Resources, *, commits: bool) -> None:
        """Prepare.

        Args:
            resources: What all associations share.
            commits: There is a desk, which reports storage commitment.
        """
        self._resources = resources
        self._commits = commits
        self._journal = resources.journal
        settings = resources.settings
        self.ae_title = settings.ae_title
        self.request_seconds: float = settings.request_seconds
        self.maximum_pdu = settings.maximum_pdu

    def agree(self, request: negotiate.Request, peer: Peer) -> Agreement:
        """Return what a peer may use of storage and verification."""
        return negotiate.agree(request, negotiate.storage(peer, commits=self._commits), maximum_pdu=self.maximum_pdu)

    def may_associate(self, number: int, peer: Peer) -> bool:
        """Ask the gate's first process, which counts over all workers."""
        return self._resources.allowances.granted(number, peer, self.request_seconds)

    def turned_away(self, where: str, address: str, reason: str, calling: str = "") -> None:
        """Count it, and keep it for the audit chain."""
        if where:
            self._resources.meter.turned_away(where)
        self._journal.refused(address, reason, calling)

    def step(self, number: int, step: str, **fields: object) -> None:
        """Tell a test, if one is under way."""
        self._journal.step(number, step, **fields)

    def begin(
        self, stream: Stream, reader: wire.Reader, agreement: Agreement, origin: Origin, peer: Peer
    ) -> Association:
        """Receive from an association that was just accepted."""
        self._journal.event(
            "association-begun",
            association=origin.association,
            calling=origin.calling,
            address=origin.address,
            certificate=origin.certificate,
        )
        return Association(stream, reader, agreement, origin, peer, self._resources)

    def end(self, conversation: Association, origin: Origin, ending: str) -> dict[str, object]:
        """Tell log, metrics and audit chain what an association stored."""
        tally = conversation.tally
        self._resources.meter.end(conversation.count)
        log.info(
            "association %s %s: %d stored, %d refused, %d bytes",
            origin.association,
            ending,
            tally.stored,
            tally.refused,
            tally.bytes,
        )
        counts = {"stored": tally.stored, "refused": tally.refused, "bytes": tally.bytes}
        self._journal.event(
            "association-ended",
            association=origin.association,
            calling=origin.calling,
            address=origin.address,
            certificate=origin.certificate,
            ending=ending,
            **counts,
            reasons=tally.reasons,
            studies=studies(tally.studies),
        )
        return {**counts, "reasons": tally.reasons}
