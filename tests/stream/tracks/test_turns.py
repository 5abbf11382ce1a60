import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.clock import HOP
from stream.tracks.frames import Frames
from stream.tracks.settings import TracksSettings
from stream.tracks.turns import Turns
from tests.stream.tracks.scenes import (
    Stamper,
    Talk,
    embed,
    finals,
    revised,
    scene,
    split,
    turns,
    voices,
)

SETTINGS = TracksSettings()


def run(frames, config=SETTINGS, *, cuts=(), embed=embed):
    track = Turns(config, embed, Stamper())
    events = []
    for piece in split(frames, cuts):
        events += track.step(piece)
    events += track.flush(frames.end)
    assert [event.seq for event in events] == list(range(len(events)))
    return events


def quiet(activity):
    return Frames(start=0, activity=np.asarray(activity, np.float32))


def offline(probabilities, config):
    """Hysteresis, then pauses filled, then short runs dropped: on the whole signal at once.

    A frame counts for speech by its probability, and for a pause by what that lacks of the offset.
    """
    on, runs, pause = False, [], 0.0
    for index, p in enumerate(probabilities):
        on = p >= (config.offset if on else config.onset)
        if not on:
            pause += 20 * max(0, 1 - p / config.offset)
            continue
        longest = config.min_off_ms
        if not runs or pause >= longest or 20 * (index - runs[-1][1]) >= 4 * longest:
            runs.append([index, index, 0.0])
        runs[-1][1] = index + 1
        runs[-1][2] += 20 * p
        pause = 0.0
    return [(a, b) for a, b, speech in runs if speech >= config.min_on_ms]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.125, 0.375, 0.4375, 0.5, 0.75, 1.0]), st.integers(1, 30)),
        max_size=12,
    )
)
def test_turns_are_exact_to_the_frame(pieces):
    probabilities = [p for p, n in pieces for _ in range(n)]
    probabilities = [float(np.float32(p)) for p in probabilities]
    activity = np.zeros((len(probabilities), 2), np.float32)
    activity[:, 1] = probabilities
    events = run(quiet(activity), embed=None)
    expected = [("S2", a, b) for a, b in offline(probabilities, SETTINGS.turns)]
    assert turns(events) == expected
    opened = [round(e.start * 50) for e in events if e.type == "turn.started"]
    assert opened == [a for _, a, _ in expected]


def test_doubt_about_the_channel_is_no_doubt_about_speech():
    """Half here and half there is one speaker, on the channel that talked before."""
    activity = np.full((200, 3), 0.01, np.float32)
    activity[20:120, 1] = 0.9
    activity[60:100] = [0.45, 0.4, 0.01]
    assert turns(run(quiet(activity), embed=None)) == [("S2", 20, 120)]


def test_doubt_about_the_channel_is_no_doubt_about_how_many_talk():
    """Thirds add up: one talks, then two do, wherever they are."""
    activity = np.full((200, 3), 0.01, np.float32)
    activity[20:60] = [0.05, 0.9, 0.05]
    activity[60:80] = [0.3, 0.5, 0.3]
    activity[80:120] = [0.5, 0.6, 0.55]
    assert turns(run(quiet(activity), embed=None)) == [("S2", 20, 120), ("S3", 80, 120)]


def test_a_channel_takes_over_with_a_lead():
    activity = np.full((200, 2), 0.01, np.float32)
    activity[20:60] = [0.9, 0.1]
    activity[60:100] = [0.3, 0.45]  # not enough of a lead
    activity[100:150] = [0.2, 0.45]
    assert turns(run(quiet(activity), embed=None)) == [("S1", 20, 100), ("S2", 100, 150)]


def test_overlap_has_its_own_thresholds():
    config = SETTINGS.over({"turns": {"overlap_onset": 0.6, "overlap_offset": 0.5}})
    activity = np.full((200, 2), 0.01, np.float32)
    activity[20:150, 0] = 0.9
    activity[60:100, 1] = [0.65] * 10 + [0.75] * 10 + [0.65] * 10 + [0.55] * 10
    assert turns(run(quiet(activity), config, embed=None)) == [("S1", 20, 150), ("S2", 70, 90)]


def test_speech_starts_and_ends_around_turns_that_overlap():
    frames = scene([Talk(0, 10, 80, 0), Talk(1, 60, 120, 1)], 200)
    events = run(frames)
    spoken = [e.type for e in events if e.type != "turn.updated"]
    assert spoken == [
        "speech.started",
        "turn.started",
        "turn.started",
        "turn.ended",
        "turn.ended",
        "speech.ended",
    ]
    assert turns(events) == [("S1", 10, 80), ("S2", 60, 120)]
    assert [e.overlap for e in events if e.type == "turn.ended"] == [True, True]
    assert [e.overlap for e in events if e.type == "turn.started"] == [False, True]
    ended = events[-1]
    assert (round(ended.start * 50), round(ended.end * 50)) == (10, 120)


