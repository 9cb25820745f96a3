"""Slots: a secret opens its own slot, in its own place, with parameters that were not touched; nothing else does."""

from __future__ import annotations

import base64
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keys import slots
from keys.slots import KeyFile, KeyFileError, Passphrase, Slot, UnlockError, WeakPassphraseError

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


@pytest.fixture(scope="module")
def made(quick_argon2: None) -> dict[str, Slot]:
    return {
        "passphrase": slots.make_slot(WORDS, ROOT, STORE, label="words", created="now"),
        "key-file": slots.make_slot(FILE, ROOT, STORE, label="file", created="now"),
    }


SECRETS: dict[str, slots.Secret] = {"passphrase": WORDS, "key-file": FILE}


def locked(slot: Slot | list[Slot], secret: slots.Secret, store_id: bytes = STORE) -> bool:
    """Tell whether a slot stays locked, with the one message."""
    try:
        assert slots.unlock(slot if isinstance(slot, list) else [slot], secret, store_id) == ROOT
    except UnlockError as error:
        assert str(error) == MESSAGE
        return True
    return False


@pytest.mark.parametrize("kind", SECRETS)
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
    assert locked(made["key-file"], WORDS)
    assert locked(made["passphrase"], FILE)
    assert locked([], WORDS)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_slot_moved_to_another_id_store_or_type_does_not_open(made: dict[str, Slot], kind: str) -> None:
    slot = made[kind]
    assert not locked(slot, SECRETS[kind])
    assert locked(slot, SECRETS[kind], STORE[::-1])
    assert locked(msgspec.structs.replace(slot, id="00" * 16), SECRETS[kind])
    assert locked(msgspec.structs.replace(slot, type="other"), SECRETS[kind])
    assert locked(msgspec.structs.replace(slot, sealed=slot.sealed[:-1]), SECRETS[kind])
    assert locked(msgspec.structs.replace(slot, sealed=b""), SECRETS[kind])
    other = slots.make_slot(SECRETS[kind], bytes(32), STORE, label="", created="")
    assert locked(msgspec.structs.replace(slot, sealed=other.sealed), SECRETS[kind])


@pytest.mark.parametrize("identity", ["zz" * 16, "0", "é", "00" * 15 + "0x"])
@pytest.mark.parametrize("kind", SECRETS)
def test_a_slot_whose_id_is_no_hex_does_not_open(made: dict[str, Slot], kind: str, identity: str) -> None:
    assert locked(msgspec.structs.replace(made[kind], id=identity), SECRETS[kind])


REMOVED = object()


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
@given(st.sampled_from([*SECRETS]), st.integers(0, 10_000), st.integers(1, 255))
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
