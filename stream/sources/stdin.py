"""Raw samples from a pipe: ``ffmpeg … -f s16le -ar 16000 -ac 1 - | livesat annotate -``."""

import asyncio
import os
import select
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from time import monotonic
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.file import SHORTEST
from stream.sources.source import Block, SourceError

_READ: Final = 6400
"""Bytes a read: 0.2 s."""

_AHEAD: Final = 8
"""Reads that may wait for the loop; then the pipe fills, and its writer waits."""

_CONTAINERS: Final = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3\x03": "MP3"}


class StdinSource(BaseModel):
    """Signed 16-bit little-endian mono samples on standard input, until it closes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["stdin"] = "stdin"
    rate: int = Field(default=SAMPLE_RATE, ge=1000, le=768_000, description="Samples a second.")

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
        odd = b""
        head = b""
        while data := await pipe.read():
            if len(head) < 4:
                head = (head + data)[:4]
                if kind := _CONTAINERS.get(head):
                    raise SourceError(
                        f"stdin: got a {kind} file; expected raw s16le samples "
                        "(give the file's path, or convert it with `ffmpeg -f s16le`)"
                    )
            data = odd + data
            whole = len(data) // 2 * 2
            odd = data[whole:]  # a pipe may cut a sample in two; half a one at the end is no sample
            samples = np.frombuffer(data[:whole], "<i2").astype(np.float32)
            samples *= np.float32(1 / 32768)
            yield Block(resampler.step(samples), monotonic())
        if resampler.taken * SAMPLE_RATE / self.rate < SHORTEST:
            raise SourceError(
                f"stdin: {resampler.taken} sample(s); expected at least 25 ms of raw s16le audio"
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
