"""The audit chain, and acts beside the vault that it records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import StrongroomError
from storescp.vault.api.requests import Routes
from storescp.vault.holding import Holding
from storescp.vault.state import Vault
from storescp.vault.who import Who


class ActRequest(msgspec.Struct, forbid_unknown_fields=True):
    """An act of an admin beside the vault, which is recorded before it is done."""

    type: Literal["peer-added", "peer-renewing", "peer-renewed", "peer-removed"]
    peer: str


class AuditRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which records to read: those behind a number, of some types, since a time (RFC 3339)."""

    after: int = 0
    types: list[str] = msgspec.field(default_factory=list)
    since: str = ""


class WhoRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Whose studies, or which, and since when (RFC 3339)."""

    patient: str = ""
    studies: list[str] = msgspec.field(default_factory=list)
    since: str = ""


class RestartRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Why a new chain begins."""

    reason: str


class Audit:
    """Requests about the audit chain."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._auditor = vault.auditor

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("GET", "/v1/peers"): self._peers,
            ("POST", "/v1/acts"): self._act,
            ("GET", "/v1/audit"): self._audit_head,
            ("POST", "/v1/audit"): self._audit,
            ("POST", "/v1/audit/who"): self._who,
            ("POST", "/v1/audit/restart"): self._audit_restart,
        }

    def _peers(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": self._auditor.certificate_uses()})

    def _act(self, request: Request) -> Response:
        asked: ActRequest = request.json(ActRequest)
        self._auditor.record(asked.type, uid=request.uid, peer=asked.peer)
        return json_response({"recorded": True})

    def _audit_head(self, _request: Request) -> Response:
        head = self._auditor.head
        known = {"number": head.number, "hash": head.hash.hex()} if head else None
        return json_response({"format": 1, "head": known, "fault": self._auditor.fault})

    def _audit(self, request: Request) -> Response:
        asked: AuditRequest = request.json(AuditRequest)
        self._vault.unlocked()
        self._auditor.record("audit-read", uid=request.uid, after=asked.after, types=asked.types, since=asked.since)
        return lines_response(self._records(asked))

    def _records(self, asked: AuditRequest) -> Iterator[dict[str, Any]]:
        for record in self._auditor.read(asked.after):
            if (not asked.types or record["type"] in asked.types) and str(record["time"]) >= asked.since:
                yield record

    def _who(self, request: Request) -> Response:
        asked: WhoRequest = request.json(WhoRequest)
        if not asked.patient and not asked.studies:
            raise StrongroomError("this asks about a patient or a study", hint="name one: --patient, --study")
        self._vault.unlocked()
        self._auditor.record(
            "audit-who", uid=request.uid, patient=asked.patient, studies=asked.studies, since=asked.since
        )
        # What arrived until now counts, and the index knows whose it is.
        self._vault.admit()
        return lines_response(self._who_rows(asked))

    def _who_rows(self, asked: WhoRequest) -> Iterator[dict[str, Any]]:
        with self._vault.unlocked().reader() as reader:
            who = Who(reader.index, asked.patient, asked.studies)
            # What the gate saw comes into the chain some seconds late.
            yield from sorted(who.rows(self._auditor.read(0), asked.since), key=lambda row: str(row["time"]))
            yield {"kind": "summary", "studies": len(who.studies), "others_erased": who.others_erased}

    def _audit_restart(self, request: Request) -> Response:
        asked: RestartRequest = request.json(RestartRequest)
        if not asked.reason.strip():
            raise StrongroomError("a new chain needs a reason")
        with self._vault.admitting():
            aside = self._auditor.restart(request.uid, asked.reason)
            # The ledger is compared with the chain about them, and the new one knows none.
            Holding(self._vault).tell_again()
        return json_response({"aside": str(aside)})
