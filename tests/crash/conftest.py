"""What the crash tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Collect the sockets that pynetdicom left open when a server died, while their warnings are still expected."""
    yield
    gc.collect()
