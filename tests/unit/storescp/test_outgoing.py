"""Associations that we ask for: requests that pynetdicom reads, answers of its making, and what is proposed."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pki
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import UID
from pynetdicom.dsutils import decode as decode_dataset
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, MaximumLengthNotification, SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext

from storescp import config as configuration
from storescp import peers
from storescp.config import Settings, Store
from storescp.desk.models import MODELS
from storescp.desk.outgoing import Outgoing, OutgoingError, proposals
from storescp.desk.transcode import TARGETS
from storescp.desksettings import DeskSettings
from storescp.gate import dimse, negotiate
from storescp.gate.connection import Policy
from storescp.gate.dimse import Answer, Command, CommandError, Counts
from storescp.gate.negotiate import Context, Offer
from storescp.gate.tls import Trust
from storescp.gate.transfer import COMMITMENT
from storescp.gate.wire import WireError
from storescp.handover import Kind, Manifest
from storescp.peers import PeerFile, Peers

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT, IMPLICIT, RLE, J2K, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".5", ".4.90", ".1.99"))


def reply(
    results: list[tuple[int, int, str]], maximum: int = 16_384, roles: list[tuple[str, bool, bool]] | None = None
) -> bytes:
    """Return an A-ASSOCIATE-AC of pynetdicom's: context, result, transfer syntax."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = UID("1.2.840.10008.3.1.1.1")
    primitive.calling_ae_title, primitive.called_ae_title = "ROOM", "PEER"
    primitive.result, primitive.result_source = 0, 1
    contexts = []
    for number, result, syntax in results:
        context = PresentationContext()
        context.context_id, context.abstract_syntax, context.result = number, UID(CT), result
        context.transfer_syntax = [UID(syntax)]
        contexts.append(context)
    primitive.presentation_context_definition_results_list = contexts
    length = MaximumLengthNotification()
    length.maximum_length_received = maximum
    primitive.user_information = [length]
    for uid, scu, scp in roles or []:
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid, role.scu_role, role.scp_role = UID(uid), scu, scp
        primitive.user_information.append(role)
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(primitive)
    return bytes(pdu.encode())


PROPOSED = {1: (CT, [EXPLICIT, IMPLICIT]), 3: (CT, [RLE]), 5: (MR, [EXPLICIT])}


def test_a_request_is_what_pynetdicom_reads() -> None:
    contexts = {**PROPOSED, 7: (COMMITMENT, [EXPLICIT])}
    pdu = A_ASSOCIATE_RQ()
    pdu.decode(negotiate.request("ROOM", "A PEER", contexts, maximum_pdu=131_072, roles=(COMMITMENT,)))
    found = pdu.to_primitive()
    assert (found.calling_ae_title, found.called_ae_title) == ("ROOM", "A PEER")
    listed = found.presentation_context_definition_list
    assert {c.context_id: (c.abstract_syntax, c.transfer_syntax) for c in listed} == contexts
    roles = [item for item in found.user_information if isinstance(item, SCP_SCU_RoleSelectionNegotiation)]
    assert [(r.sop_class_uid, bool(r.scu_role), bool(r.scp_role)) for r in roles] == [(COMMITMENT, False, True)]
    assert found.maximum_length_received == 131_072
    assert found.implementation_class_uid


def test_what_was_accepted_of_what_was_proposed_is_taken_and_nothing_else() -> None:
    answer = reply([(1, 0, IMPLICIT), (3, 4, RLE), (5, 0, RLE), (7, 0, EXPLICIT)], 9000)
    agreement = negotiate.accepted(answer, PROPOSED)
    assert agreement.contexts == {1: Context(CT, IMPLICIT, receives=True)}
    assert agreement.maximum_pdu == 9000
    assert negotiate.accepted(reply([]), PROPOSED).contexts == {}


def test_an_answer_that_is_cut_or_altered_is_an_error_or_accepts_nothing_that_was_not_proposed() -> None:
    whole = reply([(1, 0, IMPLICIT), (3, 0, RLE)])
    chance = random.Random(2)
    spoilt = [whole[:cut] for cut in range(0, len(whole), 3)]
    for _ in range(300):
        altered = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            altered[chance.randrange(6, len(altered))] = chance.randrange(256)
        spoilt.append(bytes(altered))
    for content in spoilt:
        try:
            agreement = negotiate.accepted(content, PROPOSED)
        except WireError:
            continue
        for number, context in agreement.contexts.items():
            abstract, syntaxes = PROPOSED[number]
            assert context.abstract_syntax == abstract
            assert context.transfer_syntax in syntaxes


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_an_answer_or_the_one_error(data: bytes) -> None:
    for content in (data, reply([(1, 0, IMPLICIT)])[:80] + data):
        with contextlib.suppress(WireError):
            negotiate.accepted(content, PROPOSED)


def kinds(*listed: tuple[str, str, int]) -> Manifest:
    return Manifest(sum(count for *_, count in listed), 0, [Kind(*one) for one in listed])


