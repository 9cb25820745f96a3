"""Which record of the audit chain becomes which DICOM audit messages: one table, and those that need more than it.

Pure: what only the index knows (whose study it is) is passed in. Every message ends with an object that names the
record and holds its other fields, so that nothing of it is lost where DICOM has no place for it.
Source: DICOM PS3.15 A.5.3 (messages), PS3.16 CID 400 to 402 (codes); docs/audit-forwarding.md lists the table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from storescp import auditcodes as codes
from storescp.auditmessage import (
    MAJOR,
    MINOR,
    OWN_SCHEME,
    SERIOUS,
    SUCCESS,
    UNKNOWN,
    AuditMessage,
    Code,
    Object,
    Participant,
)

_PERSON, _SYSTEM = 1, 2
_PATIENT_ROLE, _REPORT, _RESOURCE, _QUERY_ROLE = 1, 3, 13, 24
_CREATED, _ACCESS, _EXPORTED, _ERASED = 1, 6, 10, 15


class Source(NamedTuple):
    """Who says it: the store's id in hex, the server's AE title, the machine's name."""

    store: str
    title: str
    host: str


class Study(NamedTuple):
    """What the index knows of a study when the message is made; empty where it knows nothing."""

    patient: str = ""
    issuer: str = ""


class Stored(NamedTuple):
    """What became of a study's instances of one association: ``new`` by state, ``again`` were held already."""

    new: dict[str, int]
    again: int


class Known(msgspec.Struct, frozen=True):
    """What is looked up while a message is made."""

    study: Callable[[str], Study]
    # Of an association (its id) and a study, with the number that was acknowledged.
    stored: Callable[[str, str, int], Stored]
    # Which study an erasure is of, and whose that was.
    erasure: Callable[[str], tuple[str, Study]]


class Entry(NamedTuple):
    """A line of the table: the message of a record."""

    event: Code
    type: Code | None
    action: str = "E"
    outcome: int = SUCCESS


TABLE = {
    "vault-started": Entry(codes.ACTIVITY, codes.START),
    "vault-stopped": Entry(codes.ACTIVITY, codes.STOP),
    "configuration-changed": Entry(codes.ALERT, codes.SOFTWARE),
    "unlocked": Entry(codes.AUTHENTICATION, codes.LOGIN),
    "unlock-refused": Entry(codes.AUTHENTICATION, codes.LOGIN, outcome=MINOR),
    "locked": Entry(codes.AUTHENTICATION, codes.LOGOUT),
    **dict.fromkeys(("peer-added", "peer-renewing", "peer-renewed", "peer-removed"), Entry(codes.ALERT, codes.NETWORK)),
    **dict.fromkeys(("peers-read", "peers-changed"), Entry(codes.ALERT, codes.NETWORK)),
    "certificate-issued": Entry(codes.ALERT, codes.SECURITY),
    "connection-refused": Entry(codes.ALERT, codes.NODE, outcome=MINOR),
    "association-ended": Entry(codes.TRANSFERRED, None, "C"),
    "instances-refused": Entry(codes.ALERT, None, outcome=MINOR),
    "query": Entry(codes.QUERY, None),
    "export-begun": Entry(codes.ACCESSED, None, "R"),
    "exported": Entry(codes.EXPORT, None, "R"),
    "audit-read": Entry(codes.LOG_USED, None, "R"),
    "audit-who": Entry(codes.LOG_USED, None, "R"),
    "erase-begun": Entry(codes.ALERT, codes.RESTRICTED),
    "erased": Entry(codes.DELETED, None, "D"),
    "erasure-final": Entry(codes.ALERT, codes.SECURITY),
    **dict.fromkeys(("slot-added", "slot-removed", "reroot"), Entry(codes.ALERT, codes.USER)),
    **dict.fromkeys(
        (
            "recovery-key-added",
            "recovery-exported",
            "recovery-confirmed",
            "recovery-retired",
            "recovery-drilled",
            "rotation-begun",
            "rotation-proved",
            "version-destroyed",
            "reencrypt-begun",
            "reencrypted",
            "forwarder-key-changed",
        ),
        Entry(codes.ALERT, codes.SECURITY),
    ),
    **dict.fromkeys(("hold-placed", "hold-released"), Entry(codes.ALERT, codes.OBJECT)),
    "holds-put-back": Entry(codes.ALERT, codes.OBJECT, outcome=SERIOUS),
    **dict.fromkeys(("damage-found", "events-refused"), Entry(codes.ALERT, None, outcome=SERIOUS)),
    "damage-healed": Entry(codes.ALERT, None),
    "events-dropped": Entry(codes.ALERT, codes.STOPPED, outcome=SERIOUS),
    "audit-broken": Entry(codes.ALERT, codes.STOPPED, outcome=MAJOR),
    "audit-restarted": Entry(codes.ALERT, codes.RECORDING, outcome=SERIOUS),
    **dict.fromkeys(("desk-refused", "desk-limited"), Entry(codes.ALERT, codes.SECURITY, outcome=MINOR)),
    "commitment-requested": Entry(codes.ALERT, None),
    "commitment-reported": Entry(codes.ALERT, None),
    "commitment-dropped": Entry(codes.ALERT, None, outcome=SERIOUS),
    "alert-raised": Entry(codes.ALERT, None, outcome=SERIOUS),
    "alert-resolved": Entry(codes.ALERT, None),
}
# What a peer asked for and got through the desk.
_OF_PEERS = frozenset({"query", "export-begun", "exported", "commitment-reported", "desk-refused", "desk-limited"})
# Whatever else a vault records is something that an admin or the schedule did.
_OTHER = Entry(codes.ALERT, codes.RESTRICTED)
# The transfer says it; or it is no event of its own.
_SILENT = frozenset({"association-begun", "gate-events", "transcript", "gone-with-its-version", "checkpoint"})
# Of one association; the rest is one message. The gate names no more, and what it says is bounded here all the same.
_STUDIES_LIMIT = 200
_TIME = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?Z", re.ASCII)
_FAILED_JOBS = frozenset({"failed", "refused", "findings"})


