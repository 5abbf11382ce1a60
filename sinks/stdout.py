"""Standard output: one plain line an event, to be read or piped.

``00:12.3  S2  hello there`` — the time at which it begins, who, what. With ``format: json`` the
lines are those of the JSON Lines file.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from typing import ClassVar, Final, Literal

import structlog
from pydantic import Field

from sinks import events
from sinks.events import Event, dump
from sinks.sink import SinkError, SinkSettings

NOBODY: Final = "--"
"""Stands in the speaker's column of a line about nobody in particular."""

log = structlog.get_logger(__name__)


class StdoutSettings(SinkSettings, frozen=True):
    """Lines on standard output."""

    durable: ClassVar[bool] = False

    kind: Literal["stdout"] = "stdout"
    partials: bool = Field(
        default=False, description="Also events that later ones may replace (is_final false)."
    )
    format: Literal["text", "json"] = Field(default="text", description="Lines to read, or JSON.")
    show_stream: bool = Field(
        default=False, description="Begin each text line with the stream's name."
    )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["StdoutSink"]:
        """Nothing to open: the stream is the process's own."""
        yield StdoutSink(self)


def clock(seconds: float) -> str:
    """Seconds → ``MM:SS.t``, with hours in front from the first hour on."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02d}:{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{text}" if hours else text


def _who(speaker: events.Speaker) -> str:
    return speaker.identity or speaker.label


def _said(event: events.TranscriptPartial | events.TranscriptFinal) -> list[tuple[str, str]]:
    """A transcript → (speaker, text) of each run of words by one speaker."""
    if not event.words:
        return [(NOBODY, event.text)]
    runs = groupby(event.words, key=lambda word: word.speaker)
    return [(who or NOBODY, " ".join(word.word for word in run)) for who, run in runs]


def text(event: Event) -> list[str]:
    """One event → its line; a transcript of several speakers has a line for each run of theirs."""
    parts: list[tuple[str, str]]
    match event:
        case events.SessionOpened():
            latency = event.latency.chunk_ms + event.latency.lookahead_ms
            parts = [(NOBODY, f"session opened: {event.source} (latency {latency} ms)")]
        case events.SessionClosed():
            parts = [(NOBODY, f"session closed: {event.reason}")]
        case events.SpeechStarted():
            parts = [(NOBODY, "speech begins")]
        case events.SpeechEnded():
            parts = [(NOBODY, "speech ends")]
        case events.TurnStarted():
            parts = [(_who(event.speaker), "begins to speak")]
        case events.TurnUpdated():
            parts = [(_who(event.speaker), "goes on")]
        case events.TurnEnded():
            overlap = ", over others" if event.overlap else ""
            parts = [(_who(event.speaker), f"spoke {event.end - event.start:.1f} s{overlap}")]
        case events.SpeakerIdentified():
            name = event.identity or "unknown"
            parts = [
                (event.speaker, f"is {name} (score {event.score:.2f}, margin {event.margin:.2f})")
            ]
        case events.SpeakerRevised():
            count = len(event.revision_of)
            turns = "1 turn" if count == 1 else f"{count} turns"
            parts = [(event.from_label, f"is {event.to_label}: {event.reason}, {turns}")]
        case events.TranscriptPartial():
            parts = [(who, f"{said} …") for who, said in _said(event)]
        case events.TranscriptFinal():
            parts = _said(event)
        case events.Label():
            parts = [(NOBODY, f"{event.head}: {event.label} ({event.score:.2f})")]
        case events.Gap():
            parts = [(NOBODY, f"gap: {event.lost_samples} samples lost ({event.reason})")]
        case events.Heartbeat():
            parts = [(NOBODY, f"alive: real-time factor {event.realtime_factor:.3f}")]
        case events.Warning_():
            parts = [(NOBODY, f"warning: {event.message} [{event.code}]")]
        case events.Error_():
            parts = [(NOBODY, f"error: {event.message} [{event.code}]")]
    # A message may hold anything; a line must stay one line.
    return [f"{clock(event.start)}  {who}  {' '.join(what.split())}" for who, what in parts]


class StdoutSink:
    """Writes to whatever `sys.stdout` is at the time of the event."""

    def __init__(self, settings: StdoutSettings) -> None:
        self._settings = settings
        self._closed = False

    async def send(self, event: Event) -> None:
        """Write and flush the event's lines; once the reader has gone, discard them.

        Raises:
            SinkError: the lines could not be written.
        """
        if self._closed:
            return
        if self._settings.format == "json":
            lines = [dump(event).decode()]
        else:
            lines = text(event)
            if self._settings.show_stream:
                lines = [f"{event.stream_id}  {line}" for line in lines]
        try:
            # A pipe that nobody reads blocks: never on the event loop.
            await asyncio.to_thread(_write, "".join(f"{line}\n" for line in lines))
        except BrokenPipeError:
            # `livesat … | head`: the reader has had enough, which is no error of ours.
            self._closed = True
            _discard_output()
            log.info("standard output closed by its reader")
        except (OSError, ValueError) as error:
            raise SinkError(f"cannot write to standard output: {error}") from None


def _write(lines: str) -> None:
    sys.stdout.write(lines)
    sys.stdout.flush()


def _discard_output() -> None:
    """Let the interpreter's last flush of standard output succeed."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
