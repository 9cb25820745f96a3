"""Numbers for monitoring: counted without loss, written and read without belief, and served in Prometheus's format."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storescp import metricssettings, snapshot
from storescp.config import Config, Settings, Store, parse_address
from storescp.errands import exposition, metrics
from storescp.errands.exposition import FAMILIES
from storescp.errors import StrongroomError
from storescp.gate import meter
from storescp.gate.meter import BUCKETS, Counted, Meter
from storescp.gate.numbers import Numbers
from storescp.gate.status import Reason
from storescp.metricssettings import MetricsSettings
from storescp.snapshot import (
    Disk,
    Ends,
    GateNumbers,
    Inside,
    Job,
    Key,
    Pace,
    Patches,
    Received,
    VaultNumbers,
    Writer,
)

DOCS = Path(__file__).parents[3] / "docs"
NOW = 1_800_000_000.0
KEY = "ed25519:" + "A" * 43 + "="


def config(folder: Path, listen: str = "127.0.0.1:0", seconds: int = 15) -> Config:
    store = Store(path=str(folder), anchors=str(folder), spool=str(folder / "spool"), signing_key=KEY)
    return Config(folder / "c.toml", Settings(store=store, metrics=MetricsSettings(listen=listen, seconds=seconds)))


def gate(**changes: Any) -> GateNumbers:
    numbers = GateNumbers(
        started=NOW - 1000, workers=2, latency=[1, 2, *[0] * (len(BUCKETS) - 1)], latency_seconds=0.02, time=NOW,
        every=15.0, ready=1, restarts=1, connections=3, room=-5, turned_away={"handshake": 4},
        peers={"CT1": Received(2, 3, 4096, {"MISMATCH": 1, meter.UNRECOGNIZED: 1}, NOW - 60), 'a"\n': Received(1)},
        certificates=[Ends("server", "server.pem", NOW + 86400)],
    )  # fmt: skip
    return msgspec.structs.replace(numbers, **changes)


def vault(**changes: Any) -> VaultNumbers:
    numbers = VaultNumbers(
        format=1, time=NOW, every=15.0, started=NOW - 900, locked_since=NOW - 800, packs=2, bytes=8192, lag=12.5,
        disks={"store": Disk(1, 2)}, slots=1, audit_fault=False, alerts={"critical": {"total-loss": 1}},
        jobs=[Job("scrub", "findings", NOW - 50, 1.5, True, False), Job("patch", "", 0.0, 0.0, False, True)],
        patches=Patches(NOW - 5, {"breach": 1}, {"high": NOW - 86400}),
        inside=Inside([Key(1, "current", NOW - 9)], {"studies": 1, "instances": 2, "packs": 1, "unreadable": 0},
                      {"CT1": NOW - 30, "MR1": NOW - 40}, 0, NOW - 3, NOW - 4, [Ends("store", "authority", NOW + 1)]),
    )  # fmt: skip
    return msgspec.structs.replace(numbers, **changes)


def parsed(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return an exposition's samples by name and labels; anything outside of the format's grammar is a failure."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    family, types = "", dict[str, str]()
    assert text.endswith("\n")
    for line in text.splitlines():
        if words := re.fullmatch(r"# HELP ([a-z_]+) [ -\[\]-~]+", line):
            assert words[1] not in types
            family = words[1]
        elif words := re.fullmatch(r"# TYPE ([a-z_]+) (gauge|counter|histogram)", line):
            assert words[1] == family
            types[family] = words[2]
        else:
            words = re.fullmatch(r"([a-z_]+)(?:\{((?:[a-z]+=\"(?:[^\"\\\n]|\\[\\n\"])*\",?)+)\})? (-?[0-9.e+-]+)", line)
            assert words, line
            suffixes = ("_bucket", "_sum", "_count") if types[family] == "histogram" else ("",)
            assert words[1] in {family + suffix for suffix in suffixes}, line
            labels = tuple(re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', words[2] or ""))
            assert labels not in found.setdefault(words[1], {}), line
            found[words[1]][labels] = float(words[3])
    return found


# --- counting


def test_what_live_and_ended_associations_did_is_told_once_and_whole() -> None:
    counted = Meter(wanted=True)
    first, second = counted.begin("CT1"), counted.begin("CT1")
    first.stored(100)
    first.answered(0.004)
    second.refuse("MISMATCH")
    second.answered(1000.0)
    buckets = [1, *[0] * (len(BUCKETS) - 1), 1]
    assert counted.take() == [Counted("CT1", 2, 1, 100, {"MISMATCH": 1}, 1000.004, buckets)]
    assert counted.take() == []
    second.refuse("MISMATCH")
    counted.end(second)
    counted.turned_away(meter.HANDSHAKE)
    nothing = [0] * (len(BUCKETS) + 1)
    assert counted.take() == [
        Counted("", refused={"handshake": 1}), Counted("CT1", refused={"MISMATCH": 1}, buckets=nothing)
    ]  # fmt: skip
    first.stored(1)
    counted.end(first)
    assert [c.objects for c in counted.take()] == [1]
    assert counted.take() == []


def test_nothing_is_kept_where_nobody_takes_it() -> None:
    counted = Meter(wanted=False)
    for _ in range(3):
        counted.end(counted.begin("CT1"))
    assert (counted.take(), counted._live, counted._ended) == ([], set(), [])


def test_what_is_added_while_another_thread_takes_is_neither_lost_nor_counted_twice() -> None:
    counted, each, threads = Meter(wanted=True), 2000, 4

    def work() -> None:
        for _ in range(4):
            count = counted.begin("CT1")
            for _ in range(each // 4):
                count.stored(10)
                count.answered(0.01)
            counted.end(count)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    taken = []
    while any(worker.is_alive() for worker in workers):
        taken += counted.take()
    taken += counted.take()
    assert sum(c.objects for c in taken) == each * threads
    assert sum(c.bytes for c in taken) == 10 * each * threads
    assert sum(sum(c.buckets) for c in taken) == each * threads
    assert sum(c.associations for c in taken) == 4 * threads


@pytest.mark.parametrize(("seconds", "place"), [(0.0, 0), (0.005, 0), (0.0051, 1), (300.0, -2), (300.1, -1)])
def test_a_time_belongs_to_the_first_bucket_that_holds_it(seconds: float, place: int) -> None:
    count = Meter(wanted=True).begin("CT1")
    count.answered(seconds)
    assert count.buckets[place] == sum(count.buckets) == 1


def test_a_gates_sums_never_fall_and_hold_only_names_that_there_can_be(tmp_path: Path) -> None:
    made = config(tmp_path)
    numbers = Numbers(made, 2)
    buckets = [1, *[0] * len(BUCKETS)]
    for counted in (
        Counted("CT1", 1, 2, 30, {"MISMATCH": 1, "of my own": 7}, 0.5, buckets),
        # Another worker, after the first one died.
        Counted("CT1", 1, 1, 10, {"MISMATCH": 2}, 0.5, buckets),
        Counted("", refused={"handshake": 3, "listener": 9, "else": 1}),
        Counted("tab\t", 1),
        Counted(" ", 1),
        Counted("MR1", 1, buckets=[1]),
    ):
        numbers.add(counted)
    numbers.turned_away(meter.LISTENER)
    numbers.restarted()
    numbers.turn(ready=1, connections=4, receiving=True, room=7)
    found = snapshot.read(made, "gate", GateNumbers)
    assert found is not None
    assert found.turned_away == {"listener": 1, "handshake": 3, "request": 0}
    assert list(found.peers) == ["CT1", "MR1"]
    received = found.peers["CT1"]
    assert (received.associations, received.objects, received.bytes, received.refused) == (2, 3, 40, {"MISMATCH": 3})
    assert (found.latency[0], found.latency_seconds, found.restarts, found.ready) == (2, 1.0, 1, 1)
    before = snapshot.file_of(made, "gate").stat()
    numbers.turn(ready=0, connections=0, receiving=False, room=0)
    assert snapshot.file_of(made, "gate").stat().st_ino == before.st_ino


def test_without_metrics_a_gate_writes_nothing(tmp_path: Path) -> None:
    made = config(tmp_path, listen="")
    Numbers(made, 2).turn(ready=1, connections=4, receiving=True, room=7)
    assert not made.metrics.exists()


def test_what_takes_long_is_done_seldom() -> None:
    pace = Pace(15)
    assert pace.due(0)
    pace.done(100, 100.1)
    assert (pace.due(114.9), pace.due(115), pace.every) == (False, True, 15)
    pace.done(200, 202)
    assert (pace.due(399), pace.due(400), pace.every) == (False, True, 200)


# --- files


def test_what_is_written_is_read_whatever_the_umask_and_by_the_group(tmp_path: Path) -> None:
    made = config(tmp_path)
    before = os.umask(0o077)
    try:
        for numbers in (gate(), vault()):
            process = "gate" if isinstance(numbers, GateNumbers) else "vault"
            for _ in range(2):
                Writer(made, process).write(numbers)
            assert snapshot.read(made, process, type(numbers)) == numbers
            file = snapshot.file_of(made, process)
            assert file.stat().st_mode & 0o777 == 0o640
            assert [path.name for path in file.parent.iterdir()] == ["numbers.json"]
    finally:
        os.umask(before)


def test_a_folder_that_refuses_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").write_text("no folder")
    writer = Writer(config(tmp_path), "gate")
    for _ in range(3):
        writer.write(gate())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["missing", "link", "fifo", "folder", "long", "future"])
def test_what_is_no_file_of_this_format_is_not_read(tmp_path: Path, kind: str) -> None:
    made = config(tmp_path)
    Writer(made, "gate").write(gate())
    file = snapshot.file_of(made, "gate")
    content = file.read_bytes()
    file.unlink()
    match kind:
        case "link":
            (tmp_path / "other").write_bytes(content)
            file.symlink_to(tmp_path / "other")
        case "fifo":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "long":
            file.write_bytes(content + b" " * (4 << 20))
        case "future":
            file.write_bytes(content.replace(b'"format":1', b'"format":2'))
    assert snapshot.read(made, "gate", GateNumbers) is None


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.one_of(
    st.binary(max_size=50),
    st.builds(lambda key, value: json.dumps(json.loads(msgspec.json.encode(gate())) | {key: value}).encode(),
              st.sampled_from([field.name for field in msgspec.structs.fields(GateNumbers)]), anything),
))  # fmt: skip
def test_any_file_is_read_to_an_exposition(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    made = config(tmp_path_factory.getbasetemp() / "any")
    file = snapshot.file_of(made, "gate")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    assert "strongroom_up" in parsed(exposition.text(snapshot.read(made, "gate", GateNumbers), None, 1, NOW))


@pytest.mark.needs_root
def test_the_folders_of_two_users_are_each_ones_own_and_the_gates_group_reads_both(tmp_path: Path) -> None:
    made = config(tmp_path)
    (tmp_path / "spool").mkdir()
    for _ in range(2):
        snapshot.prepare(made, 1, "nobody")
    found = [snapshot.file_of(made, process).parent.stat() for process in ("vault", "gate")]
    nobody = pwd.getpwnam("nobody").pw_uid
    assert [(f.st_uid, f.st_mode & 0o7777) for f in found] == [(1, 0o2750), (nobody, 0o2750)]
    assert found[0].st_gid == found[1].st_gid


def test_a_patch_report_becomes_counts_and_dates_of_what_is_not_applied() -> None:
    items = [
        {"state": "ok", "severity": "", "since": None, "candidate": "", "name": "x"},
        {"state": "due", "severity": "high", "since": "2026-03-02T00:00:00Z", "candidate": "2"},
        {"state": "breach", "severity": "high", "since": "2026-03-01T00:00:00Z", "candidate": "2"},
        {"state": "ok", "severity": "low", "since": "2026-01-01T00:00:00Z", "candidate": ""},
        {"state": "unknown", "severity": "", "since": None},
    ]
    found = snapshot.patches_of(json.dumps({"made": "2026-03-03T00:00:00Z", "items": items, "more": 1}).encode())
    assert found.states == {"ok": 2, "due": 1, "breach": 1, "unknown": 1}
    assert {severity: found.made - since for severity, since in found.oldest.items()} == {"high": 2 * 86400}


# --- what is served


def test_the_whole_table_is_served_in_the_format() -> None:
    found = parsed(exposition.text(gate(), vault(), 9, NOW))
    names = {re.sub("_(bucket|sum|count)$", "", name) if "duration_seconds_" in name else name for name in found}
    assert names == {f"strongroom_{name}" for name in FAMILIES}
    assert found["strongroom_store_objects_total"][("peer", "CT1"),] == 3
    assert found["strongroom_associations_total"][("peer", r"a\"\n"),] == 1
    assert found["strongroom_store_refused_total"] == {
        (("peer", "CT1"), ("reason", "mismatch"), ("status", "A900")): 1,
        (("peer", "CT1"), ("reason", "unrecognized_operation"), ("status", "0211")): 1,
    }
    buckets = list(found["strongroom_store_duration_seconds_bucket"].values())
    assert (buckets[:2], buckets[-1], len(buckets)) == ([1, 3], 3, len(BUCKETS) + 1)
    # The later of what the gate saw and what the vault admitted.
    assert found["strongroom_last_store_timestamp_seconds"] == {
        (("peer", "CT1"),): NOW - 30, (("peer", "MR1"),): NOW - 40
    }  # fmt: skip
    results = found["strongroom_job_last_result"]
    assert {dict(labels)["result"]: value for labels, value in results.items()} == {
        "ok": 0, "findings": 1, "failed": 0, "refused": 0
    }  # fmt: skip


def test_every_reason_of_a_refusal_has_its_status() -> None:
    peers = {"CT1": Received(refused=dict.fromkeys(Reason.__members__, 1))}
    found = parsed(exposition.text(gate(peers=peers), None, 1, NOW))["strongroom_store_refused_total"]
    assert {dict(labels)["reason"]: dict(labels)["status"] for labels in found} == {
        reason.name.lower(): f"{reason.status:04X}" for reason in Reason
    }


@pytest.mark.parametrize(
    ("age", "every", "up"), [(0, 15, 1), (60, 15, 1), (61, 15, 0), (400, 100, 1), (401, 100, 0), (-9, 1, 1)]
)
def test_numbers_of_a_process_that_stands_still_are_left_out(age: float, every: float, up: int) -> None:
    found = parsed(exposition.text(gate(time=NOW - age, every=every), None, 1, NOW))
    assert found["strongroom_up"] == {(("process", "gate"),): up, (("process", "vault"),): 0}
    assert ("strongroom_store_objects_total" in found) == bool(up)
    assert "strongroom_snapshot_timestamp_seconds" in found


def test_a_locked_vault_tells_what_needs_no_key() -> None:
    found = parsed(exposition.text(None, vault(inside=None), 1, NOW))
    assert found["strongroom_locked"] == {(): 1}
    assert {"strongroom_deposits_waiting", "strongroom_disk_free_bytes", "strongroom_job_overdue"} <= set(found)
    assert not {"strongroom_studies", "strongroom_key_version_created_timestamp_seconds"} & set(found)


# --- dashboard and rules


def expressions() -> dict[str, str]:
    """Return every expression of the dashboard and the rules, by where it stands."""
    board = json.loads((DOCS / "metrics" / "dashboard.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }
    for rule in rules():
        found[rule["alert"]] = rule["expr"]
    return found


def rules() -> list[dict[str, str]]:
    """Return the rules; the file is written in a part of YAML that these lines describe, and in no other."""
    lines = [line for line in (DOCS / "metrics" / "rules.yml").read_text().splitlines() if line.strip()]
    lines = [line for line in lines if not line.strip().startswith("#")]
    assert lines[:3] == ["groups:", "  - name: strongroom", "    rules:"]
    found: list[dict[str, str]] = []
    for line in lines[3:]:
        words = re.fullmatch(
            r"      (- alert|  expr|  for|  labels|  annotations|    severity|    summary):(?: (.+))?", line
        )
        assert words, line
        key, value = words[1].strip(" -"), words[2] or ""
        # A plain scalar says what it says.
        quoted = value.startswith('"') and value.endswith('"') and '"' not in value[1:-1] and "\\" not in value
        assert quoted or not re.search(r"^[\"'{\[&*!|>%@`#-]|: | #", value), line
        if key == "alert":
            found.append({})
        assert key not in found[-1], line
        found[-1][key] = value
    return found


def test_dashboard_and_rules_use_names_and_labels_that_there_are() -> None:
    known = parsed(exposition.text(gate(), vault(), 9, NOW))
    labels = {
        name: {label for pairs in samples for label, _ in pairs} | {"instance"} for name, samples in known.items()
    }
    values = {(label, value) for samples in known.values() for pairs in samples for label, value in pairs}
    used = set()
    for where, expression in expressions().items():
        assert expression.count("(") == expression.count(")"), where
        for name, selector in re.findall(r"(strongroom_[a-z_]+)(\{[^}]*\})?", expression):
            assert name in known, (where, name)
            used.add(name)
            for label, _, value in re.findall(r'([a-z]+)(=~|!=|=)"([^"]*)"', selector):
                assert label in labels[name], (where, name, label)
                given_values = [v for v in value.split("|") if not v.startswith("$")]
                assert all(
                    (label, v) in values or label in {"kind", "result", "state", "severity"} for v in given_values
                )
        by = {label for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in re.split(", *", group)}
        names = set(re.findall(r"strongroom_[a-z_]+", expression))
        assert all(any(label in labels[name] for name in names) for label in by), where
    # What is counted is looked at somewhere; of these the value is a matter of course.
    assert set(known) - used == {
        "strongroom_snapshot_timestamp_seconds", "strongroom_start_time_seconds",
        "strongroom_store_duration_seconds_sum", "strongroom_store_duration_seconds_count",
        "strongroom_locked_since_timestamp_seconds",
    }  # fmt: skip


def test_every_rule_has_a_severity_and_says_what_is_wrong() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) > 15
    for rule in found:
        assert {"alert", "expr", "severity", "summary"} <= set(rule), rule
        assert rule["severity"] in {"critical", "warning"}
        assert re.fullmatch(r"[0-9]+[mh]", rule.get("for", "1m"))


def test_panels_of_the_dashboard_lie_beside_each_other() -> None:
    board = json.loads((DOCS / "metrics" / "dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_metric_is_in_the_docs() -> None:
    page = (DOCS / "metrics.md").read_text()
    assert set(re.findall(r"`strongroom_([a-z_]+)", page)) >= set(FAMILIES)
    assert set(re.findall(r"`strongroom_([a-z_]+)", page)) <= set(FAMILIES)


# --- the listener


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, int]]:
    made = config(tmp_path)
    Writer(made, "gate").write(gate(time=snapshot.now()))
    stop = threading.Event()
    with metrics.Listener(made) as listener:

        def serve() -> None:
            while not stop.is_set():
                listener.serve(0.05)

        thread = threading.Thread(target=serve)
        thread.start()
        yield parse_address(listener.address)
        stop.set()
        thread.join()


def ask(address: tuple[str, int], request: bytes) -> tuple[int, dict[str, str], bytes]:
    with socket.create_connection(address, 30) as connection:
        connection.sendall(request)
        content = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                content += part
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert int(headers["content-length"]) in {len(body), *([int(headers["content-length"])] if not body else [])}
    return int(first.split(" ")[1]), headers, body


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics?a=b HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
        (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /metrics/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"DELETE /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\x05hello\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 9000, 431),
    ],
)
def test_the_listener_answers_one_path_and_nothing_else(served: tuple[str, int], request_: bytes, status: int) -> None:
    found, headers, body = ask(served, request_)
    assert (found, headers["connection"]) == (status, "close")
    if found == 200:
        assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert bool(body) != request_.startswith(b"HEAD")
        if body:
            assert parsed(body.decode())["strongroom_up"][("process", "gate"),] == 1


def test_who_comes_while_all_places_are_taken_is_closed_and_served_when_one_is_free(served: tuple[str, int]) -> None:
    waiting = [socket.create_connection(served, 30) for _ in range(8)]
    with socket.create_connection(served, 30) as ninth:
        assert ninth.recv(1) == b""
    for connection in waiting:
        connection.close()
    # A thread may take its time to see that its peer is gone.
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            if ask(served, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200:
                break


def test_an_address_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StrongroomError, match=r"metrics\.listen"):
            metrics.Listener(config(tmp_path, listen=listen))


def test_without_an_address_there_is_no_listener(tmp_path: Path) -> None:
    with pytest.raises(StrongroomError, match="no metrics are configured"):
        metrics.run(config(tmp_path, listen=""))


@pytest.mark.parametrize(
    ("listen", "seconds", "told"),
    [
        ("", 15, []),
        ("[::1]:9464", 1, []),
        ("localhost:9464", 15, ["metrics.listen: 'localhost:9464' is no address with a port, as in 127.0.0.1:9464"]),
        ("127.0.0.1:1", 0, ["metrics.seconds: must be from 1 to 300"]),
        ("127.0.0.1:1", 301, ["metrics.seconds: must be from 1 to 300"]),
    ],
)
def test_settings_are_checked(listen: str, seconds: int, told: list[str]) -> None:
    assert metricssettings.check(MetricsSettings(listen=listen, seconds=seconds), parse_address) == told
