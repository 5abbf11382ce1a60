"""A session that is kept, as a file: RTTM, WebVTT, SubRip, JSON or text. All of it blocks."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from sinks import RttmSettings, SrtSettings, VttSettings
from sinks.events import Event, SpeakerRevised, TranscriptFinal, Word, parse
from sinks.roster import Roster
from sinks.sink import SinkSettings
from stream.feed import Line

KINDS: Final = {
    "rttm": "text/plain; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
    "srt": "text/plain; charset=utf-8",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
}
"""Name → media type."""

_BARE: Final = {"vtt": b"WEBVTT\n\n"}
"""What a form is with nothing to say, if that is not nothing."""


@dataclass(frozen=True, slots=True)
class Export:
    """A file.

    Attributes:
        data: Its bytes.
        kept_from: Seconds on the session's clock before which nothing is kept; 0 if all of it is.
    """

    data: bytes
    kept_from: float


def export(form: str, lines: Sequence[Line]) -> Export:
    """What is kept of a session, partials too, oldest first → its file in a form of `KINDS`.

    What is cut off at the beginning is said in the file, except in SubRip, which has no comments.
    """
    kept_from = parse(lines[0].data).end if lines[0].seq else 0.0
    finals = [line for line in lines if line.final]
    if form == "json":
        head = {
            "session_id": lines[0].session,
            "stream_id": lines[0].stream,
            "complete": not lines[0].seq,
            "kept_from": kept_from,
        }
        begin = json.dumps(head, ensure_ascii=False)[:-1].encode()
        events = b",\n".join(line.data for line in finals)
        return Export(b'%s, "events": [\n%s\n]}\n' % (begin, events), kept_from)
    events = [parse(line.data) for line in finals]
    data = text(events).encode() if form == "txt" else _written(form, events)
    if lines[0].seq:
        note = f"What was said before {kept_from:.1f} s is no longer kept."
        if form == "vtt":
            data = data.replace(b"WEBVTT\n\n", f"WEBVTT\n\nNOTE {note}\n\n".encode(), 1)
        elif form == "rttm":
            data = f";; {note}\n".encode() + data
        elif form == "txt":
            data = f"({note})\n".encode() + data
    return Export(data, kept_from)


@dataclass(slots=True)
class _Said:
    """A word, the label it has by the revisions so far, and its turn."""

    word: Word
    label: str
    turn_id: str | None


def text(events: Sequence[Event]) -> str:
    """Finals of a session → "name: words" lines, one a stretch of one speaker's words."""
    roster = Roster()
    said: list[_Said] = []
    for event in events:
        if isinstance(event, SpeakerRevised):
            revision = roster.revision(event)
            for each in said:
                word = each.word
                if revision.concerns(each.label, each.turn_id, word.start, word.end):
                    each.label = event.to_label
        roster.update(event)
        if isinstance(event, TranscriptFinal):
            said += [_Said(word, word.speaker or "?", event.turn_id) for word in event.words]
    lines = [
        f"{who}: {' '.join(each.word.word for each in stretch)}\n"
        for who, stretch in groupby(said, key=lambda each: roster.name(each.label))
    ]
    return "".join(lines)


def _written(form: str, events: Sequence[Event]) -> bytes:
    """What the sink of that form writes of these events; of too little it makes no file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"session.{form}"
        settings: SinkSettings
        if form == "rttm":
            settings = RttmSettings(path=path)
        elif form == "vtt":
            settings = VttSettings(path=path)
        else:
            settings = SrtSettings(path=path)
        asyncio.run(_write(settings, events))
        return path.read_bytes() if path.exists() else _BARE.get(form, b"")


async def _write(settings: SinkSettings, events: Sequence[Event]) -> None:
    async with settings.open() as sink:
        for event in events:
            if settings.wants(event):
                await sink.send(event)
