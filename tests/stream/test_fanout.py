import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import PrivateAttr

from sinks import JsonlSettings
from sinks.events import Event, parse
from sinks.sink import Disconnected, Rejected, Sink, SinkError, SinkSettings
from stream.fanout import Fanout, FanoutSettings, Spool
from tests.sinks.samples import Talk

LONG = 1_000_000.0


class Clock:
    """Time that passes only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[float] = []
        self._sleeping: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        wake = asyncio.get_running_loop().create_future()
        self._sleeping.append((self.now + seconds, wake))
        await wake

    async def advance(self, seconds: float) -> None:
        """Let time pass, and everyone it wakes do what they can."""
        end = self.now + seconds
        await settle()
        while due := [s for s in self._sleeping if s[0] <= end and not s[1].done()]:
            at, wake = min(due, key=lambda sleeper: sleeper[0])
            self.now = max(self.now, at)
            wake.set_result(None)
            await settle()
        self.now = end


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


class Recorder(SinkSettings, frozen=True):
    """A sink in memory; what goes wrong is in `script`, one error a call of open or send."""

    kind: Literal["recorder"] = "recorder"
    _got: list[Event] = PrivateAttr(default_factory=list)
    _opened: list[bool] = PrivateAttr(default_factory=list)
    _open_errors: deque[Exception | None] = PrivateAttr(default_factory=deque)
    _send_errors: deque[Exception | None] = PrivateAttr(default_factory=deque)
    _gate: asyncio.Event = PrivateAttr(default_factory=asyncio.Event)
    _lost: asyncio.Event = PrivateAttr(default_factory=asyncio.Event)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Sink]:
        if self._open_errors and (error := self._open_errors.popleft()):
            raise error
        self._opened.append(True)
        self._lost.clear()
        try:
            yield RecorderSink(self)
        finally:
            self._opened.append(False)

    def open(self) -> AbstractAsyncContextManager[Sink]:
        return self._open()

    @property
    def seqs(self) -> list[int]:
        return [event.seq for event in self._got]


class RecorderSink:
    def __init__(self, settings: Recorder) -> None:
        self._settings = settings

    async def send(self, event: Event) -> None:
        await self._settings._gate.wait()
        errors = self._settings._send_errors
        if errors and (error := errors.popleft()):
            raise error
        self._settings._got.append(event)

    async def lost(self) -> None:
        await self._settings._lost.wait()


def recorder(*, slow: bool = False, **more: Any) -> Recorder:
    made = Recorder(**more)
    if not slow:
        made._gate.set()
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fanout(clock: Clock) -> Callable[..., Fanout]:
    def make(sinks: dict[str, SinkSettings], *, fail_fast: bool = False, **settings: Any) -> Fanout:
        chosen = FanoutSettings(**({"drain_s": LONG} | settings))
        return Fanout(sinks, chosen, fail_fast=fail_fast, rng=random.Random(0), sleep=clock.sleep)

    return make


Make = Callable[..., Fanout]


async def test_every_sink_gets_what_it_wants_in_order(fanout: Make) -> None:
    talk = Talk()
    everything, finals = recorder(), recorder(partials=False)
    warnings = recorder(types=("warning",))
    sent = talk.every_type()
    async with fanout({"a": everything, "b": finals, "c": warnings}) as out:
        for event in sent:
            await out.publish(event)
    assert everything._got == sent
    assert finals._got == [event for event in sent if event.is_final]
    assert [event.type for event in warnings._got] == ["warning"]
    assert everything._opened == [True, False]
    assert out.statistics()["a"].sent == len(sent)


async def test_a_slow_sink_holds_up_nobody(fanout: Make) -> None:
    talk = Talk()
    slow, fast = recorder(slow=True), recorder()
    async with fanout({"slow": slow, "fast": fast}, queue=4) as out:
        for i in range(100):
            await out.publish(talk.warning() if i % 10 == 0 else talk.heard("…"))
        await settle()
        assert fast.seqs == list(range(100))
        assert slow.seqs == []
        statistics = out.statistics()["slow"]
        # 10 finals wait; the bound of 4 left the partials no room.
        assert statistics.queued == 10
        assert statistics.dropped_partials == 90
        slow._gate.set()
    assert slow.seqs == list(range(0, 100, 10))


async def test_back_off_doubles_up_to_a_bound_with_jitter(fanout: Make, clock: Clock) -> None:
    talk = Talk()
    sink = recorder()
    sink._open_errors.extend(SinkError("not there") for _ in range(8))
    async with fanout({"a": sink}, retry_first_s=1.0, retry_longest_s=10.0) as out:
        await out.publish(talk.warning())
        await clock.advance(100.0)
        assert sink.seqs == [0]
        assert out.statistics()["a"].retries == 8
        assert out.statistics()["a"].last_error == "not there"
    waits = clock.asked[:8]
    for wait, whole in zip(waits, [1, 2, 4, 8, 10, 10, 10, 10], strict=True):
        assert whole / 2 <= wait <= whole
    assert len(set(waits)) == 8


async def test_a_file_is_tried_again_within_five_seconds(fanout: Make, clock: Clock) -> None:
    class File(Recorder, frozen=True):
        path: Path = Path("events.jsonl")

    talk, file, broker = Talk(), File(), recorder()
    file._gate.set()
    for sink in (file, broker):
        sink._send_errors.extend(SinkError("disk full") for _ in range(12))
    waits = {}
    for name, sink in (("file", file), ("broker", broker)):
        clock.asked.clear()
        async with fanout({name: sink}) as out:
            await out.publish(talk.warning())
            await clock.advance(1000.0)
        waits[name] = max(seconds for seconds in clock.asked if seconds < LONG)
    assert 2 <= waits["file"] <= 4
    assert 15 <= waits["broker"] <= 30


async def test_a_lost_connection_is_opened_again_and_nothing_is_lost(
    fanout: Make, clock: Clock
) -> None:
    talk = Talk()
    sink = recorder()
    sink._send_errors.extend([None, Disconnected("gone"), None, OSError("reset"), None])
    async with fanout({"a": sink}) as out:
        for _ in range(4):
            await out.publish(talk.warning())
        await clock.advance(10.0)
        assert sink.seqs == [0, 1, 2, 3]
        assert sink._opened == [True, False] * 2 + [True]
        # Between two events too.
        sink._lost.set()
        await clock.advance(10.0)
        assert sink._opened == [True, False] * 3 + [True]


async def test_a_sink_that_cannot_take_an_event_now_keeps_it_without_end(
    fanout: Make, clock: Clock
) -> None:
    talk = Talk()
    sink = recorder()
    sink._send_errors.extend(SinkError("disk full") for _ in range(50))
    async with fanout({"a": sink}, retry_longest_s=1.0) as out:
        await out.publish(talk.warning())
        await out.publish(talk.warning())
        await clock.advance(100.0)
        assert sink.seqs == [0, 1]
        assert sink._opened == [True]


@pytest.mark.parametrize("error", [Rejected("denied"), KeyError("a bug")])
async def test_an_event_nobody_takes_is_set_aside(
    fanout: Make, clock: Clock, error: Exception
) -> None:
    talk = Talk()
    sink = recorder()
    sink._send_errors.extend([error] * 3)
    async with fanout({"a": sink}, reject_attempts=3) as out:
        await out.publish(talk.warning())
        await out.publish(talk.warning())
        while not sink.seqs:  # the traceback of a bug is made in a thread
            await clock.advance(10.0)
        assert sink.seqs == [1]
        assert out.statistics()["a"].rejected == 1


async def test_a_partial_that_failed_is_not_repeated(fanout: Make, clock: Clock) -> None:
    talk = Talk()
    sink = recorder()
    sink._send_errors.extend([SinkError("no"), Disconnected("no")])
    async with fanout({"a": sink}) as out:
        for _ in range(3):
            await out.publish(talk.heard("…"))
        await clock.advance(10.0)
        assert sink.seqs == [2]
        assert out.statistics()["a"].dropped_partials == 2


async def test_over_the_cap_the_oldest_final_goes(fanout: Make) -> None:
    talk = Talk()
    sink = recorder(slow=True)
    async with fanout({"a": sink}, queue=1, spool=3) as out:
        for _ in range(6):
            await out.publish(talk.warning())
        assert out.statistics()["a"].lost_finals == 3
        sink._gate.set()
    # The first was under way already.
    assert sink.seqs == [0, 4, 5]


async def test_over_the_cap_publishing_may_fail(fanout: Make) -> None:
    talk = Talk()
    slow, fast = recorder(slow=True), recorder()
    async with fanout({"slow": slow, "fast": fast}, spool=3, over_cap="fail") as out:
        for _ in range(3):
            await out.publish(talk.warning())
        with pytest.raises(SinkError, match="sink slow: 3 events wait for it, which is the cap"):
            await out.publish(talk.warning())
        slow._gate.set()
    assert slow.seqs == [0, 1, 2]
    assert fast.seqs == [0, 1, 2, 3]


async def test_fail_fast_opens_all_or_none(fanout: Make) -> None:
    good, bad = recorder(), recorder()
    bad._open_errors.append(SinkError("nobody there"))
    with pytest.raises(SinkError, match="sink bad: nobody there"):
        async with fanout({"good": good, "bad": bad}, fail_fast=True):
            pytest.fail("must not be entered")
    assert good._opened in ([], [True, False])


async def test_a_daemon_waits_for_a_sink_that_is_not_there_yet(fanout: Make, clock: Clock) -> None:
    talk = Talk()
    sink = recorder()
    sink._open_errors.append(SinkError("nobody there"))
    async with fanout({"a": sink}) as out:
        await out.publish(talk.warning())
        assert not out.statistics()["a"].connected
        await clock.advance(1.0)
        assert out.statistics()["a"].connected
        assert sink.seqs == [0]


async def test_the_drain_has_a_limit_and_says_what_it_left(fanout: Make, clock: Clock) -> None:
    talk = Talk()
    sink = recorder(slow=True)
    out = fanout({"a": sink}, fail_fast=True, drain_s=5.0)
    await out.__aenter__()
    for _ in range(3):
        await out.publish(talk.warning())
    await out.publish(talk.heard("…"))
    leaving = asyncio.ensure_future(out.__aexit__(None, None, None))
    await clock.advance(4.9)
    assert not leaving.done()
    await clock.advance(0.1)
    with pytest.raises(SinkError, match="3 events did not reach the sink a: there was no time"):
        await leaving
    assert sink._opened == [True, False]
    statistics = out.statistics()["a"]
    assert (statistics.lost_finals, statistics.dropped_partials) == (3, 1)
    assert not statistics.connected


async def test_closing_does_not_wait_out_a_back_off(fanout: Make, clock: Clock) -> None:
    talk = Talk()
    sink = recorder()
    sink._send_errors.append(SinkError("busy"))
    async with fanout({"a": sink}, retry_first_s=60.0, retry_longest_s=60.0) as out:
        await out.publish(talk.warning())
        await settle()
        assert sink.seqs == []
    assert sink.seqs == [0]
    assert clock.now == 0.0


async def test_closing_does_not_wait_for_a_sink_with_nothing_to_get(
    fanout: Make, clock: Clock
) -> None:
    sink = recorder()
    sink._open_errors.extend(SinkError("nobody there") for _ in range(100))
    async with fanout({"a": sink}):
        await settle()
    assert clock.now == 0.0


async def test_an_error_of_the_body_comes_through_and_finals_are_delivered(fanout: Make) -> None:
    talk = Talk()
    sink = recorder()

    async def body() -> None:
        async with fanout({"a": sink}, fail_fast=True) as out:
            await out.publish(talk.warning())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert sink.seqs == [0]


async def test_a_cancelled_body_still_delivers_finals(fanout: Make) -> None:
    talk = Talk()
    sink = recorder()
    inside = asyncio.Event()

    async def body() -> None:
        async with fanout({"a": sink}) as out:
            await out.publish(talk.warning())
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sink.seqs == [0]


async def test_no_sinks_at_all(fanout: Make) -> None:
    async with fanout({}, fail_fast=True) as out:
        await out.publish(Talk().warning())
    assert out.statistics() == {}


async def test_with_a_real_file(fanout: Make, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sent = Talk().every_type()
    async with fanout({"log": JsonlSettings(path=path)}, fail_fast=True) as out:
        for event in sent:
            await out.publish(event)
    assert [parse(line) for line in path.read_bytes().splitlines()] == sent


STEPS = st.lists(st.sampled_from(["final", "partial", "take", "settle", "drop"]), max_size=60)


@given(STEPS, st.integers(1, 6), st.integers(1, 6))
def test_spool_policy(steps: list[str], queue: int, cap: int) -> None:
    """Against a model: order is kept, and only what may give way does."""
    talk = Talk()
    spool = Spool(queue, cap)
    put: list[Event] = []
    settled: list[Event] = []
    under_way: Event | None = None
    dropped_by_hand = 0
    for step in steps:
        finals, waiting = spool.finals, len(spool)
        if step in {"final", "partial"}:
            event = talk.warning() if step == "final" else talk.heard("…")
            put.append(event)
            lost, dropped = spool.lost_finals, spool.dropped_partials
            spool.put(event)
            # Nothing gives way before there is a need.
            if waiting < queue and (step == "partial" or finals < cap):
                assert (spool.lost_finals, spool.dropped_partials) == (lost, dropped)
            if finals < cap:
                assert spool.lost_finals == lost
            assert spool.finals <= max(cap, 1 + (cap == 1 and under_way is not None))
            assert len(spool) <= max(queue, spool.finals + 1, waiting)
        elif step == "take":
            (taken,) = spool.take() or [None]
            assert under_way is None or taken is under_way
            under_way = taken
        elif step == "settle" and under_way is not None:
            spool.settle()
            settled.append(under_way)
            under_way = None
        elif step == "drop" and under_way is not None:
            assert spool.drop() is not under_way.is_final
            if not under_way.is_final:
                dropped_by_hand += 1
                under_way = None
    while events := spool.take():
        spool.settle()
        settled += events
    seqs = [event.seq for event in settled]
    assert seqs == sorted(set(seqs))
    finals_put = sum(event.is_final for event in put)
    finals_out = sum(event.is_final for event in settled)
    assert finals_put == finals_out + spool.lost_finals
    assert len(put) == len(settled) + spool.lost_finals + spool.dropped_partials
    assert spool.dropped_partials >= dropped_by_hand
