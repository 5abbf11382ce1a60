"""CTC output, a frame at a time → words: greedily, or by a beam search with a language model.

Both take one frame and say which words are certain now, and which are read so far. What is certain
never changes; what is only read may, in the beam. Sans-I/O, and every state is plain data.

The beam search is that over prefixes (Graves, 2012; Hannun et al., 2014, "First-pass large
vocabulary continuous speech recognition using bi-directional recurrent DNNs"): a hypothesis is a
text, with the probability of all the ways to say it so far. Streams make two things different from
the search over a whole utterance. A word leaves the search when every hypothesis has it, or when it
has waited long enough: the search holds a few words however long the stream is. And the language
model judges a word while it is spelled, by all the words that begin so, else a narrow beam would
lose the right one before its end.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.clock import HOP
from stream.tracks.frames import Vocabulary
from stream.tracks.language import BEGIN, LanguageModel
from stream.tracks.settings import WordsSettings, hops

Scores = NDArray[np.float32]

NEVER: Final = -1e9
"""ln of a probability of zero: finite, so that a state is plain JSON."""

SILENT: Final = math.log(0.99)
"""A frame whose blank is at least this probable moves no hypothesis against another."""

UNLIKELY: Final = -7.0
"""Symbols below this log-probability are not tried, …"""

TRIED: Final = 8
"""… nor more than this many a frame."""

HOPELESS: Final = 12.0
"""A hypothesis this far (in ln) behind the best is dropped."""


@dataclass
class Spoken:
    """A word, finished or not.

    Attributes:
        text: Its characters so far.
        start: Sample at which the frame of its first character begins.
        end: Sample at which the frame of its last character ends.
        total: Sum of the probabilities of its characters' frames.
        count: Number of those frames.
        turn: Number of the turn it belongs to, 0 if none is known.
    """

    text: str
    start: int
    end: int
    total: float
    count: int
    turn: int = 0


class Symbols:
    """What each output of a CTC head is: a character, the word delimiter, or nothing."""

    def __init__(self, vocabulary: Vocabulary, case: str) -> None:
        tokens = vocabulary.tokens
        self.text = [token.lower() if case == "lower" else token for token in tokens]
        self.blank = vocabulary.blank
        self.delimiter = -1 if vocabulary.delimiter is None else tokens.index(vocabulary.delimiter)
        # <s>, </s>, <unk>, [PAD]: symbols of the tokenizer, not of any language.
        special = [
            index != self.delimiter and len(token) > 2 and (token[0] + token[-1]) in {"<>", "[]"}
            for index, token in enumerate(tokens)
        ]
        self.characters = [
            not special[index] and index not in (self.blank, self.delimiter)
            for index in range(len(tokens))
        ]
        self.nothing = [
            index for index in range(len(tokens)) if special[index] or index == self.blank
        ]


class Decoder(Protocol):
    """Frames → words."""

    def row(self, scores: Scores, best: int, start: int) -> list[Spoken]:
        """Takes a frame; the words that became certain by it.

        Args:
            scores: [V] log-probabilities.
            best: The most probable of them.
            start: Sample at which the frame begins.
        """
        ...

    @property
    def reading(self) -> str:
        """Text of the words that are not certain: equal as long as nothing changed."""
        ...

    def open(self) -> list[Spoken]:
        """The words that are not certain, the last of them perhaps unfinished."""
        ...

    def finish(self) -> list[Spoken]:
        """Makes them certain; what comes begins another word."""
        ...

    def forget(self) -> None:
        """What comes has nothing to do with the words before it."""
        ...


@dataclass
class GreedyState:
    """All that `Greedy` knows.

    Attributes:
        token: Output of the frame before.
        draft: The word that is not finished.
    """

    token: int = -1
    draft: Spoken | None = None


class Greedy:
    """The best symbol of every frame: a word is certain once it is finished."""

    def __init__(self, symbols: Symbols, state: GreedyState) -> None:
        self.state = state
        self._symbols = symbols

    def row(self, scores: Scores, best: int, start: int) -> list[Spoken]:
        """See `Decoder`."""
        state, symbols = self.state, self._symbols
        before, state.token = state.token, best
        if not symbols.characters[best]:
            return self._finished() if best == symbols.delimiter else []
        words = list[Spoken]()
        draft = state.draft
        repeated = best == before and draft is not None
        if not repeated and symbols.delimiter < 0:
            words, draft = self._finished(), None
        if draft is None:
            draft = state.draft = Spoken("", start, start, 0.0, 0)
        if not repeated:
            draft.text += symbols.text[best]
        draft.end = start + HOP
        draft.total += math.exp(min(float(scores[best]), 0.0))
        draft.count += 1
        return words

    @property
    def reading(self) -> str:
        """See `Decoder`."""
        return self.state.draft.text if self.state.draft else ""

    def open(self) -> list[Spoken]:
        """See `Decoder`."""
        return [self.state.draft] if self.state.draft else []

    def finish(self) -> list[Spoken]:
        """See `Decoder`."""
        self.state.token = -1
        return self._finished()

    def forget(self) -> None:
        """See `Decoder`."""

    def _finished(self) -> list[Spoken]:
        draft, self.state.draft = self.state.draft, None
        return [draft] if draft else []


@dataclass(slots=True)
class Hypothesis:
    """A text that may have been said since the last certain word; never changed in place.

    Attributes:
        key: The text, a space behind every finished word.
        words: Its finished words.
        draft: Its unfinished word.
        token: Symbol of the draft's last character.
        blank: ln of the probability of all the ways to it that end in silence.
        symbol: The same of those that end in its last character.
        outlook: What the language model says of the draft so far.
    """

    key: str
    words: list[Spoken]
    draft: Spoken | None
    token: int
    blank: float
    symbol: float
    outlook: float

    @property
    def rank(self) -> float:
        """ln of its probability, language and all."""
        return _add(self.blank, self.symbol) + self.outlook


def _nothing() -> Hypothesis:
    return Hypothesis("", [], None, -1, 0.0, NEVER, 0.0)


@dataclass
class BeamState:
    """All that `Beam` knows.

    Attributes:
        hypotheses: The texts that are still possible, best first.
        history: The certain words before them that the language model still looks at.
    """

    hypotheses: list[Hypothesis] = field(default_factory=lambda: [_nothing()])
    history: list[str] = field(default_factory=lambda: [BEGIN])


class Beam:
    """Prefix beam search with a language model; its memory is a few words of a few texts."""

    def __init__(
        self,
        symbols: Symbols,
        settings: WordsSettings,
        language: LanguageModel,
        state: BeamState,
    ) -> None:
        assert symbols.delimiter >= 0, "expected a vocabulary with a word delimiter"
        self.state = state
        self._symbols = symbols
        self._language = language
        self._width = settings.beam_width
        self._alpha = settings.alpha
        self._beta = settings.beta
        self._wait = hops(settings.commit_ms) * HOP
        self._memory = language.order - 1

    def row(self, scores: Scores, best: int, start: int) -> list[Spoken]:
        """See `Decoder`."""
        state, symbols = self.state, self._symbols
        silence = float(scores[symbols.blank])
        if silence >= SILENT:
            state.hypotheses = [_rested(each) for each in state.hypotheses]
            return self._waited(start)
        for index in symbols.nothing:
            if index != symbols.blank and scores[index] > UNLIKELY:
                silence = _add(silence, float(scores[index]))
        likely = np.flatnonzero(scores > UNLIKELY)
        if len(likely) > TRIED:
            likely = likely[np.argsort(-scores[likely], kind="stable")[:TRIED]]
        tried = [(int(i), float(scores[i])) for i in likely if symbols.characters[i]]
        state.hypotheses = self._pruned(
            self._extended(silence, float(scores[symbols.delimiter]), tried, start)
        )
        return self._agreed() + self._waited(start)

    @property
    def reading(self) -> str:
        """See `Decoder`."""
        return self.state.hypotheses[0].key

    def open(self) -> list[Spoken]:
        """See `Decoder`."""
        best = self.state.hypotheses[0]
        return [*best.words, best.draft] if best.draft else list(best.words)

    def finish(self) -> list[Spoken]:
        """See `Decoder`."""
        ended = [
            each if each.draft is None else self._ended(each, each.rank - each.outlook)
            for each in self.state.hypotheses
        ]
        words = max(ended, key=lambda each: each.rank).words
        self.state.hypotheses = [_nothing()]
        self._remember(words)
        return [replace(word) for word in words]

    def forget(self) -> None:
        """See `Decoder`."""
        self.state.history = [BEGIN]

    def _extended(
        self, silence: float, delimiter: float, tried: list[tuple[int, float]], start: int
    ) -> dict[str, Hypothesis]:
        """All hypotheses one frame later, by their text."""
        found: dict[str, Hypothesis] = {}
        kept = self.state.hypotheses
        top = max([silence, delimiter, *(score for _, score in tried)])
        floor = kept[0].rank + top - HOPELESS
        for each in kept:
            total = _add(each.blank, each.symbol)
            room = floor - total - each.outlook  # what a frame must have to be worth a hypothesis
            draft, token = each.draft, each.token
            if draft is None:
                # A delimiter after a delimiter, or before any word, says nothing.
                _put(found, replace(each, blank=total + _add(silence, delimiter), symbol=NEVER))
            else:
                again = next((score for index, score in tried if index == token), NEVER)
                rested, held = total + silence, each.symbol + again
                if held > rested:
                    draft = replace(
                        draft,
                        end=start + HOP,
                        total=draft.total + math.exp(min(again, 0.0)),
                        count=draft.count + 1,
                    )
                _put(found, replace(each, draft=draft, blank=rested, symbol=held))
                if delimiter >= room:
                    _put(found, self._ended(each, total + delimiter))
            for index, score in tried:
                if score < room:
                    continue
                before = each.blank if index == token else total
                if before > NEVER / 2:
                    _put(found, self._spelled(each, index, before + score, score, start))
        return found

    def _spelled(
        self, each: Hypothesis, index: int, symbol: float, score: float, start: int
    ) -> Hypothesis:
        """A hypothesis and one more character."""
        character = self._symbols.text[index]
        probability = math.exp(min(score, 0.0))
        draft = each.draft
        draft = Spoken(
            text=character if draft is None else draft.text + character,
            start=start if draft is None else draft.start,
            end=start + HOP,
            total=probability if draft is None else draft.total + probability,
            count=1 if draft is None else draft.count + 1,
        )
        outlook = self._alpha * self._language.prefix(draft.text) + self._beta
        return Hypothesis(
            each.key + character, each.words, draft, index, NEVER, symbol, outlook
        )

    def _ended(self, each: Hypothesis, blank: float) -> Hypothesis:
        """A hypothesis whose draft is a word now, judged after the words before it."""
        draft = each.draft
        assert draft is not None
        history = [*self.state.history, *(word.text for word in each.words)]
        history = tuple(history[-self._memory :]) if self._memory else ()
        language = self._alpha * self._language.word(history, draft.text) + self._beta
        words = [*each.words, draft]
        return Hypothesis(each.key + " ", words, None, -1, blank + language, NEVER, 0.0)

    def _pruned(self, found: dict[str, Hypothesis]) -> list[Hypothesis]:
        """The best of them, best first, with the best one's probability for a unit."""
        ranked = [(each.rank, each) for each in found.values()]
        ranked.sort(key=lambda pair: -pair[0])
        top = ranked[0][0]
        return [
            replace(
                each, blank=max(each.blank - top, NEVER), symbol=max(each.symbol - top, NEVER)
            )
            for rank, each in ranked[: self._width]
            if rank >= top - HOPELESS
        ]

    def _agreed(self) -> list[Spoken]:
        """Takes the words out that all hypotheses begin with."""
        certain = list[Spoken]()
        while self.state.hypotheses[0].words:
            word = self.state.hypotheses[0].words[0]
            if not all(
                each.words and each.words[0].text == word.text for each in self.state.hypotheses
            ):
                break
            self._take(word, certain)
        return certain

    def _waited(self, start: int) -> list[Spoken]:
        """Makes a word certain that has waited long enough: whoever reads it otherwise is out."""
        certain = list[Spoken]()
        while (words := self.state.hypotheses[0].words) and start - words[0].end >= self._wait:
            self.state.hypotheses = [
                each
                for each in self.state.hypotheses
                if each.words and each.words[0].text == words[0].text
            ]
            self._take(words[0], certain)
        return certain

    def _take(self, word: Spoken, certain: list[Spoken]) -> None:
        self.state.hypotheses = [
            replace(each, key=each.key[len(word.text) + 1 :], words=each.words[1:])
            for each in self.state.hypotheses
        ]
        self._remember([word])
        certain.append(replace(word))

    def _remember(self, words: list[Spoken]) -> None:
        history = [*self.state.history, *(word.text for word in words)]
        self.state.history = history[-self._memory :] if self._memory else []


def _put(found: dict[str, Hypothesis], new: Hypothesis) -> None:
    """Adds the ways to a text to those found so far; times are those of the likelier way."""
    old = found.get(new.key)
    if old is None:
        found[new.key] = new
        return
    main = new if _add(new.blank, new.symbol) > _add(old.blank, old.symbol) else old
    found[new.key] = replace(
        main, blank=_add(old.blank, new.blank), symbol=_add(old.symbol, new.symbol)
    )


def _rested(each: Hypothesis) -> Hypothesis:
    """A hypothesis after a silent frame, whose cost is everybody's."""
    if each.symbol <= NEVER:
        return each
    return replace(each, blank=_add(each.blank, each.symbol), symbol=NEVER)


def _add(one: float, other: float) -> float:
    """ln of the sum of two probabilities."""
    if one < other:
        one, other = other, one
    apart = other - one
    return one if apart < -40 else one + math.log1p(math.exp(apart))
