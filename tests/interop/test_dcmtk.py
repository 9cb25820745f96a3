"""DCMTK and OpenSSL as peers: what gets in, what stays out, and what the log says about it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
import scu
import trustme
from conftest import Finished, Server, dcmtk, find_command, tls_arguments
from pydicom.data import get_testdata_file
from pydicom.data.data_manager import DATA_ROOT
from pynetdicom.presentation import build_context
from running import serving

pytestmark = pytest.mark.needs("storescu", "echoscu", "openssl")

PRIVATE_CLASS = "1.2.826.0.1.3680043.8.498.1"
DIRECTORIES = Path(DATA_ROOT) / "test_files" / "dicomdirtests"
# 50 instances of one study; and 7 and 4 of two others.
LARGE_STUDY = sorted((DIRECTORIES / "TINY_ALPHA" / "PT000000" / "ST000000" / "SE000000").iterdir())
MR_STUDY = sorted((DIRECTORIES / "98892003" / "MR700").iterdir())
CT_STUDY = sorted((DIRECTORIES / "77654033" / "CT2").iterdir())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Packs stay open: how many there are does not depend on how fast the tests run.
    with serving(tmp_path_factory, "CT1", "CT2", pack_idle_seconds=600) as made:
        yield made


def issued(server: Server, title: str = "CT1") -> Path:
    return server.home / "issued" / title


def echo(server: Server, *arguments: str | Path) -> Finished:
    return dcmtk("echoscu", "-v", *(arguments or tls_arguments(issued(server))), "127.0.0.1", str(server.port))


def storescu(server: Server, files: Sequence[Path | str], title: str = "CT1") -> Finished:
    arguments = tls_arguments(issued(server, title), title)
    return dcmtk("storescu", "-v", *arguments, "127.0.0.1", str(server.port), *files)


def uids(files: Sequence[Path]) -> set[str]:
    return {scu.read(file).sop_instance for file in files}


def listed(server: Server, *filters: str) -> set[str]:
    return {row["sop"] for row in server.list("instance", *filters)}


def packs(server: Server) -> set[str]:
    found = [*(server.store / "objects").rglob("*"), *server.incoming.iterdir()]
    # Neither files that are made ahead nor the gate's events.
    return {path.name for path in found if path.is_file() and not path.suffix}


# What gets in.


def test_echoscu_gets_an_answer(server: Server) -> None:
    done = echo(server)
    assert done.status == 0, done.err
    assert "Success" in done.out + done.err


def test_storescu_stores_several_files_that_come_back_equal(server: Server, tmp_path: Path) -> None:
    names = ("CT_small.dcm", "image_dfl.dcm", "reportsi.dcm", "waveform_ecg.dcm", "rtplan.dcm")
    files = [Path(get_testdata_file(name, download=False)) for name in names]
    done = storescu(server, files)
    assert done.status == 0, done.err
    assert (done.out + done.err).count("Received Store Response (Success)") == len(files)
    server.wait_log(f"association .* released: {len(files)} stored, 0 refused")
    for file in files:
        item = scu.read(file)
        server.ok("export", "--sop", item.sop_instance, "--output", tmp_path / file.name)
        assert scu.same(tmp_path / file.name, file), file.name


def test_a_private_sop_class_is_accepted_from_a_peer_that_may_store_it_and_from_no_other(
    server: Server, tmp_path: Path
) -> None:
    folder = issued(server, "PRIVATE")
    server.ok("peer", "add", "PRIVATE", "--issue", folder, "--private-sop-class", PRIVATE_CLASS)
    server.wait_log("peers and certificates read")
    data_set = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    data_set.SOPClassUID = data_set.file_meta.MediaStorageSOPClassUID = PRIVATE_CLASS
    data_set.save_as(tmp_path / "private.dcm")
    item = scu.read(tmp_path / "private.dcm")
    contexts = [item.context, build_context(scu.VERIFICATION)]
    with scu.associated(server.port, scu.tls(issued(server)), contexts) as association:
        assert [c.abstract_syntax for c in association.accepted_contexts] == [scu.VERIFICATION]
    assert scu.send(server.port, scu.tls(folder, "PRIVATE"), [item], calling="PRIVATE") == [0]
    [row] = server.list("instance", "--aet", "PRIVATE")
    assert (row["sop"], row["sop_class"]) == (item.sop_instance, PRIVATE_CLASS)


def test_a_study_sent_with_an_association_per_image_ends_in_a_pack_a_worker_at_most(server: Server) -> None:
    before = packs(server)
    items = [scu.read(file) for file in LARGE_STUDY]
    assert scu.send(server.port, scu.tls(issued(server)), items) == [0] * len(items)
    assert listed(server, "--study", items[0].study) == {item.sop_instance for item in items}
    assert len(items) == 50
    # Which worker takes an association depends on whether the one before has ended yet.
    assert 1 <= len(packs(server) - before) <= len(server.pids("gate-worker"))


def test_two_studies_sent_in_parallel_are_both_whole(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(storescu, server, MR_STUDY), pool.submit(storescu, server, CT_STUDY, "CT2")]
        assert [job.result().status for job in jobs] == [0, 0]
    for files in (MR_STUDY, CT_STUDY):
        assert listed(server, "--study", scu.read(files[0]).study) == uids(files)


def test_a_sender_that_stops_within_an_object_does_not_hold_up_another(server: Server, tmp_path: Path) -> None:
    item = scu.large_file(tmp_path / "large.dcm", frames=40)
    other, handlers = scu.midway(lambda: storescu(server, CT_STUDY, "CT2"), after=5)
    with scu.associated(server.port, scu.tls(issued(server)), [item.context], handlers=handlers) as association:
        assert scu.store(association, item).Status == 0
    assert other.result(0).status == 0
    server.ok("export", "--sop", item.sop_instance, "--output", tmp_path / "exported.dcm")
    assert scu.raw_data_set(tmp_path / "exported.dcm") == item.data


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_association_works_over_each_tls_version_that_is_allowed(server: Server, version: ssl.TLSVersion) -> None:
    context = scu.tls(issued(server))
    context.minimum_version = context.maximum_version = version
    with scu.associated(server.port, context, [build_context(scu.VERIFICATION)]) as association:
        assert association.send_c_echo().Status == 0


def test_silent_connections_do_not_stop_others(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert echo(server).status == 0


def test_a_certificate_of_another_authority_gets_in_where_it_is_bound_to_a_peer(server: Server, tmp_path: Path) -> None:
    folder = foreign(server, tmp_path, "BOUND")
    server.ok("peer", "add", "BOUND", "--certificate", folder / "BOUND.pem")
    server.wait_log("peers and certificates read")
    assert echo(server, *tls_arguments(folder, "BOUND")).status == 0


# What stays out, and what the log says.


def foreign(server: Server, folder: Path, stem: str, **options: Any) -> Path:
    """Make a key and a certificate of another authority, to be used as those that the store issues."""
    leaf = trustme.CA().issue_cert("device.example", **options)
    leaf.private_key_pem.write_to_path(folder / f"{stem}.key")
    leaf.cert_chain_pems[0].write_to_path(folder / f"{stem}.pem")
    shutil.copy(issued(server) / "ca.pem", folder)
    return folder


def refused(server: Server, words: str, *arguments: str | Path) -> str:
    """Let echoscu try; return what it said."""
    done = echo(server, *arguments)
    server.wait_log(rf"connection from 127\.0\.0\.1:\d+ refused: .*{words}")
    assert done.status != 0
    return done.out + done.err


def test_another_called_ae_title_is_rejected(server: Server) -> None:
    said = refused(server, "the called AE title is not this server's", *tls_arguments(issued(server), called="OTHER"))
    assert "Called AE Title Not Recognized" in said


def test_an_unknown_calling_ae_title_is_rejected(server: Server) -> None:
    arguments = tls_arguments(issued(server))
    said = refused(server, "NOBODY: no peer has this calling AE title", "-aet", "NOBODY", *arguments[2:])
    assert "Calling AE Title Not Recognized" in said


def test_a_certificate_of_another_peer_is_rejected(server: Server) -> None:
    arguments = tls_arguments(issued(server, "CT2"), "CT2")
    words = "CT1: the certificate is not one of the peer with this calling AE title"
    said = refused(server, words, "-aet", "CT1", *arguments[2:])
    assert "Calling AE Title Not Recognized" in said


def test_a_certificate_of_another_authority_is_rejected(server: Server, tmp_path: Path) -> None:
    arguments = tls_arguments(foreign(server, tmp_path, "CT1"))
    refused(
        server,
        "the peer's certificate is not accepted: its authority is not in gate.trust, and it is in no peer file",
        *arguments,
    )


def test_an_expired_certificate_is_rejected_although_it_is_bound_to_a_peer(server: Server, tmp_path: Path) -> None:
    folder = foreign(server, tmp_path, "OLD", not_after=datetime.now(UTC) - timedelta(days=1))
    server.ok("peer", "add", "OLD", "--certificate", folder / "OLD.pem")
    server.wait_log("peers and certificates read")
    refused(server, "not accepted: it has expired", *tls_arguments(folder, "OLD"))


def test_a_connection_without_a_certificate_is_rejected(server: Server) -> None:
    arguments = ("-aet", "CT1", "-aec", "STRONGROOM", "+tla", "+cf", issued(server) / "ca.pem")
    refused(server, "the peer sent no certificate", *arguments)


def test_a_peer_that_does_not_know_the_servers_authority_is_told_of_in_the_log(server: Server, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(issued(server), tmp_path / "copy"))
    trustme.CA().cert_pem.write_to_path(folder / "ca.pem")
    refused(server, "the peer does not know the authority of this server's certificate", *tls_arguments(folder))


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"\1\0\0\0\0\xcd\0\1\0\0" + b"STRONGROOM      CT1             ", "the peer does not speak TLS"),
        (b"GET / HTTP/1.1\r\n\r\n", "the peer speaks HTTP"),
    ],
)
def test_a_connection_without_tls_gets_no_answer(server: Server, sent: bytes, words: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 30) as plain:
        plain.sendall(sent)
        answer = b""
        with suppress(ConnectionResetError):
            while more := plain.recv(4096):
                answer += more
        server.wait_log(rf":{plain.getsockname()[1]} refused: {words}")
    # Nothing, or an alert of TLS (RFC 8446, 6).
    assert answer[:1] in {b"", b"\x15"}
    assert len(answer) <= 7


def test_echoscu_without_tls_is_rejected(server: Server) -> None:
    refused(server, "the peer does not speak TLS", "-aet", "CT1", "-aec", "STRONGROOM")


def handshake(server: Server, *arguments: str) -> str:
    """Shake hands as CT1 with OpenSSL's client, which ends then; return what it said."""
    folder = issued(server)
    command = [str(find_command("openssl")), "s_client", "-connect", f"127.0.0.1:{server.port}", *arguments]
    command += ["-cert", str(folder / "CT1.pem"), "-key", str(folder / "CT1.key"), "-CAfile", str(folder / "ca.pem")]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.mark.parametrize("arguments", [("-tls1_2", "-cipher", "ECDHE+AESGCM"), ("-tls1_3",)])
