"""The review of a week of the audit chain."""

from __future__ import annotations

from datetime import date

import msgspec

from storescp.control import Request, Response, json_response
from storescp.vault.api.requests import Routes
from storescp.vault.reviews import Reviews
from storescp.vault.state import Vault


class ReviewRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A day of the week to review; None for the last week that is over."""

    week: date | None = None


class ReviewRequests:
    """Requests for a review."""

    def __init__(self, vault: Vault) -> None:
        self._reviews = Reviews(vault)

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {("POST", "/v1/audit/review"): self._review}

    def _review(self, request: Request) -> Response:
        asked: ReviewRequest = request.json(ReviewRequest)
        return json_response(self._reviews.of(asked.week, request.uid))
