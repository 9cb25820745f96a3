"""What the vault itself raises alerts about, looked at once a minute, locked or not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from keys import keyring
from keys.keyring import KeyringError
from storescp import clock, space
from storescp.alerts import Alert, Alerts
from storescp.config import Config
from storescp.vault.api.quarantine import items
from storescp.vault.api.status import total_loss
from storescp.vault.due import JobState
from storescp.vault.opened import Open
from storescp.vault.scrub import damaged
from storescp.vault.state import Vault

_LOOK_SECONDS = 60.0
# Since a copy of a backup off this machine was last confirmed.
_BACKUP_DAYS = 35
# How a job ended, as far as somebody has to act: something that it needs is missing, too.
_FAILED, _FINDINGS = frozenset({"failed", "refused"}), frozenset({"findings"})

log = logging.getLogger(__name__)


class Alarms:
    """Looks once a minute, and repeats in the log what still stands; who sends alerts repeats for itself."""

    def __init__(self, vault: Vault, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._vault = vault
        self._monotonic = monotonic
        self._looked: float | None = None
        self._said: dict[str, float] = {}

    def turn(self) -> None:
        """Look, if it is time. Nothing that goes wrong here keeps the vault from its work."""
        now = self._monotonic()
        if self._looked is not None and now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        try:
            look(self._vault, self._vault.alerts)
            self._repeat(self._vault.alerts.standing(), now)
        except Exception:
            log.exception("what is wrong cannot be looked at")

    def _repeat(self, standing: list[Alert], now: float) -> None:
        after = self._vault.config.settings.alerts.repeat_after().total_seconds()
        self._said = {alert.name: self._said.get(alert.name, now) for alert in standing}
        for alert in standing:
            if now - self._said[alert.name] >= after:
                self._said[alert.name] = now
                log.warning("ALERT since %s (%s): %s; '%s'", alert.since, alert.severity, alert.text, alert.command)


def look(vault: Vault, alerts: Alerts, now: Callable[[], float] = time.time) -> None:
    """Raise what is wrong with a vault and resolve what is over. What a locked vault cannot tell stays as it stands.

    Raises:
        OSError: The disk refused to be looked at.
    """
    _say(alerts, "space-short", bool(space.shortage(vault.config)))
    _say(alerts, "audit-fault", bool(vault.auditor.fault))
    # Nobody locks it while it is looked at.
    with vault.admitting() as opened:
        _say(alerts, "locked", opened is None and _locked_long(vault, now()))
        _look_at_slots(vault.config, opened, alerts)
        if opened is not None:
            _look_inside(opened, alerts)
            lost = damaged(opened)
            _say(alerts, "scrub-damage", lost > 0, count=lost)
            _look_at_backups(vault.config, opened, alerts, now())
            _look_at_jobs(vault.config, opened, alerts)


def _look_at_slots(config: Config, opened: Open | None, alerts: Alerts) -> None:
    try:
        lost = bool(total_loss(opened, len(keyring.read_header(config.keyring).slots)))
    except KeyringError as error:
        log.error("the keyring cannot be read: %s", error)
        lost = True
    if lost or opened is not None:
        _say(alerts, "total-loss", lost)


def _look_inside(opened: Open, alerts: Alerts) -> None:
    with opened.reader() as reader:
        waiting = len(items(opened.archive, reader.index))
        unreadable = reader.index.unreadable()
    _say(alerts, "quarantine", waiting > 0, count=waiting)
    _say(alerts, "unreadable", unreadable > 0, count=unreadable)


def _look_at_backups(config: Config, opened: Open, alerts: Alerts, now: float) -> None:
    """Say it when a backup that is made by the schedule was not confirmed for long."""
    confirmed = max((b.confirmed for b in opened.ledger.backups()), default="")
    days = int((now - clock.parse(confirmed).timestamp()) // 86_400) if confirmed else 0
    _say(alerts, "backup-old", bool(config.settings.schedule.backup) and days >= _BACKUP_DAYS, days=days)


def _look_at_jobs(config: Config, opened: Open, alerts: Alerts) -> None:
    results = {
        state.job: state.last.result
        for state in opened.ledger.records("job", JobState).all()
        # What is not scheduled any more stands for nothing.
        if state.last is not None and bool(getattr(config.settings.schedule, state.job, None))
    }
    for job, result in results.items():
        if result in _FAILED:
            alerts.raise_("job-failed", job)
        if result in _FINDINGS:
            alerts.raise_("job-findings", job)
    for alert in alerts.standing():
        if (alert.kind == "job-failed" and results.get(alert.what) not in _FAILED) or (
            alert.kind == "job-findings" and results.get(alert.what) not in _FINDINGS
        ):
            alerts.resolve(alert.kind, alert.what)


def _locked_long(vault: Vault, now: float) -> bool:
    return now - vault.locked_since >= vault.config.settings.alerts.locked_for().total_seconds()


def _say(alerts: Alerts, kind: str, wrong: bool, **counts: int) -> None:
    if wrong:
        alerts.raise_(kind, "", **counts)
    else:
        alerts.resolve(kind)
