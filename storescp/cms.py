"""A study as a mail message: DICOM files in a ZIP file, signed, then enveloped for its recipients (S/MIME).

PS3.15 B.8 asks for a message that is encrypted with AES and signed by its sender, with the files as an attachment;
PS3.11 L.3.2 names the attachment and the subject. RFC 8551 is the form of the message, RFC 5652 (CMS) that of signature
and envelope. No network, no vault: who has data sets and certificates gets a message, all of it in memory.
"""

from __future__ import annotations

import base64
import secrets
import zipfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from io import BytesIO

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.hazmat.primitives.serialization.pkcs7 import (
    PKCS7EnvelopeBuilder,
    PKCS7Options,
    PKCS7SignatureBuilder,
)

from storescp.errors import StrongroomError, plural
from storescp.mailkeys import Holder, Signer

MOST_RECIPIENTS = 50
# Base64 in lines of 76 characters, twice: the attachment in what is signed, and the envelope in the message.
_GROWTH = (78 / 57) ** 2
# Behind this a ZIP file needs fields that not every program reads.
_FILE_LIMIT = (1 << 31) - 1
_ATTACHMENT = "DICOM.ZIP"
_SUBJECT = "DICOM-ZIP"


class Attachment:
    """A ZIP file of DICOM files, made in memory.

    Files have File IDs for names (PS3.12 V.1.2.1), numbers that say nothing of a patient, and no time.
    """

    def __init__(self, most: int) -> None:
        """Begin an empty one for a message of at most ``most`` bytes."""
        self._out = BytesIO()
        self._zip = zipfile.ZipFile(self._out, "w", zipfile.ZIP_DEFLATED)
        self._most = most
        self.files = 0

    def add(self, content: Iterable[bytes]) -> None:
        """Add a file.

        Raises:
            StrongroomError: The message would be larger than allowed.
        """
        self.files += 1
        name = f"DICOM/{self.files:08d}"
        length = 0
        with self._zip.open(_entry(name), "w") as file:
            for piece in content:
                length += len(piece)
                if length > _FILE_LIMIT:
                    raise too_large(self._most)
                file.write(piece)
                self._check()
        self._check()

    def _check(self) -> None:
        if self._out.tell() * _GROWTH > self._most:
            raise too_large(self._most)

    def close(self) -> bytes:
        """Return the ZIP file."""
        self._zip.close()
        return self._out.getvalue()


def too_large(most: int) -> StrongroomError:
    """Return the error that a message would have more than ``most`` bytes."""
    return StrongroomError(
        f"the study makes a message of more than {most / 1e6:.0f} MB; nothing was written",
        hint="mail servers refuse larger ones; --most-mb allows more where yours do not, "
        "or write the study with --to on an encrypted disk",
    )


def message(
    attachment: bytes, files: int, recipients: Sequence[Holder], signer: Signer, now: datetime, *, most: int
) -> bytes:
    """Return a message: signed, then enveloped for each recipient under AES-256 (CBC), with its headers.

    Memory: seven times the attachment, which is less than four times the message.

    Args:
        attachment: The ZIP file.
        files: How many DICOM files are in it.
        recipients: Whose keys open it, one or more.
        signer: Who attests that the recipients may have it.
        now: When this is.
        most: How many bytes the message may have.

    Raises:
        StrongroomError: It would be larger.
    """
    enveloped = _enveloped(_signed(_body(attachment, files, recipients, signer, now), signer), recipients)
    made = _headers(recipients, signer, now) + _lines(enveloped)
    if len(made) > most:
        raise too_large(most)
    return made


def _body(attachment: bytes, files: int, recipients: Sequence[Holder], signer: Signer, now: datetime) -> bytes:
    """Return what is signed. It names its recipients: else one of them could seal it anew for anybody else."""
    named = "\n".join(f"  {_said(holder)}" for holder in recipients)
    text = (
        f"This message carries a DICOM study: {plural(files, 'file')} in {_ATTACHMENT}.\n\n"
        "With the signature the sender attests that these recipients, named by the\n"
        f"SHA-256 of their certificates, may have it (DICOM PS3.15 B.8):\n{named}\n\n"
        f"Signed on {now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} by\n  {_said(signer.holder)}\n\n"
        "Do not use a copy whose signature your mail program does not call valid.\n"
    )
    return _multipart(
        "multipart/mixed",
        (
            ("Content-Type: text/plain; charset=us-ascii", "Content-Transfer-Encoding: 7bit"),
            text.replace("\n", "\r\n").encode("ascii"),
        ),
        (
            # PS3.11 L.3.2 names all three.
            (
                f'Content-Type: application/zip; id="{_ATTACHMENT}"; name="{_ATTACHMENT}"',
                "Content-Transfer-Encoding: base64",
                f'Content-Disposition: attachment; filename="{_ATTACHMENT}"',
            ),
            _lines(attachment),
        ),
    )


