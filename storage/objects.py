"""The vault's side of storage: opening packs, and moving deposits into ``objects/``.

Source: docs/format.md, section 2; docs/design.md, "From socket to archive".
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
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
                found = Record(frame, self.attributes(frame))
                if whole:
                    for _ in self.dataset(frame):
                        pass
            except (pack.PackError, SealError, attributes.AttributesError) as error:
                if empty is None:
                    yield Unreadable(offset, str(error))
                # Behind an empty frame lies what a writer left that died; what does not open there was never whole.
                following = pack.resync(self.file.read, offset, size)
                continue
            if empty is not None:
                yield Unreadable(empty, "an empty frame before other records")
                empty = None
            yield found
            following = pack.page_after(frame.end)

    def _context(self, label: str, frame: pack.Frame) -> bytes:
        return context(label, self._bound, frame.object_id)

    def _sealed(self, frame: pack.Frame) -> Iterator[bytes]:
        for start in range(0, frame.dataset_length, _READ_BYTES):
            yield self.file.read(frame.dataset_start + start, min(_READ_BYTES, frame.dataset_length - start))


class Archive:
    """The folders of packs: ``incoming/`` (the gate's), ``objects/``, ``quarantine/``, ``admitting/``."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self.incoming = incoming
        self._objects = root / "objects"
        self._quarantine = root / "quarantine"
        # Copies under way; what lies here at a start is of no use to anybody.
        self._admitting = root / "admitting"

    def prepare(self) -> None:
        """Make the folders of a new store."""
        for folder in (self._objects, self._quarantine, self._admitting):
            folder.mkdir(mode=0o700)

    def one_file_system(self) -> bool:
        """Tell whether a deposit can be renamed into the archive."""
        return self.incoming.stat().st_dev == self._objects.stat().st_dev

    # --- what is where

    def deposits(self) -> list[Path]:
        """Return the deposits that lie in ``incoming/``, in no order."""
        with os.scandir(self.incoming) as entries:
            return [Path(e.path) for e in entries if _is_pack_name(e.name)]

    def unfinished(self) -> list[Path]:
        """Return what lies in ``incoming/`` under another name than a pack's: packs in the making, or never."""
        with os.scandir(self.incoming) as entries:
            return [Path(e.path) for e in entries if not _is_pack_name(e.name)]

    def path(self, pack_id: str) -> Path:
        """Return where an admitted pack is."""
        return self._objects / pack_id[:2] / pack_id

    def quarantine_path(self, pack_id: str) -> Path:
        """Return where a quarantined pack is."""
        return self._quarantine / pack_id

    def find(self, pack_id: str) -> Path | None:
        """Return where a pack is now, or None."""
        places = (self.path(pack_id), self.quarantine_path(pack_id), self.incoming / pack_id)
        return next((p for p in places if p.exists()), None)

    def quarantine_files(self) -> list[Path]:
        """Return the files in quarantine."""
        return sorted(p for p in self._quarantine.iterdir() if _is_pack_name(p.name))

    def packs(self) -> Iterator[Path]:
        """Yield every file in ``objects/``."""
        yield from (p for p in sorted(self._objects.rglob("*")) if p.is_file() and not p.name.endswith(".new"))

    # --- what a vault does with a deposit

    def snapshot(self, file: PackFile) -> PackFile:
        """Copy a deposit that somebody else could still write into a file that nobody else can, not yet synced.

        Raises:
            OSError: The disk refused it.
        """
        path = self._admitting / file.path.name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _copy(file.descriptor, 0, descriptor, 0, file.size)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return PackFile(path, write=True)

    def build(self, source: PackFile, frames: list[pack.Frame], target: Path) -> list[pack.Frame]:
        """Write some records of a pack into ``<target>.new``, durably, under the same header without its wrapped key.

        Returns:
            The frames at their new places. ``finish`` gives the file its name.
        """
        making = _making(target)
        _folder(target.parent)
        making.unlink(missing_ok=True)
        descriptor = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(descriptor, source.header.bound().ljust(pack.PAGE, b"\0"), 0)
            offset = pack.PAGE
            moved = []
            for frame in frames:
                _copy(source.descriptor, frame.offset, descriptor, offset, frame.end - frame.offset)
                moved.append(msgspec.structs.replace(frame, offset=offset))
                offset = pack.page_after(moved[-1].end)
            _seal_file(descriptor)
        except BaseException:
            making.unlink()
            raise
        finally:
            os.close(descriptor)
        encoding.sync_folder(target.parent)
        return moved

    def make_ready(self, file: PackFile) -> None:
        """Give a snapshot that is admitted whole its place as ``<pack>.new``, durably, without its wrapped key."""
        target = self.path(file.path.name)
        _folder(target.parent)
        os.pwrite(file.descriptor, bytes(pack.WRAPPED_END - pack.WRAPPED_START), pack.WRAPPED_START)
        _seal_file(file.descriptor)
        os.rename(file.path, _making(target))
        encoding.sync_folder(target.parent)

    def finish(self, target: Path) -> bool:
        """Give ``<target>.new`` its name; tell whether the target is there. Can be repeated after a crash."""
        if not target.exists():
            try:
                os.rename(_making(target), target)
            except FileNotFoundError:
                return False
        encoding.sync_folder(target.parent)
        return True

    def adopt(self, file: PackFile) -> None:
        """Move a locked deposit of our own, whose study key is recorded, into the archive. Can be repeated.

        Raises:
            FileExistsError: The archive holds a pack of this name; nothing was changed.
        """
        target = self.path(file.path.name)
        if target.exists():
            raise FileExistsError(target.name)
        _folder(target.parent)
        os.pwrite(file.descriptor, bytes(pack.WRAPPED_END - pack.WRAPPED_START), pack.WRAPPED_START)
        _seal_file(file.descriptor)
        os.rename(file.path, target)
        encoding.sync_folder(target.parent)
        encoding.sync_folder(self.incoming)

    def remove_deposit(self, path: Path) -> None:
        """Remove a deposit that is accounted for."""
        os.unlink(path)
        encoding.sync_folder(self.incoming)

    def keep_raw(self, deposit: Path, pack_id: str) -> None:
        """Keep what cannot be admitted in quarantine byte for byte; of a sparse file no more than it has."""
        target = self.quarantine_path(pack_id)
        reading = os.open(deposit, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            found = os.fstat(reading)
            _copy(reading, 0, writing, 0, min(found.st_size, found.st_blocks * 512))
            _seal_file(writing)
        except BaseException:
            target.unlink()
            raise
        finally:
            os.close(reading)
            os.close(writing)
        encoding.sync_folder(self._quarantine)

    def remove(self, path: Path) -> None:
        """Remove a pack of the archive's."""
        path.unlink(missing_ok=True)
        encoding.sync_folder(path.parent)

    def clear(self, known: Callable[[str], bool]) -> None:
        """At a start: remove copies under way that no key record stands for."""
        for path in self._admitting.iterdir():
            path.unlink()
        for folder in (self._objects, self._quarantine):
            for path in list(folder.rglob("*.new")):
                if not known(path.name.removesuffix(".new")):
                    path.unlink()


def _making(target: Path) -> Path:
    return target.with_name(target.name + ".new")


def _folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700)
        encoding.sync_folder(folder.parent)


def _seal_file(descriptor: int) -> None:
    os.fchmod(descriptor, 0o400)
    os.utime(descriptor, _CONSTANT_TIME)
    os.fsync(descriptor)


def _copy(source: int, start: int, target: int, at: int, length: int) -> None:
    """Copy a range between files, in the kernel and by reference where it can."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, target, length - done, start + done, at + done)
        except OSError as error:
            if error.errno not in {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
            data = os.pread(source, min(_READ_BYTES, length - done), start + done)
            count = os.pwrite(target, data, at + done) if data else 0
        if not count:
            raise OSError(errno.EIO, "a pack became shorter while it was copied")
        done += count


def frames_digest(frames: list[pack.Frame]) -> bytes:
    """Return SHA-256 over the frames of records that opened, in file order."""
    digest = Hash(SHA256())
    for frame in frames:
        digest.update(frame.encode())
    return digest.finalize()


def _is_pack_name(name: str) -> bool:
    return len(name) == 32 and all(c in "0123456789abcdef" for c in name)
