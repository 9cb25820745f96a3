"""The doctor finds what is planted: in its facts, and in trees that it reads; what it cannot see is unknown."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.pdu import A_ASSOCIATE_RQ

from storage.retentionrules import Retention, Rule
from storescp import clock
from storescp.alertsettings import AlertSettings
from storescp.config import Gate, Plaintext, Settings, Unlock
from storescp.config import Keys as KeySettings
from storescp.config import Store as StoreSettings
from storescp.desksettings import DeskSettings
from storescp.doctor import asked, blocks, exposure, findings, judge, machine, probe, running
from storescp.doctor.facts import (
    Answers,
    Backup,
    Cores,
    Ended,
    Ending,
    Export,
    Facts,
    Firewall,
    Job,
    Keys,
    Listener,
    Machine,
    Patches,
    PeerFact,
    Place,
    Process,
    Recovery,
    RecoveryKey,
    Room,
    Rotation,
    Scrub,
    Slot,
    Status,
    Store,
    Swap,
    Tls,
    Unit,
    Unseen,
    Version,
)
from storescp.doctor.findings import ADVICE, CRITICAL, OK, UNKNOWN, WARNING
from storescp.errors import FINDINGS, LOCKED, StrongroomError
from storescp.forwardsettings import AuditSettings
from storescp.metricssettings import MetricsSettings
from storescp.schedulesettings import ScheduleSettings

NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
DARK = Unseen("nobody may look")
GIB = 1 << 30


def ago(days: float) -> str:
    return clock.text(NOW - timedelta(days=days))


def place(name: str, disk: str, encrypted: Any = True, mount: str = "") -> Place:
    return Place(
        name=name,
        path=f"/srv/{name}",
        mount=mount or f"/srv/{disk}",
        filesystem="ext4",
        encrypted=encrypted,
        disks=(disk,),
    )


def backup(days: float, **changes: Any) -> Backup:
    return (
        Backup(created=ago(days), bytes=round(GIB * (100 - days)), confirmed=ago(1), drilled=ago(50))
        if not changes
        else (msgspec.structs.replace(backup(days), **changes))
    )


def settings(**tables: Any) -> Settings:
    good = {
        "gate": Gate(user="strongroom-gate", listen=["10.0.0.5:2762"]),
        "unlock": Unlock(key_file="/media/key/store.key"),
        "retention": Retention(second_approver=True, rules=[Rule(name="all", keep="P10Y")]),
        "audit": AuditSettings(forward="syslog.example:6514"),
        "alerts": AlertSettings(webhooks=["https://alerts.example/hook"]),
        "schedule": ScheduleSettings(backup="0 2 * * *", backup_folder="/srv/backups"),
    }
    store = StoreSettings(path="store", anchors="anchors", spool="spool", signing_key="ed25519:")
    return Settings(store=store, **(good | tables))


TLS = Tls(
    minimum="TLSv1_2",
    suites=("TLS_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    client_certificates=True,
    key="EC",
    bits=256,
    signature="sha256",
)
PLACES = (
    place("store", "sda"),
    place("incoming", "sda"),
    place("anchors", "sdb"),
    place("key file", "sdc", mount="/media/key"),
)
BACKUPS_ELSEWHERE = place("backups", "nfs", Unseen("nfs is on no disk of this machine that can be seen"))
MACHINE = Machine(
    swaps=(Swap(name="/dev/zram0", encrypted=None), Swap(name="/dev/dm-1", encrypted=True)),
    cores=Cores(pattern="|/bin/false", kdump=False),
    processes=(Process(pid=10, verb="vault", core=False, locked=True),),
    listeners=(
        Listener(address="10.0.0.5", port=2762, program="python", ours=True),
        Listener(address="0.0.0.0", port=22, program="sshd"),
        Listener(address="127.0.0.1", port=25, program="something"),
    ),
    programs=frozenset({"systemd", "sshd", "python3", "clamd"}),
    firewall=Firewall(filters=True, source="nft list ruleset"),
    units=(Unit(name="strongroom-gate.service", exposure=1.1), Unit(name="strongroom-vault.service", exposure=1.0)),
    synchronised=True,
)
STORE = Store(
    settings=settings(),
    places=(*PLACES, BACKUPS_ELSEWHERE),
    modes=(),
    tls=TLS,
    endings=(Ending(name="the server's certificate", ends=NOW + timedelta(days=300)),),
    peers=(PeerFact(ae_title="CT1", pinned=True, plaintext=False, addresses=1),),
    peer_faults=(),
    patches=Patches(fetched=NOW - timedelta(days=1)),
)
ANSWERS = Answers(
    status=Status(
        locked=False,
        receiving=True,
        slots=[Slot(type="passphrase", created=ago(90)), Slot(type="token", created=ago(2000))],
        disk=[
            Room(name="store", free=500 * GIB, total=1000 * GIB),
            Room(name="incoming", free=50 * GIB, total=90 * GIB),
        ],
    ),
    keys=Keys(
        versions=[
            Version(version=1, state="destroyed", created=ago(120)),
            Version(version=2, state="current", created=ago(30)),
        ],
        rotations=[Rotation(version=2, old=1, proved=ago(30), destroyed=ago(20))],
    ),
    recovery=Recovery(keys=[RecoveryKey(id="a")], exports=[Export(created=ago(20), versions=[2], confirmed=ago(19))]),
    backups=[backup(50), backup(1)],
    jobs=[Job(job="backup", expression="0 2 * * *", last=Ended(result="ok"))],
    scrub=Scrub(packs=9, days=30, damaged=0, last_run=ago(1), last_round=ago(20), round_began=ago(20)),
)
GOOD = Facts(now=NOW, machine=MACHINE, store=STORE, answers=ANSWERS)


def on_machine(**changes: Any) -> Facts:
    return msgspec.structs.replace(GOOD, machine=msgspec.structs.replace(MACHINE, **changes))


def in_store(**changes: Any) -> Facts:
    return msgspec.structs.replace(GOOD, store=msgspec.structs.replace(STORE, **changes))


def set_to(**tables: Any) -> Facts:
    return in_store(settings=settings(**tables))


def answered(**changes: Any) -> Facts:
    return msgspec.structs.replace(GOOD, answers=msgspec.structs.replace(ANSWERS, **changes))


def status(**changes: Any) -> Facts:
    return answered(status=msgspec.structs.replace(ANSWERS.status, **changes))


def programs(*names: str) -> Facts:
    return on_machine(programs=frozenset({"systemd", *names}))


def placed(**changes: Place | None) -> Facts:
    known = {one.name: one for one in STORE.places} | {name.replace("_", " "): one for name, one in changes.items()}
    return in_store(places=tuple(one for one in known.values() if one is not None))


def scrubbed(**changes: Any) -> Facts:
    return answered(scrub=msgspec.structs.replace(ANSWERS.scrub, **changes))


def tls(**changes: Any) -> Facts:
    return in_store(tls=msgspec.structs.replace(TLS, **changes))


def swapped(encrypted: Any, *, locked: bool = False) -> Facts:
    process = Process(pid=10, verb="vault", core=False, locked=locked)
    return on_machine(swaps=(Swap(name="/dev/sda3", encrypted=encrypted),), processes=(process,))


def plaintext(*addresses: str) -> Facts:
    listener = Plaintext(listen="10.0.0.5:11112", plaintext="behind the VPN", addresses=list(addresses), peers=["CT3"])
    return set_to(gate=Gate(user="g", listen=["10.0.0.5:2762"], plaintext=[listener]))


def exported(**changes: Any) -> Facts:
    export = msgspec.structs.replace(ANSWERS.recovery.exports[0], **changes)
    return answered(recovery=Recovery(keys=[RecoveryKey(id="a")], exports=[export]))


def peer(**changes: Any) -> Facts:
    return in_store(peers=(msgspec.structs.replace(STORE.peers[0], **changes),))


PLANTED: list[tuple[str, str, str, Facts]] = [
    # practice, grade, what stands in what was found, facts
    ("disk-encryption", WARNING, "ext4 on sda", placed(store=place("store", "sda", encrypted=False))),
    ("disk-encryption", WARNING, "incoming", placed(incoming=place("incoming", "sda", encrypted=False))),
    ("disk-encryption", CRITICAL, "in memory", placed(store=place("store", "", encrypted=None))),
    ("disk-encryption", UNKNOWN, "nobody may look", placed(store=place("store", "sda", encrypted=DARK))),
    ("key-file", CRITICAL, "whoever takes it", placed(key_file=place("key file", "sda", encrypted=False))),
    ("key-file", WARNING, "on the store's disk", placed(key_file=place("key file", "sda"))),
    ("key-file", WARNING, "cannot be seen", placed(key_file=place("key file", "sda", encrypted=DARK))),
    ("key-file", UNKNOWN, "credential", set_to(unlock=Unlock(key_file="credential:strongroom"))),
    ("key-file", UNKNOWN, "cannot be seen", placed(key_file=msgspec.structs.replace(PLACES[3], disks=()))),
    ("anchors", WARNING, "snapshot", placed(anchors=place("anchors", "sda"))),
    ("anchors", ADVICE, "of its own", placed(anchors=place("anchors", "sda", mount="/srv/a"))),
    ("swap", WARNING, "/dev/sda3", swapped(False)),
    ("swap", ADVICE, "is locked", swapped(False, locked=True)),
    ("swap", UNKNOWN, "nobody may look", swapped(DARK)),
    ("core-dumps", WARNING, "kdump", on_machine(cores=Cores(pattern="|/bin/false", kdump=True))),
    (
        "core-dumps",
        WARNING,
        "vault (10)",
        on_machine(processes=(Process(pid=10, verb="vault", core=True, locked=True),)),
    ),
    ("core-dumps", ADVICE, "core.%p", on_machine(cores=Cores(pattern="core.%p", kdump=False))),
    ("addresses", WARNING, "every address", set_to(gate=Gate(user="g", listen=["0.0.0.0:2762"]))),
    ("addresses", WARNING, "every address", set_to(gate=Gate(user="g", listen=["[::]:2762"]))),
    ("addresses", WARNING, "internet", set_to(gate=Gate(user="g", listen=["8.8.8.8:2762"]))),
    ("addresses", WARNING, "numbers", set_to(metrics=MetricsSettings(listen="10.0.0.5:9464"))),
    ("services", WARNING, "postgres", programs("postgres")),
    (
        "services",
        WARNING,
        "10.0.0.5:80 (web)",
        on_machine(listeners=(Listener(address="10.0.0.5", port=80, program="web"),)),
    ),
    ("services", WARNING, ":::111", on_machine(listeners=(Listener(address="::", port=111),), programs=DARK)),
    ("desktop", WARNING, "gnome-shell", programs("gnome-shell")),
    ("desktop", WARNING, "anydesk", programs("anydesk")),
    ("antivirus", ADVICE, "none", programs()),
    ("antivirus", UNKNOWN, "leaves out cannot be seen", programs("clamonacc", "clamd")),
    ("firewall", WARNING, "nothing that comes in", on_machine(firewall=Firewall(filters=False, source="nft"))),
    ("clock", WARNING, "nobody", on_machine(synchronised=False)),
    ("sandbox", WARNING, "not installed", on_machine(units=())),
    ("sandbox", WARNING, "strongroom-vault.service", on_machine(units=MACHINE.units[:1])),
    (
        "sandbox",
        WARNING,
        "4.0",
        on_machine(units=(MACHINE.units[0], Unit(name="strongroom-vault.service", exposure=4.0))),
    ),
    (
        "sandbox",
        CRITICAL,
        "9.2",
        on_machine(units=(MACHINE.units[0], Unit(name="strongroom-vault.service", exposure=9.2))),
    ),
    (
        "sandbox",
        UNKNOWN,
        "nobody may look",
        on_machine(units=(MACHINE.units[0], Unit(name="strongroom-vault.service", exposure=DARK))),
    ),
    ("modes", CRITICAL, "chmod 0600", in_store(modes=("store.key is open to others: chmod 0600 store.key",))),
    ("users", WARNING, "one user", set_to(gate=Gate(listen=["10.0.0.5:2762"]))),
    ("plaintext", WARNING, "behind the VPN", plaintext("10.1.2.3")),
    ("plaintext", CRITICAL, "WITHOUT TLS for more", plaintext("10.0.0.0/8")),
    ("plaintext", ADVICE, "may use one: CT1", peer(plaintext=True)),
    ("tls-profile", CRITICAL, "TLSv1", tls(minimum="TLSv1")),
    ("tls-profile", CRITICAL, "AES128-SHA", tls(suites=("AES128-SHA",))),
    ("tls-profile", CRITICAL, "client certificate", tls(client_certificates=False)),
    ("tls-profile", CRITICAL, "RSA of 1024", tls(key="RSA", bits=1024)),
    ("tls-profile", CRITICAL, "SHA1", tls(signature="sha1")),
    ("peers", WARNING, "to a name: CT1", peer(pinned=False)),
    ("peers", ADVICE, "any address: CT1", peer(addresses=0)),
    ("peers", WARNING, "ae_title", in_store(peer_faults=("peers.d/x.toml: ae_title: missing",))),
    ("expiring", CRITICAL, "2 days ago", in_store(endings=(Ending(name="c", ends=NOW - timedelta(days=2)),))),
    ("expiring", WARNING, "in 29 days", in_store(endings=(Ending(name="c", ends=NOW + timedelta(days=29, hours=1)),))),
    (
        "expiring",
        WARNING,
        "in 6 days",
        in_store(endings=(Ending(name="l", ends=NOW + timedelta(days=6), revocations=True),)),
    ),
    ("expiring", UNKNOWN, "nobody may look", in_store(endings=(Ending(name="c", ends=DARK),))),
    ("retention", ADVICE, "for ever", set_to(retention=Retention())),
    ("retention", WARNING, "no brake", set_to(retention=Retention(rules=[Rule(name="a", keep="P1Y")], most_studies=0))),
    ("retention", ADVICE, "one person", set_to(retention=Retention(rules=[Rule(name="a", keep="P1Y")]))),
    ("patches", WARNING, "nobody ever", in_store(patches=Patches(fetched=None))),
    ("patches", WARNING, "8 days ago", in_store(patches=Patches(fetched=NOW - timedelta(days=8)))),
    ("audit-forwarding", WARNING, "leave this machine", set_to(audit=AuditSettings())),
    (
        "audit-forwarding",
        WARNING,
        "rsyslogd",
        msgspec.structs.replace(programs("rsyslogd"), store=set_to(audit=AuditSettings()).store),
    ),
    ("alerts", WARNING, "nobody", set_to(alerts=AlertSettings())),
    ("slots", WARNING, "1 slot", status(slots=[Slot(type="passphrase", created=ago(1))])),
    ("slots", ADVICE, "800 days", status(slots=[Slot(type="passphrase", created=ago(800)), ANSWERS.status.slots[1]])),
    ("slots", UNKNOWN, "no time", status(slots=[Slot(type="passphrase", created="soon"), ANSWERS.status.slots[1]])),
    (
        "rotation",
        ADVICE,
        "150 days",
        answered(keys=Keys(versions=[Version(version=1, state="current", created=ago(150))], rotations=[])),
    ),
    (
        "rotation",
        WARNING,
        "500 days",
        answered(keys=Keys(versions=[Version(version=1, state="current", created=ago(500))], rotations=[])),
    ),
    (
        "rotation",
        WARNING,
        "still open old backups",
        answered(
            keys=Keys(
                versions=ANSWERS.keys.versions,
                rotations=[Rotation(version=2, old=1, proved=ago(40), waits_for="a backup")],
            )
        ),
    ),
    ("rotation", UNKNOWN, "no key version", answered(keys=Keys(versions=[], rotations=[]))),
    ("recovery-export", CRITICAL, "no recovery key", answered(recovery=Recovery(keys=[], exports=[]))),
    ("recovery-export", CRITICAL, "no export", answered(recovery=Recovery(keys=[RecoveryKey(id="a")], exports=[]))),
    ("recovery-export", CRITICAL, "no export", exported(confirmed="")),
    ("recovery-export", CRITICAL, "no export", exported(retired=ago(1))),
    ("recovery-export", CRITICAL, "no export", exported(versions=[1])),
    ("drill", WARNING, "nobody ever", answered(backups=[backup(1, drilled="")])),
    ("drill", WARNING, "400 days", answered(backups=[backup(1, drilled=ago(400))])),
    ("backup", CRITICAL, "no backup", answered(backups=[])),
    ("backup", WARNING, "9 days old", answered(backups=[backup(9)])),
    ("backup", WARNING, "no backup is confirmed", answered(backups=[backup(1, confirmed="")])),
    ("backup", WARNING, "is 40 days", answered(backups=[backup(40), backup(1, confirmed="")])),
    ("backup", WARNING, "on the store's disk", placed(backups=place("backups", "sda", mount="/srv/b"))),
    ("backup", ADVICE, "by the schedule", set_to(schedule=ScheduleSettings())),
    ("scrub", CRITICAL, "2 packs", scrubbed(damaged=2)),
    ("scrub", WARNING, "never", scrubbed(last_run="", last_round="")),
    ("scrub", WARNING, "10 days ago", scrubbed(last_run=ago(10))),
    ("scrub", WARNING, "70 days", scrubbed(last_round=ago(70))),
    ("schedule", WARNING, "overdue: backup", answered(jobs=[Job(job="backup", expression="* * * * *", overdue=True)])),
    (
        "schedule",
        WARNING,
        "failed",
        answered(jobs=[Job(job="backup", expression="* * * * *", last=Ended(result="failed"))]),
    ),
    ("schedule", ADVICE, "never done", answered(jobs=[Job(job="backup", expression="")])),
    ("disk-space", CRITICAL, "nothing more", status(receiving=False)),
    ("disk-space", WARNING, "9 % free", status(disk=[Room(name="store", free=9, total=100)])),
    ("disk-space", CRITICAL, "19 days", status(disk=[Room(name="store", free=20 * GIB, total=100 * GIB)])),
    ("disk-space", WARNING, "59 days", status(disk=[Room(name="store", free=60 * GIB, total=100 * GIB)])),
    ("disk-space", UNKNOWN, "two backups", answered(backups=[backup(1)])),
]


def of(facts: Facts, practice: str) -> findings.Finding:
    return next(finding for finding in judge.judge(facts) if finding.practice == practice)


def test_nothing_is_found_where_all_is_well() -> None:
    assert [finding for finding in judge.judge(GOOD) if finding.grade != OK] == []


@pytest.mark.parametrize(("practice", "grade", "words", "facts"), PLANTED, ids=[f"{p}-{w}" for p, _, w, _ in PLANTED])
def test_what_is_planted_is_found_with_its_reason_and_a_way_to_mend_it(
    practice: str, grade: str, words: str, facts: Facts
) -> None:
    found = of(facts, practice)
    assert (found.grade, words in found.found) == (grade, True), found
    assert found.why
    assert found.mend or grade == UNKNOWN


def test_every_practice_has_something_planted() -> None:
    names = [practice.name for practice in judge.PRACTICES]
    assert len(set(names)) == len(names)
    assert {practice for practice, *_ in PLANTED} == set(names)


def test_every_practice_stands_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs/doctor.md").read_text()
    assert [practice.name for practice in judge.PRACTICES if f"| `{practice.name}` |" not in text] == []


def test_what_cannot_be_seen_is_unknown_and_never_well() -> None:
    blind = Facts(
        now=NOW,
        machine=Machine(**dict.fromkeys(Machine.__struct_fields__, DARK)),
        store=Store(
            settings=settings(),
            peer_faults=(),
            **dict.fromkeys(set(Store.__struct_fields__) - {"settings", "peer_faults"}, DARK),
        ),
        answers=asked.nobody("nobody may look"),
    )
    # These are told by the configuration alone.
    told = {"addresses", "users", "retention", "alerts", "audit-forwarding"}
    for finding in judge.judge(blind):
        if finding.practice not in told:
            assert (finding.grade, finding.found) == (UNKNOWN, "nobody may look"), finding
    assert findings.status(judge.judge(blind)) == 0


@pytest.mark.parametrize(
    ("facts", "practice"),
    [
        (set_to(unlock=Unlock()), "key-file"),
        (placed(key_file=place("key file", "", None)), "key-file"),
        (set_to(keys=KeySettings(anchor="token")), "anchors"),
        (on_machine(swaps=()), "swap"),
        (in_store(peers=()), "peers"),
        (scrubbed(packs=0, last_run=""), "scrub"),
        (answered(backups=[backup(50), backup(1, bytes=GIB)]), "disk-space"),
    ],
)
def test_what_needs_no_mending_is_left_in_peace(facts: Facts, practice: str) -> None:
    found = of(facts, practice)
    assert (found.grade, found.mend) == (OK, "")


def test_findings_come_worst_first_and_decide_the_exit_status() -> None:
    found = judge.judge(status(receiving=False))
    grades = [findings.GRADES.index(finding.grade) for finding in found]
    assert grades == sorted(grades)
    assert found[0].practice == "disk-space"
    assert findings.status(found) == FINDINGS
    assert sum(findings.counts(found).values()) == len(judge.PRACTICES)


# --- what it looks with: disks


class Tree:
    """A planted /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers: dict[str, str] = {}
        self.lines: list[str] = []

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def device(self, name: str, number: str, *slaves: str, uuid: str = "", on: str = "") -> None:
        """Plant a block device; ``on`` is the disk that a partition is of."""
        at = f"sys/devices/{on + '/' if on else ''}{name}"
        (self.root / at / "slaves").mkdir(parents=True)
        (self.root / "sys/dev/block").mkdir(parents=True, exist_ok=True)
        (self.root / "sys/dev/block" / number).symlink_to(self.root / at)
        if on:
            self.write(f"{at}/partition", "1\n")
        if uuid:
            self.write(f"{at}/dm/uuid", f"{uuid}\n")
        for slave in slaves:
            found = next(
                p for p in (self.root / "sys/devices").rglob(slave) if p.is_dir() and p.parent.name != "slaves"
            )
            (self.root / at / "slaves" / slave).symlink_to(found)
        self.numbers[f"/dev/{name}"] = number

    def mount(self, number: str, point: str, kind: str = "ext4", source: str = "none") -> None:
        self.lines.append(f"30 1 {number} / {point} rw,relatime shared:1 - {kind} {source} rw")
        self.write("proc/self/mountinfo", "\n".join(self.lines) + "\n")

    def encrypted(self, path: str) -> Any:
        found = blocks.place("store", Path(path), self.root, self.numbers.get)
        assert isinstance(found, Place)
        return found.encrypted, found.disks


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.device("sda", "8:0")
    made.device("sda1", "8:1", on="sda")
    made.device("sda2", "8:2", on="sda")
    made.device("sdb", "8:16")
    made.device("dm-0", "253:0", "sda2", uuid="CRYPT-LUKS2-00-luks")
    made.device("dm-1", "253:1", "dm-0", uuid="LVM-x")
    made.device("dm-2", "253:2", "dm-0", "sdb", uuid="LVM-y")
    made.mount("8:1", "/")
    return made


