"""Where fuzzing begins: good inputs of every parser, made by code, always the same; and words that mutations may use.

They are made of the data sets that come with pydicom and of the test vectors. Some are bad in a way that small
mutations do not reach: text that nests deeper than Python's stack.
"""

from __future__ import annotations

import functools
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pydicom
import targets
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydicom import Dataset, charset
from pydicom.data import get_charset_files, get_testdata_file
from pynetdicom.dsutils import encode
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassCommonExtendedNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import PresentationContext, build_context

from keys import keyring
from keys.encoding import canonical
from keys.recovery import MAGIC as EXPORT_MAGIC
from keys.recovery import ContainedVersion, Contents
from keys.seal import context as bound_to
from keys.seal import seal, u32
from storage import attributes, audit, pack
from storescp import config, handover, peers
from storescp.gate import negotiate, wire
from storescp.gate.head import WANTED

CT = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
# A head is over long before; longer inputs only make every run slower.
_HEAD_BYTES = 3072
_FILES = ("CT_small.dcm", "rtplan.dcm", "reportsi.dcm", "UN_sequence.dcm", "SC_rgb_small_odd.dcm")
_UNDEFINED = 0xFFFFFFFF
DEEP = b"[" * 1100 + b"]" * 1100


def seeds(name: str) -> list[bytes]:
    """Return the good inputs of a target; nothing is one for each."""
    return [b"", *_SEEDS[name]()] if name in _SEEDS else [b""]


def words(name: str) -> list[bytes]:
    """Return what mutations of a target's inputs may put in."""
    if name.startswith("head") or name == "describe":
        tags = [struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in (*WANTED, 0x7FE00010)]
        items = [struct.pack("<HHI", 0xFFFE, e, n) for e in (0xE000, 0xE00D, 0xE0DD) for n in (0, _UNDEFINED)]
        vrs = [b"SQ\0\0\xff\xff\xff\xff", b"UN\0\0\xff\xff\xff\xff", b"LO\x02\0", b"UI\x06\x001.2.3\0", b"ZZ\0\0"]
        big = [word[1::-1] + word[3:1:-1] + word[:3:-1] for word in (*tags, *items)] if name != "head-implicit" else []
        return [*tags, *items, *vrs, *big]
    if name == "text":
        return [*(term.encode() for term in charset.python_encoding if term), *charset.CODES_TO_ENCODINGS]
    if name == "attributes":
        keys = ("format", "transfer_syntax", "dataset", "undecoded", "received", "vr", "Value", "charset", "raw")
        names = ("Alphabetic", "Ideographic", "Phonetic", "0020000D", "00100010", "at", "certificate")
        return [f'"{key}":'.encode() for key in (*keys, *names)] + [b"\\u0000", b"\\ud800", b"null", b"1e400", b"\\b"]
    return _WORDS.get(name, [])


# --- the upper layer


def _requests() -> list[bytes]:
    contexts = [build_context(CT, [EXPLICIT, IMPLICIT]), build_context("1.2.840.10008.1.1"), build_context("1.2.3")]
    one = _request(contexts[:1])
    return [one, _request(contexts), _request(contexts, everything=True), one[:74] + one]


def _request(contexts: list[PresentationContext], *, everything: bool = False) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = "CT1", "STRONGROOM"
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + 1
    primitive.presentation_context_definition_list = contexts
    length = MaximumLengthNotification()
    length.maximum_length_received = 16_384
    class_uid = ImplementationClassUIDNotification()
    class_uid.implementation_class_uid = "1.2.3.4"
    primitive.user_information = [length, class_uid]
    if everything:
        version = ImplementationVersionNameNotification()
        version.implementation_version_name = "FUZZ"
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid, role.scu_role, role.scp_role = CT, True, True
        window = AsynchronousOperationsWindowNegotiation()
        window.maximum_number_operations_invoked, window.maximum_number_operations_performed = 2, 3
        extended = SOPClassExtendedNegotiation()
        extended.sop_class_uid, extended.service_class_application_information = CT, b"\1\2"
        common = SOPClassCommonExtendedNegotiation()
        common.sop_class_uid, common.service_class_uid = CT, "1.2.840.10008.4.2"
        common.related_general_sop_class_identification = ["1.2.3"]
        identity = UserIdentityNegotiation()
        identity.user_identity_type, identity.primary_field, identity.secondary_field = 2, b"user", b"secret"
        identity.positive_response_requested = True
        primitive.user_information += [version, role, window, extended, common, identity]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(primitive)
    return bytes(pdu.encode())


