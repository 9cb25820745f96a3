"""Numbers of gate and vault as Prometheus reads them: its text format, version 0.0.4. Pure; one table of all names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from storescp import __version__, snapshot
from storescp.gate.meter import BUCKETS
from storescp.gate.status import UNRECOGNIZED_OPERATION, Reason
from storescp.snapshot import GateNumbers, VaultNumbers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RESULTS = ("ok", "findings", "failed", "refused")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Family(NamedTuple):
    """What Prometheus is told of a metric: its type, and one line of help."""

    type: str
    help: str


FAMILIES = {
    "build_info": Family("gauge", "The release, as a label."),
    "up": Family("gauge", "Whether a process wrote its numbers lately; those of one that did not are left out."),
    "snapshot_timestamp_seconds": Family("gauge", "When a process wrote its numbers."),
    "start_time_seconds": Family("gauge", "When a process was started; its counters begin there."),
    # --- the gate
    "gate_workers": Family("gauge", "Processes that are to receive."),
    "gate_workers_ready": Family("gauge", "Processes that receive."),
    "gate_worker_restarts_total": Family("counter", "Workers that ended by themselves and were started again."),
    "connections": Family("gauge", "Connections that there are."),
    "connections_refused_total": Family("counter", "Connections that became no association, by where they ended."),
    "associations_total": Family("counter", "Associations accepted."),
    "store_objects_total": Family("counter", "Instances stored."),
    "store_bytes_total": Family("counter", "Bytes of their data sets."),
    "store_refused_total": Family("counter", "Requests refused, by the reason and status of the refusal."),
    "store_duration_seconds": Family("histogram", "C-STORE, from the request's first byte to the response."),
    "last_store_timestamp_seconds": Family("gauge", "When a peer last stored something."),
    "receiving": Family("gauge", "Whether there is space; 0: every C-STORE is answered A700."),
    "room_bytes": Family("gauge", "What the archive may still take; below 0 nothing more is received."),
    "certificate_expiry_timestamp_seconds": Family("gauge", "Until when a certificate or revocation list is good."),
    # --- the vault
    "locked": Family("gauge", "Whether the vault is locked."),
    "locked_since_timestamp_seconds": Family("gauge", "Since when it is locked, if it is."),
    "deposits_waiting": Family("gauge", "Packs that wait for admission."),
    "deposits_waiting_bytes": Family("gauge", "Their bytes, with the space allocated ahead."),
    "admission_lag_seconds": Family("gauge", "How long ago the oldest of them was written last."),
    "disk_free_bytes": Family("gauge", "Free space where the archive and where incoming/ is."),
    "disk_size_bytes": Family("gauge", "Size of these file systems."),
    "disk_reserve_bytes": Family("gauge", "store.reserve_bytes: with less, nothing is received."),
    "unlock_slots": Family("gauge", "Ways to unlock; one is too few."),
    "audit_fault": Family("gauge", "Whether the audit chain takes no records."),
    "alerts": Family("gauge", "Alerts that stand."),
    "job_last_result": Family("gauge", "1 for how a job ended the last time."),
    "job_last_end_timestamp_seconds": Family("gauge", "When a job ended the last time."),
    "job_last_duration_seconds": Family("gauge", "How long it took then."),
    "job_overdue": Family("gauge", "Whether a job should have begun long ago."),
    "job_running": Family("gauge", "Whether a job is at work."),
    "patch_report_timestamp_seconds": Family("gauge", "When patch age was looked at."),
    "patch_items": Family("gauge", "What runs here, by the state of its patches."),
    "patch_oldest_fix_timestamp_seconds": Family("gauge", "When the oldest unapplied fix was published, by severity."),
    # --- the vault, unlocked
    "key_version_created_timestamp_seconds": Family("gauge", "When a key version was made."),
    "studies": Family("gauge", "Studies held."),
    "instances": Family("gauge", "Instances held."),
    "packs": Family("gauge", "Packs admitted."),
    "quarantined": Family("gauge", "What waits in quarantine for a decision."),
    "unreadable": Family("gauge", "Places in deposits that did not open."),
    "backup_confirmed_timestamp_seconds": Family("gauge", "When a backup was last confirmed off this machine."),
    "recovery_export_confirmed_timestamp_seconds": Family("gauge", "When a recovery export was last confirmed."),
}
_PREFIX = "strongroom_"


class Sample(NamedTuple):
    """A value; ``suffix`` is that of a histogram's parts."""

    name: str
    value: float
    labels: dict[str, str] | None = None
    suffix: str = ""


def text(gate: GateNumbers | None, vault: VaultNumbers | None, reserve: int, now: float) -> str:
    """Return the exposition.

    Args:
        gate: What the gate wrote, if anything.
        vault: What the vault wrote, if anything.
        reserve: ``store.reserve_bytes``.
        now: Seconds since 1970. Numbers that are too old are left out, so that no rate is made of them.
    """
    samples = [Sample("build_info", 1, {"version": __version__}), Sample("disk_reserve_bytes", reserve)]
    fresh: dict[str, bool] = {}
    for process, numbers in (("gate", gate), ("vault", vault)):
        fresh[process] = numbers is not None and snapshot.is_fresh(numbers, now)
        samples.append(Sample("up", fresh[process], {"process": process}))
        if numbers is not None:
            samples.append(Sample("snapshot_timestamp_seconds", numbers.time, {"process": process}))
            samples.append(Sample("start_time_seconds", numbers.started, {"process": process}))
    stored: dict[str, float] = {}
    if gate is not None and fresh["gate"]:
        samples += _of_gate(gate)
        stored = {title: peer.last for title, peer in gate.peers.items() if peer.last}
    if vault is not None and fresh["vault"]:
        samples += _of_vault(vault)
        for title, when in (vault.inside.stored if vault.inside else {}).items():
            stored[title] = max(when, stored.get(title, 0.0))
    samples += [Sample("last_store_timestamp_seconds", when, {"peer": title}) for title, when in stored.items()]
    return render(samples)


