from itertools import pairwise

import numpy as np
import pytest

from sinks.events import Latency, SpeechStarted, TurnEnded
from stream.chunker import Chunker
from stream.session import Health, Session
from stream.sources.source import Block
from stream.tracks.frames import Frames

CHUNK = 1600


class Script:
    """Tracks that note what they are given and say one thing a step."""

    def __init__(self, stamp):
        self.stamp = stamp
        self.calls = []

    def steps(self, frames):
        self.calls.append(("step", frames.start, frames.nonfinite))
        yield [SpeechStarted(**self.stamp(frames.start, frames.start))]

    def flush(self, end):
        self.calls.append(("flush", end))
        turn = {"turn_id": "t1", "speaker": {"label": "S1"}}
        return [TurnEnded(**self.stamp(0, end), **turn)]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def session(clock):
    return Session(
        stream_id="desk",
        source="test",
        checkpoint=["a"],
        latency=Latency(chunk_ms=100, lookahead_ms=20),
        slot=3,
        chunker=Chunker(CHUNK, tail=2, fill=800),
        tracks=Script,
        heartbeat_s=0.2,
        health=lambda: Health(0.25, {"engine": 1}, 2),
        now=clock,
    )


def block(n, captured=100.0, **kwargs):
    return Block(np.ones(n, np.float32), captured, **kwargs)


def whole_life(session, blocks):
    """Feed, take at once, close → every event."""
    events = session.opened()

    def take(ready):
        return [e for r in ready for e in session.take(Frames(start=r.start))]

    for each in blocks:
        said, ready = session.feed(each)
        events += [*said, *take(ready)]
    return [*events, *take(session.close()), *session.closed("ended")]


def test_seq_has_no_gap_and_the_life_has_a_beginning_and_an_end(session):
    events = whole_life(session, [block(5000), block(300), block(2700)])
    assert [e.seq for e in events] == list(range(len(events)))
    assert events[0].type == "session.opened"
    assert events[-1].type == "session.closed"
    assert {e.session_id for e in events} == {session.id}
    assert {e.stream_id for e in events} == {"desk"}
    assert all(e.wall_time.tzinfo is not None for e in events)
    assert all(b.wall_time >= a.wall_time for a, b in pairwise(events))
    assert events[-1].totals == {
        "audio_s": 0.5,
        "lost_s": 0.0,
        "speakers": 1,
        "turns": 1,
        "words": 0,
        "gaps": 0,
        "events": len(events),
    }
    assert events[-1].end == 0.5


def test_two_sessions_share_neither_id_nor_token(session, clock):
    other = Session(
        stream_id="desk",
        source="test",
        checkpoint=[],
        latency=Latency(chunk_ms=100, lookahead_ms=20),
        slot=0,
        chunker=Chunker(CHUNK, 1),
        tracks=Script,
    )
    assert other.id != session.id
    assert other.resume_token != session.resume_token


def test_lag_is_counted_from_the_capture_of_the_sample_the_event_ends_with(session, clock):
    session.feed(block(8000, captured=50.0))
    session.feed(block(8000, captured=50.5))
    clock.now = 50.7
    assert session.stamp(0, 16_000)["lag_ms"] == pytest.approx(200)
    assert session.stamp(0, 12_000)["lag_ms"] == pytest.approx(450)
    assert session.stamp(0, 8000)["lag_ms"] == pytest.approx(700)
    assert session.stamp(0, 0)["lag_ms"] == pytest.approx(1200)
    clock.now = 40.0  # an event cannot precede its audio
    assert session.stamp(0, 16_000)["lag_ms"] == 0


def test_chunks_carry_the_slot_and_the_place(session):
    _, ready = session.feed(block(4000))
    assert [(r.slot, r.start, r.valid, r.first) for r in ready] == [
        (3, 0, 1600, True),
        (3, 1600, 1600, False),
    ]
    ready += session.close()
    assert [(r.start, r.valid) for r in ready[2:]] == [(3200, 800)]


