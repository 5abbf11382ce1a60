"""CTC output → words with times, confidence and speaker, as partial and final transcripts.

Greedy decoding: a frame that was read is never read otherwise, so finished words never change and
of a partial transcript only the last, unfinished word may grow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sinks.events import Event, TranscriptFinal, TranscriptPartial, Word
from stream.clock import HOP, seconds
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.settings import WordsSettings, hops
from stream.tracks.turns import Turns

Stamp = Callable[[int, int], dict[str, Any]]


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


@dataclass
class WordsState:
    """All that `Words` knows.

    Attributes:
        cursor: Sample at which the next frame must begin; -1 before the first.
        token: Output of the frame before.
        quiet: Frames since the last character.
        draft: The word that is not finished.
        segment: Finished words that are not final.
        said: Text of the last partial.
        told: Sample at which that was emitted.
    """

    cursor: int = -1
    token: int = -1
    quiet: int = 0
    draft: Spoken | None = None
    segment: list[Spoken] = field(default_factory=list[Spoken])
    said: str = ""
    told: int = 0


class Words:
    """What is said; sans-I/O. `turns` says by whom, and is advanced first."""

    def __init__(
        self,
        settings: WordsSettings,
        vocabulary: Vocabulary,
        turns: Turns,
        stamp: Stamp,
        *,
        state: WordsState | None = None,
    ) -> None:
        self.state = state or WordsState()
        self._turns = turns
        self._stamp = stamp
        self._blank = vocabulary.blank
        self._delimiter = vocabulary.delimiter
        self._tokens = [
            token.lower() if settings.case == "lower" else token for token in vocabulary.tokens
        ]
        # <s>, </s>, <unk>, [PAD]: symbols of the tokenizer, not of any language.
        self._special = [
            token != vocabulary.delimiter
            and len(token) > 2
            and (token[0] + token[-1]) in {"<>", "[]"}
            for token in vocabulary.tokens
        ]
        self._words = vocabulary.tokens
        self._word_gap = hops(settings.word_gap_ms)
        self._segment_gap = hops(settings.segment_gap_ms)
        self._settle = hops(settings.settle_ms)
        self._max_segment = hops(settings.max_segment_ms) * HOP
        self._partial = hops(settings.partial_ms) * HOP
        self._reach = hops(settings.reach_ms) * HOP

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
        token = int(np.argmax(scores))
        probability = math.exp(min(float(scores[token]), 0.0))
        if math.isnan(probability):
            token, probability = self._blank, 0.0
        start = state.cursor
        state.cursor += HOP
        events = self._read(token, probability, start)
        state.token = token
        return events + self._settled()

    def leave(self) -> list[Event]:
        """A partial transcript, if there is a new one and it is time.

        Only here, after the frames that came together, so that nobody gets two at once.
        """
        state = self.state
        words = state.segment + ([state.draft] if state.draft else [])
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

    def _read(self, token: int, probability: float, start: int) -> list[Event]:
        """One greedy symbol."""
        state = self.state
        symbol = self._words[token]
        events = list[Event]()
        if token == self._blank or self._special[token]:
            state.quiet += 1
        elif symbol == self._delimiter:
            state.quiet += 1
            events = self._finish_word()
        elif token == state.token and state.draft is not None:
            state.quiet = 0
            state.draft.end = start + HOP
            state.draft.total += probability
            state.draft.count += 1
        else:
            if self._delimiter is None:
                events = self._finish_word()
            state.quiet = 0
            if state.draft is None:
                state.draft = Spoken("", start, start, 0.0, 0)
            state.draft.text += self._tokens[token]
            state.draft.end = start + HOP
            state.draft.total += probability
            state.draft.count += 1
        return events

    def _settled(self) -> list[Event]:
        """Finals that silence, or the end of the turn, brings about."""
        state = self.state
        if not state.segment and state.draft is None:
            return []
        events = list[Event]()
        turn = state.segment[-1].turn if state.segment else 0
        over = bool(turn) and not self._turns.running(turn)
        if state.draft is not None and (
            state.quiet >= self._word_gap or (over and state.quiet >= self._settle)
        ):
            events = self._finish_word()
        if state.draft is None and state.segment:
            turn = state.segment[-1].turn
            over = bool(turn) and not self._turns.running(turn)
            # A final names a speaker: it waits while that is only a first guess.
            silent = state.quiet >= self._segment_gap and self._turns.settled(turn)
            if silent or (over and state.quiet >= self._settle):
                events.extend(self._final())
        return events

    def _finish_word(self) -> list[Event]:
        """Ends the draft; the segment before it becomes final if somebody else said it."""
        state = self.state
        word, state.draft = state.draft, None
        if word is None:
            return []
        events = list[Event]()
        word.turn = self._holder(word)
        if state.segment:
            for earlier in state.segment:
                earlier.turn = earlier.turn or self._holder(earlier)
            before = state.segment[-1].turn
            other = word.turn and before and word.turn != before
            if other or word.end - state.segment[0].start > self._max_segment:
                events = self._final()
        state.segment.append(word)
        return events

    def _finish(self) -> list[Event]:
        events = self._finish_word() + self._final()
        self.state.token = -1
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
