"""The keyring: opens whole with its secret and its anchors, or says in one of three errors why not."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from softhsm import PIN, SoftHsm, attached

from keys import encoding, keyring, slots
from keys.anchors import AnchorError, AnchorSet, FileAnchors, TokenAnchors
from keys.keyring import MAGIC, Authority, Keyring, KeyringError, UnknownVersionError
from keys.seal import context, open_sealed, seal, u32
from keys.slots import Credential, KeyFile, Passphrase, Token, TokenPlace, UnlockError
from keys.token import AttachedToken, TokenError

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
WORDS, FILE = Passphrase("tulip-anvil-marble-quench"), KeyFile(bytes(range(32)))
DOCUMENTED = (KeyringError, UnlockError, AnchorError)
LOCKED = "this does not unlock the store"
HEADER = "the keyring's header is damaged"
BODY = "the keyring's body does not open: the file was changed or is damaged"
NOT_ONE = "the keyring file is damaged or not a keyring"
CUT = "the keyring file is damaged or cut short"


class Store:
    """A keyring and its anchors in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "keyring"
        self.anchors = FileAnchors(folder / "anchors")

    @classmethod
    def new(cls, folder: Path) -> Store:
        made = cls(folder)
        made.anchors.prepare()
        made.keyring = keyring.new_keyring([(WORDS, "words"), (FILE, "file")], made.anchors, "2026-01-31T10:00:00Z")
        made.keyring.write(made.file)
        return made

    keyring: Keyring

    def unlock(self, secret: slots.Secret = FILE) -> Keyring:
        return keyring.unlock(self.file, secret, self.anchors)

    def refused(self, secret: slots.Secret = FILE) -> Exception:
        """Return the error of an unlock that must fail; it changes nothing."""
        before = (self.folder / "anchors" / "generation").read_bytes()
        try:
            self.unlock(secret)
        except DOCUMENTED as error:
            assert (self.folder / "anchors" / "generation").read_bytes() == before
            return error
        raise AssertionError("the keyring opened")