def _signed(body: bytes, signer: Signer) -> bytes:
    # In this order: a builder that is given a signer forgets the certificates that it had.
    builder = PKCS7SignatureBuilder().set_data(body)
    builder = builder.add_signer(signer.holder.certificate, signer.key, hashes.SHA256())
    for certificate in signer.above:
        builder = builder.add_certificate(certificate)
    signature = builder.sign(Encoding.DER, [PKCS7Options.DetachedSignature, PKCS7Options.Binary])
    return _multipart(
        'multipart/signed; protocol="application/pkcs7-signature"; micalg=sha-256',
        ((), body),
        (
            (
                'Content-Type: application/pkcs7-signature; name="smime.p7s"',
                "Content-Transfer-Encoding: base64",
                'Content-Disposition: attachment; filename="smime.p7s"',
            ),
            _lines(signature),
        ),
    )


def _multipart(kind: str, *parts: tuple[Sequence[str], bytes]) -> bytes:
    """Return a MIME entity of parts: headers, if it has not brought its own, and content.

    By hand, because email.generator takes several times the memory.
    """
    # Nothing in base64 or in our texts begins with two hyphens; a signed part's boundaries are other random ones.
    boundary = secrets.token_hex(16)
    made = [f'Content-Type: {kind};\r\n boundary="{boundary}"\r\n'.encode()]
    for headers, content in parts:
        made.append(f"\r\n--{boundary}\r\n".encode())
        made += [f"{header}\r\n".encode() for header in headers]
        made += [b"\r\n"] if headers else []
        made.append(content)
    made.append(f"\r\n--{boundary}--\r\n".encode())
    return b"".join(made)


def _enveloped(content: bytes, recipients: Sequence[Holder]) -> bytes:
    builder = PKCS7EnvelopeBuilder().set_data(content).set_content_encryption_algorithm(AES256)
    for holder in recipients:
        builder = builder.add_recipient(holder.certificate)
    return builder.encrypt(Encoding.DER, [PKCS7Options.Binary])


def _headers(recipients: Sequence[Holder], signer: Signer, now: datetime) -> bytes:
    """Return the headers, which everybody on the way reads: nothing in them is of a patient or this machine."""
    head = EmailMessage(policy=SMTP)
    if signer.holder.address:
        # Receivers compare this with the certificate (RFC 8550, section 3).
        head["From"] = Address(addr_spec=signer.holder.address)
    addresses = list(dict.fromkeys(holder.address for holder in recipients if holder.address))
    if addresses:
        head["To"] = [Address(addr_spec=address) for address in addresses]
    head["Subject"] = _SUBJECT
    head["Date"] = format_datetime(now.astimezone(UTC))
    if signer.holder.address:
        head["Message-ID"] = f"<{secrets.token_hex(16)}@{signer.holder.address.rpartition('@')[2]}>"
    head["MIME-Version"] = "1.0"
    head["Content-Type"] = 'application/pkcs7-mime; smime-type=enveloped-data; name="smime.p7m"'
    head["Content-Transfer-Encoding"] = "base64"
    head["Content-Disposition"] = 'attachment; filename="smime.p7m"'
    return head.as_bytes()


def _lines(content: bytes) -> bytes:
    """Return base64 in lines of 76 characters that end as mail's do."""
    step = 57 << 10
    pieces = (content[start : start + step] for start in range(0, len(content), step))
    return b"".join(base64.encodebytes(piece).replace(b"\n", b"\r\n") for piece in pieces)


def _said(holder: Holder) -> str:
    return f"{holder.fingerprint} {holder.address}".rstrip()


def _entry(name: str) -> zipfile.ZipInfo:
    # ZipInfo's own time is the first that a ZIP file can name.
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o600 << 16
    return entry
