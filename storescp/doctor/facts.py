"""What the doctor sees, as plain values: everything that is judged is in here, and nothing of it looks anywhere.

Each fact is a value, or ``Unseen`` with the reason: it is reported as such, never taken for good.
"""

from __future__ import annotations

from datetime import datetime
from typing import TypeVar

import msgspec

from storescp.config import Settings

_T = TypeVar("_T")


class Unseen(msgspec.Struct, frozen=True):
    """What could not be seen, and why."""

    reason: str


class UnseenError(Exception):
    """Something that is judged could not be seen; the message is the reason."""


def see(fact: _T | Unseen) -> _T:
    """Return a fact.

    Raises:
        UnseenError: It was not seen.
    """
    if isinstance(fact, Unseen):
        raise UnseenError(fact.reason)
    return fact


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What a file or folder lies on.

    ``encrypted``: dm-crypt is between it and every disk; None where it is not on a disk at all (memory). ``disks`` are
    the names of the devices at the bottom, empty where the file system does not tell.
    """

    name: str
    path: str
    mount: str
    filesystem: str
    encrypted: bool | Unseen | None
    disks: tuple[str, ...] = ()


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """A swap area; ``encrypted`` as in ``Place``."""

    name: str
    encrypted: bool | Unseen | None


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process of this product: its verb, whether it may dump core, and whether its memory is locked."""

    pid: int
    verb: str
    core: bool
    locked: bool


class Cores(msgspec.Struct, frozen=True, kw_only=True):
    """Where the kernel sends core dumps (``kernel.core_pattern``), and whether it keeps its own memory (kdump)."""

    pattern: str
    kdump: bool


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP socket that listens; ``program`` is empty where it cannot be seen, ``ours`` by the process or the port."""

    address: str
    port: int
    program: str = ""
    ours: bool = False


class Firewall(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a rule set for incoming packets drops or rejects something, and where that was read."""

    filters: bool
    source: str


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """An installed systemd unit, and its exposure level as ``systemd-analyze security`` has it: 0 (best) to 10."""

    name: str
    exposure: float | Unseen


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate serves with its files: its lowest TLS version, cipher suites, and its own certificate's key.

    ``signature`` is the certificate's hash, lower case, empty where its algorithm has none.
    """

    minimum: str
    suites: tuple[str, ...]
    client_certificates: bool
    key: str
    bits: int
    signature: str


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate or revocation list, and when it ends."""

    name: str
    ends: datetime | Unseen
    revocations: bool = False


class PeerFact(msgspec.Struct, frozen=True, kw_only=True):
    """What of a peer counts here: ``pinned`` to a certificate or key, or by name below an authority only."""

    ae_title: str
    pinned: bool
    plaintext: bool
    addresses: int


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """A file system of the store: bytes free and in total."""

    name: str
    free: int
    total: int


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A way to unlock; ``type`` is passphrase, key-file, credential or token."""

    type: str
    created: str
    label: str = ""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A key version."""

    version: int
    state: str
    created: str


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """A rotation; it waits for something as long as the old version is not destroyed."""

    version: int
    old: int
    proved: str = ""
    destroyed: str = ""
    waits_for: str = ""


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """Key versions and rotations."""

    versions: list[Version]
    rotations: list[Rotation]

    @property
    def current(self) -> Version | None:
        """The newest version."""
        return max(self.versions, key=lambda version: version.version, default=None)


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """A recovery export; the times are empty where it did not happen."""

    created: str
    versions: list[int]
    confirmed: str = ""
    retired: str = ""


class RecoveryKey(msgspec.Struct, frozen=True, kw_only=True):
    """A recovery key."""

    id: str


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to recover with."""

    keys: list[RecoveryKey]
    exports: list[Export]


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """A backup; the times are empty where it did not happen, ``bytes`` is the size of all packs in it."""

    created: str
    bytes: int
    confirmed: str = ""
    drilled: str = ""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a job ended."""

    result: str
    began: str = ""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job of the schedule."""

    job: str
    expression: str
    overdue: bool = False
    last: Ended | None = None


class Scrub(msgspec.Struct, frozen=True, kw_only=True):
    """How far the scrub is; ``days`` is in how many it should read everything."""

    packs: int
    days: int
    damaged: int
    last_run: str = ""
    last_round: str = ""
    round_began: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What the status says, locked or not."""

    locked: bool
    receiving: bool
    slots: list[Slot]
    disk: list[Room]


class Patches(msgspec.Struct, frozen=True, kw_only=True):
    """When evidence about fixes last came, None for never."""

    fetched: datetime | None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine."""

    swaps: tuple[Swap, ...] | Unseen
    cores: Cores | Unseen
    processes: tuple[Process, ...] | Unseen
    listeners: tuple[Listener, ...] | Unseen
    programs: frozenset[str] | Unseen
    firewall: Firewall | Unseen
    units: tuple[Unit, ...] | Unseen
    synchronised: bool | Unseen


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The store, as its files and the machine show it."""

    settings: Settings
    places: tuple[Place, ...] | Unseen
    modes: tuple[str, ...] | Unseen
    tls: Tls | Unseen
    endings: tuple[Ending, ...] | Unseen
    peers: tuple[PeerFact, ...] | Unseen
    peer_faults: tuple[str, ...]
    patches: Patches | Unseen


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What the vault answers; a locked one answers little."""

    status: Status | Unseen
    keys: Keys | Unseen
    recovery: Recovery | Unseen
    backups: list[Backup] | Unseen
    jobs: list[Job] | Unseen
    scrub: Scrub | Unseen


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is judged, and when."""

    now: datetime
    machine: Machine
    store: Store
    answers: Answers
