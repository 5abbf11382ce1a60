"""Turn embeddings → the session's speakers S1, S2, …: online clustering with second thoughts.

A speaker is the sum of his turns' unit vectors, each weighted by what its clean speech is worth
(`resemblance.py`). A turn is decided against the sums without its own share, so a decision can be
made again and again while the turn grows. After every turn the past is looked at again as if
nothing had been decided: the turns that are remembered are put together anew, and two speakers may
turn out to be one (merged), a turn may turn out to be another's (split). A turn with too little
clean speech to be sure of is guessed again, by what it says while others talk as well.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from itertools import combinations, count
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from stream.clock import FRAME_RATE
from stream.tracks.resemblance import TwoCovariance, Vector, agglomerate, value
from stream.tracks.settings import SpeakersSettings, hops

Distinct = Callable[[int, int], bool]

TOLD: Final = 4096
"""Turns of one speaker that a merge or a name is told of: the latest, of a day of meetings."""

HELD: Final = 128
"""Speakers compared with a voice; beyond, who has not talked of late and least of all is gone."""

NOTHING: Final = 1e-6
"""A precision below this is what rounding leaves of none."""


@dataclass
class Speaker:
    """One voice of the session.

    Attributes:
        total: [E] sum of the turns' unit vectors, each times its precision.
        precision: Sum of these.
        evidence: Frames of clean speech in that sum.
        turns: Numbers of the turns that carry this label, the latest `TOLD` of them.
    """

    total: Vector
    precision: float = 0.0
    evidence: float = 0.0
    turns: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a turn says while others talk as well.

    Attributes:
        vector: [E] unit vector.
        evidence: Its frames.
    """

    vector: Vector
    evidence: float


