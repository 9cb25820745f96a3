"""What a desk that is broken into can put where it stores, as its own user: nothing that is held changes by it."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import scu
from conftest import send
from pydicom.data import get_testdata_file
from scu import raw_data_set
from served import Desk, three_users
from test_accountable import until
from test_rotate import WAIVERS
from test_store import exported
from test_two_users import Forger, padded
from test_web_store import KIND, body
from users import DESK, GATE, VAULT, being

from storage import events
from storage.deposit import PublishedKeys
from storescp import config as configuration
from storescp import harden

CT, MR = (Path(str(get_testdata_file(name))) for name in ("CT_small.dcm", "MR_small.dcm"))
NOBODYS = b"\1" * 16

pytestmark = pytest.mark.needs_root


@pytest.fixture
def three() -> Iterator[Desk]:
    """A server whose gate, vault and desk are three users."""
    with three_users() as server:
        server.peer("CT1")
        server.peer("SENDER", roles=["sender"])
        yield server.open()


def inbox(server: Desk) -> Path:
    return configuration.load(server.config).desk_incoming


def forged(server: Desk, key_id: bytes, **about: str) -> bytes:
    """Return a deposit that the desk could make."""
    forger = Forger(server, DESK, "incoming-desk")
    header = forger.header(key_id)
    return padded(header.encode()) + forger.record(header, os.urandom(16), **about)


def test_what_is_stored_by_the_web_is_the_desks_until_the_vault_has_copied_it(three: Desk) -> None:
    found = inbox(three).stat()
    assert found.st_uid == pwd.getpwnam(DESK).pw_uid
    assert found.st_gid == pwd.getpwnam(VAULT).pw_gid
    assert found.st_mode & 0o7777 == 0o2770
    port = int(re.findall(r"DICOMweb at https://127\.0\.0\.1:(\d+)", "\n".join(three.log))[0])
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=three.tls("SENDER"), timeout=60)
    connection.request("POST", "/dicomweb/studies", body=body(CT.read_bytes()), headers={"Content-Type": KIND})
    assert connection.getresponse().status == 200
    connection.close()
    for path in inbox(three).iterdir():
        assert path.stat().st_uid == pwd.getpwnam(DESK).pw_uid
    three.wait_admitted()
    assert list(exported(three).values()) == [raw_data_set(CT)]
    (admitted,) = [path for path in (three.store / "objects").rglob("*") if path.is_file()]
    assert admitted.stat().st_uid == pwd.getpwnam(VAULT).pw_uid


def test_the_gate_gets_nothing_into_or_out_of_the_desks_folder_nor_the_desk_of_the_gates(three: Desk) -> None:
    for user, folder in ((GATE, inbox(three)), (DESK, three.incoming)):
        with being(user):
            for act in (lambda f=folder: list(f.iterdir()), lambda f=folder: (f / "x").touch()):  # type: ignore[misc]
                with pytest.raises(PermissionError):
                    act()


def test_a_file_of_another_user_in_the_desks_folder_is_set_aside(three: Desk) -> None:
    content = forged(three, NOBODYS)
    path = inbox(three) / NOBODYS.hex()
    making = path.with_suffix(".new")
    making.write_bytes(content)
    os.chown(making, pwd.getpwnam(GATE).pw_uid, pwd.getpwnam(VAULT).pw_gid)
    making.chmod(0o640)
    making.rename(path)
    three.wait_admitted()
    assert three.status()["quarantine"] == 1
    assert three.list() == []


def test_a_deposit_of_the_desk_is_judged_as_the_gates_are_and_replaces_nothing(three: Desk) -> None:
    assert send(three, [CT]) == [0]
    three.wait_admitted()
    one = scu.read(CT)
    (held,) = [path for path in (three.store / "objects").rglob("*") if path.is_file()]
    key_ids = {"the UID of one that is held": secrets.token_bytes(16), "its pack's name": bytes.fromhex(held.name)}
    for number, (case, key_id) in enumerate(key_ids.items(), 1):
        about = {"uid": one.sop_instance, "study": one.study}
        with being(DESK):
            (inbox(three) / key_id.hex()).write_bytes(forged(three, key_id, **about))
        three.wait_admitted()
        assert three.status()["quarantine"] == number, case
        assert list(exported(three, f"out{number}").values()) == [raw_data_set(CT)], case
    assert three.run("verify").status == 0


def test_two_deposits_of_one_name_are_both_kept_apart_and_nothing_is_lost(three: Desk) -> None:
    three.set("gate", pack_idle_seconds=600)
    three.stop()
    three.open()
    assert send(three, [CT]) == [0]
    (waiting,) = three.deposits()
    key_id = bytes.fromhex(waiting.name)
    with being(DESK):
        (inbox(three) / waiting.name).write_bytes(forged(three, key_id))
    # The desk's own is closed, and first; the gate's lets go when it stops.
    three.stop()
    three.open()
    three.wait_admitted()
    ours = raw_data_set(CT)
    three.ok("export", "--all", "--to", three.home / "out")
    held = [raw_data_set(path) for path in (three.home / "out").rglob("*.dcm")]
    assert ours in held or three.status()["quarantine"] == 1
    if ours not in held:
        (item,) = three.ok("quarantine", "list", "--json").json()["items"]
        assert item["study"] == scu.read(CT).study


def test_a_desk_that_closes_its_folder_stops_nobody_and_no_key_version_goes_meanwhile(three: Desk) -> None:
    with being(DESK):
        (inbox(three) / NOBODYS.hex()).write_bytes(forged(three, NOBODYS))
        inbox(three).chmod(0o700)
    assert send(three, [CT]) == [0]
    until(lambda: len(three.list()) == 1, "what comes to the gate is not admitted")
    assert three.status()["receiving"]
    done = three.run("keys", "rotate", "--reason", "a test", *WAIVERS)
    assert (done.status, "cannot be read" in done.err) == (1, True), done.err
    assert three.stop() == 0
    three.log.clear()
    # The supervisor gives it its mode again.
    three.open()
    three.wait_admitted()
    assert len(three.list()) == 2
    three.ok("keys", "rotate", "--reason", "a test", *WAIVERS)
    with being(DESK):
        inbox(three).chmod(0o700)
    config = configuration.load(three.config)
    with being(VAULT):
        harden.check_vault(config)


def test_a_desk_that_fills_its_folder_does_not_hold_up_the_gate(three: Desk) -> None:
    folder = inbox(three)
    with being(DESK):
        for number in range(20_000):
            (folder / f"{number:032x}").mkdir()
            os.utime(folder / f"{number:032x}", (0, 0))
    assert send(three, [CT]) == [0]
    until(lambda: len(three.list()) == 1, "what comes to the gate is not admitted")


def test_the_desk_tells_the_chain_what_it_stored_and_nothing_else(three: Desk) -> None:
    config = configuration.load(three.config)
    keys = PublishedKeys(config.public, config.signing_key)
    store_id = configuration.load(three.config)
    from keys.versions import store_id_of

    def tell(*kinds: str) -> None:
        content = msgspec.json.encode([{"time": "2026-01-01T00:00:00.000000Z", "type": kind} for kind in kinds])
        with being(DESK):
            events.deposit(inbox(three), store_id_of(store_id.signing_key), keys, content)

    tell("association-ended")
    for kind in ("peers-read", "commitment-requested", "connection-refused", "unlock"):
        tell("association-ended", kind)

    def told(kind: str) -> int:
        lines = three.ok("audit", "show", "--json").out.splitlines()
        return sum(json.loads(line)["type"] == kind for line in lines)

    three.list()
    assert (told("events-refused"), told("gate-events") >= 1) == (4, True)
    assert not re.search(r"error of its own", "\n".join(three.log))
