"""Retention at work: what a plan says is done, and nothing else; brakes, grace, taking back, erased and sent again."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import retention_check
from aged import Aged, Day, copy_archive, decide, make_archive, make_empty, on
from conftest import Server, refill

from keys import slots
from storage.ledger import Ledger
from storage.retentionrules import QUARANTINE, Rule
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.config import load
from storescp.errors import StrongroomError
from storescp.vault import retain
from storescp.vault.api.quarantine import items
from storescp.vault.erase import Erase
from storescp.vault.holding import Holding
from storescp.vault.retain import Retain
from storescp.vault.state import Vault
from storescp.vault.verify import verify

A, B, C = "1.2.3.1", "1.2.3.2", "1.2.3.3"
STUDIES = 250


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    return Day(monkeypatch, "2026-03-01")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_empty(tmp_path_factory.mktemp("empty") / "store")


@pytest.fixture
def aged(empty: Path, make_server: Callable[[], Server]) -> Iterator[Aged]:
    aged = Aged(copy_archive(empty, make_server))
    yield aged
    aged.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("archive") / "store"
    make_archive(home, STUDIES)
    return home


# --- the whole way, and a second opinion


def test_a_plan_is_done_exactly_and_an_independent_check_agrees_on_every_study(
    made: Path, make_server: Callable[[], Server], day: Day
) -> None:
    server = copy_archive(made, make_server)
    server.set("retention", grace="P30D", most_studies=STUDIES, most_percent=100)
    rules = [
        {"name": "adults", "patients": "adult", "keep": "P5Y"},
        {"name": "minors", "patients": "minor", "keep": "P5Y", "until_age": "P28Y"},
        {"name": "mammography", "modalities": ["MG"], "keep": "P9Y"},
        {"name": "cathlab", "ae_titles": ["CATHLAB"], "keep": "P30Y"},
    ]
    with server.config.open("a") as file:
        for rule in rules:
            file.write("\n[[retention.rules]]\n" + "".join(f"{k} = {v!r}\n" for k, v in rule.items()))
    studies = [json.loads(line) for line in (made.parent / "list").read_text().splitlines()]
    chance = random.Random(1)
    held = {s["study"] for s in chance.sample(studies, 25)}, {(s["patient_id"], "") for s in chance.sample(studies, 15)}
    aged = Aged.__new__(Aged)
    super(Aged, aged).__init__(server)
    try:
        for uid in sorted(held[0]):
            Holding(aged.vault).place(1000, on(uid))
        for patient_id, issuer in sorted(held[1]):
            Holding(aged.vault).place(1000, on(patient_id=patient_id, issuer=issuer))
        settings = {"minor_age": "P18Y", "rules": rules}
        seen: set[str] = set()
        for text in ("2020-12-31", "2024-02-29", "2026-01-31", "2030-06-30", "2060-01-01"):
            when = tuple(map(int, text.split("-")))
            expected = {one["study"]: second_opinion(one, settings, held, when) for one in studies}
            assert {uid: becomes for uid, (becomes, _) in aged.plan(text).items()} == expected, text
            seen |= set(expected.values())
        assert seen == {"kept", "due", "held"}
        day.set("2026-01-31")
        plan = aged.plan()
        due = {uid for uid, said in plan.items() if said == ("due", "marked")}
        assert len(due) > 20
        assert aged.totals()["marks"] == len(due)
        aged.run()
        assert (aged.pending(), aged.certificates()) == (due, 0)
        assert {uid for uid, said in aged.plan().items() if said == ("due", "waits")} == due
        # The time of grace is over for these; what is due by now besides is marked, and not erased.
        day.set("2026-03-03")
        plan = aged.plan()
        assert {uid for uid, said in plan.items() if said == ("due", "erased")} == due
        later = {uid for uid, said in plan.items() if said == ("due", "marked")}
        totals = aged.totals()
        assert (totals["erases"], totals["marks"], totals["waits"]) == (len(due), len(later), 0)
        before = aged.held_studies()
        free = sum(path.stat().st_size for path in (aged.config.store_path / "objects").rglob("*") if path.is_file())
        aged.run()
        assert aged.held_studies() == before - due
        assert (aged.pending(), aged.certificates()) == (later, len(due))
        left = sum(path.stat().st_size for path in (aged.config.store_path / "objects").rglob("*") if path.is_file())
        planned = sum(one["bytes"] for one in _listed(aged, day.today, later))
        assert free - left == totals["due_space"] - planned
        found = list(verify(aged.vault.unlocked(), rate=0))
        assert [e for e in found if e["kind"] == "finding"] == []
        assert found[-1]["packs"] == STUDIES - len(due)
        # What is erased is named by nothing but the audit chain.
        rows = str(aged.vault.unlocked().ledger._db.execute("SELECT content FROM record").fetchall())
        assert not [uid for uid in due if uid in rows]
    finally:
        aged.close()


def _listed(aged: Aged, today: date, studies: set[str]) -> list[dict[str, Any]]:
    return [e for e in aged.retain.plan(today) if e["kind"] == "study" and e["study"] in studies]


def second_opinion(one: dict[str, Any], settings: dict[str, Any], held: Any, when: Any) -> str:
    # Its series and instances have all the same modality, sender and time.
    alike = retention_check.Instance("", one["modality"], "", one["calling"], one["received_at"], "held", False, False)
    study = retention_check.Study(
        one["study"], one["study_date"], one["birth_date"], one["patient_id"], "", [alike] * one["instances"]
    )
    return retention_check.verdict(study, settings, held, when)


def test_the_command_line_plans_marks_lists_takes_back_and_asks_for_confirmation(
    made: Path, make_server: Callable[[], Server]
) -> None:
    server = copy_archive(made, make_server)
    assert server.run("retention", "run").status == 1
    assert server.run("retention", "plan").status == 5
    with server.config.open("a") as file:
        file.write('\n[[retention.rules]]\nname = "all"\nkeep = "P9Y"\n')
    server.start("vault")
    done = server.run("retention", "plan")
    assert done.status == 0, done.err
    assert re.search(
        r"on 20\d\d-\d\d-\d\d of 250 studies: \d+ studies due: .*, \d+ kept by a rule, 0 by none", done.out
    )
    assert "a run now marks" in done.out
    assert "brake: " in done.err
    plan = server.ok("retention", "plan", "--json").json()
    due = {one["study"] for one in plan["studies"] if one["becomes"] == "due"}
    assert {one["run"] for one in plan["studies"]} == {"marked"}
    assert len(due) == plan["totals"]["due"] == plan["totals"]["marks"] > 10
    assert all("rule 'all' keeps it until 20" in one["reasons"][0] for one in plan["studies"])
    refused = server.run("retention", "run")
    assert (refused.status, "nothing is erased" in refused.err, "--confirm" in refused.err) == (1, True, True)
    assert server.run("retention", "pending").status == 5
    assert "newly pending erasure" in server.ok("retention", "run", "--confirm").out
    pending = server.ok("retention", "pending", "--json").json()["items"]
    assert {one["study"] for one in pending} == due
    one = min(due)
    server.ok("retention", "take-back", "--study", one, "--until", "2100-01-01", "--reason", "a second opinion")
    assert "2100-01-01" in server.ok("retention", "pending").out
    again = {s["study"]: s for s in server.ok("retention", "plan", "--json").json()["studies"]}
    assert (again[one]["run"], again[one]["kept_until"]) == ("taken back", "2100-01-01")
    assert {s["run"] for uid, s in again.items() if uid != one} == {"waits"}
    assert server.run("retention", "take-back", "--study", "1.2.3", "--reason", "x").status == 5
    assert server.run("retention", "take-back", "--study", one, "--reason", " ").status == 1
    assert server.run("retention", "plan", "--on", "yesterday").status == 2
    # Nothing is erased on the day on which it was marked, however often one runs.
    assert "erased 0 studies" in server.ok("retention", "run", "--confirm").out
    assert server.run("certificate", "list").status == 5
    early = server.run("retention", "plan", "--on", "2009-01-01", "--all", "--json")
    assert (early.status, len(early.json()["studies"])) == (5, STUDIES)
    types = [json.loads(line)["type"] for line in server.ok("audit", "show", "--json").out.splitlines()]
    assert {"retention-planned", "retention-run", "erasure-taken-back"} <= set(types)
    server.ok("lock")
    for verb in ("plan", "run", "pending"):
        assert server.run("retention", verb).status == 4, verb


# --- grace and taking back


def test_a_study_is_erased_after_its_grace_and_not_a_day_earlier(aged: Aged, day: Day) -> None:
    pack = aged.receive(A)
    aged.receive(B, received="2020-01-01")
    aged.admit()
    assert aged.plan() == {A: ("due", "marked"), B: ("kept", "")}
    assert aged.said() == "1 study due, 1 of them newly pending erasure; erased 0 studies"
    [pending] = aged.retain.pending()
    assert (pending.rule, pending.due, pending.from_day) == ("ten years", "2025-06-16", "2026-03-12")
    day.set("2026-03-11")
    assert aged.plan()[A] == ("due", "waits")
    assert aged.said() == "1 study due, 0 of them newly pending erasure; erased 0 studies"
    aged.holds(A, 1)
    day.set("2026-03-12")
    assert aged.plan()[A] == ("due", "erased")
    assert aged.said() == "1 study due, 0 of them newly pending erasure; erased 1 study"
    aged.is_gone(A, pack)
    aged.holds(B, 1)
    [erasure] = aged.erasures()
    assert (erasure.reason, aged.certificate(erasure)["state"]) == ("retention: ten years", "pending")
    assert aged.retain.pending() == []
    assert aged.said() == "0 studies due, 0 of them newly pending erasure; erased 0 studies"


def test_what_is_taken_back_is_not_marked_before_its_day_and_then_gets_all_its_grace_again(
    aged: Aged, day: Day
) -> None:
    aged.receive(A)
    aged.admit()
    aged.run()
    aged.retain.take_back(1001, A, date(2026, 6, 1), "a second opinion")
    for text in ("2026-03-12", "2026-05-31"):
        day.set(text)
        assert aged.plan()[A] == ("due", "taken back")
        assert aged.totals()["taken_back"] == 1
        assert aged.said() == "1 study due, 0 of them newly pending erasure; erased 0 studies"
    day.set("2026-06-01")
    assert aged.plan()[A] == ("due", "marked")
    assert "1 of them newly" in aged.said()
    day.set("2026-06-11")
    assert "erased 0" in aged.said()
    day.set("2026-06-12")
    assert "erased 1" in aged.said()
    types = [r for r in aged.vault.auditor.read(0) if r["type"] == "erasure-taken-back"]
    assert [(r["study"], r["until"], r["reason"]) for r in types] == [(A, "2026-06-01", "a second opinion")]


def test_what_is_taken_back_or_held_while_a_run_goes_on_is_not_erased_by_it(aged: Aged, day: Day) -> None:
    for study in (A, B, C):
        aged.receive(study)
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    run = aged.retain.run(1000)
    for event in run:
        if (event["kind"], event.get("total")) == ("progress", 3):
            break
    # The list of what is to go was read.
    aged.retain.take_back(1001, B, date(2027, 1, 1), "a second opinion")
    Holding(aged.vault).place(1001, on(C))
    said = [event["text"] for event in run if event["kind"] == "step"]
    assert said == ["erased 1 study", "2 pending studies held, blocked or no longer due: not erased"]
    assert aged.held_studies() == {B, C}


def test_a_study_that_gets_new_instances_in_its_time_of_grace_is_not_erased(aged: Aged, day: Day) -> None:
    aged.receive(A)
    aged.receive(B)
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    # One is admitted, one only acknowledged: of neither the vault was told.
    aged.receive(A, 2, received="2026-03-05")
    aged.close_packs()
    aged.receive(B, 2, received="2026-03-05")
    assert "2 pending studies held, blocked or no longer due" in aged.said()
    aged.close_packs()
    assert "erased 0" in aged.said()
    assert (aged.pending(), aged.certificates()) == (set(), 0)
    for study in (A, B):
        aged.holds(study, 1)
        aged.holds(study, 2)


def test_what_came_in_the_time_of_grace_and_is_due_by_its_end_gets_a_grace_of_its_own(aged: Aged, day: Day) -> None:
    aged.receive(A, received="2016-02-20")
    aged.admit()
    aged.run()
    aged.receive(A, 2, received="2016-03-05")
    aged.admit()
    day.set("2026-03-20")
    assert aged.plan()[A] == ("due", "marked")
    assert aged.said() == "1 study due, 1 of them newly pending erasure; erased 0 studies"
    day.set("2026-03-31")
    assert "erased 1" in aged.said()


def test_a_rule_that_keeps_longer_takes_a_study_off_the_list(aged: Aged, day: Day) -> None:
    aged.receive(A)
    aged.admit()
    aged.run()
    aged.config.settings.retention.rules = [Rule(name="twenty years", keep="P20Y")]
    day.set("2026-04-01")
    assert "1 pending study held, blocked or no longer due" in aged.said()
    assert aged.pending() == set()


def test_a_study_with_something_undecided_is_not_erased(aged: Aged, day: Day) -> None:
    aged.receive(A)
    aged.admit()
    aged.run()
    aged.receive(A, content=b"a contradiction", received="2015-06-15")
    aged.admit()
    day.set("2026-04-01")
    assert aged.plan()[A] == ("blocked", "")
    assert "1 pending study held" in aged.said()
    [item] = items(aged.vault.unlocked().archive, aged.vault.unlocked().index)
    assert item["study"] == A


def test_what_is_erased_by_hand_in_its_grace_leaves_the_list_and_what_is_sent_again_is_new(
    aged: Aged, day: Day
) -> None:
    for study in (A, B):
        aged.receive(study)
    aged.admit()
    aged.run()
    for study in (A, B):
        aged.erase(study)
    aged.receive(B, received="2026-03-01")
    aged.admit()
    day.set("2026-04-01")
    aged.run()
    assert aged.retain.pending() == []
    aged.holds(B, 1)
    assert aged.certificates() == 2


# --- brakes


def test_a_run_that_takes_too_much_marks_nothing_until_it_is_confirmed(aged: Aged, day: Day) -> None:
    for number in range(4):
        aged.receive(f"1.2.3.{number}")
    aged.receive("1.2.3.9", received="2026-01-01")
    aged.admit()
    settings = aged.config.settings.retention
    for most, percent, text in ((3, 100, "most_studies = 3"), (100, 79, "most_percent = 79")):
        settings.most_studies, settings.most_percent = most, percent
        assert text in " ".join(aged.totals()["brakes"])
        with pytest.raises(StrongroomError, match=f"4 of 5 studies would go, more than retention.{text}") as stopped:
            aged.run()
        assert "--confirm" in stopped.value.hint
        assert aged.pending() == set()
    aged.run(confirm=True)
    assert len(aged.pending()) == 4
    # They wait: a run that has nothing to do is stopped by nothing. When they go, they count again.
    assert aged.totals()["brakes"] == []
    aged.run()
    day.set("2026-04-01")
    with pytest.raises(StrongroomError, match="4 of 5 studies would go"):
        aged.run()
    assert aged.certificates() == 0
    aged.run(confirm=True)
    assert aged.certificates() == 4
    assert aged.held_studies() == {"1.2.3.9"}


def test_what_waits_does_not_count_again_each_day(aged: Aged, day: Day) -> None:
    aged.config.settings.retention.most_studies = 2
    for number in range(5):
        aged.receive(f"1.2.3.{number}", received=f"2016-03-0{number + 1}")
    aged.admit()
    for number in range(5):
        day.set(f"2026-03-0{number + 2}")
        assert "1 of them newly" in aged.said()
    assert len(aged.pending()) == 5


@pytest.mark.parametrize("synchronised", [False, None])
def test_a_clock_that_is_not_known_to_be_synchronised_suspends_erasure(
    aged: Aged, day: Day, synchronised: bool | None
) -> None:
    aged.receive(A)
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    day.synchronised = synchronised
    with pytest.raises(StrongroomError, match="synchronised"):
        aged.run()
    aged.holds(A, 1)
    assert "erased 1" in aged.said(confirm=True)


@pytest.mark.parametrize(("days", "text"), [(3, "went back"), (-3, "went ahead")])
def test_a_clock_that_jumped_suspends_erasure_until_it_is_confirmed(aged: Aged, day: Day, days: int, text: str) -> None:
    aged.receive(A)
    aged.admit()
    # A run keeps what the clock said.
    aged.run()
    seen = aged.vault.unlocked().ledger.records("clock", retain._Seen)
    kept = seen.get("seen")
    assert kept is not None
    assert abs(datetime.now(UTC) - clock.parse(kept.at)) < timedelta(days=1)
    kept.at = clock.text(datetime.now(UTC) + timedelta(days=days))
    seen.put("seen", kept)
    day.set("2026-04-01")
    for _ in range(2):
        aged.retain.look_at_clock()
        with pytest.raises(StrongroomError, match=text):
            aged.run()
    aged.holds(A, 1)
    assert "erased 1" in aged.said(confirm=True)
    aged.run()


def test_after_a_restart_of_the_machine_a_clock_that_went_on_is_believed(aged: Aged, day: Day) -> None:
    seen = retain._Seen(clock.text(datetime.now(UTC) - timedelta(days=40)), time.monotonic(), "another boot")
    aged.vault.unlocked().ledger.records("clock", retain._Seen).put("seen", seen)
    aged.retain.look_at_clock()
    kept = aged.vault.unlocked().ledger.records("clock", retain._Seen).get("seen")
    assert kept is not None
    assert kept.boot != "another boot"
    aged.run()


def test_without_a_rule_nothing_is_due_and_nothing_runs(aged: Aged, day: Day) -> None:
    aged.config.settings.retention.rules = []
    aged.receive(A)
    aged.admit()
    assert aged.plan() == {A: ("no rule", "")}
    with pytest.raises(StrongroomError, match="there is no rule"):
        aged.run(confirm=True)


def test_with_a_damaged_ledger_nothing_is_erased(aged: Aged, day: Day) -> None:
    for number in range(60):
        aged.receive(f"1.2.3.{number}")
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    before = aged.files(), aged.records()
    aged.vault.lock()
    aged.vault.auditor.close()
    path = aged.config.ledger(1)
    whole = path.read_bytes()
    refused = 0
    for page in range(1, len(whole) // 4096):
        damaged = bytearray(whole)
        damaged[page * 4096 + 2000] ^= 1
        path.write_bytes(damaged)
        aged.vault = Vault(aged.config)
        with pytest.raises((DatabaseError, StrongroomError)):
            aged.vault.unlock(slots.read_key_file(aged.server.home / "store.key"))
            # What was read so far is good: nothing but the run looks at the whole of it.
            aged.run(confirm=True)
        refused += 1
        aged.vault.lock()
        aged.vault.auditor.close()
    assert refused == len(whole) // 4096 - 1 > 10
    path.write_bytes(whole)
    aged.vault = aged._vault()
    assert (aged.files(), aged.records()) == before
    assert "erased 60" in aged.said()


def test_what_cannot_be_recorded_is_not_marked_or_erased(aged: Aged, day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    aged.receive(A)
    aged.admit()

    def full(*_: Any, **__: Any) -> None:
        raise StrongroomError("this cannot be recorded")

    for text in ("2026-03-01", "2026-04-01"):
        day.set(text)
        with monkeypatch.context() as patched:
            patched.setattr(aged.vault.auditor, "record", full)
            with pytest.raises(StrongroomError, match="recorded"):
                aged.run()
        aged.holds(A, 1)
        if text == "2026-03-01":
            assert aged.pending() == set()
            aged.run()


def test_a_run_that_ends_in_the_middle_is_finished_by_the_next(aged: Aged, day: Day) -> None:
    for study in (A, B, C):
        aged.receive(study)
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    run = aged.retain.run(1000)
    while aged.certificates() < 1:
        next(run)
        if any(not e.erased for e in aged.erasures()):
            break
    run.close()
    aged.died()
    aged.vault.unlocked().ring.body.versions[0].created = "2010-01-01T00:00:00Z"
    Erase(aged.vault).resume()
    aged.run()
    assert (aged.held_studies(), aged.certificates(), aged.retain.pending()) == (set(), 3, [])


# --- sent again


def test_an_erased_study_that_comes_again_is_a_new_one_and_its_erasure_another(aged: Aged, day: Day) -> None:
    aged.receive(A)
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    aged.run()
    assert aged.certificates() == 1
    aged.receive(A, received="2016-04-01", content=b"others", patient="Q")
    aged.admit()
    aged.holds(A, 1, b"others")
    assert aged.plan()[A] == ("kept", "")
    day.set("2026-04-02")
    aged.run()
    day.set("2026-05-01")
    aged.run()
    aged.is_gone(A)
    assert aged.certificates() == 2
    assert len({e.id for e in aged.erasures()}) == 2


def test_where_somebody_is_to_decide_all_of_an_erased_study_waits_until_one_is_accepted(
    make_server: Callable[[], Server], day: Day
) -> None:
    server = make_server()
    server.init()
    server.set("retention", resent=QUARANTINE)
    aged = Aged(server)
    try:
        for n in (1, 2):
            aged.receive(A, n)
        aged.receive(B)
        aged.admit()
        aged.erase(A)
        # While its pack is open it is looked at again and again.
        for n in (1, 2, 3):
            aged.receive(A, n)
            aged.vault.admit()
        aged.receive(C)
        aged.admit()
        waits = [(f"{A}.{n}", "quarantined") for n in (1, 2, 3)]
        assert aged.states(A) == waits
        assert aged.states(C) == [(f"{C}.1", "held")]
        assert aged.plan()[A][0] in {"blocked", "no rule"}
        open_ = aged.vault.unlocked()
        found = items(open_.archive, open_.index)
        assert {item["reason"] for item in found} == {
            "its study was erased before, and retention.resent wants a decision"
        }
        refill(open_.admission)
        assert aged.states(A) == waits
        chosen = next(item for item in found if item["sop"] == f"{A}.2")
        decide(aged, chosen, "accept")
        aged.holds(A, 2)
        # The rest of it is admitted when it comes; what waits needs its own decision, or comes again.
        for n in (1, 4):
            aged.receive(A, n)
        aged.admit()
        held = {f"{A}.{n}" for n in (1, 2, 4)}
        assert {uid for uid, state in aged.states(A) if state == "held"} == held
        states = aged.states(A)
        refill(open_.admission)
        assert aged.states(A) == states
        # Erased again: it waits again.
        for item in items(open_.archive, open_.index):
            decide(aged, item, "discard")
        aged.erase(A)
        aged.is_gone(A)
        aged.receive(A)
        aged.admit()
        assert aged.states(A) == [(f"{A}.1", "quarantined")]
        assert aged.certificates() == 2
    finally:
        aged.close()


def test_memory_does_not_grow_with_what_is_due(aged: Aged, day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain, "_BATCH", 3)
    aged.config.settings.retention.most_studies = 100
    most = 0
    whole = retain.Retain._keep

    def keep(self: Retain, marks: list[Any], on: date) -> int:
        nonlocal most
        most = max(most, len(marks))
        return whole(self, marks, on)

    monkeypatch.setattr(retain.Retain, "_keep", keep)
    for number in range(20):
        aged.receive(f"1.2.3.{number}")
    aged.admit()
    aged.run()
    assert (len(aged.pending()), most) == (20, 3)
    day.set("2026-04-01")
    assert "erased 20" in aged.said()


def test_the_ledger_keeps_what_is_pending_over_a_rotation(aged: Aged, day: Day) -> None:
    from test_rotate import rotate

    aged.receive(A)
    aged.receive(B)
    aged.admit()
    aged.run()
    Holding(aged.vault).place(1000, on(B))
    rotate(aged.vault, waived={"export": "a test", "backup": "a test"})
    assert aged.vault.unlocked().database_version == 2
    assert aged.pending() == {A, B}
    day.set("2026-04-01")
    aged.run()
    assert aged.held_studies() == {B}
    assert isinstance(aged.vault.unlocked().ledger, Ledger)
    assert load(aged.server.config).settings.retention.rules == []
