"""Recovery keys and exports: the vault has public halves only, so that an export needs nobody and opens nothing here.

The secret is made by the command line, exists as shares on paper, and never reaches the vault.
Source: docs/design.md, "Recovery"; docs/format.md, section 9.
"""

from __future__ import annotations

from keys import encoding, recovery
from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.shares import RecoveryError, RecoveryKey
from storage.ledger import RecoveryExport
from storescp import clock
from storescp.config import Config
from storescp.errors import NOTHING, StrongroomError
from storescp.vault.opened import Open
from storescp.vault.state import Vault


class Recovery:
    """The recovery keys and exports of a vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config

    def recovery_keys(self) -> list[RecoveryKey]:
        """Return the recovery keys that exports are made for."""
        with self._vault.admitting():
            return list(self._vault.unlocked().ring.body.recovery)

    def add(self, uid: int, key: RecoveryKey) -> None:
        """Take a recovery key, whose shares were typed back.

        Raises:
            StrongroomError: It is another store's, or is here already.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            body = open_.ring.body
            try:
                key.public()
            except RecoveryError as error:
                raise StrongroomError(str(error)) from error
            if key.store_id != open_.ring.header.store_id or any(k.id == key.id for k in body.recovery):
                raise StrongroomError("this recovery key is another store's, or is here already")
            self._vault.auditor.record(
                "recovery-key-added", uid=uid, recovery=key.id, shares=key.shares, of=key.threshold
            )
            body.recovery.append(key)
            open_.ring.write(self._config.keyring)

    def export(self, uid: int) -> list[tuple[RecoveryExport, bytes]]:
        """Make an export for each recovery key, and keep it in the store.

        Raises:
            StrongroomError: There is no recovery key, or the keyring does not open whole.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            if not open_.ring.body.recovery:
                raise StrongroomError("there is no recovery key", hint="'strongroom recovery init' makes one")
            return [self._export(open_, uid, key) for key in open_.ring.body.recovery]

    def _export(self, open_: Open, uid: int, key: RecoveryKey) -> tuple[RecoveryExport, bytes]:
        try:
            content = recovery.export(open_.ring, key, clock.now())
            header = recovery.read_header(content, open_.ring.header.signing_key)
        except (RecoveryError, KeyringError, AnchorError) as error:
            raise StrongroomError(str(error)) from error
        self._vault.auditor.record("recovery-exported", uid=uid, export=header.export_id, recovery=key.id)
        folder = self._config.store_path / "recovery"
        folder.mkdir(mode=0o700, exist_ok=True)
        encoding.create(folder / f"{header.export_id}.export", content)
        made = RecoveryExport(header.export_id, key.id, header.created, header.versions)
        open_.ledger.set_export(made)
        return made, content

    def exports(self) -> list[RecoveryExport]:
        """Return the catalogue of exports."""
        with self._vault.admitting():
            return self._vault.unlocked().ledger.exports()

    def confirm(self, uid: int, export_id: str) -> RecoveryExport:
        """Keep that a copy of an export off this machine was checked.

        Raises:
            StrongroomError: There is no such export.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            made = next((e for e in open_.ledger.exports() if e.id == export_id), None)
            if made is None:
                raise StrongroomError(
                    f"no export {export_id} was made here", hint="'strongroom recovery list'", status=NOTHING
                )
            self._vault.auditor.record("recovery-confirmed", uid=uid, export=export_id)
            made.confirmed = clock.now()
            open_.ledger.set_export(made)
            return made

    def retire(self, uid: int, recovery_id: str) -> None:
        """Keep that a recovery key's shares are destroyed: no export is made for it any more, and none opens.

        Raises:
            StrongroomError: There is no such key.
        """
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            body = open_.ring.body
            if not any(key.id == recovery_id for key in body.recovery):
                raise StrongroomError(f"there is no recovery key {recovery_id}", status=NOTHING)
            self._vault.auditor.record("recovery-retired", uid=uid, recovery=recovery_id)
            body.recovery = [key for key in body.recovery if key.id != recovery_id]
            open_.ring.write(self._config.keyring)
            for made in open_.ledger.exports():
                if made.recovery == recovery_id and not made.retired:
                    made.retired = clock.now()
                    open_.ledger.set_export(made)


def covers(exports: list[RecoveryExport], version: int) -> bool:
    """Tell whether an export that opens a version is confirmed and its recovery key in use."""
    return any(e.confirmed and not e.retired and version in e.versions for e in exports)


def opens(exports: list[RecoveryExport], versions: list[int]) -> list[str]:
    """Return the recovery keys whose shares still open one of these versions."""
    return sorted({e.recovery for e in exports if not e.retired and set(e.versions) & set(versions)})
