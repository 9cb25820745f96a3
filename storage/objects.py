"""The vault's side of storage: opening packs, and moving deposits into ``objects/``.

Source: docs/format.md, section 2; docs/design.md, "From socket to archive".
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from keys import encoding
from keys.seal import SealError, context, open_parts, open_sealed
from storage import attributes, pack

_READ_BYTES = 1 << 20
# Names in objects/ tell no time of day: what a study's pack was admitted at stays in the index.
_CONSTANT_TIME = (946_684_800, 946_684_800)


class Record(msgspec.Struct, frozen=True):
    """A record that opened."""

    frame: pack.Frame
    attributes: attributes.Attributes


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
        # O_NONBLOCK: whoever writes the folder could leave a FIFO, and an open of that would wait for ever.
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self.path = path
        self.descriptor = os.open(path, flags | (os.O_RDWR if write else os.O_RDONLY))
        try:
            if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
                raise pack.PackError("not a regular file")
            self.header = pack.parse_header(self.read(0, pack.PAGE))
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
        return os.pread(self.descriptor, length, offset)

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
        return open_parts(self._sealed(frame), self.key, self._context("dataset", frame))

    def records(self, start: int = pack.PAGE, *, whole: bool = True) -> Iterator[Record | Unreadable]:
        """Yield the records from an offset on, and what stands between them that does not open.

        Args:
            start: A multiple of 4,096.
            whole: Open data sets too, not only attributes.
        """
        size = self.file.size
        offset: int | None = start
        while offset is not None:
            try:
                frame = pack.frame_at(self.file.read, offset, size)
                if frame is None:
                    return
                found = Record(frame, self.attributes(frame))
                if whole:
                    for _ in self.dataset(frame):
                        pass
            except (pack.PackError, SealError, attributes.AttributesError) as error:
                yield Unreadable(offset, str(error))
                offset = pack.resync(self.file.read, offset, size)
                continue
            yield found
            offset = pack.page_after(frame.end)

    def _context(self, label: str, frame: pack.Frame) -> bytes:
        return context(label, self._bound, frame.object_id)

    def _sealed(self, frame: pack.Frame) -> Iterator[bytes]:
        for start in range(0, frame.dataset_length, _READ_BYTES):
            yield self.file.read(frame.dataset_start + start, min(_READ_BYTES, frame.dataset_length - start))


class Archive:
    """The folders of a store that hold packs."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self.incoming = incoming
        self._objects = root / "objects"
        self._quarantine = root / "quarantine"

    def prepare(self) -> None:
        """Make the folders of a new store."""
        for folder in (self._objects, self._quarantine):
            folder.mkdir(mode=0o700)

    def deposits(self) -> list[Path]:
        """Return the deposits that lie in ``incoming/``, in no order."""
        with os.scandir(self.incoming) as entries:
            return [Path(e.path) for e in entries if _is_pack_name(e.name)]

    def unfinished(self) -> list[Path]:
        """Return the packs in ``incoming/`` that were never finished making."""
        return list(self.incoming.glob("*.new"))

    def path(self, pack_id: str) -> Path:
        """Return where an admitted pack is."""
        return self._objects / pack_id[:2] / pack_id

    def find(self, pack_id: str) -> Path | None:
        """Return where a pack is now, admitted or not, or None."""
        return next((p for p in (self.path(pack_id), self.incoming / pack_id) if p.exists()), None)

    def admit(self, file: PackFile) -> None:
        """Move a locked deposit, whose study key is in ``keys.db``, into the archive. Can be repeated after a crash.

        Raises:
            FileExistsError: The archive holds a pack of this name; nothing was changed.
        """
        target = self.path(file.path.name)
        if target.exists():
            raise FileExistsError(target.name)
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700)
            encoding.sync_folder(self._objects)
        os.pwrite(file.descriptor, bytes(pack.WRAPPED_END - pack.WRAPPED_START), pack.WRAPPED_START)
        os.fchmod(file.descriptor, 0o400)
        os.utime(file.descriptor, _CONSTANT_TIME)
        os.fsync(file.descriptor)
        os.rename(file.path, target)
        encoding.sync_folder(target.parent)
        encoding.sync_folder(self.incoming)

    def set_aside(self, path: Path, name: str) -> None:
        """Move a deposit that cannot be admitted into quarantine under a random name."""
        os.rename(path, self._quarantine / name)
        encoding.sync_folder(self._quarantine)
        encoding.sync_folder(self.incoming)

    def quarantined(self) -> int:
        """Return how many files are in quarantine."""
        return len(os.listdir(self._quarantine))


def frames_digest(frames: list[pack.Frame]) -> bytes:
    """Return SHA-256 over the frames of records that opened, in file order."""
    digest = Hash(SHA256())
    for frame in frames:
        digest.update(frame.encode())
    return digest.finalize()


def _is_pack_name(name: str) -> bool:
    return len(name) == 32 and all(c in "0123456789abcdef" for c in name)
