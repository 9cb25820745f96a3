"""The sheet for a vendor's engineer: where a peer connects to, by what it may do, and what shows that it works."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import msgspec

from storescp.config import Config, parse_address
from storescp.peers import PeerFile

_QUERIES = {"find", "get", "move"}
_TRIED = "Test it from a computer that has {program}, in the folder of these files; {wanted}:\n\n  {command}\n"


class Issued(msgspec.Struct, frozen=True):
    """What was issued: file names, until when, and the authority's SHA-256 with colons."""

    key: str
    certificate: str
    authority: str
    until: str
    fingerprint: str


def sheet(config: Config, peer: PeerFile, issued: Issued, host: str) -> str:
    """Return the sheet of a peer.

    Args:
        config: Says where gate and desk listen.
        peer: Says what it may do.
        issued: What it connects with.
        host: This server's name or address, for whoever connects; empty for what the configuration listens on.
    """
    return "\n".join(_parts(config, peer, issued, host))


def closed(config: Config, peer: PeerFile) -> list[str]:
    """Return what a peer may do that nobody here listens for, each with the setting that opens it."""
    desk = config.settings.desk
    found = []
    if _QUERIES & set(peer.operations) and not desk.listen:
        found.append("queries and retrieval are closed: 'desk.listen' in the configuration names where they are asked")
    if peer.roles and not desk.web:
        found.append("DICOMweb is closed: 'desk.web' in the configuration names where it is asked")
    return found


def _parts(config: Config, peer: PeerFile, issued: Issued, host: str) -> Iterator[str]:
    settings, title = config.settings, peer.ae_title
    heading = f"Strongroom: how {title} connects"
    yield f"{heading}\n{'=' * len(heading)}\n"
    titles = {"Called AE title": settings.gate.ae_title, "Calling AE title": title}
    files = f"+tls {issued.key} {issued.certificate} +cf {issued.authority}"
    aes = f"-aet {shlex.quote(title)} -aec {shlex.quote(settings.gate.ae_title)}"
    if {"store", "echo", "commit"} & set(peer.operations):
        name, port = _place(settings.gate.listen[0], host)
        yield _section("Set up at the device, DICOM storage destination:", {"Host": name, "Port": port} | titles)
    if _QUERIES & set(peer.operations) and settings.desk.listen:
        name, port = _place(settings.desk.listen[0], host)
        may = ", ".join(f"C-{operation.upper()}" for operation in peer.operations if operation in _QUERIES)
        yield _section(f"Query and retrieval ({may}):", {"Host": name, "Port": port} | titles)
    if peer.roles and settings.desk.web:
        yield _section("DICOMweb:", {"Address": _url(settings.desk.web[0], host), "May": _may(peer)})
    yield _section(
        "All of it:",
        {
            "Security": "TLS 1.2 or 1.3 with a client certificate (DICOM PS3.15 B.12, BCP 195)",
            "Device's private key": issued.key,
            "Device's certificate": f"{issued.certificate}, valid until {issued.until}",
            "Authority (CA)": issued.authority,
            "CA fingerprint": issued.fingerprint,
            "": "(SHA-256; compare it by another way than the one this sheet came)",
        },
    )
    yield "Keep the private key on the device only, and delete it from wherever it was carried.\n"
    if "echo" in peer.operations:
        name, port = _place(settings.gate.listen[0], host)
        command = f"echoscu -v {aes} {files} {name} {port}"
        yield _TRIED.format(program="DCMTK", wanted='"Success" at the end is what you want', command=command)
    if "find" in peer.operations and settings.desk.listen:
        name, port = _place(settings.desk.listen[0], host)
        command = (
            f"findscu -S {aes} {files} {name} {port} -k QueryRetrieveLevel=STUDY -k StudyInstanceUID -k StudyDate="
        )
        yield _TRIED.format(program="DCMTK", wanted="a response for each study that it sees", command=command)
    if peer.roles and settings.desk.web:
        url = _url(settings.desk.web[0], host)
        command = f"curl --cacert {issued.authority} --cert {issued.certificate} --key {issued.key}"
        if {"reader", "admin"} & set(peer.roles):
            wanted = "studies as JSON, or nothing"
            command += f" '{url}/studies?limit=1'"
        else:
            wanted = '"415" at the end says that it may store, and that this was nothing'
            command += f" -o /dev/null -w '%{{http_code}}\\n' -X POST {url}/studies"
        yield _TRIED.format(program="curl", wanted=wanted, command=command)


def _section(heading: str, rows: dict[str, str]) -> str:
    return f"{heading}\n\n" + "".join(f"  {name:23}{value}\n" for name, value in rows.items())


def _may(peer: PeerFile) -> str:
    stores = "store (STOW-RS)" if {"sender", "admin"} & set(peer.roles) else ""
    reads = "search and retrieve (QIDO-RS, WADO-RS)" if {"reader", "admin"} & set(peer.roles) else ""
    return ", ".join(filter(None, (stores, reads)))


def _place(address: str, host: str) -> tuple[str, str]:
    own, port = parse_address(address)
    return host or own, str(port)


def _url(address: str, host: str) -> str:
    name, port = _place(address, host)
    return f"https://{f'[{name}]' if ':' in name else name}:{port}/dicomweb"
