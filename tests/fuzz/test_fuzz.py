"""Parsers keep their promises for any bytes: a short fuzz run each time, and proof that it finds what is broken.

``make fuzz`` runs as long as wanted. What it finds goes into FOUND, as small as it can be made.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import run as runner
import seeds
import targets

from keys import keyring, slots, versions
from storage import attributes, pack
from storescp import config, peers
from storescp.gate import dimse, negotiate

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None and not os.environ.get("STRONGROOM_NO_SKIP"),
    reason="NOT TESTED: atheris is not installed",
)
RUNS = 1500


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the runner; the same run each time."""
    command = [sys.executable, str(Path(targets.__file__).with_name("run.py")), *arguments]
    return subprocess.run(
        [*command, "--corpus", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )


@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_promise_is_kept_for_its_seeds(name: str) -> None:
    found = seeds.seeds(name)
    assert len(found) > 1
    assert found == seeds.seeds(name)
    for seed in found:
        targets.give(name, seed)


def read_as_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def parse(content: bytes) -> object:
        with targets._file(content) as path:
            return read(path)

    return parse


def some(value: object) -> object:
    """Return a value that is not empty."""
    if not value:
        raise ValueError("nothing was accepted")
    return value


@pytest.mark.parametrize(
    ("name", "parse", "accepted"),
    [
        ("wire", lambda b: some(targets._events([b], targets.MAXIMUM_PDU)[0]), 5),
        ("dimse", dimse.decode, 4),
        ("negotiate", negotiate.decode, 3),
        *((f"head-{kind}", lambda b, k=kind: some(targets.accepted_head(b, k)), 4) for kind in ("explicit", "big")),
        ("association", lambda b: some(targets._associated([b])[2]), 4),
        ("describe", lambda b: some(targets.raw_values(b)), 25),
        ("attributes", attributes.decode, 30),
        ("pack", lambda b: pack.parse_header(b[: pack.PAGE]), 2),
        ("deposit-key", lambda b: versions.read_deposit_key(b, targets.vectors()[0].header.signing_key), 1),
        ("keyring", keyring.parse, 1),
        ("key-file", slots.parse_key_file, 1),
        ("peers", read_as_file(peers.read), 2),
        ("config", read_as_file(config.load), 2),
        ("control", lambda b: some(targets._served([b])[0]), 6),
    ],
)
def test_fuzzing_begins_with_inputs_that_are_accepted(
    name: str, parse: Callable[[bytes], object], accepted: int
) -> None:
    taken = 0
    for seed in seeds.seeds(name):
        try:
            parse(seed)
            taken += 1
        except Exception as error:
            assert not isinstance(error, AttributeError | TypeError)
    assert taken >= accepted


def test_a_pack_among_the_seeds_opens_whole() -> None:
    content, key = targets.vectors()[1:]
    with targets._file(content) as path, targets.PackFile(path) as file:
        found = list(targets.OpenedPack(file, bytearray(key)).records())
    assert [type(record) for record in found] == [targets.Record] * 2


@pytest.mark.parametrize("length", [0, 1, 2, 199, 200, 201, 5000])
def test_an_input_is_cut_without_losing_a_byte_and_always_alike(length: int) -> None:
    data = bytes(i % 251 for i in range(length))
    ways = list(targets.divisions(data))
    assert all(b"".join(parts) == data for parts in ways)
    assert ways == list(targets.divisions(data))
    assert length > 200 or [p for p in ways[0] if len(p) != 1] == []


def test_a_warning_is_a_broken_promise_that_no_handler_hides() -> None:
    with pytest.raises(targets.SaidAloudError, match="a peer's text"), targets.silence():
        try:
            warnings.warn("a peer's text", stacklevel=1)
        except Exception:
            pytest.fail("hidden")


@needs_atheris
@pytest.mark.timeout(400)
def test_a_short_run_breaks_no_promise(tmp_path: Path) -> None:
    done = run(tmp_path, "all", "--runs", str(RUNS), "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\S+) +([\d,]+) runs +(\d+) edges +[\d.]+ s  ok$", done.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == list(targets.TARGETS)
    assert {int(line[1].replace(",", "")) for line in lines} == {RUNS}


@needs_atheris
@pytest.mark.timeout(240)
def test_a_broken_promise_is_found_kept_and_told_with_what_repeats_it(tmp_path: Path) -> None:
    done = run(tmp_path, "planted-error", "--runs", "100000", "--seed", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    (found,) = (tmp_path / "planted-error").glob("crash-*")
    assert f"--replay {found}" in done.stdout
    assert "ValueError: planted" in (tmp_path / "planted-error" / "log").read_text()
    again = run(tmp_path, "planted-error", "--replay", str(found))
    assert again.returncode == 1
    assert "ValueError: planted" in again.stderr


@needs_atheris
@pytest.mark.timeout(240)
def test_a_run_that_never_ends_is_found(tmp_path: Path) -> None:
    done = run(tmp_path, "planted-hang", "--runs", "100000", "--seed", "1", "--timeout", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    # As a crash where the alarm came between two steps of the interpreter.
    found = [p for kind in ("timeout", "crash") for p in (tmp_path / "planted-hang").glob(f"{kind}-*")]
    assert len(found) == 1, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("log", "failed"),
    [
        ("#99 DONE   cov: 45 ft: 9\nstat::number_of_executed_units: 99\n", False),
        ("#99 DONE   cov: 0 ft: 0\nstat::number_of_executed_units: 99\n", True),
        ("#99 DONE   cov: 45 ft: 9\nstat::number_of_executed_units: 0\n", True),
        ("", True),
    ],
    ids=["a run", "nothing traced", "nothing run", "nothing said"],
)
def test_a_run_of_nothing_is_no_success(
    log: str, failed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text(log)
    assert runner._told("wire", tmp_path, 0, 0) is failed
    assert ("DID NOT RUN" in capsys.readouterr().out) is failed


@needs_atheris
def test_a_target_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, "no-such-target", "--runs", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no-such-target" in done.stderr


BODY = b"POST / HTTP/1.1\r\nHost: v\r\nContent-Length: %d\r\n\r\n%b"
# Target and input of what fuzzing has found.
FOUND = [
    # An association request that ends within its AE titles was decoded, with titles of fewer than 16 bytes.
    ("negotiate", b"\x01\0\0\0\0\x19" + b"\0\x01\0\0" + b"STRONGROOM      " + b"CT1  "),
    # A request's body that is no UTF-8, or nests too deep, was an error of the vault's own, with a trace in its log.
    ("control", BODY % (9, b'{"a":"\xc9"}')),
    ("control", BODY % (6 + len(seeds.DEEP), b'{"a":%b}' % seeds.DEEP)),
    # A worker of the gate could end the gate's first process with a message that is no UTF-8.
    ("channel", b'{"kind":"\xc9"}'),
]


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_fuzzing_has_found_stays_mended(name: str, data: bytes) -> None:
    targets.give(name, data)
