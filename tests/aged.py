"""A store with a past, for tests of retention: a gate and a vault in this process, receptions and days as one likes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import scu
from conftest import Server
from test_erase import House

from storage import attributes
from storage.retentionrules import Rule
from storescp.control import Request
from storescp.vault import retain
from storescp.vault.api.quarantine import Quarantine
from storescp.vault.holding import Hold
from storescp.vault.retain import Retain

ROOT = Path(__file__).resolve().parent.parent
UNTIL = "2026-01-31"


class Day:
    """The day that retention believes in, and whether the system says that its clock is synchronised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, today: str) -> None:
        self.today = date.fromisoformat(today)
        self.synchronised: bool | None = True
        monkeypatch.setattr(retain, "today", lambda: self.today)
        monkeypatch.setattr(retain, "clock_is_synchronised", lambda: self.synchronised)

    def set(self, today: str) -> None:
        self.today = date.fromisoformat(today)


class Aged(House):
    """A house whose store was made in 2010, with a rule: ten years for everything, a grace of ten days."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        settings = self.config.settings.retention
        settings.rules, settings.grace = [Rule(name="ten years", keep="P10Y")], "P10D"
        settings.most_studies, settings.most_percent = 100, 100
        ring = self.vault.unlocked().ring
        ring.body.versions[0].created = "2010-01-01T00:00:00Z"
        ring.write(self.config.keyring)

    @property
    def retain(self) -> Retain:
        return Retain(self.vault)

    def receive(
        self, study: str, n: int = 1, *, received: str = "2015-06-15", patient: str = "P", issuer: str = "",
        born: str = "19500101", content: bytes = b"pixels",
    ) -> str:  # fmt: skip
        """Deposit an instance that was received on a day; return its pack's name."""
        record = self.gate.begin(study, "CT1")
        record.write(memoryview(content))
        name: str = record._pack.name
        uids = {attributes.SOP_CLASS: scu.CT_IMAGE, attributes.SOP_INSTANCE: f"{study}.{n}", attributes.STUDY: study}
        elements = {tag: attributes.Element("UI", [uid]) for tag, uid in (uids | {attributes.SERIES: "1.2.4"}).items()}
        for tag, vr, text in (
            ("00080060", "CS", "CT"), ("00100020", "LO", patient), ("00100021", "LO", issuer), ("00100030", "DA", born),
        ):  # fmt: skip
            if text:
                elements[tag] = attributes.Element(vr, [text])
        at = attributes.Received(f"{received}T12:00:00.000000Z", "", "CT1", "STRONGROOM", "", "")
        record.finish(attributes.encode(attributes.Attributes(1, "1.2.840.10008.1.2", elements, {}, at)))
        return name

    def run(self, *, confirm: bool = False) -> list[dict[str, Any]]:
        return list(self.retain.run(1000, confirm=confirm))

    def said(self, *, confirm: bool = False) -> str:
        """Run, and return what the run said."""
        return "; ".join(event["text"] for event in self.run(confirm=confirm) if event["kind"] == "step")

    def plan(self, on: str = "") -> dict[str, tuple[str, str]]:
        """Return what becomes of each study, and what a run does with it."""
        events = list(self.retain.plan(date.fromisoformat(on) if on else None, everything=True))
        return {e["study"]: (e["becomes"], e["run"]) for e in events if e["kind"] == "study"}

    def totals(self) -> dict[str, Any]:
        return list(self.retain.plan())[-1]

    def pending(self) -> set[str]:
        return {p.study for p in self.retain.pending() if not p.kept_until}

    def held_studies(self) -> set[str]:
        rows = self.vault.unlocked().index._db.execute("SELECT DISTINCT study FROM instance").fetchall()
        return {str(row[0]) for row in rows}

    def certificates(self) -> int:
        folder = self.config.store_path / "certificates"
        return len(list(folder.glob("*.json"))) if folder.exists() else 0


def on(study: str = "", patient_id: str = "", issuer: str = "") -> Hold:
    """Return a hold to place."""
    return Hold("", "court order", "12 O 34/26", 1000, "", study, patient_id, issuer)


def decide(aged: Aged, item: dict[str, Any], kind: str) -> None:
    """Decide about something in quarantine, as an admin does."""
    body = f'{{"id": "{item["id"]}", "kind": "{kind}", "reason": "a test"}}'.encode()
    Quarantine(aged.vault)._resolve(Request("POST", "/v1/quarantine", body, 1000))


def make_archive(home: Path, studies: int, seed: int = 7) -> None:
    """Make a store of ten years until 2026-01-31 with the benchmarks' generator."""
    command = [sys.executable, "-m", "benchmarks.archive", "make", "--to", home, "--list", home.parent / "list"]
    options = ["--studies", str(studies), "--seed", str(seed), "--until", UNTIL]
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=110)


def make_empty(home: Path) -> Path:
    """Make a store with nothing in it, to be copied."""
    home.mkdir()
    Server(home).init()
    return home


def copy_archive(made: Path, make_server: Callable[[], Server]) -> Server:
    """Return a server on a copy of a store that was made."""
    server = make_server()
    shutil.copytree(made, server.home, dirs_exist_ok=True)
    server.config.write_text(server.config.read_text().replace(str(made), str(server.home)))
    return server
