"""Open sessions on disk: what a daemon that was stopped, or killed, goes on with.

One SQLite file. A session's state is replaced every few seconds, and beside it stand its latest
events, written within milliseconds of giving them out: what a caller missed, and what is no new
event when it is made again. No number is ever given to two events: before any is, the file says how
high they may go. All of it is written by a thread of its own, in transactions that gather what has
come meanwhile.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from time import time
from typing import Any, Final

import structlog

from sinks.events import Event, parse
from stream.calls import same
from stream.database import Unusable, open_database
from stream.sources.source import Resumed
from stream.writing import gather

log = structlog.get_logger(__name__)

VERSION: Final = 3

AHEAD: Final = 1 << 20
"""Numbers a process may give out between two saves of a session: days of events."""

KEPT: Final = 500
"""Events of a session kept for a caller that missed them, besides those since its last save."""

BACKLOG: Final = 50_000
"""Jobs that may wait while the disk takes none; then no more events are kept."""

_SCHEMA: Final = """
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    stream TEXT NOT NULL,
    token TEXT NOT NULL,
    source TEXT NOT NULL,
    called INTEGER NOT NULL,
    taken INTEGER NOT NULL,
    received INTEGER NOT NULL,
    saved REAL NOT NULL,
    data BLOB NOT NULL,
    form TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE numbers (
    id TEXT PRIMARY KEY,
    free INTEGER NOT NULL
) STRICT;
CREATE TABLE said (
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    event BLOB NOT NULL,
    PRIMARY KEY (id, seq)
) STRICT, WITHOUT ROWID;
"""
# `numbers` apart: changing a row writes all of it, and a session's holds megabytes.

_UPGRADES: Final = {2: "ALTER TABLE sessions ADD COLUMN form TEXT NOT NULL DEFAULT '';"}

_TRIM: Final = """
DELETE FROM said WHERE id = :id AND seq < (
    SELECT seq FROM said WHERE id = :id ORDER BY seq DESC LIMIT 1 OFFSET :kept
)
"""


class SurvivalError(Exception):
    """The file of open sessions cannot be used; what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A session that was open when the last process ended.

    Attributes:
        session_id: Its id.
        stream: Its stream.
        token: Its resume token.
        source: What its source said it was.
        called: A caller of a server opened it, and may come back with the token; otherwise it is a
            source of the configuration, by the stream's name.
        taken: See `Resumed.taken`.
        received: Samples of its clock when it was saved.
        saved: When that was, in seconds since 1970.
        free: No event of it has this number or a higher one.
        data: See `Session.freeze`.
        said: Its latest events.
        form: Of the caller's audio, as `Form.stated` says it; "" if that is not known.
    """

    session_id: str
    stream: str
    token: str
    source: str
    called: bool
    taken: int
    received: int
    saved: float
    free: int
    data: bytes
    said: tuple[Event, ...] = ()
    form: str = ""

    def resumed(self) -> Resumed:
        """The same, for the session that goes on with it."""
        return Resumed(
            self.session_id,
            self.stream,
            self.token,
            self.source,
            self.taken,
            self.free,
            self.said,
            self.saved,
            self.data,
        )


class Lobby:
    """Survivors that nobody has gone on with yet; each goes out once.

    Args:
        found: They.
        resume_s: Asked how many seconds they wait from when they were saved.
    """

    def __init__(self, found: Iterable[Survivor], resume_s: Callable[[], float]) -> None:
        self._waiting = {survivor.token: survivor for survivor in found}
        self._resume_s = resume_s
        self._given_back = asyncio.Event()

    def claim(self, token: str) -> Survivor | None:
        """The one with this resume token, if it still waits."""
        found = next((each for each in self._waiting.values() if same(each.token, token)), None)
        if found is None or self._left_s(found) < 0:
            return None
        return self._waiting.pop(found.token)

    @property
    def streams(self) -> set[str]:
        """Theirs."""
        return {each.stream for each in self._waiting.values()}

    def claim_source(self, stream: str) -> Survivor | None:
        """The one of the configuration's source of this name, if it still waits."""
        for survivor in self._waiting.values():
            if survivor.stream == stream and not survivor.called and self._left_s(survivor) >= 0:
                return self._waiting.pop(survivor.token)
        return None

    def give_back(self, survivor: Survivor) -> None:
        """What was claimed cannot go on now; it may be claimed again."""
        self._waiting[survivor.token] = survivor
        self._given_back.set()

    async def late(self) -> Survivor:
        """Wait until nobody has come in time for one: it waits no more."""
        while True:
            if not self._waiting:
                self._given_back.clear()
                await self._given_back.wait()
            oldest = min(self._waiting.values(), key=attrgetter("saved"))
            left_s = self._left_s(oldest)
            if left_s <= 0:
                return self._waiting.pop(oldest.token)
            await asyncio.sleep(min(left_s, 1.0))  # the clock on the wall may be set

    def _left_s(self, survivor: Survivor) -> float:
        return survivor.saved + self._resume_s() - time()


