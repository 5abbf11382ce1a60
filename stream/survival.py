"""Open sessions on disk: what a daemon that was stopped, or killed, goes on with.

One SQLite file. A session's state is replaced every few seconds; the number of its latest event is
noted within milliseconds of giving it out, so that after a kill no number is given out twice. All
of it is written by a thread of its own, in transactions that gather what has come meanwhile.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from stream.sources.source import Resumed
from stream.writing import GATHER_S, gather, make_private

log = structlog.get_logger(__name__)

VERSION: Final = 1

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
    data BLOB NOT NULL
) STRICT;
CREATE TABLE numbers (
    id TEXT PRIMARY KEY,
    seq INTEGER NOT NULL
) STRICT;
"""

_NOTE: Final = (
    "INSERT INTO numbers VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET seq = max(seq, excluded.seq)"
)


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
        seq: The highest number any of its events is known to have.
        data: See `Session.save`.
    """

    session_id: str
    stream: str
    token: str
    source: str
    called: bool
    taken: int
    received: int
    saved: float
    seq: int
    data: bytes

    def resumed(self, *, exact: bool) -> Resumed:
        """The same, for the session that goes on with it."""
        return Resumed(
            self.session_id,
            self.stream,
            self.token,
            self.source,
            self.taken,
            None if exact else self.seq + 1,
            self.saved,
            self.data,
        )


class Survival:
    """The file of open sessions; use `open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Bound: what events and saves bring in the time of one transaction.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failed = False

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

    def note(self, session_id: str, seq: int) -> None:
        """An event with this number was given out; written within `GATHER_S`."""
        # A table of its own: changing a row writes all of it, and a session's holds megabytes.
        self._jobs.put(_Job(_NOTE, (session_id, seq)))

    async def save(self, survivor: Survivor) -> None:
        """Replace what is kept of a session; returns when it is on disk."""
        s = survivor
        self.note(s.session_id, s.seq)
        await self._do(
            "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                s.session_id,
                s.stream,
                s.token,
                s.source,
                int(s.called),
                s.taken,
                s.received,
                s.saved,
                s.data,
            ),
        )

    async def forget(self, session_id: str) -> None:
        """A session is closed: nothing goes on."""
        self._jobs.put(_Job("DELETE FROM numbers WHERE id = ?", (session_id,)))
        await self._do("DELETE FROM sessions WHERE id = ?", (session_id,))

    async def _do(self, statement: str, values: tuple[object, ...]) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._jobs.put(_Job(statement, values, loop, done))
        await done

    def _prepare(self) -> tuple[sqlite3.Connection, list[Survivor]]:
        try:
            make_private(self._path)  # it holds voices
            database = sqlite3.connect(self._path, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise SurvivalError(
                f"session.state: {self._path}: cannot be opened ({error})"
            ) from error
        try:
            database.execute("PRAGMA journal_mode = WAL")
            # Survives the process, which is the aim; the machine's end may cost the last moments.
            database.execute("PRAGMA synchronous = NORMAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            elif version != VERSION:
                raise SurvivalError(  # noqa: TRY301 - one more answer to "what is this file"
                    f"session.state: {self._path}: version {version}, expected {VERSION}"
                )
            with database:  # numbers of sessions that were never saved
                database.execute("DELETE FROM numbers WHERE id NOT IN (SELECT id FROM sessions)")
            rows = database.execute(
                "SELECT id, stream, token, source, called, taken, received, saved, seq, data "
                "FROM sessions JOIN numbers USING (id) ORDER BY saved"
            ).fetchall()
        except sqlite3.DatabaseError as error:
            database.close()
            raise SurvivalError(
                f"session.state: {self._path}: expected a file of open sessions ({error})"
            ) from error
        except SurvivalError:
            database.close()
            raise
        return database, [_survivor(*row) for row in rows]

    def _write(self, database: sqlite3.Connection) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                time.sleep(GATHER_S)  # a thread of ours: more comes meanwhile
                jobs = [job]
                ended = gather(self._jobs, jobs)
                self._commit(database, jobs)
                if ended:
                    return
        finally:
            database.close()

    def _commit(self, database: sqlite3.Connection, jobs: "list[_Job]") -> None:
        notes: dict[str, _Job] = {str(j.values[0]): j for j in jobs if j.statement is _NOTE}
        try:
            with database:
                for job in (*notes.values(), *(j for j in jobs if j.statement is not _NOTE)):
                    database.execute(job.statement, job.values)
        except sqlite3.Error as error:
            # A full disk must not end a conversation: it only cannot be resumed from here.
            if not self._failed:
                reason = str(error)
                log.error("open sessions not saved", path=str(self._path), error=reason)  # noqa: TRY400
            self._failed = True
        else:
            self._failed = False
        for job in jobs:
            if job.loop is not None and job.done is not None:
                with contextlib.suppress(RuntimeError):  # the loop is gone
                    job.loop.call_soon_threadsafe(_settle, job.done)


def _survivor(
    session_id: str,
    stream: str,
    token: str,
    source: str,
    called: int,
    taken: int,
    received: int,
    saved: float,
    seq: int,
    data: bytes,
) -> Survivor:
    """A row of the table."""
    return Survivor(
        session_id, stream, token, source, bool(called), taken, received, saved, seq, data
    )


@dataclass(frozen=True, slots=True)
class _Job:
    statement: str
    values: tuple[object, ...]
    loop: asyncio.AbstractEventLoop | None = None
    done: "asyncio.Future[None] | None" = None


def _settle(done: "asyncio.Future[None]") -> None:
    if not done.done():
        done.set_result(None)
