"""The audit chain: sealed records, each hashed with all before it, and signed checkpoints. Files in ``audit/``.

One process appends. Whoever has the store's public key can check a chain without opening a record; whoever has the
audit key can read it. Nothing here knows what records mean.
Source: docs/format.md, section 8.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from keys import encoding
from keys.seal import context, u64

RECORD_LIMIT = 256 << 10
_LINE_LIMIT = 512 << 10
_FILE_BYTES = 16 << 20
_NAME = re.compile(r"[0-9]{16}\.log", re.ASCII)
_RECORD = re.compile(rb"R ([1-9][0-9]{0,15}) ([a-z0-9-]{1,40}) ([A-Za-z0-9+/=]+) ([0-9a-f]{64})", re.ASCII)
_CHECKPOINT = re.compile(
    rb"C ([1-9][0-9]{0,15}) (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) ([0-9a-f]{64}) ([A-Za-z0-9+/=]{88})", re.ASCII
)

# Seals a record under a context; the name of the key it took goes into the line.
SealFunction = Callable[[bytes, bytes], bytes]
# Opens what the named key sealed under a context.
OpenFunction = Callable[[str, bytes, bytes], bytes]


class AuditError(Exception):
    """A chain is broken, or cannot be appended to; the message names file and record."""


class Head(msgspec.Struct, frozen=True):
    """The last record of a chain, or of what is known of it; number 0 before the first."""

    number: int
    hash: bytes


class Entry(msgspec.Struct, frozen=True):
    """A record: its number, what it is sealed under, its hash, and its content."""

    number: int
    key: str
    hash: bytes
    content: bytes


class Checkpoint(msgspec.Struct, frozen=True):
    """A head that the store signed."""

    number: int
    time: str
    hash: bytes


class Verified(msgspec.Struct, frozen=True):
    """What a check found: how many records follow from each other, the last good checkpoint, the first fault in words.

    ``unsigned`` records stand behind the last checkpoint: they follow from it, but nobody vouches for them yet.
    """

    head: Head
    checkpoint: Checkpoint | None
    fault: str

    @property
    def unsigned(self) -> int:
        """How many records no checkpoint covers."""
        return self.head.number - (self.checkpoint.number if self.checkpoint else 0)


class Chain:
    """A chain that this process appends to. Safe to use from many threads."""

    def __init__(self, folder: Path, store_id: bytes, signing_key: bytes, *, file_bytes: int = _FILE_BYTES) -> None:
        """Take hold of a chain, and cut off what a crash left of its last line.

        Args:
            folder: ``audit/``; made if it is not there.
            store_id: 16 bytes.
            signing_key: The store's raw Ed25519 public key.
            file_bytes: At which size a new file begins.

        Raises:
            AuditError: Another process appends, or the last file is broken.
            OSError: It cannot be read or made.
        """
        self._folder = folder
        self._store_id = store_id
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        self._faulty = ""
        folder.mkdir(mode=0o700, exist_ok=True)
        self._holding = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._holding, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._holding)
            raise AuditError("another process appends to the audit chain") from None
        try:
            self._file, self._size, self.head = self._last(signing_key)
        except BaseException:
            os.close(self._holding)
            raise

    def close(self) -> None:
        """Let go of the chain."""
        os.close(self._holding)

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
            AuditError: The chain was changed by somebody else, or could not be brought back after an error.
            OSError: The disk refused it; the chain is as before.
        """
        with self._lock:
            if self._faulty:
                raise AuditError(self._faulty)
            head = self.head
            lines = []
            for content in records:
                if len(content) > RECORD_LIMIT:
                    raise AuditError(f"a record of {len(content)} bytes is too long for the audit chain")
                sealed = seal(content, place(self._store_id, head))
                head = _next(self._store_id, head, key, sealed)
                lines.append(f"R {head.number} {key} {base64.b64encode(sealed).decode()} {head.hash.hex()}\n")
            if signing is not None and head.number:
                signature = base64.b64encode(signing.sign(_signed(self._store_id, head, time))).decode()
                lines.append(f"C {head.number} {time} {head.hash.hex()} {signature}\n")
            self._write("".join(lines).encode())
            self.head = head
            return head

    def _write(self, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        if self._file is None or self._size >= self._file_bytes:
            file = self._folder / f"{self.head.number + 1:016}.log"
            descriptor = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o600)
            # Known only now: a disk without room for a name is asked again at the next append.
            self._file, self._size = file, 0
        else:
            descriptor = os.open(self._file, flags)
        try:
            if os.fstat(descriptor).st_size != self._size:
                raise AuditError(f"somebody else changed {self._file.name} of the audit chain")
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fdatasync(descriptor)
                # Also where an earlier try made the file and failed then.
                if not self._size:
                    encoding.sync_folder(self._folder)
            except OSError:
                self._back(descriptor)
                raise
        finally:
            os.close(descriptor)
        self._size += len(content)

    def _back(self, descriptor: int) -> None:
        try:
            os.ftruncate(descriptor, self._size)
            os.fdatasync(descriptor)
        except OSError:
            self._faulty = "the audit chain could not be brought back after an error; start the vault again"

    def _last(self, signing_key: bytes) -> tuple[Path | None, int, Head]:
        found = _files(self._folder)
        if not found:
            return None, 0, _begin(self._store_id)
        # What a new file's creation left before its first line.
        if not found[-1].stat().st_size:
            found.pop().unlink()
            return self._last(signing_key)
        _cut_torn(found[-1])
        if not found[-1].stat().st_size:
            return self._last(signing_key)
        before = _begin(self._store_id) if len(found) == 1 else _end(found[-2])
        checked = _check(found[-1:], self._store_id, signing_key, before=before)
        if checked.fault:
            raise AuditError(f"the audit chain is broken: {checked.fault}")
        return found[-1], found[-1].stat().st_size, checked.head


