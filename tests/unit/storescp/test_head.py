"""The head of a data set: read like pydicom reads it, in any pieces, in bounded memory; described as text or bytes."""

from __future__ import annotations

import random
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, charset, config, dcmread
from pydicom.data import get_charset_files, get_testdata_file
from pydicom.datadict import dictionary_VR
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.sequence import Sequence
from pydicom.valuerep import PersonName
from pynetdicom.dsutils import encode as encode_dataset

from storage import attributes
from storage.attributes import Attributes, AttributesError, Received
from storescp.gate import head
from storescp.gate.describe import Describer, uid
from storescp.gate.head import (
    DEPTH_LIMIT,
    ELEMENT_LIMIT,
    INFLATE_LIMIT,
    LAST_WANTED,
    VALUE_LIMIT,
    WANTED,
    HeadError,
    HeadParser,
)
from storescp.gate.transfer import ENCODINGS, Encoding

QUICK = settings(deadline=None, derandomize=True, max_examples=300)
SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "big endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
}
IMPLICIT, EXPLICIT, BIG, DEFLATED = (ENCODINGS[uid] for uid in SYNTAXES.values())
CHARSET, PATIENT_NAME, PATIENT_ID = 0x00080005, 0x00100010, 0x00100020
SOP_CLASS, SOP_INSTANCE, STUDY, SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
PRIVATE = 0x00090010
ITEM, ITEM_END, SEQUENCE_END, UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF

GROUP = "a data set begins with an element of a file's or command's group"
NO_VR = "an element has no VR where one must be"
TWICE = "a data set holds an element twice"
DEEP = "a data set nests too deep"
MANY = "a data set has too many elements before its end is known"
NO_ITEM = "a sequence holds something else than items"
CUT = "a data set ends within an element"
NO_DEFLATE = "a deflated data set does not inflate"

Values = dict[int, tuple[str, bytes]]
# How many bytes may be kept of what was fed: one element that is still incomplete.
KEPT = VALUE_LIMIT + 12


def parse(parts: Iterable[bytes], encoding: Encoding) -> tuple[Values, str]:
    """Return the values found, and the error or nothing."""
    parser = HeadParser(encoding)
    try:
        for part in parts:
            parser.feed(memoryview(part))
            assert parser.done or len(parser._part) <= KEPT
        parser.end()
    except HeadError as error:
        return parser.values, str(error)
    assert parser.done
    return parser.values, ""


def found(content: bytes, encoding: Encoding = EXPLICIT) -> dict[int, bytes]:
    """Return the raw values of a data set that must parse."""
    values, error = parse([content], encoding)
    assert not error
    return {tag: raw for tag, (_, raw) in values.items()}


def refused(content: bytes, encoding: Encoding = EXPLICIT) -> str:
    error = parse([content], encoding)[1]
    assert error
    assert parse(bytewise(content), encoding)[1] == error
    return error


def bytewise(content: bytes) -> Iterator[bytes]:
    return (content[i : i + 1] for i in range(len(content)))


def pieces(content: bytes, chance: random.Random, count: int = 8) -> Iterator[bytes]:
    ends = sorted({0, len(content), *(chance.randrange(len(content) + 1) for _ in range(count))})
    return (content[a:b] for a, b in pairwise(ends))


def deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


def element(
    tag: int, value: bytes = b"", vr: str = "", *, length: int | None = None, encoding: Encoding = EXPLICIT
) -> bytes:
    """Return an element; ``length`` where it is not that of the value."""
    order = "<" if encoding.little_endian else ">"
    count = len(value) if length is None else length
    start = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if encoding.implicit or tag >> 16 == 0xFFFE:
        return start + struct.pack(order + "I", count) + value
    vr = vr or WANTED.get(tag, "OB")
    if vr.encode() in head._SHORT_VRS:
        return start + vr.encode() + struct.pack(order + "H", count) + value
    return start + vr.encode() + b"\0\0" + struct.pack(order + "I", count) + value


# --- against pydicom


# pydicom itself reads nothing of these.
UNREAD = {"README", "emri_small_jpeg_2k_lossless_too_short.dcm"}


def data_sets() -> list[Path]:
    """Return every data set among the test files that come with pydicom and, if it is there, pydicom-data."""
    folders = [Path(get_testdata_file("CT_small.dcm", download=False) or "").parent]
    if more := get_testdata_file("liver.dcm", download=False):
        folders.append(Path(more).parent)
    return sorted(
        p
        for folder in folders
        for p in folder.rglob("*")
        if p.is_file() and p.suffix not in {".txt", ".json", ".dump", ".gz", ".icc"} and p.name not in UNREAD
    )


FILES = data_sets()
# Files that break the rules in a way that pydicom forgives. A DICOMDIR has group 0004 and is no composite object.
FORGIVEN = {
    "SC_rgb_jpeg.dcm": NO_VR,
    "meta_missing_tsyntax.dcm": GROUP,
    "nested_priv_SQ.dcm": GROUP,
}


