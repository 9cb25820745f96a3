"""Whether the vault is locked, and what may happen at a time."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator

from keys import keyring, slots
from keys.anchors import AnchorError, AnchorTokenError
from keys.keyring import KeyringError
from keys.token import TokenError
from storage.migrate import upgrade
from storescp.alerts import Alerts
from storescp.config import Config
from storescp.errors import LOCKED, StrongroomError
from storescp.snapshot import Patches
from storescp.vault.anchors import anchors_of
from storescp.vault.auditor import Auditor
from storescp.vault.opened import Open

_WRONG_SECRET_DELAY_LIMIT = 30.0
# A small store is whole when it is unlocked; who starts the vault waits no longer than this for a large one.
_FILL_SECONDS = 5.0

log = logging.getLogger(__name__)


class Vault:
    """A store that is locked or unlocked, and the admission of what waits."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.auditor = Auditor(config)
        self.alerts = Alerts(config.outbox)
        self.locked_since = time.time()
        # What the last patch report of this process counted, for the metrics.
        self.patches: Patches | None = None
        self._anchors = anchors_of(config)
        self._open: Open | None = None
        self._state = threading.RLock()
        # What has to be finished before anything is admitted; set once by who knows it.
        self.after_unlock: Callable[[], None] = lambda: None
        # Whether somebody calls ``advance`` again and again.
        self.background = False
        self._wrong = 0
        self._wrong_lock = threading.Lock()

    @property
    def opened(self) -> Open | None:
        """What an unlocked vault has in hand, None while it is locked."""
        return self._open

    def unlocked(self) -> Open:
        """Return what an unlocked vault has in hand.

        Raises:
            StrongroomError: It is locked.
        """
        if self._open is None:
            raise StrongroomError("the vault is locked", hint="'strongroom unlock' opens it", status=LOCKED)
        return self._open

    @contextlib.contextmanager
    def admitting(self) -> Iterator[Open | None]:
        """Keep lock, unlock and admission away meanwhile; gives what an unlocked vault has in hand."""
        with self._state:
            yield self._open

    @contextlib.contextmanager
    def step(self, open_: Open, doing: str, goes_on: str) -> Iterator[None]:
        """Keep lock and admission away for a step of something long.

        Args:
            open_: What was in hand when it began: a vault that was locked meanwhile has other keys, or none.
            doing: What it is, as in "the rotation".
            goes_on: How it goes on, in words.

        Raises:
            StrongroomError: It was locked.
        """
        with self._state:
            if self._open is not open_:
                raise StrongroomError(
                    f"the vault was locked during {doing}", hint=f"'strongroom unlock', then {goes_on}", status=LOCKED
                )
            yield

    def unlock(self, secret: slots.Secret, *, uid: int | None = None) -> None:
        """Open the keyring, finish what a crash interrupted, and begin to admit.

        Args:
            secret: Opens a slot.
            uid: Who asks; None for the vault itself.

        Raises:
            StrongroomError: It cannot be recorded.
            UnlockError: No slot opens with this secret.
            KeyringError: The keyring is damaged or old.
            AnchorError: The anchors are not here.
        """
        ring = keyring.unlock(self.config.keyring, secret, self._anchors)
        # Now, while their token is here: a vault that is unlocked goes on without it.
        for number, why in ring.open_versions().items():
            if number == max(record.version for record in ring.body.versions):
                ring.forget()
                raise why
            log.error("key version %d does not open, and nothing that is under it: %s", number, why)
        with self._state:
            if self._open is not None:
                ring.forget()
                return
            opened = Open(self.config, ring)
            try:
                self.auditor.unlocked(ring, opened.own_ledger())
                self.auditor.record("unlocked", uid=uid, by=type(secret).__name__)
                opened.start()
                if not opened.admission.fill(_FILL_SECONDS if self.background else math.inf):
                    log.info("the index is being filled; nothing is listed or admitted until it is whole")
            except BaseException:
                self.auditor.locked()
                opened.close()
                raise
            self._open = opened
            self.after_unlock()
        log.info("unlocked")

    def try_unlock(self, secret: slots.Secret, uid: int) -> None:
        """Unlock for somebody who asks; each wrong secret makes the next answer slower.

        Raises:
            StrongroomError: It does not open; one constant message for every wrong secret.
        """
        # One at a time: guesses in parallel would not wait for each other's delay.
        with self._wrong_lock:
            try:
                self.unlock(secret, uid=uid)
            except slots.UnlockError as error:
                self._wrong += 1
                self.auditor.tell("unlock-refused", uid=uid, in_a_row=self._wrong)
                log.warning("a wrong secret was given to unlock, %d in a row", self._wrong)
                time.sleep(min(2.0 ** (self._wrong - 2), _WRONG_SECRET_DELAY_LIMIT))
                raise StrongroomError(str(error), hint="try again, or use another slot", status=LOCKED) from error
            except (AnchorTokenError, TokenError) as error:
                raise StrongroomError(
                    str(error), hint="mend that and unlock again; docs/anchors.md, 'When the token is gone', says more"
                ) from error
            except (KeyringError, AnchorError, slots.CredentialError) as error:
                raise StrongroomError(str(error), hint="see docs/admin.md, 'What losing a key means'") from error
            self._wrong = 0

    def lock(self, *, uid: int | None = None) -> None:
        """Forget the keys. Whether that can be recorded or not: nobody is kept from locking."""
        with self._state:
            if self._open is not None:
                self.auditor.locked(uid=uid)
                self._open.close()
                self._open = None
                self.locked_since = time.time()
                log.info("locked")

    def admit(self) -> None:
        """Admit what waits and list what is still open, if unlocked: for somebody who asks."""
        with self._state:
            if self._open is not None:
                _told(self._open.admission.catch_up())
                self.auditor.take(self._open.owners)

    def fill(self, seconds: float) -> tuple[int, int] | None:
        """Fill the index for a time; return how many packs are in it, of how many, or None when it is whole.

        Raises:
            StrongroomError: The vault is locked.
        """
        with self._state:
            admission = self.unlocked().admission
            return None if admission.fill(seconds) else admission.filling()

    def advance(self, seconds: float) -> bool:
        """Admit for a time, if unlocked; tell whether nothing is left that can be admitted now."""
        with self._state:
            if self._open is None:
                return True
            count, done = self._open.admission.advance(seconds)
            self.auditor.take(self._open.owners)
            self.auditor.flush()
        _told(count)
        return done

    def upgrade(self, secret: slots.Secret) -> list[str]:
        """Bring a store of an older format to this release's; return what was done.

        Raises:
            StrongroomError: It is in use, or does not open.
        """
        with self._state:
            if self._open is not None:
                return []
            try:
                ring = keyring.unlock(self.config.keyring, secret, self._anchors, older=True)
                done = upgrade(ring, self.config.store_path)
            except slots.UnlockError as error:
                raise StrongroomError(str(error), status=LOCKED) from error
            except (KeyringError, AnchorError, TokenError, slots.CredentialError) as error:
                raise StrongroomError(str(error)) from error
            ring.forget()
        return done


def _told(count: int) -> None:
    if count:
        log.info("admitted %d pack%s", count, "" if count == 1 else "s")
