"""Looking at a machine or a scratch root, and doing the steps of an installation there: the edge of ``install``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from keys import encoding
from storescp import install, newstore, unitfiles
from storescp.basesystem import Names, find, run
from storescp.config import load
from storescp.errors import StrongroomError
from storescp.install import Facts, MakeFolder, MakeStore, Note, Options, Remove, Run, Say, Step, Write
from storescp.unitfiles import DROP_IN, UNITS, Folder

_TOOLS = ("systemd-sysusers", "systemd-tmpfiles", "systemd-creds", "systemctl")


class Installed(msgspec.Struct):
    """What was installed: each file's SHA-256, in hex, as it was written."""

    format: int = 1
    files: dict[str, str] = {}


def look(options: Options, given: dict[str, str]) -> Facts:
    """Return what there is, without changing anything.

    Raises:
        StrongroomError: What is written down of an earlier installation, or the configuration, cannot be understood.
    """
    recorded = _recorded(options)
    toml = at(options, options.toml)
    config = load(toml) if toml.exists() else None
    places = {*unitfiles.files(given, options.program, options.config, []), DROP_IN, *recorded}
    names = Names(options.root)
    keys = (options.sealed_key, options.plain_key)
    gate = config.settings.gate if config is not None else None
    return Facts(
        is_root=os.geteuid() == 0,
        systemd=not options.root and Path("/run/systemd/system").is_dir(),
        program=bool(options.root) or os.access(options.program, os.X_OK),
        tools=frozenset(tool for tool in _TOOLS if find(tool)),
        digests={place: found for place in sorted(places) if (found := _digest(at(options, place)))},
        recorded=recorded,
        links=_links(options),
        users=frozenset({*names.users, *names.groups}),
        folders=tuple(
            there
            for folder in unitfiles.folders(given["strongroom.tmpfiles"])
            if (there := _folder(options, folder.path.replace(unitfiles.CONFIG, options.config, 1), names))
        ),
        listen=(*gate.listen, *(p.listen for p in gate.plaintext)) if gate is not None else None,
        credential=config is not None and config.credential == unitfiles.CREDENTIAL,
        keys=frozenset(key for key in keys if at(options, key).exists()),
        occupied=tuple(folder for folder in _of_a_store(options) if _holds(at(options, folder))),
    )


def at(options: Options, place: str) -> Path:
    """Return where a place of the machine is, in its scratch root if it has one."""
    return Path(f"{options.root}{place}")


def told(step: Step) -> str:
    """Return what a step does, for whoever watches."""
    match step:
        case Say(text=text, aloud=aloud):
            return f"WARNING: {text}" if aloud else text
        case Run(command=command, why=why):
            return f"run  {' '.join(command)}: {why}"
        case MakeFolder(folder=folder):
            return f"make folder {folder.path}, {folder.mode:04o}"
        case Write(path=path, why=why):
            return f"write {path}: {why}"
        case Remove(path=path, saved=saved):
            return f"put aside {path} as {path}.saved: it was changed by somebody" if saved else f"remove {path}"
        case MakeStore():
            return "make a store, its configuration and the key that the vault unlocks with"
        case Note(path=path, files=files):
            return f"write {path}: what was installed, {len(files)} files"


def carry_out(steps: list[Step], options: Options, say: Callable[[str], None], passphrase: str | None = None) -> None:
    """Do steps, each said before it is done.

    Args:
        steps: From ``install``.
        options: What was asked for.
        say: Gets a line for each step.
        passphrase: Of a new store, where it has one.

    Raises:
        StrongroomError: A step failed; those before it are done, and a second run goes on.
    """
    for step in steps:
        say(told(step))
        try:
            _do(step, options, say, passphrase)
        except OSError as error:
            what = f"{error.filename or 'this step'}: {error.strerror}"
            raise StrongroomError(what, hint="mend that, and run this again: it goes on there") from error


def _do(step: Step, options: Options, say: Callable[[str], None], passphrase: str | None) -> None:
    match step:
        case Run(command=command):
            run(command)
        case MakeFolder(folder=folder):
            place = at(options, folder.path)
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(folder.mode)
        case Write(path=path, content=content):
            _write(at(options, path), content.encode())
        case Remove(path=path, saved=saved):
            _remove(at(options, path), saved=saved)
        case Note(path=path, files=files):
            _write(at(options, path), encoding.canonical(Installed(files=files)) + b"\n")
        case MakeStore(seal=seal):
            newstore.make(options, passphrase, Names(options.root), seal=seal, say=say)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    encoding.replace(path, content, mode=0o644)


def _remove(path: Path, *, saved: bool) -> None:
    if saved:
        path.rename(path.with_name(f"{path.name}.saved"))
        return
    path.unlink(missing_ok=True)
    if path.parent.suffix in {".d", ".wants"} and path.parent.parent.name == "system":
        with contextlib.suppress(OSError):
            # Another drop-in is an admin's, and stays.
            path.parent.rmdir()


def _recorded(options: Options) -> dict[str, str]:
    path = at(options, options.installed)
    try:
        return encoding.decode(path.read_bytes(), Installed).files
    except FileNotFoundError:
        return {}
    except (ValueError, msgspec.MsgspecError) as error:
        hint = "remove it: files that differ from this release's are then taken for changed ones"
        raise StrongroomError(f"{path} cannot be read: {error}", hint=hint) from error


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def _links(options: Options) -> tuple[str, ...]:
    folder = at(options, UNITS)
    found = (link for kind in ("wants", "requires") for link in folder.glob(f"*.{kind}/strongroom*"))
    return tuple(sorted(str(link).removeprefix(options.root) for link in found if link.is_symlink()))


def _folder(options: Options, place: str, names: Names) -> Folder | None:
    try:
        found = at(options, place).lstat()
    except (FileNotFoundError, PermissionError):
        return None
    if not stat.S_ISDIR(found.st_mode):
        return None
    user = next((name for name, number in names.users.items() if number == found.st_uid), "")
    group = next((name for name, number in names.groups.items() if number == found.st_gid), "")
    return Folder(place, stat.S_IMODE(found.st_mode), user, group)


def _of_a_store(options: Options) -> list[str]:
    """Return the folders that a new store is moved to."""
    tls = [f"{options.config}/tls"] if options.with_pki else []
    return [install.STORE, install.ANCHORS, f"{install.SPOOL}/public", *tls]


def _holds(folder: Path) -> bool:
    """Tell whether a folder holds something besides what an installation makes there before the store."""
    try:
        return any(entry.name != "gate-view" for entry in folder.iterdir())
    except (FileNotFoundError, PermissionError):
        return False
