"""The archive's folders, and how a deposit gets into them, step by step durable.

Source: docs/format.md, section 2; docs/design.md, "Admission".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from keys import encoding
from storage import direct, events, pack
from storage.packfile import PackFile

# Shares the blocks of another file where the file system can (ioctl_ficlone(2)).
_FICLONE = 0x40049409
# Names in objects/ tell no time of day: what a study's pack was admitted at stays in the index.
CONSTANT_TIME = (946_684_800, 946_684_800)


class Archive:
    """The folders of packs: of deposits (the gate's, the desk's), ``objects/``, ``quarantine/``, ``admitting/``."""

    def __init__(self, root: Path, *inboxes: Path) -> None:
        """Name the folders.

        Args:
            root: The store's.
            inboxes: Where deposits lie; one that is not there has none.
        """
        self.inboxes = inboxes
        # Those of them that could not be read when it was last tried.
        self.unseen: set[Path] = set()
        self._objects = root / "objects"
        self._quarantine = root / "quarantine"
        # Copies under way; what lies here at a start is of no use to anybody.
        self._admitting = root / "admitting"
        # Packs that a thread of this process writes just now: they are no leftovers.
        self.building: set[str] = set()

    def prepare(self) -> None:
        """Make the folders of a new store."""
        for folder in (self._objects, self._quarantine, self._admitting):
            folder.mkdir(mode=0o700)

    def one_file_system(self) -> bool:
        """Tell whether a deposit can be renamed into the archive."""
        here = self._objects.stat().st_dev
        return all(inbox.stat().st_dev == here for inbox in self.inboxes if inbox.exists())

    # --- what is where

    def deposits(self) -> list[Path]:
        """Return the deposits that there are, those that were written to longest ago first."""
        found = []
        for entry in self._entries():
            if _is_pack_name(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path))
        return [Path(path) for _, path in sorted(found)]

    def unfinished(self) -> list[Path]:
        """Return what lies beside deposits under another name than a pack's: packs in the making, or never."""
        return [
            Path(e.path) for e in self._entries() if not _is_pack_name(e.name) and not e.name.endswith(events.SUFFIX)
        ]

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        first, *others = self.inboxes
        with os.scandir(first) as entries:
            yield from entries
        for inbox in others:
            self.unseen.discard(inbox)
            try:
                with os.scandir(inbox) as entries:
                    yield from entries
            except FileNotFoundError:
                # Whoever stores nothing by another way has no folder for it.
                continue
            except OSError:
                # It is another user's, who may close it: what the gate deposits does not wait for that.
                self.unseen.add(inbox)

    def waiting(self, name: str) -> list[Path]:
        """Return the deposits, or what became of them, of a name: one, unless two who deposit took the same."""
        found = []
        for path in (inbox / name for inbox in self.inboxes):
            # A folder that its user closed has none that could be taken now.
            with contextlib.suppress(OSError):
                path.stat()
                found.append(path)
        return found

    def is_deposit(self, path: Path) -> bool:
        """Tell whether a path is one of a deposit."""
        return path.parent in self.inboxes

    def is_locked(self, path: Path) -> bool:
        """Tell whether somebody holds a file's lock: a gate still makes it, or keeps it for later."""
        try:
            with direct.opened(path) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            # No file that could be locked.
            return False
        return False

    def path(self, pack_id: str) -> Path:
        """Return where an admitted pack is."""
        return self._objects / pack_id[:2] / pack_id

    def quarantine_path(self, pack_id: str) -> Path:
        """Return where a quarantined pack is."""
        return self._quarantine / pack_id

    def find(self, pack_id: str) -> Path | None:
        """Return where a pack is now, or None."""
        places = (self.path(pack_id), self.quarantine_path(pack_id))
        return next((p for p in places if p.exists()), None) or next(iter(self.waiting(pack_id)), None)

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
        descriptor, _ = direct.create(path, 0o600)
        try:
            if not _clone(file.descriptor, descriptor):
                size = file.size
                direct.allocate(descriptor, 0, size)
                _copy(file.pages, 0, descriptor, 0, size)
                os.ftruncate(descriptor, size)
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
        with self.making(target) as descriptor:
            direct.write_all(descriptor, direct.page_of(source.header.bound()), 0)
            offset = pack.PAGE
            moved = []
            for frame in frames:
                _copy(source.pages, frame.offset, descriptor, offset, frame.end - frame.offset)
                moved.append(msgspec.structs.replace(frame, offset=offset))
                offset = pack.page_after(moved[-1].end)
            os.ftruncate(descriptor, moved[-1].end)
        return moved

    @contextlib.contextmanager
    def making(self, target: Path) -> Iterator[int]:
        """Give the descriptor of a new file ``<target>.new`` to write; it is durable after that, or gone.

        Raises:
            OSError: The disk refused it.
        """
        making = _making(target)
        _folder(target.parent)
        making.unlink(missing_ok=True)
        descriptor, _ = direct.create(making, 0o600)
        try:
            yield descriptor
            _seal_file(descriptor)
        except BaseException:
            making.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        encoding.sync_folder(target.parent)

    def made(self, target: Path) -> Path:
        """Return what a pack is called until ``finish`` gives it its name."""
        return _making(target)

    def make_ready(self, file: PackFile) -> None:
        """Give a snapshot that is admitted whole its place as ``<pack>.new``, durably, without its wrapped key."""
        target = self.path(file.path.name)
        _folder(target.parent)
        _forget_wrapped(file)
        _seal_file(file.descriptor)
        os.rename(file.path, _making(target))
        encoding.sync_folder(target.parent)

    def sync_names(self) -> None:
        """Make every name in the archive durable; ``finish`` does it for one pack."""
        for folder in (*self._objects.iterdir(), self._objects, self._quarantine):
            encoding.sync_folder(folder)

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
        _forget_wrapped(file)
        _seal_file(file.descriptor)
        os.rename(file.path, target)
        encoding.sync_folder(target.parent)
        encoding.sync_folder(file.path.parent)

    def remove_deposit(self, path: Path) -> None:
        """Remove a deposit that is accounted for."""
        os.unlink(path)
        encoding.sync_folder(path.parent)

    def keep_raw(self, deposit: Path, pack_id: str) -> None:
        """Keep what cannot be admitted in quarantine byte for byte; of a sparse file no more than it has."""
        target = self.quarantine_path(pack_id)
        reading = direct.open_file(deposit, os.O_RDONLY)
        try:
            writing, _ = direct.create(target, 0o400)
            try:
                found = os.fstat(reading)
                length = min(found.st_size, found.st_blocks * 512)
                _copy(direct.Pages(reading), 0, writing, 0, length)
                os.ftruncate(writing, length)
                _seal_file(writing)
            except BaseException:
                target.unlink()
                raise
            finally:
                os.close(writing)
        finally:
            os.close(reading)
        encoding.sync_folder(self._quarantine)

    def remove(self, path: Path) -> None:
        """Remove a pack of the archive's."""
        path.unlink(missing_ok=True)
        encoding.sync_folder(path.parent)

    def clear(self, known: Callable[[str], bool]) -> None:
        """At a start: remove copies under way that no key record stands for."""
        for path in self._admitting.iterdir():
            if not path.is_dir():
                path.unlink()
        for folder in (self._objects, self._quarantine):
            for path in list(folder.rglob("*.new")):
                name = path.name.removesuffix(".new")
                if name not in self.building and not known(name):
                    path.unlink(missing_ok=True)


