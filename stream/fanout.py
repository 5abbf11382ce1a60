"""Events → sinks: a queue and a task a sink, so that a slow or broken one holds up nobody else.

`Fanout.publish` puts the event into the queue of every sink that wants it and returns at once. What
a queue does when its sink does not keep up is the policy of `Spool`; what happens when a sink
fails is the policy of `Lane`:

========================  ===========================================================
the sink raises           then
========================  ===========================================================
`Disconnected`, OSError   it is opened again after a back-off, and the event sent again
`SinkError`               the event is sent again after a back-off, without end
`Rejected`, any other     sent again a few times, then alone, then set aside and counted
========================  ===========================================================

A partial that failed once is dropped: by the time it could be repeated it is out of date.
"""

import asyncio
import random
import traceback
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import structlog
from pydantic import BaseModel, Field

from sinks.events import Event, dump, parse
from sinks.sink import Batched, Disconnected, Rejected, Sink, SinkError, SinkSettings, Watched
from stream.outbox import Outbox, Row

DRAIN_RETRY_S: Final = 0.25
"""Longest back-off at the end, when there is no time to be patient, in seconds."""

FILE_RETRY_S: Final = 4.0
"""Longest back-off of a sink that writes a file: a disk with room again is met within 5 s."""

log = structlog.get_logger(__name__)

Sleep = Callable[[float], Awaitable[None]]
Trouble = Callable[[str, str | None], None]


class FanoutSettings(BaseModel, frozen=True, extra="forbid"):
    """How much is kept for a sink that does not keep up, and how long it is retried."""

    queue: int = Field(
        default=256, ge=1, description="Events a sink may lag behind before partials are dropped."
    )
    spool: int = Field(
        default=10_000, ge=1, description="Finals kept for a sink; what then is `over_cap`."
    )
    over_cap: Literal["drop_oldest", "fail"] = Field(
        default="drop_oldest",
        description="drop_oldest: the oldest final is lost, counted and logged; a subscriber sees "
        "it by seq. fail: publishing raises.",
    )
    drain_s: float = Field(
        default=5.0, ge=0, description="How long finals may take to be delivered at the end."
    )
    retry_first_s: float = Field(default=0.5, gt=0, description="Back-off after one failure.")
    retry_longest_s: float = Field(
        default=30.0,
        gt=0,
        description=f"Back-off after many; {FILE_RETRY_S:.0f} s at most for a sink that writes a "
        "file.",
    )
    outbox: Path | None = Field(
        default=None,
        description="SQLite file that keeps finals until their sinks have them, also when the "
        "daemon ends; null keeps them in memory.",
    )
    reject_attempts: int = Field(
        default=3, ge=1, description="Times an event is offered that the receiver refuses."
    )


@dataclass(slots=True)
class Statistics:
    """What became of the events of one sink."""

    queued: int = 0
    """Waiting now."""
    sent: int = 0
    dropped_partials: int = 0
    lost_finals: int = 0
    """Finals dropped over the cap of the spool, or not delivered by the end."""
    rejected: int = 0
    """Finals set aside because the receiver refuses them or the sink fails on them."""
    retries: int = 0
    """Failed attempts to open the sink or to send an event."""
    connected: bool = False
    last_error: str | None = None


