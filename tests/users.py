"""Being another user for a moment, as whoever broke into one of its processes is."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

VAULT, GATE, DESK, OTHER = "daemon", "nobody", "games", "backup"


@contextlib.contextmanager
def being(name: str) -> Iterator[None]:
    """Be another user, with the groups that it has and no others."""
    user, groups = pwd.getpwnam(name), os.getgroups()
    os.setgroups(os.getgrouplist(name, user.pw_gid))
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        assert pwd.getpwnam(VAULT).pw_gid not in os.getgroups() or name == VAULT
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Give a folder that other users may enter, which pytest's own are not; remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="strongroom-users-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
