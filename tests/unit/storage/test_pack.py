"""The pack format: what is written is read again, and any other byte is refused or passed over as the page says."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage import pack
from storage.pack import FRAME_BYTES, PAGE, WRAPPED_BYTES, Frame, Header, PackError, Read

QUICK = settings(deadline=None, derandomize=True, max_examples=300)
STORE, KEY, OBJECT = bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48))
WRAPPED = random.Random(1).randbytes(WRAPPED_BYTES)
DEPOSIT = Header(STORE, KEY, 3, WRAPPED)
ADMITTED = Header(STORE, KEY, 0, b"")
CUT = "a pack ends within its header"
UNKNOWN = "not a pack of a known version"
RESERVED = "a reserved byte of a pack's header is set"
CARRIES = "an admitted pack carries a deposit's key"
FRAME_CUT = "a frame is cut short"
NO_FRAME = "no frame where one should be"
LENGTHS = "a frame has impossible lengths"
BEYOND = "a record goes beyond its pack"


def changed(page: bytes, offset: int, value: bytes) -> bytes:
    return page[:offset] + value + page[offset + len(value) :]


# --- the header


@pytest.mark.parametrize("header", [DEPOSIT, ADMITTED, Header(bytes(16), bytes(16), 2**32 - 1, WRAPPED)])
def test_a_header_is_read_as_it_was_written(header: Header) -> None:
    page = header.encode()
    assert len(page) == PAGE
    assert pack.parse_header(page) == header
    assert header.bound() == page[: pack.BOUND_BYTES]


def test_a_header_is_the_bytes_of_the_page_that_describes_it() -> None:
    page = DEPOSIT.encode()
    assert page[:16] == bytes.fromhex("8953524D0D0A1A0A 01 01 0040 00000000")
    assert page[16:64] == STORE + KEY + bytes(16)
    assert page[64:68] == bytes.fromhex("00000003")
    assert page[68:1236] == WRAPPED
    assert page[1236:] == bytes(2860)


def test_what_seals_are_bound_to_does_not_change_when_a_pack_is_admitted() -> None:
    page = changed(DEPOSIT.encode(), pack.WRAPPED_START, bytes(pack.WRAPPED_END - pack.WRAPPED_START))
    assert pack.parse_header(page) == ADMITTED
    assert ADMITTED.bound() == DEPOSIT.bound()


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"", CUT),
        (DEPOSIT.encode()[:-1], CUT),
        (DEPOSIT.encode() + b"\0", CUT),
        *((changed(DEPOSIT.encode(), i, b"\xff"), UNKNOWN) for i in range(12)),
        *((changed(DEPOSIT.encode(), i, b"\x01"), RESERVED) for i in (12, 13, 14, 48, 55, 63)),
        (changed(DEPOSIT.encode(), 15, b"\x02"), RESERVED),
        (changed(DEPOSIT.encode(), 15, b"\x03"), RESERVED),
        *((changed(DEPOSIT.encode(), i, b"\x01"), RESERVED) for i in (1236, 1237, 2000, 4095)),
        *((changed(ADMITTED.encode(), i, b"\x01"), RESERVED) for i in (12, 48, 1236, 4095)),
        *((changed(ADMITTED.encode(), i, b"\x01"), CARRIES) for i in (68, 700, 1235)),
        (changed(DEPOSIT.encode(), 64, bytes(4)), CARRIES),
        (bytes(PAGE), UNKNOWN),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(page: bytes, message: str) -> None:
    with pytest.raises(PackError, match=f"^{message}$"):
        pack.parse_header(page)


@QUICK
@given(st.sampled_from([DEPOSIT, ADMITTED]), st.integers(0, PAGE - 1), st.integers(1, 255))
def test_a_changed_byte_of_a_header_is_refused_or_is_another_header(header: Header, offset: int, change: int) -> None:
    page = header.encode()
    other = changed(page, offset, bytes([page[offset] ^ change]))
    try:
        found = pack.parse_header(other)
    except PackError:
        return
    assert found != header
    assert found.encode() == other


@QUICK
@given(st.one_of(st.binary(max_size=100), st.binary(max_size=PAGE).map(lambda b: b.ljust(PAGE, b"\0"))))
def test_any_bytes_are_a_header_or_a_pack_error(page: bytes) -> None:
    with contextlib.suppress(PackError):
        assert pack.parse_header(page).encode() == page


# --- frames


def reader(content: bytes) -> Read:
    return lambda offset, length: content[offset : offset + length]


def frame_in(content: bytes, offset: int = PAGE) -> Frame | None:
    return pack.frame_at(reader(content), offset, len(content))


def record(frame: Frame) -> bytes:
    """Return a pack with one record: header, frame and so many bytes."""
    return DEPOSIT.encode() + frame.encode() + b"x" * (frame.end - frame.dataset_start)


SMALLEST = Frame(PAGE, OBJECT, 72, 72)
LARGEST = Frame(PAGE, OBJECT, 100_000, pack.ATTRIBUTES_LIMIT + 136)


@pytest.mark.parametrize("frame", [SMALLEST, LARGEST, Frame(PAGE, bytes(16), 72, 73)])
def test_a_frame_is_read_as_it_was_written(frame: Frame) -> None:
    assert len(frame.encode()) == FRAME_BYTES
    assert frame_in(record(frame)) == frame
    assert frame_in(record(frame) + b"more") == frame


def test_a_frame_is_the_bytes_of_the_page_that_describes_it() -> None:
    frame = Frame(2 * PAGE, OBJECT, 0x0102030405060708, 0x11121314)
    assert frame.encode() == b"SRR1" + bytes.fromhex("11121314 0102030405060708") + OBJECT + bytes(8)
    assert frame.lengths() == (2 * PAGE + 4, bytes.fromhex("11121314 0102030405060708"))


def test_a_record_is_frame_then_data_set_then_attributes() -> None:
    frame = Frame(PAGE, OBJECT, 1000, 100)
    assert (frame.dataset_start, frame.attributes_start, frame.end) == (PAGE + 40, PAGE + 1040, PAGE + 1140)


HEAD = DEPOSIT.encode()
RAW = SMALLEST.encode()
BODY = b"x" * 144


@pytest.mark.parametrize(
    "content",
    [
        HEAD,
        HEAD + b"\0" * 39,
        HEAD + b"\0" * 40,
        HEAD + b"\0" * PAGE,
        HEAD + changed(RAW, 4, bytes(12)),
        HEAD + changed(RAW, 4, bytes(12)) + b"written so far",
        HEAD[:100],
    ],
    ids=["the end", "few zeros", "zeros", "a page of zeros", "an open record", "an open record, growing", "before it"],
)
def test_where_a_pack_ends_or_a_record_is_open_there_is_no_frame(content: bytes) -> None:
    assert frame_in(content) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((HEAD + RAW[:n], FRAME_CUT) for n in (1, 4, 39)),
        (HEAD + b"\0" * 38 + b"\1", FRAME_CUT),
        *((HEAD + changed(RAW, i, b"\xff") + BODY, NO_FRAME) for i in (0, 1, 2, 3, 32, 39)),
        (HEAD + b"\0" * 39 + b"\1", NO_FRAME),
        (HEAD + changed(changed(RAW, 4, bytes(12)), 39, b"\1"), NO_FRAME),
        (HEAD + Frame(PAGE, OBJECT, 72, 71).encode() + BODY, LENGTHS),
        (HEAD + Frame(PAGE, OBJECT, 71, 72).encode() + BODY, LENGTHS),
        (HEAD + Frame(PAGE, OBJECT, 0, 72).encode() + BODY, LENGTHS),
        (HEAD + Frame(PAGE, OBJECT, 72, 0).encode() + BODY, LENGTHS),
        (HEAD + Frame(PAGE, OBJECT, 72, 65_536 + 137).encode() + b"x" * 70_000, LENGTHS),
        (HEAD + Frame(PAGE, OBJECT, 2**64 - 1, 72).encode() + BODY, BEYOND),
        (HEAD + RAW + BODY[:-1], BEYOND),
        (HEAD + RAW, BEYOND),
    ],
)
def test_a_frame_that_breaks_a_rule_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(PackError, match=f"^{message}$"):
        frame_in(content)


def test_a_pack_that_shrinks_while_it_is_read_is_refused() -> None:
    content = record(SMALLEST)
    with pytest.raises(PackError):
        pack.frame_at(reader(content[: PAGE + 20]), PAGE, len(content))


@pytest.mark.parametrize(
    ("offset", "page"), [(0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (1 << 40, 1 << 40)]
)
def test_a_record_starts_on_the_next_page(offset: int, page: int) -> None:
    assert pack.page_after(offset) == page


def test_after_unreadable_bytes_the_next_page_that_begins_like_a_frame_counts() -> None:
    blank, begins, within = b"x" * PAGE, b"SRR1".ljust(PAGE, b"x"), b"xSRR1".ljust(PAGE, b"x")
    content = HEAD + blank + within + begins + blank + b"SRR1"
    read, size = reader(content), len(content)
    assert [pack.resync(read, at, size) for at in (0, PAGE, 2 * PAGE)] == [3 * PAGE] * 3
    assert [pack.resync(read, at, size) for at in (3 * PAGE, 3 * PAGE + 1, 4 * PAGE)] == [5 * PAGE] * 3
    assert pack.resync(read, 5 * PAGE, size) is None
    assert pack.resync(read, 0, 3 * PAGE) is None
    assert pack.resync(reader(content[:-1]), 4 * PAGE, size - 1) is None


pages = st.one_of(
    st.binary(max_size=60),
    st.tuples(st.integers(0, 5000), st.integers(0, 70_000), st.sampled_from([b"", b"x" * 200])).map(
        lambda t: Frame(0, OBJECT, t[0], t[1]).encode() + t[2]
    ),
    st.tuples(st.integers(0, 39), st.integers(0, 255)).map(lambda t: changed(RAW, t[0], bytes([t[1]])) + BODY),
)


@st.composite
def packs(draw: Any) -> bytes:
    content = HEAD
    for page in draw(st.lists(pages, max_size=4)):
        content = content.ljust(-(-len(content) // PAGE) * PAGE, b"\0") + page
    return content


def scan(content: bytes) -> list[int]:
    """Walk a pack as readers do; return where frames were found."""
    found: list[int] = []
    offset: int | None = PAGE
    while offset is not None:
        try:
            frame = frame_in(content, offset)
        except PackError:
            following = pack.resync(reader(content), offset, len(content))
            assert following is None or following > offset
            offset = following
            continue
        if frame is None:
            break
        assert frame.offset == offset
        assert frame.end <= len(content)
        assert content[offset : offset + FRAME_BYTES] == frame.encode()
        found.append(offset)
        offset = pack.page_after(frame.end)
    return found


@QUICK
@given(packs())
@example(HEAD + (RAW + BODY).ljust(PAGE, b"\0") + (b"broken" * 100).ljust(PAGE, b"\0") + RAW + BODY)
def test_any_bytes_are_walked_to_their_end(content: bytes) -> None:
    scan(content)


def test_a_record_after_unreadable_bytes_is_found() -> None:
    whole = (RAW + BODY).ljust(PAGE, b"\0")
    assert scan(HEAD + whole + (b"broken" * 100).ljust(PAGE, b"\0") + whole + RAW + BODY) == [
        1 * PAGE,
        3 * PAGE,
        4 * PAGE,
    ]


@pytest.mark.parametrize("size", [0, 40, PAGE, PAGE + 39])
def test_a_frame_is_sought_in_no_more_than_the_file(size: int) -> None:
    asked: list[int] = []

    def read(offset: int, length: int) -> bytes:
        asked.append(offset + length)
        return bytes(length)

    assert pack.frame_at(read, PAGE, size) is None
    assert all(end <= size for end in asked)
