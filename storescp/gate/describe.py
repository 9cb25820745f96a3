"""From the raw elements of a data set's head to attributes: DICOM JSON Model, text decoded by its character set.

Text whose bytes its character set does not explain is kept as it came, and flagged; nothing is guessed.
Source: PS3.5 6.1 and 6.2, PS3.18 F.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pydicom.charset
import pydicom.config

from storage.attributes import Attributes, Element, Received, Undecoded
from storescp.gate import charset
from storescp.gate.transfer import Encoding

CHARACTER_SET = 0x00080005
_NAMES_LIMIT = 16
_TEXT = frozenset({"LO", "SH", "PN", "UC"})
_CONTROL = dict.fromkeys([*range(32), 127])
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")
_ESC = 0x1B
# Whatever stands first alone: these allow no others beside them, and the bytes of their characters may be delimiters.
_ALONE = frozenset({"ISO_IR 192", "GB18030", "GBK"})
_TWO_BYTES = frozenset({"GB18030", "GBK"})
_DEFAULT = frozenset({"", "ISO_IR 6", "ISO 2022 IR 6"})
_SPELLINGS = re.compile(r"ISO([ _-]2022)?[ _-]IR[ _-]([0-9]+)", re.ASCII)
# What pydicom decodes as Latin-1 after a return to ASCII, and as Shift JIS where JIS X 0201 has nothing.
_AFTER_ASCII = re.compile(rb"\x1b\(B[^\x1b]*[\x80-\xff]")
_NOT_JIS_X_0201 = re.compile(rb"[\x80-\xa0\xe0-\xff]")
_JIS_X_0201 = frozenset({"ISO_IR 13", "ISO 2022 IR 13"})
# Escape sequences that select a set for the upper half and that Python's codec for it does not expect.
_LEFT_OVER = re.compile("\x1b\\$\\)[AC]")

# What pydicom reads for a gate is read strictly, or not at all; text is decoded strictly whatever is set.
pydicom.config.settings.reading_validation_mode = pydicom.config.RAISE


class Describer:
    """Describes the objects of an association; what an object has in common with the one before is decoded once."""

    def __init__(self) -> None:
        self._setting: tuple[bytes, Encoding] | None = None
        self._before: dict[int, tuple[bytes, str, Element | Undecoded]] = {}

    def describe(
        self, values: dict[int, tuple[str, bytes]], encoding: Encoding, transfer_syntax: str, received: Received
    ) -> Attributes:
        """Return the attributes of an object from the raw elements of its head."""
        raw_names = values.get(CHARACTER_SET, ("CS", b""))[1]
        if self._setting != (raw_names, encoding):
            self._setting = (raw_names, encoding)
            self._before = {}
        names = character_sets(raw_names)
        before, now = self._before, {}
        dataset: dict[str, Element] = {}
        undecoded: dict[str, Undecoded] = {}
        for tag, (vr, raw) in values.items():
            known = before.get(tag)
            if known is None or known[0] != raw:
                known = (raw, f"{tag:08X}", _element(vr, raw, names, encoding))
            now[tag] = known
            _, key, found = known
            if isinstance(found, Element):
                dataset[key] = found
            else:
                undecoded[key] = found
        self._before = now
        return Attributes(1, transfer_syntax, dataset, undecoded, received)


def _element(vr: str, raw: bytes, names: list[str], encoding: Encoding) -> Element | Undecoded:
    try:
        return Element(vr, _values(vr, raw, names, encoding))
    except (UnicodeError, LookupError, ValueError):
        return Undecoded([name[:64] for name in names[:_NAMES_LIMIT]], raw)


def uid(values: dict[int, tuple[str, bytes]], tag: int) -> str:
    """Return a UID of the head without padding, empty if it is missing; other bytes than ASCII make it no UID."""
    return values.get(tag, ("UI", b""))[1].rstrip(b"\0 ").decode("ascii", "replace")


def split(raw: bytes, delimiter: int) -> Iterator[bytes]:
    """Split text of ISO 2022 at a delimiter; within characters of two 7-bit bytes no byte is one."""
    start = position = 0
    double = False
    while position < len(raw):
        if raw[position] == _ESC:
            sequence = raw[position + 1 : position + 4]
            double = sequence[:2] in {b"$B", b"$@"} or sequence == b"$(D" if sequence[:1] != b")" else double
            position += 4 if sequence[:2] in {b"$(", b"$)"} else 3
        elif double:
            position += 2
        else:
            if raw[position] == delimiter:
                yield raw[start:position]
                start = position + 1
            position += 1
    yield raw[start:]


def _values(vr: str, raw: bytes, names: list[str], encoding: Encoding) -> list[Any]:
    if vr == "US":
        order = struct_order(encoding)
        if len(raw) % 2:
            raise ValueError("odd length")
        return [int.from_bytes(raw[i : i + 2], order) for i in range(0, len(raw), 2)]
    if not raw.strip(b"\0 "):
        return []
    if vr not in _TEXT:
        return [_tidy(part) or None for part in raw.decode("ascii").strip("\0 ").split("\\")]
    decode = decoder(names, is_name=vr == "PN")
    raw = raw.rstrip(b"\0 ")
    if names[0] in _TWO_BYTES:
        # A backslash or equals sign may be the second byte of a character: only text can be split.
        parts = [part.split("=") if vr == "PN" else [part] for part in decode(raw).split("\\")]
    else:
        # Each part begins in the initial state again (PS3.5 6.1.2.5.3), so it is split first and decoded then.
        raws = [split(part, ord("=")) if vr == "PN" else [part] for part in split(raw, ord("\\"))]
        parts = [[decode(piece) for piece in pieces] for pieces in raws]
    return [_name(part) if vr == "PN" else _tidy(part[0]) or None for part in parts]


def struct_order(encoding: Encoding) -> Any:
    """Return the byte order of numbers as ``int.from_bytes`` takes it."""
    return "little" if encoding.little_endian else "big"


def character_sets(raw: bytes) -> list[str]:
    """Return the defined terms in a value of Specific Character Set (0008,0005), as far as they can be made out."""
    return [_spelt(part.strip("\0 ")) for part in raw.decode("ascii", "replace").split("\\")]


def decoder(names: list[str], *, is_name: bool) -> Callable[[bytes], str]:
    """Return what decodes one part of a text, of a person's name or another one; it raises UnicodeError.

    Raises:
        LookupError: A character set is none of DICOM's.
    """
    used = names[:1] if names[0] in _ALONE else [name for name in names if name not in _ALONE]
    encodings = [pydicom.charset.python_encoding[name] for name in used if name in _KNOWN]
    if len(encodings) != len(used):
        raise LookupError("an unknown character set")
    default = used[0] in _DEFAULT
    if default:
        # The default repertoire is 7 bit; pydicom would take 8-bit bytes for Latin-1, which is a guess.
        encodings[0] = "ascii"
    unexplained = _AFTER_ASCII if default else _NOT_JIS_X_0201 if used[0] in _JIS_X_0201 else None

    def decode(raw: bytes) -> str:
        if unexplained is not None and unexplained.search(raw):
            raise UnicodeError("bytes that the character set does not explain")
        text = _LEFT_OVER.sub("", charset.decode(raw, encodings, is_name=is_name))
        # Codecs of UTF-16 heritage let lone surrogates pass, which are no text.
        text.encode("utf-8")
        return text

    return decode


def _spelt(name: str) -> str:
    """Return a character set's defined term for a spelling of it that devices are known to use."""
    found = _SPELLINGS.fullmatch(name)
    if found is None:
        return name
    return f"ISO 2022 IR {found[2]}" if found[1] else f"ISO_IR {found[2]}"


def _name(parts: list[str]) -> dict[str, str] | None:
    groups = {
        group: tidy.rstrip("^")
        for group, part in zip(_GROUPS, parts, strict=False)
        if (tidy := _tidy(part)).rstrip("^")
    }
    return groups or None


def _tidy(text: str) -> str:
    return text.translate(_CONTROL).strip(" ")


# Only DICOM's defined terms: pydicom's table is looked up by them, never by a Python codec's name from outside.
_KNOWN = frozenset(pydicom.charset.python_encoding)
