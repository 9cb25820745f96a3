"""The command line's contract: help with examples, exit statuses, JSON, filters, messages that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from conftest import Server, send
from pydicom.data import get_testdata_file

from storescp.cli import strongroom

ROOT = Path(__file__).parent.parent
CT = Path(str(get_testdata_file("CT_small.dcm")))


def _commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, (*words, name))
        else:
            yield (*words, name), command


ALL = dict(_commands(strongroom))


@pytest.mark.parametrize("words", ALL)
def test_every_command_has_help_with_an_example_that_names_it(words: tuple[str, ...]) -> None:
    text = ALL[words].help or ""
    assert "$ strongroom" in text or "| strongroom" in text, words
    assert any(word in text for word in (" ".join(words),)), words


@pytest.mark.parametrize("words", ALL)
def test_every_command_stands_in_the_docs(words: tuple[str, ...]) -> None:
    docs = "".join(p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
    assert f"strongroom {' '.join(words)}" in docs


def test_the_commands_of_the_help_are_those_that_exist() -> None:
    done = subprocess.run([sys.executable, "-m", "storescp", "--help"], capture_output=True, text=True, check=True)
    assert all(words[0] in done.stdout for words in ALL)


def test_without_a_configuration_the_message_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "storescp", "list"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "strongroom: error: no configuration" in done.stderr
    assert "strongroom: hint:" in done.stderr


def test_all_errors_of_a_configuration_are_told_at_once(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.config.write_text('[store]\npath = 3\n[gate]\nlisten = "x"\ncolour = "red"\n')
    done = server.run("serve")
    assert done.status == 2
    for key in ("store.path", "store.anchors", "store.signing_key", "gate.listen", "gate.colour: unknown key"):
        assert f"{server.config}: {key}" in done.err


def test_a_weak_passphrase_is_refused_with_the_reason(make_server: Callable[..., Server]) -> None:
    server = make_server()
    for text, reason in (("short", "at least 12"), ("password1234", "too weak"), ("aaaaaaaaaaaaaaaa", "too weak")):
        file = server.home / "p"
        file.write_text(text)
        done = server.run("init", "--passphrase-file", file)
        assert done.status == 1
        assert reason in done.err
        assert text not in done.err
        assert not server.config.exists()


def test_status_says_one_failure_from_total_loss(server: Server) -> None:
    assert "ONE FAILURE FROM TOTAL LOSS" in server.ok("status").out
    assert any("ONE FAILURE FROM TOTAL LOSS" in line for line in server.log)


def test_filters_find_by_each_attribute_and_can_come_on_standard_input(server: Server) -> None:
    assert send(server, [CT, Path(str(get_testdata_file("MR_small.dcm")))]) == [0, 0]
    for option, value in {
        "--patient-id": "1CT1",
        "--patient-name": "compressedsamples^ct1",
        "--study-date": "20040119",
        "--modality": "CT",
        "--accession": "",
        "--aet": "CT1",
        "--study": "1.3.6.1.4.1.5962.1.2.1.*",
        "--sop": "1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322",
    }.items():
        for level in ("study", "series", "instance"):
            rows = server.list(level, option, value)
            assert len(rows) == (2 if option in {"--aet", "--accession"} else 1), (option, level)
    done = server.ok("list", "--filter", "-", "--uids", stdin="patient-name=COMP*\nmodality=CT\n")
    assert done.out.split() == ["1.3.6.1.4.1.5962.1.2.1.20040119072730.12322"]
    assert server.run("list", "--patient-id", "nobody").status == 5
    assert server.run("list", "--study-date", "yesterday").status == 1
    assert server.run("list", "--filter", "-", stdin="what is this").status == 2
    assert server.run("export", "--study", "1.2.3", "--to", server.home / "out").status == 5
    one = server.home / "one.dcm"
    server.ok("export", "--sop", "1.3.6.1.4.1.5962.1.1.1.1.1.20040119072730.12322", "--output", one)
    assert one.read_bytes()[:132] == bytes(128) + b"DICM"
    assert server.run("export", "--all", "--output", one).status == 2


def test_a_peer_with_a_title_that_no_file_may_have_gets_a_sheet_and_is_let_in(server: Server) -> None:
    title = "A/B ..$x"
    folder = server.add_peer(title)
    sheet = next(folder.glob("*.txt")).read_text()
    for part in ("127.0.0.1", title, "STRONGROOM", "echoscu", "CA fingerprint"):
        assert part in sheet
    assert server.run("peer", "add", title, "--issue", server.home / "again").status == 1
    titles = [item["ae_title"] for item in server.ok("peer", "list", "--json").json()["items"]]
    assert sorted(titles) == sorted(["CT1", title])
    server.wait_log("peers and certificates read: 2 peers")
    assert send(server, [CT], title=title, folder=folder) == [0]
    server.ok("peer", "remove", title)
    server.wait_log("peers and certificates read: 1 peers")
    assert server.run("peer", "remove", title).status == 5


def test_what_lies_in_the_current_folder_is_not_run(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server()
    server.init()
    planted = tmp_path / "planted"
    for name in ("storescp/__init__.py", "json.py", "logging.py"):
        file = planted / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    # No vault runs: one is started for the command.
    command = [str(Path(sys.executable).with_name("strongroom")), "--config", str(server.config), "list", "--json"]
    done = subprocess.run(command, cwd=planted, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["items"]) == (5, []), done.stderr
    assert not (tmp_path / "was-run").exists()


def test_without_a_server_the_status_says_so_and_nothing_is_locked_or_unlocked(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    server.init()
    status = server.ok("status", "--json").json()
    assert status["receiving"] is False
    assert "no server is running" in status["warnings"][0]
    for verb in ("lock", "unlock"):
        done = server.run(verb)
        assert (done.status, "no vault is running" in done.err) == (1, True), done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("audit", "show", "--since", "yesterday"), "'yesterday' is no time"),
        (("audit", "who", "--study", "1.2", "--since", "1/2/2026"), "is no time"),
        (("export", "--study", "*", "--to", "x"), "'*' is no UID"),
        (("install", "--root", "no-such-folder", "--dry-run"), "does not exist"),
    ],
)
def test_a_mistyped_value_is_a_usage_error_and_not_an_empty_answer(
    make_server: Callable[..., Server], arguments: tuple[str, ...], said: str
) -> None:
    server = make_server()
    server.init()
    done = server.run(*arguments)
    assert (done.status, said in done.err) == (2, True), done.err
