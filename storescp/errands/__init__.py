"""Short processes that speak to the network, and hand over files: never to the vault, never from it."""
