"""A data set taken apart as it streams past: elements in their order, sequences item by item, values when asked for.

The reader pulls; what nobody asks for is skipped, so that memory holds one value at a time, whatever the size of the
data set. Pure: bytes in, elements out. Source: PS3.5 sections 7 and A.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import NoReturn

from pydicom.datadict import dictionary_VR

from storescp.desk.multipart import Buffer
from storescp.gate.describe import struct_order
from storescp.gate.transfer import ENCODINGS, Encoding

PIXEL_DATA = 0x7FE00010
VALUE_LIMIT = 16 << 20
DEPTH_LIMIT = 64
ELEMENT_LIMIT = 1_000_000
UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_SHORT = frozenset(
    {"AE", "AS", "AT", "CS", "DA", "DS", "DT", "FL", "FD", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM", "UI",
     "UL", "US"}
)  # fmt: skip
_IMPLICIT = Encoding(implicit=True, little_endian=True, deflated=False)
_INFLATE_STEP = 65_536
# What a deflated data set may come to: processor time, for memory is bounded anyway.
INFLATED_LIMIT = 4 << 30


class DatasetError(Exception):
    """A data set breaks DICOM's encoding rules, or a bound of ours."""


class Element:
    """An element whose header was read; ``vr`` is the dictionary's where the encoding does not tell it."""

    def __init__(self, tag: int, vr: str, length: int, inner: Encoding, depth: int) -> None:
        self.tag = tag
        self.vr = vr
        self.length = length
        self.inner = inner
        self.depth = depth
        self.done = False

    @property
    def has_items(self) -> bool:
        """Whether its value is items: a sequence, or encapsulated pixels."""
        return self.vr == "SQ" or self.length == UNDEFINED

    @property
    def is_encapsulated(self) -> bool:
        """Whether its items are fragments of pixel data."""
        return self.length == UNDEFINED and self.vr in {"OB", "OW"}


class Item:
    """An item of a sequence, or the data set itself: where elements are."""

    def __init__(self, encoding: Encoding, end: int | None, depth: int, length: int = 0) -> None:
        self.encoding = encoding
        self.end = end
        self.depth = depth
        self.length = length
        self.done = False


