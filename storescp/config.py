"""``strongroom.toml``: its schema, its defaults and their explanation, in one place. Unknown keys are errors.

The file that ``init`` writes is made from this module, so that what is explained is what is read.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from storage import retentionrules
from storage.retentionrules import Retention
from storescp import (
    alertsettings,
    desksettings,
    forwardsettings,
    metricssettings,
    reviewsettings,
    schedulesettings,
    scrubsettings,
)
from storescp.alertsettings import AlertSettings
from storescp.desksettings import DeskSettings
from storescp.errors import USAGE, StrongroomError
from storescp.forwardsettings import AuditSettings
from storescp.metricssettings import MetricsSettings
from storescp.patch import settings as patch_settings
from storescp.patch.settings import PatchAge
from storescp.reviewsettings import ReviewSettings
from storescp.schedulesettings import ScheduleSettings
from storescp.scrubsettings import ScrubSettings

_CREDENTIAL = "credential:"
SEARCH = ("strongroom.toml", "/etc/strongroom/strongroom.toml")


class Store(msgspec.Struct, kw_only=True):
    """Where the store is."""

    path: str
    anchors: str
    spool: str
    signing_key: str
    reserve_bytes: int = 1 << 30


class Unlock(msgspec.Struct, kw_only=True):
    """How the vault unlocks by itself."""

    key_file: str = ""


class Plaintext(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A listener without TLS: where, why, from which addresses, for which peers."""

    listen: str
    plaintext: str
    addresses: list[str]
    peers: list[str]


class Gate(msgspec.Struct, kw_only=True):
    """The DICOM listener."""

    user: str = ""
    listen: list[str] = msgspec.field(default_factory=lambda: ["127.0.0.1:2762"])
    ae_title: str = "STRONGROOM"
    certificate: str = "tls/server.pem"
    private_key: str = "tls/server.key"
    trust: list[str] = msgspec.field(default_factory=list)
    crls: list[str] = msgspec.field(default_factory=list)
    peers: str = "peers.d"
    workers: int = 0
    maximum_pdu: int = 131_072
    maximum_associations: int = 100
    maximum_per_address: int = 50
    request_seconds: int = 15
    idle_seconds: int = 60
    message_seconds: int = 3600
    drain_seconds: int = 30
    pack_bytes: int = 1 << 30
    pack_idle_seconds: int = 5
    packs_per_peer: int = 16
    spare_bytes: int = 1 << 28
    plaintext: list[Plaintext] = msgspec.field(default_factory=list)

    def worker_count(self) -> int:
        """Return how many worker processes receive."""
        return self.workers or len(os.sched_getaffinity(0))


class Keys(msgspec.Struct, kw_only=True):
    """Key versions."""

    destroy_after_days: int = 7
    anchor: str = "file"
    anchor_token: str = ""
    anchor_pin: str = ""


class Control(msgspec.Struct, kw_only=True):
    """The vault's own socket."""

    socket: str = "run/vault.sock"
    group: str = ""


class Log(msgspec.Struct, kw_only=True):
    """The log on standard error."""

    format: str = "text"
    level: str = "info"


class Settings(msgspec.Struct, kw_only=True):
    """The whole file."""

    store: Store
    unlock: Unlock = msgspec.field(default_factory=Unlock)
    gate: Gate = msgspec.field(default_factory=Gate)
    keys: Keys = msgspec.field(default_factory=Keys)
    retention: Retention = msgspec.field(default_factory=Retention)
    scrub: ScrubSettings = msgspec.field(default_factory=ScrubSettings)
    control: Control = msgspec.field(default_factory=Control)
    log: Log = msgspec.field(default_factory=Log)
    patch_age: PatchAge = msgspec.field(default_factory=PatchAge)
    alerts: AlertSettings = msgspec.field(default_factory=AlertSettings)
    schedule: ScheduleSettings = msgspec.field(default_factory=ScheduleSettings)
    review: ReviewSettings = msgspec.field(default_factory=ReviewSettings)
    audit: AuditSettings = msgspec.field(default_factory=AuditSettings)
    metrics: MetricsSettings = msgspec.field(default_factory=MetricsSettings)
    desk: DeskSettings = msgspec.field(default_factory=DeskSettings)


