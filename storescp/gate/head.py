"""The head of a data set, parsed as it streams past: the few elements that the index needs, without I/O.

A parser gets the encoded bytes in pieces of any size and keeps at most one element of them. It walks top-level
elements up to the last one wanted, skips what it does not want, sequences included, and is done then: pixels are
never looked at. Source: PS3.5 sections 7 and A.
"""

from __future__ import annotations

import struct
import zlib

from storescp.gate.transfer import Encoding

# Tag to VR, of what the index, queries and later retrieval need; the VR counts where the encoding does not tell it.
WANTED = {
    0x00080005: "CS", 0x00080008: "CS", 0x00080016: "UI", 0x00080018: "UI", 0x00080020: "DA",
    0x00080021: "DA", 0x00080022: "DA", 0x00080023: "DA", 0x0008002A: "DT", 0x00080030: "TM",
    0x00080031: "TM", 0x00080032: "TM", 0x00080033: "TM", 0x00080050: "SH", 0x00080060: "CS",
    0x00080070: "LO", 0x00080080: "LO", 0x00080090: "PN", 0x00080201: "SH", 0x00081010: "SH",
    0x00081030: "LO", 0x0008103E: "LO", 0x00081050: "PN", 0x00081060: "PN", 0x00081070: "PN",
    0x00081090: "LO", 0x00100010: "PN", 0x00100020: "LO", 0x00100021: "LO", 0x00100030: "DA",
    0x00100032: "TM", 0x00100040: "CS", 0x00101000: "LO", 0x00101010: "AS", 0x00101020: "DS",
    0x00101030: "DS", 0x00180015: "CS", 0x00181000: "LO", 0x00181030: "LO", 0x0020000D: "UI",
    0x0020000E: "UI", 0x00200010: "SH", 0x00200011: "IS", 0x00200012: "IS", 0x00200013: "IS",
    0x00200052: "UI", 0x00200060: "CS", 0x00280008: "IS", 0x00280010: "US", 0x00280011: "US",
    0x00280100: "US", 0x00400244: "DA", 0x00400245: "TM", 0x0040A491: "CS", 0x0040A493: "CS",
}  # fmt: skip
LAST_WANTED = max(WANTED)
VALUE_LIMIT = 4096
DEPTH_LIMIT = 64
ELEMENT_LIMIT = 200_000
# What one element may inflate to is bounded by this and by VALUE_LIMIT; skipped bytes are dropped as they come.
_INFLATE_STEP = 65_536

_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL",
     b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}
)  # fmt: skip
_Order = tuple[struct.Struct, struct.Struct, struct.Struct]
_LITTLE: _Order = (struct.Struct("<HH"), struct.Struct("<H"), struct.Struct("<I"))
_BIG: _Order = (struct.Struct(">HH"), struct.Struct(">H"), struct.Struct(">I"))
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


class HeadError(Exception):
    """The head of a data set breaks DICOM's encoding rules, or a bound of ours."""


