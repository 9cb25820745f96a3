"""What ends soon: found in each place in which there is one, in time; what cannot be read never passes for good."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pki
import pytest

from keys.keyring import Authority
from storescp import clock, config
from storescp.config import Config, Gate, Settings, Store
from storescp.vault import expiry
from storescp.vault.expiry import ending

DAY = timedelta(days=1)
LONG = 100 * DAY
NOW = datetime.now(UTC)


@pytest.fixture
def made(tmp_path: Path) -> Config:
    """A configuration with a certificate, an authority, two lists and a peer, all good for 100 days."""
    ca = pki.authority("CA")
    ca = pki.make("CA", None, key=ca.key, ca=True, end=LONG)
    ca.save(tmp_path / "tls", "ca")
    ca.issue("server", end=LONG, server=True).save(tmp_path / "tls", "server", ca)
    (tmp_path / "tls" / "one.crl").write_bytes(pki.pem(ca.revoke(end=LONG)))
    (tmp_path / "tls" / "two.crl").write_bytes(pki.der(ca.revoke(end=LONG)))
    (tmp_path / "peers.d").mkdir()
    old, new = ca.issue("CT1", end=DAY), ca.issue("CT1", end=LONG)
    peer = f'ae_title = "CT1"\ncertificates = ["""{old.pem}""", """{new.pem}"""]\n'
    (tmp_path / "peers.d" / "CT1.toml").write_text(peer)
    key = "ed25519:" + base64.b64encode(bytes(32)).decode()
    settings = Settings(
        store=Store(path="store", anchors="anchors", spool="spool", signing_key=key),
        gate=Gate(trust=["tls/ca.pem"], crls=["tls/one.crl", "tls/two.crl"]),
    )
    file = tmp_path / "strongroom.toml"
    file.write_text(config.render(settings))
    return Config(file, settings)


def findings(made: Config, now: datetime = NOW, own: Authority | None = None) -> list[str]:
    return [event["text"] for event in ending(made, own, now) if event["kind"] == "finding"]


def test_what_holds_for_long_is_no_finding_and_it_is_said_what_was_looked_at(made: Config) -> None:
    own = Authority(pki.make("own", ca=True, end=LONG).pem, b"")
    assert list(ending(made, own, NOW)) == [{"kind": "step", "text": "looked at 6 certificates and lists"}]


def test_certificates_are_told_of_a_month_before_and_lists_a_week(made: Config) -> None:
    own = Authority(pki.make("own", ca=True, end=LONG).pem, b"")
    names = ["the server's certificate", "the authority ca.pem", "the store's own authority"]
    names += ["the certificate of peer CT1", "the revocation list one.crl", "the revocation list two.crl"]
    soon = findings(made, NOW + 71 * DAY, own)
    assert all(" ends on 2" in line for line in soon)
    assert sorted(line.partition(" ends")[0] for line in soon) == sorted(names[:4])
    assert len(findings(made, NOW + 94 * DAY, own)) == 6
    gone = findings(made, NOW + 101 * DAY, own)
    assert sorted(line.partition(" HAS EXPIRED on ")[0] for line in gone) == sorted(names)
    assert clock.text(NOW + LONG)[:10] in gone[0]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda home: (home / "tls" / "server.pem").unlink(), "the server's certificate cannot be read"),
        (lambda home: (home / "tls" / "server.pem").write_text("x"), "the server's certificate cannot be read"),
        (lambda home: (home / "tls" / "ca.pem").write_text(""), "the authority ca.pem cannot be read"),
        (lambda home: (home / "tls" / "one.crl").write_bytes(b"x"), "the revocation list one.crl cannot be read"),
        (lambda home: (home / "peers.d" / "CT1.toml").write_text("x = 1"), "CT1.toml: x: unknown key"),
    ],
)
def test_what_cannot_be_read_is_a_finding(made: Config, harm: Callable[[Path], object], said: str) -> None:
    harm(made.file.parent)
    assert any(said in line for line in findings(made))


def test_what_is_closed_to_the_vault_is_said_to_be_the_gates(made: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_file: Path) -> datetime:
        raise PermissionError

    # For root nothing is closed.
    monkeypatch.setattr(expiry, "_certificate", closed)
    [event] = ending(made, None, NOW)
    assert event["text"].endswith("closed to the vault: the server's certificate, the authority ca.pem")
    assert event["text"].startswith("looked at 3 ")
