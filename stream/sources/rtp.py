"""RTP on a UDP port: L16, G.711 μ-law and A-law, Opus, behind a bounded jitter buffer.

The timeline is the sender's own: sample i of the stream is RTP timestamp t0 + i. What has not come
when its time is up, or came damaged, is lost, exactly as long as it was, and said so; what comes
later still is dropped. What comes between the audio under another payload type (comfort noise, key
presses) is no audio: where it stands instead of some, that is lost. Source: RFC 3550, RFC 3551
(payload types), RFC 3389 (comfort noise), RFC 4733 (key presses), RFC 7587 (Opus).
"""

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Literal, Self

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.apart import alongside, sharing
from stream.sources.line import Line
from stream.sources.pcm import PcmDecoder
from stream.sources.source import Block, Source, SourceError

log = structlog.get_logger(__name__)

Payload = Literal["l16", "mulaw", "alaw", "opus"]

_HEADER: Final = struct.Struct("!BBHII")
_JUMP_S: Final = 30.0
"""A timestamp this far from the expected one is a sender that began anew, not a loss."""

_LONGEST: Final = 5760
"""Timestamps of an Opus packet at most, 120 ms: RFC 6716, section 3.4, rule 5."""

_SILENT_S: Final = 2.0
"""After this long without a packet another sender may take the port."""

_COMFORT_NOISE: Final = 13
"""A payload type that is no audio, whatever comes first: a stream may begin in silence."""

_MISTAKEN: Final = 500
"""So many packets of another type in a row are the audio: the type that is kept was of a key press
that came first, or the sender has changed it."""


