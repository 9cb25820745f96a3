"""Association negotiation: pynetdicom's edge. Bytes of a request to a decision, a decision to bytes of a reply.

One of the two places of the gate that import pynetdicom.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext

from storescp.gate.transfer import COMMITMENT, ENCODINGS, STORAGE_CLASSES, VERIFICATION
from storescp.gate.wire import WireError
from storescp.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from storescp.peers import Peer

# Header, version, two AE titles of 16 bytes each, 32 bytes that are reserved.
_ITEMS_START = 74
_CONTEXT_ITEM, _USER_ITEM = 0x20, 0x50
# Presentation contexts have odd ids of one byte. Of all items, DCMTK and Orthanc send some hundreds.
_CONTEXT_LIMIT = 128
_ITEM_LIMIT = 8192
# What is read whole here comes as plain as every peer can send it, whatever an object may come in.
_PLAIN = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2")
_ACCEPTED, _NO_ABSTRACT_SYNTAX, _NO_TRANSFER_SYNTAX = 0x00, 0x03, 0x04


class Request(msgspec.Struct, frozen=True):
    """An association request: AE titles as their 16 raw bytes, and pynetdicom's primitive."""

    calling: bytes
    called: bytes
    primitive: A_ASSOCIATE


class Context(msgspec.Struct, frozen=True):
    """An accepted presentation context; ``receives``: the peer is SCP of it, too."""

    abstract_syntax: str
    transfer_syntax: str
    receives: bool = False


class Agreement(msgspec.Struct, frozen=True):
    """What was negotiated: the reply to send, accepted contexts by id, the peer's maximum PDU length (0: none)."""

    reply: bytes
    contexts: dict[int, Context]
    maximum_pdu: int


def titles(pdu: bytes) -> tuple[bytes, bytes]:
    """Return calling and called AE title of an A-ASSOCIATE-RQ PDU, their 16 bytes each: what is decided by first.

    Raises:
        WireError: It ends before them.
    """
    if len(pdu) < _ITEMS_START:
        raise WireError("the association request is malformed")
    return pdu[26:42], pdu[10:26]


def decode(pdu: bytes) -> Request:
    """Return the request in an A-ASSOCIATE-RQ PDU.

    Raises:
        WireError: It is malformed, or has more items than any honest request.
    """
    calling, called = titles(pdu)
    _count(pdu)
    try:
        request = A_ASSOCIATE_RQ()
        request.decode(pdu)
        # The titles count as bytes; pynetdicom decodes and strips them.
        return Request(calling, called, request.to_primitive())
    except Exception as error:
        # The library raises whatever it stumbles over; for us each of them is a malformed request.
        raise WireError("the association request is malformed") from error


def _count(pdu: bytes) -> None:
    """Refuse a request whose items would cost the library seconds: it makes objects of each (PS3.8 9.3.2)."""
    count, contexts = 0, set()
    for kind, content in _items(memoryview(pdu)[_ITEMS_START:]):
        count += 1
        if kind == _CONTEXT_ITEM:
            if not content or content[0] in contexts:
                raise WireError("the association request is malformed: a presentation context comes twice")
            contexts.add(content[0])
        if kind in {_CONTEXT_ITEM, _USER_ITEM}:
            count += sum(1 for _ in _items(content[4:] if kind == _CONTEXT_ITEM else content))
        if count > _ITEM_LIMIT or len(contexts) > _CONTEXT_LIMIT:
            raise WireError("the association request has too many items")


