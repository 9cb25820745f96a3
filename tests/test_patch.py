"""The patch report from the outside: it agrees with an independent query of the same source, finds what was planted,
reads unknown where a source is missing, and nothing of a feed reaches a terminal as it is."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.metadata
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pki
import pytest
from conftest import Finished
from packaging.version import Version

from storescp import alerts

NOW = datetime.now(UTC)
KEY = "ed25519:" + "A" * 43 + "="
CRITICAL = [{"type": "CVSS_V3", "score": "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"}]


def stamp(days: float) -> str:
    return (NOW - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")


class Place:
    """A configuration, a patch folder, a planted Python package, and a Debian system of its own with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "strongroom.toml"
        self.config.write_text(
            f'[store]\npath = "store"\nanchors = "anchors"\nspool = "spool"\nsigning_key = "{KEY}"\n'
        )
        planted = folder / "site" / "planted_package-1.0.dist-info"
        planted.mkdir(parents=True)
        (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: Planted.Package\nVersion: 1.0\n")
        self.apt = folder / "apt"
        for name in (
            "state/lists/partial",
            "cache/archives/partial",
            "etc/apt.conf.d",
            "etc/preferences.d",
            "admin/info",
        ):
            (self.apt / name).mkdir(parents=True)
        (self.apt / "etc/sources.list").write_text("")
        (self.apt / "admin/status").write_text("")
        self.apt_configuration = self.apt / "apt.conf"
        self.apt_configuration.write_text(
            f'Dir::State "{self.apt}/state";\nDir::State::status "{self.apt}/admin/status";\n'
            f'Dir::Cache "{self.apt}/cache";\nDir::Etc "{self.apt}/etc";\nAPT::Sandbox::User "root";\n'
        )
        self.environment = os.environ | {
            "PYTHONPATH": str(folder / "site"),
            "APT_CONFIG": str(self.apt_configuration),
            "DPKG_ADMINDIR": str(self.apt / "admin"),
            "no_proxy": "localhost",
        }

    def run(self, *arguments: str | Path, **environment: str) -> Finished:
        command = [sys.executable, "-m", "storescp", "--config", str(self.config), "patch", *map(str, arguments)]
        return Finished(
            subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                env=self.environment | environment,
                cwd=Path(__file__).parent.parent,
            )
        )

    def report(self, kind: str) -> tuple[int, list[dict[str, Any]]]:
        done = self.run("report", "--json")
        assert done.err == ""
        return done.status, [item for item in done.json()["items"] if item["kind"] == kind]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def records() -> list[dict[str, Any]]:
    """Return records about what is planted, about what is installed, and about other things and releases."""
    click = importlib.metadata.version("click")

    def about(name: str, package: str, *events: dict[str, str], **more: Any) -> dict[str, Any]:
        affected = {
            "package": {"ecosystem": "PyPI", "name": package},
            "ranges": [{"type": "ECOSYSTEM", "events": events}],
        }
        return {"id": name, "modified": stamp(0.5), "published": stamp(40), "affected": [affected]} | more

    listed = about("T-5", "rich")
    listed["affected"][0] |= {"versions": [importlib.metadata.version("rich"), "0.1"], "ranges": []}
    return [
        about("T-1", "planted-package", {"introduced": "0"}, {"fixed": "1.5"}, severity=CRITICAL),
        about("T-2", "planted-package", {"introduced": "1.2"}, {"fixed": "1.3"}),
        about("T-3", "click", {"introduced": "0"}, {"fixed": click}),
        about("T-4", "click", {"introduced": click}, {"fixed": f"{click}.1"}, database_specific={"severity": "LOW"}),
        listed,
        about("T-6", "h11", {"introduced": "0"}, withdrawn=stamp(1)),
        about("T-7", "some-other-package", {"introduced": "0"}),
        about("T-8", "msgspec", {"introduced": "0"}, {"last_affected": "0.0.1"}),
    ]


