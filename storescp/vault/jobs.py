"""What the schedule can do, by name. Each job is the function behind a verb of the command line.

A job yields events as every operation of the vault: ``step`` and ``pending`` say in ``text`` what was done and what is
waited for, ``finding`` what somebody has to look at, ``progress`` how far it is. The last text stays in the history:
it names no patient and no UID. It ends with a StrongroomError where it failed; where something that it needs is
missing, the error's status is ``USAGE`` or ``NOTHING``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from storescp import snapshot
from storescp.errors import FINDINGS, USAGE, StrongroomError, plural
from storescp.program import PROGRAM
from storescp.vault.backup import Backups
from storescp.vault.erase import Erase
from storescp.vault.expiry import ending
from storescp.vault.recovery import Recovery
from storescp.vault.retain import Retain
from storescp.vault.reviews import Reviews
from storescp.vault.rotate import Rotate
from storescp.vault.scrub import Scrub
from storescp.vault.state import Vault

Event = dict[str, Any]
_REPORT_SECONDS = 600


class Job(msgspec.Struct, frozen=True):
    """Something that can be done at any time: by whom is the user id that ``run`` gets.

    ``heavy`` ones begin within a maintenance window only, if there is any.
    """

    run: Callable[[int], Iterator[Event]]
    explained: str
    heavy: bool = False


def jobs_of(vault: Vault) -> dict[str, Job]:
    """Return the jobs of a vault, in the order in which they go where several are due; the fields of ``[schedule]``."""
    work = _Work(vault)
    return {
        "checkpoint": Job(work.checkpoint, "sign how far the audit chain has come"),
        "expiry": Job(work.expiry, "look which certificates and revocation lists end soon"),
        "erase": Job(work.erase, "go on with erasures that wait, sign final certificates", heavy=True),
        "export": Job(work.export, "a recovery export for each recovery key, kept in the store"),
        "rotate": Job(work.rotate, "a new key version, or go on with the one that was begun", heavy=True),
        "backup": Job(work.backup, "copy the store into schedule.backup_folder", heavy=True),
        "retention": Job(work.retention, "mark what is due by the rules, erase what was long enough", heavy=True),
        "scrub": Job(work.scrub, "read and open the next part of the packs", heavy=True),
        "patch": Job(work.patch, "look how old the oldest unapplied fix is, by what 'patch fetch' brought"),
        "review": Job(Reviews(vault).run, "what was unusual last week by the audit chain, into reviews/ of the store"),
    }


class _Work:
    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def checkpoint(self, uid: int) -> Iterator[Event]:
        self._vault.unlocked()
        before = self._vault.auditor.head
        known = {"head": f"{before.number}:{before.hash.hex()}"} if before else {}
        self._vault.auditor.record("checkpoint", uid=uid, **known)
        after = self._vault.auditor.head
        if after is not None:
            yield {"kind": "step", "text": f"the audit chain is signed up to {after.number}:{after.hash.hex()}"}

    def expiry(self, _uid: int) -> Iterator[Event]:
        now = datetime.now(UTC)
        yield from ending(self._vault.config, self._vault.unlocked().ring.body.authority, now)

    def erase(self, _uid: int) -> Iterator[Event]:
        self._vault.unlocked()
        Erase(self._vault).resume()
        with self._vault.admitting():
            counts = self._vault.unlocked().ledger.count_erasures()
        pending = counts.get("erased", 0)
        yield {"kind": "step", "text": f"{plural(pending, 'certificate')} of erasure pending"}
        if left := counts.get("begun", 0):
            yield {"kind": "pending", "text": f"{plural(left, 'erasure')} not done yet; the log says what for"}

    def export(self, uid: int) -> Iterator[Event]:
        for made, _ in Recovery(self._vault).export(uid):
            yield {"kind": "step", "text": f"export {made.id} for recovery key {made.recovery}"}

    def rotate(self, uid: int) -> Iterator[Event]:
        yield from Rotate(self._vault).run(uid, "by schedule", {})

    def backup(self, uid: int) -> Iterator[Event]:
        settings = self._vault.config.settings.schedule
        if not settings.backup_folder:
            raise StrongroomError(
                "there is no folder for backups", hint="schedule.backup_folder names it", status=USAGE
            )
        for event in Backups(self._vault).run(uid, Path(settings.backup_folder), keep=settings.backup_keep):
            yield event
            if event["kind"] == "made":
                made = event["manifest"]
                yield {"kind": "step", "text": f"backup {made.id}: {plural(made.packs, 'pack')}"}

    def retention(self, uid: int) -> Iterator[Event]:
        retain, alerts = Retain(self._vault), self._vault.alerts
        try:
            yield from retain.run(uid)
        except StrongroomError:
            if retain.braked:
                alerts.raise_("retention-brake", "", count=retain.braked)
            raise
        alerts.resolve("retention-brake")

    def scrub(self, uid: int) -> Iterator[Event]:
        for event in Scrub(self._vault).run(uid):
            if event["kind"] == "finding":
                # Its text stays in the history: the pack says enough, and the scrub's status names studies.
                yield {"kind": "finding", "text": f"pack {event['pack']} is {event['what']}"}
            else:
                yield event

    def patch(self, _uid: int) -> Iterator[Event]:
        # The verb itself, which tells alerts: what it looks at is no business of a process that holds the keys.
        file = str(self._vault.config.file)
        command = [*PROGRAM, "--config", file, "patch", "report", "--json"]
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_REPORT_SECONDS, check=False
        )
        if done.returncode not in {0, FINDINGS}:
            raise StrongroomError("the patch report failed", hint="'strongroom patch report' says why")
        self._vault.patches = snapshot.patches_of(done.stdout)
        summary: dict[str, int] = msgspec.json.decode(done.stdout)["summary"]
        for state in ("breach", "unknown"):
            if summary.get(state):
                found = plural(summary[state], "item")
                yield {"kind": "finding", "text": f"{found} {state}: 'strongroom patch report'"}
        if done.returncode == 0:
            yield {"kind": "step", "text": "nothing is over its limit"}
