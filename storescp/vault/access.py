"""What the control API answers: who asks is checked by the server, what is possible by the vault's state."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from keys import authority, keyring, slots
from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.seal import SealError, plain_length
from storage.archive import Archive
from storage.index import Index
from storage.ledger import Decision
from storage.pack import PAGE, PackError
from storage.packfile import PackFile
from storage.search import LEVELS, FilterError, Filters
from storescp import space
from storescp.config import Config
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import NOTHING, StrongroomError
from storescp.vault.examine import open_pack
from storescp.vault.state import Vault
from storescp.vault.verify import verify

TOTAL_LOSS = (
    "ONE FAILURE FROM TOTAL LOSS: no recovery export exists. "
    "If the keyring or the anchors are lost, every study is lost, backups included"
)

log = logging.getLogger(__name__)


class UnlockRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A secret that opens a slot: exactly one of the two."""

    passphrase: str | None = None
    key: bytes | None = None

    def secret(self) -> slots.Secret:
        """Return it as the slots know it."""
        return slots.Passphrase(self.passphrase) if self.passphrase is not None else slots.KeyFile(self.key or b"")


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What to list."""

    level: str
    filters: Filters = msgspec.field(default_factory=Filters)


class IssueRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A certificate to issue: for a peer by name, or for a server by names and addresses."""

    csr: bytes
    peer: str = ""
    server: list[str] = msgspec.field(default_factory=list)
    days: int = 730


class ResolveRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A decision about a quarantined item."""

    id: str
    kind: str
    reason: str


class ActRequest(msgspec.Struct, forbid_unknown_fields=True):
    """An act of an admin beside the vault, which is recorded before it is done."""

    type: Literal["peer-added", "peer-renewing", "peer-renewed", "peer-removed"]
    peer: str


class AuditRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which records to read: those behind a number, of some types, since a time (RFC 3339)."""

    after: int = 0
    types: list[str] = msgspec.field(default_factory=list)
    since: str = ""


class RestartRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Why a new chain begins."""

    reason: str


class VerifyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """How fast to read, in MB/s; 0 for as fast as it goes."""

    rate: float = 0.0


class Access:
    """The requests that a vault answers."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config
        self._auditor = vault.auditor
        self._routes: dict[tuple[str, str], Callable[[Request], Response]] = {
            ("GET", "/v1/status"): self._status,
            ("POST", "/v1/unlock"): self._unlock,
            ("POST", "/v1/lock"): self._lock,
            ("POST", "/v1/search"): self._search,
            ("POST", "/v1/certificates"): self._issue,
            ("GET", "/v1/quarantine"): self._quarantine,
            ("POST", "/v1/quarantine"): self._resolve,
            ("POST", "/v1/verify"): self._verify,
            ("POST", "/v1/reindex"): self._reindex,
            ("POST", "/v1/upgrade"): self._upgrade,
            ("GET", "/v1/peers"): self._peers,
            ("POST", "/v1/acts"): self._act,
            ("GET", "/v1/audit"): self._audit_head,
            ("POST", "/v1/audit"): self._audit,
            ("POST", "/v1/audit/restart"): self._audit_restart,
        }

    def handle(self, request: Request) -> Response:
        """Answer a control request.

        Raises:
            StrongroomError: It cannot be done.
        """
        if request.method == "GET" and request.path.startswith("/v1/instances/"):
            return self._instance(request, request.path.removeprefix("/v1/instances/"))
        route = self._routes.get((request.method, request.path))
        if route is None:
            raise StrongroomError(f"this vault does not know {request.method} {request.path}")
        return route(request)

    # --- lock state

    def _unlock(self, request: Request) -> Response:
        self._vault.try_unlock(request.json(UnlockRequest).secret(), request.uid)
        return json_response({"locked": False})

    def _lock(self, request: Request) -> Response:
        self._vault.lock(uid=request.uid)
        return json_response({"locked": True})

    def _upgrade(self, request: Request) -> Response:
        self._auditor.record("upgrade", uid=request.uid)
        return json_response({"done": self._vault.upgrade(request.json(UnlockRequest).secret())})

    # --- what the store holds

    def _status(self, _request: Request) -> Response:
        # Nothing is admitted here: who watches the lag must not change it.
        config = self._config
        header = keyring.read_header(config.keyring)
        opened = self._vault.opened
        with contextlib.nullcontext() if opened is None else opened.reader() as reader:
            archive = Archive(config.store_path, config.incoming)
            short = space.Watch(config).shortage()
            status: dict[str, Any] = {
                "format": 1,
                "time": _time(time.time()),
                "store_id": header.store_id,
                "locked": opened is None,
                "locked_since": None if opened else _time(self._vault.locked_since),
                "receiving": not short,
                "deposits": _deposits(archive),
                "disk": {"store": _disk(config.store_path), "incoming": _disk(config.incoming)},
                "slots": [{"id": s.id, "type": s.type, "label": s.label, "created": s.created} for s in header.slots],
                "warnings": [TOTAL_LOSS],
            }
            if opened is not None and reader is not None:
                status["key_version"] = opened.ring.current().version
                status["counts"] = reader.index.counts()
                status["last_store"] = reader.index.last_stores()
                status["quarantine"] = len(_items(opened.archive, reader.index))
        status["warnings"] += _warnings(status, short)
        if self._auditor.fault:
            status["warnings"].append(f"nothing can be recorded, so no admin's act is done: {self._auditor.fault}")
        return json_response(status)

    def _search(self, request: Request) -> Response:
        asked: SearchRequest = request.json(SearchRequest)
        if asked.level not in LEVELS:
            raise StrongroomError(f"no such level: {asked.level}")
        self._vault.unlocked()
        self._auditor.record("query", uid=request.uid, level=asked.level, filters=msgspec.to_builtins(asked.filters))
        self._vault.admit()
        rows = self._rows(asked)
        try:
            # The first row is fetched before the answer begins: a bad filter is an error and no broken answer.
            first = next(rows, None)
        except FilterError as error:
            raise StrongroomError(str(error)) from error
        return lines_response(itertools.chain([] if first is None else [first], rows))

    def _rows(self, asked: SearchRequest) -> Iterator[dict[str, Any]]:
        with self._vault.unlocked().reader() as reader:
            for row in reader.index.search(asked.level, asked.filters):
                if asked.level == "instance":
                    row["bytes"] = plain_length(row.pop("dataset_length"))
                yield row

    def _instance(self, request: Request, text: str) -> Response:
        """Stream one data set, named by its pack and object id: both stay when a pack is admitted."""
        found = re.fullmatch(r"([0-9a-f]{32})/([0-9a-f]{32})", text, re.ASCII)
        if found is None:
            raise StrongroomError("no such instance")
        opened = self._vault.unlocked()
        with opened.reader() as reader:
            place = reader.index.at(found[1], bytes.fromhex(found[2]))
            if place is None:
                raise StrongroomError("no such instance")
            self._auditor.exporting(request.uid, reader.index.study_of(place.pack_id))
            file = _open_file(opened.archive, place.pack_id)
            try:
                content = open_pack(file, opened.ring, reader.keys_db.find(place.pack_id)).dataset(place.frame)
            except (SealError, KeyringError, AnchorError, PackError) as error:
                file.close()
                raise StrongroomError(f"pack {place.pack_id} does not open: {error}") from error
        # Its length is known, but chunks can end with the word that they are not whole.
        return Response(_reading(file, content))

    def _verify(self, request: Request) -> Response:
        asked: VerifyRequest = request.json(VerifyRequest)
        opened = self._vault.unlocked()
        self._auditor.record("verify", uid=request.uid)
        self._vault.admit()
        return lines_response(verify(opened, rate=asked.rate * 1e6), at_once=True)

    def _reindex(self, request: Request) -> Response:
        with self._vault.admitting():
            opened = self._vault.unlocked()
            self._auditor.record("reindex", uid=request.uid)
            opened.admission.reindex()
            opened.admission.catch_up()
            return json_response(opened.index.counts())

    # --- quarantine

    def _quarantine(self, request: Request) -> Response:
        self._vault.unlocked()
        self._auditor.record("query", uid=request.uid, level="quarantine")
        self._vault.admit()
        with self._vault.admitting():
            opened = self._vault.unlocked()
            return json_response({"format": 1, "items": _items(opened.archive, opened.index)})

    def _resolve(self, request: Request) -> Response:
        asked: ResolveRequest = request.json(ResolveRequest)
        if asked.kind not in {"accept", "discard"} or not asked.reason.strip():
            raise StrongroomError("a decision is 'accept' or 'discard', with a reason")
        with self._vault.admitting():
            opened = self._vault.unlocked()
            items = _items(opened.archive, opened.index)
            item = next((i for i in items if i["id"] == asked.id), None)
            if item is None:
                raise StrongroomError(
                    f"nothing in quarantine is called {asked.id}", hint="'strongroom quarantine list'", status=NOTHING
                )
            if asked.kind == "accept" and not item["opens"]:
                raise StrongroomError(f"{asked.id} does not open, so it cannot be held", hint="it can be discarded")
            siblings = [i for i in items if i["pack"] == item["pack"]]
            if asked.kind == "discard" and len(siblings) > 1:
                raise StrongroomError(
                    f"{asked.id} shares its pack with {len(siblings) - 1} more",
                    hint="accept or export those that are good; such a pack is kept whole",
                )
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
                    _time(time.time()),
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

    # --- certificates

    def _issue(self, request: Request) -> Response:
        asked: IssueRequest = request.json(IssueRequest)
        ca = self._vault.unlocked().ring.body.authority
        if ca is None:
            raise StrongroomError(
                "this store has no certificate authority of its own",
                hint="bind a certificate of yours: 'strongroom peer add TITLE --certificate FILE'",
            )
        now = datetime.now(UTC)
        self._auditor.record(
            "certificate-issued", uid=request.uid, peer=asked.peer, server=asked.server, days=asked.days
        )
        try:
            if asked.server:
                pem = authority.issue_server(ca, asked.csr, asked.server, now, asked.days)
            else:
                pem = authority.issue_peer(ca, asked.csr, asked.peer, now, asked.days)
        except authority.RequestError as error:
            raise StrongroomError(str(error)) from error
        log.info("issued a certificate")
        return json_response({"certificate": pem.decode(), "authority": ca.certificate})

    # --- the audit chain

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

    def _audit_restart(self, request: Request) -> Response:
        asked: RestartRequest = request.json(RestartRequest)
        if not asked.reason.strip():
            raise StrongroomError("a new chain needs a reason")
        return json_response({"aside": str(self._auditor.restart(request.uid, asked.reason))})


