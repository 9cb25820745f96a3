"""An archive of years, made in minutes: a real store, filled with what ``benchmarks.hospital`` plans.

Usage: python -m benchmarks.archive make --to FOLDER [--studies 100000] [--seed 1] [--years 10] [--until DAY]
                                         [--list FILE]
       python -m benchmarks.archive plan [--studies ...] ...

``init`` makes the store and a peer BENCH; packs, key records and rows are made by the gate's and the vault's own
functions, as a store admits them that one user runs. Only the way in is short: straight into ``objects/``, many
studies a transaction, nothing synced before the end. The keyring says that its first version is as old as the first
study: retention believes no reception before that. ``plan`` (and ``--list``) writes what is in it, a JSON line a study.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import hospital
from benchmarks.hospital import Plan, Study
from keys import keyring, slots
from keys.anchors import FileAnchors
from keys.seal import context, seal
from keys.versions import StudyKeyPlace, new_key
from storage import attributes, pack
from storage.archive import CONSTANT_TIME, Archive
from storage.attributes import Received
from storage.index import Index, Row
from storage.keysdb import KeysDatabase, StudyKeyRecord
from storage.packfile import Record, frames_digest
from storage.sqlite import Database
from storescp.config import Config, load
from storescp.gate.describe import Describer
from storescp.gate.head import HeadParser
from storescp.gate.transfer import ENCODINGS
from storescp.vault.filing import study_tag

ROOT = Path(__file__).resolve().parent.parent
PEER = "BENCH"
# Studies a transaction, and pages that a database keeps in memory: 128 MiB.
_BATCH = 2000
_CACHE_KIB = 131_072


class _Batched:
    """A connection whose transactions become one, until ``flush``."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection = database.conn
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        database.conn = cast(Any, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *parameters: Any) -> Any:
        """Execute SQL, but the beginnings and ends of transactions within the one that is open."""
        if sql == "COMMIT" or (sql == "BEGIN IMMEDIATE" and self._connection.in_transaction):
            return None
        return self._connection.execute(sql, *parameters)

    def flush(self) -> None:
        """Commit what was written since the last time."""
        if self._connection.in_transaction:
            self._connection.execute("COMMIT")

    def finish(self) -> None:
        """Commit, and write all of it into the file, durably."""
        self.flush()
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._database.conn = self._connection


