"""A sound device through PortAudio, on the assumption that it will be unplugged, hang and stall."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.ring import Ring
from stream.sources.apart import alongside, sharing
from stream.sources.drift import Drift
from stream.sources.line import Line
from stream.sources.source import Block, GapReason, Source, SourceError


@dataclass(frozen=True, slots=True)
class Device:
    """A sound device that can record.

    Attributes:
        index: PortAudio's number for it; changes when devices come and go.
        name: Its name; the part that tells it apart is enough in a config.
        channels: Input channels.
        rate: Its own sample rate.
        default: Whether it is the system's default.
    """

    index: int
    name: str
    channels: int
    rate: int
    default: bool


def list_devices() -> list[Device]:
    """Every device that can record, as PortAudio sees it now.

    Raises:
        SourceError: sounddevice or libportaudio2 is missing.
    """
    sd = _sounddevice()
    default = sd.default.device[0]
    return [
        Device(
            index=index,
            name=str(device["name"]),
            channels=int(device["max_input_channels"]),
            rate=int(device["default_samplerate"]),
            default=index == default,
        )
        for index, device in enumerate(sd.query_devices())
        if device["max_input_channels"] > 0
    ]


class MicrophoneSource(BaseModel):
    """A microphone: survives being unplugged, hanging, stalls and clock drift.

    The session's clock follows the wall: what the device did not deliver becomes a gap of the
    right length, with reason ``unplugged`` (the device went away or went silent) or ``overflow``
    (samples were lost on the way to us).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["microphone"] = "microphone"
    device: int | str | None = Field(
        default=None, description="Index, or part of the name; null is the system's default."
    )
    channels: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Channels the device is opened with; null is as many as `channel` or `apart` "
        "need, or one: what the device itself gives as mono.",
    )
    channel: int | None = Field(
        default=None,
        ge=0,
        le=63,
        description="The channel that is heard, from 0; null is the mean of `channels`.",
    )
    apart: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="That many channels become streams of their own, of one opening of the device.",
    )
    correct_drift: bool = Field(
        default=True, description="Keep the session's clock to ours where the device's is off."
    )
    block_ms: int = Field(default=20, ge=5, le=500, description="Audio a callback.")
    buffer_ms: int = Field(
        default=10_000, ge=500, description="What waits for the engine before the oldest is lost."
    )
    hang_ms: int = Field(
        default=1_000, ge=200, description="Silence of the callback that means it hangs."
    )
    retry_ms: int = Field(default=500, ge=50, description="Between attempts to open it again.")

    @model_validator(mode="after")
    def _channels_there_are(self) -> Self:
        if self.channel is not None and self.channel >= self.opened:
            raise ValueError(f"channel: expected 0 to {self.opened - 1}, got {self.channel}")
        if self.apart is not None and self.apart > self.opened:
            raise ValueError(f"apart: expected {self.opened} at most, got {self.apart}")
        return self

    @property
    def name(self) -> str:
        """For `session.opened`."""
        return f"microphone:{'default' if self.device is None else self.device}"

    @property
    def live(self) -> bool:
        """See `Source.live`."""
        return True

    @property
    def opened(self) -> int:
        """Channels the device is opened with."""
        alone = 1 if self.channel is None else self.channel + 1
        return self.channels or max(alone, self.apart or 1)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """Open the device → blocks, until closed.

        Raises:
            SourceError: no sounddevice, no such device or channel, or it does not record.
        """
        async with self._opening() as recorded, aclosing(_first(recorded)) as blocks:
            yield blocks

    def split(self) -> list[Source]:
        """One source a channel; all are of one opening, for a device may allow no second."""
        assert self.apart is not None
        lines = [Line(f"{self.name}#{n + 1}", self.buffer_ms) for n in range(self.apart)]
        return sharing(lines, lambda: self._recording(lines), live=self.live)

    @asynccontextmanager
    async def _recording(self, lines: Sequence[Line]) -> AsyncGenerator[None]:
        """Feed the lines, one a channel, while entered.

        Raises:
            SourceError: as `open`.
        """
        async with self._opening() as recorded, alongside(_pour(recorded, lines), self.name):
            yield

    @asynccontextmanager
    async def _opening(self) -> AsyncGenerator[AsyncGenerator[list[Block]]]:
        """Open the device → what is recorded: blocks of the same time, one a stream."""
        sd = await asyncio.to_thread(_sounddevice)
        line = await asyncio.to_thread(_open, sd, self)
        try:
            async with aclosing(self._blocks(sd, line)) as recorded:
                yield recorded
        finally:
            await asyncio.to_thread(line.close)  # the blocks do it, but not if none was asked for

    async def _blocks(self, sd: Any, line: "_Line") -> AsyncGenerator[list[Block]]:
        # What came while the rest of the house was opened is not part of the session.
        waited = line.ring.read()
        read = waited.start + len(waited.samples)
        resumes: float | None = None  # when the last sample before a loss of the device was heard
        while True:
            try:
                async for blocks in self._hear(line, read):
                    block = blocks[0]  # as long, as late and as lossy as the others
                    if resumes is not None:
                        first = block.captured - len(block.samples) / SAMPLE_RATE
                        lost = max(round((first - resumes) * SAMPLE_RATE), 0) + block.lost
                        yield [replace(each, lost=lost, reason="unplugged") for each in blocks]
                    else:
                        yield blocks
                    resumes = None if len(block.samples) else resumes
            finally:
                await asyncio.to_thread(line.close)
            if resumes is None:
                resumes = line.heard
            yield self._silent(monotonic(), 0, "unplugged")
            line = await self._reopen(sd)
            read = 0

    async def _hear(self, line: "_Line", read: int) -> AsyncGenerator[list[Block]]:
        """One opening of the device → blocks from sample ``read`` on, until it ends or hangs."""
        tracks = [Track(line.rate, correct=self.correct_drift) for _ in range(self._streams)]
        continuity = Continuity(line.rate)
        quiet_s = 0.0
        seen = line.pulse
        looked = monotonic()
        period = self.block_ms / 1000
        while True:
            await asyncio.sleep(period)
            now = monotonic()
            # A late look is our own stall, in which a callback had no chance either.
            quiet_s += min(now - looked, 2 * period)
            looked = now
            ended = line.ended.is_set()
            if line.pulse != seen:
                quiet_s = 0.0
                seen = line.pulse
            upto, lost = continuity.step(*seen)
            hung = quiet_s * 1000 >= self.hang_ms
            if ended or hung:
                upto, lost = seen[0], 0
            while read < upto:
                span = line.ring.read(upto - read)
                missing = span.start - read
                read = span.start + len(span.samples)
                captured = seen[1] - (seen[0] - read) / line.rate
                heard = self._columns(span.samples)
                reason = "overflow" if missing else None
                lacking = _at_16k(missing, line.rate)
                yield [
                    Block(track.step(samples, captured, missing), captured, lacking, reason)
                    for track, samples in zip(tracks, heard, strict=True)
                ]
            if lost:
                for track in tracks:
                    track.lose(lost)
                yield self._silent(now, _at_16k(lost, line.rate), "overflow")
            if ended or hung:
                tails = [track.flush() for track in tracks]
                if len(tails[0]):
                    yield [Block(tail, line.heard) for tail in tails]
                return

    @property
    def _streams(self) -> int:
        return self.apart or 1

    def _silent(self, at: float, lost: int, reason: GapReason) -> list[Block]:
        """No samples, for each stream."""
        return [Block(np.zeros(0, np.float32), at, lost, reason) for _ in range(self._streams)]

    def _columns(self, frames: NDArray[np.int16]) -> list[NDArray[np.float32]]:
        """frames: [n, C], as they are kept → for each stream its [n], full scale ±1"""
        heard = frames.astype(np.float32) / np.float32(32768)
        if self.apart is not None:
            return [heard[:, channel].copy() for channel in range(self.apart)]
        return [heard.mean(axis=1, dtype=np.float32)]

    async def _reopen(self, sd: Any) -> "_Line":
        while True:
            await asyncio.sleep(self.retry_ms / 1000)
            try:
                return await asyncio.to_thread(_again, sd, self)
            except SourceError:
                continue  # still away; the session already said so


