"""The one symmetric construction: Cobblestone-256, and the contexts that bind a seal to its place.

Source: C2SP chunked-encryption, Cobblestone-256; docs/format.md, section 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

KEY_BYTES = 32
PREFIX_BYTES = 56
CHUNK_BYTES = 16_384
TAG_BYTES = 16
MINIMUM_SEALED = PREFIX_BYTES + TAG_BYTES

# Cobblestone holds the GIL while it works; a slice of this size keeps other threads waiting under 0.2 ms.
SLICE_BYTES = 1 << 20

Key = bytes | bytearray | memoryview


class SealError(Exception):
    """A sealed message does not open: it was changed, cut, or is bound to another key or place."""


def u32(number: int) -> bytes:
    """Return a field of a context or file as 4 bytes, big-endian."""
    return number.to_bytes(4, "big")


def u64(number: int) -> bytes:
    """Return a field of a context or file as 8 bytes, big-endian."""
    return number.to_bytes(8, "big")


def context(label: str, *fields: bytes) -> bytes:
    """Return what a seal, derivation or signature is bound to: a label and fields, each with its length."""
    return b"".join([b"strongroom/1/", label.encode("ascii"), b"\0", *(u32(len(f)) + f for f in fields)])


def derive(secret: Key, length: int, info: bytes) -> bytes:
    """Return ``length`` bytes of HKDF-Expand (RFC 5869, SHA-512) from a uniformly random secret."""
    return HKDFExpand(algorithm=SHA512(), length=length, info=info).derive(bytes(secret))


def sealed_length(plain: int) -> int:
    """Return how many bytes a message of ``plain`` bytes has once sealed."""
    return PREFIX_BYTES + plain + TAG_BYTES * (plain // CHUNK_BYTES + 1)


def plain_length(sealed: int) -> int:
    """Return how many bytes a sealed message of ``sealed`` bytes holds.

    Raises:
        SealError: No message seals to this length.
    """
    body = sealed - PREFIX_BYTES
    chunks = body // (CHUNK_BYTES + TAG_BYTES) + 1
    plain = body - chunks * TAG_BYTES
    if plain < 0 or sealed_length(plain) != sealed:
        raise SealError("no message has this sealed length")
    return plain


class Sealer:
    """Seals one message, given in pieces, into buffers of the caller's."""

    def __init__(self, key: Key, bound_to: bytes) -> None:
        self._encryptor = Cobblestone256Encryptor(key, bound_to)

    def update_into(self, data: memoryview, into: memoryview) -> int:
        """Seal ``data`` (at most SLICE_BYTES) into ``into`` and return the bytes written.

        ``into`` needs ``len(data)`` bytes and 1,024 to spare for each MiB or part, plus one chunk.
        """
        return self._encryptor.update_into(data, into)

    def finalize(self) -> bytes:
        """Return the last chunk; without it what was sealed before does not open."""
        return self._encryptor.finalize()


def seal(message: bytes | bytearray, key: Key, bound_to: bytes) -> bytes:
    """Return a small message sealed: 56 bytes of salt and commitment, ciphertext, 16 bytes a chunk."""
    encryptor = Cobblestone256Encryptor(key, bound_to)
    return encryptor.update(message) + encryptor.finalize()


def open_sealed(sealed: bytes | memoryview, key: Key, bound_to: bytes) -> bytes:
    """Return the message in ``sealed``.

    Raises:
        SealError: It does not open whole under this key and context.
    """
    return b"".join(open_parts([sealed], key, bound_to))


def open_parts(parts: Iterable[bytes | memoryview], key: Key, bound_to: bytes) -> Iterator[bytes]:
    """Yield the plaintext of a sealed message that comes in parts.

    What is yielded is authentic, but only the end of the iteration says that it is complete: a caller that
    passes parts on must make its receiver fail when this raises.

    Raises:
        SealError: The message does not open; raised at the part where that shows, at the latest at the end.
    """
    decryptor = Cobblestone256Decryptor(key, bound_to)
    try:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), SLICE_BYTES):
                plain = decryptor.update(view[start : start + SLICE_BYTES])
                if plain:
                    yield plain
        last = decryptor.finalize()
    except InvalidTag:
        raise SealError("a sealed message does not open") from None
    if last:
        yield last
