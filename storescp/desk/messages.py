"""DIMSE messages of an association, whichever side asked for it.

Whole commands and small data sets come in; objects of any size go out in parts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from storescp.gate import dimse, wire
from storescp.gate.stream import Stream

# What comes in is identifiers and responses; an identifier with a list of 10,000 UIDs has 650 KB.
_DATA_LIMIT = 1 << 20
_RECEIVE_BYTES = 1 << 16


class Message(NamedTuple):
    """A message that came: its presentation context, its command set, and its data set where it has one."""

    context_id: int
    command: bytes
    data: bytes | None


class EndedError(Exception):
    """The other side ended the association; the message says how."""


class UnsentError(Exception):
    """Reading the parts of a data set raised, its cause, before anything of the message was sent."""


class Messages:
    """The messages of an established association."""

    def __init__(
        self,
        stream: Stream,
        reader: wire.Reader,
        rest: Iterable[wire.Pdu | wire.Fragment],
        maximum: int,
        seconds: float,
    ) -> None:
        """Go on with an association.

        Args:
            stream: The connection.
            reader: What its bytes are read by.
            rest: Events that came with the negotiation.
            maximum: The other side's maximum PDU length, 0 for none.
            seconds: How long it may take to send something, and to go on within a message.
        """
        self._stream = stream
        self._reader = reader
        self._maximum = maximum
        self._seconds = seconds
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._came: deque[Message] = deque()
        self._command = bytearray()
        self._command_context = 0
        self._data = bytearray()
        self._whole: tuple[int, bytes] | None = None
        self._ending = ""
        self.between = True
        for event in rest:
            self._take(event)

    def next(self, seconds: float, *, between: bool = False) -> Message:
        """Return the next message.

        Args:
            seconds: How long to wait for it, in total: single bytes gain nothing.
            between: Nothing is under way, so that a server that stops may end this.

        Raises:
            EndedError: The other side ended the association.
            TimeoutError: None came.
            StoppingError: The server is stopping, and ``between``.
            WireError: The other side broke the protocol.
            OSError: The connection broke.
        """
        until = time.monotonic() + seconds
        while not self._came:
            if self._ending:
                raise EndedError(self._ending)
            # Of a PDU, too: what began is to go on.
            is_quiet = between and not self._command and self._whole is None and self._reader.between
            if self.between and not is_quiet and between:
                until = time.monotonic() + self._seconds
            self.between = is_quiet
            self._read(max(0.0, until - time.monotonic()), between=is_quiet)
        self.between = False
        return self._came.popleft()

    def poll(self) -> Message | None:
        """Return a message that is there, and wait for none.

        Raises:
            EndedError: The other side ended the association.
            WireError: It broke the protocol.
            OSError: The connection broke.
        """
        try:
            return self.next(0.0)
        except TimeoutError:
            return None

    def send(self, context_id: int, command: bytes, data: bytes | None = None) -> None:
        """Send a message.

        Raises:
            OSError: It cannot be sent, or the other side takes nothing (TimeoutError).
        """
        content = wire.data_pdus(context_id, command=True, content=command, maximum=self._maximum)
        if data is not None:
            content += wire.data_pdus(context_id, command=False, content=data, maximum=self._maximum)
        self._stream.send(content, self._seconds)

    def send_object(self, context_id: int, command: bytes, parts: Iterable[bytes | memoryview], length: int) -> None:
        """Send a message whose data set comes in parts; what reading those raises passes through.

        Raises:
            UnsentError: Reading the parts raised before anything was sent.
            WireError: Its length is another one: the association is worth nothing any more.
            OSError: It cannot be sent.
        """
        pending = wire.data_pdus(context_id, command=True, content=command, maximum=self._maximum)
        pdus = wire.data_stream(context_id, parts, length=length, maximum=self._maximum)
        while True:
            try:
                pdu = next(pdus, None)
            except Exception as error:
                if pending:
                    raise UnsentError from error
                raise
            if pdu is None:
                return
            # A small object goes out at once, with its command.
            self._stream.send(pending + pdu if pending else pdu, self._seconds)
            pending = b""

    def _read(self, seconds: float, *, between: bool) -> None:
        count = self._stream.receive(self._buffer, seconds, between=between)
        if not count:
            raise EndedError("closed by the peer without a release")
        for event in self._reader.receive(self._buffer[:count]):
            self._take(event)
            if self._ending:
                # What follows the end is nobody's.
                return

    def _take(self, event: wire.Pdu | wire.Fragment) -> None:
        if isinstance(event, wire.Fragment):
            self._fragment(event)
        elif event.kind == wire.RELEASE_RQ:
            if self._command or self._whole is not None:
                raise wire.WireError("a release request within a message")
            self._stream.send(wire.release_reply(), self._seconds)
            self._ending = "released"
        elif event.kind == wire.RELEASE_RP:
            self._ending = "released by us"
        elif event.kind == wire.ABORT:
            self._ending = "aborted by the peer"
        else:
            raise wire.WireError("a PDU that has no place in an established association")

    def _fragment(self, event: wire.Fragment) -> None:
        if event.command:
            if self._whole is not None:
                raise wire.WireError("a command where a data set is expected")
            if self._command and event.context_id != self._command_context:
                raise wire.WireError("a command goes on in another presentation context")
            self._command_context = event.context_id
            self._command += event.data
            if len(self._command) > dimse.COMMAND_LIMIT:
                raise wire.WireError("a command set is too long")
            if event.last:
                content = bytes(self._command)
                self._command.clear()
                self._begin(event.context_id, content)
            return
        if self._whole is None or event.context_id != self._whole[0]:
            raise wire.WireError("a data set without its command, or of another presentation context")
        self._data += event.data
        if len(self._data) > _DATA_LIMIT:
            raise wire.WireError("a data set that is no object is too long")
        if event.last:
            context_id, command = self._whole
            self._came.append(Message(context_id, command, bytes(self._data)))
            self._data.clear()
            self._whole = None

    def _begin(self, context_id: int, command: bytes) -> None:
        try:
            has_data_set = (dimse.decode_answer if dimse.is_response(command) else dimse.decode)(command).has_data_set
        except dimse.CommandError as error:
            raise wire.WireError(str(error)) from error
        if has_data_set:
            self._whole = (context_id, command)
        else:
            self._came.append(Message(context_id, command, None))
