"""Does a broker that dies, hangs or stays away cost a final, order, or memory?

Rows 1 and 2 of the reliability bar against real brokers: the fanout with its outbox, fed at a
steady rate, and a broker that is killed and stopped (``kills``), or gone for long (``outage``).

    python -m benchmarks.brokers                           # both, small
    python -m benchmarks.brokers kills --times 20          # 20 kills and 20 stops, 200 events/s
    python -m benchmarks.brokers outage --minutes 10       # 100 events/s

It ends with tables of what was found beside what must hold, and with 1 if something does not.
With ``--untimed`` an outage is not judged by how fast what waited is delivered, nor by how late
live events are after it, which a busy machine has a part in.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
import structlog
from rich.console import Console

from benchmarks.daemon import resident_mib
from benchmarks.verdict import Verdict
from sinks import MqttSettings, NatsSettings
from sinks.sink import SinkSettings
from stream.fanout import Fanout, FanoutSettings
from stream.pulse import few_arenas, give_back
from tests.broker import Broker, Server, mosquitto, nats_server, stored
from tests.sinks.samples import Talk
from tests.stream.house import until

GROWTH_MIB = 32.0
DRAIN = 5.0
"""How many times the live rate what waited is delivered at."""
LIVE_MS = 100.0
LIVE_WITHIN_S = 30.0
LIVE_S = 10.0
"""How long live events are timed."""
DOWN_S = 0.3
COME_BACK_S = 2.0
"""How long a subscriber's connection may take."""


class Bus:
    """A broker of one kind, the sink for it, and what subscribers get.

    Attributes:
        process: The broker's.
        got: (session, seq, seconds after it was published, when by the clock on the wall) in the
            order of their arrival.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.process = kind, _process(kind, folder)
        self.got: list[tuple[str, int, float, float]] = []

    @property
    def sink(self) -> SinkSettings:
        """Its settings."""
        port = self.process.port
        if self.kind == "mqtt":
            return MqttSettings(host="127.0.0.1", port=port, node="box", timeout_s=1)
        return NatsSettings(servers=(f"nats://127.0.0.1:{port}",), node="box", timeout_s=1)

    def take(self, payload: bytes, at: float) -> None:
        """An event as it came."""
        event = json.loads(payload)
        self.got.append((event["session_id"], event["seq"], at - float(event["message"]), at))

    async def listen(self) -> None:
        """A subscriber of mosquitto's that comes back whenever it does; until cancelled."""
        while self.kind == "mqtt":
            try:
                await self._mqtt()
            except aiomqtt.MqttError:
                await asyncio.sleep(0.05)

    async def _mqtt(self) -> None:
        # A session that the broker keeps: what is published while we are away waits there.
        async with aiomqtt.Client(
            "127.0.0.1",
            self.process.port,
            protocol=aiomqtt.ProtocolVersion.V5,
            identifier="reader",
            clean_start=False,
            properties=_kept(),
            timeout=COME_BACK_S,
        ) as client:
            await client.subscribe("livesat/v1/box/+/event/#", qos=1)
            async for message in client.messages:
                self.take(message.payload, time.time())

    async def heard_out(self) -> None:
        """Wait until the subscriber has had nothing new for as long as a connection may take."""
        had = -1
        while len(self.got) > had:
            had = len(self.got)
            await asyncio.sleep(COME_BACK_S + 1 if self.kind == "mqtt" else 1)

    async def stored(self) -> None:
        """Take what JetStream stored: that is what its subscribers can get."""
        if self.kind == "nats":
            for message in await stored(self.process):
                self.take(message.data, message.metadata.timestamp.timestamp())


@asynccontextmanager
async def _bus(kind: str) -> AsyncIterator[tuple[Bus, Path]]:
    """A running broker and a folder for what is beside it; in the end it has taken all there is."""
    with tempfile.TemporaryDirectory() as scratch:
        bus = Bus(kind, Path(scratch))
        await asyncio.to_thread(bus.process.start)
        listening = asyncio.create_task(bus.listen())
        try:
            yield bus, Path(scratch)
            await bus.heard_out()
            await bus.stored()
        finally:
            listening.cancel()
            bus.process.kill()


