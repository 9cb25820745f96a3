"""PKCS#11 tokens: one login a token and process, and keys on it that never leave it and make HMACs.

What is module-level here is so because PKCS#11 keeps it for the whole process: whether a module is initialised, and
who is logged in to a token. Everything runs under one lock: some modules crash when two threads call them.
Source: PKCS#11 2.40; docs/format.md, sections 4 and 5.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, SlotFlag, TokenFlag, UserType
from pkcs11 import exceptions as refusals

from keys.secret import Credential, CredentialError, credential_content

KEY_BITS = 256

_WRONG = (refusals.PinIncorrect, refusals.PinInvalid, refusals.PinLenRange)
_GONE = (
    refusals.TokenNotPresent,
    refusals.TokenNotRecognised,
    refusals.DeviceRemoved,
    refusals.DeviceError,
    refusals.GeneralError,
    refusals.SessionHandleInvalid,
    refusals.SessionClosed,
    refusals.ObjectHandleInvalid,
    refusals.KeyHandleInvalid,
    refusals.UserNotLoggedIn,
    refusals.SlotIDInvalid,
)

_lock = threading.RLock()
_logins: dict[tuple[str, str], _Login] = {}
# A PIN as this process remembers it: enough to know it again, worthless elsewhere.
_remember = secrets.token_bytes(32)
_refused: dict[bytes, bytes] = {}


class TokenError(Exception):
    """A token or a key on it is not there or does not do what is asked. No message holds a PIN."""


class WrongPinError(TokenError):
    """The PIN is not the token's."""


class _Login:
    """What the process has open of one token."""

    def __init__(self, session: Any, serial: bytes, pin: bytes, *, software: bool) -> None:
        self.session = session
        self.serial = serial
        self.pin = pin
        self.software = software
        self.users = 0


