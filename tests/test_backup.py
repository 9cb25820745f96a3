"""Backup, restore, drill: real stores, real shares, damaged in every way; the other machine has nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
import pytest
from conftest import Finished, Server, changed, send
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from pki import make
from pydicom.data import get_testdata_file
from scu import raw_data_set
from test_full import Disk
from test_recover import asking, made_shares

from keys import keyring, recovery, shares, signed, slots
from keys.anchors import AnchorError, AnchorSet, FileAnchors
from keys.keyring import Keyring, KeyringError
from keys.seal import SealError
from storage import backup as storage_backup
from storage.backup import DRILL, Folder, Manifest
from storage.keysdb import KeysDatabase
from storage.packfile import OpenedPack, PackFile, Record
from storescp import clock
from storescp.config import load
from storescp.errors import StrongroomError
from storescp.vault.backup import Backups
from storescp.vault.drill import drill
from storescp.vault.erase import Erase
from storescp.vault.opened import Open
from storescp.vault.recovery import Recovery
from storescp.vault.restore import Machine, Source, find, restore
from storescp.vault.rotate import Rotate
from storescp.vault.state import Vault

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
STUDY = str(pydicom.dcmread(CT).StudyInstanceUID)
PATIENT = (b"CompressedSamples^CT1", b"1CT1", STUDY.encode())
GONE = "1.2.826.0.1.3680043.8.498.4711"
RAW = "0f" * 16

pytestmark = [
    # pynetdicom leaves sockets to the garbage collector when the other end was faster.
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class House(NamedTuple):
    """A store with something of everything, its shares, and a backup of it."""

    server: Server
    shares: list[str]
    folder: Path
    held: dict[str, bytes]


# --- what happens on one machine


def ring_of(server: Server) -> Keyring:
    config = load(server.config)
    assert config.key_file is not None
    return keyring.unlock(config.keyring, slots.read_key_file(config.key_file), FileAnchors(config.anchors))


@contextlib.contextmanager
def unlocked(server: Server) -> Iterator[Vault]:
    """Give the vault of a store, in this process; it admits nothing by itself."""
    config = load(server.config)
    assert config.key_file is not None
    vault = Vault(config)
    vault.unlock(slots.read_key_file(config.key_file))
    try:
        yield vault
    finally:
        vault.lock()
        vault.auditor.close()


def backed_up(vault: Vault, folder: Path, **options: Any) -> Manifest:
    """Make a backup; return its manifest."""
    [made] = [e["manifest"] for e in Backups(vault).run(0, folder, **options) if e["kind"] == "made"]
    assert isinstance(made, Manifest)
    return made


def exported(server: Server) -> dict[str, bytes]:
    """Return what is held, by UID; everything must verify."""
    out = server.home / f"out-{secrets.token_hex(4)}"
    done = server.run("export", "--all", "--to", out)
    assert done.status in {0, 5}, done.err
    verified = server.run("verify")
    assert verified.status == 0, (verified.out, verified.err)
    found = {path.stem: raw_data_set(path) for path in out.rglob("*.dcm")}
    shutil.rmtree(out, ignore_errors=True)
    return found


def audited(server: Server) -> list[dict[str, Any]]:
    """Return the records of the audit chain."""
    return [json.loads(line) for line in server.ok("audit", "show", "--json").out.splitlines()]


def typed(words: list[str]) -> str:
    return "\n".join([*words, ""]) + "\n"


def restored(server: Server, folder: Path, words: list[str], *arguments: str) -> Finished:
    """Restore a backup into a new home by command."""
    key_file = server.home / "new.key"
    return server.run("restore", "--from", folder, "--key-file", key_file, *arguments, stdin=typed(words))


def source_of(folder: Path, words: list[str]) -> Source:
    found, generation, exports = find(folder)
    return Source(found, generation, exports, words)


def objects(home: Path) -> dict[str, bytes]:
    """Return the packs and quarantined files of a store, by their places."""
    places = [home / "store" / name for name in ("objects", "quarantine")]
    return {str(p.relative_to(home)): p.read_bytes() for f in places for p in f.rglob("*") if p.is_file()}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pack_in(folder: Path) -> Path:
    """Return a pack in a backup that ``keys.db`` names: not one of which nothing opens."""
    database = KeysDatabase(Folder(folder).generation() / "keys.db", immutable=True)
    name = database.packs()[0]
    database.close()
    return Folder(folder).pack(name)


# --- one store, made once, and copies of it


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A store after some life: rotated, decided, erased; two items in quarantine; stopped, with a backup."""
    home = tmp_path_factory.mktemp("h")
    files = tmp_path_factory.mktemp("f")
    memory = Path(tempfile.mkdtemp(prefix="strongroom-test-", dir="/dev/shm"))
    server = Server(home)
    try:
        server.init()
        server.add_peer("CT1")
        server.set("gate", pack_idle_seconds=1, workers=1, spare_bytes=0)
        server.set("keys", destroy_after_days=0)
        server.start("gate")
        assert send(server, [CT, MR, changed(CT, files, SOPInstanceUID="1.2.3.4", StudyInstanceUID=GONE)]) == [0] * 3
        server.stop()
        with unlocked(server) as vault:
            vault.admit()
        server.start("gate")
        accepted, waits = (changed(CT, files, SliceLocation=value) for value in ("77.5", "78.5"))
        assert send(server, [accepted]) == [0]
        server.stop()
        server.start()
        (server.incoming / RAW).write_bytes(b"\0" * 5000)
        server.wait_admitted()
        items = server.ok("quarantine", "list", "--json").json()["items"]
        assert sorted(item["opens"] for item in items) == [False, True]
        [good] = [item["id"] for item in items if item["opens"]]
        server.ok("quarantine", "resolve", good, "--accept", "--reason", "a test")
        assert send(server, [waits]) == [0]
        server.wait_admitted()
        server.ok("erase", "--study", GONE, "--reason", "a test", "--yes")
        server.ok("keys", "rotate", "--reason", "a test", "--without-export", "a test", "--without-backup", "a test")
        with asking(server, "recovery", "init", "--file", memory / "shares.txt") as process:
            words = made_shares(memory / "shares.txt")
            _, err = process.communicate("\n".join(words[1:4]) + "\n", timeout=60)
        assert process.returncode == 0, err
        done = server.ok("backup", "--to", home / "backup")
        assert "not admitted yet" not in done.out
        # The quarantined packs are three: replaced or decided, waiting, and raw.
        assert len(list((server.store / "quarantine").iterdir())) == 3
        server.stop()
        held = exported(server)
        assert len(held) == 2
        yield House(server, words, home / "backup", held)
    finally:
        shutil.rmtree(memory)
        server.stop(signal.SIGKILL)
        server.kill_all()


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Server]]:
    """Give new machines, each with a folder and nothing in it."""
    made: list[Server] = []

    def make() -> Server:
        # Unix socket paths are short; pytest's folders are not always.
        made.append(Server(tmp_path_factory.mktemp("m")))
        return made[-1]

    yield make
    for server in made:
        server.stop(signal.SIGKILL)
        server.kill_all()


