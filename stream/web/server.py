"""The application and the server that runs it, for as long as the daemon runs."""

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any, Final, cast

import h11
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Route, WebSocketRoute
from uvicorn.protocols.http.h11_impl import H11Protocol

from stream.calls import Calls
from stream.server import Desk, ServerSettings
from stream.web.audio import Audio
from stream.web.deepgram import Listen
from stream.web.feed import Events
from stream.web.gate import Gate, Guard
from stream.web.health import Probes
from stream.web.pages import Pages, SecurityHeaders, files
from stream.web.people import People
from stream.web.twilio import Twilio

log = structlog.get_logger(__name__)

REQUEST_S: Final = 10.0
"""How long a connection may take to say what it wants."""

GRACE_S: Final = 3
"""How long connections may take to end when the daemon does."""

OPEN_PATHS: Final = frozenset({"/", "/livez", "/readyz", "/v1/login", "/v1/twilio"})
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
    twilio = Twilio(settings, gate, calls)
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
    guard = Middleware(Guard, gate=gate, open_paths=OPEN_PATHS, plain_paths={"/v1/listen"})
    return Starlette(routes=routes, middleware=[Middleware(SecurityHeaders), guard])


async def serve(settings: ServerSettings, desk: Desk, listening: socket.socket) -> None:
    """Serve until the daemon stops; the streams of its callers run inside."""
    await asyncio.to_thread(settings.ssl_context)  # what is wrong with it is said by us
    async with asyncio.TaskGroup() as group:
        calls = Calls(
            group,
            desk,
            limit=settings.max_streams,
            limit_each=settings.max_streams_per_ip,
            resume_s=desk.resume_s,
            buffer_ms=settings.buffer_ms,
        )
        config = uvicorn.Config(
            await asyncio.to_thread(application, settings, desk, calls),
            http=Prompt,
            ws="websockets-sansio",
            ws_max_size=settings.max_message_bytes,
            # Compression would let a small message become a large one, for audio that gains little.
            ws_per_message_deflate=False,
            ws_ping_interval=20,
            ws_ping_timeout=20,
            # Its own count, of connections that ask for nothing too, holds the one that asks.
            limit_concurrency=settings.max_connections + 1,
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
        server = Server(config)
        serving = group.create_task(server.serve([listening]), name="server")
        await desk.stop.wait()
        await calls.over()  # their sessions end by themselves, and tell their clients
        server.should_exit = True
        await serving


class Server(uvicorn.Server):
    """uvicorn's, which leaves the signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """None are captured."""
        yield


class Prompt(H11Protocol):
    """uvicorn's HTTP/1.1, for clients that say what they want within `REQUEST_S`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._late = self.loop.call_later(REQUEST_S, self._give_up)

    def _give_up(self) -> None:
        waiting = cast("Any", self).cycle is None
        if waiting and not self.transport.is_closing():
            self.transport.abort()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """It has said: a WebSocket."""
        self._late.cancel()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        self._late.cancel()
        super().connection_lost(exc)
