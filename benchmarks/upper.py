"""As much of the DICOM upper layer as a sender needs: association request, C-STORE as ready bytes, responses read.

Messages are encoded before the clock starts; sending one is patching its UIDs and writing its bytes.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from typing import NamedTuple

from benchmarks.objects import (
    EXPLICIT_LITTLE,
    UID_LENGTH,
    VERIFICATION,
    Template,
    patch,
)

MAXIMUM_PDU = 131_072
STORE_CONTEXT, ECHO_CONTEXT = 1, 3
# What one call sends of a long object; shorter objects go out in one.
_PIECE = 1 << 20


class ProtocolError(Exception):
    """The server said something else than Success, or nothing."""


class Credentials(NamedTuple):
    """Files of the client's key and certificate and of the authority that it trusts; and its AE title."""

    key: str
    certificate: str
    authority: str
    title: str = "BENCH"


class Target(NamedTuple):
    """Where to send to."""

    port: int
    called: str
    credentials: Credentials


class Stream:
    """TLS over a socket. One write for each 128 KiB of records: half the CPU time of one for each record."""

    def __init__(self, port: int, context: ssl.SSLContext, timeout: float) -> None:
        """Connect and shake hands.

        Raises:
            OSError: It fails.
        """
        self._socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()
        self.protocol = f"{self._tls.version()} {(self._tls.cipher() or ('',))[0]}"

    def send(self, data: memoryview) -> None:
        """Send all of it."""
        for at in range(0, len(data), MAXIMUM_PDU):
            self._tls.write(data[at : at + MAXIMUM_PDU])
            self._flush()

    def receive(self, limit: int) -> bytes:
        """Return the next bytes, none at the end."""
        while True:
            try:
                return self._tls.read(limit)
            except ssl.SSLWantReadError:
                if not self._fill():
                    return b""
            except ssl.SSLZeroReturnError:
                return b""

    def close(self) -> None:
        """Close the connection, with TLS's own notice."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self._flush()
        self._socket.close()

    def _flush(self) -> None:
        if self._out.pending:
            self._socket.sendall(self._out.read())

    def _fill(self) -> int:
        received = self._socket.recv(1 << 16)
        self._in.write(received)
        if not received:
            self._in.write_eof()
        return len(received)


class Association:
    """One association over TLS."""

    def __init__(self, target: Target, context: ssl.SSLContext, sop_class: str, timeout: float) -> None:
        """Connect, shake hands, associate.

        Raises:
            OSError: No connection.
            ProtocolError: No association, or one without the storage context.
        """
        self._stream = Stream(target.port, context, timeout)
        self._received = b""
        self.send = self._stream.send
        self.tls = self._stream.protocol
        self.send(memoryview(_request(target.credentials.title, target.called, sop_class)))
        kind, body = self._pdu()
        if kind != 2:
            raise ProtocolError(f"no association: PDU type {kind}, {body[:4].hex()}")
        self.maximum_pdu = _maximum_pdu(body)

    def echo(self) -> None:
        """Send a C-ECHO and wait for its response."""
        self.send(memoryview(_pdv(ECHO_CONTEXT, 3, _echo())))
        self.response()

    def response(self) -> None:
        """Wait for a response.

        Raises:
            ProtocolError: Its status is not Success, or something else came.
        """
        kind, body = self._pdu()
        if kind != 4:
            raise ProtocolError(f"no response: PDU type {kind}")
        status = _status(body)
        if status != 0:
            raise ProtocolError("a response without a status" if status is None else f"status {status:04X}")

    def release(self) -> None:
        """End the association and close the connection."""
        with contextlib.suppress(OSError, ProtocolError):
            self.send(memoryview(struct.pack(">BBII", 5, 0, 4, 0)))
            self._pdu()
        self._stream.close()

    def _pdu(self) -> tuple[int, bytes]:
        """Return type and body of the next PDU."""
        while len(self._received) < 6 or len(self._received) < 6 + int.from_bytes(self._received[2:6], "big"):
            more = self._stream.receive(1 << 16)
            if not more:
                raise ProtocolError("the server closed the connection")
            self._received += more
        end = 6 + int.from_bytes(self._received[2:6], "big")
        pdu, self._received = self._received[:end], self._received[end:]
        return pdu[0], pdu[6:]


class Message:
    """A C-STORE request as bytes: pieces to send, each so many times; the first holds all UIDs."""

    def __init__(self, template: Template, maximum_pdu: int, study: bytes, series: bytes) -> None:
        self._template = template
        fragment = min(maximum_pdu or MAXIMUM_PDU, MAXIMUM_PDU) - 6
        head = bytearray(template.head)
        patch(head, template.study_at, study)
        patch(head, template.series_at, series)
        if len(head) > fragment:
            raise ProtocolError("the server's maximum PDU is too small for this benchmark")
        command, self._id_at, command_uid_at = _store(template.sop_class)
        first = bytearray(_pdv(STORE_CONTEXT, 3, command))
        self._id_at += 12
        self._uids_at = [command_uid_at + 12, len(first) + 12 + template.sop_instance_at]
        taken = min(template.pixel_bytes, fragment - len(head))
        first += _pdv(STORE_CONTEXT, self._control(taken), bytes(head) + template.pixels(0, taken))
        self._first = first
        self.pieces: list[tuple[memoryview, int]] = []
        self._rest(template.pixel_bytes - taken, fragment)
        self.pieces.insert(0, (memoryview(self._first), 1))

    def _control(self, taken: int) -> int:
        return 2 if taken == self._template.pixel_bytes else 0

    def _rest(self, left: int, fragment: int) -> None:
        full = max(0, -(-left // fragment) - 1)
        last = left - full * fragment
        middle = _pdv(STORE_CONTEXT, 0, self._template.pixels(0, fragment)) if full else b""
        end = _pdv(STORE_CONTEXT, 2, self._template.pixels(0, last)) if last else b""
        if full * fragment <= _PIECE:
            self._first += middle * full + end
            return
        batch = max(1, _PIECE // fragment)
        for count, repeat in ((batch, full // batch), (full % batch, 1)):
            if count and repeat:
                self.pieces.append((memoryview(middle * count), repeat))
        if end:
            self.pieces.append((memoryview(end), 1))

    def renew(self, instance: bytes, message_id: int) -> None:
        """Make it another object."""
        for at in self._uids_at:
            patch(self._first, at, instance)
        struct.pack_into("<H", self._first, self._id_at, message_id & 0xFFFF)


def tls_context(credentials: Credentials) -> ssl.SSLContext:
    """Return the client's side of mutual TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(credentials.authority)
    context.load_cert_chain(credentials.certificate, credentials.key)
    return context


