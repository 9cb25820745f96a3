"""Anchors on a token, in the product: what works without it, what says so, and what its end leaves closed."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
from conftest import Server
from pydicom.data import get_testdata_file
from softhsm import PIN, SoftHsm, attached

from keys import keyring, shares, signed, slots
from keys.anchors import AnchorError, AnchorTokenError
from keys.token import AttachedToken, WrongPinError
from storescp import clock
from storescp.config import Config, load
from storescp.errors import StrongroomError
from storescp.vault.anchors import anchors_of
from storescp.vault.erase import Erase
from storescp.vault.rebuild import rebuild
from storescp.vault.recovery import Recovery
from storescp.vault.rotate import Rotate
from storescp.vault.state import Vault

CT = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))
STUDY = str(pydicom.dcmread(str(get_testdata_file("CT_small.dcm"))).StudyInstanceUID)
WAIVED = {"export": "a test", "backup": "a test"}

pytestmark = [
    pytest.mark.needs("softhsm2-util"),
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def hsm(tmp_path: Path) -> Iterator[SoftHsm]:
    """SoftHSM with a token of label 'one'; processes that a test starts see it, too."""
    with attached(tmp_path / "hsm") as made:
        made.make("one")
        yield made


@pytest.fixture
def device(hsm: SoftHsm) -> Path:
    """The folder of token 'one'; a test that has a store names that first."""
    (found,) = hsm.tokens.iterdir()
    return found


def pin_file(server: Server, pin: str = PIN) -> Path:
    file = server.home / "anchor.pin"
    file.write_text(pin + "\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with its anchors on a token, and a study that waits to be admitted; and the tokens."""
    with attached(tmp_path_factory.mktemp("h") / "hsm") as hsm:
        hsm.make("one")
        server = Server(tmp_path_factory.mktemp("s"))
        server.init("--anchor-token", f"{hsm.module}:one", "--anchor-pin-file", str(pin_file(server)))
        server.set("keys", destroy_after_days=0)
        receive(server)
        return server.home, hsm.tokens


@pytest.fixture
def store(original: tuple[Path, Path], make_server: Callable[[], Server], hsm: SoftHsm) -> Server:
    """A copy of both, to be changed."""
    made = make_server()
    home, tokens = original
    for place, copy in ((home, made.home), (tokens, hsm.tokens)):
        shutil.rmtree(copy)
        shutil.copytree(place, copy)
    return made


def receive(server: Server) -> None:
    folder = server.add_peer("CT1")
    server.set("gate", workers=1, spare_bytes=0)
    server.start("gate")
    assert scu.send(server.port, scu.tls(folder), [CT]) == [0]
    assert server.stop() == 0


@contextlib.contextmanager
def unlocked(server: Server, key_file: str = "store.key") -> Iterator[Vault]:
    """Give the vault of a store, in this process, with everything admitted."""
    vault = Vault(load(server.config))
    vault.after_unlock = Erase(vault).resume
    try:
        unlock(vault, server.home / key_file)
        vault.admit()
        yield vault
    finally:
        vault.lock()
        vault.auditor.close()


def unlock(vault: Vault, key_file: Path) -> None:
    vault.try_unlock(slots.read_key_file(key_file), 0)


def rotation(vault: Vault) -> Iterator[str]:
    return (event["text"] for event in Rotate(vault).run(0, "a test", dict(WAIVED)) if "text" in event)


def rotate(vault: Vault) -> list[str]:
    return list(rotation(vault))


def held(vault: Vault) -> list[bytes]:
    """Return the data sets that the vault opens."""
    from storage.packfile import PackFile, Record
    from storescp.vault.examine import open_pack

    found = []
    open_ = vault.unlocked()
    for record in open_.keys_db.records():
        with PackFile(open_.archive.find(record.pack_id)) as file:
            pack = open_pack(file, open_.ring, record)
            found += [b"".join(pack.dataset(r.frame)) for r in pack.records() if isinstance(r, Record)]
    return found


def kinds(vault: Vault) -> dict[int, tuple[str, str]]:
    """Return state and provider of each version."""
    return {r.version: (r.state, r.anchor.provider) for r in vault.unlocked().ring.body.versions}


def keys_on(hsm: SoftHsm, *, of: str = "strongroom-anchor-") -> int:
    """Return how many anchors the attached token has."""
    from pkcs11 import Attribute

    with AttachedToken(hsm.module, "one", PIN) as token, token._session() as session:
        return sum(1 for key in session.get_objects() if str(key[Attribute.LABEL]).startswith(of))


def refused(call: Callable[[], object]) -> StrongroomError:
    with pytest.raises(StrongroomError) as raised:
        call()
    assert PIN not in f"{raised.value} {raised.value.hint}"
    return raised.value


