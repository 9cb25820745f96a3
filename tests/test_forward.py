"""Audit messages reach a real rsyslog over TLS: all of them, in order, through an outage and restarts, and no other."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pki
import pytest
from conftest import Server, find_command, send
from pydicom.data import get_testdata_file
from test_systemd import _WRITABLE, Machine, installation, owner, real

from storescp import auditspool
from storescp.config import Config, Settings, Store
from storescp.errands import syslog
from storescp.errands.connection import DeliveryError
from storescp.errands.forward import WINDOW, Forwarder
from storescp.forwardsettings import AuditSettings

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
UNIT = Path(__file__).parent.parent / "systemd" / "strongroom-forwarder.service"
SCHEMA = Path(__file__).parent / "schema" / "audit-message.rng"
SECONDS = 60
GTLS = any(Path("/usr/lib").glob("*/rsyslog/lmnsd_gtls.so"))

needs_gtls = pytest.mark.skipif(
    not GTLS and not os.environ.get("STRONGROOM_NO_SKIP"), reason="NOT TESTED: rsyslog-gnutls is not installed"
)
_CONFIGURATION = """
global(workDirectory="{home}" maxMessageSize="64k" defaultNetstreamDriver="gtls"
  defaultNetstreamDriverCAFile="{home}/ca.pem" defaultNetstreamDriverCertFile="{home}/localhost.pem"
  defaultNetstreamDriverKeyFile="{home}/localhost.key")
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="{mode}"
  permittedPeer=["forwarder.example"])
input(type="imtcp" port="{port}" address="127.0.0.1")
template(name="raw" type="string" string="%rawmsg%\\n")
action(type="omfile" file="{home}/messages" template="raw" asyncWriting="off" flushOnTXEnd="on")
"""
_LINE = re.compile(
    r"<(?P<priority>\d+)>1 (?P<time>\S+) \S+ strongroom \d+ DICOM\+RFC3881 "
    r'(-|\[strongroom@\d+ seq="(?P<seq>\d+)" record="(?P<record>\d+)"( head="(?P<head>\d+:[0-9a-f]{64})")?\]) '
    r"(\ufeff|#)*(?P<xml><.*>)"
)


class Arrived(NamedTuple):
    """A message as the syslog server wrote it down."""

    seq: int
    record: int
    head: str
    priority: int
    xml: str

    @property
    def root(self) -> ET.Element:
        return ET.fromstring(self.xml)

    @property
    def event(self) -> str:
        return str(self.root.find("EventIdentification/EventID").get("csd-code"))  # type: ignore[union-attr]

    @property
    def types(self) -> list[str]:
        return [str(e.get("csd-code")) for e in self.root.findall("EventIdentification/EventTypeCode")]

    @property
    def objects(self) -> dict[str, str]:
        found = self.root.findall("ParticipantObjectIdentification")
        return {str(one[0].get("csd-code")): str(one.get("ParticipantObjectID")) for one in found}

    def details(self, kind: str) -> dict[str, str]:
        found = self.root.findall("ParticipantObjectIdentification")
        [one] = [one for one in found if one[0].get("csd-code") == kind]
        return {
            str(d.get("type")): base64.b64decode(str(d.get("value"))).decode()
            for d in one.findall("ParticipantObjectDetail")
        }


def free_port() -> int:
    """Return a port that stays free while nobody listens: no connection of anybody's begins at one like it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


