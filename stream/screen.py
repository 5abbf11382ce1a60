"""What a person at a terminal sees while it runs: a lane a speaker, or only how far the audio is.

A view takes events, one by one, and shows them; it does not know where they come from. Lines for
pipes are not a view but a sink, `sinks.stdout`.
"""

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Final, Protocol, Self

import rich.progress
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from sinks.events import (
    Error_,
    Event,
    Gap,
    Heartbeat,
    Label,
    SessionClosed,
    SessionOpened,
    SpeakerIdentified,
    SpeakerRevised,
    TranscriptFinal,
    TranscriptPartial,
    TurnEnded,
    TurnStarted,
    TurnUpdated,
    Warning_,
    Word,
)
from sinks.paint import COLOURS
from stream.clock import seconds

WINDOW_S: Final = 60.0
TURNS: Final = 4096  # turns remembered for revisions; older ones keep their label on the screen
WORDS: Final = 60  # final words remembered a lane: more than the widest terminal shows
NOBODY: Final = "?"  # the lane of words whose speaker is not known

Span = tuple[float, float]


class View(Protocol):
    """Shows events to a person while its block is open."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def take(self, event: Event) -> None:
        """Show, or remember to show, one event; returns at once."""
        ...


class Blind:
    """The view of someone who wants none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def take(self, event: Event) -> None:
        """Show nothing."""


