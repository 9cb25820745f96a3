"""What a process gives up when it starts, and that it keeps its memory out of swap only where that cannot hurt it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import find_command

_GIB = 1 << 30
_NOBODY = 65_534
# Prints what became of the process; the mapping is never touched.
_PROGRAM = f"""
import json, mmap, os, resource
from storescp.harden import harden

def memory():
    fields = (line.split() for line in open("/proc/self/status"))
    return {{f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if f[0] in ("VmLck:", "VmRSS:")}}

limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
locked = harden(0o027)
first = memory()
mapping = mmap.mmap(-1, {_GIB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(json.dumps({{
    "locked": locked,
    "first": first,
    "then": memory(),
    "limit": limit,
    "limit_then": resource.getrlimit(resource.RLIMIT_MEMLOCK),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "umask": os.umask(0),
}}))
"""
_ARGON2 = """
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from storescp.harden import harden

assert harden(0o077)
Argon2id(salt=bytes(16), length=32, iterations=1, lanes=4, memory_cost=1 << 20).derive(b"secret")
"""


def run(program: str, *prefix: str, user: int | None = None) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hardened(*prefix: str, user: int | None = None) -> Any:
    """Return what a process says of itself that hardened itself and then mapped 1 GiB."""
    return json.loads(run(_PROGRAM, *prefix, user=user))


def ordinary() -> int | None:
    """Return as whom to run so as to have no rights: None for as whom this runs."""
    return _NOBODY if os.geteuid() == 0 else None


def command(name: str, *arguments: str) -> Sequence[str]:
    return [find_command(name) or name, *arguments]


@pytest.mark.needs_root
def test_memory_is_locked_now_and_later_and_what_is_not_touched_takes_none() -> None:
    found = hardened()
    assert found["locked"]
    assert found["first"]["VmLck"] > found["first"]["VmRSS"] // 2
    assert found["then"]["VmLck"] > _GIB
    assert found["then"]["VmRSS"] < _GIB // 4


@pytest.mark.needs("setpriv")
@pytest.mark.needs_root
def test_an_ordinary_user_with_the_capability_locks_its_memory_and_keeps_its_limit() -> None:
    user = ("--reuid", str(_NOBODY), "--regid", str(_NOBODY), "--clear-groups")
    found = hardened(*command("setpriv", *user, "--inh-caps", "+ipc_lock", "--ambient-caps", "+ipc_lock"))
    assert found["locked"]
    assert found["then"]["VmLck"] > _GIB
    if found["limit"][1] != resource.RLIM_INFINITY:
        assert found["limit_then"] == found["limit"]


@pytest.mark.needs("prlimit")
def test_under_a_limit_nothing_is_locked_and_later_mappings_succeed() -> None:
    found = hardened(*command("prlimit", "--memlock=65536:65536"), user=ordinary())
    assert not found["locked"]
    assert found["then"]["VmLck"] == 0
    assert found["limit_then"] == found["limit"] == [65_536, 65_536]


@pytest.mark.needs("prlimit", "unshare")
@pytest.mark.needs_root
def test_a_capability_that_counts_in_a_namespace_only_locks_nothing() -> None:
    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    # More than the process has when it starts, less than it maps later: the limit that would bite in the middle.
    limit = _GIB // 2 if most == resource.RLIM_INFINITY else min(_GIB // 2, most)
    namespace = command("unshare", "--user", "--map-root-user")
    found = hardened(*command("prlimit", f"--memlock={limit}:{limit}"), *namespace)
    assert not found["locked"]
    assert found["then"]["VmLck"] == 0


@pytest.mark.needs_root
def test_a_passphrase_that_takes_1_gib_is_derived_in_locked_memory() -> None:
    run(_ARGON2)


def test_there_are_no_core_dumps_as_many_files_as_may_be_and_the_umask_is_as_asked() -> None:
    found = hardened()
    assert found["core"] == [0, 0]
    assert found["files"][0] == found["files"][1]
    assert found["umask"] == 0o027
