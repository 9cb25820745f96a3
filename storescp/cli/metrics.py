"""``metrics``: the process that serves numbers to Prometheus."""

from __future__ import annotations

import click

from storescp.cli.session import config_of


@click.command("metrics")
@click.option("--once", is_flag=True, help="Print the numbers, and serve none.")
@click.pass_obj
def metrics_command(given: str | None, /, once: bool) -> None:
    r"""Serve numbers to Prometheus at metrics.listen: reads what gate and vault count, and opens nothing of the store.

    'serve' starts it by itself where metrics.listen is set. Numbers of a process that does not run are left out.

    \b
    Examples:
      $ strongroom metrics
      $ strongroom metrics --once > /var/lib/node_exporter/strongroom.prom
    Exit status: 0 stopped or printed, 1 cannot start, 2 configuration.
    """
    from storescp import child, log
    from storescp.errands import metrics
    from storescp.harden import harden

    config = config_of(given)
    if once:
        click.echo(metrics.collected(config), nl=False)
        return
    harden(0o077)
    log.set_up("metrics", config.settings.log.format, config.settings.log.level)
    child.die_with_parent()
    metrics.run(config)
