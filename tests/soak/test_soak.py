"""Good and bad traffic for a time, over a server with gate and vault: nothing acknowledged is lost, nothing grows.

15 s of traffic here; ``make soak SECONDS=3600`` runs it long and tells how far it is. STRONGROOM_SOAK_SEED repeats a
mix: what each sender sends in which order, not how senders interleave.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import scu
from conftest import Server
from interop.running import serving
from soak import traffic
from soak.traffic import Line, Target

SECONDS = int(os.environ.get("STRONGROOM_SOAK_SECONDS", "15"))
SEED = int(os.environ.get("STRONGROOM_SOAK_SEED", "2026"))
TITLES = ("CT1", "MR2")
# Bytes of pixels, and how often of a hundred: a few are longer than what a worker collects before it writes.
SIZES = {200: 20, 2_000: 20, 16_000: 40, 120_000: 15, 500_000: 4, 3_000_000: 1}
OBJECTS_PER_STUDY = 200
# Between two samples, and between two objects of a sender: a disk is not to be filled by an hour of it.
SAMPLE_SECONDS = max(0.25, min(5.0, SECONDS / 100))
PACE_SECONDS = 0.02 if SECONDS <= 60 else 0.2
TELL_SECONDS = 30.0
LIMITS = {"request_seconds": 2, "idle_seconds": 3, "message_seconds": 5}

# How far the median of the last quarter may lie above the second quarter's. Connections come and go while it is taken:
# at most 10 at a time, each with a thread and a few descriptors. What stays taken for ever shows at the end, exactly.
MORE_THREADS = 6
MORE_DESCRIPTORS = 12
MORE_MEMORY = 0.10
# A short run is over before a worker has had as many associations at a time as it ever gets: each has a buffer.
MORE_BYTES = (8 if SECONDS >= 300 else 32) << 20


class Sample(NamedTuple):
    """A process at a moment: bytes in memory, descriptors, threads."""

    memory: int
    descriptors: int
    threads: int


def sample(pid: int) -> Sample:
    """Return what a process takes.

    Raises:
        OSError: It is no more.
    """
    found = dict(re.findall(r"(?m)^(VmRSS|Threads):\s+(\d+)", Path(f"/proc/{pid}/status").read_text()))
    return Sample(int(found["VmRSS"]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(found["Threads"]))


def processes(server: Server) -> dict[str, int]:
    """Return the processes by name."""
    found = {verb: server.pids(verb) for verb in ("serve", "gate", "gate-worker", "vault")}
    return {f"{verb} {number}": pid for verb, pids in found.items() for number, pid in enumerate(sorted(pids))}


class Senders:
    """Everybody who sends, good and bad, and what the good ones were told is stored."""

    def __init__(self, server: Server) -> None:
        self._targets = [
            Target(server.port, scu.tls(server.home / "issued" / title, title), title, f"127.0.0.{number}")
            for number, title in enumerate(TITLES, 2)
        ]
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.acknowledged: dict[bytes, dict[str, bytes]] = {}
        self.bytes = 0
        self.bad: dict[str, int] = {}
        self.echoes = 0
        self.errors: list[str] = []

    @property
    def stored(self) -> int:
        """How many objects were acknowledged."""
        return sum(len(study) for study in self.acknowledged.values())

    def start(self) -> None:
        """Let everybody send."""
        jobs: list[Callable[[Target, random.Random], None]] = [self._sitting, self._each, self._echo]
        for target in self._targets:
            for job in jobs:
                self._run(job, target)
            for kinds in (traffic.KINDS, traffic.KINDS | traffic.LARGE_KINDS, traffic.SLOW_KINDS):
                self._run(self._bad_sender(kinds), target._replace(source="127.0.0.9"))

    def stop(self) -> None:
        """Let everybody finish what they are sending."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), thread.name

    def _run(self, job: Callable[[Target, random.Random], None], target: Target) -> None:
        name = f"{len(self._threads)} {target.title}"
        chance = random.Random(f"{SEED} {name}")

        def run() -> None:
            try:
                while not self._over.is_set():
                    job(target, chance)
            except Exception as error:
                # A good sender is never refused, whatever the bad ones do.
                self.errors.append(f"{name}: {error!r}")
                raise

        self._threads.append(threading.Thread(target=run, name=name))
        self._threads[-1].start()

    def _sitting(self, target: Target, chance: random.Random) -> None:
        """Store a study on one association."""
        study = b"2.25.%d" % chance.getrandbits(100)
        with Line(target) as line:
            line.associate()
            for _ in range(chance.randrange(1, OBJECTS_PER_STUDY)):
                self._store(line, chance, study)
                if self._over.wait(PACE_SECONDS):
                    break
            line.release()

    def _each(self, target: Target, chance: random.Random) -> None:
        """Store a study, each image on an association of its own."""
        study = b"2.25.%d" % chance.getrandbits(100)
        for _ in range(chance.randrange(1, 40)):
            with Line(target) as line:
                line.associate()
                self._store(line, chance, study)
                line.release()
            if self._over.wait(PACE_SECONDS):
                break

    def _store(self, line: Line, chance: random.Random, study: bytes) -> None:
        [size] = chance.choices(list(SIZES), list(SIZES.values()))
        item = traffic.image(chance, size, study)
        status = line.store(item)
        assert status == 0, f"{status:04X}"
        digest = hashlib.sha256(item.data).digest()
        with self._lock:
            self.acknowledged.setdefault(study, {})[item.instance.decode()] = digest
            self.bytes += len(item.data)

    def _echo(self, target: Target, _: random.Random) -> None:
        with Line(target) as line:
            assert line.associate().echo() == 0
            line.release()
        self.echoes += 1
        self._over.wait(10 * PACE_SECONDS)

    def _bad_sender(self, kinds: dict[str, traffic.Kind]) -> Callable[[Target, random.Random], None]:
        names = list(kinds)

        def send(target: Target, chance: random.Random) -> None:
            name = chance.choice(names)
            with contextlib.suppress(OSError, traffic.CutError):
                kinds[name](target, chance)
            with self._lock:
                self.bad[name] = self.bad.get(name, 0) + 1
            self._over.wait(PACE_SECONDS)

        return send


