"""What the conformance statement says of the desk: storage commitment, query and retrieval, web services. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pydicom.datadict import keyword_for_tag

from storage.query import SUPPORTED
from storescp.config import Config
from storescp.desk import session
from storescp.desk.models import MODELS
from storescp.desk.transcode import LIMIT
from storescp.gate import dimse
from storescp.gate.status import Reason
from storescp.gate.transfer import COMMITMENT

_NO_DESK = "Not supported by this configuration: it has no desk (`desk.listen`)."
_Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def serves(config: Config, operation: str) -> bool:
    """Tell whether a configuration serves an operation of the desk's."""
    return bool(config.settings.desk.listen) if operation != "commit" else config.settings.desk.runs


def commitment(config: Config) -> str:
    """Return section 5.2.6."""
    if not config.settings.desk.runs:
        return _NO_DESK
    return """Push model, SCP. A request (N-ACTION, action type 1, up to 1 MiB) is answered with Success when it is
durable. It is decided once everything that the device sent before is admitted: each instance was then copied by the
vault, opened and authenticated. The report (N-EVENT-REPORT) comes on a new association to where the device's peer
file says that it listens, with role selection (this server is SCP); it is tried again for seven days, first after 30
seconds, then ever later, also over restarts. Only what this device itself sent counts.

| Failure Reason | When |
| --- | --- |
| `0110` processing failure | the device's version is in quarantine, or damaged |
| `0112` no such object instance | the device sent none, or it was erased |
| `0119` class-instance conflict | it was stored under another SOP Class |"""


def retrieval(config: Config, table: _Table) -> str:
    """Return section 5.2.7."""
    if not config.settings.desk.listen:
        return _NO_DESK
    keys = []
    for level, attributes in SUPPORTED.items():
        for tag, attribute in sorted(attributes.items()):
            if not any(tag in SUPPORTED[upper] for upper in list(SUPPORTED)[: list(SUPPORTED).index(level)]):
                name = keyword_for_tag(int(tag, 16)) or attribute.keyword
                keys.append(
                    [level, f"({tag[:4]},{tag[4:]}) {name}", attribute.vr, attribute.matching or "returned only"]
                )
    return f"""C-FIND, C-MOVE and C-GET as SCP; C-STORE as SCU for the instances that are moved or got. Baseline
behaviour: hierarchical, each level above the one asked for is one entity; relational queries, fuzzy matching and
combined date-time matching are not negotiated. A peer's operations say what it may do, its file which instances it sees
(by calling AE title and modality): what it does not see is not found, counted or sent.

- **Matching** (PS3.4 C.2.2.2) by these keys; names without case, in all component groups. Other keys are returned
  empty, and pending responses then have status `FF01`.
- **Character sets** in: what the identifier says. Out: ASCII, else UTF-8 (ISO_IR 192).
- **Retrieval** streams instances as they are stored. Where a peer takes another transfer syntax only, uncompressed ones
  are made into Explicit or Implicit VR Little Endian, compressed ones decompressed where the plugins here can, up to
  {LIMIT >> 20} MiB; otherwise that sub-operation fails, and its UID is in Failed SOP Instance UID List.
- **C-MOVE** goes to peers whose file says where they listen, and to nobody else; over TLS they have to prove to be that
  peer.
- **C-CANCEL** ends a query between two rows and a retrieval between two instances.

{table(["Level", "Key", "VR", "Matching"], keys)}"""


