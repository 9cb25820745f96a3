"""``[patch_age]``: how soon a fix is to be applied, and where the evidence comes from."""

from __future__ import annotations

import re
from datetime import timedelta
from urllib.parse import urlsplit

import msgspec

# From the worst to the least; "unknown" is as bad as anything may be, and "update" is a release no advisory names.
SEVERITIES = ("critical", "high", "medium", "low")
CLASSES = (*SEVERITIES, "unknown", "update")
_DURATION = re.compile(r"P(?=.)(?:(\d{1,4})W)?(?:(\d{1,5})D)?(?:T(?=.)(?:(\d{1,5})H)?(?:(\d{1,5})M)?)?", re.ASCII)
_ECOSYSTEM = re.compile(r"[A-Za-z][A-Za-z0-9. -]{0,63}", re.ASCII)
_LONGEST = timedelta(days=3650)


class Limit(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When a fix should be applied, and when it must be: ISO 8601 durations."""

    target: str
    limit: str


def _limit(target: str, limit: str) -> Limit:
    value: Limit = msgspec.field(default_factory=lambda: Limit(target=target, limit=limit))
    return value


class PatchAge(msgspec.Struct, kw_only=True):
    """How old an unapplied fix may be, and what is asked about it."""

    folder: str = "patch"
    critical: Limit = _limit("P3D", "P7D")
    high: Limit = _limit("P7D", "P14D")
    medium: Limit = _limit("P30D", "P60D")
    low: Limit = _limit("P90D", "P180D")
    unknown: Limit = _limit("P3D", "P7D")
    update: Limit = _limit("P90D", "P365D")
    feed_limit: str = "P7D"
    window_limit: str = "P14D"
    index: str = ""
    osv: str = "https://osv-vulnerabilities.storage.googleapis.com/"
    ecosystems: list[str] = msgspec.field(default_factory=lambda: ["PyPI", "Debian", "GIT"])


# An empty place of exports names none.
_NAMED_ELSEWHERE = {"index": "", "osv": "-"}

EXPLAINED = {
    "patch_age": "How old an unapplied fix may be: 'strongroom patch report' (docs/patch-age.md). Durations are\n"
    "ISO 8601: P3D is three days, PT12H twelve hours.",
    "patch_age.folder": "What 'strongroom patch fetch' and 'patch import' bring, and what the report remembers.\n"
    "Public data, no secrets; kept apart from the store.",
    "patch_age.critical": "Fixes of critical severity: from target on the report says 'due', beyond limit 'breach'.",
    "patch_age.high": "Fixes of high severity.",
    "patch_age.medium": "Fixes of medium severity.",
    "patch_age.low": "Fixes of low severity.",
    "patch_age.unknown": "Fixes whose severity no source tells; treated like critical ones unless set otherwise here.",
    "patch_age.update": "Newer releases that no known vulnerability asks for.",
    "patch_age.feed_limit": "Evidence older than this proves nothing: what hangs on it reads 'unknown'.",
    "patch_age.window_limit": "How long beyond its limit an announced window ('patch window') may hold a breach back.",
    "patch_age.index": "The package index that 'patch fetch' asks for upload times; empty: the one of pip.",
    "patch_age.osv": "Where 'patch fetch' gets the exports of OSV, '<this>/PyPI/all.zip' and so on.",
    "patch_age.ecosystems": "The exports that are fetched and read. PyPI: Python packages. Debian: Debian packages.\n"
    "GIT: what is bundled as C code (OpenSSL, CPython); large.",
}


def duration(text: str) -> timedelta:
    """Return an ISO 8601 duration of weeks, days, hours and minutes, ``P3D`` or ``PT12H``.

    Raises:
        ValueError: It is none.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError("no duration, as in P3D or PT12H")
    weeks, days, hours, minutes = (int(part or 0) for part in found.groups())
    return timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes)


def check(settings: PatchAge) -> list[str]:
    """Return what is wrong with the settings, each error with its key."""
    errors = []
    for name in CLASSES:
        both: Limit = getattr(settings, name)
        found = _durations({f"patch_age.{name}.target": both.target, f"patch_age.{name}.limit": both.limit})
        errors += found
        if not found and duration(both.target) > duration(both.limit):
            errors.append(f"patch_age.{name}.target: is longer than the limit")
    errors += _durations({"patch_age.feed_limit": settings.feed_limit, "patch_age.window_limit": settings.window_limit})
    errors += [
        f"patch_age.{name}: {problem}"
        for name in ("index", "osv")
        if (url := getattr(settings, name) or _NAMED_ELSEWHERE[name]) and (problem := url_problem(url))
    ]
    errors += [
        f"patch_age.ecosystems: '{name}' is no name of an export, as in PyPI or Debian (without ':12')"
        for name in settings.ecosystems
        if not is_ecosystem(name)
    ]
    if not settings.folder.strip():
        errors.append("patch_age.folder: names no folder")
    return errors


def url_problem(url: str) -> str:
    """Return why a URL cannot be fetched from, or nothing."""
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
        parts.port  # noqa: B018  (it is parsed when it is asked for)
    except ValueError:
        return f"'{url}' is no URL"
    if user is not None:
        return "a URL here holds no user name or password"
    if parts.scheme != "https" or not host or parts.query or parts.fragment:
        return f"'{url}' is no URL that begins with https:// and ends with a path"
    return ""


def is_ecosystem(name: str) -> bool:
    """Tell whether a text can be the name of an export: it becomes part of a URL and of a file name."""
    return _ECOSYSTEM.fullmatch(name) is not None


def _durations(values: dict[str, str]) -> list[str]:
    errors = []
    for key, text in values.items():
        try:
            if duration(text) > _LONGEST:
                errors.append(f"{key}: must be at most P3650D")
        except ValueError:
            errors.append(f"{key}: '{text}' is no duration, as in P3D or PT12H")
    return errors
