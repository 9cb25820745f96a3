"""The files for systemd that come with this program, and how one machine's become of them. Pure but for ``read``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from storescp.errors import StrongroomError

PROGRAM = "/opt/strongroom/bin/strongroom"
CONFIG = "/etc/strongroom"
SOCKET = "strongroom-gate.socket"
UNITS = "/etc/systemd/system"
SYSUSERS = "/etc/sysusers.d/strongroom.conf"
TMPFILES = "/etc/tmpfiles.d/strongroom.conf"
CREDENTIAL = "strongroom-key"
DROP_IN = f"{UNITS}/strongroom-vault.service.d/strongroom-key.conf"
# What a unit can name without quoting, and what no shell or specifier of systemd's reads in another way.
_PLAIN = re.compile(r"/[A-Za-z0-9._/+@-]*")
# What the units hide from their processes (ProtectHome=, PrivateTmp=) or what is gone at the next start.
_HIDDEN = ("/home", "/root", "/run", "/tmp", "/var/tmp")  # noqa: S108
_UNIT = re.compile(r"strongroom(-[a-z]+)?\.(service|socket|target|timer)")


class Folder(NamedTuple):
    """A folder and whose it is, as a line of tmpfiles.d(5) has it."""

    path: str
    mode: int
    user: str
    group: str


def read() -> dict[str, str]:
    """Return the files by name: from a wheel they are in the package, in a source tree beside it.

    Raises:
        StrongroomError: They are in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / "units", package.parent / "systemd"):
        if (folder / "strongroom-gate.service").is_file():
            return {file.name: file.read_text("utf-8") for file in sorted(folder.iterdir()) if file.is_file()}
    raise StrongroomError(
        f"the files for systemd are neither in {package / 'units'} nor in {package.parent / 'systemd'}",
        hint="install the program again, from its wheel or its source tree",
    )


def files(given: dict[str, str], program: str, config: str, listen: list[str]) -> dict[str, str]:
    """Return every file of a machine by its place.

    Args:
        given: The files that come with the program, by name.
        program: The ``strongroom`` command of this machine.
        config: The configuration's folder.
        listen: The addresses of the gate's listening sockets.
    """
    made = {}
    for name, text in given.items():
        filled = re.sub(rf"{CONFIG}(?=[/\s]|$)", config, text.replace(PROGRAM, program))
        if name == SOCKET:
            lines = "".join(f"ListenStream={address}\n" for address in listen)
            filled = re.sub(r"(?m)(^ListenStream=.*\n)+", lines, filled)
        if name == "strongroom.sysusers":
            made[SYSUSERS] = filled
        elif name == "strongroom.tmpfiles":
            made[TMPFILES] = filled
        elif _UNIT.fullmatch(name):
            made[f"{UNITS}/{name}"] = filled
    return made


def units(places: list[str]) -> list[str]:
    """Return the names of the units among files."""
    return [name for place in places if _UNIT.fullmatch(name := place.rpartition("/")[2])]


def drop_in(place: str, *, encrypted: bool) -> str:
    """Return what gives the vault its key as a credential of systemd's."""
    key = "LoadCredentialEncrypted" if encrypted else "LoadCredential"
    why = "# The key that the vault unlocks with; written by 'strongroom install'."
    return f"{why}\n[Service]\n{key}={CREDENTIAL}:{place}\n"


def users(sysusers: str) -> list[str]:
    """Return the users and groups that a file of sysusers.d(5) names."""
    return [words[1] for line in sysusers.splitlines() if (words := line.split()) and words[0] in {"u", "g"}]


def folders(tmpfiles: str) -> list[Folder]:
    """Return the folders that a file of tmpfiles.d(5) names."""
    lines = (line.split() for line in tmpfiles.splitlines())
    return [Folder(w[1], int(w[2], 8), w[3], w[4]) for w in lines if w and w[0] == "d"]


def fault(program: str, config: str) -> str:
    """Return why services could not run with these places; empty where they can."""
    for what, path in (("the program", program), ("the configuration", config)):
        if not _PLAIN.fullmatch(path) or "/../" in f"{path}/" or "/./" in f"{path}/":
            return f"{what} is at '{path}': a unit names places of letters, digits and ._+@- from the root on"
        if any(f"{path}/".startswith(f"{hidden}/") for hidden in _HIDDEN):
            return f"{what} is at {path}, which the units hide from the services"
    return ""
