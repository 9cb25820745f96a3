"""``peer add|renew|list|remove|test``: who may associate."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from keys import authority, encoding
from storescp import peers
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.cli.sheet import Issued, closed, sheet
from storescp.config import Config, is_ae_title, parse_address
from storescp.control import Client
from storescp.errors import NOTHING, StrongroomError
from storescp.peers import Peer, PeerError, PeerFile

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("peer")
def peer_command() -> None:
    """Add, renew, test, list and remove peers: who may associate. A running gate takes changes up by itself."""


@peer_command.command("add")
@click.argument("title")
@click.option(
    "--issue", "folder", type=_FOLDER, help="Issue key, certificate and a sheet for the vendor into this folder."
)
@click.option("--certificate", type=_FILE, help="Bind an existing certificate, PEM.")
@click.option("--key", metavar="SHA256", help="Bind a key by its fingerprint, 'sha256:' and 64 hex digits.")
@click.option("--name", metavar="NAME", help="Bind a name in its certificate, as dns:ct1.example; with --authority.")
@click.option("--authority", metavar="SHA256", help="Fingerprint of the key of the authority that issues --name.")
@click.option("--plaintext", is_flag=True, help="It comes without TLS, through a listener of gate.plaintext.")
@click.option("--description", default="", help="Who or what this is.")
@click.option("--address", multiple=True, metavar="NETWORK", help="Where it may come from; may be repeated.")
@click.option("--operation", multiple=True, type=click.Choice(peers.OPERATIONS), help="What it may do: echo and store.")
@click.option("--sop-class", multiple=True, metavar="UID", help="A storage SOP class that it may store; all.")
@click.option(
    "--private-sop-class", multiple=True, metavar="UID", help="A private SOP class that it may store besides."
)
@click.option("--role", "roles", multiple=True, type=click.Choice(peers.ROLES), help="What it may do by DICOMweb.")
@click.option("--sees-ae-title", multiple=True, metavar="TITLE", help="It finds and fetches what came from here; all.")
@click.option("--sees-modality", multiple=True, metavar="CS", help="And series of this modality; all.")
@click.option("--listens", default="", metavar="HOST:PORT", help="Where moved studies and commitment reports go.")
@click.option("--maximum-associations", default=0, help="Associations at a time; 0 for no limit of its own.")
@click.option("--objects-per-minute", default=0, help="A faster peer is slowed down; 0 for no limit.")
@click.option("--bytes-per-day", default=0, help="More is refused until midnight UTC; 0 for no limit.")
@click.option("--days", default=730, show_default=True, help="How long an issued certificate is valid.")
@click.option("--host", help="The server's name or address for the sheet.")
@click.pass_obj
def add(
    given: str | None,
    /,
    title: str,
    folder: Path | None,
    certificate: Path | None,
    key: str | None,
    name: str | None,
    authority: str | None,
    plaintext: bool,
    description: str,
    address: tuple[str, ...],
    operation: tuple[str, ...],
    sop_class: tuple[str, ...],
    private_sop_class: tuple[str, ...],
    roles: tuple[str, ...],
    sees_ae_title: tuple[str, ...],
    sees_modality: tuple[str, ...],
    listens: str,
    maximum_associations: int,
    objects_per_minute: int,
    bytes_per_day: int,
    days: int,
    host: str | None,
) -> None:
    r"""Let a device in: bind its calling AE title to its certificate, and say what it may do.

    \b
    Examples:
      $ strongroom peer add CT1 --issue ./for-the-vendor --address 10.1.2.0/24
      $ strongroom peer add MR2 --certificate mr2.pem --objects-per-minute 3000
      $ strongroom peer add VIEW1 --issue ./view1 --operation find --operation get --sees-modality US
      $ strongroom peer add UPLOAD --issue ./upload --role sender
    """
    ways = sum((folder is not None, certificate is not None, key is not None, name is not None, plaintext))
    if ways != 1:
        raise click.UsageError("name one of --issue (a new certificate), --certificate, --key, --name and --plaintext")
    if not is_ae_title(title):
        raise click.BadParameter(f"'{title}' is no AE title: 1 to 16 ASCII characters, no backslash")
    title = title.strip(" ")
    config = config_of(given)
    file = config.peers / peers.file_name(title)
    if title in read(config).by_title:
        raise StrongroomError(f"there is a peer {title} already", hint=f"'strongroom peer remove {title}' first")
    wanted = PeerFile(
        ae_title=title,
        description=description,
        keys=[key] if key else [],
        names=[name] if name else [],
        authority=authority or "",
        plaintext=plaintext,
        addresses=list(address),
        operations=list(operation) or list(PeerFile(ae_title=title).operations),
        sop_classes=list(sop_class),
        private_sop_classes=list(private_sop_class),
        roles=list(roles),
        sees_ae_titles=list(sees_ae_title),
        sees_modalities=list(sees_modality),
        listens=listens,
        maximum_associations=maximum_associations,
        objects_per_minute=objects_per_minute,
        bytes_per_day=bytes_per_day,
    )
    _check(msgspec.structs.replace(wanted, plaintext=True), file)
    with vault(config, unlocked=folder is not None) as client:
        if folder is not None:
            wanted.certificates = [_issue(client, config, wanted, folder, days, host)]
        elif certificate is not None:
            wanted.certificates = [_bound(certificate)]
        _check(wanted, file)
        _record(client, "peer-added", title)
        _write(file, wanted)
    click.echo(f"peer {title} added: {file}")
    if folder is not None:
        click.echo(f"for the vendor's engineer: {folder}")
    for what in closed(config, wanted):
        click.echo(f"{what}; then start again (docs/desk.md)", err=True)


@peer_command.command("renew")
@click.argument("title")
@click.option("--issue", "folder", type=_FOLDER, help="Issue a new key, certificate and sheet into this folder.")
@click.option("--certificate", type=_FILE, help="Bind an existing certificate besides, PEM.")
@click.option("--finish", is_flag=True, help="The device uses the new one: bind the old one no more.")
@click.option("--force", is_flag=True, help="Finish though the new one was never used.")
@click.option("--days", default=730, show_default=True, help="How long an issued certificate is valid.")
@click.option("--host", help="The server's name or address for the sheet.")
@click.pass_obj
def renew(
    given: str | None,
    /,
    title: str,
    folder: Path | None,
    certificate: Path | None,
    finish: bool,
    force: bool,
    days: int,
    host: str | None,
) -> None:
    r"""Replace a peer's certificate without a gap: both count until the device uses the new one.

    \b
    Examples:
      $ strongroom peer renew CT1 --issue ./for-the-vendor
      $ strongroom peer list            # says when each was last used
      $ strongroom peer renew CT1 --finish
    """
    if sum((folder is not None, certificate is not None, finish)) != 1:
        raise click.UsageError("name one of --issue FOLDER, --certificate FILE and --finish")
    config = config_of(given)
    peer = find(config, title)
    wanted = peers.load(peer.file.read_text("utf-8"), peer.file)
    if len(wanted.certificates) > 1 and not finish:
        hint = f"'strongroom peer renew {peer.ae_title} --finish' drops the old one"
        raise StrongroomError(f"peer {peer.ae_title} has two certificates already", hint=hint)
    with vault(config, unlocked=folder is not None) as client:
        if finish:
            _finish(client, peer, wanted, force)
        elif folder is not None:
            wanted.certificates.append(_issue(client, config, wanted, folder, days, host))
        else:
            wanted.certificates.append(_another(_bound(certificate or Path()), peer))
        _check(wanted, peer.file)
        _record(client, "peer-renewed" if finish else "peer-renewing", peer.ae_title)
        encoding.replace(peer.file, peers.render(wanted).encode(), mode=0o644)
    if finish:
        click.echo(f"peer {peer.ae_title}: only its newest certificate counts from now on")
        return
    click.echo(f"peer {peer.ae_title}: both certificates count from now on")
    if folder is not None:
        click.echo(f"for the vendor's engineer: {folder}")
    click.echo(f"when 'strongroom peer list' shows that the new one is used: strongroom peer renew {title} --finish")


@peer_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_peers(given: str | None, /, as_json: bool) -> int:
    r"""List the peers, their certificates, and when each was last used.

    \b
    Example:
      $ strongroom peer list
    """
    config = config_of(given)
    known = read(config)
    used = _uses(config) if known.by_title else {}
    found = [_described(p, used) for p in known.by_title.values()]
    if as_json:
        output.document({"format": 1, "items": found})
    elif found:
        output.table(
            ["AE title", "Description", "May", "From", "Bound to", "Valid until", "Last used"],
            (
                [
                    *(p["ae_title"], p["description"], " ".join(p["operations"])),
                    *(" ".join(p["addresses"]) or "everywhere", bound["what"]),
                    *(bound["expires"] or "", bound["last_used"] or ""),
                ]
                for p in found
                for bound in p["bound"]
            ),
        )
    if not found:
        click.echo("no peers: nobody can associate", err=True)
        return NOTHING
    return 0


@peer_command.command("remove")
@click.argument("title")
@click.pass_obj
def remove(given: str | None, /, title: str) -> None:
    r"""Let a device in no more. Associations that it has stay until they end.

    \b
    Example:
      $ strongroom peer remove CT1
    """
    config = config_of(given)
    peer = find(config, title)
    with vault(config, unlocked=False) as client:
        _record(client, "peer-removed", peer.ae_title)
        peer.file.unlink()
        encoding.sync_folder(peer.file.parent)
    others = [
        p.ae_title for p in read(config).by_title.values() if p.fingerprints & peer.fingerprints or p.keys & peer.keys
    ]
    left = (
        f"its certificate still opens {', '.join(others)}" if others else "its certificate opens nothing here any more"
    )
    click.echo(f"peer {peer.ae_title} removed; {left}")


@peer_command.command("test")
@click.argument("title")
@click.option("--seconds", default=120, show_default=True, help="How long to watch.")
@click.option("--json", "as_json", is_flag=True, help="A JSON document a line.")
@click.pass_obj
def test(given: str | None, /, title: str, seconds: int, as_json: bool) -> int:
    r"""Watch a device's next attempt to connect, step by step, and say where and why it fails.

    Have somebody send an echo from the device meanwhile. The gate must be running. Ends with the first attempt of this
    peer that comes to an end.

    \b
    Example:
      $ strongroom peer test CT1
    Exit status: 0 it works, 1 it fails, 5 nothing came.
    """
    from storescp.cli import peertest

    config = config_of(given)
    return peertest.watch(config, title.strip(" "), seconds, as_json)


def find(config: Config, title: str) -> Peer:
    """Return a peer.

    Raises:
        StrongroomError: There is none.
    """
    peer = read(config).by_title.get(title.strip(" "))
    if peer is None:
        raise StrongroomError(f"there is no peer {title}", hint="'strongroom peer list' lists them", status=NOTHING)
    return peer


def read(config: Config) -> peers.Peers:
    """Return the peers.

    Raises:
        StrongroomError: A peer file is malformed.
    """
    try:
        return peers.read_all(config.peers)
    except PeerError as error:
        raise StrongroomError(str(error)) from error


def _bound(file: Path) -> str:
    try:
        loaded = x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StrongroomError(f"{file} is no certificate in PEM: {error}") from error
    return loaded[0].public_bytes(Encoding.PEM).decode()


def _another(pem: str, peer: Peer) -> str:
    if peers.fingerprint(pem) in peer.fingerprints:
        raise StrongroomError(f"this certificate is bound to {peer.ae_title} already", hint="name the device's new one")
    return pem


def _check(wanted: PeerFile, file: Path) -> None:
    try:
        peers.parse(peers.render(wanted), file)
    except PeerError as error:
        raise StrongroomError(str(error)) from error


def _write(file: Path, wanted: PeerFile) -> None:
    try:
        encoding.create(file, peers.render(wanted).encode(), mode=0o644)
    except OSError as error:
        raise StrongroomError(f"{file} cannot be written: {error.strerror}") from error


def _record(client: Client, kind: str, title: str) -> None:
    """Have an act recorded before it is done: what cannot be recorded is not done."""
    client.json("POST", "/v1/acts", {"type": kind, "peer": title})


def _finish(client: Client, peer: Peer, wanted: PeerFile, force: bool) -> None:
    if len(wanted.certificates) < 2:
        raise StrongroomError(f"peer {peer.ae_title} has one certificate", hint="there is nothing to finish")
    newest = wanted.certificates[-1]
    used = {item["certificate"] for item in client.json("GET", "/v1/peers")["items"]}
    if peers.fingerprint(newest) not in used and not force:
        raise StrongroomError(
            f"the new certificate of {peer.ae_title} was not used yet, as far as the vault knows",
            hint="install it at the device and send an echo; --force finishes all the same",
        )
    wanted.certificates = [newest]


def _uses(config: Config) -> dict[str, str]:
    """Return when each certificate was last used; nothing where no vault runs, or it is locked."""
    if not config.socket.exists():
        return {}
    try:
        with vault(config, unlocked=False) as client:
            return {item["certificate"]: item["last"] for item in client.json("GET", "/v1/peers")["items"]}
    except StrongroomError:
        return {}


def _issue(client: Client, config: Config, peer: PeerFile, folder: Path, days: int, host: str | None) -> str:
    title = peer.ae_title
    stem = peers.file_name(title).removesuffix(".toml")
    key_file, certificate_file, ca_file = folder / f"{stem}.key", folder / f"{stem}.pem", folder / "ca.pem"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for taken in (key_file, certificate_file):
        if taken.exists():
            raise StrongroomError(f"{taken} exists already", hint="name another folder")
    key = authority.new_private_key()
    issued = client.json("POST", "/v1/certificates", {"csr": authority.request(key), "peer": title, "days": days})
    encoding.create(key_file, authority.private_pem(key))
    encoding.create(certificate_file, issued["certificate"].encode(), mode=0o644)
    encoding.replace(ca_file, issued["authority"].encode(), mode=0o644)
    print_hex = peers.fingerprint(issued["authority"])
    made = Issued(
        key_file.name,
        certificate_file.name,
        ca_file.name,
        _expiry(issued["certificate"]),
        ":".join(print_hex[i : i + 2].upper() for i in range(0, 64, 2)),
    )
    text = sheet(config, peer, made, host or _own_name(config))
    encoding.replace(folder / f"{stem}.txt", text.encode(), mode=0o644)
    return str(issued["certificate"])


def _own_name(config: Config) -> str:
    """Return what this machine is called where it listens on every address; else it is known by those."""
    own, _ = parse_address(config.settings.gate.listen[0])
    return socket.gethostname() if own in {"0.0.0.0", "::"} else ""  # noqa: S104


def _expiry(pem: str) -> str:
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")


def _described(peer: Peer, used: dict[str, str]) -> dict[str, Any]:
    now = datetime.now(UTC)
    bound: list[dict[str, Any]] = []
    for pem in peer.certificates:
        loaded = x509.load_pem_x509_certificate(pem.encode())
        fingerprint = peers.fingerprint(pem)
        entry = {"what": f"certificate {fingerprint[:16]}", "fingerprint": fingerprint, "expires": _expiry(pem)}
        bound.append(entry | {"expired": loaded.not_valid_after_utc < now, "last_used": used.get(fingerprint)})
    others = [*(f"key {key}" for key in sorted(peer.keys)), *(f"name {name}" for name in sorted(peer.names))]
    others += ["nothing: comes without TLS"] if peer.plaintext else []
    bound += [
        {"what": what, "fingerprint": "", "expires": None, "expired": False, "last_used": None} for what in others
    ]
    return {
        "ae_title": peer.ae_title,
        "description": peer.description,
        "file": str(peer.file),
        "operations": [o for o in peers.OPERATIONS if o in peer.operations],
        "addresses": [str(net) for net in peer.networks],
        "sop_classes": sorted(peer.sop_classes),
        "private_sop_classes": sorted(peer.private_sop_classes),
        "maximum_associations": peer.maximum_associations,
        "objects_per_minute": peer.objects_per_minute,
        "bytes_per_day": peer.bytes_per_day,
        "bound": bound,
    }
