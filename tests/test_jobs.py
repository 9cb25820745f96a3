"""The schedule of a real vault: its commands, its history over restarts, what it catches up, and who watches it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Server

from keys import slots
from storescp.config import load
from storescp.control import Client
from storescp.vault.due import JobState
from storescp.vault.state import Vault

SYSTEMD = Path(__file__).parent.parent / "systemd"
PROGRAM = "/opt/strongroom/bin/strongroom"
# A time that is not today, on whichever day this runs (all but one of four years), and that was missed at least once.
RARE = "0 0 29 2 *"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("s"))
    made.init()
    made.add_peer("CT1")
    names = ("erase", "export", "expiry", "scrub", "patch", "review")
    made.set("schedule", checkpoint=RARE, backup_folder=str(made.home / "backup"), **dict.fromkeys(names, ""))
    try:
        yield made.start()
    finally:
        made.stop()
        made.kill_all()


def asked(server: Server, path: str) -> list[dict[str, Any]]:
    """Return what the running vault answers, without a process for every question."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(server.home / "run" / "vault.sock"))
    client = Client(connection)
    try:
        return list(client.json("GET", path)["items"])
    finally:
        client.close()


def history(server: Server) -> list[dict[str, Any]]:
    return asked(server, "/v1/jobs/history")


def item(server: Server, name: str) -> dict[str, Any]:
    return next(one for one in asked(server, "/v1/jobs") if one["job"] == name)


def recorded(server: Server) -> list[dict[str, Any]]:
    done = server.ok("audit", "show", "--json", "--type", "checkpoint", "--type", "job-ended")
    return [json.loads(line) for line in done.out.splitlines()]


def test_jobs_are_listed_done_on_demand_and_remembered_over_a_restart(served: Server) -> None:
    assert item(served, "backup")["next"] == ""
    assert item(served, "checkpoint")["next"].endswith("-02-29T00:00:00Z")
    assert "the audit chain is signed up to" in served.ok("jobs", "run", "checkpoint").out
    # One that fails is kept with its error: there is no recovery key, so that a backup would open nowhere else.
    failed = served.run("jobs", "run", "backup")
    assert (failed.status, "there is no recovery key" in failed.err) == (1, True)
    assert served.run("jobs", "run", "polish").status == 5
    # One that found something says so.
    broken = served.peers / "broken.toml"
    broken.write_text("colour = 'red'\n")
    found = served.run("jobs", "run", "expiry")
    broken.unlink()
    assert (found.status, "broken.toml" in found.out) == (6, True)
    assert "looked at 4 certificates and lists" in served.ok("jobs", "run", "expiry").out
    served.ok("jobs", "run", "rotate")
    results = [(run["job"], run["result"]) for run in history(served)][::-1]
    assert results == [
        ("checkpoint", "ok"),
        ("backup", "failed"),
        ("expiry", "findings"),
        ("expiry", "ok"),
        ("rotate", "ok"),
    ]
    assert "there is no recovery key" in item(served, "backup")["last"]["text"]
    checkpoint, *ended = recorded(served)
    assert checkpoint["head"].startswith(f"{checkpoint['number'] - 1}:")
    assert [(record["job"], record["result"]) for record in ended] == results
    assert "the schedule is alive; next is checkpoint" in served.ok("jobs", "alive").out

    served.stop()
    dead = served.run("jobs", "alive")
    assert (dead.status, "no vault is running" in dead.err) == (1, True)
    # A vault that is started for one command knows the same.
    told = served.ok("jobs", "history", "--json").json()["items"]
    assert [(run["job"], run["result"]) for run in told][::-1] == results
    served.start()
    assert len(served.ok("jobs", "history", "--job", "expiry", "--last", "1").out.splitlines()) == 2
    assert "rotate\tnever\tnever" in served.ok("jobs", "list").out


def test_a_vault_that_starts_locked_catches_up_once_when_it_is_unlocked(served: Server) -> None:
    served.stop()
    served.set("unlock", key_file="")
    missed_since(served, "checkpoint", "2019-12-01T00:00:00Z")
    before = len(history_of(served))
    served.start()
    assert "the schedule is alive and the vault is locked" in served.ok("jobs", "alive").out
    assert "the vault is locked: nothing is done" in served.ok("jobs", "list").err
    assert served.run("jobs", "run", "checkpoint").status == 4
    served.ok("unlock", "--key-file", served.home / "store.key")
    assert served.wait_log(r"job checkpoint was due at 2020-02-29T00:00:00Z; with \d+ later times")
    served.wait_log("job checkpoint: ok")
    [run, *others] = history(served)
    assert len(others) == before
    assert (run["due"], run["by"], run["missed"] >= 1) == ("2020-02-29T00:00:00Z", "schedule", True)
    assert item(served, "checkpoint")["next"] > run["began"]


def missed_since(server: Server, job: str, since: str) -> None:
    """Let a job count from long ago, as if the machine had been off."""
    with_ledger(server, lambda records: records.put(job, JobState(job, RARE, "UTC", since)))


def history_of(server: Server) -> list[Any]:
    """Return the history of a store that no vault runs on."""
    return with_ledger(server, lambda records: list(records.all()), kind="run")


def with_ledger(server: Server, act: Any, kind: str = "job") -> Any:
    vault = Vault(load(server.config))
    vault.unlock(slots.read_key_file(server.home / "store.key"))
    try:
        with vault.admitting() as open_:
            assert open_ is not None
            return act(open_.ledger.records(kind, JobState if kind == "job" else dict))
    finally:
        vault.lock()
        vault.auditor.close()


@pytest.mark.needs("systemd-analyze")
def test_the_dead_mans_check_is_a_unit_and_a_timer_as_strict_as_the_others(tmp_path: Path) -> None:
    service = SYSTEMD / "strongroom-alive.service"
    copies = [tmp_path / "strongroom-alive.service", tmp_path / "strongroom-alive.timer"]
    copies[0].write_text(service.read_text().replace(PROGRAM, sys.executable))
    copies[1].write_text((SYSTEMD / "strongroom-alive.timer").read_text())
    for command in (
        ["systemd-analyze", "verify", "--man=no", *map(str, copies)],
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(service)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # An unknown key is a warning, and no failure.
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert service.read_text().count(PROGRAM) == 1
