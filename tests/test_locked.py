"""Locked and unlocked: at a terminal, with wrong secrets, over time."""

from __future__ import annotations

import os
import pty
import sys
import time
from collections.abc import Callable

import pytest
from conftest import Server

PASSPHRASE = "copper lantern fjord mistake"


@pytest.fixture
def locked(make_server: Callable[[], Server]) -> Server:
    """A store that opens with a passphrase alone, served, and so locked."""
    server = make_server()
    (server.home / "passphrase").write_text(PASSPHRASE + "\n")
    server.ok("init", "--with-pki", "--passphrase-file", server.home / "passphrase", "--listen", "127.0.0.1:0")
    return server.start()


def at_terminal(server: Server, typed: str, *arguments: str) -> tuple[int, str]:
    """Run a command at a terminal of its own and type when it prompts; return exit status and what was shown."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "storescp", "--config", str(server.config), *arguments])
    shown = b""
    while True:
        try:
            part = os.read(terminal, 1024)
        except OSError:
            break
        if not part:
            break
        shown += part
        if typed and b"assphrase" in shown:
            os.write(terminal, typed.encode() + b"\n")
            typed = ""
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_unlock_asks_at_a_terminal_and_shows_nothing_that_is_typed(locked: Server) -> None:
    status, shown = at_terminal(locked, PASSPHRASE, "unlock")
    assert status == 0
    assert "unlocked" in shown
    assert PASSPHRASE not in shown
    assert not locked.status()["locked"]


def test_with_no_vault_running_a_command_asks_for_the_passphrase_itself(locked: Server) -> None:
    locked.stop()
    status, shown = at_terminal(locked, PASSPHRASE, "list")
    assert status == 5
    assert "nothing matched" in shown


def test_wrong_secrets_get_one_constant_message_and_answers_that_come_later_each_time(locked: Server) -> None:
    wrong = locked.home / "wrong"
    messages, durations = set(), []
    for number in range(4):
        wrong.write_text(f"not the passphrase {number}")
        began = time.monotonic()
        done = locked.run("unlock", "--passphrase-file", wrong)
        durations.append(time.monotonic() - began)
        assert done.status == 4
        messages.add(done.err)
    assert len(messages) == 1
    assert "this does not unlock the store" in messages.pop()
    # The delays are half a second, one, two and four: what is measured is their order, not the machine.
    assert durations[3] > durations[0] + 2
    locked.ok("unlock", "--passphrase-file", locked.home / "passphrase")
    assert any("a wrong secret was given to unlock, 4 in a row" in line for line in locked.log)


def test_status_says_since_when_it_is_locked_and_how_much_waits(locked: Server) -> None:
    status = locked.status()
    assert status["locked"]
    assert status["locked_since"] <= status["time"]
    assert "LOCKED since" in locked.ok("status").out
    locked.ok("unlock", "--passphrase-file", locked.home / "passphrase")
    assert locked.status()["locked_since"] is None
    locked.ok("lock")
    assert locked.status()["locked"]
    assert "the vault is locked" in locked.run("export", "--all", "--to", locked.home / "out").err
