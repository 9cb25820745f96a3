"""``alerts list|test`` and ``alert-sender``: what is wrong, and who is told."""

from __future__ import annotations

from typing import Any

import click

from storescp.cli import output
from storescp.cli.session import config_of
from storescp.clock import now
from storescp.config import Config
from storescp.errors import FAILED, FINDINGS, PARTLY, StrongroomError


@click.group("alerts")
def alerts_command() -> None:
    """What is wrong and stays so until somebody acts; who is told of it."""


@alerts_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_command(given: str | None, /, as_json: bool) -> int:
    r"""List the alerts that stand, each with the command that resolves it; say which way of telling fails.

    Needs no running and no unlocked vault. An alert goes by itself when what it is about is over.

    \b
    Example:
      $ strongroom alerts list
    Exit status: 0 nothing stands, 6 something does.
    """
    from storescp import alerts

    config = config_of(given)
    try:
        outbox = alerts.read(config.outbox)
    except OSError as error:
        raise StrongroomError(
            f"the outbox {config.outbox} cannot be read: {error.strerror}",
            hint="run this command as root or as the user that the vault runs as",
        ) from error
    faults = _faults(config)
    rows = [
        {name: getattr(alert, name) for name in ("kind", "what", "severity", "since", "last_seen", "text", "command")}
        for alert in outbox.alerts
    ]
    if as_json:
        output.document(
            {"format": 1, "time": now(), "items": rows, "unreadable": len(outbox.unreadable), "faults": faults}
        )
    else:
        if rows:
            cells = [[r["severity"], r["since"], r["text"], r["command"]] for r in rows]
            output.table(["Severity", "Since", "What", "Command"], cells)
        for fault in faults:
            click.echo(f"not delivered by {fault['way']} since {fault['since']}: {fault['why']}", err=True)
        if outbox.unreadable:
            click.echo(f"{output.plural(len(outbox.unreadable), 'alert')} in {config.outbox} cannot be read", err=True)
    return FINDINGS if rows or outbox.unreadable else 0


@alerts_command.command("test")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def test_command(given: str | None, /, as_json: bool) -> int:
    r"""Send a test alert by every configured way, and say what happened.

    It is sent from here, not by the running sender: whoever runs this must be able to read alerts.mail.password_file.

    \b
    Example:
      $ strongroom alerts test
    Exit status: 0 delivered by every way, 1 by none, 2 none is configured, 3 by some.
    """
    from storescp.errands import alert, ways

    config = config_of(given)
    results = alert.test(config, alert.configured(ways.ways_of(config)))
    if as_json:
        output.document({"format": 1, "time": now(), "items": results})
    else:
        for result in results:
            said = "delivered" if result["delivered"] else "NOT delivered"
            click.echo(f"{result['way']}: {said}" + (f": {result['said']}" if result["said"] else ""))
    delivered = sum(result["delivered"] for result in results)
    return 0 if delivered == len(results) else PARTLY if delivered else FAILED


@click.command("alert-sender")
@click.pass_obj
def alert_sender_command(given: str | None, /) -> None:
    r"""Run the sender of alerts alone: reads the outbox, sends mail and calls webhooks, opens nothing of the store.

    'serve' starts it by itself where alerts.mail or alerts.webhooks is set.

    \b
    Example:
      $ strongroom alert-sender
    Exit status: 0 stopped, 1 cannot start, 2 configuration.
    """
    from storescp import child, log
    from storescp.errands import alert
    from storescp.harden import harden

    config = config_of(given)
    harden(0o077)
    log.set_up("alert-sender", config.settings.log.format, config.settings.log.level)
    child.die_with_parent()
    alert.run(config)


def _faults(config: Config) -> list[dict[str, Any]]:
    from storescp.errands import alert, ways

    try:
        faults = alert.read_state(config).faults
        labels = {way.key: way.label for way in ways.ways_of(config)}
    except StrongroomError:
        # Whoever may read the outbox need not be the sender.
        return []
    return [
        {"way": labels[key], "since": fault.since, "why": fault.why} for key, fault in faults.items() if key in labels
    ]
