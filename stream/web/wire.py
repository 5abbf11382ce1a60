"""What every WebSocket here has in common: reading with limits, writing with a limit of time."""

import asyncio
import json
from contextlib import suppress
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from stream.server import ServerSettings
from stream.web.gate import LATER, POLICY, Allowance, clipped, subprotocol

NORMAL: Final = 1000
AWAY: Final = 1001
UNSUPPORTED: Final = 1003
INVALID: Final = 1007
RESTART: Final = 1012
"""Close codes (RFC 6455, section 7.4.1, and IANA's registry)."""

SEND_S: Final = 5.0
"""How long a client may take to accept a message (reliability bar, row 9)."""

_MESSAGE_BYTES: Final = 640
"""Audio that pays for a message: 20 ms of 16-bit 16 kHz. Smaller ones use up the allowance."""


class Hangup(Exception):
    """The connection is to be closed, and why."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code


class Wire:
    """An accepted WebSocket.

    Args:
        socket: To be accepted by `open`.
        settings: Its limits.
    """

    def __init__(self, socket: WebSocket, settings: ServerSettings) -> None:
        self.socket = socket
        self._settings = settings
        rate = settings.messages_per_s
        self._allowance = Allowance(rate, 2 * rate)
        self._sending = asyncio.Lock()

    async def open(self) -> None:
        """Accept it."""
        await self.socket.accept(subprotocol=subprotocol(self.socket))

    async def receive(self, idle_s: float | None = None) -> bytes | str | None:
        """The next message; None when the client has gone.

        Raises:
            Hangup: it is silent for too long, or sends too many small messages.
        """
        limit = self._settings.idle_s if idle_s is None else idle_s
        try:
            async with asyncio.timeout(limit):
                message = await self.socket.receive()
        except TimeoutError:
            raise Hangup(POLICY, f"nothing came for {limit:g} s") from None
        if message["type"] == "websocket.disconnect":
            return None
        data: bytes | None = message.get("bytes")
        text: str | None = message.get("text")
        earned = len(data) / _MESSAGE_BYTES if data is not None else 0.0
        if not self._allowance.take(earned):
            raise Hangup(POLICY, "too many messages; send 20 ms of audio or more in each")
        return data if data is not None else text or ""

    async def send(self, text: str) -> None:
        """One text message.

        Raises:
            Hangup: the client does not take it in time.
            WebSocketDisconnect: it has gone.
        """
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_S):
                    await self.socket.send_text(text)
            except TimeoutError:
                raise Hangup(LATER, "reads too slowly") from None
            except (RuntimeError, OSError) as error:  # closed meanwhile
                raise WebSocketDisconnect(AWAY) from error

    async def send_json(self, value: dict[str, Any]) -> None:
        """One message as JSON."""
        await self.send(json.dumps(value, separators=(",", ":")))

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Close it, if it is still open; never raises."""
        if self.socket.application_state is not WebSocketState.CONNECTED:
            return
        with suppress(RuntimeError, OSError, TimeoutError, WebSocketDisconnect):
            async with asyncio.timeout(1.0):
                await self.socket.close(code, clipped(reason))


def command(text: str) -> dict[str, Any]:
    """A text message → its JSON object.

    Raises:
        Hangup: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Hangup(INVALID, f"expected a JSON object, got {text[:40]!r}") from None
    if not isinstance(value, dict):
        raise Hangup(INVALID, f"expected a JSON object, got {text[:40]!r}")
    return value