def export(folder: Path, *content: dict[str, Any]) -> Path:
    file = folder / "all.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in content:
            archive.writestr(f"{record['id']}.json", json.dumps(record))
    return file


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def independent(file: Path, installed: dict[str, str]) -> set[tuple[str, str]]:
    """Ask the export by another way: pairs of a package and a record that concerns its installed version."""
    found = set()
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            record = json.loads(archive.read(name))
            if "withdrawn" in record:
                continue
            for affected in record["affected"]:
                package = affected["package"]["name"]
                if package not in installed:
                    continue
                here, vulnerable = Version(installed[package]), installed[package] in affected.get("versions", [])
                for span in affected["ranges"]:
                    for event in span["events"]:
                        ((kind, text),) = event.items()
                        if kind == "introduced" and (text == "0" or here >= Version(text)):
                            vulnerable = True
                        if (kind == "fixed" and here >= Version(text)) or (
                            kind == "last_affected" and here > Version(text)
                        ):
                            vulnerable = False
                if vulnerable:
                    found.add((package, record["id"]))
    return found


def test_an_imported_feed_makes_a_report_that_agrees_with_an_independent_query(place: Place, tmp_path: Path) -> None:
    """And before it was imported, every package was unknown."""
    status, items = place.report("python")
    assert status == 6
    assert {item["state"] for item in items} == {"unknown"}
    file = export(tmp_path, *records())
    done = place.run("import", file, "--ecosystem", "PyPI", "--sha256", digest(file))
    assert (done.status, done.err) == (0, "")
    assert "8 records" in done.out

    status, items = place.report("python")
    installed = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()
    } | {"planted-package": "1.0"}
    installed.pop("strongroom")
    expected = independent(file, installed)
    assert {(i["name"], name) for i in items for name in i["ids"]} == expected
    assert {name for name, _ in expected} == {"planted-package", "click", "rich"}
    assert {i["name"] for i in items} == set(installed)
    assert status == 6

    by_name = {item["name"]: item for item in items}
    planted = by_name["planted-package"]
    assert (planted["state"], planted["severity"], planted["candidate"]) == ("breach", "critical", "1.5")
    assert (planted["since"], planted["target"], planted["limit"]) == (stamp(40), "P3D", "P7D")
    assert 40 <= planted["age_days"] < 41
    assert planted["confidence"] == "medium"
    assert by_name["click"]["state"] == "ok"
    assert by_name["rich"]["state"] == "due"
    assert "no fix is published" in by_name["rich"]["reason"]
    assert {i["state"] for i in items if i["name"] not in {"planted-package", "click", "rich"}} == {"ok"}

    # The vault's user raises alerts: here it is us, as soon as there is a spool.
    (tmp_path / "spool").mkdir()
    place.run("report")
    standing = {alert.kind: alert.counts["count"] for alert in alerts.read(tmp_path / "spool/outbox").alerts}
    assert standing["patch-breach"] == 1
    assert standing["patch-unknown"] > 0
    (tmp_path / "spool/outbox").rename(tmp_path / "outbox")
    (tmp_path / "spool").rmdir()

    # A window holds it back only while it is not too far over its limit; this one is.
    begin, end = stamp(1), stamp(-1)
    assert place.run("window", "add", "--from", begin, "--to", end, "--reason", "slot").status == 0
    assert {i["name"]: i["state"] for i in place.report("python")[1]}["planted-package"] == "breach"

    # What was changed on the disk since proves nothing any more.
    with (tmp_path / "patch/imported/osv/PyPI.zip").open("ab") as stream:
        stream.write(b"x")
    assert {item["state"] for item in place.report("python")[1]} == {"unknown"}


def test_an_import_is_refused_without_its_digest_damaged_or_older(place: Place, tmp_path: Path) -> None:
    file = export(tmp_path, *records())
    done = place.run("import", file, "--ecosystem", "PyPI")
    assert (done.status, "has no digest" in done.err) == (1, True)
    done = place.run("import", file, "--ecosystem", "PyPI", "--sha256", "0" * 64)
    assert (done.status, "does not match its digest" in done.err) == (1, True)
    (tmp_path / "all.zip.sha256").write_text(f"{digest(file)}  all.zip\n")
    assert place.run("import", file).status == 2
    assert place.run("import", file, "--ecosystem", "PyPI").status == 0
    older = export(tmp_path, records()[0] | {"modified": stamp(3)})
    done = place.run("import", older, "--ecosystem", "PyPI", "--sha256", digest(older))
    assert (done.status, "older than the export" in done.err) == (1, True)
    odd = export(tmp_path, {"id": "\x1b[2J"})
    done = place.run("import", odd, "--ecosystem", "PyPI", "--sha256", digest(odd))
    assert (done.status, "no usable OSV export" in done.err) == (1, True)
    assert "\x1b" not in done.err
    # What was there stays.
    assert {i["name"]: i["state"] for i in place.report("python")[1]}["planted-package"] == "breach"


