"""Messages of an association, over a real connection: whole however they are cut, bounded, and in time."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from storescp.desk.messages import EndedError, Message, Messages, UnsentError
from storescp.gate import dimse, wire
from storescp.gate.stream import StoppingError, Stream
from storescp.gate.wire import WireError

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
LONG = 20.0
MAXIMUM = 16_384


class Ends:
    """Messages, and the other side's socket."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.ours = ours
        self.stopping = threading.Event()
        self.stream = Stream(ours, self.stopping.is_set)
        self.messages = Messages(self.stream, wire.Reader(MAXIMUM), [], MAXIMUM, LONG)

    def give(self, content: bytes) -> None:
        self.peer.sendall(content)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.ours.close()
    made.peer.close()


def command(field: int, *, data_set: bool, message_id: int = 1) -> bytes:
    """Return a request's or a response's command set."""
    number = dimse._short(0x0120, message_id) if field & 0x8000 or field == 0x0FFF else dimse._short(0x0110, message_id)
    kind = dimse._short(0x0800, 1 if data_set else 0x0101)
    status = dimse._short(0x0900, 0) if field & 0x8000 else b""
    return b"".join([dimse._text(0x0002, FIND, b"\0"), dimse._short(0x0100, field), number, kind, status])


def pdus(content: bytes, *, is_command: bool, context_id: int = 1, maximum: int = 64) -> bytes:
    return wire.data_pdus(context_id, command=is_command, content=content, maximum=maximum)


FOUND = command(0x0020, data_set=True)
ANSWERED = command(0x8001, data_set=False)
CANCELLED = command(0x0FFF, data_set=False)
RECEIVED = [Message(1, FOUND, b"identifier" * 20), Message(3, ANSWERED, None), Message(1, CANCELLED, None)]
SENT = b"".join(
    pdus(message.command, is_command=True, context_id=message.context_id)
    + (b"" if message.data is None else pdus(message.data, is_command=False, context_id=message.context_id))
    for message in RECEIVED
)


def test_messages_are_the_same_however_they_are_cut(ends: Ends) -> None:
    chance = random.Random(4)
    for _ in range(60):
        cuts = sorted(chance.randrange(len(SENT)) for _ in range(chance.randrange(6)))
        got: list[Message] = []
        for a, b in zip([0, *cuts], [*cuts, len(SENT)], strict=True):
            ends.give(SENT[a:b])
            while (message := ends.messages.poll()) is not None:
                got.append(message)
        assert got == RECEIVED


def test_what_came_with_the_negotiation_is_the_first_message() -> None:
    ours, peer = socket.socketpair()
    with ours, peer:
        reader = wire.Reader(MAXIMUM)
        rest = list(reader.receive(memoryview(SENT)))
        messages = Messages(Stream(ours, lambda: False), reader, rest, MAXIMUM, LONG)
        assert [messages.next(0.0) for _ in RECEIVED] == RECEIVED
        assert messages.poll() is None


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (wire.abort(reason=0), "aborted by the peer"),
        (wire.release_request(), "released"),
        (wire.release_reply(), "released by us"),
        (b"", "closed by the peer without a release"),
    ],
)
def test_what_came_before_the_end_is_still_given(ends: Ends, last: bytes, says: str) -> None:
    ends.give(SENT + last)
    if not last:
        ends.peer.shutdown(socket.SHUT_WR)
    assert [ends.messages.next(LONG) for _ in RECEIVED] == RECEIVED
    for _ in range(2):
        with pytest.raises(EndedError, match=says):
            ends.messages.next(LONG)
    with pytest.raises(EndedError, match=says):
        ends.messages.poll()
    if says == "released":
        assert ends.peer.recv(100) == wire.release_reply()


HEAD = pdus(FOUND, is_command=True)