def body(path: Path) -> tuple[bytes, Encoding, Dataset]:
    """Return the encoded data set of a file, how it is encoded, and what pydicom makes of it."""
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        dataset = dcmread(path, force=True)
        with path.open("rb") as file:
            read_preamble(file, force=True)
            meta = _read_file_meta_info(file)
            content = file.read()
    implicit, little_endian = dataset.original_encoding
    deflated = meta.get("TransferSyntaxUID") == SYNTAXES["deflated"]
    return content, Encoding(bool(implicit), bool(little_endian), deflated), dataset


def raw_of(dataset: Dataset, tag: int) -> tuple[str | None, bytes]:
    """Return VR, if the encoding tells it, and raw value of an element as pydicom read them."""
    item = dataset.get_item(tag)
    if item.is_raw:  # type: ignore[union-attr]
        return item.VR, item.value or b""  # type: ignore[union-attr, return-value]
    # pydicom has converted what is empty, and the character set.
    value = item.value  # type: ignore[union-attr]
    values = [value] if isinstance(value, str) else value or []
    return None, "\\".join(values).encode()


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(p.parts[-2:]))
def test_wanted_values_are_those_that_pydicom_reads(path: Path) -> None:
    content, encoding, dataset = body(path)
    values, error = parse([content], encoding)
    if path.name in FORGIVEN or "DICOMDIR" in path.name:
        assert error == FORGIVEN.get(path.name, GROUP)
        return
    assert not error
    wanted = {tag: raw_of(dataset, tag) for tag in WANTED if tag in dataset}
    wanted = {tag: entry for tag, entry in wanted.items() if len(entry[1]) <= VALUE_LIMIT}
    stripped = {tag: raw.rstrip(b" \0") if tag == CHARSET else raw for tag, (_, raw) in values.items()}
    assert stripped == {tag: raw for tag, (_, raw) in wanted.items()}
    for tag, (vr, _) in wanted.items():
        assert values[tag][0] == (vr if vr and vr != "UN" else WANTED[tag])
    for seed in range(3):
        assert parse(pieces(content, random.Random(seed)), encoding) == (values, "")
    if len(content) < 50_000:
        assert parse(bytewise(content), encoding) == (values, "")


VALUE_OF_VR = {
    "CS": "ABC", "UI": "1.2.3.4", "DA": "20260131", "TM": "101112.5", "DT": "20260131101112", "SH": "short",
    "LO": "long text", "PN": "Doe^Jane=山田^太郎=やまだ^たろう", "DS": "1.5", "IS": "42", "US": 258, "AS": "042Y",
}  # fmt: skip


def sample(*, undefined: bool, items: int = 2) -> Dataset:
    """Return a data set with every wanted element and, between them, sequences and private elements."""
    dataset = Dataset()
    for tag, vr in WANTED.items():
        dataset.add_new(tag, vr, VALUE_OF_VR[vr])
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.OtherPatientNames = "A^B"
    dataset.add_new(0x00090010, "LO", "PRIVATE OF TEST")
    dataset.add_new(0x00091001, "UT", "x" * 70_000)
    dataset.add_new(0x00091002, "OB", bytes(300))
    dataset.PixelData = bytes(1000)
    dataset["PixelData"].VR = "OW"

    def sequence(depth: int) -> Sequence:
        made = []
        for number in range(items):
            item = Dataset()
            # Values as at the top, which must not be taken for them.
            item.StudyInstanceUID, item.PatientName, item.Rows = f"9.{depth}.{number}", "Within^It", 9
            if depth:
                item.add_new(0x00081140, "SQ", sequence(depth - 1))
                item["ReferencedImageSequence"].is_undefined_length = undefined
            item.is_undefined_length_sequence_item = undefined
            made.append(item)
        return Sequence(made)

    for tag in (0x00081110, 0x00101002, 0x00091003):
        dataset.add_new(tag, "SQ", sequence(3))
        dataset[tag].is_undefined_length = undefined
    dataset.add_new(0x00081115, "SQ", Sequence([]))
    dataset[0x00081115].is_undefined_length = undefined
    return dataset


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("undefined", [True, False], ids=["undefined lengths", "defined lengths"])
def test_one_data_set_has_the_same_values_in_every_encoding(name: str, undefined: bool) -> None:
    encoding = ENCODINGS[SYNTAXES[name]]
    dataset = sample(undefined=undefined)
    content = encode_dataset(dataset, encoding.implicit, encoding.little_endian, encoding.deflated)
    assert content is not None
    described = described_text(parse([content], encoding)[0], encoding)
    wanted = {tag: [VALUE_OF_VR[vr]] for tag, vr in WANTED.items()}
    wanted[CHARSET] = ["ISO_IR 192"]
    assert described == wanted
    values = parse([content], encoding)[0]
    assert {tag: vr for tag, (vr, _) in values.items()} == WANTED
    for seed in range(20):
        assert parse(pieces(content, random.Random(seed)), encoding) == (values, "")
    assert parse(bytewise(content), encoding) == (values, "")


