"""What the desk does at its bounds: limits, a locked or killed vault, damage, a restart, an object of 256 MiB."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
from conftest import dcmtk, send
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import evt
from pynetdicom.presentation import build_context
from served import (
    COMMITMENT,
    COMMITMENT_INSTANCE,
    EXPLICIT,
    STUDY_ROOT,
    Desk,
    Received,
    counts,
    desk,
    find,
    get_contexts,
    identifier,
    last,
    listening,
    models,
    objects,
)
from tunnel import tunnel

CT = Path(str(get_testdata_file("CT_small.dcm")))
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
INSTANCES, QUERIES = 20, 10
MIB = 1 << 20
# Of a process of Python that passes 256 MiB on; a copy of the object would be all of it.
GROWTH = 40 * MIB

pytestmark = [
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Site:
    """The server of this module, a study that it holds, and what the modality was told."""

    def __init__(self, folder: Path) -> None:
        self.items = [scu.read(path) for path in objects(folder, 6, CT)]
        self.paths = sorted(folder.iterdir(), key=lambda path: int(path.stem))
        self.study = self.items[0].study
        self.told: list[tuple[int, Dataset]] = []
        self.heard = threading.Event()
        self.server: Desk = None  # type: ignore[assignment]

    def event(self, event: Any) -> tuple[int, None]:
        self.told.append((event.event_type, event.event_information))
        self.heard.set()
        return 0, None

    def get(self, title: str, received: Received, study: str = "") -> Dataset:
        contexts, roles = get_contexts((CT_CLASS, EXPLICIT))
        with self.server.ask(title, contexts, roles=roles, handlers=[received.handler]) as association:
            asked = identifier("STUDY", StudyInstanceUID=study or self.study)
            reply, _ = last(association.send_c_get(asked, STUDY_ROOT + "3"))
            return reply

    def records(self, kind: str) -> list[dict[str, Any]]:
        lines = self.server.ok("audit", "show", "--json").out.splitlines()
        return [record for record in map(json.loads, lines) if record["type"] == kind]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("o"))

    def prepare(server: Desk) -> None:
        # One worker: a study that is sent at a time is one pack.
        server.set("gate", workers=1)
        server.set("desk", queries_per_minute=QUERIES, instances_per_hour=INSTANCES)
        handlers = [(evt.EVT_N_EVENT_REPORT, made.event)]
        folder = server.keys("CT1")
        port = stack.enter_context(listening("CT1", [(COMMITMENT, [EXPLICIT])], handlers, folder, is_scu=True))
        server.peer("CT1", "echo", "store", "commit", listens=f"127.0.0.1:{port}")
        for title in ("ASK", "MANY", "BUSY", "OTHER"):
            server.peer(title, "find", "get", "move")

    with contextlib.ExitStack() as stack:
        made.server = stack.enter_context(desk(tmp_path_factory, prepare))
        assert send(made.server, made.paths) == [0] * len(made.paths)
        made.server.wait_admitted()
        yield made


def test_a_peer_gets_so_many_instances_and_no_more_and_an_alert_says_so(site: Site) -> None:
    given = [(reply := site.get("MANY", received := Received())).Status for _ in range(3)]
    assert given == [0, 0, 0]
    assert len(received) == len(site.items)
    refused = site.get("MANY", received := Received())
    assert refused.Status == 0xA702
    assert refused.ErrorComment == "this peer asks for more than it may in this time"
    assert list(received) == []
    assert reply is not None
    site.server.wait_log("ALERT .*MANY")
    assert {"peer": "MANY", "operation": "get", "times": 1}.items() <= site.records("desk-limited")[-1].items()
    # Asked again and again, it is one record.
    assert {site.get("MANY", Received()).Status for _ in range(3)} == {0xA702}
    assert len(site.records("desk-limited")) <= 2
    # Another peer has its own.
    assert site.get("OTHER", Received()).Status == 0


def test_a_peer_asks_so_many_queries_and_no_more(site: Site) -> None:
    with site.server.ask("BUSY", models(1)) as association:
        asked = identifier("STUDY", StudyInstanceUID="1.2")
        # One more comes free every six seconds.
        statuses = (find(association, asked)[1] for _ in range(99))
        assert QUERIES <= len(list(itertools.takewhile(lambda status: status == 0, statuses))) < 99


def test_an_instance_that_does_not_open_fails_alone_and_is_named(site: Site, tmp_path: Path) -> None:
    items = [scu.read(path) for path in objects(tmp_path, 3, CT)]
    paths = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem))
    packs = set(site.server.store.joinpath("objects").rglob("*"))
    assert send(site.server, paths) == [0, 0, 0]
    site.server.wait_admitted()
    [pack] = [path for path in set(site.server.store.joinpath("objects").rglob("*")) - packs if path.is_file()]
    content = bytearray(pack.read_bytes())
    records = [place for place in range(4096, len(content), 4096) if content[place : place + 4] == b"SRR1"]
    assert len(records) == 3
    content[records[1] + 20_000] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    received = Received()
    contexts, roles = get_contexts((CT_CLASS, EXPLICIT))
    with site.server.ask("OTHER", contexts, roles=roles, handlers=[received.handler]) as association:
        asked = identifier("STUDY", StudyInstanceUID=items[0].study)
        reply, named = last(association.send_c_get(asked, STUDY_ROOT + "3"))
    assert (reply.Status, counts(reply)) == (0xB000, (2, 1, 0))
    assert named.FailedSOPInstanceUIDList == items[1].sop_instance
    assert [item.data for item in received] == [items[0].data, items[2].data]


def test_a_locked_vault_is_told_and_an_unlocked_one_answers_again(site: Site) -> None:
    site.server.ok("lock")
    asked = identifier("STUDY", StudyInstanceUID=site.study)
    contexts, roles = get_contexts((CT_CLASS, EXPLICIT))
    with site.server.ask("ASK", [*contexts, *models(1, 2)], roles=roles) as association:
        replies = [last(association.send_c_find(asked, STUDY_ROOT + "1"))[0]]
        replies.append(last(association.send_c_get(asked, STUDY_ROOT + "3"))[0])
        replies.append(last(association.send_c_move(asked, "CT1", STUDY_ROOT + "2"))[0])
        assert [(reply.Status, reply.ErrorComment) for reply in replies] == [
            (0xA700, "the vault is locked"),
            (0xA702, "the vault is locked"),
            (0xA702, "the vault is locked"),
        ]
        site.server.ok("unlock", "--key-file", site.server.home / "store.key")
        assert len(find(association, asked)[0]) == 1
    assert not [line for line in site.server.log if " error " in line and "commitment" in line]


def peak(pid: int) -> int:
    """Return the most memory that a process had since ``fresh``, in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def test_256_mib_pass_through_vault_and_desk_in_little_memory(site: Site, tmp_path: Path) -> None:
    large = scu.large_file(tmp_path / "large.dcm", 8192)
    assert len(large.data) > 256 * MIB
    assert send(site.server, [tmp_path / "large.dcm"]) == [0]
    site.server.wait_admitted()
    pids = [pid for verb in ("vault", "desk") for pid in site.server.pids(verb)]
    assert len(pids) == 2
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = [peak(pid) for pid in pids]
    out = tmp_path / "out"
    out.mkdir()
    with tunnel(site.server.home / "issued" / "OTHER", "OTHER", site.server.desk_port) as port:
        done = dcmtk(
            "getscu", "-S", "-aet", "OTHER", "-aec", "STRONGROOM", "-od", out, "+B", "-pdu", "131072", "127.0.0.1",
            str(port), "-k", "QueryRetrieveLevel=IMAGE", "-k", f"StudyInstanceUID={large.study}",
            "-k", f"SeriesInstanceUID={large.series}", "-k", f"SOPInstanceUID={large.sop_instance}",
        )  # fmt: skip
    assert done.status == 0, done.err
    [got] = out.iterdir()
    assert got.stat().st_size > 256 * MIB
    assert scu.raw_data_set(got) == large.data
    assert all(peak(pid) - base < GROWTH for pid, base in zip(pids, before, strict=True)), (before, pids)


