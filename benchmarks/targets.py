"""What Strongroom should reach: medians, most of them divided by another server's in the same run."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.result import Result

COLUMNS = ("figure", "divided by", "reach / aim", "measured", "", "one user", "")
_MIB = 1 << 20
_SERVERS = ("strongroom", "strongroom-one")


class Target(NamedTuple):
    """A figure, divided by that of ``against`` if one is named, else in ``unit``s of ``scale``.

    ``reach`` has to be reached, ``aim`` is hoped for. Rates are reached from below, costs from above.
    """

    title: str
    disk: str
    case: str
    metric: str
    against: str
    reach: float
    aim: float | None = None
    unit: str = ""
    scale: float = 1.0

    def verdict(self, value: float) -> str:
        """Say in a word or two whether it is reached."""
        sign = 1 if self.metric == "rate" else -1
        if sign * value < sign * self.reach:
            return "MISSED"
        return "reached" if self.aim is None or sign * value < sign * self.aim else "reached, aim too"

    def bounds(self) -> str:
        """Return what is to be reached, as text."""
        least = f"{self.reach:g}" + (f" / {self.aim:g}" if self.aim is not None else "")
        return f"{least} {self.unit}".rstrip()

    def judged(self, result: Result, server: str) -> tuple[str, str]:
        """Return what a server measured and the verdict."""
        value = result.value(self.disk, self.case, self.metric, server, self.against)
        if value is None:
            return "", "not measured"
        value /= self.scale
        return f"{value:.3g} {self.unit}" if self.unit else f"{value:.2f}", self.verdict(value)


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
    Target("500 MB multi-frame, peak memory, largest process", "disk", "large", "process", "", 100, None, "MiB", _MIB),
    Target("500 MB multi-frame, peak memory, largest process", "disk", "large", "process", "orthanc", 0.1),
    Target("association, C-ECHO, release: CPU", "disk", "setup", "cpu", "dcmtk", 1.0),
    Target("10,000 of 16 KB: admitted after the burst's end", "disk", "backlog", "admitted", "", 10, None, "s"),
    Target("journaled: CT, 1 association, objects/s", "journal", "ct1", "rate", "dcmtk", 0.55, 0.8),
    Target("journaled: CT, 1 association, objects/s", "journal", "ct1", "rate", "orthanc", 3),
    Target("journaled: 16 KB, 1 association, objects/s", "journal", "small1", "rate", "dcmtk", 0.5, 0.8),
    Target("journaled: 16 KB, 1 association, objects/s", "journal", "small1", "rate", "orthanc", 3),
]


def judged(result: Result) -> list[list[str]]:
    """Return the rows of the table: every target, also what was not measured; none if nothing of ours was."""
    if not any(server in _SERVERS for _, _, server in result.rows):
        return []
    rows = []
    for target in TARGETS:
        against = result.title(target.against) if target.against else ""
        cells = [cell for server in _SERVERS for cell in target.judged(result, server)]
        rows.append([target.title, against, target.bounds(), *cells])
    return rows
