"""Slots: a secret opens its own slot, in its own place, with parameters that were not touched; nothing else does."""

from __future__ import annotations

import base64
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from softhsm import PIN, SoftHsm, attached

from keys import slots
from keys.seal import context, open_sealed
from keys.slots import (
    Credential,
    CredentialError,
    KeyFile,
    KeyFileError,
    Passphrase,
    Slot,
    Token,
    TokenPlace,
    UnlockError,
    WeakPassphraseError,
)
from keys.token import AttachedToken, TokenError

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
ROOT, STORE = bytes(range(32)), bytes(range(16))
GOOD = "tulip-anvil-marble-quench"
WORDS, FILE = Passphrase(GOOD), KeyFile(bytes(range(100, 132)))
MESSAGE = "this does not unlock the store"


@pytest.fixture(autouse=True, scope="module")
def quick_argon2() -> Iterator[None]:
    """Spend 64 KiB on a passphrase instead of 256 MiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "ARGON2_MEMORY_KIB", 64)
        patch.setattr(slots, "ARGON2_ITERATIONS", 2)
        yield


@pytest.fixture(autouse=True, scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of credentials as systemd gives it; 'store.key' and 'other.key' are key files."""
    folder = tmp_path_factory.mktemp("credentials")
    for name in ("store.key", "other.key"):
        (folder / name).write_bytes(slots.new_key_file())
        (folder / name).chmod(0o440)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDENTIALS_DIRECTORY", str(folder))
        yield folder


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    """SoftHSM with a token of label 'one'."""
    with attached(tmp_path_factory.mktemp("hsm")) as made:
        if Path("/usr/bin/softhsm2-util").exists():
            made.make("one")
        yield made


@pytest.fixture(scope="module")
def made(quick_argon2: None, credentials: Path, hsm: SoftHsm) -> dict[str, Slot]:
    slots_ = {
        "passphrase": slots.make_slot(WORDS, ROOT, STORE, label="words", created="now"),
        "key-file": slots.make_slot(FILE, ROOT, STORE, label="file", created="now"),
        "credential": slots.make_slot(CREDENTIAL, ROOT, STORE, label="credential", created="now"),
    }
    if Path("/usr/bin/softhsm2-util").exists():
        slots_["token"] = slots.make_slot(hsm.secret(), ROOT, STORE, label="token", created="now")
    return slots_


CREDENTIAL = Credential("store.key")
SECRETS: dict[str, slots.Secret] = {
    "passphrase": WORDS,
    "key-file": FILE,
    "credential": CREDENTIAL,
    "token": Token(PIN),
}
needs_token = pytest.mark.needs("softhsm2-util")
KINDS = ["passphrase", "key-file", "credential", pytest.param("token", marks=needs_token)]
QUICK_KINDS = ["passphrase", "key-file", "credential"]


def locked(slot: Slot | list[Slot], secret: slots.Secret, store_id: bytes = STORE) -> bool:
    """Tell whether a slot stays locked, with the one message."""
    try:
        assert slots.unlock(slot if isinstance(slot, list) else [slot], secret, store_id) == ROOT
    except UnlockError as error:
        assert str(error) == MESSAGE
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_opens_with_its_secret_wherever_it_stands(made: dict[str, Slot], kind: str) -> None:
    other = slots.make_slot(Passphrase("another passphrase"), bytes(32), STORE, label="", created="")
    assert made[kind].type == kind
    for order in ([made[kind]], [other, *made.values()], [*made.values(), other]):
        assert not locked(order, SECRETS[kind])


def test_a_slot_holds_what_the_page_says() -> None:
    one, two = (slots.make_slot(WORDS, ROOT, STORE, label="a", created="b") for _ in range(2))
    assert set(one.parameters) == {"iterations", "lanes", "memory_kib", "salt"}
    assert (one.parameters["iterations"], one.parameters["lanes"], one.parameters["memory_kib"]) == (2, 4, 64)
    assert len(base64.b64decode(one.parameters["salt"])) == len(bytes.fromhex(one.id)) == 16
    assert one.id != two.id
    assert one.parameters["salt"] != two.parameters["salt"]
    assert slots.make_slot(FILE, ROOT, STORE, label="", created="").parameters == {}


