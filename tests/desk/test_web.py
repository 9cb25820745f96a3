"""DICOMweb of a real store: gate, vault and desk as processes, clients with certificates."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from email import message_from_bytes
from pathlib import Path
from typing import Any

import numpy as np
import pki
import pydicom
import pytest
import requests
import scu
from conftest import Server, send
from dicomweb_client.api import DICOMwebClient
from pydicom.data import get_testdata_file

PREFIX = "/dicomweb"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
JSON = "application/dicom+json"
DICOM = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'
FILES = ["CT_small.dcm", "MR_small_implicit.dcm", "emri_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "waveform_ecg.dcm"]
SECONDS = 60
# Connections at a time, unless the configuration says otherwise.
MOST = 20
PEERS = (("CT1",), ("READER", "--role", "reader"))
NARROW = ("NARROW", "--role", "reader", "--sees-modality", "MR")


def file(name: str) -> Path:
    return Path(str(get_testdata_file(name)))


class Answer:
    """A response that is read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()
        self.text = self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        return json.loads(self.body)

    def parts(self) -> list[tuple[str, bytes]]:
        """Return the parts of a multipart body with their types."""
        parsed = message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + self.body)
        parts: Any = parsed.get_payload()
        return [(part["Content-Type"], part.get_payload(decode=True)) for part in parts]


class Desk:
    """A store with a desk on the web, and who asks it."""

    def __init__(self, server: Server, peers: Sequence[Sequence[str]], **desk: Any) -> None:
        self.server = server
        server.init()
        for title, *options in peers:
            self.add_peer(title, *options)
        server.set("gate", pack_idle_seconds=1)
        server.set("desk", web=["127.0.0.1:0"], **desk)
        server.start()
        self.port = self.wait_port()

    def wait_port(self) -> int:
        found = re.search(r"DICOMweb at https://127\.0\.0\.1:(\d+)", "\n".join(self.server.log))
        return int((found or self.server.wait_log(r"DICOMweb at https://127\.0\.0\.1:(\d+)"))[1])

    def add_peer(self, title: str, *options: str) -> None:
        folder = self.server.home / "issued" / title
        self.server.ok("peer", "add", title, "--issue", folder, "--host", "127.0.0.1", *options)

    def send(self, *names: str) -> None:
        assert set(send(self.server, [file(name) for name in names])) == {0}
        self.server.wait_admitted()

    def context(self, title: str = "READER") -> ssl.SSLContext:
        return scu.tls(self.server.home / "issued" / title, title)

    def connect(self, title: str = "READER") -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context(title), timeout=SECONDS)

    def get(self, path: str, title: str = "READER", method: str = "GET", **headers: str) -> Answer:
        connection = self.connect(title)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path if path.startswith("/v") else PREFIX + path, headers=named)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def client(self, title: str = "READER") -> DICOMwebClient:
        session = requests.Session()
        # The environment of whoever runs this may name certificates and proxies.
        session.trust_env = False
        folder = self.server.home / "issued" / title
        session.verify = str(folder / "ca.pem")
        session.cert = (str(folder / f"{title}.pem"), str(folder / f"{title}.key"))
        return DICOMwebClient(f"https://127.0.0.1:{self.port}{PREFIX}", session=session)

    def desk_lines(self) -> list[str]:
        return [line for line in self.server.log if " desk: web: " in line]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    server = Server(tmp_path_factory.mktemp("s"))
    try:
        made = Desk(server, [*PEERS, NARROW, ("SENDER", "--role", "sender")])
        made.send(*FILES)
        yield made
    finally:
        server.stop()
        server.kill_all()


def uids(name: str) -> tuple[str, str, str]:
    one = scu.read(file(name))
    return one.study, one.series, one.sop_instance


def place(name: str, *more: str) -> str:
    study, series, instance = uids(name)
    return "/".join([f"/studies/{study}/series/{series}/instances/{instance}", *more])


# --- QIDO-RS