def _items(archive: Archive, index: Index) -> list[dict[str, Any]]:
    """Return what is in quarantine: instances that open, and files of which nothing does."""
    items = []
    for row in index.quarantined():
        pack_id, offset = row.pop("id"), row.pop("offset")
        items.append({"id": f"{pack_id[:12]}-{offset // PAGE}", "pack": pack_id, "opens": True, **row})
    known = {item["pack"] for item in items} | set(index.packs_in("quarantine"))
    for path in archive.quarantine_files():
        if path.name not in known:
            size = path.stat().st_size
            reason = "nothing in it opens"
            items.append(
                {"id": path.name[:12], "pack": path.name, "opens": False, "reason": reason, "bytes": size}
                | dict.fromkeys(("object_id", "held_pack", "held_object_id"), "")
            )
    for item in items:
        item["held_pack"] = item["held_pack"] or ""
        item["held_object_id"] = item["held_object_id"] or ""
    return items


def _warnings(status: dict[str, Any], short: str) -> list[str]:
    warnings = []
    if short:
        warnings.append(f"nothing more is received (C-STORE is answered A700): {short}; free space or add a disk")
    if status["locked"]:
        warnings.append("the vault is locked: what arrives is kept, but cannot be listed or exported")
    if status.get("quarantine"):
        warnings.append(f"{status['quarantine']} in quarantine; 'strongroom quarantine list' shows what and why")
    if status.get("counts", {}).get("unreadable"):
        warnings.append(
            f"{status['counts']['unreadable']} places in deposits did not open; the log names their packs: "
            "have what was sent then sent again"
        )
    return warnings


def _open_file(archive: Archive, pack_id: str) -> PackFile:
    # Admission may move a pack between finding it and opening it; it moves only once.
    for _ in range(2):
        path = archive.find(pack_id)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                return PackFile(path)
    raise StrongroomError(f"pack {pack_id} is missing", hint="restore it from a backup, or have it sent again")


def _reading(file: PackFile, content: Iterator[bytes]) -> Iterator[bytes]:
    with file:
        yield from content


def _deposits(archive: Archive) -> dict[str, Any]:
    sizes = []
    oldest: float | None = None
    for path in archive.deposits():
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            sizes.append(found.st_size)
            oldest = min(oldest or found.st_mtime, found.st_mtime)
    return {
        "packs": len(sizes),
        "bytes": sum(sizes),
        "oldest": _time(oldest) if oldest else None,
        "lag_seconds": round(max(0.0, time.time() - oldest), 1) if oldest else 0,
    }


def _disk(path: Any) -> dict[str, int]:
    usage = shutil.disk_usage(path)
    return {"free": usage.free, "total": usage.total}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
