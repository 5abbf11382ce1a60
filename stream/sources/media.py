"""Whatever FFmpeg plays: RTSP, HTTP, HLS, RTP, MPEG-TS over UDP, files of any container.

A thread of its own demuxes and decodes, because FFmpeg blocks. A live URL that breaks is opened
again, with growing pauses; what was missed meanwhile is a `gap` of the length the clock tells, and
what is missing inside a stream one of the length its timestamps tell. PyAV is imported when a
source is opened.
"""

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.apart import sharing
from stream.sources.line import Line
from stream.sources.source import Block, Source, SourceError

log = structlog.get_logger(__name__)

SCHEMES: Final = ("rtsp", "rtsps", "http", "https", "rtp", "udp", "tcp", "srt", "file")

PORTED: Final = frozenset({"rtp", "udp", "tcp", "srt"})
"""Schemes without a port of their own."""

PATIENT: Final = frozenset({"http", "https", "tcp"})
"""Schemes whose sender can be told to wait: what comes faster than it is heard is not lost."""

_CLOSE_S: Final = 2.0
"""How long closing waits for a thread that hangs in FFmpeg; it ends by its own time-out."""

_SLACK_S: Final = 0.04
"""Timestamps ahead of the samples by this much are a loss; less is a container's rounding."""

_REBASED_S: Final = 1.0
"""Timestamps this far from what the samples or the clock say were set anew, and say nothing."""