def test_a_disk_without_dm_crypt_is_seen_below_a_partition(tree: Tree) -> None:
    assert tree.encrypted("/srv/store") == (False, ("sda",))


def test_dm_crypt_is_seen_directly_and_below_a_logical_volume(tree: Tree) -> None:
    tree.mount("253:0", "/one")
    tree.mount("253:1", "/two")
    assert tree.encrypted("/one/store") == tree.encrypted("/two") == (True, ("sda",))
    assert tree.encrypted("/twofold") == (False, ("sda",))


def test_a_volume_of_which_one_part_is_not_encrypted_is_not(tree: Tree) -> None:
    tree.mount("253:2", "/srv")
    assert tree.encrypted("/srv/store") == (False, ("sda", "sdb"))


def test_of_several_mounts_at_one_point_the_last_counts_and_names_may_have_spaces(tree: Tree) -> None:
    tree.mount("8:16", "/my\\040srv")
    tree.mount("253:0", "/my\\040srv")
    assert tree.encrypted("/my srv/store") == (True, ("sda",))


def test_every_device_of_a_btrfs_has_to_be_encrypted(tree: Tree) -> None:
    tree.mount("0:40", "/srv", "btrfs", "/dev/dm-0")
    assert tree.encrypted("/srv") == (True, ("sda",))
    folder = tree.root / "sys/fs/btrfs/uuid/devices"
    folder.mkdir(parents=True)
    for name in ("dm-0", "sdb"):
        (folder / name).symlink_to(tree.root / "sys/devices" / name)
    assert tree.encrypted("/srv") == (False, ("sda", "sdb"))


