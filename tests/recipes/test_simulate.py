import numpy as np
import pytest

from recipes import simulate
from recipes.corpus import HOP, speech_activity
from recipes.simulate import Acoustics, Conversation, Simulator, colored, room
from tests.recipes.conftest import DRY, STYLE


@pytest.fixture
def dry(corpus):
    return Simulator(corpus, DRY, STYLE)


def energy(wave):
    return (wave.reshape(-1, HOP) ** 2).mean(1)


def test_activity_of_a_recording_is_its_loud_part():
    wave = np.zeros(100 * HOP)
    rng = np.random.default_rng(0)
    wave += rng.standard_normal(len(wave)) * 3
    wave[30 * HOP : 70 * HOP] += rng.standard_normal(40 * HOP) * 3000
    active = speech_activity(wave.astype(np.int16))
    assert active[31:69].all()
    assert not active[:29].any()
    assert not active[71:].any()


def test_activity_bridges_short_pauses_only():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(150 * HOP) * 3
    for first, last in ((20, 50), (58, 80), (110, 140)):
        wave[first * HOP : last * HOP] += rng.standard_normal((last - first) * HOP) * 3000
    active = speech_activity(wave.astype(np.int16))
    assert active[22:78].all()
    assert not active[84:106].any()


def test_labels_say_exactly_where_the_sound_is(dry):
    for seed in range(20):
        scene = dry.talk(np.random.default_rng(seed), 500)
        loud = energy(scene.wave) > 1e-6
        anyone = scene.activity.any(1)
        # the simulation adds nothing outside the activity of the pieces, and no piece is silent
        assert (loud == anyone).mean() > 0.99, seed


def test_rows_name_the_very_hop_that_is_heard(dry, corpus):
    scene = dry.single(np.random.default_rng(3), 300, {"tones": 1.0})
    heard = np.flatnonzero(scene.activity[:, 0])[5:-5]  # away from the fades
    source = corpus.audio[scene.rows[heard, 0]].astype(np.float64).ravel()
    found = scene.wave.reshape(-1, HOP)[heard].ravel()
    scale = (found @ source) / (source @ source)
    assert np.allclose(found, source * scale, atol=1e-5)


def test_overlapped_speakers_have_their_own_rows(dry, corpus):
    overlapped = 0
    for seed in range(20):
        scene = dry.talk(np.random.default_rng(seed), 500)
        assert ((scene.rows >= 0) == scene.activity).all()
        both = np.flatnonzero(scene.activity.sum(1) == 2)
        overlapped += len(both)
        owner = np.zeros(len(corpus.audio), int)
        for index, item in enumerate(corpus.utterances):
            owner[item.start : item.start + item.hops] = index // 3
        for hop in both:
            rows = scene.rows[hop][scene.rows[hop] >= 0]
            assert owner[rows[0]] != owner[rows[1]]
    assert overlapped > 100


def test_speakers_without_a_name_never_meet(corpus):
    style = Conversation(sources={"tones": 0.3, "nameless": 0.7})
    simulator = Simulator(corpus, DRY, style)
    for seed in range(30):
        people = simulator._people(np.random.default_rng(seed), 3)
        nameless = [p for p in people if not corpus.utterances[p[0]].speaker]
        assert len(nameless) <= 1


def test_a_scene_is_a_function_of_its_generator(corpus):
    simulator = Simulator(corpus, Acoustics(), STYLE)
    one, same, other = (simulator.talk(np.random.default_rng(s), 300) for s in (5, 5, 6))
    assert np.array_equal(one.wave, same.wave)
    assert not np.array_equal(one.wave, other.wave)


def test_a_whole_utterance_keeps_its_text_and_a_cut_one_does_not(dry):
    assert dry.single(np.random.default_rng(0), 300, {"tones": 1.0}).text == "A BUZZ"
    assert dry.single(np.random.default_rng(0), 50, {"tones": 1.0}).text == ""


@pytest.mark.parametrize("enough", [0.3, 0.4])
def test_a_few_short_sentences_are_not_all_that_is_heard(dry, monkeypatch, enough):
    """A third of the utterances fill the scene, the others are longer."""
    monkeypatch.setattr(simulate, "WHOLE_HOPS", 90)
    monkeypatch.setattr(simulate, "ENOUGH", enough)
    scenes = [dry.single(np.random.default_rng(seed), 90, {"tones": 1.0}) for seed in range(60)]
    heard = {scene.utterances[0] for scene in scenes}
    if enough > 1 / 3:
        assert heard == set(dry.by_corpus["tones"].tolist())
        assert not any(scene.text for scene in scenes)
    else:
        assert heard == set(dry._filling("tones", 90).tolist())
        assert all(scene.text for scene in scenes)


def test_nobody_is_noise_without_speech(corpus):
    scene = Simulator(corpus, Acoustics(), STYLE).nobody(np.random.default_rng(1), 100)
    assert not scene.activity.any()
    assert np.abs(scene.wave).max() > 0


def test_a_room_starts_with_the_direct_sound_and_dies_away():
    tail = room(np.random.default_rng(0), 0.5)
    assert tail[0] == 1
    early, late = (tail[1:1600] ** 2).sum(), (tail[-1600:] ** 2).sum()
    assert early > 30 * late


def test_colored_noise_has_the_length_asked_for():
    assert colored(np.random.default_rng(0), 100_001).shape == (100_001,)
