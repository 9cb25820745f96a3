"""A data set that goes out while it comes: whole however it is cut, and never ended before it is."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from storescp.gate import wire
from storescp.gate.wire import WireError

MAXIMA = (7, 8, 9, 16, 17, 64, 0)


def read(pdus: Iterator[bytes], maximum: int) -> tuple[bytes, bool, list[int]]:
    """Return what a receiver gets, whether the last fragment came, and the lengths of the fragments."""
    reader = wire.Reader(maximum or 1 << 17)
    content, last, sizes = b"", False, []
    for pdu in pdus:
        sizes.append(len(pdu) - 12)
        for event in reader.receive(memoryview(pdu)):
            assert isinstance(event, wire.Fragment)
            assert (event.context_id, event.command, last) == (5, False, False)
            content += event.data
            last = event.last
    assert reader.between
    return content, last, sizes


def test_any_cutting_gives_the_same_full_fragments_of_even_length() -> None:
    chance = random.Random(3)
    for maximum in MAXIMA:
        for _ in range(150):
            data = chance.randbytes(2 * chance.randrange(200))
            cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(9)))
            parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
            stream = wire.data_stream(5, map(memoryview, parts), length=len(data), maximum=maximum)
            content, last, sizes = read(stream, maximum)
            assert (content, last) == (data, True)
            assert len(set(sizes[:-1])) <= 1
            # DCMTK ends an association over a fragment of an odd length.
            assert maximum < 8 or not any(size % 2 for size in sizes)


def test_parts_that_are_used_again_by_who_gives_them_do_no_harm() -> None:
    memory = bytearray(8)

    def parts() -> Iterator[memoryview]:
        for number in range(10):
            memory[:] = bytes([number]) * 8
            yield memoryview(memory)

    content, last, _ = read(wire.data_stream(5, parts(), length=80, maximum=18), 18)
    assert (content, last) == (b"".join(bytes([n]) * 8 for n in range(10)), True)


@pytest.mark.parametrize("length", [0, 2, 7, 9, 100])
@pytest.mark.parametrize("parts", [[b"abcdefgh"], [b"abcd", b"efgh"], [b"abcdefgh", b""]])
def test_another_length_than_was_said_is_an_error_and_nothing_is_ended(length: int, parts: list[bytes]) -> None:
    given = []
    with pytest.raises(WireError, match="than was said"):
        given.extend(wire.data_stream(5, parts, length=length, maximum=10))
    assert not read(iter(given), 10)[1]


@pytest.mark.parametrize("after", range(6))
def test_what_fails_while_it_is_read_is_never_ended_even_with_all_its_bytes(after: int) -> None:
    def parts() -> Iterator[bytes]:
        for number in range(6):
            if number == after:
                raise KeyError
            yield b"ab" if number < 5 else b""
        raise KeyError

    given = []
    with pytest.raises(KeyError):
        given.extend(wire.data_stream(5, parts(), length=10, maximum=8))
    assert not read(iter(given), 8)[1]


@pytest.mark.parametrize("maximum", range(1, 7))
def test_a_receiver_without_room_is_an_error(maximum: int) -> None:
    with pytest.raises(WireError, match="no room"):
        list(wire.data_stream(5, [b"ab"], length=2, maximum=maximum))


def test_a_command_and_a_small_data_set_have_even_fragments_too() -> None:
    pdus = wire.data_pdus(5, command=False, content=bytes(100), maximum=17)
    content, last, sizes = read(iter([pdus]), 17)
    assert (content, last, sizes) == (bytes(100), True, [len(pdus) - 12])
    assert pdus[11] == 0
    assert int.from_bytes(pdus[2:6], "big") == 6 + 10
