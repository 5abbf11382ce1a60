"""How much of a core does a live stream of the embedded checkpoint take?

    python -m benchmarks.streams            # the demo conversation; 1, 4 and 8 streams a batch
    python -m benchmarks.streams --profile  # where one stream's time goes

Sessions, chunkers, encoder, heads, tracks and events run on one compute thread as in the daemon;
sources and sinks do not. Counted is the processor time of the process, which other programs on the
machine change little: processor seconds for a hundred seconds of one stream's audio.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from benchmarks.daemon import MEETING
from benchmarks.machine import describe
from sinks.events import Latency
from stream.chunker import Chunker
from stream.engine import Engine
from stream.evaluate import thresholds
from stream.inference import EngineSettings
from stream.session import Session
from stream.sources.source import Block
from stream.tracks import LanguageModel, Tracks, TracksSettings

RATE = 16_000


def open_session(
    engine: Engine, settings: TracksSettings, name: str, language: LanguageModel | None = None
) -> Session:
    """A stream of an engine that no source brings: feed it, and give it its frames."""
    loaded, given = engine.loaded, engine.settings
    return Session(
        stream_id=name,
        source="benchmark",
        checkpoint=loaded.names,
        latency=Latency(chunk_ms=given.chunk_ms, lookahead_ms=given.lookahead_ms),
        slot=engine.acquire(),
        chunker=Chunker(loaded.chunk_samples, loaded.lead, receptive=loaded.receptive),
        tracks=lambda stamp: Tracks(
            settings,
            embed=engine.embed,
            vocabulary=loaded.vocabulary,
            language=language,
            stamp=stamp,
        ),
    )


async def cost(engine: Engine, streams: int, seconds: float) -> float:
    """Processor seconds a second of one stream, ``streams`` of them in every batch."""
    audio, rate = sf.read(MEETING, dtype="float32")
    assert rate == RATE
    size = engine.loaded.chunk_samples
    steps = round(seconds * RATE / size)
    audio = np.resize(audio, steps * size)
    settings = thresholds(engine)
    sessions = [open_session(engine, settings, f"s{number}") for number in range(streams)]
    # each stream is elsewhere in the conversation, as live ones are
    shifted = [np.roll(audio, -number * size * 7) for number in range(streams)]
    began = time.process_time()
    for step in range(steps):
        ready = []
        for session, samples in zip(sessions, shifted, strict=True):
            part = samples[step * size : (step + 1) * size]
            _, chunks = session.feed(Block(samples=part, captured=time.monotonic()))
            ready += chunks
        for session, frames in zip(sessions, await engine.run(ready), strict=True):
            session.take(frames)
    spent = time.process_time() - began
    for session in sessions:
        engine.release(session.slot)
    return spent / (steps * size / RATE) / streams


async def measure(args: argparse.Namespace) -> dict[str, float]:
    """Every number of streams in turn, on one engine."""
    settings = EngineSettings(threads=1, slots=max(args.streams), chunk_ms=args.chunk_ms)
    found: dict[str, float] = {}
    async with Engine(settings) as engine:
        await cost(engine, 1, 10)
        if args.profile:
            profile = cProfile.Profile()
            profile.enable()
            await cost(engine, 1, args.seconds)
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        for streams in args.streams:
            found[str(streams)] = 100 * await cost(engine, streams, args.seconds)
    return found


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seconds", type=float, default=60, help="of audio a stream")
    parser.add_argument("--chunk-ms", type=int, default=500)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = asyncio.run(measure(args))
    print(describe())
    for streams, percent in found.items():
        print(f"{streams:>3} streams: {percent:5.2f} % of a core each")
    if args.json:
        args.json.write_text(json.dumps(found | {"machine": describe()}, indent=2))


if __name__ == "__main__":
    main()
