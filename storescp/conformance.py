"""The DICOM conformance statement of a configuration, in the structure of PS3.2 Annex N. Pure: settings in, text out.

What can be counted comes from the code that acts: classes and syntaxes from what the gate negotiates, statuses from its
table of refusals, TLS from its context, limits from the settings. No peer is named: a statement is given to others.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydicom._uid_dict import UID_dictionary
from pynetdicom.sop_class import _STORAGE_CLASSES

from storescp import __version__, conformancedesk, peers
from storescp.config import Config, parse_address
from storescp.gate import status
from storescp.gate.incoming import HEAD_BUFFER_LIMIT
from storescp.gate.negotiate import may_use
from storescp.gate.status import OF_THE_WEB, Reason
from storescp.gate.tls import strict_context
from storescp.gate.transfer import ENCODINGS, STORAGE_CLASSES, VERIFICATION
from storescp.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from storescp.peers import OPERATIONS, Peer, PeerFile, Peers

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_SERVICES = {
    "echo": "Verification",
    "store": "Storage",
    "commit": "Storage Commitment",
    "find": "Query/Retrieve, C-FIND",
    "move": "Query/Retrieve, C-MOVE",
    "get": "Query/Retrieve, C-GET",
}


def statement(config: Config, found: Peers) -> str:
    """Return the statement as Markdown.

    Args:
        config: The configuration.
        found: Its peers. Without any, the tables say what a peer with the defaults may use.
    """
    known = list(found.by_title.values()) or [default_peer()]
    sections = [
        _head(config, found),
        _overview(config, known),
        _contents(),
        _introduction(),
        _model(config),
        _services(config),
        _configuration(config, found),
        _network(config, known),
        _security(config),
        _annexes(),
    ]
    return "\n\n".join(sections) + "\n"


def default_peer(*operations: str) -> Peer:
    """Return a peer whose file says nothing but its title, that it needs no certificate, and what it may do."""
    file = PeerFile(ae_title="ANY", plaintext=True)
    file.operations = list(operations) or file.operations
    return peers.parse(peers.render(file), Path("any.toml"))


def classes(known: Iterable[Peer]) -> list[str]:
    """Return the abstract syntaxes that at least one of some peers may use, in the order of their numbers."""
    known = list(known)
    private = {uid for peer in known for uid in peer.private_sop_classes}
    offered = {VERIFICATION} | STORAGE_CLASSES | private
    return sorted((uid for uid in offered if any(may_use(peer, uid) for peer in known)), key=_order)


def served(config: Config, operation: str) -> bool:
    """Tell whether a peer that may do one operation alone can do anything at all."""
    if operation in {"echo", "store"}:
        return bool(classes([default_peer(operation)]))
    return conformancedesk.serves(config, operation)


def suites(context: ssl.SSLContext) -> list[tuple[str, str]]:
    """Return protocol and name of each cipher suite that a context takes, by its preference."""
    return [(suite["protocol"].replace("v", " "), suite["name"]) for suite in context.get_ciphers()]


def _head(config: Config, found: Peers) -> str:
    count = len(found.by_title)
    confined = sum(bool(peer.sop_classes) for peer in found.by_title.values())
    said = (
        "No peer is configured, so nobody can associate: the tables say what a peer with the default settings may use."
        if not count
        else f"Peers configured: {count}, of them confined to some Storage SOP Classes: {confined}. The tables say "
        "what at least one of them may use."
    )
    return f"""# DICOM conformance statement of Strongroom {__version__}

`strongroom conformance` writes this statement from a configuration; sections follow PS3.2 Annex N, whose numbers
they keep without the N. This one is of AE `{config.settings.gate.ae_title}`.

{said}"""


def _overview(config: Config, known: Sequence[Peer]) -> str:
    offered = classes(known)
    services = [
        [
            _SERVICES[name],
            "Yes" if name == "store" and config.settings.desk.listen else "No",
            "Yes" if served(config, name) and any(name in p.operations for p in known) else "No",
        ]
        for name in OPERATIONS
    ]
    stored = [[_name(uid), f"`{uid}`"] for uid in offered if uid != VERIFICATION]
    return f"""## 1 Overview

