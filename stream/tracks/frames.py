"""What the engine hands to the tracks: the head outputs of one stream, as plain numpy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.clock import HOP

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Frames:
    """Consecutive encoder frames of one stream; T may be 0 (the look-ahead is still filling).

    Frame ``i`` of these begins at sample ``start + 320 i`` and speaks for the 320 samples from
    there. A head that is not loaded is ``None``. All present arrays have T rows; only ``voice``
    may have more at the end of a stream, when its delayed rows are flushed. All values are finite
    (the engine restarts a slot rather than pass on NaN).

    Attributes:
        start: Sample (stream clock) of the first frame here.
        activity: [T, S] probability that each of S local speakers talks.
        voice: [≥T, D] TDNN outputs; row ``i`` is centred on frame ``i - voice_delay``, which may
            lie before these frames. Rows centred before the stream's first frame are ignored.
        ctc: [T, V] log-probabilities.
        nonfinite: The slot was restarted at ``start`` (the audio held NaN or infinity): nothing
            before may be joined to these frames.
        voice_delay: Frames by which ``voice`` lags, constant for an engine.
        labels: Head name → [T, K] logits of each frame. Mean pooling and a linear classifier
            commute, so their mean over a window is the published head's output for that window.
    """

    start: int
    activity: Floats | None = None
    voice: Floats | None = None
    ctc: Floats | None = None
    nonfinite: bool = False
    voice_delay: int = 0
    labels: Mapping[str, Floats] | None = None

    def __post_init__(self) -> None:
        for name, array in (("activity", self.activity), ("ctc", self.ctc)):
            if array is not None:
                shape = array.shape
                assert shape[:1] == (self.rows,), (
                    f"expected [{self.rows}, …] in Frames.{name}, got {shape}"
                )

    @property
    def rows(self) -> int:
        """T, the number of frames here."""
        if self.activity is not None:
            return len(self.activity)
        if self.ctc is not None:
            return len(self.ctc)
        for logits in (self.labels or {}).values():
            return len(logits)
        return 0 if self.voice is None else len(self.voice)

    @property
    def end(self) -> int:
        """The sample at which the next Frames of an unbroken stream begins."""
        return self.start + self.rows * HOP


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The CTC head's symbols.

    Attributes:
        tokens: Symbol of each of the V outputs.
        blank: Index of the CTC blank.
        delimiter: The symbol between words, ``None`` where a symbol is a word of its own.
    """

    tokens: tuple[str, ...]
    blank: int
    delimiter: str | None = "|"
