"""Data sets taken apart, described and cut into frames as they stream past; pydicom is what they are compared with."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pydicom
import pytest
import scu
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError

from storescp.desk import web_bulk, web_json
from storescp.desk.web_bulk import PathError
from storescp.desk.web_dataset import DEPTH_LIMIT, DatasetError, Item, Reader
from storescp.desk.web_json import Described, Describing
from storescp.desk.web_pixels import NoFrameError, Pixels
from storescp.gate.transfer import ENCODINGS

IMPLICIT, EXPLICIT, BIG, DEFLATED = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)
# Cut off, or with a transfer syntax that is none.
BROKEN = {"MR_truncated.dcm", "SC_rgb_jpeg.dcm", "rtplan_truncated.dcm", "meta_missing_tsyntax.dcm"}
BASE = "https://desk/bulk"


def readable() -> list[scu.Object]:
    """Return the objects of pydicom's own files that have a data set of an instance."""
    found = []
    folder = Path(str(get_testdata_file("CT_small.dcm"))).parent
    for file in sorted([*folder.glob("*.dcm"), *folder.parent.glob("charset_files/*.dcm")]):
        if file.name in BROKEN:
            continue
        try:
            one = scu.read(file)
        except (InvalidDicomError, AttributeError):
            continue
        if one.transfer_syntax in ENCODINGS:
            found.append(one._replace(name=str(file)))
    return found


OBJECTS = readable()


def described(one: scu.Object, size: int = 1 << 20) -> Described:
    parts = (one.data[at : at + size] for at in range(0, len(one.data), size))
    return Describing(Reader(parts, one.transfer_syntax), BASE).dataset()


def of_pydicom(one: scu.Object) -> dict[str, Any]:
    with scu.lenient():
        return dict(pydicom.dcmread(one.name).to_json_dict(suppress_invalid_tags=True))


def test_there_are_objects_to_compare_with() -> None:
    assert len(OBJECTS) > 70
    assert {IMPLICIT, EXPLICIT, BIG, DEFLATED} <= {one.transfer_syntax for one in OBJECTS}


def test_descriptions_say_what_pydicom_says() -> None:
    differences = []
    for one in OBJECTS:
        ours, theirs = json.loads(json.dumps(described(one))), of_pydicom(one)
        for tag, element in theirs.items():
            if tag[4:] == "0000" or tag in {"FFFCFFFC", "00080005"}:
                assert tag not in ours or tag == "00080005"
                continue
            if _plain(element) != _plain(ours[tag], bulk=element):
                differences.append((Path(one.name).name, tag, element, ours[tag]))
    assert not differences


def _plain(element: dict[str, Any], bulk: dict[str, Any] | None = None) -> Any:
    """Return an element without what two writers may do differently: padding, empty values, a private element's VR."""
    if "BulkDataURI" in element and bulk is not None:
        assert element["BulkDataURI"].startswith(BASE)
        return _plain(bulk)
    if element["vr"] == "UN" and bulk is not None and bulk["vr"] != "UN":
        return _plain(bulk)
    values = element.get("Value", [])
    if element["vr"] == "SQ":
        return [{tag: _plain(e) for tag, e in item.items() if _counts(tag, e)} for item in values]
    tidied = [_tidy(value) for value in values]
    while tidied and tidied[-1] is None:
        tidied.pop()
    return tidied or element.get("InlineBinary") or []


def _counts(tag: str, element: dict[str, Any]) -> bool:
    return tag != "00080005" and "BulkDataURI" not in element and element["vr"] not in {"OB", "OW", "UN"}


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {group: text.rstrip("^ ") for group, text in value.items() if text.rstrip("^ ")} or None
    if isinstance(value, str):
        return value.strip() or None
    return value


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_where_the_parts_of_a_stream_end_makes_no_difference(size: int) -> None:
    small = [one for one in OBJECTS if len(one.data) < 40_000]
    assert len(small) > 20
    for one in small:
        assert described(one, size) == described(one)


@given(st.binary(max_size=400), st.sampled_from(sorted(ENCODINGS)))
def test_any_bytes_are_described_or_refused(content: bytes, syntax: str) -> None:
    with contextlib.suppress(DatasetError):
        msgspec.json.encode(Describing(Reader([content], syntax), BASE).dataset())


