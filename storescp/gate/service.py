"""The gate process: peers and certificates watched, packs closed when idle, associations drained at the end."""

from __future__ import annotations

import logging
import signal
import ssl
import threading
from types import FrameType

from keys.versions import store_id_of
from storage.deposit import DepositError, Deposits, PublishedKeys
from storescp import notify, peers, space
from storescp.config import Config
from storescp.errors import StrongroomError
from storescp.gate.listener import Listener, Policy
from storescp.gate.tls import server_context
from storescp.harden import check_gate
from storescp.peers import PeerError

_TICK_SECONDS = 0.5

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Run the gate until SIGTERM or SIGINT.

    Raises:
        StrongroomError: It cannot start.
    """
    stop = threading.Event()
    reload = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())

    def on_hangup(_signal: int, _frame: FrameType | None) -> None:
        reload.set()

    signal.signal(signal.SIGHUP, on_hangup)
    gate = config.settings.gate
    check_gate(config)
    deposits = Deposits(
        config.incoming,
        store_id_of(config.signing_key),
        PublishedKeys(config.public, config.signing_key),
        size_limit=gate.pack_bytes,
        idle_seconds=gate.pack_idle_seconds,
        open_per_peer=gate.packs_per_peer,
    )
    watched = _stamp(config)
    try:
        deposits.check()
        watch = space.Watch(config)
        listener = Listener(gate, _policy(config), deposits, watch)
    except (DepositError, PeerError, OSError) as error:
        raise StrongroomError(f"the gate cannot start: {error}") from error
    listener.start()
    log.info("listening on %s as %s", ", ".join(listener.addresses), gate.ae_title)
    if not listener.policy.peers.by_title:
        log.warning("no peers are configured: nobody can associate; 'strongroom peer add' adds one")
    notify.ready()
    short = ""
    while not stop.wait(_TICK_SECONDS):
        listener.enforce()
        if reload.is_set() or _stamp(config) != watched:
            reload.clear()
            watched = _stamp(config)
            _reload(config, listener)
        try:
            short = _told(watch, short)
            deposits.close_idle()
        except (DepositError, OSError) as error:
            log.error("open packs and space cannot be looked after: %s", error)
    log.info("stopping: associations in transfer have %d s to finish", gate.drain_seconds)
    notify.stopping()
    listener.stop()
    deposits.close_all()
    log.info("stopped")


def _told(watch: space.Watch, before: str) -> str:
    """Measure the space; say when it ends and when it comes back."""
    watch.look()
    short = watch.shortage()
    if short and not before:
        log.error("nothing more is received, C-STORE is answered A700: %s", short)
    if before and not short:
        log.info("receiving again: there is space")
    return short


def _policy(config: Config) -> Policy:
    found = peers.read_all(config.peers)
    return Policy(found, server_context(config.certificate, config.private_key, config.trust, found))


def _reload(config: Config, listener: Listener) -> None:
    try:
        listener.policy = _policy(config)
    except (PeerError, OSError) as error:
        reason = "a certificate or key cannot be read" if isinstance(error, ssl.SSLError) else str(error)
        log.error("peers and certificates stay as they were: %s", reason)
        return
    log.info("peers and certificates read: %d peers", len(listener.policy.peers.by_title))


def _stamp(config: Config) -> object:
    files = (config.certificate, config.private_key, *config.trust)
    return peers.stamp(config.peers), [f.stat().st_mtime_ns if f.exists() else 0 for f in files]
