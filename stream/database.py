"""Opening the SQLite files of ours: private, of a known version, and nobody else's."""

import sqlite3
from pathlib import Path

from stream.writing import make_private


class Unusable(Exception):
    """A file cannot be used as a database of ours; what was found and what was expected."""


def open_database(
    path: Path | None, what: str, *, version: int, schema: str, wal: bool = True
) -> sqlite3.Connection:
    """Open a file of ours, making it if there is none; blocks.

    The connection may be used by any one thread at a time.

    Args:
        path: The file; None keeps everything in memory.
        what: What it is, in errors: "an outbox".
        version: Of its tables, kept as ``user_version``.
        schema: The statements that make them.
        wal: Keep a write-ahead log: what is committed outlives the process; the machine's end may
            cost the last moments.

    Raises:
        Unusable: it cannot be opened, is something else, or of another version.
    """
    try:
        if path is not None:
            make_private(path)
        database = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unusable(f"{path}: cannot be opened ({reason})") from error
    try:
        _prepare(database, version, schema, wal)
    except sqlite3.OperationalError as error:
        database.close()
        raise Unusable(f"{path}: cannot be opened ({error})") from error
    except (sqlite3.DatabaseError, _Other) as error:
        database.close()
        raise Unusable(f"{path}: expected {what} of version {version}, got {error}") from error
    return database


class _Other(Exception):
    """A database, but not this one; what it is."""


def _prepare(database: sqlite3.Connection, version: int, schema: str, wal: bool) -> None:
    (found,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if found not in {0, version}:
        raise _Other(f"version {found}" + (": of a newer livesat" if found > version else ""))
    if found == 0 and tables:
        raise _Other("one with other tables")
    if wal:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
    if found == 0:
        database.executescript(f"BEGIN; {schema} PRAGMA user_version = {version}; COMMIT;")
