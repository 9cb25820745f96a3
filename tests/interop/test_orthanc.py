"""Orthanc as the sender, over TLS."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scu
from conftest import Server, find_command
from pydicom.data import get_testdata_file

pytestmark = pytest.mark.needs("Orthanc")

UNCOMPRESSED = ("CT_small.dcm", "rtplan.dcm", "waveform_ecg.dcm", "reportsi.dcm", "emri_small.dcm")
COMPRESSED = ("JPEG2000.dcm", "SC_rgb_rle.dcm", "693_J2KR.dcm")
START_SECONDS = 60


@pytest.fixture
def orthanc(server: Server, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """An Orthanc that knows our server as 'strongroom'; a function that calls its REST API."""
    issued = server.home / "issued" / "CT1"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "Name": "sender",
        "StorageDirectory": str(tmp_path / "storage"),
        "IndexDirectory": str(tmp_path / "storage"),
        "Plugins": [],
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "DicomAet": "CT1",
        "DicomTlsEnabled": True,
        "DicomTlsPrivateKey": str(issued / "CT1.key"),
        "DicomTlsCertificate": str(issued / "CT1.pem"),
        "DicomTlsTrustedCertificates": str(issued / "ca.pem"),
        "DicomModalities": {
            "strongroom": {"AET": "STRONGROOM", "Host": "127.0.0.1", "Port": server.port, "UseDicomTls": True}
        },
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))

    def call(path: str, body: bytes | None = None) -> Any:
        # Never by a proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}{path}", body, timeout=60) as reply:
            return json.load(reply)

    with (tmp_path / "orthanc.log").open("w") as log:
        command = [str(find_command("Orthanc")), str(tmp_path / "orthanc.json")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    call("/system")
                    break
                except OSError:
                    said = (tmp_path / "orthanc.log").read_text()
                    assert process.poll() is None and time.monotonic() < deadline, said
                    time.sleep(0.05)
            yield call
        finally:
            process.kill()
            process.wait()


def test_what_orthanc_sends_is_listed_and_comes_back_equal(
    server: Server, orthanc: Callable[..., Any], tmp_path: Path
) -> None:
    files = {name: Path(get_testdata_file(name, download=False)) for name in UNCOMPRESSED + COMPRESSED}
    items = {name: scu.read(file) for name, file in files.items()}
    uploaded = [orthanc("/instances", file.read_bytes())["ID"] for file in files.values()]
    sent = orthanc("/modalities/strongroom/store", json.dumps({"Resources": uploaded, "Synchronous": True}).encode())
    assert (sent["InstancesCount"], sent["FailedInstancesCount"]) == (len(files), 0)
    rows = {row["sop"]: row for row in server.list()}
    assert set(rows) == {item.sop_instance for item in items.values()}
    assert {row["calling"] for row in rows.values()} == {"CT1"}
    for name in COMPRESSED:
        assert rows[items[name].sop_instance]["transfer_syntax"] == items[name].transfer_syntax
    for name in UNCOMPRESSED:
        server.ok("export", "--sop", items[name].sop_instance, "--output", tmp_path / name)
        assert scu.same(tmp_path / name, files[name]), name


def test_orthancs_echo_is_answered(server: Server, orthanc: Callable[..., Any]) -> None:
    assert orthanc("/modalities/strongroom/echo", b"{}") == {}
    server.wait_log(r"association .* from CT1 at 127\.0\.0\.1")
