"""Captions: what was said and by whom, as WebVTT or SubRip that plays beside the audio.

A cue holds at most two lines of 42 characters and seven seconds, one speaker's words. Without any
words (no CTC head) a turn makes one cue that names its speaker. A session has a file of its own;
cues in the order of time are appended, everything else (a revision, an identification, words that
come out of order) replaces the file in one step, so it can be played at any moment. A session that
goes on, after the daemon has been started again, goes on in its file; the cues that are there stay
as they are.
"""

import asyncio
import html
import os
import re
import textwrap
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import ClassVar, Final, Literal

from pydantic import Field, field_validator

from sinks.events import (
    Event,
    SessionClosed,
    SessionOpened,
    SpeakerIdentified,
    SpeakerRevised,
    TranscriptFinal,
    TurnEnded,
    TurnStarted,
    TurnUpdated,
    Word,
)
from sinks.files import LineFile, fill
from sinks.roster import APART_S, Roster, Said, said_before
from sinks.sink import SinkError, SinkSettings

LINE: Final = 42
"""Characters a line: the usual bound of broadcast captions."""

LINES: Final = 2
"""Lines a cue."""

LONGEST_S: Final = 7.0
"""Seconds a cue stays at most."""

SHORTEST_S: Final = 0.8
"""Seconds a cue stays at least: a shorter one is a flicker."""

PAUSE_S: Final = 1.5
"""Silence within one speaker's words that begins a new cue, in seconds."""


class CaptionSettings(SinkSettings, frozen=True):
    """What both formats have in common."""

    durable: ClassVar[bool] = False

    path: Path = Field(
        description="The file; {stream} and {session} in its name are filled in. Its folder must "
        "exist. A further session with the same name has its session id added."
    )
    existing: Literal["keep", "replace"] = Field(
        default="keep",
        description="keep: a file that is already there stays, and the new one has the session id "
        "added to its name.",
    )

    @field_validator("path")
    @classmethod
    def _fixed_folder(cls, path: Path) -> Path:
        if "{" in str(path.parent):
            raise ValueError(f"expected {{stream}} or {{session}} in the file name only: {path}")
        return path

    def wants(self, event: Event) -> bool:
        """Words, turns, and what gives them other names."""
        return isinstance(
            event,
            SessionOpened
            | SessionClosed
            | SpeakerIdentified
            | SpeakerRevised
            | TranscriptFinal
            | TurnStarted
            | TurnUpdated
            | TurnEnded,
        )


class VttSettings(CaptionSettings, frozen=True):
    """WebVTT, the speaker as a voice span."""

    kind: Literal["vtt"] = "vtt"

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["CaptionSink"]:
        """See that files can be written; each is created with the first event of its session.

        Raises:
            SinkError: the folder or the file is not ours to write.
        """
        async with _opened(CaptionSink(self, vtt, header=b"WEBVTT\n\n")) as sink:
            yield sink


class SrtSettings(CaptionSettings, frozen=True):
    """SubRip, the speaker as a prefix."""

    kind: Literal["srt"] = "srt"

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["CaptionSink"]:
        """See that files can be written; each is created with the first event of its session.

        Raises:
            SinkError: the folder or the file is not ours to write.
        """
        async with _opened(CaptionSink(self, srt, prefix=True)) as sink:
            yield sink


@asynccontextmanager
async def _opened(sink: "CaptionSink") -> AsyncGenerator["CaptionSink"]:
    await asyncio.to_thread(_check, sink.settings.path)
    try:
        yield sink
    finally:
        await sink.close()


def _check(path: Path) -> None:
    if not path.parent.is_dir():
        raise SinkError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise SinkError(f"{path} is not a regular file: expected a file to write to")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SinkError(f"cannot write {path}: Permission denied")


@dataclass(frozen=True, slots=True)
class Cue:
    """What is on the screen from `start` to `end`, in seconds."""

    start: float
    end: float
    who: str | None
    lines: tuple[str, ...]


