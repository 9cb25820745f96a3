"""A worker's events: collected, counted, bounded, and kept while the disk refuses them."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.versions import Version, store_id_of
from storage import events
from storage.deposit import PublishedKeys
from storescp.gate.journal import Journal, studies

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
STORE = store_id_of(PUBLIC)
VERSION = Version(STORE, 1, bytes(range(32, 64)))
LIMIT = 2000


class Gate:
    """A journal and the folders around it."""

    def __init__(self, home: Path) -> None:
        self.incoming = home / "incoming"
        self.public = home / "public"
        self.trace = home / "peer-test"
        self.incoming.mkdir()
        self.public.mkdir()
        self.publish()
        self.journal = Journal(self.incoming, STORE, PublishedKeys(self.public, PUBLIC), self.trace)

    def publish(self) -> None:
        (self.public / "deposit-1.key").write_bytes(VERSION.deposit_key().signed_file(SIGNING, "2026-01-31T12:00:00Z"))

    def break_disk(self) -> None:
        """Let nothing be deposited: incoming is a file."""
        self.incoming.rename(self.incoming.with_name("kept"))
        self.incoming.write_bytes(b"")

    def mend_disk(self) -> None:
        self.incoming.unlink()
        self.incoming.with_name("kept").rename(self.incoming)

    def files(self) -> list[list[dict[str, Any]]]:
        """Return the events of each file, the oldest first; remove them."""
        found = []
        for path in events.found(self.incoming):
            found.append(json.loads(events.read(path, STORE, lambda _: VERSION, os.geteuid())))
            path.unlink()
        return found

    def written(self) -> list[dict[str, Any]]:
        """Flush and return the events that were written; files of one moment are found in any order."""
        self.journal.flush()
        found = [event for file in self.files() for event in file]
        return sorted(found, key=lambda event: event.get("number", 0))


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path)
    yield made
    made.journal._socket.close()


def test_events_that_collect_go_in_one_file_and_in_order(gate: Gate) -> None:
    for number in range(10):
        gate.journal.event("association-begun", number=number)
    gate.journal.flush()
    [found] = gate.files()
    assert [(event["type"], event["number"]) for event in found] == [("association-begun", n) for n in range(10)]
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)


def test_nothing_is_written_where_nothing_happened(gate: Gate) -> None:
    gate.journal.flush()
    assert list(gate.incoming.iterdir()) == []


def test_refusals_alike_are_one_event_with_a_count(gate: Gate) -> None:
    for port in range(500):
        gate.journal.refused(f"192.0.2.1:{1024 + port}", "no such peer", "CT9")
    gate.journal.refused("192.0.2.1:1", "no such peer", "CT8")
    gate.journal.refused("192.0.2.1:1", "another reason", "CT9")
    gate.journal.refused("192.0.2.2:1", "no such peer", "CT9", count=40)
    gate.journal.refused("192.0.2.2:9", "no such peer", "CT9", count=2)
    found = gate.written()
    assert [(e["address"], e["reason"], e["calling"], e["count"]) for e in found] == [
        ("192.0.2.1", "no such peer", "CT9", 500),
        ("192.0.2.1", "no such peer", "CT8", 1),
        ("192.0.2.1", "another reason", "CT9", 1),
        ("192.0.2.2", "no such peer", "CT9", 42),
    ]
    assert found[0]["last"] > found[0]["time"]
    gate.journal.refused("192.0.2.1:1", "no such peer", "CT9")
    assert [event["count"] for event in gate.written()] == [1]


def test_a_flood_is_bounded_and_what_is_too_much_is_counted(gate: Gate) -> None:
    for number in range(5 * LIMIT):
        gate.journal.event("association-begun", number=number)
    assert len(gate.journal._waiting) == LIMIT
    found = gate.written()
    assert len(found) == LIMIT + 1
    assert [event["count"] for event in found if event["type"] == "events-dropped"] == [4 * LIMIT]
    assert gate.written() == []


def test_refusals_under_ever_new_names_become_one_event_with_a_count(gate: Gate) -> None:
    for number in range(5 * LIMIT):
        gate.journal.refused(f"192.0.2.1:{number}", "no such peer", f"CT{number}")
    # What is known already still counts.
    gate.journal.refused("192.0.2.1:1", "no such peer", "CT0")
    found = gate.written()
    assert len(found) == 201
    assert [event["count"] for event in found if event.get("calling") == "CT0"] == [2]
    assert [event["count"] for event in found if event["reason"].startswith("many")] == [5 * LIMIT - 200]


def test_a_file_is_never_larger_than_a_vault_takes(gate: Gate) -> None:
    stored = studies({f"1.2.840.{number:050}": 1 for number in range(1000)})
    assert len(stored) == 200
    for _ in range(100):
        gate.journal.event("association-ended", studies=stored)
    gate.journal.flush()
    found = gate.files()
    assert sum(map(len, found)) == 100
    assert 5 < len(found) < 20


def test_a_disk_that_refuses_loses_nothing_up_to_the_limit(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    gate.break_disk()
    for number in range(300):
        gate.journal.event("association-begun", number=number)
        if number % 100 == 0:
            gate.journal.flush()
    gate.mend_disk()
    assert [event["number"] for event in gate.written()] == list(range(300))
    # Said once, not at every try.
    assert len([record for record in caplog.records if "wait in memory" in record.message]) == 1


def test_what_is_dropped_while_the_disk_refuses_is_counted_over_all_tries(gate: Gate) -> None:
    gate.break_disk()
    for number in range(1, LIMIT + 501):
        gate.journal.event("association-begun", number=number)
    for _ in range(4):
        gate.journal.flush()
        assert len(gate.journal._waiting) == LIMIT
    for _ in range(100):
        gate.journal.event("association-begun", number=-1)
    gate.journal.flush()
    gate.mend_disk()
    found = gate.written()
    assert [event["number"] for event in found[1:]] == list(range(1, LIMIT + 1))
    assert (found[0]["type"], found[0]["count"]) == ("events-dropped", 600)
    assert gate.written() == []


def test_the_same_refusal_stays_one_event_while_the_disk_refuses(gate: Gate) -> None:
    gate.break_disk()
    for _ in range(20):
        gate.journal.refused("192.0.2.1:1", "no such peer", "CT9")
        gate.journal.flush()
    gate.mend_disk()
    assert [event["count"] for event in gate.written()] == [20]


def test_events_wait_for_a_usable_deposit_key(gate: Gate) -> None:
    (gate.public / "deposit-1.key").unlink()
    gate.journal.event("association-begun")
    gate.journal.flush()
    assert list(gate.incoming.iterdir()) == []
    gate.publish()
    assert len(gate.written()) == 1


def test_no_count_is_lost_between_threads_and_a_flush(gate: Gate) -> None:
    each, threads = 3000, 4
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def refuse() -> None:
        for number in range(each):
            gate.journal.refused("192.0.2.1:1", "no such peer", f"CT{number // 2}")

    running = [threading.Thread(target=refuse) for _ in range(threads)]
    try:
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            gate.journal.flush()
    finally:
        for thread in running:
            thread.join()
        sys.setswitchinterval(interval)
    assert sum(event["count"] for event in gate.written()) == each * threads


def test_a_step_reaches_a_test_that_listens_and_never_waits_for_one(gate: Gate) -> None:
    gate.journal.step(1, "connected")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(gate.trace))
        gate.journal.step(2, "requested", calling="CT1")
        assert json.loads(listening.recv(4096)) == {"connection": 2, "step": "requested", "calling": "CT1"}
        # Nobody reads: its queue fills, and the gate goes on.
        for _ in range(2000):
            gate.journal.step(3, "connected")
    gate.journal.step(4, "connected")
