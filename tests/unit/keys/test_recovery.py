"""Recovery: any k shares and one export rebuild the keyring elsewhere; whatever else is refused, in words."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import shamir_mnemonic
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from shamir_mnemonic.wordlist import WORDLIST
from softhsm import PIN, attached

from keys import keyring, recovery, shares
from keys.anchors import AnchorError, AnchorSet, FileAnchors, TokenAnchors
from keys.keyring import Authority, Keyring
from keys.shares import RecoveryError, RecoveryKey
from keys.slots import KeyFile
from keys.token import AttachedToken
from keys.versions import StudyKeyPlace

THEN, NOW = "2026-01-31T10:00:00Z", "2026-02-28T10:00:00Z"
FILE, OTHER_FILE = KeyFile(bytes(range(32))), KeyFile(bytes(32))
STORE_ID, KEY_ID, STUDY_KEY = bytes(16), b"k" * 16, bytearray(b"s" * 32)
SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
PLACE = StudyKeyPlace(b"p" * 16, KEY_ID, b"t" * 32, 8192, b"f" * 32, 7)


def anchors_in(folder: Path) -> FileAnchors:
    made = FileAnchors(folder)
    made.prepare()
    return made


class Store:
    """A store with two versions, its recovery key, five shares of which three are needed, and an export."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keyring"
        self.ring = keyring.new_keyring([(FILE, "file")], anchors_in(folder / "anchors"), THEN)
        self.ring.add_version(NOW)
        self.ring.body.authority = Authority("pem", b"der")
        self.ring.write(self.file)
        self.pinned = self.ring.header.signing_key
        self.recovery, self.shares = shares.new_recovery(self.ring.store_id, 5, 3, created=THEN)
        self.export = recovery.export(self.ring, self.recovery, NOW)

    def secret(self) -> bytearray:
        return shares.combine(self.shares[1:4])

    def open(self) -> recovery.Contents:
        return recovery.open_export(self.export, self.secret(), self.pinned)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("other"))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RecoveryError) as raised:
        call()
    return str(raised.value)


# --- a store that is rebuilt


def rebuilt(contents: recovery.Contents, folder: Path) -> Keyring:
    """Return a keyring that was written elsewhere and unlocked there with a new secret."""
    folder.mkdir()
    recovery.rebuild(contents, [(OTHER_FILE, "new")], anchors_in(folder / "anchors"), NOW).write(folder / "keyring")
    return keyring.unlock(folder / "keyring", OTHER_FILE, FileAnchors(folder / "anchors"))


def test_a_rebuilt_keyring_opens_whatever_the_old_one_has_wrapped(store: Store, tmp_path: Path) -> None:
    new = rebuilt(store.open(), tmp_path / "elsewhere")
    for number in (1, 2):
        old = store.ring.version(number)
        assert new.version(number).unwrap_study(old.wrap_study(STUDY_KEY, PLACE), PLACE) == STUDY_KEY
        wrapped = old.deposit_key().wrap(STUDY_KEY, KEY_ID)
        assert new.version(number).unwrap_deposit(wrapped, KEY_ID) == STUDY_KEY
        assert new.version(number).ledger_key() == old.ledger_key()
    assert new.signing.private_bytes_raw() == store.ring.signing.private_bytes_raw()
    for field in ("audit_key", "authority", "tag_key"):
        assert getattr(new.body, field) == getattr(store.ring.body, field)
    assert new.store_id == store.ring.store_id
    assert new.header.generation == store.ring.header.generation + 1 == 2
    assert [(r.version, r.created, r.state) for r in new.body.versions] == [(1, THEN, "old"), (2, NOW, "current")]


def test_a_rebuilt_keyring_has_new_anchors_and_slots_and_the_old_ones_do_not_open_it(
    store: Store, tmp_path: Path
) -> None:
    new = rebuilt(store.open(), tmp_path / "elsewhere")
    assert [slot.label for slot in new.header.slots] == ["new"]
    for record, old in zip(new.body.versions, store.ring.body.versions, strict=True):
        assert record.root != old.root
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "with-old-anchors")
    old_anchors = store.file.with_name("anchors")
    for name in ("anchor-1", "anchor-2"):
        shutil.copy(old_anchors / name, tmp_path / "with-old-anchors" / "anchors" / name)
    mixed = keyring.unlock(
        tmp_path / "with-old-anchors" / "keyring", OTHER_FILE, FileAnchors(tmp_path / "with-old-anchors" / "anchors")
    )
    with pytest.raises(keyring.KeyringError, match="does not open under its anchor"):
        mixed.current()