def vtt(number: int, cue: Cue) -> bytes:
    """One cue → its WebVTT block, an empty line behind it."""
    del number  # WebVTT needs none
    text = "\n".join(_escape(line) for line in cue.lines)
    if cue.who is not None:
        text = f"<v {_escape(cue.who)}>{text}"
    return f"{_stamp(cue.start, '.')} --> {_stamp(cue.end, '.')}\n{text}\n\n".encode()


def srt(number: int, cue: Cue) -> bytes:
    """One cue → its SubRip block, an empty line behind it. `number` counts from one."""
    text = "\n".join(cue.lines)
    return f"{number}\n{_stamp(cue.start, ',')} --> {_stamp(cue.end, ',')}\n{text}\n\n".encode()


_CUE: Final = re.compile(
    r"(?:\d+\n)?(\d\d+):(\d\d):(\d\d[.,]\d{3}) --> (\d\d+):(\d\d):(\d\d[.,]\d{3})\n"
    r"(.+)",
    re.DOTALL,
)


def _read(content: str, *, escaped: bool) -> list[Cue]:
    """The cues of a file; what else there is, a cue cut short say, is left out."""
    found = (_CUE.fullmatch(block) for block in content.split("\n\n"))
    return [_cue(match, escaped=escaped) for match in found if match is not None]


def _cue(match: re.Match[str], *, escaped: bool) -> Cue:
    start, end = (
        int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
        for hours, minutes, seconds in (match.group(1, 2, 3), match.group(4, 5, 6))
    )
    who, text = None, match[7]
    if escaped:
        voice = re.fullmatch(r"<v ([^>\n]*)>(.+)", text, re.DOTALL)
        if voice is not None:
            who, text = html.unescape(voice[1]), voice[2]
        text = html.unescape(text)
    return Cue(start, end, who, tuple(text.split("\n")))