def _items(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield type and content of each item; one that is cut short is the last."""
    while len(content) >= 4:
        length = int.from_bytes(content[2:4], "big")
        yield content[0], content[4 : 4 + length]
        content = content[4 + length :]


class Offer(NamedTuple):
    """What a server offers a peer: what it may use, of what it may be the SCP, and what holds no objects.

    Objects come in any transfer syntax that is known; what holds none is taken uncompressed only.
    """

    uses: Callable[[str], bool]
    receives: Callable[[str], bool] = lambda _: False
    plain: Collection[str] = (COMMITMENT,)


def storage(peer: Peer, *, commits: bool = False) -> Offer:
    """Return what the gate offers: storage, its commitment and verification; a peer is never the SCP of anything.

    Args:
        peer: The peer.
        commits: Somebody reports commitment, to where the peer listens.
    """
    may_commit = commits and "commit" in peer.operations and peer.listens is not None
    return Offer(lambda abstract: may_use(peer, abstract) or (may_commit and abstract == COMMITMENT))


def agree(request: Request, offer: Offer, *, maximum_pdu: int) -> Agreement:
    """Accept what is offered of what a peer proposes, each in the first proposed transfer syntax that is known.

    Raises:
        WireError: The request cannot be answered.
    """
    try:
        return _agree(request.primitive, offer, maximum_pdu)
    except Exception as error:
        raise WireError("the association request cannot be answered") from error


def _agree(request: A_ASSOCIATE, offer: Offer, maximum_pdu: int) -> Agreement:
    accepted: dict[int, Context] = {}
    results = []
    roles = _roles(request, offer)
    for proposed in request.presentation_context_definition_list:
        result, syntax = _decide(proposed, offer)
        context = PresentationContext()
        context.context_id = proposed.context_id
        context.abstract_syntax = proposed.abstract_syntax
        context.transfer_syntax = [UID(syntax)]
        context.result = result
        results.append(context)
        if result == _ACCEPTED:
            abstract = str(proposed.abstract_syntax)
            receives = abstract in roles and bool(roles[abstract].scp_role)
            accepted[int(proposed.context_id)] = Context(abstract, syntax, receives)

    classes = {context.abstract_syntax for context in accepted.values()}
    reply = A_ASSOCIATE()
    reply.application_context_name = UID("1.2.840.10008.3.1.1.1")
    reply.calling_ae_title = request.calling_ae_title
    reply.called_ae_title = request.called_ae_title
    reply.result = 0x00
    reply.result_source = 0x01
    reply.presentation_context_definition_results_list = results
    reply.user_information = [*_about_us(maximum_pdu), *(role for uid, role in roles.items() if uid in classes)]
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(reply)
    return Agreement(pdu.encode(), accepted, int(request.maximum_length_received or 0))


def request(
    calling: str,
    called: str,
    contexts: dict[int, tuple[str, list[str]]],
    *,
    maximum_pdu: int,
    roles: Iterable[str] = (),
) -> bytes:
    """Return an A-ASSOCIATE-RQ PDU: we are the SCU of what is proposed.

    Args:
        calling: Our AE title.
        called: The other one's.
        contexts: Abstract syntax and transfer syntaxes by odd id, at most 128.
        maximum_pdu: The largest P-DATA-TF that we take.
        roles: Abstract syntaxes of which we are the SCP, and the other side is the SCU.
    """
    asked = A_ASSOCIATE()
    asked.application_context_name = UID("1.2.840.10008.3.1.1.1")
    asked.calling_ae_title, asked.called_ae_title = calling, called
    proposed = []
    for number, (abstract, syntaxes) in contexts.items():
        context = PresentationContext()
        context.context_id = number
        context.abstract_syntax = UID(abstract)
        context.transfer_syntax = [UID(syntax) for syntax in syntaxes]
        proposed.append(context)
    asked.presentation_context_definition_list = proposed
    asked.user_information = _about_us(maximum_pdu)
    for abstract in roles:
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid = UID(abstract)
        role.scu_role, role.scp_role = False, True
        asked.user_information.append(role)
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(asked)
    return bytes(pdu.encode())


def accepted(pdu: bytes, proposed: dict[int, tuple[str, list[str]]]) -> Agreement:
    """Return what an A-ASSOCIATE-AC PDU accepts of what was proposed.

    Raises:
        WireError: It is malformed.
    """
    try:
        found = A_ASSOCIATE_AC()
        found.decode(pdu)
        answer = found.to_primitive()
        contexts = {}
        for context in answer.presentation_context_definition_results_list:
            number = int(context.context_id)
            syntax = str(context.transfer_syntax[0]) if context.transfer_syntax else ""
            if context.result == _ACCEPTED and number in proposed and syntax in proposed[number][1]:
                contexts[number] = Context(proposed[number][0], syntax, receives=True)
        return Agreement(b"", contexts, int(answer.maximum_length_received or 0))
    except Exception as error:
        # The library raises whatever it stumbles over.
        raise WireError("the answer to an association request is malformed") from error


def _about_us(maximum_pdu: int) -> list[Any]:
    length = MaximumLengthNotification()
    length.maximum_length_received = maximum_pdu
    class_uid = ImplementationClassUIDNotification()
    class_uid.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION
    return [length, class_uid, version]


def _decide(proposed: PresentationContext, offer: Offer) -> tuple[int, str]:
    syntaxes = [str(s) for s in proposed.transfer_syntax]
    abstract = str(proposed.abstract_syntax)
    first = syntaxes[0] if syntaxes else "1.2.840.10008.1.2"
    if not offer.uses(abstract):
        return _NO_ABSTRACT_SYNTAX, first
    taken = _PLAIN if abstract in offer.plain else ENCODINGS
    known = next((s for s in syntaxes if s in taken), None)
    return (_ACCEPTED, known) if known else (_NO_TRANSFER_SYNTAX, first)


def may_use(peer: Peer, abstract: str) -> bool:
    """Tell whether a peer may use an abstract syntax: all that is offered to it, and nothing else."""
    if abstract == VERIFICATION:
        return "echo" in peer.operations
    return "store" in peer.operations and may_hold(peer, abstract)


def may_hold(peer: Peer, sop_class: str) -> bool:
    """Tell whether objects of a SOP class are taken from a peer, by whatever way it may store."""
    known = sop_class in (peer.sop_classes & STORAGE_CLASSES if peer.sop_classes else STORAGE_CLASSES)
    return known or sop_class in peer.private_sop_classes


def _roles(request: A_ASSOCIATE, offer: Offer) -> dict[str, SCP_SCU_RoleSelectionNegotiation]:
    """Answer role selection, by abstract syntax: the peer may be SCU of what it may use, SCP of what it may receive."""
    replies: dict[str, SCP_SCU_RoleSelectionNegotiation] = {}
    for item in request.user_information:
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation):
            abstract = str(item.sop_class_uid)
            role = SCP_SCU_RoleSelectionNegotiation()
            role.sop_class_uid = item.sop_class_uid
            role.scu_role = bool(item.scu_role)
            role.scp_role = bool(item.scp_role) and offer.receives(abstract)
            # An answer of no role at all is none: without one, the peer is SCU of what it asked for (PS3.7 D.3.3.4).
            if role.scu_role or role.scp_role:
                replies.setdefault(abstract, role)
    return replies
