"""The one owner of the inference: its slots, the thread that drives it, and what it did."""

import asyncio
import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from stream.batcher import Ready
from stream.clock import SAMPLE_RATE
from stream.inference import EngineError, EngineSettings, Floats, Inference, Loaded
from stream.tracks.frames import Frames
from stream.worker import ENDS_WITHIN_S, POSSIBLE, Worker

log = structlog.get_logger(__name__)

T = TypeVar("T")


class EngineFull(EngineError):
    """Every slot is taken."""


@dataclass(slots=True)
class EngineStats:
    """What the engine did since it opened.

    Attributes:
        compute_s: Seconds spent in steps.
        audio_s: Seconds of audio in them, summed over streams.
        last_s: Seconds of the latest step.
        batches: Batch size → how many batches had it.
    """

    compute_s: float = 0.0
    audio_s: float = 0.0
    last_s: float = 0.0
    batches: Counter[int] = field(default_factory=Counter[int])

    @property
    def realtime_factor(self) -> float:
        """Compute seconds for a second of audio."""
        return self.compute_s / self.audio_s if self.audio_s else 0.0


class Engine:
    """`async with Engine(settings) as engine` loads, warms up, and runs batches until it closes.

    Everything of torch happens on one thread of its own, or in a process of its own that this
    thread waits for, so the event loop never computes and batches never overlap; `embed` alone is
    for the caller's thread, and is a few lines of numpy.

    Args:
        settings: What to load, where, in which steps.
        streams: Slots when the settings leave their number open.
        apart: In a process of its own, where that is possible: for whom computes beside it.
    """

    def __init__(self, settings: EngineSettings, streams: int = 1, *, apart: bool = False) -> None:
        self.settings = settings
        self.stats = EngineStats()
        self.slots = settings.slots or max(streams, 1)
        self._apart = apart and POSSIBLE
        self._thread: _Thread | None = None
        self._ends_within_s = ENDS_WITHIN_S
        self._inference: Inference | Worker
        self.loaded: Loaded
        self._free: list[int] = []
        self._taken: set[int] = set()

    async def __aenter__(self) -> Self:
        """Load and warm up.

        Raises:
            EngineError: a checkpoint, a device or a combination of them that cannot run.
        """
        async with contextlib.AsyncExitStack() as stack:
            thread = _Thread("inference")
            stack.push_async_callback(lambda: thread.stop(self._ends_within_s))
            if self._apart:
                worker = await Worker.start()
                stack.push_async_callback(lambda: worker.close(self._ends_within_s))
                self._inference = await thread.run(lambda: worker.open(self.settings, self.slots))
            else:
                self._inference = await thread.run(lambda: Inference(self.settings, self.slots))
            self._closing = stack.pop_all()
        self._thread = thread
        self.loaded = loaded = self._inference.loaded
        self._free = list(range(self.slots - 1, -1, -1))
        for warning in loaded.warnings:
            log.warning(warning)
        log.info(
            "engine ready",
            checkpoint=loaded.names,
            device=loaded.device,
            encoders=loaded.encoders,
            slots=self.slots,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread = None
            await self._closing.aclose()

    async def lost(self) -> None:
        """Wait for what nobody can go on after; the thread of this process does not end.

        Raises:
            EngineError: the process of the inference ended.
        """
        if isinstance(self._inference, Worker):
            await self._inference.lost()

    def acquire(self) -> int:
        """A free slot. Its state is reset by the first chunk (`Ready.first`).

        Raises:
            EngineFull: there is none.
        """
        if not self._free:
            raise EngineFull(f"all {self.slots} slots are taken; engine.slots sets their number")
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot in self._taken, f"slot {slot} is not taken"
        self._taken.remove(slot)
        self._free.append(slot)

    async def alive(self) -> None:
        """Return once the inference has done what it was doing."""
        await self._call(self._inference.alive)

    def abandon(self) -> None:
        """What the inference does is of no use any more: closing does not wait for it."""
        self._ends_within_s = 0.0

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._taken)

    async def run(self, batch: Sequence[Ready]) -> list[Frames]:
        """One step for every stream of the batch → their frames, in the batch's order.

        Frames that do not exist (before a stream's first, after its last) are left out. A chunk
        with a sample that is not finite, or beyond any audio, is heard as silence and begins the
        slot's stream afresh (`Frames.nonfinite`); its neighbours notice nothing.

        Raises:
            ValueError: a slot that is not taken, or taken twice, or a chunk of another length.
            EngineError: nothing can be computed any more, for any stream.
        """
        slots = [ready.slot for ready in batch]
        if unknown := [slot for slot in slots if slot not in self._taken]:
            raise ValueError(f"expected slots that are taken, got {unknown}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"expected every slot once, got {slots}")
        for ready in batch:
            if ready.samples.shape != (self.loaded.chunk_samples,):
                raise ValueError(
                    f"expected samples [{self.loaded.chunk_samples}], got {ready.samples.shape}"
                )
        if not batch:
            return []
        frames, took_s = await self._call(lambda: self._inference.step(batch))
        self.stats.last_s = took_s
        self.stats.compute_s += took_s
        self.stats.audio_s += sum(ready.valid for ready in batch) / SAMPLE_RATE
        self.stats.batches[len(batch)] += 1
        return frames

    def embed(self, mass: NDArray[Any], first: NDArray[Any], second: NDArray[Any]) -> Floats:
        """Weighted moments of `Frames.voice` → embeddings, as `UniSpeechSatForXVector.embed`.

        Args:
            mass: […] sum of weights.
            first: […, D] weighted sum.
            second: […, D] weighted sum of squares.

        Returns:
            […, E].
        """
        assert self.loaded.pooled is not None, "no speaker head is loaded"
        weight, bias = self.loaded.pooled
        n = np.asarray(mass, np.float64)[..., None]
        mean = np.asarray(first, np.float64) / np.maximum(n, 1e-6)
        spread = (np.asarray(second, np.float64) - n * np.square(mean)) / np.maximum(n - 1, 1e-6)
        pooled = np.concatenate([mean, np.sqrt(np.maximum(spread, 0))], axis=-1)
        # Neither torch nor BLAS: their thread pools cost this thread milliseconds for microseconds.
        return np.einsum("...d,ed->...e", pooled.astype(np.float32), weight) + bias

    @property
    def has_voice(self) -> bool:
        """Whether a speaker head is loaded."""
        return self.loaded.pooled is not None

    async def freeze(self, slot: int) -> Callable[[], bytes]:
        """A slot's state as it is now.

        Returns:
            Makes bytes of it, on any thread, which `load` restores bit for bit in an engine of the
            same settings.
        """
        return await self._call(lambda: self._inference.freeze(slot))

    async def load(self, slot: int, data: bytes) -> None:
        """Restore what `freeze` gave.

        Raises:
            ValueError: not the bytes of a slot, or of another checkpoint or window.
        """
        await self._call(lambda: self._inference.load(slot, data))

    async def _call(self, call: Callable[[], T]) -> T:
        assert self._thread is not None, "the engine is not open"
        try:
            return await self._thread.run(call)
        except EngineError:
            self.abandon()
            raise


class _Thread:
    """Runs calls one after another on a thread of its own.

    A daemon thread: a call that hangs in a driver must not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        # Bound: every caller awaits its call, so one a caller.
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T]) -> T:
        """Await ``call()`` on the thread. Cancelled, it still runs, and its result is dropped."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Callable[[], None]) -> None:
            if not future.done():
                result()

        def serve() -> None:
            try:
                value = call()
            except BaseException as error:  # noqa: BLE001 - it is the awaiting task's to raise
                raised = error
                answer = lambda: future.set_exception(raised)  # noqa: E731
            else:
                answer = lambda: future.set_result(value)  # noqa: E731
            # The loop may be gone when the process ends amid a call: nobody waits then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, answer)

        self._calls.put(serve)
        return await future

    async def stop(self, within_s: float) -> None:
        """Let the current call finish, for so long."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, within_s)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
