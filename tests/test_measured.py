"""A real server counts what it does, also while locked and past a worker's death, and tells no patient of it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scu
from conftest import START_SECONDS, Server, changed, send
from pydicom.data import get_testdata_file

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
UNIT = Path(__file__).parent.parent / "systemd" / "strongroom-metrics.service"


class Scraper:
    """Scrapes a server until it says what is waited for."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.text = ""

    def scrape(self) -> dict[str, float]:
        """Return the samples by name and labels as they are written."""
        with urllib.request.urlopen(self._address, timeout=START_SECONDS) as response:
            self.text = response.read().decode()
        pairs = (line.rpartition(" ") for line in self.text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("strongroom_"): float(value) for name, _, value in pairs}

    def wait(self, **wanted: float) -> dict[str, float]:
        """Scrape until samples have values, their names and labels with ``_`` between. Outside there is no event."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            found = self.scrape()
            seen = {re.sub(r"\W+", "_", name).strip("_"): value for name, value in found.items()}
            if wanted.items() <= seen.items():
                return found
            assert time.monotonic() < deadline, ({name: seen.get(name) for name in wanted}, self.text)
            time.sleep(0.1)


@pytest.fixture
def metered(make_server: Callable[[], Server]) -> Iterator[tuple[Server, Scraper]]:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.set("gate", pack_idle_seconds=1, workers=1)
    server.set("metrics", listen="127.0.0.1:0", seconds=1)
    server.start()
    yield server, Scraper(server.wait_log(r"metrics on (http://\S+)")[1])


@pytest.fixture
def home() -> Iterator[Path]:
    # pytest's own folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="strongroom-metrics-"))
    folder.chmod(0o755)
    yield folder / "s"
    shutil.rmtree(folder)


def test_a_server_tells_what_it_received_refused_and_holds(metered: tuple[Server, Scraper], tmp_path: Path) -> None:
    server, scraper = metered
    context = scu.tls(server.home / "issued" / "CT1")
    wrong = scu.read(CT)._replace(sop_instance="1.2.3")
    assert send(server, [CT, MR]) == [0, 0]
    assert scu.send(server.port, context, [wrong]) == [0xA900]
    stranger = scu.request(server.port, context, [wrong.context], calling="NOBODY")
    assert stranger.is_rejected
    found = scraper.wait(store_objects_total_peer_CT1=2, instances=2, deposits_waiting=0)
    size = sum(len(scu.read(file).data) for file in (CT, MR))
    assert found['store_bytes_total{peer="CT1"}'] == size
    assert found['store_refused_total{peer="CT1",reason="mismatch",status="A900"}'] == 1
    assert found['associations_total{peer="CT1"}'] == 3
    assert found['connections_refused_total{where="request"}'] == 1
    assert found["store_duration_seconds_count"] == 3
    assert found["store_duration_seconds_sum"] > 0
    assert (found["locked"], found["studies"], found["quarantined"], found["receiving"]) == (0, 2, 0, 1)
    assert found['up{process="gate"}'] == found['up{process="vault"}'] == 1
    assert abs(found['last_store_timestamp_seconds{peer="CT1"}'] - time.time()) < 3600
    kinds = dict(re.findall(r'certificate_expiry\S+\{kind="(\w+)",name="([^"]+)"\}', scraper.text))
    assert kinds == {"server": "server.pem", "authority": "ca.pem", "peer": "CT1", "store": "authority"}
    assert server.ok("metrics", "--once").out.count("# TYPE") == scraper.text.count("# TYPE")

    # A worker that dies takes nothing along that was told, and the next one adds to it.
    [worker] = server.pids("gate-worker")
    os.kill(worker, signal.SIGKILL)
    scraper.wait(gate_worker_restarts_total=1, gate_workers_ready=1)
    assert send(server, [changed(CT, tmp_path, SOPInstanceUID="1.2.3.4")]) == [0]
    found = scraper.wait(store_objects_total_peer_CT1=3, instances=3, deposits_waiting=0)
    assert found['store_refused_total{peer="CT1",reason="mismatch",status="A900"}'] == 1

    # Locked: what waits is told, what is inside is not.
    server.ok("lock")
    assert send(server, [changed(CT, tmp_path, SOPInstanceUID="1.2.3.5")]) == [0]
    found = scraper.wait(locked=1, deposits_waiting=1, store_objects_total_peer_CT1=4)
    assert "instances" not in found
    assert found["locked_since_timestamp_seconds"] > 0

    # Neither what is served nor what lies between the processes names a patient or holds a UID.
    files = [path.read_text() for path in (server.home / "spool" / "metrics").rglob("*.json")]
    assert len(files) == 2
    said = scraper.text + "".join(files)
    assert not re.search(r"CompressedSamples|\b1CT1\b|1\.3\.6\.1\.4|\d+(\.\d+){3,}", said.replace("127.0.0.1", ""))

    # Whose numbers are old is left out, and the listener goes with the server.
    [listener] = server.pids("metrics")
    server.stop()
    with contextlib.suppress(FileNotFoundError):
        assert b"metrics" not in Path(f"/proc/{listener}/cmdline").read_bytes()


def test_without_an_address_nothing_is_written_or_served(make_server: Callable[[], Server]) -> None:
    server = make_server()
    server.init()
    server.start("gate")
    assert not (server.home / "spool" / "metrics").exists()
    done = server.run("metrics")
    assert (done.status, "metrics.listen" in done.err) == (2, True)
    assert 'strongroom_up{process="gate"} 0\n' in server.ok("metrics", "--once").out


@pytest.mark.needs_root
def test_of_two_users_the_listener_is_the_gates_and_reads_what_both_write(home: Path) -> None:
    server = Server(home)
    try:
        server.init("--vault-user", "daemon", "--gate-user", "nobody")
        server.set("metrics", listen="127.0.0.1:0", seconds=1)
        server.start()
        scraper = Scraper(server.wait_log(r"metrics on (http://\S+)")[1])
        found = scraper.wait(up_process_gate=1, up_process_vault=1, locked=0)
        assert found["gate_workers_ready"] == found["gate_workers"]
        [listener] = server.pids("metrics")
        nobody = str(pwd.getpwnam("nobody").pw_uid)
        status = Path(f"/proc/{listener}/status").read_text()
        assert re.findall(r"(?m)^Uid:\t(\d+)\t(\d+)", status) == [(nobody, nobody)]
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()
        server.kill("metrics")


# --- its unit


@pytest.mark.needs("systemd-analyze")
def test_the_unit_has_no_key_that_systemd_does_not_know_and_its_exposure_is_at_most_1_5(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/strongroom/bin/strongroom", sys.executable))
    for command in (
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(UNIT)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        if "verify" in command:
            assert (done.stdout, done.stderr) == ("", "")


def test_the_unit_writes_nothing_and_sees_nothing_of_the_store() -> None:
    lines = UNIT.read_text().splitlines()
    assert not [line for line in lines if line.startswith(("ReadWritePaths=", "LoadCredential="))]
    hidden = {word.lstrip("-") for line in lines if line.startswith("InaccessiblePaths=") for word in line[18:].split()}
    assert hidden >= {
        "/var/lib/strongroom", "/var/lib/strongroom-anchors", "/var/spool/strongroom/incoming", "/run/strongroom",
        "/var/spool/strongroom/outbox", "/etc/strongroom/store.key", "/etc/strongroom/tls",
    }  # fmt: skip
