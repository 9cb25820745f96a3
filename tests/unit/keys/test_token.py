"""Tokens: keys that stay on them, one try a PIN, errors that name what is wrong and never the PIN."""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, SlotFlag, TokenFlag
from softhsm import PIN, SoftHsm, attached

from keys import token
from keys.secret import Credential
from keys.token import AttachedToken, TokenError, WrongPinError, check_module, is_attached, read_pin

pytestmark = pytest.mark.needs("softhsm2-util")
OTHER = "0815-4711"


@pytest.fixture
def hsm(tmp_path: Path) -> Iterator[SoftHsm]:
    with attached(tmp_path / "hsm") as made:
        yield made


@pytest.fixture
def one(hsm: SoftHsm) -> Path:
    """A token of label 'one', device."""
    return hsm.make("one")


def attach(hsm: SoftHsm, label: str = "one", pin: str = PIN) -> AttachedToken:
    return AttachedToken(hsm.module, label, pin)


def refused(call: Callable[[], object], kind: type[TokenError] = TokenError) -> str:
    """Return the message of a call that must fail, after looking for PINs in all that could be printed of it."""
    with pytest.raises(kind) as raised:
        call()
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    assert PIN not in shown
    assert OTHER not in shown
    return str(raised.value)


def attributes(hsm: SoftHsm, label: str) -> dict[Attribute, object]:
    with attach(hsm) as device, device._session() as session:
        (key,) = session.get_objects({Attribute.LABEL: label})
        with pytest.raises(pkcs11.AttributeSensitive):
            key[Attribute.VALUE]
        names = ("EXTRACTABLE", "NEVER_EXTRACTABLE", "SENSITIVE", "ALWAYS_SENSITIVE", "LOCAL", "PRIVATE", "SIGN")
        names += ("DERIVE", "WRAP", "UNWRAP", "ENCRYPT", "DECRYPT", "VALUE_LEN", "TOKEN")
        return {Attribute[name]: key[Attribute[name]] for name in names}


def wrong_pins(hsm: SoftHsm) -> bool:
    """Tell whether the token remembers a wrong PIN."""
    with token._lock, token._initialised(check_module(hsm.module)):
        (found,) = token._tokens(check_module(hsm.module), "one")
        return bool(found.flags & TokenFlag.USER_PIN_COUNT_LOW)


# --- keys


