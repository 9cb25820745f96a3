"""Orthanc with the desk as its remote modality, over TLS: it queries, has moved to itself what it found, and stores."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scu
from conftest import find_command, send
from pydicom.data import get_testdata_file
from served import Desk, desk

pytestmark = [pytest.mark.needs("Orthanc"), pytest.mark.usefixtures("collected")]
FILES = [Path(str(get_testdata_file(name))) for name in ("CT_small.dcm", "MR_small.dcm", "SC_rgb_rle.dcm")]
START_SECONDS = 60


class Orthanc:
    """A running Orthanc, asked over its REST API."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __call__(self, path: str, body: Any = None) -> Any:
        return json.loads(self.raw(path, body))

    def raw(self, path: str, body: Any = None) -> bytes:
        # Never by a proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with opener.open(f"http://127.0.0.1:{self._port}{path}", content, timeout=60) as reply:
            return bytes(reply.read())


@contextlib.contextmanager
def orthanc(server: Desk, folder: Path, http: int, dicom: int) -> Iterator[Orthanc]:
    keys = server.home / "issued" / "ORTHANC"
    room = {"AET": "STRONGROOM", "Host": "127.0.0.1", "UseDicomTls": True}
    settings = {
        "Name": "asks",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [],
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "DicomTlsEnabled": True,
        "DicomTlsPrivateKey": str(keys / "ORTHANC.key"),
        "DicomTlsCertificate": str(keys / "ORTHANC.pem"),
        "DicomTlsTrustedCertificates": str(keys / "ca.pem"),
        "DicomModalities": {"gate": {**room, "Port": server.port}, "desk": {**room, "Port": server.desk_port}},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    call = Orthanc(http)
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen([str(find_command("Orthanc")), str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    call("/system")
                    break
                except OSError:
                    said = (folder / "orthanc.log").read_text()
                    assert process.poll() is None and time.monotonic() < deadline, said
                    time.sleep(0.05)
            yield call
        finally:
            process.kill()
            process.wait()


def test_orthanc_queries_retrieves_and_stores(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        http, dicom = one.getsockname()[1], other.getsockname()[1]

    def prepare(server: Desk) -> None:
        server.peer("CT1")
        server.peer("ORTHANC", "echo", "store", "find", "move", listens=f"127.0.0.1:{dicom}")

    with desk(tmp_path_factory, prepare) as server, orthanc(server, tmp_path, http, dicom) as call:
        items = [scu.read(path) for path in FILES]
        assert send(server, FILES[:2]) == [0, 0]
        assert call("/modalities/desk/echo", {}) == {}

        asked = {"Level": "Study", "Query": {"PatientID": "", "PatientName": "*", "StudyInstanceUID": ""}}
        query = call("/modalities/desk/query", asked)["ID"]
        answers = [call(f"/queries/{query}/answers/{n}/content?simplify") for n in call(f"/queries/{query}/answers")]
        assert {answer["StudyInstanceUID"] for answer in answers} == {item.study for item in items[:2]}
        named = {"CompressedSamples^CT1", "CompressedSamples^MR1"}
        assert {answer["PatientName"] for answer in answers} == named

        for number in call(f"/queries/{query}/answers"):
            done = call(f"/queries/{query}/answers/{number}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
            assert done["RemoteAet"] == "STRONGROOM"
        held = {call(f"/instances/{one}")["MainDicomTags"]["SOPInstanceUID"]: one for one in call("/instances")}
        assert held.keys() == {item.sop_instance for item in items[:2]}
        for item, path in zip(items[:2], FILES, strict=False):
            (tmp_path / "got.dcm").write_bytes(call.raw(f"/instances/{held[item.sop_instance]}/file"))
            assert scu.same(tmp_path / "got.dcm", path)

        uploaded = call("/instances", FILES[2].read_bytes())["ID"]
        sent = call("/modalities/gate/store", {"Resources": [uploaded], "Synchronous": True})
        assert (sent["InstancesCount"], sent["FailedInstancesCount"]) == (1, 0)
        keys = {"StudyInstanceUID": items[2].study, "SeriesInstanceUID": items[2].series, "SOPInstanceUID": ""}
        found = call("/modalities/desk/query", {"Level": "Instance", "Query": keys})["ID"]
        [answer] = [call(f"/queries/{found}/answers/{n}/content?simplify") for n in call(f"/queries/{found}/answers")]
        assert answer["SOPInstanceUID"] == items[2].sop_instance
