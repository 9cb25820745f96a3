"""Signed documents: what this store signed under this label, and nothing else, to the last bit."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from keys import signed
from keys.signed import SignedError

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
DOCUMENT = {"id": "3f9a", "packs": ["ab", "cd"], "name": "größer", "number": 7}
FILE = signed.write("certificate", DOCUMENT, SIGNING)


def refused(content: bytes, label: str = "certificate", key: bytes = PUBLIC) -> bool:
    try:
        signed.read(label, content, key)
    except SignedError:
        return True
    return False


@pytest.mark.parametrize("document", [DOCUMENT, {}, [], "text with \n a line feed", 7, None])
def test_a_document_comes_back_as_it_was_signed(document: Any) -> None:
    assert signed.read("certificate", signed.write("certificate", document, SIGNING), PUBLIC) == document


def test_the_file_is_two_lines_and_the_signature_is_over_label_and_document() -> None:
    content, signature, rest = FILE.split(b"\n")
    assert rest == b""
    assert content == '{"id":"3f9a","name":"größer","number":7,"packs":["ab","cd"]}'.encode()
    # Written out here: whoever verifies one without this program must come to the same bytes.
    bound = b"strongroom/1/certificate\0"
    Ed25519PublicKey.from_public_bytes(PUBLIC).verify(base64.b64decode(signature), bound + content)


def test_another_label_is_refused() -> None:
    for label in ("fence", "certificat", "certificate2", ""):
        assert refused(FILE, label)
    assert refused(signed.write("fence", DOCUMENT, SIGNING))


def test_another_stores_key_is_refused() -> None:
    assert refused(FILE, key=OTHER.public_key().public_bytes_raw())
    assert refused(signed.write("certificate", DOCUMENT, OTHER))
    for key in (b"", bytes(31), bytes(33)):
        assert refused(FILE, key=key)


def test_every_flipped_bit_is_refused() -> None:
    # Those of the last base64 digit that decoders pass over, too.
    for place in range(len(FILE)):
        for bit in range(8):
            changed = bytearray(FILE)
            changed[place] ^= 1 << bit
            assert refused(bytes(changed)), (place, bit)


def test_every_cut_and_every_byte_more_is_refused() -> None:
    for place in range(len(FILE)):
        assert refused(FILE[:place])
        assert refused(FILE[:place] + b" " + FILE[place:])
    for more in (b"\n", b"x", b"\0", FILE):
        assert refused(FILE + more)
        assert refused(more + FILE)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n\n", b"{}\n\xff\n", b"[" * 100_000 + b"\nAA==\n", bytes(1000)])
def test_what_is_no_signed_document_is_refused_with_the_one_error(content: bytes) -> None:
    assert refused(content)