class RtpSource(BaseModel):
    """A UDP port that takes one sender's RTP, without authentication: loopback unless told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rtp"] = "rtp"
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(ge=0, le=65535)
    payload: Payload = Field(default="l16", description="How the audio is encoded.")
    rate: int | None = Field(
        default=None,
        ge=8000,
        le=192_000,
        description="RTP clock; null is 8000 for G.711, 48000 for Opus, 44100 for L16.",
    )
    channels: int = Field(
        default=1, ge=1, le=8, description="Of L16; Opus always has two, G.711 one."
    )
    channel: int | None = Field(
        default=None, ge=0, le=7, description="The channel that is heard; null is their mean."
    )
    apart: int | None = Field(
        default=None, ge=1, le=8, description="That many channels become streams of their own."
    )
    jitter_ms: int = Field(
        default=100, ge=0, le=5000, description="How long a packet that is missing is waited for."
    )
    hang_ms: int = Field(
        default=1000, ge=100, description="Silence that counts as an interruption."
    )
    buffer_ms: int = Field(
        default=10_000, ge=500, description="Audio that may wait for the engine."
    )

    @model_validator(mode="after")
    def _channels_there_are(self) -> Self:
        there = {"l16": self.channels, "opus": 2}.get(self.payload, 1)
        if self.channels > there:
            raise ValueError(f"channels: expected {there} of {self.payload}, got {self.channels}")
        if self.channel is not None and self.channel >= there:
            raise ValueError(f"channel: expected 0 to {there - 1}, got {self.channel}")
        if self.apart is not None and self.apart > there:
            raise ValueError(f"apart: expected {there} at most, got {self.apart}")
        return self

    @property
    def name(self) -> str:
        """For `session.opened`."""
        return f"rtp:{self.host}:{self.port}"

    @property
    def live(self) -> bool:
        """See `Source.live`."""
        return True

    @property
    def clock(self) -> int:
        """Timestamps a second."""
        usual = {"l16": 44_100, "mulaw": 8000, "alaw": 8000, "opus": 48_000}
        return self.rate or usual[self.payload]

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """Listen → blocks, until closed.

        Raises:
            SourceError: the port is taken, or Opus is asked for and PyAV is not installed.
        """
        line = Line(self.name, self.buffer_ms)
        async with _listening(self, [line]), line.open() as blocks:
            yield blocks

    def split(self) -> list[Source]:
        """One source a channel; the port is that of all of them."""
        assert self.apart is not None
        lines = [Line(self.name, self.buffer_ms) for _ in range(self.apart)]
        return sharing(lines, lambda: _listening(self, lines), live=self.live)


@asynccontextmanager
async def _listening(settings: RtpSource, lines: Sequence[Line]) -> AsyncGenerator[None]:
    """Feed what comes in on the port to the lines: one, or one a channel.

    Raises:
        SourceError: as `RtpSource.open`.
    """
    port = _Port(settings, lines, await asyncio.to_thread(decoder, settings))
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: port, local_addr=(settings.host, settings.port)
        )
    except OSError as error:
        raise SourceError(
            f"rtp {settings.host}:{settings.port}: cannot listen ({error.strerror or error})"
        ) from error
    address = transport.get_extra_info("sockname")
    log.info("listening", kind="rtp", host=address[0], port=address[1])
    try:
        async with alongside(port.run(), f"rtp:{settings.port}"):
            yield
    finally:
        transport.close()


@dataclass(frozen=True, slots=True)
class Packet:
    """An RTP packet.

    Attributes:
        ssrc: Who sends.
        seq: 16 bits.
        timestamp: 32 bits, of its first sample.
        kind: The payload type.
        payload: The audio.
    """

    ssrc: int
    seq: int
    timestamp: int
    kind: int
    payload: bytes

    @classmethod
    def parse(cls, data: bytes) -> "Packet | None":
        """A datagram → the packet, or None if it is no RTP of version 2."""
        if len(data) < _HEADER.size:
            return None
        first, second, seq, timestamp, ssrc = _HEADER.unpack_from(data)
        kind = second & 0x7F
        if first >> 6 != 2 or 72 <= kind <= 76:  # RTCP on the same port
            return None
        start = _HEADER.size + 4 * (first & 15)
        if first & 16:
            if len(data) < start + 4:
                return None
            start += 4 + 4 * int.from_bytes(data[start + 2 : start + 4], "big")
        end = len(data)
        if first & 32:
            end -= data[-1]
        if end < start:
            return None
        return cls(ssrc, seq, timestamp, kind, data[start:end])


@dataclass(frozen=True, slots=True)
class Heard:
    """Audio in order."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """So many timestamps will not come."""

    timestamps: int


@dataclass(slots=True)
class Jitter:
    """Packets in any order → the timeline they tell; sans-I/O.

    A packet whose turn it is leaves at once. One that has to wait for another does so for
    ``depth_s``; then what is before it is lost. The buffer holds ``room`` packets: when it is full
    the oldest leaves as if its time were up.

    Attributes:
        rate: Timestamps a second.
        depth_s: How long a missing packet is waited for.
        room: Packets that may wait.
        counts: late, duplicate, foreign, restart, damaged, other (of another payload type): packets
            that were not heard, and why.
    """

    rate: int
    depth_s: float
    room: int = 512
    counts: Counter[str] = field(default_factory=Counter[str])
    _ssrc: int | None = None
    _kind: int | None = None  # the payload type of its audio
    _others: int = 0  # packets of another one, in a row
    _next: int | None = None  # unwrapped timestamp that comes next
    _last: float = 0.0  # when the last packet of ours came
    _present: float = 0.0  # the same, or one that was no audio: who sends it is there
    _waiting: dict[int, tuple[float, Packet]] = field(
        default_factory=dict[int, tuple[float, Packet]]
    )
    _lengths: dict[int, int] = field(default_factory=dict[int, int])

    def takes(self, packet: Packet, now: float) -> bool:
        """Whether a packet that arrives is audio, for `push`; others are counted.

        The payload type of a stream's first packet is that of its audio. The others need no place
        on the timeline: the timestamps of the audio around them tell what they displaced.
        """
        ours = packet.ssrc == self._ssrc
        if packet.kind != _COMFORT_NOISE and (not ours or packet.kind == self._kind):
            return True
        self.counts["other"] += 1
        if ours:
            self._present = now
        if not ours or packet.kind == _COMFORT_NOISE:
            return False
        self._others += 1
        if self._others < _MISTAKEN:
            return False
        self._kind = packet.kind
        return True

    def push(self, packet: Packet, length: int, now: float) -> list[Heard | Lost]:
        """A packet of audio of ``length`` timestamps arrives → what is certain by now."""
        if self._ssrc is not None and packet.ssrc != self._ssrc:
            if now - self._present < _SILENT_S:
                self.counts["foreign"] += 1
                return []
            return [*self._begin(now), *self.push(packet, length, now)]
        self._ssrc, self._kind = packet.ssrc, packet.kind
        if self._next is None:
            self._next = packet.timestamp
        at = self._unwrapped(packet.timestamp)
        if abs(at - self._next) > _JUMP_S * self.rate:
            self.counts["restart"] += 1
            return [*self._begin(now), *self.push(packet, length, now)]
        self._last = self._present = now
        self._others = 0
        if at in self._waiting:
            self.counts["duplicate"] += 1
            return []
        if at < self._next:
            self.counts["late"] += 1
            return []
        self._waiting[at] = now, packet
        self._lengths[at] = length
        return self.due(now)

    def due(self, now: float) -> list[Heard | Lost]:
        """What is certain at this time."""
        told: list[Heard | Lost] = []
        while self._waiting and self._next is not None:
            at = min(self._waiting)
            came, packet = self._waiting[at]
            if at > self._next:
                if now - came < self.depth_s and len(self._waiting) < self.room:
                    break
                told.append(Lost(at - self._next))
            del self._waiting[at]
            told.append(Heard(packet.payload))
            self._next = at + self._lengths.pop(at)
        return told

    def flush(self) -> list[Heard | Lost]:
        """Everything that waits, with what is missing between."""
        return self.due(float("inf"))

    def _begin(self, now: float) -> list[Heard | Lost]:
        """Another timeline begins: what waits leaves, the silence between is lost by the clock."""
        told = self.flush()
        gone = max(now - self._last, 0.0)
        self._ssrc, self._kind, self._next = None, None, None
        lost = round(gone * self.rate)
        self._last = now
        return [*told, Lost(lost)] if lost else told

    def _unwrapped(self, timestamp: int) -> int:
        assert self._next is not None
        difference = (timestamp - self._next) & 0xFFFFFFFF
        if difference >= 1 << 31:
            difference -= 1 << 32
        return self._next + difference


class Damaged(ValueError):
    """A payload that cannot be decoded."""


class Decoder:
    """Payloads of one kind → samples at the RTP clock's rate, float32, a column a channel."""

    def length(self, payload: bytes) -> int:
        """Timestamps of a payload; 0 of one that does not tell."""
        raise NotImplementedError

    def decode(self, payload: bytes) -> NDArray[np.float32]:
        """→ [n, C], n the payload's length

        Raises:
            Damaged: it cannot be decoded; the next one can.
        """
        raise NotImplementedError