EXPLAINED = {
    "store": "Where the store is. Relative paths count from this file's folder.",
    "store.path": "Admitted packs, keyring, keys.db and index. Part of every backup.",
    "store.anchors": "The anchors of the key versions. Outside every backup:\n"
    "destroying one is what proves a version gone.",
    "store.spool": "incoming/ (the gate writes deposits here), incoming-desk/ (the desk does) and public/\n"
    "(the deposit keys that they use).",
    "store.signing_key": "The store's public signing key. A gate takes no deposit key that it did not sign.",
    "store.reserve_bytes": "Free space that receiving never uses, in bytes, of incoming/ and of the archive apart:\n"
    "C-STORE is answered A700 before. Admission may use three quarters of it; the rest is left for erasures.",
    "unlock": "How the vault unlocks by itself when it starts. Without it, receiving works all the same\n"
    "and the vault waits for 'strongroom unlock'.",
    "unlock.key_file": "A key file that a slot of the keyring opens with, or 'credential:NAME', a systemd credential.\n"
    "Whoever has it and the disks can read the store: keep it apart.",
    "gate": "The DICOM listener: TLS with client certificates only, and only peers with a file in peers.d.",
    "gate.user": "The gate's own user, where it runs as another one than the vault: the vault then takes\n"
    "deposits of this user only, and copies them. Empty where both are one user.",
    "gate.listen": 'Addresses and ports. Nothing else is opened. IPv6 in brackets: "[::1]:2762".',
    "gate.ae_title": "The called AE title; an association that asks for another one is rejected.",
    "gate.certificate": "The server's certificate chain, PEM.",
    "gate.private_key": "Its private key, PEM, mode 0600.",
    "gate.trust": "Certificates of the authorities that issue peers' certificates, PEM.\n"
    "A peer also needs its own certificate in its file.",
    "gate.crls": "Certificate revocation lists of these authorities, PEM or DER. Where an authority has one here, it\n"
    "is checked; an expired one refuses every certificate of that authority. Changes are taken up while running.",
    "gate.peers": "The folder of peer files, one a peer; changes are taken up while running.",
    "gate.workers": "Processes that receive; 0 for as many as there are cores. Limits hold over all of them.",
    "gate.maximum_pdu": "Largest PDU accepted, in bytes, 4096 to 1048576; offered in the negotiation and enforced.",
    "gate.maximum_associations": "Connections at a time; more are closed at once.",
    "gate.maximum_per_address": "Of these, connections from one address: no device can take all places.",
    "gate.request_seconds": "Time for the TLS handshake, and again for the association request.",
    "gate.idle_seconds": "An established association that sends nothing for this long is aborted.",
    "gate.message_seconds": "Time for one message, however it trickles in; a longer one is aborted.",
    "gate.drain_seconds": "When stopping: time for associations in transfer to finish.",
    "gate.pack_bytes": "A pack is closed at this size; a study may have many.",
    "gate.pack_idle_seconds": "A pack is closed when nothing was added for this long.",
    "gate.packs_per_peer": "Packs that may stay open for one peer.",
    "gate.spare_bytes": "While nothing arrives, each worker fills two files with zeros for packs to come, so that\n"
    "syncs are faster. They are as large as packs lately were, and at most so many bytes each; 0 for none.",
    "gate.plaintext": "Listeners WITHOUT TLS: whoever reads the network reads patients. A gateway beside the device\n"
    "is better (docs/admin.md). Each has its address, the reason, and the addresses and peers that it is for:\n"
    'plaintext = [{ listen = "10.0.0.5:11112", plaintext = "behind the VPN of CT3", addresses = ["10.1.2.3"],\n'
    '               peers = ["CT3"] }]',
    "keys": "Key versions: 'strongroom keys rotate' makes a new one.",
    "keys.destroy_after_days": "How long the anchor of an old version stays after a rotation is proved and confirmed.\n"
    "Until then a backup made before the rotation still opens; after it, none ever does.",
    "keys.anchor": 'Where the anchors of new key versions are: "file" (in store.anchors; NIST SP 800-88: clear)\n'
    'or "token" (purge, where it is hardware: docs/anchors.md). Those that there are stay where they are.',
    "keys.anchor_token": "The PKCS#11 token of anchors, MODULE:TOKEN: the module's path and the token's label.\n"
    "Needed for new ones, and as long as a key version has its anchor there ('strongroom keys status').",
    "keys.anchor_pin": "That token's PIN: a file with mode 0600, or 'credential:NAME', a systemd credential.\n"
    "It is read whenever the token is used: to unlock, to make a version, to destroy one.",
    **retentionrules.EXPLAINED,
    **scrubsettings.EXPLAINED,
    "control": "The Unix socket on which this command line talks to the vault.",
    "control.socket": "Its path, at most 100 characters.",
    "control.group": "A group whose members may use it, besides root and the vault's user. That user must be in it,\n"
    "or the socket's folder be the group's, with the set-group-ID bit (as 'strongroom install' makes it).\n"
    "Each is known by the user id: in the audit chain, and where a second approver is wanted.",
    "log": "The log goes to standard error; journald or the supervisor keeps it.",
    "log.format": '"text" or "json".',
    "log.level": '"debug", "info", "warning" or "error".',
    **patch_settings.EXPLAINED,
    **alertsettings.EXPLAINED,
    **schedulesettings.EXPLAINED,
    **reviewsettings.EXPLAINED,
    **forwardsettings.EXPLAINED,
    **metricssettings.EXPLAINED,
    **desksettings.EXPLAINED,
}


