"""Any file libsndfile reads, as fast as the engine takes it or at the speed it was spoken."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.source import Block, Source, SourceError

SHORTEST: Final = 400
"""Samples at 16 kHz of one encoder frame: less audio than this has no frame at all."""


class FileSource(BaseModel):
    """An audio file: any rate, channels averaged to one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["file"] = "file"
    path: Path = Field(description="WAV, FLAC, OGG, MP3, … whatever libsndfile reads.")
    channel: int | None = Field(
        default=None, ge=0, description="The channel that is heard, from 0; null is their mean."
    )
    apart: int | None = Field(
        default=None, ge=1, le=64, description="That many channels become streams of their own."
    )
    realtime: bool = Field(
        default=False, description="Pace it like a live source; otherwise as fast as it goes."
    )
    block_ms: int | None = Field(
        default=None, ge=1, le=60_000, description="Audio read at a time; 100 paced, else 1000."
    )

    @property
    def name(self) -> str:
        """For `session.opened`."""
        return f"file:{self.path.name}"

    @property
    def live(self) -> bool:
        """See `Source.live`."""
        return False

    def split(self) -> list[Source]:
        """One source a channel."""
        assert self.apart is not None
        return [
            self.model_copy(update={"apart": None, "channel": channel})
            for channel in range(self.apart)
        ]

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        """Open the file → its blocks.

        Raises:
            SourceError: missing, not audio, or shorter than one encoder frame. Iterating raises it
                where the file turns out to be damaged.
        """
        reader = _Reader(self.path, self.channel)
        await asyncio.to_thread(reader.open)
        try:
            async with aclosing(self._blocks(reader)) as blocks:
                yield blocks
        finally:
            await asyncio.to_thread(reader.close)

    async def _blocks(self, reader: "_Reader") -> AsyncGenerator[Block]:
        block_ms = self.block_ms or (100 if self.realtime else 1000)
        began = monotonic()
        given = 0
        while True:
            samples, last = await asyncio.to_thread(reader.read, block_ms)
            given += len(samples)
            captured = monotonic()
            if self.realtime:
                captured = began + given / SAMPLE_RATE
                await asyncio.sleep(max(captured - monotonic(), 0))
            if len(samples):
                yield Block(samples, captured)
            if last:
                return


class _Reader:
    """The file and its resampler; every method is for a worker thread."""

    def __init__(self, path: Path, channel: int | None = None) -> None:
        self._path, self._channel = path, channel
        # A cancelled read goes on in its thread: closing must wait for it.
        self._lock = threading.Lock()
        self._file: Any = None
        self._resampler: Resampler | None = None

    def open(self) -> None:
        import soundfile

        path = self._path
        if not path.exists():
            raise SourceError(f"{path}: no such file")
        if not path.is_file():
            raise SourceError(f"{path}: expected an audio file, got a folder or a device")
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: the file is empty; expected audio")
        try:
            file = soundfile.SoundFile(path)
        except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
            raise SourceError(
                f"{path}: not an audio file that libsndfile reads ({_reason(error)})"
            ) from error
        length = file.frames * SAMPLE_RATE / file.samplerate if file.samplerate else 0
        if file.channels < 1 or length < SHORTEST:
            file.close()
            raise SourceError(
                f"{path}: {file.channels} channel(s) of {file.frames} sample(s) at "
                f"{file.samplerate} Hz; expected at least one channel and 25 ms of audio"
            )
        if self._channel is not None and self._channel >= file.channels:
            file.close()
            raise SourceError(
                f"{path}: channel {self._channel}: the file has {file.channels}; "
                f"expected 0 to {file.channels - 1}"
            )
        self._file = file
        self._resampler = Resampler(file.samplerate)

    def read(self, block_ms: int) -> tuple[NDArray[np.float32], bool]:
        """→ (samples [n] at 16 kHz, whether the file ends here)."""
        import soundfile

        with self._lock:
            assert self._resampler is not None
            n = max(self._file.samplerate * block_ms // 1000, 1)
            try:
                block: NDArray[np.float32] = self._file.read(n, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                at = self._resampler.taken / self._resampler.rate
                raise SourceError(
                    f"{self._path}: damaged after {at:.2f} s ({_reason(error)})"
                ) from error
            if self._channel is not None or block.shape[1] == 1:
                mono = block[:, self._channel or 0].copy()
            else:
                mono = block.mean(axis=1)
            samples = self._resampler.step(mono)
            last = len(block) < n
            if last:
                samples = np.concatenate([samples, self._resampler.flush()])
            return samples, last

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()


def _reason(error: Exception) -> str:
    """What libsndfile says, without the path and the repetitions."""
    return str(getattr(error, "error_string", error)).split("Error : ")[-1].strip().rstrip(".")