class Spool:
    """What waits for one sink, in order, and what gives way when there is too much.

    Up to `queue` events nothing gives way. Beyond, the oldest partial does; a new partial is
    dropped if only finals wait. Finals are kept up to `spool` of them; then the oldest is dropped.
    What is under way is never dropped.
    """

    def __init__(self, queue: int, spool: int) -> None:
        self._queue = queue
        self._spool = spool
        self._next = 0
        self._waiting: OrderedDict[int, Event] = OrderedDict()
        self._partials: OrderedDict[int, None] = OrderedDict()
        self._under_way: dict[int, Event] = {}
        self.dropped_partials = 0
        self.lost_finals = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._under_way)

    @property
    def finals(self) -> int:
        """Finals that are not delivered yet."""
        under_way = sum(event.is_final for event in self._under_way.values())
        return len(self._waiting) - len(self._partials) + under_way

    @property
    def full(self) -> bool:
        """Whether another final costs the oldest."""
        return self.finals >= self._spool

    @property
    def depth(self) -> int:
        """Everything that waits."""
        return len(self)

    @property
    def hungry(self) -> bool:
        """Whether `refill` would bring more than there is."""
        return False

    async def refill(self) -> None:
        """Bring in what waits elsewhere."""

    def put(self, event: Event) -> None:
        """Add an event at the end."""
        if event.is_final and self.full and self._drop_oldest_final():
            self.lost_finals += 1
        if not self._make_room() and not event.is_final:
            self.dropped_partials += 1
            return
        self._add(event)

    def take(self, limit: int = 1) -> list[Event]:
        """What is to be sent: the same until it is settled; nothing if nothing waits."""
        if not self._under_way:
            for _ in range(min(limit, len(self._waiting))):
                key, event = self._waiting.popitem(last=False)
                self._partials.pop(key, None)
                self._under_way[key] = event
        return list(self._under_way.values())

    def settle(self) -> None:
        """What is under way is delivered or set aside: forget it."""
        assert self._under_way, "settled what was not taken"
        self._under_way.clear()

    def narrow(self) -> int:
        """Of the finals under way only the first stays so: the others wait again, before the rest.

        Returns:
            How many were.
        """
        first, *others = self._under_way.items()
        for key, event in reversed(others):
            self._waiting[key] = event
            self._waiting.move_to_end(key, last=False)
        self._under_way = dict([first])
        return 1 + len(others)

    def drop(self) -> bool:
        """Drop the partials under way.

        Returns:
            Whether nothing else was.
        """
        partials = [key for key, event in self._under_way.items() if not event.is_final]
        for key in partials:
            del self._under_way[key]
        self.dropped_partials += len(partials)
        return not self._under_way

    def clear(self) -> None:
        """Count what waits as lost, what is under way too."""
        self.lost_finals += self.finals
        self.dropped_partials += len(self) - self.finals
        self._waiting.clear()
        self._partials.clear()
        self._under_way.clear()

    def _make_room(self) -> bool:
        """Drop the oldest partial if the queue is full → whether there is room now."""
        if len(self) < self._queue:
            return True
        if not self._partials:
            return False
        oldest, _ = self._partials.popitem(last=False)
        del self._waiting[oldest]
        self.dropped_partials += 1
        return True

    def _add(self, event: Event) -> int:
        key, self._next = self._next, self._next + 1
        self._waiting[key] = event
        if not event.is_final:
            self._partials[key] = None
        return key

    def _drop_oldest_final(self) -> bool:
        for key in self._waiting:
            if key not in self._partials:
                del self._waiting[key]
                self._dropped(key)
                return True
        return False

    def _dropped(self, key: int) -> None:
        """A final was dropped over the cap."""


