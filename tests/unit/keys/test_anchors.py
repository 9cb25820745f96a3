"""Anchors: destroyed means overwritten or gone from the token, durably, after a crash too; or an error says no."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softhsm import PIN, SoftHsm, attached

from keys import anchors as module
from keys.anchors import GRADES, AnchorError, AnchorSet, AnchorTokenError, FileAnchors, TokenAnchors
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
def anchors(hsm: SoftHsm, folder: Path) -> TokenAnchors:
    return TokenAnchors(folder, lambda: attach(hsm))


def attach(hsm: SoftHsm, pin: str = PIN) -> AttachedToken:
    return AttachedToken(hsm.module, "one", pin)


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
    assert files.providers == ("file",)


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
    with pytest.raises(AnchorError, match=r"unmounted is not here$"):
        FileAnchors(tmp_path / "unmounted").check("anchor-1")


# --- tokens


@needs_token
def test_an_anchor_on_a_token_makes_its_key_and_no_other(hsm: SoftHsm, anchors: TokenAnchors, folder: Path) -> None:
    one, two = anchors.create(1).id, anchors.create(2).id
    keys = [
        anchors.key(one, STORE, 1),
        anchors.key(two, STORE, 2),
        anchors.key(one, STORE[::-1], 1),
        anchors.key(anchors.create(1).id, STORE, 1),
    ]
    assert len({bytes(key) for key in keys}) == 4
    assert anchors.key(one, STORE, 1) == keys[0]
    assert one.startswith("strongroom-anchor-1-")
    with attach(hsm) as token:
        assert one.endswith(f"@{token.serial}")
    for name in (two, "", "anchor-1", one.replace("anchor-1", "anchor-2"), one + "x", one.partition("@")[0]):
        with pytest.raises(AnchorError, match="version 1 names an anchor of another version"):
            anchors.key(name, STORE, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["CACHEDIR.TAG", "anchor-1"]


@needs_token
def test_a_destroyed_anchor_is_gone_from_its_token(hsm: SoftHsm, anchors: TokenAnchors) -> None:
    one, two = anchors.create(1).id, anchors.create(2).id
    label = one.partition("@")[0]
    anchors.key(one, STORE, 1)
    with attach(hsm) as token:
        assert token.has_key(label)
    for _ in range(2):
        anchors.destroy(one)
        with attach(hsm) as token:
            assert not token.has_key(label)
        with pytest.raises(AnchorError, match="has no secret key 'strongroom-anchor-1-"):
            anchors.key(one, STORE, 1)
    anchors.key(two, STORE, 2)


@needs_token
def test_another_token_or_none_never_passes_for_a_destroyed_anchor(hsm: SoftHsm, anchors: TokenAnchors) -> None:
    (device,) = hsm.tokens.iterdir()
    one = anchors.create(1).id
    key = anchors.key(one, STORE, 1)
    # Pulled out while the process is logged in, and when it is not.
    with attach(hsm):
        hsm.pull(device)
        with pytest.raises(AnchorTokenError, match=r"cannot be destroyed: .* was removed or does not answer"):
            anchors.destroy(one)
    uses = (anchors.destroy, anchors.check, lambda name: anchors.key(name, STORE, 1), lambda _: anchors.create(2))
    for use in uses:
        with pytest.raises(AnchorTokenError, match="no token 'one' is attached"):
            use(one)
    hsm.make("one")
    for use in uses[:3]:
        with pytest.raises(AnchorTokenError, match=r"with serial number [0-9a-f]{16}, attached is [0-9a-f]{16}: "):
            use(one)
    for other in hsm.tokens.iterdir():
        hsm.pull(other)
    hsm.put_back(device)
    # It is back: nothing has to be made anew.
    assert anchors.key(one, STORE, 1) == key
    anchors.check(one)
    for verb in (anchors.destroy, anchors.check):
        with pytest.raises(AnchorError, match=r"is not the name of an anchor on a token$"):
            verb("anchor-1")
    anchors.destroy(one)


@needs_token
def test_a_wrong_pin_is_given_to_a_token_once(hsm: SoftHsm, anchors: TokenAnchors, folder: Path) -> None:
    one = anchors.create(1).id
    wrong = TokenAnchors(folder, lambda: attach(hsm, "0000-0000"))
    with pytest.raises(
        AnchorTokenError, match="the anchor of version 1 cannot be used: the token 'one' refused the PIN"
    ):
        wrong.key(one, STORE, 1)
    with pytest.raises(AnchorTokenError, match="refused this PIN before; it is not tried again"):
        wrong.destroy(one)
    anchors.key(one, STORE, 1)


@needs_token
def test_a_login_of_somebody_else_in_the_process_is_shared(hsm: SoftHsm, anchors: TokenAnchors) -> None:
    with attach(hsm) as token:
        one = anchors.create(1).id
        assert token.has_key(one.partition("@")[0])
        anchors.key(one, STORE, 1)
    anchors.key(one, STORE, 1)


@needs_token
def test_a_token_that_is_only_software_never_yields_purge(anchors: TokenAnchors) -> None:
    made = anchors.create(1)
    assert made.provider == "pkcs11-software"
    assert {name: GRADES[name] for name in anchors.providers} == {"pkcs11": "purge", "pkcs11-software": "clear"}
    assert GRADES["file"] == "clear"


@needs_token
def test_the_record_of_generations_is_one_for_both_kinds(anchors: TokenAnchors, files: FileAnchors) -> None:
    on_token = anchors
    on_token.set_generation(STORE, 7)
    assert files.generation(STORE) == on_token.generation(STORE) == 7
    both = AnchorSet(files, on_token)
    assert (both.first, both.of("file"), both.of("pkcs11")) == (files, files, on_token)
    assert both.of("pkcs11-software") is on_token
    both.set_generation(STORE, 8)
    assert both.generation(STORE) == on_token.generation(STORE) == 8
    with pytest.raises(AnchorError, match=r"no anchors of the kind 'tpm' are configured$"):
        both.of("tpm")
    with pytest.raises(AnchorError, match=r"kind 'pkcs11' are configured \(keys.anchor_token\)$"):
        AnchorSet(files).of("pkcs11")
