"""The desk's settings, and what a peer's file says for it: every rule is told with its key, what is good is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from storescp import config, desksettings, peers
from storescp.config import parse_address
from storescp.desksettings import DeskSettings
from storescp.peers import PeerError, PeerFile

GOOD = DeskSettings(listen=["127.0.0.1:2763", "[::1]:2763"], web=["127.0.0.1:8443"], viewer="viewer")


def test_a_desk_runs_where_it_has_an_address_and_by_default_has_none() -> None:
    assert not DeskSettings().runs
    assert DeskSettings(listen=["127.0.0.1:2763"]).runs
    assert DeskSettings(web=["127.0.0.1:8443"]).runs
    assert desksettings.check(GOOD, parse_address) == desksettings.check(DeskSettings(), parse_address) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"listen": ["localhost:2763"]}, "desk.listen: 'localhost:2763' is no address with a port"),
        ({"web": ["127.0.0.1"]}, "desk.web: '127.0.0.1' is no address with a port"),
        ({"web": ["127.0.0.1:2763"]}, "desk.web: '127.0.0.1:2763' is also in desk.listen"),
        ({"certificate": "x.pem"}, "desk.certificate: goes with desk.private_key"),
        ({"private_key": "x.key"}, "desk.certificate: goes with desk.private_key"),
        ({"maximum_associations": 0}, "desk.maximum_associations: must be from 1 to 1000"),
        ({"idle_seconds": 0}, "desk.idle_seconds: must be from 1"),
        ({"queries_per_minute": -1}, "desk.queries_per_minute: must be from 0"),
        ({"instances_per_hour": -1}, "desk.instances_per_hour: must be from 0"),
        ({"web": []}, "desk.viewer: goes with desk.web"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_told_with_its_key(changed: dict[str, Any], said: str) -> None:
    [error] = desksettings.check(msgspec.structs.replace(GOOD, **changed), parse_address)
    assert error.startswith(said)


def test_an_address_of_the_gate_is_not_the_desks_as_well(tmp_path: Path) -> None:
    settings = config.Settings(
        store=config.Store(path="s", anchors="a", spool="p", signing_key="ed25519:" + "A" * 43 + "="),
        gate=config.Gate(listen=["127.0.0.1:2762", "127.0.0.1:0"]),
        desk=DeskSettings(listen=["127.0.0.1:0", "127.0.0.1:2762"]),
    )
    file = tmp_path / "strongroom.toml"
    file.write_text(config.render(settings))
    with pytest.raises(config.ConfigError) as caught:
        config.load(file)
    assert str(caught.value) == f"{file}: desk.listen: '127.0.0.1:2762' is the gate's, too"


def test_a_peers_keys_for_the_desk_are_read(tmp_path: Path) -> None:
    file = PeerFile(
        ae_title="VIEW", plaintext=True, roles=["reader"], sees_ae_titles=["CT1 "], sees_modalities=["CT", "US"]
    )
    for place, found in (("ct1.example:104", ("ct1.example", 104)), ("[fd00::1]:2762", ("fd00::1", 2762))):
        file.listens = place
        read = peers.parse(peers.render(file), tmp_path / "VIEW.toml")
        assert read.listens == found
        assert (read.roles, read.sees_ae_titles, read.sees_modalities) == ({"reader"}, {"CT1"}, {"CT", "US"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"roles": ["root"]}, "roles: 'root' is none of reader, sender, admin"),
        ({"sees_ae_titles": ["a\\b"]}, "sees_ae_titles: 'a\\b' is no AE title"),
        ({"sees_modalities": ["ct*"]}, "sees_modalities: 'ct*' is no modality"),
        *(
            ({"listens": text}, f"listens: '{text}' is no place")
            for text in ("ct1", ":104", "ct1:0", "ct1:65536", "a b:1")
        ),
    ],
)
def test_a_peers_key_that_breaks_a_rule_is_told(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    file = msgspec.structs.replace(PeerFile(ae_title="VIEW", plaintext=True), **changed)
    with pytest.raises(PeerError) as caught:
        peers.parse(peers.render(file), tmp_path / "VIEW.toml")
    assert said in str(caught.value)
