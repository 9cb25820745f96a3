"""Being another user for a moment, as whoever broke into one of its processes is."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator

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
