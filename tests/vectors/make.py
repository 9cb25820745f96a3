"""Make the vectors of this folder with the real product: ``python tests/vectors/make.py``. Needs DCMTK.

They are made once and checked in. What reads them then shows that a store written by an earlier release still opens, so
this refuses to write over them; remove the folders first if the format itself has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pydicom
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite, write_dataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

HERE = Path(__file__).parent
ADMITTED = ["SC_ybr_full_422_uncompressed.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_rle.dcm"]  # of one study
PASSPHRASE = "\ufb01ve vectors, one a\u030angstro\u0308m apart"  # a ligature and loose marks: NFKC changes them
PROPOSE = {
    ExplicitVRLittleEndian: "--propose-little",
    ImplicitVRLittleEndian: "--propose-implicit",
    RLELossless: "--propose-rle",
}
DCMTK = {"DCMDICTPATH": "/usr/share/libdcmtk17/dicom.dic", "TCP_NODELAY": "1"}


class Store:
    """A store in a temporary folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.command = [sys.executable, "-m", "storescp", "--config", str(home / "strongroom.toml")]
        (home / "passphrase").write_text(PASSPHRASE + "\n", "utf-8")
        slots = ["--key-file", str(home / "store.key"), "--passphrase-file", str(home / "passphrase")]
        self.run("init", "--with-pki", "--listen", "127.0.0.1:0", *slots)
        self.run("peer", "add", "DEMO", "--issue", str(home / "demo"))

    def run(self, *arguments: str) -> None:
        subprocess.run([*self.command, *arguments], check=True, stdout=subprocess.DEVNULL)

    @contextmanager
    def running(self, verb: str, ready: str) -> Iterator[re.Match[str]]:
        """Run gate or vault until the block ends, which starts once the log says that it is ready."""
        with subprocess.Popen([*self.command, verb], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                seen = (re.search(ready, line) for line in process.stderr)
                yield next(match for match in seen if match)
            finally:
                process.terminate()
                process.communicate()
        if process.returncode:
            raise SystemExit(f"{verb} ended with {process.returncode}")

    def receive(self, files: list[Path]) -> None:
        with self.running("gate", r"listening on 127\.0\.0\.1:(\d+)") as listening:
            tls = ["+tls", self.home / "demo/DEMO.key", self.home / "demo/DEMO.pem", "+cf", self.home / "demo/ca.pem"]
            command = ["/usr/bin/storescu", "-aet", "DEMO", "-aec", "STRONGROOM", "--required", *tls]
            for file in files:  # each in the syntax that it has: storescu would convert it to the first one accepted
                syntax = PROPOSE[pydicom.dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID]
                words = [*command, syntax, "127.0.0.1", listening[1], file]
                subprocess.run([str(word) for word in words], check=True, env=DCMTK)

    def admit(self) -> None:
        with self.running("vault", r"admitted [1-9]"):
            pass


def small(number: int) -> Dataset:
    """No more than what a gate asks for."""
    dataset = Dataset()
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["strongroom vectors", f"instance {number}"])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["strongroom vectors", "study"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["strongroom vectors", "series"])
    return dataset


def one_full_chunk() -> Dataset:
    """A data set of exactly 16,384 bytes, after which comes an empty chunk."""
    dataset = small(2)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = "M?ller^Ren?"
    dataset.add_new("PixelData", "OW", b"")
    written = DicomBytesIO()
    written.is_little_endian, written.is_implicit_VR = True, False
    write_dataset(written, dataset)
    dataset.PixelData = bytes(i * i % 251 for i in range(16384 - len(written.getvalue())))
    return dataset


def write(path: Path, dataset: Dataset, syntax: str) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dcmwrite(path, dataset, enforce_file_format=True)
    return path


def sent(path: Path) -> dict[str, Any]:
    """What must come out of a store, read from the file that went in."""
    head = pydicom.dcmread(path, stop_before_pixels=True)
    # Preamble, "DICM" and the group length element come before what that element counts.
    dataset = path.read_bytes()[128 + 4 + 12 + head.file_meta.FileMetaInformationGroupLength :]
    return {
        "sop_instance_uid": head.SOPInstanceUID,
        "transfer_syntax": head.file_meta.TransferSyntaxUID,
        "length": len(dataset),
        "sha256": hashlib.sha256(dataset).hexdigest(),
    }


def object_ids(pack: bytes) -> list[str]:
    """From the frames, which are in the clear."""
    ids, at = [], 4096
    while at < len(pack):
        ids.append(pack[at + 16 : at + 32].hex())
        lengths = int.from_bytes(pack[at + 4 : at + 8], "big"), int.from_bytes(pack[at + 8 : at + 16], "big")
        at += -(-(40 + sum(lengths)) // 4096) * 4096
    return ids


def expected(pack: Path, home: Path, files: list[Path]) -> dict[str, Any]:
    content = pack.read_bytes()
    ids = object_ids(content)
    assert len(ids) == len(files), "a file went into a pack of its own"
    records = [{"object_id": name, **sent(file)} for name, file in zip(ids, files, strict=True)]
    study = pydicom.dcmread(files[0]).StudyInstanceUID
    return {"path": str(pack.relative_to(home)), "study": study, "records": records}


def copy(home: Path, names: list[str]) -> None:
    for name in names:
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / name, HERE / name)  # not the mode: git knows only two


def main() -> None:
    if (HERE / "expected.json").exists():
        raise SystemExit("the vectors are there already")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        store = Store(home)
        admitted = [Path(str(get_testdata_file(name))) for name in ADMITTED]
        store.receive(admitted)
        store.admit()
        deposited = [
            write(home / "small.dcm", small(1), ImplicitVRLittleEndian),
            write(home / "chunk.dcm", one_full_chunk(), ExplicitVRLittleEndian),
        ]
        # Bytes that are not in the character set that the data set names: its name becomes "undecoded".
        deposited[1].write_bytes(deposited[1].read_bytes().replace(b"M?ller^Ren?", b"M\xfcller^Ren\xe9"))
        store.receive(deposited)
        with closing(sqlite3.connect(home / "store/keys.db")) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (pack,), (deposit,) = home.glob("store/objects/*/*"), home.glob("spool/incoming/*")
        result: dict[str, Any] = {
            "index_salt": (home / "store/index-1.db").read_bytes()[:16].hex(),
            "admitted": expected(pack, home, admitted),
            "deposit": expected(deposit, home, deposited),
        }
        names = ["store/keyring", "store/keys.db", "store.key", "passphrase", "spool/public/deposit-1.key"]
        names += ["anchors/anchor-1", "anchors/generation"]  # no CACHEDIR.TAG: this folder is to be in backups
        copy(home, [*names, result["admitted"]["path"], result["deposit"]["path"]])
        (HERE / "expected.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
