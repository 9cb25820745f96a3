"""Between the gate's first process and its workers: small messages, one with a connection's descriptor."""

from __future__ import annotations

import os
import socket
from typing import TypeVar

import msgspec

_MESSAGE_BYTES = 4096
_T = TypeVar("_T")

# From the gate: ``connection`` (with the descriptor), ``plaintext`` (the same, with the listener's place in the
# configuration before the address), ``reload``, ``room`` (of the archive, in bytes), ``granted`` and ``denied`` (a
# claim), ``hold`` (a peer that has to wait), ``refused`` (what it turned away itself, for the audit chain). From a
# worker: ``ready``, ``ended``, ``peers`` (how many it knows after a reload), ``kept`` (why it kept the ones it had),
# ``claim`` (an association), ``used`` (what a peer stored), ``counted`` (what a peer did, for the metrics).


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message; ``number`` is a connection's, or a count."""

    kind: str
    number: int = 0
    text: str = ""


class Refused(msgspec.Struct, frozen=True):
    """What the gate's first process turned away, so many times (the message's number)."""

    address: str
    reason: str


class ChannelError(Exception):
    """The other side sent something else than a message."""


class ClosedError(ChannelError):
    """The other side is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, message: Message, *descriptors: int) -> None:
    """Send a message, whole or not at all.

    Raises:
        OSError: It cannot be sent; BlockingIOError, where the channel must not wait and is full.
    """
    socket.send_fds(channel, [msgspec.json.encode(message)], descriptors)


def receive(channel: socket.socket) -> tuple[Message, list[int]]:
    """Return the next message and the descriptors that came with it.

    Raises:
        ClosedError: There is none any more.
        ChannelError: It is malformed.
        OSError: It cannot be received; BlockingIOError, where the channel must not wait and is empty.
    """
    try:
        content, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
    except ConnectionResetError:
        # It ended with messages unread.
        raise ClosedError("closed") from None
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    try:
        return msgspec.json.decode(content, type=Message), descriptors
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        close(descriptors)
        if not content:
            raise ClosedError("closed") from None
        raise ChannelError("malformed message") from None


def content(message: Message, kind: type[_T]) -> _T:
    """Return what a message's text holds.

    Raises:
        ChannelError: It is malformed.
    """
    try:
        return msgspec.json.decode(message.text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ChannelError("malformed message") from None


def with_content(kind: str, number: int, value: msgspec.Struct) -> Message:
    """Return a message whose text holds a struct."""
    return Message(kind, number, msgspec.json.encode(value).decode())


def close(descriptors: list[int]) -> None:
    """Close descriptors that came with a message and are not wanted."""
    for descriptor in descriptors:
        os.close(descriptor)
