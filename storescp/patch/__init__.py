"""Patch age: what runs here, and how old its oldest unapplied fix is. Nothing in here speaks to a network."""
