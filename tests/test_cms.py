"""A study sealed for a mail: what OpenSSL opens and verifies, and what neither opens nor is made."""

from __future__ import annotations

import base64
import email
import email.policy
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any, NamedTuple

import asn1crypto.cms
import click
import pki
import pytest
import scu
from conftest import Server, changed, find_command, send
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pki import DAY, HOUR, Holder
from pydicom.data import get_testdata_file

from storescp import cms, mailkeys
from storescp.cli import export, strongroom
from storescp.cli.session import vault
from storescp.config import load
from storescp.errors import StrongroomError

pytestmark = pytest.mark.needs("openssl")

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
NOW = datetime.now(UTC)
MOST = 25_000_000
SMALL = 200_000
MAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION
# digitalSignature, contentCommitment, keyEncipherment, dataEncipherment, keyAgreement, keyCertSign, cRLSign, …
SIGNS, SEALS, ISSUES = 0, 2, 5


def issue(
    name: str,
    issuer: Holder,
    key: Any,
    *,
    address: str = "",
    usage: tuple[int, ...] | None = (SIGNS, SEALS),
    purposes: tuple[x509.ObjectIdentifier, ...] | None = (MAIL,),
    start: timedelta = -HOUR,
    end: timedelta = DAY,
    subject: x509.Name | None = None,
    ca: bool = False,
) -> Holder:
    """Issue a certificate as authorities for mail do, or as they should not; times count from NOW."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject or pki.named(name))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + start)
        .not_valid_after(NOW + end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.KeyUsage(*(number in usage for number in range(9))), critical=True)
    if purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if address:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(address)]), critical=False)
    return Holder(builder.sign(issuer.key, hashes.SHA256()), key)


class People(NamedTuple):
    """Who sends and who receives, each with NAME.pem and NAME.key in a folder."""

    folder: Path
    root: Holder
    sender: Holder
    clinic: Holder
    practice: Holder
    # A key that is RSA, for certificates that nobody should use.
    key: rsa.RSAPrivateKey

    def path(self, name: str) -> Path:
        return self.folder / name

    def recipients(self, *names: str) -> list[mailkeys.Holder]:
        return [mailkeys.read_recipient(self.path(f"{name}.pem"), NOW) for name in names]

    def signer(self, name: str = "sender") -> mailkeys.Signer:
        return mailkeys.read_signer(self.path(f"{name}.pem"), self.path(f"{name}.key"), NOW, unasked)


def unasked() -> str:
    raise AssertionError("a passphrase was asked for")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    folder = tmp_path_factory.mktemp("people")
    root = pki.authority("Root")
    between = issue("Between", root, pki.new_key(), usage=(ISSUES,), purposes=None, ca=True)
    keys = [rsa.generate_private_key(65537, 2048) for _ in range(3)]
    sender = issue("Sender", between, keys[0], address="radiology@hospital.example")
    clinic = issue("Clinic", root, keys[1], address="lee@clinic.example")
    practice = issue("Practice", root, keys[2], address="office@practice.example")
    curve = issue("Curve", between, ec.generate_private_key(ec.SECP384R1()), address="curve@hospital.example")
    for name, holder, *above in (
        ("root", root),
        ("sender", sender, between),
        ("curve", curve, between),
        ("clinic", clinic),
        ("practice", practice),
    ):
        holder.save(folder, name, *above)
        (folder / f"{name}.key").chmod(0o600)
    return People(folder, root, sender, clinic, practice, keys[1])


def attached(*files: bytes, most: int = MOST) -> cms.Attachment:
    attachment = cms.Attachment(most)
    for content in files:
        attachment.add([content[:100], content[100:]])
    return attachment


def sealed(people: People, *names: str, signer: str = "sender", content: bytes = b"DICM" * 100) -> bytes:
    attachment = attached(content)
    return cms.message(attachment.close(), 1, people.recipients(*names), people.signer(signer), NOW, most=MOST)


# --- OpenSSL, which shares no line with what seals


def openssl(*arguments: str | Path, stdin: bytes) -> bytes | None:
    """Return what a command of OpenSSL's writes; None where it fails."""
    command = [str(find_command("openssl")), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60)
    return None if done.returncode else done.stdout