class HeadParser:
    """Collects wanted elements of one data set. ``values`` maps tags to VR and raw value."""

    def __init__(self, encoding: Encoding) -> None:
        self.values: dict[int, tuple[str, bytes]] = {}
        self.done = False
        self._implicit = encoding.implicit
        self._order = _LITTLE if encoding.little_endian else _BIG
        self._inflate = zlib.decompressobj(-15) if encoding.deflated else None
        self._seen: set[int] = set()
        self._part = bytearray()
        self._skip = 0
        self._count = 0
        # Open sequences and items of undefined length: kind ("sequence" or "item"), implicit within, order within.
        self._open: list[tuple[str, bool, _Order]] = []

    def feed(self, data: memoryview) -> None:
        """Take the next bytes of the data set.

        Raises:
            HeadError: They break a rule.
        """
        if self.done:
            return
        if self._inflate is None:
            self._take(data)
            return
        try:
            pending: bytes | memoryview = data
            while not self.done and not self._inflate.eof:
                plain = self._inflate.decompress(pending, _INFLATE_STEP)
                self._take(memoryview(plain))
                pending = self._inflate.unconsumed_tail
                # A whole step with nothing left to feed it: more of it may still lie inside zlib.
                if not pending and len(plain) < _INFLATE_STEP:
                    return
        except zlib.error:
            raise HeadError("a deflated data set does not inflate") from None

    def end(self) -> None:
        """Take the end of the data set.

        Raises:
            HeadError: It ends within an element.
        """
        if not self.done and (self._part or self._skip or self._open):
            raise HeadError("a data set ends within an element")
        self.done = True

    def _take(self, data: memoryview) -> None:
        if self._skip:
            count = min(self._skip, len(data))
            self._skip -= count
            data = data[count:]
            if self._skip:
                return
        self._part += data
        position = 0
        while not self.done:
            following = self._element(position)
            if following is None:
                break
            position = following
            if position > len(self._part):
                self._skip = position - len(self._part)
                position = len(self._part)
                break
        del self._part[:position]

    def _element(self, position: int) -> int | None:
        """Handle the element at a position; return where the next begins, or None if more bytes are needed."""
        part = self._part
        if len(part) - position < 8:
            return None
        order = self._open[-1][2] if self._open else self._order
        group, number = order[0].unpack_from(part, position)
        tag = group << 16 | number
        if self._open:
            return self._nested(tag, position)
        if tag > LAST_WANTED:
            self.done = True
            return position
        if group < 0x0008:
            raise HeadError("a data set begins with an element of a file's or command's group")
        header = self._lengths(position, self._implicit, order)
        if header is None:
            return None
        vr, start, length = header
        self._counted()
        if length == _UNDEFINED:
            self._open_sequence(vr)
            return start
        if tag in WANTED:
            if tag in self._seen:
                raise HeadError("a data set holds an element twice")
            if length <= VALUE_LIMIT and len(part) < start + length:
                return None
            self._seen.add(tag)
        if tag in WANTED and length <= VALUE_LIMIT:
            # The VR of the dictionary, whatever the data set says: a UID must be a UID for everybody who reads on.
            self.values[tag] = (WANTED[tag], bytes(part[start : start + length]))
        return start + length

    def _nested(self, tag: int, position: int) -> int | None:
        kind, implicit, order = self._open[-1]
        if kind == "sequence":
            length = order[2].unpack_from(self._part, position + 4)[0]
            if tag == _SEQUENCE_END:
                self._open.pop()
                return position + 8
            if tag != _ITEM:
                raise HeadError("a sequence holds something else than items")
            self._counted()
            if length == _UNDEFINED:
                self._push("item", implicit, order)
                return position + 8
            return position + 8 + int(length)
        if tag == _ITEM_END:
            self._open.pop()
            return position + 8
        header = self._lengths(position, implicit, order)
        if header is None:
            return None
        vr, start, length = header
        self._counted()
        if length == _UNDEFINED:
            self._open_sequence(vr)
            return start
        return start + length

    def _open_sequence(self, vr: bytes) -> None:
        _, within, order = self._open[-1] if self._open else ("", self._implicit, self._order)
        # PS3.5 6.2.2 note 5: UN of undefined length holds implicit VR little endian, whatever is around it.
        self._push("sequence", within or vr == b"UN", _LITTLE if vr == b"UN" else order)

    def _push(self, kind: str, implicit: bool, order: _Order) -> None:
        if len(self._open) >= 2 * DEPTH_LIMIT:
            raise HeadError("a data set nests too deep")
        self._open.append((kind, implicit, order))

    def _counted(self) -> None:
        self._count += 1
        if self._count > ELEMENT_LIMIT:
            raise HeadError("a data set has too many elements before its end is known")

    def _lengths(self, position: int, implicit: bool, order: _Order) -> tuple[bytes, int, int] | None:
        """Return VR, start and length of a value, or None if more bytes are needed."""
        part = self._part
        if implicit:
            return b"", position + 8, int(order[2].unpack_from(part, position + 4)[0])
        vr = bytes(part[position + 4 : position + 6])
        if vr in _SHORT_VRS:
            return vr, position + 8, int(order[1].unpack_from(part, position + 6)[0])
        # A VR of a later edition is encoded like the long ones (PS3.5 6.2).
        if vr not in _LONG_VRS and not (vr.isalpha() and vr.isupper()):
            raise HeadError("an element has no VR where one must be")
        if len(part) - position < 12:
            return None
        return vr, position + 12, int(order[2].unpack_from(part, position + 8)[0])