def test_an_old_feed_and_one_with_terminal_codes_are_handled(place: Place, tmp_path: Path) -> None:
    old = export(tmp_path, *(record | {"modified": stamp(8)} for record in records()))
    assert place.run("import", old, "--ecosystem", "PyPI", "--sha256", digest(old)).status == 0
    done = place.run("report")
    assert done.status == 6
    assert "older than P7D" in done.out
    assert re.search(r"(?m)^unknown\t\tpython planted-package\t1\.0\t", done.out)
    loud = [records()[0] | {"id": "T\x1b]0;owned\x07\x9b2J\u202e"}]
    new = export(tmp_path, *loud)
    assert place.run("import", new, "--ecosystem", "PyPI", "--sha256", digest(new)).status == 0
    done = place.run("report")
    assert "T\\x1b]0;owned\\x07" in done.out
    assert not set("\x1b\x07\x9b\u202e") & set(done.out)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    """Serve a folder over HTTPS; return its URL, the folder, and the authority's certificate."""
    authority = pki.authority("feeds")
    authority.issue("feeds", names=["localhost"], server=True).save(tmp_path, "feeds")
    (tmp_path / "feeds-ca.pem").write_text(authority.pem)
    root = tmp_path / "www"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {".json": "application/vnd.pypi.simple.v1+json"}  # noqa: RUF012

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            if self.path.startswith("/simple/"):
                self.path += "index.json"
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "feeds.pem", tmp_path / "feeds.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"https://localhost:{server.server_port}", root, tmp_path / "feeds-ca.pem"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_fetched_feed_and_index_date_a_fix_and_a_source_that_is_gone_leaves_the_rest_unknown(
    place: Place, site: tuple[str, Path, Path]
) -> None:
    url, root, ca = site
    (root / "osv/PyPI").mkdir(parents=True)
    export(root / "osv/PyPI", *records())
    (root / "simple/planted-package").mkdir(parents=True)
    files = [
        {"filename": f"planted_package-{version}.tar.gz", "upload-time": stamp(days)}
        for version, days in (("1.0", 300), ("1.5", 5), ("2.0", 1))
    ]
    (root / "simple/planted-package/index.json").write_text(json.dumps({"name": "planted-package", "files": files}))
    where = ("--osv", f"{url}/osv/", "--index", f"{url}/simple/")

    # Nobody vouches for the server: nothing is taken from it.
    done = place.run("fetch", "--only", "osv", *where)
    assert (done.status, "certificate" in done.err) == (1, True)
    done = place.run("fetch", "--only", "osv", "--only", "index", *where, SSL_CERT_FILE=str(ca))
    assert done.status == 3, (done.out, done.err)
    assert "fetched OSV export of PyPI" in done.out
    assert "fetched planted-package on the package index" in done.out
    assert "failed OSV export of GIT: the server answers 404" in done.err
    assert "strongroom on the package index" not in done.out + done.err

    planted = {i["name"]: i for i in place.report("python")[1]}["planted-package"]
    assert (planted["state"], planted["since"], planted["confidence"]) == ("due", stamp(5), "high")
    # What no feed was fetched for is unknown, and says how old it can be at most.
    status, bundled = place.report("openssl")
    of_wheel = [item for item in bundled if "cryptography" in item["name"] or "sqlcipher3" in item["name"]]
    assert [item["state"] for item in of_wheel] == ["unknown", "unknown"]
    assert status == 6
    assert {item["state"] for item in place.report("debian")[1]} == {"unknown"}


