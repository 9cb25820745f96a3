"""What runs on the machine: processes, what they listen on, core dumps. Source: proc(5).

Every function takes the root of the tree that it reads, so that another one can be planted.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from storescp.doctor.facts import Cores, Listener, Process, Unseen

_VERBS = ("serve", "gate", "gate-worker", "vault", "desk", "alert-sender", "audit-forwarder", "metrics")
_LISTENING = "0A"
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def own(config_file: Path, root: Path = Path("/")) -> tuple[Process, ...] | Unseen:
    """Return the processes of this product that run on a configuration file."""
    if reason := _hidden(root):
        return Unseen(reason)
    found = []
    for folder in _processes(root):
        verb = verb_of(_words(folder), str(config_file))
        if verb:
            status = _table(folder / "status", ":")
            limits = _text(folder / "limits")
            core = re.search(r"^Max core file size +(\S+)", limits, re.MULTILINE)
            locked = status.get("VmLck", "0").split()[:1] not in (["0"], [])
            found.append(Process(pid=int(folder.name), verb=verb, core=core is None or core[1] != "0", locked=locked))
    return tuple(sorted(found, key=lambda process: process.pid))


def verb_of(words: list[str], config_file: str) -> str:
    """Return the verb of this product that a command line runs on a configuration file, empty if it runs none."""
    names = [os.path.basename(word) for word in words[:3]]
    if not ("strongroom" in names or [w for w in words[1:4] if w != "-P"][:2] == ["-m", "storescp"]):
        return ""
    if "--config" in words[:-1] and words[words.index("--config") + 1] != config_file:
        return ""
    return next((word for word in words[1:] if word in _VERBS), "")


def programs(root: Path = Path("/")) -> frozenset[str] | Unseen:
    """Return the names of the programs that run, lower case: each as the kernel has it, and as it was called."""
    if reason := _hidden(root):
        return Unseen(reason)
    found: set[str] = set()
    for folder in _processes(root):
        found.add(_text(folder / "comm").strip().lower())
        # Some put a title there: 'sshd: /usr/sbin/sshd -D', 'nginx: master process'.
        found.update(os.path.basename(word).rstrip(":").lower() for word in _words(folder)[:1])
    return frozenset(found - {""})


def cores(root: Path = Path("/")) -> Cores | Unseen:
    """Return what becomes of core dumps."""
    try:
        pattern = (root / "proc/sys/kernel/core_pattern").read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        return Unseen(f"kernel.core_pattern cannot be read: {error}")
    return Cores(pattern=pattern, kdump=_text(root / "sys/kernel/kexec_crash_loaded").strip() == "1")


def listeners(ours: Collection[int], ports: Collection[int], root: Path = Path("/")) -> tuple[Listener, ...] | Unseen:
    """Return the TCP sockets that listen.

    Args:
        ours: The process ids of this product.
        ports: The ports that its configuration names: ours, too, where systemd listens or the program is hidden.
        root: Of the tree with ``proc``.
    """
    try:
        lines = [*_socket_lines(root / "proc/net/tcp"), *_socket_lines(root / "proc/net/tcp6", missing=True)]
    except OSError as error:
        return Unseen(f"listening sockets cannot be seen: {error}")
    owners = _owners(root)
    found = set()
    for words in lines:
        try:
            address, port = address_of(words[1])
        except (ValueError, IndexError):
            continue
        pid, program = owners.get(words[9], (0, "")) if len(words) > 9 else (0, "")
        found.add((address, port, program, pid in ours or port in ports))
    return tuple(Listener(address=a, port=p, program=n, ours=o) for a, p, n, o in sorted(found))


def address_of(text: str) -> tuple[str, int]:
    """Return address and port of ``0100007F:0ACA``: words of four bytes in the machine's order.

    Raises:
        ValueError: It is none.
    """
    address, _, port = text.partition(":")
    raw = bytes.fromhex(address)
    if len(raw) not in {4, 16}:
        raise ValueError("no address")
    if sys.byteorder == "little":
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    return str(ipaddress.ip_address(raw)), int(port, 16)


def _socket_lines(file: Path, *, missing: bool = False) -> list[list[str]]:
    try:
        rows = [line.split() for line in file.read_text().splitlines()[1:]]
    except FileNotFoundError:
        if missing:
            return []
        raise
    return [row for row in rows if len(row) > 3 and row[3] == _LISTENING]


def _owners(root: Path) -> dict[str, tuple[int, str]]:
    """Return process id and program by the inode of a socket, as far as this user may see them."""
    found = {}
    for folder in _processes(root):
        try:
            with os.scandir(folder / "fd") as entries:
                links = [os.readlink(entry.path) for entry in entries]
        except OSError:
            continue
        for link in links:
            if name := _SOCKET.fullmatch(link):
                found[name[1]] = (int(folder.name), _text(folder / "comm").strip())
    return found


def _hidden(root: Path) -> str:
    """Return why processes of others cannot be seen, if so: hidepid, or a /proc with nothing but one's own."""
    try:
        (root / "proc/1/comm").read_text()
    except OSError as error:
        return f"processes of others cannot be seen ({error.strerror}); run the doctor as root"
    return ""


def _processes(root: Path) -> Iterator[Path]:
    for name in sorted(os.listdir(root / "proc")):
        if name.isdigit():
            yield root / "proc" / name


def _words(folder: Path) -> list[str]:
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _table(file: Path, mark: str) -> dict[str, str]:
    rows = (line.partition(mark) for line in _text(file).splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
