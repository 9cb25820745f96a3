"""The order of versions: Python's (PEP 440) and Debian's (policy 5.6.12), exact, without a library for either.

``packaging`` and ``dpkg --compare-versions`` are what the tests compare these with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# Keys compare among keys of their own kind only.
Key = tuple[Any, ...]
Order = Callable[[str], Key]

_LONGEST = 256
_PYTHON = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<stage>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<stage_number>\d+)?)?"
    r"(?P<post>-(?P<post_bare>\d+)|[-_.]?(?:post|rev|r)[-_.]?(?P<post_number>\d+)?)?"
    r"(?P<dev>[-_.]?dev[-_.]?(?P<dev_number>\d+)?)?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?",
    re.ASCII | re.IGNORECASE,
)
_STAGES = {"a": 0, "alpha": 0, "b": 1, "beta": 1, "c": 2, "rc": 2, "pre": 2, "preview": 2}
_DEBIAN = re.compile(r"(?:(\d+):)?([A-Za-z0-9.+~:-]+?)(?:-([A-Za-z0-9.+~]+))?", re.ASCII)
_DEBIAN_PAIR = re.compile(r"(\D*)(\d*)", re.ASCII)
_END = ((0,), 0)
_CLAUSE = re.compile(r"(~=|==|!=|<=|>=|<|>)\s*([^\s,]+)", re.ASCII)


class VersionError(ValueError):
    """A text is no version of its kind."""


def normalized(name: str) -> str:
    """Return a Python package's name as indexes and advisories write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def python(text: str) -> Key:
    """Return the key that puts a version in PEP 440's order.

    Raises:
        VersionError: It is no such version.
    """
    found = _PYTHON.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if found is None:
        raise VersionError(f"no Python version: {text[:64]}")
    release = [int(part) for part in found["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    stage: tuple[int, ...] = (1,)
    if found["stage"]:
        stage = (0, _STAGES[found["stage"].lower()], int(found["stage_number"] or 0))
    elif found["dev"] and not found["post"]:
        # 1.0.dev1 comes before 1.0a1.
        stage = (-1,)
    post = int(found["post_bare"] or found["post_number"] or 0) if found["post"] else -1
    dev = (0, int(found["dev_number"] or 0)) if found["dev"] else (1, 0)
    local = re.split(r"[-_.]", found["local"].lower()) if found["local"] else []
    parts = tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in local)
    return (int(found["epoch"] or 0), tuple(release), stage, post, dev, parts)


def is_prerelease(key: Key) -> bool:
    """Tell whether a key of :func:`python` is an alpha, beta, candidate or development release."""
    return bool(key[2] != (1,) or key[4][0] == 0)


def debian(text: str) -> Key:
    """Return the key that puts a version in Debian's order.

    Raises:
        VersionError: It is no such version.
    """
    found = _DEBIAN.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise VersionError(f"no Debian version: {text[:64]}")
    return (int(found[1] or 0), _debian_part(found[2]), _debian_part(found[3] or ""))


def allows(requirement: str, version: str) -> bool:
    """Tell whether ``Requires-Python`` lets a Python in; one that is not understood forbids nothing.

    Args:
        requirement: Clauses as in ``>=3.9,<4,!=3.10.*``.
        version: A final release, as in 3.11.2.
    """
    return all(_clause(operator, bound, version) for operator, bound in _CLAUSE.findall(requirement))


def _clause(operator: str, bound: str, version: str) -> bool:
    try:
        if operator in {"==", "!="} and bound.endswith(".*"):
            return _begins(version, bound.removesuffix(".*")) == (operator == "==")
        ours, theirs = python(version), python(bound)
    except VersionError:
        return True
    match operator:
        case "==":
            return ours == theirs
        case "!=":
            return ours != theirs
        case "<=":
            return ours <= theirs
        case ">=":
            return ours >= theirs
        case "<":
            return ours < theirs
        case ">":
            return ours > theirs
    # ~=3.9 is >=3.9,==3.*
    return ours >= theirs and _begins(version, bound.rpartition(".")[0] or bound)


def _begins(version: str, prefix: str) -> bool:
    wanted = [int(part) for part in prefix.split(".") if part.isdigit()]
    have = [int(part) for part in version.split(".") if part.isdigit()]
    return [*have, *[0] * len(wanted)][: len(wanted)] == wanted


def _debian_part(text: str) -> Key:
    pairs: list[tuple[tuple[int, ...], int]] = []
    for letters, digits in _DEBIAN_PAIR.findall(text):
        if letters or digits:
            # A tilde comes before the end, letters before everything else.
            orders = (-1 if c == "~" else ord(c) if c.isalpha() else ord(c) + 256 for c in letters)
            pairs.append(((*orders, 0), int(digits or 0)))
    while pairs and pairs[-1] == _END:
        pairs.pop()
    return (*pairs, _END)
