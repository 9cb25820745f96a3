"""A TLS tunnel for clients that speak none: DCMTK's getscu and movescu up to 3.6.7."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def tunnel(issued: Path, title: str, port: int) -> Iterator[int]:
    """Give a port without TLS on this machine; what comes there goes on over TLS, as a peer.

    Args:
        issued: The peer's folder, as ``peer add --issue`` made it.
        title: Its AE title.
        port: Of the server.
    """
    context = ssl.create_default_context(cafile=str(issued / "ca.pem"))
    context.check_hostname = False
    context.load_cert_chain(issued / f"{title}.pem", issued / f"{title}.key")
    taken: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(target: Callable[..., None], *arguments: socket.socket) -> None:
        threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        threads[-1].start()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listening.accept()
                taken.append(plain)
                secured = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
                taken.append(secured)
                start(_pump, plain, secured)
                start(_pump, secured, plain)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        start(accept)
        try:
            yield int(listening.getsockname()[1])
        finally:
            for one in (listening, *taken):
                with contextlib.suppress(OSError):
                    # Beneath TLS; whoever waits on it sees its end.
                    socket.socket.shutdown(one, socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)
            for one in taken:
                one.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            socket.socket.shutdown(one, socket.SHUT_RDWR)