def decrypted(people: People, message: bytes, name: str = "clinic", verb: str = "cms") -> bytes | None:
    own = ("-recip", people.path(f"{name}.pem"), "-inkey", people.path(f"{name}.key"))
    return openssl(verb, "-decrypt", *own, stdin=message)


def verified(people: People, signed: bytes, verb: str = "cms") -> bytes | None:
    return openssl(verb, "-verify", "-CAfile", people.path("root.pem"), "-purpose", "smimesign", stdin=signed)


def opened(people: People, message: bytes, name: str = "clinic", verb: str = "cms") -> bytes | None:
    """Return what was signed, where a recipient's key opens the message and the signature holds; else None."""
    signed = decrypted(people, message, name, verb)
    return None if signed is None else verified(people, signed, verb)


def parsed(content: bytes) -> EmailMessage:
    message = email.message_from_bytes(content, policy=email.policy.SMTP)
    assert isinstance(message, EmailMessage)
    assert not message.defects
    return message


def files_in(signed: bytes) -> dict[str, bytes]:
    """Return the files in the attachment of what was signed."""
    [attachment] = parsed(signed).iter_attachments()
    with zipfile.ZipFile(io.BytesIO(attachment.get_content())) as found:
        assert found.testzip() is None
        return {name: found.read(name) for name in found.namelist()}


# --- what is made


@pytest.mark.parametrize("verb", ["cms", "smime"])
@pytest.mark.parametrize("signer", ["sender", "curve"])
def test_each_recipient_opens_a_message_and_sees_who_signed_it(people: People, verb: str, signer: str) -> None:
    message = sealed(people, "clinic", "practice", signer=signer, content=CT.read_bytes())
    for name in ("clinic", "practice"):
        signed = opened(people, message, name, verb)
        assert signed is not None
        assert files_in(signed) == {"DICOM/00000001": CT.read_bytes()}


def test_the_message_has_the_form_that_the_standards_give_it(people: People) -> None:
    message = sealed(people, "clinic", "practice")
    outer = parsed(message)
    assert (outer["From"], outer["To"]) == ("radiology@hospital.example", "lee@clinic.example, office@practice.example")
    assert outer["Subject"] == "DICOM-ZIP"
    assert outer.get_content_type() == "application/pkcs7-mime"
    assert outer["Content-Type"].params == {"smime-type": "enveloped-data", "name": "smime.p7m"}
    assert set(outer.keys()) == {
        *("From", "To", "Subject", "Date", "Message-ID", "MIME-Version"),
        *("Content-Type", "Content-Transfer-Encoding", "Content-Disposition"),
    }
    lines = message.split(b"\r\n")
    assert max(map(len, lines)) <= 78
    assert not any(b"\n" in line or b"\r" in line for line in lines)

    envelope = asn1crypto.cms.ContentInfo.load(outer.get_content())["content"]
    info = envelope["encrypted_content_info"]
    assert info["content_encryption_algorithm"]["algorithm"].native == "aes256_cbc"
    assert [each.name for each in envelope["recipient_infos"]] == ["ktri", "ktri"]

    inner = parsed(decrypted(people, message) or b"")
    assert inner.get_content_type() == "multipart/signed"
    body, signature = inner.iter_parts()
    assert signature.get_content_type() == "application/pkcs7-signature"
    assert body.get_content_type() == "multipart/mixed"
    text, attachment = body.iter_parts()
    assert attachment["Content-Type"] == 'application/zip; id="DICOM.ZIP"; name="DICOM.ZIP"'
    assert attachment["Content-Disposition"] == 'attachment; filename="DICOM.ZIP"'
    # A recipient who seals what was signed anew, for somebody else, cannot hide whom it was signed for.
    for holder in (people.clinic, people.practice, people.sender):
        assert holder.certificate.fingerprint(hashes.SHA256()).hex() in text.get_content()


