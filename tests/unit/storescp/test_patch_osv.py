"""OSV exports: what is affected, how bad it is; any bytes are a record or a feed, or the one documented error."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storescp.patch import cvss, osv, versions
from storescp.patch.osv import FeedError

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
NOW = datetime(2027, 1, 10, tzinfo=UTC)


def record(name: str = "planted", *events: dict[str, str], **more: Any) -> dict[str, Any]:
    affected = {"package": {"ecosystem": "PyPI", "name": name}, "ranges": [{"type": "ECOSYSTEM", "events": [*events]}]}
    return {"id": "X-1", "modified": "2027-01-09T00:00:00Z", "affected": [affected]} | more


def export(*records: Any, compression: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for number, content in enumerate(records):
            archive.writestr(f"{number}.json", content if isinstance(content, bytes) else json.dumps(content))
    return made


def read(file: io.BytesIO, *packages: tuple[str, str], repositories: tuple[str, ...] = ()) -> osv.Feed:
    return osv.read(file, "PyPI", packages, repositories, NOW)


@pytest.mark.parametrize(
    ("version", "affected", "fixed"),
    [
        ("0.9", False, ""),
        ("1.0", True, "1.5"),
        ("1.4.9", True, "1.5"),
        ("1.5", False, ""),
        ("2.0", True, "2.1"),
        ("3.0", True, ""),
        ("3.1", False, ""),
    ],
)
def test_events_turn_a_version_affected_and_back(version: str, affected: bool, fixed: str) -> None:
    # Not in order, as some records have them.
    events = [
        {"fixed": "2.1"},
        {"introduced": "1.0"},
        {"introduced": "2.0"},
        {"fixed": "1.5"},
        {"introduced": "3.0"},
        {"last_affected": "3.0"},
    ]
    found = osv.parse(json.dumps(record("planted", *events)).encode())
    assert osv.judge((found.affected or [])[0], version, versions.python) == (affected, fixed)


def test_a_range_from_zero_holds_everything_before_its_fix() -> None:
    found = osv.parse(json.dumps(record("planted", {"introduced": "0"}, {"fixed": "2.0"})).encode())
    assert osv.judge((found.affected or [])[0], "0.0.1.dev1", versions.python).affected
    assert osv.judge((found.affected or [])[0], "2.0", versions.python).affected is False


def test_a_listed_version_is_affected_and_an_event_that_is_no_version_leaves_the_others_undecided() -> None:
    affected = osv.Affected(
        versions=["1.0"], ranges=[osv.Range("ECOSYSTEM", None, [osv.Event(introduced="yesterday")])]
    )
    assert osv.judge(affected, "1.0", versions.python).affected
    assert osv.judge(affected, "1.1", versions.python).affected is None


def test_tags_are_affected_by_the_list_alone_and_without_one_nobody_can_tell() -> None:
    assert osv.judge_tags(osv.Affected(versions=["openssl-3.6.0"]), ["openssl-3.6.0", "3.6.0"]).affected
    assert osv.judge_tags(osv.Affected(versions=["openssl-3.5.0"]), ["openssl-3.6.0"]).affected is False
    assert osv.judge_tags(osv.Affected(), ["openssl-3.6.0"]).affected is None


@pytest.mark.parametrize(
    ("vector", "score", "severity"),
    [
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H", 9.8, "critical"),
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:C/C:H/I:H/A:H", 10.0, "critical"),
        ("CVSS:3.0/AV:N/AC:L/PR:N/UI:R/S:C/C:L/I:L/A:N", 6.1, "medium"),
        ("CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H", 7.8, "high"),
        ("CVSS:3.1/AV:P/AC:H/PR:H/UI:R/S:U/C:L/I:N/A:N", 1.6, "low"),
        ("CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:N/I:N/A:N/E:P", 0.0, "low"),
        ("CVSS:4.0/AV:N/AC:L/AT:N/PR:N/UI:N/VC:H/VI:H/VA:H/SC:N/SI:N/SA:N", None, ""),
        ("CVSS:3.1/AV:X", None, ""),
        ("HIGH", None, ""),
    ],
)
def test_severities_come_from_the_base_score(vector: str, score: float | None, severity: str) -> None:
    assert cvss.base_score(vector) == score
    assert cvss.severity(vector) == severity


@pytest.mark.parametrize(
    ("more", "severity"),
    [
        ({}, "unknown"),
        ({"severity": [{"type": "CVSS_V4", "score": "CVSS:4.0/AV:N"}]}, "unknown"),
        ({"database_specific": {"severity": "MODERATE"}}, "medium"),
        ({"database_specific": {"severity": {"odd": 1}}}, "unknown"),
        (
            {
                "database_specific": {"severity": "LOW"},
                "severity": [{"type": "CVSS_V3", "score": "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"}],
            },
            "critical",
        ),
    ],
)
def test_the_worst_known_severity_counts_and_none_is_unknown(more: dict[str, Any], severity: str) -> None:
    found = osv.parse(json.dumps(record(**more)).encode())
    assert osv.severity(found, (found.affected or [])[0]) == severity


def test_a_feed_has_its_newest_change_as_its_date_and_keeps_what_was_asked_for() -> None:
    file = export(
        record("Planted_One"),
        record("other", modified="2027-01-09T12:00:00Z"),
        record("planted-one", withdrawn="2027-01-01T00:00:00Z"),
        record("late", modified="2099-01-01T00:00:00Z"),
    )
    feed = read(file, ("PyPI", "planted.one"))
    assert (feed.date, feed.records) == (datetime(2027, 1, 9, 12, tzinfo=UTC), 4)
    assert {key: len(found) for key, found in feed.packages.items()} == {("PyPI", "planted-one"): 1}


def test_repositories_are_found_however_their_url_is_spelt() -> None:
    affected = {
        "ranges": [{"type": "GIT", "repo": "https://github.com/OpenSSL/openssl.git", "events": []}],
        "versions": ["openssl-3.6.0"],
    }
    feed = read(
        export({"id": "C-1", "modified": "2027-01-09T00:00:00Z", "affected": [affected]}),
        repositories=("https://github.com/openssl/openssl",),
    )
    assert len(feed.repositories["https://github.com/openssl/openssl"]) == 1


@pytest.mark.parametrize(
    "file",
    [
        io.BytesIO(b""),
        io.BytesIO(b"PK\x05\x06" + bytes(18)),
        export(),
        export(b"{}"),
        export(record(), b"[" * 100_000),
        export(record(modified="yesterday")),
        export(record(modified="2099-01-01T00:00:00Z")),
        export(record(), compression=zipfile.ZIP_LZMA),
        io.BytesIO(export(record(), record()).getvalue()[:-60]),
    ],
)
def test_what_is_no_export_is_the_one_error(file: io.BytesIO) -> None:
    with pytest.raises(FeedError):
        read(file, ("PyPI", "planted"))


def test_a_damaged_record_is_noticed_by_its_checksum() -> None:
    content = bytearray(export(record(), compression=zipfile.ZIP_STORED).getvalue())
    content[content.index(b"planted")] ^= 1
    with pytest.raises(FeedError):
        read(io.BytesIO(content), ("PyPI", "planted"))


def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osv, "ENTRY_BYTES", 1 << 16)
    with pytest.raises(FeedError, match="larger than"):
        read(export(b" " * (1 << 17)))
    # The same, where the entry's own table says that it is small.
    liar = export(b" " * (1 << 17)).getvalue()
    real = struct.pack("<L", 1 << 17)
    with pytest.raises(FeedError):
        read(io.BytesIO(liar.replace(real, struct.pack("<L", 100))))
    monkeypatch.setattr(osv, "TOTAL_BYTES", 1 << 10)
    with pytest.raises(FeedError, match="unpacks to more"):
        read(export(*[record(details="x" * 300)] * 9))
    monkeypatch.setattr(osv, "CENTRAL_BYTES", 100)
    with pytest.raises(FeedError, match="table of contents"):
        read(export(record(), record(), record()))


@pytest.mark.parametrize("at", [0xFFFFFFFF, 200])
def test_a_large_table_of_contents_is_refused_also_in_the_newer_form(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(osv, "CENTRAL_BYTES", 1000)
    end = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 1, 1, 5000, 0)
    end += b"PK\x06\x07" + struct.pack("<LQL", 0, at, 1)
    end += b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(FeedError, match="table of contents"):
        read(io.BytesIO(bytes(5000) + end))


@QUICK
@given(
    st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers(),
            lambda v: (
                st.lists(v, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["id", "modified", "affected", "ranges", "events", "package"]), v, max_size=4
                )
            ),
        ).map(lambda v: json.dumps(v).encode()),
    )
)
@example(b"[" * 100_000)
@example(b'{"id":' * 50_000)
def test_any_bytes_are_a_record_or_the_one_error(content: bytes) -> None:
    try:
        found = osv.parse(content)
    except FeedError:
        return
    for affected in found.affected or ():
        osv.judge(affected, "1.0", versions.python)
        assert osv.severity(found, affected) in {"critical", "high", "medium", "low", "unknown"}


@QUICK
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_any_bytes_are_a_feed_or_the_one_error(content: bytes, at: int, value: int) -> None:
    good = bytearray(export(record("planted", {"introduced": "0"})).getvalue())
    good[at % len(good)] = value
    for data in (content, bytes(good), content + bytes(good), bytes(good) + content):
        try:
            feed = read(io.BytesIO(data), ("PyPI", "planted"))
        except FeedError:
            continue
        assert feed.date <= NOW + timedelta(days=1)
