"""A source that is fed: the audio a server hears on one connection."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
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
    def name(self) -> str:
        """For `session.opened`."""
        return self._name

    @property
    def waiting(self) -> int:
        """Samples the session has not taken yet."""
        return self._waiting

    def feed(self, samples: NDArray[np.float32], captured: float | None = None) -> None:
        """samples: [n] float32, mono, 16 kHz; older ones are lost if there is no room for them."""
        if self._ended or not len(samples):
            return
        self._append(Block(samples, monotonic() if captured is None else captured))
        while self._waiting > self._room:
            oldest = self._blocks.popleft()
            self._waiting -= len(oldest.samples)
            gone = oldest.lost + len(oldest.samples)
            self.lost += len(oldest.samples)
            if not self._blocks:
                self._blocks.append(Block(np.zeros(0, np.float32), oldest.captured, gone))
                break
            heir = self._blocks[0]
            self._blocks[0] = Block(
                heir.samples, heir.captured, heir.lost + gone, heir.reason or "overflow"
            )

    async def put(self, samples: NDArray[np.float32]) -> None:
        """The same, but waits until there is room: nothing is lost."""
        while self._waiting >= self._room and not self._ended:
            self._taken.clear()
            await self._taken.wait()
        if not self._ended and len(samples):
            self._append(Block(samples, monotonic()))

    def lose(self, lost: int, reason: GapReason) -> None:
        """``lost`` samples are missing before the next ones."""
        if lost > 0 and not self._ended:
            self.lost += lost
            self._append(Block(np.zeros(0, np.float32), monotonic(), lost, reason))

    def pause(self, reason: GapReason) -> None:
        """The audio has stopped for a time nobody knows: what was heard must not wait for more."""
        if not self._ended:
            self._append(Block(np.zeros(0, np.float32), monotonic(), 0, reason))

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
