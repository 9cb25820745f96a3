"""One connection from TLS handshake to its end, in a thread of its own; and all of a worker's together."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable

from storage.deposit import Deposits
from storescp.config import Gate
from storescp.gate import negotiate, tls, wire
from storescp.gate.incoming import Origin
from storescp.gate.receive import Association, new_association_id
from storescp.gate.stream import Stream
from storescp.peers import Peers
from storescp.space import Watch

_REQUEST_BYTES = 32_768
# How long a peer has to close the connection after the last PDU: the ARTIM timer of PS3.8.
_FINISH_SECONDS = 2.0

log = logging.getLogger(__name__)


class Policy:
    """What a connection is judged by; replaced whole when peers or certificates change."""

    def __init__(self, peers: Peers, context: ssl.SSLContext) -> None:
        self.peers = peers
        self.context = context


class _Connection:
    """A connection and what it is doing: at most one thread writes each of these, and others only read them."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.socket = sock
        self.address = address
        self.thread: threading.Thread | None = None
        self.associated = False
        self.deadline: float | None = None

    def shut(self) -> None:
        """Make the connection's thread see an end of data. Not by SSLSocket.shutdown: it drops the TLS state."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class Connections:
    """The connections of a worker."""

    def __init__(self, settings: Gate, policy: Policy, deposits: Deposits, space: Watch) -> None:
        self.policy = policy
        self._settings = settings
        self._deposits = deposits
        self._space = space
        self._lock = threading.Lock()
        self._running: set[_Connection] = set()
        self._stopping = threading.Event()

    def take(self, sock: socket.socket, address: str, ended: Callable[[], None]) -> None:
        """Serve a connection in a thread of its own; ``ended`` is called there when it is over."""
        connection = _Connection(sock, address)
        connection.deadline = time.monotonic() + self._settings.request_seconds
        with self._lock:
            self._running.add(connection)
        connection.thread = threading.Thread(target=self._run, args=(connection, ended), daemon=True)
        connection.thread.start()

    def enforce(self) -> None:
        """Shut connections down whose phase takes too long in total, however often single bytes come."""
        now = time.monotonic()
        for connection in self._snapshot():
            if connection.deadline is not None and now > connection.deadline:
                connection.shut()

    def drain(self, seconds: float) -> None:
        """Let associations in transfer finish within a time; close what is left."""
        self._stopping.set()
        deadline = time.monotonic() + seconds
        while (left := self._snapshot()) and time.monotonic() < deadline:
            for connection in left:
                # What is no association yet will be none; those that are idle end themselves.
                if not connection.associated:
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

    def _run(self, connection: _Connection, ended: Callable[[], None]) -> None:
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
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
            connection.socket.close()
            with self._lock:
                self._running.discard(connection)
            ended()

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
        if not isinstance(connection.socket, ssl.SSLSocket):
            raise TypeError("a connection is served before its handshake")
        fingerprint = hashlib.sha256(connection.socket.getpeercert(binary_form=True) or b"").hexdigest()
        stream = Stream(connection.socket, self._stopping.is_set)
        try:
            self._associate(connection, stream, fingerprint)
        finally:
            stream.finish(_FINISH_SECONDS)

    def _associate(self, connection: _Connection, stream: Stream, fingerprint: str) -> None:
        settings = self._settings
        reader = wire.Reader(0)
        first, *rest = self._first(stream, reader)
        request = self._decode(stream, first)
        decision = self.policy.peers.decide(request.calling, request.called, settings.ae_title, fingerprint)
        if isinstance(decision, str):
            # The log says more than the peer is told: PS3.8 has one reason for each title.
            reason = 7 if decision.startswith("the called") else 3
            self._tell(stream, wire.reject(permanent=True, source=1, reason=reason))
            raise _RefusedConnectionError(f"calling AE title {_title(request.calling)}: {decision}")
        try:
            agreement = negotiate.agree(
                request, private_classes=decision.private_sop_classes, maximum_pdu=settings.maximum_pdu
            )
        except wire.WireError as error:
            self._tell(stream, wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error
        reader.maximum_pdu = settings.maximum_pdu
        association_id = new_association_id()
        origin = Origin(association_id, decision.ae_title, settings.ae_title, connection.address, fingerprint)
        self._tell(stream, agreement.reply)
        log.info(
            "association %s from %s at %s: accepted %d of %d contexts",
            association_id,
            origin.calling,
            connection.address,
            len(agreement.contexts),
            len(request.primitive.presentation_context_definition_list),
        )
        connection.deadline = None
        connection.associated = True
        association = Association(stream, reader, agreement, origin, self._deposits, settings, self._space)
        self._converse(stream, association, origin, rest)

    def _first(self, stream: Stream, reader: wire.Reader) -> list[wire.Pdu | wire.Fragment]:
        buffer = memoryview(bytearray(_REQUEST_BYTES))
        events: list[wire.Pdu | wire.Fragment] = []
        try:
            while not events:
                count = stream.receive(buffer, self._settings.request_seconds, between=False)
                if not count:
                    raise _RefusedConnectionError("closed before an association was requested")
                events = list(reader.receive(buffer[:count]))
        except TimeoutError as error:
            raise _RefusedConnectionError("no association was requested in time") from error
        except wire.WireError as error:
            self._tell(stream, wire.abort(reason=1))
            raise _RefusedConnectionError(str(error)) from error
        return events

    def _decode(self, stream: Stream, first: wire.Pdu | wire.Fragment) -> negotiate.Request:
        if not isinstance(first, wire.Pdu) or first.kind != wire.ASSOCIATE_RQ:
            self._tell(stream, wire.abort(reason=2))
            raise _RefusedConnectionError("something else than an association request came first")
        try:
            return negotiate.decode(first.content)
        except wire.WireError as error:
            self._tell(stream, wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error

    def _converse(
        self, stream: Stream, association: Association, origin: Origin, rest: list[wire.Pdu | wire.Fragment]
    ) -> None:
        try:
            ending = association.run(rest)
        except wire.WireError as error:
            ending = f"aborted: {error}"
            self._tell_last(stream, wire.abort(reason=6))
        except TimeoutError:
            ending = f"aborted: {association.overdue}"
            self._tell_last(stream, wire.abort(reason=0))
        except OSError as error:
            ending = f"broken off: {type(error).__name__}"
        except Exception:
            self._tell_last(stream, wire.abort(reason=0))
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

    def _tell(self, stream: Stream, pdu: bytes) -> None:
        stream.send(pdu, self._settings.request_seconds)

    def _tell_last(self, stream: Stream, pdu: bytes) -> None:
        """Tell a peer that is lost anyway."""
        with contextlib.suppress(OSError):
            stream.send(pdu, 1.0)


class _RefusedConnectionError(Exception):
    """A connection that did not become an association; the message is for the log."""


def _title(raw: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in raw.strip(b" "))
