"""Files a reader may open at any moment: whole lines only, whatever happens to the writer."""

import fcntl
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from sinks.events import Event
from sinks.sink import SinkError

NEWLINE: Final = b"\n"
BLOCK: Final = 1 << 16


class LineFile:
    """A regular file that only ever holds whole lines; blocking, so call it in a thread.

    One sink owns the file: an advisory lock keeps a second writer out. A record is appended
    with one write; if the disk takes only a part of it, that part is cut off again. What cannot be
    said by appending is said by `rewrite`, through a second file that takes the first one's name.

    Calls are serialised, and `close` waits for the one under way, because a cancelled coroutine
    leaves its thread running.
    """

    def __init__(self, path: Path, *, replace: bool = False, fsync: bool = False) -> None:
        """Remember the arguments; `open` opens.

        Args:
            path: the file; its folder must exist.
            replace: empty an existing file instead of appending to it.
            fsync: wait for the disk after every write, against power loss. A killed process
                loses nothing without it.
        """
        self.path = path
        self._replace = replace
        self._fsync = fsync
        self._fd = -1
        self._size = 0
        self._lock = threading.Lock()
        self._closed = True
        self._whole: Callable[[bytes], bool] = _never

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def open(self, *, exclusive: bool = False) -> None:
        """Open or create the file, take its lock, and drop or close a torn last line.

        Args:
            exclusive: the file must not exist.

        Raises:
            FileExistsError: `exclusive`, and it does.
            SinkError: no such folder, no right to write, not a regular file, or another writer.
        """
        # A rename must replace the file a link points to, not the link.
        self.path = Path(os.path.realpath(self.path))
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            if self.path.exists() and not self.path.is_file():
                raise SinkError(f"{self.path} is not a regular file: expected a file to write to")
            fd = os.open(self.path, flags | (os.O_EXCL if exclusive else 0), 0o666)
        except FileExistsError:
            raise
        except OSError as error:
            raise SinkError(_cannot_open(self.path, error)) from None
        try:
            _own(fd, self.path)
            if self._replace:
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._size = os.fstat(fd).st_size
        self._closed = False
        # Opened again after a failed rotation, the file holds what must stay.
        self._replace = False

    def mend(self, whole: Callable[[bytes], bool]) -> bytes:
        """Deal with a last line that has no newline, as an earlier crash may have left it.

        Args:
            whole: whether the line lacks nothing but the newline, which it then gets; otherwise
                the line is cut off.

        Returns:
            What was cut off.

        Raises:
            SinkError: the newline could not be written.
        """
        with self._lock:
            self._whole = whole
            return self._mend()

    def _mend(self) -> bytes:
        start, tail = self._size, b""
        while start > 0 and NEWLINE not in tail:
            start = max(0, start - BLOCK)
            tail = os.pread(self._fd, self._size - start, start)
        torn = tail[tail.rfind(NEWLINE) + 1 :]
        if not torn:
            return b""
        if self._whole(torn):
            self._append(NEWLINE)
            return b""
        self._size -= len(torn)
        os.ftruncate(self._fd, self._size)
        return torn

    def append(self, record: bytes) -> None:
        """Append a record of whole lines: all of it, or nothing.

        Raises:
            SinkError: the file is as it was before.
        """
        assert record.endswith(NEWLINE), record
        with self._lock:
            self._append(record)

    def _append(self, record: bytes) -> None:
        self._ready()
        try:
            _write(self._fd, record)
            if self._fsync:
                os.fsync(self._fd)
        except OSError as error:
            try:
                os.ftruncate(self._fd, self._size)
            except OSError:
                # The next write opens the file again, and mends it.
                self._drop()
            raise SinkError(f"cannot write to {self.path}: {error.strerror}") from None
        self._size += len(record)

    def _ready(self) -> None:
        """Open the file again if an earlier failure closed it."""
        if self._closed:
            raise SinkError(f"{self.path} is closed")
        if self._fd < 0:
            self.open()
            self._mend()

    def _drop(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def lines(self) -> list[bytes]:
        """Every line of the file, with its newline."""
        with self._lock:
            self._ready()
            return os.pread(self._fd, self._size, 0).splitlines(keepends=True)

    def rewrite(self, records: Iterable[bytes]) -> None:
        """Replace the whole content in one step: a reader sees the old file or the new one.

        Raises:
            SinkError: the file is as it was before.
        """
        with self._lock:
            self._ready()
            new = self.path.with_name(f".{self.path.name}.new")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            content = b"".join(records)
            try:
                fd = os.open(new, flags, stat.S_IMODE(os.fstat(self._fd).st_mode))
                try:
                    _write(fd, content)
                    # Without it a power loss could leave the new name on an empty file.
                    os.fsync(fd)
                    _own(fd, self.path)
                    new.replace(self.path)
                except BaseException:
                    os.close(fd)
                    new.unlink(missing_ok=True)
                    raise
            except OSError as error:
                raise SinkError(f"cannot rewrite {self.path}: {error.strerror}") from None
            os.close(self._fd)
            self._fd, self._size = fd, len(content)

    def rotate(self, keep: int) -> None:
        """Move the file to ``name.1``, that to ``name.2`` … and start an empty one.

        Args:
            keep: how many old files stay; the oldest beyond them is deleted.

        Raises:
            SinkError: a file could not be moved.
        """
        with self._lock:
            self._ready()
            try:
                for number in range(keep, 0, -1):
                    old = self.path if number == 1 else _numbered(self.path, number - 1)
                    if old.exists():
                        old.replace(_numbered(self.path, number))
            except OSError as error:
                raise SinkError(f"cannot rotate {self.path}: {error.strerror}") from None
            self._drop()
            self.open()

    def close(self) -> None:
        """Close the file, after the call under way; a second close does nothing."""
        with self._lock:
            self._closed = True
            if self._fd >= 0:
                self._drop()


def _never(torn: bytes) -> bool:
    return False


def _write(fd: int, data: bytes) -> None:
    """One write as a rule; after a short one the next says what is the matter."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _own(fd: int, path: Path) -> None:
    """Take the advisory lock of an open file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SinkError(
            f"{path} is being written by another sink or process: expected a file of its own"
        ) from None
    except OSError:
        # Some network file systems have no locks; a lock guards against a mistake only.
        return


def _cannot_open(path: Path, error: OSError) -> str:
    if not path.parent.is_dir():
        return f"cannot write {path}: the folder {path.parent} does not exist"
    return f"cannot write {path}: {error.strerror}"


class FileIds:
    """What the sessions in one file are called there: no two alike.

    A session of which the sink is not told from number 0 on is one that it wrote before it was
    opened: it keeps the name that it has in the file.

    Args:
        template: ``{stream}`` and ``{session}`` are filled in; a session whose name is taken has
            its session id added.
        found: The names that are in the file already.
    """

    def __init__(self, template: str, found: Iterable[str]) -> None:
        self._template = template
        self._found = set(found)
        # Bound: streams. A name with a session id in it is nobody else's.
        self._given: set[str] = set()

    def give(self, event: Event) -> str:
        """The name of the event's session; ask once."""
        name = fill(self._template, stream=event.stream_id, session=event.session_id)
        if "{session}" in self._template:
            return name
        own = f"{name}-{_safe(event.session_id)}"
        first = event.seq == 0
        if name in self._given or (name if first else own) in self._found:
            return own
        self._given.add(name)
        return name


def fill(template: str, *, stream: str, session: str) -> str:
    """A file name from its template, ``{stream}`` and ``{session}`` filled in.

    What a stream is called must not choose a folder: anything but letters, digits, ``.``, ``-``
    and ``_`` becomes ``_``, and a name does not begin with a dot.
    """
    return template.replace("{stream}", _safe(stream)).replace("{session}", _safe(session))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.\-]", "_", name).lstrip(".") or "_"
