"""What a scanner sees of a DICOM server: connections without TLS, without a certificate, with old TLS. For own servers.

Each question is a connection of its own with a few seconds, and nothing is stored: an association that is granted is
aborted at once. Sources: PS3.8 section 9.3; RFC 5246 and RFC 4346 (ClientHello).
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time
import warnings

import msgspec
from cryptography import x509
from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import build_context

from storescp.doctor.facts import Unseen
from storescp.errors import StrongroomError
from storescp.gate import wire
from storescp.gate.transfer import VERIFICATION
from storescp.part10 import IMPLEMENTATION_CLASS_UID

SECONDS = 5.0
CALLING, CALLED = "STRONGROOM-SCAN", "ANY-SCP"
ACCEPTED, REJECTED, ABORTED, CLOSED, SILENT, TLS, OTHER = (
    "accepted",
    "rejected",
    "aborted",
    "closed",
    "silent",
    "tls",
    "other",
)
_REASONS = {(1, 2): "application context", (1, 3): "calling AE title", (1, 7): "called AE title"}
_LONGEST = 1 << 16
# With ECDHE or RSA, CBC or 3DES: what old servers take; none has an AEAD.
_OLD_SUITES = (0xC00A, 0xC014, 0xC009, 0xC013, 0xC023, 0xC027, 0x0035, 0x002F, 0x003C, 0x000A)
_RSA_SUITES = (0x009D, 0x009C)
OLD_SUITES = "TLS 1.2 without AES-GCM or forward secrecy"
OLD = {
    "TLS 1.0": (0x0301, _OLD_SUITES),
    "TLS 1.1": (0x0302, _OLD_SUITES),
    OLD_SUITES: (0x0303, _OLD_SUITES + _RSA_SUITES),
}
_ALERT, _HANDSHAKE, _SERVER_HELLO = 0x15, 0x16, 2


class Reply(msgspec.Struct, frozen=True):
    """What came for an association request: one of the words above, and more in words."""

    kind: str
    detail: str = ""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What a TLS server showed: the version and suite that were agreed, and its certificate."""

    version: str
    suite: str
    certificate: x509.Certificate


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of a server: without TLS, with TLS but no certificate, and of each old way whether it takes it."""

    plain: Reply
    bare: Reply
    shown: Shown | Unseen
    old: dict[str, bool | Unseen]


def look(host: str, port: int, seconds: float = SECONDS) -> Seen:
    """Look at a server from outside.

    Args:
        host: Its name or address.
        port: Its port.
        seconds: How long each question may take.

    Raises:
        StrongroomError: Nobody listens there.
    """
    with _connected(host, port, seconds) as connection:
        plain = _asked(connection, seconds)
    bare, shown = _without_certificate(host, port, seconds)
    old = {name: _takes(host, port, version, suites, seconds) for name, (version, suites) in OLD.items()}
    return Seen(plain=plain, bare=bare, shown=shown, old=old)


def request(calling: str = CALLING, called: str = CALLED) -> bytes:
    """Return an A-ASSOCIATE-RQ PDU that asks for verification (C-ECHO) only."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = UID("1.2.840.10008.3.1.1.1")
    primitive.calling_ae_title = calling
    primitive.called_ae_title = called
    context = build_context(VERIFICATION)
    context.context_id = 1
    primitive.presentation_context_definition_list = [context]
    length = MaximumLengthNotification()
    length.maximum_length_received = 16_384
    class_uid = ImplementationClassUIDNotification()
    class_uid.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
    primitive.user_information = [length, class_uid]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(primitive)
    encoded: bytes = pdu.encode()
    return encoded


def reply_of(content: bytes) -> Reply:
    """Return what the bytes that answered an association request mean; any bytes mean something."""
    if len(content) < 6:
        return Reply(OTHER, f"{len(content)} bytes that are no DICOM") if content else Reply(CLOSED)
    kind = content[0]
    if kind in {_ALERT, _HANDSHAKE} and content[1] == 3:
        return Reply(TLS)
    if content[1] != 0:
        return Reply(OTHER, "bytes that are no DICOM")
    if kind == wire.ASSOCIATE_AC:
        return Reply(ACCEPTED)
    if kind == wire.ASSOCIATE_RJ:
        reason = _REASONS.get((content[8], content[9])) if len(content) >= 10 else None
        return Reply(REJECTED, f"for the {reason}" if reason else "")
    return Reply(ABORTED) if kind == wire.ABORT else Reply(OTHER, "bytes that are no DICOM")


