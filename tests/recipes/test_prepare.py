import shutil

import numpy as np
import pytest

from recipes.corpus import Corpus
from recipes.prepare import Prepare, at_speed, change_speeds


def loudest_hz(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * 16_000 / len(samples)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_speed_moves_pitch_and_length(factor):
    tone = (8000 * np.sin(2 * np.pi * 400 * np.arange(32_000) / 16_000)).astype(np.int16)
    moved = at_speed(tone, factor)
    assert len(moved) == pytest.approx(32_000 / factor, abs=2)
    assert loudest_hz(moved) == pytest.approx(400 * factor, abs=1)


def test_training_speakers_are_heard_slower_and_faster_as_others(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    settings = Prepare(
        target=folder,
        corpora=[],
        other_speeds=["tones", "nameless"],
        noise=tmp_path / "noise.tar",
        campplus=None,
    )
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
