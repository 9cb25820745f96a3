"""Where an association comes from."""

from __future__ import annotations

import secrets

import msgspec


class Origin(msgspec.Struct, frozen=True):
    """Where an association comes from, as provenance and the log say it."""

    association: str
    calling: str
    called: str
    address: str
    certificate: str


def new_association_id() -> str:
    """Return a random id by which the log and provenance name an association."""
    return secrets.token_hex(8)