class DurableSpool(Spool):
    """The same with its finals in the outbox: they outlive the process.

    In memory are the first `queue` finals and the last; what is between is read when the first are
    delivered. While there is such a rest, partials are out of date before they could be sent, and
    dropped.
    """

    def __init__(self, queue: int, spool: int, outbox: Outbox, sink: str) -> None:
        super().__init__(queue, spool)
        self._outbox, self._sink = outbox, sink
        # key → row of the finals in memory; None: the disk took none.
        self._rows: dict[int, int | None] = {}
        # The rows that follow them. Which, and not how many: what is dropped while they are read,
        # or while the disk takes nothing, is then known for certain. Bound: `spool`.
        self._elsewhere = deque(outbox.found.pop(sink, ()))
        # The last of these. Without them who has nearly caught up would wait for the disk again and
        # again, while as much is added. Bound: `queue`.
        self._latest: OrderedDict[int, Event] = OrderedDict()

    @property
    def finals(self) -> int:
        """Finals that are not delivered yet."""
        return len(self._rows) + len(self._elsewhere)

    @property
    def depth(self) -> int:
        """Everything that waits."""
        return self.finals + len(self._partials)

    @property
    def hungry(self) -> bool:
        """Whether `refill` would bring more than there is."""
        return len(self._elsewhere) > 0 and len(self._rows) <= self._queue // 2

    async def refill(self) -> None:
        """Bring in what waits elsewhere."""
        while self._elsewhere:
            if self._elsewhere[0] in self._latest:
                self._bring_latest()
                return
            had = len(self._rows)
            rows = await self._outbox.read(self._sink, self._elsewhere[0] - 1, self._queue)
            for row in rows:
                self._bring(row)
            if not rows or len(self._rows) > had:
                return
            # All of them were dropped meanwhile: what follows is not to wait for a next event.

    def put(self, event: Event) -> None:
        """Add an event at the end."""
        if not event.is_final:
            if self._elsewhere:
                self.dropped_partials += 1
            else:
                super().put(event)
            return
        if self.full and self._drop_oldest_final():
            self.lost_finals += 1
        # While the disk takes nothing, memory is all there is.
        room = len(self._rows) < self._queue or self._outbox.failure is not None
        straight = room and not self._elsewhere
        n = self._outbox.append(self._sink, event.id, dump(event))
        if straight:
            self._make_room()
            self._rows[self._add(event)] = n
        elif n is not None:
            self._elsewhere.append(n)
            self._latest[n] = event
            if len(self._latest) > self._queue:
                self._latest.popitem(last=False)
        else:
            self.lost_finals += 1

    def settle(self) -> None:
        """What is under way is delivered or set aside: forget it."""
        for key in self._under_way:
            if key in self._rows:
                self._dropped(key)
        super().settle()

    def clear(self) -> None:
        """Leave finals to the next run; those that are not on disk are lost."""
        left = [n for n in self._rows.values() if n is not None]
        left = [n for n in (*left, *self._elsewhere) if n not in self._outbox.unwritten]
        self.lost_finals += self.finals - len(left)
        self._elsewhere = deque(left)
        self.dropped_partials += len(self._partials)
        self._waiting.clear()
        self._partials.clear()
        self._under_way.clear()
        self._rows.clear()
        self._latest.clear()

    def _bring_latest(self) -> None:
        while self._elsewhere and len(self._rows) < self._queue:
            n = self._elsewhere.popleft()
            self._rows[self._add(self._latest.pop(n))] = n

    def _bring(self, row: Row) -> None:
        while self._elsewhere and self._elsewhere[0] <= row.n:
            n = self._elsewhere.popleft()
            self._latest.pop(n, None)
            event = self._parsed(row) if n == row.n else None
            if event is not None:
                self._rows[self._add(event)] = n
            else:
                self._outbox.settle(n)
                self.lost_finals += 1

    def _parsed(self, row: Row) -> Event | None:
        try:
            return parse(row.data)
        except ValueError as error:  # of a later version, say: the others must not wait behind it
            reason = str(error)
            log.error("event in the outbox unreadable", sink=self._sink, error=reason)  # noqa: TRY400
            return None

    def _drop_oldest_final(self) -> bool:
        if super()._drop_oldest_final():
            return True
        if self._elsewhere:
            n = self._elsewhere.popleft()
            self._latest.pop(n, None)
            self._outbox.settle(n)
            return True
        return False

    def _dropped(self, key: int) -> None:
        """This final needs its row no longer."""
        n = self._rows.pop(key)
        if n is not None:
            self._outbox.settle(n)


