"""Seals: what they are bound to is one place only, and anything but the whole message does not open."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keys.seal import (
    CHUNK_BYTES,
    MINIMUM_SEALED,
    PREFIX_BYTES,
    SLICE_BYTES,
    TAG_BYTES,
    Sealer,
    SealError,
    context,
    derive,
    open_parts,
    open_sealed,
    plain_length,
    seal,
    sealed_length,
    u32,
    u64,
)

QUICK = settings(deadline=None, derandomize=True, max_examples=300)
KEY = bytes(range(32))
BOUND = context("dataset", b"pack", b"object")
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, SLICE_BYTES, SLICE_BYTES + 5]
CHUNK = CHUNK_BYTES + TAG_BYTES

labels = st.sampled_from(["dataset", "attributes", "study-key", "keyring", "slot", "version-root"])
fields = st.lists(st.one_of(st.binary(max_size=6), st.sampled_from([b"", b"\0\0\0\1", b"\0\0\0\0"])), max_size=4)


def text(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@QUICK
@given(st.tuples(labels, fields), st.tuples(labels, fields))
@example(("slot", [b"ab", b""]), ("slot", [b"a", b"b"]))
@example(("slot", [b"ab"]), ("slot", [b"a", b"b"]))
@example(("slot", []), ("slot", [b""]))
@example(("slot", [b""]), ("slot", [b"", b""]))
@example(("slot", [b"\0\0\0\0"]), ("slot", [b"", b""]))
@example(("dataset", []), ("data", [b"set"]))
def test_different_fields_give_a_different_context(
    one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]
) -> None:
    assert (context(one[0], *one[1]) == context(other[0], *other[1])) == (one == other)


def test_a_context_is_the_bytes_of_the_page_that_describes_it() -> None:
    assert context("slot", b"ab", b"") == b"strongroom/1/slot\0" + b"\0\0\0\2ab" + b"\0\0\0\0"
    assert (u32(258), u64(258)) == (bytes.fromhex("00000102"), bytes.fromhex("0000000000000102"))


@pytest.mark.parametrize(("field", "number"), [(u32, 2**32), (u32, -1), (u64, 2**64), (u64, -1)])
def test_a_number_that_does_not_fit_its_field_is_an_error_not_another_number(field: object, number: int) -> None:
    with pytest.raises(OverflowError):
        field(number)  # type: ignore[operator]


@pytest.mark.parametrize("length", [16, 32, 48, 64])
def test_keys_are_derived_as_the_page_says(length: int) -> None:
    assert derive(bytearray(KEY), length, b"info") == HKDFExpand(SHA512(), length, b"info").derive(KEY)
    assert derive(KEY, length, context("derive/index", b"a")) != derive(KEY, length, context("derive/ledger", b"a"))


@pytest.mark.parametrize("size", SIZES)
def test_a_message_opens_as_it_was_sealed_and_has_the_length_that_was_told(size: int) -> None:
    sealed = seal(text(size), KEY, BOUND)
    assert len(sealed) == sealed_length(size) == 56 + size + 16 * (size // 16_384 + 1)
    assert plain_length(len(sealed)) == size
    assert open_sealed(sealed, KEY, BOUND) == text(size)
    assert b"".join(open_parts([sealed[i : i + 50_000] for i in range(0, len(sealed), 50_000)], KEY, BOUND)) == text(
        size
    )


def test_a_message_sealed_in_pieces_opens_as_one() -> None:
    message = text(2 * SLICE_BYTES + 100)
    sealer = Sealer(KEY, BOUND)
    buffer = memoryview(bytearray(SLICE_BYTES + 2 * 1024 + CHUNK))
    sealed = bytearray()
    for start in range(0, len(message), 700_000):
        count = sealer.update_into(memoryview(message)[start : start + 700_000], buffer)
        sealed += buffer[:count]
    sealed += sealer.finalize()
    assert len(sealed) == sealed_length(len(message))
    assert open_sealed(sealed, KEY, BOUND) == message


def test_no_two_seals_of_a_message_are_alike() -> None:
    assert len({seal(b"message", KEY, BOUND)[:24] for _ in range(50)}) == 50


@QUICK
@given(st.integers(0, 1 << 50))
@example(0)
@example(CHUNK_BYTES - 1)
@example(CHUNK_BYTES)
def test_lengths_are_told_both_ways(plain: int) -> None:
    assert plain_length(sealed_length(plain)) == plain
    assert sealed_length(plain + 1) > sealed_length(plain)


@QUICK
@given(st.integers(-100, 3 * CHUNK + 200))
@example(PREFIX_BYTES + CHUNK)
@example(PREFIX_BYTES + CHUNK + TAG_BYTES - 1)
@example(MINIMUM_SEALED - 1)
def test_a_length_that_no_message_seals_to_is_an_error(sealed: int) -> None:
    possible = {sealed_length(p) for p in range(max(0, sealed - PREFIX_BYTES - 5 * TAG_BYTES), max(1, sealed))}
    try:
        assert sealed_length(plain_length(sealed)) == sealed
        assert sealed in possible
    except SealError:
        assert sealed not in possible


MESSAGE = text(2 * CHUNK_BYTES + 100)
SEALED = seal(MESSAGE, KEY, BOUND)
CHUNKS = [SEALED[i : i + CHUNK] for i in range(PREFIX_BYTES, len(SEALED), CHUNK)]
PREFIX = SEALED[:PREFIX_BYTES]
OTHER = seal(MESSAGE, KEY, BOUND)


def opens(sealed: bytes, key: bytes = KEY, bound: bytes = BOUND) -> bool:
    try:
        assert open_sealed(sealed, key, bound) == MESSAGE
    except SealError as error:
        assert str(error) == "a sealed message does not open"
        return False
    return True


@pytest.mark.parametrize(
    "sealed",
    [
        b"",
        PREFIX,
        PREFIX + CHUNKS[0],
        PREFIX + CHUNKS[0] + CHUNKS[1],
        PREFIX + CHUNKS[2],
        PREFIX + CHUNKS[1] + CHUNKS[0] + CHUNKS[2],
        PREFIX + CHUNKS[0] + CHUNKS[0] + CHUNKS[2],
        PREFIX + CHUNKS[0] + CHUNKS[2],
        PREFIX + CHUNKS[0] + CHUNKS[2] + CHUNKS[1],
        SEALED + b"\0",
        SEALED + CHUNKS[2],
        SEALED + SEALED,
        OTHER[:PREFIX_BYTES] + SEALED[PREFIX_BYTES:],
        OTHER[:24] + SEALED[24:],
        SEALED[: PREFIX_BYTES + CHUNK] + OTHER[PREFIX_BYTES + CHUNK :],
        bytes(len(SEALED)),
    ],
    ids=[
        "nothing", "no chunk", "one chunk", "two full chunks", "the last chunk alone", "chunks swapped",
        "a chunk twice", "a chunk left out", "the last chunk moved", "a byte more",
        "a chunk more", "a message more", "another prefix",
        "another salt", "chunks of another seal", "zeros",
    ],
)  # fmt: skip
def test_a_message_that_is_cut_or_put_together_anew_does_not_open(sealed: bytes) -> None:
    assert opens(SEALED)
    assert not opens(sealed)


def test_a_message_cut_anywhere_does_not_open() -> None:
    edges = [PREFIX_BYTES + n * CHUNK + d for n in range(3) for d in (-1, 0, 1, 15, 16, 17)]
    for length in {*range(100), *edges, *random.Random(1).sample(range(len(SEALED)), 50)}:
        assert not opens(SEALED[:length])


def test_a_message_with_a_changed_byte_does_not_open() -> None:
    for offset in {*range(MINIMUM_SEALED + 8), *random.Random(2).sample(range(len(SEALED)), 100), len(SEALED) - 1}:
        changed = bytearray(SEALED)
        changed[offset] ^= 1 << offset % 8
        assert not opens(bytes(changed))


@pytest.mark.parametrize(
    ("key", "bound"),
    [
        (bytes(32), BOUND),
        (KEY[::-1], BOUND),
        (KEY, b""),
        (KEY, context("attributes", b"pack", b"object")),
        (KEY, context("dataset", b"object", b"pack")),
        (KEY, context("dataset", b"packo", b"bject")),
        (KEY, BOUND + b"\0"),
    ],
)
def test_a_message_does_not_open_under_another_key_or_in_another_place(key: bytes, bound: bytes) -> None:
    assert not opens(SEALED, key, bound)


def test_parts_that_come_before_a_cut_are_authentic_and_the_end_is_an_error() -> None:
    parts = []
    with pytest.raises(SealError):
        for part in open_parts([SEALED[: PREFIX_BYTES + CHUNK], SEALED[PREFIX_BYTES + CHUNK : -1]], KEY, BOUND):
            parts.append(part)  # noqa: PERF402
    assert MESSAGE.startswith(b"".join(parts))
    assert b"".join(parts) != MESSAGE
