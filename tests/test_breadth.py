"""What DICOM allows, and what it does not: encodings, scripts, UIDs, odd data sets, classes, many objects."""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
from conftest import Server
from interop.running import serving
from pydicom.data import get_charset_files, get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import generate_uid
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import build_context
from scu import CT_IMAGE, Object

from storescp.cli.session import vault
from storescp.config import load
from storescp.errors import StrongroomError
from storescp.gate.status import Reason
from storescp.gate.transfer import ENCODINGS

IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN, PAPYRUS = (
    f"1.2.840.10008.1.{end}" for end in ("2", "2.1", "2.1.99", "2.2", "20")
)
DEFLATING = {DEFLATED, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
PRIVATE_CLASS = "1.3.12.2.1107.5.9.1"
PRIVATE_SYNTAX = "1.3.46.670589.33.1.4.1"
UNDEFINED = 0xFFFFFFFF
LONG_VRS = {"OB", "SQ", "UN"}
ESC = b"\x1b"

# --- objects: chunks are encoded elements, explicit VR little endian


def element(tag: int, vr: str, value: bytes | str, *, pad: bool = True, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    raw += (b"\0" if vr == "UI" else b" ") * (len(raw) % 2 if pad else 0)
    form = "<HH2sHI" if vr in LONG_VRS else "<HH2sH"
    numbers = [0] * (vr in LONG_VRS) + [len(raw) if length is None else length]
    return struct.pack(form, tag >> 16, tag & 0xFFFF, vr.encode(), *numbers) + raw


def make(*chunks: bytes, sop_class: str = CT_IMAGE, syntax: str = EXPLICIT, lacking: int = 0, **ids: str) -> Object:
    """Make an object of the four UIDs and chunks; a chunk takes the place of the UID of its tag."""
    sop, study, series = (str(ids.get(name) or generate_uid()) for name in ("sop", "study", "series"))
    uids = {0x00080016: sop_class, 0x00080018: sop, 0x0020000D: study, 0x0020000E: series}
    parts = [element(tag, "UI", uid) for tag, uid in uids.items()] + list(chunks)
    by_tag = {struct.unpack_from("<HH", part): part for part in parts}
    by_tag.pop((lacking >> 16, lacking & 0xFFFF), None)
    return Object(
        f"{sop_class} {chunks}"[:200], syntax, sop_class, sop, study, series, b"".join(map(by_tag.get, sorted(by_tag)))
    )


def patient(name: bytes, character_set: str = "", **ids: str) -> Object:
    """Make an object whose patient's name and study description hold these bytes."""
    declared = [element(0x00080005, "CS", character_set)] if character_set else []
    return make(*declared, element(0x00081030, "LO", name), element(0x00100010, "PN", name), **ids)


def encoded(data_set: pydicom.Dataset, syntax: str) -> Object:
    """Let pydicom encode a data set; it gets an instance UID of its own."""
    data_set.SOPInstanceUID = generate_uid()
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = syntax in {IMPLICIT, PAPYRUS}, syntax != BIG_ENDIAN
    with scu.lenient():
        write_dataset(out, data_set)
    ids = (data_set.SOPClassUID, data_set.SOPInstanceUID, data_set.StudyInstanceUID, data_set.SeriesInstanceUID)
    return Object(syntax, syntax, *map(str, ids), deflate(out.getvalue()) if syntax in DEFLATING else out.getvalue())


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    content = stream.compress(data) + stream.flush()
    return content + bytes(len(content) % 2)


def nested(depth: int, *, undefined: bool, tag: int = 0x00081140, vr: str = "SQ") -> bytes:
    """Return sequences within sequences."""
    content = element(0x00080100, "SH", "INNERMOST")
    for level in reversed(range(depth)):
        length = UNDEFINED if undefined else len(content)
        item = struct.pack("<HHI", 0xFFFE, 0xE000, length) + content + delimiter(0xE00D) * undefined
        here = tag if not level else 0x00081140
        content = element(here, vr, item + delimiter(0xE0DD) * undefined, length=UNDEFINED if undefined else None)
    return content


def delimiter(number: int) -> bytes:
    return struct.pack("<HHI", 0xFFFE, number, 0)


# --- sending, and what must be true afterwards


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Packs stay open, so that nothing is admitted in the middle of an export but where a test wants that.
    with serving(tmp_path_factory, "CT1", pack_idle_seconds=600, packs_per_peer=1000) as made:
        made.ok("peer", "add", "PRIV", "--issue", made.home / "issued" / "PRIV", "--private-sop-class", PRIVATE_CLASS)
        made.wait_log("peers and certificates read: 2 peers")
        yield made


@contextlib.contextmanager
def associated(server: Server, items: Sequence[Object], title: str = "CT1") -> Iterator[Association]:
    """Associate with a context for each pair of class and transfer syntax."""
    contexts = {(item.sop_class, item.transfer_syntax): item.context for item in items}
    tls = scu.tls(server.home / "issued" / title, title)
    with scu.lenient(), scu.associated(server.port, tls, list(contexts.values()), calling=title) as association:
        yield association


def store(server: Server, items: Sequence[Object], title: str = "CT1") -> list[int]:
    """Store objects on one association; return the statuses."""
    with associated(server, items, title) as association:
        return [scu.store(association, item).Status for item in items]


def store_by_hand(association: Association, item: Object, sop_instance: bytes | None, *, announced: bool = True) -> Any:
    """Store with a command set of our own; return the status, None for an abort."""
    [context] = association.accepted_contexts
    fields = [(0x0002, item.sop_class.encode()), (0x0100, b"\1\0"), (0x0110, b"\1\0"), (0x0700, b"\0\0")]
    fields.append((0x0800, b"\1\0" if announced else b"\1\1"))
    fields += [(0x1000, sop_instance)] if sop_instance is not None else []
    padded = [(number, value + bytes(len(value) % 2)) for number, value in fields]
    body = b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in padded)
    fragments = [b"\3" + struct.pack("<HHII", 0, 0, 4, len(body)) + body] + [b"\2" + item.data] * announced
    # As in scu.store: the association's own thread must not take the response.
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.0001)
    try:
        for fragment in fragments:
            primitive = P_DATA()
            primitive.presentation_data_value_list = [[context.context_id, fragment]]
            association.dul.send_pdu(primitive)
        return getattr(association.dimse.get_msg(block=True)[1], "Status", None)
    finally:
        association._reactor_checkpoint.set()


