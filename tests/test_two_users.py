"""Gate and vault as two users, and a gate that is broken into: the archive stays whole, and status shows it."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Server, changed, send
from pydicom.data import get_testdata_file
from scu import raw_data_set
from users import GATE, VAULT, being, open_folder

from keys.seal import context, seal
from keys.versions import new_key, read_deposit_key
from storage import pack

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))

pytestmark = pytest.mark.needs_root


@pytest.fixture
def home() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder / "s"


@pytest.fixture
def two(home: Path) -> Iterator[Server]:
    server = Server(home)
    try:
        server.init("--vault-user", VAULT, "--gate-user", GATE)
        server.add_peer("CT1")
        server.set("gate", pack_idle_seconds=1)
        yield server.start()
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()


class Forger:
    """What somebody in the gate, or the desk, can make: everything that the public deposit key allows."""

    def __init__(self, server: Server, user: str = GATE, folder: str = "incoming") -> None:
        self.user = user
        published = (server.home / "spool" / "public" / "deposit-1.key").read_bytes()
        from storescp.config import load

        self.incoming = server.home / "spool" / folder
        self.public = read_deposit_key(published, load(server.config).signing_key)
        self.key = new_key()

    def header(self, key_id: bytes, *, version: int = 1) -> pack.Header:
        return pack.Header(self.public.store_id, key_id, version, self.public.wrap(self.key, key_id))

    def record(self, header: pack.Header, object_id: bytes, *, dataset: bytes = b"forged", **changes: Any) -> bytes:
        attributes = msgspec.json.encode(describe(**changes)) if "raw" not in changes else changes["raw"]
        fields = (header.bound(), object_id)
        sealed = seal(dataset, self.key, context("dataset", *fields))
        described = seal(attributes, self.key, context("attributes", *fields))
        frame = pack.Frame(0, object_id, len(sealed), len(described))
        return frame.encode() + sealed + described

    def deposit(self, key_id: bytes, content: bytes, name: str = "") -> Path:
        path = self.incoming / (name or key_id.hex())
        with being(self.user):
            path.write_bytes(content)
        return path


def describe(uid: str = "1.2.3.1", study: str = "1.2.3", patient: str = "P1", **more: Any) -> dict[str, Any]:
    """Return attributes as the gate writes them."""
    dataset = {
        "00080016": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.2"]},
        "00080018": {"vr": "UI", "Value": [uid]},
        "0020000D": {"vr": "UI", "Value": [study]},
        "0020000E": {"vr": "UI", "Value": ["1.2.3.9"]},
        "00100020": {"vr": "LO", "Value": [patient]},
    }
    received = {
        "at": "2026-01-01T00:00:00.000000Z",
        "association": "ab",
        "calling": "CT1",
        "called": "X",
        "address": "a",
    }
    return {
        "format": 1,
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "dataset": dataset,
        "undecoded": {},
        "received": received | {"certificate": ""},
    } | more


def padded(content: bytes) -> bytes:
    return content.ljust(pack.page_after(len(content)), b"\0")


def archive(server: Server) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (server.store / "objects").rglob("*") if p.is_file()}


def intact(server: Server, name: str, *files: Path) -> None:
    """Assert that the archive is whole and holds these files' data sets unchanged among others."""
    done = server.run("verify")
    assert done.status == 0, done.out
    server.ok("export", "--all", "--to", server.home / name)
    exported = [raw_data_set(path) for path in (server.home / name).rglob("*.dcm")]
    assert all(raw_data_set(file) in exported for file in files)


def test_each_runs_as_its_own_user_and_the_gate_can_read_nothing_of_the_vault(two: Server) -> None:
    uids = {verb: os.stat(f"/proc/{two.pids(verb)[0]}").st_uid for verb in ("gate", "vault")}
    assert uids == {"gate": pwd.getpwnam(GATE).pw_uid, "vault": pwd.getpwnam(VAULT).pw_uid}
    assert send(two, [CT, MR]) == [0, 0]
    two.wait_admitted()
    with being(GATE):
        for path in (two.store, two.home / "anchors", two.home / "store.key", two.home / "run"):
            with pytest.raises(PermissionError):
                list(path.iterdir()) if path.is_dir() else path.read_bytes()
        with pytest.raises(PermissionError):
            (two.home / "spool" / "public" / "deposit-2.key").write_bytes(b"")
    assert all(p.stat().st_uid == uids["vault"] for p in (two.store / "objects").rglob("*"))
    intact(two, "out", CT, MR)


def test_a_process_of_the_same_user_cannot_trace_ours_or_read_their_memory(two: Server) -> None:
    for verb, user in (("gate", GATE), ("gate-worker", GATE), ("vault", VAULT)):
        assert two.pids(verb)
        for pid in two.pids(verb):
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{pwd.getpwnam(user).pw_uid}\t" in status
            assert "NoNewPrivs:\t1\n" in status
            # What the kernel lets nobody trace or dump belongs to root in /proc, whoever runs it.
            assert Path(f"/proc/{pid}/mem").stat().st_uid == 0, verb


