"""Slots: the ways to unlock a store. Each seals the store root key under a key of its own.

A kind of slot is a name and two functions: make parameters, and find the slot key again from parameters and a secret.
Source: docs/format.md, section 4.
"""

from __future__ import annotations

import secrets
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from keys import encoding
from keys.seal import SealError, context, derive, open_sealed, seal
from keys.secret import (
    MINIMUM_PASSPHRASE,
    Credential,
    CredentialError,
    KeyFile,
    KeyFileError,
    Passphrase,
    Secret,
    Token,
    TokenPlace,
    WeakPassphraseError,
    check_passphrase,
    new_key_file,
    parse_key_file,
    read_credential,
    read_key_file,
)
from keys.token import AttachedToken, TokenError, WrongPinError, is_attached

__all__ = [
    "MINIMUM_PASSPHRASE",
    "Credential",
    "CredentialError",
    "KeyFile",
    "KeyFileError",
    "Passphrase",
    "Secret",
    "Slot",
    "Token",
    "TokenPlace",
    "UnlockError",
    "WeakPassphraseError",
    "check_passphrase",
    "is_known",
    "make_slot",
    "new_key_file",
    "open_slot",
    "opening",
    "parse_key_file",
    "read_credential",
    "read_key_file",
    "renew_slot",
    "unlock",
]

# What the machine of a store can spend to check one passphrase: about half a second and 256 MiB.
ARGON2_MEMORY_KIB = 262_144
ARGON2_ITERATIONS = 3
ARGON2_LANES = 4


class UnlockError(Exception):
    """No slot opens with this secret. One constant message, whatever was wrong."""

    def __init__(self) -> None:
        super().__init__("this does not unlock the store")


class Slot(msgspec.Struct, forbid_unknown_fields=True):
    """One way to unlock, as the keyring's clear header holds it."""

    created: str
    id: str
    label: str
    parameters: dict[str, Any]
    sealed: bytes
    type: str


def make_slot(secret: Secret, root_key: bytes | bytearray, store_id: bytes, *, label: str, created: str) -> Slot:
    """Return a slot that opens with ``secret``; it was opened again before this returns.

    Raises:
        CredentialError: The credential is not here.
        TokenError: The token is not here, or cannot do what is needed.
    """
    kind = _kind_of(secret)
    slot_id = secrets.token_bytes(16)
    slot = Slot(created, slot_id.hex(), label, kind.make(secret, slot_id), b"", kind.name)
    key = _slot_key(slot, secret, store_id)
    slot.sealed = seal(root_key, key, _slot_context(slot, store_id))
    _zero(key)
    opened = open_slot(slot, secret, store_id)
    same = opened == root_key
    _zero(opened)
    if not same:
        raise SealError("a new slot does not open")
    return slot


def renew_slot(slot: Slot, secret: Secret, root_key: bytes | bytearray, store_id: bytes) -> Slot:
    """Return a slot for the same secret, label and time, with an id, parameters and thus a slot key of its own.

    Raises:
        CredentialError: The credential is not here.
        TokenError: The token is not here, or cannot do what is needed.
    """
    if isinstance(secret, Token):
        parameters = _token_parameters(slot)
        secret = Token(secret.pin, TokenPlace(parameters.module, parameters.token, parameters.key))
    return make_slot(secret, root_key, store_id, label=slot.label, created=slot.created)


def open_slot(slot: Slot, secret: Secret, store_id: bytes) -> bytearray:
    """Return the store root key.

    Raises:
        SealError: The secret is another one, or the slot was changed.
        CredentialError: The credential is not here.
        TokenError: The token is not here, or the PIN is another one.
    """
    key = _slot_key(slot, secret, store_id)
    try:
        return bytearray(open_sealed(slot.sealed, key, _slot_context(slot, store_id)))
    finally:
        _zero(key)


def opening(slots: Sequence[Slot], secret: Secret, store_id: bytes) -> Iterator[tuple[Slot, bytearray]]:
    """Yield each slot that a secret opens, with the store root key.

    A PIN is given to one token, and after a wrong one no other slot is tried.

    Raises:
        UnlockError: None does.
        CredentialError: The credential is not here, and no slot opens.
        TokenError: The token is not here or fails, or it is not clear for which token the PIN is; and no slot opens.
    """
    kind = _kind_of(secret)
    tried = [slot for slot in slots if slot.type == kind.name]
    if isinstance(secret, Token):
        tried = _on_one_token(tried, secret)
    trouble: Exception = UnlockError()
    opened = False
    for slot in tried:
        try:
            root_key = open_slot(slot, secret, store_id)
        except SealError:
            continue
        except WrongPinError as error:
            raise UnlockError from error
        except (CredentialError, TokenError) as error:
            trouble = error
            continue
        opened = True
        yield slot, root_key
    if not opened:
        raise trouble


def unlock(slots: Sequence[Slot], secret: Secret, store_id: bytes) -> bytearray:
    """Return the store root key from whichever slot of the secret's kind opens.

    Raises:
        UnlockError: None does.
        CredentialError: The credential is not here.
        TokenError: The token is not here or fails, or it is not clear for which token the PIN is.
    """
    return next(opening(slots, secret, store_id))[1]


def is_known(slot: Slot) -> bool:
    """Tell whether this release can open slots of this one's kind."""
    return any(slot.type == kind.name for kind in _KINDS.values())


def _slot_id(slot: Slot) -> bytes:
    try:
        return bytes.fromhex(slot.id)
    except ValueError:
        raise SealError("a slot's id is not acceptable") from None


