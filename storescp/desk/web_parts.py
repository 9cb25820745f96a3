"""A multipart body that stores: each part a DICOM file whose data set goes into a pack as it comes.

Preamble and file meta information are read and not kept. Nothing here grows with an instance's length.
Source: PS3.18 10.5; PS3.10 7.1; RFC 2046 5.1.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import msgspec
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from storage.attributes import is_uid
from storescp.desk.web_accept import DICOM
from storescp.gate.incoming import Incoming
from storescp.gate.status import Reason, RefusedError

# What one request may bring: its answer names each.
PARTS_LIMIT = 20_000
_HEADERS_LIMIT, _HEADER_BYTES = 16, 4096
_PREAMBLE = 128
# Up to the value of File Meta Information Group Length: the element that every file begins with.
_START = _PREAMBLE + 4 + 12
_GROUP_LENGTH = b"\x02\x00\x00\x00UL\x04\x00"
_META_LIMIT = 65_536
_SOP_CLASS, _SOP_INSTANCE, _SYNTAX = Tag(0x0002, 0x0002), Tag(0x0002, 0x0003), Tag(0x0002, 0x0010)

Begin = Callable[[tuple[str, str, str]], Incoming]


class PartsError(Exception):
    """A body is no multipart body, or goes beyond a bound; what was stored before is."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a part; ``reason`` says why it is not stored. UIDs are empty where the file has not both."""

    sop_class: str
    sop_instance: str
    study: str = ""
    series: str = ""
    size: int = 0
    reason: Reason | None = None


class _Upload:
    """One DICOM file."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._head = bytearray()
        self._until = _START
        self._uids = ("", "", "")
        self._incoming: Incoming | None = None
        self._reason: Reason | None = None

    def refuse(self, reason: Reason) -> None:
        self._reason = self._reason or reason

    def take(self, data: memoryview) -> None:
        while data and self._reason is None and self._incoming is None:
            wanted = self._until - len(self._head)
            self._head += data[:wanted]
            data = data[wanted:]
            if len(self._head) == self._until:
                self._look()
        if data and self._reason is None and self._incoming is not None:
            self._incoming.take(data)

    def end(self) -> Outcome:
        """Return what became of it, once it is durable."""
        incoming, self._incoming = self._incoming, None
        try:
            if self._reason is not None or incoming is None:
                raise RefusedError(self._reason or Reason.UNPARSABLE)
            incoming.end()
        except RefusedError as refused:
            # What is no UID could be anything, of any length.
            named = self._uids[:2] if all(map(is_uid, self._uids[:2])) else ("", "")
            return Outcome(*named, reason=refused.reason)
        return Outcome(*self._uids[:2], incoming.study, incoming.series, incoming.size)

    def abandon(self) -> None:
        if self._incoming is not None:
            self._incoming.abandon()

    def _look(self) -> None:
        """Read what has come of the file's header: how long it is, then what it says."""
        if self._until == _START:
            length = int.from_bytes(self._head[-4:], "little")
            if self._head[_PREAMBLE:-4] != b"DICM" + _GROUP_LENGTH or not 0 < length <= _META_LIMIT:
                self.refuse(Reason.UNPARSABLE)
            self._until += length
            return
        try:
            self._uids = _uids(bytes(self._head[_START:]))
            self._incoming = self._begin(self._uids)
        except RefusedError as refused:
            self.refuse(refused.reason)
        self._head.clear()


class Parts:
    """The parts of one body. ``feed`` it; ``close`` it, wherever it is."""

    def __init__(self, boundary: bytes, begin: Begin, stored: Callable[[Outcome], None]) -> None:
        """Prepare.

        Args:
            boundary: What stands between parts.
            begin: Begins an instance; what it raises of RefusedError is the part's outcome.
            stored: Called with each part that is durable.

        Raises:
            PartsError: It is no boundary.
        """
        self._begin = begin
        self._stored = stored
        self._name, self._value, self._kind = b"", b"", b""
        self._upload: _Upload | None = None
        self.outcomes: list[Outcome] = []
        self.ended = False
        # A server that stops may close it while a thread still feeds it.
        self._lock = threading.Lock()
        self._closed = False
        # When the part that is under way began.
        self.began = time.monotonic()
        if not 0 < len(boundary) <= 70:
            raise PartsError("the boundary has 1 to 70 characters")
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_begin": self._header_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
            max_header_count=_HEADERS_LIMIT,
            max_header_size=_HEADER_BYTES,
        )

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            PartsError: They are not what a multipart body has there.
        """
        with self._lock:
            if self._closed:
                return
            try:
                self._parser.write(data)
            except MultipartParseError:
                raise PartsError("the body is not multipart, or has another boundary") from None

    def close(self) -> None:
        """Drop the part that is under way."""
        with self._lock:
            self._closed = True
            upload, self._upload = self._upload, None
            if upload is not None:
                upload.abandon()

    def _part_begin(self) -> None:
        if len(self.outcomes) >= PARTS_LIMIT:
            raise PartsError(f"a request has at most {PARTS_LIMIT} parts; those before are stored")
        self.began = time.monotonic()
        self._kind = b""

    def _header_begin(self) -> None:
        self._name = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-type":
            self._kind = self._value

    def _headers_finished(self) -> None:
        self._upload = _Upload(self._begin)
        if self._kind and parse_options_header(self._kind)[0].lower() != DICOM.encode():
            self._upload.refuse(Reason.UNPARSABLE)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._upload is not None:
            self._upload.take(memoryview(data)[start:end])

    def _part_end(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            outcome = upload.end()
            self.outcomes.append(outcome)
            if outcome.reason is None:
                self._stored(outcome)

    def _end(self) -> None:
        self.ended = True


def _uids(meta: bytes) -> tuple[str, str, str]:
    """Return SOP class, SOP instance and transfer syntax of file meta information.

    Raises:
        RefusedError: It cannot be read, or names not all of them.
    """
    try:
        found = read_dataset(io.BytesIO(meta), is_implicit_VR=False, is_little_endian=True)
        uids = tuple(str(found[tag].value) for tag in (_SOP_CLASS, _SOP_INSTANCE, _SYNTAX))
    except Exception as error:
        # The library raises whatever it stumbles over.
        raise RefusedError(Reason.UNPARSABLE) from error
    return uids[0], uids[1], uids[2]
