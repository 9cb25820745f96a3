"""What ``strongroom install`` and ``install --remove`` do, as a list of steps: decided here, done in ``installer``.

Nothing is looked up: what the machine has comes as ``Facts``. A step that is done already says so and does nothing, so
that the same command installs, mends and upgrades.
"""

from __future__ import annotations

import hashlib

import msgspec

from storescp import unitfiles
from storescp.errors import StrongroomError
from storescp.unitfiles import DROP_IN, SYSUSERS, TMPFILES, Folder

STORE = "/var/lib/strongroom"
ANCHORS = "/var/lib/strongroom-anchors"
SPOOL = "/var/spool/strongroom"
RUN = "/run/strongroom"
NEW = f"{ANCHORS}/new"
VAULT, GATE, DESK, ADMIN = "strongroom-vault", "strongroom-gate", "strongroom-desk", "strongroom-admin"
# What is switched on. The others send something out, or open something: that is asked for.
ENABLED = (
    "strongroom.target",
    "strongroom-vault.service",
    "strongroom-gate.socket",
    "strongroom-gate.service",
    "strongroom-alive.timer",
)
_TOOLS = ("systemd-sysusers", "systemd-tmpfiles")
# By name alone these tools look in the scratch root; a path is this machine's.
_NAME = "strongroom.conf"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.

    ``unlock`` is "credential" (the vault unlocks by itself) or "passphrase"; ``listen``, ``ae_title``, ``names`` and
    ``with_pki`` are for a store that is made.
    """

    program: str
    config: str = unitfiles.CONFIG
    root: str = ""
    unlock: str = "credential"
    listen: tuple[str, ...] = ("127.0.0.1:2762",)
    ae_title: str = "STRONGROOM"
    names: tuple[str, ...] = ()
    with_pki: bool = False

    @property
    def toml(self) -> str:
        """Where the configuration file is."""
        return f"{self.config}/strongroom.toml"

    @property
    def installed(self) -> str:
        """Where it is written down what was installed."""
        return f"{self.config}/installed.json"

    @property
    def sealed_key(self) -> str:
        """Where the vault's key is when systemd encrypts it."""
        return f"{self.config}/credentials/strongroom-key.cred"

    @property
    def plain_key(self) -> str:
        """Where the vault's key is when nobody does."""
        return f"{self.config}/store.key"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine, or the scratch root, has.

    Attributes:
        is_root: Whether this runs as root.
        systemd: Whether systemd runs, and is the one that the files are for.
        program: Whether the program is there; of a scratch root nobody asks.
        tools: The commands of systemd that are there.
        digests: The SHA-256, in hex, of each file that is there, of those that an installation has.
        recorded: The SHA-256 of each file as the last installation wrote it.
        links: Links in /etc/systemd/system that enable units.
        users: Users and groups that are there.
        folders: Folders that are there, with mode and owners (by name; empty where nobody has the number).
        listen: The addresses in the configuration; None where there is no configuration.
        credential: Whether that configuration unlocks with the credential.
        keys: Files with the vault's key.
        occupied: Folders of a store that hold something.
    """

    is_root: bool
    systemd: bool
    program: bool = True
    tools: frozenset[str] = frozenset()
    digests: dict[str, str] = {}
    recorded: dict[str, str] = {}
    links: tuple[str, ...] = ()
    users: frozenset[str] = frozenset()
    folders: tuple[Folder, ...] = ()
    listen: tuple[str, ...] | None = None
    credential: bool = False
    keys: frozenset[str] = frozenset()
    occupied: tuple[str, ...] = ()


class Say(msgspec.Struct, frozen=True):
    """Nothing to do: a word about it. ``aloud`` is a warning."""

    text: str
    aloud: bool = False


class Run(msgspec.Struct, frozen=True):
    """Run a command, for a reason."""

    command: tuple[str, ...]
    why: str


class MakeFolder(msgspec.Struct, frozen=True):
    """Make a folder or give it its mode; owners only where ``owned``."""

    folder: Folder
    owned: bool


class Write(msgspec.Struct, frozen=True):
    """Write a file whole."""

    path: str
    content: str
    why: str


class Remove(msgspec.Struct, frozen=True):
    """Remove a file or a link, and the folder of drop-ins that is empty then; or keep it under another name."""

    path: str
    saved: bool = False


class MakeStore(msgspec.Struct, frozen=True):
    """Make a store and its configuration. ``seal`` has systemd encrypt the vault's key."""

    seal: bool


