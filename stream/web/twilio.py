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

from stream.calls import Call, Calls
from stream.engine import EngineFull
from stream.server import ServerSettings
from stream.sources.pcm import Form
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

_TRACKS: Final = ("inbound", "outbound")

_SID: Final = re.compile(r"[^\x00-\x1f\x7f-\x9f/\ud800-\udfff]{1,64}")


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
        sid = _sid(start)
        for name in _tracks(start):
            call = await self._calls.open(
                f"{sid}-{name}",
                f"twilio:{sid}",
                Form("mulaw", RATE),
                resumable=False,
            )
            tracks[name] = _Track(call)
        while await _heard(wire, tracks):
            pass

    async def _start(self, wire: Wire) -> dict[str, Any]:
        """What the start message says, of a caller that may come in."""
        try:
            async with asyncio.timeout(START_S):
                said = await _message(wire)
                while said is not None and said.get("event") == "connected":
                    said = await _message(wire)
        except TimeoutError:
            raise Hangup(POLICY, f"no start message came within {START_S:g} s") from None
        if said is None:
            raise WebSocketDisconnect
        if said.get("event") != "start":
            raise Hangup(INVALID, f"event: expected start, got {_shown(said.get('event'))}")
        start = _object(said, "start")
        token = _object(start, "customParameters", {}).get("token")
        if self._gate.guarded and not (isinstance(token, str) and self._gate.knows(token)):
            raise Hangup(POLICY, "expected the custom parameter token")
        form = _object(start, "mediaFormat", {})
        known = {"encoding": "audio/x-mulaw", "sampleRate": RATE, "channels": 1}
        if any(form.get(k, v) != v for k, v in known.items()):
            raise Hangup(INVALID, f"mediaFormat: expected {known}")
        return start


async def _message(wire: Wire) -> dict[str, Any] | None:
    """The next message; None when the client has gone."""
    message = await wire.receive()
    if message is None:
        return None
    if isinstance(message, bytes):
        raise Hangup(INVALID, "expected JSON messages, got a binary one")
    return command(message)


async def _heard(wire: Wire, tracks: "dict[str, _Track]") -> bool:
    """One message; whether more come."""
    said = await _message(wire)
    if said is None:
        return False
    event = said.get("event")
    if event == "media":
        name, payload, timestamp = _media(_object(said, "media"))
        track = tracks.get(name)
        if track is None:
            raise Hangup(INVALID, f"media.track: {name[:20]!r} was not announced")
        await track.hear(payload, timestamp)
    return event != "stop"  # a mark, dtmf: nothing to hear


def _object(
    message: dict[str, Any], key: str, default: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An object within a message."""
    value = message.get(key)
    if value is None:
        value = default
    if not isinstance(value, dict):
        raise Hangup(INVALID, f"{key}: expected an object")
    return value


def _shown(value: Any) -> str:
    """A value of a message for a reason: of what nests deeply no text can be made."""
    return repr(value[:20]) if isinstance(value, str) else f"a {type(value).__name__}"


def _sid(start: dict[str, Any]) -> str:
    """The name of the call, fit for events and for files."""
    given = (start.get(key) for key in ("callSid", "streamSid"))
    sid = next((each for each in given if each not in (None, "")), "call")
    if not isinstance(sid, str) or not _SID.fullmatch(sid):
        what = "up to 64 characters without '/', controls and surrogates"
        raise Hangup(INVALID, f"start.callSid: expected {what}")
    return sid


def _tracks(start: dict[str, Any]) -> list[str]:
    names: Any = start.get("tracks", ["inbound"])
    if not isinstance(names, list) or any(name not in _TRACKS for name in names):
        raise Hangup(INVALID, f"start.tracks: expected of {', '.join(_TRACKS)}")
    return list(dict.fromkeys(names))


def _media(media: dict[str, Any]) -> tuple[str, bytes, int]:
    """A media message's part → track, audio, and its timestamp in ms or −1."""
    track, told = media.get("track", "inbound"), media.get("timestamp", -1)
    if not isinstance(track, str):
        raise Hangup(INVALID, f"media.track: expected a name, got {_shown(track)}")
    if not isinstance(told, str | int) or not _TIMESTAMP.fullmatch(str(told)):
        raise Hangup(INVALID, f"media.timestamp: expected ms, got {_shown(told)}")
    try:
        payload = base64.b64decode(media["payload"], validate=True)
    except (binascii.Error, ValueError, TypeError, KeyError):
        raise Hangup(INVALID, "media.payload: expected base64") from None
    return track, payload, int(told)


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
                self.call.go_on(ear.taken + ahead_ms * RATE // 1000)
        await self.call.hear(payload)
