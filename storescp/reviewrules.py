"""What of a week in the audit chain an admin should look at, and against which past.

Pure: from records and a time to a ``Review``. What counts as unusual is decided here and nowhere else; docs/review.md
says it in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date, datetime, timedelta, tzinfo
from statistics import median
from typing import Any

from storescp import clock
from storescp.cron import window_of
from storescp.review import First, Flag, Peer, Refusal, Review, Told, User
from storescp.reviewcount import Count, counted, shown
from storescp.reviewweeks import NOW, Noted, PeerCount, Series, UserCount, Weeks

# A past is one of at least so many weeks.
_PAST = 4
_TIMES = 3
# Smaller numbers vary by themselves.
_INSTANCES, _REFUSALS, _STUDIES, _UNLOCKS = 100, 10, 10, 3


def last_week(now: datetime, zone: tzinfo) -> date:
    """Return a day of the last week that is over."""
    return now.astimezone(zone).date() - timedelta(weeks=1)


def review(
    records: Iterator[dict[str, Any]],
    weeks: Weeks,
    *,
    hours: str,
    zone: tzinfo,
    timezone: str,
    now: datetime,
    vault_uid: int,
    ending: Iterable[str] = (),
    broken: type[Exception] | tuple[type[Exception], ...] = (),
) -> Review:
    """Review a week.

    Args:
        records: All of the chain, the oldest first.
        weeks: The week, with those before.
        hours: When admins work, a window in ``zone``.
        zone: A time zone.
        timezone: Its name.
        now: What time it is.
        vault_uid: Whom the jobs of the schedule run as.
        ending: Which certificates and lists end soon, in words.
        broken: What ``records`` raises where the chain cannot be read further: that is a finding then.
    """
    count = Count(weeks, hours=window_of(hours), zone=zone, vault_uid=vault_uid)
    fault = ""
    try:
        counted(records, count)
    except broken as error:
        fault = shown(f"the audit chain cannot be read behind record {count.last}: {error}")
    judge = _Judge(count, weeks, now, fault)
    peers = judge.peers()
    firsts = judge.firsts()
    users = [_user(uid, found) for uid, found in sorted(count.users.items())]
    ending = [shown(line) for line in ending]
    return Review(
        begins=str(weeks.monday),
        ends=str(weeks.monday + timedelta(days=6)),
        made=clock.text(now),
        timezone=timezone,
        hours=hours,
        since=clock.text(count.since) if count.since else "",
        whole=judge.whole,
        records=count.records,
        flags=list(judge.flags(peers, firsts, ending)),
        peers=peers,
        refusals=[
            Refusal(*key, series.now, series.record)
            for key, series in sorted(count.refusals.items(), key=lambda item: (-item[1].now, item[0]))
        ],
        refused=[sum(s.weeks[n] for s in count.refusers.values()) for n in range(NOW + 1)],
        refused_days=count.refused_days,
        firsts=firsts,
        users=[user for user in users if user.acts],
        erased_by_schedule=[count.by_schedule.erasures.now, count.by_schedule.erased.now],
        told=[_told(kind, noted) for kind, noted in sorted(count.noted.items())],
        jobs=[_told(f"{job} {result}", noted) for (job, result), noted in sorted(count.jobs.items())],
        ending=ending,
    )


class _Judge:
    """What of a count is unusual."""

    def __init__(self, count: Count, weeks: Weeks, now: datetime, fault: str) -> None:
        self._count, self._fault = count, fault
        self.whole = now >= weeks.edges[-1]
        # Where nothing is known from before, everything is new.
        self._past = count.since is not None and weeks.of(count.since) < NOW

    def peers(self) -> list[Peer]:
        """Return the peers, the ones that stand out first, then those that stored most."""
        found = [self._peer(title, peer) for title, peer in self._count.peers.items()]
        return sorted(found, key=lambda p: (not p.said, -p.instances[NOW], p.title))

    def firsts(self) -> list[First]:
        """Return what was never seen before."""
        if not self._past:
            return []
        planned = self._count.known_to_admins
        return [First(s.what, s.name, s.peer, s.record, s.peer in planned) for s in self._count.seen]

    def flags(self, peers: list[Peer], firsts: list[First], ending: list[str]) -> Iterator[Flag]:
        """Yield what to look at, the worst first."""
        yield from self._gaps()
        yield from self._noted()
        yield from self._taken("erased", "erasures", 1)
        yield from self._taken("exported", "exports", _STUDIES)
        yield from self._fetched()
        yield from self._unplanned(firsts)
        yield from self._refused()
        yield from self._outside()
        yield from self._volume(peers)
        for (job, result), noted in sorted(self._count.jobs.items()):
            if result not in {"ok", "findings"}:
                yield Flag("job", f"job {job} {result}{_often(noted)}", noted.record)
        yield from (Flag("ending", text) for text in ending)

    def _gaps(self) -> Iterator[Flag]:
        if self._fault:
            yield Flag("gap", self._fault, self._count.last)
        for kind, text in _GAPS.items():
            if noted := self._count.noted.get(kind):
                yield Flag("gap", f"{text}{_often(noted)}", noted.record)
        if self._count.overflowed:
            yield Flag("gap", "more names than a review counts: the gate tells of thousands of peers")

    def _noted(self) -> Iterator[Flag]:
        noted = self._count.noted
        if (refused := noted.get("unlock-refused")) and refused.count >= _UNLOCKS:
            yield Flag("unlock", f"{refused.count} wrong secrets were given to unlock{_by(refused)}", refused.record)
        for kind, (area, text) in _RARE.items():
            if found := noted.get(kind):
                yield Flag(area, f"{text}{_often(found)}{_by(found)}", found.record)

    def _taken(self, kind: str, field: str, least: int) -> Iterator[Flag]:
        for uid, user in sorted(self._count.users.items()):
            series: Series = getattr(user, field)
            first = kind == "exported" and self._past and series.since == NOW and series.now > 0
            if first or (series.now >= least and not _usual(series)):
                past = "for the first time" if self._past and series.since == NOW else _before(series)
                studies = f"{series.now:,} {'study' if series.now == 1 else 'studies'}"
                yield Flag(kind, f"user {uid} {kind} {studies}; {past}", series.record)

    def _fetched(self) -> Iterator[Flag]:
        for title, peer in sorted(self._count.peers.items()):
            series = peer.fetched
            first = self._past and series.since == NOW and series.now > 0
            if first or (series.now >= _INSTANCES and not _usual(series)):
                past = "for the first time" if first else _before(series)
                yield Flag("exported", f"peer {title} was given {series.now:,} instances; {past}", series.record)

    def _unplanned(self, firsts: list[First]) -> Iterator[Flag]:
        titles = {found.peer for found in firsts if found.what == "title"}
        for found in firsts:
            if found.planned or found.what == "address" or (found.what == "certificate" and found.peer in titles):
                continue
            how = "the first time" if found.what == "title" else f"the first time with certificate {found.name[:16]}"
            text = f"peer {found.peer} was let in {how}, and no 'strongroom peer' command was about it"
            yield Flag("new", text, found.record)

    def _refused(self) -> Iterator[Flag]:
        found = [(who, s) for who, s in self._count.refusers.items() if s.now >= _REFUSALS and not _usual(s)]
        for who, series in sorted(found, key=lambda item: (-item[1].now, item[0])):
            text = f"{series.now:,} connections of {who} refused; {_before(series)}"
            yield Flag("refused", text, series.record)

    def _outside(self) -> Iterator[Flag]:
        for uid, user in sorted(self._count.users.items()):
            found = {kind: s for kind, s in user.outside.items() if s.now and not _usual(s)}
            if found:
                kinds = ", ".join(f"{kind} {series.now}" for kind, series in sorted(found.items()))
                yield Flag("hours", f"user {uid} outside working hours: {kinds}", min(s.record for s in found.values()))

    def _volume(self, peers: list[Peer]) -> Iterator[Flag]:
        used = [peer for peer in peers if peer.median]
        if self.whole and len(used) > 1 and not any(peer.instances[NOW] for peer in used):
            yield Flag("volume", f"none of {len(used)} peers stored anything: did the gate run?")
            return
        for peer in peers:
            now, usual = peer.instances[NOW], f"usually {peer.median:,.0f} a week, {peer.low:,} to {peer.high:,}"
            if peer.said == "silent":
                yield Flag("volume", f"peer {peer.title} stored nothing; {usual}")
            elif peer.said in {"more", "less"}:
                yield Flag("volume", f"peer {peer.title} stored {now:,} instance{'' if now == 1 else 's'}; {usual}")

    def _peer(self, title: str, peer: PeerCount) -> Peer:
        series = peer.instances
        past = series.weeks[max(0, series.since) : NOW]
        made = Peer(
            title,
            series.weeks,
            peer.bytes.weeks,
            peer.associations.now,
            peer.refused.now,
            float(median(past)) if past else 0.0,
            min(past, default=0),
            max(past, default=0),
        )
        if self._past and series.since == NOW:
            made.said = "new"
        elif len(past) >= _PAST:
            made.said = self._said(made, past)
        return made

    def _said(self, peer: Peer, past: list[int]) -> str:
        now = peer.instances[NOW]
        far = abs(now - peer.median) >= _INSTANCES
        if far and now > max(_TIMES * peer.median, peer.high):
            return "more"
        if not self.whole:
            # What a week lacks is known when it is over.
            return ""
        if now == 0:
            return "silent" if past.count(0) <= 1 else ""
        return "less" if far and now < min(peer.median / _TIMES, peer.low) else ""


_GAPS = {
    "audit-broken": "the audit chain was found changed, cut or broken",
    "audit-restarted": "the audit chain was put aside and a new one begun",
    "gone": "records made while locked are gone with their key version, and no copy of them was made",
    "events-refused": "events came that no gate of this store wrote, or that were damaged",
    "events-dropped": "the gate had more to tell than it could keep: its events are lost",
}
_RARE = {
    "damage-found": ("damage", "packs were found damaged or missing"),
    "restored": ("keys", "the store was restored from a backup"),
    "slot-added": ("keys", "a way to unlock was added"),
    "slot-removed": ("keys", "a way to unlock was removed"),
    "reroot": ("keys", "the slots got another root key"),
    "recovery-key-added": ("keys", "a recovery key was added"),
    "recovery-retired": ("keys", "a recovery key was retired"),
    "version-destroyed": ("keys", "a key version was destroyed"),
    "reencrypt-begun": ("keys", "studies were re-encrypted"),
    "configuration-changed": ("keys", "the vault began with another configuration"),
    "desk-refused": ("exported", "the desk asked for what a peer may not"),
    "desk-limited": ("exported", "a peer asked for more than it may in a time"),
    "commitment-dropped": ("exported", "storage commitment was never reported"),
    "holds-put-back": ("holds", "the ledger had lost holds, which were put back"),
}


def _usual(series: Series) -> bool:
    """Tell whether a count is as before: in at least 4 of the 8 weeks, and now at most three times their median."""
    past = [count for count in series.past if count]
    return len(past) >= _PAST and series.now <= _TIMES * median(past)


def _before(series: Series) -> str:
    past = [count for count in series.past if count]
    if not past:
        return "never in the 8 weeks before"
    return f"in {len(past)} of the 8 weeks before, up to {max(past):,}"


def _often(noted: Noted) -> str:
    return f", {noted.count:,} times" if noted.count > 1 else ""


def _by(noted: Noted) -> str:
    return f" by user {', '.join(map(str, sorted(noted.uids)[:5]))}" if noted.uids else ""


def _user(uid: int, found: UserCount) -> User:
    return User(
        uid,
        {kind: series.now for kind, series in sorted(found.acts.items()) if series.now},
        {kind: series.now for kind, series in sorted(found.outside.items()) if series.now},
        found.exports.now,
        found.exported.now,
        found.exports.record,
        found.erasures.now,
        found.erased.now,
        found.erasures.record,
    )


def _told(kind: str, noted: Noted) -> Told:
    return Told(kind, noted.count, sorted(noted.uids)[:100], noted.record)
