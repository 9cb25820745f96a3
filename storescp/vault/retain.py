"""Retention at work: the plan, studies that are pending erasure for a time of grace, and their erasure.

A run marks what is due, and erases what was marked long enough ago and is still due: decided again, study by study,
right before. How far it is stands in the ledger, so that it can be stopped and goes on.
Source: docs/retention.md; the rules themselves are ``storage.retention``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec

from storage import retention
from storage.brakes import brake, clock_brake
from storage.ledger import Ledger
from storage.records import Records
from storage.retention import Kind, Outcome, Rules, Totals
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.errors import NOTHING, StrongroomError, plural
from storescp.synchronised import clock_is_synchronised
from storescp.vault import holding
from storescp.vault.erase import Erase
from storescp.vault.holding import Holding
from storescp.vault.opened import Open
from storescp.vault.state import Vault

PENDING, KEPT, ERASED = "pending", "kept", "erased"
_BATCH = 500
_PROGRESS = 50
_REASON = "retention: {}"

log = logging.getLogger(__name__)


class Pending(msgspec.Struct):
    """A study that is to be erased: since when it is listed, from which day on it may go; times are RFC 3339.

    ``kept_until``: somebody took it back, and it is not marked again before that day.
    """

    study: str
    rule: str
    due: str
    since: str
    from_day: str
    instances: int
    space: int
    kept_until: str = ""
    kept_by: int = -1
    kept_reason: str = ""
    erasure: str = ""


class _Seen(msgspec.Struct):
    """What the clock said, and what one said that nobody sets, in seconds, since which start of the machine."""

    at: str
    steady: float
    boot: str


class Retain:
    """Retention of a vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._settings = vault.config.settings.retention

    # --- the plan

    def plan(self, on: date | None = None, *, everything: bool = False) -> Iterator[dict[str, Any]]:
        """Yield what would become of studies on a day, and totals at the end; those that are kept only where wanted.

        Raises:
            StrongroomError: The vault is locked.
        """
        totals = Totals()
        for outcome in self._outcomes(on or today(), totals):
            if everything or outcome.verdict.kind not in {Kind.KEPT, Kind.NO_RULE}:
                yield {"kind": "study", **_said(outcome)}
        brakes = self._brakes(totals)
        yield {"kind": "totals", "on": str(on or today()), **msgspec.structs.asdict(totals), "brakes": brakes}

    def _outcomes(self, on: date, totals: Totals) -> Iterator[Outcome]:
        self._vault.unlocked()
        self._vault.admit()
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            holds, rules = holding.current(open_), self._rules(open_)
        with open_.reader() as reader:
            for outcome in retention.plan(reader.index.facts(), rules, holds, on, totals):
                if open_.closed:
                    raise StrongroomError("the vault was locked meanwhile", hint="unlock it, and begin again")
                yield outcome

    def _rules(self, open_: Open) -> Rules:
        # The first key version is as old as the store, also of one that was restored.
        made = min(record.created for record in open_.ring.body.versions)
        return Rules(self._settings, clock.parse(made).date())

    def _brakes(self, totals: Totals) -> list[str]:
        with self._vault.admitting():
            said = [self._clock(self._vault.unlocked().ledger), brake(totals.due, totals.studies, self._settings)]
        return [text for text in said if text]

    def _clock(self, ledger: Ledger) -> str:
        """Return why the clock cannot be trusted; empty if it can."""
        seen = ledger.records("clock", _Seen).get("seen")
        if seen is None:
            return clock_brake(datetime.now(UTC), None, clock_is_synchronised())
        elapsed = None
        if seen.boot == _boot():
            elapsed = timedelta(seconds=time.clock_gettime(time.CLOCK_BOOTTIME) - seen.steady)
        return clock_brake(datetime.now(UTC), clock.parse(seen.at), clock_is_synchronised(), elapsed)

    def look_at_clock(self) -> None:
        """Keep what the clock says, unless it may be wrong: once it is not believed, that stays until confirmed."""
        with self._vault.admitting():
            open_ = self._vault.opened
            if open_ is not None and not self._clock(open_.ledger):
                _see(open_.ledger)

    # --- a run

    def run(self, uid: int, *, confirm: bool = False) -> Iterator[dict[str, Any]]:
        """Mark what is due; erase what was marked long enough ago; yield what happens.

        Raises:
            StrongroomError: A brake is on, the ledger is damaged, or something cannot be recorded.
        """
        if not self._settings.rules:
            raise StrongroomError("there is no rule, so nothing is due", hint="[[retention.rules]], docs/retention.md")
        self._intact(uid)
        totals = Totals()
        due = 0
        marks: list[Pending] = []
        on = today()
        for outcome in self._outcomes(on, totals):
            if outcome.verdict.kind is Kind.DUE:
                due += 1
                marks.append(self._mark(outcome, on))
            if totals.studies % 1000 == 0:
                yield {"kind": "waiting", "text": f"looked at {totals.studies} studies"}
        self._brake(uid, totals, confirm=confirm)
        self._vault.auditor.record("retention-run", uid=uid, due=due, studies=totals.studies, confirmed=confirm)
        new = self._keep(marks)
        yield {"kind": "step", "text": f"{plural(due, 'study', 'studies')} due, {new} of them newly pending erasure"}
        yield from self.erase(uid, confirm=confirm)

    def _intact(self, uid: int) -> None:
        """Raise unless the ledger is whole and agrees with the audit chain about holds."""
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            try:
                if fault := open_.ledger.fault():
                    raise StrongroomError(f"the ledger is damaged: {fault}", hint="restore it from a backup")
            except DatabaseError as error:
                raise StrongroomError(f"the ledger cannot be read: {error}", hint="restore it from a backup") from error
        if put_back := Holding(self._vault).reconcile():
            log.error("retention: %d holds were missing in the ledger", put_back)

    def _brake(self, uid: int, totals: Totals, *, confirm: bool) -> None:
        if stops := self._brakes(totals):
            if not confirm:
                raise StrongroomError(
                    "nothing is erased: " + "; ".join(stops),
                    hint="'strongroom retention plan' shows what would go; --confirm says that it is meant",
                )
            log.warning("retention: confirmed by uid %d: %s", uid, "; ".join(stops))
            with self._vault.admitting():
                _see(self._vault.unlocked().ledger)

    def _mark(self, outcome: Outcome, on: date) -> Pending:
        ends = Rules(self._settings).grace_ends(on)
        return Pending(
            outcome.study.uid,
            outcome.verdict.rule,
            str(outcome.verdict.due),
            clock.now(),
            str(ends or date.max),
            outcome.study.instances,
            outcome.study.space,
        )

    def _keep(self, marks: list[Pending]) -> int:
        """Keep which studies are pending, some at a time; return how many are new."""
        new = 0
        for start in range(0, len(marks), _BATCH):
            with self._vault.admitting():
                known = _records(self._vault.unlocked())
                fresh = []
                for mark in marks[start : start + _BATCH]:
                    before = known.get(mark.study)
                    if before is None or before.erasure or (before.kept_until and before.kept_until < str(today())):
                        fresh.append((mark.study, mark, PENDING))
                known.put_all(fresh)
                new += len(fresh)
        return new

    def erase(self, uid: int, *, confirm: bool = False) -> Iterator[dict[str, Any]]:
        """Erase what is pending and whose time of grace is over, each with a certificate; yield what happens.

        Raises:
            StrongroomError: The clock cannot be trusted, the ledger is damaged, or something cannot be recorded.
        """
        self._intact(uid)
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            if (stop := self._clock(open_.ledger)) and not confirm:
                raise StrongroomError(
                    f"nothing is erased: {stop}", hint="'strongroom retention run --confirm' says that it is meant"
                )
            waiting = [p for p in _records(open_).all(PENDING) if p.from_day <= str(today())]
        done = left = 0
        for number, pending in enumerate(waiting):
            if number % _PROGRESS == 0:
                yield {"kind": "progress", "done": number, "total": len(waiting)}
            if self._erase(uid, pending):
                done += 1
            else:
                left += 1
        if done:
            with self._vault.admitting():
                self._vault.unlocked().index.forget()
        yield {"kind": "step", "text": f"erased {plural(done, 'study', 'studies')}"}
        if left:
            held = plural(left, "pending study", "pending studies")
            yield {"kind": "step", "text": f"{held} held, blocked or no longer due: not erased"}

    def _erase(self, uid: int, pending: Pending) -> bool:
        """Erase a study if it is due now; tell whether it was."""
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            erase = Erase(self._vault)
            before = erase.of_study(pending.study)
            if before is None or before.erased:
                facts = next(open_.index.facts(pending.study), None)
                if facts is None:
                    # It is gone, by this erasure or another.
                    _records(open_).put(pending.study, _erased(pending, before.id if before else "-"), ERASED)
                    return before is not None
                verdict = retention.assess(facts, self._rules(open_), holding.current(open_), today())
                if verdict.kind is not Kind.DUE or not open_.all_indexed(pending.study):
                    if verdict.kind in {Kind.KEPT, Kind.NO_RULE}:
                        _records(open_).remove(pending.study)
                    return False
        # Outside: what a gate still has open is waited for, and others get their turn.
        for event in erase.run(uid, pending.study, _REASON.format(pending.rule)):
            if event["kind"] == "certificate":
                with self._vault.admitting():
                    _records(self._vault.unlocked()).put(pending.study, _erased(pending, str(event["id"])), ERASED)
        return True

    # --- what is pending

    def pending(self) -> list[Pending]:
        """Return the studies that are pending erasure, and those that were taken back."""
        with self._vault.admitting():
            known = _records(self._vault.unlocked())
            return [*known.all(PENDING), *known.all(KEPT)]

    def take_back(self, uid: int, study: str, until: date, reason: str) -> Pending:
        """Take a study back from pending erasure: it is not marked again before a day.

        Raises:
            StrongroomError: It is not pending, or there is no reason.
        """
        if not reason.strip():
            raise StrongroomError("taking a study back needs a reason")
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            found = _records(open_).get(study)
            if found is None or found.erasure:
                raise StrongroomError(
                    f"study {study} is not pending erasure", hint="'strongroom retention pending'", status=NOTHING
                )
            self._vault.auditor.record("erasure-taken-back", uid=uid, study=study, until=str(until), reason=reason)
            found.kept_until, found.kept_by, found.kept_reason = str(until), uid, reason
            _records(open_).put(study, found, KEPT)
            return found


def today() -> date:
    """Return the day in UTC."""
    return datetime.now(UTC).date()


def _erased(pending: Pending, erasure: str) -> Pending:
    return msgspec.structs.replace(pending, erasure=erasure)


def _said(outcome: Outcome) -> dict[str, Any]:
    study, verdict = outcome.study, outcome.verdict
    return {
        "study": study.uid,
        "becomes": verdict.kind.value,
        "due": str(verdict.due) if verdict.due else None,
        "rule": verdict.rule,
        "reasons": [str(reason) for reason in verdict.reasons],
        "obstacles": list(verdict.obstacles),
        "instances": study.instances,
        "packs": study.packs,
        "bytes": study.space,
    }


def _records(open_: Open) -> Records[Pending]:
    return open_.ledger.records("pending", Pending)


def _see(ledger: Ledger) -> None:
    seen = _Seen(clock.now(), time.clock_gettime(time.CLOCK_BOOTTIME), _boot())
    ledger.records("clock", _Seen).put("seen", seen)


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
