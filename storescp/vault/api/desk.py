"""What the vault answers the desk, on a socket of its own: queries, and instances for a peer. Nothing else."""

from __future__ import annotations

import grp
import itertools
import logging
import pwd
import time

import msgspec

from storage.sqlite import DatabaseError
from storescp.config import Config
from storescp.control import Request, Response, json_response, lines_response
from storescp.errors import StrongroomError
from storescp.log import escape
from storescp.vault.api.requests import Routes
from storescp.vault.commitments import Commitments
from storescp.vault.grants import FindRequest, Grants, RetrieveRequest
from storescp.vault.state import Vault

# How often it is looked what can be decided: all that is still open is listed for it.
_LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


class DeskAccess:
    """The requests of the desk that a vault answers."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self.grants = Grants(vault)
        self.commitments = Commitments(vault)
        self._next = 0.0
        self._routes: Routes = {
            ("GET", "/v1/locked"): self._locked,
            ("POST", "/v1/find"): self._find,
            ("POST", "/v1/retrieve"): self._retrieve,
            ("GET", "/v1/commitments"): self._due,
            ("POST", "/v1/commitments/told"): self._told,
        }

    def handle(self, request: Request) -> Response:
        """Answer a request of the desk.

        Raises:
            StrongroomError: It cannot be done.
        """
        route = self._routes.get((request.method, request.path))
        if route is None:
            raise StrongroomError(f"the desk may not ask for {request.method} {request.path}")
        return route(request)

    def turn(self) -> None:
        """Decide requests of commitment, if it is time; what fails is tried again at the next turn."""
        begun = time.monotonic()
        if begun < self._next:
            return
        try:
            self.commitments.turn()
        except (StrongroomError, DatabaseError, OSError) as error:
            log.error("storage commitment waits: %s", error)
        # Many that wait for long take a twentieth of the vault's time at most.
        self._next = time.monotonic() + max(_LOOK_SECONDS, 20 * (time.monotonic() - begun))

    def _locked(self, _request: Request) -> Response:
        return json_response({"locked": self._vault.opened is None})

    def _find(self, request: Request) -> Response:
        rows = self.grants.find(request.uid, request.json(FindRequest))
        # The first row is fetched before the answer begins: a bad key is an error and no broken answer.
        first = next(rows, None)
        return lines_response(itertools.chain([] if first is None else [first], rows))

    def _due(self, _request: Request) -> Response:
        return lines_response(self.commitments.due())

    def _told(self, request: Request) -> Response:
        asked: ToldRequest = request.json(ToldRequest)
        why = escape(asked.why)[:200]
        self.commitments.told(request.uid, asked.id, asked.decided, delivered=asked.delivered, why=why)
        return json_response({})

    def _retrieve(self, request: Request) -> Response:
        return Response(self.grants.retrieve(request.uid, request.json(RetrieveRequest)), raw=True)


class ToldRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Whether a report of storage commitment was delivered, and if not, why."""

    id: str
    decided: float
    delivered: bool
    why: str = ""


def group_of(config: Config) -> str:
    """Return the group that may use the desk's socket: of the desk's user; empty where that is the vault's.

    Raises:
        StrongroomError: There is no such user.
    """
    name = config.settings.desk.user
    if not name:
        return ""
    try:
        return grp.getgrgid(pwd.getpwnam(name).pw_gid).gr_name
    except KeyError as error:
        raise StrongroomError(f"desk.user: there is no user {name} on this machine, or it has no group") from error
