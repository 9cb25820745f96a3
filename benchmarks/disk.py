"""Where the servers write: a work folder that is emptied only at the very end, and an ext4 image with a journal.

Deleting files makes creating others slow for a while: ext4 without a journal takes no inode again that was deleted in
the last minutes, and looks at each of them every time (20 us become 600). So nothing is deleted while anything is
measured, each run has a folder in a block group of its own where ext4 can be told so, and what a create costs there is
measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.programs import found

GB = 10**9
# What must stay free whatever is asked for.
_SPARE = 4 * GB


class DiskError(Exception):
    """The disk is too small, or an image cannot be made; the message says why."""


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """Make a folder; delete it with everything in it at the end, and the folder around it if that is empty then."""
    parent.mkdir(parents=True, exist_ok=True)
    # Short: a Unix socket's path in it may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="b", dir=parent))
    # A server that runs as a user of its own passes through; what lies here it cannot list.
    folder.chmod(0o711)
    spread(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()


def spread(folder: Path) -> None:
    """Ask ext4 to put each folder in this one into a block group of its own."""
    with contextlib.suppress(DiskError):
        _do("chattr", "+T", str(folder))


def check_room(folder: Path, planned: int, limit: int) -> None:
    """Refuse what does not fit.

    Raises:
        DiskError: It is more than the limit, or than what is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - _SPARE
    if planned > min(limit, free):
        raise DiskError(
            f"this run would write {planned / GB:.0f} GB; the limit is {limit / GB:.0f} GB "
            f"and {max(free, 0) / GB:.0f} GB are free: fewer rounds, cases or servers"
        )


def quiet(seconds: float) -> None:
    """Let what an earlier run left dirty reach the disk, so that the next does not pay for it."""
    os.sync()
    time.sleep(seconds)


@contextlib.contextmanager
def journaled(folder: Path, size: int) -> Iterator[tuple[Path, str]]:
    """Make and mount an ext4 image with a journal; yield where it is mounted and how its loop device reads it.

    Like a disk it has all its blocks from the start: in a file with holes, or with blocks never written, each sync
    would pay for the outer file system's bookkeeping as well (a third more for 0.5 MB).

    Raises:
        DiskError: Loop devices, mkfs.ext4 or root are not there.
    """
    if os.geteuid() != 0:
        raise DiskError("mounting an image needs root")
    image, mount = folder / "image", folder / "j"
    _zeros(image, size)
    options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    _do("mkfs.ext4", "-F", "-q", "-m", "0", "-O", "has_journal", "-E", options, str(image))
    device, how = _loop(image)
    try:
        mount.mkdir()
        _do("mount", "-t", "ext4", device, str(mount))
        try:
            yield mount, how
        finally:
            _do("umount", str(mount))
    finally:
        _do("losetup", "--detach", device)


def _zeros(file: Path, size: int) -> None:
    block = bytes(1 << 23)
    with file.open("wb", buffering=0) as image:
        os.posix_fallocate(image.fileno(), 0, size)
        for start in range(0, size, len(block)):
            image.write(block[: min(len(block), size - start)])
        os.fsync(image.fileno())
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _loop(image: Path) -> tuple[str, str]:
    """Attach an image, past the page cache where that works: a disk has none either."""
    try:
        return _do("losetup", "--find", "--show", "--direct-io=on", str(image)).strip(), "direct I/O"
    except DiskError:
        return _do("losetup", "--find", "--show", str(image)).strip(), "through the page cache"


def _do(name: str, *arguments: str) -> str:
    command = [found(name) or name, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DiskError(f"{name}: {type(error).__name__}") from error
    if done.returncode:
        raise DiskError(f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
    return done.stdout
