"""Key versions and slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec

from keys import keyring, slots
from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.token import TokenError
from storage.attributes import is_uid
from storage.ledger import Reencryption
from storescp.clock import now
from storescp.config import Config
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import StrongroomError
from storescp.vault.api.requests import Named, Routes, SecretRequest, told
from storescp.vault.recovery import Recovery
from storescp.vault.reencrypt import Reencrypt, Scope
from storescp.vault.rotate import Rotate
from storescp.vault.state import Vault


class SlotRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A slot to make."""

    secret: SecretRequest
    label: str = ""


class RerootRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The secrets of all slots that stay, and the ids of those that go."""

    secrets: list[SecretRequest]
    remove: list[str] = msgspec.field(default_factory=list)


class RotateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Why a new key version is made, and which confirmations are waived, each with its reason."""

    reason: str = ""
    waived: dict[str, str] = msgspec.field(default_factory=dict)


class ReencryptRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which packs get new study keys, and why; nothing of it to go on with what was begun."""

    study: str = ""
    version: int = 0
    everything: bool = False
    reason: str = ""


class Keys:
    """Requests about key versions and slots."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config
        self._auditor = vault.auditor

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("GET", "/v1/keys"): self._keys,
            ("GET", "/v1/keys/report"): self._report,
            ("POST", "/v1/keys/rotate"): self._rotate,
            ("POST", "/v1/keys/reencrypt"): self._reencrypt,
            ("POST", "/v1/slots"): self._slot_add,
            ("POST", "/v1/slots/remove"): self._slot_remove,
            ("POST", "/v1/slots/test"): self._slot_test,
            ("POST", "/v1/slots/reroot"): self._reroot,
        }

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
                    "grade": opened.ring.grade(record.version),
                    "former_anchors": [{"id": anchor.id, "anchor": anchor.provider} for anchor in record.former],
                    "study_keys": named.get(record.version, 0),
                }
                for record in opened.ring.body.versions
            ]
            items = [
                msgspec.to_builtins(r) | {"waits_for": "" if r.destroyed or not r.proof else rotate.waits_for(r)}
                for r in rotations.values()
            ]
            reencryptions = [_reencryption(r, opened.ledger.reencrypted(r.id)) for r in opened.ledger.reencryptions()]
        slots_ = [{"id": s.id, "type": s.type, "label": s.label} for s in opened.ring.header.slots]
        return json_response(
            {
                "format": 1,
                "versions": versions,
                "rotations": items,
                "slots": slots_,
                "reencryptions": reencryptions,
            }
        )

    def _report(self, _request: Request) -> Response:
        """Answer with everything that is known of keys, as one state; what is proved the asker checks for itself."""
        with self._vault.admitting():
            opened = self._vault.unlocked()
            ledger, ring = opened.ledger, opened.ring
            rotate = Rotate(self._vault)
            named, current = opened.keys_db.versions(), ring.current().version
            exports = ledger.exports()
            erasures = ledger.erasures()
            versions = [
                {
                    "version": record.version,
                    "state": record.state,
                    "created": record.created,
                    "anchor": record.anchor.provider,
                    "grade": ring.grade(record.version),
                    "former_anchors": [{"id": anchor.id, "anchor": anchor.provider} for anchor in record.former],
                    "study_keys": named.get(record.version, 0),
                    "databases": opened.database_version == record.version,
                    "exports": [e.id for e in exports if record.version in e.versions and not e.retired],
                    "erasures": [e.id for e in erasures if record.version in e.versions and not e.final],
                }
                for record in ring.body.versions
            ]
            rotations = [
                msgspec.to_builtins(r) | {"waits_for": "" if r.destroyed or not r.proof else rotate.waits_for(r)}
                for r in ledger.rotations()
            ]
            found = {
                "format": 1,
                "time": now(),
                "store_id": ring.header.store_id,
                "version": current,
                "versions": versions,
                "rotations": rotations,
                "reencryptions": [_reencryption(r, ledger.reencrypted(r.id)) for r in ledger.reencryptions()],
                "slots": [
                    {"id": s.id, "type": s.type, "label": s.label, "created": s.created} for s in ring.header.slots
                ],
                "recovery_keys": [
                    {k: getattr(key, k) for k in ("id", "created", "shares", "threshold")}
                    for key in Recovery(self._vault).recovery_keys()
                ],
                "exports": [msgspec.to_builtins(e) for e in exports],
                "backups": [msgspec.to_builtins(b) for b in ledger.backups()],
                "erasures": [
                    {k: getattr(e, k) for k in ("id", "begun", "erased", "final", "versions", "instances")}
                    for e in erasures
                ],
                "authority": ring.body.authority is not None,
            }
        return json_response(found)

    def _reencrypt(self, request: Request) -> Response:
        asked: ReencryptRequest = request.json(ReencryptRequest)
        self._vault.unlocked()
        if bool(asked.study) + bool(asked.version) + asked.everything > 1:
            raise StrongroomError("choose one of a study, a version and all")
        if asked.study and not is_uid(asked.study):
            raise StrongroomError(f"'{asked.study}' is no UID")
        scope = Scope(asked.study, asked.version, asked.everything)
        return lines_response(told(Reencrypt(self._vault).run(request.uid, scope, asked.reason)), at_once=True)

    def _rotate(self, request: Request) -> Response:
        asked: RotateRequest = request.json(RotateRequest)
        self._vault.unlocked()
        return lines_response(
            told(Rotate(self._vault).run(request.uid, asked.reason, dict(asked.waived))), at_once=True
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
            slot = ring.add_slot(secret, asked.label, now())
            self._auditor.record("slot-added", uid=request.uid, slot=slot.id, slot_type=slot.type, label=slot.label)
            ring.write(self._config.keyring)
        return json_response({"id": slot.id, "type": slot.type})

    def _slot_remove(self, request: Request) -> Response:
        asked: Named = request.json(Named)
        with self._changing_slots() as ring:
            slot = ring.remove_slot(asked.id)
            self._auditor.record("slot-removed", uid=request.uid, slot=slot.id, slot_type=slot.type, label=slot.label)
            ring.write(self._config.keyring)
        return json_response({"id": slot.id, "type": slot.type})

    def _slot_test(self, request: Request) -> Response:
        asked: SecretRequest = request.json(SecretRequest)
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


def _reencryption(found: Reencryption, done: int) -> dict[str, Any]:
    """Return what is known of a re-encryption; the study's keyed hash says nothing to anybody."""
    known: dict[str, Any] = msgspec.to_builtins(found)
    del known["tag"]
    return known | {"done": done}
