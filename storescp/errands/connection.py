"""Connections to servers of others: TLS with a verified certificate, an end in time and in bytes, one kind of error."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import h11

from storescp.errors import StrongroomError

# For each step, and for all of them together, however slowly they come.
STEP_SECONDS = 15.0
WHOLE_SECONDS = 60.0
ANSWER_LIMIT = 64 << 10
_SAID_LIMIT = 200


class DeliveryError(Exception):
    """An alert could not be delivered; the message says why, without anything secret."""


def tls_context(trust: Path | None) -> ssl.SSLContext:
    """Return how servers are checked: the system's authorities, and those in a file.

    Raises:
        StrongroomError: The file cannot be read, or holds none.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if trust is not None:
        try:
            context.load_verify_locations(cafile=trust)
        except (OSError, ssl.SSLError) as error:
            raise StrongroomError(f"alerts.trust: {trust} cannot be read: {error.strerror or error}") from error
    return context


class Connection:
    """A connection that ends in time whatever the other side does."""

    def __init__(self, host: str, socket_: socket.socket) -> None:
        self._host = host
        self.socket = socket_

    def literal(self) -> str:
        """Return this end's address as SMTP has it (RFC 5321, 4.1.3)."""
        address = self.socket.getsockname()[0]
        return f"[IPv6:{address}]" if self.socket.family == socket.AF_INET6 else f"[{address}]"

    def secure(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        """Go on in TLS, with a certificate that is the server's."""
        tls = context.wrap_socket(self.socket, server_hostname=self._host, do_handshake_on_connect=False)
        self.socket = tls
        tls.do_handshake()
        return tls

    def end(self) -> None:
        """Let whatever waits for the other side fail."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, which takes TLS away from whoever reads at this moment.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


@contextlib.contextmanager
def connected(host: str, port: int) -> Iterator[Connection]:
    """Connect to a server, for WHOLE_SECONDS at most.

    Raises:
        OSError: It cannot be reached.
    """
    connection = Connection(host, socket.create_connection((host, port), timeout=STEP_SECONDS))
    # A time-out for each step does not bound a server that sends a byte each second.
    watch = threading.Timer(WHOLE_SECONDS, connection.end)
    watch.daemon = True
    watch.start()
    try:
        yield connection
    finally:
        watch.cancel()
        connection.socket.close()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn whatever a network and a server can do into one error."""
    try:
        yield
    except smtplib.SMTPResponseException as error:
        raise DeliveryError(f"the server answers {error.smtp_code}: {_said(error.smtp_error)}") from error
    except smtplib.SMTPRecipientsRefused as error:
        codes = ", ".join(sorted({str(code) for code, _ in error.recipients.values()}))
        raise DeliveryError(f"the server refuses every recipient ({codes})") from error
    except ssl.SSLCertVerificationError as error:
        raise DeliveryError(f"the server's certificate does not hold: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise DeliveryError(f"no TLS with the server: {error.reason or type(error).__name__}") from error
    except TimeoutError as error:
        raise DeliveryError("the server takes too long") from error
    except smtplib.SMTPNotSupportedError as error:
        raise DeliveryError("the server offers no way to log in") from error
    except smtplib.SMTPServerDisconnected as error:
        raise DeliveryError("the server ends the connection") from error
    except (smtplib.SMTPException, h11.ProtocolError) as error:
        raise DeliveryError(f"the server does not keep to the protocol: {type(error).__name__}") from error
    except (OSError, UnicodeError) as error:
        said = error.strerror if isinstance(error, OSError) else ""
        raise DeliveryError(f"the server cannot be reached: {(said or type(error).__name__).lower()}") from error


class Lines:
    """What a server says: there is an end to it."""

    def __init__(self, socket_: socket.socket) -> None:
        self._file = socket_.makefile("rb")
        self._left = ANSWER_LIMIT

    def readline(self, size: int) -> bytes:
        """Return a line, or as much of it.

        Raises:
            OSError: There were too many.
        """
        line = self._file.readline(size)
        self._left -= len(line)
        if self._left < 0:
            raise OSError("the server's answers have no end")
        return line

    def close(self) -> None:
        """Let go of the connection."""
        self._file.close()


def _said(text: bytes | str) -> str:
    return (text.decode("ascii", "replace") if isinstance(text, bytes) else text)[:_SAID_LIMIT].replace("\n", " ")