async def _first(recorded: AsyncGenerator[list[Block]]) -> AsyncGenerator[Block]:
    """The blocks of a recording that is one stream."""
    async for blocks in recorded:
        yield blocks[0]


async def _pour(recorded: AsyncGenerator[list[Block]], lines: Sequence[Line]) -> None:
    """A recording → a line for each of its streams."""
    try:
        async for blocks in recorded:
            for block, line in zip(blocks, lines, strict=True):
                if block.lost and block.reason:
                    line.lose(block.lost, block.reason)
                elif block.reason:
                    line.pause(block.reason)
                line.feed(block.samples, block.captured)
    finally:
        for line in lines:
            line.end()


class Track:
    """One stream's samples of one opening, from the device's clock and rate to ours.

    Tracks that are told the same lengths and times give the same lengths.
    """

    def __init__(self, rate: int, *, correct: bool) -> None:
        self._resampler = Resampler(rate)
        self._drift = Drift(rate) if correct else None

    def step(
        self, samples: NDArray[np.float32], captured: float, missing: int
    ) -> NDArray[np.float32]:
        """samples: [n], the last one captured then, with so many missing before → [m] at 16 kHz"""
        if self._drift is not None:
            self._drift.lost(missing)
            samples = self._drift.step(samples, captured)
        return self._resampler.step(samples)

    def lose(self, samples: int) -> None:
        """So many are missing after what came."""
        if self._drift is not None:
            self._drift.lost(samples)

    def flush(self) -> NDArray[np.float32]:
        """What is held back, at the end. → [m]"""
        return self._resampler.flush()


