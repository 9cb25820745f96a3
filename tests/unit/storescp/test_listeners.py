"""The gate's listening sockets: what systemd passes is taken only where the configuration names it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from storescp.errors import USAGE, StrongroomError
from storescp.gate import listeners
from storescp.gate.listeners import Passed


@pytest.fixture
def given() -> Iterator[Callable[[socket.socket], Passed]]:
    """Give a socket away, as a process that passes it does; whoever takes it closes it."""
    made: list[int] = []

    def give(sock: socket.socket) -> Passed:
        descriptor = sock.detach()
        made.append(descriptor)
        return Passed(descriptor, "gate")

    yield give
    for descriptor in made:
        # What was refused is closed; what was taken is closed by its test.
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def listening(host: str = "127.0.0.1") -> tuple[socket.socket, listeners.Address]:
    sock = listeners.bind(host, 0)
    return sock, (host, sock.getsockname()[1])


def test_a_passed_socket_serves_the_address_that_it_listens_on(given: Callable[[socket.socket], Passed]) -> None:
    first, address = listening()
    second, other = listening("::1")
    os.set_inheritable(first.fileno(), True)
    first.setblocking(True)
    taken = listeners.adopt([given(first), given(second)], [address, other, ("10.1.2.3", 2762)])
    assert set(taken) == {address, other}
    assert taken[address].getsockname() == address
    # No child of the gate's gets it, and nobody who connects can make it wait.
    assert not taken[address].get_inheritable()
    assert not taken[address].getblocking()
    for sock in taken.values():
        sock.close()


def dual() -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    sock.listen()
    return sock


def bound(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    return sock


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: listening()[0], r"listens on 127\.0\.0\.1:\d+, which neither gate\.listen nor gate\.plaintext names"),
        (lambda: listening("0.0.0.0")[0], r"listens on 0\.0\.0\.0:\d+, which neither"),
        (dual, "for IPv4 as well"),
        (lambda: bound(socket.SOCK_STREAM), "does not listen"),
        (lambda: bound(socket.SOCK_DGRAM), "is no TCP socket"),
        (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), "is no TCP socket"),
    ],
)
def test_another_socket_is_refused_with_the_reason_and_all_are_closed(
    given: Callable[[socket.socket], Passed], make: Callable[[], socket.socket], why: str
) -> None:
    good, address = listening()
    with pytest.raises(StrongroomError, match=f"'gate' .descriptor .*{why}") as raised:
        listeners.adopt([given(good), given(make())], [address])
    assert raised.value.status == USAGE
    assert "strongroom install" in raised.value.hint


def test_one_address_has_one_socket(given: Callable[[socket.socket], Passed]) -> None:
    good, address = listening()
    again = good.dup()
    with pytest.raises(StrongroomError, match="as another one does"):
        listeners.adopt([given(good), given(again)], [address])


def test_a_descriptor_that_is_no_socket_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(StrongroomError, match="is no socket"):
            listeners.adopt([Passed(reading, "gate")], [])
    finally:
        os.close(reading)
        os.close(writing)


def test_what_was_passed_is_for_one_process_and_its_children_hear_nothing_of_it() -> None:
    said = {"LISTEN_FDS": "3", "LISTEN_PID": "7", "LISTEN_FDNAMES": "gate::x", "HOME": "/"}
    environment = dict(said)
    assert listeners.passed(environment, 7) == [Passed(3, "gate"), Passed(4, "unknown"), Passed(5, "x")]
    assert environment == {"HOME": "/"}
    environment = dict(said)
    assert listeners.passed(environment, 8) == []
    assert environment == {"HOME": "/"}
    assert listeners.passed({}, 7) == []
    assert listeners.passed({"LISTEN_FDS": "0", "LISTEN_PID": "7"}, 7) == []
    assert listeners.passed({"LISTEN_FDS": "1", "LISTEN_PID": "7"}, 7) == [Passed(3, "unknown")]


@pytest.mark.parametrize("count", ["x", "-1", "257", "99999999999", "1.0", "٣"])
def test_a_count_that_makes_no_sense_is_refused(count: str) -> None:
    with pytest.raises(StrongroomError, match="LISTEN_FDS"):
        listeners.passed({"LISTEN_FDS": count, "LISTEN_PID": "7"}, 7)
