"""``/v1/audio``: a WebSocket that takes audio and gives its session's events.

Query: ``encoding`` (s16le, f32le, mulaw; opus for Ogg or WebM), ``rate``, ``channels``,
``channel``, ``name``, ``partials``. The first message from here is::

    {"type": "ready", "session_id": …, "resume_token": …, "received": 0, "complete": true}

Then events come, as everywhere. Binary messages are audio; ``{"type": "close"}`` ends it: what is
left is computed, and the connection closes after ``session.closed``.

A client that lost its connection comes back with ``resume`` (the token), ``after`` (the last
``seq`` it has) and ``have`` (the first of its own sample frames that it can still send); the form
of the audio is what it was, and need not be stated again. It goes on
from the sample frame ``received`` of the new ready message: nothing is heard twice. ``complete``
is false if events after ``after`` are no longer kept. ``resume_token`` is null where nobody can
come back: in a container there is no position to go on from, and ``session.resume_s`` may be 0.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from starlette.websockets import WebSocket, WebSocketDisconnect

from stream.calls import LONGEST_GAP_S, Call, Calls
from stream.engine import EngineFull
from stream.feed import Subscription, Wanted
from stream.server import Desk, ServerSettings
from stream.sources.pcm import BYTES, Form
from stream.sources.source import SourceError
from stream.web.containers import Container, ContainerError
from stream.web.gate import LATER, POLICY
from stream.web.wire import AWAY, INVALID, NORMAL, RESTART, UNSUPPORTED, Hangup, Wire, command

_CONTAINED: Final = frozenset({"opus", "ogg", "webm"})

_FORM: Final = ("encoding", "rate", "channels", "channel")

_NAME: Final = re.compile(r"[^\x00-\x1f/]{1,128}")


class Audio:
    """The endpoint."""

    def __init__(self, settings: ServerSettings, desk: Desk, calls: Calls) -> None:
        self._settings, self._desk, self._calls = settings, desk, calls

    async def websocket(self, socket: WebSocket) -> None:
        """One connection."""
        wire = Wire(socket, self._settings)
        await wire.open()
        query = socket.query_params
        try:
            token = query.get("resume")
            call = await (self._again(token, query) if token else self._begin(query, socket))
            connection = call.take()
        except Hangup as hangup:
            await wire.close(hangup.code, str(hangup))
            return
        except ValueError as error:
            await wire.close(UNSUPPORTED, str(error))
            return
        except (EngineFull, SourceError) as error:
            await wire.close(LATER, str(error))
            return
        await self._carry(wire, call, connection, query)

    async def _begin(self, query: Mapping[str, str], socket: WebSocket) -> Call:
        name = query.get("name", "caller")
        if not _NAME.fullmatch(name):
            raise ValueError("name: expected 1 to 128 characters without '/' and controls")
        host = socket.client.host if socket.client else "?"
        if query.get("encoding") in _CONTAINED:
            return await self._calls.open(name, f"websocket:{host}", resumable=False)
        return await self._calls.open(name, f"websocket:{host}", form(query))

    async def _again(self, token: str, query: Mapping[str, str]) -> Call:
        """The call of a resume token, of this process or of one before it."""
        if query.get("encoding") in _CONTAINED:
            raise ValueError("resume: expected raw PCM, as audio in a container begins anew")
        call = self._calls.find(token)
        if call is not None:
            await call.opened()
            if call.ear is not None:
                shape = _as_before(query, call.ear.form.stated)
                call.go_on(_offset(query, call.ear.taken, shape))
            return call
        survivor = self._desk.claim(token)
        if survivor is None:
            known = "has ended" if self._calls.ended(token) else "is not known"
            raise Hangup(POLICY, f"the session of this resume token {known}")
        try:
            shape = _as_before(query, survivor.form)
            offset = _offset(query, survivor.taken, shape)
            call = await self._calls.open(
                survivor.stream, survivor.source, shape, resume=survivor.resumed()
            )
        except (EngineFull, ValueError):
            self._desk.give_back(survivor)
            raise
        call.go_on(offset)
        return call

    async def _carry(
        self, wire: Wire, call: Call, connection: int, query: Mapping[str, str]
    ) -> None:
        """Audio in and events out, until one of them ends."""
        after = query.get("after", "-1")
        wanted = Wanted(session=call.session_id, partials=query.get("partials") != "false")
        code, reason = NORMAL, ""
        again = "; resume" if call.resume_token is not None else ""
        try:
            reader = self._desk.feed.subscribe(
                wanted, after=-1 if after == "-1" else _count("after", after)
            )
        except ValueError as error:
            call.drop(connection)
            await wire.close(UNSUPPORTED, str(error))
            return
        talking = asyncio.create_task(self._hear(wire, call, connection), name="audio:hear")
        ending = asyncio.create_task(self._end(call, reader), name="audio:end")
        try:
            await wire.send_json(
                {
                    "type": "ready",
                    "session_id": call.session_id,
                    "resume_token": call.resume_token,
                    "received": call.ear.taken if call.ear is not None else 0,
                    "complete": reader.complete,
                }
            )
            telling = asyncio.create_task(_tell(wire, reader), name="audio:tell")
            try:
                await asyncio.wait({talking, telling}, return_when=asyncio.FIRST_COMPLETED)
                if talking.done():
                    code, reason = talking.result()
                if talking.done() and code == NORMAL and not call.carries(connection):
                    code, reason = POLICY, "another connection carries this session now"
                elif code == NORMAL and not await telling:  # the session computes the rest
                    if reader.evicted:
                        code, reason = LATER, f"reads too slowly{again}"
                    elif self._desk.stop.is_set():
                        code, reason = RESTART, f"the daemon is stopping{again}"
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
        except Hangup as hangup:
            code, reason = hangup.code, str(hangup)
        except WebSocketDisconnect:
            pass
        finally:
            talking.cancel()
            ending.cancel()
            await asyncio.gather(talking, ending, return_exceptions=True)
            self._desk.feed.leave(reader)
            call.drop(connection)
        await wire.close(code, reason)

    async def _end(self, call: Call, reader: Subscription) -> None:
        """Once the session is over, what waits is told, and no more comes."""
        await call.over()
        self._desk.feed.leave(reader)

    async def _hear(self, wire: Wire, call: Call, connection: int) -> tuple[int, str]:
        """Audio until the client closes → close code and reason; the call is finished, or waits."""
        container = None
        try:
            if call.ear is None:
                container = await Container.open(call.line)
            while True:
                message = await wire.receive()
                if message is None:
                    return AWAY, ""
                if not call.carries(connection):
                    return NORMAL, ""
                if isinstance(message, bytes):
                    if container is not None:
                        await container.feed(message)
                    else:
                        await call.hear(message)
                    continue
                kind = command(message).get("type")
                if kind == "close":
                    if container is not None:
                        await container.end()
                    call.finish()
                    return NORMAL, ""
                if kind != "keepalive":
                    return INVALID, f"type: expected close or keepalive, got {str(kind)[:40]!r}"
        except Hangup as hangup:
            if container is not None:
                call.finish()
            return hangup.code, str(hangup)
        except (ValueError, ContainerError) as error:
            call.line.fail(str(error))
            return INVALID, str(error)
        finally:
            if container is not None:
                await container.close()
                call.finish()


async def _tell(wire: Wire, reader: Subscription) -> bool:
    """The session's events → whether its last was among them."""
    async for line in reader:
        await wire.send(line.data.decode())
        if line.type == "session.closed":
            return True
    return False


