"""What a TLS scanner sees of the gate: the profile of PS3.15 B.12 (BCP 195) and nothing beside it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from conftest import Server

SUITES = {
    "TLSv1.2": {"ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-GCM-SHA256"},
    "TLSv1.3": {"TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"},
}


@pytest.mark.needs("sslscan")
def test_a_scanner_finds_tls_1_2_and_1_3_with_aead_and_forward_secrecy_and_nothing_else(
    make_server: Callable[[], Server],
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.start("gate")
    issued = server.home / "issued" / "CT1"
    command = ["sslscan", "--xml=-", f"--certs={issued / 'CT1.pem'}", f"--pk={issued / 'CT1.key'}"]
    done = subprocess.run([*command, f"127.0.0.1:{server.port}"], capture_output=True, text=True, check=True)
    found = ElementTree.fromstring(done.stdout)
    enabled = {f"{p.get('type')} {p.get('version')}" for p in found.iter("protocol") if p.get("enabled") == "1"}
    assert enabled == {"tls 1.2", "tls 1.3"}
    suites: dict[str, set[str]] = {}
    for cipher in found.iter("cipher"):
        suites.setdefault(str(cipher.get("sslversion")), set()).add(str(cipher.get("cipher")))
    assert suites == SUITES
    assert not [e for e in found.iter("heartbleed") if e.get("vulnerable") != "0"]
    assert [e.get("supported") for e in found.iter("renegotiation")] == ["0"]
    # As every scanner that has no certificate is served.
    assert scan_without_certificate(server) == []


def scan_without_certificate(server: Server) -> list[str]:
    """Return what a peer without a certificate gets from the gate beyond a handshake that fails."""
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-quiet", "-ign_eof"],
        input=b"\x01\x00\x00\x00\x00\x10" + bytes(16),
        capture_output=True,
        timeout=30,
        check=False,
    )
    return [line for line in done.stdout.decode(errors="replace").splitlines() if line]
