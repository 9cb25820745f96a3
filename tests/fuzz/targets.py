"""What every parser that bytes from outside reach promises, a function each: any bytes, and it returns or raises.

A promise has two halves. Any bytes are accepted, or raise the one documented error: whatever else is raised is a bug.
And what is accepted is what the rest of the server takes it for: the same however the bytes were cut, bounded, and
readable by whoever reads it next; where that does not hold, BrokenPromiseError says so. Nothing here needs atheris.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import ipaddress
import os
import random
import re
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey
from pydicom.config import disable_value_validation
from pydicom.filereader import read_dataset
from pynetdicom.pdu import A_ASSOCIATE_AC

from keys import keyring, recovery, shares, slots, versions
from keys.anchors import FileAnchors
from keys.encoding import canonical
from keys.keyring import Keyring, KeyringError, UnknownVersionError
from keys.recovery import ExportHeader
from keys.seal import SealError, context, open_parts, seal, u32
from keys.shares import RecoveryError, RecoveryKey
from keys.slots import UnlockError
from keys.versions import SignatureError
from storage import attributes, audit, events, pack
from storage.attributes import Attributes, AttributesError, Received, is_uid
from storage.audit import AuditError, Head
from storage.events import EventsError
from storage.matching import QueryError
from storage.pack import PackError
from storage.packfile import OpenedPack, PackFile, Record
from storage.query import Scope, statement
from storescp import config, control, handover, peers
from storescp.config import ConfigError
from storescp.desk import identifiers
from storescp.desk.identifiers import IdentifierError
from storescp.desk.messages import EndedError, Message, Messages
from storescp.desk.models import MODELS
from storescp.desk.web_parts import Outcome, Parts, PartsError
from storescp.errors import StrongroomError
from storescp.gate import channel, dimse, negotiate, wire
from storescp.gate.channel import ChannelError
from storescp.gate.describe import Describer, split, uid
from storescp.gate.dimse import CommandError
from storescp.gate.head import VALUE_LIMIT, WANTED, HeadError, HeadParser
from storescp.gate.incoming import Incoming
from storescp.gate.meter import Meter
from storescp.gate.negotiate import Agreement, Context
from storescp.gate.origin import Origin
from storescp.gate.quota import Allowances
from storescp.gate.receive import Association, Resources
from storescp.gate.status import Reason, RefusedError
from storescp.gate.transfer import ENCODINGS, STORAGE_CLASSES, VERIFICATION, Encoding
from storescp.gate.wire import Pdu, Reader, WireError
from storescp.peers import Asked, PeerError, PeerFile, Peers, Proof
from storescp.vault import judge

VECTORS = Path(__file__).parents[1] / "vectors"
MAXIMUM_PDU = 16_384
# Byte by byte is where parsers break, and slow: of a long input both ends are cut so.
_BYTEWISE = 100
# What a head parser may keep: one element that is still incomplete.
_KEPT = VALUE_LIMIT + 12

Values = dict[int, tuple[str, bytes]]
Target = Callable[[bytes], None]


class BrokenPromiseError(Exception):
    """What was accepted is not what the rest of the server takes it for."""


class SaidAloudError(BaseException):
    """A warning. It would stand in the server's log, in words that a peer chose. No ``except Exception`` hides it."""


def promise(kept: bool, what: str) -> None:
    """Raise unless a promise was kept."""
    if not kept:
        raise BrokenPromiseError(what)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Let nothing within warn."""

    def said(message: Warning | str, *_: Any, **__: Any) -> NoReturn:
        raise SaidAloudError(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = said
        yield


@contextlib.contextmanager
def desk() -> Iterator[None]:
    """Set pydicom as the desk does. Its warnings are off there, for all of the process (``storescp/log.py``)."""
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def divisions(data: bytes) -> Iterator[list[bytes]]:
    """Yield ways to cut an input, always the same for the same bytes: byte by byte, and anywhere, empty pieces too."""
    start, end = data[:_BYTEWISE], data[_BYTEWISE:][-_BYTEWISE:]
    middle = data[_BYTEWISE : len(data) - len(end)]
    yield [*_bytewise(start), *([middle] if middle else []), *_bytewise(end)]
    chance = random.Random(zlib.crc32(data))
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 12)))
    yield [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[Path]:
    """Give bytes a path for a while, in memory where there is a file system for that."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        yield Path(file.name)


# --- the upper layer

Event = tuple[object, ...]


def upper_layer(data: bytes) -> None:
    """Any bytes are PS3.8's events or a WireError, however they are cut, before an association and in one."""
    for maximum in (0, MAXIMUM_PDU):
        whole = _events([data], maximum)
        promise((whole[0], whole[1] in {"between", "within"}) == _as_told(data, maximum), "events are not PS3.8's")
        for parts in divisions(data):
            promise(_events(parts, maximum) == whole, "bytes cut otherwise are other events")


def _events(parts: Iterable[bytes], maximum: int) -> tuple[list[Event], str]:
    """Return events and the error; fragments are joined, and after an error only whole messages count."""
    reader = Reader(maximum)
    found: list[Event] = []
    try:
        for part in parts:
            for event in reader.receive(memoryview(part)):
                if isinstance(event, Pdu):
                    found.append(("pdu", event.kind, event.content))
                    continue
                piece = bytes(event.data)
                promise(len(piece) <= maximum, "a fragment is longer than the PDU it came in")
                if found and found[-1][:3] == (event.context_id, event.command, False):
                    piece = cast(bytes, found.pop()[3]) + piece
                found.append((event.context_id, event.command, event.last, piece))
    except WireError as error:
        return _whole(found), str(error)
    return found, "between" if reader.between else "within"


