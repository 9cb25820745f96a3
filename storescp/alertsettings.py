"""``[alerts]``: to whom alerts are sent, how, and how often."""

from __future__ import annotations

import re
from datetime import timedelta
from urllib.parse import urlsplit

import msgspec

from storescp.patch.settings import duration

CREDENTIAL = "credential:"
# Quotes, comments and whatever else RFC 5322 allows beyond this has no place in a configuration.
_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,45}", re.ASCII)
_PRINTED = re.compile(r"[!-~]{1,2000}", re.ASCII)
_MOST = 20


class Mail(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A mail server that speaks TLS, and who writes to whom; without a host no mail is sent."""

    host: str = ""
    port: int = 465
    tls: str = "implicit"
    sender: str = ""
    recipients: list[str] = msgspec.field(default_factory=list)
    user: str = ""
    password_file: str = ""


class AlertSettings(msgspec.Struct, kw_only=True):
    """Where alerts go besides the log, and when."""

    mail: Mail = msgspec.field(default_factory=Mail)
    webhooks: list[str] = msgspec.field(default_factory=list)
    trust: str = ""
    repeat: str = "P1D"
    locked_after: str = "PT5M"

    @property
    def sends(self) -> bool:
        """Whether there is anybody to send alerts to."""
        return bool(self.mail.host or self.webhooks)

    def repeat_after(self) -> timedelta:
        """Return when an alert that still stands is told again."""
        return duration(self.repeat)

    def locked_for(self) -> timedelta:
        """Return how long the vault may be locked without an alert."""
        return duration(self.locked_after)


EXPLAINED = {
    "alerts": "What is wrong is told in the log, and to whom is named here: once, again each 'repeat' while it lasts,\n"
    "and when it is over (docs/alerts.md). No alert names a patient. 'strongroom alerts test' tries every way.",
    "alerts.mail": 'Mail, over TLS alone. Without a host none is sent. tls: "implicit" (port 465), "starttls" (587).\n'
    "password_file: a file with mode 0600, or 'credential:NAME', a systemd credential.\n"
    'mail = { host = "mail.example", sender = "strongroom@mail.example", recipients = ["pacs@mail.example"] }',
    "alerts.webhooks": 'URLs, "https://...", that alerts are sent to as JSON (POST). Redirects are not followed.',
    "alerts.trust": "Certificates of authorities, PEM, that these servers may have besides the system's.",
    "alerts.repeat": "How often an alert is told again while it lasts: an ISO 8601 duration, PT1H to P365D.",
    "alerts.locked_after": "How long the vault may be locked before that is an alert: PT0M to P365D.",
}


def check(settings: AlertSettings) -> list[str]:
    """Return what is wrong with the settings, each error with its key."""
    errors = _check_mail(settings.mail)
    for number, url in enumerate(settings.webhooks):
        if problem := _url_problem(url):
            errors.append(f"alerts.webhooks[{number}]: {problem}")
    if len(set(settings.webhooks)) != len(settings.webhooks):
        errors.append("alerts.webhooks: names one twice")
    if len(settings.webhooks) > _MOST:
        errors.append(f"alerts.webhooks: names more than {_MOST}")
    errors += _check_duration("repeat", settings.repeat, timedelta(hours=1), "PT1H")
    errors += _check_duration("locked_after", settings.locked_after, timedelta(0), "PT0M")
    return errors


def _check_mail(mail: Mail) -> list[str]:
    if not mail.host:
        return [] if mail == Mail() else ["alerts.mail.host: missing: name the mail server"]
    errors = []
    if not _HOST.fullmatch(mail.host):
        errors.append(f"alerts.mail.host: '{mail.host}' is no name or address of a server")
    if not 1 <= mail.port <= 65_535:
        errors.append("alerts.mail.port: must be from 1 to 65535")
    if mail.tls not in {"implicit", "starttls"}:
        errors.append("alerts.mail.tls: must be implicit or starttls; without TLS no mail is sent")
    if not _ADDRESS.fullmatch(mail.sender):
        errors.append(f"alerts.mail.sender: '{mail.sender}' is no address, as in strongroom@mail.example")
    if not 1 <= len(mail.recipients) <= _MOST:
        errors.append(f"alerts.mail.recipients: must name from 1 to {_MOST}")
    errors += [
        f"alerts.mail.recipients: '{text}' is no address, as in pacs@mail.example"
        for text in mail.recipients
        if not _ADDRESS.fullmatch(text)
    ]
    if bool(mail.user) != (mail.password_file not in {"", CREDENTIAL}):
        errors.append("alerts.mail.user: user and password_file go together")
    return errors


def _url_problem(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
        port = parts.port
    except ValueError:
        return "is no URL"
    # A URL may hold a token, and what is said here is logged: it is not repeated.
    if parts.scheme != "https":
        return "must begin with https://: without TLS no alert is sent"
    if not host or not _HOST.fullmatch(host) or port == 0 or not _PRINTED.fullmatch(url):
        return "is no URL with a server's name, as in https://alerts.example/hook"
    if user is not None or parts.fragment:
        return "holds no user, password or fragment"
    return ""


def _check_duration(name: str, text: str, least: timedelta, said: str) -> list[str]:
    try:
        good = least <= duration(text) <= timedelta(days=365)
    except ValueError:
        return [f"alerts.{name}: '{text}' is no duration, as in P1D or PT5M"]
    return [] if good else [f"alerts.{name}: must be from {said} to P365D"]
