"""The ways that an alert takes: mail and webhooks. TLS with a verified certificate or nothing, bounded in time."""

from __future__ import annotations

import contextlib
import email.message
import email.utils
import hashlib
import json
import os
import smtplib
import socket
import ssl
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import h11

from keys.secret import CredentialError, credential_content
from storescp import __version__
from storescp.alertsettings import Mail
from storescp.config import Config
from storescp.errands.connection import (
    ANSWER_LIMIT,
    STEP_SECONDS,
    Connection,
    DeliveryError,
    Lines,
    connected,
    tls_context,
    told,
)

_PASSWORD_LIMIT = 1024
_READY = 220


class Message(NamedTuple):
    """What is sent: for people a subject and lines, for programs a document."""

    subject: str
    lines: list[str]
    document: dict[str, Any]


class Way(Protocol):
    """A way to tell somebody. ``key`` stays while the way does; ``label`` is for the log and holds no secret."""

    key: str
    label: str

    def deliver(self, message: Message) -> str:
        """Deliver a message; return what is to be said of it besides, mostly nothing.

        Raises:
            DeliveryError: It was not taken.
        """


def ways_of(config: Config) -> list[Way]:
    """Return the ways that are configured.

    Raises:
        StrongroomError: The authorities in ``alerts.trust`` cannot be read.
    """
    settings = config.settings.alerts
    if not settings.sends:
        return []
    context = tls_context(config.alert_trust)
    ways: list[Way] = [Webhook(url, context) for url in settings.webhooks]
    if settings.mail.host:
        ways.insert(0, MailWay(settings.mail, context, config))
    return ways


class MailWay:
    """Mail through one server, by SMTP inside TLS; nothing is said to a server that does not speak it."""

    def __init__(self, mail: Mail, context: ssl.SSLContext, config: Config) -> None:
        self._mail = mail
        self._context = context
        self._password_file = config.mail_password_file
        self._credential = config.mail_credential
        self.key = "mail"
        self.label = f"mail to {len(mail.recipients)} by {mail.host}:{mail.port}"

    def deliver(self, message: Message) -> str:
        """Deliver a message; the server has taken it for at least one recipient when this returns."""
        mail = self._mail
        content = _rfc_5322(message, mail)
        with told(), connected(mail.host, mail.port) as connection:
            # Its own way to a name asks the name service, which may take its time.
            smtp = smtplib.SMTP(local_hostname=connection.literal(), timeout=STEP_SECONDS)
            try:
                if mail.tls == "implicit":
                    _over(smtp, connection.secure(self._context))
                    _greeted(smtp)
                else:
                    _over(smtp, connection.socket)
                    _greeted(smtp)
                    self._start_tls(smtp, connection)
                if mail.user:
                    # Read each time: a new password needs no restart.
                    smtp.login(mail.user, self._password())
                refused = smtp.send_message(content)
                with contextlib.suppress(smtplib.SMTPException, OSError):
                    smtp.quit()
            finally:
                smtp.close()
        return f"{len(refused)} of {len(mail.recipients)} recipients were refused" if refused else ""

    def _start_tls(self, smtp: smtplib.SMTP, connection: Connection) -> None:
        smtp.ehlo()
        if not smtp.has_extn("starttls") or smtp.docmd("STARTTLS")[0] != _READY:
            raise DeliveryError("the server offers no STARTTLS; without TLS no mail is sent")
        # What came before TLS counts for nothing (RFC 3207, 4.2), nor what somebody put behind the answer.
        _over(smtp, connection.secure(self._context))
        smtp.helo_resp = smtp.ehlo_resp = None
        smtp.esmtp_features = {}
        smtp.does_esmtp = False

    def _password(self) -> str:
        try:
            if self._password_file is None:
                content = credential_content(self._credential)
            else:
                with self._password_file.open("rb") as file:
                    if os.fstat(file.fileno()).st_mode & 0o077:
                        raise DeliveryError(f"{self._password_file} is open to others: chmod 600 it")
                    content = file.read(_PASSWORD_LIMIT)
            password = content.decode("utf-8").split("\n", 1)[0]
        except (OSError, UnicodeDecodeError, CredentialError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise DeliveryError(f"alerts.mail.password_file cannot be read: {said}") from error
        if not password or not password.isascii():
            raise DeliveryError("alerts.mail.password_file holds no password of ASCII characters in its first line")
        return password


class Webhook:
    """A URL that takes JSON by POST over HTTPS. Where it redirects to is not followed: nobody configured that."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._authority = parts.netloc
        self._context = context
        # A path may be a secret: neither state nor log shows it.
        self.key = f"webhook-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self.label = f"webhook at {self._host}:{self._port}"

    def deliver(self, message: Message) -> str:
        """Deliver a message: the server's answer is a 2xx when this returns."""
        body = json.dumps(message.document, sort_keys=True).encode()
        headers = [
            ("Host", self._authority),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("User-Agent", f"strongroom/{__version__}"),
            ("Connection", "close"),
        ]
        with told(), connected(self._host, self._port) as connection:
            tls = connection.secure(self._context)
            http = h11.Connection(h11.CLIENT)
            for event in (
                h11.Request(method="POST", target=self._target, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                tls.sendall(http.send(event) or b"")
            status = _status(http, tls)
        if not 200 <= status < 300:
            raise DeliveryError(
                f"the server answers {status}" + (": redirects are not followed" if 300 <= status < 400 else "")
            )
        return ""


def _over(smtp: smtplib.SMTP, socket_: socket.socket) -> None:
    smtp.sock = socket_
    smtp.file = Lines(socket_)


def _greeted(smtp: smtplib.SMTP) -> None:
    code, said = smtp.getreply()
    if code != _READY:
        raise smtplib.SMTPConnectError(code, said)


def _status(http: h11.Connection, tls: ssl.SSLSocket) -> int:
    count = 0
    while True:
        event = http.next_event()
        if isinstance(event, h11.Response):
            # What it says besides is nobody's business.
            return event.status_code
        if isinstance(event, h11.ConnectionClosed):
            raise DeliveryError("the server ends the connection without an answer")
        if event is h11.NEED_DATA:
            content = tls.recv(1 << 14)
            count += len(content)
            if count > ANSWER_LIMIT:
                raise DeliveryError("the server's answer has no end")
            http.receive_data(content)


def _rfc_5322(message: Message, mail: Mail) -> email.message.EmailMessage:
    made = email.message.EmailMessage()
    made["Subject"] = message.subject
    made["From"] = mail.sender
    made["To"] = ", ".join(mail.recipients)
    made["Date"] = email.utils.formatdate()
    made["Message-ID"] = email.utils.make_msgid(domain=mail.sender.rpartition("@")[2])
    # No answers from who is on holiday (RFC 3834).
    made["Auto-Submitted"] = "auto-generated"
    made.set_content("\n".join(message.lines) + "\n")
    return made
