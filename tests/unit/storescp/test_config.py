"""The configuration: what is explained is what is read, and every error is told at once with file and key."""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.retentionrules import Rule
from storescp import config
from storescp.config import EXPLAINED, Config, ConfigError, Settings
from storescp.errors import USAGE

QUICK = settings(deadline=None, derandomize=True, max_examples=150)
SIGNING_KEY = "ed25519:" + base64.b64encode(bytes(range(32))).decode()
STORE = {"path": "store", "anchors": "/anchors", "spool": "spool", "signing_key": SIGNING_KEY}


def made(**changes: Any) -> Settings:
    """Return settings with some (``gate_listen``) changed."""
    found = Settings(store=config.Store(**STORE))
    for name, value in changes.items():
        section, _, key = name.partition("_")
        setattr(getattr(found, section), key, value)
    return found


def keys(kind: type[Any] = Settings, prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        yield prefix + field.name
        # A table inside a section is explained as a whole.
        if not prefix and isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from keys(field.type, f"{field.name}.")


def load(folder: Path, content: str | bytes) -> Config:
    file = folder / "strongroom.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return config.load(file)


def errors(folder: Path, content: str | bytes) -> list[str]:
    """Return the errors told about a file, each without the file's name, which it must begin with."""
    with pytest.raises(ConfigError) as raised:
        load(folder, content)
    assert raised.value.status == USAGE
    prefix = f"{folder / 'strongroom.toml'}: "
    lines = str(raised.value).split("\n")
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


# --- what is written is read


def test_every_setting_and_section_is_explained_and_nothing_else() -> None:
    assert list(keys()) == list(EXPLAINED)
    assert all(text.strip() == text and len(max(text.split("\n"), key=len)) <= 118 for text in EXPLAINED.values())


def test_rules_can_be_written_behind_what_is_rendered(tmp_path: Path) -> None:
    behind = '[[retention.rules]]\nname = "all"\nkeep = "P10Y"\n'
    assert load(tmp_path, config.render(made()) + behind).settings.retention.rules == [Rule(name="all", keep="P10Y")]


def test_what_is_rendered_is_every_setting_with_its_explanation_before_it() -> None:
    whole = made()
    whole.retention.rules = [Rule(name="all", keep="P10Y", modalities=["CT"])]
    lines = config.render(whole).splitlines()
    assert tomllib.loads("\n".join(lines)) == msgspec.to_builtins(whole)
    for key, text in EXPLAINED.items():
        section, _, name = key.rpartition(".")
        place = next(
            n for n, line in enumerate(lines) if (line.startswith(f"{name} = ") if section else line == f"[{name}]")
            and (not section or f"[{section}]" in lines[:n])
        )  # fmt: skip
        comment = [f"# {part}" for part in text.split("\n")]
        assert lines[place - len(comment) : place] == comment


texts = st.one_of(
    st.text(max_size=20), st.sampled_from(['"', "\\", '"""', "\x7f", "\u2028", "\x00", "é\r\n\t", "${x}"])
)
titles = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"), min_size=1, max_size=16)


@settings(QUICK, max_examples=60)
@given(st.builds(
    made,
    store_path=texts, store_anchors=texts, store_spool=texts, unlock_key_file=texts, gate_certificate=texts,
    gate_private_key=texts, gate_peers=texts, gate_trust=st.lists(texts, max_size=3), control_socket=texts,
    gate_ae_title=titles.filter(str.strip), gate_listen=st.lists(
        st.sampled_from(["127.0.0.1:0", "[::1]:2762", "0.0.0.0:65535"]), min_size=1, max_size=3),
    gate_maximum_pdu=st.integers(4096, 1 << 20), gate_pack_bytes=st.integers(1 << 20, 1 << 40),
    gate_drain_seconds=st.integers(0, 3600), log_format=st.sampled_from(["text", "json"]),
    log_level=st.sampled_from(["debug", "info", "warning", "error"]),
))  # fmt: skip
@example(made(store_path='a"b\\c\n\x00\x7f\U0001f600'))
def test_what_is_rendered_is_read_again(tmp_path_factory: pytest.TempPathFactory, given_settings: Settings) -> None:
    assert load(tmp_path_factory.getbasetemp(), config.render(given_settings)).settings == given_settings


def test_the_shortest_file_has_the_defaults(tmp_path: Path) -> None:
    content = "[store]\n" + "".join(f'{key} = "{value}"\n' for key, value in STORE.items())
    assert load(tmp_path, content).settings == made()


def test_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    found = load(tmp_path, config.render(made(gate_trust=["tls/ca.pem", "/etc/ca.pem"], unlock_key_file="store.key")))
    assert {
        found.store_path: "store", found.keyring: "store/keyring", found.keys_db: "store/keys.db",
        found.lock: "store/lock", found.incoming: "spool/incoming", found.public: "spool/public",
        found.peers: "peers.d", found.certificate: "tls/server.pem", found.private_key: "tls/server.key",
        found.socket: "run/vault.sock", found.trust[0]: "tls/ca.pem", found.key_file: "store.key",
        found.index(3): "store/index-3.db",
    } == {tmp_path / path: path for path in (
        "store", "store/keyring", "store/keys.db", "store/lock", "spool/incoming", "spool/public", "peers.d",
        "tls/server.pem", "tls/server.key", "run/vault.sock", "tls/ca.pem", "store.key", "store/index-3.db",
    )}  # fmt: skip
    assert (found.anchors, found.trust[1]) == (Path("/anchors"), Path("/etc/ca.pem"))
    assert found.signing_key == bytes(range(32))
    assert load(tmp_path, config.render(made())).key_file is None


MODULE = "/usr/lib/softhsm/libsofthsm2.so"


def test_a_token_and_its_pin_are_found_where_the_file_names_them(tmp_path: Path) -> None:
    named = {"keys_anchor": "token", "keys_anchor_token": f"{MODULE}:one"}
    found = load(tmp_path, config.render(made(**named, keys_anchor_pin="anchor.pin")))
    assert (found.anchor_token, found.anchor_pin_file) == ((MODULE, "one"), tmp_path / "anchor.pin")
    assert not found.anchor_pin_credential
    found = load(tmp_path, config.render(made(**named, keys_anchor_pin="credential:pin")))
    assert (found.anchor_pin_credential, found.anchor_pin_file) == ("pin", None)
    # Colons can be in a path, not in a label.
    assert config.split_token("/a:b/module.so:two words") == ("/a:b/module.so", "two words")
    # For versions of before, while new ones are in files.
    named["keys_anchor"] = "file"
    assert load(tmp_path, config.render(made(**named, keys_anchor_pin="p"))).anchor_token == (MODULE, "one")
    assert load(tmp_path, config.render(made())).anchor_token is None


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        ({"anchor": "tpm"}, ["keys.anchor: must be file or token"]),
        ({"anchor": "token"}, ["keys.anchor_token: missing: name the token, MODULE:TOKEN"]),
        ({"anchor_token": f"{MODULE}:one"}, ["keys.anchor_pin: missing"]),
        ({"anchor_token": f"{MODULE}:one", "anchor_pin": "credential:"}, ["keys.anchor_pin: missing"]),
        *[
            ({"anchor_token": text, "anchor_pin": "p"}, ["keys.anchor_token: must be MODULE:TOKEN"])
            for text in (MODULE, f"{MODULE}:", ":one", "libsofthsm2.so:one", "/a\0b:one")
        ],
    ],
)
def test_a_token_that_is_half_named_is_an_error(tmp_path: Path, settings_: dict[str, str], told: list[str]) -> None:
    found = errors(tmp_path, config.render(made(**{f"keys_{key}": value for key, value in settings_.items()})))
    assert [line[: len(wanted)] for line, wanted in zip(found, told, strict=True)] == told


