"""A new store in the places of an installation: made in one folder, moved to its places, configured last."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keys import encoding, slots
from storescp import install
from storescp.basesystem import Names, run
from storescp.config import Config, render
from storescp.errors import StrongroomError
from storescp.install import DESK, GATE, VAULT, Options
from storescp.unitfiles import CREDENTIAL
from storescp.vault.create import Plan, create


def make(options: Options, passphrase: str | None, names: Names, *, seal: bool, say: Callable[[str], None]) -> None:
    """Make a store.

    It is made beside the anchors, so that no copy of one stays behind on another file system. Until the configuration
    is there, which is written last, nothing uses what was made.

    Args:
        options: With the scratch root, if it is for one.
        passphrase: Of a slot of its own; None for none.
        names: Whose numbers vault and gate have there.
        seal: Whether systemd encrypts the vault's key.
        say: Gets what there is to know.

    Raises:
        StrongroomError: It could not be made.
        OSError: Nor moved.
    """
    root = Path(options.root or "/")
    work = _in(root, install.NEW)
    if work.exists():
        raise StrongroomError(
            f"{work} is there already", hint="docs/install.md says what is left of a run that broke off"
        )
    try:
        with _key(root) as key:
            config = _create(options, work, passphrase)
            if options.unlock == "credential":
                _keep(options, root, key, seal=seal)
    except BaseException:
        # Nothing of it was ever used: the next run begins again.
        shutil.rmtree(work, ignore_errors=True)
        raise
    moves = (
        (config.anchors, install.ANCHORS, VAULT),
        (config.store_path, install.STORE, VAULT),
        (config.public, f"{install.SPOOL}/public", VAULT),
        (config.certificate.parent, f"{options.config}/tls", "root"),
    )
    for source, target, user in moves:
        _move(source, _in(root, target), user, names, say)
    tls = _in(root, f"{options.config}/tls")
    private = tls / config.private_key.name
    if private.exists():
        names.chown(private, "root", GATE, say)
        private.chmod(0o640)
        encoding.sync_folder(tls)
    shutil.rmtree(work)
    encoding.sync_folder(work.parent)
    _configure(options, config)
    encoding.create(_in(root, options.toml), render(config.settings).encode(), mode=0o644)
    say(f"  store {install.STORE}, anchors {install.ANCHORS}, configuration {options.toml}")


def _create(options: Options, work: Path, passphrase: str | None) -> Config:
    return create(
        Plan(
            file=work / "strongroom.toml",
            listen=list(options.listen),
            ae_title=options.ae_title,
            passphrase=passphrase,
            key_file=None,
            server_names=list(options.names),
            with_pki=options.with_pki,
            credential=CREDENTIAL if options.unlock == "credential" else "",
        )
    )


def _configure(options: Options, config: Config) -> None:
    """Name the places of an installation."""
    settings = config.settings
    settings.store.path, settings.store.anchors, settings.store.spool = install.STORE, install.ANCHORS, install.SPOOL
    settings.control.socket = f"{install.RUN}/vault.sock"
    # Empty until somebody joins it.
    settings.control.group = install.ADMIN
    settings.patch_age.folder = f"{install.SPOOL}/patch"
    settings.gate.user = GATE
    settings.desk.user, settings.desk.socket = DESK, f"{install.RUN}-desk/desk.sock"
    if options.unlock == "credential":
        settings.unlock.key_file = f"credential:{CREDENTIAL}"


@contextmanager
def _key(root: Path) -> Iterator[bytes]:
    """Make a key and give it to this process as systemd would give it to the vault: /run is memory, and forgets."""
    folder = root / "run"
    folder.mkdir(exist_ok=True, mode=0o755)
    before = os.environ.get("CREDENTIALS_DIRECTORY")
    with tempfile.TemporaryDirectory(dir=folder, prefix="strongroom-install-") as made:
        content = slots.new_key_file()
        encoding.create(Path(made, CREDENTIAL), content)
        os.environ["CREDENTIALS_DIRECTORY"] = made
        try:
            yield content
        finally:
            if before is None:
                del os.environ["CREDENTIALS_DIRECTORY"]
            else:
                os.environ["CREDENTIALS_DIRECTORY"] = before


def _keep(options: Options, root: Path, key: bytes, *, seal: bool) -> None:
    """Keep the vault's key: encrypted by systemd for this machine alone, or as a file of root's."""
    if not seal:
        encoding.create(_in(root, options.plain_key), key)
        return
    place = _in(root, options.sealed_key)
    place.parent.mkdir(mode=0o700, exist_ok=True)
    run(("systemd-creds", "encrypt", f"--name={CREDENTIAL}", "-", str(place)), given=key)
    place.chmod(0o600)
    encoding.sync_folder(place.parent)


def _move(source: Path, target: Path, user: str, names: Names, say: Callable[[str], None]) -> None:
    """Move what a folder holds into another one, which may be on another file system, and make it durable there."""
    target.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        return
    for entry in sorted(source.iterdir()):
        place = Path(shutil.move(entry, target / entry.name))
        inner = [place, *place.rglob("*")]
        for path in inner:
            names.chown(path, user, user, say)
            _sync(path)
    encoding.sync_folder(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in(root: Path, place: str) -> Path:
    return root / place.lstrip("/")
