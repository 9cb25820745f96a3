"""How fast servers receive: the same objects from the same client, interleaved in one run. See docs/performance.md.

Usage: python -m benchmarks.receive [--rounds N] [--quick] [--journal] [--servers a,b] [--cases ...]
                                    [--client dcmtk|encoded] [--json FILE] [--markdown FILE --svg FILE]
       python -m benchmarks.receive --from FILE [--markdown FILE --svg FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import disk, plot, report, users
from benchmarks.bench import Bench
from benchmarks.cases import SERVERS, Case, available, cases, planned
from benchmarks.disk import DiskError
from benchmarks.result import Result
from benchmarks.servers import ROOT
from benchmarks.users import UsersError

_COMPARED = ["dcmtk", "dcmtk-shipped", "orthanc", "pynetdicom", "strongroom", "strongroom-one", "floor"]
_JOURNAL_SERVERS = ["dcmtk", "orthanc", "strongroom", "strongroom-one"]
_JOURNAL_CASES = ["ct1", "ct4", "small1", "small4"]
# An image's own tables and journal, and the space that Strongroom leaves free.
_IMAGE_SPARE = 3 << 30


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
    parser.add_argument("--from", type=Path, dest="recorded", metavar="FILE", help="measure nothing: show raw figures")
    parser.add_argument("--markdown", type=Path, help="write tables into this page, between its markers")
    parser.add_argument("--svg", type=Path, help="write a plot")
    parser.add_argument("--work", type=Path, default=ROOT / "var" / "bench", help="folder to work in, on a real disk")
    parser.add_argument("--disk-limit", type=int, default=60, metavar="GB", help="write no more than this (60)")
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
    if arguments.recorded:
        return _report(json.loads(arguments.recorded.read_text()), arguments)
    # Stopped like with Ctrl-C: servers are ended, files and users deleted, and what was measured is shown.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    table = cases(arguments.quick)
    chosen = arguments.cases or list(table)
    if arguments.client == "dcmtk":
        chosen = [n for n in chosen if n in {"ct1", "ct4"}]
    bench = Bench(arguments.client)
    interrupted = True
    try:
        _run(bench, arguments, arguments.servers or _COMPARED, [table[n] for n in chosen])
        interrupted = False
    except DiskError as error:
        print(f"benchmarks.receive: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.receive: interrupted", file=sys.stderr)
    raw = bench.raw(rounds=arguments.rounds, quick=arguments.quick, interrupted=interrupted, table=table)
    return _report(raw, arguments)


def _run(bench: Bench, arguments: argparse.Namespace, asked: list[str], wanted: list[Case]) -> None:
    """Measure on the disk, and on an image with a journal if that is asked for.

    Raises:
        DiskError: There is no room.
    """
    names = [name for name in asked if available(name)]
    for name in asked:
        if name not in names:
            _leave_out(bench, name, "not installed")
    on_image = [n for n in names if n in _JOURNAL_SERVERS], [c for c in wanted if c.name in _JOURNAL_CASES]
    journal = arguments.journal or arguments.journal_only
    files = arguments.client == "dcmtk"
    on_disk = 0 if arguments.journal_only else planned(names, wanted, arguments.rounds, files=files)
    image = int(planned(*on_image, arguments.rounds, files=files) * 1.2) + _IMAGE_SPARE
    needed = on_disk + (image if journal and os.geteuid() == 0 else 0)
    disk.check_room(arguments.work, needed, arguments.disk_limit * disk.GB)
    if not arguments.quick:
        # An earlier run may just have deleted its files.
        time.sleep(10)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(disk.work_folder(arguments.work))
        if "strongroom" in names:
            try:
                stack.enter_context(users.throw_away())
                users.check(ROOT, folder)
            except UsersError as error:
                _leave_out(bench, "strongroom", str(error))
                for some in (names, on_image[0]):
                    some[:] = [name for name in some if name != "strongroom"]
        if names and not arguments.journal_only:
            bench.run_all("disk", folder, names, wanted, arguments.rounds)
        if journal and all(on_image):
            _run_on_image(bench, folder, image, *on_image, arguments.rounds)


def _run_on_image(bench: Bench, folder: Path, size: int, names: list[str], wanted: list[Case], rounds: int) -> None:
    try:
        with disk.journaled(folder, size) as (mount, how):
            disk.spread(mount)
            bench.run_all("journal", mount, names, wanted, rounds)
            bench.describe("journal", "loop device", how)
    except DiskError as error:
        _leave_out(bench, "journal", str(error))


def _leave_out(bench: Bench, name: str, reason: str) -> None:
    print(f"NOT MEASURED: {name}: {reason}", file=sys.stderr)
    bench.leave_out(name, reason)


def _report(raw: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(raw, indent=1) + "\n")
    result = Result(raw)
    report.show(result, shutil.get_terminal_size((160, 40)).columns)
    if raw["interrupted"] and not arguments.recorded:
        # Half a run does not replace the figures of a whole one; --from writes it all the same.
        return 130
    if arguments.svg:
        arguments.svg.write_text(plot.svg(result))
    if arguments.markdown:
        report.write_markdown(result, arguments.markdown, arguments.svg)
    return 1 if not raw["samples"] or any(sample["failures"] for sample in raw["samples"]) else 0


if __name__ == "__main__":
    sys.exit(main())
