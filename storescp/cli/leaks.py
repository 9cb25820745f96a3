"""What answers a leak: from what the store is to steps in words, with the commands for it. Pure; nothing is done here.

Source: docs/keys.md, "Which verb answers which leak".
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from storescp.errors import plural

LEAKS = {
    "passphrase": "somebody else knows a passphrase of a slot",
    "key-file": "somebody else has or had a key file of a slot",
    "root-key": "the store root key, which every slot opens: from the vault's memory, or a keyring opened elsewhere",
    "version": "the root of a key version: keyring and anchors together, the vault's memory, or recovery shares",
    "study-key": "the key of a study, or of a pack",
    "gate": "somebody had the gate's process, its user or its machine",
    "backup": "a backup of the store, without anchors and without a secret of a slot",
}
_LASTING = (
    "the keyring's lasting keys, for who opened a keyring: with the signing key certificates of erasure and "
    "checkpoints "
    "of the audit chain can be forged, with the audit key the chain be read; no command replaces them. Note the audit "
    "chain's head now ('strongroom audit verify'), and keep it elsewhere"
)
_READ_BEFORE = "what was read or copied before: no new key takes that back"


class Slot(msgspec.Struct, frozen=True):
    """A way to unlock."""

    id: str
    type: str
    label: str = ""


class State(msgspec.Struct, frozen=True):
    """What the answer depends on.

    ``versions`` are those that are not destroyed, the last one current. ``rotating``: a rotation is not proved yet;
    ``reencrypting``: a re-encryption was begun. ``exports`` and ``backups`` are counted with the newest one's time;
    ``shares`` are recovery keys in use. ``key_file`` and ``credential`` are what the configuration unlocks with.
    """

    versions: tuple[int, ...]
    slots: tuple[Slot, ...]
    anchor: str = "file"
    rotating: bool = False
    reencrypting: bool = False
    shares: int = 0
    exports: int = 0
    backups: int = 0
    newest_backup: str = ""
    backup_folder: str = ""
    pending_erasures: int = 0
    destroy_after_days: int = 7
    two_users: bool = False
    key_file: str = ""
    credential: str = ""
    authority: bool = False
    command: str = "strongroom"

    @property
    def current(self) -> int:
        """The current key version."""
        return self.versions[-1]


class Step(msgspec.Struct, frozen=True):
    """Something to do: in words, why, and as commands where there are any."""

    text: str
    why: str
    commands: tuple[str, ...] = ()


class Answer(msgspec.Struct, frozen=True):
    """What answers a leak, what does not, and what copies elsewhere still hold."""

    steps: tuple[Step, ...]
    not_answered: tuple[str, ...]
    backups: tuple[str, ...]


def answer(leaked: str, state: State, *, version: int = 0, study: str = "UID") -> Answer:
    """Return the answer to a leak. Pure.

    Args:
        leaked: One of the leaks.
        state: The store's.
        version: Whose root, where that leaked.
        study: Whose key, where that leaked.
    """
    if leaked == "version":
        return _version(state, version or state.current)
    if leaked == "study-key":
        return _study_key(state, study)
    answers: dict[str, Callable[[State], Answer]] = {
        "passphrase": lambda s: _slot(s, "passphrase"),
        "key-file": lambda s: _slot(s, "key-file"),
        "root-key": _root_key,
        "gate": _gate,
        "backup": _backup,
    }
    return answers[leaked](state)


# --- the leaks


def _slot(state: State, kind: str) -> Answer:
    known = [slot for slot in state.slots if slot.type == kind]
    what = "passphrase" if kind == "passphrase" else "key file"
    if not known:
        return Answer(
            (
                Step(
                    f"This store has no slot with a {what} now: it unlocks nothing here. Look whether it belongs to "
                    "another store",
                    "a secret opens the keyrings whose slots it was made for, and no other",
                    (f"{state.command} keys slot list",),
                ),
            ),
            ("a copy of the keyring from the time when there was such a slot: then what leaked is the root key",),
            _held(state, "a keyring of that time, which it opens for ever"),
        )
    steps = [
        Step(
            f"Make another way in, and try it: a new {what}",
            "the old slot can go only when another one is there",
            _new_slot(state, kind),
        )
    ]
    if kind == "key-file" and state.key_file:
        steps.append(
            Step(
                f"Name the new key file in the configuration (unlock.key_file, now {state.key_file}) and start "
                "the vault "
                "again",
                "else the vault finds nothing to unlock with at its next start, and waits locked",
            )
        )
    which = "" if len(known) == 1 else f" ID is one of {', '.join(_called(slot) for slot in known)}."
    steps.append(
        Step(
            f"Put a new root key under all slots that stay, without the one that leaked.{which}",
            "a slot that is only removed still opens older copies of the keyring, and the root key in them is "
            "the one of "
            "today; from here on it is another",
            (_reroot(state, gone=known[0] if len(known) == 1 else None, of=kind, remove="ID"),),
        )
    )
    steps += _new_version(
        state,
        f"{what} leaked",
        "who opened an older keyring with it and had the anchors, too, has the roots of "
        f"{_named(state.versions)}; nothing that is made from now on hangs on them",
    )
    steps.append(_reencrypt_if(state, "the anchors and keys.db, too: was on this machine as root or the vault's user"))
    return Answer(
        tuple(steps),
        (_READ_BEFORE, *_lasting(state)),
        _held(
            state,
            f"a keyring of before, which the {what} opens for ever: with it the lasting keys; versions' roots in "
            "it only "
            "together with the anchors",
        ),
    )


def _root_key(state: State) -> Answer:
    steps = [
        Step(
            "Put a new root key under all slots. It needs the secret of each that stays; a slot whose secret is not at "
            "hand goes (--remove ID)",
            "the root key opens this keyring and every copy of it; from here on it is another",
            (_reroot(state),),
        ),
        *_new_version(
            state,
            "root key leaked",
            f"together with the anchors the root key gives the roots of {_named(state.versions)}; nothing "
            "that is "
            "made from now on hangs on them",
        ),
        _reencrypt_if(state, "the anchors and keys.db, too; where the vault's memory leaked, take that for certain"),
    ]
    return Answer(
        tuple(steps),
        (_READ_BEFORE, *_lasting(state)),
        _held(
            state,
            "a keyring of before, which the old root key opens for ever: with it the lasting keys; versions' "
            "roots only "
            "together with the anchors",
        ),
    )


def _version(state: State, version: int) -> Answer:
    if version not in state.versions:
        return Answer(
            (
                Step(
                    f"Version {version} is destroyed or was never made: no study key on this disk is under it. "
                    "Give what "
                    "is archived new study keys all the same, if it was used before that",
                    "rotating wraps the same study keys anew: who opened them with the old root has them still",
                    (_reencrypt(state, "--all", f"root of version {version} leaked"),),
                ),
            ),
            (_READ_BEFORE,),
            _held(state, f"study keys under version {version}, if they are old enough: its root opens them for ever"),
        )
    steps: list[Step] = []
    if version == state.current:
        steps += _new_version(
            state,
            f"root of version {version} leaked",
            f"deposits, index, ledger and every study key hang on version {version} now; first of all nothing new may",
        )
    else:
        steps += _end_of_old(state, "its anchor is of no use any more; the root that leaked opens without it")
    steps.append(
        Step(
            "Then give everything new study keys",
            f"rotating wraps the same study keys anew, and who has the root of version {version} and a copy of keys.db "
            "has those; after the rotation, so that the new ones are never under the old version",
            (_reencrypt(state, "--all", f"root of version {version} leaked"),),
        )
    )
    return Answer(
        tuple(steps),
        (
            _READ_BEFORE,
            f"a root that is in somebody's hands: destroying the anchor of version {version} kills it here, and "
            "not there",
            "deposits that were copied on their way while the version was current: their keys were sealed to it",
        ),
        _held(
            state,
            f"packs with study keys under version {version}, which its root opens for ever, whatever is destroyed "
            "here: "
            "remove those backups, wherever they are",
        ),
    )


def _study_key(state: State, study: str) -> Answer:
    return Answer(
        (
            Step(
                "Give the packs of that study new keys; others under the same key go along",
                "each pack is written anew under a key that nobody has; the old pack goes when the new one is verified",
                (_reencrypt(state, f"--study {study}", "its study key leaked"),),
            ),
            Step(
                "Look how the key got out: it exists in the memory of a gate's worker while a pack is open, and in the "
                "vault's while a pack is read",
                "if a process was read, what leaked is more: 'gate', or 'root-key' and 'version'",
                (f"{state.command} audit show --since DATE",),
            ),
        ),
        (
            _READ_BEFORE,
            "a rotation does not answer it: that wraps the same study key anew",
            "packs of the study that the gate has open just now: they have keys of their own; run it again if one of "
            "these leaked",
        ),
        _held(
            state,
            "the old packs of the study: who has its key opens them for ever, and no destruction of a version helps "
            "against the key itself. Remove those backups, wherever they are",
        ),
    )


def _gate(state: State) -> Answer:
    stop = ("systemctl stop strongroom-gate",) if state.two_users else ()
    steps = [
        Step(
            "Stop the gate. The vault may go on" if state.two_users else "Stop 'strongroom serve'",
            "who has it sees what arrives, and can forge or drop what is not admitted yet; what is admitted it cannot "
            "reach" + ("" if state.two_users else " by itself, but see the next step"),
            stop,
        )
    ]
    if not state.two_users:
        steps.append(
            Step(
                "Take for certain that the root key and the key versions leaked, too: gate and vault are one "
                "user here. "
                "Do what these say after the steps below; then run the store as two users (docs/admin.md)",
                "as one user, code in the gate can read the vault's memory and files",
                tuple(f"{state.command} keys compromise --leaked {leak}" for leak in ("root-key", "version")),
            )
        )
    steps += [
        Step(
            "Find out since when, and look at what it deposited",
            "its events say which associations it had, as far as it told the truth; what contradicts the archive is in "
            "quarantine",
            (
                f"{state.command} audit show --type gate-events --since DATE",
                f"{state.command} quarantine list",
                f"{state.command} verify",
            ),
        ),
        Step(
            "Install the gate's machine anew, with a new private key and certificate where gate.private_key and "
            "gate.certificate say" + (", and revoke the old one at the modalities" if not state.authority else ""),
            "with the old key anybody passes for this server until the certificate ends; modalities that trust its "
            "authority accept the new one",
        ),
        *_new_version(
            state,
            "the gate was taken over",
            "deposits under the old key that are brought later are refused: nothing that was prepared then gets in",
        ),
        Step(
            "Give new keys to each study that it received in that time; for all that is archived, --all",
            "a gate knows the study keys of the packs that it makes, and no others",
            (
                f"{state.command} list instance --json     # received_at says when, study which",
                _reencrypt(state, "--study UID", "received by a gate that was taken over"),
            ),
        ),
    ]
    return Answer(
        tuple(steps),
        (
            "what it saw: everything that arrived in that time",
            "what it forged: senders, times and contents of what it deposited; compare with the modalities, and "
            "erase or "
            "quarantine",
            "peers' private keys: those are with the peers; only what the peers sent is known to it",
        ),
        _held(
            state,
            "packs of that time under the study keys that the gate knew: who copied those keys opens them for ever",
        ),
    )


def _backup(state: State) -> Answer:
    steps = [
        *_new_version(
            state,
            "a backup leaked",
            f"the study keys in it are under {_named(state.versions)}; when these are destroyed, with their "
            "anchors, which are in no backup, none of it ever opens",
        ),
    ]
    guessed = [slot for slot in state.slots if slot.type == "passphrase"]
    if guessed:
        steps.append(
            Step(
                "Ask yourself whether the passphrase can be guessed: if so, what leaked is the root key",
                "the keyring in the backup can be tried without end; Argon2id makes each guess slow, and not "
                "impossible. "
                "Its versions' roots do not open without the anchors even then, but the lasting keys do",
                (f"{state.command} keys compromise --leaked root-key",),
            )
        )
    return Answer(
        tuple(steps),
        (
            "sizes, counts and times, which every copy of the store shows",
            "a recovery export beside it, for who has enough shares: then what leaked is 'version'",
            *([_pending(state)] if state.pending_erasures else []),
        ),
        _held(
            state,
            "packs and study keys of their time, each under the versions of then: the same destruction ends them all, "
            "so make a new one right after the rotation",
        ),
    )


# --- steps that several answers share


def _new_version(state: State, reason: str, why: str) -> list[Step]:
    commands = [f'{state.command} keys rotate --reason "{reason}"']
    text = f"Make key version {state.current + 1} and wrap every study key under it"
    if state.rotating:
        commands.insert(0, f"{state.command} keys rotate")
        text = f"Finish the rotation to version {state.current} that is under way, then make another version"
    return [Step(text, why, tuple(commands)), *_end_of_old(state, "")]


def _end_of_old(state: State, why: str) -> list[Step]:
    init = () if state.shares else (f"{state.command} recovery init --printer NAME",)
    days = state.destroy_after_days
    when = f"{plural(days, 'day')} after the proof" if days else "within a minute of the proof"
    return [
        Step(
            "Confirm what must be there before the old version may go: an export and a backup with the new one",
            "the new version's anchor is in no backup: without an export one dead disk loses everything",
            (
                *init,
                f"{state.command} recovery export --to FILE",
                f"{state.command} recovery confirm FILE     # the copy, off this machine",
                f"{state.command} backup --to {state.backup_folder or 'FOLDER'}",
                f"{state.command} backup confirm FOLDER     # the copy, off this machine",
            ),
        ),
        Step(
            f"See the old version destroyed: the vault does it by itself, when that is confirmed and {when} "
            "(keys.destroy_after_days)",
            why
            or (
                "until then its anchor is here, and whoever takes it together with an old copy opens that copy"
                if state.anchor == "file"
                else "until then the token still holds its anchor"
            ),
            (f"{state.command} keys status",),
        ),
    ]


def _reencrypt(state: State, scope: str, reason: str) -> str:
    return f'{state.command} keys reencrypt {scope} --reason "{reason}"'


def _reencrypt_if(state: State, had: str) -> Step:
    first = (f"{state.command} keys reencrypt",) if state.reencrypting else ()
    return Step(
        f"Only if whoever it is may have had {had}: give everything new study keys, after the rotation",
        "with all of these every study key opened to them; a rotation wraps the same study keys anew",
        (*first, _reencrypt(state, "--all", "study keys may have leaked")),
    )


def _new_slot(state: State, kind: str) -> tuple[str, ...]:
    flag = " --key-file NEW" if kind == "key-file" else ""
    return f'{state.command} keys slot add{flag} --label "new"', f"{state.command} keys slot test{flag}"


def _reroot(state: State, *, gone: Slot | None = None, of: str = "", remove: str = "") -> str:
    """Return the command that keeps all slots but one, which a new slot of its kind replaces; or all."""
    count = {kind: sum(slot.type == kind for slot in state.slots) for kind in _KINDS}
    files = ["FILE"] * count["key-file"]
    if files:
        # The new one, or the one that the configuration names.
        files[0] = "NEW" if of == "key-file" else state.key_file or "FILE"
    words = [f"{state.command} keys slot reroot"]
    words += [f"--passphrase {count['passphrase']}"] if count["passphrase"] else []
    words += [f"--key-file {file}" for file in files]
    words += [f"--credential {state.credential or 'NAME'}"] * count["credential"]
    words += ["--token MODULE:TOKEN"] * count["token"]
    return " ".join([*words, *([f"--remove {gone.id if gone else remove}"] if gone or remove else [])])


_KINDS = ("passphrase", "key-file", "credential", "token")


def _called(slot: Slot) -> str:
    return f"{slot.id} ({slot.label})" if slot.label else slot.id


def _lasting(state: State) -> list[str]:
    authority = (
        "the authority's key, for who opened a keyring: it issues certificates that pass for peers bound by name; bind "
        "peers by certificate or key ('strongroom peer list' shows how)"
    )
    return [_LASTING, *([authority] if state.authority else []), *([_pending(state)] if state.pending_erasures else [])]


def _pending(state: State) -> str:
    return (
        f"{plural(state.pending_erasures, 'erasure')} still pending: until the versions that each waits for are "
        "destroyed, copies of before bring the studies back for who opens them"
    )


def _held(state: State, what: str) -> tuple[str, ...]:
    """Return what copies elsewhere hold, as far as the store knows of any."""
    if state.backups:
        known = f"{plural(state.backups, 'backup')} made here, the newest at {state.newest_backup}: {what}"
    else:
        known = f"no backup is known here; file system snapshots and copies that others made hold {what}"
    exports = (
        f"{plural(state.exports, 'recovery export')}: the roots of the versions of their time, for who has "
        "enough "
        "shares. Old ones are of no use to you once a newer one is confirmed: destroy them"
    )
    return (known, *([exports] if state.exports else []))


def _named(versions: tuple[int, ...]) -> str:
    return f"version{'' if len(versions) == 1 else 's'} {', '.join(map(str, versions))}"