def described_text(values: Values, encoding: Encoding) -> dict[int, list[Any]]:
    dataset = Describer().describe(values, encoding, "1.2", RECEIVED).dataset
    return {
        int(tag, 16): [
            "=".join(v.get(g, "") for g in ("Alphabetic", "Ideographic", "Phonetic")).rstrip("=")
            if isinstance(v, dict)
            else v
            for v in e.Value
        ]
        for tag, e in dataset.items()
    }


# --- the rules, byte by byte


def sequence(*items: bytes, tag: int = 0x00091010, vr: str = "SQ", encoding: Encoding = EXPLICIT) -> bytes:
    """Return a sequence of undefined length."""
    end = element(SEQUENCE_END, encoding=encoding)
    return element(tag, vr=vr, length=UNDEFINED, encoding=encoding) + b"".join(items) + end


def an_item(content: bytes = b"", *, undefined: bool = True, encoding: Encoding = EXPLICIT) -> bytes:
    if undefined:
        return element(ITEM, content, length=UNDEFINED, encoding=encoding) + element(ITEM_END, encoding=encoding)
    return element(ITEM, content, encoding=encoding)


def nested(depth: int, encoding: Encoding, tag: int = 0x00091010) -> bytes:
    content = b""
    for _ in range(depth):
        content = sequence(an_item(content, encoding=encoding), tag=tag, encoding=encoding)
    return content


