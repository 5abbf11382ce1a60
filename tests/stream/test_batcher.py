import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.batcher import Batcher, Batches, Ready
from stream.tracks.frames import Frames

SILENCE = np.zeros(320, np.float32)


def ready(slot, start=0):
    return Ready(slot, start, SILENCE, 320)


def test_a_lone_session_does_not_wait_for_company():
    batcher = Batcher(wait_ms=10)
    batcher.add(ready(0), now=1.0)
    assert [r.slot for r in batcher.take(1.0, active=1)] == [0]
    assert len(batcher) == 0


def test_a_batch_waits_for_sessions_that_may_join_it_but_not_for_ever():
    batcher = Batcher(wait_ms=10)
    batcher.add(ready(0), now=1.0)
    assert batcher.take(1.005, active=3) == []
    batcher.add(ready(1), now=1.006)
    assert batcher.due() == pytest.approx(1.010)
    assert [r.slot for r in batcher.take(1.010, active=3)] == [0, 1]
    assert batcher.due() is None


def test_a_batch_with_everyone_in_it_leaves_at_once():
    batcher = Batcher(wait_ms=1000)
    for slot in (2, 0, 1):
        batcher.add(ready(slot), now=1.0)
    assert [r.slot for r in batcher.take(1.0, active=3)] == [2, 0, 1]


def test_a_full_batch_takes_the_oldest():
    batcher = Batcher(max_batch=2, wait_ms=1000)
    for slot in range(3):
        batcher.add(ready(slot), now=float(slot))
    assert [r.slot for r in batcher.take(2.0, active=9)] == [0, 1]
    assert batcher.take(2.0, active=9) == []
    assert [r.slot for r in batcher.take(3.0, active=9)] == [2]


def test_a_chunk_whose_session_gave_up_is_forgotten():
    batcher = Batcher()
    gone, kept = ready(0), ready(1)
    batcher.add(gone, 1.0)
    batcher.add(kept, 1.0)
    batcher.discard(gone)
    batcher.discard(gone)
    assert batcher.take(9.0, active=1) == [kept]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), max_size=40), st.integers(1, 4))
def test_no_chunk_is_lost_doubled_or_out_of_order(arrivals, max_batch):
    batcher = Batcher(max_batch=max_batch, wait_ms=5)
    out, now = [], 0.0
    for number, (slot, later_ms) in enumerate(arrivals):
        now += later_ms / 1000
        batcher.add(ready(slot, number), now)
        due = batcher.due()
        assert due is not None
        batch = batcher.take(now, active=5)
        assert batch or now < due
        out.append(batch)
    while len(batcher):
        now += 0.01
        out.append(batcher.take(now, active=5))
        assert out[-1]
    for batch in out:
        assert len(batch) <= max_batch
        assert len({r.slot for r in batch}) == len(batch)
    taken = [r for batch in out for r in batch]
    assert sorted(r.start for r in taken) == list(range(len(arrivals)))
    for slot in range(5):
        starts = [r.start for r in taken if r.slot == slot]
        assert starts == sorted(starts)


@pytest.mark.parametrize("settings", [{"max_batch": 0}, {"wait_ms": -1}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        Batcher(**settings)


async def gathered(run, sessions, wait_ms=1000.0):
    batches = Batches(run, Batcher(wait_ms=wait_ms), lambda: len(sessions))
    serving = asyncio.create_task(batches.serve())
    try:
        return await asyncio.gather(*(batches.step(r) for r in sessions), return_exceptions=True)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_sessions_share_a_batch_and_get_their_own_frames():
    sizes = []

    async def run(batch):
        sizes.append(len(batch))
        return [Frames(start=r.start) for r in batch]

    frames = await gathered(run, [ready(slot, slot * 320) for slot in range(3)])
    assert [f.start for f in frames] == [0, 320, 640]
    assert sizes == [3]


async def test_an_engine_that_fails_fails_the_sessions_of_that_batch():
    async def run(batch):
        raise RuntimeError("out of memory")

    errors = await gathered(run, [ready(0), ready(1)])
    assert [str(error) for error in errors] == ["out of memory"] * 2


async def test_a_session_that_is_cancelled_leaves_its_place():
    started, finish = asyncio.Event(), asyncio.Event()

    async def run(batch):
        started.set()
        await finish.wait()
        return [Frames(start=r.start) for r in batch]

    batches = Batches(run, Batcher(max_batch=1, wait_ms=0), lambda: 3)
    serving = asyncio.create_task(batches.serve())
    under_way = asyncio.create_task(batches.step(ready(0)))
    await started.wait()
    waiting = asyncio.create_task(batches.step(ready(1)))
    patient = asyncio.create_task(batches.step(ready(2, 640)))
    await asyncio.sleep(0)
    for task in (under_way, waiting):
        task.cancel()
    await asyncio.gather(under_way, waiting, return_exceptions=True)
    assert len(batches) == 1
    finish.set()
    assert (await patient).start == 640
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
