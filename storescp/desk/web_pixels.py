"""Frames of an instance as its data set streams past: what stands before pixel data in memory, a frame in pieces.

Source: PS3.5 8.2 and A.4, PS3.3 C.7.6.3 and C.7.6.6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec

from storescp.desk.multipart import Buffer
from storescp.desk.web_dataset import PIXEL_DATA, DatasetError, Element, Reader
from storescp.desk.web_json import little_endian, numbers
from storescp.gate.transfer import ENCODINGS

RLE = "1.2.840.10008.1.2.5"
# One bit stream for all frames.
_VIDEO = "1.2.840.10008.1.2.4.10"
_FRAME_LIMIT = 1 << 30
_TABLE_LIMIT = 16 << 20
_EXTENDED_OFFSETS = 0x7FE00001
# What the code streams of JPEG, JPEG 2000 and JPEG XL begin with.
_BEGINNINGS = (b"\xff\xd8", b"\xff\x4f\xff\x51", b"\xff\x0a", b"\x00\x00\x00\x0c")
_WANTED = {
    0x00280002: "samples", 0x00280004: "photometric", 0x00280006: "planar", 0x00280008: "frames", 0x00280010: "rows",
    0x00280011: "columns", 0x00280100: "allocated", 0x00280101: "stored", 0x00280103: "signed", 0x00281050: "center",
    0x00281051: "width", 0x00281052: "intercept", 0x00281053: "slope",
}  # fmt: skip


class NoFrameError(Exception):
    """There is no such frame, or there are no pixels."""


class Layout(msgspec.Struct):
    """What the head says of the pixels; lengths in bits and pixels, window and rescaling as they are, or empty."""

    samples: int = 1
    photometric: str = ""
    planar: int = 0
    frames: int = 1
    rows: int = 0
    columns: int = 0
    allocated: int = 0
    stored: int = 0
    signed: int = 0
    center: str = ""
    width: str = ""
    intercept: str = ""
    slope: str = ""

    @property
    def frame_bits(self) -> int:
        """How many bits a native frame has."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.allocated


class Pixels:
    """The frames of one data set."""

    def __init__(self, reader: Reader, transfer_syntax: str) -> None:
        """Read up to the pixels.

        Raises:
            NoFrameError: There are none.
            DatasetError: The data set cannot be read.
        """
        self._reader = reader
        self._syntax = transfer_syntax
        self.layout = Layout()
        self._offsets: list[int] = []
        self._elements = reader.elements()
        for element in self._elements:
            if element.tag == PIXEL_DATA:
                self._element = element
                break
            self._hear(element)
        else:
            raise NoFrameError
        self.is_encapsulated = self._element.is_encapsulated

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, Iterator[Buffer]]]:
        """Yield frames, each in pieces as they are stored; of native ones the words little endian.

        Args:
            wanted: Their numbers from 1, ascending.

        Raises:
            NoFrameError: There are not so many; said before the first.
            DatasetError: The data set cannot be read.
        """
        if wanted[-1] > max(1, self.layout.frames):
            raise NoFrameError
        if self.is_encapsulated:
            last = 0
            for number, fragments in itertools.groupby(self._fragments(), key=lambda fragment: fragment[0]):
                if number in wanted:
                    last = number
                    yield number, itertools.chain.from_iterable(pieces for _, pieces in fragments)
                if number >= wanted[-1]:
                    break
            if last != wanted[-1]:
                raise DatasetError("a data set cannot be read: it has fewer frames than it says")
            return
        yield from self._native(wanted)

    def _native(self, wanted: Sequence[int]) -> Iterator[tuple[int, Iterator[Buffer]]]:
        bits, count = self.layout.frame_bits, max(1, self.layout.frames)
        length = -(-bits // 8)
        if bits % 8 and count > 1:
            raise DatasetError("a data set cannot be read: its frames begin within bytes")
        if not 0 < length <= _FRAME_LIMIT or length * count > self._element.length:
            raise DatasetError("a data set cannot be read: its pixels are not as many as it says")
        at = 1
        for number in wanted:
            for _ in self._reader.pieces((number - at) * length):
                pass
            yield number, self._turned(length)
            at = number + 1

    def _turned(self, length: int) -> Iterator[Buffer]:
        encoding = ENCODINGS[self._syntax]
        vr = {16: "OW", 32: "OL", 64: "OV"}.get(self.layout.allocated, "OB")
        if encoding.little_endian or vr == "OB":
            return iter(self._reader.pieces(length))
        return iter([little_endian(b"".join(self._reader.pieces(length)), vr, encoding)])

    def _fragments(self) -> Iterator[tuple[int, Iterator[Buffer]]]:
        """Yield each fragment with the number of its frame."""
        items = self._reader.items(self._element)
        table = next(items, None)
        if table is None:
            return
        offsets = self._offsets
        if not offsets:
            if table.length > _TABLE_LIMIT:
                raise DatasetError("a data set cannot be read: its offset table is too long")
            raw = b"".join(self._reader.pieces(table.length))
            offsets = [int(n or 0) for n in numbers(raw, "UL", ENCODINGS["1.2.840.10008.1.2.1"])]
        single = self.layout.frames <= 1 or self._syntax.startswith(_VIDEO)
        number = position = 0
        for item in items:
            head = b"".join(self._reader.pieces(min(4, item.length)))
            if single:
                number = 1
            elif len(offsets) > 1:
                while number < len(offsets) and position >= offsets[number]:
                    number += 1
            elif self._syntax == RLE or not number or head.startswith(_BEGINNINGS):
                number += 1
            position += 8 + item.length
            yield number, itertools.chain([head], self._reader.pieces(item.length - len(head)))

    def _hear(self, element: Element) -> None:
        if element.tag == _EXTENDED_OFFSETS:
            raw = self._reader.value(element, _TABLE_LIMIT)
            self._offsets = [int(n or 0) for n in numbers(raw, "UV", self._reader.top.encoding)]
        name = _WANTED.get(element.tag)
        if name is None or element.has_items:
            return
        raw = self._reader.value(element)
        kind = type(getattr(self.layout, name))
        if kind is int and element.tag != 0x00280008:
            value = next(numbers(raw, "US", self._reader.top.encoding), None)
            setattr(self.layout, name, int(value or 0))
            return
        text = raw.decode("ascii", "replace").split("\\")[0].strip("\0 ")
        if kind is str:
            setattr(self.layout, name, text)
        elif text.isdecimal() and len(text) < 10:
            self.layout.frames = int(text)