def form(query: Mapping[str, str]) -> Form:
    """What the query says of the audio.

    Raises:
        ValueError: it makes no sense; names the key.
    """
    encoding = query.get("encoding", "s16le")
    if encoding not in BYTES:
        raise ValueError(f"encoding: expected {', '.join(BYTES)} or opus, got {encoding[:20]!r}")
    rate = _count("rate", query.get("rate", "16000"))
    if not 1000 <= rate <= 768_000:
        raise ValueError(f"rate: expected 1000 to 768000 samples a second, got {rate}")
    channels = _count("channels", query.get("channels", "1"))
    if not 1 <= channels <= 64:
        raise ValueError(f"channels: expected 1 to 64, got {channels}")
    channel = query.get("channel")
    which = None if channel is None else _count("channel", channel)
    if which is not None and which >= channels:
        raise ValueError(f"channel: expected 0 to {channels - 1}, got {which}")
    return Form(encoding, rate, channels, which)


def _as_before(query: Mapping[str, str], stated: str) -> Form:
    """The form of a session that goes on: what its first connection stated, again or not.

    Raises:
        ValueError: the query states another one.
    """
    known = dict(parse_qsl(stated))
    found = form({**known, **{key: query[key] for key in _FORM if key in query}})
    if known and found != form(known):
        raise ValueError(f"resume: expected the audio's form as it was: {stated}")
    return found


def _offset(query: Mapping[str, str], taken: int, shape: Form) -> int:
    """The caller's sample frame that it goes on from: one it has, and none that was heard.

    Raises:
        ValueError: it is nowhere near.
    """
    have = _count("have", query.get("have", "0"))
    if have - taken > LONGEST_GAP_S * shape.rate:
        raise ValueError(f"have: expected at most a day after {taken}, which were received")
    return max(have, taken)


def _count(key: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text):
        raise ValueError(f"{key}: expected a whole number, got {text[:20]!r}")
    return int(text)
