"""Alerts reach a real mail server and webhook, inside TLS or not at all, and a server tells what is wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.message
import email.policy
import http.server
import json
import queue
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pki
import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from conftest import START_SECONDS, Server, send
from pydicom.data import get_testdata_file

from storescp.alerts import Alerts
from storescp.alertsettings import AlertSettings, Mail
from storescp.cli import strongroom
from storescp.config import Config, Settings, Store, render
from storescp.errands import alert, connection, ways
from storescp.errands.alert import SETTLED_SECONDS, Sender
from storescp.errands.connection import DeliveryError

CT = Path(str(get_testdata_file("CT_small.dcm")))
UNIT = Path(__file__).parent.parent / "systemd" / "strongroom-alerts.service"
PASSWORD = "correct horse"


class Pki:
    """An authority and its servers' contexts."""

    def __init__(self, folder: Path) -> None:
        self.ca = pki.authority("mail authority")
        self.file = folder / "ca.pem"
        self.file.write_text(self.ca.pem)
        self.context = self.of(folder, "localhost")
        self.other = self.of(folder, "other.example")

    def of(self, folder: Path, name: str) -> ssl.SSLContext:
        self.ca.issue(name, names=[name], server=True).save(folder, name)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        return context


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def reserved() -> socket.socket:
    """Return a socket whose port is taken, and where nobody listens yet: connections are refused."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", 0))
    return made


class MailServer:
    """A mail server in a thread; it keeps what it is sent and who logged in."""

    def __init__(self, implicit: ssl.SSLContext | None = None, starttls: ssl.SSLContext | None = None) -> None:
        self.messages: list[email.message.EmailMessage] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.refused: set[str] = set()
        self._implicit, self._starttls = implicit, starttls
        self._socket = reserved()
        self.port = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def listen(self) -> MailServer:
        async def start() -> asyncio.Server:
            return await self._loop.create_server(self._protocol, sock=self._socket, ssl=self._implicit)

        self._server = asyncio.run_coroutine_threadsafe(start(), self._loop).result(START_SECONDS)
        return self

    def close(self) -> None:
        async def end() -> None:
            if self._server is not None:
                self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(START_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_SECONDS)
        self._loop.close()
        self._socket.close()

    def _protocol(self) -> SMTP:
        self.connections += 1
        return SMTP(
            self, hostname="mail.example", loop=self._loop, tls_context=self._starttls, authenticator=self._login,
            require_starttls=self._starttls is not None, auth_require_tls=self._starttls is not None,
        )  # fmt: skip

    def _login(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, given: Any) -> AuthResult:
        self.logins.append((given.login, given.password))
        return AuthResult(success=given.password == PASSWORD.encode(), handled=False)

    async def handle_RCPT(  # noqa: N802
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if address in self.refused:
            return "550 nobody of that name"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content
        assert isinstance(content, bytes)
        self.messages.append(email.message_from_bytes(content, policy=email.policy.default))
        return "250 OK"


class Hook:
    """A webhook in a thread; it keeps what it is sent, and answers as it is told."""

    def __init__(self, context: ssl.SSLContext) -> None:
        hook = self
        self.documents: list[dict[str, Any]] = []
        self.arrived: queue.Queue[dict[str, Any]] = queue.Queue()
        self.paths: list[str] = []
        self.status = 204
        self.headers: dict[str, str] = {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.paths.append(self.path)
                document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.documents.append(document)
                hook.arrived.put(document)
                self.send_response(hook.status)
                for name, value in hook.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None: ...

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(START_SECONDS)

    def wait(self, event: str, kind: str) -> dict[str, Any]:
        """Wait for a message about something; what comes before it is passed over."""
        while True:
            found = self.arrived.get(timeout=START_SECONDS)
            if (found["event"], found["kind"]) == (event, kind):
                return found


@pytest.fixture
def hook(trusted: Pki) -> Iterator[Hook]:
    made = Hook(trusted.context)
    yield made
    made.close()


@pytest.fixture
def mail_server() -> Iterator[Callable[..., MailServer]]:
    made: list[MailServer] = []

    def make(**contexts: ssl.SSLContext) -> MailServer:
        made.append(MailServer(**contexts))
        return made[-1]

    yield make
    for server in made:
        server.close()


class Outside:
    """A configuration that sends, its outbox, and a clock."""

    def __init__(self, home: Path, settings: AlertSettings) -> None:
        (home / "spool" / "alerts").mkdir(parents=True)
        store = Store(path="s", anchors="a", spool="spool", signing_key="ed25519:" + "A" * 43 + "=")
        self.config = Config(home / "strongroom.toml", Settings(store=store, alerts=settings))
        self.alerts = Alerts(self.config.outbox)
        self.now = 1_800_000_000.0

    def sender(self) -> Sender:
        return Sender(self.config, ways.ways_of(self.config), now=lambda: self.now)

    def way(self) -> ways.Way:
        [way] = ways.ways_of(self.config)
        return way

    def refused(self) -> str:
        """Send a test; return why it was not delivered."""
        [result] = alert.test(self.config, [self.way()])
        assert not result["delivered"]
        return str(result["said"])


def mail_to(port: int, tls: str = "implicit", **changes: Any) -> Mail:
    settings = {"sender": "strongroom@mail.example", "recipients": ["a@mail.example", "b@mail.example"]}
    return Mail(host="localhost", port=port, tls=tls, **settings | changes)


# --- to real servers


@pytest.mark.parametrize("tls", ["implicit", "starttls"])
def test_an_alert_reaches_mail_and_webhook_once_and_once_more_when_it_is_over(
    tls: str, mail_server: Callable[..., MailServer], hook: Hook, trusted: Pki, tmp_path: Path
) -> None:
    mails = mail_server(**{tls: trusted.context}).listen()
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    (tmp_path / "password").chmod(0o600)
    login = {"user": "strongroom", "password_file": "password"}
    settings = AlertSettings(
        mail=mail_to(mails.port, tls, **login), webhooks=[f"https://localhost:{hook.port}/in?to=ops"],
        trust=str(trusted.file),
    )  # fmt: skip
    outside = Outside(tmp_path, settings)
    outside.alerts.raise_("locked")
    running = outside.sender()
    running.turn()
    running.turn()
    # A restart repeats nothing.
    outside.sender().turn()
    assert len(mails.messages) == len(hook.documents) == 1
    outside.now += 86_400
    running = outside.sender()
    running.turn()
    running.turn()
    outside.alerts.resolve("locked")
    running.turn()
    outside.now += SETTLED_SECONDS
    running.turn()
    running.turn()
    assert [d["event"] for d in hook.documents] == ["raised", "repeated", "resolved"]
    assert [m["Subject"].split()[1] for m in mails.messages] == ["ALERT", "STILL", "RESOLVED"]
    first = mails.messages[0]
    assert (first["From"], first["To"]) == ("strongroom@mail.example", "a@mail.example, b@mail.example")
    assert (first["Auto-Submitted"], bool(first["Date"]), bool(first["Message-ID"])) == ("auto-generated", True, True)
    assert "the vault is locked" in first.get_content()
    assert "    strongroom unlock" in first.get_content().splitlines()
    assert set(mails.logins) == {(b"strongroom", PASSWORD.encode())}
    assert set(hook.paths) == {"/in?to=ops"}
    assert hook.documents[0] | {"server": "", "since": "", "last_seen": ""} == {
        "format": 1, "event": "raised", "server": "", "kind": "locked", "what": "", "counts": {},
        "severity": "critical", "since": "", "last_seen": "", "command": "strongroom unlock",
        "text": "the vault is locked: what arrives is kept, nothing is admitted, erased or checked",
    }  # fmt: skip


def test_a_mail_server_that_is_down_is_told_when_it_is_up_and_the_webhook_does_not_wait(
    mail_server: Callable[..., MailServer],
    hook: Hook,
    trusted: Pki,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mails = mail_server(implicit=trusted.context)
    settings = AlertSettings(
        mail=mail_to(mails.port), webhooks=[f"https://localhost:{hook.port}"], trust=str(trusted.file)
    )
    outside = Outside(tmp_path, settings)
    outside.alerts.raise_("quarantine", count=2)
    running = outside.sender()
    running.turn()
    assert (len(mails.messages), len(hook.documents)) == (0, 1)
    assert "refused" in alert.read_state(outside.config).faults["mail"].why
    outside.config.file.write_text(render(outside.config.settings))
    capsys.readouterr()
    command = ["--config", str(outside.config.file), "alerts", "list"]
    assert strongroom.main(command, "strongroom", standalone_mode=False) == 6
    said = capsys.readouterr()
    assert "strongroom quarantine list" in said.out
    assert f"not delivered by mail to 2 by localhost:{mails.port} since" in said.err
    mails.listen()
    # Not before its time.
    running.turn()
    assert mails.connections == 0
    outside.now += 60
    running.turn()
    running.turn()
    assert (len(mails.messages), len(hook.documents)) == (1, 1)
    assert "in quarantine, not admitted until somebody decides: 2" in mails.messages[0].get_content()


def test_nothing_is_said_to_a_mail_server_that_is_not_proved(
    mail_server: Callable[..., MailServer], trusted: Pki, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "password").chmod(0o600)
    login = {"user": "strongroom", "password_file": "password"}
    plain = mail_server().listen()
    other = mail_server(implicit=trusted.other).listen()
    other_start = mail_server(starttls=trusted.other).listen()
    good = mail_server(implicit=trusted.context).listen()
    trust = str(trusted.file)
    cases = [
        (plain, "starttls", trust, "no STARTTLS"), (plain, "implicit", trust, "TLS"),
        (other, "implicit", trust, "certificate does not hold"),
        (other_start, "starttls", trust, "certificate does not hold"),
        (good, "implicit", "", "certificate does not hold"),
    ]  # fmt: skip
    for number, (server, tls, authorities, why) in enumerate(cases):
        settings = AlertSettings(mail=mail_to(server.port, tls, **login), trust=authorities)
        outside = Outside(tmp_path / str(number), settings)
        outside.config.mail_password_file = tmp_path / "password"
        assert why in outside.refused(), number
    for server in (plain, other, other_start, good):
        assert (server.logins, server.messages) == ([], [])


def test_what_a_mail_server_refuses_is_said_without_anything_secret(
    mail_server: Callable[..., MailServer], trusted: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mails = mail_server(implicit=trusted.context).listen()
    settings = mail_to(mails.port, user="strongroom", password_file="password")
    outside = Outside(tmp_path, AlertSettings(mail=settings, trust=str(trusted.file)))
    file = tmp_path / "password"
    assert "cannot be read" in outside.refused()
    file.write_text(f"wrong {PASSWORD}")
    file.chmod(0o640)
    assert "chmod 600" in outside.refused()
    file.chmod(0o600)
    said = outside.refused()
    assert "535" in said
    assert PASSWORD not in said
    file.write_text("\n")
    assert "no password" in outside.refused()
    file.write_text("pässword")
    assert "ASCII" in outside.refused()
    assert mails.messages == []
    # A systemd credential, and one recipient whom the server does not know.
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "smtp").write_text(PASSWORD)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    outside.config.mail_password_file, outside.config.mail_credential = None, "smtp"
    mails.refused = {"b@mail.example"}
    [result] = alert.test(outside.config, [outside.way()])
    assert (result["delivered"], result["said"]) == (True, "1 of 2 recipients were refused")
    mails.refused |= {"a@mail.example"}
    assert "every recipient (550)" in outside.refused()


def test_a_webhook_that_redirects_fails_or_is_not_proved_counts_as_not_told(
    hook: Hook, trusted: Pki, tmp_path: Path
) -> None:
    settings = AlertSettings(webhooks=[f"https://localhost:{hook.port}/secret-path"], trust=str(trusted.file))
    outside = Outside(tmp_path / "0", settings)
    hook.status, hook.headers = 307, {"Location": f"https://localhost:{hook.port}/elsewhere"}
    assert outside.refused() == "the server answers 307: redirects are not followed"
    hook.status, hook.headers = 500, {}
    assert outside.refused() == "the server answers 500"
    assert set(hook.paths) == {"/secret-path"}
    assert "secret" not in outside.way().label + outside.way().key
    hook.status = 200
    assert outside.way().deliver(alert.message(outside.config, "test", TEST)) == ""
    count = len(hook.documents)
    outside = Outside(tmp_path / "1", AlertSettings(webhooks=[f"https://localhost:{hook.port}/"]))
    assert "certificate does not hold" in outside.refused()
    name = AlertSettings(webhooks=[f"https://127.0.0.1:{hook.port}/"], trust=str(trusted.file))
    assert "certificate does not hold" in Outside(tmp_path / "2", name).refused()
    assert len(hook.documents) == count


@contextlib.contextmanager
def server_that(answers: Callable[[ssl.SSLSocket], None], context: ssl.SSLContext) -> Iterator[int]:
    """Serve one connection badly; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError, ssl.SSLError):
                plain, _ = listening.accept()
                with plain, context.wrap_socket(plain, server_side=True) as connection:
                    answers(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(START_SECONDS)


def silent(connection: ssl.SSLSocket) -> None:
    while connection.recv(1 << 10):
        pass


def endless(line: bytes) -> Callable[[ssl.SSLSocket], None]:
    def answer(connection: ssl.SSLSocket) -> None:
        while True:
            connection.sendall(line)

    return answer


def trickling(line: bytes) -> Callable[[ssl.SSLSocket], None]:
    """Always another byte before anybody's patience with the next one ends."""

    def answer(connection: ssl.SSLSocket) -> None:
        wait = threading.Event()
        while not wait.wait(0.01):
            connection.sendall(line)

    return answer


@pytest.mark.parametrize(
    ("way", "answers"),
    [("mail", silent), ("mail", endless(b"220-x\r\n")), ("mail", endless(b"2")), ("mail", trickling(b"220-x\r\n")),
     ("mail", lambda _: None), ("webhook", silent), ("webhook", endless(b"HTTP/1.1 100 Go\r\n\r\n")),
     ("webhook", endless(b"\0")), ("webhook", trickling(b"X: y\r\n")), ("webhook", lambda _: None)],
    ids=["mail-silent", "mail-endless-lines", "mail-endless-line", "mail-trickling", "mail-shut",
         "webhook-silent", "webhook-endless-answers", "webhook-zeros", "webhook-trickling", "webhook-shut"],
)  # fmt: skip
def test_a_server_gone_mad_holds_nobody_up(
    way: str, answers: Callable[[ssl.SSLSocket], None], trusted: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STEP_SECONDS", 0.5)
    monkeypatch.setattr(connection, "WHOLE_SECONDS", 0.7)
    with server_that(answers, trusted.context) as port:
        settings = (
            AlertSettings(mail=mail_to(port), trust=str(trusted.file)) if way == "mail"
            else AlertSettings(webhooks=[f"https://localhost:{port}/"], trust=str(trusted.file))
        )  # fmt: skip
        outside = Outside(tmp_path, settings)
        with pytest.raises(DeliveryError):
            outside.way().deliver(alert.message(outside.config, "test", TEST))


TEST = alert.Alert(1, "test", "", {}, "2026-11-22T12:00:00Z", "2026-11-22T12:00:00Z")


# --- a server that tells


def test_a_server_tells_what_is_wrong_by_a_process_of_its_own_and_names_no_patient(
    make_server: Callable[..., Server], hook: Hook, trusted: Pki
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    server.set("gate", pack_idle_seconds=1)
    assert server.run("alerts", "test").status == 2
    server.set("alerts", webhooks=[f"https://localhost:{hook.port}/"], trust=str(trusted.file), locked_after="PT0M")
    server.set("unlock", key_file="")
    (server.store / "quarantine" / ("ab" * 16)).write_bytes(b"no pack")
    server.start()
    # A locked vault is alerted too, and receives all the same.
    hook.wait("raised", "locked")
    hook.wait("raised", "total-loss")
    assert send(server, [CT]) == [0]
    listed = server.run("alerts", "list", "--json")
    assert (listed.status, listed.json()["faults"]) == (6, [])
    assert {item["kind"]: item["command"] for item in listed.json()["items"]} == {
        "locked": "strongroom unlock", "total-loss": "strongroom status"
    }  # fmt: skip
    vault, sender = server.pids("vault"), server.pids("alert-sender")
    assert (len(vault), len(sender)) == (1, 1)
    assert server.run("alert-sender").status == 1
    tested = server.ok("alerts", "test", "--json").json()
    assert [item["delivered"] for item in tested["items"]] == [True]
    server.stop()
    assert server.pids("alert-sender") == []

    server.set("unlock", key_file="store.key")
    server.start()
    found = hook.wait("raised", "quarantine")
    assert found["counts"] == {"count": 1}
    server.wait_admitted()
    hook.status = 503
    assert server.run("alerts", "test").status == 1
    server.stop()
    told = [(d["event"], d["kind"]) for d in hook.documents if d["kind"] != "test"]
    assert sorted(told) == [("raised", "locked"), ("raised", "quarantine"), ("raised", "total-loss")]
    # Everything that was said or written for it, and the log: no patient, no UID, no secret.
    said = json.dumps(hook.documents) + "\n".join(server.log)
    for folder in ("outbox", "alerts"):
        said += "".join(path.read_text() for path in (server.home / "spool" / folder).iterdir())
    assert not re.search(r"CompressedSamples|\b1CT1\b|1\.3\.6\.1\.4|\d+(\.\d+){5,}", said)


# --- its unit


@pytest.mark.needs("systemd-analyze")
def test_the_unit_has_no_key_that_systemd_does_not_know_and_its_exposure_is_at_most_1_5(tmp_path: Path) -> None:
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


def test_the_unit_writes_the_senders_folder_alone_and_sees_nothing_of_the_store() -> None:
    lines = UNIT.read_text().splitlines()
    assert [line for line in lines if line.startswith("ReadWritePaths=")] == [
        "ReadWritePaths=/var/spool/strongroom/alerts"
    ]
    hidden = {word.lstrip("-") for line in lines if line.startswith("InaccessiblePaths=") for word in line[18:].split()}
    assert hidden >= {
        "/var/lib/strongroom", "/var/lib/strongroom-anchors", "/var/spool/strongroom/incoming", "/run/strongroom",
        "/etc/strongroom/store.key", "/etc/strongroom/tls",
    }  # fmt: skip