@pytest.fixture
def copy(house: House, machine: Callable[[], Server]) -> House:
    """The house again, to be changed."""
    server = machine()
    shutil.copytree(house.server.home, server.home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    (server.home / "run").mkdir(mode=0o750)
    return House(server, house.shares, server.home / "backup", house.held)


# --- the other machine


def test_a_machine_with_nothing_but_backup_and_shares_gets_the_store_whole(
    house: House, machine: Callable[[], Server], tmp_path: Path
) -> None:
    new = machine()
    carried = shutil.copytree(house.folder, tmp_path / "carried")
    done = restored(new, carried, [house.shares[n] for n in (4, 0, 2)])
    assert done.status == 0, (done.out, done.err)
    assert not any(share in done.out + done.err for share in house.shares)
    assert everything(carried) == everything(house.folder)
    shutil.rmtree(carried)
    # Byte by byte, and where they belong: admitted, quarantined, and what nobody could open.
    assert objects(new.home) == objects(house.server.home)
    for path in (p for p in (new.store / "objects").rglob("*") if p.is_file()):
        assert (path.stat().st_mode & 0o777, path.stat().st_mtime) == (0o400, 946_684_800.0)
    # Nothing of what opened the old machine's store, or spoke for it.
    old = [*(house.server.home / "anchors").iterdir(), house.server.home / "store.key"]
    old += [house.server.home / "tls" / "server.key"]
    found = b"".join([*everything(new.home).values(), *everything(house.folder).values()])
    old = [path for path in old if path.name.startswith("anchor-") or path.suffix == ".key"]
    assert len(old) == 3
    assert [path for path in old if path.read_bytes().strip() in found] == []
    assert "ledger-2.db" in {path.name for path in new.store.iterdir()}
    assert exported(new) == house.held
    assert new.run("audit", "verify").status == 0
    kinds = [record["type"] for record in audited(new)]
    assert kinds.index("erase-begun") < kinds.index("backup-begun") < kinds.index("restored")
    # What no pack says.
    config, before = load(new.config), load(house.server.config)
    rings = [ring_of(new), ring_of(house.server)]
    said = []
    for one, ring in zip((config, before), rings, strict=True):
        open_ = Open(one, ring)
        said.append((open_.ledger.decisions(), open_.ledger.erasures(), open_.ledger.rotations()))
        open_.close()
    assert said[0] == said[1]
    assert [len(found) for found in said[0]] == [1, 1, 1]
    certificates = [path.read_bytes() for path in (house.server.store / "certificates").iterdir()]
    assert [path.read_bytes() for path in (new.store / "certificates").iterdir()] == certificates
    listed = [s.ok("quarantine", "list", "--json").json()["items"] for s in (new, house.server)]
    assert listed[0] == listed[1]
    assert len(listed[0]) == 2
    # It receives, from the peers that it knew, with a certificate made for it.
    assert (new.peers / "CT1.toml").read_bytes() == (house.server.peers / "CT1.toml").read_bytes()
    ring = ring_of(new)
    assert ring.body.authority is not None
    made = x509.load_pem_x509_certificate(config.certificate.read_bytes())
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(ring.body.authority.certificate.encode()))
    ring.forget()
    new.set("gate", listen=["127.0.0.1:0"], pack_idle_seconds=1)
    new.start()
    fresh = changed(CT, tmp_path, SOPInstanceUID="1.2.3.5")
    assert send(new, [fresh], folder=house.server.home / "issued" / "CT1") == [0]
    new.wait_admitted()
    # The same shares open what it exports from now on, and the next backup.
    new.ok("recovery", "export", "--to", tmp_path / "next.export")
    recovery.open_export((tmp_path / "next.export").read_bytes(), shares.combine(house.shares[:3]), config.signing_key)
    new.ok("backup", "--to", tmp_path / "again")
    new.stop()
    assert exported(new) == house.held | {"1.2.3.5": raw_data_set(fresh)}
    assert source_of(tmp_path / "again", house.shares[1:4]).problems() == []


@pytest.mark.needs_root
def test_restored_for_two_users_each_gets_what_is_its_own_and_it_receives(house: House, tmp_path: Path) -> None:
    # pytest's own folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="strongroom-two-"))
    folder.chmod(0o755)
    new = Server(folder / "s")
    source = source_of(house.folder, house.shares[:3])
    with pytest.raises(StrongroomError, match="there is no folder"):
        list(restore(source, Machine(new.config, new.home / "no" / "k"), house.shares[:3]))
    try:
        machine = Machine(new.config, folder / "store.key", ("daemon", "nobody"), ("127.0.0.1",))
        assert list(restore(source, machine, house.shares[:3]))[-1]["problems"] == []
        new.set("gate", listen=["127.0.0.1:0"], pack_idle_seconds=1)
        new.start()
        fresh = changed(CT, tmp_path, SOPInstanceUID="1.2.3.7")
        assert send(new, [fresh], folder=house.server.home / "issued" / "CT1") == [0]
        new.wait_admitted()
        assert "1.2.3.7" in {row["sop"] for row in new.list()}
    finally:
        new.stop(signal.SIGKILL)
        new.kill_all()
        shutil.rmtree(folder)


