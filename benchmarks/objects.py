"""The objects that the benchmark sends: synthetic data sets, explicit VR little endian, with UIDs of one fixed length.

Because every UID has the same length, a data set is encoded once and made a new object by writing over its UIDs.
"""

from __future__ import annotations

import os
import secrets
import struct
from pathlib import Path
from typing import NamedTuple

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.7.3"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
UID_LENGTH = 44

_LONG_VRS = {"OB", "OW", "SQ", "UN", "UT"}
_CHUNK = 1 << 20


class Template(NamedTuple):
    """One encoded data set: its head, with placeholders for UIDs, and pixels as a chunk that repeats.

    ``head`` ends with the header of the pixel data element; ``pixel_bytes`` follow it.
    """

    sop_class: str
    head: bytes
    sop_instance_at: int
    study_at: int
    series_at: int
    chunk: bytes
    pixel_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the data set."""
        return len(self.head) + self.pixel_bytes

    def pixels(self, start: int, length: int) -> bytes:
        """Return pixel bytes of a range: the chunk, repeated."""
        first = start % len(self.chunk)
        repeats = -(-(first + length) // len(self.chunk))
        return (self.chunk * repeats)[first : first + length]


class Uids:
    """New UIDs: one random number under 2.25, counted up; all of them 44 characters long."""

    def __init__(self) -> None:
        self._next = 10**38 + secrets.randbelow(10**38)

    def new(self) -> bytes:
        """Return the next UID."""
        self._next += 1
        return b"2.25.%d" % self._next


def ct() -> Template:
    """Return a CT slice of 0.5 MB: 512 x 512 x 2 bytes."""
    return _template(CT_IMAGE, "CT", 512, 512)


def small() -> Template:
    """Return an object of 16 KB."""
    return _template(CT_IMAGE, "CT", 120, 64)


def multi_frame(megabytes: int) -> Template:
    """Return a multi-frame of about so many million bytes."""
    return _template(MULTI_FRAME, "OT", 512, 512, frames=max(2, round(megabytes * 1e6 / (512 * 512 * 2))))


def write_files(folder: Path, template: Template, count: int) -> None:
    """Write Part 10 files, one study, every instance new: what storescu sends."""
    folder.mkdir(parents=True)
    uids = Uids()
    head = bytearray(template.head)
    patch(head, template.study_at, uids.new())
    patch(head, template.series_at, uids.new())
    for number in range(count):
        instance = uids.new()
        patch(head, template.sop_instance_at, instance)
        with (folder / f"{number:06}.dcm").open("wb") as file:
            file.write(_file_meta(template.sop_class, instance) + head)
            for start in range(0, template.pixel_bytes, _CHUNK):
                file.write(template.pixels(start, min(_CHUNK, template.pixel_bytes - start)))


def patch(buffer: bytearray, at: int, uid: bytes) -> None:
    """Write a UID over the one that stands at ``at``."""
    buffer[at : at + UID_LENGTH] = uid


def _template(sop_class: str, modality: str, rows: int, columns: int, *, frames: int = 0) -> Template:
    uids = Uids()
    instance, study, series = uids.new(), uids.new(), uids.new()
    values: list[tuple[int, str, bytes | str | int]] = [
        (0x00080005, "CS", "ISO_IR 100"),
        (0x00080008, "CS", "ORIGINAL\\PRIMARY\\AXIAL"),
        (0x00080012, "DA", "20240102"),
        (0x00080013, "TM", "101112"),
        (0x00080016, "UI", sop_class),
        (0x00080018, "UI", instance),
        (0x00080020, "DA", "20240102"),
        (0x00080021, "DA", "20240102"),
        (0x00080022, "DA", "20240102"),
        (0x00080023, "DA", "20240102"),
        (0x00080030, "TM", "101112"),
        (0x00080031, "TM", "101113"),
        (0x00080032, "TM", "101114"),
        (0x00080050, "SH", "A0001"),
        (0x00080060, "CS", modality),
        (0x00080070, "LO", "Benchmark"),
        (0x00080080, "LO", "Example Hospital"),
        (0x00080090, "PN", "Referring^Physician"),
        (0x00081010, "SH", "STATION1"),
        (0x00081030, "LO", "Thorax with contrast"),
        (0x0008103E, "LO", "Axial 1.0 B30f"),
        (0x00081090, "LO", "Model 1"),
        (0x00100010, "PN", "Benchmark^Patient"),
        (0x00100020, "LO", "B-0001"),
        (0x00100030, "DA", "19700101"),
        (0x00100040, "CS", "O"),
        (0x00101010, "AS", "054Y"),
        (0x00180015, "CS", "CHEST"),
        (0x00180050, "DS", "1.0"),
        (0x00180060, "DS", "120"),
        (0x00181030, "LO", "Thorax routine"),
        (0x0020000D, "UI", study),
        (0x0020000E, "UI", series),
        (0x00200010, "SH", "1"),
        (0x00200011, "IS", "1"),
        (0x00200012, "IS", "1"),
        (0x00200013, "IS", "1"),
        (0x00200032, "DS", "-250.0\\-250.0\\100.0"),
        (0x00200037, "DS", "1.0\\0.0\\0.0\\0.0\\1.0\\0.0"),
        (0x00280002, "US", 1),
        (0x00280004, "CS", "MONOCHROME2"),
        *([(0x00280008, "IS", str(frames))] if frames else []),
        (0x00280010, "US", rows),
        (0x00280011, "US", columns),
        (0x00280030, "DS", "0.976562\\0.976562"),
        (0x00280100, "US", 16),
        (0x00280101, "US", 16),
        (0x00280102, "US", 15),
        (0x00280103, "US", 0),
        (0x00281050, "DS", "40"),
        (0x00281051, "DS", "400"),
        (0x00281052, "DS", "-1024"),
        (0x00281053, "DS", "1"),
    ]
    pixel_bytes = rows * columns * 2 * max(frames, 1)
    head = b"".join(element(*value) for value in values)
    head += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, pixel_bytes)
    return Template(
        sop_class,
        head,
        head.index(instance),
        head.index(study),
        head.index(series),
        os.urandom(min(pixel_bytes, 1 << 18)),
        pixel_bytes,
    )


def element(tag: int, vr: str, value: bytes | str | int) -> bytes:
    """Return an element in explicit VR little endian."""
    if isinstance(value, int):
        raw = struct.pack("<H", value)
    else:
        raw = value.encode("ascii") if isinstance(value, str) else value
        raw += (b"\0" if vr in {"UI", "OB"} else b" ") * (len(raw) % 2)
    group, number = tag >> 16, tag & 0xFFFF
    if vr in _LONG_VRS:
        return struct.pack("<HH2sHI", group, number, vr.encode(), 0, len(raw)) + raw
    return struct.pack("<HH2sH", group, number, vr.encode(), len(raw)) + raw


def _file_meta(sop_class: str, instance: bytes) -> bytes:
    body = b"".join(
        [
            element(0x00020001, "OB", b"\0\1"),
            element(0x00020002, "UI", sop_class),
            element(0x00020003, "UI", instance),
            element(0x00020010, "UI", EXPLICIT_LITTLE),
            element(0x00020012, "UI", "2.25.1"),
        ]
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(body)) + body
