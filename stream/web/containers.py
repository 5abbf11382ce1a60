"""Audio in a container (Ogg, WebM, …) that arrives in pieces → samples, by FFmpeg.

PyAV reads from something that blocks, so it reads on a thread of its own.
"""

import asyncio
import queue
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stream.clock import SAMPLE_RATE
from stream.sources.line import Line

_WAITING: Final = 1 << 20
"""Bytes that wait for the thread; then the sender waits."""

_FORMATS: Final = "ogg,matroska,webm,flac,wav,mp3,aac,mov"
"""FFmpeg's demuxers for what a caller may send. Others open files and addresses of the caller's
choice: ``concat``, ``sdp``, playlists."""


class ContainerError(Exception):
    """What came is no audio that FFmpeg can read, or PyAV is not installed."""


class Container:
    """One connection's container; use `open`."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # see `_WAITING`
        self._waiting = 0
        self._rest = b""
        self._room = asyncio.Event()
        self._room.set()
        self._decoding: asyncio.Task[None] | None = None
        self._ended = False

    @classmethod
    async def open(cls, line: Line) -> "Container":
        """Begin to decode into ``line``.

        Raises:
            ContainerError: PyAV is not installed.
        """
        try:
            import av as _  # noqa: F401 - asked for here, used on the thread
        except ImportError as error:
            raise ContainerError("opus needs PyAV; pip install 'livesat[av]' brings it") from error
        self = cls(line)
        self._decoding = asyncio.create_task(asyncio.to_thread(self._decode), name="container")
        return self

    async def feed(self, data: bytes) -> None:
        """The next bytes; waits while the decoder is behind.

        Raises:
            ContainerError: the decoder gave up.
        """
        assert self._decoding is not None
        while self._waiting >= _WAITING and not self._decoding.done():
            self._room.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._room.wait()
        if self._decoding.done():
            self._decoding.result()
            raise ContainerError("the audio in the container has ended")
        self._waiting += len(data)
        self._pieces.put(data)

    async def end(self) -> None:
        """There are no more bytes: decode what came.

        Raises:
            ContainerError: it could not be decoded.
        """
        if not self._ended:
            self._ended = True
            self._pieces.put(None)
        assert self._decoding is not None
        await self._decoding

    async def close(self) -> None:
        """Stop the thread; what it finds wrong by now is of no interest."""
        with suppress(ContainerError):
            await self.end()

    def _taken(self, size: int) -> None:
        self._waiting -= size
        self._room.set()

    # -- on the thread ------------------------------------------------------------------------

    def read(self, size: int) -> bytes:
        """For FFmpeg: up to ``size`` bytes, b"" at the end."""
        if not self._rest:
            piece = self._pieces.get()
            if piece is None:
                self._pieces.put(None)  # for the next call
                return b""
            self._loop.call_soon_threadsafe(self._taken, len(piece))
            self._rest = piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _decode(self) -> None:
        import av
        from av.audio.resampler import AudioResampler
        from av.error import FFmpegError

        try:
            allowed = {"format_whitelist": _FORMATS}
            with av.open(self, mode="r", options=allowed) as container:  # pyright: ignore[reportArgumentType]
                if not container.streams.audio:
                    raise ContainerError("expected a container with an audio stream")
                resampler = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
                for frame in container.decode(audio=0):
                    self._give(resampler.resample(frame))
                self._give(resampler.resample(None))
        except FFmpegError as error:
            raise ContainerError(f"expected audio in Ogg or WebM ({error.strerror})") from error

    def _give(self, frames: list[Any]) -> None:
        for frame in frames:
            samples: NDArray[np.float32] = np.ascontiguousarray(
                frame.to_ndarray().reshape(-1), np.float32
            )
            asyncio.run_coroutine_threadsafe(self._line.put(samples), self._loop).result()
