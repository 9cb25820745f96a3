"""``peer add|list|remove``: who may associate."""

from __future__ import annotations

import shlex
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from keys import authority, encoding
from storescp import peers
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.config import Config, is_ae_title, parse_address
from storescp.errors import NOTHING, StrongroomError
from storescp.peers import Peer, PeerError, PeerFile

_SHEET = """\
Strongroom: how {title} connects
================================

Set up at the device, DICOM storage destination:

  Host                   {host}
  Port                   {port}
  Called AE title        {called}
  Calling AE title       {title}
  Security               TLS 1.2 or 1.3 with a client certificate (DICOM PS3.15 B.12, BCP 195)
  Device's private key   {key}
  Device's certificate   {certificate}
                         valid until {until}
  Authority (CA)         {ca}
  CA fingerprint         {fingerprint}
                         (SHA-256; compare it by another way than the one this sheet came)

Keep the private key on the device only, and delete it from wherever it was carried.

Test it from a computer that has DCMTK, in the folder of these files; "Success" at the end is what you want:

  echoscu -v -aet {title_quoted} -aec {called_quoted} +tls {key} {certificate} +cf {ca} {host} {port}
"""


@click.group("peer")
def peer_command() -> None:
    """Add, list and remove peers: who may associate. A running gate takes changes up by itself."""


@peer_command.command("add")
@click.argument("title")
@click.option(
    "--issue",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Issue key, certificate and a sheet for the vendor into this folder.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Bind an existing certificate, PEM.",
)
@click.option("--description", default="", help="Who or what this is.")
@click.option(
    "--private-sop-class",
    multiple=True,
    metavar="UID",
    help="A private SOP class that it may store; may be repeated.",
)
@click.option("--days", default=730, show_default=True, help="How long an issued certificate is valid.")
@click.option("--host", help="The server's name or address for the sheet.")
@click.pass_obj
def add(
    given: str | None,
    /,
    title: str,
    folder: Path | None,
    certificate: Path | None,
    description: str,
    private_sop_class: tuple[str, ...],
    days: int,
    host: str | None,
) -> None:
    r"""Let a device in: bind its calling AE title to its certificate.

    \b
    Examples:
      $ strongroom peer add CT1 --issue ./for-the-vendor
      $ strongroom peer add MR2 --certificate mr2.pem
    """
    if (folder is None) == (certificate is None):
        raise click.UsageError("name either --issue FOLDER (a new certificate) or --certificate FILE (an existing one)")
    if not is_ae_title(title):
        raise click.BadParameter(f"'{title}' is no AE title: 1 to 16 ASCII characters, no backslash")
    title = title.strip(" ")
    config = config_of(given)
    file = config.peers / peers.file_name(title)
    if title in _read(config).by_title:
        raise StrongroomError(f"there is a peer {title} already", hint=f"'strongroom peer remove {title}' first")
    pem = _issue(config, title, folder, days, host) if folder is not None else _bound(certificate or Path())
    content = peers.render(
        PeerFile(
            ae_title=title,
            description=description,
            certificates=[pem],
            private_sop_classes=list(private_sop_class),
        )
    )
    try:
        peers.parse(content, file)
        encoding.create(file, content.encode(), mode=0o644)
    except PeerError as error:
        raise StrongroomError(str(error)) from error
    except OSError as error:
        raise StrongroomError(f"{file} cannot be written: {error.strerror}") from error
    click.echo(f"peer {title} added: {file}")
    if folder is not None:
        click.echo(f"for the vendor's engineer: {folder}")


@peer_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_peers(given: str | None, /, as_json: bool) -> int:
    r"""List the peers and their certificates.

    \b
    Example:
      $ strongroom peer list
    """
    found = [_described(p) for p in _read(config_of(given)).by_title.values()]
    if as_json:
        output.document({"format": 1, "items": found})
    elif found:
        keys = ("ae_title", "description", "expires", "fingerprint")
        output.table(
            ["AE title", "Description", "Certificate valid until", "SHA-256 fingerprint"],
            ([p[k] if k in p else c[k] for k in keys] for p in found for c in p["certificates"]),
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
    peer = _read(config_of(given)).by_title.get(title.strip(" "))
    if peer is None:
        raise StrongroomError(f"there is no peer {title}", hint="'strongroom peer list' lists them", status=NOTHING)
    peer.file.unlink()
    encoding.sync_folder(peer.file.parent)
    click.echo(f"peer {peer.ae_title} removed; its certificate opens nothing here any more")


def _read(config: Config) -> peers.Peers:
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


def _issue(config: Config, title: str, folder: Path, days: int, host: str | None) -> str:
    stem = peers.file_name(title).removesuffix(".toml")
    key_file, certificate_file, ca_file = folder / f"{stem}.key", folder / f"{stem}.pem", folder / "ca.pem"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for taken in (key_file, certificate_file):
        if taken.exists():
            raise StrongroomError(f"{taken} exists already", hint="name another folder")
    key = authority.new_private_key()
    with vault(config) as client:
        issued = client.json("POST", "/v1/certificates", {"csr": authority.request(key), "peer": title, "days": days})
    encoding.create(key_file, authority.private_pem(key))
    encoding.create(certificate_file, issued["certificate"].encode(), mode=0o644)
    encoding.replace(ca_file, issued["authority"].encode(), mode=0o644)
    own_host, port = parse_address(config.settings.gate.listen[0])
    wildcard = own_host in {"0.0.0.0", "::"}  # noqa: S104
    print_hex = peers.fingerprint(issued["authority"])
    called = config.settings.gate.ae_title
    sheet = _SHEET.format(
        title=title,
        title_quoted=shlex.quote(title),
        called=called,
        called_quoted=shlex.quote(called),
        host=host or (socket.gethostname() if wildcard else own_host),
        port=port,
        key=key_file.name,
        certificate=certificate_file.name,
        ca=ca_file.name,
        until=_expiry(issued["certificate"]),
        fingerprint=":".join(print_hex[i : i + 2].upper() for i in range(0, 64, 2)),
    )
    encoding.replace(folder / f"{stem}.txt", sheet.encode(), mode=0o644)
    return str(issued["certificate"])


def _expiry(pem: str) -> str:
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ")


def _described(peer: Peer) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "ae_title": peer.ae_title,
        "description": peer.description,
        "file": str(peer.file),
        "private_sop_classes": sorted(peer.private_sop_classes),
        "certificates": [
            {
                "fingerprint": peers.fingerprint(pem),
                "expires": _expiry(pem),
                "expired": x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc < now,
            }
            for pem in peer.certificates
        ],
    }
