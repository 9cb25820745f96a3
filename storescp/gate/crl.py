"""Certificate revocation lists: which authority's count, whether they are current, and whom they revoke.

Only what is configured is checked: an authority without a list here revokes by peer files alone. The decision is pure;
OpenSSL's own check is not used, because it wants a list of every authority as soon as there is one.
Source: RFC 5280, section 5 and 6.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtensionOID

_SOON = timedelta(days=7)
_PEM = b"-----BEGIN X509 CRL-----"
# What a list may say in critical extensions: others narrow its scope, and must be understood (RFC 5280, 5.2).
_KNOWN = {ExtensionOID.CRL_NUMBER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER}


class CrlError(ValueError):
    """A list cannot be used; the message names the file."""


class Revocations:
    """The configured lists, the newest of each authority."""

    def __init__(self, lists: dict[bytes, tuple[Path, x509.CertificateRevocationList]]) -> None:
        self._lists = lists

    def refusal(self, chain: list[x509.Certificate], now: datetime) -> str:
        """Return why a verified chain, leaf first, is not accepted; empty if it is.

        Args:
            chain: As verified, up to the certificate that is trusted for itself.
            now: UTC, with its zone.
        """
        for certificate in chain:
            found = self._lists.get(certificate.issuer.public_bytes())
            if found is None or _signed_by_itself(certificate):
                continue
            file, revocations = found
            until = _until(revocations)
            if until is None or now > until:
                return f"the revocation list of its authority has expired: put a new one into {file.name}"
            if revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
                return "its authority has revoked it: issue a new one, 'strongroom peer renew' does"
        return ""

    def warnings(self, now: datetime) -> list[str]:
        """Return what an admin should know: which lists have expired or soon will."""
        said = []
        for file, revocations in sorted(self._lists.values(), key=lambda entry: entry[0]):
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
    known: dict[bytes, list[x509.Certificate]] = {}
    for certificate in authorities:
        known.setdefault(certificate.subject.public_bytes(), []).append(certificate)
    lists: dict[bytes, tuple[Path, x509.CertificateRevocationList]] = {}
    for file in files:
        revocations = _parsed(file)
        issuer = revocations.issuer.public_bytes()
        if not any(_signed(revocations, a) for a in known.get(issuer, [])):
            raise CrlError(f"{file}: no authority in gate.trust signed this revocation list")
        if issuer not in lists or _began(lists[issuer][1]) < _began(revocations):
            lists[issuer] = (file, revocations)
    return Revocations(lists)


def _parsed(file: Path) -> x509.CertificateRevocationList:
    try:
        content = file.read_bytes()
        pem = _PEM in content
        revocations = x509.load_pem_x509_crl(content) if pem else x509.load_der_x509_crl(content)
        unknown = [e for e in revocations.extensions if e.critical and e.oid not in _KNOWN]
    except OSError as error:
        raise CrlError(f"{file}: the revocation list cannot be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CrlError(f"{file}: this is no certificate revocation list") from error
    if unknown:
        raise CrlError(f"{file}: a delta or partial revocation list cannot be used: install the complete one")
    return revocations


def _signed(revocations: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    # Any type of key: one that cannot sign raises a TypeError.
    key: Any = authority.public_key()
    try:
        return bool(revocations.is_signature_valid(key))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False


def _signed_by_itself(certificate: x509.Certificate) -> bool:
    return certificate.issuer == certificate.subject


def _until(revocations: x509.CertificateRevocationList) -> datetime | None:
    return revocations.next_update_utc


def _began(revocations: x509.CertificateRevocationList) -> datetime:
    return revocations.last_update_utc
