"""A pack that is being written: its header once, records one after the other, one sync a record.

Source: docs/format.md, section 2; docs/design.md, "From socket to archive".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Protocol

from keys import encoding
from keys.seal import CHUNK_BYTES, TAG_BYTES, Sealer, context, seal
from keys.versions import DepositKey, new_key
from storage import direct, pack
from storage.direct import HALF_BYTES, Buffer, write_all

# Room that sealing needs beyond a part of this much less than the room: a chunk that was begun, and the prefix.
_SLACK = CHUNK_BYTES + TAG_BYTES + 4096


class Keys(Protocol):
    """Where the deposit key comes from."""

    def held(self) -> contextlib.AbstractContextManager[DepositKey]:
        """Hold the newest deposit key while a pack is made under it."""


class Spare:
    """A file that is no pack yet, locked. Its name ends in ``.new`` until it has a durable header."""

    def __init__(self, folder: Path) -> None:
        self.key_id = secrets.token_bytes(16)
        self.path = folder / self.key_id.hex()
        self.making = self.path.with_suffix(".new")
        self.descriptor, self.direct = direct.create(self.making, 0o640)
        self.allocated = 0
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def fill(self, size: int, interrupted: Callable[[], bool]) -> None:
        """Write zeros, so that a record written later changes nothing but data: its sync has no journal to wait for.

        Args:
            size: Up to where.
            interrupted: Tells that there is something better to do; what was written until then counts.

        Raises:
            OSError: The disk refused it.
        """
        zeros = direct.zeros()
        while self.allocated < size and not interrupted():
            write_all(self.descriptor, zeros, self.allocated)
            self.allocated += len(zeros)
        os.fdatasync(self.descriptor)

    def discard(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            os.unlink(self.making)
        os.close(self.descriptor)


class OpenPack:
    """A pack of one study that this process appends to; locked until it is closed."""

    def __init__(self, spare: Spare, store_id: bytes, study: str, peer: str, keys: Keys) -> None:
        self.name = spare.path.name
        self.study = study
        self.peer = peer
        self.used_at = time.monotonic()
        self.broken = False
        self.key = new_key()
        self.descriptor, self.direct = spare.descriptor, spare.direct
        try:
            with keys.held() as deposit_key:
                self.version = deposit_key.version
                wrapped = deposit_key.wrap(self.key, spare.key_id)
                header = pack.Header(store_id, spare.key_id, deposit_key.version, wrapped)
                write_all(self.descriptor, direct.page_of(header.encode()), 0)
                os.fdatasync(self.descriptor)
                # The name appears without its suffix only when the header is durable and the lock is held: whoever
                # finds a pack unlocked may take it as finished.
                os.rename(spare.making, spare.path)
                encoding.sync_folder(spare.path.parent)
        except BaseException:
            spare.discard()
            raise
        self.bound = header.bound()
        self.end = pack.PAGE
        self.records = 0
        self._allocated = max(spare.allocated, pack.PAGE)

    def write(self, data: memoryview, offset: int) -> None:
        """Write whole pages, with space allocated ahead.

        Raises:
            OSError: The disk refused it.
        """
        until = offset + len(data)
        if until > self._allocated:
            self._allocated = direct.allocate(self.descriptor, self._allocated, until)
        write_all(self.descriptor, data, offset)

    def cut(self) -> None:
        """Cut away what stands behind the last record; a pack that cannot even be cut is not used again."""
        try:
            os.ftruncate(self.descriptor, self.end)
            self._allocated = self.end
        except OSError:
            self.broken = True

    def close(self) -> None:
        """Close the pack: it is the vault's from now on."""
        self.key[:] = bytes(len(self.key))
        if self._allocated > self.end:
            self.cut()
        os.close(self.descriptor)