def test_a_loop_device_is_as_its_file_is(tree: Tree) -> None:
    tree.device("loop0", "7:0")
    tree.write("sys/devices/loop0/loop/backing_file", "/images/x\n")
    tree.mount("253:0", "/images")
    tree.mount("7:0", "/srv")
    assert tree.encrypted("/srv") == (True, ("sda",))


@pytest.mark.parametrize(
    ("kind", "words"), [("zfs", "zfs get encryption"), ("overlay", "container"), ("nfs4", "no disk")]
)
def test_a_file_system_that_does_not_tell_is_unseen(tree: Tree, kind: str, words: str) -> None:
    tree.mount("0:50", "/srv", kind, "tank/srv")
    encrypted, disks = tree.encrypted("/srv")
    assert isinstance(encrypted, Unseen)
    assert words in encrypted.reason
    assert disks == ()


def test_memory_is_no_disk_and_a_device_that_is_gone_is_unseen(tree: Tree) -> None:
    tree.mount("0:60", "/mem", "tmpfs")
    tree.mount("9:9", "/gone")
    assert tree.encrypted("/mem/x") == (None, ())
    assert isinstance(tree.encrypted("/gone")[0], Unseen)
    assert isinstance(blocks.place("store", Path("/x"), tree.root / "nowhere"), Unseen)


