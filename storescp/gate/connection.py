"""One connection from TLS handshake to its end, in a thread of its own; and all of a process's together.

What an association is for, and what is told about it, is its service's: the gate's receives, the desk's gives back.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Generic, Protocol, TypeVar

from storescp.config import Plaintext
from storescp.gate import meter, negotiate, tls, wire
from storescp.gate.negotiate import Agreement
from storescp.gate.origin import Origin, new_association_id
from storescp.gate.stream import Stream
from storescp.peers import Asked, Peer, Peers, Proof

_REQUEST_BYTES = 32_768
# How long a peer has to close the connection after the last PDU: the ARTIM timer of PS3.8.
_FINISH_SECONDS = 2.0

log = logging.getLogger(__name__)


class Policy:
    """What a connection is judged by; replaced whole when peers or certificates change."""

    def __init__(self, peers: Peers, context: ssl.SSLContext, trust: tls.Trust) -> None:
        self.peers = peers
        self.context = context
        self.trust = trust


class Conversation(Protocol):
    """An established association at work."""

    @property
    def overdue(self) -> str:
        """What took too long, after a TimeoutError."""

    def run(self, rest: list[wire.Pdu | wire.Fragment]) -> str:
        """Serve it until it ends; return how it ended, for the log.

        Raises:
            WireError: The peer broke the protocol.
            OSError: The connection broke or was idle for too long.
        """


_C = TypeVar("_C", bound=Conversation)


class Service(Protocol[_C]):
    """What associations are for, and who is told about them. Safe to use from many threads."""

    ae_title: str
    request_seconds: float
    maximum_pdu: int

    def agree(self, request: negotiate.Request, peer: Peer) -> Agreement:
        """Return what a peer may use.

        Raises:
            WireError: The request cannot be answered.
        """

    def may_associate(self, number: int, peer: Peer) -> bool:
        """Tell whether a peer may have one more association."""

    def turned_away(self, where: str, address: str, reason: str, calling: str = "") -> None:
        """Hear where a connection ended that became no association; empty for an association that broke off."""

    def step(self, number: int, step: str, **fields: object) -> None:
        """Hear what just happened to a connection."""

    def begin(self, stream: Stream, reader: wire.Reader, agreement: Agreement, origin: Origin, peer: Peer) -> _C:
        """Begin an association that was just accepted."""

    def end(self, conversation: _C, origin: Origin, ending: str) -> dict[str, object]:
        """Hear that an association ended; return what it did, in figures."""


class _Connection:
    """A connection and what it is doing: at most one thread writes each of these, and others only read them."""

    def __init__(self, number: int, sock: socket.socket, address: str, plaintext: Plaintext | None) -> None:
        self.number = number
        self.socket = sock
        self.address = address
        self.plaintext = plaintext
        self.thread: threading.Thread | None = None
        self.associated = False
        self.deadline: float | None = None

    def shut(self) -> None:
        """Make the connection's thread see an end of data. Not by SSLSocket.shutdown: it drops the TLS state."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class Connections(Generic[_C]):
    """The connections of a process."""

    def __init__(self, policy: Policy, service: Service[_C]) -> None:
        self.policy = policy
        self._service = service
        self._lock = threading.Lock()
        self._running: set[_Connection] = set()
        self._stopping = threading.Event()

    def take(
        self, number: int, sock: socket.socket, address: str, plaintext: Plaintext | None, ended: Callable[[], None]
    ) -> None:
        """Serve a connection in a thread of its own; ``ended`` is called there when it is over.

        Args:
            number: Of the connection, as the gate's first process counts.
            sock: The connection.
            address: Where it comes from, with its port.
            plaintext: The listener without TLS that it came through, if it did.
            ended: Called with nothing.
        """
        connection = _Connection(number, sock, address, plaintext)
        connection.deadline = time.monotonic() + self._service.request_seconds
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
        # A connection that was an association is counted as that, however it ended.
        where = meter.HANDSHAKE
        try:
            self._step(connection, "connected", address=connection.address, tls=connection.plaintext is None)
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            proof = self._handshake(connection) if connection.plaintext is None else None
            where = meter.REQUEST
            self._serve(connection, proof)
        except _RefusedConnectionError as refused:
            log.warning("connection from %s refused: %s", connection.address, refused)
            self._service.turned_away(where, connection.address, str(refused), refused.calling)
            self._step(connection, "refused", reason=str(refused))
        except OSError as error:
            log.warning("connection from %s broke off: %s", connection.address, type(error).__name__)
            reason = f"it broke off: {type(error).__name__}"
            self._service.turned_away("" if connection.associated else where, connection.address, reason)
            self._step(connection, "refused", reason=reason)
        except Exception:
            log.exception("connection from %s ended by an error of ours", connection.address)
        finally:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
            connection.socket.close()
            with self._lock:
                self._running.discard(connection)
            ended()

    def _step(self, connection: _Connection, step: str, **fields: object) -> None:
        self._service.step(connection.number, step, **fields)

    def _handshake(self, connection: _Connection) -> Proof:
        plain = connection.socket
        plain.settimeout(self._service.request_seconds)
        policy = self.policy
        secured = policy.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        connection.socket = secured
        try:
            secured.do_handshake()
        except OSError as error:
            raise _RefusedConnectionError(tls.explain(error)) from error
        chain = tls.verified_chain(secured)
        proof = policy.trust.proof(chain)
        cipher = secured.cipher()
        self._step(
            connection,
            "handshake",
            version=secured.version(),
            cipher=cipher[0] if cipher else "",
            certificate=proof.fingerprint,
            key=proof.key,
            names=sorted(proof.names),
            authorities=sorted(proof.authorities),
            expires=chain[0].not_valid_after_utc.strftime("%Y-%m-%d"),
        )
        if reason := policy.trust.revocations.refusal(chain, datetime.now(UTC)):
            raise _RefusedConnectionError(f"the peer's certificate is not accepted: {reason}")
        connection.deadline = time.monotonic() + self._service.request_seconds
        return proof

    def _serve(self, connection: _Connection, proof: Proof | None) -> None:
        stream = Stream(connection.socket, self._stopping.is_set)
        try:
            self._associate(connection, stream, proof)
        finally:
            stream.finish(_FINISH_SECONDS)

    def _associate(self, connection: _Connection, stream: Stream, proof: Proof | None) -> None:
        service = self._service
        reader = wire.Reader(0)
        first, *rest = self._first(stream, reader)
        # By titles first: what a stranger sends is not decoded.
        peer = self._decide(connection, stream, self._titles(stream, first), proof)
        request = self._decode(stream, first)
        try:
            agreement = service.agree(request, peer)
        except wire.WireError as error:
            self._tell(stream, wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error
        reader.maximum_pdu = service.maximum_pdu
        association_id = new_association_id()
        fingerprint = proof.fingerprint if proof else ""
        origin = Origin(association_id, peer.ae_title, service.ae_title, connection.address, fingerprint)
        self._tell(stream, agreement.reply)
        proposed = len(request.primitive.presentation_context_definition_list)
        log.info(
            "association %s from %s at %s: accepted %d of %d contexts",
            association_id,
            origin.calling,
            connection.address,
            len(agreement.contexts),
            proposed,
        )
        self._step(
            connection, "accepted", association=association_id, contexts=len(agreement.contexts), proposed=proposed
        )
        connection.deadline = None
        connection.associated = True
        conversation = service.begin(stream, reader, agreement, origin, peer)
        self._converse(connection, stream, conversation, origin, rest)

    def _decide(
        self, connection: _Connection, stream: Stream, titles: tuple[bytes, bytes], proof: Proof | None
    ) -> Peer:
        """Return the peer that a request comes from; tell it where it is refused."""
        service = self._service
        calling = _title(titles[0])
        self._step(connection, "requested", calling=calling, called=_title(titles[1]))
        host = connection.address.rpartition(":")[0].strip("[]")
        plaintext = frozenset(connection.plaintext.peers) if connection.plaintext else frozenset[str]()
        asked = Asked(*titles, host, proof, plaintext)
        decision = self.policy.peers.decide(asked, service.ae_title)
        if isinstance(decision, str):
            # The log says more than the peer is told: PS3.8 has one reason for each title.
            reason = 7 if decision.startswith("the called") else 3
            self._tell(stream, wire.reject(permanent=True, source=1, reason=reason))
            raise _RefusedConnectionError(f"calling AE title {calling}: {decision}", calling)
        if not service.may_associate(connection.number, decision):
            # Transient, by the presentation provider: local limit exceeded.
            self._tell(stream, wire.reject(permanent=False, source=3, reason=2))
            limit = f"it has as many associations as it may, {decision.maximum_associations}"
            raise _RefusedConnectionError(f"calling AE title {calling}: {limit}", calling)
        return decision

    def _first(self, stream: Stream, reader: wire.Reader) -> list[wire.Pdu | wire.Fragment]:
        buffer = memoryview(bytearray(_REQUEST_BYTES))
        events: list[wire.Pdu | wire.Fragment] = []
        try:
            while not events:
                count = stream.receive(buffer, self._service.request_seconds, between=False)
                if not count:
                    raise _RefusedConnectionError("closed before an association was requested")
                events = list(reader.receive(buffer[:count]))
        except TimeoutError as error:
            raise _RefusedConnectionError("no association was requested in time") from error
        except wire.WireError as error:
            self._tell(stream, wire.abort(reason=1))
            # A TLS record, or a letter: neither is a PDU of DICOM.
            words = {0x16: "the peer speaks TLS to a listener without it"}.get(buffer[0], str(error))
            raise _RefusedConnectionError(words) from error
        return events

    def _titles(self, stream: Stream, first: wire.Pdu | wire.Fragment) -> tuple[bytes, bytes]:
        if not isinstance(first, wire.Pdu) or first.kind != wire.ASSOCIATE_RQ:
            self._tell(stream, wire.abort(reason=2))
            raise _RefusedConnectionError("something else than an association request came first")
        try:
            return negotiate.titles(first.content)
        except wire.WireError as error:
            self._tell(stream, wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error

    def _decode(self, stream: Stream, first: wire.Pdu | wire.Fragment) -> negotiate.Request:
        try:
            return negotiate.decode(first.content if isinstance(first, wire.Pdu) else b"")
        except wire.WireError as error:
            self._tell(stream, wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error

    def _converse(
        self,
        connection: _Connection,
        stream: Stream,
        conversation: _C,
        origin: Origin,
        rest: list[wire.Pdu | wire.Fragment],
    ) -> None:
        try:
            ending = conversation.run(rest)
        except wire.WireError as error:
            ending = f"aborted: {error}"
            self._tell_last(stream, wire.abort(reason=6))
        except TimeoutError:
            ending = f"aborted: {conversation.overdue}"
            self._tell_last(stream, wire.abort(reason=0))
        except OSError as error:
            ending = f"broken off: {type(error).__name__}"
        except Exception:
            ending = "ended by an error of ours"
            self._tell_last(stream, wire.abort(reason=0))
            raise
        finally:
            self._step(connection, "ended", ending=ending, **self._service.end(conversation, origin, ending))

    def _tell(self, stream: Stream, pdu: bytes) -> None:
        stream.send(pdu, self._service.request_seconds)

    def _tell_last(self, stream: Stream, pdu: bytes) -> None:
        """Tell a peer that is lost anyway."""
        with contextlib.suppress(OSError):
            stream.send(pdu, 1.0)


class _RefusedConnectionError(Exception):
    """A connection that did not become an association; the message is for the log."""

    def __init__(self, message: str, calling: str = "") -> None:
        super().__init__(message)
        self.calling = calling


def _title(raw: bytes) -> str:
    return "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in raw.strip(b" "))
