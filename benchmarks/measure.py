"""What servers use: CPU time and memory of all their processes, ended children included; and what this machine is.

CPU comes from a cgroup of the server's own where one can be made (v2's ``cpu.stat``, or v1's ``cpuacct``): nothing that
ends is lost. Otherwise from /proc, each process with its reaped children, in ticks of 10 ms. Work that the kernel does
later for nobody in particular (writing back dirty pages) is in neither.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from benchmarks.programs import found

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "cgroup.controllers", "cpu.stat"),
    (Path("/sys/fs/cgroup/unified"), "cgroup.controllers", "cpu.stat"),
    (Path("/sys/fs/cgroup/cpuacct"), "cgroup.procs", "cpuacct.usage"),
)
_SAMPLE_SECONDS = 0.1


class Accounting:
    """One server's processes. Start them with ``wrap``, so that they and all their children are counted."""

    def __init__(self) -> None:
        self._group: Path | None = None
        self._usage = ""
        self._root = 0
        for mount, proof, usage in _CGROUPS:
            group = mount / f"strongroom-bench-{secrets.token_hex(4)}"
            with contextlib.suppress(OSError):
                if not (mount / proof).exists():
                    continue
                group.mkdir()
                if (group / usage).exists() and (group / "cgroup.procs").exists() and _joins(group):
                    self._group, self._usage = group, usage
                    break
                group.rmdir()

    @property
    def means(self) -> str:
        """How CPU time is taken."""
        how = f"cgroup {self._usage}, all processes" if self._group else "/proc, ticks of 10 ms"
        return f"{how}; what the kernel writes back later for unsynced files is nobody's"

    def __enter__(self) -> Accounting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is left of the server and remove its cgroup."""
        for _ in range(50):
            left = self.pids()
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for _ in range(50):
            if self._group is None:
                break
            # Busy until the last zombie is gone.
            with contextlib.suppress(OSError):
                self._group.rmdir()
                break
            time.sleep(0.1)

    def wrap(self, command: list[str]) -> list[str]:
        """Return a command that joins the cgroup before it becomes the server."""
        if self._group is None:
            return command
        return ["/bin/sh", "-c", f'echo $$ > "{self._group}/cgroup.procs" && exec "$@"', "sh", *command]

    def started(self, pid: int) -> None:
        """Take the pid of the server's first process."""
        self._root = pid

    def pids(self) -> list[int]:
        """Return the processes that run."""
        if self._group:
            return [int(p) for p in (self._group / "cgroup.procs").read_text().split()]
        alive, todo = [], [self._root] if self._root else []
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                if _stat(pid)[0] != "Z":
                    alive.append(pid)
                for task in Path(f"/proc/{pid}/task").iterdir():
                    todo += [int(p) for p in (task / "children").read_text().split()]
        return alive

    def cpu(self) -> float:
        """Return the seconds of CPU used so far, user and system."""
        if self._group is None:
            ticks = 0
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    ticks += sum(int(f) for f in _stat(pid)[11:15])
            return ticks / os.sysconf("SC_CLK_TCK")
        text = (self._group / self._usage).read_text()
        if self._usage == "cpuacct.usage":
            return int(text) / 1e9
        return int(text.split()[1]) / 1e6


class Memory(threading.Thread):
    """Samples memory until stopped.

    ``pss``: the largest sum over all processes seen in one sample, every shared page counted once (Pss of smaps_rollup,
    a sample each 0.1 s). ``process``: the largest peak of a single process (VmHWM: exact, not sampled). ``processes``:
    the most that ran at a time.
    """

    def __init__(self, accounting: Accounting) -> None:
        super().__init__(daemon=True)
        self._accounting = accounting
        self._done = threading.Event()
        self.pss = 0
        self.process = 0
        self.processes = 0
        for pid in accounting.pids():
            # Begin VmHWM anew: what starting up took is not of interest here.
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def run(self) -> None:
        """Sample; never more than a twentieth of one core."""
        while True:
            begun = time.monotonic()
            self._sample()
            if self._done.wait(max(_SAMPLE_SECONDS, 20 * (time.monotonic() - begun))):
                self._sample()
                return

    def stop(self) -> None:
        """Take a last sample and end."""
        self._done.set()
        self.join(10)

    def _sample(self) -> None:
        total = 0
        pids = self._accounting.pids()
        for pid in pids:
            with contextlib.suppress(OSError, ValueError):
                total += _field(f"/proc/{pid}/smaps_rollup", "Pss:")
                self.process = max(self.process, _field(f"/proc/{pid}/status", "VmHWM:"))
        self.pss = max(self.pss, total)
        self.processes = max(self.processes, len(pids))


def machine() -> dict[str, str]:
    """Return what counts about this machine and the software on it; no names, no paths."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next((int(s.split()[1]) for s in _lines("/proc/meminfo") if s.startswith("MemTotal")), 0)
    return {
        "kernel": platform.release().partition("-")[0],
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / (1 << 20):.0f} GiB",
        "python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "dcmtk": _version(["storescp", "--version"]),
        "orthanc": _version(["Orthanc", "--version"]),
    }


def file_system(folder: Path) -> dict[str, str]:
    """Return what the file system of a folder is and what small things cost on it, in microseconds (medians)."""
    kind, options, device = _mount(folder)
    journal = ""
    if kind in {"ext3", "ext4"}:
        has = any(p.name.startswith(device + "-") for p in _listed(Path("/proc/fs/jbd2")))
        journal = ", with a journal" if has else ", without a journal"
    probe = folder / f"probe-{secrets.token_hex(4)}"
    probe.mkdir()
    block = bytes(16_384)
    with (probe / "appended").open("wb", buffering=0) as file:

        def append() -> None:
            file.write(block)
            os.fdatasync(file.fileno())

        appends = [_timed(append) for _ in range(200)]
    return {
        "type": f"{kind}{journal} ({options})",
        "append and sync of 16 KB": f"{_median(appends):.0f}",
    }


def create_cost(folder: Path) -> float:
    """Return what creating a file costs in a new folder in this one: median in microseconds."""
    probe = folder / "probe"
    probe.mkdir(parents=True)
    return _median([_timed(partial(_create, probe / str(i))) for i in range(50)])


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return (time.perf_counter() - begun) * 1e6


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _mount(folder: Path) -> tuple[str, str, str]:
    number = folder.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in _lines("/proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            kind, source, *_ = rest.split()
            return kind, fields.split()[5], Path(source).name
    return "unknown", "", ""


def _joins(group: Path) -> bool:
    """Tell whether a process may join."""
    proven = subprocess.run(
        ["/bin/sh", "-c", f'echo $$ > "{group}/cgroup.procs"'], check=False, stderr=subprocess.DEVNULL, timeout=5
    )
    return proven.returncode == 0


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _field(path: str, name: str) -> int:
    """Return a field of a file of kilobytes, in bytes."""
    return next((int(line.split()[1]) << 10 for line in _lines(path) if line.startswith(name)), 0)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _version(command: list[str]) -> str:
    program = found(command[0])
    if program is None:
        return "not installed"
    said = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, timeout=20).stdout
    line = said.partition("\n")[0]
    return next((word for word in line.split() if word.lstrip("v")[:1].isdigit()), "unknown")
