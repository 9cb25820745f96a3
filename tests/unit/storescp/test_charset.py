"""Text is decoded strictly whatever pydicom is set to: as pydicom does it where it is strict, or an error."""

from __future__ import annotations

import pydicom
import pydicom.charset
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.attributes import Received
from storescp.gate import charset
from storescp.gate.describe import Describer
from storescp.gate.transfer import ENCODINGS

EXPLICIT = ENCODINGS["1.2.840.10008.1.2.1"]
SETS = sorted(set(pydicom.charset.python_encoding.values()))
OF_TEXT = {ord(c) for c in "\n\r\t\f"}
PIECES = [*pydicom.charset.CODES_TO_ENCODINGS, b"\x1b", b"\x1b$", b"\x1bXY", b"^", b"\n", b"Doe", "ü".encode(), b"\xfc"]


@given(
    st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)), max_size=8).map(b"".join),
    st.lists(st.sampled_from(SETS), min_size=1, max_size=3),
    st.booleans(),
)
@example(b"\x1b", ["ascii"], True)
@example(b"\x1b$", ["ascii"], True)
@example(b"Doe\x1b$BAB\x1b(B^x", ["ascii", "iso2022_jp"], True)
@example(b"\x1b$)C\xb1\xe8^\xb1\xe8", ["ascii", "euc_kr"], False)
def test_it_is_what_pydicom_makes_of_it_where_it_is_strict(raw: bytes, encodings: list[str], is_name: bool) -> None:
    delimiters = OF_TEXT | {ord("^")} if is_name else OF_TEXT
    assert pydicom.config.settings.reading_validation_mode == pydicom.config.RAISE
    try:
        expected = pydicom.charset.decode_bytes(raw, encodings, delimiters)
    except (UnicodeError, ValueError):
        with pytest.raises(UnicodeError):
            charset.decode(raw, encodings, is_name=is_name)
        return
    assert charset.decode(raw, encodings, is_name=is_name) == expected


@pytest.mark.usefixtures("lenient_pydicom")
@pytest.mark.parametrize(
    ("names", "raw"),
    [
        (b"", b"M\xfcller^Jane"),
        (b"ISO_IR 192", b"M\xfcller"),
        (b"ISO 2022 IR 6\\ISO 2022 IR 87", b"Doe\x1b$(QAB"),
        (b"\\ISO 2022 IR 87", b"Doe^\x1b$B\xff\xff"),
        (b"ISO_IR 999", b"Doe"),
    ],
)
def test_what_does_not_decode_is_kept_as_bytes_in_a_process_that_reads_leniently_too(names: bytes, raw: bytes) -> None:
    assert pydicom.config.settings.reading_validation_mode == pydicom.config.IGNORE
    values = {0x00080005: ("CS", names), 0x00100010: ("PN", raw), 0x00100020: ("LO", raw)}
    found = Describer().describe(values, EXPLICIT, "1.2.840.10008.1.2.1", Received("", "", "", "", "", ""))
    assert {tag: found.undecoded[tag].raw for tag in ("00100010", "00100020")} == dict.fromkeys(
        ("00100010", "00100020"), raw
    )
    assert not {"00100010", "00100020"} & set(found.dataset)
