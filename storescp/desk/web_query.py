"""QIDO-RS: from a URL's parameters to a query of the index, and from its rows to the DICOM JSON Model. No I/O.

Source: PS3.18 8.3.4 and 10.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from pydicom.datadict import tag_for_keyword

from storage.attributes import is_uid
from storage.matching import QueryError
from storage.query import SUPPORTED, Query, Scope, statement
from storescp.desk.web_dataset import vr_of

STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
RETRIEVE_URL, AVAILABILITY, CHARACTER_SET, TIMEZONE = "00081190", "00080056", "00080005", "00080201"
# More than so many results are several requests.
RESULTS_LIMIT = 10_000
_NAME = re.compile(r"[0-9A-Za-z_.]{1,64}", re.ASCII)
_TAG = re.compile(r"[0-9A-Fa-f]{8}", re.ASCII)
_COUNT = re.compile(r"[0-9]{1,9}", re.ASCII)
# What is returned without being asked for (PS3.18 tables 10.6.3-3 to 10.6.3-5), as far as there is anything to return.
_OF_STUDY = (
    "00080020", "00080030", "00080050", "00080061", "00080090", TIMEZONE, "00100010", "00100020", "00100030",
    "00100040", STUDY, "00200010", "00201206", "00201208",
)  # fmt: skip
_OF_SERIES = ("00080060", "0008103E", SERIES, "00200011", "00201209", "00400244", "00400245")
_OF_INSTANCE = ("00080016", INSTANCE, "00200013", "00280008", "00280010", "00280011", "00280100")
_RETURNED = {"STUDY": _OF_STUDY, "SERIES": _OF_SERIES, "IMAGE": _OF_INSTANCE}
_ABOVE = {"STUDY": (), "SERIES": (STUDY,), "IMAGE": (STUDY, SERIES)}
_NOT_FUZZY = "the fuzzymatching parameter is not supported; only literal matching has been performed"
_OTHERS = ("limit", "offset", "fuzzymatching", "accept", "charset")
_NUMBERS = frozenset({"IS", "US"})
_INTEGER = re.compile(r"[+-]?[0-9]{1,15}", re.ASCII)
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


class ParameterError(ValueError):
    """A URL's parameters are not understood; the message names one, never its value."""


class Search(msgspec.Struct, frozen=True):
    """A search: the query, asking for one result more than is given; what is returned; warnings for the client."""

    query: Query
    returned: list[str]
    most: int
    warnings: list[str]


def search(level: str, path: Mapping[str, str], parameters: Iterable[tuple[str, str]]) -> Search:
    """Return what a URL asks for.

    Args:
        level: STUDY, SERIES or IMAGE.
        path: Tag to UID: what the URL's path names.
        parameters: Names and values of the URL's query, decoded.

    Raises:
        ParameterError: It is not understood.
    """
    supported = SUPPORTED[level]
    for tag, uid in path.items():
        _check_uid(tag, uid)
    match = {tag: [uid] for tag, uid in path.items()}
    included, ignored = list[str](), list[str]()
    others = dict.fromkeys(_OTHERS, "")
    seen = set(path)
    for name, value in parameters:
        if name == "includefield":
            included += _included(value, level)
            continue
        key = name if name in others else _tag(name)
        if key in seen:
            raise ParameterError(f"{name} is given twice, or the path says it")
        seen.add(key)
        if key in others:
            others[key] = value
        elif key not in supported or not supported[key].tested:
            ignored.append(name)
        else:
            match[key] = _values(value, supported[key].vr)
    most = min(_count("limit", others["limit"], RESULTS_LIMIT), RESULTS_LIMIT)
    offset = _count("offset", others["offset"], 0)
    if others["fuzzymatching"] not in {"", "true", "false"}:
        raise ParameterError("fuzzymatching is true or false")
    warnings = [_NOT_FUZZY] if others["fuzzymatching"] == "true" else []
    if ignored:
        warnings.append(f"these keys are not matched here: {', '.join(sorted(ignored))}")
    returned = _returned(level, path, [*match, *included])
    query = Query(level, match, [tag for tag in returned if tag in supported], limit=most + 1, offset=offset)
    try:
        statement(query, Scope())
    except QueryError as error:
        raise ParameterError(str(error)) from None
    return Search(query, returned, most, warnings)


