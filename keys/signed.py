"""Small signed documents: canonical JSON and the store's Ed25519 signature over it, a line each.

Whoever has the store's public key can check one; the label says what it is, so that one never passes for another.
"""

from __future__ import annotations

from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from keys import encoding
from keys.seal import context


class SignedError(Exception):
    """A document was changed, is another one, or another store signed it."""


def write(label: str, document: Any, signing: Ed25519PrivateKey) -> bytes:
    """Return a document with its signature."""
    content = encoding.canonical(document)
    return content + b"\n" + encoding.to_base64(signing.sign(context(label) + content)) + b"\n"


def read(label: str, signed: bytes, signing_key: bytes) -> Any:
    """Return a document.

    Args:
        label: What it is.
        signed: As ``write`` returned it.
        signing_key: The store's raw Ed25519 public key.

    Raises:
        SignedError: It is no such document of this store.
    """
    try:
        content, signature, rest = signed.split(b"\n")
        if rest:
            raise ValueError
        raw = encoding.from_base64(signature.decode("ascii"))
        # Decoders let unused bits of the last digit pass: a changed file would hold all the same.
        if encoding.to_base64(raw) != signature:
            raise ValueError
        Ed25519PublicKey.from_public_bytes(signing_key).verify(raw, context(label) + content)
        return msgspec.json.decode(content)
    except (InvalidSignature, ValueError, msgspec.MsgspecError, RecursionError):
        raise SignedError("this store did not sign it, or it was changed") from None
