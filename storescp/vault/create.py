"""Making a store: folders, keyring, first anchor, deposit key, configuration, on request an authority."""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from keys import authority, encoding, keyring, slots
from keys.anchors import AnchorError, FileAnchors
from keys.token import TokenError
from storage.archive import Archive
from storage.keysdb import KeysDatabase
from storescp.config import Config, Settings, Store, render
from storescp.errors import StrongroomError
from storescp.vault.anchors import anchors_of, attach

_SERVER_DAYS = 825
# Where a vault gets the PIN of a token from that was typed at 'init'.
PIN_CREDENTIAL = "credential:strongroom-anchor-pin"


class Plan(msgspec.Struct, frozen=True):
    """What to make.

    ``key_file`` is where a new key file goes; ``passphrase`` makes a slot of its own; ``users`` are the vault's and the
    gate's, where they are two. ``anchor_token`` (MODULE:TOKEN) holds the anchors, where it is not empty; its PIN was
    typed (``anchor_pin``) or is in a file. ``credential`` names one of this process, which makes a slot, too.
    """

    file: Path
    listen: list[str]
    ae_title: str
    passphrase: str | None
    key_file: Path | None
    server_names: list[str]
    with_pki: bool
    users: tuple[str, str] | None = None
    anchor_token: str = ""
    anchor_pin: str | None = None
    anchor_pin_file: Path | None = None
    credential: str = ""


def create(plan: Plan) -> Config:
    """Make a store beside its configuration file.

    Raises:
        StrongroomError: Something of a store is there already, or the token of its anchors is not; nothing was changed.
    """
    home = plan.file.parent
    taken = [
        p for p in (plan.file, home / "store", home / "anchors", home / "spool", plan.key_file) if p and p.exists()
    ]
    if taken:
        raise StrongroomError(
            f"{taken[0]} exists already: a store is never made over another one",
            hint="name another place with --config DIR/strongroom.toml",
        )
    settings = _settings(plan)
    config = Config(plan.file, settings)
    _try_token(config, plan)
    # Of the folders on the way to the store, those that are made now need a durable name in theirs.
    new = [folder for folder in (home, *home.parents) if not folder.exists()]
    now = datetime.now(UTC)
    created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    secrets: list[tuple[slots.Secret, str]] = []
    if plan.key_file is not None:
        content = slots.new_key_file()
        plan.key_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        encoding.create(plan.key_file, content)
        secrets.append((slots.parse_key_file(content), "first"))
    if plan.passphrase is not None:
        secrets.append((slots.Passphrase(plan.passphrase), "first"))
    if plan.credential:
        secrets.append((slots.Credential(plan.credential), "first"))

    FileAnchors(config.anchors).prepare()
    try:
        ring = keyring.new_keyring(secrets, anchors_of(config, plan.anchor_pin), created)
    except AnchorError as error:
        raise StrongroomError(
            str(error), hint=f"nothing is in {home} yet that counts: remove it, begin again"
        ) from error
    if plan.with_pki:
        ring.body.authority = authority.new_authority(ring.header.store_id, now)
    settings.store.signing_key = "ed25519:" + base64.b64encode(ring.header.signing_key).decode()
    config = Config(plan.file, settings)
    for folder, mode in (
        (config.store_path, 0o700),
        (config.incoming, 0o700),
        (config.desk_incoming, 0o700),
        (config.public, 0o755),
        (config.outbox, 0o750),
        (config.alert_state, 0o700),
        (config.peers, 0o755),
        (config.socket.parent, 0o750),
    ):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        # Whatever the umask is: the gate's user must be able to read public/.
        folder.chmod(mode)
    Archive(config.store_path, *config.inboxes).prepare()
    KeysDatabase(config.keys_db, migrate=True).close()
    os.chmod(config.keys_db, 0o600)
    ring.write(config.keyring)
    _publish(config, ring, created)
    if ring.body.authority is not None:
        issue_server(config, ring.body.authority, plan.server_names)
    if plan.users is not None:
        hand_over(config, plan.users, [path for path in (plan.key_file, plan.anchor_pin_file) if path is not None])
    for folder in (home, *(path for path in home.rglob("*") if path.is_dir()), *(path.parent for path in new)):
        encoding.sync_folder(folder)
    # Last: with the configuration the store is there; without it nothing uses what was made so far.
    encoding.create(plan.file, render(settings).encode(), mode=0o644)
    ring.forget()
    return config


