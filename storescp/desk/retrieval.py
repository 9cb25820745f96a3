"""Sub-operations of C-GET and C-MOVE: each instance of a stream as a C-STORE on an association, and their counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

from storescp.desk.messages import Message, Messages, UnsentError
from storescp.desk.transcode import LIMIT, TARGETS, TranscodeError, is_possible, transcode
from storescp.errors import StrongroomError
from storescp.gate import dimse, wire
from storescp.gate.dimse import Answer, Counts
from storescp.gate.negotiate import Context
from storescp.handover import BrokenError, HandoverError, Instance, Taking

# Of instances that failed, as many are named as fit a response that any peer takes.
_NAMED_LIMIT = 1000

log = logging.getLogger(__name__)


class Originator(NamedTuple):
    """Whose C-MOVE an object is sent for: AE title and message id."""

    title: str
    message_id: int


class Retrieval:
    """Sends the instances of a stream as C-STORE requests."""

    def __init__(
        self,
        messages: Messages,
        contexts: dict[int, Context],
        seconds: float,
        originator: Originator | None = None,
    ) -> None:
        """Prepare.

        Args:
            messages: Of the association on which they are sent.
            contexts: What the other side takes there, by id.
            seconds: How long to wait for a response.
            originator: For a C-MOVE.
        """
        self._messages = messages
        self._seconds = seconds
        self._originator = originator
        self._by_kind = {(c.abstract_syntax, c.transfer_syntax): number for number, c in contexts.items()}
        self._message_id = 0
        self.counts = Counts()
        self.failed: list[str] = []
        self.cancelled = False
        self.bytes = 0

    def run(self, taking: Taking, other: Callable[[Message], None]) -> Iterator[Counts]:
        """Send all of a stream; yield the counts after each instance, until it is done or was cancelled.

        Args:
            taking: The stream.
            other: Called with each message that is no response to what is sent: it may set ``cancelled``.

        Raises:
            EndedError: The other side ended the association.
            WireError: It broke the protocol.
            OSError: The connection broke.
            HandoverError: The stream ends early.
            StrongroomError: The vault's answer broke off.
        """
        self.counts.remaining = taking.manifest.instances
        for instance, parts in taking.instances():
            while (message := self._messages.poll()) is not None:
                other(message)
            if self.cancelled:
                return
            self.counts.remaining -= 1
            status = self._send(instance, parts, other)
            if status == 0:
                self.counts.completed += 1
                self.bytes += instance.length
            elif status is not None and status >> 12 == 0xB:
                self.counts.warning += 1
            else:
                self.counts.failed += 1
                if len(self.failed) < _NAMED_LIMIT:
                    self.failed.append(instance.sop)
            yield self.counts

    def give_up(self, total: int) -> None:
        """Count as failed what was not sent, of so many: nothing more can be."""
        self.counts.failed = total - self.counts.completed - self.counts.warning
        self.counts.remaining = 0

    def _send(self, instance: Instance, parts: Iterator[memoryview], other: Callable[[Message], None]) -> int | None:
        """Send an instance; return what the other side said, None where it was not sent."""
        context_id = self._by_kind.get((instance.sop_class, instance.transfer_syntax))
        content: Iterator[memoryview] | list[bytes] = parts
        length = instance.length
        try:
            if context_id is None:
                target = next((t for t in TARGETS if (instance.sop_class, t) in self._by_kind), None)
                if target is None or not is_possible(instance.transfer_syntax, length):
                    why = (
                        "is larger than can be made into another" if length > LIMIT else "is one that it does not take"
                    )
                    log.warning("an instance is not sent: its transfer syntax %s %s", instance.transfer_syntax, why)
                    return None
                made = transcode(instance, parts, target)
                content, length, context_id = [made], len(made), self._by_kind[instance.sop_class, target]
            self._message_id = self._message_id % 0xFFFF + 1
            originator = self._originator or Originator("", 0)
            request = dimse.store_request(
                self._message_id,
                instance.sop_class,
                instance.sop,
                originator=originator.title,
                originator_message=originator.message_id,
            )
            self._messages.send_object(context_id, request, content, length)
        except TranscodeError as error:
            log.warning("an instance is not sent: %s", error)
            return None
        except UnsentError as error:
            if isinstance(error.__cause__, HandoverError | StrongroomError):
                raise error.__cause__ from error
            log.warning("an instance is not sent: it does not open; the vault's log says more")
            return None
        except (BrokenError, HandoverError, StrongroomError) as error:
            if content is not parts:
                if isinstance(error, BrokenError):
                    return None
                raise
            # Half of it is sent: the other side must not take the rest of something else for it.
            raise wire.WireError("an instance does not open; the vault's log says more") from error
        return self._answer(other).status

    def _answer(self, other: Callable[[Message], None]) -> Answer:
        while True:
            message = self._messages.next(self._seconds)
            if not dimse.is_response(message.command):
                other(message)
                continue
            answer = dimse.decode_answer(message.command)
            if answer.field != dimse.C_STORE_RQ or answer.message_id != self._message_id:
                raise wire.WireError("a response to something else")
            return answer
