"""What files written by a thread of their own have in common: the outbox and the open sessions."""

import contextlib
import os
import queue
from pathlib import Path
from typing import Final, TypeVar

Job = TypeVar("Job")

GATHER_S: Final = 0.03
"""How long a transaction waits for more to write."""


def make_private(path: Path) -> None:
    """Make a file, and its folder, if there is none; only their owner can read what is made.

    One that is there is not even opened: to close a file gives up the locks that this process's
    other connections to it hold (POSIX), and SQLite relies on them.

    Raises:
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def gather(waiting: "queue.SimpleQueue[Job | None]", jobs: list[Job]) -> bool:
    """Move what has come to the end of ``jobs`` → whether it was the last, which None tells."""
    with contextlib.suppress(queue.Empty):
        while (more := waiting.get_nowait()) is not None:
            jobs.append(more)
        return True
    return False
