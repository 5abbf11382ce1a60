"""The daemon's own server: audio comes in, events go out, over HTTP and WebSocket.

Settings, and the life of the listening socket; what is served there is in ``stream.web``.
Starlette, uvicorn and websockets are the ``server`` extra, imported when the server starts.
"""

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, Self, cast

import structlog
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from stream.fanout import Statistics
from stream.feed import Feed
from stream.metrics import Histogram
from stream.sources.source import Intake, SourceError
from stream.survival import Survivor

log = structlog.get_logger(__name__)


class Desk(Intake, Protocol):
    """What the server asks of the house."""

    @property
    def feed(self) -> Feed:
        """Everything that is emitted."""
        ...

    @property
    def resume_s(self) -> float:
        """How long a session waits for its caller to come back."""
        ...

    @property
    def names(self) -> set[str]:
        """Names that streams have, will have, or may come back under."""
        ...

    def claim(self, token: str) -> Survivor | None:
        """The session of an earlier process with this token, once."""
        ...

    def give_back(self, survivor: Survivor) -> None:
        """What was claimed cannot go on now; it may be claimed again."""
        ...

    async def drained(self) -> None:
        """Wait until every stream that the server did not bring has ended."""
        ...

    def status(self) -> "Status":
        """How the house is."""
        ...

    @property
    def lag(self) -> Histogram:
        """Capture to emission, milliseconds."""
        ...

    async def name_speaker(
        self,
        session_id: str,
        label: str,
        name: str,
        enrol: bool,
        consent: str | None = None,
        expires: datetime | None = None,
    ) -> None:
        """Say who a label of an open session is.

        Args:
            session_id: An open session.
            label: As "S2".
            name: The person's.
            enrol: Keep the voice.
            consent: What the person agreed to; None notes who enrolled them.
            expires: When the voice is erased, with a zone; None is never.

        Raises:
            LookupError: no such session or label.
            VoiceprintError: the voice cannot be kept.
        """
        ...

    async def voices(self) -> list[str]:
        """Names of the enrolled people."""
        ...


@dataclass(frozen=True, slots=True)
class Status:
    """How the house is, at a glance.

    Attributes:
        streams: Open sessions.
        slots: As many there could be.
        lag_p50_ms: Capture to emission.
        lag_p99_ms: Likewise.
        realtime_factor: Compute seconds for a second of audio.
        busy_s: For how long the batch in the engine has been there.
        engine_waiting: Chunks that wait for the engine.
        audio_s: Audio computed.
        compute_s: Seconds of that.
        lost_s: Seconds of audio in gaps, of closed sessions and open ones.
        batches: Batch size → how many batches had it.
        events: How many of each type.
        sinks: Name → what became of its events.
        readers: Subscribers of the feed.
        evicted: Subscribers that were too slow.
        stopping: The daemon drains.
        loop_p99_ms: How late the event loop calls what is due.
        tasks: Of the event loop.
        faults: Exceptions that nobody retrieved.
        history_bytes: Lines of the feed that are kept for who comes late.
    """

    streams: int
    slots: int
    lag_p50_ms: float
    lag_p99_ms: float
    realtime_factor: float
    busy_s: float
    engine_waiting: int
    audio_s: float
    compute_s: float
    lost_s: float
    batches: dict[int, int]
    events: dict[str, int]
    sinks: dict[str, Statistics]
    readers: int
    evicted: int
    stopping: bool
    loop_p99_ms: float
    tasks: int
    faults: int
    history_bytes: int


SHORTEST_TOKEN: Final = 16
"""Characters below which a token can be guessed."""


class ServerSettings(BaseModel):
    """Where the server listens, whom it lets in, and how much of everything."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(
        default=8080, ge=0, le=65535, description="0 takes a free one, which the log tells."
    )
    token: SecretStr | None = Field(
        default=None, description="What a client must show; needed where others can connect."
    )
    tokens: tuple[SecretStr, ...] = Field(
        default=(), description="More of them: one a client, so that one can be taken away."
    )
    tls_cert: Path | None = Field(default=None, description="Certificate with its chain, PEM.")
    tls_key: Path | None = Field(default=None, description="Its key, PEM.")
    origins: tuple[str, ...] = Field(
        default=(),
        description="Other sites whose pages may connect, as https://host:port; ours always may.",
    )
    proxies: tuple[str, ...] = Field(
        default=(), description="Reverse proxies whose X-Forwarded-For is believed, by address."
    )
    max_streams: int = Field(default=4, ge=1, le=1024, description="Audio streams at a time.")
    max_streams_per_ip: int | None = Field(
        default=None, ge=1, description="Those of one address; null: no fewer than all."
    )
    max_connections: int = Field(default=256, ge=1, le=65_536, description="Of every kind.")
    max_connections_per_ip: int = Field(default=64, ge=1, description="Those of one address.")
    connects_per_minute: int = Field(
        default=300, ge=1, description="Requests of one address, beyond which it must wait."
    )
    max_message_bytes: int = Field(
        default=1 << 20, ge=1024, le=1 << 26, description="A longer WebSocket message is refused."
    )
    messages_per_s: float = Field(
        default=200, gt=0, description="Small messages of one connection: beyond it is closed."
    )
    idle_s: float = Field(
        default=60, gt=0, description="A connection that sends nothing for this long is closed."
    )
    buffer_ms: int = Field(default=2000, ge=20, description="Audio that may wait for the engine.")

    @property
    def streams(self) -> int:
        """See `Listener.streams`."""
        return self.max_streams

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every token; none means that whoever can connect may."""
        tokens = self.tokens if self.token is None else (self.token, *self.tokens)
        return tuple(token.get_secret_value() for token in tokens)

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _safe(self) -> Self:
        for secret in self.secrets:
            if len(secret) < SHORTEST_TOKEN or not secret.isascii() or not secret.isprintable():
                raise ValueError(
                    f"expected tokens of {SHORTEST_TOKEN} or more printable ASCII characters, "
                    f"got one of {len(secret)}"
                )
        if not self.local and not self.secrets:
            raise ValueError(
                f"expected a token where others can connect, got host {self.host!r} and none; "
                "set server.token, or server.host to 127.0.0.1"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("expected tls_cert and tls_key together, got one of them")
        return self

    async def serve(self, name: str, intake: Intake) -> None:
        """See `Listener.serve`."""
        try:
            web = await asyncio.to_thread(import_module, "stream.web.server")
        except ImportError as error:
            raise SourceError(
                f"the server needs {error.name}; pip install 'livesat[server]' brings it"
            ) from error
        with self._socket() as listening:
            address, port = listening.getsockname()[:2]
            log.info("listening", source=name, kind="server", host=address, port=port)
            if not self.local and self.tls_cert is None:
                log.warning("tokens and audio travel unencrypted", host=address, hint="tls_cert")
            # The one who serves a server is the house itself.
            started = partial(intake.listening, name)
            await web.serve(self, cast("Desk", intake), listening, started)

    def ssl_context(self) -> ssl.SSLContext | None:
        """The certificate, loaded; blocks.

        Raises:
            SourceError: a file is missing or not what it should be.
        """
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except OSError as error:
            raise SourceError(
                f"cannot use the TLS files {self.tls_cert}, {self.tls_key}: {error}"
            ) from error
        return context

    def _socket(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
            listening.listen()  # a port that another one listens on may be bound, but no more
        except OSError as error:
            listening.close()
            raise SourceError(
                f"server {self.host}:{self.port}: cannot listen ({error.strerror or error})"
            ) from error
        return listening
