"""Raw samples on a wire → mono float32: what network sources have in common."""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

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
