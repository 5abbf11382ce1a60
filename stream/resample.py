"""Any sample rate → 16 kHz, block by block, with every sample accounted for."""

from typing import Final

import numpy as np
import soxr
from numpy.typing import NDArray

from stream.clock import SAMPLE_RATE

_REACH_S: Final = 0.002
"""How far around a non-finite sample the filter would have carried it: it is marked this wide."""


class Resampler:
    """One mono stream at ``rate`` → 16 kHz (soxr, high quality).

    Output sample ``k`` is the signal at ``k / 16000`` s: soxr removes its own delay, it only holds
    back about 20 ms (50 ms below 16 kHz) that `flush` gives out. N samples in are
    ``round(N · 16000 / rate)`` samples out, and the blocks' lengths change no bit of them.

    A non-finite sample would poison the filter's whole block, so it enters as zero and the output
    samples it stands for leave as NaN: who reads the stream sees exactly the spoilt span.

    Args:
        rate: Samples a second of the input; at 16,000 blocks pass through untouched.
    """

    def __init__(self, rate: int) -> None:
        if rate < 1:
            raise ValueError(f"rate: expected a positive number of samples a second, got {rate}")
        self.rate = rate
        self.taken = 0
        """Input samples so far."""
        self.given = 0
        """Output samples so far."""
        self._spoilt: list[tuple[int, int]] = []  # output spans to mark, oldest first
        self._soxr = (
            None
            if rate == SAMPLE_RATE
            else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        )

    def step(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """samples: [n] at ``rate`` → [m] at 16 kHz, m ≥ 0."""
        return self._run(samples, last=False)

    def flush(self) -> NDArray[np.float32]:
        """The samples held back: call once, at the end of the stream. → [m]."""
        return self._run(np.zeros(0, np.float32), last=True)

    def _run(self, samples: NDArray[np.float32], *, last: bool) -> NDArray[np.float32]:
        if self._soxr is None:
            self.taken += len(samples)
            self.given += len(samples)
            return samples
        bad = np.flatnonzero(~np.isfinite(samples))
        if len(bad):
            samples = samples.copy()
            samples[bad] = 0.0
            self._mark(bad + self.taken)
        self.taken += len(samples)
        out = np.asarray(self._soxr.resample_chunk(samples, last=last), np.float32)
        start = self.given
        self.given += len(out)
        while self._spoilt and self._spoilt[0][0] < self.given:
            begin, end = self._spoilt[0]
            out[max(begin - start, 0) : end - start] = np.nan
            if end > self.given:
                break  # the rest of the span is in the next block
            self._spoilt.pop(0)
        return out

    def _mark(self, bad: NDArray[np.intp]) -> None:
        """bad: [k] input indices → their output spans, joined where they touch."""
        scale = SAMPLE_RATE / self.rate
        reach = max(round(_REACH_S * SAMPLE_RATE), 1)
        runs = np.split(bad, np.flatnonzero(np.diff(bad) > 1) + 1)
        for run in runs:
            # Output already given cannot be marked; soxr holds back more than `reach`.
            begin = max(int(run[0] * scale) - reach, self.given)
            end = int(run[-1] * scale) + reach + 1
            if self._spoilt and begin <= self._spoilt[-1][1]:
                self._spoilt[-1] = (self._spoilt[-1][0], max(end, self._spoilt[-1][1]))
            else:
                self._spoilt.append((begin, end))
