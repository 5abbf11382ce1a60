import shutil
from itertools import chain

import numpy as np
import pytest
import torch

from recipes.corpus import Corpus
from recipes.prepare import Prepare, at_speed, change_speeds, label_voices, side_by_side
from recipes.teachers import StandIn


def loudest_hz(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * 16_000 / len(samples)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_moves_pitch_and_length(factor):
    tone = (8000 * np.sin(2 * np.pi * 400 * np.arange(32_000) / 16_000)).astype(np.int16)
    moved = at_speed(tone, factor)
    assert len(moved) == pytest.approx(32_000 / factor, abs=2)
    assert loudest_hz(moved) == pytest.approx(400 * factor, abs=1)


@pytest.fixture
def again(data, tmp_path):
    """Settings of a stage that finds its corpora decoded in a folder of the test's own."""
    shutil.copytree(data, tmp_path / "data")

    def settings(**more):
        folder, noise = tmp_path / "data", tmp_path / "noise.tar"
        return Prepare(target=folder, corpora=[], noise=noise, campplus=None, **more)

    return settings


def test_training_speakers_are_heard_slower_and_faster_as_others(data, again):
    settings = again(other_speeds=["tones", "nameless"])
    folder = settings.target
    change_speeds(settings)
    before, corpus = Corpus(data), Corpus(folder)
    added = corpus.utterances[len(before.utterances) :]
    assert {item.corpus for item in added} == {"tones, other speeds"}  # the nameless are left out
    assert len(added) == 9
    assert len({item.speaker for item in added}) == 6  # three speakers, twice
    for item in added:
        name, factor = item.speaker.split(" × ")
        own = next(old for old in before.utterances if old.id == item.id.split(" × ")[0])
        assert own.speaker == name
        assert own.text == item.text
        assert item.hops == pytest.approx(own.hops / float(factor), abs=1)
        slow, fast = settings.slower, settings.faster
        assert slow[0] <= float(factor) <= slow[1] or fast[0] <= float(factor) <= fast[1]
    assert len(corpus.audio) == added[-1].start + added[-1].hops
    assert len(corpus.activity) == len(corpus.audio)
    change_speeds(settings)  # what is there already stays as it is
    assert len(Corpus(folder).utterances) == len(corpus.utterances)


def test_each_utterance_can_be_heard_at_both_speeds(data, again):
    settings = again(other_speeds=["tones"], at_both=True, workers=1)
    change_speeds(settings)
    added = Corpus(settings.target).utterances[len(Corpus(data).utterances) :]
    assert len(added) == 18
    assert len({item.speaker for item in added}) == 6


def test_workers_keep_the_order(tmp_path):
    settings = Prepare(target=tmp_path, corpora=[], noise=tmp_path, campplus=None, workers=2)
    assert list(side_by_side(settings, divmod, range(40), [7] * 40)) == [
        divmod(number, 7) for number in range(40)
    ]


def test_utterances_of_one_length_are_labelled_together_and_as_alone(again):
    settings = again(bfloat16=False)
    (settings.target / "voice.f16").unlink()
    label_voices(settings)
    corpus = Corpus(settings.target)
    batches = list(corpus.of_one_length(range(len(corpus.utterances))))
    assert sorted(chain(*batches)) == list(range(len(corpus.utterances)))
    assert max(map(len, batches)) > 1
    teacher = StandIn()
    for index, item in enumerate(corpus.utterances):
        voice = teacher.voices(torch.from_numpy(corpus.wave(index))[None])
        rows = corpus.voice[item.start : item.start + voice.shape[1]]
        np.testing.assert_allclose(rows, voice[0].numpy(), atol=2e-2)
        np.testing.assert_allclose(corpus.embeddings[index], teacher.embeds(voice)[0], atol=1e-3)
