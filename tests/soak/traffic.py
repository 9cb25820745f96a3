"""Peers as bytes: good conversations, and broken ones of every kind, for the soak and for ``tests/test_hostile.py``.

Nothing here is shared with the server: a sender that used its encoder could not send what it refuses to encode.
Source: PS3.8 section 9.3 (PDUs), PS3.7 annex E (command sets), PS3.5 section 7 (data sets).
"""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import ssl
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
STORE, ECHO, STORE_DEFLATED, NOT_ACCEPTED = 1, 3, 5, 7
ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = 1, 2, 3, 4, 5, 6, 7
SUCCESS = 0x0000
UNDEFINED = 0xFFFFFFFF
# The server's gate.maximum_pdu, unless a test sets another.
MAXIMUM_PDU = 131_072
SEQUENCE, ITEM = 0x00091001, struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
_LONG_VRS = {"OB", "OW", "SQ", "UN", "UT"}


# --- PDUs, command sets, data sets


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    """Return a PDU; ``length`` is what it claims, where that is a lie."""
    return struct.pack(">BBI", kind, 0, len(body) if length is None else length) + body


def item(context: int, control: int, data: bytes, length: int | None = None) -> bytes:
    """Return an item of a P-DATA-TF PDU; control bit 0 is a command, bit 1 the last of it."""
    return struct.pack(">IBB", len(data) + 2 if length is None else length, context, control) + data


def pdata(context: int, control: int, data: bytes) -> bytes:
    """Return a P-DATA-TF PDU of one item."""
    return pdu(P_DATA, item(context, control, data))


RELEASE = pdu(RELEASE_RQ, bytes(4))
REPLIED = pdu(RELEASE_RP, bytes(4))
ABORTED = pdu(ABORT, bytes(4))


def request(
    calling: bytes = b"CT1",
    called: bytes = b"STRONGROOM",
    *,
    ids: tuple[int, int, int, int] = (STORE, ECHO, STORE_DEFLATED, NOT_ACCEPTED),
    instead: bytes = b"",
) -> bytes:
    """Return an association request for storage, verification, deflated storage, and a class that is not accepted.

    ``instead`` are other contexts, in their place.
    """
    offered = zip(
        ids,
        (CT_IMAGE, VERIFICATION, CT_IMAGE, "1.2.840.10008.5.1.4.1.2.2.1"),
        (EXPLICIT, EXPLICIT, DEFLATED, EXPLICIT),
        strict=True,
    )
    contexts = b"".join(
        _item(0x20, bytes((number, 0, 0, 0)) + _item(0x30, abstract.encode()) + _item(0x40, syntax.encode()))
        for number, abstract, syntax in offered
    )
    user = _item(0x51, struct.pack(">I", MAXIMUM_PDU)) + _item(0x52, b"2.25.1")
    body = struct.pack(">HH", 1, 0) + called.ljust(16)[:16] + calling.ljust(16)[:16] + bytes(32)
    return pdu(ASSOCIATE_RQ, body + _item(0x10, b"1.2.840.10008.3.1.1.1") + (instead or contexts) + _item(0x50, user))


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def large_request(calling: bytes = b"CT1") -> bytes:
    """Return a well-formed association request of 900 KB: 15 contexts with 5,500 transfer syntaxes each."""
    contexts = b"".join(
        _item(
            0x20,
            bytes((2 * number + 1, 0, 0, 0))
            + _item(0x30, CT_IMAGE.encode())
            + b"".join(_item(0x40, b"1.%d" % (5000 * number + syntax)) for syntax in range(5500)),
        )
        for number in range(15)
    )
    return request(calling, instead=contexts)


def command(*elements: tuple[int, bytes]) -> bytes:
    """Return a command set of elements, each a number and a value."""
    body = b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in elements)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def request_command(
    field: int, sop_class: bytes, sop_instance: bytes = b"", *, data_set: bool = True, message_id: int = 1
) -> bytes:
    """Return the command set of a request."""
    elements = [
        (0x0002, even(sop_class, b"\0")),
        (0x0100, struct.pack("<H", field)),
        (0x0110, struct.pack("<H", message_id)),
        (0x0700, bytes(2)),
        (0x0800, struct.pack("<H", 1 if data_set else 0x0101)),
    ]
    return command(*elements, *([(0x1000, even(sop_instance, b"\0"))] if sop_instance else []))


