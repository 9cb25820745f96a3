"""Data sets of instances, opened one after the other; the pack that was used last stays open for the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType

from keys.anchors import AnchorError
from keys.keyring import KeyringError
from keys.seal import SealError
from storage.archive import Archive
from storage.index import Place
from storage.pack import PackError
from storage.packfile import OpenedPack, PackFile
from storescp.errors import StrongroomError
from storescp.vault.examine import open_pack
from storescp.vault.opened import Open, Reader
from storescp.vault.state import Vault


class Contents:
    """Opens instances of an unlocked store, with a reader's connections. A context manager."""

    def __init__(self, vault: Vault, opened: Open, reader: Reader) -> None:
        self._vault = vault
        self._opened = opened
        self._reader = reader
        self._pack: OpenedPack | None = None
        self._pack_id = ""

    def __enter__(self) -> Contents:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open."""
        self._let_go()

    def place(self, pack_id: str, object_id: bytes) -> Place:
        """Return where an object lies that was told to be in a pack, whatever the pack is called by now.

        Raises:
            StrongroomError: There is none.
        """
        place = self._reader.index.at(pack_id, object_id)
        if place is None:
            raise StrongroomError("no such instance")
        return place

    def dataset(self, place: Place) -> Iterator[bytes]:
        """Return the data set of an instance, its pack opened; see ``open_parts`` for what reading it proves when.

        Raises:
            StrongroomError: The pack is missing, or does not open.
        """
        try:
            return self._open(place)
        except StrongroomError:
            # A pack under a new study key may be coming into its place: once that is done, it is there or not.
            with self._vault.admitting():
                moved = self._reader.index.at(place.pack_id, place.frame.object_id)
                if moved is None or moved.pack_id == place.pack_id:
                    raise
                return self._open(moved)

    def _open(self, place: Place) -> Iterator[bytes]:
        if self._pack is None or self._pack_id != place.pack_id:
            self._let_go()
            file = open_file(self._opened.archive, place.pack_id)
            try:
                self._pack = open_pack(file, self._opened.ring, self._reader.keys_db.find(place.pack_id))
            except (SealError, KeyringError, AnchorError, PackError) as error:
                file.close()
                raise StrongroomError(f"pack {place.pack_id} does not open: {error}") from error
            self._pack_id = place.pack_id
        return self._pack.dataset(place.frame)

    def _let_go(self) -> None:
        if self._pack is not None:
            self._pack.file.close()
            self._pack = None


def open_file(archive: Archive, pack_id: str) -> PackFile:
    """Open a pack's file.

    Raises:
        StrongroomError: It is missing.
    """
    # Admission may move a pack between finding it and opening it; it moves only once.
    for _ in range(2):
        path = archive.find(pack_id)
        if path is not None:
            with suppress(FileNotFoundError):
                return PackFile(path)
    raise StrongroomError(f"pack {pack_id} is missing", hint="restore it from a backup, or have it sent again")
