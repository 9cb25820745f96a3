"""From blocking work in threads to an answer: gathered into pieces worth sending, each sent before the next is made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from storescp.desk.multipart import Buffer

_PIECE_BYTES = 256 << 10
# How long a client may take nothing.
_SEND_SECONDS = 60.0
_T = TypeVar("_T")


class BrokenOffError(Exception):
    """An answer that was begun cannot be ended; the message is for the log."""


class Told:
    """What the log says of a request, filled in on the way."""

    def __init__(self) -> None:
        self.kind = "nothing"
        self.status = 0
        self.instances = 0
        # The request's body is being read, was read to its end.
        self.taking = self.taken = False


class Threads:
    """Where blocking work is done: as many threads as are worth having."""

    def __init__(self, most: int) -> None:
        self._most = min(most, 40)
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, function: Callable[[], _T]) -> _T:
        """Do something in a thread, to its end."""
        if self._limiter is None:
            # It belongs to the loop, which is not there before.
            self._limiter = anyio.CapacityLimiter(self._most)
        return await anyio.to_thread.run_sync(function, limiter=self._limiter)


class Streamed(Response):
    """A response whose body is made in threads, piece by piece; closing its generator ends what it holds open."""

    def __init__(
        self,
        threads: Threads,
        content: Generator[Buffer, None, None],
        content_type: str | Callable[[], str],
        *,
        length: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            threads: Where it is made.
            content: Makes it; what it raises before the first byte becomes the answer's status.
            content_type: Its media type, or what returns it once the first byte is there.
            length: How many bytes it has, if that is known.
        """
        self._threads = threads
        self._content = content
        self._content_type = content_type
        self.status_code = 200
        self.raw_headers = [] if length is None else [(b"content-length", b"%d" % length)]
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        Raises:
            BrokenOffError: It ended early.
        """
        wire = scope["state"]["wire"]
        pieces = gathered(self._content)
        try:
            # A refusal comes before the first byte, and is a status then.
            piece = await self._threads.run(lambda: next(pieces, None))
            kind = self._content_type if isinstance(self._content_type, str) else self._content_type()
            headers = [(b"content-type", kind.encode("latin-1")), *self.raw_headers]
            await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
            while piece is not None and scope["method"] != "HEAD" and not wire.is_lost:
                async with asyncio.timeout(_SEND_SECONDS):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = await self._threads.run(lambda: next(pieces, None))
            if wire.is_lost:
                raise BrokenOffError("the client is gone")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            raise BrokenOffError("the client takes nothing") from None
        finally:
            with anyio.CancelScope(shield=True):
                await self._threads.run(lambda: _close(pieces, self._content))


def gathered(content: Iterable[Buffer], size: int = _PIECE_BYTES) -> Iterator[bytes]:
    """Yield bytes in pieces of about a size."""
    held, length = list[Buffer](), 0
    for part in content:
        held.append(part)
        length += len(part)
        if length >= size:
            yield b"".join(held)
            held, length = [], 0
    if held:
        yield b"".join(held)


def _close(*generators: Iterator[Buffer]) -> None:
    for generator in generators:
        if isinstance(generator, Generator):
            with contextlib.suppress(Exception):
                generator.close()
