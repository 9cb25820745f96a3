"""The keyring: the versions' roots and the store's lasting secrets, one file, replaced atomically.

Source: docs/format.md, section 4.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from keys import encoding, slots
from keys.anchors import Anchors
from keys.seal import SealError, context, open_sealed, seal, u32, u64
from keys.versions import Version, new_key, store_id_of

MAGIC = b"\x89SRK\r\n\x1a\n"
FORMAT = 1
_HEADER_LIMIT = 65_536
_BODY_LIMIT = 1 << 20


class KeyringError(Exception):
    """A keyring is missing, damaged, of a newer format, or older than one seen before."""


class UnknownVersionError(KeyringError):
    """The keyring has no key version of this number."""


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The part of a keyring that can be read while locked."""

    created: str
    format: int
    generation: int
    signing_key: bytes
    slots: list[slots.Slot]
    store_id: str


class AnchorReference(msgspec.Struct, forbid_unknown_fields=True):
    """Where the anchor of a version is."""

    id: str
    provider: str


class VersionRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A version as the keyring holds it; ``root`` is sealed under its anchor."""

    anchor: AnchorReference
    created: str
    root: bytes
    state: str
    version: int


class Authority(msgspec.Struct, forbid_unknown_fields=True):
    """The store's own certificate authority: certificate in PEM, key in PKCS #8 DER."""

    certificate: str
    key: bytes


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """The sealed part."""

    audit_key: bytes
    authority: Authority | None
    signing_seed: bytes
    tag_key: bytes
    versions: list[VersionRecord]


class Keyring:
    """An unlocked keyring."""

    def __init__(self, header: Header, body: Body, root_key: bytearray, anchors: Anchors) -> None:
        self.header = header
        self.body = body
        self.store_id = bytes.fromhex(header.store_id)
        self._root_key = root_key
        self._anchors = anchors
        self._versions: dict[int, Version] = {}

    @property
    def signing(self) -> Ed25519PrivateKey:
        """The store's signing key."""
        return Ed25519PrivateKey.from_private_bytes(self.body.signing_seed)

    def current(self) -> Version:
        """Return the version that new deposits and records use."""
        return self.version(max(record.version for record in self.body.versions))

    def version(self, number: int) -> Version:
        """Return an opened version.

        Raises:
            UnknownVersionError: The keyring has none of this number.
            KeyringError: Its root does not open.
            AnchorError: Its anchor is not here.
        """
        if number not in self._versions:
            record = next((r for r in self.body.versions if r.version == number), None)
            if record is None:
                raise UnknownVersionError(f"the keyring has no key version {number}")
            key = self._anchors.key(record.anchor.id, self.store_id, number)
            try:
                root = open_sealed(record.root, key, context("version-root", self.store_id, u32(number)))
            except SealError:
                raise KeyringError(f"the root of key version {number} does not open under its anchor") from None
            self._versions[number] = Version(self.store_id, number, root)
        return self._versions[number]

    def add_version(self, created: str) -> Version:
        """Make the next version with a new anchor; it takes effect for others once the keyring is written."""
        number = max((record.version for record in self.body.versions), default=0) + 1
        anchor_id = self._anchors.create(number)
        root = new_key()
        key = self._anchors.key(anchor_id, self.store_id, number)
        sealed = seal(root, key, context("version-root", self.store_id, u32(number)))
        reference = AnchorReference(anchor_id, self._anchors.provider)
        for record in self.body.versions:
            record.state = "old"
        self.body.versions.append(VersionRecord(reference, created, sealed, "current", number))
        self._versions[number] = Version(self.store_id, number, root)
        return self._versions[number]

    def encode(self) -> bytes:
        """Return the file's content."""
        header = encoding.canonical(self.header)
        body = seal(encoding.canonical(self.body), self._root_key, _bound_to(self.header, header))
        return MAGIC + u32(len(header)) + header + body

    def write(self, path: Path) -> None:
        """Replace the keyring file by this one with the next generation, durably."""
        self.header.generation += 1
        encoding.replace(path, self.encode())
        # After the file, never before: a crash in between must not make the newest keyring look like an old one.
        self._anchors.set_generation(self.store_id, self.header.generation)

    def forget(self) -> None:
        """Zero what can be zeroed."""
        for version in self._versions.values():
            version.forget()
        self._versions.clear()
        self._root_key[:] = bytes(len(self._root_key))


