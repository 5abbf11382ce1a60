"""Whatever FFmpeg plays: RTSP, HTTP, HLS, RTP, MPEG-TS over UDP, files of any container.

A thread of its own demuxes and decodes, because FFmpeg blocks. A live URL that breaks is opened
again, with growing pauses; what was missed meanwhile is a `gap` of the length the clock tells. PyAV
is imported when a source is opened.
"""

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Final, Literal

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from stream.clock import SAMPLE_RATE
from stream.sources.line import Line
from stream.sources.source import Block, Source, SourceError

log = structlog.get_logger(__name__)

SCHEMES: Final = ("rtsp", "rtsps", "http", "https", "rtp", "udp", "tcp", "srt", "file")

_CLOSE_S: Final = 2.0
"""How long closing waits for a thread that hangs in FFmpeg; it ends by its own time-out."""


class MediaSource(BaseModel):
    """A URL or file for FFmpeg."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["av"] = "av"
    url: str = Field(min_length=1, description=f"{', '.join(SCHEMES)}, or a path.")
    options: dict[str, str] = Field(
        default_factory=dict[str, str],
        description="FFmpeg's options of the protocol and the demuxer, as rtsp_transport: tcp.",
    )
    channel: int | None = Field(
        default=None, ge=0, description="The channel that is heard; null is the mean of all."
    )
    apart: int | None = Field(
        default=None, ge=1, le=64, description="That many channels become streams of their own."
    )
    timeout_s: float = Field(default=10.0, gt=0, description="Silence of the network that ends it.")
    retry_first_s: float = Field(default=0.5, gt=0, description="Pause after one failure.")
    retry_longest_s: float = Field(default=15.0, gt=0, description="Pause after many.")
    buffer_ms: int = Field(
        default=10_000, ge=500, description="Audio that may wait for the engine."
    )

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        scheme, found, _ = value.partition("://")
        if found and scheme not in SCHEMES:
            raise ValueError(f"expected {', '.join(SCHEMES)}, got {scheme!r}")
        return value

    @property
    def name(self) -> str:
        """For `session.opened`: the URL without a user's name and password."""
        scheme, found, rest = self.url.partition("://")
        if not found:
            return f"av:{self.url}"
        host, slash, path = rest.partition("/")
        return f"av:{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"

    @property
    def live(self) -> bool:
        """Whether it is a URL: it is opened again when it breaks."""
        return "://" in self.url and not self.url.startswith("file:")

    def channels(self) -> list[Source]:
        """One source a channel, all of one opening."""
        assert self.apart is not None
        lines = [Line(f"{self.name}#{n + 1}", self.buffer_ms) for n in range(self.apart)]
        shared = _Shared(self, lines)
        return [_Channel(line, shared) for line in lines]

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """Open it → its blocks.

        Raises:
            SourceError: PyAV is not installed, or a file cannot be read. A URL that is not there
                yet is waited for.
        """
        line = Line(self.name, self.buffer_ms)
        async with _reading(self, [line]), line.open() as blocks:
            yield blocks


@asynccontextmanager
async def _reading(settings: MediaSource, lines: list[Line]) -> AsyncGenerator[None]:
    """Feed lines from a thread until the source ends, or we do."""
    reader = _Reader(settings, lines, asyncio.get_running_loop())
    await asyncio.to_thread(reader.prepare)
    thread = threading.Thread(target=reader.run, name="media", daemon=True)
    thread.start()
    try:
        yield
    finally:
        reader.stopped.set()
        for line in lines:
            line.end()
        await asyncio.to_thread(thread.join, _CLOSE_S)


@dataclass
class _Shared:
    """One opening whose channels are heard apart; the first to open it starts it."""

    settings: MediaSource
    lines: list[Line]
    users: int = 0
    reading: Any = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def enter(self) -> None:
        async with self.lock:
            if self.users == 0:
                self.reading = _reading(self.settings, self.lines)
                await self.reading.__aenter__()
            self.users += 1

    async def leave(self) -> None:
        async with self.lock:
            self.users -= 1
            if self.users == 0:
                await self.reading.__aexit__(None, None, None)


class _Channel:
    """One channel as a source."""

    def __init__(self, line: Line, shared: _Shared) -> None:
        self._line, self._shared = line, shared

    @property
    def name(self) -> str:
        return self._line.name

    @property
    def live(self) -> bool:
        return self._shared.settings.live

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        await self._shared.enter()
        try:
            async with self._line.open() as blocks:
                yield blocks
        finally:
            await self._shared.leave()


