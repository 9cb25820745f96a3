"""What several requests to the vault have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from keys import slots
from storescp.control import Request, Response
from storescp.errors import StrongroomError

# By method and path.
Routes = dict[tuple[str, str], Callable[[Request], Response]]


class Named(msgspec.Struct, forbid_unknown_fields=True):
    """Something by its id."""

    id: str


class SecretRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A secret that opens a slot: a passphrase, the content of a key file, a credential's name, or a token's PIN."""

    passphrase: str | None = None
    key: bytes | None = None
    credential: str | None = None
    pin: str | None = None
    place: slots.TokenPlace | None = None

    def secret(self) -> slots.Secret:
        """Return it as the slots know it."""
        if self.passphrase is not None:
            return slots.Passphrase(self.passphrase)
        if self.credential is not None:
            return slots.Credential(self.credential)
        if self.pin is not None:
            return slots.Token(self.pin, self.place)
        return slots.KeyFile(self.key or b"")


def told(progress: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what an operation does, and the error that ends it: its answer has begun long before."""
    try:
        yield from progress
        yield {"kind": "end"}
    except StrongroomError as error:
        yield {"kind": "error", "message": str(error), "hint": error.hint, "status": error.status}
