"""Samples in packets of any size → chunks of one size, on a timeline that never shifts.

Sans-I/O. A *segment* is a run of audio without a long hole; the encoder starts afresh with each.
Segments begin on the frame grid (a multiple of 320 samples of the stream's clock).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stream.clock import HOP

FILL_MS: Final = 500
"""A hole up to this long is filled with zeros, a longer one ends the segment."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one encoder step takes.

    Attributes:
        start: Stream-clock sample of ``samples[0]``; a multiple of 320.
        samples: [chunk], zeros after ``valid``.
        valid: Samples that are audio; fewer than [chunk] where the segment ends, 0 in the steps
            after it that only bring out the frames still under way.
        first: The segment begins here: the encoder forgets what it heard before.
        last: The segment's last frame comes out with this chunk.
    """

    start: int
    samples: NDArray[np.float32]
    valid: int
    first: bool
    last: bool


@dataclass
class ChunkerState:
    """Where a chunker is; samples of the stream's clock.

    Attributes:
        position: The next sample.
        open: A segment is under way.
        start: Where the next chunk begins.
        origin: Where the segment began.
        held: [n] samples that wait for their chunk.
    """

    position: int
    open: bool
    start: int
    origin: int
    held: NDArray[np.float32]


class Chunker:
    """Cut a stream into chunks; the packets' sizes change nothing.

    Gap policy: a hole of at most ``fill`` samples is filled with zeros, so that a short loss costs
    neither context nor time. A longer one ends the segment: what was heard is flushed, and the next
    sample opens a new segment at its true time, rounded down to the frame grid with fewer than 320
    zeros. Either way sample i of the device is sample i of the stream's clock.

    Args:
        chunk: Samples a chunk, a multiple of 320.
        tail: Frames that leave the encoder later than the chunk that completes them (look-ahead,
            head context); the flush at the end of a segment brings them out.
        receptive: Samples the first frame needs.
        fill: Longest hole, in samples, that is filled.
    """

    def __init__(self, chunk: int, tail: int, *, receptive: int = 400, fill: int = 8000) -> None:
        if chunk < HOP or chunk % HOP:
            raise ValueError(f"chunk: expected a positive multiple of {HOP} samples, got {chunk}")
        if fill < HOP:
            # A new segment may begin up to 319 samples before its audio: the hole must be longer.
            raise ValueError(f"fill: expected at least {HOP} samples, got {fill}")
        self.chunk = chunk
        self.tail = tail
        self.receptive = receptive
        self.fill = fill
        self.position = 0
        """Stream-clock sample that comes next."""
        self._open = False  # a segment is under way
        self._start = 0  # where the next chunk begins
        self._origin = 0  # where the segment began
        self._held = 0  # samples in `_buffer`
        self._buffer = np.zeros(chunk, np.float32)

    def feed(self, samples: NDArray[np.float32]) -> list[Chunk]:
        """samples: [n], any n → the chunks they complete."""
        if samples.ndim != 1:
            raise ValueError(f"expected samples [n], got {samples.shape}")
        if not len(samples):
            return []
        if not self._open:
            self._begin()
        chunks: list[Chunk] = []
        taken = 0
        while taken < len(samples):
            n = min(self.chunk - self._held, len(samples) - taken)
            self._buffer[self._held : self._held + n] = samples[taken : taken + n]
            self._held += n
            taken += n
            if self._held == self.chunk:
                chunks.append(self._emit(self.chunk, last=False))
        self.position += taken
        return chunks

    def gap(self, lost: int) -> list[Chunk]:
        """``lost`` samples do not exist: fill the hole, or end the segment and move on."""
        if lost < 0:
            raise ValueError(f"lost: expected 0 or more samples, got {lost}")
        if self._open and lost <= self.fill:
            return self.feed(np.zeros(lost, np.float32))
        chunks = self.end()
        self.position += lost
        return chunks

    def end(self) -> list[Chunk]:
        """End the segment → the rest of its audio and the steps that flush the encoder.

        The last one is marked ``last``. Nothing, when no segment is open. More audio may follow; it
        opens a new segment.
        """
        if not self._open:
            return []
        self._open = False
        heard = self._start + self._held - self._origin
        frames = max(0, (heard - self.receptive) // HOP + 1)
        done = (self._start - self._origin) // self.chunk
        # At least one more step, always: only `valid < chunk` tells the encoder of the end.
        steps = max(-(-(frames + self.tail) * HOP // self.chunk), done + 1)
        return [
            self._emit(self._held, last=index == steps - done - 1) for index in range(steps - done)
        ]

    def state(self) -> ChunkerState:
        """Where it is, for `restore`."""
        held = self._buffer[: self._held].copy()
        return ChunkerState(self.position, self._open, self._start, self._origin, held)

    def restore(self, state: ChunkerState) -> None:
        """Go on where the chunker that gave this `state` was.

        Raises:
            ValueError: it cut chunks of another size.
        """
        if state.held.ndim != 1 or len(state.held) >= self.chunk:
            raise ValueError(f"expected [n < {self.chunk}] held samples, got {state.held.shape}")
        self.position, self._open = state.position, state.open
        self._start, self._origin, self._held = state.start, state.origin, len(state.held)
        self._buffer[: self._held] = state.held

    def _begin(self) -> None:
        self._open = True
        self._origin = self._start = self.position // HOP * HOP
        self._held = self.position - self._origin
        self._buffer[: self._held] = 0.0

    def _emit(self, valid: int, *, last: bool) -> Chunk:
        samples = self._buffer.copy()
        samples[valid:] = 0.0
        chunk = Chunk(self._start, samples, valid, self._start == self._origin, last)
        self._start += self.chunk
        self._held = 0
        return chunk
