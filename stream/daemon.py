"""The composition root: sources → sessions → batches → engine → tracks → fanout, and the way down.

`run` is the one way to run: `livesat run`, `annotate` and `listen` differ in their `Config` only.
"""

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from math import inf
from time import monotonic, time
from typing import Final

import numpy as np
import structlog

from sinks.events import Event, Latency
from stream import clock
from stream.batcher import Batcher, Batches, Ready
from stream.chunker import Chunker
from stream.config import Config, ConfigError
from stream.engine import Engine, EngineFull
from stream.enrolled import Enrolled
from stream.fanout import Fanout
from stream.feed import Entry, Feed
from stream.inference import EngineError
from stream.metrics import Histogram
from stream.pulse import Pulse, give_back
from stream.server import Status
from stream.session import Health, Session, Stamp
from stream.sources.apart import Apart, Multichannel
from stream.sources.line import Line
from stream.sources.source import Block, Listener, Resumed, Returns, Source, SourceError
from stream.supervisor import Supervisor
from stream.survival import AHEAD, Lobby, Survival, Survivor
from stream.tracks import Gallery, LanguageModel, Tracks, TracksSettings, open_language_model
from stream.tracks.pipeline import NOBODY
from stream.voiceprints import VoiceprintError

log = structlog.get_logger(__name__)

OnEvent = Callable[[Event], None]

SERVER: Final = "server"
"""Name of the server among the listeners: its streams are named after what its callers say."""

RELOADED: Final = ("tracks", "session", "voiceprints", "log")
"""Keys that a reload takes over: for sessions that open from then on, voices for all of them."""

FIRST_S: Final = 1.0
"""Age at which a session is saved for the first time: before that it does not outlive a kill."""

VOICES_S: Final = 10.0
"""How often the file of enrolled voices is looked at."""

HANGS_S: Final = 4.0
"""An inference that is silent for so long while the daemon stops will not answer any more: all is
to be over in five seconds, but for what sinks still have to deliver."""

_NOTHING: Final = np.zeros(0, np.float32)

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
        compute_s: Seconds the inference computed.
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
    reload: Callable[[], Config] | None = None,
    loaded: Callable[[], None] = lambda: None,
    apart: bool = False,
) -> Summary:
    """Run until every source has ended, or until told to stop.

    SIGTERM, SIGINT or ``stop`` drain: sources are closed, what was heard is computed, finals reach
    their sinks. A second signal gives up on that. A file that is not paced is read no faster than
    the engine computes; a live source loses through its ring, as `gap` events.

    A run that ends by itself did what it was asked for only if every source did: one that failed is
    an error at the end. A run that is told to stop, as a daemon is, has succeeded when it drained:
    a source that failed, however long ago, was an event and a line in the log.

    Args:
        config: What to run.
        on_event: Called with each event, at once and on the event loop: keep it short.
        stop: Set it to drain.
        fail_fast: A sink that cannot be opened at the start, or did not get all finals by the end,
            is an error; otherwise it is retried, logged and counted.
        reload: Reads the configuration again, on SIGHUP; what can change without touching a stream
            does, the rest is named in the log. None: SIGHUP is left alone.
        loaded: Called when all that takes long is loaded, before the first stream is heard.
        apart: The model computes in a process of its own; its end is an error, and the end.

    Returns:
        What was done.

    Raises:
        ConfigError: the checkpoint's thresholds cannot be read.
        LanguageModelError: words cannot be decoded with the language model that is asked for.
        EngineError: a checkpoint or device cannot be used, or slots are fewer than sources. The
            device failed, or hangs while the run is to stop: sinks get what there is, and sessions
            stay in `session.state`.
        SourceError: a source cannot be opened, in which case nothing ran; or one failed later, in
            which case its session was closed with reason "error" and all else ran to its end
            without being told to stop; or one cannot listen.
        VoiceprintError: the enrolled voices named in the configuration cannot be used.
        SinkError: a sink cannot be opened, or finals did not reach it.
    """
    config.log.configure()
    house = House(config, on_event, stop or asyncio.Event())
    async with AsyncExitStack() as stack:
        # First, so that it outlives the sinks' drain.
        stack.enter_context(_signals(house.stop, house.reloaded if reload else None))
        stack.enter_context(house.pulse.counting())
        # What can fail on the user's mistake comes before anything is written.
        listeners: dict[str, Listener] = {
            n: s for n, s in config.sources.items() if isinstance(s, Listener)
        }
        sources: dict[str, Source] = {}
        for name, source in config.sources.items():
            if isinstance(source, Multichannel) and source.apart is not None:
                listeners[name] = Apart(source, source.apart)
            elif not isinstance(source, Listener):
                sources[name] = source
        if config.server is not None:
            listeners[SERVER] = config.server
        blocks = {
            name: await stack.enter_async_context(source.open()) for name, source in sources.items()
        }
        streams = len(sources) + sum(listener.streams for listener in listeners.values())
        house.engine = await stack.enter_async_context(
            Engine(config.engine, streams=streams, apart=apart)
        )
        if house.engine.slots < len(sources):
            raise EngineFull(
                f"engine.slots is {house.engine.slots}, "
                f"but there are {len(sources)} sources; expected as many slots or more"
            )
        house.settings = await asyncio.to_thread(_thresholds, config, house.engine)
        house.language = await asyncio.to_thread(_language, house.settings, house.engine)
        house.gallery = await asyncio.to_thread(house.enrolled.gallery)
        await house.find_survivors(stack)
        house.fanout = await stack.enter_async_context(
            Fanout(config.sinks, config.fanout, fail_fast=fail_fast, trouble=house.trouble)
        )
        loaded()
        await house.serve(sources, blocks, listeners, reload)
    if house.failures and not house.stop.is_set():
        raise SourceError("\n".join(house.failures))
    return house.summary()


