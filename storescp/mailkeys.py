"""Whose keys a mail message is sealed for and signed with: certificates and keys in PEM files, and their checks.

What RFC 8550 (S/MIME certificates) asks of a certificate that can be told from it alone. Whether it really is the
recipient's is for who names its file to know: no authority is asked, and no list of revoked certificates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from storescp.errors import StrongroomError

_SMALLEST_RSA_BITS = 2048
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_PEM_LIMIT = 1 << 20
_ADDRESS = re.compile(r"[A-Za-z0-9_+=-]+(\.[A-Za-z0-9_+=-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", re.ASCII)
# RFC 5321, 4.5.3.1.3.
_ADDRESS_LIMIT = 254
_PURPOSES = {ExtendedKeyUsageOID.EMAIL_PROTECTION, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}

SigningKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class Holder(msgspec.Struct, frozen=True):
    """Whom a certificate is for: a recipient, or who signs."""

    certificate: x509.Certificate
    # SHA-256 of the certificate, 64 hex digits.
    fingerprint: str
    # The first mail address that the certificate names; empty where it names none.
    address: str


class Signer(msgspec.Struct, frozen=True):
    """Who signs: the certificate with its key, and the certificates between it and its authority."""

    holder: Holder
    key: SigningKey
    above: tuple[x509.Certificate, ...]


def read_recipient(path: Path, now: datetime) -> Holder:
    """Return the recipient whose certificate is in a PEM file.

    Raises:
        StrongroomError: It cannot be read, holds none or several, or nobody should encrypt for it.
    """
    found = _Pem(path).certificates()
    if len(found) != 1:
        raise StrongroomError(
            f"{path} holds {len(found)} certificates, and it is not plain whom the message is for",
            hint="give each recipient's certificate in a file of its own, without those of authorities",
        )
    key = _checked(path, found[0], now)
    if not isinstance(key, rsa.RSAPublicKey):
        raise StrongroomError(
            f"the certificate in {path} has a key that is not RSA, and messages are sealed for RSA keys alone",
            hint=f"ask the recipient for a certificate with an RSA key of {_SMALLEST_RSA_BITS} bits or more",
        )
    usage = _extension(path, found[0], x509.KeyUsage)
    if usage is not None and not usage.key_encipherment:
        raise StrongroomError(
            f"the certificate in {path} is not for encryption: its key usage has no keyEncipherment",
            hint="ask the recipient for the certificate that others encrypt with; some have two",
        )
    return _holder(path, found[0])


def read_signer(path: Path, key_path: Path | None, now: datetime, ask_passphrase: Callable[[], str]) -> Signer:
    """Return who signs.

    Args:
        path: PEM file with the signer's certificate first, those of authorities between behind it, maybe the key.
        key_path: PEM file with the key; none where it is in the first file.
        now: When this is.
        ask_passphrase: Called once, and only where the key is encrypted.

    Raises:
        StrongroomError: They cannot be read, do not belong together, or should not sign mail.
    """
    pem = _Pem(path)
    certificate, *above = pem.certificates()
    public = _checked(path, certificate, now)
    curve = public.curve if isinstance(public, ec.EllipticCurvePublicKey) else None
    if public is None or not (isinstance(public, rsa.RSAPublicKey) or isinstance(curve, _CURVES)):
        raise StrongroomError(
            f"the certificate in {path} has a key of a kind that mail programs do not know",
            hint=f"sign with an RSA key of {_SMALLEST_RSA_BITS} bits or more, or on the curve P-256, P-384 or P-521",
        )
    usage = _extension(path, certificate, x509.KeyUsage)
    if usage is not None and not (usage.digital_signature or usage.content_commitment):
        raise StrongroomError(
            f"the certificate in {path} is not for signatures: its key usage has no digitalSignature",
            hint="name the certificate that you sign mail with; some have two",
        )
    key = (pem if key_path is None else _Pem(key_path)).key(ask_passphrase)
    if not isinstance(key, SigningKey) or _encoded(key.public_key()) != _encoded(public):
        raise StrongroomError(
            f"the private key in {key_path or path} is not that of the certificate in {path}",
            hint="the signer's own certificate comes first in its file; --signer-key names the file of its key",
        )
    return Signer(_holder(path, certificate), key, tuple(above))


class _Pem:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._open_to_others = bool(os.fstat(file.fileno()).st_mode & 0o077)
                self._content = file.read(_PEM_LIMIT)
        except OSError as error:
            raise StrongroomError(f"{path} cannot be read: {error.strerror}") from error

    def certificates(self) -> list[x509.Certificate]:
        """Return one or more."""
        if b"-----BEGIN CERTIFICATE-----" not in self._content:
            raise StrongroomError(
                f"{self._path} holds no certificate in PEM form",
                hint="'openssl x509 -inform DER -in FILE' turns a .cer or .der file into PEM, and "
                "'openssl pkcs12 -in FILE' a .p12 or .pfx file",
            )
        try:
            return x509.load_pem_x509_certificates(self._content)
        except ValueError as error:
            raise StrongroomError(f"the certificate in {self._path} is damaged") from error

    def key(self, ask_passphrase: Callable[[], str]) -> PrivateKeyTypes:
        """Return the private key."""
        if b"PRIVATE KEY-----" not in self._content:
            raise StrongroomError(
                f"{self._path} holds no private key",
                hint="a signature needs the key of the signer's certificate: --signer-key names its file, in PEM form",
            )
        if self._open_to_others:
            raise StrongroomError(f"{self._path} holds a private key and is open to others; 'chmod 600 {self._path}'")
        passphrase: bytes | None = None
        try:
            try:
                return load_pem_private_key(self._content, None)
            except TypeError:
                # So it says that the key is encrypted.
                passphrase = ask_passphrase().encode()
                return load_pem_private_key(self._content, passphrase)
        except (TypeError, ValueError, UnsupportedAlgorithm) as error:
            if passphrase is not None:
                raise StrongroomError(f"this passphrase does not open the private key in {self._path}") from error
            raise StrongroomError(f"the private key in {self._path} is damaged, or of a kind nobody knows") from error


def _checked(path: Path, certificate: x509.Certificate, now: datetime) -> CertificatePublicKeyTypes | None:
    """Return a certificate's key after what is checked of everybody's; none of a kind that nobody knows."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        raise StrongroomError(f"the certificate in {path} is not valid before {begin:%Y-%m-%d %H:%M} UTC")
    if now > end:
        raise StrongroomError(
            f"the certificate in {path} expired on {end:%Y-%m-%d %H:%M} UTC", hint="ask its holder for the new one"
        )
    purposes = _extension(path, certificate, x509.ExtendedKeyUsage)
    if purposes is not None and not _PURPOSES & set(purposes):
        raise StrongroomError(
            f"the certificate in {path} is not for mail: its extended key usage has no emailProtection",
            hint="name an S/MIME certificate; that of a web server or a device is none",
        )
    try:
        key = certificate.public_key()
    except (UnsupportedAlgorithm, ValueError):
        return None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _SMALLEST_RSA_BITS:
        raise StrongroomError(
            f"the certificate in {path} has an RSA key of {key.key_size} bits; {_SMALLEST_RSA_BITS} are the least",
            hint="ask its holder for one with a longer key",
        )
    return key


def _holder(path: Path, certificate: x509.Certificate) -> Holder:
    names = _extension(path, certificate, x509.SubjectAlternativeName)
    found = names.get_values_for_type(x509.RFC822Name) if names is not None else []
    # Where older authorities put it.
    found += [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)]
    # It goes into headers: nothing that would have to be quoted there.
    good = (text for text in found if len(text) <= _ADDRESS_LIMIT and _ADDRESS.fullmatch(text))
    return Holder(certificate, certificate.fingerprint(hashes.SHA256()).hex(), next(good, ""))


def _extension(path: Path, certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError) as error:
        raise StrongroomError(f"the extensions of the certificate in {path} cannot be read") from error


def _encoded(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
