import numpy as np
import pytest

from stream.tracks import clusters as module
from stream.tracks.clusters import Clusters, Mixed
from stream.tracks.settings import SpeakersSettings

PEOPLE = np.eye(8)
SETTINGS = SpeakersSettings(
    between=0.5,
    within=0.1,
    within_s=0.9,
    dimensions=20,
    threshold=-2,
    sure_ms=800,
    revise_margin=1,
    rival_ms=200,
    cannot_link_ms=600,
)
"""Two turns of 4 s are one speaker's from a cosine of 0.33 on, of 2 s from 0.09."""


def between(one, other, part):
    """A unit vector of this cosine to `one`, the rest towards `other`."""
    return part * PEOPLE[one] + (1 - part**2) ** 0.5 * PEOPLE[other]


def test_a_decision_can_be_made_again_as_the_turn_grows():
    clusters = Clusters(SETTINGS)
    first = clusters.decide(1, PEOPLE[0], 60, {})
    assert (first.label, first.score, first.sure) == (1, None, True)
    again = clusters.decide(1, between(0, 1, 0.1), 100, {})
    assert again.label == 1  # all of the speaker is this turn: it still is the same one
    assert clusters.state.speakers[1].turns == [1]
    np.testing.assert_allclose(clusters.centroid(1)[0], between(0, 1, 0.1))
    assert clusters.centroid(1)[1] == 2.0


def test_a_turn_weighs_by_its_clean_speech_up_to_a_bound():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100_000, {})
    clusters.decide(2, between(0, 1, 0.8), 50, {})
    expected = PEOPLE[0] / 0.1 + between(0, 1, 0.8) / 1.0
    np.testing.assert_allclose(
        clusters.centroid(1)[0], expected / np.linalg.norm(expected), atol=1e-3
    )


def test_a_turn_leaves_those_without_a_voice_that_followed_it():
    """Turn 2 has no voice of its own; when 1 is decided again, S1 is still turn 1's."""
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 60, {})
    assert clusters.decide(2, None, 0, {}).label == 1
    assert clusters.decide(1, PEOPLE[0], 190, {}).label == 1
    assert clusters.decide(2, PEOPLE[1], 160, {}).label == 2


def test_a_rival_is_never_the_same_speaker():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100, {})
    assert clusters.decide(2, PEOPLE[0], 100, {1: 9}).label == 1
    assert clusters.decide(2, PEOPLE[0], 100, {1: 10}).label == 2
    assert clusters.decide(3, None, 0, {1: 10, 2: 50}).label == 3


def test_a_short_turn_founds_no_speaker():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 400, {})
    guess = clusters.decide(2, -PEOPLE[0], 39, {})
    assert (guess.label, guess.sure) == (1, False)
    sure = clusters.decide(2, -PEOPLE[0], 40, {})
    assert (sure.label, sure.sure) == (2, True)


def three():
    """S1, S2 and S3, each with a turn of four seconds."""
    clusters = Clusters(SETTINGS)
    for number in (1, 2, 3):
        clusters.decide(number, PEOPLE[number], 200, {})
    return clusters


def test_a_turn_beside_another_is_guessed_by_what_the_other_does_not_explain():
    clusters = three()
    voice = (PEOPLE[1] + 0.3 * PEOPLE[3]) / 1.09**0.5  # most of it is S1's, who talks as well
    guess = clusters.decide(4, None, 0, {1: 30}, mixed=Mixed(voice, 30))
    assert (guess.label, guess.sure) == (3, False)
    assert guess.score == pytest.approx(1.0)
    assert clusters.decide(5, None, 0, {1: 30}).label == 2  # without it: any but S1


def test_speech_that_is_not_clean_is_in_nobodys_sum_and_founds_nobody():
    clusters = three()
    before = clusters.centroid(3)
    assert clusters.decide(4, None, 0, {}, mixed=Mixed(-PEOPLE[3], 500)).label in {1, 2, 3}
    clusters.decide(5, None, 0, {1: 30}, mixed=Mixed(between(3, 5, 0.6), 30))
    np.testing.assert_array_equal(clusters.centroid(3)[0], before[0])
    assert clusters.centroid(3)[1] == before[1]
    # nor is a turn that is sure by its clean speech guessed by the rest of it
    assert clusters.decide(6, PEOPLE[2], 100, {}, mixed=Mixed(PEOPLE[3], 500)).label == 2


def test_a_turn_is_guessed_again_when_its_speaker_is_known():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[1], 200, {})
    clusters.decide(2, PEOPLE[2], 200, {})
    assert clusters.decide(3, None, 0, {1: 30}, mixed=Mixed(between(3, 1, 0.8), 30)).label == 2
    assert clusters.review() == []
    clusters.decide(4, PEOPLE[3], 200, {})
    (revision,) = clusters.review()
    assert (revision.turns, revision.source, revision.target) == ([3], 2, 3)
    assert revision.reason == "split"
    assert clusters.review() == []


def test_the_prior_tips_the_scale():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 200, {})
    near = between(0, 1, 0.33)
    assert clusters.decide(2, near, 200, {}, {1: 1.0}).label == 1
    assert clusters.decide(2, near, 200, {}, {1: -1.0}).label == 2
    assert clusters.decide(3, None, 0, {}, {1: -1.0}).label == 2


