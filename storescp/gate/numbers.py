"""The gate's numbers for whoever watches the server: sums over its workers, written by its first process."""

from __future__ import annotations

import time

from storescp import snapshot
from storescp.config import Config, is_ae_title
from storescp.gate import meter, validity
from storescp.gate.meter import Counted
from storescp.gate.status import Reason
from storescp.snapshot import GateNumbers, Pace, Received, Writer

# AE titles that are told apart; a gate knows its peers, and a worker that is broken into makes up no more than these.
# Of what a broken worker may say: more is no number that anybody reads.
_MOST = 1 << 62
_TITLES = 10_000
_REASONS = frozenset({*Reason.__members__, meter.UNRECOGNIZED})


class Numbers:
    """Sums that never fall while this process runs. Does nothing where no metrics are configured."""

    def __init__(self, config: Config, workers: int) -> None:
        self._config = config
        self._wanted = bool(config.settings.metrics.listen)
        self._pace = Pace(config.settings.metrics.seconds)
        self._writer = Writer(config, "gate")
        self._numbers = GateNumbers(
            started=snapshot.now(),
            workers=workers,
            latency=[0] * (len(meter.BUCKETS) + 1),
            turned_away=dict.fromkeys((meter.LISTENER, meter.HANDSHAKE, meter.REQUEST), 0),
        )
        self.read_certificates()

    def read_certificates(self) -> None:
        """Take in until when certificates and lists are good: when they were changed."""
        if self._wanted:
            self._numbers.certificates = validity.ends(self._config)

    def add(self, counted: Counted) -> None:
        """Add what a worker counted."""
        numbers = self._numbers
        if not counted.title:
            for where, count in counted.refused.items():
                if where in {meter.HANDSHAKE, meter.REQUEST}:
                    self.turned_away(where, count)
            return
        if not is_ae_title(counted.title) or (counted.title not in numbers.peers and len(numbers.peers) >= _TITLES):
            return
        peer = numbers.peers.setdefault(counted.title, Received())
        peer.associations += counted.associations
        peer.objects = min(peer.objects + counted.objects, _MOST)
        peer.bytes = min(peer.bytes + counted.bytes, _MOST)
        for reason, count in counted.refused.items():
            if reason in _REASONS:
                peer.refused[reason] = peer.refused.get(reason, 0) + count
        if counted.objects:
            peer.last = snapshot.now()
        if len(counted.buckets) == len(numbers.latency):
            numbers.latency = [a + b for a, b in zip(numbers.latency, counted.buckets, strict=True)]
            numbers.latency_seconds += counted.seconds

    def turned_away(self, where: str, count: int = 1) -> None:
        """Count connections that became no association."""
        self._numbers.turned_away[where] = self._numbers.turned_away.get(where, 0) + count

    def restarted(self) -> None:
        """Count a worker that died and was started again."""
        self._numbers.restarts += 1

    def turn(self, *, ready: int, connections: int, receiving: bool, room: int) -> None:
        """Write the numbers, if it is time.

        Args:
            ready: Workers that receive.
            connections: Connections that there are.
            receiving: Whether there is space.
            room: What the archive may still take, in bytes; below zero where nothing more is received.
        """
        began = time.monotonic()
        if not self._wanted or not self._pace.due(began):
            return
        numbers = self._numbers
        numbers.time, numbers.every = snapshot.now(), self._pace.every
        numbers.ready, numbers.connections, numbers.receiving, numbers.room = ready, connections, receiving, room
        self._writer.write(numbers)
        self._pace.done(began, time.monotonic())
