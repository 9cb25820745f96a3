"""The upper layer: whatever bytes come, however they are cut, the same events or the same refusal."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storescp.gate import wire
from storescp.gate.wire import Fragment, Pdu, Reader, WireError

MAXIMUM = 64
BODY_LIMIT = 1 << 20
LONG = "a P-DATA-TF PDU is longer than was negotiated"
NO_ITEM = "a P-DATA-TF PDU holds no item"
UNKNOWN = "a PDU of an unknown type"
IMPOSSIBLE = "a PDU has an impossible length"
WITHIN = "a P-DATA-TF PDU ends within an item's header"
MISFIT = "an item's length does not fit its PDU"
CONTROL = "an item has an unknown control bit"

Event = tuple[object, ...]


def pdu(kind: int, body: bytes, length: int | None = None) -> bytes:
    return struct.pack(">BBI", kind, 0, len(body) if length is None else length) + body


def item(context: int, control: int, data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">IBB", len(data) + 2 if length is None else length, context, control) + data


def data(*items: bytes, length: int | None = None) -> bytes:
    return pdu(wire.P_DATA_TF, b"".join(items), length)


def pieces(content: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    ends = [0, *sorted({c for c in cuts if 0 < c < len(content)}), len(content)]
    return (content[a:b] for a, b in pairwise(ends))


def outcome(parts: Iterable[bytes], maximum: int = MAXIMUM) -> tuple[list[Event], str]:
    """Return the events, fragments of a message joined, and the error; after an error only whole messages count."""
    reader = Reader(maximum)
    found: list[Event] = []
    error = ""
    try:
        for part in parts:
            for event in reader.receive(memoryview(part)):
                if isinstance(event, Pdu):
                    found.append(("pdu", event.kind, event.content))
                    continue
                one: Event = (event.context_id, event.command, event.last, bytes(event.data))
                if found and found[-1][0] == one[0] and found[-1][1:3] == (one[1], False):
                    one = (*one[:3], bytes(found.pop()[3]) + bytes(event.data))  # type: ignore[call-overload]
                found.append(one)
            assert len(reader._part) <= BODY_LIMIT
    except WireError as raised:
        error = str(raised)
        while found and found[-1][2] is False:
            found.pop()
    return found, error


REQUEST = pdu(wire.ASSOCIATE_RQ, b"request!")
RELEASE = pdu(wire.RELEASE_RQ, bytes(4))
ABORT = pdu(wire.ABORT, bytes((0, 0, 2, 1)))

STREAMS: list[tuple[str, bytes, list[Event], str]] = [
    ("nothing", b"", [], ""),
    ("a request", REQUEST, [("pdu", 1, REQUEST)], ""),
    ("the start of a header", REQUEST[:5], [], ""),
    ("the start of a body", REQUEST[:13], [], ""),
    ("two PDUs", RELEASE + ABORT, [("pdu", 5, RELEASE), ("pdu", 7, ABORT)], ""),
    ("every short PDU", b"".join(pdu(k, b"abcd") for k in (3, 5, 6, 7)),
     [("pdu", k, pdu(k, b"abcd")) for k in (3, 5, 6, 7)], ""),
    ("an accepted association", pdu(2, b"abcd"), [("pdu", 2, pdu(2, b"abcd"))], ""),
    ("a command", data(item(1, 3, b"abc")), [(1, True, True, b"abc")], ""),
    ("a data set in two PDUs", data(item(1, 0, b"abc")) + data(item(1, 2, b"de")), [(1, False, True, b"abcde")], ""),
    ("a data set in two items", data(item(1, 0, b"abc"), item(1, 2, b"de")), [(1, False, True, b"abcde")], ""),
    ("command and data set in one PDU", data(item(3, 3, b"c"), item(3, 2, b"d")),
     [(3, True, True, b"c"), (3, False, True, b"d")], ""),
    ("fragments of two contexts", data(item(1, 0, b"a"), item(3, 0, b"b")),
     [(1, False, False, b"a"), (3, False, False, b"b")], ""),
    ("an empty last fragment", data(item(1, 0, b"a"), item(1, 2, b"")), [(1, False, True, b"a")], ""),
    ("an empty fragment alone", data(item(255, 3, b"")), [(255, True, True, b"")], ""),
    ("an open fragment", data(item(1, 2, b"ab", 12), length=16), [(1, False, False, b"ab")], ""),
    ("the longest PDU", data(item(1, 2, bytes(MAXIMUM - 6))), [(1, False, True, bytes(MAXIMUM - 6))], ""),
    ("the reserved byte of a header is not looked at", b"\x05\xff" + RELEASE[2:],
     [("pdu", 5, b"\x05\xff" + RELEASE[2:])], ""),
    ("a PDU longer than negotiated", data(length=MAXIMUM + 1), [], LONG),
    ("a PDU of the greatest length", data(length=0xFFFFFFFF), [], LONG),
    ("a PDU without an item", data(), [], NO_ITEM),
    ("a PDU shorter than an item's header", data(b"abcde"), [], NO_ITEM),
    ("type 0", pdu(0, bytes(4)), [], UNKNOWN),
    ("type 8", pdu(8, bytes(4)), [], UNKNOWN),
    ("a TLS hello", b"\x16\x03\x01\x02\x00\x01", [], UNKNOWN),
    ("HTTP", b"GET / HTTP/1.1\r\n", [], UNKNOWN),
    *((f"type {k} of {n} bytes", pdu(k, b"", n), [], IMPOSSIBLE) for k in (1, 2) for n in (0, 3, BODY_LIMIT + 1)),
    *((f"type {k} of {n} bytes", pdu(k, b"", n), [], IMPOSSIBLE) for k in (3, 5, 6, 7) for n in (0, 3, 5, 1 << 31)),
    *((f"{n} bytes after an item", data(item(1, 3, b"abc"), bytes(n)), [], WITHIN) for n in range(1, 6)),
    ("a rest after an empty item", data(item(1, 3, b""), b"x"), [], WITHIN),
    ("an item length of 0", data(item(1, 3, b"", 0)), [], MISFIT),
    ("an item length of 1", data(item(1, 3, b"", 1)), [], MISFIT),
    ("an item one byte longer than its PDU", data(item(1, 3, b"ab", 5)), [], MISFIT),
    ("an item of the greatest length", data(item(1, 3, b"ab", 0xFFFFFFFF)), [], MISFIT),
    ("a second item beyond the PDU", data(item(1, 3, b"a"), item(1, 2, b"", 3)), [(1, True, True, b"a")], MISFIT),
    *((f"control {c:#x}", data(item(1, c, b"a")), [], CONTROL) for c in (4, 8, 16, 32, 64, 128, 7, 255)),
    ("an error after a whole PDU", RELEASE + pdu(9, b"abcd"), [("pdu", 5, RELEASE)], UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(("stream", "events", "error"), [s[1:] for s in STREAMS], ids=[s[0] for s in STREAMS])
def test_a_stream_gives_its_events_or_its_error_however_it_is_cut(
    stream: bytes, events: list[Event], error: str
) -> None:
    wanted = (events, error)
    assert outcome([stream]) == wanted
    assert outcome(stream[i : i + 1] for i in range(len(stream))) == wanted
    assert outcome([b"", stream, b""]) == wanted
    for seed in range(20):
        chance = random.Random(seed)
        assert outcome(pieces(stream, [chance.randrange(len(stream) + 1) for _ in range(3)])) == wanted


@pytest.mark.parametrize("stream", [s[1] for s in STREAMS if s[0].startswith(("a request", "two", "every", "a comm"))])
def test_bytes_after_a_whole_pdu_belong_to_the_next(stream: bytes) -> None:
    events = outcome([stream])[0]
    assert outcome([stream + RELEASE[:5]]) == (events, "")
    assert outcome([stream + RELEASE]) == ([*events, ("pdu", 5, RELEASE)], "")
    assert outcome([stream + b"\xff" * 6]) == (events, UNKNOWN)


def test_before_an_association_no_data_is_taken() -> None:
    assert outcome([data(item(1, 3, b"a"))], maximum=0) == ([], LONG)


def test_a_reader_says_whether_it_is_between_two_pdus() -> None:
    stream = REQUEST + data(item(1, 0, b"ab"), item(1, 2, b"c"))
    reader = Reader(MAXIMUM)
    between = [0]
    for position in range(len(stream)):
        list(reader.receive(memoryview(stream)[position : position + 1]))
        if reader.between:
            between.append(position + 1)
    assert between == [0, len(REQUEST), len(stream)]


def test_the_longest_request_is_collected_and_let_go() -> None:
    reader = Reader(0)
    longest = pdu(wire.ASSOCIATE_RQ, bytes(BODY_LIMIT))
    assert list(reader.receive(memoryview(longest)[:-1])) == []
    assert len(reader._part) == BODY_LIMIT - 1
    assert list(reader.receive(memoryview(longest)[-1:])) == [Pdu(wire.ASSOCIATE_RQ, longest)]
    assert not reader._part


def test_a_fragment_is_handed_on_as_it_comes_and_not_kept() -> None:
    reader = Reader(1 << 30)
    list(reader.receive(memoryview(data(item(1, 2, b"", (1 << 29) + 2), length=(1 << 29) + 6))))
    block = memoryview(bytes(1 << 20))
    for number in range(512):
        (event,) = reader.receive(block)
        assert isinstance(event, Fragment)
        assert (len(event.data), event.last) == (1 << 20, number == 511)
        assert not reader._part
    assert reader.between


def test_the_bytes_of_a_fragment_are_those_received_not_a_copy() -> None:
    received = bytearray(data(item(1, 2, b"abc")))
    (event,) = Reader(MAXIMUM).receive(memoryview(received))
    assert isinstance(event, Fragment)
    received[-3:] = b"xyz"
    assert bytes(event.data) == b"xyz"


valid = st.one_of(
    st.sampled_from([REQUEST, RELEASE, ABORT]),
    st.lists(st.builds(item, st.integers(0, 255), st.integers(0, 3), st.binary(max_size=9)), min_size=1, max_size=3)
    .map(lambda items: data(*items)),
)  # fmt: skip
streams = st.one_of(
    st.binary(max_size=80),
    st.lists(st.one_of(valid, valid, st.binary(max_size=8)), max_size=6).map(b"".join),
    # A valid stream with one byte changed gets further in than any random one.
    st.tuples(st.lists(valid, min_size=1, max_size=5).map(b"".join), st.integers(0, 10**6), st.integers(0, 255)).map(
        lambda t: t[0][: t[1] % len(t[0])] + bytes([t[2]]) + t[0][t[1] % len(t[0]) + 1 :]
    ),
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(streams, st.lists(st.integers(0, 100), max_size=6))
@example(data(item(1, 3, b"abcdef"), b"x"), [14])
def test_any_bytes_give_the_same_events_or_the_same_error_however_they_are_cut(stream: bytes, cuts: list[int]) -> None:
    whole = outcome([stream])
    assert outcome(pieces(stream, cuts)) == whole
    assert outcome(stream[i : i + 1] for i in range(len(stream))) == whole


@pytest.mark.parametrize("maximum", [7, 8, 100, 4096, 16_384, 1 << 17, 1 << 18, 0])
@pytest.mark.parametrize("command", [True, False])
def test_what_is_written_is_read_again_and_fits_the_maximum(maximum: int, command: bool) -> None:
    room = min(maximum or 1 << 17, 1 << 17) - 6
    for size in {0, 1, room - 1, room, room + 1, 2 * room - 1, 2 * room, 2 * room + 1}:
        content = random.Random(size).randbytes(size)
        written = wire.data_pdus(5, command=command, content=content, maximum=maximum)
        assert outcome([written], maximum=room + 6) == ([(5, command, True, content)], "")
        assert len(written) == len(content) + 12 * max(1, -(-size // room))


@pytest.mark.parametrize("maximum", range(1, 7))
def test_a_receiver_with_no_room_for_a_byte_gets_an_error_of_the_protocol(maximum: int) -> None:
    with pytest.raises(WireError):
        wire.data_pdus(1, command=True, content=b"abc", maximum=maximum)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (wire.release_reply(), "06 00 00000004 00000000"),
        (wire.abort(reason=2), "07 00 00000004 00 00 02 02"),
        (wire.abort(reason=2, by_user=True), "07 00 00000004 00 00 00 00"),
        (wire.reject(permanent=True, source=1, reason=7), "03 00 00000004 00 01 01 07"),
        (wire.reject(permanent=False, source=3, reason=2), "03 00 00000004 00 02 03 02"),
    ],
)
def test_short_pdus_are_the_standards_bytes(written: bytes, wanted: str) -> None:
    assert written == bytes.fromhex(wanted)
    assert outcome([written]) == ([("pdu", written[0], written)], "")
