"""The gate's first process: accepts connections, counts them, hands each to a worker; parses nothing, has no keys.

One process counts, so that limits hold over all workers; what a worker held is free again when it dies.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import selectors
import signal
import socket
import time
from datetime import UTC, datetime
from typing import NamedTuple

from storage.openpack import remove_unfinished
from storescp import notify, peers, space
from storescp.child import Child
from storescp.config import Config, Gate, network, parse_address
from storescp.errors import StrongroomError
from storescp.gate import channel, listeners, meter, validity
from storescp.gate.channel import ChannelError, ClosedError, Message, Refused
from storescp.gate.meter import Counted
from storescp.gate.numbers import Numbers
from storescp.gate.quota import Claim, Quotas, Use
from storescp.harden import check_gate
from storescp.peers import Network

_TICK_SECONDS = 0.5
_START_SECONDS = 25.0
# How long a worker whose channel is closed may take to end.
_LINGER_SECONDS = 5.0
# What accepting waits when the process is out of descriptors or memory: connections that end free some.
_EXHAUSTED_SECONDS = 0.1
# How often what expires soon is told again.
_WARN_SECONDS = 86_400.0
# Of what is turned away, how many kinds are told apart at a time.
_REFUSED_LIMIT = 100

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Run the gate until SIGTERM or SIGINT.

    Raises:
        StrongroomError: It cannot start.
    """
    check_gate(config)
    try:
        gate = _Gate(config)
    except OSError as error:
        raise StrongroomError(f"the gate cannot start: {error}") from error
    try:
        gate.start()
        while gate.serve():
            pass
    finally:
        gate.stop()
    log.info("stopped")


class _Worker:
    """A worker process, and what it serves."""

    def __init__(self, config: Config, number: int) -> None:
        self.child = Child(config, f"gate's worker {number}", ["gate-worker", "--channel"])
        self.channel: socket.socket | None = None
        self.ready = False
        self.lost_at = 0.0
        # What it serves, and from which address each comes.
        self.connections: dict[int, str] = {}

    def start(self, *, replaces: bool = False) -> socket.socket:
        """Start the process; return this end of its channel."""
        ours, theirs = channel.pair()
        with theirs:
            more = ["--replaces"] if replaces else []
            self.child.start(str(theirs.fileno()), *more, descriptors=[theirs.fileno()])
        ours.setblocking(False)
        self.channel = ours
        return ours

    def send(self, message: Message, *descriptors: int) -> bool:
        """Send a message; tell whether the worker will get it."""
        if self.channel is None:
            return False
        try:
            channel.send(self.channel, message, *descriptors)
        except OSError:
            return False
        return True


class _Listener(NamedTuple):
    """A listening socket; where it has no TLS, its place in the configuration and the addresses that it is for."""

    socket: socket.socket
    plaintext: int | None = None
    networks: tuple[Network, ...] = ()

    def is_for(self, host: str) -> bool:
        """Tell whether a connection from an address may come."""
        return self.plaintext is None or any(ipaddress.ip_address(host) in net for net in self.networks)