def test_every_wrong_secret_gets_the_same_words(made: dict[str, Slot]) -> None:
    both = list(made.values())
    for wrong in (Passphrase(GOOD + "x"), Passphrase(GOOD.upper()), Passphrase(""), KeyFile(bytes(32))):
        assert locked(both, wrong)
    assert locked(both, Credential("other.key"))
    assert locked(made["key-file"], WORDS)
    assert locked(made["passphrase"], FILE)
    assert locked([], WORDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_moved_to_another_id_store_or_type_does_not_open(made: dict[str, Slot], kind: str) -> None:
    slot = made[kind]
    assert not locked(slot, SECRETS[kind])
    assert locked(slot, SECRETS[kind], STORE[::-1])
    assert locked(msgspec.structs.replace(slot, id="00" * 16), SECRETS[kind])
    assert locked(msgspec.structs.replace(slot, type="other"), SECRETS[kind])
    assert locked(msgspec.structs.replace(slot, sealed=slot.sealed[:-1]), SECRETS[kind])
    assert locked(msgspec.structs.replace(slot, sealed=b""), SECRETS[kind])
    other = slots.renew_slot(slot, SECRETS[kind], bytes(32), STORE)
    assert locked(msgspec.structs.replace(slot, sealed=other.sealed), SECRETS[kind])


@pytest.mark.parametrize("identity", ["zz" * 16, "0", "é", "00" * 15 + "0x"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_whose_id_is_no_hex_does_not_open(made: dict[str, Slot], kind: str, identity: str) -> None:
    assert locked(msgspec.structs.replace(made[kind], id=identity), SECRETS[kind])


class _Gone:
    def __repr__(self) -> str:
        return "gone"


REMOVED = _Gone()


@pytest.mark.parametrize(
    "change",
    [
        *({"memory_kib": n} for n in (-1, 0, 1, 31, 32, 63, 65, (4 << 20) + 1, 1 << 31, 1 << 62, 1 << 80)),
        *({"iterations": n} for n in (-1, 0, 1, 3, 65, 1 << 31, 1 << 62)),
        *({"lanes": n} for n in (-1, 0, 1, 17, 1 << 31)),
        *({"memory_kib": m} for m in ("64", 64.5, None, True, [64], {})),
        *({"salt": s} for s in ("", "AAAA", "!" * 24, "A" * 22 + "==", "A" * 24, "A" * 10_000, None, 16)),
        *({key: REMOVED} for key in ("iterations", "lanes", "memory_kib", "salt")),
        {"unknown": 1},
        {"secret": "00"},
        {"iterations": 64, "lanes": 17, "memory_kib": 4 << 20},
    ],
    ids=str,
)
def test_parameters_that_somebody_changed_open_nothing_and_cost_nothing(
    made: dict[str, Slot], change: dict[str, Any]
) -> None:
    parameters = {k: v for k, v in (made["passphrase"].parameters | change).items() if v is not REMOVED}
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert locked(msgspec.structs.replace(made["passphrase"], parameters=parameters), WORDS)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 65_536
    assert after.ru_utime - before.ru_utime < 1


@QUICK
@given(st.sampled_from(QUICK_KINDS), st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_of_what_is_sealed_opens_nothing(
    made: dict[str, Slot], kind: str, offset: int, change: int
) -> None:
    slot = made[kind]
    sealed = bytearray(slot.sealed)
    sealed[offset % len(sealed)] ^= change
    assert locked(msgspec.structs.replace(slot, sealed=bytes(sealed)), SECRETS[kind])


@pytest.mark.parametrize(("iterations", "lanes", "memory"), [(1, 1, 8), (64, 1, 8), (1, 16, 128), (2, 4, 100)])
def test_parameters_at_the_edge_of_what_is_allowed_open(
    monkeypatch: pytest.MonkeyPatch, iterations: int, lanes: int, memory: int
) -> None:
    for name, value in (("ITERATIONS", iterations), ("LANES", lanes), ("MEMORY_KIB", memory)):
        monkeypatch.setattr(slots, f"ARGON2_{name}", value)
    assert not locked(slots.make_slot(WORDS, ROOT, STORE, label="", created=""), WORDS)


# --- passphrases


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café-marble-quench", "cafe\u0301-marble-quench"),
        ("ﬁnal-marble-quench", "final-marble-quench"),
        ("ＡＢＣ-marble-quench", "ABC-marble-quench"),
        ("Å-marble-quench", "\u212b-marble-quench"),
        ("パスワード-marble", "ﾊﾟｽﾜｰﾄﾞ-marble"),
        ("a\u00a0marble quench", "a marble quench"),
    ],
)
def test_a_passphrase_opens_in_whatever_form_a_keyboard_sends_it(one: str, other: str) -> None:
    for made, typed in ((one, other), (other, one)):
        slot = slots.make_slot(Passphrase(made), ROOT, STORE, label="", created="")
        assert not locked(slot, Passphrase(typed))
        assert locked(slot, Passphrase(typed + "\u0301"))
        assert locked(slot, Passphrase(typed.upper()))


def test_a_passphrase_that_is_no_text_opens_nothing(made: dict[str, Slot]) -> None:
    # What a terminal sends in another encoding than Python expects arrives as lone surrogates.
    assert locked(made["passphrase"], Passphrase(GOOD + "\udce9"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has 0 characters; at least 12 are needed"),
        ("x7!Kp2#vQ9z", "has 11 characters; at least 12 are needed"),
        ("éèàùçôîâêûë", "has 11 characters"),
        ("aaaaaaaaaaaa", "Repeats like"),
        ("abcabcabcabcabc", "Repeats like"),
        ("passwordpassword", "too weak"),
        ("123456789012", "too weak"),
        ("qwertyuiop[]", "too weak"),
        ("Password12345", "too weak"),
        ("aaaaaaaaaaaa" * 100, "Repeats like"),
        ("strongroom11", "too weak: it is guessed too easily"),
    ],
)
def test_a_passphrase_that_is_easily_guessed_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(WeakPassphraseError, match=reason) as raised:
        slots.check_passphrase(text)
    assert str(raised.value).startswith("the passphrase ")
    assert not text or text not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "tulip anvil marble quench orbit",
        GOOD,
        "x7!Kp2#vQ9zLmW4",
        "grüne Kühe trommeln gläserne Nächte",
        "山田太郎の金庫室の長い秘密",
        "x7!Kp2#vQ9zLmW4" * 20,
        "\U0001f600 tulip anvil marble",
    ],
)
def test_a_passphrase_that_is_not_easily_guessed_is_taken(text: str) -> None:
    slots.check_passphrase(text)


