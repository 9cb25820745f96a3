"""Whether the system says that its clock is synchronised. Source: adjtimex(2)."""

from __future__ import annotations

import ctypes
import sys

_STA_UNSYNC = 0x0040
_TIME_ERROR = 5
# struct timex on 64-bit Linux: modes at 0, status behind offset, freq, maxerror and esterror; 208 bytes.
_SIZE, _STATUS = 256, 40


def clock_is_synchronised() -> bool | None:
    """Return whether somebody keeps the clock synchronised; None where the system does not tell."""
    library = ctypes.CDLL(None, use_errno=True)
    timex = ctypes.create_string_buffer(_SIZE)
    state = library.adjtimex(timex)
    if state < 0:
        return None
    status = int.from_bytes(timex.raw[_STATUS : _STATUS + 4], sys.byteorder)
    return not (state == _TIME_ERROR or status & _STA_UNSYNC)
