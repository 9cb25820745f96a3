"""From a data set to the DICOM JSON Model, element by element; what is large is named by its address instead.

Text whose bytes its character set does not explain is shown with replacement characters; nothing is guessed.
Source: PS3.18 F.
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

from storage.attributes import Received
from storescp.desk.web_dataset import PIXEL_DATA, DatasetError, Element, Item, Reader
from storescp.gate.describe import CHARACTER_SET, Describer, character_sets, decoder
from storescp.gate.transfer import Encoding

# A binary value above this has an address of its own, text above the other one.
BULK_BYTES = 1024
TEXT_BYTES = 65_536
# What one instance's description may hold in memory.
DESCRIPTION_LIMIT = 64 << 20
_PIXEL_REPRESENTATION = 0x00280103
_PADDING = 0xFFFCFFFC
_BINARY = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "UV": "Q", "SV": "q", "FL": "f", "FD": "d"}
_WORDS = {"OW": 2, "OL": 4, "OF": 4, "OD": 8, "OV": 8}
_LONG_TEXT = frozenset({"LT", "ST", "UT", "UR"})
# Of so many digits at most: what every reader of JSON has room for.
_INTEGER = re.compile(r"[+-]?[0-9]{1,15}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?([0-9]{1,64}\.?[0-9]{0,64}|\.[0-9]{1,64})([eE][+-]?[0-9]{1,4})?", re.ASCII)
_NOWHERE = Received("", "", "", "", "", "")
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")

Described = dict[str, dict[str, Any]]


class Describing:
    """Describes one data set."""

    def __init__(self, reader: Reader, bulk: str) -> None:
        """Begin.

        Args:
            reader: Of the data set, at its beginning.
            bulk: The address under which its large values are; a path of tags and item numbers comes behind it.
        """
        self._reader = reader
        self._bulk = bulk
        self._kept = 0

    def dataset(self) -> Described:
        """Return the description.

        Raises:
            DatasetError: It cannot be read, or is too large to be described.
        """
        return self._item(self._reader.top, "", b"", signed=False)

    def _item(self, item: Item, path: str, names: bytes, *, signed: bool) -> Described:
        raw: dict[int, tuple[str, bytes]] = {}
        found: dict[int, dict[str, Any]] = {}
        for element in self._reader.elements(item):
            tag, key = element.tag, f"{path}{element.tag:08X}"
            if not tag & 0xFFFF or tag == _PADDING:
                continue
            vr = resolved(element.vr, signed=signed)
            if element.has_items and not element.is_encapsulated:
                within = names if CHARACTER_SET not in raw else raw[CHARACTER_SET][1]
                items = [
                    self._item(inner, f"{key}/{number}/", within, signed=signed)
                    for number, inner in enumerate(self._reader.items(element), 1)
                ]
                found[tag] = {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}
            elif is_bulk(element, vr):
                found[tag] = {"vr": vr, "BulkDataURI": f"{self._bulk}/{key}"}
            else:
                value = self._value(element)
                raw[tag] = (vr, value)
                found[tag] = {"vr": vr}
                if tag == _PIXEL_REPRESENTATION:
                    signed = any(value)
        self._fill(found, raw, names, item.encoding)
        return {f"{tag:08X}": found[tag] for tag in sorted(found)}

    def _value(self, element: Element) -> bytes:
        self._kept += element.length + 64
        if self._kept > DESCRIPTION_LIMIT:
            raise DatasetError("a data set is too large to be described")
        return self._reader.value(element)

    def _fill(
        self, found: dict[int, dict[str, Any]], raw: dict[int, tuple[str, bytes]], names: bytes, encoding: Encoding
    ) -> None:
        names = raw[CHARACTER_SET][1] if CHARACTER_SET in raw else names
        text = {tag: (vr, value) for tag, (vr, value) in raw.items() if vr not in _BINARY and vr not in _NUMBERS}
        decoded = Describer().describe({CHARACTER_SET: ("CS", names)} | text, encoding, "", _NOWHERE)
        for tag, (vr, value) in raw.items():
            if vr in _BINARY:
                if value:
                    plain = little_endian(value, vr, encoding)
                    found[tag]["InlineBinary"] = base64.b64encode(plain).decode("ascii")
                continue
            if vr in _NUMBERS:
                values: list[Any] = list(numbers(value, vr, encoding))
            elif vr == "AT":
                values = list(_tags(value, encoding))
            elif vr in _LONG_TEXT:
                values = _long(value, names, vr)
            elif (known := decoded.dataset.get(f"{tag:08X}")) is not None:
                values = [_number(v, vr) for v in known.Value]
            else:
                values = list(_replaced(value, vr))
            if values and any(v is not None for v in values):
                found[tag]["Value"] = values
        if CHARACTER_SET in found:
            # What the bytes were in; the document is UTF-8 (PS3.18 F.2).
            found[CHARACTER_SET]["Value"] = ["ISO_IR 192"]


def resolved(vr: str, *, signed: bool) -> str:
    """Return one VR where the dictionary names several (PS3.5 A.1, PS3.3 C.7.6.3)."""
    if " or " not in vr:
        return vr
    if "OW" in vr:
        return "OW"
    return "SS" if signed else "US"


def is_bulk(element: Element, vr: str) -> bool:
    """Tell whether a value is given by its address."""
    if element.tag == PIXEL_DATA:
        return element.length > 0
    return element.length > (BULK_BYTES if vr in _BINARY else TEXT_BYTES)


def numbers(value: bytes, vr: str, encoding: Encoding) -> Iterator[int | float | None]:
    """Yield the numbers of a value; what JSON has no number for is None."""
    form = struct.Struct(("<" if encoding.little_endian else ">") + _NUMBERS[vr])
    for at in range(0, len(value) - form.size + 1, form.size):
        number = form.unpack_from(value, at)[0]
        yield number if math.isfinite(number) else None


def word_length(vr: str) -> int:
    """Return of how many bytes the words of a binary value are."""
    return _WORDS.get(vr, 1)


def little_endian(value: bytes, vr: str, encoding: Encoding) -> bytes:
    """Return a binary value as JSON and octet streams have it (PS3.18 F.2.7)."""
    size = word_length(vr)
    if encoding.little_endian or size == 1:
        return value
    turned = bytearray(len(value) // size * size)
    for at in range(size):
        turned[at::size] = value[size - 1 - at : len(turned) : size]
    return bytes(turned)


def _tags(value: bytes, encoding: Encoding) -> Iterator[str]:
    form = struct.Struct("<HH" if encoding.little_endian else ">HH")
    for at in range(0, len(value) - 3, 4):
        group, number = form.unpack_from(value, at)
        yield f"{group:04X}{number:04X}"


def _long(value: bytes, names: bytes, vr: str) -> list[Any]:
    stripped = value.rstrip(b"\0 ")
    try:
        decode = decoder([""] if vr == "UR" else character_sets(names), is_name=False)
        text = decode(stripped)
    except (UnicodeError, LookupError, ValueError):
        text = stripped.decode("ascii", "replace")
    return [text] if text else []


def _replaced(value: bytes, vr: str) -> Iterator[Any]:
    for part in value.decode("ascii", "replace").strip("\0 ").split("\\"):
        if vr == "PN":
            yield {name: text for name, text in zip(_GROUPS, part.split("="), strict=False) if text} or None
        else:
            yield part.strip() or None


def _number(value: Any, vr: str) -> Any:
    """Return a decimal or integer string as a number where it is one."""
    if not isinstance(value, str) or vr not in {"DS", "IS"}:
        return value
    if _INTEGER.fullmatch(value):
        return int(value)
    if vr == "IS" or not _DECIMAL.fullmatch(value):
        return value
    number = float(value)
    return number if math.isfinite(number) else value
