"""Storage commitment: requests that the gate kept, decided once everything was admitted, reported by the desk.

A request waits in the ledger until its instances are decided: over restarts, and while the vault is locked. What is
decided waits for the desk to tell the peer, later and later, for some days.
Source: PS3.4 J.3; failure reasons: PS3.3 C.14.1.1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from storage.index import Index, Version
from storescp.errors import NOTHING, StrongroomError
from storescp.vault.commitmentrecords import COLLECTING, DECIDED, WAITING, Commitment, Failure, records_of
from storescp.vault.opened import Open
from storescp.vault.scrub import damaged_instances
from storescp.vault.state import Vault

PROCESSING_FAILURE, NO_SUCH_OBJECT, CLASS_CONFLICT = 0x0110, 0x0112, 0x0119
_FIRST_DELAY, _LONGEST_DELAY = 30.0, 6 * 3600.0
# After so long nobody waits for it any more.
_GIVE_UP_SECONDS = 7 * 86_400.0
_SWEEP_SECONDS = 3600.0
# A request has up to 600 KB: so many are in memory at a time, and so many reports are given to the desk.
_PAGE, _AT_ONCE = 10, 10

log = logging.getLogger(__name__)


class Commitments:
    """Decides requests, and says which reports are due. Used by one thread at a time, but for ``due`` and ``told``."""

    def __init__(self, vault: Vault, now: Callable[[], float] = time.time) -> None:
        self._vault = vault
        self._now = now
        # Of what is decided: when it is due, and since when it is. In memory, so that nobody reads all of it each time.
        self._due: dict[str, tuple[float, float]] = {}
        self._of: Open | None = None
        self._swept = 0.0

    def turn(self) -> None:
        """Decide what can be decided, if unlocked; let go of what nobody waits for any more."""
        with self._vault.admitting() as opened:
            if opened is None or opened.index.filled_to() is not None:
                return
            self._learn(opened)
            waiting = records_of(opened.ledger).count(WAITING)
            if waiting:
                # What was acknowledged before a request is listed before that is decided.
                self._vault.admit()
        after = 0
        while waiting and (after := self._decide_some(after)):
            # Between two pages others get their turn.
            pass
        if self._now() - self._swept >= _SWEEP_SECONDS:
            self._swept = self._now()
            self._sweep()

    def due(self) -> Iterator[dict[str, Any]]:
        """Return the reports that are due now, those that wait longest first, and not too many at a time.

        Raises:
            StrongroomError: The vault is locked.
        """
        with self._vault.admitting():
            opened = self._vault.unlocked()
            self._learn(opened)
            now, known = self._now(), records_of(opened.ledger)
            first = sorted((due, name) for name, (due, _) in self._due.items() if due <= now)[:_AT_ONCE]
            # One that was asked anew meanwhile is not decided any more.
            found = [c for _, name in first if (c := known.get(name)) is not None and c.decided]
        return map(_report, found)

    def told(self, uid: int, commitment_id: str, decided: float, *, delivered: bool, why: str) -> None:
        """Hear whether a report was delivered.

        Args:
            uid: Who says it.
            commitment_id: Of the report.
            decided: As the report has it: what was asked anew since is another one.
            delivered: Whether the peer took it.
            why: Why it did not.

        Raises:
            StrongroomError: The vault is locked, or there is no such report.
        """
        with self._vault.admitting():
            opened = self._vault.unlocked()
            known = records_of(opened.ledger)
            commitment = known.get(commitment_id)
            if commitment is None or commitment.decided != decided:
                raise StrongroomError("no such commitment", status=NOTHING)
            counts = {"committed": len(commitment.pairs()) - len(commitment.failed), "failed": len(commitment.failed)}
            if delivered:
                self._vault.auditor.tell("commitment-reported", uid=uid, peer=commitment.calling, **counts)
                known.remove(commitment_id)
                self._due.pop(commitment_id, None)
                return
            delay = min(_FIRST_DELAY * 2.0**commitment.attempts, _LONGEST_DELAY)
            commitment.attempts += 1
            commitment.due = self._now() + delay
            known.put(commitment_id, commitment, DECIDED)
            self._due[commitment_id] = (commitment.due, commitment.decided)
        log.warning("a report of storage commitment to %s is tried again in %g s: %s", commitment.calling, delay, why)

    def _learn(self, opened: Open) -> None:
        """Read what is decided, once for each time that the vault is unlocked."""
        if self._of is opened:
            return
        self._due = {}
        after, known = 0, records_of(opened.ledger)
        while page := known.page(DECIDED, after=after, limit=_PAGE):
            after = page[-1][0]
            self._due |= {commitment.id: (commitment.due, commitment.decided) for _, commitment in page}
        self._of = opened

    def _decide_some(self, after: int) -> int:
        """Decide some requests behind a number; return the last one's, 0 where there are no more."""
        with self._vault.admitting() as opened:
            if opened is None or opened is not self._of or opened.admission.stuck:
                return 0
            known = records_of(opened.ledger)
            page = known.page(WAITING, after=after, limit=_PAGE)
            damage = damaged_instances(opened) if page else {}
            for _, commitment in page:
                if _is_decided(opened.index, commitment, damage):
                    commitment.due = commitment.decided = self._now()
                    known.put(commitment.id, commitment, DECIDED)
                    self._due[commitment.id] = (commitment.due, commitment.decided)
            return page[-1][0] if page else 0

    def _sweep(self) -> None:
        """Let go of what nobody waits for any more: parts of a request, and reports that nobody took."""
        with self._vault.admitting() as opened:
            if opened is None or opened is not self._of:
                return
            known, before = records_of(opened.ledger), self._now() - _GIVE_UP_SECONDS
            gone = [name for name, (_, since) in self._due.items() if since < before]
            after = 0
            while page := known.page(COLLECTING, after=after, limit=_PAGE):
                after = page[-1][0]
                gone += [commitment.id for _, commitment in page if commitment.asked < before]
            for name in gone:
                calling = name.rpartition("/")[0]
                log.error("a storage commitment of %s was never reported and is let go", calling)
                self._vault.auditor.tell("commitment-dropped", peer=calling)
                known.remove(name)
                self._due.pop(name, None)


