"""The DICOM upper layer protocol without I/O: bytes in, events out; messages to bytes.

The rules, from PS3.8 section 9.3. A PDU is a type, a zero byte, a length (u32) and so many bytes. P-DATA-TF holds
items: a length (u32), a presentation context id, a control byte (bit 0 command, bit 1 last), a fragment. A reader is
in one
of four states:

    HEADER     collects the 6 bytes of a PDU header
    BODY       collects a whole PDU that is not P-DATA-TF (bounded), then emits it
    ITEM       collects the 6 bytes of an item header
    FRAGMENT   hands the fragment on in whatever pieces it comes, without collecting it

and whatever breaks a rule raises WireError; a reader that raised is not used again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ = 0x01, 0x02, 0x03
P_DATA_TF = 0x04
RELEASE_RQ, RELEASE_RP, ABORT = 0x05, 0x06, 0x07

# An association request with 128 contexts of 60 transfer syntaxes each has about 560 KB.
_BODY_LIMITS = {
    ASSOCIATE_RQ: 1 << 20,
    ASSOCIATE_AC: 1 << 20,
    ASSOCIATE_RJ: 4,
    RELEASE_RQ: 4,
    RELEASE_RP: 4,
    ABORT: 4,
}
_HEADER = struct.Struct(">BBI")
_ITEM = struct.Struct(">IBB")


class WireError(Exception):
    """The peer broke the protocol; the message says how, in our words only."""


class Pdu(NamedTuple):
    """A whole PDU other than P-DATA-TF: its type, and all its bytes with the header."""

    kind: int
    content: bytes


class Fragment(NamedTuple):
    """A piece of a fragment. ``data`` is valid until the reader gets more bytes.

    ``last`` is true on the piece that ends the last fragment of a command set or data set.
    """

    context_id: int
    command: bool
    last: bool
    data: memoryview


class Reader:
    """Turns received bytes into events."""

    def __init__(self, maximum_pdu: int) -> None:
        """Begin a connection.

        Args:
            maximum_pdu: Largest P-DATA-TF length accepted, the one that was offered; 0 before an association.
        """
        self.maximum_pdu = maximum_pdu
        self._part = bytearray()
        self._need = 6
        self._step: Callable[[bytes], Pdu | Fragment | None] = self._header
        self._kind = 0
        self._head = b""
        self._pdu_left = 0
        self._item_left = 0
        self._context_id = 0
        self._control = 0

    @property
    def between(self) -> bool:
        """True between two PDUs: nothing of one has arrived."""
        return self._step == self._header and not self._part

    def receive(self, data: memoryview) -> Iterator[Pdu | Fragment]:
        """Yield the events in some bytes.

        Raises:
            WireError: The peer broke the protocol.
        """
        position = 0
        end = len(data)
        while position < end:
            if self._item_left:
                count = min(self._item_left, end - position)
                self._item_left -= count
                self._pdu_left -= count
                yield self._fragment(data[position : position + count])
                position += count
                continue
            count = min(self._need - len(self._part), end - position)
            self._part += data[position : position + count]
            position += count
            if len(self._part) == self._need:
                content = bytes(self._part)
                self._part.clear()
                event = self._step(content)
                if event is not None:
                    yield event

    def _fragment(self, data: memoryview) -> Fragment:
        done = self._item_left == 0
        if done:
            self._expect_item()
        return Fragment(self._context_id, bool(self._control & 1), done and bool(self._control & 2), data)

    def _header(self, content: bytes) -> Pdu | None:
        self._kind, _, length = _HEADER.unpack(content)
        if self._kind == P_DATA_TF:
            if length > self.maximum_pdu:
                raise WireError("a P-DATA-TF PDU is longer than was negotiated")
            if length < 6:
                raise WireError("a P-DATA-TF PDU holds no item")
            self._pdu_left = length
            self._expect_item()
            return None
        limit = _BODY_LIMITS.get(self._kind)
        if limit is None:
            raise WireError("a PDU of an unknown type")
        if length > limit or length < 4:
            raise WireError("a PDU has an impossible length")
        self._head = content
        self._need = length
        self._step = self._body
        return None

    def _body(self, content: bytes) -> Pdu:
        self._need = 6
        self._step = self._header
        return Pdu(self._kind, self._head + content)

    def _expect_item(self) -> None:
        self._need = 6
        if self._pdu_left == 0:
            self._step = self._header
        elif self._pdu_left < 6:
            raise WireError("a P-DATA-TF PDU ends within an item's header")
        else:
            self._step = self._item

    def _item(self, content: bytes) -> Fragment | None:
        length, self._context_id, self._control = _ITEM.unpack(content)
        self._pdu_left -= 6
        if length < 2 or length - 2 > self._pdu_left:
            raise WireError("an item's length does not fit its PDU")
        if self._control & 0xFC:
            raise WireError("an item has an unknown control bit")
        self._item_left = length - 2
        if self._item_left == 0:
            return self._fragment(memoryview(b""))
        return None


def data_pdus(context_id: int, *, command: bool, content: bytes, maximum: int) -> bytes:
    """Return a command set or data set as P-DATA-TF PDUs.

    Args:
        context_id: The presentation context.
        command: A command set, not a data set.
        content: Its bytes.
        maximum: The receiver's maximum PDU length; 0 means it has none.

    Raises:
        WireError: The receiver has no room for a single byte.
    """
    size = _fragment_size(maximum)
    pieces = [content[i : i + size] for i in range(0, len(content), size)] or [b""]
    result = []
    for number, piece in enumerate(pieces, 1):
        control = (1 if command else 0) | (2 if number == len(pieces) else 0)
        item = _ITEM.pack(len(piece) + 2, context_id, control)
        result.append(_HEADER.pack(P_DATA_TF, 0, len(item) + len(piece)) + item + piece)
    return b"".join(result)


def data_stream(context_id: int, parts: Iterable[bytes | memoryview], *, length: int, maximum: int) -> Iterator[bytes]:
    """Yield a data set as P-DATA-TF PDUs while its parts come; its end only once they are over.

    What reading the parts raises passes through, and then the last fragment was not given: nobody takes what was
    for a whole data set. However the parts are cut, all fragments but the last are as long as they may be.

    Args:
        context_id: The presentation context.
        parts: Its bytes.
        length: How many they are.
        maximum: The receiver's maximum PDU length; 0 means it has none.

    Raises:
        WireError: The receiver has no room for a single byte, or there are more or fewer bytes.
    """
    size = _fragment_size(maximum)
    left = length
    held = b""
    for part in parts:
        view = memoryview(part)
        left -= len(view)
        if left < 0:
            raise WireError("a data set is longer than was said")
        start = min(size - len(held), len(view)) if held else 0
        if start:
            held = b"".join((held, view[:start]))
        if start == len(view):
            continue
        if held:
            yield _fragment_pdu(context_id, held, last=False)
        for place in range(start, len(view) - size, size):
            yield _fragment_pdu(context_id, view[place : place + size], last=False)
        # A part counts until the next is asked for.
        held = bytes(view[start + (len(view) - start - 1) // size * size :])
    if left:
        raise WireError("a data set is shorter than was said")
    yield _fragment_pdu(context_id, held, last=True)


def _fragment_size(maximum: int) -> int:
    """Return how many bytes a fragment has at most; an even number, as DCMTK wants it, where there is room for two.

    Raises:
        WireError: There is no room for a single byte.
    """
    if 0 < maximum <= 6:
        raise WireError("the peer's maximum PDU length leaves no room for a byte")
    size = min(maximum or 1 << 17, 1 << 17) - 6
    return size - size % 2 or 1


def _fragment_pdu(context_id: int, piece: bytes | memoryview, *, last: bool) -> bytes:
    head = _HEADER.pack(P_DATA_TF, 0, len(piece) + 6) + _ITEM.pack(len(piece) + 2, context_id, 2 if last else 0)
    return b"".join((head, piece))


def release_request() -> bytes:
    """Return an A-RELEASE-RQ PDU."""
    return _HEADER.pack(RELEASE_RQ, 0, 4) + bytes(4)


def release_reply() -> bytes:
    """Return an A-RELEASE-RP PDU."""
    return _HEADER.pack(RELEASE_RP, 0, 4) + bytes(4)


def abort(*, reason: int, by_user: bool = False) -> bytes:
    """Return an A-ABORT PDU; ``reason`` counts only for the service provider (PS3.8 table 9-26)."""
    return _HEADER.pack(ABORT, 0, 4) + bytes((0, 0, 0 if by_user else 2, 0 if by_user else reason))


def reject(*, permanent: bool, source: int, reason: int) -> bytes:
    """Return an A-ASSOCIATE-RJ PDU (PS3.8 table 9-21)."""
    return _HEADER.pack(ASSOCIATE_RJ, 0, 4) + bytes((0, 1 if permanent else 2, source, reason))
