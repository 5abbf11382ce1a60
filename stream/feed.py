"""The live feed: what subscribers of the daemon's own server read, and how they catch up.

Every event is encoded once. A subscription is a bounded queue of those lines: partials go first,
and a reader that lets a mebibyte of finals wait is evicted, so that one of them cannot cost the
others, the audio, or the memory of the house.
"""

import asyncio
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import merge
from operator import attrgetter
from sys import intern
from typing import Final, Literal

from sinks.events import Event, SessionClosed, SessionOpened, dump

FINALS_BYTES: Final = 4 << 20
"""Finals kept for who comes late; the oldest go. Hours of one stream, a quarter of one of eight."""

PARTIALS_BYTES: Final = 1 << 20
"""Partials kept likewise, which later ones may replace: a minute of eight streams."""

QUEUE_BYTES: Final = 1 << 20
"""Lines that may wait for one reader (reliability bar, row 9)."""

SESSIONS: Final = 200
"""Sessions listed; the oldest closed ones go."""


@dataclass(frozen=True, slots=True)
class Line:
    """One event as it is sent.

    Attributes:
        number: Position in the feed of this process, from 1.
        session: Whose event.
        stream: Its stream.
        seq: Its place in the session.
        type: Of the event.
        final: Never dropped for one that keeps up.
        data: The JSON object, UTF-8.
    """

    number: int
    session: str
    stream: str
    seq: int
    type: str
    final: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a subscriber asks for; None is everything.

    Attributes:
        session: Only events of this session.
        stream: Only events of this stream.
        types: Only these types.
        partials: Also events that later ones may replace.
    """

    session: str | None = None
    stream: str | None = None
    types: frozenset[str] | None = None
    partials: bool = True

    def admits(self, line: Line) -> bool:
        """Whether a line is asked for."""
        return (
            (self.session is None or line.session == self.session)
            and (self.stream is None or line.stream == self.stream)
            and (self.types is None or line.type in self.types)
            and (self.partials or line.final)
        )


@dataclass(slots=True)
class Entry:
    """A session as the list of sessions shows it.

    Attributes:
        session: Its id.
        stream: Its stream.
        source: What the source says it is.
        opened: RFC 3339.
        state: Open or closed.
        audio_s: Seconds heard so far, by its latest event.
        turns: How many are over by label, as revised so far.
        names: Identities by label.
        next_seq: The number its next event will have.
        gone: The number of the latest final of it that is not kept; -1: all are.
    """

    session: str
    stream: str
    source: str
    opened: str
    state: Literal["open", "closed"] = "open"
    audio_s: float = 0.0
    turns: dict[str, int] = field(default_factory=dict[str, int])
    names: dict[str, str] = field(default_factory=dict[str, str])
    next_seq: int = 0
    gone: int = -1

    @property
    def speakers(self) -> list[str]:
        """Labels of turns that are over."""
        return list(self.turns)

    def count(self, label: str, turns: int) -> None:
        """A label gets turns, or loses them; of those before a restart it has none to lose."""
        left = max(self.turns.get(label, 0) + turns, 0)
        if left:
            self.turns[label] = left
        else:
            self.turns.pop(label, None)


class History:
    """The latest lines, finals for longer than partials.

    Args:
        finals: Bytes of finals.
        partials: Bytes of partials.

    Attributes:
        gone: Number of the latest final that is not kept.
    """

    def __init__(self, finals: int, partials: int) -> None:
        self.gone = 0
        self._limits = {True: finals, False: partials}
        self._lines: dict[bool, deque[Line]] = {True: deque(), False: deque()}
        self._sizes = {True: 0, False: 0}  # in bytes, bounded by `_limits`

    @property
    def size(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())

    def add(self, line: Line) -> list[Line]:
        """Keep a line → the finals that are kept no longer."""
        lines, limit, dropped = self._lines[line.final], self._limits[line.final], list[Line]()
        lines.append(line)
        self._sizes[line.final] += len(line.data)
        while self._sizes[line.final] > limit and len(lines) > 1:
            dropped.append(lines.popleft())
            self._sizes[line.final] -= len(dropped[-1].data)
        if not line.final or not dropped:
            return []
        self.gone = dropped[-1].number
        return dropped

    def lines(self, wanted: Callable[[Line], bool]) -> list[Line]:
        """Those that are wanted, oldest first."""
        both = (filter(wanted, self._lines[final]) for final in (True, False))
        return list(merge(*both, key=attrgetter("number")))


class Subscription:
    """One reader's queue. Iterate over it; it ends when the feed closes or the reader is evicted.

    Attributes:
        begin: Just before the first line it reads: where it is before it has read one.
        complete: Whether every final since the asked-for position was still there.
        dropped: Partials this reader was too slow for.
        evicted: Too much waited for it: it must come back and resume.
    """

    def __init__(
        self,
        wanted: Wanted,
        limit: int,
        past: Iterable[Line] = (),
        *,
        begin: str = "0",
        complete: bool = True,
    ) -> None:
        self.wanted = wanted
        self.begin = begin
        self.complete = complete
        self.dropped = 0
        self.evicted = False
        self._limit = limit
        self._past = deque(past)  # bounded by the history; it does not count against the reader
        self._lines: deque[Line] = deque()  # bounded by `limit`, in bytes; see `put`
        self._size = 0
        self._wake = asyncio.Event()
        self._ended = False

    @property
    def waiting(self) -> int:
        """Bytes that wait."""
        return self._size

    def put(self, line: Line) -> None:
        """Queue a line, if it is wanted; may cost partials, or evict the reader."""
        if self._ended or not self.wanted.admits(line):
            return
        self._lines.append(line)
        self._size += len(line.data)
        if self._size > self._limit:
            self._shed()
        self._wake.set()

    def end(self) -> None:
        """Nothing more comes: what waits is still read."""
        self._ended = True
        self._wake.set()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Line:
        if self._past:
            return self._past.popleft()
        while not self._lines:
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        line = self._lines.popleft()
        self._size -= len(line.data)
        return line

    def _shed(self) -> None:
        finals = deque(line for line in self._lines if line.final)
        self.dropped += len(self._lines) - len(finals)
        self._lines = finals
        self._size = sum(len(line.data) for line in finals)
        if self._size > self._limit:
            self.evicted = True
            self._past.clear()
            self._lines.clear()
            self._size = 0
            self.end()


class Feed:
    """Everything the house emits, for any number of readers.

    Args:
        history: Bytes of finals kept.
        partials: Bytes of partials kept.
        queue: Bytes that may wait for one reader.
    """

    def __init__(
        self,
        history: int = FINALS_BYTES,
        partials: int = PARTIALS_BYTES,
        queue: int = QUEUE_BYTES,
    ) -> None:
        self.epoch = secrets.token_hex(4)
        """Numbers count within it: a cursor of another process is older than everything here."""
        self.evicted = 0
        """Readers that were evicted so far."""
        self._dropped = 0  # for readers that have gone
        self._queue_limit = queue
        self._history = History(history, partials)
        self._number = 0
        self._readers: set[Subscription] = set()
        self._sessions: OrderedDict[str, Entry] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        """Readers."""
        return len(self._readers)

    @property
    def dropped(self) -> int:
        """Partials that readers were too slow for, so far."""
        return self._dropped + sum(reader.dropped for reader in self._readers)

    @property
    def kept(self) -> int:
        """Bytes of lines that are kept."""
        return self._history.size

    @property
    def sessions(self) -> list[Entry]:
        """Sessions that are open, and those that were; newest last."""
        return list(self._sessions.values())

    def publish(self, event: Event) -> Line:
        """Give an event to everyone who wants it → as it is sent."""
        line = self.keep(event)
        for reader in list(self._readers):
            reader.put(line)
            if reader.evicted:
                self._forget(reader)
                self.evicted += 1
        return line

    def keep(self, event: Event) -> Line:
        """Keep an event for who asks for what was missed; for one of an earlier process."""
        self._list(event)
        self._number += 1
        line = Line(
            self._number,
            intern(event.session_id),  # each event has a copy of its own
            intern(event.stream_id),
            event.seq,
            event.type,
            event.is_final,
            dump(event),
        )
        for old in self._history.add(line):
            if (entry := self._sessions.get(old.session)) is not None:
                entry.gone = max(entry.gone, old.seq)
        return line

    def enter(self, entry: Entry) -> None:
        """List a session: one that opens, or one of an earlier process that goes on."""
        self._sessions[entry.session] = entry
        while len(self._sessions) > SESSIONS:
            old = next((k for k, e in self._sessions.items() if e.state == "closed"), None)
            if old is None:
                break
            del self._sessions[old]

    def subscribe(
        self, wanted: Wanted, *, cursor: str | None = None, after: int | None = None
    ) -> Subscription:
        """A reader's queue, with what it has missed already in it.

        Args:
            wanted: What it asks for.
            cursor: Where it left off, as `cursor` gave it; "0" is everything that is kept.
            after: Or the last ``seq`` it has of the session it asks for.
        """
        missed, complete = self._since(wanted, cursor, after)
        past = [line for line in missed if wanted.admits(line)]
        begin = f"{self.epoch}.{past[0].number - 1 if past else self._number}"
        reader = Subscription(wanted, self._queue_limit, past, begin=begin, complete=complete)
        if self._closed:
            reader.end()
        else:
            self._readers.add(reader)
        return reader

    def leave(self, reader: Subscription) -> None:
        """The reader has gone."""
        reader.end()
        self._forget(reader)

    def cursor(self, line: Line | None = None) -> str:
        """Where a reader that has seen ``line``, or everything so far, is."""
        return f"{self.epoch}.{self._number if line is None else line.number}"

    def close(self) -> None:
        """No more events: readers end when they have read what waits."""
        self._closed = True
        for reader in self._readers:
            reader.end()

    def lines(self, session: str, admit: Callable[[Line], bool] = lambda _: True) -> list[Line]:
        """What is kept of a session, oldest first."""
        return self._history.lines(lambda line: line.session == session and admit(line))

    def _forget(self, reader: Subscription) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            self._dropped += reader.dropped

    def _since(
        self, wanted: Wanted, cursor: str | None, after: int | None
    ) -> tuple[list[Line], bool]:
        if after is not None and wanted.session is not None:
            missed = self.lines(wanted.session, lambda line: line.seq > after)
            entry = self._sessions.get(wanted.session)
            # Of a session that is not listed only this is known: whether anything is gone.
            return missed, entry.gone <= after if entry is not None else not self._history.gone
        if cursor is None:
            return [], True
        epoch, _, number = cursor.partition(".")
        seen = int(number) if epoch == self.epoch and number.isdigit() else 0
        missed = self._history.lines(lambda line: line.number > seen)
        whole = self._history.gone <= seen
        return missed, whole and (epoch == self.epoch or cursor == "0")

    def _list(self, event: Event) -> None:
        if isinstance(event, SessionOpened):
            opened = event.wall_time.isoformat()
            self.enter(Entry(event.session_id, event.stream_id, event.source, opened))
        entry = self._sessions.get(event.session_id)
        if entry is None:
            return
        entry.next_seq = event.seq + 1
        entry.audio_s = max(entry.audio_s, event.end)
        if isinstance(event, SessionClosed):
            entry.state = "closed"
        elif event.type == "turn.ended":
            entry.count(event.speaker.label, 1)
        elif event.type == "speaker.identified":
            if event.identity is None:
                entry.names.pop(event.speaker, None)
            else:
                entry.names[event.speaker] = event.identity
        elif event.type == "speaker.revised" and event.reason != "identified":
            entry.count(event.from_label, -len(event.revision_of))
            entry.count(event.to_label, len(event.revision_of))
