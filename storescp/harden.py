"""What every long-running process gives up, and what it refuses to run on."""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import stat
from pathlib import Path

from storescp.config import Config
from storescp.errors import StrongroomError

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4


def harden(umask: int) -> bool:
    """Forbid core dumps, which would write keys and plaintext to a disk, and open new files to nobody else.

    Other processes of the same user may neither trace this one nor read its memory, and what it starts gains no rights.

    As many files may be open as the system lets: connections and packs have a descriptor each.

    Args:
        umask: The mode bits that new files never have.

    Returns:
        Whether the process's memory is kept out of swap, now and later.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    os.umask(umask)
    return _lock_memory(libc)


def _lock_memory(libc: ctypes.CDLL) -> bool:
    """Keep keys and plaintext out of swap, where the system lets a process lock all that it will ever map.

    Pages are locked as they are touched: a mapping that is larger than its use costs nothing.

    Under a limit that counts, mappings would fail later, in the middle of the work: then nothing is locked at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = False
    try:
        # Where the limit has no end, and as root; what root starts as other users may then lock its memory, too.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        # Only whom no limit counts for (CAP_IPC_LOCK) gets past this one. A capability's name does not tell that:
        # in a user namespace of its own a process has it, and the limit counts all the same.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
        limited = True
    locked: int = libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    if limited:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    return locked == 0


def check_vault(config: Config) -> None:
    """Refuse a store that others could read or change, or that is another user's.

    Raises:
        StrongroomError: With every place that is wrong, and how to mend it.
    """
    _raise(vault_faults(config, os.geteuid()), "vault")


def vault_faults(config: Config, own: int) -> list[str]:
    """Return what is wrong with the store's owners and modes where the vault's user has the id ``own``.

    Raises:
        StrongroomError: gate.user is nobody on this machine.
        OSError: A place cannot be seen.
    """
    faults = [
        *_private(config.store_path, own),
        *_private(config.anchors, own),
        *_private(config.keyring, own),
        *_not_for_all(config.incoming),
        *_not_for_all(config.public),
    ]
    if config.settings.gate.user:
        gate = _uid(config.settings.gate.user)
        if gate == own:
            faults.append(f"the vault runs as gate.user, {config.settings.gate.user}: run it as another user")
        if config.public.stat().st_uid == gate:
            faults.append(f"{config.public} belongs to the gate's user, who could replace deposit keys: chown it")
    return faults


def check_gate(config: Config) -> None:
    """Refuse to run as another user than configured, or on keys and folders that others could read or change.

    Raises:
        StrongroomError: With every place that is wrong, and how to mend it.
    """
    own = os.geteuid()
    faults = gate_faults(config)
    user = config.settings.gate.user
    if user:
        if own != _uid(user):
            faults.append(f"the gate runs as uid {own}, but gate.user is {user}: start it as that user")
        places = (config.store_path, config.anchors, config.peers, config.file)
        faults += [f"{path} can be written by the gate's user: chown it" for path in places if os.access(path, os.W_OK)]
    _raise(faults, "gate")


def gate_faults(config: Config) -> list[str]:
    """Return what is wrong with the modes of what the gate reads, whoever asks.

    Raises:
        OSError: The private key cannot be seen.
    """
    faults = [*_not_for_all(config.incoming), *_not_for_all(config.peers), *_not_for_all(config.file)]
    found = config.private_key.stat() if config.private_key.exists() else None
    if found is not None and found.st_mode & 0o037:
        faults.append(f"{config.private_key} can be read by others: chmod 0640 or 0600")
    return faults


def desk_faults(config: Config) -> list[str]:
    """Return what is wrong with the mode of the folder that the desk deposits in. It is no reason not to start."""
    return _not_for_all(config.desk_incoming) if config.desk_incoming.exists() else []


def _private(path: Path, owner: int) -> list[str]:
    try:
        found = path.stat()
    except OSError as error:
        return [f"{path} cannot be found: {error.strerror}"]
    faults = []
    if found.st_uid != owner:
        faults.append(
            f"{path} belongs to uid {found.st_uid}, this process runs as {owner}: chown it, or run as its owner"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        faults.append(f"{path} is open to others: chmod go-rwx {path}")
    return faults


def _not_for_all(path: Path) -> list[str]:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return [f"{path} cannot be found: {error.strerror}"]
    return [f"{path} can be written by everybody: chmod o-w {path}"] if mode & stat.S_IWOTH else []


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise StrongroomError(f"gate.user: there is no user {name} on this machine") from error


def _raise(faults: list[str], process: str) -> None:
    if faults:
        raise StrongroomError("\n".join([f"the {process} does not start on wrong owners or modes", *faults]))
