"""Packs while they are written: whole records and nothing else, whatever the disk does, direct writes or not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from keys.versions import DepositKey, Version
from storage import attributes, deposit, direct, pack
from storage.deposit import Deposits
from storage.openpack import Record, Spare, remove_unfinished
from storage.packfile import OpenedPack, PackFile
from storage.packfile import Record as Opened

STORE = bytes(range(16))
MIB = 1 << 20
STUDY = "1.2.3"
CHANCE = random.Random(7)
CONTENT = CHANCE.randbytes(6 * MIB)
# Around nothing, a chunk's end, a page's end, and what still fits half a buffer.
SIZES = [0, 1, 4000, 4096, 4097, 16_384, 16_385, MIB - 40_000, MIB - 20_000, MIB - 1, MIB, MIB + 1, 2 * MIB, 5 * MIB]


class Keys:
    """One deposit key, always the newest; and the private half, which a gate never has."""

    def __init__(self) -> None:
        self.private = Version(STORE, 1, bytes(range(32)))
        self._public = self.private.deposit_key()

    def current(self) -> DepositKey:
        return self._public

    @contextlib.contextmanager
    def held(self) -> Iterator[DepositKey]:
        yield self._public


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Make(Protocol):
    """How ``make`` is called."""

    def __call__(self, **options: Any) -> Deposits: ...


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, keys: Keys, clock: Clock) -> Iterator[Make]:
    """Make deposits in a folder of this test."""
    made: list[Deposits] = []

    def build(**options: Any) -> Deposits:
        settings = {"size_limit": 1 << 30, "idle_seconds": 5, "open_per_peer": 16, "clock": clock} | options
        made.append(Deposits(tmp_path, STORE, keys, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for deposits in made:
        deposits.close_all()
        deposits._writers.shutdown()


@pytest.fixture(params=["direct", "cached"])
def way(request: pytest.FixtureRequest) -> str:
    """Write past the page cache, where the file system can, and through it."""
    if request.param == "cached":
        request.getfixturevalue("cached")
    return str(request.param)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(path: Path, mode: int) -> tuple[int, bool]:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), False

    monkeypatch.setattr(direct, "create", create)


def described(number: int) -> bytes:
    """Return the attributes of an instance."""
    uids = {attributes.SOP_CLASS: "1.2", attributes.SOP_INSTANCE: f"1.2.3.{number}"}
    uids |= {attributes.STUDY: STUDY, attributes.SERIES: "1.2.4"}
    elements = {tag: attributes.Element("UI", [uid]) for tag, uid in uids.items()}
    received = attributes.Received("", "", "CT1", "STRONGROOM", "", "")
    return attributes.encode(attributes.Attributes(1, "1.2.840.10008.1.2", elements, {}, received))


def add(record: Record, content: bytes, number: int, *, piece: Callable[[], int] = lambda: 1 << 30) -> None:
    """Write a record in pieces."""
    view = memoryview(content)
    while view:
        count = piece()
        record.write(view[:count])
        view = view[count:]
    record.finish(described(number))


def packs(folder: Path) -> list[Path]:
    """Return the packs, the oldest first."""
    found = [path for path in folder.iterdir() if path.suffix != ".new"]
    return sorted(found, key=lambda path: path.stat().st_ctime_ns)


def held(path: Path, keys: Keys) -> list[tuple[str, bytes]]:
    """Return every instance of a pack, which must hold records and zeros between them and nothing else."""
    with PackFile(path) as file:
        opened = OpenedPack(file, keys.private.unwrap_deposit(file.header.wrapped, file.header.key_id))
        found = []
        for record in list(opened.records()):
            assert isinstance(record, Opened), record
            assert record.padded
            name = record.attributes.text(attributes.SOP_INSTANCE)
            found.append((name, b"".join(opened.dataset(record.frame))))
        return found


def expected(*sizes: int) -> list[tuple[str, bytes]]:
    return [(f"1.2.3.{number}", CONTENT[:size]) for number, size in enumerate(sizes)]


def is_locked(path: Path) -> bool:
    with PackFile(path) as file:
        return not file.try_lock()


def only(found: list[Path]) -> Path:
    [path] = found
    return path


def last_end(path: Path, keys: Keys) -> int:
    """Return where the last record of a pack ends."""
    with PackFile(path) as file:
        opened = OpenedPack(file, keys.private.unwrap_deposit(file.header.wrapped, file.header.key_id))
        return max(record.frame.end for record in opened.records() if isinstance(record, Opened))


# --- what is written opens again


def test_records_of_every_size_open_again_bit_for_bit(way: str, make: Make, tmp_path: Path, keys: Keys) -> None:
    deposits = make()
    for number, size in enumerate(SIZES):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:size], number)
    deposits.close_all()
    path = only(packs(tmp_path))
    assert held(path, keys) == expected(*SIZES)
    assert path.stat().st_size == last_end(path, keys)


def test_every_size_around_half_a_buffer_opens_again(way: str, make: Make, tmp_path: Path, keys: Keys) -> None:
    # The tail is one chunk or none, the attributes fit this half or not, the rest begins a page or does not.
    sizes = [CHANCE.randrange(MIB - 60_000, MIB + 60_000) for _ in range(24)]
    deposits = make()
    for number, size in enumerate(sizes):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:size], number)
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(*sizes)


@pytest.mark.parametrize("most", [500, 70_000, 3 * MIB])
def test_pieces_of_any_size_give_the_same_as_the_whole(
    way: str, most: int, make: Make, tmp_path: Path, keys: Keys
) -> None:
    sizes = [100_000, MIB + 12_345, 2 * MIB + 1]
    deposits = make()
    for number, size in enumerate(sizes):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:size], number, piece=lambda: CHANCE.randrange(most))
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(*sizes)


def test_records_written_at_once_go_to_packs_of_their_own_and_open_again(
    way: str, make: Make, tmp_path: Path, keys: Keys
) -> None:
    deposits = make()
    under_way = [deposits.begin(STUDY, "CT1") for _ in range(3)]
    for start in range(0, 3 * MIB, 65_536):
        for record in under_way:
            record.write(memoryview(CONTENT)[start : start + 65_536])
    for record in under_way:
        record.finish(described(0))
    deposits.close_all()
    assert [held(path, keys) for path in packs(tmp_path)] == [expected(3 * MIB)] * 3


# --- what was not finished leaves nothing


@pytest.mark.parametrize("size", [0, 5000, MIB, 3 * MIB + 5])
def test_an_aborted_record_leaves_the_pack_as_it_was_and_the_next_one_is_good(
    way: str, size: int, make: Make, tmp_path: Path, keys: Keys
) -> None:
    deposits = make()
    add(deposits.begin(STUDY, "CT1"), CONTENT[:10_000], 0)
    path = only(packs(tmp_path))
    end = last_end(path, keys)
    before = path.read_bytes()[:end]
    record = deposits.begin(STUDY, "CT1")
    record.write(memoryview(CONTENT)[:size])
    record.abort()
    after = path.read_bytes()
    assert after[:end] == before
    assert not any(after[end:])
    add(deposits.begin(STUDY, "CT1"), CONTENT[: 2 * MIB], 1)
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(10_000, 2 * MIB)


def test_an_abort_waits_for_what_is_being_written_before_it_cuts(
    way: str, make: Make, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    go = threading.Event()
    pwrite, ftruncate = os.pwrite, os.ftruncate

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        go.wait(10)
        count = pwrite(descriptor, data, offset)
        done.append("written")
        return count

    def cut(descriptor: int, length: int) -> None:
        done.append("cut")
        ftruncate(descriptor, length)

    deposits = make()
    record = deposits.begin(STUDY, "CT1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", slow)
        patched.setattr(os, "ftruncate", cut)
        record.write(memoryview(CONTENT)[: MIB + 100_000])
        # The write goes on only after the abort began, as far as a timer can tell.
        threading.Timer(0.1, go.set).start()
        record.abort()
        go.wait(10)
    assert done == ["written", "cut"]
    add(deposits.begin(STUDY, "CT1"), CONTENT[:5000], 0)
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(5000)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_disk_that_is_full_at_any_write_costs_that_record_and_no_other(
    way: str, call: int, make: Make, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    deposits = make()
    add(deposits.begin(STUDY, "CT1"), CONTENT[:50_000], 0)
    end = last_end(only(packs(tmp_path)), keys)
    calls = 0
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == call:
            # A part of it, as a disk that fills up does.
            pwrite(descriptor, data[: len(data) // 2 // 4096 * 4096], offset)
        if calls >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    record = deposits.begin(STUDY, "CT1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        if call > 7:
            # It has so many writes and no more.
            add(record, CONTENT[: 5 * MIB], 1)
            assert calls == 7
            return
        with pytest.raises(OSError, match="No space left"):
            add(record, CONTENT[: 5 * MIB], 1)
        record.abort()
    path = only(packs(tmp_path))
    assert path.stat().st_size == end
    assert held(path, keys) == expected(50_000)
    add(deposits.begin(STUDY, "CT1"), CONTENT[: 3 * MIB], 1)
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(50_000, 3 * MIB)


@pytest.mark.parametrize("size", [5000, 3 * MIB])
def test_a_failed_sync_closes_the_pack_for_good(
    way: str, size: int, make: Make, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    deposits = make()
    add(deposits.begin(STUDY, "CT1"), CONTENT[:1000], 0)
    first = only(packs(tmp_path))
    record = deposits.begin(STUDY, "CT1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match="Input/output"):
            add(record, CONTENT[:size], 1)
        record.abort()
    assert not is_locked(first)
    add(deposits.begin(STUDY, "CT1"), CONTENT[:size], 0)
    deposits.close_all()
    second = only([path for path in packs(tmp_path) if path != first])
    assert held(first, keys) == expected(1000)
    assert held(second, keys) == expected(size)


def test_a_refused_header_leaves_no_file_behind(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    deposits = make()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        deposits.begin(STUDY, "CT1")
    assert list(tmp_path.iterdir()) == []


# --- the order of writes


@pytest.mark.parametrize("size", [0, 5000, 500_000, 5 * MIB])
def test_through_the_page_cache_the_page_with_the_frame_is_written_last(
    cached: None, size: int, make: Make, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = frames_seen(make(), CONTENT[:size], tmp_path, monkeypatch)
    offset = pack.page_after(pack.PAGE)
    assert seen[-1][:2] == (offset, pack.PAGE)
    # Whoever reads meanwhile, or after a kill, finds no record that is not whole.
    assert [frame for _, _, frame in seen] == [None] * len(seen)
    assert len({at for at, _, _ in seen}) == len(seen) if size < MIB else True
    assert held(only(packs(tmp_path)), keys) == expected(size)


def test_a_long_record_has_no_lengths_before_all_of_it_is_written(
    way: str, make: Make, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = frames_seen(make(), CONTENT, tmp_path, monkeypatch)
    assert seen[-1] == (pack.PAGE, pack.PAGE, None)
    assert [frame for _, _, frame in seen] == [None] * len(seen)
    assert held(only(packs(tmp_path)), keys) == expected(len(CONTENT))


def frames_seen(
    deposits: Deposits, content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int, pack.Frame | None]]:
    """Write a record; return each write's offset and length, and the frame that a reader finds before it."""
    seen: list[tuple[int, int, pack.Frame | None]] = []
    pwrite = os.pwrite

    def watched(descriptor: int, data: memoryview, offset: int) -> int:
        with PackFile(only(packs(folder))) as file:
            seen.append((offset, len(data), pack.frame_at(file.read, pack.PAGE, file.size)))
        return pwrite(descriptor, data, offset)

    record = deposits.begin(STUDY, "CT1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", watched)
        add(record, content, 0)
    deposits.close_all()
    return seen


