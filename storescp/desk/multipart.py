"""Multipart bodies (RFC 2046, RFC 2387), written as their parts come: nothing is held together in memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator

Buffer = bytes | memoryview


class Multipart:
    """A body of parts of one type."""

    def __init__(self, kind: str) -> None:
        """Choose a boundary that no content can know.

        Args:
            kind: The parts' media type.
        """
        self._boundary = secrets.token_hex(16)
        self._begun = False
        self.content_type = f'multipart/related; type="{kind}"; boundary={self._boundary}'

    def part(self, content_type: str, content: Iterable[Buffer], **headers: str) -> Iterator[Buffer]:
        """Yield a part: what stands before it, its headers, its content.

        Args:
            content_type: Its media type, with parameters.
            content: Its bytes.
            headers: More headers, with ``_`` for ``-``; empty ones are left out.
        """
        lines = ["", f"--{self._boundary}"] if self._begun else [f"--{self._boundary}"]
        lines.append(f"Content-Type: {content_type}")
        lines += [f"{name.replace('_', '-').title()}: {value}" for name, value in headers.items() if value]
        self._begun = True
        yield ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
        yield from content

    def end(self) -> bytes:
        """Return what closes the body."""
        return f"\r\n--{self._boundary}--\r\n".encode("ascii")
