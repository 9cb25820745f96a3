"""One store over its first days: locked, unlocked, crashed, asked without a vault, sent the same twice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server, changed, send
from pydicom.data import get_testdata_file
from scu import raw_data_set

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))


def exported(server: Server, name: str = "out") -> dict[str, bytes]:
    """Export everything; return data sets by SOP Instance UID."""
    server.ok("export", "--all", "--to", server.home / name)
    return {path.stem: raw_data_set(path) for path in (server.home / name).rglob("*.dcm")}


def test_what_was_acknowledged_is_listed_and_exported_before_its_pack_closes(server: Server) -> None:
    server.set("gate", pack_idle_seconds=600)
    server.stop()
    server.start()
    assert send(server, [CT, MR]) == [0, 0]
    assert len(server.list()) == 2
    assert [row["waiting_count"] for row in server.list("study")] == [1, 1]
    assert set(exported(server).values()) == {raw_data_set(CT), raw_data_set(MR)}


def test_an_admitted_pack_has_no_deposit_key_a_constant_time_and_one_folder(server: Server) -> None:
    send(server, [CT])
    server.wait_admitted()
    (path,) = [p for p in (server.store / "objects").rglob("*") if p.is_file()]
    content = path.read_bytes()
    assert content[64:1236] == bytes(1172)
    assert path.stat().st_mtime == 946_684_800
    assert path.parent.name == path.name[:2]
    assert server.deposits() == []
    assert list(exported(server).values()) == [raw_data_set(CT)]


def test_a_locked_server_receives_and_the_vault_catches_up(make_server: Callable[..., Server]) -> None:
    server = make_server()
    passphrase = server.home / "passphrase"
    passphrase.write_text("copper lantern fjord mistake\n")
    server.ok("init", "--with-pki", "--passphrase-file", passphrase, "--listen", "127.0.0.1:0")
    # Issuing needs the authority's key, which is sealed: with no vault running and no terminal, this is refused.
    assert server.run("peer", "add", "CT1", "--issue", server.home / "issued" / "CT1").status == 4
    server.set("gate", pack_idle_seconds=1)
    server.start()
    assert server.run("list").status == 4
    server.ok("unlock", "--passphrase-file", passphrase)
    server.add_peer("CT1")
    server.ok("lock")
    server.wait_log("peers and certificates read: 1 peers")
    assert send(server, [CT, MR]) == [0, 0]
    status = server.status()
    assert status["locked"]
    assert status["deposits"]["packs"] == 2
    assert any("locked" in warning for warning in status["warnings"])
    assert server.run("list").status == 4
    wrong = server.run("unlock", "--key-file", server.home / "store" / "keyring")
    assert wrong.status == 1
    other = server.home / "other"
    other.write_text("granite velvet octopus rainfall\n")
    refused = server.run("unlock", "--passphrase-file", other)
    assert refused.status == 4
    assert "this does not unlock the store" in refused.err
    server.ok("unlock", "--passphrase-file", passphrase)
    assert set(exported(server).values()) == {raw_data_set(CT), raw_data_set(MR)}


def test_a_gate_killed_in_the_middle_loses_nothing_acknowledged_and_is_started_again(server: Server) -> None:
    assert send(server, [CT, MR]) == [0, 0]
    (gate,) = server.pids("gate")
    os.kill(gate, signal.SIGKILL)
    server.port = int(server.wait_log(r"listening on 127\.0\.0\.1:(\d+)")[1])
    server.wait_admitted()
    assert set(exported(server).values()) == {raw_data_set(CT), raw_data_set(MR)}


def test_with_everything_killed_a_command_starts_a_vault_for_itself(server: Server) -> None:
    assert send(server, [CT]) == [0]
    pids = [pid for verb in ("serve", "gate", "vault") for pid in server.pids(verb)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert list(exported(server).values()) == [raw_data_set(CT)]
    assert server.deposits() == []
    assert server.pids("vault") == []


def test_the_same_instance_twice_is_held_once_and_nothing_is_overwritten(server: Server, tmp_path: Path) -> None:
    other = changed(CT, tmp_path, SliceLocation="77.5")
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [CT]) == [0]
    assert send(server, [other]) == [0]
    server.wait_admitted()
    assert list(exported(server).values()) == [raw_data_set(CT)]
    status = server.status()
    assert (status["counts"]["instances"], status["counts"]["packs"], status["quarantine"]) == (1, 1, 1)
    assert any("in quarantine" in warning for warning in status["warnings"])


def test_the_index_is_rebuilt_when_it_is_lost(server: Server) -> None:
    send(server, [CT, MR])
    server.wait_admitted()
    before = server.list()
    server.stop()
    for file in server.store.glob("index-1.db*"):
        file.unlink()
    server.start()
    assert server.list() == before
    assert len(exported(server)) == 2


def test_a_second_vault_and_a_second_init_are_refused(server: Server) -> None:
    second = server.run("vault")
    assert second.status == 1
    assert "another vault runs" in second.err
    again = server.run("init", "--key-file", server.home / "second.key")
    assert again.status == 1
    assert "never made over another one" in again.err
    assert not (server.home / "second.key").exists()


def test_a_deposit_of_somebody_else_goes_to_quarantine_and_holds_nothing_up(server: Server) -> None:
    forged = server.incoming / ("ab" * 16)
    forged.write_bytes(b"\x89SRM\r\n\x1a\n" + bytes(8192))
    os.mkfifo(server.incoming / ("cd" * 16))
    (server.incoming / ("ef" * 16)).symlink_to("/etc/hostname")
    assert send(server, [CT]) == [0]
    assert len(server.list()) == 1
    assert server.status()["quarantine"] == 1
    assert list(exported(server).values()) == [raw_data_set(CT)]


def test_a_damaged_pack_fails_its_export_and_no_other(server: Server) -> None:
    send(server, [CT, MR])
    server.wait_admitted()
    packs = sorted((p for p in (server.store / "objects").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with packs[-1].open("r+b") as file:
        file.seek(20_000)
        file.write(b"damage")
    done = server.run("export", "--all", "--to", server.home / "out")
    assert done.status == 3
    assert "1 FAILED" in done.out
    assert [p.suffix for p in (server.home / "out").rglob("*") if p.is_file()] == [".dcm"]


def test_a_zeroed_frame_hides_no_good_record_behind_it(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server()
    server.init()
    # Associations of one worker share a pack.
    server.set("gate", workers=1)
    server.add_peer("CT1")
    server.start("gate")
    files = [CT, *(changed(CT, tmp_path, SOPInstanceUID=f"1.2.3.{n}") for n in range(2))]
    assert send(server, files) == [0, 0, 0]
    server.stop()
    (deposit,) = server.deposits()
    content = bytearray(deposit.read_bytes())
    second = content.index(b"SRR1", 4100)
    content[second : second + 40] = bytes(40)
    deposit.write_bytes(content)
    assert set(exported(server).values()) == {raw_data_set(files[0]), raw_data_set(files[2])}
    assert server.status()["counts"]["unreadable"] == 1


def test_what_stands_between_records_is_not_carried_into_the_archive(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = make_server()
    server.init()
    # Associations of one worker share a pack.
    server.set("gate", workers=1)
    server.add_peer("CT1")
    server.start("gate")
    files = [CT, changed(CT, tmp_path, SOPInstanceUID="1.2.3.4")]
    assert send(server, files) == [0, 0]
    server.stop()
    (deposit,) = server.deposits()
    content = bytearray(deposit.read_bytes())
    second = content.index(b"SRR1", 4100)
    content[second - 8 : second] = b"smuggled"
    deposit.write_bytes(content)
    assert set(exported(server).values()) == {raw_data_set(file) for file in files}
    (admitted,) = [p for p in (server.store / "objects").rglob("*") if p.is_file()]
    assert b"smuggled" not in admitted.read_bytes()
    assert server.run("verify").status == 0


@pytest.mark.parametrize(("started", "admits"), [(0, 10), (15, 19)])
def test_admission_yields_to_those_who_receive_and_ask_however_the_vault_is_started(
    make_server: Callable[[], Server], started: int, admits: int
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.start("gate")
    assert send(server, [CT]) == [0]
    server.stop()
    own = os.nice(0)
    command = ["nice", "-n", str(started), sys.executable, "-m", "storescp", "--config", str(server.config), "vault"]
    server.start_command(command, "vault")
    server.wait_log("admitted 1 pack")
    [vault] = server.pids("vault")
    tasks = [int(task.name) for task in Path(f"/proc/{vault}/task").iterdir()]
    nice = {task: os.getpriority(os.PRIO_PROCESS, task) for task in tasks}
    assert nice.pop(vault) == min(19, own + admits)
    assert set(nice.values()) == {min(19, own + started)}