def document(row: Mapping[str, list[str]], asked: Search, base: str) -> dict[str, dict[str, Any]]:
    """Return a result.

    Args:
        row: Tag to values, as the index has them.
        asked: The search.
        base: The service's address; the result's own is made of it.
    """
    known = SUPPORTED[asked.query.level]
    found = {
        tag: _element(known[tag].vr if tag in known else vr_of(int(tag, 16)), row.get(tag, []))
        for tag in asked.returned
        # Without a value it would say something else than nothing.
        if tag != TIMEZONE or row.get(tag)
    }
    found[CHARACTER_SET] = {"vr": "CS", "Value": ["ISO_IR 192"]}
    found[AVAILABILITY] = {"vr": "CS", "Value": ["ONLINE"]}
    found[RETRIEVE_URL] = {"vr": "UR", "Value": [base + address(row)]}
    return dict(sorted(found.items()))


def address(row: Mapping[str, list[str]]) -> str:
    """Return the path of what a row stands for."""
    names = (("studies", STUDY), ("series", SERIES), ("instances", INSTANCE))
    return "".join(f"/{name}/{row[tag][0]}" for name, tag in names if row.get(tag))


def _returned(level: str, path: Mapping[str, str], more: Iterable[str]) -> list[str]:
    tags = [*_RETURNED[level], *_ABOVE[level], *more]
    if level != "STUDY" and STUDY not in path:
        tags += _OF_STUDY
    if level == "IMAGE" and SERIES not in path:
        tags += _OF_SERIES
    return list(dict.fromkeys(tags))


def _check_uid(tag: str, uid: str) -> None:
    if not is_uid(uid):
        raise ParameterError(f"the path's {tag} is no UID")


def _tag(name: str) -> str:
    """Return the tag of an attribute's name: 8 hex digits or its keyword; of a path through sequences as it is."""
    if not _NAME.fullmatch(name):
        raise ParameterError("a parameter's name is no attribute")
    tags = []
    for part in name.split("."):
        if _TAG.fullmatch(part):
            tags.append(part.upper())
        elif (tag := tag_for_keyword(part)) is not None:
            tags.append(f"{tag:08X}")
        else:
            raise ParameterError(f"{name} is no attribute: an attribute is a keyword or a tag of 8 hex digits")
    return ".".join(tags)


def _included(value: str, level: str) -> list[str]:
    """Return which attributes includefield asks for; those that the index has not are left out."""
    found = list[str]()
    for name in value.split(","):
        if name == "all":
            found += SUPPORTED[level]
        elif (tag := _tag(name)) in SUPPORTED[level]:
            found.append(tag)
    return found


def _count(name: str, value: str, otherwise: int) -> int:
    if not value:
        return otherwise
    if not _COUNT.fullmatch(value):
        raise ParameterError(f"{name} is a number, 0 or more")
    return int(value)


def _values(value: str, vr: str) -> list[str]:
    # A list of UIDs has commas here, and backslashes as everywhere in DICOM.
    if vr == "UI":
        return re.split(r"[,\\]", value) if value else []
    return value.split("\\") if value else []


def _element(vr: str, values: list[str]) -> dict[str, Any]:
    given: list[Any] = [value for value in values if value]
    if vr == "PN":
        given = [_name(value) for value in given]
    elif vr in _NUMBERS:
        given = [_number(value) for value in given]
    return {"vr": vr, "Value": given} if given else {"vr": vr}


def _name(value: str) -> dict[str, str]:
    return {group: text for group, text in zip(_GROUPS, value.split("="), strict=False) if text}


def _number(value: str) -> int | str:
    return int(value) if _INTEGER.fullmatch(value) else value