def even(value: bytes, padding: bytes) -> bytes:
    """Return a value of even length."""
    return value + padding * (len(value) % 2)


ECHO_COMMAND = request_command(0x0030, VERIFICATION.encode(), data_set=False)
ECHO_REQUEST = pdata(ECHO, 3, ECHO_COMMAND)


def store_command(instance: bytes, sop_class: str = CT_IMAGE, *, data_set: bool = True) -> bytes:
    """Return the command set of a C-STORE request."""
    return request_command(0x0001, sop_class.encode(), instance, data_set=data_set)


def element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """Return an element in explicit VR little endian; ``length`` is what it claims, where that is a lie."""
    value = even(value, b"\0" if vr in {"UI", "OB"} else b" ")
    size = len(value) if length is None else length
    group, number = tag >> 16, tag & 0xFFFF
    if vr in _LONG_VRS:
        return struct.pack("<HH2sHI", group, number, vr.encode(), 0, size) + value
    return struct.pack("<HH2sH", group, number, vr.encode(), size) + value


class Image(NamedTuple):
    """One CT image: its UIDs, and its data set in parts, so that something can stand between them."""

    instance: bytes
    study: bytes
    series: bytes
    pixels: bytes
    patient: bytes = b"Soak^Patient"

    @property
    def front(self) -> bytes:
        """What comes before the patient's and the study's groups."""
        return (
            element(0x00080005, "CS", b"ISO_IR 100")
            + element(0x00080016, "UI", CT_IMAGE.encode())
            + element(0x00080018, "UI", self.instance)
            + element(0x00080060, "CS", b"CT")
        )

    @property
    def middle(self) -> bytes:
        """Patient, study and series."""
        return (
            element(0x00100010, "PN", self.patient)
            + element(0x00100020, "LO", b"S-1")
            + element(0x0020000D, "UI", self.study)
            + element(0x0020000E, "UI", self.series)
        )

    @property
    def rest(self) -> bytes:
        """The pixels."""
        return element(0x7FE00010, "OW", self.pixels)

    @property
    def data(self) -> bytes:
        """The whole data set."""
        return self.front + self.middle + self.rest


def image(chance: random.Random, size: int = 600, study: bytes = b"") -> Image:
    """Return an image that nobody sent yet, of a study of its own if none is given."""
    instance, made, series = (b"2.25.%d" % chance.getrandbits(100) for _ in range(3))
    study = study or made
    return Image(instance, study, b"%s.1" % study if len(study) < 60 else series, chance.randbytes(size))


def message(
    data: bytes,
    instance: bytes,
    *,
    sop_class: str = CT_IMAGE,
    context: int = STORE,
    fragment: int = MAXIMUM_PDU - 6,
    last: bool = True,
) -> Iterator[bytes]:
    """Yield a C-STORE request PDU by PDU."""
    yield pdata(context, 3, store_command(instance, sop_class))
    for at in range(0, max(1, len(data)), fragment):
        final = last and at + fragment >= len(data)
        yield pdata(context, 2 if final else 0, data[at : at + fragment])


def whole(data: bytes, instance: bytes, **options: object) -> bytes:
    """Return a C-STORE request; takes what ``message`` takes."""
    return b"".join(message(data, instance, **options))  # type: ignore[arg-type]


def deflate(data: bytes) -> bytes:
    """Return a data set deflated, without a header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@functools.cache
def _zeros() -> bytes:
    """Return 16 MiB of zeros, deflated so that the piece can be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)


