"""A real browser without a window, with a client certificate, told what to do over a pipe (Chrome DevTools Protocol).

It gets a mount namespace of its own, in which its policy says that the certificate is chosen without asking: nothing
of the machine's is changed, and root is needed.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POLICIES = "/etc/chromium"
_FLAGS = [
    "--headless=new", "--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist", "--window-size=1400,900", "--remote-debugging-pipe",
]  # fmt: skip
_SECONDS = 90
# Resolves when an expression is true, or false after a while: a page that goes elsewhere takes its promises along.
_UNTIL = """new Promise((resolve) => {{
  const look = (left) => {{
    try {{ if ({0}) {{ resolve(true); return; }} }} catch (error) {{}}
    if (left) {{ setTimeout(look, 50, left - 1); }} else {{ resolve(false); }}
  }};
  look(20);
}})"""
_LOOK_SECONDS = 10


class Browser:
    """A browser with one page."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self._process = process
        self._commands = commands
        self._numbers = itertools.count(1)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.said: list[str] = []
        self.failed: list[str] = []
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask something of the page."""
        return self._call(method, self._session, **parameters)

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def until(self, expression: str) -> None:
        """Wait until something is so on the page."""
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            parameters = {"expression": _UNTIL.format(expression), "awaitPromise": True}
            answer = self._ask("Runtime.evaluate", self._session, parameters, _LOOK_SECONDS)
            if answer.get("result", {}).get("result", {}).get("value") is True:
                return
        raise AssertionError((expression, self.said, self.failed))

    def value(self, expression: str) -> Any:
        """Return what something is on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write what is seen as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        answer = self._ask(method, session, parameters, _SECONDS)
        assert "result" in answer, (method, answer, self.said)
        return dict(answer["result"])

    def _ask(self, method: str, session: str, parameters: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer to a command; an empty one where none came in time."""
        number = next(self._numbers)
        document = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(document).encode() + b"\0")
        while True:
            try:
                answer = self._answers.get(timeout=seconds)
            except queue.Empty:
                return {}
            assert answer is not None, "the browser ended"
            if answer.get("id") == number:
                return answer

    def _listen(self, descriptor: int) -> None:
        rest = b""
        with os.fdopen(descriptor, "rb", buffering=0) as stream, contextlib.suppress(OSError):
            while data := stream.read(1 << 16):
                *whole, rest = (rest + data).split(b"\0")
                for message in map(json.loads, whole):
                    if "id" in message:
                        self._answers.put(message)
                    else:
                        self._hear(message["method"], message["params"])
        self._answers.put(None)

    def _hear(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Log.entryAdded":
            self.said.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in {"error", "warning"}:
            self.said.append(f"{parameters['type']}: {parameters['args'][:1]}")
        elif method == "Runtime.exceptionThrown":
            self.said.append(f"exception: {parameters['exceptionDetails'].get('exception', {}).get('description')}")
        elif method == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            self.failed.append(f"{parameters['response']['status']} {parameters['response']['url']}")


@contextlib.contextmanager
def browser(home: Path, issued: Path, title: str, port: int) -> Iterator[Browser]:
    """Start a browser that has a peer's certificate.

    Args:
        home: An empty folder, its own.
        issued: The peer's folder, as ``peer add --issue`` made it.
        title: Its AE title.
        port: Of the server on this machine.
    """
    database = home / ".pki" / "nssdb"
    database.mkdir(parents=True)
    bundle = home / "own.p12"
    key, certificate = issued / f"{title}.key", issued / f"{title}.pem"
    names = ["-name", title, "-passout", "pass:"]
    _run("openssl", "pkcs12", "-export", "-in", certificate, "-inkey", key, *names, "-out", bundle)
    _run("certutil", "-N", "-d", f"sql:{database}", "--empty-password")
    _run("pk12util", "-i", bundle, "-d", f"sql:{database}", "-W", "")
    _run("certutil", "-A", "-d", f"sql:{database}", "-n", "ca", "-t", "C,,", "-i", issued / "ca.pem")
    managed = home / "policies" / "policies" / "managed"
    managed.mkdir(parents=True)
    chosen = json.dumps({"pattern": f"https://127.0.0.1:{port}", "filter": {}})
    (managed / "own.json").write_text(json.dumps({"AutoSelectCertificateForUrls": [chosen]}))
    theirs, commands = os.pipe()
    answers, ours = os.pipe()
    script = f'mount --bind "$1" {_POLICIES} && shift && exec chromium "$@" 3<&{theirs} 4>&{ours}'
    command: list[str | Path] = [
        "unshare",
        "--mount",
        "bash",
        "-c",
        script,
        "bash",
        home / "policies",
        *_FLAGS,
        f"--user-data-dir={home / 'own'}",
    ]
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    process = subprocess.Popen(
        command, pass_fds=(theirs, ours), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    try:
        yield Browser(process, commands, answers)
    finally:
        os.close(commands)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
