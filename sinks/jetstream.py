"""NATS JetStream: every event as a message that the stream has stored before it counts as sent.

Subjects are ``<root>.v1.<node>.<stream>.event.<type>`` and ``….partial.<type>``; a dot within a
type or a name becomes ``_``. The message id is the event's, so that JetStream drops an event that
is sent again within the stream's window for duplicates. Partials go by core NATS: nobody stores
them. The driver, nats-py, is imported when a sink is opened.
"""

import asyncio
import re
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import structlog
from pydantic import Field, SecretStr

from sinks.envelope import MEDIA, EnvelopeSettings
from sinks.events import Event
from sinks.sink import Disconnected, Rejected, SinkError
from sinks.tls import TlsSettings

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext


log = structlog.get_logger(__name__)

DENIED: Final = "permissions violation"
"""What a server says of a subject that we may not use, in the driver's spelling."""


class NatsSettings(EnvelopeSettings, frozen=True):
    """A server with JetStream, and the stream that stores our events."""

    kind: Literal["nats"] = "nats"
    servers: tuple[str, ...] = Field(
        default=("nats://localhost:4222",), min_length=1, description="nats:// or tls:// URLs."
    )
    stream: str = Field(default="LIVESAT", pattern=r"^[A-Za-z0-9_-]+$")
    create: bool = Field(default=True, description="Make the stream if it is not there.")
    max_age_s: float = Field(default=604_800, gt=0, description="Of events in a stream we make.")
    duplicates_s: float = Field(
        default=3600, gt=0, description="In a stream we make: how long ids are remembered."
    )
    root: str = Field(default="livesat", pattern=r"^[A-Za-z0-9_-]+$")
    node: str = Field(default_factory=socket.gethostname, min_length=1)
    user: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    credentials: Path | None = Field(default=None, description="A .creds file.")
    tls: TlsSettings | None = Field(
        default=None, description="{}, as a tls:// URL, trusts the system's CAs."
    )
    timeout_s: float = Field(default=5.0, gt=0, description="How long the server may take.")
    in_flight: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Events on their way at once. One by one their order is certain; more are for "
        "a distant server, and a cluster that changes its leader then may store them in another.",
    )

    @property
    def encrypted(self) -> bool:
        """Whether TLS is spoken: one server with tls:// is enough for all of them."""
        return self.tls is not None or any(url.startswith("tls:") for url in self.servers)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["NatsSink"]:
        """Connect, and make the stream if it is not there.

        Raises:
            SinkError: the driver is not installed, the server is not there or refuses us, its
                certificate is not good, or it has no JetStream.
        """
        try:
            import nats.errors
            import nats.js.errors
        except ModuleNotFoundError as error:
            raise SinkError(
                f"the nats sink needs {error.name}: pip install 'livesat[nats]'"
            ) from None
        where = ", ".join(re.sub(r"//[^@/]*@", "//", server) for server in self.servers)
        lost = asyncio.Event()

        async def gone(*_: object) -> None:
            lost.set()

        denied: list[str] = []
        trust = self.tls or TlsSettings()
        tls = await asyncio.to_thread(trust.context) if self.encrypted else None

        async def told(error: Exception) -> None:
            """What goes wrong is told by the calls that it concerns, but for a lack of rights."""
            if DENIED in str(error):
                if not denied:
                    log.error("nats refuses a subject", error=str(error))
                denied[:] = [str(error)]

        client = _client(encrypted=self.encrypted)
        try:
            async with asyncio.timeout(self.timeout_s):
                await client.connect(
                    servers=list(self.servers),
                    user=self.user,
                    password=None if self.password is None else self.password.get_secret_value(),
                    token=None if self.token is None else self.token.get_secret_value(),
                    user_credentials=None if self.credentials is None else str(self.credentials),
                    tls=tls,
                    name="livesat",
                    connect_timeout=int(max(self.timeout_s, 1)),
                    # The fanout opens us again: a client that did it too would hide an outage.
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    disconnected_cb=gone,
                    closed_cb=gone,
                    error_cb=told,
                )
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise Disconnected(f"nats {where}: {str(error) or type(error).__name__}") from None
        try:
            stream = client.jetstream(timeout=self.timeout_s)
            try:
                await self._prepare(stream)
            except (TimeoutError, nats.errors.Error, nats.js.errors.Error) as error:
                raise SinkError(f"nats {where}: stream {self.stream}: {error}") from None
            yield NatsSink(self, client, stream, lost, denied)
        finally:
            with suppress(Exception):
                async with asyncio.timeout(1.0):
                    await client.close()

    async def _prepare(self, stream: "JetStreamContext") -> None:
        from nats.js.api import StreamConfig
        from nats.js.errors import NotFoundError

        try:
            await stream.stream_info(self.stream)
        except NotFoundError:
            if not self.create:
                raise
            await stream.add_stream(
                StreamConfig(
                    name=self.stream,
                    subjects=[f"{self.root}.v1.*.*.event.>"],
                    max_age=self.max_age_s,
                    duplicate_window=min(self.duplicates_s, self.max_age_s),
                )
            )

    def subject(self, event: Event) -> str:
        """Where an event goes."""
        kind = "event" if event.is_final else "partial"
        parts = (self.root, "v1", self.node, event.stream_id, kind, event.type)
        return ".".join(token(part) for part in parts)


