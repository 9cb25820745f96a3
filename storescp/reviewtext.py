"""A review as text: two screens, what to look at first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import TypeVar

from storescp.errors import plural
from storescp.review import First, Peer, Review, Told, User
from storescp.reviewweeks import NOW

# So that an odd week still fits: the page and the JSON have them all.
_FLAGS, _ROWS = 20, 12
_T = TypeVar("_T")
_LEVELS = " ▁▂▃▄▅▆▇█"

_KEYS = ("slot-", "reroot", "recovery-", "rotation-", "version-", "reencrypt", "certificate-issued", "restored")
_HOLDS = ("hold", "erasure-taken-back")


def text(review: Review) -> str:
    """Return a review as lines of at most about 120 characters."""
    return "\n".join(_lines(review)) + "\n"


def days(review: Review) -> str:
    """Return which days it is about: ``16 to 22 Nov 2026``."""
    begins, ends = date.fromisoformat(review.begins), date.fromisoformat(review.ends)
    year = f" {begins:%Y}" if begins.year != ends.year else ""
    month = f" {begins:%b}" if begins.month != ends.month else ""
    return f"{begins.day}{month}{year} to {ends.day} {ends:%b %Y}"


def bounds(review: Review) -> list[str]:
    """Return what bounds the review: a week that is not over, a chain that is too short."""
    found = []
    if not review.whole:
        found.append("the week is not over: what is missing in it is not judged")
    if not review.since:
        found.append("the chain has no records")
    elif review.since[:10] >= str(review.weeks[NOW - 3]):
        # Less than four whole weeks before this one.
        found.append(f"records go back to {review.since[:10]} only: few weeks, or none, to hold this one against")
    return found


def certificates(review: Review) -> list[First]:
    """Return the certificates that were first used."""
    return [first for first in review.firsts if first.what == "certificate"]


def told(review: Review, kinds: tuple[str, ...]) -> list[str]:
    """Return how often each was recorded, of the types that begin so."""
    return [f"{one.kind} {one.count} ({_by(one)})" for one in review.told if one.kind.startswith(kinds)]


def figures(review: Review) -> list[tuple[str, str]]:
    """Return the numbers of the week, each with its name."""
    stored = sum(peer.instances[NOW] for peer in review.peers)
    active = sum(1 for peer in review.peers if peer.instances[NOW])
    scheduled = review.erased_by_schedule[0]
    by_hand = sum(user.erasures for user in review.users)
    return [
        (f"{stored:,}", f"instances stored by {active} of {plural(len(review.peers), 'peer')}"),
        (f"{review.refused[NOW]:,}", "connections refused"),
        (f"{sum(user.exports for user in review.users):,}", "studies exported"),
        (f"{by_hand:,}", f"studies erased by hand, {scheduled:,} by the schedule"),
        (f"{sum(sum(user.outside.values()) for user in review.users):,}", "acts outside working hours"),
        (f"{sum(one.count for one in review.told if one.kind == 'unlock-refused'):,}", "wrong secrets to unlock"),
    ]


def keys_and_holds(review: Review) -> list[tuple[str, list[str]]]:
    """Return what happened to keys, holds, jobs and certificates, each with its name."""
    first = [f"{one.name[:16]} of {one.peer}{' (planned)' if one.planned else ''}" for one in certificates(review)]
    failed = [f"{one.kind} {one.count} ({_by(one)})" for one in review.jobs if not one.kind.endswith(" ok")]
    return [
        ("keys", told(review, _KEYS)),
        ("unlocking", told(review, ("unlock",))),
        ("holds", told(review, _HOLDS)),
        ("peers", told(review, ("peer",))),
        ("approvals", told(review, ("appro",))),
        ("jobs not ok", failed),
        ("certificates first used", first),
        ("ending soon", list(review.ending)),
    ]


def size(count: float) -> str:
    """Return a number of bytes: ``3.4 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def between(peer: Peer) -> str:
    """Return the range of a peer's weeks before; empty for a peer without any."""
    return f"{peer.low:,} to {peer.high:,}" if peer.high else ""


