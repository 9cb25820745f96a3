"""``patch report|fetch|import|window``: how old the oldest unapplied fix of everything that runs here is."""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec

from storescp.cli import output
from storescp.cli.session import config_of
from storescp.config import Config
from storescp.errors import FINDINGS, NOTHING, PARTLY, StrongroomError
from storescp.log import escape
from storescp.patch.settings import PatchAge, check, is_ecosystem

_LONGEST_WINDOW = timedelta(days=14)
_FARTHEST_WINDOW = timedelta(days=366)
_DIGEST_BYTES = 4096
_COLUMNS = ["State", "Severity", "What", "Installed", "Fixed in", "Age", "Target", "Limit"]


@click.group("patch")
def patch_command() -> None:
    """What runs here, and how old its oldest unapplied fix is; the feeds that tell; planned slots."""


@patch_command.command("report")
@click.option("--all", "everything", is_flag=True, help="Also what has nothing unapplied.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with everything.")
@click.pass_obj
def report_command(given: str | None, /, everything: bool, as_json: bool) -> int:
    r"""Say what runs here and how old its oldest unapplied fix is, by what 'patch fetch' and 'patch import' brought.

    Looks at Python packages, the interpreter, each bundled OpenSSL, SQLCipher, Debian's packages, the kernel, and
    libraries that running processes of this product use though they were replaced. Speaks to no network. What cannot
    be told is 'unknown', never 'ok'. As root it sees every process; others may leave some unknown. Run by the vault's
    user it raises an alert for breaches and one for what is unknown, and resolves them when they are over.

    \b
    Example:
      $ strongroom patch report
    Exit status: 0 nothing is over its limit, 6 a breach or something unknown.
    """
    config = config_of(given)
    settings, folder = _folder(config)
    from storescp.patch import look

    made = look.report(settings, folder, datetime.now(UTC))
    _alert(config.outbox, _counts(made.items))
    if as_json:
        document = msgspec.to_builtins(made)
        document.pop("seen")
        output.document(_escaped(document | {"summary": _counts(made.items)}))
    else:
        _tell(made, everything)
    return FINDINGS if made.findings else 0


@patch_command.command("fetch")
@click.option("--only", multiple=True, type=click.Choice(["osv", "index", "debian"]), help="Of these sources alone.")
@click.option("--index", metavar="URL", help="Another package index than patch_age.index.")
@click.option("--osv", metavar="URL", help="Another place of OSV exports than patch_age.osv.")
@click.pass_obj
def fetch_command(given: str | None, /, only: tuple[str, ...], index: str | None, osv: str | None) -> int:
    r"""Bring OSV's exports, upload times of Python packages and changelogs of Debian's candidates into the inbox.

    The only part of this that speaks to a network: HTTPS, with the system's authorities and the environment's proxies;
    apt for Debian's packages. It reaches neither store nor vault, and can run as a user of its own that may write the
    inbox alone. What is current is not fetched again; what broke off goes on.

    \b
    Example:
      $ strongroom patch fetch
    Exit status: 0 everything is current, 1 nothing could be fetched, 3 some could not.
    """
    settings, folder = _folder(config_of(given))
    from storescp.errands import download, fetch
    from storescp.errands.alone import alone
    from storescp.patch import inventory, system

    index = index or settings.index or (fetch.pip_index() if not only or "index" in only else "")
    settings = msgspec.structs.replace(settings, index=index, osv=osv or settings.osv)
    _refuse(check(settings))

    client = download.Client()
    failed = total = 0
    # The vault reads what is there; nothing in it is secret.
    with alone(folder.inbox, "fetches", 0o755):
        wanted = only or ("osv", "index", "debian")
        outcomes = []
        if "osv" in wanted:
            outcomes.append(fetch.exports(client, settings, folder))
        if "index" in wanted:
            # One without a version is damaged, and has no name to ask for.
            names = [found.name for found in inventory.distributions() if found.version]
            outcomes.append(fetch.answers(client, settings, folder, names))
        if "debian" in wanted:
            outcomes.append(fetch.changelogs(folder, system.look()))
        for outcome in (o for source in outcomes for o in source):
            total, failed = total + 1, failed + (outcome.state == "failed")
            detail = f": {outcome.detail}" if outcome.detail else ""
            click.echo(escape(f"{outcome.state} {outcome.what}{detail}"), err=outcome.state == "failed")
    click.echo(f"{total - failed} of {total} are current")
    return 0 if not failed else 1 if failed == total else PARTLY


