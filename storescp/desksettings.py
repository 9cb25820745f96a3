"""``[desk]``: where studies are asked for and given back, off by default."""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class DeskSettings(msgspec.Struct, kw_only=True):
    """The desk; without an address it does not run, and the vault opens no socket for it."""

    user: str = ""
    listen: list[str] = msgspec.field(default_factory=list)
    web: list[str] = msgspec.field(default_factory=list)
    viewer: str = ""
    socket: str = "spool/desk/desk.sock"
    certificate: str = ""
    private_key: str = ""
    maximum_associations: int = 20
    idle_seconds: int = 60
    queries_per_minute: int = 600
    instances_per_hour: int = 50_000

    @property
    def runs(self) -> bool:
        """Whether there is a desk."""
        return bool(self.listen or self.web)


EXPLAINED = {
    "desk": "Finding and fetching studies (docs/desk.md), by a process of its own that has no key of the store: the\n"
    "vault decides each request and hands over what that request needs. Off by default.",
    "desk.user": "The desk's own user, where it runs as another one than the vault; its group may use that socket.",
    "desk.listen": 'Addresses for C-FIND, C-MOVE, C-GET and C-ECHO over TLS, as "127.0.0.1:2763"; empty for none.',
    "desk.web": 'Addresses for DICOMweb over HTTPS with client certificates, as "127.0.0.1:8443"; empty for none.',
    "desk.viewer": "A folder with a built OHIF viewer, served beside DICOMweb (docs/dicomweb.md); empty for none.",
    "desk.socket": "The Unix socket on which the vault answers the desk, at most 100 characters.",
    "desk.certificate": "The desk's own certificate, PEM with its chain; empty for the gate's.",
    "desk.private_key": "Its private key, PEM; empty for the gate's.",
    "desk.maximum_associations": "How many connections at a time; more are closed.",
    "desk.idle_seconds": "How long an association may be quiet before it is aborted.",
    "desk.queries_per_minute": "How much the vault answers of each peer, whatever the desk asks: queries a minute,\n"
    "0 for no limit,",
    "desk.instances_per_hour": "and instances an hour, 0: no limit. What is beyond is refused, and an alert.",
}

_BOUNDS = {
    "maximum_associations": (1, 1000),
    "idle_seconds": (1, 86_400),
    "queries_per_minute": (0, 1_000_000),
    "instances_per_hour": (0, 1_000_000_000),
}


def check(settings: DeskSettings, parse_address: Callable[[str], tuple[str, int]]) -> list[str]:
    """Return what is wrong with the settings, each error with its key.

    Args:
        settings: What the file says.
        parse_address: Takes an address with a port apart; raises ValueError for any other text.
    """
    errors = []
    for key in ("listen", "web"):
        for text in getattr(settings, key):
            try:
                parse_address(text)
            except ValueError:
                errors.append(f"desk.{key}: '{text}' is no address with a port, as in 127.0.0.1:2763 or [::1]:2763")
    # A port that the system chooses is another one each time.
    both = sorted(text for text in set(settings.listen) & set(settings.web) if not text.endswith(":0"))
    errors += [f"desk.web: '{text}' is also in desk.listen" for text in both]
    if settings.viewer and not settings.web:
        errors.append("desk.viewer: goes with desk.web")
    if bool(settings.certificate) != bool(settings.private_key):
        errors.append("desk.certificate: goes with desk.private_key: name both, or neither")
    for name, (low, high) in _BOUNDS.items():
        if not low <= getattr(settings, name) <= high:
            errors.append(f"desk.{name}: must be from {low} to {high}")
    return errors
