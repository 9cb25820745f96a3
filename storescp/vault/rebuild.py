"""Rebuilding keyring and anchors from a recovery export and shares, beside what a backup of files brought back."""

from __future__ import annotations

import fcntl
import os
import pwd
from pathlib import Path

from keys import encoding, recovery, shares, slots
from keys.anchors import AnchorError, AnchorSet, FileAnchors, TokenAnchors
from keys.keyring import KeyringError
from keys.shares import RecoveryError
from storescp import clock
from storescp.config import Config
from storescp.errors import StrongroomError
from storescp.vault.anchors import anchors_of


def rebuild(
    config: Config, export: bytes, typed: list[str], key_file: Path, *, file_anchors: bool = False
) -> list[int]:
    """Write a new keyring, new anchors, the deposit keys, and a new key file; return the versions that open.

    Args:
        config: The configuration; its token holds the new anchors, where it says so.
        export: The recovery export.
        typed: The shares' words.
        key_file: Where the new key file goes.
        file_anchors: Make the anchors as files all the same, because the token is not here.

    Raises:
        StrongroomError: The shares do not open the export, a vault runs, or something is in the way.
    """
    try:
        secret = shares.combine(typed)
        try:
            contents = recovery.open_export(export, secret, config.signing_key)
        finally:
            secret[:] = bytes(len(secret))
    except RecoveryError as error:
        raise StrongroomError(
            f"the export does not open: {error}", hint="type each share as it stands on paper"
        ) from error
    inboxes = [(folder, 0o700) for folder in config.inboxes]
    for folder, mode in ((config.store_path, 0o700), (config.public, 0o755), *inboxes):
        if not folder.exists():
            folder.mkdir(mode=mode, parents=True)
            folder.chmod(mode)
    try:
        # As root, in a folder of another user: no link is followed.
        descriptor = os.open(config.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StrongroomError(f"{config.lock} cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StrongroomError("a vault runs on this store", hint="stop it first") from None
        anchors = AnchorSet(FileAnchors(config.anchors)) if file_anchors else anchors_of(config)
        return _rebuild(config, contents, key_file, anchors)


def _rebuild(config: Config, contents: recovery.Contents, key_file: Path, anchors: AnchorSet) -> list[int]:
    now = clock.now()
    try:
        if config.anchors.exists() and any(config.anchors.glob("anchor-*")):
            raise StrongroomError(
                f"{config.anchors} holds anchors already",
                hint="put that folder aside if they are damaged, and begin again",
            )
        if not config.anchors.exists():
            FileAnchors(config.anchors).prepare()
        content = slots.new_key_file()
        ring = recovery.rebuild(contents, [(slots.parse_key_file(content), "rebuilt")], anchors, now)
        encoding.create(key_file, content)
        if config.keyring.exists():
            os.rename(config.keyring, config.keyring.with_name(f"keyring-{now.replace(':', '')}"))
        ring.write(config.keyring)
        for name in ("objects", "quarantine", "admitting"):
            (config.store_path / name).mkdir(mode=0o700, exist_ok=True)
        for record in ring.body.versions:
            if record.state != recovery.DESTROYED:
                signed_file = ring.version(record.version).deposit_key().signed_file(ring.signing, now)
                encoding.replace(config.public / f"deposit-{record.version}.key", signed_file, mode=0o644)
        versions = [record.version for record in ring.body.versions if record.state != recovery.DESTROYED]
        ring.forget()
        _hand_over(config)
    except (RecoveryError, KeyringError, AnchorError) as error:
        hint = "attach the token that keys.anchor_token names, or --file-anchors makes the anchors as files"
        raise StrongroomError(
            f"the keyring cannot be rebuilt: {error}", hint=hint if isinstance(anchors.first, TokenAnchors) else ""
        ) from error
    except OSError as error:
        raise StrongroomError(f"the keyring cannot be rebuilt: {error.filename}: {error.strerror}") from error
    return versions


def _hand_over(config: Config) -> None:
    """Give what root made to the store's owner."""
    owner = config.store_path.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    group = pwd.getpwuid(owner.st_uid).pw_gid
    for folder in (config.anchors, config.public):
        os.chown(folder, owner.st_uid, group, follow_symlinks=False)
    for path in (config.keyring, config.lock, *config.anchors.iterdir(), *config.public.glob("deposit-*.key")):
        os.chown(path, owner.st_uid, group, follow_symlinks=False)
