"""What a library warns of, or an error holds, does not get into the log, nor past it."""

from __future__ import annotations

import subprocess
import sys

import pytest

NAME = "Doe^Jane"
_SCRIPT = """
import io, logging, sys, threading, warnings
from storescp import log
log.set_up("desk", sys.argv[1], "debug")
{}
try:
    raise ValueError("Doe^Jane")
except ValueError:
    logging.getLogger("storescp").exception("it failed")
"""
_WARNING = 'warnings.warn("Doe^Jane")'
_CHILDREN = """
for name in ("pynetdicom.acse", "pydicom", "PIL.Image", "python_multipart.multipart"):
    logging.getLogger(name).critical("Doe^Jane")
"""
# The settings that a library has for a process, and one thread that changed them for a moment would take from others.
_THREADS = """
from storescp.desk.identifiers import IdentifierError, decode, lenient
lenient()
# A name where a UID should be, a birth date that is none, and an element that ends early.
bad = b"".join([
    b"\\x08\\x00\\x18\\x00UI\\x08\\x00Doe^Jane", b"\\x10\\x00\\x30\\x00DA\\x08\\x00Doe^Jane",
    b"\\x20\\x00\\x13\\x00IS\\x08\\x00Doe^Jane", b"\\x20\\x00\\x0d\\x00UI\\x40\\x00Doe^Jane",
])
def work():
    for _ in range(200):
        try:
            decode(bad, "1.2.840.10008.1.2.1")
        except IdentifierError:
            pass
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "what", [_WARNING, _CHILDREN, _THREADS], ids=["a warning", "loggers of libraries", "identifiers in threads"]
)
def test_no_value_of_a_data_set_comes_out(form: str, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(what), form],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "it failed" in done.stderr
    assert "ValueError" in done.stderr
    assert NAME not in done.stderr + done.stdout
