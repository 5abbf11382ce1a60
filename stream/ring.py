"""A ring of samples between a device's callback and the event loop.

One thread writes, one other reads. The writer never waits: when the reader falls behind, the oldest
samples are overwritten and the reader is told how many it lost. No lock is held anywhere; the
reader finds out afterwards whether the writer overtook its copy, and gives up the torn part.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True, slots=True)
class Span:
    """A run of samples as it left the ring.

    Attributes:
        start: Index of ``samples[0]``, counted from the first sample ever written, losses included.
        samples: [n], a copy.
        lost: Samples missing right before ``start``.
    """

    start: int
    samples: NDArray[Any]
    lost: int


class Ring:
    """Single producer, single consumer, newest audio wins.

    Args:
        capacity: Samples it holds.
        dtype: Type of a sample: ``int16`` as devices give it, or ``float32``.
    """

    def __init__(self, capacity: int, dtype: DTypeLike = np.float32) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 sample, got {capacity}")
        self.capacity = capacity
        self.lost = 0
        """Samples the reader was told it lost."""
        self._samples = np.zeros(capacity, dtype)
        # Positions count samples stored, so they leave out what `skip` declared.
        self._claimed = 0  # writer: end of the span being copied in; set before the copy
        self._end = 0  # writer: end of what is complete; set after the copy
        self._skips: deque[tuple[int, int]] = deque()  # (position, samples missing there)
        self._read = 0  # reader: next position
        self._index = 0  # reader: absolute index of the next sample

    def write(self, samples: NDArray[Any]) -> None:
        """Copy ``samples`` [n] in; safe in an audio callback (no lock, no wait, no log).

        More samples than the ring holds leave only the newest.
        """
        n = len(samples)
        end = self._end + n
        # Everything older than `_claimed - capacity` is being overwritten from here on.
        self._claimed = end
        if n > self.capacity:
            samples = samples[n - self.capacity :]
        at = (end - len(samples)) % self.capacity
        head = min(len(samples), self.capacity - at)
        self._samples[at : at + head] = samples[:head]
        self._samples[: len(samples) - head] = samples[head:]
        self._end = end

    def skip(self, lost: int) -> None:
        """Writer: declare that the device dropped ``lost`` samples after the last write."""
        if lost > 0:
            self._skips.append((self._end, lost))

    def __len__(self) -> int:
        """Samples that wait to be read."""
        return min(self._end - self._read, self.capacity)

    def read(self, limit: int | None = None) -> Span:
        """The oldest samples not yet read, at most ``limit`` of them.

        A span ends where the device dropped samples, so a loss always precedes its span. Nothing
        new gives an empty span with ``lost`` 0.
        """
        end = self._end
        begin = max(self._read, end - self.capacity)
        lost = begin - self._read
        while self._skips and self._skips[0][0] <= begin:
            lost += self._skips.popleft()[1]
        stop = end if limit is None else min(end, begin + limit)
        if self._skips:
            stop = min(stop, self._skips[0][0])
        at = begin % self.capacity
        n = stop - begin
        samples = self._samples[at : at + n].copy()
        if len(samples) < n:
            samples = np.concatenate([samples, self._samples[: n - len(samples)]])
        # The writer may have overtaken the copy: what it claimed since is torn.
        torn = min(max(self._claimed - self.capacity - begin, 0), n)
        lost += torn
        samples = samples[torn:]
        start = self._index + lost
        self._read = stop
        self._index = start + len(samples)
        self.lost += lost
        return Span(start, samples, lost)
