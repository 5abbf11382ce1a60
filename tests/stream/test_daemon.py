import asyncio
import json
import os
import signal
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from sinks import SinkError
from stream.clock import SAMPLE_RATE
from stream.config import parse
from stream.daemon import run
from stream.engine import EngineFull
from stream.sources.source import SourceError
from stream.tracks import pipeline
from tests.stream.conftest import speechlike

FREE = {"wall_time", "lag_ms", "session_id", "resume_token", "source"}
"""What may differ between two runs of the same audio."""


@pytest.fixture(autouse=True)
def no_voices(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "no-data"))


def config(checkpoint, sources, sinks=None, engine=None, **keys):
    given = {
        "engine": {
            "checkpoint": checkpoint,
            "chunk_ms": 400,
            "lookahead_ms": 200,
            "left_ms": 2000,
            "device": "cpu",
            "threads": 1,
            **(engine or {}),
        },
        "sources": sources,
        "sinks": sinks or {},
        # Random heads hover: wide thresholds make them say something.
        "tracks": {"turns": {"onset": 0.5, "offset": 0.5, "min_on_ms": 60, "min_off_ms": 60}},
        "log": {"level": "error"},
        **keys,
    }
    return parse(given, where="test")


async def collected(settings, **keys):
    events = []
    summary = await run(settings, on_event=events.append, **keys)
    return events, summary


def content(events):
    """Events without what may differ between runs."""
    return [
        {key: value for key, value in e.model_dump(mode="json").items() if key not in FREE}
        for e in events
    ]


async def test_packets_of_any_size_give_the_same_events(checkpoint, audio):
    runs = []
    for block_ms in (7, 100, 333, 60_000):
        source = {"kind": "file", "path": audio, "block_ms": block_ms}
        settings = config(checkpoint, {"a": source}, session={"heartbeat_s": 0})
        events, summary = await collected(settings)
        runs.append(content(events))
        assert summary.audio_s == pytest.approx(8 + 777 / SAMPLE_RATE, abs=1e-4)
    assert all(other == runs[0] for other in runs[1:])
    types = [event["type"] for event in runs[0]]
    assert types[0] == "session.opened"
    assert types[-1] == "session.closed"
    assert {"turn.ended", "transcript.final"} <= set(types)


async def test_events_reach_the_sinks_in_order_and_without_a_gap(checkpoint, audio, tmp_path):
    sinks = {"log": {"kind": "jsonl", "path": tmp_path / "a.jsonl"}}
    settings = config(checkpoint, {"a": {"kind": "file", "path": audio}}, sinks)
    events, summary = await collected(settings)
    lines = await asyncio.to_thread((tmp_path / "a.jsonl").read_text)
    written = [json.loads(line) for line in lines.splitlines()]
    assert [each["seq"] for each in written] == list(range(len(written)))
    assert [each["type"] for each in written] == [event.type for event in events]
    assert summary.events["session.closed"] == 1
    assert sum(summary.events.values()) == len(events)
    assert summary.sessions == 1
    assert 0 < summary.latency_p50_ms <= summary.latency_p99_ms
    assert summary.realtime_factor > 0
    assert not summary.stopped


async def test_streams_side_by_side_say_what_each_says_alone(checkpoint, audio, tmp_path):
    soundfile.write(tmp_path / "b.wav", speechlike(5 * SAMPLE_RATE, 3), SAMPLE_RATE)
    sources = {
        "a": {"kind": "file", "path": audio},
        "b": {"kind": "file", "path": tmp_path / "b.wav"},
    }
    keys = {"session": {"heartbeat_s": 0}}
    both, summary = await collected(config(checkpoint, sources, **keys))
    assert summary.sessions == 2
    for name, source in sources.items():
        alone, _ = await collected(config(checkpoint, {name: source}, **keys))
        mine = [event for event in both if event.stream_id == name]
        assert [e.seq for e in mine] == list(range(len(mine)))
        finals = [
            (e.type, round(e.start, 2), round(e.end, 2)) for e in mine if e.type == "turn.ended"
        ]
        assert finals == [
            (e.type, round(e.start, 2), round(e.end, 2)) for e in alone if e.type == "turn.ended"
        ]


