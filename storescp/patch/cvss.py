"""The severity of a CVSS 3 vector, from its base score.

Source: FIRST, Common Vulnerability Scoring System v3.1, sections 5 and 7.
"""

from __future__ import annotations

import math

_WEIGHTS = {
    "AV": {"N": 0.85, "A": 0.62, "L": 0.55, "P": 0.2},
    "AC": {"L": 0.77, "H": 0.44},
    "UI": {"N": 0.85, "R": 0.62},
    "C": {"H": 0.56, "L": 0.22, "N": 0.0},
    "I": {"H": 0.56, "L": 0.22, "N": 0.0},
    "A": {"H": 0.56, "L": 0.22, "N": 0.0},
}
_PRIVILEGES = {"U": {"N": 0.85, "L": 0.62, "H": 0.27}, "C": {"N": 0.85, "L": 0.68, "H": 0.5}}


def base_score(vector: str) -> float | None:
    """Return the base score of ``CVSS:3.1/AV:N/...``, 0.0 to 10.0; None where the vector is of another kind."""
    head, _, rest = vector.partition("/")
    metrics = dict(part.split(":", 1) for part in rest.split("/") if part.count(":") == 1)
    if head not in {"CVSS:3.0", "CVSS:3.1"}:
        return None
    try:
        weight = {name: values[metrics[name]] for name, values in _WEIGHTS.items()}
        changed = metrics["S"] == "C"
        privileges = _PRIVILEGES[metrics["S"]][metrics["PR"]]
    except KeyError:
        return None
    base = 1 - (1 - weight["C"]) * (1 - weight["I"]) * (1 - weight["A"])
    impact = 7.52 * (base - 0.029) - 3.25 * (base - 0.02) ** 15 if changed else 6.42 * base
    if impact <= 0:
        return 0.0
    exploitability = 8.22 * weight["AV"] * weight["AC"] * privileges * weight["UI"]
    return _round_up(min((1.08 if changed else 1.0) * (impact + exploitability), 10))


def severity(vector: str) -> str:
    """Return ``critical``, ``high``, ``medium`` or ``low``; nothing where the vector is of another kind."""
    score = base_score(vector)
    if score is None:
        return ""
    return "critical" if score >= 9 else "high" if score >= 7 else "medium" if score >= 4 else "low"


def _round_up(value: float) -> float:
    # The standard's own way, so that 8.6000001 does not become 8.7.
    whole = round(value * 100_000)
    return whole / 100_000 if whole % 10_000 == 0 else (math.floor(whole / 10_000) + 1) / 10