Strongroom receives instances over mutually authenticated TLS, seals each study under a key of its own before a byte
of it reaches the disk, and keeps them until a rule or an admin erases them. It creates, changes, displays and
prints none. Admins list and export on the machine itself.

### 1.1 Content and transfer

Instances of these {len(stored)} SOP Classes are received and kept as they arrive. None is created, modified or
displayed.

{_table(["SOP Class", "UID"], stored)}

#### 1.1.1 Structured reports

Instances with structured content are kept as any other; no template is interpreted.

### 1.2 DIMSE services

{_table(["Service", "SCU", "SCP"], services)}

Basic Worklist Management, Modality Performed Procedure Step, Unified Procedure Step, Instance Availability
Notification and Print Management: neither SCU nor SCP.

### 1.3 DICOM Web Services

{"By the desk: docs/dicomweb.md." if config.settings.desk.web else "None."}

### 1.4 Media services

None are claimed. `strongroom export` writes DICOM files (PS3.10) without a DICOMDIR, see 5.4.

### 1.5 Real-Time Video

None.

### 1.6 De-identification

None.

### 1.7 Specific Character Sets

Data sets are kept in whatever character set they arrive in, known or not. The index is UTF-8: text is decoded by
Specific Character Set (0008,0005); what does not decode is kept as bytes beside it, and the instance is stored all
the same."""


def _contents() -> str:
    return """## 2 Table of contents

1 Overview; 2 Table of contents; 3 Introduction; 4 Implementation model; 5 Service and interoperability description;
6 Configuration; 7 Network and media communication details; 8 Security; Annexes A to E."""


def _introduction() -> str:
    return f"""## 3 Introduction

### 3.1 Revision history

This statement is of release {__version__}; CHANGELOG.md says what changed.

### 3.2 Audience

Whoever connects a device to this server, and knows DICOM.

### 3.3 Remarks

Two statements that match make interoperability likely; a test shows it. `strongroom peer test` watches a device's
connection and says what is wrong.

### 3.4 Terms and definitions

Those of PS3.1 to PS3.18. *Gate*: the process that receives. *Vault*: the process that holds the keys. *Admitted*:
moved from where the gate wrote it into the archive.

### 3.5 Abbreviations

AE: Application Entity. PDU: Protocol Data Unit. SCU, SCP: Service Class User and Provider. SOP: Service-Object
Pair. UID: Unique Identifier.

### 3.6 References

DICOM PS3.1 to PS3.18; RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2), RFC 9325 (BCP 195), RFC 5280 (certificates and
revocation lists)."""


def _model(config: Config) -> str:
    title = config.settings.gate.ae_title
    return f"""## 4 Implementation model

### 4.1 Application Entities and data flow

One Application Entity, `{title}`: a device requests an association, sends instances by C-STORE, and has each
answered when it is sealed and durable on this machine's disk. Then the vault admits it to the archive, while the
device may go on. A locked vault changes nothing for devices: it admits when it is unlocked.

#### 4.1.1 Functional definition of `{title}`

{_initiates(config)}"""


def _initiates(config: Config) -> str:
    if not config.settings.desk.runs:
        return "It accepts associations and initiates none."
    return (
        "It accepts associations. Its desk, a process of its own with listeners of its own, initiates them to send "
        "what is moved (C-STORE) and to report storage commitment (N-EVENT-REPORT)."
    )


def _services(config: Config) -> str:
    title = config.settings.gate.ae_title
    mapping = [[_SERVICES[name], f"`{title}`", "SCP"] for name in OPERATIONS if served(config, name)]
    return f"""## 5 Service and interoperability description

### 5.1 Mapping of services to Application Entities

{_table(["Service", "Application Entity", "Role"], mapping)}

### 5.2 DIMSE services

#### 5.2.1 to 5.2.4 Worklist, performed procedure steps, instance availability

Not supported.

#### 5.2.5 Storage

##### 5.2.5.1 SCU

{"For C-MOVE and C-GET, see 5.2.7." if config.settings.desk.listen else "Not supported."}

##### 5.2.5.2 SCP

- **Level of conformance: 2 (Full).** All attributes, Private ones too, are kept; none is validated, changed or dropped.
- **Level of digital signature support: 3** (bit preserving). The encoded data set is kept byte for byte, in its
  transfer syntax.
