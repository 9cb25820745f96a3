"""The audit chain: sealed records, each hashed with all before it, and signed checkpoints. Files in ``audit/``.

One process appends. Whoever has the store's public key can check a chain without opening a record; whoever has the
audit key can read it. Nothing here knows what records mean.
Source: docs/format.md, section 8.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys import encoding
from storage.auditlines import CHECKPOINT as _CHECKPOINT
from storage.auditlines import LINE_LIMIT, LOCK, AuditError, Checkpoint, Head, Record, Walk, place
from storage.auditlines import RECORD as _RECORD
from storage.auditlines import begin as _begin
from storage.auditlines import following as _next
from storage.auditlines import signed as _signed

__all__ = ["AuditError", "Chain", "Checkpoint", "Entry", "Head", "Verified", "hash_of", "place", "read", "verify"]

RECORD_LIMIT = 256 << 10
_FILE_BYTES = 16 << 20
_APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW

# Seals a record under a context; the name of the key it took goes into the line.
SealFunction = Callable[[bytes, bytes], bytes]
# Opens what the named key sealed under a context.
OpenFunction = Callable[[str, bytes, bytes], bytes]


class Entry(msgspec.Struct, frozen=True):
    """A record: its number, what it is sealed under, its hash, and its content."""

    number: int
    key: str
    hash: bytes
    content: bytes


class Verified(msgspec.Struct, frozen=True):
    """What a check found: the last record that follows from the first, the last good checkpoint, the first fault.

    ``fault`` is empty where there is none; ``record`` is the record that it is about. ``unsigned`` records stand behind
    the last checkpoint: they follow from it, but nobody vouches for them yet.
    """

    head: Head
    checkpoint: Checkpoint | None
    fault: str
    record: int = 0

    @property
    def unsigned(self) -> int:
        """How many records no checkpoint covers."""
        return self.head.number - (self.checkpoint.number if self.checkpoint else 0)


class Chain:
    """A chain that this process appends to. Safe to use from many threads.

    ``head`` is its last record; ``cut`` says how many bytes of a torn line were cut off when it was opened.
    """

    def __init__(self, folder: Path, store_id: bytes, signing_key: bytes, *, file_bytes: int = _FILE_BYTES) -> None:
        """Take hold of a chain, and cut off what a crash left of its last line.

        Args:
            folder: ``audit/``; made if it is not there.
            store_id: 16 bytes.
            signing_key: The store's raw Ed25519 public key.
            file_bytes: At which size a new file begins.

        Raises:
            AuditError: Another process appends, or the last file or its last checkpoint is broken.
            OSError: It cannot be read or made.
        """
        self._folder = folder
        self._store_id = store_id
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        self._refused = ""
        self._descriptor = self._holding = -1
        self._file: Path | None = None
        self.head = _begin(store_id)
        self._size = self.cut = 0
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            encoding.sync_folder(folder.parent)
        self._holding = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._holding, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover(signing_key)
        except BlockingIOError:
            self.close()
            raise AuditError("another process appends to the audit chain") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the chain."""
        with self._lock:
            self._refused = "the audit chain is closed"
            # The lock last: nobody may append before the last append of ours is over.
            for descriptor in (self._descriptor, self._holding):
                if descriptor >= 0:
                    os.close(descriptor)
            self._descriptor = self._holding = -1

    def append(
        self,
        records: list[bytes],
        key: str,
        seal: SealFunction,
        *,
        signing: Ed25519PrivateKey | None = None,
        time: str = "",
    ) -> Head:
        """Append records durably, all or none.

        Args:
            records: Each at most ``RECORD_LIMIT`` bytes.
            key: Name of what they are sealed under.
            seal: Seals a record, bound to its place.
            signing: Signs a checkpoint behind them, where it is at hand.
            time: Of the checkpoint, ``2026-01-31T12:00:00Z``.

        Raises:
            AuditError: A record is too long, or a name or time malformed; the chain was changed by somebody else, is
                closed, or could not be brought back after an error. Nothing was written.
            OSError: The disk refused it; the chain is as before.
        """
        if (longest := max(map(len, records), default=0)) > RECORD_LIMIT:
            raise AuditError(f"a record of {longest} bytes is too long for the audit chain")
        with self._lock:
            if self._refused:
                raise AuditError(self._refused)
            head, lines = self.head, []
            for content in records:
                sealed = seal(content, place(self._store_id, head))
                head = _next(self._store_id, head, key, sealed)
                lines.append(f"R {head.number} {key} {base64.b64encode(sealed).decode()} {head.hash.hex()}".encode())
            if signing is not None and records:
                signature = base64.b64encode(signing.sign(_signed(self._store_id, head, time))).decode()
                lines.append(f"C {head.number} {time} {head.hash.hex()} {signature}".encode())
            # A line that no reader takes would break the chain for good.
            for line in lines:
                if len(line) >= LINE_LIMIT or not (_RECORD.fullmatch(line) or _CHECKPOINT.fullmatch(line)):
                    raise AuditError("a key's name, a checkpoint's time or a seal is malformed; nothing was recorded")
            if lines:
                self._write(b"".join(line + b"\n" for line in lines))
            self.head = head
            return head

    def _write(self, content: bytes) -> None:
        if self._file is not None:
            self._unchanged(self._file)
        if self._file is None or self._size >= self._file_bytes:
            self._begin_file()
        try:
            if self._size == 0:
                # Here and not where it was made: where that failed, the next append must make up for it.
                encoding.sync_folder(self._folder)
            view = memoryview(content)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fdatasync(self._descriptor)
        except BaseException:
            try:
                os.ftruncate(self._descriptor, self._size)
                os.fdatasync(self._descriptor)
            except OSError:
                self._refused = "the audit chain could not be brought back after an error; start the vault again"
            raise
        self._size += len(content)

    def _begin_file(self) -> None:
        file = self._folder / f"{self.head.number + 1:016}.log"
        descriptor = os.open(file, _APPENDING | os.O_CREAT | os.O_EXCL, 0o600)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._file, self._descriptor, self._size = file, descriptor, 0

    def _unchanged(self, file: Path) -> None:
        ours = os.fstat(self._descriptor)
        with contextlib.suppress(FileNotFoundError):
            named = os.stat(file, follow_symlinks=False)
            if (named.st_dev, named.st_ino, named.st_size) == (ours.st_dev, ours.st_ino, self._size):
                return
        raise AuditError(f"somebody else changed {file.name} of the audit chain", self.head.number)

    def _recover(self, signing_key: bytes) -> None:
        walk = Walk(self._folder, self._store_id, since=sys.maxsize)
        try:
            for found in walk:
                # Those of the file before are not looked at: a later one covers what they do.
                if isinstance(found, Checkpoint) and walk.last:
                    walk.check(found, signing_key)
        except AuditError as error:
            raise AuditError(f"the audit chain is broken: {error}", error.record) from None
        self.head, self._file, self._size = walk.head, walk.file, walk.end
        if self._file is not None:
            self._descriptor = os.open(self._file, _APPENDING)
            self.cut = os.fstat(self._descriptor).st_size - self._size
            if self.cut > 0:
                os.ftruncate(self._descriptor, self._size)
            # What a process wrote that was killed before it synced counts from now on, so that it must be durable.
            os.fsync(self._descriptor)
            encoding.sync_folder(self._folder)


