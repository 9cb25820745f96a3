"""What a path lies on: the mount, and the block devices below it down to the disks. Sources: proc(5), sysfs.

Every function takes the root of the tree that it reads, so that another one can be planted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from storescp.doctor.facts import Place, Swap, Unseen

_OCTAL = re.compile(r"\\([0-7]{3})")
_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_DEPTH = 16
# RuntimeError: links that go round.
_ERRORS = (OSError, UnicodeDecodeError, RuntimeError)
# A device's number on this machine; None where there is no such device.
Number = Callable[[str], str | None]


class Mount(msgspec.Struct, frozen=True):
    """A line of ``/proc/self/mountinfo``."""

    number: str
    point: str
    filesystem: str
    source: str


class Below(msgspec.Struct, frozen=True):
    """What is below a device: dm-crypt on every way down (None: memory), and the disks at the bottom."""

    encrypted: bool | Unseen | None
    disks: tuple[str, ...] = ()


def mounts(text: str) -> list[Mount]:
    """Return the mounts that ``/proc/self/mountinfo`` lists; lines of another form are left out."""
    found = []
    for line in text.splitlines():
        front, dash, back = line.partition(" - ")
        first, last = front.split(" "), back.split(" ")
        if dash and len(first) >= 6 and len(last) >= 2:
            found.append(Mount(first[2], _plain(first[4]), last[0], _plain(last[1])))
    return found


def mount_of(path: str, known: list[Mount]) -> Mount | None:
    """Return the mount that a path is in: of several at one point the last one covers the others."""
    best: Mount | None = None
    for mount in known:
        inside = mount.point in {"/", path} or path.startswith(f"{mount.point}/")
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def number_of(device: str) -> str | None:
    """Return the number, ``major:minor``, of a block device by its path."""
    try:
        found = os.stat(device).st_rdev
    except OSError:
        return None
    return f"{os.major(found)}:{os.minor(found)}" if found else None


def place(name: str, path: Path, root: Path = Path("/"), number: Number = number_of) -> Place | Unseen:
    """Return what a path lies on.

    Args:
        name: What the path is, for people.
        path: It, or what is there of it: a folder that is not made yet is where the nearest one above it is.
        root: Of the tree with ``proc`` and ``sys``.
        number: Gives a device's number.
    """
    try:
        known = mounts((root / "proc/self/mountinfo").read_text())
        mount = mount_of(os.path.realpath(path), known)
        if mount is None:
            return Unseen(f"{path} is in no mount that /proc/self/mountinfo lists")
        below = _mounted(mount, known, root, number, 0)
    except _ERRORS as error:
        return Unseen(f"what {path} lies on cannot be read: {_said(error)}")
    return Place(
        name=name,
        path=str(path),
        mount=mount.point,
        filesystem=mount.filesystem,
        encrypted=below.encrypted,
        disks=below.disks,
    )


def swaps(root: Path = Path("/"), number: Number = number_of) -> tuple[Swap, ...] | Unseen:
    """Return the swap areas in use."""
    try:
        lines = (root / "proc/swaps").read_text().splitlines()[1:]
        known = mounts((root / "proc/self/mountinfo").read_text())
        rows = [line.split() for line in lines]
        return tuple(_swap(_plain(row[0]), row[1], known, root, number) for row in rows if len(row) > 1)
    except _ERRORS as error:
        return Unseen(f"swap cannot be seen: {_said(error)}")


def _swap(name: str, kind: str, known: list[Mount], root: Path, number: Number) -> Swap:
    if kind == "file":
        mount = mount_of(name, known)
        below = _mounted(mount, known, root, number, 0) if mount else Below(Unseen("it is in no mount"))
    else:
        at = number(name)
        below = device(at, root, number) if at else Below(Unseen(f"there is no device {name}"))
    return Swap(name=name, encrypted=below.encrypted)


def device(at: str, root: Path, number: Number, depth: int = 0) -> Below:
    """Return what is below a block device, by its number: sysfs tells which devices it is made of."""
    folder = root / "sys/dev/block" / at
    try:
        real = folder.resolve(strict=True)
        # A partition is a part of the device that its folder is in.
        node = real.parent if (real / "partition").exists() else real
        return _node(node, root, number, depth)
    except _ERRORS as error:
        return Below(Unseen(f"/sys does not tell about device {at}: {_said(error)}"))


def _node(node: Path, root: Path, number: Number, depth: int) -> Below:
    if depth > _DEPTH:
        return Below(Unseen("devices are stacked too deep"))
    if node.name.startswith("zram"):
        return _zram(node, root, number, depth)
    backing = node / "loop/backing_file"
    if backing.exists():
        known = mounts((root / "proc/self/mountinfo").read_text())
        mount = mount_of(backing.read_text().strip(), known)
        return _mounted(mount, known, root, number, depth + 1) if mount else Below(Unseen("a loop device's file"))
    slaves = [(node / "slaves" / name).resolve() for name in _names(node / "slaves")]
    parts = [s.parent if (s / "partition").exists() else s for s in slaves]
    below = [_node(part, root, number, depth + 1) for part in parts]
    disks = tuple(sorted({disk for one in below for disk in one.disks})) or (node.name,)
    if _text(node / "dm/uuid").startswith("CRYPT-"):
        return Below(True, disks)
    if not below:
        return Below(False, disks)
    return Below(_all([one.encrypted for one in below]), disks)


def _zram(node: Path, root: Path, number: Number, depth: int) -> Below:
    backing = _text(node / "backing_dev")
    if backing in {"", "none"}:
        return Below(None)
    at = number(backing)
    return device(at, root, number, depth + 1) if at else Below(Unseen(f"{node.name} writes to {backing}"))


def _mounted(mount: Mount, known: list[Mount], root: Path, number: Number, depth: int) -> Below:
    if mount.filesystem in _MEMORY:
        return Below(None)
    if mount.filesystem == "zfs":
        return Below(Unseen("ZFS keeps that to itself: 'zfs get encryption' tells"))
    if mount.filesystem == "overlay":
        return Below(Unseen("it is in a container's overlay: look at the machine that runs the container"))
    at = mount.number
    if at.startswith("0:"):
        # btrfs has numbers of its own; its source is one of its devices.
        found = number(mount.source) if mount.source.startswith("/dev/") else None
        if found is None:
            return Below(Unseen(f"{mount.filesystem} ({mount.source}) is on no disk of this machine that can be seen"))
        at = found
    below = device(at, root, number, depth)
    return _btrfs(at, below, root, number, depth) if mount.filesystem == "btrfs" else below


def _btrfs(at: str, first: Below, root: Path, number: Number, depth: int) -> Below:
    """Return what is below all devices of a btrfs, by one of them."""
    own = (root / "sys/dev/block" / at).resolve()
    for folder in (root / "sys/fs/btrfs").glob("*/devices"):
        members = [(folder / name).resolve() for name in _names(folder)]
        if own in members:
            nodes = [m.parent if (m / "partition").exists() else m for m in members]
            below = [_node(node, root, number, depth + 1) for node in nodes]
            return Below(_all([b.encrypted for b in below]), tuple(sorted({d for b in below for d in b.disks})))
    return first


def _all(parts: list[bool | Unseen | None]) -> bool | Unseen | None:
    """Return whether all are encrypted: one that is not decides, then one that was not seen."""
    if False in parts:
        return False
    return next((part for part in parts if isinstance(part, Unseen)), None if None in parts else True)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _plain(text: str) -> str:
    """Return a name of ``/proc`` without its octal escapes."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
