"""Text from bytes by DICOM's character sets, with code extensions: what the sets do not explain is an error.

The tables are pydicom's. Its decoder is not used: whether that replaces bytes or raises is a setting of the process,
and the desk, which also reads what is sloppy, needs both. Source: PS3.5 6.1.2.3, 6.1.2.5.3; PS3.3 C.12.1.1.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydicom.charset import CODES_TO_ENCODINGS, handled_encodings

_ESC = b"\x1b"
_LONG = (b"\x1b$(", b"\x1b$)")
# What comes before the first escape sequence, then each with what follows it.
_RUNS = re.compile(rb"\A[^\x1b]+|\x1b[^\x1b]*")
# Behind one of these the initial state holds again; '^' stands between components of a name, and of a name alone.
_OF_TEXT, _OF_NAME = re.compile(rb"[\n\r\t\f]"), re.compile(rb"[\^\n\r\t\f]")
_LATIN_1 = CODES_TO_ENCODINGS[b"\x1b(B"]


def decode(raw: bytes, encodings: Sequence[str], *, is_name: bool) -> str:
    """Return the text of one value or component group.

    Args:
        raw: Its bytes; the initial state holds at their beginning.
        encodings: Python's names of the data set's character sets, that of the initial state first.
        is_name: It is of a person's name.

    Raises:
        UnicodeError: A byte or an escape sequence is none of these sets'.
    """
    if _ESC not in raw:
        return raw.decode(encodings[0])
    delimiters = _OF_NAME if is_name else _OF_TEXT
    return "".join(_run(run, encodings, delimiters) for run in _RUNS.findall(raw))


def _run(run: bytes, encodings: Sequence[str], delimiters: re.Pattern[bytes]) -> str:
    if not run.startswith(_ESC):
        return run.decode(encodings[0])
    length = 4 if run.startswith(_LONG) else 3
    encoding = CODES_TO_ENCODINGS.get(run[:length], "")
    if encoding != _LATIN_1 and (not encoding or encoding not in encodings):
        raise UnicodeError("an escape sequence of no character set that is named")
    if encoding in handled_encodings:
        # The codec takes the escape sequence itself.
        return run.decode(encoding)
    text = run[length:]
    delimiter = delimiters.search(text)
    end = delimiter.start() if delimiter else len(text)
    return text[:end].decode(encoding) + text[end:].decode(encodings[0])
