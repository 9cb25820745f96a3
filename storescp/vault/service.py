"""The vault process: lock state, the admission loop, the control API."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from keys import authority, encoding, keyring, slots
from keys.anchors import AnchorError, FileAnchors
from keys.keyring import Keyring, KeyringError
from keys.seal import SealError, plain_length
from storage.index import LEVELS, FilterError, Filters, Index
from storage.keysdb import KeysDatabase
from storage.objects import Archive, PackFile
from storage.pack import PackError
from storescp import notify
from storescp.config import Config
from storescp.control import Request, Response, Server, json_response, lines_response
from storescp.errors import LOCKED, StrongroomError
from storescp.vault.admit import Admission, open_pack

_TICK_SECONDS = 1.0
_WRONG_SECRET_DELAY_LIMIT = 30.0
TOTAL_LOSS = (
    "ONE FAILURE FROM TOTAL LOSS: no recovery export exists. "
    "If the keyring or the anchors are lost, every study is lost, backups included"
)

log = logging.getLogger(__name__)


class UnlockRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A secret that opens a slot: exactly one of the two."""

    passphrase: str | None = None
    key: bytes | None = None


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What to list."""

    level: str
    filters: Filters = msgspec.field(default_factory=Filters)


class IssueRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A certificate to issue: for a peer by name, or for a server by names and addresses."""

    csr: bytes
    peer: str = ""
    server: list[str] = msgspec.field(default_factory=list)
    days: int = 730


class Reader(msgspec.Struct, frozen=True):
    """Connections of their own for one reader at a time."""

    index: Index
    keys_db: KeysDatabase

    def close(self) -> None:
        """Close both."""
        self.index.close()
        self.keys_db.close()


class Open:
    """What an unlocked vault has in hand."""

    def __init__(self, config: Config, ring: Keyring) -> None:
        self._config = config
        self.ring = ring
        self.archive = Archive(config.store_path, config.incoming)
        self.keys_db = KeysDatabase(config.keys_db, migrate=True)
        version = ring.current()
        self._index_path = config.index(version.version)
        self.index = Index(self._index_path, version.index_key(), migrate=True)
        self.admission = Admission(self.archive, ring, self.keys_db, self.index)
        self._readers: queue.SimpleQueue[Reader] = queue.SimpleQueue()
        self._closed = False

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """Lend a reader's connections; they are kept for the next one."""
        try:
            lent = self._readers.get_nowait()
        except queue.Empty:
            key = self.ring.current().index_key()
            lent = Reader(Index(self._index_path, key), KeysDatabase(self._config.keys_db))
        try:
            yield lent
        finally:
            if self._closed:
                lent.close()
            else:
                self._readers.put(lent)

    def close(self) -> None:
        """Close databases and forget keys."""
        self._closed = True
        while not self._readers.empty():
            self._readers.get_nowait().close()
        self.index.close()
        self.keys_db.close()
        self.ring.forget()


