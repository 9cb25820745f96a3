"""What was not admitted, and what somebody decides about it."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from storage.archive import Archive
from storage.index import Index
from storage.ledger import Decision
from storage.pack import PAGE
from storescp.clock import now
from storescp.control import Request, Response, json_response
from storescp.errors import NOTHING, StrongroomError
from storescp.vault import holding
from storescp.vault.api.requests import Routes
from storescp.vault.state import Vault

log = logging.getLogger(__name__)


class ResolveRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A decision about a quarantined item."""

    id: str
    kind: str
    reason: str


class Quarantine:
    """Requests about the quarantine."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._auditor = vault.auditor

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("GET", "/v1/quarantine"): self._quarantine,
            ("POST", "/v1/quarantine"): self._resolve,
        }

    def _quarantine(self, request: Request) -> Response:
        self._vault.unlocked()
        self._auditor.record("query", uid=request.uid, level="quarantine")
        self._vault.admit()
        with self._vault.admitting():
            opened = self._vault.unlocked()
            return json_response({"format": 1, "items": items(opened.archive, opened.index)})

    def _resolve(self, request: Request) -> Response:
        asked: ResolveRequest = request.json(ResolveRequest)
        if asked.kind not in {"accept", "discard"} or not asked.reason.strip():
            raise StrongroomError("a decision is 'accept' or 'discard', with a reason")
        with self._vault.admitting():
            opened = self._vault.unlocked()
            found = items(opened.archive, opened.index)
            item = next((i for i in found if i["id"] == asked.id), None)
            if item is None:
                raise StrongroomError(
                    f"nothing in quarantine is called {asked.id}", hint="'strongroom quarantine list'", status=NOTHING
                )
            if asked.kind == "accept" and not item["opens"]:
                raise StrongroomError(f"{asked.id} does not open, so it cannot be held", hint="it can be discarded")
            siblings = [i for i in found if i["pack"] == item["pack"]]
            if asked.kind == "discard" and len(siblings) > 1:
                raise StrongroomError(
                    f"{asked.id} shares its pack with {len(siblings) - 1} more",
                    hint="accept or export those that are good; such a pack is kept whole",
                )
            if asked.kind == "discard" and (hold := holding.held(opened, opened.index.study_of(item["pack"]))):
                raise StrongroomError(
                    f"{asked.id} is of a study under {hold}: nobody discards it", hint="'strongroom hold list'"
                )
            if asked.kind == "discard" and not item["opens"] and holding.current(opened).on_patients:
                raise StrongroomError(
                    f"{asked.id} does not open, so that a hold on its patient cannot be ruled out",
                    hint="'strongroom hold list' says which patients are held",
                )
            if asked.kind == "discard" and opened.packs_lock.locked():
                raise StrongroomError("a backup is being made, which names this pack", hint="try again when it is done")
            self._auditor.record(
                "quarantine-resolved",
                uid=request.uid,
                decision=asked.kind,
                pack=item["pack"],
                object=item["object_id"],
                other_pack=item["held_pack"],
                reason=asked.reason,
            )
            opened.admission.decide(
                Decision(
                    now(),
                    request.uid,
                    asked.kind,
                    item["pack"],
                    item["object_id"],
                    item["held_pack"],
                    item["held_object_id"],
                    asked.reason,
                )
            )
        log.warning("quarantine: %s: %s by uid %d", asked.id, asked.kind, request.uid)
        return json_response({"id": asked.id, "decision": asked.kind})


def items(archive: Archive, index: Index) -> list[dict[str, Any]]:
    """Return what is in quarantine: instances that open, and files of which nothing does."""
    found = []
    for row in index.quarantined():
        pack_id, offset = row.pop("id"), row.pop("offset")
        found.append({"id": f"{pack_id[:12]}-{offset // PAGE}", "pack": pack_id, "opens": True, **row})
    known = {item["pack"] for item in found} | set(index.packs_in("quarantine"))
    for path in archive.quarantine_files():
        if path.name not in known:
            size = path.stat().st_size
            reason = "nothing in it opens"
            found.append(
                {"id": path.name[:12], "pack": path.name, "opens": False, "reason": reason, "bytes": size}
                | dict.fromkeys(("object_id", "held_pack", "held_object_id"), "")
            )
    for item in found:
        item["held_pack"] = item["held_pack"] or ""
        item["held_object_id"] = item["held_object_id"] or ""
    return found
