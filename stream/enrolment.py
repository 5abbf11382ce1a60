"""Recordings of one person → what `stream.voiceprints` keeps of them."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from stream.batcher import Ready
from stream.chunker import Chunker
from stream.clock import FRAME_RATE
from stream.engine import Engine
from stream.inference import EngineError, EngineSettings
from stream.sources.file import FileSource
from stream.tracks.frames import Frames
from stream.tracks.turns import Moments
from stream.voiceprints import VoiceprintError

LEAST_S: Final = 1.0
"""Seconds of clean speech without which a recording says too little about a voice."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One clip, heard.

    Attributes:
        path: Where it is.
        embedding: [E] as the x-vector head gives it.
        evidence_s: Seconds of clean speech behind it.
    """

    path: Path
    embedding: NDArray[np.float32]
    evidence_s: float


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Clips of a person.

    Attributes:
        checkpoint: Content id of the speaker checkpoint that heard them.
        recordings: In the order given.
    """

    checkpoint: str
    recordings: list[Recording]


class Voice:
    """Weighted moments of the voice in a stream, speech of several at once left out.

    It is taken for granted that one person speaks: whichever local channel is active is theirs.
    """

    def __init__(self) -> None:
        self.moments = Moments()
        self._weights: list[float] = []  # of every frame so far; a clip is short
        self._rows = 0

    def step(self, frames: Frames) -> None:
        """Takes the next frames of the stream."""
        if frames.voice is None:
            return
        self._weights += _clean(frames)
        for row in frames.voice.astype(np.float64):
            index = self._rows - frames.voice_delay
            self._rows += 1
            if 0 <= index < len(self._weights):
                self.moments.add(self._weights[index], row)


def _clean(frames: Frames) -> list[float]:
    """Of each frame, how surely one voice speaks alone; all of it without the activity head.

    The head often shares its probability among channels, so their sum is what counts voices: 1 is
    one, however it is shared; at 0 and at 2 there is nobody, or more than one.
    """
    if frames.activity is None:
        return [1.0] * (0 if frames.voice is None else len(frames.voice))
    voices = frames.activity.sum(axis=1, dtype=np.float64)
    weights = np.clip(np.minimum(voices, 2.0 - voices), 0.0, 1.0)
    return np.where(weights < 0.5, 0.0, weights).tolist()


async def listen(settings: EngineSettings, clips: Sequence[Path]) -> Enrolment:
    """Hears the clips, one after the other.

    Raises:
        EngineError: a checkpoint or device cannot be used, or there is no speaker head.
        SourceError: a clip cannot be read.
        VoiceprintError: a clip holds too little speech.
    """
    async with Engine(settings) as engine:
        if not engine.has_voice or engine.loaded.voice_id is None:
            raise EngineError(
                f"{', '.join(engine.loaded.names)}: no speaker head; "
                "expected a checkpoint with one (UniSpeechSatForXVector)"
            )
        return Enrolment(engine.loaded.voice_id, [await _hear(engine, clip) for clip in clips])


async def _hear(engine: Engine, clip: Path) -> Recording:
    chunker = Chunker(
        engine.loaded.chunk_samples, engine.loaded.lead, receptive=engine.loaded.receptive
    )
    slot = engine.acquire()
    voice = Voice()

    async def advance(chunks: Sequence[Any]) -> None:
        for chunk in chunks:
            ready = Ready(slot, chunk.start, chunk.samples, chunk.valid, chunk.first)
            (frames,) = await engine.run([ready])
            if frames.nonfinite:
                raise VoiceprintError(f"{clip}: holds samples that are not finite numbers")
            voice.step(frames)

    try:
        async with FileSource(path=clip).open() as blocks, aclosing(cast("Any", blocks)) as heard:
            async for block in heard:
                await advance(chunker.feed(block.samples))
        await advance(chunker.end())
    finally:
        engine.release(slot)
    moments = voice.moments
    evidence_s = moments.mass / FRAME_RATE
    if evidence_s < LEAST_S:
        raise VoiceprintError(
            f"{clip}: {evidence_s:.1f} s of clean speech; expected at least {LEAST_S:.0f} s"
        )
    embedding = engine.embed(
        np.asarray(moments.mass, np.float32),
        moments.first.astype(np.float32),
        moments.second.astype(np.float32),
    )
    return Recording(clip, embedding, evidence_s)
