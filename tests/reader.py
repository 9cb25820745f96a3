"""A second reader of Strongroom's files, written from docs/format.md and sharing no code with the product.

It is strict and simple, not fast: whatever the page forbids raises ``FormatError``. One thing is no error because the
page says so: a record that does not open is passed over, and its place is told in ``Pack.unreadable``.
"""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from hmac import compare_digest
from hmac import digest as hmac_digest
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

BLOCK, CHUNK, TAG = 4096, 16384, 16
HPKE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
u32, u64 = struct.Struct(">I").pack, struct.Struct(">Q").pack
# The keys of each JSON object and the types of their values.
HEAD = {"created": str, "format": int, "generation": int, "signing_key": str, "slots": list, "store_id": str}
SLOT = {"created": str, "id": str, "label": str, "parameters": dict, "sealed": str, "type": str}
ARGON2 = {"iterations": int, "lanes": int, "memory_kib": int, "salt": str}
BODY = {"audit_key": str, "authority": object, "signing_seed": str, "tag_key": str, "versions": list}
VERSION = {"anchor": dict, "created": str, "root": str, "state": str, "version": int}
DEPOSIT_KEY = {"created": str, "format": int, "mlkem768": str, "store_id": str, "version": int, "x25519": str}
ATTRIBUTES = {"format": int, "transfer_syntax": str, "dataset": dict, "undecoded": dict, "received": dict}
RECEIVED = dict.fromkeys(("at", "association", "calling", "called", "address", "certificate"), str)
# What Python and its libraries raise over malformed input: a file that makes them do so is no file of ours.
BROKEN = (ValueError, TypeError, LookupError, RecursionError, struct.error, InvalidTag, InvalidSignature, sqlite3.Error)


class FormatError(Exception):
    """A file is not what docs/format.md says."""


class Version(NamedTuple):
    storage_key: bytes  # W_v
    index_key: bytes
    index_salt: bytes
    deposit_key: MLKEM768X25519PrivateKey  # D_v
    public: tuple[bytes, bytes]  # its public halves: ML-KEM-768, X25519


class Keyring(NamedTuple):
    store_id: bytes
    generation: int
    signing_key: bytes
    tag_key: bytes
    versions: dict[int, Version]


class Record(NamedTuple):
    frame: bytes
    dataset: bytes
    attributes: dict[str, Any]


class Pack(NamedTuple):
    records: list[Record]
    unreadable: list[int]  # the places of records that do not open

    @property
    def frames_digest(self) -> bytes:
        return sha256(b"".join(record.frame for record in self.records)).digest()


@contextmanager
def strict() -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise FormatError(repr(error)) from error


def require(condition: object, what: str) -> None:
    if not condition:
        raise FormatError(what)


def context(label: str, *fields: bytes) -> bytes:
    return f"strongroom/1/{label}\0".encode() + b"".join(u32(len(field)) + field for field in fields)


def derive(secret: bytes, length: int, label: str, *fields: bytes) -> bytes:
    return HKDFExpand(SHA512(), length, context(f"derive/{label}", *fields)).derive(secret)


def chunk_keys(key: bytes, salt: bytes, bound: bytes) -> tuple[AESGCM, int, bytes]:
    """Cipher, base nonce and commitment of a seal."""
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + bound
    stream = HKDFExpand(SHA512(), 32 + 12 + 32, info).derive(key)
    return AESGCM(stream[:32]), int.from_bytes(stream[32:44], "big"), stream[44:]


