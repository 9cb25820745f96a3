"""Peers against the real server: who gets in by what, how much, without TLS, until when; and who is told what."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pki
import pytest
import scu
from conftest import Finished, Server, changed, dcmtk, find_command
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from pki import DAY, HOUR, Holder
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from storescp import peers
from storescp.peers import PeerFile, key_print

pytestmark = [
    pytest.mark.usefixtures("collected"),
    # pynetdicom leaves sockets to the garbage collector when the server dies under an association.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SECONDS = 30
CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
READ = "peers and certificates read"
KEPT = "peers and certificates stay as they were"
NOT_BOUND = "the certificate is not one of the peer with this calling AE title"
NO_TLS = "may not come without TLS through this listener"
# Accepted; rejected permanently by the user, for the calling or the called AE title; transiently, for a local limit.
ACCEPTED, NOT_CALLING, NOT_CALLED, NOT_NOW = "accepted", "rejected 1 1 3", "rejected 1 1 7", "rejected 2 3 2"
CLOSED = "closed"


class Device(NamedTuple):
    """What a device has to connect with; a folder without TLS is none."""

    folder: Path | None
    stem: str
    calling: str

    def context(self) -> ssl.SSLContext | None:
        if self.folder is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # A device of old: what the server thinks of its certificate is the question here.
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.load_verify_locations(self.folder / "ca.pem")
        if (self.folder / f"{self.stem}.pem").exists():
            context.load_cert_chain(self.folder / f"{self.stem}.pem", self.folder / f"{self.stem}.key")
        return context


def device(server: Server, calling: str = "CT1", stem: str = "") -> Device:
    """Return a device with what the store issued, under any calling AE title."""
    stem = stem or calling
    return Device(server.home / "issued" / stem, stem, calling)


def outside(server: Server, calling: str, holder: Holder, *above: Holder) -> Device:
    """Return a device with a certificate that was issued elsewhere."""
    folder = server.home / "outside"
    stem = f"{calling}-{len(list(folder.glob('*.key'))) if folder.exists() else 0}"
    holder.save(folder, stem, *above)
    shutil.copy(server.home / "tls" / "ca.pem", folder)
    return Device(folder, stem, calling)


def plain(calling: str = "CT1") -> Device:
    return Device(None, "", calling)


def item(kind: int, content: bytes) -> bytes:
    return bytes([kind, 0]) + len(content).to_bytes(2, "big") + content


def associate_request(calling: bytes, called: bytes = b"STRONGROOM", classes: Sequence[str] = ()) -> bytes:
    """Return an A-ASSOCIATE-RQ with any bytes as titles; a context, in implicit little endian, for each class."""
    contexts = b""
    for number, uid in enumerate(classes or [scu.VERIFICATION]):
        syntaxes = item(0x30, uid.encode()) + item(0x40, b"1.2.840.10008.1.2")
        contexts += item(0x20, bytes([2 * number + 1, 0, 0, 0]) + syntaxes)
    user = item(0x51, (16_384).to_bytes(4, "big")) + item(0x52, b"1.2.3.4")
    variable = item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + item(0x50, user)
    content = b"\0\1\0\0" + called.ljust(16) + calling.ljust(16) + bytes(32) + variable
    return b"\1\0" + len(content).to_bytes(4, "big") + content


def pdu(connection: socket.socket) -> bytes:
    """Receive a PDU; empty where the connection ended."""
    try:
        head = connection.recv(6, socket.MSG_WAITALL) if not isinstance(connection, ssl.SSLSocket) else b""
        while len(head) < 6 and (more := connection.recv(6 - len(head))):
            head += more
        content = b""
        while len(content) < int.from_bytes(head[2:6], "big"):
            more = connection.recv(65_536)
            if not more:
                return b""
            content += more
    except OSError:
        return b""
    return head + content


def attempt(
    server: Server,
    who: Device,
    *,
    port: int = 0,
    called: str = "STRONGROOM",
    source: str = "127.0.0.1",
    classes: Sequence[str] = (),
    calling: bytes = b"",
) -> str:
    """Request an association and release it; return what the server answered."""
    raw = socket.create_connection(("127.0.0.1", port or server.port), SECONDS, source_address=(source, 0))
    with contextlib.ExitStack() as stack:
        connection: socket.socket = stack.enter_context(raw)
        context = who.context()
        try:
            if context is not None:
                connection = stack.enter_context(context.wrap_socket(raw, server_hostname="127.0.0.1"))
            connection.sendall(associate_request(calling or who.calling.encode(), called.encode(), classes))
        except OSError:
            return CLOSED
        reply = pdu(connection)
        if reply[:1] == b"\3":
            return f"rejected {reply[7]} {reply[8]} {reply[9]}"
        if reply[:1] != b"\2":
            return CLOSED
        connection.sendall(b"\5\0\0\0\0\4\0\0\0\0")
        assert pdu(connection)[:1] == b"\6"
        # Each context's result, in the order of their ids.
        results = [str(found[0]) for found in re.findall(rb"\x21\x00..[\x00-\xff]\x00([\x00-\x04])\x00", reply, re.S)]
        return " ".join([ACCEPTED, *results]) if classes else ACCEPTED


def refused(server: Server, words: str, who: Device, **options: Any) -> str:
    """Let a device try, which must not get in; return what it was answered when the log has said why."""
    answer = attempt(server, who, **options)
    server.wait_log(rf"warning +gate: connection from 127\.0\.0\.\d+:\d+ refused: .*{words}")
    assert not answer.startswith(ACCEPTED)
    return answer


def write(server: Server, title: str, **settings: Any) -> Path:
    """Write a peer file from nothing, or change some of its settings."""
    file = server.peers / peers.file_name(title)
    found = peers.load(file.read_text(), file) if file.exists() else PeerFile(ae_title=title)
    new = file.with_suffix(".new")
    new.write_text(peers.render(msgspec.structs.replace(found, **settings)))
    return new.replace(file)


def update(server: Server, title: str, **settings: Any) -> None:
    """Change a peer file of a running server, and wait until it is taken up."""
    write(server, title, **settings)
    server.wait_log(READ)


def put(server: Server, name: str, content: bytes) -> Path:
    """Put a file in place, whole, as an admin's script should."""
    file = server.home / name
    new = file.with_suffix(".new")
    new.write_bytes(content)
    return new.replace(file)


def until(what: Callable[[], bool], saying: str) -> None:
    """Wait for what only an attempt tells."""
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, saying
        time.sleep(0.05)


def instance() -> scu.Object:
    """Return an instance that nobody sent yet."""
    uid = generate_uid(None).ljust(len(CT.sop_instance), "1")[: len(CT.sop_instance)]
    return CT._replace(sop_instance=uid, data=CT.data.replace(CT.sop_instance.encode(), uid.encode()))


