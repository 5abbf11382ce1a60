"""Frame activity of local speakers → turns of the session's speakers.

The frame head tells a few local channels apart, for as long as its context reaches. Its
probabilities add up to how many talk. A channel's activity becomes runs (hysteresis, pauses filled,
short ones dropped, where a frame counts as much as it is sure); a run that lasts is a turn.
While it lasts, the voice frames in which its channel talks alone add up to weighted moments; the
x-vector of these decides whose turn it is, again every `update_ms` and finally at its end.

Everything advances frame by frame, so that no result depends on how frames were chunked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinks.events import (
    Event,
    Speaker,
    SpeakerRevised,
    SpeechEnded,
    SpeechStarted,
    TurnEnded,
    TurnStarted,
    TurnUpdated,
)
from stream.clock import FRAME_RATE, HOP
from stream.tracks.clusters import Clusters, ClustersState, Mixed, Revision, Vector
from stream.tracks.frames import Floats, Frames
from stream.tracks.settings import TracksSettings, hops
from stream.tracks.voices import Voices

Embed = Callable[[Floats, Floats, Floats], NDArray[np.floating[Any]]]
"""(mass [], first [D], second [D]) weighted sums of 1, v and v² → embedding [E]."""

Stamp = Callable[[int, int], dict[str, Any]]
"""(start sample, end sample) → the envelope's fields; consumes a `seq`."""

BLOCKS = 3
"""The recent voice is compared in steps of a third of its window."""

HISTORY = 128
"""Frames of activity kept for voice rows that arrive late."""

RECENT = 64
"""Ended turns kept for words that arrive late."""

PATIENCE = 4
"""A pause of nothing but doubt ends a turn after this many times as long as a certain one."""

LEAST = 5.0
"""Frames of clean speech below which an embedding says nothing."""

CERTAIN = 1e6
"""A log-likelihood ratio above all that voices give."""


@dataclass
class Moments:
    """Weighted sums of 1, v and v² over voice frames v: [D]."""

    mass: float = 0.0
    first: Vector = field(default_factory=lambda: np.zeros(0))
    second: Vector = field(default_factory=lambda: np.zeros(0))

    def add(self, weight: float, vector: Vector) -> None:
        """One more frame; without weight it changes nothing."""
        if not weight:
            return
        if not self.first.size:
            self.first, self.second = np.zeros_like(vector), np.zeros_like(vector)
        weighted = weight * vector
        self.mass += weight
        self.first += weighted
        self.second += weighted * vector

    def join(self, other: "Moments") -> None:
        """All frames of another."""
        if not other.first.size:
            return
        if not self.first.size:
            self.first, self.second = np.zeros_like(other.first), np.zeros_like(other.first)
        self.mass += other.mass
        self.first += other.first
        self.second += other.second


@dataclass
class Weights:
    """What a frame's voice says of each channel.

    Attributes:
        clean: How much of it is this channel's speech, and nobody else's.
        mixed: How much of the channel's other speech it holds.
    """

    clean: list[float]
    mixed: list[float]


@dataclass
class Run:
    """A channel's activity that is, or may become, a turn.

    Attributes:
        number: The turn's number; `T<number>` on the wire.
        start: Sample at which it begins.
        last: Sample at which its last active frame ends.
        speech: Samples of certain speech in it.
        pause: Samples of certain silence since then.
        told: Whether turn.started was emitted.
        looked: Sample of the last look at its voice.
        label: Speaker, 0 before the first look.
        score: Cosine with the speaker.
        margin: Score less the runner-up's.
        sure: Whether the label rests on enough clean speech.
        heir: Label that the channel had shortly before, 0 if none.
        beside: Number of another run → frames in which both were active.
        past: Moments of all but the recent voice.
        recent: Moments of the latest blocks, the last still filling.
        mixed: Moments of its voice while others talk as well.
        filled: Voice frames in the last block.
    """

    number: int
    start: int
    last: int
    speech: float = 0.0
    pause: float = 0.0
    told: bool = False
    looked: int = 0
    label: int = 0
    score: float | None = None
    margin: float | None = None
    sure: bool = False
    heir: int = 0
    beside: dict[int, int] = field(default_factory=dict[int, int])
    past: Moments = field(default_factory=Moments)
    recent: list[Moments] = field(default_factory=list[Moments])
    mixed: Moments = field(default_factory=Moments)
    filled: int = 0

    @property
    def turn_id(self) -> str:
        """Its name on the wire."""
        return f"T{self.number}"

    def moments(self) -> Moments:
        """Of all its voice."""
        total = Moments()
        total.join(self.past)
        for block in self.recent:
            total.join(block)
        return total


