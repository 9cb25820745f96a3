"""What URLs and headers ask for, who asks, and how a frame is drawn: decisions without a server."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pki
import pytest
import scu
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

from storage.query import SUPPORTED
from storescp import peers
from storescp.desk import web_accept, web_peer, web_query, web_render
from storescp.desk.multipart import Multipart
from storescp.desk.web_accept import AcceptError, Choice
from storescp.desk.web_dataset import Reader
from storescp.desk.web_pixels import Layout, Pixels
from storescp.desk.web_query import ParameterError
from storescp.desk.web_render import DrawError, Wishes
from storescp.desk.web_retrieve import turns
from storescp.desk.web_stream import gathered
from storescp.gate.connection import Policy
from storescp.gate.tls import Trust, server_context

EXPLICIT, JPEG, JPEG_LOSSLESS = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"
MULTIPART = 'multipart/related; type="application/dicom"'
BASE = "https://desk.example/dicomweb"

# --- Accept


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", [Choice(True, "application/dicom", "*")]),
        ("*/*", [Choice(True, "application/dicom", "*")]),
        (MULTIPART, [Choice(True, "application/dicom", EXPLICIT)]),
        (f"{MULTIPART}; transfer-syntax=*", [Choice(True, "application/dicom", "*")]),
        (f"{MULTIPART};transfer-syntax={JPEG};boundary=x", [Choice(True, "application/dicom", JPEG)]),
        ("application/dicom", [Choice(False, "application/dicom", EXPLICIT)]),
        (
            f"{MULTIPART};transfer-syntax={EXPLICIT};q=0.3, {MULTIPART};transfer-syntax={JPEG};q=0.5",
            [Choice(True, "application/dicom", JPEG), Choice(True, "application/dicom", EXPLICIT)],
        ),
        (f"{MULTIPART};q=0", []),
        ("text/html", []),
        ('multipart/related; type="application/dicom+xml"', []),
    ],
)
def test_instances_are_given_as_the_client_accepts_them(accept: str, expected: list[Choice]) -> None:
    assert list(web_accept.instances(web_accept.ranges(accept))) == expected


@pytest.mark.parametrize(
    ("accept", "stored", "expected"),
    [
        ("*/*", JPEG, [Choice(True, "image/jpeg", "*")]),
        ('multipart/related; type="image/jpeg"', JPEG, [Choice(True, "image/jpeg", JPEG)]),
        (f'multipart/related; type="image/jpeg"; transfer-syntax={JPEG}', JPEG_LOSSLESS, []),
        ('multipart/related; type="image/jls"', JPEG, []),
        ("multipart/related; type=application/octet-stream; transfer-syntax=*", JPEG,
         [Choice(True, "application/octet-stream", "*")]),
        ("multipart/related; type=application/octet-stream", JPEG,
         [Choice(True, "application/octet-stream", EXPLICIT)]),
        ("application/octet-stream", EXPLICIT, [Choice(False, "application/octet-stream", EXPLICIT)]),
    ],
)  # fmt: skip
def test_frames_are_given_as_the_client_accepts_them(accept: str, stored: str, expected: list[Choice]) -> None:
    assert list(web_accept.frames(web_accept.ranges(accept), stored)) == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/dicom+json"),
        ("application/json", "application/json"),
        ("application/*", "application/dicom+json"),
        ('multipart/related; type="application/dicom+xml", application/dicom+json;q=0.1', "application/dicom+json"),
        ('multipart/related; type="application/dicom+xml"', ""),
        ("application/dicom+json;q=0", ""),
    ],
)
def test_documents_are_json_or_nothing(accept: str, expected: str) -> None:
    assert web_accept.documents(web_accept.ranges(accept)) == expected


@pytest.mark.parametrize("accept", ["a", "a/b;q=x", "a/b;q=2", ",", "a/b;", '"', "a/b c/d", ",".join(["a/b"] * 65)])
def test_an_accept_header_that_is_none_is_an_error(accept: str) -> None:
    with pytest.raises(AcceptError):
        web_accept.ranges(accept)


@given(st.text(max_size=200))
def test_any_accept_header_is_read_or_an_error(accept: str) -> None:
    try:
        found = web_accept.ranges(accept)
    except AcceptError:
        return
    assert found
    assert all(0 <= range_.weight <= 1 for range_ in found)


# --- QIDO-RS


def search(level: str, *parameters: tuple[str, str], **path: str) -> web_query.Search:
    return web_query.search(level, path, parameters)


@pytest.mark.parametrize("name", ["PatientName", "00100010"])
def test_keys_are_keywords_or_tags(name: str) -> None:
    assert search("STUDY", (name, "Doe^J*")).query.match == {"00100010": ["Doe^J*"]}


def test_a_list_of_uids_has_commas_or_backslashes() -> None:
    for value in ("1.2,1.3", "1.2\\1.3"):
        assert search("STUDY", ("StudyInstanceUID", value)).query.match == {"0020000D": ["1.2", "1.3"]}


def test_an_empty_value_matches_everything_and_is_returned() -> None:
    asked = search("STUDY", ("StudyDescription", ""))
    assert asked.query.match == {"00081030": []}
    assert "00081030" in asked.returned


def test_includefield_asks_for_more_and_all_is_what_the_index_has() -> None:
    assert "00081030" not in search("STUDY").returned
    assert "00081030" in search("STUDY", ("includefield", "00081030")).returned
    assert {"00081030", "00100021"} <= set(
        search("STUDY", ("includefield", "StudyDescription,IssuerOfPatientID")).returned
    )
    assert set(SUPPORTED["IMAGE"]) <= set(search("IMAGE", ("includefield", "all")).returned)
    # What it has not, is left out.
    assert "00204000" not in search("STUDY", ("includefield", "ImageComments")).returned


def test_what_stands_above_is_returned_where_the_path_does_not_say_it() -> None:
    assert "00100010" in search("SERIES").returned
    assert "00100010" not in search("SERIES", **{"0020000D": "1.2"}).returned
    within = search("IMAGE", **{"0020000D": "1.2", "0020000E": "1.2.3"})
    assert {"00100010", "00080060"} & set(within.returned) == set()
    assert {"00100010", "00080060"} <= set(search("IMAGE").returned)
    # The address of each is made of these.
    assert {"0020000D", "0020000E", "00080018"} <= set(within.query.wants)


def test_limit_and_offset_are_a_page_and_one_more_is_asked_for() -> None:
    asked = search("STUDY", ("limit", "10"), ("offset", "20"))
    assert (asked.most, asked.query.limit, asked.query.offset) == (10, 11, 20)
    assert search("STUDY").most == search("STUDY", ("limit", "999999")).most == web_query.RESULTS_LIMIT


def test_what_is_not_done_is_a_warning() -> None:
    assert search("STUDY", ("fuzzymatching", "false")).warnings == []
    assert "fuzzymatching parameter is not supported" in search("STUDY", ("fuzzymatching", "true")).warnings[0]
    asked = search("STUDY", ("PerformingPhysicianName", "secret"), ("00400275.00400009", "secret"))
    assert asked.warnings == ["these keys are not matched here: 00400275.00400009, PerformingPhysicianName"]
    assert asked.query.match == {}


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ([("Nothing", "secret")], "Nothing"),
        ([("0010001", "secret")], "0010001"),
        ([("includefield", "Nothing")], "Nothing"),
        ([("PatientID", "secret"), ("00100020", "secret")], "00100020"),
        ([("StudyDate", "secret")], "00080020"),
        ([("StudyDate", "20260101-secret")], "00080020"),
        ([("StudyTime", "99secret")], "00080030"),
        ([("StudyInstanceUID", "1.2.secret")], "0020000D"),
        ([("PatientName", "secret\x07")], "00100010"),
        ([("limit", "secret")], "limit"),
        ([("offset", "-1")], "offset"),
        ([("fuzzymatching", "secret")], "fuzzymatching"),
        ([("<secret>", "x")], "a parameter's name"),
    ],
)
def test_a_bad_key_is_named_and_its_value_is_not(parameters: list[tuple[str, str]], names: str) -> None:
    with pytest.raises(ParameterError) as caught:
        search("STUDY", *parameters)
    assert names in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_path_that_names_no_uid_is_an_error_and_so_is_saying_it_twice() -> None:
    with pytest.raises(ParameterError):
        search("SERIES", **{"0020000D": "1.2.x"})
    with pytest.raises(ParameterError, match="StudyInstanceUID"):
        search("SERIES", ("StudyInstanceUID", "1.3"), **{"0020000D": "1.2"})


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=4))
def test_any_parameters_are_understood_or_an_error(parameters: list[tuple[str, str]]) -> None:
    try:
        search("IMAGE", *parameters)
    except ParameterError as error:
        str(error).encode("ascii")


def test_a_result_is_the_json_model() -> None:
    row = {
        "00080020": ["20260131"],
        "00080061": ["CT", "SR"],
        "00100010": ["Doe^Jane=D^J"],
        "0020000D": ["1.2.3"],
        "00201206": ["2"],
        "00201208": [],
    }
    found = web_query.document(row, search("STUDY"), BASE)
    assert list(found) == sorted(found)
    assert found["00080005"]["Value"] == ["ISO_IR 192"]
    assert found["00080056"] == {"vr": "CS", "Value": ["ONLINE"]}
    assert found["00081190"] == {"vr": "UR", "Value": [f"{BASE}/studies/1.2.3"]}
    assert found["00080061"] == {"vr": "CS", "Value": ["CT", "SR"]}
    assert found["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane", "Ideographic": "D^J"}]}
    assert found["00201206"] == {"vr": "IS", "Value": [2]}
    assert found["00201208"] == {"vr": "IS"}
    # The index has it not: it is returned without a value, not left out.
    assert found["00080090"] == {"vr": "PN"}


def test_a_number_that_is_none_or_too_long_stays_text() -> None:
    row = {"0020000D": ["1.2"], "0020000E": ["1.3"], "00200011": ["9" * 40]}
    assert web_query.document(row, search("SERIES"), BASE)["00200011"]["Value"] == ["9" * 40]


def test_an_instance_has_its_own_address() -> None:
    row = {"0020000D": ["1.2"], "0020000E": ["1.3"], "00080018": ["1.4"]}
    found = web_query.document(row, search("IMAGE", **{"0020000D": "1.2", "0020000E": "1.3"}), BASE)
    assert found["00081190"]["Value"] == [f"{BASE}/studies/1.2/series/1.3/instances/1.4"]


# --- Bodies


def test_a_multipart_body_is_what_a_mail_parser_takes_apart() -> None:
    from email import message_from_bytes

    body = Multipart("application/dicom")
    content = b"".join(
        [
            *body.part("application/dicom", [b"one\r\n--two", memoryview(b"")], content_location="https://desk/1"),
            *body.part("application/dicom", [b"\r\n"]),
            body.end(),
        ]
    )
    parsed = message_from_bytes(f"Content-Type: {body.content_type}\r\n\r\n".encode() + content)
    parts: Any = parsed.get_payload()
    assert [part.get_payload(decode=True) for part in parts] == [b"one\r\n--two", b"\r\n"]
    assert parts[0]["Content-Location"] == "https://desk/1"
    assert parsed.get_param("type") == "application/dicom"


def test_small_parts_are_gathered_and_large_ones_are_not_held_up() -> None:
    assert list(gathered([b"a"] * 10, 4)) == [b"aaaa", b"aaaa", b"aa"]
    assert list(gathered([b"a", b"b" * 9, b"c"], 4)) == [b"a" + b"b" * 9, b"c"]


def test_frames_in_any_order_are_ascending_runs() -> None:
    assert turns([1, 2, 4, 3]) == [[1, 2, 4], [3]]
    assert turns([3, 2, 1]) == [[3], [2], [1]]


# --- Who asks

NOW = datetime.now(UTC)


def policy(folder: Path, trusted: list[pki.Holder], revoked: list[bytes] = [], **files: str) -> Policy:  # noqa: B006
    """Return a policy of peer files and authorities."""
    place = folder / f"policy{len(list(folder.iterdir()))}"
    (place / "peers.d").mkdir(parents=True)
    for title, more in files.items():
        (place / "peers.d" / f"{title}.toml").write_text(f'ae_title = "{title}"\n{more}\n')
    for number, holder in enumerate(trusted):
        (place / f"{number}.pem").write_text(holder.pem)
    for number, content in enumerate(revoked):
        (place / f"{number}.crl").write_bytes(content)
    own = pki.authority("desk").save(place, "desk")
    trust = Trust(sorted(place.glob("[0-9].pem")), sorted(place.glob("*.crl")))
    known = peers.read_all(place / "peers.d")
    assert own
    return Policy(known, server_context(place / "desk.pem", place / "desk.key", trust, known), trust)


def pinned(holder: pki.Holder, roles: str = '["reader"]', more: str = "") -> str:
    return f'certificates = ["""{holder.pem}"""]\nroles = {roles}\n{more}'


def test_a_peer_is_known_by_its_certificate_its_role_and_its_address(tmp_path: Path) -> None:
    ca = pki.authority("ca")
    reader, other = ca.issue("reader"), ca.issue("other")
    found = policy(
        tmp_path, [ca], A=pinned(other, "[]"), READER=pinned(reader, more='addresses = ["10.1.2.0/24", "fd00::/8"]')
    )
    chain = [reader.certificate, ca.certificate]

    def title(address: str = "10.1.2.3", chain: list[Any] = chain) -> str:
        peer = web_peer.asking(found, chain, address, NOW)
        return peer.ae_title if peer else ""

    assert title() == title("fd00::1%eth0") == "READER"
    assert title("10.1.3.3") == title("::1") == ""
    # Of an authority that is trusted, but in no peer file; and in one without a role.
    assert title(chain=[ca.issue("stranger").certificate, ca.certificate]) == ""
    assert title(chain=[other.certificate, ca.certificate]) == ""


def test_whom_the_policy_does_not_trust_any_more_is_nobody_on_an_open_connection(tmp_path: Path) -> None:
    ca = pki.authority("ca")
    holder = ca.issue("reader", names=["reader.example"])
    chain = [holder.certificate, ca.certificate]
    print_ = peers.key_print(holder.certificate)
    above = peers.key_print(ca.certificate)
    for more in (f'keys = ["{print_}"]', f'names = ["dns:reader.example"]\nauthority = "{above}"'):
        file = f'{more}\nroles = ["reader"]'
        assert web_peer.asking(policy(tmp_path, [ca], P=file), chain, "127.0.0.1", NOW)
        # The authority was taken out of gate.trust, the peer file removed, or its role; the certificate revoked.
        other = pki.authority("other")
        assert not web_peer.asking(policy(tmp_path, [other], P=file), chain, "127.0.0.1", NOW)
        assert not web_peer.asking(policy(tmp_path, [ca]), chain, "127.0.0.1", NOW)
        assert not web_peer.asking(policy(tmp_path, [ca], P=f"{more}\nroles = []"), chain, "127.0.0.1", NOW)
        revoked = pki.pem(ca.revoke(holder))
        assert not web_peer.asking(policy(tmp_path, [ca], [revoked], P=file), chain, "127.0.0.1", NOW)
        assert not web_peer.asking(policy(tmp_path, [ca], P=file), chain, "127.0.0.1", NOW + timedelta(days=2))


@pytest.mark.parametrize(("roles", "reads"), [('["reader"]', True), ('["admin"]', True), ('["sender"]', False)])
def test_readers_and_admins_read(tmp_path: Path, roles: str, reads: bool) -> None:
    holder = pki.authority("self")
    found = web_peer.asking(policy(tmp_path, [], P=pinned(holder, roles)), [holder.certificate], "127.0.0.1", NOW)
    assert found is not None
    assert web_peer.may_read(found) == reads


# --- Drawn


def layout(**more: Any) -> Layout:
    return Layout(**{"photometric": "MONOCHROME2", "rows": 1, "columns": 4, "allocated": 16, "stored": 12} | more)


def drawn(samples: Any, what: Layout, wished: Wishes = Wishes()) -> list[Any]:  # noqa: B008
    content = web_render.draw(np.asarray(samples).tobytes(), what, what.photometric, "image/png", wished)
    image: Any = Image.open(io.BytesIO(content))
    return list(np.asarray(image).reshape((-1, 3) if image.mode == "RGB" else -1).tolist())


def test_a_window_of_the_file_or_of_the_url_is_applied() -> None:
    values = np.array([0, 1000, 2000, 4095], np.uint16)
    assert drawn(values, layout()) == [0, 62, 125, 255]
    assert drawn(values, layout(center="1000", width="1000")) == [0, 128, 255, 255]
    wished = Wishes(window=(2000, 4000, "linear-exact"))
    assert drawn(values, layout(center="1", width="1"), wished) == [0, 64, 128, 255]
    assert drawn(values, layout(), Wishes(window=(1000, 500, "sigmoid")))[1] == 128


def test_rescaling_sign_and_what_lies_above_the_stored_bits_count() -> None:
    wished = Wishes(window=(0, 2000, "linear-exact"))
    assert drawn(np.array([0, 1024, 2024, 24], np.uint16), layout(intercept="-1024", slope="1"), wished) == [
        0, 128, 255, 0,
    ]  # fmt: skip
    signed = np.array([-1000, 0, 1000, 500], np.int16).view(np.uint16) & 0x0FFF | 0xF000
    assert drawn(signed, layout(signed=1), wished) == [0, 128, 255, 191]


def test_monochrome1_is_drawn_inverted_and_colours_as_they_are() -> None:
    assert drawn(np.array([0, 4095, 0, 0], np.uint16), layout(photometric="MONOCHROME1")) == [255, 0, 255, 255]
    colours = np.arange(12, dtype=np.uint8)
    rgb = layout(photometric="RGB", samples=3, allocated=8, stored=8)
    assert drawn(colours, rgb) == colours.reshape((4, 3)).tolist()
    planes = layout(photometric="RGB", samples=3, allocated=8, stored=8, planar=1)
    assert drawn(colours, planes) == colours.reshape((3, 4)).T.tolist()


def test_a_viewport_is_filled_without_distortion() -> None:
    content = web_render.draw(bytes(200 * 100), layout(rows=100, columns=200, allocated=8, stored=8), "MONOCHROME2",
                              "image/jpeg", Wishes(viewport=(50, 50)))  # fmt: skip
    assert Image.open(io.BytesIO(content)).size == (50, 25)


@pytest.mark.parametrize(
    "what", [layout(photometric="PALETTE COLOR"), layout(allocated=64), layout(rows=60_000, columns=60_000)]
)
def test_what_cannot_be_drawn_is_an_error(what: Layout) -> None:
    with pytest.raises(DrawError):
        web_render.draw(bytes(64), what, what.photometric, "image/png", Wishes())


@pytest.mark.parametrize(
    "parameters",
    [
        {"window": "1"}, {"window": "1,0"}, {"window": "1,2,cubic"}, {"window": "a,b,linear"}, {"window": "1,nan"},
        {"quality": "0"}, {"quality": "x"}, {"viewport": "1"}, {"viewport": "0,1"}, {"viewport": "1,2,3,4,5,6"},
    ],
)  # fmt: skip
def test_a_wish_that_is_none_is_an_error(parameters: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=re.escape(next(iter(parameters)))):
        web_render.wishes(parameters)


@pytest.mark.parametrize("name", ["SC_rgb_rle_2frame.dcm", "color3d_jpeg_baseline.dcm", "JPEG2000.dcm"])
def test_a_compressed_frame_is_decoded(name: str) -> None:
    one = scu.read(Path(str(get_testdata_file(name))))
    pixels = Pixels(Reader([one.data], one.transfer_syntax), one.transfer_syntax)
    what = pixels.layout
    frame = b"".join(next(iter(pixels.frames([1])))[1])
    samples, colours = web_render.native(frame, what, one.transfer_syntax)
    assert len(samples) == what.rows * what.columns * what.samples * what.allocated // 8
    content = web_render.draw(samples, what, colours, "image/jpeg", Wishes())
    assert Image.open(io.BytesIO(content)).size == (what.columns, what.rows)


@given(st.binary(min_size=1, max_size=300), st.sampled_from([JPEG, "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"]))
def test_any_bytes_decode_or_are_an_error(content: bytes, syntax: str) -> None:
    what = layout(rows=4, columns=4, allocated=8, stored=8)
    try:
        web_render.native(content, what, syntax)
    except DrawError:
        return
