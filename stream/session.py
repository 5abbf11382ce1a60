"""One stream's life, from `session.opened` to `session.closed`.

Sans-I/O: blocks go in, chunks for the encoder come out; frames go in, events come out.
"""

import secrets
import struct
import uuid
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from sinks.events import (
    Error_,
    Event,
    Gap,
    Heartbeat,
    Latency,
    SessionClosed,
    SessionOpened,
    Warning_,
)
from stream import clock
from stream.batcher import Ready
from stream.chunker import Chunk, Chunker, ChunkerState
from stream.sources.source import Block, GapReason, Resumed
from stream.tracks.codec import pack, unpack
from stream.tracks.frames import Frames
from stream.tracks.voices import Gallery

Stamp = Callable[[int, int], dict[str, Any]]
"""(start, end) in samples → the envelope's fields of one event; consumes its `seq`."""

_REMEMBERED: Final = 1024
"""Capture times kept: twenty seconds of the shortest blocks. An older sample's is extrapolated."""


_LENGTHS: Final = struct.Struct("<3q")
"""Before a saved session: the lengths of its own state, the tracks' and the encoder's."""


_MEASURED: Final = {
    "seq",
    "wall_time",
    "lag_ms",
    "audio_received_s",
    "realtime_factor",
    "queue_depths",
    "dropped_partials",
}
"""Fields that differ when the same audio is heard again."""


def _content(event: Event) -> str:
    return event.model_dump_json(exclude=_MEASURED)