def _process(kind: str, folder: Path) -> Server:
    if kind == "mqtt":
        kept = f"persistence true\npersistence_location {folder}/\nmax_queued_messages 0\n"
        return Broker(folder, kept)
    return Server(*nats_server(folder / "nats"))


def _kept() -> Any:
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600
    return properties


@asynccontextmanager
async def _fanout(bus: Bus, folder: Path, spool: int) -> AsyncIterator[Fanout]:
    settings = FanoutSettings(
        outbox=folder / "outbox.db", spool=spool, retry_longest_s=1.0, drain_s=60
    )
    async with Fanout({"bus": bus.sink}, settings) as out:
        yield out


class Source:
    """Events at a steady rate: their message is when they were published."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.talks = [Talk(f"s{number}", f"stream{number}") for number in range(4)]
        self.published = 0

    def ids(self) -> set[tuple[str, int]]:
        """(session, seq) of all that was published."""
        return {(talk.session_id, seq) for talk in self.talks for seq in range(talk.seq)}

    async def run(self, out: Fanout) -> None:
        """Until cancelled."""
        began = time.monotonic()
        while True:
            talk = self.talks[self.published % len(self.talks)]
            await out.publish(talk.warning(str(time.time())))
            self.published += 1
            await asyncio.sleep(max(began + self.published / self.rate - time.monotonic(), 0))


async def _caught_up(out: Fanout, but: float = 0, within_s: float = 120) -> None:
    """Wait until the sink has everything but so much."""
    async with asyncio.timeout(within_s):
        await until(lambda: out.statistics()["bus"].queued <= but)


async def kills(kind: str, times: int, rate: float, console: Console) -> bool:
    """Row 1: the broker is killed so many times, and stopped as often, while events flow."""
    rng, source = random.Random(0), Source(rate)
    async with _bus(kind) as (bus, folder):
        await asyncio.sleep(0.5)
        async with _fanout(bus, folder, 100_000) as out:
            feeding = asyncio.create_task(source.run(out))
            for number in range(2 * times):
                await asyncio.sleep(rng.uniform(0.3, 1.0))
                if number % 2:
                    await asyncio.to_thread(bus.process.kill)
                    await asyncio.sleep(DOWN_S)
                    await asyncio.to_thread(bus.process.start)
                else:
                    bus.process.freeze()
                    await asyncio.sleep(rng.uniform(0.2, 2.0))
                    bus.process.thaw()
            await asyncio.sleep(1.0)
            feeding.cancel()
            await _caught_up(out)
            statistics = out.statistics()["bus"]
    wanted = source.ids()
    ids = Counter((session, seq) for session, seq, *_ in bus.got)
    verdict = Verdict(f"{kind}: {times} kills and {times} stops at {rate:g} events/s")
    verdict.tell("events", source.published)
    verdict.tell("failed attempts", statistics.retries)
    verdict.exactly("finals that never arrived", statistics.lost_finals + statistics.rejected, 0)
    missing = len(wanted - ids.keys())
    if kind == "nats":
        verdict.exactly("finals not stored", missing, 0)
    else:
        # mosquitto acknowledges before it writes to disk: what it loses when it is killed shows in
        # `seq`, and can be asked for again.
        verdict.tell("finals mosquitto lost when it was killed", missing)
        undetected = sum(
            talk.seq - 1 - max((q for s, q in ids if s == talk.session_id), default=-1)
            for talk in source.talks
        )
        verdict.exactly("of them without a later one that shows it", undetected, 0)
    verdict.exactly("events nobody published", len(ids.keys() - wanted), 0)
    verdict.exactly("out of order, once repeats are dropped", _disorder(bus), 0)
    verdict.tell("repeats", ids.total() - len(ids))
    return verdict.show(console)


def _disorder(bus: Bus) -> int:
    """Events that came after a later one of their session, the first time they came."""
    seen, last, wrong = set[tuple[str, int]](), Counter[str](), 0
    for session, seq, *_ in bus.got:
        if (session, seq) not in seen:
            seen.add((session, seq))
            wrong += seq < last[session]
            last[session] = max(last[session], seq)
    return wrong


async def outage(
    kind: str, minutes: float, rate: float, console: Console, *, timed: bool = True
) -> bool:
    """Row 2: the broker is away for so long, then comes back."""
    source, spool = Source(rate), int(minutes * 60 * rate * 2)
    giving = asyncio.create_task(give_back())
    async with _bus(kind) as (bus, folder), _fanout(bus, folder, spool) as out:
        feeding = asyncio.create_task(source.run(out))
        await asyncio.sleep(5)
        before = resident_mib(os.getpid())
        await asyncio.to_thread(bus.process.kill)
        most = before
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end:
            await asyncio.sleep(1.0)
            most = max(most, resident_mib(os.getpid()))
        waiting = out.statistics()["bus"].queued
        await asyncio.to_thread(bus.process.start)
        await until(lambda: out.statistics()["bus"].connected)
        if not timed:
            feeding.cancel()
        spent, back = time.process_time(), time.monotonic()
        had = out.statistics()["bus"].sent
        await _caught_up(out, rate / 10, 120 + waiting / rate)
        took = time.monotonic() - back
        drained = (out.statistics()["bus"].sent - had) / took
        spent = (time.process_time() - spent) / (drained * took)
        most = max(most, resident_mib(os.getpid()))
        live_from = inf
        if timed:
            await asyncio.sleep(max(back + LIVE_WITHIN_S - time.monotonic(), 0))
            live_from = time.time()
            await asyncio.sleep(LIVE_S)
        feeding.cancel()
        await _caught_up(out)
        statistics = out.statistics()["bus"]
    giving.cancel()
    ids = {(session, seq) for session, seq, *_ in bus.got}
    wanted = source.ids()
    verdict = Verdict(f"{kind}: away for {minutes:g} min at {rate:g} events/s")
    verdict.tell("finals that waited", waiting)
    verdict.tell("cap of the spool (drop_oldest)", spool)
    verdict.most("growth of memory", most - before, GROWTH_MIB, "MiB")
    verdict.tell("processor time of a drained event, subscriber included", spent * 1000, "ms")
    if timed:
        verdict.least("drained, beside the live rate", drained / rate, DRAIN, "×")
        delays = [delay for _, _, delay, at in bus.got if at >= live_from] or [inf]
        p99 = float(np.quantile(delays, 0.99)) * 1000
        verdict.most(f"live p99, {LIVE_WITHIN_S:g} s after", p99, LIVE_MS, "ms")
    verdict.exactly("finals that never arrived", statistics.lost_finals + statistics.rejected, 0)
    verdict.exactly("finals subscribers have not", len(wanted - ids), 0)
    return verdict.show(console)


async def measure(given: argparse.Namespace, console: Console) -> bool:
    """All that is asked for → whether all held."""
    ok = True
    for kind in given.kinds:
        if kind == "mqtt" and mosquitto() is None:
            console.print("mosquitto is not installed: skipped")
            continue
        if given.what in {"kills", "both"}:
            ok &= await kills(kind, given.times, given.rate or 200, console)
        if given.what in {"outage", "both"}:
            timed = not given.untimed
            ok &= await outage(kind, given.minutes, given.rate or 100, console, timed=timed)
    return ok


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["kills", "outage", "both"], nargs="?", default="both")
    parser.add_argument("--kinds", nargs="+", choices=["nats", "mqtt"], default=["nats", "mqtt"])
    parser.add_argument("--times", type=int, default=3, help="kills, and as many stops")
    parser.add_argument("--minutes", type=float, default=0.5, help="of the outage")
    parser.add_argument("--rate", type=float, help="events a second; 200 and 100")
    parser.add_argument("--untimed", action="store_true", help="do not judge lateness")
    few_arenas()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    sys.exit(0 if asyncio.run(measure(parser.parse_args(), Console())) else 1)


if __name__ == "__main__":
    main()