- **Coercion of attributes:** none, and so no warning status.
- **When Success is answered:** when the instance is sealed and its file is synced. Another copy does not exist then.
- **The same SOP Instance UID again:** the same content is answered with Success and kept once, or in another
  transfer syntax kept beside. Other content is answered with Success, never replaces what is there, and waits in
  quarantine for an admin.
- **Access:** by `list` and `export` on this machine, and by the desk (5.2.7). The gate and the vault decode no pixel.
- **How long:** {_keeping(config)}
- **Study and Series Instance UID** must be in the data set, and SOP Class and Instance UID the same as in the
  command; up to {HEAD_BUFFER_LIMIT >> 20} MiB may come before them.

#### 5.2.6 Storage Commitment

{conformancedesk.commitment(config)}

#### 5.2.7 Query/Retrieve

{conformancedesk.retrieval(config, _table)}

#### 5.2.8 Print Management

Not supported.

### 5.3 DICOM Web Services

{conformancedesk.web(config, _table)}

### 5.4 Media services

No application profile is claimed. Exported files have a File Meta Information of this server's own and the data set
as it arrived. **Preamble** (PS3.10 7.1): C-STORE carries none, so none is taken over; the one that is written is
128 zero bytes, and no file can be anything else besides DICOM.

### 5.5 Real-Time Video

Not supported.

### 5.6 Cross-service considerations

None.

### 5.7 Specific Character Sets

As 1.7."""


def _keeping(config: Config) -> str:
    rules = config.settings.retention.rules
    if not rules:
        return "until an admin erases it; no retention rule is configured."
    return f"until one of {len(rules)} retention rules or an admin erases it."


def _configuration(config: Config, found: Peers) -> str:
    gate = config.settings.gate
    rows = [
        ["AE title", f"`{gate.ae_title}`", "gate.ae_title"],
        ["Listens on", ", ".join(f"`{address}`" for address in gate.listen), "gate.listen"],
        ["Maximum PDU size received", f"{gate.maximum_pdu} bytes", "gate.maximum_pdu"],
        ["Associations at a time", str(gate.maximum_associations), "gate.maximum_associations"],
        ["Of these, from one address", str(gate.maximum_per_address), "gate.maximum_per_address"],
        ["TLS handshake, and association request", f"{gate.request_seconds} s each", "gate.request_seconds"],
        ["An association that sends nothing", f"{gate.idle_seconds} s", "gate.idle_seconds"],
        ["One message in all", f"{gate.message_seconds} s", "gate.message_seconds"],
        ["Free space that receiving leaves", f"{config.settings.store.reserve_bytes} bytes", "store.reserve_bytes"],
    ]
    return f"""## 6 Configuration

### 6.1 General parameters

{_table(["Parameter", "Value here", "Setting"], rows)}

### 6.2 DIMSE services

Each peer has a file: its calling AE title, how it proves itself (a certificate, a key, or a name issued by an
authority), the addresses that it may come from, what it may do (`{"`, `".join(_operations(config))}`), to which Storage
SOP Classes it is confined, which Private ones it may store besides, and how many associations at a time, objects a
minute and bytes a day. Configured: {len(found.by_title)}.

### 6.3 to 6.5 Web, media, real-time video

Nothing to configure.

### 6.6 Audit trail

