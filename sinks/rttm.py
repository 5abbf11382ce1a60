"""RTTM: who spoke when, as the tools that score diarization read it.

The file holds ended turns only, each under the name it has after every revision and
identification so far, and can be read at any moment: a new turn is appended as one line, and a
revision replaces the file in one step. The lines of a session that goes on, after the daemon has
been started again, are taken up from the file.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from sinks.events import (
    Event,
    SessionClosed,
    SessionOpened,
    SpeakerIdentified,
    SpeakerRevised,
    TurnEnded,
)
from sinks.files import FileIds, LineFile
from sinks.roster import Roster, Turn
from sinks.sink import SinkSettings


class RttmSettings(SinkSettings, frozen=True):
    """A file with one SPEAKER line a turn."""

    durable: ClassVar[bool] = False

    kind: Literal["rttm"] = "rttm"
    path: Path = Field(description="The file; its folder must exist.")
    existing: Literal["append", "replace"] = Field(
        default="append",
        description="What becomes of a file that is already there. replace: it stays if the first "
        "session goes on from before a restart.",
    )
    file_id: str = Field(
        default="{stream}",
        min_length=1,
        description="Second column. {stream} and {session} are filled in; a session whose name is "
        "taken by an earlier one has its session id added.",
    )

    def wants(self, event: Event) -> bool:
        """Ended turns, and what gives them other names."""
        return isinstance(
            event,
            SessionOpened | TurnEnded | SpeakerIdentified | SpeakerRevised | SessionClosed,
        )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["RttmSink"]:
        """Open the file; a last line cut short by an earlier crash is dropped.

        Raises:
            SinkError: the file cannot be written, or someone else writes it.
        """
        file = LineFile(self.path)
        await asyncio.to_thread(file.open)
        try:
            await asyncio.to_thread(file.mend, _is_row)
            yield await asyncio.to_thread(RttmSink, file, self)
        finally:
            await asyncio.to_thread(file.close)


def speaker_line(file_id: str, turn: Turn, name: str) -> bytes:
    """One turn → its RTTM line: ten columns, seconds with three decimals.

    Columns are told apart by white space, so a name's own becomes ``_``.
    """
    start = round(turn.start, 3)
    duration = round(turn.end, 3) - start
    columns = (
        "SPEAKER",
        _column(file_id),
        "1",
        f"{start:.3f}",
        f"{duration:.3f}",
        "<NA>",
        "<NA>",
        _column(name),
        "<NA>",
        "<NA>",
    )
    return " ".join(columns).encode() + b"\n"


def _is_row(line: bytes) -> bool:
    return len(line.split()) == 10 and line.endswith(b"<NA> <NA>")


def _column(text: str) -> str:
    return re.sub(r"\s", "_", text) or "_"


@dataclass(slots=True)
class _Session:
    file_id: str
    roster: Roster = field(default_factory=Roster)
    rows: dict[str, tuple[int, bytes]] = field(default_factory=dict[str, tuple[int, bytes]])
    """turn_id → the number of its line in the file, and the line."""
    earlier: dict[bytes, list[str]] = field(default_factory=dict[bytes, list[str]])
    """Of lines from before the sink was opened: start and duration → what `rows` calls them."""
    stale: bool = False
    """A row may no longer say what the roster says."""

    def take_up(self, number: int, line: bytes) -> None:
        """A line of the file, whose turn_id nobody knows any more."""
        columns = line.decode(errors="replace").split()
        if len(columns) != 10 or columns[0] != "SPEAKER" or columns[1] != self.file_id:
            return
        try:
            start, duration = float(columns[3]), float(columns[4])
        except ValueError:
            return
        turn_id = f"line {number}"
        self.roster.turns[turn_id] = Turn(start, start + duration, columns[7])
        self.rows[turn_id] = number, line
        self.earlier.setdefault(_bounds(line), []).append(turn_id)

    def recognise(self, turn_id: str, line: bytes) -> bool:
        """Whether the turn has a line from before: a kill has its last events sent again."""
        alike = self.earlier.get(_bounds(line))
        if not alike:
            return False
        same = max(alike, key=lambda each: self.rows[each][1] == line)
        alike.remove(same)
        del self.roster.turns[same]
        self.rows[turn_id] = self.rows.pop(same)
        return True


def _bounds(line: bytes) -> bytes:
    return b" ".join(line.split()[3:5])


class RttmSink:
    """An open RTTM file."""

    def __init__(self, file: LineFile, settings: RttmSettings) -> None:
        lines = file.lines()
        self._file = file
        self._template = _column(settings.file_id)
        self._replace = settings.existing == "replace"
        self._count = len(lines)
        rows = (line.decode(errors="replace").split() for line in lines)
        self._ids = FileIds(self._template, (row[1] for row in rows if len(row) > 1))
        self._sessions: dict[str, _Session] = {}

    async def send(self, event: Event) -> None:
        """Write the turn, or the new names of past turns.

        Raises:
            SinkError: the file is as it was before.
        """
        await asyncio.to_thread(self._take_in, event)

    def _take_in(self, event: Event) -> None:
        session = self._sessions.get(event.session_id)
        if session is None:
            if isinstance(event, SessionClosed):
                return
            session = self._sessions[event.session_id] = self._begin(event)
        session.stale |= session.roster.update(event)
        if isinstance(event, TurnEnded) and event.end > event.start:
            turn = session.roster.turns[event.turn_id]
            line = speaker_line(session.file_id, turn, session.roster.name(turn.label))
            if event.turn_id not in session.rows and not session.recognise(event.turn_id, line):
                self._file.append(line)
                session.rows[event.turn_id] = self._count, line
                self._count += 1
            elif session.rows[event.turn_id][1] != line:
                session.stale = True
        self._correct(session)
        if isinstance(event, SessionClosed):
            del self._sessions[event.session_id]

    def _begin(self, event: Event) -> _Session:
        if self._replace and event.seq == 0:
            self._file.rewrite([])
            self._count, self._ids = 0, FileIds(self._template, ())
        self._replace = False
        session = _Session(self._ids.give(event))
        if event.seq > 0:
            for number, line in enumerate(self._file.lines()):
                session.take_up(number, line)
        return session

    def _correct(self, session: _Session) -> None:
        if not session.stale:
            return
        changed: dict[str, tuple[int, bytes]] = {}
        for turn_id, (number, written) in session.rows.items():
            turn = session.roster.turns[turn_id]
            line = speaker_line(session.file_id, turn, session.roster.name(turn.label))
            if line != written:
                changed[turn_id] = number, line
        if changed:
            lines = self._file.lines()
            for number, line in changed.values():
                lines[number] = line
            self._file.rewrite(lines)
            session.rows |= changed
        session.stale = False
