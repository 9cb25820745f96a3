"""Files made once with the product open with two implementations of docs/format.md, and only as they were made."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import os
import random
import shutil
import sqlite3
import unicodedata
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import reader
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey
from reader import BLOCK, CHUNK, FormatError, Keyring, Pack, context, u32, u64

import keys.keyring
import keys.versions
from keys.anchors import FileAnchors
from keys.slots import KeyFile, Passphrase, parse_key_file
from storage.keysdb import KeysDatabase
from storage.pack import PackError
from storage.packfile import OpenedPack, PackFile, Record, frames_digest

VECTORS = Path(__file__).parent / "vectors"
EXPECTED = json.loads((VECTORS / "expected.json").read_text())
KEY_FILE = (VECTORS / "store.key").read_bytes()
PASSPHRASE = (VECTORS / "passphrase").read_text("utf-8").removesuffix("\n")
KINDS = ("admitted", "deposit")


@pytest.fixture(scope="module")
def keyring() -> Keyring:
    return reader.open_keyring((VECTORS / "store/keyring").read_bytes(), KEY_FILE, VECTORS / "anchors")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy to change, or to give to the product, which opens keys.db for writing."""
    shutil.copytree(VECTORS, tmp_path / "vectors")
    return tmp_path / "vectors"


def place(kind: str, root: Path = VECTORS) -> Path:
    return root / EXPECTED[kind]["path"]


def read(kind: str, keyring: Keyring, root: Path = VECTORS) -> Pack:
    return reader.read_pack(place(kind, root), keyring, root / "store/keys.db" if kind == "admitted" else None)