def _try_token(config: Config, plan: Plan) -> None:
    if config.anchor_token is None:
        return
    try:
        attach(config, plan.anchor_pin).close()
    except TokenError as error:
        raise StrongroomError(str(error), hint="docs/anchors.md says what a token needs; nothing was made") from error


def _settings(plan: Plan) -> Settings:
    """Return the settings of a new store; its signing key comes later."""
    settings = Settings(store=Store(path="store", anchors="anchors", spool="spool", signing_key=""))
    settings.gate.listen = plan.listen
    settings.gate.ae_title = plan.ae_title
    if plan.with_pki:
        settings.gate.trust = ["tls/ca.pem"]
    if plan.users is not None:
        settings.gate.user = plan.users[1]
    if plan.key_file is not None:
        settings.unlock.key_file = _from(plan, plan.key_file)
    if plan.anchor_token:
        settings.keys.anchor, settings.keys.anchor_token = "token", plan.anchor_token
        settings.keys.anchor_pin = _from(plan, plan.anchor_pin_file) if plan.anchor_pin_file else PIN_CREDENTIAL
    return settings


def _from(plan: Plan, path: Path) -> str:
    """Return a path as the configuration names it: without its folder where it is in it."""
    home = plan.file.parent
    return str(path.relative_to(home) if path.is_relative_to(home) else path)


def issue_server(config: Config, ca: keyring.Authority, names: list[str]) -> None:
    """Make the server's key and certificate, issued by the store's own authority, which peers must trust."""
    key = authority.new_private_key()
    pem = authority.issue_server(ca, authority.request(key), names, datetime.now(UTC), _SERVER_DAYS)
    config.certificate.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not config.trust[0].exists():
        encoding.create(config.trust[0], ca.certificate.encode(), mode=0o644)
    encoding.create(config.certificate, pem, mode=0o644)
    encoding.create(config.private_key, authority.private_pem(key))


def _publish(config: Config, ring: keyring.Keyring, created: str) -> None:
    """Publish the current version's deposit key for the gates; a published key is never replaced."""
    version = ring.current()
    path = config.public / f"deposit-{version.version}.key"
    encoding.create(path, version.deposit_key().signed_file(ring.signing, created), mode=0o644)


def hand_over(config: Config, users: tuple[str, str], secrets: list[Path]) -> None:
    """Give vault and gate what is theirs: the gate writes ``incoming/``, and reads TLS key and peers.

    Args:
        config: The store.
        users: The vault's and the gate's.
        secrets: What the vault unlocks with.
    """
    vault, gate = (pwd.getpwnam(name) for name in users)
    everything = [config.store_path, *config.store_path.rglob("*"), config.anchors, *config.anchors.rglob("*")]
    told = [path for path in (config.outbox, config.alert_state) if path.exists()]
    # The desk's folder becomes the desk's where one is started.
    own = (config.public, *config.public.iterdir(), config.socket.parent, config.desk_incoming, *told)
    # What is in a folder before the folder: its new owner could put links there, and none is followed.
    for path in reversed((*everything, *own)):
        os.chown(path, vault.pw_uid, vault.pw_gid, follow_symlinks=False)
    # The set-group-id bit gives deposits the vault's group, which may read them and remove what it has admitted.
    os.chown(config.incoming, gate.pw_uid, vault.pw_gid)
    config.incoming.chmod(0o2770)
    with contextlib.suppress(KeyError):
        desk = pwd.getpwnam(config.settings.desk.user)
        os.chown(config.desk_incoming, desk.pw_uid, vault.pw_gid)
        config.desk_incoming.chmod(0o2770)
    for folder in (config.file.parent, config.incoming.parent, config.certificate.parent):
        if folder.exists():
            folder.chmod(0o755)
    if config.private_key.exists():
        os.chown(config.private_key, 0, gate.pw_gid)
        config.private_key.chmod(0o640)
    for secret in secrets:
        os.chown(secret, vault.pw_uid, vault.pw_gid)