def test_a_rebuilt_store_goes_on_to_its_next_version_and_its_next_export(store: Store, tmp_path: Path) -> None:
    contents = store.open()
    new = rebuilt(contents, tmp_path / "elsewhere")
    new.add_version(NOW)
    again = recovery.export(new, contents.recovery, NOW)
    held = recovery.open_export(again, store.secret(), store.pinned)
    assert [[a.id for a in v.anchors] for v in held.versions] == [["anchor-1"] * 2, ["anchor-2"] * 2, ["anchor-3"]]
    assert held.versions[0].root == contents.versions[0].root


def test_a_rebuilt_keyring_names_every_anchor_that_its_roots_had_before(store: Store, tmp_path: Path) -> None:
    new = rebuilt(store.open(), tmp_path / "elsewhere")
    assert [[a.id for a in record.former] for record in new.body.versions] == [["anchor-1"], ["anchor-2"]]
    again = recovery.open_export(recovery.export(new, store.recovery, NOW), store.secret(), store.pinned)
    third = rebuilt(again, tmp_path / "third")
    assert [len(record.former) for record in third.body.versions] == [2, 2]
    third.add_version(NOW)
    third.destroy_version(1)
    # A file of the name that is here says nothing of one on another machine.
    assert [len(record.former) for record in third.body.versions] == [2, 2, 0]
    third.write(tmp_path / "third" / "keyring")
    read = keyring.unlock(tmp_path / "third" / "keyring", OTHER_FILE, FileAnchors(tmp_path / "third" / "anchors"))
    assert read.body.versions == third.body.versions


@pytest.mark.needs("softhsm2-util")
def test_former_anchors_on_a_token_go_with_their_version_if_the_token_is_here(tmp_path: Path) -> None:
    with attached(tmp_path / "hsm") as hsm:
        device = hsm.make("one")
        on_token = TokenAnchors(tmp_path / "anchors", lambda: AttachedToken(hsm.module, "one", PIN))
        files = anchors_in(tmp_path / "anchors")
        ring = keyring.new_keyring([(FILE, "file")], on_token, THEN)
        kept, words = shares.new_recovery(ring.store_id, 2, 2, created=THEN)
        export = recovery.export(ring, kept, NOW)
        for here in (False, True):
            both = AnchorSet(files, on_token)
            shutil.rmtree(tmp_path / "anchors")
            files.prepare()
            new = recovery.rebuild(recovery.open_export(export, shares.combine(words)), [(FILE, "f")], both, NOW)
            assert [a.provider for a in new.body.versions[0].former] == ["pkcs11-software"]
            new.add_version(NOW)
            if not here:
                hsm.pull(device)
            new.destroy_version(1)
            assert len(new.body.versions[0].former) == (not here)
            if not here:
                hsm.put_back(device)
        with pytest.raises(AnchorError, match="has no secret key"):
            ring.forget()
            ring.version(1)


def test_a_keyring_without_former_anchors_is_as_earlier_releases_have_it(store: Store, tmp_path: Path) -> None:
    fields = {"anchor", "created", "root", "state", "version"}
    assert all(set(record) == fields for record in msgspec.to_builtins(store.ring.body)["versions"])
    new = rebuilt(store.open(), tmp_path / "elsewhere")
    assert all(set(record) == {*fields, "former"} for record in msgspec.to_builtins(new.body)["versions"])


def test_a_destroyed_version_is_told_of_but_not_contained(store: Store, tmp_path: Path) -> None:
    ring = Store(tmp_path).ring
    ring.destroy_version(1)
    kept, words = shares.new_recovery(ring.store_id, 2, 2, created=THEN)
    content = recovery.export(ring, kept, NOW)
    assert recovery.read_header(content, ring.header.signing_key).versions == [2]
    new = rebuilt(recovery.open_export(content, shares.combine(words)), tmp_path / "elsewhere")
    assert [(r.version, r.state, bool(r.root)) for r in new.body.versions] == [
        (1, "destroyed", False),
        (2, "current", True),
    ]
    assert not (tmp_path / "elsewhere" / "anchors" / "anchor-1").exists()