def test_openssl_completes_a_handshake_with_aead_and_forward_secrecy(
    server: Server, arguments: tuple[str, ...]
) -> None:
    said = handshake(server, *arguments)
    assert "Verify return code: 0 (ok)" in said
    server.wait_log("refused: closed before an association was requested")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"), "the peer offers only TLS versions older than 1.2"),
        (("-tls1", "-cipher", "ALL:@SECLEVEL=0"), "the peer offers only TLS versions older than 1.2"),
        (("-tls1_2", "-cipher", "ALL:!AESGCM:!CHACHA20:!AESCCM:!ARIAGCM"), "the peer offers no cipher suite"),
    ],
    ids=["TLS 1.1", "TLS 1.0", "no AEAD"],
)
def test_openssl_completes_no_handshake_with_less(server: Server, arguments: tuple[str, ...], words: str) -> None:
    said = handshake(server, *arguments)
    assert "Cipher is (NONE)" in said
    server.wait_log(f"refused: {words}")


def test_openssl_completes_no_handshake_without_forward_secrecy(server: Server) -> None:
    # Only RSA keys can be used without it; the certificate that the store makes has another kind.
    files = [server.home / "tls" / "server.pem", server.home / "tls" / "server.key"]
    own = [file.read_bytes() for file in files]
    rsa = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("127.0.0.1", key_type=trustme.KeyType.RSA)
    try:
        replace(server, files, [rsa.cert_chain_pems[0].bytes(), rsa.private_key_pem.bytes()])
        assert "Cipher is ECDHE-RSA" in handshake(server, "-tls1_2", "-cipher", "aRSA+AESGCM")
        assert "Cipher is (NONE)" in handshake(server, "-tls1_2", "-cipher", "kRSA+AESGCM")
        server.wait_log("refused: the peer offers no cipher suite")
    finally:
        replace(server, files, own)


