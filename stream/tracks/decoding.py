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

SILENT: Final = math.log(0.98)
"""A frame whose blank is at least this probable moves no hypothesis against another."""

UNLIKELY: Final = -6.0
"""Symbols below this log-probability are not tried, …"""

TRIED: Final = 8
"""… nor more than this many a frame."""

HOPELESS: Final = 6.0
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

    def support(self) -> list[float]:
        """For each of them, the probability that it and those before it stay."""
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

    def support(self) -> list[float]:
        """See `Decoder`."""
        return [1.0] if self.state.draft else []

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
    """A text that may have been said since the last certain word.

    Attributes:
        key: The text, a space behind every finished word.
        words: Its finished words.
        draft: Its unfinished word.
        token: Symbol of the draft's last character.
        blank: ln of the probability of all the ways to it that end in silence.
        symbol: The same of those that end in its last character.
        outlook: What the language model says of the draft so far.
        ending: What it says of the draft as a word; None before it was asked.
    """

    key: str
    words: list[Spoken]
    draft: Spoken | None
    token: int
    blank: float
    symbol: float
    outlook: float
    ending: float | None = None


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
        silence, delimiter = max(silence, NEVER), max(float(scores[symbols.delimiter]), NEVER)
        state.hypotheses = self._extended(silence, delimiter, tried, start)
        return self._agreed() + self._waited(start)

    @property
    def reading(self) -> str:
        """See `Decoder`."""
        return self.state.hypotheses[0].key

    def open(self) -> list[Spoken]:
        """See `Decoder`."""
        best = self.state.hypotheses[0]
        return [*best.words, best.draft] if best.draft else list(best.words)

    def support(self) -> list[float]:
        """See `Decoder`."""
        words = self.open()
        shares = [0.0] * len(words)
        whole = 0.0
        for each in self.state.hypotheses:
            share = math.exp(_rank(each))
            whole += share
            texts = [word.text for word in each.words]
            if each.draft is not None:
                texts.append(each.draft.text)
            for at, word in enumerate(words):
                if texts[at : at + 1] != [word.text]:
                    break
                shares[at] += share
        return [share / whole for share in shares]

    def finish(self) -> list[Spoken]:
        """See `Decoder`."""
        # A text and the same with a delimiter behind it are one now.
        ended: dict[str, tuple[float, list[Spoken]]] = {}
        for each in self.state.hypotheses:
            words, rank = each.words, _add(each.blank, each.symbol)
            if each.draft is not None:
                words, rank = [*words, each.draft], rank + self._judged(each)
            text = " ".join(word.text for word in words)
            other, same = ended.get(text, (NEVER, words))
            ended[text] = (_add(rank, other), same)
        _, best = max(ended.values(), key=lambda pair: pair[0])
        self.state.hypotheses = [_nothing()]
        self._remember(best)
        return [replace(word) for word in best]

    def forget(self) -> None:
        """See `Decoder`."""
        self.state.history = [BEGIN]
        self.state.hypotheses = [replace(each, ending=None) for each in self.state.hypotheses]

    def _extended(
        self, silence: float, delimiter: float, tried: list[tuple[int, float]], start: int
    ) -> list[Hypothesis]:
        """The best of what the hypotheses may be one frame later, best first.

        Args:
            silence: ln of the probability that the frame says nothing.
            delimiter: … that a word ends.
            tried: … of characters.
            start: Sample at which the frame begins.
        """
        kept, said = self.state.hypotheses, dict(tried)
        spoken = max(delimiter, *said.values(), NEVER)
        totals = [_add(each.blank, each.symbol) for each in kept]
        floor = max(total + each.outlook for total, each in zip(totals, kept, strict=True))
        floor += max(silence, spoken) - HOPELESS
        ways: dict[str, _Way] = {}
        for each, total in zip(kept, totals, strict=True):
            if each.draft is None:
                # A delimiter after a delimiter, or before any word, says nothing.
                rest = total + _add(silence, delimiter)
                ways[each.key] = _Way(rest, NEVER, 0.0, each, _RESTED)
            else:
                rest, held = total + silence, each.symbol + said.get(each.token, NEVER)
                kind = _HELD if held > rest else _RESTED
                ways[each.key] = _Way(rest, held, each.outlook, each, kind)
        # What is behind all of these would be the first to be dropped.
        if len(ways) == self._width:
            floor = max(floor, min(map(_rank, ways.values())))
        for each, total in zip(kept, totals, strict=True):
            # A language model's word is not above 1: nothing this one may become is far ahead.
            if total + spoken + max(each.outlook, self._beta) >= floor:
                self._grow(each, total, floor, delimiter, tried, ways)
        ranked = [(_rank(way), way) for way in ways.values()]
        ranked.sort(key=lambda pair: -pair[0])
        # The best one's probability becomes the unit: nothing grows with the stream.
        top = ranked[0][0]
        return [
            self._made(way, top, said, start)
            for rank, way in ranked[: self._width]
            if rank >= top - HOPELESS
        ]

    def _grow(
        self,
        each: Hypothesis,
        total: float,
        floor: float,
        delimiter: float,
        tried: list[tuple[int, float]],
        ways: "dict[str, _Way]",
    ) -> None:
        """Adds the ways to longer texts that are worth a hypothesis.

        The language model is asked last: a word grows no likelier by another letter.
        """
        draft, text = each.draft, self._symbols.text
        begun = "" if draft is None else draft.text
        most = self._beta if draft is None else each.outlook
        if draft is not None and total + delimiter + self._beta >= floor:
            ended = total + delimiter + self._judged(each)
            if ended >= floor:
                _put(ways, each.key + " ", _Way(ended, NEVER, 0.0, each, _ENDED))
        for index, score in tried:
            # The same character again is another one only after a silence.
            grown = score + (each.blank if index == each.token else total)
            if grown + most < floor:
                continue
            letters = begun + text[index]
            outlook = self._alpha * self._language.prefix(letters) + self._beta
            if grown + outlook >= floor:
                _put(ways, each.key + text[index], _Way(NEVER, grown, outlook, each, index))

    def _made(self, way: "_Way", unit: float, said: dict[int, float], start: int) -> Hypothesis:
        """The hypothesis that a way leads to."""
        of = way.of
        key, words, draft, token = of.key, of.words, of.draft, of.token
        if way.kind == _ENDED:
            assert draft is not None
            key, words, draft, token = key + " ", [*words, draft], None, -1
        elif way.kind != _RESTED:
            token = token if way.kind == _HELD else way.kind
            probability = math.exp(min(said[token], 0.0))
            text = "" if way.kind == _HELD else self._symbols.text[token]
            key += text
            draft = Spoken(
                text=draft.text + text if draft else text,
                start=draft.start if draft else start,
                end=start + HOP,
                total=draft.total + probability if draft else probability,
                count=draft.count + 1 if draft else 1,
            )
        blank, symbol = max(way.blank - unit, NEVER), max(way.symbol - unit, NEVER)
        ending = of.ending if way.kind in (_RESTED, _HELD) else None
        return Hypothesis(key, words, draft, token, blank, symbol, way.outlook, ending)

    def _judged(self, each: Hypothesis) -> float:
        """What the language model says of its draft, as a word after the words before it."""
        if each.ending is None:
            assert each.draft is not None
            history = list[str]()
            if self._memory:
                before = [*self.state.history, *(word.text for word in each.words)]
                history = before[-self._memory :]
            said = self._language.word(tuple(history), each.draft.text)
            each.ending = self._alpha * said + self._beta
        return each.ending

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


