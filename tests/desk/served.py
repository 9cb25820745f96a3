"""A store with a desk, its peers, and what asks it: for the tests of a module."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pki
import pydicom
import pytest
import scu
from conftest import Server
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context, build_role
from users import DESK, GATE, VAULT, open_folder

from storescp import peers
from storescp.gate import dimse, negotiate, wire
from storescp.peers import PeerFile

PATIENT_ROOT, STUDY_ROOT = "1.2.840.10008.5.1.4.1.2.1.", "1.2.840.10008.5.1.4.1.2.2."
COMMITMENT, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
EXPLICIT, IMPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".2", ".1.99"))


class Desk(Server):
    """A server with a desk."""

    desk_port = 0

    def keys(self, title: str) -> Path:
        """Make a key and a certificate, and return their folder."""
        folder = self.home / "issued" / title
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / f"{title}.pem").exists():
            made = pki.make(title)
            (folder / f"{title}.pem").write_text(made.pem)
            (folder / f"{title}.key").write_text(made.key_pem)
            shutil.copy(self.home / "tls" / "ca.pem", folder / "ca.pem")
        return folder

    def peer(self, title: str, *operations: str, **settings: Any) -> Path:
        """Add a peer; return the folder with its key."""
        folder = self.keys(title)
        file = PeerFile(
            ae_title=title,
            certificates=[(folder / f"{title}.pem").read_text()],
            operations=list(operations) or ["echo", "store"],
            **settings,
        )
        (self.peers / f"{title}.toml").write_text(peers.render(file))
        return folder

    def open(self) -> Desk:
        """Start, and wait until the desk listens."""
        self.start()
        self.wait_desk()
        return self

    def wait_desk(self) -> None:
        self.desk_port = int(self.wait_log(r"desk.*listening on 127\.0\.0\.1:(\d+)")[1])

    def tls(self, title: str) -> ssl.SSLContext:
        """Return the context of a peer that calls."""
        return scu.tls(self.home / "issued" / title, title)

    def request(
        self,
        title: str,
        contexts: Sequence[PresentationContext],
        *,
        roles: Sequence[Any] = (),
        handlers: Sequence[tuple[Any, Any]] = (),
        calling: str = "",
        maximum: int = 16_382,
    ) -> Association:
        """Ask the desk for an association as a peer; return it however it came out."""
        entity = AE(calling or title)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
        association = entity.associate(
            "127.0.0.1",
            self.desk_port,
            list(contexts),
            ae_title="STRONGROOM",
            max_pdu=maximum,
            ext_neg=list(roles),
            tls_args=(self.tls(title), "127.0.0.1"),
            evt_handlers=list(handlers),
        )
        if association.is_established:
            # pynetdicom sends a command and its data set in two, and would wait for the first to be acknowledged.
            association.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return association

    @contextmanager
    def ask(self, title: str, contexts: Sequence[PresentationContext], **options: Any) -> Iterator[Association]:
        """Associate with the desk as a peer, which must be accepted; release at the end."""
        association = self.request(title, contexts, **options)
        try:
            assert association.is_established, (association.is_rejected, association.is_aborted)
            yield association
        finally:
            if association.is_established:
                association.release()


@contextmanager
def desk(factory: pytest.TempPathFactory | Callable[[], Path], prepare: Callable[[Desk], None]) -> Iterator[Desk]:
    """Make a store with a desk, prepare it, serve it, and stop it at the end."""
    server = Desk(factory.mktemp("d") if isinstance(factory, pytest.TempPathFactory) else factory())
    try:
        server.init()
        server.set("gate", pack_idle_seconds=1)
        server.set("desk", listen=["127.0.0.1:0"])
        prepare(server)
        yield server.open()
        assert server.stop() == 0
    finally:
        server.stop(signal.SIGKILL)
        server.kill_all()
        server.kill("desk")


@contextmanager
def three_users() -> Iterator[Desk]:
    """Make a store whose gate, vault and desk are three users, not yet started; end and remove it at the end."""
    with open_folder() as folder:
        server = Desk(folder / "s")
        try:
            server.init("--vault-user", VAULT, "--gate-user", GATE)
            server.set("gate", pack_idle_seconds=1)
            keys = server.home / "tls" / "desk"
            keys.mkdir(mode=0o750)
            for name in ("server.pem", "server.key"):
                shutil.copy(server.home / "tls" / name, keys / name)
            for path in (keys, *keys.iterdir()):
                shutil.chown(path, DESK, DESK)
            own = {"certificate": "tls/desk/server.pem", "private_key": "tls/desk/server.key"}
            server.set("desk", listen=["127.0.0.1:0"], web=["127.0.0.1:0"], user=DESK, **own)
            yield server
        finally:
            server.stop(signal.SIGKILL)
            server.kill_all()
            server.kill("desk")


class Raw:
    """A peer that sends what it likes, on an association with one context."""

    def __init__(self, server: Desk, title: str, abstract: str) -> None:
        plain = socket.create_connection(("127.0.0.1", server.desk_port), 60)
        self.socket = server.tls(title).wrap_socket(plain, server_hostname="127.0.0.1")
        self._reader = wire.Reader(0)
        self._events: list[Any] = []
        self.socket.sendall(negotiate.request(title, "STRONGROOM", {1: (abstract, [EXPLICIT])}, maximum_pdu=16_384))
        assert self.event().kind == wire.ASSOCIATE_AC
        self._reader.maximum_pdu = 16_384

    def send(self, *messages: tuple[bytes, bytes | None], last: bytes = b"") -> None:
        """Send messages in one piece, command sets and data sets where there are any; and a PDU behind them."""
        content = b""
        for command, data in messages:
            content += wire.data_pdus(1, command=True, content=command, maximum=0)
            content += b"" if data is None else wire.data_pdus(1, command=False, content=data, maximum=0)
        self.socket.sendall(content + last)

    def event(self) -> Any:
        """Return the next PDU, or whole fragment as (is it a command, its bytes); None at the end."""
        while not self._events:
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            for event in self._reader.receive(memoryview(data)):
                whole = isinstance(event, wire.Pdu)
                self._events.append(event if whole else (event.command, bytes(event.data)))
        return self._events.pop(0)


def command(field: int, message_id: int = 1, *, data_set: bool = False, destination: str = "") -> bytes:
    """Return the command set of a request, a cancel's too."""
    whose = 0x0120 if field == dimse.C_CANCEL_RQ else 0x0110
    numbers = ((0x0100, field), (whose, message_id), (0x0800, 1 if data_set else dimse.NO_DATA_SET))
    to = struct.pack("<HHI", 0, 0x0600, 16) + destination.encode().ljust(16) if destination else b""
    return b"".join(struct.pack("<HHIH", 0, element, 2, number) for element, number in numbers) + to