def test_a_vault_that_dies_in_the_middle_ends_the_get_and_nothing_short_is_given(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    paths = objects(folder, 3, CT, PixelData=os.urandom(8 * MIB), Rows=2048, Columns=2048)
    items = [scu.read(path) for path in paths]
    assert send(site.server, paths) == [0, 0, 0]
    site.server.wait_admitted()
    received = Received()
    contexts, roles = get_contexts((CT_CLASS, EXPLICIT))
    association = site.server.request("OTHER", contexts, roles=roles)

    def took(event: Any) -> int:
        site.server.kill("vault")
        association.dimse_timeout = 5
        return int(received.handler[1](event))

    association.bind(evt.EVT_C_STORE, took)
    replies = list(association.send_c_get(identifier("STUDY", StudyInstanceUID=items[0].study), STUDY_ROOT + "3"))
    assert 1 <= len(received) < 3
    by_uid = {item.sop_instance: item.data for item in items}
    assert all(item.data == by_uid[item.sop_instance] for item in received)
    # Half of an instance was sent, and so the association is over; else the last response says what failed.
    status = replies[-1][0].get("Status")
    assert status in {None, 0xB000}
    if association.is_established:
        association.release()
    site.server.wait_log("vault: unlocked")
    deadline = time.monotonic() + 30
    while site.get("ASK", Received()).Status != 0:
        assert time.monotonic() < deadline


def test_a_server_that_was_stopped_reports_commitment_once_it_runs_again(site: Site, tmp_path: Path) -> None:
    server = site.server
    server.ok("lock")
    path = objects(tmp_path / "o", 1, CT)[0]
    item = scu.read(path)
    assert send(server, [path]) == [0]
    asked = Dataset()
    asked.TransactionUID = str(generate_uid())
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = item.sop_class, item.sop_instance
    asked.ReferencedSOPSequence = [reference]
    context = server.tls("CT1")
    with scu.associated(server.port, context, [build_context(COMMITMENT, EXPLICIT)]) as association:
        reply, _ = association.send_n_action(asked, 1, COMMITMENT, COMMITMENT_INSTANCE)
    assert reply.Status == 0
    assert server.stop() == 0
    assert site.told == []
    server.open()
    assert site.heard.wait(60), server.log
    [(event, report)] = site.told
    assert (event, report.TransactionUID) == (1, asked.TransactionUID)
    assert [one.ReferencedSOPInstanceUID for one in report.ReferencedSOPSequence] == [item.sop_instance]
    assert pydicom.dcmread(path).SOPInstanceUID == item.sop_instance
    assert site.records("commitment-reported")[-1]["committed"] == 1