def test_certificates_without_addresses_make_a_message_without_any(people: People, tmp_path: Path) -> None:
    issue("Nobody", people.root, people.key).save(tmp_path, "nobody")
    (tmp_path / "nobody.key").chmod(0o600)
    nobody = people._replace(folder=tmp_path)
    people.root.save(tmp_path, "root")
    message = sealed(nobody, "nobody", signer="nobody", content=b"x")
    assert not {"From", "To", "Message-ID"} & set(parsed(message).keys())
    assert files_in(opened(nobody, message, "nobody") or b"") == {"DICOM/00000001": b"x"}


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("lee@clinic.example", "lee@clinic.example"),
        ("j.lee+mail_2@a-b.clinic.example", "j.lee+mail_2@a-b.clinic.example"),
        ("lee@clinic.example\r\nBcc: thief@example.org", ""),
        ("lee@clinic.example, thief@example.org", ""),
        ("Lee <lee@clinic.example>", ""),
        ('"lee thief"@clinic.example', ""),
        ("lee", ""),
        ("a" * 250 + "@b.example", ""),
    ],
)
def test_an_address_goes_into_headers_only_where_it_needs_no_quotes(
    people: People, tmp_path: Path, address: str, found: str
) -> None:
    # As older authorities write it, where nothing checks what it is.
    subject = x509.Name([x509.NameAttribute(NameOID.EMAIL_ADDRESS, address)])
    issue("", people.root, people.key, subject=subject).save(tmp_path, "x")
    assert mailkeys.read_recipient(tmp_path / "x.pem", NOW).address == found


def test_the_largest_message_is_just_as_large_as_allowed(people: People) -> None:
    content = random.Random(9).randbytes(SMALL)
    names = people.recipients("clinic"), people.signer()
    made = cms.message(attached(content).close(), 1, *names, NOW, most=MOST)
    assert cms.message(attached(content, most=len(made)).close(), 1, *names, NOW, most=len(made))
    with pytest.raises(StrongroomError, match="nothing was written"):
        cms.message(attached(content).close(), 1, *names, NOW, most=len(made) - 1)


def test_a_study_that_is_too_large_is_given_up_as_soon_as_that_is_plain() -> None:
    noise = random.Random(9)
    taken = []

    def endless() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield noise.randbytes(100_000)

    with pytest.raises(StrongroomError, match="more than 1 MB"):
        cms.Attachment(1_000_000).add(endless())
    assert len(taken) < 10
    full = cms.Attachment(1_000_000)
    with pytest.raises(StrongroomError, match="more than 1 MB"):
        for _ in range(100):
            full.add([noise.randbytes(10_000)])


# --- what was changed


def spots(message: bytes) -> dict[str, tuple[int, int]]:
    """Return where in an envelope's DER its parts are: first byte and the one behind the last."""
    envelope = asn1crypto.cms.ContentInfo.load(message)["content"]
    info = envelope["encrypted_content_info"]
    parts = {
        "key": envelope["recipient_infos"][0].chosen["encrypted_key"].native,
        "start": info["content_encryption_algorithm"]["parameters"].native,
        "content": info["encrypted_content"].native,
    }
    return {name: (message.index(part), message.index(part) + len(part)) for name, part in parts.items()}


def outer(der: bytes) -> bytes:
    return (
        b"MIME-Version: 1.0\r\nContent-Type: application/pkcs7-mime; smime-type=enveloped-data\r\n"
        b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(der).replace(b"\n", b"\r\n")
    )


def flipped(content: bytes, at: int, bits: int = 0x80) -> bytes:
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