def test_a_version_that_does_not_open_is_never_left_out_in_silence(tmp_path: Path) -> None:
    made = Store(tmp_path)
    (tmp_path / "anchors" / "anchor-1").unlink()
    ring = keyring.unlock(made.file, FILE, FileAnchors(tmp_path / "anchors"))
    assert "key version 1 cannot be exported" in refused(lambda: recovery.export(ring, made.recovery, NOW))


def test_a_store_is_not_rebuilt_over_anchors_that_are_there(store: Store, tmp_path: Path) -> None:
    folder = anchors_in(tmp_path / "anchors")
    folder.create(2)
    before = (tmp_path / "anchors" / "anchor-2").read_bytes()
    said = refused(lambda: recovery.rebuild(store.open(), [(FILE, "f")], folder, NOW))
    assert "version 2" in said
    assert "empty" in said
    assert (tmp_path / "anchors" / "anchor-2").read_bytes() == before


def test_a_store_is_not_rebuilt_without_a_place_or_a_secret(store: Store, tmp_path: Path) -> None:
    missing = FileAnchors(tmp_path / "missing")
    assert "cannot be made" in refused(lambda: recovery.rebuild(store.open(), [(FILE, "f")], missing, NOW))
    assert "nothing unlocks" in refused(lambda: recovery.rebuild(store.open(), [], missing, NOW))


# --- the export


def test_an_export_opens_with_the_shares_alone(store: Store) -> None:
    assert recovery.open_export(store.export, store.secret()) == store.open()


def test_the_header_is_read_without_the_recovery_key_and_nothing_secret_is_in_clear(store: Store) -> None:
    header = recovery.read_header(store.export, store.pinned)
    assert (header.store_id, header.recovery_id) == (store.ring.header.store_id, store.recovery.id)
    assert (header.created, header.generation, header.versions) == (NOW, 1, [1, 2])
    body = store.ring.body
    for secret in (body.audit_key, body.tag_key, body.signing_seed, store.open().versions[0].root, store.secret()):
        assert secret not in store.export
        assert base64.b64encode(secret) not in store.export


def test_every_export_has_an_id_and_a_key_of_its_own(store: Store) -> None:
    again = recovery.export(store.ring, store.recovery, NOW)
    headers = [recovery.read_header(content, store.pinned) for content in (store.export, again)]
    assert headers[0].export_id != headers[1].export_id
    assert headers[0].digest != headers[1].digest
    # What one header says is not put on the other's content.
    at = len(again) - headers[1].length
    assert "changed" in refused(lambda: recovery.open_export(store.export[:at] + again[at:], store.secret()))


def context(label: str, *fields: bytes) -> bytes:
    return b"strongroom/1/" + label.encode() + b"\0" + b"".join(len(f).to_bytes(4, "big") + f for f in fields)