def grew(samples: dict[str, list[Sample]]) -> list[str]:
    """Return what lies higher in the last quarter than in the second, by more than the tolerance."""
    found = []
    for name, taken in samples.items():
        quarter = len(taken) // 4
        for what, index, allowed in (
            ("bytes", 0, lambda early: MORE_MEMORY * early + MORE_BYTES),
            ("descriptors", 1, lambda _: MORE_DESCRIPTORS),
            ("threads", 2, lambda _: MORE_THREADS),
        ):
            early = statistics.median(one[index] for one in taken[quarter : 2 * quarter])
            late = statistics.median(one[index] for one in taken[-quarter:])
            if late > early + allowed(early):
                found.append(f"{name}: {early:.0f} {what} grew to {late:.0f}")
    return found


def test_what_grows_is_found_and_what_only_varies_is_not() -> None:
    def run(step: int, threads: int) -> dict[str, list[Sample]]:
        return {"x": [Sample((60 << 20) + n * step, 20 + n % 5, 4 + (n >= 50) * threads + n % 3) for n in range(100)]}

    assert grew(run(0, 0)) == []
    assert grew(run(1 << 14, MORE_THREADS)) == []
    assert "bytes grew" in grew(run(1 << 20, 0))[0]
    assert "threads grew" in grew(run(0, MORE_THREADS + 1))[0]


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_good_and_bad_traffic_together_lose_nothing_and_leave_nothing_behind(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = {"workers": 2, "pack_idle_seconds": 1, "pack_bytes": 16 << 20, "spare_bytes": 1 << 20}
    with serving(tmp_path_factory, *TITLES, **settings, **LIMITS) as server:
        running = processes(server)
        samples: dict[str, list[Sample]] = {name: [] for name in running}
        senders = Senders(server)
        senders.start()
        try:
            _watch(running, samples, senders)
        finally:
            senders.stop()
        sent = f"{senders.stored} objects ({senders.bytes >> 20} MiB), {senders.echoes} echoes"
        _tell(f"over: {sent}, {sum(senders.bad.values())} bad connections")
        assert senders.errors == []
        assert processes(server) == running
        assert senders.echoes
        assert len(senders.bad) > min(60, SECONDS)
        assert [text for text in server.log if not re.match(r"\S+Z (info|warning) ", text)] == []
        server.wait_admitted(60 + SECONDS)
        _assert_nothing_taken(server, running)
        _assert_held(server, senders)
        assert server.ok("status", "--json").json()["quarantine"] == 0
        assert grew(samples) == []


def _watch(running: dict[str, int], samples: dict[str, list[Sample]], senders: Senders) -> None:
    began = told = time.monotonic()
    while (now := time.monotonic()) - began < SECONDS:
        for name, pid in running.items():
            samples[name].append(sample(pid))
        if now - told >= TELL_SECONDS:
            told = now
            memory = ", ".join(f"{name} {taken[-1].memory >> 20} MiB" for name, taken in samples.items())
            bad = sum(senders.bad.values())
            _tell(f"{now - began:.0f} of {SECONDS} s: {senders.stored} objects, {bad} bad connections; {memory}")
        assert senders.errors == []
        # There is nothing to wait for but the time itself.
        time.sleep(SAMPLE_SECONDS)


def _tell(text: str) -> None:
    print(f"soak: {text}", flush=True)


def _assert_nothing_taken(server: Server, running: dict[str, int]) -> None:
    """Wait until no worker has a connection any more, nor a pack open."""
    deadline = time.monotonic() + 30

    def taken() -> list[str]:
        workers = [pid for name, pid in running.items() if name.startswith("gate-worker")]
        links = [link for pid in workers for link in map(_target, Path(f"/proc/{pid}/fd").iterdir())]
        # What is prepared for packs to come is open, too, under a temporary name.
        return [link for link in links if re.fullmatch(rf"{re.escape(str(server.incoming))}/(?!.*\.new)\S+", link)]

    while left := taken() + _connections(server.port):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    # The main thread, and those that write long records.
    assert all(sample(pid).threads <= 5 for name, pid in running.items() if name.startswith("gate"))


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def _connections(port: int) -> list[str]:
    """Return the server's ends of connections that are not closed; those that only wait out TCP's time are."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return [f[2] for f in lines if int(f[1].split(":")[1], 16) == port and f[3] in {"01", "08"}]


def _assert_held(server: Server, senders: Senders) -> None:
    """Check that what was acknowledged is held bit for bit; where studies come one by one, nothing else is."""
    studies = list(senders.acknowledged)
    # A copy of everything only where it is small.
    parts = [studies] if senders.bytes < 1 << 30 else [[study] for study in studies]
    for number, part in enumerate(parts):
        out = server.home / f"out-{number}"
        server.ok("export", *(["--all"] if len(part) > 1 else ["--study", part[0].decode()]), "--to", out)
        held = {path.stem: hashlib.sha256(scu.raw_data_set(path)).digest() for path in out.rglob("*.dcm")}
        for study in part:
            sent = senders.acknowledged[study]
            assert {name: held.get(name) for name in sent} == sent
        if len(part) == 1:
            assert held.keys() == senders.acknowledged[part[0]].keys()
        shutil.rmtree(out)