def request(
    server: Server, who: Device, contexts: Sequence[Any] = (), *, port: int = 0, source: str = "127.0.0.1"
) -> Association:
    """Request an association by pynetdicom, which stays until it is released."""
    entity = AE(who.calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
    context = who.context()
    return entity.associate(
        "127.0.0.1",
        port or server.port,
        list(contexts or [CT.context]),
        ae_title="STRONGROOM",
        bind_address=(source, 0),
        **({"tls_args": (context, "127.0.0.1")} if context else {}),
    )


@contextlib.contextmanager
def associated(*arguments: Any, **options: Any) -> Iterator[Association]:
    association = request(*arguments, **options)
    try:
        assert association.is_established, (association.is_rejected, association.is_aborted)
        yield association
    finally:
        if association.is_established:
            association.release()


def prepared(make_server: Callable[[], Server], *titles: str, **gate: Any) -> Server:
    """Make a store with peers that it issued certificates; not started."""
    server = make_server()
    server.init()
    for title in titles or ("CT1",):
        server.add_peer(title)
    server.set("gate", **({"pack_idle_seconds": 1, "workers": 1} | gate))
    return server


def trusting(server: Server, *authorities: Holder, **lists: bytes) -> None:
    """Have a server trust authorities besides its own, with revocation lists (a file each)."""
    (server.home / "outside.pem").write_text("".join(holder.pem for holder in authorities))
    for name, content in lists.items():
        put(server, f"{name}.crl", content)
    server.set("gate", trust=["tls/ca.pem", "outside.pem"], crls=[f"{name}.crl" for name in lists])


# --- revocation lists

EXPIRED_LIST = r"the revocation list of its authority has expired: put a new one into list\.crl"
REVOKED = "the peer's certificate is not accepted: its authority has revoked it: issue a new one"


class Site(NamedTuple):
    """A server that trusts an authority outside, whose list is in ``list.crl``; and two devices that it issued for."""

    server: Server
    root: Holder
    leaf: Holder
    bad: Device
    good: Device


@pytest.fixture
def site(make_server: Callable[[], Server]) -> Site:
    server = prepared(make_server)
    root = pki.authority("root")
    leaf, good = root.issue("leaf"), root.issue("good")
    write(server, "BAD", keys=[key_print(leaf.certificate)])
    write(server, "GOOD", certificates=[good.pem])
    trusting(server, root, list=pki.pem(root.revoke()))
    return Site(server, root, leaf, outside(server, "BAD", leaf), outside(server, "GOOD", good))


@pytest.mark.parametrize("encoded", [pki.pem, pki.der], ids=["PEM", "DER"])
def test_a_revoked_certificate_is_refused_and_the_log_says_what_to_do_and_others_get_in(
    site: Site, encoded: Callable[[x509.CertificateRevocationList], bytes]
) -> None:
    put(site.server, "list.crl", encoded(site.root.revoke(site.leaf)))
    site.server.start("gate")
    assert refused(site.server, f"{REVOKED}, 'strongroom peer renew' does$", site.bad) == CLOSED
    assert attempt(site.server, site.good) == ACCEPTED
    # The store's own authority has no list: its peers are revoked by their files alone.
    assert attempt(site.server, device(site.server)) == ACCEPTED


def test_a_new_list_is_taken_up_while_the_server_runs(site: Site) -> None:
    server = site.server.start("gate")
    assert attempt(server, site.bad) == ACCEPTED
    put(server, "list.crl", pki.der(site.root.revoke(site.leaf, start=timedelta())))
    server.wait_log(READ)
    assert refused(server, REVOKED, site.bad) == CLOSED
    assert attempt(server, site.good) == ACCEPTED


def test_a_bound_certificate_can_be_revoked_like_any_other(site: Site) -> None:
    server = site.server.start("gate")
    update(server, "BAD", keys=[], certificates=[site.leaf.pem])
    assert attempt(server, site.bad) == ACCEPTED
    put(server, "list.crl", pki.pem(site.root.revoke(site.leaf, start=timedelta())))
    server.wait_log(READ)
    assert refused(server, REVOKED, site.bad) == CLOSED


UNUSABLE = {
    "another authority": lambda root: pki.pem(pki.authority("root").revoke()),
    "a delta": lambda root: pki.pem(root.revoke(extensions=[(x509.DeltaCRLIndicator(1), True)])),
    "an extension": lambda root: pki.der(
        root.revoke(extensions=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.9.9"), b"\5\0"), True)])
    ),
    "no list": lambda root: b"no list\n",
    "two lists": lambda root: pki.pem(root.revoke()) * 2,
    "version": lambda root: pki.der(root.revoke(extensions=[(x509.CRLNumber(7), False)])).replace(
        b"\x02\x01\x01\x30", b"\x02\x01\x09\x30"
    ),
}
UNUSABLE_SAID = {
    "another authority": r"no authority in gate\.trust signed this revocation list",
    "a delta": "a delta or partial revocation list cannot be used: install the complete one",
    "an extension": "a delta or partial revocation list cannot be used: install the complete one",
    "no list": "this is no certificate revocation list",
    "two lists": "this holds 2 revocation lists: put each into a file of its own",
    "version": "this is no certificate revocation list",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_list_that_cannot_be_used_changes_nothing_while_the_server_runs(site: Site, kind: str) -> None:
    put(site.server, "list.crl", pki.pem(site.root.revoke(site.leaf)))
    server = site.server.start("gate")
    workers = server.pids("gate-worker")
    put(server, "list.crl", UNUSABLE[kind](site.root))
    server.wait_log(rf"error +gate: {KEPT}: .*list\.crl: {UNUSABLE_SAID[kind]}")
    # The one that was read before still counts.
    assert refused(server, REVOKED, site.bad) == CLOSED
    assert attempt(server, site.good) == ACCEPTED
    (server.home / "list.crl").unlink()
    server.wait_log(rf"{KEPT}: .*list\.crl: the revocation list cannot be read: No such file or directory")
    assert refused(server, REVOKED, site.bad) == CLOSED
    assert server.pids("gate-worker") == workers


@pytest.mark.parametrize("kind", ["another authority", "a delta"])
def test_a_server_does_not_start_with_a_list_that_cannot_be_used(site: Site, kind: str) -> None:
    put(site.server, "list.crl", UNUSABLE[kind](site.root))
    done = site.server.run("gate")
    assert done.status == 1
    assert re.search(rf"the gate cannot start: .*list\.crl: {UNUSABLE_SAID[kind]}", done.err)
    assert "Traceback" not in done.err


def test_an_expired_list_refuses_every_certificate_of_its_authority_and_no_other(site: Site) -> None:
    put(site.server, "list.crl", pki.pem(site.root.revoke(start=-2 * DAY, end=-DAY)))
    server = site.server.start("gate")
    server.wait_log(r"warning +gate: the revocation list .*list\.crl HAS EXPIRED: every certificate of its authority")
    for who in (site.bad, site.good):
        assert refused(server, EXPIRED_LIST, who) == CLOSED
    assert attempt(server, device(server)) == ACCEPTED
    put(server, "list.crl", pki.pem(site.root.revoke()))
    server.wait_log(READ)
    assert attempt(server, site.good) == ACCEPTED


def test_a_list_that_expires_in_less_than_seven_days_is_warned_of_at_the_start(site: Site) -> None:
    put(site.server, "list.crl", pki.pem(site.root.revoke(end=7 * DAY - HOUR)))
    server = site.server.start("gate")
    server.wait_log(r"warning +gate: the revocation list .*list\.crl expires on 20\d\d-.*Z: then all .* are refused")
    assert attempt(server, site.good) == ACCEPTED


@pytest.mark.parametrize("revoked", ["the leaf", "the intermediate authority"])
def test_a_list_of_each_authority_in_the_chain_counts(make_server: Callable[[], Server], revoked: str) -> None:
    server = prepared(make_server)
    root = pki.authority("root")
    middle = root.issue("middle", ca=True)
    leaf, other = middle.issue("leaf"), middle.issue("other")
    direct = root.issue("direct")
    write(server, "DEEP", keys=[key_print(leaf.certificate), key_print(other.certificate)])
    write(server, "DIRECT", keys=[key_print(direct.certificate)])
    of_leaf = revoked == "the leaf"
    lists = {
        "root": pki.pem(root.revoke(*([] if of_leaf else [middle]))),
        "middle": pki.pem(middle.revoke(*([leaf] if of_leaf else []))),
    }
    trusting(server, root, middle, **lists)
    server.start("gate")
    assert refused(server, REVOKED, outside(server, "DEEP", leaf, middle)) == CLOSED
    said = attempt(server, outside(server, "DEEP", other, middle))
    assert said == (ACCEPTED if of_leaf else CLOSED)
    assert attempt(server, outside(server, "DIRECT", direct)) == ACCEPTED


def test_a_peer_pinned_by_certificate_whose_authority_has_no_list_gets_in_beside_lists(site: Site) -> None:
    stranger = pki.authority("stranger")
    pinned = stranger.issue("pinned")
    write(site.server, "PINNED", certificates=[pinned.pem])
    server = site.server.start("gate")
    assert attempt(server, outside(server, "PINNED", pinned)) == ACCEPTED
    assert attempt(server, outside(server, "PINNED", pinned, stranger)) == ACCEPTED


# --- what binds a peer


class Bound(NamedTuple):
    """A server that trusts two authorities and an intermediate one's root, shared by the tests of a section."""

    server: Server
    root: Holder
    other: Holder


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bound]:
    server = Server(tmp_path_factory.mktemp("s"))
    root, other = pki.authority("root"), pki.authority("other")
    try:
        prepared(lambda: server, "CT1", "CT2")
        trusting(server, root, other)
        yield Bound(server.start("gate"), root, other)
        assert server.stop() == 0
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()


def test_a_peer_bound_by_key_gets_in_with_any_certificate_of_that_key_and_with_no_other(bound: Bound) -> None:
    server = bound.server
    first = bound.root.issue("first")
    update(server, "KEY", keys=[key_print(first.certificate)])
    assert attempt(server, outside(server, "KEY", first)) == ACCEPTED
    assert attempt(server, outside(server, "KEY", bound.other.issue("renewed", key=first.key))) == ACCEPTED
    other = outside(server, "KEY", bound.root.issue("first"))
    assert refused(server, f"KEY: {NOT_BOUND}", other) == NOT_CALLING


def test_a_key_alone_opens_nothing_where_no_trusted_authority_signed_for_it(bound: Bound) -> None:
    server = bound.server
    key = pki.new_key()
    update(server, "KEY2", keys=[key_print(bound.root.issue("x", key=key).certificate)])
    assert refused(server, "self-signed and in no peer file", outside(server, "KEY2", pki.make("x", key=key))) == CLOSED
    stranger = pki.authority("stranger").issue("x", key=key)
    assert refused(server, r"its authority is not in gate\.trust", outside(server, "KEY2", stranger)) == CLOSED


def test_a_peer_bound_by_name_gets_in_with_that_name_of_that_authority_alone(bound: Bound) -> None:
    server = bound.server
    name = "ct9.example"
    update(server, "NAMED", names=[f"dns:{name}"], authority=key_print(bound.root.certificate))
    assert (
        attempt(server, outside(server, "NAMED", bound.root.issue("x", names=["a.example", "CT9.Example"]))) == ACCEPTED
    )
    for holder in (
        bound.root.issue("x", names=["ct8.example"]),
        bound.root.issue(name),
        bound.root.issue("x", names=["*.example"]),
        # Another authority that is trusted, too.
        bound.other.issue("x", names=[name]),
    ):
        assert refused(server, f"NAMED: {NOT_BOUND}", outside(server, "NAMED", holder)) == NOT_CALLING


def test_the_authority_of_a_name_may_be_an_intermediate_one_that_the_device_sends(bound: Bound) -> None:
    server = bound.server
    middle, beside = (bound.root.issue("middle", ca=True) for _ in range(2))
    update(server, "MIDDLE", names=["ip:10.0.0.9"], authority=key_print(middle.certificate))
    good = outside(server, "MIDDLE", middle.issue("x", names=["10.0.0.9"]), middle)
    assert attempt(server, good) == ACCEPTED
    for who in (
        outside(server, "MIDDLE", beside.issue("x", names=["10.0.0.9"]), beside),
        outside(server, "MIDDLE", bound.root.issue("x", names=["10.0.0.9"])),
    ):
        assert refused(server, f"MIDDLE: {NOT_BOUND}", who) == NOT_CALLING


@pytest.mark.parametrize("name", ["evil", "root"])
@pytest.mark.parametrize("sent", [True, False], ids=["with its chain", "alone"])
def test_a_certificate_that_another_peers_pinned_authority_signed_proves_no_name(
    bound: Bound, name: str, sent: bool
) -> None:
    server = bound.server
    update(server, "VICTIM", names=["dns:victim.example"], authority=key_print(bound.root.certificate))
    evil = pki.authority(name)
    update(server, "EVIL", certificates=[evil.pem])
    # Trusted for itself: as the peer that it is bound to.
    assert attempt(server, outside(server, "EVIL", evil)) == ACCEPTED
    forged = evil.issue("x", names=["victim.example"])
    chain = [evil] if sent else []
    for title in ("VICTIM", "EVIL"):
        assert refused(server, f"{title}: {NOT_BOUND}", outside(server, title, forged, *chain)) == NOT_CALLING
    # Nor where the peer file asks for that very authority: it is not in gate.trust.
    update(server, "VICTIM", authority=key_print(evil.certificate))
    assert refused(server, f"VICTIM: {NOT_BOUND}", outside(server, "VICTIM", forged, *chain)) == NOT_CALLING
    (server.peers / "EVIL.toml").unlink()
    server.wait_log(READ)


def test_a_certificate_that_a_trusted_leaf_signed_is_refused(bound: Bound) -> None:
    server = bound.server
    leaf = bound.root.issue("leaf")
    update(
        server, "LEAF", certificates=[leaf.pem], names=["dns:l.example"], authority=key_print(bound.root.certificate)
    )
    forged = leaf.issue("x", names=["l.example"])
    assert refused(server, "the peer's certificate is not accepted", outside(server, "LEAF", forged, leaf)) == CLOSED


def test_a_stolen_certificate_opens_no_other_ae_title(bound: Bound) -> None:
    server = bound.server
    assert attempt(server, device(server, "CT2")) == ACCEPTED
    assert refused(server, f"calling AE title CT1: {NOT_BOUND}", device(server, "CT1", "CT2")) == NOT_CALLING


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"start": -2 * DAY, "end": -HOUR}, "it has expired; 'strongroom peer renew' issues a new one"),
        ({"start": HOUR}, "it is not valid yet; check the clocks of the peer and of this server"),
    ],
    ids=["expired", "not yet valid"],
)
def test_a_certificate_out_of_its_time_is_refused_however_it_is_bound(
    bound: Bound, times: dict[str, timedelta], words: str
) -> None:
    server = bound.server
    for title, holder in (("OLD1", bound.root.issue("x", **times)), ("OLD2", pki.make("x", **times))):
        update(server, title, certificates=[holder.pem], keys=[key_print(holder.certificate)])
        assert refused(server, words, outside(server, title, holder)) == CLOSED


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "by key"])
def test_an_rsa_key_of_1024_bits_is_refused(bound: Bound, pinned: bool) -> None:
    server = bound.server
    weak = rsa.generate_private_key(65537, 1024)
    holder = pki.make("x", key=weak) if pinned else bound.root.issue("x", key=weak)
    title = f"WEAK{pinned}"
    update(server, title, certificates=[holder.pem] if pinned else [], keys=[key_print(holder.certificate)])
    words = "its key is too small; RSA needs 2048 bits: issue a new one"
    assert refused(server, words, outside(server, title, holder)) == CLOSED