def test_an_export_is_what_the_page_says_to_a_second_reader(store: Store) -> None:
    """Nothing here imports what made it: HPKE, Cobblestone, SLIP-0039 and JSON alone."""
    content = store.export
    assert content[:8] == bytes.fromhex("895352450D0A1A0A")
    end = 12 + int.from_bytes(content[8:12], "big")
    header = json.loads(content[12:end])
    assert content[12:end] == json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    signing = Ed25519PublicKey.from_public_bytes(base64.b64decode(header["signing_key"]))
    signing.verify(content[end : end + 64], context("recovery-header") + content[12:end])
    assert header["length"] == len(content) - end - 64

    store_id, recovery_id, export_id = (bytes.fromhex(header[f"{n}_id"]) for n in ("store", "recovery", "export"))
    secret = shamir_mnemonic.combine_mnemonics([store.shares[4], store.shares[0], store.shares[2]])

    def expand(length: int, label: str) -> bytes:
        return HKDFExpand(SHA512(), length, context(label, store_id)).derive(secret)

    private = MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(expand(64, "derive/recovery-mlkem768")),
        X25519PrivateKey.from_private_bytes(expand(32, "derive/recovery-x25519")),
    )
    fields = (store_id, recovery_id, export_id, header["generation"].to_bytes(8, "big"))
    wrapped, sealed = content[end + 64 : end + 1232], content[end + 1232 :]
    key = SUITE.decrypt(wrapped, private, info=context("recovery-key", *fields))
    decryptor = Cobblestone256Decryptor(key, context("recovery-export", *fields))
    body = json.loads(decryptor.update(sealed) + decryptor.finalize())
    assert set(body) == set(recovery.Contents.__struct_fields__)
    assert base64.b64decode(body["signing_seed"]) == store.ring.body.signing_seed
    assert base64.b64decode(body["audit_key"]) == store.ring.body.audit_key
    assert body["authority"] == {"certificate": "pem", "key": base64.b64encode(b"der").decode()}
    assert [v["anchors"] for v in body["versions"]] == [[{"id": f"anchor-{n}", "provider": "file"}] for n in (1, 2)]
    for version in body["versions"]:
        root = base64.b64decode(version["root"])
        info = context("derive/index", store_id, version["version"].to_bytes(4, "big"))
        assert HKDFExpand(SHA512(), 48, info).derive(root)[:32] == store.ring.version(version["version"]).index_key()[0]


def test_a_flipped_byte_anywhere_is_refused_with_or_without_the_recovery_key(store: Store) -> None:
    chance, secret = random.Random(1), store.secret()
    end = 12 + int.from_bytes(store.export[8:12], "big") + 64
    places = {*range(end), *chance.sample(range(end, len(store.export)), 300), len(store.export) - 1}
    for place in places:
        changed = bytearray(store.export)
        changed[place] ^= 1 << chance.randrange(8)
        assert refused(lambda: recovery.read_header(bytes(changed), store.pinned))  # noqa: B023
        assert refused(lambda: recovery.open_export(bytes(changed), secret))  # noqa: B023


def test_an_export_that_is_cut_or_longer_is_refused(store: Store) -> None:
    secret = store.secret()
    for length in [*range(0, len(store.export), 41), len(store.export) - 1]:
        assert refused(lambda: recovery.read_header(store.export[:length], store.pinned))  # noqa: B023
        assert refused(lambda: recovery.open_export(store.export[:length], secret))  # noqa: B023
    assert "cut short or added to" in refused(lambda: recovery.read_header(store.export[:-1], store.pinned))
    assert "cut short or added to" in refused(lambda: recovery.open_export(store.export + b"\0", secret))


def test_a_pinned_reader_refuses_another_stores_export(store: Store, other: Store) -> None:
    assert "another store" in refused(lambda: recovery.read_header(other.export, store.pinned))
    assert "another store" in refused(lambda: recovery.open_export(other.export, other.secret(), store.pinned))


def test_the_shares_of_another_store_or_key_do_not_open_an_export(store: Store, other: Store) -> None:
    assert "these shares do not open" in refused(lambda: recovery.open_export(store.export, other.secret()))
    _, words = shares.new_recovery(store.ring.store_id, 2, 2, created=THEN)
    assert store.recovery.id in refused(lambda: recovery.open_export(store.export, shares.combine(words)))


def test_nothing_is_exported_to_another_stores_key_or_a_damaged_one(store: Store, other: Store) -> None:
    assert "another store" in refused(lambda: recovery.export(store.ring, other.recovery, NOW))
    exchanged = msgspec.structs.replace(store.recovery, mlkem768=other.recovery.mlkem768)
    assert "damaged" in refused(lambda: recovery.export(store.ring, exchanged, NOW))
    cut = msgspec.structs.replace(store.recovery, x25519=b"")
    assert "damaged" in refused(lambda: recovery.export(store.ring, cut, NOW))