def _stamp(seconds: float, point: str) -> str:
    whole, ms = divmod(round(seconds * 1000), 1000)
    minutes, s = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{s:02d}{point}{ms:03d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def wrap(text: str) -> tuple[str, ...]:
    """Text → lines of at most `LINE` characters, white space as single blanks."""
    return tuple(textwrap.wrap(" ".join(text.split()), LINE, break_on_hyphens=False))


def cues(words: Sequence[Word], who: str | None, *, prefix: bool) -> list[Cue]:
    """One speaker's words in a row → cues that keep to the bounds.

    Args:
        words: in the order of time.
        who: the speaker's name, if known.
        prefix: begin each cue's text with the name, which then counts.
    """
    lead = ""
    if prefix and who is not None:
        lead = textwrap.shorten(who, LINE - 2, placeholder="…") + ": "
    made: list[Cue] = []
    taken: list[Word] = []
    lines: tuple[str, ...] = ()

    def finish() -> None:
        if taken:
            start = taken[0].start
            end = min(max(taken[-1].end, start + SHORTEST_S), start + LONGEST_S)
            made.append(Cue(start, end, who, lines))
            taken.clear()

    for word in (piece for whole in words for piece in _pieces(whole)):
        fitting = wrap(lead + " ".join(w.word for w in (*taken, word)))
        if taken and (
            len(fitting) > LINES
            or round(word.end - taken[0].start, 3) > LONGEST_S
            or word.start - taken[-1].end > PAUSE_S
        ):
            finish()
            fitting = wrap(lead + word.word)
        taken.append(word)
        lines = fitting
    finish()
    return made


def _pieces(word: Word) -> Iterator[Word]:
    """A word that fits a line, or the parts of one that does not, its time shared out."""
    text = word.word.strip()
    count = -(-len(text) // LINE)
    step = (word.end - word.start) / max(count, 1)
    for i in range(count):
        yield word.model_copy(
            update={
                "word": text[i * LINE : (i + 1) * LINE],
                "start": word.start + i * step,
                "end": word.start + (i + 1) * step,
            }
        )


def spread(event: TranscriptFinal) -> list[Word]:
    """The words of a transcript; times are shared out by length where it has a text only."""
    if event.words:
        return list(event.words)
    texts = event.text.split()
    total = sum(len(text) + 1 for text in texts)
    words: list[Word] = []
    at = event.start
    for text in texts:
        end = at + (event.end - event.start) * (len(text) + 1) / total
        words.append(Word(word=text, start=at, end=end, confidence=1.0))
        at = end
    return words


@dataclass(slots=True)
class _Run:
    """Words of one transcript by one label, in a row."""

    label: str | None
    turn_id: str | None
    words: list[Word]


@dataclass(slots=True)
class _Session:
    file: LineFile
    roster: Roster = field(default_factory=Roster)
    runs: list[_Run] = field(default_factory=list[_Run])
    ended: dict[str, None] = field(default_factory=dict[str, None])
    """turn_id of every ended turn, in their order."""
    earlier: list[Cue] = field(default_factory=list[Cue])
    """What the file held when it was opened."""
    said: list[Said] = field(default_factory=list[Said])
    """The words of these."""
    seq: int = -1
    """The last transcript taken in: one that is sent again is not said twice."""
    items: int = 0
    """Runs, or turns while there are no words, that are in the file."""
    cues: int = 0
    """Cues in the file."""
    last: float = 0.0
    """Start of the last cue in the file, in seconds."""
    stale: bool = False
    """The file may no longer say what is known."""


class CaptionSink:
    """Writes the caption files of the sessions that are open."""

    def __init__(
        self,
        settings: CaptionSettings,
        block: Callable[[int, Cue], bytes],
        *,
        header: bytes = b"",
        prefix: bool = False,
    ) -> None:
        self.settings = settings
        self._block = block
        self._header = header
        self._prefix = prefix
        self._sessions: dict[str, _Session] = {}
        self._taken: set[Path] = set()

    async def send(self, event: Event) -> None:
        """Write the cues the event completes or changes.

        Raises:
            SinkError: the file is as it was before.
        """
        await asyncio.to_thread(self._take_in, event)

    def _take_in(self, event: Event) -> None:
        session = self._sessions.get(event.session_id)
        if session is None:
            if isinstance(event, SessionClosed):
                return
            goes_on = self._find(event) if event.seq > 0 else None
            session = goes_on or _Session(self._create(event))
            self._sessions[event.session_id] = session
        _take(session, event)
        self._write(session)
        if isinstance(event, SessionClosed):
            del self._sessions[event.session_id]
            session.file.close()

    async def close(self) -> None:
        """Close the files of the sessions that are still open."""
        for session in list(self._sessions.values()):  # a write may still be under way
            await asyncio.to_thread(session.file.close)
        self._sessions.clear()

    def _find(self, event: Event) -> _Session | None:
        """The session as its file has it, if it has one: the one with its id in the name first."""
        plain, own, *_ = self._names(event)
        path = next((path for path in (own, plain) if path.is_file()), None)
        if path is None or path in self._taken:
            return None
        file = LineFile(path)
        file.open()
        try:
            file.mend(lambda _: False)
            content = b"".join(file.lines()).decode(errors="replace")
        except BaseException:
            file.close()
            raise
        self._taken.add(path)
        cues = _read(content, escaped=not self._prefix)
        return _Session(
            file,
            earlier=cues,
            said=[Said(cue.start, cue.end, " ".join(cue.lines)) for cue in cues],
            cues=len(cues),
            last=max((cue.start for cue in cues), default=0.0),
            stale=self._written(cues) != content.encode(),
        )

    def _written(self, cues: Sequence[Cue]) -> bytes:
        return self._header + b"".join(self._block(i, cue) for i, cue in enumerate(cues, 1))

    def _create(self, event: Event) -> LineFile:
        for path in self._names(event):
            if path in self._taken:
                continue
            replace = self.settings.existing == "replace"
            file = LineFile(path, replace=replace)
            try:
                file.open(exclusive=not replace)
            except FileExistsError:
                continue
            try:
                if self._header:
                    file.append(self._header)
            except SinkError:
                file.close()
                path.unlink(missing_ok=True)
                raise
            self._taken.add(path)
            return file
        raise SinkError(f"cannot write {self.settings.path}: expected a free name, all are taken")

    def _names(self, event: Event) -> Iterator[Path]:
        template = self.settings.path
        path = template.with_name(
            fill(template.name, stream=event.stream_id, session=event.session_id)
        )
        session = fill("{session}", stream="", session=event.session_id)
        yield path
        yield path.with_name(f"{path.stem}.{session}{path.suffix}")
        for number in range(2, 100):
            yield path.with_name(f"{path.stem}.{session}.{number}{path.suffix}")

    def _write(self, session: _Session) -> None:
        items = session.runs or session.ended
        if not session.stale:
            new = self._cues(session, session.items)
            starts = [session.last, *(cue.start for cue in new)]
            if starts == sorted(starts):
                blocks = [self._block(session.cues + i, cue) for i, cue in enumerate(new, 1)]
                if blocks:
                    session.file.append(b"".join(blocks))
                session.items = len(items)
                session.cues += len(new)
                session.last = starts[-1]
                return
            session.stale = True
        cues = sorted(
            [*session.earlier, *self._cues(session, 0)], key=lambda cue: (cue.start, cue.end)
        )
        session.file.rewrite([self._written(cues)])
        session.items = len(items)
        session.cues = len(cues)
        session.last = cues[-1].start if cues else 0.0
        session.stale = False

    def _cues(self, session: _Session, begin: int) -> list[Cue]:
        """The cues of the items from the one numbered `begin` on."""
        roster = session.roster
        made: list[Cue] = []
        if session.runs:
            for run in session.runs[begin:]:
                who = None if run.label is None else roster.name(run.label)
                made += cues(run.words, who, prefix=self._prefix)
            return made
        for turn in (roster.turns[turn_id] for turn_id in islice(session.ended, begin, None)):
            who = roster.name(turn.label)
            made.append(Cue(turn.start, max(turn.end, turn.start + SHORTEST_S), who, wrap(who)))
        return made


def _take(session: _Session, event: Event) -> None:
    """Let the session know of one event; the same one twice changes nothing more."""
    roster = session.roster
    if isinstance(event, SpeakerRevised):
        revision = roster.revision(event)
        for run in session.runs:
            start, end = run.words[0].start, run.words[-1].end
            if revision.concerns(run.label, run.turn_id, start, end):
                run.label = event.to_label
                session.stale = True
    session.stale |= roster.update(event)
    if isinstance(event, TurnEnded) and not _has(session.earlier, event):
        session.ended[event.turn_id] = None
    if isinstance(event, TranscriptFinal) and event.seq > session.seq:
        session.seq = event.seq
        turn = roster.turns.get(event.turn_id or "")
        words = spread(event)
        if said_before(words, session.said):
            return
        stretches = groupby(words, key=lambda word: word.speaker or (turn.label if turn else None))
        runs = [_Run(label, event.turn_id, list(run)) for label, run in stretches]
        # The first words take the place of the cues that only name a speaker.
        session.stale |= bool(runs) and not session.runs and session.cues > 0
        session.runs += runs


def _has(cues: Sequence[Cue], turn: TurnEnded) -> bool:
    """Whether one of the cues names the speaker of this turn."""
    end = max(turn.end, turn.start + SHORTEST_S)
    return any(
        abs(cue.start - turn.start) <= APART_S and abs(cue.end - end) <= APART_S for cue in cues
    )
