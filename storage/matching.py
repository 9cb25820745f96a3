"""From a key's values to an SQL test, by DICOM's matching rules; which attribute is asked for makes no difference here.

Source: PS3.4 C.2.2.2 (PS3.18 8.3.4.1 uses the same), PS3.5 6.2 for what values look like. What those leave open:

- Several values of another key than a UID match what any of them matches (C.2.2.2.8 without its negotiation).
- A time stands for every moment that its digits begin, ``1030`` for a minute, at the ends of a range too.
- Names are compared without case, compatibility forms and trailing delimiters, in any component group; a family name
  finds all with others behind it. In a key with ``=`` each group that is given must match the name's in its place.
- Spaces around a value mean nothing. What is held and is no date, time or number matches universal matching alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec

from storage.attributes import is_uid
from storage.search import fold, glob

# A name has three groups of 64 characters at most, and each value but a UID is a test of its own of every row.
TEXT_LIMIT = 1024
VALUES_LIMIT = 64
_GROUPS = ("alphabetic", "ideographic", "phonetic")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DAY = re.compile(r"[0-9]{8}", re.ASCII)
_TIME = re.compile(r"([01][0-9]|2[0-3])([0-5][0-9](([0-5][0-9]|60)(\.[0-9]{1,6})?)?)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?[0-9]{1,11}", re.ASCII)
_IS_DAY = "{0} GLOB '" + "[0-9]" * 8 + "'"
# Twelve digits, those not said are zero: the first moment that a time can mean.
_MOMENT = "substr(replace({0}, '.', '') || '000000000000', 1, 12)"
_IS_TIME = "{0} GLOB '[0-9][0-9]*' AND {0} NOT GLOB '*[^0-9.]*'"
_IS_NUMBER = "{0} GLOB '*[0-9]' AND {0} NOT GLOB '*[^0-9+-]*' AND {0} NOT GLOB '?*[+-]*'"


class QueryError(ValueError):
    """A query is not understood; the message names tag and rule, never a value."""


class Parameters(list[str | int]):
    """The values of a statement; called with another one, it returns what stands for that in the SQL."""

    def __call__(self, value: str | int) -> str:
        """Take a value, unless it is there; return its mark."""
        if value not in self:
            self.append(value)
        return f"?{self.index(value) + 1}"


def is_one_of(column: str, values: Sequence[str], take: Parameters) -> str:
    """Return the test that a column is one of some values, of which there can be thousands."""
    if len(values) > VALUES_LIMIT:
        return f"{column} IN (SELECT value FROM json_each({take(msgspec.json.encode(values).decode())}))"  # noqa: S608
    return f"{column} IN ({', '.join(take(value) for value in values)})"


def condition(tag: str, vr: str, column: str, values: Sequence[str], take: Parameters) -> str:
    """Return the SQL test of a key, empty for universal matching.

    Args:
        tag: The key's, for messages.
        vr: Its value representation: UI, DA, TM, IS, US, PN or one of text.
        column: What is tested; of names, what the columns of its component groups begin with.
        values: Unicode text; empty ones are none.
        take: Takes the values that the test is made with.

    Raises:
        QueryError: A value breaks a rule.
    """
    try:
        given = [text for value in values if (text := _text(value))]
        if vr == "UI":
            if not all(map(is_uid, given)):
                raise QueryError("a UID has digits and dots; wildcards are not for UIDs")
            return is_one_of(column, given, take) if given else ""
        if len(given) > VALUES_LIMIT:
            raise QueryError(f"a key that is no UID has at most {VALUES_LIMIT} values")
        tests = [_RULES.get(vr, _of_text)(column, value, take) for value in given]
    except QueryError as error:
        raise QueryError(f"key {tag}: {error}") from None
    # What matches everything is no test, whatever stands beside it.
    return "" if "" in tests else _any(tests)


def _any(tests: list[str]) -> str:
    return f"({' OR '.join(tests)})" if len(tests) > 1 else "".join(tests)


def _text(value: str) -> str:
    text = value.strip("\0 ")
    if len(text) > TEXT_LIMIT:
        raise QueryError(f"a value has at most {TEXT_LIMIT} characters")
    if _CONTROL.search(text):
        raise QueryError("a value holds no control characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise QueryError("a value is no text") from None
    return text


def _of_text(column: str, text: str, take: Parameters) -> str:
    if not text.strip("*"):
        return ""
    if "*" in text or "?" in text:
        # '+': by an index of this column all that begins alike would be sorted before the first row.
        return f"+{column.removeprefix('+')} GLOB {take(glob(text))}"
    return f"{column} = {take(text)}"


def _of_name(column: str, text: str, take: Parameters) -> str:
    columns = [f"{column}_{group}" for group in _GROUPS]
    groups = text.split("=")
    if len(groups) == 1:
        tests = [_of_group(column, text, take) for column in columns]
        return "" if "" in tests else _any(tests)
    if len(groups) > len(columns):
        raise QueryError("a name has at most three component groups")
    return " AND ".join(
        found for column, group in zip(columns, groups, strict=False) if (found := _of_group(column, group, take))
    )


def _of_group(column: str, text: str, take: Parameters) -> str:
    folded = fold(text.strip(" "))
    if "*" in folded or "?" in folded or not folded:
        found = _of_text(column, folded, take)
    else:
        found = f"{column} = {take(folded)}"
    if not found or "^" in text + folded or "*" in folded:
        return found
    return f"({found} OR +{column} GLOB {take(glob(folded) + '^*')})"


def _of_day(column: str, text: str, take: Parameters) -> str:
    first, last = _ends(text, _DAY, "a date is 20260131, a range 20260101-20260131, 20260101- or -20260131")
    if first == last:
        return f"{column} = {take(first)}"
    bounds = f"BETWEEN {take(first or '00000000')} AND {take(last or '99999999')}"
    return f"({column} {bounds} AND {_IS_DAY.format(column)})"


def _of_time(column: str, text: str, take: Parameters) -> str:
    first, last = (t.replace(".", "") for t in _ends(text, _TIME, "a time is HHMMSS.FFFFFF or less, a range HHMM-HHMM"))
    low, high = first.ljust(12, "0"), last.ljust(12, "9")
    between = f"{_MOMENT.format(column)} BETWEEN {take(low)} AND {take(high)}"
    return f"({_IS_TIME.format(column)} AND {between})"


def _of_number(column: str, text: str, take: Parameters) -> str:
    if not _NUMBER.fullmatch(text):
        raise QueryError("a number is digits with or without a sign; wildcards and ranges are not for numbers")
    return f"({_IS_NUMBER.format(column)} AND CAST({column} AS INTEGER) = {take(int(text))})"


def _ends(text: str, form: re.Pattern[str], rule: str) -> tuple[str, str]:
    first, dash, last = (part.strip(" ") for part in text.partition("-"))
    if not dash:
        last = first
    if not (first or last) or not all(form.fullmatch(end) for end in (first, last) if end):
        raise QueryError(rule)
    return first, last


_RULES: dict[str, Callable[[str, str, Parameters], str]] = {
    "PN": _of_name, "DA": _of_day, "TM": _of_time, "IS": _of_number, "US": _of_number,
}  # fmt: skip