def found(server: Server, *filters: str) -> dict[str, dict[str, Any]]:
    return {row["sop"]: row for row in server.list("instance", *filters)}


def kept(server: Server, items: Sequence[Object], title: str = "CT1") -> list[dict[str, Any]]:
    """Store objects; assert that each is acknowledged, listed as what it is and exported bit for bit. Return rows."""
    statuses = store(server, items, title)
    assert [(item.name, f"{status:04X}") for item, status in zip(items, statuses, strict=True) if status] == []
    return held(server, items)


def held(server: Server, items: Sequence[Object]) -> list[dict[str, Any]]:
    rows = found(server)
    assert [item.name for item in items if item.sop_instance not in rows] == []
    for item in items:
        row = rows[item.sop_instance]
        expected = (item.study, item.series, item.sop_class, item.transfer_syntax)
        assert tuple(row[key] for key in ("study", "series", "sop_class", "transfer_syntax")) == expected, item.name
    folder = server.home / "out"
    server.ok("export", "--all", "--to", folder)
    files = [(item, folder / item.study / item.series / f"{item.sop_instance}.dcm") for item in items]
    assert [item.name for item, file in files if scu.raw_data_set(file) != item.data] == []
    return [rows[item.sop_instance] for item in items]


def refused(server: Server, items: Sequence[Object], reason: Reason) -> None:
    """Store objects that are refused; the association goes on with a good one, the only one that is listed after."""
    before, good = set(found(server)), make()
    assert store(server, [*items, good]) == [reason.status] * len(items) + [0], reason
    assert set(found(server)) - before == {good.sop_instance}


# --- 1. transfer syntaxes


def test_every_known_transfer_syntax_is_stored_as_it_is(server: Server) -> None:
    data_set = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    # Encapsulated syntaxes: the head is that of explicit VR little endian, and no decoder would take these pixels.
    assert {IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN, PAPYRUS, *DEFLATING} < set(ENCODINGS)
    data_set.walk(lambda *_: None)
    plain = [encoded(data_set, syntax) for syntax in (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN, PAPYRUS)]
    data_set["PixelData"].VR = "OB"
    data_set["PixelData"].is_undefined_length = True
    data_set.PixelData = encapsulate([b"no frame\0\xff\xd9", b"of any codec"])
    fake = [encoded(data_set, syntax) for syntax in ENCODINGS if syntax not in {item.transfer_syntax for item in plain}]
    rows = kept(server, plain + fake)
    assert {row["transfer_syntax"] for row in rows} == set(ENCODINGS)
    assert {(row["patient_name"], row["patient_id"]) for row in rows} == {("CompressedSamples^CT1", "1CT1")}


