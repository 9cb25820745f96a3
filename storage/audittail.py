"""Reading an audit chain as it grows: each record once, at the cost of what is new.

``audit.read`` begins at the file before each time; whoever looks each second cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storage.auditlines import (
    CHECKPOINT,
    LINE_LIMIT,
    RECORD,
    AuditError,
    Checkpoint,
    Head,
    Record,
    Walk,
)


class Tail:
    """A place in a chain, and what comes behind it. For the process that appends, between two of its appends.

    ``head`` is the record that it stands behind. Hashes are checked, signatures are not.
    """

    def __init__(self, folder: Path, store_id: bytes, after: Head) -> None:
        """Go behind a record; to the beginning where the chain never came through it (``head.number`` is 0 then).

        Raises:
            AuditError: The chain is broken.
            OSError: It cannot be read.
        """
        self._folder = folder
        self._store_id = store_id
        self._walk = Walk(folder, store_id, since=max(1, after.number))
        self._file: Path | None = None
        self._offset = 0
        self.checkpoint: Checkpoint | None = None
        self.head = Head(0, b"")
        if after.number:
            self._find(after)

    def _find(self, after: Head) -> None:
        for found in self._walk:
            if found.number > after.number:
                break
            if isinstance(found, Record) and found.number == after.number and found.hash == after.hash:
                self.head = after
                # The line is counted when the walk goes on: what follows is read from its end.
                self._file = self._walk.file
                break
        if self._file is not None:
            self._offset = _end_of(self._file, after.number)

    def records(self, up_to: int) -> Iterator[Record]:
        """Yield what was appended since, up to a number; may be called again and again, and left in the middle.

        Raises:
            AuditError: The chain is broken, or is another one than it was.
            OSError: It cannot be read.
        """
        while self.head.number < up_to:
            file = self._file
            if file is None:
                file = self._folder / f"{self.head.number + 1:016}.log"
                if not file.exists():
                    return
                self._file, self._offset = file, 0
            with file.open("rb") as content:
                content.seek(self._offset)
                # Half a line is being written; one behind the number may be taken back.
                while (line := content.readline(LINE_LIMIT)).endswith(b"\n"):
                    if self.head.number >= up_to and line.startswith(b"R "):
                        return
                    found = self._parsed(line[:-1], file)
                    self._offset += len(line)
                    if found is not None:
                        yield found
            if not (self._folder / f"{self.head.number + 1:016}.log").exists():
                return
            self._file = None

    def _parsed(self, line: bytes, file: Path) -> Record | None:
        walk = Walk(self._folder, self._store_id)
        walk.file = file
        if self.head.number:
            walk.head = self.head
        if found := RECORD.fullmatch(line):
            record = walk._record(found)
            self.head = Head(record.number, record.hash)
            return record
        if found := CHECKPOINT.fullmatch(line):
            self.checkpoint = walk._checkpoint(found, signable=True)
            return None
        raise walk.fault(f"where record {self.head.number + 1} should be stands something else", self.head.number + 1)


def _end_of(file: Path, number: int) -> int:
    """Return where the line of a record ends in its file."""
    end, name = 0, f"R {number} ".encode()
    with file.open("rb") as content:
        while line := content.readline(LINE_LIMIT):
            end += len(line)
            if line.startswith(name):
                return end
    raise AuditError(f"{file.name}: record {number} is gone", number)
