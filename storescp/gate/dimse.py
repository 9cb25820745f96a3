"""DIMSE command sets (PS3.7 annex E): decode requests, encode responses. Implicit VR little endian, group 0000."""

from __future__ import annotations

import struct

import msgspec

C_STORE_RQ, C_GET_RQ, C_FIND_RQ, C_MOVE_RQ, C_ECHO_RQ, C_CANCEL_RQ = 0x0001, 0x0010, 0x0020, 0x0021, 0x0030, 0x0FFF
N_EVENT_REPORT_RQ, N_ACTION_RQ = 0x0100, 0x0130
NO_DATA_SET = 0x0101
PENDING, CANCELLED = 0xFF00, 0xFE00
COMMAND_LIMIT = 16_384
NO_UID = "?"

_ELEMENT = struct.Struct("<HHI")
_US = struct.Struct("<H")
_RESPONSE_BIT = 0x8000
# Anything but NO_DATA_SET.
_DATA_SET = 0x0001
_COMMENT_LIMIT = 64


class CommandError(Exception):
    """A command set is malformed."""


class Command(msgspec.Struct, frozen=True):
    """What a request's command set says. UIDs without their padding.

    ``destination`` is a C-MOVE's, ``action`` the type of an N-ACTION.
    """

    field: int
    message_id: int
    sop_class: str
    sop_instance: str
    has_data_set: bool
    destination: str = ""
    action: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What a response's command set says."""

    field: int
    message_id: int
    status: int
    has_data_set: bool


class Counts(msgspec.Struct):
    """Sub-operations of a retrieval."""

    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0


def decode(content: bytes) -> Command:
    """Return a request's command.

    Raises:
        CommandError: It is malformed, or no request.
    """
    elements = _elements(content)
    field = _number(elements, 0x0100)
    if field & _RESPONSE_BIT:
        raise CommandError("a response where a request is expected")
    if field == C_CANCEL_RQ:
        return Command(field, _number(elements, 0x0120), "", "", has_data_set=False)
    return Command(
        field,
        _number(elements, 0x0110),
        _uid(elements, 0x0002) or _uid(elements, 0x0003),
        _uid(elements, 0x1000) or _uid(elements, 0x1001),
        has_data_set=_number(elements, 0x0800) != NO_DATA_SET,
        destination=elements.get(0x0600, b"").decode("ascii", "replace").strip(" \0"),
        action=_number(elements, 0x1008) if field == N_ACTION_RQ else 0,
    )


def decode_answer(content: bytes) -> Answer:
    """Return a response's command set.

    Raises:
        CommandError: It is malformed, or no response.
    """
    elements = _elements(content)
    field = _number(elements, 0x0100)
    if not field & _RESPONSE_BIT:
        raise CommandError("a request where a response is expected")
    has_data_set = _number(elements, 0x0800) != NO_DATA_SET
    return Answer(field & ~_RESPONSE_BIT, _number(elements, 0x0120), _number(elements, 0x0900), has_data_set)


def is_response(content: bytes) -> bool:
    """Tell whether a command set is a response's.

    Raises:
        CommandError: It is malformed.
    """
    return bool(_number(_elements(content), 0x0100) & _RESPONSE_BIT)


def store_request(
    message_id: int, sop_class: str, sop_instance: str, *, originator: str = "", originator_message: int = 0
) -> bytes:
    """Return the command set of a C-STORE request; of one for somebody's C-MOVE with who that is."""
    moved = [_text(0x1030, originator, b" "), _short(0x1031, originator_message)] if originator else []
    body = b"".join(
        [
            _text(0x0002, sop_class, b"\0"),
            _short(0x0100, C_STORE_RQ),
            _short(0x0110, message_id),
            _short(0x0700, 0),
            _short(0x0800, _DATA_SET),
            _text(0x1000, sop_instance, b"\0"),
            *moved,
        ]
    )
    return _ELEMENT.pack(0, 0, 4) + struct.pack("<I", len(body)) + body


def event_report(message_id: int, sop_class: str, sop_instance: str, event: int) -> bytes:
    """Return the command set of an N-EVENT-REPORT request with a data set."""
    body = b"".join(
        [
            _text(0x0002, sop_class, b"\0"),
            _short(0x0100, N_EVENT_REPORT_RQ),
            _short(0x0110, message_id),
            _short(0x0800, _DATA_SET),
            _text(0x1000, sop_instance, b"\0"),
            _short(0x1002, event),
        ]
    )
    return _ELEMENT.pack(0, 0, 4) + struct.pack("<I", len(body)) + body


def response(
    command: Command, status: int, comment: str = "", *, has_data_set: bool = False, counts: Counts | None = None
) -> bytes:
    """Return the command set of a response; ``counts`` of a retrieval's, without what remains where it is done."""
    numbers = []
    if counts is not None:
        numbers = [
            *([_short(0x1020, min(counts.remaining, 0xFFFF))] if status in {PENDING, CANCELLED} else []),
            _short(0x1021, min(counts.completed, 0xFFFF)),
            _short(0x1022, min(counts.failed, 0xFFFF)),
            _short(0x1023, min(counts.warning, 0xFFFF)),
        ]
    body = b"".join(
        [
            _text(0x0002, command.sop_class, b"\0") if command.sop_class not in {"", NO_UID} else b"",
            _short(0x0100, command.field | _RESPONSE_BIT),
            _short(0x0120, command.message_id),
            _short(0x0800, _DATA_SET if has_data_set else NO_DATA_SET),
            _short(0x0900, status),
            _text(0x0902, comment[:_COMMENT_LIMIT], b" ") if comment else b"",
            _text(0x1000, command.sop_instance, b"\0") if command.sop_instance not in {"", NO_UID} else b"",
            _short(0x1008, command.action) if command.action else b"",
            *numbers,
        ]
    )
    return _ELEMENT.pack(0, 0, 4) + struct.pack("<I", len(body)) + body


def _elements(content: bytes) -> dict[int, bytes]:
    elements: dict[int, bytes] = {}
    position = 0
    while position < len(content):
        if len(content) - position < 8:
            raise CommandError("a command set ends within an element")
        group, element, length = _ELEMENT.unpack_from(content, position)
        position += 8
        if group != 0 or length > len(content) - position:
            raise CommandError("a command set holds another group or an impossible length")
        if element in elements:
            raise CommandError("a command set holds an element twice")
        elements[element] = content[position : position + length]
        position += length
    return elements


def _number(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != 2:
        raise CommandError("a command set lacks a number, or one has a wrong length")
    return int(_US.unpack(value)[0])


def _uid(elements: dict[int, bytes], element: int) -> str:
    value = elements.get(element, b"").rstrip(b"\0 ")
    # What is no UID is answered so, by whoever needs one; it is not repeated in the answer.
    return value.decode("ascii") if len(value) <= 64 and value.isascii() else NO_UID


def _short(element: int, value: int) -> bytes:
    return _ELEMENT.pack(0, element, 2) + _US.pack(value)


def _text(element: int, value: str, padding: bytes) -> bytes:
    raw = value.encode("ascii")
    if len(raw) % 2:
        raw += padding
    return _ELEMENT.pack(0, element, len(raw)) + raw
