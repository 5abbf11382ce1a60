"""``/v1/events``: everything the daemon emits, over WebSocket or as server-sent events.

Query: ``session``, ``stream``, ``types`` (comma-separated), ``partials=false``; to catch up
``after`` (the last ``seq`` of the ``session`` asked for) or ``cursor`` (from an earlier connection;
``0`` is everything that is still kept). Server-sent events carry the cursor as their id, so that a
browser resumes by itself; a WebSocket is told where it begins, ``{"type": "ready", "cursor": …}``,
and then with every event in ``cursor=true`` mode as ``{"cursor": …, "event": …}``.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from sinks.events import EventType
from stream.feed import Feed, Line, Subscription, Wanted
from stream.server import Desk, ServerSettings
from stream.web.gate import LATER
from stream.web.wire import AWAY, SEND_S, UNSUPPORTED, Hangup, Wire

KEEP_ALIVE_S: Final = 15.0
"""A comment as often keeps proxies from closing a silent stream."""

_TYPES: Final = frozenset(get_args(EventType))


class Events:
    """The endpoint, both ways."""

    def __init__(self, settings: ServerSettings, desk: Desk) -> None:
        self._settings, self._desk = settings, desk

    async def websocket(self, socket: WebSocket) -> None:
        """One subscriber."""
        wire = Wire(socket, self._settings)
        await wire.open()
        feed, query = self._desk.feed, socket.query_params
        try:
            reader = subscribe(feed, query)
        except ValueError as error:
            await wire.close(UNSUPPORTED, str(error))
            return
        code, reason = AWAY, "the daemon is stopping"
        listening = asyncio.create_task(_until_gone(wire), name="events:gone")
        try:
            await wire.send_json(
                {"type": "ready", "cursor": reader.begin, "complete": reader.complete}
            )
            telling = asyncio.create_task(
                _tell(wire, feed, reader, query.get("cursor") is not None), name="events:tell"
            )
            try:
                await asyncio.wait({listening, telling}, return_when=asyncio.FIRST_COMPLETED)
                if telling.done():
                    telling.result()
                    if reader.evicted:
                        code, reason = LATER, "reads too slowly; resume from your cursor"
                else:
                    listening.result()
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
        except Hangup as hangup:
            code, reason = hangup.code, str(hangup)
        except WebSocketDisconnect:
            pass
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            feed.leave(reader)
        await wire.close(code, reason)

    async def sse(self, request: Request) -> Response:
        """One subscriber over HTTP."""
        query = dict(request.query_params)
        resumed = request.headers.get("last-event-id")
        if resumed:
            query["cursor"] = resumed
        try:
            reader = subscribe(self._desk.feed, query)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        return _Stream(
            request.state.abort,
            _lines(self._desk.feed, reader),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


class _Stream(StreamingResponse):
    """A response whose client must take every part of it within `SEND_S`, or is cut off."""

    def __init__(self, abort: Callable[[], None], *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self._abort = abort

    async def stream_response(self, send: Send) -> None:
        """See `StreamingResponse`."""

        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                self._abort()  # closing it would wait for what is not taken
                await send(message)  # over, with all after it, when the connection is lost

        await super().stream_response(sent)


def subscribe(feed: Feed, query: Mapping[str, str]) -> Subscription:
    """What a query asks for.

    Raises:
        ValueError: it cannot be; names the key.
    """
    types = None
    if query.get("types"):
        types = frozenset(query["types"].split(","))
        if unknown := sorted(types - _TYPES):
            raise ValueError(f"types: {unknown[0][:40]!r} is not a type of event")
    wanted = Wanted(
        query.get("session"), query.get("stream"), types, query.get("partials") != "false"
    )
    after = query.get("after")
    if after is None:
        return feed.subscribe(wanted, cursor=query.get("cursor"))
    if wanted.session is None:
        raise ValueError("after: expected with session=…; use cursor for all of them")
    if not after.lstrip("-").isdigit() or len(after) > 15:
        raise ValueError(f"after: expected a whole number, got {after[:20]!r}")
    return feed.subscribe(wanted, after=int(after))


async def _tell(wire: Wire, feed: Feed, reader: Subscription, cursors: bool) -> None:
    async for line in reader:
        text = line.data.decode()
        if cursors:
            text = f'{{"cursor":"{feed.cursor(line)}","event":{text}}}'
        await wire.send(text)


async def _until_gone(wire: Wire) -> None:
    """A subscriber says nothing: pings tell whether it is there."""
    while await wire.receive(idle_s=86_400) is not None:
        pass


async def _lines(feed: Feed, reader: Subscription) -> AsyncGenerator[bytes]:
    coming: asyncio.Task[Line | None] | None = None
    try:
        yield (
            f"retry: 2000\nid: {reader.begin}\n\n".encode()
            if reader.complete
            else (b"event: incomplete\ndata: {}\n\n")
        )
        lines = aiter(reader)
        while True:
            coming = coming or asyncio.ensure_future(anext(lines, None))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_S)
            if not done:
                yield b": still here\n\n"
                continue
            line = coming.result()
            coming = None
            if line is None:
                return
            yield _sse(feed, line)
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError):
                await coming
        feed.leave(reader)


def _sse(feed: Feed, line: Line) -> bytes:
    head = f"id: {feed.cursor(line)}\nevent: {line.type}\ndata: "
    return head.encode() + line.data + b"\n\n"
