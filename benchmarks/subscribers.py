"""Does one subscriber that never reads cost the other ninety-nine anything?

Row 9 of the reliability bar: the daemon's server and its feed in this process, subscribers over
WebSocket in another, events of two kilobytes. First all of them read; then one connects that never
does.

    python -m benchmarks.subscribers

It ends with a table of what was found beside what must hold, and with 1 if something does not.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import websockets
from rich.console import Console

from benchmarks.daemon import ROOT, free_ports, resident_mib
from benchmarks.verdict import Verdict
from stream.pulse import few_arenas, give_back
from stream.server import ServerSettings
from stream.web.server import serve
from tests.sinks.samples import Talk
from tests.stream.house import until
from tests.stream.test_server import Desk

SLOWER_MS = 20.0
GROWTH_MIB = 16.0
EVICTED_S = 5.0
RATE = 20.0
PADDING = "x" * 2000


async def read(port: int, readers: int, seconds: float) -> list[float]:
    """So many subscribers, for so long → seconds from an event's making to its arrival."""
    delays: list[float] = []

    async def one() -> None:
        url = f"ws://127.0.0.1:{port}/v1/events"
        async with websockets.connect(url, max_size=None, compression=None) as ws:
            await ws.recv()
            async for message in ws:
                made = json.loads(message)["message"].partition(" ")[0]
                delays.append(time.time() - float(made))

    reading = [asyncio.create_task(one()) for _ in range(readers)]
    await asyncio.sleep(seconds)
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    return delays


def _never_reads(port: int) -> socket.socket:
    """A subscriber that asks for everything, and takes nothing of it."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect(("127.0.0.1", port))
    line.sendall(
        b"GET /v1/events?cursor=0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return line


async def _others(port: int, readers: int, seconds: float) -> float:
    """p99 of the delay of that many, in a process of their own, in milliseconds."""
    given = ["--port", str(port), "--readers", str(readers), "--seconds", str(seconds)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.subscribers", *given),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    return float(out)


async def measure(readers: int, seconds: float, console: Console) -> bool:
    """Run it → whether all held."""
    desk, talk = Desk(), Talk()
    # One that never reads asks for all there is: the kernel's buffers are full at once.
    for _ in range(2000):
        desk.feed.publish(talk.warning(f"{time.time()} {PADDING}"))
    (port,) = free_ports(1)
    settings = ServerSettings(
        port=port, max_connections_per_ip=2 * readers, connects_per_minute=10_000
    )

    async def publish() -> None:
        began, count = time.monotonic(), 0
        while True:
            desk.feed.publish(talk.warning(f"{time.time()} {PADDING}"))
            count += 1
            await asyncio.sleep(max(began + count / RATE - time.monotonic(), 0))

    with socket.create_server(("127.0.0.1", port), backlog=256) as listening:
        beside = [
            asyncio.create_task(each)
            for each in (serve(settings, desk, listening), publish(), give_back())
        ]
        all_read = await _others(port, readers, seconds)
        before = resident_mib(os.getpid())
        told = asyncio.create_task(_others(port, readers - 1, seconds))
        await until(lambda: len(desk.feed) >= readers - 1)
        stuck = _never_reads(port)
        with stuck:
            await until(lambda: len(desk.feed) >= readers)
            began = time.monotonic()
            gone = asyncio.create_task(until(lambda: len(desk.feed) < readers))
            await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
            took = time.monotonic() - began
            beside_it = await told
        growth = resident_mib(os.getpid()) - before
        desk.stop.set()
        await beside[0]
        for task in beside[1:]:
            task.cancel()
    verdict = Verdict(f"{readers} subscribers, {RATE:g} events of 2 kB a second")
    verdict.tell("p99 when all read", all_read, "ms")
    verdict.most("p99 of the others more", beside_it - all_read, SLOWER_MS, "ms")
    verdict.most("who never reads is gone after", took, EVICTED_S + 1, "s")
    verdict.most("growth of memory", growth, GROWTH_MIB, "MiB")
    return verdict.show(console)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20, help="of each part")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    few_arenas()
    if given.port is not None:
        delays = asyncio.run(read(given.port, given.readers, given.seconds))
        print(1000 * float(np.quantile(delays, 0.99)))
        return
    sys.exit(0 if asyncio.run(measure(given.readers, given.seconds, Console())) else 1)


if __name__ == "__main__":
    main()
