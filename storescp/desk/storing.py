"""What comes to the desk to be stored: deposited as the gate deposits, with its checks, in a folder of the desk's own.

The desk seals what it can then open no more; the vault copies, opens and judges it like what comes from the gate.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from keys.versions import store_id_of
from storage.deposit import DepositError, Deposits, Fence, PublishedKeys
from storage.openpack import remove_unfinished
from storescp.config import Config
from storescp.gate.describe import Describer
from storescp.gate.dimse import C_STORE_RQ, Command
from storescp.gate.incoming import Incoming
from storescp.gate.journal import TRACE, Journal
from storescp.gate.negotiate import Context, may_hold
from storescp.gate.origin import Origin
from storescp.gate.quota import Allowances, Quotas, Use
from storescp.gate.status import Reason, RefusedError
from storescp.gate.transfer import ENCODINGS
from storescp.inboxes import owners
from storescp.peers import Peer
from storescp.space import Watch

# How often events are written for the vault.
_FLUSH_SECONDS = 5.0

log = logging.getLogger(__name__)


class Storing:
    """Open packs, free space, limits and events of what the desk stores. Safe to use from many threads."""

    def __init__(self, config: Config) -> None:
        """Prepare.

        Raises:
            DepositError: No deposit key is published, the folder is missing, or the vault would not look there.
            StrongroomError: The gate's user does not exist.
            OSError: Free space cannot be seen.
        """
        settings, inbox = config.settings.gate, config.desk_incoming
        if owners(config).get(inbox) != os.geteuid():
            raise DepositError("the vault takes nothing from this user: desk.user names another one, or nobody")
        store_id = store_id_of(config.signing_key)
        keys = PublishedKeys(config.public, config.signing_key)
        self._deposits = Deposits(
            inbox,
            store_id,
            keys,
            size_limit=settings.pack_bytes,
            idle_seconds=settings.pack_idle_seconds,
            open_per_peer=settings.packs_per_peer,
            fence=Fence(config.public, config.signing_key),
        )
        self._deposits.check()
        remove_unfinished(inbox)
        self._space = Watch(config, inbox)
        self._lock = threading.Lock()
        self._quotas = Quotas()
        self._allowances = Allowances(lambda _: None)
        self._flushed = time.monotonic()
        self.journal = Journal(inbox, store_id, PublishedKeys(config.public, config.signing_key), config.public / TRACE)

    def begin(
        self, uids: tuple[str, str, str], peer: Peer, origin: Origin, describer: Describer, study: str
    ) -> Incoming:
        """Begin an instance.

        Args:
            uids: SOP class, SOP instance and transfer syntax, as its file's header names them.
            peer: Who sends it.
            origin: The request that it comes with.
            describer: Of that request.
            study: The Study Instance UID that it must have; empty for any.

        Raises:
            RefusedError: It is not taken.
        """
        sop_class, instance, syntax = uids
        if syntax not in ENCODINGS:
            raise RefusedError(Reason.TRANSFER_SYNTAX)
        if not may_hold(peer, sop_class):
            raise RefusedError(Reason.SOP_CLASS)
        if self._allowances.is_used_up(peer):
            raise RefusedError(Reason.DAY_USED_UP)
        command = Command(C_STORE_RQ, 0, sop_class, instance, has_data_set=True)
        return Incoming(command, Context(sop_class, syntax), origin, self._deposits, describer, self._space, study)

    def took(self, peer: Peer, size: int) -> None:
        """Count an instance of so many bytes; wait, if the peer is too fast and the server does not stop."""
        with self._lock:
            self._space.took(size)
            if peer.objects_per_minute or peer.bytes_per_day:
                use = Use(peer.ae_title, 1, size, peer.objects_per_minute, peer.bytes_per_day)
                if (hold := self._quotas.add(use, time.time())) is not None:
                    self._allowances.hold(hold)
        self._allowances.pause(peer)

    def look(self) -> None:
        """Close packs that are idle, measure the space, write events. Whatever fails is tried again."""
        try:
            self._deposits.close_idle()
            with self._lock:
                self._space.look()
        except (DepositError, OSError) as error:
            log.error("open packs cannot be looked after: %s", error)
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self.journal.flush()

    def stopping(self) -> None:
        """Let nobody wait any more."""
        self._allowances.stop()

    def stop(self) -> None:
        """Close every pack, write what is to be told."""
        self._deposits.close_all()
        self.journal.flush()
