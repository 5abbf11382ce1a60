"""All tracks of one stream, advanced together frame by frame."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sinks.events import Event
from stream.tracks.codec import pack, unpack
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.labels import Labels, LabelsState
from stream.tracks.language import LanguageModel
from stream.tracks.settings import TracksSettings
from stream.tracks.turns import Embed, Stamp, Turns, TurnsState
from stream.tracks.voices import Gallery, Voices, VoicesState
from stream.tracks.words import Words, WordsState

AT_ONCE: Final = 2
"""Frames that are taken at once: up to 3 ms each, where a beam search decides words."""

NOBODY = Gallery((), np.zeros((0, 0), np.float32))


@dataclass
class TracksState:
    """All that the tracks of a stream know: plain data, small."""

    turns: TurnsState = field(default_factory=TurnsState)
    voices: VoicesState = field(default_factory=VoicesState)
    words: WordsState = field(default_factory=WordsState)
    labels: LabelsState = field(default_factory=LabelsState)


class Tracks:
    """Head outputs of one stream → events; sans-I/O.

    Final events depend on the frames alone, not on how they were split into `Frames`.

    Args:
        settings: Thresholds.
        embed: (mass, first, second) → [E] x-vector; None without that head.
        vocabulary: Of the CTC head; None without that head.
        language: Decode words with it, by beam search; None decodes greedily.
        voiceprints: The enrolled people to look for, if any.
        stamp: (start sample, end sample) → envelope fields. It consumes a `seq`, so it is called
            once an event, in order.
        classes: Head name → labels, for the sequence-classification heads.
    """

    def __init__(
        self,
        settings: TracksSettings,
        *,
        embed: Embed | None = None,
        vocabulary: Vocabulary | None = None,
        language: LanguageModel | None = None,
        voiceprints: Gallery | None = None,
        stamp: Stamp,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.settings = settings
        self._embed = embed
        self._vocabulary = vocabulary
        self._language = language
        self._gallery = voiceprints or NOBODY
        self._stamp = stamp
        self._classes = classes or {}
        self._compose(TracksState())

    def step(self, frames: Frames) -> list[Event]:
        """Takes the next frames of the stream; what is known by now."""
        return [event for some in self.steps(frames) for event in some]

    def steps(self, frames: Frames) -> Iterator[list[Event]]:
        """The same a few frames at a time, between which somebody else may compute."""
        events = self._turns.enter(frames)
        if self._words is not None:
            events.extend(self._words.enter(frames))
        self._labels.enter(frames)
        for row in range(frames.rows):
            if row and row % AT_ONCE == 0:
                yield events
                events = []
            events.extend(self._turns.row(frames, row))
            if self._words is not None:
                events.extend(self._words.row(frames, row))
            events.extend(self._labels.row(frames, row))
        events.extend(self._turns.leave(frames))
        if self._words is not None:
            events.extend(self._words.leave())
        yield events

    def flush(self, end: int) -> list[Event]:
        """Ends all that is open: the stream ends at this sample."""
        events = self._turns.flush(end)
        if self._words is not None:
            events.extend(self._words.flush())
        return events

    def speaker(self, label: str) -> int | None:
        """The number of a label such as "S2", if there is such a speaker."""
        return self._turns.known(label)

    def profile(self, number: int) -> tuple[NDArray[np.float32], float]:
        """[E] embedding of a speaker's voice so far and the seconds of clean speech in it."""
        vector, evidence_s = self._turns.clusters.centroid(number)
        return self._voices.embedding(vector), evidence_s

    def name(self, number: int, name: str) -> list[Event]:
        """A listener says who a speaker is → speaker.identified and speaker.revised."""
        return self._turns.name(number, name)

    def look_for(self, gallery: Gallery) -> None:
        """From now on, these enrolled people."""
        self._gallery = gallery
        self._voices.look_for(gallery)

    def freeze(self) -> Callable[[], bytes]:
        """Everything the tracks know now.

        Returns:
            Makes bytes of it, on any thread, for `restore`.
        """
        return partial(pack, deepcopy(self._state))

    def restore(self, data: bytes) -> None:
        """Goes on where the tracks were that gave this by `freeze`.

        Raises:
            ValueError: not such bytes, or of another version.
        """
        self._compose(unpack(TracksState, data))

    def _compose(self, state: TracksState) -> None:
        settings, stamp = self.settings, self._stamp
        self._state = state
        self._voices = Voices(settings, self._gallery, stamp, state=state.voices)
        self._turns = Turns(settings, self._embed, stamp, voices=self._voices, state=state.turns)
        self._words = None
        if self._vocabulary is not None:
            self._words = Words(
                settings.words,
                self._vocabulary,
                self._turns,
                stamp,
                language=self._language,
                state=state.words,
            )
        self._labels = Labels(settings.labels, self._classes, stamp, state=state.labels)