@contextmanager
def listening(
    title: str,
    contexts: Sequence[tuple[str, Sequence[str]]],
    handlers: Sequence[tuple[Any, Any]],
    folder: Path | None = None,
    *,
    is_scu: bool = False,
    port: int = 0,
) -> Iterator[int]:
    """Be a peer that listens, over TLS with the key in a folder or without; give its port."""
    entity = AE(title)
    for abstract, syntaxes in contexts:
        roles = {"scu_role": False, "scp_role": True} if is_scu else {}
        entity.add_supported_context(abstract, list(syntaxes), **roles)
    context = None
    if folder is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
        context.load_cert_chain(folder / f"{folder.name}.pem", folder / f"{folder.name}.key")
        context.verify_mode = ssl.CERT_REQUIRED
    server = entity.start_server(("127.0.0.1", port), block=False, ssl_context=context, evt_handlers=list(handlers))
    assert server is not None
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()


class Received(list[scu.Object]):
    """What came by C-STORE, data sets byte by byte as they came."""

    def __init__(self, statuses: Callable[[int], int] = lambda _: 0) -> None:
        self.statuses = statuses
        self.originators: set[tuple[str, int]] = set()

    @property
    def handler(self) -> tuple[Any, Any]:
        """Return what pynetdicom calls."""
        return evt.EVT_C_STORE, self._took

    def _took(self, event: Any) -> int:
        request = event.request
        syntax = str(event.context.transfer_syntax)
        data = request.DataSet.getvalue()
        if request.MoveOriginatorApplicationEntityTitle:
            found = request.MoveOriginatorApplicationEntityTitle, request.MoveOriginatorMessageID
            self.originators.add((str(found[0]).strip(), int(found[1])))
        sop_class, sop = str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
        self.append(scu.Object("", syntax, sop_class, sop, "", "", data))
        return self.statuses(len(self))


def identifier(level: str, **keys: Any) -> Dataset:
    """Return an identifier."""
    found = Dataset()
    with scu.lenient():
        for key, value in {"QueryRetrieveLevel": level, **keys}.items():
            setattr(found, key, value)
    return found


def find(association: Association, asked: Dataset, root: str = STUDY_ROOT, **more: Any) -> tuple[list[Dataset], int]:
    """Return what a C-FIND gives, and its last status."""
    found, status = [], -1
    for reply, data in association.send_c_find(asked, root + "1", **more):
        status = reply.Status
        if data is not None:
            assert status in {0xFF00, 0xFF01}
            found.append(data)
    return found, status


def last(responses: Any) -> tuple[Dataset, Dataset | None]:
    """Return the last response of a C-GET or C-MOVE, and its identifier."""
    *_, found = responses
    return found


def counts(reply: Dataset) -> tuple[int, int, int]:
    """Return how many sub-operations completed, failed and warned."""
    return (
        reply.NumberOfCompletedSuboperations,
        reply.NumberOfFailedSuboperations,
        reply.NumberOfWarningSuboperations,
    )


def models(*numbers: int, root: str = STUDY_ROOT, syntax: str = EXPLICIT) -> list[PresentationContext]:
    """Return contexts of the models: 1 find, 2 move, 3 get."""
    return [build_context(f"{root}{number}", syntax) for number in numbers]


def get_contexts(*kinds: tuple[str, str], root: str = STUDY_ROOT) -> tuple[list[PresentationContext], list[Any]]:
    """Return contexts and roles of a C-GET that takes these SOP classes in these transfer syntaxes."""
    classes = dict.fromkeys(sop_class for sop_class, _ in kinds)
    return (
        [*models(3, root=root), *(build_context(*kind) for kind in kinds)],
        [build_role(sop_class, scp_role=True) for sop_class in classes],
    )


def objects(folder: Path, count: int, path: Path, **elements: Any) -> list[Path]:
    """Write so many instances of a new series of a study of their own; elements set what is given."""
    folder.mkdir(exist_ok=True)
    data_set = pydicom.dcmread(path)
    data_set.SeriesInstanceUID = generate_uid()
    data_set.StudyInstanceUID = generate_uid()
    made = []
    for number in range(1, count + 1):
        data_set.SOPInstanceUID = data_set.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data_set.InstanceNumber = number
        for name, value in elements.items():
            setattr(data_set, name, value)
        made.append(folder / f"{len(list(folder.iterdir()))}.dcm")
        data_set.save_as(made[-1])
    return made
