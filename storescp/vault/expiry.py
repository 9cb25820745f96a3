"""Which certificates and revocation lists end soon, of those that the vault may read; the gate's log tells of all.

Where vault and gate are two users, the server's certificate and the lists are closed to the vault: that is said, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509

from keys.keyring import Authority
from storescp import clock, peers
from storescp.config import Config
from storescp.errors import plural

# A certificate takes a vendor's visit to replace, a revocation list its authority's next one.
_CERTIFICATE = timedelta(days=30)
_LIST = timedelta(days=7)

Event = dict[str, Any]
_Source = tuple[str, Callable[[], datetime | None], timedelta]


def ending(config: Config, authority: Authority | None, now: datetime) -> Iterator[Event]:
    """Yield a finding for whatever has expired, ends soon or cannot be read, and at last what was looked at.

    Args:
        config: Its files are read.
        authority: The store's own.
        now: UTC, with its zone.
    """
    found, errors = peers.read_good(config.peers)
    yield from ({"kind": "finding", "text": error} for error in errors)
    seen, closed = 0, []
    for name, read, soon in _sources(config, authority, found):
        try:
            ends = read()
        except PermissionError:
            closed.append(name)
            continue
        except (OSError, ValueError, x509.InvalidVersion) as error:
            yield {"kind": "finding", "text": f"{name} cannot be read: {error}"}
            continue
        seen += 1
        if said := _said(ends, soon, now):
            yield {"kind": "finding", "text": f"{name} {said}"}
    beside = f"; the gate's log tells of what is closed to the vault: {', '.join(closed)}" if closed else ""
    looked = plural(seen, "certificate or list", "certificates and lists")
    yield {"kind": "step", "text": f"looked at {looked}{beside}"}


def _sources(config: Config, authority: Authority | None, found: peers.Peers) -> Iterator[_Source]:
    """Yield what there is, by its name, how it is read, and how long before its end somebody should know."""
    yield "the server's certificate", partial(_certificate, config.certificate), _CERTIFICATE
    for file in config.trust:
        yield f"the authority {file.name}", partial(_certificate, file), _CERTIFICATE
    for file in config.crls:
        yield f"the revocation list {file.name}", partial(_list, file), _LIST
    if authority is not None:
        yield "the store's own authority", partial(_first, authority.certificate.encode()), _CERTIFICATE
    for peer in found.by_title.values():
        if peer.certificates:
            yield f"the certificate of peer {peer.ae_title}", partial(_last, peer.certificates), _CERTIFICATE


def _certificate(file: Path) -> datetime:
    return _first(file.read_bytes())


def _first(pem: bytes) -> datetime:
    """Return when the first one of a chain ends to be good."""
    return min(certificate.not_valid_after_utc for certificate in x509.load_pem_x509_certificates(pem))


def _last(pems: tuple[str, ...]) -> datetime:
    """Return when the last one ends to be good: of two, the older one is about to go anyway."""
    return max(x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc for pem in pems)


def _list(file: Path) -> datetime | None:
    content = file.read_bytes()
    load = x509.load_pem_x509_crl if content.lstrip().startswith(b"-----") else x509.load_der_x509_crl
    return load(content).next_update_utc


def _said(until: datetime | None, soon: timedelta, now: datetime) -> str:
    if until is None:
        return "does not say until when it holds"
    if now > until:
        return f"HAS EXPIRED on {clock.text(until)}"
    return f"ends on {clock.text(until)}" if now > until - soon else ""