def test_searches_find_studies_series_and_instances_below_what_the_path_names(desk: Desk) -> None:
    study, series, instance = uids("CT_small.dcm")
    assert len(desk.get("/studies").json()) == len(FILES)
    for path, level in (
        (f"/studies?StudyInstanceUID={study}", "studies"),
        ("/studies?PatientName=comp*ct1&00080060=&limit=5", "studies"),
        (f"/studies/{study}/series", "series"),
        (f"/series?SeriesInstanceUID={series}&Modality=CT", "series"),
        (f"/studies/{study}/instances", "instances"),
        (f"/studies/{study}/series/{series}/instances?includefield=all", "instances"),
        (f"/instances?SOPInstanceUID={instance}", "instances"),
    ):
        answer = desk.get(path, accept=JSON)
        assert answer.status == 200, path
        assert answer.headers["Content-Type"] == JSON
        (found,) = answer.json()
        assert found["0020000D"]["Value"] == [study]
        whole = f"https://127.0.0.1:{desk.port}{PREFIX}" + place("CT_small.dcm")
        assert found["00081190"]["Value"] == [
            re.split({"studies": "/series", "series": "/instances"}.get(level, "$"), whole)[0]
        ]


def test_what_matches_nothing_has_no_content(desk: Desk) -> None:
    answer = desk.get("/studies?PatientID=nobody")
    assert (answer.status, answer.body) == (204, b"")


def test_pages_and_what_is_not_matched_are_told_in_warnings(desk: Desk) -> None:
    first = desk.get("/studies?limit=2&fuzzymatching=true&PerformingPhysicianName=x")
    assert len(first.json()) == 2
    said = first.headers.get_all("Warning")
    assert said is not None
    assert all(text.startswith(f"299 https://127.0.0.1:{desk.port}{PREFIX}: ") for text in said)
    assert ["fuzzymatching" in text for text in said] == [True, False, False]
    assert "additional results" in said[2]
    rest = desk.get("/studies?limit=50&offset=2")
    assert rest.headers["Warning"] is None
    found = [row["0020000D"]["Value"][0] for row in first.json() + rest.json()]
    assert sorted(found) == sorted(uids(name)[0] for name in FILES)


@pytest.mark.parametrize(
    ("path", "headers", "status", "words"),
    [
        ("/studies?Nothing=secret", {}, 400, "Nothing"),
        ("/studies?StudyDate=secret", {}, 400, "00080020"),
        ("/studies/1.2.x/series", {}, 400, "no UID"),
        ("/studies/1.2.x", {}, 400, "no UID"),
        ("/studies", {"accept": "secret"}, 400, "Accept"),
        ("/studies", {"accept": 'multipart/related; type="application/dicom+xml"'}, 406, JSON),
        ("/studies?accept=text/html", {}, 406, JSON),
        ("/studies/1.2.3", {}, 404, "nothing here"),
        ("/studies/1.2.3/metadata", {}, 404, "nothing here"),
        ("/nothing", {}, 404, ""),
        ("/studies", {"host": "secret secret"}, 400, ""),
        ("/studies", {"origin": "https://elsewhere.example"}, 403, ""),
        ("/studies", {"origin": "null"}, 403, ""),
        ("/studies", {"sec_fetch_site": "cross-site"}, 403, ""),
        ("/studies", {"sec_fetch_site": "same-site"}, 403, ""),
        ("/studies", {"content_length": "10"}, 413, ""),
    ],
)
def test_what_is_wrong_with_a_request_is_said_without_its_values(
    desk: Desk, path: str, headers: dict[str, str], status: int, words: str
) -> None:
    answer = desk.get(path, **headers)
    assert answer.status == status
    assert words in answer.text
    assert "secret" not in answer.text


def test_a_page_of_the_same_origin_may_ask(desk: Desk) -> None:
    origin = f"https://127.0.0.1:{desk.port}"
    assert desk.get("/studies", origin=origin, sec_fetch_site="same-origin").status == 200


def test_other_methods_are_not_served(desk: Desk) -> None:
    assert desk.get("/studies", method="DELETE").status == 405
    assert desk.get("/studies", method="OPTIONS").status == 405


def test_no_answer_is_kept_framed_shared_or_guessed(desk: Desk) -> None:
    for path in ("/studies", "/nothing", "/studies?Nothing=1"):
        headers = desk.get(path).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        for name in ("Server", "Set-Cookie", "Access-Control-Allow-Origin"):
            assert headers[name] is None


# --- WADO-RS


