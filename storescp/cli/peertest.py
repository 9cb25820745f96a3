"""What ``peer test`` shows: the gate's steps with a connection, in words, and what to do where one fails.

The gate sends its steps to a socket that this command makes; what comes there is a hint for a person and no more.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pwd
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from storescp import peers
from storescp.cli.peer import find
from storescp.config import Config
from storescp.errors import FAILED, NOTHING, StrongroomError
from storescp.gate.journal import TRACE
from storescp.log import escape
from storescp.peers import Peer

_STEP_BYTES = 16_384
_HINTS = (
    ("does not speak TLS", "switch TLS on in the device's settings for this destination"),
    ("sent no certificate", "install the device's key and certificate; the sheet of 'peer add --issue' names them"),
    ("does not know the authority", "install ca.pem of 'peer add --issue' at the device as a trusted authority"),
    ("does not accept this server's certificate", "install ca.pem at the device, and connect by a name that it holds"),
    ("revocation list", "put its authority's current list in place; the gate takes it up by itself"),
    ("has expired", "'strongroom peer renew {title} --issue FOLDER' issues a new one"),
    ("not one of the peer", "bind it: 'strongroom peer renew {title} --certificate FILE', or install the issued one"),
    (
        "no peer has this calling AE title",
        "set the calling AE title {title} at the device, or add a peer of that title",
    ),
    ("called AE title", "set the called AE title {called} at the device"),
    ("from this address", "add the address in {file}"),
    ("revoked", "issue a new one: 'strongroom peer renew {title} --issue FOLDER'"),
    ("in no peer file", "bind it: 'strongroom peer renew {title} --certificate FILE', or install the issued one"),
    ("its authority is not in gate.trust", "add the authority's certificate to gate.trust in the configuration"),
    ("speaks HTTP", "set the device up for DICOM over TLS; a browser or a web gateway cannot connect here"),
    ("may not come without TLS", "switch TLS on at the device, or allow it: plaintext in {file} and gate.plaintext"),
    ("associations already", "end some at the device, or raise maximum_associations in {file}"),
    ("before an association was requested", "the device shakes hands and asks for nothing: its own log says why"),
)
# How an association ends at a device that works; a server of ours that stops, or a broken protocol, is none.
_BY_PEER = ("aborted by the peer", "closed by the peer without a release")


class Step(msgspec.Struct):
    """A step of the gate; what it holds besides depends on the step."""

    connection: int
    step: str
    address: str = ""
    tls: bool = True
    version: str = ""
    cipher: str = ""
    certificate: str = ""
    key: str = ""
    names: list[str] = msgspec.field(default_factory=list)
    authorities: list[str] = msgspec.field(default_factory=list)
    expires: str = ""
    calling: str = ""
    called: str = ""
    contexts: int = 0
    proposed: int = 0
    reason: str = ""
    ending: str = ""
    stored: int = 0
    refused: int = 0
    reasons: dict[str, int] = msgspec.field(default_factory=dict)

    def proof(self) -> peers.Proof:
        """Return what a handshake proved."""
        return peers.Proof(self.certificate, self.key, frozenset(self.names), frozenset(self.authorities))


def watch(config: Config, title: str, seconds: int, as_json: bool) -> int:
    """Show the steps of connections until one of this peer ends; return an exit status.

    Raises:
        StrongroomError: There is no such peer, or the socket cannot be made.
    """
    peer = find(config, title)
    if not as_json:
        for line in _before(config, peer):
            click.echo(line)
    seen: dict[int, list[Step]] = {}
    with _listening(config) as listening:
        if not as_json:
            click.echo(f"waiting up to {seconds} s: send an echo from the device now")
        for step in _steps(listening, seconds):
            so_far = seen.setdefault(step.connection, [])
            so_far.append(step)
            if as_json:
                click.echo(msgspec.json.encode(step).decode())
            else:
                click.echo(f"[{step.connection}] {_in_words(step, peer)}")
            result = _result(so_far, peer, config.settings.gate.ae_title)
            if result is not None:
                if not as_json:
                    click.echo(result[1])
                return result[0]
    click.echo(_nothing(config, peer, bool(seen)), err=True)
    return FAILED if seen else NOTHING


def _before(config: Config, peer: Peer) -> Iterator[str]:
    gate = config.settings.gate
    yield f"peer {peer.ae_title}: {peer.file}"
    yield f"  the device must call AE title {gate.ae_title} at {' or '.join(_ports(config, peer))} as {peer.ae_title}"
    if all(address.startswith(("127.", "[::1]")) for address in gate.listen):
        yield "  NOTE: the gate listens on this machine alone; gate.listen in the configuration opens an address"
    for pem in peer.certificates:
        yield f"  with the certificate of fingerprint {peers.fingerprint(pem)}"
    for what in (*sorted(peer.keys), *sorted(peer.names)):
        yield f"  with {what}"
    if peer.networks:
        yield f"  from {', '.join(str(net) for net in peer.networks)}"


def _ports(config: Config, peer: Peer) -> list[str]:
    """Return where a peer may connect."""
    open_for = [p for p in config.settings.gate.plaintext if peer.plaintext and peer.ae_title in p.peers]
    return [*config.settings.gate.listen, *(f"{p.listen} (without TLS)" for p in open_for)]


@contextlib.contextmanager
def _listening(config: Config) -> Iterator[socket.socket]:
    path = config.public / TRACE
    if _is_heard(path):
        raise StrongroomError("another 'peer test' is under way", hint="wait until it ends: steps go to one only")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(old)
        if os.geteuid() == 0:
            user = config.settings.gate.user
            os.chown(path, pwd.getpwnam(user).pw_uid if user else config.store_path.stat().st_uid, -1)
    except (OSError, KeyError) as error:
        listening.close()
        raise StrongroomError(
            f"the socket {path} cannot be made: {error}", hint="run this command as root, or as the gate's user"
        ) from error
    try:
        yield listening
    finally:
        listening.close()
        path.unlink(missing_ok=True)


def _is_heard(path: Path) -> bool:
    """Tell whether somebody listens there; one that was killed left its socket, and nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            # Where more than that is wrong, making the socket says so.
            return False
        return True


