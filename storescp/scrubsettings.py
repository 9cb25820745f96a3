"""``[scrub]`` of ``strongroom.toml``."""

from __future__ import annotations

import msgspec


class ScrubSettings(msgspec.Struct, kw_only=True):
    """``[scrub]``."""

    days: int = 30
    rate: int = 50


EXPLAINED = {
    "scrub": "Reading all packs again, to find damage while there is a backup. The schedule begins it.",
    "scrub.days": "All packs are read within so many days, a part of them at each run.",
    "scrub.rate": "Read at most so many megabytes a second, so that receiving does not wait; 0: as fast as it goes.",
}


def errors(settings: ScrubSettings) -> list[str]:
    """Return all that is wrong with settings."""
    found = [] if 1 <= settings.days <= 3650 else ["scrub.days: must be from 1 to 3650"]
    return found + ([] if 0 <= settings.rate <= 100_000 else ["scrub.rate: must be from 0 to 100000"])
