"""Storage commitment: asked at a real gate, decided by a real vault with a clock of ours, told to an SCU not ours."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import scu
from conftest import changed, find_command, send
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import evt
from pynetdicom.presentation import build_context
from served import COMMITMENT, COMMITMENT_INSTANCE, DEFLATED, EXPLICIT, IMPLICIT, Desk, listening

from keys import slots
from storescp import config as configuration
from storescp import control, peers
from storescp.desk.asking import Asking, AskingError
from storescp.desk.commit import Reports
from storescp.desk.outgoing import Outgoing
from storescp.gate.connection import Policy
from storescp.gate.tls import Trust, server_context
from storescp.vault.api.desk import DeskAccess
from storescp.vault.commitmentrecords import DECIDED, WAITING, records_of
from storescp.vault.commitments import Commitments
from storescp.vault.scrub import Scrub
from storescp.vault.state import Vault

CT = Path(str(get_testdata_file("CT_small.dcm")))
CT_CLASS, MR_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"

pytestmark = [
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Clock:
    """Seconds since 1970, as the test has them."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Ward:
    """A gate; a vault in this process, with the desk's part that reports; and what the modality CT1 was told."""

    def __init__(self, home: Path) -> None:
        self.server = Desk(home)
        self.clock = Clock()
        self.told: list[tuple[int, Dataset]] = []
        self.status = 0x0000
        # What is held of the modality's from the beginning.
        self.good = ("", "")
        self._vault: Vault | None = None
        self._control: control.Server | None = None

    def begin(self) -> None:
        """Start a vault in place of one that is gone, and unlock it."""
        self.end()
        config = configuration.load(self.server.config)
        self.vault = self._vault = Vault(config)
        access = DeskAccess(self.vault)
        self.commitments = access.commitments = Commitments(self.vault, self.clock)
        self._control = control.Server(access.handle)
        self._control.listen(config.desk_socket)
        trust = Trust(config.trust, config.crls)
        self.peers = peers.read_all(config.peers)
        context = server_context(config.desk_certificate, config.desk_private_key, trust, self.peers)
        outgoing = Outgoing(config, lambda: Policy(self.peers, context, trust))
        self.asking = Asking(config.desk_socket)
        self.reports = Reports(self.asking, outgoing, "STRONGROOM", 20.0)
        self.unlock()

    def unlock(self) -> None:
        key_file = configuration.load(self.server.config).key_file
        assert key_file is not None
        self.vault.unlock(slots.read_key_file(key_file))

    def end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._vault is not None:
            self._vault.lock()
            self._vault.auditor.close()
            self._vault = None

    def event(self, event: Any) -> tuple[int, None]:
        self.told.append((event.event_type, event.event_information))
        return self.status, None

    def turn(self) -> list[tuple[int, Dataset]]:
        """Let everything that is due happen; return what the modality was told by it."""
        before = len(self.told)
        self.vault.advance(10.0)
        self.commitments.turn()
        self.reports.turn(self.peers)
        return self.told[before:]

    def admitted(self) -> None:
        """Wait until the gate has closed its packs, and they are admitted."""
        deadline = time.monotonic() + 60
        while self.server.deposits():
            self.vault.advance(10.0)
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ask(self, *pairs: tuple[str, str], title: str = "CT1", **wrong: Any) -> tuple[str, int]:
        """Ask for commitment; return the transaction, and the status of the response."""
        asked = Dataset()
        asked.TransactionUID = str(generate_uid())
        asked.ReferencedSOPSequence = [item(*pair) for pair in pairs]
        return asked.TransactionUID, self.action(asked, title=title, **wrong)

    def action(
        self, asked: Dataset | None, action: int = 1, instance: str = COMMITMENT_INSTANCE, title: str = "CT1",
        syntax: str = EXPLICIT,
    ) -> int:  # fmt: skip
        context = scu.tls(self.server.home / "issued" / title, title)
        contexts = [build_context(COMMITMENT, syntax)]
        with scu.associated(self.server.port, context, contexts, calling=title) as association:
            reply, _ = association.send_n_action(asked, action, COMMITMENT, instance)
        return int(reply.Status)

    def store(self, path: Path, title: str = "CT1") -> tuple[str, str]:
        """Store a file; return class and instance."""
        assert send(self.server, [path], title) == [0]
        found = scu.read(path)
        return found.sop_class, found.sop_instance


