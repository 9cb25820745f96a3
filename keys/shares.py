"""The recovery key: its private half exists only as shares on paper, k of n; the server keeps the public half.

Source: docs/format.md, "Recovery exports"; SLIP-0039.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

# What the library promises about side channels: nothing. It is SLIP-0039's reference implementation: table lookups by
# secret bytes, no constant time, no zeroing. Here it runs twice in a recovery key's life, when an admin makes it and
# when shares are typed back, once each, on input that no peer can choose or repeat, in a process that then holds the
# opened secret in memory anyway. What is left is another user of the same processor who watches caches in just that
# moment: both are done on a machine that nobody else is on.
import shamir_mnemonic  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey
from shamir_mnemonic.wordlist import WORD_INDEX_MAP  # type: ignore[import-untyped]

from keys.seal import KEY_BYTES, Key, context, derive
from keys.versions import new_key

if TYPE_CHECKING:
    import segno

MOST_SHARES = 16
WORDS = 33
# The secret is 256 random bits, which iterations do not make harder to guess; a passphrase they do (640,000 in all).
_EXPONENT_PLAIN, _EXPONENT_PASSPHRASE = 0, 6
_MEMORY_SYSTEMS = {"tmpfs", "ramfs"}


class RecoveryError(Exception):
    """Shares or a recovery export are not what they have to be; the message says what is wrong.

    It never repeats a word of a share: messages end in terminals' histories and logs.
    """


class RecoveryKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The public half; ``id`` is made of everything that an export is sealed to."""

    created: str
    id: str
    mlkem768: bytes
    shares: int
    store_id: str
    threshold: int
    x25519: bytes

    def public(self) -> MLKEM768X25519PublicKey:
        """Return the key that exports are sealed to.

        Raises:
            RecoveryError: It is damaged.
        """
        try:
            if self.id != _id_of(bytes.fromhex(self.store_id), self.mlkem768, self.x25519):
                raise ValueError
            return MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.mlkem768), X25519PublicKey.from_public_bytes(self.x25519)
            )
        except ValueError:
            raise RecoveryError(f"the recovery key {self.id} is damaged: make a new one") from None


def new_recovery(
    store_id: bytes, shares: int, threshold: int, *, created: str, passphrase: str = ""
) -> tuple[RecoveryKey, list[str]]:
    """Return the public half of a new recovery key, and its shares.

    Args:
        store_id: The store that it is for, 16 bytes.
        shares: How many there are to be, at most 16.
        threshold: How many of them give the secret: at least 2, or 1 of 1.
        created: The time, RFC 3339.
        passphrase: What is needed besides the shares, printable ASCII; nothing says later that there is one.

    Returns:
        The public half, and each share as 33 words with single spaces.

    Raises:
        RecoveryError: The numbers or the passphrase are not possible.
    """
    if not 1 <= threshold <= shares <= MOST_SHARES:
        raise RecoveryError(f"{threshold} of {shares} shares is not possible: at most {MOST_SHARES} can be made")
    if threshold == 1 and shares > 1:
        raise RecoveryError(f"1 of {shares} shares is not possible: each would be the whole key; ask for 2 or more")
    words = _passphrase(passphrase)
    secret = new_key()
    try:
        mlkem768, x25519 = _halves(secret, store_id)
        public = mlkem768.public_key().public_bytes_raw(), x25519.public_key().public_bytes_raw()
        recovery = RecoveryKey(
            created, _id_of(store_id, *public), public[0], shares, store_id.hex(), threshold, public[1]
        )
        # A set is never extended (a new set is a new key), so shares do without the flag that old readers do not know.
        (made,) = shamir_mnemonic.generate_mnemonics(
            1,
            [(threshold, shares)],
            bytes(secret),
            words,
            extendable=False,
            iteration_exponent=_EXPONENT_PASSPHRASE if words else _EXPONENT_PLAIN,
        )
    finally:
        # What the libraries copied of it cannot be reached from here.
        secret[:] = bytes(len(secret))
    return recovery, list(made)


def combine(mnemonics: Sequence[str], passphrase: str = "") -> bytearray:
    """Return the secret, 32 bytes, that shares as typed give: any order and case, more than needed if they fit.

    A wrong passphrase gives another secret, which fits no export: SLIP-0039 cannot tell.

    Raises:
        RecoveryError: Shares are too few, mistyped, or not of one set.
    """
    words = _passphrase(passphrase)
    read = [_read(text, place) for place, text in enumerate(mnemonics, 1)]
    if not read:
        raise RecoveryError("no share was given")
    _same_set(read)
    chosen: dict[int, int] = {}
    for place, share in enumerate(read, 1):
        other = chosen.setdefault(share.index, place)
        if read[other - 1].value != share.value:
            raise RecoveryError(f"shares {other} and {place} have one number but differ: they are of different sets")
    threshold = read[0].member_threshold
    if len(chosen) < threshold:
        missing = threshold - len(chosen)
        needed = "1 more share is needed" if missing == 1 else f"{missing} more shares are needed"
        twice = "" if len(chosen) == len(read) else "; a share was given twice"
        raise RecoveryError(f"{needed}: this set needs {threshold} and {len(chosen)} came{twice}")
    texts = [" ".join(mnemonics[place - 1].split()) for place in chosen.values()]
    enough, more = texts[:threshold], texts[threshold:]
    found = _recover(enough)
    for text in more:
        _recover([*enough[1:], text])
    return bytearray(found.decrypt(words))


