"""What a version's root V_v derives: the storage key W_v, the database keys I_v, the deposit key pair D_v.

The gate uses the public half alone (``DepositKey``); everything else needs V_v.
Source: docs/format.md, sections 1, 2.1 and 6.
"""

from __future__ import annotations

import secrets

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from keys import encoding
from keys.seal import KEY_BYTES, SealError, context, derive, open_sealed, seal, u32, u64

WRAPPED_BYTES = 1168
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class SignatureError(Exception):
    """A signed file was changed, or another store signed it."""


def store_id_of(signing_key: bytes) -> bytes:
    """Return the 16-byte id of the store whose raw Ed25519 public key this is."""
    digest = Hash(SHA256())
    digest.update(signing_key)
    return digest.finalize()[:16]


class _DepositFile(msgspec.Struct, forbid_unknown_fields=True):
    created: str
    format: int
    mlkem768: bytes
    store_id: str
    version: int
    x25519: bytes


class DepositKey:
    """The public half of D_v: wraps study keys, opens nothing."""

    def __init__(self, store_id: bytes, version: int, mlkem768: bytes, x25519: bytes) -> None:
        self.store_id = store_id
        self.version = version
        self._mlkem768 = mlkem768
        self._x25519 = x25519
        self._key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(mlkem768), X25519PublicKey.from_public_bytes(x25519)
        )

    def wrap(self, study_key: bytes | bytearray, key_id: bytes) -> bytes:
        """Return the study key HPKE-sealed for the vault: 1,168 bytes."""
        return _SUITE.encrypt(study_key, self._key, info=_deposit_info(self.store_id, self.version, key_id))

    def seal_record(self, content: bytes, bound_to: bytes) -> bytes:
        """Return an audit record that only the vault opens, once it is unlocked: 1,168 bytes of key, then the seal."""
        key = new_key()
        return _SUITE.encrypt(key, self._key, info=_record_info(self.store_id, self.version, bound_to)) + seal(
            content, key, bound_to
        )

    def signed_file(self, signing: Ed25519PrivateKey, created: str) -> bytes:
        """Return the content of ``public/deposit-<v>.key``."""
        payload = encoding.canonical(
            _DepositFile(created, 1, self._mlkem768, self.store_id.hex(), self.version, self._x25519)
        )
        return payload + b"\n" + encoding.to_base64(signing.sign(context("deposit-key") + payload)) + b"\n"


def read_deposit_key(content: bytes, signing_key: bytes) -> DepositKey:
    """Return the deposit key in a signed file.

    Args:
        content: The file.
        signing_key: The store's raw Ed25519 public key, 32 bytes, pinned by the reader.

    Raises:
        SignatureError: The file is malformed, was changed, or belongs to another store.
    """
    try:
        payload, signature, rest = content.split(b"\n")
        if rest:
            raise ValueError
        Ed25519PublicKey.from_public_bytes(signing_key).verify(
            encoding.from_base64(signature.decode("ascii")), context("deposit-key") + payload
        )
        file = encoding.decode(payload, _DepositFile)
        if file.format != 1 or file.store_id != store_id_of(signing_key).hex():
            raise ValueError
        return DepositKey(bytes.fromhex(file.store_id), file.version, file.mlkem768, file.x25519)
    except (InvalidSignature, ValueError, msgspec.MsgspecError):
        raise SignatureError("the deposit key is not signed by this store") from None