def test_a_changed_envelope_does_not_open_or_does_not_verify(people: People) -> None:
    noise = random.Random(9).randbytes(20_000)
    der = parsed(sealed(people, "clinic", content=noise)).get_content()
    original = opened(people, outer(der))
    assert original is not None
    found = spots(der)
    # The key, and what the first block is made with.
    for name in ("key", "start"):
        first, end = found[name]
        for at in (first, first + 1, (first + end) // 2, end - 1):
            assert opened(people, outer(flipped(der, at))) is None, (name, at - first)
    # Text and attachment: bits, blocks that change places, that are not there.
    first, end = found["content"]
    body = first + 1000, first + len(noise)
    for at in (first, *range(*body, 2000)):
        assert opened(people, outer(flipped(der, at, 0x01))) is None, at - first
    block = first + (body[1] - first) // 32 * 16
    swapped = der[:block] + der[block + 16 : block + 32] + der[block : block + 16] + der[block + 32 :]
    assert opened(people, outer(swapped)) is None
    again = der[:block] + der[block - 16 : block] + der[block + 16 :]
    assert opened(people, outer(again)) is None
    # Around them, where some words are not signed: whatever verifies is what was signed.
    for at in (*range(first + 16, first + 300, 16), *range(end - 5000, end, 150), end - 1):
        assert opened(people, outer(flipped(der, at, 0x01))) in {None, original}, at - first


def test_a_changed_part_of_what_was_signed_does_not_verify(people: People) -> None:
    signed = decrypted(people, sealed(people, "clinic"))
    assert signed is not None
    assert verified(people, signed) is not None
    boundary = re.search(rb'boundary="(\w+)"', signed)
    assert boundary is not None
    _, body, signature, _ = signed.split(b"--" + boundary[1])
    start = signed.index(body)
    inside = {
        "the text": signed.index(b"DICOM study"),
        "whom it is for": signed.index(b"lee@clinic"),
        "a header": signed.index(b"application/zip"),
        "the first file": signed.index(b"UEsDB") + 100,
        "the end": start + len(body) - 10,
    }
    for name, at in inside.items():
        assert verified(people, flipped(signed, at, 0x01)) is None, name
    # In the signature: its own bytes at the end, the digest in the signed attributes before them, the certificates.
    [_, encoded] = signature.split(b"\r\n\r\n", 1)
    der = base64.b64decode(encoded)
    digest = asn1crypto.cms.ContentInfo.load(der)["content"]["signer_infos"][0]
    for part in (digest["signature"].native, digest["signed_attrs"].dump()[4:], people.sender.certificate.signature):
        changed_der = flipped(der, der.index(part) + len(part) // 2)
        changed_signature = signed.replace(encoded, base64.encodebytes(changed_der).replace(b"\n", b"\r\n") + b"\r\n")
        assert verified(people, changed_signature) is None
    # And without a signature nothing verifies at all.
    assert verified(people, b"Content-Type: text/plain\r\n\r\nx\r\n") is None


def test_another_s_key_does_not_open_a_message(people: People) -> None:
    message = sealed(people, "clinic")
    assert decrypted(people, message, "practice") is None
    # Nor where OpenSSL is not told whose it is, and gives nonsense for every key alike.
    key = ("-inkey", people.path("practice.key"))
    nonsense = openssl("cms", "-decrypt", *key, stdin=message)
    assert nonsense is None or verified(people, nonsense) is None


def test_somebody_else_s_signature_does_not_pass_for_the_sender_s(people: People, tmp_path: Path) -> None:
    thief = pki.authority("Root")
    false = issue("Sender", thief, people.key, address="radiology@hospital.example").save(tmp_path, "false")
    (tmp_path / "false.key").chmod(0o600)
    signer = mailkeys.read_signer(tmp_path / "false.pem", tmp_path / "false.key", NOW, unasked)
    assert signer.holder.address == "radiology@hospital.example"
    assert false.certificate.fingerprint(hashes.SHA256()).hex() == signer.holder.fingerprint
    message = cms.message(attached(b"x").close(), 1, people.recipients("clinic"), signer, NOW, most=MOST)
    assert decrypted(people, message) is not None
    assert opened(people, message) is None


# --- certificates and keys that are refused


Make = Callable[[People, Path], Any]


def certificate(new_key: Callable[[], Any] | None = None, **options: Any) -> Make:
    def make(people: People, folder: Path) -> None:
        issue("Somebody", people.root, new_key() if new_key else people.key, **options).save(folder, "x")

    return make


def text(content: str) -> Make:
    return lambda _people, folder: (folder / "x.pem").write_text(content)


BAD = [
    (certificate(start=-2 * DAY, end=-DAY), "expired on"),
    (certificate(start=DAY, end=2 * DAY), "is not valid before"),
    (certificate(lambda: rsa.generate_private_key(65537, 1024)), "an RSA key of 1024 bits; 2048 are the least"),
    (certificate(purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)), "is not for mail"),
    (text("a letter\n"), "holds no certificate in PEM form"),
    (text(""), "holds no certificate in PEM form"),
    (text("-----BEGIN CERTIFICATE-----\nTm8=\n-----END CERTIFICATE-----\n"), "is damaged"),
    (lambda _people, _folder: None, "cannot be read: No such file or directory"),
    (lambda _people, folder: (folder / "x.pem").mkdir(), "cannot be read: Is a directory"),
]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *BAD,
        (certificate(usage=(SIGNS,)), "is not for encryption"),
        (certificate(pki.new_key), "has a key that is not RSA"),
        (
            lambda people, folder: people.clinic.save(folder, "x", people.practice),
            "holds 2 certificates, and it is not plain whom the message is for",
        ),
    ],
)
def test_nobody_seals_for_a_bad_certificate(people: People, tmp_path: Path, make: Make, words: str) -> None:
    make(people, tmp_path)
    with pytest.raises(StrongroomError, match=words) as caught:
        mailkeys.read_recipient(tmp_path / "x.pem", NOW)
    assert "x.pem" in str(caught.value)


