"""What answers a leak: for every leak and store, commands that exist, in an order that helps."""

from __future__ import annotations

import itertools
import re
import shlex

import click
import msgspec
import pytest
from click.testing import CliRunner

from storescp.cli import strongroom
from storescp.cli.compromise import told
from storescp.cli.leaks import LEAKS, Answer, Slot, State, answer

FILE = Slot("f" * 32, "key-file", "first")
PASS = Slot("a" * 32, "passphrase", "anna")
OTHER = Slot("b" * 32, "passphrase", "")
TOKEN = Slot("c" * 32, "token", "safe")
CREDENTIAL = Slot("d" * 32, "credential", "unit")
STORE = State(versions=(3,), slots=(FILE, PASS), key_file="/etc/strongroom/store.key", shares=1, exports=1)
STORES = {
    "as it should be": STORE,
    "new": State(versions=(1,), slots=(FILE,)),
    "one passphrase": State(versions=(1,), slots=(PASS,)),
    "two passphrases": State(versions=(2, 3), slots=(PASS, OTHER)),
    "token and credential": State(
        versions=(4,), slots=(TOKEN, CREDENTIAL), anchor="pkcs11", credential="strongroom-key"
    ),
    "in the middle": msgspec.structs.replace(STORE, versions=(2, 3), rotating=True, reencrypting=True),
    "two users": msgspec.structs.replace(STORE, two_users=True, authority=True, pending_erasures=2),
    "with backups": msgspec.structs.replace(
        STORE, backups=3, newest_backup="2026-11-22T03:00:00Z", backup_folder="/srv/backup", destroy_after_days=0
    ),
}


def commands(made: Answer) -> list[str]:
    return [command for step in made.steps for command in step.commands]


def verbs(made: Answer) -> list[str]:
    """Return what an answer runs, in order: the words before the first option."""
    return [
        " ".join(
            itertools.takewhile(lambda w: not w.startswith("-") and w.islower(), shlex.split(c, comments=True)[1:])
        )
        for c in commands(made)
    ]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("leak", LEAKS)
