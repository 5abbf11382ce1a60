"""Words of the development sentences: log-probabilities of characters → text → error rates."""

from collections.abc import Callable, Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from recipes.diarization import percent
from recipes.student import VOCABULARY
from stream.score import Edits, character_errors, word_errors

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


def word_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """(meant, said) → character and word error rate, per cent, case and punctuation aside."""
    characters, words = Edits(), Edits()
    for meant, said in pairs:
        characters += character_errors(meant, said)
        words += word_errors(meant, said)
    return {"cer": percent(characters.rate), "wer": percent(words.rate), "words": words.total}
