"""``python -m storescp`` is the ``strongroom`` command; the supervisor starts its processes this way."""

from storescp.cli import main

main()
