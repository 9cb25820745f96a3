"""Every DICOM file of pydicom's two collections goes in in its own transfer syntax and comes out bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import data_store
import pydicom
import pytest
import scu
from conftest import Server
from pydicom.data.data_manager import DATA_ROOT
from running import serving
from scu import Object

from storescp.gate.status import Reason
from storescp.gate.transfer import STORAGE_CLASSES

FILES = 140
TRANSFER_SYNTAXES = 12
# What no C-STORE of a file can do with success, and why.
REFUSED = {
    # Implicit VR under a transfer syntax that has explicit VR.
    "SC_rgb_jpeg.dcm": Reason.UNPARSABLE,
    # Elements of groups 0001 and 0004, which no data set of a composite object begins with.
    "nested_priv_SQ.dcm": Reason.UNPARSABLE,
    "DICOMDIR": Reason.UNPARSABLE,
    "DICOMDIR-bigEnd": Reason.UNPARSABLE,
    "DICOMDIR-empty.dcm": Reason.UNPARSABLE,
    "DICOMDIR-implicit": Reason.UNPARSABLE,
    "DICOMDIR-nooffset": Reason.UNPARSABLE,
    "DICOMDIR-nopatient": Reason.UNPARSABLE,
    "DICOMDIR-reordered": Reason.UNPARSABLE,
    # A digest in hex where a UID must be.
    "bad_sequence.dcm": Reason.INVALID_UID,
    # Neither Study nor Series Instance UID.
    "JPEGLSNearLossless_08.dcm": Reason.NO_STUDY,
    "JPEGLSNearLossless_16.dcm": Reason.NO_STUDY,
    "SC_rgb_jls_lossy_line.dcm": Reason.NO_STUDY,
    "SC_rgb_jls_lossy_sample.dcm": Reason.NO_STUDY,
    "UN_sequence.dcm": Reason.NO_STUDY,
    "empty_charset_LEI.dcm": Reason.NO_STUDY,
    "no_meta_group_length.dcm": Reason.NO_STUDY,
    "priv_SQ.dcm": Reason.NO_STUDY,
}


class Collection(NamedTuple):
    """The files to store, and the ones that lack what a store needs."""

    good: list[tuple[Path, Object]]
    bad: list[Object]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory, "CT1") as made:
        yield made


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """All files with file meta information; of those that share a SOP Instance UID, one."""
    roots = [Path(DATA_ROOT) / "test_files", Path(data_store.__file__).parent / "data"]
    files = [f for root in roots for f in sorted(root.rglob("*")) if f.is_file() and f.read_bytes()[128:132] == b"DICM"]
    found = [(file, item) for file in files if (item := scu.read(file)).transfer_syntax]
    bad = [item for file, item in found if file.name in REFUSED]
    found = [(file, item) for file, item in found if file.name not in REFUSED]
    # No file in a near-lossless syntax names a study: these four get one, and a file of their own.
    folder = tmp_path_factory.mktemp("completed")
    for name in (n for n, reason in REFUSED.items() if reason is Reason.NO_STUDY and ("Near" in n or "jls" in n)):
        [file] = [f for f in files if f.name == name]
        whole = pydicom.dcmread(file)
        whole.StudyInstanceUID = whole.SeriesInstanceUID = f"{whole.SOPInstanceUID[:-2]}9"
        whole.save_as(folder / name, enforce_file_format=True)
        found.append((folder / name, scu.read(folder / name)))
    # The one with the rarest transfer syntax stands for its UID: most of them are there in explicit VR as well.
    count = Counter(item.transfer_syntax for _, item in found)
    found.sort(key=lambda pair: count[pair[1].transfer_syntax])
    unique: dict[str, tuple[Path, Object]] = {}
    for pair in found:
        unique.setdefault(pair[1].sop_instance, pair)
    return Collection(list(unique.values()), bad)


@pytest.fixture(scope="module")
def statuses(server: Server, collection: Collection) -> list[int]:
    context = scu.tls(server.home / "issued" / "CT1")
    with ThreadPoolExecutor(4) as pool:
        return [*pool.map(lambda pair: scu.send(server.port, context, [pair[1]])[0], collection.good)]


@pytest.fixture(scope="module")
def exported(
    server: Server, collection: Collection, statuses: list[int], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Path, Object, Path]]:
    """Source, object and exported file of each."""
    folder = tmp_path_factory.mktemp("exported")
    done = server.ok("export", "--all", "--to", folder, "--json").json()
    assert done == {"format": 1, "written": len(collection.good), "already_there": 0, "failed": 0}
    triples = [(f, o, folder / o.study / o.series / f"{o.sop_instance}.dcm") for f, o in collection.good]
    assert {path for path in folder.rglob("*") if path.is_file()} == {path for _, _, path in triples}
    return triples


def test_the_collection_is_as_large_as_it_was(collection: Collection) -> None:
    assert len(collection.good) >= FILES
    assert len({item.transfer_syntax for _, item in collection.good}) >= TRANSFER_SYNTAXES
    assert {item.name for item in collection.bad} == set(REFUSED)


def test_every_file_is_stored_in_its_own_transfer_syntax(collection: Collection, statuses: list[int]) -> None:
    assert [item.name for (_, item), status in zip(collection.good, statuses, strict=True) if status] == []


def test_every_file_is_listed_once_as_what_it_is(server: Server, collection: Collection, statuses: list[int]) -> None:
    keys = ("study", "series", "sop", "sop_class", "transfer_syntax", "calling")
    listed = [tuple(row[key] for key in keys) for row in server.list()]
    sent = [(o.study, o.series, o.sop_instance, o.sop_class, o.transfer_syntax, "CT1") for _, o in collection.good]
    assert sorted(listed) == sorted(sent)


def test_every_data_set_is_exported_bit_for_bit(exported: list[tuple[Path, Object, Path]]) -> None:
    assert [item.name for _, item, path in exported if scu.raw_data_set(path) != item.data] == []


def test_exported_files_have_an_empty_preamble_and_their_own_file_meta(
    exported: list[tuple[Path, Object, Path]],
) -> None:
    for _, item, path in exported:
        assert path.read_bytes()[:132] == bytes(128) + b"DICM"
        meta = pydicom.filereader.read_file_meta_info(path)
        assert meta.TransferSyntaxUID == item.transfer_syntax, item.name
        assert meta.MediaStorageSOPClassUID == item.sop_class, item.name
        assert meta.MediaStorageSOPInstanceUID == item.sop_instance, item.name
        assert meta.SourceApplicationEntityTitle == "CT1"
        before = len(path.read_bytes()) - len(item.data)
        assert meta.FileMetaInformationGroupLength == before - 132 - 12, item.name


def test_pydicom_reads_exported_files_as_it_reads_their_sources(exported: list[tuple[Path, Object, Path]]) -> None:
    with scu.lenient():
        assert [item.name for file, item, path in exported if pydicom.dcmread(file) != pydicom.dcmread(path)] == []


def test_files_that_lack_what_a_store_needs_are_refused_and_not_listed(
    server: Server, collection: Collection, statuses: list[int]
) -> None:
    context = scu.tls(server.home / "issued" / "CT1")
    before = {row["sop"] for row in server.list()}
    for lacking in collection.bad:
        sop_class = lacking.sop_class if lacking.sop_class in STORAGE_CLASSES else scu.CT_IMAGE
        item = lacking._replace(sop_class=sop_class, sop_instance=lacking.sop_instance or "1.2.3")
        with scu.lenient(), scu.associated(server.port, context, [item.context]) as association:
            response = scu.store(association, item)
        expected = REFUSED[item.name]
        assert (response.Status, response.ErrorComment) == (expected.status, expected.comment), item.name
        server.wait_log(f"refused with {expected.status:04X}: {expected.comment}")
    assert {row["sop"] for row in server.list()} == before
    assert len(before) == len(collection.good)


def test_an_object_that_is_not_the_one_of_its_command_is_refused(server: Server, collection: Collection) -> None:
    context = scu.tls(server.home / "issued" / "CT1")
    item = collection.good[0][1]
    assert scu.send(server.port, context, [item._replace(sop_instance="1.2.3")]) == [Reason.MISMATCH.status]
    assert not server.list("instance", "--sop", "1.2.3")
