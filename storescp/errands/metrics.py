"""Serving numbers to Prometheus: a process that reads two small files, and holds neither keys nor a way to the vault.

HTTP/1.1 by h11, ``GET /metrics`` and nothing else, one request a connection, bounded in size, time and number.
Why no client library of Prometheus's: the numbers are other processes', and its text format is a page of code.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
import threading
import time

import h11

from storescp import notify, snapshot
from storescp.config import Config, parse_address
from storescp.errands import exposition
from storescp.errors import USAGE, StrongroomError
from storescp.snapshot import GateNumbers, VaultNumbers
from storescp.stopping import Stop

_CONNECTIONS = 8
_BACKLOG = 16
# For a request, and again for its response.
_SECONDS = 5.0
_REQUEST_BYTES = 8192
_POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


def collected(config: Config) -> str:
    """Return the exposition of what gate and vault wrote last."""
    return exposition.text(
        snapshot.read(config, "gate", GateNumbers),
        snapshot.read(config, "vault", VaultNumbers),
        config.settings.store.reserve_bytes,
        time.time(),
    )


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        StrongroomError: No address is configured, or it cannot be listened on.
    """
    address = config.settings.metrics.listen
    if not address:
        raise StrongroomError("no metrics are configured", hint="set metrics.listen", status=USAGE)
    stop = Stop()
    stop.on(signal.SIGTERM, signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Listener(config) as listener:
        log.info("metrics on http://%s/metrics", listener.address)
        if not ipaddress.ip_address(parse_address(address)[0]).is_loopback:
            log.warning("whoever reaches %s may read the metrics, without TLS", listener.address)
        notify.ready()
        while not stop.is_set():
            listener.serve(_POLL_SECONDS)
        notify.stopping()


class Listener:
    """Answers scrapes, a few at a time; who comes while all places are taken is closed."""

    def __init__(self, config: Config) -> None:
        """Listen.

        Raises:
            StrongroomError: It is not possible.
        """
        self._config = config
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        host, port = parse_address(config.settings.metrics.listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            listen = config.settings.metrics.listen
            raise StrongroomError(f"metrics.listen: {listen} cannot be listened on: {error.strerror}") from error
        bound = self._socket.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def serve(self, seconds: float) -> None:
        """Take a connection, if one comes in so many seconds, and answer it in a thread of its own."""
        self._socket.settimeout(seconds)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return
        except OSError as error:
            log.error("a connection cannot be accepted: %s", error.strerror)
            time.sleep(0.1)
            return
        if not self._places.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                _converse(connection, self._config)
        except (OSError, h11.ProtocolError) as error:
            log.debug("a scrape broke off: %s", type(error).__name__)
        except Exception:
            log.exception("a scrape ended by an error of ours")
        finally:
            self._places.release()


def _converse(connection: socket.socket, config: Config) -> None:
    state = h11.Connection(h11.SERVER, max_incomplete_event_size=_REQUEST_BYTES)
    try:
        request = _request(connection, state)
        status, body = _decide(request, config)
    except h11.RemoteProtocolError as error:
        # A head that is too long has its own status.
        status, body = error.error_status_hint, b"malformed request\n"
        request = None
    connection.settimeout(_SECONDS)
    headers = [
        ("content-type", exposition.CONTENT_TYPE if status == 200 else "text/plain; charset=utf-8"),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
        ("connection", "close"),
    ]
    if status == 405:
        headers.append(("allow", "GET, HEAD"))
    parts = [state.send(h11.Response(status_code=status, headers=headers))]
    if request is None or request.method != b"HEAD":
        parts.append(state.send(h11.Data(data=body)))
    parts.append(state.send(h11.EndOfMessage()))
    connection.sendall(b"".join(part for part in parts if part))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def _request(connection: socket.socket, state: h11.Connection) -> h11.Request:
    """Return a request's head; what follows it is not read.

    Raises:
        OSError: It did not come in time.
        RemoteProtocolError: It is none.
    """
    deadline = time.monotonic() + _SECONDS
    while True:
        event = state.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            raise ConnectionAbortedError
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        state.receive_data(connection.recv(_REQUEST_BYTES))


def _decide(request: h11.Request, config: Config) -> tuple[int, bytes]:
    if request.target.partition(b"?")[0] != b"/metrics":
        return 404, b"there is /metrics\n"
    if request.method not in {b"GET", b"HEAD"}:
        return 405, b"GET alone\n"
    return 200, collected(config).encode()