class _Gate:
    """Listeners, workers, and the count of connections."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings: Gate = config.settings.gate
        self._watch = space.Watch(config, config.incoming)
        self._selector = selectors.DefaultSelector()
        self._workers = [_Worker(config, number + 1) for number in range(self._settings.worker_count())]
        self._count = 0
        self._started = False
        self._stopping = False
        self._reload = False
        self._looked = 0.0
        self._stamp = self._files()
        self._peers = 0
        self._kept = ""
        self._asked: set[_Worker] = set()
        self._short = ""
        self._listeners = self._listen()
        self._watchdog = notify.Watchdog()
        self._quotas = Quotas()
        self._numbers = Numbers(config, len(self._workers))
        self._refused: dict[Refused, int] = {}
        self._warned = 0.0
        # A signal makes the selector's wait end.
        self._wakeup, wake = socket.socketpair()
        self._wakeup.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.detach())
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        signal.signal(signal.SIGHUP, lambda *_: self._again())

    def start(self) -> None:
        """Remove what an earlier gate left unfinished; start the workers and, when each is ready, to accept.

        Raises:
            StrongroomError: One did not become ready.
        """
        remove_unfinished(self._config.incoming)
        for worker in self._workers:
            self._selector.register(worker.start(), selectors.EVENT_READ, worker)
        deadline = time.monotonic() + _START_SECONDS
        while not all(worker.ready for worker in self._workers):
            self._step(0.1)
            if self._stopping:
                return
            if any(worker.channel is None for worker in self._workers) or time.monotonic() > deadline:
                raise StrongroomError("the gate cannot start: a worker did not; the log says why")
        self._started = True
        for listener in self._listeners:
            self._selector.register(listener.socket, selectors.EVENT_READ, listener)
        addresses = ", ".join(listeners.text(x.socket.getsockname()) for x in self._listeners if x.plaintext is None)
        log.info("listening on %s as %s, %d workers", addresses, self._settings.ae_title, len(self._workers))
        if not self._peers:
            log.warning("no peers are configured: nobody can associate; 'strongroom peer add' adds one")
        notify.ready()

    def serve(self) -> bool:
        """Do what there is to do; tell whether to go on."""
        self._step(max(0.0, self._looked + _TICK_SECONDS - time.monotonic()))
        if time.monotonic() - self._looked >= _TICK_SECONDS:
            self._looked = time.monotonic()
            self._look()
        self._watchdog.turn()
        return not self._stopping

    def stop(self) -> None:
        """Accept no more; let the workers drain."""
        for listener in self._listeners:
            listener.socket.close()
        log.info("stopping: associations in transfer have %d s to finish", self._settings.drain_seconds)
        notify.stopping()
        for worker in self._workers:
            worker.child.signal(signal.SIGTERM)
        for worker in self._workers:
            worker.child.stop(self._settings.drain_seconds + 6.0)

    def _listen(self) -> list[_Listener]:
        plaintext = self._settings.plaintext
        wanted = [parse_address(text) for text in (*self._settings.listen, *(p.listen for p in plaintext))]
        passed = listeners.take(wanted)
        if passed:
            log.info("%d of %d listening sockets are systemd's", len(passed), len(wanted))
        sockets = [passed.get(address) or listeners.bind(*address) for address in wanted]
        secure = len(self._settings.listen)
        return [
            *(_Listener(sock) for sock in sockets[:secure]),
            *(
                _Listener(sock, number, tuple(network(a) for a in plaintext[number].addresses))
                for number, sock in enumerate(sockets[secure:])
            ),
        ]

    def _end(self) -> None:
        self._stopping = True

    def _again(self) -> None:
        self._reload = True

    def _step(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, _Worker):
                self._hear(key.data)
            elif isinstance(key.data, _Listener):
                self._accept(key.data)
            else:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(64)

    def _look(self) -> None:
        """Do what is done twice a second; what fails is tried again, and ends no association."""
        try:
            self._look_at_everything()
        except OSError as error:
            log.error("workers and files cannot be looked at: %s", error)

    def _look_at_everything(self) -> None:
        """Look at dead workers, changed files, free space."""
        for worker in self._workers:
            if worker.channel is None and time.monotonic() - worker.lost_at > _LINGER_SECONDS:
                # One that cannot be reached any more serves nobody who is counted.
                worker.child.signal(signal.SIGKILL)
            if worker.child.is_due():
                self._lose(worker)
                self._numbers.restarted()
                self._selector.register(worker.start(replaces=True), selectors.EVENT_READ, worker)
        if self._reload or self._files() != self._stamp:
            self._reload = False
            self._warned = 0.0
            self._stamp = self._files()
            self._kept = ""
            self._asked = {worker for worker in self._workers if worker.send(Message("reload"))}
            self._numbers.read_certificates()
        self._tell_refused()
        if not self._warned or time.monotonic() - self._warned > _WARN_SECONDS:
            self._warn()
        try:
            self._tell_space()
        except OSError as error:
            log.error("free space cannot be measured: %s", error)
        self._numbers.turn(
            ready=sum(worker.ready for worker in self._workers),
            connections=sum(len(worker.connections) for worker in self._workers),
            receiving=not self._short,
            room=self._watch.room,
        )

    def _warn(self) -> None:
        self._warned = time.monotonic()
        for said in validity.warnings(self._config, datetime.now(UTC)):
            log.warning("%s", said)

    def _tell_refused(self) -> None:
        """Have a worker write down, for the audit chain, what was turned away here."""
        for refused, count in self._refused.items():
            message = channel.with_content("refused", count, refused)
            if not any(worker.ready and worker.send(message) for worker in self._workers):
                return
        self._refused.clear()

    def _tell_space(self) -> None:
        self._watch.look()
        for worker in self._workers:
            worker.send(Message("room", self._watch.room))
        short = self._watch.shortage()
        if short and not self._short:
            log.error("nothing more is received, C-STORE is answered A700: %s", short)
        if self._short and not short:
            log.info("receiving again: there is space")
        self._short = short

    # --- workers

    def _hear(self, worker: _Worker) -> None:
        if worker.channel is None:
            return
        try:
            message, descriptors = channel.receive(worker.channel)
            channel.close(descriptors)
            self._understand(worker, message)
        except BlockingIOError:
            return
        except ClosedError:
            # It is about to end, and its status tells more than that it was killed.
            self._lose(worker)
            return
        except (ChannelError, OSError):
            self._lose(worker)
            worker.child.signal(signal.SIGKILL)

    def _understand(self, worker: _Worker, message: Message) -> None:
        match message.kind:
            case "ended":
                # Only what it was given: a worker that is broken into frees nobody else's.
                if worker.connections.pop(message.number, None):
                    self._quotas.ended(message.number)
            case "claim" if message.number in worker.connections:
                claim = channel.content(message, Claim)
                kind = "granted" if self._quotas.claim(message.number, claim) else "denied"
                worker.send(Message(kind, message.number))
            case "used":
                self._used(channel.content(message, Use))
            case "counted":
                self._numbers.add(channel.content(message, Counted))
            case "ready":
                worker.ready = True
                self._peers = message.number
                if self._started:
                    log.info("the %s receives again", worker.child.name)
            case "peers" | "kept":
                self._kept = self._kept or message.text
                self._peers = message.number if message.kind == "peers" else self._peers
                self._answered(worker)

    def _used(self, use: Use) -> None:
        hold = self._quotas.add(use, time.time())
        if hold is not None:
            for worker in self._workers:
                worker.send(channel.with_content("hold", 0, hold))

    def _answered(self, worker: _Worker) -> None:
        """Say what became of a reload when every worker has answered: the next connection may be any worker's."""
        if worker not in self._asked:
            return
        self._asked.discard(worker)
        if self._asked:
            return
        if self._kept:
            log.error("peers and certificates stay as they were: %s", self._kept)
        else:
            log.info("peers and certificates read: %d peers", self._peers)

    def _lose(self, worker: _Worker) -> None:
        """Let go of a worker that ended: what it served ended with it."""
        if worker.channel is not None:
            self._selector.unregister(worker.channel)
            worker.channel.close()
            worker.lost_at = time.monotonic()
        worker.channel, worker.ready = None, False
        for number in worker.connections:
            self._quotas.ended(number)
        worker.connections.clear()
        self._answered(worker)

    def _accept(self, listener: _Listener) -> None:
        try:
            sock, found = listener.socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("a connection cannot be accepted: %s", error.strerror)
            time.sleep(_EXHAUSTED_SECONDS)
            return
        with sock:
            if reason := self._pass_on(listener, sock, found):
                log.warning("connection from %s closed: %s", listeners.text(found), reason)
                self._numbers.turned_away(meter.LISTENER)
                refused = Refused(listeners.text((found[0], 0)), reason)
                if refused in self._refused or len(self._refused) < _REFUSED_LIMIT:
                    self._refused[refused] = self._refused.get(refused, 0) + 1

    def _pass_on(self, listener: _Listener, sock: socket.socket, found: tuple[str, int]) -> str:
        """Give a connection to a worker; return why not, empty where one took it."""
        if not listener.is_for(found[0]):
            return "this listener without TLS is for other addresses"
        hosts = [host for worker in self._workers for host in worker.connections.values()]
        if len(hosts) >= self._settings.maximum_associations:
            return "the limit of associations is reached"
        if hosts.count(found[0]) >= self._settings.maximum_per_address:
            return "the limit of connections from one address is reached"
        self._count += 1
        message = Message("connection", self._count, listeners.text(found))
        if listener.plaintext is not None:
            message = Message("plaintext", self._count, f"{listener.plaintext} {listeners.text(found)}")
        for worker in sorted(self._workers, key=lambda w: len(w.connections)):
            if worker.ready and worker.send(message, sock.fileno()):
                worker.connections[self._count] = found[0]
                return ""
        return "no worker can take it now"

    def _files(self) -> object:
        config = self._config
        files = (config.certificate, config.private_key, *config.trust, *config.crls)
        return peers.stamp(config.peers), [f.stat().st_mtime_ns if f.exists() else 0 for f in files]
