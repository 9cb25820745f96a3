"""Sending alerts: a process that reads the vault's outbox, writes a folder of its own, and holds no key of the store.

Each alert goes every configured way once, again after ``alerts.repeat`` while it stands, and once more when it is over.
What was sent is remembered in a file, so that a restart repeats nothing; a crash between sending and remembering
repeats one message. A way that fails is tried again later and later; the others do not wait for it.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from keys import encoding
from storescp import alerts, clock, notify
from storescp.alerts import Alert
from storescp.config import Config
from storescp.errands.alone import alone
from storescp.errands.connection import DeliveryError
from storescp.errands.ways import Message, Way, ways_of
from storescp.errors import USAGE, StrongroomError
from storescp.stopping import Stop

_POLL_SECONDS = 2.0
# What comes back within this time was never over: something that flaps fills nobody's mailbox.
SETTLED_SECONDS = 300.0
_FIRST_DELAY, _LONGEST_DELAY = 60.0, 3600.0
_AT_ONCE = 20
_STATE = "sent.json"
_STATE_LIMIT = 1 << 20

log = logging.getLogger(__name__)


class Sent(msgspec.Struct):
    """What was told about an alert: each way's key with when it was. ``gone`` is when the alert was first not there."""

    alert: Alert
    told: dict[str, float] = msgspec.field(default_factory=dict)
    gone: float | None = None


class Fault(msgspec.Struct):
    """Since when a way does not work, and why."""

    since: str
    why: str


class State(msgspec.Struct, forbid_unknown_fields=True):
    """What the sender remembers."""

    format: int = 1
    sent: dict[str, Sent] = msgspec.field(default_factory=dict)
    faults: dict[str, Fault] = msgspec.field(default_factory=dict)


class Sender:
    """Decides what is due and sends it. One process a store."""

    def __init__(
        self,
        config: Config,
        ways: Sequence[Way],
        now: Callable[[], float] = time.time,
        settled: float = SETTLED_SECONDS,
    ) -> None:
        self._config = config
        self._ways = ways
        self._now = now
        self._settled = settled
        self._repeat = config.settings.alerts.repeat_after().total_seconds()
        self._file = config.alert_state / _STATE
        self._state = read_state(config)
        self._failures: dict[str, tuple[int, float]] = {}
        self._unsaved = False
        self._blind = ""
        keys = {way.key for way in ways}
        self._state.faults = {key: fault for key, fault in self._state.faults.items() if key in keys}
        for sent in self._state.sent.values():
            # Who is not configured any more is told nothing, and holds nothing up.
            sent.told = {key: when for key, when in sent.told.items() if key in keys}

    def turn(self) -> None:
        """Look at the outbox once and send what is due."""
        now = self._now()
        if not self._look(now):
            return
        for way in self._ways:
            count, due = self._failures.get(way.key, (0, 0.0))
            # A clock that was set back holds nothing up.
            if not count or now >= due or due - now > _LONGEST_DELAY:
                self._serve(way, now, count)
        for name, sent in list(self._state.sent.items()):
            if sent.gone is not None and not sent.told and now - sent.gone >= self._settled:
                del self._state.sent[name]
                self._unsaved = True
        self._save()

    def _look(self, now: float) -> bool:
        """Take in what stands and what is gone; tell whether that could be seen."""
        try:
            outbox = alerts.read(self._config.outbox)
        except OSError as error:
            # What cannot be seen is not over.
            if self._blind != (said := f"the outbox {self._config.outbox} cannot be read: {error.strerror}"):
                log.error("%s", said)
            self._blind = said
            return False
        self._blind = ""
        sent = self._state.sent
        for alert in outbox.alerts:
            known = sent.setdefault(alert.name, Sent(alert))
            known.alert, known.gone = alert, None
        here = {alert.name for alert in outbox.alerts} | set(outbox.unreadable)
        for name, known in sent.items():
            if name not in here and (known.gone is None or known.gone > now):
                known.gone = now
                self._unsaved = True
        return True

    def _serve(self, way: Way, now: float, failures: int) -> None:
        for event, sent in list(self._due(way, now))[:_AT_ONCE]:
            try:
                said = way.deliver(message(self._config, event, sent.alert))
            except DeliveryError as error:
                self._failed(way, now, failures + 1, str(error))
                return
            if said:
                log.error("%s: %s", way.label, said)
            if event == "resolved":
                del sent.told[way.key]
            else:
                sent.told[way.key] = now
            if self._failures.pop(way.key, None) or self._state.faults.pop(way.key, None):
                self._state.faults.pop(way.key, None)
                log.warning("%s works again", way.label)
            failures = 0
            self._unsaved = True
            # After each message: a crash repeats one at most.
            self._save()

    def _due(self, way: Way, now: float) -> Iterator[tuple[str, Sent]]:
        for sent in self._state.sent.values():
            told = sent.told.get(way.key)
            if sent.gone is not None:
                # Who never heard of it need not hear that it is over.
                if told is not None and now - sent.gone >= self._settled:
                    yield "resolved", sent
            elif told is None:
                yield "raised", sent
            elif now - told >= self._repeat or told > now:
                yield "repeated", sent

    def _failed(self, way: Way, now: float, failures: int, why: str) -> None:
        delay = min(_FIRST_DELAY * 2.0 ** min(failures - 1, 10), _LONGEST_DELAY)
        self._failures[way.key] = failures, now + delay
        log.error("an alert is not delivered, %s: %s; tried again in %g s", way.label, why, delay)
        since = self._state.faults[way.key].since if way.key in self._state.faults else clock.text_of(now)
        self._state.faults[way.key] = Fault(since, why)
        self._unsaved = True

    def _save(self) -> None:
        if not self._unsaved:
            return
        try:
            encoding.replace(self._file, encoding.canonical(self._state))
            self._unsaved = False
        except OSError as error:
            # In memory it is known all the same.
            log.error("what was sent cannot be remembered in %s: %s", self._file, error.strerror)


