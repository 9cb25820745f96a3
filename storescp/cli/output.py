"""What commands print: tables for people, JSON documents and plain lines for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from storescp.errors import plural
from storescp.log import escape

__all__ = ["document", "plural", "size", "table"]


def document(content: dict[str, Any]) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(content, ensure_ascii=False, indent=2))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows: a table on a terminal, lines with tabs elsewhere. Control characters never reach the terminal."""
    console = Console()
    texts = ([escape(str(cell if cell is not None else "")) for cell in row] for row in rows)
    if not console.is_terminal:
        click.echo("\t".join(columns))
        for row in texts:
            click.echo("\t".join(row))
        return
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in texts:
        made.add_row(*(Text(cell) for cell in row))
    console.print(made)


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
