"""Erasures by hand and by rules, holds, and what a second person must approve."""

from __future__ import annotations

from datetime import date

import msgspec

from storage import attributes
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import StrongroomError
from storescp.vault.api.requests import Named, Routes, told
from storescp.vault.approvals import ERASE, RELEASE, Approvals
from storescp.vault.holding import Hold, Holding
from storescp.vault.retain import Retain
from storescp.vault.state import Vault


class EraseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which study to erase, and why."""

    study: str
    reason: str


class HoldRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What to hold, a study or a patient's studies, and why."""

    reason: str
    reference: str = ""
    study: str = ""
    patient_id: str = ""
    issuer: str = ""


class ReleaseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which hold to release, and why."""

    id: str
    reason: str


class PlanRequest(msgspec.Struct, forbid_unknown_fields=True):
    """For which day (today without one), and whether studies that stay are listed, too."""

    on: date | None = None
    everything: bool = False


class RunRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Whether it is meant though a brake is on."""

    confirm: bool = False


class TakeBackRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which study is not to be erased before a day, and why."""

    study: str
    until: date
    reason: str


class Erasures:
    """Requests about erasures, retention and holds."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("POST", "/v1/erase"): self._erase,
            ("GET", "/v1/erasures"): self._erasures,
            ("GET", "/v1/holds"): self._holds,
            ("GET", "/v1/holds/all"): self._all_holds,
            ("POST", "/v1/holds"): self._place,
            ("POST", "/v1/holds/release"): self._release,
            ("POST", "/v1/retention/plan"): self._plan,
            ("POST", "/v1/retention/run"): self._run,
            ("GET", "/v1/retention/pending"): self._pending,
            ("POST", "/v1/retention/take-back"): self._take_back,
            ("GET", "/v1/approvals"): self._approvals,
            ("POST", "/v1/approvals"): self._approve,
            ("POST", "/v1/approvals/withdraw"): self._withdraw,
        }

    # --- by hand

    def _erase(self, request: Request) -> Response:
        asked: EraseRequest = request.json(EraseRequest)
        self._vault.unlocked()
        _uid(asked.study)
        done = Approvals(self._vault).ask(request.uid, ERASE, asked.study, asked.reason)
        return lines_response(told(done), at_once=True)

    def _erasures(self, _request: Request) -> Response:
        with self._vault.admitting():
            found = self._vault.unlocked().ledger.erasures()
        items = [
            {k: v for k, v in msgspec.to_builtins(e).items() if k not in {"tag", "packs", "fenced"}} for e in found
        ]
        return json_response({"format": 1, "items": items})

    # --- holds

    def _holds(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": Holding(self._vault).listed()})

    def _all_holds(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": Holding(self._vault).listed(released=True)})

    def _place(self, request: Request) -> Response:
        asked: HoldRequest = request.json(HoldRequest)
        if asked.study:
            _uid(asked.study)
        wanted = Hold(
            "", asked.reason, asked.reference, request.uid, "", asked.study, asked.patient_id.strip(" "), asked.issuer
        )
        return json_response(Holding(self._vault).place(request.uid, wanted))

    def _release(self, request: Request) -> Response:
        asked: ReleaseRequest = request.json(ReleaseRequest)
        holding = Holding(self._vault)
        with self._vault.admitting():
            holding.get(self._vault.unlocked(), asked.id)
        done = Approvals(self._vault).ask(request.uid, RELEASE, asked.id, asked.reason)
        return lines_response(told(done), at_once=True)

    # --- retention

    def _plan(self, request: Request) -> Response:
        asked: PlanRequest = request.json(PlanRequest)
        self._vault.unlocked()
        self._vault.auditor.record("retention-planned", uid=request.uid, on=str(asked.on or ""))
        return lines_response(told(Retain(self._vault).plan(asked.on, everything=asked.everything)))

    def _run(self, request: Request) -> Response:
        asked: RunRequest = request.json(RunRequest)
        self._vault.unlocked()
        return lines_response(told(Retain(self._vault).run(request.uid, confirm=asked.confirm)), at_once=True)

    def _pending(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": Retain(self._vault).pending()})

    def _take_back(self, request: Request) -> Response:
        asked: TakeBackRequest = request.json(TakeBackRequest)
        return json_response(Retain(self._vault).take_back(request.uid, asked.study, asked.until, asked.reason))

    # --- a second person

    def _approvals(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": Approvals(self._vault).waiting()})

    def _approve(self, request: Request) -> Response:
        asked: Named = request.json(Named)
        self._vault.unlocked()
        return lines_response(told(Approvals(self._vault).approve(request.uid, asked.id)), at_once=True)

    def _withdraw(self, request: Request) -> Response:
        asked: Named = request.json(Named)
        return json_response(Approvals(self._vault).withdraw(request.uid, asked.id))


def _uid(text: str) -> None:
    if not attributes.is_uid(text):
        raise StrongroomError(f"'{text}' is no UID")