def _report(commitment: Commitment) -> dict[str, Any]:
    failed = {(failure.sop_class, failure.sop) for failure in commitment.failed}
    return {
        "id": commitment.id,
        "peer": commitment.calling,
        "decided": commitment.decided,
        "transaction": commitment.transaction,
        "committed": [pair for pair in commitment.pairs() if pair not in failed],
        "failed": [[f.sop_class, f.sop, f.reason] for f in commitment.failed],
    }


def _is_decided(index: Index, commitment: Commitment, damage: dict[str, set[str]]) -> bool:
    """Tell whether a request is decided, and what of it failed; not while something of it is yet to be admitted."""
    failed = []
    for sop_class, sop in commitment.pairs():
        standing = [_damaged(version, sop, damage) for version in index.standing(sop)]
        reason = decide(standing, sop_class, commitment.calling)
        if reason is None:
            return False
        if reason:
            failed.append(Failure(sop_class, sop, reason))
    commitment.failed = failed
    return True


def _damaged(version: Version, sop: str, damage: dict[str, set[str]]) -> Version:
    """Return a version of an instance as it is: what the scrub found damaged since is held by name alone."""
    named = damage.get(version.pack)
    # Of a pack that is missing, or whose instances nobody can name, nothing is left.
    return version._replace(state="damaged") if named is not None and (not named or sop in named) else version


def decide(standing: Sequence[Version], sop_class: str, calling: str) -> int | None:
    """Return why an instance is not committed, 0 where it is, None where it is yet to be admitted.

    Args:
        standing: Each version of it.
        sop_class: As the request has it.
        calling: Who asks: only what came from there counts.
    """
    mine = [version for version in standing if version.calling == calling]
    # What it sent is not what is held: it must keep its own.
    if any(version.state == "quarantined" for version in mine):
        return PROCESSING_FAILURE
    if any(not version.admitted for version in mine):
        return None
    good = [version for version in mine if version.state in {"held", "again", "encoding"}]
    if not good:
        return PROCESSING_FAILURE if mine else NO_SUCH_OBJECT
    return 0 if all(version.sop_class == sop_class for version in good) else CLASS_CONFLICT