def test_each_kind_is_proposed_as_it_is_stored_and_then_as_it_can_be_made() -> None:
    made = proposals(kinds((CT, J2K, 2), (CT, EXPLICIT, 5), (MR, RLE, 1)))
    assert made == {
        1: (CT, [EXPLICIT]),
        3: (CT, [J2K]),
        5: (MR, [RLE]),
        7: (CT, [IMPLICIT]),
        9: (MR, [EXPLICIT]),
        11: (MR, [IMPLICIT]),
    }
    assert set(TARGETS) == {EXPLICIT, IMPLICIT}


def test_no_more_is_proposed_than_an_association_has_and_what_is_rare_is_left_out() -> None:
    many = [(f"1.2.3.{number}", RLE, number) for number in range(1, 200)]
    made = proposals(kinds(*many))
    assert len(made) == 128
    assert sorted(made) == list(range(1, 256, 2))
    assert made[1] == ("1.2.3.199", [RLE])
    assert proposals(kinds()) == {}
    assert negotiate.request("A", "B", made, maximum_pdu=16_384)


def asked(*contexts: tuple[str, list[str]], roles: tuple[tuple[str, bool, bool], ...] = ()) -> negotiate.Request:
    numbered = {2 * place + 1: context for place, context in enumerate(contexts)}
    content = negotiate.request("A", "B", numbered, maximum_pdu=16_384, roles=tuple(uid for uid, *_ in roles))
    return negotiate.decode(content)


def test_queries_are_taken_uncompressed_and_objects_in_any_syntax() -> None:
    find = next(uid for uid, model in MODELS.items() if model.operation == "find")
    offer = Offer(lambda _: True, lambda abstract: abstract == CT, MODELS)
    request = asked((find, [J2K, DEFLATED]), (find, [DEFLATED, IMPLICIT]), (CT, [J2K]), (COMMITMENT, [DEFLATED]))
    found = negotiate.agree(request, offer, maximum_pdu=16_384).contexts
    assert {number: context.transfer_syntax for number, context in found.items()} == {3: IMPLICIT, 5: J2K, 7: DEFLATED}
    at_the_gate = negotiate.agree(request, Offer(lambda _: True), maximum_pdu=16_384).contexts
    assert 7 not in at_the_gate


def test_a_peer_is_scp_of_what_it_may_receive_and_asked_to_be() -> None:
    offer = Offer(lambda _: True, lambda abstract: abstract == CT)
    request = asked((CT, [EXPLICIT]), (MR, [EXPLICIT]), roles=((CT, False, True), (MR, False, True)))
    found = negotiate.agree(request, offer, maximum_pdu=16_384)
    assert [context.receives for context in found.contexts.values()] == [True, False]
    answer = A_ASSOCIATE_AC()
    answer.decode(found.reply)
    told = [i for i in answer.to_primitive().user_information if isinstance(i, SCP_SCU_RoleSelectionNegotiation)]
    assert [(r.sop_class_uid, bool(r.scp_role)) for r in told] == [(CT, True)]
    without = negotiate.agree(asked((CT, [EXPLICIT])), offer, maximum_pdu=16_384)
    assert [context.receives for context in without.contexts.values()] == [False]


# --- who listens there


class Site:
    """Authorities, what the desk trusts, and a place where somebody listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.stranger = pki.authority("Hospital"), pki.authority("Stranger")
        self.ours = self.authority.issue("room").save(folder, "room")
        self.peer = self.authority.issue("peer", names=["peer.example"], server=True)
        self.revoked = self.authority.issue("revoked", names=["peer.example"], server=True)
        (folder / "ca.pem").write_text(self.authority.pem)
        (folder / "ca.crl").write_bytes(pki.pem(self.authority.revoke(self.revoked)))
        store = Store(path="s", anchors="a", spool="p", signing_key="ed25519:" + "A" * 43 + "=")
        desk = DeskSettings(certificate="room.pem", private_key="room.key")
        (folder / "room.toml").write_text(configuration.render(Settings(store=store, desk=desk)))
        self.config = configuration.load(folder / "room.toml")

    def peers(self, listens: tuple[str, int], **settings: Any) -> Peers:
        file = PeerFile(ae_title="PEER", listens=f"{listens[0]}:{listens[1]}", **settings)
        return Peers({"PEER": peers.parse(peers.render(file), self.folder / "PEER.toml")})

    def connects(self, shown: pki.Holder | None, *, trusted: bool = True, **settings: Any) -> bool:
        """Tell whether we connect to somebody who shows a certificate, or speaks no TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if shown is not None:
            shown.save(self.folder, "shown")
            context.load_cert_chain(self.folder / "shown.pem", self.folder / "shown.key")
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def accept() -> None:
                with contextlib.suppress(OSError):
                    connection, _ = listening.accept()
                    with connection if shown is None else context.wrap_socket(connection, server_side=True) as there:
                        there.recv(1)

            thread = threading.Thread(target=accept, daemon=True)
            thread.start()
            known = self.peers(listening.getsockname(), **settings)
            trust = Trust([self.folder / "ca.pem"], [self.folder / "ca.crl"]) if trusted else Trust([], [])
            policy = Policy(known, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), trust)
            outgoing = Outgoing(self.config, lambda: policy)
            try:
                outgoing._connect(known.by_title["PEER"]).close()
            except (OutgoingError, OSError):
                return False
            finally:
                thread.join()
            return True


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("outgoing"))


