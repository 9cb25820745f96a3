"""The folder that a backup is: generations beside each other, and the packs that they share.

::

    strongroom-backup          which store, in clear
    packs/ab/<pack id>         each pack once, as it lies in the archive
    generations/<id>/          one state: keyring, keys.db, ledger-<v>.db, audit/, recovery exports, manifest

Everything in it is sealed as it is in the store; the manifest is signed by the store, and written last.
Source: docs/format.md, section 11.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys import encoding, signed
from keys.signed import SignedError
from storage.keysdb import KeysDatabase
from storage.sqlite import DatabaseError

MARK = "strongroom-backup"
MANIFEST = "manifest"
LABEL = "backup"
# What a drill signs.
DRILL = "drill"
EXPORT_SUFFIX = ".export"
_MAKING = ".making"
_TIME = "%Y%m%dT%H%M%SZ"
_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_PACK = re.compile(r"[0-9a-f]{32}")
_PART = 1 << 20


class BackupError(Exception):
    """A backup is missing, incomplete, changed, or another store's."""


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a generation: its name with ``/``, its length in bytes, its SHA-256 in hex."""

    name: str
    length: int
    sha256: str


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What a generation holds.

    ``version`` is the lowest key version that a study key in it is wrapped under; ``packs``, ``bytes`` and ``digest``
    are those of the packs that ``keys.db`` names; ``raw`` are files of the quarantine without a study key. ``waiting``
    deposits were not admitted yet and are not in it.
    """

    audit: int
    bytes: int
    created: str
    digest: str
    files: list[Listed]
    format: int
    generation: int
    id: str
    packs: int
    raw: list[str]
    store_id: str
    version: int
    waiting: int