class Rsyslog:
    """A real rsyslog of its own, which takes messages over TLS from whoever has a certificate."""

    def __init__(self, folder: Path, mode: str = "x509/name") -> None:
        self.home = folder
        folder.mkdir()
        self.ca = pki.authority("syslog authority")
        (folder / "ca.pem").write_text(self.ca.pem)
        self.ca.issue("localhost", names=["localhost"], server=True).save(folder, "localhost")
        self.ca.issue("forwarder.example", names=["forwarder.example"]).save(folder, "forwarder")
        self.messages = folder / "messages"
        self.port = free_port()
        (folder / "rsyslog.conf").write_text(_CONFIGURATION.format(home=folder, port=self.port, mode=mode))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *within: str) -> Rsyslog:
        """Start it and wait until it listens; ``within`` is a command that starts it in a network of its own."""
        command = [*within, find_command("rsyslogd") or "rsyslogd", "-n", "-f", str(self.home / "rsyslog.conf")]
        with (self.home / "errors").open("w") as errors:
            self._process = subprocess.Popen(
                [*command, "-i", str(self.home / "pid")], stdout=subprocess.DEVNULL, stderr=errors
            )
        if not within:
            until(self._listens, "rsyslogd does not listen")
        return self

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.home / "errors").read_text()
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(60) == 0
            self._process = None

    def lines(self) -> list[Arrived]:
        """Return what arrived, in order, duplicates and all."""
        if not self.messages.exists():
            return []
        found = []
        # The last line may be being written.
        for line in self.messages.read_text("utf-8").split("\n")[:-1]:
            one = _LINE.fullmatch(line)
            assert one is not None, line
            found.append(
                Arrived(
                    int(one["seq"] or 0), int(one["record"] or 0), one["head"] or "", int(one["priority"]), one["xml"]
                )
            )
        return found

    def arrived(self) -> list[Arrived]:
        """Return the vault's messages as a receiver has them that drops a number which it has already."""
        seen: dict[int, Arrived] = {}
        for one in self.lines():
            if one.seq:
                seen.setdefault(one.seq, one)
                assert seen[one.seq] == one, "two messages have one number"
        return list(seen.values())

    def until(self, what: Callable[[Arrived], bool], saying: str) -> Arrived:
        """Wait for a message."""
        return until(lambda: next((one for one in self.arrived() if what(one)), None), saying)


def until(what: Callable[[], Any], saying: str) -> Any:
    """Wait for what another process does; return it."""
    deadline = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, saying
        time.sleep(0.05)
    return found


@pytest.fixture
def rsyslog(tmp_path: Path) -> Iterator[Rsyslog]:
    made = Rsyslog(tmp_path / "rsyslog")
    yield made
    made.stop()


def configured(server: Server, rsyslog: Rsyslog, **settings: Any) -> Server:
    server.set(
        "audit",
        forward=f"localhost:{rsyslog.port}",
        trust=str(rsyslog.home / "ca.pem"),
        certificate=str(rsyslog.home / "forwarder.pem"),
        private_key=str(rsyslog.home / "forwarder.key"),
        **settings,
    )
    return server


@pytest.fixture
def store(make_server: Callable[[], Server], rsyslog: Rsyslog) -> Iterator[Server]:
    """A store with a peer that forwards to an rsyslog, which does not run yet."""
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.set("gate", pack_idle_seconds=1, workers=1)
    yield configured(server, rsyslog)
    for pid in server.pids("audit-forwarder"):
        os.kill(pid, signal.SIGKILL)


def whole(rsyslog: Rsyslog) -> list[Arrived]:
    """Assert that the messages came in order and without a gap; return them."""
    found = rsyslog.arrived()
    assert [one.seq for one in found] == list(range(1, len(found) + 1))
    assert [one.record for one in found] == sorted(one.record for one in found)
    return found


def heads(found: list[Arrived]) -> list[str]:
    return [one.head for one in found if one.head]


