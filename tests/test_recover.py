"""Slots and recovery on the command line: more ways to unlock, a new root key, and a keyring rebuilt from paper."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file

PASSPHRASE = "correct horse battery staple gadolinium"
CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))


@pytest.fixture
def server(make_server: Callable[[], Server]) -> Server:
    made = make_server()
    made.init()
    made.add_peer("CT1")
    return made


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory."""
    folder = Path("/dev/shm") / f"strongroom-test-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def slots(server: Server) -> dict[str, str]:
    """Return the slots' ids by their types."""
    found = server.ok("keys", "slot", "list", "--json").json()["items"]
    return {slot["type"]: slot["id"] for slot in found}


def asking(server: Server, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a command that asks on its standard input, because it has no terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "storescp", "--config", str(server.config), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def made_shares(file: Path) -> list[str]:
    """Return the words of the shares on the pages in a file, once it is whole."""
    until = time.monotonic() + 30
    while not file.exists() or file.read_text().count("Strongroom recovery share") < 5:
        assert time.monotonic() < until
        time.sleep(0.05)
    return [" ".join(re.findall(r"\d+ ([a-z]+)", page.split("\n\n")[1])) for page in file.read_text().split("\f")]


def init(server: Server, memory: Path, typed: Callable[[list[str]], list[str]]) -> tuple[int, str, list[str]]:
    """Make a recovery key of 3 in 5 and type back what is wanted; return status, messages and shares."""
    file = memory / "shares.txt"
    with asking(server, "recovery", "init", "--file", file) as process:
        shares = made_shares(file)
        out, err = process.communicate("\n".join(typed(shares)) + "\n", timeout=60)
    file.unlink()
    return process.returncode, out + err, shares


def test_a_second_slot_unlocks_and_the_last_one_stays(server: Server, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text(PASSPHRASE)
    server.start("vault")
    server.ok("keys", "slot", "add", "--label", "second", "--passphrase-file", tmp_path / "passphrase")
    assert server.ok("keys", "slot", "test", "--passphrase-file", tmp_path / "passphrase").out.endswith("second\n")
    server.ok("lock")
    server.ok("unlock", "--passphrase-file", tmp_path / "passphrase")
    server.ok("keys", "slot", "remove", slots(server)["key-file"])
    refused = server.run("keys", "slot", "remove", slots(server)["passphrase"])
    assert refused.status == 1
    assert list(slots(server)) == ["passphrase"]
    server.ok("lock")
    assert server.run("unlock", "--key-file", server.home / "store.key").status == 4
    server.ok("unlock", "--passphrase-file", tmp_path / "passphrase")


def test_a_weak_passphrase_makes_no_slot(server: Server, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("password1234")
    server.start("vault")
    assert server.run("keys", "slot", "add", "--passphrase-file", tmp_path / "passphrase").status == 1
    assert list(slots(server)) == ["key-file"]


def test_after_reroot_a_slot_that_was_left_out_opens_nothing_and_the_store_is_whole(
    server: Server, tmp_path: Path
) -> None:
    server.start()
    context = scu.tls(server.home / "issued" / "CT1")
    assert scu.send(server.port, context, [CT]) == [0]
    server.ok("keys", "slot", "add", "--key-file", tmp_path / "new.key")
    old = slots(server)
    missing = server.run("keys", "slot", "reroot", "--key-file", tmp_path / "new.key")
    assert missing.status == 1
    listed = server.ok("keys", "slot", "list", "--json").json()["items"]
    [first] = [slot["id"] for slot in listed if slot["label"] == "first"]
    server.ok("keys", "slot", "reroot", "--key-file", tmp_path / "new.key", "--remove", first)
    assert old != slots(server)
    server.ok("lock")
    assert server.run("unlock", "--key-file", server.home / "store.key").status == 4
    server.ok("unlock", "--key-file", tmp_path / "new.key")
    assert [row["sop"] for row in server.list("instance")] == [CT.sop_instance]


def test_shares_reach_no_disk_and_a_key_counts_only_when_enough_were_typed_back(server: Server, memory: Path) -> None:
    server.start("vault")
    on_disk = server.run("recovery", "init", "--file", server.home / "shares.txt")
    if "tmpfs" not in subprocess.check_output(["stat", "-f", "-c%T", server.home], text=True):
        assert on_disk.status == 1
        assert "must not reach a disk" in on_disk.err
        assert not (server.home / "shares.txt").exists()
    for typed in (
        lambda shares: [*shares[:2], shares[1]],
        lambda shares: [
            *shares[:2],
            shares[2].rpartition(" ")[0] + (" acid" if shares[2].endswith("academic") else " academic"),
        ],
    ):
        status, said, shares = init(server, memory, typed)
        assert status != 0
        assert "the store does not take this recovery key" in said
        assert not any(share in said for share in shares)
    assert server.run("recovery", "list").status == 5
    status, said, _ = init(server, memory, lambda shares: shares[1:4])
    assert status == 0, said
    assert "3 of 5 shares" in server.ok("recovery", "list").out


def test_a_store_without_anchors_and_keyring_is_rebuilt_from_an_export_and_three_shares(
    server: Server, tmp_path: Path, memory: Path
) -> None:
    server.start()
    context = scu.tls(server.home / "issued" / "CT1")
    assert scu.send(server.port, context, [CT]) == [0]
    server.wait_admitted()
    status, said, shares = init(server, memory, lambda made: made[:3])
    assert status == 0, said
    export = tmp_path / "strongroom.export"
    assert any("no recovery export" in w for w in server.ok("status", "--json").json()["warnings"])
    server.ok("recovery", "export", "--to", export)
    server.ok("recovery", "confirm", export)
    warnings = server.ok("status", "--json").json()["warnings"]
    assert not any("no recovery export" in w for w in warnings)
    server.stop()
    (server.store / "keyring").unlink()
    shutil.rmtree(server.home / "anchors")

    def rebuild(typed: list[str], key_file: Path) -> tuple[int, str]:
        with asking(server, "recovery", "rebuild", "--export", export, "--key-file", key_file) as process:
            out, err = process.communicate("\n".join([*typed, ""]) + "\n", timeout=60)
        return process.returncode, out + err

    few, said = rebuild(shares[3:], tmp_path / "no.key")
    assert few == 1, said
    assert not (tmp_path / "no.key").exists()
    status, said = rebuild([shares[4], shares[0], shares[2]], tmp_path / "rebuilt.key")
    assert status == 0, said
    assert not any(share in said for share in shares)
    text = server.config.read_text()
    server.config.write_text(re.sub(r'(?m)^key_file = ".*"$', f'key_file = "{tmp_path / "rebuilt.key"}"', text))
    server.start()
    assert [row["sop"] for row in server.list("instance")] == [CT.sop_instance]
    assert server.run("verify").status == 0
    server.ok("export", "--sop", CT.sop_instance, "--output", tmp_path / "out.dcm")
    assert scu.raw_data_set(tmp_path / "out.dcm") == CT.data
    # Gates go on with the deposit key that was published before.
    assert scu.send(server.port, context, [scu.large_file(tmp_path / "new.dcm", 4)]) == [0]
    server.wait_admitted()
    assert len(server.list("instance")) == 2


def test_a_changed_export_is_not_confirmed(server: Server, tmp_path: Path, memory: Path) -> None:
    server.start("vault")
    assert init(server, memory, lambda made: made[:3])[0] == 0
    export = tmp_path / "strongroom.export"
    server.ok("recovery", "export", "--to", export)
    content = bytearray(export.read_bytes())
    content[-1] ^= 1
    export.write_bytes(content)
    assert server.run("recovery", "confirm", export).status == 1
    assert [e["confirmed"] for e in server.ok("recovery", "list", "--json").json()["exports"]] == [""]
