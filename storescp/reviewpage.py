"""A review as one HTML page: no script, nothing from elsewhere, plots inside; light and dark. It may be mailed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import date, timedelta

from storescp import reviewtext
from storescp.errors import plural
from storescp.markup import Markup, element, join
from storescp.review import Flag, Peer, Review, User
from storescp.reviewweeks import NOW

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_KINDS = {
    "gap": "log",
    "unlock": "unlock",
    "damage": "damage",
    "keys": "keys",
    "holds": "holds",
    "erased": "erased",
    "exported": "exported",
    "new": "new",
    "refused": "refused",
    "hours": "hours",
    "volume": "volume",
    "job": "job",
    "ending": "ending",
}
_URGENT = {"gap", "unlock", "damage", "keys", "holds", "erased"}
# A page of thousands of rows is read by nobody; the JSON has them all.
_ROWS = 200

_CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2430; --soft: #5a6573; --line: #dde2e8; --panel: #f4f6f8;
  --bar: #b4c0cd; --now: #2464a4; --warn: #9a5b00; --warnbar: #d98218; --bad: #b3261e; --good: #1f6f43; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e4e9ee; --soft: #9aa6b3; --line: #303842;
  --panel: #1c2229; --bar: #4c5967; --now: #6fb1ee; --warn: #f0b35a; --warnbar: #e09a3a; --bad: #ff8a80;
  --good: #7fd1a2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.2rem 1.5rem 2rem; background: var(--page); color: var(--ink);
  font: 14px/1.4 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.45rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
p { margin: .2rem 0; }
.soft, caption, footer { color: var(--soft); font-size: .86rem; }
.verdict { margin: .9rem 0; padding: .6rem .9rem .7rem; background: var(--panel); border-left: 5px solid var(--good); }
.verdict.found { border-color: var(--bad); }
.verdict h2 { margin: 0 0 .3rem; }
.flags { list-style: none; margin: 0; padding: 0; }
.flags li { display: grid; grid-template-columns: 5.6rem 1fr auto; gap: .7rem; padding: .16rem 0; }
.flags li + li { border-top: 1px solid var(--line); }
.kind { font-weight: 600; color: var(--warn); }
.urgent .kind { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 0; }
.figures div { background: var(--panel); padding: .5rem .7rem; }
.figures dd { margin: 0; font-size: 1.45rem; font-weight: 600; }
.figures dt { color: var(--soft); font-size: .84rem; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding: 0 0 .3rem; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: .84rem; border-bottom: 1px solid var(--line); }
th, td { padding: .18rem .7rem .18rem 0; vertical-align: middle; }
td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.said { font-weight: 600; color: var(--warn); }
.plots { margin-bottom: .6rem; display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: .84rem; }
svg { display: block; }
svg text { fill: var(--soft); font-size: 11px; }
.past { fill: var(--bar); }
.now { fill: var(--now); }
.odd { fill: var(--warnbar); }
.base { stroke: var(--line); }
.median { stroke: var(--ink); stroke-dasharray: 2 2; opacity: .55; }
code { font-size: .92em; overflow-wrap: anywhere; }
footer { margin-top: 1.6rem; border-top: 1px solid var(--line); padding-top: .5rem; }
@media print { body { max-width: none; } tr, li { break-inside: avoid; } }
""".strip()
_HASH = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"