def test_two_who_became_alike_are_merged_into_the_older():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 200, {})
    clusters.decide(2, between(0, 1, 0.2), 200, {})
    assert clusters.review() == []
    clusters.decide(3, between(0, 1, 0.75), 400, {}, {2: 9.0})
    (revision,) = clusters.review()
    assert (revision.turns, revision.source, revision.target) == ([2, 3], 2, 1)
    assert revision.reason == "merged"
    assert [clusters.label(turn) for turn in (1, 2, 3)] == [1, 1, 1]
    # The number is not given to anybody else.
    assert clusters.decide(4, PEOPLE[5], 200, {}).label == 3


def test_two_who_talked_at_once_are_never_merged():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100, {})
    clusters.decide(2, PEOPLE[0], 100, {1: 40})
    assert clusters.apart(1, 2)
    assert clusters.review() == []
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100, {})
    clusters.decide(2, PEOPLE[0], 100, {1: 20})
    assert [revision.reason for revision in clusters.review()] == ["merged"]


def test_labels_that_are_known_to_be_two_are_never_merged():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 200, {})
    clusters.decide(2, between(0, 1, 0.2), 200, {})
    clusters.decide(3, between(0, 1, 0.75), 400, {}, {2: 9.0})
    assert clusters.review(lambda *labels: set(labels) == {1, 2}) == []
    assert [revision.reason for revision in clusters.review()] == ["merged"]


def test_a_past_turn_moves_to_a_nearer_speaker():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 200, {})
    stray = between(0, 1, 0.4)
    assert clusters.decide(2, stray, 200, {}).label == 1
    clusters.decide(3, PEOPLE[1], 200, {}, {1: -9.0})
    (revision,) = clusters.review()
    assert (revision.turns, revision.source, revision.target) == ([2], 1, 2)
    assert revision.reason == "split"
    np.testing.assert_allclose(clusters.centroid(1)[0], PEOPLE[0])
    assert clusters.centroid(2)[1] == pytest.approx(8.0)
    assert clusters.review() == []


def test_two_who_were_taken_for_one_part():
    """The channel said that the second turn goes on with the first speaker; the voice does not."""
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 200, {})
    clusters.decide(2, between(0, 1, 0.2), 200, {}, {1: 9.0})
    assert clusters.label(2) == 1
    (revision,) = clusters.review()
    assert (revision.turns, revision.source, revision.target) == ([2], 1, 2)
    assert revision.reason == "split"


def test_what_is_no_longer_remembered_keeps_its_speaker_together():
    """Sixteen turns are remembered; the older ones stay one piece, which is merged as a whole."""
    clusters = Clusters(SETTINGS.model_copy(update={"history_turns": 16}))
    for number in range(1, 41):
        clusters.decide(number, PEOPLE[1 - number % 2], 200, {})
        assert clusters.review() == []
    assert len(clusters.state.past) == 16
    credulous = clusters.settings.model_copy(update={"threshold": -1e6})
    (revision,) = Clusters(credulous, clusters.state).review()
    assert (revision.source, revision.target, revision.reason) == (2, 1, "merged")
    assert revision.turns == list(range(2, 41, 2))
    assert clusters.state.speakers[1].turns == list(range(1, 41))


def test_embeddings_are_centred():
    settings = SETTINGS.model_copy(update={"mean": (1.0, 2.0)})
    np.testing.assert_allclose(Clusters(settings).unit(np.array([4.0, 6.0])), [0.6, 0.8])
    assert not Clusters(settings).unit(np.array([1.0, 2.0])).any()


def test_a_speaker_of_months_is_told_of_by_the_latest_turns(monkeypatch):
    monkeypatch.setattr(module, "TOLD", 20)
    clusters = Clusters(SETTINGS.model_copy(update={"history_turns": 16}))
    for number in range(1, 101):
        clusters.decide(number, PEOPLE[0], 100, {})
        assert clusters.review() == []
    assert clusters.state.speakers[1].turns == list(range(81, 101))
    assert clusters.centroid(1)[1] == 200.0  # all of them count
    assert clusters.decide(100, PEOPLE[1], 200, {}).label == 2
    assert clusters.state.speakers[1].turns[-1] == 99


def test_of_very_many_speakers_those_who_hardly_spoke_long_ago_are_gone(monkeypatch):
    monkeypatch.setattr(module, "HELD", 20)
    clusters = Clusters(SETTINGS.model_copy(update={"history_turns": 16}))
    crowd = np.eye(120)
    for number in range(1, 101):
        evidence = 1000 if number == 7 else 200 + number
        assert clusters.decide(number, crowd[number], evidence, {}).label == number
        assert clusters.review() == []
        assert len(clusters.state.speakers) <= 20
    # Who talks now is there, and so is who said much; a number is never another's.
    assert {7, *range(85, 101)} <= clusters.state.speakers.keys()
    assert clusters.decide(101, crowd[7], 200, {}).label == 7
    assert clusters.decide(102, crowd[3], 200, {}).label == 101


def test_memory_is_bounded_and_turns_are_all_named():
    clusters = Clusters(SETTINGS.model_copy(update={"history_turns": 16}))
    rng = np.random.default_rng(0)
    for number in range(1, 200):
        vector = clusters.unit(PEOPLE[number % 3] + 0.1 * rng.standard_normal(8))
        assert clusters.decide(number, vector, 200, {}).label == (number - 1) % 3 + 1
        assert clusters.review() == []
        assert len(clusters.state.past) <= 16
    assert len(clusters.merge(3, 1).turns) == 66
