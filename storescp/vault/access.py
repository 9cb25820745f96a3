"""What the control API answers: who asks is checked by the server, what is possible by the vault's state."""

from __future__ import annotations

import base64
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
from keys.shares import RecoveryKey
from keys.token import TokenError
from storage import attributes
from storage.archive import Archive
from storage.index import Index
from storage.ledger import Decision, RecoveryExport
from storage.pack import PAGE, PackError
from storage.packfile import PackFile
from storage.search import LEVELS, FilterError, Filters
from storescp import space
from storescp.config import Config
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import NOTHING, StrongroomError
from storescp.vault.erase import Erase
from storescp.vault.examine import open_pack
from storescp.vault.opened import Open
from storescp.vault.recovery import Recovery, covers
from storescp.vault.rotate import Rotate
from storescp.vault.state import Vault
from storescp.vault.verify import verify

_TOTAL_LOSS = (
    "ONE FAILURE FROM TOTAL LOSS: {}. If the keyring or the anchors are lost, every study is lost, backups included"
)

log = logging.getLogger(__name__)


class UnlockRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A secret that opens a slot: a passphrase, the content of a key file, a credential's name, or a token's PIN."""

    passphrase: str | None = None
    key: bytes | None = None
    credential: str | None = None
    pin: str | None = None
    place: slots.TokenPlace | None = None

    def secret(self) -> slots.Secret:
        """Return it as the slots know it."""
        if self.passphrase is not None:
            return slots.Passphrase(self.passphrase)
        if self.credential is not None:
            return slots.Credential(self.credential)
        if self.pin is not None:
            return slots.Token(self.pin, self.place)
        return slots.KeyFile(self.key or b"")


class SlotRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A slot to make."""

    secret: UnlockRequest
    label: str = ""


class RerootRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The secrets of all slots that stay, and the ids of those that go."""

    secrets: list[UnlockRequest]
    remove: list[str] = msgspec.field(default_factory=list)


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


class EraseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which study to erase, and why."""

    study: str
    reason: str


class RecoveryKeyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A recovery key's public half."""

    key: RecoveryKey


class NamedRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Something by its id."""

    id: str


class RotateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Why a new key version is made, and which confirmations are waived, each with its reason."""

    reason: str = ""
    waived: dict[str, str] = msgspec.field(default_factory=dict)


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
            ("GET", "/v1/keys"): self._keys,
            ("POST", "/v1/keys/rotate"): self._rotate,
            ("POST", "/v1/slots"): self._slot_add,
            ("POST", "/v1/slots/remove"): self._slot_remove,
            ("POST", "/v1/slots/test"): self._slot_test,
            ("POST", "/v1/slots/reroot"): self._reroot,
            ("GET", "/v1/recovery"): self._recovery,
            ("POST", "/v1/recovery"): self._recovery_add,
            ("POST", "/v1/recovery/export"): self._recovery_export,
            ("POST", "/v1/recovery/confirm"): self._recovery_confirm,
            ("POST", "/v1/recovery/retire"): self._recovery_retire,
            ("POST", "/v1/erase"): self._erase,
            ("GET", "/v1/erasures"): self._erasures,
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
                "warnings": total_loss(opened, len(header.slots)),
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

    # --- keys

    def _keys(self, _request: Request) -> Response:
        with self._vault.admitting():
            opened = self._vault.unlocked()
            named = opened.keys_db.versions()
            rotations = {r.version: r for r in opened.ledger.rotations()}
            rotate = Rotate(self._vault)
            versions = [
                {
                    "version": record.version,
                    "state": record.state,
                    "created": record.created,
                    "anchor": record.anchor.provider,
                    "study_keys": named.get(record.version, 0),
                }
                for record in opened.ring.body.versions
            ]
            items = [
                msgspec.to_builtins(r) | {"waits_for": "" if r.destroyed or not r.proof else rotate.waits_for(r)}
                for r in rotations.values()
            ]
        slots_ = [{"id": s.id, "type": s.type, "label": s.label} for s in opened.ring.header.slots]
        return json_response({"format": 1, "versions": versions, "rotations": items, "slots": slots_})

    def _rotate(self, request: Request) -> Response:
        asked: RotateRequest = request.json(RotateRequest)
        self._vault.unlocked()
        return lines_response(
            _told(Rotate(self._vault).run(request.uid, asked.reason, dict(asked.waived))), at_once=True
        )

    def _slot_add(self, request: Request) -> Response:
        asked: SlotRequest = request.json(SlotRequest)
        secret = asked.secret.secret()
        if isinstance(secret, slots.Passphrase):
            try:
                slots.check_passphrase(secret.text)
            except slots.WeakPassphraseError as error:
                raise StrongroomError(str(error)) from error
        with self._changing_slots() as ring:
            slot = ring.add_slot(secret, asked.label, _time(time.time()))
            self._auditor.record("slot-added", uid=request.uid, slot=slot.id, slot_type=slot.type, label=slot.label)
            ring.write(self._config.keyring)
        return json_response({"id": slot.id, "type": slot.type})

    def _slot_remove(self, request: Request) -> Response:
        asked: NamedRequest = request.json(NamedRequest)
        with self._changing_slots() as ring:
            slot = ring.remove_slot(asked.id)
            self._auditor.record("slot-removed", uid=request.uid, slot=slot.id, slot_type=slot.type, label=slot.label)
            ring.write(self._config.keyring)
        return json_response({"id": slot.id, "type": slot.type})

    def _slot_test(self, request: Request) -> Response:
        asked: UnlockRequest = request.json(UnlockRequest)
        with self._changing_slots() as ring:
            slot = ring.test_slot(asked.secret())
        return json_response({"id": slot.id, "type": slot.type, "label": slot.label})

    def _reroot(self, request: Request) -> Response:
        asked: RerootRequest = request.json(RerootRequest)
        with self._changing_slots() as ring:
            self._auditor.record("reroot", uid=request.uid, removed=asked.remove)
            ring.reroot([secret.secret() for secret in asked.secrets], remove=asked.remove)
            ring.write(self._config.keyring)
            found = [{"id": s.id, "type": s.type, "label": s.label} for s in ring.header.slots]
        return json_response({"slots": found})

    @contextlib.contextmanager
    def _changing_slots(self) -> Iterator[keyring.Keyring]:
        """Give the keyring to change; where that fails, memory is as the file is again."""
        with self._vault.admitting():
            ring = self._vault.unlocked().ring
            before = ring.kept()
            try:
                yield ring
            except BaseException as error:
                ring.restore(before)
                if isinstance(error, slots.UnlockError | slots.KeyFileError | KeyringError | AnchorError | TokenError):
                    raise StrongroomError(str(error)) from error
                if isinstance(error, OSError):
                    raise StrongroomError(f"the keyring cannot be written: {error.strerror}") from error
                raise

    # --- recovery

    def _recovery(self, _request: Request) -> Response:
        found = Recovery(self._vault)
        keys = [{k: getattr(key, k) for k in ("id", "created", "shares", "threshold")} for key in found.recovery_keys()]
        return json_response({"format": 1, "keys": keys, "exports": found.exports()})

    def _recovery_add(self, request: Request) -> Response:
        asked: RecoveryKeyRequest = request.json(RecoveryKeyRequest)
        Recovery(self._vault).add(request.uid, asked.key)
        return json_response({"id": asked.key.id})

    def _recovery_export(self, request: Request) -> Response:
        made = Recovery(self._vault).export(request.uid)
        items = [msgspec.to_builtins(one) | {"content": base64.b64encode(content).decode()} for one, content in made]
        return json_response({"format": 1, "items": items})

    def _recovery_confirm(self, request: Request) -> Response:
        asked: NamedRequest = request.json(NamedRequest)
        return json_response(Recovery(self._vault).confirm(request.uid, asked.id))

    def _recovery_retire(self, request: Request) -> Response:
        asked: NamedRequest = request.json(NamedRequest)
        Recovery(self._vault).retire(request.uid, asked.id)
        Erase(self._vault).finalize()
        return json_response({"id": asked.id})

    # --- erasure

    def _erase(self, request: Request) -> Response:
        asked: EraseRequest = request.json(EraseRequest)
        self._vault.unlocked()
        if not attributes.is_uid(asked.study):
            raise StrongroomError(f"'{asked.study}' is no UID")
        return lines_response(_told(Erase(self._vault).run(request.uid, asked.study, asked.reason)), at_once=True)

    def _erasures(self, _request: Request) -> Response:
        with self._vault.admitting():
            found = self._vault.unlocked().ledger.erasures()
        items = [
            {k: v for k, v in msgspec.to_builtins(e).items() if k not in {"tag", "packs", "fenced"}} for e in found
        ]
        return json_response({"format": 1, "items": items})

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


def _exports(opened: Open) -> list[RecoveryExport]:
    # A connection of its own: whoever asks for the status waits for no admission.
    ledger = opened.own_ledger()
    try:
        return ledger.exports()
    finally:
        ledger.close()


def total_loss(opened: Open | None, slot_count: int) -> list[str]:
    """Return the warning that one failure can lose everything, if that is so; of a locked store its slots are known."""
    missing = []
    if opened is not None and not covers(_exports(opened), opened.ring.current().version):
        missing.append("no recovery export of the current key version is confirmed ('strongroom recovery init')")
    if slot_count < 2:
        missing.append("there is one slot to unlock with ('strongroom keys slot add')")
    return [_TOTAL_LOSS.format(" and ".join(missing))] if missing else []


def _told(progress: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what an operation does, and the error that ends it: its answer has begun long before."""
    try:
        yield from progress
        yield {"kind": "end"}
    except StrongroomError as error:
        yield {"kind": "error", "message": str(error), "hint": error.hint, "status": error.status}


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
