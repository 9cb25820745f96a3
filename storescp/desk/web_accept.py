"""What a client accepts: media ranges with their parameters, in the order of its preference.

Source: RFC 9110 12.5.1; PS3.18 8.7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

EXPLICIT = "1.2.840.10008.1.2.1"
ANY = "*"
OCTETS = "application/octet-stream"
DICOM = "application/dicom"
JSON = "application/dicom+json"
# Which media type the frames of a transfer syntax are; the first of a type is meant where none is named.
COMPRESSED = {
    "image/jpeg": tuple(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70)),
    "image/dicom-rle": ("1.2.840.10008.1.2.5",),
    "image/jls": ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),
    "image/jp2": ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"),
    "image/jpx": ("1.2.840.10008.1.2.4.92", "1.2.840.10008.1.2.4.93"),
    "image/jphc": ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"),
    "image/jxl": ("1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112"),
    "video/mpeg": ("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.101"),
    "video/mp4": tuple(f"1.2.840.10008.1.2.4.{number}" for number in range(102, 107)),
}  # fmt: skip
_RANGES_LIMIT = 64
_PART = re.compile(r'\s*([^;,="\s]+)\s*(?:=\s*(?:"((?:[^"\\]|\\.)*)"|([^;,\s]*)))?\s*([;,]|$)')


class AcceptError(ValueError):
    """What a client says that it accepts cannot be read."""


class Range(NamedTuple):
    """A media range: its type in lower case, and its parameters."""

    kind: str
    parameters: dict[str, str]
    weight: float

    @property
    def inner(self) -> str:
        """The type of a multipart's parts; of anything else its own."""
        return self.parameters.get("type", ANY).lower() if self.is_multipart else self.kind

    @property
    def is_multipart(self) -> bool:
        """Whether a multipart body is meant."""
        return self.kind == "multipart/related"

    @property
    def syntax(self) -> str:
        """The transfer syntax that is named, ``*`` for any; empty where none is."""
        return self.parameters.get("transfer-syntax", "")

    def takes(self, kind: str) -> bool:
        """Tell whether a media type without parameters is in the range."""
        return self.kind in {kind, "*/*", f"{kind.partition('/')[0]}/*"}


class Choice(NamedTuple):
    """A representation that a client accepts: whether in a multipart body, its type and transfer syntax or ``*``."""

    multipart: bool
    kind: str
    syntax: str


def ranges(text: str) -> list[Range]:
    """Return what is accepted, the most wanted first; everything where nothing is said.

    Raises:
        AcceptError: It is no list of media ranges.
    """
    found, position = list[Range](), 0
    kind, parameters = "", dict[str, str]()
    while position < len(text) or (kind and position == len(text)):
        part = _PART.match(text, position)
        if part is None or len(found) >= _RANGES_LIMIT:
            raise AcceptError("Accept is no list of media types, or too long")
        name, quoted, plain, delimiter = part.groups()
        if not kind:
            kind = name.lower()
        else:
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain or ""
        if delimiter != ";":
            found.append(_range(kind, parameters))
            kind, parameters = "", {}
        position = part.end()
        if not delimiter:
            break
    return sorted(found, key=lambda r: -r.weight) or [Range("*/*", {}, 1.0)]


def _range(kind: str, parameters: dict[str, str]) -> Range:
    try:
        weight = float(parameters.pop("q", "1"))
    except ValueError:
        raise AcceptError("Accept has a weight that is no number") from None
    if kind.count("/") != 1 or not 0 <= weight <= 1:
        raise AcceptError("Accept is no list of media types")
    return Range(kind, parameters, weight)


def documents(accepted: Sequence[Range]) -> str:
    """Return the type that JSON is to be given as; empty where none is accepted."""
    for range_ in accepted:
        for kind in (JSON, "application/json"):
            if range_.weight and range_.takes(kind):
                return kind
    return ""


def instances(accepted: Sequence[Range]) -> Iterator[Choice]:
    """Yield in which ways instances may be given; without a transfer syntax it is Explicit VR Little Endian."""
    for range_ in accepted:
        if not range_.weight:
            continue
        if range_.kind == "*/*":
            yield Choice(True, DICOM, ANY)
        elif range_.inner in {DICOM, ANY, "*/*", "application/*"}:
            yield Choice(range_.is_multipart, DICOM, range_.syntax or EXPLICIT)


def frames(accepted: Sequence[Range], stored: str) -> Iterator[Choice]:
    """Yield in which ways frames of a transfer syntax may be given: as they are, or native (``EXPLICIT``)."""
    for range_ in accepted:
        if not range_.weight:
            continue
        own = next((kind for kind, syntaxes in COMPRESSED.items() if stored in syntaxes), OCTETS)
        if range_.inner in {ANY, "*/*"}:
            yield Choice(True, own, ANY)
        elif range_.inner in {OCTETS, "application/*"}:
            yield Choice(range_.is_multipart, OCTETS, range_.syntax or EXPLICIT)
        elif range_.inner == own and range_.syntax in {"", ANY, stored}:
            # Which of a type's syntaxes the default is matters only where both could be had.
            yield Choice(range_.is_multipart, own, stored)


def rendered(accepted: Sequence[Range]) -> str:
    """Return the type that is drawn; empty where none of ours is accepted."""
    for range_ in accepted:
        for kind in ("image/jpeg", "image/png"):
            if range_.weight and range_.takes(kind):
                return kind
    return ""
