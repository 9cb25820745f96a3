"""Files past the page cache: a window reads what stands in the file, and what is allocated ahead may be refused."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import direct
from storage.direct import HALF_BYTES, PAGE, Buffers, Pages

CONTENT = random.Random(3).randbytes(3 * HALF_BYTES + 1234)
OpenPages = Callable[[bytes], Pages]


@pytest.fixture
def open_pages(tmp_path: Path) -> Iterator[OpenPages]:
    """Read bytes that stand in a file."""
    opened: list[int] = []

    def make(content: bytes) -> Pages:
        path = tmp_path / str(len(opened))
        path.write_bytes(content)
        opened.append(direct.open_file(path, os.O_RDONLY))
        return Pages(opened[-1])

    yield make
    for descriptor in opened:
        os.close(descriptor)


# --- reading


@pytest.mark.parametrize("seed", range(4))
def test_reads_anywhere_give_the_bytes_of_the_file(seed: int, open_pages: OpenPages) -> None:
    chance = random.Random(seed)
    pages = open_pages(CONTENT)
    borders = [0, PAGE, 1 << 16, HALF_BYTES, 2 * HALF_BYTES, len(CONTENT)]
    for _ in range(300):
        near = chance.choice(borders) + chance.randrange(-5000, 5000)
        offset = max(0, near if chance.random() < 0.7 else chance.randrange(len(CONTENT) + 9000))
        length = chance.choice([0, 1, 40, PAGE, 100_000, chance.randrange(2 * HALF_BYTES)])
        assert pages.read(offset, length) == CONTENT[offset : offset + length], (offset, length)


@pytest.mark.parametrize("seed", range(4))
def test_a_view_begins_as_the_file_does_there_and_is_empty_only_at_its_end(seed: int, open_pages: OpenPages) -> None:
    chance = random.Random(seed)
    pages = open_pages(CONTENT)
    for _ in range(300):
        offset, length = chance.randrange(len(CONTENT) + 9000), chance.randrange(1, 2 * HALF_BYTES)
        part = bytes(pages.view(offset, length))
        assert part == CONTENT[offset : offset + len(part)]
        assert (len(part) > 0) == (offset < len(CONTENT))
        assert len(part) <= length


@pytest.mark.parametrize("length", [1, 40, 5000, 70_000, HALF_BYTES, 4 * HALF_BYTES])
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 65_536, 65_537, 2 * HALF_BYTES, len(CONTENT)])
def test_a_file_is_read_from_front_to_back_whole_in_any_steps(size: int, length: int, open_pages: OpenPages) -> None:
    if length < 5000:
        size = min(size, 70_000)
    pages = open_pages(CONTENT[:size])
    found = bytearray()
    while part := pages.view(len(found), length):
        found += part
    assert found == CONTENT[:size]


@pytest.mark.parametrize("offset", [100, PAGE - 1, PAGE, PAGE + 1, 10 * HALF_BYTES])
def test_nothing_is_read_at_the_end_and_beyond(offset: int, open_pages: OpenPages) -> None:
    pages = open_pages(CONTENT[:100])
    assert pages.read(offset, 50) == b""
    assert pages.read(90, 50) == CONTENT[90:100]
    assert pages.read(offset, 50) == b""


def test_a_short_file_is_opened_with_a_small_window_and_a_long_one_with_few_reads(
    open_pages: OpenPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = open_pages(CONTENT)
    lengths: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        lengths.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    offset = 0
    while part := pages.view(offset, 40_000):
        offset += len(part)
    assert lengths[0] == 1 << 16
    assert max(lengths) == HALF_BYTES
    assert len(lengths) <= 7


def test_after_an_error_no_other_bytes_stand_in_for_what_was_not_read(
    open_pages: OpenPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    pages = open_pages(CONTENT)
    assert pages.read(0, 10) == CONTENT[:10]
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                pages.read(2 * HALF_BYTES, 10)
    assert pages.read(2 * HALF_BYTES, 10) == CONTENT[2 * HALF_BYTES :][:10]
    assert pages.read(0, 10) == CONTENT[:10]


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 65_535, 65_536, 100_000, HALF_BYTES + 7])
def test_what_is_padded_is_whole_pages_with_zeros_behind_what_was_there(
    size: int, open_pages: OpenPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Padding must be zeros also where the memory held other bytes before.
    # Through the page cache: a direct read brings zeros from the disk behind the end.
    monkeypatch.setattr(direct, "open_file", os.open)
    pages = open_pages(CONTENT[:HALF_BYTES] + CONTENT[:size])
    pages.read(0, HALF_BYTES)
    copied = bytearray()
    while part := pages.view(HALF_BYTES + len(copied), size - len(copied)):
        padded = pages.padded(HALF_BYTES + len(copied), part)
        assert len(padded) % PAGE == 0
        assert bytes(padded) == bytes(part).ljust(len(padded), b"\0")
        assert len(padded) - len(part) < PAGE
        copied += part
    assert copied == CONTENT[:size]


# --- files that somebody else may have put there


def test_a_link_or_a_fifo_is_not_followed_and_nobody_waits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic links"):
        direct.open_file(tmp_path / "link", os.O_RDONLY)
    os.mkfifo(tmp_path / "fifo")
    os.close(direct.open_file(tmp_path / "fifo", os.O_RDONLY))


def test_a_file_that_exists_is_not_created_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        direct.create(tmp_path / "file", 0o600)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_where_direct_writes_are_refused_files_are_opened_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = plain(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            os.close(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return descriptor

    monkeypatch.setattr(os, "open", refuse)
    descriptor, past_the_cache = direct.create(tmp_path / "file", 0o600)
    assert not past_the_cache
    direct.write_all(descriptor, direct.page_of(b"content"), 0)
    os.close(descriptor)
    descriptor = direct.open_file(tmp_path / "file", os.O_RDONLY)
    assert Pages(descriptor).read(0, 7) == b"content"
    os.close(descriptor)


# --- writing


def test_all_is_written_where_the_disk_takes_it_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, offset: pwrite(d, data[:PAGE], offset))
    memory = direct.zeros()
    memory[:] = CONTENT[:HALF_BYTES]
    descriptor, _ = direct.create(tmp_path / "file", 0o600)
    direct.write_all(descriptor, memory[: 10 * PAGE], PAGE)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == bytes(PAGE) + CONTENT[: 10 * PAGE]


def test_space_is_allocated_ahead_the_more_the_longer_the_file(tmp_path: Path) -> None:
    descriptor, _ = direct.create(tmp_path / "file", 0o600)
    try:
        first = direct.allocate(descriptor, PAGE, 3 * PAGE)
        assert first == PAGE + HALF_BYTES
        second = direct.allocate(descriptor, first, first + PAGE)
        assert second == 2 * first
        assert os.fstat(descriptor).st_size == second
        assert os.fstat(descriptor).st_blocks * 512 >= second - PAGE
        # A write that is longer than what would be allocated ahead.
        assert direct.allocate(descriptor, second, 5 * second) == 5 * second
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_allocated_ahead_writing_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    descriptor, _ = direct.create(tmp_path / "file", 0o600)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert direct.allocate(descriptor, PAGE, 3 * PAGE) == 3 * PAGE
    os.close(descriptor)


# --- buffers


def test_buffers_can_be_written_directly_and_do_not_overlap() -> None:
    buffer = Buffers().take()
    parts = (*buffer.halves, buffer.first)
    assert [len(part) for part in parts] == [HALF_BYTES, HALF_BYTES, PAGE]
    for number, part in enumerate(parts):
        part[:] = bytes([number]) * len(part)
    assert [set(bytes(part)) for part in parts] == [{0}, {1}, {2}]


def test_no_two_threads_have_one_buffer_and_a_few_are_kept() -> None:
    buffers = Buffers()
    together = threading.Barrier(12)
    taken = []

    def take() -> None:
        together.wait()
        taken.append(buffers.take())

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, taken))) == 12
    for buffer in taken:
        buffers.give(buffer)
    again = [buffers.take() for _ in range(12)]
    assert len(set(map(id, again))) == 12
    assert len(set(map(id, taken)) & set(map(id, again))) == 8
