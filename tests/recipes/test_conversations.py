import numpy as np
import pytest
import soundfile as sf

from recipes.conversations import Meetings, meeting, read_clips, simulated_clips, spans
from recipes.corpus import HOP
from recipes.simulate import Conversation, Simulator
from tests.recipes.conftest import DRY


def test_clips_are_read_with_their_reference(tmp_path):
    sf.write(tmp_path / "one.flac", np.zeros(16_000), 16_000)
    (tmp_path / "one.rttm").write_text("SPEAKER one 1 0.250 0.500 <NA> <NA> ann <NA> <NA>\n")
    (found,) = read_clips(tmp_path)
    ((start, end, name),) = [(s.start, s.end, s.speaker) for s in found.reference]
    assert (start, end, name) == (0.25, 0.75, "ann")
    assert (found.seconds, found.speakers) == (1.0, 1)


def test_a_folder_without_clips_or_of_another_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected pairs like talk.flac and talk.rttm"):
        read_clips(tmp_path)
    sf.write(tmp_path / "one.flac", np.zeros(8_000), 8_000)
    (tmp_path / "one.rttm").write_text("SPEAKER one 1 0.250 0.500 <NA> <NA> ann <NA> <NA>\n")
    with pytest.raises(ValueError, match=r"one.flac: expected 16000 Hz, got 8000"):
        read_clips(tmp_path)


def test_the_reference_names_who_is_heard(dev):
    shares = {"tones": 0.8, "nameless": 0.2}
    style = Conversation(speakers=(0, 0, 1), sources=shares)
    scene = Simulator(dev, DRY, style, split="dev").talk(np.random.default_rng(4), 1500)
    reference = list(spans(dev, scene))
    active = np.zeros(1500, int)
    for span in reference:
        active[round(span.start * 50) : round(span.end * 50)] += 1
    assert (active == scene.activity.sum(1)).all()
    loud = (scene.wave.reshape(-1, HOP) ** 2).mean(1) > 1e-6
    assert ((active > 0) == loud).mean() > 0.99
    # the names are those of the utterances, not of the channels
    names = {dev.utterances[i].speaker or dev.utterances[i].id for i in scene.utterances if i >= 0}
    assert names <= {span.speaker for span in reference}


@pytest.mark.parametrize("speakers", [2, 3, 4])
def test_everybody_of_a_meeting_is_heard_for_a_second(dev, speakers):
    clip = meeting(dev, speakers, 30.0, [1, speakers, 0])
    assert clip.speakers == speakers
    assert clip.seconds == 30
    for name in {span.speaker for span in clip.reference}:
        assert sum(s.end - s.start for s in clip.reference if s.speaker == name) >= 1


def test_a_set_is_a_function_of_its_seed(dev):
    settings = Meetings(speakers=(2, 4), each=2, seconds=20)
    one, same = simulated_clips(dev, settings), simulated_clips(dev, settings)
    assert [len(clips) for clips in one.values()] == [2, 2]
    for a, b in zip(one[4], same[4], strict=True):
        assert np.array_equal(a.wave, b.wave)
        assert a.reference == b.reference
    other = simulated_clips(dev, settings.model_copy(update={"seed": 2}))
    assert other[2][0].reference != one[2][0].reference


def test_more_people_than_there_are_cannot_meet(dev):
    with pytest.raises(ValueError, match=r"expected 9 speakers that meet"):
        meeting(dev, 9, 20.0, [1, 9, 0])


def test_time_too_short_for_everybody_is_an_error_and_no_endless_search(dev):
    with pytest.raises(ValueError, match=r"not all of 3 speakers are heard for a second"):
        meeting(dev, 3, 1.0, [1, 3, 0])
