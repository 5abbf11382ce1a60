"""A source that is fed: the audio a server hears on one connection."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from stream.clock import SAMPLE_RATE
from stream.sources.source import Block, GapReason, SourceError


class Line:
    """One connection's audio, from the handler that receives it to the session that hears it.

    The handler either waits (`put`: a sender that is faster than the engine is slowed down, through
    the transport's own flow control) or does not (`feed`: what cannot be kept is lost, oldest
    first, and becomes a `gap`). All of it happens on the event loop.

    Args:
        name: What a subscriber reads in `session.opened`.
        buffer_ms: Audio that may wait for the session.
    """

    def __init__(self, name: str, buffer_ms: int = 10_000) -> None:
        if buffer_ms < 20:
            raise ValueError(f"buffer_ms: expected at least 20, got {buffer_ms}")
        self._name = name
        self._room = buffer_ms * SAMPLE_RATE // 1000
        self._blocks: deque[Block] = deque()  # bounded by `_room`, in samples
        self._waiting = 0
        self._ended = False
        self._failure: str | None = None
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._opened = False
        self.lost = 0
        """Samples that went into gaps."""

    @property
    def live(self) -> bool:
        """See `Source.live`."""
        return True

    @property
    def ended(self) -> bool:
        """Whether there will be no more audio."""
        return self._ended

    @property
    def name(self) -> str:
        """For `session.opened`."""
        return self._name

    @property
    def waiting(self) -> int:
        """Samples the session has not taken yet."""
        return self._waiting

    def feed(
        self, samples: NDArray[np.float32], captured: float | None = None, position: int = 0
    ) -> None:
        """samples: [n] float32, mono, 16 kHz; older ones are lost if there is no room for them."""
        if self._ended or not len(samples):
            return
        at = monotonic() if captured is None else captured
        self._append(Block(samples, at, position=position))
        while self._waiting > self._room:
            oldest = self._blocks.popleft()
            self._waiting -= len(oldest.samples)
            gone = oldest.lost + len(oldest.samples)
            self.lost += len(oldest.samples)
            if not self._blocks:
                self._blocks.append(replace(oldest, samples=np.zeros(0, np.float32), lost=gone))
                break
            heir = self._blocks[0]
            self._blocks[0] = replace(heir, lost=heir.lost + gone, reason=heir.reason or "overflow")

    async def put(self, samples: NDArray[np.float32], position: int = 0) -> None:
        """The same, then wait until there is room again: nothing is lost, nor if it is cancelled.

        The samples are in before the wait, so that those of a later call never overtake them.
        """
        if self._ended or not len(samples):
            return
        self._append(Block(samples, monotonic(), position=position))
        while self._waiting >= self._room and not self._ended:
            self._taken.clear()
            await self._taken.wait()

    def add(self, samples: NDArray[np.float32], position: int = 0) -> None:
        """The few that a resampler held back: room or not, they displace nothing."""
        if not self._ended and len(samples):
            self._append(Block(samples, monotonic(), position=position))

    def lose(self, lost: int, reason: GapReason) -> None:
        """``lost`` samples are missing before the next ones."""
        if lost > 0 and not self._ended:
            self.lost += lost
            self._append(Block(np.zeros(0, np.float32), monotonic(), lost, reason))

    def pause(self, reason: GapReason) -> None:
        """The audio has stopped for a time nobody knows: what was heard must not wait for more."""
        if not self._ended:
            self._append(Block(np.zeros(0, np.float32), monotonic(), 0, reason))

    def flush(self, done: Callable[[], None]) -> None:
        """Bring out all that was heard so far, as at the end; ``done`` is called when it has."""
        if not self._ended:
            self._append(Block(np.zeros(0, np.float32), monotonic(), flushed=done))

    def end(self) -> None:
        """There will be no more audio."""
        self._ended = True
        self._arrived.set()
        self._taken.set()

    def fail(self, message: str) -> None:
        """It broke: the session ends with an error after what has been fed."""
        self._failure = message
        self.end()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """The blocks, in order, until `end`.

        Raises:
            SourceError: while iterating, what `fail` was told.
        """
        assert not self._opened, "a line is heard by one session"
        self._opened = True
        blocks = self._hear()
        try:
            yield blocks
        finally:
            self.end()
            await blocks.aclose()

    async def _hear(self) -> AsyncGenerator[Block]:
        while True:
            while self._blocks:
                block = self._blocks.popleft()
                self._waiting -= len(block.samples)
                self._taken.set()
                yield block
            if self._ended:
                break
            self._arrived.clear()
            await self._arrived.wait()
        if self._failure is not None:
            raise SourceError(self._failure)

    def _append(self, block: Block) -> None:
        self._blocks.append(block)
        self._waiting += len(block.samples)
        self._arrived.set()
