"""The fence: packs that gates let go because the vault says so, and for nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys import encoding, signed
from keys.versions import Version, store_id_of
from storage import attributes
from storage.deposit import FENCE, Deposits, Fence, PublishedKeys
from storage.openpack import Record
from storage.packfile import PackFile

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
STORE = store_id_of(PUBLIC)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    folder = tmp_path / "public"
    folder.mkdir()
    version = Version(STORE, 1, bytes(range(32, 64)))
    (folder / "deposit-1.key").write_bytes(version.deposit_key().signed_file(SIGNING, "2026-01-31T12:00:00Z"))
    return folder


@pytest.fixture
def gate(tmp_path: Path, public: Path) -> Iterator[Deposits]:
    """A gate's packs; time stands still, so that none closes because it is idle."""
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    deposits = Deposits(
        incoming,
        STORE,
        PublishedKeys(public, PUBLIC),
        size_limit=1 << 30,
        idle_seconds=5,
        open_per_peer=16,
        fence=Fence(public, PUBLIC),
        clock=lambda: 1000.0,
    )
    yield deposits
    deposits.close_all()
    deposits._writers.shutdown()


def tell(public: Path, *packs: str, signing: Ed25519PrivateKey = SIGNING, label: str = FENCE) -> bytes:
    """Write a fence as the vault does; return it."""
    content = signed.write(label, {"created": "", "format": 1, "packs": sorted(packs), "store_id": ""}, signing)
    encoding.replace(public / FENCE, content)
    return content


def described(study: str) -> bytes:
    uids = {attributes.SOP_CLASS: "1.2", attributes.SOP_INSTANCE: "1.2.3", attributes.STUDY: study}
    elements = {tag: attributes.Element("UI", [uid]) for tag, uid in (uids | {attributes.SERIES: "1.2.4"}).items()}
    return attributes.encode(attributes.Attributes(1, "1.2", elements, {}, attributes.Received(*[""] * 6)))


def pack_of(record: Record) -> Path:
    """Return the pack that a record goes into."""
    name: str = record._pack.name
    return Path(os.readlink(f"/proc/self/fd/{record._pack.descriptor}")).with_name(name)


def add(gate: Deposits, study: str) -> Path:
    record = gate.begin(study, "CT1")
    path = pack_of(record)
    record.finish(described(study))
    return path


def is_open(path: Path) -> bool:
    with PackFile(path) as file:
        return not file.try_lock()


def test_a_fenced_pack_is_let_go_and_no_other_and_the_next_object_goes_into_a_new_one(
    gate: Deposits, public: Path
) -> None:
    one, two = add(gate, "1.1"), add(gate, "1.2")
    gate.close_idle()
    assert is_open(one)
    assert is_open(two)
    tell(public, one.name)
    gate.close_idle()
    assert not is_open(one)
    assert is_open(two)
    assert add(gate, "1.1") != one
    assert add(gate, "1.2") == two


def test_a_fenced_pack_that_is_leased_is_let_go_when_its_object_is_whole(gate: Deposits, public: Path) -> None:
    record = gate.begin("1.1", "CT1")
    path = pack_of(record)
    tell(public, path.name)
    gate.close_idle()
    assert is_open(path)
    record.write(memoryview(bytes(3 << 20)))
    record.finish(described("1.1"))
    assert not is_open(path)
    assert add(gate, "1.1") != path


@pytest.mark.parametrize("kind", ["another store's", "another label", "changed", "cut", "empty"])
def test_a_fence_that_this_store_did_not_sign_closes_nothing_and_takes_nothing_back(
    gate: Deposits, public: Path, kind: str
) -> None:
    one, two = add(gate, "1.1"), gate.begin("1.2", "CT1")
    tell(public, pack_of(two).name)
    gate.close_idle()
    content = tell(
        public,
        one.name,
        signing=OTHER if kind == "another store's" else SIGNING,
        label="certificate" if kind == "another label" else FENCE,
    )
    if kind in {"changed", "cut", "empty"}:
        whole = bytearray(content)
        whole[5] ^= 1
        encoding.replace(public / FENCE, {"changed": bytes(whole), "cut": content[:-1], "empty": b""}[kind])
    gate.close_idle()
    assert is_open(one)
    # What was told before still holds.
    path = pack_of(two)
    two.finish(described("1.2"))
    assert not is_open(path)


def test_an_older_fence_put_back_closes_the_packs_that_it_names_and_nothing_else(gate: Deposits, public: Path) -> None:
    one, two = add(gate, "1.1"), add(gate, "1.2")
    older = tell(public, one.name)
    tell(public)
    gate.close_idle()
    assert is_open(one)
    encoding.replace(public / FENCE, older)
    gate.close_idle()
    assert not is_open(one)
    assert is_open(two)
    assert add(gate, "1.1") != one


def test_of_two_fences_within_a_tick_of_the_clock_the_second_is_seen(public: Path) -> None:
    fence = Fence(public, PUBLIC)
    tell(public, "aa")
    os.utime(public / FENCE, ns=(10**18, 10**18))
    fence.look()
    tell(public, "bb")
    os.utime(public / FENCE, ns=(10**18, 10**18))
    fence.look()
    assert fence.packs == {"bb"}


def test_a_fence_that_could_not_be_read_is_read_at_the_next_look(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    fence = Fence(public, PUBLIC)
    fence.look()
    tell(public, "aa")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", broken)
        fence.look()
    assert not fence.packs
    fence.look()
    assert fence.packs == {"aa"}
