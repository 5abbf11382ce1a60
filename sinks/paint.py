"""Events as lines of a terminal, in colour: when, who, what.

A speaker has one colour, that of the label. What may still change is lighter, and stands in the
last line until something replaces it.
"""

from typing import Final, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from sinks import events
from sinks.events import Event
from sinks.lines import NOBODY, clock, lines, moment, one_line
from sinks.roster import Names

COLOURS: Final = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_red")
"""Of speakers, in the order of their numbers."""

UNSURE: Final = 0.3
"""Words of less confidence are dim."""

NAME: Final = 10
"""Columns of a speaker's name."""

_ERASE: Final = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))

_MARKS: Final = {
    "session.opened": ("▶", "bold"),
    "session.closed": ("■", "bold"),
    "speech.started": ("╭", "bright_black"),
    "speech.ended": ("╰", "bright_black"),
    "turn.ended": ("│", "bright_black"),
    "speaker.identified": ("✓", "green"),
    "speaker.revised": ("↻", "yellow"),
    "label": ("#", "blue"),
    "gap": ("✂", "bold red"),
    "warning": ("!", "bold yellow"),
    "error": ("✗", "bold red"),
}
"""Type → its mark, and the style of its text; words have neither."""


def colour(label: str) -> str:
    """A speaker's label, "S3" → its colour."""
    number = label.removeprefix("S")
    return COLOURS[(int(number) - 1) % len(COLOURS)] if number.isdecimal() else "default"


def _label(event: Event) -> str | None:
    """Whose turn it is: by label, whatever the person is called."""
    if isinstance(event, events.TurnStarted | events.TurnUpdated | events.TurnEnded):
        return event.speaker.label
    return None


class Painter:
    """What is to be written to a terminal, event by event.

    Args:
        file: The terminal: how wide it is, and which colours it has.
        show_stream: Begin each line with the stream's name.
    """

    def __init__(self, file: TextIO, *, show_stream: bool) -> None:
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._show_stream = show_stream
        # Bound: speakers of open sessions.
        self._names: dict[str, Names] = {}
        self._standing: Event | None = None

    def paint(self, event: Event) -> str:
        """An event → what is to be written for it."""
        if isinstance(event, events.SessionClosed):
            self._names.pop(event.session_id, None)
        else:
            self._names.setdefault(event.session_id, Names()).hear(event)
        with self._console.capture() as captured:
            if self._standing is not None:
                self._console.control(_ERASE)
            if event.is_final:
                for parts in self._parts(event):
                    self._console.print(self._row(event, *parts))
                if isinstance(event, events.TranscriptFinal | events.SessionClosed):
                    self._standing = None
            elif not isinstance(self._standing, events.TranscriptPartial) or isinstance(
                event, events.TranscriptPartial
            ):
                self._standing = event
            if self._standing is not None:
                self._console.print(self._last_line(self._standing), end="")
        return captured.get()

    def leave(self) -> str:
        """What is to be written at the end."""
        with self._console.capture() as captured:
            if self._standing is not None:
                self._console.control(_ERASE)
        self._standing = None
        return captured.get()

    def _parts(self, event: Event) -> list[tuple[Text, Text, Text]]:
        """→ (who, mark, what) of each line."""
        parts: list[tuple[Text, Text, Text]] = []
        for line in lines(event):
            label = _label(event) or line.who
            if line.words:
                mark = Text("▌", colour(label))
                what = Text(" ").join(
                    Text(one_line(word.word), "" if word.confidence >= UNSURE else "dim italic")
                    for word in line.words
                )
            else:
                sign, style = _MARKS.get(event.type, (" ", ""))
                mark, what = Text(sign, style), Text(one_line(line.what), style)
            if isinstance(event, events.TurnEnded):
                what.highlight_words(["over others"], "red")
            if isinstance(event, events.SpeakerRevised):
                what.highlight_words([event.to_label], f"bold {colour(event.to_label)}")
            parts.append((self._who(event, label), mark, what))
        return parts

    def _who(self, event: Event, label: str) -> Text:
        if label == NOBODY:
            return Text()
        name = label
        if not isinstance(event, events.SpeakerIdentified | events.SpeakerRevised):
            name = self._names.get(event.session_id, Names()).name(label)
        shown = Text(one_line(name), f"bold {colour(label)}")
        shown.truncate(NAME, overflow="ellipsis")
        return shown

    def _row(self, event: Event, *parts: Text) -> Table:
        row = Table.grid(padding=(0, 2, 0, 0))
        cells = [Text(clock(moment(event)), "bright_black"), *parts]
        if self._show_stream:
            row.add_column(no_wrap=True)
            cells.insert(0, Text(one_line(event.stream_id), "bright_black"))
        row.add_column(no_wrap=True)
        row.add_column(width=NAME, no_wrap=True)
        row.add_column(width=1)
        row.add_column(overflow="fold")
        row.add_row(*cells)
        return row

    def _last_line(self, event: Event) -> Text:
        """The end of it, in one line that does not wrap."""
        begin = Text()
        if self._show_stream:
            begin.append(f"{one_line(event.stream_id)}  ", "bright_black")
        begin.append(f"{clock(event.start)}  ", "bright_black")
        who, mark, what = self._parts(event)[-1]
        who.pad_right(NAME - who.cell_len)
        begin.append_text(who).append("  ").append_text(mark).append("  ")
        what.stylize("dim italic")
        room = max(self._console.width - begin.cell_len - 1, 8)
        if what.cell_len > room:
            what = Text("…", "dim").append_text(what[what.cell_len - room + 1 :])
        return begin.append_text(what)