@pytest.mark.parametrize("name", FILES)
def test_an_instance_comes_back_byte_for_byte_as_it_was_sent(desk: Desk, name: str) -> None:
    answer = desk.get(place(name), accept=f"{DICOM}; transfer-syntax=*")
    assert answer.status == 200
    ((kind, content),) = answer.parts()
    one = scu.read(file(name))
    assert kind == f"application/dicom;transfer-syntax={one.transfer_syntax}"
    assert content[:132] == bytes(128) + b"DICM"
    assert content.endswith(one.data)


def test_without_a_transfer_syntax_an_instance_is_explicit_little_endian(desk: Desk, tmp_path: Path) -> None:
    for name, accept in (("MR_small_implicit.dcm", DICOM), ("emri_small_RLE.dcm", "application/dicom")):
        answer = desk.get(place(name), accept=accept)
        content = answer.parts()[0][1] if accept == DICOM else answer.body
        (tmp_path / "got.dcm").write_bytes(content)
        found = pydicom.dcmread(tmp_path / "got.dcm")
        assert found.file_meta.TransferSyntaxUID == EXPLICIT
        assert np.array_equal(found.pixel_array, pydicom.dcmread(file(name)).pixel_array)


def test_a_transfer_syntax_that_cannot_be_had_is_not_acceptable(desk: Desk) -> None:
    for path in (place("CT_small.dcm"), place("CT_small.dcm", "frames", "1")):
        answer = desk.get(path, accept=f"{DICOM}; transfer-syntax=1.2.840.10008.1.2.4.80")
        assert (answer.status, "transfer-syntax=*" in answer.text) == (406, True)


def test_a_study_and_a_series_are_given_in_one_body(desk: Desk) -> None:
    study, series, _ = uids("CT_small.dcm")
    for path in (f"/studies/{study}", f"/studies/{study}/series/{series}"):
        answer = desk.get(path)
        assert len(answer.parts()) == 1
        assert answer.headers["Transfer-Encoding"] == "chunked"
    assert desk.get(f"/studies/{study}", accept="application/dicom").status == 406


def test_metadata_describe_and_name_what_is_large_by_an_address_that_answers(desk: Desk) -> None:
    (found,) = desk.get(place("waveform_ecg.dcm", "metadata")).json()
    theirs = pydicom.dcmread(file("waveform_ecg.dcm"))
    assert found["00100010"]["Value"][0]["Alphabetic"] == str(theirs.PatientName)
    uri = found["54000100"]["Value"][0]["54001010"]["BulkDataURI"]
    path = uri.removeprefix(f"https://127.0.0.1:{desk.port}{PREFIX}")
    ((kind, content),) = desk.get(path).parts()
    assert (kind, content) == ("application/octet-stream", theirs.WaveformSequence[0].WaveformData)
    assert desk.get(path, accept="application/octet-stream").body == content
    assert desk.get(path, accept="text/html").status == 406
    assert desk.get(place("waveform_ecg.dcm", "bulkdata", "54000100/9/54001010")).status == 404
    assert desk.get(place("waveform_ecg.dcm", "bulkdata", "..%2f..%2fetc")).status == 404


def test_frames_come_as_they_are_stored_or_decoded_in_the_order_that_is_asked_for(desk: Desk) -> None:
    theirs = pydicom.dcmread(file("emri_small_RLE.dcm"))
    arrays = theirs.pixel_array
    native = desk.get(place("emri_small_RLE.dcm", "frames", "1,3,2"), accept=OCTETS).parts()
    assert [content for _, content in native] == [arrays[at].tobytes() for at in (0, 2, 1)]
    assert {kind for kind, _ in native} == {f"application/octet-stream;transfer-syntax={EXPLICIT}"}
    for accept, kind in (
        ('multipart/related; type="image/dicom-rle"', "image/dicom-rle"),
        (f"{OCTETS}; transfer-syntax=*", "application/octet-stream"),
    ):
        ((given, content),) = desk.get(place("emri_small_RLE.dcm", "frames", "2"), accept=accept).parts()
        assert given == f"{kind};transfer-syntax=1.2.840.10008.1.2.5"
        assert len(content) < len(native[0][1])
    for frames, status in (("11", 404), ("1,11", 404), ("0", 400), ("1,1", 400), ("x", 400)):
        assert desk.get(place("emri_small_RLE.dcm", "frames", frames)).status == status
    assert desk.get(place("waveform_ecg.dcm", "frames", "1")).status == 404