def clock(at_s: float) -> str:
    """Seconds → ``1:02``, from an hour on ``1:00:00``."""
    minutes, rest = divmod(int(at_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def overlap(lanes: Iterable[Sequence[Span]]) -> list[Span]:
    """Spans of several lanes → the spans in which at least two lanes are active."""
    edges = sorted(
        edge
        for spans in lanes
        for start, end in spans
        if end > start
        for edge in ((start, 1), (end, -1))
    )
    both: list[Span] = []
    depth = 0
    for (at, step), (following, _) in pairwise([*edges, (float("inf"), 0)]):
        depth += step
        if depth > 1 and following > at:
            if both and both[-1][1] == at:
                both[-1] = (both[-1][0], following)
            else:
                both.append((at, following))
    return both


def bar(spans: Iterable[Span], start: float, end: float, width: int) -> str:
    """Spans in seconds → `width` characters for [start, end): ``█`` where active, halves as ``▌▐``.

    A half cell is drawn when at least half of it is covered, so that lanes that touch do not seem
    to overlap; a span too short for that draws the half cell of its middle.
    """
    half = (end - start) / (2 * width)
    covered = [0.0] * (2 * width)
    for left, right in spans:
        if right <= start or left >= end:
            continue
        first = max(0, int((left - start) / half))
        last = min(2 * width - 1, int((right - start) / half))
        for cell in range(first, last + 1):
            inside = min(right, start + (cell + 1) * half) - max(left, start + cell * half)
            covered[cell] += inside / half
        if right - left < half:
            middle = int(((left + right) / 2 - start) / half)
            covered[min(max(middle, 0), 2 * width - 1)] = 1.0
    drawn = [share >= 0.5 for share in covered]
    glyphs = {(True, True): "█", (True, False): "▌", (False, True): "▐", (False, False): " "}
    return "".join(glyphs[pair] for pair in zip(drawn[::2], drawn[1::2], strict=True))


def ruler(start: float, end: float, width: int) -> str:
    """A time axis of `width` characters for [start, end), a mark at every ten seconds."""
    marks = [" "] * width
    step = 10 if end - start <= 120 else 60
    at = int(-(-start // step)) * step
    while at < end:
        column = int((at - start) / (end - start) * width)
        text = f"╵{clock(at)}"
        if column + len(text) <= width:
            marks[column : column + len(text)] = text
        at += step
    return "".join(marks)


@dataclass(slots=True)
class Shown:
    """A turn as drawn; `end` is None while it goes on."""

    label: str
    start: float
    end: float | None = None


@dataclass(slots=True)
class Lane:
    """One speaker: what they are called and what they said last."""

    colour: str
    identity: str | None = None
    said: deque[str] = field(default_factory=lambda: deque[str](maxlen=WORDS))
    talk_s: float = 0.0
    turns: int = 0
    words: int = 0


class Picture:
    """The state of one session's picture: `take` events, `render` lines.

    Args:
        duration_s: length of the audio, if known.
        window_s: seconds of the timeline.
    """

    def __init__(self, *, duration_s: float | None = None, window_s: float = WINDOW_S) -> None:
        self.duration_s = duration_s
        self.window_s = window_s
        self.source = ""
        self.latency = ""
        self.now = 0.0
        self.lag_ms: float | None = None
        self.factor: float | None = None
        self.closed = False
        self.lanes: dict[str, Lane] = {}
        self.turns: OrderedDict[str, Shown] = OrderedDict()
        self.partial: dict[str | None, list[tuple[str, str]]] = {}
        self.gaps: deque[Span] = deque(maxlen=64)
        self.note = Text()
        self._seen = 0

    def take(self, event: Event) -> None:
        """Fold one event of this session in."""
        self.now = max(self.now, event.end)
        match event:
            case SessionOpened():
                self.source = event.source
                ms = event.latency.chunk_ms + event.latency.lookahead_ms
                self.latency = f"latency {ms / 1000:.2f} s"
            case SessionClosed():
                self.closed = True
                self.partial.clear()
            case TurnStarted() | TurnUpdated() | TurnEnded():
                self.lag_ms = event.lag_ms
                self._turn(event)
            case SpeakerIdentified():
                self._lane(event.speaker).identity = event.identity
            case SpeakerRevised():
                self._revise(event)
            case TranscriptPartial():
                self.lag_ms = event.lag_ms
                self.partial[event.turn_id] = self._spoken(event)
            case TranscriptFinal():
                self.lag_ms = event.lag_ms
                self.partial.pop(event.turn_id, None)
                for label, word in self._spoken(event):
                    lane = self._lane(label)
                    lane.said.append(word)
                    lane.words += 1
            case Label():
                self.note = Text(f"{event.head}: {event.label} ({event.score:.2f})", "dim")
            case Gap():
                self.gaps.append((event.start, event.end))
                lost = f"{seconds(event.lost_samples):.3f} s lost at {clock(event.start)}"
                self.note = Text(f"{lost}: {event.reason}", "bold red")
            case Heartbeat():
                self.now = max(self.now, event.audio_processed_s)
                self.factor = event.realtime_factor
            case Warning_():
                self.note = Text(f"warning: {event.message}", "yellow")
            case Error_():
                self.note = Text(f"error: {event.message}", "bold red")
            case _:
                pass

    def _lane(self, label: str) -> Lane:
        if label not in self.lanes:
            self.lanes[label] = Lane(COLOURS[self._seen % len(COLOURS)])
            self._seen += 1
        return self.lanes[label]

    def _turn(self, event: TurnStarted | TurnUpdated | TurnEnded) -> None:
        lane = self._lane(event.speaker.label)
        if event.speaker.identity is not None:
            lane.identity = event.speaker.identity
        before = self.turns.get(event.turn_id)
        ended = isinstance(event, TurnEnded)
        self.turns[event.turn_id] = Shown(
            event.speaker.label, event.start, event.end if ended else None
        )
        if ended and (before is None or before.end is None):
            lane.talk_s += event.end - event.start
            lane.turns += 1
        while len(self.turns) > TURNS:
            self.turns.popitem(last=False)
        if before is not None and before.label != event.speaker.label:
            self._drop_if_empty(before.label)

    def _revise(self, event: SpeakerRevised) -> None:
        if event.reason == "identified":  # the lane stays, `speaker.identified` named it
            return
        target = self._lane(event.to_label)
        for turn_id in event.revision_of:
            turn = self.turns.get(turn_id)
            if turn is None or turn.label == event.to_label:
                continue
            if turn.end is not None:
                source = self._lane(turn.label)
                source.talk_s -= turn.end - turn.start
                source.turns -= 1
                target.talk_s += turn.end - turn.start
                target.turns += 1
            turn.label = event.to_label
        self._drop_if_empty(event.from_label)

    def _drop_if_empty(self, label: str) -> None:
        lane = self.lanes.get(label)
        if lane is None or lane.turns > 0:
            return
        if not any(turn.label == label for turn in self.turns.values()):
            del self.lanes[label]

    def _spoken(self, event: TranscriptPartial | TranscriptFinal) -> list[tuple[str, str]]:
        turn = self.turns.get(event.turn_id) if event.turn_id is not None else None
        fallback = turn.label if turn is not None else NOBODY

        def lane_of(word: Word) -> str:
            return word.speaker if word.speaker in self.lanes else fallback

        if event.words:
            return [(lane_of(word), word.word) for word in event.words]
        return [(fallback, word) for word in event.text.split()]

    def spans(self, label: str, since: float) -> list[Span]:
        """The turns of one lane that reach past `since`; an open one reaches to now."""
        return [
            (turn.start, self.now if turn.end is None else turn.end)
            for turn in self.turns.values()
            if turn.label == label and (turn.end is None or turn.end > since)
        ]

    def speaking(self, label: str) -> bool:
        """Whether a turn of this lane goes on."""
        return any(t.label == label and t.end is None for t in self.turns.values())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The panel, as wide as the console allows and no taller than its height."""
        rows = max(1, (options.max_height or console.height) - 6)
        yield Panel(
            self.body(options.max_width - 4, rows),
            box=box.ROUNDED,
            title=Text.assemble(("livesat", "bold"), ("  " + self.source if self.source else "")),
            title_align="left",
            border_style="dim",
            padding=(0, 1),
        )

    def body(self, width: int, rows: int) -> RenderableType:
        """Header, lanes, time axis and the latest note, `width` characters wide."""
        names = max([8, *(len(self._name(label)) for label in self.lanes)])
        names = min(names, max(8, width // 5))
        cells = max(10, width - names - 12)
        half = self.window_s / (2 * cells)  # scroll by whole half cells, or every bar shimmers
        end = max(self.window_s, math.ceil(self.now / half) * half)
        start = end - self.window_s
        parts: list[RenderableType] = [self._header(width), Text()]

        labels = [label for label in self.lanes if label != NOBODY]
        fit = max(1, (rows - 2) // 2)
        hidden = 0
        if len(labels) > fit:  # the ones heard last
            latest = {
                label: max((e for _, e in self.spans(label, 0)), default=0) for label in labels
            }
            keep = set(sorted(labels, key=lambda label: -latest[label])[:fit])
            hidden = len(labels) - fit
            labels = [label for label in labels if label in keep]

        for label in labels:
            parts += self._draw(label, start, end, names, cells)
        if not labels:
            waiting = "no speaker was heard" if self.closed else "listening …"
            parts += [Text(f"{'':{names + 2}} {waiting}", "dim"), Text()]
        if NOBODY in self.lanes or any(
            who == NOBODY for w in self.partial.values() for who, _ in w
        ):
            parts.append(self._words(NOBODY, names, cells))
        both = overlap(self.spans(label, start) for label in self.lanes)
        if both:
            parts.append(
                Text.assemble(
                    (f"  {'overlap':<{names}} ", "dim"), (bar(both, start, end, cells), "dim red")
                )
            )
        if self.gaps:
            lost = bar(self.gaps, start, end, cells)
            if lost.strip():
                parts.append(Text.assemble((f"  {'lost':<{names}} ", "dim"), (lost, "red")))
        axis = Text.assemble((f"{'':{names + 2}} ", "dim"), (ruler(start, end, cells), "dim"))
        if hidden:
            axis.append(f" +{hidden} more", "dim")
        parts.append(axis)
        if self.note.plain:
            note = self.note.copy()
            note.truncate(width, overflow="ellipsis")
            parts.append(note)
        return Group(*parts)

    def _name(self, label: str) -> str:
        identity = self.lanes[label].identity
        return f"{label} {identity}" if identity else label

    def _header(self, width: int) -> Text:
        at = clock(self.now)
        if self.duration_s is not None:
            at += f" / {clock(self.duration_s)}"
        count = sum(label != NOBODY for label in self.lanes)
        facts = [at, f"{count} speaker{'' if count == 1 else 's'}"]
        if self.lag_ms is not None:
            facts.append(f"lag {self.lag_ms:.0f} ms")
        if self.factor is not None:
            facts.append(f"RTF {self.factor:.3f}")
        if self.latency:
            facts.append(self.latency)
        text = Text("  ·  ").join([Text(facts[0], "bold"), *map(Text, facts[1:])])
        text.truncate(width, overflow="ellipsis")
        return text

    def _draw(
        self, label: str, start: float, end: float, names: int, cells: int
    ) -> list[RenderableType]:
        lane = self.lanes[label]
        speaking = self.speaking(label)
        name = Text(f"{self._name(label):<{names}}", f"bold {lane.colour}")
        name.truncate(names, overflow="ellipsis")
        track = Text()
        elapsed = round((self.now - start) / (end - start) * cells)
        for column, glyph in enumerate(bar(self.spans(label, start), start, end, cells)):
            if glyph == " ":
                track.append("┈" if column < elapsed else " ", "bright_black")
            else:
                track.append(glyph, lane.colour)
        line = Text.assemble(
            ("● " if speaking else "  ", lane.colour),
            name,
            " ",
            track,
            (f" {self._talked(label):>6.1f} s", "" if speaking else "dim"),
        )
        return [line, self._words(label, names, cells)]

    def _talked(self, label: str) -> float:
        going = (self.now - t.start for t in self.turns.values() if t.label == label and not t.end)
        return self.lanes[label].talk_s + sum(going)

    def _words(self, label: str, names: int, cells: int) -> Text:
        lane = self.lanes.get(label)
        final = " ".join(lane.said) if lane else ""
        partial = " ".join(
            word for words in self.partial.values() for who, word in words if who == label
        )
        shown = f"{final} {partial}".strip()
        room = cells + 9
        if len(shown) > room:  # the end of it, from the beginning of a word
            cut = shown.find(" ", len(shown) - room + 1)
            shown = "…" + shown[cut:] if cut >= 0 else "…" + shown[-(room - 1) :]
        dimmed = min(len(partial), len(shown))
        text = Text(" " * (names + 3))
        text.append(shown[: len(shown) - dimmed])
        text.append(shown[len(shown) - dimmed :], "dim italic")
        return text


class Screen:
    """A live picture a session, redrawn by Rich's own thread: a slow terminal never delays audio.

    Args:
        console: where to draw; a terminal.
        duration_s: length of the audio, if known.
        hertz: pictures a second.
    """

    def __init__(
        self, console: Console, *, duration_s: float | None = None, hertz: float = 10
    ) -> None:
        self._duration_s = duration_s
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=hertz,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def take(self, event: Event) -> None:
        """Fold one event in; the next redraw shows it."""
        with self._lock:
            picture = self._pictures.get(event.session_id)
            if picture is None:
                picture = self._pictures[event.session_id] = Picture(duration_s=self._duration_s)
                for old in [k for k, p in self._pictures.items() if p.closed][:-3]:
                    del self._pictures[old]
            picture.take(event)

    def render(self) -> RenderableType:
        """The pictures of the open sessions, drawn to lines under the lock."""
        with self._lock:
            if not self._pictures:
                return Text("loading the checkpoint …", "dim")
            console = self._live.console
            height = max(8, console.height // len(self._pictures))
            options = console.options.update(height=None, max_width=console.width)
            options.max_height = height
            drawn: list[RenderableType] = []
            for picture in self._pictures.values():
                lines = console.render_lines(picture, options, pad=False)
                drawn += [Text.assemble(*((s.text, s.style or "") for s in line)) for line in lines]
            return Group(*drawn)


class Progress:
    """How far the audio is, on a terminal beside whatever goes to stdout.

    Args:
        console: where to draw; a terminal.
        duration_s: length of the audio, if known.
    """

    def __init__(self, console: Console, *, duration_s: float | None = None) -> None:
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[at]}"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._duration_s = duration_s
        self._speakers: set[str] = set()
        self._task = self._bar.add_task("listening", total=duration_s, at="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def take(self, event: Event) -> None:
        """Move the bar to the event."""
        at = event.audio_processed_s if isinstance(event, Heartbeat) else event.end
        if isinstance(event, TurnEnded):
            self._speakers.add(event.speaker.label)
        elif isinstance(event, SpeakerRevised):
            self._speakers.discard(event.from_label)
        count = len(self._speakers)
        text = f"{clock(at)}  {count} speaker{'' if count == 1 else 's'}"
        self._bar.update(self._task, completed=at, at=text)