{_forwarded(config)}"""


def _operations(config: Config) -> list[str]:
    return [name for name in OPERATIONS if served(config, name)]


def _network(config: Config, known: Sequence[Peer]) -> str:
    gate = config.settings.gate
    offered = classes(known)
    storage = len([uid for uid in offered if uid != VERIFICATION])
    contexts = [["Verification", f"`{VERIFICATION}`", "all of the next table", "SCP", "none"]] * (
        VERIFICATION in offered
    )
    contexts += [[f"the {storage} of 1.1", "see there", "all of the next table", "SCP", "none"]] if storage else []
    contexts += [*conformancedesk.committing(config), *conformancedesk.contexts(config)]
    initiated = (
        "By the desk: storage as SCU for what is moved, in the stored transfer syntax and what it can be made into "
        "(5.2.7); Storage Commitment Push Model as SCP, for reports (5.2.6)."
        if config.settings.desk.runs
        else "None."
    )
    syntaxes = [[_name(uid), f"`{uid}`"] for uid in sorted(ENCODINGS, key=_order)]
    desks = conformancedesk.statuses(config, _table)
    general = [
        ["Application Context Name", f"`{APPLICATION_CONTEXT}`"],
        ["Implementation Class UID", f"`{IMPLEMENTATION_CLASS_UID}`"],
        ["Implementation Version Name", f"`{IMPLEMENTATION_VERSION}`"],
        ["Maximum PDU size received", f"{gate.maximum_pdu} bytes; a larger one ends the association"],
        ["Maximum PDU size sent", "what the peer says; responses are short"],
        ["Associations at a time", f"{gate.maximum_associations} accepted"],
        ["Asynchronous operations window", "not negotiated: one operation at a time"],
        ["SCP/SCU role selection", "the peer is SCU; SCP only of storage that it gets by C-GET"],
        ["SOP Class Extended and Common Extended Negotiation", "not answered"],
    ]
    permanent, transient = "rejected-permanent", "rejected-transient"
    user, acse, presentation = "1 service-user", "2 service-provider (ACSE)", "3 service-provider (presentation)"
    stranger = "no peer has it, or who asks did not prove to be that peer, or comes from elsewhere"
    rejections = [
        [permanent, user, "3 calling AE title not recognised", stranger],
        [permanent, user, "7 called AE title not recognised", f"it is not `{gate.ae_title}`"],
        [permanent, acse, "1 no reason given", "the request is malformed"],
        [transient, presentation, "2 local limit exceeded", "the peer has as many associations as it may"],
    ]
    answers = [["Success", f"`{status.SUCCESS:04X}`", "the instance is sealed and durable"]]
    answers += [
        [_kind(reason), f"`{reason.status:04X}`", reason.comment] for reason in Reason if reason not in OF_THE_WEB
    ]
    answers.sort(key=lambda row: row[1] != f"`{status.SUCCESS:04X}`")
    return f"""## 7 Network and media communication details

### 7.1 General

{_table(["Parameter", "Value"], general)}

### 7.2 Application Entity `{gate.ae_title}`

#### 7.2.1 Association initiation

{initiated}

#### 7.2.2 Association acceptance

{_table(["Abstract syntax", "UID", "Transfer syntaxes", "Role", "Extended negotiation"], contexts)}

Of the transfer syntaxes that a peer proposes for a presentation context, the first that is in this table is accepted.

{_table(["Transfer syntax", "UID"], syntaxes)}

Another abstract syntax is refused with result 3, other transfer syntaxes with result 4. An association is accepted
also where no context of it is.

### 7.3 Status codes

#### 7.3.1 Associations

{_table(["Result", "Source", "Reason", "When"], rejections)}

A peer that breaks the protocol, sends nothing for too long or takes too long for a message is sent an A-ABORT.
While all places are taken, connections are closed before TLS.

#### 7.3.2 DIMSE services

**C-ECHO** is answered with `{status.SUCCESS:04X}`. **C-STORE**, each refusal with its Error Comment (0000,0902):

{_table(["Meaning", "Status", "Error Comment, or reason"], answers)}

There is no warning. What is refused with `A700` may be sent again later; the others come again with the same
instance. **Any other request** is answered with
`{status.UNRECOGNIZED_OPERATION:04X}` (unrecognised operation).{desks}"""


def _kind(reason: Reason) -> str:
    """Return what a status means, by its number (PS3.4 B.2.3, PS3.7 annex C)."""
    named = {0x0117: "Invalid SOP Instance", 0x0122: "SOP Class not supported", 0x0124: "Refused: not authorised"}
    if reason.status in named:
        return named[reason.status]
    families = {0xA7: "Refused: out of resources", 0xA9: "Error: data set does not match SOP Class"}
    return families.get(reason.status >> 8, "Error: cannot understand")


def _security(config: Config) -> str:
    context = strict_context()
    gate = config.settings.gate
    ports = [[f"{parse_address(a)[1]}", "DICOM over TLS", f"`{a}`"] for a in gate.listen]
    ports += [[f"{parse_address(p.listen)[1]}", "DICOM WITHOUT TLS", f"`{p.listen}`"] for p in gate.plaintext]
    ports += [[f"{parse_address(a)[1]}", what, f"`{a}`"] for a, what in conformancedesk.ports(config)]
    least = context.minimum_version.name.replace("TLSv", "TLS ").replace("_", ".")
    revoked = f"{len(gate.crls)} are configured" if gate.crls else "none is configured"
    return f"""## 8 Security

