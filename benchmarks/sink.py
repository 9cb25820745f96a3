"""A null sink: decrypts, walks PDU headers, answers Success. What the client reaches here is the most it can do.

``python -m benchmarks.sink PORT KEY CERT CA [FOLDER]``

With a folder, each data set of up to 1 MB is sealed, written past the page cache into space that holds zeros, and
synced, as Strongroom does it; nothing is looked at, checked, described or indexed. That is the floor of what a durable
receiver in Python takes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import ssl
import struct
import sys
from pathlib import Path

from keys.seal import Sealer
from storage.direct import HALF_BYTES, PAGE, Buffer, create, write_all, zeros

_ZEROED_BYTES = 256 << 20


class _Kept:
    """What is received on one connection, one record after the other."""

    def __init__(self, folder: Path) -> None:
        self._descriptor, _ = create(folder / secrets.token_hex(8), 0o600)
        for offset in range(0, _ZEROED_BYTES, HALF_BYTES):
            write_all(self._descriptor, zeros(), offset)
        os.fdatasync(self._descriptor)
        self._memory = Buffer().halves[0]
        self._key = secrets.token_bytes(32)
        self._offset = 0
        self._begin()

    def _begin(self) -> None:
        self._sealer = Sealer(self._key, secrets.token_bytes(16))
        self._filled = 0

    def take(self, data: memoryview) -> None:
        """Seal a piece of a data set."""
        self._filled += self._sealer.update_into(data, self._memory[self._filled :])

    def end(self) -> None:
        """Make the data set durable."""
        last = self._sealer.finalize()
        self._memory[self._filled : self._filled + len(last)] = last
        until = -(-(self._filled + len(last)) // PAGE) * PAGE
        write_all(self._descriptor, self._memory[:until], self._offset)
        os.fdatasync(self._descriptor)
        self._offset += until
        self._begin()


def main(port: int, key: str, certificate: str, authority: str, folder: str = "") -> None:
    """Serve until killed, a child process a connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)
    listening = socket.create_server(("127.0.0.1", port), backlog=128)
    while True:
        plain, _ = listening.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listening.close()
            with contextlib.suppress(OSError):
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _serve(context.wrap_socket(plain, server_side=True), _Kept(Path(folder)) if folder else None)
            os._exit(0)
        plain.close()


def _serve(connection: ssl.SSLSocket, kept: _Kept | None) -> None:
    buffer = memoryview(bytearray(1 << 18))
    have = 0
    while True:
        # A P-DATA-TF PDU is taken in and dropped; its first item's control byte is all that counts.
        while have < 12:
            have += _some(connection, buffer[have:])
            if have >= 10 and buffer[0] != 4:
                break
        kind, length = buffer[0], int.from_bytes(buffer[2:6], "big") + 6
        while have < min(length, len(buffer)):
            have += _some(connection, buffer[have:])
        if kind == 1:
            connection.sendall(_accept(bytes(buffer[:length])))
        elif kind == 5:
            connection.sendall(struct.pack(">BBII", 6, 0, 4, 0))
            return
        elif kind != 4:
            return
        elif kept is not None and buffer[11] in {0, 2}:
            kept.take(buffer[12:length])
            if buffer[11] == 2:
                kept.end()
        if kind == 4 and (buffer[11] == 2 or (buffer[11] == 3 and buffer[10] == 3)):
            connection.sendall(_response(buffer[10]))
        buffer[: have - length] = bytes(buffer[length:have])
        have -= length


def _some(connection: ssl.SSLSocket, into: memoryview) -> int:
    count = connection.recv_into(into)
    if not count:
        raise OSError("closed")
    return count


def _accept(request: bytes) -> bytes:
    user = struct.pack(">BBHI", 0x51, 0, 4, 131_072)
    contexts = b"".join(
        struct.pack(">BBHBBBB", 0x21, 0, 27, number, 0, 0, 0) + b"\x40\0\0\x131.2.840.10008.1.2.1" for number in (1, 3)
    )
    body = request[6:10] + request[10:74] + contexts + struct.pack(">BBH", 0x50, 0, len(user)) + user
    return struct.pack(">BBI", 2, 0, len(body)) + body


def _response(context: int) -> bytes:
    command = struct.pack("<HHIHHHIH", 0, 0x0100, 2, 0x8001, 0, 0x0900, 2, 0)
    return struct.pack(">BBIIBB", 4, 0, len(command) + 6, len(command) + 2, context, 3) + command


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
