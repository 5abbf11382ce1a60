"""TLS of a sink's connection: whom to trust, and who we are."""

import ssl
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from sinks.sink import SinkError


class TlsSettings(BaseModel, frozen=True, extra="forbid"):
    """An encrypted connection; the other side's certificate and name are always checked."""

    ca_file: Path | None = Field(
        default=None, description="Certificates to trust; the system's when absent."
    )
    cert_file: Path | None = Field(default=None, description="Our own certificate, with its chain.")
    key_file: Path | None = Field(default=None, description="The key of our own certificate.")

    def context(self) -> ssl.SSLContext:
        """Load the certificates; blocking.

        Raises:
            SinkError: a file is missing or not what it should be.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as error:
            files = ", ".join(str(f) for f in (self.ca_file, self.cert_file, self.key_file) if f)
            raise SinkError(f"cannot use the TLS files {files}: {error}") from None
        return context


def _switch(value: Any) -> Any:
    if isinstance(value, bool):
        return TlsSettings() if value else None
    return value


Tls = Annotated[TlsSettings | None, BeforeValidator(_switch)]
"""Settings of TLS, or only whether there is to be any: true trusts the system's certificates."""
