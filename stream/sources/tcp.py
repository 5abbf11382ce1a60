"""Raw samples over TCP: every connection, or each of its channels, is a stream while it lasts."""

import asyncio
from contextlib import suppress
from typing import Final, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stream.clock import SAMPLE_RATE
from stream.engine import EngineFull
from stream.resample import Resampler
from stream.sources.apart import stream_name
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
    apart: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="That many channels of a connection become streams of their own.",
    )
    streams: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Streams at a time: connections, or `apart` for each of them.",
    )
    idle_s: float = Field(default=60, gt=0, description="A connection silent for this is closed.")
    buffer_ms: int = Field(default=2000, ge=20, description="Audio that may wait for the engine.")

    @model_validator(mode="after")
    def _a_channel_there_is(self) -> Self:
        if self.channel is not None and self.channel >= self.channels:
            raise ValueError(f"channel: expected 0 to {self.channels - 1}, got {self.channel}")
        if self.apart is not None and self.apart > self.channels:
            raise ValueError(f"apart: expected {self.channels} at most, got {self.apart}")
        if self.streams < self.each:
            raise ValueError(f"streams: expected at least {self.each}, got {self.streams}")
        return self

    @property
    def each(self) -> int:
        """Streams of one connection."""
        return self.apart or 1

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
            settings = self._settings
            if len(self._tasks) * settings.each > settings.streams:
                there = (len(self._tasks) - 1) * settings.each
                log.warning("refused", source=self._name, peer=peer, streams=there)
                return
            self._count += 1
            await self._hear(f"{self._name}-{self._count}", peer, reader)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _hear(self, name: str, peer: str, reader: asyncio.StreamReader) -> None:
        settings = self._settings
        if settings.apart is None:
            streams = {name: Line(f"tcp:{peer}", settings.buffer_ms)}
        else:
            streams = {
                stream_name(name, channel): Line(f"tcp:{peer}#{channel + 1}", settings.buffer_ms)
                for channel in range(settings.apart)
            }
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(
                self._receive(reader, list(streams.values()), peer), name=f"receive:{name}"
            )
            try:
                async with asyncio.TaskGroup() as hearing:
                    for stream, line in streams.items():
                        hearing.create_task(self._stream(stream, line, peer), name=stream)
            finally:
                receiving.cancel()

    async def _stream(self, name: str, line: Line, peer: str) -> None:
        try:
            await self._intake.stream(name, line)
        except (SourceError, EngineFull) as error:
            log.warning("refused", source=self._name, peer=peer, error=str(error))
        finally:
            line.end()  # nobody hears it: the connection's other channels do not wait for it

    async def _receive(self, reader: asyncio.StreamReader, lines: list[Line], peer: str) -> None:
        settings = self._settings
        heard = [settings.channel] if settings.apart is None else range(settings.apart)
        decoders = [PcmDecoder(settings.format, settings.channels, channel) for channel in heard]
        resamplers = [Resampler(settings.rate) for _ in lines]
        problem: str | None = None
        try:
            while True:
                async with asyncio.timeout(settings.idle_s):
                    data = await reader.read(_READ)
                if not data:
                    break
                for line, decoder, resampler in zip(lines, decoders, resamplers, strict=True):
                    await line.put(resampler.step(decoder.step(data)))
        except TimeoutError:
            problem = f"tcp:{peer}: no audio for {settings.idle_s:g} s"
        except OSError as error:
            problem = f"tcp:{peer}: {error.strerror or error}"
        for line, resampler in zip(lines, resamplers, strict=True):
            if problem is not None:
                line.fail(problem)
            else:
                await line.put(resampler.flush())
                line.end()
