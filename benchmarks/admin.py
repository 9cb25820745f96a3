"""An admin's commands, timed on a store as large as one gets: see ``benchmarks.archive``.

Usage: python -m benchmarks.admin --store CONFIG [--only NAME,NAME] [--json FILE] [--rate N]

The steps change the store (they rotate, erase, store): run them on a copy. Each is what an admin types, as a process
of its own. To add one, add a line to STEPS; a command that this release does not have is reported as not there.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.commands import Done, Served, Watch, run, strongroom
from benchmarks.sender import Sender

ROOT = Path(__file__).resolve().parent.parent
_SETTLE_SECONDS = 120.0


class Step(NamedTuple):
    """What is timed.

    ``commands``: one or more, joined by &&; braces name what ``Places`` knows. ``needs``, words of these: ``server``
    (serve runs), ``stopped`` (it does not), neither (as it is), ``locked`` (the vault is, at the beginning), ``stores``
    (objects are stored meanwhile), ``shares`` (recovery shares are typed back).
    """

    name: str
    commands: str
    needs: str = "server"


STEPS = (
    Step("init", "--config {scratch}/new/strongroom.toml init --with-pki --key-file {scratch}/new/store.key", ""),
    # The vault that a command starts for itself unlocks, finishes what was interrupted, answers and ends.
    Step("status alone", "status --json", "stopped"),
    Step("serve", "status --json", "server starting"),
    Step("unlock", "unlock --key-file {key} && status --json", "server locked"),
    Step("status", "status --json"),
    Step("list all", "list --uids"),
    Step("list patient", "list --patient-id {patient}"),
    Step("list day", "list --study-date {day}"),
    Step("list study", "list instance --study {study}"),
    Step("audit verify", "audit verify"),
    Step("keys status", "keys status"),
    Step("keys rotate", "keys rotate --reason benchmark {waived}", "server stores"),
    Step("erase", "erase --study {study} --reason benchmark --yes"),
    Step("verify", "verify --json"),
    Step("reindex", "reindex", "server stores"),
    Step("recovery init", "recovery init --shares 3 --threshold 2 --file {memory}/shares", "server shares"),
    Step("recovery export", "recovery export --to {scratch}/export && recovery confirm {scratch}/export"),
    Step("backup", "backup --to {backup}", "server stores"),
    # These two with the shares of 'recovery init', which must be a step of the same run; so must 'backup'.
    Step("restore", "--config {restored}/strongroom.toml restore --from {backup} --key-file {restored}/key", "shares"),
    Step("recovery drill", "recovery drill --from {backup}", "server shares"),
    Step("keys reencrypt", "keys reencrypt --study {study} --reason benchmark"),
    Step("retention plan", "retention plan"),
    Step("retention run", "retention run --confirm"),
)


class Row(NamedTuple):
    """What came out of a step. Bytes, seconds; ``load``: before.

    ``lost``: acknowledged and not listed afterwards. ``command_peak``: the memory of the command itself. ``each``: the
    seconds of each command, in their order; what is left of ``seconds`` is the server's start.
    """

    name: str
    outcome: str
    seconds: float = 0.0
    each: tuple[float, ...] = ()
    vault_peak: int = 0
    command_peak: int = 0
    vault_cpu: float = 0.0
    load: float = 0.0
    stored: int = 0
    refused: int = 0
    lost: int = 0
    slowest_store: float = 0.0
    said: str = ""


class Places(dict[str, str]):
    """What braces in commands stand for; what has to be looked up in the store is looked up once, when it is needed."""

    def __init__(self, config: Path, scratch: Path, memory: Path) -> None:
        super().__init__(
            scratch=str(scratch),
            backup=str(scratch / "backup"),
            restored=str(scratch / "restored"),
            memory=str(memory),
            key=str(config.parent / "store.key"),
            waived="--without-export=benchmark --without-backup=benchmark",
        )
        self._config = config

    def __missing__(self, name: str) -> str:
        if name not in {"study", "patient", "day"}:
            raise KeyError(name)
        uids = strongroom(self._config, "list", "--uids").splitlines()
        uid = uids[len(uids) // 2]
        [found] = json.loads(strongroom(self._config, "list", "--json", "--study", uid))["items"]
        self |= {"study": uid, "patient": found["patient_id"], "day": found["study_date"] or "20200101"}
        return self[name]

    def erased(self) -> None:
        """Forget the study: another one is the next step's."""
        for name in ("study", "patient", "day"):
            self.pop(name, None)