def test_swap_is_told_by_its_device_by_its_file_and_by_zram(tree: Tree) -> None:
    tree.device("zram0", "252:0")
    tree.device("zram1", "252:1")
    tree.write("sys/devices/zram0/backing_dev", "none\n")
    tree.write("sys/devices/zram1/backing_dev", "/dev/sda2\n")
    rows = ["/dev/dm-0 partition", "/dev/sda2 partition", "/swap\\040file file", "/dev/zram0 partition"]
    rows += ["/dev/zram1 partition", "/dev/gone partition"]
    tree.write("proc/swaps", "Filename Type Size Used Priority\n" + "".join(f"{row} 1 0 -2\n" for row in rows))
    found = blocks.swaps(tree.root, tree.numbers.get)
    assert isinstance(found, tuple)
    said = [swap.encrypted for swap in found]
    assert said[:5] == [True, False, False, None, False]
    assert isinstance(said[5], Unseen)
    assert found[2].name == "/swap file"
    assert isinstance(blocks.swaps(tree.root / "nowhere"), Unseen)


@given(st.text())
def test_any_text_for_mounts_is_read_without_an_error(text: str) -> None:
    blocks.mount_of("/srv", blocks.mounts(text))


# --- what it looks with: processes and sockets


def process(tree: Tree, pid: int, comm: str, *words: str, core: str = "0", locked: str = "0") -> None:
    tree.write(f"proc/{pid}/comm", f"{comm}\n")
    tree.write(f"proc/{pid}/cmdline", "\0".join(words) + "\0")
    tree.write(f"proc/{pid}/limits", f"Limit  Soft\nMax core file size        {core}    unlimited    bytes\n")
    tree.write(f"proc/{pid}/status", f"Name:\t{comm}\nVmLck:\t    {locked} kB\n")
    (tree.root / f"proc/{pid}/fd").mkdir()


