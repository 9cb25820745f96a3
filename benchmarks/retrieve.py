"""How fast studies are given back: a CT study of 400 slices by C-GET and WADO-RS, Strongroom beside Orthanc.

The same client fetches the same study from both, one after the other, the order turning from round to round. It takes
what comes, counts bytes and instances, and keeps nothing. See docs/performance.md.

Usage: python -m benchmarks.retrieve [--rounds N] [--slices N] [--json FILE]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.client import Job, burst
from benchmarks.measure import Accounting, machine
from benchmarks.objects import CT_IMAGE, EXPLICIT_LITTLE, ct
from benchmarks.servers import ROOT, Orthanc, Pki
from benchmarks.strongroom import StrongroomOne
from benchmarks.upper import Credentials, Target, tls_context
from storescp.gate import dimse, negotiate, wire

_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
_GET = "1.2.840.10008.5.1.4.1.2.2.3"
_MAXIMUM_PDU = 131_072
_PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


class Places(NamedTuple):
    """Where a server gives back: C-GET and DICOMweb, the path of its DICOMweb root, and whether there is TLS."""

    dicom: Target
    web: int
    root: str
    secure: bool


# Orthanc's manual puts this in front of it for HTTPS. Nothing is buffered in files.
_PROXY = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl; tcp_nodelay on;
    ssl_certificate {certificate}; ssl_certificate_key {key};
    ssl_client_certificate {authority}; ssl_verify_client on;
    location / {{
      proxy_pass http://127.0.0.1:{web}; proxy_http_version 1.1; proxy_max_temp_file_size 0; proxy_buffers 16 256k;
      proxy_buffer_size 256k; proxy_busy_buffers_size 512k;
    }}
  }}
}}
"""


class OrthancBack(Orthanc):
    """Orthanc with C-GET and its DICOMweb plugin, behind nginx where that is installed."""

    web = proxy = 0
    _nginx: subprocess.Popen[bytes] | None = None

    def start(self) -> Target:
        target = super().start()
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
        if program is not None:
            self.proxy = free_port()
            key, certificate = self.pki.server
            names = {"folder": self.folder, "port": self.proxy, "web": self.web, "authority": self.pki.authority}
            file = self.folder / "nginx.conf"
            file.write_text(_PROXY.format(key=key, certificate=certificate, **names))
            self._nginx = subprocess.Popen([program, "-p", str(self.folder), "-c", str(file)])
            until = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", self.proxy), 1).close()
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)
        return target

    def stop(self) -> None:
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait()
            self._nginx = None
        super().stop()

    def prepare(self) -> None:
        super().prepare()
        self.web = free_port()
        file = self.folder / "orthanc.json"
        settings = json.loads(file.read_text()) | {
            "HttpServerEnabled": True,
            "HttpPort": self.web,
            "AuthenticationEnabled": False,
            # Without TLS: Debian's Orthanc ends at the first request over HTTPS. nginx before it speaks TLS.
            "SslEnabled": False,
            "KeepAlive": True,
            "Plugins": [_PLUGIN],
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowFind": True,
            # Who asks is no modality of its own: its title is not looked up.
            "DicomModalities": {"bench": ["BENCH", "127.0.0.1", 1]},
        }
        file.write_text(json.dumps(settings))

    def places(self) -> Places:
        if self.proxy:
            return Places(self.target(), self.proxy, "/dicom-web", secure=True)
        return Places(self.target(), self.web, "/dicom-web", secure=False)