def check_typed_back(recovery: RecoveryKey, mnemonics: Sequence[str], passphrase: str = "") -> None:
    """Prove that shares as typed from paper give the private half of this key.

    Raises:
        RecoveryError: They do not; the paper must not be relied on.
    """
    secret = combine(mnemonics, passphrase)
    try:
        if opened(secret, bytes.fromhex(recovery.store_id))[0] != recovery.id:
            raise RecoveryError(
                f"these shares are not those of the recovery key {recovery.id}, or were made with another passphrase"
            )
    finally:
        secret[:] = bytes(len(secret))


def opened(secret: Key, store_id: bytes) -> tuple[str, MLKEM768X25519PrivateKey]:
    """Return the id of the recovery key that a secret gives for a store, and its private half."""
    mlkem768, x25519 = _halves(secret, store_id)
    public = mlkem768.public_key().public_bytes_raw(), x25519.public_key().public_bytes_raw()
    return _id_of(store_id, *public), MLKEM768X25519PrivateKey(mlkem768, x25519)


def qr_svg(mnemonic: str) -> str:
    """Return a share's QR code as an SVG document."""
    content = io.BytesIO()
    _qr(mnemonic).save(content, kind="svg", xmldecl=False, scale=4)
    return content.getvalue().decode()


def qr_terminal(mnemonic: str) -> str:
    """Return a share's QR code as text of half blocks, up to 65 columns wide, for a terminal that is light on dark."""
    content = io.StringIO()
    _qr(mnemonic).terminal(content, compact=True)
    return content.getvalue()


def memory_backed(path: Path) -> bool:
    """Tell whether a file at this path, there or not yet, is on a file system that is memory: tmpfs or ramfs.

    What tmpfs holds can still be swapped out; only a machine without swap, or with encrypted swap, excludes that.
    """
    try:
        place = path.resolve()  # a link may lead elsewhere
        while not place.exists() and place != place.parent:
            place = place.parent
        device = place.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except (OSError, RuntimeError):  # the latter: links in a circle
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = {line.split(" - ", 1)[1].split(" ", 1)[0] for line in mounts if line.split(" ", 3)[2] == number}
    return bool(kinds) and kinds <= _MEMORY_SYSTEMS


def _halves(secret: Key, store_id: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    seed = derive(secret, 64, context("derive/recovery-mlkem768", store_id))
    return (
        MLKEM768PrivateKey.from_seed_bytes(seed),
        X25519PrivateKey.from_private_bytes(derive(secret, 32, context("derive/recovery-x25519", store_id))),
    )


def _id_of(store_id: bytes, mlkem768: bytes, x25519: bytes) -> str:
    digest = Hash(SHA256())
    digest.update(context("recovery-id", store_id, mlkem768, x25519))
    return digest.finalize()[:16].hex()


def _passphrase(text: str) -> bytes:
    # SLIP-0039 knows no other characters; two keyboards would disagree about how they are encoded.
    if any(not " " <= character <= "~" for character in text):
        raise RecoveryError("the passphrase of the shares has characters that are not printable ASCII")
    return text.encode("ascii")


def _read(text: str, place: int) -> shamir_mnemonic.Share:
    typed = text.lower().split()
    for number, word in enumerate(typed, 1):
        if word not in WORD_INDEX_MAP:
            raise RecoveryError(f"word {number} of share {place} is mistyped: it is not in the list of words")
    if len(typed) != WORDS:
        raise RecoveryError(f"share {place} has {len(typed)} words; a share has {WORDS}")
    try:
        share = shamir_mnemonic.Share.from_mnemonic(" ".join(typed))
    except shamir_mnemonic.MnemonicError:
        # Not the library's own words: they begin with the share's.
        raise RecoveryError(
            f"a word of share {place} is mistyped, or two are swapped: its checksum does not fit"
        ) from None
    if share.group_count != 1 or len(share.value) != KEY_BYTES:
        raise RecoveryError(f"share {place} is a SLIP-39 share, but not one of a recovery key")
    return share


def _same_set(read: list[shamir_mnemonic.Share]) -> None:
    sets = [share.group_parameters() for share in read]
    common = Counter(sets).most_common(1)[0][0]
    for place, this in enumerate(sets, 1):
        if this != common:
            raise RecoveryError(f"share {place} is not of the same set as share {sets.index(common) + 1}")


def _recover(texts: list[str]) -> shamir_mnemonic.EncryptedMasterSecret:
    try:
        return shamir_mnemonic.recover_ems(shamir_mnemonic.decode_mnemonics(texts))
    except shamir_mnemonic.MnemonicError:
        raise RecoveryError("the shares do not fit each other: one of them is of another set") from None


def _qr(mnemonic: str) -> segno.QRCode:
    import segno  # nobody who only unlocks a store needs it

    # In capitals a share needs a code a third smaller; ``combine`` takes either.
    return segno.make_qr(mnemonic.upper(), error="m")
