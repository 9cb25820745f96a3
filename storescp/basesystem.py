"""What an installation asks of the system under it: its users and groups, and its commands."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from storescp.errors import StrongroomError


class Names:
    """Users and groups by name: the scratch root's own, and where it has none this machine's."""

    def __init__(self, root: str) -> None:
        self.users: dict[str, int] = {}
        self.groups: dict[str, int] = {}
        if not root:
            self.users = {user.pw_name: user.pw_uid for user in pwd.getpwall()}
            self.groups = {group.gr_name: group.gr_gid for group in grp.getgrall()}
            return
        for names, file in ((self.users, "passwd"), (self.groups, "group")):
            with contextlib.suppress(FileNotFoundError):
                for line in Path(root, "etc", file).read_text("utf-8").splitlines():
                    words = line.split(":")
                    if len(words) > 2 and words[2].isascii() and words[2].isdigit():
                        names[words[0]] = int(words[2])
        self.users.setdefault("root", 0)
        self.groups.setdefault("root", 0)

    def chown(self, path: Path, user: str, group: str, say: Callable[[str], None]) -> None:
        """Give a file to a user and a group, or say that there are none."""
        if os.geteuid() != 0:
            return
        if user not in self.users or group not in self.groups:
            say(f"WARNING: {path} stays root's: there is no user {user} or group {group}")
            return
        os.chown(path, self.users[user], self.groups[group], follow_symlinks=False)


def run(command: tuple[str, ...], *, given: bytes = b"") -> None:
    """Run a command of systemd's.

    Raises:
        StrongroomError: It failed; with what it said.
    """
    program = find(command[0])
    if program is None:
        raise StrongroomError(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], input=given, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise StrongroomError(f"'{' '.join(command)}' failed with status {done.returncode}: {said}")


def find(command: str) -> str | None:
    """Return where a command is; systemd's may stand where an ordinary user does not look."""
    return shutil.which(command, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:/usr/bin:/bin")
