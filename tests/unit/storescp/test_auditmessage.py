"""DICOM audit messages: every record becomes what the schema of PS3.15 A.5.1 allows, and nothing of it is lost."""

from __future__ import annotations

import base64
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import find_command
from hypothesis import given, settings
from hypothesis import strategies as st

from storescp import auditevents, auditmessage
from storescp.auditevents import TABLE, Known, Source, Stored, Study
from storescp.auditmessage import LIMIT, AuditMessage, Code, Object, Participant

SCHEMA = Path(__file__).parents[2] / "schema" / "audit-message.rng"
TIME = "2026-01-31T12:00:00.000000Z"
SOURCE = Source("00" * 16, "STRONGROOM", "pacs1")
STUDY, OTHER = "1.2.3.1", "1.2.3.2"
ASSOCIATION = {
    "time": TIME,
    "type": "association-ended",
    "association": "a1",
    "calling": "CT1",
    "address": "10.1.2.3:50123",
    "certificate": "ab" * 32,
    "ending": "released",
    "stored": 5,
    "refused": 0,
    "bytes": 1000,
    "reasons": {},
    "studies": {STUDY: 5},
}
NASTY = "a\"<&>'\x00\x1b[2J\n\ud800\ufffe\u2028 ]]> ü \U0001f600"


def known(new: dict[str, int] | None = None, again: int = 0) -> Known:
    return Known(
        lambda study: Study("P<1>&", "ISSUER") if study == STUDY else Study(),
        lambda _association, _study, count: Stored({"held": count} if new is None else new, again),
        lambda erasure: (STUDY, Study("P<1>&")) if erasure == "e1" else ("", Study()),
    )


def made(record: dict[str, Any], known_: Known | None = None) -> list[ET.Element]:
    found = auditevents.messages({"time": TIME, **record}, 7, SOURCE, known_ or known())
    return [ET.fromstring(auditmessage.encode(one)) for one in found]


def codes(root: ET.Element, path: str) -> list[str | None]:
    return [element.get("csd-code") for element in root.findall(path)]


def event(root: ET.Element) -> tuple[str | None, str | None, str | None]:
    about = root.find("EventIdentification")
    assert about is not None
    return (
        codes(root, "EventIdentification/EventID")[0],
        about.get("EventActionCode"),
        about.get("EventOutcomeIndicator"),
    )


def objects(root: ET.Element) -> dict[str, str]:
    """Return what a message is about: the code of its kind with its id."""
    found = root.findall("ParticipantObjectIdentification")
    return {codes(one, "ParticipantObjectIDTypeCode")[0] or "": one.get("ParticipantObjectID") or "" for one in found}


def details(root: ET.Element, kind: str) -> dict[str, str]:
    """Return the details of the object of a kind."""
    [one] = [o for o in root.findall("ParticipantObjectIdentification") if codes(o, "*")[0] == kind]
    return {
        str(detail.get("type")): base64.b64decode(str(detail.get("value"))).decode()
        for detail in one.findall("ParticipantObjectDetail")
    }


def validate(folder: Path, contents: Iterable[bytes]) -> None:
    """Let an established validator judge messages by the schema."""
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"{number:04}.xml")
        paths[-1].write_bytes(content)
    assert paths
    command = [find_command("xmllint") or "xmllint", "--noout", "--nonet", "--relaxng", str(SCHEMA), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if not line.endswith(" validates")]
    assert (done.returncode, complaints) == (0, [])


def record_of(kind: str) -> dict[str, Any]:
    """Return a record of a type with all that any type has."""
    return {
        **ASSOCIATION,
        "type": kind,
        "uid": 1000,
        "study": STUDY,
        "erasure": "e1",
        "level": "study",
        "filters": {"patient_name": NASTY},
        "reason": NASTY,
        "instances": 5,
        "hold": {"id": "h", "patient_id": NASTY},
        "files": {"CT1.toml": None, NASTY: "ab"},
        "refused": 2,
        "stored": 9,
    }


@pytest.mark.needs("xmllint")
def test_the_messages_of_all_types_of_records_validate(tmp_path: Path) -> None:
    kinds = [*TABLE, "something-that-a-later-release-records"]
    contents = []
    for kind in kinds:
        for record in (record_of(kind), {"type": kind}):
            found = auditevents.messages({"time": TIME, **record}, 7, SOURCE, known({"held": 3, "quarantined": 1}, 1))
            contents += [auditmessage.encode(message) for message in found]
    contents.append(
        auditmessage.encode(auditevents.head(7, b"\x01" * 32, "2026-01-31T12:00:00Z", b"\x02" * 64, SOURCE))
    )
    for over in (False, True):
        contents.append(auditmessage.encode(auditevents.vault_locked(TIME, TIME, SOURCE, over=over)))
    assert len(contents) > len(kinds) * 2
    validate(tmp_path, contents)


