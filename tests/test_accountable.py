"""Who did what, and the proof of it: the audit chain of a real server, asked and checked through the command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scu
from conftest import Server, changed, find_command, send
from pydicom.data import get_testdata_file
from scu import raw_data_set
from users import GATE, VAULT, being, open_folder

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
PASSPHRASE = "copper lantern fjord mistake"
ALL = os.environ.get("STRONGROOM_CRASH") == "all"
SECONDS = 30

Record = dict[str, Any]


def show(server: Server, *options: str | Path) -> list[Record]:
    """Return what ``audit show --json`` says."""
    done = server.run("audit", "show", "--json", *options)
    assert done.status in {0, 5}, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def of_type(server: Server, kind: str) -> list[Record]:
    return show(server, "--type", kind)


def events(server: Server, kind: str) -> list[Record]:
    """Return the gate's events of a type, the first first."""
    return [e for record in of_type(server, "gate-events") for e in record["events"] if e["type"] == kind]


def until(what: Callable[[], Any], saying: str) -> Any:
    """Wait for what a gate tells some seconds late, or a loop does in its next turn; return it."""
    deadline = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, saying
        time.sleep(0.1)
    return found


def wait_event(server: Server, kind: str, count: int = 1) -> list[Record]:
    return list(until(lambda: e if len(e := events(server, kind)) >= count else None, f"no event {kind}"))


def verified(server: Server, *options: str | Path) -> tuple[int, Record]:
    """Return exit status and document of ``audit verify --json``."""
    done = server.run("audit", "verify", "--json", *options)
    return done.status, json.loads(done.out) if done.out else {}


def whole(server: Server) -> int:
    """Assert that the chain is whole; return how many records it has."""
    status, found = verified(server)
    assert (status, found["whole"], found["fault"]) == (0, True, ""), found
    return int(found["head"]["number"])


def chain(server: Server) -> Path:
    return server.store / "audit"


def last_file(server: Server) -> Path:
    return sorted(chain(server).glob("*.log"))[-1]


def cut(server: Server, number: int) -> None:
    """Cut a chain behind a record."""
    path = last_file(server)
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(line for line in lines if int(line.split()[1]) <= number))


def refused(server: Server, title: str = "CT9", called: str = "STRONGROOM") -> None:
    """Request an association that is refused."""
    context = scu.tls(server.home / "issued" / "CT1")
    contexts = [scu.read(CT).context]
    assert scu.request(server.port, context, contexts, calling=title, called=called).is_rejected


@pytest.fixture
def locked(make_server: Callable[[], Server]) -> Server:
    """A store with a peer, CT1, that opens with a passphrase alone, served, and locked."""
    server = make_server()
    (server.home / "passphrase").write_text(PASSPHRASE + "\n")
    server.ok("init", "--with-pki", "--passphrase-file", server.home / "passphrase", "--listen", "127.0.0.1:0")
    server.set("gate", pack_idle_seconds=1, workers=1)
    server.start()
    unlock(server)
    server.add_peer("CT1")
    server.wait_log("1 peers")
    server.ok("lock")
    return server


def unlock(server: Server) -> None:
    server.ok("unlock", "--passphrase-file", server.home / "passphrase")


# --- what is recorded


def test_who_connected_and_what_was_stored_is_recorded_with_studies_and_counts(server: Server, tmp_path: Path) -> None:
    items = [scu.read(CT), scu.read(changed(CT, tmp_path, SOPInstanceUID="1.2.3.4"))]
    context = scu.tls(server.home / "issued" / "CT1")
    with scu.associated(server.port, context, [items[0].context]) as association:
        assert [scu.store(association, item).Status for item in items] == [0, 0]
    [ended] = wait_event(server, "association-ended")
    [begun] = events(server, "association-begun")
    assert (ended["calling"], ended["stored"], ended["refused"]) == ("CT1", 2, 0)
    assert ended["studies"] == {items[0].study: 2}
    assert ended["bytes"] > 0
    assert begun["association"] == ended["association"]
    assert begun["address"].startswith("127.0.0.1:")
    assert begun["certificate"] == ended["certificate"]
    [peer] = server.ok("peer", "list", "--json").json()["items"]
    assert peer["bound"][0]["last_used"] == begun["time"]