def messages(record: dict[str, Any], number: int, source: Source, known: Known) -> Iterator[AuditMessage]:
    """Yield the messages of a record, none for some; those of the gate's events in their order.

    Args:
        record: As the chain has it.
        number: Its number.
        source: Who says it.
        known: What is looked up.
    """
    for event in record["events"] if record["type"] == "gate-events" else [record]:
        # A broken gate can write whatever it likes into its events, and must not silence what others say.
        said = event if _TIME.fullmatch(str(event.get("time"))) else {**event, "time": record["time"]}
        yield from _of(said, number, source, known)


def _of(event: dict[str, Any], number: int, source: Source, known: Known) -> Iterator[AuditMessage]:
    make = _Making(event, number, source)
    match event["type"]:
        case kind if kind in _SILENT:
            return
        case "association-ended":
            yield from _transfers(make, known)
        case "export-begun" | "exported" | "erase-begun":
            study = str(event.get("study", ""))
            yield make.message(about=_studies(study, known.study(study), **_counts(event), life_cycle=make.life_cycle))
        case "erased":
            study, whose = known.erasure(str(event.get("erasure", "")))
            yield make.message(about=_studies(study, whose, life_cycle=_ERASED))
        case "query":
            criteria = json.dumps(event.get("filters", {}), sort_keys=True, ensure_ascii=False).encode(
                "utf-8", "replace"
            )
            yield make.message(
                about=(Object(str(event.get("level", "")), codes.CRITERIA, _SYSTEM, _QUERY_ROLE, query=criteria),)
            )
        case "audit-read" | "audit-who":
            yield make.message(
                about=(
                    Object(f"urn:strongroom:{source.store}:audit", codes.URI, _SYSTEM, _RESOURCE, "Security Audit Log"),
                )
            )
        case _:
            yield make.message()


def _transfers(make: _Making, known: Known) -> Iterator[AuditMessage]:
    """Yield one message a study for what is new, and one for what was held already (PS3.15 A.5.3.7)."""
    event = make.event
    counts = {str(uid): counted(count) for uid, count in named_studies(event).items()}
    studies = dict(list(counts.items())[:_STUDIES_LIMIT])
    for study, count in studies.items():
        became = known.stored(str(event.get("association", "")), study, count)
        whose = known.study(study)
        if new := sum(became.new.values()):
            states = {f"state-{state}": str(n) for state, n in sorted(became.new.items())}
            yield make.message("C", _studies(study, whose, instances=str(new), **states, life_cycle=_CREATED))
        if became.again:
            yield make.message("R", _studies(study, whose, instances=str(became.again), life_cycle=_ACCESS))
    named = sum(studies.values())
    if (more := counted(event.get("stored")) - named) > 0:
        # Of more studies than an event may name.
        yield make.message("C", _studies("", Study(), instances=str(more), life_cycle=_CREATED))
    if event.get("refused"):
        yield _Making({**event, "type": "instances-refused"}, make.number, make.source).message()