# --- errors

GOOD = config.render(made())


def replaced(key: str, value: str) -> str:
    """Return a good file with one setting's TOML changed; the first of its name."""
    lines = GOOD.splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith(f"{key} = "))
    return "\n".join([*lines[:place], f"{key} = {value}", *lines[place + 1 :]])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("path", "1", "store.path: expected `str`, got `int`"),
        ("path", "2026-01-31", "store.path: expected `str`, got `date`"),
        ("listen", '"127.0.0.1:1"', "gate.listen: expected `array`, got `str`"),
        ("listen", "[1]", "gate.listen: expected `str`, got `int` - at `$[0]`"),
        ("listen", "[]", "gate.listen: names no address"),
        *(("listen", f'["{a}"]', f"gate.listen: '{a}' is no address with a port, as in 127.0.0.1:2762 or [::1]:2762")
          for a in ("", ":104", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:x", "::1:104",
                    "[127.0.0.1]:104", "localhost:104", "256.0.0.1:1", "[::1]", "127.0.0.1: 1", "127.0.0.1:١",
                    "[::1:104", "::1]:104", "[[::1]]:104", "127.0.0.1]:104")),
        *(("ae_title", f'"{t}"', "gate.ae_title: must be 1 to 16 characters, ASCII, no backslash")
          for t in ("", " ", "x" * 17, "a\\\\b", "\\t", "é", "\\u007f")),
        ("maximum_pdu", '"4096"', "gate.maximum_pdu: expected `int`, got `str`"),
        ("maximum_pdu", "true", "gate.maximum_pdu: expected `int`, got `bool`"),
        ("maximum_pdu", "4096.5", "gate.maximum_pdu: expected `int`, got `float`"),
        *((name, str(value), f"gate.{name}: must be from {low} to {high}") for name, low, high in (
            ("maximum_pdu", 4096, 1 << 20), ("maximum_associations", 1, 10_000), ("request_seconds", 1, 600),
            ("idle_seconds", 1, 86_400), ("drain_seconds", 0, 3600), ("pack_bytes", 1 << 20, 1 << 40),
            ("pack_idle_seconds", 1, 3600), ("packs_per_peer", 1, 1000),
        ) for value in (low - 1, high + 1, -(2**40))),
        *(("signing_key", f'"{k}"', "store.signing_key: must be 'ed25519:' and 32 bytes in base64") for k in (
            "", "ed25519:", SIGNING_KEY.removeprefix("ed25519:"), SIGNING_KEY[:-4], SIGNING_KEY + "AAAA",
            SIGNING_KEY.replace("ed25519", "rsa"), SIGNING_KEY[:20] + " " + SIGNING_KEY[20:], "ed25519:é",
        )),
        ("format", '"xml"', "log.format: must be text or json"),
        ("level", '"INFO"', "log.level: must be debug, info, warning or error"),
        ("level", '"trace"', "log.level: must be debug, info, warning or error"),
    ],
)  # fmt: skip
def test_a_setting_that_breaks_a_rule_is_told_with_its_key(tmp_path: Path, key: str, value: str, message: str) -> None:
    assert errors(tmp_path, replaced(key, value)) == [message]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("listen", f'["{a}"]') for a in ("127.0.0.1:0", "0.0.0.0:65535", "[::]:104", "[fe80::1]:104")),
        *(("ae_title", f'"{t}"') for t in ("A", "x" * 16, "A B", " A ", "~!/.")),
        *(("maximum_pdu", str(value)) for value in (4096, 1 << 20)),
        *(("drain_seconds", str(value)) for value in (0, 3600)),
    ],
)
def test_a_setting_at_the_edge_of_a_rule_is_taken(tmp_path: Path, key: str, value: str) -> None:
    load(tmp_path, replaced(key, value))