def render(samples: Iterable[Sample]) -> str:
    """Return samples in the text format, those of a metric together, in the table's order."""
    of: dict[str, list[Sample]] = {name: [] for name in FAMILIES}
    for sample in samples:
        of[sample.name].append(sample)
    lines = []
    for name, family in FAMILIES.items():
        if of[name]:
            lines += [f"# HELP {_PREFIX}{name} {family.help}", f"# TYPE {_PREFIX}{name} {family.type}"]
            lines += [_line(sample) for sample in of[name]]
    return "\n".join(lines) + "\n"


def _line(sample: Sample) -> str:
    pairs = ",".join(f'{label}="{value.translate(_ESCAPES)}"' for label, value in (sample.labels or {}).items())
    return f"{_PREFIX}{sample.name}{sample.suffix}{f'{{{pairs}}}' if pairs else ''} {_number(sample.value)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _of_gate(gate: GateNumbers) -> Iterator[Sample]:
    yield Sample("gate_workers", gate.workers)
    yield Sample("gate_workers_ready", gate.ready)
    yield Sample("gate_worker_restarts_total", gate.restarts)
    yield Sample("connections", gate.connections)
    yield Sample("receiving", gate.receiving)
    yield Sample("room_bytes", gate.room)
    for where, count in gate.turned_away.items():
        yield Sample("connections_refused_total", count, {"where": where})
    for title, peer in gate.peers.items():
        yield Sample("associations_total", peer.associations, {"peer": title})
        yield Sample("store_objects_total", peer.objects, {"peer": title})
        yield Sample("store_bytes_total", peer.bytes, {"peer": title})
        for reason, count in peer.refused.items():
            labels = {"peer": title, "reason": reason.lower(), "status": _status(reason)}
            yield Sample("store_refused_total", count, labels)
    yield from _histogram("store_duration_seconds", gate.latency, gate.latency_seconds)
    for ends in gate.certificates:
        yield Sample("certificate_expiry_timestamp_seconds", ends.until, {"kind": ends.kind, "name": ends.name})


def _status(reason: str) -> str:
    found = Reason.__members__.get(reason)
    return f"{found.status if found else UNRECOGNIZED_OPERATION:04X}"


def _histogram(name: str, buckets: list[int], total: float) -> Iterator[Sample]:
    count = 0
    for bound, more in zip((*map(str, BUCKETS), "+Inf"), buckets, strict=False):
        count += more
        yield Sample(name, count, {"le": bound}, "_bucket")
    yield Sample(name, total, suffix="_sum")
    yield Sample(name, count, suffix="_count")


def _of_vault(vault: VaultNumbers) -> Iterator[Sample]:
    yield Sample("locked", bool(vault.locked_since))
    if vault.locked_since:
        yield Sample("locked_since_timestamp_seconds", vault.locked_since)
    yield Sample("deposits_waiting", vault.packs)
    yield Sample("deposits_waiting_bytes", vault.bytes)
    yield Sample("admission_lag_seconds", vault.lag)
    for place, disk in vault.disks.items():
        yield Sample("disk_free_bytes", disk.free, {"place": place})
        yield Sample("disk_size_bytes", disk.total, {"place": place})
    yield Sample("unlock_slots", vault.slots)
    yield Sample("audit_fault", vault.audit_fault)
    for severity in ("critical", "warning"):
        # Also where there is none: what was never there cannot be told from what is not scraped.
        kinds = vault.alerts.get(severity, {})
        yield Sample("alerts", 0, {"severity": severity, "kind": "none"})
        for kind, count in kinds.items():
            yield Sample("alerts", count, {"severity": severity, "kind": kind})
    yield from _of_jobs(vault)
    if vault.patches is not None:
        yield Sample("patch_report_timestamp_seconds", vault.patches.made)
        for state, count in vault.patches.states.items():
            yield Sample("patch_items", count, {"state": state})
        for severity, since in vault.patches.oldest.items():
            yield Sample("patch_oldest_fix_timestamp_seconds", since, {"severity": severity})
    if vault.inside is not None:
        yield from _of_inside(vault.inside)


def _of_jobs(vault: VaultNumbers) -> Iterator[Sample]:
    for job in vault.jobs:
        yield Sample("job_overdue", job.overdue, {"job": job.job})
        yield Sample("job_running", job.running, {"job": job.job})
        if job.ended:
            yield Sample("job_last_end_timestamp_seconds", job.ended, {"job": job.job})
            yield Sample("job_last_duration_seconds", job.seconds, {"job": job.job})
            for result in RESULTS:
                yield Sample("job_last_result", job.result == result, {"job": job.job, "result": result})


def _of_inside(inside: snapshot.Inside) -> Iterator[Sample]:
    for key in inside.keys:
        labels = {"version": str(key.version), "state": key.state}
        yield Sample("key_version_created_timestamp_seconds", key.created, labels)
    for name in ("studies", "instances", "packs", "unreadable"):
        if name in inside.counts:
            yield Sample(name, inside.counts[name])
    yield Sample("quarantined", inside.quarantine)
    for name, when in (("backup", inside.backup), ("recovery_export", inside.export)):
        if when:
            yield Sample(f"{name}_confirmed_timestamp_seconds", when)
    for ends in inside.certificates:
        yield Sample("certificate_expiry_timestamp_seconds", ends.until, {"kind": ends.kind, "name": ends.name})