def did(user: User) -> str:
    """Return what a user did, the most first."""
    found = sorted(user.acts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {count}" for kind, count in found)


def taken(user: User) -> list[tuple[str, str]]:
    """Return how many studies a user took out and erased, of how many instances, and the first record of it."""
    return [
        (what, f"{studies:,} ({instances:,}), record {record}" if studies else "")
        for what, studies, instances, record in (
            ("exported", user.exports, user.exported, user.export_record),
            ("erased", user.erasures, user.erased, user.erasure_record),
        )
    ]


def name(user: User) -> str:
    """Return how a user is called."""
    return f"user {user.uid}" if user.uid >= 0 else "other users"


def _lines(review: Review) -> Iterator[str]:
    yield f"Review of {days(review)} ({review.timezone}), made {review.made}, of {review.records:,} records"
    yield from (f"note: {bound}" for bound in bounds(review))
    yield ""
    if review.flags:
        yield f"LOOK AT {plural(len(review.flags), 'THING', 'THINGS')}, the worst first:"
        for flag in review.flags[:_FLAGS]:
            yield f"  ! {flag.text}{f'  [record {flag.record}]' if flag.record else ''}"
        yield from _more(len(review.flags), _FLAGS)
    else:
        yield "NOTHING UNUSUAL: all is as in the weeks before."
    yield ""
    yield "; ".join(f"{number} {what}" for number, what in figures(review))
    yield ""
    yield f"{'PEER':<16}  9 WEEKS    {'INSTANCES':>10} {'MEDIAN':>9}  {'RANGE':<19} {'BYTES':>8}  NOTE"
    yield from _rows(review.peers, _peer)
    if review.refusals:
        yield ""
        yield "REFUSED"
        yield from _rows(review.refusals, lambda r: f"  {r.count:>6,}  {_from(r.calling, r.address)}: {r.reason}")
    new = [first for first in review.firsts if first.what != "certificate"]
    if new:
        yield ""
        yield "FIRST SEEN"
        yield from _rows(new, lambda f: f"  {f.what} {f.name}" + (f" of {f.peer}" if f.what == "address" else ""))
    if review.users:
        yield ""
        yield "USERS"
        yield from _rows(review.users, _user)
    rest = [(what, found) for what, found in keys_and_holds(review) if found]
    if rest:
        yield ""
    for what, found in rest:
        yield f"{what}: {', '.join(found[:_ROWS])}{f' and {len(found) - _ROWS} more' if len(found) > _ROWS else ''}"
    if review.flags:
        yield ""
        yield "a record with what follows it, its reason among it: strongroom audit show --after NUMBER-1"


def _rows(found: Sequence[_T], row: Callable[[_T], str]) -> Iterator[str]:
    yield from (row(one) for one in found[:_ROWS])
    yield from _more(len(found), _ROWS)


def _more(count: int, shown: int) -> Iterator[str]:
    if count > shown:
        yield f"  and {count - shown} more: 'strongroom audit review --html FILE' has them all"


def _peer(peer: Peer) -> str:
    top = max(peer.instances) or 1
    plot = "".join(_LEVELS[-(-8 * count // top)] for count in peer.instances)
    reach = between(peer)
    refused = f"{peer.refused:,} instances refused" if peer.refused else ""
    note = "; ".join(part for part in (peer.said.upper(), refused) if part)
    numbers = f"{peer.instances[NOW]:>10,} {peer.median:>9,.0f}  {reach:<19} {size(peer.bytes[NOW]):>8}"
    return f"{peer.title:<16}  {plot}  {numbers}  {note}".rstrip()


def _user(user: User) -> str:
    outside = f"; outside working hours {sum(user.outside.values())}" if user.outside else ""
    took = "".join(f"; {what} {found}" for what, found in taken(user) if found)
    return f"  {name(user)}: {did(user)}{took}{outside}"


def _from(calling: str, address: str) -> str:
    return " at ".join(part for part in (calling, address) if part) or "many"


def _by(one: Told) -> str:
    users = f"user {' and '.join(map(str, one.uids[:5]))}, " if one.uids else ""
    return f"{users}record {one.record}"
