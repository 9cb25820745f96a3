"""The gate's listening sockets: bound by itself, or passed by systemd from a socket unit (sd_listen_fds(3)).

A passed socket is taken only for an address that the configuration names: what listens is what is configured, whoever
bound it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, MutableMapping
from typing import NamedTuple

from storescp.errors import USAGE, StrongroomError

_BACKLOG = 128
_FIRST = 3
# More than a configuration has listeners by far; a number from outside needs a bound.
_MOST = 256
_HINT = (
    "'strongroom install' writes the socket unit as the configuration is; "
    "docs/install.md, 'The gate's socket', has the commands after it"
)

Address = tuple[str, int]


class Passed(NamedTuple):
    """A descriptor that was passed, and the name that its unit gives it."""

    descriptor: int
    name: str


def passed(environment: MutableMapping[str, str], pid: int) -> list[Passed]:
    """Return which descriptors were passed to this process, and take the variables away: children got none.

    Args:
        environment: With ``LISTEN_FDS``, ``LISTEN_PID`` and ``LISTEN_FDNAMES``, or without.
        pid: This process.

    Raises:
        StrongroomError: The variables are for this process and make no sense.
    """
    count, whose, names = (environment.pop(f"LISTEN_{key}", "") for key in ("FDS", "PID", "FDNAMES"))
    if not count or whose != str(pid):
        return []
    if not (count.isascii() and count.isdigit() and int(count) <= _MOST):
        raise StrongroomError(f"LISTEN_FDS is '{count[:20]}': that is no number of sockets", status=USAGE)
    named = names.split(":") if names else []
    return [
        Passed(_FIRST + place, named[place] if place < len(named) and named[place] else "unknown")
        for place in range(int(count))
    ]


def adopt(given: Iterable[Passed], wanted: Iterable[Address]) -> dict[Address, socket.socket]:
    """Return the passed sockets by the address that each listens on.

    Args:
        given: What was passed.
        wanted: The addresses that the configuration names.

    Raises:
        StrongroomError: One is no listening TCP socket, or listens where the configuration does not. All are closed.
    """
    addresses = set(wanted)
    taken: dict[Address, socket.socket] = {}
    faults: list[str] = []
    for descriptor, name in given:
        what = f"the passed socket '{name}' (descriptor {descriptor})"
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:
            faults.append(f"{what} is no socket")
            continue
        address, fault = _address(sock)
        if not fault and address not in addresses:
            fault = f"listens on {text(address)}, which neither gate.listen nor gate.plaintext names"
        if not fault and address in taken:
            fault = f"listens on {text(address)}, as another one does"
        if fault:
            sock.close()
            faults.append(f"{what} {fault}")
            continue
        sock.set_inheritable(False)
        sock.setblocking(False)
        taken[address] = sock
    if faults:
        for sock in taken.values():
            sock.close()
        message = "\n".join(["the gate takes no socket that its configuration does not name", *faults])
        raise StrongroomError(message, hint=_HINT, status=USAGE)
    return taken


def take(wanted: Iterable[Address]) -> dict[Address, socket.socket]:
    """Return the sockets that systemd passed to this process, by address.

    Raises:
        StrongroomError: One of them is not for the gate.
    """
    return adopt(passed(os.environ, os.getpid()), wanted)


def bind(host: str, port: int) -> socket.socket:
    """Return a new listening socket.

    Raises:
        OSError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        sock.bind((host, port))
        sock.setblocking(False)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, text((host, port))) from error
    return sock


def text(address: Address) -> str:
    """Return an address as the configuration writes it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(sock: socket.socket) -> tuple[Address, str]:
    """Return where a socket listens, and why it is none to listen on; empty where it is one."""
    nowhere = ("", 0)
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type != socket.SOCK_STREAM:
        return nowhere, "is no TCP socket"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return nowhere, "does not listen"
    host, port = sock.getsockname()[:2]
    found = (str(ipaddress.ip_address(host.partition("%")[0])), port)
    # [::] of both families would be open on IPv4, too, where nobody configured anything.
    if sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return found, f"listens on {text(found)} for IPv4 as well: its unit needs BindIPv6Only=ipv6-only"
    return found, ""