def test_real_compressed_files_are_stored_as_they_are(server: Server) -> None:
    names = ("MR_small_RLE.dcm", "JPEG2000.dcm", "JPEG-lossy.dcm", "JPEG-LL.dcm", "emri_small_RLE.dcm")
    items = [scu.read(Path(str(get_testdata_file(name)))) for name in names]
    assert len({item.transfer_syntax for item in items}) == 4
    kept(server, items)


def test_deflated_data_sets_are_stored_whatever_their_length_is(server: Server) -> None:
    creator, items = element(0x00090010, "LO", "BREADTH"), []
    # Lengths about that of a buffer that a server may inflate into, with the last wanted UID at the very end.
    for length in range(65_550, 65_600):
        study = "1.2.826.0.1.3680043.10.1." + "1" * 32
        ids = {"sop": f"1.2.3.{length}1", "study": study, "series": study}
        bare = len(make(creator, element(0x00091000, "OB", b""), **ids).data)
        whole = make(creator, element(0x00091000, "OB", bytes(length - bare), pad=False), **ids)
        items.append(whole._replace(name=str(length), transfer_syntax=DEFLATED, data=deflate(whole.data)))
    kept(server, items)


def test_a_private_transfer_syntax_is_not_accepted_and_the_association_serves_others(server: Server) -> None:
    item = make(sop_class=MR_IMAGE)
    contexts = [build_context(CT_IMAGE, PRIVATE_SYNTAX), build_context(MR_IMAGE, [PRIVATE_SYNTAX, EXPLICIT])]
    tls = scu.tls(server.home / "issued" / "CT1")
    with scu.associated(server.port, tls, contexts) as association:
        assert [(c.abstract_syntax, c.result) for c in association.rejected_contexts] == [(CT_IMAGE, 4)]
        assert [c.transfer_syntax for c in association.accepted_contexts] == [[EXPLICIT]]
        assert scu.store(association, item).Status == 0
    held(server, [item])


# --- 2. character sets

CHARSET_FILES = {
    "chrArab.dcm": "قباني^لنزار",
    "chrFren.dcm": "Buc^Jérôme",
    "chrFrenMulti.dcm": "Buc^Jérôme",
    "chrGerm.dcm": "Äneas^Rüdiger",
    "chrGreek.dcm": "Διονυσιος",
    "chrH31.dcm": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "chrH32.dcm": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "chrHbrw.dcm": "שרון^דבורה",
    "chrI2.dcm": "Hong^Gildong=洪^吉洞=홍^길동",
    "chrJapMulti.dcm": "やまだ^たろう",
    "chrJapMultiExplicitIR6.dcm": "やまだ^たろう",
    "chrKoreanMulti.dcm": "김희중",
    "chrRuss.dcm": "Люкceмбypг",
    "chrX1.dcm": "Wang^XiaoDong=王^小東",
    "chrX2.dcm": "Wang^XiaoDong=王^小东",
}
# Character set, Python's codec for it, family and given name. With case where the script has case.
SCRIPTS = [
    ("ISO_IR 100", "iso8859-1", "Großmann", "Jérôme"),
    ("ISO_IR 101", "iso8859-2", "Dvořáková", "Žofie"),
    ("ISO_IR 109", "iso8859-3", "Ĥoraĉo", "Ŝtefano"),
    ("ISO_IR 110", "iso8859-4", "Ķēniņš", "Ģirts"),
    ("ISO_IR 126", "iso8859-7", "Διονύσιος", "Ωμέγα"),
    ("ISO_IR 127", "iso8859-6", "قباني", "نزار"),
    ("ISO_IR 138", "iso8859-8", "שרון", "דבורה"),
    ("ISO_IR 144", "iso8859-5", "Люксембург", "Пётр"),
    ("ISO_IR 148", "iso8859-9", "Şahinoğlu", "Çağlar"),
    ("ISO_IR 166", "tis-620", "สมชาย", "ใจดี"),
    ("ISO_IR 13", "shift_jis", "ﾐｽﾞﾉ", "ﾊﾅｺ"),
    ("ISO_IR 192", "utf-8", "Ñandú𠮷", "Øyvind"),
    # Characters with the bytes of backslash and caret in them, and one of four bytes.
    ("GB18030", "gb18030", "乗乛㐀", "Éa"),
    ("GBK", "gbk", "乗乛東", "王"),
]


