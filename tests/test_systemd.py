"""The files under systemd/: systemd's own tools understand them, they are as strict as is said, and they work."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import START_SECONDS, Server, send
from pydicom.data import get_testdata_file

from storescp.gate.journal import TRACE

HERE = Path(__file__).parent
SYSTEMD = HERE.parent / "systemd"
UNITS = {name: SYSTEMD / f"strongroom-{name}.service" for name in ("gate", "vault")}
PROGRAM = "/opt/strongroom/bin/strongroom"
CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))
ORDINARY = "nobody"


# --- what systemd's tools say


@pytest.mark.needs("systemd-sysusers", "systemd-tmpfiles")
@pytest.mark.needs_root
def test_users_and_folders_are_made_as_the_design_has_them(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for command in (
        ["systemd-sysusers", f"--root={tmp_path}", str(SYSTEMD / "strongroom.sysusers")],
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", str(SYSTEMD / "strongroom.tmpfiles")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        complaints = [line for line in done.stderr.splitlines() if not line.startswith("Creating ")]
        assert (done.returncode, complaints) == (0, [])
    lines = (tmp_path / "etc" / "passwd").read_text().splitlines()
    users = {line.split(":")[0]: int(line.split(":")[2]) for line in lines}
    incoming = os.stat(tmp_path / "var/spool/strongroom/incoming")
    assert (incoming.st_uid, incoming.st_mode & 0o7777) == (users["strongroom-gate"], 0o2770)
    for place in ("var/lib/strongroom", "var/lib/strongroom-anchors"):
        found = os.stat(tmp_path / place)
        assert (found.st_uid, found.st_mode & 0o7777) == (users["strongroom-vault"], 0o700)


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
def test_a_unit_has_no_key_that_systemd_does_not_know(unit: Path, tmp_path: Path) -> None:
    # The program is installed by whoever installs the unit: without it, a path that is not there would be all that is
    # complained of here.
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, sys.executable))
    assert copy.read_text() != unit.read_text()
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    # An unknown key is a warning, and no failure.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
def test_the_exposure_of_a_unit_is_at_most_1_5(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- the processes without systemd, in what can be had of the sandbox


def sockets_of(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process has open."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if name := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry.path)):
                found.add(name[1])
    return found


def ip_sockets_of(pid: int) -> set[str]:
    """Return the inodes of those of a process's sockets that are no Unix sockets."""
    unix = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    return sockets_of(pid) - unix


