"""``list``: what the store holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.errors import NOTHING

_COLUMNS = {
    "study": (
        ("Patient", "patient_name"),
        ("Patient ID", "patient_id"),
        ("Date", "study_date"),
        ("Modality", "modalities"),
        ("Description", "study_description"),
        ("Accession", "accession"),
        ("Series", "series_count"),
        ("Instances", "instance_count"),
        ("Study UID", "study"),
    ),
    "series": (
        ("Patient", "patient_name"),
        ("Date", "study_date"),
        ("Modality", "modality"),
        ("Number", "series_number"),
        ("Description", "series_description"),
        ("Instances", "instance_count"),
        ("Series UID", "series"),
    ),
    "instance": (
        ("Patient", "patient_name"),
        ("Date", "study_date"),
        ("Modality", "modality"),
        ("Number", "instance_number"),
        ("From", "calling"),
        ("Received", "received_at"),
        ("SOP Instance UID", "sop"),
    ),
}
_UID = {"study": "study", "series": "series", "instance": "sop"}
_FILTERS = (
    ("patient-id", "Patient ID."),
    ("patient-name", "Patient's name, in any of its three component groups, without case."),
    ("study-date", "Date or range: 20260131, 20260101-20260131, 20260101-."),
    ("modality", "Modality of a series."),
    ("accession", "Accession number."),
    ("study", "Study Instance UID."),
    ("series", "Series Instance UID."),
    ("sop", "SOP Instance UID."),
    ("aet", "Calling AE title that it came from."),
)


def with_filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the filter options to a command."""
    function = click.option(
        "--filter",
        "from_input",
        type=click.Choice(["-"]),
        help="Read filters from standard input, a 'name=value' a line, so that no name stands in a process list.",
    )(function)
    for name, text in reversed(_FILTERS):
        function = click.option(f"--{name}", metavar="TEXT", help=text)(function)
    return function


def filters_of(options: dict[str, str | None], from_input: str | None) -> dict[str, str]:
    """Return the filters of a command, those from standard input included.

    Raises:
        click.UsageError: A line is malformed.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    if from_input:
        known = {name for name, _ in _FILTERS}
        for number, line in enumerate(sys.stdin, 1):
            name, equals, value = line.rstrip("\n").partition("=")
            if not line.strip():
                continue
            if not equals or name.strip() not in known:
                # Not the line itself: it may hold a name.
                raise click.UsageError(f"line {number} of standard input is no filter; write patient-id=1234")
            chosen[name.strip().replace("-", "_")] = value.strip()
    return chosen


@click.command("list")
@click.argument("level", type=click.Choice(["study", "series", "instance"]), default="study")
@with_filters
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--uids", is_flag=True, help="Only the UIDs, a line each.")
@click.pass_obj
def list_command(
    given: str | None, /, level: str, as_json: bool, uids: bool, from_input: str | None, **options: str | None
) -> int:
    r"""List studies, series or instances. All filters must match; * and ? are wildcards.

    A name without wildcard and without ^ matches the family name: 'doe' finds DOE^JANE.

    \b
    Examples:
      $ strongroom list --patient-name 'doe*' --study-date 20260101-
      $ echo 'patient-id=1234' | strongroom list instance --filter - --json
    Exit status: 0 listed, 4 locked, 5 nothing matched.
    """
    chosen = filters_of(options, from_input)
    with vault(config_of(given)) as client:
        rows = client.lines("POST", "/v1/search", {"level": level, "filters": chosen})
        if as_json:
            found = [_public(row) for row in rows]
            output.document({"format": 1, "level": level, "items": found})
            return 0 if found else NOTHING
        count = 0

        def counted() -> Any:
            nonlocal count
            for row in rows:
                count += 1
                yield row

        if uids:
            for row in counted():
                click.echo(row[_UID[level]])
        else:
            columns = _COLUMNS[level]
            output.table([title for title, _ in columns], ([row[key] for _, key in columns] for row in counted()))
    if not count:
        click.echo("nothing matched", err=True)
        return NOTHING
    return 0


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in {"pack", "object_id"}}
