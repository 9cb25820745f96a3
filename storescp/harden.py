"""What every long-running process gives up when it starts."""

from __future__ import annotations

import os
import resource


def harden(umask: int) -> None:
    """Forbid core dumps, which would write keys and plaintext to a disk, and open new files to nobody else.

    Args:
        umask: The mode bits that new files never have.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(umask)
