"""A connection's stream over real TLS: all bytes, in batches, and every wait has an end."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import trustme

from storescp.gate.stream import StoppingError, Stream

RECORD = 16_384
CONTENT = random.Random(5).randbytes(3 << 20)
LONG = 20.0


class Ends(NamedTuple):
    """A stream, the peer's end, and what tells the stream that the server is stopping."""

    stream: Stream
    peer: ssl.SSLSocket
    stopping: threading.Event


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("gate.example").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
def ends(request: pytest.FixtureRequest, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[Ends]:
    server, client = contexts
    client.minimum_version = ssl.TLSVersion.TLSv1_2
    client.maximum_version = request.param
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as other:
        accepted = other.submit(server.wrap_socket, ours, server_side=True)
        peer = client.wrap_socket(theirs, server_hostname="gate.example")
        stopping = threading.Event()
        connection = accepted.result()
        stream = Stream(connection, stopping.is_set)
    with peer, connection:
        assert peer.version() == request.param.name.replace("_", ".")
        yield Ends(stream, peer, stopping)


@pytest.fixture
def buffer() -> memoryview:
    return memoryview(bytearray(8 * RECORD))


def collect(ends: Ends, buffer: memoryview, count: int) -> bytes:
    """Receive so many bytes."""
    found = bytearray()
    while len(found) < count:
        received = ends.stream.receive(buffer, LONG, between=False)
        assert received
        found += buffer[:received]
    return bytes(found)


def close_notify(peer: ssl.SSLSocket) -> None:
    peer.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.unwrap()


@pytest.mark.parametrize("most", [40, 5000, 100_000, len(CONTENT)])
@pytest.mark.parametrize("room", [RECORD, 2 * RECORD + 1, 8 * RECORD])
def test_bytes_in_any_pieces_arrive_whole(ends: Ends, buffer: memoryview, most: int, room: int) -> None:
    chance = random.Random(most)
    content = CONTENT[: most * 300]

    def send() -> None:
        view = memoryview(content)
        while view:
            count = chance.randint(1, most)
            ends.peer.sendall(view[:count])
            view = view[count:]

    with ThreadPoolExecutor(1) as other:
        sent = other.submit(send)
        assert collect(ends, buffer[:room], len(content)) == content
        sent.result()


@pytest.mark.parametrize("records", [1, 2, 3, 8])
def test_what_ends_with_a_full_record_does_not_wait_for_more(ends: Ends, buffer: memoryview, records: int) -> None:
    ends.peer.sendall(CONTENT[: records * RECORD])
    began = time.monotonic()
    assert collect(ends, buffer, records * RECORD) == CONTENT[: records * RECORD]
    assert time.monotonic() - began < LONG / 2


def test_what_is_there_is_taken_in_one_batch(ends: Ends, buffer: memoryview) -> None:
    ends.peer.sendall(CONTENT[: 3 * RECORD + 100])
    assert ends.stream.receive(buffer, LONG, between=False) == 3 * RECORD + 100
    assert buffer[: 3 * RECORD + 100] == CONTENT[: 3 * RECORD + 100]


def test_no_more_is_received_than_there_is_room_for(ends: Ends, buffer: memoryview) -> None:
    ends.peer.sendall(CONTENT[: 4 * RECORD])
    buffer[2 * RECORD :] = bytes(6 * RECORD)
    assert ends.stream.receive(buffer[: 2 * RECORD], LONG, between=False) == 2 * RECORD
    assert not any(buffer[2 * RECORD :])
    assert ends.stream.receive(buffer, LONG, between=False) == 2 * RECORD
    assert buffer[: 2 * RECORD] == CONTENT[2 * RECORD : 4 * RECORD]


@pytest.mark.parametrize("between", [False, True])
def test_a_silent_peer_is_waited_for_so_long_and_no_longer(ends: Ends, buffer: memoryview, between: bool) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ends.stream.receive(buffer, 0.2, between=between)
    assert 0.2 <= time.monotonic() - began < 5


def test_a_part_of_a_tls_record_is_not_enough_to_wait_longer(ends: Ends, buffer: memoryview) -> None:
    # Below TLS: five bytes that announce a record, and nothing of it.
    socket.socket.send(ends.peer, b"\x17\x03\x03\x01\x00")
    with pytest.raises(TimeoutError):
        ends.stream.receive(buffer, 0.2, between=False)


def test_a_peer_between_two_messages_is_told_of_the_stop_and_one_within_a_message_is_not(
    ends: Ends, buffer: memoryview
) -> None:
    ends.stopping.set()
    with pytest.raises(StoppingError):
        ends.stream.receive(buffer, LONG, between=True)
    with pytest.raises(TimeoutError):
        ends.stream.receive(buffer, 0.1, between=False)
    ends.peer.sendall(b"the rest")
    assert collect(ends, buffer, 8) == b"the rest"


def test_what_came_before_the_stop_is_received_also_between_messages(ends: Ends, buffer: memoryview) -> None:
    ends.peer.sendall(b"a message")
    ends.stopping.set()
    assert ends.stream.receive(buffer, LONG, between=True) == 9


def test_a_peer_that_is_about_to_speak_is_heard_before_it_is_told_of_the_stop(ends: Ends, buffer: memoryview) -> None:
    ends.stopping.set()
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(ends.stream.receive, buffer, LONG, between=True)
        time.sleep(0.1)
        ends.peer.sendall(b"a release")
        assert waiting.result(LONG) == 9


def test_a_wait_between_messages_ends_soon_when_the_stop_comes(ends: Ends, buffer: memoryview) -> None:
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(ends.stream.receive, buffer, LONG, between=True)
        ends.stopping.set()
        with pytest.raises(StoppingError):
            waiting.result(5)


def test_all_is_sent_to_a_peer_that_reads(ends: Ends) -> None:
    def read() -> bytes:
        found = bytearray()
        while len(found) < len(CONTENT):
            found += ends.peer.recv(100_000)
        return bytes(found)

    with ThreadPoolExecutor(1) as other:
        reading = other.submit(read)
        ends.stream.send(CONTENT, LONG)
        assert reading.result(LONG) == CONTENT


def test_both_sides_may_send_at_once(ends: Ends, buffer: memoryview) -> None:
    def echo() -> bytes:
        ends.peer.sendall(CONTENT)
        return ends.peer.recv(100)

    with ThreadPoolExecutor(1) as other:
        echoed = other.submit(echo)
        ends.stream.send(b"an answer", LONG)
        assert collect(ends, buffer, len(CONTENT)) == CONTENT
        assert echoed.result(LONG) == b"an answer"


def test_a_peer_that_takes_nothing_is_waited_for_so_long_and_no_longer(ends: Ends) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ends.stream.send(bytes(16 << 20), 0.2)
    assert 0.2 <= time.monotonic() - began < 5


def test_a_peer_that_closes_is_an_end_after_what_it_sent(ends: Ends, buffer: memoryview) -> None:
    ends.peer.sendall(CONTENT[:RECORD])
    close_notify(ends.peer)
    assert collect(ends, buffer, RECORD) == CONTENT[:RECORD]
    for _ in range(2):
        assert ends.stream.receive(buffer, LONG, between=False) == 0


def test_a_peer_that_is_gone_without_a_word_is_an_end_or_an_error_and_nobody_waits(
    ends: Ends, buffer: memoryview
) -> None:
    ends.peer.close()
    try:
        assert ends.stream.receive(buffer, LONG, between=False) == 0
    except TimeoutError:
        pytest.fail("it waited")
    except OSError:
        return


def test_bytes_that_are_no_tls_are_an_error_that_is_documented(ends: Ends, buffer: memoryview) -> None:
    socket.socket.send(ends.peer, b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(OSError, match=r"DECRYPTION|BAD_RECORD|bad record"):
        ends.stream.receive(buffer, LONG, between=False)


def test_finishing_reads_away_what_the_peer_still_sends_and_ends_when_it_closes(ends: Ends) -> None:
    ends.stream.send(b"the last reply", LONG)
    ends.peer.sendall(CONTENT[: 5 * RECORD])
    with ThreadPoolExecutor(1) as other:
        finishing = other.submit(ends.stream.finish, LONG)
        time.sleep(0.1)
        ends.peer.sendall(CONTENT[:RECORD])
        assert ends.peer.recv(100) == b"the last reply"
        assert not finishing.done()
        ends.peer.close()
        finishing.result(LONG / 2)


def test_finishing_waits_so_long_and_no_longer_also_for_a_peer_that_keeps_sending(ends: Ends) -> None:
    ended = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(0.01):
                ends.peer.sendall(b"more")

    with ThreadPoolExecutor(1) as other:
        sending = other.submit(send)
        began = time.monotonic()
        ends.stream.finish(0.3)
        assert 0.3 <= time.monotonic() - began < 5
        ended.set()
        sending.result(LONG)


def test_finishing_with_a_peer_that_is_gone_is_no_error(ends: Ends) -> None:
    ends.peer.close()
    ends.stream.finish(LONG)
    ends.stream.finish(LONG)