@pytest.mark.needs("openssl")
def test_a_certificate_signed_with_sha_1_is_refused(bound: Bound, tmp_path: Path) -> None:
    server = bound.server
    # cryptography signs with no SHA-1 any more.
    key = pki.new_key()
    bound.root.save(tmp_path, "root")
    Holder(bound.root.certificate, key).save(tmp_path, "leaf")
    run = [str(find_command("openssl"))]
    subprocess.run(
        [*run, "req", "-new", "-key", tmp_path / "leaf.key", "-subj", "/CN=sha1", "-out", tmp_path / "leaf.csr"],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            *(*run, "x509", "-req", "-sha1", "-set_serial", "7", "-days", "1"),
            *("-CA", tmp_path / "root.pem", "-CAkey", tmp_path / "root.key"),
            *("-in", tmp_path / "leaf.csr", "-out", tmp_path / "leaf.pem"),
        ],
        check=True,
        capture_output=True,
    )
    signed = Holder(x509.load_pem_x509_certificate((tmp_path / "leaf.pem").read_bytes()), key)
    assert signed.certificate.signature_algorithm_oid._name == "ecdsa-with-SHA1"
    update(server, "SHA1", keys=[key_print(signed.certificate)])
    words = "it is signed with SHA-1 or weaker: issue a new one"
    assert refused(server, words, outside(server, "SHA1", signed)) == CLOSED


