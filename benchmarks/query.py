"""Queries of an index as large as one gets, timed: what C-FIND and QIDO wait for in the vault.

Usage: python -m benchmarks.query [--instances 1000000] [--years 1] [--seed 1] [--values 40] [--scratch FOLDER]
                                  [--json FILE]

The index is a real one (SQLCipher, rows as admission writes them, many studies a transaction) of a hospital's studies,
``benchmarks.hospital``, with as many instances each as their modality makes. Each question is asked with different
values, one after the other on one connection, as the vault does it; some of them again with what viewers want beside:
counts and Modalities in Study. Times are to the first row and to all rows, as Python has them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import hospital, measure
from benchmarks.hospital import Plan, Study
from storage import attributes
from storage.attributes import Attributes, Element, Received
from storage.index import Index, Row
from storage.pack import PAGE, Frame
from storage.packfile import Record
from storage.query import Query, Scope

# Instances a series; with the hospital's shares and numbers of series about 50 a study.
_INSTANCES = {"CR": 2, "US": 25, "CT": 75, "MR": 46, "MG": 4, "XA": 20, "OT": 3}
_A_STUDY = 50
_BATCH = 500
# Pages that are kept in memory while the index is made, not while it is asked.
_CACHE_KIB = 262_144
KEY = (bytes(range(32)), bytes(16))
VIEWER = ("00080061", "00201206", "00201208", "00100040", "00081030", "0020000D")


class Case(NamedTuple):
    """A question: ``match`` makes keys of a study that is in the index."""

    name: str
    level: str
    match: Callable[[Study], dict[str, list[str]]]
    wants: Sequence[str] = ()
    scope: Scope = Scope()
    limit: int = 0


class Result(NamedTuple):
    """What came out: medians over the values, milliseconds; the slowest value in ``worst``."""

    name: str
    values: int
    rows: float
    first: float
    whole: float
    worst: float


def _patient(study: Study) -> dict[str, list[str]]:
    return {"00100020": [study.patient.id]}


def _day(study: Study) -> dict[str, list[str]]:
    day = f"{study.received:%Y%m%d}"
    return {"00080020": [f"{day}-{day}"]}


def _contained(study: Study) -> dict[str, list[str]]:
    return {"00100010": [f"*{_family(study)[1:].upper()}*"]}


def _torn(study: Study) -> dict[str, list[str]]:
    family = _family(study).upper()
    given = study.patient.name.partition("=")[0].partition("^")[2]
    return {"00100010": [f"{family[:2]}*{family[-2:]}^{given[:1]}*"]}


def _family(study: Study) -> str:
    return study.patient.name.partition("^")[0]


def _series(study: Study) -> dict[str, list[str]]:
    return {"0020000D": [study.uid], "0020000E": [study.series[0][0]]}


CASES = (
    Case("study by Patient ID", "STUDY", _patient),
    Case("the same, as viewers ask", "STUDY", _patient, VIEWER),
    Case("the same, one AE title's", "STUDY", _patient, VIEWER, Scope(ae_titles=["CT1", "CR1"])),
    Case("studies of a day", "STUDY", _day),
    Case("the same, as viewers ask", "STUDY", _day, VIEWER),
    Case("the same, one modality's", "STUDY", _day, VIEWER, Scope(modalities=["CT"])),
    Case("CTs of a day", "STUDY", lambda study: {**_day(study), "00080061": ["CT"]}, VIEWER),
    Case("study by Accession Number", "STUDY", lambda study: {"00080050": [study.accession]}, VIEWER),
    Case("name *MITH*", "STUDY", _contained),
    Case("the same, as viewers ask", "STUDY", _contained, VIEWER),
    Case("name SM*TH^J*", "STUDY", _torn),
    Case("the same, as viewers ask", "STUDY", _torn, VIEWER),
    Case("a whole name", "STUDY", lambda study: {"00100010": [study.patient.name.partition("=")[0]]}, VIEWER),
    Case("a name that nobody has", "STUDY", lambda study: {"00100010": [f"*{study.number}^*"]}, VIEWER),
    Case("patients, name *MITH*", "PATIENT", _contained, ("00100020", "00201200")),
    Case("any study, first 25", "STUDY", lambda _: {}, VIEWER, limit=25),
    Case("series of a study", "SERIES", lambda study: {"0020000D": [study.uid]}, ("00080060", "00201209")),
    Case("instances of a series", "IMAGE", _series, ("00080016", "00080018", "00200013")),
    Case("any instance, first 25", "IMAGE", lambda _: {}, ("00080018",), limit=25),
)


def studies(plan: Plan, instances: int) -> Iterator[Study]:
    """Yield the hospital's studies with more instances each, until there are enough."""
    for study in (hospital.study(plan, number) for number in itertools.count()):
        made = []
        for series, _ in study.series:
            rng = random.Random(series)
            count = min(instances, max(1, round(_INSTANCES[study.modality.name] * rng.uniform(0.5, 1.5))))
            made.append((series, tuple(f"2.25.{rng.randrange(10**38, 2 * 10**38)}" for _ in range(count))))
            instances -= count
            if not instances:
                break
        yield study._replace(series=tuple(made))
        if not instances:
            return


def fill(index: Index, several: list[Study]) -> None:
    """Add studies as admission does, each a pack, all in one transaction."""
    with index.filling():
        for study in several:
            pack = f"{study.number:032x}"
            rows = [Row(record, "held") for record in _records(study)]
            index.replace(pack, "objects", study.number + 1, (len(rows) + 1) * PAGE, rows)


