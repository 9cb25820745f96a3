"""Who asks: the pure decision about a connection's certificate, made anew for each request."""

from __future__ import annotations

import ipaddress
from datetime import datetime

from cryptography import x509

from storescp.gate.connection import Policy
from storescp.peers import Peer


def asking(policy: Policy, chain: list[x509.Certificate], address: str, now: datetime) -> Peer | None:
    """Return the peer that a connection is of, the first by AE title; none where nobody with a role is.

    A connection outlives its handshake: whom the policy trusted then, it may not trust any more.

    Args:
        policy: As it is now.
        chain: What OpenSSL verified in the handshake, leaf first.
        address: Where the connection comes from, without its port.
        now: UTC, with its zone.
    """
    if any(not c.not_valid_before_utc <= now <= c.not_valid_after_utc for c in chain):
        return None
    if policy.trust.revocations.refusal(chain, now):
        return None
    proof = policy.trust.proof(chain)
    place = ipaddress.ip_address(address.partition("%")[0])
    for _, peer in sorted(policy.peers.by_title.items()):
        # Without an authority above it, a certificate is trusted through a peer file alone.
        if not proof.authorities and proof.fingerprint not in peer.fingerprints:
            continue
        if peer.roles and peer.holds(proof) and (not peer.networks or any(place in net for net in peer.networks)):
            return peer
    return None


def may_store(peer: Peer) -> bool:
    """Tell whether a peer may store."""
    return not peer.roles.isdisjoint({"sender", "admin"})


def may_read(peer: Peer) -> bool:
    """Tell whether a peer may find and fetch. The vault decides it, too."""
    return not peer.roles.isdisjoint({"reader", "admin"})
