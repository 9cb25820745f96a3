"""The recovery export: what rebuilds the keyring on another machine, sealed to the recovery key.

Anchors are in no backup, so without an export one dead disk kills the store. Who makes one needs no secret of the
recovery key; who opens it needs the shares and nothing else.
Source: docs/format.md, "Recovery exports".
"""

from __future__ import annotations

import secrets

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from keys import encoding, keyring, slots
from keys.anchors import AnchorError, Anchors, AnchorSet
from keys.keyring import AnchorReference, Authority, Body, Header, Keyring, KeyringError, VersionRecord
from keys.seal import KEY_BYTES, Key, SealError, context, open_sealed, seal, u32, u64
from keys.shares import RecoveryError, RecoveryKey, opened
from keys.versions import WRAPPED_BYTES, new_key, store_id_of

MAGIC = b"\x89SRE\r\n\x1a\n"
FORMAT = 1
DESTROYED = "destroyed"
_SIGNATURE_BYTES = 64
_HEADER_LIMIT = 65_536
_SEALED_LIMIT = 1 << 20
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class ExportHeader(msgspec.Struct, forbid_unknown_fields=True):
    """What an export says in clear, signed by the store; ``length`` and ``digest`` are of all that follows it."""

    created: str
    digest: bytes
    export_id: str
    format: int
    generation: int
    length: int
    recovery_id: str
    signing_key: bytes
    store_id: str
    versions: list[int]


class ContainedVersion(msgspec.Struct, forbid_unknown_fields=True):
    """A version with its root opened: empty where it was destroyed.

    ``anchors``: all that the root ever had and that are not proved to be destroyed, and its last one last.
    """

    anchors: list[AnchorReference]
    created: str
    root: bytes
    state: str
    version: int


class Contents(msgspec.Struct, forbid_unknown_fields=True):
    """What an export holds, sealed: everything of a keyring but its slots. ``recovery``: what it was sealed to."""

    audit_key: bytes
    authority: Authority | None
    generation: int
    recovery: RecoveryKey
    signing_seed: bytes
    store_id: str
    tag_key: bytes
    versions: list[ContainedVersion]


def export(ring: Keyring, recovery: RecoveryKey, created: str) -> bytes:
    """Return a recovery export of an unlocked keyring.

    Args:
        ring: The keyring.
        recovery: The recovery key's public half.
        created: The time, RFC 3339.

    Raises:
        RecoveryError: The recovery key is another store's or damaged, or a version does not open.
    """
    if recovery.store_id != ring.header.store_id:
        raise RecoveryError(f"the recovery key {recovery.id} is that of another store")
    contents = Contents(
        audit_key=ring.body.audit_key,
        authority=ring.body.authority,
        generation=ring.header.generation,
        recovery=recovery,
        signing_seed=ring.body.signing_seed,
        store_id=ring.header.store_id,
        tag_key=ring.body.tag_key,
        versions=[_contained(ring, record) for record in ring.body.versions],
    )
    header = ExportHeader(
        created=created,
        digest=b"",
        export_id=secrets.token_hex(16),
        format=FORMAT,
        generation=contents.generation,
        length=0,
        recovery_id=recovery.id,
        signing_key=ring.header.signing_key,
        store_id=contents.store_id,
        versions=[version.version for version in contents.versions if version.root],
    )
    key = new_key()
    follows = _SUITE.encrypt(key, recovery.public(), info=_context("recovery-key", header))
    follows += seal(encoding.canonical(contents), key, _context("recovery-export", header))
    key[:] = bytes(len(key))
    header.digest, header.length = _digest(follows), len(follows)
    raw = encoding.canonical(header)
    return MAGIC + u32(len(raw)) + raw + ring.signing.sign(context("recovery-header") + raw) + follows


def read_header(content: bytes, signing_key: bytes) -> ExportHeader:
    """Return the header of a whole, unchanged export of a store; the recovery key is not needed.

    Args:
        content: The export.
        signing_key: The store's raw Ed25519 public key, 32 bytes, pinned by the reader.

    Raises:
        RecoveryError: It is no export, was changed or cut, is another store's or of a newer format.
    """
    return _split(content, signing_key)[0]