def client_hello(version: int, suites: tuple[int, ...]) -> bytes:
    """Return a ClientHello of one version at most (0x0301 to 0x0303) with cipher suites, in a record."""
    offered = b"".join(struct.pack(">H", suite) for suite in suites)
    groups = struct.pack(">HHHHHH", 10, 8, 6, 29, 23, 24)
    points = struct.pack(">HHBB", 11, 2, 1, 0)
    schemes = struct.pack(">HHHHHHHH", 13, 12, 10, 0x0403, 0x0401, 0x0501, 0x0203, 0x0201)
    extensions = groups + points + (schemes if version == 0x0303 else b"")
    body = struct.pack(">H", version) + os.urandom(32) + b"\0"
    body += struct.pack(">H", len(offered)) + offered + b"\x01\x00"
    body += struct.pack(">H", len(extensions)) + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return struct.pack(">BHH", _HANDSHAKE, min(version, 0x0301), len(message)) + message


def takes_of(content: bytes, version: int) -> bool:
    """Tell whether the bytes that answered a ClientHello begin a ServerHello of its version."""
    hello = len(content) >= 11 and content[0] == _HANDSHAKE and content[5] == _SERVER_HELLO
    return hello and int.from_bytes(content[9:11], "big") == version


def _connected(host: str, port: int, seconds: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=seconds)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise StrongroomError(
            f"{host} port {port} cannot be reached: {said}",
            hint="name a host and a port where a server of yours listens",
        ) from error


def _asked(connection: socket.socket, seconds: float) -> Reply:
    """Ask for an association on a connection and say what comes."""
    try:
        connection.sendall(request())
        content = _answer(connection, seconds, 10)
    except TimeoutError:
        return Reply(SILENT)
    except ssl.SSLError as error:
        return Reply(CLOSED, _word(error))
    except OSError:
        return Reply(CLOSED)
    reply = reply_of(content)
    if reply.kind == ACCEPTED:
        with contextlib.suppress(OSError):
            connection.sendall(wire.abort(reason=0, by_user=True))
    return reply


def _without_certificate(host: str, port: int, seconds: float) -> tuple[Reply, Shown | Unseen]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # It is looked at, not trusted: nothing is sent that anybody may not read.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with warnings.catch_warnings():
        # Python calls versions before 1.2 deprecated; that is what is asked about elsewhere.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.set_ciphers("ALL:@SECLEVEL=0")
    with _connected(host, port, seconds) as raw:
        try:
            connection = context.wrap_socket(raw, server_hostname=host)
        except TimeoutError:
            return Reply(SILENT), Unseen("the TLS handshake was not answered")
        except OSError as error:
            return Reply(CLOSED, _word(error)), Unseen(f"the TLS handshake failed: {_word(error) or 'it was closed'}")
        with connection:
            shown = _shown(connection)
            return _asked(connection, seconds), shown


def _shown(connection: ssl.SSLSocket) -> Shown | Unseen:
    content = connection.getpeercert(binary_form=True)
    suite = connection.cipher()
    try:
        certificate = x509.load_der_x509_certificate(content or b"")
    except (ValueError, x509.InvalidVersion) as error:
        return Unseen(f"its certificate cannot be read: {error}")
    return Shown(version=connection.version() or "", suite=suite[0] if suite else "", certificate=certificate)


def _takes(host: str, port: int, version: int, suites: tuple[int, ...], seconds: float) -> bool | Unseen:
    try:
        with _connected(host, port, seconds) as connection:
            connection.sendall(client_hello(version, suites))
            return takes_of(_answer(connection, seconds, 11), version)
    except TimeoutError:
        return Unseen("it did not answer")
    except (StrongroomError, OSError) as error:
        # Whoever closes at once does not take it.
        return Unseen(str(error)) if isinstance(error, StrongroomError) else False


def _answer(connection: socket.socket, seconds: float, least: int) -> bytes:
    """Return at least so many bytes of an answer, or what came until the connection ended.

    Raises:
        TimeoutError: Nothing came in time.
    """
    content = b""
    deadline = time.monotonic() + seconds
    while len(content) < least:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        connection.settimeout(left)
        try:
            part = connection.recv(_LONGEST)
        except TimeoutError:
            break
        except ConnectionResetError:
            return content
        if not part:
            return content
        content += part
    if not content:
        raise TimeoutError
    return content


def _word(error: OSError) -> str:
    return (getattr(error, "reason", None) or "").replace("_", " ").lower()