@pytest.mark.parametrize(
    "wrong",
    [
        pdus(b"data", is_command=False),
        HEAD + pdus(b"data", is_command=False, context_id=3),
        HEAD + HEAD,
        HEAD + wire.release_request(),
        HEAD[:-20][: 6 + 64] + wire.release_request(),
        wire.reject(permanent=True, source=1, reason=1),
        pdus(b"no command", is_command=True),
        pdus(FOUND[:-3], is_command=True),
        pdus(command(0x0020, data_set=True)[:64] * 300, is_command=True),
        HEAD + pdus(bytes((1 << 20) + 1), is_command=False, maximum=16_384),
        b"\x04\0\0\0\0\x07\0\0\0\3\1\1x" + b"\x04\0\0\0\0\x07\0\0\0\3\3\3x",
        b"\x09\0\0\0\0\x04" + bytes(4),
    ],
)
def test_what_breaks_the_protocol_is_an_error(ends: Ends, wrong: bytes) -> None:
    sending = threading.Thread(target=lambda: contextlib.suppress(OSError) and ends.give(wrong), daemon=True)
    sending.start()
    with pytest.raises(WireError):
        ends.messages.next(LONG)


def test_single_bytes_do_not_make_a_wait_longer(monkeypatch: pytest.MonkeyPatch, ends: Ends) -> None:
    """A peer that lets bytes trickle in holds its association no longer than a quiet one."""
    now = [1000.0]

    class Trickle:
        """A stream on which each read takes nine seconds and brings a byte."""

        waited: list[float] = []  # noqa: RUF012

        def receive(self, into: memoryview, seconds: float, *, between: bool) -> int:
            self.waited.append(seconds)
            if seconds <= 0:
                raise TimeoutError
            now[0] += 9.0
            into[:1] = SENT[len(self.waited) - 1 : len(self.waited)]
            return 1

    monkeypatch.setattr("storescp.desk.messages.time.monotonic", lambda: now[0])
    for between in (False, True):
        stream = Trickle()
        stream.waited.clear()
        messages = Messages(stream, wire.Reader(MAXIMUM), [], MAXIMUM, 30.0)  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            messages.next(30.0, between=between)
        # While nothing was under way, the first byte begins a message, and that has its own time.
        assert len(stream.waited) == (6 if between else 5)
        assert not messages.between


def test_only_between_two_messages_is_a_peer_told_to_go(ends: Ends) -> None:
    ends.stopping.set()
    with pytest.raises(StoppingError):
        ends.messages.next(LONG, between=True)
    assert ends.messages.between
    ends.give(HEAD)
    ends.give(pdus(b"identifier", is_command=False))
    assert ends.messages.next(LONG, between=True).data == b"identifier"


def test_an_object_is_sent_with_its_command_and_read_whole(ends: Ends) -> None:
    data = random.Random(1).randbytes(300_000)
    parts = [memoryview(data)[i : i + 70_001] for i in range(0, len(data), 70_001)]
    ours = threading.Thread(target=ends.messages.send_object, args=(5, FOUND, parts, len(data)))
    ours.start()
    reader, found = wire.Reader(MAXIMUM), {True: b"", False: b""}
    while True:
        for event in reader.receive(memoryview(ends.peer.recv(1 << 16))):
            assert isinstance(event, wire.Fragment)
            found[event.command] += event.data
            if event.last and not event.command:
                ours.join()
                assert found == {True: FOUND, False: data}
                return


def _broken(count: int) -> Callable[[], Iterator[bytes]]:
    def parts() -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(8192)
        raise KeyError

    return parts


def test_what_fails_before_anything_was_sent_leaves_the_association_as_it_was(ends: Ends) -> None:
    for count, length in ((0, 8), (1, 8192), (0, 0)):
        with pytest.raises(UnsentError) as unsent:
            ends.messages.send_object(5, FOUND, _broken(count)(), length)
        assert isinstance(unsent.value.__cause__, KeyError)
    with pytest.raises(UnsentError):
        ends.messages.send_object(5, FOUND, [b"ab"], 1)
    ends.peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        ends.peer.recv(1)
    with pytest.raises(KeyError):
        ends.messages.send_object(5, FOUND, _broken(5)(), 5 * 8192)
    assert ends.peer.recv(1)


def test_a_peer_that_takes_nothing_is_given_up() -> None:
    ours, peer = socket.socketpair()
    with ours, peer:
        messages = Messages(Stream(ours, lambda: False), wire.Reader(MAXIMUM), [], MAXIMUM, 0.01)
        with pytest.raises(TimeoutError):
            messages.send_object(1, FOUND, [bytes(1 << 22)], 1 << 22)


def test_a_peer_without_room_for_a_byte_is_an_error(ends: Ends) -> None:
    messages = Messages(ends.stream, wire.Reader(MAXIMUM), [], 6, LONG)
    with pytest.raises(WireError, match="no room"):
        messages.send(1, FOUND)
