"""A daemon with a server, in the test's own event loop."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import websockets

from sinks.events import Event
from stream.daemon import run
from tests.stream.test_daemon import config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that announces itself no other way."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@dataclass
class House:
    """A running daemon.

    Attributes:
        port: Of its server.
        events: Everything it has emitted.
        stop: Set it to drain.
    """

    port: int
    events: list[Event] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def connect(self, path: str, **keys: Any) -> Any:
        return websockets.connect(self.url(path), max_size=None, **keys)

    def http(self, **keys: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", **keys)


@asynccontextmanager
async def serving(checkpoint, server=None, port=None, probe=None, **keys) -> AsyncGenerator[House]:
    """A daemon with nothing but a server; drained at the end.

    Args:
        checkpoint: Folders of heads.
        server: Settings of the server.
        port: Its port; a free one.
        probe: With TLS: looked for by an open port, not by what it answers.
        keys: More of the configuration.
    """
    house = House(port or free_port())
    settings = config(
        checkpoint, keys.pop("sources", {}), server={"port": house.port, **(server or {})}, **keys
    )
    running = asyncio.create_task(
        run(settings, on_event=house.events.append, stop=house.stop, fail_fast=False)
    )
    try:
        async with house.http() as http:
            while not running.done():
                try:
                    if probe is not None:
                        _, writer = await asyncio.open_connection("127.0.0.1", house.port)
                        writer.close()
                        break
                    if (await http.get("/readyz")).status_code in {200, 503}:
                        break
                except (httpx.TransportError, OSError):
                    await asyncio.sleep(0.02)
        if running.done():
            running.result()
        yield house
    finally:
        house.stop.set()
        await running


def pcm(samples) -> bytes:
    """Float samples → s16le."""
    return (samples * 32767).astype("<i2").tobytes()


async def talk(house: House, samples, path="/v1/audio", block=1600) -> list[dict[str, Any]]:
    """Send all of it, end the stream → the session's events."""
    async with house.connect(path) as socket:
        ready = json.loads(await socket.recv())
        assert ready["type"] == "ready"
        sending = asyncio.create_task(_send(socket, samples, block))
        events = [json.loads(message) async for message in socket]
        await sending
        assert socket.close_code == 1000, socket.close_reason
    return events


async def _send(socket, samples, block):
    for at in range(0, len(samples), block):
        await socket.send(pcm(samples[at : at + block]))
    await socket.send('{"type": "close"}')


FREE = {"wall_time", "lag_ms", "session_id", "resume_token", "source", "stream_id"}


def finals(events) -> list[dict[str, Any]]:
    """Final events without what differs from run to run."""
    return [
        {key: value for key, value in event.items() if key not in FREE}
        for event in events
        if event["is_final"]
    ]


def about_audio(events) -> list[dict[str, Any]]:
    """Final events without numbers, and without those that no audio makes."""
    kept = [event for event in finals(events) if event["type"] not in {"warning", "session.closed"}]
    return [{k: v for k, v in event.items() if k != "seq"} for event in kept]