def test_a_descriptor_that_the_gate_kept_reaches_nothing_that_is_admitted(two: Server) -> None:
    two.stop()
    two.set("gate", pack_idle_seconds=600)
    two.start()
    assert send(two, [CT]) == [0]
    (deposit,) = two.deposits()
    with being(GATE):
        kept = os.open(deposit, os.O_RDWR)
    os.kill(two.pids("gate")[0], signal.SIGKILL)
    two.wait_admitted()
    before = archive(two)
    with being(GATE):
        again = os.open(f"/proc/self/fd/{kept}", os.O_RDWR)
    for descriptor in (kept, again):
        os.pwrite(descriptor, b"overwritten" * 1000, 0)
        os.close(descriptor)
    assert archive(two) == before
    intact(two, "out", CT)


def test_links_pipes_and_folders_are_no_deposits(two: Server) -> None:
    forger = Forger(two)
    header = forger.header(b"\x01" * 16)
    target = forger.deposit(b"\x01" * 16, header.encode() + forger.record(header, b"\x02" * 16), name="first")
    with being(GATE):
        os.link(target, two.incoming / ("01" * 16))
        os.symlink(two.store / "keyring", two.incoming / ("02" * 16))
        os.mkfifo(two.incoming / ("03" * 16))
        os.mkdir(two.incoming / ("04" * 16))
    assert send(two, [CT]) == [0]
    assert [row["calling"] for row in two.list()] == ["CT1"]
    two.wait_log("is a folder and is left where it is")
    assert not (two.incoming / ("02" * 16)).is_symlink()
    assert not (two.incoming / ("03" * 16)).exists()
    assert two.status()["quarantine"] == 1
    os.rmdir(two.incoming / ("04" * 16))
    intact(two, "out", CT)


def test_a_key_id_that_is_known_takes_no_other_content(two: Server) -> None:
    forger = Forger(two)
    key_id, object_id = b"\x11" * 16, b"\x22" * 16
    header = forger.header(key_id)
    first = header.encode() + padded(forger.record(header, object_id, dataset=b"first content"))
    forger.deposit(key_id, first)
    two.wait_admitted()
    before = archive(two)
    for number, record in enumerate(
        (
            forger.record(header, object_id, dataset=b"other content"),
            forger.record(header, b"\x33" * 16, uid="1.2.3.2"),
        ),
        1,
    ):
        forger.deposit(key_id, header.encode() + record)
        two.wait_admitted()
        assert archive(two) == before
        assert two.status()["quarantine"] == number
    # The very same deposit once more is what a crash leaves behind: it is accounted for and goes.
    forger.deposit(key_id, first)
    two.wait_admitted()
    assert (archive(two), two.status()["quarantine"]) == (before, 2)
    intact(two, "out")


def test_a_record_of_another_study_or_patient_is_quarantined_and_the_rest_admitted(two: Server) -> None:
    forger = Forger(two)
    header = forger.header(b"\x11" * 16)
    records = [
        forger.record(header, b"\x01" * 16, uid="1.2.3.1"),
        forger.record(header, b"\x02" * 16, uid="1.2.3.2", study="1.9.9"),
        forger.record(header, b"\x03" * 16, uid="1.2.3.3", patient="SOMEBODY ELSE"),
        forger.record(header, b"\x04" * 16, uid="1.2.3.4"),
    ]
    forger.deposit(b"\x11" * 16, header.encode() + b"".join(map(padded, records)))
    assert sorted(row["sop"] for row in two.list()) == ["1.2.3.1", "1.2.3.4"]
    reasons = sorted(item["reason"] for item in two.ok("quarantine", "list", "--json").json()["items"])
    assert [reason.split()[1] for reason in reasons] == ["patient", "study"]
    intact(two, "out")


def test_sparse_and_huge_files_fill_nothing(two: Server) -> None:
    forger = Forger(two)
    header = forger.header(b"\x11" * 16)
    path = forger.deposit(b"\x11" * 16, header.encode() + forger.record(header, b"\x01" * 16))
    with being(GATE):
        os.truncate(path, 1 << 42)
    assert send(two, [CT]) == [0]
    assert [row["calling"] for row in two.list()] == ["CT1"]
    used = sum(p.stat().st_blocks * 512 for p in two.store.rglob("*"))
    assert used < 32 << 20
    assert not path.exists()
    intact(two, "out", CT)


HOSTILE_RECORDS: dict[str, dict[str, Any]] = {
    "no json": {"raw": b"\xff\xfe{"},
    "deep json": {"raw": b"[" * 60_000},
    "an unknown key": {"surprise": 1},
    "a path for a UID": {"uid": "../../etc/passwd"},
    "sql for a UID": {"uid": "1' OR '1'='1"},
    "an empty study": {"study": ""},
    "a UID of 65 characters": {"uid": "1." + "2" * 63},
    "control characters": {"patient": "a\x1b[2Jb\x00"},
    "another format": {"format": 2},
}


