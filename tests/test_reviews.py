"""The weekly review of a real server: asked for, written as a page, and kept by the schedule."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from xml.etree import ElementTree

import scu
from conftest import Server, send
from pydicom.data import get_testdata_file
from test_accountable import CT, events, of_type, refused, wait_event

MR = Path(str(get_testdata_file("MR_small.dcm")))


def test_a_review_tells_of_refusals_and_volume_names_no_study_and_is_kept_by_the_schedule(server: Server) -> None:
    for _ in range(11):
        refused(server)
    assert send(server, [CT, MR]) == [0, 0]
    ended = wait_event(server, "association-ended", 2)
    wait_event(server, "connection-refused")
    told = sum(event["count"] for event in events(server, "connection-refused"))
    # The day of the last one: the test may run over a midnight.
    week = ended[-1]["time"][:10]
    html = server.home / "review.html"
    done = server.run("audit", "review", "--week", week, "--html", html)
    assert done.status == 6, (done.out, done.err)
    assert f"! {told} connections of CT9 refused; never in the 8 weeks before" in done.out
    assert "2 instances stored by 1 of 1 peer" in done.out
    root = ElementTree.fromstring(html.read_text())
    assert "CT1" in {cell.text for cell in root.iter("td")}
    assert stat.S_IMODE(html.stat().st_mode) == 0o600
    found = server.run("audit", "review", "--week", week, "--json")
    document = json.loads(found.out)
    assert (found.status, document["format"], document["peers"][0]["instances"]) == (6, 1, [0] * 8 + [2])
    for content in (done.out, html.read_text(), found.out):
        assert not any(scu.read(file).study in content for file in (CT, MR))
    # The numbers lead to the records.
    [flag] = [flag for flag in document["flags"] if flag["kind"] == "refused"]
    shown = server.ok("audit", "show", "--after", str(flag["record"] - 1), "--json").out.splitlines()[0]
    assert "connection-refused" in {event["type"] for event in json.loads(shown)["events"]}

    # By the schedule: last week, of which there is nothing to say, and the oldest go.
    folder = server.store / "reviews"
    folder.mkdir()
    for number in range(61):
        for suffix in ("txt", "html"):
            (folder / f"review-2020-{1 + number // 28:02}-{1 + number % 28:02}.{suffix}").touch()
    (folder / "notes.txt").touch()
    server.ok("jobs", "run", "review")
    kept = sorted(path.name for path in folder.iterdir())
    assert (len(kept), "notes.txt" in kept, kept[1:3]) == (
        121,
        True,
        ["review-2020-01-03.html", "review-2020-01-03.txt"],
    )
    [made] = [path for path in folder.glob("*.txt") if "2020" not in path.name and path.name != "notes.txt"]
    assert "NOTHING UNUSUAL" in made.read_text()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (made, made.with_suffix(".html"))} == {0o600}
    reads = [record.get("review", "") for record in of_type(server, "audit-read")]
    assert made.name == f"review-{reads[-2]}.txt"
    assert sum(bool(review) for review in reads) == 3
    # Locked, nothing is told.
    server.ok("lock")
    assert server.run("audit", "review").status == 4