def test_processes_of_ours_are_told_from_others_and_from_those_of_another_store(tree: Tree) -> None:
    process(tree, 1, "systemd", "/sbin/init")
    ours = ("/opt/bin/python", "/opt/bin/strongroom", "--config", "/etc/s.toml")
    process(tree, 7, "strongroom", *ours, "vault", locked="4096")
    process(tree, 8, "python", "python", "-m", "storescp", "--config", "/etc/s.toml", "gate-worker", core="unlimited")
    process(tree, 9, "strongroom", "strongroom", "--config", "/other.toml", "vault")
    process(tree, 10, "strongroom", *ours, "status")
    process(tree, 11, "vi", "vi", "strongroom.toml", "vault")
    assert running.own(Path("/etc/s.toml"), tree.root) == (
        Process(pid=7, verb="vault", core=False, locked=True),
        Process(pid=8, verb="gate-worker", core=True, locked=False),
    )
    assert running.programs(tree.root) >= {"systemd", "init", "strongroom", "vi"}


def test_hidden_processes_are_unseen_and_not_none(tree: Tree) -> None:
    assert isinstance(running.own(Path("/etc/s.toml"), tree.root), Unseen)
    assert isinstance(running.programs(tree.root), Unseen)
    assert isinstance(running.cores(tree.root), Unseen)
    assert isinstance(running.listeners((), (), tree.root), Unseen)


