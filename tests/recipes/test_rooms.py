import numpy as np
import pytest

from recipes.channels import available, delay, microphone, through
from recipes.corpus import RATE
from recipes.rooms import SOUND, Bank, Rooms, make, reflection, response, without_bias

SIDES = np.array([6.0, 5.0, 3.0])
SOURCE, MICROPHONE = np.array([2.0, 1.5, 1.6]), np.array([4.0, 3.5, 1.2])


def test_without_reflections_the_direct_sound_is_left():
    out = response(SIDES, SOURCE, MICROPHONE, 0.0, 2000)
    distance = float(np.linalg.norm(SOURCE - MICROPHONE))
    at = distance * RATE / SOUND
    assert abs(int(out.argmax()) - at) < 1
    assert out.sum() == pytest.approx(1 / distance, rel=0.02)  # a sinc sums to its gain
    where = np.arange(len(out)) @ out / out.sum()
    assert where == pytest.approx(at, abs=0.1)


def test_the_first_reflections_come_from_the_mirrored_sources():
    out = response(SIDES, SOURCE, MICROPHONE, 0.5, 2000)
    floor = SOURCE * [1, 1, -1]
    distance = float(np.linalg.norm(floor - MICROPHONE))
    at = round(distance * RATE / SOUND)
    assert out[at - 2 : at + 3].sum() == pytest.approx(0.5 / distance, rel=0.15)


@pytest.mark.parametrize("reverberation_s", [0.25, 0.45])
def test_energy_decays_by_sixty_decibels_in_the_wanted_time(reverberation_s):
    beta = reflection(SIDES, reverberation_s)
    out = response(SIDES, SOURCE, MICROPHONE, beta, int(0.6 * reverberation_s * RATE))
    out = without_bias(out)
    left = 10 * np.log10((out**2)[::-1].cumsum()[::-1] + 1e-20)
    left -= left[0]
    # Schroeder's integral between −5 and −20 dB, the slope extrapolated to 60 dB
    a, b = (int(np.argmax(left < level)) for level in (-5, -20))
    measured = 60 * (b - a) / RATE / 15
    assert measured == pytest.approx(reverberation_s, rel=0.35)


def test_a_dead_room_takes_more_than_a_live_one():
    assert reflection(SIDES, 0.2) < reflection(SIDES, 0.8) < 1


def test_a_bank_gives_every_speaker_a_place_and_the_direct_sound_at_once(tmp_path):
    bank = make(Rooms(target=tmp_path / "x", rooms=2, places=3, longest_s=0.1))
    assert bank.responses.shape == (2, 3, 1600)
    assert np.allclose(bank.responses[..., 0], 1, atol=1e-6)
    drawn = bank.draw(np.random.default_rng(0), 3)
    assert len({part.tobytes() for part in drawn}) == 3
    assert isinstance(bank, Bank)


@pytest.mark.parametrize("name", available())
def test_a_codec_changes_sound_and_not_time(name):
    rng = np.random.default_rng(3)
    wave = np.zeros(2 * RATE, np.float32)
    for begin in (8000, 17000):
        wave[begin : begin + 4000] = 0.1 * rng.standard_normal(4000)
    heard = through(wave, name)
    assert heard.shape == wave.shape
    assert not np.array_equal(heard, wave)
    energy = np.convolve(heard**2, np.ones(80) / 80, "same")
    assert abs(int(np.argmax(energy > energy.max() / 4)) - 8000) < 160
    assert abs(delay(name)) < 2000


def test_a_codec_that_is_not_there():
    with pytest.raises(ValueError, match="codec: expected one of"):
        through(np.zeros(10, np.float32), "carrier pigeon")


def test_a_microphone_colours_and_moves_nothing():
    rng = np.random.default_rng(5)
    filters = [microphone(rng, 6.0) for _ in range(200)]
    for taps in filters:
        assert np.allclose(taps, taps[::-1], atol=1e-6)  # zero-phase about the middle tap
    gain_db = 20 * np.log10(np.abs(np.fft.rfft(filters, 1024)) + 1e-6)
    speech = gain_db[:, 32:160]  # 500 … 2,500 Hz, between bass and treble edges
    assert 3 < speech.std(0).mean() < 7
    assert abs(speech.mean()) < 2
    bass, treble = gain_db[:, 3], gain_db[:, 480]
    assert bass.mean() < -3 > treble.mean()
    flat = np.abs(np.fft.rfft(microphone(np.random.default_rng(1), 0.0), 1024))
    assert flat.max() < 1.1
