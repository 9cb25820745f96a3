"""The attributes of a record: what the gate tells the vault about an object, as strict JSON.

The vault trusts nothing here but the shape: every text is bounded and checked before it reaches the index.
Source: docs/format.md, section 2.3.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from storage.pack import ATTRIBUTES_LIMIT

_Text = Annotated[str, msgspec.Meta(max_length=16_384)]
_Short = Annotated[str, msgspec.Meta(max_length=256)]
_HEX = re.compile(r"[0-9a-f]*", re.ASCII)
_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
_TAG = re.compile(r"[0-9A-F]{8}", re.ASCII)
_VR = re.compile(r"[A-Z]{2}", re.ASCII)
# Everything below the space but tab, line feed, form feed and carriage return, which DICOM text may hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")

SOP_CLASS = "00080016"
SOP_INSTANCE = "00080018"
STUDY = "0020000D"
SERIES = "0020000E"


class AttributesError(ValueError):
    """The attributes of a record are malformed."""


class Element(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One element of the DICOM JSON Model."""

    vr: _Short
    Value: Annotated[list[Any], msgspec.Meta(max_length=4100)] = []


class Undecoded(msgspec.Struct, forbid_unknown_fields=True):
    """Text whose bytes its character set does not explain."""

    charset: Annotated[list[_Short], msgspec.Meta(max_length=16)]
    raw: bytes


class Received(msgspec.Struct, forbid_unknown_fields=True):
    """Where an object came from."""

    at: _Short
    association: _Short
    calling: _Short
    called: _Short
    address: _Short
    certificate: _Short


class Attributes(msgspec.Struct, forbid_unknown_fields=True):
    """The attributes of one record."""

    format: int
    transfer_syntax: _Short
    dataset: dict[str, Element]
    undecoded: dict[str, Undecoded]
    received: Received

    def text(self, tag: str) -> str:
        """Return the first value of an element as text, empty if there is none."""
        element = self.dataset.get(tag)
        if element is None or not element.Value:
            return ""
        value = element.Value[0]
        return value if isinstance(value, str) else "" if isinstance(value, (dict, list)) else str(value)

    def name(self, tag: str) -> dict[str, str]:
        """Return the component groups of a person name, empty if there is none."""
        element = self.dataset.get(tag)
        value = element.Value[0] if element is not None and element.Value else None
        return value if isinstance(value, dict) else {}


def is_uid(text: str) -> bool:
    """Tell whether text is a DICOM UID: digits and single dots, 1 to 64 characters."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def encode(attributes: Attributes) -> bytes:
    """Return attributes as they are sealed.

    Raises:
        AttributesError: They are too large.
    """
    try:
        content = msgspec.json.encode(attributes)
    except UnicodeEncodeError:
        raise AttributesError("an object's attributes hold text that is none") from None
    if len(content) > ATTRIBUTES_LIMIT:
        raise AttributesError("an object's attributes are too large")
    return content


def decode(content: bytes) -> Attributes:
    """Return attributes from bytes that a gate, or whoever played one, has sealed.

    Raises:
        AttributesError: They break a rule.
    """
    if len(content) > ATTRIBUTES_LIMIT:
        raise AttributesError("an object's attributes are too large")
    try:
        attributes = msgspec.json.decode(content, type=Attributes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise AttributesError("an object's attributes are malformed") from None
    if attributes.format != 1:
        raise AttributesError("an object's attributes have an unknown format")
    if not is_uid(attributes.transfer_syntax):
        raise AttributesError("an object's transfer syntax is no UID")
    _check_elements(attributes)
    _check_received(attributes.received)
    for tag in (SOP_CLASS, SOP_INSTANCE, STUDY, SERIES):
        element = attributes.dataset.get(tag)
        values = element.Value if element is not None else []
        if len(values) != 1 or not isinstance(values[0], str) or not is_uid(values[0]):
            raise AttributesError("an object lacks a UID, or one is malformed")
    return attributes


def _check_elements(attributes: Attributes) -> None:
    if not all(_TAG.fullmatch(tag) for tag in (*attributes.dataset, *attributes.undecoded)):
        raise AttributesError("an object's attributes hold a malformed tag or VR")
    for element in attributes.dataset.values():
        if not _VR.fullmatch(element.vr):
            raise AttributesError("an object's attributes hold a malformed tag or VR")
        for value in element.Value:
            _check(value)


def _check_received(received: Received) -> None:
    for text in msgspec.structs.astuple(received):
        _check(text)
    if not (_HEX.fullmatch(received.association + received.certificate) and len(received.certificate) in {0, 64}):
        raise AttributesError("an object's provenance is malformed")


def _check(value: Any) -> None:
    if isinstance(value, dict):
        for key, text in value.items():
            if key not in {"Alphabetic", "Ideographic", "Phonetic"} or not isinstance(text, str):
                raise AttributesError("an object's attributes hold a malformed name")
            _check(text)
    elif isinstance(value, str):
        if _CONTROL.search(value):
            raise AttributesError("an object's attributes hold control characters")
    elif value is not None and not isinstance(value, (int, float)):
        raise AttributesError("an object's attributes hold a value of an unknown kind")