def test_a_drill_says_what_it_saw_signs_it_and_leaves_nothing(house: House, tmp_path: Path) -> None:
    carried = shutil.copytree(house.folder, tmp_path / "carried")
    before = everything(carried)
    scratch = Path(tempfile.mkdtemp(prefix="strongroom-test-", dir="/dev/shm"))
    elsewhere = Server(tmp_path)
    asked = ["recovery", "drill", "--from", carried, "--scratch", scratch, "--statement", tmp_path / "statement"]
    try:
        done = elsewhere.run(*asked, stdin=typed(house.shares[2:]))
        assert done.status == 0, (done.out, done.err)
        assert list(scratch.iterdir()) == []
    finally:
        shutil.rmtree(scratch)
    assert everything(carried) == before
    assert "not recorded in the store" in done.out
    key = load(house.server.config).signing_key
    said = signed.read(DRILL, (tmp_path / "statement").read_bytes(), key)
    manifest = Folder(carried).read(Folder(carried).generation(), key)
    assert said["problems"] == []
    assert (said["backup"], said["packs"], said["digest"]) == (manifest.id, manifest.packs, manifest.digest)
    assert said["opened_packs"] == manifest.packs
    # Two that are held, one that was replaced, and one that waits for a decision.
    assert (said["opened_instances"], said["audit_records"]) == (4, manifest.audit)
    assert manifest.audit > 10
    with pytest.raises(signed.SignedError):
        signed.read(storage_backup.LABEL, (tmp_path / "statement").read_bytes(), key)


def test_a_drill_finds_a_flipped_byte_in_a_pack_and_that_is_not_kept_as_drilled(copy: House, tmp_path: Path) -> None:
    path = pack_in(copy.folder)
    content = bytearray(path.read_bytes())
    content[6000] ^= 1
    path.write_bytes(content)
    asked = ["recovery", "drill", "--from", copy.folder, "--statement", tmp_path / "statement"]
    done = copy.server.run(*asked, stdin=typed(copy.shares[:3]))
    assert done.status == 6, (done.out, done.err)
    assert f"finding: pack {path.name}: records do not open" in done.out
    assert "recorded in the store's audit chain" in done.out
    said = signed.read(DRILL, (tmp_path / "statement").read_bytes(), load(copy.server.config).signing_key)
    assert said["problems"] == [f"pack {path.name}: records do not open"]
    assert [made["drilled"] for made in copy.server.ok("backup", "list", "--json").json()["items"]] == [""]
    # Confirming looks at lengths alone: that is what a drill is for.
    assert copy.server.run("backup", "confirm", copy.folder).status == 0
    content[6000] ^= 1
    path.write_bytes(content)
    done = copy.server.run("recovery", "drill", "--from", copy.folder, stdin=typed(copy.shares[:3]))
    assert done.status == 0, (done.out, done.err)
    [made] = copy.server.ok("backup", "list", "--json").json()["items"]
    assert made["drilled"]
    assert made["confirmed"]
    kept = [item["statement"] for item in audited(copy.server) if item["type"] == "recovery-drilled"]
    assert [one["problems"] for one in kept] == [said["problems"], []]


def test_a_drill_that_is_ended_from_outside_leaves_nothing(house: House, tmp_path: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="strongroom-test-", dir="/dev/shm"))
    try:
        # Where it is over before it is told to end, once more.
        for _ in range(20):
            with asking(
                Server(house.server.home), "recovery", "drill", "--from", house.folder, "--scratch", scratch
            ) as it:
                assert it.stdin is not None
                it.stdin.write(typed(house.shares[:3]))
                it.stdin.flush()
                while it.poll() is None and not list(scratch.glob("*/anchors/anchor-*")):
                    time.sleep(0.001)
                it.send_signal(signal.SIGHUP)
                status = it.wait(60)
            assert list(scratch.iterdir()) == []
            if status == 128 + signal.SIGHUP:
                break
        else:
            raise AssertionError("it was over each time before it was told to end")
    finally:
        shutil.rmtree(scratch)


def test_a_drill_on_a_disk_is_refused(house: House, tmp_path: Path) -> None:
    done = Server(tmp_path).run("recovery", "drill", "--from", house.folder, "--scratch", tmp_path)
    assert done.status == 1
    in_memory = "tmpfs" in subprocess.check_output(["stat", "-f", "-c%T", tmp_path], text=True)
    # Where the tests' own folder is in memory, what is missing is shares.
    assert ("does not open" if in_memory else "must not reach a disk") in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_statement_that_this_store_did_not_sign_is_not_kept(copy: House) -> None:
    with unlocked(copy.server) as vault:
        backups = Backups(vault)
        [made] = backups.known()
        said = {"backup": made.id, "drilled": clock.now(), "problems": []}
        ring = vault.unlocked().ring
        other = signed.write(DRILL, said, Ed25519PrivateKey.generate())
        for content in (b"", other, signed.write(storage_backup.LABEL, said, ring.signing)):
            with pytest.raises(StrongroomError, match="does not hold"):
                backups.drilled(0, content)
        with pytest.raises(StrongroomError, match="no backup"):
            backups.drilled(0, signed.write(DRILL, said | {"backup": "another"}, ring.signing))
        backups.drilled(0, signed.write(DRILL, said, ring.signing))
        assert backups.known()[0].drilled == said["drilled"]


# --- shares


def test_too_few_wrong_or_foreign_shares_restore_nothing(
    house: House, machine: Callable[[], Server], tmp_path: Path
) -> None:
    store_id = ring_of(house.server).store_id
    same_store = shares.new_recovery(store_id, 5, 3, created=clock.now())[1]
    other_store = shares.new_recovery(bytes(16), 2, 2, created=clock.now())[1]
    good = house.shares
    word = "academic" if good[1].split()[9] != "academic" else "acid"
    mistyped = " ".join([*good[1].split()[:9], word, *good[1].split()[10:]])
    wrong = {
        "none": [],
        "two of three": good[:2],
        "one three times": [good[0]] * 3,
        "a word mistyped": [good[0], mistyped, good[2]],
        "a word less": [good[0], good[1].rpartition(" ")[0], good[2]],
        "of a key that the store never took": same_store[:3],
        "of another store": other_store,
        "mixed": [*good[:2], same_store[2]],
    }
    for case, words in wrong.items():
        with pytest.raises(StrongroomError, match="does not open") as caught:
            source_of(house.folder, words)
        # Single words of shares are words of English, too: a sentence has some.
        said = pairwise(str(caught.value).split())
        assert not {pair for share in words for pair in pairwise(share.split()[3:])} & set(said), case
    new = machine()
    for words in (good[:2], other_store):
        done = restored(new, house.folder, words)
        assert done.status == 1
        assert "hint: type each share as it stands on paper" in done.err
        done = new.run("recovery", "drill", "--from", house.folder, stdin=typed(words))
        assert done.status == 1
    assert list(new.home.iterdir()) == []


