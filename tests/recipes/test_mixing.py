import numpy as np
import pytest
import torch
from scipy.signal import butter, oaconvolve, sosfreqz

from recipes.corpus import HOP
from recipes.mixing import Mixer, _Draw
from recipes.rooms import Bank
from recipes.simulate import Acoustics, Simulator
from tests.recipes.conftest import DRY, STYLE

CPU = torch.device("cpu")
SEEDS = range(6)


def drawn(corpus, acoustics=DRY, silent=True, rooms=None, hops=400):
    simulator = Simulator(corpus, acoustics, STYLE, rooms=rooms, silent=silent)
    return [simulator.talk(np.random.default_rng(seed), hops) for seed in SEEDS]


def mixed(mixer, scenes, seed=1, clean=False):
    return mixer(
        torch.from_numpy(np.stack([scene.sound for scene in scenes])),
        torch.from_numpy(np.stack([scene.activity for scene in scenes])),
        torch.tensor([clean or scene.clean for scene in scenes]),
        torch.Generator().manual_seed(seed),
    )


def decibels(wave):
    return 10 * torch.log10(wave.square().mean(1) + 1e-20)


def test_a_scene_that_is_drawn_is_the_one_that_is_mixed_but_for_its_sound(corpus):
    for silent, whole in zip(drawn(corpus), drawn(corpus, silent=False), strict=True):
        assert silent.wave.size == 0
        # the sound of the dry simulation draws nothing in between
        assert np.array_equal(silent.sound, whole.sound)
        assert np.array_equal(silent.activity, whole.activity)
        assert np.array_equal(silent.rows, whole.rows)


def test_a_dry_scene_sounds_as_the_simulator_mixes_it(corpus):
    scenes = drawn(corpus, silent=False)
    wave = mixed(Mixer(corpus, DRY, None, CPU), scenes)
    assert wave.shape == (len(scenes), 400 * HOP)
    for got, scene in zip(wave, scenes, strict=True):
        difference = (got - torch.from_numpy(scene.wave)).unflatten(0, (-1, HOP)).square().mean(1)
        # fades differ where a piece goes on in the one before it
        assert (difference > 1e-6 * got.square().mean()).float().mean() < 0.05


def test_a_batch_is_the_same_again_and_another_seed_another(corpus):
    how = Acoustics(clatter=0.5, colour=0.7, codec=0.2, narrow_band=0.3)
    mixer, scenes = Mixer(corpus, how, None, CPU), drawn(corpus, how)
    first = mixed(mixer, scenes)
    assert torch.equal(first, mixed(mixer, scenes))
    assert not torch.equal(first, mixed(mixer, scenes, seed=2))
    assert first.isfinite().all()
    assert first.abs().max() <= 0.99


def test_a_clean_scene_has_its_level_alone(corpus):
    how = Acoustics(level_db=(-20, -20), speaker_level_db=0, reverb=1, noise=1, clatter=1, colour=1)
    scenes = drawn(corpus)
    clean = mixed(Mixer(corpus, how, None, CPU), scenes, clean=True)
    dry = mixed(Mixer(corpus, DRY, None, CPU), scenes)
    assert (clean - dry).square().mean() < 1e-6 * dry.square().mean()


def test_a_room_of_the_bank_is_convolved_with_each_speaker(corpus):
    rng = np.random.default_rng(0)
    response = (rng.standard_normal(8000) * np.exp(-np.arange(8000) / 900)).astype(np.float32)
    response[0] = 1
    bank = Bank(np.stack([np.stack([response] * 4)]))
    how = DRY.model_copy(update={"reverb": 1.0, "rooms": 1.0})
    scenes = drawn(corpus)
    wave = mixed(Mixer(corpus, how, bank, CPU), scenes)
    dry = mixed(Mixer(corpus, DRY, None, CPU), scenes)
    for got, plain in zip(wave, dry, strict=True):
        expected = oaconvolve(plain.numpy(), response)[: len(plain)]
        peak = np.abs(expected).max()
        expected *= min(1.0, 0.99 / peak)
        assert np.abs(got.numpy() - expected).max() < 1e-3 * peak


