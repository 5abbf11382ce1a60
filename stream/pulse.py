"""How a long run is doing: the event loop's lateness, faults nobody saw, memory that goes back."""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final

from stream.metrics import Histogram

BEAT_S: Final = 0.05
"""How often the event loop is asked how late it is."""

GIVE_BACK_S: Final = 10.0
"""How often freed memory goes back to the system."""

ARENAS: Final = 2
"""glibc's pools of memory: the event loop's and one for all other threads."""

LARGE: Final = 1 << 20
"""Bytes of a block that is worth pages of its own."""

_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_M_ARENA_MAX: Final = -8


class Pulse:
    """The event loop's: how late it is, and how many errors reached it because nobody took them.

    Attributes:
        lateness_ms: Of a call that is due: what computes on the loop, or a busy machine, adds.
        faults: Exceptions of tasks and callbacks that nobody retrieved.
    """

    def __init__(self) -> None:
        self.lateness_ms = Histogram()
        self.faults = 0

    async def beat(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            due = monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self.lateness_ms.observe(max(monotonic() - due, 0.0) * 1000)

    @contextmanager
    def counting(self) -> Generator[None]:
        """While in it, what reaches the running loop's exception handler is counted too."""
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            self.faults += 1
            if before is None:
                loop.default_exception_handler(context)
            else:
                before(loop, context)

        loop.set_exception_handler(handle)
        try:
            yield
        finally:
            loop.set_exception_handler(before)


def few_arenas() -> None:
    """Let threads share their memory; before there are any, and unless the environment says else.

    By default glibc makes a pool for every thread, up to eight a core, and what one thread freed
    another's pool cannot use.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _adjust(_M_ARENA_MAX, ARENAS)


def large_alone() -> None:
    """Let large blocks be pages of their own, which go back to the system when they are freed.

    For a process that copies saved sessions of megabytes and computes elsewhere: the tensors of a
    step are as large, and would cost a page fault for every 4 KiB.
    """
    _adjust(_M_MMAP_THRESHOLD, LARGE)


def keep_loaded() -> None:
    """Let Python's garbage collector leave alone what is there by now: it stays to the end.

    A full collection would look through all of it, for a quarter of a second on the event loop.
    """
    gc.collect()
    gc.freeze()


async def give_back() -> None:
    """Return freed memory to the system now and then, until cancelled; glibc's needs it.

    A saved session is megabytes in a few blocks, and so is a step's work: glibc keeps such blocks
    once they are free, between others that are not, and with every new constellation more of them.
    """
    while _of_libc("malloc_trim") is not None:
        await asyncio.sleep(GIVE_BACK_S)
        await asyncio.to_thread(trim)  # some milliseconds, without the interpreter's lock


def trim() -> None:
    """Return freed memory to the system now; where there is another C library, nothing."""
    give = _of_libc("malloc_trim")
    if give is not None:
        give(0)


def _adjust(option: int, value: int) -> None:
    adjust = _of_libc("mallopt")
    if adjust is not None:
        adjust(option, value)


def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of glibc's; None where there is another C library."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # the last: Windows
        return None