class ConfigError(StrongroomError):
    """One or more errors in a configuration file; all are told."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, status=USAGE)


class Config:
    """A read configuration: the settings, and their paths made absolute."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self.file = file
        self.settings = settings
        self.store_path = self._path(settings.store.path)
        self.keyring = self.store_path / "keyring"
        self.keys_db = self.store_path / "keys.db"
        self.lock = self.store_path / "lock"
        self.anchors = self._path(settings.store.anchors)
        self.incoming = self._path(settings.store.spool) / "incoming"
        # Who stores by DICOMweb deposits with the desk, which is another user than the gate.
        self.desk_incoming = self._path(settings.store.spool) / "incoming-desk"
        self.inboxes = (self.incoming, self.desk_incoming)
        self.public = self._path(settings.store.spool) / "public"
        # The vault writes the outbox; who sends what is in it writes the folder beside it alone.
        self.outbox = self._path(settings.store.spool) / "outbox"
        self.alert_state = self._path(settings.store.spool) / "alerts"
        # The vault writes the first, who sends audit messages the second.
        self.audit_out = self._path(settings.store.spool) / "audit-out"
        self.audit_forwarder = self._path(settings.store.spool) / "audit-forwarder"
        audit = settings.audit
        self.audit_trust = self._path(audit.trust)
        self.audit_certificate = self._path(audit.certificate) if audit.certificate else None
        self.audit_private_key = self._path(audit.private_key) if audit.private_key else None
        # Gate and vault each write a folder in it; who serves the numbers reads both.
        self.metrics = self._path(settings.store.spool) / "metrics"
        password = settings.alerts.mail.password_file
        self.mail_credential = password.removeprefix(_CREDENTIAL) if password.startswith(_CREDENTIAL) else ""
        self.mail_password_file = self._path(password) if password and not self.mail_credential else None
        self.alert_trust = self._path(settings.alerts.trust) if settings.alerts.trust else None
        self.peers = self._path(settings.gate.peers)
        self.certificate = self._path(settings.gate.certificate)
        self.private_key = self._path(settings.gate.private_key)
        self.trust = [self._path(p) for p in settings.gate.trust]
        self.crls = [self._path(p) for p in settings.gate.crls]
        self.socket = self._path(settings.control.socket)
        self.desk_socket = self._path(settings.desk.socket)
        self.desk_viewer = self._path(settings.desk.viewer) if settings.desk.viewer else None
        self.desk_certificate = self._path(settings.desk.certificate or settings.gate.certificate)
        self.desk_private_key = self._path(settings.desk.private_key or settings.gate.private_key)
        named = settings.unlock.key_file
        self.credential = named.removeprefix(_CREDENTIAL) if named.startswith(_CREDENTIAL) else ""
        pin = settings.keys.anchor_pin
        self.anchor_pin_credential = pin.removeprefix(_CREDENTIAL) if pin.startswith(_CREDENTIAL) else ""
        self.anchor_pin_file = self._path(pin) if pin and not self.anchor_pin_credential else None
        self.anchor_token = split_token(settings.keys.anchor_token) if settings.keys.anchor_token else None
        for listener in settings.gate.plaintext:
            listener.peers = [title.strip(" ") for title in listener.peers]
        self.key_file = self._path(named) if named and not self.credential else None
        self.signing_key = base64.b64decode(settings.store.signing_key.removeprefix("ed25519:"))

    def ledger(self, version: int) -> Path:
        """Return where the ledger of a key version is."""
        return self.store_path / f"ledger-{version}.db"

    @property
    def backup_staging(self) -> Path:
        """Where a backup's databases are copied before they leave for the backup's folder."""
        return self.store_path / "backup.new"

    def index(self, version: int) -> Path:
        """Return where the index of a key version is."""
        return self.store_path / f"index-{version}.db"

    def _path(self, text: str) -> Path:
        return self.file.parent / text


