"""Ten thousand hostile connections: does anything break, grow, or slow a good client down?

The daemon runs as a process of its own with the embedded checkpoint. One good client streams the
demo conversation at the speed it was spoken, first alone and then beside clients that send
messages that are too long, half samples, JSON that is none, values that are no audio, floods of
tiny messages, tokens that are not known, bytes that are no HTTP, and requests that never end.

    python -m benchmarks.hostile --cases 10000

It ends with a table of what was found beside what must hold, and with 1 if something does not.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import websockets
from rich.console import Console

from benchmarks.daemon import ROOT, Daemon, free_ports
from benchmarks.verdict import Verdict

ALONE_S = 20.0
GROWTH_MIB = 32.0
SLOWER = 2.0
AT_ONCE = 8


async def good_client(port: int, stop: asyncio.Event, lags: list[tuple[float, float]]) -> None:
    """Streams in real time; notes when each event came and how late it was."""
    samples, _ = soundfile.read(ROOT / "stream/demo/meeting.flac", dtype="int16")
    url = f"ws://127.0.0.1:{port}/v1/audio?name=good"
    async with websockets.connect(url, ping_interval=None) as ws:

        async def read() -> None:
            async for message in ws:
                event = json.loads(message)
                if event.get("type") in {"turn.started", "transcript.partial"}:
                    lags.append((time.monotonic(), event["lag_ms"]))

        reading = asyncio.create_task(read())
        began, at = time.monotonic(), 0
        while not stop.is_set():
            await ws.send(np.take(samples, range(at, at + 1600), mode="wrap").tobytes())
            at += 1600
            await asyncio.sleep(max(began + at / 16_000 - time.monotonic(), 0))
        await ws.send('{"type": "close"}')
        await reading


async def attack(port: int, rng: np.random.Generator) -> str:
    """One hostile connection → what became of it."""
    kind = int(rng.integers(8))
    base = f"ws://127.0.0.1:{port}"
    nan = np.full(500, np.nan, "<f4").tobytes() + np.full(500, 1e38, "<f4").tobytes()
    cases: list[tuple[str, list[bytes | str]]] = [
        ("/v1/audio", [bytes(1 << 18)]),
        ("/v1/audio", [b"x"]),
        ("/v1/audio", [str(rng.choice(["{", "[]", "\x00", '{"type": "?"}']))]),
        ("/v1/audio?encoding=f32le", [nan, '{"type": "close"}']),
        ("/v1/audio", ['{"type": "keepalive"}'] * 500),
        (f"/v1/audio?resume={'x' * int(rng.integers(1, 3000))}", []),
        (str(rng.choice(["/v1/listen?encoding=%00", "/v1/events?types=x", "/v1/twilio"])), ["{}"]),
    ]
    if kind == 7:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(rng.bytes(200) if rng.random() < 0.5 else b"GET / HTTP/1.1\r\nHost: x\r\nA:")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.close()
        return "no request"
    path, messages = cases[kind]
    try:
        async with asyncio.timeout(10), websockets.connect(base + path, max_size=None) as ws:
            for message in messages:
                await ws.send(message)
            if kind == 1:
                ws.transport.abort()
                return "gone"
            async for _ in ws:
                pass
            return str(ws.close_code)
    except websockets.ConnectionClosed as closed:
        return str(closed.rcvd.code if closed.rcvd else "cut")
    except (OSError, TimeoutError, websockets.InvalidHandshake) as error:
        return type(error).__name__


async def measure(cases: int, console: Console) -> bool:
    """Run it → whether all held."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = {
            "server": {
                "port": port,
                "max_streams": 16,
                "max_message_bytes": 1 << 17,
                "connects_per_minute": 1_000_000,
            },
            "log": {"level": "error"},
        }
        daemon, stop, lags = Daemon(folder, port), asyncio.Event(), list[tuple[float, float]]()
        async with daemon.running(tree), daemon.http() as http:
            good = asyncio.create_task(good_client(port, stop, lags))
            await asyncio.sleep(ALONE_S)
            before, began = daemon.mib, time.monotonic()
            outcomes: Counter[str] = Counter()
            rng = np.random.default_rng(1)
            left = iter(range(cases))

            async def attacker() -> None:
                for _ in left:
                    outcomes[await attack(port, rng)] += 1

            await asyncio.gather(*(attacker() for _ in range(AT_ONCE)))
            took = time.monotonic() - began
            after = daemon.mib
            stop.set()
            await good
            status = (await http.get("/v1/status")).json()
        faults = status["faults"] + daemon.tracebacks
    alone = float(np.quantile([lag for at, lag in lags if at < began], 0.99))
    beside = float(np.quantile([lag for at, lag in lags if at >= began] or [np.inf], 0.99))
    console.print(f"{cases} cases in {took:.0f} s: {dict(outcomes.most_common())}")
    verdict = Verdict(f"{cases} hostile connections beside a good client")
    verdict.exactly("cases", outcomes.total(), cases)
    verdict.exactly("exceptions nobody took", faults, 0)
    verdict.tell("memory before", before, "MiB")
    verdict.most("growth of memory", after - before, GROWTH_MIB, "MiB")
    verdict.tell("the good client's p99 alone", alone, "ms")
    verdict.most("its p99 beside them", beside / alone, SLOWER, "×")
    verdict.exactly("exit code after SIGTERM", -1 if daemon.code is None else daemon.code, 0)
    return verdict.show(console)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    given = parser.parse_args()
    sys.exit(0 if asyncio.run(measure(given.cases, Console())) else 1)


if __name__ == "__main__":
    main()
