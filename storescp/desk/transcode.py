"""Another transfer syntax for a peer that does not take the stored one: pydicom's plugins, in the desk alone.

The whole object is in memory for it, up to a bound; what cannot be done is said, and fails that sub-operation.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable

import pydicom
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
    content.write(
        header(
            sop_class=instance.sop_class,
            sop_instance=instance.sop,
            transfer_syntax=instance.transfer_syntax,
            source=instance.calling,
        )
    )
    for part in parts:
        content.write(part)
    content.seek(0)
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            found = dcmread(content)
            if instance.transfer_syntax not in _PLAIN:
                found.decompress(as_rgb=False, generate_instance_uid=False)
            elif instance.transfer_syntax == BIG_ENDIAN:
                _turn(found)
            found.file_meta = FileMetaDataset()
            found.file_meta.TransferSyntaxUID = UID(target)
            return encode(found, target)
    except Exception as error:
        # Plugins raise what they like; nothing of an object goes into the message.
        raise TranscodeError(
            f"{instance.transfer_syntax} cannot be made into {target}: {type(error).__name__}"
        ) from error


def _turn(found: Dataset) -> None:
    """Turn words of pixel data around, which pydicom leaves as they are."""
    if "PixelData" in found and int(found.get("BitsAllocated", 8)) == 16:
        pixels = bytearray(found.PixelData)
        pixels[0::2], pixels[1::2] = pixels[1::2], pixels[0::2]
        found.PixelData = bytes(pixels)
    elif "PixelData" in found and int(found.get("BitsAllocated", 8)) != 8:
        raise ValueError("pixels of another size than 8 or 16 bits")
