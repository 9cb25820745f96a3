"""The ``strongroom`` command. One module a verb group; a verb's module is imported when it runs."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from storescp import __version__
from storescp.errors import StrongroomError

_VERBS = {
    "init": ("storescp.cli.setup", "Make a new store."),
    "install": ("storescp.cli.install", "Install as services of systemd, mend, upgrade or remove that."),
    "serve": ("storescp.cli.serve", "Run gate and vault under one supervisor."),
    "gate": ("storescp.cli.serve", "Run the gate alone."),
    "desk": ("storescp.cli.serve", "Run the desk alone."),
    "vault": ("storescp.cli.serve", "Run the vault alone."),
    "unlock": ("storescp.cli.setup", "Unlock the running vault."),
    "lock": ("storescp.cli.setup", "Lock the running vault."),
    "status": ("storescp.cli.setup", "Say how the store is."),
    "peer": ("storescp.cli.peer", "Add, renew, test, list and remove peers."),
    "list": ("storescp.cli.find", "List studies, series or instances."),
    "export": ("storescp.cli.export", "Write instances as DICOM files."),
    "quarantine": ("storescp.cli.quarantine", "Look at and decide about what was not admitted."),
    "keys": ("storescp.cli.keys", "Rotate keys; say which there are."),
    "recovery": ("storescp.cli.recovery", "Shares on paper and exports: what rebuilds the keyring elsewhere."),
    "backup": ("storescp.cli.backup", "Copy the store into a folder; list and confirm backups."),
    "restore": ("storescp.cli.backup", "Make a store from a backup and recovery shares."),
    "erase": ("storescp.cli.erase", "Erase a study, with a certificate."),
    "retention": ("storescp.cli.retention", "What goes by the rules, when, and why."),
    "hold": ("storescp.cli.hold", "What nobody may erase."),
    "approve": ("storescp.cli.hold", "Approve an act that another user asked for."),
    "certificate": ("storescp.cli.erase", "List, show and verify certificates of erasure."),
    "doctor": ("storescp.cli.doctor", "Check this installation; say what to mend."),
    "patch": ("storescp.cli.patch", "Say how old the oldest unapplied fix of everything here is."),
    "alerts": ("storescp.cli.alerts", "Say what is wrong; send a test alert."),
    "alert-sender": ("storescp.cli.alerts", "Run the sender of alerts alone."),
    "metrics": ("storescp.cli.metrics", "Serve numbers to Prometheus."),
    "conformance": ("storescp.cli.conformance", "Write the DICOM conformance statement of this configuration."),
    "jobs": ("storescp.cli.jobs", "What the vault does by itself: when, and how it ended."),
    "audit": ("storescp.cli.audit", "Read and check the audit chain."),
    "audit-forwarder": ("storescp.cli.audit", "Run the sender of audit messages alone."),
    "verify": ("storescp.cli.care", "Open every record; say what is missing or damaged."),
    "scrub": ("storescp.cli.care", "Read packs again, a part at a time; say what is damaged."),
    "reindex": ("storescp.cli.care", "Rebuild the index from packs and keys."),
    "upgrade": ("storescp.cli.care", "Bring a store of an older format to this release's."),
}
# What the gate starts itself.
_HIDDEN = {"gate-worker": ("storescp.cli.serve", "Run a worker of the gate.")}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verbs = _VERBS | _HIDDEN
        if cmd_name not in verbs:
            return None
        module = importlib.import_module(verbs[cmd_name][0])
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        _lay_out(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Without importing every verb's module, so that --help is quick.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])


def _lay_out(command: click.Command) -> None:
    """Let click keep the lines of examples: its mark is a control character, which no docstring should hold."""
    command.help = (command.help or "").replace("\\b", "\b")
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _lay_out(inner)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    metavar="FILE",
    help="Configuration; else STRONGROOM_CONFIG, ./strongroom.toml, /etc/strongroom/strongroom.toml.",
)
@click.version_option(__version__, prog_name="strongroom")
@click.pass_context
def strongroom(context: click.Context, config: str | None) -> None:
    r"""Encrypted-at-rest DICOM storage server.

    \b
    Exit status: 0 done, 1 failed, 2 usage, 3 partly done, 4 locked, 5 nothing matched, 6 findings.
    Completion for bash: eval "$(_STRONGROOM_COMPLETE=bash_source strongroom)"
    """
    context.obj = config


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its status."""
    try:
        _lay_out(strongroom)
        result: Any = strongroom.main(args=arguments, prog_name="strongroom", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except StrongroomError as error:
        for line in str(error).split("\n"):
            click.echo(f"strongroom: error: {line}", err=True)
        if error.hint:
            click.echo(f"strongroom: hint: {error.hint}", err=True)
        sys.exit(error.status)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(f"strongroom: error: {error.filename}: {error.strerror}", err=True)
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)