def memory_of(pid: int) -> dict[str, int]:
    """Return a process's memory in KiB: what is resident and what is locked."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "VmLck:"))}


@pytest.fixture
def vault_apart(server: Server) -> Iterator[Server]:
    """A store whose vault runs in a network name space of its own, without even a loopback interface that is up."""
    server.stop()
    ours = [sys.executable, "-m", "storescp", "--config", str(server.config)]
    gate = server.start_command([*ours, "gate"], "gate")
    server.start_command(["unshare", "--net", *ours, "vault"], "vault")
    yield server
    server.stop()
    gate.terminate()
    assert gate.wait(60) == 0


@pytest.mark.needs_root
def test_the_vault_opens_no_ip_socket_and_the_gate_does(server: Server) -> None:
    assert send(server, [CT]) == [0]
    server.wait_admitted()
    [vault], [gate] = server.pids("vault"), server.pids("gate")
    assert sockets_of(vault)
    assert ip_sockets_of(vault) == set()
    assert len(ip_sockets_of(gate)) == 1


@pytest.mark.needs("unshare")
@pytest.mark.needs_root
def test_the_vault_needs_no_network(vault_apart: Server) -> None:
    [vault] = vault_apart.pids("vault")
    assert os.stat(f"/proc/{vault}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    assert send(vault_apart, [CT, MR]) == [0, 0]
    vault_apart.wait_admitted()
    assert len(vault_apart.list()) == 2
    assert vault_apart.run("verify").status == 0


# What systemd does for a service with a socket unit: it binds and listens, and the process finds it as descriptor 3.
_ACTIVATE = """
import os, pathlib, socket, sys
config, name, *command = sys.argv[1:]
sock = socket.create_server(("127.0.0.1", 0))
file = pathlib.Path(config)
file.write_text(file.read_text().replace('"127.0.0.1:0"', f'"127.0.0.1:{sock.getsockname()[1]}"'))
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "gate"}
os.environ |= {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "storescp", "--config", config, *command])
"""


def told(sock: socket.socket, count: int) -> list[bytes]:
    """Return what systemd would hear next."""
    sock.settimeout(START_SECONDS)
    return [sock.recv(256) for _ in range(count)]


def test_a_gate_serves_on_the_socket_it_is_passed_and_each_process_says_that_its_loop_turns(
    make_server: Callable[..., Server],
) -> None:
    server = make_server()
    server.init()
    server.add_peer("CT1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        # The system chooses an abstract name.
        heard.bind("")
        name = "@" + heard.getsockname()[1:].decode()
        activated = [sys.executable, "-c", _ACTIVATE, str(server.config), name]
        gate = server.start_command([*activated, "gate"], "gate")
        assert any("1 of 1 listening sockets are systemd's" in line for line in server.log)
        assert f'"127.0.0.1:{server.port}"' in server.config.read_text()
        assert send(server, [CT]) == [0]
        assert told(heard, 3) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        # Another socket than the configuration names is not served on: one line says which, and what to do.
        refused = subprocess.run([*activated, "gate"], capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 2
        assert "which neither gate.listen nor gate.plaintext names" in refused.stderr
        assert "'strongroom install' writes the socket unit" in refused.stderr
        gate.terminate()
        assert gate.wait(60) == 0
        heard.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.recv(256)
        environment = [f"NOTIFY_SOCKET={name}", "WATCHDOG_USEC=200000"]
        server.start_command(
            ["env", *environment, sys.executable, "-m", "storescp", "--config", str(server.config), "vault"], "vault"
        )
        assert told(heard, 3) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]


@pytest.mark.needs_root
def test_vault_and_gate_run_in_locked_memory_where_they_may(server: Server) -> None:
    assert send(server, [CT]) == [0]
    for verb in ("vault", "gate-worker"):
        for pid in server.pids(verb):
            memory = memory_of(pid)
            # What is locked counts as it is mapped, which is more than what is resident.
            assert memory["VmLck"] >= memory["VmRSS"] // 2 > 0, verb


@pytest.mark.needs("prlimit", "setpriv")
def test_without_the_right_to_lock_memory_an_ordinary_user_serves_all_the_same() -> None:
    root = os.geteuid() == 0
    user = pwd.getpwnam(ORDINARY) if root else pwd.getpwuid(os.geteuid())
    # pytest's own folders are closed to other users.
    home = Path(tempfile.mkdtemp(prefix="strongroom-ordinary-"))
    os.chown(home, user.pw_uid, user.pw_gid)
    server = Server(home / "s")
    try:
        key = str(server.home / "store.key")
        for command in (
            ["init", "--with-pki", "--key-file", key, "--listen", "127.0.0.1:0"],
            ["peer", "add", "CT1", "--issue", str(server.home / "issued" / "CT1"), "--host", "127.0.0.1"],
        ):
            done = server.run_as(user.pw_name, *command) if root else server.run(*command)
            assert done.status == 0, done.err
        drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"] if root else []
        limited = [*drop, "prlimit", "--memlock=65536:65536", sys.executable, "-m", "storescp"]
        server.start_command([*limited, "--config", str(server.config), "serve"], "serve")
        assert send(server, [CT]) == [0]
        [gate] = server.pids("gate")
        limits = Path(f"/proc/{gate}/limits").read_text()
        assert re.search(r"Max locked memory +65536 +65536 ", limits)
        assert memory_of(gate)["VmLck"] == 0
        assert len(server.list()) == 1
    finally:
        server.stop()
        server.kill_all()
        shutil.rmtree(home)


# --- the units under systemd itself

# A machine in name spaces: this one's files under an overlay that forgets, without its services and disks, and with no
# setting of the kernel to write. $1 is a folder to build it in, $2 the source tree, $3 the Python environment.
_MACHINE = r"""
set -eu
if [ "${4-}" != inside ]; then
    # A control group of its own becomes the root of all that systemd sees.
    mount -t cgroup2 cgroup2 "$1"
    mkdir "$1/strongroom-test-$$" && echo $$ > "$1/strongroom-test-$$/cgroup.procs"
    umount "$1"
    exec unshare --fork --kill-child --pid --mount --propagation=private --uts --ipc --cgroup --net \
        bash -c "$0" "$0" "$1" "$2" "$3" inside
