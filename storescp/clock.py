"""Times as text: UTC, RFC 3339, whole seconds."""

from __future__ import annotations

from datetime import UTC, datetime

_FORM = "%Y-%m-%dT%H:%M:%SZ"


def text(when: datetime) -> str:
    """Return a time with a zone as text."""
    return when.astimezone(UTC).strftime(_FORM)


def text_of(seconds: float) -> str:
    """Return seconds since 1970 as text."""
    return text(datetime.fromtimestamp(seconds, UTC))


def now() -> str:
    """Return the time as text."""
    return text(datetime.now(UTC))


def parse(written: str) -> datetime:
    """Return the time that a text says.

    Raises:
        ValueError: It says none.
    """
    return datetime.strptime(written, _FORM).replace(tzinfo=UTC)