def bomb(before: bytes, mebibytes: int, after: bytes, *, tag: int = 0) -> bytes:
    """Return a deflated data set: some elements, one of so many MiB of zeros (a multiple of 16), some elements."""
    tag = tag or (0x00291010 if b"\x20\x00\x0d\x00UI" in before else 0x00091010)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(before + element(tag, "OB", b"", mebibytes << 20))
    return head + packer.flush(zlib.Z_FULL_FLUSH) + _zeros() * (mebibytes // 16) + deflate(after)


# --- a connection


class CutError(Exception):
    """The connection was cut where it should be."""


class Target(NamedTuple):
    """A server, and who connects to it."""

    port: int
    context: ssl.SSLContext
    title: str = "CT1"
    source: str = "127.0.0.1"


class Line:
    """A connection as its client has it: TLS over memory, so that it can be cut after any byte of any record."""

    def __init__(self, target: Target, *, seconds: float = 20.0, cut: tuple[int, float] | None = None) -> None:
        """Connect, without a word.

        Args:
            target: Whom to.
            seconds: How long to wait for anything.
            cut: After so many whole TLS records, and this part of the next one, nothing is sent any more.
        """
        self.socket = socket.create_connection(("127.0.0.1", target.port), seconds, source_address=(target.source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name = "{}:{}".format(*self.socket.getsockname()[:2])
        self.target = target
        self.records = 0
        self._cut = cut
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = target.context.wrap_bio(self._in, self._out, server_hostname="127.0.0.1")
        self._received = b""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def shake(self) -> Line:
        """Do the TLS handshake."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()
        return self

    def hello(self) -> bytes:
        """Return the bytes of a ClientHello; they are not sent."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._out.read()

    def associate(self) -> Line:
        """Shake hands and associate.

        Raises:
            ConnectionError: There is no association.
        """
        self.shake().send(request(self.target.title.encode()))
        found = self.pdu()
        if found is None or found[0] != ASSOCIATE_AC:
            raise ConnectionError(f"no association: {found}")
        return self

    def send(self, data: bytes) -> None:
        """Send bytes through TLS."""
        for at in range(0, len(data), MAXIMUM_PDU):
            self._tls.write(memoryview(data)[at : at + MAXIMUM_PDU])
            self._flush()

    def pdu(self) -> tuple[int, bytes] | None:
        """Return type and body of the next PDU, or None at the end."""
        while len(self._received) < 6 or len(self._received) < 6 + int.from_bytes(self._received[2:6], "big"):
            try:
                self._received += self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                if not self._fill():
                    return None
            except (ssl.SSLError, ConnectionError):
                return None
        end = 6 + int.from_bytes(self._received[2:6], "big")
        found, self._received = self._received[:end], self._received[end:]
        return found[0], found[6:]

    def status(self) -> int:
        """Return the status of the next response.

        Raises:
            ConnectionError: Something else came, or nothing.
        """
        found = self.pdu()
        if found is None or found[0] != P_DATA:
            raise ConnectionError(f"no response: {found}")
        body, at = found[1], 6
        while at + 8 <= len(body):
            _, number, length = struct.unpack_from("<HHI", body, at)
            if number == 0x0900:
                return int.from_bytes(body[at + 8 : at + 8 + length], "little")
            at += 8 + length
        raise ConnectionError("a response without a status")

    def rest(self) -> list[int]:
        """Return the types of the PDUs that still come, up to the end of the connection."""
        found = []
        with contextlib.suppress(ConnectionError):
            while (one := self.pdu()) is not None:
                found.append(one[0])
        return found

    def store(self, item: Image) -> int:
        """Store an image; return the status."""
        for part in message(item.data, item.instance):
            self.send(part)
        return self.status()

    def echo(self) -> int:
        """Send a C-ECHO; return the status."""
        self.send(ECHO_REQUEST)
        return self.status()

    def release(self) -> None:
        """Release the association and close the connection."""
        self.send(RELEASE)
        self.rest()
        self.socket.close()

    def reset(self) -> None:
        """Close the connection with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _flush(self) -> None:
        out = self._out.read()
        while out:
            end = 5 + int.from_bytes(out[3:5], "big")
            if self._cut is not None and self.records >= self._cut[0]:
                self.socket.sendall(out[: int(end * self._cut[1])])
                raise CutError
            self.socket.sendall(out[:end])
            self.records += 1
            out = out[end:]

    def _fill(self) -> int:
        received = self.socket.recv(1 << 16)
        self._in.write(received)
        if not received:
            self._in.write_eof()
        return len(received)


# --- what broken peers send

# Instead of an association request: what it is, and why the log says that it is refused.
INSTEAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "data before an association": (lambda: whole(b"data", b"1.2.3"), "a P-DATA-TF PDU is longer than was negotiated"),
    "an echo before an association": (lambda: ECHO_REQUEST, "a P-DATA-TF PDU is longer than was negotiated"),
    "a release before an association": (lambda: RELEASE, "something else than an association request came first"),
    "an abort before an association": (lambda: ABORTED, "something else than an association request came first"),
    "an unknown PDU type": (lambda: pdu(0x45, bytes(4)), "a PDU of an unknown type"),
    "a request of length 0": (lambda: pdu(ASSOCIATE_RQ, b""), "a PDU has an impossible length"),
    "a request of 4 GiB": (lambda: pdu(ASSOCIATE_RQ, b"", UNDEFINED), "a PDU has an impossible length"),
    "a request of 1 MiB and a byte": (
        lambda: pdu(ASSOCIATE_RQ, b"", (1 << 20) + 1),
        "a PDU has an impossible length",
    ),
    "a request of 1 MiB of zeros": (
        lambda: pdu(ASSOCIATE_RQ, bytes(1 << 20)),
        "the association request is malformed|calling AE title",
    ),
    "a request of 4 bytes": (lambda: pdu(ASSOCIATE_RQ, bytes(4)), "the association request is malformed"),
    "a request whose items lie about their length": (
        lambda: request()[:80] + b"\xff\xff" + request()[82:],
        "the association request is malformed",
    ),
    "even context ids": (
        lambda: request(ids=(2, 4, 6, 8)),
        "the association request (is malformed|cannot be answered)",
    ),
    "context id 0": (
        lambda: request(ids=(0, 0, 0, 0)),
        "the association request (is malformed|cannot be answered)",
    ),
    "HTTP within TLS": (lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "a PDU of an unknown type"),
}

NO_ITEM = "a P-DATA-TF PDU holds no item"
TOO_LONG = "a P-DATA-TF PDU is longer than was negotiated"
MISFIT = "an item's length does not fit its PDU"
IMPOSSIBLE = "a PDU has an impossible length"
NO_PLACE = "a PDU that has no place in an established association"
NO_COMMAND = "a data set without its command, or of another presentation context"
NO_CONTEXT = "a fragment names a presentation context that was not accepted"
LACKS = "a command set lacks a number, or one has a wrong length"
OTHER_GROUP = "a command set holds another group or an impossible length"


def _begun(item: Image) -> bytes:
    return pdata(STORE, 3, store_command(item.instance))


# Within an association, after which the server aborts: what it is, and what the log says.
BROKEN: dict[str, tuple[Callable[[Image], bytes], str]] = {
    "PDU length 0": (lambda _: pdu(P_DATA, b""), NO_ITEM),
    "PDU length 5": (lambda _: pdu(P_DATA, bytes(5)), NO_ITEM),
    "PDU length 4 GiB": (lambda _: pdu(P_DATA, b"", UNDEFINED), TOO_LONG),
    "PDU one byte over the maximum": (lambda _: pdu(P_DATA, b"", MAXIMUM_PDU + 1), TOO_LONG),
    "a release of length 0": (lambda _: pdu(RELEASE_RQ, b""), IMPOSSIBLE),
    "a release of 4 GiB": (lambda _: pdu(RELEASE_RQ, b"", UNDEFINED), IMPOSSIBLE),
    "item length 0": (lambda _: pdu(P_DATA, item(STORE, 3, bytes(8), 0)), MISFIT),
    "item length 1": (lambda _: pdu(P_DATA, item(STORE, 3, bytes(8), 1)), MISFIT),
    "item beyond its PDU": (lambda _: pdu(P_DATA, item(STORE, 3, bytes(8), 11)), MISFIT),
    "item length 4 GiB": (lambda _: pdu(P_DATA, item(STORE, 3, bytes(8), UNDEFINED)), MISFIT),
    "a PDU that ends within an item's header": (
        lambda _: pdu(P_DATA, item(STORE, 1, b"x") + bytes(5)),
        "a P-DATA-TF PDU ends within an item's header",
    ),
    "an unknown control bit": (lambda _: pdata(STORE, 0x83, bytes(8)), "an item has an unknown control bit"),
    "a command over its bound": (lambda _: pdata(STORE, 1, bytes(16_385)), "a command set is too long"),
    "a command over its bound in fragments": (
        lambda _: pdata(STORE, 1, bytes(4096)) * 5,
        "a command set is too long",
    ),
    "a second association request": (lambda _: request(), NO_PLACE),
    "a second association request within a message": (lambda i: _begun(i) + request(), NO_PLACE),
    "an association acceptance": (lambda _: pdu(ASSOCIATE_AC, bytes(68)), NO_PLACE),
    "a release reply": (lambda _: REPLIED, NO_PLACE),
    "a release after a command": (lambda i: _begun(i) + RELEASE, "a release request within a message"),
    "a release within a command": (
        lambda i: pdata(STORE, 1, store_command(i.instance)[:20]) + RELEASE,
        "a release request within a message",
    ),
    "a release within a data set": (
        lambda i: whole(i.data, i.instance, last=False) + RELEASE,
        "a release request within a message",
    ),
    "an unknown PDU type": (lambda _: pdu(0x08, bytes(4)), "a PDU of an unknown type"),
    "a data set without a command": (lambda i: pdata(STORE, 2, i.data), NO_COMMAND),
    "a data set on another context": (lambda i: _begun(i) + pdata(ECHO, 2, i.data), NO_COMMAND),
    "a data set within a command": (
        lambda i: pdata(STORE, 1, store_command(i.instance)[:20]) + pdata(STORE, 2, i.data),
        NO_COMMAND,
    ),
    "a data set after a C-ECHO": (lambda i: ECHO_REQUEST + pdata(ECHO, 2, i.data), NO_COMMAND),
    "a command on a rejected context": (lambda i: pdata(NOT_ACCEPTED, 3, store_command(i.instance)), NO_CONTEXT),
    "a command on context 0": (lambda i: pdata(0, 3, store_command(i.instance)), NO_CONTEXT),
    "a command on an even context": (lambda i: pdata(2, 3, store_command(i.instance)), NO_CONTEXT),
    "two commands in a row": (lambda i: _begun(i) * 2, "a command where a data set is expected"),
    "an empty command": (lambda _: pdata(STORE, 3, b""), LACKS),
    "a command of zeros": (lambda _: pdata(STORE, 3, bytes(256)), "a command set holds an element twice"),
    "a command that ends within an element": (
        lambda i: pdata(STORE, 3, store_command(i.instance)[:-30] + bytes(3)),
        f"a command set ends within an element|{OTHER_GROUP}",
    ),
    "a command whose element is longer than itself": (
        lambda _: pdata(STORE, 3, struct.pack("<HHI", 0, 0x0002, UNDEFINED)),
        OTHER_GROUP,
    ),
    "a command of another group": (lambda _: pdata(STORE, 3, struct.pack("<HHI", 8, 0x0018, 0)), OTHER_GROUP),
    "a response": (
        lambda _: pdata(STORE, 3, request_command(0x8001, CT_IMAGE.encode(), data_set=False)),
        "a response where a request is expected",
    ),
}


def _within(item: Image, study: bytes | None) -> bytes:
    """Return a data set with another Study Instance UID, or none."""
    return (item._replace(study=study).data if study is not None else item.front + item.rest) if item else b""


def _nested(depth: int) -> bytes:
    return (element(SEQUENCE, "SQ", b"", UNDEFINED) + ITEM) * depth


MISMATCH, NO_STUDY, UNPARSABLE, HEAD_TOO_LARGE, NO_DATA_SET = 0xA900, 0xC000, 0xC001, 0xC002, 0xC004
INVALID_UID, SOP_CLASS, UNRECOGNIZED = 0x0117, 0x0122, 0x0211

# Names that would mean something to a file system, a shell, a terminal, a database; and what is merely no UID.
NASTY: dict[str, bytes] = {
    "a path upwards": b"../../../../pwned",
    "an absolute path": b"/tmp/pwned",
    "a path within": b"1.2/3",
    "NUL": b"1.2\x00.3",
    "a newline": b"1.2\npwned 3",
    "a carriage return": b"1.2\rpwned",
    "an escape sequence": b"\x1b[2J\x1b]0;pwned\x07",
    "SQL": b"1'; DROP TABLE instances; --",
    "a shell": b"$(touch pwned)`touch pwned`",
    "a format": b"%s%n{0}",
    "not ASCII": b"1.2.\xff\xfe\xe4",
    "letters": b"1.2.a",
    "a leading dot": b".1.2",
    "two dots": b"1..2",
    "a trailing dot": b"1.2.",
    "65 characters": b"1." + b"2" * 63,
    "16,000 characters": b"1." + b"2" * 15_998,
}

# Whole messages that are refused: what it is, and the status; the association goes on.
REFUSED: dict[str, tuple[Callable[[Image], bytes], int]] = {
    "C-STORE on the verification context": (lambda i: whole(i.data, i.instance, context=ECHO), SOP_CLASS),
    "C-STORE of a class that the context does not have": (
        lambda i: whole(i.data, i.instance, sop_class=MR_IMAGE),
        SOP_CLASS,
    ),
    "C-STORE without a data set": (
        lambda i: pdata(STORE, 3, store_command(i.instance, data_set=False)),
        NO_DATA_SET,
    ),
    "C-FIND on a storage context": (
        lambda i: pdata(STORE, 3, request_command(0x0020, CT_IMAGE.encode())) + pdata(STORE, 2, i.middle),
        UNRECOGNIZED,
    ),
    "an empty data set": (lambda i: whole(b"", i.instance), NO_STUDY),
    "another instance than the command's": (lambda i: whole(i.data, i.instance + b"1"), MISMATCH),
    "another class than the command's": (
        lambda i: whole(i.data.replace(CT_IMAGE.encode(), MR_IMAGE.encode()), i.instance),
        MISMATCH,
    ),
    "no SOP instance": (lambda i: whole(element(0x00080016, "UI", CT_IMAGE.encode()) + i.middle, i.instance), MISMATCH),
    "no study": (lambda i: whole(_within(i, None), i.instance), NO_STUDY),
    "an empty study": (lambda i: whole(_within(i, b""), i.instance), NO_STUDY),
    "two studies": (lambda i: whole(i.front + i.middle + i.middle + i.rest, i.instance), UNPARSABLE),
    "an element beyond the data set": (
        lambda i: whole(i.front + element(0x00080070, "LO", b"", 60_000), i.instance),
        UNPARSABLE,
    ),
    "a study UID beyond the data set": (
        lambda i: whole(i.front + element(0x0020000D, "UI", i.study, 64), i.instance),
        UNPARSABLE,
    ),
    "a value of 4 GiB": (
        lambda i: whole(i.front + element(0x00091010, "OB", bytes(64), UNDEFINED - 1) + i.middle, i.instance),
        UNPARSABLE,
    ),
    "undefined length without its delimiter": (
        lambda i: whole(i.front + element(SEQUENCE, "SQ", b"", UNDEFINED) + ITEM + i.middle, i.instance),
        UNPARSABLE,
    ),
    "undefined length of what is no sequence": (
        lambda i: whole(i.front + element(0x00091010, "OB", b"", UNDEFINED) + i.middle + i.rest, i.instance),
        UNPARSABLE,
    ),
    "a group of a command": (lambda i: whole(bytes(8) + i.data, i.instance), UNPARSABLE),
    "a whole file": (lambda i: whole(bytes(128) + b"DICM" + i.data, i.instance), UNPARSABLE),
    "no VR": (lambda i: whole(i.front + b"\x09\x00\x10\x10\x01\x02\x03\x04" + i.middle, i.instance), UNPARSABLE),
    "random bytes": (lambda i: whole(b"\x08\x00\x05\x00" + i.pixels, i.instance), UNPARSABLE),
    "implicit VR": (
        lambda i: whole(struct.pack("<HHI", 8, 0x0016, 26) + CT_IMAGE.encode() + b"\0" + i.middle, i.instance),
        UNPARSABLE,
    ),
    "what does not inflate": (lambda i: whole(i.data, i.instance, context=STORE_DEFLATED), UNPARSABLE),
    "half of what inflates": (
        lambda i: whole(deflate(i.front + i.middle)[:-60], i.instance, context=STORE_DEFLATED),
        UNPARSABLE,
    ),
    "100,000 sequences in each other": (
        lambda i: whole(i.front + _nested(100_000) + i.middle, i.instance),
        UNPARSABLE,
    ),
    "100,000 sequences in each other after the study": (
        lambda i: whole(i.front + i.middle + _nested(100_000).replace(b"\x09\x00", b"\x29\x00"), i.instance),
        UNPARSABLE,
    ),
    "1,000,000 elements before the study": (
        lambda i: whole(i.front + element(0x00090010, "LO", b"") * 1_000_000 + i.middle, i.instance),
        UNPARSABLE,
    ),
    "1,000,000 elements after the study": (
        lambda i: whole(i.front + i.middle + element(0x00290010, "LO", b"") * 1_000_000, i.instance),
        UNPARSABLE,
    ),
    "5 MiB before the study": (
        lambda i: whole(i.front + element(0x00091010, "OB", bytes(5 << 20)) + i.middle + i.rest, i.instance),
        HEAD_TOO_LARGE,
    ),
    **{
        f"as instance: {name}": (functools.partial(lambda uid, i: whole(i.data, uid), uid), INVALID_UID)
        for name, uid in NASTY.items()
        if len(uid) < 10_000
    },
    **{
        f"as study: {name}": (
            functools.partial(lambda uid, i: whole(_within(i, uid), i.instance), uid),
            NO_STUDY,
        )
        for name, uid in NASTY.items()
        if len(uid) < 10_000
    },
}
SLOW_TO_MAKE = frozenset(name for name in REFUSED if name[0] == "1" or "5 MiB" in name)


# --- whole bad conversations, each of which ends by itself

Kind = Callable[[Target, random.Random], None]


def _instead(name: str) -> Kind:
    def run(target: Target, _: random.Random) -> None:
        with Line(target) as line:
            line.shake().send(INSTEAD[name][0]())
            line.rest()

    return run


def _broken(name: str) -> Kind:
    def run(target: Target, chance: random.Random) -> None:
        with Line(target) as line:
            line.associate().send(BROKEN[name][0](image(chance)))
            line.rest()

    return run


def _refused(name: str) -> Kind:
    def run(target: Target, chance: random.Random) -> None:
        with Line(target) as line:
            line.associate().send(REFUSED[name][0](image(chance)))
            line.status()
            line.release()

    return run


def _connect(target: Target, _: random.Random) -> None:
    Line(target).socket.close()


def _connect_reset(target: Target, _: random.Random) -> None:
    Line(target).reset()


def _no_tls(target: Target, _: random.Random) -> None:
    with Line(target) as line:
        line.socket.sendall(request())
        with contextlib.suppress(ConnectionError):
            line.socket.recv(100)


def _half_hello(target: Target, chance: random.Random) -> None:
    with Line(target) as line:
        hello = line.hello()
        line.socket.sendall(hello[: chance.randrange(1, len(hello))])


def _shake_only(target: Target, _: random.Random) -> None:
    with Line(target) as line:
        line.shake()


def _wrong_title(target: Target, _: random.Random) -> None:
    with Line(target) as line:
        line.shake().send(request(b"NOBODY"))
        line.rest()


def _silent_request(target: Target, chance: random.Random) -> None:
    """Half an association request, and nothing more until the server has enough."""
    with Line(target) as line:
        line.shake().send(request()[: chance.randrange(1, 90)])
        line.rest()


def _silent_data(target: Target, chance: random.Random) -> None:
    """Half a data set, and nothing more until the server has enough."""
    one = image(chance, 100_000)
    with Line(target) as line:
        line.associate().send(whole(one.data, one.instance)[: chance.randrange(500, 90_000)])
        line.rest()


def _cut(target: Target, chance: random.Random) -> None:
    converse(target, image(chance), cut=(chance.randrange(9), chance.random()), reset=chance.random() < 0.5)


def converse(target: Target, one: Image, *, cut: tuple[int, float] | None = None, reset: bool = False) -> Line:
    """Associate, store one small image, release; cut it where told to, by FIN or by RST.

    Each PDU is a TLS record of its own, so that a cut between records is one between PDUs, too.
    """
    with Line(target, cut=cut) as line:
        try:
            line.associate()
            for part in message(one.data, one.instance):
                line.send(part)
            line.status()
            line.send(RELEASE)
            line.rest()
        except CutError:
            if reset:
                line.reset()
    return line


KINDS: dict[str, Kind] = {
    "connect and go": _connect,
    "connect and reset": _connect_reset,
    "no TLS": _no_tls,
    "half a ClientHello": _half_hello,
    "a handshake and no more": _shake_only,
    "an unknown title": _wrong_title,
    "cut somewhere": _cut,
    **{f"instead: {name}": _instead(name) for name in INSTEAD},
    **{f"broken: {name}": _broken(name) for name in BROKEN},
    **{f"refused: {name}": _refused(name) for name in REFUSED if name not in SLOW_TO_MAKE},
}
# These take as long as the server lets them.
SLOW_KINDS: dict[str, Kind] = {
    "half a request and silence": _silent_request,
    "half a data set and silence": _silent_data,
}
LARGE_KINDS: dict[str, Kind] = {f"refused: {name}": _refused(name) for name in SLOW_TO_MAKE}
