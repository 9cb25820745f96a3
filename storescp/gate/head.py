"""The head of a data set, parsed as it streams past: the few elements that the index needs, without I/O.

A parser gets the encoded bytes in pieces of any size and keeps at most one element of them. It walks top-level
elements up to the last one wanted, skips what it does not want, sequences included, and is done then: pixels are
never looked at. Source: PS3.5 sections 7 and A.
"""

from __future__ import annotations

import struct
import zlib
from typing import NoReturn

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
# Inflated bytes are taken in steps of so many, and skipped ones dropped as they come; before the last wanted element a
# data set may inflate to no more than the limit, which is processor time rather than memory.
_INFLATE_STEP = 65_536
INFLATE_LIMIT = 64 << 20

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
        # Tag and length of an element of the top level, with the VR where there is one.
        self._head = struct.Struct(("<" if encoding.little_endian else ">") + ("HHI" if encoding.implicit else "HH2sH"))
        self._inflate = zlib.decompressobj(-15) if encoding.deflated else None
        self._inflated = 0
        self._seen: set[int] = set()
        self._part = b""
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
                self._inflated += len(plain)
                if self._inflated > INFLATE_LIMIT:
                    raise HeadError("a deflated data set inflates to too much before its last wanted element")
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
        # What was kept is at most one incomplete element, so that joining copies little.
        part = memoryview(self._part + data) if self._part else data
        position = 0
        while not self.done:
            following = self._nested(part, position) if self._open else self._walk(part, position)
            if following is None:
                break
            position = following
        self._skip = max(0, position - len(part))
        self._part = b"" if self.done else bytes(part[position:])

    def _walk(self, part: memoryview, position: int) -> int | None:  # noqa: C901, PLR0912 (see the docstring's end)
        """Pass over elements of the top level; return where the next begins, or None if the one there is incomplete.

        Returns early where a sequence of undefined length begins. One loop without calls: this is where receiving many
        small objects spends its time.
        """
        end = len(part)
        start = position
        read, short, long = self._head.unpack_from, _SHORT_VRS, self._order[2].unpack_from
        values, seen = self.values, self._seen
        while end - position >= 8:
            if self._implicit:
                group, number, length = read(part, position)
                vr, content = b"", position + 8
            else:
                group, number, vr, length = read(part, position)
                content = position + 8
            tag = group << 16 | number
            if tag > LAST_WANTED:
                self.done = True
                return position
            if group < 0x0008:
                raise HeadError("a data set begins with an element of a file's or command's group")
            if vr not in short and vr:
                # A VR of a later edition is encoded like the long ones (PS3.5 6.2).
                if vr not in _LONG_VRS and not (vr.isalpha() and vr.isupper()):
                    raise HeadError("an element has no VR where one must be")
                if end - position < 12:
                    break
                length = long(part, position + 8)[0]
                content = position + 12
            if length == _UNDEFINED:
                self._counted()
                self._open_sequence(vr)
                return content
            following = content + length
            # The VR of the dictionary, whatever the data set says: a UID must be a UID for everybody who reads on.
            if wanted := WANTED.get(tag):
                if tag in seen:
                    raise HeadError("a data set holds an element twice")
                if length <= VALUE_LIMIT:
                    if end < following:
                        break
                    values[tag] = (wanted, bytes(part[content:following]))
                seen.add(tag)
            self._count += 1
            if self._count > ELEMENT_LIMIT:
                self._too_many()
            position = following
        return position if position > start else None

    def _nested(self, part: memoryview, position: int) -> int | None:
        """Handle what stands at a position within sequences; return where the next begins, or None."""
        if len(part) - position < 8:
            return None
        kind, implicit, order = self._open[-1]
        group, number = order[0].unpack_from(part, position)
        tag = group << 16 | number
        if kind == "sequence":
            length = int(order[2].unpack_from(part, position + 4)[0])
            if tag == _SEQUENCE_END:
                self._open.pop()
                return position + 8
            if tag != _ITEM:
                raise HeadError("a sequence holds something else than items")
            self._counted()
            if length == _UNDEFINED:
                self._push("item", implicit, order)
                return position + 8
            return position + 8 + length
        if tag == _ITEM_END:
            self._open.pop()
            return position + 8
        header = _lengths(part, position, implicit, order)
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
            self._too_many()

    def _too_many(self) -> NoReturn:
        raise HeadError("a data set has too many elements before its end is known")


def _lengths(part: memoryview, position: int, implicit: bool, order: _Order) -> tuple[bytes, int, int] | None:
    """Return VR, start and length of a value, or None if more bytes are needed."""
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
