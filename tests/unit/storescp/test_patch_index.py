"""A package index's answers: releases with their upload times, and any bytes are one or the one documented error."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storescp.patch import index
from storescp.patch.index import AnswerError

QUICK = settings(deadline=None, derandomize=True, max_examples=200)


def file(name: str, day: int | None = 1, **more: Any) -> dict[str, Any]:
    return (
        {"filename": name, "url": "", "hashes": {}}
        | ({"upload-time": f"2027-01-{day:02}T00:00:00Z"} if day else {})
        | more
    )


def answer(*files: dict[str, Any], name: str = "Planted.One") -> bytes:
    return json.dumps({"meta": {"api-version": "1.1"}, "name": name, "files": files}).encode()


@pytest.mark.parametrize(
    ("filename", "version"),
    [
        ("planted_one-1.0-py3-none-any.whl", "1.0"),
        ("planted_one-1.0-1-py3-none-any.whl", "1.0"),
        ("Planted.One-1.0.post1.tar.gz", "1.0.post1"),
        ("planted-one-1.0-2.zip", "1.0-2"),
        ("planted_one-1.0.tgz", "1.0"),
        ("planted-1.0.tar.gz", ""),
        ("planted_one_more-1.0-py3-none-any.whl", ""),
        ("planted_one-1.0.exe", ""),
        ("planted_one.whl", ""),
    ],
)
def test_the_version_is_in_the_name_of_the_file(filename: str, version: str) -> None:
    assert index.version_of(filename, "planted-one") == version


def test_a_release_is_as_old_as_its_first_file_and_yanked_ones_are_none() -> None:
    found = index.parse(
        answer(
            file("planted_one-2.0.tar.gz", 9),
            file("planted_one-1.0.tar.gz", 5),
            file("planted_one-1.0-py3-none-any.whl", 4),
            file("planted_one-1.0.0-cp311-none-any.whl", None),
            file("planted_one-3.0.tar.gz", 9, yanked=""),
            file("planted_one-4.0.tar.gz", 9, yanked=True),
            file("planted_one-nonsense.tar.gz", 9),
        ),
        "planted-one",
    )
    assert [(r.version, r.uploaded) for r in found.releases] == [
        ("1.0.0", datetime(2027, 1, 4, tzinfo=UTC)),
        ("2.0", datetime(2027, 1, 9, tzinfo=UTC)),
    ]


def test_newer_releases_are_final_ones_unless_this_is_none() -> None:
    found = index.parse(
        answer(*(file(f"planted_one-{v}.tar.gz") for v in ("1.0", "1.1rc1", "1.1", "1.2.dev1"))), "planted-one"
    )
    assert [r.version for r in index.newer(found, "1.0")] == ["1.1"]
    assert [r.version for r in index.newer(found, "1.1rc1")] == ["1.1", "1.2.dev1"]


@pytest.mark.parametrize(
    ("files", "requirement", "usable"),
    [
        (["planted_one-1.0.tar.gz"], "", True),
        (["planted_one-1.0.tar.gz"], ">=3.12", False),
        (["planted_one-1.0-py3-none-any.whl"], "", True),
        (["planted_one-1.0-py2.py3-none-any.whl"], ">=3.9", True),
        (["planted_one-1.0-py2-none-any.whl"], "", False),
        (["planted_one-1.0-cp312-cp312-manylinux_2_17_x86_64.whl"], "", False),
        (["planted_one-1.0-cp312-cp312-manylinux_2_17_x86_64.whl", "planted_one-1.0.zip"], "", True),
        (["planted_one-1.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"], "", True),
        (["planted_one-1.0-cp39-abi3-manylinux_2_34_x86_64.whl"], "", True),
        (["planted_one-1.0-cp312-abi3-manylinux_2_34_x86_64.whl"], "", False),
        (["planted_one-1.0-cp311-cp311-win_amd64.whl"], "", False),
        (["planted_one-1.0-cp310-cp310-linux_x86_64.whl", "planted_one-1.0-cp311-cp311-linux_x86_64.whl"], "", True),
    ],
)
def test_a_release_is_usable_by_its_requirement_and_by_one_of_its_files(
    files: list[str], requirement: str, usable: bool
) -> None:
    found = index.parse(answer(*(file(name, **{"requires-python": requirement}) for name in files)), "planted-one")
    assert index.usable(found.releases[0], "3.11.2") == usable


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        answer(),
        answer(file("planted_one-1.0.tar.gz"), name="other"),
        b"[" * 100_000,
        b'{"name":"planted-one"}',
    ],
)
def test_what_is_no_answer_about_the_package_is_the_one_error(content: bytes) -> None:
    with pytest.raises(AnswerError):
        index.parse(content, "planted-one")


@QUICK
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.fixed_dictionaries(
                {"filename": st.text(alphabet="-p.cy13abinonelux", max_size=30).map(lambda t: f"p-1-{t}.whl")},
                optional={
                    "upload-time": st.text(max_size=25),
                    "yanked": st.booleans() | st.text(max_size=3),
                    "requires-python": st.text(max_size=10),
                },
            )
        ).map(lambda files: json.dumps({"name": "p", "files": files}).encode()),
    )
)
@example(b'{"files":' * 50_000)
def test_any_bytes_are_an_answer_or_the_one_error(content: bytes) -> None:
    try:
        found = index.parse(content, "p")
    except AnswerError:
        return
    assert [r.key for r in found.releases] == sorted(r.key for r in found.releases)
    for release in index.newer(found, "1.0"):
        index.usable(release, "3.11.2")
