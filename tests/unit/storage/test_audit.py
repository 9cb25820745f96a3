"""The audit chain: what was appended is read again, and any single change of it is found."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.seal import SealError, open_sealed, seal
from storage import audit
from storage.audit import AuditError, Chain, Head

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
STORE = hashlib.sha256(PUBLIC).digest()[:16]
KEY = bytes(range(32, 64))
TIME = "2026-01-31T12:00:00Z"


def sealing(content: bytes, place: bytes) -> bytes:
    return seal(content, KEY, place)


def opening(key: str, sealed: bytes, place: bytes) -> bytes:
    assert key == "audit"
    return open_sealed(sealed, KEY, place)


def append(chain: Chain, *contents: bytes, sign: bool = True) -> Head:
    return chain.append(list(contents), "audit", sealing, signing=SIGNING if sign else None, time=TIME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chain of 30 records in several files, in batches, with checkpoints behind most."""
    folder = tmp_path / "audit"
    chain = Chain(folder, STORE, PUBLIC, file_bytes=1000)
    number = 0
    for size in (1, 2, 5, 1, 1, 7, 3, 1, 4, 5):
        append(chain, *(b'{"n":%d}' % n for n in range(number, number + size)), sign=size != 3)
        number += size
    chain.close()
    assert len(files(folder)) > 3
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def check(folder: Path, known: Head | None = None) -> audit.Verified:
    return audit.verify(folder, STORE, PUBLIC, known=known)


def contents(folder: Path, after: int = 0) -> list[tuple[int, bytes]]:
    return [(entry.number, entry.content) for entry in audit.read(folder, STORE, opening, after=after)]


def lines(folder: Path) -> list[tuple[Path, int, bytes]]:
    return [(file, at, line) for file in files(folder) for at, line in enumerate(file.read_bytes().splitlines(True))]


def test_what_was_appended_is_verified_and_read_from_any_record_on(folder: Path) -> None:
    found = check(folder)
    assert (found.fault, found.head.number, found.unsigned) == ("", 30, 0)
    assert found.checkpoint is not None
    assert found.checkpoint.time == TIME
    expected = [(n + 1, b'{"n":%d}' % n) for n in range(30)]
    for after in range(32):
        assert contents(folder, after) == expected[after:]


def test_another_implementation_of_the_format_finds_the_same_hashes(folder: Path) -> None:
    def encoded(label: bytes, *fields: bytes) -> bytes:
        return b"strongroom/1/" + label + b"\0" + b"".join(struct.pack(">I", len(f)) + f for f in fields)

    head, number = hashlib.sha256(encoded(b"audit-begin", STORE)).digest(), 0
    for _, _, line in lines(folder):
        kind, *parts = line.split()
        if kind == b"C":
            stamp, signature = parts[1], base64.b64decode(parts[3])
            content = encoded(b"audit-checkpoint", STORE, struct.pack(">Q", number), stamp, head)
            SIGNING.public_key().verify(signature, content)
            continue
        number += 1
        fields = (STORE, struct.pack(">Q", number), head, parts[1], base64.b64decode(parts[2]))
        head = hashlib.sha256(encoded(b"audit-chain", *fields)).digest()
        assert (int(parts[0]), parts[3].decode()) == (number, head.hex())
    assert number == 30


def test_a_chain_goes_on_where_it_was(folder: Path) -> None:
    chain = Chain(folder, STORE, PUBLIC, file_bytes=1000)
    assert chain.head == check(folder).head
    assert append(chain, b"{}").number == 31
    assert check(folder).head == chain.head
    assert contents(folder)[-1] == (31, b"{}")


def test_a_second_process_cannot_append(folder: Path) -> None:
    chain = Chain(folder, STORE, PUBLIC)
    with pytest.raises(AuditError, match="another process"):
        Chain(folder, STORE, PUBLIC)
    chain.close()
    Chain(folder, STORE, PUBLIC).close()


