"""The keyring: the versions' roots and the store's lasting secrets, one file, replaced atomically.

Source: docs/format.md, section 4.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from keys import encoding, slots
from keys.anchors import GRADES, AnchorError, Anchors, AnchorSet, Grade, TokenAnchors
from keys.seal import SealError, context, open_sealed, seal, u32, u64
from keys.shares import RecoveryKey
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


class VersionRecord(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A version as the keyring holds it; ``root`` is sealed under its anchor.

    ``former``: anchors that the root had before (the store was rebuilt) and that are not proved to be destroyed. Left
    out where there is none: only a keyring that has one is refused by a release that does not know of them.
    """

    anchor: AnchorReference
    created: str
    root: bytes
    state: str
    version: int
    former: list[AnchorReference] = msgspec.field(default_factory=list)


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
    recovery: list[RecoveryKey] = msgspec.field(default_factory=list)


class Keyring:
    """An unlocked keyring."""

    def __init__(self, header: Header, body: Body, root_key: bytearray, anchors: Anchors | AnchorSet) -> None:
        self.header = header
        self.body = body
        self.store_id = bytes.fromhex(header.store_id)
        self._root_key = root_key
        self._anchors = anchors if isinstance(anchors, AnchorSet) else AnchorSet(anchors)
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
            UnknownVersionError: The keyring has none of this number, or it was destroyed.
            KeyringError: Its root does not open.
            AnchorError: Its anchor is not here.
        """
        if number not in self._versions:
            record = self._record(number)
            if record.state == "destroyed":
                raise UnknownVersionError(f"key version {number} was destroyed: nothing opens what was under it")
            key = self._anchors.of(record.anchor.provider).key(record.anchor.id, self.store_id, number)
            try:
                root = open_sealed(record.root, key, context("version-root", self.store_id, u32(number)))
            except SealError:
                raise KeyringError(f"the root of key version {number} does not open under its anchor") from None
            finally:
                _zero(key)
            self._versions[number] = Version(self.store_id, number, root)
        return self._versions[number]

    def open_versions(self) -> dict[int, Exception]:
        """Open every version that is not destroyed, so that no anchor is needed until the next is made.

        Returns:
            By version, why one does not open: KeyringError or AnchorError.
        """
        trouble: dict[int, Exception] = {}
        for record in self.body.versions:
            if record.state != "destroyed":
                try:
                    self.version(record.version)
                except (KeyringError, AnchorError) as error:
                    trouble[record.version] = error
        return trouble

    def check_anchor(self, number: int) -> None:
        """Raise AnchorError where a version's anchor cannot be destroyed now: its token is not here.

        Raises:
            UnknownVersionError: The keyring has none of this number.
        """
        anchor = self._record(number).anchor
        self._anchors.of(anchor.provider).check(anchor.id)

    def grade(self, number: int) -> Grade:
        """Return what destroying a version achieves or achieved, in the words of NIST SP 800-88.

        Raises:
            UnknownVersionError: The keyring has none of this number.
        """
        return GRADES[self._record(number).anchor.provider]

    def add_version(self, created: str) -> Version:
        """Make the next version with a new anchor; it takes effect for others once the keyring is written.

        Raises:
            AnchorError: The anchor cannot be made.
        """
        number = max((record.version for record in self.body.versions), default=0) + 1
        anchors = self._anchors.first
        try:
            made = anchors.create(number)
        except FileExistsError:
            if number == 1:
                raise
            # A crash left it, before the keyring that would have named it was written: nothing hangs on it.
            anchors.destroy(f"anchor-{number}")
            made = anchors.create(number)
        root = new_key()
        key = anchors.key(made.id, self.store_id, number)
        sealed = seal(root, key, context("version-root", self.store_id, u32(number)))
        _zero(key)
        reference = AnchorReference(made.id, made.provider)
        for record in self.body.versions:
            if record.state == "current":
                record.state = "old"
        self.body.versions.append(VersionRecord(reference, created, sealed, "current", number))
        self._versions[number] = Version(self.store_id, number, root)
        _zero(root)
        return self._versions[number]

    def destroy_version(self, number: int) -> None:
        """Destroy the anchor of an old version: at once, and for good. The keyring is to be written after it.

        Former anchors go, too, where their token is here; what is left of them stays in the keyring. A version whose
        anchor is destroyed already is no error, so that it can be repeated after a crash.

        Raises:
            UnknownVersionError: The keyring has none of this number.
            KeyringError: It is the current one.
            AnchorError: The anchor is not here, or is not proved to be gone; nothing was changed in the keyring.
        """
        record = self._record(number)
        if number == max(r.version for r in self.body.versions):
            raise KeyringError(f"key version {number} is the current one: rotate first")
        self._anchors.of(record.anchor.provider).destroy(record.anchor.id)
        record.root = b""
        record.state = "destroyed"
        record.former = [anchor for anchor in record.former if not self._is_destroyed(anchor)]
        opened = self._versions.pop(number, None)
        if opened is not None:
            opened.forget()

    def _is_destroyed(self, anchor: AnchorReference) -> bool:
        """Destroy a former anchor, where that can be done and proved here."""
        if anchor.provider not in TokenAnchors.providers:
            # It lay on another machine, or in a folder that was put aside: one of its name here is another.
            return False
        try:
            self._anchors.of(anchor.provider).destroy(anchor.id)
        except AnchorError:
            return False
        return True

    def add_slot(self, secret: slots.Secret, label: str, created: str) -> slots.Slot:
        """Add a slot that was opened once; it takes effect once the keyring is written.

        Raises:
            KeyringError: There is no room for it.
            CredentialError: The credential is not here.
            TokenError: The token is not here, or cannot do what is needed.
        """
        made = slots.make_slot(secret, self._root_key, self.store_id, label=label, created=created)
        self._set_slots([*self.header.slots, made])
        return made

    def remove_slot(self, slot_id: str) -> slots.Slot:
        """Remove a slot and return it; it takes effect once the keyring is written.

        Older copies of the keyring still open with it: it does not answer a secret that leaked together with a backup.

        Raises:
            KeyringError: There is none of this id, or no other slot is left that this release can open.
        """
        removed = next((slot for slot in self.header.slots if slot.id == slot_id), None)
        if removed is None:
            raise KeyringError(f"the keyring has no slot {slot_id}")
        self._set_slots([slot for slot in self.header.slots if slot is not removed])
        return removed

    def test_slot(self, secret: slots.Secret) -> slots.Slot:
        """Return the slot that a secret opens.

        Raises:
            UnlockError: None does.
            CredentialError: The credential is not here.
            TokenError: The token is not here or fails, or it is not clear for which token the PIN is.
        """
        slot, root_key = next(slots.opening(self.header.slots, secret, self.store_id))
        same = bytes_eq(bytes(root_key), bytes(self._root_key))
        _zero(root_key)
        if not same:
            raise slots.UnlockError
        return slot

    def reroot(self, secrets: Sequence[slots.Secret], remove: Collection[str] = ()) -> None:
        """Put a new root key under all slots; it takes effect once the keyring is written, and then as a whole.

        Each slot gets a new id and parameters: with the old ones, a slot key that leaked would open the new one, too.

        Args:
            secrets: They must open every slot that stays.
            remove: Ids of the slots that are removed instead.

        Raises:
            UnlockError: One of the secrets opens no slot.
            KeyringError: The secret of a slot is missing, an id is not a slot's, or no slot would be left.
            CredentialError: A credential is not here.
            TokenError: A token is not here or fails. In each case nothing was changed.
        """
        unknown = set(remove) - {slot.id for slot in self.header.slots}
        if unknown:
            raise KeyringError(f"the keyring has no slot {min(unknown)}")
        left = [slot for slot in self.header.slots if slot.id not in remove]
        opened_by = self._opened_by(secrets)
        missing = [f"{slot.label!r} ({slot.type}, {slot.id})" for slot in left if slot.id not in opened_by]
        if missing:
            raise KeyringError(
                "a new root key needs the secret of every slot that stays; give or remove: " + ", ".join(missing)
            )
        root_key = new_key()
        try:
            self._set_slots([slots.renew_slot(slot, opened_by[slot.id], root_key, self.store_id) for slot in left])
            self._root_key[:] = root_key
        finally:
            _zero(root_key)

    def _opened_by(self, secrets: Sequence[slots.Secret]) -> dict[str, slots.Secret]:
        found = {}
        for secret in secrets:
            for slot, root_key in slots.opening(self.header.slots, secret, self.store_id):
                if bytes_eq(bytes(root_key), bytes(self._root_key)):
                    found[slot.id] = secret
                _zero(root_key)
        return found

    def _set_slots(self, new: list[slots.Slot]) -> None:
        if not any(slots.is_known(slot) for slot in new):
            raise KeyringError("the last slot cannot be removed: nothing would open the store; add another one first")
        header = msgspec.structs.replace(self.header, slots=new)
        # The generation grows, in decimal digits.
        if len(encoding.canonical(header)) > _HEADER_LIMIT - 20:
            raise KeyringError("the keyring has no room for another slot: remove one, or take a shorter label")
        self.header.slots = new

    def _record(self, number: int) -> VersionRecord:
        record = next((r for r in self.body.versions if r.version == number), None)
        if record is None:
            raise UnknownVersionError(f"the keyring has no key version {number}")
        return record

    def kept(self) -> tuple[list[slots.Slot], int, bytearray]:
        """Return slots, generation and root key as they are, for ``restore`` when a change cannot be written."""
        return list(self.header.slots), self.header.generation, bytearray(self._root_key)

    def restore(self, before: tuple[list[slots.Slot], int, bytearray]) -> None:
        """Go back to what ``kept`` returned: the file was not replaced, and memory must say the same."""
        self.header.slots, self.header.generation = before[0], before[1]
        self._root_key[:] = before[2]
        _zero(before[2])

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
        _zero(self._root_key)


def new_keyring(
    secrets_and_labels: list[tuple[slots.Secret, str]], anchors: Anchors | AnchorSet, created: str
) -> Keyring:
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


def unlock(path: Path, secret: slots.Secret, anchors: Anchors | AnchorSet, *, older: bool = False) -> Keyring:
    """Open a keyring file; one of an older format only where ``older`` says so, to upgrade it.

    Raises:
        UnlockError: No slot opens with this secret.
        KeyringError: The file is damaged, or older than one seen before.
        AnchorError: The anchors folder is missing or another store's.
        CredentialError: The credential is not here.
        TokenError: The token is not here or fails, or it is not clear for which token the PIN is.
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


def opened_root(ring: Keyring, number: int) -> bytes:
    """Return V_v of a version, for a recovery export; raises what ``Keyring.version`` raises."""
    return bytes(ring.version(number)._root)


def _zero(key: bytearray) -> None:
    key[:] = bytes(len(key))
