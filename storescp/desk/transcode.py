"""Another transfer syntax for a peer that does not take the stored one: pydicom's plugins, in the desk alone.

The whole object is in memory for it, up to a bound; what cannot be done is said, and fails that sub-operation.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import dcmread
from pydicom.uid import UID

from storescp.desk.identifiers import encode
from storescp.gate.transfer import ENCODINGS
from storescp.handover import Instance
from storescp.part10 import header

IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)
# What an object is made into, and what needs no plugin to be read.
TARGETS = (EXPLICIT, IMPLICIT)
_PLAIN = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})
LIMIT = 256 << 20
# More than the header of Part 10 has.
_HEADER_BYTES = 4096
_UNDEFINED = 0xFFFFFFFF
# Bytes of a word, by value representation.
_WORDS = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}


class TranscodeError(Exception):
    """It cannot be made into another transfer syntax here; the message says why."""


def is_possible(source: str, length: int) -> bool:
    """Tell whether it can be tried: its size is within the bound, and its syntax one that pydicom knows."""
    return length <= LIMIT and source in ENCODINGS


def transcode(instance: Instance, parts: Iterable[bytes | memoryview], target: str) -> bytes:
    """Return a data set in another transfer syntax, one of ``TARGETS``.

    Raises:
        TranscodeError: It cannot be done.
    """
    content = io.BytesIO()
    source = instance.transfer_syntax
    content.write(
        header(
            sop_class=instance.sop_class,
            sop_instance=instance.sop,
            # Inflated here, within the bound.
            transfer_syntax=EXPLICIT if source == DEFLATED else source,
            source=instance.calling,
        )
    )
    inflating = zlib.decompressobj(wbits=-zlib.MAX_WBITS) if source == DEFLATED else None
    try:
        for part in parts:
            # One byte more than there may be.
            room = LIMIT + _HEADER_BYTES + 1 - content.tell()
            content.write(inflating.decompress(part, room) if inflating is not None else part)
            if content.tell() > LIMIT + _HEADER_BYTES:
                raise TranscodeError("it is larger than can be made into another transfer syntax")
    except zlib.error as error:
        raise TranscodeError(f"{source} cannot be made into {target}: it is not deflated") from error
    if inflating is not None and not inflating.eof:
        raise TranscodeError(f"{source} cannot be made into {target}: it ends early")
    content.seek(0)
    try:
        found = dcmread(content)
        _check_whole(found, content.tell())
        if source not in _PLAIN:
            _check_size(found)
            found.decompress(as_rgb=False, generate_instance_uid=False)
        elif source == BIG_ENDIAN:
            _turn(found)
        found.file_meta = FileMetaDataset()
        found.file_meta.TransferSyntaxUID = UID(target)
        return encode(found, target)
    except TranscodeError:
        raise
    except Exception as error:
        # Plugins raise what they like; nothing of an object goes into the message.
        raise TranscodeError(f"{source} cannot be made into {target}: {type(error).__name__}") from error


def _check_whole(found: Dataset, end: int) -> None:
    """Refuse what ends within an element: the library would make a shorter one of it, without a word."""
    last = 0
    for tag in found.keys():  # noqa: SIM118  (iterating would convert the values)
        element = found.get_item(tag)
        if not isinstance(element, RawDataElement) or element.length == _UNDEFINED:
            # Of a sequence or of frames the library saw the end, or raised.
            last = end
            continue
        if len(element.value or b"") != element.length:
            raise TranscodeError("it ends within an element, and is sent as it is or not at all")
        last = element.value_tell + element.length
    if last != end:
        raise TranscodeError("something that is no element follows its last")


def _check_size(found: Dataset) -> None:
    """Refuse pixels that would take more memory than the bound, however small they are compressed."""
    cells = int(found.Rows) * int(found.Columns) * int(found.get("SamplesPerPixel", 1) or 1)
    frames = int(found.get("NumberOfFrames", 1) or 1)
    if cells * frames * ((int(found.BitsAllocated) + 7) // 8) > LIMIT:
        raise TranscodeError("its pixels are more than can be made into another transfer syntax")


def _turn(found: Dataset) -> None:
    """Turn words around, which pydicom leaves as they came.

    Raises:
        ValueError: Pixels of a size of which nobody says in which order their words stand.
    """
    if "PixelData" in found and int(found.BitsAllocated) not in {8, 16}:
        raise ValueError("pixels of another size than 8 or 16 bits")
    for element in found.iterall():
        size = _WORDS.get(element.VR)
        if size and element.value:
            words = bytes(element.value)
            turned = bytearray(len(words))
            for place in range(size):
                turned[place::size] = words[size - 1 - place :: size]
            element.value = bytes(turned)
