"""A real server for the tests: store, gate and vault as processes, on ports that the system chooses."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pwd
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from storescp.cli.setup import init_command  # noqa: F401  (a broken import shows here, once)

START_SECONDS = 30
DCMTK = {
    "DCMDICTPATH": "/usr/share/libdcmtk17/dicom.dic",
    "TCP_NODELAY": "1",
    "PATH": "/usr/bin:/bin:/usr/sbin",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a command that is not installed, unless nothing may be skipped."""
    for item in items:
        for mark in item.iter_markers("needs"):
            missing = [name for name in mark.args if find_command(name) is None]
            if missing and not os.environ.get("STRONGROOM_NO_SKIP"):
                item.add_marker(pytest.mark.skip(reason=f"NOT TESTED: {', '.join(missing)} is not installed"))
        if os.geteuid() != 0 and item.get_closest_marker("needs_root") and not os.environ.get("STRONGROOM_NO_SKIP"):
            item.add_marker(pytest.mark.skip(reason="NOT TESTED: this needs root"))


def pytest_configure(config: pytest.Config) -> None:
    """Register our marks."""
    config.addinivalue_line("markers", "needs_root: users, mounts and limits that only root can make")
    config.addinivalue_line("markers", "needs(*commands): programs that a test starts")


def find_command(name: str) -> str | None:
    """Return where a system command is; never one of this environment, which has a storescu of pynetdicom's."""
    for folder in ("/usr/bin", "/usr/sbin", "/bin"):
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    return None


class Finished:
    """A command that ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.status = process.returncode
        self.out = process.stdout
        self.err = process.stderr

    def json(self) -> Any:
        return json.loads(self.out)


class Server:
    """A store of its own and the processes on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "strongroom.toml"
        self.store = home / "store"
        self.incoming = home / "spool" / "incoming"
        self.peers = home / "peers.d"
        self.port = 0
        self.log: list[str] = []
        self.children: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def run(self, *arguments: str | Path, stdin: str = "", timeout: float = 60) -> Finished:
        """Run a strongroom command on this store."""
        command = [sys.executable, "-m", "storescp", "--config", str(self.config), *map(str, arguments)]
        return Finished(
            subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        )

    def run_as(self, user: str, *arguments: str) -> Finished:
        """Run a strongroom command as another user; for those that end by themselves."""
        command = [sys.executable, "-m", "storescp", "--config", str(self.config), *arguments]
        found = pwd.getpwnam(user)
        return Finished(
            subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                user=found.pw_uid,
                group=found.pw_gid,
                extra_groups=[],
            )
        )

    def ok(self, *arguments: str | Path, stdin: str = "") -> Finished:
        """Run a strongroom command that must succeed."""
        done = self.run(*arguments, stdin=stdin)
        assert done.status == 0, (arguments, done.status, done.out, done.err)
        return done

    def init(self, *arguments: str) -> None:
        """Make the store, listening on a port that the system chooses."""
        self.ok("init", "--with-pki", "--key-file", self.home / "store.key", "--listen", "127.0.0.1:0", *arguments)

    def add_peer(self, title: str = "CT1") -> Path:
        """Add a peer; return the folder with its key (peer.key) and certificate (peer.pem)."""
        folder = self.home / "issued" / title
        self.ok("peer", "add", title, "--issue", folder, "--host", "127.0.0.1")
        return folder

    def set(self, section: str, **settings: Any) -> None:
        """Change settings in the configuration file."""
        text = self.config.read_text()
        start = text.index(f"[{section}]\n")
        head, body = text[:start], text[start:]
        for key, value in settings.items():
            body, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {json.dumps(value)}", body, count=1)
            assert count == 1, key
        self.config.write_text(head + body)

    def start(self, verb: str = "serve") -> Server:
        """Start ``serve``, ``gate`` or ``vault`` and wait until it serves."""
        self.start_command([sys.executable, "-m", "storescp", "--config", str(self.config), verb], verb)
        return self

    def start_command(self, command: Sequence[str], verb: str) -> subprocess.Popen[str]:
        """Start a command that runs a verb in the end, and wait until it serves or died."""
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self._lines = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        process = self._process
        if verb in {"serve", "gate"}:
            self.port = int(self.wait_log(r"listening on 127\.0\.0\.1:(\d+)")[1])
        if verb == "serve":
            self.wait_log("serve: ready")
        if verb == "vault" and "strace" not in command[0]:
            self.wait_log("unlocked|locked")
            # It can be asked only a moment later.
            self.wait_listening()
        return process

    def wait_listening(self) -> None:
        """Wait until the vault can be asked, or the process ended."""
        from storescp.config import load

        path, deadline = str(load(self.config).socket), time.monotonic() + START_SECONDS
        while self._process is not None and self._process.poll() is None:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.connect(path)
                    return
                except (FileNotFoundError, ConnectionRefusedError):
                    assert time.monotonic() < deadline, "\n".join(self.log)
            time.sleep(0.01)

    def wait_log(self, pattern: str, seconds: float = START_SECONDS) -> re.Match[str]:
        """Wait for a line of the log that was not waited for yet."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no log line matches {pattern!r}:\n" + "\n".join(self.log)) from None
            if line is None:
                raise AssertionError("the process ended:\n" + "\n".join(self.log))
            if found := re.search(pattern, line):
                return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the process and return its exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        try:
            status = self._process.wait(60)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        return status

    def pids(self, verb: str) -> list[int]:
        """Return the processes of a verb that serve this store."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(self.config).encode() in words and verb.encode() in words and b"strace" not in words[0]:
                    found.append(int(entry.name))
        return found

    def kill(self, verb: str) -> None:
        """Kill the processes of a verb with SIGKILL."""
        for pid in self.pids(verb):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill whatever runs on this store, and wait until it is gone."""
        for verb in ("serve", "gate", "gate-worker", "vault"):
            self.kill(verb)
            while self.pids(verb):
                time.sleep(0.01)

    def status(self) -> Any:
        """Return ``status --json``."""
        return self.ok("status", "--json").json()

    def list(self, level: str = "instance", *filters: str) -> list[dict[str, Any]]:
        """Return the rows of ``list --json``; none when nothing matched."""
        done = self.run("list", level, "--json", *filters)
        assert done.status in {0, 5}, done.err
        return list(done.json()["items"])

    def deposits(self) -> list[Path]:
        """Return what lies in ``incoming/`` under a pack's name: no files made ahead, no events of the gate."""
        return [path for path in self.incoming.iterdir() if path.suffix not in {".new", ".events"}]

    def wait_admitted(self, seconds: float = 30, *, by_asking: bool = False) -> None:
        """Wait until nothing waits; ``by_asking`` where no vault runs: one that is asked for a list admits."""
        deadline = time.monotonic() + seconds
        while self.status()["deposits"]["packs"]:
            if by_asking:
                self.list("study")
            assert time.monotonic() < deadline, "\n".join(self.log)
            # Packs close by themselves after pack_idle_seconds; there is no event to wait for outside the gate.
            time.sleep(0.1)

    def _read(self, process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.log.append(line.rstrip("\n"))
                lines.put(line)
        lines.put(None)


def refill(admission: Any) -> None:
    """Fill an index anew, all at once."""
    admission.begin_filling()
    assert admission.fill(float("inf"))


@pytest.fixture
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Make stores; what still runs at the end is killed."""
    made: list[Server] = []

    def make() -> Server:
        # Unix socket paths are short; pytest's folders are not always.
        home = tmp_path_factory.mktemp("s")
        server = Server(home)
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop(signal.SIGKILL)
        server.kill_all()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    """A store with one peer, CT1, served."""
    made = make_server()
    made.init()
    made.add_peer("CT1")
    made.set("gate", pack_idle_seconds=1)
    return made.start()


def dcmtk(name: str, *arguments: str | Path, timeout: float = 120) -> Finished:
    """Run a command of DCMTK's."""
    command = [find_command(name) or name, *map(str, arguments)]
    return Finished(
        subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=DCMTK, errors="replace"
        )
    )


