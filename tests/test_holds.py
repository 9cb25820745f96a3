"""Holds win over every way of deleting, whoever asks; they survive a ledger that was rolled back; and acts of two."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from aged import Aged, Day, copy_archive, decide, make_empty, on
from conftest import Finished, Server, refill, send
from pydicom.data import get_testdata_file
from test_reencrypt import reencrypt
from test_rotate import rotate

from storage.retentionrules import QUARANTINE
from storescp import control
from storescp.errors import StrongroomError
from storescp.vault.api.audit import Audit
from storescp.vault.api.quarantine import items
from storescp.vault.approvals import ERASE, RELEASE, Approvals
from storescp.vault.holding import Hold, Holding
from storescp.vault.reencrypt import Scope

A, B, C = "1.2.3.1", "1.2.3.2", "1.2.3.3"
CT = Path(str(get_testdata_file("CT_small.dcm")))
STUDY = str(pydicom.dcmread(CT).StudyInstanceUID)
HOLDS = [{"study": A}, {"patient_id": "P"}, {"patient_id": " P "}, {"patient_id": "P", "issuer": "H1"}]
OTHERS = [{"study": B}, {"patient_id": "PP"}, {"patient_id": "p"}, {"patient_id": "P", "issuer": "H2"}]


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


def place(aged: Aged, **given: str) -> Hold:
    return Holding(aged.vault).place(1000, on(**given))


def in_quarantine(aged: Aged) -> list[dict[str, Any]]:
    open_ = aged.vault.unlocked()
    return items(open_.archive, open_.index)


def told(aged: Aged, *types: str) -> list[dict[str, Any]]:
    return [record for record in aged.vault.auditor.read(0) if record["type"] in types]


def forget(aged: Aged, *ids: str) -> None:
    """Take holds out of the ledger, as whoever puts an older page back does."""
    for hold_id in ids:
        aged.vault.unlocked().ledger._db.execute("DELETE FROM record WHERE kind = 'hold' AND id = ?", [hold_id])


# --- what is held


@pytest.mark.parametrize("given", HOLDS)
def test_a_hold_wins_over_retention_over_erase_and_over_discarding(aged: Aged, day: Day, given: dict[str, str]) -> None:
    aged.receive(A, issuer="H1")
    aged.admit()
    aged.run()
    aged.receive(A, issuer="H1", content=b"a contradiction")
    aged.admit()
    hold = place(aged, **given)
    [item] = in_quarantine(aged)
    with pytest.raises(StrongroomError, match=r"of a study under a hold on the .*: nobody discards it"):
        decide(aged, item, "discard")
    with pytest.raises(StrongroomError, match=r"is under a hold on the .*: nobody erases it"):
        aged.erase(A)
    day.set("2026-04-01")
    assert "1 pending study held" in aged.said(confirm=True)
    assert aged.plan()[A] == ("held", "")
    assert (aged.erasures(), len(aged.states(A)), aged.certificates()) == ([], 2, 0)
    assert aged.totals()["held_space"] > 0
    # Its state is somebody's to decide; that deletes nothing.
    decide(aged, item, "accept")
    assert len(aged.states(A)) == 2
    Holding(aged.vault).release(1000, hold.id, "case closed")
    assert "erased 1 study" in aged.said()


@pytest.mark.parametrize("given", OTHERS)
def test_a_hold_on_another_study_patient_or_issuer_hinders_nothing(aged: Aged, day: Day, given: dict[str, str]) -> None:
    aged.receive(A, issuer="H1")
    aged.admit()
    place(aged, **given)
    aged.erase(A)
    assert aged.certificates() == 1


def test_a_study_without_issuer_is_under_a_hold_on_its_patient_at_any_issuer(aged: Aged) -> None:
    aged.receive(A)
    aged.admit()
    place(aged, patient_id="P", issuer="H1")
    with pytest.raises(StrongroomError, match="a hold on the patient"):
        aged.erase(A)


def test_a_hold_on_the_patient_of_an_instance_in_quarantine_counts_too(aged: Aged) -> None:
    aged.receive(A, 1)
    aged.admit()
    aged.receive(A, 2, patient="Q")
    aged.admit()
    [item] = in_quarantine(aged)
    assert "another patient" in item["reason"]
    hold = place(aged, patient_id="Q")
    with pytest.raises(StrongroomError, match="a hold on the patient"):
        decide(aged, item, "discard")
    with pytest.raises(StrongroomError, match="a hold on the patient"):
        aged.erase(A)
    Holding(aged.vault).release(1000, hold.id, "case closed")
    decide(aged, item, "discard")
    assert aged.states(A) == [(f"{A}.1", "held")]


def test_a_hold_on_the_patient_of_an_instance_that_was_accepted_counts_and_the_run_goes_on(
    aged: Aged, day: Day
) -> None:
    aged.receive(A, 1)
    aged.receive(B)
    aged.admit()
    aged.receive(A, 2, patient="Q")
    aged.admit()
    [item] = in_quarantine(aged)
    decide(aged, item, "accept")
    aged.run()
    place(aged, patient_id="Q")
    day.set("2026-04-01")
    assert aged.said() == (
        "2 studies due, 0 of them newly pending erasure; erased 1 study; "
        "1 pending study held, blocked or no longer due: not erased"
    )
    assert aged.held_studies() == {A}


@pytest.mark.parametrize("apart", [False, True])
def test_a_hold_on_a_patient_finds_a_study_whose_first_instance_names_none(aged: Aged, day: Day, apart: bool) -> None:
    aged.receive(A, 1, patient="")
    if apart:
        aged.admit()
    aged.receive(A, 2, issuer="H1")
    aged.admit()
    for _ in range(2):
        assert aged.vault.unlocked().index.patient_of(A) == ("P", "H1")
        refill(aged.vault.unlocked().admission)
    place(aged, patient_id="P", issuer="H1")
    assert aged.plan()[A] == ("held", "")
    with pytest.raises(StrongroomError, match="a hold on the patient"):
        aged.erase(A)


def test_a_hold_on_a_patient_counts_where_all_of_a_study_is_in_quarantine(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.set("retention", resent=QUARANTINE)
    aged = Aged(server)
    try:
        aged.receive(A)
        aged.admit()
        aged.erase(A)
        aged.receive(A)
        aged.admit()
        [item] = in_quarantine(aged)
        place(aged, patient_id="P")
        for act in (lambda: decide(aged, item, "discard"), lambda: aged.erase(A)):
            with pytest.raises(StrongroomError, match="a hold on the patient"):
                act()
        assert aged.states(A) == [(f"{A}.1", "quarantined")]
    finally:
        aged.close()


def test_a_hold_can_come_before_its_study_and_between_plan_and_run(aged: Aged, day: Day) -> None:
    place(aged, study=A)
    for study in (A, B, C):
        aged.receive(study)
    aged.admit()
    assert aged.plan() == {A: ("held", ""), B: ("due", "marked"), C: ("due", "marked")}
    place(aged, study=B)
    aged.run()
    assert aged.pending() == {C}
    # Between pending and erasure.
    place(aged, study=C)
    day.set("2026-04-01")
    assert "1 pending study held" in aged.said()
    assert aged.held_studies() == {A, B, C}
    assert aged.pending() == {C}


def test_rotation_and_re_encryption_delete_nothing_and_go_on_under_a_hold(aged: Aged) -> None:
    aged.receive(A)
    aged.admit()
    place(aged, study=A)
    before = aged.records()
    reencrypt(aged, Scope(everything=True))
    assert aged.records() != before
    rotate(aged.vault, waived={"export": "a test", "backup": "a test"})
    aged.holds(A, 1)
    with pytest.raises(StrongroomError, match="a hold on the study"):
        aged.erase(A)


def test_a_hold_on_what_is_being_erased_comes_too_late_and_says_so(aged: Aged, monkeypatch: pytest.MonkeyPatch) -> None:
    from storescp.vault import erase

    monkeypatch.setattr(erase, "_FENCE_SECONDS", 0.0)
    aged.receive(A)
    with pytest.raises(StrongroomError, match="not done yet"):
        aged.erase(A)
    with pytest.raises(StrongroomError, match="is being erased: nothing of it is left to hold"):
        place(aged, study=A)


@pytest.mark.parametrize("given", [{}, {"study": A, "patient_id": "P"}, {"patient_id": "  "}])
def test_a_hold_is_on_one_thing(aged: Aged, given: dict[str, str]) -> None:
    with pytest.raises(StrongroomError, match="a study or on a patient"):
        place(aged, **given)
    assert Holding(aged.vault).listed() == []
    assert told(aged, "hold-placed") == []


def test_holds_need_reasons_and_releases_too_and_both_are_recorded(aged: Aged) -> None:
    with pytest.raises(StrongroomError, match="reason"):
        Holding(aged.vault).place(1000, Hold("", " ", "", 0, "", A))
    hold = place(aged, study=A)
    with pytest.raises(StrongroomError, match="reason"):
        Holding(aged.vault).release(1001, hold.id, "")
    Holding(aged.vault).release(1001, hold.id, "case closed")
    for hold_id in (hold.id, "0" * 12):
        with pytest.raises(StrongroomError, match="there is no hold"):
            Holding(aged.vault).release(1001, hold_id, "again")
    assert Holding(aged.vault).listed() == []
    [listed] = Holding(aged.vault).listed(released=True)
    assert (listed.reference, listed.uid, listed.released_by, listed.release_reason) == (
        "12 O 34/26", 1000, 1001, "case closed",
    )  # fmt: skip
    placed, released = told(aged, "hold-placed", "hold-released")
    assert (placed["hold"]["study"], placed["uid"], released["id"], released["uid"]) == (A, 1000, hold.id, 1001)


# --- against the audit chain


def test_holds_that_the_ledger_lost_are_put_back_and_released_ones_stay_released(aged: Aged, day: Day) -> None:
    first, second, third = (place(aged, study=study) for study in (A, B, C))
    Holding(aged.vault).release(1000, second.id, "case closed")
    for study in (A, B, C):
        aged.receive(study)
    aged.admit()
    for reconciled in (False, True):
        if reconciled:
            assert Holding(aged.vault).reconcile() == 0
        forget(aged, first.id, second.id)
        day.set("2026-03-01" if not reconciled else "2026-04-01")
        aged.run()
        assert {hold.id for hold in Holding(aged.vault).listed()} == {first.id, third.id}
    assert aged.held_studies() == {A, C}
    assert [record["ids"] for record in told(aged, "holds-put-back")] == [[first.id]] * 2


def test_a_hold_that_was_rolled_back_to_active_or_lost_with_what_was_reconciled_is_as_the_chain_says(
    aged: Aged,
) -> None:
    first, second = place(aged, study=A), place(aged, study=B)
    ledger = aged.vault.unlocked().ledger._db
    Holding(aged.vault).reconcile()
    before = ledger.execute("SELECT kind, id, state, content FROM record").fetchall()
    Holding(aged.vault).release(1000, first.id, "case closed")
    third = place(aged, study=C)
    assert Holding(aged.vault).reconcile() == 0
    # The ledger of before, as a whole.
    ledger.execute("DELETE FROM record")
    ledger.conn.executemany("INSERT INTO record (kind, id, state, content) VALUES (?, ?, ?, ?)", before)
    assert Holding(aged.vault).reconcile() == 1
    assert {hold.id for hold in Holding(aged.vault).listed()} == {second.id, third.id}
    assert Holding(aged.vault).reconcile() == 0


@pytest.mark.parametrize("when", ["at once", "later", "without being told"])
def test_after_the_chain_was_begun_anew_no_hold_is_lost(aged: Aged, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (place(aged, study=study) for study in (A, B, C))
    Holding(aged.vault).release(1000, second.id, "case closed")
    Holding(aged.vault).reconcile()
    if when == "without being told":
        # As a crash between the two leaves it, or a vault that was locked.
        monkeypatch.setattr(Holding, "tell_again", lambda _: 1)
    Audit(aged.vault)._audit_restart(_request('{"reason": "a test"}'))
    monkeypatch.undo()
    if when == "later":
        assert Holding(aged.vault).reconcile() == 0
    fourth = place(aged, study="1.2.3.4")
    forget(aged, first.id, fourth.id)
    assert Holding(aged.vault).reconcile() == 2
    forget(aged, first.id)
    assert Holding(aged.vault).reconcile() == 1
    assert {hold.id for hold in Holding(aged.vault).listed()} == {first.id, third.id, fourth.id}
    assert Holding(aged.vault).reconcile() == 0


def test_with_a_broken_chain_nothing_is_erased_by_rules(aged: Aged, day: Day) -> None:
    aged.receive(A)
    aged.admit()
    place(aged, study=B)
    [chain] = (aged.config.store_path / "audit").glob("*.log")
    with chain.open("r+b") as file:
        file.seek(200)
        file.write(b"????")
    with pytest.raises(StrongroomError, match="cannot be compared with the audit chain") as stopped:
        aged.run(confirm=True)
    assert "audit verify" in stopped.value.hint
    assert aged.pending() == set()


def _request(body: str) -> Any:
    from storescp.control import Request

    return Request("POST", "", body.encode(), 1000)


# --- two people


def test_with_a_second_approver_an_erasure_and_a_release_wait_for_another_user(aged: Aged) -> None:
    aged.config.settings.retention.second_approver = True
    for study in (A, B):
        aged.receive(study)
    aged.admit()
    hold = place(aged, study=B)
    approvals = Approvals(aged.vault)
    for act, subject in ((ERASE, A), (RELEASE, hold.id)):
        for uid in (1000, 1001):
            # Whoever asks for the same again has not approved it by that.
            with pytest.raises(StrongroomError, match="waits for a second person: nothing was done yet") as waits:
                list(approvals.ask(uid, act, subject, "request 4711"))
            assert waits.value.status == 3
    erase, release = approvals.waiting()
    assert (erase.uid, erase.act, erase.subject, erase.reason) == (1000, ERASE, A, "request 4711")
    for request in (erase, release):
        with pytest.raises(StrongroomError, match="is your own"):
            list(approvals.approve(1000, request.id))
    assert aged.held_studies() == {A, B}
    assert len(Holding(aged.vault).listed()) == 1
    assert [e["kind"] for e in approvals.approve(1001, erase.id)][-1] == "certificate"
    list(approvals.approve(1001, release.id))
    assert (aged.held_studies(), Holding(aged.vault).listed(), approvals.waiting()) == ({B}, [], [])
    for request in (erase, release):
        with pytest.raises(StrongroomError, match="no request"):
            list(approvals.approve(1001, request.id))
    asked, approved = told(aged, "approval-asked")[0], told(aged, "approved")[0]
    assert (asked["uid"], approved["uid"], asked["request"], approved["request"]) == (1000, 1001, erase.id, erase.id)
    assert A not in str(aged.vault.unlocked().ledger._db.execute("SELECT content FROM record").fetchall())


def test_what_was_approved_is_still_refused_under_a_hold_and_can_be_withdrawn(aged: Aged) -> None:
    aged.config.settings.retention.second_approver = True
    aged.receive(A)
    aged.admit()
    approvals = Approvals(aged.vault)
    with contextlib.suppress(StrongroomError):
        list(approvals.ask(1000, ERASE, A, "x"))
    [request] = approvals.waiting()
    place(aged, study=A)
    with pytest.raises(StrongroomError, match="nobody erases it"):
        list(approvals.approve(1001, request.id))
    assert approvals.waiting() == [request]
    approvals.withdraw(1002, request.id)
    assert approvals.waiting() == []
    aged.holds(A, 1)


def test_retention_needs_no_second_person(aged: Aged, day: Day) -> None:
    aged.config.settings.retention.second_approver = True
    aged.receive(A)
    aged.admit()
    aged.run()
    day.set("2026-04-01")
    assert "erased 1 study" in aged.said()


@pytest.fixture
def group() -> Iterator[str]:
    """Make a group of the system, with one member: the user daemon."""
    name = f"strongroom-{secrets.token_hex(4)}"
    subprocess.run(["groupadd", name], check=True)
    try:
        subprocess.run(["gpasswd", "-a", "daemon", name], check=True, stdout=subprocess.DEVNULL)
        yield name
    finally:
        subprocess.run(["groupdel", name], check=True)


def as_user(server: Server, user: str, groups: list[str], *arguments: str) -> Finished:
    """Run a command as a user whose process has groups of the system."""
    command = [sys.executable, "-m", "storescp", "--config", str(server.config), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False,
        user=user, group=pwd.getpwnam(user).pw_gid, extra_groups=groups,
    )  # fmt: skip
    return Finished(done)


@pytest.mark.needs_root
@pytest.mark.needs("groupadd", "gpasswd", "groupdel")
def test_a_member_of_the_group_approves_others_are_refused_and_who_was_taken_out_is_out_at_once(group: str) -> None:
    # pytest's own folders are closed to other users.
    home = Path(tempfile.mkdtemp(prefix="strongroom-holds-"))
    home.chmod(0o755)
    server = Server(home / "s")
    try:
        server.home.mkdir(mode=0o755)
        server.init()
        server.add_peer("CT1")
        server.set("gate", pack_idle_seconds=1)
        server.set("retention", second_approver=True)
        server.set("control", group=group)
        server.home.chmod(0o755)
        server.config.chmod(0o644)
        server.start()
        assert send(server, [CT]) == [0]
        server.wait_admitted()
        asked = server.run("erase", "--study", STUDY, "--reason", "request 4711", "--yes")
        assert (asked.status, "waits for a second person" in asked.err) == (3, True)
        [request] = server.ok("approve", "--list", "--json").json()["items"]
        own = server.run("approve", request["id"])
        assert (own.status, "is your own" in own.err) == (1, True)
        # Without the group no other user comes to the socket; with it, as in a login that goes on, membership decides.
        for user, groups in (("nobody", []), ("daemon", []), ("nobody", [group])):
            assert as_user(server, user, groups, "approve", request["id"]).status == 1
        assert len(server.list()) == 1
        done = as_user(server, "daemon", [group], "approve", request["id"])
        assert (done.status, "erased; certificate" in done.out) == (0, True), done.err
        assert server.list() == []
        hold = as_user(server, "daemon", [group], "hold", "place", "--study", STUDY, "--reason", "court order")
        assert hold.status == 0, hold.err
        [listed] = server.ok("hold", "list", "--json").json()["items"]
        released = as_user(server, "daemon", [group], "hold", "release", listed["id"], "--reason", "x")
        assert released.status == 3, released.err
        subprocess.run(["gpasswd", "-d", "daemon", group], check=True, stdout=subprocess.DEVNULL)
        for words in (["hold", "list"], ["status"]):
            assert as_user(server, "daemon", [group], *words).status == 1
        assert any("refused" in line for line in server.log)
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()
        shutil.rmtree(home)


def test_who_is_taken_out_of_the_group_is_refused_on_a_connection_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = grp.getgrall()[-1]
    groups = [group.gr_gid]
    monkeypatch.setattr(control, "_peer_uid", lambda _: pwd.getpwnam("daemon").pw_uid)
    monkeypatch.setattr(os, "getgrouplist", lambda *_: groups)
    asked: list[str] = []

    def handle(request: control.Request) -> control.Response:
        asked.append(request.path)
        return control.json_response({"uid": request.uid})

    server = control.Server(handle, group.gr_name)
    here, there = socket.socketpair()
    serving = threading.Thread(target=server.serve, args=(there,))
    serving.start()
    client = control.Client(here)
    try:
        assert client.json("GET", "/first") == {"uid": pwd.getpwnam("daemon").pw_uid}
        groups.clear()
        with pytest.raises(StrongroomError, match="broke off"):
            client.json("GET", "/second")
    finally:
        client.close()
        serving.join(30)
    assert asked == ["/first"]


def test_the_command_line_places_lists_and_releases_holds(server: Server) -> None:
    assert send(server, [CT]) == [0]
    assert server.run("hold", "list").status == 5
    placed = server.ok("hold", "place", "--patient-id", "-", "--reason", "complaint", stdin=" 1CT1 \n")
    [hold] = server.ok("hold", "list", "--json").json()["items"]
    assert hold["id"] in placed.out
    assert (hold["patient_id"], hold["uid"]) == ("1CT1", os.geteuid())
    refused = server.run("erase", "--study", STUDY, "--reason", "x", "--yes")
    assert (refused.status, "a hold on the patient" in refused.err) == (1, True)
    assert "complaint" in server.ok("hold", "list").out
    for words in (["--reason", "x"], ["--study", "1.2", "--patient-id", "1", "--reason", "x"], ["--study", "1.2"]):
        assert server.run("hold", "place", *words).status == 2
    assert server.run("hold", "place", "--study", "a/b", "--reason", "x").status == 1
    assert server.run("hold", "release", "0" * 12, "--reason", "x").status == 5
    assert f"hold {hold['id']} is released" in server.ok("hold", "release", hold["id"], "--reason", "case closed").out
    assert server.run("hold", "list").status == 5
    assert json.loads(server.ok("hold", "list", "--released", "--json").out)["items"][0]["released"]
    assert server.run("approve", "--list").status == 5
    assert server.run("approve", "0" * 8).status == 5
    assert server.run("approve").status == 2
    server.ok("erase", "--study", STUDY, "--reason", "x", "--yes")
    server.ok("lock")
    for words in (["hold", "list"], ["hold", "place", "--study", "1.2", "--reason", "x"], ["approve", "--list"]):
        assert server.run(*words).status == 4