# --- key files


def test_a_key_file_is_two_lines_and_gives_the_same_secret_each_time(tmp_path: Path) -> None:
    content = slots.new_key_file()
    first, second, rest = content.split(b"\n")
    assert (first, rest) == (b"STRONGROOM-KEY-FILE-1", b"")
    assert slots.parse_key_file(content) == KeyFile(base64.b64decode(second))
    assert slots.new_key_file() != content
    file = tmp_path / "store.key"
    file.write_bytes(content)
    file.chmod(0o600)
    assert slots.read_key_file(file) == slots.parse_key_file(content)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o601, 0o666, 0o777])
def test_a_key_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "store.key"
    file.write_bytes(slots.new_key_file())
    file.chmod(mode)
    with pytest.raises(KeyFileError, match="is open to others; 'chmod 600 ") as raised:
        slots.read_key_file(file)
    assert str(file) in str(raised.value)


HEAD, SECRET = b"STRONGROOM-KEY-FILE-1\n", base64.b64encode(bytes(32))


@pytest.mark.parametrize(
    "content",
    [
        b"", HEAD, HEAD + SECRET, HEAD + SECRET + b"\n\n", HEAD + SECRET + b"\nx", b"\n" + HEAD + SECRET + b"\n",
        HEAD.replace(b"1", b"2") + SECRET + b"\n", HEAD.replace(b"\n", b"\r\n") + SECRET + b"\r\n", SECRET + b"\n",
        HEAD + base64.b64encode(bytes(31)) + b"\n", HEAD + base64.b64encode(bytes(33)) + b"\n",
        HEAD + b"!" * 44 + b"\n", HEAD + SECRET[:-1] + b"\n",
        HEAD + SECRET[:20] + b" " + SECRET[20:] + b"\n", HEAD + b"\xff" * 44 + b"\n",
        HEAD + b"-_" * 22 + b"\n", b"\0" * 2000, HEAD + b"A" * 2000 + b"\n",
    ],
)  # fmt: skip
def test_what_is_no_key_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError):
        slots.parse_key_file(content)
    file = tmp_path / "store.key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"is not a Strongroom key file$") as raised:
        slots.read_key_file(file)
    assert str(file) in str(raised.value)


