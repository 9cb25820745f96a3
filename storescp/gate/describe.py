"""From the raw elements of a data set's head to attributes: DICOM JSON Model, text decoded by its character set.

Text whose bytes its character set does not explain is kept as it came, and flagged; nothing is guessed.
"""

from __future__ import annotations

from typing import Any

import pydicom.charset
import pydicom.config
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from storage.attributes import Attributes, Element, Received, Undecoded
from storescp.gate.transfer import Encoding

CHARACTER_SET = 0x00080005
_TEXT = frozenset({"LO", "SH", "PN", "UC", "LT", "ST", "UT"})
_CONTROL = dict.fromkeys([*range(32), 127])
_NO_CHARACTER_SET = frozenset({"", "ISO_IR 6", "ISO 2022 IR 6"})
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")

# pydicom would replace what does not decode; here that must be an error, so that the bytes are kept. Set once, here.
pydicom.config.settings.reading_validation_mode = pydicom.config.RAISE


def describe(
    values: dict[int, tuple[str, bytes]], encoding: Encoding, transfer_syntax: str, received: Received
) -> Attributes:
    """Return the attributes of an object from the raw elements of its head."""
    names = _split(_ascii(values.get(CHARACTER_SET, ("CS", b""))[1]))
    dataset: dict[str, Element] = {}
    undecoded: dict[str, Undecoded] = {}
    for tag, (vr, raw) in values.items():
        key = f"{tag:08X}"
        try:
            dataset[key] = Element(vr, _value(vr, raw, names, encoding))
        except (UnicodeError, LookupError, ValueError):
            undecoded[key] = Undecoded(names[:16], raw)
    return Attributes(1, transfer_syntax, dataset, undecoded, received)


def uid(values: dict[int, tuple[str, bytes]], tag: int) -> str:
    """Return a UID of the head without padding, empty if it is missing; other bytes than ASCII make it no UID."""
    return values.get(tag, ("UI", b""))[1].rstrip(b"\0 ").decode("ascii", "replace")


def _value(vr: str, raw: bytes, names: list[str], encoding: Encoding) -> list[Any]:
    if vr == "US":
        order = "little" if encoding.little_endian else "big"
        if len(raw) % 2:
            raise ValueError("odd length")
        return [int.from_bytes(raw[i : i + 2], order) for i in range(0, len(raw), 2)]  # type: ignore[arg-type]
    if vr not in _TEXT:
        return [_tidy(text) or None for text in _split(_ascii(raw, strict=True))] if raw.strip(b"\0 ") else []
    raw = raw.rstrip(b"\0 ")
    if not raw:
        return []
    encodings = pydicom.charset.convert_encodings(names)
    if names[0] in _NO_CHARACTER_SET and pydicom.charset.ESC not in raw:
        # The default repertoire is 7 bit; pydicom would take 8-bit bytes for Latin-1, which is a guess.
        raw.decode("ascii")
    if vr in {"LT", "ST", "UT"}:
        return [_tidy(pydicom.charset.decode_bytes(raw, encodings, TEXT_VR_DELIMS))]
    if vr != "PN":
        text = pydicom.charset.decode_bytes(raw, encodings, TEXT_VR_DELIMS)
        return [_tidy(part) or None for part in text.split("\\")]
    text = pydicom.charset.decode_bytes(raw, encodings, PN_DELIMS)
    return [_name(part) for part in text.split("\\")]


def _name(text: str) -> dict[str, str] | None:
    groups = {
        group: tidy.rstrip("^")
        for group, part in zip(_GROUPS, text.split("="), strict=False)
        if (tidy := _tidy(part)).rstrip("^")
    }
    return groups or None


def _ascii(raw: bytes, *, strict: bool = False) -> str:
    return raw.decode("ascii", "strict" if strict else "replace")


def _split(text: str) -> list[str]:
    return [part.strip("\0 ") for part in text.split("\\")]


def _tidy(text: str) -> str:
    return text.translate(_CONTROL).strip(" ")
