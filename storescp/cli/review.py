"""``audit review``: what is unusual in a week of the audit chain."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from keys import encoding
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.errors import FINDINGS, StrongroomError
from storescp.review import Review
from storescp.reviewpage import page
from storescp.reviewtext import text


@click.command("review")
@click.option(
    "--week", type=click.DateTime(["%Y-%m-%d"]), metavar="DATE", help="The week with this day; else last week."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page with plots."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def review_command(given: str | None, /, week: datetime | None, html: Path | None, as_json: bool) -> int:
    r"""Say what is unusual in a week of the audit chain, against the eight weeks before: read it in two minutes.

    Refused connections, peers that are new or store more or less than ever, acts outside working hours (review.hours),
    exports, deletions, wrong secrets, keys, jobs that failed, certificates, gaps in the chain. It names no patient and
    no study: 'audit show --after' shows the records. The schedule does the same each Monday, into reviews/ of the
    store. That you read the records is recorded.

    \b
    Examples:
      $ strongroom audit review
      $ strongroom audit review --week 2026-11-18 --html review.html
    Exit status: 0 nothing unusual, 1 failed, 4 locked, 6 something to look at.
    """
    asked = {"week": str(week.date()) if week else None}
    with vault(config_of(given)) as client:
        found: dict[str, Any] = client.json("POST", "/v1/audit/review", asked)
    review = msgspec.convert(found, Review)
    if html is not None:
        _write(html, page(review))
    if as_json:
        output.document(found)
    else:
        click.echo(text(review), nl=False)
    return FINDINGS if review.flags else 0


def _write(file: Path, content: str) -> None:
    try:
        encoding.replace(file, content.encode())
    except OSError as error:
        raise StrongroomError(f"{file} cannot be written: {error.strerror}") from error
