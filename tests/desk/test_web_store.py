"""STOW-RS of a real store: what comes by HTTPS is sealed, admitted and comes out bit for bit, or is refused."""

from __future__ import annotations

import http.client
import io
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
from conftest import Server, changed
from scu import raw_data_set
from test_accountable import until, wait_event
from test_full import Disk
from test_rotate import WAIVERS
from test_store import exported
from test_web import JSON, PREFIX, Answer, Desk, file

from storescp.errors import NOTHING

BOUNDARY = "boundary of the parts"
KIND = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'
FILES = ["CT_small.dcm", "MR_small_implicit.dcm", "emri_small_RLE.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm"]
CT = file("CT_small.dcm")
PEERS = (
    ("SENDER", "--role", "sender"),
    ("READER", "--role", "reader"),
    ("ADMIN", "--role", "admin"),
    ("NOBODY",),
    ("ONLYMR", "--role", "sender", "--sop-class", "1.2.840.10008.5.1.4.1.1.4"),
)


def body(*parts: bytes, kind: str = "application/dicom", end: str = f"\r\n--{BOUNDARY}--\r\n") -> bytes:
    """Return a multipart body."""
    head = f"\r\n--{BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode()
    return b"".join(head + part for part in parts) + end.encode()


def post(
    desk: Desk, content: Any, title: str = "SENDER", path: str = "/studies", kind: str = KIND, **headers: str
) -> Answer:
    """Store; ``content`` is bytes, or pieces of a body of unknown length."""
    connection = desk.connect(title)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", PREFIX + path, body=content, headers={"Content-Type": kind, **named})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def read(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def references(answer: Answer, tag: str) -> list[str]:
    """Return the instances that a sequence of an answer names."""
    return [item["00081155"]["Value"][0] for item in answer.json().get(tag, {}).get("Value", [])]


def reasons(answer: Answer, tag: str = "00081198") -> list[int]:
    return [item["00081197"]["Value"][0] for item in answer.json()[tag]["Value"]]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    server = Server(tmp_path_factory.mktemp("s"))
    try:
        yield Desk(server, PEERS)
    finally:
        server.stop()
        server.kill_all()


@pytest.fixture
def fresh(make_server: Callable[[], Server]) -> Desk:
    return Desk(make_server(), PEERS)


def new(folder: Path, path: Path = CT, **elements: str) -> Path:
    """Write an instance with a UID of its own."""
    return changed(path, folder, SOPInstanceUID=str(pydicom.uid.generate_uid()), **elements)


def again(desk: Desk) -> None:
    """Start again."""
    desk.server.stop()
    desk.server.log.clear()
    desk.server.start()
    desk.port = desk.wait_port()


# --- what is stored


def test_what_is_stored_comes_out_bit_for_bit_whatever_its_transfer_syntax(fresh: Desk) -> None:
    paths = [file(name) for name in FILES]
    answer = post(fresh, body(*read(*paths)))
    assert (answer.status, answer.headers["Content-Type"]) == (200, JSON)
    assert references(answer, "00081199") == [scu.read(path).sop_instance for path in paths]
    assert "00081190" not in answer.json(), "several studies have no address in common"
    fresh.server.wait_admitted()
    assert sorted(exported(fresh.server).values()) == sorted(raw_data_set(path) for path in paths)
    assert fresh.server.run("verify").status == 0


def test_an_answer_says_where_what_was_stored_is_to_be_had(desk: Desk, tmp_path: Path) -> None:
    path = new(tmp_path)
    one = scu.read(path)
    answer = post(desk, body(*read(path)), "ADMIN", f"/studies/{one.study}")
    assert answer.status == 200
    assert answer.json()["00081190"]["Value"] == [f"https://127.0.0.1:{desk.port}{PREFIX}/studies/{one.study}"]
    (item,) = answer.json()["00081199"]["Value"]
    assert item["00081150"]["Value"] == [one.sop_class]
    desk.server.wait_admitted()
    where = item["00081190"]["Value"][0].partition(PREFIX)[2]
    got = desk.get(where, "ADMIN", Accept="application/dicom; transfer-syntax=*")
    assert got.status == 200
    assert pydicom.dcmread(io.BytesIO(got.body)).SOPInstanceUID == one.sop_instance


