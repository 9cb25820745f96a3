"""A storage SCU on pynetdicom that sends data sets byte by byte as they are in their files."""

from __future__ import annotations

import io
import itertools
import os
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import split_dataset
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.presentation import PresentationContext, build_context

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
_IDS = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]


class Object(NamedTuple):
    """What a Part 10 file holds, as a C-STORE sends it; a UID that it lacks is empty."""

    name: str
    transfer_syntax: str
    sop_class: str
    sop_instance: str
    study: str
    series: str
    data: bytes

    @property
    def context(self) -> PresentationContext:
        """The one presentation context that this object needs."""
        return build_context(self.sop_class, self.transfer_syntax)


def raw_data_set(file: Path) -> bytes:
    """Return the bytes of a Part 10 file after its file meta information."""
    return file.read_bytes()[_split(file)[1] :]


def read(file: Path) -> Object:
    """Return the object in a Part 10 file. SOP class and instance are those of the data set, not of the file meta."""
    with lenient():
        meta, offset = _split(file)
        found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_IDS))
        ids = [str(found.get(name) or "") for name in _IDS]
    return Object(file.name, str(meta.get("TransferSyntaxUID", "")), *ids, file.read_bytes()[offset:])


@contextmanager
def lenient() -> Iterator[None]:
    """Let pydicom read what is not quite DICOM, without a warning, whatever it was told elsewhere."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def same(one: Path, other: Path) -> bool:
    """Tell whether pydicom reads two files to one data set; padding and group lengths, which senders drop, aside."""
    with lenient():
        first, second = ({e.tag: e for e in pydicom.dcmread(file) if _counts(e)} for file in (one, other))
        return first == second


def _counts(element: pydicom.DataElement) -> bool:
    return element.tag != 0xFFFCFFFC and element.tag.elem != 0


def tls(folder: Path, stem: str = "CT1") -> ssl.SSLContext:
    """Return the context of a peer whose key and certificate are in a folder."""
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / f"{stem}.pem", folder / f"{stem}.key")
    return context


def request(
    port: int,
    context: ssl.SSLContext,
    contexts: Sequence[PresentationContext],
    *,
    calling: str = "CT1",
    called: str = "STRONGROOM",
    handlers: Sequence[tuple[Any, Callable[..., Any]]] = (),
) -> Association:
    """Request an association; return it however it came out."""
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
    tls_args = (context, "127.0.0.1")
    association = entity.associate(
        "127.0.0.1", port, list(contexts), ae_title=called, tls_args=tls_args, evt_handlers=list(handlers)
    )
    association._reactor_checkpoint = _Checkpoint(association)  # type: ignore[assignment]
    return association


class _Checkpoint:
    """Where an association's own thread stands while somebody else waits for a response; takes an event's place.

    pynetdicom's own lets that thread pass now and then when it was told to stand: it then takes the response
    ("unexpected C-STORE service message"), and the one that waits gets none.
    """

    def __init__(self, association: Association) -> None:
        self._association = association
        self._turn = threading.Condition()
        self._open, self._stands = True, False

    def wait(self) -> None:
        with self._turn:
            while not self._open:
                self._stands = True
                self._turn.notify_all()
                self._turn.wait()
            self._stands = False

    def set(self) -> None:
        with self._turn:
            self._open = True
            self._turn.notify_all()

    def clear(self) -> None:
        with self._turn:
            self._open = False
            if threading.current_thread() is not self._association:
                while not self._stands and self._association.is_alive() and not self._association._kill:
                    self._turn.wait(0.1)


@contextmanager
def associated(*arguments: Any, **options: Any) -> Iterator[Association]:
    """Request an association, which must be accepted, and release it at the end. Takes what ``request`` takes."""
    association = request(*arguments, **options)
    try:
        assert association.is_established, (association.is_rejected, association.is_aborted)
        yield association
    finally:
        if association.is_established:
            association.release()


def store(association: Association, item: Object) -> C_STORE:
    """Send one object on an association that has its context; return the response."""
    primitive = C_STORE()
    primitive.MessageID = 1
    primitive.Priority = 2
    primitive.AffectedSOPClassUID = item.sop_class
    primitive.AffectedSOPInstanceUID = item.sop_instance
    primitive.DataSet = io.BytesIO(item.data)
    wanted = (item.sop_class, [item.transfer_syntax])
    [number] = [c.context_id for c in association.accepted_contexts if (c.abstract_syntax, c.transfer_syntax) == wanted]
    # What send_c_store does: the association's own thread must not take the response.
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.0001)
    try:
        association.dimse.send_msg(primitive, number)
        _, response = association.dimse.get_msg(block=True)
    finally:
        association._reactor_checkpoint.set()
    assert isinstance(response, C_STORE), (item.name, response)
    return response


def send(port: int, context: ssl.SSLContext, items: Iterable[Object], **options: Any) -> list[int]:
    """Send objects, each on an association of its own with one context; return the statuses."""
    statuses = []
    for item in items:
        with associated(port, context, [item.context], **options) as association:
            statuses.append(store(association, item).Status)
    return statuses


def large_file(file: Path, frames: int) -> Object:
    """Write a multi-frame object of 32 KiB a frame, every frame another one, and return it."""
    data_set = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    data_set.SOPInstanceUID = data_set.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data_set.NumberOfFrames = frames
    data_set.PixelData = os.urandom(frames * data_set.Rows * data_set.Columns * 2)
    data_set.save_as(file)
    return read(file)


def midway(action: Callable[[], Any], after: int) -> tuple[Future[Any], list[Any]]:
    """Return a result, and handlers for ``request``: the action runs after so many P-DATA PDUs, the rest waits for it.

    The first of them holds the command; the others hold up to 128 KiB of the data set each.
    """
    sent = itertools.count(1)
    result: Future[Any] = Future()

    def on_sent(event: Any) -> None:
        if isinstance(event.pdu, P_DATA_TF) and next(sent) == after:
            # pynetdicom would only log what is raised here.
            try:
                result.set_result(action())
            except BaseException as error:
                result.set_exception(error)

    return result, [(evt.EVT_PDU_SENT, on_sent)]


def _split(file: Path) -> tuple[pydicom.Dataset, int]:
    with lenient():
        return split_dataset(file)
