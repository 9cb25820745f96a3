"""Readiness for systemd and the supervisor: one datagram to ``NOTIFY_SOCKET`` (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket


def ready() -> None:
    """Say that the process serves."""
    _send("READY=1")


def stopping() -> None:
    """Say that the process is about to end."""
    _send("STOPPING=1")


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(message.encode())
