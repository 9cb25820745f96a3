"""Acts that a second person must approve: asked for by one user id, done when another one approves.

Only where ``retention.second_approver`` says so, and then for releases of holds and for erasures by hand. What waits is
in the ledger, and each step is in the audit chain.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import msgspec

from storage.records import Records
from storescp import clock
from storescp.errors import NOTHING, PARTLY, StrongroomError
from storescp.vault.erase import Erase
from storescp.vault.holding import Holding
from storescp.vault.opened import Open
from storescp.vault.state import Vault

ERASE, RELEASE = "erase", "hold-release"
WAITING, DONE, WITHDRAWN = "waiting", "done", "withdrawn"


class Approval(msgspec.Struct):
    """An act that was asked for: of a study (``erase``) or a hold (``hold-release``), and what became of it."""

    id: str
    act: str
    subject: str
    reason: str
    uid: int
    asked: str
    approved_by: int = -1
    approved: str = ""


class Approvals:
    """What a vault does by hand, at once or after a second approval."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    @property
    def needed(self) -> bool:
        """Tell whether a second person must approve."""
        return self._vault.config.settings.retention.second_approver

    def ask(self, uid: int, act: str, subject: str, reason: str) -> Iterator[dict[str, Any]]:
        """Do an act, or keep it until somebody else approves; yield what happens.

        Raises:
            StrongroomError: It cannot be done, or waits for a second person.
        """
        if not reason.strip():
            raise StrongroomError("this needs a reason")
        if not self.needed:
            yield from self._do(uid, act, subject, reason)
            return
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            waiting = next((a for a in _records(open_).all(WAITING) if (a.act, a.subject) == (act, subject)), None)
            if waiting is None:
                waiting = Approval(secrets.token_hex(4), act, subject, reason, uid, clock.now())
                self._vault.auditor.record("approval-asked", uid=uid, **_said(waiting))
                _records(open_).put(waiting.id, waiting, WAITING)
        raise StrongroomError(
            f"request {waiting.id} waits for a second person: nothing was done yet",
            hint=f"another user gives 'strongroom approve {waiting.id}'",
            status=PARTLY,
        )

    def approve(self, uid: int, approval_id: str) -> Iterator[dict[str, Any]]:
        """Do what somebody else asked for; yield what happens.

        Raises:
            StrongroomError: There is no such request, it is one's own, or it cannot be done.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            approval = self._waiting(open_, approval_id)
            if approval.uid == uid:
                raise StrongroomError(f"request {approval.id} is your own: another user must approve it")
            self._vault.auditor.record("approved", uid=uid, **_said(approval))
        yield from self._do(approval.uid, approval.act, approval.subject, approval.reason)
        with self._vault.admitting():
            approval.approved_by, approval.approved = uid, clock.now()
            if approval.act == ERASE:
                # Nothing but the audit chain names a study that was erased.
                approval.subject = ""
            _records(self._vault.unlocked()).put(approval.id, approval, DONE)

    def withdraw(self, uid: int, approval_id: str) -> Approval:
        """Drop a request, whoever made it.

        Raises:
            StrongroomError: There is no such request.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            approval = self._waiting(open_, approval_id)
            self._vault.auditor.record("approval-withdrawn", uid=uid, **_said(approval))
            _records(open_).put(approval.id, approval, WITHDRAWN)
            return approval

    def waiting(self) -> list[Approval]:
        """Return what waits for a second person."""
        with self._vault.admitting():
            return list(_records(self._vault.unlocked()).all(WAITING))

    def _waiting(self, open_: Open, approval_id: str) -> Approval:
        approval = _records(open_).get(approval_id)
        if approval is None or approval not in _records(open_).all(WAITING):
            raise StrongroomError(
                f"no request {approval_id} waits for an approval", hint="'strongroom approve --list'", status=NOTHING
            )
        return approval

    def _do(self, uid: int, act: str, subject: str, reason: str) -> Iterator[dict[str, Any]]:
        if act == ERASE:
            yield from Erase(self._vault).run(uid, subject, reason)
        else:
            hold = Holding(self._vault).release(uid, subject, reason)
            yield {"kind": "step", "text": f"hold {hold.id} is released"}


def _records(open_: Open) -> Records[Approval]:
    return open_.ledger.records("approval", Approval)


def _said(approval: Approval) -> dict[str, Any]:
    return {"request": approval.id, "act": approval.act, "subject": approval.subject, "reason": approval.reason}
