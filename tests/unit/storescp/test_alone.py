"""One process of a kind holds its folder; what the process does itself is not taken for another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from storescp.errands.alone import alone
from storescp.errors import StrongroomError


def test_a_second_one_is_refused_and_after_the_first_has_ended_not(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "own"
    with (
        alone(folder, "sends the alerts"),
        pytest.raises(StrongroomError, match=f"another process sends the alerts in {folder}"),
        alone(folder, "sends the alerts"),
    ):
        pass
    with alone(folder, "sends the alerts"):
        pass


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_that_is_made_has_the_mode_and_one_that_is_there_keeps_its_own(tmp_path: Path, mode: int) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o750)
    for folder, expected in ((there, 0o750), (tmp_path / "new", mode)):
        with alone(folder, "works", mode):
            assert folder.stat().st_mode & 0o777 == expected


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StrongroomError, match="file/own cannot be used: Not a directory"),
        alone(tmp_path / "file" / "own", "works"),
    ):
        pass


def test_what_blocks_inside_is_not_taken_for_another_process(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), alone(tmp_path, "works"):
        raise BlockingIOError