@strict()
def unseal(key: bytes, bound: bytes, sealed: bytes) -> bytes:
    cipher, base, commitment = chunk_keys(key, sealed[:24], bound)
    require(compare_digest(commitment, sealed[24:56]), "a seal is cut, or of another key or context")
    body, step = sealed[56:], CHUNK + TAG
    # A full last chunk is a cut-off message, and a rest shorter than a tag is no chunk.
    require(len(body) % step >= TAG, "a seal does not end with a short chunk")
    chunks = enumerate(body[at : at + step] for at in range(0, len(body), step))
    return b"".join(cipher.decrypt((base ^ i).to_bytes(12, "big"), chunk, None) for i, chunk in chunks)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def shaped(value: Any, types: Mapping[str, object]) -> dict[str, Any]:
    """Exactly these keys with values of exactly these types (a bool is no int)."""
    require(isinstance(value, dict) and value.keys() == types.keys(), f"keys are not {', '.join(types)}")
    require(all(kind in (object, type(value[name])) for name, kind in types.items()), "a value of a wrong type")
    require(value.get("format", 1) == 1, "an object of another format")
    return value  # type: ignore[no-any-return]


def canonical_json(data: bytes, types: Mapping[str, object]) -> dict[str, Any]:
    value = shaped(json.loads(data.decode()), types)
    require(canonical(value) == data, "JSON is not canonical")
    return value


def b64(text: str, length: int | None = None) -> bytes:
    data = base64.b64decode(text, validate=True)
    # Decoders let unused bits of the last digit pass: one value would have several spellings.
    require(base64.b64encode(data).decode() == text and length in (None, len(data)), "base64 of a wrong form")
    return data


def unhex(text: str, length: int) -> bytes:
    require(re.fullmatch(r"[0-9a-f]*", text) and len(text) == 2 * length, "not hex of the right length")
    return bytes.fromhex(text)


