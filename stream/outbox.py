"""Finals on their way to a sink, on disk: they outlive the process, and a long outage of a broker.

One SQLite file, written by a thread of its own in transactions that gather what has come for some
milliseconds. A row is one event for one sink; it goes when the sink has it. Delivery is at least
once and in the order of the rows: what was delivered but not yet noted is delivered again, under
the same id.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from sinks.sink import SinkError

log = structlog.get_logger(__name__)

VERSION: Final = 1

GATHER_S: Final = 0.03
"""How long a transaction waits for more to write: what a kill may cost."""

RETRY_S: Final = 0.5
"""How long a transaction that failed waits until it is tried again: a full disk, say."""

BACKLOG: Final = 50_000
"""Statements that may wait while the disk takes none; then new ones are lost, and counted."""

_SCHEMA: Final = """
CREATE TABLE waiting (
    n INTEGER PRIMARY KEY,
    sink TEXT NOT NULL,
    id TEXT NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE INDEX waiting_sink ON waiting (sink, n);
"""


@dataclass(frozen=True, slots=True)
class Row:
    """An event that waits.

    Attributes:
        n: Its place among all rows.
        data: The event as JSON.
    """

    n: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Job:
    """A statement, and who waits for it: called with the rows, or the error."""

    statement: str
    values: tuple[Any, ...]
    done: Callable[[list[Any] | sqlite3.Error], None] | None = None


class Outbox:
    """The file; use `open`.

    Attributes:
        waiting: Rows by sink, those included that are not written yet.
        failure: Why nothing can be written at the moment; None while all is well.
        lost: Rows that were lost because the disk took none for too long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: Counter[str] = Counter()
        self.failure: str | None = None
        self.lost = 0
        # Bound: `BACKLOG`, kept by `_put`.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._next = 1

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, sinks: Collection[str]) -> "AsyncGenerator[Outbox]":
        """Open the file, making it if there is none.

        Args:
            path: The file.
            sinks: Names of the sinks there are; what waits for another is dropped.

        Raises:
            SinkError: it cannot be opened, or is no outbox.
        """
        outbox = cls(path)
        database = await asyncio.to_thread(outbox._prepare, sinks)
        writer = threading.Thread(target=outbox._write, args=(database,), name="outbox")
        writer.start()
        try:
            yield outbox
        finally:
            outbox._jobs.put(None)
            await asyncio.to_thread(writer.join)

    def append(self, sink: str, identity: str, data: bytes) -> int:
        """Add an event at the end of what waits for a sink → its row's place."""
        n, self._next = self._next, self._next + 1
        self.waiting[sink] += 1
        if not self._put("INSERT INTO waiting VALUES (?, ?, ?, ?)", (n, sink, identity, data)):
            self.lost += 1
        return n

    def settle(self, sink: str, n: int) -> None:
        """The sink has this row, or never will."""
        self.waiting[sink] -= 1
        self._put("DELETE FROM waiting WHERE n = ?", (n,))

    def drop_oldest(self, sink: str, after: int) -> None:
        """Give up a sink's first row behind the row ``after``."""
        self.waiting[sink] -= 1
        self._put(
            "DELETE FROM waiting WHERE n = (SELECT min(n) FROM waiting WHERE sink = ? AND n > ?)",
            (sink, after),
        )

    async def read(self, sink: str, after: int, limit: int) -> list[Row]:
        """The next rows of a sink behind the row ``after``, those just added included."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Row]] = loop.create_future()

        def done(result: list[Any] | sqlite3.Error) -> None:
            rows = [] if isinstance(result, sqlite3.Error) else [Row(*row) for row in result]

            def settle() -> None:
                if not answer.done():
                    answer.set_result(rows)

            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(settle)

        statement = "SELECT n, data FROM waiting WHERE sink = ? AND n > ? ORDER BY n LIMIT ?"
        self._jobs.put(_Job(statement, (sink, after, limit), done))
        return await answer

    def _put(self, statement: str, values: tuple[Any, ...]) -> bool:
        if self._jobs.qsize() >= BACKLOG:
            return False
        self._jobs.put(_Job(statement, values))
        return True

    # -- on the thread -------------------------------------------------------------------------

    def _prepare(self, sinks: Collection[str]) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise SinkError(f"fanout.outbox: {self.path}: cannot be opened ({error})") from error
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")  # outlives the process
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            elif version != VERSION:
                raise sqlite3.DatabaseError(f"version {version} of it")  # noqa: TRY301
            found = database.execute("SELECT sink, count(*) FROM waiting GROUP BY sink").fetchall()
            (self._next,) = database.execute(
                "SELECT coalesce(max(n), 0) + 1 FROM waiting"
            ).fetchone()
            for sink, count in found:
                if sink in sinks:
                    self.waiting[sink] = count
                    log.info("events of an earlier run wait", sink=sink, events=count)
                else:
                    database.execute("DELETE FROM waiting WHERE sink = ?", (sink,))
                    log.warning(
                        "dropped the events of a sink that is gone", sink=sink, events=count
                    )
        except sqlite3.DatabaseError as error:
            database.close()
            raise SinkError(
                f"fanout.outbox: {self.path}: expected an outbox of version {VERSION} ({error})"
            ) from error
        return database

    def _write(self, database: sqlite3.Connection) -> None:
        ended = False
        try:
            while not ended:
                job = self._jobs.get()
                if job is None:
                    return
                time.sleep(GATHER_S)  # a thread of ours: more comes meanwhile
                jobs = [job]
                with contextlib.suppress(queue.Empty):
                    while (more := self._jobs.get_nowait()) is not None:
                        jobs.append(more)
                    ended = True
                while jobs and not self._commit(database, jobs):
                    jobs = self._answer(database, jobs)  # a full disk can still be read
                    if ended:
                        break
                    time.sleep(RETRY_S)
                    with contextlib.suppress(queue.Empty):
                        while (more := self._jobs.get_nowait()) is not None:
                            jobs.append(more)
                        ended = True
        finally:
            database.close()

    @staticmethod
    def _answer(database: sqlite3.Connection, jobs: list[_Job]) -> list[_Job]:
        """Answer what only reads → the other jobs."""
        for job in jobs:
            if job.done is not None:
                try:
                    job.done(database.execute(job.statement, job.values).fetchall())
                except sqlite3.Error as error:
                    job.done(error)
        return [job for job in jobs if job.done is None]

    def _commit(self, database: sqlite3.Connection, jobs: list[_Job]) -> bool:
        answers: list[tuple[_Job, list[Any]]] = []
        try:
            database.execute("BEGIN")
            for job in jobs:
                cursor = database.execute(job.statement, job.values)
                if job.done is not None:
                    answers.append((job, cursor.fetchall()))
            database.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            if self.failure is None:
                reason = str(error)
                log.error("outbox cannot be written", path=str(self.path), error=reason)  # noqa: TRY400
            self.failure = str(error)
            return False
        if self.failure is not None:
            log.info("outbox can be written again", path=str(self.path))
        self.failure = None
        for job, rows in answers:
            assert job.done is not None
            job.done(rows)
        return True
