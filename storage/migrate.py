"""Bringing a store of an older format to this release's, step by step; each step can be repeated.

The format number stands in the keyring's clear header and is written last, so that an upgrade that was interrupted
begins again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from keys.keyring import FORMAT, Keyring


def _to_1(store: Path) -> str:
    # Format 0 admitted in place only; format 1 copies what another user deposited.
    (store / "admitting").mkdir(mode=0o700, exist_ok=True)
    (store / "quarantine").mkdir(mode=0o700, exist_ok=True)
    return "made the folders that admission by copy needs"


_STEPS: dict[int, Callable[[Path], str]] = {0: _to_1}


def upgrade(ring: Keyring, store: Path) -> list[str]:
    """Bring a store to this release's format; return what was done, nothing where it has it already."""
    done = []
    while ring.header.format < FORMAT:
        done.append(_STEPS[ring.header.format](store))
        ring.header.format += 1
    if done:
        ring.write(store / "keyring")
    return done