@pytest.mark.needs("rsyslogd", "xmllint")
@needs_gtls
def test_messages_arrive_through_an_outage_and_restarts_without_loss_or_reordering_and_validate(
    store: Server, rsyslog: Rsyslog, tmp_path: Path
) -> None:
    rsyslog.start()
    store.start()
    assert send(store, [CT]) == [0]
    first = rsyslog.until(lambda one: one.event == "110104", "no transfer arrives")
    assert (first.priority, first.root.find("EventIdentification").get("EventActionCode")) == (85, "C")  # type: ignore[union-attr]
    assert first.objects["2"] == "1CT1"
    assert first.details("110180") == {"instances": "1", "state-held": "1"}

    # An outage: the server is gone, vault and gate go on; then the forwarder dies, too, and everything restarts.
    rsyslog.stop()
    assert send(store, [CT]) == [0]
    store.wait_admitted()
    exported = tmp_path / "out"
    store.ok("export", "--study", first.objects["110180"], "--to", exported)
    [forwarder] = store.pids("audit-forwarder")
    os.kill(forwarder, signal.SIGKILL)
    assert send(store, [MR]) == [0]
    store.wait_admitted()
    store.stop()
    store.start()
    rsyslog.start()
    again = rsyslog.until(lambda one: one.event == "110104" and one.seq > first.seq, "nothing arrives after the outage")
    # It held this one already.
    assert again.root.find("EventIdentification").get("EventActionCode") == "R"  # type: ignore[union-attr]
    study = first.objects["110180"]
    export = rsyslog.until(lambda one: one.event == "110106", "no export arrives")
    assert (export.objects["110180"], export.objects["2"], export.details("110180")["instances"]) == (
        study,
        "1CT1",
        "1",
    )

    # What an admin does arrives with whom it is about, though that is nowhere in the store any more.
    store.ok("erase", "--study", study, "--reason", "withdrawn", "--yes")
    erased = rsyslog.until(lambda one: one.event == "110105", "no erasure arrives")
    assert (erased.objects["110180"], erased.objects["2"]) == (study, "1CT1")

    # All of the chain came, up to what was recorded just now.
    records = [json.loads(line) for line in store.ok("audit", "show", "--json").out.splitlines()]
    last = records[-1]["number"]
    rsyslog.until(lambda one: one.record >= last, "the last record does not arrive")
    found = whole(rsyslog)
    told = {one.record for one in found}
    silent = {"transcript", "gate-events", "checkpoint"}
    assert [r["type"] for r in records if r["number"] not in told and r["type"] not in silent] == []
    kinds = {one.event for one in found}
    assert kinds >= {"110100", "110104", "110105", "110106", "110112", "110113", "110114", "audit-head"}
    validate(tmp_path, [one.xml for one in rsyslog.lines()])

    # A head that left the host says later that something was cut off.
    head = heads(found)[-1]
    assert store.run("audit", "verify", "--head", head).status == 0
    store.stop()
    number = int(head.partition(":")[0])
    path = sorted((store.store / "audit").glob("*.log"))[-1]
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(line for line in lines if int(line.split()[1]) < number))
    assert store.run("audit", "verify").status == 0
    done = store.run("audit", "verify", "--head", head)
    assert (done.status, f"but {number} was seen before" in done.out) == (6, True)