def test_a_remark_within_a_turn_is_told_by_what_the_turn_does_not_explain():
    """It has no frame of its own, and its channel was another's last."""
    config = SETTINGS.over({"speakers": {"channel_bonus": 0.5, "channel_malus": 0.0}})
    told = [Talk(0, 10, 110, 0), Talk(1, 120, 220, 1), Talk(2, 230, 330, 2)]
    events = run(scene([*told, Talk(0, 340, 500, 0), Talk(2, 370, 400, 1)], 560), config)
    assert turns(events) == [
        ("S1", 10, 110),
        ("S2", 120, 220),
        ("S3", 230, 330),
        ("S1", 340, 500),
        ("S3", 370, 400),
    ]


def test_a_blip_beside_a_turn_is_no_overlap():
    events = run(scene([Talk(0, 10, 80, 0), Talk(1, 40, 44, 1)], 150))
    assert [e.overlap for e in events if e.type == "turn.ended"] == [False]


def test_four_speakers_on_three_channels_keep_their_labels():
    talks, frame = [], 5
    order = [0, 1, 2, 0, 3, 1, 3, 2, 0, 1, 2, 3]
    for turn, voice in enumerate(order):
        talks.append(Talk(voice, frame, frame + 100 + 7 * turn, turn % 3))
        frame += 140 + 7 * turn
    events = run(scene(talks, frame + 50, noise=0.4))
    assert [label for label, _, _ in turns(events)] == [f"S{voice + 1}" for voice in order]
    assert not [e for e in events if e.type == "speaker.revised"]
    final = next(e for e in reversed(events) if e.type == "turn.ended")
    assert final.speaker.score > 0.8
    assert final.speaker.margin > 0.5


def test_any_number_of_speakers():
    talks = [Talk(voice % 8, 150 * voice + 5, 150 * voice + 120) for voice in range(16)]
    events = run(scene(talks, 16 * 150 + 50))
    assert [label for label, _, _ in turns(events)] == [f"S{v % 8 + 1}" for v in range(16)]


def test_two_who_talk_at_once_are_two_even_with_one_voice():
    events = run(scene([Talk(0, 10, 200, 0), Talk(0, 100, 300, 1)], 400))
    assert [label for label, _, _ in turns(events)] == ["S1", "S2"]


def test_a_short_turn_makes_no_speaker():
    """0.5 s is too little for a new voice: tentatively the nearest, and no speaker is made."""
    events = run(scene([Talk(0, 10, 150, 0), Talk(1, 200, 225, 1)], 300))
    assert [label for label, _, _ in turns(events)] == ["S1", "S1"]


def test_a_short_turn_moves_when_its_speaker_appears():
    frames = scene([Talk(0, 10, 150, 0), Talk(1, 200, 225, 1), Talk(1, 400, 550, 2)], 700)
    events = run(frames)
    assert [label for label, _, _ in turns(events)] == ["S1", "S1", "S2"]
    assert [label for label, _, _ in revised(events)] == ["S1", "S2", "S2"]
    revision = next(e for e in events if e.type == "speaker.revised")
    assert revision.reason == "split"


def test_two_labels_that_are_one_are_merged():
    """A voice that drifts apart becomes two speakers; what lies between joins them."""
    people = np.zeros((3, 24))
    people[0, 0] = people[1, 1] = 1
    people[2, :2] = 0.5**0.5
    config = SETTINGS.over({"speakers": {"channel_bonus": 9.0, "within_s": 0.9}})
    talks = [Talk(0, 10, 190), Talk(1, 210, 390, 1), Talk(2, 410, 810, 1), Talk(2, 910, 1010)]
    events = run(scene(talks, 1100, people=people, noise=0.02), config)
    assert [label for label, _, _ in turns(events)] == ["S1", "S2", "S2", "S1"]
    merges = [e for e in events if e.type == "speaker.revised"]
    assert [(e.reason, e.from_label, e.to_label) for e in merges] == [("merged", "S2", "S1")]
    started = {e.turn_id: e.start for e in events if e.type == "turn.started"}
    assert [round(started[turn] * 50) for turn in merges[0].revision_of] == [210, 410]
    assert {label for label, _, _ in revised(events)} == {"S1"}


def test_a_long_turn_is_cut():
    config = SETTINGS.over({"turns": {"max_turn_ms": 2000}})
    events = run(scene([Talk(0, 10, 260)], 350), config)
    assert turns(events) == [("S1", 10, 110), ("S1", 110, 210), ("S1", 210, 260)]
    assert [e.type for e in events].count("speech.ended") == 1


def test_a_pause_at_the_cut_leaves_no_empty_turn():
    config = SETTINGS.over({"turns": {"max_turn_ms": 2000}})
    events = run(scene([Talk(0, 10, 108)], 350), config)
    assert turns(events) == [("S1", 10, 108)]


def test_a_voice_that_changes_without_a_pause_cuts_the_turn():
    events = run(scene([Talk(0, 10, 260), Talk(1, 260, 460)], 600))
    found = revised(events)
    assert [label for label, _, _ in found] == ["S1", "S2"]
    assert abs(found[0][2] - 260) <= 25
    assert found[0][2] == found[1][1]
    assert found[1][2] == 460


