"""One established association: requests in, objects into packs, responses out. One thread, bounded memory."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from storage.deposit import Deposits
from storescp.config import Gate
from storescp.gate import dimse, meter, wire
from storescp.gate.commit import CommitRequest
from storescp.gate.describe import Describer
from storescp.gate.dimse import Command
from storescp.gate.incoming import Incoming
from storescp.gate.journal import Journal
from storescp.gate.meter import Meter
from storescp.gate.negotiate import Agreement, Context
from storescp.gate.origin import Origin
from storescp.gate.quota import Allowances
from storescp.gate.status import SUCCESS, UNRECOGNIZED_OPERATION, Reason, RefusedError
from storescp.gate.stream import StoppingError, Stream
from storescp.gate.transfer import COMMITMENT, VERIFICATION
from storescp.peers import Peer
from storescp.space import Watch

# What is taken from the connection before it is looked at: a peer that sends fast costs few steps.
_RECEIVE_BYTES = 1 << 18

log = logging.getLogger(__name__)


class Resources(NamedTuple):
    """What all associations of a worker share."""

    settings: Gate
    deposits: Deposits
    space: Watch
    allowances: Allowances
    meter: Meter
    journal: Journal


class Tally:
    """What an association did, for the log line at its end."""

    def __init__(self) -> None:
        self.stored = 0
        self.refused = 0
        self.bytes = 0
        # How many were refused with each status, and how many stored of each study.
        self.reasons: dict[str, int] = {}
        self.studies: dict[str, int] = {}


class Association:
    """The message loop of an accepted association."""

    def __init__(
        self,
        stream: Stream,
        reader: wire.Reader,
        agreement: Agreement,
        origin: Origin,
        peer: Peer,
        resources: Resources,
    ) -> None:
        self._space = resources.space
        self._peer = peer
        self._allowances = resources.allowances
        self._stream = stream
        self._reader = reader
        self._agreement = agreement
        self._origin = origin
        self._deposits = resources.deposits
        self._idle_seconds = resources.settings.idle_seconds
        self._message_seconds = resources.settings.message_seconds
        self._began = self._deadline = 0.0
        self._command_part = bytearray()
        self._command_context = 0
        self._command: tuple[Command, int] | None = None
        self._incoming: Incoming | None = None
        self._commit: CommitRequest | None = None
        self._journal = resources.journal
        self._describer = Describer()
        self._between = True
        self.tally = Tally()
        self.count = resources.meter.begin(peer.ae_title)

    @property
    def overdue(self) -> str:
        """What took too long, after a TimeoutError."""
        return "idle for too long" if self._between else "a message took too long, or stopped in the middle"

    def run(self, rest: list[wire.Pdu | wire.Fragment]) -> str:
        """Serve the association until it ends; return how it ended, for the log.

        Args:
            rest: Events that came in one read with the association request.

        Raises:
            WireError: The peer broke the protocol.
            OSError: The connection broke or was idle for too long.
        """
        buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._begin_phase(between=True)
        try:
            for event in rest:
                if ending := self._handle(event):
                    return ending
            while True:
                try:
                    count = self._stream.receive(buffer, self._patience(), between=self._between)
                except StoppingError:
                    self._stream.send(wire.abort(reason=0), self._idle_seconds)
                    return "aborted: the server is stopping"
                if not count:
                    return "closed by the peer without a release"
                for event in self._reader.receive(buffer[:count]):
                    if ending := self._handle(event):
                        return ending
        finally:
            if self._incoming is not None:
                self._incoming.abandon()

    def _patience(self) -> float:
        """Return how long to wait for the next bytes.

        A peer that lets single bytes trickle in gains nothing: the time counts from where a message began or ended.

        Raises:
            TimeoutError: It is over.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, self._idle_seconds)

    def _begin_phase(self, *, between: bool) -> None:
        self._between = between
        self._began = time.monotonic()
        self._deadline = self._began + (self._idle_seconds if between else self._message_seconds)

    def _handle(self, event: wire.Pdu | wire.Fragment) -> str:
        if isinstance(event, wire.Fragment):
            if self._between:
                self._begin_phase(between=False)
            self._fragment(event)
            return ""
        if event.kind == wire.RELEASE_RQ:
            if self._command is not None or self._command_part:
                raise wire.WireError("a release request within a message")
            self._stream.send(wire.release_reply(), self._idle_seconds)
            return "released"
        if event.kind == wire.ABORT:
            return "aborted by the peer"
        raise wire.WireError("a PDU that has no place in an established association")

    def _fragment(self, event: wire.Fragment) -> None:
        context = self._agreement.contexts.get(event.context_id)
        if context is None:
            raise wire.WireError("a fragment names a presentation context that was not accepted")
        if event.command:
            if self._command is not None:
                raise wire.WireError("a command where a data set is expected")
            if self._command_part and event.context_id != self._command_context:
                raise wire.WireError("a command goes on in another presentation context")
            self._command_context = event.context_id
            self._command_part += event.data
            if len(self._command_part) > dimse.COMMAND_LIMIT:
                raise wire.WireError("a command set is too long")
            if event.last:
                content = bytes(self._command_part)
                self._command_part.clear()
                self._begin(content, event.context_id, context)
            return
        if self._command is None or event.context_id != self._command[1]:
            raise wire.WireError("a data set without its command, or of another presentation context")
        if self._incoming is not None:
            self._incoming.take(event.data)
        elif self._commit is not None:
            self._commit.take(event.data)
        if event.last:
            self._end()

    def _begin(self, content: bytes, context_id: int, context: Context) -> None:
        try:
            command = dimse.decode(content)
        except dimse.CommandError as error:
            raise wire.WireError(str(error)) from error
        if command.field == dimse.C_CANCEL_RQ:
            self._begin_phase(between=True)
            return
        self._command = (command, context_id)
        if command.field == dimse.N_ACTION_RQ and context.abstract_syntax == COMMITMENT and command.has_data_set:
            self._commit = CommitRequest(context.transfer_syntax, self._origin, self._journal)
        is_object = context.abstract_syntax not in {VERIFICATION, COMMITMENT}
        if command.field == dimse.C_STORE_RQ and is_object and command.has_data_set:
            self._incoming = Incoming(command, context, self._origin, self._deposits, self._describer, self._space)
            if self._allowances.is_used_up(self._peer):
                self._incoming.refuse(Reason.DAY_USED_UP)
        if not command.has_data_set:
            self._end()

    def _end(self) -> None:
        if self._command is None:
            raise wire.WireError("a message ends that never began")
        command, context_id = self._command
        incoming, self._incoming, self._command = self._incoming, None, None
        request, self._commit = self._commit, None
        began = self._began
        status, comment = SUCCESS, ""
        refusal: Reason | None = None
        if incoming is not None:
            try:
                incoming.end()
                self._took(incoming)
                log.debug("association %s: stored object %s", self._origin.association, incoming.object_id)
            except RefusedError as refused:
                refusal = refused.reason
        elif request is not None:
            status, comment = request.end(command.sop_instance, command.action)
        elif command.field == dimse.C_STORE_RQ:
            refusal = Reason.NO_DATA_SET if not command.has_data_set else Reason.SOP_CLASS
        elif command.field != dimse.C_ECHO_RQ:
            status = UNRECOGNIZED_OPERATION
        if refusal is not None:
            status, comment = refusal.status, refusal.comment
        if status != SUCCESS:
            self.count.refuse(refusal.name if refusal is not None else meter.UNRECOGNIZED)
            self.tally.refused += 1
            self.tally.reasons[f"{status:04X}"] = self.tally.reasons.get(f"{status:04X}", 0) + 1
            log.warning("association %s: refused with %04X: %s", self._origin.association, status, comment)
        reply = wire.data_pdus(
            context_id,
            command=True,
            content=dimse.response(command, status, comment),
            maximum=self._agreement.maximum_pdu,
        )
        self._allowances.pause(self._peer)
        self._stream.send(reply, self._idle_seconds)
        self._begin_phase(between=True)
        if command.field == dimse.C_STORE_RQ:
            self.count.answered(self._began - began)

    def _took(self, incoming: Incoming) -> None:
        tally = self.tally
        tally.stored += 1
        tally.bytes += incoming.size
        self.count.stored(incoming.size)
        tally.studies[incoming.study] = tally.studies.get(incoming.study, 0) + 1
        self._space.took(incoming.size)
        self._allowances.took(self._peer, incoming.size)
