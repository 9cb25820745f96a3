"""The desk's process: listens, knows the peers, hands each connection to a thread; has no key that opens anything."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING

from storage.deposit import DepositError
from storescp import notify, peers
from storescp.config import Config, parse_address
from storescp.desk.asking import Asking
from storescp.desk.commit import Reports
from storescp.desk.identifiers import lenient
from storescp.desk.outgoing import Outgoing
from storescp.desk.serving import Serving
from storescp.desk.session import Session, Tools
from storescp.desk.storing import Storing
from storescp.errors import StrongroomError
from storescp.gate import listeners
from storescp.gate.connection import Connections, Policy
from storescp.gate.crl import CrlError
from storescp.gate.tls import Trust, server_context
from storescp.peers import PeerError
from storescp.stopping import Stop

if TYPE_CHECKING:
    from storescp.desk.web import Web

_TICK_SECONDS = 0.5
_DRAIN_SECONDS = 10.0
# How often the vault is asked for reports that are due.
_REPORT_SECONDS = 2.0

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Run the desk until SIGTERM or SIGINT.

    Raises:
        StrongroomError: It cannot start.
    """
    if not config.settings.desk.runs:
        raise StrongroomError("there is no desk", hint="desk.listen or desk.web in the configuration opens one")
    lenient()
    stop = Stop()
    stop.on(signal.SIGTERM, signal.SIGINT)
    try:
        desk = _Desk(config)
    except (PeerError, CrlError, OSError) as error:
        raise StrongroomError(f"the desk cannot start: {error}") from error
    signal.signal(signal.SIGHUP, lambda *_: desk.again())
    desk.start()
    notify.ready()
    watchdog = notify.Watchdog()
    while not stop.wait(_TICK_SECONDS):
        desk.look()
        watchdog.turn()
    notify.stopping()
    desk.stop()
    log.info("stopped")


class _Desk:
    """Listeners, connections, and what they are judged by."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = config.settings.desk
        self._stamp = self._files()
        self._policy = self._read()
        asking = Asking(config.desk_socket)
        outgoing = Outgoing(config, lambda: self._policy)
        tools = Tools(config, asking, lambda: self._policy.peers, outgoing)
        settings = config.settings
        self._reports = Reports(asking, outgoing, settings.gate.ae_title, float(settings.desk.idle_seconds))
        self._stopping = threading.Event()
        self._serving = Serving(tools)
        self._connections: Connections[Session] = Connections(self._policy, self._serving)
        self._asking = asking
        self._web: Web | None = None
        self._storing = _storing(config) if self._settings.web else None
        self._room = threading.BoundedSemaphore(self._settings.maximum_associations)
        self._count = 0
        self._again = False
        self._listening: list[socket.socket] = []

    def start(self) -> None:
        """Begin to serve.

        Raises:
            StrongroomError: An address cannot be had.
        """
        try:
            for text in self._settings.listen:
                self._listening.append(listeners.bind(*parse_address(text)))
        except OSError as error:
            raise StrongroomError(f"the desk cannot listen on {text}: {error.strerror}") from error
        if self._settings.web:
            from storescp.desk.web import Web

            self._web = Web(self._config, lambda: self._policy, self._asking, self._storing)
            self._web.start()
        if self._listening:
            threading.Thread(target=self._accept, daemon=True, name="accept").start()
        threading.Thread(target=self._report, daemon=True, name="reports").start()
        addresses = [listeners.text(sock.getsockname()) for sock in self._listening]
        addresses += [f"https://{text}" for text in (self._web.addresses if self._web is not None else ())]
        log.info("listening on %s", ", ".join(addresses))

    def again(self) -> None:
        """Read peers and certificates again at the next look."""
        self._again = True

    def look(self) -> None:
        """Enforce time limits, look after open packs; read peers and certificates again where they changed."""
        self._connections.enforce()
        if self._storing is not None:
            self._storing.look()
        stamp = self._files()
        if stamp == self._stamp and not self._again:
            return
        self._stamp, self._again = stamp, False
        try:
            self._policy = self._connections.policy = self._read()
        except (PeerError, CrlError, OSError) as error:
            reason = "a certificate or key cannot be read" if isinstance(error, ssl.SSLError) else str(error)
            log.error("peers and certificates stay as they were: %s", reason)
            return
        log.info("peers and certificates read: %d peers", len(self._policy.peers.by_title))

    def stop(self) -> None:
        """Accept no more; let requests that are under way end, within a time."""
        self._stopping.set()
        for sock in self._listening:
            sock.close()
        if self._storing is not None:
            self._storing.stopping()
        if self._web is not None:
            self._web.stop(_DRAIN_SECONDS)
        self._connections.drain(_DRAIN_SECONDS)
        if self._storing is not None:
            self._storing.stop()

    def _report(self) -> None:
        while not self._stopping.wait(_REPORT_SECONDS):
            try:
                self._reports.turn(self._policy.peers)
            except Exception:
                log.exception("reports of storage commitment are tried again")

    def _accept(self) -> None:
        poll = select.poll()
        by_descriptor = {sock.fileno(): sock for sock in self._listening}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        while all(sock.fileno() >= 0 for sock in self._listening):
            for descriptor, _ in poll.poll(_TICK_SECONDS * 1000):
                try:
                    connection, address = by_descriptor[descriptor].accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    if by_descriptor[descriptor].fileno() < 0:
                        return
                    # Out of descriptors or memory: connections that end free some.
                    log.error("a connection cannot be accepted: %s", error.strerror)
                    time.sleep(0.1)
                    continue
                self._take(connection, listeners.text(address))

    def _take(self, connection: socket.socket, address: str) -> None:
        if not self._room.acquire(blocking=False):
            log.warning("connection from %s refused: as many as desk.maximum_associations are open", address)
            connection.close()
            return
        self._count = number = self._count + 1

        def ended() -> None:
            self._serving.ended(number)
            self._room.release()

        self._connections.take(number, connection, address, None, ended)

    def _read(self) -> Policy:
        config = self._config
        found = peers.read_all(config.peers)
        trust = Trust(config.trust, config.crls)
        return Policy(found, server_context(config.desk_certificate, config.desk_private_key, trust, found), trust)

    def _files(self) -> tuple[object, ...]:
        config = self._config
        files = [config.desk_certificate, config.desk_private_key, *config.trust, *config.crls]
        return (peers.stamp(config.peers), *(_stamp(str(path)) for path in files))


def _storing(config: Config) -> Storing | None:
    """Return what stores, or None where that cannot be: who finds and fetches does not wait for it."""
    try:
        return Storing(config)
    except (DepositError, OSError) as error:
        log.warning("DICOMweb stores nothing here until the desk is started again: %s", error)
        return None


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
