"""The spool between the vault, which makes audit messages, and the forwarder, which sends them: two folders.

The vault writes ``audit-out/``: files of messages, each sealed to the forwarder's key, and a note while it is locked.
The forwarder writes ``audit-forwarder/``: its key, that key's public half, and how far it came. Nobody writes the
other's folder, so that they may be two users.
Source: docs/audit-forwarding.md, "The spool".
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import msgspec

from keys import encoding
from keys.forwarding import Recipient, read_recipient

KEY, PUBLIC, ACKNOWLEDGED = "forwarder.key", "forwarder.pub", "acknowledged"
LOCKED = "locked"
_NAME = re.compile(r"([0-9]{16})-([0-9]{16})\.audit", re.ASCII)
_SMALL = 1 << 16
# What the names of files have room for.
_SEQ_LIMIT = 10**15
# What one file may hold: as many messages as fit in about this; one more takes at most 32 KiB.
FILE_BYTES = 1 << 20
_FILE_LIMIT = 128 << 20


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message that waits: ``seq`` counts them without a gap, ``record`` is the chain's, ``xml`` the audit message."""

    seq: int
    record: int
    time: str
    outcome: int
    xml: str
    head: str = ""


class _Acknowledged(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    seq: int


class _Locked(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    since: str


def name_of(first: int, last: int) -> str:
    """Return the name of a file with these messages."""
    return f"{first:016}-{last:016}.audit"


def files(folder: Path) -> list[tuple[int, int, Path]]:
    """Return the files of messages, each with its first and last number, in order.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [(int(found[1]), int(found[2]), folder / name) for name in names if (found := _NAME.fullmatch(name))]


def encoded(messages: list[Message]) -> bytes:
    """Return what is sealed in a file."""
    return msgspec.json.encode(messages)


def decoded(content: bytes) -> list[Message]:
    """Return the messages in a file.

    Raises:
        ValueError: It holds none.
    """
    try:
        return msgspec.json.decode(content, type=list[Message])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


def recipient(folder: Path) -> Recipient | None:
    """Return to whom the vault seals, None where no forwarder was ever started.

    Raises:
        ValueError: What lies there is no public half.
        OSError: It cannot be read.
    """
    content = read(folder / PUBLIC)
    return None if content is None else read_recipient(content)


def acknowledged(folder: Path) -> int:
    """Return the number of the last message that was delivered, 0 for none.

    Raises:
        ValueError: The file is damaged.
        OSError: It cannot be read.
    """
    content = read(folder / ACKNOWLEDGED)
    if content is None:
        return 0
    try:
        found = encoding.decode(content, _Acknowledged)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    if not 0 <= found.seq < _SEQ_LIMIT:
        raise ValueError("a number that no message has")
    return found.seq


def acknowledge(folder: Path, seq: int) -> None:
    """Remember durably that all messages up to a number are delivered."""
    encoding.replace(folder / ACKNOWLEDGED, encoding.canonical(_Acknowledged(1, seq)), 0o644)


def tell_locked(folder: Path, since: str) -> None:
    """Leave word for the forwarder that the vault is locked."""
    encoding.replace(folder / LOCKED, encoding.canonical(_Locked(1, since)), 0o640)


def locked_since(folder: Path) -> str:
    """Return since when the vault says that it is locked; empty where it says nothing.

    Raises:
        OSError: It cannot be read.
    """
    content = read(folder / LOCKED)
    try:
        return encoding.decode(content, _Locked).since if content is not None else ""
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""


def read(path: Path, limit: int = _SMALL) -> bytes | None:
    """Return a small file of another user's, whatever they put there; None where there is none.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read(limit)


def read_file(path: Path) -> bytes | None:
    """Return a file of messages, sealed; None where the vault removed it meanwhile.

    Raises:
        OSError: It cannot be read.
    """
    return read(path, _FILE_LIMIT)
