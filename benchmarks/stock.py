"""A stock pynetdicom SCP over TLS that writes what it receives.

``python -m benchmarks.stock PORT KEY CERT CA FOLDER``
"""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification


def main(port: int, key: str, certificate: str, authority: str, folder: Path) -> None:
    """Serve until killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)

    def store(event: Event) -> int:
        name = event.request.AffectedSOPInstanceUID
        with (folder / f"{name}.dcm").open("wb") as file:
            file.write(event.encoded_dataset())
        return 0x0000

    ae = AE("STOCK")
    ae.maximum_pdu_size = 131_072
    ae.maximum_associations = 100
    ae.supported_contexts = AllStoragePresentationContexts
    ae.add_supported_context(Verification)
    ae.start_server(("127.0.0.1", port), ssl_context=context, evt_handlers=[(evt.EVT_C_STORE, store)])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], Path(sys.argv[5]))
