"""The live picture and the progress bar, from events made by hand."""

import datetime as dt
import io

import pytest
from rich.console import Console

from sinks.events import (
    Gap,
    Heartbeat,
    Latency,
    SessionOpened,
    Speaker,
    SpeakerIdentified,
    SpeakerRevised,
    TranscriptFinal,
    TranscriptPartial,
    TurnEnded,
    TurnStarted,
    Warning_,
    Word,
)
from stream.screen import Picture, Progress, Screen, bar, clock, overlap, ruler


def stamp(start, end, session="a"):
    return {
        "session_id": session,
        "stream_id": "mic",
        "seq": 0,
        "start": start,
        "end": end,
        "wall_time": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        "lag_ms": 740.0,
    }


def opened():
    latency = Latency(chunk_ms=500, lookahead_ms=240)
    return SessionOpened(
        **stamp(0, 0), source="a.wav", checkpoint=["c"], latency=latency, resume_token="r"
    )


def ended(turn_id, label, start, end, **more):
    return TurnEnded(**stamp(start, end), turn_id=turn_id, speaker=Speaker(label=label), **more)


def said(kind, turn_id, label, text, start, end):
    words = [
        Word(word=word, start=start, end=end, confidence=1, speaker=label) for word in text.split()
    ]
    return kind(**stamp(start, end), text=text, words=words, turn_id=turn_id)


def drawn(picture, width=80, height=24):
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(picture)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.99, "0:09"), (71.3, "1:11"), (3661, "1:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_overlap_is_where_two_lanes_are_active():
    assert overlap([[(0, 2), (5, 6)], [(1, 3)], [(1.5, 5.5)]]) == [(1, 3), (5, 5.5)]
    assert overlap([[(0, 1)], [(1, 2)]]) == []
    assert overlap([]) == []


def test_a_bar_has_half_cells_and_never_loses_a_short_span():
    assert bar([(0, 5)], 0, 10, 10) == "█████     "
    assert bar([(0.5, 1.5)], 0, 10, 10) == "▐▌        "
    assert bar([(7.1, 7.2)], 0, 10, 10) == "       ▌  "
    assert bar([(-5, 0), (10, 12)], 0, 10, 10) == " " * 10
    assert bar([(-5, 30)], 0, 10, 10) == "█" * 10


def test_lanes_that_touch_do_not_overlap_on_the_screen():
    left, right = bar([(0, 3.1)], 0, 10, 10), bar([(3.1, 6)], 0, 10, 10)
    assert not any(a != " " and b != " " for a, b in zip(left, right, strict=True))


def test_a_ruler_marks_every_ten_seconds():
    assert ruler(0, 60, 60).startswith("╵0:00     ╵0:10")
    assert len(ruler(3.3, 63.3, 47)) == 47


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_picture_fits_the_width_and_shows_every_speaker(width):
    picture = Picture(duration_s=70)
    for event in [
        opened(),
        ended("t1", "S1", 0, 4),
        ended("t2", "S2", 3, 9),
        said(TranscriptFinal, "t1", "S1", "good morning everyone", 0, 4),
    ]:
        picture.take(event)
    lines = drawn(picture, width)
    assert all(len(line) == width for line in lines)
    text = "\n".join(lines)
    assert "S1" in text
    assert "S2" in text
    assert "overlap" in text
    assert "4.0 s" in text
    assert "morning everyone" in text
    assert "a.wav" in text


def test_partial_words_give_way_to_final_ones():
    picture = Picture()
    picture.take(ended("t1", "S1", 0, 4))
    picture.take(said(TranscriptPartial, "t1", "S1", "god moaning", 0, 2))
    assert "god moaning" in "\n".join(drawn(picture))
    picture.take(said(TranscriptPartial, "t1", "S1", "good morn", 0, 2))
    picture.take(said(TranscriptFinal, "t1", "S1", "good morning", 0, 2))
    text = "\n".join(drawn(picture))
    assert "good morning" in text
    assert "moaning" not in text
    assert "morn " not in text


def test_an_open_turn_grows_with_the_clock():
    picture = Picture()
    picture.take(TurnStarted(**stamp(0, 1), turn_id="t1", speaker=Speaker(label="S1")))
    picture.take(
        Heartbeat(**stamp(5, 5), audio_received_s=6, audio_processed_s=5.5, realtime_factor=0.1)
    )
    assert picture.spans("S1", 0) == [(0, 5.5)]
    assert picture.speaking("S1")
    assert "RTF 0.100" in "\n".join(drawn(picture))


def test_a_merged_label_loses_its_lane():
    picture = Picture()
    for event in [ended("t1", "S1", 0, 4), ended("t2", "S2", 5, 8)]:
        picture.take(event)
    picture.take(
        SpeakerRevised(
            **stamp(5, 8), revision_of=["t2"], from_label="S2", to_label="S1", reason="merged"
        )
    )
    assert list(picture.lanes) == ["S1"]
    assert picture.lanes["S1"].talk_s == pytest.approx(7)
    assert picture.lanes["S1"].turns == 2


def test_a_known_person_is_named():
    picture = Picture()
    picture.take(ended("t1", "S1", 0, 4))
    picture.take(
        SpeakerIdentified(
            **stamp(0, 4), speaker="S1", identity="Nora", score=0.8, margin=0.3, evidence_s=4
        )
    )
    picture.take(
        SpeakerRevised(
            **stamp(4, 4), revision_of=["t1"], from_label="S1", to_label="Nora", reason="identified"
        )
    )
    assert list(picture.lanes) == ["S1"]
    assert "S1 Nora" in "\n".join(drawn(picture))


def test_many_speakers_keep_to_the_height():
    picture = Picture()
    for index in range(30):
        picture.take(ended(f"t{index}", f"S{index}", index, index + 1))
    lines = drawn(picture, height=24)
    assert len(lines) <= 24
    assert "more" in "\n".join(lines)
    assert "S29" in "\n".join(lines)


def test_lost_audio_and_warnings_are_seen():
    picture = Picture()
    picture.take(ended("t1", "S1", 0, 4))
    picture.take(Gap(**stamp(4, 5), lost_samples=16_000, reason="overflow"))
    text = "\n".join(drawn(picture))
    assert "lost" in text
    assert "1.000 s lost at 0:04: overflow" in text
    picture.take(Warning_(**stamp(5, 5), code="x", message="the broker is away"))
    assert "the broker is away" in "\n".join(drawn(picture))


def test_words_nobody_is_known_to_have_said_are_shown():
    picture = Picture()
    picture.take(said(TranscriptFinal, None, None, "hello there", 0, 1))
    assert "hello there" in "\n".join(drawn(picture))


def test_a_screen_draws_every_session_on_a_terminal():
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, height=40, color_system=None
    )
    with Screen(console, duration_s=10) as screen:
        screen.take(opened())
        screen.take(ended("t1", "S1", 0, 4))
        screen.take(
            TurnEnded(**stamp(0, 2, session="b"), turn_id="u1", speaker=Speaker(label="S9"))
        )
    text = console.file.getvalue()
    assert "S1" in text
    assert "S9" in text


def test_progress_counts_time_and_speakers():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Progress(console, duration_s=10) as view:
        view.take(ended("t1", "S1", 0, 4))
    assert "0:04  1 speaker" in console.file.getvalue()
