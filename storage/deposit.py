"""The gate's side of storage: study keys made here, packs appended to in ``incoming/``, one sync an object.

A gate holds the study keys of its open packs and nothing else that opens anything.
Source: docs/format.md, section 2; docs/design.md, "From socket to archive".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from keys import encoding
from keys.seal import SLICE_BYTES, Sealer, context, seal
from keys.versions import DepositKey, SignatureError, new_key, read_deposit_key
from storage import pack

_PUBLISHED = re.compile(r"deposit-([1-9][0-9]{0,8})\.key", re.ASCII)
_BUFFER = SLICE_BYTES
_SLACK = 2 * 16_400 + 4096


def record_buffer() -> memoryview:
    """Return the memory that records are sealed into before they are written: a little over 1 MiB."""
    return memoryview(bytearray(_BUFFER + _SLACK))


class DepositError(Exception):
    """An object cannot be deposited; the message says why, without naming it."""


class PublishedKeys:
    """The deposit keys in ``public/``: the newest that this store has signed, never an older one than before."""

    def __init__(self, folder: Path, signing_key: bytes) -> None:
        self._folder = folder
        self._signing_key = signing_key
        self._newest: DepositKey | None = None

    def current(self) -> DepositKey:
        """Return the newest deposit key.

        Raises:
            DepositError: There is none that this store has signed, or the newest is older than one seen before.
        """
        numbers = [int(m[1]) for name in self._names() if (m := _PUBLISHED.fullmatch(name))]
        highest = max(numbers, default=0)
        seen = self._newest.version if self._newest else 0
        if highest < seen or not highest:
            raise DepositError("no deposit key is published, or only one older than was in use")
        if self._newest is None or highest > seen:
            try:
                key = read_deposit_key(self.path(highest).read_bytes(), self._signing_key)
            except (OSError, SignatureError) as error:
                raise DepositError(f"deposit key {highest} cannot be used: {error}") from error
            if key.version != highest:
                raise DepositError(f"deposit key {highest} names another version inside")
            self._newest = key
        return self._newest

    def path(self, version: int) -> Path:
        """Return where a version's key is."""
        return self._folder / f"deposit-{version}.key"

    @contextlib.contextmanager
    def held(self) -> Iterator[DepositKey]:
        """Hold the newest key's share lock while a pack is made under it: its version is not retired meanwhile."""
        while True:
            key = self.current()
            with self.path(key.version).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if self.current().version == key.version:
                    yield key
                    return

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except OSError as error:
            raise DepositError(f"the folder of deposit keys cannot be read: {error.strerror}") from error


class OpenPack:
    """A pack of one study that this process appends to; locked until it is closed."""

    def __init__(self, folder: Path, store_id: bytes, study: str, peer: str, keys: PublishedKeys) -> None:
        self.study = study
        self.peer = peer
        self.leased = True
        self.used_at = time.monotonic()
        self.broken = False
        self._key = new_key()
        key_id = secrets.token_bytes(16)
        path = folder / key_id.hex()
        # The name appears without its suffix only when the header is durable and the lock is held: whoever finds
        # a pack unlocked may take it as finished.
        making = path.with_suffix(".new")
        self._fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            with keys.held() as deposit_key:
                self.version = deposit_key.version
                header = pack.Header(store_id, key_id, deposit_key.version, deposit_key.wrap(self._key, key_id))
                _write_all(self._fd, memoryview(header.encode()), 0)
                os.fdatasync(self._fd)
                os.rename(making, path)
                encoding.sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(making)
            os.close(self._fd)
            raise
        self._bound = header.bound()
        self.end = pack.PAGE

    def record(self, buffer: memoryview) -> Record:
        """Begin a record after the last one, in a buffer made by ``record_buffer`` that nobody else uses meanwhile."""
        return Record(self, self._fd, self._key, self._bound, pack.page_after(self.end), buffer)

    def close(self) -> None:
        """Close the pack: it is the vault's from now on."""
        self._key[:] = bytes(len(self._key))
        os.close(self._fd)