def test_a_key_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, tmp_path / "missing" / "deep"):
        with pytest.raises(KeyFileError, match="cannot be read: ") as raised:
            slots.read_key_file(path)
        assert os.fspath(path) in str(raised.value)


@QUICK
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=60).map(lambda b: HEAD + b + b"\n")))
@example(HEAD + SECRET + b"\n")
def test_any_bytes_are_a_key_file_or_a_value_error(content: bytes) -> None:
    try:
        found = slots.parse_key_file(content)
    except ValueError:
        return
    assert len(found.secret) == 32
    assert content.startswith(HEAD)


# --- what every secret is


def test_a_secret_is_not_shown_where_its_object_is(hsm: SoftHsm) -> None:
    for secret in (WORDS, FILE, Token(PIN), hsm.secret()):
        for text in (repr(secret), str(secret), f"{secret}", repr([secret]), repr(secret.__rich_repr__())):
            assert not any(shown in text for shown in (GOOD, PIN, "def", "\\x64"))
    assert repr(Token(PIN)) == "Token(...)"


# --- credentials


def test_a_credential_opens_by_its_name_as_long_as_its_content_is_the_same(
    made: dict[str, Slot], credentials: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slot = made["credential"]
    assert slot.parameters == {"name": "store.key"}
    assert locked(slot, Credential("other.key"))
    # The slot made to name the credential that is given, it still is another key.
    assert locked(msgspec.structs.replace(slot, parameters={"name": "other.key"}), Credential("other.key"))
    content = (credentials / "store.key").read_bytes()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "store.key").write_bytes(slots.new_key_file())
    assert locked(slot, CREDENTIAL)
    (tmp_path / "store.key").write_bytes(content)
    assert not locked(slot, CREDENTIAL)
    # The same content as a key file is another kind of slot.
    assert locked(slot, slots.parse_key_file(content))
    assert locked(msgspec.structs.replace(slot, type="key-file"), slots.parse_key_file(content))


@pytest.mark.parametrize("parameters", [{}, {"name": 1}, {"name": "store.key", "more": 1}, {"name": None}])
def test_a_credential_slot_with_other_parameters_opens_nothing(
    made: dict[str, Slot], parameters: dict[str, Any]
) -> None:
    assert locked(msgspec.structs.replace(made["credential"], parameters=parameters), CREDENTIAL)