class Version:
    """One key version, opened: derives its keys from V_v once and wraps or unwraps study keys."""

    def __init__(self, store_id: bytes, version: int, root: bytes | bytearray) -> None:
        self.store_id = store_id
        self.version = version
        self._root = bytearray(root)
        self._storage_key = bytearray(self._derive("storage-key", KEY_BYTES))
        self._private = MLKEM768X25519PrivateKey(
            MLKEM768PrivateKey.from_seed_bytes(self._derive("deposit-mlkem768", 64)),
            X25519PrivateKey.from_private_bytes(self._derive("deposit-x25519", 32)),
        )

    def _derive(self, what: str, length: int) -> bytes:
        return derive(self._root, length, context(f"derive/{what}", self.store_id, u32(self.version)))

    def index_key(self) -> tuple[bytes, bytes]:
        """Return the SQLCipher key (32 bytes) and salt (16 bytes) of the index."""
        material = self._derive("index", 48)
        return material[:32], material[32:]

    def ledger_key(self) -> tuple[bytes, bytes]:
        """Return the SQLCipher key (32 bytes) and salt (16 bytes) of the ledger."""
        material = self._derive("ledger", 48)
        return material[:32], material[32:]

    def deposit_key(self) -> DepositKey:
        """Return the half that gates may have."""
        mlkem768 = MLKEM768PrivateKey.from_seed_bytes(self._derive("deposit-mlkem768", 64))
        x25519 = X25519PrivateKey.from_private_bytes(self._derive("deposit-x25519", 32))
        return DepositKey(
            self.store_id,
            self.version,
            mlkem768.public_key().public_bytes_raw(),
            x25519.public_key().public_bytes_raw(),
        )

    def unwrap_deposit(self, wrapped: bytes, key_id: bytes) -> bytearray:
        """Return the study key of a deposit.

        Raises:
            SealError: It was not wrapped for this version and key id.
        """
        try:
            key = _SUITE.decrypt(wrapped, self._private, info=_deposit_info(self.store_id, self.version, key_id))
        except (InvalidTag, ValueError):
            raise SealError("a deposit's study key does not open") from None
        if len(key) != KEY_BYTES:
            raise SealError("a deposit's study key has a wrong length")
        return bytearray(key)

    def open_record(self, sealed: bytes, bound_to: bytes) -> bytes:
        """Return an audit record that was sealed while the vault was locked.

        Raises:
            SealError: It was not sealed for this version and place.
        """
        info = _record_info(self.store_id, self.version, bound_to)
        try:
            key = _SUITE.decrypt(sealed[:WRAPPED_BYTES], self._private, info=info)
        except (InvalidTag, ValueError):
            raise SealError("an audit record's key does not open") from None
        return open_sealed(sealed[WRAPPED_BYTES:], key, bound_to)

    def wrap_study(self, study_key: bytes | bytearray, place: StudyKeyPlace) -> bytes:
        """Return the study key sealed under W_v, 104 bytes, bound to its pack."""
        return seal(study_key, self._storage_key, place.context(self.store_id, self.version))

    def unwrap_study(self, sealed: bytes, place: StudyKeyPlace) -> bytearray:
        """Return the study key of an archived pack.

        Raises:
            SealError: The record was changed, moved or rolled back, or the pack is not the one it was made for.
        """
        return bytearray(open_sealed(sealed, self._storage_key, place.context(self.store_id, self.version)))

    def forget(self) -> None:
        """Zero what can be zeroed of this version's secrets."""
        for secret in (self._root, self._storage_key):
            secret[:] = bytes(len(secret))


class StudyKeyPlace(msgspec.Struct, frozen=True):
    """What a wrapped study key is bound to besides store and version: exactly one pack, with exactly its records."""

    pack_id: bytes
    key_id: bytes
    study_tag: bytes
    length: int
    frames_digest: bytes
    admission: int

    def context(self, store_id: bytes, version: int) -> bytes:
        """Return the context of label ``study-key``."""
        return context(
            "study-key",
            store_id,
            self.pack_id,
            self.key_id,
            self.study_tag,
            u32(version),
            u64(self.length),
            self.frames_digest,
            u64(self.admission),
        )


def new_key() -> bytearray:
    """Return 32 random bytes."""
    return bytearray(secrets.token_bytes(KEY_BYTES))


def _record_info(store_id: bytes, version: int, bound_to: bytes) -> bytes:
    return context("audit-deposit", store_id, u32(version), bound_to)


def _deposit_info(store_id: bytes, version: int, key_id: bytes) -> bytes:
    return context("deposit", store_id, u32(version), key_id)
