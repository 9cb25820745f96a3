"""Scrub: every pack read again and opened within a set time, a slice at each run, at a bounded rate.

Packs are taken in the order of their names, which are random: a slice is a fair part of the store. Where a slice ended
stands in the ledger. What is damaged is told by study and sending peer; a good copy that is sent again, or a pack that
comes back from a backup, heals it, which the next run notices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec

from storage.keysdb import StudyKeyRecord
from storage.records import Records
from storescp import clock
from storescp.errors import LOCKED, StrongroomError, plural
from storescp.scrubsettings import ScrubSettings
from storescp.vault.opened import Open, Reader
from storescp.vault.state import Vault
from storescp.vault.verify import check

OPEN, HEALED = "open", "healed"
_BATCH = 100
_POSITION = "position"


class Position(msgspec.Struct):
    """How far the scrub is: behind which pack, since when it goes round, when it last ran and last was round."""

    after: str = ""
    round_began: str = ""
    last_run: str = ""
    packs: int = 0
    last_round: str = ""


class Damage(msgspec.Struct):
    """A pack that is damaged or missing, with its instances by study and sender; ``healed`` says when and how.

    Once a pack was erased or discarded, nothing here names what was in it.
    """

    pack: str
    what: str
    reason: str
    found: str
    objects: list[dict[str, Any]]
    healed: str = ""


class Scrub:
    """The scrub of a vault."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._settings: ScrubSettings = vault.config.settings.scrub

    def run(self, uid: int, *, whole: bool = False) -> Iterator[dict[str, Any]]:
        """Read a slice of the packs, or all; yield what happens.

        Raises:
            StrongroomError: The vault is locked, before or meanwhile.
        """
        open_ = self._vault.unlocked()
        self._vault.auditor.record("scrub", uid=uid, whole=whole)
        yield from self._healed(open_)
        position, budget, total = self._slice(open_, whole=whole)
        began, read, packs, found = time.monotonic(), 0, 0, 0
        with open_.reader() as reader:
            while batch := reader.keys_db.records(after=position.after, limit=_BATCH):
                for record in batch:
                    if open_.closed:
                        raise StrongroomError("the vault was locked meanwhile", hint="unlock it", status=LOCKED)
                    size, damage = _look(open_, reader, record)
                    if damage is not None:
                        found += 1
                        self._keep(open_, damage)
                        text = f"pack {damage.pack} is {damage.what}: {damage.reason}"
                        yield {"kind": "finding", "text": text, **msgspec.to_builtins(damage)}
                    read += max(size, record.place.length)
                    packs += 1
                    position.after = record.pack_id
                    position.packs += 1
                    if read >= budget and not whole:
                        break
                    if self._settings.rate:
                        time.sleep(max(0.0, read / self._settings.rate / 1e6 - (time.monotonic() - began)))
                self._remember(open_, position)
                yield {"kind": "progress", "done": min(read, budget), "total": budget}
                if read >= budget and not whole:
                    break
            if not reader.keys_db.records(after=position.after, limit=1):
                position.after, position.last_round, position.packs = "", clock.now(), 0
        position.last_run = clock.now()
        self._remember(open_, position)
        yield {"kind": "step", "text": f"read {plural(packs, 'pack')} of {total}: {plural(found, 'finding')}"}
        if not position.after:
            yield {"kind": "step", "text": "every pack was read"}
        yield {"kind": "scrubbed", "packs": packs, "bytes": read, "findings": found}

    def _slice(self, open_: Open, *, whole: bool) -> tuple[Position, int, int]:
        """Return where to go on, how many bytes to read, and how many packs there are."""
        with self._vault.admitting():
            position = open_.ledger.records("scrub", Position).get(_POSITION) or Position()
            packs, size = open_.keys_db.sizes()
        if whole or not position.after:
            position.after, position.round_began, position.packs = "", clock.now(), 0
        if whole:
            return position, max(1, size), packs
        since = timedelta(days=1)
        if position.last_run:
            since = max(since, clock.parse(clock.now()) - clock.parse(position.last_run))
        return position, max(1, int(size * (since / timedelta(days=self._settings.days)))), packs

    def _remember(self, open_: Open, position: Position) -> None:
        with self._vault.admitting():
            if not open_.closed:
                open_.ledger.records("scrub", Position).put(_POSITION, position)

    def _keep(self, open_: Open, damage: Damage) -> None:
        with self._vault.admitting():
            if open_.closed:
                return
            records = _records(open_)
            before = records.get(damage.pack)
            if before is None or before.healed:
                self._vault.auditor.tell("damage-found", pack=damage.pack, what=damage.what, reason=damage.reason)
                records.put(damage.pack, damage, OPEN)

    def _healed(self, open_: Open) -> Iterator[dict[str, Any]]:
        """Look again at what was damaged."""
        with self._vault.admitting():
            known = list(_records(open_).all(OPEN))
        for damage in known:
            with open_.reader() as reader:
                record = reader.keys_db.find(damage.pack)
                if record is None:
                    healed, damage.objects = "it was erased or discarded", []
                elif not check(open_, reader, record)[2]:
                    healed = "it opens again"
                elif _is_replaced(reader, damage.pack, damage.objects):
                    healed = "good copies came"
                else:
                    continue
            with self._vault.admitting():
                if not open_.closed:
                    damage.healed = f"{clock.now()}: {healed}"
                    self._vault.auditor.tell("damage-healed", pack=damage.pack, how=healed)
                    _records(open_).put(damage.pack, damage, HEALED)
            yield {"kind": "step", "text": f"pack {damage.pack}: {healed}"}

    def status(self) -> dict[str, Any]:
        """Return how far the scrub is, and what is damaged."""
        with self._vault.admitting():
            open_ = self._vault.unlocked()
            position = open_.ledger.records("scrub", Position).get(_POSITION) or Position()
            return {
                "last_run": position.last_run,
                "last_round": position.last_round,
                "round_began": position.round_began,
                "packs_of_round": position.packs,
                "packs": open_.keys_db.count(),
                "days": self._settings.days,
                "damaged": [msgspec.to_builtins(damage) for damage in _records(open_).all(OPEN)],
            }


def damaged(open_: Open) -> int:
    """Return how many packs are known to be damaged."""
    return _records(open_).count(OPEN)


def damaged_instances(open_: Open) -> dict[str, set[str]]:
    """Return the packs that are known to be damaged, each with the UIDs of its instances that are; none: all of it."""
    return {damage.pack: {str(row["sop"]) for row in damage.objects} for damage in _records(open_).all(OPEN)}


def _look(open_: Open, reader: Reader, record: StudyKeyRecord) -> tuple[int, Damage | None]:
    size, _, finding = check(open_, reader, record)
    if not finding or finding["what"] == "not indexed" or open_.closed:
        return size, None
    if reader.keys_db.find(record.pack_id) is None:
        # Erased or moved meanwhile.
        return size, None
    if _is_replaced(reader, record.pack_id, finding["objects"]):
        # It was told, and nothing is missing any more.
        return size, None
    return size, Damage(record.pack_id, finding["what"], finding["reason"], clock.now(), finding["objects"])


def _is_replaced(reader: Reader, pack_id: str, objects: list[dict[str, Any]]) -> bool:
    """Tell whether a good copy of each instance is held that a damaged pack cannot give any more."""
    return bool(objects) and all(reader.index.held(row["sop"], besides=pack_id) for row in objects)


def _records(open_: Open) -> Records[Damage]:
    return open_.ledger.records("damage", Damage)