async def test_a_nan_in_the_audio_is_a_gap_and_the_session_goes_on(checkpoint, tmp_path):
    samples = speechlike(6 * SAMPLE_RATE)
    samples[40_000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    source = {"kind": "file", "path": tmp_path / "a.wav"}
    events, summary = await collected(config(checkpoint, {"a": source}))
    (gap,) = [event for event in events if event.type == "gap"]
    assert (gap.reason, gap.lost_samples) == ("non-finite", 6400)
    assert gap.start <= 40_000 / SAMPLE_RATE <= gap.end
    assert summary.lost_s == 0.4
    assert events[-1].end == 6.0
    assert any(e.type == "turn.ended" and e.start > gap.end for e in events)


async def test_a_source_that_cannot_be_opened_leaves_nothing_behind(checkpoint, audio, tmp_path):
    sinks = {"log": {"kind": "jsonl", "path": tmp_path / "a.jsonl"}}
    sources = {
        "a": {"kind": "file", "path": audio},
        "b": {"kind": "file", "path": tmp_path / "none.wav"},
    }
    with pytest.raises(SourceError, match=r"none\.wav: no such file"):
        await collected(config(checkpoint, sources, sinks))
    assert not (tmp_path / "a.jsonl").exists()


async def test_a_source_that_breaks_closes_its_session_and_spares_the_others(
    checkpoint, audio, tmp_path
):
    broken = tmp_path / "broken.flac"
    soundfile.write(broken, speechlike(160_000), 16_000)
    data = await asyncio.to_thread(broken.read_bytes)
    await asyncio.to_thread(broken.write_bytes, data[: len(data) // 2])
    sources = {"a": {"kind": "file", "path": audio}, "b": {"kind": "file", "path": broken}}
    events = []
    with pytest.raises(SourceError, match=r"broken\.flac: damaged after"):
        await run(config(checkpoint, sources), on_event=events.append)
    closed = {e.stream_id: e.reason for e in events if e.type == "session.closed"}
    assert closed == {"a": "ended", "b": "error"}
    (error,) = [e for e in events if e.type == "error"]
    assert (error.stream_id, error.code) == ("b", "source.failed")
    # What was heard before the damage counts.
    assert any(e.stream_id == "b" and e.type == "turn.ended" for e in events)


async def test_more_sources_than_slots_is_one_clear_error(checkpoint, audio):
    sources = {name: {"kind": "file", "path": audio} for name in "ab"}
    with pytest.raises(EngineFull, match=r"engine\.slots is 1, but there are 2 sources"):
        await collected(config(checkpoint, sources, engine={"slots": 1}))


async def test_a_sink_that_cannot_be_opened_is_one_clear_error(checkpoint, audio, tmp_path):
    sinks = {"log": {"kind": "jsonl", "path": tmp_path / "no" / "such" / "folder.jsonl"}}
    with pytest.raises(SinkError, match="sink log"):
        await collected(config(checkpoint, {"a": {"kind": "file", "path": audio}}, sinks))


def stopping(stop, after):
    """Calls ``stop`` at the ``after``-th event."""
    events = []

    def take(event):
        events.append(event)
        if len(events) == after:
            stop()

    return events, take


async def test_stop_drains_what_was_heard(checkpoint, audio, tmp_path):
    stop = asyncio.Event()
    events, take = stopping(stop.set, 4)
    sinks = {"log": {"kind": "jsonl", "path": tmp_path / "a.jsonl"}}
    source = {"kind": "file", "path": audio, "realtime": True, "block_ms": 20}
    summary = await run(config(checkpoint, {"a": source}, sinks), on_event=take, stop=stop)
    assert summary.stopped
    assert summary.audio_s < 8
    assert (events[-1].type, events[-1].reason) == ("session.closed", "stopped")
    assert events[-1].end == pytest.approx(summary.audio_s, abs=1e-4)
    open_turns = {e.turn_id for e in events if e.type == "turn.started"}
    assert open_turns == {e.turn_id for e in events if e.type == "turn.ended"}
    lines = await asyncio.to_thread((tmp_path / "a.jsonl").read_text)
    assert json.loads(lines.splitlines()[-1])["type"] == "session.closed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_too(checkpoint, audio, number):
    events, take = stopping(lambda: os.kill(os.getpid(), number), 3)
    source = {"kind": "file", "path": audio, "realtime": True, "block_ms": 20}
    before = signal.getsignal(number)
    summary = await run(config(checkpoint, {"a": source}), on_event=take)
    assert summary.stopped
    assert events[-1].reason == "stopped"
    assert signal.getsignal(number) == before or number == signal.SIGINT


async def test_a_second_signal_gives_up(checkpoint, audio):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    _, take = stopping(twice, 3)
    source = {"kind": "file", "path": audio, "realtime": True, "block_ms": 20}
    running = asyncio.create_task(run(config(checkpoint, {"a": source}), on_event=take))
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_file_is_not_read_faster_than_the_engine_computes(checkpoint, audio, monkeypatch):
    from stream import daemon

    ahead = []

    class Watching(daemon.Session):
        def takes(self, frames):
            yield from super().takes(frames)
            ahead.append(self.received - self.processed)

    monkeypatch.setattr(daemon, "Session", Watching)
    source = {"kind": "file", "path": audio, "block_ms": 400}
    await collected(config(checkpoint, {"a": source}))
    assert max(ahead) <= 6400


async def test_no_two_parts_of_the_tracks_compute_in_one_turn_of_the_loop(
    checkpoint, audio, monkeypatch
):
    from stream import daemon

    turn, turns = 0, []

    class Watching(daemon.Session):
        def takes(self, frames):
            for events in super().takes(frames):
                turns.append(turn)
                yield events

    async def count():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(daemon, "Session", Watching)
    monkeypatch.setattr(pipeline, "AT_ONCE", 2)
    counting = asyncio.create_task(count())
    sources = {name: {"kind": "file", "path": audio} for name in "abc"}
    await collected(config(checkpoint, sources))
    counting.cancel()
    assert len(turns) > 100
    assert len(set(turns)) == len(turns)


async def test_what_takes_long_is_loaded_before_a_stream_is_heard(checkpoint, audio):
    order = []
    sources = {"a": {"kind": "file", "path": audio}}
    await run(
        config(checkpoint, sources),
        on_event=lambda event: order.append(event.type),
        loaded=lambda: order.append("loaded"),
    )
    assert order[:2] == ["loaded", "session.opened"]


async def test_times_on_the_wire_are_ordered(checkpoint, audio):
    events, _ = await collected(config(checkpoint, {"a": {"kind": "file", "path": audio}}))
    assert all(e.end >= e.start for e in events)
    assert all(b.wall_time >= a.wall_time for a, b in pairwise(events))
    ended = [e.end for e in events if e.type == "turn.ended"]
    assert max(ended) <= events[-1].end
