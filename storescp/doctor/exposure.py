"""What was seen of a server from outside, judged. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import rsa

from storescp.doctor import probe
from storescp.doctor.facts import Unseen
from storescp.doctor.findings import CRITICAL, OK, UNKNOWN, WARNING, Finding, ordered
from storescp.doctor.practice import days, some
from storescp.doctor.probe import Reply, Seen

_SOON = timedelta(days=30)
_TLS = "PS3.15 B.12; RFC 9325; RFC 8996"


def judge(seen: Seen, now: datetime) -> list[Finding]:
    """Return one finding for each thing that was tried, the worst first."""
    return ordered([_plain(seen.plain), _bare(seen.bare), _old(seen), _certificate(seen, now)])


def _plain(reply: Reply) -> Finding:
    grade, found = _met(reply, "without TLS")
    return Finding(
        practice="no-tls",
        grade=grade,
        found=found,
        why="without TLS whoever reads the network reads patients, and an AE title is no secret",
        mend="" if grade == OK else "take the listener out of gate.plaintext; on another server, switch TLS on",
        source="PS3.15 Annex B",
    )


def _bare(reply: Reply) -> Finding:
    grade, found = _met(reply, "over TLS without a client certificate")
    return Finding(
        practice="no-certificate",
        grade=grade,
        found=found,
        why="TLS hides what is sent, but only a certificate tells who sends it",
        mend="" if grade == OK else "require client certificates, and bind each to its AE title",
        source="PS3.15 Annex B",
    )


def _met(reply: Reply, how: str) -> tuple[str, str]:
    detail = f" ({reply.detail})" if reply.detail else ""
    if reply.kind == probe.ACCEPTED:
        titles = f"calling {probe.CALLING}, called {probe.CALLED}"
        return CRITICAL, f"an association was granted {how}, with AE titles that nobody knows: {titles}"
    if reply.kind == probe.REJECTED:
        return WARNING, f"DICOM is answered {how}, and only the request was refused{detail}: AE titles can be tried"
    if reply.kind == probe.ABORTED:
        return WARNING, f"DICOM is answered {how}, with an abort"
    if reply.kind == probe.SILENT:
        return UNKNOWN, f"nothing was answered {how}, and the connection stayed open"
    if reply.kind == probe.OTHER:
        return UNKNOWN, f"something else than DICOM answers {how}{detail}"
    return OK, f"no association {how}{detail}"


def _old(seen: Seen) -> Finding:
    taken = [name for name, takes in seen.old.items() if takes is True]
    dark = [f"{name}: {takes.reason}" for name, takes in seen.old.items() if isinstance(takes, Unseen)]
    if taken:
        grade, found = WARNING if taken == [probe.OLD_SUITES] else CRITICAL, f"it takes {some(taken)}"
    elif dark:
        grade, found = UNKNOWN, some(dark)
    else:
        grade, found = OK, f"it takes none of {some(list(seen.old))}"
    return Finding(
        practice="old-tls",
        grade=grade,
        found=found,
        why="old versions and suites are broken, or give up what was recorded once the key leaks",
        mend="TLS 1.2 and 1.3 only, ECDHE with AES-GCM" if taken else "",
        source=_TLS,
    )


def _certificate(seen: Seen, now: datetime) -> Finding:
    grade, found = _shown(seen, now)
    return Finding(
        practice="certificate",
        grade=grade,
        found=found,
        why="on the day that it ends, modalities stop sending; a weak one lets others pretend to be the server",
        mend="" if grade in {OK, UNKNOWN} else "issue a certificate with an EC P-256 or RSA 3072 key and SHA-256",
        source=_TLS,
    )


def _shown(seen: Seen, now: datetime) -> tuple[str, str]:
    if isinstance(seen.shown, Unseen):
        return UNKNOWN, seen.shown.reason
    certificate = seen.shown.certificate
    left = certificate.not_valid_after_utc - now
    told = f"{certificate.subject.rfc4514_string()}, {seen.shown.version} with {seen.shown.suite}"
    if left < timedelta(0):
        return CRITICAL, f"it HAS EXPIRED {days(-left)} ago: {told}"
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < 2048:
        return CRITICAL, f"its key is RSA of {key.key_size} bits: {told}"
    used = certificate.signature_hash_algorithm
    if used is not None and used.name in {"md5", "sha1"}:
        return WARNING, f"it is signed with {used.name.upper()}: {told}"
    return (WARNING if left < _SOON else OK), f"it ends in {days(left)}: {told}"
