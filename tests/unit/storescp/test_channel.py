"""The channel between the gate's first process and a worker: whole messages, descriptors, or one error."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storescp.gate import channel
from storescp.gate.channel import ChannelError, Message

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Pair]:
    one, other = channel.pair()
    with one, other:
        yield one, other


@pytest.mark.parametrize(
    "message", [Message("ended", 7), Message("kept", 0, "ä 患者 " * 100), Message("room", -(1 << 60))]
)
def test_a_message_arrives_as_it_was_sent(ends: Pair, message: Message) -> None:
    for sender, receiver in (ends, ends[::-1]):
        channel.send(sender, message)
        assert channel.receive(receiver) == (message, [])


def test_messages_arrive_one_by_one_in_their_order(ends: Pair) -> None:
    for number in range(20):
        channel.send(ends[0], Message("ended", number))
    assert [channel.receive(ends[1])[0].number for _ in range(20)] == list(range(20))


def test_a_descriptor_arrives_with_its_message_and_not_with_the_next(ends: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with (tmp_path / "file").open("rb") as file:
        channel.send(ends[0], Message("connection", 1, "127.0.0.1:4711"), file.fileno())
        channel.send(ends[0], Message("room", 5))
    message, [descriptor] = channel.receive(ends[1])
    try:
        assert message == Message("connection", 1, "127.0.0.1:4711")
        assert os.read(descriptor, 100) == b"content"
    finally:
        os.close(descriptor)
    assert channel.receive(ends[1]) == (Message("room", 5), [])


def test_a_connection_lives_on_where_the_sender_closed_it(ends: Pair) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            channel.send(ends[0], Message("connection", 1), theirs.fileno())
        _, [descriptor] = channel.receive(ends[1])
        with socket.socket(fileno=descriptor) as taken:
            ours.sendall(b"hello")
            assert taken.recv(10) == b"hello"
        assert ours.recv(10) == b""


def test_a_closed_other_side_is_told(ends: Pair) -> None:
    channel.send(ends[0], Message("ended", 3))
    ends[0].close()
    assert channel.receive(ends[1])[0].number == 3
    with pytest.raises(ChannelError, match=r"^closed$"):
        channel.receive(ends[1])
    with pytest.raises(BrokenPipeError):
        channel.send(ends[1], Message("ended", 3))


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"null",
        b"\xff",
        b'{"kind":1}',
        b'{"kind":"ended","number":"7"}',
        b'{"kind":"ended","more":1}',
        b"[" * 4000,
    ],
)
def test_malformed_bytes_are_one_error(ends: Pair, content: bytes) -> None:
    ends[0].send(content)
    with pytest.raises(ChannelError, match=r"^malformed message$"):
        channel.receive(ends[1])


def test_a_message_that_is_too_long_is_not_taken_in_part(ends: Pair) -> None:
    ends[0].send(b'{"kind":"ended","number":7}' + b" " * 5000 + b"x")
    ends[0].send(b'{"kind":"ended","text":"' + b"x" * 5000 + b'"}')
    with contextlib.suppress(ChannelError):
        assert channel.receive(ends[1])[0] == Message("ended", 7)
    with pytest.raises(ChannelError):
        channel.receive(ends[1])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(min_size=1, max_size=5000))
def test_any_bytes_are_a_message_or_a_channel_error(content: bytes) -> None:
    one, other = channel.pair()
    with one, other:
        one.send(content)
        with contextlib.suppress(ChannelError):
            assert isinstance(channel.receive(other)[0], Message)


def test_who_must_not_wait_is_told_that_nothing_is_there_or_no_more_fits(ends: Pair) -> None:
    ends[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        channel.receive(ends[0])
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            channel.send(ends[0], Message("ended", sent))
            sent += 1
    assert [channel.receive(ends[1])[0].number for _ in range(sent)] == list(range(sent))


def test_descriptors_that_nobody_wants_are_closed_and_none_is_inherited(ends: Pair) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        socket.send_fds(ends[0], [b"x"], [ends[0].fileno()])
        with pytest.raises(ChannelError):
            channel.receive(ends[1])
    assert len(os.listdir("/proc/self/fd")) == before
    channel.send(ends[0], Message("connection", 1), ends[0].fileno())
    _, descriptors = channel.receive(ends[1])
    assert [os.get_inheritable(descriptor) for descriptor in descriptors] == [False]
    channel.close(descriptors)
    assert len(os.listdir("/proc/self/fd")) == before
