"""kill -9 before any step of a backup: every one that has its name is whole, and the next one tidies up and goes on.

A seeded sample of the points runs here, all of them in 'make crash' (STRONGROOM_CRASH=all).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from conftest import Server, changed, find_command, send
from pydicom.data import get_testdata_file
from test_backup import backed_up, source_of, unlocked

from keys import shares
from storage.backup import Folder
from storescp import clock
from storescp.config import load
from storescp.vault.backup import Backups
from storescp.vault.drill import drill
from storescp.vault.erase import Erase
from storescp.vault.recovery import Recovery

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
STUDY = str(pydicom.dcmread(CT).StudyInstanceUID)
ALL = os.environ.get("STRONGROOM_CRASH") == "all"
SEED = int(os.environ.get("STRONGROOM_CRASH_SEED", "2026"))
CALLS = "mkdir,rename,unlink,unlinkat,rmdir,write,pwrite64,fsync,fdatasync,ftruncate"
# What the vault does for 'strongroom backup --keep 1', in one thread; calls that fail mark its begin and its end.
SCRIPT = """
import contextlib, os, sys
from pathlib import Path
from keys import slots
from storescp.config import load
from storescp.vault.backup import Backups
from storescp.vault.state import Vault
config = load(Path(sys.argv[1]))
vault = Vault(config)
vault.unlock(slots.read_key_file(config.key_file))
with contextlib.suppress(FileNotFoundError):
    os.unlink("/begin-of-the-backup")
list(Backups(vault).run(0, Path(sys.argv[2]), keep=1))
with contextlib.suppress(FileNotFoundError):
    os.unlink("/end-of-the-backup")
"""

pytestmark = [
    pytest.mark.needs("strace"),
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def traced(server: Server, folder: Path, call: str, when: int) -> tuple[int, str]:
    """Make a backup in a process that dies before the ``when``-th of a call; return its status and what it called."""
    output = server.home / "trace"
    command = [str(find_command("strace")), "-f", "-qq", "-o", str(output), "-e", f"trace={CALLS}"]
    if when:
        command += ["-e", f"inject={call}:signal=SIGKILL:when={when}"]
    command += [sys.executable, "-c", SCRIPT, str(server.config), str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return done.returncode, output.read_text()


def points(trace: str) -> tuple[list[tuple[str, int]], int]:
    """Return the points between begin and end in their order, and which of them gives the generation its name.

    A point is a call, and which one of it since the process began.
    """
    counts: Counter[str] = Counter()
    found, named, begun = [], 0, False
    for line in trace.splitlines():
        called = re.match(r"\d+ +(\w+)\((.*)", line)
        if called is None:
            continue
        counts[called[1]] += 1
        if "/end-of-the-backup" in line:
            break
        if begun:
            if called[1] == "rename" and re.search(r'\.making", "[^"]*Z-[0-9a-f]{8}"', line):
                named = len(found)
            found.append((called[1], counts[called[1]]))
        begun = begun or "/begin-of-the-backup" in line
    assert named
    return found, named


@pytest.mark.timeout(3600 if ALL else 180)
@pytest.mark.parametrize("scenario", ["a folder with an older backup", "a new folder"])
def test_a_backup_killed_before_any_step_harms_none_and_the_next_one_is_whole(
    make_server: Callable[[], Server], tmp_path: Path, scenario: str
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.set("gate", workers=1, spare_bytes=0)
    server.start("gate")
    assert send(server, [CT, MR]) == [0, 0]
    (server.incoming / ("0f" * 16)).write_bytes(b"\0" * 5000)
    server.stop()
    folder, signing_key = server.home / "backup", load(server.config).signing_key
    with unlocked(server) as vault:
        vault.admit()
        key, words = shares.new_recovery(vault.unlocked().ring.store_id, 2, 2, created=clock.now())
        Recovery(vault).add(0, key)
        if scenario == "a folder with an older backup":
            backed_up(vault, folder)
            # Of what that one names a pack is not in the next one; and one broke off.
            list(Erase(vault).run(0, STUDY, "a test"))
            (folder / "generations" / "20200101T000000Z-00000000.making" / "audit").mkdir(parents=True)
    server.start("gate")
    assert send(server, [changed(MR, tmp_path, SOPInstanceUID="1.2.4.1", StudyInstanceUID="1.2.1")]) == [0]
    server.stop()
    with unlocked(server) as vault:
        vault.admit()
        open_ = vault.unlocked()
        # What nobody can open gets a name of its own in quarantine.
        held = {*open_.keys_db.packs(), *(path.name for path in open_.archive.quarantine_files())}
        assert len(held) == open_.keys_db.count() + 1
    names = [name for name in ("store", "anchors", "backup") if (server.home / name).exists()]
    prepared = server.home / "prepared"
    for name in names:
        shutil.copytree(server.home / name, prepared / name)

    def run(call: str, when: int) -> tuple[int, str]:
        for name in ("store", "anchors", "backup"):
            shutil.rmtree(server.home / name, ignore_errors=True)
        for name in names:
            shutil.copytree(prepared / name, server.home / name)
        return traced(server, folder, call, when)

    status, trace = run("", 0)
    assert status == 0, trace
    every, named = points(trace)
    counts = Counter(call for call, _ in every)
    assert counts.keys() >= {"mkdir", "rename", "write", "fsync", "pwrite64"}
    print(f"{scenario}: {len(every)} points: {dict(counts)}")
    if not ALL:
        # Around the one step that counts; and of the others those that make or remove names.
        chance = random.Random(f"{SEED} {scenario}")
        near = every[named - 1 : named + 2]
        steps = [p for p in every if p[0] in {"mkdir", "rename", "unlink", "unlinkat", "rmdir"} and p not in near]
        every = [*near, *chance.sample(steps, 3)]
    for call, when in every:
        at = (scenario, call, when)
        assert run(call, when)[0] == -9, at
        found = Folder(folder)
        generations = found.generations()
        assert generations or scenario == "a new folder", at
        for name in generations:
            manifest = found.read(found.generation(name), signing_key)
            assert list(found.check(found.generation(name), manifest)) == [], at
        # The store goes on, and so does the next backup.
        with unlocked(server) as vault:
            assert vault.auditor.fault == "", at
            made = backed_up(vault, folder, keep=1)
            assert {one.id for one in Backups(vault).known()} >= {made.id}, at
        assert [path.name for path in (folder / "generations").iterdir()] == [made.id], at
        assert {path.name for path in (folder / "packs").rglob("*") if path.is_file()} == held, at
        assert {path.name for path in folder.iterdir()} == {"strongroom-backup", "packs", "generations"}, at
        scratch = tmp_path / f"{call}-{when}"
        scratch.mkdir()
        said = list(drill(source_of(folder, words), words, scratch, 0))[-1]["said"]
        assert (said["problems"], said["opened_packs"]) == ([], made.packs), at
