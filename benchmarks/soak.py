"""Does a daemon with eight mixed live streams stay as it was? Lag, memory, and every event.

The daemon runs as a process of its own with the embedded checkpoint, a server, an outbox and a file
of open sessions. Senders bring the demo conversation at the speed it was spoken, again and again:
over WebSocket, by Deepgram's protocol, Twilio's, raw TCP, Wyoming (utterance after utterance), RTP
with a tenth of its packets lost, MPEG-TS by ffmpeg, and into a microphone that is not one. Where
ffmpeg or PulseAudio are absent, a WebSocket takes the place. Events go to a file, to mosquitto and
to NATS JetStream, as far as these are installed, and to a subscriber of the feed.

    python -m benchmarks.soak              # ten minutes
    python -m benchmarks.soak --minutes 1

It ends with a table of what was found beside what must hold, and with 1 if something does not.
With ``--untimed`` it does not judge what a busy machine causes: lateness, audio that was lost
because nobody was in time to take it, and then memory, since audio waits in it. Growth is judged
from three minutes on, and what a daemon keeps for a while is bounded so that it is full by then:
what grows later has no bound.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiomqtt
import numpy as np
import soundfile
import websockets
from rich.console import Console
from rich.table import Table
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient

from benchmarks.daemon import MEETING, OVERHEAD, SLOPE_MIB_H, Daemon, free_ports, open_files
from benchmarks.verdict import Verdict
from tests.broker import Broker, Server, mosquitto, nats_server, stored
from tests.microphone import MISSING, FakeMicrophone
from tests.stream.test_live_sources import Sender

BLOCK_S = 0.1
RATE = 16_000
UTTERANCE_S = 20.0
LOSS = 0.1

LAG_DRIFT = 1.25
"""Median lag of the last minute, beside that of the second."""
LOOP_MS = 20.0
RESOLUTION_MIB = 4.0
"""Pages that come and go: what a few minutes can tell of memory; twice that on a busy machine."""
TURNS = 16
"""Turns a session remembers: full within a minute, where the default takes ten."""
FFMPEG = {"fifo_size": "2048", "probesize": "300000"}
"""Packets of its ring, bytes it looks at: full within half a minute, the defaults take eight."""
ANSWERED_S = 120.0
"""How long the rest may take on a machine that has fallen behind."""
ONE_STREAM = 8
"""Tasks of a stream: an utterance more or less is no leak."""


def mulaw(samples: np.ndarray) -> bytes:
    """Float [n] → G.711 μ-law."""
    value = np.clip(samples, -1, 1) * 8158
    sign = np.where(value < 0, 0x00, 0x80)
    magnitude = np.minimum(np.abs(value), 8158).astype(np.int32) + 33
    exponent = np.clip(np.floor(np.log2(magnitude)).astype(np.int32) - 5, 0, 7)
    mantissa = (magnitude >> (exponent + 1)) & 15
    return (~(sign ^ 0x80 | (exponent << 4) | mantissa) & 0xFF).astype(np.uint8).tobytes()


def pcm(samples: np.ndarray) -> bytes:
    """Float [n] → s16le."""
    return (samples * 32767).astype("<i2").tobytes()


def connect(url: str) -> Any:
    """A WebSocket that waits for a daemon that does not keep up: it slows its callers down."""
    return websockets.connect(url, max_size=None, ping_interval=None)


class Senders:
    """Live streams of one recording, each beginning elsewhere in it.

    Attributes:
        sent: Name of a stream → seconds of audio sent.
        lost: Likewise → seconds that were left out on the way.
    """

    def __init__(self, audio: np.ndarray, ports: dict[str, int], stop: asyncio.Event) -> None:
        self.audio, self.ports, self.stop = audio, ports, stop
        self.narrow = audio[: len(audio) // 2 * 2].reshape(-1, 2).mean(1)
        self.sent: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    async def paced(self, name: str, narrow: bool = False, offset_s: float = 0.0) -> Any:
        """Blocks of `BLOCK_S`, when they are due, until the stop."""
        audio, rate = (self.narrow, RATE // 2) if narrow else (self.audio, RATE)
        size, began, at = int(rate * BLOCK_S), time.monotonic(), int(offset_s * rate)
        count = 0
        while not self.stop.is_set():
            yield np.take(audio, range(at, at + size), mode="wrap")
            at, count = at + size, count + 1
            self.sent[name] += BLOCK_S
            await asyncio.sleep(max(began + count * BLOCK_S - time.monotonic(), 0))

    def url(self, path: str) -> str:
        """Of the daemon's server."""
        return f"ws://127.0.0.1:{self.ports['server']}{path}"

    async def websocket(self, name: str, offset_s: float = 0.0) -> None:
        """Our own protocol."""
        url = self.url(f"/v1/audio?name={name}&partials=false")
        async with connect(url) as ws:
            reading = asyncio.create_task(self.drain(ws))
            async for block in self.paced(name, offset_s=offset_s):
                await ws.send(pcm(block))
            await ws.send('{"type": "close"}')
            await reading

    async def deepgram(self) -> None:
        """Deepgram's."""
        query = "encoding=linear16&sample_rate=16000&interim_results=true&diarize=true"
        async with connect(self.url(f"/v1/listen?{query}")) as ws:
            reading = asyncio.create_task(self.drain(ws))
            async for block in self.paced("listen", offset_s=30.0):
                await ws.send(pcm(block))
            await ws.send('{"type": "CloseStream"}')
            await reading

    async def twilio(self) -> None:
        """Twilio's: 8 kHz μ-law in JSON."""
        async with connect(self.url("/v1/twilio")) as ws:
            start = {"callSid": "soak", "tracks": ["inbound"]}
            await ws.send(json.dumps({"event": "start", "start": start}))
            count = 0
            async for block in self.paced("soak", narrow=True, offset_s=40.0):
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
        async for block in self.paced("tcp", offset_s=50.0):
            writer.write(pcm(block))
            await writer.drain()
        writer.close()

    async def wyoming(self) -> None:
        """Home Assistant's: a session an utterance."""
        client = AsyncTcpClient("127.0.0.1", self.ports["wyoming"])
        await client.connect()
        said = self.paced("wyoming", offset_s=20.0)
        over = False
        while not over:
            await client.write_event(AudioStart(rate=RATE, width=2, channels=1).event())
            answering = asyncio.create_task(self._transcript(client))
            over = True
            count = 0
            async for block in said:
                await client.write_event(AudioChunk(RATE, 2, 1, pcm(block)).event())
                count += 1
                if count * BLOCK_S >= UTTERANCE_S:
                    over = False
                    break
            await client.write_event(AudioStop().event())
            await answering
        await client.disconnect()

    @staticmethod
    async def _transcript(client: AsyncTcpClient) -> None:
        while (event := await client.read_event()) is not None and event.type != "transcript":
            pass

    async def rtp(self) -> None:
        """8 kHz μ-law in packets of 20 ms, some of which are lost."""
        rng = np.random.default_rng(0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            number = 0
            async for block in self.paced("rtp", narrow=True, offset_s=60.0):
                for piece in np.split(block, 5):
                    head = struct.pack("!BBHII", 0x80, 0, number & 0xFFFF, number * 160, 7)
                    # Nobody knows of what came before the first packet.
                    if number and rng.random() < LOSS:
                        self.lost["rtp"] += 0.02
                    else:
                        sender.sendto(head + mulaw(piece), ("127.0.0.1", self.ports["rtp"]))
                    number += 1

    @staticmethod
    async def drain(ws: Any) -> None:
        """Read until it is closed."""
        async for _ in ws:
            pass


@dataclass
class Seen:
    """Events of all sessions, as one receiver saw them.

    Attributes:
        finals: (session, seq) → how often.
        all: Likewise, partials too.
    """

    finals: Counter[tuple[str, int]] = field(default_factory=Counter)
    all: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, data: bytes | str) -> dict[str, Any]:
        """One event as JSON → it."""
        event = json.loads(data)
        key = (event["session_id"], event["seq"])
        self.all[key] += 1
        if event["is_final"]:
            self.finals[key] += 1
        return event


