"""Revocation lists: which count, for whom, until when; whatever a file holds, it is a list or the one error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pki
import pytest
from cryptography import x509
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pki import DAY, HOUR, Holder

from storescp.gate import crl
from storescp.gate.crl import CrlError, Revocations

NOW = datetime.now(UTC)
QUICK = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ROOT, OTHER = pki.authority("root"), pki.authority("other")
MIDDLE = ROOT.issue("middle", ca=True)
LEAF, GOOD, DEEP = ROOT.issue("leaf"), ROOT.issue("good"), MIDDLE.issue("deep")
# The same name, another key: an authority that changed its key, or was made anew.
ROOT_2 = pki.authority("root")
LEAF_2 = ROOT_2.issue("leaf 2")
AUTHORITIES = [holder.certificate for holder in (ROOT, OTHER, MIDDLE, ROOT_2)]
EXPIRED = "the revocation list of its authority has expired: put a new one into {}"
REVOKED = "its authority has revoked it: issue a new one, 'strongroom peer renew' does"


def read(folder: Path, *lists: x509.CertificateRevocationList | bytes) -> Revocations:
    files = []
    for number, found in enumerate(lists):
        files.append(folder / f"{number}.crl")
        files[-1].write_bytes(found if isinstance(found, bytes) else pki.pem(found))
    return crl.read(files, AUTHORITIES)


def refused(folder: Path, *lists: x509.CertificateRevocationList | bytes) -> str:
    """Return what is said about lists that cannot be used, without the file's name, which it must begin with."""
    with pytest.raises(CrlError) as raised:
        read(folder, *lists)
    assert str(raised.value).startswith(f"{folder / f'{len(lists) - 1}.crl'}: ")
    return str(raised.value).split(": ", 1)[1]


def refusal(revocations: Revocations, *chain: Holder, now: datetime = NOW) -> str:
    return revocations.refusal([holder.certificate for holder in chain], now)


# --- whom a list revokes


def test_without_lists_nobody_is_refused(tmp_path: Path) -> None:
    assert refusal(read(tmp_path), LEAF, ROOT) == ""
    assert read(tmp_path).warnings(NOW) == []


@pytest.mark.parametrize("encoded", [pki.pem, pki.der], ids=["PEM", "DER"])
def test_who_is_on_the_list_is_refused_and_nobody_else(
    tmp_path: Path, encoded: Callable[[x509.CertificateRevocationList], bytes]
) -> None:
    revocations = read(tmp_path, encoded(ROOT.revoke(LEAF)))
    assert refusal(revocations, LEAF, ROOT) == REVOKED
    assert refusal(revocations, GOOD, ROOT) == ""
    assert refusal(revocations, OTHER.issue("leaf"), OTHER) == ""


def test_a_certificate_counts_as_revoked_also_where_the_chain_ends_with_it(tmp_path: Path) -> None:
    assert refusal(read(tmp_path, ROOT.revoke(LEAF)), LEAF) == REVOKED
    assert refusal(read(tmp_path, ROOT.revoke(LEAF)), GOOD) == ""


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ([MIDDLE.revoke(DEEP)], REVOKED),
        ([ROOT.revoke(MIDDLE)], REVOKED),
        ([ROOT.revoke(), MIDDLE.revoke(DEEP)], REVOKED),
        ([ROOT.revoke(MIDDLE), MIDDLE.revoke()], REVOKED),
        ([ROOT.revoke(LEAF), MIDDLE.revoke(LEAF)], ""),
        ([ROOT.revoke(DEEP)], ""),
        ([], ""),
    ],
)
def test_every_certificate_of_the_chain_is_looked_up_with_its_own_authority(
    tmp_path: Path, lists: list[x509.CertificateRevocationList], said: str
) -> None:
    revocations = read(tmp_path, *lists)
    assert refusal(revocations, DEEP, MIDDLE, ROOT) == said
    # The same where the intermediate authority is trusted itself, and the chain ends there.
    assert refusal(revocations, DEEP, MIDDLE) == said


def test_the_newest_list_of_an_authority_counts_whatever_the_order(tmp_path: Path) -> None:
    old, new = ROOT.revoke(GOOD, start=-3 * DAY), ROOT.revoke(LEAF, start=-2 * DAY)
    for lists in ([old, new], [new, old]):
        revocations = read(tmp_path, *lists)
        assert refusal(revocations, LEAF, ROOT) == REVOKED
        assert refusal(revocations, GOOD, ROOT) == ""


