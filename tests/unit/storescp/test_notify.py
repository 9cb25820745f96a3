"""What is told to systemd: that a process is ready, and that its loop turns."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from storescp import notify


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        # The system chooses an abstract name.
        sock.bind("")
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        yield sock


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def heard(sock: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(sock.recv(256))
        except BlockingIOError:
            return found


def test_a_loop_that_turns_says_so_at_once_and_then_at_half_of_the_interval(told: socket.socket) -> None:
    clock = Clock()
    dog = notify.Watchdog({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "7"}, pid=7, clock=clock)
    assert dog.seconds == 30.0
    said = []
    for second in range(61):
        clock.now = 100.0 + second
        if dog.turn():
            said.append(second)
    assert said == [0, 30, 60]
    assert heard(told) == [b"WATCHDOG=1"] * 3


def test_a_loop_that_stands_still_is_silent_and_makes_up_for_nothing(told: socket.socket) -> None:
    clock = Clock()
    dog = notify.Watchdog({"WATCHDOG_USEC": "2000000"}, pid=7, clock=clock)
    dog.turn()
    clock.now += 500
    assert [dog.turn(), dog.turn()] == [True, False]
    assert heard(told) == [b"WATCHDOG=1"] * 2


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "8"},
        {"WATCHDOG_USEC": "", "WATCHDOG_PID": "7"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "1e6"},
        {"WATCHDOG_USEC": "٣"},
        {"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "x"},
    ],
)
def test_without_a_watchdog_of_this_process_nothing_is_said(told: socket.socket, environment: dict[str, str]) -> None:
    assert not notify.Watchdog(environment, pid=7, clock=Clock()).turn()
    assert heard(told) == []


def test_readiness_and_the_end_are_one_datagram_each(told: socket.socket) -> None:
    notify.ready()
    notify.stopping()
    assert heard(told) == [b"READY=1", b"STOPPING=1"]