def verify(folder: Path, store_id: bytes, signing_key: bytes, *, known: Head | None = None) -> Verified:
    """Check a chain from its first record on, without opening any.

    Args:
        folder: ``audit/``, or a copy of it.
        store_id: 16 bytes.
        signing_key: The store's raw Ed25519 public key.
        known: A head that was seen before and kept elsewhere: the chain must have come through it.

    Raises:
        OSError: It cannot be read.
    """
    return _check(_files(folder), store_id, signing_key, known)


def read(folder: Path, store_id: bytes, open_sealed: OpenFunction, *, after: int = 0) -> Iterator[Entry]:
    """Yield the records behind a number.

    Raises:
        AuditError: The chain is broken, or a record does not open.
        OSError: It cannot be read.
    """
    files = _files(folder)
    head: Head | None = None
    for position, file in enumerate(files):
        # The record before the first that is wanted is needed, too: its hash is what that one is bound to.
        if position + 1 < len(files) and _first(files[position + 1]) <= after:
            continue
        for number, key, sealed, hash_ in _records(file):
            if number > after and (head is not None or number == 1):
                before = head or _begin(store_id)
                try:
                    content = open_sealed(key, sealed, place(store_id, before))
                except Exception as error:
                    raise AuditError(f"{file.name}: record {number} does not open: {error}") from error
                yield Entry(number, key, hash_, content)
            head = Head(number, hash_)


def hash_of(folder: Path, number: int) -> bytes | None:
    """Return the hash of a record as it stands in a chain, or None where the chain has no such record.

    Raises:
        AuditError: What stands there is no chain.
        OSError: It cannot be read.
    """
    for file in reversed(_files(folder)):
        if _first(file) <= number:
            return next((hash_ for found, _, _, hash_ in _records(file) if found == number), None)
    return None


def place(store_id: bytes, before: Head) -> bytes:
    """Return what a record's seal is bound to: the store, its number, and all records before it."""
    return context("audit", store_id, u64(before.number + 1), before.hash)


