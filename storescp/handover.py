"""What the vault hands to the desk: a stream of instances, each announced, then in parts, then said to be whole.

::

    announcement := u32 length || JSON
    stream       := announcement of a Manifest, then for each instance: announcement of an Instance, part*, end
    part         := u32 length (1 to 16 MiB) || bytes of the data set
    end          := u32 0, it is whole; or u32 0xFFFFFFFF, it does not open: what came of it is worth nothing

Numbers are big endian. Pure: bytes in, instances out. Whoever stops reading closes the connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

WHOLE, BROKEN = (0).to_bytes(4, "big"), b"\xff\xff\xff\xff"
_ANNOUNCED_LIMIT = 1 << 20
_PART_LIMIT = 16 << 20
_T = TypeVar("_T", bound=msgspec.Struct)


class HandoverError(Exception):
    """The stream ends early, or is none."""


class BrokenError(Exception):
    """An instance does not open; the others of the stream may."""


class Kind(msgspec.Struct, frozen=True):
    """How many instances there are of a SOP class in a transfer syntax."""

    sop_class: str
    transfer_syntax: str
    instances: int


class Manifest(msgspec.Struct, frozen=True):
    """What a stream holds: how many instances, their bytes, and of which kinds."""

    instances: int
    bytes: int
    kinds: list[Kind]


class Instance(msgspec.Struct, frozen=True):
    """An instance of the stream; ``length`` of its data set in bytes."""

    study: str
    series: str
    sop: str
    sop_class: str
    transfer_syntax: str
    calling: str
    length: int


def announce(what: Manifest | Instance) -> bytes:
    """Return an announcement."""
    content = msgspec.json.encode(what)
    return len(content).to_bytes(4, "big") + content


def part(length: int) -> bytes:
    """Return what stands before a part of so many bytes."""
    return length.to_bytes(4, "big")


class Taking:
    """The receiving end."""

    def __init__(self, content: Iterator[bytes | memoryview]) -> None:
        """Begin to take a stream; reads its manifest.

        Args:
            content: Its bytes, each piece valid until the next one.

        Raises:
            HandoverError: It ends early, or is none.
        """
        self._content = content
        self._have = memoryview(b"")
        self.manifest = self._announced(Manifest)

    def instances(self) -> Iterator[tuple[Instance, Iterator[memoryview]]]:
        """Yield each instance with the parts of its data set; what is not read of one is skipped.

        Reading the parts raises BrokenError where an instance does not open. The end of the iteration says that
        nothing is missing, and that nothing follows.

        Raises:
            HandoverError: The stream ends early, goes on, or is none.
        """
        for _ in range(self.manifest.instances):
            instance = self._announced(Instance)
            parts = self._parts(instance.length)
            yield instance, parts
            try:
                for _left in parts:
                    pass
            except BrokenError:
                continue
        if self._have or any(self._content):
            raise HandoverError("the stream goes on behind its last instance")

    def _parts(self, left: int) -> Iterator[memoryview]:
        while True:
            length = int.from_bytes(self._exactly(4), "big")
            if length == 0:
                if left:
                    raise HandoverError("an instance is shorter than was said")
                return
            if length == 0xFFFFFFFF:
                raise BrokenError
            if length > _PART_LIMIT:
                raise HandoverError("a part is too long")
            left -= length
            if left < 0:
                raise HandoverError("an instance is longer than was said")
            while length:
                if not self._have:
                    self._more()
                taken, self._have = self._have[:length], self._have[length:]
                length -= len(taken)
                yield taken

    def _announced(self, kind: type[_T]) -> _T:
        length = int.from_bytes(self._exactly(4), "big")
        if length > _ANNOUNCED_LIMIT:
            raise HandoverError("an announcement is too long")
        try:
            return msgspec.json.decode(self._exactly(length), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise HandoverError("an announcement is malformed") from error

    def _exactly(self, length: int) -> bytes:
        while len(self._have) < length:
            self._more()
        taken, self._have = bytes(self._have[:length]), self._have[length:]
        return taken

    def _more(self) -> None:
        for content in self._content:
            if content:
                self._have = memoryview(b"".join((self._have, content)) if self._have else content)
                return
        raise HandoverError("the stream ends early")