@pytest.fixture(autouse=True, scope="module")
def quick_argon2() -> Iterator[None]:
    """Spend 64 KiB on a passphrase instead of 256 MiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "ARGON2_MEMORY_KIB", 64)
        patch.setattr(slots, "ARGON2_ITERATIONS", 1)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, quick_argon2: None) -> Store:
    return Store.new(tmp_path_factory.mktemp("store"))


@pytest.fixture
def store(original: Store, tmp_path: Path) -> Store:
    """A copy of the store, to be changed."""
    shutil.copytree(original.folder, tmp_path / "copy")
    return Store(tmp_path / "copy")


def secrets_of(opened: Keyring) -> list[object]:
    """Return what an unlocked keyring is for."""
    version = opened.current()
    return [opened.body, opened.header, version.index_key(), version.ledger_key(), opened.signing.private_bytes_raw()]


# --- opening


@pytest.mark.parametrize(
    "secret", [WORDS, FILE, Passphrase("ｔｕｌｉｐ-anvil-marble-quench")], ids=["words", "file", "NFKC"]
)
def test_a_keyring_opens_with_each_of_its_secrets_to_the_same(original: Store, secret: slots.Secret) -> None:
    opened = original.unlock(secret)
    assert secrets_of(opened) == secrets_of(original.keyring)
    assert (opened.header.generation, opened.header.format) == (1, 1)
    assert [slot.label for slot in opened.header.slots] == ["words", "file"]


@pytest.mark.parametrize(
    "secret", [Passphrase(""), Passphrase("Tulip-anvil-marble-quench"), KeyFile(bytes(32))], ids=str
)
def test_a_wrong_secret_gets_one_message_whatever_was_wrong(store: Store, secret: slots.Secret) -> None:
    error = store.refused(secret)
    assert (type(error), str(error)) == (UnlockError, LOCKED)


def test_the_clear_header_is_read_without_a_secret_and_holds_none(original: Store) -> None:
    header = keyring.read_header(original.file)
    assert header == original.keyring.header
    content = original.file.read_bytes()
    body = original.keyring.body
    root = original.keyring.current()._root
    for secret in (body.audit_key, body.tag_key, body.signing_seed, bytes(root), FILE.secret):
        assert secret not in content
        assert base64.b64encode(secret) not in content
    assert original.file.stat().st_mode & 0o777 == 0o600


def test_a_keyring_is_the_bytes_of_the_page_that_describes_it(original: Store) -> None:
    content = original.file.read_bytes()
    assert content[:8] == bytes.fromhex("8953524B0D0A1A0A")
    length = int.from_bytes(content[8:12], "big")
    header = json.loads(content[12 : 12 + length])
    assert (
        content[12 : 12 + length]
        == json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    )
    assert set(header) == {"created", "format", "generation", "signing_key", "slots", "store_id"}


def test_what_is_added_is_there_after_the_next_unlock(store: Store) -> None:
    opened = store.unlock()
    first = opened.current()
    second = opened.add_version("later")
    opened.body.authority = Authority("pem", b"der")
    opened.write(store.file)
    again = store.unlock(WORDS)
    assert again.header.generation == 2
    assert again.body.authority == Authority("pem", b"der")
    assert [(r.version, r.state, r.created) for r in again.body.versions] == [
        (1, "old", "2026-01-31T10:00:00Z"),
        (2, "current", "later"),
    ]
    assert again.current().version == 2
    assert again.current().index_key() == second.index_key() != first.index_key()
    assert again.version(1).index_key() == first.index_key()
    assert not list(store.folder.glob("*.new"))


def test_a_version_that_is_not_there_is_an_error(original: Store) -> None:
    with pytest.raises(KeyringError, match="the keyring has no key version 2"):
        original.unlock().version(2)


def test_what_was_opened_is_zeroed_when_it_is_forgotten(store: Store) -> None:
    opened = store.unlock()
    version = opened.current()
    opened.forget()
    assert not any(opened._root_key)
    assert not any(version._root)
    assert not any(version._storage_key)


# --- changed files


def test_a_keyring_cut_anywhere_does_not_open(store: Store) -> None:
    content = store.file.read_bytes()
    start = 12 + int.from_bytes(content[8:12], "big")
    lengths = {*range(14), start - 1, start, start + 1, start + 55, start + 56, start + 72, len(content) - 1}
    for length in sorted(lengths | set(random.Random(1).sample(range(len(content)), 100))):
        store.file.write_bytes(content[:length])
        error = store.refused()
        assert isinstance(error, KeyringError), length
        assert length < start or str(error) == BODY
    store.file.write_bytes(content + b"\0")
    assert str(store.refused()) == BODY


@pytest.mark.parametrize("secret", [FILE, WORDS], ids=["file", "words"])
def test_a_keyring_with_any_byte_changed_does_not_open(store: Store, secret: slots.Secret) -> None:
    content = store.file.read_bytes()
    chance = random.Random(2)
    offsets = {*range(64), *chance.sample(range(len(content)), 300)}
    for offset in sorted(offsets):
        changed = bytearray(content)
        changed[offset] ^= chance.randrange(1, 256)
        store.file.write_bytes(changed)
        assert isinstance(store.refused(secret), (KeyringError, UnlockError))
    store.file.write_bytes(content)
    store.unlock(secret)


def with_header(content: bytes, raw: bytes) -> bytes:
    length = int.from_bytes(content[8:12], "big")
    return MAGIC + u32(len(raw)) + raw + content[12 + length :]


class _Gone:
    def __repr__(self) -> str:
        return "gone"


REMOVED = _Gone()


def changed_header(content: bytes, change: dict[str, Any]) -> bytes:
    """Return a keyring whose header has some keys (``slots.0.id``) changed."""
    header: Any = json.loads(content[12 : 12 + int.from_bytes(content[8:12], "big")])
    for path, value in change.items():
        *folders, last = path.split(".")
        place = header
        for name in folders:
            place = place[int(name)] if isinstance(place, list) else place[name]
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return with_header(content, encoding.canonical(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"created": "earlier"}, BODY),
        ({"generation": 0}, BODY),
        ({"generation": 2}, BODY),
        ({"generation": -1}, HEADER),
        ({"generation": 2**64}, HEADER),
        ({"generation": 2**70}, HEADER),
        ({"generation": "1"}, HEADER),
        ({"generation": 1.5}, HEADER),
        ({"slots.0.label": "other"}, BODY),
        ({"slots.1.created": "other"}, BODY),
        ({"slots.0.id": "00" * 16}, BODY),
        ({"slots.0.id": "not hex"}, f"{BODY}|{HEADER}"),
        ({"slots.1.id": "00" * 16}, LOCKED),
        ({"slots.1.id": "not hex"}, f"{LOCKED}|{HEADER}"),
        ({"slots.1.id": ""}, HEADER),
        ({"slots.1.type": "passphrase"}, LOCKED),
        ({"slots.1.type": "unknown"}, LOCKED),
        ({"slots.1.parameters": {"a": [{}]}}, LOCKED),
        ({"slots.1.sealed": ""}, LOCKED),
        ({"slots.1.sealed": "A" * 136}, LOCKED),
        ({"slots.1.sealed": "!"}, HEADER),
        ({"slots.1.unknown": 1}, HEADER),
        ({"slots.1.type": REMOVED}, HEADER),
        ({"slots": []}, LOCKED),
        ({"slots": {}}, HEADER),
        ({"store_id": "00" * 16}, HEADER),
        ({"store_id": ""}, HEADER),
        ({"signing_key": base64.b64encode(bytes(32)).decode()}, HEADER),
        ({"signing_key": ""}, HEADER),
        ({"unknown": 1}, HEADER),
        ({"created": REMOVED}, HEADER),
        ({"format": REMOVED}, HEADER),
        ({"format": "2"}, HEADER),
        ({"format": None}, HEADER),
        ({"format": 0}, f"{BODY}|the store has format 0, this release needs 1"),
        ({"format": -1}, HEADER),
        ({"format": True}, HEADER),
        ({"format": 2}, "the store has format 2; this release knows 1: install a newer release"),
        (
            {"format": 99, "slots": "of another kind", "new": {}},
            "the store has format 99; this release knows 1: install",
        ),
    ],
    ids=str,
)
def test_a_header_that_somebody_changed_opens_nothing(store: Store, change: dict[str, Any], message: str) -> None:
    store.file.write_bytes(changed_header(store.file.read_bytes(), change))
    assert re.match(message, str(store.refused()))
    if message == HEADER or message.startswith("the store has"):
        with pytest.raises(KeyringError):
            keyring.read_header(store.file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", NOT_ONE),
        (MAGIC, NOT_ONE),
        (MAGIC + b"\0\0\0", NOT_ONE),
        (MAGIC[::-1] + u32(2) + b"{}", NOT_ONE),
        (b"\x89SRM\r\n\x1a\n" + u32(2) + b"{}", NOT_ONE),
        (MAGIC.replace(b"\r\n", b"\n") + u32(2) + b"{}   ", NOT_ONE),
        (MAGIC + u32(3) + b"{}", CUT),
        (MAGIC + u32(2**32 - 1) + b"{}", CUT),
        (MAGIC + u32(65_537) + b"{" * 65_537, CUT),
        (MAGIC + u32(2) + b"{}" + bytes((1 << 20) + 1), CUT),
        (MAGIC + u32(0), HEADER),
        *((MAGIC + u32(len(raw)) + raw, HEADER) for raw in (
            b"{}", b"[]", b"null", b"1", b'"a"', b"{", b"\xff\xff", b"[" * 60_000, b'{"format":' * 6000,
            b'{"format":1,"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}", b'{"format":NaN}',
            b'{"format":' + b"9" * 5000 + b"}",
        )),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:30]),
)  # fmt: skip
def test_what_is_no_keyring_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(KeyringError, match=f"^{message}"):
        keyring.parse(content)
    (tmp_path / "keyring").write_bytes(content)
    with pytest.raises(KeyringError, match=f"^{message}"):
        keyring.read_header(tmp_path / "keyring")


@QUICK
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: MAGIC + u32(len(b)) + b)))
@example(MAGIC + u32(12) + b'{"format":1}')
def test_any_bytes_are_a_keyring_or_a_keyring_error(content: bytes) -> None:
    with pytest.raises(KeyringError):
        keyring.parse(content)


@pytest.mark.parametrize("name", ["missing", ".", "missing/deeper"])
def test_a_keyring_that_cannot_be_read_is_an_error_that_names_it(store: Store, name: str) -> None:
    store.file = store.folder / name
    error = store.refused()
    assert isinstance(error, KeyringError)
    assert f"the keyring {store.file} cannot be read: " in str(error)


def test_a_body_of_another_store_does_not_open_even_under_the_same_root(store: Store) -> None:
    opened = store.unlock()
    content = store.file.read_bytes()
    length = int.from_bytes(content[8:12], "big")
    body = seal(encoding.canonical(opened.body), opened._root_key, context("keyring", bytes(16)))
    store.file.write_bytes(content[: 12 + length] + body)
    assert str(store.refused()) == BODY


def test_a_body_of_another_shape_is_an_error_though_it_is_authentic(store: Store) -> None:
    opened = store.unlock()
    header = encoding.canonical(opened.header)
    for body in (b"{}", b"\xff", b"null", encoding.canonical(msgspec.to_builtins(opened.body) | {"unknown": 1})):
        sealed = seal(body, opened._root_key, keyring._bound_to(opened.header, header))
        store.file.write_bytes(MAGIC + u32(len(header)) + header + sealed)
        assert str(store.refused()) == BODY


# --- generations and anchors


def test_an_old_copy_of_the_keyring_is_refused(store: Store) -> None:
    old = store.file.read_bytes()
    opened = store.unlock()
    opened.write(store.file)
    new = store.file.read_bytes()
    store.file.write_bytes(old)
    error = store.refused()
    assert isinstance(error, KeyringError)
    assert str(error) == "the keyring is generation 1, but generation 2 was in use: an old copy was put back"
    store.file.write_bytes(new)
    assert store.unlock().header.generation == 2


def test_a_keyring_newer_than_the_record_opens_and_is_recorded(store: Store) -> None:
    record = store.folder / "anchors" / "generation"
    old = record.read_bytes()
    opened = store.unlock()
    opened.write(store.file)
    newer = record.read_bytes()
    record.write_bytes(old)
    store.unlock()
    assert record.read_bytes() == newer == f"{opened.header.store_id} 2\n".encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing or damaged"),
        (b"", "missing or damaged"),
        (b"1", "missing or damaged"),
        (b"@ x", "missing or damaged"),
        (b"@ 1 1", "missing or damaged"),
        (b"\xff\xfe", "missing or damaged"),
        (b"00" * 16 + b" 1\n", "the anchors folder belongs to another store"),
    ],
)
def test_without_a_sound_record_of_generations_nothing_opens(store: Store, content: bytes | None, message: str) -> None:
    record = store.folder / "anchors" / "generation"
    record.unlink()
    if content is not None:
        record.write_bytes(content.replace(b"@", keyring.read_header(store.file).store_id.encode()))
    with pytest.raises(AnchorError, match=message):
        store.unlock()


def test_with_the_anchors_of_another_store_nothing_opens(store: Store, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Store.new(tmp_path / "other")
    with pytest.raises(AnchorError, match="the anchors folder belongs to another store"):
        keyring.unlock(store.file, FILE, other.anchors)
    # Its record made to fit, its anchor still is not the one.
    other.anchors.set_generation(bytes.fromhex(keyring.read_header(store.file).store_id), 1)
    opened = keyring.unlock(store.file, FILE, other.anchors)
    with pytest.raises(KeyringError, match="the root of key version 1 does not open under its anchor"):
        opened.current()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, AnchorError, "the anchor of version 1 cannot be read"),
        (b"", AnchorError, "the anchor of version 1 is damaged"),
        (bytes(31), AnchorError, "the anchor of version 1 is damaged"),
        (bytes(33), AnchorError, "the anchor of version 1 is damaged"),
        (bytes(32), KeyringError, "the root of key version 1 does not open under its anchor"),
    ],
)
def test_without_its_anchor_a_version_does_not_open(
    store: Store, content: bytes | None, error: type[Exception], message: str
) -> None:
    anchor = store.folder / "anchors" / "anchor-1"
    anchor.unlink()
    if content is not None:
        anchor.write_bytes(content)
    opened = store.unlock()
    for _ in range(2):
        with pytest.raises(error, match=message):
            opened.version(1)


def test_the_anchor_of_one_version_does_not_open_another(store: Store) -> None:
    opened = store.unlock()
    opened.add_version("later")
    opened.write(store.file)
    folder = store.folder / "anchors"
    first, second = (folder / f"anchor-{n}" for n in (1, 2))
    one, two = first.read_bytes(), second.read_bytes()
    assert one != two
    first.write_bytes(two)
    second.write_bytes(one)
    again = store.unlock()
    for version in (1, 2):
        with pytest.raises(KeyringError, match=f"the root of key version {version} does not open"):
            again.version(version)
    # The same anchor is another key in another version or store, and is asked for by its own name alone.
    keys = {bytes(store.anchors.key("anchor-1", store_id, 1)) for store_id in (bytes(16), again.store_id)}
    second.write_bytes(first.read_bytes())
    assert len(keys | {bytes(store.anchors.key("anchor-2", again.store_id, 2))}) == 3
    for name in ("anchor-2", "../anchor-1", "anchor-1/", ""):
        with pytest.raises(AnchorError, match="an anchor of another version"):
            store.anchors.key(name, again.store_id, 1)


def test_an_anchor_is_made_once(store: Store) -> None:
    before = (store.folder / "anchors" / "anchor-1").read_bytes()
    with pytest.raises(FileExistsError):
        store.anchors.create(1)
    assert (store.folder / "anchors" / "anchor-1").read_bytes() == before
    assert (store.folder / "anchors" / "anchor-1").stat().st_mode & 0o777 == 0o600
    assert (
        (store.folder / "anchors" / "CACHEDIR.TAG")
        .read_text()
        .startswith("Signature: 8a477f597d28d172789f06886806bc55")
    )


def test_a_keyring_is_recorded_only_after_it_is_written(store: Store) -> None:
    opened = store.unlock()
    (store.folder / "keyring.new").mkdir()
    with pytest.raises(OSError):
        opened.write(store.file)
    (store.folder / "keyring.new").rmdir()
    assert store.unlock().header.generation == 1


def test_roots_are_sealed_under_their_anchor_and_place(original: Store) -> None:
    record = original.keyring.body.versions[0]
    key = original.anchors.key("anchor-1", original.keyring.store_id, 1)
    root = open_sealed(record.root, key, context("version-root", original.keyring.store_id, u32(1)))
    assert len(root) == 32
    assert root == bytes(original.keyring.current()._root)


# --- slots


OTHER = KeyFile(bytes(range(64, 96)))
needs_token = pytest.mark.needs("softhsm2-util")


@pytest.fixture
def hsm(tmp_path: Path) -> Iterator[SoftHsm]:
    """SoftHSM with a token of label 'one'."""
    with attached(tmp_path / "hsm") as made:
        made.make("one")
        yield made


@pytest.fixture
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Credential:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "store.key").write_bytes(slots.new_key_file())
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return Credential("store.key")


def test_an_added_slot_opens_the_same_store_once_it_is_written(store: Store, credential: Credential) -> None:
    opened = store.unlock()
    made = opened.add_slot(OTHER, "spare", "later")
    assert (made.label, made.created, made.type) == ("spare", "later", "key-file")
    assert isinstance(store.refused(OTHER), UnlockError)
    opened.add_slot(credential, "unit", "later")
    opened.write(store.file)
    for secret in (OTHER, credential, FILE, WORDS):
        again = store.unlock(secret)
        assert secrets_of(again) == secrets_of(opened)
    assert [slot.label for slot in again.header.slots] == ["words", "file", "spare", "unit"]


def test_a_slot_that_cannot_be_made_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    opened = store.unlock()
    before = encoding.canonical(opened.header)
    with pytest.raises(slots.CredentialError):
        opened.add_slot(Credential("store.key"), "", "")
    with pytest.raises(TokenError):
        opened.add_slot(Token(PIN, TokenPlace("/nowhere.so", "one")), "", "")
    assert encoding.canonical(opened.header) == before


def test_a_keyring_never_grows_beyond_what_can_be_read(store: Store) -> None:
    opened = store.unlock()
    with pytest.raises(KeyringError, match="has no room for another slot"):
        opened.add_slot(OTHER, "x" * 65_536, "")
    opened.header.generation = (1 << 63) - 3
    count = 0
    with pytest.raises(KeyringError, match="has no room for another slot"):
        while True:
            opened.add_slot(OTHER, "y" * 1000, "")
            count += 1
    assert count > 40
    opened.write(store.file)
    assert len(store.unlock(OTHER).header.slots) == count + 2


def test_a_removed_slot_opens_nothing_any_more(store: Store) -> None:
    old = store.file.read_bytes()
    opened = store.unlock()
    words = opened.header.slots[0]
    assert opened.remove_slot(words.id) == words
    opened.write(store.file)
    assert isinstance(store.refused(WORDS), UnlockError)
    assert store.unlock(FILE).header.generation == 2
    # The copy that still has the slot is refused by its age.
    store.file.write_bytes(old)
    assert "an old copy was put back" in str(store.refused(WORDS))


def test_the_last_slot_cannot_be_removed(store: Store) -> None:
    opened = store.unlock()
    first, second = opened.header.slots
    opened.remove_slot(first.id)
    # One of a newer release's kinds opens nothing here.
    opened.header.slots.append(msgspec.structs.replace(first, id="00" * 16, type="moonlight"))
    for _ in range(2):
        with pytest.raises(KeyringError, match=r"^the last slot cannot be removed"):
            opened.remove_slot(second.id)
    with pytest.raises(KeyringError, match="the keyring has no slot "):
        opened.remove_slot(first.id)
    opened.remove_slot("00" * 16)
    opened.write(store.file)
    assert store.unlock(FILE).header.slots == [second]


def test_a_secret_is_told_which_slot_it_opens(store: Store) -> None:
    opened = store.unlock()
    words, file = opened.header.slots
    assert (opened.test_slot(WORDS), opened.test_slot(FILE)) == (words, file)
    with pytest.raises(UnlockError, match=LOCKED):
        opened.test_slot(OTHER)
    # A slot that opens, but to another root key, is not one of this keyring.
    opened.header.slots.append(slots.make_slot(OTHER, bytes(32), opened.store_id, label="", created=""))
    with pytest.raises(UnlockError, match=LOCKED):
        opened.test_slot(OTHER)
    assert any(opened._root_key)


# --- a new root key


def roots(content: bytes, secret: slots.Secret) -> bytearray:
    """Return the root key that a secret gives of a keyring file."""
    header, _, _ = keyring.parse(content)
    return slots.unlock(header.slots, secret, bytes.fromhex(header.store_id))


def opens(content: bytes, root_key: bytes | bytearray) -> bool:
    header, raw, sealed = keyring.parse(content)
    try:
        open_sealed(sealed, root_key, keyring._bound_to(header, raw))
    except keyring.SealError:
        return False
    return True


def test_after_a_reroot_the_old_root_key_opens_nothing(store: Store) -> None:
    old = store.file.read_bytes()
    opened = store.unlock()
    before = [slot.id for slot in opened.header.slots]
    opened.reroot([FILE, WORDS])
    assert store.file.read_bytes() == old
    opened.write(store.file)
    new = store.file.read_bytes()
    root = roots(old, FILE)
    # Control: it is the key that it is said to be.
    assert opens(old, root)
    assert not opens(new, root)
    assert opens(new, roots(new, FILE))
    again = store.unlock(WORDS)
    assert secrets_of(again) == secrets_of(opened)
    assert again.header.generation == 2
    assert [(s.type, s.label) for s in again.header.slots] == [("passphrase", "words"), ("key-file", "file")]
    assert not {slot.id for slot in again.header.slots} & set(before)
    # The old slots do not fit into the new keyring either, with the old root key or as they are.
    length = int.from_bytes(new[8:12], "big")
    for number in range(2):
        header: Any = json.loads(new[12 : 12 + length])
        header["slots"][number] = json.loads(old[12 : 12 + int.from_bytes(old[8:12], "big")])["slots"][number]
        store.file.write_bytes(with_header(new, encoding.canonical(header)))
        assert isinstance(store.refused([WORDS, FILE][number]), (UnlockError, KeyringError))


def test_a_slot_key_that_leaked_opens_nothing_after_a_reroot(store: Store) -> None:
    opened = store.unlock()
    file = opened.header.slots[1]
    leaked = slots._slot_key(file, FILE, opened.store_id)
    assert open_sealed(file.sealed, leaked, slots._slot_context(file, opened.store_id)) == opened._root_key
    opened.reroot([FILE, WORDS])
    file = opened.header.slots[1]
    with pytest.raises(keyring.SealError):
        open_sealed(file.sealed, leaked, slots._slot_context(file, opened.store_id))


def test_a_reroot_needs_every_secret_or_the_word_to_remove_a_slot(store: Store) -> None:
    opened = store.unlock()
    words, file = opened.header.slots
    before = opened.header.slots, bytes(opened._root_key)
    with pytest.raises(KeyringError) as raised:
        opened.reroot([FILE])
    assert str(raised.value) == (
        f"a new root key needs the secret of every slot that stays; give or remove: 'words' (passphrase, {words.id})"
    )
    with pytest.raises(UnlockError, match=LOCKED):
        opened.reroot([FILE, WORDS, OTHER])
    with pytest.raises(KeyringError, match="the keyring has no slot 00"):
        opened.reroot([FILE, WORDS], remove=["00" * 16])
    with pytest.raises(KeyringError, match="the last slot cannot be removed"):
        opened.reroot([], remove=[words.id, file.id])
    assert (opened.header.slots, bytes(opened._root_key)) == before
    opened.reroot([FILE, FILE], remove=[words.id])
    opened.write(store.file)
    assert isinstance(store.refused(WORDS), UnlockError)
    assert [slot.label for slot in store.unlock(FILE).header.slots] == ["file"]


def test_one_secret_may_open_several_slots(store: Store) -> None:
    opened = store.unlock()
    opened.add_slot(FILE, "again", "later")
    opened.reroot([FILE, WORDS])
    opened.write(store.file)
    assert [slot.label for slot in store.unlock(FILE).header.slots] == ["words", "file", "again"]


def test_a_reroot_that_cannot_be_written_leaves_the_old_keyring(store: Store) -> None:
    old = store.file.read_bytes()
    opened = store.unlock()
    opened.reroot([FILE, WORDS])
    (store.folder / "keyring.new").mkdir()
    with pytest.raises(OSError):
        opened.write(store.file)
    (store.folder / "keyring.new").rmdir()
    assert store.file.read_bytes() == old
    for secret in (FILE, WORDS):
        assert store.unlock(secret).header.generation == 1


class _DiedError(BaseException):
    """The process ends here."""


def test_a_reroot_that_ends_at_any_of_its_steps_leaves_a_keyring_that_every_slot_opens(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = ("open", "write", "fsync", "fchmod", "rename", "unlink")
    ends = [0]

    def dying(call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            ends[0] -= 1
            if ends[0] == 0:
                raise _DiedError
            return call(*arguments, **options)

        return run

    generations = []
    for step in range(1, 100):
        copy = Store(Path(shutil.copytree(store.folder, tmp_path / str(step))))
        opened = copy.unlock()
        opened.reroot([FILE, WORDS])
        ends[0] = step
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(encoding.os, name, dying(getattr(encoding.os, name)))
            try:
                opened.write(copy.file)
                done = True
            except _DiedError:
                done = False
        for secret in (FILE, WORDS):
            after = copy.unlock(secret)
            found, wanted = secrets_of(after), secrets_of(opened)
            # All but the header, which has other slots.
            assert (found[0], found[2:]) == (wanted[0], wanted[2:]), step
        generations.append(after.header.generation)
        # What was left of the first does not keep a second from being done.
        after.reroot([FILE, WORDS])
        after.write(copy.file)
        assert copy.unlock().header.generation == generations[-1] + 1, step
        if done:
            break
    # The old one until the new one has its name, and from then on the new one; every step was tried.
    assert generations == sorted(generations)
    assert set(generations) == {1, 2}
    assert len(generations) > 8


@needs_token
def test_a_reroot_takes_all_kinds(store: Store, hsm: SoftHsm, credential: Credential) -> None:
    opened = store.unlock()
    token = opened.add_slot(hsm.secret(), "token", "later")
    opened.add_slot(credential, "unit", "later")
    opened.write(store.file)
    old = store.file.read_bytes()
    opened.reroot([Token(PIN), credential, FILE, WORDS])
    opened.write(store.file)
    root = roots(old, Token(PIN))
    assert opens(old, root)
    assert not opens(store.file.read_bytes(), root)
    for secret in (Token(PIN), credential, FILE, WORDS):
        assert len(store.unlock(secret).header.slots) == 4
    # The token's key is the same; its salt and the slot's id are not.
    assert opened.header.slots[2].parameters["key"] == token.parameters["key"]
    assert opened.header.slots[2].parameters["salt"] != token.parameters["salt"]


@needs_token
def test_a_keyring_with_slots_of_all_kinds_does_not_open_with_a_byte_changed(
    store: Store, hsm: SoftHsm, credential: Credential
) -> None:
    opened = store.unlock()
    opened.add_slot(hsm.secret(), "token", "later")
    opened.add_slot(credential, "unit", "later")
    opened.write(store.file)
    content = store.file.read_bytes()
    chance = random.Random(3)
    for secret in (Token(PIN), credential):
        for offset in sorted({*range(16), *chance.sample(range(len(content)), 200)}):
            changed = bytearray(content)
            changed[offset] ^= chance.randrange(1, 256)
            store.file.write_bytes(changed)
            with pytest.raises((KeyringError, UnlockError, TokenError, slots.CredentialError)):
                store.unlock(secret)
        for length in sorted(chance.sample(range(len(content)), 50)):
            store.file.write_bytes(content[:length])
            assert isinstance(store.refused(secret), KeyringError)
        store.file.write_bytes(content)
        store.unlock(secret)


@needs_token
def test_a_keyring_opens_with_its_token_alone_and_not_without(store: Store, hsm: SoftHsm) -> None:
    (token,) = hsm.tokens.iterdir()
    opened = store.unlock()
    made = opened.add_slot(hsm.secret(), "token", "later")
    opened.write(store.file)
    assert secrets_of(store.unlock(Token(PIN))) == secrets_of(opened)
    assert opened.test_slot(Token(PIN)) == made
    assert isinstance(store.refused(Token("0000-0000")), UnlockError)
    hsm.pull(token)
    with pytest.raises(TokenError, match="no token 'one' is attached"):
        store.unlock(Token(PIN))
    hsm.put_back(token)
    store.unlock(Token(PIN))


# --- destroyed versions


def test_a_destroyed_version_does_not_open_any_more_from_any_copy(store: Store) -> None:
    opened = store.unlock()
    first = opened.version(1)
    opened.add_version("later")
    opened.write(store.file)
    copy = store.file.read_bytes()
    # Control: both open before.
    for version in (1, 2):
        store.unlock().version(version)
    assert (opened.grade(1), opened.grade(2)) == ("clear", "clear")
    opened.destroy_version(1)
    assert not any(first._root)
    opened.write(store.file)
    again = store.unlock()
    with pytest.raises(UnknownVersionError, match="key version 1 was destroyed"):
        again.version(1)
    assert again.current().version == 2
    assert [(r.version, r.state, bool(r.root)) for r in again.body.versions] == [
        (1, "destroyed", False),
        (2, "current", True),
    ]
    assert again.grade(1) == "clear"
    # The backup made before has the root, but no anchor to open it with.
    record = (store.folder / "anchors" / "generation").read_bytes()
    (store.folder / "anchors" / "generation").write_bytes(record.replace(b" 3\n", b" 2\n"))
    store.file.write_bytes(copy)
    restored = store.unlock()
    restored.version(2)
    with pytest.raises(AnchorError, match="the anchor of version 1 cannot be read"):
        restored.version(1)


def test_a_destruction_interrupted_by_a_crash_is_finished_by_a_second(store: Store) -> None:
    opened = store.unlock()
    opened.add_version("later")
    opened.write(store.file)
    opened.destroy_version(1)
    # The keyring was not written.
    again = store.unlock()
    assert again.body.versions[0].state == "old"
    for _ in range(2):
        again.destroy_version(1)
    again.write(store.file)
    assert store.unlock().body.versions[0].state == "destroyed"
    # Numbers are not used again, and states stay.
    third = store.unlock()
    assert third.add_version("last").version == 3
    assert [r.state for r in third.body.versions] == ["destroyed", "old", "current"]


def test_the_current_version_is_never_destroyed(store: Store) -> None:
    opened = store.unlock()
    with pytest.raises(KeyringError, match="key version 1 is the current one: rotate first"):
        opened.destroy_version(1)
    with pytest.raises(UnknownVersionError, match="the keyring has no key version 2"):
        opened.destroy_version(2)
    store.unlock().version(1)


def test_an_anchor_that_a_crash_left_unnamed_is_in_nobodys_way(store: Store) -> None:
    store.unlock().add_version("lost")
    left = (store.folder / "anchors" / "anchor-2").read_bytes()
    opened = store.unlock()
    opened.add_version("later")
    opened.write(store.file)
    assert (store.folder / "anchors" / "anchor-2").read_bytes() != left
    assert store.unlock().version(2).index_key() == opened.version(2).index_key()


@needs_token
def test_versions_of_both_kinds_of_anchor_stand_side_by_side(store: Store, hsm: SoftHsm) -> None:
    with AttachedToken(hsm.module, "one", PIN) as token:
        on_token = TokenAnchors(store.folder / "anchors", lambda: AttachedToken(hsm.module, "one", PIN))
        both = AnchorSet(on_token, store.anchors)
        opened = keyring.unlock(store.file, FILE, both)
        second = opened.add_version("later")
        opened.write(store.file)
        assert [r.anchor.provider for r in opened.body.versions] == ["file", "pkcs11-software"]
        assert (opened.grade(1), opened.grade(2)) == ("clear", "clear")
        again = keyring.unlock(store.file, FILE, AnchorSet(store.anchors, on_token))
        assert again.version(2).index_key() == second.index_key()
        assert again.version(1).index_key() == opened.version(1).index_key()
        # Without the token, only the version on it is out of reach.
        alone = store.unlock()
        alone.version(1)
        with pytest.raises(AnchorError, match="no anchors of the kind 'pkcs11-software' are configured"):
            alone.version(2)
        # What a token's end achieves is known without it.
        alone.body.versions[1].anchor.provider = "pkcs11"
        assert alone.grade(2) == "purge"
        # Back to files, and the token's version destroyed.
        again.add_version("last")
        again.write(store.file)
        copy = store.file.read_bytes()
        again.destroy_version(2)
        again.write(store.file)
        assert not token.has_key(again.body.versions[1].anchor.id.partition("@")[0])
        store.file.write_bytes(copy)
        store.anchors.set_generation(opened.store_id, 1)
        restored = keyring.unlock(store.file, FILE, both)
        restored.version(1)
        restored.version(3)
        with pytest.raises(AnchorError, match="has no secret key 'strongroom-anchor-2-"):
            restored.version(2)
        (device,) = hsm.tokens.iterdir()
        hsm.pull(device)
        with pytest.raises(AnchorError, match="attach it and unlock again"):
            keyring.unlock(store.file, FILE, both).version(2)