ID = element(PATIENT_ID, b"ID1 ")
SHAPES = {
    "no item": lambda e: sequence(encoding=e),
    "empty items": lambda e: sequence(an_item(encoding=e), an_item(undefined=False, encoding=e), encoding=e),
    "items of defined length": lambda e: sequence(
        an_item(element(PATIENT_ID, b"no", encoding=e), undefined=False, encoding=e), encoding=e
    ),
    "items of undefined length": lambda e: sequence(
        an_item(element(PATIENT_ID, b"no", encoding=e), encoding=e), encoding=e
    ),
    "a long value": lambda e: sequence(
        an_item(element(0x00091020, bytes(100_000), encoding=e), encoding=e), encoding=e
    ),
    "the deepest nesting": lambda e: nested(DEPTH_LIMIT, e),
    "fragments": lambda e: element(0x00091010, vr="OB", length=UNDEFINED, encoding=e)
    + an_item(bytes(9000), undefined=False, encoding=e) + element(SEQUENCE_END, encoding=e),
    "a wanted element as a sequence": lambda e: sequence(an_item(encoding=e), tag=0x00081030, encoding=e),
    "an unknown long VR": lambda e: element(0x00091010, bytes(70_000), "ZZ", encoding=e),
    "an odd length": lambda e: element(0x00091010, b"abc", encoding=e),
    "a wanted element that is too long": lambda e: element(0x00081030, b"x" * (VALUE_LIMIT + 1), "LO", encoding=e),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoding", [IMPLICIT, EXPLICIT, BIG], ids=["implicit", "explicit", "big endian"])
def test_what_is_not_wanted_is_skipped_whole(shape: str, encoding: Encoding) -> None:
    content = SHAPES[shape](encoding) + element(PATIENT_ID, b"ID1 ", encoding=encoding)
    for parts in ([content], bytewise(content), pieces(content, random.Random(1))):
        assert parse(parts, encoding) == ({PATIENT_ID: ("LO", b"ID1 ")}, "")


@pytest.mark.parametrize("depth", [DEPTH_LIMIT + 1, 5000])
@pytest.mark.parametrize("encoding", [IMPLICIT, EXPLICIT, BIG], ids=["implicit", "explicit", "big endian"])
def test_a_nesting_bomb_is_refused(depth: int, encoding: Encoding) -> None:
    start = element(0x00091010, vr="SQ", length=UNDEFINED, encoding=encoding) + element(
        ITEM, length=UNDEFINED, encoding=encoding
    )
    assert refused(start * depth, encoding) == DEEP
    assert encoding != EXPLICIT or parse([deflate(start * depth)], DEFLATED)[1] == DEEP


SMALL = element(0x00091010, encoding=IMPLICIT)
OPEN = element(0x00091010, length=UNDEFINED, encoding=IMPLICIT)
OPEN_ITEM = element(ITEM, length=UNDEFINED, encoding=IMPLICIT)


@pytest.mark.parametrize(
    ("before", "unit", "error"),
    [
        ([], SMALL, ""),
        ([OPEN], an_item(undefined=False, encoding=IMPLICIT), CUT),
        ([OPEN], an_item(encoding=IMPLICIT), CUT),
        ([OPEN, OPEN_ITEM], SMALL, CUT),
    ],
    ids=["elements", "items", "items of undefined length", "elements in an item"],
)
def test_a_bomb_of_many_elements_is_refused(before: list[bytes], unit: bytes, error: str) -> None:
    content = b"".join(before) + unit * (ELEMENT_LIMIT - len(before))
    assert parse([content], IMPLICIT)[1] == error
    assert parse([content, unit], IMPLICIT)[1] == MANY


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        *((element(t, b"1.2 ", v), EXPLICIT, GROUP) for t, v in ((0x00020010, "UI"), (0x2, "UI"), (0x00041130, "CS"))),
        *((element(t, b"1.2 ", encoding=IMPLICIT), IMPLICIT, GROUP) for t in (0x00020000, 0x00000002, 0x00070000)),
        (element(0x00020010, b"1.2 ", "UI", encoding=BIG), BIG, GROUP),
        (element(PATIENT_ID, b"A", encoding=IMPLICIT), EXPLICIT, NO_VR),
        (b"\x08\0\x05\0" + b"c\x01\0\0", EXPLICIT, NO_VR),
        (b"\x08\0\x05\0" + b"1A\0\0", EXPLICIT, NO_VR),
        (ID + ID, EXPLICIT, TWICE),
        (element(CHARSET) + element(CHARSET, b"X"), EXPLICIT, TWICE),
        (ID + element(0x00100021, b"A") + element(PATIENT_ID), EXPLICIT, TWICE),
        (element(PATIENT_ID, b"x" * (VALUE_LIMIT + 1)) + ID, EXPLICIT, TWICE),
        (element(0x00091010, vr="SQ", length=UNDEFINED) + ID, EXPLICIT, NO_ITEM),
        (element(0x00091010, vr="SQ", length=UNDEFINED) + element(ITEM_END), EXPLICIT, NO_ITEM),
        (element(0x00091010, vr="SQ", length=UNDEFINED) + element(SEQUENCE_END) + ID * 2, EXPLICIT, TWICE),
        (ID[:4], EXPLICIT, CUT),
        (ID[:-1], EXPLICIT, CUT),
        (element(0x00091010, b"abc")[:9], EXPLICIT, CUT),
        (element(0x00091010, b"abc")[:-1], EXPLICIT, CUT),
        (element(0x00091010, vr="SQ", length=UNDEFINED), EXPLICIT, CUT),
        (element(0x00091010, vr="SQ", length=UNDEFINED) + element(ITEM, length=UNDEFINED), EXPLICIT, CUT),
        (b"no deflate \xff", DEFLATED, NO_DEFLATE),
        (b"", EXPLICIT, ""),
        (ID, EXPLICIT, ""),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_name(content: bytes, encoding: Encoding, message: str) -> None:
    assert parse([content], encoding)[1] == message
    assert parse(bytewise(content), encoding)[1] == message


def test_sequences_of_unknown_vr_hold_implicit_elements() -> None:
    inner = element(0x00091020, b"abcd", encoding=IMPLICIT)
    deeper = sequence(an_item(inner, encoding=IMPLICIT), tag=0x00091021, encoding=IMPLICIT)
    unknown = sequence(an_item(inner + deeper), an_item(inner, undefined=False), vr="UN")
    again = sequence(an_item(unknown + element(0x00091030, b"abcd", "LO")), vr="SQ")
    assert found(unknown + again + ID) == {PATIENT_ID: b"ID1 "}
    assert refused(sequence(an_item(inner)) + ID) == NO_VR


def test_sequences_of_unknown_vr_are_little_endian_in_a_big_endian_data_set_too() -> None:
    unknown = element(0x00091010, vr="UN", length=UNDEFINED, encoding=BIG) + (
        an_item(element(0x00091020, b"abcd", encoding=IMPLICIT)) + element(SEQUENCE_END)
    )
    assert found(unknown + element(PATIENT_ID, b"ID", encoding=BIG), BIG) == {PATIENT_ID: b"ID"}


@pytest.mark.parametrize("encoding", [IMPLICIT, EXPLICIT, BIG], ids=["implicit", "explicit", "big endian"])
def test_odd_lengths_are_taken_as_they_are(encoding: Encoding) -> None:
    content = element(0x00080050, b"A", encoding=encoding) + element(PATIENT_ID, b"ABC", encoding=encoding)
    assert found(content, encoding) == {0x00080050: b"A", PATIENT_ID: b"ABC"}


@pytest.mark.parametrize("size", [0, 1, VALUE_LIMIT, VALUE_LIMIT + 1, 65_535])
def test_a_value_is_kept_up_to_the_limit(size: int) -> None:
    content = element(0x00081030, b"x" * size, "LO") + ID
    kept = {0x00081030: b"x" * size} if size <= VALUE_LIMIT else {}
    assert found(content) == {**kept, PATIENT_ID: b"ID1 "}


def test_nothing_is_looked_at_after_the_last_wanted_element() -> None:
    parser = HeadParser(EXPLICIT)
    parser.feed(memoryview(ID + element(LAST_WANTED, b"X ")))
    assert not parser.done
    parser.feed(memoryview(element(LAST_WANTED + 1)[:8]))
    assert parser.done
    parser.feed(memoryview(b"\xff" * 100))
    parser.end()
    assert set(parser.values) == {PATIENT_ID, LAST_WANTED}


@pytest.mark.parametrize("vr", ["LO", "SH", "UN", "OB", "ZZ"])
def test_the_vr_is_the_dictionarys_whatever_the_data_set_says(vr: str) -> None:
    assert parse([element(PATIENT_ID, b"A", vr)], EXPLICIT) == ({PATIENT_ID: ("LO", b"A")}, "")


# --- bombs


def zeros(mebibytes: int) -> bytes:
    """Return a part of a deflate stream that inflates to so many MiB of zeros; it can stand anywhere on a byte."""
    packer = zlib.compressobj(wbits=-15)
    packer.compress(b"")
    one = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return one * mebibytes


def flushed(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)


def peak(feed: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        feed()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_much_in_one_skipped_element_takes_no_memory() -> None:
    start = element(0x00091010, length=60 << 20)
    content = flushed(start) + zeros(60) + deflate(ID)
    parser = HeadParser(DEFLATED)
    assert peak(lambda: parser.feed(memoryview(content))) < 16 << 20
    parser.end()
    assert parser.values == {PATIENT_ID: ("LO", b"ID1 ")}


def test_what_inflates_to_too_much_is_refused_before_it_does() -> None:
    start = element(0x00091010, length=1 << 30)
    content = flushed(start) + zeros(1024) + deflate(ID)
    assert len(content) < 4 << 20
    parser = HeadParser(DEFLATED)

    def feed() -> None:
        with pytest.raises(HeadError, match="inflates to too much"):
            parser.feed(memoryview(content))

    assert peak(feed) < 16 << 20
    assert parser._inflated <= INFLATE_LIMIT + 65_536


def test_a_stream_that_inflates_far_into_many_elements_takes_no_memory() -> None:
    units = flushed(element(0x00091010, bytes(100), "LO") * 1000)
    content = units * (ELEMENT_LIMIT // 1000 + 1)
    parser = HeadParser(DEFLATED)

    def feed() -> None:
        with pytest.raises(HeadError, match=MANY):
            parser.feed(memoryview(content))

    assert peak(feed) < 16 << 20


def test_what_follows_the_end_of_a_deflated_stream_is_not_kept() -> None:
    parser = HeadParser(DEFLATED)
    parser.feed(memoryview(deflate(ID)))
    block = memoryview(bytes(1 << 16))

    def feed() -> None:
        for _ in range(320):
            try:
                parser.feed(block)
            except HeadError:
                return

    assert peak(feed) < 8 << 20


def test_a_long_skipped_value_takes_no_memory() -> None:
    parser = HeadParser(EXPLICIT)
    parser.feed(memoryview(element(0x00091010, length=1 << 30)))
    block = memoryview(bytes(1 << 20))

    def feed() -> None:
        for _ in range(1024):
            parser.feed(block)

    assert peak(feed) < 1 << 20
    parser.feed(memoryview(ID))
    parser.end()
    assert parser.values == {PATIENT_ID: ("LO", b"ID1 ")}


# --- any bytes

tags = st.one_of(
    st.sampled_from([*WANTED, 0x00080001, 0x00091010, 0x00091010, 0x7FE00010, ITEM, ITEM_END, SEQUENCE_END]),
    st.integers(0, 0xFFFFFFFF),
)
vrs = st.sampled_from(["", "LO", "UN", "SQ", "OB", "US", "ZZ"])
lengths = st.one_of(st.none(), st.none(), st.just(UNDEFINED & 0xFFFF), st.integers(0, 40))


@st.composite
def datasets(draw: Any) -> tuple[bytes, Encoding]:
    encoding = draw(st.sampled_from([IMPLICIT, EXPLICIT, BIG, DEFLATED]))
    parts = []
    for _ in range(draw(st.integers(0, 8))):
        part = element(draw(tags), draw(st.binary(max_size=12)), draw(vrs), length=draw(lengths), encoding=encoding)
        shape = draw(st.sampled_from(["", "", "", "sequence", "raw", "open"]))
        if shape == "sequence":
            part = sequence(an_item(part, encoding=encoding), encoding=encoding)
        elif shape == "raw":
            part = draw(st.binary(max_size=12))
        elif shape == "open":
            part = element(0x00091010, vr="SQ", length=UNDEFINED, encoding=encoding) + part
        parts.append(part)
    content = b"".join(parts)
    if encoding.deflated and draw(st.booleans()):
        content = deflate(content)
    return content, encoding


@QUICK
@given(datasets(), st.integers(0, 1000))
def test_any_bytes_parse_or_are_refused_the_same_way_however_they_are_cut(
    given_dataset: tuple[bytes, Encoding], seed: int
) -> None:
    content, encoding = given_dataset
    whole = parse([content], encoding)
    for tag, (_, raw) in whole[0].items():
        assert tag in WANTED
        assert len(raw) <= VALUE_LIMIT
    for parts in (pieces(content, random.Random(seed)), bytewise(content)):
        again = parse(parts, encoding)
        # How far a broken deflate stream inflates before the error shows depends on the pieces.
        assert again == whole or encoding.deflated


# --- describe

RECEIVED = Received("2026-01-31T10:11:12Z", "ab", "CT1", "STRONGROOM", "127.0.0.1", "")
UIDS: Values = dict.fromkeys((SOP_CLASS, SOP_INSTANCE, STUDY, SERIES), ("UI", b"1.2.3\x00"))
GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def through(values: Values, encoding: Encoding = EXPLICIT) -> Attributes:
    """Describe values, and take the way that they take to the vault."""
    described = Describer().describe({**UIDS, **values}, encoding, "1.2.840.10008.1.2.1", RECEIVED)
    arrived = attributes.decode(attributes.encode(described))
    assert arrived == described
    return arrived


def name_of(person: PersonName) -> dict[str, str] | None:
    parts = (part.strip(" ").rstrip("^") for part in person.components)
    return {group: part for group, part in zip(GROUPS, parts, strict=False) if part} or None


@pytest.mark.parametrize("path", sorted(get_charset_files("*.dcm")), ids=lambda p: Path(p).stem)
def test_the_text_of_a_file_in_another_script_is_that_of_pydicom(path: str) -> None:
    content, encoding, dataset = body(Path(path))
    values, error = parse([content], encoding)
    assert not error
    described = Describer().describe(values, encoding, "1.2", RECEIVED)
    assert described.undecoded == {}
    for tag, (vr, raw) in values.items():
        value = dataset[tag].value
        single = dataset[tag].VM <= 1
        wanted = [value] if single else list(value)
        if vr == "PN":
            wanted = [name_of(v) for v in wanted if v]
        elif vr in {"LO", "SH"}:
            wanted = [v.strip(" ") or None for v in wanted if v is not None] if raw.strip() else []
        else:
            continue
        assert described.dataset[f"{tag:08X}"].Value == wanted


# A text for each of Python's encodings that pydicom names character sets with: alphabetic, ideographic, phonetic.
SCRIPTS = {
    "iso8859": "Smith^John", "latin_1": "Äneas^Rüdiger", "iso8859_2": "Łódź^Čapek", "iso8859_3": "Ħal^Ġorġ",
    "iso8859_4": "Ķeniņš^Ģirts", "iso_ir_126": "Διονυσιος^Κ", "iso_ir_127": "قباني^لنزار", "iso_ir_138": "שרון^דבורה",
    "iso_ir_144": "Люкceмбypг^Ю", "iso_ir_148": "Çavuşoğlu^Ş", "iso_ir_166": "นาม^ไทย", "shift_jis": "ﾔﾏﾀﾞ^ﾀﾛｳ",
    "iso2022_jp": "山田^太郎", "iso2022_jp_2": "鷗^騃", "euc_kr": "洪^吉洞", "iso_ir_58": "王^小东",
    "UTF8": "王^Jérôme", "GB18030": "王^小东", "GBK": "王^小东", "GB2312": "王^小东",
}  # fmt: skip


@pytest.mark.parametrize("term", [t for t in charset.python_encoding if t])
def test_a_name_of_three_groups_is_read_in_every_character_set_that_pydicom_knows(term: str) -> None:
    python = charset.python_encoding[term]
    text = SCRIPTS[python]
    terms = ["", term] if term.startswith("ISO 2022 IR") else [term]
    encodings = charset.convert_encodings(terms)
    wanted = {"Alphabetic": "Doe^Jane", "Ideographic": text, "Phonetic": text}
    # The escape sequence stands after each delimiter; Python's codecs for Japanese write it themselves.
    written = b"" if len(terms) == 1 or python.startswith("iso2022_jp") else charset.ENCODINGS_TO_CODES[python]
    group = b"^".join(written + part.encode(python) for part in text.split("^"))
    raw = b"=".join((b"Doe^Jane", group, group))
    # pydicom leaves the escape sequence of this one in the text.
    assert python == "iso_ir_58" or name_of(PersonName(raw, encodings).decode(encodings)) == wanted
    arrived = through({CHARSET: ("CS", "\\".join(terms).encode()), PATIENT_NAME: ("PN", raw)})
    assert arrived.undecoded == {}
    assert arrived.name("00100010") == wanted


def jis(text: str) -> bytes:
    return text.encode("iso2022_jp")


@pytest.mark.parametrize(
    ("terms", "raw", "wanted"),
    [
        # Codes of two bytes may hold the bytes of '=', '^' and '\'.
        (r"\ISO 2022 IR 87", jis("春") + b"^" + jis("秀"), [{"Alphabetic": "春^秀"}]),
        (r"\ISO 2022 IR 87", b"A=" + jis("弌恆") + b"^B", [{"Alphabetic": "A", "Ideographic": "弌恆^B"}]),
        ("GB18030", "乗丂^丱".encode("gb18030"), [{"Alphabetic": "乗丂^丱"}]),
        ("GBK", b"\x81\x5c\x81\x5e", [{"Alphabetic": b"\x81\x5c\x81\x5e".decode("gbk")}]),
        ("ISO_IR 192", b"A\\B^C=D", [{"Alphabetic": "A"}, {"Alphabetic": "B^C", "Ideographic": "D"}]),
        ("ISO_IR 192", b"A^^^^=^^=C^ ", [{"Alphabetic": "A", "Phonetic": "C"}]),
        ("ISO_IR 192", b"A\\\\B", [{"Alphabetic": "A"}, None, {"Alphabetic": "B"}]),
        ("ISO_IR 192", b"^^^", [None]),
        ("ISO_IR 192", b"\0 ", []),
        # Before each delimiter the first character set counts again (PS3.5 6.1.2.5.3).
        (r"ISO 2022 IR 100\ISO 2022 IR 126", b"\x1b-F\xc4\xe9^B\xe9", [{"Alphabetic": "Δι^Bé"}]),
        (r"ISO 2022 IR 100\ISO 2022 IR 126", b"\x1b-F\xc4\xe9=B\xe9", [{"Alphabetic": "Δι", "Ideographic": "Bé"}]),
        (r"ISO 2022 IR 100\ISO 2022 IR 126", b"\x1b-F\xc4\xe9\\B\xe9", [{"Alphabetic": "Δι"}, {"Alphabetic": "Bé"}]),
    ],
)
def test_a_name_is_split_where_its_characters_are_delimiters(terms: str, raw: bytes, wanted: list[Any]) -> None:
    arrived = through({CHARSET: ("CS", terms.encode()), PATIENT_NAME: ("PN", raw)})
    assert arrived.dataset["00100010"].Value == wanted


@pytest.mark.parametrize(
    ("vr", "raw", "wanted"),
    [
        ("LO", b" a b \\\\c\0", ["a b", None, "c"]),
        ("LO", b"", []),
        ("LO", b" ", []),
        ("LO", b"a\r\n\x1b(Bb\x7f\t", ["ab"]),
        ("CS", b"A \\ B", ["A", "B"]),
        ("UI", b"1.2.3\0", ["1.2.3"]),
        ("DS", b" 1.5 ", ["1.5"]),
        ("DA", b"20260131", ["20260131"]),
        ("US", b"\x01\x02\x03\x04", [0x0201, 0x0403]),
        ("US", b"", []),
    ],
)
def test_values_are_trimmed_and_split(vr: str, raw: bytes, wanted: list[Any]) -> None:
    arrived = through({0x00081030: (vr, raw)})
    assert (arrived.dataset["00081030"].vr, arrived.dataset["00081030"].Value) == (vr, wanted)
    assert arrived.undecoded == {}


def test_numbers_follow_the_order_of_bytes() -> None:
    assert through({0x00280010: ("US", b"\x01\x02")}, BIG).dataset["00280010"].Value == [0x0102]


@pytest.mark.parametrize(
    ("terms", "vr", "raw"),
    [
        ("ISO_IR 192", "PN", b"M\xfcller^A"),
        ("ISO_IR 192", "LO", b"\xff"),
        ("GB18030", "PN", b"A^\xff\xff"),
        (r"\ISO 2022 IR 87", "PN", b"\x1b$B\xff\xff\x1b(B"),
        (r"\ISO 2022 IR 149", "LO", b"\x1b$)C\xff"),
        (r"\ISO 2022 IR 100", "PN", b"\x1b$)ZA"),
        ("ISO_IR 126", "LO", b"\xae"),
        ("NO SUCH SET", "PN", b"Doe"),
        (r"ISO_IR 100\NO SUCH SET", "LO", b"Doe"),
        ("\xff", "LO", b"Doe"),
        ("", "CS", b"\xe9"),
        ("", "US", b"abc"),
        # The default repertoire is ISO IR 6: nothing says what other bytes mean.
        ("", "PN", b"M\xfcller"),
        ("ISO_IR 6", "LO", b"\xe9"),
        # Names of Python's codecs are no character sets of DICOM's.
        ("utf_7", "PN", b"+2AA-"),
        ("unicode_escape", "LO", b"\\ud800"),
        ("raw_unicode_escape", "LO", b"\\ud800"),
        ("rot13", "LO", b"A"),
        ("punycode", "LO", b"A-"),
    ],
)
def test_text_that_its_character_set_does_not_explain_is_kept_as_it_came(terms: str, vr: str, raw: bytes) -> None:
    tag = 0x00281050 if vr == "US" else 0x00081030
    arrived = through({CHARSET: ("CS", terms.encode("latin-1")), tag: (vr, raw), PATIENT_ID: ("UI", b"1.2")})
    kept = arrived.undecoded[f"{tag:08X}"]
    assert kept.raw == raw
    assert kept.charset == [part.strip() for part in terms.replace("\xff", "\ufffd").split("\\")]
    assert f"{tag:08X}" not in arrived.dataset
    assert arrived.text("00100020") == "1.2"


@pytest.mark.parametrize(
    ("terms", "wanted"),
    [("ISO IR 100", "é"), ("ISO-IR 100", "é"), (r"ISO_IR 192\ISO 2022 IR 100", None), (r"ISO_IR 100\ISO_IR 192", "é")],
)
def test_a_misspelt_character_set_is_forgiven_without_a_word(terms: str, wanted: str | None) -> None:
    # A warning would be an error here, and a line in the server's log that a peer chose the text of.
    arrived = through({CHARSET: ("CS", terms.encode()), 0x00081030: ("LO", b"\xe9")})
    assert arrived.text("00081030") == (wanted or "")
    assert ("00081030" in arrived.undecoded) == (wanted is None)


@pytest.mark.parametrize(
    "values",
    [
        {0x00280010: ("US", bytes(VALUE_LIMIT))},
        {0x00081030: ("LO", b"\\" * VALUE_LIMIT)},
        {0x00081030: ("LO", b"a\\" * (VALUE_LIMIT // 2))},
        {PATIENT_NAME: ("PN", b"\\" * 1024)},
        {CHARSET: ("CS", b"A\\" * 2000), PATIENT_NAME: ("PN", b"Doe")},
        {CHARSET: ("CS", b"A" * 257), PATIENT_NAME: ("PN", b"Doe")},
        {CHARSET: ("CS", b"A" * VALUE_LIMIT), PATIENT_NAME: ("PN", b"Doe")},
    ],
    ids=["numbers", "empty values", "values", "names", "character sets", "a long character set", "the longest"],
)
def test_what_the_gate_accepts_the_vault_understands(values: Values) -> None:
    through(values)


@pytest.mark.parametrize("vr", sorted(v.decode() for v in head._SHORT_VRS))
@pytest.mark.parametrize("tag", UIDS)
def test_a_uid_is_the_one_that_the_gate_has_checked_whatever_vr_the_data_set_gives_it(tag: int, vr: str) -> None:
    content = b"".join(element(t, b"1.2.34", vr if t == tag else "UI") for t in sorted(UIDS))
    values, error = parse([content], EXPLICIT)
    if error:
        return
    assert uid(values, tag) == "1.2.34"
    assert through(values).text(f"{tag:08X}") == "1.2.34"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [(b"1.2\0", "1.2"), (b"1.2 \0 ", "1.2"), (b"", ""), (b"\0", ""), (b" 1.2", " 1.2"), (b"1.\xe9", "1.\ufffd")],
)
def test_a_uid_is_told_without_its_padding(raw: bytes, wanted: str) -> None:
    assert uid({STUDY: ("UI", raw)}, STUDY) == wanted
    assert uid({}, STUDY) == ""


texts = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\\", b"=", b"^", b"\x1b$B", b"\x1b-F", b"\xe9"]).flatmap(
        lambda unit: st.integers(0, 1100).map(lambda n: unit * n)
    ),
    st.sampled_from([*charset.CODES_TO_ENCODINGS]).flatmap(lambda e: st.binary(max_size=10).map(lambda b: e + b)),
)
charsets = st.one_of(
    st.lists(st.sampled_from([*charset.python_encoding, "utf_7", "zlib", "ISO IR 100", "x" * 300]), max_size=4).map(
        lambda terms: "\\".join(terms).encode()
    ),
    st.binary(max_size=20),
)
random_values = st.dictionaries(
    st.sampled_from([t for t in WANTED if t not in UIDS]),
    st.tuples(st.sampled_from(sorted(v.decode() for v in head._SHORT_VRS)), texts),
    max_size=6,
)


@QUICK
@given(random_values, charsets, st.sampled_from([EXPLICIT, BIG]))
def test_whatever_a_head_holds_reaches_the_vault(values: Values, terms: bytes, encoding: Encoding) -> None:
    try:
        arrived = through({**values, CHARSET: ("CS", terms)}, encoding)
    except AttributesError as error:
        assert str(error) == "an object's attributes are too large"
        return
    for tag, (_, raw) in values.items():
        if tag == CHARSET:
            continue
        key = f"{tag:08X}"
        assert (key in arrived.dataset) != (key in arrived.undecoded)
        assert key in arrived.dataset or arrived.undecoded[key].raw == raw


def test_attributes_are_too_large_only_when_they_are() -> None:
    values: Values = {t: ("LO", b"x" * VALUE_LIMIT) for t in WANTED if t not in UIDS and t != CHARSET}
    with pytest.raises(AttributesError, match="too large"):
        through(values)
    through(dict(list(values.items())[:14]))


def test_every_vr_in_the_table_is_that_of_the_dictionary() -> None:
    assert {tag: dictionary_VR(tag) for tag in WANTED} == WANTED
