"""Identifiers of the desk's services: what they ask for, and rows as they are answered, in every encoding."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from typing import Any

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag

from storage.query import LEVELS, SUPPORTED, Query
from storescp.desk import identifiers
from storescp.desk.identifiers import IdentifierError
from storescp.desk.models import MODELS, UNIQUE
from storescp.gate.transfer import ENCODINGS

# As in the desk's process, where nothing of this goes anywhere.
pytestmark = [pytest.mark.usefixtures("lenient_pydicom"), pytest.mark.filterwarnings("ignore")]

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
SYNTAXES = (EXPLICIT, IMPLICIT, BIG)
PATIENT_FIND, STUDY_FIND = MODELS["1.2.840.10008.5.1.4.1.2.1.1"], MODELS["1.2.840.10008.5.1.4.1.2.2.1"]
PATIENT_GET, STUDY_GET = MODELS["1.2.840.10008.5.1.4.1.2.1.3"], MODELS["1.2.840.10008.5.1.4.1.2.2.3"]


def encoded(found: Dataset, syntax: str = EXPLICIT) -> bytes:
    """Return a data set as a toolkit sends it."""
    encoding = ENCODINGS[syntax]
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = encoding.implicit, encoding.little_endian
    with lenient():
        write_dataset(out, found)
    return bytes(out.getvalue())


@contextlib.contextmanager
def lenient() -> Any:
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def keys(level: str | None, **values: Any) -> Dataset:
    found = Dataset()
    with lenient():
        if level is not None:
            found.QueryRetrieveLevel = level
        for name, value in values.items():
            setattr(found, name, value)
    return found


def asked(found: Dataset, model: Any = STUDY_FIND, syntax: str = EXPLICIT) -> tuple[Query, bool]:
    return identifiers.query(identifiers.decode(encoded(found, syntax), syntax), model)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_keys_are_taken_as_text_in_every_encoding(syntax: str) -> None:
    found = keys(
        "STUDY", PatientName="Doe^J*", StudyInstanceUID=["1.2.3", "1.2.4"], StudyDate="20260101-", PatientID="",
        ModalitiesInStudy=["CT", "MR"], NumberOfStudyRelatedInstances="",
    )  # fmt: skip
    query, supported = asked(found, syntax=syntax)
    assert supported
    assert query == Query(
        "STUDY",
        {
            "00080020": ["20260101-"],
            "00080061": ["CT", "MR"],
            "00100010": ["Doe^J*"],
            "00100020": [],
            "0020000D": ["1.2.3", "1.2.4"],
            "00201208": [],
        },
    )


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO_IR 100", "Müller^Zoë"),
        ("ISO_IR 192", "Müller^Zoë=山田^太郎"),
        ("ISO_IR 144", "Люкceмбypг"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)
def test_names_come_in_any_character_set_and_go_out_as_utf_8(character_set: Any, name: str) -> None:
    for syntax in SYNTAXES:
        query, _ = asked(keys("STUDY", SpecificCharacterSet=character_set, PatientName=name), syntax=syntax)
        assert query.match["00100010"] == [name]
        answer = read(identifiers.answer({"00100010": [name]}, query, "ROOM", syntax), syntax)
        assert (str(answer.PatientName), answer.SpecificCharacterSet) == (name, "ISO_IR 192")


def read(content: bytes, syntax: str) -> Dataset:
    encoding = ENCODINGS[syntax]
    found = read_dataset(io.BytesIO(content), encoding.implicit, encoding.little_endian)
    found.decode()
    return found


def test_an_answer_of_ascii_names_no_character_set_and_is_in_order_of_its_tags() -> None:
    query = Query("STUDY", {"0020000D": [], "00100010": [], "00080020": []})
    for syntax in SYNTAXES:
        content = identifiers.answer({"0020000D": ["1.2.3"], "00100010": ["Doe^J"]}, query, "ROOM", syntax)
        answer = read(content, syntax)
        assert len(content) % 2 == 0
        tags = [element.tag for element in answer]
        assert tags == sorted(tags)
        assert "SpecificCharacterSet" not in answer
        told = answer.QueryRetrieveLevel, answer.RetrieveAETitle, answer.InstanceAvailability
        assert told == ("STUDY", "ROOM", "ONLINE")
        assert (answer.StudyInstanceUID, str(answer.PatientName), answer.StudyDate) == ("1.2.3", "Doe^J", "")


@pytest.mark.parametrize("level", LEVELS)
def test_every_attribute_of_the_index_is_answered_as_pydicom_reads_it(level: str) -> None:
    texts = {"UI": "1.2.3", "DA": "20260131", "TM": "1030", "IS": "12", "US": "512", "PN": "Doe^J", "CS": "CT"}
    row = {tag: [texts.get(attribute.vr, "text")] for tag, attribute in SUPPORTED[level].items()}
    row["00080061"] = ["CT", "MR"]
    for syntax in SYNTAXES:
        query = Query(level, {tag: [] for tag in row})
        answer = read(identifiers.answer(row, query, "ROOM", syntax), syntax)
        for tag, values in row.items():
            value = answer[Tag(tag)].value
            many = list(value) if isinstance(value, pydicom.multival.MultiValue) else [value]
            assert [str(one) for one in many] == values, tag


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("00200011", "no number"), ("00200013", "1.5"), ("00280010", "70000"), ("00280010", "x"), ("00280010", "-1"),
        ("00280010", "\u0663"), ("00080020", "yesterday"), ("00081030", "x" * 70_000), ("00081030", "\ud800"),
        ("0020000D", "no UID"), ("00100010", "a\\b=c=d=e"),
    ],
)  # fmt: skip
def test_what_somebody_once_stored_never_breaks_an_answer(tag: str, value: str) -> None:
    """A number that is none, stored by one device, must not end everybody's queries."""
    query = Query("IMAGE", {tag: [], "00080018": []})
    for syntax in SYNTAXES:
        content = identifiers.answer({tag: [value], "00080018": ["1.2.3"]}, query, "ROOM", syntax)
        with lenient():
            encoding = ENCODINGS[syntax]
            answer = read_dataset(io.BytesIO(content), encoding.implicit, encoding.little_endian)
            assert answer.SOPInstanceUID == "1.2.3"


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_any_key_that_is_asked_for_is_answered_even_where_the_index_has_none(syntax: str) -> None:
    # Not what pydicom reads only with others beside it: tables of a VR that those tell.
    said = {0x00080052, 0x00080054, 0x00080056}
    kinds = pydicom.datadict.DicomDictionary.items()
    every = sorted(tag for tag, kind in kinds if 8 <= tag >> 16 < 0xFFFE and " or " not in kind[0])
    every = [tag for tag in every if tag & 0xFFFF and tag not in said]
    for tags in [every[i : i + 500] for i in range(0, len(every), 500)]:
        query = Query("STUDY", {f"{tag:08X}": [] for tag in tags})
        encoding = ENCODINGS[syntax]
        content = identifiers.answer({}, query, "ROOM", syntax)
        answer = read_dataset(io.BytesIO(content), encoding.implicit, encoding.little_endian)
        raw = {int(tag): answer.get_item(tag) for tag in answer.keys()}  # noqa: SIM118
        assert raw.keys() == {*tags, *said}
        # A sequence without items is read at once.
        assert {tag for tag, element in raw.items() if element.value} == said


