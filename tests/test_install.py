"""``strongroom install``: what it decides, what a scratch root gets, and that systemd runs what it installed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pydicom
import pytest
from conftest import DCMTK
from pydicom.data import get_testdata_file
from test_systemd import PROGRAM, SYSTEMD, Machine, installation, real, restart, started, status

from storescp import install, newstore, unitfiles
from storescp.basesystem import Names
from storescp.config import load
from storescp.errors import StrongroomError
from storescp.install import Facts, MakeStore, Note, Options, Remove, Run, Say, Write
from storescp.unitfiles import DROP_IN, UNITS

ROOT = Path(__file__).parent.parent
CT, MR = (Path(str(get_testdata_file(name))) for name in ("CT_small.dcm", "MR_small.dcm"))
GIVEN = unitfiles.read()
OPTIONS = Options(program=PROGRAM)
TOOLS = frozenset({"systemd-sysusers", "systemd-tmpfiles", "systemd-creds", "systemctl"})
BARE = Facts(is_root=True, systemd=True, tools=TOOLS)


def after(options: Options = OPTIONS, facts: Facts = BARE) -> Facts:
    """Return what there is after an installation."""
    steps = install.plan(options, facts, GIVEN)
    digests = {step.path: install.digest(step.content) for step in steps if isinstance(step, Write)}
    [note] = [step for step in steps if isinstance(step, Note)]
    files = unitfiles.files(GIVEN, options.program, options.config, [])
    return msgspec.structs.replace(
        facts,
        digests=facts.digests | digests,
        recorded=note.files,
        users=frozenset(unitfiles.users(files[unitfiles.SYSUSERS])),
        folders=tuple(unitfiles.folders(files[unitfiles.TMPFILES])),
        listen=options.listen,
        credential=options.unlock == "credential",
        keys=frozenset({options.sealed_key}) if options.unlock == "credential" else frozenset(),
    )


def writes(steps: list[install.Step]) -> dict[str, str]:
    return {step.path: step.content for step in steps if isinstance(step, Write)}


def runs(steps: list[install.Step]) -> list[str]:
    return [" ".join(step.command) for step in steps if isinstance(step, Run)]


# --- what is decided


def test_a_bare_machine_gets_users_folders_store_and_units_in_this_order() -> None:
    steps = install.plan(OPTIONS, BARE, GIVEN)
    order = [
        "systemd-sysusers strongroom.conf",
        "systemd-tmpfiles --create strongroom.conf",
        "systemctl daemon-reload",
        f"systemctl enable {' '.join(install.ENABLED)}",
    ]
    assert runs(steps) == order
    places = [step.path if isinstance(step, Write | Note) else type(step).__name__ for step in steps]
    made = places.index("MakeStore")
    assert places.index("Run") < made < places.index(f"{UNITS}/strongroom-gate.service")
    assert {unitfiles.SYSUSERS, unitfiles.TMPFILES} == set(places[:2])
    assert set(writes(steps)) == {*unitfiles.files(GIVEN, PROGRAM, "/etc/strongroom", []), DROP_IN}
    assert "LoadCredentialEncrypted=strongroom-key:/etc/strongroom/credentials/" in writes(steps)[DROP_IN]


def test_a_second_run_writes_nothing_and_makes_no_store() -> None:
    steps = install.plan(OPTIONS, after(), GIVEN)
    assert writes(steps) == {}
    assert not [step for step in steps if isinstance(step, MakeStore | Remove)]
    assert [command.split()[0] for command in runs(steps)] == ["systemctl", "systemctl"]


def test_a_file_that_somebody_changed_stays_and_the_new_one_is_put_beside_it() -> None:
    place = f"{UNITS}/strongroom-gate.service"
    facts = after()
    changed = msgspec.structs.replace(facts, digests=facts.digests | {place: "0" * 64})
    steps = install.plan(OPTIONS, changed, GIVEN)
    assert set(writes(steps)) == {f"{place}.new"}
    [note] = [step for step in steps if isinstance(step, Note)]
    # What was written last stays known: the file is still a changed one at the next run.
    assert note.files == facts.recorded


def test_a_file_that_nobody_wrote_down_is_somebodys() -> None:
    place = f"{UNITS}/strongroom-vault.service"
    facts = msgspec.structs.replace(BARE, digests={place: "0" * 64})
    steps = install.plan(OPTIONS, facts, GIVEN)
    assert f"{place}.new" in writes(steps)
    assert place not in writes(steps)
    [note] = [step for step in steps if isinstance(step, Note)]
    assert place not in note.files


def test_an_upgrade_replaces_what_the_last_release_wrote_and_removes_what_is_no_more() -> None:
    facts = after()
    place, old = f"{UNITS}/strongroom-gate.service", f"{UNITS}/strongroom-old.service"
    both = {place: "1" * 64, old: "2" * 64}
    facts = msgspec.structs.replace(facts, digests=facts.digests | both, recorded=facts.recorded | both)
    steps = install.plan(OPTIONS, facts, GIVEN)
    assert set(writes(steps)) == {place}
    assert [step for step in steps if isinstance(step, Remove)] == [Remove(old)]


def test_a_release_beside_the_old_one_changes_what_the_units_start_and_nothing_else() -> None:
    new = msgspec.structs.replace(OPTIONS, program="/opt/strongroom-0.2/bin/strongroom")
    steps = install.plan(new, after(), GIVEN)
    assert set(writes(steps)) == {f"{UNITS}/{name}" for name in GIVEN if name.endswith(".service")}
    assert all("ExecStart=/opt/strongroom-0.2/bin/strongroom " in text for text in writes(steps).values())


def test_the_socket_unit_has_the_addresses_of_the_configuration() -> None:
    facts = msgspec.structs.replace(after(), listen=("10.0.0.5:104", "[::1]:2762", "127.0.0.1:11112"))
    written = writes(install.plan(OPTIONS, facts, GIVEN))
    assert set(written) == {f"{UNITS}/{unitfiles.SOCKET}"}
    found = re.findall(r"(?m)^ListenStream=(.*)$", written[f"{UNITS}/{unitfiles.SOCKET}"])
    assert found == ["10.0.0.5:104", "[::1]:2762", "127.0.0.1:11112"]


def test_units_name_the_program_and_the_configuration_of_this_machine() -> None:
    files = unitfiles.files(GIVEN, "/srv/sr-2/bin/strongroom", "/srv/conf", ["127.0.0.1:2762"])
    for name in GIVEN:
        if name.endswith(".service"):
            made = files[f"{UNITS}/{name}"]
            assert "ExecStart=/srv/sr-2/bin/strongroom --config /srv/conf/strongroom.toml " in made
    assert not [place for place, text in files.items() if PROGRAM in text or "/etc/strongroom" in text]
    # All else is what stands in the source tree: its scores and its tests count for what is installed.
    assert unitfiles.files(GIVEN, PROGRAM, "/etc/strongroom", ["127.0.0.1:2762"]) == {
        **{f"{UNITS}/{name}": text for name, text in GIVEN.items() if name in unitfiles.units(list(GIVEN))},
        unitfiles.SYSUSERS: GIVEN["strongroom.sysusers"],
        unitfiles.TMPFILES: GIVEN["strongroom.tmpfiles"],
    }


def test_every_file_for_systemd_is_installed() -> None:
    assert set(GIVEN) == {file.name for file in SYSTEMD.iterdir()}
    assert len(unitfiles.files(GIVEN, PROGRAM, "/etc/strongroom", [])) == len(GIVEN)


@pytest.mark.parametrize(
    ("facts", "options", "why"),
    [
        ({"occupied": (install.STORE,)}, {}, "holds something, and no /etc/strongroom/strongroom.toml names it"),
        ({"keys": frozenset({"/etc/strongroom/store.key"})}, {}, "is there already"),
        ({"is_root": False}, {}, "only root"),
        ({"program": False}, {}, f"there is no program {PROGRAM}"),
        ({"tools": frozenset()}, {}, "systemd-sysusers and systemd-tmpfiles: not installed"),
        ({}, {"program": "/home/ada/.venv/bin/strongroom"}, "which the units hide"),
        ({}, {"program": "/opt/strong room/bin/strongroom"}, "a unit names places of"),
        ({}, {"program": "strongroom"}, "a unit names places of"),
        ({}, {"config": "/etc/%i"}, "a unit names places of"),
        ({}, {"config": "/opt/../root/etc"}, "a unit names places of"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(
    facts: dict[str, object], options: dict[str, object], why: str
) -> None:
    with pytest.raises(StrongroomError, match=why):
        install.plan(msgspec.structs.replace(OPTIONS, **options), msgspec.structs.replace(BARE, **facts), GIVEN)


def test_without_systemd_creds_the_key_is_a_file_of_roots_and_that_is_said_aloud() -> None:
    facts = msgspec.structs.replace(BARE, tools=TOOLS - {"systemd-creds"})
    steps = install.plan(OPTIONS, facts, GIVEN)
    assert "LoadCredential=strongroom-key:/etc/strongroom/store.key" in writes(steps)[DROP_IN]
    assert [s.text for s in steps if isinstance(s, Say) and s.aloud and "not encrypted without systemd-creds" in s.text]


def test_a_store_that_unlocks_in_another_way_gets_no_credential() -> None:
    for options, facts in (
        (msgspec.structs.replace(OPTIONS, unlock="passphrase"), BARE),
        (OPTIONS, msgspec.structs.replace(BARE, listen=("127.0.0.1:2762",))),
        # Whoever named the credential brings it, too: a unit that asks for what is not there does not start.
        (OPTIONS, msgspec.structs.replace(BARE, listen=("127.0.0.1:2762",), credential=True)),
    ):
        assert DROP_IN not in writes(install.plan(options, facts, GIVEN))


def test_without_a_running_systemd_nothing_is_switched_on_and_the_command_is_said() -> None:
    steps = install.plan(OPTIONS, msgspec.structs.replace(BARE, systemd=False), GIVEN)
    assert [command.split()[0] for command in runs(steps)] == ["systemd-sysusers", "systemd-tmpfiles"]
    assert [s for s in steps if isinstance(s, Say) and "systemctl enable strongroom.target" in s.text]


def test_a_removal_stops_the_services_first_and_names_what_stays() -> None:
    facts = after()
    place = f"{UNITS}/strongroom-gate.service"
    facts = msgspec.structs.replace(facts, digests=facts.digests | {place: "0" * 64})
    steps = install.removal(OPTIONS, facts, GIVEN)
    assert isinstance(steps[0], Run)
    assert steps[0].command[:3] == ("systemctl", "disable", "--now")
    removed = {step.path: step.saved for step in steps if isinstance(step, Remove)}
    assert set(removed) == {*facts.digests, OPTIONS.installed}
    assert [path for path, saved in removed.items() if saved] == [place]
    data = (install.STORE, install.ANCHORS, install.SPOOL, OPTIONS.toml, OPTIONS.sealed_key, OPTIONS.plain_key)
    assert not [path for path in removed if path.startswith(data)]
    said = " ".join(step.text for step in steps if isinstance(step, Say))
    assert all(place in said for place in (install.STORE, install.ANCHORS, install.SPOOL, OPTIONS.config, "users"))


# --- a scratch root, by the command itself


def command(*arguments: str | Path, user: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "storescp", "install", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        user=user,
        group="nogroup" if user else None,
        extra_groups=[] if user else None,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tree(folder: Path) -> dict[str, tuple[int, int, int, float]]:
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_uid, state.st_gid, state.st_mtime)
    return found


@pytest.mark.needs("systemd-sysusers", "systemd-tmpfiles", "systemd-analyze")
@pytest.mark.needs_root
def test_a_scratch_root_is_installed_mended_and_removed_and_the_data_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    own = ("--root", root, "--program", PROGRAM, "--with-pki")
    said = command(*own, "--dry-run")
    assert said.startswith("nothing is changed")
    assert tree(root).keys() == {"etc"}
    said = command(*own)
    assert "WARNING: not switched on, it is a scratch root" in said
    text = (root / "etc/strongroom/strongroom.toml").read_text()
    config = load(root / "etc/strongroom/strongroom.toml")
    assert (str(config.store_path), str(config.anchors)) == (install.STORE, install.ANCHORS)
    assert config.credential == unitfiles.CREDENTIAL
    names = Names(str(root))
    vault, gate = (names.users[f"strongroom-{name}"] for name in ("vault", "gate"))
    for place in (install.STORE, install.ANCHORS, f"{install.SPOOL}/public"):
        assert {p.lstat().st_uid for p in [root / place[1:], *(root / place[1:]).rglob("*")]} == {vault}
    incoming, private = root / "var/spool/strongroom/incoming", root / "etc/strongroom/tls/server.key"
    assert (incoming.stat().st_uid, incoming.stat().st_mode & 0o7777) == (gate, 0o2770)
    assert (private.stat().st_uid, private.stat().st_mode & 0o7777) == (0, 0o640)
    assert private.stat().st_gid == names.groups["strongroom-gate"]
    assert (root / "etc/strongroom/store.key").stat().st_mode & 0o7777 == 0o600
    assert not (root / install.NEW[1:]).exists()
    assert not list((root / "run").glob("strongroom-install*"))
    check_units(root, tmp_path)
    # A second run changes nothing but its own notes.
    before = tree(root)
    said = command(*own)
    changed = {path for path, state in tree(root).items() if before.get(path) != state}
    assert changed <= {"etc/strongroom", "etc/strongroom/installed.json"}
    assert "write" not in said.replace("write /etc/strongroom/installed.json", "")
    # Mended: a lost unit, a folder with another mode, another address.
    (root / "etc/systemd/system/strongroom.target").unlink()
    incoming.chmod(0o777)
    (root / "etc/strongroom/strongroom.toml").write_text(text.replace("127.0.0.1:2762", "127.0.0.1:104"))
    command(*own)
    assert incoming.stat().st_mode & 0o7777 == 0o2770
    assert (root / "etc/systemd/system/strongroom.target").exists()
    assert "ListenStream=127.0.0.1:104\n" in (root / "etc/systemd/system/strongroom-gate.socket").read_text()
    # Switched on without systemd, and taken away.
    subprocess.run(["systemctl", f"--root={root}", "enable", *install.ENABLED], check=True, capture_output=True)
    data = {path: state for path, state in tree(root).items() if path.startswith(("var/", "etc/strongroom/"))}
    assert "kept: /var/lib/strongroom: the store" in command(*own, "--remove")
    left = tree(root)
    assert {p for p in left if p.startswith("etc/systemd/system/") and "strongroom" in p} == set()
    assert data.keys() - left.keys() == {"etc/strongroom/installed.json"}
    assert "kept" in command(*own, "--remove")


def check_units(root: Path, scratch: Path) -> None:
    """What is installed is understood by systemd, with a program that is there, and as strict as is said."""
    folder = scratch / "units"
    shutil.copytree(root / "etc/systemd/system", folder)
    for unit in folder.rglob("strongroom*"):
        if unit.is_file():
            unit.write_text(unit.read_text().replace(PROGRAM, sys.executable))
    names = [str(path) for path in sorted(folder.glob("strongroom*")) if path.is_file()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in names:
        if name.endswith(".service"):
            strict = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", name]
            done = subprocess.run(strict, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


@pytest.mark.needs_root
def test_an_ordinary_user_makes_a_scratch_root_without_owners_and_is_told() -> None:
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory(prefix="strongroom-install-") as name:
        root = Path(name) / "root"
        root.mkdir()
        root.parent.chmod(0o755)
        os.chown(root, 65534, 65534)
        said = command("--root", root, "--program", PROGRAM, "--with-pki", user="nobody")
        assert "WARNING: skip users and groups" in said
        assert "WARNING: skip the owners of folders" in said
        assert load(root / "etc/strongroom/strongroom.toml").settings.gate.user == "strongroom-gate"
        assert (root / "var/lib/strongroom").stat().st_mode & 0o7777 == 0o700


def test_a_store_whose_key_cannot_be_encrypted_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "systemd-creds"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho no TPM today >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    root = tmp_path / "root"
    (root / "etc/strongroom").mkdir(parents=True)
    options = msgspec.structs.replace(OPTIONS, root=str(root))
    with pytest.raises(StrongroomError, match=r"systemd-creds encrypt.* failed with status 1: no TPM today"):
        newstore.make(options, None, Names(str(root)), seal=True, say=print)
    assert [path for path in root.rglob("*") if not path.is_dir()] == []
    assert not (root / install.NEW[1:]).exists()
    assert "CREDENTIALS_DIRECTORY" not in os.environ


def test_a_wheel_has_the_files_for_systemd(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("keys", "storage", "storescp", "systemd"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "there", "zip")
    look = "from storescp import unitfiles; print(unitfiles.__file__, *unitfiles.read())"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=tmp_path / "there", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "there/storescp/unitfiles.py"), *sorted(GIVEN)]


# --- under systemd itself


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the command installed what runs, with a peer."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    try:
        machine.boot()
        (machine.root / "root/passphrase").write_text("seven odd lamps under the quiet bridge\n")
        (machine.root / "root/passphrase").chmod(0o600)
        for line in installation("install.md", "Install").splitlines():
            said = machine.run(*line.replace("strongroom install", f"{PROGRAM} install --program {PROGRAM}").split())
            assert "WARNING" not in said
        machine.wait(lambda: machine.show("vault", "ActiveState") == "active", "the vault does not start")
        machine.strongroom("peer", "add", "CT1", "--issue", "/root/ct1", "--host", "127.0.0.1")
        machine.run("systemctl", "start", "strongroom-gate")
        yield machine
    finally:
        machine.stop()


# What is the machine's own, which no installation changes: disks, clock, other services.
_OF_THE_MACHINE = {
    *("anchors", "antivirus", "clock", "core-dumps", "desktop", "disk-encryption", "disk-space", "firewall"),
    *("key-file", "services", "swap"),
}


@real
def test_right_after_an_installation_the_doctor_finds_nothing_in_it_to_mend(machine: Machine) -> None:
    machine.wait(lambda: machine.show("gate", "ActiveState") == "active", "the gate does not start")
    found = json.loads(machine.run("sh", "-c", f"{PROGRAM} doctor --json || true"))["findings"]
    mine = [finding for finding in found if finding["practice"] not in _OF_THE_MACHINE]
    assert [finding for finding in mine if finding["grade"] not in {"ok", "advice"}] == []
    assert len(mine) >= 18


@real
def test_what_was_installed_unlocks_by_itself_receives_and_admits(machine: Machine) -> None:
    for unit in install.ENABLED:
        assert machine.run("systemctl", "is-enabled", unit).strip() == "enabled"
    machine.wait(lambda: machine.show("gate", "ActiveState") == "active", "the gate does not start")
    assert not status(machine)["locked"]
    key = machine.root / "etc/strongroom/credentials/strongroom-key.cred"
    assert b"STRONGROOM-KEY-FILE" not in key.read_bytes()
    assert not (machine.root / "etc/strongroom/store.key").exists()
    assert machine.send(CT) == [0]
    machine.wait(lambda: not status(machine)["deposits"]["packs"], "the vault admits nothing")
    assert "listening sockets are systemd's" in machine.logs()


@real
def test_who_connects_while_the_gate_is_down_waits_instead_of_being_refused(machine: Machine) -> None:
    machine.run("systemctl", "stop", "strongroom-gate")
    assert machine.show("gate", "ActiveState") == "inactive"
    # The socket is systemd's: it takes the connection, and has the gate started.
    assert machine.send(CT) == [0]


@real
def test_a_changed_address_gets_into_the_socket_unit_and_port_104_needs_no_capability(machine: Machine) -> None:
    config = machine.root / "etc/strongroom/strongroom.toml"
    before = config.read_text()
    try:
        for text in (before.replace("127.0.0.1:2762", "127.0.0.1:104"), before):
            config.write_text(text)
            for line in installation("install.md", "The gate's socket").splitlines():
                machine.run(*line.replace("strongroom install", f"{PROGRAM} install --program {PROGRAM}").split())
            port = 104 if text != before else 2762
            machine.run("python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
            caps = Path(f"/proc/{machine.main('gate')}/status").read_text()
            assert re.findall(r"(?m)^Cap\w+:\t(\w+)$", caps) == ["0" * 16] * 5
    finally:
        config.write_text(before)
    assert machine.send(CT) == [0]


@real
def test_a_gate_whose_loop_stands_still_is_ended_and_started_again(machine: Machine) -> None:
    for unit, interval in (("gate", "1min"), ("vault", "30min")):
        assert machine.show(unit, "WatchdogUSec") == interval
        machine.wait(lambda unit=unit: machine.show(unit, "WatchdogTimestampMonotonic") != "0", "no loop turns")
    drop_in = machine.root / "etc/systemd/system/strongroom-gate.service.d/watchdog.conf"
    try:
        drop_in.write_text("[Service]\nWatchdogSec=3\n")
        restart(machine, "gate")
        old = 0

        def stands_still() -> bool:
            nonlocal old
            # On a busy machine it may have been ended already.
            with contextlib.suppress(AssertionError, ProcessLookupError):
                old = machine.main("gate")
                os.kill(old, signal.SIGSTOP)
                return True
            return False

        machine.wait(stands_still, "no gate runs")
        machine.wait(lambda: started(machine, "gate", old), "the gate is not started again")
    finally:
        drop_in.unlink()
        restart(machine, "gate")
    assert machine.send(CT) == [0]


@real
def test_the_fetcher_is_a_user_of_its_own_who_writes_the_inbox_alone(machine: Machine) -> None:
    # There is no network: that it says so is all that is wanted.
    machine.run("sh", "-c", "systemctl start strongroom-fetch || true")
    shown = {name: machine.show("fetch", name) for name in ("Result", "ExecMainStatus")}
    assert shown == {"Result": "exit-code", "ExecMainStatus": "1"}
    user = Names(str(machine.root)).users["strongroom-fetch"]
    inbox = machine.root / "var/spool/strongroom/patch/inbox"
    assert {path.stat().st_uid for path in (inbox, *inbox.rglob("*"))} == {user}


@real
def test_the_doctor_finds_what_was_installed_in_order(machine: Machine) -> None:
    found = json.loads(machine.run("sh", "-c", f"{PROGRAM} doctor --json || true"))["findings"]
    grades = {finding["practice"]: finding["grade"] for finding in found}
    # What else it finds takes people, time, or another medium, or is this machine's.
    for practice in ("addresses", "modes", "plaintext", "sandbox", "slots", "tls-profile", "users"):
        assert grades[practice] == "ok", [finding for finding in found if finding["practice"] == practice]


@real
def test_who_is_in_the_admins_group_talks_to_the_vault_and_who_leaves_it_does_not(machine: Machine) -> None:
    machine.run("useradd", "--no-create-home", "--uid", "4711", "ada")
    ask = ("sh", "-c", f"setpriv --reuid=ada --regid=ada --init-groups {PROGRAM} status 2>&1; true")
    assert "Permission denied" in machine.run(*ask)
    machine.run("gpasswd", "--add", "ada", "strongroom-admin")
    assert "unlocked, key version" in machine.run(*ask)
    machine.run("gpasswd", "--delete", "ada", "strongroom-admin")
    assert "Permission denied" in machine.run(*ask)


_POST = """
import http.client, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1] + "/ca.pem")
context.load_cert_chain(sys.argv[1] + "/CT1.pem", sys.argv[1] + "/CT1.key")
connection = http.client.HTTPSConnection("127.0.0.1", 8443, context=context, timeout=60)
kind = 'multipart/related; type="application/dicom"; boundary=b'
connection.request("POST", "/dicomweb/studies", sys.stdin.buffer.read(), {"Content-Type": kind})
print(connection.getresponse().read().decode())
"""


@real
@pytest.mark.needs("findscu")
def test_the_desk_is_a_user_of_its_own_that_finds_what_the_vault_tells_it_and_sees_nothing_else(
    machine: Machine,
) -> None:
    config, peer = machine.root / "etc/strongroom/strongroom.toml", machine.root / "etc/strongroom/peers.d/CT1.toml"
    before = config.read_text(), peer.read_text()
    try:
        head, tail = before[0].split("\n[desk]\n")
        tail = tail.replace("\nlisten = []", '\nlisten = ["127.0.0.1:2763"]', 1)
        tail = tail.replace("\nweb = []", '\nweb = ["127.0.0.1:8443"]', 1)
        config.write_text(head + "\n[desk]\n" + tail)
        may = re.sub(r"(?m)^operations = .*$", 'operations = ["echo", "store", "find"]', before[1])
        peer.write_text(re.sub(r"(?m)^roles = .*$", 'roles = ["sender"]', may))
        restart(machine, "vault")
        restart(machine, "gate")
        assert machine.send(CT) == [0]
        machine.run("systemctl", "start", "strongroom-desk")
        machine.wait(lambda: machine.show("desk", "ActiveState") == "active", "the desk does not start")
        folder = machine.root / "root/ct1"
        shown = subprocess.run(
            [
                *("nsenter", f"--target={machine.pid}", "--net", "findscu", "-S", "-aet", "CT1", "-aec", "STRONGROOM"),
                *("+tls", str(folder / "CT1.key"), str(folder / "CT1.pem"), "+cf", str(folder / "ca.pem")),
                *("127.0.0.1", "2763", "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientID"),
            ],
            capture_output=True,
            text=True,
            check=False,
            env=DCMTK,
        )
        assert "[1CT1]" in shown.stdout + shown.stderr, shown.stderr + machine.logs()
        posted = subprocess.run(
            ["nsenter", f"--target={machine.pid}", "--net", sys.executable, "-c", _POST, str(folder)],
            input=b"--b\r\n\r\n" + MR.read_bytes() + b"\r\n--b--\r\n",
            capture_output=True,
            check=False,
        )
        stored = str(pydicom.dcmread(MR).SOPInstanceUID)
        assert stored in posted.stdout.decode(), posted.stderr.decode() + machine.logs()
        machine.wait(lambda: stored in machine.strongroom("list", "instance"), "what was stored is not listed")
        user = Names(str(machine.root)).users["strongroom-desk"]
        for place in (
            "/var/lib/strongroom",
            "/var/lib/strongroom-anchors",
            "/var/spool/strongroom/incoming",
            "/run/strongroom",
        ):
            denied = machine.run(
                "sh", "-c", f"setpriv --reuid={user} --regid={user} --clear-groups ls {place} 2>&1; true"
            )
            assert "Permission denied" in denied, place
    finally:
        config.write_text(before[0])
        peer.write_text(before[1])
        machine.run("systemctl", "stop", "strongroom-desk")
        restart(machine, "vault")
        restart(machine, "gate")


@real
def test_metrics_and_forwarder_need_their_settings_only(machine: Machine) -> None:
    config = machine.root / "etc/strongroom/strongroom.toml"
    before = config.read_text()
    try:
        text = re.sub(r'(?s)(\[metrics\].*?\nlisten = )""', r'\1"127.0.0.1:9464"', before, count=1)
        text = text.replace('\nforward = ""', '\nforward = "localhost:6514"', 1)
        shutil.copy(machine.root / "etc/strongroom/tls/ca.pem", machine.root / "etc/strongroom/syslog-ca.pem")
        # The section's own, not the gate's or the alerts'.
        head, tail = text.split("\n[audit]\n")
        config.write_text(head + "\n[audit]\n" + tail.replace('\ntrust = ""', '\ntrust = "syslog-ca.pem"', 1))
        restart(machine, "vault")
        restart(machine, "gate")
        machine.run("systemctl", "start", "strongroom-metrics")
        asking = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9464/metrics').read().decode())"
        machine.wait(
            lambda: 'strongroom_up{process="vault"} 1' in machine.run("python3", "-c", asking), "no numbers are served"
        )
        machine.run("systemctl", "start", "strongroom-forwarder")
        key = machine.root / "var/spool/strongroom/audit-forwarder"
        machine.wait(lambda: any(key.iterdir()), "the forwarder makes no key")
        assert {path.stat().st_uid for path in key.rglob("*")} == {
            Names(str(machine.root)).users["strongroom-forwarder"]
        }
    finally:
        config.write_text(before)
        machine.run("systemctl", "stop", "strongroom-metrics", "strongroom-forwarder")
        restart(machine, "vault")
        restart(machine, "gate")


@real
def test_a_second_run_changes_nothing_and_a_removal_leaves_the_data(machine: Machine) -> None:
    held = status(machine)["counts"]["instances"]
    said = machine.run(PROGRAM, "install", "--program", PROGRAM)
    assert "write" not in said.replace("write /etc/strongroom/installed.json", "")
    config = (machine.root / "etc/strongroom/strongroom.toml").read_text()
    packs = sorted((machine.root / "var/lib/strongroom/objects").rglob("*"))
    machine.run(PROGRAM, "install", "--program", PROGRAM, "--remove")
    listed = machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "strongroom*.service")
    assert "running" not in listed
    left = {path.name for path in (machine.root / "etc/systemd/system").rglob("*") if not path.is_dir()}
    # The drop-ins are of this machine's tests: what an admin added is an admin's.
    assert left == {"log.conf"}
    assert (machine.root / "etc/strongroom/strongroom.toml").read_text() == config
    assert sorted((machine.root / "var/lib/strongroom/objects").rglob("*")) == packs != []
    # And back again, with the same store.
    machine.run(PROGRAM, "install", "--program", PROGRAM)
    machine.run("systemctl", "start", "strongroom.target", "strongroom-vault", "strongroom-gate")
    assert status(machine)["counts"]["instances"] == held != 0
