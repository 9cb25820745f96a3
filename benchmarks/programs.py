"""Programs of the system: never one of this Python environment, which has a ``storescp`` of pynetdicom's."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# Debian's daemons and tools for users and mounts; an ordinary user's PATH lacks them.
_MORE = ["/usr/local/sbin", "/usr/sbin", "/sbin"]


def found(name: str) -> str | None:
    """Return where a program is, or None."""
    own = Path(sys.executable).parent
    folders = [folder for folder in os.get_exec_path() if Path(folder) != own]
    return shutil.which(name, path=os.pathsep.join([*folders, *_MORE]))
