"""Command sets: read as pynetdicom writes them, written as pynetdicom and pydicom read them."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import dimse_messages
from pynetdicom.dimse_primitives import C_CANCEL, C_ECHO, C_FIND, C_STORE
from pynetdicom.dsutils import decode as decode_dataset
from pynetdicom.dsutils import encode as encode_dataset

from storescp.gate import dimse, status
from storescp.gate.dimse import Command, CommandError

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
WITHIN = "a command set ends within an element"
LENGTH = "a command set holds another group or an impossible length"
TWICE = "a command set holds an element twice"
NUMBER = "a command set lacks a number, or one has a wrong length"
RESPONSE = "a response where a request is expected"


def command_set(kind: str, primitive: Any) -> bytes:
    """Return the command set that pynetdicom sends for a primitive."""
    message = getattr(dimse_messages, kind)()
    message.primitive_to_message(primitive)
    # The first byte of each value says which part of the message it carries: 3 is a whole command set.
    values = [value for p in message.encode_msg(1, 0) for _, value in p.presentation_data_value_list]
    return b"".join(value[1:] for value in values if value[0] & 1)


def c_store(instance: str = "1.2.3", message_id: int = 7) -> C_STORE:
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = message_id, 2
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = UID(CT), UID(instance)
    primitive.DataSet = BytesIO(b"data")
    return primitive


def c_echo(message_id: int = 65_535) -> C_ECHO:
    primitive = C_ECHO()
    primitive.MessageID, primitive.AffectedSOPClassUID = message_id, UID(VERIFICATION)
    return primitive


def c_find() -> C_FIND:
    primitive = C_FIND()
    primitive.MessageID, primitive.Priority, primitive.AffectedSOPClassUID = 1, 2, UID("1.2.840.10008.5.1.4.1.2.1.1")
    primitive.Identifier = BytesIO(b"data")
    return primitive


def c_cancel() -> C_CANCEL:
    primitive = C_CANCEL()
    primitive.MessageIDBeingRespondedTo = 9
    return primitive


def raw(*elements: tuple[int, bytes], group: int = 0) -> bytes:
    return b"".join(struct.pack("<HHI", group, number, len(value)) + value for number, value in elements)


US = struct.Struct("<H").pack
ECHO = {0x0002: b"1.2.840.10008.1.1\0", 0x0100: US(0x30), 0x0110: US(1), 0x0800: US(0x101)}


def echo(**changes: bytes | None) -> bytes:
    """Return an echo's command set, some elements (``e0110``) changed, left out or added."""
    elements = ECHO | {int(name[1:], 16): value for name, value in changes.items()}
    return raw(*((n, v) for n, v in sorted(elements.items()) if v is not None))


@pytest.mark.parametrize(
    ("kind", "primitive", "wanted"),
    [
        ("C_STORE_RQ", c_store(), Command(1, 7, CT, "1.2.3", has_data_set=True)),
        ("C_STORE_RQ", c_store("1." + "2" * 61), Command(1, 7, CT, "1." + "2" * 61, has_data_set=True)),
        ("C_STORE_RQ", c_store("1." + "2" * 62, 0), Command(1, 0, CT, "1." + "2" * 62, has_data_set=True)),
        ("C_ECHO_RQ", c_echo(), Command(0x30, 65_535, VERIFICATION, "", has_data_set=False)),
        ("C_FIND_RQ", c_find(), Command(0x20, 1, "1.2.840.10008.5.1.4.1.2.1.1", "", has_data_set=True)),
        ("C_CANCEL_RQ", c_cancel(), Command(0xFFF, 9, "", "", has_data_set=False)),
    ],
)
def test_a_request_of_pynetdicom_is_understood(kind: str, primitive: Any, wanted: Command) -> None:
    assert dimse.decode(command_set(kind, primitive)) == wanted