class Note(msgspec.Struct, frozen=True):
    """Write down what is installed, by place and SHA-256."""

    path: str
    files: dict[str, str]


Step = Say | Run | MakeFolder | Write | Remove | MakeStore | Note


def digest(content: str) -> str:
    """Return the SHA-256 of a file's text, in hex."""
    return hashlib.sha256(content.encode()).hexdigest()


def plan(options: Options, facts: Facts, given: dict[str, str]) -> list[Step]:
    """Return what has to be done so that everything is as it should be, in order.

    Args:
        options: What is asked for.
        facts: What there is.
        given: The files for systemd that come with the program.

    Raises:
        StrongroomError: It cannot be done as asked; nothing was changed.
    """
    steps = _possible(options, facts)
    listen = list(options.listen if facts.listen is None else facts.listen)
    files = unitfiles.files(given, options.program, options.config, listen)
    seal = not options.root and "systemd-creds" in facts.tools
    if facts.listen is None and options.unlock == "credential":
        files[DROP_IN] = unitfiles.drop_in(options.sealed_key if seal else options.plain_key, encrypted=seal)
    elif facts.credential and facts.keys:
        sealed = options.sealed_key in facts.keys
        files[DROP_IN] = unitfiles.drop_in(options.sealed_key if sealed else options.plain_key, encrypted=sealed)
    written: dict[str, str] = {}
    for place in (SYSUSERS, TMPFILES):
        steps.append(_write(place, files[place], facts, written))
    steps += _users(options, facts, unitfiles.users(files[SYSUSERS]))
    steps += _folders(options, facts, unitfiles.folders(files[TMPFILES]))
    if facts.listen is not None:
        steps.append(Say(f"keep {options.toml}: the store is there"))
    else:
        steps.append(MakeStore(seal))
        if options.unlock == "credential" and not seal:
            why = "in a scratch root" if options.root else "without systemd-creds"
            steps.append(
                Say(f"{options.plain_key} is not encrypted {why}: whoever has it and the disks reads the store", True)
            )
    steps += [_write(p, text, facts, written) for p, text in files.items() if p not in {SYSUSERS, TMPFILES}]
    gone = [place for place in facts.recorded if place not in files and place in facts.digests]
    steps += [Remove(place, saved=facts.digests[place] != facts.recorded[place]) for place in gone]
    steps.append(Note(options.installed, written))
    return steps + _switch_on(options, facts, unitfiles.units(list(files)))


def removal(options: Options, facts: Facts, given: dict[str, str]) -> list[Step]:
    """Return what has to be done so that nothing of it runs any more; what holds data stays, and where is said.

    Raises:
        StrongroomError: It cannot be done; nothing was changed.
    """
    if not facts.is_root and not options.root:
        raise _not_root()
    ours = unitfiles.files(given, options.program, options.config, list(facts.listen or options.listen))
    there = [place for place in dict.fromkeys([*ours, DROP_IN, *facts.recorded]) if place in facts.digests]
    steps: list[Step] = []
    if facts.systemd and (names := unitfiles.units(there)):
        steps.append(Run(("systemctl", "disable", "--now", *names), "stop the services; none starts by itself"))
    elif facts.links:
        steps += [Remove(link) for link in facts.links]
    for place in there:
        expected = {facts.recorded.get(place, ""), digest(ours.get(place, ""))}
        steps.append(Remove(place, saved=facts.digests[place] not in expected))
    if facts.recorded:
        steps.append(Remove(options.installed))
    if facts.systemd:
        steps.append(Run(("systemctl", "daemon-reload"), "systemd forgets the units"))
    if not steps:
        steps.append(Say("nothing is installed"))
    data = {folder.path for folder in facts.folders}
    kept = {
        options.config: "configuration, peers, certificates and keys",
        STORE: "the store",
        ANCHORS: "the anchors, without which the store does not open",
        SPOOL: "what waits to be admitted",
    }
    steps += [Say(f"kept: {path}: {what}") for path, what in kept.items() if path in data]
    own = ", ".join(name for name in unitfiles.users(given["strongroom.sysusers"]) if name in facts.users)
    return [*steps, Say(f"kept: users and groups {own}, who own these")] if own else steps