def _streams() -> list[bytes]:
    store, plain = _commands()[0], _heads(EXPLICIT)[0][:300]
    command = wire.data_pdus(1, command=True, content=store, maximum=16_384)
    dataset = wire.data_pdus(1, command=False, content=plain, maximum=100)
    both = b"".join(struct.pack(">IBB", 4, 1, control) + b"ab" for control in (3, 0, 2))
    return [
        command + dataset,
        wire.data_pdus(255, command=False, content=b"", maximum=0),
        struct.pack(">BBI", 4, 0, len(both)) + both,
        _requests()[0] + command,
        wire.abort(reason=2) + wire.release_reply() + wire.reject(permanent=True, source=1, reason=7),
    ]


def _commands() -> list[bytes]:
    def command(*elements: tuple[int, bytes]) -> bytes:
        body = b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in elements)
        return struct.pack("<HHII", 0, 0, 4, len(body)) + body

    def short(number: int) -> bytes:
        return struct.pack("<H", number)

    uid, start = (0x0002, CT.encode() + b"\0"), (0x0110, short(7))
    return [
        command(uid, (0x0100, short(1)), start, (0x0700, short(2)), (0x0800, short(0)), (0x1000, b"1.2.3\0")),
        command(uid, (0x0100, short(0x30)), start, (0x0800, short(0x0101))),
        command((0x0003, uid[1]), (0x0100, short(0x0110)), start, (0x0800, short(1)), (0x1001, b"1.2.3\0")),
        command((0x0100, short(0x0FFF)), (0x0120, short(7)), (0x0800, short(0x0101))),
    ]


# --- data sets


@functools.cache
def _data_sets() -> list[Dataset]:
    """Return some data sets without their pixels, the last of them in other scripts."""
    paths = [Path(get_testdata_file(name, download=False) or "") for name in _FILES]
    paths += sorted(Path(path) for path in get_charset_files("*.dcm"))
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        return [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in paths]


def _encoded(dataset: Dataset, syntax: str) -> bytes:
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        return bytes(encode(dataset, syntax == IMPLICIT, syntax != BIG) or b"")[:_HEAD_BYTES]


@functools.cache
def _heads(syntax: str) -> list[bytes]:
    order = ">" if syntax == BIG else "<"

    def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
        count = len(value) if length is None else length
        start = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
        if syntax == IMPLICIT or tag >> 16 == 0xFFFE:
            return start + struct.pack(order + "I", count) + value
        if vr in {b"SQ", b"UN", b"OB"}:
            return start + vr + b"\0\0" + struct.pack(order + "I", count) + value
        return start + vr + struct.pack(order + "H", count) + value

    end = element(0xFFFEE00D, b"", b"")
    inner = element(0xFFFEE000, b"", element(0x00091010, b"LO", b"ab") + end, _UNDEFINED)
    parts = [
        element(0x00080018, b"UI", b"1.2.3\0"),
        element(0x00091010, b"SQ", inner + inner + element(0xFFFEE0DD, b"", b""), _UNDEFINED),
        element(0x00091020, b"UN", b"", _UNDEFINED) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
        element(0x00100010, b"PN", b"A^B"),
        element(0x00280010, b"US", struct.pack(order + "H", 2)),
        element(0x7FE00010, b"OB", b"pixels"),
    ]
    return [*(_encoded(dataset, syntax) for dataset in _data_sets()[: len(_FILES)]), b"".join(parts)]


def _described() -> Iterator[bytes]:
    for number, syntax in enumerate((EXPLICIT, IMPLICIT, BIG)):
        yield from (bytes([number]) + head for head in _heads(syntax))
    yield from (b"\0" + _encoded(dataset, EXPLICIT) for dataset in _data_sets()[len(_FILES) :])


def _texts() -> Iterator[bytes]:
    """Yield names of data sets in other scripts behind the character sets that they stand in."""
    for head in _described():
        values = targets.raw_values(head)
        if head[:1] == b"\0" and 0x00100010 in values:
            yield values.get(0x00080005, ("CS", b""))[1] + b"\n" + values[0x00100010][1]