def signed(store: Store, follows: bytes | None = None, **changes: object) -> bytes:
    """Return the store's export with a header that says something else, signed by the store."""
    header = recovery.read_header(store.export, store.pinned)
    follows = store.export[len(store.export) - header.length :] if follows is None else follows
    raw = json.dumps({**msgspec.to_builtins(header), **changes}, sort_keys=True, separators=(",", ":")).encode()
    signature = store.ring.signing.sign(context("recovery-header") + raw)
    return recovery.MAGIC + len(raw).to_bytes(4, "big") + raw + signature + follows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "install a newer release"),
        ({"format": 0}, "header was changed"),
        ({"more": 1}, "header was changed"),
        ({"generation": -1}, "header was changed"),
        ({"export_id": "00"}, "header was changed"),
        ({"export_id": "AB" * 16}, "header was changed"),
        ({"store_id": "00" * 16}, "header was changed"),
        ({"generation": 9}, "does not open"),
        ({"export_id": "00" * 16}, "does not open"),
        ({"versions": [1]}, "does not open"),
    ],
    ids=str,
)
def test_a_header_that_the_store_signed_and_never_made_is_refused(
    store: Store, changes: dict[str, object], said: str
) -> None:
    assert recovery.open_export(signed(store), store.secret(), store.pinned) == store.open()
    content = signed(store, **changes)
    assert said in refused(lambda: recovery.open_export(content, store.secret(), store.pinned))


def sealed(store: Store, body: dict[str, object]) -> bytes:
    """Return an export, signed by the store, that holds something else."""
    header = recovery.read_header(store.export, store.pinned)
    ids = (bytes.fromhex(i) for i in (header.store_id, header.recovery_id, header.export_id))
    fields = (*ids, header.generation.to_bytes(8, "big"))
    key = bytes(32)
    encryptor = Cobblestone256Encryptor(key, context("recovery-export", *fields))
    wrapped = SUITE.encrypt(key, store.recovery.public(), info=context("recovery-key", *fields))
    follows = wrapped + encryptor.update(json.dumps(body).encode()) + encryptor.finalize()
    digest = base64.b64encode(hashlib.sha256(follows).digest()).decode()
    return signed(store, follows, digest=digest, length=len(follows))


@pytest.mark.parametrize(
    "change",
    [
        lambda body, other: body.update(more=1),
        lambda body, other: body.update(generation=9),
        lambda body, other: body.update(store_id=other.recovery.store_id),
        lambda body, other: body.update(recovery=msgspec.to_builtins(other.recovery)),
        lambda body, other: body.update(signing_seed=base64.b64encode(bytes(32)).decode()),
        lambda body, other: body.update(signing_seed=""),
        lambda body, other: body.update(audit_key="AAAA"),
        lambda body, other: body.update(tag_key=""),
        lambda body, other: body["versions"].reverse(),
        lambda body, other: body["versions"].pop(),
        lambda body, other: body["versions"].append(body["versions"][1]),
        lambda body, other: body["versions"][0].update(root="AAAA"),
        lambda body, other: body["versions"][0].update(root=""),
        lambda body, other: body["versions"][0].update(state="destroyed"),
        lambda body, other: body["versions"][0].update(anchors=[]),
        lambda body, other: body["versions"].insert(
            0, {**body["versions"][0], "version": 0, "root": "", "state": "destroyed"}
        ),
    ],
)
def test_contents_that_the_store_signed_and_never_made_are_refused(
    store: Store, other: Store, change: Callable[[dict[str, object], Store], object]
) -> None:
    body = msgspec.to_builtins(store.open())
    assert recovery.open_export(sealed(store, body), store.secret()) == store.open()
    change(body, other)
    said = refused(lambda: recovery.open_export(sealed(store, body), store.secret()))
    assert "does not open: it is damaged" in said


# --- shares


def test_any_three_of_five_shares_give_the_secret_in_any_order_and_two_never_do(store: Store) -> None:
    secret = store.secret()
    for three in itertools.combinations(store.shares, 3):
        assert shares.combine(three[::-1]) == secret
    for two in itertools.combinations(store.shares, 2):
        said = refused(lambda: shares.combine(two))  # noqa: B023
        assert said == "1 more share is needed: this set needs 3 and 2 came"
    assert "2 more shares are needed" in refused(lambda: shares.combine(store.shares[:1]))
    assert refused(lambda: shares.combine([])) == "no share was given"


def test_two_shares_of_three_tell_the_library_nothing_either(store: Store) -> None:
    for two in itertools.combinations(store.shares, 2):
        with pytest.raises(shamir_mnemonic.MnemonicError):
            shamir_mnemonic.combine_mnemonics(list(two))


