"""SegLST: who said what when, as a JSON array of segments, as meeting transcription is scored.

A segment is a stretch of one speaker's final words: ``session_id``, ``start_time``, ``end_time``,
``speaker``, ``words``. The file is replaced in one step, at most every ``every_s`` and when a
session closes, so a reader always finds a whole one. Closed sessions come first, one segment a
line, and are copied from file to file. A session that goes on, after the daemon has been started
again, finds its segments there. Source: the format's description by the CHiME challenges, as
meeteval reads it.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from sinks.events import (
    Event,
    SessionClosed,
    SessionOpened,
    SpeakerIdentified,
    SpeakerRevised,
    TranscriptFinal,
    TurnEnded,
    Word,
)
from sinks.files import FileIds
from sinks.roster import Roster, Said, said_before
from sinks.sink import SinkError, SinkSettings

PAUSE_S: Final = 1.0
"""A longer silence between two words of a speaker begins another segment."""

BLOCK: Final = 1 << 20
"""Bytes copied at once."""

BEGIN: Final = b"["
"""What the file begins with, and all that it holds of closed sessions while there are none."""

UNKNOWN: Final = "unknown"
"""The speaker of words that are nobody's."""


class SeglstSettings(SinkSettings, frozen=True):
    """A file with every segment so far."""

    durable: ClassVar[bool] = False

    kind: Literal["seglst"] = "seglst"
    path: Path = Field(
        description="The file; its folder must exist. An older one is replaced, unless the first "
        "session goes on from before a restart."
    )
    session: str = Field(
        default="{stream}",
        min_length=1,
        description="The segments' session_id. {stream} and {session} are filled in; a session "
        "whose name is taken by an earlier one has its session id added.",
    )
    every_s: float = Field(default=2.0, ge=0, description="How often it is written at most.")

    def wants(self, event: Event) -> bool:
        """Final words, and what says whose they are."""
        return isinstance(
            event,
            SessionOpened
            | TranscriptFinal
            | TurnEnded
            | SpeakerIdentified
            | SpeakerRevised
            | SessionClosed,
        )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["SeglstSink"]:
        """See that the file can be written, an empty list if there is none; at the end, write all.

        Raises:
            SinkError: the file cannot be written.
        """
        await asyncio.to_thread(_check, self.path)
        sink = SeglstSink(self)
        try:
            yield sink
        finally:
            await sink.write()


class _Segment(BaseModel, frozen=True):
    """One segment as the file has it."""

    session_id: str
    start_time: float
    end_time: float
    speaker: str
    words: str


_SEGMENTS: Final = TypeAdapter(list[_Segment])


@dataclass(slots=True)
class _Heard:
    """A final word, or a segment of before, the label it has now, and its turn."""

    word: Word
    label: str | None
    turn_id: str | None


@dataclass(slots=True)
class _Session:
    name: str
    roster: Roster = field(default_factory=Roster)
    heard: list[_Heard] = field(default_factory=list[_Heard])
    earlier: list[Said] = field(default_factory=list[Said])
    seq: int = -1
    text: bytes | None = None
    """Its part of the file, unless something has come since."""

    def take_up(self, segment: _Segment) -> None:
        """A segment that the file has of it."""
        start, end = segment.start_time, segment.end_time
        label = None if segment.speaker == UNKNOWN else segment.speaker
        word = Word(word=segment.words, start=start, end=end, confidence=1.0)
        self.heard.append(_Heard(word, label, None))
        self.earlier.append(Said(start, end, segment.words))

    def take_in(self, event: Event) -> None:
        """Let it know of one event; the same one twice changes nothing more."""
        if isinstance(event, SpeakerRevised):
            revision = self.roster.revision(event)
            for heard in self.heard:
                word = heard.word
                if revision.concerns(heard.label, heard.turn_id, word.start, word.end):
                    heard.label = event.to_label
                    self.text = None
        if self.roster.update(event):
            self.text = None
        if isinstance(event, TranscriptFinal) and event.seq > self.seq:
            self.seq = event.seq
            if not said_before(event.words, self.earlier):
                self.heard += [_Heard(word, word.speaker, event.turn_id) for word in event.words]
                self.text = None

    def written(self) -> bytes:
        """Its segments, each a line behind a comma."""
        if self.text is None:
            self.text = b"".join(_line(segment) for segment in self._segments())
        return self.text

    def _segments(self) -> Iterator[_Segment]:
        """Words in a row by one speaker, without a long silence between them."""
        for label, run in groupby(self.heard, key=lambda each: each.label):
            who = self.roster.name(label) if label else UNKNOWN
            words: list[Word] = []
            for each in run:
                if words and each.word.start - words[-1].end > PAUSE_S:
                    yield self._segment(who, words)
                    words = []
                words.append(each.word)
            yield self._segment(who, words)

    def _segment(self, who: str, words: list[Word]) -> _Segment:
        return _Segment(
            session_id=self.name,
            start_time=round(words[0].start, 3),
            end_time=round(words[-1].end, 3),
            speaker=who,
            words=" ".join(word.word for word in words),
        )


