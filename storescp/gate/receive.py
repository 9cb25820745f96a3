"""One established association: requests in, objects into packs, responses out. One thread, blocking, bounded memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import select
import socket
import ssl
import threading
import time
from datetime import UTC, datetime

import msgspec

from storage import attributes
from storage.attributes import AttributesError, Received, is_uid
from storage.deposit import DepositError, Deposits, OpenPack, Record, record_buffer
from storescp.gate import dimse, wire
from storescp.gate.describe import describe, uid
from storescp.gate.dimse import Command
from storescp.gate.head import HeadError, HeadParser
from storescp.gate.negotiate import Agreement, Context
from storescp.gate.status import SUCCESS, UNRECOGNIZED_OPERATION, Reason, RefusedError
from storescp.gate.transfer import ENCODINGS, VERIFICATION
from storescp.space import Watch

# What may come before the Study Instance UID: large private groups of some devices do.
HEAD_BUFFER_LIMIT = 4 << 20
# One TLS record holds 16 KiB; OpenSSL hands out one a call.
_RECEIVE_BYTES = 1 << 16
# Free space is looked at when an object begins, and again after this much of it.
_SPACE_STEP = 64 << 20
# How often an idle association looks whether the server is stopping.
_LOOK_MILLISECONDS = 500
_SOP_CLASS, _SOP_INSTANCE = 0x00080016, 0x00080018
_STUDY, _SERIES = 0x0020000D, 0x0020000E

log = logging.getLogger(__name__)


class Origin(msgspec.Struct, frozen=True):
    """Where an association comes from, as provenance and the log say it."""

    association: str
    calling: str
    called: str
    address: str
    certificate: str


class Tally:
    """What an association did, for the log line at its end."""

    def __init__(self) -> None:
        self.stored = 0
        self.refused = 0
        self.bytes = 0


class Incoming:
    """One C-STORE's data set on its way into a pack. ``end`` returns only when it is durable, or raises why not."""

    def __init__(
        self,
        command: Command,
        context: Context,
        origin: Origin,
        deposits: Deposits,
        buffer: memoryview,
        space: Watch,
    ) -> None:
        self._space = space
        self._checked = 0
        self._command = command
        self._context = context
        self._origin = origin
        self._deposits = deposits
        self._buffer = buffer
        self._encoding = ENCODINGS[context.transfer_syntax]
        self._head = HeadParser(self._encoding)
        self._before = bytearray()
        self._pack: OpenPack | None = None
        self._record: Record | None = None
        self._reason: Reason | None = None
        self.object_id = ""
        self.size = 0
        if command.sop_class != context.abstract_syntax:
            self._reason = Reason.SOP_CLASS
        elif not is_uid(command.sop_instance):
            self._reason = Reason.INVALID_UID

    def take(self, data: memoryview) -> None:
        """Take the next piece of the data set. What goes wrong is kept for ``end``; the rest is read and dropped."""
        self.size += len(data)
        if self._reason is not None:
            return
        try:
            if self.size >= self._checked:
                self._checked = self.size + _SPACE_STEP
                if self._space.shortage():
                    raise RefusedError(Reason.NO_SPACE)
            self._take(data)
        except Exception as error:
            self._refuse(error)

    def end(self) -> None:
        """Take the end of the data set and make the object durable.

        Raises:
            RefusedError: It is not kept; the reason is of the table in ``status``.
        """
        if self._reason is None:
            try:
                self._end()
            except Exception as error:
                self._refuse(error)
        if self._reason is not None:
            raise RefusedError(self._reason)

    def abandon(self) -> None:
        """Drop an object whose association ended before it did."""
        self._let_go()

    def _take(self, data: memoryview) -> None:
        if not self._head.done:
            self._head.feed(data)
        if self._record is None:
            self._before += data
            if _SERIES in self._head.values or self._head.done:
                self._begin()
            elif len(self._before) > HEAD_BUFFER_LIMIT:
                raise RefusedError(Reason.HEAD_TOO_LARGE)
            return
        self._record.write(data)

    def _begin(self) -> None:
        values = self._head.values
        study, series = uid(values, _STUDY), uid(values, _SERIES)
        if not is_uid(study) or not is_uid(series):
            raise RefusedError(Reason.NO_STUDY)
        found = (uid(values, _SOP_CLASS), uid(values, _SOP_INSTANCE))
        if found != (self._command.sop_class, self._command.sop_instance):
            raise RefusedError(Reason.MISMATCH)
        self._pack = self._deposits.lease(study, self._origin.calling)
        self._record = self._pack.record(self._buffer)
        self.object_id = self._record.object_id.hex()
        self._record.write(memoryview(self._before))
        self._before = bytearray()

    def _end(self) -> None:
        self._head.end()
        if self._record is None:
            self._begin()
        if self._record is None or self._pack is None:
            raise RefusedError(Reason.INTERNAL)
        origin = self._origin
        received = Received(
            datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            origin.association,
            origin.calling,
            origin.called,
            origin.address,
            origin.certificate,
        )
        described = describe(self._head.values, self._encoding, self._context.transfer_syntax, received)
        content = attributes.encode(described)
        # What the vault would not understand must not be acknowledged.
        attributes.decode(content)
        self._record.finish(content)
        self._deposits.release(self._pack)
        self._record = self._pack = None

    def _refuse(self, error: Exception) -> None:
        self._reason = reason_for(error)
        if self._reason is Reason.INTERNAL:
            log.error("association %s: an object is refused", self._origin.association, exc_info=error)
        self._let_go()

    def _let_go(self) -> None:
        self._before = bytearray()
        if self._record is not None:
            self._record.abort()
        if self._pack is not None:
            self._deposits.release(self._pack)
        self._record = self._pack = None


