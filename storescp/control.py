"""How the command line talks to the vault: HTTP/1.1 (h11) over a Unix socket, identity by the peer's uid.

One small server, one small client, blocking; both also work over a socket pair, for a vault that was started just
for one command.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import logging
import os
import pwd
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import msgspec

from storescp.errors import FAILED, StrongroomError

_SMALL_BYTES = 4096
_READ_BYTES = 1 << 17
_BODY_LIMIT = 1 << 20
_CONNECTION_LIMIT = 64
_SOCKET_PATH_LIMIT = 100
_FAILURE = "x-failure"
_UPGRADE = [("connection", "upgrade"), ("upgrade", "strongroom")]
# A client that takes nothing for so long is gone.
_SEND_SECONDS = 300

log = logging.getLogger(__name__)


class Request(msgspec.Struct, frozen=True):
    """A request to the vault."""

    method: str
    path: str
    body: bytes
    uid: int

    def json(self, kind: type[Any]) -> Any:
        """Return the body as ``kind``.

        Raises:
            StrongroomError: It is of another shape.
        """
        try:
            return msgspec.json.decode(self.body or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StrongroomError(f"the request is malformed: {error}") from error


class Response(msgspec.Struct, frozen=True):
    """A response: its body in parts, with its length if that is known, and headers.

    A ``raw`` one goes on as bytes of its own after 101, and ends with the connection: what is in it says where it is
    whole. For many megabytes, which cost less without the framing of HTTP.
    """

    parts: Iterator[bytes]
    length: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    raw: bool = False


Handler = Callable[[Request], Response]


def json_response(document: Any) -> Response:
    """Return one JSON document."""
    body = msgspec.json.encode(document)
    return Response(iter([body]), len(body))


def lines_response(rows: Iterator[Any], *, at_once: bool = False) -> Response:
    """Return JSON documents, a line each; ``at_once`` sends each as it comes, else many go together."""
    return Response((msgspec.json.encode(row) + b"\n" for row in rows) if at_once else _batched(rows))


def _batched(rows: Iterator[Any]) -> Iterator[bytes]:
    batch: list[bytes] = []
    for row in rows:
        batch.append(msgspec.json.encode(row) + b"\n")
        if len(batch) == 100:
            yield b"".join(batch)
            batch = []
    if batch:
        yield b"".join(batch)


class Server:
    """Serves a handler on a Unix socket to processes of root, of its own user, and of the members of a group."""

    def __init__(self, handler: Handler, group: str = "") -> None:
        """Prepare to serve.

        Args:
            handler: Answers requests.
            group: A group of this system, empty for none.

        Raises:
            StrongroomError: There is no such group.
        """
        self._handler = handler
        self._group = _group(group) if group else None
        self._slots = threading.BoundedSemaphore(_CONNECTION_LIMIT)
        self._listening: socket.socket | None = None

    def listen(self, path: Path) -> None:
        """Begin to serve on a socket file, in threads of its own.

        Raises:
            OSError: The socket cannot be made.
        """
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
            raise OSError(f"the socket path {path} is longer than {_SOCKET_PATH_LIMIT} characters")
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old_mask = os.umask(0o177)
        try:
            self._listening.bind(os.fspath(path))
            if self._group is not None:
                # Whoever may use the socket must come to it.
                for place in (path, path.parent):
                    # A folder with the set-group-ID bit has given both: a unit's process may change no owner.
                    if place.stat().st_gid != self._group.gr_gid:
                        os.chown(place, -1, self._group.gr_gid)
                os.chmod(path, 0o660)
        finally:
            os.umask(old_mask)
        self._listening.listen(_CONNECTION_LIMIT)
        threading.Thread(target=self._accept, daemon=True, name="control").start()

    def close(self) -> None:
        """Accept no more."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()

    def _accept(self) -> None:
        while self._listening is not None:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if self._listening.fileno() < 0 or error.errno in {errno.EINVAL, errno.EBADF}:
                    return
                log.error("a control connection cannot be accepted: %s", error.strerror)
                time.sleep(0.1)
                continue
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            # Who stops reading holds what the operation holds: backups, the schedule, erasures.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
            try:
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()
            except RuntimeError as error:
                log.error("a control connection is refused: %s", error)
                self._slots.release()
                connection.close()

    def _run(self, connection: socket.socket) -> None:
        try:
            self.serve(connection)
        finally:
            self._slots.release()

    def serve(self, connection: socket.socket) -> None:
        """Serve one connection until its other end closes it."""
        with connection:
            uid = _peer_uid(connection)
            if not self._allowed(uid):
                log.warning("control connection of uid %d refused", uid)
                return
            state = h11.Connection(h11.SERVER)
            try:
                while self._serve_one(connection, state, uid):
                    state.start_next_cycle()
            except (OSError, h11.ProtocolError):
                return

    def _allowed(self, uid: int) -> bool:
        if uid in {0, os.geteuid()}:
            return True
        if self._group is None:
            return False
        try:
            user = pwd.getpwuid(uid)
        except KeyError:
            return False
        # As it is now: whoever was taken out of the group is out at once.
        return self._group.gr_gid in os.getgrouplist(user.pw_name, user.pw_gid)

    def _serve_one(self, connection: socket.socket, state: h11.Connection, uid: int) -> bool:
        request = _read_request(connection, state, uid)
        if request is None:
            return False
        if not self._allowed(uid):
            # Taken out of the group since the connection was made.
            log.warning("control request of uid %d refused", uid)
            return False
        try:
            response = self._handler(request)
        except StrongroomError as error:
            response = json_response({"error": {"message": str(error), "hint": error.hint, "status": error.status}})
            self._send(connection, state, 400, response)
        except Exception:
            log.exception("a control request failed")
            message = "the vault met an error of its own; its log says where"
            failed = json_response({"error": {"message": message, "hint": "", "status": FAILED}})
            self._send(connection, state, 500, failed)
        else:
            self._send(connection, state, 200, response)
        return bool(state.our_state is h11.DONE and state.their_state is h11.DONE)

    def _send(self, connection: socket.socket, state: h11.Connection, status: int, response: Response) -> None:
        if response.raw:
            switching = h11.InformationalResponse(status_code=101, headers=_UPGRADE)
            connection.sendall(state.send(switching) or b"")
            held = bytearray()
            for part in response.parts:
                # What is small goes with what is large behind it: whoever reads is woken once for both.
                if len(part) < _SMALL_BYTES and len(held) < _SMALL_BYTES:
                    held += part
                    continue
                connection.sendall(held)
                held.clear()
                connection.sendall(part)
            connection.sendall(held)
            return
        headers = list(response.headers)
        if response.length is None:
            headers.append(("transfer-encoding", "chunked"))
        else:
            headers.append(("content-length", str(response.length)))
        connection.sendall(state.send(h11.Response(status_code=status, headers=headers)) or b"")
        trailer = []
        try:
            for part in response.parts:
                connection.sendall(state.send(h11.Data(data=part)) or b"")
        except (OSError, h11.ProtocolError):
            raise
        except Exception as error:
            # The status line is gone: the trailer says that what was sent is not whole.
            log.error("a control response ends early: %s", type(error).__name__)
            trailer = [(_FAILURE, type(error).__name__)]
        connection.sendall(state.send(h11.EndOfMessage(headers=trailer)) or b"")


