"""The vault's side of forwarding: every record once, whatever crashes, is lost, full, restored or begun anew."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keys import slots
from keys.forwarding import ForwardingKey, new_private, read_recipient
from keys.seal import SealError
from keys.versions import store_id_of
from storage import audit
from storage.auditlines import Head
from storage.audittail import Tail
from storescp import auditspool, forwardsettings
from storescp.alertkinds import KINDS
from storescp.auditspool import Message
from storescp.config import Config, load
from storescp.forwardsettings import AuditSettings
from storescp.vault import forward as module
from storescp.vault.create import Plan, create
from storescp.vault.forward import Forward
from storescp.vault.forwardstate import Batch, State, Whose, remember_erasures
from storescp.vault.state import Vault


class Store:
    """A store with an unlocked vault and a forwarder's key, and what a forwarder would have sent."""

    def __init__(self, home: Path) -> None:
        create(
            Plan(
                file=home / "strongroom.toml", listen=["127.0.0.1:0"], ae_title="STRONGROOM", passphrase=None,
                key_file=home / "store.key", server_names=[], with_pki=False,
            )
        )  # fmt: skip
        self.config: Config = load(home / "strongroom.toml")
        self.config.settings.audit = AuditSettings(forward="localhost:1", trust="ca.pem")
        self.peer, self.out = self.config.audit_forwarder, self.config.audit_out
        self.peer.mkdir()
        self.key = ForwardingKey(new_private())
        self.new_key()
        self.store_id = store_id_of(self.config.signing_key)
        self.sent: dict[int, Message] = {}
        # The ages of files are by the disk's clock.
        self.now = time.time()
        self.vault = Vault(self.config)
        self.secret = slots.read_key_file(home / "store.key")
        remember_erasures(self.vault)
        self.vault.unlock(self.secret)
        self.forward = self.new()

    def new_key(self) -> None:
        self.key = ForwardingKey(new_private())
        (self.peer / auditspool.PUBLIC).write_bytes(self.key.recipient.file())

    def new(self) -> Forward:
        """Begin anew, as after a crash."""
        self.forward = Forward(self.vault, lambda: self.now, every=0.0)
        return self.forward

    def record(self, *kinds: str, **fields: Any) -> None:
        for kind in kinds:
            self.vault.auditor.record(kind, **fields)

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.forward.turn()

    def opened(self) -> list[Message]:
        """Return what lies in the spool."""
        return [
            message
            for _, _, path in auditspool.files(self.out)
            for message in auditspool.decoded(self.key.open(path.read_bytes(), self.store_id, path.name))
        ]

    def take(self) -> list[Message]:
        """Take what lies in the spool, and acknowledge it."""
        found = [message for message in self.opened() if message.seq not in self.sent]
        self.sent |= {message.seq: message for message in found}
        if self.sent:
            auditspool.acknowledge(self.peer, max(self.sent))
        return found

    def kinds(self, messages: list[Message]) -> list[str]:
        """Return which records messages are of; heads apart."""
        types = {r["number"]: r["type"] for r in self.vault.auditor.read(0)}
        return [types[message.record] for message in messages if not message.head]

    @property
    def state(self) -> State:
        state = self.vault.unlocked().ledger.records("forward", State).get("state")
        assert state is not None
        return state

    def set_state(self, state: State) -> None:
        self.vault.unlocked().ledger.records("forward", State).put("state", state)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    # What it says at first: that it was unlocked, and which alerts stand.
    made.turn(2)
    assert made.kinds(made.take())[:1] == ["unlocked"]
    yield made
    made.vault.lock()
    made.vault.auditor.close()


def test_what_is_recorded_is_told_once_and_in_order_and_goes_when_it_was_delivered(store: Store) -> None:
    store.record("peer-added", "peer-renewed", peer="CT1")
    store.turn(2)
    store.record("peer-removed", peer="CT1")
    store.turn(3)
    found = store.take()
    assert store.kinds(found) == ["peer-added", "peer-renewed", "peer-removed"]
    assert sorted(store.sent) == list(range(1, len(store.sent) + 1))
    store.turn()
    assert auditspool.files(store.out) == []
    assert store.vault.unlocked().ledger.records("forward-batch", Batch).count() == 0


