import numpy as np
import pytest
import soundfile as sf
import torch
from pyannote.core import Annotation, Segment

from recipes.calibrate import nested
from recipes.score import (
    Clip,
    annotation,
    diarization_error,
    diarize,
    local_turns,
    read_clips,
    verification_error,
)
from recipes.student import Shape, Student
from sinks.events import Speaker, SpeakerRevised, TurnEnded
from stream.tracks.frames import Frames
from stream.tracks.settings import TracksSettings

ENVELOPE = {
    "session_id": "x",
    "stream_id": "x",
    "wall_time": "2026-01-01T00:00:00+00:00",
    "lag_ms": 0.0,
}


def clip(turns):
    reference = Annotation(uri="x")
    for number, (begin, end, name) in enumerate(turns):
        reference[Segment(begin, end), number] = name
    return Clip("x", np.zeros(160_000, np.float32), reference)


def ended(turn, start, end, label):
    return TurnEnded(
        **ENVELOPE, seq=0, start=start, end=end, turn_id=turn, speaker=Speaker(label=label)
    )


def test_a_perfect_answer_has_no_error_and_nobody_scores_a_hundred():
    one = clip([(0, 4, "a"), (5, 9, "b")])
    renamed = one.reference.rename_labels({"a": "1", "b": "2"})
    assert diarization_error([(one, renamed)])["DER"] == 0
    assert diarization_error([(one, Annotation())]) == {
        "DER": 100,
        "missed": 100,
        "false alarm": 0,
        "confusion": 0,
    }


def test_parts_of_the_error():
    one = clip([(0, 4, "a"), (4, 8, "b")])
    guess = Annotation()
    guess[Segment(0, 6)] = "1"
    guess[Segment(9, 10)] = "2"
    parts = diarization_error([(one, guess)])
    assert parts == {"DER": 62.5, "missed": 25.0, "false alarm": 12.5, "confusion": 25.0}


def test_turns_have_the_last_label_they_were_given():
    revised = SpeakerRevised(
        **ENVELOPE,
        seq=1,
        start=0,
        end=2,
        revision_of=["T1"],
        from_label="S1",
        to_label="S2",
        reason="merged",
    )
    found = annotation([ended("T1", 0, 2, "S1"), ended("T2", 3, 4, "S2"), revised])
    assert found.labels() == ["S2"]
    assert found.get_timeline().duration() == 3


def test_local_speakers_become_turns():
    activity = np.zeros((100, 2), np.float32)
    activity[10:60, 0] = activity[50:100, 1] = 0.9
    found = local_turns(activity)
    assert found.label_duration("0") == pytest.approx(1.0)
    assert found.label_duration("1") == pytest.approx(1.0)
    assert found.get_overlap().duration() == pytest.approx(0.2)


def test_frames_go_through_the_tracks_of_the_product():
    torch.manual_seed(0)
    shape = Shape(layers=1, width=32, heads=2, feed_forward=32, positions=4, position_groups=4)
    student = Student(shape).eval()
    activity = np.zeros((250, 3), np.float32)
    activity[50:200, 0] = 1
    voice = np.random.default_rng(0).random((250, 512), np.float32)
    found = diarize(student, Frames(0, activity, voice), TracksSettings(), 250 * 320)
    assert found.get_timeline().support()[0].duration == pytest.approx(3.0, abs=0.1)


def test_equal_error_rate_of_embeddings():
    unit = torch.eye(3).repeat_interleave(2, 0)
    assert verification_error(unit, ["a", "a", "b", "b", "c", "c"]) == 0


def test_clips_are_read_with_their_reference(tmp_path):
    sf.write(tmp_path / "one.flac", np.zeros(16_000), 16_000)
    (tmp_path / "one.rttm").write_text("SPEAKER one 1 0.250 0.500 <NA> <NA> ann <NA> <NA>\n")
    (found,) = read_clips(tmp_path)
    assert found.reference.label_duration("ann") == pytest.approx(0.5)
    assert found.extent.duration() == pytest.approx(1.0)


def test_a_dotted_key_becomes_a_tree():
    assert nested("turns.onset", 0.4) == {"turns": {"onset": 0.4}}
