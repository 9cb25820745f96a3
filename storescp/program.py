"""How this program starts itself."""

from __future__ import annotations

import sys

# Without -P whatever lies in the current folder under the name of a module would be run, as root where root looks.
PROGRAM = (sys.executable, "-P", "-m", "storescp")
