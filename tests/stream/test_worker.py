import asyncio
import contextlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stream.batcher import Ready
from stream.daemon import run
from stream.engine import Engine
from stream.inference import EngineError
from stream.log import LogSettings
from stream.worker import WorkerLost
from tests.stream.conftest import speechlike
from tests.stream.house import House, free_port
from tests.stream.test_daemon import config
from tests.stream.test_engine import heard, readies, settings
from tests.stream.test_operations import hung, systemd, until_up

__all__ = ["systemd"]


def workers(parent: int | None = None) -> list[int]:
    """Processes of a model: all, or those of a parent; one that has ended is none."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            owner = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if b"stream.worker" in (process / "cmdline").read_bytes() and parent in (None, owner):
                found.append(int(process.name))
    return found


async def ours() -> list[int]:
    return await asyncio.to_thread(workers, os.getpid())


def alike(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one.start, one.voice_delay) == (other.start, other.voice_delay)
        for head in ("activity", "voice", "ctc"):
            np.testing.assert_array_equal(getattr(one, head), getattr(other, head))


async def test_a_process_computes_what_a_thread_does_and_a_stream_moves_between(checkpoint):
    samples = speechlike(32_123)
    async with Engine(settings(checkpoint)) as engine:
        slot = engine.acquire()
        chunks = readies(engine, slot, samples)
        expected = await heard(engine, chunks)
    async with Engine(settings(checkpoint), apart=True) as engine:
        assert engine.loaded.names == ["diarization", "speaker", "ctc"]
        assert engine.acquire() == slot
        frames = await heard(engine, chunks[:4])
        saved = (await engine.freeze(slot))()
        frames += await heard(engine, chunks[4:])
        alike(frames, expected)
        assert engine.stats.audio_s == pytest.approx(32_123 / 16_000)
        assert engine.stats.compute_s > 0
        await engine.load(slot, saved)
        alike(await heard(engine, chunks[4:]), expected[4:])
        with pytest.raises(ValueError, match="expected the bytes of a saved slot"):
            await engine.load(slot, b"nothing")
    assert await ours() == []
    async with Engine(settings(checkpoint)) as engine:
        await engine.load(engine.acquire(), saved)
        alike(await heard(engine, chunks[4:]), expected[4:])


async def test_what_cannot_be_opened_is_said_by_the_process_and_it_ends(checkpoint):
    wrong = settings(checkpoint).model_copy(update={"device": "cuda:93"})
    with pytest.raises(EngineError, match="device: cuda:93 is not here"):
        async with Engine(wrong, apart=True):
            pass
    assert await ours() == []


class Said:
    """Whoever reads this from the line warns as a library would."""

    def __reduce__(self):
        return logging.warning, ("as a library",)


async def test_what_a_process_survives_and_what_not(checkpoint, capfd):
    LogSettings(format="json").configure()
    async with Engine(settings(checkpoint), apart=True) as engine:
        slot, (pid,) = engine.acquire(), await ours()
        with pytest.raises(RuntimeError, match="AttributeError") as caught:
            await engine._call(lambda: engine._inference.step(["nonsense"]))
        assert "in the model's process" in caught.value.__notes__[0]
        assert "_begin" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError):
            await engine._call(lambda: engine._inference.load(slot, Said()))
        *_, line = capfd.readouterr().err.splitlines()
        assert json.loads(line)["event"] == "as a library"  # in the form its parent uses
        # A service manager or a terminal tells everybody to stop; the parent still needs answers.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert os.getpgid(pid) != os.getpgid(0)
        samples = speechlike(engine.loaded.chunk_samples)
        ready = Ready(slot, 0, samples, len(samples), True)
        (frames,) = await engine.run([ready])
        assert frames.rows
        await engine.alive()
        waiting = asyncio.create_task(engine.lost())
        os.kill(pid, signal.SIGKILL)
        for lost in (waiting, engine.run([ready]), engine.alive()):
            with pytest.raises(WorkerLost, match="the model's process was ended by SIGKILL"):
                await lost


async def test_a_daemon_ends_with_the_process_of_its_model(checkpoint):
    port = free_port()
    settings = config(checkpoint, {}, server={"port": port})
    running = asyncio.create_task(run(settings, fail_fast=False, apart=True))
    async with House(port).http() as http:
        await until_up(http, running)
    (pid,) = await ours()
    os.kill(pid, signal.SIGKILL)
    with pytest.RaisesGroup(pytest.RaisesExc(WorkerLost, match="was ended by SIGKILL")):
        await running


async def test_a_daemon_ends_though_the_process_of_its_model_hangs(
    checkpoint, systemd, monkeypatch, tmp_path
):
    async def hang():
        (pid,) = await ours()
        os.kill(pid, signal.SIGSTOP)

    file = tmp_path / "events.jsonl"
    await hung(checkpoint, systemd, monkeypatch, file, hang, apart=True)
    assert await ours() == []


async def test_a_parent_loads_no_torch_and_its_process_ends_with_it_however(checkpoint, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speechlike(32_000), 16_000)
    script = f"""
import asyncio, contextlib, os, signal, sys
from pathlib import Path
from stream.config import parse
from stream.daemon import run
{inspect.getsource(workers)}
tree = {{
    "engine": {{"checkpoint": {checkpoint!r}, "device": "cpu", "threads": 1}},
    "sources": {{"talk": {{"kind": "file", "path": {str(tmp_path / "talk.wav")!r}}}}},
    "log": {{"level": "error"}},
}}

def hear(event):
    if event.type == "session.closed":
        print(*workers(os.getpid()), "torch" in sys.modules, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run(parse(tree, where="test"), on_event=hear, apart=True))
"""
    parent = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], stdout=subprocess.PIPE, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    pid, torch = parent.stdout.split()
    assert torch == b"False"

    while int(pid) in await asyncio.to_thread(workers):  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.01)