def seal(key: bytes, bound: bytes, message: bytes) -> bytes:
    salt = os.urandom(24)
    cipher, base, commitment = reader.chunk_keys(key, salt, bound)
    chunks = (message[at : at + CHUNK] for at in range(0, len(message) // CHUNK * CHUNK + 1, CHUNK))
    sealed = (cipher.encrypt((base ^ i).to_bytes(12, "big"), chunk, None) for i, chunk in enumerate(chunks))
    return salt + commitment + b"".join(sealed)


# --- Seals


@pytest.mark.parametrize("length", [0, 1, 16383, 16384, 16385, 32768, 100000])
def test_seals_are_those_of_the_cobblestone_library_in_both_directions(length: int) -> None:
    key, message = os.urandom(32), random.Random(length).randbytes(length)
    theirs = Cobblestone256Encryptor(key, b"bound")
    sealed = theirs.update(message) + theirs.finalize()
    assert len(sealed) == 56 + length + 16 * (length // 16384 + 1)
    assert reader.unseal(key, b"bound", sealed) == message
    opened = Cobblestone256Decryptor(key, b"bound")
    assert opened.update(seal(key, b"bound", message)) + opened.finalize() == message


@pytest.mark.parametrize("length", [0, 16383, 16384, 40000])
def test_a_seal_that_is_cut_or_prolonged_anywhere_does_not_open(length: int) -> None:
    key = os.urandom(32)
    sealed = seal(key, b"bound", bytes(length))
    chunk = CHUNK + 16
    ends = {0, 23, 55, 56, 71, len(sealed) - 1, *range(56, len(sealed), chunk), *range(72, len(sealed), chunk)}
    for end in ends:
        with pytest.raises(FormatError):
            reader.unseal(key, b"bound", sealed[:end])
    for more in (b"\0", bytes(16), sealed[56:]):
        with pytest.raises(FormatError):
            reader.unseal(key, b"bound", sealed + more)


# --- Keyring, anchors, deposit key


@pytest.mark.parametrize("secret", [PASSPHRASE, unicodedata.normalize("NFKC", PASSPHRASE)], ids=["typed", "NFKC"])
def test_the_passphrase_opens_the_same_keyring_as_the_key_file(secret: str, keyring: Keyring) -> None:
    opened = reader.open_keyring((VECTORS / "store/keyring").read_bytes(), secret, VECTORS / "anchors")
    assert opened.tag_key == keyring.tag_key
    assert [opened.versions[1][i] for i in (0, 1, 2, 4)] == [keyring.versions[1][i] for i in (0, 1, 2, 4)]


@pytest.mark.parametrize(
    "secret", [PASSPHRASE + " ", b"STRONGROOM-KEY-FILE-1\n" + base64.b64encode(bytes(32)) + b"\n", KEY_FILE + b"\n"]
)
def test_another_secret_opens_nothing(secret: bytes | str) -> None:
    with pytest.raises(FormatError):
        reader.open_keyring((VECTORS / "store/keyring").read_bytes(), secret, VECTORS / "anchors")


def test_no_byte_of_the_keyring_can_be_changed() -> None:
    content = (VECTORS / "store/keyring").read_bytes()
    for at, changed in flipped(content, always=range(12)):
        with pytest.raises(FormatError):
            reader.open_keyring(changed, KEY_FILE, VECTORS / "anchors")
            pytest.fail(f"byte {at} was changed")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"iterations":3,', b'"iterations":65,', "take too much"),
        (b'"lanes":4,', b'"lanes":17,', "take too much"),
        (b'"memory_kib":262144,', b'"memory_kib":4194305,', "take too much"),
        (b'"type":"passphrase"', b'"type":"pin"', "unknown type"),
        (b'"format":1', b'"format":2', "another format"),
        (b'"format":1', b'"format":1,"more":1', "keys are not"),
        (b'"generation":1,', b"", "keys are not"),
        (b'"generation":1', b'"generation": 1', "not canonical"),
        (b'"generation":1', b'"generation":"1"', "wrong type"),
    ],
)
def test_a_clear_header_that_breaks_a_rule_is_refused_before_anything_is_tried(
    old: bytes, new: bytes, reason: str
) -> None:
    content = (VECTORS / "store/keyring").read_bytes()
    end = 12 + int.from_bytes(content[8:12], "big")
    assert content[12:end].count(old) == 1
    head = content[12:end].replace(old, new)
    with pytest.raises(FormatError, match=reason):
        reader.open_keyring(content[:8] + u32(len(head)) + head + content[end:], PASSPHRASE, VECTORS / "anchors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("anchor-1", bytes(32)),
        ("anchor-1", (VECTORS / "anchors/anchor-1").read_bytes()[:31]),
        ("generation", (VECTORS / "anchors/generation").read_bytes().replace(b" 1\n", b" 2\n")),
        ("generation", bytes(16).hex().encode() + b" 1\n"),
    ],
    ids=["another anchor", "cut anchor", "newer generation", "another store"],
)
def test_a_keyring_opens_with_its_own_anchors_only(name: str, content: bytes, store: Path) -> None:
    (store / "anchors" / name).write_bytes(content)
    with pytest.raises(FormatError):
        reader.open_keyring((store / "store/keyring").read_bytes(), KEY_FILE, store / "anchors")


def test_the_deposit_key_is_the_one_of_the_keyring_and_no_byte_of_it_can_be_changed(keyring: Keyring) -> None:
    content = (VECTORS / "spool/public/deposit-1.key").read_bytes()
    assert reader.read_deposit_key(content, keyring.signing_key) == (1, keyring.versions[1].public)
    for at, changed in flipped(content):
        with pytest.raises(FormatError):
            reader.read_deposit_key(changed, keyring.signing_key)
            pytest.fail(f"byte {at} was changed")


def test_the_index_begins_with_the_salt_that_its_version_derives(keyring: Keyring) -> None:
    assert keyring.versions[1].index_salt.hex() == EXPECTED["index_salt"]


# --- Packs


def flipped(content: bytes, always: range = range(0), sample: int = 200) -> list[tuple[int, bytes]]:
    """The content with one byte changed: at each offset that is asked for, and at a sample of all."""
    chance = random.Random(len(content))
    variants = []
    for at in sorted({*always, *chance.sample(range(len(content)), sample)}):
        changed = bytearray(content)
        changed[at] ^= chance.randrange(1, 256)
        variants.append((at, bytes(changed)))
    return variants


