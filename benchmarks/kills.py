"""Does a daemon that is killed, or a connection that is cut, cost a caller anything?

Rows 3 and 8 of the reliability bar with the embedded checkpoint: the daemon is killed again and
again while a caller speaks (``daemon``), and a caller's WebSocket is cut every ten seconds while it
speaks in real time (``cuts``). What the caller and the sinks have in the end is held against a run
that nobody disturbed.

    python -m benchmarks.kills                        # both, small
    python -m benchmarks.kills daemon --times 50
    python -m benchmarks.kills cuts --minutes 10

It ends with tables of what was found beside what must hold, and with 1 if something does not.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import websockets
from rich.console import Console

from benchmarks.daemon import ROOT, Daemon, free_ports
from benchmarks.verdict import Verdict
from sinks.events import parse
from tests.stream.house import about_audio, finals

RATE = 16_000
BLOCK = 3200
CUT_S = 10.0

Event = dict[str, Any]


class Caller:
    """Speaks a recording over one session, however often it must connect.

    Attributes:
        events: What it was told, each once.
        reconnections: How often it came back.
    """

    def __init__(self, daemon: Daemon, data: bytes) -> None:
        self.daemon, self.data = daemon, data
        self.events: list[Event] = []
        self.reconnections = -1
        self._token: str | None = None

    async def speak(self, seconds: float | None, *, paced: bool = False) -> bool:
        """Connect, say so much, and leave without a word → whether all was said and answered.

        Args:
            seconds: Of audio; None: the rest, and wait for the end.
            paced: No faster than it was spoken.
        """
        query = "name=desk"
        if self._token is not None:
            after = self.events[-1]["seq"] if self.events else -1
            query += f"&resume={self._token}&have=0&after={after}"
        async with websockets.connect(self.daemon.url(f"/v1/audio?{query}"), max_size=None) as ws:
            ready = json.loads(await ws.recv())
            self._token = ready["resume_token"]
            self.reconnections += 1
            begin = ready["received"] * 2
            end = len(self.data)
            if seconds is not None:
                end = min(begin + int(seconds * RATE) * 2, end)
            reading = asyncio.create_task(self._read(ws))
            began = time.monotonic()
            for at in range(begin, end, BLOCK):
                await ws.send(self.data[at : min(at + BLOCK, end)])
                due = began + (at + BLOCK - begin) / 2 / RATE
                await asyncio.sleep(max(due - time.monotonic(), 0) if paced else 0)
            if end == len(self.data):
                await ws.send('{"type": "close"}')
                await reading
                return True
            if not paced:  # some of it is answered before the end
                await asyncio.wait({reading}, timeout=1.0)
            ws.transport.abort()
            await asyncio.gather(reading, return_exceptions=True)
            return False

    async def _read(self, ws: Any) -> None:
        async for message in ws:
            self.events.append(json.loads(message))


def _recording(seconds: float) -> bytes:
    samples, _ = soundfile.read(ROOT / "stream/demo/meeting.flac", dtype="int16")
    return np.resize(samples, int(seconds * RATE)).astype("<i2").tobytes()


def _tree(folder: Path, port: int, **session: Any) -> dict[str, Any]:
    return {
        "server": {"port": port, "max_streams": 1, "connects_per_minute": 10_000},
        "sinks": {
            "log": {"kind": "jsonl", "path": str(folder / "events.jsonl")},
            "turns": {"kind": "rttm", "path": str(folder / "turns.rttm")},
        },
        "fanout": {"outbox": str(folder / "outbox.db")},
        "session": {"heartbeat_s": 0, **session},
        "log": {"level": "error"},
    }


async def _undisturbed(data: bytes) -> list[Event]:
    """What is said of a recording when nothing happens."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        async with Daemon(folder, port).running(_tree(folder, port)) as daemon:
            caller = Caller(daemon, data)
            await caller.speak(None)
    return caller.events


