"""The gate's workers: connections are spread and counted over all, and one that dies takes only its own along."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from pynetdicom.association import Association
from scu import raw_data_set

pytestmark = [
    pytest.mark.usefixtures("collected"),
    # pynetdicom leaves sockets to the garbage collector when the server dies under an association.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))
SECONDS = 30


@pytest.fixture
def gate(make_server: Callable[[], Server]) -> Server:
    """A store with a peer, CT1, whose gate has two workers and takes two connections; not started."""
    made = make_server()
    made.init()
    made.add_peer("CT1")
    made.set("gate", workers=2, maximum_associations=2, pack_idle_seconds=1, idle_seconds=600)
    return made


def until(what: Callable[[], bool], saying: str) -> None:
    """Wait for what only /proc or an attempt tells."""
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline, saying
        time.sleep(0.01)


def instance() -> scu.Object:
    """Return an instance that nobody sent yet."""
    uid = generate_uid(None).ljust(len(CT.sop_instance), "1")[: len(CT.sop_instance)]
    data = CT.data.replace(CT.sop_instance.encode(), uid.encode())
    assert data != CT.data
    return CT._replace(sop_instance=uid, data=data)


def request(server: Server, title: str = "CT1") -> Association:
    return scu.request(server.port, scu.tls(server.home / "issued" / title, title), [CT.context], calling=title)


@contextlib.contextmanager
def associated(server: Server, title: str = "CT1") -> Iterator[Association]:
    """Hold an association, asking again while there is none to have."""
    made: list[Association] = []

    def accepted() -> bool:
        made.append(request(server, title))
        return bool(made[-1].is_established)

    until(accepted, "no association is accepted")
    try:
        yield made[-1]
    finally:
        if made[-1].is_established:
            made[-1].release()


def port_of(association: Association) -> int:
    assert association.dul.socket is not None
    return int(association.dul.socket.socket.getsockname()[1])


def ports(pid: int, listening: int) -> set[int]:
    """Return the peers' ports of the connections that a process has open to the gate's port."""
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(entry.path))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote, state = fields[1], fields[2], fields[3]
        if state == "01" and int(local.split(":")[1], 16) == listening and f"socket:[{fields[9]}]" in inodes:
            found.add(int(remote.split(":")[1], 16))
    return found


def worker_of(server: Server, association: Association) -> int:
    """Return the worker that serves an association."""
    [pid] = [pid for pid in server.pids("gate-worker") if port_of(association) in ports(pid, server.port)]
    return pid


def is_closed_at_once(server: Server) -> bool:
    """Tell whether a new connection is closed before a byte was sent on it."""
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock:
        sock.settimeout(SECONDS)
        try:
            return sock.recv(1) == b""
        except ConnectionResetError:
            return True


def held(server: Server) -> dict[str, bytes]:
    server.wait_admitted()
    server.ok("export", "--all", "--to", server.home / "out")
    return {path.stem: raw_data_set(path) for path in (server.home / "out").rglob("*.dcm")}


def store(association: Association, sent: dict[str, bytes]) -> None:
    item = instance()
    assert scu.store(association, item).Status == 0
    sent[item.sop_instance] = item.data


def test_connections_are_spread_over_the_workers_and_no_other_process_keeps_them(gate: Server) -> None:
    gate.start("gate")
    with associated(gate) as one, associated(gate) as other:
        assert {worker_of(gate, one), worker_of(gate, other)} == set(gate.pids("gate-worker"))
        assert len(gate.pids("gate-worker")) == 2
        [first] = gate.pids("gate")
        until(lambda: not ports(first, gate.port), "the first process keeps a connection that it passed on")


def test_the_limit_of_associations_holds_over_all_workers_and_what_ends_makes_room(gate: Server) -> None:
    gate.start("gate")
    with associated(gate):
        with associated(gate):
            assert is_closed_at_once(gate)
            gate.wait_log("connection from 127.0.0.1:.* closed: the limit of associations is reached")
        with associated(gate) as again:
            store(again, {})
            assert is_closed_at_once(gate)


def test_connections_that_never_become_associations_count_until_they_end(gate: Server) -> None:
    gate.start("gate")
    with ExitStack() as silent:
        for _ in range(2):
            silent.enter_context(socket.create_connection(("127.0.0.1", gate.port)))
        assert is_closed_at_once(gate)
    with associated(gate), associated(gate):
        assert is_closed_at_once(gate)


def test_a_worker_that_is_killed_costs_only_its_own_associations_and_is_replaced(gate: Server) -> None:
    gate.start()
    sent: dict[str, bytes] = {}
    before = set(gate.pids("gate-worker"))
    with associated(gate) as doomed, associated(gate) as other:
        for association in (doomed, other):
            store(association, sent)
        killed = worker_of(gate, doomed)
        os.kill(killed, signal.SIGKILL)
        gate.wait_log(r"the gate's worker [12] ended with status -9; it is started again in 1 s")
        store(other, sent)
        doomed.join(SECONDS)
        assert not doomed.is_established
        # Its place is free again, and one place only.
        with associated(gate) as following:
            store(following, sent)
            assert is_closed_at_once(gate)
        until(lambda: len(gate.pids("gate-worker")) == 2, "the worker is not replaced")
        [new] = set(gate.pids("gate-worker")) - before

        def is_taken() -> bool:
            with associated(gate) as found:
                if worker_of(gate, found) != new:
                    return False
                store(found, sent)
                return True

        until(is_taken, "the new worker takes no connection")
        store(other, sent)
    with associated(gate) as one, associated(gate) as two:
        assert {worker_of(gate, one), worker_of(gate, two)} == set(gate.pids("gate-worker"))
        for association in (one, two):
            store(association, sent)
    assert held(gate) == sent
    assert len(sent) == 8
    assert not list(gate.home.rglob("quarantine/*/*"))


def test_an_object_that_a_killed_worker_had_half_of_is_not_held_and_what_it_acknowledged_is(
    gate: Server, tmp_path: Path
) -> None:
    gate.start()
    sent: dict[str, bytes] = {}
    large = scu.large_file(tmp_path / "large.dcm", 512)
    made: list[Association] = []

    def kill() -> None:
        os.kill(worker_of(gate, made[0]), signal.SIGKILL)

    done, handlers = scu.midway(kill, after=60)
    context = scu.tls(gate.home / "issued" / "CT1")
    with associated(gate) as other:
        made.append(scu.request(gate.port, context, [large.context], handlers=handlers))
        store(made[0], sent)
        with contextlib.suppress(Exception):
            # Whatever pynetdicom makes of a connection that breaks: it got no answer, as the archive must show.
            assert scu.store(made[0], large).Status != 0
        assert done.result(SECONDS) is None
        gate.wait_log(r"the gate's worker [12] ended with status -9")
        store(other, sent)
    assert held(gate) == sent
    until(lambda: not gate.deposits(), "a deposit is left")


def test_a_peer_added_while_running_comes_to_be_known_to_every_worker(gate: Server) -> None:
    gate.start("gate")
    gate.add_peer("MR1")
    gate.wait_log("peers and certificates read: 2 peers")
    with associated(gate, "MR1") as one, associated(gate, "MR1") as other:
        assert {worker_of(gate, one), worker_of(gate, other)} == set(gate.pids("gate-worker"))
        for association in (one, other):
            store(association, {})


def test_a_malformed_peer_file_leaves_every_worker_with_the_peers_it_had(gate: Server) -> None:
    gate.start("gate")
    (gate.peers / "bad.toml").write_text("ae_title = 1\n")
    gate.wait_log("peers and certificates stay as they were: .*bad.toml")
    with associated(gate) as one, associated(gate) as other:
        assert {worker_of(gate, one), worker_of(gate, other)} == set(gate.pids("gate-worker"))


def test_a_gate_that_is_killed_takes_its_workers_along_and_what_they_acknowledged_is_held(gate: Server) -> None:
    gate.start("gate")
    sent: dict[str, bytes] = {}
    with associated(gate) as one, associated(gate) as other:
        for association in (one, other):
            store(association, sent)
        gate.stop(signal.SIGKILL)
        until(lambda: not gate.pids("gate-worker"), "a worker outlives the gate")
        for association in (one, other):
            association.join(SECONDS)
            assert not association.is_established
    gate.start()
    assert held(gate) == sent
    assert len(sent) == 2


def test_a_gate_killed_under_a_supervisor_comes_back_and_nothing_acknowledged_is_lost(gate: Server) -> None:
    gate.start()
    sent: dict[str, bytes] = {}
    before = set(gate.pids("gate-worker"))
    with associated(gate) as one, associated(gate) as other:
        for association in (one, other):
            store(association, sent)
        gate.kill("gate")
        gate.port = int(gate.wait_log(r"listening on 127\.0\.0\.1:(\d+)")[1])
    until(lambda: not before & set(gate.pids("gate-worker")), "a worker outlives its gate")
    with associated(gate) as one, associated(gate) as other:
        for association in (one, other):
            store(association, sent)
    assert held(gate) == sent
    assert len(sent) == 4


def test_sigterm_lets_every_worker_finish_the_object_it_is_receiving(gate: Server, tmp_path: Path) -> None:
    gate.start("gate")
    context = scu.tls(gate.home / "issued" / "CT1")
    items = [scu.large_file(tmp_path / f"{number}.dcm", 256) for number in range(2)]

    def nested() -> int:
        """Send the second object, up to half; then stop the gate; the rest of both is sent afterwards."""

        def stop() -> None:
            [first] = gate.pids("gate")
            os.kill(first, signal.SIGTERM)
            gate.wait_log("stopping: associations in transfer")

        stopped, handlers = scu.midway(stop, after=30)
        with scu.associated(gate.port, context, [items[1].context], handlers=handlers) as association:
            status = int(scu.store(association, items[1]).Status)
        stopped.result(0)
        return status

    inner, handlers = scu.midway(nested, after=30)
    with scu.associated(gate.port, context, [items[0].context], handlers=handlers) as association:
        assert scu.store(association, items[0]).Status == 0
    assert inner.result(0) == 0
    assert gate.stop() == 0
    assert len([line for line in gate.log if re.search("association .* released: 1 stored, 0 refused", line)]) == 2
    gate.start()
    assert held(gate) == {item.sop_instance: item.data for item in items}


def test_a_reload_is_told_when_every_worker_has_taken_it_up(gate: Server) -> None:
    gate.start("gate")
    stopped = gate.pids("gate-worker")[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        gate.add_peer("MR1")
        with pytest.raises(AssertionError, match="no log line matches"):
            # The other worker answers in a moment.
            gate.wait_log("peers and certificates read", 3)
    finally:
        os.kill(stopped, signal.SIGCONT)
    gate.wait_log("peers and certificates read: 2 peers")


def test_a_broken_peer_file_ends_nothing_also_when_all_workers_die(gate: Server) -> None:
    gate.start("gate")
    with associated(gate):
        # As a reason this is longer than a message between gate and worker may be.
        uid = "\\u0001" * 1000
        (gate.peers / "bad.toml").write_text(f'ae_title = "X"\ncertificates = ["x"]\nprivate_sop_classes = ["{uid}"]\n')
        gate.wait_log("peers and certificates stay as they were: .*bad.toml")
        assert scu.send(gate.port, scu.tls(gate.home / "issued" / "CT1"), [instance()]) == [0]
    gate.kill("gate-worker")
    for _ in range(2):
        gate.wait_log(r"the gate's worker [12] receives again")
    assert len([line for line in gate.log if re.search("a peer is left out until .*bad.toml", line)]) == 2
    with associated(gate), associated(gate):
        pass


def test_a_worker_that_cannot_start_is_told_with_its_own_status(gate: Server) -> None:
    gate.start("gate")
    [published] = (gate.home / "spool" / "public").glob("deposit-*.key")
    kept = published.rename(published.with_suffix(".kept"))
    gate.kill("gate-worker")
    gate.wait_log(r"the gate's worker [12] ended with status 1; it is started again in 2 s")
    kept.rename(published)
    gate.wait_log(r"the gate's worker [12] receives again")
    with associated(gate):
        pass