def message(config: Config, event: str, alert: Alert) -> Message:
    """Return what is said of an alert: ``raised``, ``repeated``, ``resolved`` or ``test``."""
    server = f"{config.settings.gate.ae_title} on {socket.gethostname()}"
    about = f"{alert.kind} ({alert.what})" if alert.what else alert.kind
    word = {"raised": "ALERT", "repeated": "STILL", "resolved": "RESOLVED", "test": "TEST"}[event]
    lines = {
        "raised": [f"{alert.text}."],
        "repeated": [f"{alert.text}.", f"This stands since {alert.since}."],
        "resolved": [f"This is over: {alert.text}.", f"It stood since {alert.since}."],
        "test": [f"{alert.text}."],
    }[event]
    if event in {"raised", "repeated"}:
        lines += ["", f"    {alert.command}"]
    return Message(
        f"[strongroom] {word} {about}: {server}",
        [f"{server}, {alert.severity}, {alert.last_seen}", "", *lines],
        {
            "format": 1,
            "event": event,
            "server": server,
            "kind": alert.kind,
            "what": alert.what,
            "counts": alert.counts,
            "severity": alert.severity,
            "text": alert.text,
            "command": alert.command,
            "since": alert.since,
            "last_seen": alert.last_seen,
        },
    )


def read_state(config: Config) -> State:
    """Return what the sender remembers; nothing where it remembers nothing that can be understood.

    Raises:
        StrongroomError: It is there and cannot be read.
    """
    file = config.alert_state / _STATE
    try:
        with file.open("rb") as opened:
            state = encoding.decode(opened.read(_STATE_LIMIT), State)
        for sent in state.sent.values():
            sent.alert.check()
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise StrongroomError(f"{file} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError, UnicodeDecodeError):
        # Better told twice than not at all.
        log.error("%s is damaged: what stands is told once more", file)
        return State()
    return state


def run(config: Config) -> None:
    """Send alerts until SIGTERM or SIGINT.

    Raises:
        StrongroomError: There is nobody to send to, or another sender runs.
    """
    stop = Stop()
    stop.on(signal.SIGTERM, signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ways = configured(ways_of(config))
    with alone(config.alert_state, "sends the alerts"):
        sender = Sender(config, ways)
        log.info("alerts go to the log, and by %s", ", ".join(way.label for way in ways))
        notify.ready()
        sender.turn()
        while not stop.wait(_POLL_SECONDS):
            sender.turn()
        notify.stopping()


def configured(ways: list[Way]) -> list[Way]:
    """Return the ways, of which there is at least one.

    Raises:
        StrongroomError: There is none.
    """
    if not ways:
        raise StrongroomError(
            "there is nobody to send alerts to", hint="set alerts.mail or alerts.webhooks", status=USAGE
        )
    return ways


def test(config: Config, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Send a test every way; return each way's label, and what went wrong, if anything did."""
    now = clock.now()
    sent = message(config, "test", Alert(1, "test", "", {}, now, now))
    results = []
    for way in ways:
        try:
            said, delivered = way.deliver(sent), True
        except DeliveryError as error:
            said, delivered = str(error), False
        results.append({"way": way.label, "delivered": delivered, "said": said})
    return results
