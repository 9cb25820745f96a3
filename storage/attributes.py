"""The attributes of a record: what the gate tells the vault about an object, as strict JSON.

The vault trusts nothing here but the shape: every text is bounded and checked before it reaches the index.
Source: docs/format.md, section 2.3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Literal

import msgspec

from storage.pack import ATTRIBUTES_LIMIT

_Short = Annotated[str, msgspec.Meta(max_length=256)]
_HEX = re.compile(r"[0-9a-f]*", re.ASCII)
_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
_TAGS = re.compile(r"[0-9A-F]*", re.ASCII)
_VRS = re.compile(r"[A-Z]*", re.ASCII)
# Everything below the space but tab, line feed, form feed and carriage return, which DICOM text may hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
# Without one of these JSON holds none of them: below the space everything is escaped.
_MAYBE_CONTROL = (rb"\u00", rb"\b", b"\x7f")

_Value = str | int | float | None | dict[Literal["Alphabetic", "Ideographic", "Phonetic"], str]

SOP_CLASS = "00080016"
SOP_INSTANCE = "00080018"
STUDY = "0020000D"
SERIES = "0020000E"


class AttributesError(ValueError):
    """The attributes of a record are malformed."""


# gc=False: they hold no cycles, and thousands of them are in memory while a pack is admitted.
class Element(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One element of the DICOM JSON Model."""

    vr: _Short
    Value: Annotated[list[_Value], msgspec.Meta(max_length=4100)] = []


class Undecoded(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Text whose bytes its character set does not explain."""

    charset: Annotated[list[_Short], msgspec.Meta(max_length=16)]
    raw: bytes


class Received(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Where an object came from."""

    at: _Short
    association: _Short
    calling: _Short
    called: _Short
    address: _Short
    certificate: _Short


class Attributes(msgspec.Struct, forbid_unknown_fields=True, gc=False):
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
        return {str(group): text for group, text in value.items()} if isinstance(value, dict) else {}


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
    # Joined, because a call for each of some forty elements is what took the time here.
    tags = (*attributes.dataset, *attributes.undecoded)
    vrs = [element.vr for element in attributes.dataset.values()]
    if not (_all_of(tags, 8, _TAGS) and _all_of(vrs, 2, _VRS)):
        raise AttributesError("an object's attributes hold a malformed tag or VR")
    suspect = any(mark in content for mark in _MAYBE_CONTROL)
    if suspect and any(_CONTROL.search(text) for text in _texts(attributes)):
        raise AttributesError("an object's attributes hold control characters")
    received = attributes.received
    if not (_HEX.fullmatch(received.association + received.certificate) and len(received.certificate) in {0, 64}):
        raise AttributesError("an object's provenance is malformed")
    for tag in (SOP_CLASS, SOP_INSTANCE, STUDY, SERIES):
        element = attributes.dataset.get(tag)
        values = element.Value if element is not None else []
        if len(values) != 1 or not isinstance(values[0], str) or not is_uid(values[0]):
            raise AttributesError("an object lacks a UID, or one is malformed")
    return attributes


def _all_of(texts: Collection[str], length: int, alphabet: re.Pattern[str]) -> bool:
    return {len(text) for text in texts} <= {length} and alphabet.fullmatch("".join(texts)) is not None


def _texts(attributes: Attributes) -> Iterator[str]:
    yield from msgspec.structs.astuple(attributes.received)
    for element in attributes.dataset.values():
        for value in element.Value:
            if isinstance(value, dict):
                yield from value.values()
            elif isinstance(value, str):
                yield value