def test_every_answer_has_steps_with_reasons_and_says_what_it_does_not_answer(leak: str, store: str) -> None:
    made = answer(leak, STORES[store])
    assert made.steps
    assert made.not_answered
    assert made.backups
    for step in made.steps:
        assert step.text
        assert step.why
    whole = "\n".join(told(leak, made))
    assert not re.search(r"[{}]|  +[a-z]+  |None|versions [0-9]+[;.]", whole.replace("     ", ""))
    for line in whole.split("\n"):
        assert len(line) <= 110 or line.startswith("     strongroom"), line


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("leak", LEAKS)
def test_every_command_in_an_answer_is_one_with_options_that_it_has(leak: str, store: str) -> None:
    for command in commands(answer(leak, STORES[store])):
        words = shlex.split(command, comments=True)
        if words[0] == "systemctl":
            continue
        found: click.Command = strongroom
        context = click.Context(strongroom)
        rest = words[1:]
        while isinstance(found, click.Group) and rest and not rest[0].startswith("-"):
            name = rest.pop(0)
            sub = found.get_command(context, name)
            assert sub is not None, command
            found = sub
        known = {name for parameter in found.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, command


# Leak, store, the verbs in their order.
ORDER = [
    ("passphrase", "as it should be", "keys slot add, keys slot test, keys slot reroot, keys rotate, recovery export, "
     "recovery confirm, backup, backup confirm, keys status, keys reencrypt"),
    ("key-file", "one passphrase", "keys slot list"),
    ("passphrase", "token and credential", "keys slot list"),
    ("root-key", "new", "keys slot reroot, keys rotate, recovery init, recovery export, recovery confirm, backup, "
     "backup confirm, keys status, keys reencrypt"),
    ("version", "as it should be", "keys rotate, recovery export, recovery confirm, backup, backup confirm, "
     "keys status, keys reencrypt"),
    ("version", "in the middle", "keys rotate, keys rotate, recovery export, recovery confirm, backup, backup confirm, "
     "keys status, keys reencrypt"),
    ("study-key", "as it should be", "keys reencrypt, audit show"),
    ("backup", "token and credential", "keys rotate, recovery init, recovery export, recovery confirm, backup, "
     "backup confirm, keys status"),
    ("backup", "one passphrase", "keys rotate, recovery init, recovery export, recovery confirm, backup, "
     "backup confirm, keys status, keys compromise"),
    ("gate", "two users", "strongroom-gate, audit show, quarantine list, verify, keys rotate, recovery export, "
     "recovery confirm, backup, backup confirm, keys status, list instance, keys reencrypt"),
]  # fmt: skip


@pytest.mark.parametrize(("leak", "store", "order"), ORDER)
def test_an_answer_runs_these_verbs_in_this_order(leak: str, store: str, order: str) -> None:
    found = [verb.replace("stop ", "") for verb in verbs(answer(leak, STORES[store]))]
    assert ", ".join(found) == order


# Which slots there are, which kind leaked, the command.
REROOTS = [
    ((FILE, PASS), "passphrase", f"--passphrase 1 --key-file /etc/strongroom/store.key --remove {PASS.id}"),
    ((FILE, PASS), "key-file", f"--passphrase 1 --key-file NEW --remove {FILE.id}"),
    ((PASS, OTHER), "passphrase", "--passphrase 2 --remove ID"),
    ((PASS, TOKEN, CREDENTIAL), "passphrase",
     f"--passphrase 1 --credential NAME --token MODULE:TOKEN --remove {PASS.id}"),
    ((FILE, FILE, PASS), "root-key", "--passphrase 1 --key-file /etc/strongroom/store.key --key-file FILE"),
]  # fmt: skip


@pytest.mark.parametrize(("slots", "leak", "flags"), REROOTS)
def test_a_new_root_key_is_put_under_all_that_stay_and_the_new_one(
    slots: tuple[Slot, ...], leak: str, flags: str
) -> None:
    state = msgspec.structs.replace(STORE, slots=slots)
    found = [c for c in commands(answer(leak, state)) if "reroot" in c]
    assert found == [f"strongroom keys slot reroot {flags}"]


def test_slots_to_choose_from_are_named() -> None:
    text = "\n".join(told("passphrase", answer("passphrase", STORES["two passphrases"])))
    assert f"ID is one of {PASS.id} (anna)" in text.replace("\n   ", " ")
    assert OTHER.id in text


def test_a_versions_root_is_answered_by_its_state() -> None:
    old, current, gone = (answer("version", STORES["two passphrases"], version=v) for v in (2, 3, 1))
    assert "keys rotate" not in verbs(old)
    assert verbs(current)[0] == "keys rotate"
    assert verbs(gone) == ["keys reencrypt"]
    for made in (old, current, gone):
        assert verbs(made)[-1] == "keys reencrypt"


def test_who_runs_gate_and_vault_as_one_user_is_told_that_more_leaked() -> None:
    one, two = (answer("gate", STORES[name]) for name in ("as it should be", "two users"))
    assert [v for v in verbs(one) if v == "keys compromise"] == ["keys compromise"] * 2
    assert "keys compromise" not in verbs(two)
    assert commands(two)[0] == "systemctl stop strongroom-gate"


def test_backups_that_are_known_are_named_and_those_that_are_not_too() -> None:
    known = answer("study-key", STORES["with backups"])
    assert known.backups[0].startswith("3 backups made here, the newest at 2026-11-22T03:00:00Z: the old packs")
    assert answer("study-key", STORES["new"]).backups[0].startswith("no backup is known here")
    assert "strongroom backup --to /srv/backup" in commands(answer("backup", STORES["with backups"]))


def test_what_leaked_is_asked_for_on_a_terminal_alone() -> None:
    done = CliRunner().invoke(strongroom, ["keys", "compromise"], input="1\n")
    assert done.exit_code == 2
    assert "--leaked says what leaked: passphrase, key-file, root-key" in done.output
