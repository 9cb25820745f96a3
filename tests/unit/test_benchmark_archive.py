"""The benchmark's archive: fifty studies, really made, and the product cannot tell how they came in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from keys import keyring, slots
from keys.anchors import FileAnchors
from storage.sqlite import connect
from storescp.config import load

ROOT = Path(__file__).resolve().parent.parent.parent
PLAN = ("--studies", "50", "--seed", "7", "--until", "2026-01-31")


def run(*words: str | Path) -> str:
    """Run a module of this tree; it must work."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, (words, done.returncode, done.stderr)
    return done.stdout


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("archive") / "store"
    run("benchmarks.archive", "make", "--to", home, "--list", home.parent / "list", *PLAN)
    return home


def strongroom(home: Path, *words: str) -> Any:
    return json.loads(run("storescp", "--config", home / "strongroom.toml", *words, "--json"))


def rows(home: Path) -> dict[str, list[Any]]:
    """Return every row of the index, however it came there."""
    config = load(home / "strongroom.toml")
    ring = keyring.unlock(config.keyring, slots.read_key_file(home / "store.key"), FileAnchors(config.anchors))
    database = connect(config.index(1), ring.current().index_key())
    try:
        return {
            table: sorted(database.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in ("pack", "study", "series", "instance", "unreadable", "meta")
        }
    finally:
        database.conn.close()
        ring.forget()


def test_what_was_planned_is_held_opens_and_was_received_years_ago(made: Path) -> None:
    planned = {one["study"]: one for one in lines((made.parent / "list").read_text())}
    assert len(planned) == 50
    verified = strongroom(made, "verify")
    assert (verified["findings"], verified["packs"]) == ([], 50)
    assert verified["records"] == sum(one["instances"] for one in planned.values())
    instances = strongroom(made, "list", "instance")["items"]
    assert Counter(i["study"] for i in instances) == {uid: one["instances"] for uid, one in planned.items()}
    for found in instances:
        one = planned[found["study"]]
        said = (found["received_at"], found["calling"], found["patient_id"], found["study_date"], found["modality"])
        assert said == tuple(one[k] for k in ("received_at", "calling", "patient_id", "study_date", "modality"))


def test_a_record_takes_one_page_and_a_pack_tells_nothing_by_its_name_and_times(made: Path) -> None:
    instances = sorted(one["instances"] for one in lines((made.parent / "list").read_text()))
    packs = [path.stat() for path in (made / "store" / "objects").rglob("*") if path.is_file()]
    assert sorted(-(-found.st_size // 4096) - 1 for found in packs) == instances
    assert {(found.st_mode & 0o777, found.st_mtime) for found in packs} == {(0o400, 946_684_800)}


def test_reindex_makes_the_rows_that_the_generator_wrote(made: Path) -> None:
    written = rows(made)
    assert len(written["study"]) == 50
    run("storescp", "--config", made / "strongroom.toml", "reindex")
    assert rows(made) == written


def test_a_plan_is_repeatable_and_holds_every_kind_of_patient_and_date(made: Path) -> None:
    assert run("benchmarks.archive", "plan", *PLAN) == (made.parent / "list").read_text()
    planned = lines(run("benchmarks.archive", "plan", "--studies", "3000", "--until", "2026-01-31"))
    assert {one["date_is"] for one in planned} == {"normal", "missing", "malformed", "old", "future"}
    assert {one["modality"] for one in planned} == {"CR", "US", "CT", "MR", "MG", "XA", "OT"}
    received = [one["received_at"] for one in planned]
    assert received == sorted(received)
    assert "2016-01-30" <= received[0] < "2016-02-15"
    assert "2026-01-15" <= received[-1] < "2026-01-31"
    born = {one["birth_date"] for one in planned}
    assert "" in born
    # Still under 18 at the end, and grown up long before the beginning.
    assert max(born) > "20080131"
    assert min(born - {""}) < "19400101"


def test_the_runner_times_a_command_and_says_what_came_out(made: Path, tmp_path: Path) -> None:
    store = made / "strongroom.toml"
    shown = run("benchmarks.admin", "--store", store, "--only", "status alone", "--json", tmp_path / "figures")
    assert "status alone" in shown
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["store"]["studies"] == 50
    assert [(row["name"], row["outcome"], row["lost"]) for row in figures["steps"]] == [("status alone", "done", 0)]
