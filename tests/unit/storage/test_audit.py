"""The audit chain: what was appended is read again, any single change of it is found, no crash or disk breaks it."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.seal import SealError, context, open_sealed, seal, u64
from keys.versions import Version
from storage import audit, auditlines
from storage.audit import AuditError, Chain, Head

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
STORE = hashlib.sha256(PUBLIC).digest()[:16]
KEY = bytes(range(32, 64))
TIME = "2026-01-31T12:00:00Z"
BATCHES = (1, 2, 5, 1, 1, 7, 3, 1, 4, 5)


def event(number: int) -> bytes:
    # Contents of every length by three, so that base64 ends in no, one and two paddings.
    return json.dumps({"n": "x" * (number % 3), "time": TIME, "type": f"t{number}"}, separators=(",", ":")).encode()


def sealing(content: bytes, place: bytes) -> bytes:
    return seal(content, KEY, place)


def opening(key: str, sealed: bytes, place: bytes) -> bytes:
    assert key == "audit"
    return open_sealed(sealed, KEY, place)


def append(chain: Chain, *contents: bytes, sign: bool = True) -> Head:
    return chain.append(list(contents), "audit", sealing, signing=SIGNING if sign else None, time=TIME)


def build(folder: Path) -> None:
    """Make a chain of 30 records in several files, in batches, with checkpoints behind most and the last."""
    chain = Chain(folder, STORE, PUBLIC, file_bytes=900)
    number = 0
    for size in BATCHES:
        append(chain, *map(event, range(number + 1, number + size + 1)), sign=size != 3)
        number += size
    chain.close()
    assert number == 30
    assert len(files(folder)) > 4


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "audit"
    build(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the chain, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "audit"))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def check(folder: Path, known: Head | None = None) -> audit.Verified:
    return audit.verify(folder, STORE, PUBLIC, known=known)


def contents(folder: Path, after: int = 0) -> list[tuple[int, bytes]]:
    return [(entry.number, entry.content) for entry in audit.read(folder, STORE, opening, after=after)]


def lines(folder: Path) -> list[tuple[Path, int, bytes]]:
    return [(file, at, line) for file in files(folder) for at, line in enumerate(file.read_bytes().splitlines(True))]


def records(folder: Path) -> list[bytes]:
    return [line for _, _, line in lines(folder) if line.startswith(b"R ")]


def number_of(line: bytes) -> int:
    return int(line.split()[1])


# --- what is written


def test_what_was_appended_is_verified_and_read_from_any_record_on(original: Path) -> None:
    found = check(original)
    assert (found.fault, found.record, found.head.number, found.unsigned) == ("", 0, 30, 0)
    assert found.checkpoint is not None
    assert (found.checkpoint.number, found.checkpoint.time, found.checkpoint.hash) == (30, TIME, found.head.hash)
    expected = [(number, event(number)) for number in range(1, 31)]
    for after in range(32):
        assert contents(original, after) == expected[after:]
    assert [entry.key for entry in audit.read(original, STORE, opening)] == ["audit"] * 30


def encoded(label: bytes, *fields: bytes) -> bytes:
    """Return a context; shares no code with the product."""
    return b"strongroom/1/" + label + b"\0" + b"".join(struct.pack(">I", len(f)) + f for f in fields)


def test_another_implementation_of_the_format_finds_the_same(original: Path) -> None:
    head, number, signed = hashlib.sha256(encoded(b"audit-begin", STORE)).digest(), 0, []
    for file in files(original):
        assert int(file.name[:16]) == number + 1
        for line in file.read_bytes().decode("ascii").split("\n")[:-1]:
            kind, *parts = line.split(" ")
            if kind == "C":
                assert (int(parts[0]), parts[2]) == (number, head.hex())
                bound = encoded(b"audit-checkpoint", STORE, struct.pack(">Q", number), parts[1].encode(), head)
                SIGNING.public_key().verify(base64.b64decode(parts[3]), bound)
                signed.append(number)
                continue
            number += 1
            sealed, place = base64.b64decode(parts[2]), encoded(b"audit", STORE, struct.pack(">Q", number), head)
            assert open_sealed(sealed, KEY, place) == event(number)
            fields = (STORE, struct.pack(">Q", number), head, parts[1].encode(), sealed)
            head = hashlib.sha256(encoded(b"audit-chain", *fields)).digest()
            assert (kind, int(parts[0]), parts[3]) == ("R", number, head.hex())
    ends = [sum(BATCHES[: i + 1]) for i, size in enumerate(BATCHES) if size != 3]
    assert (number, signed) == (30, ends)


def test_files_are_the_owners_alone(original: Path) -> None:
    assert os.stat(original).st_mode & 0o777 == 0o700
    assert {os.stat(file).st_mode & 0o777 for file in original.iterdir()} == {0o600}


def test_a_chain_goes_on_where_it_was(folder: Path) -> None:
    for number in range(31, 60):
        chain = Chain(folder, STORE, PUBLIC, file_bytes=900)
        assert (chain.head, chain.cut) == (check(folder).head, 0)
        assert append(chain, event(number)).number == number
        chain.close()
    assert check(folder).fault == ""
    assert contents(folder)[-1] == (59, event(59))


def test_an_empty_chain_has_no_records_like_one_that_is_not_there(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "audit", STORE, PUBLIC)
    found = check(tmp_path / "audit")
    assert (found.fault, found.head, found.checkpoint, found.unsigned) == ("", chain.head, None, 0)
    assert chain.head.hash == hashlib.sha256(encoded(b"audit-begin", STORE)).digest()
    assert chain.append([], "audit", sealing, signing=SIGNING, time=TIME) == chain.head
    assert files(tmp_path / "audit") == []
    assert check(tmp_path / "no-such") == found
    assert check(tmp_path / "no-such", Head(1, bytes(32))).record == 1


def test_a_hash_is_found_by_its_number(original: Path) -> None:
    hashes = [bytes.fromhex(line.split()[4].decode()) for line in records(original)]
    assert [audit.hash_of(original, number) for number in range(1, 31)] == hashes
    assert (audit.hash_of(original, 0), audit.hash_of(original, 31)) == (None, None)


def test_a_record_that_is_too_long_is_not_appended(folder: Path) -> None:
    before = check(folder)
    chain = Chain(folder, STORE, PUBLIC)
    with pytest.raises(AuditError, match="262145 bytes is too long"):
        append(chain, event(31), bytes(audit.RECORD_LIMIT + 1))
    assert check(folder) == before


@pytest.mark.parametrize(
    ("key", "time", "seals"),
    [
        ("Audit", TIME, sealing),
        ("", TIME, sealing),
        ("audit key", TIME, sealing),
        ("audit\nR", TIME, sealing),
        ("audit", "", sealing),
        ("audit", "2026-01-31T12:00:00.5Z", sealing),
        ("audit", "2026-01-31 12:00:00Z", sealing),
        ("audit", TIME, lambda *_: b""),
        ("audit", TIME, lambda *_: bytes(400 << 10)),
    ],
)
def test_a_line_that_no_reader_would_take_is_not_written(
    folder: Path, key: str, time: str, seals: audit.SealFunction
) -> None:
    before = check(folder)
    chain = Chain(folder, STORE, PUBLIC)
    with pytest.raises(AuditError, match="malformed; nothing was recorded"):
        chain.append([event(31)], key, seals, signing=SIGNING, time=time)
    assert check(folder) == before
    assert append(chain, event(31)).number == 31
    assert check(folder).fault == ""


def test_the_longest_record_is_appended_and_read(tmp_path: Path) -> None:
    longest = os.urandom(audit.RECORD_LIMIT)
    version = Version(STORE, 1, bytes(32))
    chain = Chain(tmp_path / "audit", STORE, PUBLIC)
    chain.append([longest, longest], "deposit-1", version.deposit_key().seal_record)
    assert check(tmp_path / "audit").fault == ""
    opens = lambda _, sealed, place: version.open_record(sealed, place)  # noqa: E731
    assert [e.content for e in audit.read(tmp_path / "audit", STORE, opens)] == [longest] * 2


# --- sealed records


def test_records_sealed_while_locked_open_with_their_version_and_no_other(tmp_path: Path) -> None:
    one, two = (Version(STORE, number, bytes([number]) * 32) for number in (1, 2))
    chain = Chain(tmp_path / "audit", STORE, PUBLIC)
    chain.append([event(1), event(2)], "deposit-1", one.deposit_key().seal_record)
    chain.append([event(3)], "deposit-2", two.deposit_key().seal_record)
    append(chain, event(4))
    versions = {"deposit-1": one, "deposit-2": two}

    def opens(key: str, sealed: bytes, place: bytes) -> bytes:
        return opening(key, sealed, place) if key == "audit" else versions[key].open_record(sealed, place)

    found = list(audit.read(tmp_path / "audit", STORE, opens))
    assert [(e.number, e.key, e.content) for e in found] == [
        (number, key, event(number))
        for number, key in enumerate(["deposit-1", "deposit-1", "deposit-2", "audit"], start=1)
    ]
    versions = {"deposit-1": one, "deposit-2": one}
    reading = audit.read(tmp_path / "audit", STORE, opens)
    assert [next(reading).number, next(reading).number] == [1, 2]
    with pytest.raises(AuditError, match=r"1\.log: record 3 does not open") as raised:
        next(reading)
    assert raised.value.record == 3


def test_a_record_opens_in_its_place_alone(original: Path) -> None:
    heads = [Head(0, hashlib.sha256(encoded(b"audit-begin", STORE)).digest())]
    sealed = []
    for line in records(original):
        heads.append(Head(number_of(line), bytes.fromhex(line.split()[4].decode())))
        sealed.append(base64.b64decode(line.split()[3]))
    for number, record in enumerate(sealed, start=1):
        for before in (*heads, Head(number, heads[number - 1].hash), Head(number - 1, bytes(32))):
            place = audit.place(STORE, before)
            if before == heads[number - 1]:
                assert open_sealed(record, KEY, place) == event(number)
                continue
            with pytest.raises(SealError):
                open_sealed(record, KEY, place)
        with pytest.raises(SealError):
            open_sealed(record, KEY, audit.place(bytes(16), heads[number - 1]))


# --- changes


def forged(folder: Path, before: bytes | None) -> bytes:
    """Return a record line that follows from another: what anybody can make who knows the store's id."""
    number, head = 0, hashlib.sha256(encoded(b"audit-begin", STORE)).digest()
    if before is not None:
        number, head = number_of(before), bytes.fromhex(before.split()[4].decode())
    sealed = os.urandom(100)
    hash_ = hashlib.sha256(encoded(b"audit-chain", STORE, struct.pack(">Q", number + 1), head, b"audit", sealed))
    return b"R %d audit %b %b\n" % (number + 1, base64.b64encode(sealed), hash_.hexdigest().encode())