def test_listeners_are_read_with_their_programs_and_ours_by_process_or_port(tree: Tree) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   {}: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000  0  0 {} 1 0 100 0 0 10 0\n"
    rows = [("0100007F:0ACA", "0A", 100), ("00000000:0016", "0A", 101), ("0500000A:1F90", "01", 102)]
    tree.write("proc/net/tcp", head + "".join(row.format(i, a, s, n) for i, (a, s, n) in enumerate(rows)))
    six = "00000000000000000000000001000000:0ACB"
    tree.write("proc/net/tcp6", head + row.format(0, six, "0A", 103) + row.format(1, "nonsense", "0A", 104))
    process(tree, 1, "systemd", "/sbin/init")
    process(tree, 7, "python", "strongroom")
    (tree.root / "proc/7/fd/5").symlink_to("socket:[100]")
    (tree.root / "proc/1/fd/5").symlink_to("socket:[101]")
    assert running.listeners({7}, {2763}, tree.root) == (
        Listener(address="0.0.0.0", port=22, program="systemd", ours=False),
        Listener(address="127.0.0.1", port=2762, program="python", ours=True),
        Listener(address="::1", port=2763, program="", ours=True),
    )


def test_where_cores_go_and_whether_kdump_is_loaded_is_read(tree: Tree) -> None:
    tree.write("proc/sys/kernel/core_pattern", "|/usr/lib/systemd/systemd-coredump %P\n")
    tree.write("sys/kernel/kexec_crash_loaded", "1\n")
    assert running.cores(tree.root) == Cores(pattern="|/usr/lib/systemd/systemd-coredump %P", kdump=True)