def verify(folder: Path, store_id: bytes, signing_key: bytes, *, known: Head | None = None) -> Verified:
    """Check a chain from its first record on, without opening any.

    Args:
        folder: ``audit/``, or a copy of it. While somebody appends to it, it ends at the last whole line.
        store_id: 16 bytes.
        signing_key: The store's raw Ed25519 public key.
        known: A head that was seen before and kept elsewhere: the chain must have come through it.

    Raises:
        OSError: It cannot be read. A folder that is not there is an empty chain.
    """
    walk, checkpoint = Walk(folder, store_id), None
    try:
        for found in walk:
            if isinstance(found, Checkpoint):
                walk.check(found, signing_key)
                checkpoint = found
            elif known is not None and known.number == found.number and known.hash != found.hash:
                raise walk.fault(
                    f"record {known.number} is another than the one that was seen before (hash {known.hash.hex()})",
                    known.number,
                )
        if known is not None and known.number > walk.head.number:
            raise AuditError(
                f"the chain ends with record {walk.head.number}, but {known.number} was seen before"
                f" (hash {known.hash.hex()})",
                walk.head.number + 1,
            )
    except AuditError as error:
        return Verified(walk.head, checkpoint, str(error), error.record)
    return Verified(walk.head, checkpoint, "")


def read(folder: Path, store_id: bytes, open_sealed: OpenFunction, *, after: int = 0) -> Iterator[Entry]:
    """Yield the records behind a number. Signatures are not checked, hashes are: from the file before on.

    Raises:
        AuditError: The chain is broken, or a record does not open.
        OSError: It cannot be read.
    """
    walk = Walk(folder, store_id, since=after + 1)
    for found in walk:
        if isinstance(found, Record) and found.number > after:
            try:
                content = open_sealed(found.key, found.sealed, place(store_id, found.before))
            except Exception as error:
                raise walk.fault(f"record {found.number} does not open: {error}", found.number) from error
            yield Entry(found.number, found.key, found.hash, content)


def hash_of(folder: Path, number: int) -> bytes | None:
    """Return the hash of a record as it stands in a chain, unchecked, or None where the chain has no such record.

    Raises:
        AuditError: What stands before it is no chain.
        OSError: It cannot be read.
    """
    walk = Walk(folder, since=number)
    return next((found.hash for found in walk if isinstance(found, Record) and found.number == number), None)
