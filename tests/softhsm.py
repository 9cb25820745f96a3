"""Tokens of SoftHSM's: a real PKCS#11 module, its tokens in a folder of the test's."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from keys.slots import Token, TokenPlace

PIN = "4711-0815"


class SoftHsm:
    """Tokens in a folder, which can be pulled out and put back."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.tokens = folder / "tokens"
        self.tokens.mkdir()
        self.config = folder / "softhsm2.conf"
        self.config.write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        places = ("/usr/lib/softhsm", "/usr/lib/x86_64-linux-gnu/softhsm", "/usr/lib/aarch64-linux-gnu/softhsm")
        self.module = next((f"{p}/libsofthsm2.so" for p in places if Path(f"{p}/libsofthsm2.so").exists()), places[0])

    def make(self, label: str, pin: str = PIN) -> Path:
        """Initialise a token and return its folder."""
        before = set(self.tokens.iterdir())
        command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", "12345678"]
        environment = {"PATH": os.environ["PATH"], "SOFTHSM2_CONF": str(self.config)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        (made,) = set(self.tokens.iterdir()) - before
        return made

    def pull(self, token: Path) -> None:
        """Take a token out."""
        token.rename(self.folder / token.name)

    def put_back(self, token: Path) -> None:
        """Put a token back in."""
        (self.folder / token.name).rename(token)

    def place(self, label: str = "one", key: str = "") -> TokenPlace:
        return TokenPlace(self.module, label, key)

    def secret(self, label: str = "one", pin: str = PIN, key: str = "") -> Token:
        return Token(pin, self.place(label, key))


@contextlib.contextmanager
def attached(folder: Path) -> Iterator[SoftHsm]:
    """SoftHSM with no token; for a fixture."""
    made = SoftHsm(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(made.config))
        yield made