def _as_told(data: bytes, maximum: int) -> tuple[list[Event], bool]:
    """Return what ``_events`` should, by the letter of PS3.8 9.3 and of our bounds, for bytes that are all there."""
    found: list[Event] = []
    while len(data) >= 6:
        kind, length = data[0], int.from_bytes(data[2:6], "big")
        if kind == wire.P_DATA_TF:
            if not (6 <= length <= maximum and _items(data[6 : 6 + length], length, found)):
                return _whole(found), False
            data = data[6 + length :]
            continue
        longest = 1 << 20 if kind in {wire.ASSOCIATE_RQ, wire.ASSOCIATE_AC} else 4
        if not (1 <= kind <= 7 and 4 <= length <= longest):
            return _whole(found), False
        if len(data) >= 6 + length:
            found.append(("pdu", kind, data[: 6 + length]))
        data = data[6 + length :]
    return found, True


def _items(content: bytes, left: int, found: list[Event]) -> bool:
    """Add the fragments of a P-DATA-TF PDU of so many bytes, of which not all need be there; tell whether it is one."""
    while len(content) >= 6:
        length, number, control = struct.unpack_from(">IBB", content)
        left -= 4 + length
        piece, complete = content[6 : 4 + length], len(content) >= 4 + length
        if length < 2 or left < 0 or control > 3 or (complete and 0 < left < 6):
            return False
        content = content[4 + length :]
        if complete or piece:
            last = complete and bool(control & 2)
            if found and found[-1][:3] == (number, bool(control & 1), False):
                piece = cast(bytes, found.pop()[3]) + piece
            found.append((number, bool(control & 1), last, piece))
    return True


def _whole(found: list[Event]) -> list[Event]:
    while found and found[-1][2] is False:
        found.pop()
    return found


def commands(data: bytes) -> None:
    """Any bytes are a request that can be answered, or a CommandError."""
    try:
        command = dimse.decode(data)
    except CommandError:
        return
    rest = data
    while rest:
        promise(rest[:2] == bytes(2) and len(rest) >= 8, "a command set is taken that is none")
        length = int.from_bytes(rest[4:8], "little")
        promise(length <= len(rest) - 8, "a command set is taken that ends within an element")
        rest = rest[8 + length :]
    promise(command.field < 0x8000, "a response was taken for a request")
    for status, comment in ((0x0000, ""), (0xC0FF, "c" * 99)):
        content = dimse.response(command, status, comment)
        found = _elements(content)
        promise(found[0x0000] == struct.pack("<I", len(content) - 12), "a response's group length is wrong")
        numbers = {0x0100: command.field | 0x8000, 0x0120: command.message_id, 0x0800: 0x0101, 0x0900: status}
        promise(all(found[e] == struct.pack("<H", n) for e, n in numbers.items()), "a response answers another request")
        for element, text in ((0x0002, command.sop_class), (0x1000, command.sop_instance)):
            told = found.get(element, b"").removesuffix(b"\0").decode("ascii")
            promise(told == (text if text != dimse.NO_UID else ""), "a response names another object")
        for maximum in (7, MAXIMUM_PDU, 0):
            sent = wire.data_pdus(1, command=True, content=content, maximum=maximum)
            promise(
                _events([sent], maximum or 1 << 17) == ([(1, True, True, content)], "between"), "a response is not read"
            )


def _elements(content: bytes) -> dict[int, bytes]:
    """Return the elements of a command set as any receiver reads them: in order, and of even lengths."""
    found: dict[int, bytes] = {}
    position, before = 0, -1
    while position < len(content):
        group, element, length = struct.unpack_from("<HHI", content, position)
        position += 8
        promise(group == 0 and element > before, "a response's elements are out of order")
        promise(length % 2 == 0 and length <= len(content) - position, "an element of a response has a wrong length")
        found[element] = content[position : position + length]
        position, before = position + length, element
    return found


_PRIVATE = "1.2.3"
_PEER = peers.parse(
    f'ae_title = "CT1"\nkeys = ["sha256:{"ab" * 32}"]\nprivate_sop_classes = ["{_PRIVATE}"]\n', Path("CT1.toml")
)
_PEERS = Peers({"CT1": _PEER})


def negotiation(data: bytes) -> None:
    """Any bytes are an association request that is decided about and answered, or a WireError."""
    try:
        request = negotiate.decode(data)
    except WireError:
        return
    promise(len(request.calling) == len(request.called) == 16, "an AE title has another length than 16")
    for key in ("ab", "cd"):
        proof = Proof("", f"sha256:{key * 32}")
        _PEERS.decide(Asked(request.calling, request.called, "10.0.0.1", proof), "STRONGROOM")
    try:
        agreement = negotiate.agree(request, negotiate.storage(_PEER), maximum_pdu=MAXIMUM_PDU)
    except WireError:
        return
    reply = agreement.reply
    promise(_events([reply], 0) == ([("pdu", wire.ASSOCIATE_AC, reply)], "between"), "the reply is no PDU")
    answer = A_ASSOCIATE_AC()
    answer.decode(reply)
    accepted = {context.context_id for context in answer.presentation_context if context.result == 0}
    promise(accepted == set(agreement.contexts), "the peer is told of other contexts than were accepted")
    for agreed in agreement.contexts.values():
        promise(agreed.abstract_syntax in STORAGE_CLASSES | {VERIFICATION, _PRIVATE}, "a class is accepted unasked")
        promise(agreed.transfer_syntax in ENCODINGS, "a transfer syntax is accepted that nobody here reads")
    promise(0 <= agreement.maximum_pdu < 1 << 32, "a maximum length is no u32")
    with contextlib.suppress(WireError):
        wire.data_pdus(1, command=True, content=b"x", maximum=agreement.maximum_pdu)


# --- data sets

_EXPLICIT, _IMPLICIT, _BIG, _DEFLATED = (
    ENCODINGS[syntax]
    for syntax in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
)
_RECEIVED = Received("2026-01-31T10:11:12.000000Z", "ab", "CT1", "STRONGROOM", "192.0.2.1:1024", "")
_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
_CHARSET = 0x00080005


