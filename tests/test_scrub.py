"""Scrub: every pack once in a round, whatever comes and goes; damage is told by study and sender, and what heals it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aged import Aged, copy_archive, make_empty
from conftest import Server, refill, send
from pydicom.data import get_testdata_file
from test_reencrypt import reencrypt

from storage.keysdb import KeysDatabase
from storescp import clock
from storescp.errors import StrongroomError
from storescp.vault import scrub
from storescp.vault.reencrypt import Scope
from storescp.vault.scrub import Position, Scrub

A, B = "1.2.3.1", "1.2.3.2"
CT = Path(str(get_testdata_file("CT_small.dcm")))
DAYS = 5


class Reads:
    """Which packs a scrub read, and what time it believes that it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packs: list[str] = []
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        look = scrub._look

        def looked(open_: Any, reader: Any, record: Any) -> Any:
            self.packs.append(record.pack_id)
            return look(open_, reader, record)

        monkeypatch.setattr(scrub, "_look", looked)
        monkeypatch.setattr(clock, "now", lambda: clock.text(self.now))

    def taken(self) -> list[str]:
        """Return what was read since the last time."""
        taken, self.packs = self.packs, []
        return taken


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_empty(tmp_path_factory.mktemp("empty") / "store")


@pytest.fixture
def aged(empty: Path, make_server: Callable[[], Server]) -> Iterator[Aged]:
    aged = Aged(copy_archive(empty, make_server))
    aged.config.settings.scrub.days, aged.config.settings.scrub.rate = DAYS, 0
    yield aged
    aged.close()


def filled(aged: Aged, studies: int, *, first: int = 0) -> set[str]:
    """Deposit studies of different sizes; return their packs."""
    packs = {aged.receive(f"1.2.3.{n}", content=bytes(100 + 3000 * (n % 5))) for n in range(first, first + studies)}
    aged.admit()
    return packs


def run(aged: Aged, *, whole: bool = False) -> list[dict[str, Any]]:
    return list(Scrub(aged.vault).run(1000, whole=whole))


def findings(aged: Aged) -> list[dict[str, Any]]:
    """Read everything, and return what was found."""
    return [event for event in run(aged, whole=True) if event["kind"] == "finding"]


def damaged(aged: Aged) -> list[dict[str, Any]]:
    return list(Scrub(aged.vault).status()["damaged"])


def steps(aged: Aged) -> str:
    return "; ".join(event["text"] for event in run(aged) if event["kind"] == "step")


