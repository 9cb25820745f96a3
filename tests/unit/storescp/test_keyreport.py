"""The key report: a proof that the store did not sign, or of another rotation, is found; everything is in a table."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys import encoding
from keys.seal import context
from storescp.cli.keyreport import fault, tables

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = SIGNING.public_key().public_bytes_raw()
STORE = "ab" * 16


def rotation(*, label: str = "rotation-proof", **changes: Any) -> dict[str, Any]:
    proof = {
        "store_id": STORE,
        "version": 2,
        "old": 1,
        "records": 7,
        "digest": "00",
        "format": 1,
        "time": "t",
    } | changes
    signature = SIGNING.sign(context(label) + encoding.canonical(proof))
    signed = {"proof": proof, "signature": encoding.to_base64(signature).decode()}
    known = {"version": 2, "old": 1, "uid": 0, "reason": "quarterly", "begun": "2026-01-31T12:00:00Z"}
    known |= {
        "proved": "2026-01-31T12:00:01Z",
        "waived": {"export": "none yet"},
        "destroyed": "",
        "waits_for": "a backup",
    }
    return known | {"proof": encoding.canonical(signed).decode()}


def test_a_proof_holds_with_the_stores_key_alone() -> None:
    assert fault(rotation(), KEY, STORE) == ""
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    assert "did not sign" in fault(rotation(), other, STORE)
    assert "did not sign" in fault(rotation(label="certificate"), KEY, STORE)


@pytest.mark.parametrize("changed", [{"version": 3}, {"old": 0}, {"store_id": "cd" * 16}])
def test_a_proof_of_another_rotation_or_store_is_none(changed: dict[str, Any]) -> None:
    assert fault(rotation(**changed), KEY, STORE) == "the proof is of another rotation"


def test_any_byte_of_a_proof_that_is_changed_is_found_and_nothing_else_is_raised() -> None:
    whole, chance = rotation(), random.Random(5)
    text = whole["proof"]
    for _ in range(300):
        at = chance.randrange(len(text))
        broken = text[:at] + chance.choice('0aA{}[]",:\\') + text[at + 1 :]
        if broken != text:
            assert fault(whole | {"proof": broken}, KEY, STORE), broken
    for broken in ("[]", "{}", "1", '{"proof": 1, "signature": 1}', '{"proof": {}, "signature": ""}', "\\"):
        assert fault(whole | {"proof": broken}, KEY, STORE)


def test_a_rotation_under_way_has_nothing_to_check_and_a_destruction_without_a_proof_is_a_finding() -> None:
    assert fault(rotation() | {"proof": ""}, KEY, STORE) == ""
    assert fault(rotation() | {"proof": "", "destroyed": "2026"}, KEY, STORE)


def test_a_report_shows_everything_that_an_inspector_asks_for() -> None:
    base = {"anchor": "file", "grade": "clear", "exports": [], "erasures": [], "former_anchors": []}
    old = base | {"version": 1, "created": "2025-11-22T00:00:00Z", "state": "old", "study_keys": 0, "databases": False}
    new = base | {
        "version": 2,
        "created": "2026-01-31T12:00:00Z",
        "state": "current",
        "study_keys": 7,
        "databases": True,
    }
    gone = base | {"version": 3, "created": "x", "state": "destroyed", "study_keys": 0, "databases": False}
    found = {
        "store_id": STORE,
        "time": "2026-02-10T12:00:00Z",
        "version": 2,
        "versions": [
            old | {"exports": ["e1"], "erasures": ["x1"]},
            new,
            gone | {"former_anchors": [{"id": "anchor-1", "anchor": "file"}]},
        ],
        "rotations": [rotation() | {"fault": ""}, rotation() | {"fault": "changed", "destroyed": "2026-02-09"}],
        "reencryptions": [
            {"id": "r1", "begun": "b", "uid": 0, "reason": "x", "scope": "version", "version": 2, "done": 3}
            | {"ended": "", "left": {"p": "damaged"}}
        ],
        "slots": [{"id": "s1", "type": "key-file", "label": "first", "created": "2026-01-31T12:00:00Z"}],
        "recovery_keys": [{"id": "k1", "created": "c", "shares": 5, "threshold": 3}],
        "exports": [{"id": "e1", "created": "c", "recovery": "k1", "versions": [1], "confirmed": "", "retired": ""}],
        "backups": [{"id": "b1", "created": "c", "folder": "/srv/b", "version": 1, "packs": 4, "confirmed": "when"}],
        "erasures": [
            {"id": "x1", "begun": "b", "erased": "e", "final": "", "versions": [0, 1], "instances": 3},
            {"id": "x2", "begun": "b", "erased": "e", "final": "f", "versions": [1], "instances": 3},
        ],
    }  # fmt: skip
    made = {title.split(" ")[0]: (columns, rows) for title, columns, rows in tables(found)}
    assert all(len(row) == len(columns) for columns, rows in made.values() for row in rows)
    assert [row[-1] for row in made["Store"][1]] == [
        "1 recovery export, perhaps 1 backup, 1 pending erasure",
        "7 study keys, index and ledger, perhaps 1 backup",
        "file anchor of before, anchor-1, not proved to be gone",
    ]
    assert [row[4:] for row in made["Rotations"][1]] == [
        ["verifies, 2026-01-31T12:00:01Z", "7", "1 stays until a backup; export waived: none yet"],
        ["DOES NOT VERIFY: changed", "", "1 destroyed 2026-02-09; export waived: none yet"],
    ]
    assert made["Slots"][1][0][-1] == "10 days"
    assert made["Re-encryptions"][1][0][4:] == ["version 2", 3, "-", 1]
    assert [row[3:] for row in made["Erasures"][1]] == [["pending", "a key that is shared, 1"], ["final", ""]]
    # A store that never made a backup, or an older vault, has none to show.
    del found["backups"]
    assert {title: rows for title, _, rows in tables(found)}["Backups"] == []