# --- the command line


def test_a_store_has_its_anchors_on_a_token_and_the_command_line_says_so(store: Server, hsm: SoftHsm) -> None:
    assert not list((store.home / "anchors").glob("anchor-*"))
    settings = load(store.config).settings.keys
    assert (settings.anchor, settings.anchor_token, settings.anchor_pin) == ("token", f"{hsm.module}:one", "anchor.pin")
    assert keys_on(hsm) == 1
    # A vault that unlocks by itself, with the PIN from its file; and then by a slot on the same token.
    store.start("vault")
    [version] = store.ok("keys", "status", "--json").json()["versions"]
    assert (version["anchor"], version["grade"], version["former_anchors"]) == ("pkcs11-software", "clear", [])
    assert "NIST SP 800-88" in store.ok("keys", "status").out
    assert [row["sop"] for row in store.list("instance")] == [CT.sop_instance]
    store.ok("keys", "slot", "add", "--token", f"{hsm.module}:one", stdin=f"{PIN}\n")
    store.ok("lock")
    assert store.run("unlock", "--token", stdin="0000-0000\n").status == 4
    store.ok("unlock", "--token", stdin=f"{PIN}\n")
    said = store.ok("keys", "rotate", "--reason", "a test", "--without-export", "a", "--without-backup", "b").out
    assert "the anchor of version 1 is destroyed (NIST SP 800-88: clear)" in said
    assert keys_on(hsm) == 1
    assert store.run("verify").status == 0
    assert not any(PIN in line for line in store.log)
    assert store.stop() == 0


def test_a_vault_whose_token_is_gone_stays_locked_and_says_what_to_do(
    store: Server, hsm: SoftHsm, device: Path
) -> None:
    hsm.pull(device)
    store.start("vault")
    assert any("the anchor of version 1 cannot be used: no token 'one' is attached" in line for line in store.log)
    shut = store.run("unlock", "--key-file", store.home / "store.key")
    assert shut.status == 1
    assert "no token 'one' is attached" in shut.err
    assert "docs/anchors.md, 'When the token is gone'" in shut.err
    hsm.put_back(device)
    store.ok("unlock", "--key-file", store.home / "store.key")
    # Once unlocked it needs the token no more, until a version is made or destroyed.
    hsm.pull(device)
    assert [row["sop"] for row in store.list("instance")] == [CT.sop_instance]
    assert store.run("verify").status == 0
    assert store.stop() == 0


