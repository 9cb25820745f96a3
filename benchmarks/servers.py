"""The servers that Strongroom is compared with: each with mutual TLS, fresh folders and its tuning."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import trustme

from benchmarks.client import DCMDICT
from benchmarks.measure import Accounting
from benchmarks.programs import found
from benchmarks.upper import Credentials, Target

ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 30.0
_STOP_SECONDS = 45.0
TITLE = "BENCH"


class ServerError(Exception):
    """A server did not start, or did not keep what it was sent."""


class Pki:
    """A small authority of the benchmark's own, for every server that has none."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        authority = trustme.CA()
        self.authority = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.authority)
        self.server = self._issue(authority, folder / "server", "localhost", "127.0.0.1")
        self.client = self._issue(authority, folder / "client", "bench.example")

    def _issue(self, authority: trustme.CA, stem: Path, *names: str) -> tuple[str, str]:
        issued = authority.issue_cert(*names)
        key, certificate = f"{stem}.key", f"{stem}.pem"
        issued.private_key_pem.write_to_path(key)
        issued.cert_chain_pems[0].write_to_path(certificate)
        return key, certificate


class Server:
    """One run of one server: ``start`` says where to send to; ``settle`` waits until the work is done; ``stop``."""

    name: ClassVar[str]
    title: ClassVar[str]
    without: ClassVar[str]
    # A slow server sends fewer objects: a rate does not need hundreds of 44 ms.
    share: ClassVar[float] = 1.0
    cases: ClassVar[tuple[str, ...] | None] = None
    # The program that must be installed for it.
    program: ClassVar[str] = ""
    # What a store takes before anything is in it, in bytes: packs grow ahead of their use.
    empty_bytes: ClassVar[int] = 0
    called: ClassVar[str] = "ANY-SCP"
    settle_seconds: ClassVar[float] = 1.0

    def __init__(self, folder: Path, pki: Pki, accounting: Accounting, associations: int) -> None:
        self.folder = folder
        self.pki = pki
        self.associations = associations
        self._accounting = accounting
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"
        folder.mkdir(parents=True)

    def start(self) -> Target:
        """Start and return when it accepts connections.

        Raises:
            ServerError: It does not.
        """
        self.prepare()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._accounting.wrap(self.command()),
                # Tuning is each server's own, not what happens to be set here.
                env={k: v for k, v in os.environ.items() if k != "TCP_NODELAY"} | self.environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._accounting.started(self.process.pid)
        deadline = time.monotonic() + _START_SECONDS
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not start: {self.log.read_text(errors='replace')[-300:]}")
            time.sleep(0.05)
        return self.target()

    def prepare(self) -> None:
        """Make what the server needs before it starts."""

    def command(self) -> list[str]:
        """Return the command that runs it."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return what it needs in its environment."""
        return {}

    def ready(self) -> bool:
        """Tell whether it accepts connections."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def target(self) -> Target:
        """Return where to send to."""
        return Target(self.port, self.called, Credentials(*self.pki.client, self.pki.authority, TITLE))

    def settle(self, timeout: float) -> float | None:
        """Wait until the work of a burst is done; return when that was (monotonic clock), where it can be known."""
        time.sleep(min(timeout, self.settle_seconds))
        return None

    def stored(self) -> int | None:
        """Return how many objects it has, where that can be counted."""
        return None

    def stop(self) -> None:
        """Stop it, with SIGKILL if it must be."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Dcmtk(Server):
    """storescp, a process an association."""

    name = "dcmtk"
    program = "storescp"
    title = "DCMTK storescp, tuned"
    without = "no index, no encryption at rest, no sync; a file an object"

    def prepare(self) -> None:
        (self.folder / "out").mkdir()

    def command(self) -> list[str]:
        return [
            _program(self.program), "--fork", *self.options(), "+tls", *self.pki.server, "+cf", self.pki.authority,
            "-od", str(self.folder / "out"), str(self.port),
        ]  # fmt: skip

    def options(self) -> list[str]:
        """Return what is set beyond TLS."""
        return ["-pdu", "131072", "+B"]

    def environment(self) -> dict[str, str]:
        return {"TCP_NODELAY": "1", "DCMDICTPATH": os.environ.get("DCMDICTPATH", DCMDICT)}

    def stored(self) -> int | None:
        return sum(1 for _ in os.scandir(self.folder / "out"))


class DcmtkShipped(Dcmtk):
    """storescp as its package starts it: Nagle's algorithm on, PDUs of 16 KB."""

    name = "dcmtk-shipped"
    title = "DCMTK storescp, as shipped"
    without = "no index, no encryption at rest, no sync; waits 40 ms an object for Nagle's algorithm"
    share = 0.1
    cases = ("ct1", "ct4", "small1", "small4", "large")

    def options(self) -> list[str]:
        return []

    def environment(self) -> dict[str, str]:
        return {k: v for k, v in super().environment().items() if k != "TCP_NODELAY"}


class Orthanc(Server):
    """Orthanc with SQLite, its storage synced."""

    name = "orthanc"
    program = "Orthanc"
    title = "Orthanc, tuned"
    without = "no encryption at rest; syncs files, its index not each time"

    def prepare(self) -> None:
        key, certificate = self.pki.server
        settings = {
            "Name": "bench",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "index"),
            "SyncStorageArea": True,
            "StorageCompression": False,
            "StoreMD5ForAttachments": False,
            "SaveJobs": False,
            "HttpServerEnabled": False,
            "DicomPort": self.port,
            "DicomAet": "ORTHANC",
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomThreadsCount": max(8, self.associations + 2),
            "MaximumPduLength": 131_072,
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": certificate,
            "DicomTlsPrivateKey": key,
            "DicomTlsTrustedCertificates": self.pki.authority,
            "DicomTlsRemoteCertificateRequired": True,
        }
        (self.folder / "orthanc.json").write_text(json.dumps(settings))

    def command(self) -> list[str]:
        return [_program(self.program), str(self.folder / "orthanc.json")]

    def environment(self) -> dict[str, str]:
        return {"TCP_NODELAY": "1"}


class Stock(Server):
    """pynetdicom as it comes."""

    name = "pynetdicom"
    title = "pynetdicom, stock"
    without = "no index, no encryption at rest, no sync; a file an object"

    def prepare(self) -> None:
        (self.folder / "out").mkdir()

    def command(self) -> list[str]:
        files = [*self.pki.server, self.pki.authority, str(self.folder / "out")]
        return [sys.executable, "-m", "benchmarks.stock", str(self.port), *files]

    def stored(self) -> int | None:
        return sum(1 for _ in os.scandir(self.folder / "out"))


class Sink(Server):
    """Keeps nothing: the client's own limit."""

    name = "sink"
    title = "null sink"
    without = "everything: it only decrypts, and shows what the client can do"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.sink", str(self.port), *self.pki.server, self.pki.authority]


class Floor(Sink):
    """Decrypts, seals, writes and syncs, and does nothing else: what is left for a receiver in Python to save."""

    name = "floor"
    title = "floor: TLS, seal, write, sync"
    without = "everything but that: no checks, no attributes, no index; one data set a record, never read again"
    cases = ("ct1", "ct4", "small1", "small4")
    empty_bytes = 4 << 28

    def prepare(self) -> None:
        (self.folder / "out").mkdir()

    def command(self) -> list[str]:
        return [*super().command(), str(self.folder / "out")]


def _program(name: str) -> str:
    program = found(name)
    if program is None:
        raise ServerError(f"{name} is not installed")
    return program


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
