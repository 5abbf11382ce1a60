"""Voices of the development speakers: equal error rate, and identification in an open set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from recipes.corpus import HOP, Corpus
from recipes.diarization import embed, percent, stamp
from recipes.hearing import Heard
from recipes.settings import Settings
from recipes.student import Student
from stream.clock import FRAME_RATE
from stream.enrolment import Voice
from stream.score import equal_error
from stream.tracks.clusters import Clusters
from stream.tracks.settings import TracksSettings
from stream.tracks.voices import Voices
from stream.voiceprints import Voiceprints

Floats = NDArray[np.float32]

CUTS: Final[dict[str, int | None]] = {"1.5 s": 75, "3 s": 150, "whole": None}
"""Name of a length → hops; the middle of an utterance's speech is taken."""

CHECKPOINT: Final = "scored"
"""What the voiceprints are filed under: all are of the checkpoint that is scored."""


class OpenSet(Settings):
    """Identification with strangers about.

    Attributes:
        splits: how often the speakers are divided anew, half enrolled and half unknown.
        clips: utterances that enrol a speaker; the others are tried.
        seed: of the division.
    """

    splits: int = 10
    clips: int = 3
    seed: int = 12


@dataclass(frozen=True, slots=True)
class Print:
    """A voice in one recording.

    Attributes:
        speaker: whose it is.
        vector: [E] embedding.
        evidence_s: seconds of clean speech behind it.
    """

    speaker: str
    vector: NDArray[np.floating]
    evidence_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What was said of a recording.

    Attributes:
        speaker: whose it is.
        enrolled: whether that person is enrolled.
        nearest: the name at any threshold; None where no name leads by the margin.
        score: with the nearest.
        identity: the name at the shipped threshold, or None: unknown.
    """

    speaker: str
    enrolled: bool
    nearest: str | None
    score: float
    identity: str | None


def dev_utterances(corpus: Corpus, *, each: int | None = None) -> list[int]:
    """Indices of the utterances of the development speakers, or the first ``each`` of everyone."""
    found: list[int] = []
    seen: dict[str, int] = {}
    for index, item in enumerate(corpus.utterances):
        if item.split == "dev" and item.speaker:
            seen[item.speaker] = seen.get(item.speaker, 0) + 1
            if each is None or seen[item.speaker] <= each:
                found.append(index)
    return found


def cut(corpus: Corpus, index: int, hops: int | None) -> Floats | None:
    """The middle of an utterance's speech, or all of the recording; None where it is too short."""
    wave = corpus.wave(index)
    if hops is None:
        return wave
    item = corpus.utterances[index]
    active = np.flatnonzero(corpus.activity[item.start : item.start + item.hops])
    if len(active) < hops:
        return None
    first = int(active[0] + active[-1] + 1 - hops) // 2
    return wave[first * HOP : (first + hops) * HOP]


def voice_print(student: Student, heard: Heard, speaker: str) -> Print:
    """A recording of one person as `livesat enroll` takes it; a silent one counts every frame."""
    voice = Voice()
    voice.step(heard.frames)
    moments = voice.moments
    if moments.mass < 1:
        for row in heard.voice.astype(np.float64):
            moments.add(1.0, row)
    mass = np.asarray(moments.mass, np.float32)
    first, second = moments.first.astype(np.float32), moments.second.astype(np.float32)
    return Print(speaker, embed(student)(mass, first, second), moments.mass / FRAME_RATE)


def verification_error(prints: Sequence[Print]) -> float:
    """Equal error rate over all pairs, in per cent."""
    unit = np.stack([p.vector / np.linalg.norm(p.vector) for p in prints])
    names = np.array([p.speaker for p in prints])
    left, right = np.triu_indices(len(prints), 1)
    result = equal_error((unit @ unit.T)[left, right], names[left] == names[right])
    return percent(result.rate)


