"""A folder of backups: what is changed, missing, foreign or half made is seen, and nothing beside it is touched."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.versions import StudyKeyPlace
from storage import backup
from storage.backup import MANIFEST, MARK, BackupError, Folder, Listed, Manifest
from storage.keysdb import KeysDatabase, StudyKeyRecord

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = SIGNING.public_key().public_bytes_raw()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
STORE = "ab" * 16
RAW = "fe" * 16


def name_of(number: int) -> str:
    return f"20260131T12000{number}Z-0000000{number}"


def pack(number: int) -> str:
    """Return a pack's name; some of them lie in one folder."""
    return f"{number % 2:02x}" + f"{number:030x}"


def content(number: int) -> bytes:
    return random.Random(number).randbytes(8192 + number)


class Maker:
    """A folder of backups and the store that they are made of, without keys."""

    def __init__(self, home: Path) -> None:
        self.folder = Folder(home / "backup")
        self.packs = home / "objects"
        self.packs.mkdir()
        self.copied = 0

    def keys_db(self, path: Path, numbers: list[int]) -> None:
        """Write a keys.db that names packs."""
        database = KeysDatabase(path.with_name("making.db"), migrate=True)
        for number in numbers:
            pack_id = bytes.fromhex(pack(number))
            place = StudyKeyPlace(pack_id, pack_id, bytes(32), len(content(number)), bytes(32), number)
            database.add(StudyKeyRecord(place, 1, bytes(104)))
        database.copy(path)
        database.close()
        for leftover in path.parent.glob("making.db*"):
            leftover.unlink()

    def files(self, making: Path, numbers: list[int]) -> None:
        """Put into a generation what one has: files, one below a folder, and keys.db."""
        self.keys_db(making / "keys.db", numbers)
        (making / "keyring").write_bytes(b"keyring")
        (making / "audit").mkdir()
        (making / "audit" / "1.log").write_bytes(b"chain")

    def make(self, generation: int, numbers: list[int], **changes: object) -> Path:
        """Make a generation of packs, as the vault does."""
        self.folder.prepare(STORE)
        making = self.folder.begin(name_of(generation))
        self.files(making, numbers)
        for number in numbers:
            (self.packs / pack(number)).write_bytes(content(number))
            if not self.folder.has(pack(number), len(content(number))):
                self.copied += 1
                assert self.folder.take(self.packs / pack(number), pack(number)) == len(content(number))
        return self.folder.finish(making, self.manifest(making, generation, **changes), SIGNING)

    def manifest(self, making: Path, generation: int, **changes: object) -> Manifest:
        packs = list(backup.lengths(making / "keys.db"))
        found = Manifest(
            audit=1,
            bytes=sum(length for _, length in packs),
            created="2026-01-31T12:00:00Z",
            digest=backup.digest(packs),
            files=backup.listed(making),
            format=1,
            generation=generation,
            id=name_of(generation),
            packs=len(packs),
            raw=[],
            store_id=STORE,
            version=1,
            waiting=0,
        )
        return msgspec.structs.replace(found, **changes)

    def problems(self, generation: Path) -> list[str]:
        return list(self.folder.check(generation, self.folder.read(generation, KEY)))


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


# --- a whole one


def test_a_generation_comes_back_as_it_was_made_and_the_newest_is_the_one(maker: Maker) -> None:
    first = maker.make(1, [1, 2, 3])
    second = maker.make(2, [2, 3, 4])
    assert maker.folder.generations() == [first.name, second.name]
    assert maker.folder.generation() == second
    assert maker.folder.generation(first.name) == first
    manifest = maker.folder.read(first, KEY)
    assert (manifest.id, manifest.packs, manifest.bytes) == (first.name, 3, 3 * 8192 + 6)
    assert {one.name for one in manifest.files} == {"keys.db", "keyring", "audit/1.log"}
    assert maker.problems(first) == maker.problems(second) == []
    assert maker.folder.pack(pack(4)).read_bytes() == content(4)


def test_only_packs_that_are_not_there_are_copied_and_the_others_keep_their_file(maker: Maker) -> None:
    maker.make(1, [1, 2, 3])
    before = {path: path.stat() for path in (maker.folder.path / "packs").rglob("*") if path.is_file()}
    maker.make(2, [1, 2, 3, 4])
    assert maker.copied == 4
    for path, found in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (found.st_ino, found.st_mtime_ns)


def test_what_is_copied_has_its_name_only_when_it_is_whole_and_is_the_owners_alone(maker: Maker) -> None:
    generation = maker.make(1, [1])
    assert maker.folder.pack(pack(1)).stat().st_mode & 0o777 == 0o600
    home = maker.folder.path
    for folder in (home, home / "packs", home / "generations", generation, maker.folder.pack(pack(1)).parent):
        assert folder.stat().st_mode & 0o077 == 0
    with pytest.raises(FileNotFoundError):
        maker.folder.take(maker.packs / "none", pack(9))
    assert not maker.folder.has(pack(9), 0)


# --- what was changed


