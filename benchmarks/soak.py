"""Does a daemon with eight mixed live streams stay as it was? Lag, memory, and every event.

The daemon runs as a process of its own with the embedded checkpoint, a server, an outbox, a JSON
Lines sink and a file of open sessions. Eight senders bring the demo conversation at the speed it
was spoken, again and again: three over WebSocket, and one each by Deepgram's protocol, Twilio's,
raw TCP, RTP, and RTP once more with a tenth of its packets lost. A subscriber reads the feed.

    python -m benchmarks.soak              # ten minutes
    python -m benchmarks.soak --minutes 1
"""

import argparse
import asyncio
import base64
import json
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import soundfile
import websockets
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BLOCK_S = 0.1


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def mulaw(samples: np.ndarray) -> bytes:
    """Float [n] → G.711 μ-law."""
    value = np.clip(samples, -1, 1) * 8158
    sign = np.where(value < 0, 0x00, 0x80)
    magnitude = np.minimum(np.abs(value), 8158).astype(np.int32) + 33
    exponent = np.clip(np.floor(np.log2(magnitude)).astype(np.int32) - 5, 0, 7)
    mantissa = (magnitude >> (exponent + 1)) & 15
    return (~(sign ^ 0x80 | (exponent << 4) | mantissa) & 0xFF).astype(np.uint8).tobytes()