def new_keyring(secrets_and_labels: list[tuple[slots.Secret, str]], anchors: Anchors, created: str) -> Keyring:
    """Return a keyring for a new store: lasting secrets, version 1 and a slot for each secret. Not yet written."""
    seed = bytes(new_key())
    signing_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    store_id = store_id_of(signing_key)
    root_key = new_key()
    made = [
        slots.make_slot(secret, root_key, store_id, label=label, created=created)
        for secret, label in secrets_and_labels
    ]
    header = Header(created, FORMAT, 0, signing_key, made, store_id.hex())
    keyring = Keyring(header, Body(bytes(new_key()), None, seed, bytes(new_key()), []), root_key, anchors)
    keyring.add_version(created)
    return keyring


def parse(content: bytes) -> tuple[Header, bytes, bytes]:
    """Split a keyring file.

    Returns:
        The header, its bytes, the sealed body.

    Raises:
        KeyringError: The file is damaged or of a newer format.
    """
    if content[:8] != MAGIC or len(content) < 12:
        raise KeyringError("the keyring file is damaged or not a keyring")
    length = int.from_bytes(content[8:12], "big")
    if length > _HEADER_LIMIT or 12 + length > len(content) or len(content) > 12 + length + _BODY_LIMIT:
        raise KeyringError("the keyring file is damaged or cut short")
    raw = content[12 : 12 + length]
    try:
        number = encoding.decode(raw, dict)["format"]
        if isinstance(number, int) and number > FORMAT:
            raise KeyringError(f"the store has format {number}; this release knows {FORMAT}: install a newer release")
        header = encoding.decode(raw, Header)
        ids = [bytes.fromhex(text) for text in (header.store_id, *(slot.id for slot in header.slots))]
        if ids[0] != store_id_of(header.signing_key) or header.store_id != ids[0].hex():
            raise ValueError
        if any(len(i) != 16 for i in ids) or not 0 <= header.generation < 1 << 63 or header.format < 0:
            raise ValueError
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError):
        raise KeyringError("the keyring's header is damaged") from None
    return header, raw, content[12 + length :]


def read_header(path: Path) -> Header:
    """Return what a keyring file says in clear.

    Raises:
        KeyringError: It cannot be read or is damaged.
    """
    return parse(_read(path))[0]


def unlock(path: Path, secret: slots.Secret, anchors: Anchors, *, older: bool = False) -> Keyring:
    """Open a keyring file; one of an older format only where ``older`` says so, to upgrade it.

    Raises:
        UnlockError: No slot opens with this secret.
        KeyringError: The file is damaged, or older than one seen before.
        AnchorError: The anchors folder is missing or another store's.
    """
    header, raw, sealed = parse(_read(path))
    if header.format < FORMAT and not older:
        raise KeyringError(
            f"the store has format {header.format}, this release needs {FORMAT}: back it up, then 'strongroom upgrade'"
        )
    store_id = bytes.fromhex(header.store_id)
    root_key = slots.unlock(header.slots, secret, store_id)
    try:
        body = encoding.decode(open_sealed(sealed, root_key, _bound_to(header, raw)), Body)
    except (SealError, msgspec.MsgspecError, RecursionError):
        raise KeyringError("the keyring's body does not open: the file was changed or is damaged") from None
    seen = anchors.generation(store_id)
    if header.generation < seen:
        raise KeyringError(
            f"the keyring is generation {header.generation}, but generation {seen} was in use: an old copy was put back"
        )
    if header.generation > seen:
        anchors.set_generation(store_id, header.generation)
    return Keyring(header, body, root_key, anchors)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(12 + _HEADER_LIMIT + _BODY_LIMIT + 1)
    except OSError as error:
        raise KeyringError(f"the keyring {path} cannot be read: {error.strerror}") from error


def _bound_to(header: Header, raw: bytes) -> bytes:
    digest = Hash(SHA256())
    digest.update(raw)
    return context("keyring", bytes.fromhex(header.store_id), u64(header.generation), digest.finalize())
