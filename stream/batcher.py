"""Ready chunks of many sessions → one batch: a pure policy, then the task that applies it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from stream.tracks.frames import Frames


@dataclass(frozen=True, slots=True)
class Ready:
    """One chunk that waits for the encoder.

    Attributes:
        slot: Whose encoder state it continues.
        start: Stream-clock sample of ``samples[0]``.
        samples: [chunk] float32.
        valid: Samples that are audio; the rest is padding.
        first: The slot is reset before this chunk.
    """

    slot: int
    start: int
    samples: NDArray[np.float32]
    valid: int
    first: bool = False


class Batcher:
    """Which chunks go into the next batch, and when. No clock of its own: the caller says ``now``.

    A batch leaves as soon as no further chunk could join it (every active session has one in it, or
    it is full), or when its oldest chunk has waited ``wait_ms``. Oldest first; a slot never has two
    chunks in one batch, and its chunks keep their order.

    Args:
        max_batch: Chunks a batch holds at most.
        wait_ms: How long the oldest chunk waits for company.
    """

    def __init__(self, max_batch: int = 16, wait_ms: float = 8.0) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, got {max_batch}")
        if wait_ms < 0:
            raise ValueError(f"wait_ms: expected 0 or more, got {wait_ms}")
        self.max_batch = max_batch
        self.wait_ms = wait_ms
        # Bound: a session waits for its chunk's frames before it adds another, so one a session.
        self._waiting: deque[tuple[float, Ready]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, ready: Ready, now: float) -> None:
        """Queue a chunk that became ready at ``now`` (monotonic seconds)."""
        self._waiting.append((now, ready))

    def discard(self, ready: Ready) -> None:
        """Forget a chunk whose session gave up on it; harmless when it has already left."""
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not ready)

    def due(self) -> float | None:
        """When the oldest chunk must leave (monotonic seconds); None when nothing waits."""
        return self._waiting[0][0] + self.wait_ms / 1000 if self._waiting else None

    def take(self, now: float, active: int) -> list[Ready]:
        """The next batch, or nothing yet.

        Args:
            now: Monotonic seconds.
            active: Sessions that may still send a chunk, those waiting here included.
        """
        slots: set[int] = set()
        batch: list[Ready] = []
        rest: deque[tuple[float, Ready]] = deque()
        for entry in self._waiting:
            if len(batch) < self.max_batch and entry[1].slot not in slots:
                slots.add(entry[1].slot)
                batch.append(entry[1])
            else:
                rest.append(entry)
        due = self.due()
        full = len(batch) >= min(self.max_batch, max(active, 1))
        if due is None or not (full or now >= due):
            return []
        self._waiting = rest
        return batch


class Batches:
    """The task between sessions and engine: gathers chunks, runs batches, hands frames back.

    Args:
        run: One batch → its frames, in the batch's order (`Engine.run`).
        batcher: The policy.
        active: How many sessions are open.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Ready]], Awaitable[list[Frames]]],
        batcher: Batcher,
        active: Callable[[], int],
    ) -> None:
        self._run = run
        self._batcher = batcher
        self._active = active
        self._answers: dict[int, asyncio.Future[Frames]] = {}  # by id of the Ready
        self._wake = asyncio.Event()
        self._began: float | None = None

    @property
    def busy_s(self) -> float:
        """For how long the batch in the engine has been there; 0 when there is none."""
        return 0.0 if self._began is None else monotonic() - self._began

    def __len__(self) -> int:
        """Chunks that wait."""
        return len(self._batcher)

    async def step(self, ready: Ready) -> Frames:
        """Wait for this chunk's turn in a batch → its frames.

        Raises:
            Exception: whatever the engine raised for the batch.
        """
        answer: asyncio.Future[Frames] = asyncio.get_running_loop().create_future()
        self._answers[id(ready)] = answer
        self._batcher.add(ready, monotonic())
        self._wake.set()
        try:
            return await answer
        finally:
            self._answers.pop(id(ready), None)
            self._batcher.discard(ready)
            self._wake.set()  # one session fewer to wait for

    async def serve(self) -> None:
        """Run batches until cancelled. One batch is in the engine at a time."""
        while True:
            self._wake.clear()
            batch = self._batcher.take(monotonic(), self._active())
            if batch:
                await self._answer(batch)
                continue
            due = self._batcher.due()
            try:
                async with asyncio.timeout(None if due is None else max(due - monotonic(), 0)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _answer(self, batch: list[Ready]) -> None:
        self._began = monotonic()
        try:
            results = await self._run(batch)
        except Exception as error:  # noqa: BLE001 - it is the waiting sessions' to raise
            for ready in batch:
                answer = self._answers.get(id(ready))
                if answer is not None and not answer.done():
                    answer.set_exception(error)
            return
        finally:
            self._began = None
        for ready, frames in zip(batch, results, strict=True):
            answer = self._answers.get(id(ready))
            if answer is not None and not answer.done():
                answer.set_result(frames)
