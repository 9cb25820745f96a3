"""``keys report``: the life of every key, with each rotation's proof checked, for whoever must not take our word."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys import encoding
from keys.seal import context
from storescp import clock
from storescp.cli import output
from storescp.cli.session import config_of, vault
from storescp.errors import FINDINGS


@click.command("report")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def report_command(given: str | None, /, as_json: bool) -> int:
    r"""Say what an inspector asks about keys: versions, rotations and their proofs, slots, recovery, erasures.

    Each rotation's proof is checked here, with the store's public key of the configuration. A proof says that no study
    key record named the old version any more, and that every one opened under the new one.

    \b
    Examples:
      $ strongroom keys report
      $ strongroom keys report --json > keys-2026-q4.json
    Exit status: 0 said, 4 locked, 6 a proof does not verify.
    """
    config = config_of(given)
    with vault(config) as client:
        found = client.json("GET", "/v1/keys/report")
        found["warnings"] = client.json("GET", "/v1/status")["warnings"]
    found["signing_key"] = f"ed25519:{encoding.to_base64(config.signing_key).decode()}"
    for rotation in found["rotations"]:
        rotation["fault"] = fault(rotation, config.signing_key, found["store_id"])
    if as_json:
        output.document(found)
    else:
        for title, columns, rows in tables(found):
            click.echo(f"\n{title}")
            if rows:
                output.table(columns, rows)
            else:
                click.echo("none")
        for warning in found["warnings"]:
            click.echo(f"WARNING: {warning}")
    return FINDINGS if any(r["fault"] for r in found["rotations"]) else 0


def fault(rotation: dict[str, Any], signing_key: bytes, store_id: str) -> str:
    """Return why a rotation's proof does not hold, empty where it does, or where there is none to check yet.

    Args:
        rotation: As the ledger has it; ``proof`` is what the store signed.
        signing_key: The store's raw Ed25519 public key, from another source than the vault.
        store_id: The store's.
    """
    if not rotation["proof"]:
        return "the old version was destroyed without a proof" if rotation["destroyed"] else ""
    try:
        signed = msgspec.json.decode(rotation["proof"])
        proof, signature = signed["proof"], encoding.from_base64(signed["signature"])
        Ed25519PublicKey.from_public_bytes(signing_key).verify(
            signature, context("rotation-proof") + encoding.canonical(proof)
        )
        of = proof["store_id"], proof["version"], proof["old"]
    except (InvalidSignature, ValueError, KeyError, TypeError, msgspec.MsgspecError):
        return "this store did not sign the proof, or it was changed"
    if of != (store_id, rotation["version"], rotation["old"]):
        return "the proof is of another rotation"
    return ""


Table = tuple[str, list[str], list[list[Any]]]


def tables(found: dict[str, Any]) -> list[Table]:
    """Return a report as tables: titles, columns, rows. Pure."""
    now = clock.parse(found["time"])
    return [
        (
            f"Store {found['store_id']} at {found['time']}; key version {found['version']} is current",
            ["Version", "Created", "State", "Anchor", "NIST SP 800-88", "Named by"],
            [
                [v["version"], v["created"], v["state"], v["anchor"], v["grade"], _named_by(v, found)]
                for v in found["versions"]
            ],
        ),
        (
            "Rotations",
            ["To", "Begun", "By", "Reason", "Proof", "Study keys", "Old version"],
            [
                [r["version"], r["begun"], r["uid"], r["reason"], _proof(r), _records(r), _end(r)]
                for r in found["rotations"]
            ],
        ),
        (
            "Re-encryptions",
            ["Id", "Begun", "By", "Reason", "Of", "Packs", "Ended", "Left as they were"],
            [
                [r["id"], r["begun"], r["uid"], r["reason"], _scope(r), r["done"], r["ended"] or "-", len(r["left"])]
                for r in found["reencryptions"]
            ],
        ),
        (
            "Slots",
            ["Id", "Type", "Label", "Created", "Age"],
            [[s["id"], s["type"], s["label"], s["created"], _age(s["created"], now)] for s in found["slots"]],
        ),
        (
            "Recovery keys",
            ["Id", "Created", "Shares"],
            [[k["id"], k["created"], f"{k['threshold']} of {k['shares']}"] for k in found["recovery_keys"]],
        ),
        (
            "Recovery exports",
            ["Id", "Created", "Recovery key", "Opens versions", "Confirmed", "Retired"],
            [
                [e["id"], e["created"], e["recovery"], _numbers(e["versions"]), e["confirmed"] or "no", e["retired"]]
                for e in found["exports"]
            ],
        ),
        (
            "Backups",
            ["Id", "Created", "Folder", "From version", "Packs", "Confirmed"],
            [
                [b["id"], b["created"], b["folder"], b["version"], b["packs"], b["confirmed"] or "no"]
                for b in found.get("backups", [])
            ],
        ),
        (
            "Erasures",
            ["Id", "Begun", "Erased", "State", "Waits for the end of versions"],
            [
                [e["id"], e["begun"], e["erased"], "final" if e["final"] else "pending", _waits(e)]
                for e in found["erasures"]
            ],
        ),
    ]


def _named_by(version: dict[str, Any], found: dict[str, Any]) -> str:
    if version["state"] == "destroyed":
        named = [f"{a['anchor']} anchor of before, {a['id']}, not proved to be gone" for a in version["former_anchors"]]
        return "; ".join(named) or "nothing: destroyed"
    count = len(version["exports"]), sum(b["version"] <= version["version"] for b in found.get("backups", []))
    named = [
        output.plural(version["study_keys"], "study key") if version["study_keys"] else "",
        "index and ledger" if version["databases"] else "",
        output.plural(count[0], "recovery export") if count[0] else "",
        f"perhaps {output.plural(count[1], 'backup')}" if count[1] else "",
        output.plural(len(version["erasures"]), "pending erasure") if version["erasures"] else "",
    ]
    return ", ".join(filter(None, named)) or "nothing here"


def _proof(rotation: dict[str, Any]) -> str:
    if rotation["fault"]:
        return f"DOES NOT VERIFY: {rotation['fault']}"
    return f"verifies, {rotation['proved']}" if rotation["proof"] else "none yet: under way"


def _records(rotation: dict[str, Any]) -> str:
    if rotation["fault"] or not rotation["proof"]:
        return ""
    return str(msgspec.json.decode(rotation["proof"])["proof"]["records"])


def _end(rotation: dict[str, Any]) -> str:
    waived = "".join(f"; {kind} waived: {why}" for kind, why in sorted(rotation["waived"].items()))
    if rotation["destroyed"]:
        return f"{rotation['old']} destroyed {rotation['destroyed']}{waived}"
    waits = f" until {rotation['waits_for']}" if rotation["waits_for"] else ""
    return f"{rotation['old']} stays{waits}{waived}"


def _scope(reencryption: dict[str, Any]) -> str:
    return f"version {reencryption['version']}" if reencryption["version"] else str(reencryption["scope"])


def _waits(erasure: dict[str, Any]) -> str:
    # Version 0 stands for a key that another study goes on using.
    return "" if erasure["final"] else ", ".join(str(v) if v else "a key that is shared" for v in erasure["versions"])


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _age(created: str, now: datetime) -> str:
    return output.plural(max(0, (now - clock.parse(created)).days), "day")