def _slot_context(slot: Slot, store_id: bytes) -> bytes:
    digest = Hash(SHA256())
    digest.update(encoding.canonical(slot.parameters))
    return context("slot", store_id, _slot_id(slot), slot.type.encode(), digest.finalize())


def _slot_key(slot: Slot, secret: Secret, store_id: bytes) -> bytearray:
    return bytearray(_kind_of(secret).find(slot, secret, store_id))


def _zero(key: bytearray) -> None:
    key[:] = bytes(len(key))


_P = TypeVar("_P")


def _parameters(slot: Slot, kind: type[_P]) -> _P:
    try:
        return msgspec.convert(slot.parameters, kind)
    except msgspec.ValidationError:
        raise SealError("a slot's parameters are not acceptable") from None


def _salt() -> str:
    return encoding.to_base64(secrets.token_bytes(16)).decode()


# --- the kinds


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


def _make_passphrase(_secret: Passphrase, _slot_id: bytes) -> dict[str, Any]:
    return {
        "iterations": ARGON2_ITERATIONS,
        "lanes": ARGON2_LANES,
        "memory_kib": ARGON2_MEMORY_KIB,
        "salt": _salt(),
    }


def _find_passphrase(slot: Slot, secret: Passphrase, _store_id: bytes) -> bytes:
    parameters = _parameters(slot, _Argon2Parameters)
    try:
        text = unicodedata.normalize("NFKC", secret.text).encode()
    except UnicodeEncodeError:
        raise SealError("the passphrase is no text") from None
    return Argon2id(
        salt=parameters.salt,
        length=32,
        iterations=parameters.iterations,
        lanes=parameters.lanes,
        memory_cost=parameters.memory_kib,
    ).derive(text)


def _make_key_file(_secret: KeyFile, _slot_id: bytes) -> dict[str, Any]:
    return {}


def _find_key_file(slot: Slot, secret: KeyFile, store_id: bytes) -> bytes:
    return derive(secret.secret, 32, context("derive/slot-key-file", store_id, _slot_id(slot)))


class _CredentialParameters(msgspec.Struct, forbid_unknown_fields=True):
    name: str


def _make_credential(secret: Credential, _slot_id: bytes) -> dict[str, Any]:
    return {"name": secret.name}


def _find_credential(slot: Slot, secret: Credential, store_id: bytes) -> bytes:
    if _parameters(slot, _CredentialParameters).name != secret.name:
        raise SealError("a slot is for a credential of another name")
    return _find_key_file(slot, read_credential(secret.name), store_id)


class _TokenParameters(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    module: str
    salt: bytes
    token: str

    def __post_init__(self) -> None:
        if len(self.salt) != 16 or not (self.key and self.module and self.token):
            raise ValueError("out of bounds")


def _token_parameters(slot: Slot) -> _TokenParameters:
    return _parameters(slot, _TokenParameters)


def _make_token(secret: Token, slot_id: bytes) -> dict[str, Any]:
    place = secret.place
    if place is None:
        raise TokenError("a slot on a token needs the module's path and the token's label")
    key = place.key or f"strongroom-slot-{slot_id.hex()}"
    with AttachedToken(place.module, place.token, secret.pin) as token:
        if not token.has_key(key):
            token.create_key(key)
        token.check_key(key)
    return {"key": key, "module": place.module, "salt": _salt(), "token": place.token}


def _find_token(slot: Slot, secret: Token, store_id: bytes) -> bytearray:
    parameters = _token_parameters(slot)
    bound_to = context("derive/slot-token", store_id, _slot_id(slot), parameters.salt)
    with AttachedToken(parameters.module, parameters.token, secret.pin) as token:
        return token.hmac(parameters.key, bound_to)


def _on_one_token(slots: list[Slot], secret: Token) -> list[Slot]:
    """Return the slots on the one token that a PIN can be for: tried on others, it would use up their attempts."""
    by_token: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots:
        try:
            found = _token_parameters(slot)
        except SealError:
            continue
        place = secret.place
        if place is None or (
            (place.module, place.token) == (found.module, found.token) and place.key in {"", found.key}
        ):
            by_token.setdefault((found.module, found.token), []).append(slot)
    if len(by_token) <= 1:
        return [slot for group in by_token.values() for slot in group]
    trouble: TokenError | None = None
    attached = []
    for module, label in by_token:
        try:
            if is_attached(module, label):
                attached.append((module, label))
        except TokenError as error:
            trouble = trouble or error
    names = ", ".join(repr(label) for _, label in attached or by_token)
    if len(attached) == 1:
        return by_token[attached[0]]
    if attached:
        raise TokenError(f"tokens {names} are attached: say for which one the PIN is, or leave only that one in")
    raise trouble or TokenError(f"no token of {names} is attached")


class _Kind(NamedTuple):
    """One kind of slot. A new one, such as a key of a KMS, is a type of secret and a line in the table."""

    name: str
    # Make the parameters of a new slot: from the secret and the slot's id.
    make: Callable[[Any, bytes], dict[str, Any]]
    # Find the slot key, 32 bytes: from the slot, the secret and the store id. SealError where they cannot fit.
    find: Callable[[Slot, Any, bytes], bytes | bytearray]


_KINDS: dict[type[Secret], _Kind] = {
    Passphrase: _Kind("passphrase", _make_passphrase, _find_passphrase),
    KeyFile: _Kind("key-file", _make_key_file, _find_key_file),
    Credential: _Kind("credential", _make_credential, _find_credential),
    Token: _Kind("token", _make_token, _find_token),
}


def _kind_of(secret: Secret) -> _Kind:
    return _KINDS[type(secret)]
