"""The message loop of an association with the desk: C-ECHO, C-FIND, C-GET and C-MOVE, each decided by the vault.

Source: PS3.4 C.4; PS3.7 9.1.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from storescp.config import Config
from storescp.desk import identifiers
from storescp.desk.asking import Asking, AskingError
from storescp.desk.identifiers import IdentifierError
from storescp.desk.messages import EndedError, Message, Messages
from storescp.desk.models import MODELS
from storescp.desk.outgoing import Outgoing, OutgoingError
from storescp.desk.retrieval import Originator, Retrieval
from storescp.errors import StrongroomError
from storescp.gate import dimse, wire
from storescp.gate.dimse import Command, Counts
from storescp.gate.negotiate import Agreement, Context
from storescp.gate.origin import Origin
from storescp.gate.stream import StoppingError, Stream
from storescp.gate.transfer import VERIFICATION
from storescp.handover import HandoverError, Taking
from storescp.peers import Peer, Peers

SUCCESS, SOME_FAILED = 0x0000, 0xB000
PENDING, PENDING_UNSUPPORTED = 0xFF00, 0xFF01
NO_RESOURCES, NO_SUBOPERATIONS = 0xA700, 0xA702
NO_DESTINATION, MISMATCH, UNABLE = 0xA801, 0xA900, 0xC001
NO_SUCH_OPERATION = 0x0211
# How often the numbers of sub-operations are told: each response costs a turn of the connection.
_PENDING_SECONDS = 0.25

log = logging.getLogger(__name__)


class Tools(NamedTuple):
    """What all associations of the desk share."""

    config: Config
    asking: Asking
    peers: Callable[[], Peers]
    outgoing: Outgoing


class Tally:
    """What an association did."""

    def __init__(self) -> None:
        self.queries = self.retrievals = self.instances = 0


class _RefusedError(Exception):
    """A request is answered with a status other than success."""

    def __init__(self, status: int, comment: str, counts: Counts | None = None) -> None:
        super().__init__(comment)
        self.status = status
        self.comment = comment
        self.counts = counts


class _CutError(Exception):
    """Nothing more can be sent to where instances go."""


class Session:
    """The message loop of an association with a peer that asks."""

    def __init__(
        self, stream: Stream, reader: wire.Reader, agreement: Agreement, origin: Origin, peer: Peer, tools: Tools
    ) -> None:
        self._stream = stream
        self._reader = reader
        self._agreement = agreement
        self._origin = origin
        self._peer = peer
        self._tools = tools
        self._seconds = float(tools.config.settings.desk.idle_seconds)
        self._messages: Messages | None = None
        self.tally = Tally()

    @property
    def overdue(self) -> str:
        """What took too long, after a TimeoutError."""
        between = self._messages is None or self._messages.between
        return "idle for too long" if between else "a message took too long, or stopped in the middle"

    def run(self, rest: list[wire.Pdu | wire.Fragment]) -> str:
        """Serve the association until it ends; return how it ended."""
        self._messages = messages = Messages(
            self._stream, self._reader, rest, self._agreement.maximum_pdu, self._seconds
        )
        try:
            while True:
                self._answer(messages, messages.next(self._seconds, between=True))
        except EndedError as ended:
            return str(ended)
        except StoppingError:
            self._stream.send(wire.abort(reason=0), self._seconds)
            return "aborted: the server is stopping"

    def _answer(self, messages: Messages, message: Message) -> None:
        context = self._agreement.contexts.get(message.context_id)
        if context is None:
            raise wire.WireError("a message names a presentation context that was not accepted")
        if dimse.is_response(message.command):
            raise wire.WireError("a response where a request is expected")
        command = dimse.decode(message.command)
        model = MODELS.get(context.abstract_syntax)
        work = {dimse.C_FIND_RQ: ("find", self._find), dimse.C_GET_RQ: ("get", self._get)}
        work[dimse.C_MOVE_RQ] = ("move", self._move)
        operation, does = work.get(command.field, ("", self._find))
        try:
            if command.field == dimse.C_CANCEL_RQ:
                # What it cancels is done already.
                return
            if command.field == dimse.C_ECHO_RQ and context.abstract_syntax == VERIFICATION:
                messages.send(message.context_id, dimse.response(command, SUCCESS))
            elif model is None or model.operation != operation or message.data is None:
                raise _RefusedError(NO_SUCH_OPERATION, "no such operation in this presentation context")
            else:
                does(messages, message, command, context)
        except (_RefusedError, IdentifierError, AskingError, OutgoingError, HandoverError) as error:
            status, comment = _told(error, operation)
            counts = error.counts if isinstance(error, _RefusedError) else None
            if status == SUCCESS and operation != "find":
                counts = Counts()
            level = logging.INFO if status == SUCCESS else logging.WARNING
            said = comment or "nothing that the peer sees matches"
            log.log(level, "association %s: answered with %04X: %s", self._origin.association, status, said)
            messages.send(message.context_id, dimse.response(command, status, comment, counts=counts))

    # --- C-FIND

    def _find(self, messages: Messages, message: Message, command: Command, context: Context) -> None:
        model = MODELS[context.abstract_syntax]
        query, supported = identifiers.query(identifiers.decode(message.data or b"", context.transfer_syntax), model)
        status = SUCCESS
        pending = PENDING if supported else PENDING_UNSUPPORTED
        title = self._tools.config.settings.gate.ae_title
        with self._tools.asking.found(self._peer.ae_title, "find", query) as rows:
            self.tally.queries += 1
            for row in rows:
                if self._is_cancelled(messages, command):
                    status = dimse.CANCELLED
                    break
                found = identifiers.answer(row, query, title, context.transfer_syntax)
                messages.send(message.context_id, dimse.response(command, pending, has_data_set=True), found)
        messages.send(message.context_id, dimse.response(command, status))

    # --- C-GET, C-MOVE

    def _get(self, messages: Messages, message: Message, command: Command, context: Context) -> None:
        takes = {number: c for number, c in self._agreement.contexts.items() if c.receives}
        if not takes:
            raise _RefusedError(NO_SUBOPERATIONS, "no storage context was accepted in which the peer is SCP")
        with self._retrieved(message, context, "get", self._peer.ae_title) as taking:
            retrieval = Retrieval(messages, takes, self._seconds)

            def other(came: Message) -> None:
                retrieval.cancelled = retrieval.cancelled or _cancels(came, command)

            self._send(messages, message, command, retrieval, taking, other)
            self._conclude(messages, message, command, context, retrieval)

    def _move(self, messages: Messages, message: Message, command: Command, context: Context) -> None:
        to = self._tools.peers().by_title.get(command.destination)
        if to is None or to.listens is None:
            raise _RefusedError(NO_DESTINATION, "the move destination is unknown")

        def other(_came: Message) -> None:
            raise wire.WireError("the move destination asks for something")

        with self._retrieved(message, context, "move", to.ae_title) as taking:
            retrieval: Retrieval | None = None
            try:
                with self._tools.outgoing.association(to, taking.manifest) as (sending, takes):
                    whose = Originator(self._peer.ae_title, command.message_id)
                    retrieval = Retrieval(sending, takes, self._seconds, whose)
                    self._send(messages, message, command, retrieval, taking, other, apart=True)
            except OutgoingError as error:
                failed = Counts(failed=taking.manifest.instances)
                raise _RefusedError(NO_SUBOPERATIONS, str(error), failed) from error
            except _CutError as error:
                log.warning("association %s: the move destination: %s", self._origin.association, error)
            if retrieval is not None:
                self._conclude(messages, message, command, context, retrieval)

    @contextlib.contextmanager
    def _retrieved(self, message: Message, context: Context, operation: str, to: str) -> Iterator[Taking]:
        model = MODELS[context.abstract_syntax]
        chosen = identifiers.selection(identifiers.decode(message.data or b"", context.transfer_syntax), model)
        with self._tools.asking.retrieved(self._peer.ae_title, operation, to, chosen) as taking:
            self.tally.retrievals += 1
            yield taking

    def _send(
        self,
        messages: Messages,
        message: Message,
        command: Command,
        retrieval: Retrieval,
        taking: Taking,
        other: Callable[[Message], None],
        *,
        apart: bool = False,
    ) -> None:
        """Send the instances, and from time to time a pending response.

        Args:
            messages: Of who asked.
            message: The request.
            command: Its command.
            retrieval: Sends them.
            taking: Where they come from.
            other: Called with what comes instead of a response to one that was sent.
            apart: They are sent on another association than that of who asked.

        Raises:
            _CutError: That other association is over; what was not sent is counted as failed.
        """
        total = taking.manifest.instances
        rounds = retrieval.run(taking, other)
        told = 0.0
        try:
            while True:
                try:
                    counts = next(rounds, None)
                except (HandoverError, StrongroomError) as error:
                    log.error("association %s: the vault's answer broke off: %s", self._origin.association, error)
                    retrieval.give_up(total)
                    break
                except (EndedError, wire.WireError, OSError) as error:
                    if not apart:
                        raise
                    retrieval.give_up(total)
                    raise _CutError(str(error) or type(error).__name__) from error
                if counts is None:
                    break
                if apart:
                    retrieval.cancelled = retrieval.cancelled or self._is_cancelled(messages, command)
                now = time.monotonic()
                if counts.remaining and not retrieval.cancelled and now - told >= _PENDING_SECONDS:
                    told = now
                    messages.send(message.context_id, dimse.response(command, PENDING, counts=counts))
        finally:
            self.tally.instances += retrieval.counts.completed + retrieval.counts.warning
            log.info(
                "association %s: %d of %d instances sent, %d failed",
                self._origin.association,
                retrieval.counts.completed + retrieval.counts.warning,
                total,
                retrieval.counts.failed,
            )

    def _conclude(
        self, messages: Messages, message: Message, command: Command, context: Context, retrieval: Retrieval
    ) -> None:
        """Send the last response."""
        status, names = _ending(retrieval)
        data = identifiers.failed(names, context.transfer_syntax) if names else None
        last = dimse.response(command, status, counts=retrieval.counts, has_data_set=data is not None)
        messages.send(message.context_id, last, data)

    def _is_cancelled(self, messages: Messages, command: Command) -> bool:
        cancelled = False
        while (came := messages.poll()) is not None:
            cancelled = _cancels(came, command) or cancelled
        return cancelled


def _cancels(message: Message, command: Command) -> bool:
    """Tell whether a message cancels a request.

    Raises:
        WireError: It is anything else: one operation at a time was negotiated.
    """
    if dimse.is_response(message.command):
        raise wire.WireError("a response to something else")
    came = dimse.decode(message.command)
    if came.field != dimse.C_CANCEL_RQ:
        raise wire.WireError("a request while another one is under way")
    return came.message_id == command.message_id


def _ending(retrieval: Retrieval) -> tuple[int, list[str]]:
    """Return the status of a retrieval's last response, and which instances it names."""
    counts: Counts = retrieval.counts
    if retrieval.cancelled:
        return dimse.CANCELLED, retrieval.failed
    if counts.failed and not (counts.completed or counts.warning):
        return NO_SUBOPERATIONS, retrieval.failed
    if counts.failed or counts.warning:
        return SOME_FAILED, retrieval.failed
    return SUCCESS, []


def _told(error: Exception, operation: str) -> tuple[int, str]:
    """Return status and Error Comment for what went wrong."""
    if isinstance(error, _RefusedError):
        return error.status, error.comment
    if isinstance(error, IdentifierError):
        return MISMATCH, str(error)
    if isinstance(error, OutgoingError):
        return NO_SUBOPERATIONS, str(error)
    if isinstance(error, AskingError):
        if error.locked:
            return (NO_RESOURCES if operation == "find" else NO_SUBOPERATIONS), "the vault is locked"
        if error.nothing:
            # Nothing to send is no failure (PS3.4 C.4.2.1.6, C.4.3.1.4).
            return SUCCESS, ""
        return (UNABLE if operation == "find" else NO_SUBOPERATIONS), str(error)
    return UNABLE, "the vault's answer broke off"
