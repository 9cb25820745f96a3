"""The conformance statement says what the gate's own code has, and the one under docs/ is that of the defaults."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from storage.query import SUPPORTED
from storescp import conformance, peers
from storescp.config import Config, Plaintext, Settings, Store
from storescp.desk.models import MODELS
from storescp.desksettings import DeskSettings
from storescp.gate.status import OF_THE_WEB, Reason
from storescp.gate.tls import strict_context
from storescp.gate.transfer import COMMITMENT, ENCODINGS, STORAGE_CLASSES, VERIFICATION
from storescp.peers import OPERATIONS, Peer, PeerFile, Peers

CHECKED_IN = Path(__file__).parents[3] / "docs" / "conformance.md"
CT_IMAGE, PRIVATE = "1.2.840.10008.5.1.4.1.1.2", "1.3.12.2.1107.5.9.1"


def config(**gate: object) -> Config:
    settings = Settings(store=Store(path="s", anchors="a", spool="p", signing_key="ed25519:" + "A" * 43 + "="))
    for name, value in gate.items():
        setattr(settings.gate, name, value)
    return Config(Path("strongroom.toml"), settings)


def peer(title: str = "CT1", **changes: object) -> Peer:
    file = msgspec.structs.replace(PeerFile(ae_title=title, plaintext=True), **changes)
    return peers.parse(peers.render(file), Path(f"{title}.toml"))


def of(*known: Peer, **gate: object) -> str:
    return conformance.statement(config(**gate), Peers({p.ae_title: p for p in known}))


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading is given, without its two first lines."""
    [found] = re.findall(rf"(?m)^\| {re.escape(heading)} \|.*\n\| ---.*\n((?:\|.*\n)+)", text)
    return [[cell.strip(" `") for cell in line.strip("| ").split(" | ")] for line in found.splitlines()]


def test_the_statement_under_docs_is_that_of_the_defaults() -> None:
    # After a change: strongroom's own command on a store with the default settings, or
    # conformance.statement(config(), Peers({})), writes it anew.
    assert of() == CHECKED_IN.read_text()


def test_it_has_the_sections_of_the_template_in_their_order() -> None:
    headings = re.findall(r"(?m)^## (.+)$", of())
    assert headings == [
        "1 Overview", "2 Table of contents", "3 Introduction", "4 Implementation model",
        "5 Service and interoperability description", "6 Configuration", "7 Network and media communication details",
        "8 Security", "Annexes",
    ]  # fmt: skip


def test_its_tables_are_what_the_gate_has() -> None:
    text = of()
    assert {uid for _, uid in rows(text, "SOP Class")} == STORAGE_CLASSES
    assert {uid for _, uid in rows(text, "Transfer syntax")} == set(ENCODINGS)
    answers = {(row[1], row[2]) for row in rows(text, "Meaning")}
    assert answers == {(f"{r.status:04X}", r.comment) for r in set(Reason) - OF_THE_WEB} | {
        ("0000", "the instance is sealed and durable")
    }
    assert [name for _, name in rows(text, "Version")] == [s["name"] for s in strict_context().get_ciphers()]
    assert {version for version, _ in rows(text, "Version")} == {"TLS 1.2", "TLS 1.3"}
    assert "Private" not in [name for name, _ in rows(text, "SOP Class")]


def test_the_web_services_of_a_desk_are_claimed_with_why_a_store_fails() -> None:
    made = config()
    assert "it has no `desk.web`" in conformance.statement(made, Peers({}))
    made.settings.desk.web = ["127.0.0.1:8443"]
    text = conformance.statement(made, Peers({}))
    assert [row[0] for row in rows(text, "Transaction")] == [
        "Search (QIDO-RS)",
        "Retrieve (WADO-RS)",
        "Store (STOW-RS)",
    ]
    assert {f"{reason.status:04X}" for reason in OF_THE_WEB} <= {
        row[0] for row in rows(text, "Reason of a failed store")
    }


def test_only_what_is_served_is_claimed() -> None:
    assert [name for name in OPERATIONS if conformance.served(config(), name)] == ["echo", "store"]
    text = of(peer(operations=list(OPERATIONS)))
    services = {row[0]: row[1:] for row in re.findall(r"\| ([A-Z][^|]+) \| (Yes|No) \| (Yes|No) \|", text)}
    assert {name for name, (scu, _) in services.items() if scu == "Yes"} == set()
    assert {name for name, (_, scp) in services.items() if scp == "Yes"} == {"Verification", "Storage"}


