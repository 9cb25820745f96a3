"""A key pair of whoever forwards audit messages: the vault seals to its public half what lies in the spool.

The pair is no key of the store: it opens messages that wait to be sent, and nothing else.
Source: docs/audit-forwarding.md, "The spool".
"""

from __future__ import annotations

import msgspec
from cryptography.exceptions import InvalidTag
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
from keys.seal import KEY_BYTES, SealError, context, open_sealed, seal
from keys.versions import WRAPPED_BYTES, new_key

PRIVATE_BYTES = 96
_MLKEM_SEED_BYTES = 64
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class _PublicFile(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    mlkem768: bytes
    x25519: bytes


class Recipient:
    """The public half: seals, opens nothing. ``id`` tells one from another: 32 hex digits."""

    def __init__(self, mlkem768: bytes, x25519: bytes) -> None:
        self._mlkem768, self._x25519 = mlkem768, x25519
        self._key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(mlkem768), X25519PublicKey.from_public_bytes(x25519)
        )
        digest = Hash(SHA256())
        digest.update(mlkem768 + x25519)
        self.id = digest.finalize()[:16].hex()

    def seal(self, content: bytes, store_id: bytes, name: str) -> bytes:
        """Return content that only the private half opens, bound to a store and a name: 1,168 bytes and the seal."""
        key, place = new_key(), context("audit-forward", store_id, name.encode())
        return _SUITE.encrypt(key, self._key, info=place) + seal(content, key, place)

    def file(self) -> bytes:
        """Return the content of the file in which it is published."""
        return encoding.canonical(_PublicFile(1, self._mlkem768, self._x25519))


def read_recipient(content: bytes) -> Recipient:
    """Return the public half in a file.

    Raises:
        ValueError: It is none.
    """
    try:
        file = encoding.decode(content, _PublicFile)
        if file.format != 1:
            raise ValueError("a format that this release does not know")
        return Recipient(file.mlkem768, file.x25519)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


class ForwardingKey:
    """Both halves."""

    def __init__(self, private: bytes) -> None:
        """Take 96 bytes of a private half.

        Raises:
            ValueError: They are not as many.
        """
        if len(private) != PRIVATE_BYTES:
            raise ValueError(f"a forwarding key has {PRIVATE_BYTES} bytes")
        mlkem768 = MLKEM768PrivateKey.from_seed_bytes(private[:_MLKEM_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(private[_MLKEM_SEED_BYTES:])
        self._private = MLKEM768X25519PrivateKey(mlkem768, x25519)
        self.recipient = Recipient(mlkem768.public_key().public_bytes_raw(), x25519.public_key().public_bytes_raw())

    def open(self, sealed: bytes, store_id: bytes, name: str) -> bytes:
        """Return what was sealed to the public half.

        Raises:
            SealError: It was changed, or sealed to another, for another store or name.
        """
        place = context("audit-forward", store_id, name.encode())
        try:
            key = _SUITE.decrypt(sealed[:WRAPPED_BYTES], self._private, info=place)
        except (InvalidTag, ValueError):
            raise SealError("audit messages were not sealed to this key") from None
        return open_sealed(sealed[WRAPPED_BYTES:], key, place)


def new_private() -> bytes:
    """Return a new private half, 96 bytes."""
    return bytes(new_key() + new_key() + new_key())


assert PRIVATE_BYTES == 3 * KEY_BYTES  # noqa: S101
