"""What the vault answers, as facts. One answer that does not come makes one fact unseen, and no other."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from storescp.control import Client
from storescp.doctor.facts import Answers, Backup, Job, Keys, Recovery, Room, Scrub, Slot, Status, Unseen
from storescp.errors import LOCKED, StrongroomError

_T = TypeVar("_T")


class _Disk(msgspec.Struct):
    free: int
    total: int


class _Status(msgspec.Struct):
    locked: bool
    receiving: bool
    slots: list[Slot]
    disk: dict[str, _Disk]


class _Items(msgspec.Struct):
    items: list[Any]


class _Scrub(msgspec.Struct):
    packs: int
    days: int
    damaged: list[Any]
    last_run: str
    last_round: str
    round_began: str


def nobody(reason: str) -> Answers:
    """Return what is known where no vault answers."""
    unseen = Unseen(reason)
    return Answers(status=unseen, keys=unseen, recovery=unseen, backups=unseen, jobs=unseen, scrub=unseen)


def answers(client: Client) -> Answers:
    """Ask a vault, locked or not; nothing that is asked changes anything."""
    return Answers(
        status=_status(_asked(client, "/v1/status", _Status)),
        keys=_asked(client, "/v1/keys", Keys),
        recovery=_asked(client, "/v1/recovery", Recovery),
        backups=_listed(client, "/v1/backups", Backup),
        jobs=_listed(client, "/v1/jobs", Job),
        scrub=_scrub(_asked(client, "/v1/scrub", _Scrub)),
    )


def _status(found: _Status | Unseen) -> Status | Unseen:
    if isinstance(found, Unseen):
        return found
    rooms = [Room(name=name, free=disk.free, total=disk.total) for name, disk in found.disk.items()]
    return Status(locked=found.locked, receiving=found.receiving, slots=found.slots, disk=rooms)


def _scrub(found: _Scrub | Unseen) -> Scrub | Unseen:
    if isinstance(found, Unseen):
        return found
    return Scrub(**(msgspec.structs.asdict(found) | {"damaged": len(found.damaged)}))


def _asked(client: Client, path: str, kind: type[_T]) -> _T | Unseen:
    try:
        return msgspec.convert(client.json("GET", path), kind)
    except StrongroomError as error:
        if error.status == LOCKED:
            return Unseen("the vault is locked: 'strongroom unlock', then look again")
        return Unseen(f"the vault does not tell: {error}")
    except (msgspec.ValidationError, ValueError, KeyError) as error:
        return Unseen(f"the vault's answer is of another form: {error}")


def _listed(client: Client, path: str, kind: type[_T]) -> list[_T] | Unseen:
    found = _asked(client, path, _Items)
    if isinstance(found, Unseen):
        return found
    try:
        return [msgspec.convert(item, kind) for item in found.items]
    except msgspec.ValidationError as error:
        return Unseen(f"the vault's answer is of another form: {error}")