def test_a_key_stays_on_its_token_and_makes_the_same_hmac_each_time(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        assert not device.has_key("k")
        device.create_key("k")
        device.create_key("other")
        first = device.hmac("k", b"message")
    with attach(hsm) as device:
        assert device.has_key("k")
        assert device.hmac("k", b"message") == first
        assert len(first) == 32
        assert first not in [device.hmac("k", b"messagf"), device.hmac("other", b"message")]
    found = attributes(hsm, "k")
    wanted = dict.fromkeys(found, False) | {Attribute.VALUE_LEN: 32}
    for name in ("NEVER_EXTRACTABLE", "SENSITIVE", "ALWAYS_SENSITIVE", "LOCAL", "PRIVATE", "SIGN", "TOKEN"):
        wanted[Attribute[name]] = True
    assert found == wanted


def test_the_hmac_is_sha256_over_the_message_alone(hsm: SoftHsm, one: Path) -> None:
    value = bytes(range(32))
    with attach(hsm) as device:
        with device._session() as session:
            session.create_object(
                {
                    Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                    Attribute.LABEL: "known",
                    Attribute.SIGN: True,
                    Attribute.TOKEN: True,
                    Attribute.VALUE: value,
                }
            )
        assert device.hmac("known", b"message") == hmac.digest(value, b"message", hashlib.sha256)


def test_a_key_is_made_once(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        device.create_key("k")
        first = device.hmac("k", b"")
        message = refused(lambda: device.create_key("k"))
        assert message == "the token 'one' has a key 'k' already"
        assert device.hmac("k", b"") == first


def test_a_destroyed_key_is_gone_and_may_be_destroyed_again(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        device.create_key("k")
        device.create_key("kept")
        for _ in range(2):
            device.destroy_key("k")
            assert refused(lambda: device.hmac("k", b"")) == "the token 'one' has no secret key 'k'"
        device.hmac("kept", b"")
    with attach(hsm) as device:
        assert (device.has_key("k"), device.has_key("kept")) == (False, True)


@pytest.mark.parametrize(("extractable", "sensitive"), [(True, True), (False, False), (True, False)])
def test_a_key_that_can_be_copied_off_its_token_is_refused(
    hsm: SoftHsm, one: Path, extractable: bool, sensitive: bool
) -> None:
    with attach(hsm) as device:
        with device._session() as session:
            session.generate_key(
                KeyType.GENERIC_SECRET,
                256,
                label="k",
                store=True,
                mechanism=Mechanism.GENERIC_SECRET_KEY_GEN,
                capabilities=MechanismFlag.SIGN,
                template={Attribute.EXTRACTABLE: extractable, Attribute.SENSITIVE: sensitive},
            )
        assert refused(lambda: device.check_key("k")).startswith("the key 'k' can be copied off the token 'one'")
        device.create_key("good")
        device.check_key("good")


def test_two_keys_of_one_label_are_refused(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        device.create_key("k")
        with device._session() as session:
            session.generate_key(KeyType.GENERIC_SECRET, 256, label="k", store=True, capabilities=MechanismFlag.SIGN)
        assert "has 2 secret keys 'k'" in refused(lambda: device.hmac("k", b""))


# --- PINs


@pytest.mark.parametrize("pin", [OTHER, PIN + "1", PIN[:-1], "1" * 300, "ü" * 8])
def test_a_wrong_pin_is_an_error_of_its_own_and_tried_once(hsm: SoftHsm, one: Path, pin: str) -> None:
    assert refused(lambda: attach(hsm, pin=pin), WrongPinError) == "the token 'one' refused the PIN"
    again = "the token 'one' refused this PIN before; it is not tried again"
    for _ in range(20):
        assert refused(lambda: attach(hsm, pin=pin), WrongPinError) == again
    with attach(hsm) as device:
        device.create_key("k")


@pytest.mark.parametrize("pin", ["", "\udce9" * 8])
def test_a_pin_that_no_token_has_is_not_shown_to_it(hsm: SoftHsm, one: Path, pin: str) -> None:
    assert refused(lambda: attach(hsm, pin=pin), WrongPinError) == "the token 'one' has another PIN"
    assert not wrong_pins(hsm)
    # Control: one that is shown is counted.
    refused(lambda: attach(hsm, pin=OTHER), WrongPinError)
    assert wrong_pins(hsm)


def test_a_wrong_pin_is_refused_while_the_process_is_logged_in(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        message = refused(lambda: attach(hsm, pin=OTHER), WrongPinError)
        assert message == "the token 'one' is in use with another PIN"
        device.create_key("k")
        assert not wrong_pins(hsm)
    refused(lambda: attach(hsm, pin=OTHER), WrongPinError)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (TokenFlag.USER_PIN_LOCKED, "the PIN of the token 'one' is locked"),
        (TokenFlag.USER_PIN_LOCKED | TokenFlag.USER_PIN_FINAL_TRY, "the PIN of the token 'one' is locked"),
        (TokenFlag.USER_PIN_FINAL_TRY, "one wrong PIN more locks the token 'one'"),
    ],
)
def test_the_last_try_of_a_token_is_never_used(flags: TokenFlag, message: str) -> None:
    # SoftHSM never locks itself, so the decision is shown the flags that tokens have.
    def decide() -> None:
        with token._translated("one"):
            token._may_try("one", flags)

    assert refused(decide).startswith(message)
    token._may_try("one", TokenFlag.USER_PIN_COUNT_LOW | TokenFlag.LOGIN_REQUIRED)


def test_a_login_is_shared_and_ends_with_its_last_user(hsm: SoftHsm, one: Path) -> None:
    first, second = attach(hsm), attach(hsm)
    first.create_key("k")
    first.close()
    first.close()
    assert "attach it and unlock again" in refused(lambda: first.hmac("k", b""))
    assert len(second.hmac("k", b"")) == 32
    second.close()
    assert not token._logins
    # Nobody is logged in: without a PIN, private keys are not even seen.
    with token._initialised(check_module(hsm.module)):
        (found,) = token._tokens(check_module(hsm.module), "one")
        assert list(found.open().get_objects({Attribute.LABEL: "k"})) == []


def test_many_threads_may_use_a_token_at_a_time(hsm: SoftHsm, one: Path) -> None:
    wanted: dict[bytes, bytes] = {}
    wrong: list[object] = []
    with attach(hsm) as device:
        device.create_key("k")
        for number in range(8):
            message = bytes([number])
            wanted[message] = bytes(device.hmac("k", message))

    def work(message: bytes) -> None:
        try:
            for _ in range(25):
                with attach(hsm) as mine:
                    if mine.hmac("k", message) != wanted[message]:
                        wrong.append(message)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(message,)) for message in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- what is not there


def test_a_token_that_is_not_attached_is_an_error_that_names_it(hsm: SoftHsm, one: Path) -> None:
    assert refused(lambda: attach(hsm, "two")) == "no token 'two' is attached"
    assert (is_attached(hsm.module, "one"), is_attached(hsm.module, "two")) == (True, False)
    # One that comes later is seen, though the module was in use before.
    hsm.make("two", OTHER)
    assert is_attached(hsm.module, "two")
    with attach(hsm, "two", OTHER):
        pass


def test_two_tokens_of_one_label_are_refused_before_a_pin_is_tried(hsm: SoftHsm, one: Path) -> None:
    hsm.make("one", OTHER)
    assert refused(lambda: attach(hsm)) == "2 tokens 'one' are attached; take the others out"


@pytest.mark.parametrize("use", ["hmac", "create_key", "destroy_key", "has_key", "check_key"])
def test_a_token_removed_in_the_middle_is_an_error_and_can_come_back(hsm: SoftHsm, one: Path, use: str) -> None:
    device = attach(hsm)
    device.create_key("k")
    before = device.hmac("k", b"")
    hsm.pull(one)
    calls = {
        "hmac": lambda: device.hmac("k", b""),
        "create_key": lambda: device.create_key("new"),
        "destroy_key": lambda: device.destroy_key("k"),
        "has_key": lambda: device.has_key("k"),
        "check_key": lambda: device.check_key("k"),
    }
    for _ in range(2):
        assert "the token 'one' " in refused(calls[use])
    device.close()
    refused(lambda: attach(hsm))
    hsm.put_back(one)
    with attach(hsm) as again:
        assert again.hmac("k", b"") == before


def test_another_token_in_its_place_has_none_of_its_keys(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        device.create_key("k")
        serial = device.serial
    hsm.pull(one)
    hsm.make("one")
    with attach(hsm) as device:
        assert device.serial != serial
        assert not device.has_key("k")


# --- modules


def test_a_module_that_is_not_there_or_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    missing = "/usr/lib/no-such-module.so"
    assert refused(lambda: AttachedToken(missing, "one", PIN)).startswith(
        f"the PKCS#11 module {missing} is not found: No such file or directory"
    )
    assert "is not an absolute path" in refused(lambda: AttachedToken("libsofthsm2.so", "one", PIN))
    assert "is not a file" in refused(lambda: AttachedToken("/usr/lib", "one", PIN))
    # A library, but not of this kind.
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next(line.split()[-1] for line in maps if "/libc.so" in line)
    assert "does not load" in refused(lambda: AttachedToken(library, "one", PIN))


def test_a_module_that_others_than_root_can_change_is_not_loaded(hsm: SoftHsm, tmp_path: Path) -> None:
    # What a keyring names was perhaps written by somebody else, and what is loaded runs as the vault.
    for mode, folder_mode in ((0o666, 0o755), (0o644, 0o777), (0o664, 0o755)):
        folder = tmp_path / f"{mode:o}-{folder_mode:o}"
        folder.mkdir()
        module = folder / "module.so"
        shutil.copy(hsm.module, module)
        os.chmod(module, mode)
        os.chmod(folder, folder_mode)
        (folder / "link.so").symlink_to(module)
        for path in (module, folder / "link.so"):
            assert "is not loaded: others than root can change" in refused(
                lambda path=path: AttachedToken(str(path), "one", PIN)
            )
    assert check_module(hsm.module) == os.path.realpath(hsm.module)


def test_a_process_ends_cleanly_that_is_still_logged_in(hsm: SoftHsm, one: Path) -> None:
    program = f"from keys.token import AttachedToken; AttachedToken({hsm.module!r}, 'one', {PIN!r}).create_key('k')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- what a token is, and where its PIN comes from


@pytest.mark.parametrize(
    ("manufacturer", "flags", "software"),
    [
        ("Yubico (www.yubico.com)", SlotFlag.TOKEN_PRESENT | SlotFlag.HW_SLOT, False),
        ("Yubico (www.yubico.com)", SlotFlag.TOKEN_PRESENT, True),
        ("SoftHSM project", SlotFlag.TOKEN_PRESENT | SlotFlag.HW_SLOT, True),
        ("", SlotFlag.TOKEN_PRESENT | SlotFlag.REMOVABLE_DEVICE, True),
    ],
)
def test_only_a_slot_that_says_so_is_hardware(manufacturer: str, flags: SlotFlag, software: bool) -> None:
    assert token._is_software(manufacturer, flags) == software


def test_a_softhsm_is_software(hsm: SoftHsm, one: Path) -> None:
    with attach(hsm) as device:
        assert device.software


@pytest.mark.parametrize("content", ["4711\n", "4711", "4711\nsecond line\n"])
def test_a_pin_is_the_first_line_of_a_private_file_or_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "pin").write_text(content)
    (tmp_path / "pin").chmod(0o600)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_pin(tmp_path / "pin") == read_pin(Credential("pin")) == "4711"


def test_a_pin_that_others_can_read_or_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "pin"
    assert "cannot be read: No such file" in refused(lambda: read_pin(place))
    for mode in (0o640, 0o604, 0o620):
        place.write_text("4711")
        place.chmod(mode)
        assert f"is open to others; 'chmod 600 {place}'" in refused(lambda: read_pin(place))
    place.chmod(0o600)
    for content in (b"", b"\n4711", b"\xff\xfe"):
        place.write_bytes(content)
        assert refused(lambda: read_pin(place)) == f"the PIN file {place} holds no PIN"
    assert "this process was not given any by systemd" in refused(lambda: read_pin(Credential("pin")))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert refused(lambda: read_pin(Credential("pin"))) == "the credential pin holds no PIN"
    assert "is not the name of a credential" in refused(lambda: read_pin(Credential("../pin")))