@patch_command.command("import")
@click.argument("feed", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--ecosystem", metavar="NAME", help="What the export is of: PyPI, Debian, GIT; else the file's name says it."
)
@click.option("--sha256", metavar="HEX", help="Its digest, got by another way; else FEED.sha256 beside it.")
@click.pass_obj
def import_command(given: str | None, /, feed: Path, ecosystem: str | None, sha256: str | None) -> None:
    r"""Take an OSV export (all.zip) that was carried here, after comparing it with its digest.

    For machines without internet. Make the digest where the export was downloaded ('sha256sum all.zip'), and bring it
    by another way if you can. An export that is older than what was imported before is refused.

    \b
    Example:
      $ strongroom patch import /media/usb/all.zip --ecosystem PyPI --sha256 9f86d08...
    Exit status: 0 imported, 1 refused.
    """
    settings, folder = _folder(config_of(given))
    name = ecosystem or feed.stem
    if not is_ecosystem(name) or name == "all":
        raise click.UsageError("say with --ecosystem what the export is of, as in PyPI, Debian or GIT")
    digest = (sha256 or _digest_beside(feed)).strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise click.UsageError("a SHA-256 digest has 64 hex digits")
    from storescp.patch import look

    try:
        brought = look.bring(folder, feed, name, digest, datetime.now(UTC))
    except OSError as error:
        raise StrongroomError(f"{folder.imported} cannot be written: {error.strerror}") from error
    date = brought.date.strftime("%Y-%m-%d")
    click.echo(f"imported the OSV export of {name} of {date}: {output.plural(brought.records, 'record')}")
    if name not in settings.ecosystems:
        click.echo(f"it is not read: patch_age.ecosystems does not name {name}", err=True)


@patch_command.group("window")
def window_command() -> None:
    """Announce, list and remove planned slots: a breach inside one is shown as planned."""


@window_command.command("add")
@click.option("--from", "begin", required=True, metavar="TIME", help="RFC 3339, as 2027-01-09T22:00:00+01:00.")
@click.option("--to", "end", required=True, metavar="TIME", help="Its end; at most 14 days later.")
@click.option("--reason", required=True, help="What is planned, and by whom.")
@click.pass_obj
def window_add(given: str | None, /, begin: str, end: str, reason: str) -> None:
    r"""Announce a slot in which fixes are applied. Breaches inside it are 'planned' and do not count as findings.

    A window holds back no breach that is more than patch_age.window_limit over its limit, and nothing unknown.

    \b
    Example:
      $ strongroom patch window add --from 2027-01-09T20:00:00Z --to 2027-01-10T04:00:00Z --reason "weekend slot"
    """
    from storescp.patch.folder import Window, Windows, load

    _, folder = _folder(config_of(given))
    now, first, last = datetime.now(UTC), _time(begin, "--from"), _time(end, "--to")
    if not first < last or last <= now:
        raise click.UsageError("a window ends after it begins, and after now")
    if last - first > _LONGEST_WINDOW or first - now > _FARTHEST_WINDOW:
        raise click.UsageError("a window is at most 14 days long, and begins within a year")
    if not reason.strip():
        raise click.UsageError("say with --reason what is planned")
    # Windows that ended tell nothing any more.
    kept = [w for w in (load(folder.windows, Windows) or Windows()).windows if w.end > now]
    window = Window(id=secrets.token_hex(3), begin=first, end=last, reason=reason.strip())
    _save(folder.windows, Windows(windows=[*kept, window]))
    click.echo(f"window {window.id} announced")


@window_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def window_list(given: str | None, /, as_json: bool) -> int:
    r"""List the announced slots that have not ended.

    \b
    Example:
      $ strongroom patch window list
    Exit status: 0 there are some, 5 there is none.
    """
    from storescp.patch.folder import Windows, load

    _, folder = _folder(config_of(given))
    now = datetime.now(UTC)
    found = [w for w in (load(folder.windows, Windows) or Windows()).windows if w.end > now]
    if as_json:
        output.document({"format": 1, "items": msgspec.to_builtins(found)})
    elif found:
        rows = ([w.id, _text(w.begin), _text(w.end), w.reason] for w in found)
        output.table(["Window", "From", "To", "Reason"], rows)
    if not found:
        click.echo("no window is announced", err=True)
    return 0 if found else NOTHING