class AttachedToken:
    """A token that this process is logged in to, until ``close``. The PIN is not kept.

    Attributes:
        serial: The token's serial number, in hex.
        software: The token does not say that it is hardware, or says that it is SoftHSM.
    """

    def __init__(self, module: str, label: str, pin: str) -> None:
        """Log in, at most once: a token counts wrong PINs, and locks itself after a few.

        Where the process is logged in already, the PIN is compared with the one that did it. A PIN that a token refused
        is not given to it a second time, nor is any where one wrong PIN more would lock the token.

        Args:
            module: Absolute path of the PKCS#11 module; only root may be able to change it.
            label: The token's label.
            pin: The user's PIN.

        Raises:
            WrongPinError: The token refused the PIN, now or before.
            TokenError: Module or token are not there, or the token takes no PIN any more.
        """
        self.module = check_module(module)
        self.label = label
        with _lock, _translated(label):
            self._login = _login(self.module, label, pin)
            self._login.users += 1
        self.serial = self._login.serial.hex()
        self.software = self._login.software

    def __enter__(self) -> AttachedToken:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Log out, if nobody else in the process uses the token. May be called again."""
        with _lock:
            login, self._login = self._login, _Login(None, b"", b"", software=True)
            if login.session is not None:
                login.users -= 1
                if login.users == 0:
                    _log_out(self.module, login)

    def create_key(self, label: str) -> None:
        """Make a secret key of 32 bytes that is sensitive and not extractable.

        Raises:
            TokenError: There is one of this label, or the token cannot make it.
        """
        with self._session() as session:
            if _found(session, label):
                raise TokenError(f"the token {self.label!r} has a key {label!r} already")
            session.generate_key(
                KeyType.GENERIC_SECRET,
                KEY_BITS,
                label=label,
                store=True,
                mechanism=Mechanism.GENERIC_SECRET_KEY_GEN,
                capabilities=MechanismFlag.SIGN,
                template={Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True, Attribute.SENSITIVE: True},
            )
            self._confined(session, label)

    def has_key(self, label: str) -> bool:
        """Tell whether the token has a secret key of this label.

        Raises:
            TokenError: The token is gone.
        """
        with self._session() as session:
            found = bool(_found(session, label))
            if not found:
                self._must_be_here()
            return found

    def check_key(self, label: str) -> None:
        """Refuse a key that somebody made elsewhere, if it can leave the token.

        Raises:
            TokenError: It can, or it is not there.
        """
        with self._session() as session:
            self._confined(session, label)

    def hmac(self, label: str, message: bytes) -> bytearray:
        """Return the token's HMAC-SHA256 of a message, 32 bytes.

        Raises:
            TokenError: The key or the token is gone.
        """
        with self._session() as session:
            key = self._key(session, label)
            digest = bytearray(key.sign(message, mechanism=Mechanism.SHA256_HMAC))
        if len(digest) != 32:
            raise TokenError(f"the token {self.label!r} made an HMAC of {len(digest)} bytes instead of 32")
        return digest

    def destroy_key(self, label: str) -> None:
        """Destroy a key; one that is not there any more is no error, a token that is not there is.

        Raises:
            TokenError: It is not proved that the key is gone.
        """
        with self._session() as session:
            for key in _found(session, label):
                key.destroy()
            if _found(session, label):
                raise TokenError(f"the key {label!r} is still on the token {self.label!r} after it was destroyed")
            # A token that was pulled out shows no keys either.
            self._must_be_here()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Any]:
        with _lock:
            login = self._login
            if login.session is None:
                raise _gone(self.label)
            try:
                with _translated(self.label):
                    yield login.session
            except _GoneError:
                _log_out(self.module, login)
                raise

    def _key(self, session: Any, label: str) -> Any:
        found = _found(session, label)
        if not found:
            self._must_be_here()
            raise TokenError(f"the token {self.label!r} has no secret key {label!r}")
        if len(found) > 1:
            raise TokenError(f"the token {self.label!r} has {len(found)} secret keys {label!r}: remove the wrong ones")
        return found[0]

    def _confined(self, session: Any, label: str) -> None:
        key = self._key(session, label)
        if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE]:
            raise TokenError(
                f"the key {label!r} can be copied off the token {self.label!r}: use another, or have one made"
            )

    def _must_be_here(self) -> None:
        if not any(token.serial == self._login.serial for token in _tokens(self.module, self.label)):
            raise _gone(self.label)


class _GoneError(TokenError):
    """The token was there and is not any more."""


def is_attached(module: str, label: str) -> bool:
    """Tell whether a token of this label is attached; asks for no PIN.

    Raises:
        TokenError: The module is not there.
    """
    path = check_module(module)
    with _lock, _translated(label), _initialised(path):
        return bool(_tokens(path, label))


def read_pin(place: Path | Credential) -> str:
    """Return a PIN from a file or a systemd credential of this process: the first line, without its end.

    Raises:
        TokenError: It is not there, is no text, or others can read the file.
    """
    try:
        if isinstance(place, Credential):
            content = credential_content(place.name)
        else:
            with place.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise TokenError(f"the PIN file {place} is open to others; 'chmod 600 {place}'")
                content = file.read(1024)
        pin = content.decode("utf-8").split("\n", 1)[0]
    except OSError as error:
        raise TokenError(f"the PIN file {place} cannot be read: {error.strerror}") from error
    except CredentialError as error:
        raise TokenError(str(error)) from error
    except UnicodeDecodeError:
        pin = ""
    if not pin:
        where = f"the credential {place.name}" if isinstance(place, Credential) else f"the PIN file {place}"
        raise TokenError(f"{where} holds no PIN")
    return pin


def check_module(module: str) -> str:
    """Return the path of a PKCS#11 module, links resolved.

    The path may come from a keyring that somebody changed, and a module runs as this process: so it is loaded only from
    where root alone can put one.

    Raises:
        TokenError: It is not there, or others than root can change it.
    """
    if not os.path.isabs(module) or "\0" in module:
        raise TokenError(f"the PKCS#11 module {module!r} is not an absolute path")
    path = Path(os.path.realpath(module))
    try:
        for part in (path, *path.parents):
            found = part.stat()
            shared = found.st_mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX)
            if found.st_uid != 0 or shared:
                raise TokenError(f"the PKCS#11 module {module} is not loaded: others than root can change {part}")
        if not path.is_file():
            raise TokenError(f"the PKCS#11 module {module} is not a file")
    except OSError as error:
        raise TokenError(
            f"the PKCS#11 module {module} is not found: {error.strerror}; install the token's driver"
        ) from error
    return str(path)


def _gone(label: str) -> _GoneError:
    return _GoneError(f"the token {label!r} was removed or does not answer; attach it and unlock again")


@contextlib.contextmanager
def _translated(label: str) -> Iterator[None]:
    """Say in our words what a module refused."""
    try:
        yield
    except _WRONG:
        raise WrongPinError(f"the token {label!r} refused the PIN") from None
    except refusals.PinLocked:
        raise TokenError(f"the PIN of the token {label!r} is locked; unlock it with the token's own tools") from None
    except refusals.PinExpired:
        raise TokenError(f"the PIN of the token {label!r} is expired; change it with the token's own tools") from None
    except _GONE:
        raise _gone(label) from None
    except refusals.PKCS11Error as error:
        raise TokenError(f"the token {label!r} failed: {type(error).__name__}") from None


@contextlib.contextmanager
def _initialised(module: str) -> Iterator[Any]:
    """Keep a module initialised meanwhile, and after it if somebody is logged in."""
    try:
        library = pkcs11.lib(module)
    except refusals.PKCS11Error as error:
        raise TokenError(f"the PKCS#11 module {module} does not load: {type(error).__name__}: {error}") from None
    try:
        yield library
    finally:
        _finish(module)


def _finish(module: str) -> None:
    """Finalise a module that nobody is logged in to: some see a token that came later only when they start anew."""
    if not any(place[0] == module for place in _logins):
        with contextlib.suppress(refusals.PKCS11Error):
            pkcs11.lib(module).finalize()


def _tokens(module: str, label: str) -> list[Any]:
    return list(pkcs11.lib(module).get_tokens(token_label=label))


def _found(session: Any, label: str) -> list[Any]:
    return list(session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: label}))


def _login(module: str, label: str, pin: str) -> _Login:
    try:
        known = hmac.digest(_remember, pin.encode(), "sha256")
    except UnicodeEncodeError:
        pin = ""
    # No token has an empty PIN, but some modules take it as a wish to be asked on the token's own keypad.
    if not pin:
        raise WrongPinError(f"the token {label!r} has another PIN")
    login = _logins.get((module, label))
    if login is not None:
        # Asked while logged in, a token says yes to every PIN.
        if not hmac.compare_digest(login.pin, known):
            raise WrongPinError(f"the token {label!r} is in use with another PIN")
        return login
    with _initialised(module):
        found = _tokens(module, label)
        if not found:
            raise TokenError(f"no token {label!r} is attached")
        if len(found) > 1:
            raise TokenError(f"{len(found)} tokens {label!r} are attached; take the others out")
        token = found[0]
        _may_try(label, token.flags)
        if _refused.get(token.serial) == known:
            raise WrongPinError(f"the token {label!r} refused this PIN before; it is not tried again")
        try:
            session = token.open(rw=True, user_pin=pin, user_type=UserType.USER)
        except _WRONG:
            _refused[token.serial] = known
            raise
        _refused.pop(token.serial, None)
        software = _is_software(token.manufacturer_id, token.slot.flags)
        login = _logins[module, label] = _Login(session, token.serial, known, software=software)
    return login


def _may_try(label: str, flags: TokenFlag) -> None:
    """Refuse to try a PIN that could be the token's last.

    Raises:
        TokenError: The PIN is locked, or the next wrong one locks it.
    """
    if flags & TokenFlag.USER_PIN_LOCKED:
        raise refusals.PinLocked
    if flags & TokenFlag.USER_PIN_FINAL_TRY:
        raise TokenError(f"one wrong PIN more locks the token {label!r}; log in once with the token's own tools first")


def _is_software(manufacturer: str, flags: SlotFlag) -> bool:
    """Tell whether a token is software, or may be: hardware has a slot that says so (CKF_HW_SLOT)."""
    return "softhsm" in manufacturer.lower() or not flags & SlotFlag.HW_SLOT


def _log_out(module: str, login: _Login) -> None:
    """End a login for all who use it, whether the token still answers or not."""
    session, login.session = login.session, None
    for place in [place for place, known in _logins.items() if known is login]:
        del _logins[place]
    with contextlib.suppress(refusals.PKCS11Error):
        session.close()
    _finish(module)
