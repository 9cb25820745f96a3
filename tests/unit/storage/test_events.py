"""The gate's events in incoming/: what is deposited is read again whole, and anything else is an EventsError."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.keyring import UnknownVersionError
from keys.seal import context, seal
from keys.versions import Version, new_key, store_id_of
from storage import events, pack
from storage.deposit import DepositError, PublishedKeys
from storage.events import EventsError

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
STORE = store_id_of(PUBLIC)
VERSION = Version(STORE, 1, bytes(range(32, 64)))
CONTENT = b'[{"time":"2026-01-31T12:00:00.000000Z","type":"association-begun","calling":"CT1"}]'


def version(number: int) -> Version:
    if number != 1:
        raise UnknownVersionError(f"the keyring has no key version {number}")
    return VERSION


@pytest.fixture
def keys(tmp_path: Path) -> PublishedKeys:
    folder = tmp_path / "public"
    folder.mkdir()
    (folder / "deposit-1.key").write_bytes(VERSION.deposit_key().signed_file(SIGNING, "2026-01-31T12:00:00Z"))
    return PublishedKeys(folder, PUBLIC)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


def read(path: Path, owner: int | None = None) -> bytes:
    return events.read(path, STORE, version, os.geteuid() if owner is None else owner)


def deposit(incoming: Path, keys: PublishedKeys, content: bytes = CONTENT) -> Path:
    before = set(events.found(incoming))
    events.deposit(incoming, STORE, keys, content)
    [path] = set(events.found(incoming)) - before
    return path


def forged(flags: int = pack.EVENTS, label: str = "event", store: bytes = STORE, content: bytes = CONTENT) -> bytes:
    """Return a file as a gate could make it that knows the format."""
    key_id, object_id, key = bytes(range(16)), bytes(16), new_key()
    header = pack.Header(store, key_id, 1, VERSION.deposit_key().wrap(key, key_id), flags)
    sealed = seal(content, key, context(label, header.bound(), object_id))
    nothing = seal(b"{}", key, context("attributes", header.bound(), object_id))
    frame = pack.Frame(pack.PAGE, object_id, len(sealed), len(nothing))
    return header.encode() + frame.encode() + sealed + nothing


NAME = bytes(range(16)).hex() + events.SUFFIX


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 60_000, events.CONTENT_LIMIT])
def test_what_is_deposited_is_read_again(incoming: Path, keys: PublishedKeys, length: int) -> None:
    content = random.Random(length).randbytes(length)
    path = deposit(incoming, keys, content)
    assert read(path) == content
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in incoming.iterdir()] == [path.name]


def test_files_are_found_oldest_first_and_nothing_else_is(incoming: Path, keys: PublishedKeys) -> None:
    made = [deposit(incoming, keys) for _ in range(5)]
    for position, path in enumerate(random.Random(1).sample(made, 5)):
        os.utime(path, (position, position))
    (incoming / ("ab" * 16)).write_bytes(b"a pack")
    (incoming / ("ab" * 16 + ".new")).write_bytes(b"in the making")
    assert [path.stat().st_mtime for path in events.found(incoming)] == [0, 1, 2, 3, 4]


def test_files_that_come_and_go_meanwhile_are_no_error(incoming: Path) -> None:
    stop = threading.Event()

    def flicker() -> None:
        while not stop.is_set():
            for number in range(50):
                (incoming / f"{number}.events").touch()
            for number in range(50):
                (incoming / f"{number}.events").unlink()

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        for _ in range(3000):
            events.found(incoming)
    finally:
        stop.set()
        thread.join()


def test_neither_name_nor_bytes_of_a_file_tell_what_is_in_it(incoming: Path, keys: PublishedKeys) -> None:
    path = deposit(incoming, keys)
    assert len(path.name) == 32 + len(events.SUFFIX)
    for word in (b"association", b"CT1", b"2026"):
        assert word not in path.read_bytes()


def test_without_a_usable_deposit_key_nothing_is_left(incoming: Path, keys: PublishedKeys, tmp_path: Path) -> None:
    (tmp_path / "public" / "deposit-1.key").unlink()
    with pytest.raises(DepositError):
        events.deposit(incoming, STORE, keys, CONTENT)
    assert list(incoming.iterdir()) == []


def test_what_a_gate_may_write_is_read_and_a_forged_file_of_it_is_as_good(incoming: Path) -> None:
    path = incoming / NAME
    path.write_bytes(forged())
    assert read(path) == CONTENT


REFUSED: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a page of zeros": lambda: bytes(pack.PAGE),
    "a header alone": lambda: forged()[: pack.PAGE],
    "a header and half a frame": lambda: forged()[: pack.PAGE + 20],
    "a study's flags": lambda: forged(flags=0),
    "a study's seal": lambda: forged(label="dataset"),
    "another store": lambda: forged(store=bytes(16)),
    "a version of zero": lambda: forged()[:64] + bytes(pack.PAGE - 64) + forged()[pack.PAGE :],
    "lengths beyond the file": lambda: forged()[: pack.PAGE + 4] + b"\xff" * 12 + forged()[pack.PAGE + 16 :],
    "a cut record": lambda: forged()[:-1],
    "10 MB": lambda: forged() + bytes(10_000_000),
    "10 MB of events": lambda: forged(content=b" " * 10_000_000),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_file_of_this_stores_events_is_refused(incoming: Path, what: str) -> None:
    path = incoming / NAME
    path.write_bytes(REFUSED[what]())
    with pytest.raises(EventsError):
        read(path)


def test_a_changed_byte_anywhere_is_refused(incoming: Path) -> None:
    whole = forged()
    path = incoming / NAME
    end = pack.PAGE + 40 + 56 + len(CONTENT) + 16
    chance = random.Random("bytes")
    places = {*range(80), *chance.sample(range(80, 1236), 60), *chance.sample(range(1236, pack.PAGE), 20)}
    # A frame's lengths and id; its seal. What follows, the attributes that nobody reads, may be anything.
    places |= {*range(pack.PAGE, pack.PAGE + 4), *range(pack.PAGE + 8, pack.PAGE + 40), *range(pack.PAGE + 40, end)}
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((EventsError, UnknownVersionError)):
            read(path)


def test_a_copy_under_another_name_is_refused(incoming: Path, keys: PublishedKeys) -> None:
    path = deposit(incoming, keys)
    copy = path.with_name("00" * 16 + events.SUFFIX)
    copy.write_bytes(path.read_bytes())
    with pytest.raises(EventsError, match="name"):
        read(copy)


def test_another_users_file_is_refused(incoming: Path, keys: PublishedKeys) -> None:
    with pytest.raises(EventsError, match="user"):
        read(deposit(incoming, keys), owner=os.geteuid() + 1)


@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder", "a socket"])
def test_what_is_no_file_is_refused_and_nobody_waits_for_it(incoming: Path, keys: PublishedKeys, what: str) -> None:
    path = incoming / NAME
    match what:
        case "a link":
            path.symlink_to(deposit(incoming, keys))
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case _:
            with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(incoming):
                bound.bind(path.name)
    with pytest.raises(EventsError, match="regular"):
        read(path)


def test_an_unknown_key_version_is_told_as_such(incoming: Path) -> None:
    path = incoming / NAME
    whole = forged()
    path.write_bytes(whole[:64] + b"\0\0\0\7" + whole[68:])
    with pytest.raises(UnknownVersionError):
        read(path)


def test_a_file_that_is_gone_is_an_error_of_the_disk(incoming: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(incoming / NAME)