def _records(study: Study) -> Iterator[Record]:
    when = hospital.timestamp(study.received)
    received = Received(when, f"{study.number:016x}", study.calling, "STRONGROOM", "192.0.2.7:4711", "ab" * 32)
    groups = zip(("Alphabetic", "Ideographic", "Phonetic"), study.patient.name.split("="), strict=False)
    one = {
        attributes.SOP_CLASS: study.modality.sop_class,
        attributes.STUDY: study.uid,
        "00080020": study.date,
        "00080021": study.date,
        "00080030": f"{study.received:%H%M%S}",
        "00080050": study.accession,
        "00080060": study.modality.name,
        "00081010": study.calling,
        "00081030": f"{study.modality.name} {study.body_part}".strip(),
        "00100020": study.patient.id,
        "00100030": study.patient.birth_date,
        "00100040": study.patient.sex,
        "00180015": study.body_part,
        "00200010": "1",
    }
    common = {tag: Element("LO", [text]) for tag, text in one.items() if text}
    common["00100010"] = Element("PN", [dict(groups)])
    at = 0
    for number, (series, instances) in enumerate(study.series, 1):
        common |= {attributes.SERIES: Element("UI", [series]), "00200011": Element("IS", [str(number)])}
        for position, uid in enumerate(instances, 1):
            at += PAGE
            own = {attributes.SOP_INSTANCE: Element("UI", [uid]), "00200013": Element("IS", [str(position)])}
            frame = Frame(at, random.Random(uid).randbytes(16), 526_336, 2_048)
            yield Record(frame, Attributes(1, hospital.TRANSFER_SYNTAX, common | own, {}, received))


def ask(index: Index, case: Case, asked: list[Study]) -> Result:
    """Ask a question with different values."""
    rows, firsts, wholes = [], [], []
    for study in asked:
        query = Query(case.level, case.match(study), list(case.wants), limit=case.limit)
        begun = time.perf_counter()
        found = index.query(query, case.scope)
        count = 0 if next(found, None) is None else 1
        first = time.perf_counter()
        count += sum(1 for _ in found)
        wholes.append((time.perf_counter() - begun) * 1000)
        firsts.append((first - begun) * 1000)
        rows.append(count)
    medians = (statistics.median(figures) for figures in (rows, firsts, wholes))
    return Result(case.name, len(asked), *medians, max(wholes))


def table(results: list[Result]) -> Table:
    """Return what came out, as it is shown."""
    made = Table("Query", "Values", "Rows", "First row ms", "All rows ms", "Slowest ms")
    for column in made.columns[1:]:
        column.justify = "right"
    for one in results:
        figures = (f"{one.rows:,.0f}", f"{one.first:.2f}", f"{one.whole:.2f}", f"{one.worst:.1f}")
        made.add_row(one.name, str(one.values), *figures)
    return made


def _make(path: Path, plan: Plan, instances: int, chosen: int) -> tuple[dict[str, Any], list[Study]]:
    """Make an index; return what is in it and some of its studies."""
    index = Index(path, KEY, migrate=True)
    # Nobody needs it after a power cut.
    index._db.execute("PRAGMA synchronous = OFF")
    index._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    batch: list[Study] = []
    kept: list[Study] = []
    rng = random.Random(plan.seed)
    console = Console(stderr=True)
    begun = time.perf_counter()
    several = track(
        studies(plan, instances), "making studies", plan.studies, console=console, disable=not console.is_terminal
    )
    for count, study in enumerate(several, 1):
        batch.append(study)
        # A sample of all, whatever their number will be.
        if len(kept) < chosen:
            kept.append(study)
        elif (place := rng.randrange(count)) < chosen:
            kept[place] = study
        if len(batch) == _BATCH:
            fill(index, batch)
            batch = []
    fill(index, batch)
    seconds = time.perf_counter() - begun
    held = index.counts()
    index.forget()
    index.close()
    about = {
        "studies": held["studies"],
        "series": held["series"],
        "instances": held["instances"],
        "bytes": path.stat().st_size,
        "milliseconds an instance to fill": round(seconds * 1000 / max(1, held["instances"]), 4),
    }
    return about, kept


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.query", description="Queries of a large index, timed.")
    parser.add_argument("--instances", type=int, default=1_000_000, help="how many (1000000)")
    parser.add_argument("--years", type=int, default=1, help="over how many years they were received (1)")
    parser.add_argument("--seed", type=int, default=1, help="another one makes other studies (1)")
    parser.add_argument("--values", type=int, default=40, help="how many values each question is asked with (40)")
    parser.add_argument("--scratch", type=Path, help="where the index is made meanwhile (the system's)")
    parser.add_argument("--json", type=Path, help="write raw figures")
    arguments = parser.parse_args(given)
    if min(arguments.instances, arguments.values) < 1 or not 1 <= arguments.years <= 50:
        parser.error("at least one instance and one value, and 1 to 50 years")
    return arguments


def main(given: list[str] | None = None) -> int:
    """Make an index, ask, and report; return an exit status."""
    arguments = _arguments(given)
    until = date(2026, 1, 1)
    plan = Plan(max(1, arguments.instances // _A_STUDY), arguments.seed, arguments.years, until)
    scratch = Path(tempfile.mkdtemp(prefix="query-", dir=arguments.scratch))
    try:
        about, asked = _make(scratch / "index.db", plan, arguments.instances, arguments.values)
        index = Index(scratch / "index.db", KEY)
        results = [ask(index, case, asked) for case in CASES]
        index.close()
    finally:
        shutil.rmtree(scratch)
    Console(width=None if sys.stdout.isatty() else 100).print(table(results))
    about["load"] = round(os.getloadavg()[0], 1)
    for name, value in about.items():
        print(f"{name}: {value:,}")
    if arguments.json:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        figures = {"at": when, "machine": measure.machine(), "index": about, "queries": [r._asdict() for r in results]}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
