"""Reading ahead: all comes in its order, errors in their place, and whoever stops early leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from storescp.desk.ahead import Ahead


def source(pieces: list[bytes], end: BaseException | None = None) -> Callable[[memoryview], int]:
    left = iter(pieces)

    def receive(into: memoryview) -> int:
        piece = next(left, b"")
        if not piece and end is not None:
            raise end
        into[: len(piece)] = piece
        return len(piece)

    return receive


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_everything_comes_in_its_order_though_buffers_go_round(count: int) -> None:
    pieces = [bytes([n % 251]) * (1 + n % 5) for n in range(count)]
    ahead = Ahead(b"first", source(pieces))
    assert b"".join(bytes(piece) for piece in ahead) == b"first" + b"".join(pieces)
    ahead.close()


def test_an_error_comes_behind_what_came_before_it() -> None:
    ahead = Ahead(b"", source([b"one", b"two"], OSError("gone")))
    found = []
    with pytest.raises(OSError, match="gone"):
        found.extend(bytes(piece) for piece in ahead)
    assert found == [b"one", b"two"]
    ahead.close()


def test_whoever_stops_early_ends_the_thread_and_no_more_is_fetched_than_buffers_hold() -> None:
    fetched = []

    def receive(into: memoryview) -> int:
        fetched.append(1)
        into[:1] = b"x"
        return 1

    before = threading.active_count()
    ahead = Ahead(b"", receive)
    assert bytes(next(iter(ahead))) == b"x"
    ahead.close()
    assert threading.active_count() == before
    assert len(fetched) <= 9