_BACKLOG_S: Final = 0.2
"""After a connection, what FFmpeg read to know the format comes at once, within this time."""


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
        if not found or scheme == "file":
            return value
        if scheme not in SCHEMES:
            raise ValueError(f"expected {', '.join(SCHEMES)}, got {scheme!r}")
        parts = urlsplit(value)
        if not parts.netloc:
            raise ValueError(f"expected a host after {scheme}://")
        try:
            port = parts.port
        except ValueError:
            raise ValueError("expected a port from 0 to 65535") from None
        if port is None and scheme in PORTED:
            raise ValueError(f"expected {scheme}://host:port")
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
        """Whether it is a URL; one that turns out to have an end is heard once, like a file."""
        return "://" in self.url and not self.url.startswith("file:")

    def split(self) -> list[Source]:
        """One source a channel, all of one opening."""
        assert self.apart is not None
        lines = [Line(f"{self.name}#{n + 1}", self.buffer_ms) for n in range(self.apart)]
        return sharing(lines, lambda: _reading(self, lines), live=self.live)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """Open it → its blocks.

        Raises:
            SourceError: PyAV is not installed, or a file cannot be read. Iterating raises it where
                a URL is not what can be played (no audio, no such channel, no decoder, refused);
                one that is not there yet is waited for.
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


class _Unusable(ValueError):
    """What was opened can never be heard."""


class _Reader:
    """The thread's work; everything but `stopped` is the thread's."""

    def __init__(
        self, settings: MediaSource, lines: list[Line], loop: asyncio.AbstractEventLoop
    ) -> None:
        self.stopped = threading.Event()
        self._settings, self._lines, self._loop = settings, lines, loop
        scheme = settings.url.partition("://")[0]
        self._patient = not settings.live or scheme in PATIENT
        self._container: Any = None
        self._ever = False  # whether anything was heard
        self._finite = False  # whether it has an end, and no clock but its own
        self._heard = monotonic()
        """When the last samples came."""
        self._interrupted = False
        self._backlog: list[NDArray[np.float32]] = []  # bound: what comes in `_BACKLOG_S`
        self._back = 0.0  # when the first of it came

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
            self._finite = not settings.live
            try:
                container = self._container or self._open()
                self._container = None
                with container:
                    self._finite = self._finite or _finite(container)
                    if failures:
                        log.info("source is back", source=settings.name)
                    for lost, samples in self._decode(container):
                        failures = 0
                        self._take(lost, samples)
                self._bring_out()
                reason = "it ended"
                if self._finite:
                    break
            except (av.error.FFmpegError, OSError, ValueError) as error:
                self._bring_out()
                reason = _reason(error)
                if self._finite or (not self._ever and _hopeless(error)):
                    for line in self._lines:
                        self._call(partial(line.fail, f"{settings.name}: {reason}"))
                    return
            if self.stopped.is_set():
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

        settings = self._settings
        timeout = settings.timeout_s if settings.live else None
        container = av.open(settings.url, mode="r", options=dict(settings.options), timeout=timeout)
        if problem := _problem(container):
            container.close()
            raise _Unusable(problem)
        return container

    def _decode(self, container: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """→ samples lost before, and [n, C] float32 at 16 kHz, C as many as there are lines."""
        import av.error
        from av.audio.resampler import AudioResampler

        form: Any = None
        planar: Any = None
        resamplers: list[Resampler] = []
        origin: float | None = None  # the timestamp of this connection's first sample
        told_s = 0.0  # heard or lost since
        damaged = whole = 0
        for packet in container.demux(container.streams.audio[0]):
            if self.stopped.is_set():
                return
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                damaged += 1  # timestamps say how much is missing
                continue
            for frame in frames:
                whole += 1
                rate = int(frame.sample_rate)
                now_form = (rate, frame.layout.name, frame.format.name)
                if now_form != form:
                    if resamplers:
                        yield 0, _columns([each.flush() for each in resamplers])
                    form = now_form
                    planar = AudioResampler(format="fltp", layout=frame.layout, rate=rate)
                    resamplers = [Resampler(rate) for _ in self._lines]
                lost = 0
                if frame.time is not None:
                    ahead = 0.0 if origin is None else frame.time - origin - told_s
                    # Told by the clock as well: while nothing is lost, time stands still for it.
                    most = ahead if self._finite else monotonic() - self._heard
                    if origin is None or ahead < -_REBASED_S or ahead > most + _REBASED_S:
                        origin = frame.time - told_s
                    elif ahead > _SLACK_S:
                        yield 0, _columns([each.flush() for each in resamplers])
                        resamplers = [Resampler(rate) for _ in self._lines]
                        lost = round(ahead * SAMPLE_RATE)
                        told_s += ahead
                for each in planar.resample(frame):
                    told_s += each.samples / rate
                    heard = self._channels(np.asarray(each.to_ndarray(), np.float32))
                    made = [r.step(column) for r, column in zip(resamplers, heard, strict=True)]
                    yield lost, _columns(made)
                    lost = 0
        if resamplers:
            yield 0, _columns([each.flush() for each in resamplers])
        if damaged:
            log.warning("source is damaged", source=self._settings.name, packets=damaged)
            if not whole:
                raise _Unusable("none of its audio can be decoded")

    def _channels(self, planes: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """planes: [channels, n] → [n] for each line."""
        apart, channel = len(self._lines), self._settings.channel
        count = len(planes)
        if apart > 1:
            if apart > count:
                raise _Unusable(f"apart: {apart}: there are {count} channels")
            return list(planes[:apart])
        if channel is None:
            return [planes[0] if count == 1 else planes.mean(axis=0, dtype=np.float32)]
        if channel >= count:
            raise _Unusable(f"channel {channel}: there are {count}; expected 0 to {count - 1}")
        return [planes[channel]]

    def _take(self, lost: int, samples: NDArray[np.float32]) -> None:
        """After an interruption the backlog is gathered first: it tells when the audio began."""
        now = monotonic()
        self._ever = True
        if not self._interrupted:
            self._heard = now
            self._give(lost, samples)
            return
        if not self._backlog:
            self._back = now
        self._backlog.append(
            np.concatenate([np.zeros((lost, samples.shape[1]), np.float32), samples])
        )
        if now - self._back >= _BACKLOG_S:
            self._bring_out()

    def _bring_out(self) -> None:
        """What was gathered after an interruption, and before it what the clock says is missing."""
        if not self._backlog:
            return
        now = monotonic()
        samples = np.concatenate(self._backlog)
        self._backlog.clear()
        self._interrupted = False
        away = max(round((now - self._heard) * SAMPLE_RATE) - len(samples), 0)
        self._heard = now
        self._give(away, samples)

    def _give(self, lost: int, samples: NDArray[np.float32]) -> None:
        """samples: [n, C]"""
        for index, line in enumerate(self._lines):
            if lost:
                self._call(partial(line.lose, lost, "network"))
            mono = np.ascontiguousarray(samples[:, index])
            if not self._patient:
                self._call(partial(line.feed, mono))
            elif not self.stopped.is_set():
                self._put(line, mono)

    def _put(self, line: Line, mono: NDArray[np.float32]) -> None:
        try:
            waiting = asyncio.run_coroutine_threadsafe(line.put(mono), self._loop)
        except RuntimeError:  # the loop is gone
            self.stopped.set()
            return
        while not self.stopped.is_set():
            with suppress(TimeoutError):
                waiting.result(0.2)
                return

    def _call(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is gone
            self.stopped.set()


def _columns(channels: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """C times [n] → [n, C]"""
    return np.stack(channels, axis=1)


def _problem(container: Any) -> str | None:
    """Why it can never be heard."""
    if not container.streams.audio:
        return "expected a stream of audio, found none"
    if container.streams.audio[0].codec_context is None:
        return "FFmpeg has no decoder for its audio"
    return None


def _finite(container: Any) -> bool:
    """Whether a URL is a file somebody serves: its size is known, or its playlist is complete."""
    if container.format.name in {"hls", "dash"}:
        return container.duration is not None
    return str(container.name).startswith("http") and container.size > 0


def _hopeless(error: Exception) -> bool:
    """Whether waiting changes nothing."""
    import av.error

    return isinstance(
        error,
        _Unusable
        | av.error.ProtocolNotFoundError
        | av.error.DemuxerNotFoundError
        | av.error.DecoderNotFoundError
        | av.error.OptionNotFoundError
        | av.error.HTTPBadRequestError
        | av.error.HTTPUnauthorizedError
        | av.error.HTTPForbiddenError,
    )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