def test_a_store_is_made_whole_or_not_at_all_and_a_typed_pin_is_kept_nowhere(
    make_server: Callable[[], Server], hsm: SoftHsm, device: Path
) -> None:
    server = make_server()
    token = ("--anchor-token", f"{hsm.module}:one")
    init = ("init", "--key-file", server.home / "store.key", "--listen", "127.0.0.1:0", *token)

    def nothing(*arguments: str | Path, stdin: str = "") -> str:
        done = server.run(*arguments, stdin=stdin)
        assert done.status in {1, 2}
        assert list(server.home.iterdir()) == []
        return done.err

    assert "refused the PIN" in nothing(*init, stdin="0000-0000\n")
    assert "the PIN file" in nothing(*init, "--anchor-pin-file", server.home / "missing")
    assert "is not MODULE:TOKEN" in nothing(*init[:-1], "one")
    assert "is for --anchor-token" in nothing(*init[:-2], "--anchor-pin-file", "x")
    hsm.pull(device)
    assert "no token 'one' is attached" in nothing(*init, stdin=f"{PIN}\n")
    hsm.put_back(device)
    made = server.ok(*init, stdin=f"{PIN}\n")
    assert "credential:strongroom-anchor-pin" in made.out
    assert all(PIN.encode() not in path.read_bytes() for path in server.home.rglob("*") if path.is_file())
    # Without the credential it stays locked; with it, and with a file, it opens.
    config = load(server.config)
    assert (config.anchor_pin_credential, keys_on(hsm)) == ("strongroom-anchor-pin", 1)
    secret = slots.read_key_file(server.home / "store.key")
    ring = keyring.unlock(config.keyring, secret, anchors_of(config))
    with pytest.raises(AnchorTokenError, match="the credential strongroom-anchor-pin is not here"):
        ring.current()
    credentials = server.home / "credentials"
    credentials.mkdir()
    (credentials / "strongroom-anchor-pin").write_text(PIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
        ring.current()


# --- bad days


def test_a_wrong_pin_or_another_token_is_told_and_costs_one_try(store: Server, hsm: SoftHsm, device: Path) -> None:
    vault = Vault(load(store.config))
    key_file = store.home / "store.key"
    try:
        pin_file(store, "0000-0000")
        assert "the token 'one' refused the PIN" in str(refused(lambda: unlock(vault, key_file)))
        assert "is not tried again" in str(refused(lambda: unlock(vault, key_file)))
        pin_file(store).chmod(0o640)
        assert "is open to others; 'chmod 600" in str(refused(lambda: unlock(vault, key_file)))
        pin_file(store).unlink()
        assert "cannot be read: No such file" in str(refused(lambda: unlock(vault, key_file)))
        pin_file(store)
        hsm.make("one")
        assert "2 tokens 'one' are attached; take the others out" in str(refused(lambda: unlock(vault, key_file)))
        hsm.pull(device)
        other = str(refused(lambda: unlock(vault, key_file)))
        assert re.search(r"it is on the token 'one' with serial number [0-9a-f]{16}, attached is [0-9a-f]{16}", other)
        for found in hsm.tokens.iterdir():
            hsm.pull(found)
        hsm.put_back(device)
        unlock(vault, key_file)
        vault.admit()
        assert held(vault) == [CT.data]
    finally:
        vault.lock()
        vault.auditor.close()


def test_a_rotation_without_its_token_stops_with_words_and_goes_on_when_it_is_back(
    store: Server, hsm: SoftHsm, device: Path
) -> None:
    def recorded(vault: Vault) -> list[str]:
        return [r["grade"] for r in vault.auditor.read(0) if r["type"] == "version-destroyed"]

    with unlocked(store) as vault:
        # Before the new version is made.
        hsm.pull(device)
        error = refused(lambda: rotate(vault))
        assert "the rotation stopped: an anchor for version 2 cannot be made: no token 'one' is attached" in str(error)
        assert "'strongroom keys rotate' goes on where it stopped" in error.hint
        assert held(vault) == [CT.data]
        assert kinds(vault) == {1: ("current", "pkcs11-software")}
        hsm.put_back(device)
        # After it: what is in memory is enough for everything but the end of the old version.
        steps = rotation(vault)
        assert next(steps) == "version 2 is current"
        hsm.pull(device)
        *_, last = steps
        assert last.startswith(
            "the anchor of version 1 stays until it can be destroyed: the anchor of version 1 is out"
        )
        assert "no token 'one' is attached" in last
        assert Rotate(vault).destroy_due() == []
        assert kinds(vault)[1] == ("old", "pkcs11-software")
        # A token that only looks like it proves nothing.
        impostor = hsm.make("one")
        assert Rotate(vault).destroy_due() == []
        hsm.pull(impostor)
        assert recorded(vault) == []
        vault.lock()
        assert "no token 'one' is attached" in str(refused(lambda: unlock(vault, store.home / "store.key")))
        hsm.put_back(device)
        unlock(vault, store.home / "store.key")
        assert keys_on(hsm) == 2
        assert Rotate(vault).destroy_due() == [1]
        assert keys_on(hsm) == 1
        assert recorded(vault) == ["clear"]
        assert held(vault) == [CT.data]


def test_after_erasure_and_rotation_everything_from_before_but_the_tokens_key_opens_nothing(
    store: Server, hsm: SoftHsm, device: Path
) -> None:
    before = store.home.parent / "before"
    with unlocked(store):
        pass
    shutil.copytree(store.home, before, ignore=shutil.ignore_patterns("*.sock"))
    shutil.copytree(device, hsm.folder / "copy")
    with unlocked(store) as vault:
        list(Erase(vault).run(0, STUDY, "a test"))
        assert rotate(vault)[-1] == "the anchor of version 1 is destroyed (NIST SP 800-88: clear)"
        [document] = certificates(vault.config)
        assert (document["state"], held(vault)) == ("final", [])
        [version] = document["versions"]
        assert (version["anchor"], version["grade"]) == ("pkcs11-software", "clear")
        assert "former_anchors" not in version

    old = Server(before)
    shutil.copy(store.home / "anchors" / "generation", before / "anchors" / "generation")
    (before / "anchors" / "generation").write_text(
        re.sub(r" \d+\n", " 1\n", (before / "anchors" / "generation").read_text())
    )
    secret = slots.read_key_file(before / "store.key")
    ring = keyring.unlock(before / "store" / "keyring", secret, anchors_of(load(old.config)))
    with pytest.raises(AnchorError, match="the anchor of version 1 cannot be used: the token 'one' has no secret key"):
        ring.version(1)
    # The control, and why SoftHSM purges nothing: its keys are files, and a copy of them is the token of before.
    shutil.rmtree(device)
    shutil.copytree(hsm.folder / "copy", device)
    with unlocked(old) as vault:
        assert held(vault) == [CT.data]


# --- both kinds, and a store rebuilt


def certificates(config: Config) -> list[dict[str, Any]]:
    folder = config.store_path / "certificates"
    return [signed.read("certificate", path.read_bytes(), config.signing_key) for path in sorted(folder.iterdir())]


def test_a_store_goes_from_files_to_a_token_and_back_and_each_old_anchor_is_destroyed(
    make_server: Callable[[], Server], hsm: SoftHsm
) -> None:
    server = make_server()
    server.init()
    receive(server)
    pin_file(server)
    server.set("keys", destroy_after_days=30)
    for anchor, wanted in (("token", "pkcs11-software"), ("file", "file")):
        server.set("keys", anchor=anchor, anchor_token=f"{hsm.module}:one", anchor_pin="anchor.pin")
        with unlocked(server) as vault:
            said = rotate(vault)
            assert "stays until" in said[-1]
            newest = max(kinds(vault))
            assert kinds(vault)[newest] == ("current", wanted)
    assert sorted(p.name for p in (server.home / "anchors").glob("anchor-*")) == ["anchor-1", "anchor-3"]
    assert keys_on(hsm) == 1
    with unlocked(server) as vault:
        # All three open side by side.
        assert vault.unlocked().ring.open_versions() == {}
        assert held(vault) == [CT.data]
        vault.config.settings.keys.destroy_after_days = 0
        assert Rotate(vault).destroy_due() == [1, 2]
        assert [state for state, _ in kinds(vault).values()] == ["destroyed", "destroyed", "current"]
    assert sorted(p.name for p in (server.home / "anchors").glob("anchor-*")) == ["anchor-3"]
    assert keys_on(hsm) == 0
    # Now nothing needs the token, and its settings may go.
    server.set("keys", anchor_token="", anchor_pin="")
    with unlocked(server) as vault:
        assert held(vault) == [CT.data]


@pytest.mark.parametrize("with_token", [True, False])
def test_a_rebuilt_store_names_its_former_anchors_until_they_are_proved_destroyed(
    store: Server, hsm: SoftHsm, device: Path, with_token: bool
) -> None:
    with unlocked(store) as vault:
        key, words = shares.new_recovery(vault.unlocked().ring.store_id, 2, 2, created=clock.now())
        Recovery(vault).add(0, key)
        [(_, export)] = Recovery(vault).export(0)
    config = load(store.config)
    shutil.rmtree(store.home / "anchors")
    hsm.pull(device)
    error = refused(lambda: rebuild(config, export, words, store.home / "new.key"))
    assert "no token 'one' is attached" in str(error)
    assert "--file-anchors" in error.hint
    assert not (store.home / "new.key").exists()
    if with_token:
        hsm.put_back(device)
    assert rebuild(config, export, words, store.home / "new.key", file_anchors=not with_token) == [1]
    provider = "pkcs11-software" if with_token else "file"
    with unlocked(store, "new.key") as vault:
        assert kinds(vault) == {1: ("current", provider)}
        [record] = vault.unlocked().ring.body.versions
        assert [(a.provider, a.id != record.anchor.id) for a in record.former] == [("pkcs11-software", True)]
        list(Erase(vault).run(0, STUDY, "a test"))
        [pending] = certificates(config)
        [version] = pending["versions"]
        assert [one["anchor"] for one in version["former_anchors"]] == ["pkcs11-software"]
        assert any("former anchors" in text for text in pending["not_covered"])
        # Whoever has its shares opens an export: until that recovery key is retired nothing is final.
        vault.unlocked().ledger.set_export(retired(vault))
        if not with_token:
            # No token, no new version: the next one is in a file, too.
            vault.config.settings.keys.anchor = "file"
            vault._anchors = anchors_of(vault.config)
            vault.lock()
            unlock(vault, store.home / "new.key")
        assert rotate(vault)[-1].startswith("the anchor of version 1 is destroyed")
        [final] = certificates(config)
        assert (final["state"], final["versions"][0]["destroyed"] > "") == ("final", True)
        # On the token it was destroyed with the version; on one that is not here it bounds the certificate.
        bound = any("former anchors" in text for text in final["not_covered"])
        assert (bound, "former_anchors" in final["versions"][0]) == (not with_token, not with_token)
    if with_token:
        assert keys_on(hsm) == 1


def retired(vault: Vault) -> Any:
    [made] = vault.unlocked().ledger.exports()
    made.retired = clock.now()
    return made


def test_a_login_of_the_vaults_is_shared_with_one_by_a_slot(store: Server, hsm: SoftHsm) -> None:
    with unlocked(store) as vault, AttachedToken(hsm.module, "one", PIN) as token:
        rotate(vault)
        vault.lock()
        unlock(vault, store.home / "store.key")
        assert held(vault) == [CT.data]
        assert not token.has_key("none")
        with pytest.raises(WrongPinError):
            AttachedToken(hsm.module, "one", "0000-0000")
