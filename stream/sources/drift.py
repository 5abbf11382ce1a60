"""A device's clock against ours: its samples are stretched until both tell the same time."""

from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

WINDOW_S: Final = 20.0
"""Pulses of the last seconds; the earliest of them, for its count, tells how late the device is."""

BEGINNING_S: Final = 2.0
"""Pulses that tell when the stream began: enough for an early one, too few for a drift."""

SLACK_S: Final = 0.005
"""An error up to this is left alone: scheduling makes as much."""

FASTEST: Final = 0.002
"""Share of a block that is added or taken at most: four times the drift of a bad crystal."""

_PER_S: Final = 4
"""Pulses kept a second: more say nothing more."""


class Drift:
    """How many samples a block must grow or shrink by, so that the count keeps to the clock.

    A block arrives late but never early, so among many the earliest, for the samples it completes,
    shows the device's own time. Sans-I/O: the caller says what time it is.

    Args:
        rate: Nominal samples a second.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._count = 0  # samples the device gave
        self._given = 0  # samples that left here
        self._origin: float | None = None  # the clock at sample 0, by the first pulses
        self._pulses: deque[tuple[float, float]] = deque()  # (at, at − count / rate)
        self._began = 0.0
        self._settled = False

    @property
    def given(self) -> int:
        """Samples that left."""
        return self._given

    def step(self, samples: NDArray[np.float32], at: float) -> NDArray[np.float32]:
        """A block whose last sample came at ``at`` (monotonic s) → the block as it should be.

        samples: [n] → [n + k], |k| at most `FASTEST` of n and at least one where it is due.
        """
        self._count += len(samples)
        wanted = self._due(at, len(samples))
        if not wanted or len(samples) < 2:
            self._given += len(samples)
            return samples
        n = len(samples) + wanted
        self._given += n
        positions = np.linspace(0, len(samples) - 1, n)
        return np.interp(positions, np.arange(len(samples)), samples).astype(np.float32)

    def lost(self, samples: int) -> None:
        """So many samples went into a gap: they are accounted for."""
        self._count += samples
        self._given += samples

    def _due(self, at: float, n: int) -> int:
        start = at - self._count / self._rate
        if not self._pulses or at - self._pulses[-1][0] >= 1 / _PER_S:
            self._pulses.append((at, start))
        while at - self._pulses[0][0] > WINDOW_S:
            self._pulses.popleft()
            self._settled = True
        if self._origin is None:
            self._origin, self._began = start, at
        if at - self._began < BEGINNING_S:
            self._origin = min(self._origin, start)
        if not self._settled:
            return 0
        device = min(each for _, each in self._pulses)
        # Seconds by which what left is shorter than the time that passed.
        behind_s = device - self._origin + (self._count - n - self._given) / self._rate
        if abs(behind_s) <= SLACK_S:
            return 0
        most = max(int(n * FASTEST), 1)
        return int(np.clip(round(behind_s * self._rate), -most, most))