def test_a_credential_that_is_not_here_is_an_error_that_names_it(
    made: dict[str, Slot], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = list(made.values())
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(CredentialError, match=r"^the credential store\.key cannot be read: No such file"):
        slots.unlock(both, CREDENTIAL, STORE)
    (tmp_path / "store.key").write_bytes(b"something else")
    with pytest.raises(CredentialError, match=r"^the credential store\.key is not a Strongroom key file$"):
        slots.unlock(both, CREDENTIAL, STORE)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(CredentialError, match="was not given any by systemd"):
        slots.unlock(both, CREDENTIAL, STORE)
    with pytest.raises(CredentialError, match="was not given any by systemd"):
        slots.make_slot(CREDENTIAL, ROOT, STORE, label="", created="")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../store.key", "a/b", "/etc/passwd", "a:b", "a\0b", "a b", "é", "a" * 256, "a\n"]
)
def test_a_credential_has_no_path_for_a_name(name: str) -> None:
    with pytest.raises(CredentialError, match=r"is not the name of a credential$"):
        slots.read_credential(name)


# --- tokens


@needs_token
def test_a_token_slot_holds_what_the_page_says(made: dict[str, Slot], hsm: SoftHsm) -> None:
    slot = made["token"]
    salt = slot.parameters["salt"]
    wanted = {"key": f"strongroom-slot-{slot.id}", "module": hsm.module, "salt": salt, "token": "one"}
    assert slot.parameters == wanted
    assert len(base64.b64decode(salt)) == 16
    with AttachedToken(hsm.module, "one", PIN) as token:
        info = context("derive/slot-token", STORE, bytes.fromhex(slot.id), base64.b64decode(salt))
        key = token.hmac(slot.parameters["key"], info)
    assert slots.open_slot(slot, Token(PIN), STORE) == open_sealed(slot.sealed, key, slots._slot_context(slot, STORE))


@needs_token
def test_a_token_slot_stays_shut_for_another_pin_token_or_key(made: dict[str, Slot], hsm: SoftHsm) -> None:
    slot = made["token"]
    assert not locked(slot, hsm.secret())
    assert not locked(slot, hsm.secret(key=slot.parameters["key"]))
    assert locked(slot, Token("0000-0000"))
    assert locked(slot, hsm.secret("two"))
    assert locked(slot, hsm.secret(key="another"))
    assert locked(slot, Token(PIN, TokenPlace("/usr/lib/another.so", "one")))
    assert locked(slot, Passphrase(PIN))
    assert locked([made["passphrase"], made["key-file"]], Token(PIN))


@needs_token
def test_another_token_of_the_same_name_and_pin_does_not_open(tmp_path: Path) -> None:
    with attached(tmp_path / "hsm") as hsm:
        first = hsm.make("one")
        slot = slots.make_slot(hsm.secret(key="k"), ROOT, STORE, label="", created="")
        hsm.pull(first)
        with pytest.raises(TokenError, match=r"^no token 'one' is attached$"):
            slots.unlock([slot], Token(PIN), STORE)
        second = hsm.make("one")
        with pytest.raises(TokenError, match=r"^the token 'one' has no secret key 'k'$"):
            slots.unlock([slot], Token(PIN), STORE)
        with AttachedToken(hsm.module, "one", PIN) as token:
            token.create_key("k")
        assert locked(slot, Token(PIN))
        hsm.pull(second)
        hsm.put_back(first)
        assert not locked(slot, Token(PIN))


