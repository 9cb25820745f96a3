"""DICOM files for export: a fresh Part 10 header around a data set that is written as it arrived.

The preamble is all zero (PS3.10 7.1; an executable could hide in another one).
"""

from __future__ import annotations

import io

from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

from storescp import __version__

# A UUID of our own under the root that anybody may use (PS3.5 B.2); the gate negotiates with the same.
IMPLEMENTATION_CLASS_UID = "2.25.208178423165478923171056592471368989003"
IMPLEMENTATION_VERSION = f"STRONGROOM_{__version__.replace('.', '')}"


def header(*, sop_class: str, sop_instance: str, transfer_syntax: str, source: str) -> bytes:
    """Return preamble, prefix and file meta information (PS3.10 section 7)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = UID(sop_instance)
    meta.TransferSyntaxUID = UID(transfer_syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION
    meta.SourceApplicationEntityTitle = source
    out = io.BytesIO()
    write_file_meta_info(out, meta, enforce_standard=True)
    return bytes(128) + b"DICM" + out.getvalue()