def validate(folder: Path, contents: list[str]) -> None:
    xmllint = find_command("xmllint") or "xmllint"
    paths = [folder / f"{number}.xml" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    done = subprocess.run(
        [xmllint, "--noout", "--relaxng", str(SCHEMA), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if not line.endswith(" validates")]) == (0, [])


# --- one connection


class Receiver:
    """A syslog server in a thread: reads frames over TLS, and breaks off where it is told to."""

    def __init__(self, folder: Path, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, wants: str = "") -> None:
        ca = pki.authority("receiver authority")
        (folder / "receiver-ca.pem").write_text(ca.pem)
        ca.issue("localhost", names=["localhost"], server=True).save(folder, "receiver")
        self.trust = str(folder / "receiver-ca.pem")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = self.context.maximum_version = version
        self.context.load_cert_chain(folder / "receiver.pem", folder / "receiver.key")
        if wants:
            self.context.verify_mode = ssl.CERT_REQUIRED
            self.context.load_verify_locations(wants)
        self.frames: list[str] = []
        self.connections = 0
        # After how many frames of a connection it is closed, with what came after them unread: None for never.
        self.breaks: list[int | None] = []
        self._listening = socket.create_server(("localhost", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def connect(self, trust: str = "", name: str = "localhost") -> syslog.Channel:
        return syslog.Channel(name, self.port, syslog.context(trust or self.trust))

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            limit = self.breaks.pop(0) if self.breaks else None
            with connection:
                try:
                    self._read(connection, limit)
                except OSError:
                    continue

    def _read(self, connection: socket.socket, limit: int | None) -> None:
        with self.context.wrap_socket(connection, server_side=True) as tls:
            waiting = b""
            count = 0
            while limit is None or count < limit:
                content = tls.recv(1 << 16)
                if not content:
                    return
                waiting += content
                while found := re.match(rb"(\d+) ", waiting):
                    end = found.end() + int(found[1])
                    if len(waiting) < end or (limit is not None and count >= limit):
                        break
                    self.frames.append(waiting[found.end() : end].decode())
                    waiting = waiting[end:]
                    count += 1

    def numbers(self) -> list[int]:
        return [int(found[1]) for frame in self.frames if (found := re.search(r' seq="(\d+)"', frame))]


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path)
    yield made
    made.close()


def message(seq: int, text: str = "ü") -> auditspool.Message:
    return auditspool.Message(seq, seq + 100, "2026-01-31T12:00:00.000000Z", 0, f"<AuditMessage>{text}</AuditMessage>")


def framed(seq: int, text: str = "ü") -> bytes:
    return syslog.frame(message(seq, text), "pacs 1", 7, 10, 32473)


def test_a_frame_is_a_message_of_rfc_5424_with_its_length_in_bytes() -> None:
    content = framed(3)
    length, _, said = content.partition(b" ")
    assert int(length) == len(said)
    assert said.decode() == (
        "<85>1 2026-01-31T12:00:00.000000Z pacs?1 strongroom 7 DICOM+RFC3881 "
        '[strongroom@32473 seq="3" record="103"] \ufeff<AuditMessage>ü</AuditMessage>'
    )
    serious = auditspool.Message(4, 5, "2026-01-31T12:00:00Z", 12, "<x/>", "5:" + "ab" * 32)
    assert syslog.frame(serious, "", 7, 13, 1).split(b" ", 1)[1].startswith(b"<106>1 2026-01-31T12:00:00Z - strongroom")
    assert f'head="5:{"ab" * 32}"]'.encode() in syslog.frame(serious, "", 7, 13, 1)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_connection_that_ends_in_order_was_read_to_its_end(tmp_path: Path, version: ssl.TLSVersion) -> None:
    receiver = Receiver(tmp_path, version=version)
    channel = receiver.connect()
    for seq in range(1, 301):
        channel.send(framed(seq, "x" * 2000))
    channel.finish()
    assert receiver.numbers() == list(range(1, 301))
    receiver.close()


@pytest.mark.parametrize("limit", [0, 1, 20])
def test_a_server_that_closes_with_something_unread_is_noticed(receiver: Receiver, limit: int) -> None:
    receiver.breaks = [limit]
    channel = receiver.connect()
    with pytest.raises(DeliveryError):
        for seq in range(1, 401):
            channel.send(framed(seq, "x" * 8000))
        channel.finish()
    channel.close()


def test_a_server_that_closes_while_nothing_is_sent_is_noticed(receiver: Receiver) -> None:
    receiver.breaks = [1]
    channel = receiver.connect()
    channel.send(framed(1))
    # The connection is reset: whatever is sent now arrives nowhere.
    channel._socket.settimeout(SECONDS)
    with pytest.raises(DeliveryError):
        while True:
            channel.send(framed(2))
    channel.close()


def test_nothing_is_said_to_a_server_of_another_authority_or_name(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "other.pem").write_text(pki.authority("another").pem)
    for trust, name in ((str(tmp_path / "other.pem"), "localhost"), ("", "127.0.0.1")):
        with pytest.raises(DeliveryError, match="certificate does not hold"):
            receiver.connect(trust, name)
    assert receiver.frames == []


def test_a_server_that_refuses_our_certificate_after_the_handshake_has_taken_nothing(tmp_path: Path) -> None:
    # In TLS 1.3 a client believes that the handshake is over before the server has looked at its certificate.
    receiver = Receiver(tmp_path, wants=str(tmp_path / "receiver-ca.pem"))
    with pytest.raises(DeliveryError), contextlib.closing(receiver.connect()) as channel:
        channel.send(framed(1))
        channel.finish()
    assert receiver.frames == []
    receiver.close()


@pytest.mark.needs("rsyslogd")
@needs_gtls
def test_a_real_rsyslog_takes_messages_from_whom_it_knows_alone_and_the_sender_knows_it(rsyslog: Rsyslog) -> None:
    rsyslog.start()
    rsyslog.ca.issue("other.example", names=["other.example"]).save(rsyslog.home, "other")
    trust = str(rsyslog.home / "ca.pem")
    for seq, name in ((1, ""), (2, "other"), (3, "forwarder")):
        shown = [str(rsyslog.home / f"{name}.{end}") for end in ("pem", "key")] if name else []
        refused = contextlib.nullcontext() if name == "forwarder" else pytest.raises(DeliveryError)
        with (
            refused,
            contextlib.closing(syslog.Channel("localhost", rsyslog.port, syslog.context(trust, *shown))) as one,
        ):
            one.send(framed(seq))
            one.finish()
    rsyslog.stop()
    assert [one.seq for one in rsyslog.lines()] == [3]


# --- the forwarder


class Spool:
    """A spool with a forwarder on it, filled by hand."""

    def __init__(self, config: Config, receiver: Receiver) -> None:
        self.config = config
        self.receiver = receiver
        self.now = 1_800_000_000.0
        self.config.audit_out.mkdir()
        self.forwarder = self.new()
        self._recipient = auditspool.recipient(self.config.audit_forwarder)
        self._last = 0

    def new(self) -> Forwarder:
        self.config.audit_forwarder.mkdir(exist_ok=True)
        return Forwarder(self.config, self.receiver.connect, lambda: self.now)

    def put(self, count: int) -> Path:
        """Leave messages in the spool as a vault does."""
        first, self._last = self._last + 1, self._last + count
        name = auditspool.name_of(first, self._last)
        content = auditspool.encoded([message(seq) for seq in range(first, self._last + 1)])
        assert self._recipient is not None
        path = self.config.audit_out / name
        path.write_bytes(self._recipient.seal(content, self.forwarder._store_id, name))
        return path

    def turns(self, count: int = 50) -> None:
        """Let it work, and time pass, until everything is delivered."""
        for _ in range(count):
            if not self.forwarder.turn():
                self.now += 61.0
            if self.forwarder.acknowledged == self._last:
                return
        raise AssertionError(f"delivered up to {self.forwarder.acknowledged} of {self._last}")


@pytest.fixture
def spool(receiver: Receiver, tmp_path: Path) -> Spool:
    # No store is needed: the forwarder opens nothing of it.
    store = Store(path="none", anchors="none", spool=".", signing_key="ed25519:" + base64.b64encode(bytes(32)).decode())
    audit = AuditSettings(forward=f"localhost:{receiver.port}", trust=receiver.trust)
    return Spool(Config(tmp_path / "strongroom.toml", Settings(store=store, audit=audit)), receiver)


def first_come(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


def test_nothing_is_lost_or_out_of_order_however_often_a_connection_breaks_and_the_forwarder_dies(spool: Spool) -> None:
    paths = [spool.put(7), spool.put(1), spool.put(40), spool.put(300), spool.put(WINDOW)]
    # Sealed: nobody reads in the spool what is in it.
    assert not any(b"AuditMessage" in path.read_bytes() for path in paths)
    spool.receiver.breaks = [0, 3, None, 0, 10, 500, 0, 200]
    for _ in range(4):
        spool.forwarder.turn()
        spool.now += 61.0
        spool.forwarder = spool.new()
    spool.turns()
    assert first_come(spool.receiver.numbers()) == list(range(1, 349 + WINDOW))
    assert auditspool.acknowledged(spool.config.audit_forwarder) == 348 + WINDOW
    # What is delivered is not sent again, whoever asks.
    spool.receiver.frames.clear()
    before = spool.receiver.connections
    assert not spool.new().turn()
    assert (spool.receiver.frames, spool.receiver.connections) == ([], before)


def test_a_server_that_is_away_is_asked_later_and_later(spool: Spool) -> None:
    spool.put(1)
    spool.receiver.breaks = [0] * 5
    tried = []
    for _ in range(40):
        before = spool.receiver.connections
        spool.forwarder.turn()
        if spool.receiver.connections > before:
            tried.append(spool.now)
        spool.now += 1.0
    assert [later - earlier for earlier, later in itertools.pairwise(tried)] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert spool.forwarder.acknowledged == 1


def test_a_file_that_does_not_open_holds_up_what_follows_it(spool: Spool) -> None:
    spool.put(2)
    damaged = spool.put(2)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    spool.put(2)
    assert [spool.forwarder.turn() for _ in range(2)] == [False, False]
    assert (spool.receiver.numbers(), spool.forwarder.acknowledged) == ([1, 2], 2)
    damaged.write_bytes(content)
    spool.turns()
    assert spool.receiver.numbers() == [1, 2, 3, 4, 5, 6]


def test_that_the_vault_is_locked_is_said_by_the_forwarder_itself_once(spool: Spool) -> None:
    auditspool.tell_locked(spool.config.audit_out, "2026-01-31T12:00:00Z")
    for _ in range(3):
        spool.forwarder.turn()
    [said] = spool.receiver.frames
    assert (" - \ufeff<" in said, 'csd-code="vault-locked"' in said) == (True, True)
    (spool.config.audit_out / auditspool.LOCKED).unlink()
    spool.put(1)
    spool.turns()
    assert ('csd-code="vault-unlocked"' in spool.receiver.frames[1], spool.receiver.numbers()) == (True, [1])


def test_the_forwarders_key_is_its_own_and_its_public_half_everybodys(spool: Spool) -> None:
    folder = spool.config.audit_forwarder
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {auditspool.KEY: 0o600, auditspool.PUBLIC: 0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


# --- the unit


@pytest.mark.needs("systemd-analyze")
def test_the_unit_is_understood_and_its_exposure_is_at_most_1_5(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/strongroom/bin/strongroom", sys.executable))
    for command in (
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(UNIT)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        if "verify" in command:
            assert (done.stdout, done.stderr) == ("", "")


def test_the_unit_writes_the_forwarders_folder_alone_and_sees_nothing_of_the_store() -> None:
    lines = UNIT.read_text().splitlines()
    written = [line for line in lines if line.startswith("ReadWritePaths=")]
    assert written == ["ReadWritePaths=/var/spool/strongroom/audit-forwarder"]
    hidden = {word.lstrip("-") for line in lines if line.startswith("InaccessiblePaths=") for word in line[18:].split()}
    assert hidden >= {
        "/var/lib/strongroom", "/var/lib/strongroom-anchors", "/var/spool/strongroom/incoming", "/run/strongroom",
        "/etc/strongroom/store.key", "/etc/strongroom/tls",
    }  # fmt: skip


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the vault's and the gate's units were installed by the guide, and run."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    try:
        machine.boot()
        machine.run("bash", "-c", f"set -e; cd /opt/strongroom/code\n{installation()}")
        yield machine
    finally:
        machine.stop()


@real
@pytest.mark.needs("rsyslogd")
@needs_gtls
def test_the_forwarder_in_its_unit_delivers_what_the_vault_in_its_own_seals_and_writes_nothing_else(
    machine: Machine, rsyslog: Rsyslog
) -> None:
    folder = machine.root / "etc/strongroom/syslog"
    folder.mkdir(mode=0o755)
    for name in ("ca.pem", "forwarder.pem", "forwarder.key"):
        (folder / name).write_text((rsyslog.home / name).read_text())
        # Root's own here: the unit's user reads them.
        (folder / name).chmod(0o644)
    here = Server(machine.root / "etc/strongroom")
    here.set(
        "audit",
        forward=f"localhost:{rsyslog.port}",
        trust="syslog/ca.pem",
        certificate="syslog/forwarder.pem",
        private_key="syslog/forwarder.key",
    )
    log = machine.root / "etc/systemd/system/strongroom-forwarder.service.d/log.conf"
    log.parent.mkdir()
    log.write_text("[Service]\nStandardError=append:/run/forwarder.log\n")
    machine.run("bash", "-c", f"set -e; cd /opt/strongroom/code\n{installation('audit-forwarding.md', 'As a service')}")
    said = machine.root / "run/forwarder.log"
    machine.wait(lambda: "audit messages are not delivered" in said.read_text(), "nothing is sent")
    rsyslog.start("nsenter", f"--target={machine.pid}", "--net")
    machine.wait(
        lambda: any(one.event == "110100" for one in rsyslog.arrived()), f"nothing arrives\n{said.read_text()}"
    )
    whole(rsyslog)
    pid = machine.main("forwarder")
    found = machine.run("sh", "-c", f"{_WRITABLE} || true", pid=pid, user=owner(pid)).split()
    assert set(found) - {"/dev/mqueue"} == {"/var/spool/strongroom/audit-forwarder"}
    assert re.findall(r"(?m)^Cap\w+:\t(\w+)$", Path(f"/proc/{pid}/status").read_text()) == ["0" * 16] * 5
    machine.run("systemctl", "disable", "--now", "strongroom-forwarder")
    assert (machine.show("forwarder", "ActiveState"), machine.show("forwarder", "Result")) == ("inactive", "success")


# --- who did it


def test_who_sent_saw_exported_and_erased_a_patients_studies_is_answered_and_recorded(server: Server) -> None:
    def who(*arguments: str, stdin: str = "") -> list[dict[str, Any]]:
        done = server.run("audit", "who", "--json", *arguments, stdin=stdin)
        assert done.status in {0, 5}, done.err
        rows = [json.loads(line) for line in done.out.splitlines()]
        assert (done.status == 5) == (len(rows) == 1)
        return rows

    assert send(server, [CT, MR]) == [0, 0]
    server.wait_admitted()
    [study] = [row["study"] for row in server.list("study", "--patient-id", "1CT1")]
    # One that shows this patient among others, and one that does not.
    server.list("study")
    server.list("study", "--modality", "MR")
    server.ok("export", "--study", study, "--to", server.home / "out")
    sent = until(lambda: [r for r in who("--patient", "1CT1") if r["kind"] == "sent"], "nobody sent anything")
    assert [(r["study"], r["instances"], r["who"].split(" at ")[0]) for r in sent] == [(study, 1, "CT1")]
    server.stop()
    server.start()
    server.ok("erase", "--study", study, "--reason", "4711", "--yes")
    *rows, summary = who("--study", study)
    me = f"uid {os.geteuid()}"
    assert [(r["kind"], r["who"] if r["kind"] != "sent" else "", r["what"]) for r in rows] == [
        ("sent", "", ""),
        # The listing that 'export' makes, which asked for this study.
        ("saw", me, "list instance"),
        ("exported", me, ""),
        ("erased", me, "begun: 4711"),
        ("erased", me, "done"),
    ]
    # Whose it was nobody knows any more: that is said.
    *rows, summary = who("--patient", "-", stdin="1CT1\n")
    assert (summary["studies"], summary["others_erased"]) == (0, 1)
    assert {(r["kind"], r["what"]) for r in rows} == {("saw", "list study")}
    assert [r["kind"] for r in who("--patient", "nobody")] == ["summary"]
    assert [r["kind"] for r in who("--study", study, "--since", "2100-01-01")] == ["summary"]
    assert server.run("audit", "who").status == 2
    asked = [json.loads(line) for line in server.ok("audit", "show", "--type", "audit-who", "--json").out.splitlines()]
    assert (asked[-1]["studies"], asked[0]["patient"], asked[0]["uid"]) == ([study], "1CT1", os.geteuid())
    said = server.ok("audit", "who", "--study", study)
    assert said.out.splitlines()[0].split("\t") == ["Record", "Time", "Did", "Who", "Study", "Instances", "What"]