def page(review: Review) -> str:
    """Return a review as a whole page."""
    title = f"Strongroom: review of {reviewtext.days(review)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        # As it is: its hash is in the policy, and nothing of it comes from elsewhere.
        element("style", Markup(_CSS)),
    )
    made = f"{review.timezone}; made {review.made} of {review.records:,} records"
    body = element(
        "body",
        element("h1", f"Review of {reviewtext.days(review)}"),
        element("p", made, class_="soft"),
        *(element("p", f"Note: {bound}", class_="said") for bound in reviewtext.bounds(review)),
        _verdict(review.flags),
        _figures(review),
        _volume(review),
        _refusals(review),
        _firsts(review),
        _users(review),
        _rest(review),
        _footer(review),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _verdict(flags: list[Flag]) -> Markup:
    if not flags:
        said = element("p", "All is as in the weeks before.")
        return element("section", element("h2", "Nothing unusual"), said, class_="verdict")
    rows = [
        element(
            "li",
            element("span", _KINDS.get(flag.kind, flag.kind), class_="kind"),
            element("span", flag.text),
            element("span", f"record {flag.record}" if flag.record else "", class_="soft"),
            class_="urgent" if flag.kind in _URGENT else "look",
        )
        for flag in flags[:_ROWS]
    ]
    found = plural(len(flags), "thing")
    more = f", {_ROWS} of them shown" if len(flags) > _ROWS else ""
    head = element("h2", f"{found} to look at, the worst first{more}")
    return element("section", head, element("ul", join(rows), class_="flags"), class_="verdict found")


def _figures(review: Review) -> Markup:
    found = [element("div", element("dt", what), element("dd", number)) for number, what in reviewtext.figures(review)]
    return element("dl", join(found), class_="figures")


def _volume(review: Review) -> Markup:
    first = review.weeks[0]
    caption = (
        f"Bars: instances of nine weeks from {first.day} {first:%b}, each peer to its own scale, now at the right; "
        "dashed: the median of its weeks before."
    )
    columns = ["Peer", "Nine weeks", "#Instances", "#Median", "#Range", "#Bytes", "#Associations", "#Refused", ""]
    rows = [_peer(peer) for peer in review.peers[:_ROWS]]
    return _section("Volume", _table(columns, rows, caption), len(review.peers), "no peer stored anything")


def _peer(peer: Peer) -> list[str | Markup]:
    return [
        peer.title,
        _spark(peer.instances, peer.median, odd=bool(peer.said)),
        f"{peer.instances[NOW]:,}",
        f"{peer.median:,.0f}" if peer.high else "",
        reviewtext.between(peer),
        reviewtext.size(peer.bytes[NOW]),
        f"{peer.associations:,}",
        f"{peer.refused:,}" if peer.refused else "",
        element("span", peer.said, class_="said") if peer.said else "",
    ]


def _spark(counts: Sequence[int], median: float, *, odd: bool) -> Markup:
    height, width = 26, 16
    top = max(*counts, median, 1)
    bars = [
        element("rect", x=n * width, y=height - _tall(count, top, height), width=width - 2,
                height=_tall(count, top, height), class_=("odd" if odd else "now") if n == NOW else "past")
        for n, count in enumerate(counts)
    ]  # fmt: skip
    wide = width * len(counts)
    line = height - median / top * height
    return element(
        "svg",
        element("title", f"instances of nine weeks: {', '.join(f'{count:,}' for count in counts)}"),
        join(bars),
        element("line", x1=0, x2=wide, y1=height + 0.5, y2=height + 0.5, class_="base"),
        *([element("line", x1=0, x2=wide, y1=line, y2=line, class_="median")] if median else []),
        width=wide, height=height + 1, viewBox=f"0 0 {wide} {height + 1}", role="img",
    )  # fmt: skip


def _tall(count: float, top: float, height: float) -> float:
    """Return a bar's height; what is not nothing is seen."""
    return max(1.5, count / top * height) if count else 0.0


def _refusals(review: Review) -> Markup:
    monday = date.fromisoformat(review.begins)
    days = [f"{day} {(monday + timedelta(days=number)).day}" for number, day in enumerate(_DAYS)]
    weeks = [f"{week.day} {week:%b}" for week in review.weeks]
    plots = element(
        "div",
        _figure("Refused connections by day", days, review.refused_days, 0),
        _figure("by week, from", weeks, review.refused, NOW),
        class_="plots",
    )
    rows: list[list[str | Markup]] = [
        [f"{r.count:,}", r.calling, r.address, r.reason, str(r.record)] for r in review.refusals[:_ROWS]
    ]
    table = _table(["#Count", "Calling", "From", "Reason", "#Record"], rows, "")
    return _section("Refused connections", join([plots, table]), sum(review.refused), "none in nine weeks")


def _figure(caption: str, labels: Sequence[str], counts: Sequence[int], new_from: int) -> Markup:
    left, width, height, top = 6, 46, 76, max(*counts, 1)
    parts = []
    for n, (label, count) in enumerate(zip(labels, counts, strict=True)):
        tall, middle = _tall(count, top, height), left + n * width + (width - 8) / 2
        parts += [
            element("rect", x=left + n * width, y=14 + height - tall, width=width - 8, height=tall,
                    class_="now" if n >= new_from else "past"),
            element("text", f"{count:,}" if count else "", x=middle, y=10 + height - tall, text_anchor="middle"),
            element("text", label, x=middle, y=height + 29, text_anchor="middle"),
        ]  # fmt: skip
    wide = left + width * len(counts)
    svg = element(
        "svg",
        element("title", f"{caption}: {', '.join(f'{a} {b:,}' for a, b in zip(labels, counts, strict=True))}"),
        join(parts),
        element("line", x1=0, x2=wide, y1=height + 14.5, y2=height + 14.5, class_="base"),
        width=wide, height=height + 34, viewBox=f"0 0 {wide} {height + 34}", role="img",
    )  # fmt: skip
    return element("figure", element("figcaption", caption), svg)


def _firsts(review: Review) -> Markup:
    rows: list[list[str | Markup]] = [
        [f.what, f.name[:16] if f.what == "certificate" else f.name, f.peer, _planned(planned=f.planned), str(f.record)]
        for f in review.firsts[:_ROWS]
    ]
    table = _table(["What", "Name", "Peer", "Known to an admin", "#Record"], rows, "")
    return _section("Seen for the first time", table, len(review.firsts), "no new title, address or certificate")


def _planned(*, planned: bool) -> Markup:
    return element("span", "yes, by a peer command") if planned else element("span", "no", class_="said")


def _users(review: Review) -> Markup:
    rows = [_user(user) for user in review.users[:_ROWS]]
    columns = ["User", "Did", "#Exported", "#Erased", f"Outside {review.hours}"]
    table = _table(
        columns, rows, "Exported and erased: studies (instances), first record. Reasons are in the records, not here."
    )
    return _section("Who did what", table, len(review.users), "no admin did anything")


def _user(user: User) -> list[str | Markup]:
    outside = ", ".join(f"{kind} {count}" for kind, count in user.outside.items())
    return [
        reviewtext.name(user),
        reviewtext.did(user),
        *(found for _, found in reviewtext.taken(user)),
        outside,
    ]


def _rest(review: Review) -> Markup:
    rows: list[list[str | Markup]] = [
        [what, ", ".join(found[:_ROWS])] for what, found in reviewtext.keys_and_holds(review) if found
    ]
    return _section("Keys, holds, jobs, certificates", _table(["What", "How often"], rows, ""), len(rows), "nothing")


def _footer(review: Review) -> Markup:
    return element(
        "footer",
        element(
            "p",
            "Flagged are volumes beyond every week before and over three times, or below a third of, their median; "
            "ten refused connections of one peer, ten exported studies, any erased by hand, any act outside "
            f"{review.hours}, unless it was so in four of the eight weeks before and is at most three times that; "
            "and whatever is new, broken, or about keys. More: docs/review.md.",
        ),
        element("p", "To look at record N and what follows it: ", element("code", "strongroom audit show --after N-1")),
    )


def _section(title: str, content: Markup, count: int, none: str) -> Markup:
    said = element("p", none, class_="soft") if not count and none else content
    return element("section", element("h2", title), said)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str | Markup]], caption: str) -> Markup:
    """Return a table; columns whose name begins with # are numbers."""
    numbers = [column.startswith("#") for column in columns]
    made = [
        element("tr", *(element("td", cell, class_="n") if n else element("td", cell)
                        for cell, n in zip(row, numbers, strict=True)))
        for row in rows
    ]  # fmt: skip
    if not made:
        return Markup("")
    head = element(
        "tr",
        *(element("th", column.lstrip("#"), scope="col", **({"class_": "n"} if n else {}))
          for column, n in zip(columns, numbers, strict=True)),
    )  # fmt: skip
    said = [element("caption", caption)] if caption else []
    table = element("table", *said, element("thead", head), element("tbody", join(made)))
    return element("div", table, class_="wide")