def test_an_expired_list_beside_a_newer_one_refuses_nobody(tmp_path: Path) -> None:
    revocations = read(tmp_path, ROOT.revoke(start=-3 * DAY, end=-2 * DAY), ROOT.revoke(LEAF))
    assert refusal(revocations, GOOD, ROOT) == ""
    assert revocations.warnings(NOW) == []


@pytest.mark.parametrize("newer", [True, False])
def test_two_authorities_of_one_name_each_have_a_list_that_counts(tmp_path: Path, newer: bool) -> None:
    begun = NOW if newer else NOW - DAY
    revocations = read(tmp_path, ROOT.revoke(LEAF, start=-2 * HOUR), ROOT_2.revoke(LEAF_2, begun=begun))
    assert refusal(revocations, LEAF, ROOT) == REVOKED
    assert refusal(revocations, LEAF_2, ROOT_2) == REVOKED
    assert refusal(revocations, GOOD, ROOT) == ""
    assert refusal(revocations, LEAF) == REVOKED
    assert refusal(revocations, LEAF_2) == REVOKED


def test_a_list_by_one_key_of_an_authority_counts_for_what_its_other_key_signed(tmp_path: Path) -> None:
    revocations = read(tmp_path, ROOT_2.revoke(LEAF))
    assert refusal(revocations, LEAF, ROOT) == REVOKED


def test_a_certificate_in_its_authoritys_own_name_can_be_revoked(tmp_path: Path) -> None:
    alike = ROOT.issue(ROOT.certificate.subject)
    assert refusal(read(tmp_path, ROOT.revoke(alike)), alike, ROOT) == REVOKED
    assert refusal(read(tmp_path, ROOT.revoke(LEAF)), alike, ROOT) == ""


def test_an_authoritys_name_in_another_string_type_is_the_same_name(tmp_path: Path) -> None:
    oid = x509.oid.NameOID.COMMON_NAME
    kind = x509.name._ASN1Type.PrintableString
    printable = x509.Name([x509.NameAttribute(oid, "root", _type=kind)])
    alike = Holder(pki.authority(printable, ROOT.key).certificate, ROOT.key)
    leaf = alike.issue("leaf")
    assert leaf.certificate.issuer.public_bytes() != ROOT.certificate.subject.public_bytes()
    assert refusal(read(tmp_path, ROOT.revoke(leaf)), leaf, ROOT) == REVOKED


# --- until when


@pytest.mark.parametrize(
    ("left", "accepted", "warning"),
    [
        (8 * DAY, True, ""),
        (7 * DAY + HOUR, True, ""),
        (7 * DAY - HOUR, True, "the revocation list {} expires on {}: then all of its authority are refused"),
        (timedelta(seconds=2), True, "the revocation list {} expires on {}: then all of its authority are refused"),
        (
            -timedelta(seconds=2),
            False,
            "the revocation list {} HAS EXPIRED: every certificate of its authority is refused",
        ),
        (-400 * DAY, False, "the revocation list {} HAS EXPIRED: every certificate of its authority is refused"),
    ],
)
def test_a_list_warns_seven_days_before_and_refuses_everybody_once_it_expired(
    tmp_path: Path, left: timedelta, accepted: bool, warning: str
) -> None:
    # Lists have whole seconds.
    until = NOW.replace(microsecond=0) + DAY
    revocations = read(tmp_path, ROOT.revoke(LEAF, begun=until, start=-2 * DAY, end=timedelta()))
    now = until - left
    file = tmp_path / "0.crl"
    expected = "" if accepted else EXPIRED.format(file.name)
    assert refusal(revocations, GOOD, ROOT, now=now) == expected
    assert refusal(revocations, LEAF, ROOT, now=now) == (expected or REVOKED)
    said = [warning.format(file, until.strftime("%Y-%m-%dT%H:%M:%SZ"))] if warning else []
    assert revocations.warnings(now) == said


def test_an_expired_list_refuses_only_its_own_authoritys_certificates(tmp_path: Path) -> None:
    revocations = read(tmp_path, ROOT.revoke(start=-2 * DAY, end=-DAY), OTHER.revoke())
    assert refusal(revocations, GOOD, ROOT) == EXPIRED.format("0.crl")
    assert refusal(revocations, MIDDLE.issue("x"), MIDDLE, ROOT) == EXPIRED.format("0.crl")
    assert refusal(revocations, OTHER.issue("x"), OTHER) == ""
    assert refusal(revocations, pki.make("self-signed")) == ""