@dataclass(slots=True)
class Past:
    """A turn that has a label, and what it needs to get another one.

    Attributes:
        number: The turn's number.
        label: Its speaker now.
        vector: [E] unit vector, or [0] where the turn had no clean speech.
        precision: What it weighs in its speaker's sum.
        evidence: Frames of clean speech it has.
        beside: Turn number → frames for which both were active.
        mixed: Its speech that is not clean, if it has any.
    """

    number: int
    label: int
    vector: Vector
    precision: float
    evidence: float
    beside: dict[int, int]
    mixed: Mixed | None = None


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
        sure: The turn has clean speech enough to be sure of that.
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
        self._model = TwoCovariance.of(settings)
        self._sure = hops(settings.sure_ms)
        self._rival = hops(settings.rival_ms)
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
        return _unit(vector)

    def enough(self, evidence: float) -> bool:
        """Whether these frames of clean speech are enough to be sure of a voice."""
        return evidence >= self._sure

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
        *,
        mixed: Mixed | None = None,
    ) -> Decision:
        """Finds whose turn this is and notes it; may be called again as the turn grows.

        Args:
            number: The turn's number.
            vector: [E] unit vector of its voice; None without any clean speech.
            evidence: Frames of clean speech in it.
            beside: Turn number → frames for which that turn was active at the same time.
            prior: Label → what is added to its log-likelihood ratio for reasons other than the
                voice.
            mixed: Its speech that is not clean: it founds no speaker and is in none's sum, but a
                turn that has little else is guessed by it.
        """
        before = self._forget(number)
        past = Past(
            number=number,
            label=0,
            vector=np.zeros(0) if vector is None else vector,
            precision=0.0 if vector is None else self._model.precision(evidence),
            evidence=evidence,
            beside=dict(beside),
            mixed=mixed,
        )
        decision = self._choose(past, prior or {}, before)
        past.label = decision.label
        self._note(past)
        return decision

    def nearest(
        self, number: int, vector: Vector, evidence: float, beside: dict[int, int], *, besides: int
    ) -> float | None:
        """Score of the nearest known speaker but one, whom this turn may have; None if nobody."""
        rivals = self.rivals(number, beside) | {besides}
        precision = self._model.precision(evidence)
        known = [
            label
            for label, ratio in self._known(precision * vector, precision, rivals).items()
            if ratio >= self.settings.threshold
        ]
        return max((self._score(vector, label) for label in known), default=None)

    def review(self, distinct: Distinct | None = None) -> list[Revision]:
        """Looks at the past again; applies and returns what changed, merges first.

        Args:
            distinct: Which labels are two, however alike their voices.
        """
        labels, turns = self._partition(distinct)
        revisions = [
            self.merge(label, target) for label, target in sorted(labels.items()) if label != target
        ]
        revisions.extend(self._split(turns))
        revisions.extend(self._split(self._guesses()))
        self._trim()
        return revisions

    def merge(self, source: int, target: int) -> Revision:
        """Makes `source` one with `target`, whatever their scores."""
        speakers = self.state.speakers
        gone, kept = speakers.pop(source), speakers[target]
        kept.total = _sum(kept.total, gone.total)
        kept.precision += gone.precision
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
        return _unit(speaker.total), speaker.evidence / FRAME_RATE

    def _choose(self, past: Past, prior: Mapping[int, float], before: int | None) -> Decision:
        rivals = self.rivals(past.number, past.beside)
        allowed = [label for label in sorted(self.state.speakers) if label not in rivals]
        enough = past.vector.size > 0 and self.enough(past.evidence)
        if not allowed:
            return Decision(self._fresh(before, rivals), None, None, sure=enough)
        total, precision = self._heard(past, rivals)
        if not precision:
            ranked = sorted(allowed, key=lambda it: (-prior.get(it, 0.0), it != before, it))
            return Decision(ranked[0], None, None, sure=False)
        ratios = self._ratios(total, precision, rivals)
        unheard = self.settings.threshold  # a speaker without a voice may be a new one as well
        biased = {label: ratios.get(label, unheard) + prior.get(label, 0.0) for label in allowed}
        best = min(allowed, key=lambda it: (-biased[it], it))
        if biased[best] < self.settings.threshold and enough:
            return Decision(self._fresh(before, rivals), None, None, sure=True)
        scores = {label: self._score(_unit(total), label) for label in allowed}
        score = scores.pop(best)
        margin = score - max(scores.values(), default=0.0)
        return Decision(best, score, margin, sure=enough)

    def _heard(self, past: Past, rivals: set[int]) -> tuple[Vector, float]:
        """All that tells whose turn this is: its vector times its precision, and the precision.

        Of speech that is not clean, what the voices of those who talk with it explain is taken
        off; so it is worth nothing for a comparison with them.
        """
        total, precision = past.precision * past.vector, past.precision
        if past.mixed is None or self.enough(past.evidence):
            return total, precision
        rest = past.mixed.vector
        for rival in sorted(rivals & self.state.speakers.keys()):
            voice, _ = self.centroid(rival)
            if voice.size:
                rest = rest - float(rest @ voice) * voice
        more = self._model.precision(past.mixed.evidence)
        return _sum(total, more * _unit(rest)), precision + more

    def _ratios(self, total: Vector, precision: float, rivals: set[int]) -> dict[int, float]:
        """Speakers with a voice → log-likelihood ratio of this voice being theirs, or another's.

        Args:
            total: [E] its vector times its precision.
            precision: What it weighs.
            rivals: Who are not asked.
        """
        labels = [
            label
            for label, speaker in sorted(self.state.speakers.items())
            if label not in rivals and speaker.precision > NOTHING
        ]
        if not labels:
            return {}
        totals = np.stack([self.state.speakers[label].total for label in labels])
        precisions = np.array([self.state.speakers[label].precision for label in labels])
        speakers = (precisions, np.square(totals).sum(1))
        ratios = self._model.ratio(speakers, (precision, float(total @ total)), totals @ total)
        return dict(zip(labels, ratios.tolist(), strict=True))

    def _known(self, total: Vector, precision: float, rivals: set[int]) -> dict[int, float]:
        """The same for speakers with clean speech enough to be sure of."""
        ratios = self._ratios(total, precision, rivals)
        speakers = self.state.speakers
        return {label: it for label, it in ratios.items() if self.enough(speakers[label].evidence)}

    def _fresh(self, before: int | None, rivals: set[int]) -> int:
        """The number a new speaker gets: the turn's old one if only it made that speaker."""
        if before is not None and before not in rivals:
            # turns without a voice leave with whom they joined
            left = self.state.speakers.get(before)
            if left is None or left.precision <= NOTHING:
                return before
        return self._unused(rivals)

    def _unused(self, besides: Set[int]) -> int:
        """The lowest label that nobody has or had, besides these."""
        taken = self.state.speakers.keys() | set(self.state.retired) | besides
        return next(label for label in count(1) if label not in taken)

    def _score(self, vector: Vector, label: int) -> float:
        total = self.state.speakers[label].total
        return float(vector @ _unit(total)) if total.size else 0.0

    def _note(self, past: Past) -> None:
        self.state.past[past.number] = past
        speaker = self.state.speakers.get(past.label)
        if speaker is None:
            speaker = self.state.speakers[past.label] = Speaker(np.zeros_like(past.vector))
        speaker.total = _sum(speaker.total, past.vector * past.precision)
        speaker.precision += past.precision
        speaker.evidence += past.evidence
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
        speaker.total = _sum(speaker.total, -past.vector * past.precision)
        speaker.precision -= past.precision
        speaker.evidence -= past.evidence
        if speaker.precision <= NOTHING:
            speaker.total = np.zeros_like(speaker.total)
            speaker.precision = speaker.evidence = 0.0
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

    def _partition(self, distinct: Distinct | None) -> tuple[dict[int, int], dict[int, int]]:
        """Puts what is remembered together anew.

        What is left of a speaker without the turns that are remembered is one piece. Nothing comes
        of it where that is hardly better than what is.

        Returns:
            Label → label of the group it is at home in, where its turns of old are, or else most of
            it is; turn → label of its group.
        """
        state = self.state
        turns = [past for _, past in sorted(state.past.items()) if past.precision]
        totals = {label: item.total.copy() for label, item in state.speakers.items()}
        left = {label: item.precision for label, item in state.speakers.items()}
        for past in turns:
            totals[past.label] -= past.precision * past.vector
            left[past.label] -= past.precision
        old = [label for label in sorted(left) if left[label] > NOTHING]
        owners = old + [past.label for past in turns]
        if not owners:
            return {}, {}
        vectors = [totals[label] for label in old]
        vectors.extend(past.precision * past.vector for past in turns)
        precisions = np.array([left[label] for label in old] + [past.precision for past in turns])
        pieces = np.stack(vectors)
        apart = self._apart(len(old), turns, owners, distinct)
        threshold = self.settings.threshold
        now = np.array(owners)
        anew = agglomerate(self._model, pieces, precisions, apart, threshold)
        better, before = (
            value(self._model, pieces, precisions, groups, threshold) for groups in (anew, now)
        )
        if better - before < self.settings.revise_margin:
            return {}, {}
        found: list[int] = anew.tolist()
        parts: dict[int, Counter[int]] = {}
        for group, owner, precision in zip(found, owners, precisions.tolist(), strict=True):
            parts.setdefault(owner, Counter())[group] += precision
        homes = {owner: part.most_common(1)[0][0] for owner, part in parts.items()}
        homes.update(zip(old, found, strict=False))
        names = self._names(found, homes)
        return (
            {owner: names[group] for owner, group in homes.items()},
            {
                past.number: names[group]
                for past, group in zip(turns, found[len(old) :], strict=True)
            },
        )

    def _guesses(self) -> dict[int, int]:
        """Turns that are not sure → whose they are, by what is known of the speakers now."""
        guesses: dict[int, int] = {}
        for number, past in self.state.past.items():
            if self.enough(past.evidence):
                continue
            rivals = self.rivals(number, past.beside)
            total, precision = self._heard(past, rivals)
            if not precision:
                continue
            ratios = self._known(total, precision, rivals)
            best = max(ratios, key=ratios.__getitem__, default=past.label)
            now = ratios.get(past.label, self.settings.threshold)
            if past.label in rivals or ratios.get(best, now) - now >= self.settings.revise_margin:
                guesses[number] = best
        return guesses

    def _names(self, groups: list[int], homes: Mapping[int, int]) -> dict[int, int]:
        """Group → its label: the oldest that is at home there, or a new one."""
        names: dict[int, int] = {}
        for label in sorted(homes):
            names.setdefault(homes[label], label)
        for group in groups:
            if group not in names:
                names[group] = self._unused(set(names.values()))
        return names

    def _apart(
        self, old: int, turns: list[Past], owners: list[int], distinct: Distinct | None
    ) -> NDArray[np.bool_]:
        """Which pieces are never one speaker's: `old` ones, then the turns.  → [K, K]"""
        apart = np.zeros((len(owners), len(owners)), np.bool_)
        rows = {past.number: old + row for row, past in enumerate(turns)}
        for past in turns:
            for other, frames in past.beside.items():
                if frames >= self._cannot_link and other in rows:
                    apart[rows[past.number], rows[other]] = True
        labels = np.array(owners)
        if distinct is not None:
            for one, other in combinations(sorted(set(owners)), 2):
                if distinct(one, other):
                    apart |= (labels[:, None] == one) & (labels == other)
        return apart | apart.T

    def _split(self, turns: dict[int, int]) -> list[Revision]:
        """Gives past turns these labels."""
        moved: dict[tuple[int, int], list[int]] = {}
        for number, label in turns.items():
            past = self.state.past[number]
            source = past.label
            if source == label:
                continue
            self._forget(number)
            past.label = label
            self._note(past)
            self.state.speakers[label].turns.sort()
            moved.setdefault((source, label), []).append(number)
            if source not in self.state.speakers:
                self.state.retired.append(source)
        return [
            Revision(numbers, source, target, "split")
            for (source, target), numbers in moved.items()
        ]

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


def _unit(vector: Vector) -> Vector:
    """The same of length 1; zeros stay zeros."""
    return vector / max(float(np.linalg.norm(vector)), 1e-9)