def changes(line: bytes, following: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Yield what may be done to a line: the lines that stand in its place, and in that of the next one."""
    yield "removed", [following]
    yield "doubled", [line, line, following]
    if following:
        yield "swapped", [following, line]
    yield "not ended", [line[:-1], following]
    yield "cut", [line[: len(line) // 2] + b"\n", following]
    for junk in (b"junk\n", b"\n", b"C\n", b"R \n", b"# no line\n", b"\0" * 50 + b"\n", b" " + line):
        yield "junk before", [junk, line, following]
        yield "junk behind", [line, junk, following]
    yield "other end", [line[:-1] + b"\r\n", following]
    chance = random.Random(line)
    fields = [i for i, byte in enumerate(line[:-1]) if byte in b" "]
    edges = {0, 1, 2, *fields, *(i - 1 for i in fields), *(i + 1 for i in fields), len(line) - 2, len(line) - 1}
    for at in sorted(edges | {chance.randrange(len(line)) for _ in range(10)}):
        for other in (line[at] ^ 1, line[at] ^ 0x10, line[at] ^ 0x20, line[at] ^ 0x80):
            yield f"byte {at} changed", [line[:at] + bytes([other]) + line[at + 1 :], following]


def test_any_changed_removed_inserted_or_reordered_line_is_found_and_named(folder: Path) -> None:
    whole = check(folder)
    every = lines(folder)
    tried = 0
    last = b""
    for position, (file, at, line) in enumerate(every):
        content = file.read_bytes()
        in_file = content.splitlines(True)
        following = in_file[at + 1] if at + 1 < len(in_file) else b""
        covered = any(other.startswith(b"C ") for _, _, other in every[position + 1 :])
        last = line if line.startswith(b"R ") else last
        forgery = ("forged", [line, forged(folder, last), following])
        for what, replaced in (*changes(line, following), forgery):
            changed = b"".join([*in_file[:at], *replaced, *in_file[at + 2 :]])
            if changed == content:
                continue
            tried += 1
            file.write_bytes(changed)
            found = check(folder)
            number = number_of(line)
            at_end = position == len(every) - 1
            if line.startswith(b"C ") and what == "removed":
                # Less is signed then, where no later checkpoint covers it; nothing is hidden.
                assert (found.fault, found.head) == ("", whole.head)
                assert found.unsigned == (0 if covered else BATCHES[-1])
                continue
            if at_end and what == "forged":
                # Nobody signed it, and it does not open.
                assert (found.fault, found.unsigned) == ("", 1)
                with pytest.raises(AuditError, match="record 31 does not open"):
                    contents(folder)
                continue
            assert found.fault, (what, line)
            # A forgery follows; it is the record after it that does not.
            near = {number, number + 1, *([number + 2] if what == "forged" else [])}
            assert found.record in near, (what, line, found)
            assert found.head.number in {number - 1, *near}, (what, line, found)
            # What is cut from a file's end shows at the next one's beginning.
            assert file.name in found.fault or what in {"removed", "swapped", "forged"}, (what, found.fault)
            assert re.search(r"\brecords?\b.* \d", found.fault)
            if line.startswith(b"R ") and (what == "removed" or "changed" in what):
                assert found.record == number, (what, line, found)
                assert found.head.number == number - 1
        file.write_bytes(content)
    assert check(folder, whole.head) == whole
    assert tried > 3000


def test_base64_has_one_spelling(folder: Path) -> None:
    spelt = 0
    for file, at, line in lines(folder):
        parts = line.split(b" ")
        text = parts[3].rstrip(b"=") if parts[0] == b"R" else parts[4][:86]
        if parts[0] == b"R" and text == parts[3]:
            continue
        # The last character's lowest bits are no part of the content.
        alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        other = line.replace(text, text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1 :][:1], 1)
        assert base64.b64decode(other.split(b" ")[3 if parts[0] == b"R" else 4].strip()) == base64.b64decode(
            line.split(b" ")[3 if parts[0] == b"R" else 4].strip()
        )
        content = file.read_bytes()
        in_file = content.splitlines(True)
        file.write_bytes(b"".join([*in_file[:at], other, *in_file[at + 1 :]]))
        assert check(folder).record == number_of(line)
        file.write_bytes(content)
        spelt += 1
    assert spelt > 20


def test_a_chain_cut_at_any_line_has_fewer_records_and_is_found_where_its_head_was_seen(folder: Path) -> None:
    whole = check(folder)
    every = lines(folder)
    for position in reversed(range(len(every))):
        file, at, line = every[position]
        file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:at]))
        found = check(folder)
        number = number_of(line) - line.startswith(b"R ")
        assert (found.fault, found.head.number) == ("", number)
        signed = [number_of(other) for _, _, other in every[:position] if other.startswith(b"C ")]
        assert found.unsigned == number - max(signed, default=0)
        seen = check(folder, whole.head)
        if number == 30:
            assert seen.fault == ""
        else:
            assert f"ends with record {number}, but 30 was seen before (hash {whole.head.hash.hex()})" in seen.fault
            assert seen.record == number + 1
        if at == 0:
            file.unlink()


def test_a_file_that_is_gone_renamed_or_swapped_is_found(original: Path, folder: Path) -> None:
    whole = check(folder)
    names = files(folder)
    firsts = [int(file.stem) for file in names]
    for index, file in enumerate(names):
        content = file.read_bytes()
        last = index == len(names) - 1
        file.unlink()
        found = check(folder)
        assert (found.head.number, bool(found.fault)) == (firsts[index] - 1, not last)
        assert last or found.record == firsts[index]
        assert check(folder, whole.head).record == firsts[index]
        with pytest.raises(AuditError) if not last else pytest.raises(StopIteration):
            next(audit.read(folder, STORE, opening, after=firsts[index] - 1))
        for other in ("x", file.name + ".bak", f"{firsts[index] + 1:016}.log", f"{firsts[index]:015}.log"):
            (folder / other).write_bytes(content)
            assert check(folder).fault, other
            with pytest.raises(AuditError):
                contents(folder)
            if last or not other.endswith(".log"):
                with pytest.raises(AuditError):
                    Chain(folder, STORE, PUBLIC)
            (folder / other).unlink()
        swapped = names[index - 1]
        kept = swapped.read_bytes()
        file.write_bytes(kept)
        swapped.write_bytes(content)
        # Before the first file stands the last one.
        assert check(folder).record == (firsts[index - 1] if index else 1)
        swapped.write_bytes(kept)
        file.write_bytes(content)
    assert check(folder) == whole
    assert names[0].read_bytes() == files(original)[0].read_bytes()


def test_a_file_that_is_empty_or_begins_in_the_middle_is_found(folder: Path) -> None:
    whole = check(folder)
    (folder / "0000000000000000.log").touch()
    assert check(folder).fault
    (folder / "0000000000000000.log").unlink()
    (folder / "0000000000000031.log").touch()
    # What a crash leaves between making a file and writing to it.
    assert check(folder) == whole
    chain = Chain(folder, STORE, PUBLIC)
    append(chain, event(31))
    assert check(folder).head == chain.head
    assert (folder / "0000000000000031.log").stat().st_size
    chain.close()
    files(folder)[1].write_bytes(b"")
    assert check(folder).fault


def test_another_history_is_found_where_a_head_was_seen(original: Path, tmp_path: Path) -> None:
    seen = [Head(number_of(line), bytes.fromhex(line.split()[4].decode())) for line in records(original)]
    chain = Chain(tmp_path / "other", STORE, PUBLIC)
    append(chain, *map(event, range(40)))
    assert check(tmp_path / "other").fault == ""
    for head in seen:
        found = check(tmp_path / "other", head)
        assert f"record {head.number} is another than the one that was seen before" in found.fault
        assert found.record == head.number
        assert check(original, head).fault == ""


def test_history_rewritten_without_the_signing_key_is_found_or_counted_as_unsigned(folder: Path) -> None:
    """Whoever may write the files makes a chain that follows, but no checkpoint in it."""
    every = records(folder)
    for file in files(folder):
        file.unlink()
    made = every[:9]
    while len(made) < 30:
        made.append(forged(folder, made[-1]))
    content = b"".join(made)
    (folder / "0000000000000001.log").write_bytes(content)
    found = check(folder)
    assert (found.fault, found.head.number, found.unsigned, found.checkpoint) == ("", 30, 30, None)
    seen = Head(30, bytes.fromhex(every[-1].split()[4].decode()))
    assert check(folder, seen).record == 30
    hash_ = made[-1].split()[4]
    other = Ed25519PrivateKey.generate()
    bound = encoded(b"audit-checkpoint", STORE, struct.pack(">Q", 30), TIME.encode(), bytes.fromhex(hash_.decode()))
    line = b"C 30 %b %b %b\n" % (TIME.encode(), hash_, base64.b64encode(other.sign(bound)))
    (folder / "0000000000000001.log").write_bytes(content + line)
    found = check(folder)
    assert "this store did not sign the checkpoint of record 30" in found.fault
    assert found.record == 30
    with pytest.raises(AuditError, match="did not sign"):
        Chain(folder, STORE, PUBLIC)


def test_another_stores_chain_is_found(original: Path) -> None:
    other = Ed25519PrivateKey.generate()
    found = audit.verify(original, STORE, other.public_key().public_bytes_raw())
    assert "did not sign" in found.fault
    found = audit.verify(original, bytes(16), PUBLIC)
    assert (found.head.number, found.record) == (0, 1)


def test_a_line_that_is_too_long_is_found_and_not_read_into_memory(folder: Path) -> None:
    with files(folder)[-1].open("ab") as file:
        file.write(b"R 31 audit ")
        for _ in range(32):
            file.write(b"A" * (1 << 20))
    for end in (b"", b"\n"):
        with files(folder)[-1].open("ab") as file:
            file.write(end)
        tracemalloc.start()
        found = check(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "longer than any record" in found.fault
        assert found.record == 31
        assert peak < 4 << 20
        with pytest.raises(AuditError, match="longer than any record"):
            Chain(folder, STORE, PUBLIC)


def test_a_long_chain_is_checked_and_read_in_little_memory(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    chain = Chain(folder, STORE, PUBLIC, file_bytes=4 << 20)
    for number in range(24):
        append(
            chain, *(b'{"time":"%d","type":"%b"}' % (n, b"x" * 20_000) for n in range(number * 20, number * 20 + 20))
        )
    chain.close()
    assert sum(file.stat().st_size for file in files(folder)) > 12 << 20
    tracemalloc.start()
    found = check(folder)
    assert sum(1 for _ in audit.read(folder, STORE, opening)) == found.head.number == 480
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_pipe_or_link_in_place_of_a_file_is_not_waited_for_or_followed(folder: Path, tmp_path: Path) -> None:
    last = files(folder)[-1]
    last.rename(tmp_path / "aside")
    os.mkfifo(last)
    with pytest.raises(OSError, match="no regular file"):
        check(folder)
    last.unlink()
    last.symlink_to(tmp_path / "aside")
    with pytest.raises(OSError, match="symbolic link"):
        check(folder)


# --- one writer


def test_a_second_writer_is_refused_until_the_first_lets_go(folder: Path) -> None:
    before = check(folder)
    chain = Chain(folder, STORE, PUBLIC)
    with pytest.raises(AuditError, match="another process"):
        Chain(folder, STORE, PUBLIC)
    script = _script("Chain(folder, STORE, PUBLIC)", folder)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "another process appends to the audit chain" in done.stderr
    assert check(folder) == before
    chain.close()
    chain.close()
    with Path(folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    again = Chain(folder, STORE, PUBLIC)
    # A chain that was closed no longer holds the lock, so that it must not append.
    with pytest.raises(AuditError, match="closed"):
        append(chain, event(31))
    assert append(again, event(31)).number == 31


def test_many_threads_append_one_chain(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "audit", STORE, PUBLIC, file_bytes=5000)
    told: list[int] = []

    def work(name: int) -> None:
        told.extend(append(chain, b'{"time":"","type":"%d-%d"}' % (name, number)).number for number in range(25))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == list(range(1, 201))
    assert (check(tmp_path / "audit").fault, check(tmp_path / "audit").unsigned) == ("", 0)
    expected = {f"{name}-{number}" for name in range(8) for number in range(25)}
    assert {json.loads(content)["type"] for _, content in contents(tmp_path / "audit")} == expected


def _lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more\n")


def _shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.rename(file)


def _rename(file: Path) -> None:
    file.rename(file.with_suffix(".old"))


@pytest.mark.parametrize("change", [_lengthen, _shorten, _replace, _rename, Path.unlink])
@pytest.mark.parametrize("file_bytes", [1000, 1 << 20])
def test_what_somebody_else_did_meanwhile_stops_the_chain(
    folder: Path, change: Callable[[Path], None], file_bytes: int
) -> None:
    chain = Chain(folder, STORE, PUBLIC, file_bytes=file_bytes)
    change(files(folder)[-1])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):
        with pytest.raises(AuditError, match=r"somebody else changed \d{16}\.log"):
            append(chain, event(31))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_reader_does_not_take_an_append_in_the_middle_for_damage(folder: Path) -> None:
    whole = check(folder)
    chain = Chain(folder, STORE, PUBLIC)
    last = files(folder)[-1]
    size = last.stat().st_size
    append(chain, event(31), sign=False)
    line = last.read_bytes()[size:]
    for length in range(len(line)):
        os.truncate(last, size + length)
        assert check(folder) == whole
        assert len(contents(folder)) == 30
        with last.open("ab") as file:
            file.write(line[length:])
    chain.close()
    # With nobody there to write on, the same bytes are damage.
    os.truncate(last, size + 10)
    assert check(folder).record == 31
    with pytest.raises(AuditError, match="not whole"):
        contents(folder)


def test_readers_beside_a_writer_always_see_a_chain_that_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    chain = Chain(folder, STORE, PUBLIC, file_bytes=20_000)
    append(chain, event(0))
    big = b'{"time":"","type":"%b"}' % (b"x" * 9000)

    def write() -> None:
        for _ in range(300):
            append(chain, big, big, event(0))

    writer = threading.Thread(target=write)
    writer.start()
    looked = 0
    while writer.is_alive():
        head = chain.head
        found = check(folder, head)
        assert found.fault == ""
        assert found.head.number >= head.number
        assert sum(1 for _ in audit.read(folder, STORE, opening, after=head.number - 1)) >= 1
        looked += 1
    writer.join()
    assert looked > 1
    assert check(folder).head == chain.head == Head(901, chain.head.hash)


@pytest.mark.parametrize("missed", [1, 2])
def test_a_file_that_a_listing_missed_while_others_were_made_is_read(
    original: Path, monkeypatch: pytest.MonkeyPatch, missed: int
) -> None:
    whole = check(original)
    listed = auditlines._files
    monkeypatch.setattr(auditlines, "_files", lambda folder: listed(folder)[:-3] + listed(folder)[missed - 3 :])
    assert check(original) == whole
    assert len(contents(original)) == 30


# --- broken chains are not continued


def test_opening_and_reading_on_look_at_the_last_files_and_not_at_all(folder: Path) -> None:
    """A chain of years must not keep a vault from starting; the whole is what ``verify`` is for."""
    first = files(folder)[0]
    first.write_bytes(first.read_bytes().replace(b"R ", b"X "))
    assert check(folder).record == 1
    chain = Chain(folder, STORE, PUBLIC)
    append(chain, event(31))
    assert contents(folder, 29) == [(30, event(30)), (31, event(31))]
    assert audit.hash_of(folder, 31) == chain.head.hash


def test_a_chain_whose_last_file_is_broken_is_not_continued_and_not_changed(folder: Path) -> None:
    last = files(folder)[-1]
    content = last.read_bytes()
    every = content.splitlines(True)
    tried = 0
    for at, line in enumerate(every):
        for what, replaced in changes(line, b""):
            changed = b"".join([*every[:at], *replaced, *every[at + 1 :]])
            torn = at == len(every) - 1 and what in {"not ended", f"byte {len(line) - 1} changed"}
            fine = line.startswith(b"C ") and (what == "removed" or at < len(every) - 1)
            cut = at == len(every) - 1 and what == "removed"
            if changed == content or torn or fine or cut:
                continue
            last.write_bytes(changed)
            with pytest.raises(AuditError, match=last.name) as raised:
                Chain(folder, STORE, PUBLIC)
            assert raised.value.record, what
            assert last.read_bytes() == changed
            tried += 1
    last.write_bytes(content)
    Chain(folder, STORE, PUBLIC).close()
    assert tried > 100


@pytest.mark.parametrize("end", [b" ", b"\v", b"J", b"0", b"\x8a", b"\0", b"=", b"\r"])
def test_only_what_a_line_can_begin_with_is_cut(folder: Path, end: bytes) -> None:
    """A line end that is damaged must not cost what stands behind it, or before it, without a word."""
    last = files(folder)[-1]
    content = last.read_bytes()
    for at in [i for i, byte in enumerate(content) if byte == 10]:
        changed = content[:at] + end + content[at + 1 :]
        last.write_bytes(changed)
        if at == len(content) - 1 and end in {b"\0", b"\r"}:
            continue
        with pytest.raises(AuditError):
            Chain(folder, STORE, PUBLIC)
        assert last.read_bytes() == changed
    last.write_bytes(content.replace(b"\n", end))
    with pytest.raises(AuditError):
        Chain(folder, STORE, PUBLIC)


def test_a_file_among_the_chains_that_is_none_stops_it(folder: Path) -> None:
    (folder / "0000000000000001.log.bak").touch()
    with pytest.raises(AuditError, match=r"0000000000000001\.log\.bak is no file of an audit chain"):
        Chain(folder, STORE, PUBLIC)


# --- crashes and full disks


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("zeros", [0, 700])
def test_a_torn_end_is_cut_at_any_byte_and_the_chain_goes_on(folder: Path, sign: bool, zeros: int) -> None:
    kept = check(folder)
    last = files(folder)[-1]
    whole = last.read_bytes()
    chain = Chain(folder, STORE, PUBLIC)
    heads = [kept.head]
    append(chain, event(31), event(32), sign=sign)
    chain.close()
    added = last.read_bytes()[len(whole) :]
    heads += [Head(number_of(r), bytes.fromhex(r.split()[4].decode())) for r in records(folder)[30:]]
    for length in range(len(added)):
        last.write_bytes(whole + added[:length] + bytes(zeros))
        torn = len(added[:length]) - added[:length].rfind(b"\n") - 1 + zeros
        assert (check(folder).fault == "") == (torn == 0)
        chain = Chain(folder, STORE, PUBLIC)
        assert chain.head == heads[sum(line.startswith(b"R ") for line in added[:length].split(b"\n")[:-1])]
        assert chain.cut == torn
        chain.close()
        assert last.read_bytes() == whole + added[: added[:length].rfind(b"\n") + 1]
        assert (check(folder).fault, check(folder).head) == ("", chain.head)
    chain = Chain(folder, STORE, PUBLIC)
    append(chain, event(40))
    assert check(folder).fault == ""


def test_a_torn_first_line_of_a_new_file_is_cut(folder: Path) -> None:
    whole = check(folder)
    (folder / "0000000000000031.log").write_bytes(b"R 31 audit AA")
    chain = Chain(folder, STORE, PUBLIC)
    assert (chain.head, chain.cut) == (whole.head, 13)
    append(chain, event(31))
    assert check(folder).head == chain.head


def _script(code: str, folder: Path) -> str:
    return (
        "import contextlib, os, resource, signal, sys\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "from test_audit import AuditError, Chain, PUBLIC, STORE, append, event\n"
        f"folder = Path({str(folder)!r})\n" + code
    )


_APPENDING = """
chain = Chain(folder, STORE, PUBLIC, file_bytes=5000)
number = chain.head.number
while True:
    number = append(chain, event(number + 1), event(number + 2)).number
    os.write(1, b"%d\\n" % number)
"""


@pytest.mark.parametrize("seed", range(5))
def test_what_was_appended_is_there_after_a_kill(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder = tmp_path / "audit"
    for _ in range(3):
        said = 0
        with subprocess.Popen([sys.executable, "-c", _script(_APPENDING, folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 80)):
                said = int(process.stdout.readline())
            # Anywhere in one of the next appends.
            timer = threading.Timer(chance.random() / 200, process.send_signal, (signal.SIGKILL,))
            timer.start()
            said = max(said, *map(int, process.stdout.read().split(b"\n")[:-1]), 0)
            timer.join()
        chain = Chain(folder, STORE, PUBLIC, file_bytes=5000)
        assert chain.head.number >= said > 0
        chain.close()
        found = check(folder)
        assert (found.fault, found.head) == ("", chain.head)
        assert contents(folder) == [(n, event(n)) for n in range(1, chain.head.number + 1)]


_LIMITED = """
chain = Chain(folder, STORE, PUBLIC, file_bytes=60_000)
big = b'{"time":"","type":"%b"}' % (b"x" * 1000)
# SIGXFSZ is ignored by Python: a write beyond the limit is short, and the next one an error.
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
failed = 0
while failed < 3:
    before = chain.head
    try:
        append(chain, big, big)
    except OSError:
        failed += 1
        assert chain.head == before
append(chain, event(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for _ in range(40):
    append(chain, big)
print(chain.head.number)
"""


def test_a_disk_that_refuses_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    done = subprocess.run(
        [sys.executable, "-c", _script(_LIMITED, folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = check(folder)
    assert (found.fault, found.unsigned, found.head.number) == ("", 0, int(done.stdout))
    assert len(files(folder)) > 1


_NO_NEW_FILE = """
chain = Chain(folder, STORE, PUBLIC, file_bytes=100)
append(chain, event(1))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
for _ in range(2):
    with contextlib.suppress(OSError):
        append(chain, event(2))
        print("appended")
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(append(chain, event(2)).number)
"""


def test_a_new_file_that_cannot_be_made_is_made_the_next_time(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    done = subprocess.run(
        [sys.executable, "-c", _script(_NO_NEW_FILE, folder)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert (check(folder).fault, check(folder).head.number) == ("", 2)


_STUCK = """
import array, fcntl
chain = Chain(folder, STORE, PUBLIC)
append(chain, event(1))
before = chain.head
file = os.open(next(folder.glob("*.log")), os.O_RDONLY)
SET, APPEND_ONLY = 0x40086602, 0x20
fcntl.ioctl(file, SET, array.array("l", [APPEND_ONLY]))
try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(file).st_size + 50, resource.RLIM_INFINITY))
    try:
        append(chain, event(2))
    except OSError as error:
        print(type(error).__name__)
finally:
    fcntl.ioctl(file, SET, array.array("l", [0]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        append(chain, event(2))
    except AuditError as error:
        print(error)
assert chain.head == before
chain.close()
chain = Chain(folder, STORE, PUBLIC)
assert chain.head == before
print(chain.cut, append(chain, event(2)).number)
"""


@pytest.mark.needs_root
def test_a_chain_that_cannot_be_brought_back_refuses_until_it_is_reopened(tmp_path: Path) -> None:
    """A file that only root can make append-only stands for a disk that takes nothing back."""
    folder = tmp_path / "audit"
    done = subprocess.run([sys.executable, "-c", _script(_STUCK, folder)], capture_output=True, text=True, check=False)
    if "Operation not supported" in done.stderr or "Inappropriate ioctl" in done.stderr:
        pytest.skip("NOT TESTED: this file system has no append-only files")
    said = "the audit chain could not be brought back after an error; start the vault again\n"
    assert (done.stdout, done.stderr) == (f"OSError\n{said}{said}50 2\n", "")
    assert check(folder).fault == ""


# --- what is synced, and when: a kill does not show it


class Calls:
    """What the product asks the system for, in order; everything is done, too, but for what is to fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.failing = ""
        for name in ("write", "fsync", "fdatasync", "ftruncate"):
            patch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *arguments: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.made.append(f"{name} {path.name}")
            if self.failing == self.made[-1]:
                self.failing = ""
                raise OSError(5, "Input/output error")
            return real(descriptor, *arguments)

        return call

    def taken(self) -> list[str]:
        made, self.made = self.made, []
        return made


def test_an_append_is_one_write_and_one_sync_and_a_new_file_syncs_its_folder_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "audit"
    calls = Calls(monkeypatch)
    chain = Chain(folder, STORE, PUBLIC, file_bytes=500)
    assert calls.taken() == [f"fsync {tmp_path.name}"]
    one, two = "0000000000000001.log", "0000000000000003.log"
    append(chain, event(1), event(2))
    assert calls.taken() == ["fsync audit", f"write {one}", f"fdatasync {one}"]
    append(chain, event(3), event(4))
    assert calls.taken() == ["fsync audit", f"write {two}", f"fdatasync {two}"]
    chain.close()
    # What was written by somebody who was killed before he synced is taken as the chain's.
    chain = Chain(folder, STORE, PUBLIC, file_bytes=2000)
    assert calls.taken() == [f"fsync {two}", "fsync audit"]
    append(chain, event(5))
    assert calls.taken() == [f"write {two}", f"fdatasync {two}"]


@pytest.mark.parametrize("call", ["fsync audit", "write", "fdatasync"])
@pytest.mark.parametrize("file_bytes", [100, 1 << 20])
def test_after_an_error_the_chain_is_as_before_and_the_next_append_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, file_bytes: int
) -> None:
    calls = Calls(monkeypatch)
    chain = Chain(folder, STORE, PUBLIC, file_bytes=file_bytes)
    before = check(folder)
    calls.taken()
    name = files(folder)[-1].name if file_bytes > 100 else "0000000000000031.log"
    calls.failing = call if " " in call else f"{call} {name}"
    if call == "fsync audit" and file_bytes > 100:
        append(chain, event(31))
        assert calls.failing
        return
    with pytest.raises(OSError, match="Input/output"):
        append(chain, event(31))
    assert calls.taken()[-2:] == [f"ftruncate {name}", f"fdatasync {name}"]
    assert (chain.head, check(folder)) == (before.head, before)
    assert append(chain, event(31)).number == 31
    assert calls.taken() == [*(["fsync audit"] if file_bytes == 100 else []), f"write {name}", f"fdatasync {name}"]
    assert check(folder).head == chain.head


def test_the_place_of_a_record_is_the_context_of_the_page_that_describes_it() -> None:
    assert audit.place(STORE, Head(6, b"h" * 32)) == context("audit", STORE, u64(7), b"h" * 32)
    assert audit.place(STORE, Head(6, b"h" * 32)) == encoded(b"audit", STORE, struct.pack(">Q", 7), b"h" * 32)