# --- which lists cannot be used

UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
PART = x509.IssuingDistributionPoint(None, None, True, False, None, False, False)


@pytest.mark.parametrize("authority", [pki.authority("stranger"), pki.authority("root")], ids=["name", "key"])
def test_a_list_that_no_trusted_authority_signed_cannot_be_used(tmp_path: Path, authority: Holder) -> None:
    said = "no authority in gate.trust signed this revocation list"
    assert refused(tmp_path, ROOT.revoke(), authority.revoke()) == said


def test_a_list_in_the_name_of_another_authority_cannot_be_used(tmp_path: Path) -> None:
    said = "no authority in gate.trust signed this revocation list"
    assert refused(tmp_path, OTHER.revoke(name=ROOT.certificate.subject)) == said


@pytest.mark.parametrize(
    "extension",
    [
        (x509.DeltaCRLIndicator(1), True),
        (x509.DeltaCRLIndicator(1), False),
        (PART, True),
        (PART, False),
        (UNKNOWN, True),
    ],
    ids=["delta", "delta, not critical", "part", "part, not critical", "unknown"],
)
def test_a_delta_a_part_and_what_is_not_understood_cannot_be_used(
    tmp_path: Path, extension: tuple[x509.ExtensionType, bool]
) -> None:
    said = "a delta or partial revocation list cannot be used: install the complete one"
    assert refused(tmp_path, ROOT.revoke(extensions=[extension])) == said


def test_what_narrows_no_list_may_be_in_it(tmp_path: Path) -> None:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ROOT.key.public_key())
    extensions = [(x509.CRLNumber(7), False), (identifier, True), (UNKNOWN, False)]
    assert refusal(read(tmp_path, ROOT.revoke(LEAF, extensions=extensions)), LEAF, ROOT) == REVOKED


def test_a_file_with_several_lists_cannot_be_used_and_none_is_left_unread(tmp_path: Path) -> None:
    both = pki.pem(ROOT.revoke()) + pki.pem(OTHER.revoke())
    assert refused(tmp_path, both) == "this holds 2 revocation lists: put each into a file of its own"


def test_text_before_a_list_in_pem_does_no_harm(tmp_path: Path) -> None:
    assert refusal(read(tmp_path, b"Certificate Revocation List\n" + pki.pem(ROOT.revoke(LEAF))), LEAF) == REVOKED


def test_a_file_that_is_not_there_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CrlError, match=r"0\.crl: the revocation list cannot be read: No such file or directory"):
        crl.read([tmp_path / "0.crl"], AUTHORITIES)


def damaged(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


NUMBERED = pki.der(ROOT.revoke(extensions=[(x509.CRLNumber(7), False), (UNKNOWN, False)]))
# The last byte of the extension's type: with it the same as the other's, there are two of one type.
TWICE = damaged(
    pki.der(
        ROOT.revoke(
            extensions=[
                (UNKNOWN, False),
                (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.2"), b"\x05\x00"), False),
            ]
        )
    ),
    bytes.fromhex("2b06010401868d1f02"),
    bytes.fromhex("2b06010401868d1f01"),
)
# Version 2 as the first field, which is written as 1.
VERSION = damaged(NUMBERED, b"\x02\x01\x01\x30", b"\x02\x01\x09\x30")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"-----BEGIN X509 CRL-----\n", ROOT.pem.encode(), NUMBERED[:-1], VERSION, TWICE],
    ids=["empty", "zero", "no end", "a certificate", "cut", "version", "an extension twice"],
)
def test_a_file_that_holds_no_list_cannot_be_used(tmp_path: Path, content: bytes) -> None:
    assert refused(tmp_path, content) == "this is no certificate revocation list"


@QUICK
@given(st.integers(0, len(NUMBERED) - 1), st.binary(max_size=3))
@example(0, b"")
def test_whatever_a_file_holds_it_is_used_or_refused_with_its_name(tmp_path: Path, at: int, instead: bytes) -> None:
    try:
        read(tmp_path, NUMBERED[:at] + instead + NUMBERED[at + len(instead) :])
    except CrlError as error:
        assert str(error).startswith(f"{tmp_path / '0.crl'}: ")
