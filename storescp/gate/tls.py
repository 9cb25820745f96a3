"""The gate's TLS: 1.2 and 1.3, AEAD with forward secrecy, client certificates always (PS3.15 B.12)."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from storescp.gate import crl
from storescp.gate.crl import Revocations
from storescp.peers import Peers, Proof, alternative_names, key_print

# In words, what an admin can do about a handshake that failed; by OpenSSL's reason.
_WORDS = {
    "HTTP_REQUEST": "the peer speaks HTTP, not DICOM over TLS",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS; switch TLS on at the peer",
    "UNSUPPORTED_PROTOCOL": "the peer offers only TLS versions older than 1.2; update or configure its TLS",
    "VERSION_TOO_LOW": "the peer offers only TLS versions older than 1.2; update or configure its TLS",
    "NO_SHARED_CIPHER": "the peer offers no cipher suite with AES-GCM and forward secrecy; allow ECDHE-*-GCM there",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer sent no certificate; configure its key and certificate at the peer",
    "CERTIFICATE_VERIFY_FAILED": "the peer's certificate is not accepted",
    "EE_KEY_TOO_SMALL": "the key of the peer's certificate is too small; RSA needs 2048 bits: issue a new one",
    "CA_KEY_TOO_SMALL": "the key of the peer's authority is too small; RSA needs 2048 bits",
    "CA_MD_TOO_WEAK": "the peer's certificate is signed with SHA-1 or weaker: issue a new one",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know the authority of this server's certificate; install it there",
    "TLSV1_ALERT_BAD_CERTIFICATE": "the peer does not accept this server's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not accept this server's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer holds this server's certificate for expired; check both clocks",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the peer does not accept this server's certificate",
}
# The same where OpenSSL did not accept the certificate; by its X509_V_ERR number.
_NOT_ACCEPTED = {
    9: "it is not valid yet; check the clocks of the peer and of this server",
    10: "it has expired; 'strongroom peer renew' issues a new one",
    18: "it is self-signed and in no peer file; 'strongroom peer add --certificate' binds it",
    19: "its authority is not in gate.trust",
    20: "its authority is not in gate.trust, and it is in no peer file",
    21: "its authority is not in gate.trust, or the peer sends its chain incompletely",
    26: "it is not issued for TLS clients (extended key usage)",
    66: "its key is too small; RSA needs 2048 bits: issue a new one",
    67: "the key of its authority is too small; RSA needs 2048 bits",
    68: "it is signed with SHA-1 or weaker: issue a new one",
}


class Trust:
    """Certificates of authorities and their revocation lists, as configured."""

    def __init__(self, files: Iterable[Path], lists: Iterable[Path]) -> None:
        """Read them.

        Raises:
            OSError: A file cannot be read, or holds no certificate (ssl.SSLError).
            CrlError: A revocation list cannot be used.
        """
        self.files = list(files)
        authorities = [a for file in self.files for a in _certificates(file)]
        self._authorities = frozenset(authorities)
        self.revocations: Revocations = crl.read(lists, authorities)

    def proof(self, chain: list[x509.Certificate]) -> Proof:
        """Return what a verified chain proves, leaf first."""
        leaf = chain[0]
        # A certificate that is trusted through a peer file speaks for itself and for nobody that it signs.
        above = chain[1:] if chain[-1] in self._authorities else []
        return Proof(
            leaf.fingerprint(SHA256()).hex(),
            key_print(leaf),
            alternative_names(leaf) if above else frozenset(),
            frozenset(key_print(authority) for authority in above),
        )


def server_context(certificate: Path, private_key: Path, trust: Trust, peers: Peers) -> ssl.SSLContext:
    """Return the context for connections from peers.

    Raises:
        OSError: A file cannot be read, or is no certificate or key (ssl.SSLError).
    """
    for file in (certificate, private_key):
        # OpenSSL does not say which one it cannot open.
        file.open("rb").close()
    context = strict_context()
    context.load_cert_chain(certificate, private_key)
    trusted(context, trust, peers)
    return context


def trusted(context: ssl.SSLContext, trust: Trust, peers: Peers) -> None:
    """Let a context trust the configured authorities, and each certificate that a peer file binds for itself.

    Raises:
        OSError: A file cannot be read (ssl.SSLError: or holds no certificate).
    """
    for file in trust.files:
        context.load_verify_locations(file)
    # As DER: what else a peer file has around a certificate, text or a second one, is not trusted and breaks nothing.
    pinned = b"".join(_der(pem) for peer in peers.by_title.values() for pem in peer.certificates)
    if pinned:
        context.load_verify_locations(cadata=pinned)


def strict_context() -> ssl.SSLContext:
    """Return a context without certificates: versions, suites and rules of every connection with TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Level 2: RSA of 2048 bits at least in every certificate, no SHA-1 in a signature that counts (in one that is
    # trusted for itself none does), nor in a key exchange.
    context.set_ciphers("ECDHE+AESGCM:@SECLEVEL=2")
    # No resumption: each connection proves its certificate anew, and a removed peer is out at once.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    # A certificate bound in a peer file is trusted for itself, whoever issued it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def verified_chain(connection: ssl.SSLSocket) -> list[x509.Certificate]:
    """Return the chain that OpenSSL verified, leaf first."""
    # Public as SSLSocket.get_verified_chain since Python 3.13, and below it there under this name since 3.10.
    private: Any = connection
    return [
        x509.load_pem_x509_certificate(certificate.public_bytes().encode())
        for certificate in private._sslobj.get_verified_chain()
    ]


def explain(error: OSError) -> str:
    """Return in words why a handshake failed, from OpenSSL's own reason and nothing the peer sent."""
    if isinstance(error, TimeoutError):
        return "the peer did not finish the TLS handshake in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        words = _NOT_ACCEPTED.get(error.verify_code, error.verify_message)
        return f"the peer's certificate is not accepted: {words}"
    # Without a reason it is the connection that ended (SSL_ERROR_SYSCALL), not something that OpenSSL found.
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError) or error.reason is None:
        return "the peer closed the connection during the TLS handshake"
    return _WORDS.get(error.reason or "", f"OpenSSL says {error.reason}")


def _certificates(file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except (ValueError, x509.InvalidVersion) as error:
        raise ssl.SSLError(f"{file} holds no certificate in PEM") from error


def _der(pem: str) -> bytes:
    return x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
