"""The vault's numbers for whoever watches the server, locked or not. Where no metrics are configured, nothing is done.

What only an unlocked vault can tell is counted less often: it may take time in a large archive, and admission waits.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from keys import keyring
from storage.archive import Archive
from storescp import clock, snapshot
from storescp.alertkinds import KINDS
from storescp.config import is_ae_title
from storescp.snapshot import Disk, Ends, Inside, Job, Key, Pace, VaultNumbers, Writer
from storescp.vault.api.quarantine import items
from storescp.vault.opened import Open
from storescp.vault.schedule import Schedule
from storescp.vault.state import Vault

_SLOWER = 4

log = logging.getLogger(__name__)


class Numbers:
    """Belongs to the admitting thread."""

    def __init__(self, vault: Vault, schedule: Schedule) -> None:
        self._vault = vault
        self._config = vault.config
        self._schedule = schedule
        settings = vault.config.settings.metrics
        self._wanted = bool(settings.listen)
        self._pace, self._inner = Pace(settings.seconds), Pace(_SLOWER * settings.seconds)
        self._writer = Writer(vault.config, "vault")
        self._started = snapshot.now()
        self._inside: Inside | None = None
        self._of: Open | None = None
        before = snapshot.read(vault.config, "vault", VaultNumbers) if self._wanted else None
        # A report is made once a day: a restart forgets none.
        self._patches = before.patches if before else None

    def turn(self) -> None:
        """Write the numbers, if it is time. Nothing that goes wrong here keeps the vault from its work."""
        began = time.monotonic()
        if not self._wanted or not self._pace.due(began):
            return
        try:
            self._writer.write(self._look())
        except Exception:
            log.exception("numbers for monitoring cannot be collected")
        self._pace.done(began, time.monotonic())

    def _look(self) -> VaultNumbers:
        vault, config = self._vault, self._config
        if vault.patches is not None:
            self._patches = vault.patches
        opened = vault.opened
        if opened is None:
            self._inside = None
        else:
            self._look_inside(opened)
        packs, size, oldest = waiting(Archive(config.store_path, *config.inboxes))
        alerts: dict[str, dict[str, int]] = {}
        for alert in vault.alerts.standing():
            kinds = alerts.setdefault(KINDS[alert.kind].severity, {})
            kinds[alert.kind] = kinds.get(alert.kind, 0) + 1
        now = snapshot.now()
        return VaultNumbers(
            format=snapshot.FORMAT,
            time=now,
            every=self._pace.every,
            started=self._started,
            locked_since=vault.locked_since if opened is None else 0.0,
            packs=packs,
            bytes=size,
            lag=max(0.0, now - oldest) if oldest else 0.0,
            disks={"store": _disk(config.store_path), "incoming": _disk(config.incoming)},
            slots=len(keyring.read_header(config.keyring).slots),
            audit_fault=bool(vault.auditor.fault),
            alerts=alerts,
            jobs=[_job(item) for item in self._schedule.view()["items"]],
            patches=self._patches,
            inside=self._inside,
        )

    def _look_inside(self, opened: Open) -> None:
        began = time.monotonic()
        if opened is self._of and self._inside is not None and not self._inner.due(began):
            return
        with self._vault.admitting() as still:
            if still is not None:
                self._inside = inside(still)
        self._of = opened
        self._inner.done(began, time.monotonic())


def inside(opened: Open) -> Inside:
    """Return what an unlocked vault can tell. Nobody locks it meanwhile."""
    body = opened.ring.body
    with opened.reader() as reader:
        counts = reader.index.counts()
        stored = reader.index.last_stores()
        quarantine = len(items(opened.archive, reader.index))
    ends = []
    if body.authority is not None:
        found = x509.load_pem_x509_certificates(body.authority.certificate.encode())
        ends.append(Ends("store", "authority", min(c.not_valid_after_utc for c in found).timestamp()))
    return Inside(
        keys=[Key(record.version, record.state, _seconds(record.created)) for record in body.versions],
        counts=counts,
        stored=_stored(stored),
        quarantine=quarantine,
        backup=max((_seconds(b.confirmed) for b in opened.ledger.backups()), default=0.0),
        export=max((_seconds(e.confirmed) for e in opened.ledger.exports()), default=0.0),
        certificates=ends,
    )


def _stored(found: dict[str, str]) -> dict[str, float]:
    """Return when each peer last stored something, of what a gate said; what it cannot have been told is left out."""
    stored = {}
    for title, when in found.items():
        if is_ae_title(title):
            with contextlib.suppress(ValueError):
                stored[title] = max(0.0, datetime.fromisoformat(when).timestamp())
    return stored


def waiting(archive: Archive) -> tuple[int, int, float]:
    """Return how many deposits wait, their bytes, and when the oldest was written last; 0 where there is none."""
    count, size, oldest = 0, 0, 0.0
    for path in archive.deposits():
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            count, size = count + 1, size + found.st_size
            oldest = min(oldest or found.st_mtime, found.st_mtime)
    return count, size, oldest


def _disk(path: Path) -> Disk:
    usage = shutil.disk_usage(path)
    return Disk(usage.free, usage.total)


def _job(item: dict[str, Any]) -> Job:
    last: dict[str, Any] = item["last"] or {}
    ended, result = _seconds(last.get("ended", "")), last.get("result", "")
    return Job(item["job"], result, ended, last.get("seconds", 0.0), item["overdue"], item["running"])


def _seconds(written: str) -> float:
    return clock.parse(written).timestamp() if written else 0.0
