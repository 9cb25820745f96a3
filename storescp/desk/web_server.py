"""uvicorn's edge: connections over TLS with the certificate that they proved, counted, and closed where they idle.

The context of each handshake is the policy's of that moment, so that whoever is removed cannot connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from uvicorn.protocols.http.h11_impl import H11Protocol

from storescp.gate import listeners, tls
from storescp.gate.connection import Policy

_HANDSHAKE_SECONDS = 15.0
_SHUTDOWN_SECONDS = 2.0
HEAD_BYTES = 32_768
_TICK_SECONDS = 0.5
# What a client may leave unread before it is waited for.
_BUFFERED_BYTES = 256 << 10

log = logging.getLogger(__name__)


class Wire:
    """What a request can know and do about its connection."""

    def __init__(self, transport: Any, address: str) -> None:
        self._transport = transport
        self.address = address
        found = transport.get_extra_info("ssl_object")
        self.chain: list[x509.Certificate] = tls.verified_chain(found) if found is not None else []
        self.fingerprint = self.chain[0].fingerprint(SHA256()).hex() if self.chain else ""

    @property
    def is_lost(self) -> bool:
        """Whether nobody is there any more."""
        return bool(self._transport.is_closing())

    def abort(self) -> None:
        """End it at once: what was sent must not look whole."""
        self._transport.abort()


class Protocol(H11Protocol):
    """HTTP/1.1 on a connection; ``app_state`` has its wire for the application."""

    waiting: float | None = None
    ended: Callable[[], None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection whose handshake is over."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_BUFFERED_BYTES)
        self.waiting = self.loop.time()
        self.app_state = {"wire": Wire(transport, self.client[0] if self.client else "")}

    def connection_lost(self, exc: Exception | None) -> None:
        """Hear that it ended."""
        super().connection_lost(exc)
        self.ended()

    def handle_events(self) -> None:
        """Take what came; a whole request's head ends the wait for one."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.waiting = None

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.waiting = self.loop.time()
        super().on_response_complete()


class Server(uvicorn.Server):
    """Serves an application on listening sockets, in a thread of its own."""

    def __init__(
        self, app: Any, policy: Callable[[], Policy], sockets: list[socket.socket], *, most: int, idle_seconds: float
    ) -> None:
        """Prepare.

        Args:
            app: ASGI.
            policy: Returns what connections are judged by.
            sockets: Listening; closed in the end.
            most: Connections at a time; more are closed.
            idle_seconds: How long a connection may have no whole request.
        """
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=int(idle_seconds) + 1,
        )
        super().__init__(config)
        # What it would log names nothing that ours does not, and its requests are patients'.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._policy = policy
        self._listening = sockets
        self._most = most
        self._idle = idle_seconds
        self._open = 0
        self._work: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Task[None]] = set()
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        self.servers = []
        self._work = [asyncio.create_task(self._accept(sock)) for sock in self._listening]
        self._work.append(asyncio.create_task(self._watch()))
        self.started = True
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and let requests that are under way end."""
        for task in [*self._work, *self._handshakes]:
            task.cancel()
        for sock in self._listening:
            sock.close()
        await super().shutdown()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:
                # Out of descriptors or memory: connections that end free some.
                log.error("a connection cannot be accepted: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            if self._open >= self._most:
                log.warning(
                    "connection from %s refused: as many as desk.maximum_associations are open", listeners.text(address)
                )
                connection.close()
                continue
            self._open += 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(self._begin(connection, listeners.text(address)))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _begin(self, connection: socket.socket, address: str) -> None:
        made: list[Protocol] = []
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._protocol(made),
                connection,
                ssl=self._policy().context,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
            )
        except OSError as error:
            reason = tls.explain(error) if isinstance(error, ssl.SSLError) else "no TLS handshake was finished"
            log.warning("connection from %s refused: %s", address, reason)
        finally:
            # A protocol that got its connection hears of its end itself.
            if not made or made[0].transport is None:
                self._open -= 1
                connection.close()

    def _protocol(self, made: list[Protocol]) -> Protocol:
        protocol = Protocol(self.config, self.server_state, {})
        protocol.ended = self._ended
        made.append(protocol)
        return protocol

    def _ended(self) -> None:
        self._open -= 1

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            for protocol in list(self.server_state.connections):
                waiting = getattr(protocol, "waiting", None)
                if waiting is not None and loop.time() - waiting > self._idle:
                    # However often single bytes of a request come.
                    protocol.transport.abort()


def run(server: Server) -> None:
    """Run a server until it is told to stop; in a thread there are no signal handlers."""
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(server.serve())
