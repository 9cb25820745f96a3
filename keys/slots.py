"""Slots: the ways to unlock a store. Each seals the store root key under a key of its own.

A kind of slot is two functions: make parameters and a slot key, and find the slot key again from a secret.
Source: docs/format.md, section 4.
"""

from __future__ import annotations

import secrets
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from keys import encoding
from keys.seal import SealError, context, derive, open_sealed, seal

MINIMUM_PASSPHRASE = 12
_KEY_FILE_HEADER = b"STRONGROOM-KEY-FILE-1"

# What the machine of a store can spend to check one passphrase: about half a second and 256 MiB.
ARGON2_MEMORY_KIB = 262_144
ARGON2_ITERATIONS = 3
ARGON2_LANES = 4


class UnlockError(Exception):
    """No slot opens with this secret. One constant message, whatever was wrong."""

    def __init__(self) -> None:
        super().__init__("this does not unlock the store")


class WeakPassphraseError(ValueError):
    """A passphrase is too easily guessed; the message says why."""


class KeyFileError(ValueError):
    """A key file cannot be read or is none."""


class Slot(msgspec.Struct, forbid_unknown_fields=True):
    """One way to unlock, as the keyring's clear header holds it."""

    created: str
    id: str
    label: str
    parameters: dict[str, Any]
    sealed: bytes
    type: str


class Passphrase(msgspec.Struct):
    """A passphrase as typed."""

    text: str


class KeyFile(msgspec.Struct):
    """The secret of a key file, 32 bytes."""

    secret: bytes


Secret = Passphrase | KeyFile


def check_passphrase(text: str) -> None:
    """Refuse a passphrase that is short or easily guessed.

    Raises:
        WeakPassphraseError: With the reason and what would help.
    """
    if len(text) < MINIMUM_PASSPHRASE:
        raise WeakPassphraseError(
            f"the passphrase has {len(text)} characters; at least {MINIMUM_PASSPHRASE} are needed"
        )
    from zxcvbn import zxcvbn

    # zxcvbn looks at 72 characters at most; a longer passphrase is judged by its beginning.
    result = zxcvbn(text[:72])
    if result["score"] < 4:
        feedback = result["feedback"]
        reason = feedback["warning"].rstrip(".") or "it is guessed too easily"
        hints = " ".join(feedback["suggestions"])
        raise WeakPassphraseError(f"the passphrase is too weak: {reason}. {hints}".rstrip())


def new_key_file() -> bytes:
    """Return the content of a new key file."""
    return _KEY_FILE_HEADER + b"\n" + encoding.to_base64(secrets.token_bytes(32)) + b"\n"


def read_key_file(path: Path) -> KeyFile:
    """Return the secret in a key file.

    Raises:
        KeyFileError: It is missing, readable by others, or no key file.
    """
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            content = file.read(1024)
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(f"the key file {path} is open to others; 'chmod 600 {path}'")
    try:
        return parse_key_file(content)
    except ValueError:
        raise KeyFileError(f"{path} is not a Strongroom key file") from None


def parse_key_file(content: bytes) -> KeyFile:
    """Return the secret in a key file's content.

    Raises:
        ValueError: It is not one.
    """
    lines = content.split(b"\n")
    if len(lines) != 3 or lines[0] != _KEY_FILE_HEADER or lines[2]:
        raise ValueError("not a key file")
    secret = encoding.from_base64(lines[1].decode("ascii"))
    if len(secret) != 32:
        raise ValueError("not a key file")
    return KeyFile(secret)


def make_slot(secret: Secret, root_key: bytes | bytearray, store_id: bytes, *, label: str, created: str) -> Slot:
    """Return a slot that opens with ``secret``; it was opened again before this returns."""
    slot_id = secrets.token_bytes(16)
    if isinstance(secret, Passphrase):
        kind = "passphrase"
        parameters: dict[str, Any] = {
            "iterations": ARGON2_ITERATIONS,
            "lanes": ARGON2_LANES,
            "memory_kib": ARGON2_MEMORY_KIB,
            "salt": encoding.to_base64(secrets.token_bytes(16)).decode(),
        }
    else:
        kind = "key-file"
        parameters = {}
    slot = Slot(created, slot_id.hex(), label, parameters, b"", kind)
    slot.sealed = seal(root_key, _slot_key(slot, secret, store_id), _slot_context(slot, store_id))
    if open_slot(slot, secret, store_id) != root_key:
        raise SealError("a new slot does not open")
    return slot


def open_slot(slot: Slot, secret: Secret, store_id: bytes) -> bytearray:
    """Return the store root key.

    Raises:
        SealError: The secret is another one, or the slot was changed.
    """
    return bytearray(open_sealed(slot.sealed, _slot_key(slot, secret, store_id), _slot_context(slot, store_id)))


def unlock(slots: list[Slot], secret: Secret, store_id: bytes) -> bytearray:
    """Return the store root key from whichever slot of the secret's kind opens.

    Raises:
        UnlockError: None does.
    """
    kind = "passphrase" if isinstance(secret, Passphrase) else "key-file"
    for slot in slots:
        if slot.type == kind:
            try:
                return open_slot(slot, secret, store_id)
            except SealError:
                continue
    raise UnlockError


def _slot_id(slot: Slot) -> bytes:
    try:
        return bytes.fromhex(slot.id)
    except ValueError:
        raise SealError("a slot's id is not acceptable") from None


def _slot_context(slot: Slot, store_id: bytes) -> bytes:
    digest = Hash(SHA256())
    digest.update(encoding.canonical(slot.parameters))
    return context("slot", store_id, _slot_id(slot), slot.type.encode(), digest.finalize())


def _slot_key(slot: Slot, secret: Secret, store_id: bytes) -> bytes:
    if isinstance(secret, KeyFile):
        return derive(secret.secret, 32, context("derive/slot-key-file", store_id, _slot_id(slot)))
    try:
        parameters = msgspec.convert(slot.parameters, _Argon2Parameters)
        text = unicodedata.normalize("NFKC", secret.text).encode()
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise SealError("a slot's parameters, or the passphrase, are not acceptable") from None
    return Argon2id(
        salt=parameters.salt,
        length=32,
        iterations=parameters.iterations,
        lanes=parameters.lanes,
        memory_cost=parameters.memory_kib,
    ).derive(text)


class _Argon2Parameters(msgspec.Struct, forbid_unknown_fields=True):
    # A keyring file is input too: whoever can change it must not make us spend all memory.
    iterations: int
    lanes: int
    memory_kib: int
    salt: bytes

    def __post_init__(self) -> None:
        if not (1 <= self.iterations <= 64 and 1 <= self.lanes <= 16 and len(self.salt) == 16):
            raise ValueError("out of bounds")
        if not 8 * self.lanes <= self.memory_kib <= 4 << 20:
            raise ValueError("out of bounds")
