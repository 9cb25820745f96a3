"""``[metrics]``: where numbers for monitoring are served, off by default."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class MetricsSettings(msgspec.Struct, kw_only=True):
    """Where the numbers are served; without an address nothing is counted for them, written or opened."""

    listen: str = ""
    seconds: int = 15


EXPLAINED = {
    "metrics": "Numbers for Prometheus (docs/metrics.md), served by a process of its own that holds no key: receive\n"
    "rates, refusals, what waits, jobs, key ages, certificates, disk. AE titles are in them, patients never.",
    "metrics.listen": 'Address and port, as "127.0.0.1:9464"; empty for none. There is no TLS, and nobody logs in:\n'
    "another address than this machine's own needs a firewall in front of it.",
    "metrics.seconds": "How often gate and vault write their numbers anew, in seconds, 1 to 300.",
}


def check(settings: MetricsSettings, parse_address: Callable[[str], tuple[str, int]]) -> list[str]:
    """Return what is wrong with the settings, each error with its key.

    Args:
        settings: What the file says.
        parse_address: Takes an address with a port apart; raises ValueError for any other text.
    """
    errors = []
    if settings.listen:
        try:
            parse_address(settings.listen)
        except ValueError:
            errors.append(f"metrics.listen: '{settings.listen}' is no address with a port, as in 127.0.0.1:9464")
    if not 1 <= settings.seconds <= 300:
        errors.append("metrics.seconds: must be from 1 to 300")
    return errors
