"""Errors that end a command: what happened, to which object, and what to do now."""

from __future__ import annotations

FAILED = 1
USAGE = 2
PARTLY = 3
LOCKED = 4
NOTHING = 5
FINDINGS = 6
# Between vault and desk alone; no command ends with these.
MAY_NOT = 7
LIMITED = 8


class StrongroomError(Exception):
    """An error with a message for a person, a hint of what to do, and an exit status.

    Messages are lower case, without a full stop, and name the object.
    """

    def __init__(self, message: str, *, hint: str = "", status: int = FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


def plural(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"