def open_export(content: bytes, secret: Key, signing_key: bytes | None = None) -> Contents:
    """Return what an export holds.

    Args:
        content: The export.
        secret: What the shares combine to, 32 bytes.
        signing_key: The store's public key where it is known. Without it the export still proves itself: the recovery
            key that a secret gives depends on the store id, so nobody without the shares can make an export that
            they open under a signing key of his own.

    Raises:
        RecoveryError: As for ``read_header``; or the shares are those of another recovery key or store.
    """
    header, follows = _split(content, signing_key)
    recovery_id, private = opened(secret, bytes.fromhex(header.store_id))
    if recovery_id != header.recovery_id:
        raise RecoveryError(
            f"these shares do not open this export: it was sealed to the recovery key {header.recovery_id} of the "
            f"store {header.store_id}; they are another key's or store's, or were made with another passphrase"
        )
    try:
        key = _SUITE.decrypt(follows[:WRAPPED_BYTES], private, info=_context("recovery-key", header))
        plain = open_sealed(follows[WRAPPED_BYTES:], key, _context("recovery-export", header))
        contents = encoding.decode(plain, Contents)
        _check(contents, header)
    except (InvalidTag, SealError, msgspec.MsgspecError, ValueError, RecursionError):
        raise RecoveryError("what the recovery export holds does not open: it is damaged; try another copy") from None
    return contents


def rebuild(
    contents: Contents,
    secrets_and_labels: list[tuple[slots.Secret, str]],
    anchors: Anchors | AnchorSet,
    created: str,
) -> Keyring:
    """Return a keyring for another machine: the same store and versions, new anchors and slots. Not yet written.

    Writing it gives it the generation one above the export's. The anchors are made now, so a folder of anchor
    files must have none of these versions. What anchors the roots had before, the keyring names as ``former``: whoever
    has one of them and a keyring of that time opens the version, whatever becomes of its new anchor.

    Raises:
        RecoveryError: No secret was given, or an anchor cannot be made.
    """
    if not secrets_and_labels:
        raise RecoveryError("a keyring that nothing unlocks is of no use: give at least one secret")
    store_id = bytes.fromhex(contents.store_id)
    first = anchors.first if isinstance(anchors, AnchorSet) else anchors
    root_key = new_key()
    made = [
        slots.make_slot(secret, root_key, store_id, label=label, created=created)
        for secret, label in secrets_and_labels
    ]
    body = Body(
        audit_key=contents.audit_key,
        authority=contents.authority,
        signing_seed=contents.signing_seed,
        tag_key=contents.tag_key,
        versions=[_sealed_anew(version, store_id, first) for version in contents.versions],
        # Its shares are there: the next export needs nobody.
        recovery=[contents.recovery],
    )
    header = Header(
        created=created,
        format=keyring.FORMAT,
        generation=contents.generation,
        signing_key=_public(contents.signing_seed),
        slots=made,
        store_id=contents.store_id,
    )
    return Keyring(header, body, root_key, anchors)


def _contained(ring: Keyring, record: VersionRecord) -> ContainedVersion:
    root = b""
    if record.state != DESTROYED:
        try:
            root = keyring.opened_root(ring, record.version)
        except (KeyringError, AnchorError) as error:
            # An export without it would look like one that rebuilds the store.
            raise RecoveryError(f"key version {record.version} cannot be exported: {error}") from None
    return ContainedVersion([*record.former, record.anchor], record.created, root, record.state, record.version)