def pages(pack: Pack, content: bytes) -> list[bytes]:
    """The records of a pack, each filled up to whole pages."""
    places = [content.index(record.frame) for record in pack.records] + [-(-len(content) // BLOCK) * BLOCK]
    full = content.ljust(places[-1], b"\0")
    return [full[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_gives_what_was_sent(kind: str, keyring: Keyring) -> None:
    pack = read(kind, keyring)
    assert not pack.unreadable
    for record, expected in zip(pack.records, EXPECTED[kind]["records"], strict=True):
        assert record.frame[16:32].hex() == expected["object_id"]
        assert len(record.dataset) == expected["length"]
        assert hashlib.sha256(record.dataset).hexdigest() == expected["sha256"]
        assert record.attributes["transfer_syntax"] == expected["transfer_syntax"]
        assert record.attributes["dataset"]["00080018"]["Value"] == [expected["sop_instance_uid"]]
        assert record.attributes["dataset"]["0020000D"]["Value"] == [EXPECTED[kind]["study"]]
        assert record.attributes["received"]["calling"] == "DEMO"


def test_text_outside_its_character_set_is_kept_as_bytes(keyring: Keyring) -> None:
    attributes = read("deposit", keyring).records[1].attributes
    undecoded = attributes["undecoded"]["00100010"]
    assert undecoded["charset"] == ["ISO_IR 192"]
    assert base64.b64decode(undecoded["raw"]).rstrip(b" ") == b"M\xfcller^Ren\xe9"
    assert "00100010" not in attributes["dataset"]


def test_no_byte_of_an_admitted_pack_can_be_changed(keyring: Keyring, store: Path) -> None:
    for at, changed in flipped(place("admitted").read_bytes(), always=range(64)):
        place("admitted", store).write_bytes(changed)
        with pytest.raises(FormatError):
            read("admitted", keyring, store)
            pytest.fail(f"byte {at} was changed")


def test_a_changed_byte_of_a_deposit_can_only_take_records_away(keyring: Keyring, store: Path) -> None:
    whole = read("deposit", keyring)
    for at, changed in flipped(place("deposit").read_bytes(), always=range(64)):
        place("deposit", store).write_bytes(changed)
        try:
            pack = read("deposit", keyring, store)
        except FormatError:
            continue
        assert at >= BLOCK, "the header was changed"
        assert len(pack.unreadable) == 1 and len(pack.records) == len(whole.records) - 1, at
        assert all(record in whole.records for record in pack.records), at


def test_records_of_an_admitted_pack_cannot_be_moved_cut_repeated_or_added(keyring: Keyring, store: Path) -> None:
    content = place("admitted").read_bytes()
    header = content[:BLOCK]
    one, two, three = pages(read("admitted", keyring), content)
    cuts = [header, header + one, header + one + two, content[:-1], content[:BLOCK]]
    moves = [[two, one, three], [one, three, two], [three, two, one], [one, one, three], [one, two, two]]
    others = [[one, three], [two, three], [one, two, three, three], [one, two, three, one], [one, two, three, b"\0"]]
    for variant in [*cuts, *(header + b"".join(records) for records in moves + others)]:
        # With the length that was recorded, where that can be: the length alone must not be what tells.
        for changed in (variant, variant[: len(content)].ljust(len(content), b"\0")):
            if changed != content:
                place("admitted", store).write_bytes(changed)
                with pytest.raises(FormatError):
                    read("admitted", keyring, store)


def test_what_is_sealed_opens_in_no_other_place_of_its_pack(keyring: Keyring, store: Path) -> None:
    content = place("deposit").read_bytes()
    header, (one, two) = content[:BLOCK], pages(read("deposit", keyring), content)
    for left, right in ((one, two), (two, one)):
        # A record of the same sealed parts under another object id, and one whose data set is sealed as attributes.
        other_id = left[:16] + right[16:32] + left[32:]
        a, d = int.from_bytes(one[4:8], "big"), int.from_bytes(one[8:16], "big")
        turned = b"SRR1" + u32(d) + u64(a) + one[16:40] + one[40 + d : 40 + d + a] + one[40 : 40 + d]
        place("deposit", store).write_bytes(header + other_id + turned)
        pack = read("deposit", keyring, store)
        assert pack.records == [] and pack.unreadable == [BLOCK, BLOCK + len(left)]


def test_a_record_that_does_not_open_hides_no_other(keyring: Keyring, store: Path) -> None:
    whole = read("deposit", keyring)
    changed = bytearray(place("deposit").read_bytes())
    changed[BLOCK + 100] ^= 1
    place("deposit", store).write_bytes(changed)
    pack = read("deposit", keyring, store)
    assert (pack.records, pack.unreadable) == (whole.records[1:], [BLOCK])


@pytest.mark.parametrize(
    "tail",
    [b"SRR1" + bytes(12) + os.urandom(16) + bytes(8) + b"\7" * 5000, bytes(BLOCK), b""],
    ids=["begun", "zero", "none"],
)
def test_a_deposit_ends_where_no_record_is_finished(tail: bytes, keyring: Keyring, store: Path) -> None:
    path = place("deposit", store)
    content = path.read_bytes()
    path.write_bytes(content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0") + tail)
    assert read("deposit", keyring, store) == read("deposit", keyring)


# --- keys.db


def study_key_fields(keyring: Keyring) -> tuple[dict[str, bytes], bytes, int]:
    pack_id = place("admitted").name
    with closing(sqlite3.connect(f"file:{VECTORS / 'store/keys.db'}?immutable=1", uri=True)) as db:
        db.row_factory = sqlite3.Row
        row = db.execute("SELECT * FROM study_key WHERE pack_id = ?", (pack_id,)).fetchone()
    fields = {
        "store id": keyring.store_id,
        "pack id": bytes.fromhex(row["pack_id"]),
        "key id": bytes.fromhex(row["key_id"]),
        "study tag": row["study_tag"],
        "version": u32(row["version"]),
        "pack length": u64(row["length"]),
        "frames digest": row["frames_digest"],
        "admission": u64(row["admission"]),
    }
    return fields, row["sealed"], row["version"]


@pytest.mark.parametrize(
    "field",
    ["store id", "pack id", "key id", "study tag", "version", "pack length", "frames digest", "admission"],
)
def test_a_study_key_opens_only_with_every_field_that_it_is_bound_to(field: str, keyring: Keyring) -> None:
    fields, sealed, v = study_key_fields(keyring)
    key = reader.unseal(keyring.versions[v].storage_key, context("study-key", *fields.values()), sealed)
    assert reader.scan(place("admitted").read_bytes(), key) == read("admitted", keyring)
    fields[field] = fields[field][:-1] + bytes([fields[field][-1] ^ 1])
    with pytest.raises(FormatError, match="of another key or context"):
        reader.unseal(keyring.versions[v].storage_key, context("study-key", *fields.values()), sealed)


@pytest.mark.parametrize(
    "change",
    [
        "key_id = lower(hex(randomblob(16)))",
        "pack_id = lower(hex(randomblob(16)))",
        "version = 2",
        "sealed = zeroblob(104)",
        "study_tag = zeroblob(32)",
        "length = length + 1",
        "frames_digest = zeroblob(32)",
        "admission = admission + 1",
    ],
)
def test_a_changed_row_of_keys_db_opens_no_pack(change: str, keyring: Keyring, store: Path) -> None:
    with closing(sqlite3.connect(store / "store/keys.db")) as db, db:
        assert db.execute(f"UPDATE study_key SET {change}").rowcount == 1
    with pytest.raises(FormatError):
        read("admitted", keyring, store)


# --- The product reads the same


@pytest.fixture
def product(store: Path) -> keys.keyring.Keyring:
    return keys.keyring.unlock(store / "store/keyring", parse_key_file(KEY_FILE), FileAnchors(store / "anchors"))


def opened_by_product(kind: str, root: Path, file: PackFile, product: keys.keyring.Keyring) -> OpenedPack:
    if kind == "deposit":
        head = file.header
        return OpenedPack(file, product.version(head.version).unwrap_deposit(head.wrapped, head.key_id))
    with closing(KeysDatabase(root / "store/keys.db")) as db:
        row = db.find(file.path.name)
    assert row is not None
    return OpenedPack(file, product.version(row.version).unwrap_study(row.sealed, row.place))


@pytest.mark.parametrize("secret", [Passphrase(PASSPHRASE), parse_key_file(KEY_FILE)], ids=["passphrase", "key-file"])
def test_the_product_opens_the_keyring_to_the_same_keys(
    secret: Passphrase | KeyFile, keyring: Keyring, store: Path
) -> None:
    opened = keys.keyring.unlock(store / "store/keyring", secret, FileAnchors(store / "anchors"))
    version, second = opened.version(1), keyring.versions[1]
    assert opened.store_id == keyring.store_id
    assert version.index_key() == (second.index_key, second.index_salt)
    study_key, key_id = os.urandom(32), os.urandom(16)
    wrapped = version.deposit_key().wrap(study_key, key_id)
    info = context("deposit", keyring.store_id, u32(1), key_id)
    assert reader.HPKE.decrypt(wrapped, second.deposit_key, info=info) == study_key


def test_the_product_takes_the_deposit_key_and_signs_it_to_the_same_bytes(
    keyring: Keyring, store: Path, product: keys.keyring.Keyring
) -> None:
    content = (store / "spool/public/deposit-1.key").read_bytes()
    keys.versions.read_deposit_key(content, keyring.signing_key)
    created = json.loads(content.split(b"\n")[0])["created"]
    assert product.version(1).deposit_key().signed_file(product.signing, created) == content


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_reads_the_same_from_a_pack(
    kind: str, keyring: Keyring, store: Path, product: keys.keyring.Keyring
) -> None:
    second = read(kind, keyring)
    with PackFile(place(kind, store)) as file:
        pack = opened_by_product(kind, store, file, product)
        found = [record for record in pack.records() if isinstance(record, Record)]
        assert [record.frame.encode() for record in found] == [record.frame for record in second.records]
        assert [b"".join(pack.dataset(record.frame)) for record in found] == [r.dataset for r in second.records]
        assert [msgspec.to_builtins(record.attributes) for record in found] == [r.attributes for r in second.records]
        assert frames_digest([record.frame for record in found]) == second.frames_digest


# --- What the second implementation writes, and both refuse


def written(keyring: Keyring, folder: Path, attributes: bytes, spoil: int | None = None) -> Path:
    """A deposit of one record, made after the page alone; a byte of the header may be spoiled before it is bound."""
    key, key_id, object_id = os.urandom(32), os.urandom(16), os.urandom(16)
    mlkem, x25519 = keyring.versions[1].public
    public = MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(mlkem), X25519PublicKey.from_public_bytes(x25519)
    )
    head = bytearray(bytes.fromhex("8953524D0D0A1A0A") + b"\1\1\0\x40\0\0\0\0" + keyring.store_id + key_id + bytes(16))
    if spoil is not None:
        head[spoil] ^= 2
    info = context("deposit", keyring.store_id, u32(1), key_id)
    start = (bytes(head) + u32(1) + reader.HPKE.encrypt(key, public, info=info)).ljust(BLOCK, b"\0")
    data = seal(key, context("dataset", bytes(head), object_id), b"data set")
    about = seal(key, context("attributes", bytes(head), object_id), attributes)
    path = folder / key_id.hex()
    path.write_bytes(start + b"SRR1" + u32(len(about)) + u64(len(data)) + object_id + bytes(8) + data + about)
    return path


def changed_attributes(keyring: Keyring, *path: str, value: Any = None) -> bytes:
    attributes: dict[str, Any] = copy.deepcopy(read("deposit", keyring).records[0].attributes)
    inner = attributes
    for name in path[:-1]:
        inner = inner[name]
    if path and value is None:
        del inner[path[-1]]
    elif path:
        inner[path[-1]] = value
    return json.dumps(attributes).encode()


def read_by_both(path: Path, keyring: Keyring, product: keys.keyring.Keyring) -> list[int]:
    """How many records each of the two reads from a deposit; -1 for a pack that is refused."""
    counts = []
    try:
        counts.append(len(reader.read_pack(path, keyring).records))
    except FormatError:
        counts.append(-1)
    try:
        with PackFile(path) as file:
            pack = opened_by_product("deposit", path.parent, file, product)
            counts.append(sum(isinstance(record, Record) for record in pack.records()))
    except PackError:
        counts.append(-1)
    return counts


def test_the_product_reads_what_the_second_implementation_writes(
    keyring: Keyring, tmp_path: Path, product: keys.keyring.Keyring
) -> None:
    path = written(keyring, tmp_path, changed_attributes(keyring))
    assert read_by_both(path, keyring, product) == [1, 1]
    with PackFile(path) as file:
        pack = opened_by_product("deposit", tmp_path, file, product)
        (record,) = pack.records()
        assert isinstance(record, Record)
        assert b"".join(pack.dataset(record.frame)) == b"data set"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["more"], 1),
        (["received", "more"], "1"),
        (["dataset", "00080018", "more"], 1),
        (["dataset", "00080016"], None),
        (["dataset", "00080018"], None),
        (["dataset", "0020000D"], None),
        (["dataset", "0020000E"], None),
        (["dataset", "0008103e"], {"vr": "LO"}),
        (["undecoded", "00100010"], {"charset": [], "raw": "?"}),
        (["received", "at"], None),
        (["transfer_syntax"], None),
        (["transfer_syntax"], "1.2.x"),
        (["dataset", "00080018"], {"vr": "UI"}),
        (["dataset", "0020000D"], {"vr": "UI", "Value": ["1." + "2" * 63]}),
        (["format"], 2),
        (["format"], None),
    ],
    ids=lambda part: "/".join(part) if isinstance(part, list) else json.dumps(part),
)
def test_both_take_a_record_with_other_attributes_than_the_page_lists_for_unreadable(
    path: list[str], value: Any, keyring: Keyring, tmp_path: Path, product: keys.keyring.Keyring
) -> None:
    spoiled = written(keyring, tmp_path, changed_attributes(keyring, *path, value=value))
    assert read_by_both(spoiled, keyring, product) == [0, 0]


@pytest.mark.parametrize("at", [0, 7, 8, 9, 10, 11, 12, 15, 48, 63])
def test_both_refuse_a_pack_of_another_kind_even_if_all_in_it_is_authentic(
    at: int, keyring: Keyring, tmp_path: Path, product: keys.keyring.Keyring
) -> None:
    path = written(keyring, tmp_path, changed_attributes(keyring), at)
    assert read_by_both(path, keyring, product) == [-1, -1]


JUNK = b"\7" * BLOCK


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (b"", 2),
        (JUNK, 2),
        (JUNK + JUNK, 2),
        (b"SRR1" + JUNK[4:], 2),
        (b"SRR1" + bytes(12) + JUNK[16:], 2),  # a byte that must be zero is not: no frame
        (b"SRR2" + bytes(12) + JUNK[16:32] + bytes(8) + JUNK[40:], 2),
        (b"SRR1" + bytes(12) + JUNK[16:32] + bytes(8) + JUNK[40:], 2),  # empty frames: what opens behind them counts
        (bytes(BLOCK), 2),
        (bytes(40) + JUNK[40:], 2),
    ],
)
def test_both_find_the_same_records_around_what_is_none(
    between: bytes, found: int, keyring: Keyring, store: Path, product: keys.keyring.Keyring
) -> None:
    content = place("deposit").read_bytes()
    one, two = pages(read("deposit", keyring), content)
    for tail in (b"", b"\1", b"SRR1" + JUNK[:35]):
        place("deposit", store).write_bytes(content[:BLOCK] + one + between + two + tail)
        assert read_by_both(place("deposit", store), keyring, product) == [found, found]


@pytest.mark.parametrize("at", [1236, 4095])
def test_both_refuse_a_pack_whose_header_does_not_end_with_zeros(
    at: int, keyring: Keyring, tmp_path: Path, product: keys.keyring.Keyring
) -> None:
    path = written(keyring, tmp_path, changed_attributes(keyring))
    content = bytearray(path.read_bytes())
    content[at] = 1
    path.write_bytes(content)
    assert read_by_both(path, keyring, product) == [-1, -1]
