"""Secrets: what somebody brings to unlock a store. Passphrases are judged here; key files and credentials are read.

Source: docs/format.md, section 4.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

import msgspec

from keys import encoding

MINIMUM_PASSPHRASE = 12
_KEY_FILE_HEADER = b"STRONGROOM-KEY-FILE-1"
_CREDENTIALS = "CREDENTIALS_DIRECTORY"
# What systemd takes as a credential's name.
_CREDENTIAL_NAME = re.compile(r"(?!\.{1,2}\Z)[!-.0-9;-~]{1,255}")


class WeakPassphraseError(ValueError):
    """A passphrase is too easily guessed; the message says why."""


class KeyFileError(ValueError):
    """A key file cannot be read or is none."""


class CredentialError(KeyFileError):
    """A systemd credential is not here or is no key file."""


class _Quiet(msgspec.Struct):
    # A traceback or a log line that shows a secret's object must not show the secret.
    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("", "...")]


class Passphrase(_Quiet):
    """A passphrase as typed."""

    text: str


class KeyFile(_Quiet):
    """The secret of a key file, 32 bytes."""

    secret: bytes


class Credential(_Quiet):
    """The name of a systemd credential that holds a key file; this process reads it."""

    name: str


class TokenPlace(msgspec.Struct, frozen=True):
    """A PKCS#11 token and a secret key on it.

    Attributes:
        module: Absolute path of the PKCS#11 module.
        token: The token's label.
        key: The key's label; empty for a new slot that shall have a key of its own.
    """

    module: str
    token: str
    key: str = ""


class Token(_Quiet):
    """The PIN of a PKCS#11 token.

    Attributes:
        pin: As typed.
        place: Where a new slot has its key. To unlock, it need not be given; where it is, the PIN is for slots on this
            token alone, and on this key if it names one.
    """

    pin: str
    place: TokenPlace | None = None


Secret = Passphrase | KeyFile | Credential | Token


def check_passphrase(text: str) -> None:
    """Refuse a passphrase that is short or easily guessed.

    Raises:
        WeakPassphraseError: With the reason and what would help.
    """
    if len(text) < MINIMUM_PASSPHRASE:
        raise WeakPassphraseError(
            f"the passphrase has {len(text)} characters; at least {MINIMUM_PASSPHRASE} are needed"
        )
    from zxcvbn import zxcvbn

    # zxcvbn looks at 72 characters at most; a longer passphrase is judged by its beginning.
    result = zxcvbn(text[:72])
    if result["score"] < 4:
        feedback = result["feedback"]
        reason = feedback["warning"].rstrip(".") or "it is guessed too easily"
        hints = " ".join(feedback["suggestions"])
        raise WeakPassphraseError(f"the passphrase is too weak: {reason}. {hints}".rstrip())


def new_key_file() -> bytes:
    """Return the content of a new key file."""
    return _KEY_FILE_HEADER + b"\n" + encoding.to_base64(secrets.token_bytes(32)) + b"\n"


def read_key_file(path: Path) -> KeyFile:
    """Return the secret in a key file.

    Raises:
        KeyFileError: It is missing, readable by others, or no key file.
    """
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            content = file.read(1024)
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(f"the key file {path} is open to others; 'chmod 600 {path}'")
    try:
        return parse_key_file(content)
    except ValueError:
        raise KeyFileError(f"{path} is not a Strongroom key file") from None


def read_credential(name: str) -> KeyFile:
    """Return the secret in a systemd credential of this process.

    Raises:
        CredentialError: It is not here, or is no key file.
    """
    try:
        return parse_key_file(credential_content(name))
    except CredentialError:
        raise
    except ValueError:
        raise CredentialError(f"the credential {name} is not a Strongroom key file") from None


def credential_content(name: str) -> bytes:
    """Return the first 1,024 bytes of a systemd credential of this process.

    Raises:
        CredentialError: It is not here.
    """
    folder = os.environ.get(_CREDENTIALS)
    if not _CREDENTIAL_NAME.fullmatch(name):
        raise CredentialError(f"{name!r} is not the name of a credential")
    if not folder:
        raise CredentialError(f"the credential {name} is not here: this process was not given any by systemd")
    try:
        # Its mode says nothing: systemd gives access by an ACL or by the folder's mount.
        with (Path(folder) / name).open("rb") as file:
            return file.read(1024)
    except OSError as error:
        raise CredentialError(
            f"the credential {name} cannot be read: {error.strerror}; see LoadCredentialEncrypted= in the unit"
        ) from error


def parse_key_file(content: bytes) -> KeyFile:
    """Return the secret in a key file's content.

    Raises:
        ValueError: It is not one.
    """
    lines = content.split(b"\n")
    if len(lines) != 3 or lines[0] != _KEY_FILE_HEADER or lines[2]:
        raise ValueError("not a key file")
    secret = encoding.from_base64(lines[1].decode("ascii"))
    if len(secret) != 32:
        raise ValueError("not a key file")
    return KeyFile(secret)