class Record:
    """One object on its way into a pack. Ends with ``finish`` or ``abort``; a data set goes in as it comes.

    What fits half a buffer is written at the end, in one piece where writes pass the page cache. Of a longer one, each
    half is written by another thread while the next one fills.
    """

    def __init__(
        self, into: OpenPack, buffer: Buffer, writers: Executor, release: Callable[[OpenPack, Buffer], None]
    ) -> None:
        self._pack = into
        self._buffer = buffer
        self._writers = writers
        self._release = release
        self._offset = pack.page_after(into.end)
        self._at = self._offset
        self._half = 0
        self._memory = buffer.halves[0]
        self._writing: Future[None] | None = None
        self.object_id = secrets.token_bytes(16)
        self._fields = (into.bound, self.object_id)
        self._sealer = Sealer(into.key, context("dataset", *self._fields))
        self._sealed = 0
        # No lengths yet: a record that has none is none.
        self._memory[: pack.FRAME_BYTES] = pack.Frame(self._offset, self.object_id, 0, 0).encode()
        self._filled = pack.FRAME_BYTES

    def write(self, data: memoryview) -> None:
        """Seal the next piece of the data set and write it when there is enough.

        Raises:
            OSError: The disk refused it; ``abort`` the record.
        """
        while data:
            room = HALF_BYTES - self._filled - _SLACK
            if room < CHUNK_BYTES:
                self._flush()
                continue
            # Sealing adds a tag to each chunk: a part this much shorter than the room always fits.
            part = data[: room - room // 1000]
            count = self._sealer.update_into(part, self._memory[self._filled :])
            self._filled += count
            self._sealed += count
            data = data[len(part) :]

    def finish(self, attributes: bytes) -> None:
        """Write what is left, the attributes and the lengths; sync. On return the object is durable.

        Raises:
            OSError: It is not; ``abort`` the record.
        """
        last = self._sealer.finalize()
        sealed_attributes = seal(attributes, self._pack.key, context("attributes", *self._fields))
        self._append(last)
        self._append(sealed_attributes)
        until = pack.page_after(self._filled)
        self._memory[self._filled : until] = bytes(until - self._filled)
        frame = pack.Frame(self._offset, self.object_id, self._sealed + len(last), len(sealed_attributes))
        self._write_last(self._memory[:until], frame.encode())
        try:
            os.fdatasync(self._pack.descriptor)
        except OSError:
            # What the kernel dropped after a failed sync it will not report again: this pack takes nothing more.
            self._pack.broken = True
            raise
        self._pack.end = frame.end
        self._pack.records += 1
        self._release(self._pack, self._buffer)

    def abort(self) -> None:
        """Cut the record away and let go of its pack."""
        if self._writing is not None:
            with contextlib.suppress(OSError):
                self._written()
        if self._at > self._offset or self._pack.broken:
            self._pack.cut()
        self._release(self._pack, self._buffer)

    def _write_last(self, rest: memoryview, frame: bytes) -> None:
        """Write what was not written yet, the page with the frame last."""
        if self._at > self._offset:
            self._written()
            self._pack.write(rest, self._at)
            first = self._buffer.first
            first[: len(frame)] = frame
            self._pack.write(first, self._offset)
            return
        rest[: len(frame)] = frame
        self._at += len(rest)
        if self._pack.direct:
            # The kernel does not stop in the middle of a direct write when the process is killed.
            self._pack.write(rest, self._offset)
            return
        if len(rest) > pack.PAGE:
            self._pack.write(rest[pack.PAGE :], self._offset + pack.PAGE)
        self._pack.write(rest[: pack.PAGE], self._offset)

    def _append(self, data: bytes) -> None:
        if self._filled + len(data) > HALF_BYTES:
            self._flush()
        self._memory[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def _flush(self) -> None:
        """Have the whole pages of this half written, and go on in the other one with what is left."""
        if self._writing is not None:
            self._written()
        whole = self._filled // pack.PAGE * pack.PAGE
        if self._at == self._offset:
            self._buffer.first[:] = self._memory[: pack.PAGE]
        left = self._memory[whole : self._filled]
        self._half = 1 - self._half
        other = self._buffer.halves[self._half]
        other[: len(left)] = left
        self._writing = self._writers.submit(self._pack.write, self._memory[:whole], self._at)
        self._at += whole
        self._memory = other
        self._filled = len(left)

    def _written(self) -> None:
        """Wait until the other half is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def remove_unfinished(folder: Path) -> None:
    """Remove files that were to become packs and that nobody holds any more. Only while nobody makes new ones."""
    for path in folder.glob("*.new"):
        with contextlib.suppress(OSError), direct.opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