def test_the_servers_certificate_can_be_replaced_while_it_runs(make_server: Callable[[], Server]) -> None:
    server = prepared(make_server).start("gate")
    who = device(server)
    held = request(server, who)
    assert held.is_established
    authority = pki.authority("new")
    new = authority.issue("127.0.0.1", names=["127.0.0.1"], server=True)
    (server.home / "tls" / "server.pem").write_text(new.pem)
    # Between the two they do not belong together, and the old ones stay.
    server.wait_log(f"{KEPT}: a certificate or key cannot be read")
    assert attempt(server, who) == ACCEPTED
    (server.home / "tls" / "server.key").write_text(new.key_pem)
    server.wait_log(READ)
    assert refused(server, "the peer does not know the authority of this server's certificate", who) == CLOSED
    assert who.folder is not None
    (who.folder / "ca.pem").write_text(authority.pem)
    assert attempt(server, who) == ACCEPTED
    # Who was connected stays so.
    assert scu.store(held, instance()).Status == 0
    held.release()


def test_text_that_is_no_ascii_in_a_peer_file_does_not_end_the_gate(bound: Bound) -> None:
    server = bound.server
    pinned = pki.make("x")
    workers = server.pids("gate-worker")
    update(server, "TEXT", certificates=[f"# Gerät in Raum 3\n{pinned.pem}"])
    assert attempt(server, outside(server, "TEXT", pinned)) == ACCEPTED
    assert server.pids("gate-worker") == workers


# --- where it comes from, and what it may do


def test_a_peer_gets_in_from_its_addresses_alone(bound: Bound) -> None:
    server, who = bound.server, device(bound.server)
    update(server, "CT1", addresses=["127.0.0.2/32", "10.0.0.0/8"])
    try:
        assert attempt(server, who, source="127.0.0.2") == ACCEPTED
        words = "calling AE title CT1: the peer with this calling AE title may not come from this address"
        assert refused(server, words, who) == NOT_CALLING
        assert refused(server, words, who, source="127.0.0.3") == NOT_CALLING
        assert attempt(server, device(server, "CT2")) == ACCEPTED
    finally:
        update(server, "CT1", addresses=[])
    assert attempt(server, who) == ACCEPTED


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        # Verification, CT and MR, each accepted (0) or refused as an abstract syntax (3).
        ({}, "accepted 0 0 0"),
        ({"operations": ["echo"]}, "accepted 0 3 3"),
        ({"operations": ["store"]}, "accepted 3 0 0"),
        ({"operations": []}, "accepted 3 3 3"),
        ({"operations": ["commit", "find", "move", "get"]}, "accepted 3 3 3"),
        ({"sop_classes": [MR_IMAGE]}, "accepted 0 3 0"),
        ({"sop_classes": [MR_IMAGE], "operations": ["echo"]}, "accepted 0 3 3"),
        # Not of the standard: that is what private_sop_classes is for.
        ({"sop_classes": ["1.2.3"]}, "accepted 0 3 3"),
        ({"private_sop_classes": ["1.2.3"]}, "accepted 0 0 0"),
    ],
)
def test_a_peer_may_do_what_its_file_says_and_no_more(bound: Bound, settings: dict[str, Any], answer: str) -> None:
    server = bound.server
    changes = {"operations": ["echo", "store"], "sop_classes": [], "private_sop_classes": []} | settings
    # The description makes it another file each time.
    update(server, "CT2", description=repr(settings), **changes)
    assert attempt(server, device(server, "CT2"), classes=[scu.VERIFICATION, scu.CT_IMAGE, MR_IMAGE]) == answer


