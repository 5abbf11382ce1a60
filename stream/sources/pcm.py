"""Raw samples on a wire → mono float32: what network sources have in common."""

from dataclasses import asdict, dataclass
from typing import Final, Literal
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler

PcmFormat = Literal["s16le", "f32le", "mulaw"]

BYTES: Final[dict[PcmFormat, int]] = {"s16le": 2, "f32le": 4, "mulaw": 1}
"""Bytes of one sample of one channel."""


def _mulaw_table() -> NDArray[np.float32]:
    """The 256 values of G.711 μ-law, full scale ±1 (ITU-T G.711, table 2)."""
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = ((mantissa.astype(np.int32) * 2 + 33) << exponent) - 33
    signed = np.where(code & 0x80, -magnitude, magnitude)
    return (signed / 8192).astype(np.float32)


_MULAW: Final = _mulaw_table()


class PcmDecoder:
    """Bytes in packets of any size → samples; a sample cut in two waits for its other half.

    Args:
        form: Encoding of a sample.
        channels: Interleaved channels.
        channel: Which of them to hear; None is their mean.

    Raises:
        ValueError: no such channel.
    """

    def __init__(self, form: PcmFormat, channels: int = 1, channel: int | None = None) -> None:
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if channel is not None and not 0 <= channel < channels:
            raise ValueError(f"channel: expected 0…{channels - 1}, got {channel}")
        self._form: PcmFormat = form
        self._channels = channels
        self._channel = channel
        self._frame = BYTES[form] * channels
        self._rest = b""

    @property
    def odd(self) -> int:
        """Bytes of a frame that is not complete; more than 0 at the end is a sender's mistake."""
        return len(self._rest)

    def step(self, data: bytes) -> NDArray[np.float32]:
        """data: any number of bytes → [n] float32, full scale ±1."""
        data = self._rest + data
        whole = len(data) // self._frame * self._frame
        self._rest = data[whole:]
        if self._form == "mulaw":
            samples = _MULAW[np.frombuffer(data[:whole], np.uint8)]
        elif self._form == "s16le":
            samples = np.frombuffer(data[:whole], "<i2").astype(np.float32) / np.float32(32768)
        else:
            samples = np.frombuffer(data[:whole], "<f4").astype(np.float32)
        if self._channels == 1:
            return samples
        frames = samples.reshape(-1, self._channels)
        if self._channel is not None:
            return np.ascontiguousarray(frames[:, self._channel])
        return frames.mean(axis=1, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Form:
    """Raw PCM as a caller announces it.

    Attributes:
        encoding: Of a sample.
        rate: Samples a second of each channel.
        channels: Interleaved.
        channel: Which of them is heard; None is their mean.
    """

    encoding: PcmFormat = "s16le"
    rate: int = SAMPLE_RATE
    channels: int = 1
    channel: int | None = None

    @property
    def stated(self) -> str:
        """As the query of a URL: what is kept for a caller that comes back."""
        return urlencode({key: value for key, value in asdict(self).items() if value is not None})

    @property
    def second(self) -> int:
        """Bytes of a second of it."""
        return BYTES[self.encoding] * self.channels * self.rate


class PcmEar:
    """Raw PCM → 16 kHz mono, counting the caller's own samples.

    Attributes:
        taken: Sample frames of the caller's that were heard or skipped over.
    """

    def __init__(self, form: Form, taken: int = 0) -> None:
        self.form = form
        self.taken = taken
        self._missed = taken  # frames of `taken` that this resampler never saw
        self._skip = 0
        self._decoder = PcmDecoder(form.encoding, form.channels, form.channel)
        self._resampler = Resampler(form.rate)

    def hear(self, data: bytes) -> NDArray[np.float32]:
        """data: any number of bytes → [n] float32, mono, 16 kHz."""
        samples = self._decoder.step(data)
        if self._skip:
            again = min(self._skip, len(samples))
            samples = samples[again:]
            self._skip -= again
        self.taken += len(samples)
        return self._resampler.step(samples)

    @property
    def position(self) -> int:
        """The caller's sample frames that have left the resampler: those it would lose stay out."""
        return self._missed + self._resampler.given * self.form.rate // SAMPLE_RATE

    def rest(self) -> NDArray[np.float32]:
        """What the resampler held back, at the end of the audio."""
        return self._resampler.flush()

    def reconnect(self, offset: int) -> int:
        """The next byte is the caller's sample frame ``offset``.

        Where some are missing, take the `rest` before: it belongs before them.

        Returns:
            Samples (16 kHz) that are missing before it; frames that were heard already are skipped
            as they come.
        """
        # Half a sample may have arrived when the connection broke.
        self._decoder = PcmDecoder(self.form.encoding, self.form.channels, self.form.channel)
        self._skip = max(self.taken - offset, 0)
        missing = max(offset - self.taken, 0)
        if missing:
            self.taken += missing
            self._missed = self.taken
            self._resampler = Resampler(self.form.rate)
        return round(missing * SAMPLE_RATE / self.form.rate)
