"""Standard output: a line an event, in colour on a terminal, plain where it is piped.

``00:12.3  S2  hello there`` — the time at which it begins, who, what. With ``format: json`` the
lines are those of the JSON Lines file. On a terminal, what may still change stands lighter in the
last line until it is replaced. Rich is imported when a sink is opened there.
"""

import asyncio
import io
import os
import queue
import sys
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import structlog
from pydantic import Field

from sinks.events import Event, dump
from sinks.lines import clock, lines, moment, one_line
from sinks.sink import SinkError, SinkSettings

if TYPE_CHECKING:
    from sinks.paint import Painter

log = structlog.get_logger(__name__)

FAREWELL_S: Final = 1.0
"""How long a terminal may take to have its last line erased: one that is stopped takes nothing."""


class StdoutSettings(SinkSettings, frozen=True):
    """Lines on standard output."""

    durable: ClassVar[bool] = False

    kind: Literal["stdout"] = "stdout"
    partials: bool = Field(
        default=False, description="Also events that later ones may replace (is_final false)."
    )
    format: Literal["text", "json"] = Field(
        default="text", description="Lines to read, in colour on a terminal; or JSON."
    )
    show_stream: bool = Field(
        default=False, description="Begin each text line with the stream's name."
    )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["StdoutSink"]:
        """Nothing to open: the stream is the process's own."""
        painter = None
        if self.format == "text" and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from sinks.paint import Painter

            painter = Painter(sys.stdout, show_stream=self.show_stream)
        sink = StdoutSink(self, painter)
        try:
            yield sink
        finally:
            if painter is not None:
                with suppress(SinkError, TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await sink.write(painter.leave())
            sink.close()


def text(event: Event) -> list[str]:
    """One event → its plain lines."""
    at = clock(moment(event))
    return [f"{at}  {line.who}  {one_line(line.what)}" for line in lines(event)]


class StdoutSink:
    """Writes to whatever `sys.stdout` is at the time of the event."""

    def __init__(self, settings: StdoutSettings, painter: "Painter | None" = None) -> None:
        self._settings = settings
        self._painter = painter
        self._closed = False
        self._writer = _Writer()

    async def send(self, event: Event) -> None:
        """Write and flush the event's lines; once the reader has gone, discard them.

        Raises:
            SinkError: the lines could not be written.
        """
        if self._settings.format == "json":
            written = f"{dump(event).decode()}\n"
        elif self._painter is not None:
            written = self._painter.paint(event)
        else:
            stream = f"{event.stream_id}  " if self._settings.show_stream else ""
            written = "".join(f"{stream}{line}\n" for line in text(event))
        await self.write(written)

    async def write(self, text: str) -> None:
        """Write and flush; once the reader has gone, discard.

        Raises:
            SinkError: it could not be written.
        """
        if self._closed:
            return
        try:
            await self._writer.write(text)
        except BrokenPipeError:
            # `livesat … | head`: the reader has had enough, which is no error of ours.
            self._closed = True
            _discard_output()
            log.info("standard output closed by its reader")
        except (OSError, ValueError) as error:
            raise SinkError(f"cannot write to standard output: {error}") from None

    def close(self) -> None:
        """Let the thread end once it has written what it has."""
        self._writer.close()


class _Writer:
    """A thread that writes: a pipe that nobody reads, a terminal that is stopped, blocks it.

    A daemon thread, because that may last for ever, and nobody would wait for it at the exit.
    """

    def __init__(self) -> None:
        # Bound: one, and what takes leave of a terminal. A sink is given one event at a time.
        self._texts: queue.SimpleQueue[tuple[str, Future[None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="stdout", daemon=True).start()

    async def write(self, text: str) -> None:
        """Write and flush; who is cancelled meanwhile leaves the rest to the thread.

        Raises:
            OSError, ValueError: it could not be written.
        """
        done: Future[None] = Future()
        self._texts.put((text, done))
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread once it has written what it has."""
        self._texts.put(None)

    def _run(self) -> None:
        while (given := self._texts.get()) is not None:
            text, done = given
            if not done.set_running_or_notify_cancel():
                continue
            try:
                _write(text)
            except Exception as error:  # noqa: BLE001 - for whoever waits
                done.set_exception(error)
            else:
                done.set_result(None)


def _write(text: str) -> None:
    """Write to the descriptor: who blocks in the stream holds its lock, which the exit wants."""
    stream = sys.stdout
    stream.flush()
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        stream.write(text)
        stream.flush()
        return
    left = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    while left:
        left = left[os.write(descriptor, left) :]


def _discard_output() -> None:
    """Let the interpreter's last flush of standard output succeed."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
