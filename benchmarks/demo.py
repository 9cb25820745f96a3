"""What ``make serve`` explains, and ``make demo``: a study goes in over TLS, lies sealed, and comes out bit for bit."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydicom.data import get_testdata_file
from pydicom.filereader import read_file_meta_info
from pynetdicom import AE, _config

_FILES = ("CT_small.dcm", "MR_small.dcm", "SC_rgb_jpeg_dcmtk.dcm", "JPEG2000.dcm", "waveform_ecg.dcm", "reportsi.dcm")
_EXPLANATION = """
Strongroom, set up for trying out: everything is under {home}/, on this machine only.

  keys        {home}/store.key opens the store by itself; the anchors are in {home}/anchors/.
              In production neither lies beside the data: see README.md and docs/admin.md.
  listens on  {address}, TLS with client certificates; the only peer is DEMO, its key is in {home}/demo/

Send a real study and list it, from another terminal in this folder (storescu is in Debian's package dcmtk):

  /usr/bin/storescu -v -aet DEMO -aec STRONGROOM +tls {home}/demo/DEMO.key {home}/demo/DEMO.pem \\
      +cf {home}/demo/ca.pem {host} {port} {example}
  .venv/bin/strongroom --config {config} list
  .venv/bin/strongroom --config {config} export --all --to /tmp/exported

Or see all of it happen by itself: make demo
Stop with Ctrl-C.
"""


def explain(config: Path) -> None:
    """Print what is about to run and what to type."""
    from storescp.config import load, parse_address

    address = load(config.absolute()).settings.gate.listen[0]
    host, port = parse_address(address)
    example = os.path.relpath(str(get_testdata_file("CT_small.dcm")))
    print(
        _EXPLANATION.format(home=config.parent, address=address, host=host, port=port, config=config, example=example),
        flush=True,
    )


def run() -> int:
    """Send, look at the disk, list, export, compare; return an exit status."""
    with tempfile.TemporaryDirectory(prefix="strongroom-demo-") as folder:
        home = Path(folder)
        config = home / "strongroom.toml"
        _strongroom(config, "init", "--with-pki", "--key-file", str(home / "store.key"), "--listen", "127.0.0.1:0")
        _strongroom(config, "peer", "add", "DEMO", "--issue", str(home / "demo"))
        print("1. made a store with its own certificate authority, and a peer DEMO")
        server, port = _serve(config)
        try:
            return _show(home, config, port)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _show(home: Path, config: Path, port: int) -> int:
    files = [Path(str(get_testdata_file(name))) for name in _FILES]
    sizes = sum(f.stat().st_size for f in files)
    sent = {_data_set(f): f.name for f in files}
    statuses = [_store(home / "demo", port, f) for f in files]
    if any(statuses):
        print(f"   FAILED: {', '.join(f'{s:04X}' for s in statuses)}")
        return 1
    print(f"2. sent {len(files)} real objects ({sizes:,} bytes) over TLS; each was answered Success")
    packs = [p for folder in ("spool/incoming", "store/objects") for p in (home / folder).rglob("*") if p.is_file()]
    names = (b"CompressedSamples", b"1.3.6.1.4.1.5962", b"20040119")
    hits = [p for p in home.rglob("*") if p.is_file() and any(n in p.read_bytes() for n in names)]
    print(f"3. on disk: {len(packs)} sealed packs, one a study, such as")
    print(f"     {packs[0].relative_to(home)}: {packs[0].read_bytes()[4192:4216].hex(' ')} ...")
    print(f"4. patient names, UIDs and dates found in clear in any file of the store: {len(hits)}")
    listed = json.loads(_strongroom(config, "list", "--json"))["items"]
    print(f"5. listed {len(listed)} studies: {', '.join(sorted(row['modalities'] for row in listed))}")
    _strongroom(config, "export", "--all", "--to", str(home / "out"))
    exported = {_data_set(p) for p in (home / "out").rglob("*.dcm")}
    same = len(exported & set(sent))
    print(f"6. exported {len(exported)} DICOM files; data sets identical to what was sent: {same} of {len(sent)}")
    status = json.loads(_strongroom(config, "status", "--json"))
    print(f"7. status: {status['counts']['instances']} instances held, locked: {str(status['locked']).lower()}")
    print(f"   and it says: {status['warnings'][0]}")
    good = same == len(sent) == len(exported) and not hits
    print("all of it worked" if good else "SOMETHING IS WRONG")
    return 0 if good else 1


def _serve(config: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "storescp", "--config", str(config), "serve"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    port = 0
    for line in server.stderr or ():
        if "listening on 127.0.0.1:" in line:
            port = int(line.split("listening on 127.0.0.1:")[1].split()[0])
        if "serve: ready" in line:
            return server, port
    raise SystemExit("the server did not start")


def _store(folder: Path, port: int, file: Path) -> int:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "DEMO.pem", folder / "DEMO.key")
    # The bytes of the file as they are, not decoded and encoded again.
    _config.STORE_SEND_CHUNKED_DATASET = True
    meta = read_file_meta_info(file)
    entity = AE("DEMO")
    entity.add_requested_context(meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", port, ae_title="STRONGROOM", tls_args=(context, "127.0.0.1"))
    status: Any = association.send_c_store(file)
    association.release()
    return int(status.Status)


def _data_set(file: Path) -> bytes:
    raw = file.read_bytes()
    start = 132 + 12 + int.from_bytes(raw[140:144], "little")
    return raw[start:]


def _strongroom(config: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "storescp", "--config", str(config), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if sys.argv[1] == "explain":
        explain(Path(sys.argv[2]))
    else:
        sys.exit(run())
