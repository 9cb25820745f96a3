"""A hospital's studies over years: who was examined when, by what, and when it was received. Pure and repeatable.

Study number N of a seed is always the same study. Some patients are minors, some have no birth date; some study dates
are missing, malformed, long before the reception (old studies that were brought in later) or in the future (a
modality's clock was wrong).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from benchmarks.objects import EXPLICIT_LITTLE, element

YEAR = timedelta(days=365.2425)
TRANSFER_SYNTAX = EXPLICIT_LITTLE
# Studies a patient, over all the years.
_STUDIES_A_PATIENT = 2.5
_CLASS = "1.2.840.10008.5.1.4.1.1."
_NAMES = (
    "Smith", "Müller", "García", "Rossi", "Novák", "Yamada=山田=やまだ", "Nguyễn", "Öztürk", "O'Neill", "Petrov",
    "Silva", "Jensen", "Kowalski", "Haddad", "Okafor", "Dubois", "van der Berg", "Kim=金=김", "Cohen", "Andersson",
)  # fmt: skip
_FIRST = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jan", "Katja", "Leo", "Mia")


class Modality(NamedTuple):
    """A kind of device. ``titles``: calling AE titles of those that there are; ``share``: of a thousand studies."""

    name: str
    sop_class: str
    titles: tuple[str, ...]
    share: int
    series: int
    body_parts: tuple[str, ...]


MODALITIES = (
    Modality("CR", _CLASS + "1", ("CR1", "CR2", "CR_ER"), 300, 1, ("CHEST", "HAND", "KNEE")),
    Modality("US", _CLASS + "6.1", ("US1", "US2", "US_OBGYN"), 240, 1, ("ABDOMEN", "HEART", "")),
    Modality("CT", _CLASS + "2", ("CT1", "CT2"), 200, 3, ("CHEST", "HEAD", "ABDOMEN")),
    Modality("MR", _CLASS + "4", ("MR1", "MR2"), 130, 3, ("BRAIN", "LSPINE", "KNEE")),
    Modality("MG", _CLASS + "1.2", ("MG1",), 80, 2, ("BREAST",)),
    Modality("XA", _CLASS + "12.1", ("CATHLAB",), 30, 2, ("HEART",)),
    Modality("OT", _CLASS + "7", ("SCANNER",), 20, 1, ("",)),
)


class Patient(NamedTuple):
    """Whom studies are about; ``birth_date`` is empty where it is unknown."""

    id: str
    name: str
    birth_date: str
    sex: str


class Study(NamedTuple):
    """One study. ``date`` is what the data sets say; ``date_is``: normal, missing, malformed, old or future.

    ``series`` are UID and the SOP Instance UIDs of each.
    """

    number: int
    uid: str
    modality: Modality
    patient: Patient
    date: str
    date_is: str
    received: datetime
    calling: str
    accession: str
    body_part: str
    series: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def instances(self) -> int:
        """How many instances it has."""
        return sum(len(instances) for _, instances in self.series)


class Plan(NamedTuple):
    """How many studies, received in the ``years`` before the day ``until``, evenly, in the order of their numbers."""

    studies: int
    seed: int
    years: int
    until: date

    @property
    def since(self) -> datetime:
        """When the first can have been received."""
        return self.end - YEAR * self.years

    @property
    def end(self) -> datetime:
        """When the last can have been received."""
        return datetime(self.until.year, self.until.month, self.until.day, tzinfo=UTC)


def studies(plan: Plan) -> Iterator[Study]:
    """Yield the studies in the order of their reception."""
    for number in range(plan.studies):
        yield study(plan, number)


def study(plan: Plan, number: int) -> Study:
    """Return one study."""
    rng = random.Random(f"{plan.seed}/study/{number}")
    received = plan.since + (plan.end - plan.since) * ((number + rng.random()) / plan.studies)
    modality = rng.choices(MODALITIES, [m.share for m in MODALITIES])[0]
    whom = rng.randrange(max(2, int(plan.studies / _STUDIES_A_PATIENT)))
    if modality.name == "MG":
        # Even numbers are women.
        whom -= whom % 2
    said, date_is = _date(rng, received)
    series = tuple(
        (_uid(rng), tuple(_uid(rng) for _ in range(rng.choices((1, 2, 3, 4), (70, 20, 7, 3))[0])))
        for _ in range(rng.randint(1, modality.series))
    )
    return Study(
        number,
        _uid(rng),
        modality,
        patient(plan, whom),
        said,
        date_is,
        received,
        rng.choice(modality.titles),
        f"A{number:09}",
        rng.choice(modality.body_parts),
        series,
    )


def patient(plan: Plan, number: int) -> Patient:
    """Return one patient; nobody is born after the first study."""
    rng = random.Random(f"{plan.seed}/patient/{number}")
    kind = rng.random()
    # One in eight is under 18 when the years begin, so that some are still today.
    age = rng.uniform(0, 18) if kind < 0.125 else rng.uniform(18, 85)
    born = "" if kind > 0.97 else f"{plan.since - YEAR * age:%Y%m%d}"
    family, *others = rng.choice(_NAMES).split("=")
    name = f"{family}^{rng.choice(_FIRST)}"
    return Patient(f"P{number:07}", "=".join([name, *others]), born, "FM"[number % 2])


def data_sets(one: Study) -> Iterator[tuple[str, bytes]]:
    """Yield SOP Instance UID and encoded data set of each instance; every one under 2 KB, with other pixels."""
    rng = random.Random(one.uid)
    clock = f"{one.received:%H%M%S}"
    for number, (series, instances) in enumerate(one.series, 1):
        for position, instance in enumerate(instances, 1):
            values: list[tuple[int, str, Any]] = [
                (0x00080005, "CS", "ISO_IR 192"),
                (0x00080016, "UI", one.modality.sop_class),
                (0x00080018, "UI", instance),
                (0x00080020, "DA", one.date),
                (0x00080021, "DA", one.date),
                (0x00080030, "TM", clock),
                (0x00080031, "TM", clock),
                (0x00080050, "SH", one.accession),
                (0x00080060, "CS", one.modality.name),
                (0x00080070, "LO", "Benchmark"),
                (0x00080090, "PN", "Referring^Physician"),
                (0x00081010, "SH", one.calling),
                (0x00081030, "LO", f"{one.modality.name} {one.body_part}".strip()),
                (0x0008103E, "LO", f"series {number}"),
                (0x00100010, "PN", one.patient.name.encode()),
                (0x00100020, "LO", one.patient.id),
                (0x00100030, "DA", one.patient.birth_date),
                (0x00100040, "CS", one.patient.sex),
                (0x00180015, "CS", one.body_part),
                (0x0020000D, "UI", one.uid),
                (0x0020000E, "UI", series),
                (0x00200010, "SH", "1"),
                (0x00200011, "IS", str(number)),
                (0x00200013, "IS", str(position)),
                (0x00280002, "US", 1),
                (0x00280010, "US", 8),
                (0x00280011, "US", 8),
                (0x00280100, "US", 16),
            ]
            pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 128) + rng.randbytes(128)
            yield instance, b"".join(element(*value) for value in values) + pixels


def document(one: Study) -> dict[str, Any]:
    """Return a study as one line of a list: what a later look at the store is compared with."""
    return {
        "study": one.uid,
        "modality": one.modality.name,
        "patient_id": one.patient.id,
        "birth_date": one.patient.birth_date,
        "study_date": one.date,
        "date_is": one.date_is,
        "received_at": timestamp(one.received),
        "calling": one.calling,
        "series": len(one.series),
        "instances": one.instances,
    }


def timestamp(when: datetime) -> str:
    """Return a time as the gate writes it."""
    return when.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _date(rng: random.Random, received: datetime) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.005:
        return "", "missing"
    if kind < 0.01:
        day = received.date()
        return rng.choice(("00000000", f"{day:%Y.%m.%d}", f"{day.year}0231", f"{day:%Y}", "UNKNOWN")), "malformed"
    if kind < 0.03:
        return f"{received - YEAR * rng.uniform(1, 15):%Y%m%d}", "old"
    if kind < 0.032:
        return f"{received + YEAR * 20:%Y%m%d}", "future"
    return f"{received - timedelta(hours=rng.expovariate(1 / 3)):%Y%m%d}", "normal"


def _uid(rng: random.Random) -> str:
    return f"2.25.{rng.randrange(10**38, 2 * 10**38)}"
