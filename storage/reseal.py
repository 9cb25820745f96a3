"""A pack written anew under another study key: every record opened and sealed again, nothing else changed.

Records keep their order, object ids and lengths, so that each lies where it lay. Memory does not grow with their size.
Source: docs/format.md, section 2.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

from cryptography.hazmat.primitives.hashes import SHA256, Hash

from keys.seal import CHUNK_BYTES, Sealer, context, open_sealed, seal
from storage import direct, pack
from storage.packfile import OpenedPack

# What goes into the sealer at once, and what it may add to that: a chunk that was begun, tags, the prefix.
_PIECE_BYTES = 1 << 18
_SLACK = 2 * CHUNK_BYTES

# How many bytes were done since the last time; in the end SHA-256 of each record's contents, in file order.
Digests = Generator[int, None, list[bytes]]


def frames(opened: OpenedPack) -> list[pack.Frame]:
    """Return the frames of a pack that nobody writes, up to where it ends; nothing is opened.

    Raises:
        PackError: Something stands there that is no record.
    """
    file, size = opened.file, opened.file.size
    found = []
    offset = pack.PAGE
    while (frame := pack.frame_at(file.read, offset, size)) is not None:
        found.append(frame)
        offset = pack.page_after(frame.end)
    return found


def reseal(
    source: OpenedPack, records: list[pack.Frame], header: pack.Header, key: bytearray, descriptor: int
) -> Digests:
    """Write a pack with these records of another one, under another header and study key.

    Args:
        source: Where they are.
        records: Their frames, from the first page on without gaps.
        header: The new pack's.
        key: The new study key.
        descriptor: An empty file made by ``direct.create``.

    Yields:
        How many bytes of records were written since.

    Returns:
        SHA-256 of each record's contents, as they were opened.

    Raises:
        SealError: A record does not open.
        OSError: The disk refused it.
    """
    writer = _Writer(descriptor)
    writer.put(header.encode())
    digests = []
    for frame in records:
        bound_to = (header.bound(), frame.object_id)
        contents = _Contents()
        writer.put(frame.encode())
        sealer = Sealer(key, context("dataset", *bound_to))
        length = 0
        for part in source.dataset(frame):
            contents.update(part)
            view = memoryview(part)
            for start in range(0, len(view), _PIECE_BYTES):
                count = writer.sealed(sealer, view[start : start + _PIECE_BYTES])
                length += count
                yield count
        last = sealer.finalize()
        writer.put(last)
        attributes = _attributes(source, frame)
        digests.append(contents.end(attributes))
        sealed = seal(attributes, key, context("attributes", *bound_to))
        writer.put(sealed)
        if (length + len(last), len(sealed)) != (frame.dataset_length, frame.attributes_length):
            raise pack.PackError("a record has another length under another key")
        writer.end_record()
        yield len(last) + len(sealed)
    os.ftruncate(descriptor, records[-1].end)
    return digests


def opened_whole(opened: OpenedPack, records: list[pack.Frame]) -> Digests:
    """Open every record of a pack; yields and returns what ``reseal`` does.

    Raises:
        SealError: One does not open.
    """
    digests = []
    for frame in records:
        contents = _Contents()
        for part in opened.dataset(frame):
            contents.update(part)
            yield len(part)
        digests.append(contents.end(_attributes(opened, frame)))
    return digests


def _attributes(opened: OpenedPack, frame: pack.Frame) -> bytes:
    sealed = opened.file.read(frame.attributes_start, frame.attributes_length)
    return open_sealed(sealed, opened.key, context("attributes", opened.file.header.bound(), frame.object_id))


class _Contents:
    """SHA-256 over a record's data set and attributes; the data set's own digest stands between them."""

    def __init__(self) -> None:
        self._dataset = Hash(SHA256())

    def update(self, part: bytes) -> None:
        self._dataset.update(part)

    def end(self, attributes: bytes) -> bytes:
        whole = Hash(SHA256())
        whole.update(self._dataset.finalize() + attributes)
        return whole.finalize()


class _Writer:
    """Writes a file from front to back in whole pages, through memory that direct writes can use."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = direct.zeros()
        self._filled = 0
        self._at = 0

    def put(self, data: bytes) -> None:
        for part in _pieces(data, _PIECE_BYTES):
            self._make_room(len(part))
            self._memory[self._filled : self._filled + len(part)] = part
            self._filled += len(part)

    def sealed(self, sealer: Sealer, data: memoryview) -> int:
        self._make_room(len(data) + _SLACK)
        count = sealer.update_into(data, self._memory[self._filled :])
        self._filled += count
        return count

    def end_record(self) -> None:
        """Fill the page with zeros and write what is left."""
        until = pack.page_after(self._filled)
        self._memory[self._filled : until] = bytes(until - self._filled)
        self._filled = until
        self._flush()

    def _make_room(self, count: int) -> None:
        if self._filled + count > len(self._memory):
            self._flush()

    def _flush(self) -> None:
        """Write the whole pages; what is left begins the next one."""
        whole = self._filled // pack.PAGE * pack.PAGE
        direct.write_all(self._descriptor, self._memory[:whole], self._at)
        self._at += whole
        left = bytes(self._memory[whole : self._filled])
        self._memory[: len(left)] = left
        self._filled = len(left)


def _pieces(data: bytes, length: int) -> Iterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(view), length):
        yield view[start : start + length]
