"""CTC output → words with times, confidence and speaker, as partial and final transcripts.

A decoder reads; here its words get speakers, become final with a silence or the end of a turn, and
are told as partials before that. A partial has the words that are certain, and of the others those
that have read the same for a while, so that what a reader sees is rarely taken back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sinks.events import Event, TranscriptFinal, TranscriptPartial, Word
from stream.clock import HOP, seconds
from stream.tracks.decoding import (
    Beam,
    BeamState,
    Decoder,
    Greedy,
    GreedyState,
    Spoken,
    Symbols,
)
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import LanguageModel
from stream.tracks.settings import WordsSettings, hops
from stream.tracks.turns import Turns

Stamp = Callable[[int, int], dict[str, Any]]


@dataclass
class WordsState:
    """All that `Words` knows.

    Attributes:
        cursor: Sample at which the next frame must begin; -1 before the first.
        quiet: Frames since the last character.
        greedy: The decoder's own, where it is the greedy one.
        beam: Likewise.
        reading: What the decoder read after the last frame, certain words left out.
        texts: The words of that.
        since: For each of them, the sample since which it reads so.
        began: Sample at which the first of them begins.
        segment: Certain words that are not final.
        said: Text of the last partial.
        told: Sample at which that was emitted.
    """

    cursor: int = -1
    quiet: int = 0
    greedy: GreedyState = field(default_factory=GreedyState)
    beam: BeamState = field(default_factory=BeamState)
    reading: str = ""
    texts: list[str] = field(default_factory=list[str])
    since: list[int] = field(default_factory=list[int])
    began: int = 0
    segment: list[Spoken] = field(default_factory=list[Spoken])
    said: str = ""
    told: int = 0


class Words:
    """What is said; sans-I/O. `turns` says by whom, and is advanced first.

    With a language model words are decoded by a beam search, without one greedily.
    """

    def __init__(
        self,
        settings: WordsSettings,
        vocabulary: Vocabulary,
        turns: Turns,
        stamp: Stamp,
        *,
        language: LanguageModel | None = None,
        state: WordsState | None = None,
    ) -> None:
        self.state = state or WordsState()
        self._turns = turns
        self._stamp = stamp
        symbols = Symbols(vocabulary, settings.case)
        self._blank = symbols.blank
        self._characters = symbols.characters
        self._decoder: Decoder = (
            Greedy(symbols, self.state.greedy)
            if language is None
            else Beam(symbols, settings, language, self.state.beam)
        )
        self._word_gap = hops(settings.word_gap_ms)
        self._segment_gap = hops(settings.segment_gap_ms)
        self._settle = hops(settings.settle_ms)
        self._stable = hops(settings.stable_ms) * HOP
        self._support = settings.stable_share
        self._max_segment = hops(settings.max_segment_ms) * HOP
        self._partial = hops(settings.partial_ms) * HOP
        self._reach = hops(settings.reach_ms) * HOP
        self._notice()  # of a state that was saved with the other decoder, nothing is open

    def step(self, frames: Frames) -> list[Event]:
        """Takes the next frames of the stream."""
        events = self.enter(frames)
        for row in range(frames.rows):
            events.extend(self.row(frames, row))
        events.extend(self.leave())
        return events

    def enter(self, frames: Frames) -> list[Event]:
        """Prepares for these frames; words do not reach over a hole in the timeline."""
        if frames.ctc is None:
            return []
        state, events = self.state, list[Event]()
        if state.cursor >= 0 and (
            frames.nonfinite or (frames.rows and frames.start > state.cursor)
        ):
            events = self._finish()
        if frames.rows:
            state.cursor = frames.start
        return events

    def row(self, frames: Frames, row: int) -> list[Event]:
        """Takes one of these frames."""
        if frames.ctc is None:
            return []
        state = self.state
        scores = frames.ctc[row]
        best = int(np.argmax(scores))
        if math.isnan(float(scores[best])):
            scores = np.full_like(scores, -np.inf)
            scores[self._blank], best = 0.0, self._blank
        start = state.cursor
        state.cursor += HOP
        state.quiet = 0 if self._characters[best] else state.quiet + 1
        words = self._decoder.row(scores, best, start)
        events = self._certain(words)
        if words or self._decoder.reading != state.reading:
            self._notice()
        return events + self._settled()

    def leave(self) -> list[Event]:
        """A partial transcript, if there is a new one and it is time.

        Only here, after the frames that came together, so that nobody gets two at once.
        """
        state = self.state
        words = state.segment + self._stable_words()
        text = " ".join(word.text for word in words)
        if not words or text == state.said or state.cursor - state.told < self._partial:
            return []
        state.said, state.told = text, state.cursor
        # Nothing is noted of this: a partial must not change what becomes final.
        guessed = [replace(word, turn=word.turn or self._holder(word)) for word in words]
        return [
            TranscriptPartial(
                text=text,
                words=[self._word(word) for word in guessed],
                turn_id=_turn_id(guessed[-1].turn),
                **self._stamp(words[0].start, words[-1].end),
            )
        ]

    def flush(self) -> list[Event]:
        """Makes all words final: the stream ends."""
        return self._finish()

    def _notice(self) -> None:
        """Notes since when each word that is not certain has read as it does."""
        state, words = self.state, self._decoder.open()
        texts = [word.text for word in words]
        state.since = [
            state.since[at] if state.texts[at : at + 1] == [text] else state.cursor
            for at, text in enumerate(texts)
        ]
        state.texts = texts
        state.reading = self._decoder.reading
        state.began = words[0].start if words else 0

    def _stable_words(self) -> list[Spoken]:
        """The words that are not certain, up to the first that has read otherwise of late."""
        latest = self.state.cursor - self._stable
        words = list[Spoken]()
        opened, support = self._decoder.open(), self._decoder.support()
        for word, since, share in zip(opened, self.state.since, support, strict=True):
            if since > latest or share < self._support:
                break
            words.append(word)
        return words

    def _settled(self) -> list[Event]:
        """Finals that silence, or the end of the turn, brings about."""
        state = self.state
        if not state.segment and not state.texts:
            return []
        events = list[Event]()
        turn = state.segment[-1].turn if state.segment else 0
        if not turn and state.texts and state.quiet >= self._settle:
            turn = self._holder(self._decoder.open()[0])
        over = bool(turn) and not self._turns.running(turn)
        if state.texts and (
            state.quiet >= self._word_gap
            or (over and state.quiet >= self._settle)
            or state.cursor - state.began > self._max_segment  # a word without an end
        ):
            events = self._finish_words()
        if not state.texts and state.segment:
            turn = state.segment[-1].turn
            over = bool(turn) and not self._turns.running(turn)
            # A final names a speaker: it waits while that is only a first guess.
            silent = state.quiet >= self._segment_gap and self._turns.settled(turn)
            if silent or (over and state.quiet >= self._settle):
                self._decoder.forget()
                events.extend(self._final())
        return events

    def _finish_words(self) -> list[Event]:
        """Makes all words certain."""
        words = self._decoder.finish()
        events = self._certain(words)
        self._notice()
        return events

    def _certain(self, words: list[Spoken]) -> list[Event]:
        """Takes words from the decoder; those before become final if somebody else said them."""
        state, events = self.state, list[Event]()
        del state.texts[: len(words)], state.since[: len(words)]
        for word in words:
            word.turn = self._holder(word)
            if state.segment:
                for earlier in state.segment:
                    earlier.turn = earlier.turn or self._holder(earlier)
                before = state.segment[-1].turn
                other = word.turn and before and word.turn != before
                if other or word.end - state.segment[0].start > self._max_segment:
                    events.extend(self._final())
            state.segment.append(word)
        return events

    def _finish(self) -> list[Event]:
        events = self._finish_words() + self._final()
        self._decoder.forget()
        self.state.quiet = 0
        return events

    def _final(self) -> list[Event]:
        state = self.state
        words, state.segment = state.segment, []
        state.said = ""
        if not words:
            return []
        for word in words:
            word.turn = word.turn or self._holder(word)
        turns = [word.turn for word in words]
        turn = max(set(turns), key=lambda number: (turns.count(number), -number))
        return [
            TranscriptFinal(
                text=" ".join(word.text for word in words),
                words=[self._word(word) for word in words],
                turn_id=_turn_id(turn),
                **self._stamp(words[0].start, words[-1].end),
            )
        ]

    def _holder(self, word: Spoken) -> int:
        prefer = self.state.segment[-1].turn if self.state.segment else 0
        return self._turns.holder(word.start, word.end, self._reach, prefer)

    def _word(self, word: Spoken) -> Word:
        return Word(
            word=word.text,
            start=seconds(word.start),
            end=seconds(word.end),
            confidence=round(min(word.total / word.count, 1.0), 4),
            speaker=self._turns.label(word.turn) if word.turn else None,
        )


def _turn_id(turn: int) -> str | None:
    return f"T{turn}" if turn else None
