"""Identifiers of C-FIND, C-MOVE and C-GET: data sets to what is asked for, rows to data sets. pydicom's edge.

Source: PS3.4 C.2.2.1, C.4.1.1.3, C.4.2.1.4.
"""

from __future__ import annotations

import io
import warnings
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


class IdentifierError(Exception):
    """An identifier does not fit its service; the message fits an Error Comment and holds no value."""


def decode(content: bytes, transfer_syntax: str) -> Dataset:
    """Return an identifier.

    Raises:
        IdentifierError: It is no data set.
    """
    encoding = ENCODINGS[transfer_syntax]
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
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
        if tag in _NO_KEYS or element.tag.is_private:
            continue
        values = [] if element.VR == "SQ" else _values(element)
        known = tag in SUPPORTED[level]
        supported = supported and (known or not any(values))
        match[tag] = values if known else []
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
    found = Dataset()
    found.add_new(Tag(LEVEL), "CS", asked.level)
    found.add_new(Tag(_RETRIEVE_TITLE), "AE", title)
    found.add_new(Tag(_AVAILABILITY), "CS", "ONLINE")
    if not all(value.isascii() for values in row.values() for value in values):
        found.add_new(Tag(_CHARACTER_SET), "CS", _UTF8)
    for tag in asked.match:
        vr = _vr(tag)
        values = row.get(tag, [])
        found.add_new(Tag(tag), vr, [] if vr == "SQ" else _typed(values))
    return encode(found, transfer_syntax)


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
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        write_dataset(out, found)
    return bytes(out.getvalue())


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


def _typed(values: list[str]) -> Any:
    return values[0] if len(values) == 1 else values


def _tag(element: DataElement) -> str:
    return f"{element.tag:08X}"


def _vr(tag: str) -> str:
    try:
        # Of several that the dictionary allows, the first: all that the index has have one.
        return str(dictionary_VR(Tag(tag))).split(" ", maxsplit=1)[0]
    except KeyError:
        return "UN"
