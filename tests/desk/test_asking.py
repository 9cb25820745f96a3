"""The desk asked by what is not ours: DCMTK and pynetdicom find, fetch and move; what they get is what was stored."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pydicom
import pytest
import scu
from conftest import DCMTK, Finished, dcmtk, find_command, send, tls_arguments
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pynetdicom import evt
from pynetdicom.presentation import build_context
from served import (
    BIG,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    PATIENT_ROOT,
    STUDY_ROOT,
    Desk,
    Raw,
    Received,
    command,
    counts,
    desk,
    find,
    get_contexts,
    identifier,
    last,
    listening,
    models,
    objects,
)
from tunnel import tunnel

from storescp.desk.identifiers import encode
from storescp.gate import dimse, wire

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
FILES = {
    name: Path(str(get_testdata_file(name, download=False)))
    for name in ("SC_rgb_rle.dcm", "JPEG2000.dcm", "ExplVR_BigEnd.dcm", "image_dfl.dcm", "693_J2KR.dcm")
}
CT_CLASS, MR_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
SLICES = 12
COMMENTS = 0x0000, 0x0902

# pynetdicom leaves the sockets of associations that the other side ended to the garbage collector.
pytestmark = [
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Site:
    """The server of this module: what it holds, and who listens."""

    def __init__(self, folder: Path) -> None:
        self.received = Received()
        self.picky = Received()
        self.slices = objects(folder, SLICES, CT, PatientName="Müller^Zoë", SpecificCharacterSet="ISO_IR 100")
        # A study that two devices sent to.
        self.shared = objects(folder, 3, MR, PatientID="SHARED")
        self.items = [scu.read(path) for path in [*self.slices, *FILES.values(), MR]]
        self.by_uid = {item.sop_instance: item for item in self.items}
        self.study = self.items[0].study
        self.series = self.items[0].series
        self.ports: dict[str, int] = {}
        self.server: Desk = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("o"))
    kinds = [(CT_CLASS, [EXPLICIT]), (MR_CLASS, [EXPLICIT])]
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as dcmtks:
        nobody, made.ports["DCMTK"] = free.getsockname()[1], dcmtks.getsockname()[1]

    def prepare(server: Desk) -> None:
        server.peer("CT1")
        server.peer("MR1")
        everything = ("echo", "find", "get", "move")
        server.peer("ASK", *everything)
        server.peer("FINDS", "find")
        server.peer("TWICE", "find", maximum_associations=2)
        server.peer("OFMR1", *everything, sees_ae_titles=["MR1"])
        server.peer("OFMR", *everything, sees_modalities=["MR"])
        server.peer("NOTHING", *everything, sees_ae_titles=["NOBODY"])
        for title, keys in (("DEST", "DEST"), ("PLAIN", ""), ("PICKY", "PICKY"), ("OTHER", "STRANGER")):
            handler = made.picky.handler if title == "PICKY" else made.received.handler
            offered = kinds[1:] if title == "PICKY" else kinds
            folder = server.keys(keys) if keys else None
            port = stack.enter_context(listening(title, offered, [handler], folder))
            server.peer(title, listens=f"127.0.0.1:{port}", listens_plaintext=title == "PLAIN")
        server.peer("GONE", listens=f"127.0.0.1:{nobody}")
        server.peer("DCMTK", listens=f"127.0.0.1:{made.ports['DCMTK']}")
        made.ports["GONE"] = nobody

    with contextlib.ExitStack() as stack:
        made.server = server = stack.enter_context(desk(tmp_path_factory, prepare))
        own = [*made.slices, *FILES.values(), made.shared[0]]
        assert send(server, own) == [0] * len(own)
        assert send(server, [*made.shared[1:], MR], "MR1") == [0, 0, 0]
        yield made


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def as_stored(site: Site, files: list[Path]) -> list[str]:
    """Assert that files hold what was stored, byte by byte; return their instances."""
    for path in files:
        found = scu.read(path)
        assert scu.raw_data_set(path) == site.by_uid[found.sop_instance].data
    return sorted(scu.read(path).sop_instance for path in files)


# --- DCMTK


def findscu(site: Site, folder: Path, *keys: str, root: str = "-S", title: str = "ASK") -> list[Dataset]:
    issued = site.server.home / "issued" / title
    folder.mkdir()
    arguments = [item for key in keys for item in ("-k", key)]
    done = dcmtk(
        "findscu", *tls_arguments(issued, title), root, "-X", "-od", folder, "127.0.0.1",
        str(site.server.desk_port), *arguments,
    )  # fmt: skip
    assert done.status == 0, done.err
    return [pydicom.dcmread(path, force=True) for path in files_of(folder)]


@pytest.mark.needs("findscu")
def test_findscu_finds_at_every_level_of_both_roots(site: Site, tmp_path: Path) -> None:
    study, series = f"StudyInstanceUID={site.study}", f"SeriesInstanceUID={site.series}"
    patient = "PatientID=1CT1"
    asked = {
        ("-P", "PATIENT"): (["PatientName=M*", "PatientID"], {"1CT1"}, "PatientID"),
        ("-P", "STUDY"): ([patient, "StudyInstanceUID"], None, "StudyInstanceUID"),
        ("-P", "SERIES"): ([patient, study, "SeriesInstanceUID"], {site.series}, "SeriesInstanceUID"),
        ("-S", "STUDY"): ([f"{study}", "PatientName"], {site.study}, "StudyInstanceUID"),
        ("-S", "SERIES"): ([study, "SeriesInstanceUID"], {site.series}, "SeriesInstanceUID"),
    }  # fmt: skip
    instances = {item.sop_instance for item in site.items[:SLICES]}
    asked["-S", "IMAGE"] = ([study, series, "SOPInstanceUID"], instances, "SOPInstanceUID")
    asked["-P", "IMAGE"] = ([patient, study, series, "SOPInstanceUID"], instances, "SOPInstanceUID")
    for (root, level), (keys, expected, tag) in asked.items():
        rows = findscu(site, tmp_path / f"{root}{level}", f"QueryRetrieveLevel={level}", *keys, root=root)
        found = {str(row[tag].value) for row in rows}
        assert {row.QueryRetrieveLevel for row in rows} == {level}
        assert {row.RetrieveAETitle for row in rows} == {"STRONGROOM"}
        # The patient may have other studies, of other files.
        assert found == (expected or found | {site.study}), (root, level)
        assert len(found) == len(rows)


@pytest.mark.needs("getscu")
def test_getscu_gets_a_study_bit_for_bit(site: Site, tmp_path: Path) -> None:
    with tunnel(site.server.home / "issued" / "ASK", "ASK", site.server.desk_port) as port:
        done = dcmtk(
            "getscu", "-S", "-aet", "ASK", "-aec", "STRONGROOM", "-od", tmp_path, "+B", "127.0.0.1", str(port),
            "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={site.study}",
        )  # fmt: skip
    assert done.status == 0, done.err
    assert as_stored(site, files_of(tmp_path)) == sorted(item.sop_instance for item in site.items[:SLICES])


@pytest.mark.needs("movescu", "storescp")
def test_movescu_moves_a_series_over_tls_to_storescp_bit_for_bit(site: Site, tmp_path: Path) -> None:
    issued = site.server.home / "issued"
    keys = issued / "DCMTK"
    command = [
        str(find_command("storescp")), "-aet", "DCMTK", "+tls", str(keys / "DCMTK.key"), str(keys / "DCMTK.pem"),
        "+cf", str(keys / "ca.pem"), "-od", str(tmp_path), "+B", str(site.ports["DCMTK"]),
    ]  # fmt: skip
    process = subprocess.Popen(command, env=DCMTK, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", site.ports["DCMTK"])) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.02)
        with tunnel(issued / "ASK", "ASK", site.server.desk_port) as port:
            done: Finished = dcmtk(
                "movescu", "-S", "-aet", "ASK", "-aec", "STRONGROOM", "-aem", "DCMTK", "127.0.0.1", str(port),
                "-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={site.study}",
                "-k", f"SeriesInstanceUID={site.series}",
            )  # fmt: skip
    finally:
        process.kill()
        process.wait()
    assert done.status == 0, done.err
    assert as_stored(site, files_of(tmp_path)) == sorted(item.sop_instance for item in site.items[:SLICES])


# --- C-FIND


def test_names_match_without_case_in_the_queries_own_character_set_and_come_back_as_they_are(site: Site) -> None:
    for character_set in ("ISO_IR 100", "ISO_IR 192"):
        keys = {"PatientName": "MÜLLER^ZO*", "StudyInstanceUID": ""}
        asked = identifier("STUDY", SpecificCharacterSet=character_set, **keys)
        for syntax in (EXPLICIT, IMPLICIT, BIG):
            with site.server.ask("ASK", models(1, syntax=syntax)) as association:
                [row], status = find(association, asked)
            assert (str(row.PatientName), row.StudyInstanceUID, status) == ("Müller^Zoë", site.study, 0)


def test_counts_lists_and_unsupported_keys_are_answered_and_told(site: Site) -> None:
    statuses = []
    with site.server.ask("ASK", models(1)) as association:
        listed = identifier("STUDY", StudyInstanceUID=[site.study, "1.2.3"], NumberOfStudyRelatedInstances="")
        [row], _ = find(association, listed)
        assert (row.StudyInstanceUID, row.NumberOfStudyRelatedInstances) == (site.study, SLICES)
        for key in ({}, {"PerformingPhysicianName": "X*"}, {"PerformingPhysicianName": ""}):
            asked = identifier("STUDY", StudyInstanceUID=site.study, **key)
            statuses.append([reply.Status for reply, _ in association.send_c_find(asked, STUDY_ROOT + "1")])
        nothing, status = find(association, identifier("STUDY", StudyInstanceUID="1.2.3.4"))
        assert (nothing, status) == ([], 0)
    assert statuses == [[0xFF00, 0], [0xFF01, 0], [0xFF00, 0]]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (identifier("FRAME"), 0xA900),
        (identifier("PATIENT", PatientID=""), 0xA900),
        (identifier("SERIES", SeriesInstanceUID=""), 0xA900),
        (identifier("IMAGE", StudyInstanceUID="1.2.3", SOPInstanceUID=""), 0xA900),
        (identifier("SERIES", StudyInstanceUID=["1.2.3", "1.2.4"]), 0xA900),
        (identifier("STUDY", StudyInstanceUID="1.2.*"), 0xC001),
        (identifier("STUDY", StudyDate="yesterday"), 0xC001),
    ],
)
def test_a_query_that_breaks_a_rule_is_refused_and_the_association_goes_on(
    site: Site, asked: Dataset, status: int
) -> None:
    with site.server.ask("ASK", models(1)) as association:
        assert find(association, asked) == ([], status)
        assert find(association, identifier("STUDY", StudyInstanceUID="1.2.3.4")) == ([], 0)


# --- C-GET and C-MOVE


def get(site: Site, asked: Dataset, kinds: list[tuple[str, str]], received: Received, title: str = "ASK") -> Any:
    contexts, roles = get_contexts(*kinds)
    with site.server.ask(title, contexts, roles=roles, handlers=[received.handler]) as association:
        return last(association.send_c_get(asked, STUDY_ROOT + "3"))


def test_what_a_peer_takes_as_it_is_stored_comes_bit_for_bit_in_every_syntax(site: Site) -> None:
    received = Received()
    stored = [scu.read(path) for path in FILES.values()]
    # Of one class in several syntaxes each has a context of its own.
    for item in stored:
        reply, data = get(
            site, identifier("STUDY", StudyInstanceUID=item.study), [(item.sop_class, item.transfer_syntax)], received
        )
        assert (reply.Status, counts(reply), data) == (0, (1, 0, 0), None)
    assert [item.data for item in received] == [item.data for item in stored]
    assert [item.transfer_syntax for item in received] == [item.transfer_syntax for item in stored]


def pixels(item: scu.Object) -> Any:
    from io import BytesIO

    from storescp.part10 import header

    head = header(
        sop_class=item.sop_class, sop_instance=item.sop_instance, transfer_syntax=item.transfer_syntax, source="X"
    )
    return pydicom.dcmread(BytesIO(head + item.data)).pixel_array


@pytest.mark.parametrize("name", FILES)
def test_what_a_peer_does_not_take_is_transcoded_and_has_the_same_pixels(site: Site, name: str) -> None:
    stored = scu.read(FILES[name])
    for target in (EXPLICIT, IMPLICIT):
        received = Received()
        reply, _ = get(site, identifier("STUDY", StudyInstanceUID=stored.study), [(stored.sop_class, target)], received)
        assert (reply.Status, counts(reply)) == (0, (1, 0, 0))
        assert received[0].transfer_syntax == target
        assert received[0].sop_instance == stored.sop_instance
        assert numpy.array_equal(pixels(received[0]), pixels(stored))


def test_an_instance_that_a_peer_takes_in_no_syntax_fails_alone_and_is_named(site: Site) -> None:
    received = Received()
    asked = identifier("STUDY", StudyInstanceUID=[site.study, scu.read(MR).study])
    reply, data = get(site, asked, [(MR_CLASS, EXPLICIT)], received)
    assert (reply.Status, counts(reply)) == (0xB000, (1, SLICES, 0))
    assert [item.sop_instance for item in received] == [scu.read(MR).sop_instance]
    assert sorted(data.FailedSOPInstanceUIDList) == sorted(item.sop_instance for item in site.items[:SLICES])
    reply, data = get(site, identifier("STUDY", StudyInstanceUID=site.study), [(MR_CLASS, EXPLICIT)], received)
    assert (reply.Status, counts(reply), len(data.FailedSOPInstanceUIDList)) == (0xA702, (0, SLICES, 0), SLICES)
    only, _ = get_contexts()
    with site.server.ask("ASK", only) as association:
        reply, _ = last(association.send_c_get(identifier("STUDY", StudyInstanceUID=site.study), STUDY_ROOT + "3"))
    assert reply.Status == 0xA702


def test_what_a_peer_answers_counts_as_completed_warned_or_failed(site: Site) -> None:
    received = Received(lambda number: {1: 0xB000, 2: 0xA700, 3: 0x0122}.get(number, 0))
    reply, data = get(site, identifier("STUDY", StudyInstanceUID=site.study), [(CT_CLASS, EXPLICIT)], received)
    assert (reply.Status, counts(reply)) == (0xB000, (SLICES - 3, 2, 1))
    assert data.FailedSOPInstanceUIDList == [item.sop_instance for item in received[1:3]]


@pytest.mark.parametrize("root", [PATIENT_ROOT, STUDY_ROOT])
def test_every_level_of_both_roots_is_fetched(site: Site, root: str) -> None:
    first = site.items[0]
    keys = {"PatientID": "1CT1", "StudyInstanceUID": site.study, "SeriesInstanceUID": site.series}
    levels = (
        {"PATIENT": 1, "STUDY": 2, "SERIES": 3, "IMAGE": 4}
        if root == PATIENT_ROOT
        else {"STUDY": 2, "SERIES": 3, "IMAGE": 4}
    )
    for level, depth in levels.items():
        received = Received()
        given = dict(list((keys | {"SOPInstanceUID": [first.sop_instance, "1.2.3"]}).items())[:depth])
        contexts, roles = get_contexts((CT_CLASS, EXPLICIT), root=root)
        with site.server.ask("ASK", contexts, roles=roles, handlers=[received.handler]) as association:
            reply, _ = last(association.send_c_get(identifier(level, **given), root + "3"))
        expected = {first.sop_instance} if level == "IMAGE" else {item.sop_instance for item in site.items[:SLICES]}
        assert reply.Status == 0, level
        assert {item.sop_instance for item in received} == expected


def move(site: Site, to: str, asked: Dataset, title: str = "ASK") -> tuple[Dataset, Dataset | None]:
    with site.server.ask(title, models(2)) as association:
        return last(association.send_c_move(asked, to, STUDY_ROOT + "2"))


def test_a_move_goes_to_where_the_destinations_file_says_with_its_originator_named(site: Site) -> None:
    for to in ("DEST", "PLAIN"):
        site.received.clear()
        site.received.originators.clear()
        reply, _ = move(site, to, identifier("STUDY", StudyInstanceUID=site.study))
        assert (reply.Status, counts(reply)) == (0, (SLICES, 0, 0))
        assert sorted(item.data for item in site.received) == sorted(item.data for item in site.items[:SLICES])
        assert site.received.originators == {("ASK", 1)}


def test_a_move_that_reaches_nobody_says_why_and_sends_nothing(site: Site) -> None:
    site.received.clear()
    asked = identifier("STUDY", StudyInstanceUID=site.study)
    unknown = {to: move(site, to, asked)[0] for to in ("UNKNOWN", "CT1")}
    assert {to: reply.Status for to, reply in unknown.items()} == {"UNKNOWN": 0xA801, "CT1": 0xA801}
    refused = {to: move(site, to, asked)[0] for to in ("OTHER", "GONE")}
    assert {to: (reply.Status, counts(reply)) for to, reply in refused.items()} == {
        "OTHER": (0xA702, (0, SLICES, 0)),
        "GONE": (0xA702, (0, SLICES, 0)),
    }
    assert refused["OTHER"].ErrorComment == "who listens there does not prove to be that peer"
    assert refused["GONE"].ErrorComment.startswith("the peer cannot be reached")
    assert list(site.received) == []


def test_a_destination_that_takes_no_context_of_an_instance_fails_it_alone(site: Site) -> None:
    asked = identifier("STUDY", StudyInstanceUID=[site.study, scu.read(MR).study])
    reply, data = move(site, "PICKY", asked)
    assert (reply.Status, counts(reply)) == (0xB000, (1, SLICES, 0))
    assert data is not None
    assert sorted(data.FailedSOPInstanceUIDList) == sorted(item.sop_instance for item in site.items[:SLICES])


def test_nothing_that_matches_is_a_success_of_nothing(site: Site) -> None:
    received = Received()
    reply, _ = get(site, identifier("STUDY", StudyInstanceUID="1.2.3.4"), [(CT_CLASS, EXPLICIT)], received)
    assert (reply.Status, counts(reply)) == (0, (0, 0, 0))
    reply, _ = move(site, "DEST", identifier("STUDY", StudyInstanceUID="1.2.3.4"))
    assert (reply.Status, counts(reply)) == (0, (0, 0, 0))


# --- whose instances


def test_what_a_peer_does_not_see_is_not_found_not_counted_and_not_fetched(site: Site) -> None:
    mr = scu.read(MR)
    for title in ("OFMR1", "OFMR"):
        with site.server.ask(title, models(1)) as association:
            rows, _ = find(association, identifier("STUDY", StudyInstanceUID="", ModalitiesInStudy=""))
            found = {row.StudyInstanceUID for row in rows}
            assert mr.study in found
            assert site.study not in found
            assert find(association, identifier("SERIES", StudyInstanceUID=site.study)) == ([], 0)
            counted, _ = find(association, identifier("PATIENT", PatientID="1CT1"), STUDY_ROOT)
            assert counted == []
        received = Received()
        both = identifier("STUDY", StudyInstanceUID=[site.study, mr.study])
        reply, _ = get(site, both, [(CT_CLASS, EXPLICIT), (MR_CLASS, EXPLICIT)], received, title)
        assert (reply.Status, counts(reply)) == (0, (1, 0, 0))
        assert [item.data for item in received] == [mr.data]
    with site.server.ask("NOTHING", models(1)) as association:
        assert find(association, identifier("STUDY", StudyInstanceUID="")) == ([], 0)
    reply, _ = get(site, both, [(CT_CLASS, EXPLICIT)], received, "NOTHING")
    assert (reply.Status, counts(reply)) == (0, (0, 0, 0))


def test_of_a_study_that_several_sent_each_finds_counts_and_gets_its_part(site: Site) -> None:
    items = [scu.read(path) for path in site.shared]
    for title, seen in (("ASK", items), ("OFMR1", items[1:]), ("OFMR", items)):
        received = Received()
        asked = identifier("STUDY", StudyInstanceUID=items[0].study, NumberOfStudyRelatedInstances="")
        with site.server.ask(title, models(1)) as association:
            [row], _ = find(association, asked)
        reply, _ = get(site, asked, [(MR_CLASS, EXPLICIT)], received, title)
        assert (row.NumberOfStudyRelatedInstances, counts(reply)) == (len(seen), (len(seen), 0, 0))
        # In the order of their packs, which have no order.
        assert sorted(item.data for item in received) == sorted(item.data for item in seen)


def test_only_the_services_of_a_peers_operations_are_accepted(site: Site) -> None:
    every = [
        *models(1, 2, 3),
        *models(1, 2, 3, root=PATIENT_ROOT),
        build_context("1.2.840.10008.1.1"),
        build_context(CT_CLASS),
    ]
    accepted = {}
    for title in ("ASK", "FINDS", "CT1"):
        association = site.server.request(title, every)
        accepted[title] = sorted(str(c.abstract_syntax) for c in association.accepted_contexts)
        if association.is_established:
            association.release()
    assert accepted["FINDS"] == [PATIENT_ROOT + "1", STUDY_ROOT + "1"]
    assert accepted["CT1"] == ["1.2.840.10008.1.1"]
    assert len(accepted["ASK"]) == len(every)


def test_a_query_is_taken_in_no_compressed_syntax(site: Site) -> None:
    association = site.server.request("ASK", [build_context(STUDY_ROOT + "1", [DEFLATED, "1.2.840.10008.1.2.4.90"])])
    assert association.accepted_contexts == []


def test_a_peer_has_as_many_associations_as_its_file_says_and_again_once_one_is_over(site: Site) -> None:
    with site.server.ask("TWICE", models(1)) as first:
        with site.server.ask("TWICE", models(1)) as second:
            refused = site.server.request("TWICE", models(1))
            assert (refused.is_rejected, second.is_established, first.is_established) == (True, True, True)
        # Ours is over a moment after the peer's.
        deadline = time.monotonic() + 60
        while not (again := site.server.request("TWICE", models(1))).is_established:
            assert time.monotonic() < deadline
        again.release()


def test_a_peer_with_anothers_key_is_no_peer(site: Site) -> None:
    association = site.server.request("CT1", models(1), calling="ASK")
    assert association.is_rejected


def test_a_store_at_the_desk_is_refused(site: Site) -> None:
    contexts = [*models(3), build_context(CT_CLASS, EXPLICIT)]
    with site.server.ask("ASK", contexts) as association:
        reply = association.send_c_store(pydicom.dcmread(CT))
        assert reply.Status == 0x0211


# --- in the middle


def test_a_query_that_is_cancelled_ends_with_fe00_and_the_association_goes_on(site: Site) -> None:
    raw = Raw(site.server, "ASK", STUDY_ROOT + "1")
    asked = encode(identifier("STUDY", StudyInstanceUID=""), EXPLICIT)
    find_request = command(dimse.C_FIND_RQ, 1, data_set=True)
    with raw.socket:
        raw.send((find_request, asked), (command(dimse.C_CANCEL_RQ, 1), None))
        assert dimse.decode_answer(raw.event()[1]).status == 0xFE00
        # A cancel of something else cancels nothing.
        raw.send((command(dimse.C_FIND_RQ, 2, data_set=True), asked), (command(dimse.C_CANCEL_RQ, 1), None))
        rows = 0
        while (answer := dimse.decode_answer(raw.event()[1])).status == 0xFF00:
            assert raw.event()[0] is False
            rows += 1
        assert (answer.status, answer.message_id) == (0, 2)
        assert rows > 3


@pytest.mark.parametrize(
    "second",
    [
        (command(dimse.C_FIND_RQ, 2, data_set=True), b""),
        (dimse.response(dimse.Command(0x0020, 1, "", "", has_data_set=False), 0), None),
    ],
)
def test_a_second_request_or_a_response_while_one_is_under_way_breaks_the_association(
    site: Site, second: tuple[bytes, bytes | None]
) -> None:
    raw = Raw(site.server, "ASK", STUDY_ROOT + "1")
    asked = encode(identifier("STUDY", StudyInstanceUID=""), EXPLICIT)
    with raw.socket:
        raw.send((command(dimse.C_FIND_RQ, 1, data_set=True), asked), second)
        assert raw.event().kind == wire.ABORT


def test_a_get_that_is_cancelled_stops_and_says_what_remains(site: Site) -> None:
    contexts, roles = get_contexts((CT_CLASS, EXPLICIT))
    received = Received()
    with site.server.ask("ASK", contexts, roles=roles) as association:

        def took(event: Any) -> int:
            if len(received) == 2:
                association.send_c_cancel(1, query_model=STUDY_ROOT + "3")
            return int(received.handler[1](event))

        association.bind(evt.EVT_C_STORE, took)
        reply, data = last(association.send_c_get(identifier("STUDY", StudyInstanceUID=site.study), STUDY_ROOT + "3"))
        assert (reply.Status, counts(reply), len(data)) == (0xFE00, (3, 0, 0), 0)
        assert reply.NumberOfRemainingSuboperations == SLICES - 3
        assert len(received) == 3


@contextlib.contextmanager
def at_the_third(site: Site, does: Callable[[], None]) -> Iterator[None]:
    """Do something while the third instance of a move is at its destination."""
    site.received.clear()

    def status(number: int) -> int:
        if number == 3:
            does()
        return 0

    site.received.statuses = status
    try:
        yield
    finally:
        site.received.statuses = lambda _: 0


def test_a_move_that_is_cancelled_stops_and_says_what_remains(site: Site) -> None:
    went = threading.Event()
    with site.server.ask("ASK", models(2), handlers=[(evt.EVT_PDU_SENT, lambda _: went.set())]) as association:

        def cancel() -> None:
            went.clear()
            association.send_c_cancel(1, query_model=STUDY_ROOT + "2")
            assert went.wait(60)

        with at_the_third(site, cancel):
            asked = identifier("STUDY", StudyInstanceUID=site.study)
            reply, _ = last(association.send_c_move(asked, "DEST", STUDY_ROOT + "2"))
    assert (reply.Status, counts(reply), reply.NumberOfRemainingSuboperations) == (0xFE00, (3, 0, 0), SLICES - 3)
    assert len(site.received) == 3


def test_who_asked_for_a_move_and_goes_away_ends_it(site: Site) -> None:
    raw = Raw(site.server, "ASK", STUDY_ROOT + "2")
    asked = encode(identifier("STUDY", StudyInstanceUID=site.study), EXPLICIT)
    aborting = wire.abort(reason=0, by_user=True)
    with raw.socket, at_the_third(site, lambda: raw.socket.sendall(aborting)):
        raw.send((command(dimse.C_MOVE_RQ, data_set=True, destination="DEST"), asked))
        site.server.wait_log(r"desk: association \w+ aborted by the peer: 0 queries, 1 retrievals, 3 instances")
    assert len(site.received) == 3


def test_a_release_in_the_middle_of_a_query_is_answered_and_ends_it(site: Site) -> None:
    raw = Raw(site.server, "ASK", STUDY_ROOT + "1")
    asked = encode(identifier("STUDY", StudyInstanceUID=""), EXPLICIT)
    with raw.socket:
        raw.send((command(dimse.C_FIND_RQ, data_set=True), asked), last=wire.release_request())
        assert raw.event().kind == wire.RELEASE_RP
        assert raw.event() is None


@pytest.mark.parametrize("how", ["abort", "kill"])
def test_a_peer_that_goes_in_the_middle_of_a_get_ends_it(site: Site, how: str) -> None:
    contexts, roles = get_contexts((CT_CLASS, EXPLICIT))
    association = site.server.request("ASK", contexts, roles=roles)

    def took(_: Any) -> int:
        association.dimse_timeout = 0.1
        if how == "abort":
            association.abort()
        else:
            association.dul.socket.close()
        return 0

    association.bind(evt.EVT_C_STORE, took)
    for _ in association.send_c_get(identifier("STUDY", StudyInstanceUID=site.study), STUDY_ROOT + "3"):
        pass
    site.server.wait_log(r"desk: association \w+ (aborted by the peer|closed by|broken off|released)")


def test_a_destination_that_aborts_in_the_middle_fails_the_rest_and_who_asked_is_answered(site: Site) -> None:
    aborting = []

    def took(event: Any) -> int:
        aborting.append(event)
        if len(aborting) == 3:
            event.assoc.abort()
        return 0

    folder = site.server.home / "issued" / "GONE"
    asked = identifier("STUDY", StudyInstanceUID=site.study)
    contexts = [(CT_CLASS, [EXPLICIT])]
    with (
        listening("GONE", contexts, [(evt.EVT_C_STORE, took)], folder, port=site.ports["GONE"]),
        site.server.ask("ASK", models(2)) as association,
    ):
        reply, _ = last(association.send_c_move(asked, "GONE", STUDY_ROOT + "2"))
        assert (reply.Status, counts(reply)) == (0xB000, (2, SLICES - 2, 0))
        reply, _ = last(association.send_c_move(identifier("STUDY", StudyInstanceUID="1.2"), "GONE", STUDY_ROOT + "2"))
        assert reply.Status == 0


def test_who_asked_what_and_where_it_went_is_in_the_chain_before_it_is_given(site: Site) -> None:
    move(site, "GONE", identifier("STUDY", StudyInstanceUID=site.study))
    records = [json.loads(line) for line in site.server.ok("audit", "show", "--json").out.splitlines()]
    begun = [r for r in records if r["type"] == "export-begun"]
    assert {"peer": "ASK", "to": "GONE", "by": "move", "study": site.study}.items() <= begun[-1].items()
    queries = [r for r in records if r["type"] == "query" and r.get("peer") == "ASK"]
    assert queries
    ended = [r for r in records if r["type"] == "exported" and r.get("to") == "DEST"]
    assert ended[0]["instances"] == SLICES
    who = [json.loads(line) for line in site.server.ok("audit", "who", "--patient", "1CT1", "--json").out.splitlines()]
    assert any("to DEST" in row.get("what", "") and row["kind"] == "exported" for row in who)
    assert any(row["kind"] == "saw" and "ASK" in row["who"] for row in who)
