"""The sheet for a vendor's engineer says where a peer connects, by what it may do and what is open."""

from __future__ import annotations

from pathlib import Path

import pytest

from storescp.cli.sheet import Issued, closed, sheet
from storescp.config import Config, Settings, Store
from storescp.peers import PeerFile

ISSUED = Issued("P.key", "P.pem", "ca.pem", "2028-01-01T00:00:00Z", "AA:BB")


def config(*, listen: str = "", web: str = "") -> Config:
    settings = Settings(store=Store(path="s", anchors="a", spool="p", signing_key="ed25519:" + "A" * 43 + "="))
    settings.gate.listen = ["192.0.2.1:2762"]
    settings.desk.listen, settings.desk.web = [listen] if listen else [], [web] if web else []
    return Config(Path("strongroom.toml"), settings)


def peer(*operations: str, roles: tuple[str, ...] = ()) -> PeerFile:
    return PeerFile(ae_title="P", operations=list(operations), roles=list(roles))


OPEN = config(listen="192.0.2.1:2763", web="[2001:db8::1]:8443")


@pytest.mark.parametrize(
    ("who", "there", "not_there"),
    [
        (peer("echo", "store"), ["storage destination", "2762", "echoscu"], ["2763", "8443", "findscu", "curl"]),
        (peer("find", "move"), ["(C-FIND, C-MOVE)", "2763", "findscu"], ["storage destination", "echoscu", "curl"]),
        (
            peer("echo", roles=("sender",)),
            ["https://[2001:db8::1]:8443/dicomweb", "store (STOW-RS)", "-X POST"],
            ["retrieve", "findscu"],
        ),
        (peer(roles=("reader",)), ["search and retrieve", "studies?limit=1"], ["STOW-RS", "echoscu", "storage"]),
        (peer(roles=("admin",)), ["store (STOW-RS), search and retrieve"], ["storage destination"]),
    ],
)
def test_it_names_what_the_peer_may_and_nothing_else(who: PeerFile, there: list[str], not_there: list[str]) -> None:
    text = sheet(OPEN, who, ISSUED, "")
    assert [part for part in (*there, "P.key", "P.pem", "AA:BB") if part not in text] == []
    assert [part for part in not_there if part in text] == []
    assert max(map(len, text.splitlines())) <= 180


def test_what_is_closed_is_no_address_but_a_word_to_who_adds_the_peer() -> None:
    who = peer("echo", "find", roles=("reader",))
    assert closed(OPEN, who) == []
    told = closed(config(), who)
    assert ["desk.listen" in told[0], "desk.web" in told[1], len(told)] == [True, True, 2]
    text = sheet(config(), who, ISSUED, "pacs.example")
    assert "pacs.example 2762" in text
    assert "DICOMweb" not in text
    assert "findscu" not in text
    assert closed(config(), peer("echo", "store")) == []
