"""Peers: who may associate, and for what. One file a peer in ``peers.d``, and the pure decision about a request."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import tomllib
import urllib.parse
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from storage.attributes import is_uid
from storescp.config import convert, is_ae_title, network, toml_string

OPERATIONS = ("echo", "store", "commit", "find", "move", "get")
ROLES = ("reader", "sender", "admin")
_DEFAULT_OPERATIONS = ["echo", "store"]
_PRINT = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_NAME = re.compile(r"(dns|ip|uri|email):[\x21-\x7e]{1,255}", re.ASCII)
_MODALITY = re.compile(r"[A-Z0-9_ ]{1,16}", re.ASCII)
_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})", re.ASCII)
_LIMITS = {"maximum_associations": 10_000, "objects_per_minute": 1_000_000, "bytes_per_day": 1 << 50}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class PeerError(ValueError):
    """A peer file is malformed; the message names file and key."""


class PeerFile(msgspec.Struct, kw_only=True):
    """What a peer file holds."""

    ae_title: str
    description: str = ""
    certificates: list[str] = msgspec.field(default_factory=list)
    keys: list[str] = msgspec.field(default_factory=list)
    names: list[str] = msgspec.field(default_factory=list)
    authority: str = ""
    plaintext: bool = False
    addresses: list[str] = msgspec.field(default_factory=list)
    operations: list[str] = msgspec.field(default_factory=lambda: list(_DEFAULT_OPERATIONS))
    sop_classes: list[str] = msgspec.field(default_factory=list)
    private_sop_classes: list[str] = msgspec.field(default_factory=list)
    roles: list[str] = msgspec.field(default_factory=list)
    sees_ae_titles: list[str] = msgspec.field(default_factory=list)
    sees_modalities: list[str] = msgspec.field(default_factory=list)
    listens: str = ""
    listens_plaintext: bool = False
    maximum_associations: int = 0
    objects_per_minute: int = 0
    bytes_per_day: int = 0


EXPLAINED = {
    "ae_title": "The calling AE title, compared byte for byte.",
    "description": "Who or what this is.",
    "certificates": "The connection must prove that it holds the key of one of these certificates, PEM. Each is\n"
    "trusted for itself, whoever issued it.",
    "keys": "Or a key by its fingerprint, 'sha256:' and 64 hex digits over its SubjectPublicKeyInfo; its certificate\n"
    "must come from an authority in gate.trust.",
    "names": "Or a name in its certificate, 'dns:ct1.example', 'ip:', 'uri:' or 'email:', where the authority with\n"
    "the fingerprint below issued it. The authority's certificate must be in gate.trust.",
    "authority": "",
    "plaintext": "It may also come without TLS, through a listener of gate.plaintext that names it.",
    "addresses": 'Where it may come from, as "10.1.2.3" or "10.1.2.0/24"; empty for everywhere.',
    "operations": "What it may do: echo, store, commit, find, move, get. What this release does not serve is refused.",
    "sop_classes": "Storage SOP classes that it may store, as UIDs; empty for all of the standard.",
    "private_sop_classes": "Private SOP classes that it may store besides.",
    "roles": "What its certificate may do by DICOMweb: reader (find and fetch), sender (store), admin (both, and sees\n"
    "everything).",
    "sees_ae_titles": "Which instances it finds and fetches: those that came from these calling AE titles,",
    "sees_modalities": "and are of series of these modalities; empty for all of the store.",
    "listens": "Where it listens itself, 'host:port': what is moved to it and reports of storage commitment go there,\n"
    "over TLS,",
    "listens_plaintext": "or without, where that is true.",
    "maximum_associations": "Limits over all workers, 0 for none: associations at a time,",
    "objects_per_minute": "objects a minute (a faster peer is slowed down),",
    "bytes_per_day": "and bytes from one midnight UTC to the next (more is refused with A700).",
}


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer, checked. Fingerprints are SHA-256 of the certificates in DER, hex."""

    ae_title: str
    description: str
    certificates: tuple[str, ...]
    fingerprints: frozenset[str]
    keys: frozenset[str]
    names: frozenset[str]
    authority: str
    plaintext: bool
    networks: tuple[Network, ...]
    operations: frozenset[str]
    sop_classes: frozenset[str]
    private_sop_classes: frozenset[str]
    roles: frozenset[str]
    sees_ae_titles: frozenset[str]
    sees_modalities: frozenset[str]
    listens: tuple[str, int] | None
    listens_plaintext: bool
    maximum_associations: int
    objects_per_minute: int
    bytes_per_day: int
    file: Path

    def holds(self, proof: Proof) -> bool:
        """Tell whether a connection proved to be this peer."""
        if proof.fingerprint in self.fingerprints or proof.key in self.keys:
            return True
        return self.authority in proof.authorities and not self.names.isdisjoint(proof.names)