async def kill(times: int, console: Console) -> bool:
    """Row 3: the daemon is killed so many times."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = _recording(4.0 * (times + 1))
        whole = await _undisturbed(data)
        (port,) = free_ports(1)
        # Often: what is sent before a session is saved for the first time is not gone on with.
        state = {"state": str(folder / "sessions.db"), "save_s": 0.1}
        tree = _tree(folder, port, **state)
        daemon = Daemon(folder, port)
        caller = Caller(daemon, data)
        for _ in range(times):
            await daemon.start(tree)
            speaking = asyncio.create_task(caller.speak(rng.uniform(1.0, 4.0)))
            # Amid the audio, amid the answers, or after both.
            await asyncio.wait({speaking}, timeout=rng.uniform(0.3, 3.0))
            await daemon.kill()
            await asyncio.gather(speaking, return_exceptions=True)
        async with daemon.running(tree):
            await caller.speak(None)
        tracebacks = daemon.tracebacks
        lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
        torn, written = _whole(lines)
        turns = (folder / "turns.rttm").read_text().splitlines(keepends=True)
        torn_turns = sum(len(each.split()) != 10 or not each.endswith("\n") for each in turns)
    # A partial on its way to a sink when the daemon dies: the caller is told it, the sink is not.
    told = {each["seq"]: each for each in caller.events if not parse(json.dumps(each)).is_final}
    partials = told.keys() - written.keys()
    holes = _unsaid({**told, **written})
    said = about_audio([written[seq] for seq in sorted(written)])
    once = [event for n, event in enumerate(said) if event not in said[:n]]
    verdict = Verdict(f"{times} times kill -9 amid a call of {len(data) / 2 / RATE:.0f} s")
    verdict.tell("events", len(written))
    verdict.tell("came back to its session", caller.reconnections)
    verdict.exactly("holes in seq that nobody told of", holes, 0)
    verdict.tell("partials that the caller has and the file has not", len(partials))
    # Said at the very moment of a kill, and made again: ADR 10.
    verdict.tell("said twice, under two numbers", len(said) - len(once))
    verdict.exactly(
        "finals unlike those of an undisturbed run", _unlike(once, about_audio(whole)), 0
    )
    verdict.exactly("torn lines of JSON", torn, 0)
    verdict.exactly("torn lines of RTTM", torn_turns, 0)
    verdict.exactly("exceptions", tracebacks, 0)
    return verdict.show(console)


def _whole(lines: list[bytes]) -> tuple[int, dict[int, Event]]:
    """Lines of JSON → how many are torn, and the events by ``seq``."""
    torn, written = 0, dict[int, Event]()
    for line in lines:
        try:
            written[parse(line).seq] = json.loads(line)
        except ValueError:
            torn += 1
    return torn, written


def _unsaid(written: Mapping[int, Event]) -> int:
    """Numbers that no event has, besides those that a session says it skips after a kill."""
    missing = set(range(max(written, default=-1) + 1)) - written.keys()
    for event in written.values():
        if event.get("code") == "session.resumed":
            first, last = map(int, re.findall(r"\d+", event["message"]))
            missing -= set(range(first, last + 1))
    return len(missing)


def _unlike(ours: Sequence[Event], theirs: Sequence[Event]) -> int:
    """Events that differ, are missing or are too many."""
    differ = sum(a != b for a, b in zip(ours, theirs, strict=False))
    return differ + abs(len(ours) - len(theirs))


async def cuts(minutes: float, console: Console) -> bool:
    """Row 8: a caller's connection is cut every ten seconds."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = _recording(minutes * 60)
        whole = await _undisturbed(data)
        (port,) = free_ports(1)
        daemon = Daemon(folder, port)
        async with daemon.running(_tree(folder, port)):
            caller = Caller(daemon, data)
            while not await caller.speak(CUT_S + rng.uniform(-0.5, 0.5), paced=True):
                pass
        tracebacks = daemon.tracebacks
    got = {event["seq"]: event for event in caller.events}
    verdict = Verdict(f"a WebSocket cut every {CUT_S:g} s for {minutes:g} min")
    verdict.tell("cuts", caller.reconnections)
    verdict.tell("events", len(got))
    verdict.exactly("events told twice", len(caller.events) - len(got), 0)
    verdict.exactly("holes in seq", max(got) + 1 - len(got), 0)
    cut = finals([got[seq] for seq in sorted(got)])
    verdict.exactly("finals unlike those of an uncut run", _unlike(cut, finals(whole)), 0)
    verdict.exactly("exceptions", tracebacks, 0)
    return verdict.show(console)


async def measure(given: argparse.Namespace, console: Console) -> bool:
    """All that is asked for → whether all held."""
    ok = True
    if given.what in {"daemon", "both"}:
        ok &= await kill(given.times, console)
    if given.what in {"cuts", "both"}:
        ok &= await cuts(given.minutes, console)
    return ok


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["daemon", "cuts", "both"], nargs="?", default="both")
    parser.add_argument("--times", type=int, default=3, help="kills of the daemon")
    parser.add_argument("--minutes", type=float, default=0.5, help="of a connection that is cut")
    sys.exit(0 if asyncio.run(measure(parser.parse_args(), Console())) else 1)


if __name__ == "__main__":
    main()
