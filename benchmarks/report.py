"""What came out: medians, ratios, a table on the terminal, Markdown, a plot."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
_MIB = 1 << 20
_DISKS = {"disk": "This disk", "journal": "ext4 image with a journal, loop-mounted"}
_COLUMNS = (
    "server", "objects/s", "MB/s", "CPU s/GB", "CPU ms/obj.", "MiB all", "MiB largest", "median ms", "p99 ms",
    "x DCMTK (rounds)", "x Orthanc", "admitted s", "client CPU",
)  # fmt: skip


class Target(NamedTuple):
    """A figure of Strongroom's divided by another server's, and what it should reach."""

    title: str
    disk: str
    case: str
    metric: str
    against: str
    reach: float
    aim: float | None = None

    def met(self, value: float) -> bool:
        """Tell whether it is reached: rates from below, costs from above."""
        return value >= self.reach if self.metric == "rate" else value <= self.reach


TARGETS = [
    Target("CT, 1 association, objects/s", "disk", "ct1", "rate", "dcmtk", 0.9, 1.2),
    Target("CT, 1 association, objects/s", "disk", "ct1", "rate", "orthanc", 4),
    Target("CT, 4 associations, objects/s", "disk", "ct4", "rate", "dcmtk", 0.9, 1.1),
    Target("CT, 4 associations, objects/s", "disk", "ct4", "rate", "orthanc", 3.5),
    Target("16 KB, 1 association, objects/s", "disk", "small1", "rate", "dcmtk", 1.5, 1.9),
    Target("16 KB, 1 association, objects/s", "disk", "small1", "rate", "orthanc", 5),
    Target("16 KB, 4 associations, objects/s", "disk", "small4", "rate", "dcmtk", 2.5, 3.5),
    Target("16 KB, 4 associations, objects/s", "disk", "small4", "rate", "orthanc", 7),
    Target("500 MB multi-frame, MB/s", "disk", "large", "rate", "dcmtk", 1.2, 1.5),
    Target("500 MB multi-frame, MB/s", "disk", "large", "rate", "orthanc", 9),
    Target("CT, 1 association, CPU per GB", "disk", "ct1", "cpu", "dcmtk", 1.0, 0.8),
    Target("CT, 1 association, CPU per GB", "disk", "ct1", "cpu", "orthanc", 0.3),
    Target("500 MB multi-frame, CPU per GB", "disk", "large", "cpu", "dcmtk", 1.0, 0.8),
    Target("500 MB multi-frame, CPU per GB", "disk", "large", "cpu", "orthanc", 0.3),
    Target("500 MB multi-frame, peak memory", "disk", "large", "memory", "orthanc", 0.1),
    Target("association, C-ECHO, release: CPU", "disk", "setup", "cpu", "dcmtk", 1.0),
    Target("journaled: CT, 1 association", "journal", "ct1", "rate", "dcmtk", 0.55, 0.8),
    Target("journaled: CT, 1 association", "journal", "ct1", "rate", "orthanc", 3),
    Target("journaled: 16 KB, 1 association", "journal", "small1", "rate", "dcmtk", 0.5, 0.8),
    Target("journaled: 16 KB, 1 association", "journal", "small1", "rate", "orthanc", 3),
]


class Row(NamedTuple):
    """Medians of one server in one case. ``rates``: objects per second, by round."""

    rates: dict[int, float]
    rate: float
    mb: float
    cpu_gb: float
    cpu_object: float
    pss: float
    process: float
    median: float
    p99: float
    admitted: float | None
    client: float

    def metric(self, name: str) -> float:
        """Return what a target compares."""
        return {"rate": self.rate, "cpu": self.cpu_object, "memory": self.pss}[name]


class Result:
    """Samples and what follows from them."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.rows: dict[tuple[str, str, str], Row] = {}
        keys = dict.fromkeys((s["disk"], s["case"], s["server"]) for s in raw["samples"])
        for key in keys:
            good = [
                s
                for s in raw["samples"]
                if (s["disk"], s["case"], s["server"]) == key and s["objects"] and s["seconds"]
            ]
            if good:
                self.rows[key] = _row(good)

    def ratio(self, disk: str, case: str, metric: str, server: str, against: str) -> float | None:
        """Return a ratio of medians, or None."""
        ours, theirs = self.rows.get((disk, case, server)), self.rows.get((disk, case, against))
        if ours is None or theirs is None or not theirs.metric(metric):
            return None
        return ours.metric(metric) / theirs.metric(metric)

    def groups(self) -> list[tuple[str, str]]:
        """Return disks and cases, in order."""
        return list(dict.fromkeys((disk, case) for disk, case, _ in self.rows))

    def servers(self, disk: str, case: str) -> list[str]:
        """Return the servers of a case, in the table's order."""
        return [s for s in self.raw["servers"] if (disk, case, s) in self.rows]

    def cells(self, disk: str, case: str, server: str) -> list[str]:
        """Return a row of the table."""
        row = self.rows[disk, case, server]
        peer = self.rows.get((disk, case, "dcmtk"))
        spread = [rate / peer.rates[n] for n, rate in row.rates.items() if n in peer.rates] if peer else []
        ratio = self.ratio(disk, case, "rate", server, "dcmtk")
        against = f"{ratio:.2f}" if ratio else ""
        if ratio and len(spread) > 1 and server != "dcmtk":
            against += f" ({min(spread):.2f}-{max(spread):.2f})"
        orthanc = self.ratio(disk, case, "rate", server, "orthanc")
        return [
            self.raw["servers"][server]["title"],
            f"{row.rate:,.0f}" if row.rate >= 10 else f"{row.rate:.2f}",
            f"{row.mb:,.0f}" if row.mb else "",
            f"{row.cpu_gb:.2f}" if row.cpu_gb else "",
            f"{row.cpu_object:.2f}",
            f"{row.pss / _MIB:,.0f}",
            f"{row.process / _MIB:,.0f}",
            f"{row.median:.2f}" if row.median else "",
            f"{row.p99:.2f}" if row.p99 else "",
            against,
            f"{orthanc:.2f}" if orthanc else "",
            "" if row.admitted is None else f"{row.admitted:.1f}",
            f"{row.client:.0%}" if row.client else "",
        ]

    def targets(self) -> list[list[str]]:
        """Return the rows of the table of targets; those that were measured."""
        lines = []
        for target in TARGETS:
            value = self.ratio(target.disk, target.case, target.metric, "strongroom", target.against)
            if value is not None:
                aim = f" / {target.aim:g}" if target.aim else ""
                word = "reached" if target.met(value) else "MISSED"
                lines.append([target.title, target.against, f"{target.reach:g}{aim}", f"{value:.2f}", word])
        return lines

    def facts(self) -> list[str]:
        """Return lines about the machine and the disks."""
        found = [f"{name}: {value}" for name, value in self.raw["environment"].items()]
        for label, facts in self.raw["disks"].items():
            costs = ", ".join(f"{k} {v}" + ("" if k in {"type", "loop device"} else " us") for k, v in facts.items())
            found.append(f"{_DISKS[label]}: {costs}")
        suites = sorted({s["tls"] for s in self.raw["samples"] if s["tls"]})
        for suite in suites:
            users = dict.fromkeys(s["server"] for s in self.raw["samples"] if s["tls"] == suite)
            found.append(f"TLS: {suite}: {', '.join(users)}")
        client = {
            "encoded": "pre-encoded, one process an association",
            "dcmtk": "storescu, its start-up and reading included",
        }
        found.append(f"client: {client[self.raw['client']]}; rounds: {self.raw['rounds']}")
        if self.raw["quick"]:
            found.append("QUICK RUN: an eighth of the objects, 60 MB instead of 500; no figures to quote")
        return found

    def failures(self) -> list[str]:
        """Return what went wrong."""
        return [
            f"{s['disk']}, round {s['round'] + 1}, {s['case']}, {s['server']}: {text}"
            for s in self.raw["samples"]
            for text in s["failures"]
        ]


