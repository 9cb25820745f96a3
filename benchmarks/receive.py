"""How fast servers receive: the same objects from the same client, interleaved in one run. See docs/performance.md.

Usage: python -m benchmarks.receive [--rounds N] [--quick] [--journal] [--servers a,b] [--cases ...]
                                    [--client dcmtk|encoded] [--json FILE] [--markdown FILE --svg FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import disk, measure, objects, plot, report
from benchmarks.cases import Case, cases, planned, runs
from benchmarks.client import Burst, Job, burst, storescu
from benchmarks.disk import DiskError
from benchmarks.servers import SERVERS, Pki, Server, ServerError, available
from benchmarks.upper import ProtocolError

_PEERS = ["dcmtk", "dcmtk-shipped", "orthanc", "pynetdicom", "strongroom"]
_JOURNAL_SERVERS = ["dcmtk", "orthanc", "strongroom"]
_JOURNAL_CASES = ["ct1", "ct4", "small1", "small4"]
_WARM_UP = 4
_SETTLE_SECONDS = 120.0
_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Sample:
    """One run of one server in one case."""

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
    latency_median: float = 0.0
    latency_p99: float = 0.0
    latency_max: float = 0.0
    admitted_after: float | None = None
    tls: str = ""
    create_us: float = 0.0
    failures: list[str] = field(default_factory=list)


class Bench:
    """A run: what is compared, where, and what came out."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.samples: list[Sample] = []
        self.environment: dict[str, str] = measure.machine()
        with measure.Accounting() as accounting:
            self.environment["cpu time from"] = accounting.means
        self.disks: dict[str, dict[str, str]] = {}
        self._number = 0

    def run_all(self, label: str, folder: Path, names: list[str], wanted: list[Case], rounds: int) -> None:
        """Run every server in every case, interleaved: their order turns from round to round."""
        self.disks[label] = measure.file_system(folder)
        pki = Pki(folder / "pki")
        for number in range(rounds):
            turned = names[number % len(names) :] + names[: number % len(names)]
            for case in wanted:
                files = self._files(folder, case) if self.arguments.client == "dcmtk" else []
                for name in turned:
                    if runs(SERVERS[name], case):
                        self._one(label, folder, pki, number, case, SERVERS[name], files)
        costs = sorted(s.create_us for s in self.samples if s.disk == label)
        if costs:
            self.disks[label]["creating a file"] = f"{statistics.median(costs):.0f} ({costs[0]:.0f}-{costs[-1]:.0f})"

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
        self.samples.append(sample)
        home = folder / str(self._number)
        home.mkdir()
        sample.create_us = measure.create_cost(home)
        disk.quiet(0.3)
        with measure.Accounting() as accounting:
            server = kind(home / "s", pki, accounting, case.associations + case.idle)
            try:
                self._measure(server, accounting, case, sample, files)
            except (ServerError, ProtocolError, OSError, subprocess.SubprocessError) as error:
                sample.failures.append(
                    f"{type(error).__name__}: {error}".replace(str(server.folder), "FOLDER").replace(str(_ROOT), ".")
                )
            finally:
                server.stop()
        report.progress(asdict(sample))

    def _measure(
        self, server: Server, accounting: measure.Accounting, case: Case, sample: Sample, files: list[str]
    ) -> None:
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
            sample.admitted_after = server.settle(_SETTLE_SECONDS)
        finally:
            memory.stop()
        sample.server_cpu = accounting.cpu() - cpu
        sample.pss_peak, sample.process_peak = memory.pss, memory.process
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.receive", description="How fast servers receive over TLS.")
    known = list(cases(False))
    parser.add_argument("--rounds", type=int, help="rounds; medians are shown (3, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="an eighth of everything, to see that it works")
    parser.add_argument("--servers", default="", help=f"of {','.join(SERVERS)}; all but sink")
    parser.add_argument("--cases", default="", help=f"of {','.join(known)}; all")
    parser.add_argument("--client", choices=["encoded", "dcmtk"], default="encoded", help="dcmtk: storescu")
    parser.add_argument("--journal", action="store_true", help="once more on an ext4 image with a journal (root)")
    parser.add_argument("--journal-only", action="store_true", help="only there")
    parser.add_argument("--json", type=Path, help="write raw figures")
    parser.add_argument("--markdown", type=Path, help="write tables into this file, between its markers if it has them")
    parser.add_argument("--svg", type=Path, help="write a plot")
    parser.add_argument("--work", type=Path, default=_ROOT / "var" / "bench", help="folder to work in, on a real disk")
    parser.add_argument("--disk-limit", type=int, default=30, metavar="GB", help="write no more than this (30)")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    for option, all_names in (("servers", list(SERVERS)), ("cases", known)):
        chosen = [name for name in getattr(arguments, option).split(",") if name]
        if unknown := set(chosen) - set(all_names):
            parser.error(f"--{option}: unknown: {', '.join(sorted(unknown))}")
        setattr(arguments, option, chosen)
    if not 1 <= arguments.rounds <= 50:
        parser.error("--rounds: 1 to 50")
    return arguments


def main() -> int:
    """Run and report; return an exit status."""
    arguments = _arguments()
    # Stopped like with Ctrl-C: servers are ended, files deleted, and what was measured is shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bench = Bench(arguments)
    names = arguments.servers or _PEERS
    for name in [n for n in names if not available(n)]:
        print(f"NOT MEASURED: {name} is not installed", file=sys.stderr)
    names = [n for n in names if available(n)]
    table = cases(arguments.quick)
    chosen = arguments.cases or list(table)
    if arguments.client == "dcmtk":
        chosen = [n for n in chosen if n in {"ct1", "ct4"}]
    wanted = [table[n] for n in chosen]
    on_journal = [n for n in names if n in _JOURNAL_SERVERS], [c for c in wanted if c.name in _JOURNAL_CASES]
    journal = arguments.journal or arguments.journal_only
    files = arguments.client == "dcmtk"
    main_bytes = 0 if arguments.journal_only else planned(names, wanted, arguments.rounds, files=files)
    image = int(planned(*on_journal, arguments.rounds, files=files) * 1.2) + (1 << 30) if journal else 0
    try:
        disk.check_room(arguments.work, main_bytes + image, arguments.disk_limit * disk.GB)
    except DiskError as error:
        print(f"benchmarks.receive: error: {error}", file=sys.stderr)
        return 2
    if not arguments.quick:
        # An earlier run may just have deleted its files.
        time.sleep(10)
    with disk.work_folder(arguments.work) as folder, contextlib.suppress(KeyboardInterrupt):
        if not arguments.journal_only:
            bench.run_all("disk", folder, names, wanted, arguments.rounds)
        if journal:
            _on_journal(bench, folder, image, *on_journal, arguments.rounds)
    with contextlib.suppress(OSError):
        arguments.work.rmdir()
    return _report(bench, arguments, table)


def _on_journal(bench: Bench, folder: Path, size: int, names: list[str], wanted: list[Case], rounds: int) -> None:
    try:
        with disk.journaled(folder, size) as (mount, how):
            disk.spread(mount)
            bench.run_all("journal", mount, names, wanted, rounds)
            bench.disks["journal"]["loop device"] = how
    except DiskError as error:
        print(f"NOT MEASURED: ext4 with a journal: {error}", file=sys.stderr)
        bench.environment["journal"] = f"not measured: {error}"


def _report(bench: Bench, arguments: argparse.Namespace, table: dict[str, Case]) -> int:
    raw = {
        "environment": bench.environment,
        "disks": bench.disks,
        "rounds": arguments.rounds,
        "client": arguments.client,
        "quick": arguments.quick,
        "cases": {name: case.title for name, case in table.items()},
        "servers": {name: {"title": kind.title, "without": kind.without} for name, kind in SERVERS.items()},
        "samples": [asdict(sample) for sample in bench.samples],
    }
    result = report.Result(raw)
    width = shutil.get_terminal_size((160, 40)).columns
    report.show(result, width)
    if arguments.json:
        arguments.json.write_text(json.dumps(raw, indent=1) + "\n")
    if arguments.svg:
        arguments.svg.write_text(plot.svg(result))
    if arguments.markdown:
        report.write_markdown(result, arguments.markdown, arguments.svg)
    return 1 if not bench.samples or any(sample.failures for sample in bench.samples) else 0


if __name__ == "__main__":
    sys.exit(main())