def test_a_frame_is_drawn(desk: Desk) -> None:
    for name, more in (
        ("CT_small.dcm", "rendered?window=1000,2000,linear"),
        ("emri_small_RLE.dcm", "frames/3/rendered"),
    ):
        for kind, magic in (("image/png", b"\x89PNG"), ("image/jpeg", b"\xff\xd8")):
            answer = desk.get(place(name, more), accept=kind)
            assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
            assert answer.body.startswith(magic)
    assert desk.get(place("CT_small.dcm", "rendered?window=1"), accept="image/png").status == 400
    assert desk.get(place("CT_small.dcm", "rendered"), accept="image/gif").status == 406
    assert desk.get(place("waveform_ecg.dcm", "rendered")).status == 404


def test_a_client_that_is_not_ours_finds_and_fetches_everything(desk: Desk) -> None:
    client = desk.client()
    assert {row["0020000D"]["Value"][0] for row in client.search_for_studies()} == {uids(name)[0] for name in FILES}
    for name in FILES:
        study, series, instance = uids(name)
        theirs = pydicom.dcmread(file(name))
        (metadata,) = client.retrieve_series_metadata(study, series)
        assert pydicom.Dataset.from_json(metadata, lambda *_: b"").SOPInstanceUID == instance
        (found,) = client.retrieve_study(study, media_types=(("application/dicom", "*"),))
        assert found.file_meta.TransferSyntaxUID == theirs.file_meta.TransferSyntaxUID
        assert found.get("PixelData") == theirs.get("PixelData")
        if "PixelData" in theirs:
            (frame,) = client.retrieve_instance_frames(
                study, series, instance, [1], media_types=(("application/octet-stream", EXPLICIT),)
            )
            first = theirs.pixel_array if int(theirs.get("NumberOfFrames") or 1) == 1 else theirs.pixel_array[0]
            assert len(frame) == first.nbytes
            assert client.retrieve_instance_rendered(study, series, instance, media_types=("image/png",))


# --- Who may


def test_a_peer_finds_and_fetches_what_it_sees_and_nothing_else(desk: Desk) -> None:
    seen = {row["00080061"]["Value"][0] for row in desk.get("/studies", "NARROW").json()}
    assert seen == {"MR"}
    assert desk.get(place("CT_small.dcm"), "NARROW").status == 404
    assert desk.get(place("CT_small.dcm", "metadata"), "NARROW").status == 404
    assert desk.get(place("MR_small_implicit.dcm", "metadata"), "NARROW").status == 200
    # As what is not there at all.
    study, series, _ = uids("CT_small.dcm")
    answers = [desk.get(f"/studies/{uid}/series/{series}", "NARROW") for uid in (study, "1.2.3")]
    assert answers[0].body == answers[1].body


@pytest.mark.parametrize("title", ["SENDER", "CT1"])
def test_who_may_not_read_is_told_nothing(desk: Desk, title: str) -> None:
    for path in ("/studies", place("CT_small.dcm"), "/nothing"):
        answer = desk.get(path, title)
        assert (answer.status, answer.body) == (403, b"")


