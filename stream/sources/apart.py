"""One source whose channels are streams apart, each with a session and speakers of its own."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Protocol, runtime_checkable

from stream.engine import EngineFull
from stream.sources.line import Line
from stream.sources.source import Block, Intake, Source, SourceError


@runtime_checkable
class Multichannel(Protocol):
    """Settings that can open every channel for itself."""

    @property
    def apart(self) -> int | None:
        """How many channels become streams; None mixes them into one."""
        ...

    def split(self) -> "list[Source]":
        """One source a channel."""
        ...


def stream_name(source: str, channel: int) -> str:
    """The stream of a channel, from 0."""
    return f"{source}-{channel + 1}"


def sharing(
    lines: Sequence[Line], opening: Callable[[], AbstractAsyncContextManager[None]], *, live: bool
) -> list[Source]:
    """Lines of one opening → a source each; the first to be opened opens it, the last closes it.

    Args:
        lines: What is heard, one a channel.
        opening: Feeds all of them while it is entered.
        live: See `Source.live`.
    """
    shared = _Shared(opening)
    return [_Channel(line, shared, live) for line in lines]


@asynccontextmanager
async def alongside(work: Coroutine[Any, Any, None], name: str) -> AsyncGenerator[None]:
    """Do something for as long as this is entered."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class _Shared:
    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._opening = opening
        self._hearers = 0
        self._lock = asyncio.Lock()
        self._stack = AsyncExitStack()

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        async with self._lock:
            if not self._hearers:
                await self._stack.enter_async_context(self._opening())
            self._hearers += 1
        try:
            yield
        finally:
            async with self._lock:
                self._hearers -= 1
                if not self._hearers:
                    await self._stack.aclose()


class _Channel:
    def __init__(self, line: Line, shared: _Shared, live: bool) -> None:
        self._line, self._shared = line, shared
        self.name, self.live = line.name, live

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[AsyncIterator[Block]]:
        async with self._shared.open(), self._line.open() as blocks:
            yield blocks


class Apart:
    """A listener whose callers are the channels of one source; it ends when they have.

    Args:
        source: The source.
        count: Its channels.
    """

    def __init__(self, source: Multichannel, count: int) -> None:
        self._source, self._count = source, count

    @property
    def streams(self) -> int:
        """See `Listener.streams`."""
        return self._count

    async def serve(self, name: str, intake: Intake) -> None:
        """Run the sessions ``<name>-1``, ``<name>-2``, …

        Raises:
            SourceError: a channel cannot be opened, or failed.
        """
        closed = self._count

        def opened() -> None:
            nonlocal closed
            closed -= 1
            if not closed:
                intake.listening(name)

        async with asyncio.TaskGroup() as group:
            for index, source in enumerate(self._source.split()):
                group.create_task(
                    self._run(stream_name(name, index), source, intake, opened),
                    name=f"channel:{index}",
                )

    @staticmethod
    async def _run(name: str, source: Source, intake: Intake, opened: Callable[[], None]) -> None:
        try:
            await intake.stream(name, source, returns="name", opened=opened)
        except EngineFull as error:
            raise SourceError(f"{name}: {error}") from error