def test_every_error_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    content = """
        unknown = 1
        log = 3
        [store]
        path = 1
        paht = "x"
        anchors = ["x"]
        [gate]
        listen = "x"
        maximum_pdu = "y"
        port = 104
        [gates]
    """
    assert sorted(errors(tmp_path, content)) == sorted(
        [
            "unknown: unknown key",
            "gates: unknown key",
            "log: must be a table",
            "store.paht: unknown key",
            "store.path: expected `str`, got `int`",
            "store.anchors: expected `str`, got `array`",
            "store.spool: missing",
            "store.signing_key: missing",
            "gate.listen: expected `array`, got `str`",
            "gate.maximum_pdu: expected `int`, got `str`",
            "gate.port: unknown key",
        ]
    )
    assert errors(tmp_path, "") == ["store: missing"]
    bad = made(gate_listen=["a", "b"], gate_ae_title="", gate_maximum_pdu=1, log_level="x", log_format="y")
    assert [line.split(":")[0] for line in errors(tmp_path, config.render(bad))] == [
        "gate.listen", "gate.listen", "gate.ae_title", "gate.maximum_pdu", "log.format", "log.level",
    ]  # fmt: skip


def test_an_unknown_key_does_not_hide_a_value_out_of_bounds(tmp_path: Path) -> None:
    content = replaced("maximum_pdu", "1").replace("[log]", "[log]\nlevle = 1")
    assert sorted(line.split(":")[0] for line in errors(tmp_path, content)) == ["gate.maximum_pdu", "log.levle"]


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"[store", b"a = 1\na = 2", b"a = " + b"[" * 5000, b"a = " + b"1" * 5000, b"\0", GOOD.encode() + b"x"],
    ids=["no UTF-8", "a broken table", "a key twice", "deep", "a long number", "zero", "a rest"],
)
def test_what_is_no_toml_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, content)
    assert str(raised.value).startswith(f"{tmp_path / 'strongroom.toml'} cannot be read: ")


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.load(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name} cannot be read: ")