@pytest.mark.needs("xmllint")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'EventOutcomeIndicator="0"', b'EventOutcomeIndicator="1"'),
        (b'EventDateTime="2026', b'EventDateTime="26'),
        (b"<EventID ", b"<EventId "),
        (b' UserIsRequestor="true"', b""),
        (b'csd-code="110104" ', b""),
        (b"</EventIdentification>", b"</EventIdentification><AuditSourceIdentification AuditSourceID='a'/>"),
    ],
)
def test_the_schema_in_the_tests_refuses_what_the_standard_does(tmp_path: Path, before: bytes, after: bytes) -> None:
    [message] = auditevents.messages(ASSOCIATION, 7, SOURCE, known())
    content = auditmessage.encode(message)
    changed = content.replace(before, after).replace(b"</EventId>", b"")
    assert changed != content
    with pytest.raises(AssertionError):
        validate(tmp_path, [changed])


def test_instances_are_told_once_a_study_and_those_held_already_apart() -> None:
    first, again, other = made({**ASSOCIATION, "stored": 12, "studies": {STUDY: 5, OTHER: 7}}, known({"held": 3}, 2))[
        :3
    ]
    assert [event(m) for m in (first, again, other)] == [
        ("110104", "C", "0"),
        ("110104", "R", "0"),
        ("110104", "C", "0"),
    ]
    assert details(first, "110180") == {"instances": "3", "state-held": "3"}
    assert details(again, "110180") == {"instances": "2"}
    assert (objects(first)["110180"], objects(first)["2"]) == (STUDY, "P<1>&")
    assert (objects(other)["110180"], objects(other)["2"]) == (OTHER, "unknown")
    sender, server = first.findall("ActiveParticipant")
    assert (sender.get("UserID"), sender.get("NetworkAccessPointID"), sender.get("NetworkAccessPointTypeCode")) == (
        "CT1",
        "10.1.2.3",
        "2",
    )
    assert (codes(sender, "RoleIDCode"), codes(server, "RoleIDCode")) == (["110153"], ["110152"])
    assert (sender.get("UserIsRequestor"), server.get("UserIsRequestor")) == ("true", "false")


def test_what_was_refused_on_an_association_and_studies_that_it_could_not_name_are_told_too() -> None:
    stored, more, refused = made({**ASSOCIATION, "stored": 9, "refused": 2, "reasons": {"A700": 2}})
    assert details(more, "110180") == {"instances": "4"}
    assert event(refused) == ("110113", "E", "4")
    assert details(refused, "audit-record")["reasons"] == '{"A700": 2}'
    assert event(stored)[0] == "110104"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"type": "vault-started"}, ("110100", "E", "0", ["110120", "vault-started"])),
        ({"type": "vault-stopped"}, ("110100", "E", "0", ["110121", "vault-stopped"])),
        ({"type": "unlocked", "uid": 0}, ("110114", "E", "0", ["110122", "unlocked"])),
        ({"type": "unlock-refused", "uid": 0}, ("110114", "E", "4", ["110122", "unlock-refused"])),
        ({"type": "locked"}, ("110114", "E", "0", ["110123", "locked"])),
        ({"type": "connection-refused", "address": "::1"}, ("110113", "E", "4", ["110126", "connection-refused"])),
        ({"type": "peer-added", "uid": 0}, ("110113", "E", "0", ["110128", "peer-added"])),
        ({"type": "configuration-changed"}, ("110113", "E", "0", ["110131", "configuration-changed"])),
        ({"type": "query", "uid": 0}, ("110112", "E", "0", ["query"])),
        ({"type": "exported", "uid": 0, "study": STUDY}, ("110106", "R", "0", ["exported"])),
        ({"type": "audit-read", "uid": 0}, ("110101", "R", "0", ["audit-read"])),
        ({"type": "erased", "erasure": "e1"}, ("110105", "D", "0", ["erased"])),
        ({"type": "version-destroyed"}, ("110113", "E", "0", ["110129", "version-destroyed"])),
        ({"type": "audit-broken"}, ("110113", "E", "12", ["110133", "audit-broken"])),
        ({"type": "job-ended", "result": "ok"}, ("110113", "E", "0", ["110132", "job-ended"])),
        ({"type": "job-ended", "result": "failed"}, ("110113", "E", "4", ["110132", "job-ended"])),
    ],
)
def test_a_record_becomes_the_event_that_the_table_says(record: dict[str, Any], expected: tuple[Any, ...]) -> None:
    [root] = made(record)
    assert (*event(root), codes(root, "EventIdentification/EventTypeCode")) == expected


