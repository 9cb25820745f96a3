"""One connection from TLS handshake to its end, in a thread of its own; and all of a worker's together."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from storescp.config import Plaintext
from storescp.gate import meter, negotiate, tls, wire
from storescp.gate.incoming import Origin
from storescp.gate.journal import Journal, studies
from storescp.gate.receive import Association, Resources, new_association_id
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


class Connections:
    """The connections of a worker."""

    def __init__(self, policy: Policy, resources: Resources, journal: Journal) -> None:
        self.policy = policy
        self._resources = resources
        self._settings = resources.settings
        self._journal = journal
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
            self._resources.meter.turned_away(where)
            self._journal.refused(connection.address, str(refused), refused.calling)
            self._step(connection, "refused", reason=str(refused))
        except OSError as error:
            log.warning("connection from %s broke off: %s", connection.address, type(error).__name__)
            if not connection.associated:
                self._resources.meter.turned_away(where)
            self._journal.refused(connection.address, f"it broke off: {type(error).__name__}")
            self._step(connection, "refused", reason=f"it broke off: {type(error).__name__}")
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
        self._journal.step(connection.number, step, **fields)

    def _handshake(self, connection: _Connection) -> Proof:
        plain = connection.socket
        plain.settimeout(self._settings.request_seconds)
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
        connection.deadline = time.monotonic() + self._settings.request_seconds
        return proof

    def _serve(self, connection: _Connection, proof: Proof | None) -> None:
        stream = Stream(connection.socket, self._stopping.is_set)
        try:
            self._associate(connection, stream, proof)
        finally:
            stream.finish(_FINISH_SECONDS)

    def _associate(self, connection: _Connection, stream: Stream, proof: Proof | None) -> None:
        settings = self._settings
        reader = wire.Reader(0)
        first, *rest = self._first(stream, reader)
        # By titles first: what a stranger sends is not decoded.
        peer = self._decide(connection, stream, self._titles(stream, first), proof)
        request = self._decode(stream, first)
        try:
            agreement = negotiate.agree(request, peer=peer, maximum_pdu=settings.maximum_pdu)
        except wire.WireError as error:
            self._tell(stream, wire.reject(permanent=True, source=2, reason=1))
            raise _RefusedConnectionError(str(error)) from error
        reader.maximum_pdu = settings.maximum_pdu
        association_id = new_association_id()
        fingerprint = proof.fingerprint if proof else ""
        origin = Origin(association_id, peer.ae_title, settings.ae_title, connection.address, fingerprint)
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
        self._journal.event(
            "association-begun",
            association=association_id,
            calling=origin.calling,
            address=connection.address,
            certificate=fingerprint,
        )
        self._step(
            connection, "accepted", association=association_id, contexts=len(agreement.contexts), proposed=proposed
        )
        connection.deadline = None
        connection.associated = True
        association = Association(stream, reader, agreement, origin, peer, self._resources)
        self._converse(connection, stream, association, origin, rest)

    def _decide(
        self, connection: _Connection, stream: Stream, titles: tuple[bytes, bytes], proof: Proof | None
    ) -> Peer:
        """Return the peer that a request comes from; tell it where it is refused."""
        settings = self._settings
        calling = _title(titles[0])
        self._step(connection, "requested", calling=calling, called=_title(titles[1]))
        host = connection.address.rpartition(":")[0].strip("[]")
        plaintext = frozenset(connection.plaintext.peers) if connection.plaintext else frozenset[str]()
        asked = Asked(*titles, host, proof, plaintext)
        decision = self.policy.peers.decide(asked, settings.ae_title)
        if isinstance(decision, str):
            # The log says more than the peer is told: PS3.8 has one reason for each title.
            reason = 7 if decision.startswith("the called") else 3
            self._tell(stream, wire.reject(permanent=True, source=1, reason=reason))
            raise _RefusedConnectionError(f"calling AE title {calling}: {decision}", calling)
        if not self._resources.allowances.granted(connection.number, decision, settings.request_seconds):
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
                count = stream.receive(buffer, self._settings.request_seconds, between=False)
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
        association: Association,
        origin: Origin,
        rest: list[wire.Pdu | wire.Fragment],
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
            ending = "ended by an error of ours"
            self._tell_last(stream, wire.abort(reason=0))
            raise
        finally:
            self._told(connection, association, origin, ending)

    def _told(self, connection: _Connection, association: Association, origin: Origin, ending: str) -> None:
        tally = association.tally
        self._resources.meter.end(association.count)
        log.info(
            "association %s %s: %d stored, %d refused, %d bytes",
            origin.association,
            ending,
            tally.stored,
            tally.refused,
            tally.bytes,
        )
        counts = {"stored": tally.stored, "refused": tally.refused, "bytes": tally.bytes}
        self._journal.event(
            "association-ended",
            association=origin.association,
            calling=origin.calling,
            address=origin.address,
            certificate=origin.certificate,
            ending=ending,
            **counts,
            reasons=tally.reasons,
            studies=studies(tally.studies),
        )
        self._step(connection, "ended", ending=ending, **counts, reasons=tally.reasons)

    def _tell(self, stream: Stream, pdu: bytes) -> None:
        stream.send(pdu, self._settings.request_seconds)

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