def test_shares_of_either_of_two_recovery_keys_open_a_backup(copy: House, tmp_path: Path) -> None:
    with unlocked(copy.server) as vault:
        key, words = shares.new_recovery(vault.unlocked().ring.store_id, 2, 2, created=clock.now())
        Recovery(vault).add(0, key)
        backed_up(vault, tmp_path / "two")
        # Not in it: whoever has an old one of these has an old backup.
        assert len(Recovery(vault).exports()) == 3
    assert source_of(tmp_path / "two", words).problems() == []
    assert source_of(tmp_path / "two", copy.shares[:3]).problems() == []


# --- damage


def flipped(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place or len(content) // 2] ^= 1
    path.write_bytes(content)


def sealed_in(keys_db: Path) -> int:
    """Return where in a keys.db a sealed study key is."""
    database = KeysDatabase(keys_db, immutable=True)
    [record, *_] = database.records()
    database.close()
    return keys_db.read_bytes().index(record.sealed)


DAMAGE = {
    "a pack": ("", Path.unlink),
    "the ledger": ("ledger-*.db", flipped),
    "no ledger": ("ledger-*.db", Path.unlink),
    "the audit chain": ("audit/*.log", flipped),
    "no audit chain": ("audit/*.log", Path.unlink),
    "the keyring": ("keyring", flipped),
    "the configuration": ("settings/strongroom.toml", flipped),
    "a peer": ("settings/peers.d/*", flipped),
    "no peer": ("settings/peers.d/*", Path.unlink),
    "an authority": ("settings/trust/*", flipped),
    "a certificate": ("settings/certificates/*", Path.unlink),
    "keys.db": ("keys.db", lambda path: flipped(path, sealed_in(path))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_backup_is_refused_and_of_an_incomplete_one_comes_what_is_whole(
    house: House, machine: Callable[[], Server], tmp_path: Path, case: str
) -> None:
    pattern, damage = DAMAGE[case]
    folder = shutil.copytree(house.folder, tmp_path / "carried")
    path = sorted(Folder(folder).generation().glob(pattern))[-1] if pattern else pack_in(folder)
    damage(path)
    source = source_of(folder, house.shares[:3])
    new = machine()
    with pytest.raises(StrongroomError, match="the backup is damaged") as caught:
        list(restore(source, Machine(new.config, new.home / "new.key"), house.shares[:3]))
    assert path.name in str(caught.value)
    assert list(new.home.iterdir()) == []
    events = list(restore(source, Machine(new.config, new.home / "new.key"), house.shares[:3], incomplete=True))
    assert path.name in str(events[-1]["problems"])
    assert new.config.exists()
    name = path.name.partition("-")[2] if case == "an authority" else path.name
    damaged = path.read_bytes() if path.exists() else b""
    if case not in {"keys.db", "the audit chain"}:
        # What differs is left out: of settings it could be anybody's.
        assert damaged not in [p.read_bytes() for p in new.home.rglob(name) if damaged and p.is_file()]
    with unlocked(new) as vault:
        open_ = vault.unlocked()
        missing = 1 if case == "a pack" else 0
        held = [n for n in open_.keys_db.packs() if open_.archive.find(n)]
        assert len(held) == open_.keys_db.count() - missing
        assert bool(open_.ledger.decisions()) == ("ledger" not in case)
        assert vault.auditor.fault == ""
        chains = [p.name for p in new.store.glob("audit-*")]
        assert bool(chains) == ("audit" in case)


def test_a_backup_whose_keys_cannot_be_read_restores_nothing_and_the_command_says_partly_of_the_rest(
    house: House, machine: Callable[[], Server], tmp_path: Path
) -> None:
    folder = shutil.copytree(house.folder, tmp_path / "carried")
    new = machine()
    pack = pack_in(folder)
    pack.unlink()
    assert restored(new, folder, house.shares[:3]).status == 1
    (Folder(folder).generation() / "keys.db").write_bytes(b"")
    for words in (["restore", "--key-file", new.home / "new.key", "--incomplete"], ["recovery", "drill"]):
        done = new.run(*words, "--from", folder, stdin=typed(house.shares[:3]))
        assert done.status == 1
        assert "nothing opens without it" in done.err
    assert list(new.home.iterdir()) == []
    shutil.copy(Folder(house.folder).generation() / "keys.db", Folder(folder).generation())
    done = restored(new, folder, house.shares[:3], "--incomplete")
    assert done.status == 3, (done.out, done.err)
    assert f"missing: pack {pack.name}" in done.err
    assert new.run("verify").status == 6


def test_a_manifest_that_was_changed_or_an_export_of_another_generation_opens_nothing(
    copy: House, machine: Callable[[], Server]
) -> None:
    with unlocked(copy.server) as vault:
        backed_up(vault, copy.folder)
    first, second = (Folder(copy.folder).generation(name) for name in Folder(copy.folder).generations())
    content = (second / "manifest").read_bytes()
    (second / "manifest").write_bytes(content.replace(b'"waiting":0', b'"waiting":1'))
    with pytest.raises(StrongroomError, match="does not hold"):
        source_of(copy.folder, copy.shares[:3])
    (second / "manifest").write_bytes((first / "manifest").read_bytes())
    with pytest.raises(StrongroomError, match="under another name"):
        source_of(copy.folder, copy.shares[:3])
    (second / "manifest").write_bytes(content)
    [export] = second.glob("*.export")
    flipped(export)
    with pytest.raises(StrongroomError, match="does not open"):
        source_of(copy.folder, copy.shares[:3])
    export.unlink()
    with pytest.raises(StrongroomError, match="no recovery export"):
        find(copy.folder)
    # The one before is still whole.
    found, generation, exports = find(copy.folder, first.name)
    source = Source(found, generation, exports, copy.shares[:3])
    new = machine()
    assert list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3]))[-1]["problems"] == []


def test_what_somebody_added_to_a_backup_becomes_no_peer_and_no_authority(
    copy: House, machine: Callable[[], Server]
) -> None:
    settings = Folder(copy.folder).generation() / "settings"
    shutil.copy(settings / "peers.d" / "CT1.toml", settings / "peers.d" / "EVIL.toml")
    [trust] = (settings / "trust").iterdir()
    shutil.copy(trust, settings / "trust" / "9-evil.pem")
    source = source_of(copy.folder, copy.shares[:3])
    new = machine()
    with pytest.raises(StrongroomError, match=r"EVIL\.toml is not in the manifest"):
        list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3]))
    list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3], incomplete=True))
    assert [path.name for path in new.peers.iterdir()] == ["CT1.toml"]
    assert load(new.config).settings.gate.trust == ["tls/ca.pem"]
    assert [path.name for path in (new.home / "tls").iterdir()] == ["ca.pem"]


