"""What the ledger keeps of forwarding: how far it came, which files are not delivered, whose study is being erased."""

from __future__ import annotations

from typing import Any

import msgspec

from storage.records import Records
from storescp.vault.opened import Open
from storescp.vault.state import Vault

STATE = "state"


class State(msgspec.Struct):
    """How far it came: the last record, the last message, the last head; and what later records refer to.

    ``erasures``: study, patient and issuer of those that go on. ``gone``: records whose transcript is to come.
    """

    number: int = 0
    hash: str = ""
    seq: int = 0
    head: int = 0
    head_time: float = 0.0
    configuration: str = ""
    recipient: str = ""
    erasures: dict[str, list[str]] = msgspec.field(default_factory=dict)
    gone: list[int] = msgspec.field(default_factory=list)
    alerts: dict[str, list[str]] = msgspec.field(default_factory=dict)


class Batch(msgspec.Struct):
    """A file of messages that is not delivered yet, and what was known before and after it was made."""

    name: str
    before: State
    after: State


class Whose(msgspec.Struct):
    """Whose study is being erased: the message is made when no index knows that any more."""

    erasure: str
    study: str
    patient: str
    issuer: str


def remember_erasures(vault: Vault) -> None:
    """Keep whose study is erased until the messages about it are made; nothing is kept where none are made."""

    def before(kind: str, fields: dict[str, Any]) -> None:
        opened = vault.opened
        if kind == "erase-begun" and opened is not None:
            study, erasure = str(fields["study"]), str(fields["erasure"])
            # Nobody else uses the ledger: who erases holds the vault's state.
            erasures(opened).put(erasure, Whose(erasure, study, *opened.index.patient_of(study)))

    if vault.config.settings.audit.forward:
        vault.auditor.before = before


def states(opened: Open) -> Records[State]:
    """Return the table of the state; its only id is ``STATE``."""
    return opened.ledger.records("forward", State)


def batches(opened: Open) -> Records[Batch]:
    """Return the table of batches, by their files' names."""
    return opened.ledger.records("forward-batch", Batch)


def erasures(opened: Open) -> Records[Whose]:
    """Return the table of erasures, by their ids."""
    return opened.ledger.records("forward-erasure", Whose)
