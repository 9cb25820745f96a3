"""The receiving side of storage: study keys made here, packs appended to, one sync an object.

A gate, or the desk where it stores, holds the study keys of its open packs and nothing else that opens anything.
Source: docs/format.md, section 2; docs/design.md, "From socket to archive".
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keys import signed
from keys.signed import SignedError
from keys.versions import DepositKey, SignatureError, read_deposit_key
from storage.direct import Buffer, Buffers
from storage.openpack import OpenPack, Record, Spare

# In ``public/``, and what its signature is labelled with.
FENCE = "fence"
_PUBLISHED = re.compile(r"deposit-([1-9][0-9]{0,8})\.key", re.ASCII)
# Threads that write for records longer than a buffer's half; a short object needs none.
_WRITERS = 4
# Records of a pack: the vault has their attributes in memory while it admits one.
_RECORDS = 4096
# Files made ahead: how many, how large before it is known what packs need, what part of the free space each takes.
_SPARES = 2
_TYPICAL_BYTES = 64 << 20
_SPARE_PART = 64
_IDLE_SECONDS = 1.0


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


class Fence:
    """The packs that the vault told gates to let go, in ``public/fence``: their study is being erased."""

    def __init__(self, folder: Path, signing_key: bytes) -> None:
        self._path = folder / FENCE
        self._signing_key = signing_key
        self._seen = (0, 0)
        self.packs: frozenset[str] = frozenset()

    def look(self) -> None:
        """Read it again if it changed; one that this store did not sign changes nothing."""
        try:
            found = self._path.stat()
            # Of two that came within a tick of the clock, only the files differ.
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp == self._seen:
                return
            content = self._path.read_bytes()
        except OSError:
            # It is not there, or cannot be read now: at the next look, perhaps.
            return
        with contextlib.suppress(SignedError):
            self.packs = frozenset(signed.read(FENCE, content, self._signing_key)["packs"])
        self._seen = stamp


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
        spare_bytes: int = 0,
        fence: Fence | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._incoming = incoming
        self._store_id = store_id
        self._keys = keys
        self._size_limit = size_limit
        self._idle_seconds = idle_seconds
        self._open_per_peer = open_per_peer
        self._fence = fence
        self._clock = clock
        self._lock = threading.Lock()
        self._free: list[OpenPack] = []
        self._buffers = Buffers()
        self._writers = ThreadPoolExecutor(_WRITERS, "write")
        self._spare_limit = spare_bytes
        self._typical = min(spare_bytes, _TYPICAL_BYTES)
        self._spares: list[Spare] = []
        self._begun_at = clock()
        self._under_way = 0
        # The newest version as of the last look.
        self._version = 0

    def check(self) -> None:
        """Prove that deposits can be made: a key is published and the folder is there.

        Raises:
            DepositError: They cannot.
        """
        self._keys.current()
        if not os.access(self._incoming, os.W_OK | os.X_OK):
            raise DepositError(f"the folder '{self._incoming.name}' is missing or cannot be written")

    def begin(self, study: str, peer: str) -> Record:
        """Begin a record in a pack of its study that is open and free, or in a new one.

        Raises:
            DepositError: No usable deposit key is published.
            OSError: The disk refused a new pack.
        """
        into = self._free_pack(study)
        if into is None:
            with self._lock:
                spare = self._spares.pop() if self._spares else None
            into = OpenPack(spare or Spare(self._incoming), self._store_id, study, peer, self._keys)
        with self._lock:
            self._under_way += 1
        return Record(into, self._buffers.take(), self._writers, self._release)

    def prepare(self) -> None:
        """Prepare files for packs to come, when nothing arrived for a moment. A disk that refuses it is no error."""
        if self._is_busy() or len(self._spares) >= _SPARES:
            return
        free = shutil.disk_usage(self._incoming).free
        size = min(self._typical, self._spare_limit, free // _SPARE_PART) >> 20 << 20
        if not size:
            return
        with contextlib.suppress(OSError):
            spare = Spare(self._incoming)
            try:
                spare.fill(size, self._is_busy)
            except OSError:
                spare.discard()
                raise
            with self._lock:
                self._spares.append(spare)

    def _is_busy(self) -> bool:
        return self._under_way > 0 or self._clock() - self._begun_at < _IDLE_SECONDS

    def _free_pack(self, study: str) -> OpenPack | None:
        if self._fence is not None:
            self._fence.look()
        with self._lock:
            self._begun_at = self._clock()
            for found in self._free:
                if found.study == study and not self._is_fenced(found):
                    self._free.remove(found)
                    return found
        return None

    def _release(self, leased: OpenPack, buffer: Buffer) -> None:
        """Take a pack back; it stays open a little for more objects of its study."""
        self._buffers.give(buffer)
        leased.used_at = self._clock()
        with self._lock:
            self._under_way -= 1
        full = leased.end >= self._size_limit or leased.records >= _RECORDS
        # A sender that never pauses must not keep an old key version in use.
        if leased.broken or full or leased.version < self._version or self._is_fenced(leased):
            self._close_pack(leased)
            return
        with self._lock:
            self._free.append(leased)
            same_peer = [p for p in self._free if p.peer == leased.peer]
            surplus = same_peer[: max(0, len(same_peer) - self._open_per_peer)]
            for old in surplus:
                self._free.remove(old)
        for old in surplus:
            self._close_pack(old)

    def close_idle(self) -> None:
        """Close the packs that nothing was added to for a while, and those of an older key version."""
        version = self._version = self._keys.current().version
        latest = self._clock() - self._idle_seconds
        if self._fence is not None:
            self._fence.look()
        self._close(lambda p: p.used_at <= latest or p.version != version or self._is_fenced(p))

    def _is_fenced(self, pack: OpenPack) -> bool:
        return self._fence is not None and pack.name in self._fence.packs

    def close_all(self) -> None:
        """Close every pack that is free, and remove what was prepared."""
        self._close(lambda _: True)
        with self._lock:
            spares, self._spares = self._spares, []
        for spare in spares:
            spare.discard()

    def _close(self, which: Callable[[OpenPack], bool]) -> None:
        with self._lock:
            gone = [p for p in self._free if which(p)]
            self._free = [p for p in self._free if p not in gone]
        for old in gone:
            self._close_pack(old)

    def _close_pack(self, old: OpenPack) -> None:
        # What packs lately needed, and a quarter more: zeros that are not used were written in vain.
        self._typical = (3 * self._typical + old.end * 5 // 4) // 4
        old.close()