def reason_for(error: Exception) -> Reason:
    """Return the refusal that answers an error; the one mapping of errors to statuses."""
    match error:
        case RefusedError():
            return error.reason
        case HeadError():
            return Reason.UNPARSABLE
        case AttributesError():
            return Reason.ATTRIBUTES_TOO_LARGE
        case DepositError():
            return Reason.NO_KEY
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return Reason.NO_SPACE
        case OSError():
            return Reason.NO_STORAGE
        case _:
            return Reason.INTERNAL


class Association:
    """The message loop of an accepted association."""

    def __init__(
        self,
        connection: socket.socket,
        reader: wire.Reader,
        agreement: Agreement,
        origin: Origin,
        deposits: Deposits,
        idle_seconds: float,
        space: Watch,
        stopping: threading.Event,
    ) -> None:
        self._space = space
        self._stopping = stopping
        self._connection = connection
        self._reader = reader
        self._agreement = agreement
        self._origin = origin
        self._deposits = deposits
        self._idle_seconds = idle_seconds
        self._command_part = bytearray()
        self._command: tuple[Command, int] | None = None
        self._incoming: Incoming | None = None
        self._buffer: memoryview | None = None
        self.tally = Tally()
        self.idle_since: float | None = time.monotonic()

    def run(self, rest: list[wire.Pdu | wire.Fragment]) -> str:
        """Serve the association until it ends; return how it ended, for the log.

        Args:
            rest: Events that came in one read with the association request.

        Raises:
            WireError: The peer broke the protocol.
            OSError: The connection broke or was idle for too long.
        """
        buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._connection.settimeout(self._idle_seconds)
        try:
            for event in rest:
                if ending := self._handle(event):
                    return ending
            while True:
                if self.idle_since is not None and not self._wait():
                    self._connection.sendall(wire.abort(reason=0))
                    return "aborted: the server is stopping"
                count = self._connection.recv_into(buffer)
                if not count:
                    return "closed by the peer without a release"
                for event in self._reader.receive(buffer[:count]):
                    if ending := self._handle(event):
                        return ending
        finally:
            if self._incoming is not None:
                self._incoming.abandon()

    def _wait(self) -> bool:
        """Wait between messages for something to read; tell whether it came, or the server is stopping instead.

        Raises:
            TimeoutError: Nothing came for ``idle_seconds``.
        """
        if isinstance(self._connection, ssl.SSLSocket) and self._connection.pending():
            return True
        # poll, because select knows no descriptor above 1023.
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        until = time.monotonic() + self._idle_seconds
        while not waiting.poll(_LOOK_MILLISECONDS):
            if self._stopping.is_set():
                return False
            if time.monotonic() > until:
                raise TimeoutError
        return True

    def _handle(self, event: wire.Pdu | wire.Fragment) -> str:
        if isinstance(event, wire.Fragment):
            self.idle_since = None
            self._fragment(event)
            return ""
        if event.kind == wire.RELEASE_RQ:
            if self._command is not None or self._command_part:
                raise wire.WireError("a release request within a message")
            self._connection.sendall(wire.release_reply())
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
        if event.last:
            self._end()

    def _begin(self, content: bytes, context_id: int, context: Context) -> None:
        try:
            command = dimse.decode(content)
        except dimse.CommandError as error:
            raise wire.WireError(str(error)) from error
        if command.field == dimse.C_CANCEL_RQ:
            self.idle_since = time.monotonic()
            return
        self._command = (command, context_id)
        if command.field == dimse.C_STORE_RQ and context.abstract_syntax != VERIFICATION and command.has_data_set:
            if self._buffer is None:
                self._buffer = record_buffer()
            self._incoming = Incoming(command, context, self._origin, self._deposits, self._buffer, self._space)
        if not command.has_data_set:
            self._end()

    def _end(self) -> None:
        if self._command is None:
            raise wire.WireError("a message ends that never began")
        command, context_id = self._command
        incoming, self._incoming, self._command = self._incoming, None, None
        status, comment = SUCCESS, ""
        if incoming is not None:
            try:
                incoming.end()
                self.tally.stored += 1
                self.tally.bytes += incoming.size
                self._space.took(incoming.size)
                log.debug("association %s: stored object %s", self._origin.association, incoming.object_id)
            except RefusedError as refused:
                status, comment = refused.reason.status, refused.reason.comment
        elif command.field == dimse.C_STORE_RQ:
            refusal = Reason.NO_DATA_SET if not command.has_data_set else Reason.SOP_CLASS
            status, comment = refusal.status, refusal.comment
        elif command.field != dimse.C_ECHO_RQ:
            status = UNRECOGNIZED_OPERATION
        if status != SUCCESS:
            self.tally.refused += 1
            log.warning("association %s: refused with %04X: %s", self._origin.association, status, comment)
        reply = wire.data_pdus(
            context_id,
            command=True,
            content=dimse.response(command, status, comment),
            maximum=self._agreement.maximum_pdu,
        )
        self._connection.sendall(reply)
        self.idle_since = time.monotonic()


def new_association_id() -> str:
    """Return a random id by which the log and provenance name an association."""
    return secrets.token_hex(8)


def close(connection: socket.socket) -> None:
    """Close a connection, whatever state it is in."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
