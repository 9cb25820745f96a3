"""Canonical JSON and base64, as docs/format.md defines them, and files that are replaced whole or not at all."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")


def canonical(value: Any) -> bytes:
    """Return a value as canonical JSON: UTF-8, keys sorted, no white space; bytes become base64."""
    return json.dumps(msgspec.to_builtins(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode(content: bytes, kind: type[_T]) -> _T:
    """Return JSON as ``kind``.

    Raises:
        msgspec.MsgspecError: It is no JSON or of another shape.
    """
    return msgspec.json.decode(content, type=kind)


def to_base64(data: bytes) -> bytes:
    """Return standard base64 with padding."""
    return base64.b64encode(data)


def from_base64(text: str) -> bytes:
    """Return the bytes of standard base64.

    Raises:
        ValueError: Another alphabet, padding or character.
    """
    return base64.b64decode(text, validate=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file durably.

    Raises:
        FileExistsError: The name is taken; nothing was changed.
    """
    _write(path, content, mode)
    sync_folder(path.parent)


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file durably: whoever reads it sees the old content or the new, whole."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    _write(new, content, mode)
    os.rename(new, path)
    sync_folder(path.parent)


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
