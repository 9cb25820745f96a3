"""No patient data in clear: not in the store, the spool, the log, temporary folders, arguments or any open file."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
import scu
from conftest import Server, send
from pydicom.data import get_testdata_file
from scu import raw_data_set

_FILES = ("CT_small.dcm", "MR_small.dcm", "SC_rgb_jpeg_dcmtk.dcm", "JPEG2000.dcm", "waveform_ecg.dcm", "reportsi.dcm")
_TAGS = ("PatientName", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "AccessionNumber")


def _needles() -> dict[str, bytes]:
    """Return what must not be found, by name: texts in several encodings, and stretches of pixels."""
    needles: dict[str, bytes] = {}
    for file in _FILES:
        path = get_testdata_file(file)
        assert path is not None
        dataset = pydicom.dcmread(path)
        for tag in _TAGS:
            for text in str(dataset.get(tag, "")).replace("^", "=").split("="):
                if len(text) < 5:
                    continue
                for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
                    needles[f"{file} {tag} {encoding}"] = text.encode(encoding)
                needles[f"{file} {tag} hex"] = text.encode().hex().encode()
                # Whatever stands before and after it, the middle of its base64 is the same in one of three shifts.
                for shift in range(3):
                    needles[f"{file} {tag} base64 {shift}"] = base64.b64encode(bytes(shift) + text.encode())[4:-4]
        raw = raw_data_set(Path(path))
        for part in range(1, 5):
            piece = raw[len(raw) * part // 5 :][:16]
            if len(set(piece)) > 8:
                needles[f"{file} bytes at {part}/5"] = piece
    needles = {name: needle for name, needle in needles.items() if len(needle) >= 5}
    assert len(needles) > 150
    return needles


def _look(contents: Iterator[tuple[str, bytes]], needles: dict[str, bytes]) -> list[str]:
    return [
        f"{name} in {place}" for place, content in contents for name, needle in needles.items() if needle in content
    ]


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()
        yield "the name " + str(path), os.fsencode(path)


def _processes(server: Server) -> Iterator[tuple[str, bytes]]:
    for pid in [p for verb in ("serve", "gate", "vault") for p in server.pids(verb)]:
        process = Path("/proc") / str(pid)
        for kind in ("cmdline", "environ"):
            yield f"{kind} of {pid}", (process / kind).read_bytes()
        for descriptor in (process / "fd").iterdir():
            try:
                if descriptor.resolve().is_file():
                    yield str(descriptor.resolve()), descriptor.read_bytes()
            except OSError:
                continue


@pytest.fixture
def sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    server.stop()
    temporary = server.home / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    server.set("log", level="debug")
    server.start()
    for file in _FILES:
        assert send(server, [Path(str(get_testdata_file(file)))]) == [0x0000]
    return server


def test_nothing_of_a_patient_is_in_clear_while_it_waits_and_once_it_is_admitted(sent: Server) -> None:
    needles = _needles()
    assert _look(_files(sent.home), needles) == []
    assert _look(_processes(sent), needles) == []
    assert len(sent.list()) == len(_FILES)
    sent.wait_admitted()
    assert _look(_files(sent.home), needles) == []
    assert _look(_processes(sent), needles) == []
    assert sent.log
    assert _look(iter([("the log", "\n".join(sent.log).encode())]), needles) == []
    assert list((sent.home / "tmp").iterdir()) == []


def test_the_search_itself_finds_what_lies_in_clear(sent: Server) -> None:
    sent.ok("export", "--all", "--to", sent.home / "out")
    found = _look(_files(sent.home / "out"), _needles())
    assert {f"{file} bytes" for file in _FILES} <= {" ".join(line.split(" ")[:2]) for line in found}


def test_a_refused_object_leaves_nothing_in_the_log(sent: Server) -> None:
    item = scu.read(Path(str(get_testdata_file("rtplan.dcm"))))
    other = item._replace(sop_instance=item.sop_instance + ".1")
    assert scu.send(sent.port, scu.tls(sent.home / "issued" / "CT1"), [other]) == [0xA900]
    sent.wait_log("refused with A900")
    log = "\n".join(sent.log)
    assert not any(text in log for text in (item.sop_instance, item.study, item.series, "id00001"))
