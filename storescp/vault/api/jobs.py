"""The schedule: its jobs, when each is due and how each ended, and a job that is done now."""

from __future__ import annotations

import msgspec

from storescp.control import Request, Response, json_response, lines_response
from storescp.vault.api.requests import Routes, told
from storescp.vault.schedule import Schedule


class JobRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which job to do."""

    job: str


class Jobs:
    """Requests about the schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def routes(self) -> Routes:
        """Return what is answered here."""
        return {
            ("GET", "/v1/jobs"): self._jobs,
            ("GET", "/v1/jobs/history"): self._history,
            ("POST", "/v1/jobs/run"): self._run,
        }

    def _jobs(self, _request: Request) -> Response:
        # Locked or not, and whatever the vault is at: who watches the schedule must get an answer.
        return json_response(self._schedule.view())

    def _history(self, _request: Request) -> Response:
        return json_response({"format": 1, "items": self._schedule.history()})

    def _run(self, request: Request) -> Response:
        asked: JobRequest = request.json(JobRequest)
        return lines_response(told(self._schedule.run(asked.job, request.uid)), at_once=True)
