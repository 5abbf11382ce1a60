"""JSON Lines: every event as one line of a file, complete or absent."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import structlog
from pydantic import Field

from sinks.events import Event, dump
from sinks.files import LineFile
from sinks.sink import SinkSettings

log = structlog.get_logger(__name__)


class JsonlSettings(SinkSettings, frozen=True):
    """A file with one JSON object a line, in the order of the events."""

    kind: Literal["jsonl"] = "jsonl"
    path: Path = Field(description="The file; its folder must exist.")
    existing: Literal["append", "replace"] = Field(
        default="append", description="What becomes of a file that is already there."
    )
    fsync: bool = Field(
        default=False, description="Wait for the disk after every event, against power loss."
    )
    rotate_bytes: int | None = Field(
        default=None, ge=1, description="Begin a new file rather than grow beyond this size."
    )
    rotate_keep: int = Field(
        default=5, ge=1, description="Old files kept, as path.1 (the newest) to path.N."
    )

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["JsonlSink"]:
        """Open the file; a last line torn by an earlier crash is closed or, if cut short, dropped.

        Raises:
            SinkError: the file cannot be written, or someone else writes it.
        """
        file = LineFile(self.path, replace=self.existing == "replace", fsync=self.fsync)
        await asyncio.to_thread(file.open)
        try:
            torn = await asyncio.to_thread(file.mend, _is_json)
            if torn:
                log.warning("dropped a torn last line", path=str(file.path), bytes=len(torn))
            yield JsonlSink(file, self)
        finally:
            await asyncio.to_thread(file.close)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class JsonlSink:
    """An open JSON Lines file."""

    def __init__(self, file: LineFile, settings: JsonlSettings) -> None:
        self._file = file
        self._limit = settings.rotate_bytes
        self._keep = settings.rotate_keep

    async def send(self, event: Event) -> None:
        """Append the event's line with a single write.

        Raises:
            SinkError: nothing was written: disk full, say.
        """
        await asyncio.to_thread(self._write, dump(event) + b"\n")

    def _write(self, line: bytes) -> None:
        size = self._file.size
        if self._limit is not None and size > 0 and size + len(line) > self._limit:
            self._file.rotate(self._keep)
        self._file.append(line)