# --- where a store may be made


def test_a_store_is_restored_over_nothing(copy: House, machine: Callable[[], Server]) -> None:
    before = everything(copy.server.home)
    done = restored(copy.server, copy.folder, copy.shares[:3])
    assert done.status == 1
    assert "never restored over another one" in done.err
    assert everything(copy.server.home) == before
    source = source_of(copy.folder, copy.shares[:3])
    for name in ("store/keyring", "store/keys.db", "store/objects/x", "anchors/anchor-7", "k"):
        new = machine()
        (new.home / name).parent.mkdir(parents=True, exist_ok=True)
        (new.home / name).write_bytes(b"mine")
        with pytest.raises(StrongroomError, match="exists already"):
            list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3]))
        assert set(everything(new.home)) == {name}
    new = machine()
    with pytest.raises(StrongroomError, match="no folder"):
        list(restore(source, Machine(new.config, new.home / "none" / "k"), copy.shares[:3]))
    assert list(new.home.iterdir()) == []


def test_a_configuration_that_is_there_is_used_and_another_stores_is_refused(
    house: House, machine: Callable[[], Server], make_server: Callable[[], Server]
) -> None:
    source = source_of(house.folder, house.shares[:3])
    new = machine()
    text = house.server.config.read_text().replace('"spool"', '"elsewhere"').replace('"store.key"', '"k"')
    new.config.write_text(text)
    list(restore(source, Machine(new.config, new.home / "k"), house.shares[:3]))
    assert new.config.read_text() == text
    assert (new.home / "elsewhere" / "public" / "deposit-2.key").exists()
    assert exported(new) == house.held
    other = make_server()
    other.init()
    with pytest.raises(StrongroomError, match="another store"):
        list(restore(source, Machine(other.config, other.home / "k"), house.shares[:3]))


def test_two_authorities_whose_files_have_one_name_are_both_trusted_again(
    copy: House, machine: Callable[[], Server]
) -> None:
    (copy.server.home / "other").mkdir()
    other = make("other authority", ca=True).certificate.public_bytes(Encoding.PEM)
    (copy.server.home / "other" / "ca.pem").write_bytes(other)
    copy.server.set("gate", trust=["tls/ca.pem", "other/ca.pem"])
    with unlocked(copy.server) as vault:
        backed_up(vault, copy.folder)
    new = machine()
    list(restore(source_of(copy.folder, copy.shares[:3]), Machine(new.config, new.home / "k"), copy.shares[:3]))
    assert [p.read_bytes() for p in load(new.config).trust] == [
        (copy.server.home / "tls" / "ca.pem").read_bytes(),
        other,
    ]


def test_a_backup_of_a_store_with_a_token_needs_no_token(copy: House, machine: Callable[[], Server]) -> None:
    copy.server.set("keys", anchor="token", anchor_token="/usr/lib/none.so:gone", anchor_pin="none.pin")
    with unlocked(copy.server) as vault:
        backed_up(vault, copy.folder)
    source = source_of(copy.folder, copy.shares[:3])
    scratch = machine()
    assert list(drill(source, copy.shares[:3], scratch.home, 0))[-1]["said"]["problems"] == []
    new = machine()
    list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3]))
    assert exported(new) == copy.held


# --- while the server runs


class Halted:
    """A backup that stands still at a pack, until told to go on: the pack is a pipe meanwhile."""

    def __init__(self, server: Server, pack: Path, folder: Path) -> None:
        self._pack, self._content = pack, pack.read_bytes()
        pack.unlink()
        os.mkfifo(pack)
        self.process = asking(server, "backup", "--to", folder)
        # Opens when the vault does.
        self._pipe = os.open(pack, os.O_WRONLY)

    def go_on(self, whole: bool = True) -> tuple[int, str]:
        """Let it have the pack, or a part; return status and messages."""
        with open(self._pipe, "wb") as pipe:
            pipe.write(self._content if whole else self._content[:5000])
        self._pack.unlink()
        self._pack.write_bytes(self._content)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


def test_stores_go_on_while_a_backup_is_made_and_whatever_removes_packs_waits(
    copy: House, machine: Callable[[], Server], tmp_path: Path
) -> None:
    server, folder = copy.server, tmp_path / "backup"
    server.start()
    pack = next(p for p in sorted((server.store / "objects").rglob("*")) if p.is_file())
    items = server.ok("quarantine", "list", "--json").json()["items"]
    halted = Halted(server, pack, folder)
    # Nothing is refused, and what comes is admitted.
    fresh = [changed(MR, tmp_path, SOPInstanceUID=f"1.2.4.{n}", StudyInstanceUID=f"1.2.{n}") for n in range(3)]
    assert send(server, fresh) == [0, 0, 0]
    server.wait_admitted()
    assert len(server.list()) == 5
    again = server.run("backup", "--to", tmp_path / "second")
    assert again.status == 1
    assert "another backup is being made" in again.err
    assert Folder(tmp_path / "second").generations() == []
    for item in items:
        refused = server.run("quarantine", "resolve", item["id"], "--discard", "--reason", "x")
        assert refused.status == 1
        assert "a backup is being made" in refused.err
    before = objects(server.home).keys() - {str(pack.relative_to(server.home))}
    with asking(server, "erase", "--study", "1.2.1", "--reason", "a test", "--yes") as erasure:
        assert erasure.stderr is not None
        assert "a backup is being made" in erasure.stderr.readline()
        assert erasure.poll() is None
        assert objects(server.home).keys() >= before
        status, said = halted.go_on()
        assert status == 0, said
        out, _ = erasure.communicate(timeout=60)
        assert erasure.returncode == 0
        assert "certificate" in out
    assert {row["study"] for row in server.list("study")} >= {"1.2.0", "1.2.2"}
    assert "1.2.1" not in {row["study"] for row in server.list("study")}
    server.ok("quarantine", "resolve", items[0]["id"], "--discard", "--reason", "x")
    server.stop()
    # One state: that of the moment at which it began.
    new = machine()
    source = source_of(folder, copy.shares[:3])
    assert source.problems() == []
    list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3]))
    assert exported(new) == copy.held


