"""What runs here: Python packages, the interpreter, and the C libraries inside; no network, nothing guessed."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from storescp.patch import system
from storescp.patch.debian import DebianError
from storescp.patch.versions import normalized

# This product's own name may be another project's on an index; its releases are announced elsewhere.
OURS = "strongroom"
_DATED = re.compile(r"(?:Open|Libre)SSL (\d+(?:\.\d+)*[a-z]?)\S*(?: +(\d{1,2} [A-Z][a-z]{2} \d{4}))?", re.ASCII)
_REPOSITORIES = {
    "openssl": ("https://github.com/openssl/openssl", ("openssl-{}", "OpenSSL_{}", "{}")),
    "cpython": ("https://github.com/python/cpython", ("v{}", "{}")),
    "sqlcipher": ("https://github.com/sqlcipher/sqlcipher", ("v{}", "{}")),
}


class Distribution(NamedTuple):
    """An installed Python package."""

    name: str
    version: str


class Component(NamedTuple):
    """Something that is no package of its own, or that a package brought along.

    Attributes:
        kind: ``cpython``, ``openssl`` or ``sqlcipher``.
        name: Which one, for people.
        version: Its version; empty where it could not be told.
        released: When it was released, where it says so itself.
        carrier: The Python package that brought it; empty where it is the system's.
        package: The Debian source package that it belongs to; empty where it is none's.
        repository: Where it is developed, and the tags of this release: what OSV's GIT export knows it by.
    """

    kind: str
    name: str
    version: str
    released: datetime | None = None
    carrier: str = ""
    package: str = ""
    repository: str = ""
    tags: tuple[str, ...] = ()


class Inventory(NamedTuple):
    """Everything that runs here, as far as it could be seen."""

    python: str
    distributions: tuple[Distribution, ...]
    components: tuple[Component, ...]
    debian: system.Debian
    kernel: system.Kernel
    libraries: system.Libraries


def collect() -> Inventory:
    """Look at this machine and this environment."""
    debian = system.look()
    return Inventory(
        ".".join(map(str, sys.version_info[:3])),
        distributions(),
        components(debian),
        debian,
        system.kernel(os.uname(), debian),
        system.libraries(),
    )


def distributions() -> tuple[Distribution, ...]:
    """Return the Python packages of the running environment, without this product."""
    found: dict[str, Distribution] = {}
    for distribution in metadata.distributions():
        # A damaged one has no name or version; it stays, and reads unknown.
        name = normalized(distribution.metadata["Name"] or "?")
        found.setdefault(name, Distribution(name, distribution.metadata["Version"] or ""))
    return tuple(found[name] for name in sorted(found) if name != OURS)


def components(debian: system.Debian) -> tuple[Component, ...]:
    """Return the interpreter and the libraries that are bundled or linked."""
    python = ".".join(map(str, sys.version_info[:3]))
    interpreter = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    stdlib = _mapped("libssl.so") or _mapped("/_ssl.")
    return (
        component("cpython", "CPython", python, package=_owner(interpreter, debian)),
        dated(ssl.OPENSSL_VERSION, "OpenSSL of the standard library", package=_owner(stdlib, debian)),
        dated(_cryptography(), "OpenSSL of cryptography", carrier="cryptography"),
        *_sqlcipher(),
    )


def dated(text: str, name: str, carrier: str = "", package: str = "") -> Component:
    """Return the OpenSSL that a version text speaks of, as in ``OpenSSL 3.6.0 1 Oct 2025``."""
    found = _DATED.match(text)
    released = None
    if found and found[2]:
        with contextlib.suppress(ValueError):
            released = datetime.strptime(found[2], "%d %b %Y").replace(tzinfo=UTC)
    return component("openssl", name, found[1] if found else "", released, carrier, package)


def component(
    kind: str, name: str, version: str, released: datetime | None = None, carrier: str = "", package: str = ""
) -> Component:
    """Return a component with what OSV's GIT export knows it by."""
    repository, forms = _REPOSITORIES[kind]
    # OpenSSL before 3 had tags with underscores: OpenSSL_1_1_1w.
    tags = (
        tuple(f.format(version.replace(".", "_") if f.endswith("_{}") else version) for f in forms) if version else ()
    )
    return Component(kind, name, version, released, carrier, package, repository, tags)


def _cryptography() -> str:
    try:
        from cryptography.hazmat.backends.openssl import backend

        return str(backend.openssl_version_text())
    except (ImportError, AttributeError):
        return ""


def _sqlcipher() -> tuple[Component, Component]:
    from storage import sqlite

    cipher = provider = ""
    # The provider is chosen when the first key is set: this database is empty and never written.
    database = sqlite.connect(Path(":memory:"), (bytes(32), bytes(16)))
    with contextlib.closing(database.conn):
        for pragma in ("cipher_version", "cipher_provider_version"):
            row = database.execute(f"PRAGMA {pragma}").fetchone()
            text = str(row[0]) if row else ""
            cipher, provider = (text, provider) if pragma == "cipher_version" else (cipher, text)
    return (
        component("sqlcipher", "SQLCipher of sqlcipher3", cipher.partition(" ")[0], carrier="sqlcipher3"),
        dated(provider, "OpenSSL of sqlcipher3", carrier="sqlcipher3"),
    )


def _mapped(part: str) -> Path | None:
    """Return the file of a library that this process has mapped."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and part in fields[5] and "-packages/" not in fields[5]:
            return Path(fields[5])
    return None


def _owner(file: Path | None, debian: system.Debian) -> str:
    """Return the Debian source package that a file belongs to; nothing where none does."""
    if file is None:
        return ""
    # Where /usr is merged, dpkg knows some files by the name that they had before.
    names = [str(file), *([str(file).removeprefix("/usr")] if str(file).startswith("/usr/") else [])]
    for name in names:
        with contextlib.suppress(DebianError):
            binary = system.run(["dpkg-query", "-S", name]).partition(": ")[0].partition(":")[0]
            return next((p.source for p in debian.packages if p.name == binary), "")
    return ""
