"""What the control API answers: who asks is checked by the server, what is possible by the vault's state."""

from __future__ import annotations

from storescp.control import Request, Response
from storescp.errors import StrongroomError
from storescp.vault.api.audit import Audit
from storescp.vault.api.erase import Erasures
from storescp.vault.api.jobs import Jobs
from storescp.vault.api.keys import Keys
from storescp.vault.api.quarantine import Quarantine
from storescp.vault.api.recovery import RecoveryRequests
from storescp.vault.api.requests import Routes
from storescp.vault.api.review import ReviewRequests
from storescp.vault.api.status import Status
from storescp.vault.api.store import Store
from storescp.vault.schedule import Schedule
from storescp.vault.state import Vault

_INSTANCES = "/v1/instances/"


class Access:
    """The requests that a vault answers."""

    def __init__(self, vault: Vault, schedule: Schedule) -> None:
        self._store = Store(vault)
        self._routes: Routes = self._store.routes()
        for kind in (Status, Quarantine, Keys, RecoveryRequests, Erasures, Audit, ReviewRequests):
            self._routes |= kind(vault).routes()
        self._routes |= Jobs(schedule).routes()

    def handle(self, request: Request) -> Response:
        """Answer a control request.

        Raises:
            StrongroomError: It cannot be done.
        """
        if request.method == "GET" and request.path.startswith(_INSTANCES):
            return self._store.instance(request, request.path.removeprefix(_INSTANCES))
        route = self._routes.get((request.method, request.path))
        if route is None:
            raise StrongroomError(f"this vault does not know {request.method} {request.path}")
        return route(request)
