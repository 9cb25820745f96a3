"""Sending audit messages: a process that opens the vault's spool with a key of its own, and no key of the store.

What was sent on a connection counts as delivered once that connection ended in order; else all of it is sent again. So
a message may arrive twice, with the same number, and none is left out. A process that is killed goes on where the file
``acknowledged`` says.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from keys import encoding
from keys.forwarding import ForwardingKey, new_private
from keys.seal import SealError
from keys.versions import store_id_of
from storescp import auditevents, auditmessage, auditspool, clock, notify
from storescp.auditevents import Source
from storescp.auditspool import Message
from storescp.config import Config
from storescp.errands import syslog
from storescp.errands.alone import alone
from storescp.errands.connection import DeliveryError
from storescp.errors import USAGE, StrongroomError
from storescp.stopping import Stop

_POLL_SECONDS = 1.0
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
# What one connection carries at most, and how long it waits for more.
WINDOW = 1000
_KEY_LIMIT = 1 << 10

log = logging.getLogger(__name__)


class Connection(Protocol):
    """A way to the server that says at its end whether everything was read."""

    def send(self, frames: bytes) -> None:
        """Send frames."""

    def finish(self) -> None:
        """End in order."""

    def close(self) -> None:
        """Let go."""


class Forwarder:
    """Sends what lies in the spool. One process a store."""

    def __init__(self, config: Config, connect: Callable[[], Connection], now: Callable[[], float] = time.time) -> None:
        self._config = config
        self._connect = connect
        self._now = now
        self._key = _key(config)
        self._store_id = store_id_of(config.signing_key)
        self._host = socket.gethostname()
        self._acknowledged = auditspool.acknowledged(config.audit_forwarder)
        self._locked = ""
        self._failures = 0
        self._due = 0.0
        self._unopened: set[str] = set()

    @property
    def acknowledged(self) -> int:
        """The number of the last message that is known to be delivered."""
        return self._acknowledged

    def turn(self) -> bool:
        """Send what waits, on one connection; tell whether more waits."""
        if self._now() < self._due and self._due - self._now() <= _LONGEST_DELAY:
            return False
        try:
            since = auditspool.locked_since(self._config.audit_out)
            waiting = self._waiting()
        except OSError as error:
            self._failed(f"the spool {self._config.audit_out} cannot be read: {error.strerror or error}")
            return False
        first = next(waiting, None)
        if first is None and since == self._locked:
            return False
        try:
            sent, more = self._send(first, waiting, since)
        except (DeliveryError, OSError) as error:
            self._failed(str(error))
            return False
        if self._failures:
            log.warning("audit messages are delivered again")
        self._failures, self._due, self._locked = 0, 0.0, since
        if sent:
            self._acknowledged = sent
            try:
                auditspool.acknowledge(self._config.audit_forwarder, sent)
            except OSError as error:
                # They go once more after a restart.
                log.error("what was delivered cannot be remembered: %s", error.strerror)
        return more

    def _send(self, first: Message | None, waiting: Iterator[Message], since: str) -> tuple[int, bool]:
        channel = self._connect()
        try:
            last, more = 0, False
            if since != self._locked:
                channel.send(self._frame(self._about_lock(since)))
            message = first
            for _ in range(WINDOW):
                if message is None:
                    break
                channel.send(self._frame(message))
                last = message.seq
                message = next(waiting, None)
            else:
                more = message is not None
            channel.finish()
            return last, more
        finally:
            channel.close()

    def _waiting(self) -> Iterator[Message]:
        """Yield the messages behind the last delivered one, in order."""
        expected = self._acknowledged
        for _, last, path in auditspool.files(self._config.audit_out):
            if last <= expected:
                continue
            sealed = auditspool.read_file(path)
            if sealed is None:
                return
            try:
                messages = auditspool.decoded(self._key.open(sealed, self._store_id, path.name))
            except (SealError, ValueError) as error:
                # Not what follows it, either: the vault makes it again, and the order stays.
                if path.name not in self._unopened:
                    log.error("%s in the spool does not open, and what follows waits: %s", path.name, error)
                self._unopened.add(path.name)
                return
            for message in messages:
                if message.seq > expected:
                    expected = message.seq
                    yield message

    def _frame(self, message: Message) -> bytes:
        settings = self._config.settings.audit
        return syslog.frame(message, self._host, os.getpid(), settings.facility, settings.enterprise)

    def _about_lock(self, since: str) -> Message:
        source = Source(self._store_id.hex(), self._config.settings.gate.ae_title, self._host)
        now = clock.text_of(self._now())
        said = auditevents.vault_locked(since or self._locked, now, source, over=not since)
        return Message(0, 0, now, said.outcome, auditmessage.encode(said).decode())

    def _failed(self, why: str) -> None:
        self._failures += 1
        delay = min(_FIRST_DELAY * 2.0 ** min(self._failures - 1, 10), _LONGEST_DELAY)
        self._due = self._now() + delay
        # Each try would fill the log in a long outage.
        level = logging.ERROR if self._failures == 1 or delay == _LONGEST_DELAY else logging.INFO
        log.log(level, "audit messages are not delivered: %s; tried again in %g s", why, delay)


def run(config: Config) -> None:
    """Send until SIGTERM or SIGINT.

    Raises:
        StrongroomError: Nothing is configured, a file cannot be used, or another forwarder runs.
    """
    stop = Stop()
    stop.on(signal.SIGTERM, signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    connect = connector(config)
    # The vault reads the public half here.
    with alone(config.audit_forwarder, "sends the audit messages", 0o755):
        forwarder = Forwarder(config, connect)
        log.info("audit messages go to %s", config.settings.audit.forward)
        notify.ready()
        while not stop.is_set():
            if not forwarder.turn():
                stop.wait(_POLL_SECONDS)
        notify.stopping()


def connector(config: Config) -> Callable[[], Connection]:
    """Return how the server is reached.

    Raises:
        StrongroomError: None is configured, or the certificates cannot be used.
    """
    settings = config.settings.audit
    if not settings.forward:
        raise StrongroomError("there is no server to send audit messages to", hint="set audit.forward", status=USAGE)

    def connect() -> Connection:
        # Read each time: a renewed certificate needs no restart.
        return syslog.Channel(*settings.server(), _context(config))

    _context(config)
    return connect


def _context(config: Config) -> ssl.SSLContext:
    try:
        return syslog.context(
            str(config.audit_trust), str(config.audit_certificate or ""), str(config.audit_private_key or "")
        )
    except OSError as error:
        raise StrongroomError(
            f"audit.trust, audit.certificate or audit.private_key cannot be used: {error.strerror or error}",
            hint="the forwarder's user must be able to read these files",
        ) from error


def _key(config: Config) -> ForwardingKey:
    """Return the forwarder's key; make it where there is none.

    Raises:
        StrongroomError: It cannot be read or made.
    """
    folder = config.audit_forwarder
    path = folder / auditspool.KEY
    try:
        content = auditspool.read(path, _KEY_LIMIT)
        if content is None:
            content = new_private()
            encoding.create(path, content)
            log.info("made a key of the forwarder's own")
        key = ForwardingKey(content)
        if auditspool.read(folder / auditspool.PUBLIC) != key.recipient.file():
            encoding.replace(folder / auditspool.PUBLIC, key.recipient.file(), 0o644)
    except (OSError, ValueError) as error:
        raise StrongroomError(
            f"the forwarder's key {path} cannot be used: {error}",
            hint="where it is damaged, remove it: a new one is made, and the vault seals anew what waits",
        ) from error
    return key