@needs_token
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"salt": s}, MESSAGE) for s in ("", "AAAA", "A" * 22 + "==", "A" * 24, "!" * 24, None, 16)),
        *(({key: REMOVED}, MESSAGE) for key in ("key", "module", "salt", "token")),
        *(({key: ""}, MESSAGE) for key in ("key", "module", "token")),
        *(({key: 1}, MESSAGE) for key in ("key", "module", "token")),
        ({"pin": PIN}, MESSAGE),
        ({"key": "other"}, MESSAGE),
        ({"key": "missing"}, "the token 'one' has no secret key 'missing'"),
        ({"token": "two"}, "no token 'two' is attached"),
        ({"module": "/nowhere/module.so"}, "the PKCS#11 module /nowhere/module.so is not found"),
        ({"module": "module.so"}, "the PKCS#11 module 'module.so' is not an absolute path"),
    ],
    ids=str,
)
def test_token_parameters_that_somebody_changed_open_nothing(
    made: dict[str, Slot], hsm: SoftHsm, change: dict[str, Any], message: str
) -> None:
    with AttachedToken(hsm.module, "one", PIN) as token:
        if not token.has_key("other"):
            token.create_key("other")
    parameters = {k: v for k, v in (made["token"].parameters | change).items() if v is not REMOVED}
    with pytest.raises((UnlockError, TokenError), match=f"^{re.escape(message)}") as raised:
        slots.unlock([msgspec.structs.replace(made["token"], parameters=parameters)], Token(PIN), STORE)
    assert PIN not in str(raised.value)


@needs_token
def test_a_changed_byte_of_what_a_token_slot_seals_opens_nothing(made: dict[str, Slot]) -> None:
    slot = made["token"]
    for offset in range(0, len(slot.sealed), 5):
        sealed = bytearray(slot.sealed)
        sealed[offset] ^= 1
        assert locked(msgspec.structs.replace(slot, sealed=bytes(sealed)), Token(PIN))


@needs_token
def test_a_slot_uses_a_key_that_is_there_or_makes_it(hsm: SoftHsm) -> None:
    with AttachedToken(hsm.module, "one", PIN) as token:
        token.create_key("mine")
        before = token.hmac("mine", b"")
        one, two = (slots.make_slot(hsm.secret(key="mine"), ROOT, STORE, label="", created="") for _ in range(2))
        assert token.hmac("mine", b"") == before
    assert one.parameters["salt"] != two.parameters["salt"]
    for slot in (one, two):
        assert not locked(slot, Token(PIN))
    with pytest.raises(TokenError, match="needs the module's path and the token's label"):
        slots.make_slot(Token(PIN), ROOT, STORE, label="", created="")


@needs_token
def test_a_pin_is_given_to_one_token_only(tmp_path: Path) -> None:
    with attached(tmp_path / "hsm") as hsm:
        hsm.make("one")
        two = hsm.make("two", "another-pin")
        both = [
            slots.make_slot(hsm.secret("one"), ROOT, STORE, label="", created=""),
            slots.make_slot(hsm.secret("two", "another-pin"), ROOT, STORE, label="", created=""),
        ]
        with pytest.raises(TokenError, match=r"^tokens 'one', 'two' are attached: say for which one the PIN is"):
            slots.unlock(both, Token("another-pin"), STORE)
        assert not locked(both, hsm.secret("two", "another-pin"))
        assert not locked(both, hsm.secret("one"))
        hsm.pull(two)
        assert not locked(both, Token(PIN))
        hsm.put_back(two)
        for token in list(hsm.tokens.iterdir()):
            hsm.pull(token)
        with pytest.raises(TokenError, match=r"^no token of 'one', 'two' is attached$"):
            slots.unlock(both, Token(PIN), STORE)


@needs_token
def test_a_renewed_slot_has_nothing_of_the_old_one_but_its_name(made: dict[str, Slot], hsm: SoftHsm) -> None:
    new_root = bytes(range(32, 64))
    for kind, slot in made.items():
        new = slots.renew_slot(slot, SECRETS[kind], new_root, STORE)
        assert (new.type, new.label, new.created) == (slot.type, slot.label, slot.created)
        assert new.id != slot.id
        assert slots.unlock([new], SECRETS[kind], STORE) == new_root
        assert slots._slot_key(new, SECRETS[kind], STORE) != slots._slot_key(slot, SECRETS[kind], STORE)
        # What the old slot sealed does not open in the new one's place.
        assert locked(msgspec.structs.replace(new, sealed=slot.sealed), SECRETS[kind])
