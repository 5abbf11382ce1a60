"""MQTT v5: every event under its stream's topic, the stream's state, and whether we are online.

==============================================  ===  ========  ====================================
topic                                           QoS  retained  payload
==============================================  ===  ========  ====================================
``<root>/v1/<node>/<stream>/event/<type>``      1    no        a final event
``<root>/v1/<node>/<stream>/partial/<type>``    0    no        an event later ones may replace
``<root>/v1/<node>/<stream>/state``             1    yes       `StreamState`
``<root>/v1/<node>/status``                     1    yes       ``online`` or ``offline``
==============================================  ===  ========  ====================================

With ``home_assistant``, a sensor of every stream is announced under Home Assistant's discovery
prefix, retained: its state is who speaks.

What is retained of a caller's stream is cleared, by an empty payload, when its session closes: the
name may never come back. If we end without a word it expires; while the stream goes on it is said
again. Of the configuration's own streams, and of those in ``keep``, it stays.

Events and states carry the user properties ``session_id``, ``seq`` and ``type``. ``offline`` is
also the last will. A stream's name is percent-encoded where MQTT would take a character of it for
structure. The driver, aiomqtt, is imported when a sink is opened.
"""

import asyncio
import hashlib
import json
import os
import re
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Final, Literal, Self
from urllib.parse import quote

import structlog
from pydantic import AwareDatetime, Field, SecretStr, field_validator, model_validator

from sinks.events import (
    Event,
    Model,
    SessionClosed,
    Speaker,
    SpeakerIdentified,
    TurnEnded,
    TurnStarted,
    TurnUpdated,
    dump,
)
from sinks.sink import Rejected, SinkError, SinkSettings
from sinks.tls import TlsSettings

if TYPE_CHECKING:
    from sinks.mqtt_connection import Connection

ONLINE: Final = b"online"
OFFLINE: Final = b"offline"
PORT: Final = 1883
TLS_PORT: Final = 8883

EXPIRES_S: Final = 600
"""How long a broker keeps what is retained of a caller's stream that is heard of no more."""

_WHO: Final = (
    "{% set who = namespace(names=[]) %}{% for s in value_json.speaking %}"
    "{% set who.names = who.names + [s.identity or s.label] %}{% endfor %}"
    "{{ who.names | join(', ') or 'nobody' }}"
)
"""Home Assistant's template (Jinja): names of those who speak."""

log = structlog.get_logger(__name__)


class StreamState(Model, frozen=True):
    """What a subscriber who comes late needs to know of a stream; retained."""

    v: Literal[1] = 1
    stream_id: str
    session_id: str
    seq: int = Field(ge=0, description="The event that brought this state about.")
    open: bool = Field(description="Whether the session goes on.")
    speaking: list[Speaker] = Field(description="Who speaks now, the earliest first.")
    time: float = Field(ge=0, description="Seconds since the session opened.")
    wall_time: AwareDatetime = Field(description="When that event was emitted (RFC 3339).")


