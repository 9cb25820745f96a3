"""What is sent: the cases, their sizes, and which servers run in them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import objects
from benchmarks.programs import found
from benchmarks.servers import Dcmtk, DcmtkShipped, Floor, Orthanc, Server, Sink, Stock
from benchmarks.strongroom import Strongroom, StrongroomOne

# In the order of the tables.
SERVERS: dict[str, type[Server]] = {
    kind.name: kind for kind in (Dcmtk, DcmtkShipped, Orthanc, Stock, Strongroom, StrongroomOne, Floor, Sink)
}
# Whose memory with many associations is worth knowing.
_BOUNDED = ("dcmtk", "orthanc", "strongroom", "strongroom-one", "sink")
# Who says when what was received is archived.
_ADMITTING = ("strongroom", "strongroom-one", "sink")


@dataclass(frozen=True)
class Case:
    """``count`` objects by each of so many associations, while so many others are idle."""

    name: str
    title: str
    kind: str
    count: int
    associations: int = 1
    idle: int = 0
    timeout: float = 180.0
    servers: tuple[str, ...] = ()

    def template(self) -> objects.Template | None:
        """Return the data set; None where associations are what is counted."""
        makers = {"ct": objects.ct, "small": objects.small}
        if self.kind == "setup":
            return None
        return makers[self.kind]() if self.kind in makers else objects.multi_frame(int(self.kind))


def cases(quick: bool) -> dict[str, Case]:
    """Return the cases by name; an eighth of the objects where it is to be quick."""
    n = 8 if quick else 1
    busy_and_idle = "CT, 4 busy and 64 idle associations, for memory; CPU includes 68 set-ups"
    table = [
        Case("ct1", "CT 0.5 MB, 1 association", "ct", 400 // n),
        Case("ct4", "CT 0.5 MB, 4 associations", "ct", 150 // n, 4),
        Case("small1", "16 KB, 1 association", "small", 2000 // n),
        Case("small4", "16 KB, 4 associations", "small", 1000 // n, 4),
        Case("large", "500 MB multi-frame", "60" if quick else "500", 1),
        Case("setup", "association, C-ECHO, release", "setup", 60 // n),
        Case("idle", busy_and_idle, "ct", 100 // n, 4, idle=64, servers=_BOUNDED),
        Case("backlog", "10,000 of 16 KB, 4 associations", "small", 2500 // n, 4, servers=_ADMITTING),
    ]
    return {case.name: case for case in table}


def available(name: str) -> bool:
    """Tell whether a server is installed."""
    program = SERVERS[name].program
    return not program or found(program) is not None


def runs(kind: type[Server], case: Case) -> bool:
    """Tell whether a server takes part in a case."""
    return (kind.cases is None or case.name in kind.cases) and (not case.servers or kind.name in case.servers)


def planned(names: list[str], wanted: list[Case], rounds: int, *, files: bool) -> int:
    """Return about how many bytes will lie on the disk; ``files``: what is sent lies there too.

    Nothing is deleted but deposits that a vault has copied; room for the largest of them is included.
    """
    total = largest = 0
    for case in wanted:
        template = case.template()
        each = case.associations * case.count * (template.size + 4096 if template else 0)
        kinds = [SERVERS[name] for name in names if runs(SERVERS[name], case) and name != "sink"]
        total += sum(int(each * k.share * 1.05) + k.empty_bytes for k in kinds)
        total += each if files else 0
        largest = max(largest, each)
    return total * rounds + largest