def _read_request(connection: socket.socket, state: h11.Connection, uid: int) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = state.next_event()
        if event is h11.NEED_DATA:
            data = connection.recv(_READ_BYTES)
            if not data and head is None:
                return None
            state.receive_data(data)
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _BODY_LIMIT:
                raise h11.RemoteProtocolError("body too large")
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            return Request(head.method.decode(), head.target.decode("ascii", "replace"), bytes(body), uid)
        else:
            return None


def _group(name: str) -> grp.struct_group:
    try:
        return grp.getgrnam(name)
    except KeyError as error:
        raise StrongroomError(f"control.group: there is no group {name} on this machine") from error


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class Client:
    """One connection to a vault."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._state = h11.Connection(h11.CLIENT)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def receive(self, into: memoryview) -> int:
        """Fill memory with what comes of a raw answer; return how many bytes, 0 at its end.

        Raises:
            StrongroomError: The connection broke.
        """
        try:
            return self._connection.recv_into(into)
        except OSError as error:
            raise StrongroomError("the connection to the vault broke off", hint="its log says why") from error

    def shut(self) -> None:
        """Make whoever reads from the connection see its end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def json(self, method: str, path: str, document: Any = None) -> Any:
        """Send a request and return the JSON document that answers it.

        Raises:
            StrongroomError: The vault refused, or the connection broke.
        """
        return json.loads(b"".join(self.stream(method, path, document)))

    def lines(self, method: str, path: str, document: Any = None) -> Iterator[dict[str, Any]]:
        """Send a request and yield the JSON documents that answer it, a line each.

        Raises:
            StrongroomError: The vault refused, or the connection broke.
        """
        rest = b""
        for part in self.stream(method, path, document):
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                yield json.loads(line)

    def stream(self, method: str, path: str, document: Any = None) -> Iterator[bytes]:
        """Send a request and yield the bytes that answer it; the end of the iteration says that they are whole.

        Raises:
            StrongroomError: The vault refused, or the connection broke.
        """
        try:
            yield from self._stream(method, path, msgspec.json.encode(document) if document is not None else b"")
        except (OSError, h11.ProtocolError) as error:
            raise StrongroomError(
                "the connection to the vault broke off", hint="its log says why; try again"
            ) from error

    def begin_raw(self, method: str, path: str, document: Any) -> bytes:
        """Send a request whose answer is raw; return what of that came already. The rest is for ``receive``.

        Raises:
            StrongroomError: The vault refused, or the connection broke.
        """
        body = msgspec.json.encode(document)
        headers = [("host", "vault"), ("content-length", str(len(body))), *_UPGRADE]
        state = self._state
        refusal, failed = bytearray(), False
        try:
            self._connection.sendall(
                (state.send(h11.Request(method=method, target=path, headers=headers)) or b"")
                + (state.send(h11.Data(data=body)) or b"")
                + (state.send(h11.EndOfMessage()) or b"")
            )
            while True:
                event = state.next_event()
                if event is h11.NEED_DATA:
                    state.receive_data(self._connection.recv(_READ_BYTES))
                elif isinstance(event, h11.InformationalResponse):
                    break
                elif isinstance(event, h11.Response):
                    failed = event.status_code >= 400
                elif isinstance(event, h11.Data):
                    refusal += event.data
                elif isinstance(event, h11.EndOfMessage) and failed:
                    raise _refused(bytes(refusal))
                else:
                    raise ConnectionAbortedError
            return bytes(state.trailing_data[0])
        except (OSError, h11.ProtocolError) as error:
            raise StrongroomError(
                "the connection to the vault broke off", hint="its log says why; try again"
            ) from error

    def _stream(self, method: str, path: str, body: bytes) -> Iterator[bytes]:
        state = self._state
        headers = [("host", "vault"), ("content-length", str(len(body)))]
        self._connection.sendall(
            (state.send(h11.Request(method=method, target=path, headers=headers)) or b"")
            + ((state.send(h11.Data(data=body)) or b"") if body else b"")
            + (state.send(h11.EndOfMessage()) or b"")
        )
        failed = False
        broken = ""
        refusal = bytearray()
        while True:
            event = state.next_event()
            if event is h11.NEED_DATA:
                state.receive_data(self._connection.recv(_READ_BYTES))
            elif isinstance(event, h11.Response):
                failed = event.status_code >= 400
            elif isinstance(event, h11.Data):
                if failed:
                    refusal += event.data
                else:
                    yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                broken = dict(event.headers).get(_FAILURE.encode(), b"").decode("ascii")
                break
            else:
                raise ConnectionAbortedError
        state.start_next_cycle()
        if broken:
            raise StrongroomError(
                f"its content does not open or cannot be read ({broken})", hint="the vault's log says more"
            )
        if failed:
            raise _refused(bytes(refusal))


def _refused(content: bytes) -> StrongroomError:
    error = json.loads(content)["error"]
    return StrongroomError(error["message"], hint=error["hint"], status=error["status"])
