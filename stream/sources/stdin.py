"""Raw samples from a pipe: ``ffmpeg … -f s16le -ar 16000 -ac 1 - | livesat annotate -``."""

import asyncio
import os
import select
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from time import monotonic
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.apart import alongside, sharing
from stream.sources.file import SHORTEST
from stream.sources.line import Line
from stream.sources.pcm import PcmDecoder, PcmFormat
from stream.sources.source import Block, Source, SourceError

_READ: Final = 6400
"""Bytes a read: 0.2 s."""

_AHEAD: Final = 8
"""Reads that may wait for the loop; then the pipe fills, and its writer waits."""

_CONTAINERS: Final = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3\x03": "MP3"}


class StdinSource(BaseModel):
    """Raw samples on standard input, until it closes; 16-bit little-endian mono unless told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["stdin"] = "stdin"
    format: PcmFormat = "s16le"
    rate: int = Field(default=SAMPLE_RATE, ge=1000, le=768_000, description="Samples a second.")
    channels: int = Field(default=1, ge=1, le=64, description="Interleaved; they are averaged.")
    channel: int | None = Field(
        default=None, ge=0, le=63, description="The channel that is heard; null is their mean."
    )
    apart: int | None = Field(
        default=None, ge=1, le=64, description="That many channels become streams of their own."
    )

    @model_validator(mode="after")
    def _channels_there_are(self) -> Self:
        if self.channel is not None and self.channel >= self.channels:
            raise ValueError(f"channel: expected 0 to {self.channels - 1}, got {self.channel}")
        if self.apart is not None and self.apart > self.channels:
            raise ValueError(f"apart: expected {self.channels} at most, got {self.apart}")
        return self

    @property
    def name(self) -> str:
        """For `session.opened`."""
        return "stdin"

    @property
    def live(self) -> bool:
        """See `Source.live`."""
        return False

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """Start reading → blocks.

        Raises:
            SourceError: standard input is closed or a terminal. Iterating raises it when there was
                no audio, or a file of another format.
        """
        async with self._reading() as pipe, aclosing(self._heard(pipe)) as heard:
            yield self._blocks(heard)

    def split(self) -> list[Source]:
        """One source a channel; the pipe is that of all of them."""
        assert self.apart is not None
        lines = [Line(self.name) for _ in range(self.apart)]
        return sharing(lines, lambda: self._pouring(lines), live=self.live)

    @asynccontextmanager
    async def _reading(self) -> AsyncGenerator["_Pipe"]:
        """Start reading.

        Raises:
            SourceError: standard input is closed or a terminal.
        """
        expected = f"expected raw {self.format} samples from a pipe"
        try:
            fd = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError) as error:
            raise SourceError(f"stdin is closed; {expected}") from error
        if os.isatty(fd):
            raise SourceError(f"stdin is a terminal; {expected}")
        pipe = _Pipe(fd)
        pipe.start()
        try:
            yield pipe
        finally:
            await asyncio.to_thread(pipe.stop)

    @asynccontextmanager
    async def _pouring(self, lines: Sequence[Line]) -> AsyncGenerator[None]:
        """Feed the lines, one a channel, while entered.

        Raises:
            SourceError: as `_reading`.
        """
        async with (
            self._reading() as pipe,
            aclosing(self._heard(pipe)) as heard,
            alongside(_pour(heard, lines), self.name),
        ):
            yield

    @staticmethod
    async def _blocks(
        heard: AsyncIterator[list[NDArray[np.float32]]],
    ) -> AsyncGenerator[Block]:
        async for (samples,) in heard:
            yield Block(samples, monotonic())

    async def _heard(self, pipe: "_Pipe") -> AsyncGenerator[list[NDArray[np.float32]]]:
        """→ what each stream hears of a read, at 16 kHz, until the pipe closes.

        Raises:
            SourceError: there was no audio, or a file of another format.
        """
        channels = [self.channel] if self.apart is None else list(range(self.apart))
        decoders = [PcmDecoder(self.format, self.channels, channel) for channel in channels]
        resamplers = [Resampler(self.rate) for _ in channels]
        head = b""
        while data := await pipe.read():
            if len(head) < 4:
                head = (head + data)[:4]
                if kind := _CONTAINERS.get(head):
                    raise SourceError(
                        f"stdin: got a {kind} file; expected raw {self.format} samples "
                        "(give the file's path, or convert it with `ffmpeg -f s16le`)"
                    )
            yield [
                resampler.step(decoder.step(data))
                for resampler, decoder in zip(resamplers, decoders, strict=True)
            ]
        taken = resamplers[0].taken
        if taken * SAMPLE_RATE / self.rate < SHORTEST:
            raise SourceError(
                f"stdin: {taken} sample(s); expected at least 25 ms of raw {self.format} audio"
            )
        yield [resampler.flush() for resampler in resamplers]


async def _pour(heard: AsyncIterator[list[NDArray[np.float32]]], lines: Sequence[Line]) -> None:
    """Give each line its channel as fast as the slowest session hears it, then end them."""
    try:
        async for channels in heard:
            for line, samples in zip(lines, channels, strict=True):
                await line.put(samples)
    except SourceError as error:
        for line in lines:
            line.fail(str(error))
    for line in lines:
        line.end()


class _Pipe:
    """A thread that reads a descriptor, since the loop cannot wait for a regular file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes | OSError] = asyncio.Queue()  # bounded by `_room`
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = threading.Event()
        self._wake_out, self._wake_in = os.pipe()
        self._thread = threading.Thread(target=self._run, name="source:stdin", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def read(self) -> bytes:
        """→ the next bytes; empty at the end.

        Raises:
            SourceError: the descriptor cannot be read.
        """
        item = await self._queue.get()
        if isinstance(item, OSError):
            raise SourceError(f"stdin: {item.strerror or item}")
        self._room.release()
        return item

    def stop(self) -> None:
        """End the thread, whatever it waits for. Blocks until it has."""
        self._stopped.set()
        self._room.release()
        os.write(self._wake_in, b".")
        self._thread.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake_out, select.POLLIN)
        while True:
            self._room.acquire()
            if not self._stopped.is_set():
                poll.poll()
            if self._stopped.is_set():
                return
            try:
                item: bytes | OSError = os.read(self._fd, _READ)
            except OSError as error:
                item = error
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
            if not item or isinstance(item, OSError):
                return
