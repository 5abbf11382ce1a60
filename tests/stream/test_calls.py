"""Callers' audio on its way to their sessions; the whole way over a socket is in test_server."""

import asyncio

import numpy as np
import pytest
from structlog.testing import capture_logs

from stream.calls import Call, Calls
from stream.clock import SAMPLE_RATE
from stream.sources.line import Line
from stream.sources.pcm import Form, PcmEar
from stream.sources.source import SourceError

MULAW = Form("mulaw", 8000)
LOUD, SILENT = b"\x80", b"\xff"
"""The loudest sample and silence (G.711)."""


def call(form, buffer_ms=10_000):
    return Call("x", Line("x", buffer_ms), PcmEar(form), resume_s=0)


async def heard(call):
    """Everything in its line → the blocks."""
    async with call.line.open() as blocks:
        return [block async for block in blocks]


async def test_the_end_of_fast_audio_costs_none_of_it():
    one = call(MULAW, buffer_ms=20)
    sending = asyncio.create_task(one.hear(LOUD * 4000))
    await asyncio.sleep(0)
    assert not sending.done()  # there is more than may wait
    one.finish()
    blocks = await heard(one)
    await sending
    assert sum(block.lost for block in blocks) == 0
    assert sum(len(block.samples) for block in blocks) == 8000
    assert blocks[-1].position == 4000


async def test_a_large_message_is_heard_a_second_at_a_time():
    one = call(Form("mulaw", 1000), buffer_ms=1000)
    sending = asyncio.create_task(one.hear(LOUD * 60_000))
    sending.add_done_callback(lambda _: one.finish())
    blocks = await heard(one)
    assert sum(len(block.samples) for block in blocks) == 60 * SAMPLE_RATE
    assert max(len(block.samples) for block in blocks) <= 2 * SAMPLE_RATE  # its resampler waits


async def test_what_was_said_before_a_gap_is_heard_before_it():
    one = call(MULAW)
    await one.hear(LOUD * 4000)
    one.go_on(6000)
    await one.hear(SILENT * 4000)
    one.finish()
    blocks = await heard(one)
    at = next(i for i, block in enumerate(blocks) if block.lost)
    assert blocks[at].lost == 4000
    before, after = (
        np.concatenate([block.samples for block in part]) for part in (blocks[:at], blocks[at:])
    )
    assert len(before) == len(after) == 8000
    assert np.abs(before[100:-100]).min() > 0.5
    assert np.abs(after).max() < 0.01
    assert blocks[at - 1].position == 4000
    assert blocks[-1].position == 10_000


async def test_a_call_that_cannot_begin_ends_no_other():
    class Intake:
        async def stream(self, name, source, *, opened, **_):
            if name == "bad":
                raise ArithmeticError("made up")
            opened()
            async with source.open() as blocks:
                async for _ in blocks:
                    pass

    with capture_logs() as logs:
        await bad_among_good(Intake())
    assert [(line["event"], line["stream"]) for line in logs] == [("call failed", "bad")]


async def bad_among_good(intake):
    async with asyncio.TaskGroup() as group:
        calls = Calls(
            group,
            intake,
            limit=4,
            limit_each=None,
            resume_s=lambda: 0.0,
            buffer_ms=1000,
            names=lambda: {"door"},
        )
        good = await calls.open("good", "test", MULAW)
        with pytest.raises(SourceError, match="an internal error"):
            await calls.open("bad", "test", MULAW)
        named = [await calls.open("door", "test", MULAW) for _ in range(2)]
        assert [one.name for one in named] == ["door-1", "door-2"]
        assert len(calls) == 3
        for one in (good, *named):
            one.finish()
        await calls.over()
    assert len(calls) == 0