def item(sop_class: str, sop: str) -> Dataset:
    found = Dataset()
    found.ReferencedSOPClassUID, found.ReferencedSOPInstanceUID = sop_class, sop
    return found


def fresh(folder: Path, **elements: str) -> Path:
    return changed(CT, folder, SOPInstanceUID=str(generate_uid()), **elements)


def committed(report: Dataset) -> set[str]:
    return {entry.ReferencedSOPInstanceUID for entry in report.get("ReferencedSOPSequence", [])}


def failed(report: Dataset) -> dict[str, int]:
    return {e.ReferencedSOPInstanceUID: e.FailureReason for e in report.get("FailedSOPSequence", [])}


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    made = Ward(tmp_path_factory.mktemp("w"))
    server = made.server
    with contextlib.ExitStack() as stack:
        server.init()
        server.set("gate", pack_idle_seconds=1)
        server.set("desk", listen=["127.0.0.1:0"])
        folder = server.keys("CT1")
        offered = [(COMMITMENT, [EXPLICIT, IMPLICIT])]
        handlers = [(evt.EVT_N_EVENT_REPORT, made.event)]
        made.port = stack.enter_context(listening("CT1", offered, handlers, folder, is_scu=True))
        server.peer("CT1", "echo", "store", "commit", listens=f"127.0.0.1:{made.port}")
        server.peer("MR1", "echo", "store", "commit", listens=f"127.0.0.1:{made.port}")
        server.peer("NOWHERE", "echo", "store", "commit")
        server.peer("STORES")
        stack.callback(server.kill_all)
        stack.callback(server.stop, signal.SIGKILL)
        server.start("gate")
        made.begin()
        stack.callback(made.end)
        made.good = made.store(fresh(tmp_path_factory.mktemp("o")))
        made.admitted()
        yield made


def test_what_is_held_is_committed_once_it_is_admitted_and_not_before(ward: Ward, tmp_path: Path) -> None:
    pairs = [ward.store(fresh(tmp_path)) for _ in range(3)]
    transaction, status = ward.ask(*pairs)
    assert status == 0
    if ward.server.deposits():
        # The gate still writes: what it holds open is not admitted.
        assert ward.turn() == [] or not ward.server.deposits()
    ward.admitted()
    [(event, report)] = [*ward.turn(), *ward.told][-1:]
    assert (event, report.TransactionUID, report.RetrieveAETitle) == (1, transaction, "STRONGROOM")
    assert committed(report) == {sop for _, sop in pairs}
    assert failed(report) == {}
    assert ward.turn() == []


def test_each_instance_that_is_not_committed_has_its_reason(ward: Ward, tmp_path: Path) -> None:
    good, other = ward.good, ward.store(fresh(tmp_path))
    quarantined = fresh(tmp_path)
    pair = ward.store(quarantined)
    theirs = ward.store(fresh(tmp_path, StudyInstanceUID=str(generate_uid())), "MR1")
    ward.admitted()
    assert ward.store(changed(quarantined, tmp_path, StudyDescription="another content")) == pair
    ward.admitted()
    unknown = (CT_CLASS, str(generate_uid()))
    transaction, status = ward.ask(good, (MR_CLASS, other[1]), pair, theirs, unknown)
    assert status == 0
    [(event, report)] = ward.turn()
    assert (event, report.TransactionUID) == (2, transaction)
    assert committed(report) == {good[1]}
    assert failed(report) == {other[1]: 0x0119, pair[1]: 0x0110, theirs[1]: 0x0112, unknown[1]: 0x0112}


def test_what_the_scrub_found_damaged_is_not_committed_until_it_is_good_again(ward: Ward, tmp_path: Path) -> None:
    good, pair = ward.good, ward.store(fresh(tmp_path, StudyInstanceUID=str(generate_uid())))
    ward.admitted()
    [version] = ward.vault.unlocked().index.standing(pair[1])
    path = ward.vault.unlocked().archive.path(version.pack)
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[:-1])
    list(Scrub(ward.vault).run(0, whole=True))
    ward.ask(good, pair)
    [(event, report)] = ward.turn()
    assert (event, committed(report), failed(report)) == (2, {good[1]}, {pair[1]: 0x0110})
    path.write_bytes(content)
    list(Scrub(ward.vault).run(0, whole=True))
    ward.ask(good, pair)
    [(event, report)] = ward.turn()
    assert (event, committed(report)) == (1, {good[1], pair[1]})


