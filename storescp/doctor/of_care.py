"""Practices of the care for a store: unlocking, keys, recovery, backups, scrubs, its schedule and its disks. Pure."""

from __future__ import annotations

from datetime import timedelta

from storescp import clock
from storescp.doctor.facts import Facts, Unseen, see
from storescp.doctor.findings import ADVICE, CRITICAL, OK, UNKNOWN, WARNING
from storescp.doctor.practice import Practice, Verdict, age, days, some
from storescp.errors import plural

_PASSPHRASE = timedelta(days=730)
_QUARTER, _YEAR = timedelta(days=100), timedelta(days=400)
_PENDING = timedelta(days=30)
_DRILL = timedelta(days=365)
_BACKUP, _CONFIRMED = timedelta(days=8), timedelta(days=35)
_SCRUB_RUN = timedelta(days=8)
_SHORT, _TIGHT = 30.0, 90.0
# Where nobody knows how fast a disk fills: the part of it that should be free.
_FREE = 0.1


def _slots(facts: Facts) -> Verdict:
    slots = see(facts.answers.status).slots
    named = some([slot.type for slot in slots])
    if len(slots) < 2:
        found = f"{plural(len(slots), 'slot')} to unlock with: {named or 'none'}"
        return Verdict(WARNING, found, "strongroom keys slot add")
    ages = [age(slot.created, facts.now) for slot in slots if slot.type == "passphrase"]
    if ages and max(ages) > _PASSPHRASE:
        mend = "'strongroom keys slot add', then 'strongroom keys slot remove' for the old one"
        return Verdict(ADVICE, f"a passphrase is {days(max(ages))} old: who knew it, and left?", mend)
    return Verdict(OK, f"{plural(len(slots), 'slot')}: {named}")


def _rotation(facts: Facts) -> Verdict:
    keys = see(facts.answers.keys)
    current = keys.current
    if current is None:
        return Verdict(UNKNOWN, "the vault names no key version")
    mend = 'strongroom keys rotate --reason "quarterly"'
    pending = [r for r in keys.rotations if r.proved and not r.destroyed]
    late = [f"version {r.old} ({r.waits_for})" for r in pending if age(r.proved, facts.now) > _PENDING]
    if late:
        found = f"old key versions that still open old backups: {some(late)}"
        return Verdict(WARNING, found, "'strongroom keys status' says what each waits for")
    old = age(current.created, facts.now)
    found = f"key version {current.version} is {days(old)} old"
    if old > _QUARTER:
        return Verdict(WARNING if old > _YEAR else ADVICE, found, mend)
    return Verdict(OK, found)


def _recovery(facts: Facts) -> Verdict:
    recovery = see(facts.answers.recovery)
    if not recovery.keys:
        return Verdict(CRITICAL, "there is no recovery key: ONE FAILURE FROM TOTAL LOSS", "strongroom recovery init")
    current = see(facts.answers.keys).current
    version = current.version if current else 0
    good = [e for e in recovery.exports if e.confirmed and not e.retired and version in e.versions]
    mend = "'strongroom recovery export', carry it off this machine, then 'strongroom recovery confirm'"
    if not good:
        found = "no export of the current key version is confirmed off this machine: ONE FAILURE FROM TOTAL LOSS"
        return Verdict(CRITICAL, found, mend)
    old = min(age(export.created, facts.now) for export in good)
    return Verdict(OK, f"an export of the current key version is confirmed off this machine, {days(old)} old")


def _drill(facts: Facts) -> Verdict:
    drilled = [b.drilled for b in see(facts.answers.backups) if b.drilled]
    mend = "'strongroom recovery drill --from FOLDER', with people who hold shares"
    if not drilled:
        return Verdict(WARNING, "nobody ever tried to recover from a backup", mend)
    old = min(age(written, facts.now) for written in drilled)
    grade = WARNING if old > _DRILL else OK
    return Verdict(grade, f"the last drill without a finding was {days(old)} ago", mend)


def _backup(facts: Facts) -> Verdict:
    known = see(facts.answers.backups)
    mend = "'strongroom backup --to FOLDER', carry it off this machine, then 'strongroom backup confirm FOLDER'"
    if not known:
        return Verdict(CRITICAL, "there is no backup", mend)
    newest = min(age(backup.created, facts.now) for backup in known)
    if newest > _BACKUP:
        return Verdict(WARNING, f"the newest backup is {days(newest)} old", mend)
    confirmed = [age(backup.created, facts.now) for backup in known if backup.confirmed]
    if not confirmed:
        return Verdict(WARNING, "no backup is confirmed off this machine", mend)
    if min(confirmed) > _CONFIRMED:
        return Verdict(
            WARNING, f"the newest one that is confirmed off this machine is {days(min(confirmed))} old", mend
        )
    if _same_disk(facts):
        mend = "schedule.backup_folder on another machine's disk, and one copy that no network reaches"
        return Verdict(WARNING, f"{facts.store.settings.schedule.backup_folder} is on the store's disk", mend)
    if not facts.store.settings.schedule.backup:
        mend = "schedule.backup and schedule.backup_folder in strongroom.toml (docs/schedule.md)"
        return Verdict(ADVICE, f"the newest is {days(newest)} old, but none is made by the schedule", mend)
    return Verdict(OK, f"the newest is {days(newest)} old; one is confirmed off this machine")


