"""Turn embeddings → the session's speakers S1, S2, …: online clustering with second thoughts.

A speaker is the sum of his turns' unit vectors, each weighted by its clean speech (its share).
A turn is decided against the sums without its own share, so a decision can be made again and
again while the turn grows. Turns with little clean speech are tentative: they take the nearest
speaker and move nothing. After every turn the past is looked at again: two speakers may turn out
to be one (merged), a turn may turn out to be another's (split).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from stream.clock import FRAME_RATE
from stream.tracks.settings import SpeakersSettings, hops

Vector = NDArray[np.float64]
Distinct = Callable[[int, int], bool]

TOLD: Final = 4096
"""Turns of one speaker that a merge or a name is told of: the latest, of a day of meetings."""

HELD: Final = 128
"""Speakers compared with a voice; beyond, who has not talked of late and least of all is gone."""


@dataclass
class Speaker:
    """One voice of the session.

    Attributes:
        total: [E] sum of the shares of its turns.
        evidence: Frames of clean speech in that sum.
        turns: Numbers of the turns that carry this label, the latest `TOLD` of them.
    """

    total: Vector
    evidence: float = 0.0
    turns: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class Past:
    """A turn that has a label, and what it needs to get another one.

    Attributes:
        number: The turn's number.
        label: Its speaker now.
        vector: [E] unit vector, or zeros where the turn had no clean speech.
        weight: Frames of clean speech it adds to its speaker; 0 while tentative.
        evidence: Frames of clean speech it has.
        beside: Turn number → frames for which both were active.
    """

    number: int
    label: int
    vector: Vector
    weight: float
    evidence: float
    beside: dict[int, int]


@dataclass
class ClustersState:
    """All that `Clusters` knows."""

    speakers: dict[int, Speaker] = field(default_factory=dict[int, Speaker])
    past: dict[int, Past] = field(default_factory=dict[int, Past])
    retired: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class Decision:
    """Whose turn it is.

    Attributes:
        label: Number of the speaker; new if the session has none of that number.
        score: Cosine with that speaker; None where there is nothing to compare.
        margin: Score less the runner-up's.
        sure: The turn may move the speaker's centroid.
    """

    label: int
    score: float | None
    margin: float | None
    sure: bool


@dataclass(frozen=True, slots=True)
class Revision:
    """Past turns get another label."""

    turns: list[int]
    source: int
    target: int
    reason: Literal["merged", "split"]


class Clusters:
    """Online clustering of turns; sans-I/O, deterministic in the order of calls."""

    def __init__(self, settings: SpeakersSettings, state: ClustersState | None = None) -> None:
        self.settings = settings
        self.state = state or ClustersState()
        self._mean = None if settings.mean is None else np.asarray(settings.mean, np.float64)
        self._sure = hops(settings.sure_ms)
        self._new = hops(settings.new_ms)
        self._share = hops(settings.share_ms)
        self._rival = hops(settings.rival_ms)
        self._merge = hops(settings.merge_ms)
        self._cannot_link = hops(settings.cannot_link_ms)

    def unit(self, embedding: NDArray[np.floating]) -> Vector:
        """[E] embedding → centred, of length 1 (zeros stay zeros).

        Raises:
            ValueError: the embedding's size differs from that of `mean` in the settings.
        """
        vector = np.asarray(embedding, np.float64)
        if self._mean is not None:
            if vector.shape != self._mean.shape:
                raise ValueError(
                    f"expected embeddings of the {self._mean.size} dimensions of speakers.mean, "
                    f"got {vector.size}"
                )
            vector = vector - self._mean
        return vector / max(float(np.linalg.norm(vector)), 1e-9)

    def rivals(self, number: int, beside: dict[int, int]) -> set[int]:
        """Labels that a turn cannot have: those of the turns it overlapped for long enough.

        Of two turns the later one may be the only one that was told of their overlap.
        """
        return {
            past.label
            for other, past in self.state.past.items()
            if other != number
            and max(beside.get(other, 0), past.beside.get(number, 0)) >= self._rival
        }

    def decide(
        self,
        number: int,
        vector: Vector | None,
        evidence: float,
        beside: dict[int, int],
        prior: Mapping[int, float] | None = None,
    ) -> Decision:
        """Finds whose turn this is and notes it; may be called again as the turn grows.

        Args:
            number: The turn's number.
            vector: [E] unit vector of its voice; None without any clean speech.
            evidence: Frames of clean speech in it.
            beside: Turn number → frames for which that turn was active at the same time.
            prior: Label → what is added to its score for reasons other than the voice.
        """
        before = self._forget(number)
        rivals = self.rivals(number, beside)
        decision = self._choose(vector, evidence, rivals, prior or {}, before)
        zeros = np.zeros(0) if vector is None else np.zeros_like(vector)
        past = Past(
            number=number,
            label=decision.label,
            vector=zeros if vector is None else vector,
            weight=min(evidence, float(self._share)) if decision.sure else 0.0,
            evidence=evidence,
            beside=dict(beside),
        )
        self._note(past)
        return decision

    def nearest(
        self, number: int, vector: Vector, beside: dict[int, int], *, besides: int
    ) -> float | None:
        """Score of the nearest known speaker but one, whom this turn may have; None if nobody."""
        rivals = self.rivals(number, beside) | {besides}
        scores = [
            score
            for label, speaker in self.state.speakers.items()
            if label not in rivals
            and speaker.evidence >= self._sure
            and (score := self._score(vector, label)) >= self.settings.same_threshold
        ]
        return max(scores, default=None)

    def review(self, distinct: Distinct | None = None) -> list[Revision]:
        """Looks at the past again; applies and returns what changed, merges first.

        Args:
            distinct: Which labels are two, however alike their voices.
        """
        revisions = self._merge_alike(distinct)
        revisions.extend(self._split(distinct))
        self._trim()
        return revisions

    def merge(self, source: int, target: int) -> Revision:
        """Makes `source` one with `target`, whatever their scores."""
        speakers = self.state.speakers
        gone, kept = speakers.pop(source), speakers[target]
        kept.total = _sum(kept.total, gone.total)
        kept.evidence += gone.evidence
        for number in gone.turns:
            if number in self.state.past:
                self.state.past[number].label = target
        kept.turns = sorted(kept.turns + gone.turns)
        self.state.retired.append(source)
        return Revision(list(gone.turns), source, target, "merged")

    def apart(self, one: int, other: int) -> bool:
        """Whether the two talked at once for so long that they must be two."""
        frames = max(self._beside(one, other), self._beside(other, one))
        return frames >= self._cannot_link

    def label(self, number: int) -> int | None:
        """A turn's label now, if its turn is still remembered."""
        past = self.state.past.get(number)
        return None if past is None else past.label

    def centroid(self, label: int) -> tuple[Vector, float]:
        """[E] unit vector of a speaker and the seconds of clean speech behind it."""
        speaker = self.state.speakers[label]
        total = speaker.total
        norm = max(float(np.linalg.norm(total)), 1e-9) if total.size else 1.0
        return total / norm, speaker.evidence / FRAME_RATE

    def _choose(
        self,
        vector: Vector | None,
        evidence: float,
        rivals: set[int],
        prior: Mapping[int, float],
        before: int | None,
    ) -> Decision:
        allowed = [label for label in sorted(self.state.speakers) if label not in rivals]
        if not allowed:
            new = self._is_new(vector, evidence)
            return Decision(self._fresh(before, rivals), None, None, sure=new)
        if vector is None:
            ranked = sorted(allowed, key=lambda it: (-prior.get(it, 0.0), it != before, it))
            return Decision(ranked[0], None, None, sure=False)
        scores = {label: self._score(vector, label) for label in allowed}
        biased = {label: score + prior.get(label, 0.0) for label, score in scores.items()}
        ranked = sorted(allowed, key=lambda it: (-biased[it], it))
        best = ranked[0]
        known = biased[best] >= self.settings.same_threshold
        if not known and self._is_new(vector, evidence):
            return Decision(self._fresh(before, rivals), None, None, sure=True)
        margin = scores[best] - max((scores[label] for label in ranked[1:]), default=0.0)
        return Decision(best, scores[best], margin, sure=known and evidence >= self._sure)

    def _is_new(self, vector: Vector | None, evidence: float) -> bool:
        return vector is not None and evidence >= self._new

    def _fresh(self, before: int | None, rivals: set[int]) -> int:
        """The number a new speaker gets: the turn's old one if only it made that speaker."""
        taken = self.state.speakers.keys() | set(self.state.retired) | rivals
        if before is not None and before not in rivals:
            left = self.state.speakers.get(before)  # tentative turns leave with whom they joined
            if left is None or not left.evidence:
                return before
        label = 1
        while label in taken:
            label += 1
        return label

    def _score(self, vector: Vector, label: int) -> float:
        total = self.state.speakers[label].total
        if not total.size:
            return 0.0
        return float(vector @ total) / max(float(np.linalg.norm(total)), 1e-9)

    def _note(self, past: Past) -> None:
        self.state.past[past.number] = past
        speaker = self.state.speakers.get(past.label)
        if speaker is None:
            speaker = self.state.speakers[past.label] = Speaker(np.zeros_like(past.vector))
        if past.weight and not speaker.evidence:
            speaker.total = np.zeros_like(past.vector)
        speaker.total = _sum(speaker.total, past.vector * past.weight)
        speaker.evidence += past.weight
        if not speaker.evidence and past.vector.size:
            # Only tentative turns so far: the last of them stands for the speaker.
            speaker.total = past.vector.copy()
        speaker.turns.append(past.number)

    def _forget(self, number: int) -> int | None:
        """Takes a turn's share out; its label, or None if it had none."""
        past = self.state.past.pop(number, None)
        if past is None:
            return None
        speaker = self.state.speakers[past.label]
        # From the end: only recent turns are looked at again, and a long session has many.
        speaker.turns.reverse()
        speaker.turns.remove(number)
        speaker.turns.reverse()
        if not speaker.turns:
            del self.state.speakers[past.label]
            return past.label
        if past.weight:
            speaker.evidence -= past.weight
            if speaker.evidence > 0.5:
                speaker.total = speaker.total - past.vector * past.weight
            else:
                speaker.evidence = 0.0
                vectors = [
                    self.state.past[turn].vector
                    for turn in speaker.turns
                    if turn in self.state.past and self.state.past[turn].vector.size
                ]
                speaker.total = vectors[-1].copy() if vectors else np.zeros_like(speaker.total)
        return past.label

    def _beside(self, one: int, other: int) -> int:
        """Frames for which turns of `one` say that turns of `other` were active too."""
        return sum(
            frames
            for past in self.state.past.values()
            if past.label == one
            for number, frames in past.beside.items()
            if self.label(number) == other
        )

    def _merge_alike(self, distinct: Distinct | None) -> list[Revision]:
        revisions: list[Revision] = []
        while True:
            labels, centroids = self._centroids(self._merge)
            alike = np.tril(centroids @ centroids.T, -1)
            rows, columns = np.nonzero(alike >= max(self.settings.merge_threshold, 1e-9))
            pairs = sorted(
                (-float(alike[row, column]), labels[column], labels[row])
                for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
            )
            for _, target, source in pairs:
                if self.apart(source, target) or (distinct and distinct(source, target)):
                    continue
                revisions.append(self.merge(source, target))
                break
            else:
                return revisions

    def _centroids(self, evidence: float) -> tuple[list[int], NDArray[np.float64]]:
        """Labels with at least this much evidence, and their unit vectors [labels, E]."""
        labels = [
            label
            for label, speaker in sorted(self.state.speakers.items())
            if speaker.evidence >= evidence and speaker.total.size
        ]
        totals = [self.state.speakers[label].total for label in labels]
        matrix = np.stack(totals) if totals else np.zeros((0, 0))
        return labels, matrix / np.maximum(np.linalg.norm(matrix, axis=-1, keepdims=True), 1e-9)

    def _split(self, distinct: Distinct | None) -> list[Revision]:
        """Moves past turns that are clearly nearer to a speaker other than theirs."""
        settings, speakers = self.settings, self.state.speakers
        moved: dict[tuple[int, int], list[int]] = {}
        for number in self._strays():
            past = self.state.past[number]
            rivals = self.rivals(number, past.beside) | {past.label}
            if distinct and len(speakers[past.label].turns) == 1:
                # Its only turn would take the speaker along: as good as merged.
                rivals |= {label for label in speakers if distinct(past.label, label)}
            scores = [
                (self._score(past.vector, label), -label)
                for label, speaker in speakers.items()
                if label not in rivals and speaker.evidence >= self._sure
            ]
            if not scores:
                continue
            score, label = max(scores)[0], -max(scores)[1]
            sure = past.weight > 0
            least = settings.same_threshold if sure else settings.tentative_threshold
            own = self._own_score(past)
            if score >= least and score - own >= settings.split_margin:
                source = past.label
                self._forget(number)
                past.label = label
                if past.evidence >= self._sure and score >= settings.same_threshold:
                    past.weight = min(past.evidence, float(self._share))
                self._note(past)
                speakers[label].turns.sort()
                if source not in speakers:
                    self.state.retired.append(source)
                moved.setdefault((source, label), []).append(number)
        return [
            Revision(numbers, source, target, "split")
            for (source, target), numbers in moved.items()
        ]

    def _strays(self) -> list[int]:
        """Past turns that some other speaker is at least as near to: all that could move."""
        labels, centroids = self._centroids(self._sure)
        past = [item for _, item in sorted(self.state.past.items()) if item.vector.size]
        if not past or not labels or len(self.state.speakers) < 2:
            return []
        scores = np.stack([item.vector for item in past]) @ centroids.T
        own = np.array([item.label for item in past])[:, None] == np.array(labels)
        nearest = np.where(own, -2.0, scores).max(axis=1).tolist()
        return [
            item.number
            for item, score in zip(past, nearest, strict=True)
            if score > -2.0 and score - self._own_score(item) >= self.settings.split_margin
        ]

    def _own_score(self, past: Past) -> float:
        """A past turn's score with the rest of its speaker."""
        speaker = self.state.speakers[past.label]
        total, weight = speaker.total, past.weight
        if weight and speaker.evidence - weight <= 0.5:
            return self.settings.same_threshold  # all there is of this speaker: it stands alone
        if not weight and not speaker.evidence:
            return -1.0  # a speaker of tentative turns only goes to the first who is like them
        rest = total - past.vector * weight
        return float(past.vector @ rest) / max(float(np.linalg.norm(rest)), 1e-9)

    def _trim(self) -> None:
        """Forgets what is too old to matter, so that a session may last for months."""
        past, speakers = self.state.past, self.state.speakers
        for number in sorted(past)[: max(0, len(past) - self.settings.history_turns)]:
            del past[number]
        for speaker in speakers.values():
            del speaker.turns[:-TOLD]
        if len(speakers) > HELD:
            recent = {item.label for item in past.values()}
            idle = [label for label in speakers if label not in recent]
            idle.sort(key=lambda label: speakers[label].evidence)
            for label in idle[: len(speakers) - HELD]:
                del speakers[label]
                self.state.retired.append(label)


def _sum(one: Vector, other: Vector) -> Vector:
    """Their sum, where an empty one (no voice known) counts as zeros."""
    if not one.size:
        return other.copy()
    return one + other if other.size else one
