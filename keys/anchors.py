"""Anchors: small erasable secrets, outside every backup, one a version. Destroying one kills its version everywhere.

A provider needs three verbs, ``create``, ``key`` and ``destroy``; the file provider is the default.
Source: docs/format.md, section 5.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Protocol

from keys import encoding
from keys.seal import context, derive, u32

_CACHEDIR_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# The anchors of a Strongroom store. They must not be in any backup: destroying an anchor is what proves that a key
# version is gone, and a copy in a backup would undo it. Backup programs skip a folder that holds this file.
# The other side of it: without this folder the store opens no more. See docs/admin.md, "What losing a key means".
"""


class AnchorError(Exception):
    """An anchor is not here, or cannot be made or read."""


class Anchors(Protocol):
    """Where anchors live."""

    provider: str

    def create(self, version: int) -> str:
        """Make the anchor of a version and return its id."""

    def key(self, anchor_id: str, store_id: bytes, version: int) -> bytes:
        """Return the key that seals V_v, 32 bytes."""

    def generation(self, store_id: bytes) -> int:
        """Return the highest keyring generation seen, 0 if none."""

    def set_generation(self, store_id: bytes, generation: int) -> None:
        """Record a keyring generation."""


class FileAnchors:
    """Anchors as files of 32 random bytes; grade *clear* of NIST SP 800-88, never *purge*."""

    provider = "file"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder and mark it as one that backups skip."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        encoding.create(self._folder / "CACHEDIR.TAG", _CACHEDIR_TAG)

    def create(self, version: int) -> str:
        """Make the anchor of a version and return its id.

        Raises:
            FileExistsError: There is one.
        """
        name = f"anchor-{version}"
        encoding.create(self._folder / name, secrets.token_bytes(32))
        return name

    def key(self, anchor_id: str, store_id: bytes, version: int) -> bytes:
        """Return the key that seals V_v.

        Raises:
            AnchorError: The anchor is not here or is damaged.
        """
        if anchor_id != f"anchor-{version}":
            raise AnchorError(f"version {version} names an anchor of another version")
        try:
            secret = (self._folder / anchor_id).read_bytes()
        except OSError as error:
            raise AnchorError(f"the anchor of version {version} cannot be read: {error.strerror}") from error
        if len(secret) != 32:
            raise AnchorError(f"the anchor of version {version} is damaged")
        return derive(secret, 32, context("derive/anchor", store_id, u32(version)))

    def generation(self, store_id: bytes) -> int:
        """Return the highest keyring generation seen.

        Raises:
            AnchorError: The record is missing or damaged, or is another store's.
        """
        try:
            content = (self._folder / "generation").read_text("ascii")
            store, number = content.split()
            if store != store_id.hex():
                raise AnchorError("the anchors folder belongs to another store")
            return int(number)
        except (OSError, ValueError) as error:
            raise AnchorError("the generation record in the anchors folder is missing or damaged") from error

    def set_generation(self, store_id: bytes, generation: int) -> None:
        """Record a keyring generation durably."""
        encoding.replace(self._folder / "generation", f"{store_id.hex()} {generation}\n".encode())
