import numpy as np
import pytest

from recipes.hearing import Heard, listen
from recipes.student import VOCABULARY
from recipes.verification import (
    OpenSet,
    Print,
    Trial,
    cut,
    dev_utterances,
    identification,
    trials,
    verification_error,
    voice_print,
)
from stream.tracks.settings import TracksSettings

PEOPLE = ("ann", "ben", "cat", "dan")


def prints(spread, evidence_s=3.0):
    """Six recordings of each of four people, ``spread`` around orthogonal voices."""
    rng = np.random.default_rng(0)
    return [
        Print(name, np.eye(4)[place] + spread * rng.standard_normal(4), evidence_s)
        for place, name in enumerate(PEOPLE)
        for _ in range(6)
    ]


def test_equal_error_rate_of_embeddings():
    assert verification_error(prints(0.01)) == 0
    assert 5 < verification_error(prints(0.5)) < 50


def test_clear_voices_are_known_and_strangers_are_not():
    found = identification(trials(prints(0.01), OpenSet(splits=3), TracksSettings()))
    # half of four enrolled from three of six recordings; the others of theirs are tried
    assert (found["members"], found["strangers"]) == (3 * 2 * 3, 3 * 2 * 6)
    assert found["false_accept"] == found["false_reject"] == found["wrong"] == 0
    assert found["equal"] == 0


def test_an_open_door_lets_everybody_in():
    settings = TracksSettings().over({"voices": {"threshold": -1.0, "margin": 0.0}})
    found = identification(trials(prints(0.01), OpenSet(splits=2), settings))
    assert found["false_accept"] == 100
    assert found["false_reject"] == 0
    assert found["equal"] == 0  # the curve does not depend on the shipped threshold


def test_a_shut_door_lets_nobody_in():
    settings = TracksSettings().over({"voices": {"threshold": 1.0}})
    found = identification(trials(prints(0.3), OpenSet(splits=2), settings))
    assert found["false_accept"] == found["wrong"] == 0
    assert found["false_reject"] == 100


def test_too_little_speech_is_no_trial():
    assert trials(prints(0.01, evidence_s=1.9), OpenSet(splits=1), TracksSettings()) == []


def test_errors_are_counted_by_what_they_are():
    made = [
        Trial("ann", True, "ann", 0.9, "ann"),
        Trial("ann", True, "ben", 0.8, "ben"),
        Trial("ben", True, "ben", 0.4, None),
        Trial("ben", True, None, 0.9, None),
        Trial("cat", False, "ann", 0.7, "ann"),
        Trial("cat", False, "ann", 0.3, None),
    ]
    found = identification(made)
    assert (found["false_reject"], found["wrong"], found["false_accept"]) == (50, 25, 50)
    # from 0.4 on: ann and ben right, two of four not; one of two strangers in
    assert (found["equal"], found["equal_threshold"]) == (50, 0.4)


def test_a_split_is_a_function_of_its_seed():
    tried = [
        trials(prints(0.5), OpenSet(splits=2, seed=seed), TracksSettings()) for seed in (1, 1, 2)
    ]
    assert tried[0] == tried[1]
    assert tried[0] != tried[2]


def test_the_middle_of_the_speech_is_cut(dev):
    index = dev_utterances(dev)[0]
    item = dev.utterances[index]
    active = np.flatnonzero(dev.activity[item.start : item.start + item.hops])
    piece = cut(dev, index, 30)
    assert piece is not None
    first = int(active[0] + active[-1] + 1 - 30) // 2
    assert np.array_equal(piece, dev.wave(index)[first * 320 : (first + 30) * 320])
    assert cut(dev, index, item.hops + 1) is None
    assert cut(dev, index, None) is not None


def test_a_few_utterances_of_everyone(dev):
    some = dev_utterances(dev, each=2)
    names = [dev.utterances[index].speaker for index in some]
    assert names == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert len(dev_utterances(dev)) == 9


def test_overlapped_and_silent_frames_have_no_part_in_a_voice(student):
    rng = np.random.default_rng(0)
    voice = rng.random((100, 512), np.float32)
    activity = np.zeros((100, 3), np.float32)
    activity[20:60, 0] = activity[50:80, 1] = 1
    characters = np.zeros((100, len(VOCABULARY)), np.float32)
    full = voice_print(student, Heard(activity, voice, characters), "ann")
    assert full.evidence_s == pytest.approx(1.0)  # 20…50 and 60…80
    kept = np.r_[20:50, 60:80]
    alone = voice_print(
        student, Heard(np.eye(3, dtype=np.float32)[[0] * 50], voice[kept], characters[:50]), "ann"
    )
    assert np.allclose(full.vector, alone.vector, atol=1e-5)


def test_a_recording_in_which_nothing_is_heard_still_has_a_voice(student, dev):
    silent = listen(student, dev.wave(0), None)
    silent = Heard(np.zeros_like(silent.activity), silent.voice, silent.characters)
    assert np.isfinite(voice_print(student, silent, "ann").vector).all()
