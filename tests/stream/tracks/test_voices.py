from itertools import groupby

import numpy as np
import pytest

from stream.tracks.frames import Frames
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings
from stream.tracks.voices import Cohort, Gallery, Voices
from tests.stream.tracks.scenes import Stamper, Talk, embed, scene, split, voices

PEOPLE = voices(8)
SETTINGS = TracksSettings()


def run(talks, length, gallery, config=SETTINGS, people=PEOPLE):
    tracks = Tracks(config, embed=embed, voiceprints=gallery, stamp=Stamper())
    frames = scene(talks, length, people=people)
    return tracks.step(frames) + tracks.flush(frames.end)


def enrolled(*who):
    names = tuple(name for name, _ in who)
    vectors = np.array([PEOPLE[v] for _, v in who], np.float32).reshape(len(who), PEOPLE.shape[1])
    return Gallery(names, 3 * vectors)


def told(events):
    return [(e.speaker, e.identity) for e in events if e.type == "speaker.identified"]


def test_enrolled_people_are_named_and_others_are_unknown():
    events = run(
        [Talk(0, 10, 200, 0), Talk(1, 250, 450, 1), Talk(0, 500, 650, 2)],
        700,
        enrolled(("Ada", 0), ("Bo", 5)),
    )
    assert told(events) == [("S1", "Ada"), ("S2", None)]
    first = next(e for e in events if e.type == "speaker.identified")
    assert first.score > 0.9
    assert first.margin > 0.8
    assert 2 <= first.evidence_s < 3
    ended = [(e.speaker.label, e.speaker.identity) for e in events if e.type == "turn.ended"]
    assert ended == [("S1", "Ada"), ("S2", None), ("S1", "Ada")]


def test_past_turns_learn_the_name():
    events = run([Talk(0, 10, 80), Talk(0, 120, 200)], 300, enrolled(("Ada", 0)))
    revision = next(e for e in events if e.type == "speaker.revised")
    assert (revision.from_label, revision.to_label) == ("S1", "Ada")
    assert revision.reason == "identified"
    assert revision.revision_of == ["T1"]
    assert [e.speaker.identity for e in events if e.type == "turn.ended"] == [None, "Ada"]


def test_a_voice_between_two_people_is_unknown():
    people = PEOPLE.copy()
    people[1] = (people[5] + people[6]) / 2**0.5
    events = run([Talk(1, 10, 250)], 300, enrolled(("Ada", 5), ("Bo", 6)), people=people)
    assert told(events) == [("S1", None)]
    decided = next(e for e in events if e.type == "speaker.identified")
    assert decided.score > 0.6
    assert decided.margin < 0.08


def test_nothing_is_decided_without_evidence():
    assert told(run([Talk(0, 10, 90)], 200, enrolled(("Ada", 0)))) == []


def test_an_identity_is_kept_until_it_is_clearly_wrong():
    """The score falls below the threshold, but by less than `keep`: no change is told."""
    tracks = Tracks(SETTINGS, embed=embed, voiceprints=enrolled(("Ada", 0)), stamp=Stamper())
    voice = tracks._voices
    near = 0.56 * PEOPLE[0] + (1 - 0.56**2) ** 0.5 * PEOPLE[1]
    below = 0.52 * PEOPLE[0] + (1 - 0.52**2) ** 0.5 * PEOPLE[1]
    far = 0.40 * PEOPLE[0] + (1 - 0.40**2) ** 0.5 * PEOPLE[1]
    assert told(voice.observe(1, near, 3.0, list, 0)) == [("S1", "Ada")]
    assert told(voice.observe(1, below, 3.0, list, 0)) == []
    assert told(voice.observe(1, far, 3.0, list, 0)) == [("S1", None)]
    assert told(voice.observe(2, below, 3.0, list, 0)) == [("S2", None)]


def unlike_themselves():
    """Two voices too unlike for clustering, both like person 0."""
    people = PEOPLE.copy()
    people[1] = 0.8 * PEOPLE[0] + 0.6 * PEOPLE[1]
    people[2] = 0.8 * PEOPLE[0] - 0.6 * PEOPLE[1]
    return people, SETTINGS.over({"speakers": {"within": 0.03, "within_s": 0.3}})


def test_a_turn_unlike_its_speaker_is_known_by_the_enrolled_voice():
    people, config = unlike_themselves()
    talks = [Talk(1, 10, 200, 0), Talk(2, 250, 450, 1)]
    events = run(talks, 500, enrolled(("Ada", 0)), config, people)
    assert told(events) == [("S1", "Ada")]
    assert [e.speaker.label for e in events if e.type == "turn.ended"] == ["S1", "S1"]
    updates = [e.speaker.label for e in events if e.type == "turn.updated" and e.start > 4]
    assert [label for label, _ in groupby(updates)] == ["S1", "S2", "S1"]


def test_two_labels_of_one_person_become_one():
    """The second voice has a turn too short for identity, then one that is long enough."""
    people, config = unlike_themselves()
    talks = [Talk(1, 10, 200, 0), Talk(2, 250, 340, 1), Talk(2, 400, 480, 1)]
    config = config.over({"speakers": {"channel_bonus": 9.0}})
    events = run(talks, 550, enrolled(("Ada", 0)), config, people)
    assert [e.speaker.label for e in events if e.type == "turn.ended"] == ["S1", "S2", "S1"]
    merges = [e for e in events if e.type == "speaker.revised" and e.reason == "merged"]
    assert [(e.from_label, e.to_label, e.revision_of) for e in merges] == [("S2", "S1", ["T2"])]