documents = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.floats(), st.text(max_size=5), st.just("127.0.0.1:1")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*(k.split(".")[-1] for k in EXPLAINED), "other"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@QUICK
@given(st.dictionaries(st.sampled_from(["store", "gate", "log", "unlock", "control", "other"]), documents, max_size=5))
def test_any_table_is_settings_or_a_list_of_errors(document: dict[str, Any]) -> None:
    found, told = config.convert(document, Settings)
    assert (found is None) == bool(told)
    assert all(": " in line for line in told)


# --- addresses, titles, where the file is


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:2762", ("127.0.0.1", 2762)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:2762", ("::1", 2762)),
        ("[2001:DB8:0::1]:65535", ("2001:db8::1", 65_535)),
        ("[fe80::1%eth0]:104", ("fe80::1%eth0", 104)),
    ],
)
def test_an_address_is_host_and_port(text: str, wanted: tuple[str, int]) -> None:
    assert config.parse_address(text) == wanted


@QUICK
@given(st.one_of(st.text(max_size=20), st.tuples(st.ip_addresses(), st.text("0123456789[]:", max_size=8)).map(
    lambda t: f"{t[0]}:{t[1]}")))  # fmt: skip
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        host, port = config.parse_address(text)
    except ValueError:
        return
    again = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert config.parse_address(again) == (host, port)
    assert (":" in host) == (text.startswith("[") and "]:" in text)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        *((t, True) for t in ("A", "CT1", "x" * 16, "A B", " A", "a/b", "..", "~", "'\"", "%41")),
        *((t, False) for t in ("", " ", " " * 16, "x" * 17, "A\\B", "A\nB", "A\x7f", "é", "Ａ", "A\0")),
    ],
)
def test_an_ae_title_is_16_characters_of_ascii(text: str, valid: bool) -> None:
    assert config.is_ae_title(text) is valid


@QUICK
@given(texts)
def test_any_text_is_a_toml_string(text: str) -> None:
    written = config.toml_string(text)
    assert tomllib.loads(f"a = {written}") == {"a": text}
    assert all(c in written for c in text if c.isprintable())
    assert "\n" not in written


def test_the_file_is_the_one_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STRONGROOM_CONFIG", raising=False)
    monkeypatch.setattr(config, "SEARCH", ("strongroom.toml", str(tmp_path / "etc.toml")))
    with pytest.raises(
        ConfigError, match=r"no configuration: neither strongroom\.toml nor .*etc\.toml exists"
    ) as raised:
        config.locate(None)
    assert "strongroom init" in raised.value.hint
    (tmp_path / "etc.toml").touch()
    assert config.locate(None) == tmp_path / "etc.toml"
    (tmp_path / "strongroom.toml").touch()
    assert config.locate(None) == tmp_path / "strongroom.toml"
    monkeypatch.setenv("STRONGROOM_CONFIG", "environment.toml")
    assert config.locate(None) == tmp_path / "environment.toml"
    assert config.locate("given.toml") == tmp_path / "given.toml"