def _sealed_anew(version: ContainedVersion, store_id: bytes, anchors: Anchors) -> VersionRecord:
    number = version.version
    if not version.root:
        return VersionRecord(version.anchors[-1], version.created, b"", version.state, number, version.anchors[:-1])
    try:
        made = anchors.create(number)
        key = anchors.key(made.id, store_id, number)
    except FileExistsError:
        raise RecoveryError(
            f"there is an anchor of version {number} here already: rebuild with an empty anchors folder"
        ) from None
    except AnchorError as error:
        raise RecoveryError(str(error)) from None
    except OSError as error:
        raise RecoveryError(f"the anchor of version {number} cannot be made: {error}") from None
    root = seal(version.root, key, context("version-root", store_id, u32(number)))
    key[:] = bytes(len(key))
    anchor = AnchorReference(made.id, made.provider)
    return VersionRecord(anchor, version.created, root, version.state, number, list(version.anchors))


def _split(content: bytes, signing_key: bytes | None) -> tuple[ExportHeader, bytes]:
    if content[:8] != MAGIC or len(content) < 12:
        raise RecoveryError("this is not a recovery export")
    end = 12 + int.from_bytes(content[8:12], "big")
    start = end + _SIGNATURE_BYTES
    if end > 12 + _HEADER_LIMIT or start > len(content) or len(content) > start + WRAPPED_BYTES + _SEALED_LIMIT:
        raise RecoveryError("the recovery export is damaged or cut short")
    raw, signature, follows = content[12:end], content[end:start], content[start:]
    try:
        number = encoding.decode(raw, dict)["format"]
        if isinstance(number, int) and number > FORMAT:
            raise RecoveryError(
                f"the recovery export has format {number}; this release knows {FORMAT}: install a newer release"
            )
        header = encoding.decode(raw, ExportHeader)
        ids = [bytes.fromhex(text) for text in (header.store_id, header.recovery_id, header.export_id)]
        if ids[0] != store_id_of(header.signing_key) or any(len(i) != 16 for i in ids):
            raise ValueError
        if [i.hex() for i in ids] != [header.store_id, header.recovery_id, header.export_id]:
            raise ValueError
        if header.format != FORMAT or not 0 <= header.generation < 1 << 63:
            raise ValueError
        # Before the signature: another store's export says so, rather than that it was changed.
        if signing_key is not None and signing_key != header.signing_key:
            raise RecoveryError(f"the recovery export is that of another store, {header.store_id}")
        Ed25519PublicKey.from_public_bytes(header.signing_key).verify(signature, context("recovery-header") + raw)
    except (InvalidSignature, msgspec.MsgspecError, ValueError, KeyError, RecursionError):
        raise RecoveryError("the recovery export's header was changed or is damaged") from None
    if header.length != len(follows):
        raise RecoveryError(
            f"the recovery export has {len(follows)} bytes behind its header and must have {header.length}: "
            "it was cut short or added to"
        )
    if header.digest != _digest(follows):
        raise RecoveryError("the recovery export was changed or is damaged; try another copy")
    return header, follows


def _check(contents: Contents, header: ExportHeader) -> None:
    """Raise ValueError unless what is sealed is what the header says, and of the right shape."""
    numbers = [version.version for version in contents.versions]
    if (contents.store_id, contents.generation) != (header.store_id, header.generation):
        raise ValueError
    if contents.recovery.id != header.recovery_id or _public(contents.signing_seed) != header.signing_key:
        raise ValueError
    if any(len(key) != KEY_BYTES for key in (contents.audit_key, contents.tag_key)):
        raise ValueError
    if numbers != sorted(set(numbers)) or header.versions != [v.version for v in contents.versions if v.root]:
        raise ValueError
    for version in contents.versions:
        if len(version.root) != (0 if version.state == DESTROYED else KEY_BYTES) or not version.anchors:
            raise ValueError
        if not 0 < version.version < 1 << 32:
            raise ValueError


def _public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def _digest(content: bytes) -> bytes:
    digest = Hash(SHA256())
    digest.update(content)
    return digest.finalize()


def _context(label: str, header: ExportHeader) -> bytes:
    ids = (bytes.fromhex(text) for text in (header.store_id, header.recovery_id, header.export_id))
    return context(label, *ids, u64(header.generation))