@given(st.data())
def test_an_object_that_was_changed_anywhere_is_described_or_refused(data: st.DataObject) -> None:
    one = data.draw(st.sampled_from([one for one in OBJECTS if len(one.data) < 20_000]))
    content = bytearray(one.data)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    for work in (
        lambda: msgspec.json.encode(Describing(Reader([cut], one.transfer_syntax), BASE).dataset()),
        lambda: [b"".join(f) for _, f in Pixels(Reader([cut], one.transfer_syntax), one.transfer_syntax).frames([1])],
    ):
        with contextlib.suppress(DatasetError, NoFrameError):
            work()


def element(tag: int, vr: str, value: bytes) -> bytes:
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in {"OB", "OW", "SQ", "UN", "UT"}:
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def nested(depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = element(0x00081140, "SQ", b"\xfe\xff\x00\xe0" + struct.pack("<I", len(content)) + content)
    return content


def test_sequences_nest_up_to_a_depth() -> None:
    assert described_bytes(nested(DEPTH_LIMIT))
    with pytest.raises(DatasetError, match="nests too deep"):
        described_bytes(nested(DEPTH_LIMIT + 1))


def described_bytes(content: bytes, syntax: str = EXPLICIT) -> Described:
    return Describing(Reader([content], syntax), BASE).dataset()


def test_a_value_that_claims_more_than_there_is_ends_the_data_set() -> None:
    with pytest.raises(DatasetError, match="ends within a value"):
        described_bytes(struct.pack("<HH2sHI", 8, 0x0018, b"OB", 0, 1 << 31) + b"x" * 100)


def test_an_item_that_is_longer_than_its_sequence_is_refused() -> None:
    inner = element(0x00080060, "CS", b"CT")
    with pytest.raises(DatasetError):
        described_bytes(element(0x00081140, "SQ", b"\xfe\xff\x00\xe0" + struct.pack("<I", len(inner) + 40) + inner))


def test_a_deflated_data_set_that_ends_early_is_refused() -> None:
    packed = zlib.compress(element(0x00080060, "CS", b"CT"), wbits=-15)
    assert described_bytes(packed, DEFLATED) == {"00080060": {"vr": "CS", "Value": ["CT"]}}
    with pytest.raises(DatasetError):
        described_bytes(packed[:-2], DEFLATED)


def test_large_values_have_an_address_and_small_ones_are_inline() -> None:
    small, large = b"\x01\x02" * 512, b"\x01\x02" * 513
    found = described_bytes(element(0x60003000, "OW", small) + element(0x60023000, "OW", large))
    assert base64.b64decode(found["60003000"]["InlineBinary"]) == small
    assert found["60023000"] == {"vr": "OW", "BulkDataURI": f"{BASE}/60023000"}


def test_every_address_in_a_description_leads_to_the_value() -> None:
    counted = 0
    for one in OBJECTS:
        if one.transfer_syntax == BIG:
            continue
        with scu.lenient():
            theirs = pydicom.dcmread(one.name)
            for uri in addresses(described(one)):
                path = web_bulk.path_of(uri.removeprefix(f"{BASE}/"))
                content = b"".join(web_bulk.bulk(Reader([one.data], one.transfer_syntax), path))
                found: Any = theirs
                for tag, number in itertools.zip_longest(path[::2], path[1::2]):
                    found = found[tag].value if number is None else found[tag].value[number - 1]
                if theirs.file_meta.TransferSyntaxUID.is_compressed and path == [0x7FE00010]:
                    # Fragments without what stands between them.
                    assert len(content) < len(found)
                else:
                    assert content == (found if isinstance(found, bytes) else found.encode())
                counted += 1
    assert counted > 50


def addresses(found: Described) -> Iterator[str]:
    for element in found.values():
        if "BulkDataURI" in element:
            yield element["BulkDataURI"]
        if element["vr"] == "SQ":
            for item in element.get("Value", []):
                yield from addresses(item)


@pytest.mark.parametrize("text", ["", "7FE0001", "7FE00010/", "7FE00010/1", "7FE00010/0/00080008", "../../etc/passwd"])
def test_what_is_no_address_of_a_value_is_refused(text: str) -> None:
    with pytest.raises(PathError):
        web_bulk.path_of(text)


@pytest.mark.parametrize("path", ["00081140/1/00080060", "00080060/1/00080060", "00081140", "00091001"])
def test_an_address_where_nothing_is_leads_to_nothing(path: str) -> None:
    content = element(0x00080060, "CS", b"CT") + nested(1)
    assert list(web_bulk.bulk(Reader([content], EXPLICIT), web_bulk.path_of(path))) == []


@pytest.fixture
def lenient() -> Iterator[None]:
    with scu.lenient():
        yield


@pytest.mark.usefixtures("lenient")
def test_frames_are_those_that_pydicom_finds() -> None:
    syntaxes = set()
    for one in OBJECTS:
        theirs = pydicom.dcmread(one.name)
        if "PixelData" not in theirs or "PhotometricInterpretation" not in theirs or one.transfer_syntax == BIG:
            continue
        try:
            count = int(theirs.get("NumberOfFrames") or 1)
        except ValueError:
            continue
        if theirs.file_meta.TransferSyntaxUID.is_compressed:
            expected = list(generate_frames(theirs.PixelData, number_of_frames=count))
        else:
            length = web_pixels_length(theirs)
            expected = [theirs.PixelData[at * length : (at + 1) * length] for at in range(count)]
        wanted = sorted({1, count, (count + 1) // 2})
        try:
            pixels = Pixels(Reader([one.data], one.transfer_syntax), one.transfer_syntax)
            found = {number: b"".join(content) for number, content in pixels.frames(wanted)}
        except DatasetError as error:
            # Frames of single bits that begin within bytes, and files whose pixels are too few.
            assert "begin within bytes" in str(error) or "not as many" in str(error), one.name
            continue
        assert found == {number: expected[number - 1] for number in wanted}, one.name
        syntaxes.add(one.transfer_syntax)
    assert len(syntaxes) >= 10


def web_pixels_length(theirs: pydicom.Dataset) -> int:
    samples = 2 if theirs.PhotometricInterpretation == "YBR_FULL_422" else theirs.SamplesPerPixel
    return -(-theirs.Rows * theirs.Columns * samples * theirs.BitsAllocated // 8)


def test_a_big_endian_frame_is_turned() -> None:
    big, little = (scu.read(Path(str(get_testdata_file(name)))) for name in ("MR_small_bigendian.dcm", "MR_small.dcm"))
    frames = [
        b"".join(next(iter(Pixels(Reader([one.data], one.transfer_syntax), one.transfer_syntax).frames([1])))[1])
        for one in (big, little)
    ]
    assert frames[0] == frames[1]


def test_a_frame_that_is_not_there_is_told_from_one_that_is() -> None:
    one = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))
    with pytest.raises(NoFrameError):
        list(Pixels(Reader([one.data], one.transfer_syntax), one.transfer_syntax).frames([2]))
    with pytest.raises(NoFrameError):
        Pixels(Reader([element(0x00080060, "CS", b"CT")], EXPLICIT), EXPLICIT)


def test_a_frame_is_read_without_what_lies_behind_it() -> None:
    """The parts of the stream are taken one by one: neither other frames nor the end are in memory."""
    one = scu.read(Path(str(get_testdata_file("emri_small.dcm"))))
    taken = 0

    def parts() -> Iterator[bytes]:
        nonlocal taken
        for at in range(0, len(one.data), 1024):
            taken += 1024
            yield one.data[at : at + 1024]

    pixels = Pixels(Reader(parts(), one.transfer_syntax), one.transfer_syntax)
    number, content = next(iter(pixels.frames([1])))
    head = taken
    assert number == 1
    assert all(len(piece) <= 1024 for piece in content)
    assert taken <= head + pixels.layout.frame_bits // 8 + 1024 < len(one.data)


def test_numbers_that_json_has_not_are_none() -> None:
    raw = struct.pack("<3f", 1.5, float("nan"), float("inf"))
    assert list(web_json.numbers(raw, "FL", ENCODINGS[EXPLICIT])) == [1.5, None, None]


@pytest.mark.parametrize(
    ("vr", "text", "expected"),
    [
        ("DS", "1.50", 1.5), ("DS", "-7 ", -7), ("DS", "1e3", 1000.0), ("DS", ".5", 0.5), ("DS", "1,5", "1,5"),
        ("DS", "1e999", "1e999"), ("DS", "nan", "nan"), ("DS", "9" * 40, 1e40), ("IS", "+12", 12), ("IS", "1.5", "1.5"),
        ("IS", "9" * 40, "9" * 40), ("IS", "1_0", "1_0"),
    ],
)  # fmt: skip
def test_strings_of_numbers_are_numbers_where_every_reader_has_room_for_them(
    vr: str, text: str, expected: float | str
) -> None:
    found = described_bytes(element(0x00101030, vr, text.encode()))
    assert msgspec.json.decode(msgspec.json.encode(found)) == {"00101030": {"vr": vr, "Value": [expected]}}


def test_an_item_knows_how_long_it_is() -> None:
    assert Item(ENCODINGS[EXPLICIT], 10, 1, 10).length == 10