def iso2022(escape: bytes, codec: str, text: str) -> bytes:
    return ESC + escape + text.encode(codec)


def japanese(text: str, codec: str = "iso2022_jp") -> bytes:
    return text.encode(codec)


def korean(text: str) -> bytes:
    return iso2022(b"$)C", "euc_kr", text)


def chinese(text: str) -> bytes:
    return iso2022(b"$)A", "gb2312", text)


def after_jis_x_0201(text: str, codec: str = "iso2022_jp") -> bytes:
    return japanese(text, codec).replace(b"\x1b(B", b"\x1b(J")


# PS3.5 annexes H, I and K, and mixes of them. Each component begins in the initial state.
CODE_EXTENSIONS = [
    (
        "ISO 2022 IR 6\\ISO 2022 IR 87",
        b"Suzuki^Ichiro=" + japanese("鈴木") + b"^" + japanese("一郎"),
        "Suzuki^Ichiro=鈴木^一郎",
    ),
    (
        "\\ISO 2022 IR 159",
        b"Mori^Ogai=" + japanese("丂丄", "iso2022_jp_2") + b"^" + japanese("鷗", "iso2022_jp_2"),
        "Mori^Ogai=丂丄^鷗",
    ),
    (
        "ISO 2022 IR 13\\ISO 2022 IR 87\\ISO 2022 IR 159",
        "ﾓﾘ^ｵｳｶﾞｲ=".encode("shift_jis")
        + after_jis_x_0201("森")
        + b"^"
        + after_jis_x_0201("鷗", "iso2022_jp_2")
        + b"="
        + after_jis_x_0201("もり"),
        "ﾓﾘ^ｵｳｶﾞｲ=森^鷗=もり",
    ),
    (
        "\\ISO 2022 IR 149",
        b"Hong^Gildong=" + korean("洪") + b"^" + korean("吉洞") + b"=" + korean("홍") + b"^" + korean("길동"),
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    (
        "\\ISO 2022 IR 58",
        b"Zhang^XiaoDong=" + chinese("张") + b"^" + chinese("小东"),
        "Zhang^XiaoDong=张^小东",
    ),
    (
        "ISO 2022 IR 6\\ISO 2022 IR 87\\ISO 2022 IR 149",
        b"Kim^Ken=" + japanese("金") + b"^" + japanese("健") + b"=" + korean("김") + b"^" + korean("건"),
        "Kim^Ken=金^健=김^건",
    ),
    (
        "\\ISO 2022 IR 58\\ISO 2022 IR 87\\ISO 2022 IR 149",
        b"Wang=" + chinese("王") + b"^" + japanese("王") + b"=" + korean("왕"),
        "Wang=王^王=왕",
    ),
    (
        "ISO 2022 IR 100\\ISO 2022 IR 144\\ISO 2022 IR 126",
        "Ångström^Åke=".encode("latin-1")
        + iso2022(b"-L", "iso8859-5", "Иванова")
        + b"^"
        + iso2022(b"-L", "iso8859-5", "Юлия")
        + b"="
        + iso2022(b"-F", "iso8859-7", "Ωμέγα"),
        "Ångström^Åke=Иванова^Юлия=Ωμέγα",
    ),
]


def test_every_character_set_file_is_stored_and_its_name_listed(server: Server) -> None:
    sources = [Path(str(file)) for file in get_charset_files("*.dcm")]
    files = {file.name: scu.read(file) for file in sources}
    without_ids = sorted(set(files) - set(CHARSET_FILES))
    assert without_ids == ["chrSQEncoding.dcm", "chrSQEncoding1.dcm"]
    items = [files[name] for name in CHARSET_FILES]
    # Two of them are other files under another character set.
    for i, item in enumerate(items):
        if item.name in {"chrFrenMulti.dcm", "chrJapMultiExplicitIR6.dcm"}:
            items[i] = renamed(item)
    rows = kept(server, items)
    assert {item.name: row["patient_name"] for item, row in zip(items, rows, strict=True)} == CHARSET_FILES
    completed = []
    for file in sources:
        if file.name in without_ids:
            data_set = pydicom.dcmread(file)
            data_set.SOPClassUID, data_set.StudyInstanceUID, data_set.SeriesInstanceUID = CT_IMAGE, *two_uids()
            completed.append(encoded(data_set, EXPLICIT))
    rows += kept(server, completed)
    assert {row["undecoded"] for row in rows} == {0}


def renamed(item: Object) -> Object:
    """Give an object other UIDs of the same length."""
    for old in (item.sop_instance, item.study, item.series):
        new = old[:-1] + "9"
        item = Object(
            *(new if field == old else field for field in item[:-1]), item.data.replace(old.encode(), new.encode())
        )
    return item


def two_uids() -> tuple[str, str]:
    return str(generate_uid()), str(generate_uid())


def test_names_are_listed_and_found_in_each_group_without_case(server: Server) -> None:
    named = []
    for character_set, codec, family, given in SCRIPTS:
        text = f"{family}^{given}={given}^{family}={family}{given}"
        named.append((patient(text.encode(codec), character_set), text))
    rows = kept(server, [item for item, _ in named])
    assert [row["patient_name"] for row in rows] == [text for _, text in named]
    assert_found(server, named)


def test_names_with_code_extensions_are_listed_and_found_in_each_group(server: Server) -> None:
    named = [(patient(raw, character_set), text) for character_set, raw, text in CODE_EXTENSIONS]
    rows = kept(server, [item for item, _ in named])
    assert [row["patient_name"] for row in rows] == [text for _, text in named]
    assert [row["undecoded"] for row in rows] == [0] * len(rows)
    assert_found(server, named)


def assert_found(server: Server, named: Sequence[tuple[Object, str]]) -> None:
    """Each group finds its object, with case turned around; the description has the same text."""
    queries = [(item, group) for item, text in named for group in text.split("=")]
    with ThreadPoolExecutor(4) as pool:
        hits = pool.map(lambda query: found(server, "--patient-name", query[1].swapcase()), queries)
        assert [group for (item, group), hit in zip(queries, hits, strict=True) if item.sop_instance not in hit] == []
    descriptions = {row["study"]: row["study_description"] for row in server.list("study")}
    assert [descriptions[item.study] for item, _ in named] == [text for _, text in named]


UNEXPLAINED = [
    ("", "Müller^Jürgen".encode("latin-1")),
    ("", "Müller^Jürgen".encode()),
    ("ISO_IR 6", "Müller".encode("latin-1")),
    ("ISO_IR 6", japanese("山田")),
    ("GB18030", b"Wang=\xff\xff^\x81"),
    ("GBK", b"Wang=\x81"),
    ("ISO_IR 192", "Müller".encode("latin-1")),
    ("ISO_IR 192", b"\xed\xa0\x80"),
    ("ISO_IR 127", b"\xf3\xff"),
    ("ISO_IR 999", b"M\xfcller"),
    ("\\ISO 2022 IR 87", ESC + b"$B\x7f\x7f" + ESC + b"(B"),
    ("\\ISO 2022 IR 149", ESC + b"$)C\xff\xff"),
]
# Bytes above 127 where the initial state is the default repertoire of 7 bits: other values of the set do not change it.
UNEXPLAINED_BESIDE_ESCAPES = [
    ("\\ISO 2022 IR 87", b"M\xfcller^" + japanese("山田")),
    ("ISO 2022 IR 6\\ISO 2022 IR 149", iso2022(b"$)C", "euc_kr", "洪") + b"^M\xfcller"),
    ("\\ISO 2022 IR 87", japanese("山田") + b"\xfc"),
]
# JIS X 0201 has no such bytes; Shift JIS would have.
UNEXPLAINED_IN_JIS_X_0201 = [("ISO_IR 13", "漢字".encode("shift_jis"))]


@pytest.mark.parametrize(
    "cases",
    [UNEXPLAINED, UNEXPLAINED_BESIDE_ESCAPES, UNEXPLAINED_IN_JIS_X_0201],
    ids=["alone", "beside-escapes", "jis-x-0201"],
)
def test_bytes_that_their_character_set_does_not_explain_are_kept_flagged_and_not_guessed(
    server: Server, cases: Sequence[tuple[str, bytes]]
) -> None:
    items = [patient(name, character_set) for character_set, name in cases]
    rows = kept(server, items)
    listed = [(case, row["undecoded"], row["patient_name"]) for case, row in zip(cases, rows, strict=True)]
    assert listed == [(case, 2, "") for case in cases]
    descriptions = {row["study"]: row["study_description"] for row in server.list("study")}
    assert {descriptions[item.study] for item in items} == {""}


# --- 3. UIDs


def long_uid(length: int) -> str:
    return (generate_uid() + "1" * 64)[:length]


def other(uid: str) -> str:
    return uid[:-1] + ("7" if uid[-1] != "7" else "8")


def test_uids_of_64_characters_padded_or_not_are_stored(server: Server) -> None:
    ids = [{name: long_uid(length) for name in ("sop", "study", "series")} for length in (64, 63, 64)]
    odd = {0x00080018: ids[1]["sop"], 0x0020000D: ids[1]["study"], 0x0020000E: ids[1]["series"]}
    short = {name: long_uid(31) for name in ("sop", "study", "series")}
    spaced = [element(0x0020000D, "UI", f"{short['study']} ", pad=False)]
    items = [
        make(**ids[0]),
        # 63 characters and NUL; then 63 and nothing.
        make(**ids[1]),
        make(*[element(tag, "UI", other(long), pad=False) for tag, long in odd.items()],
             **{name: other(long) for name, long in ids[1].items()}),
        make(*[element(0x0020000E, "UI", ids[2]["series"] + "\0\0", pad=False)], **ids[2]),
        make(*spaced, **short),
    ]  # fmt: skip
    kept(server, items)


BAD_UIDS = ["", "1.2.abc", "../../../etc/passwd", "1.2.3/4", "1..2", "1.2.", "1.2\\1.3", "9" * 65]


def test_an_instance_uid_that_is_none_is_refused(server: Server) -> None:
    before, good = set(found(server)), make()
    for bad in [*BAD_UIDS[:-1], None]:
        item = make(element(0x00080018, "UI", bad or ""), lacking=0x00080018 if bad is None else 0)
        # Command and data set agree.
        with associated(server, [item]) as association:
            status = store_by_hand(association, item, None if bad is None else bad.encode())
            assert (bad, status) == (bad, Reason.INVALID_UID.status)
            assert scu.store(association, good).Status == 0
    assert set(found(server)) - before == {good.sop_instance}


def test_an_instance_uid_of_65_characters_is_refused_and_the_association_goes_on(server: Server) -> None:
    before, good, item = set(found(server)), make(), make(sop="9" * 65)
    with associated(server, [item]) as association:
        assert store_by_hand(association, item, b"9" * 65) == Reason.INVALID_UID.status
        assert scu.store(association, good).Status == 0
    assert set(found(server)) - before == {good.sop_instance}


def test_an_instance_uid_that_only_the_command_has_is_refused(server: Server) -> None:
    items = [make(element(0x00080018, "UI", bad)) for bad in BAD_UIDS]
    refused(server, [*items, make(lacking=0x00080018)], Reason.MISMATCH)


@pytest.mark.parametrize("tag", [0x0020000D, 0x0020000E])
def test_a_study_or_series_uid_that_is_none_is_refused(server: Server, tag: int) -> None:
    items = [make(element(tag, "UI", bad)) for bad in BAD_UIDS]
    refused(server, [*items, make(lacking=tag)], Reason.NO_STUDY)


# --- 4. odd data sets


def test_values_of_odd_length_and_without_length_are_stored(server: Server) -> None:
    odd = [
        element(0x00080060, "CS", "MR1", pad=False),
        element(0x00090011, "LO", "ODD", pad=False),
        element(0x00091101, "OB", b"\1\2\3", pad=False),
        element(0x00100010, "PN", "Doe^J", pad=False),
        element(0x00280010, "US", b"\1\2\3", pad=False),
        element(0x7FE00010, "OB", b"\1\2\3", pad=False),
    ]
    tags = {0x00080005: "CS", 0x00080020: "DA", 0x00080060: "CS", 0x00081140: "SQ", 0x00100010: "PN", 0x00280010: "US"}
    items = [make(*odd), make(*[element(tag, vr, b"") for tag, vr in tags.items()]), make()]
    assert [row["patient_name"] for row in kept(server, items)] == ["Doe^J", "", ""]


def test_no_data_set_and_one_of_no_bytes_are_refused(server: Server) -> None:
    before, item, good = set(found(server)), make()._replace(data=b""), make()
    with associated(server, [item]) as association:
        sop = item.sop_instance.encode()
        assert store_by_hand(association, item, sop) == Reason.NO_STUDY.status
        assert store_by_hand(association, item, sop, announced=False) == Reason.NO_DATA_SET.status
        assert scu.store(association, good).Status == 0
    assert set(found(server)) - before == {good.sop_instance}


def test_data_sets_cut_within_an_element_are_refused(server: Server) -> None:
    item = make(element(0x00200052, "UI", generate_uid()))
    refused(server, [item._replace(data=item.data[:-count]) for count in (1, 9, 60)], Reason.UNPARSABLE)


def test_sequences_nested_60_deep_are_stored(server: Server) -> None:
    kept(server, [make(nested(depth, undefined=undefined)) for depth in (1, 60) for undefined in (True, False)])


def test_sequences_nested_70_deep_are_refused_where_only_walking_finds_their_end(server: Server) -> None:
    refused(server, [make(nested(70, undefined=True))], Reason.UNPARSABLE)
    # Of a defined length, or behind what the index wants, they are not walked.
    kept(server, [make(nested(70, undefined=False)), make(nested(70, undefined=True, tag=0x0040A730))])


def test_private_sequences_before_the_study_uid_are_stored(server: Server) -> None:
    creator = element(0x00090010, "LO", "BREADTH")
    implicit = struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED) + struct.pack("<HHI", 8, 0x100, 4) + b"CODE"
    inner = implicit + delimiter(0xE00D) + delimiter(0xE0DD)
    kept(
        server,
        [
            make(creator, nested(3, undefined=True, tag=0x00091010)),
            make(creator, nested(3, undefined=False, tag=0x00091010)),
            # PS3.5 6.2.2: UN of undefined length holds implicit VR, in explicit VR too.
            make(creator, element(0x00091010, "UN", inner, length=UNDEFINED)),
            make(creator, element(0x00091010, "UN", inner)),
        ],
    )


