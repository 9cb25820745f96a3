"""The report: tables on the terminal, or as Markdown between two markers of a page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import targets
from benchmarks.result import Result

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
_MIB = 1 << 20
_DISKS = {"disk": "this disk", "journal": "ext4 image with a journal, loop-mounted"}
_MEMORY_CASES = ("large", "idle")
_COLUMNS = (
    "server", "objects/s", "MB/s", "CPU s/GB", "CPU ms/obj.", "MiB all", "MiB largest", "median ms", "p99 ms",
    "x DCMTK (rounds)", "x Orthanc", "admitted s", "client CPU",
)  # fmt: skip
_MEMORY_COLUMNS = ("case", "server", "all processes, MiB", "largest process, MiB", "processes")


# The columns of words; figures stand at the right.
_WORDS = {"case", "server", "figure", "divided by", ""}


class Section(NamedTuple):
    """A table with its title."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def sections(result: Result) -> list[Section]:
    """Return all tables: each case, then memory, then the targets."""
    found = [
        Section(
            f"{result.raw['cases'][case]} - {_DISKS[disk]}",
            _COLUMNS,
            [_cells(result, disk, case, server) for server in result.servers(disk, case)],
        )
        for disk, case in result.groups()
    ]
    found.append(Section("Peak memory", _MEMORY_COLUMNS, _memory(result)))
    found.append(Section("Strongroom and its targets: ratios of medians", targets.COLUMNS, targets.judged(result)))
    return [section for section in found if section.rows]


def _cells(result: Result, disk: str, case: str, server: str) -> list[str]:
    row = result.rows[disk, case, server]
    peer = result.rows.get((disk, case, "dcmtk"))
    spread = [rate / peer.rates[n] for n, rate in row.rates.items() if n in peer.rates] if peer else []
    ratio = result.value(disk, case, "rate", server, "dcmtk")
    against = _ratio(ratio)
    if ratio and len(spread) > 1 and server != "dcmtk":
        against += f" ({min(spread):.2f}-{max(spread):.2f})"
    orthanc = result.value(disk, case, "rate", server, "orthanc")
    return [
        result.title(server),
        f"{row.rate:,.0f}" if row.rate >= 10 else f"{row.rate:.2f}",
        f"{row.mb:,.0f}" if row.mb else "",
        f"{row.cpu_gb:.2f}" if row.cpu_gb else "",
        f"{row.cpu_object:.2f}",
        _mib(row.pss),
        _mib(row.process),
        f"{row.median:.2f}" if row.median else "",
        f"{row.p99:.2f}" if row.p99 else "",
        against,
        _ratio(orthanc),
        "" if row.admitted is None else f"{row.admitted:.1f}",
        f"{row.client:.0%}" if row.client else "",
    ]


def _memory(result: Result) -> list[list[str]]:
    """Return what each server took at most where that is of interest: with one huge object, with many associations."""
    rows = []
    for disk, case in result.groups():
        for server in result.servers(disk, case) if case in _MEMORY_CASES and disk == "disk" else []:
            row = result.rows[disk, case, server]
            title = result.raw["cases"][case].partition(", for")[0]
            rows.append([title, result.title(server), _mib(row.pss), _mib(row.process), str(row.processes)])
    return rows


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value and value >= 0.1 else f"{value:.3f}" if value else ""


def _mib(count: float) -> str:
    return f"{count / _MIB:,.0f}" if count else ""


def facts(result: Result) -> list[str]:
    """Return lines about the machine and the disks."""
    raw = result.raw
    found = [f"{name}: {value}" for name, value in raw["environment"].items()]
    for label, about in raw["disks"].items():
        costs = ", ".join(f"{k} {v}" + ("" if k in {"type", "loop device"} else " us") for k, v in about.items())
        found.append(f"{_DISKS[label]}: {costs}")
    suites = sorted({s["tls"] for s in raw["samples"] if s["tls"]})
    for suite in suites:
        users = dict.fromkeys(s["server"] for s in raw["samples"] if s["tls"] == suite)
        found.append(f"TLS: {suite}: {', '.join(users)}")
    client = {
        "encoded": "pre-encoded, one process an association",
        "dcmtk": "storescu, its start-up and reading included",
    }
    found.append(f"client: {client[raw['client']]}; rounds: {raw['rounds']}, servers taking turns; medians are shown")
    if raw["quick"]:
        found.append("QUICK RUN: an eighth of the objects, 60 MB instead of 500; no figures to quote")
    if raw["interrupted"]:
        found.append("INTERRUPTED: not everything was measured as often as it should have been")
    return found


def progress(sample: dict[str, Any]) -> None:
    """Say on standard error what one run gave."""
    rate = sample["objects"] / sample["seconds"] if sample["seconds"] else 0.0
    cpu = sample["server_cpu"] / max(sample["objects"], 1) * 1e3
    note = f"  FAILED: {sample['failures'][0]}" if sample["failures"] else ""
    where = f"{sample['disk']:8}round {sample['round'] + 1}  {sample['case']:8} {sample['server']:14}"
    print(f"{where}{rate:9.1f}/s  CPU {cpu:8.2f} ms/object{note}", file=sys.stderr)


def show(result: Result, width: int) -> None:
    """Print the tables."""
    console = Console(width=max(width, 172), highlight=False, markup=False)
    for section in sections(result):
        table = Table(title=f"\n{section.title}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in section.columns:
            table.add_column(column, justify="left" if column in _WORDS else "right")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
    for line in (*facts(result), *result.missing(), *result.failures()):
        console.print(line, soft_wrap=True)


def write_markdown(result: Result, file: Path, plot: Path | None) -> None:
    """Write the report between the markers of a page; what stands outside them stays.

    A page without markers gets them at its end; a page that does not exist is made.
    """
    text = _markdown(result, os.path.relpath(plot, file.parent) if plot else "")
    old = file.read_text("utf-8") if file.exists() else "# Performance\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = old.rstrip("\n") + "\n\n", "\n"
    file.write_text(before + text + after, "utf-8")


def _markdown(result: Result, plot: str) -> str:
    lines = [BEGIN, "", *[f"- {line}" for line in (*facts(result), *result.missing(), *result.failures())], ""]
    if plot:
        lines += [f"![objects per second, tuned DCMTK = 1]({plot})", ""]
    for section in sections(result):
        lines += [f"#### {section.title}", "", *_table(section)]
    used = {server for _, _, server in result.rows}
    lines += ["#### What each does not do", ""]
    lines += [
        f"- {about['title']}: {about['without']}" for name, about in result.raw["servers"].items() if name in used
    ]
    return "\n".join([*lines, "", END])


def _table(section: Section) -> list[str]:
    rule = ["---" if column in _WORDS else "---:" for column in section.columns]
    return [_line(section.columns), _line(rule), *[_line(row) for row in section.rows], ""]


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