def other_key(people: People, folder: Path) -> None:
    people.clinic.save(folder, "x")
    (folder / "x.key").write_text(people.practice.key_pem)


def no_key(people: People, folder: Path) -> None:
    people.clinic.save(folder, "x")
    (folder / "x.key").write_text(people.clinic.pem)


def damaged_key(people: People, folder: Path) -> None:
    people.clinic.save(folder, "x")
    (folder / "x.key").write_text("-----BEGIN PRIVATE KEY-----\nTm8=\n-----END PRIVATE KEY-----\n")


def ed25519_key(people: People, folder: Path) -> None:
    people.clinic.save(folder, "x")
    key = ed25519.Ed25519PrivateKey.generate()
    (folder / "x.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        *BAD,
        (certificate(usage=(SEALS,)), "is not for signatures"),
        (certificate(lambda: ec.generate_private_key(ec.SECP256K1())), "of a kind that mail programs do not know"),
        (other_key, "is not that of the certificate"),
        (ed25519_key, "is not that of the certificate"),
        (no_key, "holds no private key"),
        (damaged_key, "is damaged, or of a kind nobody knows"),
    ],
)
def test_nobody_signs_with_a_bad_certificate_or_key(people: People, tmp_path: Path, make: Make, words: str) -> None:
    make(people, tmp_path)
    key = tmp_path / "x.key"
    if key.exists():
        key.chmod(0o600)
    with pytest.raises(StrongroomError, match=words):
        mailkeys.read_signer(tmp_path / "x.pem", key, NOW, unasked)


@pytest.mark.parametrize(
    "options",
    [
        {"usage": None, "purposes": None},
        {"usage": (SIGNS, 1, SEALS, 3)},
        {"purposes": (ExtendedKeyUsageOID.CLIENT_AUTH, MAIL)},
        {"purposes": (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)},
        {"start": -DAY, "end": timedelta(seconds=1)},
    ],
)
def test_a_certificate_that_mail_programs_use_is_taken(people: People, tmp_path: Path, options: dict[str, Any]) -> None:
    issue("Somebody", people.root, people.key, **options).save(tmp_path, "x")
    (tmp_path / "x.key").chmod(0o600)
    assert mailkeys.read_recipient(tmp_path / "x.pem", NOW)
    assert mailkeys.read_signer(tmp_path / "x.pem", tmp_path / "x.key", NOW, unasked)