def test_a_peer_that_may_only_store_stores(bound: Bound) -> None:
    server = bound.server
    update(server, "CT2", description="stores", operations=["store"], sop_classes=[scu.CT_IMAGE])
    contexts = [CT.context, build_context(scu.VERIFICATION), build_context(MR_IMAGE)]
    with associated(server, device(server, "CT2"), contexts) as association:
        assert [c.abstract_syntax for c in association.accepted_contexts] == [scu.CT_IMAGE]
        assert scu.store(association, instance()).Status == 0
    server.wait_log("association .* released: 1 stored, 0 refused")


# --- how much


@pytest.fixture
def limited(make_server: Callable[[], Server]) -> Server:
    return prepared(make_server, "CT1", "CT2", workers=2)


def worker_of(server: Server, association: Association) -> int:
    """Return the worker that serves an association."""
    own = association.dul.socket.socket.getsockname()[1]
    [inode] = [inode for inode, local, remote in connections("01") if (local, remote) == (server.port, own)]
    [pid] = [pid for pid in server.pids("gate-worker") if inode in sockets_of(pid)]
    return pid


def sockets_of(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry.path))
    return found


def connections(state: str) -> list[tuple[str, int, int]]:
    """Return TCP sockets in a state: inode, local and remote port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        (f"socket:[{fields[9]}]", int(fields[1].split(":")[1], 16), int(fields[2].split(":")[1], 16))
        for fields in lines
        if fields[3] == state
    ]


def test_a_peer_has_its_associations_over_all_workers_and_one_more_when_one_ended(limited: Server) -> None:
    write(limited, "CT1", maximum_associations=1)
    limited.start("gate")
    who = device(limited)
    words = "calling AE title CT1: it has as many associations as it may, 1"
    with associated(limited, who) as first:
        # Whichever worker it comes to: connections go to the one that has fewest.
        for _ in range(3):
            assert refused(limited, words, who) == NOT_NOW
        assert attempt(limited, device(limited, "CT2")) == ACCEPTED
        assert scu.store(first, instance()).Status == 0
    until(lambda: attempt(limited, who) == ACCEPTED, "what ended makes no room")


def test_what_a_killed_worker_held_of_a_peers_associations_is_free_again(limited: Server) -> None:
    write(limited, "CT1", maximum_associations=1)
    limited.start("gate")
    who = device(limited)
    held = request(limited, who)
    assert held.is_established
    assert attempt(limited, who) == NOT_NOW
    os.kill(worker_of(limited, held), signal.SIGKILL)
    limited.wait_log(r"the gate's worker [12] ended with status -9")
    held.join(SECONDS)
    until(lambda: attempt(limited, who) == ACCEPTED, "the killed worker's association still counts")
    with associated(limited, who):
        assert attempt(limited, who) == NOT_NOW


def test_an_association_that_is_refused_takes_no_place(limited: Server) -> None:
    write(limited, "CT1", maximum_associations=1)
    limited.start("gate")
    for _ in range(3):
        assert attempt(limited, device(limited), called="OTHER") == NOT_CALLED
        assert attempt(limited, device(limited, "CT1", "CT2")) == NOT_CALLING
    assert attempt(limited, device(limited)) == ACCEPTED


def test_a_peer_that_is_too_fast_is_slowed_down_and_nothing_is_refused(limited: Server) -> None:
    write(limited, "CT1", objects_per_minute=12)
    limited.start("gate")
    begun = time.monotonic()
    with associated(limited, device(limited)) as association:
        assert [scu.store(association, instance()).Status for _ in range(15)] == [0] * 15
    # Twelve at once and then one in five seconds; that the first process counts late costs an object.
    assert time.monotonic() - begun > 3


def test_a_peer_that_waits_does_not_hold_up_the_stop(limited: Server) -> None:
    write(limited, "CT1", objects_per_minute=1)
    limited.start("gate")
    association = request(limited, device(limited))
    assert scu.store(association, instance()).Status == 0
    [first] = limited.pids("gate")

    def stop() -> None:
        os.kill(first, signal.SIGTERM)

    done, handlers = scu.midway(stop, after=4)
    association.bind(*handlers[0])
    # The second is answered at once or after the stop; the third would wait for a minute.
    assert scu.store(association, instance()).Status == 0
    with contextlib.suppress(AssertionError):
        assert scu.store(association, instance()).Status == 0
    assert limited.stop() == 0
    assert done.done()


def refusal(association: Association) -> Any:
    """Store until the server refuses: the count is a message behind."""
    for _ in range(10):
        response = scu.store(association, instance())
        if response.Status:
            return response
    raise AssertionError("nothing is refused")


def test_more_than_the_bytes_of_a_day_is_refused_with_a700_and_why_until_the_limit_is_raised(limited: Server) -> None:
    write(limited, "CT1", bytes_per_day=len(CT.data) * 2)
    limited.start("gate")
    with associated(limited, device(limited)) as association:
        for _ in range(2):
            assert scu.store(association, instance()).Status == 0
        response = refusal(association)
        assert response.Status == 0xA700
        assert response.ErrorComment == "out of resources: this peer's bytes of the day are used up"
        assert scu.store(association, instance()).Status == 0xA700
    limited.wait_log(r"refused with A700: out of resources: this peer's bytes of the day are used up")
    # On every worker; and only this peer's.
    for _ in range(2):
        with associated(limited, device(limited)) as one, associated(limited, device(limited)) as two:
            assert [scu.store(a, instance()).Status for a in (one, two)] == [0xA700, 0xA700]
    with associated(limited, device(limited, "CT2")) as other:
        assert scu.store(other, instance()).Status == 0
    update(limited, "CT1", bytes_per_day=len(CT.data) * 100)
    with associated(limited, device(limited)) as association:
        assert scu.store(association, instance()).Status == 0


# --- without TLS


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def open_plaintext(server: Server, **changes: Any) -> int:
    """Configure a listener without TLS for CT1; a change to None leaves a key out. Return its port."""
    port = free_port()
    keys = {
        "listen": f"127.0.0.1:{port}",
        "plaintext": "behind the VPN of CT1",
        "addresses": ["127.0.0.1"],
        "peers": ["CT1"],
    } | changes
    # A JSON string or list of them is one in TOML, too.
    table = ", ".join(
        f"{key} = {msgspec.json.encode(value).decode()}" for key, value in keys.items() if value is not None
    )
    text, count = re.subn(
        r"(?m)^plaintext = \[.*\]$", lambda _: f"plaintext = [{{ {table} }}]", server.config.read_text()
    )
    assert count == 1
    server.config.write_text(text)
    return port


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Server:
    server = Server(tmp_path_factory.mktemp("s"))
    server.init()
    return server


def test_nothing_listens_without_tls_where_none_is_configured(bound: Bound) -> None:
    [first] = bound.server.pids("gate")
    own = [port for inode, port, _ in connections("0A") if inode in sockets_of(first)]
    assert own == [bound.server.port]
    assert not any("WITHOUT TLS" in line for line in bound.server.log)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plaintext": None}, "gate.plaintext: object missing required field `plaintext`"),
        ({"plaintext": " "}, "gate.plaintext[0].plaintext: say why this listener has no TLS"),
        ({"addresses": None}, "gate.plaintext: object missing required field `addresses`"),
        (
            {"addresses": []},
            "gate.plaintext[0].addresses: names none; a listener without TLS is for given addresses only",
        ),
        ({"addresses": ["10.0.0.1/8"]}, "gate.plaintext[0].addresses: '10.0.0.1/8' is no address or network"),
        ({"peers": None}, "gate.plaintext: object missing required field `peers`"),
        ({"peers": []}, "gate.plaintext[0].peers: names none; a listener without TLS is for given peers only"),
        ({"peers": ["A\\B"]}, "gate.plaintext[0].peers: 'A\\B' is no AE title"),
        ({"listen": "localhost"}, "gate.plaintext[0].listen: 'localhost' is no address with a port"),
        ({"listen": "127.0.0.1:0"}, "gate.plaintext[0].listen: '127.0.0.1:0' is also in gate.listen"),
        ({"tls": "no"}, "gate.plaintext: object contains unknown field `tls`"),
    ],
)
def test_a_listener_without_tls_is_configured_whole_or_the_gate_does_not_start(
    unstarted: Server, changes: dict[str, Any], said: str
) -> None:
    open_plaintext(unstarted, **changes)
    done = unstarted.run("gate")
    assert done.status == 2
    assert said in done.err


@pytest.fixture
def open_server(make_server: Callable[[], Server]) -> tuple[Server, int]:
    """Make a server with a listener without TLS for CT1 and OTHER; CT1 and CT2 may come without TLS, OTHER not."""
    server = prepared(make_server, "CT1", "OTHER")
    write(server, "CT1", plaintext=True)
    write(server, "CT2", plaintext=True)
    return server, open_plaintext(server, peers=["CT1", "OTHER"])


def test_what_comes_without_tls_from_the_named_peer_is_stored_and_in_the_archive(
    open_server: tuple[Server, int],
) -> None:
    server, port = open_server
    server.start()
    said = f":{port} listens WITHOUT TLS for CT1, OTHER: behind the VPN of CT1"
    # Before or after the word that it is ready.
    if not any(said in line for line in server.log):
        server.wait_log(said)
    sent = instance()
    with associated(server, plain(), port=port) as association:
        assert scu.store(association, sent).Status == 0
    server.wait_admitted()
    [row] = server.list("instance", "--aet", "CT1")
    assert row["sop"] == sent.sop_instance
    server.ok("export", "--sop", sent.sop_instance, "--output", server.home / "out.dcm")
    assert scu.raw_data_set(server.home / "out.dcm") == sent.data
    # The same peer still comes by TLS.
    assert attempt(server, device(server)) == ACCEPTED


def test_who_is_not_named_or_may_not_come_without_tls_is_refused(open_server: tuple[Server, int]) -> None:
    server, port = open_server
    server.start("gate")
    assert attempt(server, plain(), port=port) == ACCEPTED
    for title in ("CT2", "OTHER"):
        assert refused(server, f"calling AE title {title}: .*{NO_TLS}", plain(title), port=port) == NOT_CALLING
    assert refused(server, "no peer has this calling AE title", plain("NOBODY"), port=port) == NOT_CALLING
    assert refused(server, "the called AE title", plain(), port=port, called="OTHER") == NOT_CALLED
    update(server, "CT1", plaintext=False)
    assert refused(server, f"CT1: .*{NO_TLS}", plain(), port=port) == NOT_CALLING
    assert attempt(server, device(server)) == ACCEPTED


def test_a_peers_own_addresses_and_limits_count_without_tls_too(open_server: tuple[Server, int]) -> None:
    server, port = open_server
    write(server, "CT1", maximum_associations=1, operations=["echo"])
    server.start("gate")
    with associated(server, device(server), [build_context(scu.VERIFICATION)]):
        assert attempt(server, plain(), port=port) == NOT_NOW
    classes = [scu.VERIFICATION, scu.CT_IMAGE]
    until(lambda: attempt(server, plain(), port=port, classes=classes) == "accepted 0 3", "no room, or other rights")
    update(server, "CT1", addresses=["127.0.0.9"])
    assert refused(server, "may not come from this address", plain(), port=port) == NOT_CALLING


def test_another_address_is_closed_at_once(open_server: tuple[Server, int]) -> None:
    server, port = open_server
    server.start("gate")
    with socket.create_connection(("127.0.0.1", port), SECONDS, source_address=("127.0.0.2", 0)) as sock:
        assert sock.recv(1) == b""
    server.wait_log(r"connection from 127\.0\.0\.2:\d+ closed: this listener without TLS is for other addresses")
    assert attempt(server, device(server), source="127.0.0.2") == ACCEPTED


def test_a_certificate_does_not_help_where_no_tls_is_spoken(open_server: tuple[Server, int]) -> None:
    server, port = open_server
    server.start("gate")
    assert attempt(server, device(server), port=port) == CLOSED
    server.wait_log(r"connection from 127\.0\.0\.1:\d+ refused: ")
    assert attempt(server, plain(), port=port) == ACCEPTED


@pytest.mark.needs("storescu")
def test_storescu_without_tls_stores_through_the_listener_and_not_through_the_other(
    open_server: tuple[Server, int],
) -> None:
    server, port = open_server
    server.start("gate")
    file = str(get_testdata_file("CT_small.dcm"))
    arguments = ("-v", "-aet", "CT1", "-aec", "STRONGROOM", "127.0.0.1")
    done = dcmtk("storescu", *arguments, str(port), file)
    assert done.status == 0, done.err
    server.wait_log("association .* released: 1 stored, 0 refused")
    assert dcmtk("storescu", *arguments, str(server.port), file).status != 0
    server.wait_log("refused: the peer does not speak TLS; switch TLS on at the peer")


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (associate_request(b"CT1"), "the peer does not speak TLS; switch TLS on at the peer"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "the peer speaks HTTP, not DICOM over TLS"),
    ],
    ids=["A-ASSOCIATE", "HTTP"],
)
def test_what_comes_without_tls_where_it_must_not_is_told_in_words(bound: Bound, sent: bytes, words: str) -> None:
    with socket.create_connection(("127.0.0.1", bound.server.port), SECONDS) as sock:
        sock.sendall(sent)
        bound.server.wait_log(rf"connection from 127\.0\.0\.1:{sock.getsockname()[1]} refused: {words}")


# --- peer renew


def last_used(server: Server, title: str = "CT1") -> list[str | None]:
    [found] = [p for p in server.ok("peer", "list", "--json").json()["items"] if p["ae_title"] == title]
    return [entry["last_used"] for entry in found["bound"]]


def test_a_certificate_is_renewed_without_a_gap_and_finished_once_the_new_one_is_used(server: Server) -> None:
    old = device(server)
    assert attempt(server, old) == ACCEPTED
    until(lambda: last_used(server)[0] is not None, "the use of a certificate does not come to be known")
    assert server.run("peer", "renew", "CT1", "--finish").status == 1
    folder = server.home / "issued" / "new"
    server.ok("peer", "renew", "CT1", "--issue", folder, "--host", "127.0.0.1")
    server.wait_log(READ)
    new = Device(folder, "CT1", "CT1")
    # Both work; what is not used yet is not finished.
    assert attempt(server, old) == ACCEPTED
    assert last_used(server)[1] is None
    done = server.run("peer", "renew", "CT1", "--finish")
    assert done.status == 1
    assert "the new certificate of CT1 was not used yet" in done.err
    assert "hint: install it at the device and send an echo" in done.err
    third = server.run("peer", "renew", "CT1", "--issue", server.home / "third")
    assert (third.status, "has two certificates already" in third.err) == (1, True)
    assert attempt(server, old) == ACCEPTED
    assert attempt(server, new) == ACCEPTED
    until(lambda: last_used(server)[1] is not None, "the use of the new certificate does not come to be known")
    first, second = last_used(server)
    assert first is not None
    assert second is not None
    assert second[:10] in server.ok("peer", "list").out
    server.ok("peer", "renew", "CT1", "--finish")
    server.wait_log(READ)
    assert refused(server, NOT_BOUND, old) == NOT_CALLING
    assert attempt(server, new) == ACCEPTED
    assert last_used(server)[0] is not None


def test_a_new_certificate_that_was_never_used_is_finished_by_force_alone(make_server: Callable[[], Server]) -> None:
    server = prepared(make_server).start()
    holder = pki.make("new")
    file = server.home / "new.pem"
    file.write_text(holder.pem)
    server.ok("peer", "renew", "CT1", "--certificate", file)
    server.wait_log(READ)
    assert server.run("peer", "renew", "CT1", "--finish").status == 1
    server.ok("peer", "renew", "CT1", "--finish", "--force")
    server.wait_log(READ)
    assert attempt(server, outside(server, "CT1", holder)) == ACCEPTED
    assert refused(server, NOT_BOUND, device(server)) == NOT_CALLING
    again = server.run("peer", "renew", "CT1", "--certificate", file)
    assert (again.status, "this certificate is bound to CT1 already" in again.err) == (1, True)


def test_what_a_peer_may_stays_as_it_was_when_its_certificate_is_renewed(make_server: Callable[[], Server]) -> None:
    server = prepared(make_server)
    write(
        server, "CT1", description="CT, room 3", maximum_associations=3, addresses=["127.0.0.0/8"], operations=["store"]
    )
    before = peers.read(server.peers / "CT1.toml")
    server.ok("peer", "renew", "CT1", "--issue", server.home / "new", "--host", "127.0.0.1")
    after = peers.read(server.peers / "CT1.toml")
    assert after.fingerprints > before.fingerprints
    kept = {"certificates": before.certificates, "fingerprints": before.fingerprints}
    assert msgspec.structs.replace(after, **kept) == before


# --- peer test


class Watching:
    """A ``peer test`` that is under way."""

    def __init__(self, server: Server, title: str, seconds: int) -> None:
        command = [sys.executable, "-m", "storescp", "--config", str(server.config)]
        command += ["peer", "test", title, "--seconds", str(seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.before = ""
        while "waiting up to" not in self.before:
            line = self.process.stdout.readline()
            assert line, self.before
            self.before += line

    def ended(self) -> Finished:
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return Finished(subprocess.CompletedProcess([], self.process.returncode, out, err))


def watched(server: Server, action: Callable[[], Any], title: str = "CT1") -> Finished:
    """Return what ``peer test`` says of what happens."""
    watching = Watching(server, title, 60)
    action()
    return watching.ended()


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bound]:
    server = Server(tmp_path_factory.mktemp("s"))
    root = pki.authority("root")
    try:
        prepared(lambda: server, "CT1", "CT2")
        revoked, good = root.issue("revoked"), root.issue("good")
        write(server, "LISTED", keys=[key_print(revoked.certificate), key_print(good.certificate)])
        revoked.save(server.home / "outside", "revoked")
        shutil.copy(server.home / "tls" / "ca.pem", server.home / "outside")
        trusting(server, root, list=pki.pem(root.revoke(revoked)))
        yield Bound(server.start("gate"), root, root)
        assert server.stop() == 0
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()


def test_peer_test_says_that_a_good_peer_works(tested: Bound) -> None:
    server = tested.server
    watching = Watching(server, "CT1", 60)
    assert "the device must call AE title STRONGROOM at 127.0.0.1:0 as CT1" in watching.before
    # Others meanwhile are shown, and do not end it.
    assert attempt(server, device(server, "CT2")) == ACCEPTED
    with associated(server, device(server), [build_context(scu.VERIFICATION)]) as association:
        assert association.send_c_echo().Status == 0
    done = watching.ended()
    assert done.status == 0, done.out
    assert done.out.splitlines()[-1] == "peer CT1 works"
    assert "association requested by 'CT2' of 'STRONGROOM'" in done.out
    assert "(bound to this peer)" in done.out
    assert "association accepted with 1 of 1 presentation contexts" in done.out
    assert not (server.home / "spool" / "public" / "peer-test").exists()


def without_certificate(server: Server) -> Device:
    folder = server.home / "none"
    folder.mkdir(exist_ok=True)
    shutil.copy(server.home / "tls" / "ca.pem", folder)
    return Device(folder, "none", "CT1")


def other_authority(server: Server) -> Device:
    folder = server.home / "foreign"
    shutil.copytree(server.home / "issued" / "CT1", folder, dirs_exist_ok=True)
    (folder / "ca.pem").write_text(pki.authority("foreign").pem)
    return Device(folder, "CT1", "CT1")


def http(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_log("speaks HTTP")


@pytest.mark.parametrize(
    ("action", "step", "advice"),
    [
        (
            lambda s: attempt(s, device(s, "WRONG", "CT1")),
            "calling AE title WRONG: no peer has this calling AE title",
            "set the calling AE title CT1 at the device, or add a peer of that title",
        ),
        (
            lambda s: attempt(s, device(s, "CT1", "CT2")),
            f"calling AE title CT1: {NOT_BOUND}",
            "bind it: 'strongroom peer renew CT1 --certificate FILE', or install the issued one",
        ),
        (
            lambda s: attempt(s, plain()),
            "the peer does not speak TLS",
            "switch TLS on in the device's settings for this destination",
        ),
        (http, "the peer speaks HTTP", "set the device up for DICOM over TLS"),
        (
            lambda s: attempt(s, without_certificate(s)),
            "the peer sent no certificate",
            "install the device's key and certificate; the sheet of 'peer add --issue' names them",
        ),
        (
            lambda s: attempt(s, device(s), called="OTHER"),
            "calling AE title CT1: the called AE title is not this server's",
            "set the called AE title STRONGROOM at the device",
        ),
        (
            lambda s: attempt(s, outside(s, "CT1", pki.make("x"))),
            "it is self-signed and in no peer file",
            "bind it: 'strongroom peer renew CT1 --certificate FILE', or install the issued one",
        ),
        (
            lambda s: attempt(s, other_authority(s)),
            "the peer does not know the authority of this server's certificate",
            "install ca.pem of 'peer add --issue' at the device as a trusted authority",
        ),
        (
            lambda s: attempt(s, device(s), classes=["1.2.840.10008.5.1.4.1.2.2.1"]),
            "association accepted with 0 of 1 presentation contexts",
            "nothing that it proposes is allowed: see operations and sop_classes",
        ),
    ],
    ids=["calling", "certificate", "no TLS", "HTTP", "none", "called", "self-signed", "authority", "contexts"],
)
def test_peer_test_names_the_step_that_fails_and_what_to_do(
    tested: Bound, action: Callable[[Server], Any], step: str, advice: str
) -> None:
    done = watched(tested.server, lambda: action(tested.server))
    assert done.status == 1, done.out
    assert step in done.out
    assert advice in done.out.splitlines()[-1]


def test_peer_test_tells_a_revoked_certificate_from_an_expired_list(tested: Bound) -> None:
    server = tested.server
    who = Device(server.home / "outside", "revoked", "LISTED")
    done = watched(server, lambda: attempt(server, who), "LISTED")
    assert (done.status, done.out.splitlines()[-1]) == (
        1,
        "it fails here; issue a new one: 'strongroom peer renew LISTED --issue FOLDER'",
    )
    put(server, "list.crl", pki.pem(tested.root.revoke(start=-HOUR / 2, end=-HOUR / 4)))
    server.wait_log(READ)
    done = watched(server, lambda: attempt(server, who), "LISTED")
    assert done.status == 1
    assert "put a new one into list.crl" in done.out
    assert "put its authority's current list in place" in done.out.splitlines()[-1]


def test_peer_test_does_not_call_an_association_that_breaks_off_a_success(tested: Bound) -> None:
    server = tested.server

    def abort() -> None:
        association = request(server, device(server))
        assert association.is_established
        association.abort()

    done = watched(server, abort)
    assert done.status == 1, done.out
    assert "the association does not end by a release" in done.out


def test_peer_test_says_that_nothing_came(tested: Bound) -> None:
    done = Watching(tested.server, "CT1", 1).ended()
    assert done.status == 5
    assert "nothing connected to 127.0.0.1:0: is the gate running" in done.err


def test_a_second_peer_test_takes_nothing_from_the_first_and_one_that_was_killed_stops_none(tested: Bound) -> None:
    server = tested.server
    killed = Watching(server, "CT1", 60)
    killed.process.kill()
    killed.ended()
    watching = Watching(server, "CT1", 60)
    second = server.run("peer", "test", "CT1")
    assert (second.status, "another 'peer test' is under way" in second.err) == (1, True)
    assert attempt(server, device(server)) == ACCEPTED
    assert watching.ended().status == 0


def test_peer_test_works_for_a_peer_without_tls_and_names_its_listener(open_server: tuple[Server, int]) -> None:
    server, port = open_server
    server.start("gate")
    watching = Watching(server, "CT1", 60)
    assert f"127.0.0.1:{port} (without TLS)" in watching.before
    assert attempt(server, plain(), port=port) == ACCEPTED
    done = watching.ended()
    assert (done.status, "without TLS" in done.out) == (0, True)
    done = watched(server, lambda: attempt(server, plain("OTHER"), port=port), "OTHER")
    assert done.status == 1
    assert "switch TLS on at the device, or allow it" in done.out.splitlines()[-1]


def test_peer_test_of_a_peer_that_is_not_there_says_so(tested: Bound) -> None:
    done = tested.server.run("peer", "test", "NOBODY")
    assert (done.status, "there is no peer NOBODY" in done.err) == (5, True)


# --- what the log holds


def test_the_log_holds_no_patient_and_no_instance_whatever_becomes_of_an_object(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = prepared(make_server)
    server.set("log", level="debug")
    server.start()
    secrets = {"PatientName": "VERYSECRET^NAME", "PatientID": "ID-SECRET-1", "SOPInstanceUID": "1.2.3.4.5.99.1"}
    good = scu.read(changed(Path(str(get_testdata_file("CT_small.dcm"))), tmp_path, **secrets))
    broken = good._replace(data=good.data[:-1000])
    mismatched = good._replace(sop_instance="1.2.3.4.5.99.2")
    with associated(server, device(server)) as association:
        assert scu.store(association, good).Status == 0
        assert scu.store(association, mismatched).Status != 0
        scu.store(association, broken)
    server.wait_log("association .* released")
    server.wait_admitted()
    assert server.stop() == 0
    log = "\n".join(server.log)
    assert "CT1" in log
    for secret in ("VERYSECRET", "ID-SECRET-1", "1.2.3.4.5.99"):
        assert secret not in log


@pytest.mark.parametrize(
    "title", [b"CT1\n2026-01-01 gate: x", b"CT1\r", b"\x1b[31mCT1", b"CT1\0", b"\xc2\x9bCT1", b"\xff" * 16]
)
def test_an_ae_title_cannot_write_lines_or_controls_into_the_log(bound: Bound, title: bytes) -> None:
    server = bound.server
    title = title[:16]
    assert refused(server, "", device(server), calling=title) != ACCEPTED
    line = server.log[-1]
    assert " gate: connection from 127.0.0.1:" in line
    assert line.isprintable()
    assert all(line.isprintable() and re.match(r"20\d\d-", line) for line in server.log)