def _steps(listening: socket.socket, seconds: int) -> Iterator[Step]:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        listening.settimeout(left)
        with contextlib.suppress(TimeoutError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            yield msgspec.json.decode(listening.recv(_STEP_BYTES), type=Step)


def _in_words(step: Step, peer: Peer) -> str:
    match step.step:
        case "connected":
            return f"a connection from {escape(step.address)}{'' if step.tls else ', without TLS'}"
        case "handshake":
            whose = " (bound to this peer)" if peer.holds(step.proof()) else ""
            return (
                f"TLS handshake done: {escape(step.version)}, {escape(step.cipher)}, certificate "
                f"{escape(step.certificate)}{whose}, valid until {escape(step.expires)}"
            )
        case "requested":
            return f"association requested by '{escape(step.calling)}' of '{escape(step.called)}'"
        case "accepted":
            return f"association accepted with {step.contexts} of {step.proposed} presentation contexts"
        case "ended":
            refused = f", refused {step.refused} ({escape(', '.join(step.reasons))})" if step.refused else ""
            return f"association {escape(step.ending)}: stored {step.stored}{refused}"
        case "refused":
            return f"REFUSED: {escape(step.reason)}"
        case _:
            return escape(step.step)


def _result(so_far: list[Step], peer: Peer, called: str) -> tuple[int, str] | None:
    """Return exit status and words where a connection ended that is this peer's, or may be."""
    callings = [step.calling.strip() for step in so_far if step.step == "requested"]
    last = so_far[-1]
    if callings and callings[0] != peer.ae_title and not _has_certificate(so_far, peer):
        return None
    if not callings and not _may_come_from(so_far[0].address, peer):
        return None
    if last.step == "ended":
        accepted = next((s for s in so_far if s.step == "accepted"), last)
        if not accepted.contexts:
            return FAILED, "it connects, but nothing that it proposes is allowed: see operations and sop_classes"
        if last.refused:
            return FAILED, "it connects, and objects are refused; the gate's log says more"
        if last.ending != "released" and not (last.stored and last.ending in _BY_PEER):
            return FAILED, "it connects, and the association does not end by a release; the device's own log says why"
        return 0, f"peer {peer.ae_title} works"
    if last.step == "refused":
        hint = next((text for part, text in _HINTS if part in last.reason), "")
        named = hint.format(title=peer.ae_title, called=called, file=peer.file)
        return FAILED, f"it fails here; {named}" if named else "it fails here"
    return None


def _has_certificate(so_far: list[Step], peer: Peer) -> bool:
    return any(s.step == "handshake" and peer.holds(s.proof()) for s in so_far)


def _may_come_from(address: str, peer: Peer) -> bool:
    try:
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return not peer.networks or any(host in net for net in peer.networks)


def _nothing(config: Config, peer: Peer, seen: bool) -> str:
    if seen:
        return f"others connected, and {peer.ae_title} did not"
    ports = ", ".join(_ports(config, peer))
    return (
        f"nothing connected to {ports}: is the gate running, does the device have this address and port, "
        "and does a firewall stand between?"
    )