def locate(given: str | None) -> Path:
    """Return the configuration file to use.

    Raises:
        ConfigError: None is there.
    """
    if given:
        return Path(given).absolute()
    if from_environment := os.environ.get("STRONGROOM_CONFIG"):
        return Path(from_environment).absolute()
    for name in SEARCH:
        if Path(name).exists():
            return Path(name).absolute()
    raise ConfigError(
        f"no configuration: neither {' nor '.join(SEARCH)} exists",
        hint="make a store with 'strongroom init', or name its file with --config or STRONGROOM_CONFIG",
    )


def load(file: Path) -> Config:
    """Read a configuration file.

    Raises:
        ConfigError: With every error in it, each with file and key.
    """
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: no UTF-8, no TOML, or a number that is too long for a number.
        raise ConfigError(f"{file} cannot be read: {error}") from error
    settings, errors = convert(document, Settings)
    errors += _check(settings if settings is not None else _known(document))
    if settings is None or errors:
        raise ConfigError("\n".join(f"{file}: {e}" for e in errors))
    return Config(file, settings)


def convert(document: dict[str, Any], kind: type[Any], prefix: str = "") -> tuple[Any, list[str]]:
    """Turn a TOML table into a struct and collect every error, each with its key.

    Returns:
        The struct, or None where there are errors, and the errors.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    errors = [f"{prefix}{key}: unknown key" for key in document if key not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in document:
            if field.required:
                errors.append(f"{prefix}{name}: missing")
            continue
        value = document[name]
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            if isinstance(value, dict):
                values[name], inner = convert(value, field.type, f"{prefix}{name}.")
                errors += inner
            else:
                errors.append(f"{prefix}{name}: must be a table")
            continue
        try:
            values[name] = msgspec.convert(value, field.type)
        except msgspec.ValidationError as error:
            errors.append(f"{prefix}{name}: {str(error)[0].lower()}{str(error)[1:]}")
    return (kind(**values), []) if not errors else (None, errors)


def render(settings: Settings) -> str:
    """Return settings as TOML with every one explained."""
    lines = [
        "# Strongroom. Unknown keys are errors. 'strongroom serve' reads this file; SIGHUP makes it read again.",
        "",
    ]
    for section in msgspec.structs.fields(Settings):
        table = getattr(settings, section.name)
        lines += [*_comment(section.name), f"[{section.name}]", ""]
        for field in msgspec.structs.fields(type(table)):
            lines += _comment(f"{section.name}.{field.name}")
            value = getattr(table, field.name)
            # An empty list of tables would forbid those that somebody writes behind it.
            lines += [""] if value == [] and "rules" in field.name else [f"{field.name} = {_toml(value)}", ""]
    return "\n".join(lines)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:2762`` or ``[::1]:2762``.

    Raises:
        ValueError: It is no address with a port.
    """
    found = re.fullmatch(r"(\[[^\]]+\]|[^\[\]:]+):([0-9]{1,5})", text, re.ASCII)
    if found is None or int(found[2]) > 65_535:
        raise ValueError("no address with a port")
    address = ipaddress.ip_address(found[1].strip("[]"))
    if (address.version == 6) != found[1].startswith("["):
        raise ValueError("an IPv6 address needs brackets, and no other has them")
    return str(address), int(found[2])