# --- changes


def changes(line: bytes, following: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Yield what may be done to a line: the lines that stand in its place, and in that of the next one."""
    yield "removed", [following]
    yield "doubled", [line, line, following]
    yield "swapped", [following, line]
    yield "not ended", [line[:-1], following]
    yield "cut", [line[: len(line) // 2] + b"\n", following]
    yield "junk before", [b"junk\n", line, following]
    yield "an empty line before", [b"\n", line, following]
    chance = random.Random(line)
    for at in [0, 1, 2, len(line) - 2, *(chance.randrange(len(line) - 1) for _ in range(8))]:
        for other in (line[at] ^ 1, line[at] ^ 0x20):
            yield f"byte {at} changed", [line[:at] + bytes([other]) + line[at + 1 :], following]


def test_any_changed_removed_inserted_or_reordered_line_is_found(folder: Path) -> None:
    whole = check(folder)
    all_lines = lines(folder)
    tried = 0
    for position, (file, at, line) in enumerate(all_lines):
        original = file.read_bytes()
        in_file = original.splitlines(True)
        following = in_file[at + 1] if at + 1 < len(in_file) else b""
        for what, replaced in changes(line, following):
            file.write_bytes(b"".join([*in_file[:at], *replaced, *in_file[at + 2 :]]))
            if file.read_bytes() == original:
                continue
            tried += 1
            found = check(folder, whole.head)
            covered = line.startswith(b"C ") and what in {"removed", "doubled"}
            # A checkpoint that is gone makes less signed; one that stands twice says nothing new.
            later = any(other.startswith(b"C ") for _, _, other in all_lines[position + 1 :])
            if covered and not found.fault:
                assert found.head == whole.head
                assert found.unsigned or what == "doubled" or later
                continue
            assert found.fault, (what, line)
            if line.startswith(b"R ") and "changed" in what:
                number = int(line.split()[1])
                assert re.search(rf"record ({number}|{number + 1})\b|line is not whole", found.fault), (
                    what,
                    found.fault,
                )
        file.write_bytes(original)
    assert check(folder, whole.head) == whole
    assert tried > 800


def test_a_record_that_is_moved_with_a_hash_that_fits_does_not_open(folder: Path) -> None:
    *_, (file, _, last) = [entry for entry in lines(folder) if entry[2].startswith(b"R ")]
    sealed = base64.b64decode(last.split()[3])
    with pytest.raises(SealError):
        open_sealed(sealed, KEY, audit.place(STORE, Head(30, bytes(32))))
    assert file.exists()


def test_a_missing_file_is_found_wherever_it_was(folder: Path, tmp_path: Path) -> None:
    whole = check(folder)
    for file in files(folder):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / file.name).unlink()
        assert check(tmp_path / "copy", whole.head).fault, file.name
    names = [file.name for file in files(folder)]
    (folder / names[1]).rename(folder / "x")
    (folder / names[2]).rename(folder / names[1])
    (folder / "x").rename(folder / names[2])
    assert check(folder).fault


def test_a_chain_that_is_cut_is_found_where_its_head_was_seen(folder: Path) -> None:
    whole = check(folder)
    last = files(folder)[-1]
    kept = last.read_bytes().splitlines(True)
    for count in range(1, len(kept)):
        last.write_bytes(b"".join(kept[:count]))
        cut = check(folder, whole.head)
        assert cut.fault or cut.head == whole.head
        if cut.head != whole.head:
            assert f"but {whole.head.number} was seen before" in cut.fault


def test_another_history_is_found_where_a_head_was_seen(folder: Path, tmp_path: Path) -> None:
    seen = check(folder).head
    chain = Chain(tmp_path / "other", STORE, PUBLIC)
    append(chain, *(b'{"n":%d}' % n for n in range(40)))
    assert not check(tmp_path / "other").fault
    assert "another than the one that was seen before" in check(tmp_path / "other", seen).fault


def test_another_stores_checkpoint_is_found(folder: Path) -> None:
    other = Ed25519PrivateKey.generate()
    found = audit.verify(folder, STORE, other.public_key().public_bytes_raw())
    assert "did not sign" in found.fault


def test_a_broken_chain_is_not_continued(folder: Path) -> None:
    last = files(folder)[-1]
    content = last.read_bytes()
    last.write_bytes(content.replace(b"R ", b"R 9", 1))
    with pytest.raises(AuditError, match=last.name):
        Chain(folder, STORE, PUBLIC)


def test_what_somebody_else_wrote_meanwhile_stops_the_chain(folder: Path) -> None:
    chain = Chain(folder, STORE, PUBLIC)
    with files(folder)[-1].open("ab") as file:
        file.write(b"more\n")
    with pytest.raises(AuditError, match="somebody else"):
        append(chain, b"{}")


# --- crashes and full disks


def test_a_torn_last_line_is_cut_and_the_chain_goes_on(folder: Path, tmp_path: Path) -> None:
    kept = check(folder)
    last = files(folder)[-1]
    whole = last.read_bytes()
    chain = Chain(folder, STORE, PUBLIC)
    append(chain, b'{"late":1}', sign=False)
    chain.close()
    line = last.read_bytes()[len(whole) :]
    for length in range(len(line)):
        last.write_bytes(whole + line[:length])
        chain = Chain(folder, STORE, PUBLIC)
        assert chain.head == kept.head
        chain.close()
        assert last.read_bytes() == whole
    assert tmp_path.exists()


_APPENDING = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_audit import Chain, STORE, PUBLIC, append
chain = Chain(Path({folder!r}), STORE, PUBLIC, file_bytes=5000)
while True:
    print(append(chain, b"{{}}", b"[]").number, flush=True)
"""


@pytest.mark.parametrize("seed", range(6))
def test_what_was_appended_is_there_after_a_kill(tmp_path: Path, seed: int) -> None:
    script = _APPENDING.format(paths=[str(Path(__file__).parent)], folder=str(tmp_path / "audit"))
    said = 0
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(random.Random(seed).randint(3, 60)):
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    said = int(rest[-1]) if rest else said
    chain = Chain(tmp_path / "audit", STORE, PUBLIC, file_bytes=5000)
    assert chain.head.number >= said
    append(chain, b"{}")
    found = check(tmp_path / "audit")
    assert (found.fault, found.head) == ("", chain.head)


_LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_audit import Chain, STORE, PUBLIC, append
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
chain = Chain(Path({folder!r}), STORE, PUBLIC)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
count = failed = 0
while failed < 3:
    try:
        append(chain, b"x" * 1000)
        count += 1
    except OSError:
        failed += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
append(chain, b"{{}}")
print(count + 1)
"""


def test_a_disk_that_refuses_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    script = _LIMITED.format(paths=[str(Path(__file__).parent)], folder=str(tmp_path / "audit"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = check(tmp_path / "audit")
    assert (found.fault, found.head.number) == ("", int(done.stdout))
    assert found.head.number > 5


def test_files_are_the_owners_alone(folder: Path) -> None:
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert {os.stat(file).st_mode & 0o777 for file in files(folder)} == {0o600}


def test_a_record_that_is_too_long_is_refused_and_a_line_that_is_too_long_is_found(folder: Path) -> None:
    chain = Chain(folder, STORE, PUBLIC)
    with pytest.raises(AuditError, match="too long"):
        append(chain, bytes(audit.RECORD_LIMIT + 1))
    head = append(chain, bytes(audit.RECORD_LIMIT))
    assert check(folder).head == head
    with files(folder)[-1].open("ab") as file:
        file.write(b"R 32 audit " + b"A" * (1 << 20) + b"\n")
    assert "longer than any record" in check(folder).fault
