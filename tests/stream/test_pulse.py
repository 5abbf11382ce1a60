import asyncio
import gc
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stream import pulse as pulse_module
from stream.pulse import Pulse, give_back, keep_loaded, trim
from stream.survival import Survival
from tests.stream.conftest import speechlike
from tests.stream.house import serving, talk, until

glibc = pytest.mark.skipif(sys.platform != "linux", reason="glibc's functions")
MIB = 1 << 20


def resident():
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def held():
    """The same without what is free: what a step worked in stays or goes as the allocator likes."""
    trim()
    return resident()


def test_what_is_loaded_is_no_longer_looked_through():
    loaded = [[number] for number in range(10_000)]
    try:
        keep_loaded()
        assert gc.get_freeze_count() >= len(loaded)
        assert len(gc.get_objects()) < len(loaded)
    finally:
        gc.unfreeze()


class TestLoop:
    async def test_what_holds_the_loop_up_is_its_lateness(self, monkeypatch):
        monkeypatch.setattr(pulse_module, "BEAT_S", 0.001)
        pulse = Pulse()
        beating = asyncio.create_task(pulse.beat())
        await until(lambda: pulse.lateness_ms.count > 3)
        before = pulse.lateness_ms.count
        time.sleep(0.2)  # noqa: ASYNC251 - that is what is measured
        await until(lambda: pulse.lateness_ms.count > before)
        beating.cancel()
        assert pulse.lateness_ms.quantile(1.0) > 150

    async def test_an_exception_nobody_took_is_counted_and_still_told(self):
        told, loop, pulse = [], asyncio.get_running_loop(), Pulse()
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))

        async def fail():
            raise RuntimeError("unseen")

        with pulse.counting():
            task = asyncio.create_task(fail())
            await until(task.done)
            del task
            loop.call_soon(lambda: 1 / 0)
            await until(lambda: pulse.faults == 2)
        assert "Task exception was never retrieved" in told
        loop.call_exception_handler({"message": "after"})
        assert (pulse.faults, told[-1]) == (2, "after")

    async def test_the_house_tells(self, checkpoint):
        async with serving(checkpoint) as house, house.http() as http:
            status = (await http.get("/v1/status")).json()
            metrics = (await http.get("/metrics")).text
        assert status["tasks"] > 3
        assert status["faults"] == 0
        assert "livesat_unhandled_exceptions_total 0.0" in metrics
        assert "livesat_loop_lag_p99_seconds" in metrics


@glibc
class TestMemory:
    async def test_what_was_freed_between_what_is_held_goes_back(self, monkeypatch):
        monkeypatch.setattr(pulse_module, "GIVE_BACK_S", 0.01)
        blocks = [np.ones(16_000, np.float32) for _ in range(2000)]
        full, held = resident(), blocks[::20]
        del blocks
        giving = asyncio.create_task(give_back())
        await until(lambda: full - resident() > 64 * MIB)
        giving.cancel()
        assert len(held) == 100

    def test_threads_share_two_arenas(self):
        script = """
import ctypes, threading
from stream.pulse import few_arenas
few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(8)
def take():
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
[each.start() for each in threads]
[each.join() for each in threads]
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert result.stdout.count("<heap nr=") == 2

    async def test_later_streams_make_the_engine_no_larger(self, checkpoint):
        from stream.batcher import Ready
        from stream.engine import Engine
        from stream.inference import EngineSettings

        # Half a minute of context in 64 slots, all of it written to: some 25 MiB.
        settings = EngineSettings(
            checkpoint=tuple(checkpoint),
            chunk_ms=5000,
            left_ms=30_000,
            slots=64,
            device="cpu",
            threads=1,
        )
        async with Engine(settings) as engine:
            before = await asyncio.to_thread(held)
            samples = speechlike(engine.loaded.chunk_samples)
            slots = [engine.acquire() for _ in range(64)]
            for at in range(0, 64, 16):
                for step in range(6):
                    await engine.run(
                        [
                            Ready(slot, step * len(samples), samples, len(samples), step == 0)
                            for slot in slots[at:][:16]
                        ]
                    )
            grown = await asyncio.to_thread(held) - before
            assert grown < 12 * MIB

    async def test_every_size_of_batch_is_warm(self, checkpoint, monkeypatch):
        from model.streaming import StreamingModel
        from stream.engine import Engine
        from stream.inference import EngineSettings

        sizes, step = [], StreamingModel.step
        monkeypatch.setattr(
            StreamingModel,
            "step",
            lambda model, chunk, *rest: sizes.append(len(chunk)) or step(model, chunk, *rest),
        )
        settings = EngineSettings(checkpoint=tuple(checkpoint), slots=40, max_batch=20)
        async with Engine(settings):
            pass
        assert set(sizes) == {*range(1, 17), 20}

    async def test_sessions_are_saved_one_at_a_time(self, checkpoint, tmp_path, monkeypatch):
        save, under_way, most = Survival.save, 0, []

        async def counted(self, survivor):
            nonlocal under_way
            under_way += 1
            most.append(under_way)
            try:
                await asyncio.sleep(0.02)
                await save(self, survivor)
            finally:  # a session that closes gives up its save
                under_way -= 1

        monkeypatch.setattr(Survival, "save", counted)
        session = {"heartbeat_s": 0, "state": tmp_path / "s.db", "save_s": 0.01}
        async with serving(checkpoint, session=session) as house:
            speech = speechlike(128_000)
            await asyncio.gather(*(talk(house, speech, f"/v1/audio?name=s{i}") for i in range(3)))
        assert len(most) >= 3
        assert max(most) == 1