def split_token(text: str) -> tuple[str, str]:
    """Return the module's path and the token's label of ``/usr/lib/module.so:label``.

    Raises:
        ValueError: One of them is missing, or the path is not absolute.
    """
    module, _, label = text.rpartition(":")
    if not module.startswith("/") or not label or "\0" in module:
        raise ValueError("no module's path and token's label")
    return module, label


def is_ae_title(text: str) -> bool:
    """Tell whether text can be an AE title (PS3.5, VR AE): 1 to 16 characters of ISO 646, no backslash or control."""
    return bool(text.strip(" ")) and len(text) <= 16 and all(" " <= c <= "~" and c != "\\" for c in text)


def _known(document: dict[str, Any]) -> Settings:
    """Return the settings of a file with errors as far as they are understood: they may break rules, too."""
    settings = Settings(store=Store(path="", anchors="", spool="", signing_key="ed25519:" + "A" * 43 + "="))
    for section in msgspec.structs.fields(Settings):
        table = document.get(section.name)
        if not isinstance(table, dict):
            continue
        for field in msgspec.structs.fields(section.type):
            if field.name in table:
                with contextlib.suppress(msgspec.ValidationError):
                    value = msgspec.convert(table[field.name], field.type)
                    setattr(getattr(settings, section.name), field.name, value)
    return settings


def _check(settings: Settings) -> list[str]:
    gate = settings.gate
    errors = []
    try:
        key = base64.b64decode(settings.store.signing_key.removeprefix("ed25519:"), validate=True)
        if len(key) != 32 or not settings.store.signing_key.startswith("ed25519:"):
            raise ValueError
    except (binascii.Error, ValueError):
        errors.append("store.signing_key: must be 'ed25519:' and 32 bytes in base64")
    if not gate.listen:
        errors.append("gate.listen: names no address")
    for address in gate.listen:
        try:
            parse_address(address)
        except ValueError:
            errors.append(f"gate.listen: '{address}' is no address with a port, as in 127.0.0.1:2762 or [::1]:2762")
    errors += _check_plaintext(gate)
    if not is_ae_title(gate.ae_title):
        errors.append("gate.ae_title: must be 1 to 16 characters, ASCII, no backslash")
    for name, low, high in (
        ("workers", 0, 64),
        ("maximum_pdu", 4096, 1 << 20),
        ("maximum_associations", 1, 10_000),
        ("maximum_per_address", 1, 10_000),
        ("request_seconds", 1, 600),
        ("idle_seconds", 1, 86_400),
        ("message_seconds", 1, 86_400),
        ("drain_seconds", 0, 3600),
        ("pack_bytes", 1 << 20, 1 << 40),
        ("pack_idle_seconds", 1, 3600),
        ("packs_per_peer", 1, 1000),
        ("spare_bytes", 0, 1 << 34),
    ):
        errors += _out_of_bounds(f"gate.{name}", getattr(gate, name), low, high)
    errors += _out_of_bounds("store.reserve_bytes", settings.store.reserve_bytes, 1 << 20, 1 << 50)
    errors += _out_of_bounds("keys.destroy_after_days", settings.keys.destroy_after_days, 0, 3650)
    errors += _check_anchor(settings.keys)
    errors += retentionrules.errors(settings.retention)
    errors += patch_settings.check(settings.patch_age)
    errors += scrubsettings.errors(settings.scrub)
    if settings.log.format not in {"text", "json"}:
        errors.append("log.format: must be text or json")
    if settings.log.level not in {"debug", "info", "warning", "error"}:
        errors.append("log.level: must be debug, info, warning or error")
    errors += alertsettings.check(settings.alerts)
    errors += schedulesettings.check(settings.schedule)
    errors += reviewsettings.check(settings.review)
    errors += forwardsettings.check(settings.audit)
    errors += metricssettings.check(settings.metrics, parse_address)
    errors += desksettings.check(settings.desk, parse_address)
    taken = {*gate.listen, *(listener.listen for listener in gate.plaintext)}
    for name in ("listen", "web"):
        # Port 0 is another one each time.
        twice = [address for address in getattr(settings.desk, name) if address in taken and address[-2:] != ":0"]
        errors += [f"desk.{name}: '{address}' is the gate's, too" for address in twice]
    return errors