def test_who_shows_the_certificate_of_its_file_is_the_peer(place: Site) -> None:
    bound = {"certificates": [place.peer.pem]}
    assert place.connects(place.peer, **bound)
    assert place.connects(place.peer, trusted=False, **bound)
    assert not place.connects(place.ours, **bound)
    assert not place.connects(place.stranger.issue("peer", server=True), **bound)
    assert not place.connects(place.revoked, certificates=[place.revoked.pem])
    old = place.authority.issue("peer", server=True, start=-2 * pki.DAY, end=-pki.DAY)
    assert not place.connects(old, certificates=[old.pem])


def test_who_has_the_name_of_its_file_from_the_authority_is_the_peer(place: Site) -> None:
    named = {"names": ["dns:peer.example"], "authority": peers.key_print(place.authority.certificate)}
    assert place.connects(place.peer, **named)
    assert not place.connects(place.peer, trusted=False, **named)
    assert not place.connects(place.authority.issue("peer", names=["other.example"], server=True), **named)
    assert not place.connects(place.stranger.issue("peer", names=["peer.example"], server=True), **named)
    assert not place.connects(place.revoked, **named)
    by_key = {"keys": [peers.key_print(place.peer.certificate)]}
    assert place.connects(place.peer, **by_key)
    assert not place.connects(place.authority.issue("peer", server=True), **by_key)


def test_without_tls_only_where_the_file_says_so(place: Site) -> None:
    bound = {"certificates": [place.peer.pem]}
    assert not place.connects(None, **bound)
    assert place.connects(None, listens_plaintext=True, **bound)


# --- command sets


def elements(content: bytes) -> dict[str, object]:
    found = decode_dataset(BytesIO(content), True, True)
    return {element.keyword: element.value for element in found}


def test_a_store_is_sent_with_whose_move_it_is_for() -> None:
    plain = elements(dimse.store_request(7, CT, "1.2.3"))
    assert plain.pop("CommandGroupLength") == len(dimse.store_request(7, CT, "1.2.3")) - 12
    assert plain == {
        "AffectedSOPClassUID": CT, "CommandField": 1, "MessageID": 7, "Priority": 0, "CommandDataSetType": 1,
        "AffectedSOPInstanceUID": "1.2.3",
    }  # fmt: skip
    moved = elements(dimse.store_request(7, CT, "1.2.3", originator="ASK", originator_message=65_535))
    assert moved["MoveOriginatorApplicationEntityTitle"] == "ASK"
    assert moved["MoveOriginatorMessageID"] == 65_535


def test_an_event_is_reported_as_the_standard_has_it() -> None:
    found = elements(dimse.event_report(1, COMMITMENT, "1.2.840.10008.1.20.1.1", 2))
    assert (found["CommandField"], found["EventTypeID"], found["CommandDataSetType"]) == (0x0100, 2, 1)
    assert found["AffectedSOPClassUID"] == COMMITMENT


@pytest.mark.parametrize(
    ("status", "remains"), [(0xFF00, True), (0xFE00, True), (0, False), (0xB000, False), (0xA702, False)]
)
def test_counts_are_told_and_what_remains_where_it_is_not_done(status: int, remains: bool) -> None:
    command = Command(dimse.C_GET_RQ, 3, "1.2.840.10008.5.1.4.1.2.2.3", "", has_data_set=True)
    found = elements(dimse.response(command, status, counts=Counts(70_000, 2, 3, 4)))
    assert found["CommandField"] == 0x8010
    told = [found[f"NumberOf{kind}Suboperations"] for kind in ("Completed", "Failed", "Warning")]
    assert told == [2, 3, 4]
    assert found.get("NumberOfRemainingSuboperations") == (0xFFFF if remains else None)


@pytest.mark.parametrize("title", ["DEST", "DEST  ", "  DEST", "A B", "", "\xff"])
def test_a_moves_destination_is_read_without_its_padding(title: str) -> None:
    raw = title.encode("latin-1").ljust(16)
    content = b"".join(
        [dimse._short(0x0100, 0x0021), dimse._short(0x0110, 1), dimse._short(0x0800, 1), b"\0\0\0\6\x10\0\0\0" + raw]
    )
    found = dimse.decode(content)
    assert found.destination == title.encode("latin-1").decode("ascii", "replace").strip()
    assert dimse.decode_answer(dimse.response(found, 0xA801)) == Answer(0x0021, 1, 0xA801, has_data_set=False)


@pytest.mark.parametrize("content", [b"", b"\0", dimse.store_request(1, CT, "1.2"), dimse._short(0x0100, 0x8001)])
def test_what_is_no_response_is_an_error(content: bytes) -> None:
    with pytest.raises(CommandError):
        dimse.decode_answer(content)