@dataclass
class Channel:
    """One local speaker of the frame head.

    Attributes:
        on: Hysteresis state.
        run: What is going on, if anything.
        label: Speaker of the last turn here, 0 if none.
        end: Sample at which that turn ended.
    """

    on: bool = False
    run: Run | None = None
    label: int = 0
    end: int = 0


@dataclass
class Ended:
    """A turn that is over."""

    number: int
    start: int
    end: int
    label: int


@dataclass
class TurnsState:
    """All that `Turns` knows.

    Attributes:
        cursor: Sample at which the next frame must begin; -1 before the first.
        origin: Sample of the first frame since the last break.
        channels: Local speakers.
        weights: Of the latest frames.
        number: The last turn's number.
        speech: Sample at which speech began, -1 in silence.
        spoken: Sample at which it ended last.
        voiced: Whether there are voice frames to tell speakers by.
        ended: The latest turns that are over.
        clusters: The session's speakers.
    """

    cursor: int = -1
    origin: int = 0
    channels: list[Channel] = field(default_factory=list[Channel])
    weights: list[Weights] = field(default_factory=list[Weights])
    number: int = 0
    speech: int = -1
    spoken: int = 0
    voiced: bool = False
    ended: list[Ended] = field(default_factory=list[Ended])
    clusters: ClustersState = field(default_factory=ClustersState)


