"""Attributes come from whoever sealed a record: strict JSON of one shape, bounded, and nothing else."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import attributes
from storage.attributes import Attributes, AttributesError, Element, Received, Undecoded
from storage.pack import ATTRIBUTES_LIMIT

QUICK = settings(deadline=None, derandomize=True, max_examples=400)
UIDS = (attributes.SOP_CLASS, attributes.SOP_INSTANCE, attributes.STUDY, attributes.SERIES)
LARGE = "an object's attributes are too large"
MALFORMED = "an object's attributes are malformed"
FORMAT = "an object's attributes have an unknown format"
SYNTAX = "an object's transfer syntax is no UID"
TAG = "an object's attributes hold a malformed tag or VR"
NO_UID = "an object lacks a UID, or one is malformed"
NAME = "an object's attributes are malformed"
CONTROL = "an object's attributes hold control characters"
KIND = "an object's attributes are malformed"
REMOVED = object()


def document() -> dict[str, Any]:
    """Return attributes as the vault gets them, every part filled."""
    return {
        "format": 1,
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "dataset": {
            **{tag: {"vr": "UI", "Value": [f"1.2.{n}"]} for n, tag in enumerate(UIDS)},
            "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane", "Ideographic": "山田^太郎"}]},
            "00100020": {"vr": "LO", "Value": ["ID 1", None, "line\r\n\ttwo\f"]},
            "00280010": {"vr": "US", "Value": [512]},
            "00101030": {"vr": "DS", "Value": [70.5]},
            "00080050": {"vr": "SH"},
        },
        "undecoded": {"00081030": {"charset": ["", "ISO 2022 IR 87"], "raw": base64.b64encode(b"\xff\0").decode()}},
        "received": {
            "at": "2026-01-31T10:11:12.000000Z", "association": "ab12", "calling": "CT1", "called": "STRONGROOM",
            "address": "127.0.0.1", "certificate": "00" * 32,
        },
    }  # fmt: skip


def changed(path: str, value: Any) -> bytes:
    """Return the document with one place (``dataset/00100020/vr``) changed, added or removed."""
    made: Any = document()
    *folders, last = path.split("/")
    place = made
    for folder in folders:
        place = place[int(folder)] if isinstance(place, list) else place[folder]
    if value is REMOVED:
        del place[last]
    elif isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return json.dumps(made, ensure_ascii=False).encode()


def holding(raw: str) -> bytes:
    """Return the document with raw JSON as the value of an element."""
    return changed("dataset/00100020/Value", ["@"]).replace(b'"@"', raw.encode())


def refused(content: bytes) -> str:
    with pytest.raises(AttributesError) as raised:
        attributes.decode(content)
    return str(raised.value)


def test_what_is_well_formed_is_read_whole() -> None:
    found = attributes.decode(json.dumps(document()).encode())
    assert found.transfer_syntax == "1.2.840.10008.1.2.1"
    assert [found.text(tag) for tag in UIDS] == ["1.2.0", "1.2.1", "1.2.2", "1.2.3"]
    assert found.name("00100010") == {"Alphabetic": "Doe^Jane", "Ideographic": "山田^太郎"}
    assert found.dataset["00100020"] == Element("LO", ["ID 1", None, "line\r\n\ttwo\f"])
    assert found.undecoded == {"00081030": Undecoded(["", "ISO 2022 IR 87"], b"\xff\0")}
    assert found.received == Received(**document()["received"])
    assert attributes.decode(attributes.encode(found)) == found


@pytest.mark.parametrize(
    ("tag", "text", "name"),
    [
        ("00100010", "", {"Alphabetic": "Doe^Jane", "Ideographic": "山田^太郎"}),
        ("00100020", "ID 1", {}),
        ("00280010", "512", {}),
        ("00101030", "70.5", {}),
        ("00080050", "", {}),
        ("FFFFFFFF", "", {}),
    ],
)
def test_an_element_is_asked_as_text_or_name(tag: str, text: str, name: dict[str, str]) -> None:
    found = attributes.decode(json.dumps(document()).encode())
    assert (found.text(tag), found.name(tag)) == (text, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((raw, MALFORMED) for raw in (b"", b"null", b"[]", b"{}", b"1", b'"', b"\xff\xfe", b"\xef\xbb\xbf{}")),
        (b"{" * 60_000, MALFORMED),
        (json.dumps(document()).encode() + b"x", MALFORMED),
        (json.dumps(document()).encode()[:-1], MALFORMED),
        *((changed(path, REMOVED), MALFORMED) for path in document()),
        *((changed(f"received/{key}", REMOVED), MALFORMED) for key in document()["received"]),
        *((changed(f"received/{key}", 1), MALFORMED) for key in document()["received"]),
        *((changed(f"received/{key}", "x" * 257), MALFORMED) for key in document()["received"]),
        (changed("dataset/00100020/vr", REMOVED), MALFORMED),
        (changed("undecoded/00081030/raw", REMOVED), MALFORMED),
        (changed("undecoded/00081030/charset", REMOVED), MALFORMED),
        *((changed(path, 1), MALFORMED) for path in (
            "unknown", "dataset/00100020/unknown", "dataset/00100020/value", "undecoded/00081030/unknown",
            "received/unknown",
        )),
        *((changed("undecoded/00081030/raw", raw), MALFORMED) for raw in ("!", "AAA", None, [1])),
        (changed("undecoded/00081030/charset", ["x"] * 17), MALFORMED),
        (changed("undecoded/00081030/charset/0", "x" * 257), MALFORMED),
        (changed("dataset/00100020/Value", ["x"] * 4101), MALFORMED),
        (changed("dataset/00100020/Value", "x"), MALFORMED),
        (changed("format", "1"), MALFORMED),
        (changed("format", 1.5), MALFORMED),
        *((changed("format", n), FORMAT) for n in (0, 2, -1, 2**63)),
        *((changed("transfer_syntax", text), SYNTAX) for text in ("", "1.", "1.2\n", "x", "1" * 65, "١")),
        *((changed(f"dataset/{tag}", {"vr": "LO"}), TAG) for tag in (
            "", "0010002", "001000200", "0010002g", "0010002a", "00100020\n", "٠0100020", "PatientID",
        )),
        *((changed("dataset/00100020/vr", vr), TAG) for vr in ("", "L", "LOO", "lo", "L\n", "ÄÖ", "1A")),
        *((changed(f"dataset/{tag}", REMOVED), NO_UID) for tag in UIDS),
        *((changed(f"dataset/{tag}", {"vr": "UI"}), NO_UID) for tag in UIDS),
        *((changed(f"dataset/{attributes.STUDY}/Value/0", uid), NO_UID) for uid in (
            "", ".1", "1.", "1..2", "1.2 ", " 1.2", "1.a", "1.2\n", "1" * 65, "1.٢", "../x", None, {"Alphabetic": "1"},
        )),
        # A UID is text; a number would be some other text again.
        *((changed(f"dataset/{attributes.SOP_INSTANCE}/Value/0", uid), NO_UID) for uid in (12, 1.5, 10**30)),
        (changed(f"dataset/{attributes.SOP_INSTANCE}/Value/0", True), KIND),
        *((changed("dataset/00100010/Value/0", name), NAME) for name in (
            {"alphabetic": "x"}, {"Alphabetic": 1}, {"Alphabetic": None}, {"Alphabetic": {"Alphabetic": "x"}},
            {"Alphabetic": ["x"]}, {"Alphabetic": "x", "Other": "y"}, {"": ""},
        )),
        *((changed("dataset/00100020/Value", [value]), KIND) for value in ([], ["x"], [[]])),
        *((holding(json.dumps(f"a{chr(n)}b")), CONTROL) for n in range(32) if chr(n) not in "\t\n\f\r"),
        (holding('"\\u007f"'), CONTROL),
        (changed("dataset/00100010/Value/0/Alphabetic", "a\x1b[2J"), CONTROL),
        *((changed(f"received/{key}", "a\x1bb"), CONTROL) for key in document()["received"]),
        (holding("NaN"), MALFORMED),
        (holding("Infinity"), MALFORMED),
        (holding("-Infinity"), MALFORMED),
        (holding("1e999"), MALFORMED),
        (holding("9" * 5000), MALFORMED),
        (holding("01"), MALFORMED),
        (holding('"\\ud800"'), MALFORMED),
        (holding('"\\udc00\\ud800"'), MALFORMED),
        (holding('"\\x"'), MALFORMED),
        (holding('"a\nb"'), MALFORMED),
        (holding("[" * 30_000 + "]" * 30_000), MALFORMED),
        (holding('{"Alphabetic":' * 4000 + "1" + "}" * 4000), MALFORMED),
        (holding('"@@"').replace(b"@@", b"\xff"), MALFORMED),
        (holding('"@@"').replace(b"@@", b"\xed\xa0\x80"), MALFORMED),
        (changed("undecoded", {"not a tag": {"charset": [], "raw": ""}}), TAG),
        (changed("undecoded", {"a\x1b[2J": {"charset": [], "raw": ""}}), TAG),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_refused_with_its_name(content: bytes, message: str) -> None:
    assert refused(content) == message


def test_attributes_of_the_greatest_size_are_taken_and_one_byte_more_is_not() -> None:
    room = ATTRIBUTES_LIMIT - len(holding('""'))
    assert len(attributes.decode(holding(json.dumps("x" * room))).text("00100020")) == room
    assert refused(holding(json.dumps("x" * (room + 1)))) == LARGE
    assert refused(b" " * (ATTRIBUTES_LIMIT + 1)) == LARGE


def test_attributes_that_would_not_be_taken_are_not_written() -> None:
    found = attributes.decode(holding('"x"'))
    spare = ATTRIBUTES_LIMIT - len(attributes.encode(found))
    found.dataset["00100020"] = Element("LO", ["x" * (spare + 1)])
    assert len(attributes.encode(found)) == ATTRIBUTES_LIMIT
    found.dataset["00100020"] = Element("LO", ["x" * (spare + 2)])
    with pytest.raises(AttributesError, match=LARGE):
        attributes.encode(found)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        *((t, True) for t in ("0", "1.2", "1.2.840.10008.1.2", "2.25." + "9" * 39, "1" * 64, "0.00.1")),
        *((t, False) for t in ("", ".", "1.", ".1", "1..2", "1 ", "1.2\n", "1,2", "1.x", "-1", "1" * 65, "1.²", "1.٣")),
    ],
)
def test_a_uid_is_digits_and_single_dots(text: str, valid: bool) -> None:
    assert attributes.is_uid(text) is valid


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just("1.2.3")
)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
paths = st.sampled_from(
    [
        *document(),
        *(f"dataset/{tag}" for tag in document()["dataset"]),
        *(f"dataset/{tag}/{key}" for tag in UIDS for key in ("vr", "Value", "Value/0")),
        "dataset/00100010/Value/0",
        "dataset/00100010/Value/0/Alphabetic",
        "dataset/99990001",
        "undecoded/00081030",
        "undecoded/00081030/charset",
        "undecoded/00081030/raw",
        *(f"received/{key}" for key in document()["received"]),
    ]
)
hostile = st.one_of(
    st.binary(max_size=60),
    st.tuples(paths, anything).map(lambda t: changed(*t)),
    st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=3)).map(
        lambda t: (c := json.dumps(document()).encode())[: t[0] % len(c)] + t[1] + c[t[0] % len(c) + 1 :]
    ),
)


@QUICK
@given(hostile)
def test_any_bytes_are_attributes_that_the_index_can_hold_or_an_attributes_error(content: bytes) -> None:
    try:
        found = attributes.decode(content)
    except AttributesError:
        return
    assert isinstance(found, Attributes)
    assert all(attributes.is_uid(found.text(tag)) for tag in UIDS)
    for tag in found.dataset:
        for text in (found.text(tag), *found.name(tag).values()):
            assert isinstance(text, str)
            assert not any((ord(c) < 32 and c not in "\t\n\f\r") or ord(c) == 127 for c in text)
            text.encode()
    assert msgspec.json.decode(attributes.encode(found), type=Attributes) == found
