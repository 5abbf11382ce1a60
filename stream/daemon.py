"""The composition root: sources → sessions → batches → engine → tracks → fanout, and the way down.

`run` is the one way to run: `livesat run`, `annotate` and `listen` differ in their `Config` only.
"""

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import structlog

from sinks.events import Event, Latency
from stream import clock
from stream.batcher import Batcher, Batches, Ready
from stream.chunker import Chunker
from stream.config import Config, ConfigError
from stream.engine import Engine, EngineFull
from stream.fanout import Fanout
from stream.metrics import Histogram
from stream.session import Health, Session, Stamp
from stream.sources.source import Block, Listener, Source, SourceError
from stream.tracks import Gallery, LanguageModel, Tracks, TracksSettings, open_language_model
from stream.voiceprints import Voiceprints, default_path

log = structlog.get_logger(__name__)

OnEvent = Callable[[Event], None]

_TIMED: Final = frozenset(
    {
        "speech.started",
        "speech.ended",
        "turn.started",
        "turn.ended",
        "transcript.partial",
        "transcript.final",
    }
)
"""Events whose delay says how late the house is; a revision is about the past by nature."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did.

    Attributes:
        sessions: Streams that were opened.
        audio_s: Seconds of audio, summed over streams.
        compute_s: Seconds the inference thread computed.
        wall_s: Seconds from the first session to the last.
        lag_p50_ms: Capture of an event's end → its emission, by the clock on the wall: what a
            subscriber of a live source sees. Of a file that is not paced it says how fast the file
            was read.
        lag_p99_ms: Likewise.
        latency_p50_ms: The same on the audio's clock plus the compute time of the step, which does
            not depend on how fast the source was read.
        latency_p99_ms: Likewise.
        events: How many of each type.
        lost_s: Seconds of audio that went into gaps.
        dropped_partials: Partials that sinks were too slow for.
        stopped: A signal ended it, not the end of the sources.
    """

    sessions: int
    audio_s: float
    compute_s: float
    wall_s: float
    lag_p50_ms: float
    lag_p99_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    events: dict[str, int]
    lost_s: float
    dropped_partials: int
    stopped: bool

    @property
    def realtime_factor(self) -> float:
        """Compute seconds for a second of audio."""
        return self.compute_s / self.audio_s if self.audio_s else 0.0


async def run(
    config: Config,
    *,
    on_event: OnEvent | None = None,
    stop: asyncio.Event | None = None,
    fail_fast: bool = True,
) -> Summary:
    """Run until every source has ended, or until told to stop.

    SIGTERM, SIGINT or ``stop`` drain: sources are closed, what was heard is computed, finals reach
    their sinks. A second signal gives up on that. A file that is not paced is read no faster than
    the engine computes; a live source loses through its ring, as `gap` events.

    Args:
        config: What to run.
        on_event: Called with each event, at once and on the event loop: keep it short.
        stop: Set it to drain.
        fail_fast: A sink that cannot be opened at the start, or did not get all finals by the end,
            is an error; otherwise it is retried, logged and counted.

    Returns:
        What was done.

    Raises:
        ConfigError: the checkpoint's thresholds cannot be read.
        LanguageModelError: words cannot be decoded with the language model that is asked for.
        EngineError: a checkpoint or device cannot be used, or slots are fewer than sources.
        SourceError: a source cannot be opened, in which case nothing ran; or one failed later, in
            which case its session was closed with reason "error" and all else ran to its end.
        VoiceprintError: the enrolled voices named in the configuration cannot be used.
        SinkError: a sink cannot be opened, or finals did not reach it.
    """
    config.log.configure()
    house = House(config, on_event, stop or asyncio.Event())
    async with AsyncExitStack() as stack:
        stack.enter_context(_signals(house.stop))  # first, so that it outlives the sinks' drain
        # What can fail on the user's mistake comes before anything is written.
        listeners = {n: s for n, s in config.sources.items() if isinstance(s, Listener)}
        sources = {n: s for n, s in config.sources.items() if not isinstance(s, Listener)}
        blocks = {
            name: await stack.enter_async_context(source.open()) for name, source in sources.items()
        }
        streams = len(sources) + sum(listener.streams for listener in listeners.values())
        house.engine = await stack.enter_async_context(Engine(config.engine, streams=streams))
        if house.engine.slots < len(sources):
            raise EngineFull(
                f"engine.slots is {house.engine.slots}, "
                f"but there are {len(sources)} sources; expected as many slots or more"
            )
        house.settings = await asyncio.to_thread(_thresholds, config, house.engine)
        house.language = await asyncio.to_thread(
            open_language_model,
            house.settings.words,
            house.engine.language_file,
            house.engine.vocabulary,
        )
        house.gallery = await asyncio.to_thread(_gallery, config, house.engine)
        house.fanout = await stack.enter_async_context(
            Fanout(config.sinks, config.fanout, fail_fast=fail_fast)
        )
        await house.serve(sources, blocks, listeners)
    if house.failures:
        raise SourceError("\n".join(house.failures))
    return house.summary()


