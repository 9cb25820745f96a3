"""The schedule: when something is due in any zone, what was missed, and one job after the other, by a clock of ours."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Server
from hypothesis import given, settings
from hypothesis import strategies as st

from keys import slots
from storescp import clock, schedulesettings
from storescp.cli.jobs import complaints
from storescp.config import Config, load
from storescp.cron import Cron, CronError, opens, window_of, zone_of
from storescp.errors import LOCKED, NOTHING, USAGE, StrongroomError
from storescp.schedulesettings import ScheduleSettings
from storescp.vault import due, schedule
from storescp.vault.due import Due, JobState, Run
from storescp.vault.jobs import Event, Job, jobs_of
from storescp.vault.schedule import Schedule
from storescp.vault.state import Vault

QUICK = settings(deadline=None, derandomize=True, max_examples=60)
BERLIN = zone_of("Europe/Berlin")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def at(text: str) -> datetime:
    """Return a time of UTC: ``2026-03-29 01:00``."""
    return datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=UTC)


def times(cron: Cron, after: datetime, count: int) -> list[str]:
    found = []
    for _ in range(count):
        following = cron.after(after)
        assert following is not None
        found.append(following.strftime("%m-%d %H:%M"))
        after = following
    return found


# --- when something is due


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        # The clock goes from 02:00 to 03:00 on 2026-03-29, at 01:00 UTC.
        ("30 2 * * *", "2026-03-27 12:00", ["03-28 01:30", "03-29 01:30", "03-30 00:30"]),
        ("0 2,3 * * *", "2026-03-28 12:00", ["03-29 01:00", "03-30 00:00", "03-30 01:00"]),
        ("*/30 * * * *", "2026-03-29 00:15", ["03-29 00:30", "03-29 01:00", "03-29 01:30", "03-29 02:00"]),
        ("0 4 * * *", "2026-03-28 12:00", ["03-29 02:00", "03-30 02:00"]),
        # And from 03:00 back to 02:00 on 2026-10-25, at 01:00 UTC.
        ("30 2 * * *", "2026-10-23 12:00", ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
        ("0,30 1-3 * * *", "2026-10-24 23:15", ["10-24 23:30", "10-25 00:00", "10-25 00:30", "10-25 02:00"]),
        ("*/30 * * * *", "2026-10-25 00:15", ["10-25 00:30", "10-25 01:00", "10-25 01:30", "10-25 02:00"]),
        ("0 4 * * *", "2026-10-24 12:00", ["10-25 03:00", "10-26 03:00"]),
        # A minute before midnight of UTC is another day there.
        ("59 23 31 12 *", "2026-06-01 00:00", ["12-31 22:59", "12-31 22:59"]),
        ("0 0 last * *", "2026-01-15 00:00", ["01-30 23:00", "02-27 23:00"]),
        ("0 0 * jan MON-wed,sun", "2026-01-02 12:00", ["01-03 23:00", "01-04 23:00", "01-05 23:00", "01-06 23:00"]),
    ],
)
def test_times_of_a_zone_come_once_also_where_the_clock_changes(
    expression: str, after: str, expected: list[str]
) -> None:
    assert times(Cron(expression, BERLIN), at(after), len(expected)) == expected


def test_the_29th_of_february_comes_in_leap_years() -> None:
    cron = Cron("0 12 29 2 *", UTC)
    found = [cron.after(at(f"{year}-01-01 00:00")) for year in (2026, 2028, 2029, 2096, 2100)]
    assert [moment.year for moment in found if moment] == [2028, 2028, 2032, 2096, 2104]


values = st.one_of(
    st.just("*"), st.sampled_from(["*/7", "0", "30", "59"]), st.integers(0, 59).map(lambda n: f"{n}-59/3")
)
hours = st.one_of(st.just("*"), st.sampled_from(["*/5", "0", "2", "3", "1-4", "2,3", "23"]))
weekdays = st.sampled_from(["*", "sun", "sat,sun", "mon-fri"])
zones = st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu"])
moments = st.datetimes(datetime(1999, 1, 1), datetime(2040, 1, 1)).map(lambda d: d.replace(tzinfo=UTC))


@given(values, hours, weekdays, zones, moments)
@QUICK
def test_the_next_time_is_always_later_and_a_later_question_never_gets_an_earlier_answer(
    minute: str, hour: str, weekday: str, zone: str, moment: datetime
) -> None:
    cron = Cron(f"{minute} {hour} * * {weekday}", zone_of(zone))
    found = [moment]
    for _ in range(20):
        following = cron.after(found[-1])
        assert following is not None
        assert found[-1] < following < found[-1] + 9 * DAY
        assert following.second == following.microsecond == 0
        found.append(following)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "has not the five fields"),
        ("@daily", "has not the five fields"),
        ("0 0 0 * * *", "has not the five fields"),
        ("60 * * * *", "higher than the maximum"),
        ("* 24 * * *", "higher than the maximum"),
        ("a * * * *", "'a' is no minute"),
        ("*/0 * * * *", "must be higher than 0"),
        ("5-1 * * * *", "must not be higher"),
        ("* * 1st * *", "'1st' is no day"),
        ("* * * 13 *", "higher than the maximum"),
        ("* * * * 0", "'0' is no weekday; weekdays are mon, tue and so on, no numbers"),
        ("* * * * sunday", "is no weekday"),
        ("* * * * sat-mon", "must not be higher"),
        ("0 0 30 2 *", "never comes"),
        ("0\x000 * * *", "has not the five fields"),
    ],
)
def test_an_expression_that_is_none_is_refused_with_the_reason(expression: str, said: str) -> None:
    with pytest.raises(CronError, match=said.replace("*", r"\*")):
        Cron(expression, UTC)


@given(st.text(max_size=30) | st.text("0123456789*/-,monjal \t", max_size=30))
@settings(QUICK, max_examples=200)
def test_any_text_is_an_expression_or_a_window_or_is_refused(text: str) -> None:
    for read in (lambda: Cron(text, UTC), lambda: window_of(text), lambda: zone_of(text)):
        with contextlib.suppress(CronError):
            read()


# --- maintenance windows


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("sat,sun 01:00-06:00", ["2026-11-21 01:00", "2026-11-22 05:59"], ["2026-11-21 06:00", "2026-11-23 01:00"]),
        (
            # Across midnight: the day is the one on which it begins.
            "mon-fri 22:00-05:00",
            ["2026-11-23 22:00", "2026-11-24 04:59", "2026-11-28 04:59", "2026-11-27 23:59"],
            ["2026-11-23 04:59", "2026-11-24 05:00", "2026-11-28 22:00", "2026-11-23 21:59"],
        ),
        ("daily 22:00-24:00", ["2026-11-23 23:59"], ["2026-11-23 00:00", "2026-11-23 21:59"]),
        ("sun 23:00-01:00", ["2026-11-22 23:00", "2026-11-23 00:59"], ["2026-11-22 00:30", "2026-11-23 23:30"]),
        ("fri-mon 00:00-24:00", ["2026-11-27 00:00", "2026-11-23 23:59"], ["2026-11-24 00:00", "2026-11-26 23:59"]),
    ],
)
def test_a_window_holds_its_times_and_no_others(window: str, inside: list[str], outside: list[str]) -> None:
    found = window_of(window)
    assert all(found.holds(at(text)) for text in inside)
    assert not any(found.holds(at(text)) for text in outside)


@pytest.mark.parametrize(
    "text",
    [
        *("", "sat", "01:00-06:00", "sat 1:00-6:00", "sat 01:00-01:00", "sat 24:00-02:00", "sat 01:00-24:01"),
        *("sat 01:60-02:00", "saturday 01:00-02:00", "sat-x 01:00-02:00", "sat, 01:00-02:00", "6 01:00-02:00"),
        "sat 01:00-02:00 UTC",
    ],
)
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CronError, match=r"window|it begins|no weekday"):
        window_of(text)


def test_a_window_opens_at_its_time_of_the_zone_also_when_the_clock_changes() -> None:
    night = [window_of("daily 02:30-05:00")]
    assert opens(night, BERLIN, at("2026-11-23 12:00")) == at("2026-11-24 01:30")
    assert opens(night, BERLIN, at("2026-11-24 01:45")) == at("2026-11-24 01:45")
    # The clock skips its beginning, and shows it twice.
    assert opens(night, BERLIN, at("2026-03-28 23:00")) == at("2026-03-29 01:30")
    assert opens(night, BERLIN, at("2026-10-24 23:00")) == at("2026-10-25 00:30")
    # The clock skips all of it: it opens the week after.
    assert opens([window_of("sun 02:10-02:50")], BERLIN, at("2026-03-28 23:00")) == at("2026-04-05 00:10")
    two = [window_of("sun 01:00-02:00"), window_of("wed 20:00-21:00")]
    assert opens(two, UTC, at("2026-11-23 12:00")) == at("2026-11-25 20:00")
    assert opens([], BERLIN, at("2026-11-23 12:00")) == at("2026-11-23 12:00")


# --- what is due and what was missed

DAILY = Cron("0 2 * * *", UTC)


def test_however_many_times_went_by_a_job_is_due_once_and_the_others_are_counted() -> None:
    base = at("2026-11-01 12:00")
    assert due.due(DAILY, base, at("2026-11-02 01:59")) is None
    assert due.due(DAILY, base, at("2026-11-02 02:00")) == Due(at("2026-11-02 02:00"), 0)
    assert due.due(DAILY, base, at("2026-11-12 01:00")) == Due(at("2026-11-02 02:00"), 9)
    assert due.due(Cron("* * * * *", UTC), base, at("2036-11-01 12:00")) == Due(at("2026-11-01 12:01"), 1000)


def test_a_changed_expression_or_zone_counts_from_when_it_is_seen() -> None:
    now = at("2026-11-10 12:00")
    old = JobState("backup", "0 2 * * *", "UTC", "2026-11-01T00:00:00Z", served="2026-11-05T02:00:00Z")
    assert due.agreed(None, "backup", "0 2 * * *", "UTC", now).base == now
    assert due.agreed(old, "backup", "0 2 * * *", "UTC", now) is old
    for expression, zone in (("0 3 * * *", "UTC"), ("0 2 * * *", "Europe/Berlin"), ("", "UTC")):
        new = due.agreed(old, "backup", expression, zone, now)
        assert (new.expression, new.zone, new.base) == (expression, zone, now)


def test_a_clock_that_was_set_back_a_little_repeats_nothing_and_far_back_stops_nothing() -> None:
    state = JobState("erase", "0 2 * * *", "UTC", "2026-11-01T00:00:00Z", served="2036-01-01T02:00:00Z")
    near, far = at("2036-01-01 01:30"), at("2026-11-10 12:00")
    assert due.agreed(state, "erase", "0 2 * * *", "UTC", near).base == at("2036-01-01 02:00")
    assert due.agreed(state, "erase", "0 2 * * *", "UTC", far).base == far
    assert due.begun(state, Run("r", "erase", "schedule", ""), near).base == at("2036-01-01 02:00")


def test_a_job_is_overdue_after_a_whole_period_in_which_it_could_have_begun() -> None:
    base = at("2026-11-23 00:00")
    assert not due.overdue(DAILY, [], UTC, base, at("2026-11-24 02:00"))
    assert due.overdue(DAILY, [], UTC, base, at("2026-11-24 02:01"))
    # Those that come often get half an hour.
    often = Cron("*/5 * * * *", UTC)
    assert not due.overdue(often, [], UTC, base, at("2026-11-23 00:35"))
    assert due.overdue(often, [], UTC, base, at("2026-11-23 00:36"))
    # From Monday to Saturday it could not begin.
    weekend = [window_of("sat 01:00-06:00")]
    assert not due.overdue(DAILY, weekend, UTC, base, at("2026-11-29 01:00"))
    assert due.overdue(DAILY, weekend, UTC, base, at("2026-11-29 01:01"))


def test_what_the_vault_left_undone_is_due_again_once() -> None:
    state = JobState("backup", "0 2 * * *", "UTC", "2026-11-01T00:00:00Z")
    now = at("2026-11-04 10:00")
    for again in (True, False):
        found = due.due(DAILY, state.base, now)
        assert found is not None
        run = Run("r", "backup", "schedule", clock.text(now), due=clock.text(found.at), missed=found.missed)
        state = due.interrupted(due.begun(state, run, now), run)
        assert state.again is again
        assert due.due(DAILY, state.base, now) == (Due(at("2026-11-01 02:00"), 3) if again else None)
    # What somebody began beside its time is not due for that.
    run = Run("r", "backup", "1000", clock.text(now))
    assert due.due(DAILY, due.interrupted(due.begun(state, run, now), run).base, now) is None


# --- the settings


def test_the_standard_settings_are_right_and_there_is_one_for_each_job(vault: Vault) -> None:
    standard = ScheduleSettings()
    assert schedulesettings.check(standard) == []
    assert set(schedulesettings.job_names()) == set(jobs_of(vault))
    for name in schedulesettings.job_names():
        if expression := getattr(standard, name):
            Cron(expression, UTC)
    fields = [f"schedule.{field.name}" for field in msgspec.structs.fields(ScheduleSettings)]
    assert list(schedulesettings.EXPLAINED) == ["schedule", *fields]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"timezone": "Mars/Olympus"}, ["schedule.timezone: 'Mars/Olympus' is no time zone"]),
        ({"timezone": "../etc/passwd"}, ["schedule.timezone: '../etc/passwd' is no time zone"]),
        ({"timezone": ""}, ["schedule.timezone: '' is no time zone"]),
        (
            {"erase": "daily", "export": "0 0 30 2 *"},
            ["schedule.erase: 'daily'", "schedule.export: '0 0 30 2 *' never"],
        ),
        ({"windows": ["sat", "sat 01:00-02:00", "x"]}, ["schedule.windows: 'sat'", "schedule.windows: 'x'"]),
        ({"backup": "0 1 * * *"}, ["schedule.backup_folder: missing"]),
        ({"backup_folder": "backup"}, ["schedule.backup_folder: must be an absolute path"]),
        ({"backup_keep": -1}, ["schedule.backup_keep: must be from 0 to 10000"]),
        ({"backup": "0 1 * * *", "backup_folder": "/srv/backup", "timezone": "Europe/Berlin"}, []),
    ],
)
def test_every_error_in_the_settings_is_told_with_its_key(changes: dict[str, Any], told: list[str]) -> None:
    found = schedulesettings.check(msgspec.structs.replace(ScheduleSettings(), **changes))
    assert [line[: len(wanted)] for line, wanted in zip(found, told, strict=True)] == told


# --- the schedule, on a real store


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: str) -> None:
        self.now = at(now)

    def __call__(self) -> datetime:
        return self.now

    def seconds(self) -> float:
        return self.now.timestamp()


class Kept:
    """A vault with a schedule of our own jobs, which say when they ran, by a clock of ours."""

    def __init__(self, vault: Vault, home: Path, **expressions: str) -> None:
        self.vault = vault
        self.key = slots.read_key_file(home / "store.key")
        self.clock = Clock("2026-11-02 12:00")
        self.ran: list[str] = []
        self.heavy = {"backup"}
        self.does: Callable[[str], Iterator[Event]] = lambda name: iter([{"kind": "step", "text": f"did {name}"}])
        self.windows: list[str] = []
        self.expressions = expressions
        self.begin()
        self.schedule.tick()

    def begin(self) -> None:
        """Make the schedule as a vault that starts does."""
        found = self.vault.config.settings.schedule
        for name in schedulesettings.job_names():
            setattr(found, name, self.expressions.get(name, ""))
        found.windows = self.windows
        jobs = {name: Job(self._run(name), name, heavy=name in self.heavy) for name in self.expressions}
        self.schedule = Schedule(self.vault, jobs, clock=self.clock, monotonic=self.clock.seconds)

    def _run(self, name: str) -> Callable[[int], Iterator[Event]]:
        def run(_uid: int) -> Iterator[Event]:
            self.ran.append(f"{name} {self.clock.now:%d %H:%M}")
            yield from self.does(name)

        return run

    def tick(self, now: str) -> list[str]:
        """Look at the schedule until nothing more begins at this time; return what ran."""
        self.clock.now = at(now)
        before = len(self.ran)
        while True:
            self.schedule.tick()
            if (thread := self.schedule._thread) is None:
                return self.ran[before:]
            thread.join()
            self.schedule._thread = None

    def unlock(self) -> None:
        self.vault.unlock(self.key)

    def runs(self) -> list[tuple[str, str, int, str, str]]:
        """Return the history, the oldest first: job, due, missed, result, text."""
        found = self.schedule.history()[::-1]
        return [(r.job, r.due[5:16].replace("T", " "), r.missed, r.result, r.text) for r in found]

    def item(self, name: str) -> dict[str, Any]:
        return next(item for item in self.schedule.view()["items"] if item["job"] == name)

    def audit(self) -> list[dict[str, Any]]:
        return [record for record in self.vault.auditor.read(0) if record["type"] == "job-ended"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    Server(home).init()
    return home


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def config(home: Path) -> Config:
    return load(home / "strongroom.toml")


@pytest.fixture
def vault(config: Config, home: Path) -> Iterator[Vault]:
    made = Vault(config)
    made.unlock(slots.read_key_file(home / "store.key"))
    yield made
    made.lock()
    made.auditor.close()


@pytest.fixture
def keep(vault: Vault, home: Path) -> Callable[..., Kept]:
    return lambda **expressions: Kept(vault, home, **expressions)


def test_a_job_begins_at_its_time_and_once(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *", export="")
    assert kept.tick("2026-11-03 01:59") == []
    assert kept.item("erase")["next"] == "2026-11-03T02:00:00Z"
    assert kept.tick("2026-11-03 02:00") == ["erase 03 02:00"]
    assert kept.tick("2026-11-03 02:00") == kept.tick("2026-11-04 01:59") == []
    assert kept.tick("2026-11-04 02:01") == ["erase 04 02:01"]
    assert kept.runs() == [("erase", f"11-0{day} 02:00", 0, "ok", "did erase") for day in (3, 4)]
    assert kept.item("erase")["last"]["result"] == "ok"
    assert kept.item("export")["next"] == ""
    assert [(r["job"], r["result"], r["missed"]) for r in kept.audit()] == [("erase", "ok", 0)] * 2


def test_what_was_missed_while_the_machine_was_off_is_caught_up_once_and_reported(
    keep: Callable[..., Kept], caplog: pytest.LogCaptureFixture
) -> None:
    kept = keep(erase="0 2 * * *", export="0 3 1 * *")
    kept.clock.now = at("2026-11-12 08:00")
    kept.begin()
    assert kept.tick("2026-11-12 08:00") == ["erase 12 08:00"]
    assert kept.runs() == [("erase", "11-03 02:00", 9, "ok", "did erase")]
    assert "job erase was due at 2026-11-03T02:00:00Z; with 9 later times" in caplog.text
    assert [(r["due"], r["missed"]) for r in kept.audit()] == [("2026-11-03T02:00:00Z", 9)]
    assert kept.tick("2026-11-13 02:00") == ["erase 13 02:00"]


def test_while_the_vault_is_locked_nothing_runs_and_then_what_was_missed_once(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *")
    kept.vault.lock()
    assert kept.tick("2026-11-03 02:00") == []
    assert kept.item("erase")["waits_for"] == "'strongroom unlock'"
    assert not kept.item("erase")["overdue"]
    assert kept.tick("2026-11-05 01:59") == []
    assert kept.item("erase")["overdue"]
    with pytest.raises(StrongroomError, match="locked"):
        kept.schedule.history()
    with pytest.raises(StrongroomError, match="locked"):
        next(iter(kept.schedule.run("erase", 0)))
    kept.unlock()
    assert kept.tick("2026-11-05 02:00") == ["erase 05 02:00"]
    assert kept.runs() == [("erase", "11-03 02:00", 2, "ok", "did erase")]
    assert not kept.item("erase")["overdue"]


def test_of_a_vault_that_was_never_unlocked_the_schedule_counts_from_its_start(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *")
    kept.vault.lock()
    kept.begin()
    assert kept.tick("2026-11-04 02:01") == []
    assert (kept.item("erase")["next"], kept.item("erase")["overdue"]) == ("2026-11-03T02:00:00Z", True)


def test_how_a_job_ended_is_kept_with_its_reason_but_never_with_what_a_patient_could_be_in(
    keep: Callable[..., Kept],
) -> None:
    kept = keep(erase="0 * * * *")
    events: list[Event] = [{"kind": "step", "text": "one"}, {"kind": "progress", "done": 1, "total": 2}]
    found: list[Event] = [*events, *({"kind": "finding", "text": f"finding {n}"} for n in range(3))]
    errors = {
        13: StrongroomError("no room\n on the   disk"),
        14: StrongroomError("no folder", status=USAGE),
        15: StrongroomError("nothing", status=NOTHING),
        16: ValueError("DOE^JANE"),
        17: None,
        18: StrongroomError("x" * 999),
    }

    def does(_name: str) -> Iterator[Event]:
        yield from found if kept.clock.now.hour == 17 else events
        if error := errors[kept.clock.now.hour]:
            raise error

    kept.does = does
    for hour in errors:
        kept.tick(f"2026-11-02 {hour}:00")
    assert [(result, text) for _, _, _, result, text in kept.runs()] == [
        ("failed", "no room on the disk"),
        ("refused", "no folder"),
        ("refused", "nothing"),
        ("failed", "an error of the vault's own (ValueError); its log says where"),
        ("findings", "finding 0, and 2 more"),
        ("failed", "x" * 300),
    ]


def test_jobs_go_one_after_the_other_and_admission_goes_on_meanwhile(keep: Callable[..., Kept]) -> None:
    kept = keep(export="0 2 * * *", erase="0 1 * * *")
    began, end = threading.Event(), threading.Event()

    def does(name: str) -> Iterator[Event]:
        began.set()
        assert end.wait(30)
        yield {"kind": "step", "text": name}

    kept.does = does
    kept.clock.now = at("2026-11-03 02:00")
    kept.schedule.tick()
    assert began.wait(30)
    # This thread is the admitting one, and is not held up.
    kept.schedule.tick()
    assert kept.schedule.view()["at_work"] == "erase"
    assert kept.item("erase")["running"]
    assert kept.item("export")["waits_for"] == "job erase"
    with pytest.raises(StrongroomError, match="job erase is at work"):
        next(iter(kept.schedule.run("export", 0)))
    end.set()
    assert kept.tick("2026-11-03 02:01") == ["export 03 02:01"]
    assert kept.ran == ["erase 03 02:00", "export 03 02:01"]


def test_heavy_jobs_begin_in_a_window_and_the_others_at_once(keep: Callable[..., Kept]) -> None:
    kept = keep(backup="0 12 * * *", erase="0 12 * * *")
    kept.windows = ["daily 23:00-01:00"]
    kept.begin()
    assert kept.tick("2026-11-03 12:00") == ["erase 03 12:00"]
    assert kept.item("backup")["waits_for"] == "a maintenance window, at 2026-11-03T23:00:00Z"
    assert kept.tick("2026-11-03 22:59") == []
    assert kept.tick("2026-11-03 23:00") == ["backup 03 23:00"]
    assert kept.tick("2026-11-04 00:59") == []
    # Who asks for it by hand has reasons.
    assert list(kept.schedule.run("backup", 1000))[-1]["result"] == "ok"


def test_who_asks_for_a_job_gets_its_events_and_what_was_due_is_done_with_that(keep: Callable[..., Kept]) -> None:
    kept = keep(backup="0 12 * * *", erase="")
    kept.windows = ["sat 01:00-02:00"]
    kept.begin()
    kept.tick("2026-11-04 13:00")
    events = list(kept.schedule.run("backup", 1000))
    assert [event["kind"] for event in events] == ["step", "ended"]
    assert kept.runs() == [("backup", "11-03 12:00", 1, "ok", "did backup")]
    assert kept.tick("2026-11-07 00:59") == []
    assert kept.tick("2026-11-07 01:00") == ["backup 07 01:00"]
    list(kept.schedule.run("erase", 0))
    assert [run.by for run in kept.schedule.history()] == ["0", "schedule", "1000"]
    assert [record.get("uid") for record in kept.audit()] == [1000, None, 0]
    with pytest.raises(StrongroomError, match="there is no job x"):
        next(iter(kept.schedule.run("x", 0)))
    # Whoever goes away ends it.
    asked = kept.schedule.run("erase", 0)
    next(iter(asked))
    asked.close()  # type: ignore[attr-defined]
    assert kept.runs()[-1][3:] == ("failed", "whoever asked for it went away")
    assert list(kept.schedule.run("erase", 0))


def test_what_the_vault_broke_off_when_it_stopped_is_begun_again(keep: Callable[..., Kept]) -> None:
    kept = keep(backup="0 2 * * *")
    began, stopped = threading.Event(), threading.Event()

    def does(_name: str) -> Iterator[Event]:
        began.set()
        assert stopped.wait(30)
        yield {"kind": "step", "text": "half of it"}
        raise AssertionError("it goes on")

    kept.does = does
    kept.clock.now = at("2026-11-03 02:00")
    kept.schedule.tick()
    assert began.wait(30)
    kept.schedule._stopping.set()
    stopped.set()
    kept.schedule.close()
    kept.schedule.tick()
    assert kept.runs() == []
    kept.does = lambda _name: iter(())
    kept.clock.now = at("2026-11-03 02:30")
    kept.begin()
    assert kept.tick("2026-11-03 02:30") == ["backup 03 02:30"]
    broken = "broken off: the vault was stopped or locked, or ended"
    assert kept.runs() == [("backup", "11-03 02:00", 0, "failed", broken), ("backup", "11-03 02:00", 0, "ok", "")]
    assert kept.tick("2026-11-03 12:00") == []


def test_a_job_that_the_lock_broke_off_is_begun_again_after_the_next_unlock(keep: Callable[..., Kept]) -> None:
    kept = keep(backup="0 2 * * *")

    def does(_name: str) -> Iterator[Event]:
        yield {"kind": "step", "text": "half of it"}
        kept.vault.lock()
        raise StrongroomError("the vault was locked meanwhile", status=LOCKED)

    kept.does = does
    assert kept.tick("2026-11-03 02:00") == ["backup 03 02:00"]
    kept.does = lambda _name: iter(())
    assert kept.tick("2026-11-03 02:10") == []
    kept.unlock()
    assert kept.tick("2026-11-03 02:20") == ["backup 03 02:20"]
    assert [run[3] for run in kept.runs()] == ["failed", "ok"]


def test_a_job_that_ended_while_the_vault_was_locked_is_in_the_history_after_the_next_unlock(
    keep: Callable[..., Kept],
) -> None:
    kept = keep(erase="0 2 * * *")

    def does(_name: str) -> Iterator[Event]:
        kept.vault.lock()
        yield {"kind": "step", "text": "all of it"}

    kept.does = does
    assert kept.tick("2026-11-03 02:00") == ["erase 03 02:00"]
    kept.unlock()
    assert kept.tick("2026-11-03 02:10") == []
    assert kept.runs() == [("erase", "11-03 02:00", 0, "ok", "all of it")]


def test_a_clock_that_was_wrong_for_a_while_makes_one_run_and_stops_nothing(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *")
    assert kept.tick("2036-01-01 12:00") == ["erase 01 12:00"]
    assert kept.runs()[0][2] == due.COUNT_LIMIT
    assert kept.tick("2026-11-03 01:59") == []
    assert kept.tick("2026-11-03 02:00") == ["erase 03 02:00"]
    # Set back by minutes: not twice.
    assert kept.tick("2026-11-03 01:55") == kept.tick("2026-11-03 02:00") == []
    assert kept.tick("2026-11-04 02:00") == ["erase 04 02:00"]


def test_a_new_expression_counts_from_now_and_the_history_stays(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *")
    kept.tick("2026-11-03 02:00")
    kept.expressions = {"erase": "0 1 * * *"}
    kept.clock.now = at("2026-11-08 12:00")
    kept.begin()
    assert kept.tick("2026-11-08 12:00") == []
    assert kept.tick("2026-11-09 01:00") == ["erase 09 01:00"]
    assert len(kept.runs()) == 2


def test_the_history_keeps_the_last_thousand(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *")
    with kept.vault.admitting() as open_:
        assert open_ is not None
        old = [(f"old {n}", Run(f"old {n}", "erase", "schedule", f"{n}"), "") for n in range(schedule._HISTORY + 5)]
        open_.ledger.records("run", Run).put_all(old)
    kept.tick("2026-11-03 02:00")
    found = kept.schedule.history()
    assert (len(found), found[-1].id, found[0].due) == (1000, "old 6", "2026-11-03T02:00:00Z")


def test_a_ledger_that_cannot_be_written_delays_the_schedule_and_ends_nothing(
    keep: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = keep(erase="0 2 * * *")
    open_ = kept.vault.opened
    assert open_ is not None
    connection = open_.ledger._db
    connection.execute("PRAGMA query_only = 1")
    assert kept.tick("2026-11-03 02:00") == []
    connection.execute("PRAGMA query_only = 0")
    assert kept.tick("2026-11-03 02:00") == []
    assert kept.tick("2026-11-03 02:01") == ["erase 03 02:01"]


# --- whether it is alive


def test_a_schedule_is_alive_when_it_is_looked_at_and_nothing_is_overdue(keep: Callable[..., Kept]) -> None:
    kept = keep(erase="0 2 * * *", export="0 3 * * *")
    kept.tick("2026-11-02 13:00")
    assert list(complaints(kept.schedule.view(), 15)) == []
    kept.clock.now = at("2026-11-02 13:16")
    [said] = complaints(kept.schedule.view(), 15)
    assert said.startswith("the schedule stands still: it was looked at last at 2026-11-02T13:00:00Z")
    kept.vault.lock()
    kept.tick("2026-11-05 13:00")
    assert list(complaints(kept.schedule.view(), 15)) == [
        "job erase is overdue: it was due at 2026-11-03T02:00:00Z; it waits for 'strongroom unlock'",
        "job export is overdue: it was due at 2026-11-03T03:00:00Z; it waits for 'strongroom unlock'",
    ]
    # A vault that has just begun does not stand still.
    kept.begin()
    assert list(complaints(kept.schedule.view(), 15)) == []