def test_an_erased_study_is_named_with_its_patient() -> None:
    [root] = made({"type": "erased", "erasure": "e1"})
    assert (objects(root)["110180"], objects(root)["2"]) == (STUDY, "P<1>&")
    [root] = made({"type": "erased", "erasure": "nobody knows"})
    assert (objects(root)["110180"], objects(root)["2"]) == ("unknown", "unknown")


def test_the_gates_events_are_told_in_their_order_and_one_that_began_an_association_is_not() -> None:
    refused = {"time": TIME, "type": "connection-refused", "address": "10.0.0.9", "reason": "no", "count": 3}
    begun = {"time": TIME, "type": "association-begun", "calling": "CT1", "address": "10.0.0.9:1"}
    found = made({"type": "gate-events", "file": "f", "events": [refused, begun, ASSOCIATION]})
    assert [event(root)[0] for root in found] == ["110113", "110104"]
    assert details(found[0], "audit-record") == {"address": "10.0.0.9", "reason": "no", "count": "3"}
    assert found[0].findtext("EventIdentification/EventOutcomeDescription") == "no"
    assert found[0].findall("ActiveParticipant")[0].get("NetworkAccessPointID") == "10.0.0.9"


@pytest.mark.parametrize(
    ("address", "host"),
    [("10.1.2.3:5", "10.1.2.3"), ("10.1.2.3", "10.1.2.3"), ("[fd00::1]:5", "fd00::1"), ("fd00::1", "fd00::1")],
)
def test_the_port_of_an_address_is_no_part_of_the_node(address: str, host: str) -> None:
    [root] = made({"type": "connection-refused", "address": address})
    assert root.findall("ActiveParticipant")[0].get("NetworkAccessPointID") == host


def test_a_query_is_told_whole() -> None:
    [root] = made({"type": "query", "uid": 1, "level": "study", "filters": {"patient_id": NASTY}})
    query = root.findtext("ParticipantObjectIdentification/ParticipantObjectQuery")
    assert query is not None
    assert b"patient_id" in base64.b64decode(query)


HOSTILE = (
    st.text() | st.integers() | st.booleans() | st.none() | st.lists(st.text())
    | st.dictionaries(st.text(), st.text() | st.integers())
)  # fmt: skip
FIELDS = st.sampled_from(
    ["time", "calling", "address", "association", "studies", "stored", "refused", "reason", "uid", "study", "erasure"]
)


@given(st.sampled_from([*TABLE, "gate-events", "other"]), st.dictionaries(FIELDS | st.text(), HOSTILE))
@settings(max_examples=150, deadline=None)
def test_whatever_a_broken_gate_writes_into_an_event_silences_nothing(kind: str, fields: dict[str, Any]) -> None:
    found = made({"type": "gate-events", "events": [{**fields, "type": kind}, {"type": "other"}]}, known({}, 0))
    assert event(found[-1])[0] == "110113"


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()) | st.none()), st.text())
@settings(max_examples=50, deadline=None)
def test_whatever_is_in_a_record_becomes_xml_that_parses_within_the_limit(fields: dict[str, Any], text: str) -> None:
    [root] = made({**fields, "type": "restored", "reason": text, "address": text, "calling": text, "time": TIME})
    assert root.tag == "AuditMessage"


def test_a_message_that_would_be_too_long_loses_details_and_says_so() -> None:
    files = {f"peer-{number:04}": "x" * 2000 for number in range(300)}
    [message] = auditevents.messages({"time": TIME, "type": "restored", **files}, 7, SOURCE, known())
    content = auditmessage.encode(message)
    assert LIMIT // 4 < len(content) <= LIMIT
    kept = details(ET.fromstring(content), "audit-record")
    assert kept.pop("cut") == "true"
    assert all(value == "x" * 1024 + "…" for value in kept.values())


def test_a_message_that_is_too_long_without_details_is_none() -> None:
    long = Code("1", "DCM", "x" * 200)
    many = (Participant("a", True, (long,) * 500),)
    message = AuditMessage(long, (), "E", TIME, 0, many, "a", (Object("a", long, 2, 13),))
    with pytest.raises(ValueError, match="too long"):
        auditmessage.encode(message)
