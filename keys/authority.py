"""The store's own small certificate authority: made by ``init --with-pki``, its key sealed in the keyring.

It issues the server's certificate and those of peers, from requests whose keys it never sees.
"""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from keys.keyring import Authority

_CA_DAYS = 3650
# A clock of a modality that is some minutes slow must not refuse a fresh certificate.
_BACKDATE = timedelta(hours=1)


class RequestError(ValueError):
    """A certificate request is malformed or not signed by its key."""


def new_private_key() -> ec.EllipticCurvePrivateKey:
    """Return a new P-256 key: the curve that every TLS stack of a modality knows."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as unencrypted PKCS #8 PEM, which is what modalities and TLS servers read."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_authority(store_id: str, now: datetime) -> Authority:
    """Return a certificate authority for a store: self-signed, path length 0."""
    key = new_private_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Strongroom store {store_id[:8]}")])
    certificate = (
        _builder(name, name, key.public_key(), now, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Authority(certificate.public_bytes(serialization.Encoding.PEM).decode(), der)


def request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate request (PEM) for a key; names are the authority's to give."""
    empty = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return empty.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def issue_server(authority: Authority, csr: bytes, names: list[str], now: datetime, days: int) -> bytes:
    """Return a server certificate (PEM) for DNS names and addresses; the server also shows it where it calls a peer.

    Raises:
        RequestError: The request is malformed.
    """
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _issue(authority, csr, names[0], names, usages, now, days)


def issue_peer(authority: Authority, csr: bytes, name: str, now: datetime, days: int) -> bytes:
    """Return a client certificate (PEM) for a peer.

    Raises:
        RequestError: The request is malformed.
    """
    return _issue(authority, csr, name, [], [ExtendedKeyUsageOID.CLIENT_AUTH], now, days)


def _issue(
    authority: Authority,
    csr: bytes,
    common_name: str,
    names: list[str],
    usages: list[x509.ObjectIdentifier],
    now: datetime,
    days: int,
) -> bytes:
    try:
        asked = x509.load_pem_x509_csr(csr)
        public_key = asked.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise RequestError("the certificate request is malformed") from error
    try:
        signed = asked.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        signed = False
    if not signed:
        raise RequestError("the certificate request is not signed by its own key")
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
        raise RequestError("the certificate request has a key of another kind than P-256")
    ca = x509.load_pem_x509_certificate(authority.certificate.encode())
    ca_key = serialization.load_der_private_key(authority.key, None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise TypeError("the authority's key is of an unknown kind")
    # A common name holds 64 characters; peers are told apart by the whole certificate, not by it.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    builder = (
        _builder(subject, ca.subject, public_key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not sign,
        crl_sign=not sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
