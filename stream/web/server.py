"""The application and the server that runs it, for as long as the daemon runs."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator
from typing import Any, Final, cast

import h11
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Route, WebSocketRoute
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from stream.calls import Calls
from stream.server import Desk, ServerSettings
from stream.web.audio import Audio
from stream.web.body import REQUEST_S
from stream.web.deepgram import Listen
from stream.web.feed import Events
from stream.web.gate import Gate, Guard
from stream.web.health import Probes
from stream.web.pages import Pages, SecurityHeaders, files
from stream.web.people import People
from stream.web.twilio import Twilio

log = structlog.get_logger(__name__)

GRACE_S: Final = 3
"""How long connections may take to end when the daemon does."""

PING_S: Final = 20.0
"""How often a WebSocket's client is asked whether it is there, and how long it may take to say."""

UNREAD: Final = 1 << 20
"""Bytes that may wait for a WebSocket's client: more than its largest message and what is on the
way. Endpoints wait while it does not read; only the answers to its pings go on growing."""

PROBES: Final = frozenset({"/livez", "/readyz"})

OPEN_PATHS: Final = PROBES | {"/", "/v1/login", "/v1/twilio"}
"""Served without a token: the page that asks for it, what a supervisor asks, and what asks for
its token later."""


def application(settings: ServerSettings, desk: Desk, calls: Calls) -> Starlette:
    """Everything that is served, behind the gate."""
    gate = Gate(settings)
    audio = Audio(settings, desk, calls)
    events = Events(settings, desk)
    listen = Listen(settings, desk, calls)
    pages = Pages(settings, gate, desk)
    people = People(desk)
    probes = Probes(desk, calls)
    twilio = Twilio(settings, gate, calls, desk.stop)
    routes = [
        Route("/", pages.dashboard),
        Mount("/static", files()),
        Route("/livez", probes.live),
        Route("/readyz", probes.ready),
        Route("/metrics", probes.metrics),
        Route("/v1/login", pages.login, methods=["POST"]),
        Route("/v1/logout", pages.logout, methods=["POST"]),
        Route("/v1/status", pages.status),
        Route("/v1/sessions", pages.sessions),
        Route("/v1/sessions/{session}/export.{form}", pages.export),
        Route("/v1/sessions/{session}/speakers/{label}", people.name, methods=["PUT"]),
        Route("/v1/voices", people.voices),
        Route("/v1/events", events.sse),
        WebSocketRoute("/v1/events", events.websocket),
        WebSocketRoute("/v1/audio", audio.websocket),
        WebSocketRoute("/v1/listen", listen.websocket),
        WebSocketRoute("/v1/twilio", twilio.websocket),
    ]
    guard = Middleware(
        Guard, gate=gate, open_paths=OPEN_PATHS, plain_paths={"/v1/listen"}, probe_paths=PROBES
    )
    return Starlette(routes=routes, middleware=[Middleware(SecurityHeaders), guard])


async def serve(
    settings: ServerSettings,
    desk: Desk,
    listening: socket.socket,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the daemon stops; the streams of its callers run inside.

    Args:
        settings: How.
        desk: The house.
        listening: Where.
        started: Called once requests are answered.
    """
    await asyncio.to_thread(settings.ssl_context)  # what is wrong with it is said by us
    async with asyncio.TaskGroup() as group:
        calls = Calls(
            group,
            desk,
            limit=settings.max_streams,
            limit_each=settings.max_streams_per_ip,
            resume_s=lambda: desk.resume_s,
            buffer_ms=settings.buffer_ms,
            names=lambda: desk.names,
        )
        config = uvicorn.Config(
            await asyncio.to_thread(application, settings, desk, calls),
            http=Prompt,
            ws=Patient,
            ws_max_size=settings.max_message_bytes,
            # Compression would let a small message become a large one, for audio that gains little.
            ws_per_message_deflate=False,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            # Its own count, of connections that ask for nothing too, holds the one that asks; a
            # few more, for the probes.
            limit_concurrency=settings.max_connections + 8,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=16_384,
            proxy_headers=bool(settings.proxies),
            forwarded_allow_ips=list(settings.proxies),
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="error",
            lifespan="off",
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        await asyncio.to_thread(config.load)
        server = Server(config, started)
        serving = group.create_task(server.serve([listening]), name="server")
        await desk.stop.wait()
        await calls.over()  # their sessions end by themselves, and tell their clients
        await desk.drained()  # subscribers read the last event of the others too
        desk.feed.close()  # so that its readers end, and uvicorn has not to cancel them
        server.should_exit = True
        await serving


class Server(uvicorn.Server):
    """uvicorn's, which leaves the signals to the daemon, and says when it has started."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does, and then."""
        await super().startup(sockets)
        self._tell_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """None are captured."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; who has not gone by then is cut off: to be cancelled is logged as an error."""
        cut = asyncio.get_running_loop().call_later(GRACE_S - 1, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            cast("Any", connection).transport.abort()


class Prompt(H11Protocol):
    """uvicorn's HTTP/1.1, for clients that say what they want within `REQUEST_S`.

    While no request is under way, either this clock runs or, on an idle connection, uvicorn's for
    keep-alive, which the first byte that comes stops. ``abort`` in the state of a request cuts the
    connection off, whatever still waits to be sent.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._upgraded = False
        self._late: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop it when the head of a request is complete; start it at the first byte of another."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self._upgraded or self._under_way:
            self._stop()
        elif self._late is None and self.timeout_keep_alive_task is None:
            self._late = self.loop.call_later(REQUEST_S, self._give_up)

    @property
    def _under_way(self) -> bool:
        cycle = cast("Any", self).cycle
        return cycle is not None and not cycle.response_complete

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if not self._under_way and not self.transport.is_closing():
            self.transport.abort()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """It has said: a WebSocket."""
        self._upgraded = True
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        self._stop()
        super().connection_lost(exc)


class Patient(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, for clients that send faster than they are heard.

    Their answer to a ping comes behind their audio: while audio comes, they are there. When the
    server goes, their endpoint tells them the rest and hangs up; uvicorn would do so before it has.
    Who asks and never reads the answers is cut off, and so is who does not read the last of them.
    Text that is not UTF-8 ends a connection, and is no exception of ours to log.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing has come yet."""
        super().connection_made(transport)
        self._came = 0.0
        self._cut: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Note when."""
        self._came = self.loop.time()
        super().data_received(data)
        if self.transport.get_write_buffer_size() > UNREAD:
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        """Hand a message on, if it is what it says it is."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.conn.send_close(1007, "expected UTF-8 in a text message")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """The endpoint is done: what it has written must go within `close_timeout`."""
        super().on_task_complete(task)
        if not self.disconnected:
            self._cut = self.loop.call_later(self.close_timeout, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        if self._cut is not None:
            self._cut.cancel()
        super().connection_lost(exc)

    def keepalive_timeout(self) -> None:
        """Cut off who is silent, and wait for who is not."""
        patience = self.ping_timeout or 0.0
        if self.read_paused or self._came > self.loop.time() - patience:
            self.pong_timer = self.loop.call_later(patience, self.keepalive_timeout)
        else:
            super().keepalive_timeout()

    def shutdown(self) -> None:
        """Leave an open one to its endpoint; the server cuts it off if that takes too long."""
        if self.close_sent or not self.handshake_complete:
            super().shutdown()
