"""The store's own authority: what it issues is accepted by TLS, for its purpose, names and time alone."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

from keys import authority
from keys.authority import RequestError
from keys.keyring import Authority

NOW = datetime.now(UTC).replace(microsecond=0)
OURS = authority.new_authority("0123456789abcdef" * 2, NOW)
OTHER = authority.new_authority("fedcba9876543210" * 2, NOW)
KEY = authority.new_private_key()
REQUEST = authority.request(KEY)
NAMES = ["pacs.example.org", "127.0.0.1", "::1"]
MALFORMED = "the certificate request is malformed"
UNSIGNED = "the certificate request is not signed by its own key"
KIND = "the certificate request has a key of another kind than P-256"

Issue = Callable[[bytes], bytes]


def server(
    names: list[str] = NAMES, *, by: Authority = OURS, now: datetime = NOW, days: int = 30, request: bytes = REQUEST
) -> bytes:
    return authority.issue_server(by, request, names, now, days)


def peer(
    name: str = "CT1", *, by: Authority = OURS, now: datetime = NOW, days: int = 30, request: bytes = REQUEST
) -> bytes:
    return authority.issue_peer(by, request, name, now, days)


def load(pem: bytes | str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem if isinstance(pem, bytes) else pem.encode())


# --- TLS of OpenSSL, in memory


def side(folder: Path, purpose: int, pem: bytes, trusted: Authority) -> ssl.SSLContext:
    """Return a side that shows a certificate and demands one of an authority's."""
    (folder / "own.pem").write_bytes(pem)
    (folder / "own.key").write_bytes(authority.private_pem(KEY))
    context = ssl.SSLContext(purpose)
    context.load_cert_chain(folder / "own.pem", folder / "own.key")
    context.load_verify_locations(cadata=trusted.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    # TLS 1.3 would tell the client of a refused certificate only after the handshake.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def handshake(folder: Path, own: bytes, theirs: bytes, name: str = NAMES[0], *, trusted: Authority = OURS) -> str:
    """Let a server and a client shake hands; return why one of them refuses, or nothing."""
    listening, calling = (side(folder, p, c, trusted) for p, c in (
        (ssl.PROTOCOL_TLS_SERVER, own), (ssl.PROTOCOL_TLS_CLIENT, theirs),
    ))  # fmt: skip
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        listening.wrap_bio(one, other, server_side=True),
        calling.wrap_bio(other, one, server_hostname=name),
    ]
    while sides:
        for tls in list(sides):
            try:
                tls.do_handshake()
                sides.remove(tls)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_server_and_peer_shake_hands(tmp_path: Path, name: str) -> None:
    assert handshake(tmp_path, server(), peer(), name) == ""
    # Where the server calls a peer, it shows the same one.
    assert handshake(tmp_path, server(), server(), name) == ""


OLD = NOW - timedelta(days=100)


@pytest.mark.parametrize(
    ("own", "theirs", "name", "why"),
    [
        (server(), peer(), "other.example.org", "Hostname mismatch"),
        (server(), peer(), "127.0.0.2", "IP address mismatch"),
        (server(["127.0.0.1"]), peer(), NAMES[0], "Hostname mismatch"),
        (peer(NAMES[0]), peer(), NAMES[0], "unsuitable certificate purpose"),
        (server(now=OLD), peer(), NAMES[0], "certificate has expired"),
        (server(), peer(now=OLD), NAMES[0], "certificate has expired"),
        (server(now=NOW + timedelta(days=1)), peer(), NAMES[0], "certificate is not yet valid"),
        (server(by=OTHER), peer(), NAMES[0], "unable to get local issuer certificate"),
        (server(), peer(by=OTHER), NAMES[0], "unable to get local issuer certificate"),
    ],
)
def test_a_certificate_out_of_its_place_is_refused(
    tmp_path: Path, own: bytes, theirs: bytes, name: str, why: str
) -> None:
    assert why in handshake(tmp_path, own, theirs, name)


def test_a_clock_that_is_slow_by_minutes_accepts_a_fresh_certificate(tmp_path: Path) -> None:
    soon = NOW + timedelta(minutes=50)
    assert handshake(tmp_path, server(now=soon), peer(now=soon)) == ""


# --- the other verifier


@pytest.mark.parametrize("name", NAMES)
def test_a_server_certificate_satisfies_the_rules_of_the_web(name: str) -> None:
    builder = PolicyBuilder().store(Store([load(OURS.certificate)]))
    made = load(server())
    subject = x509.DNSName(name) if "example" in name else x509.IPAddress(ip_address(name))
    verifier = builder.time(NOW).build_server_verifier(subject)
    assert verifier.verify(made, []) == [made, load(OURS.certificate)]
    for time in (NOW - timedelta(hours=2), NOW + timedelta(days=31)):
        with pytest.raises(VerificationError):
            builder.time(time).build_server_verifier(subject).verify(made, [])
    for refused in (load(peer(name)), load(server([name], by=OTHER)), load(server(["other.example.org"]))):
        with pytest.raises(VerificationError):
            verifier.verify(refused, [])