class Turns:
    """Who speaks when; sans-I/O.

    Without voice frames or `embed`, the speakers are the local channels.
    """

    def __init__(
        self,
        settings: TracksSettings,
        embed: Embed | None,
        stamp: Stamp,
        *,
        voices: Voices | None = None,
        state: TurnsState | None = None,
    ) -> None:
        self.state = state or TurnsState()
        self.clusters = Clusters(settings.speakers, self.state.clusters)
        self.voices = voices
        self._embed = embed
        self._stamp = stamp
        turns, speakers = settings.turns, settings.speakers
        self._speech = (turns.onset, turns.offset)
        self._overlap = (turns.overlap_onset, turns.overlap_offset)
        self._hold = turns.hold
        self._min_on = hops(turns.min_on_ms) * HOP
        self._min_off = hops(turns.min_off_ms) * HOP
        self._give_way = min(hops(turns.give_way_ms) * HOP, self._min_off)
        self._max_turn = hops(turns.max_turn_ms) * HOP
        self._update = hops(turns.update_ms) * HOP
        self._block = max(1, hops(turns.change_window_ms) // BLOCKS)
        self._change, self._margin = turns.change_threshold, turns.change_margin
        self._bonus, self._malus = speakers.channel_bonus, speakers.channel_malus
        self._memory = hops(speakers.channel_memory_ms) * HOP

    def step(self, frames: Frames) -> list[Event]:
        """Takes the next frames of the stream."""
        events = self.enter(frames)
        for row in range(frames.rows):
            events.extend(self.row(frames, row))
        events.extend(self.leave(frames))
        return events

    def enter(self, frames: Frames) -> list[Event]:
        """Prepares for these frames; turns do not reach over a hole in the timeline."""
        if frames.activity is None:
            return []
        state, events = self.state, list[Event]()
        if not state.channels:
            state.channels = [Channel() for _ in range(frames.activity.shape[1])]
        assert len(state.channels) == frames.activity.shape[1], "the engine's channels changed"
        if state.cursor >= 0:
            assert frames.start >= state.cursor or not frames.rows, (
                f"expected frames from sample {state.cursor}, got {frames.start}"
            )
            if frames.nonfinite or (frames.rows and frames.start > state.cursor):
                events = self._stop()
                state.origin = frames.start
        elif frames.rows:
            state.origin = frames.start
        if frames.rows:
            state.cursor = frames.start
        state.voiced = state.voiced or (frames.voice is not None and self._embed is not None)
        return events

    def row(self, frames: Frames, row: int) -> list[Event]:
        """Takes one of these frames."""
        if frames.activity is None:
            return []
        events = self._frame(frames.activity[row].tolist())
        if frames.voice is not None and row < len(frames.voice):
            events.extend(self._listen(frames, row))
        return events

    def leave(self, frames: Frames) -> list[Event]:
        """Takes the voice rows that lag behind the last activity row of a stream."""
        events = list[Event]()
        if frames.activity is not None and frames.voice is not None:
            for row in range(frames.rows, len(frames.voice)):
                events.extend(self._listen(frames, row))
        return events

    def flush(self, end: int) -> list[Event]:
        """Ends all turns: the stream ends at this sample."""
        if self.state.cursor >= 0:
            self.state.cursor = max(self.state.cursor, end)
        return self._stop()

    def holder(self, start: int, end: int, reach: int = 0, prefer: int = 0) -> int:
        """Number of the turn that overlaps these samples most; of equals `prefer`, then the oldest.

        If none does, the nearest turn no more than `reach` samples away; 0 if there is none.
        """
        best, key = 0, (0, -reach - 1, False)
        for number, _, first, last in self._spans():
            overlap = min(end, last) - max(start, first)
            this = (max(overlap, 0), min(overlap, 0), number == prefer)
            if this > key:
                best, key = number, this
        return best

    def label(self, number: int) -> str | None:
        """Name of the speaker of a turn, as far as it is remembered."""
        for turn, label, _, _ in self._spans():
            if turn == number:
                return f"S{label}"
        return None

    def running(self, number: int) -> bool:
        """Whether this turn goes on."""
        return any(run.number == number for run in self._told())

    def settled(self, number: int) -> bool:
        """Whether the speaker of this turn is more than a first guess: it is sure, or over."""
        return not any(run.number == number and not run.sure for run in self._told())

    def speaker(self, label: int, run: Run | None = None) -> Speaker:
        """A label as events say it."""
        return Speaker(
            label=f"S{label}",
            identity=None if self.voices is None else self.voices.identity(label),
            score=None if run is None or run.score is None else round(run.score, 4),
            margin=None if run is None or run.margin is None else round(run.margin, 4),
        )

    def _frame(self, probabilities: list[float]) -> list[Event]:
        state = self.state
        now, then = state.cursor, state.cursor + HOP
        state.cursor = then
        active = list[Run]()
        order, total = self._order(probabilities), sum(probabilities)
        for index, channel in enumerate(state.channels):
            before = order.index(index)
            share = max(0.0, total - before)
            onset, offset = self._overlap if before else self._speech
            channel.on = share >= (offset if channel.on else onset)
            if channel.on:
                if channel.run is None:
                    state.number += 1
                    heir = channel.label if now - channel.end <= self._memory else 0
                    channel.run = Run(state.number, start=now, last=then, heir=heir)
                channel.run.last, channel.run.pause = then, 0.0
                channel.run.speech += HOP * min(share, 1.0)
                active.append(channel.run)
            elif channel.run is not None:
                # Doubt is of who talks beside whom as well: there a pause is a pause.
                doubt = 0.0 if before else min(share / offset, 1.0)
                channel.run.pause += HOP * (1.0 - doubt)
        self._weigh(probabilities, order[0])
        if len(active) > 1:
            for run in active:
                for other in active:
                    if other is not run:
                        run.beside[other.number] = run.beside.get(other.number, 0) + 1
        events = list[Event]()
        for index, channel in enumerate(state.channels):
            if channel.run is not None:
                events.extend(self._advance(index, channel, channel.run))
        return events

    def _order(self, probabilities: list[float]) -> list[int]:
        """The channels, from the one that talks if anybody does; who talks keeps that for a while.

        The sum of the probabilities is how many talk, so the first talks if it is near one, the
        second if it is near two: where the head knows that but not on which channels, each of
        them has its part.
        """
        held = [
            probability + self._hold * channel.on
            for probability, channel in zip(probabilities, self.state.channels, strict=True)
        ]
        return sorted(range(len(held)), key=lambda index: -held[index])

    def _advance(self, index: int, channel: Channel, run: Run) -> list[Event]:
        """What the passing of a frame means for a run."""
        now = self.state.cursor
        others = any(other.on for other in self.state.channels if other is not channel)
        longest = self._give_way if others else self._min_off
        over = run.pause >= longest or now - run.last >= PATIENCE * longest
        if not run.told:
            if run.speech >= self._min_on:
                return self._begin(index, run)
            if over:
                channel.run = None
            return []
        if over:
            channel.run = None
            return self._end(index, run, run.last) + self._fall_silent()
        if channel.on and now - run.start >= self._max_turn:
            self.state.number += 1
            channel.run = Run(self.state.number, start=now, last=now, beside=self._still(index))
            events = self._end(index, run, now)
            channel.run.heir = channel.label
            return events + self._begin(index, channel.run)
        if now - run.looked >= self._update:
            return [*self._look(index, run), self._updated(run)]
        return []

    def _begin(self, index: int, run: Run) -> list[Event]:
        run.told = True
        events = list[Event]()
        if self.state.speech < 0:
            self.state.speech = run.start
            events.append(SpeechStarted(**self._stamp(run.start, run.last)))
        events.extend(self._look(index, run))
        events.append(
            TurnStarted(
                turn_id=run.turn_id,
                speaker=self.speaker(run.label, run),
                overlap=self._overlapped(run),
                **self._stamp(run.start, run.last),
            )
        )
        return events

    def _updated(self, run: Run) -> Event:
        return TurnUpdated(
            turn_id=run.turn_id,
            speaker=self.speaker(run.label, run),
            overlap=self._overlapped(run),
            **self._stamp(run.start, run.last),
        )

    def _end(self, index: int, run: Run, end: int) -> list[Event]:
        """Ends a turn for good, and looks at the past again."""
        state = self.state
        events = self._look(index, run)
        events.append(
            TurnEnded(
                turn_id=run.turn_id,
                speaker=self.speaker(run.label, run),
                overlap=self._overlapped(run),
                **self._stamp(run.start, end),
            )
        )
        channel = state.channels[index]
        channel.label, channel.end = run.label, end
        state.spoken = max(state.spoken, end)
        state.ended.append(Ended(run.number, run.start, end, run.label))
        del state.ended[:-RECENT]
        if state.voiced:
            events.extend(self._review(run))
        return events

    def _fall_silent(self) -> list[Event]:
        state = self.state
        if state.speech < 0 or self._told():
            return []
        start, state.speech = state.speech, -1
        return [SpeechEnded(**self._stamp(start, state.spoken))]

    def _stop(self) -> list[Event]:
        """Ends all runs where they are; the timeline breaks here."""
        events = list[Event]()
        for index, channel in enumerate(self.state.channels):
            run, channel.run, channel.on = channel.run, None, False
            if run is not None and run.told:
                events.extend(self._end(index, run, run.last))
            channel.label = 0  # local channels mean nothing across the break
        self.state.weights.clear()
        return events + self._fall_silent()

    def _look(self, index: int, run: Run) -> list[Event]:
        """Decides whose turn this is by all its voice so far."""
        run.looked = self.state.cursor
        if not self.state.voiced:
            run.label, run.sure = index + 1, True
            return []
        moments = run.moments()
        vector = self._vector(moments)
        prior = self._prior(index, run)
        if self.voices is not None and vector is not None:
            carrier = self.voices.carrier(vector, moments.mass / FRAME_RATE)
            if carrier is not None:
                prior[carrier] = CERTAIN
        overlapped = None
        if not self.clusters.enough(moments.mass):
            overlapped = self._vector(run.mixed)
        decision = self.clusters.decide(
            run.number,
            vector,
            moments.mass,
            run.beside,
            prior,
            mixed=None if overlapped is None else Mixed(overlapped, run.mixed.mass),
        )
        before, run.label = run.label, decision.label
        run.score, run.margin, run.sure = decision.score, decision.margin, decision.sure
        if self.voices is None:
            return []
        if before not in self.clusters.state.speakers:
            self.voices.forget(before)
        events = self._identify(run.label, run) if decision.sure else []
        run.label = self.clusters.label(run.number) or run.label
        return events

    def _identify(self, label: int, looking: Run | None = None) -> list[Event]:
        """Compares a label with the enrolled voices; two labels of one person become one."""
        assert self.voices is not None
        vector, evidence = self.clusters.centroid(label)
        running = {run.number for run in self._told()}
        if looking is not None:
            running.add(looking.number)
        turns = partial(self._past_turns, label, running)
        events = self.voices.observe(label, vector, evidence, turns, self.state.cursor)
        twin = self.voices.twin(label)
        if twin is not None and twin in self.clusters.state.speakers:
            source, target = max(label, twin), min(label, twin)
            if not self.clusters.apart(source, target):
                events.extend(self._revise(self.clusters.merge(source, target)))
        return events

    def _vector(self, moments: Moments) -> Vector | None:
        if self._embed is None or moments.mass < LEAST:
            return None
        mass = np.asarray(moments.mass, np.float32)
        first, second = moments.first.astype(np.float32), moments.second.astype(np.float32)
        return self.clusters.unit(self._embed(mass, first, second))

    def _prior(self, index: int, run: Run) -> dict[int, float]:
        """What the channels say: this one goes on with its speaker, the others keep theirs."""
        prior = dict[int, float]()
        for other, channel in enumerate(self.state.channels):
            if other == index:
                continue
            if channel.run is not None and channel.run.told:
                prior[channel.run.label] = -self._malus
            elif channel.label and run.start - channel.end <= self._memory:
                prior[channel.label] = -self._malus
        if run.heir:
            prior[run.heir] = self._bonus
        return prior

    def _review(self, ended: Run) -> list[Event]:
        events = list[Event]()
        distinct = None if self.voices is None else self.voices.named_apart
        for revision in self.clusters.review(distinct):
            events.extend(self._revise(revision))
        if self.voices is not None:
            self.voices.keep(self.clusters.state.speakers)
            if ended.label in self.clusters.state.speakers:
                events.extend(self._identify(ended.label))
        return events

    def _revise(self, revision: Revision) -> list[Event]:
        """Applies a second thought to what is still remembered, and tells it."""
        state = self.state
        moved = set(revision.turns)
        merged = revision.reason == "merged"
        for channel in state.channels:
            if channel.label == revision.source and merged:
                channel.label = revision.target
            if channel.run is not None and channel.run.heir == revision.source and merged:
                channel.run.heir = revision.target
        for ended in state.ended:
            if ended.number in moved:
                ended.label = revision.target
                for channel in state.channels:
                    if channel.label == revision.source and channel.end == ended.end:
                        channel.label = revision.target
        events, running = list[Event](), set[int]()
        for run in self._told():
            if run.number in moved:
                run.label = revision.target
                running.add(run.number)
                events.append(self._updated(run))
        past = [f"T{number}" for number in revision.turns if number not in running]
        if past:
            now = state.cursor
            events.append(
                SpeakerRevised(
                    revision_of=past,
                    from_label=f"S{revision.source}",
                    to_label=f"S{revision.target}",
                    reason=revision.reason,
                    **self._stamp(now, now),
                )
            )
        if merged and self.voices is not None:
            _, evidence_s = self.clusters.centroid(revision.target)
            events += self.voices.merged(revision.source, revision.target, evidence_s, state.cursor)
        return events

    def known(self, label: str) -> int | None:
        """The number of a label such as "S2", if the session has that speaker."""
        number = int(label[1:]) if label[:1] == "S" and label[1:].isdecimal() else 0
        return number if number in self.clusters.state.speakers else None

    def name(self, label: int, name: str) -> list[Event]:
        """A listener says who a speaker is."""
        assert self.voices is not None
        _, evidence_s = self.clusters.centroid(label)
        turns = partial(self._past_turns, label, {run.number for run in self._told()})
        return self.voices.name(label, name, evidence_s, turns, self.state.cursor)

    def _past_turns(self, label: int, running: set[int]) -> list[str]:
        turns = self.clusters.state.speakers[label].turns
        return [f"T{number}" for number in turns if number not in running]

    def _weigh(self, probabilities: list[float], first: int) -> None:
        """Keeps each channel's clean-speech weight (it talks, and nobody else), and what is left.

        The sum of probabilities says how many talk: up to one it is clean, from two on nothing is.
        """
        total = sum(probabilities)
        clean = list[float]()
        for index, own in enumerate(probabilities):
            weight = own
            for other, probability in enumerate(probabilities):
                if other != index:
                    weight *= 1.0 - probability
            clean.append(weight)
        clean[first] = max(0.0, min(total, 2.0 - total))
        mixed = [max(0.0, own - alone) for own, alone in zip(probabilities, clean, strict=True)]
        self.state.weights.append(Weights(clean, mixed))
        del self.state.weights[:-HISTORY]

    def _listen(self, frames: Frames, row: int) -> list[Event]:
        """Adds a voice row to the runs that its frame belongs to."""
        assert frames.voice is not None
        state = self.state
        sample = frames.start + (row - frames.voice_delay) * HOP
        index = len(state.weights) - (state.cursor - sample) // HOP
        # The first rows of a stream look back on frames that never were.
        whole = sample - state.origin >= frames.voice_delay * HOP
        if not (whole and 0 <= index < len(state.weights)):
            return []
        if not any(channel.run for channel in state.channels):
            return []
        voice = frames.voice[row].astype(np.float64)
        events = list[Event]()
        for number, channel in enumerate(state.channels):
            run = channel.run
            if run is None or sample < run.start:
                continue
            if not run.recent or run.filled == self._block:
                run.recent.append(Moments())
                run.filled = 0
                if len(run.recent) > BLOCKS:
                    run.past.join(run.recent.pop(0))
            run.recent[-1].add(state.weights[index].clean[number], voice)
            run.mixed.add(state.weights[index].mixed[number], voice)
            run.filled += 1
            if run.told and run.filled == self._block and len(run.recent) == BLOCKS:
                events.extend(self._compare(number, channel, run, sample + HOP))
        return events

    def _compare(self, index: int, channel: Channel, run: Run, now: int) -> list[Event]:
        """Cuts a turn where its voice became another's without a pause."""
        enough = self._block * BLOCKS / 2
        if self._embed is None or run.past.mass < enough:
            return []
        if self._change is None and self._margin is None:
            return []
        recent = Moments()
        for block in run.recent:
            recent.join(block)
        if recent.mass < enough:
            return []
        before, after = self._vector(run.past), self._vector(recent)
        if before is None or after is None:
            return []
        own = float(before @ after)
        unlike = self._change is not None and own < self._change
        if not unlike:
            if self._margin is None:
                return []
            other = self.clusters.nearest(
                run.number, after, recent.mass, run.beside, besides=run.label
            )
            if other is None or other - own < self._margin:
                return []
        cut = now - self._block * BLOCKS * HOP
        self.state.number += 1
        rest = Run(self.state.number, start=cut, last=max(run.last, cut), recent=run.recent)
        rest.filled, rest.beside = run.filled, self._still(index)
        run.recent = []
        channel.run = rest
        events = self._end(index, run, cut)
        return events + self._begin(index, rest)

    def _still(self, index: int) -> dict[int, int]:
        """Runs that are active beside a channel now: all that a part of its turn can know."""
        return {
            channel.run.number: 1
            for other, channel in enumerate(self.state.channels)
            if other != index and channel.on and channel.run is not None
        }

    def _told(self) -> list[Run]:
        return [ch.run for ch in self.state.channels if ch.run is not None and ch.run.told]

    def _overlapped(self, run: Run) -> bool:
        known = {ended.number for ended in self.state.ended}
        known.update(other.number for other in self._told())
        return any(number in known for number in run.beside)

    def _spans(self) -> list[tuple[int, int, int, int]]:
        spans = [(past.number, past.label, past.start, past.end) for past in self.state.ended]
        spans.extend((run.number, run.label, run.start, run.last) for run in self._told())
        return spans
