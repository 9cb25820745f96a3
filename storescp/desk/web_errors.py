"""What a request is answered with where it cannot be done: a status of HTTP, and a text that tells no value."""

from __future__ import annotations

from storescp.desk.asking import AskingError
from storescp.errors import LIMITED, MAY_NOT

_RETRY_SECONDS = "60"


class Refusal(Exception):  # noqa: N818 (an answer, where the standard has one; not always an error)
    """A request ends with this status."""

    def __init__(self, status: int, text: str = "", **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


def refusal(error: AskingError) -> Refusal:
    """Return what the vault's refusal is in HTTP."""
    if error.locked:
        return Refusal(503, "the vault is locked", retry_after=_RETRY_SECONDS)
    if error.nothing:
        return Refusal(404, "nothing here is known by that name")
    if error.status == LIMITED:
        return Refusal(429, str(error), retry_after=_RETRY_SECONDS)
    if error.status == MAY_NOT:
        return Refusal(403)
    return Refusal(500, "the vault could not answer")