def _head_in(encoding: Encoding, data: bytes) -> None:
    """Any bytes are values or a HeadError, the same ones however they are cut, and little of them is kept."""
    whole = _head([data], encoding)
    for parts in divisions(data):
        promise(_head(parts, encoding) == whole, "bytes cut otherwise are other values")


def accepted_head(data: bytes, kind: str) -> Values:
    """Return the values of a head that must be accepted, in an encoding of the targets' names."""
    values, error = _head([data], {"explicit": _EXPLICIT, "implicit": _IMPLICIT, "big": _BIG}[kind])
    promise(not error, error)
    return values


_BULK = b"\x09\0\x10\0OB\0\0" + struct.pack("<I", 150_000) + bytes(150_000)


def head_deflated(data: bytes) -> None:
    """Any bytes are a deflated head or a HeadError; and deflated bytes are what they are when they are not deflated."""
    # What inflates to more than one step, and is skipped.
    bulky = _BULK + data
    packer = zlib.compressobj(1, wbits=-15)
    packed = packer.compress(bulky) + packer.flush()
    plain = _head([bulky], _EXPLICIT)
    for parts in ([packed], *divisions(packed)):
        promise(_head(parts, _DEFLATED) == plain, "a deflated data set has other values than the same one plain")
    values = _head([data], _DEFLATED)[0]
    for parts in divisions(data):
        # How far a broken stream inflates before its error shows depends on the pieces: one may see more than another.
        other = _head(parts, _DEFLATED)[0]
        promise(other.items() <= values.items() or values.items() <= other.items(), "bytes cut otherwise differ")


def _head(parts: Iterable[bytes], encoding: Encoding) -> tuple[Values, str]:
    parser = HeadParser(encoding)
    error = ""
    try:
        for part in parts:
            parser.feed(memoryview(part))
            kept = sum(len(v) for v in vars(parser).values() if isinstance(v, bytes | bytearray | memoryview))
            promise(parser.done or kept <= _KEPT, "more is kept than one element")
        parser.end()
    except HeadError as raised:
        error = str(raised)
    for tag, (vr, raw) in parser.values.items():
        promise(WANTED.get(tag) == vr and len(raw) <= VALUE_LIMIT, "a value nobody wanted, or one that is too long")
    return parser.values, error


def description(data: bytes) -> None:
    """Whatever a head holds can be described, and the vault understands it. The first byte says how it is encoded."""
    _arrives(raw_values(data), _encoding(data))


def _encoding(data: bytes) -> Encoding:
    return (_EXPLICIT, _IMPLICIT, _BIG)[(data[0] if data else 0) % 3]


def raw_values(data: bytes) -> Values:
    """Return the values in a data set behind the byte that says how it is encoded."""
    return _head([data[1:]], _encoding(data))[0]


def described(data: bytes) -> Attributes:
    """Return the attributes of such a data set, with UIDs that the vault takes."""
    uids = dict.fromkeys((_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES), ("UI", b"1.2.3"))
    return Describer().describe(raw_values(data) | uids, _encoding(data), "1.2.840.10008.1.2.1", _RECEIVED)


def text(data: bytes) -> None:
    """Any text in any character set reaches the vault, as text or as it came. The first line is the character set."""
    charset, _, raw = data.partition(b"\n")
    for delimiter in b"\\=^":
        promise(bytes([delimiter]).join(split(raw, delimiter)) == raw, "splitting loses bytes")
    for encoding in (_EXPLICIT, _BIG):
        values = {tag: (WANTED[tag], b"1.2.3\0") for tag in (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES)}
        values[_CHARSET] = ("CS", charset[:VALUE_LIMIT])
        for tag in (0x00100010, 0x00081030, 0x00080050, 0x00080060, 0x00280010, 0x00200013):
            values[tag] = (WANTED[tag], raw[:VALUE_LIMIT])
        _arrives(values, encoding)