@window_command.command("remove")
@click.argument("window")
@click.pass_obj
def window_remove(given: str | None, /, window: str) -> None:
    r"""Take an announced slot back.

    \b
    Example:
      $ strongroom patch window remove 3f9a10
    Exit status: 0 removed, 5 there is no such window.
    """
    from storescp.patch.folder import Windows, load

    _, folder = _folder(config_of(given))
    found = (load(folder.windows, Windows) or Windows()).windows
    kept = [w for w in found if w.id != window]
    if len(kept) == len(found):
        hint = "'strongroom patch window list' lists them"
        raise StrongroomError(f"there is no window {window}", hint=hint, status=NOTHING)
    _save(folder.windows, Windows(windows=kept))
    click.echo(f"window {window} removed")


def _folder(config: Config) -> tuple[PatchAge, Any]:
    from storescp.patch.folder import Folder

    settings: PatchAge = config.settings.patch_age
    return settings, Folder(config.file.parent / settings.folder)


def _refuse(errors: list[str]) -> None:
    if errors:
        raise click.UsageError("\n".join(errors))


def _save(path: Path, content: Any) -> None:
    from storescp.patch.folder import save

    try:
        save(path, content)
    except OSError as error:
        raise StrongroomError(f"{path} cannot be written: {error.strerror}") from error


def _time(text: str, option: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            raise ValueError
        return found.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise click.UsageError(f"{option}: '{text}' is no time with its zone, as 2027-01-09T22:00:00+01:00") from error


def _text(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest_beside(feed: Path) -> str:
    beside = feed.with_name(feed.name + ".sha256")
    try:
        with beside.open("rb") as file:
            return (file.read(_DIGEST_BYTES).decode("ascii", "replace").split() or [""])[0]
    except FileNotFoundError as error:
        hint = f"name its digest with --sha256, or put it into {beside}"
        raise StrongroomError(f"{feed} has no digest: nobody knows whether it is what was sent", hint=hint) from error
    except OSError as error:
        raise StrongroomError(f"{beside} cannot be read: {error.strerror}") from error


def _alert(outbox: Path, counts: dict[str, int]) -> None:
    """Raise or resolve the alerts about patches, where this user may: the outbox is the vault's."""
    from storescp.alerts import Alerts

    try:
        owner = (outbox if outbox.exists() else outbox.parent).stat().st_uid
    except OSError:
        return
    if owner != os.geteuid():
        return
    alerts = Alerts(outbox)
    for kind, state in (("patch-breach", "breach"), ("patch-unknown", "unknown")):
        if counts[state]:
            alerts.raise_(kind, count=counts[state])
        else:
            alerts.resolve(kind)


def _escaped(value: Any) -> Any:
    """Return a document without control characters: JSON lets some of a feed's through."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escape(value) if isinstance(value, str) else value


def _counts(items: list[Any]) -> dict[str, int]:
    from storescp.patch.items import STATES

    return {state: sum(1 for item in items if item.state == state) for state in STATES}


def _tell(made: Any, everything: bool) -> None:
    shown = [item for item in made.items if everything or item.open]
    if shown:
        output.table(
            [*_COLUMNS, "Confidence", "Source", "Why"],
            (
                [
                    *(i.state, i.severity, f"{i.kind} {i.name}", i.installed, i.candidate),
                    f"{i.age_days:.0f} d" if i.age_days is not None else "",
                    *(i.target, i.limit, i.confidence, i.source, _why(i)),
                ]
                for i in shown
            ),
        )
    for source in made.sources:
        date = _text(source.date) if source.date else "no date"
        click.echo(escape(f"{source.name}: {date}{f'; {source.problem}' if source.problem else ''}"))
    click.echo(", ".join(f"{count} {state}" for state, count in _counts(made.items).items()))


def _why(item: Any) -> str:
    ids = " ".join(item.ids[:3]) + (f" and {len(item.ids) - 3} more" if len(item.ids) > 3 else "")
    return "; ".join(part for part in (item.reason, ids) if part)