class MqttSettings(SinkSettings, frozen=True):
    """A broker, and the place of our topics on it."""

    kind: Literal["mqtt"] = "mqtt"
    host: str = Field(default="localhost", min_length=1)
    port: int | None = Field(
        default=None, ge=1, le=65535, description="1883 when absent, with TLS 8883."
    )
    root: str = Field(default="livesat", min_length=1, description="First level of every topic.")
    node: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        description="This machine's level of every topic; its host name when absent.",
    )
    client_id: str | None = Field(
        default=None, description="Made from the other settings when absent."
    )
    username: str | None = None
    password: SecretStr | None = None
    password_env: str | None = Field(
        default=None, description="Name of the environment variable that holds the password."
    )
    tls: TlsSettings | None = Field(default=None, description="{} trusts the system's CAs.")
    keepalive_s: int = Field(
        default=15, ge=1, le=65535, description="1.5 times this silence, and we count as dead."
    )
    timeout_s: float = Field(default=5.0, gt=0, description="How long the broker may take.")
    home_assistant: bool = Field(
        default=False, description="Announce a sensor of every stream by its MQTT discovery."
    )
    discovery: str = Field(
        default="homeassistant", min_length=1, description="Home Assistant's discovery prefix."
    )
    keep: tuple[str, ...] = Field(
        default=(),
        description="Streams, besides the configuration's own, whose state and sensor stay when "
        "their session has closed: callers that come back under the same name.",
    )

    @field_validator("root", "node")
    @classmethod
    def _plain(cls, value: str) -> str:
        if set(value) & set("+#\0") or value.startswith(("$", "/")) or value.endswith("/"):
            raise ValueError(
                f"expected topic levels without +, # and a / at either end, got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        if self.password is not None and self.password_env is not None:
            raise ValueError("expected password or password_env, got both")
        if self.username is None and (self.password is not None or self.password_env is not None):
            raise ValueError("expected a username with the password, got none")
        return self

    @property
    def base(self) -> str:
        """What our topics begin with."""
        return f"{self.root}/v1/{self.node}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.host, self.port or (TLS_PORT if self.tls else PORT)

    def identifier(self) -> str:
        """The client id: the same at every connection, another for other settings.

        The same, so that the broker drops a connection of ours that it believes alive, and
        publishes its will before and not after our new ``online``. 23 letters and digits are what
        every broker has to accept.
        """
        if self.client_id is not None:
            return self.client_id
        told = self.model_dump_json(exclude={"password", "keep"}).encode()
        return f"livesat{hashlib.sha256(told).hexdigest()[:16]}"

    def secret(self) -> str | None:
        """The password.

        Raises:
            SinkError: the environment variable is not set.
        """
        if self.password is not None:
            return self.password.get_secret_value()
        if self.password_env is None:
            return None
        value = os.environ.get(self.password_env)
        if value is None:
            raise SinkError(
                f"expected the MQTT password in the environment variable {self.password_env}, "
                "which is not set"
            )
        return value

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["MqttSink"]:
        """Connect, say ``online``; at the end say ``offline`` and disconnect.

        Raises:
            SinkError: the driver is not installed, or the broker is not there, refuses us, or
                does not answer in time.
        """
        try:
            from sinks.mqtt_connection import FAREWELL_S, Connection
        except ModuleNotFoundError as error:
            raise SinkError(
                f"the mqtt sink needs {error.name}: pip install 'livesat[mqtt]'"
            ) from None
        host, port = self.address
        connection = Connection(
            host,
            port,
            will=(f"{self.base}/status", OFFLINE),
            client_id=self.identifier(),
            username=self.username,
            password=self.secret(),
            tls=None if self.tls is None else await asyncio.to_thread(self.tls.context),
            keepalive_s=self.keepalive_s,
            timeout_s=self.timeout_s,
        )
        async with connection:
            prefix = self.discovery if self.home_assistant else None
            sink = MqttSink(self.base, connection, prefix, frozenset(self.keep))
            await sink.say(ONLINE)
            try:
                yield sink
            finally:
                with suppress(SinkError, TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await sink.say(OFFLINE)


def level(name: str) -> str:
    """A name → one topic level: what MQTT would take for structure is percent-encoded."""
    return re.sub(r"[%/+#\x00-\x1f\x7f]", lambda found: quote(found[0], safe=""), name) or "%00"


def _id(topic: str) -> str:
    """A topic → an id of Home Assistant, which knows few characters: two topics have two ids."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", topic)
    if plain == topic.replace("/", "_"):
        return plain
    return f"{plain}_{hashlib.sha256(topic.encode()).hexdigest()[:8]}"


@dataclass(slots=True)
class _Stream:
    """What the state of a stream is made of."""

    session_id: str
    speaking: dict[str, Speaker] = field(default_factory=dict[str, Speaker])
    """turn_id → who speaks."""
    told: tuple[tuple[str, str | None], ...] | None = None
    """Label and identity of those the retained state names; None before the first."""

    def update(self, event: Event) -> None:
        """Take in one event; the same one twice changes nothing more."""
        match event:
            case TurnStarted() | TurnUpdated():
                self.speaking[event.turn_id] = event.speaker
            case TurnEnded():
                self.speaking.pop(event.turn_id, None)
            case SpeakerIdentified():
                known = {"identity": event.identity, "score": event.score, "margin": event.margin}
                for turn_id, speaker in self.speaking.items():
                    if speaker.label == event.speaker:
                        self.speaking[turn_id] = speaker.model_copy(update=known)
            case SessionClosed():
                self.speaking.clear()
            case _:
                pass

    def names(self) -> tuple[tuple[str, str | None], ...]:
        """Label and identity of those who speak."""
        return tuple((speaker.label, speaker.identity) for speaker in self.speaking.values())


class MqttSink:
    """An open connection: publishes one event at a time."""

    def __init__(
        self,
        base: str,
        connection: "Connection",
        discovery: str | None = None,
        keep: frozenset[str] = frozenset(),
    ) -> None:
        self._base = base
        self._connection = connection
        self._discovery = discovery
        self._keep = keep
        # Bound: streams with an open session, and those that are kept.
        self._announced: set[str] = set()
        self._streams: dict[str, _Stream] = {}
        self._repeat: dict[str, float] = {}  # a caller's stream → when, in monotonic seconds
        self._denied: set[str] = set()

    async def send(self, event: Event) -> None:
        """Publish the event, and before it the stream's state if that is another now.

        Before, because a repeated state does no harm, while an event that failed after its state
        is published once.

        Raises:
            Disconnected: the connection is gone, or the broker did not answer in time.
            Rejected: the broker refused the event.
        """
        stream = f"{self._base}/{level(event.stream_id)}"
        caller = self._calls(event)
        if isinstance(event, SessionClosed) and caller:
            await self._clear(stream, event)
        else:
            if caller and monotonic() >= self._repeat.get(event.stream_id, 0.0):
                self._repeat[event.stream_id] = monotonic() + EXPIRES_S / 2
                self._announced.discard(event.stream_id)
                if event.stream_id in self._streams:
                    self._streams[event.stream_id].told = None
            if self._discovery is not None and event.stream_id not in self._announced:
                await self._announce(self._discovery, stream, event)
            await self._tell_state(f"{stream}/state", event)
        kind, qos = ("event", 1) if event.is_final else ("partial", 0)
        await self._publish(f"{stream}/{kind}/{event.type}", dump(event), event, qos=qos)

    async def say(self, status: bytes) -> None:
        """Publish whether we are there.

        Raises:
            Disconnected: the connection is gone, or the broker did not answer in time.
            Rejected: the broker refused it.
        """
        await self._connection.deliver(
            f"{self._base}/status", status, qos=1, retain=True, content_type="text/plain", user=[]
        )

    async def lost(self) -> None:
        """Return once the connection is lost."""
        await self._connection.gone()

    def _calls(self, event: Event) -> bool:
        """Whether it is of a stream whose name may never come back."""
        return event.stream_id not in self._keep

    async def _announce(self, prefix: str, stream: str, event: Event) -> None:
        """A sensor for Home Assistant. Source: its MQTT discovery, component sensor."""
        node, unique = self._sensor(stream)
        sensor = {
            "name": f"{event.stream_id} speaking",
            "unique_id": f"{node}{unique}",
            "state_topic": f"{stream}/state",
            "value_template": _WHO,
            "json_attributes_topic": f"{stream}/state",
            "availability_topic": f"{self._base}/status",
            "payload_available": ONLINE.decode(),
            "payload_not_available": OFFLINE.decode(),
            "icon": "mdi:account-voice",
            "device": {
                "identifiers": [node],
                "name": self._base.rpartition("/")[2],
                "manufacturer": "livesat",
            },
        }
        topic = f"{prefix}/sensor/{node}/{unique}/config"
        await self._retain(topic, json.dumps(sensor).encode(), event)
        self._announced.add(event.stream_id)

    def _sensor(self, stream: str) -> tuple[str, str]:
        """What Home Assistant calls us, and a stream of ours."""
        return _id(self._base), _id(f"livesat_{stream.removeprefix(self._base)}")

    async def _clear(self, stream: str, event: Event) -> None:
        """Take back what is retained of a stream. Source: MQTT 5.0, 3.3.1.3."""
        topics = [f"{stream}/state"]
        if self._discovery is not None:  # first: a sensor makes nothing of an empty state
            node, unique = self._sensor(stream)
            topics.insert(0, f"{self._discovery}/sensor/{node}/{unique}/config")
        for topic in topics:
            await self._retain(topic, b"", event)
        self._announced.discard(event.stream_id)
        self._streams.pop(event.stream_id, None)
        self._repeat.pop(event.stream_id, None)
        self._denied.difference_update(topics)

    async def _tell_state(self, topic: str, event: Event) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None or stream.session_id != event.session_id:
            stream = self._streams[event.stream_id] = _Stream(event.session_id)
        stream.update(event)
        closed = isinstance(event, SessionClosed)
        names = stream.names()
        if names != stream.told or closed:
            state = StreamState(
                stream_id=event.stream_id,
                session_id=event.session_id,
                seq=event.seq,
                open=not closed,
                speaking=list(stream.speaking.values()),
                time=event.end,
                wall_time=event.wall_time,
            )
            await self._retain(topic, state.model_dump_json().encode(), event)
            stream.told = names
        if closed:
            del self._streams[event.stream_id]

    async def _retain(self, topic: str, payload: bytes, event: Event) -> None:
        try:
            await self._publish(topic, payload, event, qos=1, retain=True)
        except Rejected as error:
            # The event itself may be welcome; say it once, not with every event.
            if topic not in self._denied:
                self._denied.add(topic)
                log.error("state refused", error=str(error))  # noqa: TRY400 - no traceback

    async def _publish(
        self, topic: str, payload: bytes, event: Event, *, qos: int, retain: bool = False
    ) -> None:
        user = [
            ("session_id", event.session_id),
            ("seq", str(event.seq)),
            ("type", event.type),
        ]
        passing = retain and self._calls(event)
        await self._connection.deliver(
            topic,
            payload,
            qos=qos,
            retain=retain,
            content_type="application/json",
            user=user,
            expires_s=EXPIRES_S if passing else None,
        )
