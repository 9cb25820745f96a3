"""One pass over the records of the audit chain: what of them a review of a week counts, by week and by whom.

The week that is reviewed is the last of nine; the eight before are what it is held against. Memory is flat: what is
counted is bounded by how many peers and users there are, and each table has a limit besides, for the gate that writes
most of these texts may be somebody else's by now. No study, patient or reason that an admin typed is kept.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from typing import Any

import msgspec

from storescp.alertkinds import UID
from storescp.cron import Window
from storescp.log import escape
from storescp.reviewweeks import NOW, WEEKS, Noted, PeerCount, Seen, Series, UserCount, Weeks

MANY = "many others"
# A nine-week series in each: some megabytes at most.
_PEERS, _REFUSALS, _USERS, _NAMES, _HELD = 2000, 1000, 2000, 20_000, 10_000
_LONG = 160
_LARGEST = 1 << 60

_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
# They say how an act went on that has a record already; and nobody is asked why he locked.
_NO_ACTS = {"exported", "backup-made", "backup-removed", "reencrypted", "unlock-refused", "locked"}
# What the vault gives a peer through the desk, under the desk's user id.
_OF_PEERS = {"query", "export-begun", "exported", "commitment-reported", "desk-refused", "desk-limited"}
# What jobs of the schedule record under the vault's own user id.
_OF_JOBS = {
    "checkpoint": {"checkpoint"},
    "export": {"recovery-exported"},
    "rotate": {"rotation-begun", "recovery-exported"},
    "backup": {"backup-begun", "recovery-exported"},
    "retention": {"retention-run", "erase-begun"},
    "scrub": {"scrub"},
    "review": {"audit-read"},
}
_BY_JOBS = frozenset[str]().union(*_OF_JOBS.values())
# What is told with a count and who did it, whatever else is counted of it.
_NOTED = {
    *("audit-broken", "audit-restarted", "events-refused", "unlock-refused", "unlocked", "vault-started"),
    *("slot-added", "slot-removed", "reroot", "recovery-key-added", "recovery-exported", "recovery-confirmed"),
    *("recovery-retired", "rotation-begun", "rotation-proved", "version-destroyed", "reencrypt-begun", "reencrypted"),
    *("hold-placed", "hold-released", "holds-put-back", "erasure-taken-back", "damage-found", "damage-healed"),
    *("peer-added", "peer-renewing", "peer-renewed", "peer-removed", "certificate-issued", "quarantine-resolved"),
    *("desk-refused", "desk-limited", "commitment-dropped"),
    *("backup-confirmed", "recovery-drilled", "restored", "approval-asked", "approved", "approval-withdrawn"),
}


class _Act(msgspec.Struct, frozen=True):
    when: datetime
    week: int
    kind: str
    uid: int
    record: int
    instances: int


class Count:
    """What was counted. Call ``take`` with each record in its order, then ``finish``."""

    def __init__(self, weeks: Weeks, *, hours: Window, zone: tzinfo, vault_uid: int) -> None:
        """Begin.

        Args:
            weeks: What is counted; later records are left out, earlier ones only make names known.
            hours: When admins work, in ``zone``.
            zone: A time zone.
            vault_uid: Whom the jobs of the schedule run as.
        """
        self._weeks, self._hours, self._zone, self._vault_uid = weeks, hours, zone, vault_uid
        self._held: deque[_Act] = deque()
        self._gone: set[int] = set()
        self._configuration = ""
        self._names: dict[str, set[tuple[str, str]]] = {"title": set(), "address": set(), "certificate": set()}
        self.records, self.last = 0, 0
        self.since: datetime | None = None
        self.peers: dict[str, PeerCount] = {}
        self.refusals: dict[tuple[str, str, str], Series] = {}
        self.refusers: dict[str, Series] = {}
        self.refused_days = [0] * 7
        self.seen: list[Seen] = []
        self.known_to_admins: set[str] = set()
        self.users: dict[int, UserCount] = {}
        self.by_schedule = UserCount()
        self.noted: dict[str, Noted] = {}
        self.jobs: dict[tuple[str, str], Noted] = {}
        self.overflowed = False

    # --- records

    def take(self, record: dict[str, Any]) -> None:
        """Count a record, which has a ``number`` besides what it is."""
        number = self.last = _count(record.get("number"))
        kind, inner = record.get("type"), record.get("record")
        if kind == "gone-with-its-version":
            self._gone.add(number)
        elif kind != "transcript":
            self._take(record, number)
        elif _count(record.get("of")) in self._gone and isinstance(inner, dict):
            # Else the record itself was there, and counted.
            self._gone.discard(_count(record.get("of")))
            self._take(inner, number)

    def finish(self) -> None:
        """Count what had to wait for a later record."""
        while self._held:
            self._act(self._held.popleft())
        if self._gone:
            self._note("gone", min(self._gone), None, len(self._gone))

    def _take(self, record: dict[str, Any], number: int) -> None:
        when = _time(record.get("time"))
        if when is None:
            return
        self.since = self.since or when
        kind, events = str(record.get("type")), record.get("events")
        if kind == "gate-events" and isinstance(events, list):
            for event in events:
                if isinstance(event, dict):
                    self._event(event, number, when)
        week = self._weeks.of(when)
        if week < WEEKS:
            self.records += week == NOW
            self._own(record, kind, number, when)

    def _own(self, record: dict[str, Any], kind: str, number: int, when: datetime) -> None:
        if kind in _OF_PEERS and isinstance(record.get("peer"), str):
            # The desk asked for a peer: no admin's act.
            self._gave(record, kind, number, self._weeks.of(when))
            return
        week, uid = self._weeks.of(when), record.get("uid")
        by = uid if isinstance(uid, int) and not isinstance(uid, bool) else None
        if week == NOW and kind in _NOTED:
            self._note(kind, number, by)
        match kind:
            case "peer-added" | "peer-renewing" | "peer-renewed":
                self.known_to_admins.add(shown(record.get("peer")))
            case "vault-started":
                self._started(str(record.get("configuration")), number, week)
            case "job-ended":
                self._job(record, number, when, by)
            case "exported" if by is not None:
                self._user(by).exported.add(week, _count(record.get("instances")), number)
        if by is not None and kind not in _NO_ACTS:
            self._did(_Act(when, week, kind, by, number, _count(record.get("instances"))))

    def _gave(self, record: dict[str, Any], kind: str, number: int, week: int) -> None:
        if week == NOW and kind in _NOTED:
            # One record can stand for many that were alike.
            self._note(kind, number, None, max(1, _count(record.get("times"))))
        if kind == "exported" and (peer := self._peer(shown(record.get("peer")))) is not None:
            peer.fetched.add(week, _count(record.get("instances")), number)

    def _did(self, act: _Act) -> None:
        if act.kind in _BY_JOBS and act.uid == self._vault_uid:
            # Whether the schedule did it is known when its job ends.
            self._held.append(act)
            if len(self._held) <= _HELD:
                return
            act = self._held.popleft()
        self._act(act)

    def _act(self, act: _Act) -> None:
        user = self._user(act.uid)
        user.acts.setdefault(act.kind, Series()).add(act.week, 1, act.record)
        if not self._hours.holds(act.when.astimezone(self._zone)):
            user.outside.setdefault(act.kind, Series()).add(act.week, 1, act.record)
        if act.kind == "export-begun":
            user.exports.add(act.week, 1, act.record)
        if act.kind == "erase-begun":
            _erase(user, act)

    def _job(self, record: dict[str, Any], number: int, when: datetime, uid: int | None) -> None:
        job, result = shown(record.get("job")), shown(record.get("result"))
        if self._weeks.of(when) == NOW:
            noted = self.jobs.setdefault((job, result), Noted(record=number))
            noted.count += 1
        began = _time(record.get("began"))
        if uid is not None or began is None:
            return
        left: deque[_Act] = deque()
        for act in self._held:
            if act.kind in _OF_JOBS.get(job, ()) and began <= act.when <= when:
                if act.kind == "erase-begun":
                    _erase(self.by_schedule, act)
            else:
                left.append(act)
        self._held = left

    def _started(self, configuration: str, number: int, week: int) -> None:
        if week == NOW and self._configuration and configuration != self._configuration:
            self._note("configuration-changed", number, None)
        self._configuration = configuration

    # --- what the gate tells

    def _event(self, event: dict[str, Any], number: int, recorded: datetime) -> None:
        when = _time(event.get("time"))
        # An event may have waited for days, but none is from the future.
        when = min(when, recorded) if when else recorded
        week = self._weeks.of(when)
        if week >= WEEKS:
            return
        kind, calling = event.get("type"), shown(event.get("calling"))
        if kind == "association-begun":
            self._met(event, calling, number, week)
        elif kind == "association-ended":
            if (peer := self._peer(calling)) is not None:
                peer.associations.add(week, 1, number)
                peer.instances.add(week, _count(event.get("stored")), number)
                peer.bytes.add(week, _count(event.get("bytes")), number)
                peer.refused.add(week, _count(event.get("refused")), number)
        elif kind == "connection-refused":
            self._refused(event, calling, number, when)
        elif kind == "events-dropped" and week == NOW:
            self._note("events-dropped", number, None, _count(event.get("count")))
        elif kind == "peers-changed" and week == NOW and isinstance(files := event.get("files"), dict):
            self._note("peers-changed", number, None, len(files))

    def _met(self, event: dict[str, Any], calling: str, number: int, week: int) -> None:
        certificate = str(event.get("certificate", ""))
        proof = certificate if _FINGERPRINT.fullmatch(certificate) else shown(certificate)
        found = (("title", calling), ("address", _host(shown(event.get("address")))), ("certificate", proof))
        for what, name in found:
            known, both = self._names[what], (calling, name)
            if not name or both in known:
                continue
            if len(known) >= _NAMES:
                self.overflowed = True
                continue
            known.add(both)
            if week == NOW:
                self.seen.append(Seen(what, name, calling, number))

    def _refused(self, event: dict[str, Any], calling: str, number: int, when: datetime) -> None:
        week, count = self._weeks.of(when), _count(event.get("count"))
        address = _host(shown(event.get("address")))
        reason = shown(event.get("reason")).removeprefix(f"calling AE title {calling}: ")
        who = calling or address or MANY
        who = who if who in self.refusers or len(self.refusers) < _PEERS else MANY
        self.refusers.setdefault(who, Series()).add(week, count, number)
        if week != NOW:
            return
        key = (calling, address, reason)
        if key not in self.refusals and len(self.refusals) >= _REFUSALS:
            key = ("", "", MANY)
        self.refusals.setdefault(key, Series()).add(week, count, number)
        self.refused_days[bisect_right(self._weeks.days, when) - 1] += count

    # --- tables with a limit

    def _peer(self, title: str) -> PeerCount | None:
        if title not in self.peers and len(self.peers) >= _PEERS:
            self.overflowed = True
            return None
        return self.peers.setdefault(title, PeerCount())

    def _user(self, uid: int) -> UserCount:
        if uid not in self.users and len(self.users) >= _USERS:
            self.overflowed = True
            uid = -1
        return self.users.setdefault(uid, UserCount())

    def _note(self, kind: str, number: int, uid: int | None, count: int = 1) -> None:
        noted = self.noted.setdefault(kind, Noted(record=number))
        noted.count += count
        if uid is not None and len(noted.uids) < _USERS:
            noted.uids.add(uid)


def counted(records: Iterator[dict[str, Any]], count: Count) -> Count:
    """Take all records; return the count."""
    try:
        for record in records:
            count.take(record)
    finally:
        count.finish()
    return count


def _erase(user: UserCount, act: _Act) -> None:
    user.erasures.add(act.week, 1, act.record)
    user.erased.add(act.week, act.instances, act.record)


def shown(value: object) -> str:
    """Return text as it may be shown: short, printable, without anything like a UID; empty for what is none."""
    # Cut at last: half a UID does not look like one.
    return escape(UID.sub("...", value[: 10 * _LONG]))[:_LONG] if isinstance(value, str) else ""


def _count(value: object) -> int:
    return max(0, min(value, _LARGEST)) if isinstance(value, int) and not isinstance(value, bool) else 0


def _time(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
        return found.astimezone(UTC) if found else None
    except (ValueError, OverflowError):
        return None


def _host(address: str) -> str:
    """Return an address without its port: of each connection another one."""
    host, _, port = address.rpartition(":")
    bare = port.isdigit() and (host.startswith("[") or ":" not in host)
    return (host if bare else address).strip("[]")
