"""A DICOM audit message: what it says, and its XML in the element order of the schema. No clock, no files, no network.

Which record of the audit chain becomes which message is ``auditevents.py``'s business.
Source: DICOM PS3.15 A.5.1 (schema), A.5.2 (general conventions).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from xml.sax.saxutils import quoteattr

import msgspec

# What a receiver must be able to take (PS3.15 A.6).
LIMIT = 32_768
OWN_SCHEME = "99STRONGROOM"
# What stands where something must, and nobody knows what.
UNKNOWN = "unknown"
SUCCESS, MINOR, SERIOUS, MAJOR = 0, 4, 8, 12
_SHORT, _SHORTEST = 1024, 256
_QUERY_BYTES = 8192
# What XML 1.0 cannot hold, not even escaped; and white space that a token would lose.
_NO_XML = re.compile("[^\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Code(msgspec.Struct, frozen=True):
    """A coded value: a code, the scheme that it is of, and what it means."""

    value: str
    scheme: str
    meaning: str


class Participant(msgspec.Struct, frozen=True):
    """Who takes part: a person, a process or another node; ``machine`` is a name or an IP address."""

    user: str
    requestor: bool
    roles: tuple[Code, ...] = ()
    alternative: str = ""
    machine: str = ""
    is_address: bool = False


class Object(msgspec.Struct, frozen=True):
    """What it is about. ``query`` stands where there is no name; ``details`` are names and values."""

    id: str
    id_type: Code
    type: int
    role: int
    name: str = ""
    query: bytes = b""
    life_cycle: int = 0
    details: tuple[tuple[str, str], ...] = ()
    sop_classes: tuple[tuple[str, int], ...] = ()


class AuditMessage(msgspec.Struct, frozen=True):
    """One message. ``time`` is RFC 3339, UTC; ``action`` one of C, R, U, D, E."""

    event: Code
    types: tuple[Code, ...]
    action: str
    time: str
    outcome: int
    participants: tuple[Participant, ...]
    source: str
    objects: tuple[Object, ...] = ()
    description: str = ""


def encode(message: AuditMessage) -> bytes:
    """Return a message as XML, UTF-8, at most ``LIMIT`` bytes: details go where it would be longer, the last first.

    Raises:
        ValueError: It is too long without any.
    """
    content = _xml(message)
    while len(content) > LIMIT:
        message = _shorter(message)
        content = _xml(message)
    return content


def _shorter(message: AuditMessage) -> AuditMessage:
    most = max((len(one.details) for one in message.objects), default=0)
    if most < 2:
        raise ValueError("an audit message is too long even without its details")
    kept = [
        msgspec.structs.replace(one, details=(*one.details[: most // 2 - 1], ("cut", "true")))
        if len(one.details) == most
        else one
        for one in message.objects
    ]
    return msgspec.structs.replace(message, objects=tuple(kept))


def _xml(message: AuditMessage) -> bytes:
    event = _attributes(
        EventActionCode=message.action, EventDateTime=message.time, EventOutcomeIndicator=str(message.outcome)
    )
    parts = [
        '<?xml version="1.0" encoding="UTF-8"?><AuditMessage>',
        f"<EventIdentification{event}>",
        _coded("EventID", message.event),
        *(_coded("EventTypeCode", code) for code in message.types),
        _element("EventOutcomeDescription", message.description) if message.description else "",
        "</EventIdentification>",
        *(_participant(one) for one in message.participants),
        f"<AuditSourceIdentification{_attributes(AuditSourceID=message.source)}>",
        # An application server process (PS3.15 A.5.1.2.1).
        '<AuditSourceTypeCode csd-code="4"/></AuditSourceIdentification>',
        *(_object(one) for one in message.objects),
        "</AuditMessage>",
    ]
    return "".join(parts).encode()


def _participant(one: Participant) -> str:
    about = _attributes(
        UserID=one.user or UNKNOWN,
        AlternativeUserID=one.alternative,
        UserIsRequestor="true" if one.requestor else "false",
        NetworkAccessPointID=one.machine,
        NetworkAccessPointTypeCode=("2" if one.is_address else "1") if one.machine else "",
    )
    return _enclosed("ActiveParticipant", about, (_coded("RoleIDCode", role) for role in one.roles))


def _object(one: Object) -> str:
    about = _attributes(
        ParticipantObjectID=one.id or UNKNOWN,
        ParticipantObjectTypeCode=str(one.type),
        ParticipantObjectTypeCodeRole=str(one.role),
        ParticipantObjectDataLifeCycle=str(one.life_cycle) if one.life_cycle else "",
    )
    inner = [
        _coded("ParticipantObjectIDTypeCode", one.id_type),
        _query(one.query)
        if one.query
        # The schema wants a name or a query; who has no name is called by the id.
        else _element("ParticipantObjectName", one.name or one.id or UNKNOWN),
        *(
            f'<ParticipantObjectDetail{_attributes(type=name or "-")} value="{_value(value)}"/>'
            for name, value in one.details
        ),
    ]
    if one.sop_classes:
        classes = (
            f"<SOPClass{_attributes(UID=uid)} NumberOfInstances={quoteattr(str(count))}/>"
            for uid, count in one.sop_classes
        )
        inner.append(_enclosed("ParticipantObjectDescription", "", classes))
    return _enclosed("ParticipantObjectIdentification", about, inner)


def _coded(name: str, code: Code) -> str:
    about = {"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning}
    return f"<{name}{_attributes(**about)}/>"


def _enclosed(name: str, attributes: str, inner: Iterable[str]) -> str:
    return f"<{name}{attributes}>{''.join(inner)}</{name}>"


def _element(name: str, text: str) -> str:
    escaped = _printable(text)[:_SHORT].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"<{name}>{escaped}</{name}>"


def _attributes(**values: str) -> str:
    """Return attributes in this order, each cut where it is very long; an empty one is not there."""
    return "".join(f" {name}={quoteattr(_printable(value)[:_SHORTEST])}" for name, value in values.items() if value)


def _query(query: bytes) -> str:
    return f"<ParticipantObjectQuery>{base64.b64encode(query[:_QUERY_BYTES]).decode()}</ParticipantObjectQuery>"


def _value(text: str) -> str:
    """Return a detail's value as the schema has it: base64, so that no text in it can be taken for anything else."""
    cut = text if len(text) <= _SHORT else text[:_SHORT] + "…"
    return base64.b64encode(cut.encode("utf-8", "backslashreplace")).decode()


def _printable(text: str) -> str:
    return _NO_XML.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
