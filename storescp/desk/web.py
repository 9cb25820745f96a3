"""DICOMweb over HTTPS with client certificates: QIDO-RS and WADO-RS, each request decided by the vault; STOW-RS.

A server of its own loop in a thread of the desk's process. Source: PS3.18.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from storescp.config import Config, parse_address
from storescp.desk.asking import Asking
from storescp.desk.storing import Storing
from storescp.desk.web_app import application
from storescp.desk.web_search import PREFIX
from storescp.desk.web_server import Server, run
from storescp.errors import StrongroomError
from storescp.gate import listeners
from storescp.gate.connection import Policy

_START_SECONDS = 30.0

log = logging.getLogger(__name__)


class Web:
    """The desk's web server."""

    def __init__(self, config: Config, policy: Callable[[], Policy], asking: Asking, storing: Storing | None) -> None:
        """Prepare.

        Args:
            config: The configuration; ``desk.web`` says where to listen.
            policy: Returns what connections and requests are judged by at this moment.
            asking: The way to the vault.
            storing: Where what is stored goes; None where nothing can be.
        """
        self._settings = config.settings.desk
        self._policy = policy
        self._app = application(config, policy, asking, storing)
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self.addresses: list[str] = []

    def start(self) -> None:
        """Begin to serve.

        Raises:
            StrongroomError: An address cannot be had.
        """
        listening = list[socket.socket]()
        try:
            for text in self._settings.web:
                listening.append(listeners.bind(*parse_address(text)))
        except OSError as error:
            for sock in listening:
                sock.close()
            raise StrongroomError(f"the desk cannot listen on {text}: {error.strerror}") from error
        # A port that the system chose is known only now.
        self.addresses = [listeners.text(sock.getsockname()) for sock in listening]
        self._server = Server(
            self._app,
            self._policy,
            listening,
            most=self._settings.maximum_associations,
            idle_seconds=float(self._settings.idle_seconds),
        )
        self._thread = threading.Thread(target=run, args=(self._server,), daemon=True, name="web")
        self._thread.start()
        if not self._server.ready.wait(_START_SECONDS):
            raise StrongroomError("the desk's web server does not start", hint="its log says more")
        for text in self.addresses:
            log.info("DICOMweb at https://%s%s", text, PREFIX)

    def stop(self, seconds: float) -> None:
        """Accept no more; let requests that are under way end, within a time."""
        if self._server is None or self._thread is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, int(seconds))
        self._server.should_exit = True
        self._thread.join(seconds + 5)
