"""RTTM: who spoke when, as the tools that score diarization read it.

The file holds ended turns only, each under the name it has after every revision and
identification so far, and can be read at any moment: a new turn is appended as one line, and a
revision replaces the file in one step.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from sinks.events import Event, SessionClosed, SpeakerIdentified, SpeakerRevised, TurnEnded
from sinks.files import LineFile, fill
from sinks.roster import Roster, Turn
from sinks.sink import SinkSettings


class RttmSettings(SinkSettings, frozen=True):
    """A file with one SPEAKER line a turn."""

    durable: ClassVar[bool] = False

    kind: Literal["rttm"] = "rttm"
    path: Path = Field(description="The file; its folder must exist.")
    existing: Literal["append", "replace"] = Field(
        default="append", description="What becomes of a file that is already there."
    )
    file_id: str = Field(
        default="{stream}",
        min_length=1,
        description="Second column. {stream} and {session} are filled in; a session whose name is "
        "taken by an earlier one has its session id added.",
    )

    def wants(self, event: Event) -> bool:
        """Ended turns, and what gives them other names."""
        return isinstance(event, TurnEnded | SpeakerIdentified | SpeakerRevised | SessionClosed)

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["RttmSink"]:
        """Open the file; a last line cut short by an earlier crash is dropped.

        Raises:
            SinkError: the file cannot be written, or someone else writes it.
        """
        file = LineFile(self.path, replace=self.existing == "replace")
        await asyncio.to_thread(file.open)
        try:
            await asyncio.to_thread(file.mend, _is_row)
            yield RttmSink(file, self.file_id, await asyncio.to_thread(file.lines))
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
    stale: bool = False
    """A row may no longer say what the roster says."""


class RttmSink:
    """An open RTTM file. Only open sessions are remembered; what is closed stays as written."""

    def __init__(self, file: LineFile, file_id: str, lines: list[bytes]) -> None:
        self._file = file
        self._template = file_id
        self._count = len(lines)
        self._taken = {line.split()[1].decode() for line in lines if len(line.split()) > 1}
        self._sessions: dict[str, _Session] = {}

    async def send(self, event: Event) -> None:
        """Write the turn, or the new names of past turns.

        Raises:
            SinkError: the file is as it was before.
        """
        session = self._sessions.get(event.session_id)
        if isinstance(event, SessionClosed):
            if session is not None:
                await self._correct(session)
                del self._sessions[event.session_id]
            return
        if session is None:
            session = _Session(self._name(event))
            self._sessions[event.session_id] = session
        session.stale |= session.roster.update(event)
        if isinstance(event, TurnEnded) and event.end > event.start:
            turn = session.roster.turns[event.turn_id]
            line = speaker_line(session.file_id, turn, session.roster.name(turn.label))
            if event.turn_id not in session.rows:
                await asyncio.to_thread(self._file.append, line)
                session.rows[event.turn_id] = self._count, line
                self._count += 1
            elif session.rows[event.turn_id][1] != line:
                session.stale = True
        await self._correct(session)

    def _name(self, event: Event) -> str:
        name = fill(self._template, stream=event.stream_id, session=event.session_id)
        if name in self._taken:
            name = f"{name}-{fill('{session}', stream='', session=event.session_id)}"
        self._taken.add(name)
        return name

    async def _correct(self, session: _Session) -> None:
        if not session.stale:
            return
        changed: dict[str, tuple[int, bytes]] = {}
        for turn_id, (number, written) in session.rows.items():
            turn = session.roster.turns[turn_id]
            line = speaker_line(session.file_id, turn, session.roster.name(turn.label))
            if line != written:
                changed[turn_id] = number, line
        if changed:
            await asyncio.to_thread(self._replace, dict(changed.values()))
            session.rows |= changed
        session.stale = False

    def _replace(self, changed: dict[int, bytes]) -> None:
        lines = self._file.lines()
        for number, line in changed.items():
            lines[number] = line
        self._file.rewrite(lines)
