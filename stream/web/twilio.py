"""``/v1/twilio``: Twilio Media Streams, JSON over a WebSocket, 8 kHz μ-law in base64.

Twilio sends no header of ours and takes no query in the URL: the token comes as a custom parameter
of the stream (``<Parameter name="token" value="…"/>``), so a connection is let in without and must
show it in its start message. A track (inbound, outbound) is a session; ``timestamp`` tells what was
lost on the way. Source: Twilio's "Media Streams – WebSocket Messages".
"""

import asyncio
import base64
import binascii
import re
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from stream.calls import Call, Calls, Form
from stream.clock import SAMPLE_RATE
from stream.engine import EngineFull
from stream.server import ServerSettings
from stream.sources.source import SourceError
from stream.web.gate import LATER, POLICY, Gate
from stream.web.wire import AWAY, INVALID, NORMAL, Hangup, Wire, command

RATE: Final = 8000

START_S: Final = 10.0
"""How long the start message may take."""

SLACK_MS: Final = 100
"""A timestamp this much ahead of the audio is jitter; beyond it, a loss."""

LONGEST_MS: Final = 86_400_000
"""A timestamp this much ahead is no loss but nonsense."""

_TIMESTAMP: Final = re.compile(r"-1|[0-9]{1,12}")


class Twilio:
    """The endpoint."""

    def __init__(
        self, settings: ServerSettings, gate: Gate, calls: Calls, stop: asyncio.Event
    ) -> None:
        self._settings, self._gate, self._calls, self._stop = settings, gate, calls, stop

    async def websocket(self, socket: WebSocket) -> None:
        """One call's stream."""
        wire = Wire(socket, self._settings)
        await wire.open()
        tracks: dict[str, _Track] = {}
        hearing = asyncio.create_task(self._hear(wire, tracks), name="twilio:hear")
        stopping = asyncio.create_task(self._stop.wait(), name="twilio:stop")
        code, reason = AWAY, "the daemon is stopping"
        try:
            await asyncio.wait({hearing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                hearing.result()
                code, reason = NORMAL, ""
            for track in tracks.values():
                track.call.finish()
                await track.call.over()
        except Hangup as hangup:
            code, reason = hangup.code, str(hangup)
        except (EngineFull, SourceError) as error:
            code, reason = LATER, str(error)
        except WebSocketDisconnect:
            pass
        finally:
            for task in (hearing, stopping):
                task.cancel()
            await asyncio.gather(hearing, stopping, return_exceptions=True)
            for track in tracks.values():
                track.call.finish()
        await wire.close(code, reason)

    async def _hear(self, wire: Wire, tracks: "dict[str, _Track]") -> None:
        """The stream from its start message to its end; its calls are put in ``tracks``."""
        start = await self._start(wire)
        sid = str(start.get("callSid") or start.get("streamSid") or "call")[:64]
        for name in _tracks(start):
            call = await self._calls.open(
                f"{sid}-{name}".replace("/", "_"),
                f"twilio:{sid}",
                Form("mulaw", RATE),
                resumable=False,
            )
            tracks[name] = _Track(call)
        while await _heard(wire, tracks):
            pass

    async def _start(self, wire: Wire) -> dict[str, Any]:
        while True:
            message = await wire.receive(START_S)
            if message is None:
                raise WebSocketDisconnect
            if isinstance(message, bytes):
                raise Hangup(INVALID, "expected JSON messages, got a binary one")
            said = command(message)
            if said.get("event") == "connected":
                continue
            start = said.get("start")
            if said.get("event") != "start" or not isinstance(start, dict):
                raise Hangup(INVALID, f"event: expected start, got {str(said.get('event'))[:20]!r}")
            custom = start.get("customParameters")
            token = custom.get("token") if isinstance(custom, dict) else None
            if self._gate.guarded and not self._gate.knows(str(token or "")):
                raise Hangup(POLICY, "expected the custom parameter token")
            form = start.get("mediaFormat", {})
            known = {"encoding": "audio/x-mulaw", "sampleRate": RATE, "channels": 1}
            if isinstance(form, dict) and any(form.get(k, v) != v for k, v in known.items()):
                raise Hangup(INVALID, f"mediaFormat: expected {known}")
            return start


async def _heard(wire: Wire, tracks: "dict[str, _Track]") -> bool:
    """One message; whether more come."""
    message = await wire.receive()
    if message is None:
        return False
    if isinstance(message, bytes):
        raise Hangup(INVALID, "expected JSON messages, got a binary one")
    said = command(message)
    event = said.get("event")
    if event == "media":
        name, payload, timestamp = _media(said.get("media"))
        track = tracks.get(name)
        if track is None:
            raise Hangup(INVALID, f"media.track: {name[:20]!r} was not announced")
        await track.hear(payload, timestamp)
    return event != "stop"  # a mark, dtmf: nothing to hear


def _tracks(start: dict[str, Any]) -> list[str]:
    names = start.get("tracks", ["inbound"])
    if not isinstance(names, list) or not set(names) <= {"inbound", "outbound"}:
        raise Hangup(INVALID, f"start.tracks: got {str(names)[:40]}")
    return list(dict.fromkeys(names))


def _media(media: Any) -> tuple[str, bytes, int]:
    """A media message's part → track, audio, and its timestamp in ms or −1."""
    if not isinstance(media, dict):
        raise Hangup(INVALID, "media: expected an object")
    told = str(media.get("timestamp", -1))
    try:
        payload = base64.b64decode(str(media.get("payload", "")), validate=True)
    except (binascii.Error, ValueError):
        raise Hangup(INVALID, "media.payload: expected base64") from None
    if not _TIMESTAMP.fullmatch(told):
        raise Hangup(INVALID, f"media.timestamp: expected ms, got {told[:20]!r}")
    return str(media.get("track", "inbound")), payload, int(told)


class _Track:
    """One direction of a call, on the timeline its timestamps tell."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._first: int | None = None

    async def hear(self, payload: bytes, timestamp: int) -> None:
        """A packet; its timestamp in ms since the stream began, or −1 for none."""
        ear = self.call.ear
        assert ear is not None
        if timestamp >= 0:
            if self._first is None:
                self._first = timestamp
            ahead_ms = timestamp - self._first - ear.taken * 1000 // RATE
            if ahead_ms > LONGEST_MS:
                raise Hangup(INVALID, f"media.timestamp: {ahead_ms} ms ahead of the audio")
            if ahead_ms > SLACK_MS:
                self.call.line.lose(ahead_ms * SAMPLE_RATE // 1000, "network")
                ear.reconnect(ear.taken + ahead_ms * RATE // 1000)
        await self.call.line.put(ear.hear(payload), ear.position)
