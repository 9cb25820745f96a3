"""The files under systemd/ are understood by systemd's own tools, and lay out what the product expects."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).parent.parent / "systemd"


@pytest.mark.needs("systemd-sysusers", "systemd-tmpfiles")
@pytest.mark.needs_root
def test_users_and_folders_are_made_as_the_design_has_them(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for command in (
        ["systemd-sysusers", f"--root={tmp_path}", str(SYSTEMD / "strongroom.sysusers")],
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", str(SYSTEMD / "strongroom.tmpfiles")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        complaints = [line for line in done.stderr.splitlines() if not line.startswith("Creating ")]
        assert (done.returncode, complaints) == (0, [])
    lines = (tmp_path / "etc" / "passwd").read_text().splitlines()
    users = {line.split(":")[0]: int(line.split(":")[2]) for line in lines}
    incoming = os.stat(tmp_path / "var/spool/strongroom/incoming")
    assert (incoming.st_uid, incoming.st_mode & 0o7777) == (users["strongroom-gate"], 0o2770)
    for place in ("var/lib/strongroom", "var/lib/strongroom-anchors"):
        found = os.stat(tmp_path / place)
        assert (found.st_uid, found.st_mode & 0o7777) == (users["strongroom-vault"], 0o700)