@pytest.mark.needs("apt-get", "dpkg-deb")
def test_an_old_debian_package_is_found_and_dated_by_the_changelog_of_its_candidate(place: Place) -> None:
    """With a package system of the test's own: one package installed, a newer one in a security suite's list."""
    if "ID=debian" not in Path("/etc/os-release").read_text().replace('"', ""):
        pytest.skip("NOT TESTED: this is no Debian")
    made = place.folder / "made"
    documents = made / "root/usr/share/doc/planted"
    documents.mkdir(parents=True)
    (made / "root/DEBIAN").mkdir()
    control = "Package: planted\nVersion: {}\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: planted\n"
    (made / "root/DEBIAN/control").write_text(control.format("1.0-3"))

    def entry(version: str, days: float, text: str) -> str:
        date = format_datetime(NOW - timedelta(days=days))
        return (
            f"planted ({version}) bookworm-security; urgency=medium\n\n  * {text}\n\n -- A <a@example.org>  {date}\n\n"
        )

    text = (
        entry("1.0-3", 2, "Fix CVE-2027-0002.") + entry("1.0-2", 9, "Fix CVE-2027-0001.") + entry("1.0-1", 90, "New.")
    )
    (documents / "changelog.Debian.gz").write_bytes(gzip.compress(text.encode()))
    repository = place.folder / "repository"
    repository.mkdir()
    package = repository / "planted_1.0-3_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(made / "root"), str(package)]
    subprocess.run(command, check=True, capture_output=True)
    listed = (
        control.format("1.0-3")
        + f"Filename: ./{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest(package)}\n"
    )
    (repository / "Packages").write_text(listed)
    lists = f"SHA256:\n {digest(repository / 'Packages')} {(repository / 'Packages').stat().st_size} Packages\n"
    head = "Label: Debian-Security\nSuite: stable-security\nCodename: bookworm-security\n"
    date = (NOW - timedelta(days=1)).strftime("%a, %d %b %Y %H:%M:%S UTC")
    (repository / "Release").write_text(f"Origin: Debian\n{head}Date: {date}\n{lists}")
    (place.apt / "admin/status").write_text(
        control.format("1.0-1").replace("Version", "Status: install ok installed\nVersion")
    )

    # The lists were never fetched.
    status, items = place.report("debian")
    assert (status, [i["state"] for i in items]) == (6, ["unknown"])
    assert "never ran" in items[0]["reason"]

    (place.apt / "etc/sources.list").write_text(f"deb [trusted=yes] copy:{repository} ./\n")
    subprocess.run(["apt-get", "update"], check=True, capture_output=True, env=place.environment)
    first = {i["name"]: i for i in place.report("debian")[1]}["planted"]
    assert (first["state"], first["confidence"], "first seen" in first["source"]) == ("due", "low", True)

    done = place.run("fetch", "--only", "debian")
    assert (done.status, done.err) == (0, ""), done.out
    assert "fetched changelog of planted 1.0-3" in done.out
    found = {i["name"]: i for i in place.report("debian")[1]}["planted"]
    assert (found["state"], found["installed"], found["candidate"]) == ("breach", "1.0-1", "1.0-3")
    assert (found["since"], found["ids"]) == (stamp(9), ["CVE-2027-0001", "CVE-2027-0002"])
    assert found["confidence"] == "high"


def test_windows_are_announced_listed_and_taken_back_within_bounds(place: Place) -> None:
    assert place.run("window", "list").status == 5
    for begin, end in ((stamp(2), stamp(1)), (stamp(-1), stamp(-16)), (stamp(-400), stamp(-401)), ("soon", stamp(-1))):
        assert place.run("window", "add", "--from", begin, "--to", end, "--reason", "r").status == 2
    begin, end = stamp(-1), stamp(-2)
    assert place.run("window", "add", "--from", begin, "--to", end, "--reason", "weekend").status == 0
    (window,) = place.run("window", "list", "--json").json()["items"]
    assert (window["begin"], window["end"], window["reason"]) == (begin, end, "weekend")
    assert "weekend" in place.run("window", "list").out
    assert place.run("window", "remove", "no-such").status == 5
    assert place.run("window", "remove", window["id"]).status == 0
    assert place.run("window", "list").status == 5


def test_a_damaged_memory_is_named_and_nothing_counts_anew_behind_one_s_back(place: Place, tmp_path: Path) -> None:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch/seen.json").write_text('{"format": 1, "items": {"a": "yesterday"}}')
    done = place.run("report", "--json")
    assert (done.status, done.out) == (1, "")
    assert re.search(r"error: \S+/seen\.json cannot be read", done.err)
    assert "hint: remove it" in done.err
