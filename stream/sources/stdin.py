"""Raw samples from a pipe: ``ffmpeg … -f s16le -ar 16000 -ac 1 - | livesat annotate -``."""

import asyncio
import os
import select
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from time import monotonic
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.file import SHORTEST
from stream.sources.pcm import PcmDecoder, PcmFormat
from stream.sources.source import Block, SourceError

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

    @model_validator(mode="after")
    def _a_channel_there_is(self) -> Self:
        if self.channel is not None and self.channel >= self.channels:
            raise ValueError(f"channel: expected 0 to {self.channels - 1}, got {self.channel}")
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
        try:
            fd = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError) as error:
            raise SourceError("stdin is closed; expected raw s16le samples from a pipe") from error
        if os.isatty(fd):
            raise SourceError("stdin is a terminal; expected raw s16le samples from a pipe")
        pipe = _Pipe(fd)
        pipe.start()
        try:
            async with aclosing(self._blocks(pipe)) as blocks:
                yield blocks
        finally:
            await asyncio.to_thread(pipe.stop)

    async def _blocks(self, pipe: "_Pipe") -> AsyncGenerator[Block]:
        resampler = Resampler(self.rate)
        decoder = PcmDecoder(self.format, self.channels, self.channel)
        head = b""
        while data := await pipe.read():
            if len(head) < 4:
                head = (head + data)[:4]
                if kind := _CONTAINERS.get(head):
                    raise SourceError(
                        f"stdin: got a {kind} file; expected raw {self.format} samples "
                        "(give the file's path, or convert it with `ffmpeg -f s16le`)"
                    )
            yield Block(resampler.step(decoder.step(data)), monotonic())
        if resampler.taken * SAMPLE_RATE / self.rate < SHORTEST:
            raise SourceError(
                f"stdin: {resampler.taken} sample(s); "
                f"expected at least 25 ms of raw {self.format} audio"
            )
        yield Block(resampler.flush(), monotonic())


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
