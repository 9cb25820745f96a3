"""A server that the tests of a module share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import Server


@contextmanager
def serving(factory: pytest.TempPathFactory, *titles: str, **gate: Any) -> Iterator[Server]:
    """Make a store with some peers, serve it, and stop it at the end."""
    server = Server(factory.mktemp("s"))
    try:
        server.init()
        for title in titles:
            server.add_peer(title)
        server.set("gate", **gate)
        yield server.start()
        assert server.stop() == 0
    finally:
        server.stop(signal.SIGKILL)
        for verb in ("serve", "gate", "vault"):
            for pid in server.pids(verb):
                os.kill(pid, signal.SIGKILL)
