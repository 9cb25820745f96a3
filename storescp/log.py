"""Logging to standard error: text or JSON lines, no patient data, no raw text from outside.

Messages name associations and objects by their ids. Everything that came from a peer is escaped here, in one place.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime


def set_up(process: str, form: str, level: str) -> None:
    """Send this process's log to standard error.

    Args:
        process: Name of the process, in each line.
        form: ``text`` or ``json``.
        level: Least level that is written.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if form == "json" else _Text(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # What libraries warn of holds values of data sets, and goes past the log.
    warnings.simplefilter("ignore")
    # They would log what peers send, patient data included.
    for name in ("pynetdicom", "pydicom", "PIL", "python_multipart"):
        found = logging.getLogger(name)
        found.disabled = found.propagate = False
        # Those below it would find no handler, and then write to standard error themselves.
        found.handlers[:] = [logging.NullHandler()]


def escape(text: str) -> str:
    """Return text with every character escaped that could end a line, move a cursor or hide others."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        return f"{_time(record)} {record.levelname.lower():7} {self._process}: {_message(record)}"


class _Json(_Text):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": _time(record),
                "level": record.levelname.lower(),
                "process": self._process,
                "message": _message(record),
            }
        )


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:
        # Never the exception's own text or the values in its frames: they may come from a data set.
        text += f" ({record.exc_info[0].__name__}{_where(record)})"
    return escape(text)


def _where(record: logging.LogRecord) -> str:
    trace = record.exc_info[2] if record.exc_info else None
    places = []
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " at " + " > ".join(places) if places else ""
