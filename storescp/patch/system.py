"""What the system says of itself: Debian's packages and lists, the kernel, libraries in use. Read, never changed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from storescp.patch import debian, versions

_FORMAT = "${Package}\\t${Version}\\t${source:Package}\\t${source:Version}\\t${db:Status-Status}\\n"
_SECONDS = 300
_RELEASE_BYTES = 16 << 20
_KERNEL = re.compile(r"linux-image-(\d.*)", re.ASCII)
# A kernel's signed package and its unsigned twin are one kernel.
_UNSIGNED = "-unsigned"
_BUILD = re.compile(r"\bDebian (\S+)")


class Package(NamedTuple):
    """An installed Debian package."""

    name: str
    version: str
    source: str
    source_version: str


class Debian(NamedTuple):
    """Debian's packages, and what apt would do.

    Attributes:
        release: As in 12; empty where this is no Debian.
        packages: What is installed.
        problem: Why the packages could not be told; nothing where they could.
        upgrades: What apt would do; None where it could not be asked.
        date: Of the lists that it would do it by: the security suite's own.
        upgrades_problem: Why apt could not be asked, or its lists prove nothing.
    """

    release: str
    packages: tuple[Package, ...]
    problem: str
    upgrades: debian.Upgrades | None
    date: datetime | None
    upgrades_problem: str


class Kernel(NamedTuple):
    """The running kernel and the newest installed one; a problem where one of them cannot be told."""

    running: str
    newest: str
    since: datetime | None
    problem: str


class Library(NamedTuple):
    """A library that was deleted or replaced and is still used; by how many processes, since when."""

    path: str
    processes: int
    since: datetime | None


class Libraries(NamedTuple):
    """What our processes use that is gone; how many processes were looked at; what could not be seen."""

    found: tuple[Library, ...]
    processes: int
    problem: str


def look() -> Debian:
    """Ask dpkg and apt. Both only read; neither needs root."""
    release = _release()
    try:
        packages = parse_packages(run(["dpkg-query", "-W", "-f", _FORMAT]))
    except debian.DebianError as error:
        return Debian(release, (), str(error), None, None, "")
    try:
        # Packages on hold are old, too.
        upgrades = debian.parse_upgrades(run(["apt-get", "-s", "--ignore-hold", "dist-upgrade"]))
        date = list_date([_head(file) for file in list_files()])
    except debian.DebianError as error:
        return Debian(release, packages, "", None, None, str(error))
    return Debian(release, packages, "", upgrades, date, "")


def parse_packages(text: str) -> tuple[Package, ...]:
    """Return what ``dpkg-query`` printed: the installed packages.

    Raises:
        DebianError: A line is of another shape, or there is none.
    """
    found = []
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) != 5:
            raise debian.DebianError("a line of dpkg-query's answer was not understood")
        if fields[4] == "installed":
            found.append(Package(*fields[:4]))
    if not found:
        raise debian.DebianError("dpkg knows no installed package")
    return tuple(found)


def list_files() -> list[Path]:
    """Return the Release files that apt fetched, where its configuration keeps them.

    Raises:
        DebianError: Nobody can tell where that is.
    """
    said = run(["apt-config", "shell", "LISTS", "Dir::State::lists/d"])
    words = shlex.split(said)
    folder = words[0].partition("=")[2] if words else ""
    if not folder:
        raise debian.DebianError("apt-config does not say where the package lists are")
    try:
        return sorted(p for p in Path(folder).iterdir() if p.name.endswith(("InRelease", "_Release")))
    except OSError as error:
        raise debian.DebianError(f"apt's lists cannot be read: {error.strerror}") from error


def list_date(contents: Sequence[bytes]) -> datetime:
    """Return how old the knowledge about security fixes is: the date of the security suite's list.

    The main suite's list changes with point releases only, so its date says nothing.

    Raises:
        DebianError: There is no list of a security suite.
    """
    if not contents:
        raise debian.DebianError("apt has no package lists: 'apt-get update' never ran here")
    suites = [debian.parse_release(content) for content in contents]
    dates = [s.date for s in suites if "security" in f"{s.label} {s.suite} {s.codename}".lower()]
    if not dates:
        raise debian.DebianError("apt has no list of Debian's security suite: it is not among the sources")
    return min(dates)


def kernel(uname: os.uname_result, packages: Debian) -> Kernel:
    """Compare the running kernel with the installed ones."""
    installed: dict[str, str] = {}
    for package in packages.packages:
        if found := _KERNEL.fullmatch(package.name):
            installed[found[1].removesuffix(_UNSIGNED)] = package.version
    if packages.problem:
        return Kernel(uname.release, "", None, packages.problem)
    if uname.release not in installed and not _BUILD.search(uname.version):
        problem = "the running kernel is none of Debian's: the machine's host or provider looks after it"
        return Kernel(uname.release, "", None, problem)
    if not installed:
        return Kernel(uname.release, "", None, "no kernel package is installed here: the machine's host looks after it")
    newest = max(installed, key=versions.debian)
    build = _BUILD.search(uname.version)
    if uname.release == newest and (build is None or build[1] == installed[newest]):
        return Kernel(uname.release, newest, None, "")
    name = newest if uname.release != newest else f"{newest} ({installed[newest]})"
    return Kernel(uname.release, name, _changed(Path(f"/boot/vmlinuz-{newest}")), "")


def libraries(proc: Path = Path("/proc")) -> Libraries:
    """Look for libraries that this product's processes use and that were deleted since: they need a restart."""
    users: dict[str, int] = {}
    seen, hidden = 0, 0
    for folder in (f for f in proc.iterdir() if f.name.isdigit()):
        try:
            if not is_ours((folder / "cmdline").read_bytes()):
                continue
            gone = deleted((folder / "maps").read_text("utf-8", "replace"))
        except (FileNotFoundError, ProcessLookupError):
            # It ended meanwhile.
            continue
        except OSError:
            hidden += 1
            continue
        seen += 1
        for path in gone:
            users[path] = users.get(path, 0) + 1
    problem = ""
    if hidden:
        problem = f"{hidden} processes of this product are another user's: run the report as root"
    elif not (proc / "1").exists():
        problem = "other users' processes are hidden from this user: run the report as root"
    found = tuple(Library(path, count, _changed(Path(path))) for path, count in sorted(users.items()))
    return Libraries(found, seen, problem)