fi
mount -t tmpfs -o mode=0755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs dev
for device in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "dev/${device%:*}" c 1 "${device#*:}"
done
mknod -m 666 dev/tty c 5 0
ln -s pts/ptmx dev/ptmx
mkdir dev/shm && mount -t tmpfs -o mode=1777 tmpfs dev/shm
mkdir -p opt/strongroom/bin opt/strongroom/code opt/strongroom/venv
# An ordinary user must reach them, wherever they are and whatever ProtectHome= hides.
mount --bind "$2" opt/strongroom/code && mount -o remount,bind,ro opt/strongroom/code
mount --bind "$3" opt/strongroom/venv && mount -o remount,bind,ro opt/strongroom/venv
printf '#!/bin/sh\nPYTHONPATH=/opt/strongroom/code exec /opt/strongroom/venv/bin/python -m storescp "$@"\n' \
    > opt/strongroom/bin/strongroom
chmod 0755 opt/strongroom opt/strongroom/bin opt/strongroom/bin/strongroom
for folder in run tmp etc/systemd/system usr/lib/systemd/system usr/lib/systemd/system-generators; do
    mkdir -p "$folder" && mount -t tmpfs -o mode=0755 tmpfs "$folder"
done
chmod 1777 tmp
for target in sysinit basic shutdown umount multi-user network-online machine; do
    printf '[Unit]\nDescription=%s\n' "$target" > "usr/lib/systemd/system/$target.target"
done
for process in gate vault; do
    mkdir "etc/systemd/system/strongroom-$process.service.d"
    # There is no journald.
    printf '[Service]\nStandardError=append:/run/%s.log\n' "$process" \
        > "etc/systemd/system/strongroom-$process.service.d/log.conf"
done
mkdir .old && pivot_root . .old && cd / && umount -l /.old
# As a machine's own: what systemd mounts for a service's credentials is seen by the service.
mount --make-rshared /
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=machine.target \
    --log-target=null --show-status=no