def root_key(slots: list[dict[str, Any]], store: bytes, secret: bytes | str) -> bytes:
    """SRK, from the first slot that opens."""
    for slot in slots:
        kind, parameters, slot_id = shaped(slot, SLOT)["type"], slot["parameters"], unhex(slot["id"], 16)
        bound = context("slot", store, slot_id, kind.encode(), sha256(canonical(parameters)).digest())
        sealed, key = b64(slot["sealed"], 104), None
        require(kind in ("key-file", "passphrase"), "a slot of an unknown type")
        values = [shaped(parameters, ARGON2 if kind == "passphrase" else {})[name] for name in sorted(parameters)]
        if kind == "key-file" and isinstance(secret, bytes):
            title, text, rest = secret.decode().split("\n")
            require(title == "STRONGROOM-KEY-FILE-1" and not rest, "not a key file")
            key = derive(b64(text, 32), 32, "slot-key-file", store, slot_id)
        elif kind == "passphrase":
            iterations, lanes, memory, salt = values
            require(iterations <= 64 and lanes <= 16 and memory <= 4 << 20, "Argon2id would take too much")
            kdf = Argon2id(salt=b64(salt, 16), length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
            key = kdf.derive(unicodedata.normalize("NFKC", secret).encode()) if isinstance(secret, str) else None
        if key:
            with suppress(FormatError):  # of another secret
                return unseal(key, bound, sealed)
    raise FormatError("no slot opens with this secret")


@strict()
def open_keyring(data: bytes, secret: bytes | str, anchors: Path) -> Keyring:
    """Open a keyring; ``secret`` is the content of a key file, or a passphrase as text."""
    end = 12 + int.from_bytes(data[8:12], "big")
    require(data[:8] == b"\x89SRK\r\n\x1a\n" and end <= 12 + 65536, "not a keyring, or its header is too long")
    require(len(data) - end <= 1 << 20, "the keyring's body is too long")
    head = canonical_json(data[12:end], HEAD)
    public, store, generation = b64(head["signing_key"], 32), unhex(head["store_id"], 16), head["generation"]
    require(store == sha256(public).digest()[:16], "store id and signing key do not belong together")
    seen = re.fullmatch(r"([0-9a-f]{32}) ([0-9]+)\n", (anchors / "generation").read_text("ascii", "replace"))
    if not seen or seen[1] != head["store_id"] or not int(seen[2]) <= generation < 1 << 64:
        raise FormatError("the anchors are of another store or know a newer keyring")
    bound = context("keyring", store, u64(generation), sha256(data[12:end]).digest())
    body = canonical_json(unseal(root_key(head["slots"], store, secret), bound, data[end:]), BODY)
    if body["authority"] is not None:
        b64(shaped(body["authority"], {"certificate": str, "key": str})["key"])
    signer = Ed25519PrivateKey.from_private_bytes(b64(body["signing_seed"], 32))
    require(signer.public_key().public_bytes_raw() == public, "the signing key is not the seed's")
    b64(body["audit_key"], 32)
    versions: dict[int, Version] = {}
    for entry in body["versions"]:
        v = shaped(entry, VERSION)["version"]
        require(0 < v < 1 << 32 and v not in versions and entry["state"] == "current", "a wrong version")
        require(shaped(entry["anchor"], {"id": object, "provider": str})["provider"] == "file", "no anchor file")
        require(len(anchor := (anchors / f"anchor-{v}").read_bytes()) == 32, "an anchor is not 32 bytes")
        place = store, u32(v)
        root = unseal(derive(anchor, 32, "anchor", *place), context("version-root", *place), b64(entry["root"], 104))
        versions[v] = derive_version(root, *place)
    return Keyring(store, generation, public, b64(body["tag_key"], 32), versions)


def derive_version(root: bytes, *place: bytes) -> Version:
    storage, index = derive(root, 32, "storage-key", *place), derive(root, 48, "index", *place)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(derive(root, 64, "deposit-mlkem768", *place))
    x25519 = X25519PrivateKey.from_private_bytes(derive(root, 32, "deposit-x25519", *place))
    public = mlkem.public_key().public_bytes_raw(), x25519.public_key().public_bytes_raw()
    return Version(storage, index[:32], index[32:], MLKEM768X25519PrivateKey(mlkem, x25519), public)


@strict()
def read_deposit_key(data: bytes, signing_key: bytes) -> tuple[int, tuple[bytes, bytes]]:
    """Version and public halves (ML-KEM-768, X25519) of ``deposit-<v>.key``, once its signature is verified."""
    text, signature, rest = data.split(b"\n")
    require(not rest, "a deposit key of more than two lines")
    signer = Ed25519PublicKey.from_public_bytes(signing_key)
    signer.verify(b64(signature.decode(), 64), context("deposit-key") + text)
    key, store = canonical_json(text, DEPOSIT_KEY), sha256(signing_key).digest()[:16]
    require(unhex(key["store_id"], 16) == store and 0 < key["version"] < 1 << 32, "a deposit key of another store")
    return key["version"], (b64(key["mlkem768"], 1184), b64(key["x25519"], 32))


def read_attributes(data: bytes) -> dict[str, Any]:
    value = shaped(json.loads(data.decode()), ATTRIBUTES)
    uids = [value["dataset"][tag]["Value"][0] for tag in ("00080016", "00080018", "0020000D", "0020000E")]
    for uid in (value["transfer_syntax"], *uids):
        require(re.fullmatch(r"[0-9]+(\.[0-9]+)*", uid) and len(uid) <= 64, "a UID is malformed")
    require(all(re.fullmatch(r"[0-9A-F]{8}", tag) for tag in [*value["dataset"], *value["undecoded"]]), "no tag")
    for element in value["dataset"].values():
        shaped({"Value": []} | element, {"vr": str, "Value": list})
    for element in value["undecoded"].values():
        b64(shaped(element, {"charset": list, "raw": str})["raw"])
    received = shaped(value["received"], RECEIVED)
    unhex(received["association"], len(received["association"]) // 2)
    unhex(received["certificate"], 32 if received["certificate"] else 0)
    return value


@strict()
def open_record(pack: bytes, at: int, key: bytes) -> tuple[Record, int]:
    """The record at this place, and where it ends."""
    frame = pack[at : at + 40]
    a, d = int.from_bytes(frame[4:8], "big"), int.from_bytes(frame[8:16], "big")
    require(len(frame) == 40 and frame[:4] == b"SRR1" and not any(frame[32:]), "not a frame")
    middle, end = at + 40 + d, at + 40 + d + a
    require(72 <= a <= 65536 + 136 and d >= 72 and end <= len(pack), "lengths out of range")
    dataset = unseal(key, context("dataset", pack[:64], frame[16:32]), pack[at + 40 : middle])
    attributes = unseal(key, context("attributes", pack[:64], frame[16:32]), pack[middle:end])
    return Record(frame, dataset, read_attributes(attributes)), end


def is_empty(frame: bytes) -> bool:
    """A frame where a writer is or was: all zero, the end, or a whole one without lengths."""
    return not any(frame) or (len(frame) == 40 and frame[:4] == b"SRR1" and not any(frame[4:16] + frame[32:]))


def scan(pack: bytes, key: bytes) -> Pack:
    content, at, empty = Pack([], []), BLOCK, False
    while at < len(pack):
        if is_empty(pack[at : at + 40]):
            # The pack ends here, unless a record behind it opens.
            empty = True
        else:
            try:
                record, end = open_record(pack, at, key)
            except FormatError:
                if not empty:
                    content.unreadable.append(at)
            else:
                content.records.append(record)
                at = -(-end // BLOCK) * BLOCK
                require(not any(pack[end:at]), "what fills the gap after a record is not zero")
                empty = False
                continue
        at = next((n for n in range(at + BLOCK, len(pack), BLOCK) if pack[n : n + 4] == b"SRR1"), len(pack))
    return content


@strict()
def read_pack(path: Path, keyring: Keyring, keys_db: Path | None = None) -> Pack:
    """Read a deposit, or with ``keys_db`` an admitted pack; no process may have that database open."""
    pack = path.read_bytes()
    require(len(pack) >= BLOCK and pack[:8] == b"\x89SRM\r\n\x1a\n", "not a pack")
    require(pack[8:16] == b"\1\1\0\x40\0\0\0\0", "a pack of another version, suite or kind")
    require(pack[16:32] == keyring.store_id, "a pack of another store")
    require(pack[32:48] == unhex(path.name, 16), "a pack under another one's name")
    require(not any(pack[48:64] + pack[1236:BLOCK]), "zeros of the header are not zero")
    if keys_db is None:
        v, info = int.from_bytes(pack[64:68], "big"), context("deposit", pack[16:32], pack[64:68], pack[32:48])
        return scan(pack, HPKE.decrypt(pack[68:1236], keyring.versions[v].deposit_key, info=info))
    require(path.parent.name == path.name[:2], "a pack in another one's folder")
    require(not any(pack[64:1236]), "an admitted pack has a deposit's study key")
    require(not Path(f"{keys_db}-wal").exists(), "keys.db is open, or has rows that are not written back")
    columns = "key_id, version, sealed, study_tag, length, frames_digest, admission"
    with closing(sqlite3.connect(f"{keys_db.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
        rows = db.execute(f"SELECT {columns} FROM study_key WHERE pack_id = ?", (path.name,)).fetchall()
    require(len(rows) == 1, "keys.db does not know the pack")
    key_id, v, sealed, tag, length, digest, admission = rows[0]
    whole = key_id == path.name and (length, len(sealed)) == (len(pack), 104) and admission > 0
    require(whole, "keys.db says something else")
    bound = (pack[16:32], pack[32:48], pack[32:48], tag, u32(v), u64(length), digest, u64(admission))
    content = scan(pack, unseal(keyring.versions[v].storage_key, context("study-key", *bound), sealed))
    require(content.frames_digest == digest, "records are missing, more, changed or in another order")
    for record in content.records:
        study = b"study\0" + record.attributes["dataset"]["0020000D"]["Value"][0].encode()
        require(hmac_digest(keyring.tag_key, study, "sha256") == tag, "a record of another study")
    return content