def test_many_reports_go_out_some_at_a_time_those_that_wait_longest_first(ward: Ward) -> None:
    transactions = [ward.ask(ward.good)[0] for _ in range(23)]
    told = [[report.TransactionUID for _, report in ward.turn()] for _ in range(4)]
    assert [len(some) for some in told] == [10, 10, 3, 0]
    assert sorted(one for some in told for one in some) == sorted(transactions)


def test_a_request_that_is_asked_anew_while_its_report_goes_out_is_reported_again(ward: Ward) -> None:
    asked = Dataset()
    asked.TransactionUID = str(generate_uid())
    asked.ReferencedSOPSequence = [item(*ward.good)]
    assert ward.action(asked) == 0
    ward.vault.advance(10.0)
    ward.commitments.turn()
    [report] = ward.asking.commitments()
    asked.ReferencedSOPSequence = [item(CT_CLASS, "1.2.3")]
    assert ward.action(asked) == 0
    ward.vault.advance(10.0)
    with pytest.raises(AskingError) as refused:
        ward.asking.told(report, "")
    assert refused.value.nothing
    [(event, told)] = ward.turn()
    assert (event, told.TransactionUID, failed(told)) == (2, asked.TransactionUID, {"1.2.3": 0x0112})


def test_an_instance_asked_for_under_two_classes_is_committed_as_what_it_is(ward: Ward) -> None:
    good = ward.good
    ward.ask(good, (MR_CLASS, good[1]))
    [(event, report)] = ward.turn()
    assert (event, committed(report), failed(report)) == (2, {good[1]}, {good[1]: 0x0119})


def test_a_request_to_a_locked_vault_is_kept_and_told_once_it_is_unlocked(ward: Ward, tmp_path: Path) -> None:
    ward.vault.lock()
    pair = ward.store(fresh(tmp_path))
    transaction, status = ward.ask(pair)
    assert status == 0
    assert ward.turn() == []
    ward.unlock()
    ward.admitted()
    [(_, report)] = ward.turn() or ward.told[-1:]
    assert (report.TransactionUID, committed(report)) == (transaction, {pair[1]})


def test_a_locked_vault_says_so_to_the_desk_and_nobody_logs_it_as_an_error(
    ward: Ward, caplog: pytest.LogCaptureFixture
) -> None:
    ward.vault.lock()
    with pytest.raises(AskingError) as refused:
        ward.asking.commitments()
    with pytest.raises(AskingError) as also:
        ward.asking.told({"id": "CT1/1.2.3", "decided": 0.0}, "")
    ward.reports.turn(ward.peers)
    ward.unlock()
    assert refused.value.locked
    assert also.value.locked
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_an_scu_that_is_down_or_refuses_is_told_later_and_later_until_it_takes_it(ward: Ward) -> None:
    transaction, _ = ward.ask(ward.good)
    ward.status = 0x0110
    assert [report.TransactionUID for _, report in ward.turn()] == [transaction]
    assert ward.turn() == []
    there = ward.peers
    delay = 30.0
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()
    moved = msgspec.structs.replace(there.by_title["CT1"], listens=nobody)
    for _ in range(3):
        ward.clock.ahead += delay - 1
        assert ward.turn() == []
        ward.clock.ahead += 1
        ward.peers = peers.Peers({**there.by_title, "CT1": moved})
        assert ward.turn() == []
        ward.peers = there
        delay *= 2
    ward.status = 0
    # A vault that begins anew knows it still.
    ward.begin()
    assert ward.turn() == []
    ward.clock.ahead += delay
    assert [report.TransactionUID for _, report in ward.turn()] == [transaction]
    assert records_of(ward.vault.unlocked().ledger).count() == 0
    types = [r["type"] for r in ward.vault.auditor.read(0)]
    assert "commitment-reported" in types


def test_what_nobody_takes_for_a_week_is_let_go_and_recorded(ward: Ward) -> None:
    ward.status = 0x0110
    ward.ask((CT_CLASS, str(generate_uid())))
    assert len(ward.turn()) == 1
    ward.clock.ahead += 7 * 86_400 + 60
    ward.commitments.turn()
    ward.status = 0
    assert ward.turn() == []
    assert records_of(ward.vault.unlocked().ledger).count() == 0
    assert [r["peer"] for r in ward.vault.auditor.read(0) if r["type"] == "commitment-dropped"] == ["CT1"]
    ward.clock.ahead = 0.0


