"""Anchors: destroyed means overwritten or gone from the token, durably, after a crash too; or an error says no."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softhsm import PIN, SoftHsm, attached

from keys import anchors as module
from keys.anchors import AnchorError, AnchorSet, FileAnchors, TokenAnchors
from keys.token import AttachedToken

STORE = bytes(range(16))
needs_token = pytest.mark.needs("softhsm2-util")


@pytest.fixture
def files(tmp_path: Path) -> FileAnchors:
    made = FileAnchors(tmp_path / "anchors")
    made.prepare()
    made.create(1)
    return made


@pytest.fixture
def folder(files: FileAnchors, tmp_path: Path) -> Path:
    return tmp_path / "anchors"


@pytest.fixture
def hsm(tmp_path: Path) -> Iterator[SoftHsm]:
    with attached(tmp_path / "hsm") as made:
        made.make("one")
        yield made


@pytest.fixture
def token(hsm: SoftHsm) -> Iterator[AttachedToken]:
    with AttachedToken(hsm.module, "one", PIN) as device:
        yield device


# --- files


def test_a_destroyed_file_is_gone_and_its_key_with_it(files: FileAnchors, folder: Path) -> None:
    files.create(2)
    assert len(files.key("anchor-1", STORE, 1)) == 32
    for _ in range(2):
        files.destroy("anchor-1")
        assert not (folder / "anchor-1").exists()
        with pytest.raises(AnchorError, match="the anchor of version 1 cannot be read"):
            files.key("anchor-1", STORE, 1)
    files.key("anchor-2", STORE, 2)
    assert (files.grade, files.provider) == ("clear", "file")


@pytest.mark.parametrize("size", [32, 0, 5, 100])
def test_a_file_is_overwritten_in_place_before_it_is_removed(files: FileAnchors, folder: Path, size: int) -> None:
    (folder / "anchor-1").write_bytes(bytes(size))
    # A second name of the same file shows what became of it.
    os.link(folder / "anchor-1", folder / "seen")
    files.destroy("anchor-1")
    left = (folder / "seen").read_bytes()
    assert len(left) == max(32, size)
    assert not any(left.startswith(bytes(n)) for n in (8, 16))
    assert left != bytes(len(left))


def test_the_steps_of_destroying_are_synced_in_their_order(
    files: FileAnchors, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    inode = (folder / "anchor-1").stat().st_ino
    secret = (folder / "anchor-1").read_bytes()
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if found.st_ino == inode:
            steps.append("overwritten" if (folder / "anchor-1").read_bytes() != secret else "not overwritten")
        else:
            steps.append("removed" if not (folder / "anchor-1").exists() else "still there")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.destroy("anchor-1")
    assert steps == ["overwritten", "removed"]
    steps.clear()
    # The second time, nobody knows whether the first got to the end: the folder is synced again.
    files.destroy("anchor-1")
    assert steps == ["removed"]


@pytest.mark.parametrize("step", ["_overwrite", "sync_folder"])
def test_a_crash_in_the_middle_is_finished_by_a_second_call(
    files: FileAnchors, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module if step == "_overwrite" else module.encoding, step, crash)
        with pytest.raises(KeyboardInterrupt):
            files.destroy("anchor-1")
    files.destroy("anchor-1")
    assert not (folder / "anchor-1").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "generation", "CACHEDIR.TAG", "anchor-", "anchor-0", "anchor-01", "anchor-1/", "anchor-1\n",
             "../anchor-1", "anchor-1.new", "/etc/passwd", "anchor--1"],
)  # fmt: skip
def test_nothing_but_anchors_is_destroyed(files: FileAnchors, folder: Path, name: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(AnchorError, match=r"is not the name of an anchor file$"):
        files.destroy(name)
    assert sorted(folder.iterdir()) == before


def test_an_anchor_that_is_no_file_is_an_error_and_stays(files: FileAnchors, folder: Path) -> None:
    (folder / "anchor-1").rename(folder.parent / "elsewhere")
    (folder / "anchor-1").symlink_to(folder.parent / "elsewhere")
    (folder / "anchor-2").mkdir()
    (folder / "anchor-3").symlink_to(folder / "nowhere")
    for name in ("anchor-1", "anchor-2", "anchor-3"):
        with pytest.raises(AnchorError, match="cannot be destroyed: "):
            files.destroy(name)
        assert os.path.lexists(folder / name)
    # Control: what the link names was not touched.
    files.key("anchor-1", STORE, 1)


def test_a_folder_that_is_not_there_is_an_error_not_a_destroyed_anchor(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match="cannot be destroyed: No such file"):
        FileAnchors(tmp_path / "unmounted").destroy("anchor-1")


# --- tokens


@needs_token
def test_an_anchor_on_a_token_makes_its_key_and_no_other(token: AttachedToken, folder: Path) -> None:
    anchors = TokenAnchors(folder, token)
    one, two = anchors.create(1), anchors.create(2)
    keys = [
        anchors.key(one, STORE, 1),
        anchors.key(two, STORE, 2),
        anchors.key(one, STORE[::-1], 1),
        anchors.key(anchors.create(1), STORE, 1),
    ]
    assert len({bytes(key) for key in keys}) == 4
    assert anchors.key(one, STORE, 1) == keys[0]
    assert one.startswith("strongroom-anchor-1-")
    assert one.endswith(f"@{token.serial}")
    assert (anchors.grade, anchors.provider) == ("purge", "pkcs11")
    for name in (two, "", "anchor-1", one.replace("anchor-1", "anchor-2"), one + "x", one.partition("@")[0]):
        with pytest.raises(AnchorError, match="version 1 names an anchor of another version"):
            anchors.key(name, STORE, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["CACHEDIR.TAG", "anchor-1"]


@needs_token
def test_a_destroyed_anchor_is_gone_from_its_token(token: AttachedToken, folder: Path) -> None:
    anchors = TokenAnchors(folder, token)
    one, two = anchors.create(1), anchors.create(2)
    label = one.partition("@")[0]
    anchors.key(one, STORE, 1)
    assert token.has_key(label)
    for _ in range(2):
        anchors.destroy(one)
        assert not token.has_key(label)
        with pytest.raises(AnchorError, match="has no secret key 'strongroom-anchor-1-"):
            anchors.key(one, STORE, 1)
    anchors.key(two, STORE, 2)


@needs_token
def test_another_token_or_none_never_passes_for_a_destroyed_anchor(hsm: SoftHsm, folder: Path) -> None:
    (device,) = hsm.tokens.iterdir()
    with AttachedToken(hsm.module, "one", PIN) as token:
        anchors = TokenAnchors(folder, token)
        one = anchors.create(1)
        key = anchors.key(one, STORE, 1)
        hsm.pull(device)
        for _ in range(2):
            with pytest.raises(AnchorError, match="attach it and unlock again"):
                anchors.destroy(one)
    hsm.make("one")
    with (
        AttachedToken(hsm.module, "one", PIN) as token,
        pytest.raises(AnchorError, match="attach the other to destroy it"),
    ):
        TokenAnchors(folder, token).destroy(one)
    for other in hsm.tokens.iterdir():
        hsm.pull(other)
    hsm.put_back(device)
    with AttachedToken(hsm.module, "one", PIN) as token:
        anchors = TokenAnchors(folder, token)
        assert anchors.key(one, STORE, 1) == key
        with pytest.raises(AnchorError, match=r"is not the name of an anchor on a token$"):
            anchors.destroy("anchor-1")
        anchors.destroy(one)


@needs_token
def test_the_record_of_generations_is_one_for_both_kinds(
    token: AttachedToken, files: FileAnchors, folder: Path
) -> None:
    on_token = TokenAnchors(folder, token)
    on_token.set_generation(STORE, 7)
    assert files.generation(STORE) == on_token.generation(STORE) == 7
    both = AnchorSet(files, on_token)
    assert (both.first, both.of("file"), both.of("pkcs11")) == (files, files, on_token)
    both.set_generation(STORE, 8)
    assert both.generation(STORE) == on_token.generation(STORE) == 8
    with pytest.raises(AnchorError, match="no anchors of the kind 'tpm' are attached"):
        both.of("tpm")
