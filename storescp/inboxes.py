"""Whose deposits are taken out of which folder."""

from __future__ import annotations

import logging
import os
import pwd
from pathlib import Path

from storescp.config import Config
from storescp.errors import StrongroomError

log = logging.getLogger(__name__)


def owners(config: Config) -> dict[Path, int]:
    """Return the folders of deposits with the users that deposit there: gate and desk, or who runs all of it.

    Where the gate is another user, and the desk has none, nothing is deposited in the desk's folder.

    Raises:
        StrongroomError: The gate's user does not exist.
    """
    gate, desk = config.settings.gate.user, config.settings.desk.user
    if not gate:
        return dict.fromkeys(config.inboxes, os.geteuid())
    try:
        found = {config.incoming: pwd.getpwnam(gate).pw_uid}
    except KeyError as error:
        raise StrongroomError(f"gate.user: there is no user {gate} on this machine") from error
    if desk:
        try:
            found[config.desk_incoming] = pwd.getpwnam(desk).pw_uid
        except KeyError:
            # Who receives and unlocks does not depend on a user who finds and fetches.
            log.warning("desk.user: there is no user %s on this machine", desk)
    return found
