"""What an operation of the vault tells while it goes on: followed to its end, and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from storescp.control import Client
from storescp.errors import StrongroomError

Event = dict[str, Any]


def operation(client: Client, path: str, document: Any, what: str) -> Iterator[Event]:
    """Begin an operation of the vault; yield its events.

    Raises:
        StrongroomError: The vault refused, the operation ended with an error, or it broke off.
    """
    for event in client.lines("POST", path, document):
        if event["kind"] == "error":
            raise StrongroomError(event["message"], hint=event["hint"], status=event["status"])
        if event["kind"] == "end":
            return
        yield event
    raise StrongroomError(
        f"{what} broke off", hint="the vault's log says why; the same command goes on or begins again"
    )


@contextlib.contextmanager
def shown(what: str) -> Iterator[Callable[[Event], None]]:
    """Give a function that shows an event: a bar on a terminal, steps and what is waited for as lines."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    said = ""
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def show(event: Event) -> None:
            nonlocal said
            match event["kind"]:
                case "progress":
                    progress.update(task, completed=event["done"], total=event["total"])
                case "step":
                    click.echo(event["text"])
                case "waiting" if event["text"] != said:
                    said = event["text"]
                    click.echo(said, err=True)

        yield show