@dataclass(slots=True)
class _Way:
    """How a hypothesis goes on, before it is known whether that is worth a new one.

    Attributes:
        blank: As in `Hypothesis`.
        symbol: Likewise.
        outlook: Likewise.
        of: Which goes on.
        kind: The character it takes, or what else happens to it.
    """

    blank: float
    symbol: float
    outlook: float
    of: Hypothesis
    kind: int


_RESTED: Final = -1  # nothing is said
_HELD: Final = -2  # its last character goes on
_ENDED: Final = -3  # its draft becomes a word


def _rank(of: Hypothesis | _Way) -> float:
    """Its log-probability (ln), language and all."""
    return _add(of.blank, of.symbol) + of.outlook


def _put(ways: dict[str, _Way], key: str, new: _Way) -> None:
    """Adds a way to a text to those found so far; the text's times are those of the likeliest."""
    old = ways.get(key)
    if old is None:
        ways[key] = new
        return
    if max(new.blank, new.symbol) > max(old.blank, old.symbol):
        old.of, old.kind = new.of, new.kind
    old.blank, old.symbol = _add(old.blank, new.blank), _add(old.symbol, new.symbol)


def _rested(each: Hypothesis) -> Hypothesis:
    """A hypothesis after a silent frame, whose cost is everybody's."""
    if each.symbol <= NEVER:
        return each
    return replace(each, blank=_add(each.blank, each.symbol), symbol=NEVER)


def _add(one: float, other: float) -> float:
    """Two log-probabilities (ln) → that of their sum."""
    if one < other:
        one, other = other, one
    apart = other - one
    return one if apart < -40 else one + math.log1p(math.exp(apart))