def test_a_turn_is_cut_where_another_known_speaker_goes_on():
    """Voices too alike for the change alone to be seen, but both are known."""
    people = voices(8)
    people[1] = 0.6 * people[0] + 0.8 * people[1]
    config = SETTINGS.over({"speakers": {"within": 0.03, "within_s": 0.3}})
    talks = [Talk(0, 10, 150, 0), Talk(1, 200, 350, 1), Talk(0, 400, 600), Talk(1, 600, 800)]
    frames = scene(talks, 900, people=people)
    found = turns(run(frames, config))
    assert [label for label, _, _ in found] == ["S1", "S2", "S1", "S2"]
    assert abs(found[2][2] - 600) <= 25
    blind = config.over({"turns": {"change_margin": None}})
    assert len(turns(run(frames, blind))) == 3


def test_a_running_turn_is_updated_when_its_speaker_is_known():
    events = run(scene([Talk(0, 10, 150, 0), Talk(1, 200, 500, 1)], 600))
    told = [e for e in events if e.type in ("turn.started", "turn.updated") and e.start > 3]
    assert told[0].speaker.label == "S1"
    assert told[-1].speaker.label == "S2"
    assert not any(e.is_final for e in told)


def test_without_voices_the_channels_are_the_speakers():
    frames = scene([Talk(0, 10, 100, 2), Talk(0, 120, 200, 0)], 300)
    events = run(frames, embed=None)
    assert [label for label, _, _ in turns(events)] == ["S3", "S1"]


def test_a_hole_in_the_timeline_ends_turns():
    frames = scene([Talk(0, 10, 200)], 200)
    track = Turns(SETTINGS, embed, Stamper())
    events = track.step(Frames(0, frames.activity[:100], frames.voice[:100], voice_delay=7))
    hole = 5 * 16000 + 77
    start = 100 * HOP + hole
    events += track.step(Frames(start, frames.activity[100:], frames.voice[100:], voice_delay=7))
    events += track.flush(start + 100 * HOP)
    ended = [(e.start * 16000, e.end * 16000) for e in events if e.type == "turn.ended"]
    assert ended == [(10 * HOP, 100 * HOP), (start, start + 100 * HOP)]
    assert [e.type for e in events].count("speech.started") == 2
    assert [e.type for e in events].count("speech.ended") == 2


def test_a_restart_of_the_slot_ends_turns():
    frames = scene([Talk(0, 10, 200)], 200)
    track = Turns(SETTINGS, embed, Stamper())
    events = track.step(Frames(0, frames.activity[:100], frames.voice[:100], voice_delay=7))
    events += track.step(
        Frames(100 * HOP, frames.activity[100:], frames.voice[100:], nonfinite=True, voice_delay=7)
    )
    assert turns(events) == [("S1", 10, 100)]


def test_a_mean_of_another_size_is_refused():
    config = SETTINGS.over({"speakers": {"mean": [0.0] * 5}})
    with pytest.raises(ValueError, match="expected embeddings of the 5 dimensions"):
        run(scene([Talk(0, 10, 100)], 200), config)


def random_talks(seed, length):
    rng = np.random.default_rng(seed)
    talks = []
    for channel in range(3):
        frame = int(rng.integers(0, 200))
        while frame < length:
            end = min(length, frame + int(rng.integers(3, 250)))
            talks.append(Talk(int(rng.integers(0, 4)), frame, end, channel))
            frame = end + int(rng.integers(0, 300))
    return talks


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 800), max_size=40))
def test_finals_do_not_depend_on_the_split(seed, cuts):
    config = SETTINGS.over({"turns": {"max_turn_ms": 5000}})
    frames = scene(random_talks(seed, 800), 800, noise=0.5, seed=seed)
    assert finals(run(frames, config, cuts=cuts)) == finals(run(frames, config))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_revisions_say_what_was_said(seed):
    """`revised` checks that from_label is the label that each turn had."""
    events = run(scene(random_talks(seed, 1500), 1500, noise=1.0, seed=seed))
    started = {e.turn_id for e in events if e.type == "turn.started"}
    assert started == {e.turn_id for e in events if e.type == "turn.ended"}
    revised(events)


def test_a_pause_ends_a_turn_sooner_where_another_speaker_talks_in_it():
    patient = SETTINGS.over({"turns": {"min_off_ms": 2000, "give_way_ms": 200}})
    alone = scene([Talk(0, 0, 80), Talk(0, 150, 230)], 350)
    assert turns(run(alone, patient)) == [("S1", 0, 230)]
    answered = scene([Talk(0, 0, 80), Talk(1, 80, 150, 1), Talk(0, 150, 230)], 350)
    expected = [("S1", 0, 80), ("S1", 150, 230), ("S2", 80, 150)]
    assert sorted(turns(run(answered, patient))) == expected
    hasty = patient.over({"turns": {"give_way_ms": 2000}})
    assert ("S1", 0, 230) in turns(run(answered, hasty))
