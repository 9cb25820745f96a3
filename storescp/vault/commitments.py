"""Storage commitment: requests that the gate kept, decided once everything was admitted, reported by the desk.

A request waits in the ledger until its instances are decided: over restarts, and while the vault is locked. What is
decided waits for the desk to tell the peer, later and later, for some days.
Source: PS3.4 J.3; failure reasons: PS3.3 C.14.1.1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from storage.index import Index
from storescp.errors import NOTHING, StrongroomError
from storescp.vault.commitmentrecords import COLLECTING, DECIDED, WAITING, Commitment, Failure, records_of
from storescp.vault.state import Vault

PROCESSING_FAILURE, NO_SUCH_OBJECT, CLASS_CONFLICT = 0x0110, 0x0112, 0x0119
_FIRST_DELAY, _LONGEST_DELAY = 30.0, 6 * 3600.0
# After so long nobody waits for it any more.
_GIVE_UP_SECONDS = 7 * 86_400.0

log = logging.getLogger(__name__)


class Commitments:
    """Decides requests, and says which reports are due."""

    def __init__(self, vault: Vault, now: Callable[[], float] = time.time) -> None:
        self._vault = vault
        self._now = now
        # All that was acknowledged before then is listed.
        self._listed = 0.0

    def turn(self) -> None:
        """Decide what can be decided, if unlocked; let go of what nobody waits for any more."""
        with self._vault.admitting() as opened:
            if opened is None or opened.index.filled_to() is not None:
                return
            known = records_of(opened.ledger)
            waits = max((commitment.asked for commitment in known.all(WAITING)), default=0.0)
            if waits and (waits >= self._listed or opened.admission.stuck):
                # What was acknowledged before a request is listed before that is decided.
                now = self._now()
                self._vault.admit()
                self._listed = now
            for commitment in known.all(WAITING):
                if not opened.admission.stuck and _is_decided(opened.index, commitment):
                    commitment.due = commitment.decided = self._now()
                    known.put(commitment.id, commitment, DECIDED)
            for state in (COLLECTING, DECIDED):
                for commitment in known.all(state):
                    if self._now() - max(commitment.asked, commitment.decided) > _GIVE_UP_SECONDS:
                        log.error("a storage commitment of %s was never reported and is let go", commitment.calling)
                        self._vault.auditor.tell("commitment-dropped", peer=commitment.calling)
                        known.remove(commitment.id)

    def due(self) -> Iterator[dict[str, Any]]:
        """Return the reports that are due now.

        Raises:
            StrongroomError: The vault is locked.
        """
        with self._vault.admitting():
            opened = self._vault.unlocked()
            found = [c for c in records_of(opened.ledger).all(DECIDED) if c.due <= self._now()]
        return map(_report, found)

    def told(self, uid: int, commitment_id: str, *, delivered: bool, why: str) -> None:
        """Hear whether a report was delivered.

        Raises:
            StrongroomError: The vault is locked, or there is no such report.
        """
        with self._vault.admitting():
            opened = self._vault.unlocked()
            known = records_of(opened.ledger)
            commitment = known.get(commitment_id)
            if commitment is None:
                raise StrongroomError("no such commitment", status=NOTHING)
            counts = {"committed": len(commitment.pairs()) - len(commitment.failed), "failed": len(commitment.failed)}
            if delivered:
                self._vault.auditor.tell("commitment-reported", uid=uid, peer=commitment.calling, **counts)
                known.remove(commitment_id)
                return
            delay = min(_FIRST_DELAY * 2.0**commitment.attempts, _LONGEST_DELAY)
            commitment.attempts += 1
            commitment.due = self._now() + delay
            known.put(commitment_id, commitment, DECIDED)
        log.warning("a report of storage commitment to %s is tried again in %g s: %s", commitment.calling, delay, why)


def _report(commitment: Commitment) -> dict[str, Any]:
    failed = {(failure.sop_class, failure.sop) for failure in commitment.failed}
    return {
        "id": commitment.id,
        "peer": commitment.calling,
        "transaction": commitment.transaction,
        "committed": [pair for pair in commitment.pairs() if pair not in failed],
        "failed": [[f.sop_class, f.sop, f.reason] for f in commitment.failed],
    }


def _is_decided(index: Index, commitment: Commitment) -> bool:
    """Tell whether a request is decided, and what of it failed; not while something of it is yet to be admitted."""
    failed = []
    for sop_class, sop in commitment.pairs():
        reason = decide(index.standing(sop), sop_class, commitment.calling)
        if reason is None:
            return False
        if reason:
            failed.append(Failure(sop_class, sop, reason))
    commitment.failed = failed
    return True


def decide(standing: list[tuple[str, str, str, bool]], sop_class: str, calling: str) -> int | None:
    """Return why an instance is not committed, 0 where it is, None where it is yet to be admitted.

    Args:
        standing: Each version of it: state, SOP class, calling AE title, and whether it is admitted.
        sop_class: As the request has it.
        calling: Who asks: only what came from there counts.
    """
    mine = [version for version in standing if version[2] == calling]
    # What it sent is not what is held: it must keep its own.
    if any(state == "quarantined" for state, _, _, _ in mine):
        return PROCESSING_FAILURE
    if any(not admitted for _, _, _, admitted in mine):
        return None
    good = [version for version in mine if version[0] in {"held", "again", "encoding"}]
    if not good:
        return PROCESSING_FAILURE if mine else NO_SUCH_OBJECT
    return 0 if all(version[1] == sop_class for version in good) else CLASS_CONFLICT
