"""What a C-STORE is answered with: one table of refusals (PS3.4 B.2.3, PS3.7 9.1.1.1.9).

Comments are at most 64 characters and hold nothing from the data set.
"""

from __future__ import annotations

import enum

SUCCESS = 0x0000
UNRECOGNIZED_OPERATION = 0x0211


class Reason(enum.Enum):
    """Why an object is refused: status and Error Comment."""

    NO_SPACE = (0xA700, "out of resources: no space left")
    NO_STORAGE = (0xA700, "out of resources: storage not available")
    NO_KEY = (0xA700, "out of resources: no deposit key published")
    DAY_USED_UP = (0xA700, "out of resources: this peer's bytes of the day are used up")
    MISMATCH = (0xA900, "data set does not match SOP class or instance of the command")
    OTHER_STUDY = (0xA901, "data set is not of the study that the request names")
    NO_STUDY = (0xC000, "data set has no valid Study or Series Instance UID")
    UNPARSABLE = (0xC001, "data set cannot be understood")
    HEAD_TOO_LARGE = (0xC002, "too much data before the Study Instance UID")
    ATTRIBUTES_TOO_LARGE = (0xC003, "attributes of the data set are too large")
    NO_DATA_SET = (0xC004, "no data set in the request")
    TRANSFER_SYNTAX = (0xC122, "transfer syntax not supported")
    INTERNAL = (0xC0FF, "internal error, see the server's log")
    INVALID_UID = (0x0117, "invalid SOP Instance UID")
    SOP_CLASS = (0x0122, "SOP class not supported")
    NOT_AUTHORIZED = (0x0124, "this peer may not store")

    @property
    def status(self) -> int:
        """The status code."""
        return self.value[0]

    @property
    def comment(self) -> str:
        """The Error Comment."""
        return self.value[1]


# For requests that name a study, or that have negotiated no transfer syntax: DICOMweb's.
OF_THE_WEB = frozenset({Reason.OTHER_STUDY, Reason.TRANSFER_SYNTAX})


class RefusedError(Exception):
    """An object is refused for a reason of the table."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.comment)
        self.reason = reason
