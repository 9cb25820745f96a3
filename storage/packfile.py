"""Opening packs, which the vault does: a file, then with its study key the records in it.

Source: docs/format.md, section 2.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from keys.seal import SealError, context, open_parts, open_sealed
from storage import attributes, direct, pack


class Record(msgspec.Struct, frozen=True):
    """A record that opened; ``padded``: only zeros follow it up to the next page."""

    frame: pack.Frame
    attributes: attributes.Attributes
    padded: bool = True


class Unreadable(msgspec.Struct, frozen=True):
    """A place in a pack where something stands that does not open."""

    offset: int
    reason: str


class PackFile:
    """An open pack file, not yet with a key."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        """Open a pack.

        Raises:
            OSError: It is not there.
            PackError: It is no regular file, or its header is malformed.
        """
        self.path = path
        self.descriptor = direct.open_file(path, os.O_RDWR if write else os.O_RDONLY)
        self.pages = direct.Pages(self.descriptor)
        try:
            if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
                raise pack.PackError("not a regular file")
            self.header = pack.parse_header(self.read(0, pack.PAGE))
            if self.header.flags:
                raise pack.PackError("a pack of events where a study's should be")
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> PackFile:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file, and so let go of its lock."""
        os.close(self.descriptor)

    @property
    def size(self) -> int:
        """The file's length now."""
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, fewer only at its end."""
        return self.pages.read(offset, length)

    def parts(self, offset: int, length: int) -> Iterator[memoryview]:
        """Yield a range of the file in parts, each valid until the next thing is read; less only at the file's end."""
        while length and (part := self.pages.view(offset, length)):
            yield part
            offset += len(part)
            length -= len(part)

    def try_lock(self) -> bool:
        """Take the pack's lock if no writer holds it."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class OpenedPack:
    """A pack file with its study key: records open here."""

    def __init__(self, file: PackFile, key: bytearray) -> None:
        self.file = file
        self.key = key
        self._bound = file.header.bound()

    def attributes(self, frame: pack.Frame) -> attributes.Attributes:
        """Return a record's attributes.

        Raises:
            SealError: They do not open.
            AttributesError: They opened and break a rule.
        """
        sealed = self.file.read(frame.attributes_start, frame.attributes_length)
        return attributes.decode(open_sealed(sealed, self.key, self._context("attributes", frame)))

    def dataset(self, frame: pack.Frame) -> Iterator[bytes]:
        """Yield a record's data set; see ``open_parts`` for what that proves when.

        Raises:
            SealError: It does not open.
        """
        return open_parts(
            self.file.parts(frame.dataset_start, frame.dataset_length), self.key, self._context("dataset", frame)
        )

    def records(
        self, start: int = pack.PAGE, *, whole: bool = True, closed: bool = True
    ) -> Iterator[Record | Unreadable]:
        """Yield the records from an offset on, and what stands between them that does not open.

        Args:
            start: A multiple of 4,096.
            whole: Open data sets too, not only attributes.
            closed: Nobody writes the pack any more: look behind an empty frame, where a damaged disk may have left good
                records. Else the pack ends, for now, at the first empty frame.
        """
        size = self.file.size
        following: int | None = start
        empty: int | None = None
        while following is not None:
            offset = following
            try:
                frame = pack.frame_at(self.file.read, offset, size)
                if frame is None:
                    if not closed:
                        return
                    empty = offset if empty is None else empty
                    following = pack.resync(self.file.read, offset, size)
                    continue
                if whole:
                    # Before the attributes, which lie behind it: a pack is read once, from front to back.
                    for _ in self.dataset(frame):
                        pass
                found = Record(frame, self.attributes(frame))
            except (pack.PackError, SealError, attributes.AttributesError) as error:
                if empty is None:
                    yield Unreadable(offset, str(error))
                # Behind an empty frame lies what a writer left that died; what does not open there was never whole.
                following = pack.resync(self.file.read, offset, size)
                continue
            if empty is not None:
                yield Unreadable(empty, "an empty frame before other records")
                empty = None
            following = pack.page_after(frame.end)
            # Here, where it is in memory: reading a pack again for its gaps would cost as much as reading it once.
            left = min(following, size) - frame.end
            gap = self.file.read(frame.end, left) if left > 0 else b""
            yield found if gap == bytes(len(gap)) else msgspec.structs.replace(found, padded=False)

    def _context(self, label: str, frame: pack.Frame) -> bytes:
        return context(label, self._bound, frame.object_id)


def frames_digest(frames: list[pack.Frame]) -> bytes:
    """Return SHA-256 over the frames of records that opened, in file order."""
    digest = Hash(SHA256())
    for frame in frames:
        digest.update(frame.encode())
    return digest.finalize()