def _making(target: Path) -> Path:
    return target.with_name(target.name + ".new")


def _folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700)
        encoding.sync_folder(folder.parent)


def _seal_file(descriptor: int) -> None:
    os.fchmod(descriptor, 0o400)
    os.utime(descriptor, CONSTANT_TIME)
    os.fsync(descriptor)


def _forget_wrapped(file: PackFile) -> None:
    """Overwrite the study key that a deposit carries."""
    direct.write_all(file.descriptor, direct.page_of(file.header.bound()), 0)


def _copy(source: direct.Pages, start: int, target: int, at: int, length: int) -> None:
    """Copy a range between files by whole pages; what follows it in the last one is zero.

    Args:
        source: Where from.
        start: A multiple of 4,096.
        target: A file made by ``direct.create``.
        at: A multiple of 4,096.
        length: In bytes.
    """
    done = 0
    while done < length:
        part = source.view(start + done, length - done)
        if not part:
            raise OSError(errno.EIO, "a pack became shorter while it was copied")
        direct.write_all(target, source.padded(start + done, part), at + done)
        done += len(part)


def _clone(source: int, target: int) -> bool:
    """Let a file share another one's blocks; tell whether the file system could."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _is_pack_name(name: str) -> bool:
    return len(name) == 32 and all(c in "0123456789abcdef" for c in name)