def test_without_a_certificate_of_a_peer_there_is_no_answer(desk: Desk, tmp_path: Path) -> None:
    folder = desk.server.home / "issued" / "READER"
    nobody = ssl.create_default_context(cafile=folder / "ca.pem")
    stranger = ssl.create_default_context(cafile=folder / "ca.pem")
    pki.authority("stranger").issue("READER").save(tmp_path, "x")
    stranger.load_cert_chain(tmp_path / "x.pem", tmp_path / "x.key")
    old = ssl.create_default_context(cafile=folder / "ca.pem")
    old.load_cert_chain(folder / "READER.pem", folder / "READER.key")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert https(desk, old) == 200
    for context in (nobody, stranger):
        with pytest.raises(OSError):
            https(desk, context)
    with socket.create_connection(("127.0.0.1", desk.port), SECONDS) as plain:
        plain.sendall(b"GET /dicomweb/studies HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in plain.recv(100)


def https(desk: Desk, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", desk.port, context=context, timeout=SECONDS)
    try:
        connection.request("GET", f"{PREFIX}/studies")
        return connection.getresponse().status
    finally:
        connection.close()


def test_whoever_is_removed_is_out_at_the_next_request_on_the_same_connection(desk: Desk) -> None:
    desk.add_peer("LEAVING", "--role", "reader")
    desk.server.wait_log("desk: peers and certificates read: 5")
    connection = desk.connect("LEAVING")
    try:
        connection.request("GET", f"{PREFIX}/studies")
        assert Answer(connection.getresponse()).status == 200
        desk.server.ok("peer", "remove", "LEAVING")
        desk.server.wait_log("desk: peers and certificates read: 4")
        connection.request("GET", f"{PREFIX}/studies")
        answer = Answer(connection.getresponse())
        assert (answer.status, answer.body, answer.headers["Connection"]) == (403, b"", "close")
    finally:
        connection.close()
    # Its authority is still trusted, and nobody behind it.
    assert https(desk, desk.context("LEAVING")) == 403


def test_what_was_given_stands_in_the_audit_chain_with_the_peer(desk: Desk) -> None:
    desk.get(place("CT_small.dcm"))
    desk.get("/studies?PatientID=x")
    shown = desk.server.ok("audit", "show", "--json").out.splitlines()
    mine = [record for record in map(json.loads, shown) if record.get("peer") == "READER"]
    assert {"query", "export-begun", "exported"} <= {record["type"] for record in mine}
    assert {record["by"] for record in mine if record["type"] == "exported"} == {"web"}


def test_the_log_names_who_and_what_and_no_patient(desk: Desk) -> None:
    desk.get("/studies?PatientName=secretname")
    desk.server.wait_log("web: READER GET search study: 204, 0 instances")
    text = "\n".join(desk.server.log)
    for name in FILES:
        one = pydicom.dcmread(file(name))
        for value in (*uids(name), str(one.PatientName), str(one.PatientID)):
            assert value not in text or not value.strip()
    assert "secretname" not in text


# --- Limits


def test_a_locked_vault_is_unavailable_for_now(desk: Desk) -> None:
    desk.server.ok("lock")
    for path in ("/studies", place("CT_small.dcm"), place("CT_small.dcm", "frames", "1")):
        answer = desk.get(path)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "60")
    desk.server.ok("unlock", "--key-file", desk.server.home / "store.key")
    assert desk.get("/studies").status == 200


def test_a_head_that_is_too_long_is_refused(desk: Desk) -> None:
    assert desk.get("/studies", x_long="x" * 40_000).status == 431
    connection = desk.connect()
    connection.connect()
    with pytest.raises(OSError):
        while True:
            connection.sock.sendall(b"GET /" + b"x" * 65_536)
            if not connection.sock.recv(1000):
                raise ConnectionResetError
    connection.close()


def test_connections_beyond_the_limit_are_closed_and_those_that_end_make_room(desk: Desk) -> None:
    held = [desk.connect() for _ in range(MOST + 1)]
    with pytest.raises(OSError):
        for connection in held:
            connection.connect()
    for connection in held:
        connection.close()
    desk.server.wait_log("refused: as many as desk.maximum_associations are open")
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            assert https(desk, desk.context()) == 200
            break
        except OSError:
            assert time.monotonic() < deadline


def rss(desk: Desk) -> int:
    """Return the most memory that the desk's process had at once, in bytes."""
    (pid,) = desk.server.pids("desk")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_memory_does_not_grow_with_an_instance(desk: Desk, tmp_path: Path) -> None:
    side, frames = 2048, 24
    small = pydicom.dcmread(file("CT_small.dcm"))
    small.Rows = small.Columns = side
    small.NumberOfFrames = frames
    small.SOPInstanceUID = small.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    small.PixelData = b"".join(bytes([number]) * (side * side * 2) for number in range(frames))
    small.save_as(tmp_path / "large.dcm")
    length = len(small.PixelData)
    assert length > 190 << 20
    assert send(desk.server, [tmp_path / "large.dcm"]) == [0]
    desk.server.wait_admitted()
    # What the first requests load is not what an instance costs.
    for more in ("", "/metadata", "/frames/1", "/rendered"):
        assert desk.get(place("CT_small.dcm") + more).status == 200
    before = rss(desk)
    path = f"/studies/{small.StudyInstanceUID}/series/{small.SeriesInstanceUID}/instances/1.2.3.4"
    ((_, last),) = desk.get(f"{path}/frames/{frames}").parts()
    assert last == bytes([frames - 1]) * (side * side * 2)
    (described,) = desk.get(f"{path}/metadata").json()
    assert described["7FE00010"]["BulkDataURI"].endswith("/bulkdata/7FE00010")
    # A client that takes it slowly makes the desk wait, not hold it.
    connection = desk.connect()
    connection.request("GET", PREFIX + path, headers={"Accept": f"{DICOM};transfer-syntax=*"})
    response = connection.getresponse()
    taken = 0
    while piece := response.read(1 << 20):
        taken += len(piece)
    connection.close()
    assert taken > length
    # Far less than an instance, or even a few of its frames.
    assert rss(desk) - before < 24 << 20
    shutil.rmtree(tmp_path)


def test_an_instance_that_breaks_the_rules_does_not_hide_the_others(desk: Desk, tmp_path: Path) -> None:
    one = scu.read(file("CT_small.dcm"))
    # Cut within its pixels: the gate stores what arrives, and pydicom says what is wrong with it.
    cut = one._replace(
        sop_instance="1.2.3.5",
        data=one.data.replace(one.sop_instance.encode(), b"1.2.3.5".ljust(len(one.sop_instance), b"\0"))[:-5000],
    )
    assert scu.send(desk.server.port, desk.context("CT1"), [cut], calling="CT1") == [0]
    desk.server.wait_admitted()
    found = desk.get(f"/studies/{one.study}/metadata").json()
    assert [len(row) for row in found if row["00080018"]["Value"] == ["1.2.3.5"]] == [5]
    assert desk.get(place("CT_small.dcm", "frames", "1")).status == 200
    answer = desk.get(f"/studies/{one.study}/series/{one.series}/instances/1.2.3.5/bulkdata/00081140/1/00081155")
    assert answer.status in {404, 406}
    assert (
        desk.get(f"/studies/{one.study}/series/{one.series}/instances/1.2.3.5", accept=f"{DICOM};transfer-syntax=*")
        .parts()[0][1]
        .endswith(cut.data)
    )


def test_a_client_that_goes_away_ends_its_request(desk: Desk) -> None:
    """The large instance of the test before."""
    study, series, _ = uids("CT_small.dcm")
    connection = desk.connect()
    path = f"{PREFIX}/studies/{study}/series/{series}/instances/1.2.3.4"
    connection.request("GET", path, headers={"Accept": f"{DICOM};transfer-syntax=*"})
    assert connection.getresponse().read(1000)
    connection.close()
    desk.server.wait_log("an answer to READER ends early: the client is gone")


def test_an_instance_that_does_not_open_is_no_answer_that_looks_whole(desk: Desk) -> None:
    for pack in (desk.server.store / "objects").rglob("*"):
        if pack.is_file():
            content = bytearray(pack.read_bytes())
            content[4096 + 40 + 1000] ^= 1
            pack.write_bytes(content)
    for name in FILES:
        try:
            answer = desk.get(place(name), accept=f"{DICOM};transfer-syntax=*")
        except (http.client.HTTPException, OSError):
            continue
        assert answer.status == 500


def test_more_than_a_peer_may_ask_for_is_too_many(make_server: Callable[[], Server]) -> None:
    desk = Desk(
        make_server(),
        PEERS,
        queries_per_minute=1,
        instances_per_hour=1,
        idle_seconds=1,
    )
    desk.send("CT_small.dcm")
    assert desk.get("/studies").status == 200
    assert desk.get(place("CT_small.dcm")).status == 200
    for path in ("/studies", place("CT_small.dcm")):
        answer = desk.get(path)
        assert (answer.status, answer.headers["Retry-After"]) == (429, "60")
    # What asks nothing is closed in time, however often single bytes come.
    slow = desk.connect()
    slow.connect()
    slow.sock.sendall(b"GET /dicomweb/studies HTTP/1.1\r\n")
    assert not slow.sock.recv(1)
    slow.close()
