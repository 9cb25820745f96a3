"""What about the gate's certificates and lists an admin should know in time: the gate's log and ``status`` say it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta

from cryptography import x509

from storescp import peers
from storescp.config import Config
from storescp.gate.crl import CrlError
from storescp.gate.tls import Trust
from storescp.snapshot import Ends

# A certificate takes a vendor's visit to replace; a revocation list warns seven days before (crl.py).
_SOON = timedelta(days=30)


def warnings(config: Config, now: datetime) -> list[str]:
    """Return what expires soon or has expired, what cannot be used, and where there is no TLS.

    Args:
        config: The configuration; its files are read.
        now: UTC, with its zone.
    """
    return [*_lists(config, now), *_certificates(config, now), *_plaintext(config)]


def ends(config: Config) -> list[Ends]:
    """Return until when each certificate and list is good, for whoever watches; what cannot be read is left out.

    Of a chain the first end counts, of a peer's certificates the last one; a list without an end has none.
    """
    found = []
    for file in (config.certificate, *config.trust):
        with contextlib.suppress(OSError, ValueError, x509.InvalidVersion):
            until = min(c.not_valid_after_utc for c in x509.load_pem_x509_certificates(file.read_bytes()))
            found.append(Ends("server" if file == config.certificate else "authority", file.name, until.timestamp()))
    for file in config.crls:
        with contextlib.suppress(OSError, ValueError):
            content = file.read_bytes()
            load = x509.load_pem_x509_crl if content.lstrip().startswith(b"-----") else x509.load_der_x509_crl
            if (following := load(content).next_update_utc) is not None:
                found.append(Ends("crl", file.name, following.timestamp()))
    for peer in peers.read_good(config.peers)[0].by_title.values():
        if peer.certificates:
            until = max(_loaded(pem).not_valid_after_utc for pem in peer.certificates)
            found.append(Ends("peer", peer.ae_title, until.timestamp()))
    return found


def _lists(config: Config, now: datetime) -> list[str]:
    try:
        return Trust(config.trust, config.crls).revocations.warnings(now)
    except (CrlError, OSError) as error:
        return [f"authorities or revocation lists cannot be used: {error}"]


def _certificates(config: Config, now: datetime) -> Iterator[str]:
    for file in (config.certificate, *config.trust):
        what = "the server's certificate" if file == config.certificate else "the authority"
        try:
            loaded = x509.load_pem_x509_certificates(file.read_bytes())
        except (OSError, ValueError, x509.InvalidVersion) as error:
            yield f"{what} {file} cannot be read: {error}"
            continue
        for certificate in loaded:
            if said := _ends(certificate, now):
                yield f"{what} {file} {said}"
    found, errors = peers.read_good(config.peers)
    yield from errors
    for peer in found.by_title.values():
        # Of two, the older one is about to go anyway.
        newest = max((_loaded(pem) for pem in peer.certificates), key=lambda c: c.not_valid_after_utc, default=None)
        if newest is not None and (said := _ends(newest, now)):
            yield f"the certificate of peer {peer.ae_title} {said}; 'strongroom peer renew' issues another"


def _plaintext(config: Config) -> Iterator[str]:
    for listener in config.settings.gate.plaintext:
        yield f"{listener.listen} listens WITHOUT TLS for {', '.join(listener.peers)}: {listener.plaintext}"


def _ends(certificate: x509.Certificate, now: datetime) -> str:
    until = certificate.not_valid_after_utc
    when = until.strftime("%Y-%m-%dT%H:%M:%SZ")
    if now > until:
        return f"HAS EXPIRED on {when}"
    return f"expires on {when}" if now > until - _SOON else ""


def _loaded(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())
