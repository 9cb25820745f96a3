"""What came out: samples of several rounds, their medians, and ratios of medians."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Medians of one server in one case. ``rates``: objects per second, by round. None: it could not be measured."""

    rates: dict[int, float]
    rate: float
    mb: float
    cpu_gb: float
    cpu_object: float
    pss: float
    process: float
    processes: int
    median: float
    p99: float
    admitted: float | None
    client: float

    def metric(self, name: str) -> float | None:
        """Return what a target looks at, None where it was not measured."""
        known = {"rate": self.rate, "cpu": self.cpu_object, "process": self.process, "admitted": self.admitted}
        # Nothing costs nothing: a zero is what could not be read. Only admission may be over when one looks.
        return known[name] or (self.admitted if name == "admitted" else None)


class Result:
    """A run's raw figures and what follows from them. Runs that failed count for nothing but the list of failures."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.rows: dict[tuple[str, str, str], Row] = {}
        good: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for sample in raw["samples"]:
            if sample["objects"] and sample["seconds"] and not sample["failures"]:
                good.setdefault((sample["disk"], sample["case"], sample["server"]), []).append(sample)
        self.rows = {key: _row(samples) for key, samples in good.items()}

    def value(self, disk: str, case: str, metric: str, server: str, against: str = "") -> float | None:
        """Return a median, divided by another server's where one is named; None where one was not measured."""
        ours = self.rows.get((disk, case, server))
        value = ours.metric(metric) if ours else None
        if value is None or not against:
            return value
        theirs = self.rows.get((disk, case, against))
        divisor = theirs.metric(metric) if theirs else None
        return value / divisor if divisor else None

    def groups(self) -> list[tuple[str, str]]:
        """Return disks and cases, in order."""
        order = list(self.raw["disks"]), list(self.raw["cases"])
        found = {(disk, case) for disk, case, _ in self.rows}
        return [(disk, case) for disk in order[0] for case in order[1] if (disk, case) in found]

    def servers(self, disk: str, case: str) -> list[str]:
        """Return the servers of a case, in the table's order."""
        return [s for s in self.raw["servers"] if (disk, case, s) in self.rows]

    def title(self, server: str) -> str:
        """Return what a server is called."""
        title: str = self.raw["servers"][server]["title"]
        return title

    def missing(self) -> list[str]:
        """Return what was not measured, and why."""
        names = {"journal": "the image with a journal"} | {s: self.title(s) for s in self.raw["servers"]}
        return [f"NOT MEASURED: {names[name]}: {reason}" for name, reason in self.raw["not_measured"].items()]

    def failures(self) -> list[str]:
        """Return what went wrong."""
        return [
            f"FAILED: {s['disk']}, round {s['round'] + 1}, {s['case']}, {s['server']}: {text}"
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
        max(s["processes"] for s in samples),
        median([s["latency_median"] * 1e3 for s in samples]),
        median([s["latency_p99"] * 1e3 for s in samples]),
        median(admitted) if admitted else None,
        median([s["client_cpu"] / s["seconds"] for s in samples]),
    )