def test_a_tail_dies_and_keeps_the_direct_sound(corpus):
    how = DRY.model_copy(update={"reverb": 1.0, "reverb_s": (0.3, 0.3)})
    mixer = Mixer(corpus, how, None, CPU)
    tails = mixer._rooms(_Draw(torch.Generator().manual_seed(0), CPU), 5, 3)
    assert (tails[..., 0] == 1).all()
    assert (tails[..., 4800:] == 0).all()
    early, late = tails[..., 400:1600].square().sum(-1), tails[..., 3600:].square().sum(-1)
    assert (early > 100 * late).all()


@pytest.mark.parametrize("ratio", [0.0, 20.0])
def test_noise_stands_at_its_ratio_to_the_speech(corpus, ratio):
    how = DRY.model_copy(update={"noise": 1.0, "noise_snr_db": (ratio, ratio)})
    scenes = drawn(corpus)
    noise = mixed(Mixer(corpus, how, None, CPU), scenes) - mixed(
        Mixer(corpus, DRY, None, CPU), scenes
    )
    assert decibels(noise) == pytest.approx([-20 - ratio] * len(scenes), abs=0.1)


def test_nobody_is_noise_at_the_level_of_speech(corpus):
    how = DRY.model_copy(update={"noise_snr_db": (6.0, 6.0)})
    nobody = Simulator(corpus, how, STYLE, silent=True).nobody(np.random.default_rng(0), 200)
    wave = mixed(Mixer(corpus, how, None, CPU), [nobody])
    assert float(decibels(wave)) == pytest.approx(-26, abs=0.1)


def test_clatter_comes_at_its_ratio_and_not_everywhere(corpus):
    how = DRY.model_copy(update={"clatter": 1.0, "clatter_snr_db": (0.0, 0.0)})
    scenes = drawn(corpus)
    taps = mixed(Mixer(corpus, how, None, CPU), scenes) - mixed(
        Mixer(corpus, DRY, None, CPU), scenes
    )
    loudest = taps.unfold(1, 800, 400).square().mean(2).amax(1)
    assert (loudest < 10 ** (-20 / 10) * 8).all()
    assert (loudest > 10 ** (-20 / 10) / 30).sum() >= 4


def test_a_telephone_band_is_butterworth_s(corpus):
    how = DRY.model_copy(update={"narrow_band": 1.0})
    scenes = drawn(corpus)
    narrow = torch.fft.rfft(mixed(Mixer(corpus, how, None, CPU), scenes)).abs()
    dry = torch.fft.rfft(mixed(Mixer(corpus, DRY, None, CPU), scenes)).abs()
    hertz = torch.fft.rfftfreq(400 * HOP, 1 / 16_000)
    # whatever the edges are: within those of the narrowest and the widest band
    for low, high, inside in ((150, 3800, True), (350, 3000, False)):
        sections = butter(4, (low, high), "band", fs=16_000, output="sos")
        _, bound = sosfreqz(sections, hertz.numpy(), fs=16_000)
        bound = torch.from_numpy(np.abs(bound)).float() * dry
        band = (hertz > 90) & (hertz < 4200)
        if inside:
            assert (narrow <= bound * 1.05 + 1e-2)[:, band].float().mean() > 0.99
        else:
            assert (narrow >= bound * 0.95 - 1e-2)[:, band].float().mean() > 0.99


def test_a_microphone_colours_and_keeps_the_loudness(corpus):
    how = DRY.model_copy(update={"colour": 1.0, "colour_db": 6.0})
    scenes = drawn(corpus)
    coloured = mixed(Mixer(corpus, how, None, CPU), scenes)
    dry = mixed(Mixer(corpus, DRY, None, CPU), scenes)
    assert decibels(coloured) == pytest.approx(decibels(dry).tolist(), abs=0.1)
    change = torch.fft.rfft(coloured).abs() / (torch.fft.rfft(dry).abs() + 1e-9)
    assert (20 * change[:, 1000:50_000].clamp(1e-4, 1e4).log10()).std(1).min() > 1


def test_mu_law_leaves_38_db(corpus):
    how = DRY.model_copy(update={"codec": 1.0})
    scenes = drawn(corpus)
    coded = mixed(Mixer(corpus, how, None, CPU), scenes)
    dry = torch.fft.rfft(mixed(Mixer(corpus, DRY, None, CPU), scenes))
    dry[:, torch.fft.rfftfreq(400 * HOP, 1 / 16_000) > 3800] = 0
    dry = torch.fft.irfft(dry, 400 * HOP)
    error = decibels(dry) - decibels(coded - dry)
    assert error.min() > 30
    assert error.max() < 45