class Senders:
    """Eight live streams of one recording, each beginning elsewhere in it."""

    def __init__(self, audio: np.ndarray, ports: dict[str, int], stop: asyncio.Event) -> None:
        self.audio, self.ports, self.stop = audio, ports, stop
        self.narrow = audio[: len(audio) // 2 * 2].reshape(-1, 2).mean(1)

    async def paced(self, narrow: bool = False, offset_s: float = 0.0) -> Any:
        """Blocks of `BLOCK_S`, when they are due, until the stop."""
        audio, rate = (self.narrow, 8000) if narrow else (self.audio, 16_000)
        size, began, at = int(rate * BLOCK_S), time.monotonic(), int(offset_s * rate)
        count = 0
        while not self.stop.is_set():
            yield np.take(audio, range(at, at + size), mode="wrap")
            at, count = at + size, count + 1
            await asyncio.sleep(max(began + count * BLOCK_S - time.monotonic(), 0))

    async def websocket(self, number: int) -> None:
        """Our own protocol."""
        url = f"ws://127.0.0.1:{self.ports['server']}/v1/audio?name=ws{number}&partials=false"
        async with websockets.connect(url) as ws:
            reading = asyncio.create_task(self.drain(ws))
            async for block in self.paced(offset_s=7.0 * number):
                await ws.send((block * 32767).astype("<i2").tobytes())
            await ws.send('{"type": "close"}')
            await reading

    async def deepgram(self) -> None:
        """Deepgram's."""
        query = "encoding=linear16&sample_rate=16000&interim_results=true&diarize=true"
        url = f"ws://127.0.0.1:{self.ports['server']}/v1/listen?{query}"
        async with websockets.connect(url) as ws:
            reading = asyncio.create_task(self.drain(ws))
            async for block in self.paced(offset_s=30.0):
                await ws.send((block * 32767).astype("<i2").tobytes())
            await ws.send('{"type": "CloseStream"}')
            await reading

    async def twilio(self) -> None:
        """Twilio's: 8 kHz μ-law in JSON."""
        async with websockets.connect(f"ws://127.0.0.1:{self.ports['server']}/v1/twilio") as ws:
            start = {"callSid": "soak", "tracks": ["inbound"]}
            await ws.send(json.dumps({"event": "start", "start": start}))
            count = 0
            async for block in self.paced(narrow=True, offset_s=40.0):
                media = {
                    "track": "inbound",
                    "timestamp": str(round(count * BLOCK_S * 1000)),
                    "payload": base64.b64encode(mulaw(block)).decode(),
                }
                await ws.send(json.dumps({"event": "media", "media": media}))
                count += 1
            await ws.send(json.dumps({"event": "stop"}))
            await self.drain(ws)

    async def tcp(self) -> None:
        """Raw samples."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.ports["tcp"])
        async for block in self.paced(offset_s=50.0):
            writer.write((block * 32767).astype("<i2").tobytes())
            await writer.drain()
        writer.close()

    async def rtp(self, name: str, loss: float) -> None:
        """8 kHz μ-law in packets of 20 ms, some of which are lost."""
        rng = np.random.default_rng(0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            number = 0
            async for block in self.paced(narrow=True, offset_s=60.0):
                for piece in np.split(block, 5):
                    head = struct.pack("!BBHII", 0x80, 0, number & 0xFFFF, number * 160, 7)
                    if rng.random() >= loss:
                        sender.sendto(head + mulaw(piece), ("127.0.0.1", self.ports[name]))
                    number += 1

    @staticmethod
    async def drain(ws: Any) -> None:
        """Read until it is closed."""
        async for _ in ws:
            pass


class Subscriber:
    """Reads the feed: what it saw of each session, and the lag minute by minute."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.began = time.monotonic()
        self.seqs: dict[str, list[int]] = defaultdict(list)
        self.lags: dict[int, list[float]] = defaultdict(list)
        self.types: dict[str, int] = defaultdict(int)

    async def run(self) -> None:
        """Until it is cancelled."""
        url = f"ws://127.0.0.1:{self.port}/v1/events"
        async with websockets.connect(url, max_size=None) as ws:
            async for message in ws:
                event = json.loads(message)
                if "seq" not in event:
                    continue
                self.seqs[event["session_id"]].append(event["seq"])
                self.types[event["type"]] += 1
                if event["type"] in {"turn.started", "transcript.partial"}:
                    minute = int((time.monotonic() - self.began) / 60)
                    self.lags[minute].append(event["lag_ms"])


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def open_files(pid: int) -> int:
    """Open files of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def soak(minutes: float, console: Console) -> bool:
    """Run it → whether it stayed as it was."""
    server, tcp, rtp, lossy = free_ports(4)
    ports = {"server": server, "tcp": tcp, "rtp": rtp, "lossy": lossy}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = {
            "server": {"port": server, "max_streams": 8},
            "sources": {
                "tcp": {"kind": "tcp", "port": tcp, "streams": 1},
                "rtp": {"kind": "rtp", "port": rtp, "payload": "mulaw"},
                "lossy": {"kind": "rtp", "port": lossy, "payload": "mulaw"},
            },
            "sinks": {"log": {"kind": "jsonl", "path": str(folder / "events.jsonl")}},
            "fanout": {"outbox": str(folder / "outbox.db")},
            "session": {"state": str(folder / "sessions.db")},
            "log": {"level": "warning"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "stream", "run", "--config", str(folder / "config.yaml")]
        daemon = await asyncio.to_thread(subprocess.Popen, command, cwd=ROOT)
        try:
            ok = await _soak(minutes, ports, daemon, folder, console)
        finally:
            daemon.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(daemon.wait, 30)
        console.print(f"SIGTERM: exit code {code}")
        return ok and code == 0


async def _soak(
    minutes: float,
    ports: dict[str, int],
    daemon: "subprocess.Popen[bytes]",
    folder: Path,
    console: Console,
) -> bool:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['server']}") as http:
        while True:
            try:
                if (await http.get("/readyz")).status_code == 200:
                    break
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        samples, _ = soundfile.read(ROOT / "stream/demo/meeting.flac", dtype="float32")
        stop, subscriber = asyncio.Event(), Subscriber(ports["server"])
        senders = Senders(samples, ports, stop)
        reading = asyncio.create_task(subscriber.run())
        await asyncio.sleep(0.5)
        sending = [
            asyncio.create_task(each)
            for each in (
                *(senders.websocket(number) for number in range(3)),
                senders.deepgram(),
                senders.twilio(),
                senders.tcp(),
                senders.rtp("rtp", 0.0),
                senders.rtp("lossy", 0.1),
            )
        ]
        rows: list[tuple[int, float, int, float, float]] = []
        began = time.monotonic()
        cpu = 0.0
        for minute in range(max(round(minutes), 1)):
            left = began + min((minute + 1) * 60, minutes * 60) - time.monotonic()
            await asyncio.sleep(max(left, 0))
            lags = subscriber.lags.get(minute, [0.0])
            p99 = float(np.quantile(lags, 0.99))
            fds = await asyncio.to_thread(open_files, daemon.pid)
            rows.append((minute + 1, resident_mib(daemon.pid), fds, median(lags), p99))
            status = (await http.get("/v1/status")).json()
            cpu = status["compute_s"] / max(status["audio_s"], 1)
            console.print(
                f"minute {minute + 1}: {rows[-1][1]:.0f} MiB, {fds} files, lag "
                f"{median(lags):.0f} ms (p99 {p99:.0f}), {status['streams']} streams, "
                f"{100 * cpu:.1f} % of a core a stream"
            )
        stop.set()
        await asyncio.gather(*sending)
        await asyncio.sleep(3)
        reading.cancel()
    return _judge(rows, subscriber, folder, console)


def _judge(
    rows: list[tuple[int, float, int, float, float]],
    subscriber: Subscriber,
    folder: Path,
    console: Console,
) -> bool:
    table = Table("minute", "MiB", "open files", "lag p50, ms", "lag p99, ms")
    for row in rows:
        table.add_row(*(f"{each:.0f}" for each in row))
    console.print(table)
    written: dict[str, set[int]] = defaultdict(set)
    finals = 0
    for line in (folder / "events.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        written[event["session_id"]].add(event["seq"])
        finals += event["is_final"]
    holes = sum(
        seqs != list(range(seqs[0], seqs[0] + len(seqs))) for seqs in subscriber.seqs.values()
    )
    missing = sum(len(set(seqs) - written[s]) for s, seqs in subscriber.seqs.items())
    console.print(
        f"{sum(map(len, subscriber.seqs.values()))} events of {len(subscriber.seqs)} sessions "
        f"({finals} finals): {holes} sessions with a hole in seq, {missing} events that the feed "
        f"gave and the JSON Lines sink has not"
    )
    steady = [row for row in rows if row[0] > 1] or rows
    growth = steady[-1][1] - steady[0][1]
    slope = growth / max(steady[-1][0] - steady[0][0], 1) * 60
    drift = steady[-1][3] / max(steady[0][3], 1.0)
    console.print(
        f"after the first minute: memory {growth:+.1f} MiB ({slope:+.0f} MiB/h), "
        f"open files {steady[-1][2] - steady[0][2]:+d}, median lag ×{drift:.2f}"
    )
    return holes == 0 and missing == 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    sys.exit(0 if asyncio.run(soak(given.minutes, Console())) else 1)


if __name__ == "__main__":
    main()