def encrypted(holder: Holder, passphrase: bytes, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return holder.key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(passphrase))


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key_opens_with_its_passphrase_alone_and_asks_once(
    people: People, tmp_path: Path, form: PrivateFormat
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(people.sender.pem.encode() + encrypted(people.sender, "köy".encode(), form))
    both.chmod(0o600)
    answers = iter(["koy", "", "köy"])
    for _ in range(2):
        with pytest.raises(StrongroomError, match="this passphrase does not open"):
            mailkeys.read_signer(both, None, NOW, lambda: next(answers))
    assert mailkeys.read_signer(both, None, NOW, lambda: next(answers)).holder.address == "radiology@hospital.example"
    assert list(answers) == []


def test_a_private_key_that_others_may_read_is_not_used(people: People, tmp_path: Path) -> None:
    people.sender.save(tmp_path, "x")
    for mode in (0o640, 0o604, 0o620):
        (tmp_path / "x.key").chmod(mode)
        with pytest.raises(StrongroomError, match=r"open to others; 'chmod 600 .*x\.key'"):
            mailkeys.read_signer(tmp_path / "x.pem", tmp_path / "x.key", NOW, unasked)


# --- the command


CT_STUDY, DAMAGED_STUDY, LARGE_STUDY = scu.read(CT).study, scu.read(MR).study, "1.2.9"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A served store with three studies: three instances, one, and one of a megabyte."""
    server = Server(tmp_path_factory.mktemp("s"))
    folder = tmp_path_factory.mktemp("sent")
    server.init()
    server.add_peer("CT1")
    server.set("gate", pack_idle_seconds=1)
    try:
        server.start()
        more = [changed(CT, folder, SOPInstanceUID=f"1.2.3.{n}", InstanceNumber=str(n)) for n in (5, 6)]
        uids = {"StudyInstanceUID": LARGE_STUDY, "SeriesInstanceUID": "1.2.9.1", "SOPInstanceUID": "1.2.9.1.1"}
        large = changed(MR, folder, **uids, PixelData=random.Random(9).randbytes(1_000_000))
        assert send(server, [CT, *more, MR, large]) == [0] * 5
        server.wait_admitted()
        yield server
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()


class Command:
    """``export --cms`` on a store, as radiology for the clinic."""

    def __init__(self, store: Server, people: People, out: Path) -> None:
        self.store, self.people, self.out = store, people, out
        self.key = people.path("sender.key")

    def arguments(self, study: str, *more: str | Path, output: str = "study.eml") -> list[str]:
        given = ["export", "--study", study, "--cms", self.people.path("clinic.pem"), "--output", self.out / output]
        given += ["--sign", self.people.path("sender.pem"), "--signer-key", self.key, *more]
        return [str(each) for each in given]

    def refused(self, study: str, *more: str | Path, status: int = 1) -> str:
        """Return the error of a command that must fail and leave nothing behind."""
        done = self.store.run(*self.arguments(study, *more))
        assert (done.status, list(self.out.iterdir())) == (status, []), (done.out, done.err)
        return done.err

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Return what the chain says of exports."""
        lines = self.store.ok("audit", "show", "--type", kind, "--json").out.splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in {"number", "time", "type"}} for line in lines]


@pytest.fixture
def command(store: Server, people: People, tmp_path: Path) -> Command:
    (tmp_path / "out").mkdir()
    return Command(store, people, tmp_path / "out")


