"""The gate: the network face. Receives, validates, seals, deposits; can open nothing that is archived."""