def web(config: Config, table: _Table) -> str:
    """Return section 5.3."""
    if not config.settings.desk.web:
        return "Not supported by this configuration: it has no `desk.web`."
    rows = [
        ["Search (QIDO-RS)", "`GET` studies, series, instances", "application/dicom+json", "reader, admin"],
        [
            "Retrieve (WADO-RS)",
            "`GET` study, series, instance; metadata; frames; rendered; bulkdata",
            "application/dicom, application/dicom+json, octet streams and compressed frames, image/jpeg, image/png",
            "reader, admin",
        ],
        [
            "Store (STOW-RS)",
            "`POST` studies, study",
            "application/dicom; answers: application/dicom+json",
            "sender, admin",
        ],
    ]
    never = {Reason.NO_DATA_SET, Reason.NOT_AUTHORIZED}
    reasons = [[f"`{reason.status:04X}`", reason.comment] for reason in Reason if reason not in never]
    return f"""The Studies Service (PS3.18 10), as origin server, over HTTPS with client certificates. Roles are those
of the peer's file. Delete and the Retrieve Capabilities transaction are not supported, XML is not given or taken, and
metadata is not stored with its bulk data apart. Parameters, media types and what is answered: docs/dicomweb.md.

{table(["Transaction", "Resources", "Media types", "Role"], rows)}

An instance that is not stored is in the Failed SOP Sequence (0008,1198), or in the Other Failures Sequence (0008,119A)
where no UID of it could be read, with a Failure Reason:

{table(["Reason of a failed store", "When"], reasons)}"""


def contexts(config: Config) -> list[list[str]]:
    """Return the rows of the accepted presentation contexts of the desk's listeners."""
    if not config.settings.desk.listen:
        return []
    syntaxes = "Explicit and Implicit VR Little Endian, and others of the next table"
    rows = [[f"{_model(uid)}", f"`{uid}`", syntaxes, "SCP", "none"] for uid in MODELS]
    return [*rows, ["storage, for C-GET", "see 1.1", "all of the next table", "SCU", "role selection"]]


def committing(config: Config) -> list[list[str]]:
    """Return the row of storage commitment at the gate's listeners."""
    if not config.settings.desk.runs:
        return []
    return [["Storage Commitment Push Model", f"`{COMMITMENT}`", "all of the next table", "SCP", "none"]]


def statuses(config: Config, table: _Table) -> str:
    """Return what the desk's responses mean; empty without a desk."""
    if not config.settings.desk.listen:
        return ""
    every, retrievals = "C-FIND, C-MOVE, C-GET", "C-MOVE, C-GET"
    rows = [
        [every, f"{session.SUCCESS:04X}", "done; also where nothing matches"],
        ["C-FIND", f"{session.PENDING:04X}", "a match"],
        ["C-FIND", f"{session.PENDING_UNSUPPORTED:04X}", "a match; a key is not supported"],
        ["C-FIND", f"{session.NO_RESOURCES:04X}", "the vault is locked"],
        [every, f"{session.UNABLE:04X}", "the vault's answer broke off; C-FIND: also too much is asked at a time"],
        [every, f"{session.MISMATCH:04X}", "the identifier cannot be understood, or does not fit the model"],
        [every, f"{session.NO_SUCH_OPERATION:04X}", "no such operation in this presentation context"],
        [every, f"{dimse.CANCELLED:04X}", "cancelled"],
        [retrievals, f"{session.PENDING:04X}", "under way; from time to time, with the numbers of sub-operations"],
        [retrievals, f"{session.SOME_FAILED:04X}", "some sub-operations failed; their UIDs are listed"],
        [
            retrievals,
            f"{session.NO_SUBOPERATIONS:04X}",
            "none could be done: locked, limited, the destination is not reached, all failed",
        ],
        ["C-MOVE", f"{session.NO_DESTINATION:04X}", "the destination is no peer that listens"],
    ]
    return "\n\n**The desk's:**\n\n" + table(["Request", "Status", "When"], [[a, f"`{b}`", c] for a, b, c in rows])


def ports(config: Config) -> list[tuple[str, str]]:
    """Return the desk's addresses and what is spoken there."""
    desk = config.settings.desk
    return [(a, "DICOM over TLS (desk)") for a in desk.listen] + [(a, "DICOMweb, HTTPS (desk)") for a in desk.web]


def _model(uid: str) -> str:
    model = MODELS[uid]
    root = "Patient Root" if model.levels[0] == "PATIENT" else "Study Root"
    return f"{root}, C-{model.operation.upper()}"
