"""Raw samples over TCP: every connection is a stream, as long as it lasts."""

import asyncio
from contextlib import suppress
from typing import Final, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stream.clock import SAMPLE_RATE
from stream.engine import EngineFull
from stream.resample import Resampler
from stream.sources.line import Line
from stream.sources.pcm import PcmDecoder, PcmFormat
from stream.sources.source import Intake, SourceError

log = structlog.get_logger(__name__)

_READ: Final = 16_384


class TcpSource(BaseModel):
    """A port that takes raw PCM, without authentication: loopback unless told otherwise.

    A sender that is faster than the engine is slowed down by TCP itself; nothing is lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tcp"] = "tcp"
    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535, description="0 takes a free one, which the log tells.")
    format: PcmFormat = "s16le"
    rate: int = Field(default=SAMPLE_RATE, ge=1000, le=768_000, description="Samples a second.")
    channels: int = Field(default=1, ge=1, le=64, description="Interleaved; they are averaged.")
    channel: int | None = Field(
        default=None, ge=0, le=63, description="The channel that is heard; null is their mean."
    )
    streams: int = Field(default=4, ge=1, le=1024, description="Connections at a time.")
    idle_s: float = Field(default=60, gt=0, description="A connection silent for this is closed.")
    buffer_ms: int = Field(default=2000, ge=20, description="Audio that may wait for the engine.")

    @model_validator(mode="after")
    def _a_channel_there_is(self) -> Self:
        if self.channel is not None and self.channel >= self.channels:
            raise ValueError(f"channel: expected 0 to {self.channels - 1}, got {self.channel}")
        return self

    async def serve(self, name: str, intake: Intake) -> None:
        """See `Listener.serve`."""
        calls = _Calls(self, name, intake)
        try:
            server = await asyncio.start_server(calls.take, self.host, self.port)
        except OSError as error:
            raise SourceError(
                f"tcp {self.host}:{self.port}: cannot listen ({error.strerror or error})"
            ) from error
        async with server:
            port = server.sockets[0].getsockname()[1]
            log.info("listening", source=name, kind="tcp", host=self.host, port=port)
            intake.listening(name)
            await intake.stop.wait()
            server.close()
            await calls.gone()


class _Calls:
    """The connections of one port."""

    def __init__(self, settings: TcpSource, name: str, intake: Intake) -> None:
        self._settings, self._name, self._intake = settings, name, intake
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def gone(self) -> None:
        """Wait until the last one has ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        peer = "{}:{}".format(*writer.get_extra_info("peername")[:2])
        try:
            if len(self._tasks) > self._settings.streams:
                log.warning("refused", source=self._name, peer=peer, streams=len(self._tasks) - 1)
                return
            self._count += 1
            await self._hear(f"{self._name}-{self._count}", peer, reader)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _hear(self, name: str, peer: str, reader: asyncio.StreamReader) -> None:
        line = Line(f"tcp:{peer}", self._settings.buffer_ms)
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(self._receive(reader, line), name=f"receive:{name}")
            try:
                await self._intake.stream(name, line)
            except (SourceError, EngineFull) as error:
                log.warning("refused", source=self._name, peer=peer, error=str(error))
            finally:
                receiving.cancel()

    async def _receive(self, reader: asyncio.StreamReader, line: Line) -> None:
        settings = self._settings
        decoder = PcmDecoder(settings.format, settings.channels, settings.channel)
        resampler = Resampler(settings.rate)
        try:
            while True:
                async with asyncio.timeout(settings.idle_s):
                    data = await reader.read(_READ)
                if not data:
                    break
                await line.put(resampler.step(decoder.step(data)))
        except TimeoutError:
            line.fail(f"{line.name}: no audio for {settings.idle_s:g} s")
        except OSError as error:
            line.fail(f"{line.name}: {error.strerror or error}")
        else:
            await line.put(resampler.flush())
            line.end()