def test_large_private_elements_before_the_study_uid_are_stored_up_to_a_limit(server: Server) -> None:
    creator = element(0x00090010, "LO", "BREADTH")
    small, large = (element(0x00091010, "OB", bytes(size << 20)) for size in (3, 6))
    kept(server, [make(creator, small)])
    refused(server, [make(creator, large)], Reason.HEAD_TOO_LARGE)
    # Behind the UIDs there is no limit.
    kept(server, [make(element(0x00210010, "LO", "BREADTH"), element(0x00211010, "OB", bytes(6 << 20)))])


def test_what_is_acknowledged_is_listed_however_odd_its_attributes_are(server: Server) -> None:
    undecodable = element(0x00081030, "LO", b"\xff\xfe")
    chunks = [
        element(0x00080008, "CS", "\\".join("A" * 1100)),
        element(0x00100010, "PN", "\\".join("A" * 1100)),
        element(0x00280010, "US", bytes(2 * 1100)),
        element(0x00080005, "CS", "X" * 300),
        element(0x00080005, "CS", "\\".join(["ISO 2022 IR 87"] * 40)),
        element(0x00080005, "CS", b"\xff" * 20),
        element(0x00100020, "LO", b"\xff" * 4000),
        element(0x00100020, "LO", b"\x1b\x07\x01\x7f"),
        element(0x00100020, "PN", "1234"),
        element(0x00280010, "LO", "1234"),
    ]
    kept(server, [make(chunk, undecodable) for chunk in chunks])


