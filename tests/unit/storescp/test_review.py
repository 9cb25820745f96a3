"""The review of a week: what is planted is found, a quiet week is quiet, and nothing of a record becomes markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storescp import reviewcount
from storescp.cron import zone_of
from storescp.markup import Markup, element
from storescp.review import Review
from storescp.reviewpage import page
from storescp.reviewrules import last_week, review
from storescp.reviewsettings import ReviewSettings, check
from storescp.reviewtext import text
from storescp.reviewweeks import NOW, weeks_of

QUICK = settings(deadline=None, derandomize=True, max_examples=60)
BERLIN = zone_of("Europe/Berlin")
WEEKS = weeks_of(date(2026, 11, 18), BERLIN)
MONDAY = WEEKS.edges[NOW]
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
AFTER = WEEKS.edges[-1] + 7 * HOUR
FINGERPRINTS = {"CT1": "a" * 64, "MR1": "b" * 64}
VAULT = 990
STUDY = "1.2.840.113619.2.55.3.604688119.971"

Record = dict[str, Any]


def at(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Chain:
    """Records in the order of their times, numbered when they are read."""

    def __init__(self) -> None:
        self.records: list[tuple[datetime, Record]] = []

    def add(self, when: datetime, kind: str, **fields: Any) -> None:
        self.records.append((when, {"time": at(when), "type": kind, **fields}))

    def event(self, when: datetime, kind: str, **fields: Any) -> None:
        self.add(when + timedelta(seconds=5), "gate-events", events=[{"time": at(when), "type": kind, **fields}])

    def stored(self, when: datetime, calling: str, count: int, **fields: Any) -> None:
        """Let a peer come and store."""
        common = {"calling": calling, "address": "10.1.2.3:41000", "certificate": FINGERPRINTS.get(calling, "c" * 64)}
        self.event(when, "association-begun", **common | fields)
        self.event(when + HOUR, "association-ended", stored=count, refused=0, bytes=count << 19, **common | fields)

    def refused(self, when: datetime, count: int, calling: str = "CT9", reason: str = "no peer has this title") -> None:
        self.event(when, "connection-refused", calling=calling, address="10.1.9.9", reason=reason, count=count)

    def job(self, when: datetime, job: str, result: str = "ok") -> None:
        self.add(when, "job-ended", job=job, result=result, due="", began=at(when - HOUR)[:19] + "Z", missed=0)

    def numbered(self) -> Iterator[Record]:
        ordered = sorted(self.records, key=lambda item: item[0])
        return iter([{"number": number, **record} for number, (_, record) in enumerate(ordered, 1)])

    def review(self, now: datetime = AFTER, **given: Any) -> Review:
        common: dict[str, Any] = {"hours": "mon-fri 07:00-19:00", "zone": BERLIN, "timezone": "Europe/Berlin"}
        return review(given.pop("records", self.numbered()), WEEKS, now=now, vault_uid=VAULT, **common | given)


def quiet() -> Chain:
    """Ten weeks in which everybody does what he always does."""
    chain = Chain()
    for week in range(-1, 9):
        monday = WEEKS.edges[week] if week >= 0 else WEEKS.edges[0] - 7 * DAY
        for title, count in (("CT1", 1000), ("MR1", 300)):
            # Some weeks more, some less.
            chain.stored(monday + DAY + 10 * HOUR, title, count + (37 * week) % 200)
        chain.refused(monday + 2 * DAY + 9 * HOUR, 12 + week % 3, calling="", reason="closed before")
        chain.add(monday + 10 * HOUR, "query", uid=1001)
        chain.add(monday + 11 * HOUR, "export-begun", uid=1001, study=STUDY)
        chain.add(monday + 11 * HOUR + timedelta(minutes=2), "exported", uid=1001, study=STUDY, instances=120)
        # An admin who comes on Sundays, and a nightly job.
        chain.add(monday + 6 * DAY + 10 * HOUR, "query", uid=1002)
        chain.add(monday + 3 * DAY + 1.5 * HOUR, "scrub", uid=VAULT)
        chain.add(monday + 3 * DAY + 1.6 * HOUR, "erase-begun", uid=VAULT, study=STUDY, instances=3, reason="Doe^Jane")
        chain.job(monday + 3 * DAY + 2 * HOUR, "scrub")
        chain.job(monday + 3 * DAY + 2 * HOUR, "retention")
        chain.job(monday + 3 * DAY + 3 * HOUR, "patch", "findings")
    return chain


def said(found: Review) -> list[tuple[str, str]]:
    return [(flag.kind, flag.text) for flag in found.flags]


def test_a_quiet_week_is_not_flagged_and_says_so() -> None:
    found = quiet().review()
    assert said(found) == []
    assert "NOTHING UNUSUAL" in text(found)
    assert "Nothing unusual" in page(found)
    assert [peer.title for peer in found.peers] == ["CT1", "MR1"]
    assert found.erased_by_schedule == [1, 3]
    assert [(user.uid, user.exports, user.exported) for user in found.users] == [(1001, 1, 120), (1002, 0, 0)]
    assert (found.whole, found.begins, found.ends) == (True, "2026-11-16", "2026-11-22")


def shift(chain: Chain, title: str, count: int) -> None:
    """Let a peer store another number in the week."""
    for when, record in chain.records:
        for event in record.get("events", []):
            if when > MONDAY and event["type"] == "association-ended" and event["calling"] == title:
                event["stored"] = count


def silence(chain: Chain, *titles: str) -> None:
    """Keep peers away in the week."""
    chain.records = [
        (when, record)
        for when, record in chain.records
        if when < MONDAY or all(event.get("calling") not in titles for event in record.get("events", []))
    ]


def export(chain: Chain, uid: int, count: int) -> None:
    for number in range(count):
        chain.add(MONDAY + 12 * HOUR + timedelta(minutes=number), "export-begun", uid=uid, study=STUDY)


def fetched(chain: Chain, title: str, count: int, when: datetime) -> None:
    """Let a peer find and fetch something through the desk."""
    chain.add(when, "query", uid=77, peer=title, level="study", filters={})
    for kind in ("export-begun", "exported"):
        chain.add(when, kind, uid=77, peer=title, to=title, by="get", study=STUDY, instances=count)


def jump(chain: Chain) -> None:
    chain.add(MONDAY + HOUR, "vault-started", release="1", configuration="b" * 64)
    chain.add(MONDAY - DAY, "vault-started", release="1", configuration="a" * 64)


def locked(chain: Chain, *, copied: bool) -> None:
    """Record three wrong secrets while locked, whose key version was destroyed later."""
    for number in range(3):
        when = MONDAY + DAY + number * HOUR
        chain.add(when, "gone-with-its-version", version=1)
        of = 1 + next(n for n, (w, _) in enumerate(sorted(chain.records, key=lambda item: item[0])) if w == when)
        if copied:
            # The number holds as long as nothing before it is added.
            inner = {"time": at(when), "type": "unlock-refused", "uid": 1003, "in_a_row": number + 1}
            chain.add(MONDAY + 5 * DAY + 10 * HOUR, "transcript", of=of, record=inner)


PLANTED: list[tuple[Callable[[Chain], None], str, str]] = [
    (lambda c: silence(c, "MR1"), "volume", "peer MR1 stored nothing; usually 3"),
    (lambda c: silence(c, "MR1", "CT1"), "volume", "none of 2 peers stored anything"),
    (lambda c: shift(c, "MR1", 2000), "volume", "peer MR1 stored 2,000 instances; usually 3"),
    (lambda c: shift(c, "CT1", 100), "volume", "peer CT1 stored 100 instances; usually 1,"),
    (lambda c: c.stored(MONDAY + DAY, "US9", 5), "new", "peer US9 was let in the first time, and no"),
    (lambda c: c.stored(MONDAY + DAY, "CT1", 5, certificate="d" * 64), "new", f"with certificate {'d' * 16}, and no"),
    (lambda c: c.refused(MONDAY + DAY, 10), "refused", "10 connections of CT9 refused; never in the 8 weeks before"),
    (lambda c: c.refused(MONDAY + DAY, 40, ""), "refused", "connections of 10.1.9.9 refused; in 8 of the 8 weeks"),
    (lambda c: c.add(MONDAY + 22 * HOUR, "query", uid=1001), "hours", "user 1001 outside working hours: query 1"),
    (lambda c: c.add(MONDAY + 2 * HOUR, "scrub", uid=VAULT), "hours", f"user {VAULT} outside working hours: scrub 1"),
    (lambda c: export(c, 1001, 10), "exported", "user 1001 exported 11 studies; in 8 of the 8 weeks before, up to 1"),
    (lambda c: export(c, 1003, 1), "exported", "user 1003 exported 1 study; for the first time"),
    (
        lambda c: c.add(MONDAY + 12 * HOUR, "erase-begun", uid=1001, study=STUDY, instances=7, reason="Doe^Jane"),
        "erased",
        "user 1001 erased 1 study; for the first time",
    ),
    (
        # By hand, by the vault's own user, while another job of the schedule is at work.
        lambda c: c.add(MONDAY + 3 * DAY + 2.5 * HOUR, "erase-begun", uid=VAULT, study=STUDY, instances=7),
        "erased",
        f"user {VAULT} erased 1 study",
    ),
    (
        lambda c: [c.add(MONDAY + 12 * HOUR, "unlock-refused", uid=1003) for _ in range(3)] and None,
        "unlock",
        "3 wrong secrets were given to unlock by user 1003",
    ),
    (lambda c: locked(c, copied=True), "unlock", "3 wrong secrets"),
    (lambda c: locked(c, copied=False), "gap", "no copy of them was made, 3 times"),
    (
        lambda c: c.add(MONDAY + 12 * HOUR, "slot-added", uid=1001, label="x"),
        "keys",
        "a way to unlock was added by user",
    ),
    (lambda c: c.add(MONDAY + 12 * HOUR, "recovery-retired", uid=1001), "keys", "a recovery key was retired"),
    (jump, "keys", "the vault began with another configuration"),
    (lambda c: c.add(MONDAY, "holds-put-back", ids=["x"]), "holds", "the ledger had lost holds"),
    (lambda c: fetched(c, "VIEW1", 5, MONDAY), "exported", "peer VIEW1 was given 5 instances; for the first time"),
    (lambda c: c.add(MONDAY, "desk-limited", uid=77, peer="VIEW1", times=9), "exported", "asked for more than it may"),
    (lambda c: c.add(MONDAY, "damage-found", pack="x"), "damage", "packs were found damaged"),
    (lambda c: c.add(MONDAY, "audit-broken", fault="x"), "gap", "the audit chain was found changed"),
    (lambda c: c.add(MONDAY, "audit-restarted", uid=0), "gap", "a new one begun"),
    (lambda c: c.add(MONDAY, "events-refused", file="x"), "gap", "events came that no gate"),
    (lambda c: c.event(MONDAY, "events-dropped", count=7), "gap", "its events are lost, 7 times"),
    (lambda c: c.job(MONDAY + DAY, "backup", "failed"), "job", "job backup failed"),
    (lambda c: c.job(MONDAY + DAY, "backup", "refused"), "job", "job backup refused"),
]


@pytest.mark.parametrize(("plant", "kind", "words"), PLANTED, ids=[f"{k}-{w[:30]}" for _, k, w in PLANTED])
def test_what_is_planted_in_a_quiet_week_is_flagged_in_text_and_page(
    plant: Callable[[Chain], Any], kind: str, words: str
) -> None:
    chain = quiet()
    plant(chain)
    found = chain.review()
    matching = [flag for flag in found.flags if flag.kind == kind and words in flag.text]
    assert matching, said(found)
    assert matching[0].text in text(found)
    assert ElementTree.fromstring(page(found)) is not None
    # It points to where it is: nothing before that record is about it.
    numbers = [record["number"] for record in chain.numbered() if record["time"] >= at(MONDAY - DAY)]
    assert matching[0].record == 0 or matching[0].record in numbers


@pytest.mark.parametrize(
    "plant",
    [
        # What an admin did by command, few of anything, a little more or less.
        lambda c: (c.add(MONDAY + 9 * HOUR, "peer-added", uid=1001, peer="US9"), c.stored(MONDAY + DAY, "US9", 5)),
        lambda c: (
            c.add(MONDAY - 9 * DAY + 12 * HOUR, "peer-renewing", uid=1001, peer="CT1"),
            c.stored(MONDAY + DAY, "CT1", 5, certificate="d" * 64),
        ),
        lambda c: c.stored(MONDAY + DAY, "CT1", 5, address="10.1.2.99:1234"),
        lambda c: c.refused(MONDAY + DAY, 9),
        lambda c: shift(c, "MR1", 700),
        lambda c: shift(c, "CT1", 500),
        lambda c: export(c, 1001, 2),
        # Through the desk, at night, as each week: nobody's act.
        lambda c: [fetched(c, "VIEW1", 500, MONDAY - n * 7 * DAY + 2 * HOUR) for n in range(8)],
        lambda c: c.add(MONDAY + 12 * HOUR, "unlock-refused", uid=1001),
        lambda c: c.add(MONDAY + 23 * HOUR, "locked", uid=1001),
        lambda c: c.add(MONDAY + 3 * DAY + 1.7 * HOUR, "scrub", uid=VAULT),
        # Before the week, and behind it.
        lambda c: c.add(MONDAY - DAY, "slot-added", uid=1001),
        lambda c: c.add(AFTER, "slot-added", uid=1001),
        lambda c: c.refused(AFTER, 500),
    ],
)
def test_what_is_usual_planned_or_of_another_week_is_not_flagged(plant: Callable[[Chain], Any]) -> None:
    chain = quiet()
    plant(chain)
    assert said(chain.review()) == []


def test_a_past_is_each_peers_own_and_begins_when_it_was_first_seen() -> None:
    chain = quiet()
    for week in range(5, 9):
        chain.stored(WEEKS.edges[week] + DAY, "US1", 500)
    chain.add(WEEKS.edges[5], "peer-added", uid=1001, peer="US1")
    [peer] = [peer for peer in chain.review().peers if peer.title == "US1"]
    assert (peer.median, peer.low, peer.high, peer.said) == (500.0, 500, 500, "")
    silence(chain, "US1")
    # Three weeks are no past yet.
    assert said(chain.review()) == []


def test_a_first_week_has_nothing_to_compare_with_and_says_so() -> None:
    chain = quiet()
    chain.records = [(when, record) for when, record in chain.records if when >= MONDAY]
    found = chain.review()
    assert [flag.kind for flag in found.flags] == ["refused", "hours"]
    assert found.firsts == []
    assert "records go back to 2026-11-16 only" in text(found)


def test_a_week_that_is_not_over_blames_nobody_for_what_is_missing() -> None:
    chain = quiet()
    silence(chain, "CT1", "MR1")
    found = chain.review(now=MONDAY + DAY)
    assert said(found) == []
    assert "the week is not over" in page(found)


def test_weeks_go_from_monday_to_monday_in_the_zone_over_a_change_of_the_clock() -> None:
    # The clock goes back on 2026-10-25.
    assert (WEEKS.edges[5], WEEKS.edges[4]) == (
        datetime(2026, 10, 25, 23, tzinfo=UTC),
        datetime(2026, 10, 18, 22, tzinfo=UTC),
    )
    assert [weeks_of(day, BERLIN).monday for day in (date(2026, 11, 16), date(2026, 11, 22))] == [
        date(2026, 11, 16)
    ] * 2
    assert last_week(datetime(2026, 11, 22, 23, 30, tzinfo=UTC), BERLIN) == date(2026, 11, 16)
    assert last_week(datetime(2026, 11, 22, 23, 30, tzinfo=UTC), UTC) == date(2026, 11, 15)


def test_a_chain_that_breaks_is_reviewed_up_to_there_and_that_is_the_worst() -> None:
    def broken() -> Iterator[Record]:
        yield from quiet().numbered()
        raise OSError("record 4711 does not open")

    found = quiet().review(records=broken(), broken=(OSError,))
    assert said(found)[0][0] == "gap"
    assert "record 4711 does not open" in found.flags[0].text
    assert found.peers


# --- whatever the records hold


nasty = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ['"><script>alert(1)</script>', "</title><b>", "' onload='x", "&amp;<", "]]>", "\x1b[2J", "\u202e", "a\nb"]
    ),
)
values = st.recursive(
    st.one_of(nasty, st.integers(-(1 << 70), 1 << 70), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=4,
)
times = st.one_of(
    st.integers(-10 * 7 * 24, 8 * 24).map(lambda hours: at(MONDAY + hours * HOUR)),
    nasty,
    st.sampled_from(["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-11-17T12:00:00", ""]),
)
types = st.sampled_from(
    ["association-begun", "association-ended", "connection-refused", "events-dropped", "peers-changed"]
)
fields = ("calling", "address", "certificate", "reason", "count", "stored", "bytes", "refused", "files")
events = st.fixed_dictionaries({"time": times, "type": types}, optional=dict.fromkeys(fields, nasty | values))
kinds = st.sampled_from([*sorted(reviewcount._NOTED), "export-begun", "exported", "erase-begun", "job-ended", "query"])
names = (
    "peer",
    "job",
    "result",
    "began",
    "instances",
    "configuration",
    "reason",
    "study",
    "uid",
    "of",
    "record",
    "events",
)
records = st.one_of(
    st.fixed_dictionaries({"time": times, "type": kinds}, optional=dict.fromkeys(names, nasty | values)),
    st.fixed_dictionaries({"time": times, "type": st.just("gate-events"), "events": st.lists(events, max_size=4)}),
    st.fixed_dictionaries({"time": times, "type": st.just("transcript")}, optional={"of": values, "record": values}),
)
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "section",
    "ul",
    "li",
    "span",
    "dl",
    "div",
    "dt",
    "dd",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "svg",
    "rect",
    "line",
    "text",
    "footer",
    "code",
}
ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "scope",
    "width",
    "height",
    "viewBox",
    "role",
    "x",
    "y",
    "x1",
    "x2",
    "y1",
    "y2",
    "text-anchor",
}


@QUICK
@given(st.lists(records, max_size=8), st.lists(nasty, max_size=2))
def test_whatever_text_a_record_holds_comes_out_as_text_on_the_page(found: list[Record], ending: list[str]) -> None:
    numbered = iter([{"number": n, **record} for n, record in enumerate(found, 1)])
    made = quiet().review(records=numbered, ending=ending)
    whole = page(made)
    root = ElementTree.fromstring(whole)
    assert {node.tag for node in root.iter()} <= TAGS
    assert {name for node in root.iter() for name in node.attrib} <= ATTRIBUTES
    assert "".join(root.itertext()).replace("\n", "").isprintable()
    assert text(made).replace("\n", "").isprintable()
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(made)), Review) == made


@pytest.mark.parametrize("field", ["calling", "address", "certificate", "reason"])
def test_what_a_peer_says_of_itself_is_shown_and_escaped(field: str) -> None:
    chain = quiet()
    said_of_itself = {
        "calling": "X",
        "address": "10.0.0.1",
        "certificate": "e" * 64,
        "reason": "r",
        field: "<b>&'\"\x07",
    }
    chain.event(MONDAY, "association-begun", **said_of_itself)
    chain.event(MONDAY, "connection-refused", count=3, **said_of_itself)
    whole = page(chain.review())
    assert "&lt;b&gt;&amp;&#x27;&quot;\\x07" in whole
    assert "<b>" not in whole


def test_no_study_reason_or_anything_like_a_uid_is_in_a_review() -> None:
    chain = quiet()
    chain.add(MONDAY + DAY, "erase-begun", uid=1001, study=STUDY, reason="Doe^Jane asked", instances=4)
    chain.add(MONDAY + DAY, "hold-placed", uid=1001, hold={"patient_id": "PID77", "reason": "Doe^Jane", "study": STUDY})
    chain.add(MONDAY + DAY, "query", uid=1001, filters={"PatientName": "Doe^Jane"})
    chain.refused(MONDAY, 20, calling=f"x{STUDY}"[:40], reason=f"about {STUDY} it said so")
    chain.stored(MONDAY, "CT1", 1, studies={STUDY: 1}, ending=STUDY)
    made = chain.review()
    for content in (msgspec.json.encode(made).decode(), text(made), page(made)):
        assert "about ... it said so" in content
        for secret in (STUDY, STUDY[:12], "Doe", "PID77"):
            assert secret not in content


def test_a_gate_gone_mad_does_not_grow_the_review_without_bound() -> None:
    def many() -> Iterator[Record]:
        for number in range(1, 41):
            found = []
            for n in range(500):
                name = f"{number}-{n}"
                common = {"time": at(MONDAY), "calling": name, "address": f"{name}:1", "certificate": name}
                found += [{"type": "association-begun", **common}, {"type": "association-ended", **common}]
                found.append({"type": "connection-refused", "reason": name, "count": 1, **common})
            yield {"number": number, "time": at(MONDAY), "type": "gate-events", "events": found}

    made = quiet().review(records=many())
    assert len(made.peers) == 2000
    assert len(made.refusals) == 1001
    assert sum(refusal.count for refusal in made.refusals) == sum(made.refused_days) == made.refused[NOW] == 20_000
    assert "more names than a review counts" in text(made)
    assert len(page(made)) < 1 << 20


def test_the_page_loads_nothing_runs_nothing_and_its_policy_names_its_style() -> None:
    whole = page(quiet().review())
    assert whole.startswith("<!DOCTYPE html>\n<html lang=")
    assert not re.search(r"(?i)<script|javascript:|https?://|url\(|@import|\son\w+=|style=", whole)
    assert re.search(r"default-src &#x27;none&#x27;; style-src &#x27;sha256-[A-Za-z0-9+/]{43}=&#x27;", whole)


def test_markup_is_only_what_was_made_as_markup() -> None:
    assert element("p", "<", Markup("<b/>"), class_='"') == '<p class="&quot;">&lt;<b/></p>'
    assert element("text", "1", text_anchor="middle", x=2.0) == '<text text-anchor="middle" x="2">1</text>'


@pytest.mark.parametrize(("hours", "good"), [("daily 00:00-24:00", True), ("", False), ("weekdays", False)])
def test_working_hours_are_a_window(hours: str, good: bool) -> None:
    assert [line[:13] for line in check(ReviewSettings(hours=hours))] == ([] if good else ["review.hours:"])