def test_nothing_is_acknowledged_before_its_sync(way: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync
    record = make().begin(STUDY, "CT1")
    monkeypatch.setattr(os, "pwrite", lambda *a: done.append("write") or pwrite(*a))  # type: ignore[func-returns-value]
    monkeypatch.setattr(os, "fdatasync", lambda d: done.append("sync") or fdatasync(d))  # type: ignore[func-returns-value]
    add(record, CONTENT[: 3 * MIB], 0)
    assert done[-1] == "sync"
    assert done.count("sync") == 1


# --- files made ahead


def spares(folder: Path) -> list[Path]:
    return list(folder.glob("*.new"))


def test_a_spare_becomes_the_next_pack_and_leaves_no_zeros_behind_its_last_record(
    way: str, make: Make, tmp_path: Path, keys: Keys, clock: Clock
) -> None:
    deposits = make(spare_bytes=4 * MIB)
    clock.now += 1
    deposits.prepare()
    spare = only(spares(tmp_path))
    assert spare.stat().st_size == 4 * MIB
    assert spare.stat().st_blocks * 512 >= 4 * MIB
    assert packs(tmp_path) == []
    for number, size in enumerate([100_000, 2 * MIB]):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:size], number)
    path = only(packs(tmp_path))
    assert path == spare.with_suffix("")
    assert spares(tmp_path) == []
    assert held(path, keys) == expected(100_000, 2 * MIB)
    deposits.close_all()
    assert path.stat().st_size == last_end(path, keys)
    assert held(path, keys) == expected(100_000, 2 * MIB)