@dataclass(slots=True)
class Live:
    """An open session and what belongs to it.

    Attributes:
        session: The session.
        source: What its source says it is.
        called: A listener's caller opened it.
        resumable: Whether it may outlive the process.
        tap: See `Intake.stream`.
        form: Likewise.
        emitting: Held from the making of events to their publication: `seq` keeps its order.
        position: See `Block.position`.
        saved: When it was saved last, in monotonic seconds.
        saving: What makes bytes of that and writes them.
        over: It has said its last event here.
    """

    session: Session
    source: str
    called: bool
    resumable: bool
    tap: OnEvent | None
    form: str = ""
    emitting: asyncio.Lock = field(default_factory=asyncio.Lock)
    position: int = 0
    saved: float = field(default_factory=monotonic)
    saving: asyncio.Task[None] | None = None
    over: bool = False


@dataclass
class House:
    """The parts of one run and what they count; a `Desk` to its server and other listeners."""

    config: Config
    on_event: OnEvent | None
    stop: asyncio.Event
    engine: Engine = field(init=False)
    fanout: Fanout = field(init=False)
    settings: TracksSettings = field(init=False)
    gallery: Gallery | None = field(init=False, default=None)
    language: LanguageModel | None = field(init=False, default=None)
    batches: Batches = field(init=False)
    survival: Survival | None = field(init=False, default=None)
    supervisor: Supervisor = field(default_factory=Supervisor)
    pulse: Pulse = field(default_factory=Pulse)
    reloaded: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the configuration is to be read again."""
    feed: Feed = field(default_factory=Feed)
    live: dict[str, Live] = field(default_factory=dict[str, Live])
    """Open sessions by id."""
    _deaf: set[str] = field(default_factory=set[str])
    """Listeners that do not listen yet."""
    _beside_server: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])
    """Sources and listeners that are not the server."""
    _failing: dict[str, str] = field(default_factory=dict[str, str])
    """Sinks that fail, and why."""
    _troubles: asyncio.Queue[tuple[str, str | None]] = field(
        default_factory=asyncio.Queue[tuple[str, str | None]]
    )
    lobby: Lobby = field(init=False)
    _saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One session is saved at a time: each is megabytes, in several copies until it is written."""
    _computing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Whose tracks compute next."""
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
        reload: Callable[[], Config] | None = None,
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
        self._deaf = set(listeners)
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(self.batches.serve(), name="batches")
            working = [
                group.create_task(self._hear(name, source, blocks[name]), name=f"stream:{name}")
                for name, source in sources.items()
            ] + [
                group.create_task(listener.serve(name, self), name=f"listener:{name}")
                for name, listener in listeners.items()
                if name != SERVER
            ]
            self._beside_server = working.copy()
            if SERVER in listeners:
                serve = listeners[SERVER].serve(SERVER, self)
                working.append(group.create_task(serve, name=f"listener:{SERVER}"))
            beside = [
                group.create_task(self.engine.lost(), name="engine"),
                group.create_task(self.supervisor.watch(self.engine.alive), name="watchdog"),
                group.create_task(self._tell_of_the_stop(), name="stopping"),
                group.create_task(self._stop_without(), name="hanging"),
                group.create_task(self._tell_of_trouble(), name="trouble"),
                group.create_task(self.pulse.beat(), name="pulse"),
                group.create_task(give_back(), name="memory"),
                group.create_task(self._keep_looking(), name="voices"),
            ]
            if self.survival is not None:
                closing = self._close_unclaimed(self.survival)
                beside.append(group.create_task(closing, name="unclaimed"))
            if reload is not None:
                beside.append(group.create_task(self._reload(reload), name="reload"))
            self._tell_ready()
            try:
                await asyncio.wait(working)
            finally:
                for task in (*beside, serving):
                    task.cancel()
                self.feed.close()
        self.wall_s = monotonic() - began

    def listening(self, name: str) -> None:
        """See `Intake.listening`."""
        self._deaf.discard(name)
        self._tell_ready()

    def _tell_ready(self) -> None:
        if not self._deaf and not self.stop.is_set():
            self.supervisor.ready()

    async def drained(self) -> None:
        """See `Desk.drained`."""
        if self._beside_server:
            await asyncio.wait(self._beside_server)

    async def _tell_of_the_stop(self) -> None:
        await self.stop.wait()
        self.supervisor.stopping()

    async def _stop_without(self) -> None:
        """Once told to stop: streams wait for the inference to the end, but not for ever.

        Raises:
            EngineError: it hangs.
        """
        await self.stop.wait()
        while True:
            try:
                async with asyncio.timeout(HANGS_S):
                    await self.engine.alive()
            except TimeoutError:
                self.engine.abandon()
                raise EngineError(
                    f"the inference hangs: no answer in {HANGS_S:g} s; stopped without it"
                ) from None
            await asyncio.sleep(HANGS_S / 10)

    def trouble(self, sink: str, error: str | None) -> None:
        """A sink begins to fail, or takes events again; for the fanout to call."""
        # Bound: a sink has one kind of trouble at a time, and says it once.
        self._troubles.put_nowait((sink, error))
        if error is None:
            self._failing.pop(sink, None)
        else:
            self._failing[sink] = error

    async def _tell_of_trouble(self) -> None:
        """Every open session says what is wrong with a sink: who reads another one learns of it."""
        while True:
            sink, error = await self._troubles.get()
            for live in list(self.live.values()):
                code = "sink.recovered" if error is None else "sink.failed"
                message = f"{sink}: " + ("takes events again" if error is None else error)
                await self._emit(live, partial(live.session.warned, code, message))

    async def _reload(self, read: Callable[[], Config]) -> None:
        """Whenever it is asked for: take over from the configuration what can change."""
        while True:
            await self.reloaded.wait()
            self.reloaded.clear()
            self.supervisor.reloading()
            try:
                given = await asyncio.to_thread(read)
                settings = await asyncio.to_thread(_thresholds, given, self.engine)
                language = self.language
                if settings.words != self.settings.words:
                    language = await asyncio.to_thread(_language, settings, self.engine)
                enrolled = Enrolled(given.voiceprints, self.engine.loaded)
                gallery = await asyncio.to_thread(enrolled.gallery, strict=False)
                changed = [
                    key
                    for key in type(given).model_fields
                    if getattr(given, key) != getattr(self.config, key)
                ]
                kept = [key for key in changed if key not in RELOADED]
                if given.session.state != self.config.session.state:
                    kept.append("session.state")  # the open file is used to the end
                self.config = self.config.model_copy(
                    update={key: getattr(given, key) for key in changed if key in RELOADED}
                )
                self.settings, self.language = settings, language
                self.config.log.configure()
                self._look_for(gallery)
            except Exception as error:  # noqa: BLE001 - a sink of somebody else's may raise anything
                log.error("not reloaded", error=str(error))  # noqa: TRY400 - it is the user's file
            else:
                log.info("reloaded", changed=[key for key in changed if key in RELOADED])
                if kept:
                    log.warning("restart the daemon for these", keys=kept)
            self._tell_ready()

    async def find_survivors(self, stack: AsyncExitStack) -> None:
        """Open the file of open sessions and read them.

        Raises:
            SurvivalError: it cannot be used.
        """
        found: list[Survivor] = []
        if (path := self.config.session.state) is not None:
            self.survival, found = await stack.enter_async_context(Survival.open(path))
        self.lobby = Lobby(found, lambda: self.resume_s)
        if found:
            log.info("open sessions found", sessions=len(found))

    async def stream(
        self,
        name: str,
        source: Source,
        *,
        tap: OnEvent | None = None,
        resume: Resumed | None = None,
        returns: Returns = "never",
        form: str = "",
        opened: Callable[[], None] | None = None,
    ) -> None:
        """A listener's caller: see `Intake.stream`."""
        slot = self.engine.acquire()
        try:
            async with source.open() as blocks:
                await self._session_over(
                    name,
                    source,
                    blocks,
                    slot,
                    tap,
                    returns=returns,
                    form=form,
                    resume=resume,
                    opened=opened,
                )
        finally:
            self.engine.release(slot)

    @property
    def resume_s(self) -> float:
        """See `Desk.resume_s`."""
        return self.config.session.resume_s

    @property
    def names(self) -> set[str]:
        """See `Desk.names`."""
        now = {live.session.stream_id for live in self.live.values()}
        return now | self.lobby.streams | set(self.config.sources)

    def status(self) -> Status:
        """See `Desk.status`."""
        stats, live = self.engine.stats, self.live.values()
        return Status(
            streams=len(self.live),
            slots=self.engine.slots,
            lag_p50_ms=self.lag.quantile(0.5),
            lag_p99_ms=self.lag.quantile(0.99),
            realtime_factor=stats.realtime_factor,
            busy_s=self.batches.busy_s,
            engine_waiting=len(self.batches),
            audio_s=stats.audio_s,
            compute_s=stats.compute_s,
            lost_s=self.lost_s + clock.seconds(sum(each.session.lost for each in live)),
            batches=dict(stats.batches),
            events=dict(self.events),
            sinks=self.fanout.statistics(),
            readers=len(self.feed),
            evicted=self.feed.evicted,
            stopping=self.stop.is_set(),
            loop_p99_ms=self.pulse.lateness_ms.quantile(0.99),
            tasks=len(asyncio.all_tasks()),
            faults=self.pulse.faults,
            history_bytes=self.feed.kept,
        )

    async def name_speaker(
        self,
        session_id: str,
        label: str,
        name: str,
        enrol: bool,
        consent: str | None = None,
        expires: datetime | None = None,
    ) -> None:
        """See `Desk.name_speaker`."""
        live = self.live.get(session_id)
        if live is None:
            raise LookupError(f"no session {session_id} is open")
        tracks = live.session.tracks
        number = tracks.speaker(label)
        if number is None:
            raise LookupError(f"session {session_id} has no speaker {label}")
        if enrol:
            embedding, evidence_s = tracks.profile(number)
            note = consent or f"named and enrolled by a listener of session {session_id}"
            await asyncio.to_thread(self.enrolled.add, name, embedding, evidence_s, note, expires)
            with suppress(VoiceprintError):  # it is kept; `_keep_looking` tells what is wrong
                await self.look_again()
        await self._emit(live, partial(live.session.name_speaker, number, name))
        live.saved = -inf  # no audio brings a name back: save it soon

    async def voices(self) -> list[str]:
        """See `Desk.voices`."""
        return await asyncio.to_thread(self.enrolled.names)

    @property
    def enrolled(self) -> Enrolled:
        """The people to look for, by the configuration as it is now."""
        return Enrolled(self.config.voiceprints, self.engine.loaded)

    async def look_again(self) -> None:
        """Read the enrolled voices again: every open session looks for them from now on.

        Raises:
            VoiceprintError: they cannot be read; nobody is looked for, as anybody may have been
                forgotten.
        """
        try:
            gallery = await asyncio.to_thread(self.enrolled.gallery, strict=False)
        except VoiceprintError:
            self._look_for(None)
            raise
        self._look_for(gallery)

    def _look_for(self, gallery: Gallery | None) -> None:
        before = self.gallery
        if gallery is before or (gallery is not None and gallery.same(before)):
            return
        self.gallery = gallery
        left_out = () if gallery is None else gallery.left_out
        if left_out and (before is None or left_out != before.left_out):
            log.warning("not looked for: enrolled with another checkpoint", names=left_out)
        for live in self.live.values():
            live.session.tracks.look_for(gallery or NOBODY)

    async def _keep_looking(self) -> None:
        """Voices come, are forgotten and expire while we run; other programs write the file."""
        failure = ""
        while True:
            await asyncio.sleep(VOICES_S)
            try:
                await self.look_again()
                failure = ""
            except VoiceprintError as error:
                if str(error) != failure:
                    failure = str(error)
                    log.error("enrolled voices not read", error=failure)  # noqa: TRY400 - one line

    def claim(self, token: str) -> Survivor | None:
        """See `Desk.claim`."""
        return self.lobby.claim(token)

    def give_back(self, survivor: Survivor) -> None:
        """See `Desk.give_back`."""
        self.lobby.give_back(survivor)

    async def _close_unclaimed(self, survival: Survival) -> None:
        """End the sessions of an earlier process that nobody has gone on with in time."""
        while True:
            late = await self.lobby.late()
            line = Line(late.source)
            line.end()
            try:
                await self.stream(late.stream, line, resume=late.resumed())
            except (SourceError, EngineFull) as error:
                log.warning("session lost", session=late.session_id, error=str(error))
                survival.forget(late.session_id)

    async def _hear(self, name: str, source: Source, blocks: AsyncIterator[Block]) -> None:
        """A source of the configuration, already open."""
        slot = self.engine.acquire()
        try:
            await self._session_over(name, source, blocks, slot, None, returns="name")
        finally:
            self.engine.release(slot)

    async def _session_over(
        self,
        name: str,
        source: Source,
        blocks: AsyncIterator[Block],
        slot: int,
        tap: OnEvent | None,
        *,
        returns: Returns,
        form: str = "",
        resume: Resumed | None = None,
        opened: Callable[[], None] | None = None,
    ) -> None:
        """One session, from its source's first block to `session.closed`.

        One of the configuration goes on by its name, and why it failed is kept in `failures`.
        """
        called = returns != "name"
        if not called and (survivor := self.lobby.claim_source(name)) is not None:
            resume = survivor.resumed()
        session = self._session(name, source, slot, resume)
        outlives = source.live and returns != "never"
        live = Live(session, source.name, called, outlives, tap, form)
        self.sessions += 1
        if resume is not None:
            try:
                await self._go_on(live, resume)
            except SourceError as error:
                await self._give_up(live, resume, str(error))
                if called:
                    raise
                log.warning("session begins anew", stream=name, error=str(error))
                resume = None
                session = self._session(name, source, slot, None)
                live = Live(session, source.name, called, outlives, tap, form)
        if resume is None:
            log.info("session opened", stream=name, session=session.id, source=source.name)
            await self._emit(live, session.opened)
            for sink, error in self._failing.items():
                await self._emit(live, partial(session.warned, "sink.failed", f"{sink}: {error}"))
        live.saved -= max(self.config.session.save_s - FIRST_S, 0)
        self.live[session.id] = live
        if opened is not None:
            opened()
        try:
            failure = await self._heard_out(live, blocks)
        finally:
            del self.live[session.id]
            if live.saving is not None:
                live.saving.cancel()
        if failure is not None and not called:
            self.failures.append(failure)

    async def _give_up(self, live: Live, resume: Resumed, why: str) -> None:
        """End a session of an earlier process that cannot go on: its subscribers wait for that."""
        session = live.session
        session.abandon()
        session.go_on(resume.next_seq, resume.said)
        await self._emit(live, lambda: session.failed("session.lost", why))
        await self._emit(live, lambda: session.closed("error"))
        live.over = True
        if self.survival is not None:
            self.survival.forget(session.id)

    async def _go_on(self, live: Live, resume: Resumed) -> None:
        """Take up a session of an earlier process.

        Raises:
            SourceError: it was saved under other settings or another checkpoint.
        """
        session = live.session
        try:
            await self.engine.load(session.slot, session.restore(resume.data))
        except ValueError as error:
            raise SourceError(f"session {resume.session_id} cannot go on: {error}") from error
        live.position = resume.taken
        since = session.seq
        skipped = session.go_on(resume.next_seq, resume.said)
        saved = datetime.fromtimestamp(resume.saved, UTC).isoformat()
        self.feed.enter(
            Entry(
                session.id,
                session.stream_id,
                live.source,
                saved,
                audio_s=clock.seconds(session.received),
                next_seq=session.seq,
                gone=(resume.said[0].seq if resume.said else session.seq) - 1,
            )
        )
        for event in resume.said:
            self.feed.keep(event)
            if event.is_final and event.seq >= since:  # not every sink may have it
                await self.fanout.publish(event)
        log.info("session goes on", stream=session.stream_id, session=session.id)
        if skipped:
            first = max([since, *(event.seq + 1 for event in resume.said)])
            message = f"goes on after a kill, without numbers {first} to {resume.next_seq - 1}"
            await self._emit(live, partial(session.warned, "session.resumed", message))
        if not live.called:
            away = clock.samples(max(time() - resume.saved, 0))
            await self._take_in(live, Block(_NOTHING, monotonic(), away, "unplugged"))

    async def _heard_out(self, live: Live, blocks: AsyncIterator[Block]) -> str | None:
        """All blocks of a session, then its end."""
        session = live.session
        reason, failure = "ended", None
        try:
            async with aclosing(_until(self.stop, blocks)) as heard:
                async for block in heard:
                    await self._take_in(live, block)
            if self.stop.is_set():
                reason = "stopped"
        except SourceError as error:
            failure = str(error)
            log.error("source failed", stream=session.stream_id, error=failure)  # noqa: TRY400 - one line
            await self._emit(live, lambda: session.failed("source.failed", str(failure)))
            reason = "error"
        except EngineError:
            raise
        except Exception as error:
            # A fault of ours in one conversation must not end the others.
            failure = f"{session.stream_id}: {type(error).__name__}: {error}"
            log.exception("session failed", stream=session.stream_id, session=session.id)
            session.abandon()
            await self._emit(live, lambda: session.failed("internal", "an internal error"))
            reason = "error"
        if reason == "stopped" and self._outlives(live):
            await self._save(live, last=True)
            log.info("session kept", stream=session.stream_id, session=session.id)
        else:
            await self._advance(live, session.close())
            await self._emit(live, lambda: session.closed(reason))
            live.over = True
            if self.survival is not None:
                if live.saving is not None:
                    live.saving.cancel()  # or it would be there again
                self.survival.forget(session.id)
            log.info("session closed", stream=session.stream_id, session=session.id, reason=reason)
        self.audio_s += clock.seconds(session.received)
        self.lost_s += clock.seconds(session.lost)
        return failure

    async def _take_in(self, live: Live, block: Block) -> None:
        """One block: its events, its chunks through the engine, and now and then the session."""
        ready: list[Ready] = []

        def fed() -> list[Event]:
            events, chunks = live.session.feed(block)
            ready.extend(chunks)
            return events

        await self._emit(live, fed)
        await self._advance(live, ready)
        live.position = max(live.position, block.position)
        if block.flushed is not None:
            block.flushed()
        due = monotonic() - live.saved >= self.config.session.save_s
        # Soon again, while a save is under way: audio waits for nobody's disk.
        if due and self._outlives(live) and not self._saving.locked():
            await self._save(live)

    def _outlives(self, live: Live) -> bool:
        return self.survival is not None and live.resumable

    async def _save(self, live: Live, *, last: bool = False) -> None:
        """Take the session as it is now, and write it beside what goes on.

        Args:
            live: Its chunks have all been taken.
            last: Nothing goes on: wait until it is written.
        """
        assert self.survival is not None
        if live.saving is not None:
            await live.saving
        session = live.session
        await self._saving.acquire()
        try:
            encoder = await self.engine.freeze(session.slot)
            async with live.emitting:
                live.over = last
                own = session.freeze()
                survivor = Survivor(
                    session_id=session.id,
                    stream=session.stream_id,
                    token=session.resume_token,
                    source=live.source,
                    called=live.called,
                    form=live.form,
                    taken=live.position,
                    received=session.received,
                    saved=time(),
                    free=session.seq if last else session.seq + AHEAD,
                    data=b"",
                )
        except BaseException:
            self._saving.release()
            raise
        live.saved = monotonic()
        live.saving = asyncio.create_task(
            self._write(self.survival, survivor, lambda: own(encoder())), name=f"save:{session.id}"
        )
        live.saving.add_done_callback(lambda _: self._saving.release())
        if last:
            await live.saving

    @staticmethod
    async def _write(survival: Survival, survivor: Survivor, packed: Callable[[], bytes]) -> None:
        data = await asyncio.to_thread(packed)
        await survival.save(replace(survivor, data=data))

    def _session(self, name: str, source: Source, slot: int, resume: Resumed | None) -> Session:
        engine, settings = self.engine, self.config.session

        def tracks(stamp: Stamp) -> Tracks:
            return Tracks(
                self.settings,
                embed=engine.embed if engine.has_voice else None,
                vocabulary=engine.loaded.vocabulary,
                language=self.language,
                voiceprints=self.gallery,
                stamp=stamp,
                classes=engine.loaded.labels,
            )

        return Session(
            stream_id=name,
            source=source.name,
            checkpoint=engine.loaded.names,
            latency=Latency(
                chunk_ms=self.config.engine.chunk_ms, lookahead_ms=self.config.engine.lookahead_ms
            ),
            slot=slot,
            chunker=Chunker(
                engine.loaded.chunk_samples,
                engine.loaded.lead,
                receptive=engine.loaded.receptive,
                fill=clock.samples(settings.fill_ms / 1000),
            ),
            tracks=tracks,
            heartbeat_s=settings.heartbeat_s,
            health=self._health,
            resume=resume,
        )

    async def _advance(self, live: Live, ready: Sequence[Ready]) -> None:
        session = live.session
        for chunk in ready:
            frames = await self.batches.step(chunk)
            end_s = clock.seconds(chunk.start + len(chunk.samples))
            parts = session.takes(frames)
            while (events := await self._next(live, parts)) is not None:
                for event in events if chunk.valid else ():
                    if event.type in _TIMED:
                        behind_s = max(end_s - event.end, 0) + self.engine.stats.last_s
                        self.latency.observe(behind_s * 1000)

    async def _next(self, live: Live, parts: Iterator[list[Event]]) -> Sequence[Event] | None:
        """Make and publish the next part; None after the last.

        The tracks of one session compute in a turn of the event loop, and who waits for anything
        else is looked after in between.
        """
        async with self._computing:
            await asyncio.sleep(0)
        async with live.emitting:
            made = None if live.over else next(parts, None)
            return None if made is None else await self._publish(live, made)

    async def _emit(self, live: Live, make: Callable[[], Sequence[Event]]) -> None:
        """Make events and publish them, one maker of a session at a time; none after the last."""
        async with live.emitting:
            if not live.over:
                await self._publish(live, make())

    async def _publish(self, live: Live, made: Sequence[Event]) -> Sequence[Event]:
        """Everywhere, those that were not said before → them."""
        events = live.session.new(made)
        for event in events:
            self.events[event.type] += 1
            if event.type in _TIMED:
                self.lag.observe(event.lag_ms)
            line = self.feed.publish(event)
            if self.survival is not None and live.resumable:
                self.survival.note(event.session_id, event.seq, line.data)
            if self.on_event is not None:
                self.on_event(event)
            if live.tap is not None:
                live.tap(event)
            await self.fanout.publish(event)
        return events

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
    if engine.loaded.tracks_file is None:
        return config.tracks
    try:
        measured = TracksSettings.load(engine.loaded.tracks_file)
        return measured.over(config.tracks.model_dump(exclude_unset=True))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _language(settings: TracksSettings, engine: Engine) -> LanguageModel | None:
    """What words are decoded with; see `open_language_model`."""
    loaded = engine.loaded
    return open_language_model(settings.words, loaded.language_file, loaded.vocabulary)


@contextmanager
def _signals(stop: asyncio.Event, reload: asyncio.Event | None) -> Generator[None]:
    """SIGTERM and SIGINT drain, a second one cancels; SIGHUP reloads. Where there are signals."""
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
    if reload is not None:
        with suppress(NotImplementedError):
            loop.add_signal_handler(signal.SIGHUP, reload.set)
            caught.append(signal.SIGHUP)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