def _client(*, encrypted: bool) -> "Client":
    """The driver's client; one that is to be encrypted tells nothing to a server without TLS.

    The driver encrypts only if the server asks for it, and would show it our password in clear.
    """
    from nats.aio.client import Client
    from nats.errors import Error

    class Encrypted(Client):
        def _connect_command(self) -> bytes:
            if not self._server_info.get("tls_required"):
                if self._transport is not None:
                    self._transport.close()  # the driver would leave it open
                raise Error("nats: expected TLS, the server has none")
            return super()._connect_command()

    return Encrypted() if encrypted else Client()


def token(name: str) -> str:
    """A name → one token of a subject."""
    return re.sub(r"[\s.*>\x00-\x1f]", "_", name) or "_"


class NatsSink:
    """An open connection."""

    def __init__(
        self,
        settings: NatsSettings,
        client: "Client",
        stream: "JetStreamContext",
        lost: asyncio.Event,
        denied: Sequence[str] = (),
    ) -> None:
        self._settings, self._client, self._stream, self._lost = settings, client, stream, lost
        self._denied = denied  # what the server has said last of our rights

    @property
    def limit(self) -> int:
        """Events that wait for their acknowledgement together."""
        return self._settings.in_flight

    async def send_many(self, events: Sequence[Event]) -> None:
        """Deliver several, each on its way before the first is acknowledged.

        What was stored is known by its id when all of them are sent again.

        Raises:
            SinkError: as `send`, of the first that failed.
        """
        # Tasks begin in order, and each writes its event before it waits for anything.
        told = await asyncio.gather(*map(self.send, events), return_exceptions=True)
        for error in told:
            if error is not None:
                raise error

    async def send(self, event: Event) -> None:
        """Deliver one event; a final is stored when this returns.

        Raises:
            Disconnected: the connection is gone, or the server did not answer in time.
            SinkError: it says that it cannot now: no leader, no room.
            Rejected: it refused the event.
        """
        import nats.errors
        import nats.js.errors

        settings = self._settings
        payload, subject = settings.encode(event), settings.subject(event)
        headers = {
            "Nats-Msg-Id": event.id,
            "Content-Type": MEDIA[settings.envelope],
            "session_id": event.session_id,
            "seq": str(event.seq),
            "type": event.type,
        }
        try:
            if event.is_final:
                await self._stream.publish(
                    subject,
                    payload,
                    timeout=settings.timeout_s,
                    stream=settings.stream,
                    headers=headers,
                )
            else:
                await self._client.publish(subject, payload, headers=headers)
        except nats.js.errors.APIError as error:
            said = f"nats: {error.description or error}"
            # The driver does not give a code to each of its classes.
            later = nats.js.errors.ServiceUnavailableError | nats.js.errors.ServerError
            if isinstance(error, later) or (error.code or 0) >= 500:
                raise SinkError(said) from None
            raise Rejected(said) from None
        except nats.errors.MaxPayloadError as error:
            raise Rejected(f"nats: {error}") from None
        except (OSError, TimeoutError, nats.errors.Error, nats.js.errors.Error) as error:
            # What may not be published is not answered: the server says it beside.
            for said in self._denied:
                if f'"{subject.lower()}"' in said:
                    raise Rejected(said) from None
            raise Disconnected(f"nats: {str(error) or type(error).__name__}") from None

    async def lost(self) -> None:
        """Return once the connection is lost."""
        await self._lost.wait()
