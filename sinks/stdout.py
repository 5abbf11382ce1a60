"""Standard output: a line an event, in colour on a terminal, plain where it is piped.

``00:12.3  S2  hello there`` — the time at which it begins, who, what. With ``format: json`` the
lines are those of the JSON Lines file. On a terminal, what may still change stands lighter in the
last line until it is replaced. Rich is imported when a sink is opened there.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, ClassVar, Literal

import structlog
from pydantic import Field

from sinks.events import Event, dump
from sinks.lines import clock, lines, moment, one_line
from sinks.sink import SinkError, SinkSettings

if TYPE_CHECKING:
    from sinks.paint import Painter

log = structlog.get_logger(__name__)


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
                with suppress(SinkError):
                    await sink.write(painter.leave())


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
            # A pipe that nobody reads blocks: never on the event loop.
            await asyncio.to_thread(_write, text)
        except BrokenPipeError:
            # `livesat … | head`: the reader has had enough, which is no error of ours.
            self._closed = True
            _discard_output()
            log.info("standard output closed by its reader")
        except (OSError, ValueError) as error:
            raise SinkError(f"cannot write to standard output: {error}") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard_output() -> None:
    """Let the interpreter's last flush of standard output succeed."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
