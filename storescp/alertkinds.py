"""What alerts there are, and all that they can say: one table, and the forms of the names in it.

A text has counts, and at most one name of a form that is fixed: there is no way to put a patient or a UID into it.
"""

from __future__ import annotations

import re
import string
from typing import NamedTuple

TOO_MANY = "too-many-alerts"
SEVERITIES = ("critical", "warning")

# What a name in an alert may be. Long numbers, and many with dots between them, are UIDs or a patient's.
NO_NAME = re.compile(r"")
WORD = re.compile(r"[a-z][a-z0-9_-]{0,39}", re.ASCII)
PEER = re.compile(r"[ -\[\]-~]{1,16}", re.ASCII)
UID = re.compile(r"\d+(\.\d+){4,}|\d{12,}", re.ASCII)


class Kind(NamedTuple):
    """What alerts of a kind say. ``{what}`` may stand in text and command, counts in the text; ``name`` is its form."""

    severity: str
    text: str
    command: str
    name: re.Pattern[str] = NO_NAME

    def counts(self) -> frozenset[str]:
        """Return the names of the counts in the text."""
        return frozenset(name for _, name, _, _ in string.Formatter().parse(self.text) if name) - {"what"}


KINDS = {
    "locked": Kind(
        "critical", "the vault is locked: what arrives is kept, nothing is admitted, erased or checked", "unlock"
    ),
    "space-short": Kind(
        "critical",
        "nothing more is received: a disk has less free space than store.reserve_bytes. Free space or add a disk; "
        "the status says which",
        "status",
    ),
    "total-loss": Kind(
        "critical",
        "ONE FAILURE FROM TOTAL LOSS: if keyring or anchors are lost, every study is lost, backups included. "
        "The status says what is missing",
        "status",
    ),
    "audit-fault": Kind("critical", "the audit chain takes no records, so that no admin's act is done", "audit verify"),
    "audit-unsent": Kind(
        "warning",
        "audit messages are not delivered and wait: {count}. The log of the audit forwarder says why",
        "audit verify",
    ),
    "unreadable": Kind(
        "critical",
        "places in deposits that did not open: {count}. Have what was sent then sent again; "
        "the vault's log names the packs",
        "status",
    ),
    "quarantine": Kind("warning", "in quarantine, not admitted until somebody decides: {count}", "quarantine list"),
    "scrub-damage": Kind("critical", "the scrub found packs that are damaged or missing: {count}", "verify"),
    "job-failed": Kind("warning", "the scheduled job {what} failed", "jobs list", WORD),
    "job-findings": Kind("warning", "the scheduled job {what} found what somebody must look at", "jobs list", WORD),
    "job-overdue": Kind("warning", "the scheduled job {what} is overdue", "jobs list", WORD),
    "backup-old": Kind("warning", "the newest confirmed backup is {days} days old", "backup list"),
    "patch-breach": Kind("warning", "fixes that are not applied in time: {count}", "patch report"),
    "patch-unknown": Kind("warning", "what nobody can tell to be patched or not: {count}", "patch report"),
    "retention-brake": Kind("critical", "retention erases nothing: one of its brakes is on", "retention plan"),
    "certificate-server": Kind("critical", "the server's certificate expires in {days} days", "status"),
    "certificate-peer": Kind("warning", "the certificate of {what} expires in {days} days", "peer renew {what}", PEER),
    "crl-old": Kind("critical", "revocation lists that expire soon or have expired: {count}", "status"),
    "desk-volume": Kind(
        "warning",
        "{what} asked for more than desk.queries_per_minute or desk.instances_per_hour allow, and was refused",
        "audit review",
        PEER,
    ),
    "test": Kind("warning", "this is a test: nothing is wrong", "alerts list"),
    TOO_MANY: Kind("critical", "more alerts stand than are told apart; the rest is in the log only", "alerts list"),
}