class TrackSet(Protocol):
    """What a session asks of its tracks."""

    def speaker(self, label: str) -> int | None:
        """The number of a label such as "S2", if there is such a speaker."""
        ...

    def profile(self, number: int) -> tuple[NDArray[np.float32], float]:
        """[E] embedding of a speaker's voice so far and the seconds of clean speech in it."""
        ...

    def name(self, number: int, name: str) -> Sequence[Event]:
        """A listener says who a speaker is."""
        ...

    def look_for(self, gallery: Gallery) -> None:
        """From now on, these enrolled people."""
        ...

    def freeze(self) -> Callable[[], bytes]:
        """Everything they know now; what it returns makes bytes of it, on any thread."""
        ...

    def restore(self, data: bytes) -> None:
        """Goes on from that; a ValueError if it is not such bytes."""
        ...

    def steps(self, frames: Frames) -> Iterator[Sequence[Event]]:
        """Frames → the events they cause, in order, a few frames at a time."""
        ...

    def flush(self, end: int) -> Sequence[Event]:
        """The audio stops at sample ``end``: everything open is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Health:
    """What a heartbeat tells of the process around the session."""

    realtime_factor: float = 0.0
    queue_depths: dict[str, int] = field(default_factory=dict[str, int])
    dropped_partials: int = 0


@dataclass
class SessionState:
    """What a session itself knows; see the attributes of `Session` of the same names."""

    seq: int
    skipped: int
    segments: int
    processed: int
    lost: int
    words: int
    next_heartbeat: int
    labels: list[str]
    counts: dict[str, int]
    chunker: ChunkerState


class Session:
    """A stream's clock, slot, chunker and tracks.

    Call `opened` first; then `feed` blocks; give every chunk it returns to the engine and the
    chunk's frames to `take` or `takes`, in order; at the end `close`, its chunks likewise, and
    `closed`.

    Args:
        stream_id: The source's name in the config.
        source: What the source says it is.
        checkpoint: Names of the loaded checkpoints.
        latency: Chunk and look-ahead, for `session.opened`.
        slot: The engine's slot.
        chunker: Cuts the audio.
        tracks: Builds the tracks around this session's stamp.
        heartbeat_s: Audio seconds between heartbeats; 0 for none.
        health: Asked at each heartbeat.
        now: Monotonic seconds, the clock of `Block.captured`.
        resume: The session that goes on under its old name; follow up with `restore`.
    """

    def __init__(
        self,
        *,
        stream_id: str,
        source: str,
        checkpoint: Sequence[str],
        latency: Latency,
        slot: int,
        chunker: Chunker,
        tracks: Callable[[Stamp], TrackSet],
        heartbeat_s: float = 5.0,
        health: Callable[[], Health] = Health,
        now: Callable[[], float] = monotonic,
        resume: Resumed | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex[:12] if resume is None else resume.session_id
        self.stream_id = stream_id
        self.resume_token = secrets.token_urlsafe(18) if resume is None else resume.token
        self.slot = slot
        self.chunker = chunker
        self.tracks = tracks(self.stamp)
        self.processed = 0
        """Stream-clock sample up to which the encoder has heard the audio."""
        self._source = source
        self._checkpoint = list(checkpoint)
        self._latency = latency
        self._heartbeat = clock.samples(heartbeat_s)
        self._health = health
        self._now = now
        self._seq = 0
        self._skipped = 0  # numbers below `_seq` that no event has
        self._said: Counter[str] = Counter()  # bound: what `go_on` is given
        self._segments = 0
        self._stopped: GapReason | None = None  # the source said that its audio has stopped
        # Bound: `feed` returns what it adds, and the caller gives each to the engine in turn.
        self._inflight: deque[Chunk] = deque()
        self._marks: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)  # (end, captured)
        self._next_heartbeat = self._heartbeat
        self._counts: Counter[str] = Counter()
        self.lost = 0
        """Samples that went into gaps."""
        self._abandoned = False
        self._labels: set[str] = set()
        self._words = 0

    @property
    def received(self) -> int:
        """Stream-clock sample up to which audio has arrived."""
        return self.chunker.position

    def stamp(self, start: int, end: int) -> dict[str, Any]:
        """Envelope fields of the next event, for the audio from ``start`` to ``end`` (samples)."""
        seq = self._seq
        self._seq += 1
        lag_s = max(self._now() - self._captured(end), 0.0)
        return {
            "session_id": self.id,
            "stream_id": self.stream_id,
            "seq": seq,
            "start": clock.seconds(max(start, 0)),
            "end": clock.seconds(max(end, 0)),
            "wall_time": datetime.now(UTC),
            "lag_ms": round(lag_s * 1000, 3),
        }

    def opened(self) -> list[Event]:
        """The session's first event."""
        return [
            SessionOpened(
                **self.stamp(0, 0),
                source=self._source,
                checkpoint=self._checkpoint,
                latency=self._latency,
                resume_token=self.resume_token,
            )
        ]

    def feed(self, block: Block) -> tuple[list[Event], list[Ready]]:
        """A block → events about what is missing, and the chunks it completes."""
        events: list[Event] = []
        chunks: list[Chunk] = []
        if block.lost:
            events, chunks = self._gap(block.lost, block.reason or "overflow")
        elif block.reason is not None and block.reason != self._stopped:
            # The audio has stopped for an unknown time: what was heard must not wait for more.
            chunks = self.chunker.end()
            events.append(
                Warning_(
                    **self.stamp(self.received, self.received),
                    code=f"source.{block.reason}",
                    message=f"{self._source} gives no audio ({block.reason}); waiting for it",
                )
            )
        if block.flushed is not None:
            chunks += self.chunker.end()
        elif not block.lost:
            self._stopped = block.reason
        if len(block.samples):
            self._stopped = None
            chunks += self.chunker.feed(block.samples)
            self._marks.append((self.received, block.captured))
        return self._counted(events), self._ready(chunks)

    def freeze(self) -> Callable[[bytes], bytes]:
        """Everything it takes to go on from here. Call it when no chunk is under way.

        Returns:
            Makes bytes of it and of the state of its encoder slot, on any thread, for `restore`.
        """
        assert not self._inflight, f"saved with {len(self._inflight)} chunks under way"
        own = SessionState(
            seq=self._seq,
            skipped=self._skipped,
            segments=self._segments,
            processed=self.processed,
            lost=self.lost,
            words=self._words,
            next_heartbeat=self._next_heartbeat,
            labels=sorted(self._labels),
            counts=dict(self._counts),
            chunker=self.chunker.state(),
        )
        tracks = self.tracks.freeze()

        def packed(encoder: bytes) -> bytes:
            parts = (pack(own), tracks(), encoder)
            return b"".join((_LENGTHS.pack(*map(len, parts)), *parts))

        return packed

    def restore(self, data: bytes) -> bytes:
        """Go on where the session that was saved as ``data`` was; see `go_on` for its numbers.

        Returns:
            The state of its encoder slot.

        Raises:
            ValueError: not a saved session, or one of other settings.
        """
        if len(data) < _LENGTHS.size:
            raise ValueError(f"expected a saved session, got {len(data)} bytes")
        lengths = _LENGTHS.unpack_from(data)
        if min(lengths) < 0 or sum(lengths) + _LENGTHS.size != len(data):
            raise ValueError(f"expected parts of {lengths} bytes, got {len(data)} in all")
        first, second = _LENGTHS.size + lengths[0], _LENGTHS.size + lengths[0] + lengths[1]
        state = unpack(SessionState, data[_LENGTHS.size : first])
        self.chunker.restore(state.chunker)
        self.tracks.restore(data[first:second])
        self._seq, self._segments, self.processed = state.seq, state.segments, state.processed
        self._skipped = state.skipped
        self.lost, self._words, self._labels = state.lost, state.words, set(state.labels)
        self._next_heartbeat, self._counts = state.next_heartbeat, Counter(state.counts)
        return data[second:]

    @property
    def seq(self) -> int:
        """The number the next event will have."""
        return self._seq

    def go_on(self, seq: int, said: Sequence[Event]) -> int:
        """Numbers below ``seq`` may have been given out, as far as is known to ``said``.

        Returns:
            How many numbers no event is known to have.
        """
        skipped = seq - self._seq - sum(event.seq >= self._seq for event in said)
        if skipped:  # otherwise nothing was heard after the save
            self._said = Counter(map(_content, said))
        self._skipped += skipped
        self._seq = seq
        return skipped

    def new(self, events: Sequence[Event]) -> Sequence[Event]:
        """Those of the ``events`` just made that were not said before the process ended.

        The same audio heard again makes the same events again; they have their numbers already,
        and the others get those that follow.
        """
        if not self._said or not events:
            return events
        unsaid = [event for event in events if not self._was_said(event)]
        self._seq = events[0].seq + len(unsaid)
        return [
            event.model_copy(update={"seq": seq}) for seq, event in enumerate(unsaid, events[0].seq)
        ]

    def _was_said(self, event: Event) -> bool:
        content = _content(event)
        times = self._said.pop(content, 0)
        if times > 1:
            self._said[content] = times - 1
        return times > 0

    def name_speaker(self, number: int, name: str) -> list[Event]:
        """A listener says who a speaker is → the events of that."""
        return self._counted(list(self.tracks.name(number, name)))

    def close(self) -> list[Ready]:
        """The audio ends → the chunks that bring out what is still under way."""
        return [] if self._abandoned else self._ready(self.chunker.end())

    def abandon(self) -> None:
        """Something broke: what is under way is given up, and `close` brings out nothing."""
        self._inflight.clear()
        self._abandoned = True

    def closed(self, reason: str) -> list[Event]:
        """The session's last event, once every chunk was taken."""
        assert not self._inflight, f"closed with {len(self._inflight)} chunks under way"
        totals = {
            "audio_s": clock.seconds(self.received),
            "lost_s": clock.seconds(self.lost),
            "speakers": float(len(self._labels)),
            "turns": float(self._counts["turn.ended"]),
            "words": float(self._words),
            "gaps": float(self._counts["gap"]),
            "events": float(self._seq + 1 - self._skipped),
        }
        return [
            SessionClosed(**self.stamp(0, self.received), reason=reason, totals=totals),
        ]

    def warned(self, code: str, message: str) -> list[Event]:
        """A `warning` event: something around the session is not as it should be."""
        return self._counted(
            [Warning_(**self.stamp(self.received, self.received), code=code, message=message)]
        )

    def failed(self, code: str, message: str) -> list[Event]:
        """An `error` event: the source broke, or the house did."""
        return [Error_(**self.stamp(self.received, self.received), code=code, message=message)]

    def take(self, frames: Frames) -> list[Event]:
        """The frames of the oldest chunk under way → the events they cause.

        Frames carry stream-clock samples already. A chunk with non-finite samples becomes a `gap`:
        the encoder heard zeros in its place and began afresh.
        """
        return [event for some in self.takes(frames) for event in some]

    def takes(self, frames: Frames) -> Iterator[list[Event]]:
        """The same in several parts, between which somebody else may compute.

        The chunk is under way until the last of them. Other events may be made in between; each
        part is to be published before that.
        """
        chunk = self._inflight[0]
        end = chunk.start + chunk.valid
        if frames.nonfinite:
            self.lost += chunk.valid
            fields = self.stamp(chunk.start, end)
            yield self._counted([Gap(**fields, lost_samples=chunk.valid, reason="non-finite")])
        if chunk.first:
            self._segments += 1
            if self._segments > 1:
                # To the tracks a new segment is like a restart: nothing before may be joined to it.
                frames = replace(frames, nonfinite=True)
        for events in self.tracks.steps(frames):
            yield self._counted(events)
        if chunk.valid:
            self.processed = end
        if chunk.last:
            yield self._counted(self.tracks.flush(self.processed))
        self._inflight.popleft()
        yield self._counted(self._beaten(end))

    def _beaten(self, end: int) -> list[Event]:
        """A heartbeat, if one is due at this sample."""
        if not self._heartbeat or self.processed < self._next_heartbeat:
            return []
        self._next_heartbeat = (self.processed // self._heartbeat + 1) * self._heartbeat
        health = self._health()
        return [
            Heartbeat(
                **self.stamp(end, end),
                audio_received_s=clock.seconds(self.received),
                audio_processed_s=clock.seconds(self.processed),
                realtime_factor=health.realtime_factor,
                queue_depths=health.queue_depths,
                dropped_partials=health.dropped_partials,
            )
        ]

    def _gap(self, lost: int, reason: GapReason) -> tuple[list[Event], list[Chunk]]:
        start = self.received
        chunks = self.chunker.gap(lost)
        self.lost += lost
        gap = Gap(**self.stamp(start, start + lost), lost_samples=lost, reason=reason)
        return [gap], chunks

    def _ready(self, chunks: list[Chunk]) -> list[Ready]:
        self._inflight.extend(chunks)
        return [
            Ready(self.slot, chunk.start, chunk.samples, chunk.valid, chunk.first)
            for chunk in chunks
        ]

    def _counted(self, events: Sequence[Event]) -> list[Event]:
        for event in events:
            self._counts[event.type] += 1
            if event.type == "turn.ended":
                self._labels.add(event.speaker.label)
            elif event.type == "speaker.revised" and event.reason == "merged":
                self._labels.discard(event.from_label)
            elif event.type == "transcript.final":
                self._words += len(event.words)
        return list(events)

    def _captured(self, sample: int) -> float:
        """When a sample was captured (monotonic seconds); now, before any was."""
        if not self._marks:
            return self._now()
        at = min(bisect_left(self._marks, (sample, 0.0)), len(self._marks) - 1)
        end, captured = self._marks[at]
        return captured - max(end - sample, 0) / clock.SAMPLE_RATE
