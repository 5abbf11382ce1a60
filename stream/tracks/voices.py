"""The session's speakers → enrolled people, with an explicit unknown."""

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinks.events import Event, SpeakerIdentified, SpeakerRevised
from stream.tracks.settings import TracksSettings

Stamp = Callable[[int, int], dict[str, Any]]

Turns = Callable[[], list[str]]
"""Asked for a label's turns that are over, which are many and seldom needed."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """The enrolled people to look for.

    Attributes:
        names: One a person.
        vectors: [people, E] each person's mean embedding, as the x-vector head gives it.
        cohort: [others, E] voices that are nobody's here: what a score means is measured by them.
        left_out: Enrolled people who cannot be looked for with this checkpoint.
    """

    names: tuple[str, ...]
    vectors: NDArray[np.float32]
    cohort: NDArray[np.float32] | None = None
    left_out: tuple[str, ...] = ()

    def same(self, other: "Gallery | None") -> bool:
        """Whether these are the same people with the same voices, beside the same cohort."""
        return (
            other is not None
            and (self.names, self.left_out) == (other.names, other.left_out)
            and np.array_equal(self.vectors, other.vectors)
            and self.cohort is other.cohort
        )


@dataclass
class Verdict:
    """What was said of a label.

    Attributes:
        identity: Enrolled name; None is unknown.
        score: With that person, or with the nearest: the cosine, normalised by the cohort.
        margin: Score less the runner-up's; the score itself if only one person is enrolled.
        given: A listener said it, who knows better than any score.
    """

    identity: str | None
    score: float
    margin: float
    given: bool = False


@dataclass
class VoicesState:
    """Verdicts by label."""

    verdicts: dict[int, Verdict] = field(default_factory=dict[int, Verdict])


class Cohort:
    """Adaptive symmetric score normalisation.

    A cosine is a surprise only beside those that strangers reach: both voices are compared with the
    cohort, and the score is told in deviations from what its nearest members get. Deviations are
    then put back on the scale of cosines, by what the cohort's own members are to each other, so
    that thresholds keep their meaning. Source: Matějka et al., Interspeech 2017 ("Analysis of score
    normalization in multilingual speaker recognition"), AS-norm 1.

    Args:
        vectors: [N, E] centred unit vectors.
        nearest: How many members count.
    """

    def __init__(self, vectors: NDArray[np.float64], nearest: int) -> None:
        self._vectors = vectors
        self._nearest = min(nearest, max(len(vectors) - 1, 1))
        among = vectors @ vectors.T
        np.fill_diagonal(among, -np.inf)
        mean, spread = self._moments(among)
        self._mean, self._spread = float(mean.mean()), float(spread.mean())

    def of(self, vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[n, E] unit vectors → mean and deviation [n] of their nearest members' cosines."""
        return self._moments(vectors @ self._vectors.T)

    def normalised(
        self,
        scores: NDArray[np.float64],
        people: tuple[NDArray[np.float64], NDArray[np.float64]],
        voice: tuple[NDArray[np.float64], NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        """[n] cosines of people with one voice → [n] scores, −1 to 1."""
        surprise = (scores - people[0]) / people[1] + (scores - voice[0]) / voice[1]
        return np.clip(self._mean + self._spread * surprise / 2, -1.0, 1.0)

    def _moments(
        self, cosines: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        top = -np.partition(-cosines, self._nearest - 1, axis=-1)[..., : self._nearest]
        return top.mean(-1), np.maximum(top.std(-1), 1e-3)


class Voices:
    """Who of the enrolled a label is; sans-I/O.

    An identity needs evidence, score and margin. Once given it is kept until score or margin fall
    clearly below, so that it does not flicker.
    """

    def __init__(
        self,
        settings: TracksSettings,
        gallery: Gallery,
        stamp: Stamp,
        *,
        state: VoicesState | None = None,
    ) -> None:
        self.state = state or VoicesState()
        self.settings = settings.voices
        self._stamp = stamp
        mean = settings.speakers.mean
        self._mean = None if mean is None else np.asarray(mean, np.float64)
        self.look_for(gallery)

    def look_for(self, gallery: Gallery) -> None:
        """From now on, these people."""
        vectors = np.asarray(gallery.vectors, np.float64)
        assert vectors.shape[:1] == (len(gallery.names),), (
            f"expected {len(gallery.names)} voices, got {vectors.shape}"
        )
        self._names = gallery.names
        self._vectors = self._unit(vectors)
        self._cohort = None
        if gallery.names and gallery.cohort is not None and self.settings.cohort:
            self._cohort = Cohort(self._unit(gallery.cohort), self.settings.cohort)
            self._people = self._cohort.of(self._vectors)

    def _unit(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        """[n, E] embeddings → centred, of length 1."""
        centred = np.asarray(vectors, np.float64)
        if len(centred) and self._mean is not None:
            centred = centred - self._mean
        return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-9)

    def embedding(self, vector: NDArray[np.float64]) -> NDArray[np.float32]:
        """[E] centred unit vector → an embedding that a gallery can hold."""
        return np.asarray(vector if self._mean is None else vector + self._mean, np.float32)

    def name(self, label: int, name: str, evidence_s: float, turns: Turns, now: int) -> list[Event]:
        """A listener says who a label is.

        Args:
            label: Number of the speaker.
            name: The person.
            evidence_s: Seconds of clean speech of the label.
            turns: Its turns that are over.
            now: Sample of the decision.

        Returns:
            speaker.identified, and speaker.revised for its past turns.
        """
        was = self.identity(label)
        self.state.verdicts[label] = Verdict(name, 1.0, 1.0, given=True)
        if was == name:
            return []
        return self._told(label, was, evidence_s, turns, now)

    def identity(self, label: int) -> str | None:
        """The enrolled name of a label; None if unknown or undecided."""
        verdict = self.state.verdicts.get(label)
        return None if verdict is None else verdict.identity

    def carrier(self, vector: NDArray[np.float64], evidence_s: float) -> int | None:
        """The label that carries the identity of this voice, if it is an enrolled one's.

        A turn may be unlike the rest of its speaker and yet like the enrolled voice.
        """
        if not self._names or evidence_s * 1000 < self.settings.evidence_ms or not vector.size:
            return None
        name = self._judge(vector, None).identity
        if name is not None:
            for label, verdict in sorted(self.state.verdicts.items()):
                if verdict.identity == name:
                    return label
        return None

    def twin(self, label: int) -> int | None:
        """Another label that was found to be the same person."""
        name = self.identity(label)
        if name is None:
            return None
        for other, verdict in sorted(self.state.verdicts.items()):
            if other != label and verdict.identity == name:
                return other
        return None

    def named_apart(self, one: int, other: int) -> bool:
        """Whether a listener gave the two labels different names."""
        verdicts = [self.state.verdicts.get(label) for label in (one, other)]
        return len({each.identity for each in verdicts if each is not None and each.given}) == 2

    def observe(
        self,
        label: int,
        vector: NDArray[np.float64],
        evidence_s: float,
        turns: Turns,
        now: int,
    ) -> list[Event]:
        """Compares a label with the enrolled voices, if there is evidence enough.

        Who is enrolled no longer is unknown from here on.

        Args:
            label: Number of the speaker.
            vector: [E] centred unit vector of all its speech.
            evidence_s: Seconds of clean speech in that.
            turns: Its turns that are over, for the revision when it gets an identity.
            now: Sample of the decision.

        Returns:
            speaker.identified when the label is decided for the first time or otherwise, then
            speaker.revised for its past turns if it got a name, or lost one.
        """
        if evidence_s * 1000 < self.settings.evidence_ms or not vector.size:
            return []
        before = self.state.verdicts.get(label)
        if before is not None and before.given:
            return []
        was = None if before is None else before.identity
        if not self._names and was is None:
            return []
        verdict = self._judge(vector, was) if self._names else Verdict(None, 0.0, 0.0)
        self.state.verdicts[label] = verdict
        if before is not None and was == verdict.identity:
            return []
        return self._told(label, was, evidence_s, turns, now)

    def _told(
        self, label: int, was: str | None, evidence_s: float, turns: Turns, now: int
    ) -> list[Event]:
        """The events of a label's verdict that is new."""
        verdict = self.state.verdicts[label]
        events: list[Event] = [
            SpeakerIdentified(
                speaker=f"S{label}",
                identity=verdict.identity,
                score=round(verdict.score, 4),
                margin=round(verdict.margin, 4),
                evidence_s=round(evidence_s, 3),
                **self._stamp(now, now),
            )
        ]
        past = turns() if verdict.identity != was else []
        if past:
            events.append(
                SpeakerRevised(
                    revision_of=past,
                    from_label=was or f"S{label}",
                    to_label=verdict.identity or f"S{label}",
                    reason="identified",
                    **self._stamp(now, now),
                )
            )
        return events

    def merged(self, source: int, target: int, evidence_s: float, now: int) -> list[Event]:
        """Forgets a label that became another, which is compared anew at its next turn.

        A name that a listener gave goes with the voice.
        """
        gone = self.state.verdicts.pop(source, None)
        kept = self.state.verdicts.get(target)
        if gone is None or not gone.given or (kept is not None and kept.given):
            return []
        self.state.verdicts[target] = gone
        return self._told(target, None if kept is None else kept.identity, evidence_s, list, now)

    def forget(self, label: int) -> None:
        """The session has no such speaker any more; the number may get another voice."""
        self.state.verdicts.pop(label, None)

    def keep(self, labels: Container[int]) -> None:
        """Forget all labels but these."""
        for label in [each for each in self.state.verdicts if each not in labels]:
            self.forget(label)

    def _judge(self, vector: NDArray[np.float64], current: str | None) -> Verdict:
        scores = self._vectors @ vector
        if self._cohort is not None:
            scores = self._cohort.normalised(scores, self._people, self._cohort.of(vector[None]))
        order = np.argsort(-scores, kind="stable")
        best = int(order[0])
        score = float(scores[best])
        margin = score - float(scores[order[1]]) if len(order) > 1 else score
        slack = self.settings.keep if self._names[best] == current else 0.0
        known = score >= self.settings.threshold - slack
        lead = margin >= self.settings.margin - slack or len(order) == 1
        return Verdict(self._names[best] if known and lead else None, score, margin)