def _row(samples: list[dict[str, Any]]) -> Row:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    first = samples[0]
    admitted = [s["admitted_after"] for s in samples if s["admitted_after"] is not None]
    return Row(
        {s["round"]: s["objects"] / s["seconds"] for s in samples},
        median([s["objects"] / s["seconds"] for s in samples]),
        median([s["bytes"] / s["seconds"] / 1e6 for s in samples]),
        median([s["server_cpu"] / s["bytes"] * 1e9 for s in samples]) if first["bytes"] else 0.0,
        median([s["server_cpu"] / s["objects"] * 1e3 for s in samples]),
        median([s["pss_peak"] for s in samples]),
        median([s["process_peak"] for s in samples]),
        median([s["latency_median"] * 1e3 for s in samples]),
        median([s["latency_p99"] * 1e3 for s in samples]),
        median(admitted) if admitted else None,
        median([s["client_cpu"] / s["seconds"] for s in samples]),
    )


def progress(sample: dict[str, Any]) -> None:
    """Say on standard error what one run gave."""
    rate = sample["objects"] / sample["seconds"] if sample["seconds"] else 0.0
    cpu = sample["server_cpu"] / max(sample["objects"], 1) * 1e3
    note = f"  FAILED: {sample['failures'][0]}" if sample["failures"] else ""
    where = f"{sample['disk']:8}round {sample['round'] + 1}  {sample['case']:8} {sample['server']:14}"
    print(f"{where}{rate:9.1f}/s  CPU {cpu:8.2f} ms/object{note}", file=sys.stderr)