def test_the_spool_is_sealed_to_the_forwarder_and_bound_to_its_name(store: Store) -> None:
    store.record("peer-added", peer="CT1")
    store.turn()
    [(first, last, path)] = auditspool.files(store.out)
    sealed = path.read_bytes()
    assert (b"AuditMessage" in sealed, path.stat().st_mode & 0o777) == (False, 0o640)
    for key, store_id, name in (
        (ForwardingKey(new_private()), store.store_id, path.name),
        (store.key, bytes(16), path.name),
        (store.key, store.store_id, auditspool.name_of(first, last + 1)),
    ):
        with pytest.raises(SealError):
            key.open(sealed, store_id, name)


def test_a_crash_before_the_file_is_written_gives_the_same_numbers_again(store: Store) -> None:
    before = store.state
    store.record("peer-added", peer="CT1")
    store.turn()
    made = store.opened()
    # As it is when the process was killed between the note in the ledger and the file.
    store.set_state(before)
    for _, _, path in auditspool.files(store.out):
        path.unlink()
    store.record("peer-removed", peer="CT1")
    store.new()
    store.turn()
    assert store.opened()[0] == made[0]
    assert store.kinds(store.take()) == ["peer-added", "peer-removed"]


def test_a_crash_after_the_file_is_written_makes_nothing_twice(store: Store) -> None:
    before = store.state
    store.record("peer-added", peer="CT1")
    store.turn()
    store.set_state(before)
    store.record("peer-removed", peer="CT1")
    store.new()
    store.turn(2)
    found = store.take()
    assert store.kinds(found) == ["peer-added", "peer-removed"]
    assert [m.seq for m in found] == [before.seq + 1, before.seq + 2]


def test_messages_that_somebody_removed_from_the_spool_are_made_again(store: Store) -> None:
    for kind in ("peer-added", "peer-renewed", "peer-removed"):
        store.record(kind, peer="CT1")
        store.turn()
    made = store.opened()
    auditspool.files(store.out)[1][2].unlink()
    store.new()
    store.turn(2)
    assert store.opened() == made


def test_what_waits_is_sealed_anew_for_a_forwarder_with_another_key_and_that_is_recorded(store: Store) -> None:
    store.record("peer-added", peer="CT1")
    store.turn()
    made = store.opened()
    store.new_key()
    store.turn(2)
    found = store.take()
    assert found[0] == made[0]
    assert store.kinds(found) == ["peer-added", "forwarder-key-changed"]


def test_a_full_spool_loses_nothing_and_the_chain_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILES", 2)
    for number in range(5):
        store.record("peer-added", peer=f"CT{number}")
        store.turn()
    assert len(auditspool.files(store.out)) == 2
    first = store.take()
    store.turn(3)
    assert [m.record for m in first + store.take()] == list(range(first[0].record, first[0].record + 5))
    store.config.settings.audit.waiting_bytes = auditspool.FILE_BYTES - 1
    store.record("peer-removed", peer="CT1")
    store.turn(2)
    assert auditspool.files(store.out) == []


def test_nothing_is_told_while_it_is_locked_and_everything_afterwards_once(store: Store) -> None:
    store.turn()
    store.vault.lock()
    store.turn()
    assert auditspool.locked_since(store.out)
    # Sealed to the deposit key, and copied under the audit key at the next unlock.
    store.record("peer-added", "peer-removed", peer="CT1")
    store.turn()
    assert auditspool.files(store.out) == []
    store.vault.unlock(store.secret)
    store.turn(3)
    assert auditspool.locked_since(store.out) == ""
    kinds = store.kinds(store.take())
    assert kinds[:3] == ["locked", "peer-added", "peer-removed"]
    assert kinds.count("peer-added") == kinds.count("peer-removed") == 1
    assert "transcript" not in kinds


def test_a_ledger_that_was_restored_gives_no_number_twice(store: Store) -> None:
    old = store.state
    store.record("peer-added", "peer-renewed", peer="CT1")
    store.turn()
    delivered = max(store.take(), key=lambda m: m.seq).seq
    store.turn()
    store.set_state(old)
    store.record("peer-removed", peer="CT1")
    store.new()
    store.turn(2)
    found = store.take()
    assert [m.seq for m in found] == list(range(delivered + 1, delivered + 4))
    assert store.kinds(found) == ["peer-added", "peer-renewed", "peer-removed"]


def test_a_chain_that_was_begun_anew_is_told_from_its_beginning(store: Store) -> None:
    last = store.state.seq
    store.vault.auditor.restart(0, "a test")
    for _ in range(20):
        store.record("peer-added", peer="CT1")
    store.turn(2)
    found = store.take()
    assert store.kinds(found)[:2] == ["audit-restarted", "peer-added"]
    assert [m.seq for m in found] == list(range(last + 1, last + len(found) + 1))


