"""The vault's stream to the desk: cut or altered anywhere, nothing short is taken for whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storescp import handover
from storescp.handover import BrokenError, HandoverError, Instance, Kind, Manifest, Taking

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
CONTENTS = [b"abcdef", b"", b"x" * 20]


def instance(sop: str, length: int) -> Instance:
    return Instance("1.2.3", "1.2.3.4", sop, CT, EXPLICIT, "CT1", length)


def stream(contents: list[bytes], *, size: int = 4, broken: int = -1) -> bytes:
    """Return a stream as the vault makes it; the instance of a number does not open at its end."""
    made = handover.announce(Manifest(len(contents), sum(map(len, contents)), [Kind(CT, EXPLICIT, len(contents))]))
    for number, content in enumerate(contents):
        made += handover.announce(instance(f"1.2.{number}", len(content)))
        for start in range(0, len(content), size):
            piece = content[start : start + size]
            made += handover.part(len(piece)) + piece
        made += handover.BROKEN if number == broken else handover.WHOLE
    return made


def taken(parts: Iterator[bytes]) -> list[tuple[Instance, bytes | None]]:
    """Return what a stream gives: each instance with its content, None where it does not open."""
    found: list[tuple[Instance, bytes | None]] = []
    for announced, pieces in Taking(parts).instances():
        try:
            found.append((announced, b"".join(pieces)))
        except BrokenError:
            found.append((announced, None))
    return found


def test_a_stream_gives_what_was_put_in_however_it_is_cut() -> None:
    whole = stream(CONTENTS)
    expected = [(instance(f"1.2.{n}", len(c)), c) for n, c in enumerate(CONTENTS)]
    assert taken(iter([whole])) == expected
    assert taken(iter([whole[i : i + 1] for i in range(len(whole))])) == expected
    for cut in range(len(whole)):
        assert taken(iter([whole[:cut], b"", whole[cut:]])) == expected


def test_a_stream_that_ends_anywhere_is_an_error() -> None:
    whole = stream(CONTENTS)
    for cut in range(len(whole)):
        with pytest.raises(HandoverError):
            taken(iter([whole[:cut]]))


def test_a_stream_that_goes_on_is_an_error() -> None:
    with pytest.raises(HandoverError, match="goes on"):
        taken(iter([stream(CONTENTS), b"\0"]))
    assert len(taken(iter([stream(CONTENTS), b"", b""]))) == len(CONTENTS)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_byte_that_is_altered_is_an_error_or_leaves_every_length_as_it_was_said(flip: int) -> None:
    whole = stream(CONTENTS)
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= flip
        try:
            found = taken(iter([bytes(altered)]))
        except HandoverError:
            continue
        assert len(found) == len(CONTENTS)
        assert [len(content or b"") for _, content in found] == [len(content) for content in CONTENTS]
        assert [announced.length for announced, _ in found] == [len(content) for content in CONTENTS]


def test_an_instance_that_does_not_open_leaves_the_others() -> None:
    for broken in range(len(CONTENTS)):
        found = taken(iter([stream(CONTENTS, broken=broken)]))
        assert [content for _, content in found] == [None if n == broken else c for n, c in enumerate(CONTENTS)]


def test_what_is_not_read_is_skipped() -> None:
    whole = stream(CONTENTS, broken=2)
    assert [announced.sop for announced, _ in Taking(iter([whole])).instances()] == ["1.2.0", "1.2.1", "1.2.2"]
    half = Taking(iter([stream(CONTENTS, size=2)])).instances()
    _, pieces = next(half)
    assert bytes(next(pieces)) == b"ab"
    assert [announced.sop for announced, _ in half] == ["1.2.1", "1.2.2"]


@pytest.mark.parametrize("change", [-1, 1])
def test_an_instance_of_another_length_than_was_said_is_an_error(change: int) -> None:
    made = handover.announce(Manifest(1, 6, [])) + handover.announce(instance("1.2", 6 + change))
    made += handover.part(6) + b"abcdef" + handover.WHOLE
    with pytest.raises(HandoverError, match="than was said"):
        taken(iter([made]))


@pytest.mark.parametrize(
    "head",
    [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", b"\0\0\0\1\xff", (1 << 20).to_bytes(4, "big") + b"{}"],
)
def test_an_announcement_that_is_none_is_an_error(head: bytes) -> None:
    with pytest.raises(HandoverError):
        Taking(iter([head]))


def test_a_part_that_is_too_long_is_refused_before_it_comes() -> None:
    made = handover.announce(Manifest(1, 1 << 40, [])) + handover.announce(instance("1.2", 1 << 40))
    with pytest.raises(HandoverError, match="too long"):
        taken(iter([made + handover.part((16 << 20) + 1)]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_stream_or_the_one_error(data: bytes) -> None:
    for content in (data, handover.announce(Manifest(2, 4, [])) + data):
        with contextlib.suppress(HandoverError):
            taken(iter([content]))