def item(**values: Any) -> Dataset:
    found = Dataset()
    for name, value in values.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("key", "supported"),
    [
        ({"PerformingPhysicianName": ""}, True),
        ({"PerformingPhysicianName": "X"}, False),
        ({"RequestAttributesSequence": []}, True),
        ({"RequestAttributesSequence": [Dataset()]}, True),
        ({"RequestAttributesSequence": [item(ScheduledProcedureStepID="")]}, True),
        ({"RequestAttributesSequence": [item(ScheduledProcedureStepID="7")]}, False),
        ({"RequestAttributesSequence": [item(RequestedProcedureCodeSequence=[item(CodeValue="7")])]}, False),
        ({"SOPInstanceUID": "1.2.3"}, False),
        ({"FrameIncrementPointer": 0x00181063}, False),
        ({"TimezoneOffsetFromUTC": "+0100"}, True),
        ({"SpecificCharacterSet": "ISO_IR 100"}, True),
    ],
)
def test_a_key_with_a_value_that_is_not_matched_is_told(key: dict[str, Any], supported: bool) -> None:
    for syntax in SYNTAXES:
        query, found = asked(keys("STUDY", **key), syntax=syntax)
        assert found is supported
        assert all(values == [] for values in query.match.values())


def test_private_keys_are_not_answered_and_told_where_they_have_a_value() -> None:
    found = keys("STUDY", StudyInstanceUID="1.2.3")
    found.add_new(0x00090010, "LO", "")
    assert asked(found)[1]
    found.add_new(0x00091001, "LO", "x")
    query, supported = asked(found)
    assert (list(query.match), supported) == (["0020000D"], False)


