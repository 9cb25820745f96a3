"""Whether the clock is synchronised: what adjtimex(2) says, read from where the kernel puts it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from storescp import synchronised
from storescp.synchronised import clock_is_synchronised

STA_PLL, STA_UNSYNC, STA_NANO = 0x0001, 0x0040, 0x2000
TIME_OK, TIME_INS, TIME_ERROR = 0, 1, 5


class Kernel:
    """Stands for the C library: one call, one answer."""

    def __init__(self, state: int, status: int) -> None:
        self.state, self.status = state, status
        self.modes: int | None = None

    def adjtimex(self, timex: Any) -> int:
        self.modes = int.from_bytes(timex.raw[:4], sys.byteorder)
        ctypes.memset(timex, 0xFF, 208)
        timex[synchronised._STATUS : synchronised._STATUS + 4] = self.status.to_bytes(4, sys.byteorder)
        return self.state


@pytest.mark.parametrize(
    ("state", "status", "expected"),
    [
        (TIME_OK, STA_PLL, True),
        (TIME_OK, STA_PLL | STA_NANO, True),
        (TIME_INS, STA_PLL, True),
        (TIME_ERROR, STA_PLL | STA_UNSYNC, False),
        # Either says it.
        (TIME_ERROR, STA_PLL, False),
        (TIME_OK, STA_UNSYNC, False),
        (-1, STA_PLL, None),
    ],
)
def test_what_the_kernel_says_is_told(
    monkeypatch: pytest.MonkeyPatch, state: int, status: int, expected: bool | None
) -> None:
    kernel = Kernel(state, status)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: kernel)
    assert clock_is_synchronised() is expected
    # No mode: the clock is asked, never set.
    assert kernel.modes == 0


def test_the_buffer_is_larger_than_what_the_kernel_writes() -> None:
    assert synchronised._SIZE >= 208
    assert synchronised._STATUS + 4 <= synchronised._SIZE


def test_here_the_real_call_answers_the_same_again_and_again() -> None:
    assert len({clock_is_synchronised() for _ in range(5)}) == 1
    assert clock_is_synchronised() in {True, False, None}
