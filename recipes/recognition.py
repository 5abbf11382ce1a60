"""Words of the development sentences: log-probabilities of characters → text → error rates."""

from collections.abc import Callable, Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from recipes.diarization import percent, stamp
from recipes.student import VOCABULARY
from sinks.events import TranscriptFinal
from stream.score import Edits, character_errors, word_errors
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import LanguageModel
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings

Floats = NDArray[np.float32]

Decoder = Callable[[Floats], str]
"""[T, V] log-probabilities of `VOCABULARY` → text."""

SPELLED = VOCABULARY.index("|")
"""Index of the first output that is a character; those before are symbols."""


def greedy(characters: Floats) -> str:
    """The best output of each frame, repeats and blanks left out."""
    best = [index for index, _ in groupby(characters.argmax(-1).tolist())]
    spelled = "".join(VOCABULARY[index] for index in best if index >= SPELLED)
    return " ".join(spelled.replace("|", " ").split())


def beam(settings: TracksSettings, language: LanguageModel) -> Decoder:
    """The product's own search with an n-gram, whole recordings at a time."""
    symbols = Vocabulary(VOCABULARY, blank=0)

    def decode(characters: Floats) -> str:
        frames = Frames(start=0, ctc=characters)
        tracks = Tracks(settings, vocabulary=symbols, language=language, stamp=stamp())
        events = [*tracks.step(frames), *tracks.flush(frames.end)]
        return " ".join(event.text for event in events if isinstance(event, TranscriptFinal))

    return decode


def word_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """(meant, said) → character and word error rate, per cent, case and punctuation aside."""
    characters, words = Edits(), Edits()
    for meant, said in pairs:
        characters += character_errors(meant, said)
        words += word_errors(meant, said)
    return {"cer": percent(characters.rate), "wer": percent(words.rate), "words": words.total}
