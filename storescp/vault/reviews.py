"""Reviews of the audit chain: made in the vault, so that no record leaves it, and kept in ``reviews/`` of the store.

What is kept and what is answered names no patient and no study (``storescp/review.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from keys import encoding
from storage.audit import AuditError
from storescp.cron import zone_of
from storescp.errors import StrongroomError, plural
from storescp.review import Review
from storescp.reviewpage import page
from storescp.reviewrules import last_week, review
from storescp.reviewtext import text
from storescp.reviewweeks import weeks_of
from storescp.vault.expiry import ending
from storescp.vault.state import Vault

_KEPT = 60


class Reviews:
    """The reviews of a vault."""

    def __init__(self, vault: Vault, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._vault = vault
        self._clock = clock
        self.folder = vault.config.store_path / "reviews"

    def of(self, day: date | None, uid: int) -> Review:
        """Review the week that a day is in, the last one that is over for None; that it was read is recorded first.

        Raises:
            StrongroomError: The vault is locked, or it cannot be recorded.
        """
        authority = self._vault.unlocked().ring.body.authority
        settings = self._vault.config.settings
        zone, now = zone_of(settings.schedule.timezone), self._clock()
        weeks = weeks_of(day or last_week(now, zone), zone)
        auditor = self._vault.auditor
        auditor.record("audit-read", uid=uid, review=str(weeks.monday))
        said = ending(self._vault.config, authority, now)
        return review(
            auditor.read(0),
            weeks,
            hours=settings.review.hours,
            zone=zone,
            timezone=settings.schedule.timezone,
            now=now,
            vault_uid=os.geteuid(),
            ending=(str(event["text"]) for event in said if event["kind"] == "finding"),
            broken=(AuditError, OSError),
        )

    def run(self, uid: int) -> Iterator[dict[str, Any]]:
        """Keep a review of last week; yield a finding where something in it is flagged.

        Raises:
            StrongroomError: It cannot be made or kept.
        """
        made = self.of(None, uid)
        name = f"review-{made.begins}"
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            encoding.replace(self.folder / f"{name}.txt", text(made).encode())
            encoding.replace(self.folder / f"{name}.html", page(made).encode())
            self._prune()
        except OSError as error:
            raise StrongroomError(f"the review cannot be kept in {self.folder}: {error.strerror}") from error
        if made.flags:
            found = f"{plural(len(made.flags), 'thing')} to look at in reviews/{name}.html"
            yield {"kind": "finding", "text": f"{found}, or 'strongroom audit review'"}
        else:
            yield {"kind": "step", "text": f"nothing unusual in the week from {made.begins}: reviews/{name}.html"}

    def _prune(self) -> None:
        """Keep the newest ones, by their names, as a text and as a page each."""
        for suffix in ("txt", "html"):
            found: list[Path] = sorted(self.folder.glob(f"review-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].{suffix}"))
            for old in found[:-_KEPT]:
                old.unlink(missing_ok=True)
