"""One object's data set on its way from fragments into a pack; what goes wrong becomes a refusal of one table."""

from __future__ import annotations

import errno
import logging
from datetime import UTC, datetime

from storage import attributes
from storage.attributes import AttributesError, Received, is_uid
from storage.deposit import DepositError, Deposits
from storage.openpack import Record
from storescp.gate.describe import Describer, uid
from storescp.gate.dimse import Command
from storescp.gate.head import HeadError, HeadParser
from storescp.gate.negotiate import Context
from storescp.gate.origin import Origin
from storescp.gate.status import Reason, RefusedError
from storescp.gate.transfer import ENCODINGS
from storescp.space import Watch

# What may come before the Study Instance UID: large private groups of some devices do.
HEAD_BUFFER_LIMIT = 4 << 20
# Free space is looked at when an object begins, and again after this much of it.
_SPACE_STEP = 64 << 20
_SOP_CLASS, _SOP_INSTANCE = 0x00080016, 0x00080018
_STUDY, _SERIES = 0x0020000D, 0x0020000E

log = logging.getLogger(__name__)


class Incoming:
    """One object's data set on its way into a pack. ``end`` returns only when it is durable, or raises why not."""

    def __init__(
        self,
        command: Command,
        context: Context,
        origin: Origin,
        deposits: Deposits,
        describer: Describer,
        space: Watch,
        within: str = "",
    ) -> None:
        """Begin.

        Args:
            command: What the sender says that it is.
            context: How it is encoded.
            origin: Where it comes from.
            deposits: Where it goes.
            describer: Of the objects of this origin.
            space: Whether there is room for it.
            within: The Study Instance UID that it must have; empty for any.
        """
        self._within = within
        self._space = space
        self._checked = 0
        self._command = command
        self._context = context
        self._origin = origin
        self._deposits = deposits
        self._describer = describer
        self._encoding = ENCODINGS[context.transfer_syntax]
        self._head = HeadParser(self._encoding)
        self._before = bytearray()
        self._record: Record | None = None
        self._reason: Reason | None = None
        self.object_id = ""
        self.study = self.series = ""
        self.size = 0
        if command.sop_class != context.abstract_syntax:
            self._reason = Reason.SOP_CLASS
        elif not is_uid(command.sop_instance):
            self._reason = Reason.INVALID_UID

    def refuse(self, reason: Reason) -> None:
        """Refuse it for a reason that lies outside of it; what comes is read and dropped."""
        self._reason = self._reason or reason

    def take(self, data: memoryview) -> None:
        """Take the next piece of the data set. What goes wrong is kept for ``end``; the rest is read and dropped."""
        self.size += len(data)
        if self._reason is not None:
            return
        try:
            if self.size >= self._checked:
                self._checked = self.size + _SPACE_STEP
                if self._space.shortage():
                    raise RefusedError(Reason.NO_SPACE)
            self._take(data)
        except Exception as error:
            self._refuse(error)

    def end(self) -> None:
        """Take the end of the data set and make the object durable.

        Raises:
            RefusedError: It is not kept; the reason is of the table in ``status``.
        """
        if self._reason is None:
            try:
                self._end()
            except Exception as error:
                self._refuse(error)
        if self._reason is not None:
            raise RefusedError(self._reason)

    def abandon(self) -> None:
        """Drop an object whose association ended before it did."""
        self._let_go()

    def _take(self, data: memoryview) -> None:
        if not self._head.done:
            self._head.feed(data)
        if self._record is not None:
            self._record.write(data)
        elif _SERIES in self._head.values or self._head.done:
            self._begin().write(data)
        else:
            self._before += data
            if len(self._before) > HEAD_BUFFER_LIMIT:
                raise RefusedError(Reason.HEAD_TOO_LARGE)

    def _begin(self) -> Record:
        values = self._head.values
        study, series = uid(values, _STUDY), uid(values, _SERIES)
        if not is_uid(study) or not is_uid(series):
            raise RefusedError(Reason.NO_STUDY)
        found = (uid(values, _SOP_CLASS), uid(values, _SOP_INSTANCE))
        if found != (self._command.sop_class, self._command.sop_instance):
            raise RefusedError(Reason.MISMATCH)
        if self._within not in {"", study}:
            raise RefusedError(Reason.OTHER_STUDY)
        self._record = self._deposits.begin(study, self._origin.calling)
        self.object_id = self._record.object_id.hex()
        self.study, self.series = study, series
        self._record.write(memoryview(self._before))
        self._before = bytearray()
        return self._record

    def _end(self) -> None:
        self._head.end()
        record = self._record or self._begin()
        origin = self._origin
        received = Received(
            datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",
            origin.association,
            origin.calling,
            origin.called,
            origin.address,
            origin.certificate,
        )
        described = self._describer.describe(self._head.values, self._encoding, self._context.transfer_syntax, received)
        content = attributes.encode(described)
        # What the vault would not understand must not be acknowledged.
        attributes.decode(content)
        record.finish(content)
        self._record = None

    def _refuse(self, error: Exception) -> None:
        self._reason = reason_for(error)
        if self._reason is Reason.INTERNAL:
            log.error("association %s: an object is refused", self._origin.association, exc_info=error)
        self._let_go()

    def _let_go(self) -> None:
        self._before = bytearray()
        record, self._record = self._record, None
        if record is not None:
            record.abort()


def reason_for(error: Exception) -> Reason:
    """Return the refusal that answers an error; the one mapping of errors to statuses."""
    match error:
        case RefusedError():
            return error.reason
        case HeadError():
            return Reason.UNPARSABLE
        case AttributesError():
            return Reason.ATTRIBUTES_TOO_LARGE
        case DepositError():
            return Reason.NO_KEY
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return Reason.NO_SPACE
        case OSError():
            return Reason.NO_STORAGE
        case _:
            return Reason.INTERNAL