@pytest.mark.parametrize("days", [1, 30, 730])
@pytest.mark.parametrize(
    ("issue", "usages", "names"),
    [
        # The desk calls peers, and shows it there.
        (server, [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH], NAMES),
        (peer, [ExtendedKeyUsageOID.CLIENT_AUTH], None),
    ],
)
def test_a_certificate_says_what_it_is_for_and_how_long(
    issue: Callable[..., bytes], usages: list[x509.ObjectIdentifier], names: list[str] | None, days: int
) -> None:
    made, ca = load(issue(days=days)), load(OURS.certificate)
    made.verify_directly_issued_by(ca)
    assert made.not_valid_before_utc == NOW - timedelta(hours=1)
    assert made.not_valid_after_utc == NOW + timedelta(days=days)
    assert made.public_key() == KEY.public_key()
    found = {e.oid: (e.critical, e.value) for e in made.extensions}
    assert found.pop(x509.BasicConstraints.oid) == (True, x509.BasicConstraints(ca=False, path_length=None))
    critical, key_usage = found.pop(x509.KeyUsage.oid)
    assert critical
    assert isinstance(key_usage, x509.KeyUsage)
    assert (key_usage.digital_signature, key_usage.key_cert_sign, key_usage.crl_sign) == (True, False, False)
    assert found.pop(x509.ExtendedKeyUsage.oid) == (False, x509.ExtendedKeyUsage(usages))
    own = x509.SubjectKeyIdentifier.from_public_key(KEY.public_key())
    assert found.pop(x509.SubjectKeyIdentifier.oid) == (False, own)
    _, issuer = found.pop(x509.AuthorityKeyIdentifier.oid)
    assert isinstance(issuer, x509.AuthorityKeyIdentifier)
    assert issuer.key_identifier == ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    if names:
        _, alternatives = found.pop(x509.SubjectAlternativeName.oid)
        assert isinstance(alternatives, x509.SubjectAlternativeName)
        assert [str(name.value) for name in alternatives] == names
    assert not found


def test_the_authority_signs_certificates_and_nothing_under_it_does() -> None:
    ca = load(OURS.certificate)
    ca.verify_directly_issued_by(ca)
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == timedelta(days=3650, hours=1)
    found = {e.oid: (e.critical, e.value) for e in ca.extensions}
    assert found[x509.BasicConstraints.oid] == (True, x509.BasicConstraints(ca=True, path_length=0))
    critical, usage = found[x509.KeyUsage.oid]
    assert critical
    assert isinstance(usage, x509.KeyUsage)
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (False, True, True)
    assert ca.subject.rfc4514_string() == "CN=Strongroom store 01234567"
    key = serialization.load_der_private_key(OURS.key, None)
    assert key.public_key() == ca.public_key() != load(OTHER.certificate).public_key()


@pytest.mark.parametrize("name", ["CT1", "A B", "x" * 64, "x" * 65, '=,+"\\<>;#', "192.0.2.1"])
def test_a_peer_is_named_by_its_title(name: str) -> None:
    (attribute,) = load(peer(name)).subject
    assert (attribute.oid, attribute.value) == (NameOID.COMMON_NAME, name[:64])


def test_no_two_certificates_have_a_number_in_common() -> None:
    assert len({load(pem).serial_number for pem in (peer(), peer(), server(), server())}) == 4


# --- requests


def signed(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def armour(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()


DER = x509.load_pem_x509_csr(REQUEST).public_bytes(serialization.Encoding.DER)
# The object id of ecdsa-with-SHA256 made one that nobody knows.
UNKNOWN_ALGORITHM = DER.replace(bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d04037f"))
UNKNOWN_KEY = DER.replace(bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06072a8648ce3d027f"))
UNKNOWN_CURVE = DER.replace(bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f"))


@pytest.mark.parametrize("issue", [lambda r: server(request=r), lambda r: peer(request=r)], ids=["server", "peer"])
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"", MALFORMED),
        (b"\xff\xfe", MALFORMED),
        (REQUEST[:-40], MALFORMED),
        (REQUEST[:60] + b"!" + REQUEST[61:], MALFORMED),
        (OURS.certificate.encode(), MALFORMED),
        (authority.private_pem(KEY), MALFORMED),
        (DER, MALFORMED),
        (armour(b""), MALFORMED),
        (armour(DER[:-1]), MALFORMED),
        (armour(DER + b"\0"), MALFORMED),
        (armour(DER[:-1] + bytes([DER[-1] ^ 1])), UNSIGNED),
        (armour(UNKNOWN_ALGORITHM), f"{MALFORMED}|{UNSIGNED}"),
        (armour(UNKNOWN_KEY), MALFORMED),
        (armour(UNKNOWN_CURVE), MALFORMED),
        (signed(rsa.generate_private_key(65_537, 2048)), KIND),
        (signed(ed25519.Ed25519PrivateKey.generate()), KIND),
        (signed(ec.generate_private_key(ec.SECP384R1())), KIND),
        (signed(ec.generate_private_key(ec.SECP256K1())), KIND),
    ],
    ids=[
        "nothing", "no text", "cut", "no base64", "a certificate", "a key", "DER", "empty", "DER cut", "DER and more",
        "another signature", "unknown algorithm", "unknown key", "unknown curve", "RSA", "Ed25519", "P-384",
        "secp256k1",
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_refused(issue: Issue, request_: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=f"^({message})$"):
        issue(request_)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.one_of(st.binary(max_size=80), st.tuples(st.integers(0, len(DER) - 1), st.integers(1, 255)).map(
    lambda t: armour(DER[: t[0]] + bytes([DER[t[0]] ^ t[1]]) + DER[t[0] + 1 :]))))  # fmt: skip
def test_no_changed_request_gets_a_certificate(content: bytes) -> None:
    with pytest.raises(RequestError):
        peer(request=content)


def test_names_in_a_request_count_for_nothing() -> None:
    asked = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(asked)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    request = builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    made = load(peer("CT1", request=request))
    assert made.subject.rfc4514_string() == "CN=CT1"
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