def is_ours(command: bytes) -> bool:
    """Tell whether a command line is one of this product's processes."""
    words = command.split(b"\0")[:4]
    return b"storescp" in words[1:] or any(os.path.basename(word) == b"strongroom" for word in words[:2])


def deleted(maps: str) -> set[str]:
    """Return the shared libraries in a process's map that have no file any more."""
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(" (deleted)") and ".so" in os.path.basename(fields[5]):
            found.add(fields[5].removesuffix(" (deleted)"))
    return found


def run(command: Sequence[str], folder: Path | None = None, seconds: float = _SECONDS) -> str:
    """Return what a tool prints, in the C locale.

    Raises:
        DebianError: It is not here, failed or took too long.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=seconds,
            check=False,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C.UTF-8", "LANGUAGE": ""},
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise debian.DebianError(f"there is no {command[0]} here") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise debian.DebianError(f"{command[0]} could not be run: {type(error).__name__}") from error
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise debian.DebianError(f"{command[0]} failed: {last[:200] or done.returncode}")
    return done.stdout.decode("utf-8", "replace")


def _release() -> str:
    try:
        text = Path("/etc/os-release").read_text("utf-8")
    except (OSError, ValueError):
        return ""
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return fields.get("VERSION_ID", "").strip('"') if fields.get("ID", "").strip('"') == "debian" else ""


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_RELEASE_BYTES)
    except OSError as error:
        raise debian.DebianError(f"apt's lists cannot be read: {error.strerror}") from error


def _changed(file: Path) -> datetime | None:
    """Return when a file came here: its change time, which unpacking sets, not its modification time."""
    try:
        return datetime.fromtimestamp(file.stat().st_ctime, UTC)
    except OSError:
        return None
