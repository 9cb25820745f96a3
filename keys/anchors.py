"""Anchors: small erasable secrets, outside every backup, one a version. Destroying one kills its version everywhere.

A provider needs three verbs, ``create``, ``key`` and ``destroy``; the file provider is the default.
Source: docs/format.md, section 5; NIST SP 800-88, revision 1, for the grades.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from keys import encoding
from keys.seal import context, derive, u32
from keys.token import AttachedToken, TokenError

Grade = Literal["clear", "purge"]
# By provider, so that it can be said of an anchor that is destroyed or whose token is not attached.
GRADES: dict[str, Grade] = {"file": "clear", "pkcs11": "purge", "pkcs11-software": "clear"}

_FILE_ID = re.compile(r"anchor-[1-9][0-9]{0,9}")
_TOKEN_ID = re.compile(r"strongroom-anchor-([1-9][0-9]{0,9})-[0-9a-f]{32}@((?:[0-9a-f]{2})*)")

_CACHEDIR_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# The anchors of a Strongroom store. They must not be in any backup: destroying an anchor is what proves that a key
# version is gone, and a copy in a backup would undo it. Backup programs skip a folder that holds this file.
# The other side of it: without this folder the store opens no more. See docs/admin.md, "What losing a key means".
"""


class AnchorError(Exception):
    """An anchor is not here, or cannot be made, read or destroyed."""


class AnchorTokenError(AnchorError):
    """The token that holds an anchor is not here, or does not do what is asked."""


class Anchor(NamedTuple):
    """An anchor as a keyring names it."""

    id: str
    provider: str


class Anchors(Protocol):
    """Where anchors live."""

    @property
    def providers(self) -> tuple[str, ...]:
        """The names by which a keyring says that an anchor is one of these."""

    def create(self, version: int) -> Anchor:
        """Make the anchor of a version."""

    def key(self, anchor_id: str, store_id: bytes, version: int) -> bytearray:
        """Return the key that seals V_v, 32 bytes."""

    def check(self, anchor_id: str) -> None:
        """Raise AnchorError where an anchor is out of reach, so that it cannot be destroyed now."""

    def destroy(self, anchor_id: str) -> None:
        """Destroy an anchor; returns when it is gone, also if it was gone before."""

    def generation(self, store_id: bytes) -> int:
        """Return the highest keyring generation seen, 0 if none."""

    def set_generation(self, store_id: bytes, generation: int) -> None:
        """Record a keyring generation."""


