"""What a source is: settings with a name, opened into an iterator of blocks."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

GapReason = Literal["overflow", "unplugged", "network", "non-finite"]


class SourceError(Exception):
    """A source cannot be opened, or failed for good: what was given and what was expected."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some audio as it arrives.

    Attributes:
        samples: [n] float32, mono, 16 kHz, full scale ±1; n may be 0.
        captured: When the last of them was captured, in seconds of `time.monotonic`.
        lost: Samples that are missing right before ``samples``.
        reason: Why they are missing. With ``lost`` 0: the audio has stopped for this reason, and
            the block that resumes it will say how much is missing.
    """

    samples: NDArray[np.float32]
    captured: float
    lost: int = 0
    reason: GapReason | None = None


class Source(Protocol):
    """Where audio comes from. A live source never waits for its reader: it loses and says so."""

    @property
    def name(self) -> str:
        """What a subscriber reads in `session.opened`: "file:meeting.flac"."""
        ...

    def open(self) -> AbstractAsyncContextManager[AsyncIterator[Block]]:
        """Open it: blocks until the source ends.

        Raises:
            SourceError: it cannot be opened.
        """
        ...