class Vault:
    """The vault's state and what the control API does with it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._anchors = FileAnchors(config.anchors)
        self._open: Open | None = None
        self._locked_since = time.time()
        self._state = threading.Lock()
        self._wrong = 0
        self._routes: dict[tuple[str, str], Any] = {
            ("GET", "/v1/status"): self._status,
            ("POST", "/v1/unlock"): self._unlock,
            ("POST", "/v1/lock"): self._lock,
            ("POST", "/v1/search"): self._search,
            ("POST", "/v1/certificates"): self._issue,
        }

    # --- lock state

    def unlock(self, secret: slots.Secret) -> None:
        """Open the keyring, finish what a crash interrupted, and begin to admit.

        Raises:
            UnlockError: No slot opens with this secret.
            KeyringError: The keyring is damaged or old.
            AnchorError: The anchors are not here.
        """
        with self._state:
            if self._open is not None:
                return
            opened = Open(self._config, keyring.unlock(self._config.keyring, secret, self._anchors))
            opened.admission.resume()
            self._open = opened
        log.info("unlocked")

    def lock(self) -> None:
        """Forget the keys."""
        with self._state:
            if self._open is not None:
                self._open.close()
                self._open = None
                self._locked_since = time.time()
                log.info("locked")

    def admit(self) -> None:
        """Admit what waits, if unlocked."""
        with self._state:
            if self._open is not None:
                count = self._open.admission.catch_up()
                if count:
                    log.info("admitted %d packs", count)

    def handle(self, request: Request) -> Response:
        """Answer a control request.

        Raises:
            StrongroomError: It cannot be done.
        """
        if request.method == "GET" and request.path.startswith("/v1/instances/"):
            return self._instance(request.path.removeprefix("/v1/instances/"))
        route = self._routes.get((request.method, request.path))
        if route is None:
            raise StrongroomError(f"this vault does not know {request.method} {request.path}")
        response: Response = route(request)
        return response

    # --- what the control API does

    def _unlock(self, request: Request) -> Response:
        asked: UnlockRequest = request.json(UnlockRequest)
        secret = slots.Passphrase(asked.passphrase) if asked.passphrase is not None else slots.KeyFile(asked.key or b"")
        try:
            self.unlock(secret)
        except slots.UnlockError as error:
            self._wrong += 1
            log.warning("a wrong secret was given to unlock, %d in a row", self._wrong)
            time.sleep(min(2.0 ** (self._wrong - 1), _WRONG_SECRET_DELAY_LIMIT))
            raise StrongroomError(str(error), hint="try again, or use another slot", status=LOCKED) from error
        except (KeyringError, AnchorError) as error:
            raise StrongroomError(str(error), hint="see docs/admin.md, 'What losing a key means'") from error
        self._wrong = 0
        return json_response({"locked": False})

    def _lock(self, _request: Request) -> Response:
        self.lock()
        return json_response({"locked": True})

    def _status(self, _request: Request) -> Response:
        self.admit()
        config = self._config
        with self._state:
            opened = self._open
            archive = Archive(config.store_path, config.incoming)
            status: dict[str, Any] = {
                "format": 1,
                "time": _now(),
                "store_id": keyring.read_header(config.keyring).store_id,
                "locked": opened is None,
                "locked_since": None if opened else _time(self._locked_since),
                "deposits": _deposits(archive),
                "quarantined": archive.quarantined(),
                "disk": {
                    "store": _disk(config.store_path),
                    "incoming": _disk(config.incoming),
                },
                "slots": [
                    {"id": s.id, "type": s.type, "label": s.label, "created": s.created}
                    for s in keyring.read_header(config.keyring).slots
                ],
                "warnings": [TOTAL_LOSS],
            }
            if opened is not None:
                status["key_version"] = opened.ring.current().version
                status["counts"] = opened.index.counts()
                status["last_store"] = opened.index.last_stores()
        if opened is None:
            status["warnings"].append("the vault is locked: what arrives is kept, but cannot be listed or exported")
        counts = status.get("counts", {})
        if counts.get("conflicts"):
            status["warnings"].append(
                f"{counts['conflicts']} instances arrived with other content under a UID that is held; the first stays"
            )
        if counts.get("unreadable") or status["quarantined"]:
            status["warnings"].append(
                f"{counts.get('unreadable', 0)} records do not open, {status['quarantined']} deposits are in "
                "quarantine: the log names their senders' associations: have them sent again"
            )
        return json_response(status)

    def _search(self, request: Request) -> Response:
        asked: SearchRequest = request.json(SearchRequest)
        if asked.level not in LEVELS:
            raise StrongroomError(f"no such level: {asked.level}")
        self.admit()
        rows = self._rows(asked)
        try:
            # The first row is fetched before the answer begins, so that a bad filter is an error and no broken answer.
            first = next(rows, None)
        except FilterError as error:
            raise StrongroomError(str(error)) from error
        return lines_response(itertools.chain([] if first is None else [first], rows))

    def _rows(self, asked: SearchRequest) -> Iterator[dict[str, Any]]:
        with self._unlocked().reader() as reader:
            for row in reader.index.search(asked.level, asked.filters):
                if asked.level == "instance":
                    row["bytes"] = plain_length(row.pop("dataset_length"))
                yield row

    def _instance(self, text: str) -> Response:
        """Stream one data set."""
        if not text.isascii() or not text.isdigit():
            raise StrongroomError("no such instance")
        opened = self._unlocked()
        with opened.reader() as reader:
            place = reader.index.place(int(text))
            if place is None:
                raise StrongroomError("no such instance")
            file = _open_file(opened.archive, place.pack_id)
            try:
                content = open_pack(file, opened.ring, reader.keys_db.find(place.pack_id)).dataset(place.frame)
            except (SealError, KeyringError, AnchorError, PackError) as error:
                file.close()
                raise StrongroomError(f"pack {place.pack_id} does not open: {error}") from error
        # Its length is known, but chunks can end with the word that they are not whole.
        return Response(_reading(file, content))

    def _issue(self, request: Request) -> Response:
        asked: IssueRequest = request.json(IssueRequest)
        ca = self._unlocked().ring.body.authority
        if ca is None:
            raise StrongroomError(
                "this store has no certificate authority of its own",
                hint="bind a certificate of yours: 'strongroom peer add TITLE --certificate FILE'",
            )
        now = datetime.now(UTC)
        try:
            if asked.server:
                pem = authority.issue_server(ca, asked.csr, asked.server, now, asked.days)
            else:
                pem = authority.issue_peer(ca, asked.csr, asked.peer, now, asked.days)
        except authority.RequestError as error:
            raise StrongroomError(str(error)) from error
        log.info("issued a certificate")
        return json_response({"certificate": pem.decode(), "authority": ca.certificate})

    def _unlocked(self) -> Open:
        if self._open is None:
            raise StrongroomError("the vault is locked", hint="'strongroom unlock' opens it", status=LOCKED)
        return self._open


def run(config: Config, *, single: socket.socket | None = None) -> None:
    """Run the vault until SIGTERM or SIGINT, or on one connection until that ends.

    Raises:
        StrongroomError: It cannot start.
    """
    stop = threading.Event()
    if single is None:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _store_lock(config):
        vault = Vault(config)
        _unlock_by_itself(config, vault)
        server = Server(vault.handle, frozenset({0, os.geteuid()}))
        if single is not None:
            server.serve(single)
            vault.lock()
            return
        try:
            server.listen(config.socket)
        except OSError as error:
            raise StrongroomError(f"the vault cannot listen on {config.socket}: {error}") from error
        log.warning("%s", TOTAL_LOSS)
        notify.ready()
        while not stop.wait(_TICK_SECONDS):
            try:
                vault.admit()
            except Exception:
                # A full disk or a damaged file must not end the vault: deposits stay where they are.
                log.exception("admission failed and is tried again")
        notify.stopping()
        server.close()
        vault.lock()
        with contextlib.suppress(FileNotFoundError):
            config.socket.unlink()
        log.info("stopped")


def _unlock_by_itself(config: Config, vault: Vault) -> None:
    if config.key_file is None:
        log.warning("locked: no way to unlock is configured; 'strongroom unlock' opens the vault")
        return
    try:
        vault.unlock(slots.read_key_file(config.key_file))
    except (slots.KeyFileError, slots.UnlockError, KeyringError, AnchorError) as error:
        log.error("locked: %s", error)


@contextlib.contextmanager
def _store_lock(config: Config) -> Iterator[None]:
    """Hold the store's lock: one vault a store."""
    try:
        descriptor = os.open(config.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StrongroomError(f"the store {config.store_path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StrongroomError(
            f"another vault runs on the store {config.store_path}",
            hint=f"use it through {config.socket}, or stop it",
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _open_file(archive: Archive, pack_id: str) -> PackFile:
    # Admission may move a pack between finding it and opening it; it moves only once.
    for _ in range(2):
        path = archive.find(pack_id)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                return PackFile(path)
    raise StrongroomError(f"pack {pack_id} is missing", hint="restore it from a backup, or have it sent again")


def _reading(file: PackFile, content: Iterator[bytes]) -> Iterator[bytes]:
    with file:
        yield from content


def _deposits(archive: Archive) -> dict[str, Any]:
    sizes = []
    oldest: float | None = None
    for path in archive.deposits():
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            sizes.append(found.st_size)
            oldest = min(oldest or found.st_mtime, found.st_mtime)
    return {"packs": len(sizes), "bytes": sum(sizes), "oldest": _time(oldest) if oldest else None}


def _disk(path: os.PathLike[str]) -> dict[str, int]:
    usage = shutil.disk_usage(path)
    return {"free": usage.free, "total": usage.total}


def _now() -> str:
    return _time(time.time())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def publish(config: Config, ring: Keyring, created: str) -> None:
    """Publish the current version's deposit key for the gates; a published key is never replaced."""
    version = ring.current()
    path = config.public / f"deposit-{version.version}.key"
    encoding.create(path, version.deposit_key().signed_file(ring.signing, created), mode=0o644)
