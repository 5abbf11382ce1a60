import numpy as np
import pytest
import torch

from recipes.conversations import Clip
from recipes.diarization import diarize, judge, judge_all, local_turns, percent
from recipes.hearing import LATENCIES, Heard, _step_through, listen
from recipes.student import VOCABULARY
from stream.score import Span
from stream.tracks.settings import TracksSettings


def clip(*turns):
    return Clip("x", np.zeros(160_000, np.float32), tuple(Span(*turn) for turn in turns))


def heard(activity):
    rows = len(activity)
    voice = np.random.default_rng(0).random((rows, 512), np.float32)
    return Heard(activity, voice, np.zeros((rows, len(VOCABULARY)), np.float32))


def test_the_right_answer_has_no_error_and_nobody_scores_a_hundred():
    one = clip((0, 4, "a"), (5, 9, "b"))
    right = [Span(0, 4, "1"), Span(5, 9, "2")]
    assert judge(one, right).to_dict() == {
        "der": 0,
        "missed": 0,
        "false_alarm": 0,
        "confusion": 0,
        "der_collar": 0,
        "speakers": 2,
        "speakers_found": 2,
        "speaker_count_error": 0,
        "conversations": 1,
    }
    assert judge(one, []).to_dict()["missed"] == 100


def test_seconds_add_up_over_conversations():
    one, two = clip((0, 4, "a"), (4, 8, "b")), clip((0, 2, "a"))
    guess = [Span(0, 6, "1"), Span(9, 10, "2")]
    both = judge_all([(one, guess), (two, [])])
    assert both.error.total_s == pytest.approx(10)
    assert both.to_dict()["der"] == 70  # 2 s missed and 2 confused, 1 too much; 2 missed
    assert both.to_dict()["missed"] == 40
    assert both.to_dict()["false_alarm"] == 10
    assert both.to_dict()["confusion"] == 20
    assert (both.speakers, both.found, both.count_error, both.conversations) == (3, 2, 1, 2)


def test_a_collar_forgives_what_is_near_a_boundary():
    late = judge(clip((0, 4, "a")), [Span(0.2, 4, "1")])
    assert late.error.rate > 0
    assert late.error_collar.rate == 0


def test_local_speakers_become_turns():
    activity = np.zeros((100, 2), np.float32)
    activity[10:60, 0] = activity[50:100, 1] = 0.9
    assert local_turns(activity) == [Span(0.2, 1.2, "0"), Span(1.0, 2.0, "1")]


def test_frames_go_through_the_tracks_of_the_product(student):
    activity = np.zeros((250, 3), np.float32)
    activity[50:200, 0] = 1
    found = diarize(student, heard(activity), TracksSettings(), 250 * 320)
    assert found[0].start == pytest.approx(1.0, abs=0.1)
    assert found[-1].end == pytest.approx(4.0, abs=0.1)


def test_a_stream_seen_at_once_is_the_stream_stepped_through(student):
    wave = np.random.default_rng(0).standard_normal(40_000).astype(np.float32) / 10
    for name, window in LATENCIES.items():
        once = listen(student, wave, window)
        assert np.allclose(np.exp(once.characters).sum(1), 1, atol=1e-5)
        if window is None:
            continue
        stepped = _step_through(student, wave, window)
        for part in ("activity", "voice", "characters"):
            assert np.allclose(getattr(once, part), getattr(stepped, part), atol=1e-4), (name, part)


def test_a_long_stream_has_all_of_its_frames(student):
    wave = torch.zeros(21 * 16_000).numpy()
    window = LATENCIES["1.28 s"]
    assert window is not None
    assert len(listen(student, wave, window).activity) == student.encoder.config.frames(len(wave))


def test_a_rate_becomes_per_cent():
    assert percent(0.12345) == 12.35
