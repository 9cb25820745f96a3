"""Files past the page cache: page-aligned memory, O_DIRECT where the file system has it, space allocated ahead.

A buffered write costs a copy and, into a cold page cache, several times the CPU time. Offsets, lengths and memory are
multiples of a page everywhere here, so that the same code writes both ways.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
# What a record is collected in before it is written.
HALF_BYTES = 1 << 20
_HUGE_PAGE = 1 << 21
_LEAST_AHEAD = 1 << 20
_MOST_AHEAD = 64 << 20
# Of what is free, no more than this part is allocated ahead of its use.
_FREE_PART = 16
_BUFFERS_KEPT = 8
_FIRST_WINDOW = 1 << 16


class Buffer:
    """Memory for one record at a time: two halves, one fills while the other is written; and its first page again.

    The halves are one huge page where the system has them: the kernel pins one page for a write and not 256.
    """

    def __init__(self) -> None:
        view = _huge()
        self.halves = (view[:HALF_BYTES], view[HALF_BYTES : 2 * HALF_BYTES])
        self.first = view[2 * HALF_BYTES : 2 * HALF_BYTES + PAGE]


def _huge() -> memoryview:
    """Return memory that begins with a huge page where the system has them; a page at least follows that."""
    memory = mmap.mmap(-1, 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
    return memoryview(memory)[start:]


class Buffers:
    """Buffers that are lent out; as many as records arrive at once, a few are kept. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Buffer] = []

    def take(self) -> Buffer:
        """Return a buffer that nobody else uses."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return Buffer()

    def give(self, buffer: Buffer) -> None:
        """Give a buffer back."""
        with self._lock:
            if len(self._free) < _BUFFERS_KEPT:
                self._free.append(buffer)


def page_of(content: bytes) -> memoryview:
    """Return 4,096 bytes in memory that can be written directly."""
    page = memoryview(mmap.mmap(-1, PAGE))
    page[: len(content)] = content
    return page


def zeros() -> memoryview:
    """Return 1 MiB of zeros that can be written directly."""
    return memoryview(mmap.mmap(-1, HALF_BYTES))


def create(path: Path, mode: int) -> tuple[int, bool]:
    """Create a file to write; return its descriptor, and whether writes pass the page cache.

    Raises:
        OSError: It is there already, or cannot be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, mode), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # The file was made before the flag was refused.
    path.unlink(missing_ok=True)
    return os.open(path, flags, mode), False


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write whole pages.

    Raises:
        OSError: The disk refused it.
    """
    while data:
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count


def allocate(descriptor: int, allocated: int, needed: int) -> int:
    """Allocate space ahead of its use, the more the longer the file; return up to where.

    A disk that is almost full or a file system that cannot do it is no error: writing allocates, too.

    Args:
        descriptor: The file.
        allocated: Up to where it has space.
        needed: Up to where it is about to be written.
    """
    ahead = min(max(_LEAST_AHEAD, allocated), _MOST_AHEAD)
    free = os.fstatvfs(descriptor)
    ahead = min(ahead, free.f_bavail * free.f_frsize // _FREE_PART // PAGE * PAGE)
    until = max(needed, allocated + ahead)
    try:
        os.posix_fallocate(descriptor, allocated, until - allocated)
    except OSError:
        return needed
    return until


def open_file(path: Path, flags: int) -> int:
    """Open a file that somebody else may have put there, past the page cache where that works.

    Raises:
        OSError: It is not there, or a link.
    """
    # O_NONBLOCK: whoever writes the folder could leave a FIFO, and an open of that would wait for ever.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file that somebody else may have put there, to look at it or take its lock.

    Raises:
        OSError: It is not there, or a link.
    """
    descriptor = open_file(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Pages:
    """Reads a file through a window of page-aligned memory, which grows while it is read from front to back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = memoryview(b"")
        self._start = 0
        self._filled = 0
        self._ahead = _FIRST_WINDOW

    def view(self, offset: int, length: int) -> memoryview:
        """Return bytes at an offset, as many of ``length`` as the window holds; none at the end of the file.

        They are valid until the next call.
        """
        if not self._start <= offset < self._start + self._filled:
            self._load(offset, length)
        at = offset - self._start
        return self._memory[at : min(at + length, self._filled)]

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes at an offset, fewer only at the end of the file."""
        part = self.view(offset, length)
        if len(part) == length:
            return bytes(part)
        parts = [bytes(part)]
        while part and length > len(part):
            offset += len(part)
            length -= len(part)
            part = self.view(offset, length)
            parts.append(bytes(part))
        return b"".join(parts)

    def padded(self, offset: int, part: memoryview) -> memoryview:
        """Return what ``view`` gave at an offset that begins a page, with zeros behind it up to a whole page."""
        at = offset - self._start
        end, until = at + len(part), at + -(-len(part) // PAGE) * PAGE
        self._memory[end:until] = bytes(until - end)
        return self._memory[at:until]

    def _load(self, offset: int, length: int) -> None:
        start = offset // PAGE * PAGE
        if self._filled and start == (self._start + self._filled) // PAGE * PAGE:
            self._ahead = min(self._ahead * 4, HALF_BYTES)
        wanted = min(max(self._ahead, -(-(offset - start + length) // PAGE) * PAGE), HALF_BYTES)
        if len(self._memory) < wanted:
            small = wanted <= _FIRST_WINDOW
            self._memory = memoryview(mmap.mmap(-1, _FIRST_WINDOW)) if small else _huge()
        # Begun anew before it is filled: an error must not leave other bytes under this offset.
        self._start, self._filled = start, 0
        self._filled = os.preadv(self._descriptor, [self._memory[:wanted]], start)