class Filling:
    """A store that is being filled; nobody else has it meanwhile."""

    def __init__(self, config: Config, since: datetime) -> None:
        self._ring = keyring.unlock(
            config.keyring, slots.read_key_file(config.key_file or Path()), FileAnchors(config.anchors)
        )
        self._ring.body.versions[0].created = f"{since:%Y-%m-%dT%H:%M:%SZ}"
        self._ring.write(config.keyring)
        self._version = self._ring.current()
        self._keys_db = KeysDatabase(config.keys_db, migrate=True)
        self._index = Index(config.index(self._version.version), self._version.index_key(), migrate=True)
        self._batches = _Batched(self._keys_db._db), _Batched(self._index._db)
        self._archive = Archive(config.store_path, *config.inboxes)
        self._describer = Describer()
        self._called = config.settings.gate.ae_title
        self.bytes = 0

    def add(self, study: Study) -> None:
        """Add a study: one pack, one key record, its rows."""
        key, key_id = new_key(), os.urandom(16)
        header = pack.Header(self._ring.store_id, key_id, 0, b"")
        content, rows = bytearray(header.encode()), []
        received = self._received(study)
        for _, data_set in hospital.data_sets(study):
            content += bytes(pack.page_after(len(content)) - len(content))
            described = self._described(data_set, received)
            object_id = os.urandom(16)
            bound = (header.bound(), object_id)
            sealed = seal(data_set, key, context("dataset", *bound))
            sealed_attributes = seal(attributes.encode(described), key, context("attributes", *bound))
            frame = pack.Frame(len(content), object_id, len(sealed), len(sealed_attributes))
            content += frame.encode() + sealed + sealed_attributes
            rows.append(Row(Record(frame, described), "held"))
        self._write(key_id.hex(), content)
        place = StudyKeyPlace(
            key_id,
            key_id,
            study_tag(self._ring, study.uid),
            len(content),
            frames_digest([row.record.frame for row in rows]),
            self._keys_db.next_admission(),
        )
        wrapped = self._version.wrap_study(key, place)
        self._keys_db.add(StudyKeyRecord(place, self._version.version, wrapped))
        self._index.replace(key_id.hex(), "objects", place.admission, place.length, rows)
        self.bytes += len(content)

    def flush(self) -> None:
        """Commit: what is in the store by now is whole."""
        for batch in self._batches:
            batch.flush()

    def close(self) -> None:
        """Write everything out and let go of the store."""
        for batch in self._batches:
            batch.finish()
        self._keys_db.close()
        self._index.close()
        self._ring.forget()
        os.sync()

    def _described(self, data_set: bytes, received: Received) -> attributes.Attributes:
        """Return what a gate would say of a data set that it received."""
        encoding = ENCODINGS[hospital.TRANSFER_SYNTAX]
        head = HeadParser(encoding)
        head.feed(memoryview(data_set))
        head.end()
        return self._describer.describe(head.values, encoding, hospital.TRANSFER_SYNTAX, received)

    def _received(self, study: Study) -> Received:
        device = hashlib.sha256(study.calling.encode())
        association = hashlib.sha256(study.uid.encode()).hexdigest()[:16]
        address = f"192.0.2.{device.digest()[0]}:{1024 + study.number % 60_000}"
        when = hospital.timestamp(study.received)
        return Received(when, association, study.calling, self._called, address, device.hexdigest())

    def _write(self, pack_id: str, content: bytearray) -> None:
        path = self._archive.path(pack_id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            os.write(descriptor, content)
            os.fchmod(descriptor, 0o400)
            os.utime(descriptor, CONSTANT_TIME)
        finally:
            os.close(descriptor)


def make(home: Path, plan: Plan, *, listed: IO[str] | None = None) -> dict[str, Any]:
    """Make a store and fill it; return what is in it, counted.

    Raises:
        subprocess.CalledProcessError: The store cannot be made.
    """
    config_file = home / "strongroom.toml"
    key_file = str(home / "store.key")
    _strongroom(config_file, "init", "--with-pki", "--key-file", key_file, "--listen", "127.0.0.1:0")
    # A vault of its own runs for this: the ledger, the audit chain and an empty index are there then.
    _strongroom(config_file, "peer", "add", PEER, "--issue", str(home / "bench"), "--description", "the benchmark")
    config = load(config_file)
    counts: Counter[str] = Counter()
    with config.lock.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        filling = Filling(config, plan.since)
        try:
            for number, study in enumerate(_shown(plan), 1):
                filling.add(study)
                _count(counts, study)
                if listed is not None:
                    listed.write(json.dumps(hospital.document(study)) + "\n")
                if number % _BATCH == 0:
                    filling.flush()
        finally:
            filling.close()
    return {**dict(sorted(counts.items())), "bytes of packs": filling.bytes}


def _shown(plan: Plan) -> Iterator[Study]:
    console = Console(stderr=True)
    columns = (
        TextColumn("making studies"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(hospital.studies(plan), total=plan.studies)


def _count(counts: Counter[str], study: Study) -> None:
    counts["studies"] += 1
    counts["series"] += len(study.series)
    counts["instances"] += study.instances
    counts[f"modality {study.modality.name}"] += 1
    counts[f"study date {study.date_is}"] += 1
    born = study.patient.birth_date
    eighteen = f"{int(born[:4]) + 18}{born[4:]}" if born else ""
    minor = "unknown" if not born else "minor" if f"{study.received:%Y%m%d}" < eighteen else "adult"
    counts[f"patient {minor} at reception"] += 1


def _strongroom(config: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "storescp", "--config", str(config), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _day(text: str) -> date:
    return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.archive", description="A store of years, made in minutes.")
    parser.add_argument("verb", choices=["make", "plan"])
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to make the store; nothing may be there")
    parser.add_argument("--studies", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--seed", type=int, default=1, help="another one makes other studies (1)")
    parser.add_argument("--years", type=int, default=10, help="over how many years they were received (10)")
    today = datetime.now(UTC).date()
    parser.add_argument("--until", type=_day, default=today, metavar="DAY", help="2026-01-31 (today)")
    parser.add_argument("--list", type=argparse.FileType("w"), metavar="FILE", help="write what is in it")
    arguments = parser.parse_args(given)
    if arguments.studies < 1 or not 1 <= arguments.years <= 50:
        parser.error("at least one study, and 1 to 50 years")
    if (arguments.verb == "make") != (arguments.to is not None):
        parser.error("'make' needs --to FOLDER, 'plan' takes none")
    return arguments


def main(given: list[str] | None = None) -> int:
    """Make a store, or say what would be in it; return an exit status."""
    arguments = _arguments(given)
    plan = Plan(arguments.studies, arguments.seed, arguments.years, arguments.until)
    if arguments.verb == "plan":
        for study in hospital.studies(plan):
            print(json.dumps(hospital.document(study)), file=arguments.list or sys.stdout)
        return 0
    home = arguments.to.absolute()
    begun = time.monotonic()
    try:
        counts = make(home, plan, listed=arguments.list)
    except subprocess.CalledProcessError:
        return 1
    except KeyboardInterrupt:
        print(f"stopped: what {home} has by now is a whole store, with fewer studies", file=sys.stderr)
        return 1
    counts["seconds"] = round(time.monotonic() - begun, 1)
    counts["load"] = round(os.getloadavg()[0], 1)
    for name, value in counts.items():
        print(f"{name}: {value:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