def test_a_request_of_2000_instances_is_answered_in_one_report(ward: Ward) -> None:
    good = ward.good
    unknown = [(CT_CLASS, f"1.2.826.0.1.3680043.8.498.{number}") for number in range(1, 2000)]
    transaction, status = ward.ask(*unknown[:900], good, *unknown[900:])
    assert status == 0
    [(event, report)] = ward.turn()
    assert (event, report.TransactionUID) == (2, transaction)
    assert committed(report) == {good[1]}
    assert failed(report) == dict.fromkeys([sop for _, sop in unknown], 0x0112)


def without(element: str) -> Dataset:
    asked = Dataset()
    asked.TransactionUID = "1.2.3"
    asked.ReferencedSOPSequence = [item(CT_CLASS, "1.2.3.4")]
    delattr(asked, element)
    return asked


def test_a_malformed_request_is_refused_and_nothing_of_it_is_kept(ward: Ward) -> None:
    empty, odd = without("TransactionUID"), without("TransactionUID")
    empty.TransactionUID, empty.ReferencedSOPSequence = "1.2.3", []
    with scu.lenient():
        odd.TransactionUID = "no UID"
    lacks = without("TransactionUID")
    lacks.TransactionUID = "1.2.3"
    del lacks.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    statuses = [ward.action(asked) for asked in (without("TransactionUID"), without("ReferencedSOPSequence"))]
    with scu.lenient():
        statuses += [ward.action(asked) for asked in (empty, odd, lacks)]
    assert statuses == [0x0115] * 5
    assert ward.ask((CT_CLASS, "1.2.3"), action=2)[1] == 0x0123
    assert ward.ask((CT_CLASS, "1.2.3"), instance="1.2.3")[1] == 0x0112
    large = [(CT_CLASS, f"1.2.826.0.1.3680043.8.498.{number:030}") for number in range(1, 11_000)]
    assert ward.ask(*[(c, s.replace(".0000", ".1")) for c, s in large])[1] == 0x0213
    ward.vault.advance(10.0)
    assert records_of(ward.vault.unlocked().ledger).count() == 0


def test_only_who_may_commit_and_listens_is_offered_commitment_and_uncompressed_only(ward: Ward) -> None:
    accepted = {}
    for title, syntax in (("CT1", EXPLICIT), ("CT1", DEFLATED), ("NOWHERE", EXPLICIT), ("STORES", EXPLICIT)):
        context = scu.tls(ward.server.home / "issued" / title, title)
        contexts = [build_context(COMMITMENT, syntax), build_context("1.2.840.10008.1.1")]
        with scu.associated(ward.server.port, context, contexts, calling=title) as association:
            accepted[title, syntax] = [str(c.abstract_syntax) for c in association.accepted_contexts]
    assert [len(found) for found in accepted.values()] == [2, 1, 1, 1]


@pytest.mark.needs("strace")
def test_a_vault_killed_while_it_takes_a_request_loses_nothing_of_it(ward: Ward, tmp_path: Path) -> None:
    ward.end()
    points = [("unlink", 1), ("unlink", 2), *(("fdatasync", n) for n in range(2, 22))]
    chosen = [*points[:2], *random.Random("taken").sample(points[2:], 1)]
    pairs = [(CT_CLASS, f"1.2.3.{number}") for number in range(1, 1001)]
    transactions = []
    for call, when in chosen:
        transaction, status = ward.ask(*pairs)
        assert status == 0
        transactions.append(transaction)
        command = [
            str(find_command("strace")), "-f", "-qq", "-o", str(tmp_path / "out"), "-e", f"trace={call}",
            "-e", f"inject={call}:signal=SIGKILL:when={when}",
            sys.executable, "-m", "storescp", "--config", str(ward.server.config), "vault",
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            # A point that is never reached: it took everything, and is killed where it stands.
            while process.poll() is None and any(p.suffix == ".events" for p in ward.server.incoming.iterdir()):
                time.sleep(0.02)
            ward.server.kill("vault")
            process.wait(30)
    ward.begin()
    ward.vault.advance(10.0)
    kept = list(records_of(ward.vault.unlocked().ledger).all())
    assert {one.transaction for one in kept} == set(transactions)
    for one in kept:
        assert one.pairs() == pairs
    known = records_of(ward.vault.unlocked().ledger)
    assert known.count(WAITING) + known.count(DECIDED) == len(transactions)
    assert {report.TransactionUID for _, report in ward.turn()} == set(transactions)
