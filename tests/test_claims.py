"""What the conformance statement claims is what a real gate does: contexts, handshakes, statuses, negotiation."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file
from pynetdicom.pdu_primitives import AsynchronousOperationsWindowNegotiation, UserIdentityNegotiation
from pynetdicom.presentation import build_context, build_role

CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))
IMPLICIT = "1.2.840.10008.1.2"
# Worklist, Study Root C-FIND, Storage Commitment, MPPS, Hanging Protocol Storage, Basic Film Session, an invented one.
NOT_CLAIMED = (
    "1.2.840.10008.5.1.4.31", "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.1.20.1", "1.2.840.10008.3.1.2.3.3",
    "1.2.840.10008.5.1.4.38.1", "1.2.840.10008.5.1.1.1", "2.25.1",
)  # fmt: skip


class Claims:
    """A gate, and the tables of the statement that its own command writes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        file = server.home / "conformance.md"
        server.ok("conformance", "--to", file)
        self.text = file.read_text()
        self.classes = self._column("SOP Class", 1)
        self.syntaxes = self._column("Transfer syntax", 1)
        self.suites = self._column("Version", 1)
        self.context = scu.tls(server.home / "issued" / "CT1")

    def _column(self, heading: str, number: int) -> list[str]:
        [found] = re.findall(rf"(?m)^\| {heading} \|.*\n\| ---.*\n((?:\|.*\n)+)", self.text)
        return [line.strip("| ").split(" | ")[number].strip("`") for line in found.splitlines()]

    def results(self, contexts: list[tuple[str, str]]) -> list[int]:
        """Propose contexts, on as many associations as they need; return the result of each."""
        found = []
        # pynetdicom gives up an association of which no context is accepted: the first one always is.
        for start in range(0, len(contexts), 127):
            pairs = [(scu.VERIFICATION, IMPLICIT), *contexts[start : start + 127]]
            proposed = [build_context(*pair) for pair in pairs]
            association = scu.request(self.server.port, self.context, proposed)
            assert association.is_established
            both = [*association.accepted_contexts, *association.rejected_contexts]
            by_id = {context.context_id: context.result for context in both}
            assert len(by_id) == len(pairs)
            found += [by_id[number] for number in sorted(by_id)[1:]]
            association.release()
        return found


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Claims]:
    server = Server(tmp_path_factory.mktemp("s"))
    server.init()
    server.add_peer("CT1")
    server.start("gate")
    yield Claims(server)
    server.stop()
    server.kill_all()


def test_every_class_that_is_claimed_is_accepted_and_others_are_not(claims: Claims) -> None:
    pairs = [(uid, IMPLICIT) for uid in (scu.VERIFICATION, *claims.classes)]
    assert set(claims.results(pairs)) == {0}
    assert set(claims.results([(uid, IMPLICIT) for uid in NOT_CLAIMED])) == {3}


def test_every_transfer_syntax_that_is_claimed_is_accepted_and_others_are_not(claims: Claims) -> None:
    assert set(claims.results([(CT.sop_class, syntax) for syntax in claims.syntaxes])) == {0}
    # MIME, XML, SMPTE ST 2110-20, a Private one.
    others = ("1.2.840.10008.1.2.6.1", "1.2.840.10008.1.2.6.2", "1.2.840.10008.1.2.7.1", "1.3.46.670589.33.1.4.1")
    assert set(claims.results([(CT.sop_class, syntax) for syntax in others])) == {4}


def handshake(claims: Claims, prepare: Callable[[ssl.SSLContext], None]) -> tuple[str, str]:
    """Return version and cipher suite that a peer's handshake comes to."""
    context = scu.tls(claims.server.home / "issued" / "CT1")
    prepare(context)
    with (
        socket.create_connection(("127.0.0.1", claims.server.port), 30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        cipher = secured.cipher()
        return str(secured.version()), cipher[0] if cipher else ""


def at_most_1_2(suite: str) -> Callable[[ssl.SSLContext], None]:
    def prepare(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(suite)

    return prepare


def test_the_suites_that_are_claimed_for_the_servers_key_are_negotiated_and_others_are_not(claims: Claims) -> None:
    version, suite = handshake(claims, lambda _: None)
    assert (version, suite in claims.suites) == ("TLSv1.3", True)
    _, first = handshake(claims, at_most_1_2("ECDHE+AESGCM"))
    kind = first.split("-")[1]
    claimed = [name for name in claims.suites if name.startswith(f"ECDHE-{kind}-")]
    assert len(claimed) == 2
    for name in claimed:
        assert handshake(claims, at_most_1_2(name)) == ("TLSv1.2", name)
    for name in (f"ECDHE-{kind}-AES256-SHA384", f"ECDHE-{kind}-CHACHA20-POLY1305", "AES256-GCM-SHA384"):
        with pytest.raises(ssl.SSLError):
            handshake(claims, at_most_1_2(name))


def test_a_version_that_is_not_claimed_is_refused(claims: Claims) -> None:
    def old(context: ssl.SSLContext) -> None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.options &= ~(ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1

    with pytest.warns(DeprecationWarning), pytest.raises(ssl.SSLError):
        handshake(claims, old)


def test_refusals_have_the_statuses_and_comments_that_are_claimed(claims: Claims) -> None:
    no_study = CT._replace(data=CT.data.replace(CT.study.encode(), b"x" * len(CT.study)))
    with scu.associated(claims.server.port, claims.context, [CT.context]) as association:
        found = [scu.store(association, item) for item in (CT._replace(sop_instance="1.2.3"), no_study, CT)]
    table = dict(re.findall(r"(?m)^\| [^|]+ \| `([0-9A-F]{4})` \| (.+) \|$", claims.text))
    assert [response.Status for response in found] == [0xA900, 0xC000, 0x0000]
    for response in found[:2]:
        assert table[f"{response.Status:04X}"] == str(response.ErrorComment)


def test_what_is_not_negotiated_is_not_answered(claims: Claims) -> None:
    from pynetdicom import AE

    entity = AE("CT1")
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 5
    identity = UserIdentityNegotiation()
    identity.user_identity_type, identity.primary_field = 1, b"somebody"
    identity.positive_response_requested = True
    association = entity.associate(
        "127.0.0.1", claims.server.port, [CT.context], ae_title="STRONGROOM", tls_args=(claims.context, "127.0.0.1"),
        ext_neg=[window, identity, build_role(CT.sop_class, scu_role=True, scp_role=True)],
    )  # fmt: skip
    try:
        assert association.is_established
        kinds = {type(item).__name__ for item in association.acceptor.user_information}
        assert not {"AsynchronousOperationsWindowNegotiation", "UserIdentityNegotiation"} & kinds
        role = association.acceptor.role_selection[CT.sop_class]
        assert (role.scu_role, role.scp_role) == (True, False)
        assert association.acceptor.maximum_length == 131_072
        assert str(association.acceptor.implementation_class_uid) in claims.text
        assert association.acceptor.implementation_version_name in claims.text
    finally:
        association.release()
