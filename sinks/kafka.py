"""Kafka: every event as a record of one topic, keyed by session, so that its order is kept.

The producer is idempotent and waits for all replicas: a record that counts as sent is stored once.
The driver, aiokafka, is imported when a sink is opened.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog
from pydantic import Field, SecretStr

from sinks.envelope import MEDIA, EnvelopeSettings
from sinks.events import Event
from sinks.sink import Disconnected, Rejected, SinkError
from sinks.tls import Tls

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

log = structlog.get_logger(__name__)

FAREWELL_S: Final = 3.0
"""How long leaving may take: the driver waits for brokers to take what it still holds."""


class KafkaSettings(EnvelopeSettings, frozen=True):
    """A cluster and a topic."""

    kind: Literal["kafka"] = "kafka"
    brokers: tuple[str, ...] = Field(
        default=("localhost:9092",), min_length=1, description="host:port of some of its brokers."
    )
    topic: str = Field(default="livesat.events.v1", pattern=r"^[A-Za-z0-9._-]{1,249}$")
    compression: Literal["gzip"] | None = None
    tls: Tls = Field(default=None, description="true or {} trusts the system's CAs.")
    username: str | None = Field(default=None, description="For SASL/PLAIN.")
    password: SecretStr | None = None
    timeout_s: float = Field(default=10.0, gt=0, description="How long the cluster may take.")
    partials: bool = Field(
        default=False, description="Also events that later ones may replace (is_final false)."
    )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["KafkaSink"]:
        """Connect.

        Raises:
            SinkError: the driver is not installed, no broker is there, or TLS is not possible.
        """
        try:
            from aiokafka import AIOKafkaProducer
            from aiokafka.errors import KafkaError
        except ModuleNotFoundError as error:
            raise SinkError(
                f"the kafka sink needs {error.name}: pip install 'livesat[kafka]'"
            ) from None
        producer = AIOKafkaProducer(**await asyncio.to_thread(self.options))
        try:
            await producer.start()
        except (KafkaError, OSError) as error:
            await _leave(producer)
            brokers = ", ".join(self.brokers)
            raise Disconnected(f"kafka {brokers}: {str(error) or type(error).__name__}") from None
        try:
            yield KafkaSink(self, producer)
        finally:
            await _leave(producer)

    def options(self) -> dict[str, Any]:
        """What the producer is made with; blocking, with TLS.

        Raises:
            SinkError: a file of TLS is missing or not what it should be.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.brokers),
            "client_id": "livesat",
            "acks": "all",
            "enable_idempotence": True,
            "compression_type": self.compression,
            "request_timeout_ms": int(self.timeout_s * 1000),
        }
        plain = self.username is None
        options["security_protocol"] = {
            (False, True): "PLAINTEXT",
            (False, False): "SASL_PLAINTEXT",
            (True, True): "SSL",
            (True, False): "SASL_SSL",
        }[self.tls is not None, plain]
        if self.tls is not None:
            options["ssl_context"] = self.tls.context()
        if not plain:
            secret = self.password.get_secret_value() if self.password is not None else ""
            options |= {
                "sasl_mechanism": "PLAIN",
                "sasl_plain_username": self.username,
                "sasl_plain_password": secret,
            }
        return options


async def _leave(producer: "AIOKafkaProducer") -> None:
    """Close the producer, even if what it holds cannot be delivered: it is offered again."""
    try:
        async with asyncio.timeout(FAREWELL_S):
            await producer.stop()
    except TimeoutError:
        log.warning("kafka producer did not stop in time", seconds=FAREWELL_S)
        # It has no other way to end: its task would go on trying, its connections stay open.
        sender = getattr(getattr(producer, "_sender", None), "sender_task", None)
        if sender is not None:
            sender.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await producer.client.close()


class KafkaSink:
    """A started producer."""

    def __init__(self, settings: KafkaSettings, producer: "AIOKafkaProducer") -> None:
        self._settings, self._producer = settings, producer

    async def send(self, event: Event) -> None:
        """Deliver one event; all replicas have it when this returns.

        Raises:
            Disconnected: the cluster cannot be reached, did not answer in time, or has no use for
                this producer any more.
            SinkError: we have no right to the topic: that is no fault of this record.
            Rejected: it refused the record.
        """
        from aiokafka.errors import (
            InvalidProducerEpoch,
            InvalidProducerIdMapping,
            KafkaError,
            OutOfOrderSequenceNumber,
            ProducerClosed,
            ProducerFenced,
            TopicAuthorizationFailedError,
            UnknownProducerId,
        )

        settings = self._settings
        headers = [
            ("id", event.id.encode()),
            ("type", event.type.encode()),
            ("content-type", MEDIA[settings.envelope].encode()),
        ]
        try:
            # An idempotent producer of this driver never gives up by itself.
            async with asyncio.timeout(settings.timeout_s):
                await self._producer.send_and_wait(
                    settings.topic,
                    settings.encode(event),
                    key=event.session_id.encode(),
                    timestamp_ms=int(event.wall_time.timestamp() * 1000),
                    headers=headers,
                )
        except TimeoutError:
            raise Disconnected(
                f"kafka: no answer from {', '.join(settings.brokers)} in {settings.timeout_s:g} s"
            ) from None
        except KafkaError as error:
            what = f"kafka: {str(error) or type(error).__name__}"
            # A refused record uses up a number of the producer's, and the broker misses it: only a
            # producer with another id can go on.
            finished = isinstance(
                error,
                OutOfOrderSequenceNumber
                | UnknownProducerId
                | InvalidProducerEpoch
                | InvalidProducerIdMapping
                | ProducerFenced
                | ProducerClosed,
            )
            broken = type(error) is KafkaError  # the driver's own words for a fault of its own
            if finished or broken or getattr(error, "retriable", False):
                raise Disconnected(what) from None
            if isinstance(error, TopicAuthorizationFailedError):
                raise SinkError(what) from None
            raise Rejected(what) from None
        except OSError as error:
            raise Disconnected(f"kafka: {error}") from None