class _Folder:
    """The anchors folder: every provider keeps the record of generations there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder and mark it as one that backups skip."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        encoding.create(self._folder / "CACHEDIR.TAG", _CACHEDIR_TAG)

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


class FileAnchors(_Folder):
    """Anchors as files of 32 random bytes.

    Overwritten in place and removed: what a file system that copies on write, a snapshot or a flash disk still holds of
    one is out of reach, so never *purge*.
    """

    providers = ("file",)

    def create(self, version: int) -> Anchor:
        """Make the anchor of a version.

        Raises:
            FileExistsError: There is one.
        """
        name = f"anchor-{version}"
        encoding.create(self._folder / name, secrets.token_bytes(32))
        return Anchor(name, "file")

    def key(self, anchor_id: str, store_id: bytes, version: int) -> bytearray:
        """Return the key that seals V_v.

        Raises:
            AnchorError: The anchor is not here or is damaged.
        """
        if anchor_id != f"anchor-{version}":
            raise AnchorError(f"version {version} names an anchor of another version")
        secret = bytearray(33)
        try:
            with (self._folder / anchor_id).open("rb", buffering=0) as file:
                length = file.readinto(secret)
        except OSError as error:
            raise AnchorError(f"the anchor of version {version} cannot be read: {error.strerror}") from error
        try:
            if length != 32:
                raise AnchorError(f"the anchor of version {version} is damaged")
            info = context("derive/anchor", store_id, u32(version))
            return bytearray(derive(memoryview(secret)[:32], 32, info))
        finally:
            secret[:] = bytes(33)

    def check(self, anchor_id: str) -> None:
        """Raise AnchorError where the anchors folder is not here."""
        if not self._folder.is_dir():
            raise AnchorError(f"the anchors folder {self._folder} is not here")

    def destroy(self, anchor_id: str) -> None:
        """Overwrite an anchor with random bytes, durably, and then remove it, durably.

        After a crash in between it can be called again; where the file is gone already, it says so durably.

        Raises:
            AnchorError: The anchor cannot be overwritten or removed; it is still there.
        """
        if not _FILE_ID.fullmatch(anchor_id):
            raise AnchorError(f"{anchor_id!r} is not the name of an anchor file")
        path = self._folder / anchor_id
        try:
            with contextlib.suppress(FileNotFoundError):
                _overwrite(path)
                path.unlink()
            encoding.sync_folder(self._folder)
        except OSError as error:
            raise AnchorError(f"the anchor {path} cannot be destroyed: {error.strerror}") from error


class TokenAnchors(_Folder):
    """Anchors as non-extractable HMAC keys of a PKCS#11 token, one a version.

    A token that is only software purges nothing: its anchors are of a provider, and so of a grade, of their own.
    """

    providers = ("pkcs11", "pkcs11-software")

    def __init__(self, folder: Path, attach: Callable[[], AttachedToken]) -> None:
        """Use a token that is attached for each use: it need not be there between two, and no PIN is kept.

        Args:
            folder: The anchors folder, for the record of generations.
            attach: Logs in; what it returns is closed here.
        """
        super().__init__(folder)
        self._attach = attach

    def create(self, version: int) -> Anchor:
        """Make the anchor of a version; its id is the key's label and the token's serial number.

        Raises:
            AnchorTokenError: The token is not here or cannot make it.
        """
        # Random: a token can hold anchors of several stores, and one that a crash left without a keyring naming it.
        label = f"strongroom-anchor-{version}-{secrets.token_hex(16)}"
        with _as_anchor_error(f"an anchor for version {version} cannot be made"), self._attach() as token:
            token.create_key(label)
            return Anchor(f"{label}@{token.serial}", self.providers[token.software])

    def key(self, anchor_id: str, store_id: bytes, version: int) -> bytearray:
        """Return the key that seals V_v.

        Raises:
            AnchorTokenError: The token is not here, or the anchor is not on it.
            AnchorError: The id is none of this version's.
        """
        found = _TOKEN_ID.fullmatch(anchor_id)
        if found is None or int(found[1]) != version:
            raise AnchorError(f"version {version} names an anchor of another version")
        label = anchor_id.partition("@")[0]
        with _as_anchor_error(f"the anchor of version {version} cannot be used"), self._attach() as token:
            # A token of another serial number may be the one that replaces the first, with its keys.
            if not token.has_key(label):
                _must_be(token, found)
            return token.hmac(label, context("derive/anchor-token", store_id, u32(version)))

    def check(self, anchor_id: str) -> None:
        """Raise AnchorTokenError where the token that an anchor was made on is not here."""
        found = _token_id(anchor_id)
        with _as_anchor_error(f"the anchor of version {found[1]} is out of reach"), self._attach() as token:
            _must_be(token, found)

    def destroy(self, anchor_id: str) -> None:
        """Destroy an anchor on the token that it was made on.

        Raises:
            AnchorError: It is not proved that the anchor is gone.
        """
        found = _token_id(anchor_id)
        with _as_anchor_error(f"the anchor of version {found[1]} cannot be destroyed"), self._attach() as token:
            # Another token of the same label has no such key either, and that would look like a destroyed one.
            _must_be(token, found)
            token.destroy_key(anchor_id.partition("@")[0])


class AnchorSet:
    """The anchors of several providers side by side; new ones come from the first. All use one anchors folder."""

    def __init__(self, first: Anchors, *others: Anchors) -> None:
        self.first = first
        self._by_provider = {name: anchors for anchors in (*reversed(others), first) for name in anchors.providers}

    def of(self, provider: str) -> Anchors:
        """Return the anchors of a provider.

        Raises:
            AnchorError: It is not in this set.
        """
        try:
            return self._by_provider[provider]
        except KeyError:
            named = " (keys.anchor_token)" if provider in TokenAnchors.providers else ""
            raise AnchorError(f"no anchors of the kind {provider!r} are configured{named}") from None

    def generation(self, store_id: bytes) -> int:
        """Return the highest keyring generation seen.

        Raises:
            AnchorError: The record is missing or damaged, or is another store's.
        """
        return self.first.generation(store_id)

    def set_generation(self, store_id: bytes, generation: int) -> None:
        """Record a keyring generation durably."""
        self.first.set_generation(store_id, generation)


def _overwrite(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise AnchorError(f"the anchor {path} is not a file; it was not destroyed")
        view = memoryview(secrets.token_bytes(max(32, found.st_size)))
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_anchor_error(what: str) -> Iterator[None]:
    try:
        yield
    except TokenError as error:
        raise AnchorTokenError(f"{what}: {error}") from error


def _token_id(anchor_id: str) -> re.Match[str]:
    found = _TOKEN_ID.fullmatch(anchor_id)
    if found is None:
        raise AnchorError(f"{anchor_id!r} is not the name of an anchor on a token")
    return found


def _must_be(token: AttachedToken, anchor: re.Match[str]) -> None:
    if anchor[2] != token.serial:
        raise TokenError(
            f"it is on the token {token.label!r} with serial number {_serial(anchor[2])}, "
            f"attached is {_serial(token.serial)}: attach the other"
        )


def _serial(text: str) -> str:
    return bytes.fromhex(text).decode("ascii", "replace") or "none"
