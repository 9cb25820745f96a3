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
from storage.retention import Kind, Outcome, Rules, Totals
from storage.sqlite import DatabaseError
from storescp import clock
from storescp.errors import NOTHING, StrongroomError, plural
from storescp.synchronised import clock_is_synchronised
from storescp.vault import holding
from storescp.vault.erase import Erase
from storescp.vault.holding import Holding
from storescp.vault.opened import Open
from storescp.vault.pending import (
    KEPT,
    MARKED,
    PENDING,
    Pending,
    Steps,
    listed,
    records_of,
    step_of,
)
from storescp.vault.state import Vault

_BATCH = 500
_PROGRESS = 50
_TOLD = 10_000
_REASON = "retention: {}"

log = logging.getLogger(__name__)


class _NotDueError(Exception):
    """A study is not to be erased now; ``kind`` is what becomes of it."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind = kind


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
        # How many studies a run would have erased that a brake stopped.
        self.braked = 0

    # --- the plan

    def plan(self, on: date | None = None, *, everything: bool = False) -> Iterator[dict[str, Any]]:
        """Yield what would become of studies on a day, and totals at the end; those that are kept only where wanted.

        Of each that is due, ``run`` is what a run does with it: ``marked`` (it becomes pending erasure), ``waits`` (it
        is, until ``erased_from``), ``erased``, or ``taken back`` (until ``kept_until``).

        Raises:
            StrongroomError: The vault is locked.
        """
        on = on or today()
        totals, steps = Totals(), Steps()
        for outcome, step, before in self._steps(on, totals, steps):
            if everything or outcome.verdict.kind not in {Kind.KEPT, Kind.NO_RULE}:
                yield {"kind": "study", **_said(outcome), "run": step, **listed(step, before)}
        said = {**msgspec.structs.asdict(totals), **msgspec.structs.asdict(steps)}
        yield {"kind": "totals", "on": str(on), **said, "brakes": self._brakes(totals, steps)}

    def _steps(self, on: date, totals: Totals, steps: Steps) -> Iterator[tuple[Outcome, str, Pending | None]]:
        """Yield what becomes of each study, what a run does with it (empty for one that stays), and what is known."""
        ledger = self._vault.unlocked().own_ledger()
        try:
            known = ledger.records("pending", Pending)
            for outcome in self._outcomes(on, totals):
                step, before = "", None
                if outcome.verdict.kind is Kind.DUE:
                    before = known.get(outcome.study.uid)
                    step = step_of(before, str(outcome.verdict.due), on)
                    steps.count(step)
                yield outcome, step, before
        finally:
            ledger.close()

    def _outcomes(self, on: date, totals: Totals) -> Iterator[Outcome]:
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

    def _brakes(self, totals: Totals, steps: Steps) -> list[str]:
        # What is pending already was looked at when it was marked; it is counted again when it goes.
        going = max(steps.marks, steps.erases)
        with self._vault.admitting():
            said = [self._clock(self._vault.unlocked().ledger), brake(going, totals.studies, self._settings)]
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
        """Mark what is due; erase what was marked long enough ago, each with a certificate; yield what happens.

        Raises:
            StrongroomError: A brake is on, the ledger is damaged, or something cannot be recorded.
        """
        if not self._settings.rules:
            raise StrongroomError("there is no rule, so nothing is due", hint="[[retention.rules]], docs/retention.md")
        self._intact(uid)
        on = today()
        totals, steps = Totals(), Steps()
        for _ in self._steps(on, totals, steps):
            if totals.studies % _TOLD == 0:
                yield {"kind": "waiting", "text": f"looked at {totals.studies} studies"}
        self._brake(uid, totals, steps, confirm=confirm)
        self._vault.auditor.record(
            "retention-run", uid=uid, due=totals.due, studies=totals.studies, confirmed=confirm, erases=steps.erases
        )
        new = 0
        if steps.marks:
            for new in self._marking(on):
                yield {"kind": "progress", "done": new, "total": steps.marks}
        due = plural(totals.due, "study", "studies")
        yield {"kind": "step", "text": f"{due} due, {new} of them newly pending erasure"}
        yield from self._erasing(uid, on)
        self._tidy()

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

    def _brake(self, uid: int, totals: Totals, steps: Steps, *, confirm: bool) -> None:
        if stops := self._brakes(totals, steps):
            if not confirm:
                raise StrongroomError(
                    "nothing is erased: " + "; ".join(stops),
                    hint="'strongroom retention plan' shows what would go; --confirm says that it is meant",
                )
            log.warning("retention: confirmed by uid %d: %s", uid, "; ".join(stops))
        with self._vault.admitting():
            _see(self._vault.unlocked().ledger)

    def _marking(self, on: date) -> Iterator[int]:
        """List what is due as pending, some at a time: memory stays flat; yield how many are new so far."""
        new = 0
        marks: list[Pending] = []
        for outcome, step, _ in self._steps(on, Totals(), Steps()):
            if step == MARKED:
                marks.append(self._mark(outcome, on))
            if len(marks) == _BATCH:
                new += self._keep(marks, on)
                marks.clear()
                yield new
        yield new + self._keep(marks, on)

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

    def _keep(self, marks: list[Pending], on: date) -> int:
        with self._vault.admitting():
            known = records_of(self._vault.unlocked())
            # As it is now: somebody may have taken one back since it was read.
            fresh = [mark for mark in marks if step_of(known.get(mark.study), mark.due, on) == MARKED]
            known.put_all((mark.study, mark, PENDING) for mark in fresh)
            return len(fresh)

    def _erasing(self, uid: int, on: date) -> Iterator[dict[str, Any]]:
        """Erase what is pending and whose time of grace is over on a day, however long it takes; yield what happens."""
        total = sum(1 for page in self._pages(PENDING) for p in page if p.from_day <= str(on))
        done = left = 0
        for page in self._pages(PENDING):
            for pending in page:
                if pending.from_day > str(on):
                    continue
                if (done + left) % _PROGRESS == 0:
                    yield {"kind": "progress", "done": done + left, "total": total}
                if self._erase(uid, pending, on):
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

    def _pages(self, state: str) -> Iterator[list[Pending]]:
        """Yield what is pending or was taken back, some at a time; others get their turn between."""
        after = 0
        while True:
            with self._vault.admitting():
                page = records_of(self._vault.unlocked()).page(state, after=after, limit=_BATCH)
            if not page:
                return
            after = page[-1][0]
            yield [pending for _, pending in page]

    def _erase(self, uid: int, pending: Pending, on: date) -> bool:
        """Erase a study if it is due now; tell whether it was."""
        erase = Erase(self._vault)
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            open_.admission.must_be_filled()
            now = records_of(open_).get(pending.study)
            if now is None or now.kept_until:
                # Taken back, since the page was read.
                return False
            before = erase.of_study(pending.study)
            if not open_.index.packs_of(pending.study) and (before is None or before.erased):
                # It is gone, by an erasure that was interrupted or by another.
                records_of(open_).remove(pending.study)
                return before is not None
            reason = _REASON.format(pending.rule)
            events = erase.run(uid, pending.study, reason, check=lambda found: self._must_be_due(found, now, on))
            try:
                # Decided and begun at once: nobody places a hold, and nothing arrives, between the two.
                next(events)
            except _NotDueError as error:
                if error.kind in {Kind.KEPT, Kind.NO_RULE}:
                    records_of(open_).remove(pending.study)
                return False
        # Outside: what a gate still has open is waited for, and others get their turn.
        try:
            for _ in events:
                pass
        except StrongroomError as error:
            if self._vault.opened is not open_:
                raise
            # It has begun and goes on by itself; the others do not wait for it.
            log.warning("retention: %s", error)
            return False
        with self._vault.admitting():
            records_of(self._vault.unlocked()).remove(pending.study)
        return True

    def _must_be_due(self, open_: Open, pending: Pending, on: date) -> None:
        facts = next(open_.index.facts(pending.study), None)
        if facts is None or not open_.all_indexed(pending.study):
            raise _NotDueError(Kind.BLOCKED)
        holds = holding.current(open_)
        verdict = retention.assess(facts, self._rules(open_), holds, on)
        if verdict.kind is not Kind.DUE:
            raise _NotDueError(verdict.kind)
        if holding.held(open_, pending.study, holds):
            # By what was in quarantine and was accepted: rules know one patient of a study.
            raise _NotDueError(Kind.HELD)
        if str(verdict.due) > pending.due:
            # Something came since it was marked, and is due by now too: it gets a time of grace of its own.
            raise _NotDueError(Kind.KEPT)

    def _tidy(self) -> None:
        """Let go of what is listed about studies that are gone."""
        for state in (PENDING, KEPT):
            for page in self._pages(state):
                with self._vault.admitting():
                    open_ = self._vault.unlocked()
                    # An index that is being filled knows nothing of what is there.
                    open_.admission.must_be_filled()
                    gone = [p.study for p in page if not open_.index.packs_of(p.study) and open_.all_indexed(p.study)]
                    if gone:
                        records_of(open_).remove(*gone)

    # --- what is pending

    def pending(self) -> list[Pending]:
        """Return the studies that are pending erasure, and those that were taken back."""
        with self._vault.admitting():
            known = records_of(self._vault.unlocked())
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
            found = records_of(open_).get(study)
            if found is None or open_.is_being_erased(study):
                raise StrongroomError(
                    f"study {study} is not pending erasure", hint="'strongroom retention pending'", status=NOTHING
                )
            self._vault.auditor.record("erasure-taken-back", uid=uid, study=study, until=str(until), reason=reason)
            found.kept_until, found.kept_by, found.kept_reason = str(until), uid, reason
            records_of(open_).put(study, found, KEPT)
            return found


def today() -> date:
    """Return the day in UTC."""
    return datetime.now(UTC).date()


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


def _see(ledger: Ledger) -> None:
    seen = _Seen(clock.now(), time.clock_gettime(time.CLOCK_BOOTTIME), _boot())
    ledger.records("clock", _Seen).put("seen", seen)


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