def _not_root() -> StrongroomError:
    return StrongroomError("only root can install services", hint="run this with sudo, or look with --dry-run")


def _possible(options: Options, facts: Facts) -> list[Step]:
    """Refuse what cannot be done; return what is said of the rest."""
    if not facts.is_root and not options.root:
        raise _not_root()
    if facts.listen is None and options.unlock == "credential" and facts.keys:
        raise StrongroomError(
            f"{' and '.join(sorted(facts.keys))} is there already, and no {options.toml} names it",
            hint="it may be all that opens another store: move it away",
        )
    missing = [tool for tool in _TOOLS if tool not in facts.tools]
    if missing and facts.is_root:
        raise StrongroomError(f"{' and '.join(missing)}: not installed", hint="they come with systemd")
    if facts.listen is None and facts.occupied:
        what = " and ".join(facts.occupied)
        raise StrongroomError(
            f"{what} {'hold' if len(facts.occupied) > 1 else 'holds'} something, and no {options.toml} names it",
            hint="a store is never made over another one: bring its configuration back, or move it away",
        )
    fault = unitfiles.fault(options.program, options.config)
    if not facts.program and not fault:
        fault = f"there is no program {options.program} that can be run"
    if fault and not options.root:
        raise StrongroomError(fault, hint="install the program in /opt/strongroom, as the README does")
    return [Say(f"{fault}: services would not start with it", True)] if fault else []


def _write(place: str, content: str, facts: Facts, written: dict[str, str]) -> Step:
    """Write a file, unless it is so already, or somebody changed it."""
    new, there = digest(content), facts.digests.get(place)
    written[place] = new
    if there is None:
        return Write(place, content, "new")
    if there == new:
        return Say(f"keep {place}: as it should be")
    if there == facts.recorded.get(place):
        return Write(place, content, "from an earlier release or configuration")
    # What was written there last stays known, so that the difference is found again.
    written.pop(place)
    if place in facts.recorded:
        written[place] = facts.recorded[place]
    return Write(f"{place}.new", content, f"{place} was changed by somebody, and stays: compare the two")


def _users(options: Options, facts: Facts, wanted: list[str]) -> list[Step]:
    new = [name for name in wanted if name not in facts.users]
    if not new:
        return [Say("keep users and groups: all are there")]
    if not facts.is_root:
        return [Say(f"skip users and groups {', '.join(new)}: this does not run as root", True)]
    return [Run(("systemd-sysusers", *_root(options), _NAME), f"make users and groups {', '.join(new)}")]


def _folders(options: Options, facts: Facts, wanted: list[Folder]) -> list[Step]:
    there = {folder.path: folder for folder in facts.folders}
    if facts.is_root:
        new = [folder for folder in wanted if there.get(folder.path) != folder]
        if not new:
            return [Say("keep folders: all are there, with their modes and owners")]
        told = [Say(f"folder {f.path}: {f.mode:04o} {f.user}:{f.group}") for f in new]
        command = ("systemd-tmpfiles", "--create", *_root(options), _NAME)
        return [*told, Run(command, f"make or mend {len(new)} of {len(wanted)} folders")]
    new = [f for f in wanted if f.path not in there or there[f.path].mode != f.mode]
    said = [Say("skip the owners of folders: this does not run as root", True)] if new else []
    return [*(MakeFolder(folder, owned=False) for folder in new), *said]


def _root(options: Options) -> tuple[str, ...]:
    return (f"--root={options.root}",) if options.root else ()


def _switch_on(options: Options, facts: Facts, units: list[str]) -> list[Step]:
    names = tuple(name for name in ENABLED if name in units)
    rest = [name for name in units if name not in names and f"{name.rpartition('.')[0]}.timer" not in units]
    more = Say(f"installed, not switched on: {', '.join(rest)}; the docs say what each is for")
    if facts.systemd:
        return [
            Run(("systemctl", "daemon-reload"), "systemd reads the units"),
            Run(("systemctl", "enable", *names), "the services start with the machine"),
            *([more] if rest else []),
            Say("start now with 'systemctl start strongroom.target'; after an upgrade, docs/install.md has the order"),
        ]
    why = "it is a scratch root" if options.root else "systemd does not run"
    command = " ".join(("systemctl", *_root(options), "enable", *names))
    return [Say(f"not switched on, {why}: '{command}' does it", True), *([more] if rest else [])]
