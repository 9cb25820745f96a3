"""Accepting connections: limits before TLS, the handshake in the connection's own thread, draining at the end."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import ssl
import threading
import time

from storage.deposit import Deposits
from storescp.config import Gate, parse_address
from storescp.gate import negotiate, tls, wire
from storescp.gate.receive import Association, Origin, close, new_association_id
from storescp.peers import Peers
from storescp.space import Watch

_BACKLOG = 128

log = logging.getLogger(__name__)


class _Connection:
    """A connection and what it is doing: at most one thread writes each of these, and others only read them."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.socket = sock
        self.address = address
        self.thread: threading.Thread | None = None
        self.association: Association | None = None
        self.deadline: float | None = None

    def shut(self) -> None:
        """Make the connection's thread see an end of data. Not by SSLSocket.shutdown: it drops the TLS state."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class Policy:
    """What a connection is judged by; replaced whole when peers or certificates change."""

    def __init__(self, peers: Peers, context: ssl.SSLContext) -> None:
        self.peers = peers
        self.context = context


class Listener:
    """Listens on the configured addresses and runs each connection in a thread of its own."""

    def __init__(self, settings: Gate, policy: Policy, deposits: Deposits, space: Watch) -> None:
        """Bind the addresses.

        Raises:
            OSError: One cannot be bound.
        """
        self.policy = policy
        self._settings = settings
        self._deposits = deposits
        self._space = space
        self._lock = threading.Lock()
        self._running: set[_Connection] = set()
        self._stopping = threading.Event()
        self._sockets = [_bind(*parse_address(address)) for address in settings.listen]

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the ports that the system chose."""
        return [_name(s.getsockname()) for s in self._sockets]

    def start(self) -> None:
        """Begin to accept, in a thread an address."""
        for sock in self._sockets:
            threading.Thread(target=self._accept, args=(sock,), daemon=True, name="accept").start()

    def enforce(self) -> None:
        """Shut connections down whose phase takes too long in total, however often single bytes come."""
        now = time.monotonic()
        for connection in self._snapshot():
            if connection.deadline is not None and now > connection.deadline:
                connection.shut()

    def stop(self) -> None:
        """Accept no more; let associations in transfer finish within the configured time; close what is left."""
        self._stopping.set()
        for sock in self._sockets:
            close(sock)
        deadline = time.monotonic() + self._settings.drain_seconds
        while (left := self._snapshot()) and time.monotonic() < deadline:
            for connection in left:
                # What is no association yet will be none; those that are idle end themselves.
                if connection.association is None:
                    connection.shut()
            self.enforce()
            time.sleep(0.05)
        left = self._snapshot()
        for connection in left:
            connection.shut()
        for connection in left:
            if connection.thread is not None:
                connection.thread.join(5)

    def _snapshot(self) -> list[_Connection]:
        with self._lock:
            return list(self._running)

    def _accept(self, listening: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = listening.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Out of descriptors or memory: connections that end free some; the queue holds those that come.
                log.error("a connection cannot be accepted: %s", error.strerror)
                time.sleep(0.1)
                continue
            connection = _Connection(sock, _name(address))
            connection.deadline = time.monotonic() + self._settings.request_seconds
            with self._lock:
                full = len(self._running) >= self._settings.maximum_associations
                if not full:
                    self._running.add(connection)
            if full:
                log.warning("connection from %s closed: the limit of associations is reached", connection.address)
                sock.close()
                continue
            connection.thread = threading.Thread(target=self._run, args=(connection,), daemon=True)
            connection.thread.start()

    def _run(self, connection: _Connection) -> None:
        try:
            self._handshake(connection)
            self._serve(connection)
        except _RefusedConnectionError as refused:
            log.warning("connection from %s refused: %s", connection.address, refused)
        except OSError as error:
            log.warning("connection from %s broke off: %s", connection.address, type(error).__name__)
        except Exception:
            log.exception("connection from %s ended by an error of ours", connection.address)
        finally:
            close(connection.socket)
            with self._lock:
                self._running.discard(connection)

    def _handshake(self, connection: _Connection) -> None:
        plain = connection.socket
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.settimeout(self._settings.request_seconds)
        secured = self.policy.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        connection.socket = secured
        try:
            secured.do_handshake()
        except OSError as error:
            raise _RefusedConnectionError(tls.explain(error)) from error
        connection.deadline = time.monotonic() + self._settings.request_seconds

    def _serve(self, connection: _Connection) -> None:
        sock = connection.socket
        reader = wire.Reader(0)
        first, *rest = self._first(sock, reader)
        request = self._decode(sock, first)
        policy = self.policy
        fingerprint = hashlib.sha256(_certificate(sock)).hexdigest()
        decision = policy.peers.decide(request.calling, request.called, self._settings.ae_title, fingerprint)
        if isinstance(decision, str):
            # The log says more than the peer is told: PS3.8 has one reason for each title.
            reason = 7 if decision.startswith("the called") else 3
            sock.sendall(wire.reject(permanent=True, source=1, reason=reason))
            raise _RefusedConnectionError(f"calling AE title {_title(request.calling)}: {decision}")
        try:
            agreement = negotiate.agree(
                request, private_classes=decision.private_sop_classes, maximum_pdu=self._settings.maximum_pdu
            )
        except wire.WireError as error:
            sock.sendall(wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error
        reader.maximum_pdu = self._settings.maximum_pdu
        association_id = new_association_id()
        origin = Origin(association_id, decision.ae_title, self._settings.ae_title, connection.address, fingerprint)
        sock.sendall(agreement.reply)
        log.info(
            "association %s from %s at %s: accepted %d of %d contexts",
            association_id,
            origin.calling,
            connection.address,
            len(agreement.contexts),
            len(request.primitive.presentation_context_definition_list),
        )
        connection.deadline = None
        if self._stopping.is_set():
            sock.sendall(wire.abort(reason=0))
            return
        connection.association = Association(
            sock, reader, agreement, origin, self._deposits, self._settings.idle_seconds, self._space, self._stopping
        )
        self._converse(sock, connection.association, origin, rest)

    def _first(self, connection: socket.socket, reader: wire.Reader) -> list[wire.Pdu | wire.Fragment]:
        buffer = memoryview(bytearray(16_384))
        events: list[wire.Pdu | wire.Fragment] = []
        try:
            while not events:
                count = connection.recv_into(buffer)
                if not count:
                    raise _RefusedConnectionError("closed before an association was requested")
                events = list(reader.receive(buffer[:count]))
        except TimeoutError as error:
            raise _RefusedConnectionError("no association was requested in time") from error
        except wire.WireError as error:
            connection.sendall(wire.abort(reason=1))
            raise _RefusedConnectionError(str(error)) from error
        return events

    def _decode(self, connection: socket.socket, first: wire.Pdu | wire.Fragment) -> negotiate.Request:
        if not isinstance(first, wire.Pdu) or first.kind != wire.ASSOCIATE_RQ:
            connection.sendall(wire.abort(reason=2))
            raise _RefusedConnectionError("something else than an association request came first")
        try:
            return negotiate.decode(first.content)
        except wire.WireError as error:
            connection.sendall(wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error

    def _converse(
        self,
        connection: socket.socket,
        association: Association,
        origin: Origin,
        rest: list[wire.Pdu | wire.Fragment],
    ) -> None:
        try:
            ending = association.run(rest)
        except wire.WireError as error:
            ending = f"aborted: {error}"
            with contextlib.suppress(OSError):
                connection.sendall(wire.abort(reason=6))
        except TimeoutError:
            ending = "aborted: idle for too long"
            with contextlib.suppress(OSError):
                connection.sendall(wire.abort(reason=0))
        except OSError as error:
            ending = f"broken off: {type(error).__name__}"
        except Exception:
            with contextlib.suppress(OSError):
                connection.sendall(wire.abort(reason=0))
            raise
        tally = association.tally
        log.info(
            "association %s %s: %d stored, %d refused, %d bytes",
            origin.association,
            ending,
            tally.stored,
            tally.refused,
            tally.bytes,
        )


class _RefusedConnectionError(Exception):
    """A connection that did not become an association; the message is for the log."""


def _certificate(connection: socket.socket) -> bytes:
    """Return the peer's certificate in DER."""
    found = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
    return found or b""


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((host, port))
    sock.listen(_BACKLOG)
    return sock


def _name(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _title(raw: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in raw.strip(b" "))