ENDED = {
    "time": "2026-01-31T12:00:00.000000Z", "type": "association-ended", "association": "a1", "calling": "CT1",
    "address": "10.0.0.1:5", "stored": 3, "refused": 0, "studies": {"1.2.3": 3},
}  # fmt: skip


@pytest.mark.parametrize(("age", "seconds", "said"), [(-60, 3600.0, "not-looked-at"), (60, 120.0, "not-here")])
def test_a_transfer_waits_for_what_is_not_admitted_yet_but_not_for_ever_and_keeps_its_place(
    store: Store, age: int, seconds: float, said: str
) -> None:
    deposit = store.config.incoming / ("ab" * 16)
    # A folder of such a name is no deposit, and is left where it is.
    (store.config.incoming / ("cd" * 16)).mkdir()
    deposit.write_bytes(b"no pack, but nobody has looked")
    store.now = time.time()
    os.utime(deposit, (store.now + age, store.now + age))
    store.record("gate-events", file="f", events=[ENDED])
    store.record("peer-added", peer="CT1")
    store.turn(2)
    assert store.take() == []
    store.now = time.time() + seconds - 30.0
    store.turn(2)
    assert "gate-events" not in store.kinds(store.take())
    store.now = time.time() + seconds + 30.0
    store.turn(2)
    found = [m for m in store.take() if not m.head]
    assert store.kinds(found)[:2] == ["gate-events", "peer-added"]
    assert (f'type="state-{said}"' in found[0].xml, 'ParticipantObjectID="unknown"' in found[0].xml) == (True, True)


def test_a_transfer_that_nothing_waits_for_is_told_at_once(store: Store) -> None:
    store.record("gate-events", file="f", events=[ENDED])
    store.turn()
    assert store.kinds(store.take()) == ["gate-events"]


def test_heads_are_signed_and_come_after_their_time_if_anything_was_recorded(store: Store) -> None:
    def heads() -> list[str]:
        store.turn(2)
        return [m.head for m in store.take() if m.head]

    store.record("peer-added", peer="CT1")
    assert heads() == []
    store.now += 900.0
    [head] = heads()
    now = store.vault.auditor.head
    assert now is not None
    assert head == f"{now.number}:{now.hash.hex()}"
    [said] = [m for m in store.sent.values() if m.head == head]
    assert 'csd-code="audit-head"' in said.xml
    store.now += 900.0
    assert heads() == []


def test_another_configuration_is_told_when_the_vault_starts(store: Store) -> None:
    for configuration in ("aa", "aa", "bb"):
        store.record("vault-started", release="1", configuration=configuration)
    store.turn()
    found = store.take()
    assert [m.xml.count('csd-code="configuration-changed"') for m in found] == [0, 0, 0, 1]


def test_alerts_are_recorded_when_they_come_and_go_and_told(store: Store) -> None:
    store.vault.alerts.raise_("job-failed", "scrub")
    store.now += 61.0
    store.turn(2)
    store.vault.alerts.resolve("job-failed", "scrub")
    store.now += 61.0
    store.turn(2)
    found = [m for m in store.take() if not m.head]
    assert store.kinds(found) == ["alert-raised", "alert-resolved"]
    assert "scheduled job scrub failed" in found[0].xml


def test_messages_that_nobody_takes_become_an_alert(store: Store) -> None:
    def stands() -> bool:
        store.now += 61.0
        store.turn()
        return "audit-unsent" in {alert.kind for alert in store.vault.alerts.standing()}

    store.record("peer-added", peer="CT1")
    assert not stands()
    store.now += 901.0
    assert stands()
    store.take()
    store.turn()
    store.take()
    assert not stands()
    (store.peer / auditspool.PUBLIC).unlink()
    assert stands()
    assert "audit-unsent" in KINDS


def test_a_study_that_is_being_erased_keeps_its_patient_until_that_is_told(store: Store) -> None:
    erasures = store.vault.unlocked().ledger.records("forward-erasure", Whose)
    store.record("erase-begun", study="1.2.3", erasure="e1", reason="why")
    assert [(w.study, w.patient) for w in erasures.all()] == [("1.2.3", "")]
    erasures.put("e1", Whose("e1", "1.2.3", "P1", "I1"))
    store.record("erased", erasure="e1", packs=1)
    store.turn()
    begun, erased = store.take()
    for message in (begun, erased):
        assert ('ParticipantObjectID="1.2.3"' in message.xml, 'ParticipantObjectID="P1"' in message.xml) == (True, True)
    store.now += 61.0
    store.turn(2)
    assert (list(erasures.all()), store.state.erasures) == ([], {})


