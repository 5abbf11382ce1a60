"""Events in words for people: who, and what there is to say of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from sinks import events
from sinks.events import Event, Word

NOBODY: Final = "--"
"""Stands in the speaker's place of a line about nobody in particular."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one line says.

    Attributes:
        who: A label or an enrolled name, or `NOBODY`.
        what: The text.
        words: The words it consists of, if they are somebody's words.
    """

    who: str
    what: str
    words: Sequence[Word] = ()


def clock(seconds: float) -> str:
    """Seconds → ``MM:SS.t``, with hours in front from the first hour on."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02d}:{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{text}" if hours else text


def moment(event: Event) -> float:
    """The time a line tells, in seconds: when it began, or when it was over if it says that."""
    over = isinstance(event, events.SpeechEnded | events.SessionClosed)
    return event.end if over else event.start


def one_line(text: str) -> str:
    """A text that may hold anything → one line that tells a terminal to do nothing."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def _who(speaker: events.Speaker) -> str:
    return speaker.identity or speaker.label


def _said(event: events.TranscriptPartial | events.TranscriptFinal) -> list[Line]:
    """A transcript → a line for each run of words by one speaker."""
    if not event.words:
        return [Line(NOBODY, event.text)]
    runs = [(who, list(run)) for who, run in groupby(event.words, key=lambda word: word.speaker)]
    return [Line(who or NOBODY, " ".join(w.word for w in run), run) for who, run in runs]


def lines(event: Event) -> list[Line]:
    """One event → its line; a transcript of several speakers has a line for each run of theirs."""
    match event:
        case events.SessionOpened():
            latency = event.latency.chunk_ms + event.latency.lookahead_ms
            return [Line(NOBODY, f"session opened: {event.source} (latency {latency} ms)")]
        case events.SessionClosed():
            return [Line(NOBODY, f"session closed: {event.reason}")]
        case events.SpeechStarted():
            return [Line(NOBODY, "speech begins")]
        case events.SpeechEnded():
            return [Line(NOBODY, "speech ends")]
        case events.TurnStarted():
            return [Line(_who(event.speaker), "begins to speak")]
        case events.TurnUpdated():
            return [Line(_who(event.speaker), "goes on")]
        case events.TurnEnded():
            overlap = ", over others" if event.overlap else ""
            return [Line(_who(event.speaker), f"spoke {event.end - event.start:.1f} s{overlap}")]
        case events.SpeakerIdentified():
            name = event.identity or "unknown"
            score = f"score {event.score:.2f}, margin {event.margin:.2f}"
            return [Line(event.speaker, f"is {name} ({score})")]
        case events.SpeakerRevised():
            count = len(event.revision_of)
            turns = "1 turn" if count == 1 else f"{count} turns"
            return [Line(event.from_label, f"is {event.to_label}: {event.reason}, {turns}")]
        case events.TranscriptPartial():
            return [Line(each.who, f"{each.what} …", each.words) for each in _said(event)]
        case events.TranscriptFinal():
            return _said(event)
        case events.Label():
            return [Line(NOBODY, f"{event.head}: {event.label} ({event.score:.2f})")]
        case events.Gap():
            return [Line(NOBODY, f"gap: {event.lost_samples} samples lost ({event.reason})")]
        case events.Heartbeat():
            return [Line(NOBODY, f"alive: real-time factor {event.realtime_factor:.3f}")]
        case events.Warning_():
            return [Line(NOBODY, f"warning: {event.message} [{event.code}]")]
        case events.Error_():
            return [Line(NOBODY, f"error: {event.message} [{event.code}]")]
