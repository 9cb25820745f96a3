"""``keys compromise``: asks what leaked, and says which steps answer it on this store."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

import click
import msgspec

from storescp.cli import output
from storescp.cli.leaks import LEAKS, Answer, Slot, State, answer
from storescp.cli.session import config_of, vault
from storescp.config import Config


@click.command("compromise")
@click.option("--leaked", type=click.Choice(list(LEAKS)), help="What leaked; asked for on a terminal.")
@click.option("--version", type=click.IntRange(min=1), metavar="V", help="Which key version's root, where that leaked.")
@click.option("--study", metavar="UID", help="Which study's key, where that leaked.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def compromise_command(
    given: str | None, /, leaked: str | None, version: int | None, study: str | None, as_json: bool
) -> None:
    r"""Say what to do after a leak: the steps for this store, and what they do not answer.

    Each step says why, and the end what backups still hold.
    Nothing is changed: the steps are commands to look at and to run. If in doubt between two leaks, take the one that
    is further down: root-key answers what passphrase does, and version more than that.

    \b
    Examples:
      $ strongroom keys compromise
      $ strongroom keys compromise --leaked study-key --study 1.2.840.113619.2.5
    Exit status: 0 said, 2 it was not said what leaked, 4 locked.
    """
    if leaked is None:
        leaked = _ask()
    config = config_of(given)
    with vault(config) as client:
        found = client.json("GET", "/v1/keys/report")
    state = state_of(found, config, f"strongroom --config {config.file}" if given else "strongroom")
    made = answer(leaked, state, version=version or state.current, study=study or "UID")
    if as_json:
        output.document({"format": 1, "leaked": leaked, **msgspec.to_builtins(made)})
        return
    for line in told(leaked, made):
        click.echo(line)


def _ask() -> str:
    if not sys.stdin.isatty():
        raise click.UsageError(f"--leaked says what leaked: {', '.join(LEAKS)}")
    for number, (name, text) in enumerate(LEAKS.items(), 1):
        click.echo(f"  {number}  {name}: {text}", err=True)
    number = click.prompt("What leaked", type=click.IntRange(1, len(LEAKS)), err=True)
    return list(LEAKS)[number - 1]


def state_of(found: dict[str, Any], config: Config, command: str) -> State:
    """Return the state from what the vault reports of keys, and the configuration."""
    alive = [v for v in found["versions"] if v["state"] != "destroyed"]
    backups = found.get("backups", [])
    return State(
        versions=tuple(v["version"] for v in alive),
        slots=tuple(Slot(s["id"], s["type"], s["label"]) for s in found["slots"]),
        anchor=alive[-1]["anchor"],
        rotating=any(not r["proof"] for r in found["rotations"]),
        reencrypting=any(not r["ended"] for r in found["reencryptions"]),
        shares=len(found["recovery_keys"]),
        exports=sum(not e["retired"] for e in found["exports"]),
        backups=len(backups),
        newest_backup=backups[-1]["created"] if backups else "",
        backup_folder=backups[-1]["folder"] if backups else "",
        pending_erasures=sum(not e["final"] for e in found["erasures"]),
        destroy_after_days=config.settings.keys.destroy_after_days,
        two_users=bool(config.settings.gate.user),
        key_file=str(config.key_file) if config.key_file is not None else "",
        credential=config.credential,
        authority=found["authority"],
        command=command,
    )


def told(leaked: str, made: Answer) -> list[str]:
    """Return an answer as lines of text: commands stand alone, to be copied."""
    lines = [f"leaked: {LEAKS[leaked]}", ""]
    for number, step in enumerate(made.steps, 1):
        lines += _wrapped(f"{number}. ", step.text)
        lines += [f"     {command}" for command in step.commands]
        lines += _wrapped("   why: ", step.why)
    for title, texts in (("not answered by this:", made.not_answered), ("what backups still hold:", made.backups)):
        lines += ["", title]
        for text in texts:
            lines += _wrapped("- ", text)
    return lines


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        110,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        break_long_words=False,
    )