def _out_of_bounds(key: str, value: int, low: int, high: int) -> list[str]:
    return [] if low <= value <= high else [f"{key}: must be from {low} to {high}"]


def _check_anchor(keys: Keys) -> list[str]:
    errors = []
    if keys.anchor not in {"file", "token"}:
        errors.append("keys.anchor: must be file or token")
    if keys.anchor_token:
        try:
            split_token(keys.anchor_token)
        except ValueError:
            errors.append(
                "keys.anchor_token: must be MODULE:TOKEN, an absolute path and a token's label, "
                "as in /usr/lib/softhsm/libsofthsm2.so:strongroom"
            )
        if keys.anchor_pin in {"", _CREDENTIAL}:
            errors.append("keys.anchor_pin: missing: name a file with the token's PIN, or 'credential:NAME'")
    elif keys.anchor == "token":
        errors.append("keys.anchor_token: missing: name the token, MODULE:TOKEN")
    return errors


def _check_plaintext(gate: Gate) -> list[str]:
    errors = []
    for number, listener in enumerate(gate.plaintext):
        key = f"gate.plaintext[{number}]"
        try:
            parse_address(listener.listen)
        except ValueError:
            errors.append(f"{key}.listen: '{listener.listen}' is no address with a port, as in 10.0.0.5:11112")
        if listener.listen in gate.listen:
            errors.append(f"{key}.listen: '{listener.listen}' is also in gate.listen")
        if not listener.plaintext.strip():
            errors.append(f"{key}.plaintext: say why this listener has no TLS")
        errors += [
            f"{key}.{name}: names none; a listener without TLS is for given {name} only"
            for name in ("addresses", "peers")
            if not getattr(listener, name)
        ]
        for text in listener.addresses:
            try:
                network(text)
            except ValueError:
                errors.append(f"{key}.addresses: '{text}' is no address or network, as in 10.1.2.3 or 10.1.2.0/24")
        errors += [f"{key}.peers: '{title}' is no AE title" for title in listener.peers if not is_ae_title(title)]
    return errors


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return the network in ``10.1.2.3``, ``10.1.2.0/24`` or ``fd00::/8``.

    Raises:
        ValueError: It is none, or has bits set behind its prefix.
    """
    return ipaddress.ip_network(text)


def _comment(key: str) -> list[str]:
    return [f"# {line}" for line in EXPLAINED[key].split("\n")]


def _toml(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in msgspec.structs.asdict(value).items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return toml_string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def toml_string(text: str) -> str:
    """Return text as a TOML basic string."""
    escaped = "".join(f"\\{c}" if c in '"\\' else c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return f'"{escaped}"'
