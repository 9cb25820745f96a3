"""Running Strongroom's commands as an admin does, and what the vault uses meanwhile."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from benchmarks.upper import Credentials, Target
from storescp.config import load

ROOT = Path(__file__).resolve().parent.parent
PEER = "BENCH"
# The supervisor gives its children half a minute each to start; a large store gets more, so that it can be measured.
_START_SECONDS = 600.0
_STOP_SECONDS = 60.0
_SAMPLE_SECONDS = 0.05
_LIMIT_SECONDS = 3600.0


class CommandError(Exception):
    """A command that had to work did not."""


class Done(NamedTuple):
    """A command that ended."""

    status: int
    out: str
    err: str


def run(config: Path, words: list[str], answers: Callable[[], list[str]] | None = None) -> Done:
    """Run a command; where ``answers`` are given, on a terminal of its own, an answer for each question."""
    command = _command(config, words)
    if answers is not None:
        return _on_terminal(command, answers)
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_LIMIT_SECONDS, check=False
    )
    return Done(ended.returncode, ended.stdout, ended.stderr)


def strongroom(config: Path, *words: str) -> str:
    """Run a command that must work, untimed; return what it said. Nothing that matches is no failure.

    Raises:
        CommandError: It did not.
    """
    done = run(config, list(words))
    if done.status not in {0, 5}:
        raise CommandError(f"strongroom {words[0]}: {done.err[-300:]}")
    return done.out


class Served:
    """``strongroom serve`` on a store."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        self._log: list[str] = []

    @property
    def pid(self) -> int:
        """The supervisor's process; 0 where none runs."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it, unless it runs, and wait until it is ready.

        Raises:
            CommandError: It ended instead.
        """
        if self._process is not None:
            return
        if not (self._folder / f"{PEER}.key").exists():
            strongroom(self._config, "peer", "add", PEER, "--issue", str(self._folder))
        self._process = subprocess.Popen(
            _command(self._config, ["serve"]), cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(self._process, ready), daemon=True).start()
        ready.wait(_START_SECONDS)
        if not self._log or "serve: ready" not in self._log[-1]:
            said = " | ".join(self._log[-5:])
            self.stop()
            raise CommandError(f"serve did not start: {said}")

    def stop(self) -> None:
        """Stop it, with SIGKILL if it must be."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def target(self) -> Target:
        """Return where to store to."""
        key, certificate, authority = (str(self._folder / name) for name in (f"{PEER}.key", f"{PEER}.pem", "ca.pem"))
        title = load(self._config).settings.gate.ae_title
        return Target(self._port, title, Credentials(key, certificate, authority, PEER))

    @property
    def _folder(self) -> Path:
        return self._config.parent / "bench"

    def _read(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        """Take the log, so that nobody waits for it to be read; what comes after the start is not kept."""
        self._log = []
        for line in process.stderr or ():
            if ready.is_set():
                continue
            self._log.append(line.rstrip())
            if found := re.search(r"listening on \S+:(\d+)", line):
                self._port = int(found[1])
            if "serve: ready" in line:
                ready.set()
        ready.set()


class Watch(threading.Thread):
    """Watches the vault, of the server or of the command that runs; until its context ends.

    ``peak``: its largest VmHWM, begun anew here, in bytes. ``command``: that of the command itself. ``cpu``: seconds of
    the vault, user and system. Of what ends with its command the last look counts.
    """

    def __init__(self, served: Served) -> None:
        super().__init__(daemon=True)
        self._served = served
        self._done = threading.Event()
        self._before = {pid: _cpu(pid) for pid in _vaults()}
        self._used: dict[int, float] = {}
        self.peak = self.command = 0
        for pid in self._before:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    @property
    def cpu(self) -> float:
        """CPU time that was used meanwhile."""
        return sum(used - self._before.get(pid, 0.0) for pid, used in self._used.items())

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self.join(10)

    def run(self) -> None:
        """Look until the context ends, and once more."""
        while not self._done.wait(_SAMPLE_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        for pid in _vaults():
            self.peak = max(self.peak, _peak(pid))
            self._used[pid] = _cpu(pid) or self._used.get(pid, 0.0)
        for pid in _children(os.getpid()):
            if pid != self._served.pid:
                self.command = max(self.command, _peak(pid))


def _vaults() -> list[int]:
    """Return the vaults among this process's descendants."""
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            if pid != os.getpid() and b"\0vault\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        todo += _children(pid)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _peak(pid: int) -> int:
    """Return a process's VmHWM in bytes, 0 of one that is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) << 10
    return 0


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _command(config: Path, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "storescp", "--config", str(config), *words]


def _on_terminal(command: list[str], answers: Callable[[], list[str]]) -> Done:
    """Run a command on a terminal of its own and type an answer at each question that ends in a colon."""
    ours, theirs = pty.openpty()
    # What asks for a secret opens the controlling terminal: the process needs one.
    login = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", login, *command], cwd=ROOT, stdin=theirs)
    os.close(theirs)
    said, asked, given = "", 0, 0
    until = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.5)[0]:
            try:
                said += os.read(ours, 1 << 16).decode(errors="replace")
            except OSError:
                break
        elif process.poll() is not None:
            break
        asked = len(re.findall(r"Share \d+[^\n]*: ", said))
        if asked > given:
            shares = answers()
            os.write(ours, (shares[given] if given < len(shares) else "").encode() + b"\n")
            given += 1
    os.close(ours)
    if process.poll() is None:
        process.wait(_STOP_SECONDS)
    text = said.replace("\r\n", "\n")
    return Done(process.returncode, text, text)