class StrongroomBack(StrongroomOne):
    """Strongroom with its desk."""

    desk = web = 0

    def prepare(self) -> None:
        super().prepare()
        self.desk, self.web = free_port(), free_port()
        text = self.config.read_text()
        head, tail = text.split("\n[desk]\n")
        tail = tail.replace("\nlisten = []", f'\nlisten = ["127.0.0.1:{self.desk}"]', 1)
        tail = tail.replace("\nweb = []", f'\nweb = ["127.0.0.1:{self.web}"]', 1)
        tail = re.sub(r"(?m)^instances_per_hour = .*$", "instances_per_hour = 0", tail)
        self.config.write_text(f"{head}\n[desk]\n{tail}")
        [peer] = (self.folder / "peers.d").glob("*.toml")
        changed = re.sub(r"(?m)^operations = .*$", 'operations = ["echo", "store", "find", "get"]', peer.read_text())
        peer.write_text(re.sub(r"(?m)^roles = .*$", 'roles = ["reader"]', changed))

    def ready(self) -> bool:
        if not super().ready():
            return False
        try:
            for port in (self.desk, self.web):
                socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    def places(self) -> Places:
        store = self.target()
        return Places(Target(self.desk, store.called, store.credentials), self.web, "/dicomweb", secure=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Association:
    """An association that asks, and takes what it gets."""

    def __init__(self, target: Target, contexts: dict[int, tuple[str, list[str]]], roles: tuple[str, ...] = ()) -> None:
        self._tls = _context(target.credentials).wrap_socket(
            socket.create_connection(("127.0.0.1", target.port), 60), server_hostname="localhost"
        )
        self._tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        title = target.credentials.title
        asked = negotiate.request(title, target.called, contexts, maximum_pdu=_MAXIMUM_PDU, roles=roles)
        self._tls.sendall(asked)
        self._reader = wire.Reader(0)
        self._buffer = memoryview(bytearray(1 << 18))
        self._events: list[wire.Pdu | wire.Fragment] = []
        first = self._next()
        if not isinstance(first, wire.Pdu) or first.kind != wire.ASSOCIATE_AC:
            raise ConnectionError("the server does not accept the association")
        self._agreement = negotiate.accepted(first.content, contexts)
        self._reader.maximum_pdu = _MAXIMUM_PDU

    def ask(self, field: int, model: str, identifier: bytes) -> tuple[int, int, int, list[bytes]]:
        """Ask; return the last status, how many instances came, their bytes, and the identifiers of what is found."""
        context = next(n for n, c in self._agreement.contexts.items() if c.abstract_syntax == model)
        self._send(context, _request(field, model), identifier)
        instances = size = 0
        found: list[bytes] = []
        command, data = bytearray(), bytearray()
        while True:
            event = self._next()
            if not isinstance(event, wire.Fragment):
                raise ConnectionError("the association ended")
            if event.command:
                command += event.data
                if not event.last:
                    continue
                content = bytes(command)
                command.clear()
                if dimse.is_response(content):
                    answer = dimse.decode_answer(content)
                    if answer.status >> 8 != 0xFF:
                        return answer.status, instances, size, found
                    keep = answer.has_data_set
                else:
                    asked, keep = dimse.decode(content), False
                continue
            if keep:
                data += event.data
            else:
                size += len(event.data)
            if event.last and keep:
                found.append(bytes(data))
                data.clear()
            elif event.last:
                instances += 1
                self._send(event.context_id, dimse.response(asked, 0))

    def close(self) -> None:
        """End it."""
        self._tls.sendall(wire.release_request())
        self._tls.close()

    def _send(self, context: int, command: bytes, data: bytes | None = None) -> None:
        content = wire.data_pdus(context, command=True, content=command, maximum=_MAXIMUM_PDU)
        if data is not None:
            content += wire.data_pdus(context, command=False, content=data, maximum=_MAXIMUM_PDU)
        self._tls.sendall(content)

    def _next(self) -> wire.Pdu | wire.Fragment:
        while not self._events:
            count = self._tls.recv_into(self._buffer)
            if not count:
                raise ConnectionError("closed")
            # Fragments point into the buffer: all are handled before the next read.
            self._events = list(self._reader.receive(self._buffer[:count]))
        return self._events.pop(0)


def _request(field: int, model: str) -> bytes:
    """Return the command set of a C-FIND or C-GET request."""
    uid = model.encode() + b"\0" * (len(model) % 2)
    shorts = ((0x0100, field), (0x0110, 1), (0x0700, 0), (0x0800, 1))
    body = struct.pack("<HHI", 0, 0x0002, len(uid)) + uid
    body += b"".join(struct.pack("<HHIH", 0, element, 2, value) for element, value in shorts)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _element(group: int, element: int, vr: bytes, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2) if vr == b"UI" else b" " * (len(value) % 2)
    return group.to_bytes(2, "little") + element.to_bytes(2, "little") + vr + len(value).to_bytes(2, "little") + value


def the_study(target: Target) -> str:
    """Return the UID of the one study that a server has."""
    association = Association(target, {1: (_FIND, [EXPLICIT_LITTLE])})
    asked = _element(8, 0x52, b"CS", b"STUDY") + _element(0x20, 0x0D, b"UI", b"")
    _, _, _, [found] = association.ask(dimse.C_FIND_RQ, _FIND, asked)
    association.close()
    at = found.index(b"\x20\x00\x0d\x00UI") + 8
    return found[at : at + int.from_bytes(found[at - 2 : at], "little")].rstrip(b"\0 ").decode()


def c_get(places: Places, study: str) -> tuple[int, int]:
    """Fetch a study by C-GET; return how many instances came, and their bytes."""
    contexts = {1: (_GET, [EXPLICIT_LITTLE]), 3: (CT_IMAGE, [EXPLICIT_LITTLE])}
    association = Association(places.dicom, contexts, roles=(CT_IMAGE,))
    asked = _element(8, 0x52, b"CS", b"STUDY") + _element(0x20, 0x0D, b"UI", study.encode())
    status, instances, size, _ = association.ask(dimse.C_GET_RQ, _GET, asked)
    association.close()
    if status:
        raise ConnectionError(f"C-GET ended with {status:04X}")
    return instances, size


def wado(places: Places, study: str) -> tuple[int, int]:
    """Fetch a study by WADO-RS; return how many instances came, and their bytes with what is around them."""
    connection = (
        http.client.HTTPSConnection("localhost", places.web, context=_context(places.dicom.credentials))
        if places.secure
        else http.client.HTTPConnection("localhost", places.web)
    )
    accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
    connection.request("GET", f"{places.root}/studies/{study}", headers={"Accept": accept})
    answer = connection.getresponse()
    if answer.status != 200:
        raise ConnectionError(f"WADO-RS answered with {answer.status}")
    boundary = re.search(r'boundary="?([^";]+)', answer.headers["Content-Type"] or "")
    if boundary is None:
        raise ConnectionError("no multipart answer")
    mark = b"--" + boundary[1].encode()
    buffer = memoryview(bytearray(1 << 18))
    size = instances = 0
    rest = b""
    while count := answer.readinto(buffer):
        size += count
        here = rest + bytes(buffer[:count])
        instances += here.count(mark) - rest.count(mark)
        rest = here[-(len(mark) - 1) :]
    connection.close()
    # The last mark ends the message.
    return instances - 1, size


def _context(credentials: Credentials) -> ssl.SSLContext:
    context = tls_context(credentials)
    context.check_hostname = False
    return context


WAYS: dict[str, Callable[[Places, str], tuple[int, int]]] = {"C-GET": c_get, "WADO-RS": wado}


def run(rounds: int, slices: int, ways: list[str], folder: Path) -> list[dict[str, Any]]:
    """Measure; return a row for each server, way and round."""
    pki = Pki(folder / "pki")
    servers: list[type[OrthancBack] | type[StrongroomBack]] = [OrthancBack, StrongroomBack]
    rows: list[dict[str, Any]] = []
    with Accounting() as accounting:
        running: dict[str, OrthancBack | StrongroomBack] = {}
        studies: dict[str, str] = {}
        try:
            for kind in servers:
                server = kind(folder / kind.name, pki, accounting, 1)
                running[kind.name] = server
                target = server.start()
                done = burst(Job(target, ct(), slices), 1)
                if done.failures:
                    raise ConnectionError(f"{kind.name}: {done.failures[0]}")
                server.settle(120)
                studies[kind.name] = the_study(server.places().dicom)
            for number in range(rounds):
                turned = servers[number % 2 :] + servers[: number % 2]
                for way in ways:
                    for kind in turned:
                        places, study = running[kind.name].places(), studies[kind.name]
                        begun = time.perf_counter()
                        instances, size = WAYS[way](places, study)
                        seconds = time.perf_counter() - begun
                        if instances != slices:
                            raise ConnectionError(f"{kind.name} gave {instances} of {slices} instances by {way}")
                        rows.append(
                            {"server": kind.name, "way": way, "round": number, "seconds": seconds, "bytes": size}
                            | {"rate": instances / seconds}
                        )
        finally:
            for server in running.values():
                server.stop()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians and ratios as Markdown."""
    lines = ["| | server | instances/s | MB/s | x Orthanc |", "|---|---|---:|---:|---:|"]
    for way in WAYS:
        rates = {}
        for name in ("orthanc", StrongroomBack.name):
            mine = [row for row in rows if row["way"] == way and row["server"] == name]
            if not mine:
                continue
            rates[name] = statistics.median(row["rate"] for row in mine)
            speed = statistics.median(row["bytes"] / row["seconds"] for row in mine) / 1e6
            ratio = rates[name] / rates["orthanc"]
            lines.append(f"| {way} | {name} | {rates[name]:,.0f} | {speed:,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.retrieve", description="How fast studies are given back.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path, help="write raw figures")
    arguments = parser.parse_args()
    if not Path(_PLUGIN).exists():
        parser.error("Orthanc's DICOMweb plugin is not installed: apt-get install orthanc-dicomweb")
    work = ROOT / "var"
    work.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="retrieve-", dir=work))
    try:
        rows = run(arguments.rounds, arguments.slices, arguments.ways.split(","), folder)
    finally:
        if not os.environ.get("STRONGROOM_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
