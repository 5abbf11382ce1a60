"""Redis Streams: every event as an entry of its stream's key, trimmed to a length.

Keys are ``<root>:v1:<stream>``; fields are ``id``, ``type``, ``session_id``, ``seq`` and ``event``,
the JSON object. The driver, redis, is imported when a sink is opened.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, SecretStr

from sinks.envelope import EnvelopeSettings
from sinks.events import Event
from sinks.sink import Disconnected, Rejected, SinkError
from sinks.tls import Tls

if TYPE_CHECKING:
    from redis.asyncio import Redis

LATER: Final = frozenset({"MISCONF", "BUSY", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS"})
"""First words of errors that a later attempt may not meet."""


class RedisSettings(EnvelopeSettings, frozen=True):
    """A Redis server."""

    kind: Literal["redis"] = "redis"
    host: str = Field(default="localhost", min_length=1)
    port: int = Field(default=6379, ge=1, le=65535)
    database: int = Field(default=0, ge=0)
    tls: Tls = Field(default=None, description="true or {} trusts the system's CAs.")
    username: str | None = None
    password: SecretStr | None = None
    root: str = Field(default="livesat", min_length=1, description="First part of every key.")
    length: int = Field(
        default=100_000, ge=1, description="Entries a key keeps, about; the oldest go."
    )
    timeout_s: float = Field(default=5.0, gt=0, description="How long the server may take.")
    partials: bool = Field(
        default=False, description="Also events that later ones may replace (is_final false)."
    )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["RedisSink"]:
        """Connect.

        Raises:
            SinkError: the driver is not installed, the server is not there or refuses us, or its
                certificate is not good.
        """
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ModuleNotFoundError as error:
            raise SinkError(
                f"the redis sink needs {error.name}: pip install 'livesat[redis]'"
            ) from None
        if self.tls is not None:
            # The driver loads the files by itself, and would not say which one is wrong.
            await asyncio.to_thread(self.tls.context)
        client = Redis(
            host=self.host,
            port=self.port,
            db=self.database,
            ssl=self.tls is not None,
            ssl_ca_certs=None if self.tls is None else _path(self.tls.ca_file),
            ssl_certfile=None if self.tls is None else _path(self.tls.cert_file),
            ssl_keyfile=None if self.tls is None else _path(self.tls.key_file),
            ssl_check_hostname=True,  # drivers before 6 do not by themselves
            username=self.username,
            password=None if self.password is None else self.password.get_secret_value(),
            socket_timeout=self.timeout_s,
            socket_connect_timeout=self.timeout_s,
            client_name="livesat",
            # The fanout tries again: a driver that did it too would hide an outage, and send twice.
            retry=Retry(NoBackoff(), 0),
        )
        try:
            try:
                await client.ping()  # pyright: ignore[reportGeneralTypeIssues]
            except (RedisError, OSError) as error:
                what = str(error) or type(error).__name__
                raise Disconnected(f"redis {self.host}:{self.port}: {what}") from None
            yield RedisSink(self, client)
        finally:
            await client.aclose()


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


class RedisSink:
    """An open connection."""

    def __init__(self, settings: RedisSettings, client: "Redis") -> None:
        self._settings, self._client = settings, client

    async def send(self, event: Event) -> None:
        """Deliver one event.

        Raises:
            Disconnected: the connection is gone, or the server did not answer in time.
            SinkError: the server says that it cannot now: out of memory, say.
            Rejected: it refused the entry: no right, another type under the key.
        """
        from redis.exceptions import (
            ClusterDownError,
            MasterDownError,
            OutOfMemoryError,
            ReadOnlyError,
            RedisError,
            ResponseError,
            TryAgainError,
        )
        from redis.exceptions import ConnectionError as Gone
        from redis.exceptions import TimeoutError as Late

        settings = self._settings
        try:
            await self._client.xadd(
                f"{settings.root}:v1:{event.stream_id}",
                {
                    "id": event.id,
                    "type": event.type,
                    "session_id": event.session_id,
                    "seq": event.seq,
                    "event": settings.encode(event),
                },
                maxlen=settings.length,
                approximate=True,
            )
        except (Gone, Late, OSError) as error:
            raise Disconnected(f"redis: {str(error) or type(error).__name__}") from None
        except ResponseError as error:
            # The driver cuts the first word off the errors it has a class for: which, is a matter
            # of its version.
            word = str(error).partition(" ")[0]
            if isinstance(error, ReadOnlyError | MasterDownError) or word == "MASTERDOWN":
                # The server became a replica; its name leads to another.
                raise Disconnected(f"redis: {error}") from None
            later = isinstance(error, OutOfMemoryError | ClusterDownError | TryAgainError)
            if later or word in LATER:
                raise SinkError(f"redis: {error}") from None
            raise Rejected(f"redis: {error}") from None
        except RedisError as error:
            raise Disconnected(f"redis: {error}") from None