class Continuity:
    """Tells lost samples from late ones, by the count of samples against the monotonic clock.

    A stall of the device's callback raises no flag, whether or not samples were lost in it. After a
    stall the count either catches up (nothing lost) or stays behind by what was lost; meanwhile the
    samples that follow the stall are held back. A clock that drifts is followed, not mistaken.

    Args:
        rate: Nominal samples a second.
        slack_ms: How late the count may be before it is suspect.
        patience_ms: How long it may take to catch up.
        drift: Fastest drift that is followed, as a fraction.
    """

    def __init__(
        self, rate: int, *, slack_ms: int = 100, patience_ms: int = 500, drift: float = 0.02
    ) -> None:
        self._rate = rate
        self._slack = rate * slack_ms / 1000
        self._patience_s = patience_ms / 1000
        self._drift = drift
        self._floor: float | None = None  # samples the count is behind the clock, at its best
        self._at = 0.0
        self._good = 0  # the count before it became suspect
        self._suspect: float | None = None
        self._low = 0.0

    def step(self, count: int, at: float) -> tuple[int, int]:
        """The last callback brought the count of samples to ``count``, at ``at`` (monotonic s).

        Returns:
            The samples that may be passed on, as a count from the beginning, and how many samples
            are missing right after them.
        """
        behind = at * self._rate - count
        if self._floor is None:
            self._floor = behind
        elif self._suspect is None:
            # A stall is no time in which a clock drifts.
            since = min(at - self._at, self._slack / self._rate)
            self._floor = min(behind, self._floor + self._drift * self._rate * since)
        self._at = at
        if behind - self._floor <= self._slack:
            self._suspect = None
            self._good = count
            return count, 0
        if self._suspect is None:
            self._suspect = at
            self._low = behind
        self._low = min(self._low, behind)
        if at - self._suspect < self._patience_s:
            return self._good, 0
        lost = round(self._low - self._floor)
        self._floor = self._low
        self._suspect = None
        upto, self._good = self._good, count
        return upto, lost


