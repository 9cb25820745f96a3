"""kill -9 between any two steps: strace counts the system calls of a process and kills it before the chosen one.

Each round uses real processes and the real disk; what follows is an ordinary start. A seeded sample of the many points
runs here, all of them in 'make crash' (STRONGROOM_CRASH=all).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import scu
from conftest import Server, changed, find_command, send
from pydicom.data import get_testdata_file
from scu import raw_data_set

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
ALL = os.environ.get("STRONGROOM_CRASH") == "all"

pytestmark = [
    pytest.mark.needs("strace"),
    pytest.mark.usefixtures("collected"),
    # pynetdicom leaves sockets to the garbage collector when the server dies under an association.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def traced(server: Server, verb: str, calls: str, when: int, output: Path) -> subprocess.Popen[str]:
    """Start a process that dies before the ``when``-th of some system calls; never for 0."""
    command = [str(find_command("strace")), "-f", "-qq", "-o", str(output), "-e", f"trace={calls}"]
    if when:
        command += ["-e", f"inject={calls}:signal=SIGKILL:when={when}"]
    command += [sys.executable, "-m", "storescp", "--config", str(server.config), verb]
    return server.start_command(command, verb)


def survivors(server: Server) -> dict[str, bytes]:
    """Start anew by asking; return what is held, by UID."""
    out = server.home / f"out-{random.random()}"
    done = server.run("export", "--all", "--to", out)
    assert done.status in {0, 5}, done.err
    verified = server.run("verify")
    assert verified.status == 0, verified.out
    return {path.stem: raw_data_set(path) for path in out.rglob("*.dcm")}


def clean(server: Server) -> None:
    """Assert that nothing is stuck or lies about."""
    assert list(server.incoming.iterdir()) == []
    assert list((server.store / "admitting").iterdir()) == []
    assert list(server.store.rglob("*.new")) == []


def test_a_gate_killed_before_any_step_loses_nothing_acknowledged(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = make_server()
    server.init()
    server.set("gate", workers=1, spare_bytes=0)
    folder = server.add_peer("CT1")
    # A new pack, an append to it, another new pack: every step that a gate takes.
    files = [CT, changed(CT, tmp_path, SOPInstanceUID="1.2.3.4"), MR]
    context = scu.tls(folder)
    # strace counts each call apart: two packs made, one appended to.
    counts = {"pwrite64": 5, "fdatasync": 5, "fsync": 2, "rename": 2, "flock": 4, "fallocate": 2}
    points = [(call, when) for call, count in counts.items() for when in range(1, count + 1)]
    if not ALL:
        points = random.Random("gate").sample(points, 8)
    killed = 0
    for call, when in points:
        acknowledged = []
        items = [scu.read(file) for file in files]
        # One association, so one thread of the worker: strace counts the calls of each thread apart.
        with traced_gate(server, call, when):
            lost = contextlib.suppress(AssertionError, OSError, IndexError, ValueError)
            contexts = [items[0].context, items[2].context]
            with lost, scu.associated(server.port, context, contexts) as association:
                for file, item in zip(files, items, strict=True):
                    assert scu.store(association, item).Status == 0
                    acknowledged.append(file)
            server.wait_log("the gate's worker 1 ended with status -9")
            killed += 1
        held = survivors(server)
        for file in acknowledged:
            assert held[scu.read(file).sop_instance] == raw_data_set(file), (call, when)
        assert set(held.values()) <= {raw_data_set(file) for file in files}
        for path in server.incoming.iterdir():
            # What was never finished making is removed after a minute, which is not waited for here.
            assert path.name.endswith(".new"), (call, when)
            path.unlink()
    assert killed == len(points)


class traced_gate:  # noqa: N801
    """A gate whose worker is killed at a point; ends it in any case."""

    def __init__(self, server: Server, call: str, when: int) -> None:
        self._server = server
        traced(server, "gate", call, when, server.home / "trace")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._server.stop(signal.SIGKILL)
        self._server.kill_all()


SCENARIOS = {
    "a deposit": (),
    "with a conflict": ("conflict",),
    "with a copy that is held": ("again",),
    "by copy": ("copies",),
    "by copy with a conflict": ("copies", "conflict"),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_vault_killed_before_any_step_of_admission_resumes(
    make_server: Callable[[], Server], tmp_path: Path, scenario: str
) -> None:
    flags = SCENARIOS[scenario]
    server = make_server()
    server.init()
    server.add_peer("CT1")
    if "copies" in flags:
        other = Path("/dev/shm") / server.home.name
        shutil.rmtree(other, ignore_errors=True)
        shutil.move(server.home / "spool", other)
        (server.home / "spool").symlink_to(other)
    expected = {scu.read(f).sop_instance: raw_data_set(f) for f in (CT, MR)}
    if "conflict" in flags or "again" in flags:
        server.start("serve")
        assert send(server, [CT]) == [0]
        server.stop()
        assert len(survivors(server)) == 1
    server.start("gate")
    second = changed(CT, tmp_path, SliceLocation="77.5") if "conflict" in flags else CT
    third = changed(CT, tmp_path, SOPInstanceUID="1.2.3.4")
    assert send(server, [second, third, MR]) == [0, 0, 0]
    expected["1.2.3.4"] = raw_data_set(third)
    server.stop()
    quarantined = 1 if "conflict" in flags else 0
    prepared = server.home / "prepared"
    spool = (server.home / "spool").resolve()
    shutil.copytree(server.store, prepared / "store")
    shutil.copytree(spool, prepared / "spool")
    calls = "pwrite64,fsync,fdatasync,rename,unlink,ftruncate,fallocate,ioctl"
    try:
        points = _points(server, calls)
        if not ALL:
            points = random.Random(scenario).sample(points, 3)
        for call, when in points:
            _restore(server, prepared, spool)
            _run_vault(server, call, when)
            assert survivors(server) == expected, (scenario, call, when)
            clean(server)
            assert server.status()["quarantine"] == quarantined, (scenario, call, when)
    finally:
        if spool != server.home / "spool":
            shutil.rmtree(spool)


def _restore(server: Server, prepared: Path, spool: Path) -> None:
    for folder, name in ((server.store, "store"), (spool, "spool")):
        shutil.rmtree(folder)
        shutil.copytree(prepared / name, folder)


def _run_vault(server: Server, calls: str, when: int) -> None:
    process = traced(server, "vault", calls, when, server.home / "trace")
    deadline = time.monotonic() + 60
    while process.poll() is None and any(server.incoming.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.stop(signal.SIGKILL)
    server.kill_all()


def _points(server: Server, calls: str) -> list[tuple[str, int]]:
    """Return the points at which a vault can die until everything is admitted: a call, and which one of it."""
    _run_vault(server, calls, 0)
    lines = re.findall(r"^(\d+) +(\w+)\(", (server.home / "trace").read_text(), re.MULTILINE)
    (main, _), *_ = Counter(pid for pid, _ in lines).most_common(1)
    counts = Counter(call for pid, call in lines if pid == main)
    return [(call, when) for call, count in sorted(counts.items()) for when in range(1, count + 1)]


def test_syncs_come_in_order_and_before_the_acknowledgement(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    output = server.home / "trace"
    calls = "pwrite64,fdatasync,fsync,rename,write,sendto"
    traced(server, "gate", calls, 0, output)
    assert send(server, [CT]) == [0]
    for pid in server.pids("gate"):
        os.kill(pid, signal.SIGTERM)
    server.wait_log("gate: stopped")
    told = re.findall(r"^(\d+) +(\w+)\((?:\d+|\")", output.read_text(), re.MULTILINE)
    # The thread that gives the pack its name: another one fills files for packs to come meanwhile.
    thread = next(pid for pid, call in told if call == "rename")
    steps = [call for pid, call in told if pid == thread]
    steps = steps[steps.index("pwrite64") :]
    # Header, its sync, its name, the folder; record, its sync; only then a byte to the peer.
    first = ["pwrite64", "fdatasync", "rename", "fsync", "pwrite64", "fdatasync"]
    assert steps[: len(first)] == first
    assert steps[len(first)] in {"write", "sendto"}