def replace(server: Server, files: Sequence[Path], contents: Sequence[bytes]) -> None:
    """Replace files of the server's under its hands; it may read between two of them, and then reads again."""
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    server.wait_log("peers and certificates read")


# Peers that change while the server runs.


def test_a_peer_gets_in_once_it_is_added_and_stays_out_once_it_is_removed(server: Server) -> None:
    folder = server.add_peer("CT3")
    server.wait_log("peers and certificates read")
    assert echo(server, *tls_arguments(folder, "CT3")).status == 0
    server.ok("peer", "remove", "CT3")
    server.wait_log("peers and certificates read")
    refused(server, "CT3: no peer has this calling AE title", *tls_arguments(folder, "CT3"))


def test_a_broken_peer_file_changes_nothing_and_is_reported(server: Server) -> None:
    broken, good = server.peers / "BROKEN.toml", server.peers / "CT2.toml"
    broken.write_text("ae_title = 1\n")
    server.wait_log(r"error +gate: peers and certificates stay as they were: .*BROKEN\.toml: ae_title")
    content = good.read_text()
    good.unlink()
    server.wait_log("peers and certificates stay as they were")
    for title in ("CT1", "CT2"):
        assert echo(server, *tls_arguments(issued(server, title), title)).status == 0
    good.write_text(content)
    broken.unlink()
    server.wait_log("peers and certificates read")
    assert echo(server).status == 0
