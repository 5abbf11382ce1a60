"""An n-gram of words, and what it says of a word that is only begun or that it never saw.

KenLM looks the words up (the extra `lm`, imported when a model is loaded). Around it is what a
decoder of characters needs: the probability of all words that begin with some letters, so that a
beam is judged while a word is being spelled, and a spelling model for words outside the
vocabulary, so that names remain possible.
"""

import gzip
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final, Self

import numpy as np
import structlog
from numpy.typing import NDArray

from stream.tracks.frames import Vocabulary
from stream.tracks.settings import WordsSettings

log = structlog.get_logger(__name__)

BEGIN: Final = "<s>"
"""In a history: the segment begins there."""

UNKNOWN: Final = "<unk>"

NAMES: Final = ("language_model.arpa.gz", "language_model.arpa")
"""What the file is called beside a CTC checkpoint."""

_SPECIAL: Final = frozenset({BEGIN, "</s>", UNKNOWN, "<UNK>"})
_LN10: Final = math.log(10)
_STRANGE: Final = 1e-3
"""Probability of a letter that no word of the vocabulary has."""


class LanguageModelError(Exception):
    """A language model that cannot be used: what was found, what was expected."""


class LanguageModel:
    """Probabilities of words, begun words and unseen words; read-only, shared by all streams.

    Words are compared in lower case. All results are natural logarithms.

    Args:
        ngram: A `kenlm.Model`.
        unigrams: Its words → their base-10 logarithms, ``<unk>`` among them.
    """

    def __init__(self, ngram: Any, unigrams: Mapping[str, float]) -> None:
        import kenlm

        self.order: int = ngram.order
        self._ngram = ngram
        self._state: Callable[[], Any] = kenlm.State
        self._unknown = 10 ** unigrams.get(UNKNOWN, unigrams.get("<UNK>", -7.0))
        self._written = {word.lower(): word for word in unigrams if word not in _SPECIAL}
        self._begun: dict[str, float] = {}
        for word, score in unigrams.items():
            if word in _SPECIAL:
                continue
            probability = 10**score
            folded = word.lower()
            for length in range(1, len(folded) + 1):
                letters = folded[:length]
                self._begun[letters] = self._begun.get(letters, 0.0) + probability
        self._spelling = Spelling(self._written)
        # A beam asks for the same few hundred things frame after frame; more would only be kept.
        self.prefix = lru_cache(1 << 11)(self._prefix)
        self.word = lru_cache(1 << 11)(self._word)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads an ARPA file, gzip where its name ends in ``.gz``.

        Raises:
            LanguageModelError: the extra is not installed, or the file cannot be read as ARPA.
        """
        try:
            import kenlm
        except ImportError as error:
            raise LanguageModelError(
                "kenlm is not installed; decoding with a language model needs the extra: "
                "pip install 'livesat[lm]'"
            ) from error
        text = _read(path)
        unigrams = _unigrams(path, text.splitlines())
        config = kenlm.Config()
        config.show_progress = False
        config.arpa_complain = kenlm.ARPALoadComplain.NONE
        try:
            # KenLM reads gzip only where it was built to.
            with NamedTemporaryFile("w", suffix=".arpa", encoding="utf-8") as plain:
                plain.write(text)
                plain.flush()
                ngram = kenlm.Model(plain.name, config)
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("(")[2].rstrip(")") or str(error)
            raise LanguageModelError(f"{path}: expected an ARPA file, got {reason}") from error
        return cls(ngram, unigrams)

    def _prefix(self, letters: str) -> float:
        """Log-probability that a word begins so, whatever came before it."""
        letters = letters.lower()
        unseen = self._unknown * math.exp(self._spelling.prefix(letters))
        return math.log(self._begun.get(letters, 0.0) + unseen + 1e-300)

    def _word(self, history: tuple[str, ...], word: str) -> float:
        """Log-probability of a word after ``order - 1`` others, or those since `BEGIN`."""
        state, after = self._state(), self._state()
        if history and history[0] == BEGIN:
            self._ngram.BeginSentenceWrite(state)
            history = history[1:]
        else:
            self._ngram.NullContextWrite(state)
        for before in history:
            self._ngram.BaseScore(state, self._written.get(before.lower(), UNKNOWN), after)
            state, after = after, state
        known = self._written.get(word.lower())
        score = _LN10 * self._ngram.BaseScore(state, known or UNKNOWN, after)
        return score if known else score + self._spelling.word(word.lower())


class Spelling:
    """How words are spelled: letters after the two before them, counted over a vocabulary.

    Each order is smoothed with the one below it (Dirichlet prior: MacKay and Peto, 1995, "A
    hierarchical Dirichlet language model").
    """

    PRIOR: Final = 5.0

    def __init__(self, words: Iterable[str]) -> None:
        spelled = [f"\n{word}\n" for word in words]
        letters = sorted({letter for word in spelled for letter in word})
        self._index = {letter: number for number, letter in enumerate(letters)}
        size = len(letters)
        # Words stand in one row, an end apart; the first letter of a word has seen two ends.
        text = "\n" + "".join(spelled)
        row = np.array([self._index[letter] for letter in text], np.int64)
        triples = (row[:-2] * size + row[1:-1]) * size + row[2:]
        keep = ~((row[1:-1] == self._index["\n"]) & (row[2:] == self._index["\n"]))
        counts = np.bincount(triples[keep], minlength=size**3).reshape(size, size, size)
        one = self._smooth(counts.sum((0, 1)), np.full(size, 1 / size))
        two = self._smooth(counts.sum(0), one)
        self._three = np.log(self._smooth(counts, two))

    def _smooth(self, counts: NDArray[np.int64], below: NDArray[np.float64]) -> Any:
        total = counts.sum(-1, keepdims=True)
        return (counts + self.PRIOR * below) / (total + self.PRIOR)

    def prefix(self, letters: str) -> float:
        """Log-probability (ln) that a spelling begins so."""
        return sum(self._letter(letters, at) for at in range(len(letters)))

    def word(self, letters: str) -> float:
        """Log-probability (ln) of a whole spelling."""
        return self.prefix(letters) + self._letter(letters + "\n", len(letters))

    def _letter(self, letters: str, at: int) -> float:
        index = self._index
        row = [index.get(letter) for letter in ("\n\n" + letters)[at : at + 3]]
        if row[2] is None:
            return math.log(_STRANGE)
        end = index["\n"]
        before = [end if number is None else number for number in row[:2]]
        return float(self._three[before[0], before[1], row[2]])


def open_language_model(
    settings: WordsSettings, beside: Path | None, vocabulary: Vocabulary | None
) -> LanguageModel | None:
    """The model that words are decoded with; None where they are decoded greedily.

    Args:
        settings: Which decoder, and which model if not the checkpoint's own.
        beside: The model that came with the CTC checkpoint, if one did.
        vocabulary: Of the CTC head; None without one.

    Raises:
        LanguageModelError: the beam is asked for and cannot be had, or the model named in the
            settings cannot be read.
    """
    path = settings.language_model or beside
    if vocabulary is None or settings.decoder == "greedy":
        return None
    asked = settings.decoder == "beam"
    if path is None or vocabulary.delimiter is None:
        if asked:
            missing = (
                "language_model: the checkpoint has none, expected an ARPA file"
                if path is None
                else "decoder: beam needs a symbol between words, the checkpoint has none; "
                "expected greedy"
            )
            raise LanguageModelError(f"tracks.words.{missing}")
        return None
    if not asked and not _installed():
        log.warning(
            "words are decoded greedily: kenlm is not installed (pip install 'livesat[lm]')"
        )
        return None
    return LanguageModel.load(path)


def _installed() -> bool:
    from importlib.util import find_spec

    return find_spec("kenlm") is not None


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not such text"
        raise LanguageModelError(
            f"{path}: expected a language model as ARPA text, plain or gzip: {reason}"
        ) from error


def _unigrams(path: Path, lines: Iterable[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    inside = False
    for number, line in enumerate(lines, 1):
        if line.startswith("\\"):
            if inside:
                break
            inside = line.strip() == "\\1-grams:"
        elif inside and line.strip():
            columns = line.split()
            try:
                found[columns[1]] = float(columns[0])
            except (IndexError, ValueError) as error:
                raise LanguageModelError(
                    f"{path}:{number}: expected an ARPA unigram, got {line[:60]!r}"
                ) from error
    if not found:
        raise LanguageModelError(f"{path}: expected an ARPA file with \\1-grams:, found none")
    return found