def test_uids_under_another_vr_are_listed_as_the_uids_they_are(server: Server) -> None:
    items = []
    for vr in ("LO", "PN", "US", "UN", "DS", "CS"):
        for name, tag in (("sop", 0x00080018), ("study", 0x0020000D), ("series", 0x0020000E)):
            uid = generate_uid()
            items.append(make(element(tag, vr, uid + "\0" * (len(uid) % 2)), **{name: uid}))
    kept(server, items)


def test_attributes_that_are_too_large_are_refused(server: Server) -> None:
    tags = [0x00080070, 0x00080080, 0x00081010, 0x00081030, 0x0008103E, 0x00081090, 0x00100020, 0x00100021]
    tags += [0x00101000, 0x00181000, 0x00181030, 0x00200010, 0x00080050, 0x00080201, 0x00080090, 0x00081050, 0x00081060]
    refused(server, [make(*[element(tag, "LO", "X" * 4096) for tag in tags])], Reason.ATTRIBUTES_TOO_LARGE)


# --- 5. classes


def test_classes_that_are_no_images_are_stored(server: Server) -> None:
    names = ("test-SR.dcm", "reportsi.dcm", "rtplan.dcm", "rtdose.dcm", "rtdose_expb.dcm", "waveform_ecg.dcm")
    files = [scu.read(Path(str(get_testdata_file(name)))) for name in names]
    modalities = ["SR", "SR", "RTPLAN", "RTDOSE", "RTDOSE", "ECG"]
    # The two doses are one object in two encodings.
    files[4] = renamed(files[4])
    storage = "1.2.840.10008.5.1.4.1.1"
    pdf = element(0x00420011, "OB", b"%PDF-1.4\n%%EOF\n")
    made = [
        make(element(0x00080060, "CS", "RTSTRUCT"), nested(2, undefined=True, tag=0x30060020),
             sop_class=f"{storage}.481.3"),
        make(element(0x00080060, "CS", "PR"), nested(2, undefined=False), sop_class=f"{storage}.11.1"),
        make(element(0x00080060, "CS", "DOC"), pdf, sop_class=f"{storage}.104.1"),
        # Retired: the ultrasound image of 1993.
        make(element(0x00080060, "CS", "US"), sop_class=f"{storage}.6"),
    ]  # fmt: skip
    rows = kept(server, files + made)
    assert [row["modality"] for row in rows] == [*modalities, "RTSTRUCT", "PR", "DOC", "US"]


