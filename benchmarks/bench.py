"""A run of the benchmark: every server in every case, interleaved, and the raw figures that come out."""

from __future__ import annotations

import re
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import disk, measure, objects, report
from benchmarks.cases import SERVERS, Case, runs
from benchmarks.client import Burst, Job, burst, storescu
from benchmarks.servers import Pki, Server, ServerError
from benchmarks.upper import ProtocolError

_WARM_UP = 4
_SETTLE_SECONDS = 120.0


@dataclass
class Sample:
    """One run of one server in one case. Times are in seconds; ``admitted_after`` counts from the burst's end."""

    disk: str
    round: int
    case: str
    server: str
    seconds: float = 0.0
    objects: int = 0
    bytes: int = 0
    server_cpu: float = 0.0
    client_cpu: float = 0.0
    pss_peak: int = 0
    process_peak: int = 0
    processes: int = 0
    latency_median: float = 0.0
    latency_p99: float = 0.0
    latency_max: float = 0.0
    admitted_after: float | None = None
    tls: str = ""
    create_us: float = 0.0
    failures: list[str] = field(default_factory=list)


class Bench:
    """What is compared, where, and what came out. ``client``: "encoded" or "dcmtk"."""

    def __init__(self, client: str) -> None:
        self._client = client
        self._samples: list[Sample] = []
        self._environment: dict[str, str] = measure.machine()
        with measure.Accounting() as accounting:
            self._environment["cpu time from"] = accounting.means
        self._disks: dict[str, dict[str, str]] = {}
        self._not_measured: dict[str, str] = {}
        self._number = 0

    def leave_out(self, name: str, reason: str) -> None:
        """Note that a server, or the image with a journal, is not measured, and why."""
        self._not_measured[name] = without_paths(reason)

    def run_all(self, label: str, folder: Path, names: list[str], wanted: list[Case], rounds: int) -> None:
        """Run every server in every case, interleaved: their order turns from round to round."""
        facts = self._disks[label] = measure.file_system(folder)
        pki = Pki(folder / "pki")
        try:
            for number in range(rounds):
                turned = names[number % len(names) :] + names[: number % len(names)]
                for case in wanted:
                    files = self._files(folder, case) if self._client == "dcmtk" else []
                    for name in turned:
                        if runs(SERVERS[name], case):
                            self._one(label, folder, pki, number, case, SERVERS[name], files)
        finally:
            if costs := sorted(s.create_us for s in self._samples if s.disk == label and s.create_us):
                facts["creating a file"] = f"{statistics.median(costs):.0f} ({costs[0]:.0f}-{costs[-1]:.0f})"

    def describe(self, label: str, name: str, value: str) -> None:
        """Add a fact about a disk."""
        self._disks[label][name] = value

    def raw(self, *, rounds: int, quick: bool, interrupted: bool, table: dict[str, Case]) -> dict[str, Any]:
        """Return everything that a report is made from, as plain values."""
        return {
            "environment": self._environment,
            "disks": self._disks,
            "rounds": rounds,
            "client": self._client,
            "quick": quick,
            "interrupted": interrupted,
            "not_measured": self._not_measured,
            "cases": {name: case.title for name, case in table.items()},
            "servers": {name: {"title": kind.title, "without": kind.without} for name, kind in SERVERS.items()},
            "samples": [asdict(sample) for sample in self._samples],
        }

    def _files(self, folder: Path, case: Case) -> list[str]:
        """Write the files that storescu sends: new in each round, the same for every server in it."""
        template = case.template()
        if template is None:
            return []
        self._number += 1
        made = [folder / f"f{self._number}-{i}" for i in range(case.associations)]
        for one in made:
            objects.write_files(one, template, case.count)
        return [str(one) for one in made]

    def _one(
        self, label: str, folder: Path, pki: Pki, number: int, case: Case, kind: type[Server], files: list[str]
    ) -> None:
        self._number += 1
        sample = Sample(label, number, case.name, kind.name)
        home = folder / str(self._number)
        home.mkdir()
        # As the work folder: a server's own user passes through.
        home.chmod(0o711)
        sample.create_us = measure.create_cost(home)
        disk.quiet(0.3)
        with measure.Accounting() as accounting:
            server = kind(home / "s", pki, accounting, case.associations + case.idle)
            try:
                _measure(server, accounting, case, sample, files)
            except (ServerError, ProtocolError, OSError, subprocess.SubprocessError) as error:
                sample.failures.append(f"{type(error).__name__}: {error}")
            finally:
                server.stop()
        sample.failures = [without_paths(failure) for failure in sample.failures]
        # Only now: a run that Ctrl-C cut off is no sample.
        self._samples.append(sample)
        report.progress(asdict(sample))


def _measure(server: Server, accounting: measure.Accounting, case: Case, sample: Sample, files: list[str]) -> None:
    target = server.start()
    warm = burst(Job(target, objects.small(), _WARM_UP), 1)
    if warm.failures:
        raise ServerError(f"no object goes in: {warm.failures[0]}")
    server.settle(_SETTLE_SECONDS)
    template = case.template()
    count = max(1, round(case.count * server.share))
    cpu = accounting.cpu()
    memory = measure.Memory(accounting)
    memory.start()
    try:
        if files and template is not None:
            done = storescu(target, files, case.timeout)
            count = case.count
            sent = 0 if done.failures else count * case.associations
            done = done._replace(objects=sent, bytes=sent * template.size)
        else:
            done = burst(Job(target, template, count, case.idle, case.timeout), case.associations)
        settled = server.settle(_SETTLE_SECONDS)
    finally:
        memory.stop()
    sample.server_cpu = accounting.cpu() - cpu
    sample.pss_peak, sample.process_peak, sample.processes = memory.pss, memory.process, memory.processes
    if settled is not None and template is not None:
        sample.admitted_after = max(0.0, settled - done.ended)
    _take(sample, done)
    stored = server.stored() if template is not None else None
    if stored is not None and stored != count * case.associations + _WARM_UP:
        sample.failures.append(f"{stored - _WARM_UP} of {count * case.associations} objects were kept")


def _take(sample: Sample, done: Burst) -> None:
    sample.seconds, sample.objects, sample.bytes = done.seconds, done.objects, done.bytes
    sample.client_cpu, sample.tls = done.client_cpu, done.tls
    sample.failures += done.failures
    if done.latencies:
        ordered = sorted(done.latencies)
        sample.latency_median = ordered[len(ordered) // 2]
        sample.latency_p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        sample.latency_max = ordered[-1]


def without_paths(text: str) -> str:
    """Return text on one line, of each path its last part: a report names no folders of a machine."""
    return " ".join(re.sub(r"(?<![\w./])/(?:[\w.+@-]+/)+", "", text).split())