@dataclass
class House:
    """The parts of one run and what they count; an `Intake` to its listeners."""

    config: Config
    on_event: OnEvent | None
    stop: asyncio.Event
    engine: Engine = field(init=False)
    fanout: Fanout = field(init=False)
    settings: TracksSettings = field(init=False)
    gallery: Gallery | None = field(init=False, default=None)
    language: LanguageModel | None = field(init=False, default=None)
    batches: Batches = field(init=False)
    failures: list[str] = field(default_factory=list[str])
    sessions: int = 0
    audio_s: float = 0.0
    lost_s: float = 0.0
    wall_s: float = 0.0
    lag: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)
    events: Counter[str] = field(default_factory=Counter[str])

    async def serve(
        self,
        sources: Mapping[str, Source],
        blocks: Mapping[str, AsyncIterator[Block]],
        listeners: Mapping[str, Listener],
    ) -> None:
        """A task a stream, one a listener and one for the batches.

        Ends when the sources have; with listeners, when it is told to stop and they have let the
        last caller go.
        """
        settings = self.config.engine
        self.batches = Batches(
            self.engine.run,
            Batcher(settings.max_batch, settings.batch_wait_ms),
            lambda: self.engine.active,
        )
        began = monotonic()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(self.batches.serve(), name="batches")
            working = [
                group.create_task(self._hear(name, source, blocks[name]), name=f"stream:{name}")
                for name, source in sources.items()
            ] + [
                group.create_task(listener.serve(name, self), name=f"listener:{name}")
                for name, listener in listeners.items()
            ]
            try:
                await asyncio.wait(working)
            finally:
                serving.cancel()
        self.wall_s = monotonic() - began

    async def stream(self, name: str, source: Source, *, tap: OnEvent | None = None) -> None:
        """A listener's caller: see `Intake.stream`."""
        slot = self.engine.acquire()
        try:
            async with source.open() as blocks:
                await self._session_over(name, source, blocks, slot, tap)
        finally:
            self.engine.release(slot)

    async def _hear(self, name: str, source: Source, blocks: AsyncIterator[Block]) -> None:
        """A source of the configuration, already open."""
        slot = self.engine.acquire()
        try:
            failure = await self._session_over(name, source, blocks, slot, None)
            if failure is not None:
                self.failures.append(failure)
        finally:
            self.engine.release(slot)

    async def _session_over(
        self,
        name: str,
        source: Source,
        blocks: AsyncIterator[Block],
        slot: int,
        tap: OnEvent | None,
    ) -> str | None:
        """One session, from its source's first block to `session.closed`.

        Returns:
            Why the source failed, if it did.
        """
        session = self._session(name, source, slot)
        self.sessions += 1
        log.info("session opened", stream=name, session=session.id, source=source.name)
        await self._publish(session.opened(), tap)
        reason, failure = "ended", None
        try:
            async with aclosing(_until(self.stop, blocks)) as heard:
                async for block in heard:
                    events, ready = session.feed(block)
                    await self._publish(events, tap)
                    await self._advance(session, ready, tap)
            if self.stop.is_set():
                reason = "stopped"
        except SourceError as error:
            failure = str(error)
            log.error("source failed", stream=name, error=failure)  # noqa: TRY400 - one line
            await self._publish(session.failed("source.failed", failure), tap)
            reason = "error"
        await self._advance(session, session.close(), tap)
        await self._publish(session.closed(reason), tap)
        self.audio_s += clock.seconds(session.received)
        self.lost_s += clock.seconds(session.lost)
        log.info("session closed", stream=name, session=session.id, reason=reason)
        return failure

    def _session(self, name: str, source: Source, slot: int) -> Session:
        engine, settings = self.engine, self.config.session

        def tracks(stamp: Stamp) -> Tracks:
            return Tracks(
                self.settings,
                embed=engine.embed if engine.has_voice else None,
                vocabulary=engine.vocabulary,
                language=self.language,
                voiceprints=self.gallery,
                stamp=stamp,
                classes=engine.labels,
            )

        return Session(
            stream_id=name,
            source=source.name,
            checkpoint=engine.names,
            latency=Latency(
                chunk_ms=self.config.engine.chunk_ms, lookahead_ms=self.config.engine.lookahead_ms
            ),
            slot=slot,
            chunker=Chunker(
                engine.chunk_samples,
                engine.lead,
                receptive=engine.receptive,
                fill=clock.samples(settings.fill_ms / 1000),
            ),
            tracks=tracks,
            heartbeat_s=settings.heartbeat_s,
            health=self._health,
        )

    async def _advance(self, session: Session, ready: Sequence[Ready], tap: OnEvent | None) -> None:
        for chunk in ready:
            frames = await self.batches.step(chunk)
            events = session.take(frames)
            if chunk.valid:
                end_s = clock.seconds(chunk.start + len(chunk.samples))
                for event in events:
                    if event.type in _TIMED:
                        behind_s = max(end_s - event.end, 0) + self.engine.stats.last_s
                        self.latency.observe(behind_s * 1000)
            await self._publish(events, tap)

    async def _publish(self, events: Sequence[Event], tap: OnEvent | None) -> None:
        for event in events:
            self.events[event.type] += 1
            if event.type in _TIMED:
                self.lag.observe(event.lag_ms)
            if self.on_event is not None:
                self.on_event(event)
            if tap is not None:
                tap(event)
            await self.fanout.publish(event)

    def _health(self) -> Health:
        sinks = self.fanout.statistics()
        depths = {f"sink:{name}": each.queued for name, each in sinks.items()}
        return Health(
            realtime_factor=round(self.engine.stats.realtime_factor, 6),
            queue_depths={"engine": len(self.batches), **depths},
            dropped_partials=sum(each.dropped_partials for each in sinks.values()),
        )

    def summary(self) -> Summary:
        """What was done so far."""
        return Summary(
            sessions=self.sessions,
            audio_s=round(self.audio_s, 6),
            compute_s=self.engine.stats.compute_s,
            wall_s=self.wall_s,
            lag_p50_ms=self.lag.quantile(0.5),
            lag_p99_ms=self.lag.quantile(0.99),
            latency_p50_ms=self.latency.quantile(0.5),
            latency_p99_ms=self.latency.quantile(0.99),
            events=dict(sorted(self.events.items())),
            lost_s=round(self.lost_s, 6),
            dropped_partials=self._health().dropped_partials,
            stopped=self.stop.is_set(),
        )


