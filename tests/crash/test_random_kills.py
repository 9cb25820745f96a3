"""Processes are killed at random while objects arrive: few seeded rounds here, 200 in 'make crash'."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file
from scu import raw_data_set

ROUNDS = int(os.environ.get("STRONGROOM_CRASH_ROUNDS", "4"))
SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))
CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))


def _object(number: int) -> scu.Object:
    """Return a new instance of the CT: same length of UID, so that the data set only differs there."""
    old = CT.sop_instance
    new = (old[: -len(str(number))] + str(number)).encode()
    assert CT.data.count(old.encode()) == 1
    return CT._replace(sop_instance=new.decode(), data=CT.data.replace(old.encode(), new))


# pynetdicom leaves sockets to the garbage collector when the server dies under an association.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collected")
@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_random_kills_lose_nothing_acknowledged(make_server: Callable[[], Server], tmp_path: Path) -> None:
    chance = random.Random(SEED)
    server = make_server()
    server.init()
    folder = server.add_peer("CT1")
    server.set("gate", pack_idle_seconds=1)
    context = scu.tls(folder)
    acknowledged: dict[str, bytes] = {}
    sent: dict[str, bytes] = {}
    number = 0
    for round_number in range(ROUNDS):
        server.start()
        victim = chance.choice(["gate", "gate-worker", "vault", "serve"])
        timer = threading.Timer(chance.uniform(0.05, 1.5), server.kill, (victim,))
        timer.start()
        try:
            while timer.is_alive():
                number += 1
                item = _object(number)
                sent[item.sop_instance] = item.data
                with contextlib.suppress(AssertionError, OSError, IndexError, ValueError):
                    if scu.send(server.port, context, [item]) == [0]:
                        acknowledged[item.sop_instance] = item.data
        finally:
            timer.join()
            server.stop(signal.SIGKILL)
            server.kill_all()
        if round_number % 10 == ROUNDS % 10 or round_number == ROUNDS - 1:
            out = tmp_path / f"out-{round_number}"
            assert server.run("export", "--all", "--to", out).status in {0, 5}
            held = {path.stem: raw_data_set(path) for path in out.rglob("*.dcm")}
            assert acknowledged.items() <= held.items(), (SEED, round_number, victim)
            assert held.items() <= sent.items()
            assert server.run("verify").status == 0
    assert len(acknowledged) > ROUNDS
