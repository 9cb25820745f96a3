"""Peers: who may associate. One file a peer in ``peers.d``, and the pure decision about a request."""

from __future__ import annotations

import os
import tomllib
import urllib.parse
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from storage.attributes import is_uid
from storescp.config import convert, is_ae_title, toml_string


class PeerError(ValueError):
    """A peer file is malformed; the message names file and key."""


class PeerFile(msgspec.Struct, kw_only=True):
    """What a peer file holds."""

    ae_title: str
    description: str = ""
    certificates: list[str]
    private_sop_classes: list[str] = msgspec.field(default_factory=list)


class Peer(msgspec.Struct, frozen=True):
    """A peer, checked. Fingerprints are SHA-256 of the certificates in DER, hex."""

    ae_title: str
    description: str
    certificates: tuple[str, ...]
    fingerprints: frozenset[str]
    private_sop_classes: frozenset[str]
    file: Path


class Peers(msgspec.Struct, frozen=True):
    """All peers, by AE title; changes make a new value."""

    by_title: dict[str, Peer]

    def decide(self, calling: bytes, called: bytes, own_title: str, fingerprint: str) -> Peer | str:
        """Decide about an association request.

        Args:
            calling: Calling AE title, the 16 bytes of the request.
            called: Called AE title, the 16 bytes of the request.
            own_title: The gate's AE title.
            fingerprint: Of the certificate that the connection has proved to hold.

        Returns:
            The peer, or a reason for the log. Titles are compared byte by byte, without their padding.
        """
        peer = next((p for p in self.by_title.values() if _raw(p.ae_title) == calling.strip(b" ")), None)
        if peer is None:
            return "no peer has this calling AE title"
        if fingerprint not in peer.fingerprints:
            return "the certificate is not one of the peer with this calling AE title"
        if called.strip(b" ") != _raw(own_title):
            return "the called AE title is not this server's"
        return peer


def read(file: Path) -> Peer:
    """Read a peer file.

    Raises:
        PeerError: It is malformed.
    """
    try:
        return parse(file.read_text("utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise PeerError(f"{file}: {error}") from error


def parse(content: str, file: Path) -> Peer:
    """Return the peer in a peer file's content.

    Raises:
        PeerError: It is malformed.
    """
    try:
        document = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"{file}: {error}") from error
    parsed, errors = convert(document, PeerFile)
    if parsed is None:
        raise PeerError("\n".join(f"{file}: {e}" for e in errors))
    if not is_ae_title(parsed.ae_title):
        raise PeerError(f"{file}: ae_title: must be 1 to 16 characters, ASCII, no backslash")
    for uid in parsed.private_sop_classes:
        if not is_uid(uid):
            raise PeerError(f"{file}: private_sop_classes: '{uid}' is no UID")
    if not parsed.certificates:
        raise PeerError(f"{file}: certificates: a peer needs one")
    try:
        prints = frozenset(fingerprint(pem) for pem in parsed.certificates)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise PeerError(f"{file}: certificates: {error}") from error
    return Peer(
        parsed.ae_title.strip(" "),
        parsed.description,
        tuple(parsed.certificates),
        prints,
        frozenset(parsed.private_sop_classes),
        file,
    )


def read_all(folder: Path) -> Peers:
    """Read a folder of peer files.

    Raises:
        PeerError: One is malformed, or two name the same AE title; then none is taken.
    """
    peers, errors = read_good(folder)
    if errors:
        raise PeerError("\n".join(errors))
    return peers


def read_good(folder: Path) -> tuple[Peers, list[str]]:
    """Return the peers of a folder whose files are good, and what is wrong with the others."""
    by_title: dict[str, Peer] = {}
    errors = []
    for file in sorted(folder.glob("*.toml")):
        try:
            peer = read(file)
            if peer.ae_title in by_title:
                raise PeerError(f"{file}: ae_title: also in {by_title[peer.ae_title].file}")
            by_title[peer.ae_title] = peer
        except PeerError as error:
            errors.append(str(error))
    return Peers(by_title), errors


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a peer file does: names, times and sizes."""
    try:
        with os.scandir(folder) as entries:
            found = [(e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in entries if e.name.endswith(".toml")]
    except OSError:
        return ()
    return tuple(sorted(found))


def fingerprint(pem: str) -> str:
    """Return SHA-256 of a certificate's DER, hex.

    Raises:
        ValueError: It is no certificate in PEM.
    """
    return x509.load_pem_x509_certificate(pem.encode()).fingerprint(hashes.SHA256()).hex()


def file_name(ae_title: str) -> str:
    """Return a peer's file name: an AE title may hold characters that a name may not."""
    return urllib.parse.quote(ae_title, safe="") + ".toml"


def render(peer: PeerFile) -> str:
    """Return a peer file's content."""
    pems = ",\n".join(f'"""\n{pem.strip()}\n"""' for pem in peer.certificates)
    classes = ", ".join(toml_string(uid) for uid in peer.private_sop_classes)
    return (
        "# A peer of Strongroom: who may associate under this calling AE title. A running gate takes changes up.\n"
        f"ae_title = {toml_string(peer.ae_title)}\n"
        f"description = {toml_string(peer.description)}\n\n"
        "# Private SOP classes that it may store besides the standard storage classes.\n"
        f"private_sop_classes = [{classes}]\n\n"
        "# The connection must prove that it holds the key of one of these certificates.\n"
        f"certificates = [{pems}]\n"
    )


def _raw(title: str) -> bytes:
    return title.strip(" ").encode("ascii")
