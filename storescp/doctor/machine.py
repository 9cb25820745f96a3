"""The machine: what its own tools say besides ``/proc`` and ``/sys``, and all of it together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

from storescp import synchronised
from storescp.doctor import blocks, running
from storescp.doctor.facts import Firewall, Machine, Unit, Unseen

_UNIT_FOLDERS = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system", "run/systemd/system")
_EXPOSURE = re.compile(r"Overall exposure level for \S+: (\d+(?:\.\d+)?)")
_SECONDS = 20
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_IPTABLES = ("iptables-save", "ip6tables-save")
# What a command says, or why it says nothing.
Ask = Callable[[list[str]], "str | Unseen"]


def look(config_file: Path, ports: Collection[int]) -> Machine:
    """Look at this machine.

    Args:
        config_file: Of the installation: its processes are known by it.
        ports: That its configuration names.
    """
    own = running.own(config_file)
    pids = frozenset() if isinstance(own, Unseen) else frozenset(process.pid for process in own)
    known = synchronised.clock_is_synchronised()
    return Machine(
        swaps=blocks.swaps(),
        cores=running.cores(),
        processes=own,
        listeners=running.listeners(pids, ports),
        programs=running.programs(),
        firewall=firewall(ask),
        units=units(ask),
        synchronised=Unseen("the kernel does not tell whether the clock is synchronised") if known is None else known,
    )


def ask(command: list[str]) -> str | Unseen:
    """Run a command of the system's that only looks, and return what it says."""
    program = shutil.which(command[0], path=_PATH)
    if program is None:
        return Unseen(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unseen(f"{command[0]} does not answer: {type(error).__name__}")
    if done.returncode:
        said = " ".join(done.stderr.split())[:200]
        rights = "; run the doctor as root" if os.geteuid() else ""
        return Unseen(f"{command[0]} failed{f': {said}' if said else ''}{rights}")
    return done.stdout


def firewall(ask: Ask) -> Firewall | Unseen:
    """Return whether incoming packets are filtered, by nftables (which has what firewalld and ufw set) or iptables."""
    answers = {"nft": ask(["nft", "list", "ruleset"])}
    if not isinstance(answers["nft"], Unseen) and filters_nftables(answers["nft"]):
        return Firewall(filters=True, source="nft list ruleset")
    answers |= {name: ask([name]) for name in _IPTABLES}
    for name in _IPTABLES:
        said = answers[name]
        if not isinstance(said, Unseen) and filters_iptables(said):
            return Firewall(filters=True, source=name)
    seen = [name for name, said in answers.items() if not isinstance(said, Unseen)]
    if not seen:
        return Unseen("; ".join(said.reason for said in answers.values() if isinstance(said, Unseen)))
    return Firewall(filters=False, source=", ".join(seen))


def filters_nftables(text: str) -> bool:
    """Tell whether a rule set of nftables has a chain for input that drops or rejects something."""
    for chain in re.findall(r"chain [^{}]+\{(?:[^{}]|\{[^{}]*\})*\}", text):
        if re.search(r"\bhook (?:input|ingress|prerouting)\b", chain) is None:
            continue
        if re.search(r"\bpolicy drop\b|\b(?:drop|reject)\b", chain):
            return True
        # Firewalld and ufw jump from there into chains of their own.
        if re.search(r"\b(?:jump|goto)\b", chain) and re.search(r"\b(?:drop|reject)\b", text):
            return True
    return False


def filters_iptables(text: str) -> bool:
    """Tell whether rules as iptables-save writes them drop or reject incoming packets."""
    if re.search(r"^:INPUT (?:DROP|REJECT)\b", text, re.MULTILINE):
        return True
    if re.search(r"^-A INPUT .*-j (?:DROP|REJECT)\b", text, re.MULTILINE):
        return True
    jumps = re.findall(r"^-A INPUT .*-[jg] (?!ACCEPT\b|LOG\b)(\S+)", text, re.MULTILINE)
    return bool(jumps) and re.search(r"-j (?:DROP|REJECT)\b", text) is not None


def units(ask: Ask, root: Path = Path("/")) -> tuple[Unit, ...] | Unseen:
    """Return the installed services of this product, each with its exposure."""
    files: dict[str, Path] = {}
    for folder in _UNIT_FOLDERS:
        for file in sorted((root / folder).glob("strongroom-*.service")):
            # As systemd looks: the first folder with a name counts.
            files.setdefault(file.name, file)
    found = []
    for name, file in sorted(files.items()):
        said = ask(["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)])
        found.append(Unit(name=name, exposure=said if isinstance(said, Unseen) else exposure(said)))
    return tuple(found)


def exposure(text: str) -> float | Unseen:
    """Return the exposure level in what ``systemd-analyze security`` says of a unit."""
    found = _EXPOSURE.search(text)
    return float(found[1]) if found else Unseen("systemd-analyze tells no exposure level")