class Folder:
    """A backup folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._packs = path / "packs"
        self._generations = path / "generations"

    def prepare(self, store_id: str) -> None:
        """Make the folder, or check that it is this store's; remove what a backup that broke off left.

        Raises:
            BackupError: It is another store's, or holds other files.
            OSError: It cannot be made.
        """
        mark = self.path / MARK
        if not mark.exists():
            # A mark in the making is what a backup left that was killed there.
            if self.path.exists() and any(path.name != f"{MARK}.new" for path in self.path.iterdir()):
                raise BackupError(f"{self.path} holds other files: a backup needs a folder of its own")
            if not self.path.exists():
                self.path.mkdir(mode=0o700, parents=True)
                # Who may make a folder there need not be allowed to read what else there is.
                with contextlib.suppress(PermissionError):
                    encoding.sync_folder(self.path.parent)
            encoding.replace(mark, encoding.canonical({"format": 1, "store_id": store_id}) + b"\n")
        elif self.store_id() != store_id:
            raise BackupError(f"{self.path} holds backups of another store")
        for folder in (self._packs, self._generations):
            folder.mkdir(mode=0o700, exist_ok=True)
        encoding.sync_folder(self.path)
        for leftover in self._generations.glob(f"*{_MAKING}"):
            shutil.rmtree(leftover)
        for leftover in self._packs.glob("*/*.new"):
            leftover.unlink()

    def store_id(self) -> str:
        """Return whose backups these are.

        Raises:
            BackupError: The folder is none of backups.
        """
        try:
            return str(encoding.decode((self.path / MARK).read_bytes(), dict)["store_id"])
        except (OSError, ValueError, KeyError) as error:
            raise BackupError(f"{self.path} is no folder of backups") from error

    def generations(self) -> list[str]:
        """Return the ids of the whole generations, the oldest first."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(p.name for p in self._generations.iterdir() if _ID.fullmatch(p.name))
        return []

    def generation(self, name: str = "") -> Path:
        """Return the folder of a generation; the newest one's without a name.

        Raises:
            BackupError: There is none.
        """
        known = self.generations()
        if not known or (name and name not in known):
            raise BackupError(f"{self.path} holds no backup" + (f" {name}" if name else ""))
        return self._generations / (name or known[-1])

    def next_id(self, suffix: str) -> str:
        """Return a new generation's name, behind those of all others: whatever the clock says, it is the newest one.

        Args:
            suffix: Eight hex digits: names are not the same in two folders.
        """
        now = datetime.now(UTC)
        if known := self.generations():
            newest = datetime.strptime(known[-1][: -len(suffix) - 1], _TIME).replace(tzinfo=UTC)
            now = max(now, newest + timedelta(seconds=1))
        return f"{now:{_TIME}}-{suffix}"

    def begin(self, name: str) -> Path:
        """Make the folder that a generation is made in."""
        making = self._generations / f"{name}{_MAKING}"
        making.mkdir(mode=0o700)
        return making

    def finish(self, making: Path, manifest: Manifest, signing: Ed25519PrivateKey) -> Path:
        """Sign and write the manifest; give the generation its name, durably."""
        encoding.create(making / MANIFEST, signed.write(LABEL, manifest, signing))
        # Every folder of packs: one that was killed may have copied some without making their names durable.
        folders = [path for root in (making, self._packs) for path in (root, *root.rglob("*")) if path.is_dir()]
        for folder in folders:
            encoding.sync_folder(folder)
        target = making.with_name(manifest.id)
        os.rename(making, target)
        encoding.sync_folder(self._generations)
        return target

    def remove(self, name: str) -> None:
        """Remove a generation; its packs stay until ``prune``."""
        gone = self._generations / f"{name}{_MAKING}"
        os.rename(self._generations / name, gone)
        encoding.sync_folder(self._generations)
        shutil.rmtree(gone)

    # --- packs

    def pack(self, pack_id: str) -> Path:
        """Return where a pack lies."""
        return self._packs / pack_id[:2] / pack_id

    def has(self, pack_id: str, length: int) -> bool:
        """Tell whether a pack is here with its length: an admitted pack never changes."""
        with contextlib.suppress(FileNotFoundError):
            return self.pack(pack_id).stat().st_size == length
        return False

    def take(self, source: Path, pack_id: str) -> int:
        """Copy a pack into the folder; return its length. Its name is durable when ``finish`` has run.

        Raises:
            OSError: It cannot be copied; nothing half is left under its name.
        """
        target = self.pack(pack_id)
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700)
            encoding.sync_folder(self._packs)
        return copy_file(source, target)

    def prune(self) -> int:
        """Remove the packs that no generation names; return how many.

        Raises:
            BackupError: A generation cannot be read: nothing was removed.
        """
        named: set[str] = set()
        for name in self.generations():
            named.update(self.named(self._generations / name))
        unnamed = [path for path in self._packs.rglob("*") if path.is_file() and path.name not in named]
        for path in unnamed:
            path.unlink()
        return len(unnamed)

    def named(self, generation: Path) -> dict[str, int]:
        """Return the packs that a generation names, each with its length; -1 where the length is not known.

        Raises:
            BackupError: Its ``keys.db`` or manifest cannot be read.
        """
        try:
            raw = encoding.decode((generation / MANIFEST).read_bytes().split(b"\n", 1)[0], Manifest).raw
            packs = dict(lengths(generation / "keys.db"))
        except (OSError, DatabaseError, msgspec.MsgspecError) as error:
            raise BackupError(f"{generation.name} cannot be read: {error}") from error
        return packs | {name: -1 for name in raw if is_pack(name)}

    # --- checking

    def read(self, generation: Path, signing_key: bytes) -> Manifest:
        """Return a generation's manifest.

        Raises:
            BackupError: It is not there, was changed, or another store signed it.
        """
        try:
            content = (generation / MANIFEST).read_bytes()
            manifest = msgspec.convert(signed.read(LABEL, content, signing_key), Manifest)
        except OSError as error:
            raise BackupError(f"the manifest of {generation.name} cannot be read: {error.strerror}") from error
        except (SignedError, msgspec.MsgspecError) as error:
            raise BackupError(f"the manifest of {generation.name} does not hold: {error}") from error
        if manifest.id != generation.name:
            # An old state that passes for a new one.
            raise BackupError(f"{generation.name} is backup {manifest.id} under another name")
        return manifest

    def check(self, generation: Path, manifest: Manifest) -> Iterator[str]:
        """Yield what is wrong with a generation: files that differ, packs that are missing or of another length."""
        for one in manifest.files:
            if fault := file_fault(generation, one):
                yield fault
        # Who can write there could add a peer, or an authority to trust.
        known = {MANIFEST, *(one.name for one in manifest.files)}
        for path in sorted(generation.rglob("*")):
            name = str(path.relative_to(generation))
            if name not in known and (path.is_symlink() or not path.is_dir()):
                yield f"{name} is not in the manifest"
        try:
            packs = sorted(lengths(generation / "keys.db"))
        except (DatabaseError, OSError) as error:
            yield f"keys.db: {error}"
            return
        if (len(packs), sum(length for _, length in packs), digest(packs)) != (
            manifest.packs,
            manifest.bytes,
            manifest.digest,
        ):
            yield "keys.db names other packs than the manifest"
        for pack_id, length in packs:
            if not self.has(pack_id, length):
                yield f"pack {pack_id} is missing, or not of {length} bytes"
        for name in manifest.raw:
            if not is_pack(name) or not self.pack(name).exists():
                yield f"pack {name[:32]} of the quarantine is missing"