class Lane:
    """The way to one sink: its spool, the task that empties it, and the retries."""

    def __init__(
        self,
        name: str,
        sink: SinkSettings,
        settings: FanoutSettings,
        *,
        rng: random.Random,
        sleep: Sleep,
        outbox: Outbox | None = None,
        trouble: Trouble | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.opened: asyncio.Future[Exception | None] = loop.create_future()
        """What came of the first attempt to open the sink: None, or the error."""
        self._sink = sink
        self._settings = settings
        writes_file = isinstance(getattr(sink, "path", None), Path)
        self._retry_longest_s = min(settings.retry_longest_s, FILE_RETRY_S if writes_file else inf)
        self._rng = rng
        self._sleep = sleep
        self._spool = (
            DurableSpool(settings.queue, settings.spool, outbox, name)
            if outbox is not None and sink.durable
            else Spool(settings.queue, settings.spool)
        )
        self._trouble = trouble
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._failures = 0
        self._troubled = False
        self._statistics = Statistics()
        self._log = log.bind(sink=name)

    @property
    def statistics(self) -> Statistics:
        """What became of the events so far; a copy."""
        return replace(
            self._statistics,
            queued=self._spool.depth,
            dropped_partials=self._spool.dropped_partials,
            lost_finals=self._spool.lost_finals,
        )

    @property
    def done(self) -> bool:
        """Whether nothing is left that must be delivered now."""
        return self._spool.finals == 0 or isinstance(self._spool, DurableSpool)

    def offer(self, event: Event) -> None:
        """Take an event in, if the sink wants it.

        Raises:
            SinkError: the spool is full, and the policy is to fail.
        """
        if not self._sink.wants(event):
            return
        if event.is_final and self._spool.full:
            if self._settings.over_cap == "fail":
                raise SinkError(
                    f"sink {self.name}: {self._spool.finals} events wait for it, which is the cap: "
                    f"{self._statistics.last_error or 'it is too slow'}"
                )
            if self._spool.lost_finals == 0:
                self._log.error("spool full, dropping the oldest final", cap=self._settings.spool)
        self._spool.put(event)
        self._wake.set()

    def close(self) -> None:
        """Let the task end once the spool is empty."""
        self._closing.set()
        self._wake.set()

    def abandon(self) -> int:
        """Count what waits as lost, when the time to deliver it is over.

        Returns:
            Finals that did not arrive, whatever the reason.
        """
        self._spool.clear()
        return self._spool.lost_finals + self._statistics.rejected

    async def run(self) -> None:
        """Open the sink and feed it, again and again, until closed."""
        while not (self._closing.is_set() and len(self._spool) == 0 and not self._spool.hungry):
            try:
                async with self._sink.open() as sink:
                    self._opened(None)
                    await self._feed(sink)
            except Exception as error:  # noqa: BLE001 - whatever a sink does, the others go on
                self._opened(error)
                await self._failed(error)
            else:
                return
            finally:
                self._statistics.connected = False
            await self._back_off()

    def _opened(self, error: Exception | None) -> None:
        self._statistics.connected = error is None
        if not self.opened.done():
            self.opened.set_result(error)
        if error is None and self._failures:
            self._log.info("sink open again", waiting=len(self._spool))

    async def _feed(self, sink: Sink) -> None:
        """Send what comes until closed and empty.

        Raises:
            Disconnected, OSError: the sink must be opened again.
        """
        lost = asyncio.ensure_future(sink.lost()) if isinstance(sink, Watched) else None
        try:
            attempts = 0
            alone = 0  # so many of what was refused together are offered one by one
            limit = sink.limit if isinstance(sink, Batched) else 1
            while True:
                if self._spool.hungry:
                    await self._spool.refill()
                events = self._spool.take(1 if alone else limit)
                if not events:
                    if self._closing.is_set():
                        return
                    await self._next(lost)
                    continue
                try:
                    if isinstance(sink, Batched):
                        await sink.send_many(events)
                    else:
                        await sink.send(events[0])
                except (Disconnected, OSError):
                    self._spool.drop()
                    raise
                except Exception as error:  # noqa: BLE001 - whatever a sink does, the others go on
                    await self._failed(error)
                    attempts += 1
                    endless = isinstance(error, SinkError) and not isinstance(error, Rejected)
                    if self._spool.drop():
                        attempts = 0
                    elif not endless and attempts >= self._settings.reject_attempts:
                        attempts = 0
                        together = self._spool.narrow()
                        if together > 1:
                            alone = together
                        else:
                            alone = max(alone - 1, 0)
                            self._set_aside(events)
                    await self._back_off()
                else:
                    attempts = self._failures = 0
                    alone = max(alone - 1, 0)
                    self._statistics.sent += len(events)
                    self._spool.settle()
                    self._well()
        finally:
            if lost is not None:
                lost.cancel()

    async def _next(self, lost: "asyncio.Future[None] | None") -> None:
        """Wait for an event or the end.

        Raises:
            Disconnected: the sink lost its receiver first.
        """
        self._wake.clear()
        wake = asyncio.ensure_future(self._wake.wait())
        try:
            waiting = {wake} if lost is None else {wake, lost}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wake.cancel()
        if lost is not None and lost.done():
            raise Disconnected("the connection was lost") from lost.exception()

    def _set_aside(self, events: Sequence[Event]) -> None:
        self._spool.settle()
        for event in events:
            if event.is_final:
                self._statistics.rejected += 1
                error = self._statistics.last_error
                self._log.error("event set aside", id=event.id, type=event.type, error=error)

    def _well(self) -> None:
        """The sink takes events: say so if it was otherwise."""
        if self._troubled:
            self._troubled = False
            if self._trouble is not None:
                self._trouble(self.name, None)

    async def _failed(self, error: Exception) -> None:
        self._failures += 1
        if not self._troubled:
            self._troubled = True
            if self._trouble is not None:
                self._trouble(self.name, str(error) or type(error).__name__)
        self._statistics.retries += 1
        self._statistics.last_error = str(error) or type(error).__name__
        more: dict[str, str] = {}
        if not isinstance(error, SinkError | OSError):
            # A bug, then. A traceback reads source files: not on the event loop.
            lines = await asyncio.to_thread(traceback.format_exception, error)
            more["exception"] = "".join(lines)
        self._log.warning(
            "sink failed",
            error=self._statistics.last_error,
            failures=self._failures,
            waiting=len(self._spool),
            **more,
        )

    async def _back_off(self) -> None:
        """Wait twice as long as the last time, give or take; closing cuts it short."""
        doubled = self._settings.retry_first_s * 2.0 ** min(self._failures - 1, 32)
        delay = min(doubled, self._retry_longest_s)
        # Half of it is jitter: a broker that comes back is not met by everyone at once.
        delay *= self._rng.uniform(0.5, 1.0)
        if self._closing.is_set():
            await self._sleep(min(delay, DRAIN_RETRY_S))
            return
        pause = asyncio.ensure_future(self._sleep(delay))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((pause, closing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            closing.cancel()


class Fanout:
    """Delivers every event to every sink that wants it.

    >>> async with Fanout({"log": JsonlSettings(path="events.jsonl")}) as fanout:
    ...     await fanout.publish(event)

    On leaving, what waits is delivered within `drain_s`. The events of one sink keep their order.

    Args:
        sinks: settings by name; the name stands in logs and statistics.
        settings: bounds and retries.
        fail_fast: raise on entry if a sink cannot be opened at the first attempt, and on leaving if
            a final was not delivered: for a command that ends. Otherwise both are retried, logged
            and counted: for a daemon.
        rng: source of the back-off's jitter.
        sleep: waits for so many seconds; tests pass a clock of their own.
        trouble: called with the name of a sink and the error when it begins to fail, and with None
            when it takes events again.
    """

    def __init__(
        self,
        sinks: Mapping[str, SinkSettings],
        settings: FanoutSettings | None = None,
        *,
        fail_fast: bool = False,
        rng: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
        trouble: Trouble | None = None,
    ) -> None:
        self._trouble = trouble
        self._stack = AsyncExitStack()
        self._outbox: Outbox | None = None
        self._sinks = dict(sinks)
        self._settings = settings or FanoutSettings()
        self._fail_fast = fail_fast
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._lanes: dict[str, Lane] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        """Start a task for every sink.

        Raises:
            SinkError: with `fail_fast`, the first sink that cannot be opened; none is left open.
                The outbox cannot be used.
        """
        if self._settings.outbox is not None:
            durable = [name for name, sink in self._sinks.items() if sink.durable]
            self._outbox = await self._stack.enter_async_context(
                Outbox.open(self._settings.outbox, durable)
            )
        await self._group.__aenter__()
        for name, sink in self._sinks.items():
            lane = Lane(
                name,
                sink,
                self._settings,
                rng=self._rng,
                sleep=self._sleep,
                outbox=self._outbox,
                trouble=self._trouble,
            )
            self._lanes[name] = lane
            self._tasks[name] = self._group.create_task(lane.run(), name=f"sink:{name}")
        if self._fail_fast:
            try:
                await self._all_open()
            except BaseException:
                for task in self._tasks.values():
                    task.cancel()
                await self._group.__aexit__(None, None, None)
                await self._stack.aclose()
                raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Deliver what waits, within `drain_s`, and close the sinks.

        Raises:
            SinkError: with `fail_fast`, finals did not reach a sink.
        """
        for name, lane in self._lanes.items():
            lane.close()
            if lane.done and not lane.statistics.connected:
                self._tasks[name].cancel()  # nothing is lost if it never opens
        # Our tasks will have ended: only a cancellation concerns the group, which wraps the rest.
        cancelled = exc if isinstance(exc, asyncio.CancelledError) else None
        try:
            await self._drain()
        except asyncio.CancelledError as error:
            cancelled = error
        try:
            await self._group.__aexit__(cancelled and type(cancelled), cancelled, None)
        finally:
            await self._stack.aclose()
        failures: list[str] = []
        for name, lane in self._lanes.items():
            missing = lane.abandon()
            if missing:
                why = lane.statistics.last_error or "there was no time"
                log.error("events not delivered", sink=name, events=missing, error=why)
                failures.append(f"{missing} events did not reach the sink {name}: {why}")
        if failures and self._fail_fast and exc is None:
            raise SinkError("; ".join(failures))

    async def publish(self, event: Event) -> None:
        """Put one event into the queue of every sink that wants it; waits for none of them.

        Raises:
            SinkError: with ``over_cap: fail``, a sink's spool is full; the others have the event.
        """
        full: SinkError | None = None
        for lane in self._lanes.values():
            try:
                lane.offer(event)
            except SinkError as error:
                full = full or error
        if full is not None:
            raise full
        # A producer that never waits would not let the sinks run.
        await asyncio.sleep(0)

    def statistics(self) -> dict[str, Statistics]:
        """What became of the events so far, by the name of the sink."""
        return {name: lane.statistics for name, lane in self._lanes.items()}

    async def _all_open(self) -> None:
        for name, lane in self._lanes.items():
            error = await lane.opened
            if isinstance(error, SinkError):
                raise SinkError(f"sink {name}: {error}") from None
            if error is not None:
                raise error

    async def _drain(self) -> None:
        if not self._tasks:
            return
        limit = asyncio.ensure_future(self._sleep(self._settings.drain_s))
        try:
            waiting = set(self._tasks.values())
            while waiting and not limit.done():
                await asyncio.wait({*waiting, limit}, return_when=asyncio.FIRST_COMPLETED)
                waiting = {task for task in waiting if not task.done()}
        finally:
            limit.cancel()
            for task in self._tasks.values():
                task.cancel()
