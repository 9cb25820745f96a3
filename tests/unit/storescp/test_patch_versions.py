"""Versions: Python's order is packaging's, Debian's is dpkg's, and Requires-Python is packaging's."""

from __future__ import annotations

import itertools
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from storescp.patch import versions
from storescp.patch.versions import VersionError

QUICK = settings(deadline=None, derandomize=True, max_examples=300)
PYTHON = st.from_regex(
    r"\Av?([0-9]!)?[0-9]{1,2}(\.[0-9]{1,2}){0,3}([-_.]?(a|b|rc|alpha|beta|pre|c)[-_.]?[0-9]?)?"
    r"(-[0-9]|[-_.]?(post|r)[0-9]?)?([-_.]?dev[0-9]?)?(\+[a-z0-9]{1,3}([-_.][a-z0-9]{1,3})?)?\Z"
)
DEBIAN = [
    *("1.0", "1.0-0", "1.0-1", "1.0~rc1-1", "1.0~~-1", "1.0~", "1.0a", "1.0+b1", "1.0-1+b1", "1.0-1~deb12u1"),
    *(
        "1:0.1",
        "0:1.0",
        "1.0.0",
        "01.0",
        "1.0-1.1",
        "2.9.14+dfsg-1.3~deb12u5",
        "1.00",
        "1.0-1-1",
        "1.0z",
        "1.0Z",
        "1.0.-1",
    ),
]


@QUICK
@given(PYTHON, PYTHON)
def test_python_versions_stand_in_the_order_of_packaging(one: str, other: str) -> None:
    ours, theirs = (versions.python(one), versions.python(other)), (Version(one), Version(other))
    assert (ours[0] < ours[1], ours[0] == ours[1]) == (theirs[0] < theirs[1], theirs[0] == theirs[1])
    assert versions.is_prerelease(ours[0]) == theirs[0].is_prerelease


@QUICK
@given(st.one_of(st.text(max_size=12), PYTHON, st.text(alphabet="01.-_+!adev rcpost", max_size=14)))
def test_a_text_is_a_python_version_where_packaging_takes_it_and_no_other(text: str) -> None:
    try:
        Version(text)
    except InvalidVersion:
        with pytest.raises(VersionError):
            versions.python(text)
    else:
        versions.python(text)


@pytest.mark.needs("dpkg")
def test_debian_versions_stand_in_the_order_of_dpkg() -> None:
    lines = []
    for one, other in itertools.combinations(DEBIAN, 2):
        a, b = versions.debian(one), versions.debian(other)
        relation = "lt" if a < b else "gt" if a > b else "eq"
        lines.append(f"dpkg --compare-versions '{one}' {relation} '{other}' || echo '{one} {relation} {other}'")
    done = subprocess.run(["sh", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


@QUICK
@given(st.text(max_size=20))
def test_any_text_is_a_debian_version_or_the_one_error(text: str) -> None:
    try:
        versions.debian(text)
    except VersionError:
        return
    assert text.isascii()


@pytest.mark.parametrize("python", ["3.9.0", "3.11.2", "3.13.1"])
@pytest.mark.parametrize(
    "requirement",
    [
        "",
        ">=3.9",
        ">=3.10,<4",
        ">=2.7, !=3.0.*, !=3.11.*",
        "==3.11.*",
        "~=3.9",
        "~=3.11.1",
        "<3.11",
        ">3.11.2",
        "!=3.11.2",
    ],
)
def test_requires_python_lets_in_whom_packaging_lets_in(requirement: str, python: str) -> None:
    assert versions.allows(requirement, python) == SpecifierSet(requirement).contains(python)


def test_a_requirement_that_is_not_understood_forbids_nothing() -> None:
    assert versions.allows("python of last week", "3.11.2")
    assert versions.allows(">=later", "3.11.2")


@pytest.mark.parametrize("text", ["9" * 300, "1." * 200 + "1", "1-" + "a" * 300])
def test_a_version_without_end_is_none(text: str) -> None:
    for order in (versions.python, versions.debian):
        with pytest.raises(VersionError):
            order(text)
