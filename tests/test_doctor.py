"""The doctor on a real store finds what is planted there; from outside it tells a closed server from an open one."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pki
from conftest import Server, send
from pydicom.data import get_testdata_file
from pynetdicom import AE

from storescp.doctor import exposure, probe, running
from storescp.doctor.findings import CRITICAL, OK, UNKNOWN, WARNING
from storescp.doctor.probe import ACCEPTED, SILENT

CT = Path(str(get_testdata_file("CT_small.dcm")))
# An address of this process's own on the loopback: whoever listens on it is the server of this test.
LOCAL = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.86"
PLAINTEXT = f'[{{ listen = "{LOCAL}:0", plaintext = "a test", addresses = ["127.0.0.1"], peers = ["OLD"] }}]'


def grades(found: Any) -> dict[str, str]:
    """Return the grade of each practice in a JSON document."""
    return {finding["practice"]: finding["grade"] for finding in found["findings"]}


def texts(found: Any) -> dict[str, str]:
    return {finding["practice"]: finding["found"] for finding in found["findings"]}


@contextmanager
def accepting(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve connections one after the other until it is left; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    serve(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_doctor_finds_what_a_store_for_trying_out_lacks_and_what_was_planted(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    text = server.config.read_text()
    assert "plaintext = []" in text
    server.config.write_text(text.replace("plaintext = []", f"plaintext = {PLAINTEXT}"))
    server.start()

    # Nothing is there yet that could be lost.
    kept = {"recovery-export", "backup", "drill", "patches", "alerts", "audit-forwarding"}
    empty = grades(server.run("doctor", "--json").json())
    assert {empty[practice] for practice in kept} == {"advice"}
    assert send(server, [CT]) == [0]
    server.wait_admitted()

    done = server.run("doctor", "--json")
    found = done.json()
    assert (done.status, found["format"]) == (6, 1)
    graded, said = grades(found), texts(found)
    # Whatever the machine under the test is: what lies beside the store is on its disk.
    assert graded["key-file"] in ({CRITICAL, WARNING, UNKNOWN, OK} if in_memory(server) else {CRITICAL, WARNING})
    assert graded["anchors"] == graded["users"] == graded["plaintext"] == graded["slots"] == WARNING
    assert graded["recovery-export"] == graded["backup"] == CRITICAL
    assert graded["drill"] == graded["patches"] == graded["alerts"] == graded["audit-forwarding"] == WARNING
    assert graded["modes"] == graded["tls-profile"] == graded["expiring"] == graded["rotation"] == OK
    assert graded["retention"] == graded["peers"] == "advice"
    assert "a test" in said["plaintext"]
    assert sum(found["summary"].values()) == len(found["findings"])
    for finding in found["findings"]:
        assert finding["why"]
        assert finding["mend"] or finding["grade"] in {OK, UNKNOWN}

    # From outside: the listener with TLS shows nothing, the one without says that it is there.
    done = server.run("doctor", "--exposure", f"127.0.0.1:{server.port}", "--seconds", "30", "--json")
    assert (done.status, set(grades(done.json()).values())) == (0, {OK}), done.out
    assert "own servers only" in done.err
    heard = running.listeners((), ())
    assert isinstance(heard, tuple)
    port = next(one.port for one in heard if one.address == LOCAL)
    done = server.run("doctor", "--exposure", f"{LOCAL}:{port}", "--seconds", "30", "--json")
    assert (done.status, grades(done.json())["no-tls"]) == (6, WARNING), done.out

    # A locked vault tells little, and that is said; what is planted in files and settings is seen all the same.
    server.ok("lock")
    os.chmod(server.home / "store.key", 0o644)
    expired = pki.authority("gone").issue("server", server=True, start=-9 * pki.DAY, end=-2 * pki.DAY)
    expired.save(server.home / "tls", "server")
    (server.peers / "broken.toml").write_text("colour = 3\n")
    server.set("gate", listen=["0.0.0.0:2762"])
    server.set("alerts", webhooks=["https://alerts.example/hook"])
    done = server.run("doctor", "--all")
    assert done.status == 6
    for line in (
        f"{server.home / 'store.key'} is open to others: chmod 0600",
        "rotation: the vault is locked",
        "slots: 1 slot",
        "expiring: HAS EXPIRED: the server's certificate",
        "peers: peer files that are not read: ",
        "addresses: on every address of this machine: 0.0.0.0:2762",
        "alerts: alerts are sent",
    ):
        assert line in done.out, line


def in_memory(server: Server) -> bool:
    return os.stat(server.home).st_dev == os.stat("/dev/shm").st_dev


def test_a_server_that_is_open_to_all_is_found_from_outside_without_any_store(
    make_server: Callable[..., Server],
) -> None:
    entity = AE("OPEN")
    entity.add_supported_context("1.2.840.10008.1.1")
    listening = entity.start_server(("127.0.0.1", 0), block=False)
    try:
        port = listening.socket.getsockname()[1]
        done = make_server().run("doctor", "--exposure", f"127.0.0.1:{port}", "--seconds", "30", "--json")
    finally:
        listening.shutdown()
    graded = grades(done.json())
    assert (done.status, graded["no-tls"]) == (6, CRITICAL)
    assert graded["no-certificate"] == graded["old-tls"] == OK


def test_nobody_there_and_no_address_are_said_in_words(make_server: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = make_server().run("doctor", "--exposure", f"127.0.0.1:{port}")
    assert (done.status, "cannot be reached" in done.err) == (1, True)
    assert make_server().run("doctor", "--exposure", "http://x/").status == 2


def test_tls_that_asks_for_no_certificate_and_takes_old_versions_is_found_with_what_it_shows(tmp_path: Path) -> None:
    holder = pki.authority("here").issue("old.example", server=True, end=10 * pki.DAY).save(tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")

    def serve(connection: socket.socket) -> None:
        connection.settimeout(30)
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                secured.recv(1 << 16)
                secured.sendall(b"\x02\0\0\0\0\xb8" + bytes(184))
                secured.recv(1 << 16)
        except OSError:
            pass

    with accepting(serve) as port:
        seen = probe.look("127.0.0.1", port, 30)
    assert seen.bare.kind == ACCEPTED
    assert seen.old == dict.fromkeys(probe.OLD, True)
    assert isinstance(seen.shown, probe.Shown)
    assert seen.shown.certificate == holder.certificate
    graded = {finding.practice: finding for finding in exposure.judge(seen, datetime.now(UTC))}
    assert graded["no-certificate"].grade == graded["old-tls"].grade == CRITICAL
    assert (graded["certificate"].grade, "it ends in" in graded["certificate"].found) == (WARNING, True)
    assert graded["no-tls"].grade == OK


def test_a_server_that_says_nothing_is_unknown_and_not_well() -> None:
    done = threading.Event()

    def serve(_connection: socket.socket) -> None:
        done.wait(60)

    with accepting(serve) as port:
        try:
            seen = probe.look("127.0.0.1", port, 0.2)
        finally:
            done.set()
    assert (seen.plain.kind, seen.bare.kind) == (SILENT, SILENT)
    assert {finding.grade for finding in exposure.judge(seen, datetime.now(UTC))} == {UNKNOWN}
