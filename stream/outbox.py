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
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from sinks.sink import SinkError
from stream.database import Unusable, open_database
from stream.writing import GATHER_S, gather

log = structlog.get_logger(__name__)

VERSION: Final = 1

RETRY_S: Final = 0.5
"""How long a transaction that failed waits until it is tried again: a full disk, say."""

BACKLOG: Final = 50_000
"""Statements that may wait while the disk takes none; then new rows are refused, and counted."""

TOGETHER: Final = 1000
"""Statements of one transaction at most: what an attempt costs that a full disk lets fail."""

_SCHEMA: Final = """
CREATE TABLE waiting (
    n INTEGER PRIMARY KEY,
    sink TEXT NOT NULL,
    id TEXT NOT NULL,
    data BLOB NOT NULL
) STRICT;
CREATE INDEX waiting_sink ON waiting (sink, n);
"""

_INSERT: Final = "INSERT INTO waiting VALUES (?, ?, ?, ?)"
_DELETE: Final = "DELETE FROM waiting WHERE n = ?"
_READ: Final = "SELECT n, data FROM waiting WHERE sink = ? AND n > ? ORDER BY n LIMIT ?"


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
        found: Rows of earlier runs by sink, the oldest first.
        failure: Why nothing can be written at the moment; None while all is well.
        lost: Rows the disk never took: refused over `BACKLOG`, or not written by the end.
        unwritten: Places of the latter; they are known once it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[int]] = {}
        self.failure: str | None = None
        self.lost = 0
        self.unwritten: set[int] = set()
        # Bound: `BACKLOG`, kept by `append`; beyond it one statement for every row there is.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._next = 1
        # Statements given by the loop and finished by the thread. Two numbers, each with one
        # writer, need no lock.
        self._given = 0
        self._finished = 0

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

    def append(self, sink: str, identity: str, data: bytes) -> int | None:
        """Add an event at the end of what waits for a sink → its row's place.

        Returns:
            None if the disk has taken none for so long that this one is not kept.
        """
        if self._given - self._finished >= BACKLOG:
            if self.lost == 0:
                log.error("outbox takes no more events", path=str(self.path), waiting=BACKLOG)
            self.lost += 1
            return None
        n, self._next = self._next, self._next + 1
        self._put(_INSERT, (n, sink, identity, data))
        return n

    def settle(self, n: int) -> None:
        """The sink has this row, or never will."""
        self._put(_DELETE, (n,))

    async def read(self, sink: str, after: int, limit: int) -> list[Row]:
        """The next rows of a sink behind the row ``after``, those just added included.

        While the disk takes nothing, a row settled meanwhile may be among them.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Row]] = loop.create_future()

        def done(result: list[Any] | sqlite3.Error) -> None:
            rows = [] if isinstance(result, sqlite3.Error) else [Row(*row) for row in result]

            def settle() -> None:
                if not answer.done():
                    answer.set_result(rows)

            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(settle)

        self._jobs.put(_Job(_READ, (sink, after, limit), done))
        return await answer

    def _put(self, statement: str, values: tuple[Any, ...]) -> None:
        self._given += 1
        self._jobs.put(_Job(statement, values))

    # -- on the thread -------------------------------------------------------------------------

    def _prepare(self, sinks: Collection[str]) -> sqlite3.Connection:
        try:
            database = open_database(self.path, "an outbox", version=VERSION, schema=_SCHEMA)
        except Unusable as error:
            raise SinkError(f"fanout.outbox: {error}") from error
        database.isolation_level = None
        try:
            for sink, n in database.execute("SELECT sink, n FROM waiting ORDER BY n"):
                self.found.setdefault(sink, []).append(n)
                self._next = n + 1
            for sink, rows in list(self.found.items()):
                if sink in sinks:
                    log.info("events of an earlier run wait", sink=sink, events=len(rows))
                else:
                    database.execute("DELETE FROM waiting WHERE sink = ?", (sink,))
                    del self.found[sink]
                    log.warning(
                        "dropped the events of a sink that is gone", sink=sink, events=len(rows)
                    )
        except sqlite3.DatabaseError as error:
            database.close()
            raise SinkError(f"fanout.outbox: {self.path}: damaged ({error})") from error
        return database

    def _write(self, database: sqlite3.Connection) -> None:
        jobs: list[_Job] = []
        try:
            while True:
                if not jobs:
                    job = self._jobs.get()
                    if job is None:
                        return
                    jobs.append(job)
                    time.sleep(GATHER_S)  # a thread of ours: more comes meanwhile
                ended = gather(self._jobs, jobs)
                while jobs and self._commit(database, jobs[:TOGETHER]):
                    del jobs[:TOGETHER]
                if jobs:
                    jobs = self._answer(database, self._shorten(jobs))
                    if not ended and jobs:
                        time.sleep(RETRY_S)
                if ended:
                    self._give_up(jobs)
                    return
        finally:
            database.close()

    def _shorten(self, jobs: list[_Job]) -> list[_Job]:
        """Without rows that come and go again: a sink that takes events fills no backlog."""
        come = {job.values[0] for job in jobs if job.statement is _INSERT}
        both = come & {job.values[0] for job in jobs if job.statement is _DELETE}
        self._finished += 2 * len(both)
        return [job for job in jobs if job.done is not None or job.values[0] not in both]

    @staticmethod
    def _answer(database: sqlite3.Connection, jobs: list[_Job]) -> list[_Job]:
        """Answer what only reads → the other jobs.

        A full disk can still be read, and behind its rows come those it has not taken.
        """
        rest = [job for job in jobs if job.done is None]
        for job in jobs:
            if job.done is not None:
                sink, after, limit = job.values
                try:
                    rows: list[Any] = database.execute(_READ, job.values).fetchall()
                except sqlite3.Error as error:
                    job.done(error)
                    continue
                for n, of, _, data in (each.values for each in rest if each.statement is _INSERT):
                    if len(rows) == limit:
                        break
                    if of == sink and n > after:
                        rows.append((n, data))
                job.done(rows)
        return rest

    def _give_up(self, jobs: list[_Job]) -> None:
        """The end has come, and the disk did not take these."""
        self.unwritten = {job.values[0] for job in jobs if job.statement is _INSERT}
        self.lost += len(self.unwritten)
        if self.unwritten:
            events, path = len(self.unwritten), str(self.path)
            log.error("outbox lost events at the end", path=path, events=events, error=self.failure)

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
        self._finished += len(jobs) - len(answers)
        for job, rows in answers:
            assert job.done is not None
            job.done(rows)
        return True
