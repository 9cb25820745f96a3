"""The audit chain's lines: what each may be, and that it follows from the one before it. No keys, no appending.

Source: docs/format.md, section 8.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.seal import context, u64

LINE_LIMIT = 512 << 10
LOCK = "lock"
_NAME = re.compile(r"[0-9]{16}\.log", re.ASCII)
_TIME = rb"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
RECORD = re.compile(rb"R ([1-9][0-9]{0,15}) ([a-z0-9-]{1,40}) ([A-Za-z0-9+/]+={0,2}) ([0-9a-f]{64})")
CHECKPOINT = re.compile(rb"C ([1-9][0-9]{0,15}) (" + _TIME + rb") ([0-9a-f]{64}) ([A-Za-z0-9+/]{86}==)")
# How a line begins that was not written to its end. Zeros: what a power cut makes of a page that was not written.
_TORN = re.compile(
    rb"(R( [0-9]*( [a-z0-9-]*( [A-Za-z0-9+/=]*( [0-9a-f]{0,64})?)?)?)?"
    rb"|C( [0-9]*( [0-9TZ:-]*( [0-9a-f]{0,64}( [A-Za-z0-9+/=]{0,88})?)?)?)?)?\0*"
)


class AuditError(Exception):
    """A chain is broken, or cannot be appended to; the message names file and record, ``record`` is its number or 0."""

    def __init__(self, message: str, record: int = 0) -> None:
        super().__init__(message)
        self.record = record


class Head(msgspec.Struct, frozen=True):
    """The last record of a chain, or of what is known of it; number 0 before the first."""

    number: int
    hash: bytes


class Checkpoint(msgspec.Struct, frozen=True):
    """A head that the store signed."""

    number: int
    time: str
    hash: bytes
    signature: bytes


class Record(msgspec.Struct, frozen=True):
    number: int
    key: str
    sealed: bytes
    hash: bytes
    before: Head


class Walk:
    """A walk along a chain's lines: every record follows from the one before it, or it ends with an AuditError.

    ``head`` is the last record that does, ``file`` (the ``last`` or not) and ``end`` are how far it came. It begins at
    the first file, or at the one before the file with record ``since``: the first hash there is taken as it stands.
    Without a store's id all hashes are.
    """

    def __init__(self, folder: Path, store_id: bytes = b"", since: int = 1) -> None:
        self.head = begin(store_id)
        self.file: Path | None = None
        self.end = 0
        self.last = False
        self._folder = folder
        self._store_id = store_id
        self._since = since

    def fault(self, what: str, record: int) -> AuditError:
        """Return an error about a record that names the file."""
        return AuditError(f"{self.file.name}: {what}" if self.file else what, record)

    def check(self, checkpoint: Checkpoint, signing_key: bytes) -> None:
        """Raise unless the store signed a checkpoint."""
        head = Head(checkpoint.number, checkpoint.hash)
        try:
            public = Ed25519PublicKey.from_public_bytes(signing_key)
            public.verify(checkpoint.signature, signed(self._store_id, head, checkpoint.time))
        except InvalidSignature:
            raise self.fault(f"this store did not sign the checkpoint of record {head.number}", head.number) from None

    def __iter__(self) -> Iterator[Record | Checkpoint]:
        files = _files(self._folder)
        start = max(0, bisect_right(files, self._since, key=_first) - 2)
        if start:
            self.head = Head(_first(files[start]) - 1, b"")
        left = files[start:]
        while left:
            file = self._folder / f"{self.head.number + 1:016}.log"
            # A listing made while somebody appends may lack a file and have one that came later.
            if file >= left[0] or file == self.file or not file.exists():
                file = left.pop(0)
            self.file, self.end, self.last, signable = file, 0, not left, False
            self._follows(_first(file))
            for line in self._lines(file):
                number = self.head.number
                if found := RECORD.fullmatch(line):
                    yield self._record(found)
                    signable = True
                elif found := CHECKPOINT.fullmatch(line):
                    yield self._checkpoint(found, signable=signable)
                    signable = False
                elif line.startswith(b"C "):
                    raise self.fault(f"the checkpoint of record {number} is malformed", number)
                else:
                    raise self.fault(f"where record {number + 1} should be stands something else", number + 1)

    def _follows(self, number: int) -> None:
        last = self.head.number
        if number > last + 1:
            what = f"records are missing between {last} and {number}: record {number} stands where {last + 1} should"
            raise self.fault(what, last + 1)
        if number <= last:
            raise self.fault(f"where record {last + 1} should be stands record {number} again", last + 1)

    def _record(self, found: re.Match[bytes]) -> Record:
        number, key, stated, before = int(found[1]), found[2].decode(), bytes.fromhex(found[4].decode()), self.head
        self._follows(number)
        sealed = self._decoded(found[3], number)
        known = self._store_id and before.hash
        if known and following(self._store_id, before, key, sealed).hash != stated:
            raise self.fault(f"the hash of record {number} does not follow from the record before it", number)
        self.head = Head(number, stated)
        return Record(number, key, sealed, stated, before)

    def _checkpoint(self, found: re.Match[bytes], *, signable: bool) -> Checkpoint:
        number, head = int(found[1]), self.head
        if not signable or number != head.number:
            what = f"a checkpoint of record {number} stands after record {head.number}, or not right after it"
            raise self.fault(what, head.number + (number > head.number))
        if found[3].decode() != head.hash.hex():
            raise self.fault(f"the checkpoint of record {number} has another hash than the record", number)
        return Checkpoint(number, found[2].decode(), head.hash, self._decoded(found[4], number))

    def _decoded(self, text: bytes, number: int) -> bytes:
        decoded = b""
        with contextlib.suppress(binascii.Error):
            decoded = base64.b64decode(text, validate=True)
        # Only one text for each content: another spelling of the same bytes is a change, too.
        if base64.b64encode(decoded) != text:
            raise self.fault(f"record {number} or its checkpoint is not what was written", number)
        return decoded

    def _lines(self, file: Path) -> Iterator[bytes]:
        """Yield lines without their ends, in bounded memory."""
        number = self.head.number + 1
        with _opened(file) as content:
            while line := content.readline(LINE_LIMIT):
                if line.endswith(b"\n"):
                    yield line[:-1]
                    self.end += len(line)
                    number = self.head.number + 1
                elif self.last and len(line) < LINE_LIMIT and _TORN.fullmatch(line) and _held(self._folder):
                    # The line is being written; or we are about to append, and a crash left it.
                    return
                else:
                    raise self.fault(f"the line at record {number} is not whole, or longer than any record", number)


def _opened(file: Path) -> BinaryIO:
    # A pipe would make us wait for ever.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "no regular file", str(file))


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):
        found = sorted(path for path in folder.iterdir() if path.name != LOCK)
    for path in found:
        if not _NAME.fullmatch(path.name):
            # The last file under another name would be an end that nobody notices.
            raise AuditError(f"{path.name} is no file of an audit chain")
    return found


def _held(folder: Path) -> bool:
    """Tell whether somebody holds a chain to append to it."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _first(file: Path) -> int:
    return int(file.stem)


def place(store_id: bytes, before: Head) -> bytes:
    """Return what a record's seal is bound to: the store, its number, and all records before it."""
    return context("audit", store_id, u64(before.number + 1), before.hash)


def begin(store_id: bytes) -> Head:
    return Head(0, hashlib.sha256(context("audit-begin", store_id)).digest())


def following(store_id: bytes, before: Head, key: str, sealed: bytes) -> Head:
    number = before.number + 1
    content = context("audit-chain", store_id, u64(number), before.hash, key.encode(), sealed)
    return Head(number, hashlib.sha256(content).digest())


def signed(store_id: bytes, head: Head, time: str) -> bytes:
    return context("audit-checkpoint", store_id, u64(head.number), time.encode(), head.hash)
