"""``[audit]``: where audit messages are sent, so that what the audit chain says is also kept elsewhere."""

from __future__ import annotations

import re
from datetime import timedelta

import msgspec

from storescp.patch.settings import duration

_HOST = re.compile(
    r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([1-9][0-9]{0,4})", re.ASCII
)
_FACILITIES = 24


class AuditSettings(msgspec.Struct, kw_only=True):
    """A syslog server, how it is known, and how often the chain's head goes there."""

    forward: str = ""
    trust: str = ""
    certificate: str = ""
    private_key: str = ""
    facility: int = 10
    enterprise: int = 32473
    head: str = "PT15M"
    waiting_bytes: int = 64 << 20

    def server(self) -> tuple[str, int]:
        """Return the name and port of the server."""
        host, _, port = self.forward.rpartition(":")
        return host.strip("[]"), int(port)

    def head_after(self) -> timedelta:
        """Return after what time a new head is sent."""
        return duration(self.head)


EXPLAINED = {
    "audit": "Where records of the audit chain go as DICOM audit messages (PS3.15 A.5): to a syslog server, over TLS\n"
    "(RFC 5424, 5425), by a process of its own. docs/audit-forwarding.md says what arrives and what it promises.",
    "audit.forward": 'The server, "host:6514", "[::1]:6514". Empty: nothing is forwarded.',
    "audit.trust": "Certificates of the authorities that its certificate may come from, PEM; no others are trusted.",
    "audit.certificate": "The certificate that is shown to it, PEM with its chain; empty where it asks for none.",
    "audit.private_key": "Its private key, PEM, which the forwarder's user alone reads.",
    "audit.facility": "The syslog facility, 0 to 23: 10 is security, 13 log audit.",
    "audit.enterprise": "The Private Enterprise Number (IANA) in the structured data's name, strongroom@NUMBER.\n"
    "Yours, if you have one; this one is IANA's for examples.",
    "audit.head": "After what time a signed head of the chain is sent, if anything was recorded: PT1M to P1D.",
    "audit.waiting_bytes": "How much may lie in the spool; more waits in the chain itself, so that nothing is lost.",
}


def check(settings: AuditSettings) -> list[str]:
    """Return what is wrong with the settings, each error with its key."""
    errors = []
    if settings.forward:
        found = _HOST.fullmatch(settings.forward)
        if found is None or int(found[3]) > 65_535:
            errors.append(f"audit.forward: '{settings.forward}' is no server with a port, as in syslog.example:6514")
        if not settings.trust:
            errors.append("audit.trust: missing: name the authorities of the syslog server's certificate")
    if bool(settings.certificate) != bool(settings.private_key):
        errors.append("audit.private_key: certificate and private_key go together")
    if not 0 <= settings.facility < _FACILITIES:
        errors.append(f"audit.facility: must be from 0 to {_FACILITIES - 1}")
    if not 1 <= settings.enterprise < 1 << 32:
        errors.append("audit.enterprise: must be a Private Enterprise Number")
    if not 1 << 20 <= settings.waiting_bytes <= 1 << 34:
        errors.append(f"audit.waiting_bytes: must be from {1 << 20} to {1 << 34}")
    try:
        good = timedelta(minutes=1) <= duration(settings.head) <= timedelta(days=1)
    except ValueError:
        return [*errors, f"audit.head: '{settings.head}' is no duration, as in PT15M"]
    return errors if good else [*errors, "audit.head: must be from PT1M to P1D"]