def test_more_than_a_spare_holds_is_written_on(way: str, make: Make, tmp_path: Path, keys: Keys, clock: Clock) -> None:
    deposits = make(spare_bytes=MIB)
    clock.now += 1
    deposits.prepare()
    for number, size in enumerate([800_000, 3 * MIB, 5000]):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:size], number)
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(800_000, 3 * MIB, 5000)


def test_an_abort_in_a_pack_made_of_a_spare_leaves_what_was_before(
    way: str, make: Make, tmp_path: Path, keys: Keys, clock: Clock
) -> None:
    deposits = make(spare_bytes=8 * MIB)
    clock.now += 1
    deposits.prepare()
    add(deposits.begin(STUDY, "CT1"), CONTENT[:5000], 0)
    record = deposits.begin(STUDY, "CT1")
    record.write(memoryview(CONTENT)[: 3 * MIB])
    record.abort()
    add(deposits.begin(STUDY, "CT1"), CONTENT[:6000], 1)
    deposits.close_all()
    path = only(packs(tmp_path))
    assert held(path, keys) == expected(5000, 6000)
    assert path.stat().st_size == last_end(path, keys)


def test_filling_a_spare_stops_when_there_is_something_better_to_do(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    spare = Spare(tmp_path)
    spare.fill(10 * MIB, lambda: next(asked))
    assert spare.allocated == spare.making.stat().st_size == 2 * MIB
    spare.discard()
    assert spares(tmp_path) == []


def test_nothing_is_prepared_while_a_record_is_under_way_or_within_a_second_of_one(
    make: Make, tmp_path: Path, clock: Clock
) -> None:
    deposits = make(spare_bytes=MIB)
    deposits.prepare()
    assert spares(tmp_path) == []
    record = deposits.begin(STUDY, "CT1")
    clock.now += 60
    deposits.prepare()
    assert spares(tmp_path) == []
    add(record, b"x", 0)
    deposits.begin(STUDY, "CT1").abort()
    clock.now += 0.99
    deposits.prepare()
    assert spares(tmp_path) == []
    clock.now += 0.01
    deposits.prepare()
    assert len(spares(tmp_path)) == 1


def test_two_spares_are_made_and_no_more_and_removed_at_the_end(make: Make, tmp_path: Path, clock: Clock) -> None:
    deposits = make(spare_bytes=MIB)
    clock.now += 1
    for count in (1, 2, 2):
        deposits.prepare()
        assert len(spares(tmp_path)) == count
    deposits.close_all()
    assert list(tmp_path.iterdir()) == []


def test_without_room_for_spares_none_is_made(make: Make, tmp_path: Path, clock: Clock) -> None:
    deposits = make(spare_bytes=0)
    clock.now += 1
    deposits.prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_a_spare_is_no_error_and_keeps_no_file(
    make: Make, tmp_path: Path, clock: Clock, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    deposits = make(spare_bytes=MIB)
    clock.now += 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        deposits.prepare()
    assert list(tmp_path.iterdir()) == []
    add(deposits.begin(STUDY, "CT1"), CONTENT[:10], 0)
    deposits.close_all()
    assert held(only(packs(tmp_path)), keys) == expected(10)


def test_unfinished_files_that_nobody_holds_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept, left, finished = tmp_path / "aa.new", tmp_path / "bb.new", tmp_path / "cc"
    for path in (kept, left, finished):
        path.write_bytes(bytes(4096))
    (tmp_path / "dd.new").symlink_to(finished)
    with kept.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        remove_unfinished(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"aa.new", "cc", "dd.new"}
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cc", "dd.new"}


# --- when packs close


def test_at_most_so_many_packs_of_a_peer_stay_open_and_the_oldest_goes(make: Make, tmp_path: Path) -> None:
    deposits = make(open_per_peer=2)
    made: list[Path] = []
    for study, peer in [("1.1", "CT1"), ("1.2", "CT1"), ("1.3", "MR1"), ("1.4", "CT1"), ("1.1", "CT1")]:
        add(deposits.begin(study, peer), b"x", 0)
        [new] = set(packs(tmp_path)) - set(made)
        made.append(new)
    # 1.1 was closed when 1.4 came: what came for it later is in another pack, for which 1.2's was closed.
    assert [is_locked(path) for path in made] == [False, False, True, True, True]


def test_a_pack_that_is_used_again_is_not_the_oldest_any_more(make: Make, tmp_path: Path) -> None:
    deposits = make(open_per_peer=2)
    add(deposits.begin("1.1", "CT1"), b"x", 0)
    first = only(packs(tmp_path))
    for study in ("1.2", "1.1", "1.3"):
        add(deposits.begin(study, "CT1"), b"x", 0)
    assert is_locked(first)


def test_a_pack_closes_at_its_size_limit(make: Make, tmp_path: Path, keys: Keys) -> None:
    deposits = make(size_limit=2 * MIB)
    for number in range(3):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:MIB], number % 2)
    locked = {is_locked(path): path for path in packs(tmp_path)}
    assert held(locked[False], keys) == expected(MIB, MIB)
    assert held(locked[True], keys) == expected(MIB)


def test_a_pack_closes_at_its_limit_of_records(
    make: Make, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deposit, "_RECORDS", 3)
    deposits = make()
    for number in range(4):
        add(deposits.begin(STUDY, "CT1"), CONTENT[:100], number % 3)
    locked = {is_locked(path): path for path in packs(tmp_path)}
    assert held(locked[False], keys) == expected(100, 100, 100)
    assert held(locked[True], keys) == expected(100)


def test_a_pack_closes_when_nothing_came_for_a_while(make: Make, tmp_path: Path, clock: Clock) -> None:
    deposits = make(idle_seconds=5)
    add(deposits.begin(STUDY, "CT1"), b"x", 0)
    path = only(packs(tmp_path))
    clock.now += 4.9
    deposits.close_idle()
    assert is_locked(path)
    clock.now += 0.1
    deposits.close_idle()
    assert not is_locked(path)
