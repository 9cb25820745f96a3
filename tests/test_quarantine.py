"""Twice and contradictory: the first stays, identical copies cost nothing, the rest waits for a decision."""

from __future__ import annotations

import threading
from pathlib import Path

import pydicom
import pytest
import scu
from conftest import Server, changed, send
from pydicom.data import get_testdata_file
from scu import raw_data_set

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))


def _packs(server: Server) -> list[Path]:
    return [p for p in (server.store / "objects").rglob("*") if p.is_file()]


def _items(server: Server) -> list[dict[str, str]]:
    done = server.run("quarantine", "list", "--json")
    assert done.status in {0, 5}, done.err
    return list(done.json()["items"])


def _held(server: Server, name: str) -> list[bytes]:
    server.ok("export", "--all", "--to", server.home / name)
    return [raw_data_set(path) for path in (server.home / name).rglob("*.dcm")]


def test_an_identical_copy_is_already_held_and_takes_no_room(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    before = _packs(server)
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert _packs(server) == before
    assert _items(server) == []
    server.wait_log("1 objects were held already")


def test_an_identical_copy_beside_a_new_instance_leaves_only_the_new_one(server: Server, tmp_path: Path) -> None:
    other = changed(CT, tmp_path, SOPInstanceUID="1.2.3.4")
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [CT, other]) == [0, 0]
    server.wait_admitted()
    assert len(server.list()) == 2
    assert sorted(_held(server, "out")) == sorted([raw_data_set(CT), raw_data_set(other)])
    assert sum(p.stat().st_size for p in _packs(server)) < 2 * 48_000 + 8_000


def test_another_encoding_is_kept_aside_without_an_alert(server: Server, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(CT)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    other = tmp_path / "implicit.dcm"
    dataset.save_as(other, implicit_vr=True, little_endian=True)
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [other]) == [0]
    server.wait_admitted()
    status = server.status()
    assert (status["counts"]["instances"], status["counts"]["encodings"], status["quarantine"]) == (1, 1, 0)
    assert _held(server, "out") == [raw_data_set(CT)]


def test_other_content_waits_for_a_decision_with_both_senders_named(server: Server, tmp_path: Path) -> None:
    folder = server.add_peer("MR2")
    server.wait_log("2 peers")
    other = changed(CT, tmp_path, SliceLocation="77.5")
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [other], title="MR2", folder=folder) == [0]
    server.wait_admitted()
    assert _held(server, "first") == [raw_data_set(CT)]
    (item,) = _items(server)
    assert (item["calling"], item["held_calling"]) == ("MR2", "CT1")
    assert "other content" in server.ok("quarantine", "show", item["id"]).out
    server.ok("quarantine", "export", item["id"], "--output", server.home / "look.dcm")
    assert raw_data_set(server.home / "look.dcm") == raw_data_set(other)
    assert server.run("quarantine", "resolve", item["id"], "--reason", "x").status == 2
    assert server.run("quarantine", "resolve", "nothing-0", "--accept", "--reason", "x").status == 5
    server.ok("quarantine", "resolve", item["id"], "--accept", "--reason", "corrected by the modality")
    assert _held(server, "second") == [raw_data_set(other)]
    assert _items(server) == []
    # The decision lives in the ledger: an index that is rebuilt from packs knows it.
    server.ok("reindex")
    assert _held(server, "third") == [raw_data_set(other)]
    assert server.ok("verify").status == 0


def test_what_is_discarded_is_gone_with_its_key(server: Server, tmp_path: Path) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [changed(CT, tmp_path, SliceLocation="77.5")]) == [0]
    server.wait_admitted()
    (item,) = _items(server)
    server.ok("quarantine", "resolve", item["id"], "--discard", "--reason", "a test")
    assert _items(server) == []
    assert list((server.store / "quarantine").iterdir()) == []
    assert item["pack"].encode() not in (server.store / "keys.db").read_bytes()
    assert _held(server, "out") == [raw_data_set(CT)]


def test_another_patient_in_a_study_is_quarantined(server: Server, tmp_path: Path) -> None:
    other = changed(CT, tmp_path, SOPInstanceUID="1.2.3.4", PatientID="SOMEBODY-ELSE")
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert send(server, [other]) == [0]
    server.wait_admitted()
    (item,) = _items(server)
    assert "another patient" in item["reason"]
    assert len(server.list()) == 1
    server.ok("quarantine", "resolve", item["id"], "--accept", "--reason", "the same patient under two numbers")
    assert len(server.list()) == 2


def test_two_associations_racing_with_one_uid_keep_one_whole_and_quarantine_the_other(
    server: Server, tmp_path: Path
) -> None:
    versions = [changed(CT, tmp_path, SliceLocation=str(n)) for n in range(4)]
    start = threading.Barrier(len(versions))
    context = scu.tls(server.home / "issued" / "CT1")
    statuses: list[int] = []

    def race(item: scu.Object) -> None:
        start.wait()
        statuses.extend(scu.send(server.port, context, [item]))

    # Read before the threads start: how pydicom reads is a setting of the whole process.
    threads = [threading.Thread(target=race, args=(scu.read(file),)) for file in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0] * len(versions)
    server.wait_admitted()
    (held,) = _held(server, "out")
    assert held in [raw_data_set(file) for file in versions]
    assert len(_items(server)) == len(versions) - 1


def test_a_good_copy_heals_what_opens_no_more(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    (path,) = _packs(server)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(20_000)
        file.write(b"damage")
    found = server.run("verify", "--json")
    assert found.status == 6
    (finding,) = found.json()["findings"]
    assert finding["what"] == "damaged"
    assert finding["objects"][0]["calling"] == "CT1"
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert _held(server, "out") == [raw_data_set(CT)]


@pytest.mark.parametrize("what", ["missing", "orphaned"])
def test_verify_names_what_is_missing_or_orphaned(server: Server, what: str) -> None:
    assert send(server, [CT, MR]) == [0, 0]
    server.wait_admitted()
    assert server.ok("verify").out.startswith("verified 2 records in 2 packs")
    path = _packs(server)[0]
    if what == "missing":
        path.unlink()
    else:
        path.with_name(path.name[:2] + "0" * 30).write_bytes(path.read_bytes())
    done = server.run("verify")
    assert done.status == 6
    assert what in done.out


def test_an_older_store_is_refused_until_it_is_upgraded(server: Server) -> None:
    from keys import keyring, slots
    from keys.anchors import FileAnchors

    assert send(server, [CT]) == [0]
    server.wait_admitted()
    server.stop()
    # A store as format 0 left it: without the folder of copies, and with the older number.
    (server.store / "admitting").rmdir()
    secret = slots.read_key_file(server.home / "store.key")
    ring = keyring.unlock(server.store / "keyring", secret, FileAnchors(server.home / "anchors"))
    ring.header.format = 0
    ring.write(server.store / "keyring")
    assert server.run("list").status == 4
    assert server.run("upgrade").status == 2
    assert "made the folders" in server.ok("upgrade", "--backup-made").out
    assert len(server.list()) == 1
    assert "already" in server.ok("upgrade", "--backup-made").out