def test_a_manifest_that_was_changed_at_any_byte_does_not_hold(maker: Maker) -> None:
    generation = maker.make(1, [1])
    path = generation / MANIFEST
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in (1, 0x20, 0x80):
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            with pytest.raises(BackupError, match="does not hold"):
                maker.folder.read(generation, KEY)
    for changed in (good[:-1], good + b"\n", good + good, b""):
        path.write_bytes(changed)
        with pytest.raises(BackupError, match="does not hold"):
            maker.folder.read(generation, KEY)
    path.unlink()
    with pytest.raises(BackupError, match="cannot be read"):
        maker.folder.read(generation, KEY)


def test_a_manifest_of_another_store_or_of_another_shape_does_not_hold(maker: Maker) -> None:
    generation = maker.make(1, [1])
    manifest = maker.folder.read(generation, KEY)
    for content in (
        backup.signed.write(backup.LABEL, manifest, OTHER),
        backup.signed.write(backup.DRILL, manifest, SIGNING),
        backup.signed.write(backup.LABEL, {**msgspec.to_builtins(manifest), "more": 1}, SIGNING),
        backup.signed.write(backup.LABEL, {"id": manifest.id}, SIGNING),
        backup.signed.write(backup.LABEL, [], SIGNING),
    ):
        (generation / MANIFEST).write_bytes(content)
        with pytest.raises(BackupError, match="does not hold"):
            maker.folder.read(generation, KEY)


def test_an_old_generation_does_not_pass_for_a_new_one_under_its_name(maker: Maker) -> None:
    old = maker.make(1, [1])
    as_new = old.with_name(name_of(2))
    os.rename(old, as_new)
    with pytest.raises(BackupError, match="under another name"):
        maker.folder.read(as_new, KEY)


def flip(path: Path) -> None:
    found = path.read_bytes()
    path.write_bytes(found[:-1] + bytes([found[-1] ^ 1]))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("change", [flip, longer, shorter, Path.unlink])
@pytest.mark.parametrize("name", ["keys.db", "keyring", "audit/1.log"])
def test_each_file_that_is_missing_longer_shorter_or_changed_is_named(
    maker: Maker, name: str, change: Callable[[Path], None]
) -> None:
    generation = maker.make(1, [1, 2])
    change(generation / name)
    found = maker.problems(generation)
    # What keys.db names cannot be compared when it cannot be read.
    assert found[0].startswith(name)
    assert {problem.split(":")[0].split(" ")[0] for problem in found} == {name}


@pytest.mark.parametrize("change", [longer, shorter, Path.unlink])
def test_a_pack_that_is_missing_or_of_another_length_is_named(maker: Maker, change: Callable[[Path], None]) -> None:
    generation = maker.make(1, [1, 2, 3])
    change(maker.folder.pack(pack(2)))
    assert maker.problems(generation) == [f"pack {pack(2)} is missing, or not of {len(content(2))} bytes"]
    # The next backup puts it in its place.
    maker.make(2, [1, 2, 3])
    assert maker.problems(generation) == []


def test_a_missing_raw_file_of_the_quarantine_is_named(maker: Maker) -> None:
    generation = maker.make(1, [1], raw=[RAW])
    assert maker.problems(generation) == [f"pack {RAW} of the quarantine is missing"]


def test_a_keys_db_that_names_other_packs_than_the_manifest_is_seen(maker: Maker) -> None:
    for number, change in enumerate(({"packs": 3}, {"bytes": 1}, {"digest": "00" * 32}), 1):
        generation = maker.make(number, [1, 2], **change)
        assert maker.problems(generation) == ["keys.db names other packs than the manifest"]


def test_files_that_somebody_added_are_named(maker: Maker, tmp_path: Path) -> None:
    generation = maker.make(1, [1])
    (generation / "settings" / "peers.d").mkdir(parents=True)
    (generation / "settings" / "peers.d" / "EVIL.toml").write_bytes(b"")
    (generation / "ledger-9.db").symlink_to(tmp_path / "elsewhere")
    (generation / "more").symlink_to(tmp_path)
    assert maker.problems(generation) == [
        "ledger-9.db is not in the manifest",
        "more is not in the manifest",
        "settings/peers.d/EVIL.toml is not in the manifest",
    ]


