"""``retention plan|run|pending|take-back``: what goes by the rules, when, and why."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import click

from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.cli.watch import operation, shown
from storescp.errors import NOTHING

_DAY = click.DateTime(formats=["%Y-%m-%d"])
_BECOMES = ("due", "held", "blocked")
_YEAR = timedelta(days=365)


@click.group("retention")
def retention_command() -> None:
    """Retention: which studies are due by the rules in the configuration, and their erasure (docs/retention.md)."""


@retention_command.command("plan")
@click.option("--on", type=_DAY, metavar="DATE", help="As of this day, 2031-01-31; today without.")
@click.option("--all", "everything", is_flag=True, help="List the studies that stay, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def plan(given: str | None, /, on: datetime | None, everything: bool, as_json: bool) -> int:
    r"""Show what would go and why, what a hold blocks, and how much space it frees. Changes nothing.

    Of each study that is due it says what 'retention run' does with it now: it marks it as pending erasure, lets it
    wait (until the day that stands there), erases it, or leaves it to who took it back.

    \b
    Examples:
      $ strongroom retention plan
      $ strongroom retention plan --on 2031-01-31 --json
    Exit status: 0 something is due, 4 locked, 5 nothing is.
    """
    studies: list[dict[str, Any]] = []
    totals: dict[str, Any] = {}
    asked = {"on": str(on.date()) if on else None, "everything": everything}
    with vault(config_of(given)) as client:
        for event in operation(client, "/v1/retention/plan", asked, "the plan"):
            if event.pop("kind") == "study":
                studies.append(event)
            else:
                totals = event
    if as_json:
        output.document({"format": 1, "studies": studies, "totals": totals})
    else:
        if studies:
            columns = ["Becomes", "Due", "A run now", "Study UID", "Instances", "Size", "Why"]
            output.table(columns, (_row(study) for study in studies))
        _tell(totals)
    return 0 if totals["due"] else NOTHING


@retention_command.command("run")
@click.option("--confirm", is_flag=True, help="It is meant, though a brake is on.")
@click.pass_obj
def run(given: str | None, /, confirm: bool) -> None:
    r"""Do what the plan says: what is due becomes pending erasure; what has been long enough is erased for ever.

    Each erased study has a certificate. Stop it at any time: the next run goes on. More studies than
    retention.most_studies or most_percent, and a clock that cannot be trusted, need --confirm.

    \b
    Example:
      $ strongroom retention run
    Exit status: 0 done, 1 a brake is on or there is no rule, 4 locked.
    """
    with vault(config_of(given)) as client, shown("erasing") as show:
        for event in operation(client, "/v1/retention/run", {"confirm": confirm}, "the run"):
            show(event)


@retention_command.command("pending")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def pending(given: str | None, /, as_json: bool) -> int:
    r"""List the studies that are pending erasure, and those that were taken back.

    \b
    Example:
      $ strongroom retention pending
    Exit status: 0 some are, 4 locked, 5 none.
    """
    with vault(config_of(given)) as client:
        items = client.json("GET", "/v1/retention/pending")["items"]
    if as_json:
        output.document({"format": 1, "items": items})
    elif items:
        keys = ("study", "rule", "due", "from_day", "instances", "kept_until", "kept_reason")
        columns = ["Study UID", "Rule", "Due", "Erased from", "Instances", "Taken back until", "Why"]
        output.table(columns, ([item[key] for key in keys] for item in items))
    else:
        click.echo("no study is pending erasure", err=True)
    return 0 if items else NOTHING


@retention_command.command("take-back")
@click.option("--study", required=True, metavar="UID", help="The study.")
@click.option("--until", type=_DAY, metavar="DATE", help="Not marked again before this day; in a year without.")
@click.option("--reason", required=True, help="Why; it stands in the audit chain.")
@click.pass_obj
def take_back(given: str | None, /, study: str, until: datetime | None, reason: str) -> None:
    r"""Take a study back from pending erasure. To keep it whatever happens, place a hold.

    \b
    Example:
      $ strongroom retention take-back --study 1.2.840.113619.2.5 --until 2031-01-31 --reason "second opinion"
    """
    day: date = until.date() if until else datetime.now(UTC).date() + _YEAR
    with vault(config_of(given)) as client:
        asked = {"study": study, "until": str(day), "reason": reason}
        client.json("POST", "/v1/retention/take-back", asked)
    click.echo(f"study {study} stays at least until {day}")


def _row(study: dict[str, Any]) -> list[Any]:
    why = "; ".join([*study["obstacles"], *study["reasons"][:1]])
    day = study["kept_until"] or (study["erased_from"] if study["run"] == "waits" else None)
    does = f"{study['run']} until {day}" if day else study["run"]
    size = output.size(study["bytes"])
    return [study["becomes"], study["due"], does, study["study"], study["instances"], size, why]


def _tell(totals: dict[str, Any]) -> None:
    said = [
        f"{output.plural(totals[what], 'study', 'studies')} {what}: {output.size(totals[f'{what}_space'])}"
        for what in _BECOMES
        if totals[what]
    ]
    stay = f"{totals['kept']} kept by a rule, {totals['no_rule']} by none"
    click.echo(
        f"on {totals['on']} of {output.plural(totals['studies'], 'study', 'studies')}: {', '.join([*said, stay])}"
    )
    if totals["due"]:
        click.echo(
            f"a run now marks {totals['marks']} of them as pending erasure and erases {totals['erases']};"
            f" {totals['waits']} wait, {totals['taken_back']} were taken back"
        )
    for brake in totals["brakes"]:
        click.echo(f"brake: {brake}", err=True)
