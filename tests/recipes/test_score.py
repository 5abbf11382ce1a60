import asyncio
import json

import numpy as np
import pytest
import soundfile as sf

from recipes.calibrate import nested
from recipes.export import write_checkpoints
from recipes.hearing import LATENCIES
from recipes.publish import scores_block, summary_block
from recipes.recognition import greedy
from recipes.score import Score, core_share, quick, score, utterance_scores
from recipes.settings import from_arguments
from recipes.student import Shape
from recipes.verification import dev_utterances
from stream.tracks.settings import TracksSettings

SHAPE = Shape(layers=1, width=32, heads=2, feed_forward=32, positions=4, position_groups=4)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_checkpoints(student, SHAPE, folder)
    return folder


@pytest.fixture
def talks(tmp_path):
    wave = np.random.default_rng(0).standard_normal(4 * 16_000) / 10
    sf.write(tmp_path / "talk.flac", wave, 16_000)
    (tmp_path / "talk.rttm").write_text("SPEAKER talk 1 0 2 <NA> <NA> ann <NA> <NA>\n")
    return tmp_path


@pytest.fixture
def developed(dev, monkeypatch):
    """Lets a stage find the development speakers in the folder it is given."""
    monkeypatch.setattr("recipes.score.Corpus", lambda _: dev)


def settings(exported, talks, **changed):
    return Score(
        checkpoint=exported,
        data=talks,
        conversations=talks,
        tracks=talks / "none.json",
        report=talks / "score.json",
        meetings={"speakers": (2,), "each": 1, "seconds": 8},
        open_set={"splits": 2, "clips": 1},
        **changed,
    )


@pytest.mark.usefixtures("developed")
def test_everything_is_scored_whole_and_at_each_latency(exported, talks, monkeypatch):
    # the tiny voices speak for two seconds and a bit; they may decide sooner here
    monkeypatch.setattr(
        "recipes.score.TracksSettings",
        lambda: TracksSettings().over({"voices": {"evidence_ms": 0}}),
    )
    report = score(settings(exported, talks))
    json.dumps(report, allow_nan=False)
    assert list(report["modes"]) == list(LATENCIES) == ["offline", "0.32 s", "0.64 s", "1.28 s"]
    for mode in report["modes"].values():
        assert mode["recorded"]["conversations"] == 1
        assert set(mode["simulated"]) == {"2", "all"}
        assert set(mode["eer"]) == {"1.5 s", "whole"}  # nobody here speaks for 3 s
        assert mode["identification"]["members"] > 0
        assert mode["words"]["greedy"]["words"] == 2 * 9  # A BUZZ, of everybody
    assert report["core_percent"] > 0
    assert (report["utterances"], report["speakers"]) == (9, 3)
    assert report["simulated_s"] == {"2": 8.0}
    assert "1.28 s" in scores_block(report)
    assert "1.28 s" in summary_block(report)


@pytest.mark.usefixtures("developed")
def test_a_quick_look_has_a_number_a_task(exported, talks):
    found = score(settings(exported, talks, quick=True))
    assert list(found) == ["checkpoint", "DER", "DER, frame head alone", "EER", "CER", "WER"]
    assert all(np.isfinite(found[name]) for name in list(found)[1:])


def test_a_quick_look_can_be_taken_at_a_student_in_training(student, dev, talks):
    from recipes.conversations import read_clips

    assert quick(student, dev, read_clips(talks), TracksSettings())["WER"] > 0


def test_other_decoders_are_scored_beside_the_greedy_one(student, dev):
    found = utterance_scores(
        student,
        dev,
        None,
        utterances=dev_utterances(dev, each=2),
        lengths=("whole",),
        ways={"greedy": greedy, "oracle": lambda _: "A BUZZ"},
    )
    assert found["words"]["oracle"] == {"cer": 0, "wer": 0, "words": 12}
    assert found["words"]["greedy"]["wer"] > 0


def test_what_a_stream_takes_of_a_core_is_measured(exported):
    wave = np.zeros(3 * 16_000, np.float32)
    assert 0 < asyncio.run(core_share(exported, wave, TracksSettings())) < 10_000


def test_a_switch_is_short_for_setting_it(monkeypatch, tmp_path):
    file = tmp_path / "score.yaml"
    file.write_text("{checkpoint: a, data: b, conversations: c, tracks: d, report: e}")
    monkeypatch.setattr("sys.argv", ["score", "--config", str(file), "--quick"])
    assert from_arguments(Score, "score", "", switches=("quick",)).quick
    monkeypatch.setattr("sys.argv", ["score", "--config", str(file)])
    assert not from_arguments(Score, "score", "", switches=("quick",)).quick


def test_a_dotted_key_becomes_a_tree():
    assert nested("turns.onset", 0.4) == {"turns": {"onset": 0.4}}
