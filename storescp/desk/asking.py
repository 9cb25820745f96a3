"""What the desk asks the vault, over the vault's socket for it: a connection for each request."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from storage.query import Query
from storage.selection import Selection
from storescp.control import Client
from storescp.desk.ahead import Ahead
from storescp.errors import LOCKED, NOTHING, StrongroomError
from storescp.handover import HandoverError, Taking

_SECONDS = 600.0


class AskingError(Exception):
    """The vault does not give what was asked for; ``status`` says why in the numbers of ``errors``."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def locked(self) -> bool:
        """Whether the vault is locked, or does not run."""
        return self.status == LOCKED

    @property
    def nothing(self) -> bool:
        """Whether nothing matches."""
        return self.status == NOTHING


class Asking:
    """The desk's end. Safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def found(self, peer: str, operation: str, query: Query) -> Iterator[Iterator[dict[str, list[str]]]]:
        """Give the rows that a query of a peer finds: tag to values.

        Raises:
            AskingError: The vault refuses, is locked, or does not run.
        """
        document = {"peer": peer, "operation": operation, "query": msgspec.to_builtins(query)}
        with self._client() as client:
            yield _first(client.lines("POST", "/v1/find", document))

    @contextlib.contextmanager
    def retrieved(self, peer: str, operation: str, to: str, selection: Selection) -> Iterator[Taking]:
        """Give the instances that a peer is given; leaving the context ends the request, wherever it is.

        Raises:
            AskingError: The vault refuses, is locked, does not run, or the connection broke.
        """
        document = {
            "peer": peer,
            "operation": operation,
            "to": to,
            "selection": msgspec.to_builtins(selection),
        }
        with self._client() as client:
            ahead = Ahead(client.begin_raw("POST", "/v1/retrieve", document), client.receive)
            try:
                yield Taking(iter(ahead))
            except HandoverError as error:
                raise AskingError(f"the vault's answer: {error}", 1) from error
            finally:
                # The connection first: who reads from it sees its end.
                client.shut()
                ahead.close()

    def commitments(self) -> list[dict[str, Any]]:
        """Return the reports of storage commitment that are due.

        Raises:
            AskingError: The vault is locked, or does not run.
        """
        with self._client() as client:
            return list(client.lines("GET", "/v1/commitments"))

    def told(self, report: dict[str, Any], why: str) -> None:
        """Say that a report was delivered, or why not.

        Raises:
            AskingError: The vault is locked, or does not run.
        """
        with self._client() as client:
            told = {"id": report["id"], "decided": report["decided"], "delivered": not why, "why": why}
            client.json("POST", "/v1/commitments/told", told)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_SECONDS)
        try:
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            raise AskingError("the vault does not answer the desk", LOCKED) from error
        client = Client(connection)
        try:
            yield client
        except StrongroomError as error:
            raise AskingError(str(error), error.status) from error
        finally:
            client.close()


def _first(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, list[str]]]:
    """Fetch the first row at once: a refusal comes before it."""
    first = next(lines, None)

    def rows() -> Iterator[dict[str, list[str]]]:
        if first is not None:
            yield first
            yield from lines

    return rows()