def test_a_study_is_sealed_whole_for_its_recipients_and_that_is_recorded(
    command: Command, store: Server, people: People, tmp_path: Path
) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("a passphrase\nwritten down in spring\n")
    command.key = tmp_path / "sender.key"
    command.key.write_bytes(encrypted(people.sender, b"a passphrase"))
    for path in (passphrase, command.key):
        path.chmod(0o600)
    store.ok("export", "--study", CT_STUDY, "--to", tmp_path / "clear")
    more = ("--cms", people.path("practice.pem"), "--signer-passphrase-file", passphrase, "--json")
    made = store.ok(*command.arguments(CT_STUDY, *more)).json()

    # The file: whole, private, and nothing beside it.
    [file] = command.out.iterdir()
    message = file.read_bytes()
    assert (file.name, file.stat().st_mode & 0o7777) == ("study.eml", 0o600)
    prints = [h.certificate.fingerprint(hashes.SHA256()).hex() for h in (people.clinic, people.practice, people.sender)]
    whom = {"to": prints[:2], "signer": prints[2]}
    about = {"bytes": len(message), **whom}
    assert made == {"format": 1, "written": 3, "already_there": 0, "failed": 0, "message": about}

    # Bit for bit what was stored, for both, under names that say nothing.
    stored = sorted(path.read_bytes() for path in (tmp_path / "clear").rglob("*.dcm"))
    assert scu.raw_data_set(CT) in {content[-len(scu.raw_data_set(CT)) :] for content in stored}
    for name in ("clinic", "practice"):
        signed = opened(people, message, name)
        assert signed is not None
        found = files_in(signed)
        assert sorted(found) == ["DICOM/00000001", "DICOM/00000002", "DICOM/00000003"]
        assert sorted(found.values()) == stored
        said, *_ = parsed(signed).iter_parts()
        for word in ("CompressedSamples", "1CT1", CT_STUDY):
            assert word not in said.get_content()
    for word in ("CompressedSamples", "1CT1", CT_STUDY):
        assert word.encode() not in message

    # The chain: the export in clear that came before is one thing, this is another.
    store.ok("lock")
    store.ok("unlock", "--key-file", store.home / "store.key")
    by = {"uid": os.geteuid(), "study": CT_STUDY}
    assert command.told("export-begun") == [by, {**by, **whom}]
    assert command.told("exported") == [{**by, "instances": 3}, {**by, "instances": 3, **whom}]
    told = store.ok("audit", "who", "--study", CT_STUDY).out
    assert all(each in told for each in prints[:2])

    # Whom the vault cannot record, it does not take for a recipient.
    with vault(load(store.config)) as client:
        for wrong in ({"study": "1.2.4"}, {"study": "1.2.*"}, {"to": []}, {"to": ["x"]}, {"signer": ""}):
            with pytest.raises(StrongroomError):
                client.json("POST", "/v1/export-begun", {"study": CT_STUDY, **whom, **wrong})
    assert len(command.told("export-begun")) == 2


def test_a_study_that_is_too_large_unknown_or_damaged_leaves_no_file(command: Command, store: Server) -> None:
    assert "more than 1 MB; nothing was written" in command.refused(LARGE_STUDY, "--most-mb", "1")
    assert "nothing matched" in command.refused("1.2.4", status=5)
    with vault(load(store.config)) as client:
        [row] = client.lines("POST", "/v1/search", {"level": "instance", "filters": {"study": DAMAGED_STUDY}})
    path = store.store / "objects" / row["pack"][:2] / row["pack"]
    content = bytearray(path.read_bytes())
    # In the last chunk of the data set: what comes before it opens, and was read.
    content[4096 + 40 + row["bytes"]] ^= 1
    path.write_bytes(content)
    assert "does not open" in command.refused(DAMAGED_STUDY)


def test_the_passphrase_of_the_signer_s_key_is_asked_for_on_the_terminal(
    command: Command, store: Server, people: People, tmp_path: Path
) -> None:
    command.key = tmp_path / "sender.key"
    command.key.write_bytes(encrypted(people.sender, b"a passphrase"))
    command.key.chmod(0o600)
    ours, theirs = os.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "storescp", "--config", str(store.config), *command.arguments(CT_STUDY)],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            assert process.stderr is not None
            said = b""
            while not said.endswith(b"key: "):
                said += (read := process.stderr.read(1))
                assert read, said
            os.write(ours, b"a passphrase\n")
            out, more = process.communicate()
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0, said + more
    assert b"a passphrase" not in said + more + out
    assert b"for lee@clinic.example, certificate" in out
    assert opened(people, (command.out / "study.eml").read_bytes()) is not None


