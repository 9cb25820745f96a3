"""Fetching: HTTPS alone, conditional, resumable, bounded; what breaks off leaves what was there as it was."""

from __future__ import annotations

import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pki
import pytest

from storescp.errands import fetch
from storescp.errands.download import Client, FetchError
from storescp.patch.folder import Folder, Manifest, Origin, load
from storescp.patch.settings import PatchAge

CONTENT = bytes(range(256)) * 40


class Site:
    """An HTTPS server that can be told to misbehave, and remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        authority = pki.authority("feeds")
        authority.issue("feeds", names=["localhost"], server=True).save(folder, "site")
        self.context = ssl.create_default_context(cadata=authority.pem)
        self.pages: dict[str, bytes] = {}
        self.etag = '"1"'
        self.cut = 0
        self.redirect = ""
        self.lie = 0
        self.asked: list[tuple[str, dict[str, str]]] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                site.asked.append((self.path, dict(self.headers)))
                if site.redirect:
                    self.send_response(302)
                    self.send_header("Location", site.redirect)
                    return self.end_headers()
                page = site.pages.get(self.path)
                if page is None:
                    return self.send_error(404)
                if site.etag and self.headers["If-None-Match"] == site.etag:
                    self.send_response(304)
                    return self.end_headers()
                start = 0
                if self.headers["Range"] and self.headers["If-Range"] == site.etag:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(page) - 1}/{len(page)}")
                else:
                    self.send_response(200)
                self.send_header("ETag", site.etag)
                self.send_header("Content-Length", str(site.lie or len(page) - start))
                self.end_headers()
                self.wfile.write(page[start : start + site.cut] if site.cut else page[start:])
                return None

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "site.pem", folder / "site.key")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://localhost:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "localhost")
    made = Site(tmp_path)
    made.pages["/a"] = CONTENT
    yield made
    made.close()


def download(site: Site, target: Path, known: Origin | None = None, most: int = 1 << 20) -> Origin | None:
    return Client(site.context).download(f"{site.url}/a", target, known, most)


def test_a_file_arrives_whole_with_its_digest_and_is_not_fetched_twice(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "in" / "a"
    origin = download(site, target)
    assert origin is not None
    assert origin.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert target.read_bytes() == CONTENT
    assert download(site, target, origin) is None
    assert [p.name for p in target.parent.iterdir()] == ["a"]


def test_what_broke_off_goes_on_where_it_ended(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"before")
    site.cut = 1000
    with pytest.raises(FetchError, match="1000 of 10240 bytes"):
        download(site, target)
    assert target.read_bytes() == b"before"
    site.cut = 0
    origin = download(site, target)
    assert origin is not None
    assert site.asked[-1][1]["Range"] == "bytes=1000-"
    assert origin.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_what_changed_meanwhile_is_not_pieced_together(site: Site, tmp_path: Path) -> None:
    site.cut = 1000
    with pytest.raises(FetchError):
        download(site, tmp_path / "a")
    site.cut, site.etag, site.pages["/a"] = 0, '"2"', CONTENT[::-1]
    download(site, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]


def test_more_than_the_bound_is_refused_announced_or_not(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="larger"):
        download(site, tmp_path / "a", most=10_000)
    site.cut, site.etag = 1000, '"1"'
    with pytest.raises(FetchError):
        download(site, tmp_path / "a")
    site.cut = 0
    with pytest.raises(FetchError, match="larger"):
        download(site, tmp_path / "a", most=10_000)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("scheme", ["http", "file", "ftp"])
def test_nothing_but_https_is_followed(site: Site, tmp_path: Path, scheme: str) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"there")
    place = site.redirect = f"{scheme}://localhost{there}"
    with pytest.raises(FetchError):
        download(site, tmp_path / "a")
    with pytest.raises(FetchError, match="no URL that begins with https"):
        Client(site.context).download(place, tmp_path / "a", None, 100)
    assert len(site.asked) == 1


def test_a_server_that_nobody_vouches_for_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="certificate"):
        Client().download(f"{site.url}/a", tmp_path / "a", None, 100)


def test_a_server_that_is_not_there_and_one_that_refuses_are_told_apart(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="answers 404"):
        Client(site.context).download(f"{site.url}/b", tmp_path / "b", None, 100)
    with pytest.raises(FetchError, match="cannot be reached"):
        Client(site.context).download("https://localhost:1/b", tmp_path / "b", None, 100)


def test_exports_and_answers_are_handed_over_with_their_origins(site: Site, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "patch")
    settings = PatchAge(osv=f"{site.url}/osv/", index=f"{site.url}/simple/", ecosystems=["PyPI", "GIT"])
    site.pages |= {"/osv/PyPI/all.zip": CONTENT, "/simple/planted/": json.dumps({"name": "planted"}).encode()}
    client = Client(site.context)

    def run() -> dict[str, str]:
        found = [
            *fetch.exports(client, settings, folder),
            *fetch.answers(client, settings, folder, ["planted", "not-there"]),
        ]
        return {outcome.what: outcome.state for outcome in found}

    expected = {"OSV export of PyPI": "fetched", "OSV export of GIT": "failed"}
    expected |= {"planted on the package index": "fetched", "not-there on the package index": "failed"}
    assert run() == expected
    assert [h["Accept"] for path, h in site.asked if path == "/simple/planted/"] == [
        "application/vnd.pypi.simple.v1+json"
    ]
    manifest = load(folder.manifest, Manifest)
    assert manifest is not None
    assert list(manifest.packages) == ["planted"]
    unchanged = {what: "unchanged" if state == "fetched" else state for what, state in expected.items()}
    assert run() == unchanged
    # What was damaged on the disk is fetched again though the server has nothing new.
    folder.feeds("PyPI")[0].write_bytes(b"x")
    folder.answer("planted").write_bytes(b"x")
    assert run() == expected
    for file in (folder.feeds("PyPI")[0].with_suffix(".json"), folder.manifest):
        file.write_bytes(b"{")
    assert run() == expected


def test_a_package_s_size_is_read_from_what_apt_would_fetch() -> None:
    text = "'http://deb.example/p/libx%2b_1%3a2_all.deb' libx+_1%3a2_all.deb 1490 SHA256:00\n"
    text += "noise\n'file:/y.deb' y_1_all.deb 7 \n"
    assert fetch.package_sizes(text) == {"libx+": 1490, "y": 7}
