"""What a student hears in a recording: whole, or as a stream with a given window hears it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from model.state import Window
from model.streaming import StreamingModel
from recipes.corpus import HOP, RATE
from recipes.student import Student
from stream.clock import frames
from stream.evaluate import at_latency
from stream.inference import EngineSettings
from stream.tracks.frames import Frames

Floats = NDArray[np.float32]

LONG_S: Final = 20
"""From this length on a stream is stepped through: seen at once, attention takes the square."""


def window_of(settings: EngineSettings) -> Window:
    """What the engine does with these settings, in frames."""
    return Window(
        chunk=frames(settings.chunk_ms / 1000),
        left=frames(settings.left_ms / 1000),
        right=frames(settings.lookahead_ms / 1000),
    )


SHIPPED: Final = window_of(EngineSettings())
"""What the engine does unless it is told otherwise."""

LATENCIES: Final[Mapping[str, Window | None]] = MappingProxyType(
    {"offline": None}
    | {f"{s:g} s": window_of(at_latency(EngineSettings(), s)) for s in (0.32, 0.64, 1.28)}
)
"""The whole recording in view, and streams by algorithmic latency: chunk and look-ahead."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Head outputs of one recording, a row every 20 ms, as the engine hands them to the tracks.

    Attributes:
        activity: [T, S] probability that each local speaker talks.
        voice: [T, 512] frame outputs of the x-vector head.
        characters: [T, V] log-probabilities.
    """

    activity: Floats
    voice: Floats
    characters: Floats

    @property
    def frames(self) -> Frames:
        """The same for the tracks."""
        return Frames(start=0, activity=self.activity, voice=self.voice, ctc=self.characters)


@torch.inference_mode()
def listen(student: Student, wave: Floats, window: Window | None) -> Heard:
    """One recording through the student.

    Args:
        student: in evaluation mode.
        wave: [N] in ±1.
        window: of the stream; None hears the recording whole.
    """
    if window is not None and len(wave) >= LONG_S * RATE:
        return _step_through(student, wave, window)
    out = student(torch.from_numpy(wave)[None], window)
    return Heard(
        activity=out.activity[0].sigmoid().numpy(),
        voice=out.voice[0].numpy(),
        characters=out.characters[0].log_softmax(-1).numpy(),
    )


def _step_through(student: Student, wave: Floats, window: Window) -> Heard:
    model = StreamingModel([student.diarization, student.speaker, student.ctc], window)
    assert model.voice_delay == 0, "expected an x-vector head whose frame layers see one frame"
    state = model.zeros(1)
    step = window.chunk * HOP
    expected = student.encoder.config.frames(len(wave))
    parts: tuple[list[Floats], list[Floats], list[Floats]] = ([], [], [])
    for at in range(0, len(wave) + (model.lead + window.chunk) * HOP, step):
        piece = torch.from_numpy(wave[at : at + step])
        valid = torch.tensor([len(piece)])
        piece = torch.nn.functional.pad(piece, (0, step - len(piece)))
        out = model.step(piece[None], state, valid=valid)
        exists = out.mask[0]
        assert out.activity is not None, "the student has all three heads"
        assert out.voice is not None, "the student has all three heads"
        assert out.ctc is not None, "the student has all three heads"
        parts[0].append(out.activity[0, exists].sigmoid().numpy())
        parts[1].append(out.voice[0, exists].numpy())
        parts[2].append(out.ctc[0, exists].log_softmax(-1).numpy())
    activity, voice, characters = (np.concatenate(part) for part in parts)
    assert len(activity) == expected, f"expected {expected} frames, got {len(activity)}"
    return Heard(activity, voice, characters)