def test_many_refusals_alike_are_one_event_with_a_count_and_the_reason(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.set("gate", workers=1)
    server.add_peer("CT1")
    server.start()
    for _ in range(20):
        refused(server)
    refused(server, title="CT1", called="ELSEWHERE")
    until(lambda: sum(e["count"] for e in events(server, "connection-refused")) == 21, "not every refusal is counted")
    found = events(server, "connection-refused")
    # The journal may have been written once or twice in between.
    assert len(found) <= 4
    reasons = Counter((e["calling"], e["address"]) for e in found)
    assert set(reasons) == {("CT9", "127.0.0.1"), ("CT1", "127.0.0.1")}
    [wrong_called] = [e for e in found if e["calling"] == "CT1"]
    assert "called AE title" in wrong_called["reason"]
    assert whole(server)


def test_what_the_gates_first_process_turned_away_is_recorded_too(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.set("gate", maximum_per_address=2, request_seconds=60)
    server.start()
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), SECONDS))
        for _ in range(7):
            with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock, contextlib.suppress(OSError):
                assert sock.recv(1) == b""

        def counted() -> int:
            found = events(server, "connection-refused")
            return sum(e["count"] for e in found if "one address" in e["reason"] and e["address"] == "127.0.0.1")

        until(lambda: counted() == 7, "what was turned away is not in the chain")


