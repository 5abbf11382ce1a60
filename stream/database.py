"""Opening the SQLite files of ours: private, of a known version, and nobody else's."""

import fcntl
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO

from stream.writing import make_private


class Unusable(Exception):
    """A file cannot be used as a database of ours; what was found and what was expected."""


def open_database(
    path: Path | None,
    what: str,
    *,
    version: int,
    schema: str,
    upgrades: Mapping[int, str] = MappingProxyType({}),
    wal: bool = True,
    shared: bool = False,
) -> sqlite3.Connection:
    """Open a file of ours, making it if there is none; blocks.

    The connection may be used by any one thread at a time.

    Args:
        path: The file; None keeps everything in memory.
        what: What it is, in errors: "an outbox".
        version: Of its tables, kept as ``user_version``.
        schema: The statements that make them.
        upgrades: An older version → the statements that make the next one of it.
        wal: Keep a write-ahead log: what is committed outlives the process; the machine's end may
            cost the last moments.
        shared: Several processes may use it at a time; else a second one is refused until this one
            closes it or dies.

    Raises:
        Unusable: it cannot be opened, is something else, of another version, or used by another
            process.
    """
    try:
        if path is not None:
            make_private(path)
        lock = None if path is None or shared else _lock(path)
        database = sqlite3.connect(
            ":memory:" if path is None else path, check_same_thread=False, factory=_Connection
        )
        database.lock = lock
    except BlockingIOError as error:
        raise Unusable(f"{path}: is used by another process") from error
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unusable(f"{path}: cannot be opened ({reason})") from error
    try:
        _prepare(database, version, schema, upgrades, wal)
    except sqlite3.OperationalError as error:
        database.close()
        raise Unusable(f"{path}: cannot be opened ({error})") from error
    except (sqlite3.DatabaseError, _Other) as error:
        database.close()
        raise Unusable(f"{path}: expected {what} of version {version}, got {error}") from error
    return database


class _Connection(sqlite3.Connection):
    """A connection that holds the lock of its file, if that has one, until it is closed."""

    lock: IO[bytes] | None = None

    def close(self) -> None:
        super().close()
        if self.lock is not None:
            self.lock.close()


def _lock(path: Path) -> IO[bytes]:
    """Lock a file beside this one, for as long as what is returned is open.

    Not the file itself: where SQLite's own locks are of the same kind, they would meet this one,
    and closing it would release them.

    Raises:
        BlockingIOError: somebody else has it.
        OSError: the file beside cannot be made.
    """
    beside = path.with_name(f"{path.name}-lock")
    make_private(beside)
    file = beside.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass  # some network file systems have no locks; this one guards against a mistake only
    return file


class _Other(Exception):
    """A database, but not this one; what it is."""


def _prepare(
    database: sqlite3.Connection, version: int, schema: str, upgrades: Mapping[int, str], wal: bool
) -> None:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    while found in upgrades:
        statements = f"{upgrades[found]} PRAGMA user_version = {found + 1};"
        database.executescript(f"BEGIN; {statements} COMMIT;")
        found += 1
    if found not in {0, version}:
        raise _Other(f"version {found}" + (": of a newer livesat" if found > version else ""))
    if found == 0 and tables:
        raise _Other("one with other tables")
    if wal:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
    if found == 0:
        database.executescript(f"BEGIN; {schema} PRAGMA user_version = {version}; COMMIT;")