def flip(path: Path, offset: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# --- slices


GAPS = [(1, 1, 1, 1, 1), (1, 3, 1), (0, 1, 1, 1, 1), (1, 4), (2, 2, 2), (1, 9)]


def test_slices_add_up_to_every_pack_once_whatever_the_gaps(aged: Aged, reads: Reads) -> None:
    packs = filled(aged, 23)
    run(aged, whole=True)
    reads.taken()
    for gaps in GAPS:
        read: list[str] = []
        before = Scrub(aged.vault).status()["last_round"]
        for gap in gaps:
            assert Scrub(aged.vault).status()["last_round"] == before
            reads.now += timedelta(days=gap)
            run(aged)
            slice_ = reads.taken()
            assert slice_, gaps
            read += slice_
            if (status := Scrub(aged.vault).status())["last_round"] != before:
                break
        assert sorted(read) == sorted(packs), gaps
        assert (status["last_round"], status["packs_of_round"]) == (clock.text(reads.now), 0), gaps


def test_equal_packs_are_read_in_as_many_runs_as_there_are_days_and_no_run_is_empty(aged: Aged, reads: Reads) -> None:
    packs = {aged.receive(f"1.2.3.{n}") for n in range(2 * DAYS)}
    aged.admit()
    for _ in range(2):
        read = []
        for _ in range(DAYS):
            reads.now += timedelta(days=1)
            assert "read 2 packs of 10" in steps(aged)
            read += reads.taken()
        assert sorted(read) == sorted(packs)
        assert Scrub(aged.vault).status()["last_round"] == clock.text(reads.now)


def test_packs_that_come_and_go_between_slices_disturb_nothing(aged: Aged, reads: Reads) -> None:
    packs = filled(aged, 20)
    read: list[str] = []
    for round_ in range(DAYS + 1):
        reads.now += timedelta(days=1)
        run(aged)
        read += reads.taken()
        if Scrub(aged.vault).status()["last_round"]:
            break
        if round_ < 2:
            filled(aged, 3, first=100 + 3 * round_)
        else:
            aged.erase(f"1.2.3.{round_}")
    assert len(read) == len(set(read))
    assert packs & aged.records() <= set(read)
    assert damaged(aged) == []


def test_all_of_them_are_read_at_once_where_wanted_also_those_that_come_meanwhile(
    aged: Aged, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = filled(aged, 7)
    monkeypatch.setattr(scrub, "_BATCH", 2)
    going = Scrub(aged.vault).run(1000, whole=True)
    while next(going)["kind"] != "progress":
        pass
    later = filled(aged, 6, first=50)
    events = list(going)
    read = reads.taken()
    last = sorted(read)[1]
    assert set(read) >= packs | {pack for pack in later if pack > last}
    assert len(read) == len(set(read))
    assert "every pack was read" in [event.get("text") for event in events]


def test_no_list_of_all_packs_is_made(aged: Aged, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "_BATCH", 4)
    most = 0
    whole = KeysDatabase.records

    def records(self: KeysDatabase, **options: Any) -> Any:
        nonlocal most
        found = whole(self, **options)
        most = max(most, len(found))
        return found

    def none(*_: Any) -> Any:
        raise AssertionError("a list of all packs")

    packs = filled(aged, 30)
    monkeypatch.setattr(KeysDatabase, "records", records)
    monkeypatch.setattr(KeysDatabase, "packs", none)
    assert findings(aged) == []
    assert (most, set(reads.taken())) == (4, packs)


def test_the_rate_is_bounded(aged: Aged, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(aged, 10)
    waited = 0.0
    aged.config.settings.scrub.rate = 1
    size = sum(path.stat().st_size for path in (aged.config.store_path / "objects").rglob("*") if path.is_file())

    def sleep(seconds: float) -> None:
        nonlocal waited
        waited = max(waited, seconds)

    monkeypatch.setattr(scrub.time, "sleep", sleep)
    monkeypatch.setattr(scrub.time, "monotonic", lambda: 0.0)
    assert findings(aged) == []
    assert waited == pytest.approx(size / 1e6)


def test_a_vault_that_is_locked_meanwhile_reads_no_more_finds_nothing_and_goes_on_where_it_was(
    aged: Aged, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = filled(aged, 9)
    monkeypatch.setattr(scrub, "_BATCH", 3)
    going = Scrub(aged.vault).run(1000, whole=True)
    while next(going)["kind"] != "progress":
        pass
    aged.vault.lock()
    with pytest.raises(StrongroomError, match="locked"):
        list(going)
    read = reads.taken()
    aged.vault.auditor.close()
    aged.vault = aged._vault()
    assert damaged(aged) == []
    assert Scrub(aged.vault).status()["packs_of_round"] == 3
    while not Scrub(aged.vault).status()["last_round"]:
        run(aged)
    assert sorted(read[:3] + reads.taken()) == sorted(packs)


def test_a_clock_that_was_set_back_makes_a_slice_of_a_day(aged: Aged, reads: Reads) -> None:
    filled(aged, 20)
    run(aged)
    reads.taken()
    reads.now -= timedelta(days=300)
    run(aged)
    assert 0 < len(reads.taken()) < 20


# --- damage

WAYS: dict[str, Callable[[Path], None]] = {
    "a data set": lambda path: flip(path, 4096 + 40 + 60),
    "attributes": lambda path: flip(path, path.stat().st_size - 20),
    "a frame": lambda path: flip(path, 4096 + 5),
    "the header": lambda path: flip(path, 33),
    "cut off": lambda path: (path.chmod(0o600), path.write_bytes(path.read_bytes()[:-1]), None)[-1],
    "missing": lambda path: path.unlink(),
    "empty": lambda path: (path.chmod(0o600), path.write_bytes(b""), None)[-1],
}


def test_damage_is_told_by_study_and_sender_and_healed_by_a_good_copy_that_is_sent_again(aged: Aged) -> None:
    aged.receive(B)
    aged.admit()
    for number, (way, harm) in enumerate(WAYS.items()):
        study = f"1.2.4.{number}"
        pack = aged.receive(study)
        aged.admit()
        assert findings(aged) == []
        harm(aged.vault.unlocked().archive.path(pack))
        [found] = findings(aged)
        assert (found["pack"], found["what"]) == (pack, "missing" if way == "missing" else "damaged"), way
        assert found["text"].startswith(f"pack {pack} is ")
        assert study not in found["text"]
        [known] = damaged(aged)
        assert [(o["study"], o["calling"], o["sop"]) for o in known["objects"]] == [(study, "CT1", f"{study}.1")], way
        # Told once, however often it is found.
        findings(aged)
        assert [r["pack"] for r in aged.vault.auditor.read(0) if r["type"] == "damage-found"][number:] == [pack], way
        aged.receive(study)
        aged.admit()
        aged.holds(study, 1)
        assert "good copies came" in steps(aged), way
        assert (damaged(aged), findings(aged)) == ([], []), way
        assert [r["pack"] for r in aged.vault.auditor.read(0) if r["type"] == "damage-healed"][number:] == [pack], way


def test_one_bad_record_among_good_ones_is_told_alone_and_a_part_of_what_is_missing_heals_nothing(
    aged: Aged,
) -> None:
    for n in (1, 2, 3):
        pack = aged.receive(A, n)
    aged.admit()
    path = aged.vault.unlocked().archive.path(pack)
    places = {n: aged.vault.unlocked().index.held(f"{A}.{n}") for n in (1, 2, 3)}
    for n in (1, 3):
        place = places[n]
        assert place is not None
        flip(path, place.frame.dataset_start + 60)
    [found] = findings(aged)
    assert {o["sop"] for o in found["objects"]} == {f"{A}.1", f"{A}.3"}
    aged.receive(A, 3)
    aged.admit()
    assert "good copies" not in steps(aged)
    assert len(damaged(aged)) == 1
    aged.receive(A, 1)
    aged.admit()
    assert "good copies came" in steps(aged)
    for n in (1, 2, 3):
        aged.holds(A, n)


def test_a_pack_that_comes_back_is_healed_and_damaged_again_it_is_told_again(aged: Aged) -> None:
    pack = aged.receive(A)
    aged.admit()
    path = aged.vault.unlocked().archive.path(pack)
    whole = path.read_bytes()
    for _ in range(2):
        flip(path, 4200)
        assert len(findings(aged)) == 1
        path.write_bytes(whole)
        assert f"pack {pack}: it opens again" in steps(aged)
        assert damaged(aged) == []
    assert len([r for r in aged.vault.auditor.read(0) if r["type"] == "damage-found"]) == 2


def test_an_erasure_ends_what_is_known_of_damage_and_names_nothing(aged: Aged) -> None:
    pack = aged.receive(A)
    aged.admit()
    aged.vault.unlocked().archive.path(pack).unlink()
    assert len(findings(aged)) == 1
    aged.erase(A)
    assert "it was erased or discarded" in steps(aged)
    assert damaged(aged) == []
    assert A not in str(aged.vault.unlocked().ledger._db.execute("SELECT content FROM record").fetchall())


def test_an_index_that_is_built_anew_does_not_make_a_missing_pack_good(aged: Aged) -> None:
    pack = aged.receive(A)
    aged.receive(B)
    aged.admit()
    aged.vault.unlocked().archive.path(pack).unlink()
    assert len(findings(aged)) == 1
    refill(aged.vault.unlocked().admission)
    assert "good copies" not in steps(aged)
    [known] = damaged(aged)
    assert [o["sop"] for o in known["objects"]] == [f"{A}.1"]
    aged.receive(A)
    aged.admit()
    assert "good copies came" in steps(aged)


@pytest.mark.parametrize("act", ["erased", "re-encrypted"])
def test_what_is_erased_or_re_encrypted_while_it_is_read_is_no_finding(
    aged: Aged, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged.receive(A)
    aged.receive(B)
    aged.admit()
    check = scrub.check
    done: list[str] = []

    def checked(open_: Any, reader: Any, record: Any) -> Any:
        if not done:
            done.append(act)
            # The pack is gone between its record and its file.
            if act == "erased":
                aged.erase(A)
                aged.erase(B)
            else:
                reencrypt(aged, Scope(everything=True))
        return check(open_, reader, record)

    monkeypatch.setattr(scrub, "check", checked)
    assert findings(aged) == []
    assert damaged(aged) == []


def test_a_position_that_is_kept_survives_a_restart(aged: Aged, reads: Reads) -> None:
    packs = filled(aged, 12)
    run(aged)
    first = reads.taken()
    aged.died()
    kept = aged.vault.unlocked().ledger.records("scrub", Position).get("position")
    assert kept is not None
    assert kept.after == max(first)
    reads.now += timedelta(days=DAYS)
    run(aged)
    assert sorted(first + reads.taken()) == sorted(packs)


def test_the_command_line_reads_tells_who_sent_what_and_knows_when_it_is_healed(server: Server, tmp_path: Path) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert "every pack was read" in server.ok("scrub", "run", "--all").out
    status = server.ok("scrub", "status").out
    assert "all in 30 days" in status
    [pack] = [path for path in (server.store / "objects").rglob("*") if path.is_file()]
    shutil.move(pack, tmp_path / "aside")
    done = server.run("scrub", "run", "--all")
    assert done.status == 6
    for text in ("missing", "CT1", pack.name):
        assert text in done.out
    status = server.run("scrub", "status", "--json")
    assert (status.status, status.json()["damaged"][0]["pack"]) == (6, pack.name)
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    assert "good copies came" in server.ok("scrub", "run").out
    assert server.ok("scrub", "status", "--json").json()["damaged"] == []
    server.ok("lock")
    assert (server.run("scrub", "run").status, server.run("scrub", "status").status) == (4, 4)
