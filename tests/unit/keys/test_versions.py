"""A version's deposit key: study keys and audit records that it seals open for it alone, each only as what it is."""

from __future__ import annotations

import random

import pytest

from keys.seal import SealError, context, sealed_length
from keys.versions import WRAPPED_BYTES, Version

STORE, OTHER = bytes(range(16)), bytes(16)
ONE = Version(STORE, 1, bytes(range(32)))
PLACE = context("audit", STORE, bytes(8), bytes(32))
RECORD = b'{"time":"2026-01-31T12:00:00Z","type":"vault-started"}'
SEALED = ONE.deposit_key().seal_record(RECORD, PLACE)


def opens(sealed: bytes, version: Version = ONE, place: bytes = PLACE) -> bool:
    try:
        assert version.open_record(sealed, place) == RECORD
    except SealError:
        return False
    return True


@pytest.mark.parametrize("size", [0, 1, 16_384, 256 << 10])
def test_an_audit_record_opens_as_it_was_sealed_and_has_the_length_that_the_page_says(size: int) -> None:
    content = random.Random(size).randbytes(size)
    sealed = ONE.deposit_key().seal_record(content, PLACE)
    assert ONE.open_record(sealed, PLACE) == content
    assert len(sealed) == WRAPPED_BYTES + sealed_length(size) == 1168 + sealed_length(size)


@pytest.mark.parametrize(
    "version",
    [
        Version(STORE, 1, bytes(32)),
        Version(STORE, 2, bytes(range(32))),
        Version(OTHER, 1, bytes(range(32))),
    ],
    ids=["another root", "another number", "another store"],
)
def test_an_audit_record_opens_with_no_other_version(version: Version) -> None:
    assert opens(SEALED)
    assert not opens(SEALED, version)


@pytest.mark.parametrize(
    "place", [b"", PLACE[:-1], PLACE + b"\0", context("audit", STORE, bytes(7) + b"\1", bytes(32)), context("audit")]
)
def test_an_audit_record_opens_in_no_other_place(place: bytes) -> None:
    assert not opens(SEALED, place=place)


def test_an_audit_record_that_is_cut_or_changed_anywhere_does_not_open() -> None:
    chance = random.Random(1)
    for length in {*range(80), WRAPPED_BYTES - 1, WRAPPED_BYTES, WRAPPED_BYTES + 1, len(SEALED) - 1}:
        assert not opens(SEALED[:length])
    for at in {0, 1119, 1120, WRAPPED_BYTES - 1, WRAPPED_BYTES, *chance.sample(range(len(SEALED)), 60)}:
        assert not opens(SEALED[:at] + bytes([SEALED[at] ^ 1]) + SEALED[at + 1 :])
    assert not opens(SEALED + b"\0")
    other = ONE.deposit_key().seal_record(RECORD, PLACE)
    assert not opens(other[:WRAPPED_BYTES] + SEALED[WRAPPED_BYTES:])


def test_no_two_seals_of_a_record_share_a_key() -> None:
    assert len({ONE.deposit_key().seal_record(RECORD, PLACE)[:32] for _ in range(20)}) == 20


def test_a_study_key_never_opens_as_an_audit_record_nor_a_record_as_a_study_key() -> None:
    key, key_id = bytes(range(32)), bytes(16)
    wrapped = ONE.deposit_key().wrap(key, key_id)
    assert ONE.unwrap_deposit(wrapped, key_id) == key
    # Whoever knows the study key could make the seal that belongs to it; the label keeps both apart all the same.
    for place in (PLACE, key_id, context("deposit", STORE, bytes(3) + b"\1", key_id)):
        with pytest.raises(SealError):
            ONE.open_record(wrapped + SEALED[WRAPPED_BYTES:], place)
    for bound in (key_id, PLACE, PLACE[:16]):
        with pytest.raises(SealError):
            ONE.unwrap_deposit(SEALED[:WRAPPED_BYTES], bound)
