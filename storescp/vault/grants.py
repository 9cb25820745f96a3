"""What the vault gives the desk: answers to queries, and the instances of a request, for one peer at a time.

The desk says which peer asks; that peer's file says what it may, and which instances it sees. A desk that is taken
over can ask in any peer's name: within the peers' limits, and everything is in the audit chain before it is given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from keys.seal import SealError, plain_length
from storage.matching import QueryError
from storage.pack import PackError
from storage.query import LEVELS, Query, Scope
from storage.selection import Selected, Selection
from storescp import handover, peers
from storescp.errors import LIMITED, MAY_NOT, NOTHING, StrongroomError
from storescp.handover import Instance, Kind, Manifest
from storescp.peers import Peer, Peers
from storescp.vault.contents import Contents
from storescp.vault.limits import Limit, Seldom
from storescp.vault.opened import Open
from storescp.vault.state import Vault

# What is asked for in one request; more is several requests.
_KEYS_LIMIT = 10_000
# What a peer or an operation that there is not is called in the chain: its own name is whatever somebody likes.
_UNKNOWN = "unknown"
_OPERATIONS = frozenset({"find", "get", "move", "web"})
# How long the same refusal is not recorded again, but counted.
_TOLD_SECONDS = 60.0
# No title and no modality is like it.
_NOBODY = "\0"
# How long an alert stands after the last refusal.
_SETTLED_SECONDS = 3600.0

log = logging.getLogger(__name__)


class FindRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A query of a peer; ``operation`` is find or web."""

    peer: str
    operation: str
    query: Query


class RetrieveRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Instances for a peer; ``operation`` is get, move or web; ``to`` is where they go, an AE title or an address."""

    peer: str
    operation: str
    to: str
    selection: Selection


class Grants:
    """Answers the desk. Safe to use from many threads."""

    def __init__(self, vault: Vault, now: Callable[[], float] = time.monotonic) -> None:
        self._vault = vault
        self._config = vault.config
        desk = vault.config.settings.desk
        self._queries = Limit(desk.queries_per_minute, 60.0, now)
        self._instances = Limit(desk.instances_per_hour, 3600.0, now)
        self._now = now
        self._seldom = Seldom(_TOLD_SECONDS, now)
        self._refused: dict[str, float] = {}
        self._stamp: object = None
        self._peers = Peers({})

    def find(self, uid: int, asked: FindRequest) -> Iterator[dict[str, list[str]]]:
        """Return what a query of a peer finds, from the first row on.

        Raises:
            StrongroomError: The vault is locked, or the peer may not.
        """
        peer = self._allowed(asked.peer, asked.operation)
        self._within(self._queries, peer)
        if asked.query.level not in LEVELS:
            raise StrongroomError("no such level")
        opened = self._vault.unlocked()
        # Values are patients': the chain is sealed.
        filters = {tag: values for tag, values in asked.query.match.items() if any(values)}
        self._vault.auditor.record(
            "query", uid=uid, level=asked.query.level.lower(), filters=filters, peer=peer.ae_title
        )
        self._vault.admit()
        return self._rows(opened, asked.query, scope_of(peer))

    def _rows(self, opened: Open, query: Query, scope: Scope) -> Iterator[dict[str, list[str]]]:
        with opened.reader() as reader:
            try:
                yield from reader.index.query(query, scope)
            except QueryError as error:
                raise StrongroomError(str(error)) from error

    def retrieve(self, uid: int, asked: RetrieveRequest) -> Iterator[bytes]:
        """Return the stream of what a peer is given, see ``handover``.

        Raises:
            StrongroomError: The vault is locked, the peer may not, or nothing matches.
        """
        peer = self._allowed(asked.peer, asked.operation)
        chosen = asked.selection
        keys = len(chosen.patients) + len(chosen.studies) + len(chosen.series) + len(chosen.instances)
        if chosen.is_empty or keys > _KEYS_LIMIT:
            raise StrongroomError(f"a request names 1 to {_KEYS_LIMIT} keys")
        opened = self._vault.unlocked()
        self._vault.admit()
        scope = scope_of(peer)
        if asked.operation == "move" and (to := self._known().by_title.get(asked.to)) is not None:
            # Whoever has it sent there: a peer gets nothing that it does not see.
            scope = both(scope, scope_of(to))
        with opened.reader() as reader:
            parts = reader.index.parts(chosen, scope)
        total = sum(part.instances for part in parts)
        if not total:
            # Who tries what there is asks a question.
            self._within(self._queries, peer)
            raise StrongroomError("nothing that this peer sees matches", status=NOTHING)
        self._within(self._instances, peer, total)
        studies = dict.fromkeys(part.study for part in parts)
        whom = {"peer": peer.ae_title, "to": asked.to[:256], "by": asked.operation}
        for study in studies:
            self._vault.auditor.record("export-begun", uid=uid, study=study, **whom)
        kinds: dict[tuple[str, str], int] = {}
        for part in parts:
            kind = (part.sop_class, part.transfer_syntax)
            kinds[kind] = kinds.get(kind, 0) + part.instances
        size = sum(part.bytes for part in parts)
        manifest = Manifest(total, size, [Kind(*kind, count) for kind, count in kinds.items()])
        return self._stream(uid, opened, manifest, chosen, scope, whom)

    def _stream(
        self, uid: int, opened: Open, manifest: Manifest, chosen: Selection, scope: Scope, whom: dict[str, Any]
    ) -> Iterator[bytes]:
        given: dict[str, int] = {}
        left = manifest.instances
        try:
            yield handover.announce(manifest)
            with opened.reader() as reader, Contents(self._vault, opened, reader) as contents:
                for found in reader.index.selected(chosen, scope):
                    # What came since the count was made is not in this one.
                    if not left:
                        break
                    left -= 1
                    yield handover.announce(_instance(found))
                    try:
                        place = contents.place(found.pack, bytes.fromhex(found.object_id))
                        for part in contents.dataset(place):
                            yield handover.part(len(part))
                            yield part
                    except (StrongroomError, SealError, PackError, OSError) as error:
                        log.error("an instance that was asked for does not open: %s", error)
                        yield handover.BROKEN
                    else:
                        given[found.study] = given.get(found.study, 0) + 1
                        yield handover.WHOLE
        finally:
            for study, count in given.items():
                self._vault.auditor.tell("exported", uid=uid, study=study, instances=count, **whom)

    def settle(self) -> None:
        """Record what was refused again and again; let go of alerts about peers of which nothing was for long."""
        for (kind, peer, operation), times in self._seldom.overdue():
            self._vault.auditor.tell(kind, peer=peer, operation=operation, times=times)
        for alert in self._vault.alerts.standing():
            if alert.kind == "desk-volume":
                since = self._refused.get(alert.what)
                if since is None or self._now() - since > _SETTLED_SECONDS:
                    self._refused.pop(alert.what, None)
                    self._vault.alerts.resolve(alert.kind, alert.what)

    def _allowed(self, title: str, operation: str) -> Peer:
        """Return a peer that may do something.

        Raises:
            StrongroomError: It may not, or there is none.
        """
        peer = self._known().by_title.get(title)
        if peer is None or not may(peer, operation):
            known = operation if operation in _OPERATIONS else _UNKNOWN
            self._tell("desk-refused", title if peer is not None else _UNKNOWN, known)
            # Alike for a peer that may not, and one that there is not.
            raise StrongroomError("this peer may not do that", status=MAY_NOT)
        return peer

    def _tell(self, kind: str, peer: str, operation: str) -> None:
        """Record a refusal, once in a time."""
        if times := self._seldom.came((kind, peer, operation)):
            self._vault.auditor.tell(kind, peer=peer, operation=operation, times=times)

    def _known(self) -> Peers:
        stamp = peers.stamp(self._config.peers)
        if stamp != self._stamp:
            found, errors = peers.read_good(self._config.peers)
            for error in errors:
                log.error("the desk does not know a peer until its file is mended: %s", error)
            self._peers, self._stamp = found, stamp
        return self._peers

    def _within(self, limit: Limit, peer: Peer, count: int = 1) -> None:
        if limit.take(peer.ae_title, count):
            return
        self._refused[peer.ae_title] = self._now()
        self._tell("desk-limited", peer.ae_title, "find" if limit is self._queries else "get")
        self._vault.alerts.raise_("desk-volume", peer.ae_title)
        raise StrongroomError(
            "this peer asks for more than it may in this time",
            hint="desk.queries_per_minute, desk.instances_per_hour",
            status=LIMITED,
        )


def may(peer: Peer, operation: str) -> bool:
    """Tell whether a peer may do something at the desk."""
    if operation == "web":
        return not peer.roles.isdisjoint({"reader", "admin"})
    return operation in {"find", "get", "move"} and operation in peer.operations


def scope_of(peer: Peer) -> Scope:
    """Return which instances a peer sees: an admin all of them."""
    if "admin" in peer.roles:
        return Scope()
    return Scope(sorted(peer.sees_ae_titles), sorted(peer.sees_modalities))


def both(one: Scope, other: Scope) -> Scope:
    """Return what is within two scopes."""
    return Scope(_common(one.ae_titles, other.ae_titles), _common(one.modalities, other.modalities))


def _common(one: list[str], other: list[str]) -> list[str]:
    if not one or not other:
        return one or other
    # None in common is nothing, where an empty list would be everything.
    return sorted(set(one) & set(other)) or [_NOBODY]


def _instance(found: Selected) -> Instance:
    length = plain_length(found.dataset_length)
    return Instance(found.study, found.series, found.sop, found.sop_class, found.transfer_syntax, found.calling, length)