class _Line:
    """One opening of the device. The constructor and `close` block: call them in a thread."""

    def __init__(self, sd: Any, settings: MicrophoneSource) -> None:
        index = _find(sd, settings.device)
        self._channels = settings.opened
        first, last = 0, settings.apart or self._channels
        if settings.apart is None and settings.channel is not None:
            first, last = settings.channel, settings.channel + 1
        self._kept = slice(first, last)
        there = int(sd.query_devices(index)["max_input_channels"])
        if self._channels > there:
            raise SourceError(
                f"microphone {settings.device}: expected {self._channels} channels, "
                f"the device has {there}"
            )
        self.rate = _rate(sd, index, self._channels)
        # A frame of all that is kept is one item of the ring: [capacity, C].
        frame = np.dtype((np.int16, (last - first,)))
        self.ring = Ring(self.rate * settings.buffer_ms // 1000, frame)
        self.pulse = (0, monotonic())
        """Frames so far and when the last of them came; replaced as one, by the callback."""
        self.ended = threading.Event()
        try:
            self._stream = sd.RawInputStream(
                device=index,
                samplerate=self.rate,
                channels=self._channels,
                dtype="int16",
                blocksize=self.rate * settings.block_ms // 1000,
                callback=self._callback,
                finished_callback=self.ended.set,
            )
        except sd.PortAudioError as error:
            raise SourceError(f"microphone {settings.device}: {error}") from error
        _OPEN.add(id(self))
        try:
            self._stream.start()
        except sd.PortAudioError as error:
            self.close()
            raise SourceError(f"microphone {settings.device}: {error}") from error

    @property
    def heard(self) -> float:
        """When the last sample came (monotonic seconds)."""
        return self.pulse[1]

    def _callback(self, data: Any, frames: int, time: Any, status: Any) -> None:
        """PortAudio's thread: copy, count, return."""
        samples: NDArray[np.int16] = np.frombuffer(data, np.int16)
        self.ring.write(samples.reshape(-1, self._channels)[:, self._kept])
        self.pulse = (self.pulse[0] + frames, monotonic())

    def close(self) -> None:
        """Let the device go, hung or not; again does nothing."""
        if self._stream.closed:
            return
        self._stream.abort(ignore_errors=True)
        self._stream.close(ignore_errors=True)
        _OPEN.discard(id(self))


_OPEN: Final[set[int]] = set()
"""Lines open in this process: PortAudio may only look for new devices when there is none."""


_OPENING: Final = threading.Lock()
"""PortAudio must not be initialised again while another microphone is being opened."""


def _open(sd: Any, settings: MicrophoneSource) -> _Line:
    with _OPENING:
        return _Line(sd, settings)


def _again(sd: Any, settings: MicrophoneSource) -> _Line:
    """Open a device that may have come back.

    While another microphone of this process is open, one that was plugged in again is found only
    where the sound server keeps its name, as PulseAudio and PipeWire do.
    """
    with _OPENING:
        if not _OPEN:
            # PortAudio caches the list of devices from its initialisation.
            sd._terminate()
            sd._initialize()
        return _Line(sd, settings)


def _find(sd: Any, device: int | str | None) -> int:
    """Index of the device that is meant.

    Raises:
        SourceError: none, or several, of that name; names those there are.
    """
    try:
        info = sd.query_devices(device, "input")
    except (ValueError, sd.PortAudioError) as error:
        names = [f"{each.index}: {each.name}" for each in list_devices()]
        wanted = "no default microphone" if device is None else f"unknown microphone {device!r}"
        there = "; ".join(names) if names else "none"
        raise SourceError(f"{wanted}; expected one of these: {there}") from error
    return int(info["index"])


def _rate(sd: Any, index: int, channels: int) -> int:
    """16 kHz where the device takes it, its own rate where not."""
    try:
        sd.check_input_settings(
            device=index, channels=channels, dtype="int16", samplerate=SAMPLE_RATE
        )
    except sd.PortAudioError:
        return int(sd.query_devices(index)["default_samplerate"])
    return SAMPLE_RATE


def _at_16k(samples: int, rate: int) -> int:
    return round(samples * SAMPLE_RATE / rate)


def _sounddevice() -> Any:
    """The optional driver.

    Raises:
        SourceError: it, or the system library it needs, is missing.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise SourceError('a microphone needs sounddevice: pip install "livesat[mic]"') from error
    except OSError as error:
        raise SourceError(
            "a microphone needs PortAudio: apt-get install libportaudio2 (Debian, Ubuntu)"
        ) from error
    return sounddevice