def test_lengths_of_groups_and_what_no_data_set_holds_are_no_keys() -> None:
    content = encoded(keys("STUDY", StudyInstanceUID="1.2.3"))
    head = b"\x02\0\x10\0UI\x04\x001.2\0" + b"\x08\0\0\0UL\4\0\x40\0\0\0"
    query, supported = identifiers.query(identifiers.decode(head + content, EXPLICIT), STUDY_FIND)
    assert (query.match, supported) == ({"0020000D": ["1.2.3"]}, True)
    assert identifiers.answer({}, query, "ROOM", EXPLICIT)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (STUDY_FIND, keys(None)),
        (STUDY_FIND, keys("")),
        (STUDY_FIND, keys("FRAME")),
        (STUDY_FIND, keys("study")),
        (STUDY_FIND, keys("PATIENT", PatientID="1")),
        (STUDY_FIND, keys(["STUDY", "SERIES"])),
        (STUDY_FIND, keys("SERIES")),
        (STUDY_FIND, keys("SERIES", StudyInstanceUID="")),
        (STUDY_FIND, keys("SERIES", StudyInstanceUID=["1.2", "1.3"])),
        (STUDY_FIND, keys("IMAGE", StudyInstanceUID="1.2")),
        (PATIENT_FIND, keys("STUDY")),
        (PATIENT_FIND, keys("STUDY", PatientID="A*")),
        (PATIENT_FIND, keys("STUDY", PatientID="A?")),
        (PATIENT_FIND, keys("IMAGE", PatientID="A", StudyInstanceUID="1.2")),
    ],
)
def test_a_query_whose_unique_keys_do_not_fit_its_model_is_an_error(model: Any, found: Dataset) -> None:
    with pytest.raises(IdentifierError):
        asked(found, model)


@pytest.mark.parametrize("model", [PATIENT_GET, STUDY_GET])
def test_a_retrieval_needs_one_key_of_each_level_above_and_some_of_its_own(model: Any) -> None:
    values = {"PatientID": "P", "StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3", "SOPInstanceUID": "1.4"}
    names = dict(zip(UNIQUE, values, strict=True))
    for level in model.levels:
        needed = [names[upper] for upper in model.levels[: model.levels.index(level) + 1]]
        given = {name: values[name] for name in needed}
        own = names[level]
        several = given | {own: [values[own], values[own] + "1"]}
        for syntax in SYNTAXES:
            found = identifiers.selection(identifiers.decode(encoded(keys(level, **several), syntax), syntax), model)
            chosen = [found.patients, found.studies, found.series, found.instances]
            full = [several.get(name, []) for name in values]
            assert chosen == [one if isinstance(one, list) else [one] for one in full]
        for name in needed:
            wrong = [given | {name: ""}, given | {name: values[name] + "*"}]
            wrong.append({other: value for other, value in given.items() if other != name})
            if name != own:
                wrong.append(given | {name: [values[name], "1.9"]})
            for one in wrong:
                content = encoded(keys(level, **one))
                with pytest.raises(IdentifierError):
                    identifiers.selection(identifiers.decode(content, EXPLICIT), model)


def test_keys_below_the_level_select_nothing_more() -> None:
    found = identifiers.selection(keys("STUDY", StudyInstanceUID="1.2", SOPInstanceUID="1.4"), STUDY_GET)
    assert (found.studies, found.instances) == (["1.2"], [])


def test_failed_instances_fit_a_list_in_any_encoding() -> None:
    uids = [f"1.2.826.0.1.3680043.8.498.{number:038}" for number in range(1, 1001)]
    uids = [uid.replace(".0", ".1") for uid in uids]
    for syntax in SYNTAXES:
        assert read(identifiers.failed(uids, syntax), syntax).FailedSOPInstanceUIDList == uids


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_an_identifier_or_the_one_error(data: bytes) -> None:
    good = encoded(keys("STUDY", StudyInstanceUID="1.2.3", PatientName="Doe"))
    chance = random.Random(data)
    spoilt = bytearray(good)
    for byte in data[:4]:
        spoilt[chance.randrange(len(spoilt))] = byte
    for content in (data, good + data, bytes(spoilt)):
        for syntax in SYNTAXES:
            with contextlib.suppress(IdentifierError):
                query, _ = identifiers.query(identifiers.decode(content, syntax), STUDY_FIND)
                identifiers.answer({}, query, "ROOM", syntax)
            with contextlib.suppress(IdentifierError):
                identifiers.selection(identifiers.decode(content, syntax), STUDY_GET)


def test_a_query_that_nests_too_deep_is_refused() -> None:
    deep = b"\x40\0\x75\2SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 5000
    with pytest.raises(IdentifierError):
        identifiers.query(identifiers.decode(deep, EXPLICIT), STUDY_FIND)