class Proof(msgspec.Struct, frozen=True):
    """What a connection proved in its handshake.

    ``fingerprint`` and ``key`` are SHA-256 of the certificate and of its SubjectPublicKeyInfo (``sha256:`` and hex);
    ``names`` its alternative names; ``authorities`` the keys above it, where the chain ends in ``gate.trust``.
    """

    fingerprint: str
    key: str = ""
    names: frozenset[str] = frozenset()
    authorities: frozenset[str] = frozenset()


class Asked(msgspec.Struct, frozen=True):
    """An association request: AE titles as the 16 bytes of the request, the peer's address, and what it proved.

    Without TLS it proved nothing, and ``plaintext`` names the peers that its listener is for.
    """

    calling: bytes
    called: bytes
    address: str
    proof: Proof | None
    plaintext: frozenset[str] = frozenset()


class Peers(msgspec.Struct, frozen=True):
    """All peers, by AE title; changes make a new value."""

    by_title: dict[str, Peer]

    def decide(self, asked: Asked, own_title: str) -> Peer | str:
        """Decide about an association request.

        Args:
            asked: The request.
            own_title: The gate's AE title.

        Returns:
            The peer, or a reason for the log. Titles are compared byte by byte, without their padding.
        """
        peer = next((p for p in self.by_title.values() if _raw(p.ae_title) == asked.calling.strip(b" ")), None)
        if peer is None:
            return "no peer has this calling AE title"
        if asked.proof is not None:
            if not peer.holds(asked.proof):
                return "the certificate is not one of the peer with this calling AE title"
        elif not peer.plaintext or peer.ae_title not in asked.plaintext:
            return "the peer with this calling AE title may not come without TLS through this listener"
        if peer.networks and not any(ipaddress.ip_address(asked.address) in net for net in peer.networks):
            return "the peer with this calling AE title may not come from this address"
        if asked.called.strip(b" ") != _raw(own_title):
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


def load(content: str, file: Path) -> PeerFile:
    """Return what a peer file's content says, unchecked beyond its keys and types.

    Raises:
        PeerError: It is malformed.
    """
    try:
        document = tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"{file}: {error}") from error
    parsed, errors = convert(document, PeerFile)
    if not isinstance(parsed, PeerFile):
        raise PeerError("\n".join(f"{file}: {e}" for e in errors))
    return parsed


def parse(content: str, file: Path) -> Peer:
    """Return the peer in a peer file's content.

    Raises:
        PeerError: It is malformed.
    """
    parsed = load(content, file)
    errors = _faults(parsed)
    try:
        prints = frozenset(fingerprint(pem) for pem in parsed.certificates)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        errors.append(f"certificates: {error}")
    if errors:
        raise PeerError("\n".join(f"{file}: {e}" for e in errors))
    return Peer(
        ae_title=parsed.ae_title.strip(" "),
        description=parsed.description,
        certificates=tuple(parsed.certificates),
        fingerprints=prints,
        keys=frozenset(parsed.keys),
        names=frozenset(_normal(name) for name in parsed.names),
        authority=parsed.authority,
        plaintext=parsed.plaintext,
        networks=tuple(network(text) for text in parsed.addresses),
        operations=frozenset(parsed.operations),
        sop_classes=frozenset(parsed.sop_classes),
        private_sop_classes=frozenset(parsed.private_sop_classes),
        roles=frozenset(parsed.roles),
        sees_ae_titles=frozenset(title.strip(" ") for title in parsed.sees_ae_titles),
        sees_modalities=frozenset(parsed.sees_modalities),
        listens=_place(parsed.listens) if parsed.listens else None,
        listens_plaintext=parsed.listens_plaintext,
        maximum_associations=parsed.maximum_associations,
        objects_per_minute=parsed.objects_per_minute,
        bytes_per_day=parsed.bytes_per_day,
        file=file,
    )