def remove_staging(folder: Path) -> None:
    """Remove the copies that a backup is made from: a study that is erased must not live on in them."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def is_pack(name: str) -> bool:
    """Tell whether a name is a pack's, and so none of another place."""
    return _PACK.fullmatch(name) is not None


def file_fault(generation: Path, one: Listed) -> str:
    """Return what is wrong with a file of a generation, in words; empty where it is as the manifest says."""
    place = PurePosixPath(one.name)
    path = generation / place
    if place.is_absolute() or ".." in place.parts or path.resolve() != generation.resolve() / place:
        return f"'{one.name}' is no file in the generation"
    try:
        if path.stat().st_size != one.length or sha256(path) != one.sha256:
            return f"{one.name} differs from the manifest"
    except OSError as error:
        return f"{one.name}: {error.strerror}"
    return ""


def lengths(keys_db: Path) -> Iterator[tuple[str, int]]:
    """Yield the packs that a copy of ``keys.db`` names, each with its length in bytes.

    Raises:
        DatabaseError: It is none.
    """
    database = KeysDatabase(keys_db, immutable=True)
    try:
        for name, length in database.lengths():
            if not is_pack(name):
                raise DatabaseError(f"'{name[:32]}' is no pack's name")
            yield name, length
    finally:
        database.close()


def digest(packs: Iterable[tuple[str, int]]) -> str:
    """Return SHA-256, in hex, over the packs in the order of their names: ``<id> <length>``, a line each."""
    found = hashlib.sha256()
    for pack_id, length in packs:
        found.update(f"{pack_id} {length}\n".encode())
    return found.hexdigest()


def listed(folder: Path) -> list[Listed]:
    """Return the files in a folder and below it."""
    return [
        Listed(str(path.relative_to(folder)), path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(source: Path, target: Path) -> int:
    """Copy a file durably to a name that it gets when it is whole; return its length. Old modes and times stay away."""
    making = target.with_name(f"{target.name}.new")
    making.unlink(missing_ok=True)
    with source.open("rb") as reading, making.open("xb") as writing:
        os.fchmod(writing.fileno(), 0o600)
        shutil.copyfileobj(reading, writing, _PART)
        writing.flush()
        os.fsync(writing.fileno())
        length = writing.tell()
        # What is read and written once needs no memory. An advice: where nobody takes it, nothing is lost.
        with contextlib.suppress(OSError):
            for file in (reading, writing):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.rename(making, target)
    return length