def test_what_waits_is_counted_and_not_in_it(copy: House, tmp_path: Path) -> None:
    copy.server.start("gate")
    assert send(copy.server, [changed(MR, tmp_path, SOPInstanceUID="1.2.4.1", StudyInstanceUID="1.2.1")]) == [0]
    copy.server.stop()
    with unlocked(copy.server) as vault:
        first = backed_up(vault, copy.folder)
        vault.admit()
        second = backed_up(vault, copy.folder)
    assert (first.waiting, second.waiting) == (1, 0)
    assert second.packs == first.packs + 1


def test_a_second_backup_copies_only_what_is_new(copy: House, tmp_path: Path) -> None:
    folder = Folder(copy.folder)
    before = {p: p.stat() for p in (copy.folder / "packs").rglob("*") if p.is_file()}
    copy.server.start("gate")
    assert send(copy.server, [changed(MR, tmp_path, SOPInstanceUID="1.2.4.1", StudyInstanceUID="1.2.1")]) == [0]
    copy.server.stop()
    with unlocked(copy.server) as vault:
        vault.admit()
        made = backed_up(vault, copy.folder)
    after = {p: p.stat() for p in (copy.folder / "packs").rglob("*") if p.is_file()}
    assert len(after) == len(before) + 1
    for path, found in before.items():
        assert (after[path].st_ino, after[path].st_mtime_ns) == (found.st_ino, found.st_mtime_ns)
    key = load(copy.server.config).signing_key
    for name in folder.generations():
        assert list(folder.check(folder.generation(name), folder.read(folder.generation(name), key))) == []
    assert folder.generations()[-1] == made.id


def test_only_so_many_backups_are_kept_and_each_of_those_is_whole(copy: House, tmp_path: Path) -> None:
    folder = Folder(copy.folder)
    with unlocked(copy.server) as vault:
        names = [backed_up(vault, copy.folder).id for _ in range(2)]
        study = vault.unlocked().index.packs_of(STUDY)
        list(Erase(vault).run(0, STUDY, "a test"))
        # In the folder as long as a backup in it names them.
        names.append(backed_up(vault, copy.folder, keep=3).id)
        assert folder.generations() == names
        assert all(folder.pack(pack).exists() for pack in study)
        names.append(backed_up(vault, copy.folder, keep=1).id)
        with pytest.raises(StrongroomError, match="-1 backups"):
            backed_up(vault, copy.folder, keep=-1)
    assert folder.generations() == names[-1:]
    assert not any(folder.pack(pack).exists() for pack in study)
    assert (
        list(folder.check(folder.generation(), folder.read(folder.generation(), load(copy.server.config).signing_key)))
        == []
    )


def test_a_backup_that_is_made_though_an_old_one_cannot_be_read_says_both(copy: House) -> None:
    old = Folder(copy.folder).generation()
    with unlocked(copy.server) as vault:
        backed_up(vault, copy.folder)
        (old / "keys.db").write_bytes(b"")
        with pytest.raises(StrongroomError, match="the backup is made, but older ones") as caught:
            backed_up(vault, copy.folder, keep=3)
        assert caught.value.status == 3
        assert len(Backups(vault).known()) == 3
        # The lock is free again.
        backed_up(vault, copy.folder)


def test_a_vault_that_is_locked_makes_no_backup_and_one_locked_in_the_middle_leaves_none(copy: House) -> None:
    before = everything(copy.folder)
    with unlocked(copy.server) as vault:
        making = Backups(vault).run(0, copy.folder)
        assert next(making)["kind"] == "step"
        vault.lock()
        with pytest.raises(StrongroomError, match="locked during the backup"):
            list(making)
        with pytest.raises(StrongroomError, match="the vault is locked"):
            list(Backups(vault).run(0, copy.folder))
        assert len(Folder(copy.folder).generations()) == 1
        assert load(copy.server.config).key_file is not None
        vault.unlock(slots.read_key_file(copy.server.home / "store.key"))
        backed_up(vault, copy.folder)
    assert before.items() <= everything(copy.folder).items()
    copy.server.set("unlock", key_file="")
    assert copy.server.run("backup", "--to", copy.folder).status == 4