def _faults(parsed: PeerFile) -> list[str]:
    errors = []
    if not is_ae_title(parsed.ae_title):
        errors.append("ae_title: must be 1 to 16 characters, ASCII, no backslash")
    for key in ("sop_classes", "private_sop_classes"):
        errors += [f"{key}: '{uid}' is no UID" for uid in getattr(parsed, key) if not is_uid(uid)]
    if not (parsed.certificates or parsed.keys or parsed.names or parsed.plaintext):
        errors.append("certificates: a peer needs one (or keys, or names with their authority, or plaintext = true)")
    prints = [("keys", key) for key in parsed.keys]
    prints += [("authority", parsed.authority)] if parsed.authority or parsed.names else []
    errors += [
        f"{key}: '{text}' is not 'sha256:' and 64 hex digits" for key, text in prints if not _PRINT.fullmatch(text)
    ]
    errors += [
        f"names: '{name}' is no name, as in 'dns:ct1.example'" for name in parsed.names if not _NAME.fullmatch(name)
    ]
    for text in parsed.addresses:
        try:
            network(text)
        except ValueError:
            errors.append(f"addresses: '{text}' is no address or network, as in 10.1.2.3, 10.1.2.0/24 or fd00::/8")
    errors += [
        f"operations: '{o}' is none of {', '.join(OPERATIONS)}" for o in parsed.operations if o not in OPERATIONS
    ]
    errors += [f"roles: '{role}' is none of {', '.join(ROLES)}" for role in parsed.roles if role not in ROLES]
    errors += [f"sees_ae_titles: '{title}' is no AE title" for title in parsed.sees_ae_titles if not is_ae_title(title)]
    errors += [f"sees_modalities: '{m}' is no modality" for m in parsed.sees_modalities if not _MODALITY.fullmatch(m)]
    try:
        if parsed.listens:
            _place(parsed.listens)
    except ValueError:
        errors.append(f"listens: '{parsed.listens}' is no place, as in ct1.example:104 or [fd00::1]:2762")
    for key, most in _LIMITS.items():
        if not 0 <= getattr(parsed, key) <= most:
            errors.append(f"{key}: must be from 0 (no limit) to {most}")
    return errors


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


def digests(folder: Path) -> dict[str, str]:
    """Return SHA-256 of each peer file, hex, by name: what the audit chain knows a change by."""
    found = {}
    for file in sorted(folder.glob("*.toml")):
        with contextlib.suppress(OSError):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def fingerprint(pem: str) -> str:
    """Return SHA-256 of a certificate's DER, hex.

    Raises:
        ValueError: It is no certificate in PEM.
    """
    return x509.load_pem_x509_certificate(pem.encode()).fingerprint(hashes.SHA256()).hex()


def key_print(certificate: x509.Certificate) -> str:
    """Return ``sha256:`` and SHA-256 of a certificate's SubjectPublicKeyInfo, hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return f"sha256:{digest.finalize().hex()}"


def alternative_names(certificate: x509.Certificate) -> frozenset[str]:
    """Return a certificate's alternative names as peer files write them, DNS names in lower case."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        return frozenset()
    names = set()
    for entry in extension.value:
        match entry:
            case x509.DNSName():
                names.add(f"dns:{entry.value.lower()}")
            case x509.IPAddress():
                names.add(f"ip:{entry.value}")
            case x509.UniformResourceIdentifier():
                names.add(f"uri:{entry.value}")
            case x509.RFC822Name():
                names.add(f"email:{entry.value}")
    return frozenset(names)


def _place(text: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        ValueError: It is no host with a port.
    """
    found = _PLACE.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65_536:
        raise ValueError("no host with a port")
    return found[1].strip("[]"), int(found[2])


def _is_name(name: str) -> bool:
    try:
        return bool(_NAME.fullmatch(name)) and (
            not name.startswith("ip:") or ipaddress.ip_address(name[3:]) is not None
        )
    except ValueError:
        return False


def _normal(name: str) -> str:
    """Return a name as ``alternative_names`` has it."""
    kind, _, value = name.partition(":")
    if kind == "ip":
        with contextlib.suppress(ValueError):
            return f"ip:{ipaddress.ip_address(value)}"
    return f"{kind}:{value.lower()}" if kind == "dns" else name


def file_name(ae_title: str) -> str:
    """Return a peer's file name: an AE title may hold characters that a name may not."""
    return urllib.parse.quote(ae_title, safe="") + ".toml"


def render(peer: PeerFile) -> str:
    """Return a peer file's content, every key explained."""
    lines = ["# A peer of Strongroom: who may associate under this calling AE title. A running gate takes changes up."]
    for field in msgspec.structs.fields(PeerFile):
        lines += ["", *(f"# {line}" for line in EXPLAINED[field.name].split("\n") if line)]
        lines.append(f"{field.name} = {_toml(field.name, getattr(peer, field.name))}")
    return "\n".join(lines) + "\n"


def _toml(name: str, value: object) -> str:
    if name == "certificates" and isinstance(value, list):
        return "[" + ",\n".join(f'"""\n{pem.strip()}\n"""' for pem in value) + "]"
    if isinstance(value, list):
        return "[" + ", ".join(toml_string(text) for text in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return toml_string(value) if isinstance(value, str) else str(value)


def _raw(title: str) -> bytes:
    return title.strip(" ").encode("ascii")
