"""Peers that mean harm, or are broken: whatever they do, others get through and nothing stays taken."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file

CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))


@pytest.fixture
def gate(make_server: Callable[[], Server]) -> Server:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    return server


def context(server: Server) -> ssl.SSLContext:
    return scu.tls(server.home / "issued" / "CT1")


@contextlib.contextmanager
def trickle(connection: ssl.SSLSocket, content: bytes) -> Iterator[None]:
    """Send single bytes, ten a second, until the other side has enough."""
    over = threading.Event()

    def send() -> None:
        for number in range(len(content)):
            try:
                connection.sendall(content[number : number + 1])
            except OSError:
                return
            if over.wait(0.1):
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_one_address_cannot_take_all_places(gate: Server) -> None:
    gate.set("gate", maximum_associations=4, maximum_per_address=2)
    gate.start("gate")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", gate.port), source_address=("127.0.0.2", 0)))
        third = socket.create_connection(("127.0.0.1", gate.port), source_address=("127.0.0.2", 0))
        with stack.enter_context(third):
            assert third.recv(1) == b""
        gate.wait_log(r"connection from 127\.0\.0\.2:\d+ closed: the limit of connections from one address is reached")
        assert scu.send(gate.port, context(gate), [CT]) == [0]


@pytest.mark.parametrize(
    ("setting", "begun", "trickled", "ending"),
    [
        # Between messages: the header of a PDU, never finished.
        ("idle_seconds", b"", b"\x04\x00\x00\x00\x10", "idle for too long"),
        # Within one: a P-DATA-TF PDU with a command of 4,000 bytes.
        (
            "message_seconds",
            b"\x04\x00" + (4006).to_bytes(4, "big") + (4002).to_bytes(4, "big") + b"\x01\x01",
            bytes(4000),
            "a message took too long, or stopped in the middle",
        ),
    ],
    ids=["idle", "message"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
def test_a_peer_that_trickles_is_aborted_in_time_however_often_bytes_come(
    gate: Server, setting: str, begun: bytes, trickled: bytes, ending: str
) -> None:
    gate.set("gate", **{setting: 2})
    gate.start("gate")
    association = scu.request(gate.port, context(gate), [CT.context])
    connection = association.dul.socket.socket
    connection.sendall(begun + trickled[:1])
    # Slower than any limit on a single read would notice.
    with trickle(connection, trickled[1:]):
        gate.wait_log(f"aborted: {ending}: 0 stored", 15)
    association.join(10)
    assert association.is_aborted
    assert scu.send(gate.port, context(gate), [CT]) == [0]
