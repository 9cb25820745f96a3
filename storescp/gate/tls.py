"""The gate's TLS: 1.2 and 1.3, AEAD with forward secrecy, client certificates always (PS3.15 B.12)."""

from __future__ import annotations

import ssl
from pathlib import Path

from storescp.peers import Peers

# In words, what an admin can do about a handshake that failed; by OpenSSL's reason.
_WORDS = {
    "HTTP_REQUEST": "the peer speaks HTTP, not DICOM over TLS",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS; switch TLS on at the peer",
    "UNSUPPORTED_PROTOCOL": "the peer offers only TLS versions older than 1.2",
    "VERSION_TOO_LOW": "the peer offers only TLS versions older than 1.2",
    "NO_SHARED_CIPHER": "the peer offers no cipher suite with AES-GCM and forward secrecy",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer sent no certificate; configure its key and certificate at the peer",
    "CERTIFICATE_VERIFY_FAILED": "the peer's certificate is not accepted",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know the authority of this server's certificate; install it there",
    "TLSV1_ALERT_BAD_CERTIFICATE": "the peer does not accept this server's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not accept this server's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer holds this server's certificate for expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the peer does not accept this server's certificate",
}


def server_context(certificate: Path, private_key: Path, trust: list[Path], peers: Peers) -> ssl.SSLContext:
    """Return the context for connections from peers.

    Raises:
        OSError: A file cannot be read, or is no certificate or key (ssl.SSLError).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM")
    # No resumption: each connection proves its certificate anew, and a removed peer is out at once.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    # A certificate bound in a peer file is trusted for itself, whoever issued it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_cert_chain(certificate, private_key)
    for file in trust:
        context.load_verify_locations(file)
    pinned = "\n".join(pem for peer in peers.by_title.values() for pem in peer.certificates)
    if pinned:
        context.load_verify_locations(cadata=pinned)
    return context


def explain(error: OSError) -> str:
    """Return in words why a handshake failed, from OpenSSL's own reason and nothing the peer sent."""
    if isinstance(error, TimeoutError):
        return "the peer did not finish the TLS handshake in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError):
        return "the peer closed the connection during the TLS handshake"
    return _WORDS.get(error.reason or "", f"OpenSSL says {error.reason}")