def test_more_shares_than_needed_are_welcome_as_long_as_they_fit(store: Store, other: Store) -> None:
    assert shares.combine(store.shares) == store.secret()
    assert shares.combine([store.shares[0], *store.shares[:3]]) == store.secret()
    assert "a share was given twice" in refused(lambda: shares.combine([*store.shares[:2], store.shares[0]]))
    assert "share 4 is not of the same set" in refused(lambda: shares.combine([*store.shares[:3], other.shares[3]]))


def test_shares_are_33_words_and_read_as_people_type_them(store: Store) -> None:
    assert {len(text.split(" ")) for text in store.shares} == {33}
    typed = [f"  {text.upper().replace(' ', chr(10), 5)}\t" for text in store.shares[:3]]
    assert shares.combine(typed) == store.secret()
    assert shares.combine([text.replace(" ", "  ") for text in store.shares]) == store.secret()


def test_a_mistyped_word_is_told_by_its_place_and_never_repeated(store: Store) -> None:
    words = store.shares[1].split()
    unknown = " ".join([*words[:6], "strongrom", *words[7:]])
    said = refused(lambda: shares.combine([store.shares[0], unknown, store.shares[2]]))
    assert said == "word 7 of share 2 is mistyped: it is not in the list of words"
    known = " ".join([*words[:6], next(w for w in WORDLIST if w != words[6]), *words[7:]])
    other = refused(lambda: shares.combine([store.shares[0], known, store.shares[2]]))
    assert other == "a word of share 2 is mistyped, or two are swapped: its checksum does not fit"
    assert "share 1 has 32 words" in refused(lambda: shares.combine([" ".join(words[1:]), *store.shares[:2]]))


def test_every_single_mistyped_word_is_noticed(store: Store) -> None:
    chance, words = random.Random(1), store.shares[0].split()
    for place in range(33):
        wrong = chance.choice([word for word in WORDLIST if word != words[place]])
        typed = " ".join([*words[:place], wrong, *words[place + 1 :]])
        assert "share 1 is mistyped" in refused(lambda: shares.combine([typed, *store.shares[1:3]]))  # noqa: B023


def relabelled(texts: list[str], identifier: int) -> list[str]:
    """Return shares whose set's identifier, 15 bits of chance, is another."""
    made = [shamir_mnemonic.Share.from_mnemonic(text) for text in texts]
    return [shamir_mnemonic.Share(identifier, *list(vars(share).values())[1:]).mnemonic() for share in made]


def test_shares_of_two_sets_fail_even_where_their_identifiers_are_alike(store: Store, other: Store) -> None:
    assert "not of the same set" in refused(lambda: shares.combine([*store.shares[:2], other.shares[2]]))
    mine, theirs = relabelled(store.shares, 77), relabelled(other.shares, 77)
    assert "do not fit each other" in refused(lambda: shares.combine([*mine[:2], theirs[2]]))
    assert "do not fit each other" in refused(lambda: shares.combine([*mine[:3], theirs[3]]))
    assert "different sets" in refused(lambda: shares.combine([*mine[:3], theirs[2]]))


def test_shares_of_something_else_are_refused() -> None:
    grouped = shamir_mnemonic.generate_mnemonics(1, [(1, 1), (1, 1)], bytes(32))[0]
    assert "not one of a recovery key" in refused(lambda: shares.combine(grouped))
    short = shamir_mnemonic.generate_mnemonics(1, [(1, 1)], bytes(16))[0]
    assert "has 20 words" in refused(lambda: shares.combine(short))


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (2, 2), (16, 2), (16, 16)])
def test_the_smallest_and_largest_sets_work(count: int, threshold: int) -> None:
    kept, words = shares.new_recovery(STORE_ID, count, threshold, created=THEN)
    assert (kept.shares, kept.threshold, len(words)) == (count, threshold, count)
    shares.check_typed_back(kept, words[-threshold:])


@pytest.mark.parametrize(("count", "threshold"), [(0, 0), (3, 4), (17, 2), (3, 0), (2, -1), (3, 1)])
def test_impossible_sets_are_refused(count: int, threshold: int) -> None:
    said = refused(lambda: shares.new_recovery(STORE_ID, count, threshold, created=THEN))
    assert f"{threshold} of {count} shares is not possible" in said