def _line(segment: _Segment) -> bytes:
    return b",\n " + segment.model_dump_json().encode()


class SeglstSink:
    """An open file.

    What is built and written is so in threads. Events come one at a time; only a write whose caller
    was cancelled may meet the last one, and that waits for it.
    """

    def __init__(self, settings: SeglstSettings, now: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._now = settings, now
        self._lock = threading.Lock()
        self._ids: FileIds | None = None
        """None until the first event says whether what the file holds is to stay."""
        self._sessions: dict[str, _Session] = {}
        # By their names, until they go on. Bound: what the file holds when it is taken up.
        self._earlier: dict[str, _Session] = {}
        self._closed = len(BEGIN)  # so many bytes of the file are of closed sessions
        self._written = now()

    async def send(self, event: Event) -> None:
        """Take in one event; write if it is time to.

        Raises:
            SinkError: the file is as it was before.
        """
        await asyncio.to_thread(self._take_in, event)

    async def write(self) -> None:
        """Replace the file.

        Raises:
            SinkError: it is as it was before.
        """
        await asyncio.to_thread(self._write_all)

    def _write_all(self) -> None:
        with self._lock:
            if self._ids is not None:
                self._write()

    def _take_in(self, event: Event) -> None:
        with self._lock:
            self._take(event)

    def _take(self, event: Event) -> None:
        first = self._ids is None
        session = self._sessions.get(event.session_id)
        closed = isinstance(event, SessionClosed)
        if session is None:
            if closed:
                return
            session = self._sessions[event.session_id] = self._begin(event)
        session.take_in(event)
        if first or closed or self._now() - self._written >= self._settings.every_s:
            self._write(session if closed else None)
        if closed:
            del self._sessions[event.session_id]

    def _begin(self, event: Event) -> _Session:
        if self._ids is None:
            if event.seq > 0:
                self._take_up()
            self._ids = FileIds(self._settings.session, self._earlier)
        name = self._ids.give(event)
        earlier = self._earlier.pop(name, None) if event.seq > 0 else None
        return earlier or _Session(name)

    def _take_up(self) -> None:
        try:
            found = _SEGMENTS.validate_json(self._settings.path.read_bytes())
        except FileNotFoundError:
            return
        except ValidationError:
            return  # no file of ours: replaced, as any older one
        except OSError as error:
            raise SinkError(f"{self._settings.path} cannot be read: {error.strerror}") from None
        for segment in found:
            name = segment.session_id
            self._earlier.setdefault(name, _Session(name)).take_up(segment)

    def _write(self, closing: _Session | None = None) -> None:
        ended = b"" if closing is None else closing.written()
        others = (*self._earlier.values(), *self._sessions.values())
        going_on = [session.written() for session in others if session is not closing]
        self._closed = _replace(self._settings.path, self._closed, ended, going_on)
        self._written = self._now()


def _check(path: Path) -> None:
    if path.is_file():
        if not os.access(path.parent, os.W_OK):
            raise SinkError(f"{path} cannot be written: Permission denied")
    else:
        _replace(path, len(BEGIN), b"", [])


def _replace(path: Path, closed: int, ended: bytes, going_on: list[bytes]) -> int:
    """Write a new file in place of the old.

    Args:
        path: the file.
        closed: so many bytes of it stay; of a file that is gone, or shorter, none do.
        ended: segments that follow those for good.
        going_on: segments of sessions that go on.

    Returns:
        How many bytes of the new file are to stay.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as new:
            new.write(BEGIN)
            _copy(path, closed, new)
            _append(new, ended)
            closed = new.tell()
            for part in going_on:
                _append(new, part)
            new.write(b"]\n" if new.tell() == len(BEGIN) else b"\n]\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SinkError(f"{path} cannot be written: {error.strerror or error}") from None
    return closed


def _copy(path: Path, size: int, new: BinaryIO) -> None:
    try:
        old = path.open("rb")
    except FileNotFoundError:
        return
    with old:
        if os.fstat(old.fileno()).st_size < size:
            return
        old.seek(len(BEGIN))
        left = size - len(BEGIN)
        while left and (block := old.read(min(BLOCK, left))):
            new.write(block)
            left -= len(block)


def _append(new: BinaryIO, segments: bytes) -> None:
    """Behind what is there; the first of all has no comma before it."""
    new.write(segments[1:] if new.tell() == len(BEGIN) else segments)
