"""The pack format: bytes in, bytes out. No keys, no files.

Source: docs/format.md, section 2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

MAGIC = b"\x89SRM\r\n\x1a\n"
PAGE = 4096
BOUND_BYTES = 64
WRAPPED_BYTES = 1168
WRAPPED_START = 64
WRAPPED_END = 68 + WRAPPED_BYTES
FRAME_BYTES = 40
ATTRIBUTES_LIMIT = 65_536
# The header's flag: the gate's events and no study.
EVENTS = 1
_SEALED_MINIMUM = 72
_SEALED_ATTRIBUTES_LIMIT = ATTRIBUTES_LIMIT + 136

_HEAD = struct.Struct(">8sBBHI16s16s16s")
_FRAME = struct.Struct(">4sIQ16s8s")
_FRAME_MAGIC = b"SRR1"

Read = Callable[[int, int], bytes]


class PackError(Exception):
    """Bytes that are no pack, or a part of one that breaks its rules."""


class Header(msgspec.Struct, frozen=True):
    """A pack's header. ``version`` 0 and an empty ``wrapped`` once admitted; ``flags`` 0 or ``EVENTS``."""

    store_id: bytes
    key_id: bytes
    version: int
    wrapped: bytes
    flags: int = 0

    def bound(self) -> bytes:
        """Return bytes 0-63, which every seal in the pack is bound to."""
        return _HEAD.pack(MAGIC, 1, 1, BOUND_BYTES, self.flags, self.store_id, self.key_id, bytes(16))

    def encode(self) -> bytes:
        """Return the 4,096 bytes of the header."""
        wrapped = self.wrapped or bytes(WRAPPED_BYTES)
        return (self.bound() + self.version.to_bytes(4, "big") + wrapped).ljust(PAGE, b"\0")


class Frame(msgspec.Struct, frozen=True):
    """Where a record lies; its lengths only locate, they prove nothing."""

    offset: int
    object_id: bytes
    dataset_length: int
    attributes_length: int

    @property
    def dataset_start(self) -> int:
        """Offset of the sealed data set."""
        return self.offset + FRAME_BYTES

    @property
    def attributes_start(self) -> int:
        """Offset of the sealed attributes."""
        return self.dataset_start + self.dataset_length

    @property
    def end(self) -> int:
        """Offset of the first byte after the record."""
        return self.attributes_start + self.attributes_length

    def encode(self) -> bytes:
        """Return the 40 bytes of the frame."""
        return _FRAME.pack(_FRAME_MAGIC, self.attributes_length, self.dataset_length, self.object_id, bytes(8))

    def lengths(self) -> tuple[int, bytes]:
        """Return the offset of both lengths and their 12 bytes, which are written last."""
        return self.offset + 4, self.encode()[4:16]


def parse_header(page: bytes) -> Header:
    """Return a pack's header.

    Raises:
        PackError: These 4,096 bytes are none, or a byte that must be zero is not.
    """
    if len(page) != PAGE:
        raise PackError("a pack ends within its header")
    magic, version, suite, length, flags, store_id, key_id, zeros = _HEAD.unpack_from(page)
    if (magic, version, suite, length) != (MAGIC, 1, 1, BOUND_BYTES):
        raise PackError("not a pack of a known version")
    if flags not in {0, EVENTS} or any(zeros) or any(page[WRAPPED_END:]):
        raise PackError("a reserved byte of a pack's header is set")
    deposit_version = int.from_bytes(page[64:68], "big")
    wrapped = page[68:WRAPPED_END]
    if deposit_version == 0:
        if any(wrapped):
            raise PackError("an admitted pack carries a deposit's key")
        wrapped = b""
    return Header(store_id, key_id, deposit_version, wrapped, flags)


def page_after(offset: int) -> int:
    """Return the first multiple of 4,096 at or after an offset: where the next record starts."""
    return -(-offset // PAGE) * PAGE


def frame_at(read: Read, offset: int, size: int) -> Frame | None:
    """Return the frame at an offset, or None where the pack ends or a record is still open.

    Args:
        read: Returns ``length`` bytes at an offset, fewer only at the end of the file.
        offset: A multiple of 4,096.
        size: The file's length.

    Raises:
        PackError: What stands there is no frame, or its record would go beyond the file.
    """
    if offset + FRAME_BYTES > size:
        if any(read(offset, size - offset)) if offset < size else False:
            raise PackError("a frame is cut short")
        return None
    raw = read(offset, FRAME_BYTES)
    if len(raw) != FRAME_BYTES:
        raise PackError("a pack became shorter while it was read")
    magic, attributes_length, dataset_length, object_id, zeros = _FRAME.unpack(raw)
    if not any(raw):
        return None
    if magic != _FRAME_MAGIC or any(zeros):
        raise PackError("no frame where one should be")
    if attributes_length == dataset_length == 0:
        return None
    frame = Frame(offset, object_id, dataset_length, attributes_length)
    if not _SEALED_MINIMUM <= attributes_length <= _SEALED_ATTRIBUTES_LIMIT or dataset_length < _SEALED_MINIMUM:
        raise PackError("a frame has impossible lengths")
    if frame.end > size:
        raise PackError("a record goes beyond its pack")
    return frame


def resync(read: Read, offset: int, size: int) -> int | None:
    """Return the next page after ``offset`` that begins like a frame, or None."""
    for page in range(page_after(offset + 1), size, PAGE):
        if read(page, 4) == _FRAME_MAGIC:
            return page
    return None
