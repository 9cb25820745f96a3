"""SIGTERM: what is in transfer is finished and kept, what is idle is ended, nothing new comes in."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file
from pynetdicom import evt
from pynetdicom.presentation import build_context

FRAMES = 2048  # of 32 KiB: 64 MiB in 513 PDUs


@pytest.fixture
def patient(server: Server) -> Server:
    """A server that would wait an hour for an association to finish: whatever ends earlier does so by itself."""
    server.stop()
    server.set("gate", drain_seconds=3600, idle_seconds=3600, request_seconds=600)
    return server.start()


def terminate(server: Server) -> None:
    """Send SIGTERM; return when the gate has begun to stop."""
    [supervisor] = server.pids("serve")
    os.kill(supervisor, signal.SIGTERM)
    server.wait_log("gate: stopping")


def wait_refused(server: Server) -> bool:
    """Tell whether connections come to be refused; the listener closes a moment after the log says so."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", server.port), 5).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            # It was in the queue when the listener closed.
            continue
    return False


def test_an_object_in_transfer_is_finished_and_kept_while_new_connections_are_refused(
    patient: Server, tmp_path: Path
) -> None:
    item = scu.large_file(tmp_path / "large.dcm", FRAMES)
    context = scu.tls(patient.home / "issued" / "CT1")

    def stop_midway() -> bool:
        terminate(patient)
        return wait_refused(patient)

    refused, handlers = scu.midway(stop_midway, after=FRAMES // 8)
    with scu.associated(patient.port, context, [item.context], handlers=handlers) as association:
        assert scu.store(association, item).Status == 0
    assert refused.result(0)
    patient.wait_log(f"association .*: 1 stored, 0 refused, {len(item.data)} bytes")
    assert patient.stop() == 0

    patient.start()
    assert [row["sop"] for row in patient.list()] == [item.sop_instance]
    patient.ok("export", "--sop", item.sop_instance, "--output", tmp_path / "exported.dcm")
    assert scu.raw_data_set(tmp_path / "exported.dcm") == item.data


@pytest.mark.parametrize("used", [False, True], ids=["never used", "used"])
def test_an_idle_association_is_ended_and_does_not_hold_up_the_stop(patient: Server, used: bool) -> None:
    item = scu.read(Path(get_testdata_file("CT_small.dcm", download=False)))
    with scu.associated(patient.port, scu.tls(patient.home / "issued" / "CT1"), [item.context]) as association:
        if used:
            assert scu.store(association, item).Status == 0
        terminate(patient)
        patient.wait_log(rf"association .* aborted: the server is stopping: {int(used)} stored")
        assert patient.stop() == 0
    patient.start()
    assert [row["sop"] for row in patient.list()] == [item.sop_instance] * used


def test_an_idle_association_is_told_of_the_stop_by_an_abort(patient: Server) -> None:
    received: list[str] = []
    handlers = [(evt.EVT_PDU_RECV, lambda event: received.append(type(event.pdu).__name__))]
    context = scu.tls(patient.home / "issued" / "CT1")
    contexts = [build_context(scu.VERIFICATION)]
    with scu.associated(patient.port, context, contexts, handlers=handlers) as association:
        terminate(patient)
        association.join(30)
    assert received == ["A_ASSOCIATE_AC", "A_ABORT_RQ"]


def test_a_silent_connection_does_not_hold_up_the_stop(patient: Server) -> None:
    with socket.create_connection(("127.0.0.1", patient.port)):
        # Connections are accepted in order: after an echo the silent one is in.
        with scu.associated(
            patient.port, scu.tls(patient.home / "issued" / "CT1"), [build_context(scu.VERIFICATION)]
        ) as association:
            assert association.send_c_echo().Status == 0
        terminate(patient)
        patient.wait_log("gate: stopped", 20)
        assert patient.stop() == 0
