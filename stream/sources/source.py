"""What a source is: settings with a name, opened into an iterator of blocks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sinks.events import Event

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
        position: How many of its own samples the sender was heard with up to here, see
            `Resumed.taken`; 0 for a sender that cannot send them again.
        flushed: What was heard must come out now, as at the end of the audio; called when it has.
    """

    samples: NDArray[np.float32]
    captured: float
    lost: int = 0
    reason: GapReason | None = None
    position: int = 0
    flushed: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """A session of an earlier process, to go on with.

    Attributes:
        session_id: The same as then.
        stream: The same stream.
        token: The caller's secret.
        source: What the source said it was.
        taken: The caller's own samples that had been heard when it was saved.
        next_seq: Number of its next new event: none of an earlier process has it or a higher one.
        said: Its last events, as far as they are known, in order. One that is made again, because
            the caller sends again what was not saved, is no new event.
        saved: When it was saved, in seconds since 1970: a clock that two processes share.
        data: The session as it was saved.
    """

    session_id: str
    stream: str
    token: str
    source: str
    taken: int
    next_seq: int
    said: tuple[Event, ...]
    saved: float
    data: bytes


class Source(Protocol):
    """Where audio comes from. A live source never waits for its reader: it loses and says so."""

    @property
    def name(self) -> str:
        """What a subscriber reads in `session.opened`: "file:meeting.flac"."""
        ...

    @property
    def live(self) -> bool:
        """Whether the audio goes on while nobody listens: its session can outlive the process."""
        ...

    def open(self) -> AbstractAsyncContextManager[AsyncIterator[Block]]:
        """Open it: blocks until the source ends.

        Raises:
            SourceError: it cannot be opened.
        """
        ...


Returns = Literal["never", "token", "name"]
"""How a session is taken up again: not at all, by its caller's resume token, or by its stream's
name in the configuration."""


class Intake(Protocol):
    """Where a listener brings its callers: the daemon, to a server."""

    @property
    def stop(self) -> asyncio.Event:
        """Set when the daemon drains: take nobody new, let who is there finish."""
        ...

    def listening(self, name: str) -> None:
        """The listener ``name`` takes callers from now on; the daemon is ready once all do."""
        ...

    async def stream(
        self,
        name: str,
        source: Source,
        *,
        tap: Callable[[Event], None] | None = None,
        resume: Resumed | None = None,
        returns: Returns = "never",
        form: str = "",
        opened: Callable[[], None] | None = None,
    ) -> None:
        """Run one session over ``source`` until it ends, or the daemon drains.

        Args:
            name: The stream's name in its events.
            source: Opened here.
            tap: Called with each event of this session, at once and on the event loop.
            resume: The session to go on with; None begins one.
            returns: How it may go on in another process; what never does is drained at the end.
            form: Of the caller's audio, for who takes it up there: see `Survivor.form`.
            opened: Called when the session is open: begun, or gone on with.

        Raises:
            EngineFull: no slot is free; nothing was opened.
            SourceError: the source cannot be opened.
        """
        ...


@runtime_checkable
class Listener(Protocol):
    """A source of sources: it waits for callers, and each of them is a stream of its own."""

    @property
    def streams(self) -> int:
        """How many callers there may be at a time: as many slots are kept for them."""
        ...

    async def serve(self, name: str, intake: Intake) -> None:
        """Take callers until the daemon drains; returns when the last has gone.

        Calls `Intake.listening` as soon as one could come.

        Args:
            name: Its name in the configuration; streams are named after it.
            intake: Where streams are brought.

        Raises:
            SourceError: it cannot listen.
        """
        ...
