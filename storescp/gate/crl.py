"""Certificate revocation lists: which authority's count, whether they are current, and whom they revoke.

Only what is configured is checked: an authority without a list here revokes by peer files alone. The decision is pure;
OpenSSL's own check is not used, because it wants a list of every authority as soon as there is one.
Source: RFC 5280, section 5 and 6.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID

_SOON = timedelta(days=7)
_PEM = b"-----BEGIN X509 CRL-----"
# What a list may say in critical extensions: others narrow its scope, and must be understood (RFC 5280, 5.2).
_KNOWN = {ExtensionOID.CRL_NUMBER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER}
# These narrow it also where an authority forgot to call them critical.
_PARTIAL = {ExtensionOID.DELTA_CRL_INDICATOR, ExtensionOID.ISSUING_DISTRIBUTION_POINT}
# What cryptography raises about content; three of these are no ValueErrors.
_MALFORMED = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class CrlError(ValueError):
    """A list cannot be used; the message names the file."""


class _List(NamedTuple):
    """A list, and whose it is: an authority that has two keys may have a list by each (its name is one)."""

    file: Path
    revocations: x509.CertificateRevocationList
    name: x509.Name
    key: bytes


class Revocations:
    """The configured lists, the newest of each authority and key."""

    def __init__(self, lists: Iterable[_List]) -> None:
        newest: dict[tuple[x509.Name, bytes], _List] = {}
        for found in lists:
            known = newest.get((found.name, found.key))
            if known is None or _began(known.revocations) < _began(found.revocations):
                newest[found.name, found.key] = found
        self._lists = sorted(newest.values(), key=lambda entry: entry.file)

    def refusal(self, chain: list[x509.Certificate], now: datetime) -> str:
        """Return why a verified chain, leaf first, is not accepted; empty if it is.

        Args:
            chain: As verified, up to the certificate that is trusted for itself.
            now: UTC, with its zone.
        """
        for certificate, issuer in zip(chain, [*chain[1:], None], strict=True):
            if _signed_by_itself(certificate):
                continue
            for found in self._of(certificate, issuer):
                until = _until(found.revocations)
                if until is None or now > until:
                    return f"the revocation list of its authority has expired: put a new one into {found.file.name}"
                if found.revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
                    return "its authority has revoked it: issue a new one, 'strongroom peer renew' does"
        return ""

    def _of(self, certificate: x509.Certificate, issuer: x509.Certificate | None) -> list[_List]:
        """Return the lists that count for a certificate; by its issuer's name where none is by its issuer's key."""
        names = {certificate.issuer} if issuer is None else {certificate.issuer, issuer.subject}
        named = [found for found in self._lists if found.name in names]
        key = b"" if issuer is None else _key(issuer)
        return [found for found in named if found.key == key] or named

    def warnings(self, now: datetime) -> list[str]:
        """Return what an admin should know: which lists have expired or soon will."""
        said = []
        for file, revocations, _, _ in self._lists:
            until = _until(revocations)
            if until is None or now > until:
                said.append(f"the revocation list {file} HAS EXPIRED: every certificate of its authority is refused")
            elif now > until - _SOON:
                when = until.strftime("%Y-%m-%dT%H:%M:%SZ")
                said.append(f"the revocation list {file} expires on {when}: then all of its authority are refused")
        return said


def read(files: Iterable[Path], authorities: Iterable[x509.Certificate]) -> Revocations:
    """Read lists, PEM or DER.

    Args:
        files: One list a file.
        authorities: Whose lists count: the certificates in ``gate.trust``.

    Raises:
        CrlError: One cannot be read, is malformed, or none of the authorities signed it.
    """
    known = list(authorities)
    lists = []
    for file in files:
        revocations, name = _parsed(file)
        signer = next((a for a in known if a.subject == name and _signed(revocations, a)), None)
        if signer is None:
            raise CrlError(f"{file}: no authority in gate.trust signed this revocation list")
        lists.append(_List(file, revocations, name, _key(signer)))
    return Revocations(lists)


def _parsed(file: Path) -> tuple[x509.CertificateRevocationList, x509.Name]:
    try:
        content = file.read_bytes()
        count = content.count(_PEM)
        revocations = x509.load_pem_x509_crl(content) if count else x509.load_der_x509_crl(content)
        # Parsed only when it is asked for.
        name = revocations.issuer
        partial = any(e.oid in _PARTIAL or (e.critical and e.oid not in _KNOWN) for e in revocations.extensions)
    except OSError as error:
        raise CrlError(f"{file}: the revocation list cannot be read: {error.strerror}") from error
    except _MALFORMED as error:
        raise CrlError(f"{file}: this is no certificate revocation list") from error
    if count > 1:
        # Of these only the first would be read, and whom the others revoke would get in.
        raise CrlError(f"{file}: this holds {count} revocation lists: put each into a file of its own")
    if partial:
        raise CrlError(f"{file}: a delta or partial revocation list cannot be used: install the complete one")
    return revocations, name


def _signed(revocations: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        # Any type of key: one that cannot sign raises a TypeError.
        key: Any = authority.public_key()
        return bool(revocations.is_signature_valid(key))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False


def _signed_by_itself(certificate: x509.Certificate) -> bool:
    # Not by its names alone: an authority may issue a certificate to its own name, and revoke it.
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def _key(authority: x509.Certificate) -> bytes:
    return authority.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _until(revocations: x509.CertificateRevocationList) -> datetime | None:
    return revocations.next_update_utc


def _began(revocations: x509.CertificateRevocationList) -> datetime:
    return revocations.last_update_utc