class _Making:
    """The making of one event's messages."""

    def __init__(self, event: dict[str, Any], number: int, source: Source) -> None:
        self.event, self.number, self.source = event, number, source
        self.kind = str(event["type"])
        self._entry = TABLE.get(self.kind, _OTHER)
        self.life_cycle = {"exported": _EXPORTED, "erase-begun": 0}.get(self.kind, _ACCESS)

    def message(self, action: str = "", about: tuple[Object, ...] = ()) -> AuditMessage:
        """Return a message of this event, about objects."""
        entry = self._entry
        own = Code(self.kind, OWN_SCHEME, self.kind.replace("-", " "))
        failed = self.kind == "job-ended" and self.event.get("result") in _FAILED_JOBS
        return AuditMessage(
            entry.event,
            (entry.type, own) if entry.type else (own,),
            action or entry.action,
            str(self.event["time"]),
            MINOR if failed else entry.outcome,
            self._participants(),
            f"{self.source.title}@{self.source.host}",
            (*about, self._record()),
            str(self.event.get("reason", "")) if entry.outcome or failed else "",
        )

    def _participants(self) -> tuple[Participant, ...]:
        node = "calling" in self.event or "address" in self.event
        taking = self.kind in {"association-ended", "query"}
        giving = self.kind in {"export-begun", "exported"}
        roles: tuple[Code, ...] = (
            (codes.DESTINATION,) if taking else (codes.SOURCE,) if giving else (codes.APPLICATION,)
        )
        server = Participant(
            f"strongroom-{self.source.store}",
            not node and "uid" not in self.event,
            roles,
            f"AETITLES={self.source.title}",
            self.source.host,
        )
        if node:
            address = str(self.event.get("address", ""))
            # A host alone, or with its port behind it.
            host = address.rpartition(":")[0] if address.count(":") == 1 or "]" in address else address
            host = host.strip("[]") or address.strip("[]")
            calling = str(self.event.get("calling", "")) or host or UNKNOWN
            return (Participant(calling, True, (codes.SOURCE,) if taking else (), "", host, True), server)
        if self.kind in _OF_PEERS and "peer" in self.event:
            # Through the desk, which is who says so.
            roles = (codes.SOURCE,) if taking else (codes.DESTINATION,) if giving else ()
            peer = str(self.event["peer"])
            return (Participant(peer, True, roles, f"AETITLES={peer}", ""), server)
        if "uid" in self.event:
            roles = (codes.SOURCE,) if taking else (codes.DESTINATION,) if giving else ()
            return (Participant(f"uid:{self.event['uid']}", True, roles, "", self.source.host), server)
        return (server,)

    def _record(self) -> Object:
        left = {"time", "type", "studies" if self.kind == "association-ended" else ""}
        fields = [(name, _text(value)) for name, value in self.event.items() if name not in left]
        return Object(
            f"{self.source.store}:{self.number}",
            codes.RECORD,
            _SYSTEM,
            _RESOURCE,
            self.kind,
            details=tuple((name, text) for name, text in fields if text not in {"", "{}", "[]"}),
        )


def head(number: int, hash_: bytes, time: str, signature: bytes, source: Source) -> AuditMessage:
    """Return the message that carries a signed head of the chain away from this machine."""
    said = (
        ("head", f"{number}:{hash_.hex()}"),
        ("time", time),
        ("signature", signature.hex()),
    )
    return AuditMessage(
        codes.HEAD,
        (),
        "R",
        time,
        SUCCESS,
        (
            Participant(
                f"strongroom-{source.store}", True, (codes.APPLICATION,), f"AETITLES={source.title}", source.host
            ),
        ),
        f"{source.title}@{source.host}",
        (Object(f"{source.store}:{number}", codes.RECORD, _SYSTEM, _RESOURCE, "audit-head", details=said),),
    )


def vault_locked(since: str, now: str, source: Source, *, over: bool) -> AuditMessage:
    """Return what the forwarder says by itself: that nothing comes from the vault, or that it does again."""
    kind = "vault-unlocked" if over else "vault-locked"
    return AuditMessage(
        codes.ALERT,
        (codes.RESTRICTED if over else codes.STOPPED, Code(kind, OWN_SCHEME, kind.replace("-", " "))),
        "E",
        now,
        SUCCESS if over else MINOR,
        (Participant("strongroom-forwarder", True, (codes.APPLICATION,), f"AETITLES={source.title}", source.host),),
        f"{source.title}@{source.host}",
        (Object(source.title, codes.NODE_ID, _SYSTEM, _RESOURCE, kind, details=(("since", since),)),),
        "" if over else "the vault is locked: its audit messages wait until somebody unlocks it",
    )


def _studies(
    study: str, whose: Study, *, instances: str = "", life_cycle: int = 0, **details: str
) -> tuple[Object, ...]:
    """Return a study and its patient as objects."""
    counted = ((("instances", instances),) if instances else ()) + tuple(details.items())
    patient = (("issuer", whose.issuer),) if whose.issuer else ()
    return (
        Object(study or UNKNOWN, codes.STUDY_UID, _SYSTEM, _REPORT, life_cycle=life_cycle, details=counted),
        Object(whose.patient or UNKNOWN, codes.PATIENT_NUMBER, _PERSON, _PATIENT_ROLE, details=patient),
    )


def named_studies(event: dict[str, Any]) -> dict[str, Any]:
    """Return the studies that an event of the gate names, whatever a gate wrote there."""
    found = event.get("studies")
    return found if isinstance(found, dict) else {}


def counted(value: Any) -> int:
    """Return a number that a gate wrote; 0 for whatever else it wrote."""
    return value if isinstance(value, int) and 0 <= value < 1 << 60 else 0


def _counts(event: dict[str, Any]) -> dict[str, str]:
    return {"instances": str(event["instances"])} if "instances" in event else {}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if value is not None else ""