class Runner:
    """The steps on one store, one after the other."""

    def __init__(self, config: Path, places: Places, rate: float) -> None:
        self._config = config
        self._places = places
        self._rate = rate
        self._served = Served(config)

    def close(self) -> None:
        """Stop the server."""
        self._served.stop()

    def step(self, step: Step) -> Row:
        """Run a step."""
        needs = set(step.needs.split())
        if needs & {"stopped", "starting"}:
            self._served.stop()
        elif "server" in needs:
            self._served.start()
        # Looked up before the clock runs.
        commands = [words.split() for words in step.commands.format_map(self._places).split("&&")]
        if "locked" in needs:
            strongroom(self._config, "lock")
        answers = self._shares if "shares" in needs else None
        load = os.getloadavg()[0]
        with ExitStack() as stack:
            sender = stack.enter_context(self._sending()) if "stores" in needs else None
            watch = stack.enter_context(Watch(self._served))
            begun = time.monotonic()
            if "starting" in needs:
                self._served.start()
            done, each = Done(0, "", ""), []
            for words in commands:
                started = time.monotonic()
                done = run(self._config, words, answers)
                each.append(time.monotonic() - started)
                if done.status:
                    break
            seconds = time.monotonic() - begun
        row = Row(
            step.name,
            _outcome(done),
            seconds,
            tuple(each),
            watch.peak,
            watch.command,
            watch.cpu,
            load,
            said=_said(done),
        )
        if row.outcome == "not there":
            return Row(step.name, row.outcome)
        if step.name == "erase":
            self._places.erased()
        return row if sender is None else self._counted(row, sender)

    @contextmanager
    def _sending(self) -> Iterator[Sender]:
        sender = Sender(self._served.target(), self._rate)
        sender.start()
        try:
            yield sender
        finally:
            sender.stop()

    def _counted(self, row: Row, sender: Sender) -> Row:
        """Return the row with what became of the objects: listed, once everything is admitted, or lost."""
        until = time.monotonic() + _SETTLE_SECONDS
        missing = set(sender.acknowledged)
        while missing and time.monotonic() < until:
            missing -= set(strongroom(self._config, "list", "instance", "--aet", "BENCH", "--uids").splitlines())
        for why in sorted(set(sender.refused)):
            print(f"{row.name}: refused: {why}", file=sys.stderr)
        return row._replace(
            stored=len(sender.acknowledged),
            refused=len(sender.refused),
            lost=len(missing),
            slowest_store=sender.slowest,
        )

    def _shares(self) -> list[str]:
        """Return the shares of the recovery key that this run made, each as its words; none if it made none."""
        file = Path(self._places["memory"]) / "shares"
        return [" ".join(_words(page)) for page in file.read_text().split("\f")] if file.exists() else []


def _words(page: str) -> list[str]:
    """Return the words of a share's page: those that stand behind their numbers."""
    found: list[str] = []
    for line in page.splitlines():
        pieces = line.split()
        numbers, words = pieces[::2], pieces[1::2]
        if words and len(numbers) == len(words) and numbers == [str(len(found) + n + 1) for n in range(len(numbers))]:
            found += words
    return found


def _outcome(done: Done) -> str:
    if done.status == 2 and "No such command" in done.err:
        return "not there"
    return "done" if done.status == 0 else f"status {done.status}"


def _said(done: Done) -> str:
    """Return the last that a command said that failed, its hint included; what others list is nobody's here."""
    return " | ".join([line for line in done.err.splitlines() if line.strip()][-2:]) if done.status else ""


def table(rows: list[Row]) -> Table:
    """Return what came out, as it is shown."""
    made = Table("Step", "Outcome", *_NUMBERS)
    for title in made.columns[2:]:
        title.justify = "right"
    for row in rows:
        made.add_row(row.name, row.outcome, *([] if row.outcome == "not there" else _numbers(row)))
    return made


_NUMBERS = ("Seconds", "Vault MiB", "Own MiB", "Vault CPU s", "Load", "Stored", "Refused", "Lost", "Slowest s")


def _numbers(row: Row) -> list[str]:
    stores = [f"{row.stored:,}", str(row.refused), str(row.lost), f"{row.slowest_store:.2f}"]
    peaks = [f"{peak / (1 << 20):.0f}" if peak else "" for peak in (row.vault_peak, row.command_peak)]
    start = [f"{row.seconds:.2f}", *peaks, f"{row.vault_cpu:.1f}", f"{row.load:.1f}"]
    return start + (stores if row.stored or row.refused else [""] * 4)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.admin", description="An admin's commands, timed.")
    parser.add_argument("--store", type=Path, required=True, metavar="CONFIG", help="a store's configuration file")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"of {', '.join(s.name for s in STEPS)}; all")
    parser.add_argument("--json", type=Path, help="write raw figures")
    parser.add_argument("--rate", type=float, default=20.0, help="objects stored a second, where some are (20)")
    arguments = parser.parse_args(given)
    names = [name.strip() for name in arguments.only.split(",") if name.strip()]
    if unknown := set(names) - {s.name for s in STEPS}:
        parser.error(f"--only: unknown: {', '.join(sorted(unknown))}")
    arguments.steps = [s for s in STEPS if not names or s.name in names]
    return arguments


def main(given: list[str] | None = None) -> int:
    """Run the steps and report; return an exit status."""
    arguments = _arguments(given)
    config = arguments.store.absolute()
    rows: list[Row] = []
    # Shares must not reach a disk; the rest lies beside the store, on its file system.
    memory = Path("/dev/shm") / f"strongroom-{secrets.token_hex(4)}"
    memory.mkdir(mode=0o700)
    scratch = Path(tempfile.mkdtemp(prefix="admin-", dir=config.parent.parent))
    runner = Runner(config, Places(config, scratch, memory), arguments.rate)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        for step in arguments.steps:
            rows.append(runner.step(step))
            print(f"{rows[-1].name}: {rows[-1].outcome}, {rows[-1].seconds:.2f} s {rows[-1].said}", file=sys.stderr)
        counts = json.loads(strongroom(config, "status", "--json")).get("counts", {})
    finally:
        with suppress(KeyboardInterrupt):
            runner.close()
        shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    console.print(table(rows))
    if arguments.json:
        figures = {"machine": measure.machine(), "store": counts, "steps": [row._asdict() for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(row.outcome in {"done", "not there"} and not row.refused and not row.lost for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
