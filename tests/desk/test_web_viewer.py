"""The viewer: what of its folder is served, and that a person sees a study in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import scu
from browser import browser
from conftest import Server
from pydicom.data import get_testdata_file
from starlette.requests import Request
from test_web import NARROW, PEERS, Desk

from storescp.desk.web_errors import Refusal
from storescp.desk.web_stream import Told
from storescp.desk.web_viewer import Viewer
from storescp.errors import StrongroomError

ROOT = Path(__file__).parents[2]
BUILT = Path(os.environ.get("STRONGROOM_VIEWER") or ROOT / "var" / "ohif")
INLINE = "window.PUBLIC_URL = '/';"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a build leaves it, and what should not be served beside it."""
    made = tmp_path / "dist"
    (made / "assets").mkdir(parents=True)
    (made / "index.html").write_text(f"<html><script>{INLINE}</script><script src='/app.1.js'></script></html>")
    for name in ("app.1.js", "app-config.js", "sw.js", "app.1.js.map", "a.wasm", "assets/logo.png", ".htaccess"):
        (made / name).write_text(f"content of {name}")
    (tmp_path / "secret").write_text("secret")
    (made / "link.js").symlink_to(tmp_path / "secret")
    (made / "folder").symlink_to(tmp_path)
    os.mkfifo(made / "pipe.js")
    return made


def get(viewer: Viewer, path: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of a request for a path."""
    wire = SimpleNamespace(is_lost=False)
    scope: dict[str, Any] = {"type": "http", "method": "GET", "headers": [], "path_params": {"path": path}}
    scope["state"] = {"told": Told(), "wire": wire}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    async def ask() -> None:
        response = await viewer.get(Request(scope))
        await response(scope, receive, send)

    try:
        anyio.run(ask)
    except Refusal as refused:
        return refused.status, {}, b""
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent)


def test_files_are_served_by_their_names_with_their_types(folder: Path) -> None:
    viewer = Viewer(folder, 4)
    for name, kind in (
        ("app.1.js", "text/javascript"),
        ("a.wasm", "application/wasm"),
        ("assets/logo.png", "image/png"),
    ):
        status, headers, body = get(viewer, name)
        assert (status, headers["content-type"], body) == (200, kind, f"content of {name}".encode())
        assert headers["content-length"] == str(len(body))


@pytest.mark.parametrize(
    "path",
    ["../secret", "assets/../../secret", "link.js", "pipe.js", "sw.js", "app.1.js.map", "/etc/passwd.x",
     "..%2fsecret.js", "assets/../app.1.js", "app.1.js/", "none.js", "a\0.js"],
)  # fmt: skip
def test_what_is_not_in_the_index_is_not_there(folder: Path, path: str) -> None:
    assert get(Viewer(folder, 4), path)[0] == 404


# A name that could be one of its pages is nothing else, either.
@pytest.mark.parametrize("path", ["", "index.html", "viewer", "viewer/dicomweb", "segmentation", "folder/secret"])
def test_every_page_is_the_viewers_one(folder: Path, path: str) -> None:
    status, headers, body = get(Viewer(folder, 4), path)
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert INLINE.encode() in body
    digest = base64.b64encode(hashlib.sha256(INLINE.encode()).digest()).decode()
    policy = headers["content-security-policy"]
    assert f"'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert "http" not in policy


def test_the_viewer_asks_this_server_and_stores_nothing(folder: Path) -> None:
    status, _, body = get(Viewer(folder, 4), "app-config.js")
    assert status == 200
    found = json.loads(re.search(rb"window\.config = (.*);\n", body)[1])  # type: ignore[index]
    (source,) = found["dataSources"]
    assert {source["configuration"][name] for name in ("qidoRoot", "wadoRoot")} == {"/dicomweb"}
    assert source["configuration"]["dicomUploadEnabled"] is False


def test_a_file_that_became_a_link_after_the_start_is_not_followed(folder: Path) -> None:
    viewer = Viewer(folder, 4)
    (folder / "a.wasm").unlink()
    (folder / "a.wasm").symlink_to(folder.parent / "secret")
    assert get(viewer, "a.wasm")[0] == 404


def test_a_folder_without_a_viewer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StrongroomError, match="holds no built viewer"):
        Viewer(tmp_path, 4)


@pytest.mark.needs_root
@pytest.mark.needs("chromium", "certutil", "pk12util", "unshare", "openssl")
@pytest.mark.skipif(
    not BUILT.is_dir() and (not os.environ.get("STRONGROOM_NO_SKIP") or bool(os.environ.get("STRONGROOM_NO_VIEWER"))),
    reason="NOT TESTED: there is no viewer; .ci/viewer brings it where npm is",
)
def test_a_person_with_a_certificate_sees_a_study_in_a_browser(
    make_server: Callable[[], Server], tmp_path: Path
) -> None:
    desk = Desk(make_server(), [*PEERS, NARROW], viewer=str(BUILT))
    desk.send("CT_small.dcm", "emri_small_RLE.dcm")
    one = scu.read(Path(str(get_testdata_file("CT_small.dcm"))))
    base = f"https://127.0.0.1:{desk.port}"
    (tmp_path / "reader").mkdir()
    with browser(tmp_path / "reader", desk.server.home / "issued" / "READER", "READER", desk.port) as page:
        page.open(f"{base}/")
        page.until("document.body.innerText.includes('1CT1')")
        page.open(f"{base}/viewer?StudyInstanceUIDs={one.study}")
        # Pixels with light in them: the frame was fetched, decoded and drawn.
        page.until(LIT)
        page.until("document.body.innerText.includes('1/1')")
        file = Path(os.environ.get("STRONGROOM_SCREENSHOT") or tmp_path / "study.png")
        page.screenshot(file)
        assert file.stat().st_size > 20_000
        assert not page.failed
        assert not [line for line in page.said if "Content Security Policy" in line]
    (tmp_path / "narrow").mkdir()
    with browser(tmp_path / "narrow", desk.server.home / "issued" / "NARROW", "NARROW", desk.port) as page:
        page.open(f"{base}/")
        page.until("document.body.innerText.includes('1 Stud') || document.querySelectorAll('tr').length > 0")
        page.until("document.body.innerText.includes('MR')")
        assert "1CT1" not in page.value("document.body.innerText")


LIT = """(() => {
  const canvas = document.querySelector('.cornerstone-canvas');
  const copy = document.createElement('canvas');
  copy.width = canvas.width; copy.height = canvas.height;
  const context = copy.getContext('2d');
  context.drawImage(canvas, 0, 0);
  const data = context.getImageData(copy.width / 4, copy.height / 4, copy.width / 2, copy.height / 2).data;
  return data.filter((value, at) => at % 4 === 0 && value > 40).length > 1000;
})()"""