# --- what it looks with: the system's tools

NFT = """table inet filter {{
	chain input {{
		type filter hook input priority filter; policy {policy};
		{rule}
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
	}}
{more}}}
"""


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("", False),
        (NFT.format(policy="accept", rule="ct state established accept", more=""), False),
        (NFT.format(policy="drop", rule="tcp dport { 22, 2762 } accept", more=""), True),
        (NFT.format(policy="accept", rule="tcp dport 80 reject", more=""), True),
        (NFT.format(policy="accept", rule="jump mine", more="\tchain mine {\n\t\tcounter drop\n\t}\n"), True),
    ],
)
def test_a_rule_set_of_nftables_is_read(text: str, filters: bool) -> None:
    assert machine.filters_nftables(text) is filters


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\nCOMMIT\n", False),
        ("*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n", True),
        ("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 80 -j REJECT\nCOMMIT\n", True),
        (":INPUT ACCEPT [0:0]\n:ufw-in - [0:0]\n-A INPUT -j ufw-in\n-A ufw-in -j DROP\n", True),
        (":INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A FORWARD -j DROP\n", False),
    ],
)
def test_rules_of_iptables_are_read(text: str, filters: bool) -> None:
    assert machine.filters_iptables(text) is filters


def test_a_firewall_is_unseen_only_if_no_tool_tells() -> None:
    said: dict[str, str | Unseen] = {"nft": "", "iptables-save": DARK, "ip6tables-save": DARK}
    assert machine.firewall(lambda command: said[command[0]]) == Firewall(filters=False, source="nft")
    said["iptables-save"] = ":INPUT DROP [0:0]\n"
    assert machine.firewall(lambda command: said[command[0]]) == Firewall(filters=True, source="iptables-save")
    assert isinstance(machine.firewall(lambda _: DARK), Unseen)


def test_the_exposure_of_installed_units_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    assert machine.units(lambda _: DARK, tmp_path) == ()
    (folder / "strongroom-gate.service").write_text("[Service]\n")
    line = "→ Overall exposure level for strongroom-gate.service: 9.2 UNSAFE\n"
    assert machine.units(lambda _: line, tmp_path) == (Unit(name="strongroom-gate.service", exposure=9.2),)
    assert machine.units(lambda _: DARK, tmp_path) == (Unit(name="strongroom-gate.service", exposure=DARK),)
    assert isinstance(machine.exposure("what?"), Unseen)


def test_a_tool_that_is_missing_or_fails_says_nothing() -> None:
    assert isinstance(machine.ask(["no-such-tool-of-anybody"]), Unseen)
    failed = machine.ask(["false"])
    assert isinstance(failed, Unseen)
    assert ("root" in failed.reason) == bool(os.geteuid())
    assert machine.ask(["echo", "x"]) == "x\n"


# --- what the vault answers


