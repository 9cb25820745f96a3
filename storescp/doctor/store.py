"""The store's files: where they lie, whose they are, what the gate serves with, and who may come."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from storescp import harden, peers
from storescp.config import Config, parse_address
from storescp.doctor import blocks
from storescp.doctor.facts import Ending, Patches, PeerFact, Place, Store, Tls, Unseen
from storescp.errors import StrongroomError
from storescp.gate.crl import CrlError
from storescp.gate.tls import Trust, server_context
from storescp.patch.folder import Folder, Manifest, Origin, load

_T = TypeVar("_T")


def look(config: Config) -> Store:
    """Look at the files that a configuration names."""
    found, faults = peers.read_good(config.peers)
    readable = os.access(config.peers, os.R_OK | os.X_OK)
    return Store(
        settings=config.settings,
        places=places(config),
        modes=_seen(partial(modes, config)),
        tls=_seen(partial(tls, config)),
        endings=tuple(endings(config, found)),
        peers=tuple(_peer(p) for p in found.by_title.values())
        if readable
        else Unseen(f"{config.peers} cannot be read; run the doctor as root"),
        peer_faults=tuple(faults),
        patches=_seen(partial(patches, config)),
    )


def ports(config: Config) -> set[int]:
    """Return the ports that a configuration names."""
    gate, numbers = config.settings.gate, config.settings.metrics.listen
    texts = [*gate.listen, *(p.listen for p in gate.plaintext), *([numbers] if numbers else [])]
    return {parse_address(text)[1] for text in texts} - {0}


def places(config: Config) -> tuple[Place, ...] | Unseen:
    """Return what the parts of a store lie on."""
    named = {"store": config.store_path, "incoming": config.incoming}
    if config.desk_incoming.exists():
        named["incoming-desk"] = config.desk_incoming
    if config.settings.keys.anchor == "file":
        named["anchors"] = config.anchors
    if config.key_file is not None:
        named["key file"] = config.key_file
    if config.settings.schedule.backup_folder:
        named["backups"] = Path(config.settings.schedule.backup_folder)
    found = []
    for name, path in named.items():
        place = blocks.place(name, path)
        if isinstance(place, Unseen):
            return place
        found.append(place)
    return tuple(found)


def modes(config: Config) -> tuple[str, ...] | Unseen:
    """Return whose and how open the store's files are, where they are not as they should be.

    Raises:
        OSError: A place cannot be seen.
    """
    owner = config.store_path.stat().st_uid
    if os.geteuid() not in {0, owner}:
        return Unseen("only root and the vault's user see all of the store; run the doctor as root")
    try:
        found = harden.vault_faults(config, owner)
    except StrongroomError as error:
        found = [str(error)]
    found += harden.gate_faults(config) + harden.desk_faults(config)
    secrets = (config.key_file, config.anchor_pin_file, config.mail_password_file, config.audit_private_key)
    found += [fault for file in secrets if file is not None for fault in _secret(file)]
    backups = config.settings.schedule.backup_folder
    if backups and os.path.isdir(backups) and os.stat(backups).st_mode & stat.S_IRWXO:
        found.append(f"{backups} is open to all: chmod o-rwx {backups}")
    return tuple(found)


def _secret(file: Path) -> list[str]:
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return [f"{file} is missing"]
    return [f"{file} is open to others: chmod 0600 {file}"] if mode & 0o077 else []


def tls(config: Config) -> Tls:
    """Return what the gate serves with these files; made as the gate makes it.

    Raises:
        OSError: A file cannot be read, or OpenSSL does not take it.
        CrlError: A revocation list cannot be used.
    """
    trust = Trust(config.trust, config.crls)
    context = server_context(config.certificate, config.private_key, trust, peers.Peers({}))
    leaf = _certificates(config.certificate)[0]
    key = leaf.public_key()
    bits = key.key_size if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) else 0
    kind = "RSA" if isinstance(key, rsa.RSAPublicKey) else "EC" if bits else type(key).__name__
    used = leaf.signature_hash_algorithm
    return Tls(
        minimum=context.minimum_version.name,
        suites=tuple(str(suite["name"]) for suite in context.get_ciphers()),
        client_certificates=context.verify_mode is ssl.CERT_REQUIRED,
        key=kind,
        bits=bits,
        signature=used.name if used else "",
    )


def endings(config: Config, found: peers.Peers) -> Iterator[Ending]:
    """Yield when each certificate and list ends; of a chain the first one, of a peer's certificates the last one."""
    yield _ending("the server's certificate", partial(_first, config.certificate))
    for file in config.trust:
        yield _ending(f"the authority {file.name}", partial(_first, file))
    for file in config.crls:
        yield _ending(f"the revocation list {file.name}", partial(_list, file), revocations=True)
    for peer in found.by_title.values():
        if peer.certificates:
            yield _ending(f"the certificate of peer {peer.ae_title}", partial(_last, peer.certificates))


def patches(config: Config) -> Patches:
    """Return when evidence about fixes last came.

    Raises:
        StrongroomError: What says so cannot be read.
    """
    settings = config.settings.patch_age
    folder = Folder(config.file.parent / settings.folder)
    origins = [load(f.with_suffix(".json"), Origin) for name in settings.ecosystems for f in folder.feeds(name)]
    manifest = load(folder.manifest, Manifest) or Manifest()
    came = [origin.brought for origin in [*origins, *manifest.packages.values()] if origin is not None]
    return Patches(fetched=max(came, default=None))


def _peer(peer: peers.Peer) -> PeerFact:
    return PeerFact(
        ae_title=peer.ae_title,
        pinned=bool(peer.certificates or peer.keys) and not peer.names,
        plaintext=peer.plaintext,
        addresses=len(peer.networks),
    )


def _seen(look: Callable[[], _T | Unseen]) -> _T | Unseen:
    try:
        return look()
    except PermissionError as error:
        return Unseen(f"{error.filename or 'a file'} cannot be read; run the doctor as root")
    except (OSError, StrongroomError, CrlError, ValueError, x509.InvalidVersion) as error:
        return Unseen(" ".join(str(error).split()))


def _ending(name: str, read: Callable[[], datetime | Unseen], *, revocations: bool = False) -> Ending:
    return Ending(name=name, ends=_seen(read), revocations=revocations)


def _certificates(file: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(file.read_bytes())


def _first(file: Path) -> datetime:
    return min(certificate.not_valid_after_utc for certificate in _certificates(file))


def _last(pems: tuple[str, ...]) -> datetime:
    return max(x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc for pem in pems)


def _list(file: Path) -> datetime | Unseen:
    content = file.read_bytes()
    read = x509.load_pem_x509_crl if content.lstrip().startswith(b"-----") else x509.load_der_x509_crl
    return read(content).next_update_utc or Unseen(f"{file} does not say until when it holds")