def show(result: Result, width: int) -> None:
    """Print the tables."""
    console = Console(width=max(width, 172), highlight=False)
    for disk, case in result.groups():
        title = f"\n{result.raw['cases'][case]} - {_DISKS[disk]}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for server in result.servers(disk, case):
            table.add_row(*result.cells(disk, case, server))
        console.print(table)
    if rows := result.targets():
        table = Table(title="Strongroom divided by its peers", title_justify="left", box=SIMPLE_HEAD)
        for column in ("figure", "divided by", "reach / aim", "measured", ""):
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in result.facts():
        console.print(line)
    for line in result.failures():
        console.print(f"FAILED: {line}")


def write_markdown(result: Result, file: Path, plot: Path | None) -> None:
    """Write the report into a file: between its markers where it has them, else as the whole file."""
    text = _markdown(result, plot.name if plot else "")
    old = file.read_text("utf-8") if file.exists() else ""
    if BEGIN in old and END in old:
        before, _, rest = old.partition(BEGIN)
        text = before + text.rstrip("\n") + rest.partition(END)[2]
    file.write_text(text, "utf-8")


def _markdown(result: Result, plot: str) -> str:
    lines = [BEGIN, "", *[f"- {line}" for line in result.facts()], ""]
    if plot:
        lines += [f"![objects per second, tuned DCMTK = 1]({plot})", ""]
    for disk, case in result.groups():
        lines += [f"#### {result.raw['cases'][case]} - {_DISKS[disk]}", ""]
        lines += _table(list(_COLUMNS), [result.cells(disk, case, s) for s in result.servers(disk, case)])
    if rows := result.targets():
        lines += ["#### Strongroom divided by its peers", ""]
        lines += _table(["figure", "divided by", "reach / aim", "measured", ""], rows)
    used = {s for _, _, s in result.rows}
    lines += ["#### What each does not do", ""]
    lines += [f"- {d['title']}: {d['without']}" for name, d in result.raw["servers"].items() if name in used]
    lines += [f"- FAILED: {line}" for line in result.failures()]
    return "\n".join([*lines, "", END, ""])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *[f"| {' | '.join(row)} |" for row in rows], ""]