### 8.1 Introduction

What is received is encrypted before it reaches the disk; docs/design.md and docs/format.md say how.

### 8.2 External network requirements

None: no name service, no time service, no directory is asked by the gate. Both clocks must be right for
certificates to be valid.

### 8.3 TCP ports

{_table(["Port", "Protocol", "Bound to"], ports)}

### 8.4 Security profiles

#### 8.4.1 Secure use

No Secure Use Profile is claimed.

#### 8.4.2 Secure transport connection

The **BCP 195 RFC 8996, 9325 TLS Secure Transport Connection Profile** (PS3.15 B.12) is supported as
acceptor{_plain(config)}. Least version {least}, no compression, no renegotiation, no resumption. The server's
preference decides among:

{_table(["Version", "Cipher suite"], suites(context))}

Suites with RSA or ECDSA in their name go with a server key of that kind. Both sides show a certificate; RSA keys
have {_key_bits(context)} bits at least, and no signature that counts is made with SHA-1. A peer's certificate is
trusted for itself, because its peer file holds it, or by an authority in gate.trust together with its key or name
in the peer file. Revocation lists of these authorities are checked: {revoked}; OCSP is not asked.

#### 8.4.3 to 8.4.5 Media storage security, attribute confidentiality, digital signatures

No profile is claimed. Signatures in data sets stay valid (5.2.5.2); they are not verified.

#### 8.4.6 Additional profiles

None.

### 8.5 User Identity Negotiation

Not supported: an item in a request is not read, and no response is sent.

### 8.6 Authentication of peers

By the connection's certificate and the calling AE title together, as 8.4.2; address and called AE title must match,
too.

### 8.7 Encryption at rest

Each study under its own 256-bit key (AES-256-GCM in Cobblestone-256, key commitment); study keys travel from gate
to vault by HPKE (MLKEM768-X25519). Not a DICOM profile.

### 8.8 Audit trail

{_audit(config)}"""


def _audit(config: Config) -> str:
    chain = (
        "Every association, refusal and act of an admin is a record of a signed hash chain, read with "
        "`strongroom audit`."
    )
    if not config.settings.audit.forward:
        return (
            f"{chain}\n\nNo message is sent: the profiles of PS3.15 A.5 and A.6 are claimed where audit.forward is set."
        )
    return f"""{chain}

Records are sent in the format of the **Audit Trail Message Format Profile** (PS3.15 A.5), by the **Audit Trail Message
Transmission Profile - SYSLOG-TLS** (PS3.15 A.6; RFC 5424, 5425), by a process of its own."""


def _forwarded(config: Config) -> str:
    audit = config.settings.audit
    return (
        f"Messages go to `{audit.forward}`, facility {audit.facility}." if audit.forward else "Nothing is sent (8.8)."
    )


def _plain(config: Config) -> str:
    count = len(config.settings.gate.plaintext)
    return f", on every port but the {count} WITHOUT TLS in 8.3" if count else ", on every port"


def _key_bits(context: ssl.SSLContext) -> int:
    """Return the bits that OpenSSL wants of an RSA key at a security level (SSL_CTX_set_security_level(3))."""
    return {0: 0, 1: 1024, 2: 2048, 3: 3072, 4: 7680, 5: 15360}[context.security_level]


def _annexes() -> str:
    return """## Annexes

A. Information Object Definitions: no instance is created. B. Structured report content: none. C. Security: all in
8. D. Mapping of attributes: none. E. Code sets: none is used."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _name(uid: str) -> str:
    entry = UID_dictionary.get(uid)
    if entry is None:
        # Newer than pydicom's dictionary: pynetdicom knows it by its keyword, whose words are the name's.
        keyword = next((word for word, known in _STORAGE_CLASSES.items() if known == uid), "")
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", keyword) or "Private"
    return f"{entry[0]} (retired)" if entry[3] == "Retired" else str(entry[0])


def _order(uid: str) -> list[int]:
    return [int(part) for part in uid.split(".")]