def _pdv(context: int, control: int, data: bytes) -> bytes:
    return struct.pack(">BBIIBB", 4, 0, len(data) + 6, len(data) + 2, context, control) + data


def _command(elements: list[tuple[int, bytes]]) -> bytes:
    body = b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in elements)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _store(sop_class: str) -> tuple[bytes, int, int]:
    """Return a C-STORE-RQ and where its message id and SOP Instance UID stand."""
    placeholder = b"\xff" * UID_LENGTH
    class_uid = sop_class.encode()
    content = _command(
        [
            (0x0002, class_uid + b"\0" * (len(class_uid) % 2)),
            (0x0100, struct.pack("<H", 1)),
            (0x0110, struct.pack("<H", 1)),
            (0x0700, struct.pack("<H", 0)),
            (0x0800, struct.pack("<H", 1)),
            (0x1000, placeholder),
        ]
    )
    identifier = content.index(struct.pack("<HHI", 0, 0x0110, 2)) + 8
    return content, identifier, content.index(placeholder)


def _status(body: bytes) -> int | None:
    """Return the status in a command set that comes as one fragment."""
    at = 6
    while at + 8 <= len(body):
        _, number, length = struct.unpack_from("<HHI", body, at)
        if number == 0x0900:
            return int.from_bytes(body[at + 8 : at + 8 + length], "little")
        at += 8 + length
    return None


def _echo() -> bytes:
    return _command(
        [
            (0x0002, VERIFICATION.encode() + b"\0"),
            (0x0100, struct.pack("<H", 0x0030)),
            (0x0110, struct.pack("<H", 1)),
            (0x0800, struct.pack("<H", 0x0101)),
        ]
    )


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def _request(calling: str, called: str, sop_class: str) -> bytes:
    contexts = b"".join(
        _item(
            0x20,
            bytes((number, 0, 0, 0)) + _item(0x30, uid.encode()) + _item(0x40, EXPLICIT_LITTLE.encode()),
        )
        for number, uid in ((STORE_CONTEXT, sop_class), (ECHO_CONTEXT, VERIFICATION))
    )
    user = _item(0x51, struct.pack(">I", MAXIMUM_PDU)) + _item(0x52, b"2.25.1") + _item(0x55, b"BENCHMARK")
    titles = called.ljust(16).encode() + calling.ljust(16).encode()
    body = struct.pack(">HH", 1, 0) + titles + bytes(32)
    body += _item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + _item(0x50, user)
    return struct.pack(">BBI", 1, 0, len(body)) + body


def _maximum_pdu(accepted: bytes) -> int:
    """Return the server's maximum PDU length.

    Raises:
        ProtocolError: The storage context was not accepted.
    """
    at, maximum, stored = 68, 0, False
    while at + 4 <= len(accepted):
        kind, _, length = struct.unpack_from(">BBH", accepted, at)
        content = accepted[at + 4 : at + 4 + length]
        if kind == 0x21 and content[0] == STORE_CONTEXT:
            stored = content[2] == 0
        elif kind == 0x50:
            inner = 0
            while inner + 4 <= len(content):
                sub, _, size = struct.unpack_from(">BBH", content, inner)
                if sub == 0x51:
                    maximum = int.from_bytes(content[inner + 4 : inner + 8], "big")
                inner += 4 + size
        at += 4 + length
    if not stored:
        raise ProtocolError("the storage presentation context was not accepted")
    return maximum
