"""Settings of the patch age: durations, limits and URLs that hold, and an error with its key for each that does not."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest

from storescp import config
from storescp.patch.settings import CLASSES, EXPLAINED, Limit, PatchAge, check, duration


@pytest.mark.parametrize(
    ("text", "meant"),
    [("P3D", timedelta(3)), ("P1W2D", timedelta(9)), ("PT36H", timedelta(1.5)), ("P1DT1H30M", timedelta(1, 5400))],
)
def test_durations_are_read(text: str, meant: timedelta) -> None:
    assert duration(text) == meant


@pytest.mark.parametrize("text", ["", "P", "PT", "3D", "P3", "P-1D", "P1DT", "P1M", "p3d", "P3D ", "P٣D", "P999999D"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        duration(text)


def test_they_are_read_from_a_configuration_and_written_into_one() -> None:
    document = {"critical": {"target": "P1D", "limit": "P2D"}, "index": "https://index.example/simple/"}
    read, errors = config.convert(document, PatchAge, "patch_age.")
    assert (errors, read.critical.limit, read.high) == ([], "P2D", PatchAge().high)
    _, errors = config.convert({"critical": {"target": "P1D", "limits": "P2D"}}, PatchAge, "patch_age.")
    assert errors == ["patch_age.critical.limits: unknown key", "patch_age.critical.limit: missing"]


def test_the_defaults_hold_and_every_setting_is_explained() -> None:
    assert check(PatchAge()) == []
    assert {f"patch_age.{field.name}" for field in msgspec.structs.fields(PatchAge)} | {"patch_age"} == set(EXPLAINED)
    assert set(CLASSES) <= {field.name for field in msgspec.structs.fields(PatchAge)}


def test_an_unknown_severity_is_treated_like_a_critical_one() -> None:
    assert PatchAge().unknown == PatchAge().critical


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("patch_age.high.target", PatchAge(high=Limit(target="7 days", limit="P14D"))),
        ("patch_age.high.target", PatchAge(high=Limit(target="P15D", limit="P14D"))),
        ("patch_age.low.limit", PatchAge(low=Limit(target="P1D", limit="P9999D"))),
        ("patch_age.feed_limit", PatchAge(feed_limit="soon")),
        ("patch_age.index", PatchAge(index="http://index.example/simple/")),
        ("patch_age.index", PatchAge(index="https://user:secret@index.example/simple/")),
        ("patch_age.osv", PatchAge(osv="https://[")),
        ("patch_age.osv", PatchAge(osv="https://osv.example/?a=b")),
        ("patch_age.ecosystems", PatchAge(ecosystems=["Debian:12"])),
        ("patch_age.ecosystems", PatchAge(ecosystems=["../PyPI"])),
        ("patch_age.folder", PatchAge(folder=" ")),
    ],
)
def test_what_does_not_hold_is_told_with_its_key(key: str, settings: PatchAge) -> None:
    errors = check(settings)
    assert [error.partition(":")[0] for error in errors] == [key]
    assert "secret" not in errors[0]
