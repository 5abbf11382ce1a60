import numpy as np
import pytest

from stream.tracks import clusters as module
from stream.tracks.clusters import Clusters
from stream.tracks.settings import SpeakersSettings

PEOPLE = np.eye(8)
SETTINGS = SpeakersSettings(
    same_threshold=0.5, merge_threshold=0.7, sure_ms=800, new_ms=1000, merge_ms=1000, share_ms=4000
)


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


def test_a_share_is_bounded():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100_000, {})
    clusters.decide(2, between(0, 1, 0.6), 200, {})
    expected = PEOPLE[0] + between(0, 1, 0.6)
    np.testing.assert_allclose(clusters.centroid(1)[0], expected / np.linalg.norm(expected))


def test_a_turn_leaves_the_tentative_ones_that_followed_it():
    """Turn 2 had no voice of its own; when 1 is decided again, S1 is still turn 1's."""
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 60, {})
    assert clusters.decide(2, PEOPLE[1], 10, {}).label == 1
    assert clusters.decide(1, PEOPLE[0], 90, {}).label == 1
    assert clusters.decide(2, PEOPLE[1], 60, {}).label == 2


def test_a_rival_is_never_the_same_speaker():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100, {})
    assert clusters.decide(2, PEOPLE[0], 100, {1: 9}).label == 1
    assert clusters.decide(2, PEOPLE[0], 100, {1: 10}).label == 2
    assert clusters.decide(3, None, 0, {1: 10, 2: 50}).label == 3


def test_the_prior_tips_the_scale():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100, {})
    near = between(0, 1, 0.45)
    assert clusters.decide(2, near, 100, {}, {1: 0.1}).label == 1
    assert clusters.decide(2, near, 100, {}, {1: -0.1}).label == 2
    assert clusters.decide(3, None, 0, {}, {1: -0.1}).label == 2


def test_two_who_became_alike_are_merged_into_the_older():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 100, {})
    clusters.decide(2, between(0, 1, 0.4), 60, {})
    assert clusters.review() == []
    clusters.decide(3, between(0, 1, 0.9), 100, {}, {2: 1.0})
    (revision,) = clusters.review()
    assert (revision.turns, revision.source, revision.target) == ([2, 3], 2, 1)
    assert revision.reason == "merged"
    assert [clusters.label(turn) for turn in (1, 2, 3)] == [1, 1, 1]
    # The number is not given to anybody else.
    assert clusters.decide(4, PEOPLE[5], 100, {}).label == 3


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
    clusters.decide(1, PEOPLE[0], 100, {})
    clusters.decide(2, between(0, 1, 0.4), 60, {})
    clusters.decide(3, between(0, 1, 0.9), 100, {}, {2: 1.0})
    assert clusters.review(lambda *labels: set(labels) == {1, 2}) == []
    assert [revision.reason for revision in clusters.review()] == ["merged"]


def test_a_past_turn_moves_to_a_clearly_nearer_speaker():
    clusters = Clusters(SETTINGS)
    clusters.decide(1, PEOPLE[0], 200, {})
    stray = between(0, 1, 0.55)
    assert clusters.decide(2, stray, 100, {}).label == 1
    clusters.decide(3, PEOPLE[1], 100, {}, {1: -1.0})
    (revision,) = clusters.review()
    assert (revision.turns, revision.source, revision.target) == ([2], 1, 2)
    assert revision.reason == "split"
    np.testing.assert_allclose(clusters.centroid(1)[0], PEOPLE[0])
    assert clusters.centroid(2)[1] == pytest.approx(4.0)
    assert clusters.review() == []


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
    assert clusters.decide(100, PEOPLE[1], 100, {}).label == 2
    assert clusters.state.speakers[1].turns[-1] == 99


def test_of_very_many_speakers_those_who_hardly_spoke_long_ago_are_gone(monkeypatch):
    monkeypatch.setattr(module, "HELD", 20)
    clusters = Clusters(SETTINGS.model_copy(update={"history_turns": 16}))
    crowd = np.eye(120)
    for number in range(1, 101):
        evidence = 1000 if number == 7 else 100 + number
        assert clusters.decide(number, crowd[number], evidence, {}).label == number
        assert clusters.review() == []
        assert len(clusters.state.speakers) <= 20
    # Who talks now is there, and so is who said much; a number is never another's.
    assert {7, *range(85, 101)} <= clusters.state.speakers.keys()
    assert clusters.decide(101, crowd[7], 100, {}).label == 7
    assert clusters.decide(102, crowd[3], 100, {}).label == 101


def test_memory_is_bounded_and_turns_are_all_named():
    clusters = Clusters(SETTINGS.model_copy(update={"history_turns": 16}))
    rng = np.random.default_rng(0)
    for number in range(1, 200):
        vector = clusters.unit(PEOPLE[number % 3] + 0.1 * rng.standard_normal(8))
        assert clusters.decide(number, vector, 100, {}).label == (number - 1) % 3 + 1
        assert clusters.review() == []
        assert len(clusters.state.past) <= 16
    assert len(clusters.merge(3, 1).turns) == 66