class Record:
    """One object on its way into a pack. Ends with ``finish`` or ``abort``; a data set goes in as it comes."""

    def __init__(
        self, into: OpenPack, descriptor: int, key: bytearray, bound: bytes, offset: int, buffer: memoryview
    ) -> None:
        self._pack = into
        self._fd = descriptor
        self._key = key
        self._offset = offset
        self._object_id = secrets.token_bytes(16)
        self._fields = (bound, self._object_id)
        self._sealer = Sealer(key, context("dataset", *self._fields))
        self._buffer = buffer
        self._buffer[: pack.FRAME_BYTES] = pack.Frame(offset, self._object_id, 0, 0).encode()
        self._filled = pack.FRAME_BYTES
        self._written = offset
        self._sealed = 0

    @property
    def object_id(self) -> bytes:
        """The record's id."""
        return self._object_id

    def write(self, data: memoryview) -> None:
        """Seal a piece of the data set.

        Raises:
            OSError: The disk refused it; ``abort`` the record.
        """
        while data:
            room = len(self._buffer) - _SLACK - self._filled
            if room < 16_400:
                self._flush()
                room = len(self._buffer) - _SLACK - self._filled
            # Sealing adds a tag to each chunk: a slice this much shorter than the room always fits.
            part = data[: room - room // 1000]
            count = self._sealer.update_into(part, self._buffer[self._filled :])
            self._filled += count
            self._sealed += count
            data = data[len(part) :]

    def finish(self, attributes: bytes) -> None:
        """Write what is left, the attributes, and last the lengths; sync. On return the object is durable.

        Raises:
            OSError: It is not; ``abort`` the record.
        """
        last = self._sealer.finalize()
        sealed_attributes = seal(attributes, self._key, context("attributes", *self._fields))
        self._append(last)
        self._append(sealed_attributes)
        self._flush()
        frame = pack.Frame(self._offset, self._object_id, self._sealed + len(last), len(sealed_attributes))
        where, lengths = frame.lengths()
        _write_all(self._fd, memoryview(lengths), where)
        try:
            os.fdatasync(self._fd)
        except OSError:
            # What the kernel dropped after a failed sync it will not report again: this pack takes nothing more.
            self._pack.broken = True
            raise
        self._pack.end = frame.end

    def abort(self) -> None:
        """Cut the record away; a pack that cannot even be cut is not used again."""
        try:
            os.ftruncate(self._fd, self._pack.end)
        except OSError:
            self._pack.broken = True

    def _append(self, data: bytes) -> None:
        if self._filled + len(data) > len(self._buffer):
            self._flush()
        self._buffer[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def _flush(self) -> None:
        _write_all(self._fd, self._buffer[: self._filled], self._written)
        self._written += self._filled
        self._filled = 0


class Deposits:
    """The open packs of a gate worker, leased to one association at a time. Safe to use from many threads."""

    def __init__(
        self,
        incoming: Path,
        store_id: bytes,
        keys: PublishedKeys,
        *,
        size_limit: int,
        idle_seconds: float,
        open_per_peer: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._incoming = incoming
        self._store_id = store_id
        self._keys = keys
        self._size_limit = size_limit
        self._idle_seconds = idle_seconds
        self._open_per_peer = open_per_peer
        self._clock = clock
        self._lock = threading.Lock()
        self._free: list[OpenPack] = []

    def check(self) -> None:
        """Prove that deposits can be made: a key is published and the folder is there.

        Raises:
            DepositError: They cannot.
        """
        self._keys.current()
        if not os.access(self._incoming, os.W_OK | os.X_OK):
            raise DepositError("the folder 'incoming' is missing or cannot be written")

    def lease(self, study: str, peer: str) -> OpenPack:
        """Return a pack for a study: one that is open and free, or a new one.

        Raises:
            DepositError: No usable deposit key is published.
            OSError: The disk refused a new pack.
        """
        with self._lock:
            for found in self._free:
                if found.study == study:
                    self._free.remove(found)
                    found.leased = True
                    return found
        return OpenPack(self._incoming, self._store_id, study, peer, self._keys)

    def release(self, leased: OpenPack) -> None:
        """Give a pack back; it stays open a little for more objects of its study."""
        leased.leased = False
        leased.used_at = self._clock()
        if leased.broken or leased.end >= self._size_limit:
            leased.close()
            return
        with self._lock:
            self._free.append(leased)
            same_peer = [p for p in self._free if p.peer == leased.peer]
            surplus = same_peer[: max(0, len(same_peer) - self._open_per_peer)]
            for old in surplus:
                self._free.remove(old)
        for old in surplus:
            old.close()

    def close_idle(self) -> None:
        """Close the packs that nothing was added to for a while, and those of an older key version."""
        version = self._keys.current().version
        latest = self._clock() - self._idle_seconds
        self._close(lambda p: p.used_at <= latest or p.version != version)

    def close_all(self) -> None:
        """Close every pack that is free."""
        self._close(lambda _: True)

    def _close(self, which: Callable[[OpenPack], bool]) -> None:
        with self._lock:
            gone = [p for p in self._free if which(p)]
            self._free = [p for p in self._free if p not in gone]
        for old in gone:
            old.close()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count
