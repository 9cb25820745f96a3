"""``[schedule]``: when the vault does by itself what an admin can do by hand."""

from __future__ import annotations

import msgspec

from storescp.cron import Cron, CronError, window_of, zone_of

# The other fields are jobs.
_NO_JOBS = {"timezone", "windows", "backup_folder", "backup_keep"}


class ScheduleSettings(msgspec.Struct, kw_only=True):
    """A cron expression for each job, the zone that they are in, and when heavy ones may begin.

    Each field that holds an expression is named like its job in ``storescp/vault/jobs.py``.
    """

    timezone: str = "UTC"
    windows: list[str] = msgspec.field(default_factory=list)
    erase: str = "0 4 * * *"
    rotate: str = ""
    export: str = "0 1 * * sun"
    backup: str = ""
    checkpoint: str = "0 0 * * *"
    expiry: str = "0 6 * * *"
    retention: str = ""
    scrub: str = "30 2 * * *"
    patch: str = "0 7 * * *"
    review: str = "0 7 * * mon"
    backup_folder: str = ""
    backup_keep: int = 0


EXPLAINED = {
    "schedule": "When the vault does what 'strongroom jobs list' lists. Each is a cron expression (minute, hour, day,\n"
    "month, weekday by its name) or empty for never: docs/schedule.md.",
    "schedule.timezone": "The zone of all times here, by its IANA name, as in Europe/Berlin.",
    "schedule.windows": "Heavy jobs (erase, rotate, backup, retention, scrub) begin within these only, if any:\n"
    'windows = ["sat,sun 01:00-06:00", "mon-fri 22:00-05:00"]. Whatever was begun is finished.',
    "schedule.erase": "Go on with erasures that wait, and sign certificates that are final.",
    "schedule.rotate": "A new key version: as 'strongroom keys rotate'. Quarterly: \"0 3 1 1,4,7,10 *\".",
    "schedule.export": "A recovery export for each recovery key, kept in the store: carry it off this machine.",
    "schedule.backup": "A backup into backup_folder: as 'strongroom backup'.",
    "schedule.checkpoint": "A record in the audit chain that says how far it has come, signed.",
    "schedule.expiry": "Look which certificates and revocation lists end soon.",
    "schedule.retention": "What the rules in [retention] say: as 'strongroom retention run'.",
    "schedule.scrub": "The next part of the packs is read and opened: as 'strongroom scrub run'.",
    "schedule.patch": "How old the oldest unapplied fix is: as 'strongroom patch report'.",
    "schedule.review": "What is unusual in the audit chain of last week: as 'strongroom audit review'.",
    "schedule.backup_folder": "Where backups go: an absolute path that the vault may write.",
    "schedule.backup_keep": "How many backups stay there; 0 for all.",
}


def job_names() -> list[str]:
    """Return the names of the jobs that the file can speak of."""
    return [field.name for field in msgspec.structs.fields(ScheduleSettings) if field.name not in _NO_JOBS]


def check(settings: ScheduleSettings) -> list[str]:
    """Return what is wrong with them, each with its key."""
    errors = []
    try:
        zone = zone_of(settings.timezone)
    except CronError as error:
        return [f"schedule.timezone: {error}"]
    standard = ScheduleSettings()
    for name in job_names():
        expression = getattr(settings, name)
        # The standard ones are known to be right (a test looks), and reading one costs every command its time.
        if expression and expression != getattr(standard, name):
            try:
                Cron(expression, zone)
            except CronError as error:
                errors.append(f"schedule.{name}: {error}")
    for text in settings.windows:
        try:
            window_of(text)
        except CronError as error:
            errors.append(f"schedule.windows: {error}")
    if settings.backup and not settings.backup_folder:
        errors.append("schedule.backup_folder: missing: where backups go")
    if settings.backup_folder and not settings.backup_folder.startswith("/"):
        errors.append("schedule.backup_folder: must be an absolute path")
    if not 0 <= settings.backup_keep <= 10_000:
        errors.append("schedule.backup_keep: must be from 0 to 10000")
    return errors