def tls_arguments(folder: Path, title: str = "CT1", called: str = "STRONGROOM") -> Sequence[str | Path]:
    """Return DCMTK's arguments for a peer."""
    return [
        "-aet",
        title,
        "-aec",
        called,
        "+tls",
        folder / f"{title}.key",
        folder / f"{title}.pem",
        "+cf",
        folder / "ca.pem",
    ]


def send(server: Server, files: Sequence[Path], title: str = "CT1", folder: Path | None = None) -> list[int]:
    """Store files as they are, each on an association of its own; return the statuses."""
    import urllib.parse

    import scu

    context = scu.tls(folder or server.home / "issued" / title, urllib.parse.quote(title, safe=""))
    return scu.send(server.port, context, [scu.read(file) for file in files], calling=title)


def changed(path: Path, folder: Path, **elements: str) -> Path:
    """Write a copy of a file with other values."""
    import pydicom

    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
        if name == "SOPInstanceUID":
            dataset.file_meta.MediaStorageSOPInstanceUID = value
    target = folder / f"{len(list(folder.iterdir()))}.dcm"
    dataset.save_as(target)
    return target


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect the sockets that pynetdicom left open when a server died, while their warnings are still expected."""
    yield
    gc.collect()


@pytest.fixture
def lenient_pydicom() -> Iterator[None]:
    """Set pydicom as the desk does."""
    import pydicom

    from storescp.desk.identifiers import lenient

    before = pydicom.config.settings.writing_validation_mode
    lenient()
    yield
    pydicom.config.settings.writing_validation_mode = before


@pytest.fixture(autouse=True)
def strict_pydicom() -> None:
    """Set pydicom as the gate does: a setting of the whole process, which tests that read sloppy files change."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.RAISE