class _Reader:
    """The thread's work; everything but `stopped` is the thread's."""

    def __init__(
        self, settings: MediaSource, lines: list[Line], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.stopped = threading.Event()
        self._settings, self._lines, self._loop = settings, lines, loop
        self._container: Any = None
        self._heard = monotonic()
        """When the last samples came."""
        self._interrupted = False

    def prepare(self) -> None:
        """Import the driver; open what is no live URL.

        Raises:
            SourceError: it is not installed, or the file cannot be read.
        """
        try:
            import av.error
            from av import logging as av_logging
        except ImportError as error:
            raise SourceError("an av source needs PyAV: pip install 'livesat[av]'") from error
        av_logging.set_level(av_logging.PANIC)  # what goes wrong is raised as well
        if not self._settings.live:
            try:
                self._container = self._open()
            except (av.error.FFmpegError, OSError, ValueError) as error:
                raise SourceError(f"{self._settings.name}: {_reason(error)}") from error

    def run(self) -> None:
        """Until the source ends or we are stopped."""
        import av.error

        settings, failures = self._settings, 0
        while not self.stopped.is_set():
            try:
                container = self._container or self._open()
                self._container = None
                with container:
                    if failures:
                        log.info("source is back", source=settings.name)
                    for samples in self._decode(container):
                        failures = 0
                        self._give(samples)
                reason = "it ended"
            except (av.error.FFmpegError, OSError, ValueError) as error:
                reason = _reason(error)
                if not settings.live:
                    for line in self._lines:
                        self._call(partial(line.fail, f"{settings.name}: {reason}"))
                    return
            if not settings.live:
                break
            if not self._interrupted:
                self._interrupted = True
                for line in self._lines:
                    self._call(partial(line.pause, "network"))
            log.warning("source broke", source=settings.name, error=reason, failures=failures)
            pause = min(settings.retry_first_s * 2.0 ** min(failures, 16), settings.retry_longest_s)
            self.stopped.wait(pause * random.uniform(0.5, 1.0))
            failures += 1
        for line in self._lines:
            self._call(line.end)

    def _open(self) -> Any:
        import av

        timeout = self._settings.timeout_s if self._settings.live else None
        container = av.open(
            self._settings.url, mode="r", options=dict(self._settings.options), timeout=timeout
        )
        if not container.streams.audio:
            container.close()
            raise ValueError("expected a stream of audio, found none")
        return container

    def _decode(self, container: Any) -> Iterator[NDArray[np.float32]]:
        """Blocks [n, C] float32 at 16 kHz, C as many as there are lines."""
        from av.audio.resampler import AudioResampler

        resampler = None
        for frame in container.decode(audio=0):
            if self.stopped.is_set():
                return
            if resampler is None:
                count = frame.layout.nb_channels
                wanted = len(self._lines) if len(self._lines) > 1 else self._settings.channel
                if wanted is not None and wanted >= count + (len(self._lines) > 1):
                    raise ValueError(f"expected more than {wanted} channels, got {count}")
                keep = self._settings.channel is not None or len(self._lines) > 1
                layout = frame.layout.name if keep else "mono"
                resampler = AudioResampler(format="fltp", layout=layout, rate=SAMPLE_RATE)
            for each in resampler.resample(frame):
                yield np.ascontiguousarray(each.to_ndarray().T, np.float32)
        if resampler is not None:
            for each in resampler.resample(None):
                yield np.ascontiguousarray(each.to_ndarray().T, np.float32)

    def _give(self, samples: NDArray[np.float32]) -> None:
        """samples: [n, C]"""
        now = monotonic()
        lost = 0
        if self._interrupted:
            lost = max(round((now - self._heard) * SAMPLE_RATE) - len(samples), 0)
            self._interrupted = False
        self._heard = now
        for index, line in enumerate(self._lines):
            channel = self._settings.channel or index
            mono = samples[:, min(channel, samples.shape[1] - 1)]
            if lost:
                self._call(partial(line.lose, lost, "network"))
            if self._settings.live:
                self._call(partial(line.feed, mono))
            elif not self.stopped.is_set():
                waiting = asyncio.run_coroutine_threadsafe(line.put(mono), self._loop)
                while not self.stopped.is_set():
                    try:
                        waiting.result(0.2)
                        break
                    except TimeoutError:
                        continue

    def _call(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is gone
            self.stopped.set()


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