@dataclass
class Account:
    """What became of the audio of one stream, by its events.

    Attributes:
        sessions: It had.
        audio_s: Seconds of audio they heard, gaps included.
        lost_s: Seconds in gaps, by their reason.
    """

    sessions: int = 0
    audio_s: float = 0.0
    lost_s: Counter[str] = field(default_factory=Counter)


def accounts(events: Path, seen: Seen) -> tuple[dict[str, Account], int]:
    """The log of all events → accounts by stream, and sessions with a hole in ``seq``."""
    streams: dict[str, str] = {}
    heard: dict[str, float] = defaultdict(float)
    lost: dict[str, Counter[str]] = defaultdict(Counter)
    seqs: dict[str, list[int]] = defaultdict(list)
    for line in events.read_bytes().splitlines():
        event = seen.add(line)
        session = event["session_id"]
        streams[session] = event["stream_id"].partition("-")[0]
        seqs[session].append(event["seq"])
        if event["type"] == "heartbeat":
            heard[session] = max(heard[session], event["audio_received_s"])
        elif event["type"] == "session.closed":
            heard[session] = event["totals"]["audio_s"]
        elif event["type"] == "gap":
            lost[session][event["reason"]] += event["lost_samples"] / RATE
    by_stream: dict[str, Account] = defaultdict(Account)
    for session, stream in streams.items():
        account = by_stream[stream]
        account.sessions += 1
        account.audio_s += heard[session]
        account.lost_s += lost[session]
    return by_stream, sum(got != list(range(len(got))) for got in seqs.values())