@pytest.mark.parametrize("content", [b"{}", b"\xff", b'{"format":1,"seq":1000000000000000}', b'{"format":1,"seq":-1}'])
def test_whatever_the_forwarder_leaves_stops_no_vault(
    store: Store, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (store.peer / auditspool.ACKNOWLEDGED).write_bytes(content)
    store.record("peer-added", peer="CT1")
    store.turn(3)
    assert [r.message.startswith("audit messages wait: ") for r in caplog.records if r.name == module.__name__] == [
        True
    ]
    auditspool.acknowledge(store.peer, 0)
    store.turn(2)
    assert "peer-added" in store.kinds(store.take())


def test_a_state_that_nobody_understands_stops_no_vault(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    ledger = store.vault.unlocked().ledger
    good = store.state
    store.new()
    ledger.records("forward-batch", Whose).put("x", Whose("a", "b", "c", "d"))
    store.turn(3)
    assert len([r for r in caplog.records if r.name == module.__name__]) == 1
    ledger.records("forward-batch", Whose).remove("x")
    store.set_state(good)
    store.record("peer-added", peer="CT1")
    store.turn()
    assert "peer-added" in store.kinds(store.take())


# --- the tail of a chain


def entries(tail: Tail, up_to: int) -> list[int]:
    return [record.number for record in tail.records(up_to)]


@pytest.mark.parametrize("file_bytes", [1, 2000, 1 << 20])
def test_a_tail_gives_each_record_once_over_files_and_from_any_place(tmp_path: Path, file_bytes: int) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from keys.seal import seal

    signing, key, store_id = Ed25519PrivateKey.generate(), bytes(32), bytes(16)
    chain = audit.Chain(tmp_path / "audit", store_id, signing.public_key().public_bytes_raw(), file_bytes=file_bytes)
    following = Tail(tmp_path / "audit", store_id, Head(0, b""))
    heads = [Head(0, b"")]
    for number in range(1, 13):
        signs = {"signing": signing, "time": "2026-01-31T12:00:00Z"} if number % 3 else {}
        heads.append(
            chain.append([b"x" * 100 * number], "audit", lambda content, place: seal(content, key, place), **signs)  # type: ignore[arg-type]
        )
        if number % 2:
            assert entries(following, number) == ([number - 1, number] if number > 1 else [1])
    assert entries(following, 11) == []
    assert entries(following, 12) == [12]
    assert following.checkpoint is not None
    assert following.checkpoint.number == 11
    for number, head in enumerate(heads):
        assert entries(Tail(tmp_path / "audit", store_id, head), 12) == list(range(number + 1, 13))
    # A place that the chain never had.
    assert Tail(tmp_path / "audit", store_id, Head(5, bytes(32))).head.number == 0
    chain.close()


# --- settings and small files


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format":2,"mlkem768":"","x25519":""}', b"\xff"])
def test_what_is_no_public_half_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_recipient(content)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, None),
        ({"forward": "syslog.example:6514", "trust": "ca.pem"}, None),
        ({"forward": "[::1]:6514", "trust": "ca.pem"}, None),
        ({"forward": "syslog.example:6514"}, "audit.trust: missing"),
        ({"forward": "syslog.example", "trust": "a"}, "audit.forward: 'syslog.example' is no server with a port"),
        ({"forward": "a:65536", "trust": "a"}, "audit.forward: 'a:65536' is no server"),
        ({"certificate": "a"}, "audit.private_key: certificate and private_key go together"),
        ({"facility": 24}, "audit.facility: must be from 0 to 23"),
        ({"enterprise": 0}, "audit.enterprise: must be"),
        ({"head": "PT0M"}, "audit.head: must be from PT1M to P1D"),
        ({"head": "soon"}, "audit.head: 'soon' is no duration"),
        ({"waiting_bytes": 0}, "audit.waiting_bytes: must be from"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: str | None) -> None:
    made = msgspec.convert(settings, AuditSettings)
    errors = forwardsettings.check(made)
    assert [e[: len(error or "")] for e in errors] == ([error] if error else [])
    if made.forward and not errors:
        assert made.server() == (made.forward.rpartition(":")[0].strip("[]"), 6514)