"""
_SEND = """
import sys
from pathlib import Path
import scu
folder, *files = map(Path, sys.argv[1:])
context = scu.tls(folder, "CT1")
print(*scu.send(2762, context, [scu.read(file) for file in files], calling="CT1"))
"""
# What the service's user may write, by the kernel's word.
_WRITABLE = "find / -path /proc -prune -o -type d -writable -print 2>/dev/null"


class Machine:
    """A systemd of its own, in name spaces of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        arguments = (str(folder), str(HERE.parent), sys.prefix)
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "bash", "-c", _MACHINE, _MACHINE, *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = 0
        self.root = folder

    def boot(self) -> None:
        """Wait until systemd takes commands."""
        self.wait(self._has_init, "no systemd starts")
        self.root = Path(f"/proc/{self.pid}/root")
        self.wait((self.root / "run/systemd/private").exists, "systemd does not answer")

    def wait(self, what: Callable[[], bool], saying: str) -> None:
        """Wait for what only /proc or an attempt tells."""
        deadline = time.monotonic() + START_SECONDS
        while not what():
            if self._process.poll() is not None:
                assert self._process.stderr is not None
                raise AssertionError(f"{saying}: {self._process.stderr.read()}")
            assert time.monotonic() < deadline, f"{saying}\n{self.logs()}"
            time.sleep(0.05)

    def run(self, *command: str, pid: int = 0, user: int | None = None) -> str:
        """Run a command where a process of the machine is, or where systemd is; return what it prints."""
        drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user is not None else []
        done = subprocess.run(
            # Not in the service's name space of users, where root has no rights.
            ["nsenter", f"--target={pid or self.pid}", "--mount", "--pid", "--net", "--root", "--wd", *drop, *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"},
        )
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def strongroom(self, *arguments: str) -> str:
        """Run a command of ours there, as root."""
        return self.run(PROGRAM, "--config", "/etc/strongroom/strongroom.toml", *arguments)

    def send(self, *files: Path) -> list[int]:
        """Store files from a peer in the machine's network."""
        command = ["nsenter", f"--target={self.pid}", "--net", sys.executable, "-c", _SEND]
        folder = self.root / "root" / "ct1"
        done = subprocess.run(
            [*command, str(folder), *map(str, files)], cwd=HERE, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr + self.logs()
        return [int(word) for word in done.stdout.split()]

    def show(self, unit: str, name: str) -> str:
        """Return a property of one of our services."""
        return self.run("systemctl", "show", "--value", f"--property={name}", f"strongroom-{unit}").strip()

    def main(self, unit: str) -> int:
        """Return a service's first process, by its number outside of the machine."""
        inside = self.show(unit, "MainPID")
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                ours = os.readlink(status.parent / "ns" / "pid") == space
                if ours and re.search(rf"^NSpid:.*\t{inside}$", status.read_text(), re.MULTILINE):
                    return int(status.parent.name)
        raise AssertionError(f"the {unit} does not run\n{self.logs()}")

    def logs(self) -> str:
        """Return what the services said."""
        logs = [Path(f"/proc/{self.pid}/root/run/{name}.log") for name in UNITS] if self.pid else []
        return "".join(log.read_text() for log in logs if log.exists())

    def stop(self) -> None:
        """End all of it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        group = f"strongroom-test-{self._process.pid}"
        remove = (
            'mount -t cgroup2 cgroup2 "$0" && cd "$0" && [ ! -d "$1" ] || find "$1" -depth -type d -exec rmdir {} +'
        )
        command = ["unshare", "--mount", "--propagation=private", "sh", "-c", remove, str(self._folder), group]
        deadline = time.monotonic() + START_SECONDS
        # The last process of a name space may still be on its way out.
        while (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.05)

    def _has_init(self) -> bool:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    self.pid = int(pid)
        return self.pid != 0


def installation(page: str = "admin.md", title: str = "As systemd services") -> str:
    """Return the commands of the administrator's guide that install the units, for an address that is there."""
    guide = (HERE.parent / "docs" / page).read_text()
    section = guide[guide.index(f"## {title}") :]
    block = re.search(r"(?:^    .*\n)+", section, re.MULTILINE)
    assert block is not None
    return block[0].replace("192.0.2.10", "127.0.0.1")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the units were installed by the guide and run, with a peer."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    try:
        machine.boot()
        machine.run("bash", "-c", f"set -e; cd /opt/strongroom/code\n{installation()}")
        machine.strongroom("peer", "add", "CT1", "--issue", "/root/ct1", "--host", "127.0.0.1")
        restart(machine, "gate")
        yield machine
    finally:
        machine.stop()


def real(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that boots the machine."""
    needs = pytest.mark.needs(
        "mount", "nsenter", "pivot_root", "prlimit", "setpriv", "systemctl", "systemd-sysusers", "unshare"
    )
    return needs(pytest.mark.needs_root(test))


@real
def test_the_guide_installs_two_services_that_receive_admit_and_give_back(machine: Machine) -> None:
    assert [machine.show(unit, "ActiveState") for unit in UNITS] == ["active", "active"]
    assert machine.send(CT, MR) == [0, 0]
    machine.wait(lambda: not status(machine)["deposits"]["packs"], "the vault admits nothing")
    assert status(machine)["counts"]["instances"] == 2
    machine.strongroom("export", "--all", "--to", "/root/out")
    assert len(list((machine.root / "root" / "out").rglob("*.dcm"))) == 2
    machine.strongroom("verify")
    machine.strongroom("lock")
    machine.strongroom("unlock", "--key-file", "/etc/strongroom/store.key")
    machine.run("systemctl", "reload", "strongroom-gate")
    machine.wait(lambda: "peers and certificates read" in machine.logs(), "the gate does not reload")


@real
def test_what_the_gate_tells_a_test_of_a_peer_gets_out_of_the_sandbox(machine: Machine) -> None:
    socket = machine.root / "var/spool/strongroom/public" / TRACE
    with ThreadPoolExecutor(1) as pool:
        test = pool.submit(machine.strongroom, "peer", "test", "CT1")
        machine.wait(socket.exists, "nobody listens")
        assert machine.send(CT) == [0]
        assert "association requested by 'CT1'" in test.result(START_SECONDS)


@real
def test_a_service_writes_the_places_that_its_unit_names_and_what_it_writes_is_never_run(machine: Machine) -> None:
    for unit, file in UNITS.items():
        lines = re.findall(r"(?m)^ReadWritePaths=(.*)$", file.read_text())
        named = {path.removeprefix("-") for line in lines for path in line.split()}
        pid = machine.main(unit)
        user = owner(pid)
        found = set(machine.run("sh", "-c", f"{_WRITABLE} || true", pid=pid, user=user).split())
        # A queue of messages is memory, private, and bounded by the kernel.
        assert {path for path in found if str(Path(path).parent) not in found} - {"/dev/mqueue"} == named
        for path in named:
            attempt = f"cp /usr/bin/true {path}/probe && ! {path}/probe; result=$?; rm {path}/probe; exit $result"
            machine.run("sh", "-c", attempt, pid=pid, user=user)


@real
def test_the_gate_sees_nothing_of_the_archive_but_how_full_its_disk_is(machine: Machine) -> None:
    gate = machine.main("gate")
    assert machine.run(
        "ls", "-A", "/var/lib/strongroom", "/var/lib/strongroom-anchors", "/run/strongroom", pid=gate
    ) == ("/run/strongroom:\n\n/var/lib/strongroom:\n\n/var/lib/strongroom-anchors:\n")
    seen, archive = (os.statvfs(root / "var/lib/strongroom") for root in (Path(f"/proc/{gate}/root"), machine.root))
    assert (seen.f_fsid, seen.f_blocks) == (archive.f_fsid, archive.f_blocks)


@real
def test_the_services_have_no_rights_and_the_vault_no_network(machine: Machine) -> None:
    space = os.readlink(f"/proc/{machine.pid}/ns/net")
    assert os.readlink(f"/proc/{machine.main('gate')}/ns/net") == space
    vault = machine.main("vault")
    assert os.readlink(f"/proc/{vault}/ns/net") != space
    assert ip_sockets_of(vault) == set()
    for unit in UNITS:
        found = Path(f"/proc/{machine.main(unit)}/status").read_text()
        assert re.findall(r"(?m)^Cap\w+:\t(\w+)$", found) == ["0" * 16] * 5
        # A filter of system calls, and no way back.
        assert "NoNewPrivs:\t1\n" in found
        assert "Seccomp:\t2\n" in found


@real
def test_the_limit_of_the_units_lets_the_services_lock_their_memory(machine: Machine) -> None:
    # Without CAP_SYS_RESOURCE, as in some containers, systemd cannot raise the limit, and nothing is locked.
    may = subprocess.run(["prlimit", "--memlock=unlimited", "true"], capture_output=True, check=False).returncode == 0
    for unit in UNITS:
        memory = memory_of(machine.main(unit))
        assert (memory["VmLck"] >= memory["VmRSS"] // 2) == may


@real
def test_the_filter_of_system_calls_lets_the_services_lock_their_memory(machine: Machine) -> None:
    # With the capability no limit counts: this shows the filter also where systemd cannot raise the limit.
    for unit in UNITS:
        drop_in = machine.root / f"etc/systemd/system/strongroom-{unit}.service.d/lock.conf"
        try:
            drop_in.write_text(
                "[Service]\nCapabilityBoundingSet=CAP_IPC_LOCK\nAmbientCapabilities=CAP_IPC_LOCK\nPrivateUsers=no\n"
            )
            restart(machine, unit)
            memory = memory_of(machine.main(unit))
            assert memory["VmLck"] >= memory["VmRSS"] // 2 > 0, unit
        finally:
            drop_in.unlink()
            restart(machine, unit)


@real
def test_with_the_guides_drop_in_the_gate_binds_port_104(machine: Machine) -> None:
    guide = (HERE.parent / "docs" / "admin.md").read_text()
    block = re.search(r"(?m)^      \[Service\]\n(?:      .*\n)+", guide)
    assert block is not None
    drop_in = machine.root / "etc/systemd/system/strongroom-gate.service.d/port.conf"
    config = machine.root / "etc/strongroom/strongroom.toml"
    before = config.read_text()
    try:
        drop_in.write_text(block[0].replace("      ", ""))
        config.write_text(before.replace("127.0.0.1:2762", "127.0.0.1:104"))
        restart(machine, "gate")
        machine.run("python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 104), 5)")
    finally:
        drop_in.unlink()
        config.write_text(before)
        restart(machine, "gate")
    assert machine.send(CT) == [0]


@real
def test_the_sender_of_alerts_reads_the_outbox_and_reaches_nothing_of_the_store(machine: Machine) -> None:
    config = machine.root / "etc/strongroom/strongroom.toml"
    before = config.read_text()
    log = machine.root / "etc/systemd/system/strongroom-alerts.service.d/log.conf"
    try:
        # Nobody listens there: that it is tried is all that is wanted.
        config.write_text(before.replace("webhooks = []", 'webhooks = ["https://127.0.0.1:1/"]'))
        log.parent.mkdir()
        log.write_text("[Service]\nStandardError=append:/run/alerts.log\n")
        machine.run("bash", "-c", f"set -e; cd /opt/strongroom/code\n{installation('alerts.md', 'As a service')}")
        pid = machine.main("alerts")
        said = machine.root / "run/alerts.log"
        machine.wait(lambda: "an alert is not delivered" in said.read_text(), "no alert is sent")
        assert "cannot be" not in said.read_text().replace("the server cannot be reached", "")
        user = owner(pid)
        found = machine.run("sh", "-c", f"{_WRITABLE} || true", pid=pid, user=user).split()
        assert {path for path in found if str(Path(path).parent) not in found} - {"/dev/mqueue"} == {
            "/var/spool/strongroom/alerts"
        }
        hidden = "/var/lib/strongroom /var/lib/strongroom-anchors /var/spool/strongroom/incoming /run/strongroom"
        assert (
            machine.run("sh", "-c", f"cat {hidden}/* 2>&1 || true; ls -A {hidden}", pid=pid).count("strongroom.") == 0
        )
        assert re.findall(r"(?m)^Cap\w+:\t(\w+)$", Path(f"/proc/{pid}/status").read_text()) == ["0" * 16] * 5
        machine.run("systemctl", "disable", "--now", "strongroom-alerts")
        assert (machine.show("alerts", "ActiveState"), machine.show("alerts", "Result")) == ("inactive", "success")
    finally:
        config.write_text(before)


@real
def test_a_service_that_was_killed_is_started_again_and_one_that_is_told_ends_well(machine: Machine) -> None:
    for unit in UNITS:
        old = machine.main(unit)
        os.kill(old, signal.SIGKILL)
        machine.wait(lambda unit=unit, old=old: started(machine, unit, old), f"the {unit} is not started again")
    assert machine.send(CT) == [0]
    for unit in UNITS:
        machine.run("systemctl", "stop", f"strongroom-{unit}")
        assert (machine.show(unit, "ActiveState"), machine.show(unit, "Result")) == ("inactive", "success")
        machine.run("systemctl", "start", f"strongroom-{unit}")
    machine.strongroom("verify")


def status(machine: Machine) -> Any:
    return json.loads(machine.strongroom("status", "--json"))


def restart(machine: Machine, unit: str) -> None:
    """Start a service with its changed unit and configuration; it is ready when this returns."""
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", f"strongroom-{unit}")


def started(machine: Machine, unit: str, old: int) -> bool:
    """Tell whether a service is ready in another process than before."""
    # For a moment systemd names a process that is dead already.
    with contextlib.suppress(AssertionError):
        return machine.show(unit, "ActiveState") == "active" and machine.main(unit) != old
    return False


def owner(pid: int) -> int:
    """Return whose process it is; what cannot be traced belongs to root in /proc itself."""
    found = re.search(r"(?m)^Uid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])
