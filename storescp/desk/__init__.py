"""The desk: finds and gives back. It has a TLS key and no key of the store; the vault decides each request."""
