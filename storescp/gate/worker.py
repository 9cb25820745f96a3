"""A worker of the gate: takes connections from the first process, receives, deposits; drains at the end."""

from __future__ import annotations

import functools
import gc
import logging
import select
import signal
import socket
import ssl
import time

from keys.versions import store_id_of
from storage.deposit import DepositError, Deposits, Fence, PublishedKeys
from storescp import peers, space
from storescp.config import Config
from storescp.errors import StrongroomError
from storescp.gate import channel
from storescp.gate.channel import ChannelError, Message, Refused
from storescp.gate.connection import Connections, Policy
from storescp.gate.crl import CrlError
from storescp.gate.journal import TRACE, Journal
from storescp.gate.meter import Meter
from storescp.gate.quota import Allowances, Hold
from storescp.gate.receive import Association, Resources
from storescp.gate.reception import Reception
from storescp.gate.tls import Trust, server_context
from storescp.log import escape
from storescp.peers import PeerError

_TICK_SECONDS = 0.5
# How long events for the audit chain collect.
_FLUSH_SECONDS = 3.0
# How often the first process is told what was counted.
_COUNT_SECONDS = 1.0
# Of a message on the channel; escaped characters take more than one byte there.
_REASON_LIMIT = 500

log = logging.getLogger(__name__)


def run(config: Config, gate: socket.socket, *, replaces: bool) -> None:
    """Serve what comes over a channel until SIGTERM, or the channel's end.

    Args:
        config: The configuration.
        gate: The channel to the gate's first process.
        replaces: Another worker died. A peer file that broke meanwhile must not end receiving: it is left out.

    Raises:
        StrongroomError: It cannot start.
    """
    settings = config.settings.gate
    store_id = store_id_of(config.signing_key)
    keys = PublishedKeys(config.public, config.signing_key)
    deposits = Deposits(
        config.incoming,
        store_id,
        keys,
        size_limit=settings.pack_bytes,
        idle_seconds=settings.pack_idle_seconds,
        open_per_peer=max(1, settings.packs_per_peer // settings.worker_count()),
        spare_bytes=settings.spare_bytes,
        fence=Fence(config.public, config.signing_key),
    )
    journal = Journal(
        config.incoming, store_id, PublishedKeys(config.public, config.signing_key), config.public / TRACE
    )
    allowances = Allowances(functools.partial(_tell, gate))
    meter = Meter(wanted=bool(config.settings.metrics.listen))
    try:
        deposits.check()
        watch = space.Watch(config, config.incoming)
        policy = _policy(config, lenient=replaces)
        reception = Reception(
            Resources(settings, deposits, watch, allowances, meter, journal), commits=config.settings.desk.runs
        )
        connections = Connections(policy, reception)
    except (DepositError, PeerError, CrlError, OSError) as error:
        raise StrongroomError(f"the gate cannot start: {error}") from error
    worker = _Worker(config, gate, connections, allowances, watch, journal)
    # What was made up to here stays: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    _tell(gate, Message("ready", len(connections.policy.peers.by_title)))
    journal.event("peers-read", peers=peers.digests(config.peers))
    looked = flushed = counted = time.monotonic()
    while worker.serve(looked + _TICK_SECONDS - time.monotonic()):
        if time.monotonic() - looked < _TICK_SECONDS:
            continue
        looked = time.monotonic()
        connections.enforce()
        try:
            deposits.close_idle()
            deposits.prepare()
        except (DepositError, OSError) as error:
            log.error("open packs cannot be looked after: %s", error)
        if looked - flushed >= _FLUSH_SECONDS:
            flushed = looked
            journal.flush()
        if looked - counted >= _COUNT_SECONDS:
            counted = looked
            for count in meter.take():
                _tell(gate, channel.with_content("counted", 0, count))
    allowances.stop()
    connections.drain(settings.drain_seconds)
    deposits.close_all()
    journal.flush()


class _Worker:
    """The worker's end of the channel."""

    def __init__(
        self,
        config: Config,
        gate: socket.socket,
        connections: Connections[Association],
        allowances: Allowances,
        watch: space.Watch,
        journal: Journal,
    ) -> None:
        self._config = config
        self._gate = gate
        self._connections = connections
        self._allowances = allowances
        self._watch = watch
        self._journal = journal
        # SIGTERM wakes the poll like a message does, also where it comes just before it.
        self._wakeup, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.detach())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._poll = select.poll()
        self._poll.register(gate, select.POLLIN)
        self._poll.register(self._wakeup, select.POLLIN)

    def serve(self, seconds: float) -> bool:
        """Handle a message, or let so much time pass; tell whether to go on."""
        ready = {descriptor for descriptor, _ in self._poll.poll(max(0.0, seconds) * 1000)}
        if self._wakeup.fileno() in ready:
            return False
        if self._gate.fileno() not in ready:
            return True
        try:
            message, descriptors = channel.receive(self._gate)
        except (ChannelError, OSError):
            return False
        if message.kind in {"connection", "plaintext"} and len(descriptors) == 1:
            self._take(message, socket.socket(fileno=descriptors[0]))
        else:
            self._hear(message)
        return True

    def _take(self, message: Message, sock: socket.socket) -> None:
        listener, address = None, message.text
        if message.kind == "plaintext":
            at, _, address = message.text.partition(" ")
            listener = self._config.settings.gate.plaintext[int(at)]
        number = message.number
        self._connections.take(number, sock, address, listener, lambda: _tell(self._gate, Message("ended", number)))

    def _hear(self, message: Message) -> None:
        match message.kind:
            case "reload":
                self._reload()
            case "room":
                self._watch.told(message.number)
            case "granted" | "denied":
                self._allowances.answer(message.number, message.kind == "granted")
            case "hold":
                self._allowances.hold(channel.content(message, Hold))
            case "refused":
                refused = channel.content(message, Refused)
                self._journal.refused(refused.address, refused.reason, count=message.number)

    def _reload(self) -> None:
        try:
            self._connections.policy = _policy(self._config)
        except (PeerError, CrlError, OSError) as error:
            reason = "a certificate or key cannot be read" if isinstance(error, ssl.SSLError) else str(error)
            _tell(self._gate, Message("kept", 0, escape(reason)[:_REASON_LIMIT]))
            return
        _tell(self._gate, Message("peers", len(self._connections.policy.peers.by_title)))
        self._journal.event("peers-read", peers=peers.digests(self._config.peers))


def _tell(gate: socket.socket, message: Message) -> None:
    """Tell the gate something; where it is gone, so is this worker soon."""
    try:
        channel.send(gate, message)
    except OSError:
        log.error("the gate's first process cannot be reached")


def _policy(config: Config, *, lenient: bool = False) -> Policy:
    if lenient:
        found, errors = peers.read_good(config.peers)
        for error in errors:
            log.error("a peer is left out until its file is mended: %s", error)
    else:
        found = peers.read_all(config.peers)
    trust = Trust(config.trust, config.crls)
    return Policy(found, server_context(config.certificate, config.private_key, trust, found), trust)