class _Linear(Decoder):
    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._width = 2 * channels

    def length(self, payload: bytes) -> int:
        return len(payload) // self._width

    def decode(self, payload: bytes) -> NDArray[np.float32]:
        whole = payload[: len(payload) // self._width * self._width]
        frames = np.frombuffer(whole, ">i2").reshape(-1, self._channels)
        return frames.astype(np.float32) / np.float32(32768)


class _Companded(Decoder):
    def __init__(self, table: NDArray[np.float32]) -> None:
        self._table = table

    def length(self, payload: bytes) -> int:
        return len(payload)

    def decode(self, payload: bytes) -> NDArray[np.float32]:
        return self._table[np.frombuffer(payload, np.uint8)][:, None]


class _Opus(Decoder):
    def __init__(self) -> None:
        import av
        import av.error

        self._codec: Any = av.CodecContext.create("opus", "r")
        self._codec.sample_rate = 48_000
        self._codec.layout = "stereo"  # of a packet with one channel both are that
        self._av = av

    def length(self, payload: bytes) -> int:
        """By the table of contents: RFC 6716, section 3.1; 0 where it breaks the standard."""
        if not payload:
            return 0
        config, code = payload[0] >> 3, payload[0] & 3
        if config < 12:
            frame = (480, 960, 1920, 2880)[config & 3]
        elif config < 16:
            frame = (480, 960)[config & 1]
        else:
            frame = (120, 240, 480, 960)[config & 3]
        count = (1, 2, 2, payload[1] & 63 if len(payload) > 1 else 0)[code]
        return frame * count if frame * count <= _LONGEST else 0

    def decode(self, payload: bytes) -> NDArray[np.float32]:
        try:
            frames: list[Any] = self._codec.decode(self._av.Packet(payload))
        except self._av.error.FFmpegError as error:
            raise Damaged(str(error)) from error
        parts = [np.asarray(frame.to_ndarray(), np.float32).T for frame in frames]
        made = np.concatenate(parts) if parts else np.zeros((0, 2), np.float32)
        wanted = self.length(payload)  # the decoder may hold back or pad: time stays true
        return np.pad(made, ((0, max(wanted - len(made), 0)), (0, 0)))[:wanted]


def decoder(settings: RtpSource) -> Decoder:
    """The decoder of a port's payload; blocks.

    Raises:
        SourceError: Opus, and PyAV is not installed.
    """
    if settings.payload == "opus":
        try:
            return _Opus()
        except ImportError as error:
            raise SourceError("Opus needs PyAV: pip install 'livesat[av]'") from error
    if settings.payload == "l16":
        return _Linear(settings.channels)
    codes = bytes(range(256))
    if settings.payload == "mulaw":
        return _Companded(PcmDecoder("mulaw").step(codes))
    return _Companded(_alaw_table())


def _alaw_table() -> NDArray[np.float32]:
    """The 256 values of G.711 A-law, full scale ±1 (ITU-T G.711, table 1)."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = ((code >> 4) & 7).astype(np.int32), (code & 15).astype(np.int32)
    magnitude = np.where(
        exponent == 0, (mantissa << 4) + 8, ((mantissa << 4) + 0x108) << np.maximum(exponent - 1, 0)
    )
    return (np.where(code & 0x80, magnitude, -magnitude) / 32768).astype(np.float32)


class _Port(asyncio.DatagramProtocol):
    """The socket's end: packets in, lines fed."""

    def __init__(self, settings: RtpSource, lines: Sequence[Line], decoder: Decoder) -> None:
        self._settings, self._lines, self._decoder = settings, lines, decoder
        self._jitter = Jitter(settings.clock, settings.jitter_ms / 1000)
        self._resamplers = [Resampler(settings.clock) for _ in lines]
        self._timestamps = 0  # heard or lost since the port was opened
        self._told = 0  # samples at 16 kHz fed to a line, or lost to it, of those
        self._heard = monotonic()
        self._quiet = True
        self._ignored: set[int] = set()  # payload types that were mentioned

    def datagram_received(self, data: bytes, addr: Any) -> None:
        packet = Packet.parse(data)
        if packet is None or not packet.payload:
            return
        now = monotonic()
        if not self._jitter.takes(packet, now):
            self._ignore(packet.kind)
            return
        self._heard = now
        self._quiet = False
        length = self._decoder.length(packet.payload)
        if not length:  # as if it had not come: the next one tells how much is missing
            self._jitter.counts["damaged"] += 1
            return
        self._tell(self._jitter.push(packet, length, now))

    async def run(self) -> None:
        """The clock: time is up for what is missing, or the sender has gone."""
        settings = self._settings
        period = max(settings.jitter_ms / 4000, 0.01)
        while True:
            await asyncio.sleep(period)
            now = monotonic()
            self._tell(self._jitter.due(now))
            if not self._quiet and (now - self._heard) * 1000 >= settings.hang_ms:
                self._quiet = True
                self._tell(self._jitter.flush())
                self._bring_out()
                for line in self._lines:
                    line.pause("network")

    def _ignore(self, kind: int) -> None:
        if kind not in self._ignored:
            self._ignored.add(kind)
            log.info("ignored", source=self._settings.name, payload_type=kind, why="no audio")

    def _bring_out(self) -> None:
        self._feed([resampler.flush() for resampler in self._resamplers])
        self._resamplers = [Resampler(self._settings.clock) for _ in self._lines]

    def _tell(self, told: list[Heard | Lost]) -> None:
        for each in told:
            if isinstance(each, Lost):
                self._lose(each.timestamps)
                continue
            try:
                frames = self._decoder.decode(each.payload)
            except Damaged:
                self._jitter.counts["damaged"] += 1
                self._lose(self._decoder.length(each.payload))
                continue
            self._timestamps += len(frames)
            columns = zip(self._resamplers, self._columns(frames), strict=True)
            self._feed([resampler.step(samples) for resampler, samples in columns])

    def _feed(self, columns: list[NDArray[np.float32]]) -> None:
        """columns: for each line its [n], 16 kHz"""
        self._told += len(columns[0])
        for line, samples in zip(self._lines, columns, strict=True):
            line.feed(samples)

    def _lose(self, timestamps: int) -> None:
        self._bring_out()  # what the resamplers hold back is before the loss
        self._timestamps += timestamps
        # By the whole count: one loss's rounding must not add to the next one's.
        lost = round(self._timestamps * SAMPLE_RATE / self._settings.clock) - self._told
        self._told += max(lost, 0)
        for line in self._lines:
            line.lose(lost, "network")

    def _columns(self, frames: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """frames: [n, C] → for each line its [n]"""
        settings = self._settings
        if settings.apart is not None:
            return [frames[:, channel].copy() for channel in range(settings.apart)]
        if settings.channel is not None:
            return [frames[:, settings.channel].copy()]
        return [frames.mean(axis=1, dtype=np.float32)]
