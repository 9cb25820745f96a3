"""``[review]`` of ``strongroom.toml``."""

from __future__ import annotations

import msgspec

from storescp.cron import CronError, window_of


class ReviewSettings(msgspec.Struct, kw_only=True):
    """``[review]``."""

    hours: str = "mon-fri 07:00-19:00"


EXPLAINED = {
    "review": "The weekly review of the audit chain (docs/review.md); schedule.review says when it is made.",
    "review.hours": "When admins work, in schedule.timezone: acts at other times stand out.\n"
    '"daily 00:00-24:00" for at any time.',
}


def check(settings: ReviewSettings) -> list[str]:
    """Return what is wrong with the settings, each with its key."""
    try:
        window_of(settings.hours)
    except CronError as error:
        return [f"review.hours: {error}"]
    return []
