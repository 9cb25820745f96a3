"""The gate's TLS: what a chain proves, what a peer file's certificate is trusted for, what failures are called."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pki
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from pki import Holder

from storescp import peers
from storescp.gate import tls
from storescp.gate.crl import CrlError
from storescp.gate.tls import Trust
from storescp.peers import PeerFile, Peers, key_print

ROOT, STRANGER = pki.authority("root"), pki.authority("stranger")
MIDDLE = ROOT.issue("middle", ca=True)
LEAF = MIDDLE.issue("leaf", names=["CT1.example", "10.0.0.1"])
SERVER = pki.make("server", names=["127.0.0.1"], server=True)
NAMES = frozenset({"dns:ct1.example", "ip:10.0.0.1"})


def trust(folder: Path, *authorities: Holder) -> Trust:
    (folder / "trust.pem").write_text("".join(holder.pem for holder in authorities))
    return Trust([folder / "trust.pem"], [])


def proof(found: Trust, *chain: Holder) -> peers.Proof:
    return found.proof([holder.certificate for holder in chain])


def known(*pems: str) -> Peers:
    peer = peers.parse(peers.render(PeerFile(ae_title="CT1", certificates=list(pems))), Path("CT1.toml"))
    return Peers({"CT1": peer})


def shaken(folder: Path, found: Trust, peers_: Peers, device: Holder, *above: Holder) -> list[Holder] | str:
    """Shake hands as a device; return the names of the chain that the server verified, or why it failed."""
    SERVER.save(folder, "server")
    device.save(folder, "device", *above)
    context = tls.server_context(folder / "server.pem", folder / "server.key", found, peers_)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.load_cert_chain(folder / "device.pem", folder / "device.key")
    ours, theirs = socket.socketpair()

    def connect() -> None:
        with theirs:
            try:
                with client.wrap_socket(theirs) as secured:
                    secured.recv(1)
            except OSError:
                pass

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        with ours, context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False) as secured:
            try:
                secured.do_handshake()
            except OSError as error:
                return tls.explain(error)
            holders = {h.certificate: h for h in (device, *above, ROOT, MIDDLE, STRANGER)}
            return [holders[certificate] for certificate in tls.verified_chain(secured)]
    finally:
        thread.join()


# --- what a chain proves


def test_a_chain_to_a_trusted_authority_proves_names_and_every_authority_above(tmp_path: Path) -> None:
    found = proof(trust(tmp_path, ROOT), LEAF, MIDDLE, ROOT)
    assert found.fingerprint == LEAF.certificate.fingerprint(SHA256()).hex()
    assert found.key == key_print(LEAF.certificate)
    assert found.names == NAMES
    assert found.authorities == {key_print(MIDDLE.certificate), key_print(ROOT.certificate)}


def test_a_chain_may_end_in_an_intermediate_authority_that_is_trusted(tmp_path: Path) -> None:
    found = proof(trust(tmp_path, STRANGER, MIDDLE), LEAF, MIDDLE)
    assert (found.names, found.authorities) == (NAMES, {key_print(MIDDLE.certificate)})


@pytest.mark.parametrize("chain", [(LEAF,), (LEAF, MIDDLE), (LEAF, MIDDLE, ROOT)], ids=["1", "2", "3"])
def test_a_chain_that_ends_elsewhere_proves_certificate_and_key_alone(
    tmp_path: Path, chain: tuple[Holder, ...]
) -> None:
    found = proof(trust(tmp_path, STRANGER), *chain)
    assert (found.names, found.authorities) == (frozenset(), frozenset())
    assert found.key == key_print(LEAF.certificate)


def test_a_trusted_certificate_that_comes_as_a_device_proves_no_names(tmp_path: Path) -> None:
    assert proof(trust(tmp_path, LEAF), LEAF).names == frozenset()


def test_an_authority_of_the_same_name_and_another_key_is_another(tmp_path: Path) -> None:
    assert proof(trust(tmp_path, pki.authority("root")), LEAF, MIDDLE, ROOT).authorities == frozenset()


# --- what is trusted


def test_a_bound_certificate_is_trusted_for_itself_without_its_authority(tmp_path: Path) -> None:
    assert shaken(tmp_path, trust(tmp_path, STRANGER), known(LEAF.pem), LEAF) == [LEAF]


def test_a_second_certificate_in_a_peer_file_is_no_authority(tmp_path: Path) -> None:
    other = ROOT.issue("other")
    words = "the peer's certificate is not accepted: its authority is not in gate.trust"
    bound = known(ROOT.issue("bound").pem + ROOT.pem)
    assert str(shaken(tmp_path, trust(tmp_path, STRANGER), bound, other)).startswith(words)


def test_text_around_a_bound_certificate_does_no_harm(tmp_path: Path) -> None:
    bound = known(f"# Gerät in Raum 3\n{LEAF.pem}# Ende\n")
    assert shaken(tmp_path, trust(tmp_path, STRANGER), bound, LEAF) == [LEAF]


def test_a_certificate_that_is_bound_twice_and_trusted_besides_is_loaded_once(tmp_path: Path) -> None:
    found = trust(tmp_path, ROOT, MIDDLE)
    assert shaken(tmp_path, found, known(LEAF.pem, LEAF.pem, MIDDLE.pem), LEAF) == [LEAF, MIDDLE]


def test_a_device_may_send_the_authorities_between(tmp_path: Path) -> None:
    assert shaken(tmp_path, trust(tmp_path, ROOT), Peers({}), LEAF, MIDDLE) == [LEAF, MIDDLE, ROOT]


def test_a_self_signed_certificate_that_is_not_bound_is_told_so(tmp_path: Path) -> None:
    words = "it is self-signed and in no peer file; 'strongroom peer add --certificate' binds it"
    said = shaken(tmp_path, trust(tmp_path, ROOT), known(LEAF.pem), pki.make("self"))
    assert said == f"the peer's certificate is not accepted: {words}"


def test_a_servers_certificate_gets_no_device_in(tmp_path: Path) -> None:
    words = "it is not issued for TLS clients (extended key usage)"
    said = shaken(tmp_path, trust(tmp_path, ROOT), Peers({}), ROOT.issue("server", server=True))
    assert said == f"the peer's certificate is not accepted: {words}"


# --- files that cannot be read


def test_a_file_of_authorities_that_holds_none_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "trust.pem").write_text("no certificate\n")
    with pytest.raises(ssl.SSLError, match=r"trust\.pem holds no certificate in PEM"):
        Trust([tmp_path / "trust.pem"], [])
    with pytest.raises(OSError, match="No such file"):
        Trust([tmp_path / "other.pem"], [])


def test_a_list_that_no_authority_of_the_files_signed_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "list.crl").write_bytes(pki.der(STRANGER.revoke()))
    (tmp_path / "trust.pem").write_text(ROOT.pem)
    with pytest.raises(CrlError, match=r"no authority in gate\.trust signed"):
        Trust([tmp_path / "trust.pem"], [tmp_path / "list.crl"])


# --- what failures are called


def failed(reason: str | None) -> ssl.SSLError:
    error = ssl.SSLError(1, "[SSL] text of OpenSSL")
    error.reason = reason  # type: ignore[assignment]
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "the peer did not finish the TLS handshake in time"),
        (ConnectionResetError(), "the peer closed the connection during the TLS handshake"),
        (ssl.SSLEOFError(8, "EOF"), "the peer closed the connection during the TLS handshake"),
        (failed("HTTP_REQUEST"), "the peer speaks HTTP, not DICOM over TLS"),
        (failed("WRONG_VERSION_NUMBER"), "the peer does not speak TLS; switch TLS on at the peer"),
        (failed("SOMETHING_NEW"), "OpenSSL says SOMETHING_NEW"),
        (failed(None), "the peer closed the connection during the TLS handshake"),
    ],
)
def test_a_failed_handshake_is_told_in_words(error: OSError, words: str) -> None:
    assert tls.explain(error) == words
