"""Associations that the desk asks for: to where a peer's file says that it listens, over TLS with its own certificate.

The other side has to prove that it is that peer, as it does when it calls here.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from storescp.config import Config
from storescp.desk.messages import Messages
from storescp.desk.transcode import TARGETS
from storescp.gate import negotiate, tls, wire
from storescp.gate.connection import Policy
from storescp.gate.negotiate import Context
from storescp.gate.stream import Stream
from storescp.handover import Manifest
from storescp.peers import Peer

_CONNECT_SECONDS = 15.0
_MAXIMUM_PDU = 131_072
_CONTEXTS_LIMIT = 128
_FINISH_SECONDS = 2.0

log = logging.getLogger(__name__)


class OutgoingError(Exception):
    """An association cannot be had; the message fits an Error Comment."""


class Outgoing:
    """Makes associations with peers."""

    def __init__(self, config: Config, policy: Callable[[], Policy]) -> None:
        self._config = config
        self._policy = policy
        self._seconds = float(config.settings.desk.idle_seconds)

    @contextlib.contextmanager
    def association(self, peer: Peer, manifest: Manifest) -> Iterator[tuple[Messages, dict[int, Context]]]:
        """Give an association on which what a manifest lists can be stored, and the contexts that were accepted.

        Raises:
            OutgoingError: It cannot be had.
        """
        with self.proposed(peer, proposals(manifest)) as found:
            yield found

    @contextlib.contextmanager
    def proposed(
        self, peer: Peer, contexts: dict[int, tuple[str, list[str]]], roles: tuple[str, ...] = ()
    ) -> Iterator[tuple[Messages, dict[int, Context]]]:
        """Give an association for proposed contexts; at the end it is released.

        Raises:
            OutgoingError: It cannot be had.
        """
        with contextlib.ExitStack() as opened:
            try:
                connection = self._connect(peer)
                opened.callback(connection.close)
                stream = Stream(connection, lambda: False)
                reader = wire.Reader(0)
                asked = negotiate.request(
                    self._config.settings.gate.ae_title, peer.ae_title, contexts, maximum_pdu=_MAXIMUM_PDU, roles=roles
                )
                stream.send(asked, _CONNECT_SECONDS)
                first, *rest = _first(stream, reader)
                if not isinstance(first, wire.Pdu) or first.kind != wire.ASSOCIATE_AC:
                    raise OutgoingError("the peer does not accept the association")
                agreement = negotiate.accepted(first.content, contexts)
            except (OSError, wire.WireError) as error:
                log.warning("no association with %s: %s", peer.ae_title, type(error).__name__)
                raise OutgoingError("the peer cannot be reached, or does not speak DICOM over TLS") from error
            reader.maximum_pdu = _MAXIMUM_PDU
            messages = Messages(stream, reader, rest, agreement.maximum_pdu, self._seconds)
            try:
                yield messages, agreement.contexts
            except BaseException:
                with contextlib.suppress(OSError):
                    stream.send(wire.abort(reason=0, by_user=True), 1.0)
                raise
            with contextlib.suppress(OSError):
                stream.send(wire.release_request(), 1.0)
                stream.finish(_FINISH_SECONDS)

    def _connect(self, peer: Peer) -> socket.socket:
        if peer.listens is None:
            raise OutgoingError("the peer's file does not say where it listens")
        plain = socket.create_connection(peer.listens, _CONNECT_SECONDS)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if peer.listens_plaintext:
            return plain
        try:
            return self._secure(plain, peer)
        except BaseException:
            plain.close()
            raise

    def _secure(self, plain: socket.socket, peer: Peer) -> ssl.SSLSocket:
        policy = self._policy()
        context = _client_context(self._config)
        if not peer.fingerprints:
            tls.trusted(context, policy.trust, policy.peers)
            context.verify_mode = ssl.CERT_REQUIRED
        # From here on it has the connection: the plain socket is empty.
        secured = context.wrap_socket(plain)
        try:
            if not _proves(secured, peer, policy):
                raise OutgoingError("who listens there does not prove to be that peer")
        except BaseException:
            secured.close()
            raise
        return secured


def _proves(secured: ssl.SSLSocket, peer: Peer, policy: Policy) -> bool:
    """Tell whether a connection's other end is a peer: by a certificate of its file, or by its name and authority."""
    now = datetime.now(UTC)
    if not peer.fingerprints:
        chain = tls.verified_chain(secured)
        return not policy.trust.revocations.refusal(chain, now) and peer.holds(policy.trust.proof(chain))
    # The handshake proved its key. Whoever issued it for what purpose: devices show the one that they have.
    shown = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    valid = shown.not_valid_before_utc <= now <= shown.not_valid_after_utc
    revoked = policy.trust.revocations.refusal([shown], now)
    return valid and not revoked and shown.fingerprint(SHA256()).hex() in peer.fingerprints


def proposals(manifest: Manifest) -> dict[int, tuple[str, list[str]]]:
    """Return the contexts to propose for what a manifest lists: each kind as it is stored, then as it can be made."""
    kinds = sorted(manifest.kinds, key=lambda kind: -kind.instances)
    stored = [(kind.sop_class, [kind.transfer_syntax]) for kind in kinds]
    made = [(sop_class, [target]) for sop_class in dict.fromkeys(k.sop_class for k in kinds) for target in TARGETS]
    wanted = [*stored, *(one for one in made if one not in stored)][:_CONTEXTS_LIMIT]
    return {2 * place + 1: one for place, one in enumerate(wanted)}


def _client_context(config: Config) -> ssl.SSLContext:
    """Return a context that checks nothing by itself: who the other end is, its peer's file says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:@SECLEVEL=2")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_cert_chain(config.desk_certificate, config.desk_private_key)
    return context


def _first(stream: Stream, reader: wire.Reader) -> list[wire.Pdu | wire.Fragment]:
    buffer = memoryview(bytearray(1 << 16))
    events: list[wire.Pdu | wire.Fragment] = []
    # In total: single bytes gain nothing.
    until = time.monotonic() + _CONNECT_SECONDS
    while not events:
        count = stream.receive(buffer, max(0.0, until - time.monotonic()), between=False)
        if not count:
            raise OutgoingError("the peer closes the connection")
        events = list(reader.receive(buffer[:count]))
    return events
