"""The vault's hand in the chain: nothing is lost or recorded twice, whatever fails, and whatever a gate writes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Server

from keys import keyring, slots
from keys.anchors import FileAnchors
from keys.keyring import Keyring
from keys.seal import SealError, context, seal
from keys.versions import new_key
from storage import audit, events, pack
from storage.deposit import PublishedKeys
from storage.ledger import CertificateUse, Head, Ledger
from storage.sqlite import DatabaseError
from storescp.config import Config, load
from storescp.errors import StrongroomError
from storescp.vault.auditor import Auditor
from storescp.vault.commitmentrecords import records_of

TIME = "2026-01-31T12:00:00.000000Z"
UID = 1000


class Vault:
    """An auditor on a real store, with what a vault gives it."""

    def __init__(self, server: Server) -> None:
        self.config: Config = load(server.config)
        self.chain = self.config.store_path / "audit"
        self.incoming = self.config.incoming
        self.keys = PublishedKeys(self.config.public, self.config.signing_key)
        self.ring: Keyring = keyring.unlock(
            self.config.keyring, slots.read_key_file(server.home / "store.key"), FileAnchors(self.config.anchors)
        )
        self.auditor = Auditor(self.config)
        self.ledger().close()

    def ledger(self) -> Ledger:
        version = self.ring.current()
        return Ledger(self.config.ledger(version.version), version.ledger_key(), migrate=True)

    def unlock(self) -> Auditor:
        self.auditor.unlocked(self.ring, self.ledger())
        return self.auditor

    def killed(self) -> Vault:
        """Let go of the chain without a word, and begin again."""
        if self.auditor._chain is not None:
            self.auditor._chain.close()
        self.auditor = Auditor(self.config)
        return self

    def deposit(self, *found: dict[str, Any]) -> Path:
        return self.deposit_raw(msgspec.json.encode(list(found)))

    def deposit_raw(self, content: bytes) -> Path:
        before = set(events.found(self.incoming))
        events.deposit(self.incoming, self.ring.store_id, self.keys, content)
        [path] = set(events.found(self.incoming)) - before
        return path

    def take(self) -> None:
        self.auditor.take(dict.fromkeys(self.config.inboxes, os.geteuid()))

    def waiting(self) -> list[Path]:
        return events.found(self.incoming)

    def records(self) -> list[dict[str, Any]]:
        """Return all records; those under a deposit key are opened with it."""
        return list(self.unlocked_reader().read(0))

    def unlocked_reader(self) -> Auditor:
        if self.auditor._ring is None:
            self.unlock()
        return self.auditor

    def types(self) -> list[str]:
        return [record["type"] for record in self.records()]

    def events(self) -> list[dict[str, Any]]:
        return [event for record in self.records() if record["type"] == "gate-events" for event in record["events"]]

    def verified(self) -> audit.Verified:
        return audit.verify(self.chain, self.ring.store_id, self.config.signing_key)


@pytest.fixture
def vault(make_server: Callable[[], Server]) -> Iterator[Vault]:
    server = make_server()
    server.init()
    made = Vault(server)
    yield made
    made.auditor.close()


@pytest.fixture
def opened(vault: Vault) -> Vault:
    vault.unlock()
    return vault


def begun(**more: Any) -> dict[str, Any]:
    return {
        "time": TIME,
        "type": "association-begun",
        "calling": "CT1",
        "address": "192.0.2.1:1",
        "certificate": "",
        **more,
    }


def damage(vault: Vault, *, longer: bool = False) -> None:
    """Change a byte of the last file, or add some."""
    path = sorted(vault.chain.glob("*.log"))[-1]
    content = path.read_bytes()
    path.write_bytes(content + b"x\n" if longer else content.replace(b"R 1 ", b"R 2 ", 1))


# --- locked and unlocked


def test_what_is_recorded_locked_is_sealed_to_the_deposit_key_and_copied_under_the_audit_key(vault: Vault) -> None:
    vault.auditor.record("peer-added", uid=UID, peer="CT1")
    vault.auditor.record("peer-removed", uid=UID, peer="CT1")
    assert vault.verified().unsigned == 2
    with pytest.raises(audit.AuditError, match="locked"):
        list(vault.auditor.read(0))
    vault.unlock()
    key = vault.ring.body.audit_key

    def with_audit_key(name: str, sealed: bytes, place: bytes) -> bytes:
        from keys.seal import open_sealed

        if name != "audit":
            raise SealError("another key's")
        return open_sealed(sealed, key, place)

    found = [json.loads(e.content) for e in audit.read(vault.chain, vault.ring.store_id, with_audit_key, after=2)]
    assert [(r["type"], r["of"], r["record"]["type"]) for r in found] == [
        ("transcript", 1, "peer-added"),
        ("transcript", 2, "peer-removed"),
    ]
    assert found[0]["record"] == {k: v for k, v in vault.records()[0].items() if k != "number"}
    assert (vault.verified().fault, vault.verified().unsigned) == ("", 0)


def test_what_was_copied_once_is_not_copied_again(vault: Vault) -> None:
    vault.auditor.record("peer-added", peer="CT1")
    vault.unlock()
    for _ in range(3):
        vault.auditor.locked()
        vault.unlock()
    assert vault.types().count("transcript") == 1


def test_a_kill_between_the_copies_and_the_ledger_copies_nothing_twice(vault: Vault) -> None:
    vault.auditor.record("peer-added", peer="CT1")
    vault.unlock()
    ledger = vault.ledger()
    ledger.set_audit_head(Head(0, b"", 0))
    ledger.close()
    vault.killed().unlock()
    assert vault.types().count("transcript") == 1


def test_a_chain_that_was_cut_while_nobody_ran_is_told_at_the_next_unlock(
    opened: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        opened.auditor.record("verify", uid=UID)
    opened.auditor.locked()
    head = opened.verified().head.number
    path = sorted(opened.chain.glob("*.log"))[-1]
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if int(line.split()[1]) < 3))
    assert opened.verified().fault == ""
    opened.killed().unlock()
    said = f"record {head} of the audit chain is gone"
    assert any(said in record.message for record in caplog.records)
    [broken] = [record for record in opened.records() if record["type"] == "audit-broken"]
    assert said in broken["fault"]
    # Said once; what follows is known again.
    opened.auditor.locked()
    opened.killed().unlock()
    assert opened.types().count("audit-broken") == 1


def test_what_no_vault_wrote_keeps_nobody_from_unlocking(vault: Vault, caplog: pytest.LogCaptureFixture) -> None:
    deposit_key = vault.keys.current()
    chain = vault.auditor._chain
    assert chain is not None
    vault.auditor.record("peer-added", peer="CT1")
    for content in (b"no json", b"[]", b"[" * 5000, b'{"type":"x"}', b'"\xff"'):
        chain.append([content], "deposit-1", deposit_key.seal_record)
        caplog.clear()
        vault.unlock()
        assert any("none that a vault writes" in record.message for record in caplog.records)
        vault.auditor.locked()
    vault.auditor._chain = None
    chain.close()
    vault.killed()


def test_a_broken_chain_stops_acts_and_not_locking(opened: Vault) -> None:
    opened.auditor.record("verify")
    damage(opened, longer=True)
    with pytest.raises(StrongroomError, match="not done"):
        opened.auditor.record("peer-added", peer="CT1")
    assert "somebody else" in opened.auditor.fault
    opened.auditor.tell("exported")
    opened.auditor.locked()


def test_a_changed_byte_stops_acts_from_the_next_start_on(opened: Vault) -> None:
    opened.auditor.record("verify", uid=UID)
    damage(opened)
    opened.auditor.locked()
    opened.killed()
    assert "broken" in opened.auditor.fault
    with pytest.raises(StrongroomError, match="not done"):
        opened.auditor.record("peer-added", peer="CT1")
    opened.unlock()
    with pytest.raises(StrongroomError, match="not done"):
        opened.auditor.record("unlocked")
    aside = opened.auditor.restart(UID, "a test")
    assert sorted(path.name for path in aside.glob("*.log"))
    opened.auditor.record("peer-added", peer="CT1")
    first, second = opened.records()
    assert (first["type"], first["reason"], first["uid"]) == ("audit-restarted", "a test", UID)
    assert "broken" in first["fault"]
    assert (first["folder"], second["type"]) == (aside.name, "peer-added")
    assert opened.verified().fault == ""


def test_a_restart_that_cannot_put_the_chain_aside_leaves_it_in_use(
    opened: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.auditor.record("verify")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as changed:
        changed.setattr(os, "rename", refuse)
        with pytest.raises(StrongroomError, match="put aside"):
            opened.auditor.restart(UID, "a test")
    opened.auditor.record("verify")
    assert opened.types() == ["verify", "verify"]


def test_a_record_that_is_too_long_is_refused_before_the_chain_and_names_no_fault(vault: Vault) -> None:
    with pytest.raises(StrongroomError, match="too long"):
        vault.auditor.record("peer-added", peer="x" * (audit.RECORD_LIMIT - 100))
    assert vault.auditor.fault == ""
    # What just fits fits its transcript, too.
    vault.auditor.record("peer-added", peer="x" * (audit.RECORD_LIMIT - (2 << 10)))
    vault.unlock()
    assert vault.types() == ["peer-added", "transcript"]


@pytest.mark.needs_root
def test_a_disk_without_room_for_the_first_file_stops_acts_until_there_is_room(vault: Vault) -> None:
    vault.auditor.close()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=8", "tmpfs", str(vault.chain)], check=True)
    try:
        vault.auditor = Auditor(vault.config)
        for fill in (_fill_names, _fill_bytes, _fill_names):
            filled = fill(vault.chain)
            for _ in range(2):
                if fill is _fill_names and list(vault.chain.glob("*.log")):
                    # Names are needed for a file's first record alone.
                    vault.auditor.record("peer-added", peer="CT1")
                    continue
                with pytest.raises(StrongroomError, match="not done"):
                    vault.auditor.record("peer-added", peer="x" * 5000)
                assert vault.auditor.fault
            for path in filled:
                path.unlink()
            vault.auditor.record("peer-added", peer="CT1")
            assert vault.auditor.fault == ""
        assert (vault.verified().fault, vault.verified().head.number) == ("", 5)
        vault.auditor.close()
    finally:
        subprocess.run(["umount", "-l", str(vault.chain)], check=True)
        vault.auditor = Auditor(vault.config)


def _fill_names(folder: Path) -> list[Path]:
    made = []
    for number in range(100):
        with contextlib.suppress(OSError):
            (folder / f"full-{number}").touch()
            made.append(folder / f"full-{number}")
    return made


def _fill_bytes(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return [folder / "full"]


# --- exports


def test_an_export_is_told_before_its_first_instance_and_counted_after_its_last(opened: Vault) -> None:
    for number in range(5):
        opened.auditor.exporting(UID, "1.2.3")
        assert opened.types() == ["export-begun"], number
    opened.auditor.exporting(UID, "1.2.4")
    opened.auditor.exporting(UID + 1, "1.2.3")
    opened.auditor.flush()
    assert "exported" not in opened.types()
    opened.auditor.flush(everything=True)
    found = {(r["uid"], r["study"]): r["instances"] for r in opened.records() if r["type"] == "exported"}
    assert found == {(UID, "1.2.3"): 5, (UID, "1.2.4"): 1, (UID + 1, "1.2.3"): 1}


def test_locking_counts_what_is_being_exported(opened: Vault) -> None:
    opened.auditor.exporting(UID, "1.2.3")
    opened.auditor.locked(uid=UID)
    assert opened.types() == ["export-begun", "exported", "locked"]


def test_an_export_that_cannot_be_recorded_is_refused_each_time(opened: Vault) -> None:
    opened.auditor.record("verify")
    damage(opened, longer=True)
    for _ in range(2):
        with pytest.raises(StrongroomError, match="not done"):
            opened.auditor.exporting(UID, "1.2.3")


# --- the gate's events


def test_events_wait_while_locked_and_are_taken_once_unlocked(vault: Vault) -> None:
    path = vault.deposit(begun())
    vault.take()
    assert vault.waiting() == [path]
    vault.unlock()
    vault.take()
    assert vault.waiting() == []
    assert vault.events() == [begun()]


def test_events_in_another_order_of_keys_and_with_unknown_ones_are_recorded_as_they_are(opened: Vault) -> None:
    event = {
        "type": "association-ended",
        "time": TIME,
        "stored": 3,
        "studies": {"1.2.3": 3},
        "new": ["a", "b"],
        "x": None,
    }
    opened.deposit(event)
    opened.take()
    assert opened.events() == [event]


def test_a_kill_between_record_and_removal_records_events_once(opened: Vault) -> None:
    path = opened.deposit(begun())
    content = path.read_bytes()
    opened.take()
    # As it was before the file was removed and the ledger was told.
    path.write_bytes(content)
    ledger = opened.ledger()
    ledger.set_audit_head(Head(0, b"", 0))
    ledger.close()
    opened.killed().unlock()
    opened.take()
    assert opened.waiting() == []
    assert len(opened.events()) == 1


def test_a_refused_file_that_a_kill_left_is_told_once(opened: Vault) -> None:
    path = opened.incoming / ("ab" * 16 + events.SUFFIX)
    path.write_bytes(b"junk")
    opened.take()
    path.write_bytes(b"junk")
    ledger = opened.ledger()
    ledger.set_audit_head(Head(0, b"", 0))
    ledger.close()
    opened.killed().unlock()
    opened.take()
    assert opened.waiting() == []
    assert opened.types() == ["events-refused"]


def test_what_cannot_be_recorded_waits_and_is_whole_afterwards(opened: Vault, caplog: pytest.LogCaptureFixture) -> None:
    opened.deposit({"time": TIME, "type": "peers-read", "peers": {"CT1.toml": "00"}})
    opened.take()
    opened.deposit({"time": TIME, "type": "peers-read", "peers": {"CT1.toml": "11"}})
    path = sorted(opened.chain.glob("*.log"))[-1]
    whole = path.read_bytes()
    path.write_bytes(whole + b"x\n")
    caplog.clear()
    for _ in range(5):
        opened.take()
        assert len(opened.waiting()) == 1
    assert len([r for r in caplog.records if "wait" in r.message]) == 1
    path.write_bytes(whole)
    opened.take()
    assert opened.waiting() == []
    assert [(e["type"], e.get("files")) for e in opened.events()] == [
        ("peers-read", None),
        ("peers-changed", {"CT1.toml": "11"}),
    ]


def test_of_peer_files_all_are_recorded_at_first_and_then_what_changed(opened: Vault) -> None:
    steps = [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "3", "b": "2"}, {"a": "3"}, {"a": "3", "c": "4"}]
    for peers in steps:
        opened.deposit({"time": TIME, "type": "peers-read", "peers": peers})
        opened.take()
    assert [e.get("files", e.get("peers")) for e in opened.events()] == [steps[0], {"a": "3"}, {"b": None}, {"c": "4"}]


class _Full(Ledger):
    """A ledger on a disk that is full."""

    def __init__(self, ledger: Ledger) -> None:
        self._db = ledger._db

    def used(self, uses: list[CertificateUse]) -> None:
        raise DatabaseError("database or disk is full")


def test_a_ledger_that_refuses_does_not_record_events_again_and_again(vault: Vault) -> None:
    vault.auditor.unlocked(vault.ring, _Full(vault.ledger()))
    vault.deposit(begun(certificate="ab"))
    for _ in range(3):
        vault.take()
    assert vault.waiting() == []
    assert len(vault.events()) == 1


def test_when_a_certificate_was_used_is_known_and_an_older_event_changes_nothing(opened: Vault) -> None:
    for time in ("2026-01-31", "2026-03-31", "2026-02-28"):
        opened.deposit(begun(certificate="ab", time=time))
        opened.take()
    assert [(use.certificate, use.last) for use in opened.auditor.certificate_uses()] == [("ab", "2026-03-31")]


def test_many_waiting_files_hold_up_nobody_for_long(opened: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storescp.vault.gateevents._TAKE_SECONDS", 0.0)
    for _ in range(5):
        opened.deposit(begun())
    for left in (4, 3, 2, 1, 0):
        opened.take()
        assert len(opened.waiting()) == left
    assert len(opened.events()) == 5


def test_requests_of_commitment_for_which_there_is_no_room_are_recorded_as_dropped(
    opened: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storescp.vault.commitmentrecords._MOST", 10)
    asked = {"part": 0, "parts": 1, "instances": ["1.2.840.10008.5.1.4.1.1.2 1.2"], "calling": "CT1"}
    found = [{"time": TIME, "type": "commitment-requested", "transaction": f"1.2.{n}", **asked} for n in range(4)]
    opened.deposit(*found)
    opened.take()
    assert opened.waiting() == []
    assert [r["peer"] for r in opened.records() if r["type"] == "commitment-dropped"] == ["CT1"]
    assert [one.id for one in records_of(opened.ledger()).all()] == ["CT1/1.2.0", "CT1/1.2.1"]


# --- a gate that lies

LIES: dict[str, bytes] = {
    "no json": b"\xff\xfe{",
    "half a document": b'[{"time":"',
    "a word": b"null",
    "an object": b"{}",
    "a list of numbers": b"[1,2,3]",
    "a list of lists": b"[[]]",
    "no time": b'[{"type":"x"}]',
    "no type": b'[{"time":"x"}]',
    "a number for a type": b'[{"time":"x","type":1}]',
    "other peers": b'[{"time":"x","type":"peers-read","peers":{"a":1}}]',
    "deep lists": b'[{"time":"x","type":"x","a":' + b"[" * 900 + b"]" * 900 + b"}]",
    "deeper lists": b"[" * 90_000,
    "deep objects": b'[{"time":"x","type":"x","a":' + b'{"a":' * 900 + b"1" + b"}" * 901 + b"]",
    "numbers that grow": b'[{"time":"x","type":"x","a":[' + b",".join([b"1e15"] * 30_000) + b"]}]",
    "a long number": b'[{"time":"x","type":"x","a":' + b"1" * 10_000 + b"}]",
    "an endless number": b'[{"time":"x","type":"x","a":1e400}]',
    "half a character": b'[{"time":"x","type":"x","a":"\\ud800\\u0041"}]',
    "control characters": b'[{"time":"x","type":"x","a":"' + b"\x01" * 100_000 + b'"}]',
    "not UTF-8": b'[{"time":"x","type":"x","a":"\xc3"}]',
    "more than a record holds": b'[{"time":"x","type":"x","a":"' + b"\x7f" * (events.CONTENT_LIMIT + 8192) + b'"}]',
}


@pytest.mark.parametrize("what", LIES)
def test_what_is_no_event_is_told_and_removed_and_the_next_file_is_taken(opened: Vault, what: str) -> None:
    os.utime(opened.deposit_raw(LIES[what]), (0, 0))
    opened.deposit(begun())
    opened.take()
    assert opened.waiting() == []
    found = [r for r in opened.records() if r["type"] == "events-refused"]
    lies = [event for event in opened.events() if event != begun()]
    # Either it is told as refused, or it is small and flat, and in the chain as it is.
    assert len(found) + (1 if lies else 0) == 1, what
    assert begun() in opened.events()
    assert opened.verified().fault == ""
    opened.killed().unlock()
    opened.auditor.record("verify")
    assert opened.types()[-1] == "verify"


def _header(vault: Vault, change: Callable[[bytes], bytes], name: bytes = b"\x01" * 16) -> None:
    key = new_key()
    header = pack.Header(vault.ring.store_id, name, 1, vault.keys.current().wrap(key, name), pack.EVENTS)
    sealed = seal(b"[]", key, context("event", header.bound(), bytes(16)))
    nothing = seal(b"{}", key, context("attributes", header.bound(), bytes(16)))
    frame = pack.Frame(pack.PAGE, bytes(16), len(sealed), len(nothing))
    content = change(header.encode()) + frame.encode() + sealed + nothing
    (vault.incoming / (name.hex() + events.SUFFIX)).write_bytes(content)


HOSTILE: dict[str, Callable[[Vault], object]] = {
    "10 MB": lambda v: (v.incoming / "big.events").write_bytes(bytes(10_000_000)),
    "nothing": lambda v: (v.incoming / "empty.events").touch(),
    "a pipe": lambda v: os.mkfifo(v.incoming / "pipe.events"),
    "a link to a file": lambda v: (v.incoming / "link.events").symlink_to(v.config.keyring),
    "a link to nothing": lambda v: (v.incoming / "link.events").symlink_to("nothing"),
    "a link to events": lambda v: (v.incoming / "link.events").symlink_to(v.deposit(begun())),
    "a socket": lambda v: _bind(v.incoming),
    "a copy under another name": lambda v: (v.incoming / "copy.events").write_bytes(v.deposit(begun()).read_bytes()),
    "flags of a study": lambda v: _header(v, lambda raw: raw[:15] + b"\0" + raw[16:]),
    "a version that never was": lambda v: _header(v, lambda raw: raw[:64] + b"\0\0\0\7" + raw[68:]),
    "another store": lambda v: _header(v, lambda raw: raw[:16] + bytes(16) + raw[32:]),
    "another user's file": lambda v: os.chown(v.deposit(begun()), 12345, 12345),
    "a name that is no text": lambda v: Path(os.fsdecode(os.fsencode(v.incoming) + b"/\xff\xfe.events")).touch(),
    "a name with a line's end": lambda v: (v.incoming / "a\nb\x1b[2J.events").touch(),
    "a long name": lambda v: (v.incoming / ("x" * 240 + ".events")).touch(),
    "no name": lambda v: (v.incoming / ".events").touch(),
}


def _bind(incoming: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(incoming):
        bound.bind("socket.events")


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_told_once_and_removed_and_the_next_is_taken(
    opened: Vault, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "another user's file" and os.geteuid() != 0:
        pytest.skip("NOT TESTED: this needs root")
    HOSTILE[what](opened)
    good = begun(calling="GOOD")
    opened.deposit(good)
    kept = opened.config.keyring.read_bytes()
    for _ in range(3):
        opened.take()
    assert opened.waiting() == []
    assert [record["type"] for record in opened.records() if record["type"] == "events-refused"] == ["events-refused"]
    assert good in opened.events()
    assert len([r for r in caplog.records if "refused" in r.message]) == 1
    assert opened.config.keyring.read_bytes() == kept


def test_a_folder_stays_is_told_once_and_holds_up_nothing(opened: Vault, caplog: pytest.LogCaptureFixture) -> None:
    folder = opened.incoming / "folder.events"
    folder.mkdir()
    (folder / "x").touch()
    # The oldest first: within a tick of the clock, chance decides by the name.
    os.utime(folder, (0, 0))
    for number in range(3):
        opened.deposit(begun(number=number))
        opened.take()
    assert opened.waiting() == [folder]
    assert opened.types() == ["events-refused", "gate-events", "gate-events", "gate-events"]
    assert len(caplog.records) == 1


def test_certificates_and_times_that_a_gate_makes_up_are_kept_short(opened: Vault) -> None:
    opened.deposit(begun(certificate="c" * 50_000, calling="t" * 50_000, time="9" * 50_000))
    opened.take()
    [use] = opened.auditor.certificate_uses()
    assert {len(use.certificate), len(use.title), len(use.last)} == {128}


def test_numbers_of_records_count_on_without_a_gap_over_restarts(opened: Vault) -> None:
    for round_ in range(4):
        opened.auditor.record("verify")
        opened.deposit(begun(number=round_))
        opened.take()
        opened.auditor.close()
        opened.auditor = Auditor(opened.config)
        opened.auditor.record("vault-started")
        opened.unlock()
    numbers = [record["number"] for record in opened.records()]
    assert numbers == list(itertools.islice(itertools.count(1), len(numbers)))
    assert opened.verified().head.number == len(numbers)
    assert len(opened.events()) == 4