class Vault:
    """Answers as a vault does."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def json(self, _method: str, path: str) -> Any:
        answer = self._answers[path.rpartition("/")[2]]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_what_a_locked_or_strange_vault_does_not_tell_is_unseen_and_the_rest_is_known() -> None:
    vault = Vault(
        status={"locked": True, "receiving": True, "slots": [], "disk": {"store": {"free": 1, "total": 2}}, "more": 1},
        keys=StrongroomError("the vault is locked", status=LOCKED),
        recovery=StrongroomError("the connection to the vault broke off"),
        backups={"items": [{"created": 3}]},
        jobs={"items": [{"job": "backup", "expression": "", "last": None, "running": False}]},
        scrub=ValueError("no JSON"),
    )
    found = asked.answers(vault)  # type: ignore[arg-type]
    assert found.status == Status(locked=True, receiving=True, slots=[], disk=[Room(name="store", free=1, total=2)])
    assert found.jobs == [Job(job="backup", expression="")]
    reasons = {"keys": "is locked", "recovery": "broke off", "backups": "another form", "scrub": "another form"}
    for name, words in reasons.items():
        said = getattr(found, name)
        assert isinstance(said, Unseen)
        assert words in said.reason


# --- from outside


def test_the_request_of_the_probe_is_an_association_request_for_verification() -> None:
    decoded = A_ASSOCIATE_RQ()
    decoded.decode(probe.request())
    primitive = decoded.to_primitive()
    assert (primitive.calling_ae_title, primitive.called_ae_title) == (probe.CALLING, probe.CALLED)
    assert [c.abstract_syntax for c in primitive.presentation_context_definition_list] == ["1.2.840.10008.1.1"]


@pytest.mark.parametrize(
    ("content", "kind", "detail"),
    [
        (b"", probe.CLOSED, ""),
        (b"\x02\0\0\0\0\xb8" + bytes(4), probe.ACCEPTED, ""),
        (b"\x03\0\0\0\0\x04\0\x01\x01\x03", probe.REJECTED, "calling AE title"),
        (b"\x03\0\0\0\0\x04\0\x01\x01\x07", probe.REJECTED, "called AE title"),
        (b"\x03\0\0\0\0\x04\0\x02\x03\x02", probe.REJECTED, ""),
        (b"\x07\0\0\0\0\x04\0\0\0\0", probe.ABORTED, ""),
        (b"\x15\x03\x01\0\x02\x02\x28", probe.TLS, ""),
        (b"HTTP/1.1 400", probe.OTHER, "no DICOM"),
        (b"x", probe.OTHER, "1 bytes"),
    ],
)
def test_an_answer_is_told_by_its_first_bytes(content: bytes, kind: str, detail: str) -> None:
    reply = probe.reply_of(content)
    assert reply.kind == kind
    assert detail in reply.detail


@given(st.binary(max_size=40))
def test_any_answer_is_told_without_an_error(content: bytes) -> None:
    assert probe.reply_of(content).kind
    assert probe.takes_of(content, 0x0301) in {True, False}


def test_a_server_hello_counts_for_its_own_version_only() -> None:
    hello = b"\x16\x03\x02\0\x40\x02\0\0\x3c\x03\x02"
    assert probe.takes_of(hello, 0x0302)
    assert not probe.takes_of(hello, 0x0301)
    assert not probe.takes_of(b"\x15\x03\x02\0\x02\x02\x46" + bytes(9), 0x0302)


@pytest.mark.parametrize(
    ("kind", "grade"),
    [
        (probe.ACCEPTED, CRITICAL),
        (probe.REJECTED, WARNING),
        (probe.ABORTED, WARNING),
        (probe.SILENT, UNKNOWN),
        (probe.OTHER, UNKNOWN),
        (probe.TLS, OK),
        (probe.CLOSED, OK),
    ],
)
def test_what_was_answered_without_tls_or_certificate_is_graded(kind: str, grade: str) -> None:
    seen = probe.Seen(plain=probe.Reply(kind), bare=probe.Reply(kind), shown=DARK, old={"TLS 1.0": False})
    found = {finding.practice: finding for finding in exposure.judge(seen, NOW)}
    assert found["no-tls"].grade == found["no-certificate"].grade == grade
    assert (found["old-tls"].grade, found["certificate"].grade) == (OK, UNKNOWN)


@pytest.mark.parametrize(
    ("old", "grade"),
    [
        ({probe.OLD_SUITES: True, "TLS 1.0": True}, CRITICAL),
        ({probe.OLD_SUITES: True, "TLS 1.0": False}, WARNING),
        ({"a": False, "b": True}, CRITICAL),
        ({"a": False, "b": DARK}, UNKNOWN),
        ({"a": False}, OK),
    ],
)
def test_one_old_version_that_is_taken_is_enough(old: dict[str, bool | Unseen], grade: str) -> None:
    seen = probe.Seen(plain=probe.Reply(probe.TLS), bare=probe.Reply(probe.CLOSED), shown=DARK, old=old)
    assert next(f.grade for f in exposure.judge(seen, NOW) if f.practice == "old-tls") == grade


# --- before the first study

_OF_CONTENT = {"recovery-export", "drill", "backup", "patches", "audit-forwarding", "alerts"}


def untended(packs: int) -> Facts:
    """A store for which nothing was ever done, with so many packs."""
    bare = msgspec.structs.replace(
        STORE, settings=settings(audit=AuditSettings(), alerts=AlertSettings()), patches=Patches(fetched=None)
    )
    told = msgspec.structs.replace(
        ANSWERS,
        recovery=Recovery(keys=[], exports=[]),
        backups=[],
        scrub=msgspec.structs.replace(ANSWERS.scrub, packs=packs),
    )
    return msgspec.structs.replace(GOOD, store=bare, answers=told)


def test_what_protects_content_is_advice_until_there_is_some() -> None:
    for packs, expected in ((0, {ADVICE}), (1, {CRITICAL, WARNING})):
        found = {one.practice: one for one in judge.judge(untended(packs)) if one.practice in _OF_CONTENT}
        assert found.keys() == _OF_CONTENT
        assert {one.grade for one in found.values()} == expected
        assert all(("before the first study comes" in one.found) == (not packs) for one in found.values())


def test_where_nobody_knows_what_there_is_something_is() -> None:
    facts = untended(0)
    facts = msgspec.structs.replace(facts, answers=msgspec.structs.replace(facts.answers, scrub=Unseen("locked")))
    [backups] = [one for one in judge.judge(facts) if one.practice == "backup"]
    assert backups.grade == CRITICAL


def test_what_is_wrong_with_the_installation_itself_is_no_advice_in_an_empty_store() -> None:
    facts = untended(0)
    store = msgspec.structs.replace(facts.store, modes=("/store is open to others",))
    [modes] = [one for one in judge.judge(msgspec.structs.replace(facts, store=store)) if one.practice == "modes"]
    assert modes.grade == CRITICAL


@pytest.mark.parametrize(("user", "grade"), [("", WARNING), ("strongroom-gate", WARNING), ("strongroom-desk", OK)])
def test_a_desk_has_a_user_of_its_own(user: str, grade: str) -> None:
    facts = set_to(desk=DeskSettings(user=user, listen=["10.0.0.5:2763"]))
    assert of(facts, "users").grade == grade


def test_a_desk_on_every_address_is_found() -> None:
    assert of(set_to(desk=DeskSettings(web=["0.0.0.0:8443"])), "addresses").grade == WARNING
