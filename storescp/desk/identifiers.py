"""Identifiers of C-FIND, C-MOVE and C-GET: data sets to what is asked for, rows to data sets. pydicom's edge.

Source: PS3.4 C.2.2.1, C.4.1.1.3, C.4.2.1.4.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag

from storage.query import SUPPORTED, Query
from storage.selection import Selection
from storescp.desk.models import LEVEL, PATIENT_ID, SERIES_UID, SOP_UID, STUDY_UID, UNIQUE, Model
from storescp.gate.transfer import ENCODINGS

_CHARACTER_SET, _UTF8 = "00080005", "ISO_IR 192"
_RETRIEVE_TITLE, _AVAILABILITY = "00080054", "00080056"
# What an identifier says about itself, and no key of anything.
_NO_KEYS = {_CHARACTER_SET, LEVEL, _RETRIEVE_TITLE, _AVAILABILITY, "00080201"}
# Value representations with a length of 32 bits (PS3.5 7.1.2).
_LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_SHORT_LIMIT = 0xFFFE


class IdentifierError(Exception):
    """An identifier does not fit its service; the message fits an Error Comment and holds no value."""


def lenient() -> None:
    """Let pydicom read and write what is not quite DICOM: for the whole process, and not for a moment in a thread."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


def decode(content: bytes, transfer_syntax: str) -> Dataset:
    """Return an identifier.

    Raises:
        IdentifierError: It is no data set.
    """
    encoding = ENCODINGS[transfer_syntax]
    try:
        found = read_dataset(io.BytesIO(content), encoding.implicit, encoding.little_endian)
        found.decode()
    except Exception as error:
        # The library raises whatever it stumbles over.
        raise IdentifierError("the identifier cannot be understood") from error
    return found


def query(identifier: Dataset, model: Model) -> tuple[Query, bool]:
    """Return what a C-FIND asks for, and whether every key of it is supported.

    Raises:
        IdentifierError: Level or unique keys do not fit the model.
    """
    level = _level(identifier, model)
    match: dict[str, list[str]] = {}
    supported = True
    for element in identifier:
        tag = _tag(element)
        # No data element of an identifier: commands, file meta information, lengths of groups, items (PS3.5 7).
        if tag in _NO_KEYS or not 8 <= element.tag.group < 0xFFFE or element.tag.element == 0:
            continue
        known = tag in SUPPORTED[level]
        supported = supported and (known or not _asks(element))
        if not element.tag.is_private:
            match[tag] = _values(element) if known else []
    for upper in model.levels[: model.levels.index(level)]:
        values = match.get(UNIQUE[upper], [])
        # Hierarchical: without extended negotiation each level above is one entity (PS3.4 C.4.1.2.1).
        if len(values) != 1 or not values[0] or (upper == "PATIENT" and any(c in values[0] for c in "*?")):
            raise IdentifierError(f"one {UNIQUE[upper]} is needed at level {level}")
    return Query(level=level, match=match), supported


def selection(identifier: Dataset, model: Model) -> Selection:
    """Return what a C-MOVE or C-GET asks for.

    Raises:
        IdentifierError: Level or unique keys do not fit the model.
    """
    level = _level(identifier, model)
    keys: dict[str, list[str]] = {}
    for upper in model.levels[: model.levels.index(level) + 1]:
        tag = UNIQUE[upper]
        values = [value for value in _values(identifier[Tag(tag)]) if value] if Tag(tag) in identifier else []
        if not values or (upper != level and len(values) != 1):
            raise IdentifierError(f"{'one ' if upper != level else ''}{tag} is needed at level {level}")
        if any(c in value for value in values for c in "*?"):
            raise IdentifierError(f"no wildcard is allowed in {tag}")
        keys[tag] = values
    return Selection(
        patients=keys.get(PATIENT_ID, []),
        studies=keys.get(STUDY_UID, []),
        series=keys.get(SERIES_UID, []),
        instances=keys.get(SOP_UID, []),
    )


def answer(row: dict[str, list[str]], asked: Query, title: str, transfer_syntax: str) -> bytes:
    """Return the identifier of a pending response: what was asked for, with its values.

    Args:
        row: Tag to values.
        asked: The query.
        title: The AE title from which it can be retrieved.
        transfer_syntax: How it is encoded.
    """
    found = {LEVEL: ("CS", [asked.level]), _RETRIEVE_TITLE: ("AE", [title]), _AVAILABILITY: ("CS", ["ONLINE"])}
    found |= {tag: (_vr(tag), row.get(tag, [])) for tag in asked.match}
    if not all(value.isascii() for _, values in found.values() for value in values):
        found[_CHARACTER_SET] = ("CS", [_UTF8])
    # Not by the library: it refuses what somebody once stored, a number that is none, and with it the whole query.
    return b"".join(_element(tag, *found[tag], transfer_syntax) for tag in sorted(found))


def failed(instances: list[str], transfer_syntax: str) -> bytes:
    """Return the identifier that names the instances of failed sub-operations (PS3.4 C.4.2.1.4.2)."""
    found = Dataset()
    found.add_new(Tag("00080058"), "UI", instances)
    return encode(found, transfer_syntax)


def encode(found: Dataset, transfer_syntax: str) -> bytes:
    """Return a data set as bytes."""
    encoding = ENCODINGS[transfer_syntax]
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = encoding.implicit, encoding.little_endian
    write_dataset(out, found)
    return bytes(out.getvalue())


def _element(tag: str, vr: str, values: list[str], transfer_syntax: str) -> bytes:
    """Return an element of text, or of US; without a value where that has no place in it."""
    encoding = ENCODINGS[transfer_syntax]
    order = "<" if encoding.little_endian else ">"
    if vr == "US":
        numbers = [int(value) for value in values if value.isascii() and value.isdigit()]
        content = b"".join(struct.pack(f"{order}H", number) for number in numbers if number <= 0xFFFF)
    else:
        content = "\\".join(values).encode("utf-8", "replace")
        content += (b"\0" if vr == "UI" else b" ") * (len(content) % 2)
    if len(content) > _SHORT_LIMIT and vr not in _LONG:
        content = b""
    head = struct.pack(f"{order}HH", int(tag[:4], 16), int(tag[4:], 16))
    if encoding.implicit:
        return head + struct.pack(f"{order}I", len(content)) + content
    if vr in _LONG:
        return head + vr.encode() + bytes(2) + struct.pack(f"{order}I", len(content)) + content
    return head + vr.encode() + struct.pack(f"{order}H", len(content)) + content


def _asks(element: DataElement) -> bool:
    """Tell whether a key is to be matched; an empty one is only to be returned."""
    if element.VR == "SQ":
        return any(_asks(inner) for item in element.value for inner in item)
    return any(_values(element))


def _level(identifier: Dataset, model: Model) -> str:
    level = str(identifier.get("QueryRetrieveLevel", "") or "").strip()
    if level not in model.levels:
        raise IdentifierError(f"QueryRetrieveLevel must be one of {', '.join(model.levels)}")
    return level


def _values(element: DataElement) -> list[str]:
    value: Any = element.value
    if value is None or value == "":
        return []
    if isinstance(value, (list, tuple, pydicom.multival.MultiValue)):
        return [str(one) for one in value]
    return [str(value)]


def _tag(element: DataElement) -> str:
    return f"{element.tag:08X}"


def _vr(tag: str) -> str:
    try:
        # Of several that the dictionary allows, the first: all that the index has have one.
        return str(dictionary_VR(Tag(tag))).split(" ", maxsplit=1)[0]
    except KeyError:
        return "UN"
