"""Sequence-classification logits of frames → a label for every window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinks.events import Event, Label
from stream.clock import HOP, seconds
from stream.tracks.frames import Frames
from stream.tracks.settings import LabelsSettings, hops

Stamp = Callable[[int, int], dict[str, Any]]


@dataclass
class Window:
    """Logits of one head since the last break.

    Attributes:
        blocks: [K] sums over the latest whole hops, oldest first.
        total: [K] sum over the hop that is filling.
        count: Frames in that.
    """

    blocks: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    count: int = 0


@dataclass
class LabelsState:
    """All that `Labels` knows."""

    cursor: int = -1
    windows: dict[str, Window] = field(default_factory=dict[str, Window])


class Labels:
    """What kind of audio it is, by each classification head; sans-I/O.

    Args:
        settings: Window, hop and threshold; the window is rounded to whole hops.
        classes: Head name → the label of each of its K outputs.
        stamp: Gives events their envelope.
        state: Where an earlier one was.
    """

    def __init__(
        self,
        settings: LabelsSettings,
        classes: Mapping[str, Sequence[str]],
        stamp: Stamp,
        *,
        state: LabelsState | None = None,
    ) -> None:
        self.state = state or LabelsState()
        self._classes = classes
        self._stamp = stamp
        self._hop = hops(settings.hop_ms)
        self._blocks = max(1, round(hops(settings.window_ms) / self._hop))
        self._threshold = settings.threshold

    def step(self, frames: Frames) -> list[Event]:
        """Takes the next frames of the stream."""
        self.enter(frames)
        events = list[Event]()
        for row in range(frames.rows):
            events.extend(self.row(frames, row))
        return events

    def enter(self, frames: Frames) -> None:
        """Prepares for these frames; a window does not reach over a hole in the timeline."""
        if not frames.labels or not frames.rows:
            return
        if frames.nonfinite or frames.start != self.state.cursor:
            self.state.windows = {name: Window() for name in sorted(frames.labels)}
        self.state.cursor = frames.start

    def row(self, frames: Frames, row: int) -> list[Event]:
        """Takes one of these frames."""
        if not frames.labels:
            return []
        self.state.cursor += HOP
        events = list[Event]()
        for name in sorted(frames.labels):
            logits = np.nan_to_num(frames.labels[name][row].astype(np.float64))
            window = self.state.windows[name]
            window.total = window.total + logits if window.count else logits
            window.count += 1
            if window.count < self._hop:
                continue
            window.blocks.append(window.total)
            window.count = 0
            if len(window.blocks) == self._blocks:
                events.extend(self._label(name, sum(window.blocks, np.zeros_like(logits))))
                del window.blocks[0]
        return events

    def _label(self, head: str, total: NDArray[np.float64]) -> list[Event]:
        frames = self._blocks * self._hop
        logits = total / frames
        odds = np.exp(logits - logits.max())
        best = int(np.argmax(odds))
        score = float(odds[best] / odds.sum())
        if score < self._threshold:
            return []
        end = self.state.cursor
        return [
            Label(
                head=head,
                label=self._classes[head][best],
                score=round(score, 4),
                window=seconds(frames * HOP),
                **self._stamp(end - frames * HOP, end),
            )
        ]
