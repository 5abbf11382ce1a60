"""SegLST: who said what when, as a JSON array of segments, as meeting transcription is scored.

A segment is a stretch of one speaker's final words: ``session_id``, ``start_time``, ``end_time``,
``speaker``, ``words``. The file is replaced in one step, at most every ``every_s`` and when a
session closes, so a reader always finds a whole one. Source: the format's description by the CHiME
challenges, as meeteval reads it.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from sinks.events import (
    Event,
    SessionClosed,
    SpeakerIdentified,
    SpeakerRevised,
    TranscriptFinal,
    TurnEnded,
    Word,
)
from sinks.files import fill
from sinks.roster import Roster
from sinks.sink import SinkError, SinkSettings

PAUSE_S: Final = 1.0
"""A longer silence between two words of a speaker begins another segment."""


class SeglstSettings(SinkSettings, frozen=True):
    """A file with every segment so far."""

    durable: ClassVar[bool] = False

    kind: Literal["seglst"] = "seglst"
    path: Path = Field(description="The file; its folder must exist. An older one is replaced.")
    session: str = Field(
        default="{stream}",
        min_length=1,
        description="The segments' session_id. {stream} and {session} are filled in.",
    )
    every_s: float = Field(default=2.0, ge=0, description="How often it is written at most.")

    def wants(self, event: Event) -> bool:
        """Final words, and what says whose they are."""
        return isinstance(
            event,
            TranscriptFinal | TurnEnded | SpeakerIdentified | SpeakerRevised | SessionClosed,
        )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["SeglstSink"]:
        """Write an empty list; at the end, all that is known.

        Raises:
            SinkError: the file cannot be written.
        """
        sink = SeglstSink(self)
        await sink.write()
        try:
            yield sink
        finally:
            await sink.write()


@dataclass(slots=True)
class _Said:
    """A final word, the label it has now, and its turn."""

    word: Word
    label: str | None
    turn_id: str | None


@dataclass(slots=True)
class _Session:
    name: str
    roster: Roster = field(default_factory=Roster)
    said: list[_Said] = field(default_factory=list[_Said])
    seq: int = -1
    done: list[dict[str, Any]] | None = None
    """The segments once the session is closed: nothing changes them any more."""

    def segments(self) -> list[dict[str, Any]]:
        """Words in a row by one speaker, without a long silence between them."""
        if self.done is not None:
            return self.done
        made: list[dict[str, Any]] = []
        for label, run in groupby(self.said, key=lambda each: each.label):
            who = self.roster.name(label) if label else "unknown"
            words: list[Word] = []
            for each in run:
                if words and each.word.start - words[-1].end > PAUSE_S:
                    made.append(self._segment(who, words))
                    words = []
                words.append(each.word)
            made.append(self._segment(who, words))
        return made

    def _segment(self, who: str, words: list[Word]) -> dict[str, Any]:
        return {
            "session_id": self.name,
            "start_time": round(words[0].start, 3),
            "end_time": round(words[-1].end, 3),
            "speaker": who,
            "words": " ".join(word.word for word in words),
        }


class SeglstSink:
    """An open file."""

    def __init__(self, settings: SeglstSettings, now: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._now = settings, now
        self._sessions: dict[str, _Session] = {}
        self._written = now()

    async def send(self, event: Event) -> None:
        """Take in one event; write if it is time to.

        Raises:
            SinkError: the file is as it was before.
        """
        session = self._sessions.get(event.session_id)
        if session is None:
            name = fill(self._settings.session, stream=event.stream_id, session=event.session_id)
            session = self._sessions[event.session_id] = _Session(name)
        self._take(session, event)
        closed = isinstance(event, SessionClosed)
        if closed or self._now() - self._written >= self._settings.every_s:
            await self.write()
        if closed and session.done is None:
            session.done = session.segments()
            session.said.clear()

    async def write(self) -> None:
        """Replace the file.

        Raises:
            SinkError: it is as it was before.
        """
        segments = [each for session in self._sessions.values() for each in session.segments()]
        text = json.dumps(segments, indent=1, ensure_ascii=False) + "\n"
        await asyncio.to_thread(_replace, self._settings.path, text)
        self._written = self._now()

    @staticmethod
    def _take(session: _Session, event: Event) -> None:
        if isinstance(event, SpeakerRevised):
            for said in session.said:
                if (
                    said.label is not None
                    and said.label == event.from_label
                    and (
                        said.turn_id in event.revision_of
                        or session.roster.revises(event, said.label, said.word.start, said.word.end)
                    )
                ):
                    said.label = event.to_label
        session.roster.update(event)
        if isinstance(event, TranscriptFinal) and event.seq > session.seq:
            session.seq = event.seq
            session.said += [_Said(word, word.speaker, event.turn_id) for word in event.words]


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SinkError(f"{path} cannot be written: {error.strerror or error}") from None