def test_tracks_are_flushed_where_the_audio_ends_not_where_the_padding_does(session):
    whole_life(session, [block(4000)])
    assert session.tracks.calls[-1] == ("flush", 4000)


def test_a_long_gap_ends_the_segment_and_is_told_of(session):
    blocks = [block(2000), block(2000, lost=6000, reason="overflow")]
    events = whole_life(session, blocks)
    (gap,) = [e for e in events if e.type == "gap"]
    assert (gap.start, gap.end, gap.lost_samples) == (0.125, 0.5, 6000)
    assert gap.reason == "overflow"
    flushes = [call for call in session.tracks.calls if call[0] == "flush"]
    assert flushes == [("flush", 2000), ("flush", 10_000)]
    # To the tracks the new segment, aligned to the frame grid, joins nothing before it.
    assert ("step", 8000, True) in session.tracks.calls
    assert sum(call[-1] is True for call in session.tracks.calls) == 1
    assert events[-1].totals["lost_s"] == 0.375
    assert events[-1].totals["gaps"] == 1


def test_a_short_gap_is_told_of_and_heard_as_silence(session):
    events = whole_life(session, [block(2000), block(2000, lost=400, reason="overflow")])
    assert sum(e.type == "gap" for e in events) == 1
    assert sum(call[0] == "flush" for call in session.tracks.calls) == 1
    assert session.received == 4400


def test_a_source_that_stops_is_warned_of_once_and_what_was_heard_is_flushed(session):
    session.opened()
    session.feed(block(2000))
    stopped = block(0, reason="unplugged")
    events, ready = session.feed(stopped)
    assert [(e.type, e.code) for e in events] == [("warning", "source.unplugged")]
    assert ready[-1].valid < CHUNK
    assert session.feed(stopped) == ([], [])
    events, _ = session.feed(block(320, lost=16_000, reason="unplugged"))
    assert [(e.type, e.lost_samples) for e in events] == [("gap", 16_000)]
    events, _ = session.feed(stopped)  # … and again
    assert [e.type for e in events] == ["warning"]


def test_a_chunk_the_encoder_could_not_use_is_a_gap(session):
    session.opened()
    _, (ready,) = session.feed(block(CHUNK))
    gap, *_ = session.take(Frames(start=ready.start, nonfinite=True))
    assert (gap.type, gap.reason, gap.lost_samples) == ("gap", "non-finite", CHUNK)
    assert (gap.start, gap.end) == (0, 0.1)


def test_a_heartbeat_comes_every_so_much_audio(session):
    events = whole_life(session, [block(CHUNK) for _ in range(7)])
    beats = [e for e in events if e.type == "heartbeat"]
    assert [b.audio_processed_s for b in beats] == [0.2, 0.4, 0.6]
    assert beats[0].audio_received_s == 0.2
    assert (beats[0].realtime_factor, beats[0].queue_depths) == (0.25, {"engine": 1})
    assert beats[0].dropped_partials == 2


def test_what_was_said_before_a_kill_is_no_new_event(session):
    first, second, third = (session.warned("c", text)[0] for text in ("a", "b", "c"))
    assert session.go_on(100, [first, second, second]) == 97  # 3 to 99: nobody has them
    made = [session.warned("c", text)[0] for text in "axbcby"]
    told = session.new(made)
    assert [(e.seq, e.message) for e in told] == [(100, "x"), (101, "c"), (102, "y")]
    again = session.new([session.warned("c", "a")[0]])
    assert [(e.seq, e.message) for e in again] == [(103, "a")]  # it was said once before
    assert third.seq == 2
    (last,) = session.closed("ended")
    assert last.seq == 104
    assert last.totals["events"] == 3 + 5


def test_a_session_without_audio_opens_and_closes(session):
    events = whole_life(session, [])
    assert [e.type for e in events] == ["session.opened", "session.closed"]


def test_a_failure_is_an_event(session):
    (event,) = session.failed("source.failed", "gone")
    assert (event.type, event.code, event.message) == ("error", "source.failed", "gone")