@pytest.mark.parametrize(
    ("names", "merged"),
    [(("Ada", "Bo"), False), (("Ada", "Ada"), True), (("Ada", None), True)],
)
def test_two_whom_a_listener_named_differently_stay_two(names, merged):
    people = np.zeros((3, 24))
    people[0, 0] = people[1, 1] = 1
    people[2, :2] = 0.5**0.5  # joins the other two
    config = SETTINGS.over({"speakers": {"channel_bonus": 9.0, "within_s": 0.9}})
    tracks = Tracks(config, embed=embed, stamp=Stamper())
    talks = [Talk(0, 10, 190), Talk(1, 210, 390, 1), Talk(2, 410, 810, 1), Talk(2, 910, 1010)]
    before, after = split(scene(talks, 1100, people=people, noise=0.02), [400])
    tracks.step(before)
    for number, name in enumerate(names, start=1):
        if name is not None:
            tracks.name(number, name)
    events = tracks.step(after)
    revisions = [event.reason for event in events if event.type == "speaker.revised"]
    assert ("merged" in revisions) == merged
    assert (tracks.speaker("S2") is None) == merged


def test_the_mean_is_taken_off_both_sides():
    shift = np.full(24, 2.0)
    config = SETTINGS.over({"speakers": {"mean": shift.tolist()}})
    gallery = Gallery(("Ada",), (PEOPLE[:1] + shift).astype(np.float32))
    events = run([Talk(0, 10, 200)], 300, gallery, config, PEOPLE + shift)
    assert told(events) == [("S1", "Ada")]


def test_who_is_enrolled_no_longer_is_unknown_from_then_on():
    voice = Voices(SETTINGS, enrolled(("Ada", 0), ("Bo", 1)), Stamper())
    assert told(voice.observe(1, PEOPLE[0], 3.0, list, 0)) == [("S1", "Ada")]
    assert told(voice.observe(2, PEOPLE[1], 3.0, list, 0)) == [("S2", "Bo")]
    voice.name(3, "Cy", 3.0, list, 0)
    voice.look_for(enrolled(("Bo", 1)))
    events = voice.observe(1, PEOPLE[0], 3.0, lambda: ["T1"], 0)
    assert told(events) == [("S1", None)]
    assert [(e.from_label, e.to_label, e.revision_of) for e in events[1:]] == [
        ("Ada", "S1", ["T1"])
    ]
    voice.look_for(enrolled())
    assert told(voice.observe(2, PEOPLE[1], 3.0, list, 0)) == [("S2", None)]
    for label in (1, 2, 3, 4):  # said once; what a listener said stays
        assert voice.observe(label, PEOPLE[label], 3.0, list, 0) == []
    assert voice.identity(3) == "Cy"


def test_labels_that_are_gone_are_forgotten():
    voice = Voices(SETTINGS, enrolled(("Ada", 0)), Stamper())
    for label in (1, 2, 3):
        voice.observe(label, PEOPLE[label - 1], 3.0, list, 0)
    voice.keep({2: "still there"})
    assert list(voice.state.verdicts) == [2]
    assert voice.identity(1) is None


def test_nobody_enrolled_nobody_told():
    tracks = Tracks(SETTINGS, embed=embed, stamp=Stamper())
    assert told(tracks.step(scene([Talk(0, 10, 200)], 300))) == []
    assert tracks.step(Frames(start=300 * 320)) == []


def test_with_a_cohort_and_nobody_enrolled_nothing_is_decided():
    nobody = Gallery((), np.zeros((0, 0), np.float32), cohort=np.asarray(PEOPLE, np.float32))
    assert told(run([Talk(0, 10, 200)], 300, nobody)) == []


class TestCohort:
    """A score is a surprise beside what strangers get."""

    @staticmethod
    def people(count, seed=0, size=32, common=0.0):
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((count, size)) + common
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    def test_a_voice_everyone_resembles_needs_a_higher_cosine(self):
        crowd = self.people(300)
        cohort = Cohort(crowd, 40)
        common = self.people(300, seed=1).mean(0) + crowd[:40].mean(0) * 3  # near many
        common /= np.linalg.norm(common)
        rare = self.people(1, seed=2)[0]
        people = np.stack([common, rare])
        cosines = np.array([0.6, 0.6])
        voice = cohort.of(self.people(1, seed=3))
        loud, quiet = cohort.normalised(cosines, cohort.of(people), voice)
        assert loud < quiet

    def test_scores_keep_their_order_for_one_voice_among_alike_people(self):
        cohort = Cohort(self.people(300), 40)
        cosines = np.linspace(-0.2, 0.9, 12)
        people = cohort.of(np.repeat(self.people(1, seed=5), 12, 0))
        scores = cohort.normalised(cosines, people, cohort.of(self.people(1, seed=6)))
        assert (np.diff(scores) > 0).all()
        assert scores.min() >= -1
        assert scores.max() <= 1

    def test_a_stranger_scores_as_the_cohort_does_to_itself(self):
        crowd = self.people(300)
        cohort = Cohort(crowd, 40)
        stranger, other = self.people(2, seed=9)
        nearest = np.sort(crowd @ stranger)[-40:].mean()
        score = cohort.normalised(
            np.array([nearest]), cohort.of(other[None]), cohort.of(stranger[None])
        )
        top = np.sort(crowd @ crowd.T - 2 * np.eye(300), axis=1)[:, -40:].mean()
        assert score[0] == pytest.approx(top, abs=0.1)

    def test_a_small_cohort_is_used_whole(self):
        cohort = Cohort(self.people(3), 40)
        assert np.isfinite(cohort.of(self.people(5, seed=1))).all()
