"""Disks that fill up or refuse: A700 before anything is lost, and receiving again by itself. On real file systems."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file
from scu import raw_data_set

pytestmark = pytest.mark.needs_root
CT = Path(str(get_testdata_file("CT_small.dcm")))
MIB = 1 << 20


def big(number: int, mib: int = 1) -> scu.Object:
    """Return an instance with much pixel data in a study of its own."""
    item = scu.read(CT)
    uids = {name: f"1.2.3.{number}.{n}" for n, name in enumerate(("sop", "study", "series"))}
    dataset = pydicom.dcmread(CT)
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uids.values()
    dataset.PixelData = bytes([number % 256]) * mib * MIB
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    pydicom.filewriter.write_dataset(buffer, dataset)
    return item._replace(sop_instance=uids["sop"], study=uids["study"], series=uids["series"], data=buffer.getvalue())


class Disk:
    """A file system of a certain size, mounted at a folder."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0755", "tmpfs", str(folder)], check=True)

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def disks() -> Iterator[list[Disk]]:
    made: list[Disk] = []
    yield made
    for disk in made:
        disk.unmount()


def small_server(server: Server, disks: list[Disk], where: str, mib: int) -> scu.ssl.SSLContext:
    """Make a store whose ``spool`` or ``store`` is a small file system of its own, with a reserve of 4 MiB."""
    server.init()
    folder = server.home / where
    kept = server.home / "kept"
    folder.rename(kept)
    disks.append(Disk(folder, mib))
    subprocess.run(["cp", "-a", f"{kept}/.", str(folder)], check=True)
    context = scu.tls(server.add_peer("CT1"))
    server.set("store", reserve_bytes=4 * MIB)
    server.set("gate", pack_idle_seconds=1)
    return context


def held(server: Server, name: str) -> dict[str, bytes]:
    server.ok("export", "--all", "--to", server.home / name)
    return {path.stem: raw_data_set(path) for path in (server.home / name).rglob("*.dcm")}


def fill(server: Server, context: scu.ssl.SSLContext, first: int, limit: int) -> dict[str, bytes]:
    """Send instances until one is refused; return what was acknowledged."""
    acknowledged = {}
    for number in range(first, first + limit):
        item = big(number)
        (status,) = scu.send(server.port, context, [item])
        if status == 0xA700:
            return acknowledged
        assert status == 0
        acknowledged[item.sop_instance] = item.data
    raise AssertionError("nothing was refused")


def test_a_full_incoming_is_answered_a700_and_receiving_resumes_by_itself(
    make_server: Callable[[], Server], disks: list[Disk]
) -> None:
    server = make_server()
    context = small_server(server, disks, "spool", 16)
    # The gate alone: nothing is admitted, so incoming fills up.
    server.start("gate")
    acknowledged = fill(server, context, 0, 20)
    # Less than fits: each worker's pack has space allocated ahead of its use.
    assert 6 <= len(acknowledged) <= 13
    server.wait_log("nothing more is received, C-STORE is answered A700: incoming")
    # Asking starts a vault, which admits what is closed and so makes room.
    server.wait_admitted(by_asking=True)
    server.wait_log("receiving again")
    (status,) = scu.send(server.port, context, [big(50)])
    assert status == 0
    acknowledged[big(50).sop_instance] = big(50).data
    assert held(server, "out") == acknowledged


def test_a_full_archive_is_answered_a700_before_anything_is_lost(
    make_server: Callable[[], Server], disks: list[Disk]
) -> None:
    server = make_server()
    context = small_server(server, disks, "store", 20)
    server.start()
    acknowledged: dict[str, bytes] = {}
    while (status := server.status())["receiving"]:
        # What is being copied counts twice for a moment, so an early refusal may pass by itself, at any time.
        acknowledged |= fill(server, context, len(acknowledged), 30)
    assert 8 <= len(acknowledged) <= 17
    assert any("nothing more is received" in warning for warning in status["warnings"])
    assert held(server, "out") == acknowledged
    server.wait_admitted()
    assert server.run("verify").status == 0
    disks[0].remount("size=64m")
    while not server.status()["receiving"]:
        time.sleep(0.1)
    assert scu.send(server.port, context, [big(60)]) == [0]


def test_an_object_too_large_for_the_disk_is_refused_and_the_association_goes_on(
    make_server: Callable[[], Server], disks: list[Disk]
) -> None:
    server = make_server()
    context = small_server(server, disks, "spool", 16)
    # No space left on device in the middle of a write, whatever the watch on free space says.
    server.set("store", reserve_bytes=MIB)
    server.start("gate")
    items = [big(1), big(2, mib=40), big(3)]
    with scu.associated(server.port, context, [items[0].context]) as association:
        assert [scu.store(association, item).Status for item in items] == [0, 0xA700, 0]
    assert held(server, "out") == {item.sop_instance: item.data for item in (items[0], items[2])}


def test_a_read_only_file_system_is_answered_a700_and_nothing_is_lost(
    make_server: Callable[[], Server], disks: list[Disk]
) -> None:
    server = make_server()
    context = small_server(server, disks, "spool", 32)
    server.start()
    assert scu.send(server.port, context, [big(1)]) == [0]
    server.wait_admitted()
    disks[0].remount("ro")
    assert scu.send(server.port, context, [big(2)]) == [0xA700]
    disks[0].remount("rw")
    assert scu.send(server.port, context, [big(3)]) == [0]
    assert set(held(server, "out")) == {big(1).sop_instance, big(3).sop_instance}