class Survival:
    """The file of open sessions; use `open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Bound: `BACKLOG` events; of a session one save at a time and one end.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failed = False
        self._missing = False  # events were not written: those before them are no use

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> "AsyncGenerator[tuple[Survival, list[Survivor]]]":
        """Open the file, making it if there is none → it, and the sessions found in it.

        Raises:
            SurvivalError: it cannot be opened, is no such file, or is one of a newer version.
        """
        survival = cls(path)
        database, found = await asyncio.to_thread(survival._prepare)
        writer = threading.Thread(target=survival._write, args=(database,), name="survival")
        writer.start()
        try:
            yield survival, found
        finally:
            survival._jobs.put(None)
            await asyncio.to_thread(writer.join)

    def note(self, session_id: str, seq: int, event: bytes) -> None:
        """An event was given out: ``event`` is its JSON."""
        if self._jobs.qsize() < BACKLOG:
            values = (session_id, seq, event)
            self._jobs.put(_Job((("INSERT OR REPLACE INTO said VALUES (?, ?, ?)", values),)))
        else:
            self._missing = True

    async def save(self, survivor: Survivor) -> None:
        """Replace what is kept of a session; returns when that is on disk, or has failed."""
        s = survivor
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        row = (s.session_id, s.stream, s.token, s.source, int(s.called))
        row = (*row, s.taken, s.received, s.saved, s.data, s.form)
        statements = (
            ("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row),
            ("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (s.session_id, s.free)),
            (_TRIM, {"id": s.session_id, "kept": KEPT}),
        )
        self._jobs.put(_Job(statements, lambda: loop.call_soon_threadsafe(_settle, done)))
        await done

    def forget(self, session_id: str) -> None:
        """A session is closed: nothing goes on."""
        tables = ("sessions", "numbers", "said")
        self._jobs.put(
            _Job(tuple((f"DELETE FROM {table} WHERE id = ?", (session_id,)) for table in tables))
        )

    def _prepare(self) -> tuple[sqlite3.Connection, list[Survivor]]:
        try:
            database = open_database(
                self._path,
                "a file of open sessions",
                version=VERSION,
                schema=_SCHEMA,
                upgrades=_UPGRADES,
            )
        except Unusable as error:
            raise SurvivalError(f"session.state: {error}") from error
        try:
            found = [_survivor(database, *row) for row in database.execute(_SESSIONS)]
            # No number twice, if the machine ends too.
            database.execute("PRAGMA synchronous = FULL")
            with database:
                # Events of sessions that were never saved; and before a number is given out:
                database.execute("DELETE FROM said WHERE id NOT IN (SELECT id FROM sessions)")
                database.execute("UPDATE numbers SET free = free + ?", (AHEAD,))
            database.execute("PRAGMA synchronous = NORMAL")
        except (sqlite3.DatabaseError, ValueError) as error:
            database.close()
            raise SurvivalError(
                f"session.state: {self._path}: expected a file of open sessions "
                f"that can be written ({error})"
            ) from error
        return database, found

    def _write(self, database: sqlite3.Connection) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                jobs = [job]
                ended = gather(self._jobs, jobs)
                self._commit(database, jobs)
                if ended:
                    return
        finally:
            database.close()

    def _commit(self, database: sqlite3.Connection, jobs: "list[_Job]") -> None:
        missing, self._missing = self._missing, False
        try:
            with database:
                if missing:
                    database.execute("DELETE FROM said")
                for statement, values in (each for job in jobs for each in job.statements):
                    database.execute(statement, values)
        except sqlite3.Error as error:
            # A full disk must not end a conversation: it only cannot be resumed from here.
            if not self._failed:
                reason = str(error)
                log.error("open sessions not saved", path=str(self._path), error=reason)  # noqa: TRY400
            self._failed = self._missing = True
        else:
            self._failed = False
        for job in jobs:
            if job.done is not None:
                with contextlib.suppress(RuntimeError):  # the loop is gone
                    job.done()


_SESSIONS: Final = """
SELECT id, stream, token, source, called, taken, received, saved, free, data, form
FROM sessions JOIN numbers USING (id) ORDER BY saved
"""


def _survivor(
    database: sqlite3.Connection,
    session_id: str,
    stream: str,
    token: str,
    source: str,
    called: int,
    taken: int,
    received: int,
    saved: float,
    free: int,
    data: bytes,
    form: str,
) -> Survivor:
    """A row of `_SESSIONS`, with the events beside it."""
    rows = database.execute("SELECT event FROM said WHERE id = ? ORDER BY seq", (session_id,))
    said = tuple(parse(event) for (event,) in rows)
    return Survivor(
        session_id,
        stream,
        token,
        source,
        bool(called),
        taken,
        received,
        saved,
        free,
        data,
        said,
        form,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    statements: tuple[tuple[str, Any], ...]
    done: Callable[[], object] | None = None


def _settle(done: "asyncio.Future[None]") -> None:
    if not done.done():
        done.set_result(None)
