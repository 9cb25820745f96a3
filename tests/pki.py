"""Authorities, certificates and revocation lists for the tests, also such as no authority should issue."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Holder(NamedTuple):
    """A certificate and its key; an authority, or who was issued one."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    @property
    def key_pem(self) -> str:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def issue(
        self,
        name: str | x509.Name,
        *,
        key: Key | None = None,
        ca: bool = False,
        names: Sequence[str] = (),
        start: timedelta = -HOUR,
        end: timedelta = DAY,
        server: bool = False,
    ) -> Holder:
        """Issue a certificate; times count from now."""
        return make(name, self, key=key, ca=ca, names=names, start=start, end=end, server=server)

    def revoke(
        self,
        *revoked: Holder,
        name: x509.Name | None = None,
        begun: datetime | None = None,
        start: timedelta = -HOUR,
        end: timedelta = 30 * DAY,
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> x509.CertificateRevocationList:
        """Make a list of what is revoked; times count from now, or from a given time."""
        now = begun or datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(name or self.certificate.subject)
        builder = builder.last_update(now + start).next_update(now + end)
        for holder in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(holder.certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(now + start).build())
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, hashes.SHA256())

    def save(self, folder: Path, stem: str, *above: Holder) -> Holder:
        """Write key and certificate, and the certificates above it, as a device has them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.key").write_text(self.key_pem)
        (folder / f"{stem}.pem").write_text("".join([self.pem, *(holder.pem for holder in above)]))
        return self


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def authority(name: str | x509.Name, key: Key | None = None) -> Holder:
    """Make a self-signed authority."""
    return make(name, None, key=key, ca=True)


def make(
    name: str | x509.Name,
    issuer: Holder | None = None,
    *,
    key: Key | None = None,
    ca: bool = False,
    names: Sequence[str] = (),
    start: timedelta = -HOUR,
    end: timedelta = DAY,
    server: bool = False,
) -> Holder:
    """Make a certificate; self-signed without an issuer."""
    key = key or new_key()
    subject = named(name) if isinstance(name, str) else name
    now = datetime.now(UTC)
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if not ca:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
    return Holder(builder.sign(signer, hashes.SHA256()), key)


def pem(revocations: x509.CertificateRevocationList) -> bytes:
    return revocations.public_bytes(Encoding.PEM)


def der(revocations: x509.CertificateRevocationList) -> bytes:
    return revocations.public_bytes(Encoding.DER)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