@pytest.mark.parametrize(
    "name", ["../outside", "../../../outside", "audit/../../outside", "linked/outside", "{outside}"]
)
def test_a_name_that_leads_out_of_the_folder_is_never_followed_though_the_store_signed_it(
    maker: Maker, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    name = name.format(outside=outside)
    maker.folder.prepare(STORE)
    making = maker.folder.begin(name_of(1))
    maker.files(making, [])
    (making / "linked").symlink_to(tmp_path)
    (making.parent / "outside").write_bytes(b"secret")
    manifest = maker.manifest(making, 1)
    manifest.files.append(Listed(name, 6, backup.sha256(outside)))
    generation = maker.folder.finish(making, manifest, SIGNING)
    assert f"'{name}' is no file in the generation" in maker.problems(generation)


@pytest.mark.parametrize("name", ["../" * 3 + "outside", "/etc/hostname", "ab" * 15 + "/x", "AB" * 16, "", ".."])
def test_a_pack_name_that_is_none_is_refused_in_the_manifest_and_in_keys_db(maker: Maker, name: str) -> None:
    generation = maker.make(1, [1], raw=[name])
    assert maker.problems(generation) == [f"pack {name[:32]} of the quarantine is missing"]
    assert set(maker.folder.named(generation)) == {pack(1)}
    second = maker.folder.begin(name_of(2))
    maker.files(second, [1])
    database = KeysDatabase(second / "keys.db")
    database._db.execute("UPDATE study_key SET pack_id = ?", [name])
    database.copy(second / "other.db")
    database.close()
    with pytest.raises(backup.DatabaseError, match="no pack's name"):
        list(backup.lengths(second / "other.db"))


# --- the folder


def test_a_folder_with_other_files_or_of_another_store_is_refused_and_left_as_it_is(
    maker: Maker, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_bytes(b"mine")
    with pytest.raises(BackupError, match="other files"):
        Folder(taken).prepare(STORE)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    maker.make(1, [1])
    with pytest.raises(BackupError, match="another store"):
        maker.folder.prepare("cd" * 16)
    assert maker.folder.generations() == [name_of(1)]


def test_a_folder_whose_mark_says_nothing_is_no_folder_of_backups(maker: Maker) -> None:
    maker.make(1, [1])
    for found in (b"", b"[]", b"{}", b"\xff"):
        (maker.folder.path / MARK).write_bytes(found)
        with pytest.raises(BackupError, match="no folder of backups"):
            maker.folder.store_id()
    with pytest.raises(BackupError, match="holds no backup"):
        Folder(maker.packs).generation()
    with pytest.raises(BackupError, match="holds no backup nothing"):
        maker.folder.generation("nothing")


def test_a_folder_whose_mark_was_never_finished_is_taken(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "backup")
    folder.path.mkdir()
    (folder.path / f"{MARK}.new").write_bytes(b"{")
    folder.prepare(STORE)
    assert folder.store_id() == STORE


def test_what_a_backup_that_broke_off_left_is_removed_and_whole_ones_stay(maker: Maker) -> None:
    whole = maker.make(1, [1])
    making = maker.folder.begin(name_of(2))
    maker.files(making, [1, 2])
    half = maker.folder.pack(pack(1)).with_name(pack(3) + ".new")
    half.write_bytes(b"half")
    assert maker.folder.generations() == [whole.name]
    maker.folder.prepare(STORE)
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]
    assert not half.exists()
    assert maker.problems(whole) == []


def test_names_are_durable_before_the_generation_has_its_own(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, str]] = []
    sync, rename = backup.encoding.sync_folder, os.rename
    monkeypatch.setattr(backup.encoding, "sync_folder", lambda path: (steps.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(os, "rename", lambda *names: (steps.append(("rename", names[1].name)), rename(*names)))
    maker.folder.prepare(STORE)
    # Copied by a backup that was killed then: nobody made these names durable.
    (maker.packs / pack(1)).write_bytes(content(1))
    maker.folder.take(maker.packs / pack(1), pack(1))
    steps.clear()
    generation = maker.make(1, [1, 2])
    named = steps.index(("rename", generation.name))
    for folder in ("backup", "audit", f"{generation.name}.making", "packs", "00", "01"):
        assert ("sync", folder) in steps[:named], folder
    assert steps[named + 1] == ("sync", "generations")


# --- what is removed


def test_pruning_keeps_what_any_generation_names_and_nothing_else(maker: Maker) -> None:
    maker.make(1, [1, 2])
    second = maker.make(2, [2, 3], raw=[RAW])
    (maker.packs / RAW).write_bytes(b"raw")
    maker.folder.take(maker.packs / RAW, RAW)
    third = maker.make(3, [3, 4])
    assert maker.folder.prune() == 0
    maker.folder.remove(name_of(1))
    assert maker.folder.prune() == 1
    left = {path.name for path in (maker.folder.path / "packs").rglob("*") if path.is_file()}
    assert left == {pack(2), pack(3), pack(4), RAW}
    assert maker.problems(second) == maker.problems(third) == []
    maker.folder.remove(second.name)
    assert maker.folder.prune() == 2
    assert maker.problems(third) == []


@pytest.mark.parametrize("name", ["keys.db", MANIFEST])
def test_nothing_is_pruned_while_a_generation_cannot_be_read(maker: Maker, name: str) -> None:
    first = maker.make(1, [1])
    maker.make(2, [2])
    (first / name).write_bytes(b"damaged")
    with pytest.raises(BackupError, match=first.name):
        maker.folder.prune()
    assert maker.folder.pack(pack(1)).exists()


def test_a_removal_that_broke_off_is_finished_by_the_next_backup(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    first = maker.make(1, [1])

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(backup.shutil, "rmtree", killed)
        maker.folder.remove(first.name)
    assert maker.folder.generations() == []
    second = maker.make(2, [2])
    assert [path.name for path in second.parent.iterdir()] == [second.name]
