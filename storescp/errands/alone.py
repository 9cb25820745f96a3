"""One process of a kind: the lock of the folder that it writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from storescp.errors import StrongroomError


@contextlib.contextmanager
def alone(folder: Path, does: str, mode: int = 0o700) -> Iterator[None]:
    """Hold the lock of a process's own folder, which is made where it is missing.

    Args:
        folder: The folder, locked for as long as this lasts, or the process lives.
        does: What another process that holds it does, as in "sends the alerts".
        mode: The folder's when it is made here, whatever the umask is.

    Raises:
        StrongroomError: Another process holds it, or it cannot be used.
    """
    with contextlib.ExitStack() as held:
        try:
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
                folder.chmod(mode)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StrongroomError(f"another process {does} in {folder}", hint="wait until it ends") from error
        except OSError as error:
            raise StrongroomError(
                f"{folder} cannot be used: {error.strerror}", hint="make this folder, for the user that this runs as"
            ) from error
        yield