def _arrives(values: Values, encoding: Encoding) -> None:
    """Take values the way that they take from the gate to the vault."""
    describer = Describer()
    described = describer.describe(values, encoding, "1.2.840.10008.1.2.1", _RECEIVED)
    for tag, (_, raw) in values.items():
        key = f"{tag:08X}"
        promise((key in described.dataset) != (key in described.undecoded), "a value is neither text nor as it came")
        promise(key in described.dataset or described.undecoded[key].raw == raw, "bytes were changed")
    # What an object has in common with the one before is not decoded again; that must not show.
    other = {tag: (vr, raw if tag == _CHARSET else raw[: len(raw) // 2]) for tag, (vr, raw) in values.items()}
    for following in (values, other, values):
        again = describer.describe(following, encoding, "1.2.840.10008.1.2.1", _RECEIVED)
        alone = Describer().describe(following, encoding, "1.2.840.10008.1.2.1", _RECEIVED)
        promise(again == alone, "an object is described by the one before it")
    try:
        content = attributes.encode(described)
    except AttributesError:
        # The most that a byte becomes is a name of one letter; each value that does not decode repeats its sets.
        charset = len(values.get(_CHARSET, ("", b""))[1])
        most = 10 * sum(len(raw) for _, raw in values.values()) + (80 + 3 * charset) * len(values) + 500
        promise(most > pack.ATTRIBUTES_LIMIT, "attributes are refused that are not too large")
        return
    try:
        arrived = attributes.decode(content)
    except AttributesError:
        uids = [uid(values, tag) for tag in (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES)]
        promise(not all(is_uid(found) for found in uids), "the vault does not understand what the gate would store")
        return
    promise(arrived == described, "the vault understands something else")


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


_UIDS = b",".join(b'"%s":{"vr":"UI","Value":["1.2"]}' % t for t in (b"00080016", b"00080018", b"0020000D", b"0020000E"))
_AROUND = (
    b'{"format":1,"transfer_syntax":"1.2","undecoded":{},"received":{"at":"","association":"","calling":"","called":"",'
    b'"address":"","certificate":""},"dataset":{' + _UIDS + b',"00100010":{"vr":"PN","Value":',
    b"}}}",
)


def attribute_document(data: bytes) -> None:
    """Any bytes are attributes that the index can take, or an AttributesError; as the values of an element, too."""
    _document(data)
    _document(data.join(_AROUND))


def _document(content: bytes) -> None:
    try:
        found = attributes.decode(content)
    except AttributesError:
        return
    for tag in (*found.dataset, "00100010", "00100020"):
        promise(isinstance(found.text(tag), str), "a value is no text")
        promise(all(isinstance(name, str) for name in found.name(tag).values()), "a name is no text")
    judge.patient_of(found)
    for read in _texts(found):
        promise(not _CONTROL.search(read), "a text holds control characters")
    for tag in (attributes.SOP_CLASS, attributes.SOP_INSTANCE, attributes.STUDY, attributes.SERIES):
        promise(is_uid(found.text(tag)), "a UID is none")
    with contextlib.suppress(AttributesError):
        attributes.decode(attributes.encode(found))


def _texts(found: Attributes) -> Iterator[str]:
    yield from msgspec.structs.astuple(found.received)
    for element in found.dataset.values():
        for value in element.Value:
            yield from value.values() if isinstance(value, dict) else [value] if isinstance(value, str) else []


# --- an association


class _Record:
    """What ``Incoming`` needs of a record: where a data set goes."""

    def __init__(self, stored: list[tuple[object, ...]], study: str) -> None:
        self.object_id = bytes(16)
        self._stored = stored
        self._study = study
        self._data = bytearray()

    def write(self, data: memoryview) -> None:
        self._data += data

    def finish(self, content: bytes) -> None:
        described = attributes.decode(content)
        promise(described.text(attributes.STUDY) == self._study, "an object is filed under another study than its own")
        described.received.at = ""
        self._stored.append((self._study, bytes(self._data), described))

    def abort(self) -> None:
        """Keep nothing."""


class _Outside:
    """What an association needs besides bytes: its stream, its deposits, and space without end."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = [part for part in parts if part]
        self.sent = bytearray()
        self.stored: list[tuple[object, ...]] = []

    def receive(self, into: memoryview, _: float, *, between: bool) -> int:
        part = self._parts.pop(0) if self._parts else b""
        into[: len(part)] = part
        return len(part)

    def send(self, data: bytes, _: float) -> None:
        self.sent += data

    def begin(self, study: str, _: str) -> _Record:
        return _Record(self.stored, study)

    def shortage(self) -> bool:
        return False

    def took(self, _: int) -> None:
        """Have as much space as before."""


_CT = "1.2.840.10008.5.1.4.1.1.2"
_CONTEXTS = {
    1: Context(_CT, "1.2.840.10008.1.2.1"),
    3: Context(_CT, "1.2.840.10008.1.2"),
    5: Context(_CT, "1.2.840.10008.1.2.2"),
    7: Context(VERIFICATION, "1.2.840.10008.1.2"),
}


def association(data: bytes) -> None:
    """Any bytes in an association are stored as they came, refused, or break it off; no error is one of our own."""
    whole = _associated([data])
    for parts in divisions(data):
        promise(_associated(parts) == whole, "bytes cut otherwise are stored otherwise")


def _associated(parts: Iterable[bytes]) -> tuple[str, bytes, list[tuple[object, ...]]]:
    outside = cast(Any, _Outside(parts))
    origin = Origin("ab", "CT1", "STRONGROOM", "192.0.2.1:1024", "")
    agreement = Agreement(b"", _CONTEXTS, MAXIMUM_PDU)
    try:
        resources = Resources(config.Gate(), outside, outside, Allowances(lambda _: None), Meter(wanted=False), outside)
        ending = Association(outside, Reader(MAXIMUM_PDU), agreement, origin, _PEER, resources).run([])
    except WireError:
        # Of two broken rules, the one that shows first depends on the pieces.
        ending = "broken off"
    for event in _events([bytes(outside.sent)], MAXIMUM_PDU)[0]:
        if event[0] != "pdu":
            status = struct.unpack("<H", _elements(cast(bytes, event[3]))[0x0900])[0]
            promise(status != Reason.INTERNAL.status, "an object is refused by an error of our own")
    return ending, bytes(outside.sent), outside.stored


# --- the desk


class _Came:
    """What a peer sends, as a stream that waits for nothing; what is sent to it is kept."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = iter(parts)
        self._rest = b""
        self.sent = bytearray()

    def receive(self, into: memoryview, seconds: float, *, between: bool) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = part
        piece, self._rest = self._rest[: len(into)], self._rest[len(into) :]
        into[: len(piece)] = piece
        return len(piece)

    def send(self, content: bytes, seconds: float) -> None:
        self.sent += content


def desk_messages(data: bytes) -> None:
    """Any bytes in an association of the desk's are messages and its end, or a WireError, however they are cut."""
    whole = _messages([data])
    for parts in divisions(data):
        promise(_messages(parts) == whole, "bytes cut otherwise are other messages")


def _messages(parts: Iterable[bytes]) -> tuple[list[Message], str, bytes]:
    came = _Came(parts)
    found: list[Message] = []
    try:
        messages = Messages(cast(Any, came), Reader(MAXIMUM_PDU), [], MAXIMUM_PDU, 1.0)
        while True:
            message = messages.next(1.0)
            decoded = dimse.decode_answer if dimse.is_response(message.command) else dimse.decode
            promise(decoded(message.command).has_data_set == (message.data is not None), "a data set is lost")
            found.append(message)
    except EndedError as ended:
        return found, str(ended), bytes(came.sent)
    except WireError:
        # Of two broken rules, the one that shows first depends on the pieces; so do the messages before it.
        return [], "broken off", b""


@desk()
def identifier(data: bytes) -> None:
    """Any bytes are an identifier whose query can be stated and answered, or an IdentifierError."""
    for syntax in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"):
        try:
            found = identifiers.decode(data, syntax)
        except IdentifierError:
            continue
        for model in MODELS.values():
            try:
                if model.operation != "find":
                    chosen = identifiers.selection(found, model)
                    promise(not chosen.is_empty, "a retrieval without a key is taken")
                    continue
                query, _ = identifiers.query(found, model)
            except IdentifierError:
                continue
            with contextlib.suppress(QueryError):
                statement(query, Scope())
            row = {tag: ["1.2", "\u00e9"] for tag in query.match}
            content = identifiers.answer(row, query, "ROOM", syntax)
            encoding = ENCODINGS[syntax]
            answer = read_dataset(io.BytesIO(content), encoding.implicit, encoding.little_endian)
            told = {f"{int(tag):08X}" for tag in answer.keys()}  # noqa: SIM118
            promise(told >= set(query.match), "a key is not answered")


class _Kept:
    """Takes an instance as the pack does, and keeps it."""

    study, series = "1.2", "1.3"

    def __init__(self, uids: tuple[str, str, str]) -> None:
        self._taken = hashlib.sha256(repr(uids).encode())
        self.size = 0

    def take(self, data: memoryview) -> None:
        self._taken.update(data)
        self.size += len(data)

    def end(self) -> None:
        if self.size % 7 == 3:
            raise RefusedError(Reason.UNPARSABLE)
        self.series = self._taken.hexdigest()

    def abandon(self) -> None:
        self.size = -1


@desk()
def stored_parts(data: bytes) -> None:
    """Any bytes are a body that stores, or a PartsError; how they are cut changes nothing."""
    found = []
    for pieces in ([data], *divisions(data)):
        counted = list[Outcome]()
        parts = Parts(b"b", lambda uids: cast("Incoming", _Kept(uids)), counted.append)
        broken = False
        try:
            for piece in pieces:
                if piece:
                    parts.feed(piece)
        except PartsError:
            broken = True
        finally:
            parts.close()
        promise([o for o in parts.outcomes if o.reason is None] == counted, "what is stored is not counted")
        # What stands before the first boundary is overlooked or not, as the cuts have it: an error, not another part.
        if not broken:
            found.append((parts.outcomes, parts.ended))
    promise(all(one == found[0] for one in found), "bytes cut otherwise are other parts")


def association_answer(data: bytes) -> None:
    """Any bytes are an answer to our association request that accepts what was proposed, or a WireError."""
    proposed = {1: ("1.2.840.10008.5.1.4.1.1.2", ["1.2.840.10008.1.2.1"]), 3: ("1.2.3", ["1.2.840.10008.1.2"])}
    try:
        agreement = negotiate.accepted(data, proposed)
    except WireError:
        return
    for number, taken in agreement.contexts.items():
        abstract, syntaxes = proposed[number]
        promise(taken.abstract_syntax == abstract and taken.transfer_syntax in syntaxes, "not what was proposed")


def handed_over(data: bytes) -> None:
    """Any bytes are instances of the lengths that were said, or a HandoverError, however they are cut."""
    whole = _taken([data])
    for parts in divisions(data):
        promise(_taken(parts) == whole, "bytes cut otherwise are other instances")


def _taken(parts: Iterable[bytes]) -> list[tuple[handover.Instance, bytes | None]] | None:
    found: list[tuple[handover.Instance, bytes | None]] = []
    try:
        for announced, pieces in handover.Taking(iter(parts)).instances():
            try:
                content = b"".join(pieces)
                promise(len(content) == announced.length, "an instance has another length than was said")
                found.append((announced, content))
            except handover.BrokenError:
                found.append((announced, None))
    except handover.HandoverError:
        return None
    return found


# --- packs


@functools.cache
def vectors() -> tuple[Keyring, bytes, bytes]:
    """Return the test vectors' unlocked keyring, a deposit, and its study key."""
    secret = slots.parse_key_file((VECTORS / "store.key").read_bytes())
    unlocked = keyring.unlock(VECTORS / "store" / "keyring", secret, FileAnchors(VECTORS / "anchors"))
    deposit = next((VECTORS / "spool" / "incoming").iterdir()).read_bytes()
    header = pack.parse_header(deposit[: pack.PAGE])
    return unlocked, deposit, bytes(unlocked.version(header.version).unwrap_deposit(header.wrapped, header.key_id))


class _Counted(PackFile):
    """A pack file that counts what is asked of it."""

    reads: int = 0

    def __enter__(self) -> _Counted:
        return self

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return super().read(offset, length)


def pack_header(data: bytes) -> None:
    """Any bytes are the header that is written again just so, or a PackError."""
    for page in (data, data[: pack.PAGE].ljust(pack.PAGE, b"\0")):
        try:
            header = pack.parse_header(page)
        except PackError:
            continue
        promise(header.encode() == page and header.bound() == page[: pack.BOUND_BYTES], "a header is read as another")


def pack_file(data: bytes) -> None:
    """Any file is walked to its end in steps that its length bounds, or is refused with a PackError."""
    with contextlib.suppress(PackError):
        pack.parse_header(data[: pack.PAGE])
        _walk(data)
    _frames(data)


def pack_frames(data: bytes) -> None:
    """A pack of many frames, each the start of a page: 48 bytes of the input are one page."""
    _, deposit, _ = vectors()
    pages = [data[i : i + 48].ljust(pack.PAGE, b"\0") for i in range(0, min(len(data), 64 * 48), 48)]
    content = deposit[: pack.PAGE] + b"".join(pages)
    if data:
        # A file may end anywhere, within a frame too.
        content = content[: len(content) - data[-1] * 17]
    if len(content) >= pack.PAGE:
        _walk(content)
    _frames(content)


def pack_pages(data: bytes) -> None:
    """A pack of the pages of a good one in any order: 4 bytes of the input are a page, a place in it, a new byte."""
    _, deposit, _ = vectors()
    good = [deposit[i : i + pack.PAGE] for i in range(pack.PAGE, len(deposit), pack.PAGE)] + [bytes(pack.PAGE)]
    pages = []
    for number, place, change, far in struct.iter_unpack("4B", data[: 4 * 64 & ~3][: len(data) & ~3]):
        page = bytearray(good[number % len(good)])
        if place:
            page[((far << 8 | place) - 1) % len(page)] = change
        pages.append(bytes(page))
    _walk(deposit[: pack.PAGE] + b"".join(pages))


def _walk(content: bytes) -> None:
    """Walk a pack as the vault does, closed and open."""
    found = {}
    with _file(content) as path:
        for closed in (True, False):
            with _Counted(path) as file:
                found[closed] = list(OpenedPack(file, bytearray(vectors()[2])).records(closed=closed))
                # A look for the next frame, the frame, the attributes, what stands behind them.
                most = 8 + 4 * (len(content) // pack.PAGE + 1)
                promise(file.reads <= most, "a walk takes more steps than there are pages")
            places = [r.frame.offset if isinstance(r, Record) else r.offset for r in found[closed]]
            promise(places == sorted(set(places)), "a walk goes back")
            promise(all(place % pack.PAGE == 0 for place in places), "a record begins off a page")
    promise(found[True][: len(found[False])] == found[False], "an open pack holds what a closed one does not")


def _frames(content: bytes) -> None:
    """Read every page of a file as a frame."""

    def read(offset: int, length: int) -> bytes:
        return content[offset : offset + length]

    for offset in range(0, len(content) + 2 * pack.PAGE, pack.PAGE):
        following = pack.resync(read, offset, len(content))
        if following is not None:
            promise(following > offset and following % pack.PAGE == 0, "a look for the next frame goes back")
            promise(read(following, 4) == b"SRR1", "a look for the next frame finds none")
        rest = content[offset:]
        try:
            frame = pack.frame_at(read, offset, len(content))
        except PackError:
            promise(any(rest), "a pack that ends is refused")
            continue
        promise(frame is None or len(rest) >= pack.FRAME_BYTES, "a frame is read that is not there")
        promise(frame is not None or len(rest) >= pack.FRAME_BYTES or not any(rest), "a frame is cut short, and none")
        if frame is not None:
            promise(frame.encode() == read(offset, pack.FRAME_BYTES), "a frame is read as another")
            promise(offset < frame.end <= len(content), "a record goes beyond its pack")


def sealed(data: bytes) -> None:
    """Any bytes are a sealed message or a SealError, however they are cut."""
    _, deposit, key = vectors()
    bound = context("attributes", deposit[: pack.BOUND_BYTES], deposit[pack.PAGE + 16 : pack.PAGE + 32])
    whole = _opened([data], key, bound)
    for parts in divisions(data):
        promise(_opened(parts, key, bound) == whole, "bytes cut otherwise are another message")


def _opened(parts: Iterable[bytes], key: bytes, bound: bytes) -> bytes | None:
    try:
        return b"".join(open_parts(parts, key, bound))
    except SealError:
        return None


# --- the gate's events


@functools.cache
def events_header() -> bytes:
    """Return the first page of a file of events: the vectors' deposit, with another flag. Its study key is the same."""
    deposit = vectors()[1]
    header = pack.parse_header(deposit[: pack.PAGE])
    return msgspec.structs.replace(header, flags=pack.EVENTS).encode()


def events_file(data: bytes) -> None:
    """Any file is events or an EventsError, whole or behind a good header; what opens was sealed as events."""
    for content in (data, events_header() + data):
        try:
            found = read_events(content)
        except (EventsError, UnknownVersionError):
            continue
        header = pack.parse_header(content[: pack.PAGE])
        promise(header.flags == pack.EVENTS, "a study is taken for events")
        promise(len(found) < len(content) <= events.CONTENT_LIMIT + (64 << 10), "events are longer than their file")


def read_events(content: bytes) -> bytes:
    """Return the events in a file that is called as its header says."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / (content[32:48].ljust(16, b"\0").hex() + events.SUFFIX)
        path.write_bytes(content)
        unlocked = vectors()[0]
        return events.read(path, unlocked.store_id, unlocked.version, os.geteuid())


# --- the audit chain


def audit_chain(data: bytes) -> None:
    """Any files are a whole chain, or the first fault is told; what is whole is read, goes on, and is whole then."""
    # As it is, and with numbers and hashes that fit: else a change of a byte reaches little.
    for content in (data, _chained(data)):
        for files in ([content], _halves(content)):
            _chain(files)


def _chain(files: list[bytes]) -> None:
    unlocked = vectors()[0]
    store, public = unlocked.store_id, unlocked.header.signing_key
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        for number, content in enumerate(files):
            # The second file is called as its first line says, or as what follows that.
            first = re.match(rb"([RC]) ([0-9]{1,15}) ", content) if number else None
            named = int(first[2]) + (first[1] == b"C") if first else number + 1
            (folder / f"{named:016}.log").write_bytes(content)
        written = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
        found = audit.verify(folder, store, public)
        entries: list[audit.Entry] = []
        with contextlib.suppress(AuditError):
            entries += audit.read(folder, store, _plain)
        with contextlib.suppress(AuditError):
            audit.hash_of(folder, 1)
        if not found.fault:
            promise([e.number for e in entries] == list(range(1, found.head.number + 1)), "a whole chain is not read")
            lines = b"".join(_record_line(e) for e in entries)
            said = b"".join(line for line in written.splitlines(True) if line.startswith(b"R "))
            promise(lines == said, "records are read as others")
            promise(not audit.verify(folder, store, public, known=found.head).fault, "a chain lost its own head")
            if found.head.number:
                other = Head(found.head.number, bytes(32))
                promise(bool(audit.verify(folder, store, public, known=other).fault), "another head is none")
        _continued(folder, found)


def _continued(folder: Path, found: audit.Verified) -> None:
    unlocked = vectors()[0]
    store, public = unlocked.store_id, unlocked.header.signing_key
    many = len(list(folder.glob("*.log"))) > 1
    try:
        chain = audit.Chain(folder, store, public)
    except AuditError:
        promise(bool(found.fault), "a whole chain is not continued")
        return
    try:
        head = chain.append([b"{}"], "audit", lambda content, _: content)
    finally:
        chain.close()
    again = audit.verify(folder, store, public)
    # Of many files a vault looks at the end alone when it starts.
    promise((again.head == head and not again.fault) or (many and bool(found.fault)), "a broken chain is continued")


def _plain(key: str, sealed: bytes, _: bytes) -> bytes:
    if key == "closed":
        raise SealError("it does not open")
    return sealed


def _record_line(entry: audit.Entry) -> bytes:
    sealed = base64.b64encode(entry.content).decode()
    return f"R {entry.number} {entry.key} {sealed} {entry.hash.hex()}\n".encode()


def _chained(data: bytes) -> bytes:
    """Return a chain of the same records: numbered, hashed and signed anew."""
    unlocked = vectors()[0]
    head = audit._begin(unlocked.store_id)
    lines = []
    for line in data.splitlines(True):
        if (found := audit._RECORD.fullmatch(line.rstrip(b"\n"))) and line.endswith(b"\n"):
            content = found[3]
            with contextlib.suppress(ValueError):
                content = base64.b64decode(content)
            head = audit._next(unlocked.store_id, head, found[2].decode(), content)
            lines.append(_record_line(audit.Entry(head.number, found[2].decode(), head.hash, content)))
        elif (found := audit._CHECKPOINT.fullmatch(line.rstrip(b"\n"))) and line.endswith(b"\n"):
            time = found[2].decode()
            signature = base64.b64encode(unlocked.signing.sign(audit._signed(unlocked.store_id, head, time))).decode()
            lines.append(f"C {head.number} {time} {head.hash.hex()} {signature}\n".encode())
        else:
            lines.append(line)
    return b"".join(lines)


def _halves(data: bytes) -> list[bytes]:
    lines = data.splitlines(True)
    return [b"".join(lines[: len(lines) // 2]), b"".join(lines[len(lines) // 2 :])]


# --- keys


def deposit_key(data: bytes) -> None:
    """Any bytes are a deposit key of this store or a SignatureError, those that the store has signed among them."""
    unlocked = vectors()[0]
    pinned = unlocked.header.signing_key
    signed = unlocked.signing.sign(context("deposit-key") + data)
    for content in (data, data + b"\n" + base64.b64encode(signed) + b"\n"):
        try:
            key = versions.read_deposit_key(content, pinned)
        except SignatureError:
            continue
        promise(key.store_id == unlocked.store_id, "another store's deposit key is taken")


def keyring_file(data: bytes) -> None:
    """Any bytes are a keyring file or a KeyringError; its slots open, or raise an UnlockError."""
    try:
        header, raw, body = keyring.parse(data)
    except KeyringError:
        return
    promise(keyring.MAGIC + u32(len(raw)) + raw + body == data, "a keyring is read as another")
    secret = slots.parse_key_file((VECTORS / "store.key").read_bytes())
    with contextlib.suppress(UnlockError):
        slots.unlock(header.slots, secret, bytes.fromhex(header.store_id))


def recovery_export(data: bytes) -> None:
    """Any bytes are a recovery export or a RecoveryError: whole, as its signed header, and as what is sealed in it."""
    unlocked = vectors()[0]
    pinned = unlocked.header.signing_key
    headed = export_of(data, b"")
    for content in (data, headed):
        with contextlib.suppress(RecoveryError):
            header = recovery.read_header(content, pinned)
            promise(header.store_id == unlocked.header.store_id, "another store's export is taken")
            promise(
                header.digest == recovery._digest(content[len(content) - header.length :]), "a changed one is taken"
            )
    private = recovery_key()[1]
    header = export_header()
    key = versions.new_key()
    follows = recovery._SUITE.encrypt(key, private.public_key(), info=recovery._context("recovery-key", header))
    follows += seal(data, key, recovery._context("recovery-export", header))
    header.digest, header.length = recovery._digest(follows), len(follows)
    with contextlib.suppress(RecoveryError):
        contents = recovery.open_export(export_of(canonical(header), follows), bytes(32), pinned)
        promise(contents.store_id == unlocked.header.store_id, "another store's contents are taken")
        promise({len(v.root) for v in contents.versions} <= {0, 32}, "a root has another length than 32")


@functools.cache
def recovery_key() -> tuple[RecoveryKey, MLKEM768X25519PrivateKey]:
    """Return the recovery key that a secret of zeros gives for the test vectors' store."""
    store_id = vectors()[0].store_id
    recovery_id, private = shares.opened(bytes(32), store_id)
    halves = shares._halves(bytes(32), store_id)
    mlkem768, x25519 = (half.public_key().public_bytes_raw() for half in halves)
    return RecoveryKey("2026-01-31T10:00:00Z", recovery_id, mlkem768, 5, store_id.hex(), 3, x25519), private


def export_header() -> ExportHeader:
    """Return an export's header for the test vectors' store, with nothing behind it."""
    unlocked = vectors()[0]
    numbers = [record.version for record in unlocked.body.versions]
    return ExportHeader(
        created="2026-01-31T10:00:00Z",
        digest=recovery._digest(b""),
        export_id=bytes(16).hex(),
        format=recovery.FORMAT,
        generation=unlocked.header.generation,
        length=0,
        recovery_id=recovery_key()[0].id,
        signing_key=unlocked.header.signing_key,
        store_id=unlocked.header.store_id,
        versions=numbers,
    )


def export_of(header: bytes, follows: bytes) -> bytes:
    """Return any bytes as the header of an export that the store has signed."""
    signature = vectors()[0].signing.sign(context("recovery-header") + header)
    return recovery.MAGIC + u32(len(header)) + header + signature + follows


def key_file(data: bytes) -> None:
    """Any bytes are a key file or a ValueError."""
    with contextlib.suppress(ValueError):
        promise(len(slots.parse_key_file(data).secret) == 32, "a key has another length than 32")


# --- files and requests of admins


def peer_file(data: bytes) -> None:
    """Any bytes are a peer that is written and read again as the same one, or a PeerError; as its certificate, too."""
    _peer(data)
    body = base64.b64encode(data).decode()
    pem = f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"
    _peer(peers.render(PeerFile(ae_title="CT1", certificates=[pem])).encode())


def _peer(data: bytes) -> None:
    with _file(data) as path:
        try:
            peer = peers.read(path)
        except PeerError:
            return
    # ``peer add`` writes certificates in PEM of its own making, whatever stood around them.
    certificates = [x509.load_pem_x509_certificate(pem.encode()) for pem in peer.certificates]
    said = peers.load(data.decode(), peer.file)
    said.certificates = [certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in certificates]
    written = peers.render(said)
    again = peers.parse(written, peer.file)
    same = msgspec.structs.replace(again, certificates=peer.certificates) == peer
    promise(same, "a peer is written as another")


def configuration(data: bytes) -> None:
    """Any bytes are a configuration that is written and read again as the same one, or a ConfigError."""
    with _file(data) as path:
        try:
            found = config.load(path)
        except ConfigError as error:
            promise(bool(str(error)), "a refusal gives no reason")
            return
    for address in found.settings.gate.listen:
        host, port = config.parse_address(address)
        promise(ipaddress.ip_address(host).compressed == host and 0 <= port < 1 << 16, "nothing can listen there")
    with _file(config.render(found.settings).encode()) as path:
        promise(config.load(path).settings == found.settings, "a configuration is written as another")


class _Connection:
    """The other end of a control connection: what it sends, in pieces, and what it gets."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = iter([part for part in parts if part])
        self.got = bytearray()

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def getsockopt(self, *_: int) -> bytes:
        return struct.pack("3i", 1, os.getuid(), os.getgid())

    def recv(self, _: int) -> bytes:
        return next(self._parts, b"")

    def sendall(self, data: bytes) -> None:
        self.got += data


def control_requests(data: bytes) -> None:
    """Any bytes are requests that are answered until one is malformed; nothing is raised, however they are cut."""
    whole = _served([data])
    for parts in divisions(data):
        promise(_served(parts) == whole, "bytes cut otherwise are other requests")


def _served(parts: Iterable[bytes]) -> tuple[list[control.Request], bytes]:
    requests: list[control.Request] = []
    errors: list[Exception] = []

    def handle(request: control.Request) -> control.Response:
        requests.append(request)
        try:
            return control.json_response(request.json(dict))
        except StrongroomError:
            raise
        except Exception as error:
            # The server would answer 500 and write a trace; here it is an error.
            errors.append(error)
            raise

    connection = _Connection(parts)
    control.Server(handle).serve(cast(Any, connection))
    if errors:
        raise errors[0]
    return requests, bytes(connection.got)


def channel_messages(data: bytes) -> None:
    """Any bytes from a worker of the gate, which faces the network, are a message or a ChannelError."""
    ours, theirs = channel.pair()
    with ours, theirs:
        theirs.send(data)
        with contextlib.suppress(ChannelError):
            channel.receive(ours)


TARGETS: dict[str, Target] = {
    "wire": upper_layer,
    "dimse": commands,
    "negotiate": negotiation,
    "head-explicit": functools.partial(_head_in, _EXPLICIT),
    "head-implicit": functools.partial(_head_in, _IMPLICIT),
    "head-big": functools.partial(_head_in, _BIG),
    "head-deflated": head_deflated,
    "association": association,
    "desk-messages": desk_messages,
    "identifier": identifier,
    "stored-parts": stored_parts,
    "association-answer": association_answer,
    "handover": handed_over,
    "describe": description,
    "text": text,
    "attributes": attribute_document,
    "pack-header": pack_header,
    "pack": pack_file,
    "pack-frames": pack_frames,
    "pack-pages": pack_pages,
    "seal": sealed,
    "deposit-key": deposit_key,
    "keyring": keyring_file,
    "recovery-export": recovery_export,
    "key-file": key_file,
    "peers": peer_file,
    "config": configuration,
    "control": control_requests,
    "channel": channel_messages,
    "events": events_file,
    "audit": audit_chain,
}


# --- promises that are broken on purpose, to show that the runner finds it


def _released(data: bytes) -> bool:
    with contextlib.suppress(WireError):
        return any(isinstance(e, Pdu) and e.kind == wire.RELEASE_RQ for e in Reader(0).receive(memoryview(data)))
    return False


def planted_error(data: bytes) -> None:
    """Break on any release request: ten bytes of which six must fit, which blind chance does not find soon."""
    if _released(data):
        raise ValueError("planted")


def planted_hang(data: bytes) -> None:
    """Never end on a release request."""
    while _released(data):
        pass


PLANTED: dict[str, Target] = {"planted-error": planted_error, "planted-hang": planted_hang}


def give(name: str, data: bytes) -> None:
    """Give a target an input.

    Raises:
        Exception: Whatever a parser must not raise.
        BrokenPromiseError: What it accepted is not what it should be.
        SaidAloudError: It warned.
    """
    with silence():
        (TARGETS | PLANTED)[name](data)