def test_a_medium_that_is_slow_keeps_nobody_waiting(copy: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with unlocked(copy.server) as vault:
        staging = load(copy.server.config).backup_staging
        whole, slow = storage_backup.copy_file, list[str]()

        def copied(source: Path, target: Path) -> int:
            if target.is_relative_to(copy.folder) and source.parent == staging:
                # Somebody else's turn, while this copy does not come back.
                with ThreadPoolExecutor(1) as somebody:
                    somebody.submit(vault.admit).result(timeout=30)
                slow.append(source.name)
            return whole(source, target)

        monkeypatch.setattr(storage_backup, "copy_file", copied)
        backed_up(vault, copy.folder)
        assert {"keyring", "keys.db"} < set(slow)
        assert not staging.exists()


def test_copies_that_a_killed_backup_left_are_gone_before_anything_is_erased(copy: House) -> None:
    staging = load(copy.server.config).backup_staging
    staging.mkdir()
    shutil.copy(copy.server.store / "keys.db", staging / "keys.db")
    with unlocked(copy.server):
        assert not staging.exists()


def test_a_command_that_goes_away_gives_its_lock_back(copy: House, tmp_path: Path) -> None:
    server = copy.server
    server.start()
    pack = next(p for p in sorted((server.store / "objects").rglob("*")) if p.is_file())
    halted = Halted(server, pack, tmp_path / "backup")
    halted.process.kill()
    assert halted.go_on()[0] == -signal.SIGKILL
    # The vault finds out when it has something to say.
    for _ in range(20):
        done = server.run("backup", "--to", tmp_path / "backup")
        if done.status == 0:
            break
        assert "another backup is being made" in done.err
    assert done.status == 0


# --- what a backup needs


def test_a_store_without_recovery_key_is_backed_up_only_with_a_reason(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    server = make_server()
    server.init()
    done = server.run("backup", "--to", tmp_path / "backup")
    assert done.status == 1
    assert "there is no recovery key" in done.err
    assert server.run("backup", "--to", tmp_path / "backup", "--without-export", " ").status == 1
    assert Folder(tmp_path / "backup").generations() == []
    server.ok("backup", "--to", tmp_path / "backup", "--without-export", "it has its anchors")
    done = server.run("restore", "--from", tmp_path / "backup", "--key-file", tmp_path / "k", stdin="\n")
    assert done.status == 1
    assert "holds no recovery export" in done.err
    # As the hint says: beside its own anchors it opens.
    generation = Folder(tmp_path / "backup").generation()
    for name in ("keyring", "keys.db", "ledger-1.db"):
        (server.store / name).unlink()
        shutil.copy(generation / name, server.store)
    assert server.run("verify").status == 0


def test_a_folder_that_is_none_for_backups_is_refused_and_says_who_writes_it(copy: House, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with unlocked(copy.server) as vault:
        for folder, said in (
            (tmp_path / "taken", "other files"),
            (copy.server.store / "objects", "one in the other"),
            (Path("relative"), "no absolute path"),
            (tmp_path / "taken" / "file", "Not a directory"),
        ):
            with pytest.raises(StrongroomError, match=said):
                backed_up(vault, folder)
        with pytest.raises(StrongroomError, match="Not a directory") as caught:
            backed_up(vault, tmp_path / "taken" / "file" / "below")
        assert "ReadWritePaths" in caught.value.hint
        assert Folder(copy.folder).generation() == Folder(copy.folder).generation()


def test_a_backup_of_a_store_that_lost_a_pack_is_refused_with_its_name(copy: House) -> None:
    with unlocked(copy.server) as vault:
        open_ = vault.unlocked()
        [name, *_] = open_.keys_db.packs()
        shutil.rmtree(copy.folder)
        found = open_.archive.find(name)
        assert found is not None
        content = found.read_bytes()
        for damage in (content[:-1], b""):
            found.chmod(0o600)
            found.write_bytes(damage) if damage else found.unlink()
            with pytest.raises(StrongroomError, match=f"1 packs are missing or damaged, the first is {name}") as caught:
                backed_up(vault, copy.folder)
            assert caught.value.status == 3
            assert Folder(copy.folder).generations() == []
        found.write_bytes(content)
        backed_up(vault, copy.folder)


@pytest.mark.needs_root
def test_a_full_disk_makes_no_backup_harms_none_and_the_next_one_goes_on(copy: House, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", 1)
    try:
        folder = tmp_path / "disk" / "backup"
        with unlocked(copy.server) as vault:
            first = backed_up(vault, folder)
            before = everything(folder)
            (tmp_path / "disk" / "other").write_bytes(b"\0" * (free(disk.folder) - 8192))
            for step in range(4):
                with pytest.raises(StrongroomError, match="no backup was made") as caught:
                    backed_up(vault, folder)
                assert caught.value.hint
                assert Folder(folder).generations() == [first.id]
                assert before.items() <= everything(folder).items()
                with (tmp_path / "disk" / "other").open("r+b") as file:
                    file.truncate((tmp_path / "disk" / "other").stat().st_size - 16384 * (step + 1))
            (tmp_path / "disk" / "other").unlink()
            made = backed_up(vault, folder)
        assert Folder(folder).generations() == [first.id, made.id]
        assert [path.name for path in (folder / "generations").iterdir()].count(made.id) == 1
        assert source_of(folder, copy.shares[:3]).problems() == []
    finally:
        disk.unmount()


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.needs_root
def test_a_full_disk_during_a_restore_says_so_and_after_room_was_made_it_goes(
    house: House, machine: Callable[[], Server], tmp_path: Path
) -> None:
    new = machine()
    disk = Disk(new.home, 1)
    try:
        filler = new.home / "other"
        source = source_of(house.folder, house.shares[:3])
        for left in (8192, 65_536, 200_000):
            filler.write_bytes(b"\0" * (free(disk.folder) - left))
            with pytest.raises(StrongroomError) as caught:
                list(restore(source, Machine(new.home / "a" / "strongroom.toml", new.home / "k"), house.shares[:3]))
            assert "remove what was made" in caught.value.hint, caught.value
            shutil.rmtree(new.home / "a")
            (new.home / "k").unlink(missing_ok=True)
            filler.unlink()
        disk.remount("size=8m")
        list(restore(source, Machine(new.config, new.home / "k"), house.shares[:3]))
        assert exported(new) == house.held
    finally:
        disk.unmount()


# --- rotation and erasure


def test_a_rotation_waits_for_the_confirmation_of_a_backup_that_was_made_after_it(copy: House, tmp_path: Path) -> None:
    carried = tmp_path / "carried"
    with unlocked(copy.server) as vault:
        said = [event["text"] for event in Rotate(vault).run(0, "a test", {"export": "a test"}) if "text" in event]
        assert "a backup made since is confirmed" in said[-1]
        [old] = Backups(vault).known()
        Backups(vault).confirm(0, old.id)
        assert Rotate(vault).destroy_due() == []
        made = backed_up(vault, copy.folder)
        assert Rotate(vault).destroy_due() == []
    shutil.copytree(copy.folder, carried)
    pack = pack_in(carried)
    pack.rename(tmp_path / "pack")
    done = copy.server.run("backup", "confirm", carried)
    assert done.status == 6
    assert f"pack {pack.name} is missing" in done.out
    (tmp_path / "pack").rename(pack)
    assert copy.server.run("backup", "confirm", carried, "--backup", "none").status == 1
    assert f"backup {made.id} is confirmed" in copy.server.ok("backup", "confirm", carried).out
    with unlocked(copy.server) as vault:
        assert Rotate(vault).destroy_due() == [2]
    assert not (copy.server.home / "anchors" / "anchor-2").exists()
    # With the shares the backup of that time opens all the same: its export holds the version.
    found, generation, exports = find(copy.folder, old.id)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    source = Source(found, generation, exports, copy.shares[:3])
    assert list(drill(source, copy.shares[:3], scratch, 0))[-1]["said"]["problems"] == []


def test_a_backup_made_in_the_middle_of_a_rotation_restores_and_the_rotation_goes_on(
    copy: House, machine: Callable[[], Server]
) -> None:
    waived = {"export": "a test", "backup": "a test"}
    with unlocked(copy.server) as vault:
        rotation = Rotate(vault).run(0, "a test", waived)
        while not next(rotation).get("text", "").startswith("rewrapped"):
            pass
        rotation.close()
        assert vault.unlocked().database_version == 2
        made = backed_up(vault, copy.folder)
        # It holds what is under the new version, but its ledger is under the old one: that must stay.
        assert made.version == 2
        assert vault.unlocked().keys_db.versions().keys() == {3}
    new = machine()
    list(restore(source_of(copy.folder, copy.shares[:3]), Machine(new.config, new.home / "k"), copy.shares[:3]))
    assert exported(new) == copy.held
    with unlocked(new) as vault:
        list(Rotate(vault).run(0, "", waived))
        assert vault.unlocked().database_version == 3
        assert vault.unlocked().ring.body.versions[1].state == "destroyed"
    assert exported(new) == copy.held


def test_what_was_erased_since_is_back_after_a_restore_and_can_be_erased_again(
    copy: House, machine: Callable[[], Server]
) -> None:
    with unlocked(copy.server) as vault:
        list(Erase(vault).run(0, STUDY, "a test"))
    source = source_of(copy.folder, copy.shares[:3])
    new = machine()
    list(restore(source, Machine(new.config, new.home / "k"), copy.shares[:3]))
    with unlocked(new) as vault:
        packs = vault.unlocked().index.packs_of(STUDY)
        assert packs
        list(Erase(vault).run(0, STUDY, "erased on the old machine"))
        assert vault.unlocked().index.packs_of(STUDY) == []
        assert not any(vault.unlocked().archive.find(pack) for pack in packs)


def test_no_backup_opens_an_erased_study_once_version_and_shares_are_destroyed_and_each_of_them_still_does(
    copy: House, tmp_path: Path
) -> None:
    server, folder = copy.server, copy.folder
    saved = tmp_path / "saved"
    shutil.copytree(server.home / "anchors", saved)
    with unlocked(server) as vault:
        open_ = vault.unlocked()
        store_id = open_.ring.store_id
        gone = set(open_.index.packs_of(STUDY))
        old_recovery = [key.id for key in open_.ring.body.recovery]
        list(Erase(vault).run(0, STUDY, "a test"))
        # The one of the module's test study is in the ledger, too.
        [erasure] = [e for e in open_.ledger.erasures() if not e.versions or 2 in e.versions]
        backed_up(vault, folder)
        key, words = shares.new_recovery(store_id, 2, 2, created=clock.now())
        Recovery(vault).add(0, key)
        list(Rotate(vault).run(0, "a test", {"export": "a test", "backup": "a test"}))
        assert open_.ring.body.versions[1].state == "destroyed"

        def state() -> str:
            Erase(vault).finalize()
            path = vault.config.store_path / "certificates" / f"{erasure.id}.json"
            return str(signed.read("certificate", path.read_bytes(), vault.config.signing_key)["state"])

        # The shares of the first recovery key still open an export of that version, in the backups and here.
        assert state() == "pending"
        for one in old_recovery:
            Recovery(vault).retire(0, one)
        assert state() == "final"
        backed_up(vault, folder)
    generations = [Folder(folder).generation(name) for name in Folder(folder).generations()]
    assert len(generations) == 3

    def opened(ring: Keyring) -> int:
        """Try all that a keyring could open of the erased study, in every generation; return how much did."""
        found = 0
        for generation in generations:
            database = KeysDatabase(generation / "keys.db", immutable=True)
            records = [r for r in database.records() if r.pack_id in gone]
            database.close()
            for record in records:
                with contextlib.suppress(SealError, KeyringError, AnchorError):
                    unwrapped = ring.version(record.version).unwrap_study(record.sealed, record.place)
                    with PackFile(Folder(folder).pack(record.pack_id)) as file:
                        found += sum(isinstance(one, Record) for one in OpenedPack(file, unwrapped).records())
        ring.forget()
        return found

    def by_anchors(anchors: Path) -> int:
        secret, found = slots.read_key_file(server.home / "store.key"), 0
        for generation in generations:
            with tempfile.TemporaryDirectory() as place:
                # Whoever has the folder can also write what keyring it saw last.
                tried = FileAnchors(shutil.copytree(anchors, Path(place) / "anchors"))
                tried.set_generation(store_id, 0)
                found += opened(keyring.unlock(generation / "keyring", secret, tried))
        return found

    def by_shares(typed_words: list[str]) -> int:
        secret, found = shares.combine(typed_words), 0
        for number, export in enumerate(sorted(e for g in generations for e in g.glob("*.export"))):
            with contextlib.suppress(shares.RecoveryError):
                contents = recovery.open_export(export.read_bytes(), secret)
                anchors = FileAnchors(tmp_path / f"{typed_words[0][:20]}-{number}")
                anchors.prepare()
                made = (slots.parse_key_file(slots.new_key_file()), "rebuilt")
                found += opened(recovery.rebuild(contents, [made], AnchorSet(anchors), clock.now()))
        return found

    # Everything that is left, here and in every backup, with the key file and whatever shares are in use.
    assert by_anchors(server.home / "anchors") == 0
    assert by_shares(words) == 0
    for place in (folder, server.home / "store", server.home / "spool", server.home / "anchors"):
        for name, content in everything(place).items():
            assert [w for w in PATIENT if w in content or w.decode() in name] == [], name
    # The controls: the anchor alone does, and so do the retired key's shares, where somebody kept them.
    assert by_anchors(saved) > 0
    assert by_shares(copy.shares[:3]) > 0


# --- two users


@pytest.mark.needs_root
def test_the_vaults_user_writes_the_backup_wherever_root_asked_for_it() -> None:
    # pytest's own folders are closed to other users.
    outer = Path(tempfile.mkdtemp(prefix="strongroom-two-"))
    outer.chmod(0o755)
    server = Server(outer / "s")
    asked = ("--without-export", "a test")
    try:
        server.init("--vault-user", "daemon", "--gate-user", "nobody")
        server.ok("backup", "--to", outer / "backup", *asked)
        owner = pwd.getpwnam("daemon").pw_uid
        for path in (outer / "backup", *(outer / "backup").rglob("*")):
            assert (path.stat().st_uid, path.stat().st_mode & 0o077) == (owner, 0), path
        (outer / "mine").mkdir(mode=0o700)
        refused = server.run("backup", "--to", outer / "mine", *asked)
        assert refused.status == 1
        assert "the vault's user daemon writes it" in refused.err
        assert "ReadWritePaths" in refused.err
    finally:
        server.kill_all()
        shutil.rmtree(outer)
