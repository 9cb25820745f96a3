"""How the store is, for everybody who may ask: locked or not."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from keys import keyring
from storage.archive import Archive
from storage.ledger import RecoveryExport
from storescp import space
from storescp.clock import now, text_of
from storescp.config import Config
from storescp.control import Request, Response, json_response
from storescp.vault.api.quarantine import items
from storescp.vault.api.requests import Routes
from storescp.vault.opened import Open
from storescp.vault.recovery import covers
from storescp.vault.state import Vault

_TOTAL_LOSS = (
    "ONE FAILURE FROM TOTAL LOSS: {}. If the keyring or the anchors are lost, every study is lost, backups included"
)


class Status:
    """The request for the status."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._config: Config = vault.config
        self._auditor = vault.auditor

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("GET", "/v1/status"): self._status,
        }

    def _status(self, _request: Request) -> Response:
        # Nothing is admitted here: who watches the lag must not change it.
        config = self._config
        header = keyring.read_header(config.keyring)
        opened = self._vault.opened
        with contextlib.nullcontext() if opened is None else opened.reader() as reader:
            archive = Archive(config.store_path, *config.inboxes)
            short = space.shortage(config)
            status: dict[str, Any] = {
                "format": 1,
                "time": now(),
                "store_id": header.store_id,
                "locked": opened is None,
                "locked_since": None if opened else text_of(self._vault.locked_since),
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
                status["quarantine"] = len(items(opened.archive, reader.index))
                if reader.index.filled_to() is not None:
                    filling = {"packs": reader.index.archived_count(), "of": reader.keys_db.count()}
                    status["filling"] = filling
                    status["warnings"].append(
                        f"the index is being filled, {filling['packs']} of {filling['of']} packs: nothing is listed yet"
                    )
        status["warnings"] += _warnings(status, short)
        if self._auditor.fault:
            status["warnings"].append(f"nothing can be recorded, so no admin's act is done: {self._auditor.fault}")
        return json_response(status)


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
        "oldest": text_of(oldest) if oldest else None,
        "lag_seconds": round(max(0.0, time.time() - oldest), 1) if oldest else 0,
    }


def _disk(path: Path) -> dict[str, int]:
    usage = shutil.disk_usage(path)
    return {"free": usage.free, "total": usage.total}