def _small() -> Dataset:
    """Return what a gate asks for, and little more: the instance that the seeds' commands name."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = CT, "1.2.3"
    dataset.PatientName = "A^B"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
    dataset.add_new("PixelData", "OW", bytes(300))
    return dataset


def _associations() -> Iterator[bytes]:
    """Yield C-STORE messages as they come on the wire, several to an association."""
    echo, store = _commands()[1], _commands()[0]
    both = []
    for number, syntax in ((1, EXPLICIT), (3, IMPLICIT), (5, BIG)):
        command = wire.data_pdus(number, command=True, content=store, maximum=16_384)
        # The instance that the command names, of a study and series of its own.
        dataset = _encoded(_small(), syntax)
        both.append(command + wire.data_pdus(number, command=False, content=dataset, maximum=200))
    yield from both
    yield (
        b"".join(both)
        + wire.data_pdus(7, command=True, content=echo, maximum=0)
        + struct.pack(">BBII", wire.RELEASE_RQ, 0, 4, 0)
    )


def _documents() -> Iterator[bytes]:
    yield from (b'["a",1,-2.5,null,{"Alphabetic":"A^B","Phonetic":"\\u00e9"}]', b'["\\u0000\\b"]', b"[]", DEEP)
    for head in _described():
        described = targets.described(head)
        described.dataset.pop("00080005", None)
        yield attributes.encode(described)


# --- the desk


def _desk_messages() -> Iterator[bytes]:
    """Yield messages of a peer that asks: a query and its cancel, a response to a C-STORE, and the end."""
    asked = targets.dimse.Command(0x0020, 1, "1.2.840.10008.5.1.4.1.2.2.1", "", has_data_set=True)
    fields = ((0x0100, 0x0020), (0x0110, 1), (0x0700, 0), (0x0800, 1))
    find = b"".join(struct.pack("<HHIH", 0, element, 2, number) for element, number in fields)
    cancel = b"".join(struct.pack("<HHIH", 0, e, 2, n) for e, n in ((0x0100, 0x0FFF), (0x0120, 1), (0x0800, 0x0101)))
    answer = targets.dimse.response(asked, 0)
    query = wire.data_pdus(1, command=True, content=find, maximum=64)
    query += wire.data_pdus(1, command=False, content=_identifiers()[0], maximum=64)
    both = query + wire.data_pdus(1, command=True, content=cancel, maximum=0)
    yield from (query, both + wire.release_request(), both + wire.abort(reason=0))
    yield wire.data_pdus(3, command=True, content=answer, maximum=0) + query


def _stored_parts() -> list[bytes]:
    """Return bodies that store: files, one file with a content type, and what is none."""
    meta = b"".join(
        struct.pack("<HH2sH", 2, element, b"UI", len(uid)) + uid
        for element, uid in ((2, CT.encode() + b"\0"), (3, b"1.2.3\0"), (0x10, EXPLICIT.encode() + b"\0"))
    )
    file = bytes(128) + b"DICM\x02\0\0\0UL\x04\0" + len(meta).to_bytes(4, "little") + meta + b"\x08\0\x05\0CS\0\0"
    part, kind, end = b"\r\n--b\r\n", b"Content-Type: application/dicom\r\n", b"\r\n--b--\r\n"
    return [
        part + b"\r\n" + file + part + kind + b"\r\n" + file + b"more" + end,
        part[2:] + kind + b"X: y\r\n\r\n" + file + end + b"behind the end",
        part + b"Content-Type: text/plain\r\n\r\nno file\r\n--" + end,
        part + b"\r\n" + file[:140] + end,
    ]


def _identifiers() -> list[bytes]:
    """Return identifiers of every level, in every encoding."""
    made = []
    for level in ("STUDY", "PATIENT", "SERIES", "IMAGE"):
        found = Dataset()
        found.SpecificCharacterSet = "ISO_IR 192"
        found.QueryRetrieveLevel = level
        found.PatientName, found.PatientID, found.StudyDate = "D\u00f6e^J*", "P1", "20260101-"
        found.StudyInstanceUID, found.SeriesInstanceUID = "1.2.3", "1.2.4"
        found.SOPInstanceUID = ["1.2.5", "1.2.6"]
        found.ModalitiesInStudy, found.SeriesNumber, found.Rows = ["CT", "MR"], 7, 512
        found.RequestAttributesSequence = [Dataset()]
        found.add_new(0x00091001, "LO", "private")
        made += [_encoded(found, syntax) for syntax in (EXPLICIT, IMPLICIT, BIG)]
    return made


def _association_answers() -> Iterator[bytes]:
    offer = negotiate.Offer(lambda _: True, lambda _: True)
    for request in _requests()[:3]:
        yield negotiate.agree(negotiate.decode(request), offer, maximum_pdu=16_384).reply


def _handed_over() -> Iterator[bytes]:
    instance = handover.Instance("1.2", "1.3", "1.4", CT, EXPLICIT, "CT1", 6)
    manifest = handover.Manifest(2, 12, [handover.Kind(CT, EXPLICIT, 2)])
    content = handover.part(4) + b"abcd" + handover.part(2) + b"ef"
    for end in (handover.WHOLE, handover.BROKEN):
        whole = handover.announce(instance) + content + handover.WHOLE
        yield handover.announce(manifest) + whole + handover.announce(instance) + content + end
    yield handover.announce(handover.Manifest(0, 0, []))
    yield u32(len(DEEP)) + DEEP


# --- packs and keys


def _packs() -> list[bytes]:
    deposit = targets.vectors()[1]
    return [deposit, deposit[: 3 * pack.PAGE]]


def _frames() -> list[bytes]:
    _, deposit, _ = targets.vectors()
    frame = deposit[pack.PAGE : pack.PAGE + 48]
    short = pack.Frame(0, bytes(16), 72, 72).encode().ljust(48, b"\1")
    return [frame, short * 3 + bytes(48) + short, bytes(48) + frame * 2 + b"\1" * 48 + short]


def _sealed() -> list[bytes]:
    _, deposit, _ = targets.vectors()
    frame = pack.frame_at(lambda offset, length: deposit[offset : offset + length], pack.PAGE, len(deposit))
    return [deposit[frame.attributes_start : frame.end]] if frame is not None else []


def _deposit_keys() -> list[bytes]:
    content = next((targets.VECTORS / "spool" / "public").iterdir()).read_bytes()
    return [content, content.split(b"\n")[0], DEEP]


# --- the gate's events and the audit chain


@functools.cache
def _events() -> list[bytes]:
    """Return what stands behind a header; its salt is another in each process."""
    key = targets.vectors()[2]
    header, object_id = pack.parse_header(targets.events_header()), bytes(16)
    content = b'[{"time":"2026-01-31T12:00:00.000000Z","type":"association-begun","calling":"CT1"}]'
    sealed = seal(content, key, bound_to("event", header.bound(), object_id))
    nothing = seal(b"{}", key, bound_to("attributes", header.bound(), object_id))
    body = pack.Frame(pack.PAGE, object_id, len(sealed), len(nothing)).encode() + sealed + nothing
    return [body, targets.events_header(), body[: len(body) // 2], targets.vectors()[1][: pack.PAGE]]


def _chains() -> list[bytes]:
    """Return chains whose records are sealed by nothing at all: no two seals are the same."""
    unlocked = targets.vectors()[0]
    with tempfile.TemporaryDirectory() as folder:
        chain = audit.Chain(Path(folder), unlocked.store_id, unlocked.header.signing_key)
        for number in range(4):
            records = [b'{"n":%d}' % n for n in range(number)] + [b"abc"[: number + 1]]
            key = "audit" if number % 2 else "deposit-1"
            signing = unlocked.signing if number % 2 else None
            chain.append(records, key, lambda content, _: content, signing=signing, time="2026-01-31T12:00:00Z")
        chain.close()
        whole = (Path(folder) / f"{1:016}.log").read_bytes()
    lines = whole.splitlines(True)
    return [whole, lines[0], b"".join(lines[:3]), whole[:-5], b"".join(reversed(lines))]


def _recovery_exports() -> list[bytes]:
    """Return an export with nothing behind its header, the header, and what one holds: seals differ every time."""
    unlocked, header = targets.vectors()[0], targets.export_header()
    held = Contents(
        audit_key=unlocked.body.audit_key,
        authority=unlocked.body.authority,
        generation=unlocked.header.generation,
        recovery=targets.recovery_key()[0],
        signing_seed=unlocked.body.signing_seed,
        store_id=unlocked.header.store_id,
        tag_key=unlocked.body.tag_key,
        versions=[
            ContainedVersion([r.anchor], r.created, keyring.opened_root(unlocked, r.version), r.state, r.version)
            for r in unlocked.body.versions
        ],
    )
    whole = targets.export_of(canonical(header), b"")
    return [whole, whole[:-40], canonical(header), canonical(held), b'{"format":' + DEEP + b"}"]


# --- files and requests of admins


def _peer_files() -> list[bytes]:
    authority = targets.vectors()[0].body.authority
    pem = authority.certificate if authority is not None else ""
    files = [
        peers.PeerFile(ae_title="CT1", certificates=[pem]),
        peers.PeerFile(
            ae_title="A B", description='\\"\n\u00e9', certificates=[pem], private_sop_classes=["1.2", "1.3"]
        ),
    ]
    der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
    return [*(peers.render(file).encode() for file in files), der, b"ae_title = " + DEEP]


def _configurations() -> list[bytes]:
    store = config.Store(path="s", anchors="a", spool="p", signing_key="ed25519:" + "A" * 43 + "=")
    whole = config.render(config.Settings(store=store))
    bare = "".join(f"{line}\n" for line in whole.split("\n") if line and not line.startswith("#"))
    return [bare.encode(), bare.split("[unlock]")[0].encode(), b"store = " + DEEP]


def _control_requests() -> list[bytes]:
    host = b"Host: vault\r\n"
    get = b"GET /v1/status HTTP/1.1\r\n" + host + b"\r\n"
    body = b'{"level":"instance","filters":{}}'
    post = b"POST /v1/search HTTP/1.1\r\n" + host + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunks = b"POST /v1/search HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    deep = post.replace(b"%d" % len(body), b"%d" % (len(DEEP) + 6)).replace(body, b'{"a":' + DEEP + b"}")
    return [deep, get, post, chunks, get + post + chunks, post.replace(b"HTTP/1.1", b"HTTP/1.0")]


_SEEDS: dict[str, Callable[[], Iterable[bytes]]] = {
    "wire": _streams,
    "dimse": _commands,
    "negotiate": _requests,
    "head-explicit": functools.partial(_heads, EXPLICIT),
    "head-implicit": functools.partial(_heads, IMPLICIT),
    "head-big": functools.partial(_heads, BIG),
    "head-deflated": lambda: [*_heads(EXPLICIT), *(zlib.compress(head, wbits=-15) for head in _heads(EXPLICIT))],
    "association": _associations,
    "desk-messages": _desk_messages,
    "identifier": _identifiers,
    "stored-parts": _stored_parts,
    "association-answer": _association_answers,
    "handover": _handed_over,
    "describe": _described,
    "text": _texts,
    "attributes": _documents,
    "pack-header": lambda: [_packs()[0][: pack.PAGE], _packs()[0][: pack.WRAPPED_END]],
    "pack": _packs,
    "pack-frames": _frames,
    "pack-pages": lambda: [bytes(4 * [n]) for n in range(6)] + [b"".join(bytes([n, 0, 0, 0]) for n in range(6))],
    "seal": _sealed,
    "deposit-key": _deposit_keys,
    "keyring": lambda: [
        (targets.VECTORS / "store" / "keyring").read_bytes(),
        keyring.MAGIC + u32(2) + b"{}",
        keyring.MAGIC + u32(len(DEEP) + 11) + b'{"format":' + DEEP + b"}",
    ],
    "recovery-export": _recovery_exports,
    "key-file": lambda: [(targets.VECTORS / "store.key").read_bytes()],
    "peers": _peer_files,
    "config": _configurations,
    "control": _control_requests,
    "events": _events,
    "audit": _chains,
    "channel": lambda: [b'{"kind":"connection","number":3,"text":"127.0.0.1:1024"}', b'{"kind":"ready"}', DEEP],
}
_WORDS = {
    "wire": [struct.pack(">BBI", kind, 0, 4) for kind in range(1, 8)] + [b"\0\0\0\2\1\3"],
    "dimse": [struct.pack("<HHI", 0, e, 2) for e in (0x0100, 0x0110, 0x0120, 0x0800)] + [b"\x01\x01", b"\xff\x0f"],
    "pack": [b"SRR1"],
    "events": [b"SRR1", b"SRR1" + bytes(12)],
    "audit": [b"R 1 audit ", b"R 2 ", b"C 1 ", b"\n", b" deposit-1 ", b"Yg== ", b" 2026-01-31T12:00:00Z "],
    "pack-frames": [b"SRR1", pack.Frame(0, bytes(16), 72, 72).encode()],
    "config": [
        b'"127.0.0.1:99999"',
        b'"[::1]:1"',
        b"listen = [",
        b"[gate]\n",
        b"maximum_pdu = ",
        b"inf",
        b"1979-05-27",
    ],
    "channel": [b'"kind":"', b'"number":', b'"text":"', b"\xc3\xa9", b"\\ud800"],
    "recovery-export": [EXPORT_MAGIC, b'"format":', b'"versions":[]', b'"anchors":[', b'"root":""', b'"destroyed"'],
    "keyring": [keyring.MAGIC, b'"slots":', b'"parameters":{}', b'"type":"key-file"', b'"generation":'],
    "control": [
        b"\r\n",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b" HTTP/1.1",
    ],
}
