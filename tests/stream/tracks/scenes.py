"""Synthetic head outputs: who talks on which local channel, with which voice."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from sinks.events import Event
from stream.clock import HOP
from stream.tracks.frames import Frames

D = 24


@dataclass(frozen=True)
class Talk:
    """Somebody's activity: frames [start, end) on a channel."""

    voice: int
    start: int
    end: int
    channel: int = 0


class Stamper:
    """The session's part: gap-free seq, times in seconds."""

    def __init__(self) -> None:
        self.seq = 0

    def __call__(self, start: int, end: int) -> dict[str, Any]:
        self.seq += 1
        assert 0 <= start <= end, (start, end)
        return {
            "session_id": "s",
            "stream_id": "x",
            "seq": self.seq - 1,
            "start": start / 16000,
            "end": end / 16000,
            "wall_time": datetime(2026, 1, 1, tzinfo=UTC),
            "lag_ms": 0.0,
        }


def embed(mass: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean voice frame is the embedding."""
    assert mass.shape == ()
    assert first.shape == second.shape == (D,)
    return first / mass


def voices(count: int, seed: int = 0) -> np.ndarray:
    """[count, D] unit vectors of speakers, far apart."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((D, D)))
    return q[:count]


def scene(
    talks: Sequence[Talk],
    length: int,
    *,
    people: np.ndarray | None = None,
    channels: int = 3,
    delay: int = 7,
    noise: float = 0.1,
    seed: int = 0,
) -> Frames:
    """All frames of a stream in one piece; voice rows of the last `delay` frames come on top."""
    people = voices(8) if people is None else people
    rng = np.random.default_rng(seed)
    activity = np.full((length, channels), 0.02, np.float32)
    voice = noise * rng.standard_normal((length, D)).astype(np.float32)
    for talk in talks:
        activity[talk.start : talk.end, talk.channel] = 0.97
        voice[talk.start : talk.end] += people[talk.voice]
    before = np.full((delay, D), 100, np.float32)  # rows centred before the stream: to be ignored
    return Frames(
        start=0, activity=activity, voice=np.concatenate([before, voice]), voice_delay=delay
    )


def split(frames: Frames, cuts: Iterable[int]) -> list[Frames]:
    """The same frames in pieces that end at these rows."""
    bounds = [0, *sorted(cuts), frames.rows]
    pieces = []
    for piece, (a, b) in enumerate(itertools.pairwise(bounds)):
        last = piece == len(bounds) - 2
        pieces.append(
            Frames(
                start=frames.start + a * HOP,
                activity=None if frames.activity is None else frames.activity[a:b],
                voice=None if frames.voice is None else frames.voice[a : None if last else b],
                ctc=None if frames.ctc is None else frames.ctc[a:b],
                voice_delay=frames.voice_delay,
                labels=None
                if frames.labels is None
                else {name: logits[a:b] for name, logits in frames.labels.items()},
            )
        )
    return pieces


def finals(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Final events without what counts partials or clocks."""
    return [
        event.model_dump(exclude={"seq", "wall_time", "lag_ms"})
        for event in events
        if event.is_final
    ]


def turns(events: Iterable[Event]) -> list[tuple[str, int, int]]:
    """(label, first frame, end frame) of ended turns, by start."""
    found = [
        (event.speaker.label, round(event.start * 50), round(event.end * 50))
        for event in events
        if event.type == "turn.ended"
    ]
    return sorted(found, key=lambda turn: turn[1:])


def revised(events: Iterable[Event]) -> list[tuple[str, int, int]]:
    """As `turns`, with revisions of labels applied."""
    labels, spans = {}, {}
    for event in events:
        if event.type == "turn.ended":
            labels[event.turn_id] = event.speaker.label
            spans[event.turn_id] = (round(event.start * 50), round(event.end * 50))
        if event.type == "speaker.revised" and event.reason != "identified":
            for turn in event.revision_of:
                assert labels[turn] == event.from_label
                labels[turn] = event.to_label
    return sorted(((labels[t], *span) for t, span in spans.items()), key=lambda turn: turn[1:])