def test_a_private_class_is_stored_from_the_peer_that_may_and_not_accepted_from_another(server: Server) -> None:
    kept(server, [make(sop_class=PRIVATE_CLASS)], "PRIV")
    assert not_accepted(server, PRIVATE_CLASS) == [(PRIVATE_CLASS, 3)]


def test_a_class_that_is_not_for_storage_is_not_accepted(server: Server) -> None:
    find = "1.2.840.10008.5.1.4.1.2.1.1"
    assert not_accepted(server, find) == [(find, 3)]


def not_accepted(server: Server, abstract_syntax: str) -> list[tuple[str, int]]:
    """Propose a class beside a good one; store with that; return the rejected contexts."""
    good = make()
    with associated(server, [good, good._replace(sop_class=abstract_syntax)]) as association:
        assert scu.store(association, good).Status == 0
        return [(str(c.abstract_syntax), c.result) for c in association.rejected_contexts]


# --- 6. many


def packs(server: Server) -> Collection[Path]:
    return [
        file
        for folder in (server.store / "objects", server.incoming)
        for file in folder.rglob("*")
        if file.is_file() and not file.suffix
    ]


def test_three_hundred_associations_with_an_instance_of_one_study_each_share_packs(server: Server) -> None:
    before = len(packs(server))
    study, series = two_uids()
    items = [make(study=study, series=series) for _ in range(300)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda item: store(server, [item])[0], items)) == {0}
    rows = server.list("instance", "--study", study)
    assert {row["sop"] for row in rows} == {item.sop_instance for item in items}
    [listed] = server.list("study", "--study", study)
    assert (listed["instance_count"], listed["series_count"]) == (300, 1)
    held(server, items)
    # One for each association that was there at the same time as others.
    assert 1 <= len(packs(server)) - before <= 4