def _check(
    files: list[Path], store_id: bytes, signing_key: bytes, known: Head | None = None, before: Head | None = None
) -> Verified:
    public = Ed25519PublicKey.from_public_bytes(signing_key)
    head, checkpoint = before or _begin(store_id), None
    try:
        for file in files:
            if _first(file) != head.number + 1:
                raise AuditError(f"records are missing: {file.name} follows record {head.number}")
            for line in _lines(file):
                if found := _CHECKPOINT.fullmatch(line):
                    checkpoint = _checked(file, found, store_id, head, public)
                    continue
                number, key, sealed, hash_ = _parsed(file, line, head.number + 1)
                following = _next(store_id, head, key, sealed)
                if number != following.number:
                    raise AuditError(f"{file.name}: record {following.number} should follow, and {number} does")
                if hash_ != following.hash:
                    raise AuditError(f"{file.name}: record {number} is not what was written, or not what follows")
                head = following
                if known is not None and known.number == number and known.hash != hash_:
                    raise AuditError(f"{file.name}: record {number} is another than the one that was seen before")
        if known is not None and known.number > head.number:
            raise AuditError(f"the chain ends with record {head.number}, but {known.number} was seen before")
    except AuditError as error:
        return Verified(head, checkpoint, str(error))
    return Verified(head, checkpoint, "")


def _checked(file: Path, found: re.Match[bytes], store_id: bytes, head: Head, public: Ed25519PublicKey) -> Checkpoint:
    time = found[2].decode()
    said = Head(int(found[1]), bytes.fromhex(found[3].decode()))
    if said != head:
        raise AuditError(f"{file.name}: the checkpoint of record {said.number} does not fit record {head.number}")
    try:
        public.verify(_decoded(file, found[4], head.number), _signed(store_id, head, time))
    except InvalidSignature:
        raise AuditError(f"{file.name}: this store did not sign the checkpoint of record {head.number}") from None
    return Checkpoint(head.number, time, head.hash)


def _records(file: Path) -> Iterator[tuple[int, str, bytes, bytes]]:
    number = _first(file)
    for line in _lines(file):
        if not line.startswith(b"C "):
            found = _parsed(file, line, number)
            yield found
            number = found[0] + 1


def _end(file: Path) -> Head:
    head = None
    for number, _, _, hash_ in _records(file):
        head = Head(number, hash_)
    if head is None:
        raise AuditError(f"the audit chain is broken: {file.name} holds no record")
    return head


def _parsed(file: Path, line: bytes, expected: int) -> tuple[int, str, bytes, bytes]:
    found = _RECORD.fullmatch(line)
    if found is None:
        raise AuditError(f"{file.name}: where record {expected} should be stands something else")
    return int(found[1]), found[2].decode(), _decoded(file, found[3], int(found[1])), bytes.fromhex(found[4].decode())


def _decoded(file: Path, text: bytes, number: int) -> bytes:
    try:
        decoded = base64.b64decode(text, validate=True)
    except binascii.Error:
        decoded = b""
    # Only one text for each content: another spelling of the same bytes is a change, too.
    if base64.b64encode(decoded) != text:
        raise AuditError(f"{file.name}: record {number} is not what was written, or not what follows")
    return decoded


def _lines(file: Path) -> Iterator[bytes]:
    """Yield lines without their ends, in bounded memory."""
    with file.open("rb") as content:
        while line := content.readline(_LINE_LIMIT):
            if not line.endswith(b"\n"):
                raise AuditError(f"{file.name}: a line is not whole, or longer than any record")
            yield line[:-1]


def _cut_torn(file: Path) -> None:
    """Cut off a last line without an end: what a crash left of an append that nobody was told of."""
    with file.open("r+b") as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - 64 * _LINE_LIMIT))
        tail = content.read()
        end = size - len(tail) + tail.rfind(b"\n") + 1
        if end != size:
            content.truncate(end)
            os.fdatasync(content.fileno())


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return []


def _first(file: Path) -> int:
    return int(file.stem)


def _begin(store_id: bytes) -> Head:
    return Head(0, hashlib.sha256(context("audit-begin", store_id)).digest())


def _next(store_id: bytes, before: Head, key: str, sealed: bytes) -> Head:
    number = before.number + 1
    content = context("audit-chain", store_id, u64(number), before.hash, key.encode(), sealed)
    return Head(number, hashlib.sha256(content).digest())


def _signed(store_id: bytes, head: Head, time: str) -> bytes:
    return context("audit-checkpoint", store_id, u64(head.number), time.encode(), head.hash)