def test_hostile_attributes_lying_lengths_and_set_bytes_hold_up_nothing(two: Server) -> None:
    forger = Forger(two)
    header = forger.header(b"\x11" * 16)
    good = [forger.record(header, bytes([n]) * 16, uid=f"1.2.3.{n}") for n in range(1, 4)]
    bad = [forger.record(header, os.urandom(16), **changes) for changes in HOSTILE_RECORDS.values()]
    lying = [
        pack.Frame(0, os.urandom(16), 1 << 40, 100).encode(),
        pack.Frame(0, os.urandom(16), 100, 1 << 20).encode(),
        pack.Frame(0, os.urandom(16), 1, 100).encode(),
        b"SRR1" + b"\xff" * 36,
        good[0][:32] + b"\1" * 8 + good[0][40:],
        good[0][:16] + os.urandom(16) + good[0][32:],
    ]
    parts = [good[0], *bad, good[1], *lying, good[2]]
    forger.deposit(b"\x11" * 16, header.encode() + b"".join(map(padded, parts)))
    assert sorted(row["sop"] for row in two.list()) == ["1.2.3.1", "1.2.3.2", "1.2.3.3"]
    assert two.status()["counts"]["unreadable"] >= len(bad) + len(lying)
    assert any("did not open" in warning for warning in two.status()["warnings"])
    intact(two, "out")


HOSTILE_HEADERS = {
    "a reserved byte": lambda raw: raw[:50] + b"\1" + raw[51:],
    "a byte of the padding": lambda raw: raw[:2000] + b"\1" + raw[2001:],
    "flags": lambda raw: raw[:15] + b"\1" + raw[16:],
    "another suite": lambda raw: raw[:9] + b"\2" + raw[10:],
    "another store": lambda raw: raw[:16] + bytes(16) + raw[32:],
    "another key id": lambda raw: raw[:32] + bytes(16) + raw[48:],
    "a version that never was": lambda raw: raw[:64] + b"\0\0\0\7" + raw[68:],
    "version zero": lambda raw: raw[:64] + bytes(4) + raw[68:],
    "another wrapped key": lambda raw: raw[:100] + bytes(16) + raw[116:],
    "a short file": lambda raw: raw[:1000],
}


def test_no_forged_header_is_admitted_and_all_are_shown(two: Server) -> None:
    forger = Forger(two)
    for number, change in enumerate(HOSTILE_HEADERS.values(), 1):
        key_id = bytes([number]) * 16
        header = forger.header(key_id)
        record = forger.record(header, b"\x01" * 16, uid=f"1.2.3.{number}")
        forger.deposit(key_id, change(header.encode()) + record)
    assert send(two, [CT]) == [0]
    assert [row["calling"] for row in two.list()] == ["CT1"]
    assert two.status()["quarantine"] == len(HOSTILE_HEADERS)
    assert [p.name for p in two.deposits() if p.stat().st_size < 4096] == []
    intact(two, "out", CT)


def test_what_is_appended_to_another_workers_pack_does_not_spoil_it(two: Server, tmp_path: Path) -> None:
    two.stop()
    two.set("gate", pack_idle_seconds=2)
    two.start()
    assert send(two, [CT]) == [0]
    forger = Forger(two)
    (deposit,) = two.deposits()
    foreign = forger.record(forger.header(bytes.fromhex(deposit.name)), os.urandom(16))
    with being(GATE), deposit.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(pack.page_after(end))
        file.write(foreign)
    assert len(two.list()) == 1
    assert send(two, [changed(CT, tmp_path, SOPInstanceUID="1.2.3.4")]) == [0]
    two.wait_admitted()
    assert len(two.list()) == 2
    intact(two, "out", CT)


def test_a_gate_that_never_lets_go_of_its_pack_stops_nobody_else(two: Server) -> None:
    forger = Forger(two)
    header = forger.header(b"\x11" * 16)
    path = forger.deposit(b"\x11" * 16, header.encode() + padded(forger.record(header, b"\x01" * 16)))
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert send(two, [CT]) == [0]
        assert len(two.list()) >= 1
    two.wait_admitted()
    assert len(two.list()) == 2


def test_a_gate_that_may_not_write_answers_a700_until_it_may_again(two: Server) -> None:
    two.incoming.chmod(0o2550)
    assert send(two, [CT]) == [0xA700]
    two.incoming.chmod(0o2770)
    assert send(two, [CT]) == [0]
    intact(two, "out", CT)


def test_wrong_owners_and_modes_are_refused_and_named(two: Server) -> None:
    two.stop()
    for path, mode, verb in (
        (two.store, 0o755, "vault"),
        (two.home / "anchors", 0o701, "vault"),
        (two.store / "keyring", 0o640, "vault"),
        (two.incoming, 0o2777, "vault"),
        (two.home / "tls" / "server.key", 0o644, "gate"),
        (two.peers, 0o777, "gate"),
    ):
        before = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        done = two.run_as(VAULT if verb == "vault" else GATE, verb)
        path.chmod(before)
        assert done.status == 1, (path, done.err)
        assert str(path) in done.err
    assert "gate.user" in two.run_as(VAULT, "gate").err
    assert "run as its owner" in two.run_as(GATE, "vault").err or "cannot be found" in two.run_as(GATE, "vault").err