async def _until(stop: asyncio.Event, blocks: AsyncIterator[Block]) -> AsyncGenerator[Block]:
    """Blocks until they end or ``stop`` is set; reads one ahead, while the engine computes."""
    stopped = asyncio.create_task(stop.wait(), name="until:stop")
    pending = asyncio.create_task(_next(blocks), name="until:block")
    try:
        while True:
            await asyncio.wait({pending, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return
            block = pending.result()
            if block is None:
                return
            pending = asyncio.create_task(_next(blocks), name="until:block")
            yield block
    finally:
        stopped.cancel()
        pending.cancel()
        # The block under way is given up; its source must have stopped before it is closed.
        await asyncio.gather(stopped, pending, return_exceptions=True)


async def _next(blocks: AsyncIterator[Block]) -> Block | None:
    return await anext(blocks, None)


def _thresholds(config: Config, engine: Engine) -> TracksSettings:
    """The checkpoint's measured thresholds under those of the configuration."""
    if engine.tracks_file is None:
        return config.tracks
    try:
        measured = TracksSettings.load(engine.tracks_file)
        return measured.over(config.tracks.model_dump(exclude_unset=True))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _gallery(config: Config, engine: Engine) -> Gallery | None:
    """The enrolled voices to look for; blocks."""
    path = config.voiceprints or default_path()
    if engine.voice_id is None or (config.voiceprints is None and not path.is_file()):
        return None
    with Voiceprints.open(path) as store:
        # Voices of another checkpoint are an error only where the user asked for this file.
        return store.gallery(engine.voice_id, strict=config.voiceprints is not None)


@contextmanager
def _signals(stop: asyncio.Event) -> Generator[None]:
    """SIGTERM and SIGINT drain; the second one cancels. Only where signals can be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def asked() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    caught: list[signal.Signals] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # a loop of a platform without signals
            loop.add_signal_handler(number, asked)
            caught.append(number)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