def test_all_of_it_is_listed_and_exported_the_same_when_it_is_admitted(server: Server) -> None:
    before, count = found(server), len(packs(server))
    server.ok("export", "--all", "--to", server.home / "out")
    server.stop()
    server.start()
    server.wait_admitted()
    assert found(server) == {sop: row | {"admitted": 1} for sop, row in before.items()}
    # A pack in which all was refused goes.
    assert len(packs(server)) <= count
    server.ok("export", "--all", "--to", server.home / "again")
    one, other = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*.dcm")}
        for root in (server.home / "out", server.home / "again")
    )
    assert one == other
    assert len(one) == len(before)


def test_instances_that_were_listed_before_their_admission_are_read_after_it(server: Server) -> None:
    """As by an export that takes longer than a pack stays open; two studies came in turns."""
    first, other = two_uids()
    items = {item.sop_instance: item for item in (make(study=study) for study in (first, other, first))}
    for item in items.values():
        assert store(server, [item]) == [0]
        assert item.sop_instance in found(server)
    with vault(load(server.config)) as client:
        rows = list(client.lines("POST", "/v1/search", {"level": "instance", "filters": {}}))
    server.stop()
    server.start()
    server.wait_admitted()
    wrong = {}
    for row in (row for row in rows if row["sop"] in items):
        with vault(load(server.config)) as client:
            try:
                content = b"".join(client.stream("GET", f"/v1/instances/{row['pack']}/{row['object_id']}"))
            except StrongroomError as error:
                wrong[row["sop"]] = str(error)
                continue
        if content != items[row["sop"]].data:
            wrong[row["sop"]] = next((f"that of {sop}" for sop, item in items.items() if item.data == content), "other")
    assert wrong == {}