def test_who_unlocked_how_and_who_failed_and_who_locked_is_recorded(server: Server, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("no passphrase of this store")
    server.ok("lock")
    for _ in range(2):
        assert server.run("unlock", "--passphrase-file", wrong).status == 4
    server.ok("unlock", "--key-file", server.home / "store.key")
    uid = os.geteuid()
    # The first is of the vault that a command started for itself.
    _, by_itself, asked = of_type(server, "unlocked")
    assert ("uid" in by_itself, by_itself["by"]) == (False, "KeyFile")
    assert (asked["uid"], asked["by"]) == (uid, "KeyFile")
    assert [(r["uid"], r["in_a_row"]) for r in of_type(server, "unlock-refused")] == [(uid, 1), (uid, 2)]
    # The first is of that vault, too, which nobody asked to lock.
    assert [r.get("uid") for r in of_type(server, "locked")] == [None, uid]
    copies = [r["record"]["type"] for r in of_type(server, "transcript")]
    assert copies == ["unlock-refused", "unlock-refused"]


def test_an_unlock_by_passphrase_is_recorded_as_such_and_its_words_nowhere(locked: Server) -> None:
    unlock(locked)
    assert [record["by"] for record in of_type(locked, "unlocked")] == ["Passphrase", "Passphrase"]
    assert PASSPHRASE not in json.dumps(show(locked))


def test_peers_that_the_command_line_or_an_editor_changed_are_recorded(server: Server) -> None:
    server.add_peer("MR2")
    server.ok("peer", "renew", "MR2", "--issue", server.home / "issued" / "new")
    server.ok("peer", "renew", "MR2", "--finish", "--force")
    server.ok("peer", "remove", "MR2")
    found = [(r["type"], r["peer"], r["uid"]) for r in show(server) if r["type"].startswith(("peer-", "certificate-"))]
    uid = os.geteuid()
    assert found[-6:] == [
        ("certificate-issued", "MR2", uid),
        ("peer-added", "MR2", uid),
        ("certificate-issued", "MR2", uid),
        ("peer-renewing", "MR2", uid),
        ("peer-renewed", "MR2", uid),
        ("peer-removed", "MR2", uid),
    ]
    file = server.peers / "CT1.toml"
    file.write_text(file.read_text() + "\n# by hand\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def by_hand() -> bool:
        return any(e["files"].get("CT1.toml") == digest for e in events(server, "peers-changed"))

    until(by_hand, "an edited peer file is not in the chain")
    [first, *_] = events(server, "peers-read")
    assert first["peers"].keys() == {"CT1.toml"}
    assert first["peers"]["CT1.toml"] != digest
    file.unlink()
    until(
        lambda: any(e["files"] == {"CT1.toml": None} for e in events(server, "peers-changed")),
        "a removed peer file is not in the chain",
    )


def test_a_vault_that_starts_says_its_release_and_the_digest_of_its_configuration(server: Server) -> None:
    from storescp import __version__

    digests = [hashlib.sha256(server.config.read_bytes()).hexdigest()]
    server.stop()
    server.set("gate", idle_seconds=77)
    digests.append(hashlib.sha256(server.config.read_bytes()).hexdigest())
    server.start()
    assert digests[0] != digests[1]
    started = of_type(server, "vault-started")
    assert [record["configuration"] for record in started] == digests
    assert {record["release"] for record in started} == {__version__}
    assert len(of_type(server, "vault-stopped")) == 1


def test_questions_exports_checks_decisions_and_readings_are_recorded(server: Server, tmp_path: Path) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [changed(CT, tmp_path, SliceLocation="77.5"), MR]) == [0, 0]
    server.wait_admitted()
    assert len(server.list("instance", "--patient-id", "1CT1")) == 1
    server.ok("export", "--all", "--to", server.home / "out")
    assert server.ok("verify").status == 0
    server.ok("reindex")
    [item] = server.ok("quarantine", "list", "--json").json()["items"]
    server.ok("quarantine", "resolve", item["id"], "--discard", "--reason", "sent twice")
    show(server, "--after", "3", "--type", "locked")
    # Locking says what an export came to.
    server.ok("lock")
    server.ok("unlock", "--key-file", server.home / "store.key")
    found: dict[str, list[Record]] = {}
    for record in show(server):
        found.setdefault(record["type"], []).append(record)
    uid = os.geteuid()
    assert any(r["level"] == "instance" and "1CT1" in json.dumps(r["filters"]) for r in found["query"])
    assert any(r["level"] == "quarantine" for r in found["query"])
    studies = {scu.read(file).study for file in (CT, MR)}
    assert {r["study"] for r in found["export-begun"]} == studies
    assert {(r["study"], r["instances"]) for r in found["exported"]} == {(study, 1) for study in studies}
    assert max(r["number"] for r in found["export-begun"]) < min(r["number"] for r in found["exported"])
    assert [r["uid"] for r in (*found["verify"], *found["reindex"])] == [uid, uid]
    [decided] = found["quarantine-resolved"]
    assert (decided["decision"], decided["reason"], decided["pack"]) == ("discard", "sent twice", item["pack"])
    assert any((r["after"], r["types"]) == (3, ["locked"]) for r in found["audit-read"])
    assert {r.get("uid") for kind in ("query", "export-begun", "exported", "audit-read") for r in found[kind]} == {uid}


def test_show_chooses_by_number_type_and_time_and_hides_no_line_ends(server: Server) -> None:
    everything = show(server)
    assert [r["number"] for r in everything] == list(range(1, len(everything) + 1))
    assert [r["time"] for r in everything] == sorted(r["time"] for r in everything)
    assert next(r["number"] for r in show(server, "--after", "2")) == 3
    assert server.run("audit", "show", "--type", "unlock-refused").status == 5
    assert server.run("audit", "show", "--since", "2999-01-01").status == 5
    text = server.ok("audit", "show", "--type", "vault-started").out
    assert re.fullmatch(r" *\d+  \S+Z vault-started .*\n", text)
    server.ok("lock")
    done = server.run("audit", "show")
    assert (done.status, done.out) == (4, "")


# --- locked


def test_acts_while_locked_are_sealed_to_the_deposit_key_and_copied_after_unlock(locked: Server) -> None:
    before = whole(locked)
    locked.ok("peer", "remove", "CT1")
    status, found = verified(locked)
    assert (status, found["unsigned"], found["head"]["number"]) == (0, 1, before + 1)
    assert b" deposit-1 " in last_file(locked).read_bytes().splitlines()[-1]
    unlock(locked)
    assert verified(locked)[1]["unsigned"] == 0
    [removed] = of_type(locked, "peer-removed")
    copies = of_type(locked, "transcript")
    [copy] = [record for record in copies if record["of"] == removed["number"]]
    assert copy["record"] == {key: value for key, value in removed.items() if key != "number"}
    lines = last_file(locked).read_bytes().splitlines()
    assert any(line.startswith(b"R %d audit " % copy["number"]) for line in lines)
    locked.ok("lock")
    unlock(locked)
    assert of_type(locked, "transcript") == copies


def test_the_gates_events_wait_while_locked_and_are_taken_after_unlock(locked: Server) -> None:
    before = whole(locked)
    assert send(locked, [CT]) == [0]
    until(lambda: len(list(locked.incoming.glob("*.events"))), "the gate wrote no events")
    assert whole(locked) == before
    unlock(locked)
    [ended] = wait_event(locked, "association-ended")
    assert ended["studies"] == {scu.read(CT).study: 1}
    until(lambda: not list(locked.incoming.glob("*.events")), "events stay in incoming")
    assert whole(locked)


# --- kill -9


@pytest.mark.needs("strace")
@pytest.mark.timeout(400)
def test_a_vault_killed_before_any_step_of_taking_events_records_them_once(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.set("gate", workers=1)
    server.add_peer("CT1")
    server.start("gate")
    refused(server)
    server.stop()
    assert len(list(server.incoming.glob("*.events"))) >= 1
    count = sum(e["count"] for e in _taken(server, make=True) if e["type"] == "connection-refused")
    assert count == 1
    calls = "write,fdatasync,fsync,unlink,pwrite64"
    _restore(server)
    _killed(server, calls, 0)
    lines = re.findall(r"^(\d+) +(\w+)\(", (server.home / "trace").read_text(), re.MULTILINE)
    (main, _), *_ = Counter(pid for pid, _ in lines).most_common(1)
    made = Counter(call for pid, call in lines if pid == main)
    points = [(call, when) for call, many in sorted(made.items()) for when in range(1, many + 1)]
    if not ALL:
        others = [point for point in points if point[0] != "unlink"]
        points = [p for p in points if p[0] == "unlink"] + random.Random("events").sample(others, 5)
    for call, when in points:
        _restore(server)
        _killed(server, call, when)
        found = _taken(server)
        assert [e["count"] for e in found if e["type"] == "connection-refused"] == [1], (call, when)
        assert len([e for e in found if e["type"] == "peers-read"]) == 1, (call, when)
        server.stop()


def _taken(server: Server, *, make: bool = False) -> list[Record]:
    """Start a vault, wait until it took everything, and return the gate's events."""
    if make:
        for name in ("store", "spool"):
            shutil.copytree(server.home / name, server.home / "prepared" / name)
    server.start("vault")
    until(lambda: server.config.parent.joinpath("run", "vault.sock").exists(), "the vault does not listen")
    until(lambda: not list(server.incoming.glob("*.events")), "events stay in incoming")
    found = [e for record in of_type(server, "gate-events") for e in record["events"]]
    assert whole(server)
    server.stop()
    return found


def _restore(server: Server) -> None:
    for name in ("store", "spool"):
        shutil.rmtree(server.home / name)
        shutil.copytree(server.home / "prepared" / name, server.home / name)


def _killed(server: Server, calls: str, when: int) -> None:
    """Run a vault that dies before the ``when``-th of a system call; never for 0."""
    command = [str(find_command("strace")), "-f", "-qq", "-o", str(server.home / "trace"), "-e", f"trace={calls}"]
    if when:
        command += ["-e", f"inject={calls}:signal=SIGKILL:when={when}"]
    command += [sys.executable, "-m", "storescp", "--config", str(server.config), "vault"]
    process = server.start_command(command, "vault")
    deadline = time.monotonic() + 60
    while process.poll() is None and list(server.incoming.glob("*.events")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.stop(signal.SIGKILL)
    server.kill_all()


# --- what cannot be recorded is not done


@pytest.fixture
def full(make_server: Callable[[], Server]) -> Iterator[Server]:
    """A store with a peer, CT1, and an instance, whose chain is on a small disk of its own; served."""
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.set("gate", pack_idle_seconds=1)
    kept = server.home / "kept"
    chain(server).rename(kept)
    chain(server).mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(chain(server))]
    subprocess.run(mount, check=True)
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", str(chain(server))], check=True)
        server.start()
        assert send(server, [CT]) == [0]
        server.wait_admitted()
        yield server
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()
        subprocess.run(["umount", "-l", str(chain(server))], check=True)


def fill(server: Server) -> Path:
    """Leave no byte on the chain's disk: a file's last page may have room for some records still."""
    path = chain(server) / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for _ in range(20):
        server.run("audit", "show", "--type", "none")
    return path


def refuses_acts(server: Server) -> None:
    """Assert that nothing is done that an admin asks for, and that it is said why."""
    before = sorted(server.peers.iterdir())
    for arguments in (
        ("peer", "add", "MR9", "--key", "sha256:" + "ab" * 32),
        ("peer", "remove", "CT1"),
        ("list",),
        ("export", "--all", "--to", str(server.home / "refused")),
        ("verify",),
        ("audit", "show"),
        ("quarantine", "list"),
    ):
        done = server.run(*arguments)
        assert done.status in {1, 4}, (arguments, done.out)
        assert done.status == 4 or "not done" in done.err, (arguments, done.err)
    assert sorted(server.peers.iterdir()) == before
    assert list((server.home / "refused").rglob("*.dcm")) == []


@pytest.mark.needs_root
def test_on_a_full_disk_no_act_is_done_and_receiving_admission_and_locking_go_on(full: Server) -> None:
    filler = fill(full)
    refuses_acts(full)
    assert any("nothing can be recorded" in warning for warning in full.status()["warnings"])
    assert send(full, [MR]) == [0]
    full.wait_admitted()
    assert full.status()["counts"]["instances"] == 2
    full.ok("lock")
    assert full.status()["locked"]
    done = full.run("unlock", "--key-file", full.home / "store.key")
    assert done.status == 1
    assert "not done" in done.err
    assert full.status()["locked"]
    assert send(full, [CT]) == [0]
    filler.unlink()
    full.ok("unlock", "--key-file", full.home / "store.key")
    full.wait_admitted()
    assert len(full.list()) == 2
    assert not any("nothing can be recorded" in warning for warning in full.status()["warnings"])
    # What the gate saw meanwhile waited for it.
    wait_event(full, "association-ended", 3)
    assert whole(full)


def test_a_vault_that_starts_on_a_changed_chain_does_nothing_until_a_new_one_begins(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    server.stop()
    path = last_file(server)
    lines = path.read_bytes().splitlines(True)
    at = next(i for i, line in enumerate(lines) if line.startswith(b"R 3 "))
    lines[at] = lines[at][:20] + (b"A" if lines[at][20:21] != b"A" else b"B") + lines[at][21:]
    path.write_bytes(b"".join(lines))
    server.start()
    assert any("nothing can be recorded" in line for line in server.log)
    status, found = verified(server)
    assert status == 6
    assert "record 3 " in found["fault"]
    assert send(server, [MR]) == [0]
    refuses_acts(server)
    assert server.run("unlock", "--key-file", server.home / "store.key").status == 1
    assert server.status()["locked"]
    assert any("nothing can be recorded" in warning for warning in server.status()["warnings"])
    server.ok("lock")
    assert server.run("audit", "restart", "--reason", " ").status == 1
    server.ok("audit", "restart", "--reason", "a changed byte")
    server.ok("unlock", "--key-file", server.home / "store.key")
    assert len(server.list()) == 2
    server.add_peer("MR9")
    assert whole(server)
    first = show(server)[0]
    assert (first["type"], first["reason"], first["uid"]) == ("audit-restarted", "a changed byte", os.geteuid())
    assert "record 3 " in first["fault"]
    [aside] = server.store.glob("audit-2*")
    assert (aside / path.name).read_bytes() == b"".join(lines)
    assert verified(server, "--folder", aside)[0] == 6


def test_a_chain_that_breaks_while_unlocked_stops_acts_and_nothing_else(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    with last_file(server).open("ab") as file:
        file.write(b"R 99 audit AAAA " + b"0" * 64 + b"\n")
    refuses_acts(server)
    assert send(server, [MR]) == [0]
    server.wait_admitted()
    assert server.status()["counts"]["instances"] == 2
    assert verified(server)[0] == 6
    server.ok("audit", "restart", "--reason", "somebody wrote to it")
    assert len(server.list()) == 2
    with last_file(server).open("ab") as file:
        file.write(b"x\n")
    server.ok("lock")
    assert server.status()["locked"]
    assert server.run("unlock", "--key-file", server.home / "store.key").status == 1


# --- proof


@pytest.fixture
def acted(server: Server) -> Server:
    """A server whose chain has some records of every kind, and a head that somebody noted."""
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    wait_event(server, "association-ended")
    assert len(show(server)) > 8
    return server


def test_a_whole_chain_is_whole_running_locked_and_with_no_vault_and_on_a_copy(acted: Server, tmp_path: Path) -> None:
    done = acted.ok("audit", "verify")
    assert re.fullmatch(
        r"(\d+) records in order; head \1:[0-9a-f]{64}\nsigned up to record \1 at \S+Z\nwhole\n", done.out
    )
    shutil.copytree(chain(acted), tmp_path / "copy")
    number = whole(acted)
    assert verified(acted, "--folder", tmp_path / "copy")[1]["head"]["number"] == number
    acted.ok("lock")
    whole(acted)
    acted.stop()
    files = {path: path.read_bytes() for path in chain(acted).iterdir()}
    whole(acted)
    # The socket of a vault that was killed is there, too: none is started, which would write.
    acted.start("vault")
    until((acted.home / "run" / "vault.sock").exists, "the vault does not listen")
    acted.stop(signal.SIGKILL)
    assert (acted.home / "run" / "vault.sock").exists()
    files = {path: path.read_bytes() for path in chain(acted).iterdir()}
    whole(acted)
    assert {path: path.read_bytes() for path in chain(acted).iterdir()} == files


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(True)


def _record(lines: list[bytes], number: int) -> int:
    return next(i for i, line in enumerate(lines) if line.startswith(b"R %d " % number))


CHANGES: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "changed": lambda lines, i: [
        *lines[:i],
        lines[i].replace(b" audit ", b" audio "),
        *lines[i + 1 :],
    ],
    "removed": lambda lines, i: [*lines[:i], *lines[i + 1 :]],
    "inserted": lambda lines, i: [*lines[:i], lines[i - 2], *lines[i:]],
    "reordered": lambda lines, i: [*lines[: i - 2], lines[i], lines[i - 1], lines[i - 2], *lines[i + 1 :]],
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_record_that_is_changed_removed_inserted_or_reordered_is_named(
    acted: Server, tmp_path: Path, what: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(chain(acted), copy)
    [path] = copy.glob("*.log")
    lines = _lines(path)
    at = _record(lines, 5)
    path.write_bytes(b"".join(CHANGES[what](lines, at)))
    assert path.read_bytes() != b"".join(lines)
    done = acted.run("audit", "verify", "--folder", copy)
    assert done.status == 6
    [said] = [line for line in done.out.splitlines() if line.startswith("BROKEN: ")]
    assert re.search(r"record [345]\b", said), said
    assert "whole" not in done.out.splitlines()


def test_what_is_cut_behind_the_running_vaults_back_is_found(acted: Server) -> None:
    number = whole(acted)
    cut(acted, number - 3)
    status, found = verified(acted)
    assert status == 6
    assert f"ends with record {number - 3}" in found["fault"]
    assert found["head"]["number"] == number - 3


def test_what_is_cut_while_nobody_runs_is_told_at_the_next_unlock(acted: Server) -> None:
    acted.stop()
    number = whole(acted)
    cut(acted, number - 4)
    assert whole(acted) == number - 4
    acted.start()
    assert any("somebody changed or cut the chain" in line for line in acted.log)
    [broken] = of_type(acted, "audit-broken")
    assert re.search(r"record \d+ of the audit chain is gone", broken["fault"])
    # It was told, and is a chain again.
    assert whole(acted)
    acted.add_peer("MR2")


def test_a_head_that_was_noted_finds_a_chain_that_was_rewritten(acted: Server) -> None:
    _, found = verified(acted)
    noted = f"{found['head']['number']}:{found['head']['hash']}"
    assert verified(acted, "--head", noted)[0] == 0
    acted.ok("audit", "restart", "--reason", "to forget")
    for _ in range(found["head"]["number"] + 5):
        show(acted)
    assert whole(acted) > found["head"]["number"]
    status, rewritten = verified(acted, "--head", noted)
    assert status == 6
    assert f"record {found['head']['number']} is another" in rewritten["fault"]
    [aside] = acted.store.glob("audit-2*")
    assert verified(acted, "--head", noted, "--folder", aside)[0] == 0
    # Whoever names a head is told of what the vault knows, too.
    early = json.loads(acted.ok("audit", "verify", "--json").out)["head"]["number"]
    cut(acted, early - 2)
    first = next(line for line in _lines(last_file(acted)) if line.startswith(b"R 1 ")).split()
    assert verified(acted, "--head", f"1:{first[4].decode()}")[0] == 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "5:",
        ":" + "ab" * 32,
        "x:" + "ab" * 32,
        "5:" + "ab" * 31,
        "-1:" + "ab" * 32,
        "5:" + "a " * 32,
        "5:" + "zz" * 32,
    ],
)
def test_what_is_no_head_is_a_usage_error(make_server: Callable[[], Server], text: str) -> None:
    server = make_server()
    server.init()
    done = server.run("audit", "verify", f"--head={text}")
    assert done.status == 2
    assert done.out == ""
    assert "no head" in done.err


def test_a_folder_that_is_not_there_or_cannot_be_read_is_no_broken_chain(server: Server, tmp_path: Path) -> None:
    assert verified(server, "--folder", tmp_path / "nothing")[1]["head"]["number"] == 0
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / f"{1:016}.log").mkdir()
    done = server.run("audit", "verify", "--folder", tmp_path / "odd")
    assert done.status == 1
    assert "cannot be read" in done.err


def test_a_check_beside_a_vault_that_writes_never_calls_it_broken(server: Server) -> None:
    writing = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "storescp",
                "--config",
                str(server.config),
                "list",
                "--patient-id",
                "x" * 60_000,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(8)
    ]
    checks = 0
    while any(process.poll() is None for process in writing):
        assert verified(server)[0] == 0
        checks += 1
    assert checks
    assert {process.returncode for process in writing} == {5}
    assert whole(server)


def test_a_restart_loses_nothing(acted: Server) -> None:
    before = show(acted)
    for number in (signal.SIGTERM, signal.SIGKILL):
        count = whole(acted)
        acted.stop(number)
        acted.kill_all()
        assert whole(acted) >= count
        acted.start()
        assert whole(acted) > count
    after = show(acted)
    assert after[: len(before)] == before
    assert [record["number"] for record in after] == list(range(1, len(after) + 1))
    assert len(of_type(acted, "vault-started")) == 3
    # Killed once, with or without time for a last word.
    assert len(of_type(acted, "vault-stopped")) in {1, 2}


# --- secrets, floods, and a gate that lies


def test_no_patient_is_in_names_or_bytes_of_event_files_or_in_logs(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.set("log", level="debug")
    server.add_peer("CT1")
    server.start("gate")
    assert send(server, [CT, MR]) == [0, 0]
    refused(server, title="SECRET^NAME")
    until(lambda: len(list(server.incoming.glob("*.events"))) >= 1, "the gate wrote no events")
    server.stop()
    files = list(server.incoming.glob("*.events"))
    content = b"".join(os.fsencode(path.name) + path.read_bytes() for path in files)
    log = "\n".join(server.log).encode()
    words = [b"CompressedSamples", b"1CT1", b"4MR1"]
    words += [
        getattr(scu.read(file), name).encode() for file in (CT, MR) for name in ("study", "series", "sop_instance")
    ]
    for word in words:
        assert word not in content, word
        assert word not in log, word
    assert b"SECRET" not in content


def test_a_flood_of_refused_connections_is_counted_and_stops_nobody(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.set("gate", workers=1, maximum_per_address=1000, maximum_associations=1000)
    server.add_peer("CT1")
    server.start()
    flood = 300
    for _ in range(flood):
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(OSError):
                while sock.recv(4096):
                    pass
    assert send(server, [CT]) == [0]
    until(lambda: sum(e["count"] for e in events(server, "connection-refused")) == flood, "not all are counted")
    assert len(events(server, "connection-refused")) < 20
    assert whole(server)


@pytest.mark.needs_root
def test_a_disk_that_refuses_events_stops_nobody_from_storing_and_they_come_later(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = make_server()
    server.init()
    server.set("gate", workers=1, pack_idle_seconds=600, spare_bytes=0)
    server.set("store", reserve_bytes=1 << 20)
    folder = server.add_peer("CT1")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=40,mode=0770", "tmpfs", str(server.incoming)]
    subprocess.run(mount, check=True)
    try:
        server.start()
        items = [scu.read(changed(CT, tmp_path, SOPInstanceUID=f"1.2.3.{n}")) for n in range(1, 6)]
        with scu.associated(server.port, scu.tls(folder), [items[0].context]) as association:
            assert scu.store(association, items[0]).Status == 0
            # Not one name more: the pack that is open takes what comes, and no file of events can be made.
            fillers = []
            with contextlib.suppress(OSError):
                for number in range(100):
                    (server.incoming / f"{number}.full").touch()
                    fillers.append(server.incoming / f"{number}.full")
            refused(server)
            server.wait_log("events for the audit chain wait in memory")
            assert [scu.store(association, item).Status for item in items[1:]] == [0] * 4
        assert events(server, "association-ended") == []
        for path in fillers:
            path.unlink(missing_ok=True)
        [ended] = wait_event(server, "association-ended")
        assert ended["stored"] == 5
        [said] = events(server, "connection-refused")
        assert said["count"] == 1
        assert len(server.list()) == 5
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()
        subprocess.run(["umount", "-l", str(server.incoming)], check=True)


@pytest.fixture
def two() -> Iterator[Server]:
    """A server whose gate and vault are two users."""
    with open_folder() as folder:
        server = Server(folder / "s")
        try:
            server.init("--vault-user", VAULT, "--gate-user", GATE)
            server.add_peer("CT1")
            server.set("gate", pack_idle_seconds=1)
            yield server.start()
        finally:
            server.stop(signal.SIGKILL)
            server.kill_all()


@pytest.mark.needs_root
def test_of_two_users_the_vault_takes_the_gates_events_and_the_gate_cannot_reach_the_chain(two: Server) -> None:
    assert send(two, [CT]) == [0]
    [ended] = wait_event(two, "association-ended")
    assert ended["studies"] == {scu.read(CT).study: 1}
    until(lambda: not list(two.incoming.glob("*.events")), "events stay in incoming")
    assert whole(two)
    with being(GATE):
        for path in (chain(two), last_file_of(two)):
            with pytest.raises(PermissionError):
                list(path.iterdir()) if path.suffix != ".log" else path.read_bytes()
    assert {path.stat().st_uid for path in chain(two).iterdir()} == {pwd.getpwnam(VAULT).pw_uid}


def last_file_of(server: Server) -> Path:
    return chain(server) / f"{1:016}.log"


@pytest.mark.needs_root
def test_whatever_a_gate_leaves_as_events_admission_goes_on_and_it_is_told(two: Server) -> None:
    odd = os.fsdecode(os.fsencode(two.incoming) + b"/\xff\n.events")
    with being(GATE):
        (two.incoming / "big.events").write_bytes(bytes(10_000_000))
        (two.incoming / "text.events").write_text('[{"type":"unlocked","time":"now"}]')
        (two.incoming / "empty.events").touch()
        (two.incoming / "link.events").symlink_to(two.store / "keyring")
        (two.incoming / "folder.events").mkdir()
        os.mkfifo(two.incoming / "pipe.events")
        Path(odd).touch()
    (two.incoming / "root.events").write_bytes(b"another user's")
    assert send(two, [CT]) == [0]
    two.wait_admitted()
    assert len(two.list()) == 1
    until(lambda: [p.name for p in two.incoming.glob("*.events")] == ["folder.events"], "files of events stay")
    wait_event(two, "association-ended")
    refused_files = of_type(two, "events-refused")
    assert len(refused_files) == 8
    two.ok("export", "--all", "--to", two.home / "out")
    [exported] = (two.home / "out").rglob("*.dcm")
    assert raw_data_set(exported) == raw_data_set(CT)
    assert whole(two)
    # A replayed copy under another name is none of the gate's, though the gate wrote it.
    two.ok("lock")
    refused(two)
    until(lambda: [p for p in two.incoming.glob("*.events") if p.is_file()], "the gate wrote no events")
    [path] = [p for p in two.incoming.glob("*.events") if p.is_file()]
    with being(GATE):
        (two.incoming / ("00" * 16 + ".events")).write_bytes(path.read_bytes())
    two.ok("unlock", "--key-file", two.home / "store.key")
    until(lambda: len(of_type(two, "events-refused")) == 9, "a copy is not refused")
    until(lambda: sum(e["count"] for e in events(two, "connection-refused")) == 1, "what was copied is counted twice")
    assert len([line for line in two.log if "events" in line and "error" in line]) < 15