@pytest.mark.needs_root
@pytest.mark.needs("strace")
def test_no_file_but_the_message_is_written(command: Command, store: Server, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    traced = [str(find_command("strace")), "-f", "-qq", "-o", str(trace), "-e", "trace=open,openat,creat,memfd_create"]
    traced += [sys.executable, "-B", "-m", "storescp", "--config", str(store.config), *command.arguments(CT_STUDY)]
    subprocess.run(traced, check=True, timeout=100, stdout=subprocess.DEVNULL)
    written = [line for line in trace.read_text().splitlines() if re.search("O_WRONLY|O_RDWR|creat|memfd", line)]
    [name] = [line.split('"')[1] for line in written if '"/dev/' not in line]
    assert re.fullmatch(rf"{re.escape(str(command.out))}/\.[0-9a-f]{{16}}\.part", name)


def told_at_once(*arguments: str | Path) -> str:
    """Return the error of a command that gets no further than its options."""
    with pytest.raises((click.UsageError, StrongroomError)) as caught:
        strongroom.main([str(each) for each in arguments], standalone_mode=False)
    return str(caught.value)


def test_options_that_do_not_fit_and_files_in_the_way_are_told_at_once(people: People, tmp_path: Path) -> None:
    pem, out = people.path("clinic.pem"), tmp_path / "study.eml"
    study = ("export", "--study", "1.2.3")
    both = ("--cms", pem, "--sign", pem)
    assert "both --cms" in told_at_once(*study, "--cms", pem, "--output", out)
    assert "both --cms" in told_at_once(*study, "--sign", pem, "--output", out)
    assert "both --cms" in told_at_once(*study, "--signer-key", pem, "--output", out)
    assert "one study" in told_at_once("export", "--series", "1.2.3", *both, "--output", out)
    assert "one study" in told_at_once(*study, *both)
    for more in (("--all",), ("--series", "1.2.4"), ("--sop", "1.2.4"), ("--to", tmp_path)):
        assert "one study" in told_at_once(*study, *both, "--output", out, *more)
    assert "no pattern" in told_at_once("export", "--study", "1.2.*", *both, "--output", out)
    for size in (0, 201):
        assert "1<=x<=200" in told_at_once(*study, *both, "--output", out, "--most-mb", str(size))
    assert "at most 50 recipients" in told_at_once(*study, *both, "--output", out, *["--cms", pem] * 50)
    assert "there is no folder" in told_at_once(*study, *both, "--output", tmp_path / "no" / "study.eml")
    out.symlink_to(tmp_path / "nowhere")
    assert f"{out} exists already" in told_at_once(*study, *both, "--output", out)


def test_a_message_never_replaces_a_file_that_came_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "study.eml"
    export._place(b"one", file)
    with pytest.raises(StrongroomError, match="exists already"):
        export._place(b"two", file)
    with pytest.raises(StrongroomError, match="cannot be written: No such file"):
        export._place(b"two", tmp_path / "no" / "study.eml")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"study.eml": b"one"}


def test_a_passphrase_comes_from_a_terminal_or_from_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    with pytest.raises(StrongroomError, match="there is no terminal to ask"):
        export._passphrase(None)
    with pytest.raises(StrongroomError, match="cannot be read: No such file"):
        export._passphrase(file)
    file.write_bytes("four unrelated wörds\nand a note\n".encode())
    file.chmod(0o640)
    with pytest.raises(StrongroomError, match="open to others"):
        export._passphrase(file)
    file.chmod(0o600)
    assert export._passphrase(file) == "four unrelated wörds"
    file.write_bytes(b"\xff\n")
    with pytest.raises(StrongroomError, match="it is no text"):
        export._passphrase(file)