def test_a_request_that_pydicom_encodes_with_requested_uids_is_understood() -> None:
    wanted = Dataset()
    wanted.CommandGroupLength, wanted.RequestedSOPClassUID, wanted.RequestedSOPInstanceUID = 0, CT, "1.2.3.4"
    wanted.CommandField, wanted.MessageID, wanted.CommandDataSetType = 0x110, 3, 0x101
    content = encode_dataset(wanted, True, True)
    assert content is not None
    assert dimse.decode(content) == Command(0x110, 3, CT, "1.2.3.4", has_data_set=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", NUMBER),
        (echo()[:-1], LENGTH),
        (echo()[:-3], WITHIN),
        (echo() + b"\0" * 7, WITHIN),
        (echo() + raw((0, b""), group=8), LENGTH),
        (echo()[:-6] + b"\xff\xff\xff\xff" + US(0x101), LENGTH),
        (echo()[:-6] + b"\x03\0\0\0" + US(0x101), LENGTH),
        (echo() + raw((0x0110, US(1))), TWICE),
        (echo(e0110=None), NUMBER),
        (echo(e0110=b""), NUMBER),
        (echo(e0110=b"\1\0\0\0"), NUMBER),
        (echo(e0100=None), NUMBER),
        (echo(e0100=b"\x30"), NUMBER),
        (echo(e0800=None), NUMBER),
        (echo(e0800=b"\1\1\1"), NUMBER),
        (echo(e0100=US(0x0FFF)), NUMBER),
        (echo(e0100=US(0x8030)), RESPONSE),
        (echo(e0100=US(0x8001)), RESPONSE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_a_rule_is_refused_with_its_name(content: bytes, message: str) -> None:
    with pytest.raises(CommandError) as raised:
        dimse.decode(content)
    assert str(raised.value) == message


@pytest.mark.parametrize("padding", [b"", b"\0", b" ", b"\0\0", b" \0 "])
def test_a_uids_padding_is_not_part_of_it(padding: bytes) -> None:
    found = dimse.decode(echo(e0002=b"1.2" + padding, e1000=b"1" * 64 + padding))
    assert (found.sop_class, found.sop_instance) == ("1.2", "1" * 64)


@pytest.mark.parametrize(("value", "there"), [(0x0101, False), (0x0000, True), (0x0001, True), (0xFEFE, True)])
def test_one_value_alone_says_that_no_data_set_follows(value: int, there: bool) -> None:
    assert dimse.decode(echo(e0800=US(value))).has_data_set is there


def test_unknown_elements_are_passed_over() -> None:
    assert dimse.decode(echo(e0001=b"abc", e9999=b"")) == dimse.decode(echo())


@pytest.mark.parametrize(
    ("kind", "command", "code", "comment"),
    [
        ("C_ECHO_RSP", Command(0x30, 1, VERIFICATION, "", has_data_set=False), 0, ""),
        ("C_STORE_RSP", Command(1, 65_535, CT, "1.2.3", has_data_set=True), 0, ""),
        ("C_STORE_RSP", Command(1, 0, CT, "1.2.34", has_data_set=True), 0xA900, "odd"),
        ("C_STORE_RSP", Command(1, 0, CT, "1." + "2" * 62, has_data_set=True), 0xC000, "even"),
        *(("C_STORE_RSP", Command(1, 2, CT, "1.2", has_data_set=True), r.status, r.comment) for r in status.Reason),
    ],
)
def test_a_response_is_read_by_pynetdicom_and_pydicom(kind: str, command: Command, code: int, comment: str) -> None:
    content = dimse.response(command, code, comment)
    assert len(content) % 2 == 0
    dataset = decode_dataset(BytesIO(content), True, True)
    assert dataset.CommandGroupLength == len(content) - 12
    assert list(dataset.keys()) == sorted(dataset.keys())
    assert (dataset.CommandField, dataset.CommandDataSetType) == (command.field | 0x8000, 0x0101)
    message = getattr(dimse_messages, kind)()
    message.command_set = dataset
    primitive = message.message_to_primitive()
    assert (primitive.MessageIDBeingRespondedTo, primitive.Status) == (command.message_id, code)
    assert primitive.AffectedSOPClassUID == command.sop_class
    assert (getattr(primitive, "AffectedSOPInstanceUID", None) or "") == command.sop_instance
    assert dataset.get("ErrorComment", "") == comment


def test_a_response_to_a_command_without_uids_names_none() -> None:
    dataset = decode_dataset(BytesIO(dimse.response(Command(0x20, 1, "", "", has_data_set=True), 0x0211)), True, True)
    assert "AffectedSOPClassUID" not in dataset
    assert "AffectedSOPInstanceUID" not in dataset
    assert "ErrorComment" not in dataset


def test_a_long_comment_is_cut_to_what_the_standard_allows() -> None:
    content = dimse.response(Command(1, 1, CT, "1.2", has_data_set=True), 0xC000, "x" * 99)
    assert decode_dataset(BytesIO(content), True, True).ErrorComment == "x" * 64


def test_every_refusal_has_a_comment_that_fits_and_a_status_that_is_no_success() -> None:
    for reason in status.Reason:
        assert 0 < len(reason.comment) <= 64
        assert reason.comment.isascii()
        assert reason.status != status.SUCCESS


known = st.sampled_from([0, 0x0002, 0x0003, 0x0100, 0x0110, 0x0120, 0x0800, 0x1000, 0x1001])
values = st.one_of(st.binary(max_size=70), st.sampled_from([US(1), US(0x30), US(0x0FFF), US(0x101), US(0x8001), b"1."]))
sets = st.one_of(st.binary(max_size=120), st.lists(st.tuples(known, values), max_size=8).map(lambda e: raw(*e)))


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.one_of(sets, st.tuples(sets, st.binary(max_size=20)).map(lambda t: echo() + t[0] + t[1])))
def test_any_bytes_are_a_request_that_can_be_answered_or_a_command_error(content: bytes) -> None:
    try:
        command = dimse.decode(content)
    except CommandError:
        return
    assert command.field < 0x8000
    assert max(len(command.sop_class), len(command.sop_instance)) <= 64
    answer = decode_dataset(BytesIO(dimse.response(command, 0)), True, True)
    assert (answer.CommandField, answer.MessageIDBeingRespondedTo) == (command.field | 0x8000, command.message_id)


@pytest.mark.parametrize("value", [b"1" * 65, b"1.2\xe9", b"\xff" * 64])
def test_what_is_no_uid_is_told_so_and_not_repeated_in_the_response(value: bytes) -> None:
    command = dimse.decode(echo(e0002=value, e1000=value))
    assert (command.sop_class, command.sop_instance) == (dimse.NO_UID, dimse.NO_UID)
    assert dimse.NO_UID.encode() not in dimse.response(command, 0x0117)