def test_a_preamble_is_not_kept(fresh: Desk, tmp_path: Path) -> None:
    content = b"MZ" + b"\x90" * 126 + CT.read_bytes()[128:]
    assert post(fresh, body(content)).status == 200
    fresh.server.wait_admitted()
    fresh.server.ok("export", "--all", "--to", tmp_path / "out")
    (came,) = (tmp_path / "out").rglob("*.dcm")
    assert came.read_bytes()[:132] == bytes(128) + b"DICM"


def test_a_body_of_unknown_length_in_pieces_of_any_size_is_the_same(desk: Desk, tmp_path: Path) -> None:
    paths = [new(tmp_path) for _ in range(3)]
    whole = body(*read(*paths))
    for size in (1_000, 7, 65_536):
        pieces = (whole[at : at + size] for at in range(0, len(whole), size))
        answer = post(desk, pieces)
        assert (answer.status, len(references(answer, "00081199"))) == (200, 3)


def test_a_client_that_is_not_ours_stores(desk: Desk, tmp_path: Path) -> None:
    paths = [new(tmp_path), new(tmp_path, file("MR_small.dcm"))]
    found = desk.client("SENDER").store_instances([pydicom.dcmread(path) for path in paths])
    assert len(found.ReferencedSOPSequence) == 2
    assert "FailedSOPSequence" not in found


def test_provenance_and_the_audit_chain_say_who_stored(fresh: Desk) -> None:
    assert post(fresh, body(*read(CT))).status == 200
    fresh.server.wait_admitted()
    one = scu.read(CT)
    [begun], [ended] = (wait_event(fresh.server, f"association-{what}") for what in ("begun", "ended"))
    assert [event["calling"] for event in (begun, ended)] == ["SENDER"] * 2
    assert [event["by"] for event in (begun, ended)] == ["web"] * 2
    assert (ended["stored"], ended["studies"], ended["ending"]) == (1, {one.study: 1}, "done")
    (row,) = fresh.server.list()
    assert row["calling"] == "SENDER"
    line = [line for line in fresh.desk_lines() if " POST " in line]
    assert line[-1].endswith("SENDER POST store: 200, 1 instances")
    assert one.study not in "\n".join(fresh.server.log)


def test_a_locked_vault_is_no_reason_not_to_store(fresh: Desk) -> None:
    fresh.server.ok("lock")
    assert post(fresh, body(*read(CT))).status == 200
    fresh.server.ok("unlock", "--key-file", fresh.server.home / "store.key")
    fresh.server.wait_admitted()
    assert list(exported(fresh.server).values()) == [raw_data_set(CT)]


def test_what_was_answered_for_survives_a_kill(fresh: Desk) -> None:
    assert post(fresh, body(*read(CT))).status == 200
    fresh.server.stop(signal.SIGKILL)
    fresh.server.kill("desk")
    fresh.server.kill_all()
    fresh.server.start()
    fresh.server.wait_admitted()
    assert list(exported(fresh.server).values()) == [raw_data_set(CT)]


def test_other_content_under_a_uid_that_is_held_waits_for_a_decision(fresh: Desk, tmp_path: Path) -> None:
    uid = scu.read(CT).sop_instance
    other = changed(CT, tmp_path, SOPInstanceUID=uid, StudyDescription="another")
    for path in (CT, CT, other):
        assert post(fresh, body(*read(path))).status == 200
        fresh.server.wait_admitted()
    assert list(exported(fresh.server).values()) == [raw_data_set(CT)]
    (kept,) = fresh.server.ok("quarantine", "list", "--json").json()["items"]
    assert kept["study"] == scu.read(CT).study


