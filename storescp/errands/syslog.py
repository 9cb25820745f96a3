"""Syslog over TLS as RFC 5425 has it: frames, and a connection whose end says whether everything was read.

TLS and TCP acknowledge nothing to whoever sends: what the kernel took may be lost with the connection. So a connection
is ended in order: all is sent, this side says so and closes its half, and waits for the other's. A server that closes
without having read everything, or dies, resets the connection; one that closes after our end has read it all.
Source: RFC 5424, RFC 5425.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import struct
import time

from storescp.auditspool import Message
from storescp.errands.connection import DeliveryError, told

STEP_SECONDS = 15.0
_READ_BYTES = 1 << 16
_POLL_SECONDS = 0.01
# The first byte of struct tcp_info (linux/tcp.h): the connection's state.
_CLOSED, _TIME_WAIT = 7, 6
# By the outcome of a DICOM audit message: notice, warning, error, critical.
_SEVERITIES = {0: 5, 4: 4, 8: 3, 12: 2}
_NO_PRINTABLE = re.compile(r"[^!-~]")
_NO_PARAMETER = re.compile(r'(["\\\]])')


def frame(message: Message, host: str, process: int, facility: int, enterprise: int) -> bytes:
    """Return a message as RFC 5424 has it, with its length before it.

    Args:
        message: The audit message; its number and head become structured data.
        host: Name of this machine.
        process: Of whoever sends.
        facility: 0 to 23.
        enterprise: The number in the structured data's name.
    """
    priority = 8 * facility + _SEVERITIES.get(message.outcome, 5)
    data = [("seq", str(message.seq)), ("record", str(message.record))] if message.seq else []
    data += [("head", message.head)] if message.head else []
    said = "".join(f' {name}="{_NO_PARAMETER.sub(_ESCAPED, value)}"' for name, value in data)
    structured = f"[strongroom@{enterprise}{said}]" if data else "-"
    name = _NO_PRINTABLE.sub("?", host)[:255] or "-"
    # The byte order mark says that the text is UTF-8.
    line = f"<{priority}>1 {message.time} {name} strongroom {process} DICOM+RFC3881 {structured} \ufeff{message.xml}"
    content = line.encode()
    return str(len(content)).encode() + b" " + content


_ESCAPED = r"\\\1"


def context(trust: str, certificate: str = "", private_key: str = "") -> ssl.SSLContext:
    """Return how the server is checked: by these authorities alone, and by its name.

    Raises:
        OSError: A file cannot be read, or holds nothing that is wanted.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_verify_locations(cafile=trust)
    if certificate:
        made.load_cert_chain(certificate, private_key)
    return made


class Channel:
    """One connection to a syslog server."""

    def __init__(self, host: str, port: int, context_: ssl.SSLContext) -> None:
        """Connect.

        Raises:
            DeliveryError: There is no server, or not that one.
        """
        with told():
            self._socket = socket.create_connection((host, port), timeout=STEP_SECONDS)
            self._read, self._write = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = context_.wrap_bio(self._read, self._write, server_hostname=host)
            try:
                self._shake()
            except BaseException:
                self._socket.close()
                raise

    def _shake(self) -> None:
        until = time.monotonic() + STEP_SECONDS
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if time.monotonic() > until:
                    raise TimeoutError from None
                content = self._socket.recv(_READ_BYTES)
                if not content:
                    raise ConnectionResetError("closed in the middle of the handshake") from None
                self._read.write(content)
            else:
                self._flush()
                return

    def _flush(self) -> None:
        if self._write.pending:
            self._socket.sendall(self._write.read())

    def send(self, frames: bytes) -> None:
        """Send frames; whether they arrive is known after ``finish``.

        Raises:
            DeliveryError: The connection broke.
        """
        with told():
            self._look()
            self._tls.write(frames)
            self._flush()

    def _look(self) -> None:
        """Notice an end or an alert that came meanwhile."""
        while select.select([self._socket], [], [], 0)[0]:
            self._take(self._socket.recv(_READ_BYTES))

    def _take(self, content: bytes) -> None:
        """Take what the server says, which is nothing but alerts, session tickets and its end."""
        if not content:
            raise ConnectionResetError("the server closed the connection")
        self._read.write(content)
        with contextlib.suppress(ssl.SSLWantReadError):
            while self._tls.read(_READ_BYTES):
                pass
            raise ConnectionResetError("the server ended the connection")

    def finish(self) -> None:
        """End the connection in order. When this returns, the server has read everything that was sent.

        Raises:
            DeliveryError: Nobody can tell how much of it was read.
        """
        with told():
            try:
                self._look()
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLSyscallError):
                    self._tls.unwrap()
                self._flush()
                self._socket.shutdown(socket.SHUT_WR)
                self._await_end()
            finally:
                self.close()

    def _await_end(self) -> None:
        until = time.monotonic() + STEP_SECONDS
        while content := self._socket.recv(_READ_BYTES):
            self._read.write(content)
            # An alert here is a refusal: a server may look at our certificate after the handshake (TLS 1.3).
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                self._tls.unwrap()
            if time.monotonic() > until:
                raise TimeoutError
        # Its end came. That ours arrived too, and nothing was reset, shows when the connection is gone for good.
        while (state := self._state()) not in {_CLOSED, _TIME_WAIT}:
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(_POLL_SECONDS if state else 0)
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, "the server reset the connection")

    def _state(self) -> int:
        return int(struct.unpack("B", self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1))[0])

    def close(self) -> None:
        """Let go of the connection, as it is."""
        self._socket.close()


__all__ = ["Channel", "DeliveryError", "context", "frame"]
