"""The benchmark of queries: a small index, really made, and every question finds what it is about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# They ask for what not each study has, or somebody sees.
MAYBE = {"the same, one AE title's", "the same, one modality's", "CTs of a day"}


def test_every_question_is_asked_of_an_index_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.query", "--instances", "300", "--values", "3"]
    places = ["--scratch", str(tmp_path), "--json", str(figures)]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "instances: 300" in done.stdout
    assert list(tmp_path.iterdir()) == [figures]
    found = json.loads(figures.read_text())
    rows = {row["name"]: row["rows"] for row in found["queries"] if row["name"] not in MAYBE}
    assert len(rows) > 10
    assert {name for name, count in rows.items() if not count} == {"a name that nobody has"}
