"""One connection to an MQTT broker that tells the truth about a publish.

`aiomqtt` 2.5 takes any PUBACK for success, lets a publish wait out its timeout when the broker
dies, and keeps a failed publish queued for the next time the same client connects. Hence a client
that looks at the reason code, races every publish against the disconnect, and is used for one
connection only.
"""

import asyncio
import socket
import ssl
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

import aiomqtt
import paho.mqtt.client as paho
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from sinks.sink import Disconnected, Rejected, SinkError

FAREWELL_S: Final = 2.0
"""How long leaving may take: a broker that is gone cannot be said goodbye to."""

_HEADER: Final = 9
"""Bytes of a PUBLISH besides topic, properties and payload, at most. Source: MQTT 5.0, 3.3."""

QUOTA_EXCEEDED: Final = 0x97
"""A reason code that a later attempt may not meet. Source: MQTT 5.0, 3.4.2.1."""


class Connection(aiomqtt.Client):
    """A client for one connection; publish one message at a time.

    Args:
        host: name or address of the broker.
        port: its TCP port.
        will: what the broker publishes for us if we vanish.
        client_id: a broker closes an older connection of the same id.
        username: if the broker wants one.
        password: its password.
        tls: the context of an encrypted connection.
        keepalive_s: after 1.5 times this silence the broker publishes the will.
        timeout_s: how long the broker may take to answer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        will: tuple[str, bytes],
        client_id: str,
        username: str | None,
        password: str | None,
        tls: ssl.SSLContext | None,
        keepalive_s: int,
        timeout_s: float,
    ) -> None:
        super().__init__(
            host,
            port,
            protocol=aiomqtt.ProtocolVersion.V5,
            identifier=client_id,
            username=username,
            password=password,
            tls_context=tls,
            will=aiomqtt.Will(will[0], will[1], qos=1, retain=True),
            keepalive=keepalive_s,
            timeout=timeout_s,
            clean_start=True,
        )
        self._where = f"{host}:{port}"
        self._refusal: ReasonCode | None = None
        self._largest: int | None = None
        self._left = False
        self._wrapped: ssl.SSLSocket | None = None
        if tls is not None:
            self._remember(tls)
        self._client.connect_timeout = timeout_s

    async def __aenter__(self) -> "Connection":
        """Connect.

        Raises:
            SinkError: nobody there, refused, or no answer in time.
        """
        try:
            await super().__aenter__()
        except MqttConnectError as error:
            await self._abandon()
            raise SinkError(f"the MQTT broker at {self._where} refused us: {error}") from None
        except (aiomqtt.MqttError, OSError, ValueError) as error:
            await self._abandon()
            raise SinkError(
                f"expected an MQTT v5 broker at {self._where}, could not connect: {error}"
            ) from None
        except BaseException:
            await self._abandon()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Disconnect: without a word if the broker is gone already."""
        try:
            with suppress(aiomqtt.MqttError, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await super().__aexit__(exc_type, exc, tb)
        finally:
            await self._abandon()

    async def deliver(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int,
        retain: bool,
        content_type: str,
        user: list[tuple[str, str]],
        expires_s: int | None = None,
    ) -> None:
        """Publish, and with QoS 1 wait until the broker has acknowledged.

        Args:
            topic: where to.
            payload: UTF-8 text.
            qos: 0 or 1.
            retain: keep it for subscribers who come later.
            content_type: MIME type of the payload.
            user: user properties.
            expires_s: the broker keeps it no longer than this.

        Raises:
            Disconnected: the connection is gone, or the broker did not answer in time.
            SinkError: the broker says that it cannot now.
            Rejected: the broker refused this message.
        """
        if self._disconnected.done():
            raise Disconnected(self._why())
        self._refusal = None
        properties = _properties(content_type, user, expires_s)
        size = _HEADER + len(topic.encode()) + len(properties.pack()) + len(payload)
        if self._largest is not None and size > self._largest:
            # It would hang up, and again at every attempt.
            raise Rejected(
                f"the MQTT broker {self._where} takes packets of {self._largest} bytes at most, "
                f"{topic} has {size}"
            )
        publish = asyncio.ensure_future(self.publish(topic, payload, qos, retain, properties))
        try:
            await asyncio.wait((publish, self._disconnected), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not publish.done():
                publish.cancel()
        if not publish.done() or publish.cancelled():
            raise Disconnected(self._why())
        error = publish.exception()
        if error is not None:
            raise Disconnected(f"{self._where}: {error}") from error
        # One message at a time: the reason code is that of this one.
        if self._refusal is not None:
            said = f"the MQTT broker {self._where} refused {topic}: {self._refusal}"
            if self._refusal.value == QUOTA_EXCEEDED:
                raise SinkError(said)
            raise Rejected(said)

    async def gone(self) -> None:
        """Return once the connection is lost."""
        await asyncio.wait((self._disconnected,))

    def _why(self) -> str:
        error = self._disconnected.exception() if self._disconnected.done() else None
        return f"lost the MQTT broker {self._where}: {error or 'it closed the connection'}"

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self._largest = getattr(properties, "MaximumPacketSize", None)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self,
        client: paho.Client,
        userdata: Any,
        mid: int,
        reason_code: ReasonCode,
        properties: Properties,
    ) -> None:
        if reason_code.is_failure:
            self._refusal = reason_code
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _remember(self, tls: ssl.SSLContext) -> None:
        """Keep the socket of a handshake: paho leaves one open whose certificate is refused."""
        wrap = tls.wrap_socket

        def wrapped(*given: Any, **keys: Any) -> ssl.SSLSocket:
            self._wrapped = wrap(*given, **keys)
            return self._wrapped

        context: Any = tls
        context.wrap_socket = wrapped

    # paho connects in a thread that a cancelled coroutine leaves running: what that thread opens
    # after we have left is not to be watched by the event loop.

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if not self._left:
            super()._on_socket_open(client, userdata, sock)

    # aiomqtt looks for the number of the socket at once and watches it in a later turn of the event
    # loop: by then the socket may be closed, and its number another's.

    def _on_socket_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        def watch() -> None:
            if not self._left and sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), self._write)

        self._loop.call_soon_threadsafe(watch)

    def _write(self) -> None:
        try:
            self._client.loop_write()
        except Exception as error:  # noqa: BLE001 - whatever it is, the connection is broken
            if not self._disconnected.done():
                self._disconnected.set_exception(error)

    async def _abandon(self) -> None:
        """Give back what an unfinished connection would keep: socket, callbacks and a task."""
        self._left = True
        for future in (self._connected, self._disconnected):
            if future.done() and not future.cancelled():
                future.exception()  # retrieved, or asyncio complains about it
        left = self._client.socket()
        if isinstance(left, socket.socket) and left.fileno() >= 0:
            self._loop.remove_reader(left.fileno())
            self._loop.remove_writer(left.fileno())
            left.close()
        if self._wrapped is not None:
            self._wrapped.close()
        if self._misc_task is not None:
            self._misc_task.cancel()
            await asyncio.wait((self._misc_task,))


def _properties(
    content_type: str, user: list[tuple[str, str]], expires_s: int | None
) -> Properties:
    made: Any = Properties(PacketTypes.PUBLISH)
    made.PayloadFormatIndicator = 1  # UTF-8
    made.ContentType = content_type
    if user:
        made.UserProperty = user
    if expires_s is not None:
        made.MessageExpiryInterval = expires_s
    return made
