"""Strongroom as the benchmark runs it: gate and vault as two users, and as one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

from benchmarks.servers import ROOT, TITLE, Server, ServerError
from benchmarks.upper import Credentials, Target
from benchmarks.users import GATE, VAULT


class Strongroom(Server):
    """Gate and vault as two users, as in production. Needs the users of ``benchmarks.users``."""

    name = "strongroom"
    title = "Strongroom"
    without = (
        "nothing of these: sealed, synced before Success, indexed; gate and vault are two users, "
        "so that what is admitted was copied and opened by the vault"
    )
    called = "STRONGROOM"
    empty_bytes = 1 << 26
    users: ClassVar[tuple[str, ...]] = ("--vault-user", VAULT, "--gate-user", GATE)

    @property
    def config(self) -> Path:
        """The store's configuration."""
        return self.folder / "strongroom.toml"

    def prepare(self) -> None:
        key = str(self.folder / "store.key")
        self._do("init", "--with-pki", "--key-file", key, "--listen", f"127.0.0.1:{self.port}", *self.users)
        self._do("peer", "add", TITLE, "--issue", str(self.folder / "bench"))

    def command(self) -> list[str]:
        return [sys.executable, "-m", "storescp", "--config", str(self.config), "serve"]

    def ready(self) -> bool:
        return "serve: ready" in self.log.read_text(errors="replace") and super().ready()

    def target(self) -> Target:
        folder = self.folder / "bench"
        key, certificate = str(folder / f"{TITLE}.key"), str(folder / f"{TITLE}.pem")
        return Target(self.port, self.called, Credentials(key, certificate, str(folder / "ca.pem"), TITLE))

    def settle(self, timeout: float) -> float | None:
        """Wait until every deposit is admitted. The folder is watched, so that asking does not help the vault along."""
        begun = time.monotonic()
        while (now := time.monotonic()) - begun < timeout:
            if not self._waiting() and self._status()["deposits"]["packs"] == 0:
                return now
            time.sleep(0.1)
        raise ServerError(f"deposits still wait {timeout:g} s after the burst")

    def stored(self) -> int | None:
        return int(self._status()["counts"]["instances"])

    def _waiting(self) -> bool:
        """Tell whether a deposit lies there: a file with a pack's name. Packs in the making have others."""
        incoming = self.folder / "spool" / "incoming"
        return any(re.fullmatch("[0-9a-f]{32}", path.name) for path in incoming.rglob("*"))

    def _status(self) -> dict[str, dict[str, int]]:
        status: dict[str, dict[str, int]] = json.loads(self._do("status", "--json"))
        return status

    def _do(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "storescp", "--config", str(self.config), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise ServerError(f"strongroom {arguments[0]}: {done.stderr[-300:]}")
        return done.stdout


class StrongroomOne(Strongroom):
    """Gate and vault as the user who runs the benchmark."""

    name = "strongroom-one"
    title = "Strongroom, one user"
    without = "as Strongroom, but gate and vault are one user: deposits are renamed where they lie, not copied"
    users = ()