def test_the_audit_profiles_are_claimed_where_messages_are_sent() -> None:
    made = config()
    assert "No message is sent" in conformance.statement(made, Peers({}))
    made.settings.audit.forward = "log.example:6514"
    text = conformance.statement(made, Peers({}))
    assert "No message is sent" not in text
    assert "`log.example:6514`" in text


@pytest.mark.parametrize(
    ("known", "classes"),
    [
        ([peer(sop_classes=[CT_IMAGE])], {VERIFICATION, CT_IMAGE}),
        ([peer(sop_classes=[CT_IMAGE], operations=["store"])], {CT_IMAGE}),
        ([peer(operations=["echo"])], {VERIFICATION}),
        ([peer(operations=["find"])], set()),
        ([peer(sop_classes=[CT_IMAGE], private_sop_classes=[PRIVATE])], {VERIFICATION, CT_IMAGE, PRIVATE}),
        ([peer(operations=["echo"]), peer("MR1", operations=["store"])], {VERIFICATION} | STORAGE_CLASSES),
        # What is no storage class is none because a file says so.
        ([peer(sop_classes=["1.2.840.10008.5.1.4.31"])], {VERIFICATION}),
    ],
)
def test_the_tables_hold_what_at_least_one_peer_may_use(known: list[Peer], classes: set[str]) -> None:
    assert set(conformance.classes(known)) == classes
    text = of(*known)
    assert f"Peers configured: {len(known)}" in text
    assert not any(f"`{p.ae_title}`" in text for p in known)


def test_limits_ports_and_listeners_without_tls_are_those_of_the_configuration() -> None:
    plain = Plaintext(listen="192.0.2.1:11112", plaintext="x", addresses=["192.0.2.7"], peers=["CT1"])
    text = of(
        ae_title="ARCHIVE", listen=["192.0.2.1:2762", "[2001:db8::1]:2763"], maximum_pdu=65536, plaintext=[plain],
        maximum_associations=7, idle_seconds=33,
    )  # fmt: skip
    ports = [(row[0], row[1]) for row in rows(text, "Port")]
    assert ports == [("2762", "DICOM over TLS"), ("2763", "DICOM over TLS"), ("11112", "DICOM WITHOUT TLS")]
    assert "on every port but the 1 WITHOUT TLS" in text
    for said in ("`ARCHIVE`", "65536 bytes", "7 accepted", "| 33 s |"):
        assert said in text
    assert "STRONGROOM" not in text.replace("STRONGROOM_", "")


def with_desk() -> Config:
    made = config()
    made.settings.desk = DeskSettings(listen=["192.0.2.1:2763"], web=["192.0.2.1:8443"])
    return made


def test_with_a_desk_its_services_keys_contexts_and_ports_are_told_and_without_none() -> None:
    everybody = peer(operations=list(OPERATIONS), listens="ct1.example:104")
    text = conformance.statement(with_desk(), Peers({"CT1": everybody}))
    services = {row[0]: row[1:] for row in re.findall(r"\| ([A-Z][^|]+) \| (Yes|No) \| (Yes|No) \|", text)}
    assert all(provider == "Yes" for _, provider in services.values())
    assert services["Storage"] == ("Yes", "Yes")
    assert [name for name in OPERATIONS if conformance.served(with_desk(), name)] == list(OPERATIONS)
    contexts = {row[1] for row in rows(text, "Abstract syntax")}
    assert set(MODELS) | {COMMITMENT} <= contexts
    keys = {row[1][:11].replace(",", "")[1:9] for row in rows(text, "Level")}
    assert keys == {tag for attributes in SUPPORTED.values() for tag in attributes}
    assert {("2763", "DICOM over TLS (desk)"), ("8443", "DICOMweb, HTTPS (desk)")} <= {
        (row[0], row[1]) for row in rows(text, "Port")
    }
    assert not (set(MODELS) | {COMMITMENT}) & {row[1] for row in rows(of(everybody), "Abstract syntax")}
    assert "it has no desk" in of(everybody)
