"""Another transfer syntax for a peer: the same data set, the same pixels, or a clear failure within bounds."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
import scu
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from storescp.desk import transcode as module
from storescp.desk.identifiers import encode
from storescp.desk.transcode import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    TARGETS,
    TranscodeError,
    is_possible,
    transcode,
)
from storescp.handover import Instance
from storescp.part10 import header

# As in the desk's process, where nothing of this goes anywhere.
pytestmark = [pytest.mark.usefixtures("lenient_pydicom"), pytest.mark.filterwarnings("ignore")]

RLE, J2K, JPEG_LS, JPEG_LOSSLESS = (f"1.2.840.10008.1.2.{end}" for end in ("5", "4.90", "4.80", "4.70"))


def file(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def instance(syntax: str, data: bytes, sop_class: str = "1.2.840.10008.5.1.4.1.1.2") -> Instance:
    return Instance("1.2", "1.3", "1.4", sop_class, syntax, "CT1", len(data))


def opened(data: bytes, syntax: str) -> Dataset:
    head = header(sop_class="1.2.840.10008.5.1.4.1.1.2", sop_instance="1.4", transfer_syntax=syntax, source="CT1")
    with scu.lenient():
        found = pydicom.dcmread(io.BytesIO(head + data))
        found.decode()
    return found


def made(data: bytes, syntax: str, target: str) -> Dataset:
    """Return a data set after it was made into another syntax, in parts of an odd length."""
    parts = [data[i : i + 9_999] for i in range(0, len(data), 9_999)]
    return opened(transcode(instance(syntax, data), parts, target), target)


def raw(syntax: str) -> bytes:
    """Return a data set with every kind of value, in an uncompressed syntax."""
    found = pydicom.dcmread(file("CT_small.dcm"))
    found.add_new(0x00280106, "US", 5)
    found.add_new(0x00189087, "FD", 1.5)
    found.add_new(0x00081161, "UL", 70_000)
    found.add_new(0x00280009, "AT", 0x00181063)
    content = encode(found, EXPLICIT if syntax == DEFLATED else syntax)
    if syntax == DEFLATED:
        packer = zlib.compressobj(wbits=-15)
        content = packer.compress(content) + packer.flush()
    return content


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [IMPLICIT, EXPLICIT, DEFLATED])
def test_every_little_endian_pair_holds_the_same_elements(source: str, target: str) -> None:
    before, after = opened(raw(source), source), made(raw(source), source, target)
    assert after.file_meta.TransferSyntaxUID == target
    # Of private elements, implicit VR says no VR.
    first, second = ({e.tag: e.value for e in one if not e.tag.is_private} for one in (before, after))
    assert first == second
    assert {e.tag for e in before} == {e.tag for e in after}
    assert numpy.array_equal(before.pixel_array, after.pixel_array)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["ExplVR_BigEnd.dcm", "MR_small_bigendian.dcm", "SC_rgb_expb.dcm", "SC_rgb_expb_16bit.dcm"]
)
def test_big_endian_pixels_are_the_same_afterwards(name: str, target: str) -> None:
    path = file(name)
    data = scu.raw_data_set(path)
    with scu.lenient():
        before = pydicom.dcmread(path)
        after = made(data, BIG_ENDIAN, target)
        assert numpy.array_equal(before.pixel_array, after.pixel_array)
        assert {e.tag for e in before if e.tag.element} == {e.tag for e in after if e.tag.element}


def test_words_outside_of_pixels_are_turned_too() -> None:
    found = Dataset()
    item = Dataset()
    words = {
        "OW": ("H", 0x00281201), "OF": ("f", 0x00660016), "OL": ("I", 0x00660040), "OD": ("d", 0x00720073),
        "OV": ("Q", 0x00720081),
    }  # fmt: skip
    for vr, (kind, tag) in words.items():
        item.add_new(tag, vr, struct.pack(f">3{kind}", 1, 2, 3))
    found.add_new(0x00283000, "SQ", [item])
    found.add_new(0x60003000, "OW", struct.pack(">2H", 1, 2))
    found.add_new(0x00420011, "OB", b"\1\2\3\4")
    data = encode(found, BIG_ENDIAN)
    for target in TARGETS:
        after = made(data, BIG_ENDIAN, target)
        assert after[0x60003000].value == struct.pack("<2H", 1, 2)
        assert after[0x00420011].value == b"\1\2\3\4"
        turned = after[0x00283000].value[0]
        for kind, tag in words.values():
            value = turned[tag].value
            value = value if isinstance(value, bytes) else struct.pack("<3H", *value)
            assert value == struct.pack(f"<3{kind}", 1, 2, 3), hex(tag)


@pytest.mark.parametrize("bits", [1, 32, 64])
def test_big_endian_pixels_of_whose_order_nobody_says_are_refused(bits: int) -> None:
    found = Dataset()
    found.BitsAllocated, found.Rows, found.Columns = bits, 8, 8
    found.add_new(0x7FE00010, "OW", bytes(8 * bits))
    data = encode(found, BIG_ENDIAN)
    with pytest.raises(TranscodeError, match="ValueError"):
        transcode(instance(BIG_ENDIAN, data), [data], EXPLICIT)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("SC_rgb_rle.dcm", RLE), ("MR_small_RLE.dcm", RLE), ("SC_rgb_rle_2frame.dcm", RLE),
        ("SC_rgb_rle_16bit.dcm", RLE),
        ("MR_small_jp2klossless.dcm", J2K),
    ],
)  # fmt: skip
def test_compressed_pixels_are_the_same_afterwards(name: str, syntax: str, target: str) -> None:
    path = file(name)
    before = pydicom.dcmread(path)
    assert before.file_meta.TransferSyntaxUID == syntax
    data = scu.raw_data_set(path)
    after = made(data, syntax, target)
    assert numpy.array_equal(before.pixel_array, after.pixel_array)
    assert after.SOPInstanceUID == before.SOPInstanceUID


@pytest.mark.parametrize(
    ("syntax", "data"),
    [
        (RLE, b"no data set"), (RLE, b""), (RLE, raw(EXPLICIT)), (J2K, raw(EXPLICIT)), (DEFLATED, b"not deflated"),
        (DEFLATED, raw(DEFLATED)[:-40]), (IMPLICIT, b"\1\0\1\0\xff\xff\xff\x7f"),
        ("1.2.840.10008.1.2.4.94", raw(EXPLICIT)),
        (EXPLICIT, raw(EXPLICIT)[:-1]),
        (EXPLICIT, raw(EXPLICIT) + b"\1\0"),
        (JPEG_LS, scu.raw_data_set(file("MR_small_jpeg_ls_lossless.dcm"))),
        (JPEG_LOSSLESS, scu.raw_data_set(file("SC_rgb_jpeg_gdcm.dcm"))),
        ("1.2.840.10008.1.2.4.102", scu.raw_data_set(file("SC_rgb_rle.dcm"))),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_a_clear_error_that_holds_nothing_of_the_object(syntax: str, data: bytes) -> None:
    with pytest.raises(TranscodeError) as refused:
        transcode(instance(syntax, data), [data], EXPLICIT)
    assert str(refused.value).startswith((f"{syntax} cannot be made into {EXPLICIT}: ", "its ", "it ends", "something"))


def test_cut_frames_are_an_error(tmp_path: Path) -> None:
    data = scu.raw_data_set(file("SC_rgb_rle_2frame.dcm"))
    with pytest.raises(TranscodeError):
        transcode(instance(RLE, data), [data[: len(data) // 2]], EXPLICIT)


def test_what_grows_beyond_the_bound_is_refused_before_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 1 << 20)
    packer = zlib.compressobj(wbits=-15)
    bomb = packer.compress(raw(EXPLICIT) + bytes(64 << 20)) + packer.flush()
    assert len(bomb) < 1 << 20
    with pytest.raises(TranscodeError, match="larger"):
        transcode(instance(DEFLATED, bomb), [bomb], EXPLICIT)
    found = pydicom.dcmread(file("SC_rgb_rle.dcm"))
    found.Rows = found.Columns = 60_000
    data = encode(found, EXPLICIT)
    with pytest.raises(TranscodeError, match="more than can be made"):
        transcode(instance(RLE, data), [data], EXPLICIT)
    plain = raw(EXPLICIT) + bytes(1 << 20)
    with pytest.raises(TranscodeError, match="larger"):
        transcode(instance(EXPLICIT, plain), [plain], IMPLICIT)


def test_what_is_tried_at_all_is_bounded_and_known() -> None:
    assert is_possible(RLE, 100)
    assert not is_possible(RLE, module.LIMIT + 1)
    assert not is_possible("1.2.3.4", 100)


def test_an_error_of_who_reads_passes_through() -> None:
    def parts() -> Any:
        yield b"ab"
        raise KeyError

    with pytest.raises(KeyError):
        transcode(instance(EXPLICIT, b"abcd"), parts(), IMPLICIT)