def trials(
    prints: Sequence[Print],
    open_set: OpenSet,
    settings: TracksSettings,
    cohort: Floats | None = None,
) -> list[Trial]:
    """Enrols half of the speakers and tries everybody, again and again.

    Enrolment, gallery and decision are the product's. Recordings with less speech than
    `VoicesSettings.evidence_ms`, on which it would not decide yet, are no trials. ``cohort`` is the
    checkpoint's, see `recipes.cohort`.
    """
    names = sorted({p.speaker for p in prints})
    rng = np.random.default_rng(open_set.seed)
    unit = Clusters(settings.speakers).unit
    open_door = settings.over({"voices": {"threshold": -1.0}})
    found: list[Trial] = []
    for _ in range(open_set.splits):
        members = set(rng.permutation(names)[: len(names) // 2].tolist())
        with Voiceprints.open() as store:
            enrolled: set[int] = set()
            for name in sorted(members):
                own = [i for i, p in enumerate(prints) if p.speaker == name]
                chosen = rng.permutation(own)[: open_set.clips].tolist()
                enrolled.update(chosen)
                for index in chosen:
                    store.add(
                        name,
                        prints[index].vector,
                        checkpoint=CHECKPOINT,
                        evidence_s=prints[index].evidence_s,
                        consent="a published corpus",
                    )
            gallery = replace(store.gallery(CHECKPOINT), cohort=cohort)
        for index, tried in enumerate(prints):
            if index in enrolled:
                continue
            vector = unit(np.asarray(tried.vector, np.float64))
            identity, score = _ask(Voices(settings, gallery, stamp()), vector, tried.evidence_s)
            if score is None:
                continue
            nearest, _ = _ask(Voices(open_door, gallery, stamp()), vector, tried.evidence_s)
            found.append(Trial(tried.speaker, tried.speaker in members, nearest, score, identity))
    return found


def _ask(
    voices: Voices, vector: NDArray[np.float64], evidence_s: float
) -> tuple[str | None, float | None]:
    """Name and score of a voice; no score where there is not evidence enough."""
    voices.observe(1, vector, evidence_s, list, 0)
    verdict = voices.state.verdicts.get(1)
    return (None, None) if verdict is None else (verdict.identity, verdict.score)


def identification(tried: Sequence[Trial]) -> dict[str, float]:
    """Errors at the shipped threshold, and where strangers let in equal members not recognised.

    All in per cent: ``false_accept`` of the strangers were given a name, ``false_reject`` of the
    members none and ``wrong`` another's; at ``equal_threshold`` both kinds of error, a wrong name
    being one of the members', are ``equal``.
    """
    members = [trial for trial in tried if trial.enrolled]
    strangers = [trial for trial in tried if not trial.enrolled]
    wrong = sum(t.identity not in (None, t.speaker) for t in members)
    rejected = sum(t.identity is None for t in members)
    accepted = sum(t.identity is not None for t in strangers)
    equal, threshold = _equal_point(members, strangers)
    return {
        "false_accept": percent(accepted / len(strangers)),
        "false_reject": percent(rejected / len(members)),
        "wrong": percent(wrong / len(members)),
        "equal": percent(equal),
        "equal_threshold": round(threshold, 3),
        "members": len(members),
        "strangers": len(strangers),
    }


def _equal_point(members: Sequence[Trial], strangers: Sequence[Trial]) -> tuple[float, float]:
    """Rate and threshold at which the two kinds of error are equal."""
    right = np.sort([t.score for t in members if t.nearest == t.speaker])
    let_in = np.sort([t.score for t in strangers if t.nearest is not None])
    cuts = np.unique(np.concatenate([right, let_in, [1.0 + 1e-9]]))
    missed = 1 - (len(right) - np.searchsorted(right, cuts)) / len(members)
    accepted = (len(let_in) - np.searchsorted(let_in, cuts)) / len(strangers)
    at = int(np.argmin(np.abs(missed - accepted)))
    return float(missed[at] + accepted[at]) / 2, float(cuts[at])