@pytest.mark.needs("curl")
@pytest.mark.parametrize(("title", "shown"), [("SHEETS", "415"), ("SHEETR", "[")])
def test_what_the_sheet_says_to_try_shows_what_it_says(fresh: Desk, title: str, shown: str) -> None:
    # The port is the system's; a sheet names the configuration's.
    fresh.server.set("desk", web=[f"127.0.0.1:{fresh.port}"])
    assert post(fresh, body(*read(CT))).status == 200
    fresh.server.wait_admitted()
    fresh.add_peer(title, "--role", {"SHEETS": "sender", "SHEETR": "reader"}[title])
    fresh.server.wait_log(r"desk: peers and certificates read: 6 peers")
    folder = fresh.server.home / "issued" / title
    (command,) = re.findall(r"^  (curl .*)$", (folder / f"{title}.txt").read_text(), re.MULTILINE)
    done = subprocess.run(f"{command} --silent", shell=True, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(shown), (command, done.stdout, done.stderr)


# --- what is not


@pytest.mark.parametrize(("title", "status"), [("SENDER", 200), ("ADMIN", 200), ("READER", 403), ("NOBODY", 403)])
def test_who_may_store(desk: Desk, tmp_path: Path, title: str, status: int) -> None:
    assert post(desk, body(*read(new(tmp_path))), title).status == status


@pytest.mark.parametrize("path", ["/studies", "/studies/1.2.3", "/studies/1.2.3/metadata"])
def test_who_may_only_store_sees_nothing(desk: Desk, path: str) -> None:
    assert desk.get(path, "SENDER").status == 403


@pytest.mark.parametrize(
    ("broken", "tag", "reason"),
    [
        (lambda c: b"no file", "0008119A", 0xC001),
        (lambda c: b"", "0008119A", 0xC001),
        (lambda c: c[128:], "0008119A", 0xC001),
        (lambda c: c[:140] + b"\xff\xff\xff\xff" + c[144:], "0008119A", 0xC001),
        (lambda c: c[:140] + b"\0\0\0\0" + c[144:], "0008119A", 0xC001),
        (lambda c: c[:200], "0008119A", 0xC001),
        (lambda c: c.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0", 1), "00081198", 0xC122),
        (lambda c: c.replace(b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.5.1.4.1.1.0\0", 1), "00081198", 0x0122),
        (lambda c: c.replace(b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.5.1.4.1.1.4\0", 1), "00081198", 0xA900),
    ],
    ids=["text", "nothing", "no preamble", "long head", "no head", "half a head", "syntax", "class", "other"],
)
def test_what_is_no_instance_fails_by_itself(
    desk: Desk, tmp_path: Path, broken: Callable[[bytes], bytes], tag: str, reason: int
) -> None:
    path = new(tmp_path)
    bad = broken(new(tmp_path).read_bytes())
    answer = post(desk, body(bad, *read(path), bad))
    assert answer.status == 202
    assert references(answer, "00081199") == [scu.read(path).sop_instance]
    assert reasons(answer, tag) == [reason] * 2
    assert post(desk, body(bad)).status == 409


def test_what_is_no_uid_is_not_given_back(desk: Desk) -> None:
    name = b"Doe^Jane" * 4000
    head = CT.read_bytes()[:132]
    meta = b"\x02\x00\x03\x00UI" + (len(name)).to_bytes(2, "little") + name
    for element in (2, 0x10):
        meta += bytes([2, 0, element, 0]) + b"UI\x04\x001.2\0"
    bad = head + b"\x02\0\0\0UL\x04\0" + len(meta).to_bytes(4, "little") + meta
    answer = post(desk, body(*[bad] * 50))
    assert (answer.status, len(answer.json()["0008119A"]["Value"])) == (409, 50)
    assert "Doe" not in answer.text


def test_text_that_does_not_decode_is_kept_as_it_came_and_flagged(fresh: Desk) -> None:
    content = (
        CT.read_bytes()
        .replace(b"ISO_IR 100", b"ISO_IR 192")
        .replace(b"CompressedSamples^CT1", b"M\xfcllers^SamplesCT1^12")
    )
    assert post(fresh, body(content)).status == 200
    fresh.server.wait_admitted()
    (row,) = fresh.server.list()
    assert (row["undecoded"], row["patient_name"]) == (1, "")


def test_an_instance_of_another_study_than_the_path_fails(desk: Desk, tmp_path: Path) -> None:
    mine, other = new(tmp_path), new(tmp_path, StudyInstanceUID="1.2.3")
    answer = post(desk, body(*read(mine, other)), path=f"/studies/{scu.read(mine).study}")
    assert answer.status == 202
    assert references(answer, "00081198") == [scu.read(other).sop_instance]
    assert reasons(answer) == [0xA901]


def test_a_peer_stores_only_the_classes_of_its_file(desk: Desk, tmp_path: Path) -> None:
    answer = post(desk, body(*read(new(tmp_path), new(tmp_path, file("MR_small.dcm")))), "ONLYMR")
    assert (answer.status, reasons(answer), len(references(answer, "00081199"))) == (202, [0x0122], 1)


@pytest.mark.parametrize(
    ("kind", "content", "headers", "status"),
    [
        ("application/dicom", CT.read_bytes(), {}, 415),
        ("text/plain", b"x", {}, 415),
        ("", b"x", {}, 415),
        ('multipart/related; type="application/dicom"', b"x", {}, 415),
        (KIND.replace("application/dicom", "application/dicom+json"), b"x", {}, 415),
        (KIND.replace(BOUNDARY, "x" * 71), b"x", {}, 400),
        (KIND, b"no multipart", {}, 400),
        (KIND, b"", {}, 400),
        (KIND, body(), {}, 400),
        (KIND, body(CT.read_bytes(), end=""), {}, 400),
        (KIND, body(CT.read_bytes(), end="\r\n--boundary"), {}, 400),
        (KIND, f"--{BOUNDARY}\r\n{'x: y' * 2000}\r\n\r\n".encode(), {}, 400),
        (KIND, f"--{BOUNDARY}\r\n".encode() + b"x: y\r\n" * 20 + b"\r\n", {}, 400),
        (KIND, body(CT.read_bytes()), {"accept": "application/dicom+xml"}, 406),
        (KIND, body(CT.read_bytes()), {"origin": "https://elsewhere.example"}, 403),
    ],
)
def test_requests_that_are_none_are_refused(
    desk: Desk, kind: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    before = len(desk.desk_lines())
    answer = post(desk, content, kind=kind, **headers)
    assert answer.status == status, answer.text
    deadline = time.monotonic() + 10
    while len(desk.desk_lines()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "error" not in desk.desk_lines()[-1]


def test_parts_of_another_kind_fail_by_themselves(desk: Desk, tmp_path: Path) -> None:
    answer = post(desk, body(*read(new(tmp_path)), kind="text/plain"))
    assert (answer.status, reasons(answer, "0008119A")) == (409, [0xC001])


def test_what_was_not_whole_is_not_there(fresh: Desk, tmp_path: Path) -> None:
    whole, cut = new(tmp_path), new(tmp_path)
    content = body(*read(whole))[: -len(f"\r\n--{BOUNDARY}--\r\n")] + body(cut.read_bytes()[:20_000], end="")
    answer = post(fresh, content)
    assert (answer.status, "last boundary" in answer.text) == (400, True)
    fresh.server.wait_admitted()
    assert list(exported(fresh.server).values()) == [raw_data_set(whole)]


def test_a_client_that_goes_away_leaves_nothing_half(fresh: Desk, tmp_path: Path) -> None:
    content = body(*read(*(new(tmp_path) for _ in range(40))))
    plain = socket.create_connection(("127.0.0.1", fresh.port), 30)
    with fresh.context("SENDER").wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        head = f"POST {PREFIX}/studies HTTP/1.1\r\nHost: x\r\nContent-Type: {KIND}\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        sock.sendall(head.encode() + content[: len(content) // 2])
    fresh.server.wait_log(r"desk: web: .*before the end of what it stores")
    fresh.server.wait_admitted()
    assert 10 < len(exported(fresh.server)) <= 20
    assert fresh.server.run("verify").status == 0
    assert fresh.server.status()["counts"]["unreadable"] == 0


def test_a_client_that_stops_sending_is_let_go(make_server: Callable[[], Server]) -> None:
    desk = Desk(make_server(), PEERS[:1], idle_seconds=1)
    plain = socket.create_connection(("127.0.0.1", desk.port), 30)
    with desk.context("SENDER").wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        head = f"POST {PREFIX}/studies HTTP/1.1\r\nHost: x\r\nContent-Type: {KIND}\r\nContent-Length: 1000000\r\n\r\n"
        sock.sendall(head.encode() + body(CT.read_bytes()[:5000], end=""))
        answer = http.client.HTTPResponse(sock)  # type: ignore[arg-type]
        answer.begin()
        assert answer.status == 408
        assert answer.headers["Connection"] == "close"


def test_without_room_nothing_is_taken(make_server: Callable[[], Server], tmp_path: Path) -> None:
    desk = Desk(make_server(), PEERS[:1])
    desk.server.set("store", reserve_bytes=1 << 50)
    again(desk)
    answer = post(desk, body(*read(new(tmp_path))))
    assert (answer.status, reasons(answer)) == (409, [0xA700])


@pytest.mark.needs_root
def test_a_disk_that_fills_up_within_an_instance_keeps_nothing_of_it_and_all_before(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    desk = Desk(make_server(), PEERS[:1])
    desk.server.set("store", reserve_bytes=1 << 20)
    desk.server.stop()
    disk = Disk(desk.server.home / "spool" / "incoming-desk", 12)
    try:
        again(desk)
        small, after = new(tmp_path), new(tmp_path)
        big = pydicom.dcmread(new(tmp_path))
        big.PixelData = bytes(30 << 20)
        big.save_as(tmp_path / "big.dcm")
        answer = post(desk, body(*read(small, tmp_path / "big.dcm", after)))
        assert (answer.status, reasons(answer)) == (202, [0xA700]), desk.server.log
        stored = [scu.read(path).sop_instance for path in (small, after)]
        assert references(answer, "00081199") == stored
        desk.server.wait_admitted()
        assert sorted(exported(desk.server)) == sorted(stored)
        assert desk.server.status()["counts"]["unreadable"] == 0
        desk.server.stop()
    finally:
        disk.unmount()


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_desk_that_is_killed_within_a_store_leaves_nothing_half(fresh: Desk, tmp_path: Path, part: float) -> None:
    paths = [new(tmp_path) for _ in range(40)]
    content = body(*read(*paths))
    plain = socket.create_connection(("127.0.0.1", fresh.port), 30)
    with fresh.context("SENDER").wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        head = f"POST {PREFIX}/studies HTTP/1.1\r\nHost: x\r\nContent-Type: {KIND}\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        sock.sendall(head.encode() + content[: int(len(content) * part)])
        until(lambda: any((fresh.server.home / "spool" / "incoming-desk").iterdir()), "nothing came")
        fresh.server.kill("desk")
    fresh.server.wait_admitted()
    whole = {scu.read(path).sop_instance: raw_data_set(path) for path in paths}
    came = exported(fresh.server)
    assert came
    assert came.items() <= whole.items()
    assert (fresh.server.run("verify").status, fresh.server.status()["counts"]["unreadable"]) == (0, 0)


def test_a_day_that_is_used_up_takes_no_more(make_server: Callable[[], Server], tmp_path: Path) -> None:
    desk = Desk(make_server(), [("SENDER", "--role", "sender", "--bytes-per-day", "50000")])
    answer = post(desk, body(*read(*(new(tmp_path) for _ in range(3)))))
    assert (answer.status, reasons(answer), len(references(answer, "00081199"))) == (202, [0xA700], 2)


def test_erasing_a_study_takes_what_the_desk_still_holds_open(make_server: Callable[[], Server]) -> None:
    desk = Desk(make_server(), PEERS[:1])
    server = desk.server
    server.set("gate", pack_idle_seconds=600)
    again(desk)
    assert post(desk, body(*read(CT))).status == 200
    server.ok("erase", "--study", scu.read(CT).study, "--reason", "a test", "--yes")
    deadline = time.monotonic() + 30
    while list((server.home / "spool" / "incoming-desk").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert server.run("export", "--all", "--to", server.home / "out").status == NOTHING


def test_a_rotation_waits_for_no_pack_of_the_desk(fresh: Desk, tmp_path: Path) -> None:
    path = new(tmp_path)
    assert post(fresh, body(*read(path))).status == 200
    fresh.server.ok("keys", "rotate", "--reason", "a test", *WAIVERS)
    after = new(tmp_path)
    assert post(fresh, body(*read(after))).status == 200
    fresh.server.wait_admitted()
    assert sorted(exported(fresh.server).values()) == sorted(raw_data_set(p) for p in (path, after))
