"""Does a session that lasts a day end as it began?

The encoder hears the demo conversation once; then one session gets what it made of it again and
again, for a day of audio: chunker, tracks with the search for words, events, and the feed.

    python -m benchmarks.day             # 24 hours of audio
    python -m benchmarks.day --hours 3

The day is virtual: nothing waits for a clock. It ends with a table of what was found beside what
must hold, and with 1 if something does not.
"""

import argparse
import asyncio
import gc
import os
import sys
import time
from dataclasses import dataclass, replace
from statistics import median

import soundfile as sf
import torch
from rich.console import Console

from benchmarks.daemon import MEETING, OVERHEAD, SLOPE_MIB_H, resident_mib
from benchmarks.streams import open_session
from benchmarks.verdict import Verdict
from stream.batcher import Ready
from stream.clock import SAMPLE_RATE
from stream.engine import Engine
from stream.evaluate import thresholds
from stream.feed import Feed
from stream.inference import EngineSettings
from stream.pulse import trim
from stream.sources.source import Block
from stream.tracks import open_language_model
from stream.tracks.frames import Frames

SLOWER = 1.25
"""Processor time of the last hours, beside that of the first: what a shared machine can tell."""
BESIDE = 3
"""Hours at either end whose median is meant by that."""


@dataclass(frozen=True)
class Hour:
    """How things were at the end of an hour.

    Attributes:
        mib: Resident memory of the process.
        history_mib: Of that, lines of the feed.
        saved_kib: Size of a saved session, without the encoder's state.
        cpu_s: Processor seconds of the hour.
        events: How many were made in it.
    """

    mib: float
    history_mib: float
    saved_kib: float
    cpu_s: float
    events: int


class Day:
    """One session, and what the encoder made of the conversation it hears."""

    def __init__(self, engine: Engine) -> None:
        audio, rate = sf.read(MEETING, dtype="float32")
        assert rate == SAMPLE_RATE
        self.engine = engine
        self.size = engine.loaded.chunk_samples
        self.chunks = len(audio) // self.size
        self.audio = audio[: self.chunks * self.size]
        self.feed = Feed()
        settings = thresholds(engine)
        language = open_language_model(
            settings.words, engine.loaded.language_file, engine.loaded.vocabulary
        )
        self.session = open_session(engine, settings, "day", language)
        for event in self.session.opened():
            self.feed.publish(event)

    async def listen(self) -> list[Frames]:
        """Hear the conversation twice → what the encoder makes of it the second time."""
        heard = list[Frames]()
        for chunk in range(2 * self.chunks):
            ready = self._say(chunk)
            (frames,) = await self.engine.run(ready)
            heard.append(frames)
            self._take(frames)
        return heard[self.chunks :]

    def hour(self, number: int, heard: list[Frames]) -> Hour:
        """Hear an hour of it; the first is 0."""
        hour = round(3600 * SAMPLE_RATE / self.size)
        began, events = time.process_time(), 0
        for count in range(number * hour, (number + 1) * hour):
            turn, chunk = divmod(count, self.chunks)
            self._say(count)
            shift = (turn + 1) * len(self.audio)
            events += self._take(replace(heard[chunk], start=heard[chunk].start + shift))
        cpu_s = time.process_time() - began
        saved = self.session.freeze()(b"")
        gc.collect()
        trim()
        kept = self.feed.kept / (1 << 20)
        return Hour(resident_mib(os.getpid()), kept, len(saved) / 1024, cpu_s, events)

    def _say(self, count: int) -> list[Ready]:
        first = count % self.chunks * self.size
        block = Block(self.audio[first : first + self.size], time.monotonic())
        _, ready = self.session.feed(block)
        return ready

    def _take(self, frames: Frames) -> int:
        events = self.session.take(frames)
        for event in events:
            self.feed.publish(event)
        return len(events)


async def live(hours: int, console: Console) -> list[Hour]:
    """Hear so many hours → how each ended."""
    found = list[Hour]()
    async with Engine(EngineSettings(threads=1, slots=1)) as engine:
        day = Day(engine)
        heard = await day.listen()
        for number in range(hours):
            hour = day.hour(number, heard)
            found.append(hour)
            console.print(
                f"hour {number + 1}: {hour.mib:.1f} MiB, {hour.history_mib:.1f} of them history, "
                f"{hour.saved_kib:.0f} KiB to save, {hour.cpu_s:.0f} s of a core, "
                f"{hour.events} events",
                highlight=False,
            )
    return found


def judge(found: list[Hour]) -> Verdict:
    """The last hour beside the second: in the first, all that is kept for a while fills."""
    verdict = Verdict(f"{len(found)} virtual hours")
    second, last = found[1], found[-1]
    hours = len(found) - 2
    growth = last.mib - second.mib - (last.history_mib - second.history_mib) * OVERHEAD
    verdict.tell("audio", 3600.0 * len(found), "s")
    verdict.tell("events", sum(hour.events for hour in found))
    verdict.tell("a core", 100 * sum(hour.cpu_s for hour in found) / 3600 / len(found), "%")
    verdict.most("memory an hour, without history", growth / hours, SLOPE_MIB_H, "MiB")
    grown = (last.saved_kib - second.saved_kib) / 1024 / hours
    verdict.most("a saved session grows an hour", grown, SLOPE_MIB_H, "MiB")
    early, late = (median(h.cpu_s for h in part) for part in (found[1:][:BESIDE], found[-BESIDE:]))
    verdict.most("processor time of an hour beside that of the first", late / early, SLOWER, "×")
    more = max(hour.events for hour in found[1:]) - min(hour.events for hour in found[1:])
    verdict.most("events an hour, most less least", more, second.events // 100)
    return verdict


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=int, default=24)
    given = parser.parse_args()
    if given.hours < 3:
        parser.error("--hours: expected 3 or more: growth is judged from the second on")
    torch.set_num_threads(1)
    console = Console()
    found = asyncio.run(live(given.hours, console))
    sys.exit(0 if judge(found).show(console) else 1)


if __name__ == "__main__":
    main()