def _same_disk(facts: Facts) -> bool:
    places = {} if isinstance(facts.store.places, Unseen) else {place.name: place for place in facts.store.places}
    backups, store = places.get("backups"), places.get("store")
    if backups is None or store is None:
        return False
    return backups.mount == store.mount or not set(backups.disks).isdisjoint(store.disks)


def _scrub(facts: Facts) -> Verdict:
    scrub = see(facts.answers.scrub)
    if scrub.damaged:
        found = f"{plural(scrub.damaged, 'pack')} damaged or missing"
        return Verdict(CRITICAL, found, "'strongroom scrub status' names what to have sent again, or to restore")
    if not scrub.packs:
        return Verdict(OK, "there is nothing to read yet")
    mend = "'strongroom scrub run', by the schedule or a timer"
    if not scrub.last_run:
        return Verdict(WARNING, "packs were never read again", mend)
    ran = age(scrub.last_run, facts.now)
    if ran > _SCRUB_RUN:
        return Verdict(WARNING, f"the last scrub was {days(ran)} ago", mend)
    since = scrub.last_round or scrub.round_began or scrub.last_run
    whole = age(since, facts.now)
    if whole > timedelta(days=2 * scrub.days):
        found = f"not all packs were read for {days(whole)}; scrub.days is {scrub.days}"
        return Verdict(WARNING, found, "'strongroom scrub run --all', or a higher scrub.rate")
    return Verdict(OK, f"last run {days(ran)} ago")


def _schedule(facts: Facts) -> Verdict:
    jobs = see(facts.answers.jobs)
    overdue = [job.job for job in jobs if job.overdue]
    failed = [job.job for job in jobs if job.last is not None and job.last.result in {"failed", "refused"}]
    said = [f"overdue: {some(overdue)}"] if overdue else []
    said += [f"failed the last time: {some(failed)}"] if failed else []
    if said:
        return Verdict(WARNING, "; ".join(said), "'strongroom jobs list' says why")
    never = [job.job for job in jobs if not job.expression]
    if never:
        mend = f"schedule.{never[0]} in strongroom.toml (docs/schedule.md)"
        return Verdict(ADVICE, f"never done by the schedule: {some(never)}", mend)
    return Verdict(OK, f"{plural(len(jobs), 'job')}, none overdue")


def _room(facts: Facts) -> Verdict:
    status = see(facts.answers.status)
    mend = "free space or add a disk; 'strongroom retention plan' says what may go"
    if not status.receiving:
        return Verdict(CRITICAL, "nothing more is received: a disk has less free space than store.reserve_bytes", mend)
    scant = [f"{r.name} {100 * r.free // r.total} % free" for r in status.disk if r.total and r.free < _FREE * r.total]
    if scant:
        return Verdict(WARNING, some(scant), mend)
    archive = next((room for room in status.disk if room.name == "store"), None)
    rate = _growth(facts)
    if archive is None or rate is None:
        free = some([f"{r.name} {100 * r.free // max(1, r.total)} % free" for r in status.disk])
        return Verdict(UNKNOWN, f"how fast the store grows is told by two backups a day apart; {free}", mend)
    if rate <= 0:
        return Verdict(OK, "the store does not grow")
    left = max(0, archive.free - facts.store.settings.store.reserve_bytes) / rate
    grade = CRITICAL if left < _SHORT else WARNING if left < _TIGHT else OK
    return Verdict(grade, f"about {left:.0f} days until the store's disk is full", mend)


def _growth(facts: Facts) -> float | None:
    """Return by how many bytes a day the store grew, from its oldest backup to its newest; None if nobody knows."""
    known = facts.answers.backups
    if isinstance(known, Unseen) or len(known) < 2:
        return None
    oldest, newest = min(known, key=lambda b: b.created), max(known, key=lambda b: b.created)
    try:
        span = clock.parse(newest.created) - clock.parse(oldest.created)
    except ValueError:
        return None
    return (newest.bytes - oldest.bytes) / (span / timedelta(days=1)) if span >= timedelta(days=1) else None


PRACTICES = (
    Practice(
        "slots",
        _slots,
        "a forgotten passphrase or a lost key file must not be the end of every study; who leaves should not keep one",
        "NIST SP 800-57",
    ),
    Practice(
        "rotation",
        _rotation,
        "a key in use for years protects everything since; until the old version is destroyed, old backups open",
        "NIST SP 800-57",
    ),
    Practice(
        "recovery-export",
        _recovery,
        "anchors are outside of every backup: without an export one dead disk kills everything",
        "NIST SP 800-34",
        of_content=True,
    ),
    Practice(
        "drill",
        _drill,
        "a backup that nobody restored is a hope; shares are forgotten and people leave",
        "NIST SP 800-34; CISA StopRansomware Guide",
        of_content=True,
    ),
    Practice(
        "backup",
        _backup,
        "disks die, and ransomware looks for backups within reach first: one copy has to be out of it",
        "CISA StopRansomware Guide; HIPAA 45 CFR 164.308(a)(7); BSI IT-Grundschutz CON.3",
        of_content=True,
    ),
    Practice("scrub", _scrub, "disks lose bits in silence: damage has to be found while a good copy still exists"),
    Practice("schedule", _schedule, "what nobody does by hand is done by the schedule, or by nobody"),
    Practice("disk-space", _room, "a full disk means that modalities keep their studies, until they are full too"),
)