class Reader:
    """Takes a data set apart. What is yielded is to be used before the next is asked for."""

    def __init__(self, parts: Iterable[Buffer], transfer_syntax: str) -> None:
        """Begin.

        Args:
            parts: The encoded bytes, in buffers of any length.
            transfer_syntax: Its UID.

        Raises:
            DatasetError: There is no such transfer syntax of data sets.
        """
        encoding = ENCODINGS.get(transfer_syntax)
        if encoding is None:
            raise DatasetError("an unknown transfer syntax")
        self._parts = _inflated(parts) if encoding.deflated else iter(parts)
        self._have = memoryview(b"")
        self._position = 0
        self._count = 0
        self.top = Item(encoding, None, 0)

    def elements(self, item: Item | None = None) -> Iterator[Element]:
        """Yield the elements of an item, of the data set where none is named.

        Raises:
            DatasetError: It breaks a rule; like everything that reads here.
        """
        item = item or self.top
        while not item.done:
            if item.end is not None and self._position >= item.end:
                if self._position > item.end:
                    _broken("an element is longer than what it is in")
                break
            if item.depth == 0 and not self._more():
                break
            element = self._header(item)
            if element is None:
                break
            start = self._position
            yield element
            if element.length != UNDEFINED:
                left = start + element.length - self._position
                if left < 0:
                    _broken("an item is longer than its sequence")
                self._drop(left)
            elif not element.done:
                for _ in self.items(element):
                    pass
        item.done = True

    def value(self, element: Element, limit: int = VALUE_LIMIT) -> bytes:
        """Return the value of an element of defined length.

        Raises:
            DatasetError: It is longer than the limit.
        """
        if element.length == UNDEFINED or element.length > limit:
            _broken("a value is too long to be held in memory")
        return self._exactly(element.length)

    def pieces(self, length: int) -> Iterator[memoryview]:
        """Yield so many of the next bytes, as they come."""
        while length:
            if not self._more():
                _broken("it ends within a value")
            taken, self._have = self._have[:length], self._have[length:]
            self._position += len(taken)
            length -= len(taken)
            yield taken

    def items(self, element: Element) -> Iterator[Item]:
        """Yield the items of a sequence, or the fragments of pixel data, whose ``length`` says how long each is."""
        end = None if element.length == UNDEFINED else self._position + element.length
        if element.depth >= DEPTH_LIMIT:
            _broken("it nests too deep")
        order = struct_order(element.inner)
        while end is None or self._position < end:
            head = self._exactly(8)
            group, number = (int.from_bytes(head[at : at + 2], order) for at in (0, 2))
            length = int.from_bytes(head[4:], order)
            tag = group << 16 | number
            if tag == _SEQUENCE_END and end is None:
                break
            if tag != _ITEM:
                _broken("a sequence holds something else than items")
            self._counted()
            if length == UNDEFINED and element.is_encapsulated:
                _broken("a fragment has no length")
            start = self._position
            item = Item(element.inner, None if length == UNDEFINED else start + length, element.depth + 1, length)
            yield item
            if item.end is None:
                for _ in self.elements(item):
                    pass
            else:
                if self._position > item.end:
                    _broken("an element is longer than what it is in")
                self._drop(item.end - self._position)
        element.done = True

    def _header(self, item: Item) -> Element | None:
        """Return the next element's header; none where an item of undefined length ends."""
        self._counted()
        order = struct_order(item.encoding)
        head = self._exactly(8)
        group, number = (int.from_bytes(head[at : at + 2], order) for at in (0, 2))
        tag = group << 16 | number
        if tag == _ITEM_END and item.end is None and item.depth:
            return None
        if group == 0xFFFE:
            _broken("a delimiter where an element must be")
        if item.encoding.implicit:
            vr, length = vr_of(tag), int.from_bytes(head[4:], order)
        else:
            vr = head[4:6].decode("latin-1")
            if vr in _SHORT:
                length = int.from_bytes(head[6:], order)
            elif vr in _LONG or (vr.isascii() and vr.isalpha() and vr.isupper()):
                # A VR of a later edition is encoded like the long ones (PS3.5 6.2).
                length = int.from_bytes(self._exactly(4), order)
            else:
                _broken("an element has no VR where one must be")
        inner = item.encoding
        if vr == "UN" and not item.encoding.implicit:
            # PS3.5 6.2.2: what is in it is implicit VR little endian, whatever is around it.
            inner = _IMPLICIT
            vr = "SQ" if length == UNDEFINED else _public(tag)
        elif length == UNDEFINED and tag != PIXEL_DATA and vr != "SQ":
            vr = "SQ"
        return Element(tag, vr, length, inner, item.depth)

    def _counted(self) -> None:
        self._count += 1
        if self._count > ELEMENT_LIMIT:
            _broken("it has too many elements")

    def _exactly(self, length: int) -> bytes:
        if len(self._have) >= length:
            taken, self._have = bytes(self._have[:length]), self._have[length:]
            self._position += length
            return taken
        return b"".join(self.pieces(length))

    def _drop(self, length: int) -> None:
        for _ in self.pieces(length):
            pass

    def _more(self) -> bool:
        while not self._have:
            part = next(self._parts, None)
            if part is None:
                return False
            self._have = memoryview(part)
        return True


def vr_of(tag: int) -> str:
    """Return an element's VR from the dictionary; of several, as it names them; UN where there is none."""
    group, number = tag >> 16, tag & 0xFFFF
    if number == 0:
        return "UL"
    if group % 2:
        return "LO" if 0x10 <= number <= 0xFF else "UN"
    try:
        return str(dictionary_VR(tag))
    except KeyError:
        return "UN"


def _public(tag: int) -> str:
    """Return what an element is whose VR was lost on its way: encoded by who did not know it."""
    vr = vr_of(tag) if (tag >> 16) % 2 == 0 else "UN"
    return "UN" if " or " in vr else vr


def _inflated(parts: Iterable[Buffer]) -> Iterator[bytes]:
    inflate = zlib.decompressobj(-15)
    total = 0
    try:
        for part in parts:
            pending: Buffer = part
            while not inflate.eof:
                plain = inflate.decompress(pending, _INFLATE_STEP)
                total += len(plain)
                if total > INFLATED_LIMIT:
                    _broken("it inflates to too much")
                if plain:
                    yield plain
                pending = inflate.unconsumed_tail
                # A whole step with nothing left to feed it: more of it may still lie inside zlib.
                if not pending and len(plain) < _INFLATE_STEP:
                    break
    except zlib.error:
        _broken("it does not inflate")
    if not inflate.eof:
        _broken("it ends within its compression")


def _broken(what: str) -> NoReturn:
    raise DatasetError(f"a data set cannot be read: {what}")
