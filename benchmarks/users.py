"""Two throw-away system users, so that gate and vault can run as two: made for one run, removed at its end."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.programs import found

VAULT, GATE = "strongroom-bench-v", "strongroom-bench-g"
# By this a user is known as ours: one that an earlier run could not remove is used again, another's is left alone.
_COMMENT = "Strongroom benchmark"
_REMOVAL_SECONDS = 10.0


class UsersError(Exception):
    """There cannot be two users here; the message says why."""


@contextlib.contextmanager
def throw_away() -> Iterator[None]:
    """Make the two users; remove them at the end, also after Ctrl-C.

    Raises:
        UsersError: Not root, no useradd, or such a user is there and not ours.
    """
    if os.geteuid() != 0:
        raise UsersError("only root can make two users and run processes as them")
    try:
        for name in (VAULT, GATE):
            _make(name)
        yield
    finally:
        for name in (VAULT, GATE):
            _remove(name)


def check(root: Path, folder: Path) -> None:
    """Prove that both users can run Strongroom and reach the folder to work in.

    Args:
        root: The folder that Strongroom is run from.
        folder: Where its stores will be.

    Raises:
        UsersError: One cannot.
    """
    for name in (VAULT, GATE):
        if not _runs(name, [sys.executable, "-m", "storescp", "--help"], root):
            raise UsersError(
                "this Python or this folder cannot be used by other users: a virtual environment made from "
                "/usr/bin/python3, in a folder that everybody may enter, can"
            )
        if not _runs(name, ["/bin/sh", "-c", 'test -x "$1"', "sh", str(folder)], root):
            raise UsersError("the folder to work in cannot be reached by other users: name another one with --work")


def _make(name: str) -> None:
    known = _known(name)
    if known is not None:
        if known.pw_gecos != _COMMENT:
            raise UsersError(f"there is a user {name} already, and not of this benchmark's making")
        return
    _do(
        "useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
        "--shell", "/usr/sbin/nologin", "--comment", _COMMENT, name,
    )  # fmt: skip


def _remove(name: str) -> None:
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while (known := _known(name)) is not None and known.pw_gecos == _COMMENT:
        try:
            _do("userdel", name)
        except UsersError as error:
            # Refused while a process of this user's is still ending.
            if time.monotonic() > deadline:
                print(f"benchmarks: the user {name} is left, remove it with 'userdel {name}': {error}", file=sys.stderr)
                return
            time.sleep(0.2)


def _known(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _runs(name: str, command: list[str], folder: Path) -> bool:
    user = pwd.getpwnam(name)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _do(name: str, *arguments: str) -> None:
    program = found(name)
    if program is None:
        raise UsersError(f"{name} is not installed")
    # In a session of its own: Ctrl-C must not stop it halfway, with the password file locked.
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        start_new_session=True,
    )  # fmt: skip
    if done.returncode:
        raise UsersError(f"{name}: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