def test_what_was_typed_back_is_proved_to_be_this_key(store: Store, other: Store) -> None:
    for three in itertools.combinations(store.shares, 3):
        shares.check_typed_back(store.recovery, three)
    assert "1 more share" in refused(lambda: shares.check_typed_back(store.recovery, store.shares[:2]))
    said = refused(lambda: shares.check_typed_back(store.recovery, other.shares[:3]))
    assert f"not those of the recovery key {store.recovery.id}" in said
    # The same secret is another key for another store.
    elsewhere = msgspec.structs.replace(store.recovery, store_id=other.recovery.store_id)
    assert refused(lambda: shares.check_typed_back(elsewhere, store.shares[:3]))


def test_a_passphrase_is_needed_besides_the_shares_if_one_was_given() -> None:
    kept, words = shares.new_recovery(STORE_ID, 2, 2, created=THEN, passphrase="tulip anvil")
    shares.check_typed_back(kept, words, "tulip anvil")
    for wrong in ("", "Tulip anvil"):
        assert "another passphrase" in refused(lambda: shares.check_typed_back(kept, words, wrong))  # noqa: B023
    assert "printable ASCII" in refused(lambda: shares.combine(words, "tülip"))
    assert "printable ASCII" in refused(lambda: shares.new_recovery(STORE_ID, 2, 2, created=THEN, passphrase="a\n"))


def test_the_public_half_is_kept_as_json_and_holds_nothing_of_the_secret(store: Store) -> None:
    kept = msgspec.json.encode(store.recovery)
    assert msgspec.json.decode(kept, type=RecoveryKey) == store.recovery
    assert base64.b64encode(store.secret()) not in kept
    assert store.recovery.id == shares.opened(store.secret(), store.ring.store_id)[0]


# --- codes and places


def modules_of_terminal(text: str) -> list[list[bool]]:
    """Return a code's dark modules: two rows to a line of blocks, which are light."""
    blocks = {" ": (1, 1), "▀": (0, 1), "▄": (1, 0), "█": (0, 0)}
    rows = []
    for line in text.splitlines():
        pairs = [blocks[character] for character in line]
        rows += [[bool(pair[half]) for pair in pairs] for half in (0, 1)]
    return rows


def test_the_codes_of_a_share_are_one_code_that_holds_its_words(store: Store) -> None:
    import segno

    text = store.shares[0]
    code = segno.make_qr(text.upper(), error="m")
    wanted = [[bool(module) for module in row] for row in code.matrix_iter(border=4)]
    drawn = modules_of_terminal(shares.qr_terminal(text))
    assert drawn[: len(wanted)] == wanted
    assert max(len(row) for row in drawn) <= 65
    svg = shares.qr_svg(text)
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert svg.rstrip().endswith("</svg>")
    assert text.split()[0] not in svg


def test_the_longest_share_has_a_code_that_fits_a_terminal() -> None:
    longest = " ".join([max(WORDLIST, key=len)] * 33)
    assert {len(line) for line in shares.qr_terminal(longest).splitlines()} == {65}


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="NOT TESTED: no /dev/shm")
def test_a_place_in_memory_is_told_from_one_on_disk(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    assert shares.memory_backed(memory)
    assert shares.memory_backed(memory / "not" / "yet" / "there")
    assert not shares.memory_backed(Path("/proc/self"))
    assert not shares.memory_backed(Path(__file__))


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="NOT TESTED: no /dev/shm")
def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "to-memory").symlink_to("/dev/shm/nothing-is-here")
    assert shares.memory_backed(tmp_path / "to-memory")
    (tmp_path / "to-disk").symlink_to(Path(__file__).parent / "nothing-is-here")
    assert not shares.memory_backed(tmp_path / "to-disk")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert not shares.memory_backed(tmp_path / "circle")


def test_nothing_is_printed(store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Store(tmp_path)
    made.open()
    shares.qr_terminal(made.shares[0])
    shares.qr_svg(made.shares[0])
    assert capfd.readouterr() == ("", "")