class Subscriber:
    """Reads the feed, and notes how late events are."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen = Seen()
        self.began = time.monotonic()
        self.lags: dict[int, list[float]] = defaultdict(list)

    async def run(self) -> None:
        """Until the daemon ends."""
        async with connect(f"{self.url}?cursor=0") as ws:
            async for message in ws:
                told = json.loads(message)
                if "event" not in told:
                    continue
                event = self.seen.add(json.dumps(told["event"]))
                if event["type"] in {"turn.started", "transcript.partial"}:
                    minute = int((time.monotonic() - self.began) / 60)
                    self.lags[minute].append(event["lag_ms"])

    def lag(self, minute: int) -> tuple[float, float]:
        """Median and p99 of a minute, in milliseconds."""
        lags = self.lags.get(minute, [0.0])
        return median(lags), float(np.quantile(lags, 0.99))


class Buses:
    """The brokers that are installed, and what reached them."""

    def __init__(self, folder: Path) -> None:
        self.sinks: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, Seen] = {}
        self._broker = Broker(folder) if mosquitto() else None
        command = nats_server(folder / "nats")
        self._nats = Server(*command) if shutil.which(command[0]) else None
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Buses":
        if self._broker is not None:
            await asyncio.to_thread(self._broker.start)
            self.sinks["mqtt"] = {"kind": "mqtt", "host": "127.0.0.1", "port": self._broker.port}
            self.seen["mqtt"] = Seen()
            subscribed = asyncio.Event()
            self._reading = asyncio.create_task(self._subscribe(self._broker.port, subscribed))
            await subscribed.wait()
        if self._nats is not None:
            await asyncio.to_thread(self._nats.start)
            self.sinks["nats"] = {
                "kind": "nats",
                "servers": [f"nats://127.0.0.1:{self._nats.port}"],
            }
            self.seen["nats"] = Seen()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        for each in (self._broker, self._nats):
            if each is not None:
                each.kill()

    async def _subscribe(self, port: int, subscribed: asyncio.Event) -> None:
        version = aiomqtt.ProtocolVersion.V5
        async with aiomqtt.Client("127.0.0.1", port, protocol=version) as client:
            await client.subscribe("livesat/v1/+/+/event/#", qos=1)
            await client.subscribe("livesat/v1/+/+/partial/#")
            subscribed.set()
            async for message in client.messages:
                self.seen["mqtt"].add(message.payload)

    async def settle(self) -> None:
        """Read what is stored, once the daemon has ended."""
        await asyncio.sleep(1.0)
        if self._nats is not None:
            for message in await stored(self._nats):
                self.seen["nats"].add(message.data)


@dataclass(frozen=True)
class Minute:
    """How the daemon was at the end of a minute."""

    mib: float
    history_mib: float
    files: int
    tasks: int
    lag_ms: float
    lag_p99_ms: float


@dataclass
class Soak:
    """One run.

    Attributes:
        minutes: How long.
        timed: Whether lateness is judged.
        console: Where it reports.
    """

    minutes: float
    timed: bool
    console: Console
    rows: list[Minute] = field(default_factory=list[Minute])
    loop_p99_ms: float = 0.0
    faults: int = 0
    evicted: int = 0
    play: Callable[[], object] = field(default=lambda: None)
    """Begin what ffmpeg sends."""

    async def run(self) -> bool:
        """→ whether it stayed as it was."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            samples, _ = soundfile.read(MEETING, dtype="float32")
            stop = asyncio.Event()
            names = ("server", "tcp", "rtp", "wyoming", "av")
            ports = dict(zip(names, free_ports(len(names)), strict=True))
            senders = Senders(samples, ports, stop)
            async with Buses(folder) as buses:
                with self._devices(folder, samples, ports["av"]) as (sources, env):
                    await self._load(folder, senders, buses, sources, env)
                await buses.settle()
                return self._judge(folder, senders, buses)

    @contextlib.contextmanager
    def _devices(self, folder: Path, samples: np.ndarray, port: int) -> Any:
        """What is heard without being sent: the configuration's sources, and the environment."""
        sources: dict[str, Any] = {}
        env = dict(os.environ)
        with contextlib.ExitStack() as stack:
            if not MISSING:
                device = folder / "microphone"
                device.mkdir()

                def says(start: int) -> np.ndarray:
                    return np.take(samples, range(start, start + 320), mode="wrap") * 32767

                fake = stack.enter_context(FakeMicrophone(device, says=says))
                fake.speak()
                env |= {
                    "PULSE_SERVER": f"unix:{device}/native",
                    "PULSE_SOURCE": "mic0",
                    "HOME": str(device),
                }
                sources["microphone"] = {"kind": "microphone", "device": "pulse"}
            if shutil.which("ffmpeg"):
                url = f"udp://127.0.0.1:{port}"
                source = ("-stream_loop", "-1", "-i", str(MEETING))
                form = ("-c:a", "aac", "-f", "mpegts", f"{url}?pkt_size=1316")
                self.play = lambda: stack.enter_context(Sender(*source, *form))
                sources["av"] = {"kind": "av", "url": url, "options": FFMPEG}
            yield sources, env

    async def _load(
        self,
        folder: Path,
        senders: Senders,
        buses: Buses,
        sources: dict[str, Any],
        env: dict[str, str],
    ) -> None:
        ports = senders.ports
        spare = 2 - len(sources)
        tree = {
            "server": {"port": ports["server"], "max_streams": 3 + spare},
            "sources": {
                "tcp": {"kind": "tcp", "port": ports["tcp"], "streams": 1},
                "rtp": {"kind": "rtp", "port": ports["rtp"], "payload": "mulaw"},
                "wyoming": {"kind": "wyoming", "port": ports["wyoming"], "streams": 1},
                **sources,
            },
            "sinks": {
                "log": {"kind": "jsonl", "path": str(folder / "events.jsonl")},
                **buses.sinks,
            },
            "fanout": {"outbox": str(folder / "outbox.db")},
            "session": {"state": str(folder / "sessions.db"), "heartbeat_s": 1},
            "tracks": {"speakers": {"history_turns": TURNS}},
            "log": {"level": "warning"},
        }
        daemon = Daemon(folder, ports["server"])
        async with daemon.running(tree, env), daemon.http() as http:
            began = time.monotonic()
            self.play()
            self.subscriber = Subscriber(daemon.url("/v1/events"))
            reading = asyncio.create_task(self.subscriber.run())
            watching = asyncio.create_task(daemon.watch())
            sending = [
                asyncio.create_task(each)
                for each in (
                    *(senders.websocket(f"ws{n}", 7.0 * n) for n in range(1 + spare)),
                    senders.deepgram(),
                    senders.twilio(),
                    senders.tcp(),
                    senders.wyoming(),
                    senders.rtp(),
                )
            ]
            for minute in range(max(round(self.minutes), 1)):
                end = min((minute + 1) * 60, self.minutes * 60)
                await self._until(began + end, sending)
                await self._note(minute, end, daemon, http)
            senders.stop.set()
            async with asyncio.timeout(ANSWERED_S):
                await asyncio.gather(*sending)
            await asyncio.sleep(1.0)
            watching.cancel()
            self.devices_s = time.monotonic() - began
            await daemon.stop()
            await asyncio.gather(reading, return_exceptions=True)
        self.daemon = daemon

    @staticmethod
    async def _until(due: float, sending: "list[asyncio.Task[None]]") -> None:
        """Wait, unless a sender fails meanwhile."""
        left = max(due - time.monotonic(), 0)
        done, _ = await asyncio.wait(sending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
            raise RuntimeError("a sender has ended before its time")

    async def _note(self, minute: int, end_s: float, daemon: Daemon, http: Any) -> None:
        status = (await http.get("/v1/status")).json()
        files = await asyncio.to_thread(open_files, daemon.pid)
        mib = daemon.usual_mib(minute * 60, end_s + 2)
        lag, p99 = self.subscriber.lag(minute)
        history = status["history_bytes"] / (1 << 20)
        self.rows.append(Minute(mib, history, files, status["tasks"], lag, p99))
        self.loop_p99_ms, self.faults = status["loop_p99_ms"], status["faults"]
        self.evicted = status["evicted"]
        cost = 100 * status["compute_s"] / max(status["audio_s"], 1)
        self.console.print(
            f"minute {minute + 1}: {mib:.0f} MiB, {files} files, {status['tasks']} tasks, "
            f"lag {lag:.0f} ms (p99 {p99:.0f}), {status['streams']} streams, "
            f"{cost:.1f} % of a core a stream"
        )

    def _judge(self, folder: Path, senders: Senders, buses: Buses) -> bool:
        table = Table("minute", "MiB", "of them history", "files", "tasks", "lag p50", "lag p99")
        for number, row in enumerate(self.rows, 1):
            figures = (row.mib, row.files, row.tasks, row.lag_ms, row.lag_p99_ms)
            texts = [f"{each:.0f}" for each in figures]
            table.add_row(str(number), texts[0], f"{row.history_mib:.1f}", *texts[1:])
        self.console.print(table)
        log = Seen()
        streams, holes = accounts(folder / "events.jsonl", log)
        verdict = Verdict(f"{len(streams)} streams, {self.minutes:g} minutes")
        verdict.exactly("streams", len(streams), 8)
        kept_up = not any(account.lost_s["overflow"] for account in streams.values())
        self._judge_audio(verdict, senders, streams)
        verdict.tell("events", len(log.all))
        verdict.exactly("sessions with a hole in seq", holes, 0)
        told = self.subscriber.seen.all
        verdict.exactly("events of the feed that the file has not", len(told - log.all), 0)
        verdict.exactly("events the feed gave twice", told.total() - len(told), 0)
        for name, seen in buses.seen.items():
            missing = len(log.finals.keys() - seen.finals.keys())
            verdict.exactly(f"finals that {name} has not", missing, 0)
            again = seen.all.total() - len(seen.all)
            verdict.exactly(f"events {name} has twice", again, 0)
        verdict.exactly("subscribers evicted", self.evicted, 0)
        verdict.exactly("exceptions nobody took", self.faults + self.daemon.tracebacks, 0)
        code = self.daemon.code
        verdict.exactly("exit code after SIGTERM", -1 if code is None else code, 0)
        if self.timed:
            verdict.most("loop lag p99", self.loop_p99_ms, LOOP_MS, "ms")
        if len(self.rows) >= 3:
            self._judge_growth(verdict, memory=self.timed or kept_up)
        return verdict.show(self.console)

    def _judge_audio(self, verdict: Verdict, senders: Senders, streams: dict[str, Account]) -> None:
        """What was sent is what was heard, and what was lost is what was left out."""
        for name, account in sorted(streams.items()):
            sent, left_out = senders.sent.get(name), senders.lost.get(name, 0.0)
            overflow = account.lost_s.pop("overflow", 0.0)
            told = account.lost_s.total()
            if sent is not None:
                # A line that is left open tells of its last second in the next run.
                slack = 1.5 if name == "rtp" else 0.1 * account.sessions
                off = abs(sent - account.audio_s)
                verdict.most(f"{name}: sent and not on the clock", off, slack, "s")
            elif self.timed:
                # Nobody counts what a device plays; its session stays open, its last heartbeat
                # tells of it.
                least = round(self.devices_s - 5, 1)
                verdict.least(f"{name}: heard", account.audio_s, least, "s")
            if self.timed:
                off = abs(told - left_out)
                verdict.most(f"{name}: lost on the way, not told", off, 0.05, "s")
                verdict.exactly(f"{name}: lost here", overflow, 0, "s")
            else:
                # A gap has one reason: of what was lost on the way, some may be part of ours.
                off = max(left_out - told - overflow, 0.0)
                verdict.most(f"{name}: lost and not told", off, 0.05, "s")

    def _judge_growth(self, verdict: Verdict, *, memory: bool) -> None:
        second, last = self.rows[1], self.rows[-1]
        hours = (len(self.rows) - 2) / 60
        history = OVERHEAD * (last.history_mib - second.history_mib)
        growth = last.mib - second.mib - history
        bar = RESOLUTION_MIB * (1 if self.timed else 2) + SLOPE_MIB_H * hours
        name = "memory since minute 2, without history"
        if memory:
            verdict.most(name, growth, round(bar, 2), "MiB")
        else:
            verdict.tell(name, growth, "MiB")
        verdict.most("open files since minute 2", last.files - second.files, 1)
        verdict.most("tasks since minute 2", last.tasks - second.tasks, ONE_STREAM)
        if self.timed:
            drift = last.lag_ms / max(second.lag_ms, 1.0)
            verdict.most("median lag beside minute 2", drift, LAG_DRIFT, "×")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--untimed", action="store_true", help="do not judge lateness")
    given = parser.parse_args()
    soak = Soak(given.minutes, not given.untimed, Console())
    sys.exit(0 if asyncio.run(soak.run()) else 1)


if __name__ == "__main__":
    main()
